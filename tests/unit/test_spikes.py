"""Running statistics of loss and gradient norm."""

import jax.numpy as jnp
import numpy as np
import pytest

from flax_mlm.optim import spikes


def after(values: np.ndarray, threshold: float = 4.0) -> spikes.Running:
    running = spikes.init()
    for value in values:
        running = spikes.update(running, jnp.asarray(value, jnp.float32), threshold)
    return running


def calm(n: int) -> np.ndarray:
    return np.random.default_rng(0).normal((3.0, 1.0), (0.1, 0.05), (n, 2))


def test_mean_and_deviation_are_those_of_the_values():
    running = after(calm(30))
    np.testing.assert_allclose(running.mean_2, calm(30).mean(0), rtol=0.01)
    np.testing.assert_allclose(np.sqrt(running.variance_2), calm(30).std(0), rtol=0.15)
    long = after(calm(2000))
    np.testing.assert_allclose(long.mean_2, (3.0, 1.0), rtol=0.02)
    np.testing.assert_allclose(np.sqrt(long.variance_2), (0.1, 0.05), rtol=0.25)


def test_no_spike_during_the_warm_up_or_without_an_outlier():
    assert not spikes.z_scores(after(calm(24)), jnp.array([100.0, 100.0])).any()
    running = after(calm(200))
    z_scores = np.array([spikes.z_scores(running, jnp.asarray(v, jnp.float32)) for v in calm(1000)])
    assert z_scores.max() < 5
    assert (z_scores > 4).mean() < 0.005
    assert not spikes.z_scores(running, jnp.array([0.0, 0.0])).any(), "values below the mean are no spikes"


@pytest.mark.parametrize("which", [0, 1])
def test_a_spike_in_either_value_hardly_moves_the_statistics(which):
    running = after(calm(200))
    value = np.array([3.0, 1.0])
    value[which] *= 4
    assert spikes.z_scores(running, jnp.asarray(value, jnp.float32))[which] > 10
    moved = spikes.update(running, jnp.asarray(value, jnp.float32), 4.0)
    assert abs(moved.mean_2 - running.mean_2)[which] < 0.13 * np.sqrt(running.variance_2[which])


def test_steps_that_are_not_finite_do_not_count():
    running = after(calm(50))
    for bad in ([np.nan, 1.0], [3.0, np.inf]):
        same = spikes.update(running, jnp.asarray(bad, jnp.float32), 4.0)
        assert all((a == b).all() for a, b in zip(running, same, strict=True))


def test_the_higher_the_spike_the_lower_the_clipped_norm():
    running = after(calm(200))
    mean, deviation = float(running.mean_2[1]), float(np.sqrt(running.variance_2[1]))
    for z in (5.0, 20.0):
        norm = mean + z * deviation
        clipped = spikes.clip_norm(running, jnp.asarray([3.0, norm], jnp.float32), 4.0)
        assert clipped == pytest.approx(mean + 16.0 / z * deviation, rel=1e-3)
    assert spikes.clip_norm(running, jnp.asarray([3.0, mean], jnp.float32), 4.0) == np.inf
