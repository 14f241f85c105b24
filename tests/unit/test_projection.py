"""Projections: their gradients are einsum's, for every order of dimensions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_mlm.config.schema import MeshConfig
from flax_mlm.distributed.mesh import batch_spec, make_mesh
from flax_mlm.model.projection import project

SIZES = dict(zip("BLKDEFHdV", (2, 6, 3, 8, 4, 12, 2, 4, 10), strict=True))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "equation", ["BLD,DF->BLF", "BLD,DHd->BLHd", "BLHd,HdD->BLD", "BKE,VE->BKV", "BLE,ED->BLD"]
)  # fmt: skip
def test_gradients_are_those_of_einsum(equation, dtype):
    inputs, y_dims = equation.split("->")
    shapes = [[SIZES[letter] for letter in dims] for dims in (*inputs.split(","), y_dims)]
    x, kernel, direction = (jax.random.normal(jax.random.key(i), shape, dtype) for i, shape in enumerate(shapes))

    def loss(x, kernel, multiply):
        return (multiply(x, kernel) * direction.astype(jnp.float32)).sum()

    def ours(x, kernel):
        return project(equation, x, kernel, batch_spec(*[None] * (len(y_dims) - 1)), jnp.float32)

    with jax.set_mesh(make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])):
        actual = jax.grad(loss, argnums=(0, 1))(x, kernel, ours)
    exact = jax.grad(loss, argnums=(0, 1))(
        *(a.astype(jnp.float32) for a in (x, kernel)), lambda *a: jnp.einsum(equation, *a)
    )
    for gradient, expected, argument in zip(actual, exact, (x, kernel), strict=True):
        assert gradient.dtype == argument.dtype
        np.testing.assert_allclose(
            np.float32(gradient),
            expected,
            rtol=1e-5 if dtype == "float32" else 0.02,
            atol=1e-4 if dtype == "float32" else 0.05,
        )
