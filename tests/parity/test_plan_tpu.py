"""Planning with the real TPU compiler, which `bash launch/test.sh --references` installs. No TPU is needed."""

import importlib
import importlib.metadata
import json

import pytest

from flax_mlm.config.load import build
from flax_mlm.planning.compile import CompiledStep, compile_step_for, parse_target
from tests.helpers.paths import GOLDEN
from tests.helpers.plans import TINY, bert

pytest.importorskip("libtpu")

SMALL = TINY | {
    "data.seq_len": 128, "model.hidden_size": 256, "model.intermediate_size": 1024, "model.dtype": "bfloat16",
    "tokenizer.vocab_size": 4096, "train.global_batch_size": 64,
}  # fmt: skip
LAYER = 4 * 256 * 256 + 2 * 256 * 1024  # parameters in matrices


def compile_for(topology: str, slices: int = 1, compiles: bool = True, **changes) -> CompiledStep:
    return compile_step_for(bert(**(SMALL | changes)), 4096, parse_target(topology, slices), compiles)


def moved(result: CompiledStep, kind: str, scope: str | None = None) -> float:
    return sum(c["bytes"] * c["times"] for c in result.collectives if c["kind"] == kind and scope in (None, c["scope"]))


def test_one_chip_has_nobody_to_talk_to():
    result = compile_for("v5e:1x1")
    assert (result.devices, result.collectives) == (1, [])
    assert result.compiled
    assert result.total_bytes < 16 * 2**30


def test_pure_data_parallelism_sums_gradients_and_gathers_nothing():
    result = compile_for("v5e:4x4")
    assert {c["kind"] for c in result.collectives} == {"all-reduce"}
    assert {tuple(c["axes"]) for c in result.collectives} == {("data",)}
    # The matrices' in bfloat16, as they come out of the matmuls; the embeddings' in float32, with those of the
    # vocabulary head, which has the same parameters, added to them before.
    expected = 2 * 5 * LAYER + 4 * (4096 + 512) * 256
    assert moved(result, "all-reduce") == pytest.approx(expected, rel=0.03)


def test_fsdp_gathers_layer_by_layer_and_scatters_gradients():
    result = compile_for("v5e:4x4", **{"mesh.fsdp": 4})
    gathers = [c for c in result.collectives if c["kind"] == "all-gather" and c["scope"] == "layers"]
    assert {c["times"] % 5 for c in gathers} == {0}, "in every turn of the scan"
    assert moved(result, "all-gather", "layers") == pytest.approx(2 * 5 * LAYER * 2, rel=0.05)  # both passes, bfloat16
    assert max(c["bytes"] for c in gathers) <= 2 * LAYER, "never more than a layer"
    assert moved(result, "reduce-scatter", "layers") == pytest.approx(5 * LAYER * 2, rel=0.05)
    assert {tuple(c["axes"]) for c in gathers} == {("fsdp",)}


def test_between_slices_go_gradients_alone():
    result = compile_for("v5e:2x4", slices=2, **{"mesh.fsdp": 8})
    assert result.mesh == {"data": 2, "fsdp": 8, "tensor": 1}
    between = [c for c in result.collectives if c["axes"] == ["slices"]]
    assert {c["kind"] for c in between} == {"all-reduce"}
    # Each device its own eighth of the matrices, in bfloat16 or float32; vectors whole.
    assert 2 / 8 < sum(c["bytes"] * c["times"] for c in between) / result.parameters < 1.5 * 4 / 8
    assert all("data" not in c["axes"] for c in result.collectives), "a slice has one place of data"


def test_long_rows_are_attended_to_by_the_kernel_in_less_memory():
    sizes = {
        name: compile_for(
            "v5e:1x1",
            **{
                "data.seq_len": 1024,
                "model.max_positions": 1024,
                "model.attention": name,
                "train.global_batch_size": 8,
            },
            **{"model.attention_dropout_rate": 0.0, "model.dropout_rate": 0.0},
        )
        for name in ("auto", "xla")
    }
    assert (sizes["auto"].attention, sizes["xla"].attention) == ("splash", "xla")
    assert sizes["auto"].temporary_bytes < 0.7 * sizes["xla"].temporary_bytes


TPU_GOLDEN = GOLDEN / "tpu.json"
STEPS = {
    "bert_base on v6e:16x16": {},
    "bert_large on v5e:16x16": {"mesh.fsdp": 4},
    "modernbert_base on v5e:16x16": {},
}
TOLERANCE = {"matmuls": 0.01, "gib": 0.03, "traffic_gb": 0.05, "fusions": 0.1, "copies": 0.1}


IN_FULL = [pytest.param(name, marks=() if "modernbert" in name else pytest.mark.full) for name in STEPS]


@pytest.mark.parametrize("name", IN_FULL)
def test_what_the_compiler_makes_of_a_step_stays_as_it_was(name, request):
    """Matmuls over the model's FLOPs, memory, traffic, fusions and copies, a chip; `--update_golden` where a difference
    is meant. Other versions of the compiler do otherwise."""
    held = json.loads(TPU_GOLDEN.read_text())
    updates, libtpu = request.config.getoption("--update_golden"), importlib.metadata.version("libtpu")
    if held["libtpu"] != libtpu and not updates:
        pytest.skip(f"the numbers are those of libtpu {held['libtpu']}, and here is {libtpu}")
    module, topology = name.split(" on ")
    values = importlib.import_module(f"flax_mlm.configs.{module}").get_config()
    values.update_from_flattened_dict(STEPS[name])
    built = build(values)
    found = compile_step_for(built, built.tokenizer.vocab_size, parse_target(topology))
    got = {
        "matmuls": found.matmul_ratio,
        "gib": found.total_bytes / 2**30,
        "traffic_gb": found.traffic / 1e9,
        "fusions": found.fusions,
        "copies": found.copies,
    }
    if updates:
        held |= {"libtpu": libtpu, name: {key: round(value, 3) for key, value in got.items()}}
        TPU_GOLDEN.write_text(json.dumps(held, indent=1) + "\n")
    assert got == {key: pytest.approx(value, rel=TOLERANCE[key]) for key, value in held[name].items()}


@pytest.mark.parametrize("topology", ["v5e:16x16", "v6e:16x16", "v5p:4x4x4", "v4:2x2x4", "tpu7x:2x2x2"])
def test_a_mesh_may_split_a_dimension_of_the_slice(topology):
    result = compile_for(topology, compiles=False, **{"mesh.fsdp": 4, "train.global_batch_size": 256})
    assert result.mesh["fsdp"] == 4
    assert result.devices == result.mesh["data"] * 4


def test_two_devices_on_a_chip():
    result = compile_for("tpu7x:2x2x1", compiles=False)
    assert (result.devices, result.chips) == (8, 4)


BIG = ["--config=configs/bert_base.py", *(f"--config.{k}={v}" for k, v in SMALL.items())]


def test_what_does_not_fit_is_said_with_the_smallest_change_that_does(toy, tmp_path):
    file = tmp_path / "plan.json"
    done = toy.run("plan", *BIG, "--config.train.global_batch_size=4096", "--topology=v5e:1x1", f"--json={file}")
    assert done.returncode == 1, done.stderr
    assert "RESOURCE_EXHAUSTED" in done.stdout
    assert "15.75G" in done.stdout
    change = json.loads(file.read_text())["smallest_change"]
    assert change.keys() == {"train.gradient_accumulation_steps"}
    again = [f"--config.{name}={value}" for name, value in change.items()]
    done = toy.run("plan", *BIG, "--config.train.global_batch_size=4096", "--topology=v5e:1x1", *again)
    assert done.returncode == 0
    assert "roofline" in done.stdout


def test_a_sweep_names_the_best(toy):
    done = toy.run("plan", *BIG, "--topology=v5e:2x2", "--sweep", "--meshes=4x1x1,1x4x1")
    assert done.returncode == 0, done.stderr
    *_, row, best = done.stdout.splitlines()
    fitting = [line.split() for line in done.stdout.splitlines() if line[:1].isdigit() and " to " in line]
    rows = {words[0]: float(words[6]) for words in fitting}  # mesh, remat, microbatches, GiB, best, to, worst
    fastest = min(rows, key=rows.__getitem__)
    assert rows.keys() == {"4×1×1", "1×4×1"}
    assert row.startswith(fastest)
    assert best.startswith(f"--config.mesh.data={fastest[0]} --config.mesh.fsdp={fastest[2]}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--topology=v5e:5x3"], "--topology=v5e:5x3: "),
        (["--topology=v9z:2x2"], "--topology=v9z:2x2: "),
        (["--topology=v5e:2x2", "--sweep", "--meshes=3x1x1"], "with a product of 4"),
        (["--topology=v5e:2x2", "--slices=2", "--config.mesh.fsdp=8"], "mesh.data is 1; expected a multiple of 2"),
    ],
)
def test_mistakes_are_answered_with_a_line(toy, arguments, message):
    done = toy.run("plan", *BIG, *arguments)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert message in done.stderr
