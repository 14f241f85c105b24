"""The benchmarks run, at toy sizes and without peers; and they refuse to compare what is not the same."""

import json
import os
import random
import subprocess
import sys
import time

import numpy as np
import pytest

from benchmarks import case, results, turns
from tests.helpers.paths import ROOT
from tests.helpers.xla import COMPILE_FAST


@pytest.fixture(scope="module")
def run(tmp_path_factory, toy):
    """`python -m benchmarks.NAME OPTIONS` on long documents of toy text: its JSON and what it printed."""
    folder = tmp_path_factory.mktemp("benchmarks")
    rng, words = random.Random(0), " ".join(toy.text.read_text().split()).split(". ")
    (folder / "text.txt").write_text("\n\n".join(". ".join(rng.choices(words, k=300)) for _ in range(40)))
    (folder / "absent").mkdir()
    for name in ("tensorflow", "torch"):  # what nothing may need that runs on a GPU machine, and what is not there
        (folder / "absent" / f"{name}.py").write_text("raise ImportError('absent')")
    data = {"data.source": f"text:{folder / 'text.txt'}", "data.cache_dir": folder / "cache", "data.num_workers": 1}
    model = {"model.num_layers": 1, "model.hidden_size": 32, "model.num_heads": 2, "model.intermediate_size": 64}
    values = data | model | {"tokenizer.vocab_size": 400, "data.seq_len": 32, "train.global_batch_size": 8}
    overrides = [f"--config.{name}={value}" for name, value in values.items()]

    def run(name: str, *options: str, **env: str) -> tuple[dict, str]:
        file = folder / f"{name}.json"
        line = [sys.executable, "-m", f"benchmarks.{name}", f"--json={file}", "--rounds=1", *overrides, *options]
        variables = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": COMPILE_FAST}
        variables |= {"BENCH_VENVS": str(folder / "none"), "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled")}
        env = {**os.environ, **variables, **{k: v.format(folder=folder) for k, v in env.items()}}
        done = subprocess.run(line, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return json.loads(file.read_text()), done.stdout

    return run


@pytest.mark.full
def test_train_step_runs_ours_and_says_which_peers_are_missing(run):
    shape = ("--sizes=1x64", "--tokens=128", "--lengths=32", "--vocabs=400", "--seconds=0.01")
    record, printed = run("train_step", "--peers=ours_scan,bert_eager", *shape)
    programs = {k: v for group in record["cases"][0]["groups"].values() for k, v in group["programs"].items()}
    assert np.allclose(programs["ours"]["first_results"], programs["ours_scan"]["first_results"], atol=1e-5)
    assert programs["ours"]["ratio"] == 1.0
    assert programs["ours"]["peak_bytes"] > 0
    assert "setup.sh" in programs["bert_eager"]["refused"]
    assert "| ours |" in printed
    assert "not reported: bert_eager" in printed
    assert run("train_step", "--peers=ours", *shape)[0] == record, "what is in the file is not measured again"


def test_masking(run):
    record, printed = run("masking", "--size=1x64", "--shapes=4x32,8x32", "--calls=2", "--seconds=0.01")
    assert record["seconds"]["8x32"]["ours"] > 0
    assert record["seconds"]["8x32"]["lists"] is None
    assert "Left out: collator" in printed


def test_input(run):
    record, printed = run("input", "--rows=4", "--batches=2")
    assert set(record["first_batch"]) == {"0", "10000000"}
    assert all(min(rates) > 0 for rates in record["tokens_per_second"].values())
    assert "| tokenising |" in printed


def test_engines(run):
    record, printed = run("engines")
    assert set(record["seconds"]) == {"local", "a shard", "local, tokenizer.json"}
    assert all(processor > 0 for ((_, processor),) in record["seconds"].values())
    assert "Not there: Beam, Ray, datatrove" in printed


@pytest.mark.full
def test_languages(run, tmp_path):
    for name, times in (("large", 60), ("small", 12)):
        (tmp_path / f"{name}.txt").write_text("\n\n".join(f"{name} text, number {i}." * 9 for i in range(times)))
    source = f"--config.data.source=text:{tmp_path}/large.txt|text:{tmp_path}/small.txt"
    options = [source, "--config.data.validation_fraction=0.3", "--names=large,small", f"--output={tmp_path / 'out'}"]
    record, printed = run("languages", *options, "--config.train.steps=2", "--alphas=1,0.3")
    assert record["rows"]["small"] < record["rows"]["large"]
    assert record["epochs"]["0.3"]["small"] > 1.5 * record["epochs"]["1.0"]["small"]
    assert record["results"]["0.3"][0]["bits_per_byte/small"] > 0
    assert "| language | rows | α = 1 | α = 0.3 | epochs | tokens per word |" in printed


@pytest.mark.full
def test_startup(run):
    record, printed = run("startup", "--commands=train")
    assert set(record["seconds"]) == {"train --help", "a config error", "first step, cold", "first step, warm"}
    assert "| a config error |" in printed


@pytest.mark.full
def test_packing(run):
    record, printed = run("packing", "--steps=1")
    assert record["ratio"] > 0
    assert "| padded |" in printed


def test_dedup(run):
    record, printed = run("dedup", "--planted=10", "--similarities=0.95,0.5", "--seconds=0.01")
    assert record["quality"]["0.95"]["joined"] == 1
    assert record["quality"]["0.5"]["joined"] == 0
    assert record["speed"]["rates"]["ours"] > 0
    assert "Left out: datatrove" in printed


def test_the_step_of_a_gpu_machine_needs_no_tensorflow(run):
    record, printed = run("gpu", "--smoke", "--cases=1", "--seconds=0.01", PYTHONPATH="{folder}/absent")
    assert record["cases"]["ModernBERT"]["programs"]["ours"]["step_seconds"] > 0
    assert (
        "ImportError: absent" in record["cases"]["ModernBERT"]["programs"]["torch"]["refused"]
        or "ended with" in printed
    )


def test_matmuls_of_a_step_are_its_flops():
    one = case.Case(4, 256, 128, 8192, 32)
    assert sum(m.flops * m.count for m in one.matmuls()) == one.flops()


def test_unpacking_keeps_every_piece():
    packed = np.array([[2, 7, 8, 3, 2, 9, 3, 0], [2, 5, 5, 5, 5, 5, 5, 3]])
    rows = case.unpacked(packed, cls_id=2, pad_id=0)
    assert rows.tolist() == [[2, 7, 8, 3, 0, 0, 0, 0], [2, 9, 3, 0, 0, 0, 0, 0], [2, 5, 5, 5, 5, 5, 5, 3]]


def worker(name: str, losses: list[float], foreign: list[float | None]) -> turns.Worker:
    made = turns.Worker.__new__(turns.Worker)
    made.name, made.started = name, {"first_results": losses}
    made.turns = [turns.Turn([float(i)], [], 0.0, share) for i, share in enumerate(foreign)]
    return made


@pytest.mark.parametrize("losses", [[9.0, 8.9, 8.7], [9.01, 8.9, 8.8], [9.0, 8.9, float("nan")]])
def test_a_program_with_other_losses_is_not_reported(losses):
    ours, same = worker("ours", [9.0, 8.9, 8.8], []), worker("same", [9.0, 8.9, 8.80001], [])
    found = case.compare_losses([ours, same, worker("cheat", losses, [])], ours, (1e-4, 1e-3))
    assert set(found) == {"cheat"}
    assert "its losses are" in found["cheat"]


def test_noisy_turns_do_not_count():
    assert worker("a", [], [0.5, 0.01, 0.2, 0.02, None]).median() == 3.0
    assert worker("a", [], [0.5, 0.5]).median() == 0.5, "all, where none was quiet"


def test_others_are_noticed():
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        before = turns._busy_seconds()
        time.sleep(1)
        assert turns._busy_seconds() - before > 0.2
    finally:
        busy.kill()
        busy.wait()


def test_tables_replace_what_was_between_the_marks():
    text = results.SPEED.read_text()
    once = results.rewritten(text, {"masking": "| a |\n", "input": "| b |, text:/my/own/wiki.txt.gz, 3"})
    assert "### Masking" in once
    assert once.index("| a |") < once.index("| b |, text:wiki.txt.gz, 3")
    assert results.rewritten(once, {}).count("| a |") == text.count("| a |")
    outside = [part.partition("<!-- speed: begin")[0] for part in (text, once)]
    assert outside[0] == outside[1]
    assert text.partition("speed: end")[2] == once.partition("speed: end")[2]
