"""Where the numbers go, and how fast things are said to be."""

import dataclasses
import errno
import json
import math
import re
import resource
import threading
import time

import pytest

from flax_mlm.config.load import build
from flax_mlm.config.schema import Config
from flax_mlm.configs import base, bert_base
from flax_mlm.errors import UserError
from flax_mlm.model import flops
from flax_mlm.training import metrics

CONFIG = build(base.get_config())


def with_log(**changes) -> Config:
    return dataclasses.replace(CONFIG, log=dataclasses.replace(CONFIG.log, **changes))


def test_metrics_of_steps_that_are_done_again_are_dropped(tmp_path):
    config = with_log(tensorboard=False)
    first = metrics.Writers(tmp_path, config, 0)
    for step in (10, 20, 30):
        first.write(step, "train", {"loss": float(step)})
    first.close()
    with (tmp_path / "metrics.jsonl").open("a") as f:
        f.write('{"step": 40, "ki')  # killed while writing
    second = metrics.Writers(tmp_path, config, 20)
    second.write(30, "train", {"loss": 3.0})
    second.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(10, 10.0), (20, 20.0), (30, 3.0)]


def test_a_loss_that_is_no_number_is_null(tmp_path):
    writers = metrics.Writers(tmp_path, with_log(tensorboard=False), 0)
    writers.write(1, "train", {"loss": float("nan"), "grad_norm": float("inf"), "skipped": 1.0})
    writers.close()
    expected = {"step": 1, "kind": "train", "loss": None, "grad_norm": None, "skipped": 1.0}
    expected["not_finite"] = {"loss": "nan", "grad_norm": "inf"}
    assert json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=pytest.fail) == expected


@pytest.mark.parametrize(
    "damage",
    [
        b"\xff\xfe\n",
        b'{"step": 4, "kind": "train", "loss": "\xe9"}\n',
        b"\x00" * 4096,
        b"[" * 10_000 + b"\n",
        b"null\n\r\n",
    ],
)
def test_damaged_lines_are_dropped_and_the_others_kept(tmp_path, damage):
    good = '{"step": 1, "kind": "train", "loss": 1.0}\n'
    (tmp_path / "metrics.jsonl").write_bytes(good.encode() + damage)
    writers = metrics.Writers(tmp_path, with_log(tensorboard=False), 5)
    writers.write(6, "train", {"loss": 2.0})
    writers.close()
    assert (tmp_path / "metrics.jsonl").read_text() == good + good.replace("1", "6", 1).replace("1.0", "2.0")


def test_a_last_line_without_its_end_is_kept(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "kind": "train", "loss": NaN}')
    writers = metrics.Writers(tmp_path, with_log(tensorboard=False), 5)
    writers.write(6, "train", {"loss": 2.0})
    writers.close()
    first, second = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(first) == {"step": 1, "kind": "train", "loss": None, "not_finite": {"loss": "nan"}}
    assert json.loads(second) == {"step": 6, "kind": "train", "loss": 2.0}


def test_a_file_that_cannot_be_trimmed_is_one_line(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 9, "kind": "train", "loss": 1.0}')
    (tmp_path / "metrics.jsonl.tmp").mkdir()
    with pytest.raises(UserError, match=r"--workdir: .*metrics\.jsonl cannot be written: .*Is a directory"):
        metrics.Writers(tmp_path, with_log(tensorboard=False), 5)


def scalars(folder) -> dict[int, float]:
    """Steps and losses as TensorBoard shows them: files in the order of their names, each from its first step on."""
    from tensorflow.compat.v1.train import summary_iterator

    shown: dict[int, float] = {}
    for file in sorted((folder / "tensorboard").iterdir()):
        for event in summary_iterator(str(file)):
            if event.session_log.status == event.session_log.START:
                shown = {step: loss for step, loss in shown.items() if step < event.step}
            shown |= dict((event.step, value.simple_value) for value in event.summary.value)
    return shown


@pytest.mark.parametrize("later", [0, -3600, 3600])
def test_tensorboard_shows_what_the_last_start_wrote(tmp_path, monkeypatch, later):
    for start, (first, now) in enumerate([(0, 1.7e9), (2, 1.7e9 + later), (3, 1.7e9 + later)]):
        with monkeypatch.context() as clock:
            clock.setattr(time, "time", lambda now=now: now)
            writers = metrics.Writers(tmp_path, with_log(tensorboard=True), first)
            for step in range(first + 1, 6):
                writers.write(step, "train", {"loss": float(start)})
            writers.close()
    assert len(list((tmp_path / "tensorboard").iterdir())) == 3
    assert scalars(tmp_path) == {1: 0.0, 2: 0.0, 3: 1.0, 4: 2.0, 5: 2.0}


def test_a_tensorboard_folder_that_cannot_be_made_is_only_said(tmp_path, capsys):
    (tmp_path / "tensorboard").write_text("")
    metrics.Writers(tmp_path, with_log(tensorboard=True), 0).close()
    assert "WARNING: TensorBoard is off" in capsys.readouterr().out


def steps_in(folder) -> list[tuple[int, str]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["kind"]) for line in lines]


def test_an_evaluation_of_the_restored_step_is_done_again_its_training_is_not(tmp_path):
    config = with_log(tensorboard=False)
    writers = metrics.Writers(tmp_path, config, 0)
    for step in (1, 2, 3):
        writers.write(step, "train", {"loss": 1.0})
        writers.write(step, "validation", {"loss": 1.0})
    writers.close()
    metrics.Writers(tmp_path, config, 2).close()
    assert steps_in(tmp_path) == [(1, "train"), (1, "validation"), (2, "train")]


def test_what_a_full_disk_refuses_is_written_later(tmp_path, capsys):
    writers = metrics.Writers(tmp_path, with_log(tensorboard=False), 0)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        for step in range(5):
            writers.write(step, "train", {"loss": 1.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (tmp_path / "metrics.jsonl").stat().st_size == 100
    writers.write(5, "train", {"loss": 1.0})
    writers.close()
    assert steps_in(tmp_path) == [(step, "train") for step in range(6)]
    assert "WARNING: metrics.jsonl cannot be written" in capsys.readouterr().out


def test_tensorboard_gets_the_same_numbers(tmp_path):
    from flax_mlm.data.tf import tensorflow  # reads event files, which tensorboardX wrote

    writers = metrics.Writers(tmp_path, with_log(tensorboard=True), 0)
    writers.write(7, "validation", {"loss": 2.5})
    writers.close()
    (file,) = (tmp_path / "tensorboard").iterdir()
    events = tensorflow().compat.v1.train.summary_iterator(str(file))
    found = [(v.tag, v.simple_value, e.step) for e in events for v in e.summary.value]
    assert found == [("validation/loss", 2.5, 7)]


def test_a_disk_that_is_full_for_tensorboard_stops_nothing(tmp_path, monkeypatch, capsys):
    reports = []
    monkeypatch.setattr(threading, "excepthook", hook := reports.append)
    writers = metrics.Writers(tmp_path, with_log(tensorboard=True), 0)
    events = writers._tensorboard.file_writer.event_writer

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(events._ev_writer, "write_event", full)
    writers.write(1, "train", {f"{i}": 1.0 for i in range(50)})  # more than a queue of tensorboardX holds
    events._worker.join(60)
    writers.write(2, "train", {"loss": 1.0})
    writers.close()
    assert reports == []  # one line says it
    assert threading.excepthook == hook
    assert "WARNING: TensorBoard is off" in capsys.readouterr().out
    assert steps_in(tmp_path) == [(1, "train"), (2, "train")]


def test_weights_and_biases_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="wandb is optional")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    writers = metrics.Writers(tmp_path, with_log(tensorboard=False, wandb_project="test"), 0)
    writers.write(7, "train", {"loss": 2.5})
    writers.close()
    (log,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    content = log.read_bytes()
    assert b"train/loss" in content
    assert b"2.5" in content


def test_a_missing_tracker_never_stops_a_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)  # as if it were not installed
    writers = metrics.Writers(tmp_path, with_log(tensorboard=False, wandb_project="test"), 0)
    writers.write(1, "train", {"loss": 1.0})
    writers.close()
    assert "Weights & Biases is off" in capsys.readouterr().out


def test_flops_of_bert_base_are_six_per_parameter_and_token_plus_attention_and_head():
    shape = build(bert_base.get_config()).model
    length, slots, vocab = 512, 76, 30_522
    blocks = 12 * (4 * 768**2 + 2 * 768 * 3072)
    expected = 6 * blocks * length + 12 * 12 * 768 * length**2 + 6 * slots * (768**2 + 768 * vocab)
    assert flops.per_row(shape, length, slots, vocab) == pytest.approx(expected)


class Clock:
    """Stands in for `time.perf_counter`."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)

    def step(self, speed: metrics.Throughput, seconds: float, progress: float, tokens: float = 100.0) -> None:
        """A step that takes as long, a tenth of it waiting for data."""
        self.now += seconds
        speed.add(progress, tokens, 1e9, seconds / 10, speed.now())


def test_throughput_leaves_out_the_start_and_pauses(monkeypatch):
    clock, speed = Clock(monkeypatch), metrics.Throughput(1e10, {})
    clock.step(speed, 30.0, 0.1)  # compilation, and the first read
    clock.step(speed, 2.0, 0.2)
    with speed.paused():
        clock.now += 1000
    clock.step(speed, 2.0, 0.3)
    rates = speed.report(0.3)
    assert rates["tokens_per_second"] == pytest.approx(50)
    assert rates["data_wait"] == pytest.approx(0.1)
    assert rates["mfu"] == pytest.approx(0.05)
    assert rates["eta_seconds"] == pytest.approx(14)
    assert rates["tokens_seen"] == 300
    assert rates["train_seconds"] == pytest.approx(6), "the first step counts as long as the others"


def test_a_first_step_alone_has_no_rates(monkeypatch):
    clock, speed = Clock(monkeypatch), metrics.Throughput(None, {})
    clock.step(speed, 30.0, 0.1)
    assert speed.report(0.1) == {"tokens_seen": 100, "train_seconds": 0.0}
    clock.step(speed, 2.0, 0.2)
    assert speed.report(0.2)["tokens_per_second"] == pytest.approx(50)
    assert speed.totals() == {"tokens_seen": 200, "train_seconds": pytest.approx(4)}


def test_a_window_of_one_step_ends_with_the_step_though_it_is_read_later(monkeypatch):
    clock, speed = Clock(monkeypatch), metrics.Throughput(None, {})
    clock.step(speed, 30.0, 0.1)
    ends = []
    for _ in range(3):
        clock.now += 2.0
        ends.append(speed.now())
    for number, end in enumerate(ends, 2):  # before a checkpoint, the last two steps are read at once
        speed.add(number / 10, 100.0, 1e9, 0.0, end)
        assert speed.report(number / 10)["tokens_per_second"] == pytest.approx(50)


def test_totals_go_on_where_they_were_saved_without_the_pauses(monkeypatch):
    clock, speed = Clock(monkeypatch), metrics.Throughput(None, {"tokens_seen": 5000, "train_seconds": 60.0})
    clock.step(speed, 30.0, 0.1)
    clock.step(speed, 3.0, 0.2)
    reported = speed.report(0.2)
    assert reported["tokens_seen"] == 5200
    assert reported["train_seconds"] == pytest.approx(66)
    clock.step(speed, 4.0, 0.3)
    with pytest.raises(KeyError), speed.paused():
        clock.now += 1000
        assert speed.totals() == {"tokens_seen": 5300, "train_seconds": pytest.approx(70)}
        raise KeyError
    clock.step(speed, 5.0, 0.4)
    assert speed.totals() == {"tokens_seen": 5400, "train_seconds": pytest.approx(75)}
    assert speed.report(0.4)["tokens_per_second"] == pytest.approx(200 / 9)


def test_a_line_has_means_since_the_last_line_and_the_state_of_its_step():
    means = metrics.Means({})
    for loss, rate in ((4.0, 0.1), (2.0, 0.2), (3.0, 0.3)):
        means.add({"loss": loss, "learning_rate": rate})
    assert means.report({"loss": 3.0, "learning_rate": 0.3}) == {"loss": 3.0, "learning_rate": 0.3}
    means.add({"loss": 7.0})
    assert means.report({"loss": 7.0}) == {"loss": 7.0}


def test_a_run_that_goes_on_inside_a_window_has_the_same_means():
    whole, values = metrics.Means({}), [0.1 + 1 / n for n in range(1, 8)]
    for x in values:
        whole.add({"loss": x})
    first = metrics.Means({})
    for x in values[:3]:
        first.add({"loss": x})
    second = metrics.Means(json.loads(json.dumps(first.sums)))
    for x in values[3:]:
        second.add({"loss": x})
    assert second.report({"loss": values[-1]}) == whole.report({"loss": values[-1]})


def test_means_leave_out_what_is_not_finite_unless_nothing_is():
    means = metrics.Means({})
    for loss in (1.0, math.nan, math.inf, 2.0):
        means.add({"loss": loss, "grad_norm": math.nan})
    line = means.report({"loss": 2.0, "grad_norm": math.nan})
    assert line["loss"] == 1.5
    assert math.isnan(line["grad_norm"])


VALUES = dict(loss=1.5, accuracy=0.25, learning_rate=1e-3, grad_norm=0.5, skipped=0.0, data_wait=0.01)


def test_the_line_can_be_grepped():
    columns = metrics.train_columns({**VALUES, "tokens_per_second": 1234.5, "eta_seconds": 3661})
    line = metrics.fit(columns)
    assert "\n" not in line
    assert re.search(r"^loss 1\.5000  accuracy 0\.2500 .* tokens/s 1,234  data_wait .* eta 1:01:01$", line)
    more = {"skipped": 2.0, "tokens_per_second": 1, "eta_seconds": 1, "mfu": 0.5}
    line = metrics.fit(metrics.train_columns({**VALUES, **more}))
    assert line.endswith("mfu 50.0%  data_wait 1.0%  eta 0:00:01  skipped 2")


LONG = {
    **VALUES, "skipped": 10.0, "tokens_per_second": 12_345_678.9, "eta_seconds": 1e7, "mfu": 0.5,
    "generator_loss": 1.0, "discriminator_loss": 2.0, "epochs/wiki": 0.1, "epochs/books": 0.1,
}  # fmt: skip


@pytest.mark.parametrize("width", [200, 132, 100, 80, 60, 40])
@pytest.mark.parametrize("step", ["1/9", "1000000/2000000"])
def test_columns_are_left_out_until_a_line_fits(width, step):
    kept = metrics.fit([(0, f"step {step}"), *metrics.train_columns(LONG)], width)
    assert len(kept) <= max(width, len(f"step {step}  loss 1.5000  skipped 10"))
    assert kept.startswith(f"step {step}  ")
    assert "loss 1.5000" in kept
    assert kept.endswith("skipped 10")
    assert ("tokens/s 12,345,679" in kept) == (width >= 80 or (len(step) < 5 and width >= 60))
