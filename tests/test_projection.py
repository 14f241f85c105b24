"""Matmuls with weights: their gradients are einsum's, however the dimensions lie."""

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
    inputs, of_y = equation.split("->")
    shapes = [[SIZES[letter] for letter in dims] for dims in (*inputs.split(","), of_y)]
    x, kernel, direction = (jax.random.normal(jax.random.key(i), shape, dtype) for i, shape in enumerate(shapes))

    def loss(x, kernel, multiply):
        return (multiply(x, kernel) * direction.astype(jnp.float32)).sum()

    def ours(x, kernel):
        return project(equation, x, kernel, batch_spec(*[None] * (len(of_y) - 1)), jnp.float32)

    with jax.set_mesh(make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])):
        found = jax.grad(loss, argnums=(0, 1))(x, kernel, ours)
    exact = jax.grad(loss, argnums=(0, 1))(
        *(a.astype(jnp.float32) for a in (x, kernel)), lambda *a: jnp.einsum(equation, *a)
    )
    for ours_, exactly, given in zip(found, exact, (x, kernel), strict=True):
        assert ours_.dtype == given.dtype
        np.testing.assert_allclose(
            np.float32(ours_),
            exactly,
            rtol=1e-5 if dtype == "float32" else 0.02,
            atol=1e-4 if dtype == "float32" else 0.05,
        )
