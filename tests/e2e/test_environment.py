"""The environment of a run changes none of its numbers, or is recorded."""

import shutil
from pathlib import Path

import pytest

from tests.helpers.runs import assert_same_run, finish

STEPS = 12
SHORT = {
    "train__steps": STEPS, "train__checkpoint_every": 4, "train__log_every": 3, "train__eval_every": 6,
    "model__dropout_rate": 0.1, "model__attention_dropout_rate": 0.1,
}  # fmt: skip


@pytest.fixture(scope="module")
def flags(toy) -> list[str]:
    return toy.flags(**SHORT)


@pytest.fixture(scope="module")
def first(toy, flags, tmp_path_factory) -> Path:
    """The workdir of a run in a usual environment."""
    workdir = tmp_path_factory.mktemp("first") / "run"
    finish(toy, workdir, *flags)
    return workdir


def test_settings_of_jax_change_no_number(toy, flags, first, tmp_path, monkeypatch):
    settings = {
        "default_prng_impl": "rbg", "threefry_partitionable": "0", "random_seed_offset": "7",
        "high_dynamic_range_gumbel": "1", "disable_jit": "1", "numpy_dtype_promotion": "strict",
    }  # fmt: skip
    for name, value in settings.items():
        monkeypatch.setenv(f"JAX_{name.upper()}", value)
    finish(toy, tmp_path / "run", *flags)
    assert_same_run(tmp_path / "run", first, STEPS)


def test_64_bit_numbers_are_refused_with_a_line(toy, flags, first, tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_ENABLE_X64", "1")
    trained = toy.run("train", f"--workdir={tmp_path / 'run'}", *flags)
    evaluated = toy.run("evaluate", f"--checkpoint={first}")
    for done in (trained, evaluated):
        assert done.returncode == 2, done.stderr
        assert done.stderr.startswith("error: jax_enable_x64 is on (JAX_ENABLE_X64); expected off")
        assert done.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_run_that_goes_on_in_another_environment_says_so(toy, flags, first, tmp_path, monkeypatch):
    shutil.copytree(first, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / str(STEPS))
    again = tmp_path / "again"
    shutil.copytree(tmp_path / "run", again)
    assert "note:" not in finish(toy, tmp_path / "run", *flags)
    assert_same_run(tmp_path / "run", first, STEPS)  # step 8 is inside a window of three
    monkeypatch.setenv("JAX_DEFAULT_MATMUL_PRECISION", "highest")
    said = finish(toy, again, *flags)
    assert "note: jax_default_matmul_precision was None, and is highest: from step 8 on, numbers may differ" in said
