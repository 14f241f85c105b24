"""Replaced-token detection: sampling, losses, gradients, and whole runs."""

import dataclasses
import functools
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_mlm.config import phases
from flax_mlm.config.load import build
from flax_mlm.config.schema import MeshConfig
from flax_mlm.configs import electra_small
from flax_mlm.data import corpus as corpus_lib
from flax_mlm.distributed.batches import shard_batch
from flax_mlm.distributed.mesh import make_mesh
from flax_mlm.errors import UserError
from flax_mlm.evaluation import rtd
from flax_mlm.inference.config import read_config
from flax_mlm.inference.forward import build_forward
from flax_mlm.inference.load import load_model
from flax_mlm.model import electra, flops
from flax_mlm.objectives import masking
from flax_mlm.objectives.losses import corrupt, replaced_token_detection, sample_tokens
from flax_mlm.objectives.rows import row_keys, run_key
from flax_mlm.objectives.targets import Targets, make_targets, max_predictions_per_row
from flax_mlm.training import metrics
from tests.helpers.hf_folders import started
from tests.helpers.runs import assert_same_run, finish, metrics_of
from tests.helpers.steps import MODERN, STILL, V, evaluated, host_batch, make_config, vocabulary
from tests.helpers.steps import train as train_steps

SHARINGS = ("none", "shared", "gradient_disentangled")
RTD = (("objective.name", "rtd"), ("objective.generator_size", 0.5), ("model.num_layers", 2))


def sharing(name: str) -> tuple:
    return (*RTD, ("objective.embedding_sharing", name))


SHARED = sharing("shared")
NARROW = (("optimizer.name", "lamb"), ("model.embedding_size", 16))

# Sampling


def test_tokens_are_sampled_with_the_generators_probabilities():
    size, samples = 7, 40_000
    logits_V = jnp.array([0.0, 1.0, 2.0, -1.0, 0.5, 30.0, 30.0])  # the last two belong to no token
    with jax.set_mesh(make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])):
        logits_BKV = jnp.broadcast_to(logits_V, (4, samples // 4, size))
        keys_B = jax.random.split(jax.random.key(0), 4)
        sampled = np.asarray(sample_tokens(logits_BKV, keys_B, 5))
        one = sample_tokens(logits_BKV[2:3], keys_B[2:3], 5)
    counts = np.bincount(sampled.ravel(), minlength=size)
    expected = samples * np.append(np.asarray(jax.nn.softmax(logits_V[:5])), [0, 0])
    assert counts[5:].sum() == 0
    chi_squared = (np.square(counts - expected)[:5] / expected[:5]).sum()
    assert chi_squared < 18.5, "0.999 of chi-squared with 4 degrees of freedom"
    np.testing.assert_array_equal(one[0], sampled[2], "a row's samples depend on its key alone")
    assert not np.array_equal(sampled[0], sampled[1])


def test_only_other_tokens_count_as_replaced():
    """Row 0: one prediction slot with the original, one with another token, one not in use (its position is 0)."""
    t = Targets(
        inputs_BL=jnp.array([[2, 4, 11, 4, 3], [2, 12, 4, 3, 0]]),
        segment_ids_BL=jnp.ones((2, 5), jnp.int32),
        positions_BL=jnp.zeros((2, 5), jnp.int32),
        predict_BK=jnp.array([[1, 3, 0], [2, 0, 0]]),
        labels_BK=jnp.array([[10, 12, 0], [13, 0, 0]]),
        weights_BK=jnp.array([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]]),
    )
    corrupted, replaced = corrupt(t, jnp.array([[10, 20, 99], [21, 99, 99]]))
    assert corrupted.tolist() == [[2, 10, 11, 20, 3], [2, 12, 21, 3, 0]]
    assert replaced.tolist() == [[0, 0, 0, 1, 0], [0, 0, 1, 0, 0]]


# The loss


@functools.cache
def built(name: str):
    """Functions of the parameters, parameters (none of them 0) and targets, on one device, without dropout."""
    config = make_config((1, 1, 1), (*sharing(name), *STILL))
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    with jax.set_mesh(mesh):
        forward = build_forward(config, V, mesh)
        noise = np.random.default_rng(0)
        params = jax.tree.map(
            lambda x: x + noise.normal(0, 0.02, x.shape).astype(np.float32), jax.device_get(forward.init())
        )
        slots, rates = (
            max_predictions_per_row(config.objective, 32, 0.15),
            masking.rates(config.objective, 0.15),
        )
        targets = jax.jit(
            lambda rows: make_targets(config.objective, rows, run_key(config, "mask"), vocabulary(), rates, slots)
        )(shard_batch(host_batch(0), mesh))
    return config, mesh, forward, params, targets


@functools.cache
def gradient_of(name: str):
    """Jitted: (parameters, weight of the discriminator) -> loss and gradient."""
    config, _, _, _, t = built(name)
    networks = electra.networks(config, V)

    def loss(params, weight):
        objective_config = dataclasses.replace(config.objective, discriminator_weight=weight)
        made = replaced_token_detection(*networks, V, objective_config)
        return made.total(made.predict(params, t, None), made.counts(t))[0]

    return jax.jit(jax.value_and_grad(loss))


def loss_and_gradient(name: str, weight: float, params=None):
    _, mesh, _, own, _ = built(name)
    with jax.set_mesh(mesh):
        return jax.device_get(gradient_of(name)(own if params is None else params, jnp.float32(weight)))


def test_the_loss_is_the_one_of_the_paper():
    """Computed in NumPy from the logits of both networks, over all tokens but special ones."""
    config, mesh, forward, params, t = built("none")
    generator, discriminator = electra.networks(config, V)
    context = t.segment_ids_BL, t.positions_BL
    with jax.set_mesh(mesh):

        @jax.jit
        def run(params):
            logits_BKV = generator.apply(params, t.inputs_BL, *context, predict_BK=t.predict_BK)
            corrupted_BL, _ = corrupt(t, sample_tokens(logits_BKV, t.sample_keys_B, V))
            losses = forward.loss.predict(params, t, None)
            x_BL = discriminator.logits(params, discriminator.encode(params, corrupted_BL, *context))
            return losses, forward.loss.total(losses, forward.loss.counts(t)), logits_BKV, corrupted_BL, x_BL

        losses, (loss, means), logits_BKV, corrupted_BL, x_BL = jax.device_get(run(params))
    x_BL = x_BL.astype(np.float64)
    original = host_batch(0)["tokens"]
    ordinary = original >= 5
    np.testing.assert_array_equal(losses.ordinary_BL > 0, ordinary)
    replaced = np.asarray(corrupted_BL) != original
    np.testing.assert_array_equal(losses.replaced_BL > 0, replaced)
    assert 0.5 * float(t.weights_BK.sum()) < replaced.sum() <= float(t.weights_BK.sum())
    assert not replaced[~ordinary].any()
    p_BL = 1 / (1 + np.exp(-x_BL))
    binary = -np.log(np.where(replaced, p_BL, 1 - p_BL))[ordinary].mean()
    log_p_BK = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits_BKV)), np.asarray(t.labels_BK)[..., None], 2)
    masked = -log_p_BK[..., 0][np.asarray(t.weights_BK) > 0].mean()
    assert float(loss) == pytest.approx(masked + 50 * binary, rel=1e-5)
    assert float(means["generator_loss"]) == pytest.approx(masked, rel=1e-5)
    assert float(means["discriminator_loss"]) == pytest.approx(binary, rel=1e-5)
    assert float(means["accuracy"]) == pytest.approx(((x_BL > 0) == replaced)[ordinary].mean(), rel=1e-6)
    assert float(means["replaced"]) == pytest.approx(replaced[ordinary].mean(), rel=1e-6)


@pytest.mark.parametrize("name", ["none", "gradient_disentangled"])
def test_no_gradient_of_the_discriminator_reaches_the_generator(name):
    _, light = loss_and_gradient(name, 0.0)
    _, heavy = loss_and_gradient(name, 50.0)
    jax.tree.map(np.testing.assert_array_equal, light["generator"], heavy["generator"])
    assert min(np.abs(x).max() for x in jax.tree.leaves(light["generator"])) > 0
    for table in ("token", "position"):
        assert (
            np.abs(heavy["encoder"]["embeddings"][table]).max()
            > 100 * np.abs(light["encoder"]["embeddings"][table]).max()
        )


def test_shared_embeddings_get_the_sum_of_both_gradients():
    _, mesh, _, params, _ = built("shared")
    with jax.set_mesh(mesh):
        apart = jax.device_get(electra.untied(params, "shared"))
    loss, both = loss_and_gradient("shared", 3.0)
    same, each = loss_and_gradient("none", 3.0, apart)
    assert loss == pytest.approx(same, rel=1e-6)
    assert "token" not in both["generator"]["encoder"]["embeddings"]
    for table in ("token", "position"):
        first, second = (tree["encoder"]["embeddings"][table] for tree in (each, each["generator"]))
        assert np.abs(second).max() > 0
        np.testing.assert_allclose(both["encoder"]["embeddings"][table], first + second, rtol=1e-4, atol=1e-6)


def test_disentangled_embeddings_begin_as_the_generators():
    _, mesh, forward, changed, t = built("gradient_disentangled")
    with jax.set_mesh(mesh):
        fresh = jax.device_get(forward.init())
        assert not np.asarray(fresh["encoder"]["embeddings"]["token"]).any()
        for params in (fresh, changed):
            apart = jax.device_get(electra.untied(jax.tree.map(jnp.asarray, params), "gradient_disentangled"))
            tables = [tree["encoder"]["embeddings"]["token"] for tree in (apart, apart["generator"])]
            assert np.array_equal(*tables) == (params is fresh)
            models = ((forward, params), (built("none")[2], apart))
            got, same = (jax.jit(s.loss.predict, static_argnums=2)(p, t, None).loss_BL for s, p in models)
            np.testing.assert_allclose(got, same, rtol=1e-6, atol=1e-6)


def test_sample_keys_depend_on_the_row_and_not_on_the_mask_rate():
    config, mesh, *_ = built("none")
    with jax.set_mesh(mesh):
        rows = shard_batch(host_batch(0), mesh)
        o, key = config.objective, jax.random.key(0)
        keys = jax.jit(lambda rate: make_targets(o, rows, key, vocabulary(), masking.rates(o, rate), 8))
        first, second = (keys(rate).sample_keys_B for rate in (0.15, 0.3))
        masks = row_keys(jax.random.key(0), host_batch(0)["row_ids"])
    data = [np.asarray(jax.random.key_data(keys)) for keys in (first, second, masks)]
    np.testing.assert_array_equal(data[0], data[1])
    assert len({tuple(row) for keys in data[1:] for row in keys}) == 2 * len(masks)


# Meshes


@pytest.mark.parametrize(
    ("mesh", "overrides"),
    [
        ((2, 2, 2), SHARED),
        ((2, 2, 2), (*sharing("gradient_disentangled"), ("optimizer.name", "muon"), *MODERN.items(), *STILL)),
        pytest.param((1, 4, 2), (*sharing("gradient_disentangled"), *NARROW, *STILL), marks=pytest.mark.full),
    ],
    ids=["shared", "muon", "lamb"],
)
def test_every_mesh_trains_as_one_device(mesh, overrides):
    expected, state = train_steps((1, 1, 1), overrides)
    got, sharded = train_steps(mesh, overrides)
    for a, b in zip(expected, got, strict=True):
        assert a == pytest.approx(b, rel=5e-5, abs=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-3), state.params, sharded.params)
    both = evaluated((1, 1, 1), overrides), evaluated(mesh, overrides)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=1e-5), *both)


@pytest.mark.parametrize(
    "changes",
    [
        (("train.gradient_accumulation_steps", 4),),
        pytest.param((("model.scan_layers", False), ("model.remat", "dots")), marks=pytest.mark.full),
    ],
    ids=["gradient_accumulation_steps", "unrolled"],
)
def test_accumulated_or_unrolled_steps_train_alike(changes):
    expected = train_steps((1, 1, 1), SHARED)[0]
    for a, b in zip(expected, train_steps((1, 1, 1), (*SHARED, *changes))[0], strict=True):
        assert a == pytest.approx(b, rel=5e-5, abs=1e-5)


def test_a_reproducible_run_has_the_same_bits_on_every_mesh():
    overrides = (*sharing("gradient_disentangled"), *STILL, ("train.reproducible", True))
    expected, state = train_steps((1, 1, 1), overrides)
    got, other = train_steps((2, 4, 1), overrides)
    assert got == expected
    jax.tree.map(np.testing.assert_array_equal, *jax.device_get((state, other)))
    both = evaluated((1, 1, 1), overrides), evaluated((2, 4, 1), overrides)
    jax.tree.map(np.testing.assert_array_equal, *both)


def test_flops_are_those_of_generator_and_discriminator():
    """ELECTRA-small: 12 layers of 256 and 12 of 64 over L tokens, and the vocabulary at 19 of them."""
    config = build(electra_small.get_config())
    length, predictions, vocab = 128, 19, 30_592
    encoder, generator = 12 * (4 * 256**2 + 2 * 256 * 1024) + 128 * 256, 12 * (4 * 64**2 + 2 * 64 * 256) + 128 * 64
    expected = 6 * (encoder + generator + 256**2 + 256) * length + 12 * 12 * (256 + 64) * length**2
    expected += 6 * predictions * (64 * 128 + 128 * vocab)
    assert flops.per_row_of_rtd(config, predictions, vocab) == pytest.approx(expected)
    params = jax.eval_shape(electra.discriminator(config.model, 30_522).init, jax.random.key(0))
    padding = 70 * 128  # rows that round the vocabulary up
    assert sum(x.size for x in jax.tree.leaves(params)) - padding == 13_549_057, "as published"


# The config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective.generator_size": 0.3}, "objective.generator_size is 0.3; expected a fraction"),
        ({"objective.generator_size": 0.1}, "a whole number of heads, such as 0.25"),
        ({"objective.generator_size": 0.25, "mesh.tensor": 2}, "number of heads, 1, to be divisible by mesh.tensor, 2"),
        ({"objective.generator_size": 0.25, "mesh.fsdp": 16}, "hidden size, 8, to be divisible by mesh.fsdp, 16"),
        ({"model.embedding_size": 32}, "model.embedding_size is 32"),
        ({"train.cloze_every": 10}, "rtd encoders cannot fill masks; set train.cloze_every=0"),
        ({"train.logits_chunks": 2}, "train.logits_chunks is 2"),
        ({"init_from": "somewhere"}, "objective.name=rtd cannot start from init_from"),
        ({"objective.name": "mlm", "train.phases": "50%: objective.name=rtd"}, "objective.name from mlm to rtd"),
        ({"train.phases": "50%: objective.name=clm"}, "objective.name from rtd to clm"),
        ({"train.phases": "50%: objective.generator_size=0.25"}, "objective.generator_size from 0.5 to 0.25"),
    ],
)
def test_invalid_settings_of_the_generator_are_refused(changes, message):
    with pytest.raises(UserError, match=message.replace(".", r"\.")) as e:
        make_config((1, 1, 1), (*RTD, *changes.items()))
    assert "\n" not in str(e.value)


def test_a_phase_may_change_what_no_parameter_depends_on():
    both = phases.parse_phases(make_config((1, 1, 1), (*RTD, ("train.phases", "50%: objective.mask_rate=0.3"))))
    assert [phase.config.objective.mask_rate for phase in both] == [0.15, 0.3]


def test_shape_of_a_generator_of_a_third():
    base = (*RTD, ("model.num_heads", 12), ("model.hidden_size", 768), ("model.intermediate_size", 3072))
    size = (("objective.generator_size", 0.3333), ("objective.generator_depth", 0.5))
    g = make_config((1, 1, 1), (*base, *size)).generator
    assert (g.hidden_size, g.num_heads, g.intermediate_size, g.num_layers, g.embedding_size) == (256, 4, 1024, 1, 768)


# Whole runs

RUN = {
    "objective__name": "rtd", "objective__generator_size": 0.5, "model__position_embedding": "learned",
    "model__norm_position": "post", "model__embedding_size": 16, "optimizer__name": "adamw",
    "optimizer__learning_rate": 3e-3, "train__steps": 120, "train__checkpoint_every": 40, "train__keep_period": 40,
}  # fmt: skip


@pytest.fixture(scope="module")
def rtd_run(toy) -> Path:
    workdir = toy.folder / "rtd"
    out = finish(toy, workdir, *toy.flags(**RUN))
    (toy.folder / "rtd.log").write_text(out)
    return workdir


def test_a_run_learns_and_prints_both_losses(toy, rtd_run):
    log = (toy.folder / "rtd.log").read_text()
    assert "held-out replaced-token loss" in log
    assert "generator's masked-token loss" in log
    assert "generator " in log
    assert "fill_mask" not in log
    lines = metrics_of(rtd_run)
    early, late = (
        {name: np.mean([line[name] for line in window]) for name in ("loss", "generator_loss", "discriminator_loss")}
        for window in (lines[:10], lines[-10:])
    )
    assert late["generator_loss"] < 0.6 * early["generator_loss"]
    assert late["discriminator_loss"] < 0.6 * early["discriminator_loss"]
    assert late["loss"] < 0.6 * early["loss"]
    result = json.loads((rtd_run / "result.json").read_text())
    assert result["loss"] < 0.8 * result["replaced_entropy"]
    assert result["accuracy"] > result["majority_accuracy"]
    replaced = result["replaced"]
    overall = replaced * result["recall_replaced"] + (1 - replaced) * result["recall_original"]
    assert overall == pytest.approx(result["accuracy"])
    assert 0.2 < result["recall_replaced"] < 1


def test_a_resumed_run_ends_with_the_same_state(toy, rtd_run, tmp_path):
    workdir = shutil.copytree(rtd_run, tmp_path / "copy")
    for later in (80, 120):
        shutil.rmtree(workdir / "checkpoints" / str(later))
    assert "restored step 40" in finish(toy, workdir, *toy.flags(**RUN))
    assert_same_run(workdir, rtd_run, 120)


def test_evaluation_repeats_the_results_of_the_run(toy, rtd_run, tmp_path):
    """From a restored model, whose embeddings are merged, and in the table of compare."""
    file = tmp_path / "result.json"
    done = toy.run("evaluate", f"--checkpoint={rtd_run}", f"--json={file}", devices=2)
    assert done.returncode == 0, done.stderr
    result, own = json.loads(file.read_text()), json.loads((rtd_run / "result.json").read_text())
    for name, value in own.items():
        assert result[name] == pytest.approx(value, rel=1e-4), name
    assert sum(result["each_row"]["tokens"]) == result["tokens"]
    done = toy.run("compare", f"--checkpoints=a={rtd_run}@80,b={rtd_run}", "--tasks=mlm", f"--output={tmp_path / 'c'}")
    assert done.returncode == 0, done.stderr
    assert "replaced-token loss ↓" in done.stdout, done.stderr


def test_each_corpus_of_several_has_its_own_loss():
    """Two rows of one, one of another, none of a third, and one that only fills the batch."""
    tokens, loss, correct = np.array([[4.0, 6, 5, 0], [2, 1, 4, 0], [3, 5, 1, 0]])
    zero, one = np.zeros(4), np.ones(4)
    sums = {"tokens": tokens, "loss": loss, "correct": correct, "replaced": one, "detected": zero}
    sums |= {"masked": one, "generator_loss": one, "generator_correct": zero}
    result = rtd.summary(sums, {"a": 2, "b": 1, "c": 0})
    assert result["loss"] == 7 / 15
    assert result["accuracy"] == 9 / 15
    assert result["rows"] == 3
    shown = {key: value for key, value in result.items() if "/" in key and "stderr" not in key}
    assert shown == {
        "loss/a": 0.3, "accuracy/a": 0.8, "tokens/a": 10, "rows/a": 2,
        "loss/b": 0.8, "accuracy/b": 0.2, "tokens/b": 5, "rows/b": 1,
        "tokens/c": 0, "rows/c": 0,
    }  # fmt: skip
    assert rtd.table(result)[-3:] == [
        f"    a  loss 0.3000 ± {result['loss_stderr/a']:.4f}  accuracy 0.8000         10 tokens in 2 rows",
        "    b  loss 0.8000  accuracy 0.2000          5 tokens in 1 row",
        "    c  has no held-out tokens to predict",
    ]
    alone = rtd.summary(sums, {"": 3})
    assert not any("/" in key for key in alone)
    assert not any("by corpus" in line for line in rtd.table(alone))


def test_commands_that_need_a_vocabulary_head_refuse_the_encoder(toy, rtd_run):
    for command, arguments in {
        "fill_mask": ["The [MASK] barks."],
        "evaluate": ["--task=cloze"],
    }.items():
        done = toy.run(command, f"--checkpoint={rtd_run}", *arguments)
        assert done.returncode == 2, done
        assert done.stderr.startswith("error: objective.name is rtd")
        assert done.stderr.count("\n") == 1


def test_restoring_merges_the_embeddings(toy, rtd_run):
    config = build(read_config(str(rtd_run)))
    assert config.objective.embedding_sharing == "gradient_disentangled"
    model = load_model(str(rtd_run), dataclasses.replace(config, mesh=MeshConfig(1, 8, 1)))
    merged = np.asarray(model.params["encoder"]["embeddings"]["token"])
    base = np.asarray(model.params["generator"]["encoder"]["embeddings"]["token"])
    assert 0 < np.abs(merged - base).mean() < np.abs(base).mean()
    assert model.config.objective.embedding_sharing == "none"
    assert corpus_lib.Corpus.open(toy.corpus).vocab_size == model.tokenizer.vocab_size


def test_fine_tuning_and_embedding(toy, rtd_run, tmp_path):
    """Classifies texts by their animal; embeds texts with the encoder and after fine-tuning."""
    rows = [(f"The {animal} {does} today.", name) for name, (animal, does) in enumerate(toy.animals.items())] * 8
    table = tmp_path / "train.tsv"
    table.write_text("\n".join(["text\tlabel", *(f"{text}\tn{label}" for text, label in rows)]))
    settings = ["--config.finetune.seeds=1", "--config.finetune.learning_rates=3e-3", "--config.finetune.batch_size=8"]
    settings += ["--config.finetune.pooling=mean"]
    done = toy.run("evaluate", f"--checkpoint={rtd_run}", "--task=classification", f"--train={table}",
        f"--dev={table}", f"--test={table}", *settings, "--config.finetune.epochs=8",
        f"--json={tmp_path / 'c.json'}")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "c.json").read_text())["median"] > 0.6
    scored = tmp_path / "scored.tsv"
    lines = [f"{a}\t{b}\t{int(i == j)}" for a, i in rows[:6] for b, j in rows[:6]]
    scored.write_text("\n".join(["text\tpair\tlabel", *lines]))
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("\n".join(json.dumps({"query": text, "positive": text}) for text, _ in rows))
    done = toy.run("evaluate", f"--checkpoint={rtd_run}", "--task=retrieval", f"--train={pairs}", f"--test={scored}",
        "--text=text", "--pair=pair", "--label=label", *settings, "--config.finetune.epochs=1",
        "--config.model.dropout_rate=0.1", f"--save={tmp_path / 'search'}")  # fmt: skip
    assert done.returncode == 0, done.stderr
    (tmp_path / "texts.txt").write_text("\n".join(text for text, _ in rows[:6]))
    for checkpoint_path in (rtd_run, tmp_path / "search"):
        out = tmp_path / f"{checkpoint_path.name}.npy"
        done = toy.run("embed", f"--checkpoint={checkpoint_path}", f"--input={tmp_path / 'texts.txt'}",
            f"--output={out}")  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert np.load(out).shape == (6, 32)


def test_the_exported_folder_holds_the_discriminator(toy, rtd_run, tmp_path):
    from safetensors.numpy import load_file

    done = toy.run("export", f"--checkpoint={rtd_run}", f"--output={tmp_path / 'exported'}")
    assert done.returncode == 0, done.stderr
    settings = json.loads((tmp_path / "exported" / "config.json").read_text())
    assert (settings["model_type"], settings["architectures"]) == ("electra", ["ElectraForPreTraining"])
    assert settings["embedding_size"] == 16
    tensors = load_file(tmp_path / "exported" / "model.safetensors")
    assert tensors["discriminator_predictions.dense_prediction.weight"].shape == (1, 32)
    assert not any("generator" in name for name in tensors)
    config = build(read_config(str(rtd_run)))
    merged = load_model(str(rtd_run), dataclasses.replace(config, mesh=MeshConfig(8, 1, 1))).params
    table = tensors["electra.embeddings.word_embeddings.weight"]
    np.testing.assert_array_equal(table, merged["encoder"]["embeddings"]["token"])
    card = (tmp_path / "exported" / "README.md").read_text()
    assert "replaced-token detection" in card
    assert "recall of replaced tokens" in card
    assert "AutoModelForPreTraining" in card

    # Masked-language-model training can start from its encoder, with a new vocabulary head.
    _, _, state, log = started(tmp_path / "exported", reinit_head=True)
    jax.tree.map(np.testing.assert_array_equal, *jax.device_get((state.params["encoder"], merged["encoder"])))
    assert "    the vocabulary head is new" in log
    assert "discriminator_predictions" in "".join(log)


def test_the_line_of_a_step_has_both_losses():
    values = dict(loss=20.5, accuracy=0.9, generator_loss=5.5, discriminator_loss=0.3, learning_rate=1e-3, grad_norm=1)
    more = {"skipped": 0, "tokens_per_second": 1, "data_wait": 0, "eta_seconds": 1}
    line = metrics.fit(metrics.train_columns({**values, **more}))
    assert "loss 20.5000  generator 5.5000  discriminator 0.3000  accuracy 0.9000" in line
