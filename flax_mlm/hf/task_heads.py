"""Heads of tasks as transformers has them: …ForSequenceClassification and …ForTokenClassification of each architecture.

A head is described by the entries of `inference.task_head.TaskHead.about`.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from flax_mlm.errors import UserError
from flax_mlm.hf.architecture import Architecture
from flax_mlm.hf.folder import Folder

_OBJECTIVE_ENDINGS = ("ForMaskedLM", "LMHeadModel", "ForCausalLM", "ForPreTraining")  # of names of classes
_ENDINGS = {"classification": "ForSequenceClassification", "tagging": "ForTokenClassification"}
_PROBLEMS = ("single_label_classification", "multi_label_classification", "regression")


class _Layout(NamedTuple):
    """Names of the weights of a head."""

    kind: str  # of `model.heads.TASK_HEADS`
    out: str = "classifier"
    dense: str = ""
    norm: str = ""


_ROBERTA = _Layout("tanh", "classifier.out_proj", "classifier.dense")
_MODERNBERT = _Layout("prediction", "classifier", "head.dense", "head.norm")
_OF_TEXTS = {  # model_type -> layout; all but ModernBERT read the state of the first token
    "bert": _Layout("tanh", "classifier", "bert.pooler.dense"),
    **dict.fromkeys(("roberta", "xlm-roberta", "camembert"), _ROBERTA),
    "albert": _Layout("tanh", "classifier", "albert.pooler"),
    "electra": _Layout("gelu", "classifier.out_proj", "classifier.dense"),
    "distilbert": _Layout("relu", "classifier", "pre_classifier"),
    "modernbert": _MODERNBERT,
}


def head_kind(architecture: Architecture, task: str, pooling: str) -> str:
    """Returns the kind of head that the architecture's class has; empty where it has none with this pooling."""
    if architecture.objective == "clm" or architecture.model_type not in _OF_TEXTS:
        return ""
    if task == "classification" and pooling not in _poolings(architecture):
        return ""
    return _layout(architecture, task).kind


def _layout(architecture: Architecture, task: str) -> _Layout:
    layout = _OF_TEXTS[architecture.model_type]
    return layout if task == "classification" or layout.kind == "prediction" else _Layout("linear")


def _poolings(architecture: Architecture) -> tuple[str, ...]:
    return ("cls", "mean") if architecture.model_type == "modernbert" else ("cls",)


def refusal(architecture: Architecture, about: Mapping[str, Any], pooling: str) -> str:
    """Says why a head cannot be written as a class of the architecture; empty where it can."""
    needed = head_kind(architecture, about["task"], pooling)
    if needed == about["head"]:
        return ""
    if architecture.objective == "clm" or architecture.model_type not in _OF_TEXTS:
        return f"no {_ENDINGS[about['task']]} that we write"
    if not needed:
        return f"finetune.pooling = {' or '.join(_poolings(architecture))}, not {pooling}, and fine-tuning again"
    return f"a head of kind {needed}, not {about['head']}: fine-tune again with finetune.head=auto"


def class_name(architecture: Architecture, task: str) -> str:
    """Returns the name of the class in transformers that has the task's head."""
    ending = next(ending for ending in _OBJECTIVE_ENDINGS if architecture.class_name.endswith(ending))
    return architecture.class_name.removesuffix(ending) + _ENDINGS[task]


def to_tensors(architecture: Architecture, task: str, params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Converts the parameters of a head to weights by name."""
    layout = _layout(architecture, task)
    parts = {layout.out: params, layout.dense: params.get("dense", {}), layout.norm: params.get("norm", {})}
    tensors = {}
    for name, part in parts.items():
        for key, suffix in (("kernel", "weight"), ("scale", "weight"), ("bias", "bias")):
            if name and key in part:
                array = np.asarray(part[key], np.float32)
                tensors[f"{name}.{suffix}"] = np.ascontiguousarray(array.T)
    return tensors


def to_config(architecture: Architecture, about: Mapping[str, Any], pooling: str, dropout: float) -> dict[str, Any]:
    """Returns the keys of config.json that describe a head."""
    labels = about["labels"] or ["LABEL_0"]
    keys: dict[str, Any] = {
        "architectures": [class_name(architecture, about["task"])],
        "id2label": {str(i): label for i, label in enumerate(labels)},
        "label2id": {label: i for i, label in enumerate(labels)},
        "classifier_dropout": dropout,
    }
    if architecture.model_type == "distilbert":
        keys["seq_classif_dropout"] = keys.pop("classifier_dropout")
    elif architecture.model_type == "albert":
        keys["classifier_dropout_prob"] = keys.pop("classifier_dropout")
    if about["task"] == "classification":
        keys["problem_type"] = about["problem_type"]
        if architecture.model_type == "modernbert":
            keys["classifier_pooling"] = pooling
    return keys


def describe(folder: Folder) -> dict[str, Any] | None:
    """Describes the head of a folder as `TaskHead.about` does, with `pooling`; None where there is none.

    Raises:
      UserError: its labels or the kind of problem cannot be used.
    """
    config, architecture = folder.config, folder.architecture
    named = config.get("architectures")
    name = named[0] if isinstance(named, list) and named else ""
    tasks = [task for task, ending in _ENDINGS.items() if isinstance(name, str) and name.endswith(ending)]
    if not tasks or not head_kind(architecture, tasks[0], "cls"):
        return None
    task, has_pooling = tasks[0], architecture.model_type == "modernbert"
    pooling = config.get("classifier_pooling", "cls") if has_pooling else "cls"
    where = f"init_from: {folder.path / 'config.json'} has"
    if task == "classification" and pooling not in _poolings(architecture):
        raise UserError(f"{where} classifier_pooling = {pooling!r}; expected {' or '.join(_poolings(architecture))}")
    table = config.get("id2label") or {"0": "LABEL_0", "1": "LABEL_1"}  # what transformers takes where there is none
    labels = [table.get(str(i)) for i in range(len(table))] if isinstance(table, dict) else [None]
    if None in labels or len({*labels}) < len(labels) or not all(isinstance(label, str) for label in labels):
        raise UserError(f"{where} id2label = {str(table)[:60]}; expected labels that differ, numbered from 0")
    problem = "token_classification"
    if task == "classification":
        problem = config.get("problem_type") or ("regression" if len(labels) == 1 else _PROBLEMS[0])
        if problem not in _PROBLEMS or (problem == "regression" and len(labels) > 1):
            raise UserError(f"{where} problem_type = {problem!r} and {len(labels)} labels; expected one of theirs")
    kind = _layout(architecture, task).kind
    about = {"task": task, "problem_type": problem, "labels": [] if problem == "regression" else labels, "head": kind}
    return {**about, "pairs": None, "metric": "", "pooling": pooling}


def weight_names(folder: Folder, task: str, with_bias: bool) -> dict[str, tuple[str, ...]]:
    """Returns name of a weight -> keys of the parameter of the head.

    Args:
      with_bias: a ModernBERT's dense layer and normalisation have biases.
    """
    layout = _layout(folder.architecture, task)
    names: dict[str, tuple[str, ...]] = {f"{layout.out}.weight": ("kernel",), f"{layout.out}.bias": ("bias",)}
    has_bias = with_bias or layout.kind != "prediction"
    for name, part, key in ((layout.dense, "dense", "kernel"), (layout.norm, "norm", "scale")):
        if name:
            names[f"{name}.weight"] = (part, key)
            names |= {f"{name}.bias": (part, "bias")} if has_bias else {}
    return names


def from_tensors(folder: Folder, about: Mapping[str, Any], abstract: Any, with_bias: bool) -> dict[str, Any]:
    """Reads the parameters of a head, float32.

    Args:
      about: from `describe`.
      abstract: nested dict of their shapes.

    Raises:
      UserError: a weight is missing, not finite, or has another shape.
    """
    tensors, params = folder.tensors(), dict[str, Any]()
    for name, path in weight_names(folder, about["task"], with_bias).items():
        if name not in tensors:
            raise UserError(f"init_from: '{folder.path}' lacks {name} of its head; use another folder")
        array, expected, inner = np.asarray(tensors[name], np.float32).T, abstract, params
        for key in path:
            expected = expected[key]
        if array.shape != expected.shape or not np.isfinite(array).all():
            what = f"{name} has shape {array.T.shape}" if array.shape != expected.shape else f"{name} is not finite"
            raise UserError(f"init_from: '{folder.path}': {what}; expected {expected.shape[::-1]}, finite numbers")
        for key in path[:-1]:
            inner = inner.setdefault(key, {})
        inner[path[-1]] = np.ascontiguousarray(array)
    return params


def read_pooler(folder: Folder, hidden_size: int) -> dict[str, Any]:
    """Reads the pretrained layer with which transformers begins a head on texts; empty where the folder has none."""
    layout = _OF_TEXTS.get(folder.architecture.model_type)
    if layout is None or "pooler" not in layout.dense:
        return {}
    tensors = folder.tensors()
    weight, bias = (tensors.get(f"{layout.dense}.{name}") for name in ("weight", "bias"))
    if weight is None or bias is None or weight.shape != (hidden_size, hidden_size) or bias.shape != (hidden_size,):
        return {}
    return {"dense": {"kernel": np.asarray(weight, np.float32).T.copy(), "bias": np.asarray(bias, np.float32)}}
