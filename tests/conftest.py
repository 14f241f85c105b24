"""Every test runs on 8 simulated CPU devices, with strict promotion of dtypes and none of ranks."""

import gc
import os
import subprocess
from pathlib import Path

import hypothesis
import pytest

hypothesis.settings.register_profile("untimed", deadline=None)  # a busy machine is no fault
hypothesis.settings.load_profile("untimed")
pytest.register_assert_rewrite("tests.helpers")

from flax_mlm.distributed import compilation_cache, environment  # noqa: E402
from tests.helpers import fork_server, xla  # noqa: E402

os.environ["JAX_PLATFORMS"] = "cpu"
if "optimization_level" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = xla.COMPILE_FAST
os.environ["XLA_FLAGS"] += " --xla_force_host_platform_device_count=8"
environment.prepare()

import jax  # noqa: E402  (only now that the environment is set)

from tests.helpers.toy import Toy, digest_of_sources  # noqa: E402

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update_golden", action="store_true", help="rewrite tests/golden/ with what is found now")
    parser.addoption("--quick", action="store_true", help="run what answers within three minutes, of every layer")
    parser.addoption("--full", action="store_true", help="run also what is too long for every commit")
    parser.addoption("--faults", action="store_true", help="run the whole fault suite, not only its quick part")
    parser.addoption("--references", action="store_true", help="run what needs torch, transformers or the TPU compiler")
    parser.addoption("--fault_report", help="write the fault suite's table, Markdown, to this file")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    # In a process of their own: torch and TensorFlow do not always bear each other.
    names = ("test_hf_reference", "test_tokenizer_reference", "test_transformers_parity", "test_plan_tpu")
    names += ("test_onnx_reference", "test_task_heads_reference")
    is_reference = collection_path.stem in names
    return True if is_reference and not config.getoption("--references") else None


# Seconds that files take. The long ones begin, so that not one of them is left to a single process in the end.
_LONG = {
    "test_tpu.py": 500, "test_babysitter.py": 400, "test_step.py": 350, "test_detection.py": 330,
    "test_buckets.py": 300, "test_train.py": 250, "test_hf.py": 180, "test_runs.py": 170, "test_phases.py": 150,
    "test_sweep.py": 140, "test_encoder.py": 120, "test_launch.py": 110, "test_compare.py": 110,
    "test_command.py": 100, "test_engines.py": 90, "test_install.py": 60,
}  # fmt: skip


# Fixtures that train.
_TRAINING = {"toy", "trained_run", "causal_run", "bert_run"}


def _is_quick(item: pytest.Item) -> bool:
    """True for unit tests that train nothing, and for what is marked so."""
    if item.get_closest_marker("quick"):
        return True
    return item.path.parent.name == "unit" and not _TRAINING.intersection(getattr(item, "fixturenames", ()))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--quick"):
        config.hook.pytest_deselected(items=[item for item in items if not _is_quick(item)])
        items[:] = filter(_is_quick, items)
    items.sort(key=lambda item: -_LONG.get(item.path.name, 0))
    if not (config.getoption("--full") or config.getoption("--faults")):
        for item in items:
            if item.get_closest_marker("full"):
                item.add_marker(pytest.mark.skip(reason="only with --full, or of faults with --faults"))


def pytest_configure(config: pytest.Config) -> None:
    assert len(jax.devices()) == 8, f"tests need 8 simulated devices, found {len(jax.devices())}"
    if not config.getoption("--full"):
        subprocess.Popen = fork_server.Forked  # type: ignore[misc]
    # What this process and those that it starts compile, also for later runs of the tests.
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(config.cache.mkdir("compiled"))
    jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
    compilation_cache.keep()
    compilation_cache.prepare()
    gc.freeze()  # what was imported is not looked through again and again


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> Toy:
    return Toy(tmp_path_factory.mktemp("toy"), pytestconfig.cache.mkdir(f"toy-{digest_of_sources()}"))


@pytest.fixture(scope="session")
def trained_run(toy: Toy) -> Path:
    """The workdir of a finished run on the toy text; copy it before changing it."""

    def train() -> None:
        # Started from elsewhere, with a relative path, as people do.
        done = toy.run("train", "--workdir=trained", *toy.flags(), cwd=toy.kept)
        assert done.returncode == 0, done.stderr
        (toy.kept / "trained.log").write_text(done.stdout + done.stderr)

    return toy.once("trained", train)


@pytest.fixture(scope="session")
def causal_run(toy: Toy) -> Path:
    """The same for a causal model."""

    def train() -> None:
        workdir = toy.kept / "causal"
        done = toy.run("train", f"--workdir={workdir}", *toy.flags(objective__name="clm", train__steps=40))
        assert done.returncode == 0, done.stderr
        assert "next-token accuracy" in done.stdout
        assert "flax_mlm.fill_mask" not in done.stdout, "a causal model fills no masks"

    return toy.once("causal", train)


@pytest.fixture(scope="session")
def bert_run(toy: Toy) -> Path:
    """The workdir of a few steps of a small BERT."""

    def train() -> None:
        shape = {"model__position_embedding": "learned", "model__norm_position": "post"}
        done = toy.run("train", f"--workdir={toy.kept / 'bert'}", *toy.flags(train__steps=20, **shape))
        assert done.returncode == 0, done.stderr

    return toy.once("bert", train)
