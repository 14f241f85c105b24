"""Train steps of small models on random tokens, and what they leave."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from flax_mlm.config import phases
from flax_mlm.config.load import build
from flax_mlm.config.schema import Config
from flax_mlm.configs import base
from flax_mlm.distributed.batches import shard_batch
from flax_mlm.distributed.mesh import make_mesh
from flax_mlm.objectives.rows import Vocabulary
from flax_mlm.training.step import build_training

V, B, L = 101, 16, 32


MODERN = {
    "model.position_embedding": "rope",
    "model.norm_position": "pre",
    "model.use_bias": False,
    "model.glu": True,
    "model.type_vocab_size": 0,
    "model.global_attn_every_n_layers": 3,
    "model.sliding_window": 8,
}


def make_config(mesh: tuple[int, int, int], overrides: tuple = ()) -> Config:
    c = base.get_config()
    c.model.update(num_layers=3, hidden_size=32, num_heads=4, intermediate_size=64, vocab_multiple_of=8)
    c.model.scan_layers = True
    c.data.seq_len, c.train.global_batch_size, c.train.steps = L, B, 10
    c.optimizer.learning_rate = 0.01
    c.mesh.update(dict(zip(("data", "fsdp", "tensor"), mesh, strict=True)))
    c.update_from_flattened_dict(dict(overrides))
    return build(c)


def vocabulary(size: int = V) -> Vocabulary:
    special = np.arange(size) < 5
    starts = np.arange(size) % 3 == 0
    ends = jnp.zeros(size, bool)
    return Vocabulary(jnp.asarray(special), jnp.asarray(starts), ends, jnp.arange(5, size, dtype=jnp.int32), 0, 2, 4)


def host_batch(i: int) -> dict[str, np.ndarray]:
    """Rows of two segments and 3 of padding; the last row of all padding but one segment of 4."""
    tokens = np.random.default_rng(i).integers(5, V, (B, L)).astype(np.int32)
    tokens[:, [0, 16]], tokens[:, [15, -4]], tokens[:, -3:] = 2, 3, 0
    tokens[-1, 4:] = 0
    position = np.arange(B) + B * i
    return {"tokens": tokens, "row_ids": np.stack([np.zeros(B), position], 1).astype(np.uint32)}


@functools.lru_cache(maxsize=4)  # more compiled programs than a process can map crash XLA's compiler
def built(mesh_shape: tuple[int, int, int], overrides: tuple = ()):
    """Config, mesh and train functions, built once for tests that follow each other."""
    config = make_config(mesh_shape, overrides)
    mesh = make_mesh(config.mesh, jax.devices()[: int(np.prod(mesh_shape))])
    with jax.set_mesh(mesh):
        return config, mesh, build_training(config, V, mesh, phases.parse_phases(config)[0])


@functools.cache
def train(mesh_shape: tuple[int, int, int], overrides: tuple = (), num_steps: int = 3):
    """Metrics of the first steps, and the state after them."""
    _, mesh, training = built(mesh_shape, overrides)
    with jax.set_mesh(mesh):
        state, history = training.init(), []
        for i in range(num_steps):
            with jax.transfer_guard_device_to_host("disallow"):
                state, metrics = training.step(state, shard_batch(host_batch(i), mesh), vocabulary())
            jax.block_until_ready(state)
            history.append({k: float(v) for k, v in metrics.items()})
        return history, state


@functools.cache
def evaluated(*case):
    """EvalOutput of the state after `train`."""
    _, mesh, training = built(*case[:2])
    with jax.set_mesh(mesh):
        batch = shard_batch(host_batch(0), mesh)
        return jax.device_get(training.forward.evaluate(train(*case)[1].weights, batch, vocabulary())[0])


STILL = (("model.dropout_rate", 0.0), ("model.attention_dropout_rate", 0.0))
