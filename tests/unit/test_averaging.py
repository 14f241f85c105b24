"""Averages of the weights, each against its definition or against TensorFlow or optax."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flax_mlm.config.load import build
from flax_mlm.config.schema import OptimizerConfig
from flax_mlm.configs import base
from flax_mlm.optim import averaging, optimizer

OPTIMIZER = build(base.get_config()).optimizer


def averages(config: OptimizerConfig, start: float, weights: np.ndarray) -> np.ndarray:
    """The average after each step; step i makes the weights `weights[i]`, one number."""

    def step(average, numbered):
        i, new = numbered
        average = averaging.update_average(config, len(weights), i, average, new)
        return average, average

    numbered = jnp.arange(len(weights)), jnp.asarray(weights, jnp.float32)
    return np.asarray(jax.lax.scan(step, jnp.float32(start), numbered)[1])


def test_ema_is_that_of_tensorflow():
    from flax_mlm.data.tf import tensorflow

    tf = tensorflow()
    weights = np.random.default_rng(0).normal(size=200).cumsum()
    for decay in (0.9, 0.999):
        config = dataclasses.replace(OPTIMIZER, averaging="ema", ema_decay=decay)
        variable, number, expected = tf.Variable(5.0), tf.Variable(0), []
        theirs = tf.train.ExponentialMovingAverage(decay, num_updates=number)
        theirs.apply([variable])  # begins with the initial weights
        for i, value in enumerate(weights):
            number.assign(i)
            variable.assign(value)
            theirs.apply([variable])
            expected.append(float(theirs.average(variable)))
        np.testing.assert_allclose(averages(config, 5.0, weights), expected, rtol=1e-4, atol=1e-4)


def test_ema_forgets_the_start_and_keeps_what_does_not_change():
    config = dataclasses.replace(OPTIMIZER, averaging="ema", ema_decay=0.99)
    assert abs(averages(config, 1e6, np.zeros(100))[-1]) < 1e-3
    np.testing.assert_array_equal(averages(config, 0.3, np.full(2000, 0.3, np.float32)), np.float32(0.3))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 60), st.integers(1, 20), st.integers(1, 6))
def test_lawa_is_the_mean_of_the_latest_snapshots(total, every, count):
    """The mean of `lawa_count` at the end, of 1 to `lawa_count` before; the newest weights until there is one."""
    config = dataclasses.replace(OPTIMIZER, averaging="lawa", lawa_every=every, lawa_count=count)
    weights = np.random.default_rng(total).normal(size=total)
    history = averages(config, 100.0, weights)
    snapshots = range(total, 0, -every)
    assert history[-1] == pytest.approx(np.mean([weights[s - 1] for s in snapshots[:count]]), abs=1e-5)
    for step in range(1, total + 1):
        latest = [weights[s - 1] for s in snapshots if s <= step][:count] or [weights[step - 1]]
        means = [np.mean(latest[: n + 1]) for n in range(len(latest))]
        assert np.abs(history[step - 1] - means).min() < 1e-5, (step, history[step - 1], means)


@pytest.mark.parametrize("warmup", [0.0, 0.2])
def test_schedule_free_is_that_of_optax(warmup):
    """On a small regression: the parameters for gradients and for evaluation after each of 50 steps."""
    changes = {"name": "schedule_free", "schedule": "constant", "warmup_fraction": warmup, "weight_decay": 0.1}
    o, total = dataclasses.replace(OPTIMIZER, learning_rate=0.05, **changes), 50
    rng = np.random.default_rng(0)
    x, y = jnp.asarray(rng.normal(size=(20, 3)), jnp.float32), jnp.asarray(rng.normal(size=20), jnp.float32)
    start = {"kernel": jnp.asarray(rng.normal(size=3), jnp.float32), "bias": jnp.float32(0.0)}
    gradient = jax.grad(lambda p: jnp.square(x @ p["kernel"] + p["bias"] - y).mean())

    def schedule(step):
        return o.learning_rate * optimizer.learning_rate(o, step / total, (step + 1) / total)

    inner = optax.chain(
        optax.scale_by_rms(o.beta2, o.eps, eps_in_sqrt=False, bias_correction=True),
        optax.add_decayed_weights(o.weight_decay, optimizer.decay_mask),
        optax.scale_by_learning_rate(schedule),
    )
    # optax counts steps from 1 for the weights of the average, and from 0 for the learning rate.
    theirs = optax.contrib.schedule_free(inner, lambda step: schedule(step - 1), o.beta1)
    tx, params, average, at = optimizer.make(o, None), start, start, start
    with jax.numpy_dtype_promotion("standard"):
        state, their_state = tx.init(start), theirs.init(start)
        for i in range(total):
            updates, their_state = theirs.update(gradient(at), their_state, at)
            at = optax.apply_updates(at, updates)
            here = averaging.gradient_params(o, params, average)
            updates, state = tx.update(gradient(here), state, here)
            params = optax.apply_updates(params, optax.tree.scale(-schedule(i), updates))
            average = averaging.update_average(o, total, jnp.int32(i), average, params)
            evaluated = optax.contrib.schedule_free_eval_params(their_state, at)
            for mine, other in ((averaging.gradient_params(o, params, average), at), (average, evaluated)):
                jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), mine, other)
    assert np.abs(average["kernel"] - params["kernel"]).max() > 1e-3
