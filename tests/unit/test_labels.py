"""Labels: counted before fine-tuning, encoded, and refused where they stand for nothing."""

import numpy as np
import pytest

from flax_mlm.data.tables import Labelled
from flax_mlm.errors import UserError
from flax_mlm.evaluation import labels


def labelled(*values: str) -> Labelled:
    return Labelled(["a text"] * len(values), None, list(values), [f"a.csv:{i + 2}" for i in range(len(values))])


@pytest.mark.parametrize("label", ["nan", "NaN", "inf", "-inf", "Infinity", "1e39", "3,5", "1_5", "high", "True"])
def test_what_is_no_number_is_named_with_its_line(label):
    with pytest.raises(UserError, match=f"--dev: a.csv:3 has label '{label}', not a number"):
        labels.to_numbers(labelled("1", label, "2"), "dev")


@pytest.mark.parametrize("same", [["3"], ["3", "3.0"]])
def test_equal_numbers_have_no_correlation(same):
    with pytest.raises(UserError, match="--test: all labels are 3; a correlation needs at least two"):
        labels.to_numbers(labelled(*same), "test")


def test_numbers_are_read():
    assert labels.to_numbers(labelled("1", " -2.5", "1e-3"), "train").tolist() == np.float32([1, -2.5, 1e-3]).tolist()


@pytest.mark.parametrize("label", ["nan", "NaN", "NAN", "inf", "-Infinity"])
def test_nan_is_no_class(label):
    with pytest.raises(UserError, match=f"--train: a.csv:3 has label '{label}', which is no class"):
        labels.find_classes(labelled("a", label, "b"))


@pytest.mark.parametrize("label", ["[0, 2]", "['a']", "(0, 1)", "{'a': 1}", "a,b", "b | a"])
def test_a_list_is_no_class(label):
    with pytest.raises(UserError, match=r"--train: a.csv:3 has label '.*', which is a list of labels; expected one"):
        labels.find_classes(labelled("a", label, "b"))


def test_a_class_may_contain_a_comma():
    assert labels.find_classes(labelled("arts", "arts, culture", "(sic)")) == ["(sic)", "arts", "arts, culture"]


def test_one_class_is_too_few():
    with pytest.raises(UserError, match="--train: all labels are 'a'; classification needs at least two"):
        labels.find_classes(labelled("a", "a"))


def test_unknown_labels_are_named_with_their_line():
    with pytest.raises(UserError, match=r"--test: a.csv:3 has label 'Dog', which is not .*; did you mean 'dog'\?"):
        labels.encode(labelled("cat", "Dog"), "test", ["bird", "cat", "dog"])


def test_spaces_around_labels_are_stripped():
    assert labels.stripped(labelled("1", "1 ", "\u00a00"), "train", print).labels == ["1", "1", "0"]


def test_stripped_spaces_are_said(capsys):
    labels.stripped(labelled("1", "1 ", "\t0"), "train", print)
    assert capsys.readouterr().out.startswith("note: --train: 2 labels had spaces around them, such as '1 '")


def test_classes_are_counted():
    lines = labels.describe({"train": ["b", "a", "b"], "dev": ["a"]}, "texts")
    assert list(lines) == ["train  3 texts: b: 2, a: 1", "dev    1 texts: a: 1"]


def test_the_commonest_classes_are_listed():
    (line,) = labels.describe({"train": [chr(65 + i) * (i + 1) for i in range(26)]}, "texts")
    assert line.endswith("and 6 more")


def test_numbers_are_summed_up():
    lines = labels.describe({"train": np.float32([0, 5, 2.5])}, "texts")
    assert list(lines) == ["train  3 texts: 0 to 5, mean 2.5"]


@pytest.mark.parametrize(
    "alike",
    [("pos", "Pos"), ("not good", "notgood"), ("no\u200bte", "note"), ("1", "1.0"), ("01", "1"), ("\uff21", "A")],
)
def test_labels_that_look_alike_are_said(alike):
    *_, line = labels.describe({"train": [alike[0], "other"], "dev": [alike[1]]}, "texts")
    assert line.endswith("are different labels; spell them alike if they mean the same")


@pytest.mark.parametrize("label", ["None", "NA", "<NA>", "-", "null"])
def test_labels_that_stand_for_missing_ones_are_said(label):
    *_, line = labels.describe({"train": ["a", label, label]}, "texts")
    assert (
        line
        == f"WARNING: --train: '{label}' (2 texts) often stands for a missing label; delete these lines where it does"
    )


@pytest.mark.parametrize("different", [("pos", "neg"), ("+1", "-1"), ("a-b", "ab"), ("1", "1.5")])
def test_other_labels_are_not_alike(different):
    assert len(list(labels.describe({"train": different}, "texts"))) == 1
