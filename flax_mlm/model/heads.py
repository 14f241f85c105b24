"""Heads on an encoder, and the whole language model as pure functions of its parameters."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from flax_mlm.config.schema import ModelConfig
from flax_mlm.distributed.fsdp import gather_fsdp
from flax_mlm.distributed.mesh import batch_spec
from flax_mlm.model.elementwise import ACTIVATIONS, add_bias
from flax_mlm.model.encoder import Encoder
from flax_mlm.model.layers import LayerNorm, Linear, gathered
from flax_mlm.model.projection import project


class VocabularyHead(nnx.Module):
    """BERT's prediction head: dense, activation, norm, then the token embedding transposed, plus a bias."""

    def __init__(self, config: ModelConfig, vocab_rows: int, rngs: nnx.Rngs):
        width = config.embedding_size or config.hidden_size
        self.activation = ACTIVATIONS[config.activation]
        self.dense = Linear("DE", (config.hidden_size, width), 1, config, rngs)
        self.norm = LayerNorm(config, width)
        self.decoder_bias = nnx.Param(jnp.zeros(vocab_rows), dims="V")

    def __call__(self, x_BKD: jax.Array, embedding_VE: jax.Array) -> jax.Array:
        """Computes logits (B, K, V), float32."""
        x_BKE = self.norm(self.activation(self.dense("BKD,DE->BKE", x_BKD, "KE")))
        embedding_VE = embedding_VE.astype(x_BKE.dtype)
        logits_BKV = project("BKE,VE->BKV", x_BKE, embedding_VE, batch_spec("K", "V"), jnp.float32)
        return add_bias(logits_BKV, self.decoder_bias[...])


class LanguageModel(nnx.Module):
    """Encoder and vocabulary head, the decoder tied to the token embedding."""

    def __init__(self, config: ModelConfig, vocab_rows: int, rngs: nnx.Rngs):
        self.encoder = Encoder(config, vocab_rows, rngs)
        self.head = VocabularyHead(config, vocab_rows, rngs)

    def logits(self, x_BLD: jax.Array) -> Callable[[jax.Array], jax.Array]:
        """Returns the function `predict_BK` -> logits (B, K, V) at these positions.

        The parameters are gathered once, so that the function may be called for several groups of positions.
        """
        with jax.named_scope("head"):
            head = gathered(self.head, x_BLD.dtype)
            embedding_VE = gather_fsdp(self.encoder.embeddings.token[...], x_BLD.dtype)

        @jax.named_scope("head")
        def logits_at(predict_BK: jax.Array) -> jax.Array:
            return head(jnp.take_along_axis(x_BLD, predict_BK[..., None], axis=1), embedding_VE)

        return logits_at


class Model(NamedTuple):
    """A module as pure functions. Parameters are nested dicts of arrays."""

    init: Callable[[jax.Array], Any]  # key -> parameters
    encode: Callable[..., jax.Array]  # (parameters, *arguments of Encoder) -> hidden states (B, L, D)
    # (parameters, hidden states) -> `logits` of the module: LanguageModel.logits or Discriminator.logits
    logits: Callable[..., Any]
    dims: Any  # of each parameter, the letters of its trailing dimensions

    def apply(self, params: Any, *args: Any, predict_BK: jax.Array, **kwargs: Any) -> jax.Array:
        """Computes a language model's logits (B, K, V); the other arguments are those of `encode`."""
        return self.logits(params, self.encode(params, *args, **kwargs))(predict_BK)


def vocab_rows(config: ModelConfig, vocab_size: int) -> int:
    """Counts the rows of the token embedding: the vocabulary, rounded up to `vocab_multiple_of`."""
    return -(-vocab_size // config.vocab_multiple_of) * config.vocab_multiple_of


def language_model(config: ModelConfig, vocab_size: int) -> Model:
    """Builds the language model of this shape, without parameters."""
    return functional(lambda rngs: LanguageModel(config, vocab_rows(config, vocab_size), rngs))


def functional(make: Callable[[nnx.Rngs], Any]) -> Model:
    """Turns a module with an `encoder` and a method `logits` (of hidden states) into pure functions."""
    graphdef, abstract = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))

    def bind(params: Any) -> Any:
        state = jax.tree.map(lambda v, x: v.replace(x), abstract, nnx.State(params), is_leaf=_is_variable)
        return nnx.merge(graphdef, state)

    return Model(
        init=lambda key: nnx.to_pure_dict(nnx.state(make(nnx.Rngs(params=key)))),
        encode=lambda params, *args, **kwargs: bind(params).encoder(*args, **kwargs),
        logits=lambda params, x_BLD: bind(params).logits(x_BLD),
        dims=nnx.to_pure_dict(abstract, lambda v: v.get_metadata("dims")),
    )


def _is_variable(x: Any) -> bool:
    return isinstance(x, nnx.Variable)


TASK_HEADS = ("linear", "tanh", "gelu", "relu", "prediction")


def init_task_head(key: jax.Array, config: ModelConfig, num_outputs: int, kind: str = "linear") -> dict[str, Any]:
    """Initialises a head for fine-tuning, float32.

    Args:
      kind: of `TASK_HEADS`. `linear` is a kernel (D, C) and a bias (C,); the others have a dense layer (D, D) and the
        activation of that name before it, and `prediction` a GELU and a normalisation, as `VocabularyHead` has them.
    """
    width, scale = config.hidden_size, config.initializer_range
    out_key, dense_key = (key, key) if kind == "linear" else jax.random.split(key)
    kernel = scale * jax.random.normal(out_key, (width, num_outputs), jnp.float32)
    head: dict[str, Any] = {"kernel": kernel, "bias": jnp.zeros(num_outputs)}
    if kind == "linear":
        return head
    head["dense"] = {"kernel": scale * jax.random.normal(dense_key, (width, width), jnp.float32)}
    if kind == "prediction":
        head["norm"] = {"scale": jnp.ones(width)}
    if kind != "prediction" or config.use_bias:
        head["dense"]["bias"] = jnp.zeros(width)
    if kind == "prediction" and config.use_bias:
        head["norm"]["bias"] = jnp.zeros(width)
    return head


def apply_task_head(
    head: dict[str, Any],
    x: jax.Array,
    kind: str = "linear",
    norm_eps: float = 0.0,
    dropout: Callable[[jax.Array], jax.Array] = lambda x: x,
) -> jax.Array:
    """Computes the outputs (..., C) for states (..., D).

    Args:
      norm_eps: of the normalisation of `prediction`.
      dropout: applied before the last layer.
    """
    if kind != "linear":
        x = _affine(head["dense"], x)
        activation = {"tanh": jnp.tanh, "relu": jax.nn.relu}.get(kind, lambda x: jax.nn.gelu(x, approximate=False))
        x = activation(x)
    if "norm" in head:
        x = x - x.mean(-1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + norm_eps)
        x = x * _as_row(head["norm"]["scale"], x)
        x = x + _as_row(head["norm"]["bias"], x) if "bias" in head["norm"] else x
    return _affine(head, dropout(x))


def _affine(layer: dict[str, Any], x: jax.Array) -> jax.Array:
    y = x @ layer["kernel"]
    return y + _as_row(layer["bias"], y) if "bias" in layer else y


def _as_row(vector: jax.Array, x: jax.Array) -> jax.Array:
    return vector[(None,) * (x.ndim - 1)]
