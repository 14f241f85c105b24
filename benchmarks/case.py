"""One step to be made by all: the same initial weights, the same rows, the same tokens hidden.

    python -m benchmarks.case FOLDER        # run by the benchmarks, with what `Case.write` has put there

A folder holds case.json (our config and the special ids), batches.npz, and hf/, our initial weights as a Hugging Face
folder, from which the peers start. Imports no TensorFlow.
"""

import dataclasses
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks import turns
from flax_mlm.config.load import build, from_dict
from flax_mlm.config.schema import Config
from flax_mlm.configs import base
from flax_mlm.errors import UserError

BATCHES = 4  # taken in turn


class Ids(NamedTuple):
    """What a step has to know of a tokenizer."""

    vocab_size: int
    special: list[int]
    pad_id: int
    cls_id: int
    sep_id: int
    mask_id: int

    @classmethod
    def of(cls, tokenizer: Any) -> "Ids":
        special = np.flatnonzero(tokenizer.is_special).tolist()
        return cls(len(tokenizer.tokens), special, *(int(getattr(tokenizer, name)) for name in cls._fields[2:]))


class Matmul(NamedTuple):
    """`batch` products of (m, k) by (k, n), `count` times in a step; `turned`: the left one lies transposed, as for the
    gradient of weights."""

    batch: int
    m: int
    k: int
    n: int
    turned: bool
    count: int

    @property
    def flops(self) -> float:
        """Of one of them."""
        return 2.0 * self.batch * self.m * self.k * self.n


@dataclasses.dataclass(frozen=True)
class Case:
    """A model's shape and a batch's. Heads have 64 dimensions."""

    layers: int
    width: int
    length: int
    vocab: int
    rows: int
    dtype: str = "float32"
    remat: str = "none"  # of ours
    inner: int = 0  # width inside BERT's MLP; 0: 4 times the hidden one
    vocab_multiple_of: int = 1

    @property
    def name(self) -> str:
        return f"{self.layers}×{self.width}, {self.rows}×{self.length} tokens, {self.vocab:,} words"

    def config(self, family: str) -> Config:
        """Our config. A ModernBERT's gated MLP is two thirds as wide as BERT's: the same FLOPs."""
        values = base.get_config()
        changes: dict[str, Any] = {
            "data.seq_len": self.length,
            "model.num_layers": self.layers,
            "model.hidden_size": self.width,
            "model.num_heads": max(1, self.width // 64),
            "model.intermediate_size": self.inner or 4 * self.width,
            "model.max_positions": max(512, self.length),
            "model.dropout_rate": 0.0,
            "model.attention_dropout_rate": 0.0,
            "model.vocab_multiple_of": self.vocab_multiple_of,
            "model.dtype": self.dtype,
            "model.remat": self.remat,
            "model.scan_layers": False,
            "train.global_batch_size": self.rows,
            "optimizer.learning_rate": 1e-4,
            "optimizer.schedule": "constant",
            "optimizer.warmup_fraction": 0.0,
        }
        if family == "modernbert":
            changes |= {
                "model.intermediate_size": max(8, round((self.inner or 4 * self.width) * 2 / 3 / 8) * 8),
                "model.position_embedding": "rope",
                "model.norm_position": "pre",
                "model.norm_eps": 1e-5,
                "model.use_bias": False,
                "model.glu": True,
                "model.type_vocab_size": 0,
                "model.global_attn_every_n_layers": 3,
            }
        values.update_from_flattened_dict(changes)
        return build(values)

    @property
    def slots(self) -> int:
        """Predicted tokens of a row."""
        from flax_mlm.objectives import masking

        return masking.max_predictions_per_row(self.length, self.config("bert").objective.mask_rate)

    def matmuls(self) -> list[Matmul]:
        """All of a BERT's step: forward, and for the gradients of inputs and weights."""
        from flax_mlm.model.heads import vocab_rows

        tokens, d, predicted = self.rows * self.length, self.width, self.rows * self.slots
        model = self.config("bert").model
        inner, heads, vocab = model.intermediate_size, model.num_heads, vocab_rows(model, self.vocab)
        projections = [(tokens, d, 3 * d, self.layers), (tokens, d, d, self.layers), (tokens, d, inner, self.layers)]
        projections += [(tokens, inner, d, self.layers), (predicted, d, d, 1), (predicted, d, vocab, 1)]
        counts: dict[tuple[int, int, int, int, bool], int] = {}
        for m, k, n, count in projections:
            for shape in ((1, m, k, n, False), (1, m, n, k, False), (1, k, m, n, True)):
                counts[shape] = counts.get(shape, 0) + count
        attention, head = self.rows * heads, d // heads
        for shape in (
            (attention, self.length, head, self.length, False),
            (attention, *2 * (self.length,), head, False),
        ):
            counts[shape] = counts.get(shape, 0) + 3 * self.layers
        return [Matmul(*shape, count) for shape, count in counts.items()]

    def flops(self, family: str = "bert") -> float:
        """Useful FLOPs of one step; only predicted tokens are scored, and a window is all that its layers look at."""
        from flax_mlm.model import flops
        from flax_mlm.model.heads import vocab_rows

        model = self.config(family).model
        return self.rows * flops.per_row(model, self.length, self.slots, vocab_rows(model, self.vocab))

    def describe(self, folder: Path, family: str, ids: Ids, tokens: np.ndarray) -> None:
        """Puts case.json and tokens.npy into a new folder. `tokens`: BATCHES × rows."""
        folder.mkdir(parents=True)
        np.save(folder / "tokens.npy", tokens.reshape(BATCHES, self.rows, self.length))
        about = {"config": self.config(family).to_dict(), "ids": ids._asdict()}
        (folder / "case.json").write_text(json.dumps(about))

    def make(self, folder: Path, family: str, ids: Ids, tokens: np.ndarray) -> None:
        """Makes the whole folder, in a process of its own, whose memory is free again afterwards."""
        self.describe(folder, family, ids, tokens)
        line = [sys.executable, "-m", "benchmarks.case", str(folder)]
        subprocess.run(line, cwd=turns.ROOT, check=True, env={**os.environ, **turns.CPU})


def real_rows(case: Case, config: Config) -> tuple[Any, np.ndarray]:
    """A tokenizer of real text and rows for a case, of the source that the config names."""
    from flax_mlm.data.prepare import prepare

    data = dataclasses.replace(config.data, seq_len=case.length)
    tokenizer = dataclasses.replace(config.tokenizer, vocab_size=case.vocab)
    corpus = prepare(dataclasses.replace(config, data=data, tokenizer=tokenizer), log=turns.say)
    return corpus.tokenizer(), full_rows(corpus.split("train"), BATCHES * case.rows, Ids.of(corpus.tokenizer()))


def full_rows(rows: Any, count: int, ids: Ids) -> np.ndarray:
    """Rows of a packed split that one piece of a document fills from end to end.

    In these no token is padding, and no peer needs to know of segments to compute the same as we do.

    Raises:
      UserError: there are too few.
    """
    found = np.zeros((0, rows.seq_len), np.int32)
    for start in range(0, rows.num_rows, 4096):
        tokens = rows.read(np.arange(start, min(start + 4096, rows.num_rows)))
        found = np.concatenate([found, tokens[((tokens == ids.cls_id).sum(1) == 1) & (tokens[:, -1] == ids.sep_id)]])
        if len(found) >= count:
            return found[:count]
    raise UserError(
        f"data.source: of its rows of {rows.seq_len} tokens {len(found)} are filled by one document; {count} are needed"
    )


def read(folder: Path) -> tuple[Config, Ids]:
    """What case.json says."""
    about = json.loads((folder / "case.json").read_text())
    return build(from_dict(about["config"])), Ids(**about["ids"])


def vocabulary(ids: Ids) -> Any:
    """Lookup tables for masking; each token is a word of its own."""
    import jax.numpy as jnp

    from flax_mlm.objectives.rows import Vocabulary

    is_special = np.isin(np.arange(ids.vocab_size), ids.special)
    ordinary = jnp.asarray(np.flatnonzero(~is_special), jnp.int32)
    is_word = jnp.ones(ids.vocab_size, bool)
    return Vocabulary(jnp.asarray(is_special), is_word, is_word, ordinary, ids.pad_id, ids.cls_id, ids.mask_id)


def labels(t: Any) -> np.ndarray:
    """The hidden tokens (B, L) of `Targets`, as transformers takes them: -100 where none is."""
    labels_BL = np.full_like(t.inputs_BL, -100)
    row, slot = np.nonzero(t.weights_BK)
    labels_BL[row, t.predict_BK[row, slot]] = t.labels_BK[row, slot]
    return labels_BL


def write(folder: Path) -> None:
    """Adds batches.npz, with the tokens hidden that our step will hide, and hf/ with our initial weights."""
    import jax

    from flax_mlm.distributed.batches import shard_rows
    from flax_mlm.distributed.mesh import make_mesh
    from flax_mlm.hf import folder as folder_lib
    from flax_mlm.hf.weights import param_mappings, params_to_tensors
    from flax_mlm.model.heads import vocab_rows
    from flax_mlm.objectives import masking
    from flax_mlm.objectives.rows import run_key
    from flax_mlm.objectives.targets import make_targets, max_predictions_per_row
    from flax_mlm.training.step import build_training

    config, ids = read(folder)
    tokens_NBL = np.load(folder / "tokens.npy").astype(np.int32)
    row_ids_NB2 = np.zeros((*tokens_NBL.shape[:2], 2), np.uint32)
    row_ids_NB2[..., 1] = np.arange(row_ids_NB2[..., 1].size).reshape(row_ids_NB2.shape[:2])
    slots = max_predictions_per_row(config.objective, config.data.seq_len, config.objective.mask_rate)
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        training, vocab = build_training(config, ids.vocab_size, mesh), vocabulary(ids)
        o, key = config.objective, run_key(config, "mask")
        rates = masking.rates(o, o.mask_rate)
        targets = jax.jit(lambda rows: make_targets(o, rows, key, vocab, rates, slots))
        inputs, hidden = np.empty_like(tokens_NBL), np.empty_like(tokens_NBL)
        for n, (tokens, row_ids) in enumerate(zip(tokens_NBL, row_ids_NB2, strict=True)):
            t = jax.device_get(targets(shard_rows({"tokens": tokens, "row_ids": row_ids}, mesh)))
            inputs[n], hidden[n] = t.inputs_BL, labels(t)
        params = jax.device_get(training.init().params)
    np.savez(folder / "batches.npz", tokens=tokens_NBL, row_ids=row_ids_NB2, inputs=inputs, labels=hidden)

    theirs = folder_lib.matching_architecture(config.model, "mlm", "", "[CLS]")
    where = list(param_mappings(theirs, params, training.forward.model.dims, config.model.num_layers))
    settings = folder_lib.config_json(theirs, config.model, vocab_rows(config.model, ids.vocab_size), ids)
    (folder / "hf").mkdir()
    (folder / "hf" / "config.json").write_text(json.dumps(settings))
    folder_lib.write_tensors(folder / "hf" / folder_lib.WEIGHTS, params_to_tensors(where, params, ids.pad_id + 1))


def compare_losses(workers: list[turns.Worker], reference: turns.Worker, limits: tuple[float, float]) -> dict[str, str]:
    """Why a program is not reported, by name: its losses are not those of the reference.

    Args:
      limits: of the difference at the first step, and of the first four at most.
    """
    wrong = {}
    ours = reference.started["first_results"]
    for worker in workers:
        found = worker.started["first_results"]
        differences = [abs(a - b) for a, b in zip(found, ours, strict=True)]
        if not (
            differences[0] <= limits[0] and all(d <= limits[1] for d in differences)
        ):  # also where one is no number
            shown = [" ".join(f"{loss:.5f}" for loss in losses) for losses in (found, ours)]
            wrong[worker.name] = f"its losses are {shown[0]}, those of {reference.name} {shown[1]}"
    return wrong


def unpacked(tokens_BL: np.ndarray, cls_id: int, pad_id: int) -> np.ndarray:
    """Each segment of packed rows as a row of its own."""
    pieces = []
    for row in tokens_BL:
        starts = np.flatnonzero(row == cls_id)
        ends = [*starts[1:], int((row != pad_id).nonzero()[0][-1]) + 1]
        pieces += [row[start:end] for start, end in zip(starts, ends, strict=True)]
    rows = np.full((len(pieces), tokens_BL.shape[1]), pad_id, tokens_BL.dtype)
    for row, piece in zip(rows, pieces, strict=True):
        row[: len(piece)] = piece
    return rows


def ceiling(matmuls: list[Matmul], worker: turns.Worker) -> dict[str, Any]:
    """What matmuls of the step's shapes reach, FLOP/s: the best of any, and that of all together, each by the faster
    library."""
    rates = [result for turn in worker.kept for result in turn.results]
    best = [
        max(statistics.median(rate[library][i] for rate in rates) for library in rates[0]) for i in range(len(matmuls))
    ]
    total = sum(m.flops * m.count for m in matmuls)
    mixed = total / sum(m.flops * m.count / rate for m, rate in zip(matmuls, best, strict=True))
    shapes = [{**m._asdict(), "rate": rate} for m, rate in zip(matmuls, best, strict=True)]
    return {"best": max(best), "mixed": mixed, "shapes": shapes}


if __name__ == "__main__":
    write(Path(sys.argv[1]))
