"""The train state: parameters, optimizer state, their average, and the counters of a run."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from flax_mlm.optim import spikes

Metrics = dict[str, jax.Array]  # scalars by name


class TrainState(NamedTuple):
    """Everything that continues a run. It holds no random keys: they follow from the seed and the rows' numbers."""

    step: jax.Array  # int32, updates tried so far
    progress: jax.Array  # float32, fraction of the run done
    params: Any
    opt_state: Any
    skipped: jax.Array  # int32, updates skipped for a non-finite loss or gradient, or a spike
    skipped_in_a_row: jax.Array  # int32
    running: spikes.Running
    average: Any  # of the parameters, with their structure; None where none is kept

    @property
    def weights(self) -> Any:
        """Parameters to evaluate and export: the average where one is kept."""
        return self.params if self.average is None else self.average


def new_state(params: Any, opt_state: Any, keeps_average: bool) -> TrainState:
    """State before the first step."""
    average = jax.tree.map(jnp.copy, params) if keeps_average else None
    zero = jnp.zeros((), jnp.int32)
    return TrainState(zero, jnp.float32(0.0), params, opt_state, zero, zero, spikes.init(), average)


@functools.partial(jax.jit, static_argnums=(1, 2), donate_argnums=0)
def start_phase(state: TrainState, trained_positions: int, positions: int) -> TrainState:
    """State at the start of a later phase: spike statistics reset, learned position table extended.

    Args:
      trained_positions: number of learned positions that earlier phases trained.
      positions: number of positions of the phase's rows. Those not yet trained begin as copies of the trained ones,
        repeated (Longformer, arXiv:2004.05150 §5). Rotary positions have no table.
    """

    def extend(path: Any, x: jax.Array) -> jax.Array:
        if path[-1].key != "position" or positions <= trained_positions:
            return x
        copies = jnp.concatenate([x[:trained_positions]] * -(-positions // trained_positions))
        return jnp.concatenate([copies[:positions], x[positions:]])

    params, average = (jax.tree_util.tree_map_with_path(extend, tree) for tree in (state.params, state.average))
    return state._replace(params=params, average=average, running=spikes.init())
