"""The optimizers, each a chain of optax transformations, and the learning-rate schedules."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib
from optax.contrib._muon import scale_by_shape  # not exported, though `optax.contrib.muon` uses it

from flax_mlm.config.schema import OptimizerConfig
from flax_mlm.distributed.mesh import with_auto_axes

# Whether a parameter decays, by the last component of its path.
_DECAYS = dict.fromkeys(("kernel", "token", "position", "token_type", "detector"), True)
_DECAYS |= dict.fromkeys(("bias", "scale", "decoder_bias", "detector_bias"), False)


def decay_mask(params: Any) -> Any:
    """Tree of bools: True for the parameters that weight decay shrinks.

    Raises:
      KeyError: `_DECAYS` does not name a parameter.
    """
    return jax.tree_util.tree_map_with_path(lambda path, _: _DECAYS[path[-1].key], params)


def make(config: OptimizerConfig, dims: Any) -> optax.GradientTransformationExtraArgs:
    """Optimizer without gradient clipping and learning rate: the train step clips before it, and multiplies the updates
    by the negative learning rate after it.

    Its `update` takes the keyword `weight_decay`, a float or a float32 scalar; the default is that of the config.

    Args:
      dims: per parameter, the letters of its trailing dimensions (see `model.heads.Model`).
    """
    adam = optax.scale_by_adam(config.beta1, config.beta2, config.eps)
    direction = {
        "adamw": lambda: adam,  # arXiv:1711.05101
        "stable_adamw": lambda: _clipped_per_layer(adam, config),
        # arXiv:2405.15682; averaging.py takes the place of momentum
        "schedule_free": lambda: optax.scale_by_rms(config.beta2, config.eps, eps_in_sqrt=False, bias_correction=True),
        "lamb": lambda: adam,  # arXiv:1904.00962; the trust ratio follows the decay, below
        "muon": lambda: optax.partition({"muon": _muon(dims), "adam": adam}, muon_labels),
    }
    # As in the authors' code, only for parameters that decay: a bias begins at 0, and would stay near it.
    trust = optax.masked(_trust_ratio_per_layer(), decay_mask) if config.name == "lamb" else optax.identity()
    return optax.chain(direction[config.name](), _add_decayed_weights(config.weight_decay), trust)


def _add_decayed_weights(default: float) -> optax.GradientTransformationExtraArgs:
    """`optax.add_decayed_weights`, whose decay `update` takes as an argument, since it may change from step to step."""

    def update(updates: Any, state: Any, params: Any, weight_decay: Any = default, **_: Any) -> tuple[Any, Any]:
        return optax.add_decayed_weights(weight_decay, decay_mask).update(updates, state, params)

    return optax.GradientTransformationExtraArgs(optax.add_decayed_weights(default, decay_mask).init, update)


def muon_labels(params: Any) -> Any:
    """Labels: "muon" for the matrices inside the encoder and head, "adam" for embeddings, norms and biases."""
    return jax.tree_util.tree_map_with_path(lambda path, _: "muon" if path[-1].key == "kernel" else "adam", params)


def _muon(dims: Any) -> optax.GradientTransformation:
    """Muon (Jordan et al. 2024) scaled to AdamW's update size (arXiv:2502.16982, section 2.2: RMS 0.2).

    A kernel maps D to the dimensions after it, or the dimensions before D to D. Each of the N layers, and each of the
    2 or 3 parts of a fused projection, is a matrix of its own.
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

    muon = optax.contrib.scale_by_muon(weight_dimension_numbers=dimension_numbers)
    chain = optax.chain(muon, scale_by_shape(dimension_numbers, consistent_rms=0.2))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        return with_auto_axes(chain.update, like=(updates, state))(updates, state)

    return optax.GradientTransformation(chain.init, update)


def _clipped_per_layer(adam: optax.GradientTransformation, config: OptimizerConfig) -> optax.GradientTransformation:
    """StableAdamW's update clipping (arXiv:2304.13013, after Adafactor), for each parameter of each layer on its own.

    Adam's step is divided by RMS(g / √v) where that is above 1: where the second moment v lags behind gradients g that
    have grown. As in the authors' code, the weight decay, which follows, is not divided.
    """

    def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, state = adam.update(grads, state, params)
        second_moments = optax.tree.bias_correction(state.nu, config.beta2, state.count)

        def clip(update: jax.Array, g: jax.Array, v: jax.Array) -> jax.Array:
            mean = _sum(jnp.square(g) / jnp.maximum(v, config.eps**2)) / g.size
            return update / jnp.maximum(1.0, jnp.sqrt(mean))

        return _per_layer(clip, updates, grads, second_moments), state

    return optax.GradientTransformation(adam.init, update)


def _trust_ratio_per_layer() -> optax.GradientTransformation:
    """LAMB's trust ratio (arXiv:1904.00962), for each parameter of each layer on its own."""
    ratio = optax.scale_by_trust_ratio()

    def scale(update: jax.Array, param: jax.Array) -> jax.Array:
        return ratio.update(update, optax.EmptyState(), param)[0]

    return optax.stateless(lambda updates, params: _per_layer(scale, updates, params))


def _per_layer(fn: Callable[..., jax.Array], *trees: Any) -> Any:
    """Maps `fn` over the leaves of trees like the parameters, and over each layer of stacked layers."""

    def one(path: Any, *leaves: jax.Array) -> jax.Array:
        stacked = any(getattr(k, "key", "") in ("layers", "attention_norms") for k in path)
        return jax.vmap(fn)(*leaves) if stacked else fn(*leaves)

    return jax.tree_util.tree_map_with_path(one, *trees)


def global_norm(tree: Any) -> jax.Array:
    """Euclidean norm over all leaves, float32."""
    return jnp.sqrt(sum(_sum(jnp.square(x.astype(jnp.float32))) for x in jax.tree.leaves(tree)))


def _sum(x: jax.Array) -> jax.Array:
    """Sum of all elements, in two steps that the barrier keeps apart."""
    # perf(xla-cpu): one reduction over all dimensions is slower.
    return jax.lax.optimization_barrier(x.sum(0)).sum()


def learning_rate(
    config: OptimizerConfig, begin: Any, end: Any, step: Any = 0, num_steps: int | None = None
) -> jax.Array:
    """Learning rate, for a peak of 1, of a step that advances the progress from `begin` to `end`.

    It rises linearly from 0 during the warm-up, and then follows the schedule to `final_lr_fraction` at the end.

    Args:
      begin: fraction of the schedule done before the step.
      end: fraction done after it.
      step: number of the step in the schedule, from 0.
      num_steps: steps of the schedule; None where time ends the run: then it decays during a warm-up in steps, too.
    """
    warmup, final = config.warmup_fraction, config.final_lr_fraction
    ramp = jnp.minimum(1.0, end / warmup) if warmup else 1.0  # by `end`, so that the first step's rate is not 0
    if config.warmup_steps:
        warmup = config.warmup_steps / num_steps if num_steps else 0.0
        ramp = jnp.minimum(1.0, jnp.float32(step + 1) / config.warmup_steps)
    decayed = jnp.clip((begin - warmup) / max(1.0 - warmup, 1e-6), 0.0, 1.0)  # fraction of the time after the warm-up
    left = {
        "constant": lambda: jnp.ones_like(decayed),
        "linear": lambda: 1.0 - decayed,
        "cosine": lambda: 0.5 * (1.0 + jnp.cos(jnp.pi * decayed)),
        "wsd": lambda: jnp.minimum(1.0, (1.0 - jnp.minimum(begin, 1.0)) / max(config.decay_fraction, 1e-6)),
    }[config.schedule]()
    return ramp * (left if config.schedule == "constant" else final + (1.0 - final) * left)
