"""A run of nothing but saves, to be killed at any moment: `python -m tests.helpers.saver WORKDIR STEPS KEEP_LAST`.

Restores the newest sound checkpoint, checks every value in it, and saves the steps after it. What a step holds
follows from its number. Prints "restored N", and "committed N" once a step can no longer be lost.
"""

import sys
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from flax_mlm.checkpoint.format import FORMAT
from flax_mlm.checkpoint.manager import Checkpoints
from flax_mlm.config.load import build
from flax_mlm.configs import base


class State(NamedTuple):
    step: np.ndarray
    params: dict
    opt_state: dict


def state_at(step: int) -> State:
    values = np.random.default_rng(step).normal(size=(16, 64, 64)).astype(np.float32)
    return jax.tree.map(jax.numpy.asarray, State(np.int32(step), {"w": values}, {"mu": -values, "nu": values**2}))


def main(workdir: Path, last: int, max_to_keep: int) -> None:
    c = base.get_config()
    c.train.max_to_keep, c.train.checkpoint_every, c.train.keep_period = max_to_keep, 1, 10
    meta = {
        "format": FORMAT,
        "config": {},
        "tokenizer": {"filename": "tokenizer.model", "base64": ""},
        "corpus": "none",
        "text": {},
    }
    checkpoints = Checkpoints(workdir, build(c), meta)
    expected = state_at(0)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), expected)
    restored = checkpoints.restore_latest(abstract, lambda line: print(line, flush=True))
    step = 0 if restored is None else int(restored.step)
    if restored is not None:
        jax.tree.map(np.testing.assert_array_equal, restored, state_at(step))
    print(f"restored {step}", flush=True)
    while step < last:
        step += 1
        assert checkpoints.save(step, state_at(step))
        print(f"saving {step}", flush=True)
        assert checkpoints.wait()
        print(f"committed {step}", flush=True)
    checkpoints.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
