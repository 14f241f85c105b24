"""The train step: the same on every mesh and with accumulation, state sharded as planned, bad steps skipped."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from flax_mlm.config.schema import MeshConfig
from flax_mlm.distributed.batches import abstract_batch, shard_batch
from flax_mlm.distributed.mesh import make_mesh
from flax_mlm.objectives import masking
from flax_mlm.objectives.rows import run_key
from flax_mlm.objectives.targets import make_targets, max_predictions_per_row
from flax_mlm.optim import optimizer, spikes
from flax_mlm.training.state import TrainState
from flax_mlm.training.step import build_training
from tests.helpers.steps import MODERN, STILL, B, L, V, built, evaluated, host_batch, make_config, train, vocabulary

BERT = ()  # the only case with dropout
MUON = (("optimizer.name", "muon"), *MODERN.items(), *STILL)
STABLE = (("optimizer.name", "stable_adamw"), ("optimizer.averaging", "ema"), *STILL)
FREE = (("optimizer.name", "schedule_free"), ("optimizer.schedule", "constant"), *STILL)
LAMB = (("optimizer.name", "lamb"), ("objective.name", "clm"), ("model.scan_layers", False), *STILL)


@pytest.mark.parametrize(
    ("mesh", "overrides"),
    [
        pytest.param((8, 1, 1), BERT, marks=pytest.mark.full),
        pytest.param((2, 2, 2), BERT, marks=pytest.mark.quick),
        pytest.param((1, 8, 1), MUON, marks=pytest.mark.full),
        ((2, 2, 2), MUON),
        ((1, 2, 4), LAMB),
        ((2, 4, 1), STABLE),
        ((2, 2, 2), FREE),
    ],
    ids=["data-bert", "all-bert", "fsdp-muon", "all-muon", "tensor-lamb-clm", "fsdp-stable-ema", "all-free"],
)
def test_every_mesh_trains_as_one_device(mesh, overrides):
    expected, state = train((1, 1, 1), overrides)
    got, sharded = train(mesh, overrides)
    for a, b in zip(expected, got, strict=True):
        assert a == pytest.approx(b, rel=2e-5, abs=1e-6)
    # Adam divides by the root of squares near 0 in the first steps, which enlarges rounding.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-3), state.params, sharded.params)
    both = evaluated((1, 1, 1), overrides), evaluated(mesh, overrides)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3), *both)
    if (average := sharded.average) is not None:
        assert specs(average) == specs(sharded.params), "the average is split like the parameters"
        assert any((a != b).any() for a, b in zip(*map(jax.tree.leaves, (average, sharded.params)), strict=True))


@pytest.mark.parametrize(("mesh", "microbatches"), [((1, 1, 1), 4), ((2, 2, 2), 2)], ids=str)
def test_accumulation_over_unequal_microbatches_equals_the_whole_batch(mesh, microbatches):
    assert len({int((host_batch(0)["tokens"][m::microbatches] > 4).sum()) for m in range(microbatches)}) > 1
    accumulated, _ = train(mesh, (("train.gradient_accumulation_steps", microbatches),))
    for a, b in zip(train(mesh)[0], accumulated, strict=True):
        assert a == pytest.approx(b, rel=2e-5, abs=1e-6)


CLM = (("objective.name", "clm"), ("objective.z_loss", 0.1))


@pytest.mark.parametrize(
    ("mesh", "chunks", "overrides"),
    [((1, 1, 1), 2, BERT), ((2, 2, 2), 3, CLM), ((1, 1, 1), 4, (*CLM, ("train.gradient_accumulation_steps", 2)))],
    ids=["mlm", "clm-all", "clm-gradient_accumulation_steps"],
)
def test_logits_in_chunks_train_as_all_at_once(mesh, chunks, overrides):
    """Also where the number of prediction slots, here 31 and 5, is no multiple of the chunks."""
    in_chunks = (*overrides, ("train.logits_chunks", chunks))
    for a, b in zip(train(mesh, overrides)[0], train(mesh, in_chunks)[0], strict=True):
        assert a == pytest.approx(b, rel=2e-5, abs=1e-6)
    both = evaluated(mesh, overrides), evaluated(mesh, in_chunks)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), *both)


def test_one_chunk_of_logits_is_in_memory_at_a_time():
    """With a vocabulary of 8,000, the logits of 16 rows of 31 predictions take 16 MB."""
    used = []
    for chunks in (1, 8):
        config = make_config((1, 1, 1), (*CLM, ("train.logits_chunks", chunks)))
        mesh = make_mesh(config.mesh, jax.devices()[:1])
        with jax.set_mesh(mesh):
            training = build_training(config, 8000, mesh)
            batch = abstract_batch(B, L, mesh)
            compiled = training.step.lower(training.abstract, batch, vocabulary(8000)).compile()
        used.append(compiled.memory_analysis().temp_size_in_bytes)
    assert used[1] < 0.4 * used[0]


REPRODUCIBLE = (("train.reproducible", True), ("optimizer.spike_action", "clip"), ("optimizer.spike_threshold", 0.5))


@pytest.mark.parametrize(
    ("overrides", "meshes"),
    [
        (BERT, ((8, 1, 1), (2, 4, 1))),
        ((*MUON, ("optimizer.averaging", "lawa"), ("optimizer.lawa_every", 2)), ((2, 4, 1),)),
        (FREE, ((2, 4, 1),)),
    ],
    ids=["bert", "muon-lawa", "free"],
)
def test_a_reproducible_run_has_the_same_bits_on_every_mesh(overrides, meshes):
    overrides, plainly = (*overrides, *REPRODUCIBLE), overrides
    expected, state = train((1, 1, 1), overrides, 5)
    plain, _ = train((1, 1, 1), plainly)
    assert [m["loss"] for m in expected[:3]] == pytest.approx([m["loss"] for m in plain], rel=1e-5)
    for mesh in meshes:
        got, other = train(mesh, overrides, 5)
        assert got == expected
        jax.tree.map(np.testing.assert_array_equal, *jax.device_get((state, other)))
        both = evaluated((1, 1, 1), overrides, 5), evaluated(mesh, overrides, 5)
        jax.tree.map(np.testing.assert_array_equal, *both)


def test_a_reproducible_model_is_evaluated_on_any_number_of_devices():
    """On more devices than groups the output is the same up to rounding."""
    config = make_config((8, 1, 1), (("train.reproducible", True), ("train.batch_groups", 2)))
    outputs = []
    for devices in (2, 8):
        mesh = make_mesh(MeshConfig(-1, 1, 1), jax.devices()[:devices])
        with jax.set_mesh(mesh):
            training = build_training(config, V, mesh)
            batch = shard_batch(host_batch(0), mesh)
            outputs.append(jax.device_get(training.forward.evaluate(training.init().params, batch, vocabulary())[0]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), *outputs)


def test_any_process_can_stop_all():
    _, mesh, training = built((8, 1, 1))
    with jax.set_mesh(mesh):
        batch = shard_batch(host_batch(0), mesh)
        for wish in (False, True):
            batch["stop"] = jax.device_put(np.arange(B) // 2 == (5 if wish else -1), batch["stop"].sharding)
            assert training.forward.evaluate(training.init().params, batch, vocabulary())[1] == wish
            assert training.step(training.init(), batch, vocabulary())[1]["stop"] == wish


@functools.cache
def z_loss_as_defined() -> dict[str, float]:
    """Half the mean of (log Z)², by JAX's logsumexp, beside the cross-entropy, and the norm of the gradient of both."""
    config, mesh, training = built((1, 1, 1))
    with jax.set_mesh(mesh):
        slots = max_predictions_per_row(config.objective, L, 0.15)
        batch, key = shard_batch(host_batch(0), mesh), run_key(config, "mask")
        t = make_targets(config.objective, batch, key, vocabulary(), masking.rates(config.objective, 0.15), slots)

        def loss(params):
            context = t.segment_ids_BL, t.positions_BL
            scores = training.forward.model.apply(params, t.inputs_BL, *context, predict_BK=t.predict_BK)
            entropy = -(jax.nn.log_softmax(scores) * jax.nn.one_hot(t.labels_BK, scores.shape[-1])).sum(-1)
            squared = jnp.square(jax.nn.logsumexp(scores, axis=-1))
            entropy, z_loss = ((x * t.weights_BK).sum() / t.weights_BK.sum() for x in (entropy, 0.5 * squared))
            return entropy + z_loss, {"loss": entropy, "z_loss": z_loss}

        grads, means = jax.jit(jax.grad(loss, has_aux=True))(training.init().params)
        return {name: float(x) for name, x in {**means, "grad_norm": optimizer.global_norm(grads)}.items()}


@pytest.mark.parametrize(
    ("mesh", "way"),
    [
        ((2, 1, 2), ()),
        ((1, 1, 1), (("train.gradient_accumulation_steps", 4),)),
        ((2, 1, 1), (("train.reproducible", True),)),
    ],
    ids=["tensor", "gradient_accumulation_steps", "reproducible"],
)
def test_z_loss_is_trained_on_and_reported_separately(mesh, way):
    (metrics,), _ = train(mesh, (("objective.z_loss", 0.5), *STILL, *way), 1)
    expected = z_loss_as_defined()
    assert expected["z_loss"] > 5
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("action", ["none", "clip", "skip"])
def test_a_spike_is_ignored_clipped_or_skipped(action):
    """The statistics given make every gradient a spike."""
    averaging = (("optimizer.averaging", "ema"),) if action == "skip" else ()
    config = make_config((1, 1, 1), (("optimizer.spike_action", action), ("optimizer.max_grad_norm", 0.0), *averaging))
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    with jax.set_mesh(mesh):
        training = build_training(config, V, mesh)
        start = training.init()
        old = jax.device_get(start.params)
        before = spikes.Running(jnp.int32(100), jnp.array([4.6, 0.01]), jnp.array([1.0, 1e-6]))
        batch = shard_batch(host_batch(0), mesh)
        state, metrics = training.step(start._replace(running=before), batch, vocabulary())
        _, calm = training.step(training.init(), batch, vocabulary())
    assert metrics["spike"]
    assert not calm["spike"]
    assert metrics["grad_norm"] == calm["grad_norm"]
    pairs = zip(jax.tree.leaves(old), jax.tree.leaves(jax.device_get(state.params)), strict=True)
    changed = any((a != b).any() for a, b in pairs)
    assert changed == (action != "skip")
    assert int(metrics["skipped"]) == (action == "skip")
    if averaging:
        jax.tree.map(np.testing.assert_array_equal, old, jax.device_get(state.average))
    z = (metrics["grad_norm"] - 0.01) / 1e-3
    expected = {"none": metrics["grad_norm"], "clip": 0.01 + 4.0**2 / z * 1e-3, "skip": 0.0}[action]
    assert norm_of_moment(state) == pytest.approx(0.1 * float(expected), rel=1e-3)
    counted = 4.0**2 / z if action == "clip" else 4.0  # deviations from the mean
    assert state.running.mean_2[1] == pytest.approx(0.01 + 0.03 * float(counted) * 1e-3, rel=1e-3)


def norm_of_moment(state: TrainState) -> float:
    """Of Adam's first moment, all parameters together; after one step (1 - beta1) times that of the gradient used."""
    adam = [x for x in jax.tree.leaves(state.opt_state, is_leaf=has_mu) if has_mu(x)]
    return max(float(optimizer.global_norm(x.mu)) for x in adam)


def has_mu(x) -> bool:
    return hasattr(x, "mu")


def test_the_gradient_is_clipped_by_its_global_norm():
    config = make_config((1, 1, 1), (("optimizer.max_grad_norm", 0.05),))
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    with jax.set_mesh(mesh):
        training = build_training(config, V, mesh)
        state, metrics = training.step(training.init(), shard_batch(host_batch(0), mesh), vocabulary())
    assert metrics["grad_norm"] > 0.1, "the logged norm is not clipped"
    assert norm_of_moment(state) == pytest.approx(0.1 * 0.05, rel=1e-3)


def specs(tree) -> dict[str, P]:
    return {jax.tree_util.keystr(path): x.sharding.spec for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def test_the_head_is_trained_alone_at_first_and_faster():
    both = (("optimizer.head_first_steps", 2), ("optimizer.head_rate_factor", 3.0), *STILL)
    _, mesh, training = built((1, 1, 1), both)
    with jax.set_mesh(mesh):
        start = training.init().params
    first, second, third = (train((1, 1, 1), both, n)[1].params for n in (1, 2, 3))
    usual = train((1, 1, 1), STILL, 1)[1].params
    for name in ("decoder_bias", "dense"):
        a, b, c = (jax.tree.leaves(params["head"][name])[0] for params in (start, usual, first))
        np.testing.assert_allclose(c - a, 3.0 * (b - a), rtol=1e-4, atol=1e-7)
    jax.tree.map(np.testing.assert_array_equal, start["encoder"], second["encoder"])
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), second["encoder"], third["encoder"])
    assert all(jax.tree.leaves(moved))


def test_every_leaf_is_split_as_its_dimensions_say():
    _, state = train((2, 2, 2))
    params = specs(state.params)
    assert params["['encoder']['embeddings']['token']"] == P("tensor", "fsdp")
    assert params["['encoder']['embeddings']['position']"] == P(None, "fsdp")
    assert params["['encoder']['layers']['qkv']['kernel']"] == P(None, "fsdp", None, "tensor", None)
    assert params["['encoder']['layers']['qkv']['bias']"] == P(None, None, "tensor", None)
    assert params["['encoder']['layers']['attention_out']['kernel']"] == P(None, "tensor", None, "fsdp")
    assert params["['encoder']['layers']['mlp_in']['kernel']"] == P(None, "fsdp", "tensor")
    assert params["['encoder']['layers']['mlp_out']['kernel']"] == P(None, "tensor", "fsdp")
    assert params["['head']['dense']['kernel']"] == P("fsdp", None)
    split = {name for name, spec in params.items() if any(spec)}
    assert {n.rsplit("'", 2)[1] for n in params.keys() - split} <= {"bias", "scale", "decoder_bias"}
    # Adam's moments inherit their parameter's spec: nothing is silently replicated.
    for moment in ("mu", "nu"):
        moments = {k.split(f".{moment}")[1]: v for k, v in specs(state.opt_state).items() if f".{moment}" in k}
        assert moments == params


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_gathered_layers_are_not_kept_for_the_backward_pass(remat):
    config = make_config((2, 4, 1), (("model.remat", remat),))
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        training = build_training(config, V, mesh)
        rows = abstract_batch(B, L, mesh)["tokens"]

        def loss(params, tokens):
            return training.forward.model.apply(params, tokens, tokens, tokens, predict_BK=tokens).sum()

        both = jax.make_jaxpr(lambda params, tokens: jax.vjp(lambda p: loss(p, tokens), params))
        kept = [x.aval for x in both(training.abstract.params, rows).jaxpr.outvars if hasattr(x, "aval")]
    gathered = [x.shape for x in kept if x.sharding.spec.reduced]
    assert gathered == [(32, 32), (104, 32)]  # of the head, which has one of each; nothing of the 3 layers


def test_metrics_count_real_tokens_and_predictions():
    (first, *_), _ = train((1, 1, 1))
    tokens = host_batch(0)["tokens"]
    maskable = (tokens > 4).sum(1)
    assert first["tokens"] == (tokens > 0).sum()
    assert first["predicted_tokens"] == np.maximum(1, np.floor(0.15 * maskable + 0.5)).sum()
    np.testing.assert_array_equal(
        evaluated((1, 1, 1)).weights_BK.sum(1), np.maximum(1, np.floor(0.15 * maskable + 0.5))
    )
    assert first["loss"] == pytest.approx(np.log(V), abs=0.3)
    assert first["mask_rate"] == pytest.approx(0.15)


def test_the_mask_rate_moves_over_the_run():
    moving = (("train.phases", "0%: objective.mask_rate->0.6"), ("train.steps", 3))
    history, _ = train((1, 1, 1), moving)
    assert [h["mask_rate"] for h in history] == pytest.approx([0.15, 0.3, 0.45])
    assert history[2]["predicted_tokens"] > 2.5 * history[0]["predicted_tokens"]


@pytest.mark.parametrize("crosses", [False, True])
def test_documents_of_a_row_see_each_other_only_with_attend_across_documents(crosses):
    config = make_config((1, 1, 1), (("objective.name", "clm"), ("objective.attend_across_documents", crosses)))
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    batch, other = host_batch(0), host_batch(0)
    other["tokens"][:, 1:15] = host_batch(1)["tokens"][:, 1:15]  # another first document, of the same length
    with jax.set_mesh(mesh):
        training = build_training(config, V, mesh)
        params = training.init().params
        a, b = (training.forward.evaluate(params, shard_batch(rows, mesh), vocabulary())[0] for rows in (batch, other))
    second = slice(16, L - 4)  # what is predicted in the second document, which is the same
    assert (a.labels_BK[:-1, second] == b.labels_BK[:-1, second]).all()
    assert a.weights_BK[:-1, second].all()
    same = a.scored.loss_BK[:-1, second] == b.scored.loss_BK[:-1, second]
    assert not same.any() if crosses else same.all()
    assert a.positions_BK[0, 16] == (17 if crosses else 1)


def test_a_batch_with_nothing_to_predict_gives_no_nan():
    _, mesh, training = built((1, 1, 1), (("optimizer.weight_decay", 0.0),))
    batch = host_batch(0)
    batch["tokens"][:] = 0
    with jax.set_mesh(mesh):
        state = training.init()
        before = jax.device_get(state.params)
        state, metrics = training.step(state, shard_batch(batch, mesh), vocabulary())
        assert float(metrics["loss"]) == 0.0
        assert int(metrics["skipped"]) == 0
        jax.tree.map(np.testing.assert_array_equal, before, jax.device_get(state.params))


def test_the_step_is_compiled_once():
    _, mesh, training = built((2, 2, 2))
    with jax.set_mesh(mesh):
        state = training.init()
        for i in range(3):
            state, _ = training.step(state, shard_batch(host_batch(i), mesh), vocabulary())
            jax.block_until_ready(state)
        assert training.step._cache_size() == 1
        same = jax.tree.map(lambda a, x: a.sharding.spec == x.sharding.spec, training.abstract, state)
        assert all(jax.tree.leaves(same))


@pytest.mark.parametrize("shape", [pytest.param((1, 1, 1), marks=pytest.mark.full), (4, 1, 1)], ids=str)
def test_nothing_is_gathered_or_scattered_where_parameters_are_whole(shape):
    _, mesh, training = built(shape)
    with jax.set_mesh(mesh):
        lowered = training.step.lower(training.abstract, abstract_batch(B, L, mesh), vocabulary())
        text = lowered.compile().as_text()
    assert "reduce-scatter" not in text
    assert "all-gather" not in text
