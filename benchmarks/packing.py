"""What packing is worth: tokens that are not padding a second, from packed rows and from rows of one piece each.

    python -m benchmarks.packing --config=small --config.data.seq_len=512 \
        --config.train.global_batch_size=8 --config.data.source='text:wiki.txt.gz' --json=packing.json > packing.md

One step, compiled once, is given packed rows and padded ones in turns. Both hold the same pieces of the same documents,
cut at the length of a row: a padded row is one segment of a packed row, alone.
"""

import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from benchmarks import case, turns
from flax_mlm.cli import app, tables
from flax_mlm.config.schema import Config
from flax_mlm.storage import files

_ROUNDS = flags.DEFINE_integer("rounds", 7, "turns of each", lower_bound=1)
_STEPS = flags.DEFINE_integer("steps", 3, "of a turn", lower_bound=1)
_JSON = flags.DEFINE_string("json", "", "file for all that was measured")


def main(config: Config) -> None:
    import jax

    from flax_mlm.data.mixture import open_corpus
    from flax_mlm.distributed.batches import abstract_batch, shard_batch
    from flax_mlm.distributed.mesh import make_mesh
    from flax_mlm.objectives.rows import Vocabulary
    from flax_mlm.training.step import build_training

    corpus = open_corpus(config, turns.say)
    tokenizer, size = corpus.tokenizer(), config.train.global_batch_size
    rng, train = np.random.default_rng(0), corpus.split("train")
    count = min(train.num_rows, (_ROUNDS.value + 1) * _STEPS.value * size)
    packed = train.read(np.sort(rng.choice(train.num_rows, count, replace=False)))
    padded = case.unpacked(packed, int(tokenizer.cls_id), int(tokenizer.pad_id))
    kinds = {"packed": rng.permutation(packed), "padded": rng.permutation(padded)}

    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        training, vocab = build_training(config, corpus.vocab_size, mesh), Vocabulary.from_tokenizer(tokenizer)
        state: Any = training.init()
        program = training.step.lower(training.abstract, abstract_batch(size, corpus.seq_len, mesh), vocab).compile()

        def turn(rows: np.ndarray, number: int) -> tuple[float, float]:
            """Seconds, and tokens that were no padding."""
            nonlocal state
            tokens, start = 0.0, time.perf_counter()
            for step in range(number * _STEPS.value, (number + 1) * _STEPS.value):
                at = np.arange(step * size, (step + 1) * size)
                row_ids = np.stack([np.zeros(size), at], axis=1).astype(np.uint32)
                batch = shard_batch({"tokens": rows[at % len(rows)], "row_ids": row_ids}, mesh)
                state, values = program(state, batch, vocab)
                tokens += float(values["tokens"])
            return time.perf_counter() - start, tokens

        turn(kinds["packed"], 0)
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in kinds}
        for number in range(_ROUNDS.value):
            for name in list(kinds) if number % 2 == 0 else list(reversed(kinds)):
                found[name].append(turn(kinds[name], number))

    rows, speed = [], {}
    for name, measured in found.items():
        filled = float((kinds[name] != tokenizer.pad_id).mean())
        seconds = statistics.median(seconds for seconds, _ in measured) / _STEPS.value
        speed[name] = filled * size * corpus.seq_len / seconds  # of all the rows, not only those that had a turn
        rows.append([name, f"{filled:.1%}", f"{1e3 * seconds:,.0f}", f"{speed[name]:,.0f}"])
    ratio = speed["packed"] / speed["padded"]
    print(tables.markdown(("rows", "no padding", "ms a step", "useful tokens/s"), rows))
    print(f"\n{ratio:.2f} times, with {size} rows of {corpus.seq_len} of: {corpus.about['name']}. {turns.machine()}.")
    if _JSON.value:
        record = {
            "machine": turns.machine(),
            "speed": speed,
            "ratio": ratio,
            "turns": found,
            "source": corpus.about["name"],
        }
        files.write_json(Path(_JSON.value), record)


if __name__ == "__main__":
    app.run(main)
