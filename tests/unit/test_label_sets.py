"""Texts with several labels: how they are read, encoded, weighted and measured."""

import numpy as np
import pytest
import sklearn.metrics
from sklearn.utils.class_weight import compute_class_weight

from flax_mlm.data import tables
from flax_mlm.errors import UserError
from flax_mlm.evaluation import labels, metrics

_JSON = """{"text": "x", "labels": ["a", "b"]}
{"text": "y", "labels": []}
{"text": "z", "labels": "b"}
"""


@pytest.mark.parametrize(
    ("name", "content", "arguments"),
    [
        ("a.tsv", "text\tlabels\nx\ta, b\ny\t\nz\tb\n", {"separator": ","}),
        ("a.csv", 'text,labels\nx,"a|b"\ny,\nz,b\n', {"separator": "|"}),
        ("a.jsonl", _JSON, {}),
        ("b.csv", "text,a,b\nx,1,1\ny,0,0\nz,0,true\n", {"label": "a,b"}),
    ],
)
def test_every_spelling_gives_the_same_sets(tmp_path, name, content, arguments):
    (tmp_path / name).write_text(content)
    part = tables.read(str(tmp_path / name), **{"separator": ",", **arguments})
    assert part.labels == [("a", "b"), (), ("b",)]
    assert labels.has_sets(part)
    assert labels.find_set_classes(part) == ["a", "b"]
    np.testing.assert_array_equal(labels.encode_sets(part, "train", ["a", "b"]), [[1, 1], [0, 0], [0, 1]])


@pytest.mark.parametrize(
    ("content", "arguments", "message"),
    [
        ('{"text": "x", "labels": null}', {}, r"jsonl:1: labels has null"),
        ('{"text": "x", "labels": ["a", {}]}', {}, r"jsonl:1: labels has an object"),
        ('{"text": "x", "a": 1, "b": 2}', {"label": "a,b"}, "b is '2'; expected 0 or 1"),
        ('{"text": "x", "a": 1}', {"label": "a,b"}, "jsonl:1 has no b"),
    ],
)
def test_what_is_no_set_of_labels_is_one_line(tmp_path, content, arguments, message):
    (tmp_path / "x.jsonl").write_text(content + "\n")
    with pytest.raises(UserError, match=message):
        tables.read(str(tmp_path / "x.jsonl"), separator=",", **arguments)


def test_a_label_that_training_lacks_is_named():
    part = tables.Labelled(["x"], None, [("c",)])
    with pytest.raises(UserError, match="--test: example 1 has label 'c', which is not in the training set"):
        labels.encode_sets(part, "test", ["a", "b"])


def test_balanced_weights_are_those_of_scikit_learn():
    y = np.array([0, 0, 0, 1, 2, 2], np.int32)
    expected = compute_class_weight("balanced", classes=np.arange(3), y=y)
    np.testing.assert_allclose(labels.class_weights("balanced", y, ["a", "b", "c"]), expected, rtol=1e-6)
    sets = np.array([[1, 0], [1, 1], [1, 0], [0, 0]], np.float32)
    np.testing.assert_allclose(labels.class_weights("balanced", sets, ["a", "b"]), [1 / 3, 3], rtol=1e-6)
    np.testing.assert_allclose(labels.class_weights("b=2.5", y, ["a", "b", "c"]), [1, 2.5, 1])
    assert labels.class_weights("", y, ["a"]) is None


@pytest.mark.parametrize("average", ["micro", "macro"])
def test_f1_is_that_of_scikit_learn(average):
    rng = np.random.default_rng(0)
    gold, found = (rng.integers(0, 2, (50, 4)).astype(np.float32) for _ in range(2))
    expected = sklearn.metrics.f1_score(gold, found, average=average)
    assert metrics.evaluate(f"f1_{average}", gold, found, 4) == pytest.approx(expected)
