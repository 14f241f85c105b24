"""Every test runs on 8 simulated CPU devices, with strict dtype promotion."""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + (
    " --xla_force_host_platform_device_count=8"
    " --xla_backend_optimization_level=0"  # compiling is most of what the tests do: a third of the time
)
os.environ["JAX_PLATFORMS"] = "cpu"

from flax_mlm.distributed import environment

environment.prepare()

import jax  # noqa: E402  (only now that the environment is set)

jax.config.update("jax_numpy_dtype_promotion", "strict")
# Steps of fine-tuning that come from the cache deadlock in their collectives on simulated devices.
jax.config.update("jax_compilation_cache_dir", None)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update_golden", action="store_true", help="rewrite tests/golden/ with what is found now")
    parser.addoption("--full", action="store_true", help="run also what is too long for every commit")
    parser.addoption("--faults", action="store_true", help="run the whole fault suite, not only its quick part")
    parser.addoption("--references", action="store_true", help="run what needs torch, transformers or the TPU compiler")
    parser.addoption("--fault_report", help="write the fault suite's table, Markdown, to this file")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    # In a process of their own: torch and TensorFlow do not always bear each other.
    is_reference = collection_path.name in ("test_hf_reference.py", "test_transformers_parity.py", "test_plan_tpu.py")
    return True if is_reference and not config.getoption("--references") else None


# Seconds that files take. The long ones begin, so that not one of them is left to a single process in the end.
_LONG = {
    "test_tpu.py": 900, "test_step.py": 350, "test_detection.py": 330, "test_buckets.py": 300, "test_train.py": 250,
    "test_hf.py": 180, "faults/test_runs.py": 170, "test_phases.py": 150, "test_sweep.py": 140, "test_encoder.py": 120,
    "test_launch.py": 110, "test_compare.py": 110, "test_command.py": 100,
}  # fmt: skip


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: -_LONG.get(str(item.path.relative_to(Path(__file__).parent)), 0))
    if not (config.getoption("--full") or config.getoption("--faults")):
        for item in items:
            if item.get_closest_marker("full"):
                item.add_marker(pytest.mark.skip(reason="only with --full, or of faults with --faults"))


def pytest_configure() -> None:
    assert len(jax.devices()) == 8, f"tests need 8 simulated devices, found {len(jax.devices())}"


ROOT = Path(__file__).parent.parent
_QUICKLY = "--xla_backend_optimization_level=0"
_ANIMALS = {
    "dog": "barks in the garden",
    "cat": "sleeps near the river",
    "bird": "sings on the hill",
    "horse": "runs by the house",
    "fish": "swims under the bridge",
    "cow": "eats behind the barn",
}
_TIMES = ("today", "at night", "every morning", "all day")


class Toy:
    """A small text that can be learned: what an animal does, and where, follows from the animal. `folder` holds
    text.txt, a corpus made from it, and a cache of compiled programs that all commands share."""

    animals = _ANIMALS

    def __init__(self, folder: Path):
        self.folder, self.text, self.corpus = folder, folder / "text.txt", folder / "corpus"
        self.compiled = folder / "compiled"
        rng = random.Random(0)
        sentences = [f"The {a} {does} {when}." for a, does in _ANIMALS.items() for when in _TIMES]
        documents = [" ".join(rng.choices(sentences, k=rng.randint(2, 8))) for _ in range(400)]
        self.text.write_text("\n\n".join(documents))

    def flags(self, **changes: object) -> list[str]:
        """Options of a small model; `train__steps=9` stands for --config.train.steps=9."""
        options: dict[str, object] = {
            "data__corpus": self.corpus, "data__seq_len": 32, "data__num_workers": 1,
            "data__cache_dir": self.folder / "cache", "tokenizer__vocab_size": 400,
            "model__num_layers": 2, "model__hidden_size": 32, "model__num_heads": 2, "model__intermediate_size": 64,
            "model__position_embedding": "rope", "model__norm_position": "pre", "model__scan_layers": True,
            "train__global_batch_size": 16, "train__steps": 300, "train__log_every": 1, "train__eval_every": 0,
            "train__checkpoint_every": 100, "eval__batch_size": 16,
            "optimizer__name": "muon", "optimizer__learning_rate": 1e-2,
            "model__dropout_rate": 0.0, "model__attention_dropout_rate": 0.0,
            "log__tensorboard": False,
        }  # fmt: skip
        overrides = [f"--config.{name.replace('__', '.')}={value}" for name, value in {**options, **changes}.items()]
        return [f"--config={ROOT / 'configs' / 'base.py'}", *overrides]

    def start(self, command: str, *arguments: object, devices: int = 1, cwd: Path = ROOT) -> subprocess.Popen:
        """Starts `python -m flax_mlm.COMMAND` in a process of its own."""
        env = {**os.environ, "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} {_QUICKLY}"}
        env |= {"PYTHONPATH": str(ROOT), "JAX_COMPILATION_CACHE_DIR": str(self.compiled)}
        env |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "TF_CPP_MIN_LOG_LEVEL": "2"}
        env |= {"TF_ENABLE_ONEDNN_OPTS": "0"}
        line = [sys.executable, "-m", f"flax_mlm.{command}", *map(str, arguments)]
        return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, cwd=cwd)

    def run(self, command: str, *arguments: object, devices: int = 1, cwd: Path = ROOT) -> subprocess.CompletedProcess:
        """Runs `python -m flax_mlm.COMMAND` to its end."""
        process = self.start(command, *arguments, devices=devices, cwd=cwd)
        out, err = process.communicate(timeout=600)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)


@pytest.fixture(scope="session")
def toy(tmp_path_factory) -> Toy:
    toy = Toy(tmp_path_factory.mktemp("toy"))
    done = toy.run("prepare", *toy.flags(data__corpus="", data__source=f"text:{toy.text}"), f"--output={toy.corpus}")
    assert done.returncode == 0, done.stderr
    return toy


@pytest.fixture(scope="session")
def trained_run(toy) -> Path:
    """The workdir of a finished run on the toy text; copy it before changing it."""
    workdir = toy.folder / "trained"
    # Started from elsewhere, with a relative path, as people do.
    done = toy.run("train", f"--workdir={workdir.name}", *toy.flags(), cwd=toy.folder)
    (toy.folder / "trained.log").write_text(done.stdout + done.stderr)
    assert done.returncode == 0, done.stderr
    return workdir


@pytest.fixture(scope="session")
def causal_run(toy) -> Path:
    """The same for a causal model."""
    workdir = toy.folder / "causal"
    done = toy.run("train", f"--workdir={workdir}", *toy.flags(objective__name="clm", train__steps=40))
    assert done.returncode == 0, done.stderr
    assert "next-token accuracy" in done.stdout
    assert "flax_mlm.fill_mask" not in done.stdout, "a causal model fills no masks"
    return workdir
