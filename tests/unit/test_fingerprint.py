"""Fingerprints: every change of a bit changes them, and nothing else does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from flax_mlm.checkpoint import fingerprint
from flax_mlm.config.schema import MeshConfig
from flax_mlm.distributed.mesh import make_mesh

DTYPES = ("float32", "bfloat16", "int32", "uint8", "bool")
fingerprints = jax.jit(fingerprint.fingerprint_tree)


def some(dtype: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.array(jnp.asarray(np.random.default_rng(seed).normal(0, 9, shape)).astype(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_on_every_mesh(dtype):
    x = some(dtype, (16, 8, 3))
    expected = np.asarray(fingerprints({"x": x})["x"])
    for shape, spec in (((8, 1, 1), ("data",)), ((2, 4, 1), ("fsdp", "data")), ((1, 2, 4), ("fsdp", "tensor"))):
        mesh = make_mesh(MeshConfig(*shape))
        with jax.set_mesh(mesh):
            split = jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))
            np.testing.assert_array_equal(fingerprints({"x": split})["x"], expected)


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 24 * 4 * 8 - 1), st.integers(0, 24 * 4 * 8 - 1))
def test_one_or_two_flipped_bits_are_seen(first, second):
    x = some("float32", (24, 4))
    flipped = x.copy().view(np.uint8).reshape(-1)
    for bit in {first % (x.nbytes * 8), second % (x.nbytes * 8)}:
        flipped[bit // 8] ^= 1 << bit % 8
    flipped = flipped.view(np.float32).reshape(x.shape)
    assert (np.asarray(fingerprints({"x": x})["x"])[:2] != np.asarray(fingerprints({"x": flipped})["x"])[:2]).any()


@pytest.mark.parametrize(
    "change", [lambda x: x[::-1].copy(), lambda x: x.T.copy(), lambda x: np.roll(x, 1, 1), lambda x: -x, np.zeros_like]
)
def test_moved_and_changed_values_are_seen(change):
    x = some("float32", (32, 32))
    assert (np.asarray(fingerprints({"x": x})["x"])[:2] != np.asarray(fingerprints({"x": change(x)})["x"])[:2]).any()


def test_exchanged_neighbours_are_seen():
    x = some("float32", (64,))
    found = set()
    for i in range(63):
        y = x.copy()
        y[[i, i + 1]] = y[[i + 1, i]]
        found.add(tuple(np.asarray(fingerprints({"x": y})["x"])[:2].tolist()))
    assert len(found) == 63
    assert tuple(np.asarray(fingerprints({"x": x})["x"])[:2].tolist()) not in found


def test_what_is_not_finite_is_counted():
    x = some("float32", (8, 8))
    x[0, 0], x[3, 4], x[7, 7] = np.nan, np.inf, -np.inf
    assert int(fingerprints({"x": x})["x"][2]) == 3
    assert int(fingerprints({"n": np.arange(4)})["n"][2]) == 0


def test_the_table_names_leaves_and_says_what_they_are():
    tree = {"params": {"a": np.ones((2, 3), np.float32)}, "step": np.int32(7)}
    table = fingerprint.table(tree, jax.device_get(fingerprints(tree)))
    assert table.keys() == {"params/a", "step"}
    assert table["params/a"][:2] == ["float32", [2, 3]]
    assert table["step"][:2] == ["int32", []]
    assert all(len(entry[2]) == 16 for entry in table.values())
