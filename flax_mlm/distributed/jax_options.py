"""Options of JAX's config and variables of the environment, by what they do to a run.

`FIXED` options are overruled where they matter, so that the environment changes no number: by `objectives.rows.new_key`
and `mesh.use_mesh`; 64-bit numbers are refused by `environment.prepare`. `RECORDED` ones may vary, and change the last
bits of a run: they are stored with each checkpoint. `IRRELEVANT` ones change no number.
The options are those of JAX 0.10.2 and 0.11.2.
"""

import os
from collections.abc import Mapping

import jax
import jaxlib

_FIXED = """
    jax_default_prng_impl jax_disable_jit jax_enable_custom_prng jax_enable_x64 jax_explicit_x64_dtypes
    jax_high_dynamic_range_gumbel jax_legacy_prng_key jax_random_seed_offset jax_threefry_partitionable
    jax_transfer_guard jax_transfer_guard_device_to_device jax_transfer_guard_device_to_host
    jax_transfer_guard_host_to_device
"""

# They decide what is compiled, and in which order it adds.
_RECORDED = """
    eager_constant_folding jax_allow_f16_reductions jax_compiler_enable_remat_pass
    jax_cpu_collectives_implementation jax_custom_jvp3 jax_custom_vjp3 jax_debug_infs jax_debug_nans
    jax_default_matmul_precision jax_disable_bwd_checks jax_disable_most_optimizations
    jax_enable_checks jax_enable_pgle jax_error_checking_behavior_divide jax_error_checking_behavior_nan
    jax_error_checking_behavior_oob jax_exec_time_optimization_effort jax_memory_fitting_effort
    jax_memory_fitting_level jax_no_execution jax_optimization_level jax_pallas_poison_buffers
    jax_pallas_use_mosaic_gpu jax_pgle_aggregation_percentile jax_pgle_profiling_runs jax_pjrt_client_create_options
    jax_ragged_dot_use_gpu_pallas_triton_lowering jax_ragged_dot_use_ragged_dot_instruction jax_remat3
    jax_remat_barrier_no_cotangents jax_remove_size_one_mesh_axis_from_type jax_scan3 jax_softmax_custom_jvp
    jax_sort_devices_by_process_index jax_threefry_gpu_kernel_lowering jax_use_direct_linearize
    jax_use_emit_pipeline_primitive jax_use_hlo_logistic_lowering jax_use_rgv3 jax_use_shardy_partitioner
    jax_use_simplified_jaxpr_constants jax_xla_profile_version
"""

_IRRELEVANT = {
    "messages, traces and logs": """
        jax_captured_constants_report_frames jax_captured_constants_warn_bytes jax_compiler_detailed_logging_min_ops
        jax_debug_log_modules jax_distributed_debug jax_dump_ir_modes jax_dump_ir_to jax_explain_cache_misses
        jax_hlo_source_file_canonicalization_regex jax_include_debug_info_in_dumps
        jax_include_full_tracebacks_in_locations jax_log_checkpoint_residuals jax_log_compiles jax_logging_level
        jax_pallas_verbose_errors jax_pprint_use_color jax_send_traceback_to_runtime jax_source_url_schema
        jax_traceback_filtering jax_traceback_in_locations_limit jax_tracer_error_num_traceback_frames
    """,
    "checks that stop a program, or let it pass as it is": """
        check_vma jax_array_garbage_collection_guard jax_auto_pcast jax_check_proxy_envs jax_check_static_indices
        jax_check_tracer_leaks jax_debug_key_reuse jax_debug_leaked_clients_on_clear_backends
        jax_disable_vmap_shmap_error jax_disallow_mesh_context_manager jax_mosaic_allow_hlo
        jax_mutable_array_checks jax_no_tracing jax_numpy_dtype_promotion jax_numpy_rank_promotion
        jax_pallas_enable_debug_checks jax_raise_on_ppermute_sort_diff jax_refs_to_pins jax_thread_guard
    """,
    "compiled programs that are kept": """
        jax_compilation_cache_check_contents jax_compilation_cache_dir jax_compilation_cache_expect_pgle
        jax_compilation_cache_include_metadata_in_key jax_compilation_cache_max_size jax_enable_compilation_cache
        jax_persistent_cache_enable_xla_caches jax_persistent_cache_min_compile_time_secs
        jax_persistent_cache_min_entry_size_bytes jax_raise_persistent_cache_errors
        jax_remove_custom_partitioning_ptr_from_cache_key jax_share_binary_between_hosts
        jax_share_binary_between_hosts_timeout_ms
    """,
    "which devices there are, as the guarantees name them, and how they are connected": """
        jax_backend_target jax_cpu_enable_async_dispatch jax_cpu_get_global_topology_timeout_minutes
        jax_cpu_get_local_topology_timeout_minutes jax_cross_host_transfer_socket_address
        jax_cross_host_transfer_timeout_seconds jax_cross_host_transfer_transfer_size jax_cross_host_transport_addresses
        jax_cuda_visible_devices jax_default_device jax_distributed_verify_secure_credentials
        jax_enable_preemption_service jax_enable_recoverability jax_experimental_unsafe_xla_runtime_errors
        jax_force_dcn_cross_host_transfers jax_mock_gpu_topology jax_mtls_ca_file jax_mtls_cert_file jax_mtls_key_file
        jax_mtls_peer_uri_prefix jax_num_cpu_devices jax_oneapi_visible_devices jax_pallas_auto_assign_collective_ids
        jax_pallas_auto_assign_collective_ids_limit jax_platform_name jax_platforms jax_rocm_visible_devices
        jax_use_cpp_shard_args jax_xla_backend mock_num_gpu_processes
    """,
    "parts of JAX that are not used here": """
        jax2tf_associative_scan_reductions jax2tf_default_native_serialization jax_bcoo_cusparse_lowering
        jax_embedded_constants_max_bytes jax_export_calling_convention_version jax_export_deserialize_expired_versions
        jax_export_ignore_forward_compatibility jax_serialization_version jax_use_magma
    """,
}

FIXED, RECORDED, IRRELEVANT = (frozenset(x.split()) for x in (_FIXED, _RECORDED, " ".join(_IRRELEVANT.values())))

_VARIABLES = ("LIBTPU_INIT_ARGS", "NPROC", "NVIDIA_TF32_OVERRIDE", "XLA_FLAGS")
# They change what is printed or simulated, and how long is waited.
_FLAGS_WITHOUT_EFFECT = ("--xla_dump", "--xla_force_host_platform_device_count", "--xla_cpu_collective")


def recorded() -> dict[str, str]:
    """Versions, options and variables that a run's bits depend on, besides config and devices."""
    values = {name: str(jax.config.values[name]) for name in sorted(RECORDED & jax.config.values.keys())}
    for name in _VARIABLES:
        flags = sorted(flag for flag in os.environ.get(name, "").split() if not flag.startswith(_FLAGS_WITHOUT_EFFECT))
        values[name] = " ".join(flags)
    return {"jax": jax.__version__, "jaxlib": jaxlib.__version__, **values}


def differences(saved: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Names what differs, as "NAME was A, and is B"; an option that one of two versions of JAX lacks is not named."""
    changed = [name for name in now if saved.get(name, now[name]) != now[name]]
    return [f"{name} was {saved[name] or 'empty'}, and is {now[name] or 'empty'}" for name in changed]
