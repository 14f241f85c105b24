"""Schedules, which parameters decay, and each optimizer against its definition."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from flax_mlm.config.load import build
from flax_mlm.config.schema import MeshConfig
from flax_mlm.configs import base
from flax_mlm.distributed.mesh import make_mesh
from flax_mlm.model import heads
from flax_mlm.optim import optimizer

CONFIG = build(base.get_config())
OPTIMIZER = dataclasses.replace(CONFIG.optimizer, learning_rate=1.0, warmup_fraction=0.1)
SHAPE = dataclasses.replace(CONFIG.model, num_layers=3, hidden_size=16, num_heads=2, intermediate_size=32, glu=True)


@pytest.fixture(scope="module", autouse=True)
def one_device():
    mesh = make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    with jax.set_mesh(mesh):
        yield mesh


@pytest.fixture(scope="module")
def params_and_grads(one_device):
    model = heads.language_model(SHAPE, 40)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    rng = np.random.default_rng(0)
    params, grads = (jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), shapes) for _ in "pg")
    return model.dims, *jax.device_put((params, grads), NamedSharding(one_device, PartitionSpec()))


def update(name: str, params_and_grads, **changes):
    dims, params, grads = params_and_grads
    tx = optimizer.make(dataclasses.replace(OPTIMIZER, name=name, max_grad_norm=0.0, **changes), dims)
    with jax.numpy_dtype_promotion("standard"):
        return jax.jit(lambda grads, params: tx.update(grads, tx.init(params), params)[0])(grads, params)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", {0: 0.1, 9: 1.0, 10: 1.0, 55: 1.0, 100: 1.0}),
        ("linear", {0: 0.1, 4: 0.5, 9: 1.0, 10: 1.0, 55: 0.5, 100: 0.0}),
        ("cosine", {0: 0.1, 9: 1.0, 55: 0.5, 100: 0.0}),
        ("wsd", {0: 0.1, 9: 1.0, 80: 1.0, 90: 0.5, 100: 0.0}),
    ],
)
def test_schedules(schedule, expected):
    config = dataclasses.replace(OPTIMIZER, schedule=schedule)
    rates = {s: float(optimizer.learning_rate(config, s / 100, (s + 1) / 100)) for s in expected}
    assert rates == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "wsd", "constant"])
def test_first_and_last_rate_of_schedules_without_warm_up(schedule):
    config = dataclasses.replace(OPTIMIZER, schedule=schedule, final_lr_fraction=0.25, warmup_fraction=0.0)
    first, last = (float(optimizer.learning_rate(config, s, s + 0.01)) for s in (0.0, 1.0))
    assert first == pytest.approx(1.0)
    assert last == pytest.approx(1.0 if schedule == "constant" else 0.25)


@settings(deadline=None)
@given(st.sampled_from(["linear", "cosine", "wsd"]), st.integers(5, 200), st.integers(2, 40))
def test_schedules_are_those_of_optax(schedule, total, every):
    """The warm-up is a whole number of steps, to which optax rounds it."""
    warmup = total // every
    config = dataclasses.replace(
        OPTIMIZER, schedule=schedule, warmup_fraction=warmup / total, decay_fraction=0.5, final_lr_fraction=0.1
    )
    after, decay = total - warmup, total * 0.5
    theirs = {
        "linear": optax.linear_schedule(1.0, 0.1, after),
        "cosine": optax.cosine_decay_schedule(1.0, after, 0.1),
        "wsd": optax.linear_schedule(1.0, 0.1, decay, transition_begin=after - decay),
    }[schedule]
    for step in range(total):
        expected = (step + 1) / warmup if step < warmup else float(theirs(step - warmup))
        rate = float(optimizer.learning_rate(config, step / total, (step + 1) / total))
        assert rate == pytest.approx(expected, abs=2e-5), step


def test_decay_spares_norms_and_biases_and_names_every_parameter(params_and_grads):
    _, params, _ = params_and_grads
    mask = {
        jax.tree_util.keystr(path): decays
        for path, decays in jax.tree_util.tree_leaves_with_path(optimizer.decay_mask(params))
    }
    assert {name for name, decays in mask.items() if decays} == {
        name for name in mask if name.endswith(("['kernel']", "['token']", "['position']", "['token_type']"))
    }
    with pytest.raises(KeyError, match="surprise"):
        optimizer.decay_mask({"surprise": jnp.zeros(3)})


def test_adamw_is_optax_adamw(params_and_grads):
    _, params, grads = params_and_grads
    got = update("adamw", params_and_grads)
    o = OPTIMIZER
    reference = optax.adamw(1.0, o.beta1, o.beta2, o.eps, weight_decay=o.weight_decay, mask=optimizer.decay_mask)
    with jax.numpy_dtype_promotion("standard"):
        expected = reference.update(grads, reference.init(params), params)[0]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, -b, rtol=1e-5, atol=1e-6), got, expected)


def updates(name: str, params_and_grads, scales: list[float], **changes):
    """Updates of several steps, whose gradients are the given ones times `scales`."""
    dims, params, grads = params_and_grads
    tx = optimizer.make(dataclasses.replace(OPTIMIZER, name=name, **changes), dims)
    with jax.numpy_dtype_promotion("standard"):
        state, step = tx.init(params), jax.jit(tx.update)
        history = []
        for scale in scales:
            update, state = step(jax.tree.map(functools.partial(jnp.multiply, scale), grads), state, params)
            history.append(update)
    return history


def one_layer(tree, layer: int):
    """Parameters of one of the stacked layers, and the embeddings."""
    encoder = tree["encoder"]
    return {"layer": jax.tree.map(lambda x: x[layer], encoder["layers"]), "embeddings": encoder["embeddings"]}


def test_stable_adamw_clips_each_tensor_of_each_layer_as_optax_clips_blocks(params_and_grads):
    """Without momentum the step is g / √v, which `optax.clip_by_block_rms` clips alike."""
    _, _, grads = params_and_grads
    # The gradients of layer 1 grow more than those of the others.
    grows = jax.tree_util.tree_map_with_path(
        lambda path, g: g.at[1].multiply(9.0) if "layers" in str(path) else g, grads
    )
    o = dataclasses.replace(OPTIMIZER, name="stable_adamw", beta1=0.0, weight_decay=0.0)
    dims, params, _ = params_and_grads
    tx = optimizer.make(o, dims)
    rms = optax.scale_by_rms(o.beta2, o.eps, eps_in_sqrt=False, bias_correction=True)
    reference = optax.chain(rms, optax.clip_by_block_rms(1.0))
    with jax.numpy_dtype_promotion("standard"):
        _, state = tx.update(grads, tx.init(params), params)
        got, _ = tx.update(grows, state, params)
        for layer in range(3):
            first, then = one_layer(grads, layer), one_layer(grows, layer)
            _, state = reference.update(first, reference.init(first))
            expected, _ = reference.update(then, state)
            jax.tree.map(
                lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), one_layer(got, layer), expected
            )
    sizes = [float(jnp.sqrt(jnp.square(got["encoder"]["layers"]["mlp_out"]["kernel"][i]).mean())) for i in range(3)]
    assert sizes == pytest.approx([1.0] * 3, abs=1e-3)


def test_stable_adamw_is_adamw_with_a_shorter_step_where_gradients_have_grown(params_and_grads):
    scales, b2 = [1.0, 1.0, 1.0, 50.0], OPTIMIZER.beta2
    stable, plain = (updates(name, params_and_grads, scales) for name in ("stable_adamw", "adamw"))
    for a, b in zip(stable[:3], plain[:3], strict=True):
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6), a, b)
    # The published algorithm; all gradients grow alike, so RMS(g / √v) is the same for all parameters.
    v = 0.0
    for t, scale in enumerate(scales, 1):
        kept = b2 * (1 - b2 ** (t - 1)) / (1 - b2**t)
        v = kept * v + (1 - kept) * scale**2
    ratio = 50.0 / v**0.5
    assert ratio > 1.9

    def compare(path, s, p, param):
        decay = 0.0 if path[-1].key in ("bias", "scale", "decoder_bias") else OPTIMIZER.weight_decay * param
        np.testing.assert_allclose(s - decay, (p - decay) / ratio, rtol=1e-3, atol=1e-5)

    jax.tree_util.tree_map_with_path(compare, stable[3], plain[3], params_and_grads[1])


def matrices(tree) -> dict[str, jax.Array]:
    """Some of the kernels as matrices, inputs first."""
    layers = tree["encoder"]["layers"]
    return {
        "a query projection": layers["qkv"]["kernel"][1, :, 0].reshape(16, 16),
        "a value projection": layers["qkv"]["kernel"][2, :, 2].reshape(16, 16),
        "attention output": layers["attention_out"]["kernel"][0].reshape(16, 16),
        "a half of the gated MLP": layers["mlp_in"]["kernel"][1, :, 1],
        "MLP output": layers["mlp_out"]["kernel"][2],
        "the head": tree["head"]["dense"]["kernel"],
    }


def test_muon_is_the_published_iteration_on_each_matrix_at_adamws_size(params_and_grads):
    """The quintic polynomial of the singular values, five times (Jordan et al. 2024), · 0.2 · √(longer side), and the
    decay unscaled (arXiv:2502.16982)."""
    _, params, grads = params_and_grads
    got = matrices(update("muon", params_and_grads))
    for name, gradient in matrices(grads).items():
        left, singular, right = np.linalg.svd(np.asarray(gradient, np.float64), full_matrices=False)
        singular /= np.linalg.norm(singular)
        for _ in range(5):
            singular = 3.4445 * singular - 4.7750 * singular**3 + 2.0315 * singular**5
        expected = 0.2 * max(gradient.shape) ** 0.5 * (left * singular) @ right
        expected += OPTIMIZER.weight_decay * matrices(params)[name]
        np.testing.assert_allclose(got[name], expected, rtol=1e-3, atol=1e-3, err_msg=name)
        assert float(jnp.sqrt(jnp.square(got[name]).mean())) == pytest.approx(0.2, rel=0.25), name


def test_muon_equals_optax_over_several_steps(params_and_grads):
    """Nesterov momentum over several steps, on matrices that optax is given one by one."""
    scales = [1.0, -3.0, 0.5, 2.0]
    history = updates("muon", params_and_grads, scales)
    _, params, grads = params_and_grads
    params, grads = matrices(params), matrices(grads)
    reference = optax.contrib.muon(1.0, weight_decay=OPTIMIZER.weight_decay, consistent_rms=0.2)
    with jax.numpy_dtype_promotion("standard"):
        state = reference.init(params)
        for got, scale in zip(history, scales, strict=True):
            expected, state = reference.update(jax.tree.map(lambda g, s=scale: s * g, grads), state, params)
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, -b, rtol=1e-3, atol=1e-3), matrices(got), expected)


def test_muon_leaves_embeddings_norms_and_biases_to_adam(params_and_grads):
    muon, adam = update("muon", params_and_grads), update("adamw", params_and_grads)

    def compare(path, a, b):
        if path[-1].key == "kernel":
            assert np.abs(a - b).max() > 0.1
        else:
            np.testing.assert_allclose(a, b, rtol=1e-6)

    jax.tree_util.tree_map_with_path(compare, muon, adam)


def test_lamb_scales_each_layer_to_its_own_norm(params_and_grads):
    _, params, _ = params_and_grads
    got = update("lamb", params_and_grads)
    for layer in range(3):
        kernel = params["encoder"]["layers"]["mlp_out"]["kernel"][layer]
        step = got["encoder"]["layers"]["mlp_out"]["kernel"][layer]
        assert float(jnp.linalg.norm(step)) == pytest.approx(float(jnp.linalg.norm(kernel)), rel=1e-4)
    adam = update("adamw", params_and_grads)
    for name in ("decoder_bias", "norm"):
        jax.tree.map(np.testing.assert_array_equal, got["head"][name], adam["head"][name])
