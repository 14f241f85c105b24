"""ELECTRA (arXiv:2003.10555): two encoders, of which one is kept.

The generator, a small language model, fills masks. The discriminator, of the config's own shape, predicts for every
token whether it was replaced. The discriminator's parameters lie under `encoder` and `head`, like those of any other
model, and the generator's under `generator`. `objective.embedding_sharing` decides on token and position embeddings:

  none: each network has its own;
  shared: the generator uses the discriminator's, and the gradients of both add up (ELECTRA §3.2);
  gradient_disentangled: the generator has its own, and the discriminator uses stop_gradient(the generator's) + its
    own, which begin at 0 (DeBERTaV3, arXiv:2111.09543 §3.3).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from flax_mlm.config.schema import Config, ModelConfig
from flax_mlm.distributed.mesh import reshard_like
from flax_mlm.model.elementwise import ACTIVATIONS, add_bias
from flax_mlm.model.encoder import Encoder
from flax_mlm.model.heads import Model, functional, language_model, vocab_rows
from flax_mlm.model.layers import Linear, gathered

_SHARED = ("token", "position")  # the embeddings that `embedding_sharing` is about


class DetectionHead(nnx.Module):
    """ELECTRA's discriminator head: dense, activation, one logit."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        width = config.hidden_size
        self.activation = ACTIVATIONS[config.activation]
        self.dense = Linear("DE", (width, width), 1, config, rngs)
        detector_1D = config.initializer_range * jax.random.normal(rngs.params(), (1, width), jnp.float32)
        self.detector = nnx.Param(detector_1D, dims="1D")
        self.detector_bias = nnx.Param(jnp.zeros(1), dims="1")

    def __call__(self, x_BLD: jax.Array) -> jax.Array:
        """Computes the log-odds (B, L), float32, that a token was replaced."""
        x_BLE = self.activation(self.dense("BLD,DE->BLE", x_BLD, "LE"))
        detector_1E = self.detector[...].astype(x_BLE.dtype)
        logits_BL1 = jnp.einsum("BLE,SE->BLS", x_BLE, detector_1E, preferred_element_type=jnp.float32)
        return add_bias(logits_BL1, self.detector_bias[...])[..., 0]


class Discriminator(nnx.Module):
    """Encoder and detection head."""

    def __init__(self, config: ModelConfig, vocab_rows: int, rngs: nnx.Rngs):
        self.encoder = Encoder(config, vocab_rows, rngs)
        self.head = DetectionHead(config, rngs)

    @jax.named_scope("head")
    def logits(self, x_BLD: jax.Array) -> jax.Array:
        """Computes logits (B, L); see DetectionHead."""
        return gathered(self.head, x_BLD.dtype)(x_BLD)


def discriminator(config: ModelConfig, vocab_size: int) -> Model:
    """Builds the network that is kept after training, without parameters."""
    return functional(lambda rngs: Discriminator(config, vocab_rows(config, vocab_size), rngs))


def networks(config: Config, vocab_size: int) -> tuple[Model, Model]:
    """Builds generator and discriminator, both as functions of the parameters of both."""
    sharing = config.objective.embedding_sharing
    small, large = language_model(config.generator, vocab_size), discriminator(config.model, vocab_size)

    def join(params: Any, generator: Any) -> Any:
        if sharing == "shared":
            embeddings = {k: v for k, v in generator["encoder"]["embeddings"].items() if k not in _SHARED}
            generator = {**generator, "encoder": {**generator["encoder"], "embeddings": embeddings}}
        return {**params, "generator": generator}

    def init(key: jax.Array) -> Any:
        params = large.init(key)
        if sharing == "gradient_disentangled":
            params = _with_embeddings(params, jax.tree.map(jnp.zeros_like, _shared_embeddings(params)))
        return join(params, small.init(jax.random.fold_in(key, 1)))

    def network(model: Model, select: Callable[[Any], Any]) -> Model:
        return Model(
            init,
            encode=lambda params, *args, **kwargs: model.encode(select(untied(params, sharing)), *args, **kwargs),
            logits=lambda params, x_BLD: model.logits(select(untied(params, sharing)), x_BLD),
            dims=join(large.dims, small.dims),
        )

    return network(small, lambda params: params["generator"]), network(large, without_generator)


def without_generator(params: Any) -> Any:
    """Returns the discriminator's parameters."""
    return {name: tree for name, tree in params.items() if name != "generator"}


def untied(params: Any, sharing: str) -> Any:
    """Returns the same networks' parameters for `embedding_sharing = none`: each with all embeddings that it uses."""
    generator = params["generator"]
    if sharing == "shared":
        return {**params, "generator": _with_embeddings(generator, _shared_embeddings(params))}
    if sharing == "gradient_disentangled":
        sums = jax.tree.map(_add_constant, _shared_embeddings(params), _shared_embeddings(generator))
        return _with_embeddings(params, sums)
    return params


def _add_constant(x: jax.Array, constant: jax.Array) -> jax.Array:
    return reshard_like(jax.lax.stop_gradient(constant), x) + x


def _shared_embeddings(params: Any) -> dict[str, Any]:
    embeddings = params["encoder"]["embeddings"]
    return {name: embeddings[name] for name in _SHARED if name in embeddings}


def _with_embeddings(params: Any, tables: dict[str, Any]) -> Any:
    encoder = params["encoder"]
    return {**params, "encoder": {**encoder, "embeddings": {**encoder["embeddings"], **tables}}}
