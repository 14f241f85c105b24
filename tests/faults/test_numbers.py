"""A loss or a gradient that is not finite leaves no trace but a count."""

import jax
import numpy as np
import pytest

from flax_mlm.distributed.batches import shard_batch
from flax_mlm.distributed.mesh import make_mesh
from flax_mlm.training.state import TrainState
from flax_mlm.training.step import build_training
from tests.helpers.steps import V, host_batch, make_config, vocabulary


@pytest.mark.fault(46)
@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_a_non_finite_step_changes_nothing_and_is_counted(outcome, value):
    config = make_config((1, 1, 1))
    mesh = make_mesh(config.mesh, jax.devices()[:1])

    def with_kernel(state: TrainState, value: float) -> TrainState:
        """The state with one weight of the MLPs replaced."""
        params = jax.device_get(state.params)
        mlp_in = params["encoder"]["layers"]["mlp_in"]
        kernel = mlp_in["kernel"] = mlp_in["kernel"].copy()
        kernel[0, 0, 0] = value
        shardings = jax.tree.map(lambda x: x.sharding, state.params)
        return state._replace(params=jax.device_put(params, shardings))

    with jax.set_mesh(mesh):
        training = build_training(config, V, mesh)
        state, _ = training.step(training.init(), shard_batch(host_batch(0), mesh), vocabulary())
        state = with_kernel(state, value)
        before = jax.device_get((state.params, state.opt_state))
        state, metrics = training.step(state, shard_batch(host_batch(1), mesh), vocabulary())
        assert int(metrics["skipped"]) == int(metrics["skipped_in_a_row"]) == 1
        assert int(state.step) == 2
        jax.tree.map(np.testing.assert_array_equal, before, jax.device_get((state.params, state.opt_state)))
        state = with_kernel(state, 0.0)
        state, metrics = training.step(state, shard_batch(host_batch(2), mesh), vocabulary())
        assert int(metrics["skipped"]) == 1
        assert int(metrics["skipped_in_a_row"]) == 0
        assert int(state.step) == 3
    outcome("recovered")
