"""Comparing checkpoints: every number is evaluate's, every interval a paired bootstrap, nothing is done twice."""

import json
import shutil
import subprocess

import numpy as np
import pytest
import sklearn.metrics

from flax_mlm import compare
from flax_mlm.configs import base
from flax_mlm.evaluation.registry import headline_metric


def test_the_command(toy, trained_run, causal_run, tmp_path):
    rows = [f"The {animal} {does}.\t{animal}" for animal, does in toy.animals.items()] * 4
    (tmp_path / "t.tsv").write_text("\n".join(["text\tlabel", *rows]))
    pairs = [{"sentence_good": f"The {a} {d}.", "sentence_bad": f"{d} {a} The."} for a, d in toy.animals.items()]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    (tmp_path / "c.tsv").write_text("".join(f"The [MASK] {does}.\t{animal}\n" for animal, does in toy.animals.items()))
    tuned = "--config.finetune.learning_rates=1e-2 --config.finetune.seeds=1 --config.finetune.pooling=mean"
    tasks = (
        f"mlm --mask_rates=; cloze --data={tmp_path / 'c.tsv'}; pairs=minimal_pairs --data={tmp_path / 'p.jsonl'}; "
        f"animals=classification --train={tmp_path / 't.tsv'} --dev={tmp_path / 't.tsv'} {tuned}"
    )
    line = [
        f"--checkpoints=new={trained_run}@200,old={trained_run}@300,causal={causal_run}",
        f"--tasks={tasks}", f"--output={tmp_path / 'out'}",
    ]  # fmt: skip
    done = toy.run("compare", *line)
    assert done.returncode == 0, done.stderr
    results = {p.name.rpartition("-")[0]: json.loads(p.read_text()) for p in (tmp_path / "out/results").iterdir()}
    assert len(results) == 12
    found = {(r["task"], r["metric"]): r for r in json.loads((tmp_path / "out" / "comparison.json").read_text())}
    assert set(found) == {("mlm", "masked-token loss"), ("mlm", "next-token loss"), ("cloze", "mean reciprocal rank"),
                          ("pairs", "accuracy"), ("animals", "accuracy")}  # fmt: skip
    loss = found["mlm", "masked-token loss"]
    assert loss["values"]["old"][0] == results["mlm-old"]["loss"]
    assert "causal" not in loss["values"]
    difference, low, high = loss["differences"]["old"]
    assert difference == pytest.approx(results["mlm-old"]["loss"] - results["mlm-new"]["loss"])
    assert low < difference < high
    assert set(found["pairs", "accuracy"]["differences"]) == {"old", "causal"}
    text = (tmp_path / "out" / "table.md").read_text()
    assert text in done.stdout
    assert f"{results['mlm-old']['loss']:.4f} ± {results['mlm-old']['loss_stderr']:.4f}" in text
    assert (tmp_path / "out" / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert not list((tmp_path / "out").rglob("*.tmp"))

    next((tmp_path / "out/results").glob("mlm-old-*")).write_text('{"loss": 3.')
    again = toy.run("compare", *line)
    assert again.returncode == 0, again.stderr
    assert text in again.stdout, "half a result is made again"

    times = {p: p.stat().st_mtime_ns for p in (tmp_path / "out/results").iterdir()}
    again = toy.run("compare", *line)
    assert again.returncode == 0
    assert text in again.stdout
    assert times == {p: p.stat().st_mtime_ns for p in (tmp_path / "out/results").iterdir()}, "nothing is done twice"


def test_another_checkpoint_in_the_same_place_or_another_option_is_evaluated_anew(toy, trained_run, tmp_path):
    place, losses = tmp_path / "run" / "checkpoints" / "300", []
    line = [f"--checkpoints={tmp_path / 'run'}", "--tasks=mlm --mask_rates=", f"--output={tmp_path / 'out'}"]
    for step, *options in ((200,), (300,), (300, "--config.eval.max_rows=5")):
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(trained_run / "checkpoints" / str(step), place)
        done = toy.run("compare", *line, *options)
        assert done.returncode == 0, done.stderr
        (row,) = json.loads((tmp_path / "out" / "comparison.json").read_text())
        losses.append(row["values"]["run"][0])
    assert losses[0] > losses[1] != losses[2]
    results = [json.loads(file.read_text()) for file in (tmp_path / "out" / "results").iterdir()]
    assert len(results) == 3
    assert min(result["rows"] for result in results) == 5


def test_another_hugging_face_folder_in_the_same_place_is_seen(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_text("old")
    before = compare.find(str(tmp_path))
    (tmp_path / "table.md").write_text("no part of the model")
    assert compare.find(str(tmp_path)) == before
    (tmp_path / "model.safetensors").write_text("new")
    assert compare.find(str(tmp_path)) != before


def test_a_cloze_does_not_show_a_causal_model_what_comes_after(toy, causal_run, tmp_path):
    found = []
    for ending in ("barks in the garden", "sings on the hill"):
        (tmp_path / "c.tsv").write_text(f"The [MASK] {ending}.\tdog\n")
        line = f"--checkpoint={causal_run}", "--task=cloze", f"--data={tmp_path / 'c.tsv'}"
        done = toy.run("evaluate", *line, f"--json={tmp_path / 'c.json'}")
        assert done.returncode == 0, done.stderr
        (answer,) = json.loads((tmp_path / "c.json").read_text())["answers"]
        found.append((answer["rank"], answer["probability"], answer["own"]))
    assert found[0][0] == found[1][0] <= 20
    assert found[0][2] == found[1][2]
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-4)


def test_the_interval_is_that_of_a_paired_bootstrap():
    """Two that are wrong on the same examples but one: unpaired, the difference would drown."""
    rng = np.random.default_rng(1)
    reciprocal = rng.integers(1, 50, 400)
    better = np.where(np.arange(400) % 4 == 0, np.maximum(reciprocal - 1, 1), reciprocal)
    results = {
        name: {"task": "cloze", "answers": [{"text": str(i), "rank": int(r)} for i, r in enumerate(ranks)]}
        for name, ranks in (("a", reciprocal), ("b", better))
    }
    (row,) = compare.compared("c", results, 2000)
    difference, low, high = row.differences["b"]
    change = 1 / better - 1 / reciprocal
    assert difference == pytest.approx(change.mean())
    assert (high - low) == pytest.approx(2 * 1.96 * change.std() / 20, rel=0.2)
    assert low > 0
    assert row.values["a"][1] > difference


def test_other_questions_are_not_compared():
    one, two = ({"task": "cloze", "answers": [{"text": t, "rank": 1}]} for t in "ab")
    (row,) = compare.compared("c", {"a": one, "b": two}, 10)
    assert set(row.values) == {"a", "b"}
    assert not row.differences


@pytest.mark.parametrize("labels", [["x", "y", "x", "x", "y"], ["1.5", "0.5", "2.0", "3.0", "1.0"]])
def test_scores_of_labels(labels):
    numbers = "." in labels[0]
    found = [float(x) for x in labels] if numbers else labels
    metric = "spearman" if numbers else "matthews"
    result = {"task": "classification", "metric": metric, "labels": found, "predictions": found, "stderr": 0.0}
    result["classes"] = [] if numbers else ["x", "y"]
    assert headline_metric(result).value == pytest.approx(1.0)


def test_f1_is_of_as_many_classes_as_were_learned():
    labels = ["b", "b", "a", "b"]
    found = {"task": "classification", "metric": "f1", "labels": labels, "predictions": ["b", "a", "a", "b"]}
    found |= {"stderr": 0.0, "classes": ["a", "b", "rare"]}
    score = headline_metric(found)
    assert score.value == pytest.approx(sklearn.metrics.f1_score(labels, found["predictions"], average="macro"))
    assert score.resample(np.array([0, 1])) == pytest.approx((2 / 3 + 0) / 2), "and not that of b alone"


def masked(hidden: list, rows: int, fill: int = 0) -> dict:
    each = {"loss": [2.0 * (i + 1) for i in range(rows)] + [0.0] * fill, "predicted_tokens": [2] * rows + [0] * fill}
    about = {"task": "mlm", "objective": "mlm", "corpus": "c", "hidden": hidden, "loss": 1.0, "loss_stderr": 0.1}
    return about | {"each_row": each}


def test_losses_are_compared_where_the_same_was_hidden_whatever_fills_the_last_batch():
    token, span = (["token", 0.8, 0.1, 0.15], ["span", 0.8, 0.1, 0.2, 10, 0.15])
    (row,) = compare.compared("mlm", {"a": masked(token, 5), "b": masked(token, 5, 3), "c": masked(span, 5)}, 50)
    assert set(row.differences) == {"b"}
    assert np.isfinite(row.differences["b"]).all()
    assert headline_metric(masked(token, 5, 3)).num_examples == 5


def test_a_file_that_was_changed_is_read_again(tmp_path):
    (tmp_path / "a.tsv").write_text("x")
    before = compare.files_in([f"--data={tmp_path}", "--metric=f1"])
    assert len(before) == 1
    assert compare.files_in([f"--data={tmp_path / 'a.tsv'}"]) == before
    (tmp_path / "a.tsv").write_text("xy")
    assert compare.files_in([f"--data={tmp_path}"]) != before


@pytest.mark.parametrize(("text", "paths"), [
    ("a,b=x", {"a": "a", "b": "x"}),
    ("runs/lr=0.1,new=runs/lr=0.1@20", {"lr=0.1": "runs/lr=0.1", "new": "runs/lr=0.1@20"}),
    ("runs/lr=0.1@20", {"lr=0.1@20": "runs/lr=0.1@20"}),
    ("runs/a,b, c=runs/a,b@10", {"a,b": "runs/a,b", "c": "runs/a,b@10"}),
    ("gs://bucket/lr=0.1", {"lr=0.1": "gs://bucket/lr=0.1"}),
    ("old=gs://bucket/a", {"old": "gs://bucket/a"}),
])  # fmt: skip
def test_a_path_that_exists_as_it_is_written_goes_first(tmp_path, monkeypatch, text, paths):
    monkeypatch.chdir(tmp_path)
    for name in ("lr=0.1", "a,b"):
        (tmp_path / "runs" / name).mkdir(parents=True)
    assert compare.parse_checkpoints(text) == paths


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--checkpoints is missing"),
        (["--checkpoints=a=x,a=y"], "names two 'a'"),
        (["--checkpoints=x"], "--output is missing"),
        (["--checkpoints=x", "--output=o"], "no checkpoint in"),
        (
            ["--checkpoints=x", "--output=o", f"--config={base.__file__}"],
            "checkpoints have configs",
        ),
        (["--checkpoints=x", "--tasks= ; "], "--tasks is empty"),
        (["--checkpoints=x", "--tasks=mlm; mlm"], "names two 'mlm'; rename one with NAME=mlm"),
        (["--checkpoints=x", "--tasks=mlm --json=a"], "which compare sets"),
        (["--checkpoints=x", "--tasks=mlm '"], "cannot parse 'mlm '': No closing quotation"),
    ],
)
def test_what_the_command_refuses(toy, tmp_path, flags, message):
    done: subprocess.CompletedProcess = toy.run("compare", *flags, cwd=tmp_path)
    assert done.returncode == 2, done
    assert done.stderr.startswith("error: "), done
    assert done.stderr.count("\n") == 1, done
    assert message in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_task_that_refuses_is_named(toy, trained_run, tmp_path):
    line = f"--checkpoints=a={trained_run}", "--tasks=pairs=minimal_pairs"
    done = toy.run("compare", *line, "--output=/proc/no")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done
    assert done.stderr.startswith("error: --output: '/proc/no' cannot be used: No such file")
    done = toy.run("compare", *line, f"--output={tmp_path / 'out'}")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done
    assert done.stderr.startswith("error: pairs of a: --data is missing")
    assert not list((tmp_path / "out" / "results").iterdir())


def test_an_option_without_a_value_names_no_files():
    assert compare.files_in(["--mask_rates=", "--flag"]) == []
