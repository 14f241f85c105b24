"""Every test runs on 8 simulated CPU devices, with strict dtype promotion."""

import os

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"

from flax_mlm import environment

environment.prepare()

import jax  # noqa: E402  (only now that the environment is set)

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_compilation_cache_dir", None)


def pytest_configure() -> None:
    assert len(jax.devices()) == 8, f"tests need 8 simulated devices, found {len(jax.devices())}"
