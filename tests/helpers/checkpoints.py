"""Checkpoints of a small state that follows from the number of its step."""

from pathlib import Path

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from flax_mlm.checkpoint.format import FORMAT
from flax_mlm.checkpoint.manager import Checkpoints
from flax_mlm.checkpoint.store import saved_steps
from flax_mlm.config.load import build
from flax_mlm.config.schema import MeshConfig
from flax_mlm.configs import base
from flax_mlm.distributed.mesh import make_mesh
from flax_mlm.storage import gcs
from tests.helpers.saver import State

META = {
    "format": FORMAT,
    "config": {},
    "tokenizer": {"filename": "tokenizer.model", "base64": ""},
    "corpus": "a" * 64,
    "text": {},
}


def state_at(step: int, mesh_shape: tuple[int, int, int] = (1, 1, 1)) -> State:
    """What a step holds follows from its number; it is split over the mesh."""
    mesh = make_mesh(MeshConfig(*mesh_shape), jax.devices()[: int(np.prod(mesh_shape))])
    w = np.random.default_rng(step).normal(size=(8, 24)).astype(np.float32)
    split, whole = (NamedSharding(mesh, spec) for spec in (PartitionSpec("fsdp", None), PartitionSpec()))
    tree = {"w": w, "b": w[0]}
    put = {"w": jax.device_put(w, split), "b": jax.device_put(tree["b"], whole)}
    moments = {"mu": jax.device_put(-w, split), "count": jax.device_put(np.int32(step), whole)}
    return State(jax.device_put(np.int32(step), whole), put, moments)


def abstract(state: State) -> State:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def opened(workdir: Path, meta: dict = META, **changes) -> Checkpoints:
    c = base.get_config()
    c.train.update({"checkpoint_every": 10, **changes})
    return Checkpoints(workdir, build(c), meta)


def restored(workdir: Path, mesh_shape: tuple[int, int, int] = (1, 1, 1)) -> tuple[int | None, list[str]]:
    """The step that a restart goes on from, its content compared with what was saved, and what was logged."""
    log: list[str] = []
    checkpoints = opened(workdir)
    try:
        state = checkpoints.restore_latest(abstract(state_at(0, mesh_shape)), log.append)
    finally:
        checkpoints.close()
    if state is None:
        return None, log
    same_bits(state, state_at(int(state.step), mesh_shape))
    return int(state.step), log


def same_bits(a: State, b: State) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y, strict=True), *jax.device_get((a, b)))


def save_three(workdir: gcs.AnyPath) -> gcs.AnyPath:
    """Saves the steps 10, 20 and 30."""
    checkpoints = opened(workdir, max_to_keep=3)
    for step in (10, 20, 30):
        assert checkpoints.save(step, state_at(step))
    checkpoints.close()
    assert saved_steps(workdir) == [10, 20, 30]
    return workdir
