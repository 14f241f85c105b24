"""Measurements and refusals of `export --onnx`; needs no torch. test_onnx_reference.py writes the files."""

import dataclasses
import importlib.util

import numpy as np
import pytest

from flax_mlm.config.load import build
from flax_mlm.configs import base
from flax_mlm.data.tokenizer import Tokenizer
from flax_mlm.data.tokenizer_training import train_tokenizer
from flax_mlm.errors import Failure, UserError
from flax_mlm.evaluation.onnx_drop import make_task
from flax_mlm.inference import embeddings, onnx
from flax_mlm.inference.config import read_config
from flax_mlm.inference.export import export
from flax_mlm.inference.load import LoadedModel, load_model
from tests.helpers.hf_folders import written

WORDS = ("the river", "a boat", "their house", "many trees", "the old bridge")
SENTENCES = [f"{a} is near {b}, and {c} is not {i}." for i in range(9) for a in WORDS for b in WORDS for c in WORDS]


@pytest.fixture(scope="module")
def vocabulary() -> Tokenizer:
    return train_tokenizer(SENTENCES, dataclasses.replace(build(base.get_config()).tokenizer, vocab_size=300))


@pytest.fixture(scope="module")
def model(vocabulary, tmp_path_factory) -> LoadedModel:
    """A BERT of random weights, with a text whose rows hold several segments."""
    folder = tmp_path_factory.mktemp("onnx")
    (folder / "text.txt").write_text("\n\n".join(" ".join(SENTENCES[i : i + 1 + i % 3]) for i in range(len(SENTENCES))))
    path = written(folder / "bert", "bert", vocabulary)
    fields = {"data.source": f"text:{folder / 'text.txt'}", "data.cache_dir": str(folder / "cache")}
    fields |= {"data.seq_len": 64, "data.num_workers": 1, "data.validation_fraction": 0.2, "eval.batch_size": 8}
    return load_model(str(path), build(read_config(str(path), fields)))


def ours(model: LoadedModel):
    """The model itself in place of a network."""
    return lambda rows: ((i, logits_LV) for i, _, logits_LV in embeddings.row_outputs(model, rows))


def test_the_model_itself_loses_nothing(model):
    """Its losses of packed rows are those of their segments, each alone."""
    drop = make_task(model, [], False)(ours(model))
    assert drop.reference == pytest.approx(drop.value, abs=1e-5)
    assert drop.interval == pytest.approx((0, 0), abs=1e-5)
    assert "predicted tokens" in drop.examples


def test_a_network_that_knows_nothing_has_the_loss_of_all_tokens(model):
    size = next(ours(model)([[1, 2]]))[1].shape[1]
    drop = make_task(model, [], False)(lambda rows: ((i, np.zeros((len(row), size))) for i, row in enumerate(rows)))
    assert drop.value == pytest.approx(np.log(size))
    assert drop.drop == pytest.approx(np.log(size) - drop.reference)
    assert drop.interval[0] < drop.drop < drop.interval[1]


@pytest.mark.parametrize("pooling", ["cls", "mean", "last"])
def test_vectors_are_compared_by_their_cosine(pooling, model):
    finetune = dataclasses.replace(model.config.finetune, pooling=pooling)
    model = model._replace(config=dataclasses.replace(model.config, finetune=finetune))
    task = make_task(model, SENTENCES[:9], True)
    for sign, expected in ((1, 0), (-1, 2)):
        drop = task(lambda rows, sign=sign: ((i, sign * x_LD) for i, x_LD, _ in embeddings.row_outputs(model, rows)))
        assert drop.drop == pytest.approx(expected, abs=1e-5)


def test_a_network_that_computes_nan_is_refused(model):
    with pytest.raises(UserError, match="NaN"):
        make_task(model, [], False)(lambda rows: ((i, x * np.nan) for i, x in ours(model)(rows)))


@pytest.mark.parametrize("objective", ["clm", "rtd"])
def test_other_objectives_are_refused(objective, model):
    config = dataclasses.replace(model.config, objective=dataclasses.replace(model.config.objective, name=objective))
    with pytest.raises(UserError, match=f"objective.name is {objective}; --onnx writes masked models"):
        make_task(model._replace(config=config), [], False)


def test_nothing_is_written_where_the_folder_cannot_be_completed(model, tmp_path):
    seen = []

    def refuse(folder, exported):
        seen.append((folder / "model.safetensors").exists())
        raise Failure("refused")

    with pytest.raises(Failure, match="refused"):
        export(model.config.init_from, tmp_path / "served", model.config, complete=refuse)
    assert seen == [True]
    assert list(tmp_path.iterdir()) == []


def test_missing_packages_are_named_with_the_command(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name.startswith("onnx") else name)
    with pytest.raises(UserError) as raised:
        onnx.require_packages()
    assert str(raised.value).startswith("--onnx needs onnx, onnxscript, onnxruntime; pip install -r launch/onnx-")
    assert "\n" not in str(raised.value)


def test_texts_come_from_all_over_the_source(tmp_path):
    (tmp_path / "text.txt").write_text("\n".join(f"line {i}" for i in range(100)))
    assert onnx.sample_texts(f"text:{tmp_path / 'text.txt'}", 4) == ["line 0", "line 25", "line 50", "line 75"]
