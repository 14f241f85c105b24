"""Hugging Face folders written and read without torch. What transformers makes of them: test_hf_reference.py."""

import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import flax_mlm
from flax_mlm.cli.app import config_of
from flax_mlm.config.load import build
from flax_mlm.configs import base
from flax_mlm.data.json_tokenizer import HuggingFaceTokenizer
from flax_mlm.data.tokenizer import Tokenizer, load_tokenizer
from flax_mlm.data.tokenizer_training import train_tokenizer
from flax_mlm.errors import UserError
from flax_mlm.evaluation import registry
from flax_mlm.hf import bert, folder, modernbert, tokenizer_json
from flax_mlm.hf.folder import ARCHITECTURES, matching_architecture
from flax_mlm.hf.weights import ParamMapping, param_mappings, params_to_tensors
from flax_mlm.inference import embeddings
from flax_mlm.inference.config import read_config, usual_learning_rate
from flax_mlm.inference.load import load_model
from flax_mlm.model import heads
from flax_mlm.training import metrics
from tests.helpers import tokenizer_files
from tests.helpers.hf_folders import BERT, MODERN, SHAPES, SMALL, model_config, opened, started, written


@pytest.fixture(scope="module")
def vocabulary(toy) -> Tokenizer:
    return load_tokenizer(toy.corpus)


@pytest.mark.parametrize("kind", SHAPES)
def test_every_parameter_has_exactly_one_mapping(kind):
    architecture, fields = SHAPES[kind]
    model = model_config(**fields)
    net = heads.language_model(model, 100)
    shapes = jax.eval_shape(net.init, jax.random.key(0))
    mappings: list[ParamMapping] = list(param_mappings(architecture, shapes, net.dims, model.num_layers))
    names = [name for mapping in mappings for layer in mapping.names for name in layer]
    assert len(mappings) == len(jax.tree.leaves(shapes)) == len({mapping.path for mapping in mappings})
    assert len(names) == len(set(names))
    params = {"/".join(mapping.path) for mapping in mappings}
    for rule in architecture.weights:
        assert any(path.startswith(rule.param) for path in params), "every row of the table is used"
    assert not set(architecture.tied) & set(names)
    assert set(architecture.tied.values()) <= set(names)


@pytest.mark.parametrize("kind", SHAPES)
def test_to_and_from_config_json_are_inverse(kind):
    architecture, fields = SHAPES[kind]
    model = model_config(**fields)
    config = architecture.to_hf_config(model, SimpleNamespace(pad_id=3, cls_id=1, sep_id=2))
    assert all(getattr(model, name) == value for name, value in architecture.from_hf_config(config).items())


@pytest.mark.parametrize("kind", SHAPES)
def test_export_import_export_gives_the_same_bytes(kind, vocabulary, tmp_path):
    first = written(tmp_path / "first", kind, vocabulary)
    config, training, state, _ = started(first)
    architecture, fields = SHAPES[kind]
    for name, value in {**SMALL, **fields}.items():
        assert getattr(config.model, name) == value, name
    mappings = list(param_mappings(architecture, state.params, training.forward.model.dims, config.model.num_layers))
    tensors = params_to_tensors(mappings, jax.device_get(state.params), vocabulary.pad_id + 1)
    folder.write_tensors(tmp_path / "second.safetensors", tensors)
    assert (tmp_path / "second.safetensors").read_bytes() == (first / "model.safetensors").read_bytes()


def test_an_average_begins_with_the_weights_of_the_folder(vocabulary, tmp_path):
    path = written(tmp_path / "first", "bert", vocabulary)
    _, _, state, _ = started(path, averaging="ema")
    expected = started(path)[2].params
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state.params), jax.device_get(expected))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state.average), jax.device_get(expected))


@pytest.mark.parametrize("kind", ["bert", "modernbert"])
def test_weights_in_several_files_under_old_names(kind, vocabulary, tmp_path):
    """Shards; `gamma` and `beta`; a tied decoder stored too; the poolers of BERT."""
    first = written(tmp_path / "first", kind, vocabulary)
    whole = started(first)[2]
    tensors = load_file(first / "model.safetensors")
    architecture = SHAPES[kind][0]
    for name, twin in architecture.tied.items():
        tensors[name] = tensors[twin]
    if kind == "bert":
        tensors = {
            name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
            for name, tensor in tensors.items()
        }
        tensors["bert.pooler.dense.weight"] = np.zeros((32, 32), np.float32)
        tensors["bert.embeddings.position_ids"] = np.arange(64)[None]
    (first / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(names)}
    for file in set(weight_map.values()):
        save_file({name: tensors[name] for name in names if weight_map[name] == file}, first / file)
    (first / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    _, _, state, log = started(first)
    jax.tree.map(np.testing.assert_array_equal, state.params, whole.params)
    left_out = [line for line in log if "left out" in line]
    if kind == "bert":
        assert "bert.embeddings.position_ids" in left_out[0]
        assert "bert.pooler.dense.weight" in left_out[0]
    else:
        assert left_out == []


def test_bfloat16_and_half_weights(vocabulary, tmp_path):
    first = written(tmp_path / "first", "bert", vocabulary)
    exact = started(first)[2].params
    for dtype in ("bfloat16", "float16"):
        tensors = {name: x.astype(jax.numpy.dtype(dtype)) for name, x in load_file(first / "model.safetensors").items()}
        save_file(tensors, first / "model.safetensors")
        found = started(first)[2].params
        rounded = jax.tree.map(lambda x, d=dtype: x.astype(d).astype("float32"), exact)
        if dtype == "bfloat16":
            jax.tree.map(np.testing.assert_array_equal, found, rounded)
        assert all(x.dtype == np.float32 for x in jax.tree.leaves(found))


def test_an_encoder_without_head_needs_a_new_one(vocabulary, tmp_path):
    """As sentence encoders and classifiers are saved."""
    first = written(tmp_path / "first", "bert", vocabulary)
    whole = started(first)[2]
    tensors = load_file(first / "model.safetensors")
    encoder = {name: x for name, x in tensors.items() if name.startswith("bert.")}
    save_file({name.removeprefix("bert."): x for name, x in encoder.items()}, first / "model.safetensors")
    with pytest.raises(UserError, match=r"no vocabulary head \(it lacks cls.predictions.* set reinit_head=True"):
        started(first)
    _, _, state, log = started(first, reinit_head=True)
    jax.tree.map(np.testing.assert_array_equal, state.params["encoder"], whole.params["encoder"])
    assert "    the vocabulary head is new" in log
    assert not np.asarray(state.params["head"]["decoder_bias"]).any()

    save_file({**encoder, "classifier.weight": np.zeros((2, 32), np.float32)}, first / "model.safetensors")
    _, _, state, log = started(first, reinit_head=True)
    assert "    left out: classifier.weight" in log


def test_an_encoder_without_head_makes_vectors_and_fills_no_masks(vocabulary, tmp_path, capsys):
    path = written(tmp_path / "first", "bert", vocabulary)
    expected = flax_mlm.load(path).embed(["the dog"])
    tensors = load_file(path / "model.safetensors")
    encoder = {name.removeprefix("bert."): x for name, x in tensors.items() if name.startswith("bert.")}
    save_file(encoder, path / "model.safetensors")
    capsys.readouterr()
    model = flax_mlm.load(path)
    np.testing.assert_array_equal(model.embed(["the dog"]), expected)
    assert "head is new" not in capsys.readouterr().err
    for use in (model.fill_mask, lambda text: model.logits([text]), lambda text: model.log_likelihood([text])):
        with pytest.raises(UserError, match="has no vocabulary head"):
            use("the [MASK]")
    with pytest.raises(UserError, match="has no vocabulary head"):
        registry.evaluate("mlm", model._model, print, mask_rates="")


def test_an_evaluated_folder_is_told_whose_text_is_held_out(vocabulary, tmp_path, capsys):
    path = written(tmp_path / "first", "bert", vocabulary)
    (tmp_path / "a").write_text("\n\n".join(f"the dog barks {'and barks ' * i}" for i in range(60)))
    overrides = {"data.source": f"text:{tmp_path}/a", "data.cache_dir": str(tmp_path / "cache"), "eval.batch_size": 8}
    model = load_model(str(path), build(read_config(str(path), overrides)))
    registry.evaluate("mlm", model, lambda: None, mask_rates="")
    assert f"the held-out text is of text:{tmp_path}/a, not of the model's own" in capsys.readouterr().err


def test_a_tokenizer_without_a_template_is_said(vocabulary, tmp_path):
    path = written(tmp_path / "bert", "bert", vocabulary)
    assert not [line for line in started(path)[3] if line.startswith("note:")]
    spec = json.loads((path / "tokenizer.json").read_text())
    (path / "tokenizer.json").write_text(json.dumps(spec | {"post_processor": None}))
    assert any("has no template with [CLS] and [SEP] around a text" in line for line in started(path)[3])


def breakages():
    def config(**changes):
        def go(path: Path):
            settings = json.loads((path / "config.json").read_text()) | changes
            (path / "config.json").write_text(json.dumps({k: v for k, v in settings.items() if v != "absent"}))

        return go

    def weights(change):
        def go(path: Path):
            tensors = load_file(path / "model.safetensors")
            change(tensors)
            save_file(tensors, path / "model.safetensors")

        return go

    def content(name: str, change):
        def go(path: Path):
            (path / name).write_bytes(change((path / name).read_bytes()))

        return go

    def pickled(path: Path):
        (path / "model.safetensors").rename(path / "pytorch_model.bin")

    word = "bert.embeddings.word_embeddings.weight"
    yield "truncated weights", content("model.safetensors", lambda b: b[: len(b) // 2]), "is damaged or not safetensors"
    yield "empty weights", content("model.safetensors", lambda b: b""), "is damaged or not safetensors"
    yield "a flipped header", content("model.safetensors", lambda b: b[:20] + b"\xff" + b[21:]), "is damaged or not"
    yield "other bytes", content("model.safetensors", lambda b: b"PK\x03\x04" + b), "is damaged or not safetensors"
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 123\n"
    for name in ("model.safetensors", "tokenizer.json"):
        yield f"a pointer to {name}", content(name, lambda _: pointer), f"{name} is a Git LFS pointer.*: git lfs pull"
    yield "a pickle", pickled, "holds only pytorch_model.bin, a pickle, which can run code"
    yield "no weights", lambda p: (p / "model.safetensors").unlink(), "holds no weights"
    yield "no config", lambda p: (p / "config.json").unlink(), r"config.json cannot be read as JSON \(No such file"
    yield "truncated config", content("config.json", lambda b: b[:30]), "config.json cannot be read as JSON"
    yield "a list for config", content("config.json", lambda b: b"[]"), "config.json holds no JSON object"
    yield "nested config", content("config.json", lambda b: b"[" * 100_000), "config.json cannot be read as JSON"
    yield "another model", config(model_type="llama"), "holds a model of type llama; expected one of albert, bert"
    yield "another activation", config(hidden_act="relu"), "hidden_act = 'relu'; expected one of gelu, gelu_python"
    yield "other positions", config(position_embedding_type="relative_key"), "expected 'absolute'"
    yield "untied", config(tie_word_embeddings=False), "tie_word_embeddings = False; expected True"
    yield "no such padding", config(pad_token_id="0"), "pad_token_id = '0'; expected a token id"
    yield "no layers", config(num_hidden_layers=0), "num_hidden_layers = 0; expected a positive number"
    yield "a text for a number", config(hidden_size="32"), "hidden_size = '32'; expected a positive number"
    yield "a size left out", config(hidden_size="absent"), "hidden_size = None; expected a positive number"
    yield "heads that do not divide", config(num_attention_heads=3), "expected a number divisible by model.num_heads, 3"
    yield "more layers than weights", config(num_hidden_layers=4), "lacks bert.encoder.layer.3.attention"
    yield (
        "fewer layers",
        config(num_hidden_layers=2),
        "has bert.encoder.layer.2.attention.* and 12 more, which our model does not use",
    )
    yield "another width", config(intermediate_size=64), "intermediate.dense.bias has shape \\(48,\\); the config"
    yield "a lacking weight", weights(lambda t: t.pop(word)), f"lacks {word}$"
    yield "an extra weight", weights(lambda t: t.update(extra=t[word])), "has extra, which our model does not use"
    yield (
        "an untied decoder",
        weights(lambda t: t.update({"cls.predictions.decoder.weight": t[word] + 1})),
        "our model ties",
    )
    yield (
        "int8 weights",
        weights(lambda t: t.update({word: t[word].astype("int8")})),
        f"has {word} of int8, where float32",
    )
    yield (
        "quantized weights",
        config(quantization_config={"bits": 8}),
        "quantization_config = .'bits': 8.; expected None",
    )
    yield "other rows", config(vocab_size=401), f"has 400 rows in {word}, but vocab_size = 401"
    yield "far more rows", config(vocab_size=999), "an embedding of 999 rows, but the tokenizer has 400 tokens; set"
    yield "fewer rows", config(vocab_size=399), "399 rows, but the tokenizer has 400 tokens: '.+' and all that follow"
    yield "another padding", config(pad_token_id=7), r"pad_token_id = 7; the tokenizer has \[PAD\] as"
    yield "another mask", config(mask_token_id=7), r"mask_token_id = 7; the tokenizer has \[MASK\] as"
    yield "another beginning", config(cls_token_id=9), r"cls_token_id = 9; the tokenizer has \[CLS\] as"
    yield (
        "odd architectures",
        config(model_type="absent", position_embedding_type="absent", architectures=5),
        "of type None",
    )


BREAKAGES = {name: rest for name, *rest in breakages()}


@pytest.mark.parametrize("name", BREAKAGES)
def test_a_folder_that_will_not_do(name, vocabulary, tmp_path):
    path = written(tmp_path / "first", "bert", vocabulary)
    change, message = BREAKAGES[name]
    change(path)
    with pytest.raises(UserError, match=message) as e:
        started(path)
    assert ("\n" not in str(e.value) and str(tmp_path) in str(e.value)) or "divisible" in message


def test_configs_of_transformers_4_and_5(vocabulary, tmp_path):
    path = written(tmp_path / "first", "modernbert", vocabulary)
    settings = json.loads((path / "config.json").read_text())
    older = folder.open_folder(str(path)).model_fields
    for key in ("global_attn_every_n_layers", "global_rope_theta", "local_rope_theta"):
        settings.pop(key)
    settings["layer_types"] = ["full_attention", "sliding_attention", "sliding_attention"]
    settings["rope_parameters"] = {
        "full_attention": {"rope_type": "default", "rope_theta": 10_000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
    }
    (path / "config.json").write_text(json.dumps(settings))
    assert folder.open_folder(str(path)).model_fields == older
    for change in ({"layer_types": ["sliding_attention", "full_attention", "full_attention"]}, {"norm_bias": True}):
        (path / "config.json").write_text(json.dumps(settings | change))
        with pytest.raises(
            UserError,
            match=r"layer_types = .*; expected full_attention|norm_bias = True; expected a bool, the same",
        ):
            folder.open_folder(str(path))


ODD = (7, 0.5, "x", True, [], ["x"], [[]], [None], {}, {"x": 1}, {"full_attention": 3}, {"full_attention": ["x"]})


@pytest.mark.parametrize("key", ["rope_parameters", "layer_types", "global_rope_theta", "norm_bias", "architectures"])
@pytest.mark.parametrize("value", ODD, ids=str)
def test_an_odd_value_in_a_config_is_read_or_refused_in_a_line(key, value, vocabulary, tmp_path):
    path = written(tmp_path / "first", "modernbert", vocabulary)
    settings = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(settings | {key: value}))
    try:
        folder.open_folder(str(path))
    except UserError as e:
        assert f"config.json has {key if key != 'rope_parameters' else ''}" in str(e)


@pytest.mark.parametrize("kind", ["roberta", "xlm-roberta", "camembert", "electra"])
def test_a_head_with_another_activation_than_the_layers_is_refused(kind, vocabulary, tmp_path):
    path = written(tmp_path / "first", kind, vocabulary)
    settings = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(settings | {"hidden_act": "gelu_new"}))
    with pytest.raises(UserError, match="hidden_act = 'gelu_new'; expected 'gelu'"):
        folder.open_folder(str(path))


def test_rope_parameters_may_leave_out_the_base(vocabulary, tmp_path):
    path = written(tmp_path / "first", "modernbert", vocabulary)
    settings = json.loads((path / "config.json").read_text())
    settings["rope_parameters"] = {"full_attention": {"rope_type": "default"}, "sliding_attention": {"rope_theta": 5}}
    (path / "config.json").write_text(json.dumps(settings | {"global_rope_theta": 77.0}))
    fields = folder.open_folder(str(path)).model_fields
    assert (fields["rope_theta_global"], fields["rope_theta_local"]) == (77.0, 5.0)


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "model.pt", "tf_model.h5", "flax_model.msgpack", "old.safetensors"]
)
def test_a_folder_without_safetensors_is_named_as_such_everywhere(name, vocabulary, tmp_path):
    path = written(tmp_path / "first", "bert", vocabulary)
    (path / "model.safetensors").rename(path / name)
    for read in (read_config, opened):
        with pytest.raises(UserError, match=f"holds only {name}.*save_pretrained"):
            read(str(path))


def test_rows_are_no_longer_than_a_folder_has_positions(vocabulary, tmp_path):
    path = str(written(tmp_path / "first", "bert", vocabulary))
    assert build(read_config(path)).data.seq_len == 64
    assert read_config(path, {"data.seq_len": 65}).data.seq_len == 65, "what the user sets is left to the checks"


@pytest.mark.parametrize("ids", [{"pad_token_id": 0}, {"cls_token_id": 50281, "sep_token_id": 50282}])
def test_ids_that_nobody_set_do_not_count(ids, tmp_path):
    """multilingual-e5-small, a BERT with the tokenizer of XLM-R, names the padding of every BERT."""
    library = tokenizer_files.vocabulary("byte_level", ("[CLS]", "[PAD]", "[SEP]", "[UNK]", "[MASK]"))
    path = written(tmp_path / "first", "bert", HuggingFaceTokenizer(library.to_str().encode(), "the file"))
    (path / "config.json").write_text(json.dumps(json.loads((path / "config.json").read_text()) | ids))
    assert opened(path)[2].pad_id == 1


def test_a_padded_embedding_keeps_its_rows(vocabulary, tmp_path):
    path = written(tmp_path / "first", "bert", vocabulary)
    settings, tensors = json.loads((path / "config.json").read_text()), load_file(path / "model.safetensors")
    for name in ("bert.embeddings.word_embeddings.weight", "cls.predictions.bias"):
        tensors[name] = np.concatenate([tensors[name], tensors[name][:112]])
    save_file(tensors, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(settings | {"vocab_size": 512}))
    table = started(path)[2].params["encoder"]["embeddings"]["token"]
    np.testing.assert_array_equal(table, tensors["bert.embeddings.word_embeddings.weight"])


def test_a_new_vocabulary_begins_as_the_mean_of_its_pieces(vocabulary, tmp_path):
    path = written(tmp_path / "first", "bert", vocabulary)
    (tmp_path / "words").write_text("hippopotamus\n\nzebra\nzebra\n")
    _, training, state, _ = started(path, extend=tmp_path / "words")
    before = load_tokenizer(path)
    after = load_tokenizer(path, tmp_path / "words")
    assert after.vocab_size == before.vocab_size + 2
    assert after.starts_word[-2:].all()
    assert after.encode(["the zebra runs."])[0].tolist().count(before.vocab_size + 1) == 1
    old = load_file(path / "model.safetensors")
    table = np.asarray(state.params["encoder"]["embeddings"]["token"])
    bias = np.asarray(state.params["head"]["decoder_bias"])
    assert table.shape[0] == training.abstract.params["encoder"]["embeddings"]["token"].shape[0] == after.vocab_size
    np.testing.assert_array_equal(table[:-2], old["bert.embeddings.word_embeddings.weight"])
    for i, word in ((-2, "hippopotamus"), (-1, "zebra")):
        pieces = before.encode([word])[0]
        assert len(pieces) > 1
        np.testing.assert_allclose(table[i], old["bert.embeddings.word_embeddings.weight"][pieces].mean(0), atol=1e-7)
        np.testing.assert_allclose(bias[i], old["cls.predictions.bias"][pieces].mean(), atol=1e-7)


@pytest.mark.parametrize("kind", ["sentencepiece", "wordpiece", "json"])
def test_words_added_to_a_tokenizer_are_single_pieces(kind, vocabulary, toy, tmp_path):
    (tmp_path / "words").write_text("Hippopotamus\nzebra\n")
    path = toy.corpus
    if kind == "json":
        path = tmp_path / "tokenizer.json"
        path.write_bytes(tokenizer_json.content(vocabulary, 0))
    elif kind == "wordpiece":
        path = tmp_path / "vocab.txt"
        path.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "##s", *"abehiprz", "##a"]))
    before, after = load_tokenizer(path), load_tokenizer(path, tmp_path / "words")
    assert after.tokens[: before.vocab_size] == before.tokens
    assert after.vocab_size == before.vocab_size + 2
    first, second = before.vocab_size, before.vocab_size + 1
    text = "the zebra the Hippopotamus the" if kind != "wordpiece" else "the zebra the hippopotamus the"
    assert [i for i in after.encode([text])[0] if i >= first] == [second, first]
    assert len(after.encode([text])[0]) == 5
    assert after.starts_word[[first, second]].all()
    assert "zebra" in after.decode(after.encode(["the zebra"])[0])
    assert load_tokenizer(path, tmp_path / "words").fingerprint == after.fingerprint


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
@pytest.mark.parametrize("normalization", ["nmt_nfkc", "nmt_nfkc_cf", "identity"])
def test_tokenizer_json_cuts_the_built_in_corpus_alike(model_type, normalization):
    from collections import Counter

    import tokenizers

    from flax_mlm.data.sources.open import open_source

    parts = open_source("builtin").chunks(Counter())
    lines = [line for part in parts for line in part.text.split("\n") if line.strip()]
    config = build(base.get_config()).tokenizer
    config = dataclasses.replace(config, model_type=model_type, normalization=normalization, vocab_size=4000)
    tokenizer = train_tokenizer(lines[::20], config)
    converted = tokenizer_json.content(tokenizer, 0)
    odd = ["", " ", "  two  spaces ", "tab\tnew\nline", "ﬁne ½ Ａ e\u0301", "字 漢字", "🙂🙂", "a" * 300, "\u200b"]
    odd += ["a ▁ mark"] if normalization != "identity" else []
    sample = lines[:: 1 if model_type == "bpe" and normalization == "nmt_nfkc" else 20]
    theirs = tokenizers.Tokenizer.from_str(converted.decode())
    theirs.encode_special_tokens = True  # "[MASK]" in a text is text
    encodings = theirs.encode_batch_fast(sample + odd, add_special_tokens=False)
    both = [
        (row.tolist(), encoding.ids) for row, encoding in zip(tokenizer.encode(sample + odd), encodings, strict=True)
    ]
    reasons = [tokenizer_json.why(tokenizer, *pair) for pair in both if pair[0] != pair[1]]
    assert [why for why in reasons if model_type == "bpe" or why != tokenizer_json.TIE] == []
    assert len(reasons) < 5


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_added_words_are_tokens_in_tokenizer_json(model_type, toy, tmp_path):
    import tokenizers

    config = dataclasses.replace(build(base.get_config()).tokenizer, model_type=model_type, vocab_size=300)
    lines = [f"{a} {b} {c}" for a in ("the", "this") for b in toy.animals for c in toy.animals.values()]
    train_tokenizer(lines, config).save(tmp_path)
    (tmp_path / "words").write_text("covid\nzyxogene\nnew york\nguard\n")
    tokenizer = load_tokenizer(tmp_path / "tokenizer.model", tmp_path / "words")
    theirs = tokenizers.Tokenizer.from_str(tokenizer_json.content(tokenizer, 1).decode())
    theirs.encode_special_tokens = True
    words = tokenizer.added_words
    assert list(words.values()) == ["covid", "zyxogene", "new york", "guard"]
    for i, word in words.items():
        assert theirs.encode(f"the {word} barks", add_special_tokens=False).ids.count(i) == 1, word
    for text in ("covid", "the covid.", " covid  zyxogene", "the <s> zyxogene [MASK] sleeps", "guards (guard)"):
        assert theirs.encode(text, add_special_tokens=False).ids == tokenizer.encode([text])[0].tolist(), text


def test_an_added_word_that_also_continues_words_cannot_be_exported(tmp_path):
    config = dataclasses.replace(build(base.get_config()).tokenizer, vocab_size=330)
    tokenizer = train_tokenizer(["the dog barks at the mailman in the garden", "a cat sleeps"] * 9, config)
    tokenizer.save(tmp_path)
    word = next(t for t in tokenizer.tokens if t.isalpha() and len(t) > 1 and f"▁{t}" not in tokenizer.tokens)
    (tmp_path / "words").write_text(word)
    with pytest.raises(UserError, match=f"has both ▁{word}, an added word, and {word}, which continues words"):
        tokenizer_json.content(load_tokenizer(tmp_path / "tokenizer.model", tmp_path / "words"), 1)


@pytest.mark.parametrize("template", ["none", "bert", "roberta"])
def test_pairs_are_as_the_template_of_the_folder_says(template, vocabulary, tmp_path):
    import tokenizers
    from tokenizers.processors import BertProcessing, RobertaProcessing

    file = tokenizers.Tokenizer.from_str(tokenizer_json.content(vocabulary, 1).decode())
    marks = ("[SEP]", vocabulary.sep_id), ("[CLS]", vocabulary.cls_id)
    file.post_processor = {"none": None, "bert": BertProcessing(*marks), "roberta": RobertaProcessing(*marks)}[template]
    file.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    model = SimpleNamespace(tokenizer=tokenizer, max_length=64, config=build(base.get_config()))
    (row,) = embeddings.tokenize(model, ["the dog"], ["barks"])
    assert row.count(vocabulary.sep_id) == (3 if template == "roberta" else 2)
    content = tokenizer_json.content(tokenizer, 1)
    theirs = tokenizers.Tokenizer.from_str(content.decode()).encode("the dog", "barks")
    assert theirs.ids == row
    types = np.asarray(embeddings.token_types(model, np.array([row])))[0]
    assert theirs.type_ids == types.tolist()
    assert (content == tokenizer.content) == (template == "bert"), "a file that does the same is kept"


def test_an_exported_tokenizer_has_no_key_that_transformers_warns_of(vocabulary, tmp_path):
    spec = json.loads(tokenizer_json.content(vocabulary, 1))
    for token in spec["added_tokens"]:
        token["roles"] = ["mask"] if token["content"] == "[MASK]" else []
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    written = json.loads(tokenizer_json.content(load_tokenizer(tmp_path), 1))
    assert not any("roles" in token for token in written["added_tokens"])


@pytest.mark.parametrize("types", [0, 1, 2])
def test_models_with_token_types_ask_for_them(types, vocabulary):
    names = tokenizer_json.settings(vocabulary, 64, types)["model_input_names"]
    assert ("token_type_ids" in names) == (types == 2)


def test_masks_in_tokenizer_json_have_text_on_both_sides(vocabulary):
    import tokenizers

    theirs = tokenizers.Tokenizer.from_str(tokenizer_json.content(vocabulary, 1).decode())
    for text in (
        *("the [MASK] barks", "[MASK] barks", "the [MASK]", "the b[MASK]ks.", "[MASK] [MASK]", "[MASK][MASK] a"),
        *(" the [MASK]", "the  [MASK]  barks ", "[MASK]", "barks[MASK] x"),
    ):
        ids = theirs.encode(text).ids
        assert ids == [vocabulary.cls_id, *vocabulary.encode_with_mask(text), vocabulary.sep_id], text
    pair = theirs.encode("the dog", "barks")
    assert pair.ids.count(vocabulary.sep_id) == 2
    assert pair.type_ids[-1] == 1
    assert theirs.decode(theirs.encode("the dog barks").ids) == "the dog barks"


# The commands


def test_export_and_continue(toy, bert_run, tmp_path):
    exported = tmp_path / "exported"
    done = toy.run("export", f"--checkpoint={bert_run}", f"--output={exported}", "--licence=mit", "--language=en")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"written to {exported}"), done.stderr
    assert sorted(p.name for p in exported.iterdir()) == [
        *("README.md", "config.json", "model.safetensors", "special_tokens_map.json"),
        *("tokenizer.json", "tokenizer_config.json"),
    ]
    card = (exported / "README.md").read_text()
    result = json.loads((bert_run / "result.json").read_text())
    assert card.startswith("---\nlanguage: en\n")
    assert "license: mit" in card
    assert f"{result['loss']:.4f}" in card
    seen = metrics.lines(bert_run, "train")[-1]["tokens_seen"]
    assert f"20 steps of 16 rows of 32, {seen:,} tokens" in card
    assert str(toy.text) in card
    assert "exported" in card

    done = toy.run("export", f"--checkpoint={bert_run}", f"--output={exported}")
    assert done.returncode == 2
    assert done.stderr == (f"error: --output: '{exported}' exists; name another folder, or delete that one\n")

    # Training goes on from there: with the corpus that has this very tokenizer, the loss begins where it was.
    flags = [flag for flag in toy.flags(train__steps=3) if ".model." not in flag and "tokenizer" not in flag]
    flags += [f"--config.init_from={exported}", f"--config.data.source=text:{toy.text}", "--config.data.corpus="]
    flags += ["--config.model.dropout_rate=0.0", "--config.model.attention_dropout_rate=0.0"]
    done = toy.run("train", f"--workdir={tmp_path / 'run'}", *flags)
    assert done.returncode == 0, done.stderr
    assert f"started from '{exported}', 42 weights of BertForMaskedLM" in done.stdout
    before, first = metrics.lines(tmp_path / "run")[:2]
    assert (before["step"], before["kind"]) == (0, "validation")
    assert abs(before["loss"] - result["loss"]) < 0.5
    assert first["step"] == 1
    assert abs(first["loss"] - result["loss"]) < 0.5
    done = toy.run("evaluate", f"--checkpoint={tmp_path / 'run'}")
    assert done.returncode == 0, done.stderr

    # All of a folder's positions are trained, whatever rows base.py has.
    long = "The dog barks in the garden. " * 30 + "The [MASK] sleeps."
    done = toy.run("fill_mask", f"--checkpoint={exported}", long)
    assert done.returncode == 0, done.stderr
    done = toy.run("fill_mask", f"--checkpoint={exported}", long * 9)
    assert done.returncode == 2
    assert "at most 512" in done.stderr


@pytest.mark.parametrize("given", [[], ["--config.data.seq_len=16", "--config.optimizer.learning_rate=2e-5"]])
def test_a_folder_is_trained_further_with_a_recipe_of_its_size(given, vocabulary, tmp_path):
    path = written(tmp_path / "bert", "bert", vocabulary)
    for source in ([], ["--config=continue_pretraining"]):
        config = config_of([*source, f"--config.init_from={path}", *given])
        assert config.optimizer.name == "adamw"
        assert config.optimizer.learning_rate == (2e-5 if given else 1e-4)
        assert config.data.seq_len == (16 if given else 64), "as many as it has positions"
        assert (config.optimizer.head_first_steps, config.optimizer.head_rate_factor) == (0, 1.0)
        new_head = config_of([*source, f"--config.init_from={path}", "--config.reinit_head", *given]).optimizer
        assert (new_head.head_first_steps, new_head.head_rate_factor) == (50, 20.0)


def test_the_usual_rate_falls_with_the_width():
    assert [usual_learning_rate(width) for width in (128, 256, 384, 768)] == [1e-4, 1e-4, 5e-5, 5e-5]


@pytest.mark.parametrize(("command", "flag"), [("train", "workdir"), ("prepare", "output")])
def test_a_recipe_for_a_folder_needs_one(toy, tmp_path, command, flag):
    done = toy.run(command, "--config=continue_pretraining", f"--{flag}={tmp_path / 'new'}")
    assert done.returncode == 2
    assert done.stderr.startswith("error: optimizer.learning_rate is none; expected a number, or init_from=DIR, a")


def test_the_settings_of_a_new_head_need_a_folder_too(toy, tmp_path):
    given = "--config.optimizer.learning_rate=1e-4", "--config.data.seq_len=32"
    done = toy.run("train", "--config=continue_pretraining", f"--workdir={tmp_path / 'new'}", *given)
    assert done.returncode == 2
    assert done.stderr.startswith("error: optimizer.head_first_steps is none; expected a number, or init_from=DIR, a")


def test_training_further_lowers_the_loss_and_a_recipe_for_new_weights_is_warned_of(toy, bert_run, tmp_path):
    exported, result = tmp_path / "exported", json.loads((bert_run / "result.json").read_text())
    done = toy.run("export", f"--checkpoint={bert_run}", f"--output={exported}")
    assert done.returncode == 0, done.stderr
    (tmp_path / "new.txt").write_text(toy.text.read_text().replace("barks in", "sleeps near"))
    flags = [f"--config.init_from={exported}", "--config.data.num_workers=1", "--config.data.seq_len=32"]
    flags += [f"--config.data.cache_dir={tmp_path}", f"--config.data.source=text:{tmp_path / 'new.txt'}"]
    flags += ["--config.train.steps=40", "--config.eval.max_rows=64", "--config.log.tensorboard=False"]
    done = toy.run("train", f"--workdir={tmp_path / 'run'}", *flags)
    assert done.returncode == 0, done.stderr
    assert "recipe      mlm, 40 steps of 32 rows of 32\n" in done.stdout
    assert "masking     token, mask rate 0.15" in done.stdout
    assert "optimizer   adamw, peak learning rate 0.0001, linear after a warm-up of 10.0% of the run" in done.stdout
    assert "WARNING" not in done.stdout
    losses = [line["loss"] for line in metrics.lines(tmp_path / "run", "validation")]
    assert losses[0] > losses[-1]
    line = f"--checkpoint={tmp_path / 'run'}", "--task=mlm", f"--json={tmp_path / 'o.json'}"
    old = toy.run("evaluate", *line, f"--config.data.source=text:{toy.text}")
    assert old.returncode == 0, old.stderr
    assert json.loads((tmp_path / "o.json").read_text())["loss"] < result["loss"] + 0.2
    done = toy.run("train", "--config=small", f"--workdir={tmp_path / 'wrong'}", *flags, "--config.train.steps=1")
    assert "WARNING: optimizer.learning_rate is 0.006; usual for a pretrained encoder of this width is 0.0001" in (
        done.stdout
    )


def test_a_causal_folder_is_a_causal_model(toy, tmp_path):
    shape = {"model__position_embedding": "learned", "model__norm_position": "post", "objective__name": "clm"}
    done = toy.run("train", f"--workdir={tmp_path / 'run'}", *toy.flags(train__steps=3, **shape))
    assert done.returncode == 0, done.stderr
    done = toy.run("export", f"--checkpoint={tmp_path / 'run'}", f"--output={tmp_path / 'exported'}")
    assert done.returncode == 0, done.stderr
    assert folder.open_folder(tmp_path / "exported").architecture is bert.BERT_CAUSAL
    line = f"--checkpoint={tmp_path / 'exported'}"
    assert json.loads(toy.run("evaluate", line, "--print_config").stdout)["objective"]["name"] == "clm"
    further = toy.run("train", f"--config.init_from={tmp_path / 'exported'}", "--print_config")
    assert json.loads(further.stdout)["objective"]["name"] == "mlm", "trained further it may become something else"


def test_an_encoder_fine_tuned_for_vectors_is_exported_with_its_pooling(toy, bert_run, tmp_path):
    """And so is a folder of Hugging Face: what comes out is what went in."""
    seen = metrics.lines(bert_run, "train")[-1]["tokens_seen"]
    lines = [f"The {animal} {does}." for animal, does in toy.animals.items()]
    (tmp_path / "lines.txt").write_text("\n".join(lines))
    (tmp_path / "pairs.tsv").write_text(
        "sentence1\tsentence2\tscore\n" + f"{lines[0]}\t{lines[1]}\t1\n" * 3 + f"{lines[0]}\t{lines[2]}\t0\n"
    )
    done = toy.run(
        *("evaluate", f"--checkpoint={bert_run}", "--task=retrieval", f"--train={tmp_path / 'lines.txt'}"),
        *(f"--test={tmp_path / 'pairs.tsv'}", f"--save={tmp_path / 'kept'}", "--config.finetune.pooling=mean"),
        "--config.model.dropout_rate=0.1",
        *(
            f"--config.finetune.{k}={v}"
            for k, v in {"epochs": 1, "seeds": 1, "batch_size": 8, "max_length": 24}.items()
        ),
    )
    assert done.returncode == 0, done.stderr
    exported = tmp_path / "exported"
    done = toy.run("export", f"--checkpoint={tmp_path / 'kept'}", f"--output={exported}")
    assert done.returncode == 0, done.stderr
    card = (exported / "README.md").read_text()
    assert "pipeline_tag: sentence-similarity" in card
    assert "InfoNCE), 5 pairs, vectors by mean pooling" in card
    assert f"20 steps of 16 rows of 32, {seen:,} tokens" in card
    assert "Not evaluated." in card
    assert "fill-mask" not in card
    kinds = [module["type"].rpartition(".")[2] for module in json.loads((exported / "modules.json").read_text())]
    assert kinds == ["Transformer", "Pooling", "Normalize"]
    pooling = json.loads((exported / "1_Pooling" / "config.json").read_text())
    assert pooling.pop("word_embedding_dimension") == 32
    assert [name for name, value in pooling.items() if value] == ["pooling_mode_mean_tokens"]

    done = toy.run("export", f"--checkpoint={exported}", f"--output={tmp_path / 'again'}")
    assert done.returncode == 0, done.stderr
    assert (exported / "model.safetensors").read_bytes() == (tmp_path / "again" / "model.safetensors").read_bytes()
    card = (tmp_path / "again" / "README.md").read_text()
    resolved = toy.run("evaluate", f"--checkpoint={exported}", "--print_config").stdout
    assert json.loads(resolved)["finetune"]["pooling"] == "mean", "the folder says how"
    assert "- Started from: exported." in card
    assert "written with flax_mlm" in card
    assert "steps of" not in card


def test_what_export_refuses(toy, trained_run, bert_run, tmp_path):
    output = tmp_path / "exported"
    for arguments, message in (
        (
            [f"--checkpoint={trained_run}"],
            "fits no class of transformers for objective mlm: bert needs model.position_embedding",
        ),
        (
            [f"--checkpoint={bert_run}", "--architecture=modernbert"],
            "modernbert needs model.position_embedding = rope, ",
        ),
        ([f"--checkpoint={bert_run}@7"], "has no step 7"),
    ):
        done = toy.run("export", *arguments, f"--output={output}")
        assert done.returncode == 2, done.stderr
        assert message in done.stderr, done.stderr
        assert len(done.stderr.splitlines()) == 1, done.stderr
        assert list(tmp_path.iterdir()) == []
    done = toy.run("export", f"--checkpoint={bert_run}")
    assert done.returncode == 2
    assert "--output is missing" in done.stderr


def test_mistakes_about_the_folder_to_start_from(toy, vocabulary, tmp_path):
    path = written(tmp_path / "first", "bert", vocabulary)
    shutil.copytree(path, tmp_path / "pickle")
    (tmp_path / "pickle" / "model.safetensors").rename(tmp_path / "pickle" / "pytorch_model.bin")
    plain = [f for f in toy.flags() if ".model." not in f and "tokenizer" not in f]
    run = f"--workdir={tmp_path / 'run'}"
    (tmp_path / "finished" / "checkpoints" / "20").mkdir(parents=True)
    (tmp_path / "finished" / "config.json").write_text('{"objective": {"name": "mlm"}}')
    for flags, message in (
        *(
            ([f"--config.init_from={tmp_path}/finished{end}"], f"--checkpoint={tmp_path}/finished{own} --output=DIR")
            for end, own in (("", ""), ("@20", "@20"), ("/checkpoints/", ""), ("/checkpoints/20", "/checkpoints/20"))
        ),
        (["--config.init_from=/nowhere"], "init_from: '/nowhere' is not a folder"),
        ([f"--config.init_from={path}", "--config.model.num_layers=7"], "model.num_layers is 7, but 3 in"),
        ([f"--config.init_from={path}"], "was made with another tokenizer than"),
        (["--config.reinit_head=True"], "reinit_head is True, but init_from is empty"),
        (
            ["--config.tokenizer.extra_tokens_file=words"],
            "tokenizer.extra_tokens_file is set, but there is no tokenizer to extend",
        ),
        (
            [f"--config.init_from={tmp_path / 'pickle'}", f"--config.tokenizer.path={toy.corpus}"],
            "holds only pytorch_model.bin, a pickle",
        ),
    ):
        done = toy.run("train", run, *plain, *flags)
        assert done.returncode == 2, done.stderr
        assert message in done.stderr, done.stderr
        assert len(done.stderr.splitlines()) == 1, done.stderr


def test_architectures_are_told_apart():
    names = [(a.model_type, a.objective) for a in ARCHITECTURES]
    assert len(set(names)) == len(names)
    model = model_config(**BERT)
    assert matching_architecture(model, "mlm", "", "[CLS]") is bert.BERT
    assert matching_architecture(model, "mlm", "", "<s>") is bert.ROBERTA
    assert matching_architecture(model, "clm", "", "[CLS]") is bert.BERT_CAUSAL
    assert matching_architecture(model_config(**MODERN), "clm", "", "[CLS]") is modernbert.DECODER
    with pytest.raises(UserError, match="albert has no class in transformers for objective clm"):
        matching_architecture(model, "clm", "albert", "[CLS]")
