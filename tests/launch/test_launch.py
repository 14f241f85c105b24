"""Launch scripts, driven by stand-ins for the cluster that start real processes."""

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from flax_mlm.distributed.cluster import slurm_gpus
from flax_mlm.errors import UserError
from tests.helpers import xla
from tests.helpers.paths import ROOT
from tests.helpers.scripts import environment_with_everything, executable, tool

SCRIPTS = sorted(
    [*ROOT.glob("launch/*.sh"), *ROOT.glob("benchmarks/*.sh"), ROOT / "launch" / "slurm.sbatch", ROOT / ".ci" / "run"]
)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_scripts_pass_shellcheck_and_shfmt(path):
    subprocess.run([tool("shellcheck"), "-x", "-P", ROOT, path], check=True, cwd=ROOT)
    subprocess.run([tool("shfmt"), "-d", "-i", "2", path], check=True)


# Job files


def test_the_example_of_a_job_file_can_be_used_as_it_is():
    shown = 'for key in $_KEYS; do echo "$key=${!key}"; done'
    script = f". launch/job.sh; read_job launch/tpu.env.example; {shown}"
    done = subprocess.run(["bash", "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    values = dict(line.split("=", 1) for line in done.stdout.splitlines())
    named = {
        line.split("=")[0] for line in (ROOT / "launch" / "tpu.env.example").read_text().split("\n") if "=" in line
    }
    assert set(values) <= named, "the example has every setting"
    assert {key: value for key, value in values.items() if value} == {
        "RUN": "bert-wiki", "PROJECT": "my-project", "ZONE": "us-west4-a", "TPU": "v5e:4x4", "SLICES": "1",
        "BUCKET": "my-bucket", "PROVISIONING": "spot", "MAX_RESTARTS": "20", "MAX_WAIT_HOURS": "24",
        "NAMESPACE": "default",
    }  # fmt: skip


# Slurm

SRUN = """#!{python}
# Starts the tasks of a step as `srun` does: on "nodes" that are all this machine.
import os, signal, subprocess, sys
nodes, tasks = int(os.environ["SLURM_NNODES"]), int(os.environ["SLURM_NTASKS_PER_NODE"])
options = [a for a in sys.argv[1:] if a.startswith("--")][: sys.argv[1:].index("python")]
command = sys.argv[1 + sys.argv[1:].index("python"):]
started = []
for i in range(nodes * tasks):
    place = dict(SLURM_PROCID=i, SLURM_LOCALID=i % tasks, SLURM_NODEID=i // tasks, SLURM_NTASKS=nodes * tasks)
    place |= dict(SLURM_STEP_NODELIST="localhost", SLURM_STEP_TASKS_PER_NODE=f"{{tasks}}(x{{nodes}})")
    started.append(subprocess.Popen(command, env=os.environ | {{k: str(v) for k, v in place.items()}}))
signal.signal(signal.SIGTERM, lambda *_: [p.send_signal(signal.SIGTERM) for p in started])
print("srun", *options, flush=True)
sys.exit(max(p.wait() for p in started))
"""


class Slurm:
    """A cluster of nodes that are all this machine."""

    def __init__(self, folder: Path, nodes: int = 2, tasks: int = 1, **more: str):
        self.folder = folder
        executable(folder / "bin" / "srun", SRUN.format(python=sys.executable))
        executable(folder / "bin" / "scontrol", f'#!/bin/bash\necho "$@" >>{folder}/scontrol\n')
        venv = environment_with_everything(folder / "venv", "launch/cuda-requirements.txt")
        self.env = os.environ | {
            "PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "VENV": str(venv), "PYTHONPATH": str(ROOT),
            "SLURM_JOB_ID": str(os.getpid()), "SLURM_SUBMIT_DIR": str(ROOT), "SLURM_CPUS_PER_TASK": "1",
            "SLURM_NNODES": str(nodes), "SLURM_NTASKS_PER_NODE": str(tasks), "XLA_FLAGS": xla.flags(1),
            "TF_ENABLE_ONEDNN_OPTS": "0",
        } | more  # fmt: skip

    def submit(self, *arguments: object) -> subprocess.Popen:
        copy = self.folder / "slurm_script"  # Slurm runs a copy
        copy.write_bytes((ROOT / "launch" / "slurm.sbatch").read_bytes())
        line = ["bash", str(copy), *map(str, arguments)]
        pipe = subprocess.PIPE
        return subprocess.Popen(line, env=self.env, cwd=self.folder, stdout=pipe, stderr=pipe, text=True)

    def requeued(self) -> str:
        file = self.folder / "scontrol"
        return file.read_text() if file.exists() else ""


def until(process: subprocess.Popen, text: str) -> str:
    seen = ""
    for line in process.stdout:
        seen += line
        if line.startswith(text):
            return seen
    raise AssertionError(f"ended without '{text}': {seen} {process.stderr.read()}")


def tasks_of(process: subprocess.Popen) -> list[int]:
    """The processes that run under a script, `srun` first."""
    found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    return [int(pid) for pid in found]


def test_a_slurm_job_is_queued_again_until_the_run_is_done(toy, tmp_path):
    slurm, workdir = Slurm(tmp_path), tmp_path / "run with a space"
    options = [f"--workdir={workdir}", *toy.flags(train__steps=40, train__checkpoint_every=1000)]
    job = slurm.submit(*options)
    said = until(job, "step 3/")
    assert "--kill-on-bad-exit=0 --cpus-per-task=1" in said
    assert "2 process(es)" in said
    (srun,) = tasks_of(job)
    os.kill(srun, signal.SIGTERM)  # five minutes before the end
    out, err = job.communicate(timeout=120)
    assert job.returncode == 75, err
    assert "is saved" in out
    assert "queueing job" in err
    assert slurm.requeued() == f"requeue {os.getpid()}\n"
    job = slurm.submit(*options)
    out, err = job.communicate(timeout=240)
    assert job.returncode == 0, err
    assert "step 40/40" in out
    assert "step 2/" not in out
    assert slurm.requeued().count("\n") == 1


def test_a_cancelled_slurm_job_saves_and_is_not_queued_again(toy, tmp_path):
    slurm = Slurm(tmp_path, nodes=1)
    job = slurm.submit(f"--workdir={tmp_path / 'run'}", *toy.flags(train__steps=4000))
    until(job, "step 3/")
    for pid in (job.pid, *tasks_of(job)):
        os.kill(pid, signal.SIGTERM)
    out, err = job.communicate(timeout=120)
    assert job.returncode == 75, err
    assert "is saved" in out, err
    assert slurm.requeued() == ""


def test_a_slurm_job_is_not_queued_for_ever(toy, tmp_path):
    slurm = Slurm(tmp_path, nodes=1, SLURM_RESTART_COUNT="3", MAX_REQUEUES="3")
    job = slurm.submit(f"--workdir={tmp_path / 'run'}", *toy.flags(train__steps=4000))
    until(job, "step 3/")
    os.kill(tasks_of(job)[0], signal.SIGTERM)
    assert "not requeued: MAX_REQUEUES=3" in job.communicate(timeout=120)[1]
    assert slurm.requeued() == ""


@pytest.mark.parametrize(
    ("changes", "arguments", "message"),
    [
        ({}, [], "--workdir is missing"),
        ({"SLURM_JOB_ID": ""}, ["--workdir=w"], "no Slurm job; submit it"),
        ({"SLURM_SUBMIT_DIR": "/"}, ["--workdir=w"], "/ is not the repository"),
        ({}, ["--workdir=w", "--config.train.steps=x"], "--config.train.steps is 'x'; expected a whole number"),
    ],
)
def test_a_mistake_ends_a_slurm_job(toy, tmp_path, changes, arguments, message):
    slurm = Slurm(tmp_path, nodes=1, **changes)
    job = slurm.submit(*arguments)
    _, err = job.communicate(timeout=60)
    assert (job.returncode, err.count("\n")) == (2, 1), err
    assert message in err
    assert slurm.requeued() == ""


def test_the_line_of_a_slurm_job_is_printed_quoted(tmp_path):
    values = ["--workdir=a b", "--config.data.source=text:$(touch canary)*", "it's"]
    line = ["bash", ROOT / "launch" / "slurm.sbatch", "--dry_run", *values]
    done = subprocess.run(line, capture_output=True, text=True, cwd=tmp_path)
    assert shlex.split(done.stdout) == ["srun", "--kill-on-bad-exit=0", "python", "-m", "flax_mlm.train", *values]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments", [[], ["--workdirs=w"], ["--workdir="], ["--config.x=a --workdir=w"], ["--work=w"]]
)
def test_a_slurm_job_without_a_workdir_is_refused(arguments):
    line = ["bash", ROOT / "launch" / "slurm.sbatch", "--dry_run", *arguments]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "error: --workdir is missing; name a folder that all nodes see\n"


EIGHT = "0,1,2,3,4,5,6,7"


@pytest.mark.parametrize(
    ("tasks", "node", "place", "visible", "on_node", "own"),
    [
        ("1(x2)", 1, 0, EIGHT, "8", None),  # one task a node: all of its GPUs
        ("8(x2)", 0, 3, EIGHT, "8", [3]),  # one a GPU
        ("8(x2)", 1, 7, "", "8", [7]),
        ("2", 0, 1, EIGHT, "8", [4, 5, 6, 7]),
        ("8(x2)", 0, 3, "3", "8", None),  # --gpus-per-task: Slurm shows each its own
        ("4,1", 1, 0, EIGHT, "8", None),
        ("4,1", 0, 2, EIGHT, "8", [4, 5]),
        ("4(x3)", 2, 1, "", "", None),  # no GPUs
    ],
)
def test_slurm_tasks_see_their_gpus(tasks, node, place, visible, on_node, own):
    env = {"SLURM_STEP_TASKS_PER_NODE": tasks, "SLURM_NODEID": str(node), "SLURM_LOCALID": str(place)}
    env |= {"CUDA_VISIBLE_DEVICES": visible, "SLURM_GPUS_ON_NODE": on_node}
    assert slurm_gpus(env) == own


def test_gpus_that_cannot_be_shared_evenly_are_refused():
    env = {"SLURM_STEP_TASKS_PER_NODE": "3", "SLURM_GPUS_ON_NODE": "8", "CUDA_VISIBLE_DEVICES": EIGHT}
    with pytest.raises(UserError, match="--ntasks-per-node is 3, with 8 GPUs"):
        slurm_gpus(env)


# Dry runs of what runs here; those of tpu.sh and gke.sh have files of their own


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (
            ["local.sh", "--config.train.steps=3"],
            "python -m flax_mlm.train --config.train.steps=3 --workdir=runs/quickstart",
        ),
        (
            ["local.sh", "--processes=2", "--devices_per_process=4", "--workdir=a b"],
            "env JAX_PLATFORMS=cpu XLA_FLAGS=--xla_force_host_platform_device_count=4 python -m flax_mlm.train "
            "'--workdir=a b' --coordinator=127.0.0.1:PORT --num_processes=2 --process_id=1",
        ),
        (
            ["compare_objectives.sh", "--workdir=a b", "--tasks=mlm; cloze"],
            "+ python -m flax_mlm.compare '--checkpoints=a b/mlm_15,a b/mlm_30,a b/clm,a b/clm_mlm' "
            "'--tasks=mlm; cloze' '--output=a b/compared'",
        ),
    ],
)
def test_dry_runs_run_nothing(tmp_path, line, expected):
    env = {"PATH": "/usr/bin:/bin", "VENV": str(tmp_path / "venv")}  # not even a Python of ours
    done = subprocess.run(
        ["bash", f"launch/{line[0]}", "--dry_run", *line[1:]], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0
    assert not (tmp_path / "venv").exists()
    assert (done.stdout + done.stderr).splitlines()[-1] == expected


@pytest.mark.parametrize("value", ["08", "00", "010", "-1", "1e3", "two", "", "1 2", "10000"])
@pytest.mark.parametrize("option", ["processes", "devices_per_process", "restarts"])
def test_what_is_no_number_for_bash_is_refused(option, value):
    line = ["bash", "launch/local.sh", "--dry_run", f"--{option}={value}"]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: --{option}={value}; it takes a whole number, without zeros before it\n"


def test_an_option_that_begins_like_workdir_is_none():
    line = ["bash", "launch/local.sh", "--dry_run", "--workdirs=w"]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "python -m flax_mlm.train --workdirs=w --workdir=runs/quickstart\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_local_runs_save_when_the_script_is_told_to_stop(tmp_path, number):
    """Also a second time: a terminal that goes tells the script and the run."""
    venv = environment_with_everything(tmp_path / "venv")
    run = "import os, signal, sys, time\nfor n in (1, 15): signal.signal(n, lambda *_: sys.exit(75))\n"
    (tmp_path / "run.py").write_text(run + "os.write(1, b'begun'); time.sleep(60)")
    executable(venv / "bin" / "python", f'#!/bin/bash\nexec "{sys.executable}" "{tmp_path}/run.py"\n')
    env = os.environ | {"VENV": str(venv)}
    script = subprocess.Popen(["bash", "launch/local.sh", "--workdir=x"], cwd=ROOT, env=env, stdout=subprocess.PIPE)
    assert script.stdout.read(5) == b"begun"
    script.send_signal(number)
    assert script.wait(60) == 75


def test_a_full_disk_does_not_keep_local_runs_from_a_restart(tmp_path):
    venv = environment_with_everything(tmp_path / "venv")
    executable(
        venv / "bin" / "python",
        f'#!/bin/bash\n[ -e "{tmp_path}/second" ] || {{ touch "{tmp_path}/second"; exit 75; }}\n',
    )
    env = os.environ | {"VENV": str(venv)}
    with open("/dev/full", "w") as full:
        line = ["bash", "launch/local.sh", "--workdir=x"]
        assert subprocess.run(line, cwd=ROOT, env=env, stdout=full, stderr=full).returncode == 0


def test_local_runs_have_huge_pages_beside_what_the_user_sets(tmp_path):
    venv = environment_with_everything(tmp_path / "venv")
    executable(venv / "bin" / "python", '#!/bin/bash\necho "$GLIBC_TUNABLES $*"\n')
    env = os.environ | {"VENV": str(venv), "GLIBC_TUNABLES": "glibc.malloc.arena_max=3"}
    done = subprocess.run(
        ["bash", "launch/local.sh", "--workdir=x"], cwd=ROOT, env=env, capture_output=True, text=True, check=True
    )
    assert done.stdout == "glibc.malloc.arena_max=3:glibc.malloc.hugetlb=1 -m flax_mlm.train --workdir=x\n"
