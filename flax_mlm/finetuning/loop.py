"""Fine-tuning an encoder: one loop for labels, tags and vectors.

AdamW with warm-up and linear decay, gradients clipped to norm 1, and the epoch that is best on the development set
kept. The same seed gives the same result on the same devices.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from flax_mlm.distributed import batches, mesh
from flax_mlm.errors import UserError, as_user_error
from flax_mlm.inference.embeddings import check_batches
from flax_mlm.inference.forward import NotFinite
from flax_mlm.inference.load import LoadedModel, Log, OnBatch, Params
from flax_mlm.objectives.rows import new_key
from flax_mlm.optim import optimizer

_POOL = 32  # number of batches whose examples are sorted by length together

Batch = tuple[np.ndarray, ...]  # arrays whose first dimension is the examples


class Problem(NamedTuple):
    """One fine-tuning problem: its loss, training batches and score on the development set."""

    init: Callable[[jax.Array], dict[str, Any]]  # key -> parameters beside those of the encoder
    loss: Callable[..., jax.Array]  # params, *batch, key -> scalar
    lengths: Sequence[int]  # of the training examples
    batch: Callable[[list[int], np.random.Generator], Batch]  # indices of training examples -> their batch
    dev_score: Callable[[Params], float]  # higher is better


class SearchResult(NamedTuple):
    """Outcome of a search over learning rates, or over the penalties of a probe."""

    best: str  # the choice with the highest score on the development set
    dev_scores: dict[str, float]  # choice -> score
    outcomes: list[Any]  # one for each seed, with the best choice
    seed_scores: Sequence[float] = ()  # of each seed on the development set
    params: Params = None  # fine-tuned, of the seed with the highest of these scores, the first of several

    @property
    def best_seed(self) -> int:
        """The seed whose parameters are kept."""
        return int(np.argmax(self.seed_scores))


def search(
    model: LoadedModel, problem: Problem, outcome: Callable[[Params], Any], log: Log, on_batch: OnBatch
) -> SearchResult:
    """Fine-tunes with every learning rate and the first seed, then with the best learning rate and every seed.

    Args:
      outcome: fine-tuned parameters -> what to keep of them.
      log: receives one line a learning rate.

    Raises:
      UserError: `finetune.method` is probe, which trains no encoder; or see `embeddings.check_batches`.
      NotFinite: no learning rate is without NaN or infinity; UserError where that is so of a later seed.
    """
    check_batches(model)
    config = model.config.finetune
    if config.method == "probe":
        raise UserError("finetune.method is probe; only --task=classification takes it; use full")
    train = _make_training(model, problem, on_batch)
    scores, first, kept = dict[str, float](), dict[str, Any](), None
    with mesh.use_mesh(model.mesh):
        for learning_rate in (rates := config.rates(model.config.model.hidden_size)):
            name = str(learning_rate)
            try:
                score, params = train(learning_rate, 0)
            except NotFinite:
                log(f"learning rate {name}: diverged")
                if scores or learning_rate != rates[-1]:
                    continue
                raise
            if score > max(scores.values(), default=-np.inf) or not scores:
                kept = params
            scores[name], first[name] = score, outcome(params)
            log(f"learning rate {name}: {score:.4f} on the development set")
        best = max(scores, key=lambda name: scores[name])
        outcomes, seed_scores = [first[best]], [scores[best]]
        for seed in range(1, config.seeds):
            with as_user_error(f"seed {seed} with the best learning rate, {best}: ", NotFinite):
                score, params = train(float(best), seed)
                outcomes.append(outcome(params))
            if score > max(seed_scores):
                kept = params
            seed_scores.append(score)
    return SearchResult(best, scores, outcomes, seed_scores, kept)


_Training = Callable[[float, int], tuple[float, Params]]  # learning rate, seed -> score, parameters


def _make_training(model: LoadedModel, problem: Problem, on_batch: OnBatch) -> _Training:
    """Builds a function (learning rate, seed) -> score and parameters of the best epoch.

    Call it under `mesh.use_mesh(model.mesh)`. It trains until `finetune.patience` epochs have brought no better score,
    and raises NotFinite where even the first epoch diverges.
    """
    config = model.config.finetune
    total = max(len(problem.lengths) // config.batch_size, 1) * config.epochs
    warmup = max(round(config.warmup_fraction * total), 1)
    decay = optax.add_decayed_weights(config.weight_decay, optimizer.decay_mask)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam(0.9, 0.999, 1e-6), decay)

    @jax.jit
    def init(encoder: Any, key: jax.Array) -> tuple[Params, Any]:
        params = {"encoder": encoder, **problem.init(key)}
        return params, tx.init(params)

    @functools.partial(jax.jit, donate_argnums=1)
    def update(params: Params, state: Any, batch: Sequence[jax.Array], key: jax.Array, lr: jax.Array) -> Any:
        loss, grads = jax.value_and_grad(problem.loss)(params, *batch, key)
        with jax.numpy_dtype_promotion("standard"):  # optax raises floats to integer powers
            updates, state = tx.update(mesh.reshard_like(grads, params), state, params)
        return jax.tree.map(lambda p, u: p - lr * u, params, updates), state, loss

    def train(learning_rate: float, seed: int) -> tuple[float, Params]:
        key = new_key(seed)
        params, state = init(model.params["encoder"], key)
        best_score, best_params = -np.inf, params
        best_epoch = step = 0
        for epoch in range(1, config.epochs + 1):
            rng = np.random.default_rng([seed, epoch])
            for indices in epoch_indices(problem.lengths, config.batch_size, rng):
                on_batch()
                lr = learning_rate * min((step + 1) / warmup, (total - step) / max(total - warmup, 1), 1.0)
                arrays = batches.shard_rows(list(problem.batch(indices, rng)), model.mesh)
                params, state, loss = update(params, state, arrays, jax.random.fold_in(key, step), jnp.float32(lr))
                if jax.default_backend() == "cpu":
                    jax.block_until_ready(loss)  # simulated devices deadlock when steps queue up
                step += 1
            try:
                score = problem.dev_score(params)
            except NotFinite:
                if not best_epoch:
                    raise
                break  # what has diverged gets no better
            if score > best_score:
                best_score, best_params, best_epoch = score, params, epoch
            elif epoch - best_epoch >= config.patience:
                break
        return best_score, best_params

    return train


def epoch_indices(lengths: Sequence[int], batch_size: int, rng: np.random.Generator) -> Iterator[list[int]]:
    """Yields the indices of each batch's examples, in random order, examples of similar length together.

    Examples that fill no whole batch are dropped; fewer examples than one batch are repeated.
    """
    order = np.resize(rng.permutation(len(lengths)), max(len(lengths) // batch_size, 1) * batch_size)
    groups = []
    for begin in range(0, len(order), _POOL * batch_size):
        pool = sorted(order[begin : begin + _POOL * batch_size], key=lambda i: lengths[i])
        groups += [pool[at : at + batch_size] for at in range(0, len(pool), batch_size)]
    for i in rng.permutation(len(groups)):
        yield [int(n) for n in groups[i]]
