"""Schedules, and one visible optax chain."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib
from optax.contrib._muon import scale_by_shape  # not exported, though `optax.contrib.muon` is made of it

from flax_mlm.config.schema import OptimizerConfig
from flax_mlm.distributed.mesh import with_auto_axes

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


def learning_rate(config: OptimizerConfig, begin: Any, end: Any) -> jax.Array:
    """Learning rate of a step that takes the run from a share `begin` of it to `end`, for a peak of 1: linear warm-up
    from 0, then the schedule, to `final_lr_fraction` at the end of the run."""
    warmup, final = config.warmup_fraction, config.final_lr_fraction
    done = jnp.clip((begin - warmup) / max(1.0 - warmup, 1e-6), 0.0, 1.0)  # of what comes after the warm-up
    left = {
        "constant": lambda: jnp.ones_like(done),
        "linear": lambda: 1.0 - done,
        "cosine": lambda: 0.5 * (1.0 + jnp.cos(jnp.pi * done)),
        "wsd": lambda: jnp.minimum(1.0, (1.0 - jnp.minimum(begin, 1.0)) / max(config.decay_fraction, 1e-6)),
    }[config.schedule]()
    ramp = jnp.minimum(1.0, end / warmup) if warmup else 1.0  # the first step moves already, but with a budget
    return ramp * (left if config.schedule == "constant" else final + (1.0 - final) * left)


def decay_mask(params: Any) -> Any:
    """True for each parameter that weight decay shrinks. Raises KeyError for one that `_DECAYS` does not name."""
    return jax.tree_util.tree_map_with_path(lambda path, _: _DECAYS[path[-1].key], params)


def make(config: OptimizerConfig, dims: Any, weight_decay: Any = None) -> optax.GradientTransformation:
    """The optimizer without its learning rate, by whose negative the train step multiplies the result, and without
    gradient clipping, which the train step does before.

    Args:
      dims: per parameter, the letters of its trailing dimensions (see `model.heads.Model`).
      weight_decay: an array, of a decay that moves; None: that of the config.
    """
    decay = config.weight_decay if weight_decay is None else weight_decay
    adam = optax.scale_by_adam(config.beta1, config.beta2, config.eps)
    direction = {
        "adamw": lambda: adam,  # arXiv:1711.05101
        "stable_adamw": lambda: _clipped_per_layer(adam, config),
        # arXiv:2405.15682: in the place of momentum is the average, see averaging.py
        "schedule_free": lambda: optax.scale_by_rms(config.beta2, config.eps, eps_in_sqrt=False, bias_correction=True),
        "lamb": lambda: adam,  # arXiv:1904.00962; its trust ratio comes after the decay
        "muon": lambda: optax.partition({"muon": _muon(dims), "adam": adam}, muon_labels),
    }
    return optax.chain(
        direction[config.name](),
        optax.add_decayed_weights(decay, decay_mask),
        # As in the authors' code, for what decays alone: a bias begins at 0, and would stay near it.
        optax.masked(_trust_ratio_per_layer(), decay_mask) if config.name == "lamb" else optax.identity(),
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
        return with_auto_axes(chain.update, like=(updates, state))(updates, state)

    return optax.GradientTransformation(chain.init, update)


def _clipped_per_layer(adam: optax.GradientTransformation, config: OptimizerConfig) -> optax.GradientTransformation:
    """StableAdamW's update clipping (arXiv:2304.13013, after Adafactor): Adam's step of each parameter, of each
    layer on its own, is divided by RMS(g / √v) where that is above 1, that is where the second moment v has not heard
    yet how large gradients g have become. As in the authors' code weight decay, which comes after, is not divided."""

    def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, state = adam.update(grads, state, params)
        second_moments = optax.tree.bias_correction(state.nu, config.beta2, state.count)

        def clip(update: jax.Array, g: jax.Array, v: jax.Array) -> jax.Array:
            mean = _sum(jnp.square(g) / jnp.maximum(v, config.eps**2)) / g.size
            return update / jnp.maximum(1.0, jnp.sqrt(mean))

        return _per_layer(clip, updates, grads, second_moments), state

    return optax.GradientTransformation(adam.init, update)


def _trust_ratio_per_layer() -> optax.GradientTransformation:
    """LAMB's trust ratio, for each layer on its own."""
    ratio = optax.scale_by_trust_ratio()

    def scale(update: jax.Array, param: jax.Array) -> jax.Array:
        return ratio.update(update, optax.EmptyState(), param)[0]

    return optax.stateless(lambda updates, params: _per_layer(scale, updates, params))


def _per_layer(fn: Callable[..., jax.Array], *trees: Any) -> Any:
    """`fn` of the leaves of some trees like the parameters, for each of the stacked layers on its own."""

    def one(path: Any, *leaves: jax.Array) -> jax.Array:
        stacked = any(getattr(k, "key", "") in ("layers", "attention_norms") for k in path)
        return jax.vmap(fn)(*leaves) if stacked else fn(*leaves)

    return jax.tree_util.tree_map_with_path(one, *trees)


def global_norm(tree: Any) -> jax.Array:
    """Euclidean norm over all leaves, float32."""
    return jnp.sqrt(sum(_sum(jnp.square(x.astype(jnp.float32))) for x in jax.tree.leaves(tree)))


def _sum(x: jax.Array) -> jax.Array:
    """In two steps, which XLA would else make one, that takes XLA:CPU four times as long."""
    return jax.lax.optimization_barrier(x.sum(0)).sum()
