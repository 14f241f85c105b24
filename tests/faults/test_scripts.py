"""Secrets stay where they are, and scripts take what they are given as text."""

import os
import re
import stat
import subprocess
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT
from tests.helpers.runs import Watched

SCRIPTS = sorted((ROOT / "launch").glob("*.sh"))
CANARY = "canary-7f3a9c51e2"


@pytest.mark.fault(50)
def test_secrets_reach_no_file_log_or_command_line(toy, tmp_path, monkeypatch, outcome):
    for name in ("WANDB_API_KEY", "HF_TOKEN", "GOOGLE_APPLICATION_CREDENTIALS", "AWS_SECRET_ACCESS_KEY", "MY_PASSWORD"):
        monkeypatch.setenv(name, CANARY)
    workdir = tmp_path / "run"
    run = Watched(toy, workdir, *toy.flags(train__steps=20, train__checkpoint_every=10, log__tensorboard=True))
    run.until_line("step 5/")
    command_line = Path(f"/proc/{run.process.pid}/cmdline")
    assert not command_line.exists() or CANARY not in command_line.read_text()
    codes, out = run.finish()
    assert codes == [0], run.err
    assert CANARY not in out + "".join(run.err)
    files = [p for p in workdir.rglob("*") if p.is_file()]
    assert len(files) > 10
    assert not [p for p in files if CANARY.encode() in p.read_bytes()]
    outcome("harmless", 5)


class Python:
    """A virtual environment whose `python` notes how it was called, and ends as it is told."""

    def __init__(self, folder: Path, codes: str = "0"):
        self.folder = folder
        (folder / "bin").mkdir(parents=True)
        python = folder / "bin" / "python"
        python.write_text(
            "#!/bin/bash\n"
            f"cd {folder}\n"
            '[ "$1" = -c ] && { echo 12345; exit; }\n'  # the script asks for a free port
            'for argument in "$@"; do printf "%s\\0" "$argument"; done > "call-$$"\n'
            f"codes=({codes}); i=$(ls call-* | wc -l)\n"
            "exit ${codes[$i - 1]:-0}\n"
        )
        python.chmod(python.stat().st_mode | stat.S_IXUSR)
        for name in ("requirements.txt", "tests/requirements.txt"):
            check = subprocess.run(["cksum"], input=(ROOT / name).read_bytes(), capture_output=True).stdout.decode()
            (folder / f"installed-{check.strip().replace(' ', '-')}").touch()

    def run(self, script: str, *arguments: str) -> subprocess.CompletedProcess:
        env = {**os.environ, "VENV": str(self.folder)}
        line = ["bash", str(ROOT / "launch" / script), *arguments]
        return subprocess.run(line, env=env, cwd=self.folder, capture_output=True, text=True, timeout=60)

    def calls(self) -> list[list[str]]:
        files = sorted(self.folder.glob("call-*"), key=lambda p: p.stat().st_mtime_ns)
        return [f.read_text().split("\0")[:-1] for f in files]


HOSTILE = ["$(touch canary)", "`touch canary`", "x; touch canary", "a b", "*", "'", '"', "a\nb", "--x=${HOME}", ""]


@pytest.mark.fault(50)
@pytest.mark.parametrize("script", ["local.sh", "test.sh"])
def test_values_reach_python_as_they_are(tmp_path, outcome, script):
    python = Python(tmp_path / "venv")
    done = python.run(script, *HOSTILE)
    assert done.returncode == 0, done.stderr
    (call,) = python.calls()
    assert [a for a in call if a in HOSTILE] == HOSTILE
    assert not list(tmp_path.rglob("canary"))
    assert not (ROOT / "canary").exists()
    outcome("harmless", len(HOSTILE))


@pytest.mark.fault(50)
@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_scripts_do_nothing_that_lets_text_become_code(path, outcome):
    text = path.read_text()
    assert not re.search(r"\beval\b|StrictHostKeyChecking|\| *(ba)?sh\b|chmod 777|bash -c|sh -c", text)
    assert "$@" not in text.replace('"$@"', "")
    assert "$*" not in text.replace('" $* "', "")
    outcome("harmless")


def test_no_pickle_no_shell_no_unsafe_yaml_in_the_code():
    forbidden = r"import pickle|\bpickle\.|allow_pickle=True|yaml\.load|shell=True|os\.system|joblib|torch\.load"
    forbidden += r"|(?<!\.)\beval\(|\bexec\("
    for path in sorted((ROOT / "flax_mlm").rglob("*.py")):
        assert not re.search(forbidden, path.read_text()), path


# The restart loop


def test_a_preempted_run_is_started_again_as_often_as_it_takes(tmp_path):
    python = Python(tmp_path / "venv", "75 75 75 75 75 0")
    done = python.run("local.sh", "--restarts=0")
    assert done.returncode == 0
    assert len(python.calls()) == 6
    assert done.stderr == "the run ended with exit code 75: restarting it\n" * 5


@pytest.mark.parametrize(("codes", "options", "calls"), [("1 1 1 1 1", ["--restarts=2"], 3), ("2 0", [], 1)])
def test_failures_are_tried_again_and_mistakes_are_not(tmp_path, codes, options, calls):
    python = Python(tmp_path / "venv", codes)
    done = python.run("local.sh", *options)
    assert done.returncode == int(codes[0])
    assert len(python.calls()) == calls


def test_processes_get_their_places(tmp_path):
    python = Python(tmp_path / "venv")
    assert python.run("local.sh", "--processes=3", "--devices_per_process=4", "--workdir=w").returncode == 0
    calls = sorted(python.calls(), key=lambda call: call[-1])
    expected = ["-m", "flax_mlm.train", "--workdir=w", "--coordinator=127.0.0.1:12345", "--num_processes=3"]
    assert calls == [[*expected, f"--process_id={i}"] for i in range(3)]


@pytest.mark.parametrize("option", ["--processes=0", "--processes=two", "--devices_per_process=-1", "--restarts=x"])
def test_wrong_options_of_the_script(tmp_path, option):
    done = Python(tmp_path / "venv").run("local.sh", option)
    assert done.returncode == 2
    assert done.stderr == f"error: {option}; it takes a whole number, without zeros before it\n"


@pytest.mark.parametrize("values", [[], ["--config.train.steps=5", "--config.data.source=text:$(touch canary) x/*"]])
def test_the_comparison_of_objectives(tmp_path, values):
    """Prepared once, trained four times, compared once; a failure ends it."""
    python = Python(tmp_path / "venv")
    done = python.run(
        "compare_objectives.sh", *values, f"--workdir={tmp_path / 'w x'}", "--tasks=mlm; a=cloze --data=b c"
    )
    assert done.returncode == 0, done.stderr
    prepare, *trainings, compare = python.calls()
    assert prepare == [
        "-m",
        "flax_mlm.prepare",
        "--config=configs/objectives.py",
        *values,
        f"--output={tmp_path}/w x/corpus",
    ]
    names = ["mlm_15", "mlm_30", "clm", "clm_mlm"]
    corpus = f"--config.data.corpus={tmp_path}/w x/corpus"
    for name, call in zip(names, trainings, strict=True):
        config, workdir = f"--config=configs/objectives.py:{name}", f"--workdir={tmp_path}/w x/{name}"
        assert call == ["-m", "flax_mlm.train", config, *values, corpus, workdir]
    checkpoints = ",".join(f"{tmp_path}/w x/{name}" for name in names)
    tasks, output = "--tasks=mlm; a=cloze --data=b c", f"--output={tmp_path}/w x/compared"
    assert compare == ["-m", "flax_mlm.compare", f"--checkpoints={checkpoints}", tasks, output]
    assert not list(tmp_path.rglob("canary"))

    failing = Python(tmp_path / "other", "0 2")
    assert failing.run("compare_objectives.sh", f"--workdir={tmp_path / 'w'}").returncode == 2
    assert len(failing.calls()) == 2
