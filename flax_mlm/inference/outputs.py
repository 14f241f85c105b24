"""Hidden states and logits at every token of texts."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from flax_mlm.distributed.batches import shard_rows
from flax_mlm.distributed.mesh import num_batch_shards
from flax_mlm.inference.model import LoadedModel

_LENGTH_MULTIPLE = 64  # of the padded length, since each length is compiled


def make_outputs(model: LoadedModel) -> Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Returns a function of tokens (B, L) and which of them are no padding (B, L), each row one segment.

    It gives hidden states (B, L, D) and logits (B, L, V), with rtd (B, L), float32.
    """
    net, objective = model.forward.model, model.config.objective.name

    @jax.jit
    def forward(params: Any, *batch: jax.Array) -> tuple[jax.Array, jax.Array]:
        *tokens, predict_BL = batch
        hidden_BLD = net.encode(params, *tokens, causal=objective == "clm")
        logits = net.logits(params, hidden_BLD)
        return hidden_BLD, logits if objective == "rtd" else logits(predict_BL)

    def run(tokens_BL: np.ndarray, real_BL: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        rows, length = tokens_BL.shape
        padding = (0, -rows % num_batch_shards(model.mesh)), (0, -length % _LENGTH_MULTIPLE)
        positions_BL = np.broadcast_to(np.arange(length, dtype=np.int32), tokens_BL.shape)
        arrays = [np.pad(x, padding) for x in (tokens_BL, real_BL.astype(np.int32), positions_BL, positions_BL)]
        with jax.set_mesh(model.mesh):
            hidden, logits = forward(model.params, *shard_rows(arrays, model.mesh))
        return np.asarray(hidden)[:rows, :length], np.asarray(logits)[:rows, :length]

    return run
