"""Fine-tuning an encoder: one loop for labels, tags and vectors.

AdamW with warm-up and linear decay, gradients clipped to norm 1, and the epoch that is best on the development set
kept. The same seed gives the same result on the same devices.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from flax_mlm.distributed.batches import shard_rows
from flax_mlm.distributed.mesh import reshard_like
from flax_mlm.errors import UserError
from flax_mlm.finetuning.batches import Batch
from flax_mlm.inference.embeddings import OnBatch, Params, check_batches
from flax_mlm.inference.model import LoadedModel
from flax_mlm.optim import optimizer

Log = Callable[[str], None]


class Problem(NamedTuple):
    """One fine-tuning problem: its loss, training batches and score on the development set."""

    init: Callable[[jax.Array], dict[str, Any]]  # key -> parameters beside those of the encoder
    loss: Callable[..., jax.Array]  # params, *batch, key -> scalar
    epoch: Callable[[np.random.Generator], Iterator[Batch]]  # batches of one epoch
    steps_per_epoch: int
    dev_score: Callable[[Params], float]  # higher is better


class FittedModel(NamedTuple):
    """Parameters of the best epoch of one fine-tuning."""

    params: Params
    score: float  # on the development set
    epoch: int  # from 1


class SearchResult(NamedTuple):
    """Outcome of a search over learning rates, or over the penalties of a probe."""

    best: str  # the choice with the highest score on the development set
    dev_scores: dict[str, float]  # choice -> score
    outcomes: list[Any]  # one for each seed, with the best choice


class _Trainer(NamedTuple):
    """The jitted functions of one problem; call them under `jax.set_mesh(model.mesh)`."""

    # encoder's parameters, key -> parameters, optimizer state
    init: Callable[[Any, jax.Array], tuple[Params, Any]]
    # parameters, optimizer state, batch, key, learning rate -> parameters, optimizer state, loss
    step: Callable[..., tuple[Params, Any, jax.Array]]


def _make_trainer(model: LoadedModel, problem: Problem) -> _Trainer:
    tx = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.scale_by_adam(0.9, 0.999, 1e-6),
        optax.add_decayed_weights(model.config.finetune.weight_decay, optimizer.decay_mask),
    )

    def init(encoder: Any, key: jax.Array) -> tuple[Params, Any]:
        params = {"encoder": encoder, **problem.init(key)}
        return params, tx.init(params)

    def step(
        params: Params, state: Any, batch: Sequence[jax.Array], key: jax.Array, lr: jax.Array
    ) -> tuple[Params, Any, jax.Array]:
        loss, grads = jax.value_and_grad(problem.loss)(params, *batch, key)
        with jax.numpy_dtype_promotion("standard"):  # optax raises floats to integer powers
            updates, state = tx.update(reshard_like(grads, params), state, params)
        return jax.tree.map(lambda p, u: p - lr * u, params, updates), state, loss

    return _Trainer(jax.jit(init), jax.jit(step, donate_argnums=1))


def _fit(
    model: LoadedModel, problem: Problem, trainer: _Trainer, learning_rate: float, seed: int, on_batch: OnBatch
) -> FittedModel:
    """Trains until `finetune.patience` epochs have brought no better score."""
    config = model.config.finetune
    total = problem.steps_per_epoch * config.epochs
    warmup = max(round(config.warmup_fraction * total), 1)
    with jax.set_mesh(model.mesh):
        key = jax.random.key(seed)
        params, state = trainer.init(model.params["encoder"], key)
        best, step = FittedModel(params, -np.inf, 0), 0
        for epoch in range(1, config.epochs + 1):
            for batch in problem.epoch(np.random.default_rng([seed, epoch])):
                on_batch()
                lr = learning_rate * min((step + 1) / warmup, (total - step) / max(total - warmup, 1), 1.0)
                arrays = shard_rows(list(batch), model.mesh)
                step_key = jax.random.fold_in(key, step)
                params, state, loss = trainer.step(params, state, arrays, step_key, jnp.float32(lr))
                if jax.default_backend() == "cpu":
                    jax.block_until_ready(loss)  # simulated devices deadlock when steps queue up
                step += 1
            if (score := problem.dev_score(params)) > best.score:
                best = FittedModel(params, score, epoch)
            elif epoch - best.epoch >= config.patience:
                break
    return best


def search(
    model: LoadedModel, problem: Problem, outcome: Callable[[Params], Any], log: Log, on_batch: OnBatch
) -> SearchResult:
    """Fine-tunes with every learning rate and the first seed, then with the best learning rate and every seed.

    Args:
      outcome: fine-tuned parameters -> what to keep of them.
      log: receives one line a learning rate.

    Raises:
      UserError: `finetune.method` is probe, which trains no encoder; or see `embeddings.check_batches`.
    """
    check_batches(model)
    config = model.config.finetune
    if config.method == "probe":
        raise UserError("finetune.method is probe; only --task=classification takes it; use full")
    trainer = _make_trainer(model, problem)

    def fit(learning_rate: float, seed: int) -> tuple[float, Any]:
        best = _fit(model, problem, trainer, learning_rate, seed, on_batch)
        return best.score, outcome(best.params)

    scores, first = {}, {}
    for learning_rate in config.rates():
        name = f"{learning_rate:g}"
        scores[name], first[name] = fit(learning_rate, 0)
        log(f"learning rate {name}: {scores[name]:.4f} on the development set")
    best = max(scores, key=lambda name: scores[name])
    return SearchResult(best, scores, [first[best], *(fit(float(best), seed)[1] for seed in range(1, config.seeds))])
