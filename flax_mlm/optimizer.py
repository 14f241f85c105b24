"""Schedules, and one visible optax chain."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib
from optax.contrib._muon import scale_by_shape  # not exported, though `optax.contrib.muon` is made of it

from flax_mlm import sharding
from flax_mlm.config import OptimizerConfig

# Every parameter by the last part of its name: whether it decays.
_DECAYS = {
    "kernel": True,
    "token": True,
    "position": True,
    "token_type": True,
    "bias": False,
    "decoder_bias": False,
    "scale": False,
    "detector": True,
    "detector_bias": False,
}


def learning_rate(config: OptimizerConfig, total_steps: int) -> optax.Schedule:
    """Learning rate at each step: linear warm-up from 0, then the schedule, to `final_lr_fraction` of the peak at
    the last step."""
    peak, final = config.learning_rate, config.learning_rate * config.final_lr_fraction
    warmup = round(config.warmup_fraction * total_steps)
    after = max(1, total_steps - warmup)
    decay = max(1, round(config.decay_fraction * total_steps))
    shapes = {
        "constant": optax.constant_schedule(peak),
        "linear": optax.linear_schedule(peak, final, after),
        "cosine": optax.cosine_decay_schedule(peak, after, config.final_lr_fraction),
        "wsd": optax.join_schedules(
            [optax.constant_schedule(peak), optax.linear_schedule(peak, final, decay)], [after - decay]
        ),
    }
    # Step 0 already moves: the ramp is (step + 1) / warmup.
    ramp = optax.linear_schedule(peak / max(1, warmup), peak, max(1, warmup - 1))
    return optax.join_schedules([ramp, shapes[config.schedule]], [warmup])


def decay_mask(params: Any) -> Any:
    """True for each parameter that weight decay shrinks. Raises KeyError for one that `_DECAYS` does not name."""
    return jax.tree_util.tree_map_with_path(lambda path, _: _DECAYS[path[-1].key], params)


def make(config: OptimizerConfig, dims: Any) -> optax.GradientTransformation:
    """The optimizer without its learning rate, by whose negative the train step multiplies the result, and without
    gradient clipping, which the train step does before.

    Args:
      dims: per parameter, the letters of its trailing dimensions (see `model.heads.Model`).
    """
    adam = optax.scale_by_adam(config.beta1, config.beta2, config.eps)
    direction = {
        "adamw": lambda: adam,  # arXiv:1711.05101
        "lamb": lambda: adam,  # arXiv:1904.00962; its trust ratio comes after the decay
        "muon": lambda: optax.partition({"muon": _muon(dims), "adam": adam}, muon_labels),
    }
    return optax.chain(
        direction[config.name](),
        optax.add_decayed_weights(config.weight_decay, decay_mask),
        _trust_ratio_per_layer() if config.name == "lamb" else optax.identity(),
    )


def muon_labels(params: Any) -> Any:
    """Muon for the matrices inside the encoder and head; AdamW for embeddings, norms and biases."""
    return jax.tree_util.tree_map_with_path(lambda path, _: "muon" if path[-1].key == "kernel" else "adam", params)


def _muon(dims: Any) -> optax.GradientTransformation:
    """Muon (Jordan et al. 2024) scaled to AdamW's update size (arXiv:2502.16982 §2.2: RMS 0.2).

    A matrix maps D to everything after it, or everything before D to D; N layers, and the 2 or 3 parts of a fused
    projection, are matrices of their own.
    """

    def dimension_numbers(params: Any) -> Any:
        def one(letters: str, x: Any) -> Any:
            if isinstance(x, optax.MaskedNode):
                return x
            axes = list(range(x.ndim - len(letters), x.ndim))
            into = 1 if letters[0] in "DF" else len(letters) - 1  # leading letters that are inputs
            outputs = [a for a, letter in zip(axes[into:], letters[into:], strict=True) if letter not in "23"]
            return optax.contrib.MuonDimensionNumbers(tuple(axes[:into]), tuple(outputs))

        return jax.tree.map(one, dims, params, is_leaf=lambda x: isinstance(x, optax.MaskedNode))

    chain = optax.chain(
        optax.contrib.scale_by_muon(weight_dimension_numbers=dimension_numbers),
        scale_by_shape(dimension_numbers, consistent_rms=0.2),
    )

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        return sharding.without_axes(chain.update, like=(updates, state))(updates, state)

    return optax.GradientTransformation(chain.init, update)


def _trust_ratio_per_layer() -> optax.GradientTransformation:
    """LAMB's trust ratio, for each layer of the stacked layers on its own."""
    ratio = optax.scale_by_trust_ratio()

    def update(updates: Any, params: Any) -> Any:
        def one(path: Any, u: jax.Array, p: jax.Array) -> jax.Array:
            def scale(u: jax.Array, p: jax.Array) -> jax.Array:
                return ratio.update(u, optax.EmptyState(), p)[0]

            stacked = any(getattr(k, "key", "") in ("layers", "attention_norms") for k in path)
            return jax.vmap(scale)(u, p) if stacked else scale(u, p)

        return jax.tree_util.tree_map_with_path(one, updates, params)

    return optax.stateless(update)


def global_norm(tree: Any) -> jax.Array:
    """Euclidean norm over all leaves, float32."""

    def square(x: jax.Array) -> jax.Array:
        # In two steps, which XLA would else make one, that takes XLA:CPU four times as long.
        return jax.lax.optimization_barrier(jnp.square(x.astype(jnp.float32)).sum(0)).sum()

    return jnp.sqrt(sum(map(square, jax.tree.leaves(tree))))
