"""The environment of a run changes none of its numbers, or is recorded; compiled programs are kept between runs."""

import dataclasses
import os
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from flax_mlm.config.schema import MeshConfig
from flax_mlm.distributed import compilation_cache
from flax_mlm.distributed.mesh import make_mesh
from flax_mlm.training import metrics
from tests.helpers.runs import assert_same_run, finish

STEPS = 12
SHORT = {
    "train__steps": STEPS, "train__checkpoint_every": 4, "train__log_every": 3, "train__eval_every": 6,
    "model__dropout_rate": 0.1, "model__attention_dropout_rate": 0.1,
}  # fmt: skip


@pytest.fixture(scope="module")
def flags(toy) -> list[str]:
    return toy.flags(**SHORT)


@dataclasses.dataclass
class First:
    """A run in a usual environment, and the empty folder that its compiled programs were kept in."""

    workdir: Path
    programs: Path


@pytest.fixture(scope="module")
def first(toy, flags, tmp_path_factory) -> First:
    folder = tmp_path_factory.mktemp("first")
    with pytest.MonkeyPatch.context() as m:
        m.setenv("JAX_COMPILATION_CACHE_DIR", str(folder / "programs"))
        finish(toy, folder / "run", *flags)
    return First(folder / "run", folder / "programs")


def test_settings_of_jax_change_no_number(toy, flags, first, tmp_path, monkeypatch):
    settings = {
        "default_prng_impl": "rbg", "threefry_partitionable": "0", "random_seed_offset": "7",
        "high_dynamic_range_gumbel": "1", "disable_jit": "1", "numpy_dtype_promotion": "strict",
        "transfer_guard": "disallow_explicit",
    }  # fmt: skip
    for name, value in settings.items():
        monkeypatch.setenv(f"JAX_{name.upper()}", value)
    finish(toy, tmp_path / "run", *flags)
    assert_same_run(tmp_path / "run", first.workdir, STEPS)


def test_64_bit_numbers_are_refused_with_a_line(toy, flags, first, tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_ENABLE_X64", "1")
    trained = toy.run("train", f"--workdir={tmp_path / 'run'}", *flags)
    evaluated = toy.run("evaluate", f"--checkpoint={first.workdir}")
    for done in (trained, evaluated):
        assert done.returncode == 2, done.stderr
        assert done.stderr.startswith("error: jax_enable_x64 is on (JAX_ENABLE_X64); expected off")
        assert done.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_run_that_goes_on_in_another_environment_says_so(toy, flags, first, tmp_path, monkeypatch):
    shutil.copytree(first.workdir, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / str(STEPS))
    again = tmp_path / "again"
    shutil.copytree(tmp_path / "run", again)
    assert "note:" not in finish(toy, tmp_path / "run", *flags)
    assert_same_run(tmp_path / "run", first.workdir, STEPS)  # step 8 is inside a window of three
    monkeypatch.setenv("JAX_DEFAULT_MATMUL_PRECISION", "highest")
    said = finish(toy, again, *flags)
    assert "note: jax_default_matmul_precision was None, and is highest: from step 8 on, numbers may differ" in said


def test_the_first_step_of_a_start_has_no_speed(first):
    """It waits for compilations, imports and the first read."""
    lines = metrics.lines(first.workdir, "train")
    assert [line["tokens_per_second"] > 0 for line in lines] == [True] * 4
    assert lines[0]["train_seconds"] == pytest.approx(lines[0]["tokens_seen"] / lines[0]["tokens_per_second"])


# Compiled programs


def entries(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_a_second_run_compiles_nothing_and_has_the_same_bits(toy, flags, first, tmp_path, monkeypatch):
    before = entries(first.programs)
    assert len(before) > 5
    for file in first.programs.iterdir():
        os.utime(file, (0, 0))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(first.programs))
    finish(toy, tmp_path / "run", *flags)
    assert_same_run(tmp_path / "run", first.workdir, STEPS)
    assert entries(first.programs) == before
    assert all(file.stat().st_mtime > 0 for file in first.programs.iterdir()), "each was read"


def test_programs_that_are_damaged_are_compiled_again(toy, flags, first, tmp_path, monkeypatch):
    for number, file in enumerate(sorted(first.programs.iterdir())):
        content = file.read_bytes()
        middle = len(content) // 2
        flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        file.write_bytes((flipped, content[:middle], b"", b"no program")[number % 4])
    damaged = entries(first.programs)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(first.programs))
    finish(toy, tmp_path / "run", *flags)
    assert_same_run(tmp_path / "run", first.workdir, STEPS)
    mended = entries(first.programs)
    assert mended.keys() == damaged.keys()
    assert all(mended[name] != damaged[name] for name in mended)


def test_nothing_is_kept_where_the_flag_says_so(toy, flags, first, tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "none"))
    finish(toy, tmp_path / "run", "--nocompilation_cache", *flags)
    assert_same_run(tmp_path / "run", first.workdir, STEPS)
    assert not (tmp_path / "none").exists()


def test_a_folder_for_programs_that_cannot_be_written_stops_nothing(toy, tmp_path, monkeypatch, first):
    (tmp_path / "file").touch()
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "file" / "programs"))
    done = toy.run("fill_mask", f"--checkpoint={first.workdir}", "The [MASK] sleeps.")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


@pytest.fixture
def cache(tmp_path) -> compilation_cache.Entries:
    (tmp_path / "programs").mkdir()
    return compilation_cache.Entries(tmp_path / "programs", limit=1000)


def test_an_entry_of_another_processor_or_name_is_not_used(cache, tmp_path, monkeypatch):
    cache.put("jit_f-1", b"code")
    assert cache.get("jit_f-1") == b"code"
    (entry,) = (tmp_path / "programs").iterdir()
    monkeypatch.setattr(compilation_cache, "processor", lambda: "another")
    assert cache.get("jit_f-1") is None
    cache.put("jit_f-1", b"other code")
    (foreign,) = {*(tmp_path / "programs").iterdir()} - {entry}
    shutil.copy(entry, foreign)
    assert cache.get("jit_f-1") is None


def test_what_was_not_used_for_longest_makes_room(cache, tmp_path):
    for number in range(3):
        cache.put(f"jit_f-{number}", bytes(250))
    for number, file in enumerate(cache._file(f"jit_f-{n}") for n in (1, 0, 2)):
        os.utime(file, (number, number))
    assert cache.get("jit_f-1") is not None  # now the last that was used
    cache.put("jit_f-3", bytes(250))
    assert [cache.get(f"jit_f-{n}") is not None for n in range(4)] == [False, True, True, True]


def test_the_processor_is_told_by_its_features_and_the_threads(monkeypatch):
    known = compilation_cache.processor()
    assert "flags" in known or "Features" in known or not Path("/proc/cpuinfo").exists()
    monkeypatch.setenv("NPROC", "77")
    assert compilation_cache.processor.__wrapped__() != known


def test_programs_of_several_cpu_devices_are_not_kept(monkeypatch, tmp_path):
    """XLA loses the order of their collectives, and devices then wait for each other."""
    kept = []
    monkeypatch.setattr(compilation_cache.Entries, "put", lambda self, key, value: kept.append(key))
    monkeypatch.setattr(compilation_cache.Entries, "get", lambda self, key: kept.append(key))

    def called_by_one(x):
        return x + 1

    def called_by_all(x):
        return x + 1

    for devices, function in ((1, called_by_one), (8, called_by_all)):
        mesh = make_mesh(MeshConfig(-1, 1, 1), jax.devices()[:devices])
        rows = jax.NamedSharding(mesh, jax.P("data"))
        x = jax.make_array_from_callback((8,), rows, lambda i: np.zeros(8, np.float32)[i])
        jax.block_until_ready(jax.jit(function)(x))
    assert any("called_by_one" in key for key in kept)
    assert not any("called_by_all" in key for key in kept)
