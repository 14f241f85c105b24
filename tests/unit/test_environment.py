"""The settings that make CPU results right."""

import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_mlm.config.schema import MeshConfig
from flax_mlm.distributed import jax_options
from flax_mlm.distributed.mesh import make_mesh, use_mesh
from flax_mlm.objectives.rows import new_key
from tests.helpers.paths import ROOT


def test_sums_are_right_under_jit():
    """jax-ml/jax#39103: this jaxlib's YNNPACK reductions lose part of a long sum."""
    x = jnp.full(32_769, 32_768.0)
    assert float(jax.jit(jnp.sum)(x)) == float(np.sum(np.asarray(x, np.float64)))


def test_every_option_of_jax_is_fixed_recorded_or_irrelevant():
    """An option of a new JAX is to be listed: does it change masks, or last bits, or nothing?"""
    kinds = (jax_options.FIXED, jax_options.RECORDED, jax_options.IRRELEVANT)
    listed = [name for kind in kinds for name in kind]
    assert jax.config.values.keys() <= set(listed)
    assert len(listed) == len(set(listed))


def test_what_is_recorded_tells_two_environments_apart(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_b=1 --xla_a=1 --xla_dump_to=/a --xla_force_host_platform_device_count=8")
    before = jax_options.recorded()
    monkeypatch.setenv("XLA_FLAGS", "--xla_a=1 --xla_b=1")
    assert jax_options.differences(before, jax_options.recorded()) == []
    monkeypatch.setenv("XLA_FLAGS", "--xla_a=2")
    with jax.default_matmul_precision("highest"):
        assert jax_options.differences(before, jax_options.recorded()) == [
            "jax_default_matmul_precision was None, and is highest",
            "XLA_FLAGS was --xla_a=1 --xla_b=1, and is --xla_a=2",
        ]


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**32 - 1, 2**40 + 5])
def test_keys_are_the_same_with_every_generator_and_offset(seed):
    expected = jax.random.key_data(jax.random.key(seed, impl="threefry2x32"))
    with jax.default_prng_impl("rbg"):
        key = new_key(seed)
    assert jax.random.key_impl(key) == "threefry2x32"
    assert (jax.random.key_data(key) == expected).all()


def test_every_key_and_every_draw_names_its_generator_and_dtype():
    for file in sorted((ROOT / "flax_mlm").rglob("*.py")):
        for line in file.read_text().splitlines():
            if re.search(r"random\.(key|PRNGKey)\(", line):
                assert "impl=" in line, f"{file}: {line}"
            if re.search(r"random\.(normal|gumbel|uniform)\(", line):
                assert re.search(r"jnp\.(b?float\d+)", line), f"{file}: {line}"


@pytest.mark.parametrize("is_partitionable", [True, False])
def test_random_bits_follow_from_the_key_alone_on_a_mesh(is_partitionable):
    mesh = make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    with jax.threefry_partitionable(is_partitionable), jax.disable_jit(), use_mesh(mesh):
        bits = jax.jit(lambda key: jax.random.bits(key, (4,), jnp.uint32))(new_key(0))
    with jax.threefry_partitionable(True):
        assert (bits == jax.random.bits(jax.random.key(0), (4,), jnp.uint32)).all()


@pytest.mark.parametrize("guard", ["disallow", "disallow_explicit"])
def test_arrays_of_the_host_may_be_used_on_a_mesh(guard):
    mesh = make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    with jax.transfer_guard(guard), use_mesh(mesh):
        assert jnp.asarray(np.arange(3)).sum() == 3


def test_64_bit_numbers_are_refused():
    expected = "UserError: jax_enable_x64 is on (JAX_ENABLE_X64); expected off"
    assert expected in run("e.prepare()", JAX_ENABLE_X64="1").stderr
    assert expected in run("import jax; e.prepare()", JAX_ENABLE_X64="True").stderr
    done = run("import jax; jax.config.update('jax_enable_x64', True); e.prepare()")
    assert "UserError: jax_enable_x64 is on; expected off" in done.stderr
    assert run("e.prepare()", JAX_ENABLE_X64="0").returncode == 0


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("JAX_DEFAULT_PRNG_IMPL", "foo", 'Invalid value "foo" for JAX flag jax_default_prng_impl'),
        ("JAX_ENABLE_X64", "maybe", "invalid truth value 'maybe' for environment 'JAX_ENABLE_X64'"),
        (
            "JAX_TRACEBACK_IN_LOCATIONS_LIMIT",
            "many",
            'Invalid value "many" for JAX flag jax_traceback_in_locations_limit',
        ),
    ],
)
def test_a_variable_that_jax_cannot_read_is_one_line(name, value, said):
    code = "import sys; from flax_mlm.cli import app; sys.argv[1:] = ['--config=base']; "
    done = run(f"{code} app.run(lambda config: __import__('jax'))", **{name: value})
    assert done.stderr == f"error: JAX cannot be imported: {said}; correct or unset its variable, JAX_...\n"
    assert done.returncode == 2


def run(code: str, **env: str) -> subprocess.CompletedProcess:
    """Runs code after `from flax_mlm.distributed import environment as e`, in a process without XLA_FLAGS."""
    code = "from flax_mlm.distributed import environment as e; " + code
    env = {**{k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "NPROC")}, **env}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)


START = "import jax; jax.devices(); "


def test_a_second_call_after_the_backend_has_started_says_nothing():
    done = run(f"e.prepare(8); {START} e.prepare(); e.prepare(8)")
    assert (done.returncode, done.stderr) == (0, "")


def test_a_backend_that_was_started_before_is_warned_of():
    done = run(f"{START} e.prepare()")
    assert done.returncode == 0
    assert "before the first computation" in done.stderr or os.uname().machine != "x86_64"


def test_reproducible_is_refused_when_the_backend_runs_with_other_settings():
    done = run(f"e.prepare(); {START} e.prepare(8)")
    assert "UserError: train.reproducible is True, but JAX has started its backend" in done.stderr
    done = run(f"e.prepare(8); {START} e.prepare(4)")
    assert "UserError: train.reproducible is True" in done.stderr


def test_flags_are_added_to_the_users_own():
    code = "import os; from flax_mlm.distributed import environment as e; e.prepare(); e.prepare(); "
    code += "print(os.environ['XLA_FLAGS'])"
    flags = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "XLA_FLAGS": "--xla_dump_to=/nowhere"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert flags[0] == "--xla_dump_to=/nowhere"
    assert flags.count("--xla_cpu_experimental_ynn_fusion_type=-reduce") <= 1


def test_a_flag_that_jaxlib_does_not_know_is_seen_as_such():
    from flax_mlm.distributed.environment import jaxlib_knows

    assert jaxlib_knows("--xla_force_host_platform_device_count=8")
    assert not jaxlib_knows("--xla_there_is_no_such_flag_in_any_jaxlib=1")
