"""What safety costs: a checkpoint while training goes on, and `train.reproducible`, against the same steps without.

    python -m benchmarks.reliability --config=small
    XLA_FLAGS=--xla_force_host_platform_device_count=2 python -m benchmarks.reliability

Rounds of steps are interleaved (A B A B ...), on random rows; ratios are of medians.
"""

import dataclasses
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from absl import flags

from flax_mlm.cli import app
from flax_mlm.config.schema import Config

_ROUNDS = flags.DEFINE_integer("rounds", 5, "rounds of each kind", lower_bound=2)
_STEPS = flags.DEFINE_integer("steps", 50, "steps of a round", lower_bound=2)


def main(config: Config) -> None:
    import jax
    import numpy as np

    from flax_mlm.checkpoint.format import FORMAT
    from flax_mlm.checkpoint.manager import Checkpoints
    from flax_mlm.checkpoint.store import saved_steps
    from flax_mlm.distributed.batches import shard_batch
    from flax_mlm.distributed.mesh import make_mesh
    from flax_mlm.objectives.rows import Vocabulary
    from flax_mlm.training.step import build_training

    vocab_size, length, size = config.tokenizer.vocab_size, config.data.seq_len, config.train.global_batch_size
    mesh = make_mesh(config.mesh)
    is_special = np.arange(vocab_size) < 5
    words = jax.numpy.arange(5, vocab_size, dtype=jax.numpy.int32)
    is_word = jax.numpy.asarray(~is_special)
    vocab = Vocabulary(jax.numpy.asarray(is_special), is_word, is_word, words, 0, 2, 4)
    rng = np.random.default_rng(0)
    tokens = rng.integers(5, vocab_size, (size, length)).astype(np.int32)
    tokens[:, 0], tokens[:, -1] = 2, 3
    row_ids = np.stack([np.zeros(size), np.arange(size)], axis=1).astype(np.uint32)

    class Loop:
        """Steps of one config, one after another."""

        def __init__(self, config: Config):
            self.training = build_training(config, vocab_size, mesh)
            self.state: Any = self.training.init()
            self.run(3)  # compiles

        def run(self, count: int) -> float:
            """Seconds for so many steps."""
            start = time.perf_counter()
            for _ in range(count):
                batch = shard_batch({"tokens": tokens, "row_ids": row_ids}, mesh)
                self.state, values = self.training.step(self.state, batch, vocab)
                jax.block_until_ready(values)
            return time.perf_counter() - start

    with jax.set_mesh(mesh), tempfile.TemporaryDirectory() as folder:
        plain = Loop(config)
        meta = {"format": FORMAT, "config": config.to_dict(), "corpus": "", "text": {}, "tokenizer": {}}
        checkpoints = Checkpoints(Path(folder), config, meta)
        checkpoints.save(0, plain.state)  # compiles
        exact = Loop(dataclasses.replace(config, train=dataclasses.replace(config.train, reproducible=True)))

        def with_save() -> float:
            start = time.perf_counter()
            checkpoints.save(int(plain.state.step), plain.state)
            plain.run(_STEPS.value)
            checkpoints.wait()  # all of it, should it last longer than the steps
            return time.perf_counter() - start

        kinds = {
            "plain": lambda: plain.run(_STEPS.value),
            "saving": with_save,
            "exact": lambda: exact.run(_STEPS.value),
        }
        seconds: dict[str, list[float]] = {name: [] for name in kinds}
        for _ in range(_ROUNDS.value):
            for name, measure in kinds.items():
                seconds[name].append(measure())
        checkpoints.close()
        saved = sum(f.stat().st_size for f in Path(folder).rglob("*") if f.is_file()) / len(saved_steps(folder))
    step, saving, exact_step = (statistics.median(seconds[name]) / _STEPS.value for name in kinds)
    cost, every = (saving - step) * _STEPS.value, config.train.checkpoint_every
    share = f"{cost / step / every:.2%} every {every:,} steps, {cost / step / 1000:.2%} every 1,000"
    print(f"{mesh.size} device(s), {size} rows of {length}: {step * 1e3:.1f} ms a step")
    print(f"a checkpoint of {saved / 2**20:.1f} MiB costs {cost:.3f} s of training: {share}")
    print(
        f"train.reproducible with {config.train.batch_groups} groups: {exact_step / step:.2f} times the time of a step"
    )
    spread = {name: f"{min(s):.2f} to {max(s):.2f} s" for name, s in seconds.items()}
    print(f"rounds of {_STEPS.value} steps: {spread}")


if __name__ == "__main__":
    app.run(main)
