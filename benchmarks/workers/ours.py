"""Our step, as `flax_mlm.train` makes it: masking included, compiled beforehand; an accelerator has the next step when
the last one's scalars are read."""

from flax_mlm.distributed import environment

environment.prepare()  # as every command does before anything imports jax

import itertools  # noqa: E402
from collections.abc import Callable  # noqa: E402
from dataclasses import replace  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import jax  # noqa: E402
import numpy as np  # noqa: E402

from benchmarks import case  # noqa: E402
from benchmarks.workers.serving import serve  # noqa: E402
from flax_mlm.distributed.batches import abstract_batch, shard_batch  # noqa: E402
from flax_mlm.distributed.mesh import make_mesh  # noqa: E402
from flax_mlm.training.step import build_training  # noqa: E402


def build(spec: dict[str, Any]) -> Callable[[], Any]:
    """spec: `folder` of the case; `scan_layers`, of the config."""
    folder = Path(spec["folder"])
    config, ids = case.read(folder)
    config = replace(config, model=replace(config.model, scan_layers=spec["scan_layers"]))
    mesh = make_mesh(config.mesh)
    jax.set_mesh(mesh)
    training, vocab = build_training(config, ids.vocab_size, mesh), case.vocabulary(ids)
    state = training.init()
    rows = abstract_batch(config.train.global_batch_size, config.data.seq_len, mesh)
    program = training.step.lower(training.abstract, rows, vocab).compile()
    arrays = np.load(folder / "batches.npz")
    batches = itertools.cycle(zip(arrays["tokens"], arrays["row_ids"], strict=True))

    def step() -> Any:
        nonlocal state
        tokens, row_ids = next(batches)
        batch = shard_batch({"tokens": tokens, "row_ids": row_ids}, mesh)
        state, values = program(state, batch, vocab)

        def loss() -> float:
            return {name: float(value) for name, value in jax.device_get(values).items()}["loss"]

        return loss() if jax.default_backend() == "cpu" else loss

    return step


if __name__ == "__main__":
    serve(
        build,
        ("jax", "jaxlib", "flax", "optax"),
        lambda: (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0),
    )
