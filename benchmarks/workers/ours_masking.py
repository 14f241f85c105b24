"""Our masking alone, jitted: tokens hidden in batches of several shapes."""

from flax_mlm.distributed import environment

environment.prepare()  # as every command does before anything imports jax

from collections.abc import Callable  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import jax  # noqa: E402
import numpy as np  # noqa: E402

from benchmarks import case  # noqa: E402
from benchmarks.workers.serving import seconds_of_calls, serve  # noqa: E402
from flax_mlm.objectives import masking  # noqa: E402
from flax_mlm.objectives.rows import row_keys  # noqa: E402


def build(spec: dict[str, Any]) -> Callable[[], dict[str, float]]:
    """spec: `folder` with case.json and tokens; `shapes`, (rows, length) of batches; `calls` of each in a step."""
    folder = Path(spec["folder"])
    config, ids = case.read(folder)
    vocab, key, o = case.vocabulary(ids), jax.random.key(0), config.objective
    rates = masking.rates(o, o.mask_rate)
    stream = np.load(folder / "tokens.npy").reshape(-1).astype(np.int32)

    def of_shape(rows: int, length: int) -> Callable[[], Any]:
        slots = masking.max_predictions_per_row(length, o.mask_rate)
        mask = jax.jit(lambda tokens, ids: masking.mask_tokens(tokens, row_keys(key, ids), vocab, o, rates, slots))
        tokens = jax.numpy.asarray(stream[: rows * length].reshape(rows, length))
        row_ids = jax.numpy.asarray(np.stack([np.zeros(rows), np.arange(rows)], axis=1).astype(np.uint32))
        return lambda: jax.block_until_ready(mask(tokens, row_ids))

    masks = {f"{rows}x{length}": of_shape(rows, length) for rows, length in spec["shapes"]}

    return lambda: seconds_of_calls(masks, spec["calls"])


if __name__ == "__main__":
    serve(build, ("jax", "jaxlib"))
