"""Corpora of random tokens."""

from pathlib import Path

import numpy as np

from flax_mlm.data import units
from flax_mlm.data.corpus import FORMAT, row_dtype, write_manifest
from flax_mlm.data.units import write_shard

L = 8


def write_corpus(folder: Path, tok, seed: int = 0, length: int = L, documents: int = 9) -> dict[str, list[int]]:
    """A corpus of three training shards; returns the tokens of each split, sorted."""
    rng, tokens, splits = np.random.default_rng(seed), {}, {}
    folder.mkdir()
    for split, shards in (("train", 3), ("validation", 1)):
        entries, all_ids = [], []
        for unit in range(shards):
            lengths = rng.integers(1, 40, documents)
            ids = rng.integers(5, 280, lengths.sum()).astype(row_dtype(280))
            table = np.stack([np.arange(documents), lengths, lengths, lengths], axis=1)
            file = folder / f"{split}-{unit:05d}.npy"
            entries.append(write_shard(file, ids, table, length, tok, "best_fit"))
            all_ids += ids.tolist()
        splits[split] = units.join_entries(entries)
        tokens[split] = sorted(all_ids)
    tok.save(folder)
    tokenizer = {"file": tok.filename, "size": len(tok.content), "sha256": tok.fingerprint}
    tokenizer |= {"vocab_size": tok.vocab_size, "pad_id": tok.pad_id}
    manifest = {
        "format": FORMAT,
        "request": "",
        "source": {"name": "random", "licence": "none", "counts": {}},
        "tokenizer": tokenizer,
        "seq_len": length,
        "dtype": "uint16",
        "splits": splits,
    }
    write_manifest(folder, manifest)
    return tokens
