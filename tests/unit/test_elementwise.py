"""Functions with derivatives of their own, against what JAX derives from their definitions."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_mlm.config.schema import MeshConfig
from flax_mlm.distributed.mesh import make_mesh
from flax_mlm.model import elementwise


@pytest.fixture(autouse=True)
def mesh():
    with jax.set_mesh(make_mesh(MeshConfig(data=-1, fsdp=1, tensor=1), jax.devices()[:1])):
        yield


B, L, D = 2, 5, 6
EPS = 1e-6


def norm(x, scale, bias=None):
    deviation = jnp.sqrt(x.var(-1, keepdims=True) + EPS)
    y = (x - x.mean(-1, keepdims=True)) / deviation * scale[None, None]
    return y if bias is None else y + bias[None, None]


# What is tested, its definition, and the shapes that it takes.
CASES = {
    "gelu": (elementwise.gelu, lambda x: jax.nn.gelu(x, approximate=False), [(B, L, D)]),
    "geglu": (
        elementwise.geglu,
        lambda gate, up: jax.nn.gelu(gate, approximate=False) * up,
        [(B, L, D), (B, L, D)],
    ),
    "layer_norm": (
        lambda x, scale, bias: elementwise.layer_norm(x, scale, bias, EPS),
        norm,
        [(B, L, D), (D,), (D,)],
    ),
    "layer_norm without bias": (
        lambda x, scale: elementwise.layer_norm(x, scale, None, EPS),
        norm,
        [(B, L, D), (D,)],
    ),
    "add_bias": (elementwise.add_bias, lambda x, vector: x + vector[None, None], [(B, L, 3, D), (3, D)]),
}


def arguments(name, shapes, dtype):
    """Random arguments; the scale and bias of the norms are always float32."""
    arrays = [3 * jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(shapes)]
    narrow = {"add_bias": 2}.get(name, 1)
    return [x.astype(dtype) if i < narrow else x for i, x in enumerate(arrays)]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2e-5), ("bfloat16", 0.02)])
def test_values_and_gradients_are_those_of_the_definition(name, dtype, tolerance):
    function, definition, shapes = CASES[name]
    given = arguments(name, shapes, dtype)
    y, backward = jax.vjp(function, *given)
    assert y.dtype == dtype
    cotangent = jax.random.normal(jax.random.key(9), y.shape).astype(dtype)
    exact, exact_backward = jax.vjp(definition, *(x.astype(jnp.float32) for x in given))
    gradients, exact_gradients = backward(cotangent), exact_backward(cotangent.astype(jnp.float32))
    assert [g.dtype for g in gradients] == [x.dtype for x in given]
    for actual, expected in zip((y, *gradients), (exact, *exact_gradients), strict=True):
        scale = np.abs(expected).max()
        np.testing.assert_allclose(np.float32(actual) / scale, expected / scale, atol=tolerance)


@pytest.mark.parametrize("name", CASES)
def test_no_more_is_kept_for_the_backward_pass_than_the_input(name):
    """Residuals are bfloat16 like the input, not float32 like the intermediates."""
    function, _, shapes = CASES[name]
    shape = (64, 64, *shapes[0][2:])
    others = [(64, 64, *other[2:]) if other[:2] == (B, L) else other for other in shapes[1:]]
    given = arguments(name, [shape, *others], "bfloat16")
    _, backward = jax.vjp(function, *given)
    residual_bytes = sum(x.nbytes for x in jax.tree.leaves(backward))
    row_bytes = 2 * 4 * 64 * 64  # LayerNorm's means and deviations
    assert residual_bytes <= 2 * math.prod(shape) + row_bytes + sum(x.nbytes for x in given[1:])


@pytest.mark.parametrize("x", [-1e4, -40.0, 0.0, 40.0, 1e4])
def test_gelu_far_out(x):
    assert float(elementwise.gelu(jnp.float32(x))) == max(x, 0.0)
    assert float(jax.grad(elementwise.gelu)(jnp.float32(x))) == (0.5 if x == 0.0 else float(x > 0.0))


@pytest.mark.parametrize("length", [1, 32, 33, 100, 257])
def test_the_maximum_is_right_at_every_position(length):
    x = np.random.default_rng(0).permutation(np.arange(3 * length, dtype=np.float32)).reshape(3, length)
    np.testing.assert_array_equal(jax.jit(elementwise.max_last_axis)(x), x.max(-1))
    x = np.eye(length, dtype=np.float32)
    np.testing.assert_array_equal(jax.jit(elementwise.max_last_axis)(x), np.ones(length))
