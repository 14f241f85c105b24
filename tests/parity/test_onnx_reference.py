"""ONNX files of exported folders, opened by onnxruntime alone: the numbers of transformers.

Run by `bash launch/test.sh --references`.
"""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from flax_mlm.config.load import build
from flax_mlm.configs import base
from flax_mlm.data.sources.open import open_source
from flax_mlm.data.tokenizer import Tokenizer
from flax_mlm.data.tokenizer_training import train_tokenizer
from flax_mlm.errors import Failure
from flax_mlm.evaluation.onnx_drop import write_onnx
from flax_mlm.hf import sentence_transformers
from flax_mlm.inference import onnx
from flax_mlm.inference.config import read_config
from flax_mlm.inference.export import export
from tests.helpers.hf_folders import written

torch = pytest.importorskip("torch", reason="the reference needs torch")
transformers = pytest.importorskip("transformers", "5.23", reason="the reference needs transformers' exporters")
onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed (launch/onnx-requirements.txt)")
pytest.importorskip("onnxscript", reason="onnxscript is not installed (launch/onnx-requirements.txt)")

LIMIT = 1e-4


@pytest.fixture(autouse=True)
def few_timings(monkeypatch):
    monkeypatch.setattr(onnx, "_SECONDS", 0)


@pytest.fixture(scope="module")
def lines() -> list[str]:
    chunk = next(iter(open_source("builtin").chunks()))
    return [line for line in chunk.text.split(". ") if line.strip()][:300]


@pytest.fixture(scope="module")
def vocabulary(lines) -> Tokenizer:
    return train_tokenizer(lines, dataclasses.replace(build(base.get_config()).tokenizer, vocab_size=800))


def served(path: Path, output: Path, text: list[str], int8: bool = False, max_drop: float = 1.0) -> dict:
    """Exports a folder with ONNX files; returns their measurements."""
    path.with_name("text.txt").write_text("\n\n".join(text))
    fields = {"data.source": f"text:{path.with_name('text.txt')}", "data.cache_dir": str(path.with_name("cache"))}
    fields |= {"data.num_workers": 1, "data.validation_fraction": 0.2, "eval.batch_size": 8, "eval.max_rows": 16}
    reports = []

    def complete(folder, model):
        reports.append(write_onnx(folder, model, int8, max_drop))

    export(str(path), output, build(read_config(str(path), fields)), complete=complete)
    return reports[0]


def outputs(file: Path, inputs: dict) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    names = {one.name for one in session.get_inputs()}
    assert names <= set(inputs)
    return session.run(None, {name: array for name, array in inputs.items() if name in names})


@pytest.mark.parametrize("kind", ["bert", "modernbert"])
def test_a_masked_model_gives_the_logits_of_transformers(kind, vocabulary, lines, tmp_path):
    """In batches of any size and length; and int8 is smaller, and says what it loses."""
    report = served(written(tmp_path / "first", kind, vocabulary), tmp_path / "served", lines, int8=True)
    net = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "served").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "served")
    for texts in (["The [MASK] of the people."], [line[:60] for line in lines[:5]], lines[5:7]):
        inputs = tokenizer(texts, padding=True, truncation=True, max_length=64, return_tensors="np")
        (found,) = outputs(tmp_path / "served" / onnx.MODEL, dict(inputs))
        with torch.no_grad():
            expected = net(**{name: torch.from_numpy(array) for name, array in inputs.items()}).logits.numpy()
        is_real = inputs["attention_mask"] > 0
        assert np.abs(found - expected)[is_real].max() <= LIMIT
    exact, int8 = report["files"]["float32"], report["files"]["int8"]
    assert exact["largest_difference"] <= LIMIT
    assert abs(exact["task"]["drop"]) <= LIMIT
    assert int8["bytes"] < 0.75 * exact["bytes"], "of this small model the graph is a third"
    assert int8["bytes"] == (tmp_path / "served" / onnx.QUANTIZED).stat().st_size
    assert int8["task"]["interval"][0] <= int8["task"]["drop"] <= int8["task"]["interval"][1]
    assert {name for times in report["latency"]["milliseconds"].values() for name in times} == {
        *("float32", "int8", "transformers")
    }
    assert json.loads((tmp_path / "served" / onnx.REPORT).read_text()) == json.loads(json.dumps(report))
    assert [line.split()[0] for line in onnx.lines(report)[:5:2]] == ["float32", "int8", "latency"]


def test_a_vector_model_gives_the_hidden_states(vocabulary, lines, tmp_path):
    """And has no pooler, whose weights nobody has trained."""
    path = written(tmp_path / "first", "bert", vocabulary)
    finetune = dataclasses.replace(build(base.get_config()).finetune, pooling="mean")
    for name, content in sentence_transformers.files(finetune, 48, 32).items():
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_text(json.dumps(content))
    report = served(path, tmp_path / "served", lines, int8=True)
    inputs = transformers.AutoTokenizer.from_pretrained(path)(lines[0][:60], return_tensors="np")
    (found,) = outputs(tmp_path / "served" / onnx.MODEL, dict(inputs))
    net = transformers.AutoModel.from_pretrained(tmp_path / "served").eval()
    with torch.no_grad():
        expected = net(**{name: torch.from_numpy(array) for name, array in inputs.items()}).last_hidden_state.numpy()
    assert np.abs(found - expected).max() <= LIMIT
    for name, limit in (("float32", 1e-6), ("int8", 0.01)):
        task = report["files"][name]["task"]
        assert task["metric"] == "1 - cosine"
        assert abs(task["drop"]) <= limit


def test_a_model_that_loses_more_is_not_written(vocabulary, lines, tmp_path):
    path = written(tmp_path / "first", "bert", vocabulary)
    with pytest.raises(Failure, match=r"--max_drop is -1, but float32 loses .* nothing is written"):
        served(path, tmp_path / "served", lines, max_drop=-1.0)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["cache", "first", "text.txt"]
