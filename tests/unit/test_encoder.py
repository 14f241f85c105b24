"""The encoder: attention inside segments, in both directions; the same numbers by every way of computing."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_mlm.config.load import build
from flax_mlm.config.schema import MeshConfig, ModelConfig
from flax_mlm.configs import base, bert_base, bert_large, modernbert_base, modernbert_large
from flax_mlm.distributed.batches import shard_rows
from flax_mlm.distributed.mesh import make_mesh, param_spec
from flax_mlm.errors import UserError
from flax_mlm.model import encoder, heads, layers
from flax_mlm.model.attention import dispatch, splash
from flax_mlm.model.attention.dispatch import resolve_attention, select_kernel
from flax_mlm.model.attention.xla import cudnn, xla

V, L = 50, 24
BERT = dataclasses.replace(
    build(base.get_config()).model,
    num_layers=3,
    hidden_size=32,
    num_heads=2,
    intermediate_size=48,
    dropout_rate=0.0,
    attention_dropout_rate=0.0,
    initializer_range=0.2,
    scan_layers=True,
)
MODERN = dataclasses.replace(
    BERT,
    position_embedding="rope",
    norm_position="pre",
    use_bias=False,
    glu=True,
    type_vocab_size=0,
    global_attn_every_n_layers=3,
    sliding_window=4,
    num_layers=4,
)
SHAPES = pytest.mark.parametrize("shape", [BERT, MODERN], ids=["bert", "modernbert"])


@pytest.fixture(autouse=True)
def one_device():
    mesh = make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    with jax.set_mesh(mesh):
        yield mesh


def packed_row() -> tuple[jax.Array, jax.Array, jax.Array]:
    """Segments of 10 and 9 tokens, then 5 of padding."""
    segments = np.array([[1] * 10 + [2] * 9 + [0] * 5])
    positions = np.array([[*range(10), *range(9), *range(5)]])
    tokens = np.random.default_rng(0).integers(5, V, (1, L))
    return tuple(jnp.asarray(x, jnp.int32) for x in (tokens, segments, positions))


def model(shape: ModelConfig):
    """The model, jitted, and parameters with every bias and scale away from its trivial value."""
    m = heads.language_model(shape, V)
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(m.init, jax.random.key(0))
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(0.1, 0.2, x.shape), jnp.float32), shapes)
    return m._replace(encode=jax.jit(m.encode, static_argnames="causal")), params


@functools.cache
def gradients(shape: ModelConfig):
    m, params = model(shape)
    context, predict = packed_row(), jnp.arange(0, L, 3, dtype=jnp.int32)[None]
    compiled = jax.jit(jax.grad(lambda p: jnp.square(m.apply(p, *context, predict_BK=predict)).mean()))
    compiled = compiled.lower(params).compile()
    return compiled(params), compiled.memory_analysis().temp_size_in_bytes


def influence(shape: ModelConfig, causal: bool) -> np.ndarray:
    """(L, L): whether output i depends on the embedding of token j, by gradients."""
    m, params = model(shape)
    tokens, segments, positions = packed_row()
    tokens = jnp.arange(L, dtype=jnp.int32)[None] + 5  # every position has an embedding row of its own

    def output(table: jax.Array, i: int) -> jax.Array:
        changed = {**params["encoder"]["embeddings"], "token": table}
        encoder = {**params["encoder"], "embeddings": changed}
        hidden = m.encode({**params, "encoder": encoder}, tokens, segments, positions, causal=causal)
        here = jnp.where((jnp.arange(L) == i)[None, :, None], hidden, 0.0)
        return (here * jnp.arange(1.0, hidden.shape[-1] + 1)[None, None]).sum()

    gradient = jax.jit(jax.grad(output))
    table = params["encoder"]["embeddings"]["token"]
    return np.stack([np.abs(gradient(table, i)).sum(1)[5 : 5 + L] > 0 for i in range(L)])


@SHAPES
def test_no_token_influences_another_segment_and_all_influence_their_own(shape):
    same = np.asarray(packed_row()[1])[0]
    expected = same[:, None] == same[None, :]
    np.testing.assert_array_equal(influence(shape, causal=False), expected)


@SHAPES
def test_causal_attention_sees_only_the_left(shape):
    same = np.asarray(packed_row()[1])[0]
    expected = (same[:, None] == same[None, :]) & (np.arange(L)[:, None] >= np.arange(L)[None, :])
    np.testing.assert_array_equal(influence(shape, causal=True), expected)


def test_a_local_layer_sees_half_a_window_on_each_side():
    one_local = dataclasses.replace(MODERN, num_layers=2, global_attn_every_n_layers=2)
    m, params = model(one_local)
    # Layer 0 is global: cut it off by zeroing what it writes, so that only the local layer 1 mixes tokens.
    out = params["encoder"]["layers"]["attention_out"]["kernel"]
    params["encoder"]["layers"]["attention_out"]["kernel"] = out.at[0].set(0.0)
    tokens = jnp.arange(L, dtype=jnp.int32)[None] + 5
    segments, positions = jnp.ones((1, L), jnp.int32), jnp.arange(L, dtype=jnp.int32)[None]
    before = m.encode(params, tokens, segments, positions)
    after = m.encode(params, tokens.at[0, 12].set(5), segments, positions)
    changed = np.flatnonzero(np.abs(np.asarray(after - before)).max(-1)[0] > 0)
    np.testing.assert_array_equal(changed, np.arange(10, 15))


@SHAPES
def test_a_segment_gives_the_same_alone_and_packed(shape):
    m, params = model(shape)
    tokens, segments, positions = packed_row()
    packed = m.encode(params, tokens, segments, positions)
    alone = m.encode(params, tokens[:, 10:19], segments[:, 10:19], positions[:, 10:19])
    np.testing.assert_allclose(packed[:, 10:19], alone, atol=2e-5)


@SHAPES
@pytest.mark.parametrize("change", [{"scan_layers": False}, {"remat": "full"}, {"remat": "dots"}], ids=str)
def test_every_way_of_computing_gives_the_same_gradients(shape, change):
    expected, got = gradients(shape)[0], gradients(dataclasses.replace(shape, **change))[0]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), expected, got)


@pytest.mark.parametrize(
    ("platform", "fsdp", "num_layers", "scan_layers", "scans"),
    [
        ("cpu", 8, 12, None, False), ("cpu", 1, 24, None, True), ("tpu", 1, 2, None, True), ("tpu", 1, 2, False, False),
        ("gpu", 1, 24, None, False), ("gpu", 1, 28, None, True), ("gpu", 2, 12, None, True),
    ],
)  # fmt: skip
def test_layers_are_scanned_where_that_pays(platform, fsdp, num_layers, scan_layers, scans):
    shape = dataclasses.replace(BERT, num_layers=num_layers, scan_layers=scan_layers)
    assert encoder.resolve_scan_layers(shape, platform, fsdp) is scans


BLOCKS, SPLIT, CUDNN = ("splash", (1, 1, 1), 32), ("splash", (2, 2, 2), 40), ("cudnn", (2, 2, 2), 32)
OFTEN = [(BERT, BLOCKS, True), (BERT, SPLIT, False), (BERT, CUDNN, False), (MODERN, BLOCKS, False)]
OFTEN += [(MODERN, SPLIT, True), (MODERN, CUDNN, False), (MODERN, CUDNN, True)]
RARELY = [
    (BERT, BLOCKS, False),
    (BERT, SPLIT, True),
    (BERT, CUDNN, True),
    (MODERN, BLOCKS, True),
    (MODERN, SPLIT, False),
]


@pytest.mark.parametrize(
    ("shape", "how", "causal"), [*OFTEN, *(pytest.param(*row, marks=pytest.mark.full) for row in RARELY)]
)
def test_kernels_compute_what_xla_attention_does(shape, how, causal, monkeypatch):
    """Compares splash, interpreted, and cuDNN's call, computed by XLA, with `xla`: hidden states of real tokens, and
    gradients. With packed rows, padding, windows in blocks and whole, rows and heads split over devices, in the scan,
    recomputed."""
    monkeypatch.setattr(splash, "splash", functools.partial(splash.splash, interpret=True))
    monkeypatch.setattr(dispatch, "cudnn", functools.partial(cudnn, implementation="xla"))
    kernel, mesh_shape, window = how
    shape = dataclasses.replace(shape, max_positions=256, sliding_window=window, remat="dots")
    rng = np.random.default_rng(0)
    tokens = rng.integers(5, V, (4, 256)).astype(np.int32)
    segments = np.sort(rng.integers(1, 6, (4, 256)), axis=1).astype(np.int32)
    segments[1, 200:] = 0
    positions = (np.arange(256) - np.argmax(segments[:, :, None] == segments[:, None, :], axis=2)).astype(np.int32)
    mesh, results = make_mesh(MeshConfig(*mesh_shape), jax.devices()[: np.prod(mesh_shape)]), []
    with jax.set_mesh(mesh):
        batch = shard_rows([tokens, segments, positions], mesh)
        for name in ("xla", kernel):
            m = heads.language_model(dataclasses.replace(shape, attention=name, vocab_multiple_of=2), V)
            params = jax.jit(
                lambda m=m: jax.tree.map(
                    lambda x, dims: jax.reshard(x, param_spec(dims, x.ndim)), m.init(jax.random.key(0)), m.dims
                )
            )()

            def loss(params, m=m):
                hidden = m.encode(params, *batch, causal=causal) * (batch[1] > 0).astype(jnp.float32)[..., None]
                return jnp.square(hidden - 0.1).sum(), hidden

            results.append(jax.device_get(jax.jit(jax.grad(loss, has_aux=True))(params)))
    gradients, hidden = zip(*results, strict=True)
    np.testing.assert_allclose(*hidden, atol=2e-5)
    largest = max(np.abs(x).max() for x in jax.tree.leaves(gradients[0]))  # some are 0 but for rounding
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * largest), *gradients)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("length", "window"), [(128, 16), (100, 11), (24, 3), (144, 17), (68, 8)])
def test_a_window_taken_in_blocks_is_that_of_whole_rows(length, window, causal):
    rng = np.random.default_rng(length)
    segments = np.sort(rng.integers(0, 4, (2, length)), axis=1)[:, ::-1].astype(np.int32)  # padding at the end
    q, k, v = rng.standard_normal((3, 2, length, 2, 4), np.float32)
    traced = str(jax.make_jaxpr(lambda *qkv: xla(segments, causal, [window])(0, *qkv))(q, k, v))
    whole = f"f32[2,2,{length},{length}]"  # logits of all queries and all keys
    assert (whole not in traced) is (length % (2 * (window // 2)) == 0), "which it is"
    distance = np.arange(length)[:, None] - np.arange(length)
    seen = (segments[:, :, None] == segments[:, None]) & (distance >= 0 if causal else True)
    for reach, mask in ((None, seen), (window, seen & (np.abs(distance) <= window // 2))):
        logits = np.where(mask[:, None], np.einsum("BLHd,BMHd->BHLM", q, k) / 2, -np.inf)
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        expected = np.einsum("BHLM,BMHd->BLHd", weights / weights.sum(-1, keepdims=True), v)
        np.testing.assert_allclose(xla(segments, causal, [reach])(0, q, k, v), expected, atol=1e-5)


@pytest.mark.parametrize("drops", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2e-5), ("bfloat16", 0.03)])
def test_xla_attention_and_its_gradients_are_those_of_the_definition(dtype, tolerance, drops):
    """In bfloat16 the gradient at a key that is alone in its segment is 0 but for the rounding of the result."""
    segments = jnp.array([[1] * 7 + [2] * 4 + [0]] * 2)
    kept = jnp.where(jax.random.bernoulli(jax.random.key(3), 0.8, (2, 3, 12, 12)), 1.25, 0.0) if drops else None
    q, k, v, g = (2 * jax.random.normal(jax.random.key(i), (2, 12, 3, 4)).astype(dtype) for i in range(4))

    def definition(q, k, v):
        logits = jnp.einsum("BLHd,BMHd->BHLM", q, k) / 2
        logits = jnp.where((segments[:, :, None] == segments[:, None])[:, None], logits, -1e30)
        return jnp.einsum("BHLM,BMHd->BLHd", jax.nn.softmax(logits) * (kept if drops else 1.0), v)

    attend = xla(segments, False, [None])
    drop = (lambda weights: weights * kept.astype(dtype)) if drops else None
    y, backward = jax.vjp(lambda *qkv: attend(0, *qkv, drop=drop), q, k, v)
    exact, exact_backward = jax.vjp(definition, *(x.astype(jnp.float32) for x in (q, k, v)))
    assert y.dtype == dtype
    residuals = [x.nbytes for x in jax.tree.leaves(backward)]
    weights, sums = 2 * 3 * 12 * 12 * q.dtype.itemsize, 4 * 2 * 12 * 3
    assert sum(residuals) <= 4 * q.nbytes + weights * (2 if drops else 1) + sums, "none of them wider than the inputs"
    for actual, expected in zip((y, *backward(g)), (exact, *exact_backward(g.astype(jnp.float32))), strict=True):
        assert actual.dtype == dtype
        scale = np.abs(expected).max()
        np.testing.assert_allclose(np.float32(actual) / scale, expected / scale, atol=tolerance)


def test_cudnn_is_selected_if_its_gradients_are_right(monkeypatch, capsys):
    assert not dispatch._cudnn_works(64)
    message = "model.attention: falling back to XLA attention: cuDNN flash attention unavailable ("
    assert capsys.readouterr().err.startswith(message)
    by_xla = functools.partial(cudnn, implementation="xla")
    monkeypatch.setattr(dispatch, "cudnn", by_xla)
    with jax.numpy_dtype_promotion("standard"):  # needed by XLA's code, not by cuDNN's
        assert dispatch._cudnn_works(32)
        assert not capsys.readouterr().err
        monkeypatch.setattr(dispatch, "cudnn", lambda segments, *args: by_xla(segments * 0, *args))
        assert not dispatch._cudnn_works(96)
    assert "its gradients differ by" in capsys.readouterr().err


def test_attention_is_resolved_by_config_and_platform(monkeypatch):
    c = base.get_config()
    c.data.seq_len = c.model.max_positions = 512
    config = build(c)
    short = dataclasses.replace(config, data=dataclasses.replace(config.data, seq_len=256))
    exact = dataclasses.replace(config, train=dataclasses.replace(config.train, reproducible=True))
    for one, expected in ((config, "splash"), (short, "xla"), (exact, "xla")):
        assert [resolve_attention(one, platform) for platform in ("tpu", "gpu", "cpu")] == [expected, "xla", "xla"]
    c.model.dtype, c.model.attention_dropout_rate = "bfloat16", 0.0
    assert resolve_attention(build(c), "gpu") == "xla", "no cuDNN here"
    monkeypatch.setattr(dispatch, "_cudnn_works", lambda width: width == 64)
    for length, expected in ((512, "cudnn"), (128, "cudnn"), (64, "xla")):
        c.data.seq_len = length
        assert resolve_attention(build(c), "gpu") == expected
    c.model.attention = "cudnn"
    with pytest.raises(UserError, match="cudnn, which runs on GPUs; the devices here are of kind cpu"):
        resolve_attention(build(c), "cpu")
    assert select_kernel("cudnn", 514, drops=False) is cudnn
    c.model.dtype = "float32"
    with pytest.raises(UserError, match=r"model.dtype is float32; expected bfloat16 with model.attention=cudnn"):
        build(c)
    splash = dataclasses.replace(config, model=dataclasses.replace(config.model, attention="splash"))
    with pytest.raises(UserError, match="splash, which runs on TPUs; the devices here are of kind cpu"):
        resolve_attention(splash, "cpu")
    assert select_kernel("splash", 512, drops=True) is xla
    assert select_kernel("splash", 520, drops=False) is xla
    assert select_kernel("splash", 512, drops=False) is not xla


def test_remat_keeps_less():
    none, dots, full = (gradients(dataclasses.replace(BERT, remat=r))[1] for r in ("none", "dots", "full"))
    assert full < dots < none


def test_bfloat16_computes_near_float32_over_float32_parameters():
    tokens, segments, positions = packed_row()
    m, params = model(MODERN)
    half = heads.language_model(dataclasses.replace(MODERN, dtype="bfloat16"), V)
    assert {x.dtype for x in jax.tree.leaves(jax.eval_shape(half.init, jax.random.key(0)))} == {jnp.dtype("float32")}
    expected = m.encode(params, tokens, segments, positions)
    got = half.encode(params, tokens, segments, positions)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(got.astype(jnp.float32), expected, atol=0.15)


def test_dropout_follows_the_row_and_not_its_index_in_the_batch():
    m, params = model(dataclasses.replace(BERT, dropout_rate=0.3, attention_dropout_rate=0.3))
    tokens, segments, positions = (jnp.concatenate([x, x]) for x in packed_row())
    keys = jax.random.split(jax.random.key(1), 2)
    both = m.encode(params, tokens, segments, positions, dropout_keys_B=keys)
    swapped = m.encode(params, tokens, segments, positions, dropout_keys_B=keys[::-1])
    np.testing.assert_allclose(both, swapped[::-1], atol=1e-6)
    assert np.abs(both[0] - both[1]).max() > 0.1
    np.testing.assert_array_equal(
        m.encode(params, tokens, segments, positions)[0], m.encode(params, tokens, segments, positions)[1]
    )


def test_dropout_keeps_the_mean_and_zeroes_its_fraction():
    from flax_mlm.model.layers import Site, dropout

    x = dropout(jnp.ones((4, 100, 100)), jax.random.split(jax.random.key(0), 4), 0.25, Site.MLP_OUTPUT)
    assert abs(float((x == 0).mean()) - 0.25) < 0.01
    assert abs(float(x.mean()) - 1.0) < 0.02


def test_rotary_logits_depend_on_distance_alone():
    q, k = jax.random.normal(jax.random.key(0), (2, 8))

    def logit(i: int, j: int) -> float:
        table = layers.rotary_table(jnp.array([[i, j]]), 8, 10_000.0)
        rotated = layers.rotate(jnp.stack([q, k])[None, :, None], table)[0, :, 0]
        return float(rotated[0] @ rotated[1])

    assert logit(3, 7) == pytest.approx(logit(103, 107), abs=1e-4)
    assert logit(3, 7) != pytest.approx(logit(3, 8), abs=1e-3)


# transformers' own counts of BertForMaskedLM and ModernBertForMaskedLM at these shapes.
@pytest.mark.parametrize(
    ("file", "vocab_size", "count"),
    [
        (bert_base, 30_522, 109_514_298),
        (bert_large, 30_522, 335_174_458),
        (modernbert_base, 50_368, 149_655_232),
        (modernbert_large, 50_368, 395_881_664),
    ],
    ids=lambda x: getattr(x, "__name__", str(x)),
)
def test_parameter_counts_are_the_published_models(file, vocab_size, count):
    shape = dataclasses.replace(build(file.get_config()).model, vocab_multiple_of=1)
    m = heads.language_model(shape, vocab_size)
    assert sum(x.size for x in jax.tree.leaves(jax.eval_shape(m.init, jax.random.key(0)))) == count


def test_vocabulary_rows_are_rounded_up():
    m = heads.language_model(dataclasses.replace(BERT, vocab_multiple_of=128), 130)
    assert jax.eval_shape(m.init, jax.random.key(0))["encoder"]["embeddings"]["token"].shape == (256, 32)
