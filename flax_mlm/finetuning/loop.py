"""Fine-tuning an encoder on texts: one loop for labels, tags and vectors.

A head is dropout and a linear map, of the pooled states (B, D) or of each state (B, L, D), as in BERT
(arXiv:1810.04805 §4). AdamW with warm-up and linear decay, gradients clipped to norm 1, examples of like length
together, the best epoch on the development set kept. The same seed gives the same result on the same devices.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from flax_mlm.config.schema import FinetuneConfig
from flax_mlm.distributed.batches import shard_rows
from flax_mlm.distributed.mesh import replicate, reshard_like
from flax_mlm.errors import UserError
from flax_mlm.inference.load import LoadedModel
from flax_mlm.optim import optimizer

_POOL = 32  # batches whose examples are sorted by length together

Log = Callable[[str], None]
Poll = Callable[[], Any]
Params = Any
Batch = tuple[np.ndarray, ...]  # each with the examples first
Vectors = Callable[[Params, jax.Array, jax.Array], jax.Array]  # see make_vectors


class Texts(NamedTuple):
    """N tokenised texts, special tokens included."""

    tokens: list[list[int]]
    token_types: list[list[int]]

    def __len__(self) -> int:
        return len(self.tokens)

    def take(self, numbers: Sequence[int]) -> "Texts":
        """Some of them."""
        return Texts([self.tokens[i] for i in numbers], [self.token_types[i] for i in numbers])


class Trainer(NamedTuple):
    """The jitted functions of one fine-tuning. Call them under `jax.set_mesh(trained.mesh)`."""

    # the encoder's parameters, key -> parameters, state
    init: Callable[[Any, jax.Array], tuple[Params, Any]]
    # parameters, state, batch, key, learning rate -> parameters, state, loss
    train: Callable[..., tuple[Params, Any, jax.Array]]


class Fitted(NamedTuple):
    """The end of one fine-tuning."""

    params: Params
    score: float  # of the best epoch, on the development set
    epoch: int  # the best one, from 1


def pooled(trained: LoadedModel, states_BLD: jax.Array, tokens_BL: jax.Array) -> jax.Array:
    """One vector (B, D) a row, by `finetune.pooling`: the state of its first token (`cls`) or its last one (`last`), or
    the mean over its tokens (`mean`).

    Raises:
      UserError: the first token of a causal model has seen nothing.
    """
    pooling = trained.config.finetune.pooling
    if pooling == "cls":
        if trained.config.objective.name == "clm":
            raise UserError("finetune.pooling is cls, a token that sees nothing in a causal model; use mean or last")
        return states_BLD[:, 0]
    real_BL = tokens_BL != trained.tokenizer.pad_id
    if pooling == "last":
        real_BL &= real_BL.sum(1, keepdims=True) == jnp.cumsum(real_BL, axis=1)
    weight_BL1 = real_BL[..., None].astype(states_BLD.dtype)
    return (states_BLD * weight_BL1).sum(1) / jnp.maximum(weight_BL1.sum(1), 1.0)


def encode(
    trained: LoadedModel, params: Params, tokens_BL: jax.Array, types_BL: jax.Array, keys_B: jax.Array | None = None
) -> jax.Array:
    """Hidden states (B, L, D), float32, each row one segment; to be called inside jit.

    Args:
      params: with the encoder's under "encoder".
      keys_B: for dropout; None: without.
    """
    causal, has_types = trained.config.objective.name == "clm", trained.config.model.type_vocab_size > 1
    segments_BL = (tokens_BL != trained.tokenizer.pad_id).astype(jnp.int32)
    positions_BL = reshard_like(jax.lax.broadcasted_iota(jnp.int32, tokens_BL.shape, 1), tokens_BL)
    states = trained.steps.model.encode(
        {**trained.params, "encoder": params["encoder"]},
        tokens_BL,
        segments_BL,
        positions_BL,
        causal=causal,
        token_types_BL=types_BL if has_types else None,
        dropout_keys_B=keys_B,
    )
    return states.astype(jnp.float32)


def make_vectors(trained: LoadedModel) -> Vectors:
    """Jitted (parameters, tokens, token types) -> pooled states (B, D)."""

    def vectors(params: Params, tokens_BL: jax.Array, types_BL: jax.Array) -> jax.Array:
        return pooled(trained, encode(trained, params, tokens_BL, types_BL), tokens_BL)

    return jax.jit(vectors)


def row_keys(key: jax.Array, like_B: jax.Array) -> jax.Array:
    """A key for each row, laid out as another array of the rows."""
    return reshard_like(jax.random.split(key, like_B.shape[0]), like_B)


def make_trainer(
    trained: LoadedModel, loss: Callable[..., jax.Array], new_head: Callable[[jax.Array], dict[str, Any]]
) -> Trainer:
    """The optimizer around a loss.

    Args:
      loss: (parameters, *batch, key) -> scalar.
      new_head: key -> parameters beside those of the encoder.
    """
    tx = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.scale_by_adam(0.9, 0.999, 1e-6),
        optax.add_decayed_weights(trained.config.finetune.weight_decay, optimizer.decay_mask),
    )

    def init(encoder: Any, key: jax.Array) -> tuple[Params, Any]:
        params = {"encoder": encoder, **new_head(key)}
        return params, tx.init(params)

    def train(
        params: Params, state: Any, batch: Sequence[jax.Array], key: jax.Array, lr: jax.Array
    ) -> tuple[Params, Any, jax.Array]:
        value, grads = jax.value_and_grad(loss)(params, *batch, key)
        with jax.numpy_dtype_promotion("standard"):  # optax raises floats to integer powers
            updates, state = tx.update(reshard_like(grads, params), state, params)
        return jax.tree.map(lambda p, u: p - lr * u, params, updates), state, value

    return Trainer(jax.jit(init), jax.jit(train, donate_argnums=1))


class Head(NamedTuple):
    """A linear map of the states, and the functions that train and ask it."""

    trainer: Trainer
    outputs: Callable[[Params, jax.Array, jax.Array], jax.Array]  # jitted: parameters, tokens, types -> (B, [L,] C)


def make_head(trained: LoadedModel, num_outputs: int, per_token: bool, regression: bool) -> Head:
    """Builds and jits a task's head and its loss.

    Args:
      num_outputs: C.
      per_token: labels are int32 (B, L), -1 where there is none; else (B,).
      regression: squared error of the one output, for float32 labels; else cross-entropy.
    """
    model, dropout_rate = trained.config.model, trained.config.finetune.dropout_rate

    def new_head(key: jax.Array) -> dict[str, Any]:
        kernel = model.initializer_range * jax.random.normal(key, (model.hidden_size, num_outputs))
        return {"task": {"kernel": kernel, "bias": jnp.zeros(num_outputs)}}

    def outputs(params: Params, tokens_BL: jax.Array, types_BL: jax.Array, keys_B: Any = None) -> jax.Array:
        x = encode(trained, params, tokens_BL, types_BL, keys_B)
        if not per_token:
            x = pooled(trained, x, tokens_BL)
        if keys_B is not None and dropout_rate:
            keep = jax.vmap(lambda k: jax.random.bernoulli(jax.random.fold_in(k, 99), 1 - dropout_rate, x.shape[1:]))
            x = x * keep(keys_B) / (1 - dropout_rate)
        return x @ params["task"]["kernel"] + params["task"]["bias"]

    def loss(params: Params, tokens_BL: jax.Array, types_BL: jax.Array, labels: jax.Array, key: jax.Array) -> jax.Array:
        found = outputs(params, tokens_BL, types_BL, row_keys(key, tokens_BL[:, 0]))
        if regression:
            return jnp.square(found[..., 0] - labels).mean()
        chosen = jax.nn.one_hot(labels, num_outputs)  # of -1: nothing
        return -(chosen * jax.nn.log_softmax(found)).sum() / jnp.maximum(chosen.sum(), 1.0)

    return Head(make_trainer(trained, loss, new_head), jax.jit(outputs))


def fit(
    trained: LoadedModel,
    trainer: Trainer,
    epoch: Callable[[np.random.Generator], Iterator[Batch]],
    steps_per_epoch: int,
    score: Callable[[Params], float],
    learning_rate: float,
    seed: int,
    poll: Poll,
) -> Fitted:
    """Trains, and keeps the parameters of the epoch with the best score. Stops once `finetune.patience` epochs have
    brought nothing better.

    Args:
      epoch: the batches of one epoch, `steps_per_epoch` of them.
      score: of parameters, on the development set; higher is better.
    """
    config = trained.config.finetune
    total = steps_per_epoch * config.epochs
    warmup = max(round(config.warmup_fraction * total), 1)
    with jax.set_mesh(trained.mesh):
        key = jax.random.key(seed)
        params, state = trainer.init(trained.params["encoder"], key)
        best, step = Fitted(params, -np.inf, 0), 0
        for number in range(1, config.epochs + 1):
            for batch in epoch(np.random.default_rng([seed, number])):
                poll()
                rate = learning_rate * min((step + 1) / warmup, (total - step) / max(total - warmup, 1), 1.0)
                arrays = shard_rows(list(batch), trained.mesh)
                params, state, loss = trainer.train(
                    params, state, arrays, jax.random.fold_in(key, step), jnp.float32(rate)
                )
                if jax.default_backend() == "cpu":
                    jax.block_until_ready(loss)  # simulated devices deadlock when steps queue up
                step += 1
            if (found := score(params)) > best.score:
                best = Fitted(params, found, number)
            elif number - best.epoch >= config.patience:
                break
    return best


class Searched(NamedTuple):
    """The end of a search."""

    best: str  # what was chosen on the development set
    dev_scores: dict[str, float]  # choice -> score there
    outcomes: list[Any]  # of every seed with the best one


def search(config: FinetuneConfig, once: Callable[[float, int], tuple[float, Any]], log: Log) -> Searched:
    """Tries every learning rate with the first seed, and the best one with every seed.

    Args:
      once: learning rate, seed -> score on the development set, and the outcome.

    Raises:
      UserError: `finetune.method` is probe, which trains no encoder.
    """
    if config.method == "probe":
        raise UserError("finetune.method is probe, which only --task=classification takes; use full")
    scores, first = {}, {}
    for rate in config.rates():
        name = f"{rate:g}"
        scores[name], first[name] = once(rate, 0)
        log(f"learning rate {name}: {scores[name]:.4f} on the development set")
    best = max(scores, key=lambda name: scores[name])
    more = [once(float(best), seed)[1] for seed in range(1, config.seeds)]
    return Searched(best, scores, [first[best], *more])


def predict(
    trained: LoadedModel, function: Callable[..., jax.Array], params: Params, texts: Texts, poll: Poll
) -> list[np.ndarray]:
    """What a jitted (parameters, tokens, types) -> (B, ...) gives for each text, float32; padding, where there is any,
    last."""
    size = trained.config.finetune.batch_size
    found: list[Any] = [None] * len(texts)
    order = sorted(range(len(texts)), key=lambda i: len(texts.tokens[i]))
    with jax.set_mesh(trained.mesh):
        for begin in range(0, len(order), size):
            poll()
            numbers = order[begin : begin + size]
            filled = numbers + [numbers[-1]] * (size - len(numbers))
            tokens, types = shard_rows(list(padded(trained, texts.take(filled))), trained.mesh)
            rows = np.asarray(replicate(function(params, tokens, types)))
            for i, row in zip(numbers, rows, strict=False):
                found[i] = row
    return found


def batches_of(count: int, size: int) -> int:
    """How many batches an epoch of `count` examples has."""
    return max(count // size, 1)


def epoch_batches(lengths: Sequence[int], size: int, rng: np.random.Generator) -> Iterator[list[int]]:
    """Numbers of the examples of each batch: in random order, those of like length together, what is left over dropped
    (when there are fewer than one batch, some come twice)."""
    order = np.resize(rng.permutation(len(lengths)), batches_of(len(lengths), size) * size)
    batches = []
    for begin in range(0, len(order), _POOL * size):
        some = sorted(order[begin : begin + _POOL * size], key=lambda i: lengths[i])
        batches += [some[at : at + size] for at in range(0, len(some), size)]
    for i in rng.permutation(len(batches)):
        yield [int(n) for n in batches[i]]


def tokenised(trained: LoadedModel, texts: Sequence[str], pairs: Sequence[str] | None = None) -> Texts:
    """[CLS] text [SEP], or [CLS] text [SEP] pair [SEP], cut to `finetune.max_length`, the longer of a pair first."""
    t, config = trained.tokenizer, trained.config
    limit = min(config.finetune.max_length, trained.max_length)
    rows = Texts([], [])
    seconds = [None] * len(texts) if pairs is None else t.encode(pairs)
    for first, second in zip(t.encode(texts), seconds, strict=True):
        a, b = first.tolist(), [] if second is None else second.tolist()
        room = limit - (2 if second is None else 3)
        if len(a) + len(b) > room:  # the longer is cut to what the shorter leaves, or both to a half
            short = min(len(a), len(b), room // 2)
            a, b = (a[: room - short], b[:short]) if len(a) >= len(b) else (a[:short], b[: room - short])
        row = [t.cls_id, *a, t.sep_id]
        more = [] if second is None else [*b, t.sep_id]
        rows.tokens.append(row + more)
        rows.token_types.append([0] * len(row) + [1] * len(more))
    return rows


def padded(trained: LoadedModel, texts: Texts) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and token types, int32 (B, L)."""
    shape = len(texts), trained.padded_length(max(map(len, texts.tokens)))
    tokens_BL, types_BL = np.full(shape, trained.tokenizer.pad_id, np.int32), np.zeros(shape, np.int32)
    for b, (tokens, types) in enumerate(zip(*texts, strict=True)):
        tokens_BL[b, : len(tokens)], types_BL[b, : len(tokens)] = tokens, types
    return tokens_BL, types_BL
