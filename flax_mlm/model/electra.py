"""ELECTRA (arXiv:2003.10555): two encoders, of which one is kept.

The generator, a small language model, fills masks; the discriminator, of the config's own shape, says of every token
whether it is the original. What the discriminator has lies under `encoder` and `head`, as of any other model, and the
generator under `generator`. Its token and position embeddings are (`objective.embedding_sharing`)

  none: its own;
  shared: the discriminator's, and the gradients of both add up (ELECTRA §3.2);
  gradient_disentangled: its own, and the discriminator's are stop_gradient(those) + what lies in their place, from 0
    (DeBERTaV3, arXiv:2111.09543 §3.3).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from flax_mlm.config.schema import Config, ModelConfig
from flax_mlm.distributed.fsdp import gather_fsdp
from flax_mlm.distributed.mesh import reshard_like
from flax_mlm.model.elementwise import add_bias, gelu
from flax_mlm.model.encoder import Encoder, Linear
from flax_mlm.model.heads import Model, functions, language_model, vocab_rows

_TABLES = ("token", "position")


class DetectionHead(nnx.Module):
    """ELECTRA's: dense, GELU, one score."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        width = config.hidden_size
        self.dense = Linear("DE", (width, width), 1, config, rngs)
        self.detector = nnx.Param(config.initializer_range * jax.random.normal(rngs.params(), (1, width)), dims="1D")
        self.detector_bias = nnx.Param(jnp.zeros(1), dims="1")

    def __call__(self, x_BLD: jax.Array) -> jax.Array:
        """Scores (B, L), float32: the log-odds that a token was replaced."""
        x_BLE = gelu(self.dense("BLD,DE->BLE", x_BLD, "LE"))
        detector_1E = self.detector[...].astype(x_BLE.dtype)
        scores_BL1 = jnp.einsum("BLE,SE->BLS", x_BLE, detector_1E, preferred_element_type=jnp.float32)
        return add_bias(scores_BL1, self.detector_bias[...])[..., 0]


class Discriminator(nnx.Module):
    """Encoder and detection head."""

    def __init__(self, config: ModelConfig, vocab_rows: int, rngs: nnx.Rngs):
        self.encoder = Encoder(config, vocab_rows, rngs)
        self.head = DetectionHead(config, rngs)

    def scores(self, x_BLD: jax.Array) -> jax.Array:
        """Scores (B, L)."""
        with jax.named_scope("head"):
            head = gather_fsdp(nnx.state(self.head), x_BLD.dtype)
            return nnx.merge(nnx.graphdef(self.head), head)(x_BLD)


def discriminator(config: ModelConfig, vocab_size: int) -> Model:
    """What is kept of a run, without parameters."""
    return functions(lambda rngs: Discriminator(config, vocab_rows(config, vocab_size), rngs))


def networks(config: Config, vocab_size: int) -> tuple[Model, Model]:
    """Generator and discriminator, both functions of the parameters of both, which the discriminator's `init` makes."""
    sharing = config.objective.embedding_sharing
    small, large = language_model(config.generator, vocab_size), discriminator(config.model, vocab_size)

    def join(kept: Any, generator: Any) -> Any:
        if sharing == "shared":
            embeddings = {k: v for k, v in generator["encoder"]["embeddings"].items() if k not in _TABLES}
            generator = {**generator, "encoder": {**generator["encoder"], "embeddings": embeddings}}
        return {**kept, "generator": generator}

    def init(key: jax.Array) -> Any:
        kept = large.init(key)
        if sharing == "gradient_disentangled":
            kept = _with_tables(kept, jax.tree.map(jnp.zeros_like, _tables(kept)))
        return join(kept, small.init(jax.random.fold_in(key, 1)))

    def of_generator(params: Any) -> Any:
        return untied(params, sharing)["generator"]

    def of_discriminator(params: Any) -> Any:
        return {name: tree for name, tree in untied(params, sharing).items() if name != "generator"}

    def of_both(net: Model, own: Callable[[Any], Any]) -> Model:
        return Model(
            init,
            encode=lambda params, *args, **kwargs: net.encode(own(params), *args, **kwargs),
            head=lambda params, x_BLD: net.head(own(params), x_BLD),
            dims=join(large.dims, small.dims),
        )

    return of_both(small, of_generator), of_both(large, of_discriminator)


def untied(params: Any, sharing: str) -> Any:
    """The same two models as parameters of `embedding_sharing = none`: each has all that it needs."""
    generator = params["generator"]
    if sharing == "shared":
        return {**params, "generator": _with_tables(generator, _tables(params))}
    if sharing == "gradient_disentangled":

        def add(base: jax.Array, change: jax.Array) -> jax.Array:
            return reshard_like(jax.lax.stop_gradient(base), change) + change

        return _with_tables(params, jax.tree.map(add, _tables(generator), _tables(params)))
    return params


def _tables(params: Any) -> dict[str, Any]:
    embeddings = params["encoder"]["embeddings"]
    return {name: embeddings[name] for name in _TABLES if name in embeddings}


def _with_tables(params: Any, tables: dict[str, Any]) -> Any:
    encoder = params["encoder"]
    return {**params, "encoder": {**encoder, "embeddings": {**encoder["embeddings"], **tables}}}
