"""Folders of sentence-transformers: what of their files makes vectors. Vectors themselves: test_hf_reference.py."""

import json
from pathlib import Path

import pytest

from flax_mlm.config.load import build
from flax_mlm.data.tokenizer import load_tokenizer
from flax_mlm.errors import UserError
from flax_mlm.hf import sentence_transformers
from flax_mlm.inference.config import read_config
from tests.helpers.hf_folders import written

KINDS = ("Transformer", "Pooling", "Normalize")


@pytest.fixture(scope="module")
def template(toy, tmp_path_factory) -> Path:
    return written(tmp_path_factory.mktemp("encoder") / "bert", "bert", load_tokenizer(toy.corpus))


@pytest.fixture
def path(template, tmp_path) -> Path:
    """A folder of Transformer, Pooling by mean and Normalize."""
    path = tmp_path / "encoder"
    path.mkdir()
    for file in template.iterdir():
        (path / file.name).symlink_to(file)
    put(path, "modules.json", modules(*KINDS))
    put(path, "1_Pooling/config.json", {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False})
    return path


def modules(*kinds: str) -> list[dict[str, str]]:
    paths = {"Transformer": "", "Pooling": "1_Pooling"}
    return [{"path": paths.get(kind, kind), "type": f"sentence_transformers.models.{kind}"} for kind in kinds]


def put(path: Path, name: str, content) -> None:
    (path / name).parent.mkdir(exist_ok=True)
    (path / name).unlink(missing_ok=True)
    (path / name).write_text(content if isinstance(content, str) else json.dumps(content))


@pytest.mark.parametrize(
    ("name", "content", "length"),
    [
        ("sentence_bert_config.json", {"max_seq_length": 16, "do_lower_case": False}, 16),
        ("sentence_roberta_config.json", {"max_seq_length": 17}, 17),
        ("sentence_bert_config.json", {"max_seq_length": 512}, 64),  # positions
        ("sentence_bert_config.json", {"max_seq_length": None}, 64),
        ("sentence_bert_config.json", {}, 64),
        ("tokenizer_config.json", {"model_max_length": 18}, 18),
        ("tokenizer_config.json", {"model_max_length": int(1e30)}, 64),
        ("tokenizer_config.json", {}, 64),
    ],
)
def test_texts_are_as_long_as_the_folder_says(name, content, length, path):
    put(path, name, content)
    assert build(read_config(str(path))).finetune.max_length == length
    assert read_config(str(path), {"finetune.max_length": 9}).finetune.max_length == 9


@pytest.mark.parametrize(("limit", "length"), [(20, 20), (int(1e30), 128), (None, 128)])
def test_texts_of_other_folders_are_no_longer_than_their_tokenizer_allows(limit, length, path):
    (path / "modules.json").unlink()
    put(path, "tokenizer_config.json", {"model_max_length": limit})
    assert read_config(str(path)).finetune.max_length == length


@pytest.mark.parametrize(
    ("stored", "prompt"),
    [
        ({"prompts": {"query": "query: "}, "default_prompt_name": "query"}, "query: "),
        ({"prompts": {"query": "query: "}, "default_prompt_name": None}, ""),
        ({"prompts": {"query": "query: "}}, ""),
        ({"prompts": {}}, ""),
        ({}, ""),
    ],
)
def test_the_default_prompt_is_that_of_the_folder(stored, prompt, path):
    put(path, "config_sentence_transformers.json", stored)
    assert build(read_config(str(path))).finetune.prompt == prompt
    assert read_config(str(path), {"finetune.prompt": "x"}).finetune.prompt == "x"


@pytest.mark.parametrize(
    ("stored", "pooling"),
    [
        ({"pooling_mode_mean_tokens": True}, "mean"),
        ({"pooling_mode_cls_token": True, "pooling_mode_max_tokens": False}, "cls"),
        ({"pooling_mode_lasttoken": True}, "last"),
        ({"pooling_mode": "lasttoken"}, "last"),
        ({"pooling_mode": ["cls"], "include_prompt": False}, "cls"),
        ({"word_embedding_dimension": 32}, "mean"),
    ],
)
def test_the_pooling_is_that_of_the_folder(stored, pooling, path):
    put(path, "1_Pooling/config.json", stored)
    assert build(read_config(str(path))).finetune.pooling == pooling


PROMPT = {"prompts": {"query": "query: "}, "default_prompt_name": "query"}


@pytest.mark.parametrize(
    ("files", "what"),
    [
        ({"modules.json": modules(*KINDS, "Dense")}, "Dense"),
        ({"modules.json": modules(*KINDS, "LayerNorm")}, "LayerNorm"),
        ({"modules.json": modules("Transformer")}, "Pooling"),
        ({"modules.json": [*modules(*KINDS), {"path": "", "type": "own_code.Transformer"}]}, "own_code.Transformer"),
        ({"1_Pooling/config.json": {"pooling_mode_max_tokens": True}}, "Pooling"),
        ({"1_Pooling/config.json": {"pooling_mode_max_tokens": True, "pooling_mode_cls_token": True}}, "Pooling"),
        ({"1_Pooling/config.json": {"pooling_mode": ["cls", "mean"]}}, "Pooling"),
        ({"1_Pooling/config.json": {"pooling_mode": 7}}, "Pooling"),
        ({"sentence_bert_config.json": {"do_lower_case": True}}, "do_lower_case"),
        ({"tokenizer_config.json": {"truncation_side": "left"}}, "truncation_side = left"),
        ({"sentence_bert_config.json": {"processing_kwargs": {"text": {"max_length": 9}}}}, "processing_kwargs"),
        (
            {"config_sentence_transformers.json": PROMPT, "1_Pooling/config.json": {"include_prompt": False}},
            "include_prompt = false",
        ),
        (
            {
                "config_sentence_transformers.json": {"similarity_fn_name": "dot"},
                "modules.json": modules("Transformer", "Pooling"),
            },
            "similarity_fn_name = dot",
        ),
    ],
)
def test_what_else_changes_vectors_is_refused_by_name(files, what, path):
    for name, content in files.items():
        put(path, name, content)
    with pytest.raises(UserError, match=f"makes vectors with {what}, which .*; set finetune.pooling"):
        read_config(str(path))
    assert build(read_config(str(path), {"finetune.pooling": "mean"})).finetune.pooling == "mean"


def test_an_encoder_may_be_trained_further_without_its_modules(path):
    put(path, "modules.json", modules(*KINDS, "Dense"))
    from flax_mlm.configs import base
    from flax_mlm.inference.config import apply_folder

    config = base.get_config()
    config.init_from = str(path)
    apply_folder(config)
    assert config.finetune.pooling == "mean"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("modules.json", "[", "modules.json cannot be read as JSON"),
        ("modules.json", {"x": 1}, "modules.json holds no JSON list"),
        ("modules.json", ["x"], "modules.json is no list of modules with type and path"),
        ("modules.json", [{"path": 5, "type": "x"}], "modules.json is no list of modules"),
        ("1_Pooling/config.json", "[]", "config.json holds no JSON object"),
        ("sentence_bert_config.json", {"max_seq_length": "16"}, "max_seq_length = '16'; expected a number"),
        ("sentence_bert_config.json", {"max_seq_length": -1}, "max_seq_length = -1; expected a number"),
        ("config_sentence_transformers.json", {"default_prompt_name": "q"}, "no text for default_prompt_name = 'q'"),
        ("config_sentence_transformers.json", {"prompts": 5, "default_prompt_name": "q"}, "no text for default_prompt"),
    ],
)
def test_damaged_files_are_refused_by_name(name, content, message, path):
    put(path, name, content)
    with pytest.raises(UserError, match=message) as e:
        read_config(str(path))
    assert "\n" not in str(e.value)


def test_what_is_written_is_read_again(path):
    config = build(read_config(str(path), {"finetune.pooling": "last", "finetune.prompt": "passage: "}))
    for name, content in sentence_transformers.files(config.finetune, 24, 32).items():
        put(path, name, content)
    found = build(read_config(str(path))).finetune
    assert (found.pooling, found.prompt, found.max_length) == ("last", "passage: ", 24)
