"""The settings that make CPU results right."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np


def test_sums_are_right_under_jit():
    """jax-ml/jax#39103: this jaxlib's YNNPACK reductions lose part of a long sum."""
    x = jnp.full(32_769, 32_768.0)
    assert float(jax.jit(jnp.sum)(x)) == float(np.sum(np.asarray(x, np.float64)))


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
