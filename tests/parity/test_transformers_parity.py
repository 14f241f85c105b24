"""The same numbers and gradients as Hugging Face transformers from the same weights, and the same parameter counts.

Run by `bash launch/test.sh --references`. Both sides compute in float32: what is left is rounding.
"""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from flax_mlm.config.load import build
from flax_mlm.config.schema import MeshConfig, ModelConfig
from flax_mlm.configs import bert_base, bert_large, modernbert_base, modernbert_large
from flax_mlm.distributed.batches import shard_rows
from flax_mlm.distributed.mesh import make_mesh
from flax_mlm.hf import bert, folder
from flax_mlm.hf.weights import param_mappings, params_to_tensors, tensors_to_params
from flax_mlm.inference.forward import build_forward
from flax_mlm.model import electra, heads
from flax_mlm.objectives import masking
from flax_mlm.objectives.losses import corrupt, sample_tokens, token_losses
from flax_mlm.objectives.rows import Vocabulary
from flax_mlm.objectives.targets import make_targets, max_predictions_per_row

torch = pytest.importorskip("torch", reason="the reference needs torch")
transformers = pytest.importorskip("transformers", "5", reason="the reference needs transformers 5")

V, L, PAD, CLS = 64, 24, 0, 1
TINY = {"hidden_size": 32, "num_heads": 2, "intermediate_size": 48, "max_positions": L, "vocab_multiple_of": 1}
EXACT = {"dtype": "float32", "dropout_rate": 0.0, "attention_dropout_rate": 0.0}
OWN = {
    "bert": {"num_layers": 3},
    # Layers 0 and 3 are global; the others see 3 tokens to each side.
    "modernbert": {"num_layers": 5, "sliding_window": 6, "rope_theta_global": 500.0, "rope_theta_local": 20.0},
}
LAYOUTS = {"padded": [[L], [17]], "packed": [[11, 9], [14, 10]]}  # lengths of the segments of each row

NAMES = {  # ours: BERT's, ModernBERT's
    "encoder/embeddings/token": ("bert.embeddings.word_embeddings.weight", "model.embeddings.tok_embeddings.weight"),
    "encoder/embeddings/position": ("bert.embeddings.position_embeddings.weight", None),
    "encoder/embeddings/token_type": ("bert.embeddings.token_type_embeddings.weight", None),
    "encoder/embeddings/norm": ("bert.embeddings.LayerNorm", "model.embeddings.norm"),
    "encoder/layers/qkv": ("bert.encoder.layer.{}.attention.self.*", "model.layers.{}.attn.Wqkv"),
    "encoder/layers/attention_out": ("bert.encoder.layer.{}.attention.output.dense", "model.layers.{}.attn.Wo"),
    "encoder/layers/attention_norm": ("bert.encoder.layer.{}.attention.output.LayerNorm", None),
    "encoder/layers/mlp_in": ("bert.encoder.layer.{}.intermediate.dense", "model.layers.{}.mlp.Wi"),
    "encoder/layers/mlp_out": ("bert.encoder.layer.{}.output.dense", "model.layers.{}.mlp.Wo"),
    "encoder/layers/mlp_norm": ("bert.encoder.layer.{}.output.LayerNorm", "model.layers.{}.mlp_norm"),
    "encoder/attention_norms": (None, "model.layers.{}.attn_norm"),
    "encoder/final_norm": (None, "model.final_norm"),
    "head/dense": ("cls.predictions.transform.dense", "head.dense"),
    "head/norm": ("cls.predictions.transform.LayerNorm", "head.norm"),
    "head/decoder_bias": ("cls.predictions.bias", "decoder.bias"),
}

SHAPES = {"bert": ("bert", False), "bert_types": ("bert", True), "modernbert": ("modernbert", False)}
shaped = pytest.mark.parametrize(("family", "with_types"), SHAPES.values(), ids=SHAPES)
laid_out = pytest.mark.parametrize("layout", LAYOUTS)


@pytest.fixture(autouse=True)
def one_device():
    mesh = make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    with jax.set_mesh(mesh):
        yield mesh


def reference(c: ModelConfig, vocab_size: int):
    """The transformers model of our shape. The rest, epsilons and token types included, is as it is by default."""
    kwargs = {"vocab_size": vocab_size, "pad_token_id": PAD, "attn_implementation": "eager"}
    kwargs |= {"num_hidden_layers": c.num_layers, "num_attention_heads": c.num_heads, "hidden_size": c.hidden_size}
    kwargs |= {"intermediate_size": c.intermediate_size, "max_position_embeddings": c.max_positions}
    if c.position_embedding == "learned":
        return transformers.BertForMaskedLM(transformers.BertConfig(**kwargs)).eval()
    kwargs |= dict.fromkeys(("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), CLS)
    kwargs |= {"global_attn_every_n_layers": c.global_attn_every_n_layers, "local_attention": c.sliding_window}
    kwargs |= {"global_rope_theta": c.rope_theta_global, "local_rope_theta": c.rope_theta_local}
    return transformers.ModernBertForMaskedLM(transformers.ModernBertConfig(**kwargs)).eval()


@functools.cache
def both(family: str):
    """Config, our model, the reference with random weights, and these weights as our parameters."""
    config = build((bert_base if family == "bert" else modernbert_base).get_config())
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, **TINY, **EXACT, **OWN[family]))
    net, generator = reference(config.model, V), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in net.named_parameters():
            is_scale = p.ndim == 1 and name.endswith("weight")
            stddev = 0.02 if "embeddings" in name and p.ndim == 2 else 0.2  # small, so that the norm's epsilon counts
            p.normal_(1.0 if is_scale else 0.0, stddev, generator=generator)
    model = heads.language_model(config.model, V)
    params = our_tree(config.model, model, {name: p.detach() for name, p in net.named_parameters()})
    assert sum(x.size for x in jax.tree.leaves(params)) == sum(p.numel() for p in net.parameters())
    return config, model, net, params


def our_tree(c: ModelConfig, model: heads.Model, arrays: dict[str, "torch.Tensor"]):
    """The reference's weights, or their gradients, by name -> our parameter tree."""

    def leaf(path, x):
        *module, last = (key.key for key in path)
        suffix = {"kernel": ".weight", "scale": ".weight", "bias": ".bias"}.get(last, "")
        name = NAMES["/".join(module if suffix else [*module, last])][c.position_embedding == "rope"] + suffix
        names = [name.replace("*", part) for part in ("query", "key", "value")] if "*" in name else [name]
        layers = range(c.num_layers - x.shape[0], c.num_layers) if "{}" in name else [0]
        found = [np.concatenate([arrays[n.format(i)].numpy() for n in names]) for i in layers]
        return jnp.asarray(np.stack([a.T if last == "kernel" else a for a in found]).reshape(x.shape))

    return jax.tree.map_with_path(leaf, jax.eval_shape(model.init, jax.random.key(0)))


def rows(layout: str, with_types: bool):
    """Tokens, segments, positions and token types, int32 (B, L), and the parts that the reference takes one by one."""
    rng, lengths = np.random.default_rng(0), LAYOUTS[layout]
    tokens, segments, positions, types = batch = np.full((4, len(lengths), L), PAD, np.int32)
    parts = []
    for b, row in enumerate(lengths):
        for i, n in enumerate(row):
            at = slice(sum(row[:i]), sum(row[:i]) + n)
            tokens[b, at], segments[b, at], positions[b, at] = [CLS, *rng.integers(2, V, n - 1)], i + 1, range(n)
            types[b, at] = np.arange(n) > n // 2 if with_types else 0
            parts.append((slice(b, b + 1), at))
    return batch, parts if layout == "packed" else [(slice(None), slice(None))]


def theirs(net, batch, parts, with_types: bool):
    """The reference's hidden states (T, D) and scores (T, V) at the T tokens that are not padding."""
    found = []
    for part in parts:
        tokens, segments, _, types = (torch.tensor(x[part]).long() for x in batch)
        more = {"token_type_ids": types} if with_types else {}
        out = net(tokens, attention_mask=(segments > 0).long(), output_hidden_states=True, **more)
        found.append((out.hidden_states[-1][segments > 0], out.logits[segments > 0]))
    return [torch.cat(x) for x in zip(*found, strict=True)]


def arguments(batch, mesh, with_types: bool):
    """The same batch for our model, with scores wanted at every position."""
    everywhere = np.broadcast_to(np.arange(L, dtype=np.int32), batch[0].shape)
    *args, types, predict = shard_rows([*batch, everywhere], mesh)
    return args, predict, {"token_types_BL": types} if with_types else {}


def check(got, expected, what: str, *, relative: bool = False):
    got, expected = np.asarray(got), np.asarray(expected)
    largest = np.abs(got - expected).max() / (np.abs(expected).max() if relative else 1.0)
    print(f"{what}: largest difference {largest:.1e}")  # shown by pytest -rP
    assert got.shape == expected.shape, f"{what} differ by {largest:.1e}"
    assert largest <= 1e-4, f"{what} differ by {largest:.1e}"


@laid_out
@shaped
def test_hidden_states_and_scores(family, with_types, layout, one_device):
    config, model, net, params = both(family)
    batch, parts = rows(layout, with_types)
    with torch.no_grad():
        hidden, scores = theirs(net, batch, parts, with_types)
    (args, predict, kwargs), real = arguments(batch, one_device, with_types), batch[1] > 0
    check(np.asarray(model.encode(params, *args, **kwargs))[real], hidden, "hidden states")
    check(np.asarray(model.apply(params, *args, predict_BK=predict, **kwargs))[real], scores, "scores")
    if not with_types:  # `score` finds segments and positions by itself, and knows one token type
        vocab = Vocabulary(*[jnp.zeros(V, jnp.int32)] * 4, pad_id=PAD, cls_id=CLS, mask_id=2)
        got = build_forward(config, V, one_device).log_probs(params, args[0], predict, None, vocab)
        check(np.asarray(got)[real], scores.log_softmax(-1), "log-probabilities")


@laid_out
@shaped
def test_gradients(family, with_types, layout, one_device):
    config, model, net, params = both(family)
    batch, parts = rows(layout, with_types)
    chosen = np.broadcast_to(np.arange(L) % 3 == 2, batch[1].shape) & (batch[1] > 0)
    labels = np.random.default_rng(1).integers(2, V, chosen.shape)
    net.zero_grad()
    scores = theirs(net, batch, parts, with_types)[1][chosen[batch[1] > 0]]
    torch.nn.functional.cross_entropy(scores, torch.tensor(labels[chosen])).backward()
    expected = our_tree(config.model, model, {name: p.grad for name, p in net.named_parameters()})

    args, predict, kwargs = arguments(batch, one_device, with_types)
    slots = jnp.asarray(labels, jnp.int32), jnp.asarray(chosen, jnp.float32)

    def loss(params):
        losses = token_losses(model.apply(params, *args, predict_BK=predict, **kwargs), *slots)
        return losses.loss_BK.sum() / slots[1].sum()

    got = jax.jit(jax.grad(loss))(params)
    for (path, a), b in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(expected), strict=True):
        check(a, b, f"gradients of {jax.tree_util.keystr(path, simple=True, separator='/')}", relative=True)


@pytest.mark.parametrize("file", [bert_base, bert_large, modernbert_base, modernbert_large], ids=lambda f: f.__name__)
def test_parameter_counts(file):
    large = {"num_hidden_layers": 24, "hidden_size": 1024, "num_attention_heads": 16, "intermediate_size": 4096}
    large |= {"num_hidden_layers": 28, "intermediate_size": 2624} if "modern" in file.__name__ else {}
    family = "ModernBert" if "modern" in file.__name__ else "Bert"
    published = getattr(transformers, f"{family}Config")(**large if "large" in file.__name__ else {})  # default: base
    c = dataclasses.replace(build(file.get_config()).model, vocab_multiple_of=1)
    ours = jax.eval_shape(heads.language_model(c, published.vocab_size).init, jax.random.key(0))
    with torch.device("meta"):
        expected = sum(p.numel() for p in getattr(transformers, f"{family}ForMaskedLM")(published).parameters())
        same_shape = reference(c, published.vocab_size).config
    assert sum(x.size for x in jax.tree.leaves(ours)) == expected
    for name in ("num_attention_heads", "max_position_embeddings", "local_attention", "layer_types"):
        assert getattr(same_shape, name, None) == getattr(published, name, None), name


@pytest.mark.parametrize("embedding_sharing", ["none", "shared", "gradient_disentangled"])
def test_electra(embedding_sharing, one_device):
    """The loss of both models, and the gradients of both, given what our generator has drawn."""
    c = build(bert_base.get_config())
    shape = dataclasses.replace(c.model, **TINY, **EXACT, num_layers=2, embedding_size=24)
    fields = {"name": "rtd", "generator_size": 0.5, "embedding_sharing": embedding_sharing, "mask_rate": 0.3}
    c = dataclasses.replace(
        c,
        model=shape,
        objective=dataclasses.replace(c.objective, **fields),
        data=dataclasses.replace(c.data, seq_len=L),
    )
    forward, noise = build_forward(c, V, one_device), np.random.default_rng(0)
    params = jax.tree.map(lambda x: x + noise.normal(0, 0.1, x.shape).astype(np.float32), forward.init())
    special = np.arange(V) < 4  # [PAD], [CLS], [SEP], [MASK]
    ordinary = jnp.arange(4, V, dtype=jnp.int32)
    no_ends = jnp.zeros(len(special), bool)
    vocab = Vocabulary(jnp.asarray(special), jnp.asarray(~special), no_ends, ordinary, PAD, CLS, 3)
    tokens = noise.integers(4, V, (3, L)).astype(np.int32)
    tokens[:, 0], tokens[:, -1], tokens[1, 17:] = CLS, 2, PAD
    batch = shard_rows({"tokens": tokens, "row_ids": np.eye(3, 2, dtype=np.uint32)}, one_device)
    rates, slots = masking.rates(c.objective, 0.3), max_predictions_per_row(c.objective, L, 0.3)
    t = make_targets(c.objective, batch, jax.random.key(0), vocab, rates, slots)

    def loss(params):
        return forward.loss.total(forward.loss.predict(params, t, None), forward.loss.counts(t))[0]

    value, gradients = jax.jit(jax.value_and_grad(loss))(params)
    generator = electra.networks(c, V)[0]
    scores = jax.jit(generator.apply)(params, t.inputs_BL, t.segment_ids_BL, t.positions_BL, predict_BK=t.predict_BK)
    corrupted, _ = corrupt(t, sample_tokens(scores, t.sample_keys_B, V))

    # Theirs, from the same weights, each model with all of its own.
    nets, tables = [], (bert.ELECTRA_GENERATOR, bert.ELECTRA)
    modules = heads.language_model(c.generator, V), electra.discriminator(c.model, V)
    apart = jax.device_get(electra.untied(params, embedding_sharing))
    trees = apart["generator"], {name: apart[name] for name in ("encoder", "head")}
    for table, module, model, tree in zip(tables, modules, (c.generator, c.model), trees, strict=True):
        tokenizer = types.SimpleNamespace(pad_id=PAD, cls_id=CLS, sep_id=2)
        settings = transformers.ElectraConfig(**folder.config_json(table, model, V, tokenizer))
        net = getattr(transformers, table.class_name)._from_config(settings, attn_implementation="eager").eval()
        places = list(param_mappings(table, tree, module.dims, model.num_layers))
        theirs = {k: torch.tensor(v) for k, v in params_to_tensors(places, tree, 0).items()}
        missing, unexpected = net.load_state_dict(theirs, strict=False)
        assert not unexpected, missing
        assert set(missing) <= set(table.tied), missing
        net.tie_weights()
        nets.append((net, places))
    attended, used = torch.tensor(tokens != PAD).long(), np.asarray(t.weights_BK) > 0
    row, slot = np.nonzero(used)
    found = nets[0][0](torch.tensor(np.asarray(t.inputs_BL)).long(), attention_mask=attended).logits
    labels = torch.tensor(np.asarray(t.labels_BK)[used]).long()
    masked = torch.nn.functional.cross_entropy(found[row, np.asarray(t.predict_BK)[row, slot]], labels)
    found = nets[1][0](torch.tensor(np.asarray(corrupted)).long(), attention_mask=attended).logits
    judged = torch.tensor(~special[tokens])
    replaced = torch.tensor(np.asarray(corrupted) != tokens).float()
    binary = torch.nn.functional.binary_cross_entropy_with_logits(found[judged], replaced[judged])
    total = masked + 50.0 * binary
    assert 0 < float(replaced.sum()) < replaced.numel()
    check(value / total.item(), 1.0, "losses")
    total.backward()

    expected = []
    for net, places in nets:
        named = dict(net.named_parameters())
        wanted = {name for place in places for names in place.names for name in names}
        expected.append(tensors_to_params(places, {name: named[name].grad.numpy() for name in wanted}, 0))
    for table in (("encoder", "embeddings", name) for name in ("token", "position")):
        if embedding_sharing == "shared":
            expected[1][table] = expected[1][table] + expected[0].pop(table)
    got = dict(flatten_dict(jax.device_get(gradients)))
    assert len(got) == len(expected[0]) + len(expected[1])
    for path, gradient in got.items():
        of = expected[0].get(path[1:]) if path[0] == "generator" else expected[1][path]
        check(gradient, of, f"gradients of {'/'.join(path)}", relative=True)
