"""Settings of XLA for tests."""

from flax_mlm.distributed.environment import jaxlib_knows

_FAST = (
    "--xla_backend_optimization_level=0",
    "--xla_cpu_use_fusion_emitters=false",
    "--xla_cpu_parallel_codegen_split_count=1",
    "--xla_llvm_disable_expensive_passes=true",
    "--xla_cpu_collective_call_terminate_timeout_seconds=300",  # 40, where few processors simulate many devices
)

# Compiling is most of what tests do: with these flags it takes a third of the time or less.
COMPILE_FAST = " ".join(filter(jaxlib_knows, _FAST))


def flags(devices: int) -> str:
    """XLA_FLAGS for simulated CPU devices."""
    return f"--xla_force_host_platform_device_count={devices} {COMPILE_FAST}"
