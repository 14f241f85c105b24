"""A small text that can be learned, and the commands on it."""

import fcntl
import hashlib
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from tests.helpers import xla
from tests.helpers.paths import ROOT

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
    """A small text that can be learned: what an animal does, and where, follows from the animal.

    `folder` is for what the tests of one process make. `kept` holds the text, a corpus made from it, and runs that are
    made once, by the process that needs them first, and kept until the sources change.
    """

    animals = _ANIMALS

    def __init__(self, folder: Path, kept: Path):
        self.folder, self.kept = folder, kept
        self.text, self.corpus = kept / "text.txt", kept / "corpus"
        self.once("corpus", self._prepare)

    def _prepare(self) -> None:
        rng = random.Random(0)
        sentences = [f"The {a} {does} {when}." for a, does in _ANIMALS.items() for when in _TIMES]
        documents = [" ".join(rng.choices(sentences, k=rng.randint(2, 8))) for _ in range(400)]
        self.text.write_text("\n\n".join(documents))
        done = self.run(
            "prepare", *self.flags(data__corpus="", data__source=f"text:{self.text}"), f"--output={self.corpus}"
        )
        assert done.returncode == 0, done.stderr

    def once(self, name: str, make: Callable[[], object]) -> Path:
        """Calls `make` unless it has made `kept / name` before, in this process or another; returns the path."""
        made, path = self.kept / f"{name}.made", self.kept / name
        with (self.kept / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not made.exists():
                shutil.rmtree(path, ignore_errors=True)
                make()
                made.touch()
        return path

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

    def start(
        self, command: str, *arguments: object, devices: int = 1, cwd: Path = ROOT, stdout: Any = subprocess.PIPE
    ) -> subprocess.Popen:
        """Starts `python -m flax_mlm.COMMAND` in a process of its own."""
        env = {**os.environ, "XLA_FLAGS": xla.flags(devices)}
        env |= {"PYTHONPATH": str(ROOT), "TF_CPP_MIN_LOG_LEVEL": "2", "TF_ENABLE_ONEDNN_OPTS": "0"}
        line = [sys.executable, "-m", f"flax_mlm.{command}", *map(str, arguments)]
        return subprocess.Popen(line, stdout=stdout, stderr=subprocess.PIPE, text=True, env=env, cwd=cwd)

    def run(self, command: str, *arguments: object, devices: int = 1, cwd: Path = ROOT) -> subprocess.CompletedProcess:
        """Runs `python -m flax_mlm.COMMAND` to its end."""
        process = self.start(command, *arguments, devices=devices, cwd=cwd)
        out, err = process.communicate(timeout=600)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def digest_of_sources() -> str:
    """Changes with whatever a run depends on."""
    files = [*ROOT.glob("flax_mlm/**/*.py"), *ROOT.glob("configs/*.py"), Path(__file__)]
    content = [jax.__version__.encode(), *(file.read_bytes() for file in sorted(files))]
    return hashlib.sha256(b"\0".join(content)).hexdigest()[:16]
