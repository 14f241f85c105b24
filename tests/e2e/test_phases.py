"""The parts of a run: how they are written, what moves in them, and that one run walks through them and may be killed
anywhere."""

import contextlib
import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flax_mlm.checkpoint.store import saved_steps
from flax_mlm.config import phases
from flax_mlm.config.load import build
from flax_mlm.configs import base
from flax_mlm.data.mixture import DataCursor
from flax_mlm.data.stream import Stream
from flax_mlm.distributed.batches import shard_batch
from flax_mlm.distributed.mesh import make_mesh
from flax_mlm.errors import UserError
from flax_mlm.inference.config import read_config
from flax_mlm.objectives.masking import rates_at
from flax_mlm.optim import optimizer
from flax_mlm.training.state import start_phase
from flax_mlm.training.step import build_training
from tests.helpers.runs import assert_same_run, finish, metrics_of
from tests.helpers.steps import V, host_batch, make_config, vocabulary


def parts_of(text: str, **train) -> list[phases.Phase]:
    c = base.get_config()
    c.train.phases = text
    c.train.update({"steps": 1000, **train})
    return phases.parse_phases(build(c))


# The text


def test_what_is_not_mentioned_stays_and_what_has_moved_stays_where_it_came_to():
    parts = parts_of(
        "0%: objective.mask_rate=0.4->0.2, optimizer.weight_decay->0.1; 250: objective.name=clm; "
        "50%: objective.name=mlm, optimizer.learning_rate->1e-5; 7.5e2: train.global_batch_size=64"
    )
    assert [(p.begin, p.end, p.first_step, p.num_steps) for p in parts] == [
        (0.0, 0.25, 0, 250), (0.25, 0.5, 250, 250), (0.5, 0.75, 500, 250), (0.75, 1.0, 750, 250),
    ]  # fmt: skip
    assert [p.config.objective.name for p in parts] == ["mlm", "clm", "mlm", "mlm"]
    assert [p.config.objective.mask_rate for p in parts] == [0.4, 0.2, 0.2, 0.2]
    assert [p.config.optimizer.weight_decay for p in parts] == [0.01, 0.1, 0.1, 0.1]
    assert [p.config.train.global_batch_size for p in parts] == [256, 256, 256, 64]
    assert [p.value("optimizer.learning_rate", 0.5) for p in parts] == pytest.approx([5e-4, 5e-4, 2.55e-4, 1e-5])
    assert [p.largest_mask_rate for p in parts] == [0.4, 0.2, 0.2, 0.2]


def test_several_corpora_may_be_named():
    _, second = parts_of("50%: data.corpus=a:0.7,b:0.3, objective.mask_rate=0.2")
    assert second.config.data.folders() == {"a": "0.7", "b": "0.3"}
    assert second.config.objective.mask_rate == 0.2


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("model.rope_theta_global", 160_000.0),
        ("model.rope_theta_local", 160_000.0),
        ("model.sliding_window", 64),
        ("model.dropout_rate", 0.0),
        ("model.attention_dropout_rate", 0.0),
        ("model.attention", "xla"),
        ("model.remat", "full"),
        ("objective.masking", "span"),
        ("objective.z_loss", 1e-4),
        ("data.seq_len", 512),
        ("train.gradient_accumulation_steps", 4),
    ],
)
def test_what_may_change_at_once(path, value):
    section, name = path.split(".")
    values = [getattr(getattr(part.config, section), name) for part in parts_of(f"50%: {path}={value}")]
    assert values[1] == value != values[0]


@given(st.lists(st.integers(1, 999), unique=True, max_size=5), st.sampled_from(["steps", "tokens", "budget_minutes"]))
@settings(deadline=None)
def test_every_step_is_of_one_phase(starts, unit):
    starts = sorted(starts)
    text = "; ".join(f"{n}: train.global_batch_size={256 + i}" for i, n in enumerate(starts))
    parts = parts_of(text, **({} if unit == "steps" else {unit: 1000.0}))
    assert [p.begin for p in parts] == pytest.approx([0.0, *(n / 1000 for n in starts)])
    assert [p.end for p in parts] == [*(p.begin for p in parts[1:]), 1.0]
    if unit == "tokens":
        parts = phases.with_corpora(parts, [128] * len(parts), [0.001] * len(parts))  # of very long tokens
        assert parts[0].config.train.steps == sum(p.num_steps for p in parts) >= len(parts)
    if unit == "budget_minutes":
        assert all(p.num_steps is None for p in parts)
        numbers = [phases.index_at(parts, 0, share / 1000) for share in range(1000)]
        assert not phases.is_over(parts, 10**9, 0.999)
        assert phases.is_over(parts, 0, 1.0)
    else:
        total = parts[0].config.train.steps
        numbers = [phases.index_at(parts, n, 0.0) for n in range(total)]
        assert [numbers.count(i) for i in range(len(parts))] == [p.num_steps for p in parts]
        assert not phases.is_over(parts, total - 1, 0.0)
        assert phases.is_over(parts, total, 0.0)
    assert numbers == sorted(numbers)
    assert set(numbers) == set(range(len(parts)))


def test_tokens_become_steps_phase_by_phase():
    parts = parts_of("50%: train.global_batch_size=64; 75%: train.global_batch_size=32", tokens=1e6)
    found = phases.with_corpora(parts, [128, 128, 512], [100.0, 100.0, 400.0])
    assert [p.num_steps for p in found] == [round(5e5 / 25600), round(2.5e5 / 6400), round(2.5e5 / 12800)]
    assert [p.config.data.seq_len for p in found] == [128, 128, 512]
    assert {p.config.train.steps for p in found} == {sum(p.num_steps for p in found)}


def test_a_run_in_tokens_has_the_steps_that_its_average_takes():
    (part,) = parts_of("", tokens=1e6)
    enough = dataclasses.replace(part.config.optimizer, averaging="lawa", lawa_every=20, lawa_count=2)
    too_few = dataclasses.replace(enough, lawa_count=9)
    for changes, refused in ((enough, False), (too_few, True)):
        changed = part._replace(config=dataclasses.replace(part.config, optimizer=changes))
        with pytest.raises(UserError, match="exceeds the run length of") if refused else contextlib.nullcontext():
            phases.with_corpora([changed], [128], [100.0])


@pytest.mark.parametrize("tokens", [128 * 32 * 2.0**31, 1e15, 1e300])
def test_a_run_in_tokens_has_fewer_steps_than_a_32_bit_number(tokens):
    (part,) = parts_of("", tokens=tokens)
    rows = part.config.train.global_batch_size
    with pytest.raises(UserError, match=r"train\.tokens is .* expected less than 2\*\*31 steps"):
        phases.with_corpora([part], [128], [128 * 32 / rows])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("0%: optimizer.beta1=0.8->0.9", "'optimizer.beta1' cannot change within a run"),
        (
            "0%: data.seq_len=64->128",
            "'data.seq_len' cannot be interpolated with '->'; these can: objective.",
        ),
        ("0%: objective.mask_rate", "cannot parse 'objective.mask_rate'; expected field=value or field=a->b"),
        ("0%: objective.mask_rate=0.1->2", "objective.mask_rate is 2.0; expected a number in (0, 1]"),
        ("0%: objective.mask_rate->much", "objective.mask_rate is 'much'; expected a number"),
        ("50%: data.seq_len=1024", "data.seq_len is 1024, longer than model.max_positions, 512"),
        ("50%: data.corpus=x, data.seq_len=256", "data.seq_len comes from data.corpus; name a corpus"),
        ("50%: data.seq_len=256, data.corpus=x", "data.seq_len comes from data.corpus; name a corpus"),
        ("0%: objective.mask_rate=0.3, objective.mask_rate->0.1", "changes objective.mask_rate twice"),
        (
            "50%: objective.name=clm; 10%: objective.name=mlm",
            "begins at step 100; expected one between steps 500",
        ),
        (
            "0%: objective.mask_rate=0.1; 0%: objective.mask_rate=0.2",
            "begins at step 0; expected one between steps 0 and 1000",
        ),
        (
            "50%: train.global_batch_size=100, train.gradient_accumulation_steps=3",
            "expected a number divisible by train.gradient_accumulation_steps, 3",
        ),
        (
            "50%: objective.random_replace_prob->0.5",
            "objective.mask_replace_prob + objective.random_replace_prob is 1.3",
        ),
        ("1e400: objective.mask_rate=0.2", "begins at step inf; expected one between steps 0 and 1000"),
        ("50%: model.num_layers=6", "'model.num_layers' cannot change within a run"),
        ("50%: optimizer.learning_rate=0", "train.phases: 'optimizer.learning_rate=0': optimizer.learning_rate is 0.0"),
    ],
)
def test_what_cannot_be_is_refused(text, said):
    with pytest.raises(UserError) as e:
        parts_of(text)
    assert said in str(e.value)
    assert "\n" not in str(e.value)


def test_a_rate_may_end_at_nothing():
    assert parts_of("80%: optimizer.learning_rate->0")[1].value("optimizer.learning_rate", 1.0) == 0.0


@pytest.mark.parametrize(
    ("change", "train"),
    [
        ("optimizer.learning_rate->1e-5", {}),
        ("optimizer.learning_rate=1e-5", {}),
        ("train.global_batch_size=64", {"tokens": 1e6}),
        ("data.seq_len=64", {"tokens": 1e6}),
    ],
)
def test_the_average_of_schedule_free_bears_no_change_of_its_weights(change, train):
    def of(name: str) -> list[phases.Phase]:
        c = base.get_config()
        c.optimizer.update({"name": name, "schedule": "constant"})
        c.train.update({"phases": f"50%: {change}", **train})
        return phases.parse_phases(build(c))

    assert len(of("adamw")) == 2
    path = change.replace("->", "=").split("=")[0]
    with pytest.raises(UserError, match=f"changes {path}, which must stay the same with optimizer.name=schedule_free"):
        of("schedule_free")


def test_begins_as_shares_do_for_a_run_of_any_length():
    parts = parts_of("0: objective.mask_rate=0.3->0.2; 250: objective.name=clm; 62.5%: objective.name=mlm")
    short = parts_of(phases.in_fractions(parts), steps=80)
    assert [(p.begin, p.changes) for p in short] == [(p.begin, p.changes) for p in parts]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"tokens": 1e6, "budget_minutes": 5.0}, "train.tokens and train.budget_minutes are set; set only one length"),
        ({"tokens": -1.0}, "train.tokens is -1.0; expected a number at least 0"),
    ],
)
def test_a_run_has_one_length(fields, said):
    with pytest.raises(UserError) as e:
        parts_of("", **fields)
    assert said in str(e.value)


# The step


def test_what_moves_moves_in_the_step():
    """Each number as it should be in each of 10 steps, and the update that follows from them."""
    text = "0%: objective.mask_rate->0.3; 50%: optimizer.learning_rate=0.02->0.01, optimizer.weight_decay=0.5->0.0"
    changes = (("train.phases", text), ("optimizer.warmup_fraction", 0.0), ("optimizer.schedule", "constant"))
    config = make_config((1, 1, 1), changes)
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    parts, history = phases.parse_phases(config), []
    with jax.set_mesh(mesh):
        trainings = [build_training(part.config, V, mesh, part) for part in parts]
        state, rows = trainings[0].init(), shard_batch(host_batch(0), mesh)
        for i in range(10):
            number = phases.index_at(parts, i, 0.0)
            before = jax.device_get(state)
            state, values = trainings[number].step(state, rows, vocabulary())
            history.append({name: float(value) for name, value in values.items()})
            if i == 7:
                last = before, jax.device_get(state)
    assert [h["mask_rate"] for h in history] == pytest.approx([0.15, 0.18, 0.21, 0.24, 0.27, *[0.3] * 5])
    assert [h["learning_rate"] for h in history] == pytest.approx([0.01] * 5 + [0.02, 0.018, 0.016, 0.014, 0.012])
    assert [h["progress"] for h in history] == pytest.approx([0.1 * i for i in range(1, 11)])
    # What no gradient reaches, the second token type, is moved by weight decay alone: rate 0.016 × decay 0.3.
    before, after = (s.params["encoder"]["embeddings"]["token_type"][1] for s in last)
    np.testing.assert_allclose(after, before * (1 - 0.016 * 0.3), rtol=1e-5)


def test_replacements_move_too():
    shown = []
    for text in ("0%: objective.mask_replace_prob=1.0->0.0", ""):
        config = make_config(
            (1, 1, 1), (("train.phases", text), ("train.steps", 2), ("objective.random_replace_prob", 0.0))
        )
        part = phases.parse_phases(config)[0]
        for share in (0.0, 0.5, 1.0):
            shown.append(rates_at(part, share).mask_replace_prob)
    assert shown == [1.0, 0.5, 0.0, 0.8, 0.8, 0.8]


def test_the_clock_of_a_batch_moves_a_run_with_a_budget():
    config = make_config((1, 1, 1), (("train.budget_minutes", 1.0), ("optimizer.schedule", "linear")))
    mesh, history = make_mesh(config.mesh, jax.devices()[:1]), []
    with jax.set_mesh(mesh):
        training = build_training(config, V, mesh)
        state = training.init()
        for progress in (0.1, 0.6, 0.5, 1.0):  # never back
            rows = shard_batch(host_batch(0), mesh, progress=progress)
            state, values = training.step(state, rows, vocabulary())
            history.append((float(values["progress"]), float(values["learning_rate"])))
    assert [p for p, _ in history] == pytest.approx([0.1, 0.6, 0.6, 1.0])
    expected = [0.01 * float(optimizer.learning_rate(config.optimizer, b, b + 0.1)) for b in (0.0, 0.1, 0.6, 0.6)]
    assert [rate for _, rate in history] == pytest.approx(expected)


@pytest.mark.parametrize("mesh", [(1, 1, 1), (2, 2, 1)])
def test_longer_rows_begin_with_the_positions_there_are(mesh):
    config = make_config(mesh, (("optimizer.averaging", "ema"), ("model.max_positions", 64)))
    devices = make_mesh(config.mesh, jax.devices()[: int(np.prod(mesh))])
    with jax.set_mesh(devices):
        training = build_training(config, V, devices)
        state, _ = training.step(training.init(), shard_batch(host_batch(0), devices), vocabulary())
        before = jax.device_get(state)
        after = jax.device_get(start_phase(state, 16, 40))
    assert before.running.steps == 1, "what is a spike is learned anew"
    assert after.running.steps == 0, "what is a spike is learned anew"
    for tree, old in ((after.params, before.params), (after.average, before.average)):
        table, first = tree["encoder"]["embeddings"]["position"], old["encoder"]["embeddings"]["position"]
        np.testing.assert_array_equal(table[:40], np.concatenate([first[:16]] * 3)[:40])
        np.testing.assert_array_equal(table[40:], first[40:])
        np.testing.assert_array_equal(tree["encoder"]["embeddings"]["token"], old["encoder"]["embeddings"]["token"])
    with jax.set_mesh(devices):
        again = start_phase(jax.tree.map(jnp.asarray, after), 40, 32)  # as long as they have been
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(again.params), after.params)


# The place in the text


class Part:
    def __init__(self, name: str):
        self.fingerprint = name


class FakeMixture:
    def __init__(self, weights: dict[str, int]):
        self.corpora = {name: Part(name) for name in weights}
        self.weights = tuple(weights.values())

    def stream(self) -> Stream:
        return Stream((10**6,) * len(self.weights), self.weights)


@given(st.lists(st.tuples(st.integers(0, 300), st.sampled_from(["a", "ab", "ba", "b", "abc"])), min_size=1, max_size=6))
@settings(deadline=None)
def test_every_corpus_goes_on_where_it_was(turns):
    """However the corpora and their weights change, each gives its rows 0, 1, 2 ... in turn."""
    seen: dict[str, list[int]] = {name: [] for name in "abc"}
    orders: dict[str, set[int]] = {name: set() for name in "abc"}
    place, before = DataCursor(), None
    for rows, names in turns:
        now = FakeMixture({name: 1 + i for i, name in enumerate(names)})
        place = place if before is None else place.leaving(before)
        place = DataCursor(**json.loads(json.dumps(dataclasses.asdict(place))))  # as if it had been killed here
        stream = place.stream(now)
        corpus, position = stream.locate(np.arange(place.row, place.row + rows))
        for c, p in zip(corpus, position, strict=True):
            seen[names[c]].append(int(p))
            orders[names[c]].add(stream.orders[c])
        place, before = dataclasses.replace(place, row=place.row + rows), now
    assert all(positions == list(range(len(positions))) for positions in seen.values())
    kept = [order for found in orders.values() for order in found]
    assert len(kept) == len(set(kept)) == sum(map(bool, orders.values())), "each in its own order, and always that"


# Whole runs

LENGTHS = {
    "model__position_embedding": "learned", "data__corpus": "", "data__seq_len": 16, "model__max_positions": 64,
    "train__phases": "10: train.global_batch_size=32; 70%: data.seq_len=32, train.global_batch_size=8, "
    "optimizer.learning_rate->1e-3",
    "train__steps": 30, "train__checkpoint_every": 5, "train__eval_every": 10, "train__keep_period": 1,
}  # fmt: skip


def test_lengths_and_batches_change_within_one_run(toy, tmp_path):
    """And it is the same when it is killed at a change, or between two."""
    straight, flags = tmp_path / "straight", [*toy.flags(**LENGTHS), f"--config.data.source=text:{toy.text}"]
    out = finish(toy, straight, *flags)
    assert "from step 10 (33%) on train.global_batch_size=32" in out
    assert "rows of 16" in out
    assert "rows of 32" in out
    lines = metrics_of(straight)
    assert [line["rows"] for line in lines] == np.cumsum([16] * 10 + [32] * 11 + [8] * 9).tolist()
    assert len({line["batch_fingerprint"] for line in lines}) == 30
    evaluated = {line["step"]: line["rows"] for line in metrics_of(straight, "validation")}
    assert evaluated[20] > 1.5 * evaluated[30], "rows twice as long are half as many"
    for at, length, size in ((10, 16, 16), (20, 16, 32), (30, 32, 8)):
        config = read_config(f"{straight}@{at}")
        assert (config.data.seq_len, config.train.global_batch_size, config.train.phases) == (length, size, "")
    done = toy.run("evaluate", f"--checkpoint={straight}", "--mask_rates=")
    assert done.returncode == 0, done.stderr
    assert "held-out masked-token loss" in done.stdout, done.stderr
    for at in (10, 25):
        workdir = shutil.copytree(straight, tmp_path / str(at))
        for later in saved_steps(workdir):
            if later > at:
                shutil.rmtree(workdir / "checkpoints" / str(later))
        assert f"restored step {at}" in finish(toy, workdir, *flags)
        assert_same_run(workdir, straight, 30)


def test_a_phase_that_does_not_fit_the_corpus_is_known_at_once(toy, tmp_path):
    flags = toy.flags(train__phases=f"50%: data.corpus={tmp_path}/nowhere")
    done = toy.run("train", *flags, f"--workdir={tmp_path / 'run'}")
    assert done.returncode == 2
    assert "nowhere" in done.stderr
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_run_in_tokens(toy, tmp_path):
    flags = toy.flags(
        train__tokens=5000, train__steps=7, train__checkpoint_every=5, model__position_embedding="learned"
    )
    out = finish(toy, tmp_path / "run", *flags, "--config.model.norm_position=post")
    (total,) = {line.split()[1].split("/")[1] for line in out.splitlines() if line.startswith("step ")}
    lines = metrics_of(tmp_path / "run")
    assert lines[-1]["step"] == int(total)
    assert lines[-1]["learning_rate"] < 1e-3
    special = 2 * lines[-1]["rows"]
    assert 0.8 * 5000 < lines[-1]["tokens_seen"] - special < 1.3 * 5000
    done = toy.run("export", f"--checkpoint={tmp_path / 'run'}", f"--output={tmp_path / 'exported'}")
    assert done.returncode == 0, done
    assert "Not evaluated" not in (tmp_path / "exported" / "README.md").read_text(), done
