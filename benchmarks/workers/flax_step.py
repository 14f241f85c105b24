"""A step of the last transformers that had Flax, as in its examples/flax/language-modeling/run_mlm_flax.py: scores for
all tokens, one-hot labels, optax.adamw; gradients clipped by their global norm, as in all programs here.
"""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import transformers

from benchmarks.workers.serving import serve


def build(spec: dict[str, Any]) -> Callable[[], float]:
    """spec: `folder` of the case; `optimizer`, our config of it."""
    folder, settings = Path(spec["folder"]), spec["optimizer"]
    net = transformers.FlaxBertForMaskedLM.from_pretrained(folder / "hf", from_pt=True)
    decays = jax.tree.map(lambda p: p.ndim > 1, net.params)
    tx = optax.chain(
        optax.clip_by_global_norm(settings["max_grad_norm"]),
        optax.adamw(
            settings["learning_rate"], settings["beta1"], settings["beta2"], settings["eps"],
            weight_decay=settings["weight_decay"], mask=decays,
        ),
    )  # fmt: skip

    def train_step(params: Any, opt_state: Any, batch: dict[str, jax.Array], rng: jax.Array) -> Any:
        def loss_fn(params: Any) -> jax.Array:
            logits = net(batch["input_ids"], batch["attention_mask"], params=params, dropout_rng=rng, train=True)[0]
            used = jnp.where(batch["labels"] >= 0, 1.0, 0.0)
            loss = optax.softmax_cross_entropy(logits, jax.nn.one_hot(batch["labels"], logits.shape[-1])) * used
            return loss.sum() / used.sum()

        loss, grads = jax.value_and_grad(loss_fn)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    train_step = jax.jit(train_step, donate_argnums=(0, 1))
    params = jax.tree.map(jnp.asarray, net.params)
    state = params, tx.init(params)
    arrays, rng = np.load(folder / "batches.npz"), jax.random.key_data(jax.random.key(0))
    batches = itertools.cycle(zip(arrays["inputs"], arrays["labels"], strict=True))

    def step() -> float:
        nonlocal state
        inputs, labels = next(batches)
        batch = {"input_ids": inputs, "attention_mask": np.ones_like(inputs), "labels": labels}
        *state, loss = train_step(*state, batch, rng)
        return float(loss)

    return step


if __name__ == "__main__":
    serve(build, ("transformers", "jax", "jaxlib", "flax"))
