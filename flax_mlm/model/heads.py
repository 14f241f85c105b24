"""From hidden states to vocabulary scores, and the whole language model as pure functions of its parameters."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from flax_mlm.config.schema import ModelConfig
from flax_mlm.distributed.fsdp import gather_fsdp
from flax_mlm.distributed.mesh import batch_spec
from flax_mlm.model.elementwise import add_bias, gelu
from flax_mlm.model.encoder import Encoder, LayerNorm, Linear
from flax_mlm.model.projection import project


class VocabularyHead(nnx.Module):
    """BERT's prediction head: dense, GELU, norm, then the token embedding transposed, plus a bias."""

    def __init__(self, config: ModelConfig, vocab_rows: int, rngs: nnx.Rngs):
        width = config.embedding_size or config.hidden_size
        self.dense = Linear("DE", (config.hidden_size, width), 1, config, rngs)
        self.norm = LayerNorm(config, width)
        self.decoder_bias = nnx.Param(jnp.zeros(vocab_rows), dims="V")

    def __call__(self, x_BKD: jax.Array, embedding_VE: jax.Array) -> jax.Array:
        """Scores (B, K, V), float32."""
        x_BKE = self.norm(gelu(self.dense("BKD,DE->BKE", x_BKD, "KE")))
        embedding_VE, spec = embedding_VE.astype(x_BKE.dtype), batch_spec("K", "V")
        logits_BKV = project("BKE,VE->BKV", x_BKE, embedding_VE, spec, jnp.float32)
        return add_bias(logits_BKV, self.decoder_bias[...])


class LanguageModel(nnx.Module):
    """Encoder and vocabulary head, the decoder tied to the token embedding."""

    def __init__(self, config: ModelConfig, vocab_rows: int, rngs: nnx.Rngs):
        self.encoder = Encoder(config, vocab_rows, rngs)
        self.head = VocabularyHead(config, vocab_rows, rngs)

    def scores(self, x_BLD: jax.Array) -> Callable[[jax.Array], jax.Array]:
        """What gives the scores (B, K, V) at positions `predict_BK`; only these reach the vocabulary matmul."""
        with jax.named_scope("head"):
            head = gather_fsdp(nnx.state(self.head), x_BLD.dtype)
            head = nnx.merge(nnx.graphdef(self.head), head)
            embedding_VE = gather_fsdp(self.encoder.embeddings.token[...], x_BLD.dtype)

        @jax.named_scope("head")
        def at(predict_BK: jax.Array) -> jax.Array:
            return head(jnp.take_along_axis(x_BLD, predict_BK[..., None], axis=1), embedding_VE)

        return at


class Model(NamedTuple):
    """A module as pure functions. Parameters are nested dicts of arrays."""

    init: Callable[[jax.Array], Any]  # key -> parameters
    encode: Callable[..., jax.Array]  # (parameters, *args of Encoder) -> hidden states (B, L, D)
    # (parameters, hidden states) -> scores: of a language model a function of `predict_BK`, see LanguageModel.scores
    head: Callable[..., Any]
    dims: Any  # per parameter, the letters of its trailing dimensions

    def apply(self, params: Any, *args: Any, predict_BK: jax.Array, **kwargs: Any) -> jax.Array:
        """Scores (B, K, V) of a language model; the other arguments are those of `encode`."""
        return self.head(params, self.encode(params, *args, **kwargs))(predict_BK)


def vocab_rows(config: ModelConfig, vocab_size: int) -> int:
    """Rows of the token embedding: the vocabulary, rounded up to `vocab_multiple_of`."""
    return -(-vocab_size // config.vocab_multiple_of) * config.vocab_multiple_of


def language_model(config: ModelConfig, vocab_size: int) -> Model:
    """The language model of this shape, without parameters."""
    return functions(lambda rngs: LanguageModel(config, vocab_rows(config, vocab_size), rngs))


def functions(new: Callable[[nnx.Rngs], Any]) -> Model:
    """Of a module with an `encoder`, and `scores` of its hidden states."""

    def make(key: jax.Array) -> Any:
        return new(nnx.Rngs(params=key))

    graphdef, abstract = nnx.split(nnx.eval_shape(lambda: make(jax.random.key(0))))

    def bind(params: Any) -> Any:
        return nnx.merge(
            graphdef, jax.tree.map(lambda v, x: v.replace(x), abstract, nnx.State(params), is_leaf=_is_variable)
        )

    return Model(
        init=lambda key: nnx.to_pure_dict(nnx.state(make(key))),
        encode=lambda params, *args, **kwargs: bind(params).encoder(*args, **kwargs),
        head=lambda params, x_BLD: bind(params).scores(x_BLD),
        dims=nnx.to_pure_dict(abstract, lambda v: v.get_metadata("dims")),
    )


def _is_variable(x: Any) -> bool:
    return isinstance(x, nnx.Variable)
