"""Fine-tuned heads in transformers and sentence-transformers: the same logits, in both directions.

Run by `bash launch/test.sh --references`.
"""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from flax_mlm.config.load import build
from flax_mlm.configs import base
from flax_mlm.data.sources.open import open_source
from flax_mlm.data.tokenizer import Tokenizer
from flax_mlm.data.tokenizer_training import train_tokenizer
from flax_mlm.finetuning.heads import choose_kind
from flax_mlm.finetuning.saving import save_model
from flax_mlm.hf import task_heads
from flax_mlm.inference import classify, embeddings, parity
from flax_mlm.inference.config import read_config
from flax_mlm.inference.export import export
from flax_mlm.inference.load import LoadedModel, load_model
from flax_mlm.inference.task_head import TaskHead
from flax_mlm.model.heads import init_task_head
from tests.helpers.hf_folders import written

torch = pytest.importorskip("torch", reason="the reference needs torch")
transformers = pytest.importorskip("transformers", "5", reason="the reference needs transformers 5")
CrossEncoder = pytest.importorskip("sentence_transformers").CrossEncoder
transformers.utils.logging.disable_progress_bar()

CASES = [
    ("bert", "one label"), ("modernbert", "one label"), ("roberta", "a number of pairs"), ("electra", "several labels"),
    ("albert", "one label"), ("bert", "tags"), ("modernbert", "tags"), ("bert", "a number of pairs"),
    ("modernbert with biases", "several labels"), ("distilbert", "one label"), ("xlm-roberta", "tags"),
    ("albert", "tags"), ("electra", "tags"), ("modernbert", "a number of pairs"), ("bert", "several labels"),
]  # fmt: skip
TEXTS = ["The people elect.", "A law of the union, or of the states, is good.", "No."]
HEADS = {
    "one label": ("classification", "single_label_classification", ("bad", "good", "so so"), False),
    "several labels": ("classification", "multi_label_classification", ("a", "b"), False),
    "a number of pairs": ("classification", "regression", (), True),
    "tags": ("tagging", "token_classification", ("B-A", "I-A", "O"), False),
}


@pytest.fixture(scope="module")
def vocabulary() -> Tokenizer:
    lines = [line for chunk in open_source("builtin").chunks() for line in chunk.text.split("\n")]
    config = build(base.get_config()).tokenizer
    return train_tokenizer(lines[:3000], dataclasses.replace(config, vocab_size=1000))


def loaded(path: Path, **finetune) -> LoadedModel:
    config = build(read_config(str(path), {f"finetune.{name}": value for name, value in finetune.items()}))
    return load_model(str(path), config)


def kept(path: Path, what: str, where: Path, **finetune) -> LoadedModel:
    """The folder's encoder with a head of random weights, saved as a checkpoint and loaded again."""
    model = loaded(path, batch_size=8, max_length=40, **finetune)
    task, problem, labels, pairs = HEADS[what]
    head = TaskHead(task, problem, labels, choose_kind(model, task), pairs, "accuracy")
    params = init_task_head(jax.random.key(1), model.config.model, head.num_outputs, head.kind)
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda x: np.asarray(x) + rng.normal(0, 0.3, x.shape).astype(np.float32), params)
    whole = jax.sharding.NamedSharding(model.mesh, jax.sharding.PartitionSpec())
    params = {"encoder": model.params["encoder"], "task": jax.device_put(params, whole)}
    save_model(where, model, params, 10, head)
    return loaded(where)


@pytest.mark.parametrize(("kind", "what"), CASES)
def test_an_exported_head_computes_the_same(kind, what, vocabulary, tmp_path):
    pooling = "mean" if kind == "modernbert" and what == "one label" else "cls"
    model = kept(written(tmp_path / "first", kind, vocabulary), what, tmp_path / "kept", pooling=pooling)
    assert model.task_head.kind == ("prediction" if "modern" in kind else model.task_head.kind)
    output = tmp_path / "exported"
    with jax.default_matmul_precision("highest"):
        exported = export(str(tmp_path / "kept"), output, model.config)
        difference = parity.compare_folder(output, exported)
    assert difference.is_within(1e-4), difference.lines()
    settings = json.loads((output / "config.json").read_text())
    assert settings["id2label"] == {str(i): x for i, x in enumerate(model.task_head.labels or ["LABEL_0"])}
    again = loaded(output)  # as a folder of anyone
    assert again.task_head._replace(params=None, pairs=None, metric="") == model.task_head._replace(
        params=None, pairs=None, metric=""
    )
    assert (again.config.finetune.pooling, again.config.finetune.max_length) == (pooling, 40)
    rows = embeddings.tokenize(model, TEXTS, TEXTS[::-1] if model.task_head.pairs else None)
    ours = classify.run_head(model, model.task_head, rows)
    for a, b in zip(classify.run_head(again, again.task_head, rows), ours, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    check_pipeline(output, model, what, ours)


def check_pipeline(output: Path, model: LoadedModel, what: str, ours: list[np.ndarray]) -> None:
    """Opens the folder as users do, and compares with our outputs for `TEXTS`."""
    labels = model.task_head.labels
    if what == "a number of pairs":
        encoder = CrossEncoder(str(output), device="cpu", activation_fn=torch.nn.Identity())
        scores = encoder.predict(list(zip(TEXTS, TEXTS[::-1], strict=True)))
        np.testing.assert_allclose(scores, np.stack(ours)[:, 0], atol=1e-4)
    elif what == "tags":
        found = transformers.pipeline("token-classification", model=str(output), device="cpu", ignore_labels=[])(TEXTS)
        for words, output_LC in zip(found, ours, strict=True):
            assert [word["entity"] for word in words] == [labels[k] for k in output_LC[1:-1].argmax(-1)]
    else:
        found = transformers.pipeline("text-classification", model=str(output), device="cpu", top_k=None)(TEXTS)
        for entries, output_C in zip(found, ours, strict=True):
            x = output_C.astype(np.float64)
            expected = 1 / (1 + np.exp(-x)) if what == "several labels" else np.exp(x) / np.exp(x).sum()
            scores = {entry["label"]: entry["score"] for entry in entries}
            np.testing.assert_allclose([scores[label] for label in labels], expected, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "ending"),
    [
        *((kind, "ForSequenceClassification") for kind in ("bert", "roberta", "albert", "electra", "modernbert")),
        *((kind, "ForTokenClassification") for kind in ("bert", "modernbert")),
    ],
)
def test_a_folder_of_transformers_is_read(kind, ending, vocabulary, tmp_path):
    """Made by transformers alone, from its own classes and random weights."""
    path = written(tmp_path / "first", kind, vocabulary)
    config = transformers.AutoConfig.from_pretrained(path, num_labels=4)
    torch.manual_seed(0)
    net = getattr(transformers, f"AutoModel{ending}").from_config(config).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    net.save_pretrained(tmp_path / "theirs")
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (tmp_path / "theirs" / name).write_bytes((path / name).read_bytes())
    model = loaded(tmp_path / "theirs")
    assert model.task_head.labels == ("LABEL_0", "LABEL_1", "LABEL_2", "LABEL_3")
    with jax.default_matmul_precision("highest"):
        _, logits = parity.compare_head(net, model, embeddings.tokenize(model, TEXTS))
    assert logits <= 1e-4


def test_a_head_that_no_class_has_is_refused(vocabulary, tmp_path):
    path = written(tmp_path / "first", "bert", vocabulary)
    model = kept(path, "one label", tmp_path / "kept", head="linear")
    assert model.task_head.kind == "linear"
    about, bert = model.task_head.about(), folder_architecture(path)
    assert task_heads.refusal(bert, about, "mean").startswith("finetune.pooling = cls, not mean")
    assert "a head of kind tanh, not linear" in task_heads.refusal(bert, about, "cls")
    mean = dataclasses.replace(model.config.finetune, pooling="mean")
    assert (
        choose_kind(model._replace(config=dataclasses.replace(model.config, finetune=mean)), "classification")
        == "linear"
    )


def folder_architecture(path: Path):
    from flax_mlm.hf.folder import open_folder

    return open_folder(path).architecture
