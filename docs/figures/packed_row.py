"""Writes docs/figures/data/packed_row.json: a row of the built-in corpus as the first step of training sees it.

    python docs/figures/packed_row.py

The row is the first one, in the order of training under configs/quickstart.py, that is made of three segments. The
file has the row's number and, for each token, its text, segment, position, what the model is shown, and whether it is
predicted.
"""

import json
import sys
from pathlib import Path

HERE = Path(__file__).parent
DATA = HERE / "data" / "packed_row.json"
SEGMENTS = 3

sys.path.insert(0, str(HERE.parent.parent))


def main() -> None:
    import jax
    import jax.numpy as jnp
    import numpy as np

    from flax_mlm.config.load import build
    from flax_mlm.config.phases import parse_phases
    from flax_mlm.configs import quickstart
    from flax_mlm.data import pipeline
    from flax_mlm.data.mixture import open_corpus
    from flax_mlm.objectives import masking
    from flax_mlm.objectives.rows import Vocabulary, positions, row_keys, run_key, segment_ids

    phase = parse_phases(build(quickstart.get_config()))[0]
    config = phase.config
    corpus = open_corpus(config)
    tokenizer = corpus.tokenizer()
    vocab = Vocabulary.from_tokenizer(tokenizer)
    size = config.train.global_batch_size
    batches = pipeline.train_batches(
        corpus.split("train"),
        seed=config.seed,
        global_batch_size=size,
        start_step=0,
        stop_step=phase.num_steps,
        stream=corpus.stream(),
    )
    for step, batch in enumerate(batches):  # noqa: B007
        segments_BL = np.asarray(segment_ids(jnp.asarray(batch["tokens"]), vocab))
        if (found := np.flatnonzero(segments_BL.max(axis=1) == SEGMENTS)).size:
            break
    else:
        raise SystemExit(f"no row has {SEGMENTS} segments")
    tokens_BL = jnp.asarray(batch["tokens"])
    keys_B = row_keys(run_key(config, "mask"), jnp.asarray(batch["row_ids"]))
    num_predictions = masking.max_predictions_per_row(config.data.seq_len, phase.largest_mask_rate)
    rates = masking.rates_at(phase, step / phase.num_steps)
    masked = jax.device_get(masking.mask_tokens(tokens_BL, keys_B, vocab, config.objective, rates, num_predictions))

    b = int(found[0])
    tokens, inputs = batch["tokens"][b].tolist(), masked.inputs_BL[b].tolist()
    positions_L = np.asarray(positions(jnp.asarray(segments_BL)))[b].tolist()
    predicted = set(masked.positions_BK[b][masked.weights_BK[b] > 0].tolist())
    row = {
        "config": "configs/quickstart.py",
        "step": step,
        "row": b,
        "row_id": batch["row_ids"][b].tolist(),
        "mask_rate": round(float(rates.mask), 6),
        "tokens": [
            {
                "text": tokenizer.tokens[token],
                "shown": tokenizer.tokens[shown],
                "segment": segment,
                "position": position,
                "predicted": i in predicted,
            }
            for i, (token, shown, segment, position) in enumerate(
                zip(tokens, inputs, segments_BL[b].tolist(), positions_L, strict=True)
            )
        ],
    }
    head = {k: v for k, v in row.items() if k != "tokens"}
    lines = ",\n  ".join(json.dumps(token, ensure_ascii=False) for token in row["tokens"])
    DATA.write_text(json.dumps(head)[:-1] + f', "tokens": [\n  {lines}\n]}}\n')


if __name__ == "__main__":
    main()
