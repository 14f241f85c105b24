"""Planning: what a compiled program does is read right, and estimates follow from it. Without the TPU compiler; with it
see test_plan_tpu.py."""

import functools
import importlib.util
import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from flax_mlm import plan
from flax_mlm.config.load import build
from flax_mlm.configs import base
from flax_mlm.data.prepare import prepare
from flax_mlm.distributed import chips
from flax_mlm.errors import UserError
from flax_mlm.planning import cost, hlo, report, roofline, search, worker
from flax_mlm.planning.compile import CompiledStep, Target, compile_step_for, parse_target
from flax_mlm.planning.cost import collectives
from flax_mlm.planning.hlo import Program
from tests.helpers.plans import TINY, bert

SHAPE = {"data": 2, "fsdp": 2, "tensor": 2}


def compiled(fn, *arguments) -> Program:
    return Program(jax.jit(fn).lower(*arguments).compile().as_text())


@pytest.fixture(scope="module", autouse=True)
def mesh():
    with jax.set_mesh(jax.make_mesh(tuple(SHAPE.values()), tuple(SHAPE), (AxisType.Explicit,) * 3)) as mesh:
        yield mesh


def local(fn, *out):
    return jax.shard_map(fn, in_specs=PartitionSpec(), out_specs=PartitionSpec(*out), check_vma=False)


@pytest.mark.parametrize(
    "axes", [("data",), ("fsdp",), ("tensor",), ("data", "fsdp"), ("data", "tensor"), tuple(SHAPE)]
)
def test_the_axes_of_a_sum_are_read_from_its_groups(axes):
    program = compiled(local(lambda x: jax.lax.psum(x, axes)), jnp.zeros((3, 100)))
    (one,) = collectives(program, SHAPE)
    assert (one.kind, one.axes, one.size, one.bytes, one.times) == ("all-reduce", axes, 2 ** len(axes), 1200, 1)
    assert one.sent == 2 * 1200 * (1 - 1 / 2 ** len(axes))  # a ring passes everything twice, but its own part


@pytest.mark.parametrize(
    ("kind", "fn", "moved", "sent"),
    [
        ("all-gather", lambda x: jax.lax.all_gather(x, "fsdp"), 2 * 4000, 4000),
        ("reduce-scatter", lambda x: jax.lax.psum_scatter(x, "fsdp", tiled=True), 4000, 2000),
        ("all-to-all", lambda x: jax.lax.all_to_all(x, "fsdp", 0, 0, tiled=True), 4000, 2000),
        ("collective-permute", lambda x: jax.lax.ppermute(x, "fsdp", [(0, 1), (1, 0)]), 4000, 4000),
    ],
)
def test_each_kind_has_the_bytes_of_its_whole_array(kind, fn, moved, sent):
    found = collectives(compiled(local(fn, tuple(SHAPE)), jnp.zeros((1000,))), SHAPE)
    assert [(c.kind, c.axes, c.bytes, c.sent) for c in found] == [(kind, ("fsdp",), moved, sent)]


def test_what_is_in_a_loop_counts_as_often_as_the_loop_turns():
    def body(x, _):
        with jax.named_scope("layers"):
            return jnp.sin(jax.lax.psum(x, "data")), None

    def nested(x, _):
        return jax.lax.scan(body, x, length=3)[0], None

    program = compiled(local(lambda x: jax.lax.scan(nested, x, length=5)[0]), jnp.zeros((1000,)))
    (one,) = collectives(program, SHAPE)
    assert (one.times, one.bytes, one.scope) == (15, 4000, "layers")


def test_traffic_of_elementwise_code_is_what_goes_in_and_out():
    x = jnp.zeros((1000, 128))
    assert cost.traffic(compiled(lambda x, y: jnp.sin(x) + y, x, x)) == 3 * x.nbytes


def test_flops_of_matmuls_in_a_loop():
    x = jnp.zeros((3, 50, 40))
    program = compiled(lambda x, w: jax.lax.scan(lambda x, w: (x @ w, None), x, w)[0], x, jnp.zeros((7, 40, 40)))
    assert cost.matmul_flops(program) == 7 * 2 * 3 * 50 * 40 * 40


@pytest.mark.parametrize(
    "how",
    [
        {"padding": "VALID"},
        {"padding": [(11, 11), (0, 2)], "rhs_dilation": (1, 2)},
        {"window_strides": (2, 3), "padding": "SAME"},
        {"padding": [(1, 4), (3, 0)], "lhs_dilation": (2, 1)},
        {"padding": "SAME", "feature_group_count": 2},
    ],
    ids=str,
)
def test_flops_of_convolutions_are_those_that_xla_counts(how):
    """The TPU compiler makes convolutions, some with paddings such as these, of all matmuls."""
    x = jax.ShapeDtypeStruct((2, 4, 12, 9), jnp.float32)
    kernel = jax.ShapeDtypeStruct((6, 4 // how.get("feature_group_count", 1), 5, 3), jnp.float32)
    how = {"window_strides": (1, 1), **how}
    with jax.set_mesh(jax.make_mesh((1,), ("data",))):
        done = jax.jit(lambda x, kernel: jax.lax.conv_general_dilated(x, kernel, **how)).lower(x, kernel).compile()
    assert cost.matmul_flops(Program(done.as_text())) == done.cost_analysis()["flops"]


def test_a_part_of_an_array_that_is_read_or_written_counts_alone():
    big, small = jnp.zeros((1000, 128)), jnp.zeros((1, 128))
    reads = compiled(lambda x, i: jax.lax.dynamic_slice(x, (i, 0), (1, 128)) + 1.0, big, 3)
    assert 2 * small.nbytes <= cost.traffic(reads) < 4 * small.nbytes

    @functools.partial(jax.jit, donate_argnums=0)
    def write(x, y, i):
        return jax.lax.dynamic_update_slice(x, jnp.sin(y), (i, 0))

    writes = Program(write.lower(big, small, 3).compile().as_text())
    assert 2 * small.nbytes <= cost.traffic(writes) < 4 * small.nbytes


NESTED = """HloModule nested
%read (x: f32[1000,128], i: s32[]) -> f32[1,128] {
  %x = f32[1000,128]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %part = f32[1,128]{1,0} dynamic-slice(%x, %i, %zero), dynamic_slice_sizes={1,128}
}

%write (x: f32[1000,128], i: s32[], y: f32[1,128]) -> f32[1000,128] {
  %x = f32[1000,128]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %y = f32[1,128]{1,0} parameter(2)
  %zero = s32[] constant(0)
  ROOT %all = f32[1000,128]{1,0} dynamic-update-slice(%x, %y, %i, %zero)
}

%outer (source: f32[1000,128], target: f32[1000,128], i: s32[]) -> f32[1000,128] {
  %source = f32[1000,128]{1,0} parameter(0)
  %target = f32[1000,128]{1,0} parameter(1)
  %i = s32[] parameter(2)
  %part = f32[1,128]{1,0} fusion(%source, %i), kind=kLoop, calls=%read
  %sine = f32[1,128]{1,0} sine(%part)
  ROOT %all = f32[1000,128]{1,0} fusion(%target, %i, %sine), kind=kLoop, calls=%write
}

ENTRY %main (source: f32[1000,128], target: f32[1000,128], i: s32[]) -> f32[1000,128] {
  %source = f32[1000,128]{1,0} parameter(0)
  %target = f32[1000,128]{1,0} parameter(1)
  %i = s32[] parameter(2)
  ROOT %all = f32[1000,128]{1,0} fusion(%source, %target, %i), kind=kLoop, calls=%outer
}
"""


def test_a_part_that_a_fusion_inside_another_reads_or_writes_counts_alone():
    """As the TPU compiler writes a layer's share of what a scan stacked."""
    part, index = 128 * 4, 4
    assert cost.traffic(Program(NESTED)) == 2 * part + index


def test_a_part_that_is_read_or_written_with_other_tiles_counts_alone():
    """As the compiler writes the same for tpu7x."""
    text = NESTED.replace(
        "ROOT %part = f32[1,128]{1,0} dynamic-slice(%x,",
        "%tiled = f32[1000,128]{1,0} fusion(%x), output_to_operand_aliasing={{}: (0, {})}, calls=%tile\n"
        "  ROOT %part = f32[1,128]{1,0} dynamic-slice(%tiled,",
    ).replace(
        "ROOT %all = f32[1000,128]{1,0} dynamic-update-slice(%x,",
        "%tiled = f32[1000,128]{1,0} fusion(%x), output_to_operand_aliasing={{}: (0, {})}, calls=%tile\n"
        "  ROOT %all = f32[1000,128]{1,0} dynamic-update-slice(%tiled,",
    )
    tile = """%tile (x: f32[1000,128]) -> f32[1000,128] {
  %x = f32[1000,128]{1,0} parameter(0)
  ROOT %y = f32[1000,128]{1,0} copy(%x)
}

%read"""
    text = text.replace("%read", tile, 1)
    assert text.count("calls=%tile\n") == 2
    assert cost.traffic(Program(text)) == cost.traffic(Program(NESTED))


def test_a_room_that_is_only_made_moves_nothing():
    """As the TPU compiler makes what a scan writes its layers into."""
    entry = """ENTRY %main (x: f32[8,128]) -> f32[8,128] {
  %x = f32[8,128]{1,0} parameter(0)
  %room = f32[1000,128]{1,0} custom-call(), custom_call_target="AllocateBuffer"
  ROOT %y = f32[8,128]{1,0} sine(%x)
}
"""
    assert cost.traffic(Program(f"HloModule room\n{entry}")) == 2 * 8 * 128 * 4


def test_tiles_are_padded():
    assert hlo.padded_bytes("f32[3,5]{1,0:T(8,128)}") == 8 * 128 * 4
    assert hlo.padded_bytes("bf16[16,130]{0,1:T(8,128)(2,1)}") == 136 * 128 * 2  # the minor dimension is the first
    assert hlo.hbm_bytes("(f32[8,128]{1,0:T(8,128)}, f32[8,128]{1,0:T(8,128)S(1)})") == 4096


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("TPU v4", "v4"),
        ("TPU v5 lite", "v5e"),
        ("TPU v5", "v5p"),
        ("TPU v6 lite", "v6e"),
        ("TPU7x", "tpu7x"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA L40S", None),
        ("cpu", None),
    ],
)
def test_chips_are_known_by_the_name_that_jax_gives_them(kind, name):
    chip = chips.of_kind(kind)
    assert (chip and chip.name) == name


def test_two_devices_on_a_chip_share_its_peak():
    def core(x, slice_index=0):
        return SimpleNamespace(device_kind="TPU7x", platform="tpu", coords=(x, 0, 0), slice_index=slice_index)

    assert chips.count([core(0), core(0), core(1), core(1), core(0, 1)]) == 3
    assert chips.peak_flops([core(0), core(0)]) == 2307e12
    assert chips.peak_flops([SimpleNamespace(device_kind="cpu", platform="cpu")] * 4) is None
    gpu = SimpleNamespace(device_kind="NVIDIA H100", platform="gpu", coords=(0, 0, 0), slice_index=0)
    assert chips.count([gpu] * 8) == 8, "each is the first of its own process"


@pytest.mark.parametrize(
    ("text", "kind", "shape"),
    [("v5e:4x4", "v5e", "4x4"), ("v5p:4x4x4", "v5p", "4x4x4"), ("cpu", "cpu", "1"), ("gpu:h100:8", "gpu", "8")],
)
def test_targets(text, kind, shape):
    target = parse_target(text)
    assert (target.kind, target.shape, target.is_tpu) == (kind, shape, kind.startswith("v"))


@pytest.mark.parametrize(
    "text", ["", "v5e", "v5e:", "v5e:4", "v5e:4x", "cpu:0", "cpu:x", "gpu", "gpu:h100:8:1", "x:4x4"]
)
def test_what_is_no_target_is_refused(text):
    with pytest.raises(UserError, match="--topology is"):
        parse_target(text)


def test_a_cpu_has_no_slices():
    with pytest.raises(UserError, match="slices"):
        parse_target("cpu:8", slices=2)


def torus(*places):
    return [SimpleNamespace(device_kind="TPU v5 lite", coords=place) for place in places]


@pytest.mark.parametrize(
    ("group", "shape", "links"),
    [
        (torus((0, 0, 0), (1, 0, 0), (2, 0, 0), (3, 0, 0)), "4x4", 1),  # a line
        (torus(*((i, 0, 0) for i in range(16))), "16x16", 2),  # a ring, both ways
        (torus(*((i, j, 0) for i in range(4) for j in range(4))), "4x4", 2),  # two lines
        (torus(*((i, j, 0) for i in range(16) for j in range(16))), "16x16", 4),  # two rings
        (torus((0, 0, 0), (2, 0, 0)), "4x4", 0.5),  # every second chip: two groups share the line
        (torus((0, 0, 0), (0, 0, 0)), "4x4", 0),  # two cores of a chip
    ],
)
def test_links_that_a_group_sends_through(group, shape, links):
    assert worker._links(group, Target("v5e", shape)) == links


def found(**changes) -> CompiledStep:
    values = dict(
        device_kind="TPU v5 lite", devices=4, chips=4, mesh={"data": 4, "fsdp": 1, "tensor": 1}, parameters=1,
        vocab_rows=128, flops=4 * 197e12 * 0.010, attention="xla", parameter_bytes=1, optimizer_bytes=1,
        activation_bytes=1, argument_bytes=1, traffic=int(0.82e12 * 0.020),
        collectives=[
            {"axes": ["data"], "sent": 50e9 * 0.004, "links": 2.0},
            {"axes": ["slices"], "sent": 3.1e9 * 0.003, "links": 0.0},
        ],
    )  # fmt: skip
    return CompiledStep(**(values | changes))


def test_the_roofline_is_bytes_and_flops_over_rates():
    chip = chips.of_kind("TPU v5 lite")
    roof = roofline.estimate(found(), bert(), chip)
    assert roof == pytest.approx((0.010, 0.020, 0.002, 0.003))
    assert (roof.best, roof.worst) == pytest.approx((0.020, 0.035))
    assert roofline.mfu(found(), chip, 0.020) == pytest.approx(0.5)
    full = roofline.estimate(found(), bert(**{"model.remat": "full"}), chip)
    assert full.compute == pytest.approx(0.040 / 3)


def test_two_devices_on_a_chip_have_half_of_it_each():
    chip = chips.of_kind("TPU7x")
    one, two = (roofline.estimate(found(chips=n), bert(), chip) for n in (4, 2))
    assert two == pytest.approx([2 * seconds for seconds in one])


def test_what_fills_tiles_badly_is_named():
    target = parse_target("v5e:2x2")
    (good,) = report.tiling_lines(bert(**{"model.num_heads": 6}), found(), target)
    assert good.endswith("512 rows, 6 heads on each device at a time; all tiles are full")
    notes = "\n".join(report.tiling_lines(bert(**{"data.seq_len": 100}), found(vocab_rows=30_522), target))
    assert "data.seq_len is 100" in notes
    assert "30522 rows on each device" in notes
    assert "64 wide" in notes
    few = "\n".join(report.tiling_lines(bert(**{"train.global_batch_size": 4}), found(), target))
    assert "128 tokens on each device at a time are few" in few
    assert "a matmul tile is 256" in "\n".join(report.tiling_lines(bert(), found(), parse_target("v6e:2x2")))


def test_of_a_run_with_phases_the_one_that_predicts_most_is_planned():
    changed = bert(**{"train.phases": "50%: objective.mask_rate=0.4; 90%: objective.mask_rate=0.1"})
    heaviest, note = plan.heaviest_phase(changed)
    assert heaviest.objective.mask_rate == 0.4
    assert note == "planning the heaviest of 3 phases, which begins at 50% of the run"
    causal_first = bert(**{"objective.name": "clm", "train.phases": "50%: objective.name=mlm"})
    assert plan.heaviest_phase(causal_first)[0].objective.name == "clm"


def test_pure_data_parallelism_sums_gradients_and_gathers_nothing():
    tiny = bert(**TINY)
    result = compile_step_for(tiny, 512, parse_target("cpu:4"))
    assert {(c["kind"], *c["axes"]) for c in result.collectives} == {("all-reduce", "data")}
    moved = sum(c["bytes"] * c["times"] for c in result.collectives)
    # The token embedding twice: its lookup and the vocabulary head have a gradient each.
    assert moved == pytest.approx(4 * (result.parameters + 512 * 64), rel=0.01)
    assert result.parameter_bytes == 4 * result.parameters


def test_fsdp_gathers_layer_by_layer_inside_the_scan():
    tiny = bert(**TINY, **{"mesh.fsdp": 4})
    result = compile_step_for(tiny, 512, parse_target("cpu:4"))
    gathers = [c for c in result.collectives if c["kind"] == "all-gather" and c["scope"] == "layers"]
    assert gathers
    assert {c["times"] % 5 for c in gathers} == {0}
    a_pass = sum(c["bytes"] * c["times"] for c in gathers) / 2  # forward and backward
    matrices = 5 * (4 * 64 * 64 + 2 * 64 * 128) * 4
    assert a_pass == pytest.approx(matrices, rel=0.05)
    assert max(c["bytes"] for c in gathers) <= 64 * 128 * 4 * 2  # never more than one layer's largest array or two
    assert result.parameter_bytes < 0.3 * 4 * result.parameters


def test_activations_are_what_the_forward_pass_keeps():
    size = {
        remat: compile_step_for(
            bert(**TINY, **{"model.remat": remat}), 512, parse_target("cpu:1"), compiles=False
        ).activation_bytes
        for remat in ("none", "dots", "full")
    }
    assert size["none"] > size["dots"] > size["full"] >= 5 * 16 * 32 * 64 * 4  # the layers' inputs
    half = compile_step_for(
        bert(**TINY, **{"train.gradient_accumulation_steps": 2}), 512, parse_target("cpu:1"), compiles=False
    ).activation_bytes
    assert half == pytest.approx(size["none"] / 2, rel=0.1)


def test_the_command_plans_for_cpus_and_gpus(toy, tmp_path):
    file = tmp_path / "plan.json"
    done = toy.run("plan", *toy.flags(), "--topology=cpu:2", f"--json={file}")
    assert done.returncode == 0, done.stderr
    assert "400 rows of vocabulary" in done.stdout
    assert "all-reduce          data" in done.stdout
    assert json.loads(file.read_text())["mesh"] == {"data": 2, "fsdp": 1, "tensor": 1}
    done = toy.run("plan", *toy.flags(), "--topology=gpu:h100:2", "--price=2", "--token_budget=1e9")
    assert done.returncode == 0, done.stderr
    assert "not compiled" in done.stdout
    assert "989 TFLOP/s" in done.stdout
    assert "at 2 per chip-hour" in done.stdout
    assert "attention xla, " in done.stdout
    done = toy.run("plan", *toy.flags(train__tokens=1e6), "--topology=cpu:2")
    assert done.returncode == 0, done.stderr
    done = toy.run("plan", *toy.flags(train__budget_minutes=240), "--topology=gpu:h100:2", "--price=2")
    assert done.returncode == 0, done.stderr
    assert "billion tokens at best in the 4.00 hours of train.budget_minutes" in done.stdout
    assert "            16.00, at 2 per chip-hour" in done.stdout
    more = toy.flags(model__attention="cudnn", model__dtype="bfloat16", model__attention_dropout_rate=0.0)
    done = toy.run("plan", *more, "--topology=gpu:h100")
    assert done.returncode == 0
    assert "attention xla (cuDNN's where available, which keeps less)" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--topology=gpu:abacus"], "--topology has GPU 'abacus'; expected one of a100, h100"),
        (["--topology=cpu:3"], "train.global_batch_size is 16; expected a multiple of 3"),
        (["--topology=cpu", "--sweep"], "expected a TPU, since only those have estimates"),
        (["--topology=cpu", "--slices=2"], "only TPUs have slices"),
        (["--json=/nowhere/at/all.json"], "--json"),
        pytest.param(
            ["--topology=v5e:4x4"],
            "pip install -r launch/tpu-requirements.txt",
            marks=pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="libtpu is installed"),
        ),
    ],
)
def test_mistakes_are_answered_with_a_line(toy, arguments, message):
    done = toy.run("plan", *toy.flags(), *arguments)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert message in done.stderr


def test_meshes_are_all_that_stay_inside_a_slice():
    assert search.parse_meshes("", bert(), 32, 2) == [(32, 1, 1), (16, 2, 1), (8, 4, 1), (4, 8, 1), (2, 16, 1)]
    assert search.parse_meshes("2x2x2,8x1x1", bert(), 8, 1) == [(2, 2, 2), (8, 1, 1)]
    assert np.prod(search.parse_meshes("", bert(), 8, 1), axis=1).tolist() == [8] * 4


def test_rows_of_a_corpus_that_are_longer_than_the_positions_are_refused(tmp_path):
    (tmp_path / "text.txt").write_text("\n\n".join(f"number {i} is {i * i} and {i + 7}" for i in range(300)))
    c = base.get_config()
    c.data.source, c.data.seq_len, c.tokenizer.vocab_size = f"text:{tmp_path}/text.txt", 32, 300
    prepare(build(c), tmp_path / "corpus", lambda line: None)
    c.data.corpus, c.data.seq_len, c.model.max_positions = str(tmp_path / "corpus"), 16, 16
    with pytest.raises(UserError, match=r"data\.seq_len is 32, longer than model\.max_positions, 16"):
        plan.adopt_corpus(build(c))
