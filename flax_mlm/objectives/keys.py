"""Random keys. Every key follows from the run's seed, a purpose and a row's number, so a run stores no random state."""

import jax

from flax_mlm.config.schema import Config

_PURPOSES = ("init", "mask", "dropout", "eval")


def run_key(config: Config, purpose: str) -> jax.Array:
    """Key of a run for one purpose: "init", "mask", "dropout" or "eval"."""
    return jax.random.fold_in(jax.random.key(config.seed), _PURPOSES.index(purpose))


def row_keys(key: jax.Array, row_ids_B2: jax.Array) -> jax.Array:
    """Keys (B,) of rows; a row's key does not depend on the batch that the row is in.

    Args:
      row_ids_B2: uint32 [high, low] halves of each row's number in its stream.
    """
    return jax.vmap(lambda row_id_2: jax.random.fold_in(jax.random.fold_in(key, row_id_2[0]), row_id_2[1]))(row_ids_B2)
