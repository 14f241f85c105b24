"""launch/tpu.sh, driven through the real gcloud against a stand-in for the cloud, with processes for machines."""

import json
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.desk import Desk, last_line, needs_gcloud, nothing_is_left, until
from tests.helpers.fake_cloud import BUCKET, FakeCloud, Machine
from tests.helpers.golden import compare_golden
from tests.helpers.paths import ROOT
from tests.helpers.runs import finish

TRAIN = ["--config=configs/quickstart.py", "--config.train.steps=4"]


@pytest.fixture
def desk(tmp_path) -> Iterator[Desk]:
    with FakeCloud(tmp_path) as cloud:
        yield Desk(cloud)


def boot_alone(desk: Desk) -> Machine:
    """One machine that starts with the bundle that tpu.sh makes."""
    script = f'. launch/job.sh; read_job "{desk.job}"; job_file={desk.job} arguments=(--config=x); upload_bundle'
    subprocess.run(["bash", "-euc", script], env=desk.env, cwd=ROOT, check=True, capture_output=True)
    metadata = {
        "flax-mlm-job": f"gs://{BUCKET}/flax_mlm/run",
        "startup-script": (ROOT / "launch/startup.sh").read_text(),
    }
    machine = Machine(desk.cloud, {"acceleratorType": "v5litepod-4", "metadata": metadata}, 0, 0, "127.0.9.1")
    desk.cloud.machines["run"] = [machine]
    machine.boot()
    return machine


WAIT = "trap 'exit 75' TERM; echo at work; while :; do sleep 0.1; done"


# Job files and arguments


@pytest.mark.parametrize(
    ("changes", "arguments", "message"),
    [
        ({"RUNN": "x"}, [], "'RUNN' is not a setting; these are: RUN PROJECT"),
        ({"RUN": "My Run"}, [], "RUN is 'My Run'; it takes lower-case letters"),
        ({"RUN": ""}, [], "RUN is ''"),
        ({"ZONE": ""}, [], "ZONE is missing"),
        ({"TPU": "v5litepod-16"}, [], "TPU is 'v5litepod-16'; it takes what `plan --topology` does"),
        ({"TPU": "tpu7x:2x2x2"}, [], "the Cloud TPU API does not have; use launch/gke.sh"),
        ({"SLICES": "two"}, [], "SLICES is 'two'; it takes a whole number"),
        ({"PROVISIONING": "cheap"}, [], "it takes spot, reserved or on_demand"),
        ({"MAX_COST": "10"}, [], "MAX_COST needs PRICE"),
        ({"PRICE": "1,2"}, [], "PRICE is '1,2'; it takes a number"),
        ({"SECRETS": "WANDB_API_KEY=$(cat key)"}, [], "it takes VARIABLE=NAME of secrets in Secret Manager"),
        ({}, ["--workdir=runs/x"], "--workdir is 'runs/x'; all workers write there, so it is in a bucket"),
        ({}, ["--config=/tmp/mine.py"], "the workers get the folder configs/ of this repository"),
        ({}, ["--config=bert_bas"], "--config is 'bert_bas'; expected a file or a config of flax_mlm; did you mean"),
        ({}, ["--config", "configs/small.py"], "--config has no value; write --config=VALUE"),
        ({}, ["--config.train.stepz=3"], "config has no field 'train.stepz'; did you mean 'train.steps'?"),
    ],
)
def test_mistakes_in_the_job_are_found_before_anything_is_made(desk, changes, arguments, message):
    desk.write(**changes)
    answer = desk.run("submit", "--dry_run", "--", *arguments, code=2)
    assert message in last_line(answer)
    assert last_line(answer).startswith("error: ")
    assert not desk.cloud.created


@pytest.mark.parametrize(
    "arguments", [[], ["fly"], ["submit", "a.env", "b.env"], ["status", "no.env"], ["stop", "--now"]]
)
def test_a_wrong_call_is_one_line(arguments):
    done = subprocess.run(["bash", "launch/tpu.sh", *arguments], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n"), done.stdout) == (2, 1, "")


# Dry runs

CASES = {
    "v5e-16_spot": {"TPU": "v5e:4x4", "ZONE": "us-west4-a", "BUCKET": "gs://b/deep"},
    "v6e-256_reserved": {"TPU": "v6e:16x16", "PROVISIONING": "reserved", "SERVICE_ACCOUNT": "me@p.com"},
    "v5p-128_on_demand": {"TPU": "v5p:4x4x4", "PROVISIONING": "on_demand", "NETWORK": "n", "SUBNETWORK": "s"},
    "v4-32_slices": {"TPU": "v4:2x2x4", "SLICES": "4", "RUNTIME_VERSION": "tpu-vm-v4-base", "MAX_WAIT_HOURS": "6"},
}


def lines_of(desk: Desk, name: str) -> list[str]:
    desk.write(**CASES[name])
    said = desk.run(
        "submit", "--dry_run", "--", "--config=configs/bert_base.py", "--config.data.corpus=gs://b/it's $HOME; rm -rf *"
    )
    for verb in ("status", "stop", "delete", "babysit"):
        said += desk.run(verb, "--dry_run")
    said += desk.run("ssh", "--dry_run", "--worker=all", "--", "echo", "it's $HOME")
    lines = [line[2:] for line in said.splitlines() if line.startswith("+ ")]
    return [re.sub(r"/tmp/[\w./-]*", "FILE", line) for line in lines]


@pytest.mark.parametrize("name", CASES)
def test_dry_runs_print_what_would_be_run(desk, name, request):
    compare_golden(request, f"launch/tpu_{name}.txt", "\n".join(lines_of(desk, name)) + "\n")
    said = desk.run("check", "--dry_run") + desk.run("submit", "--dry_run") + desk.run("status", "--dry_run")
    said += desk.run("logs", "--dry_run")
    assert "checks passed" not in said
    assert "requested" not in said
    assert "NONE" not in said
    assert said.count("not checked, for nobody was asked") == 2
    assert not desk.cloud.calls, "a dry run asks nobody"
    assert not desk.cloud.gcs.requests, "a dry run asks nobody"


def lint(folder: Path, *lines: str) -> list[str]:
    """What the real gcloud finds wrong with each command line; empty: nothing."""
    file = folder / "commands.json"
    file.write_text(json.dumps([{"command_string": line} for line in lines]))
    command = ["gcloud", "meta", "lint-gcloud-commands", f"--commands-file={file}"]
    answers = json.loads(subprocess.run(command, capture_output=True, text=True).stdout)
    return ["" if answer["success"] else answer["error_message"] for answer in answers]


@needs_gcloud
def test_gcloud_knows_every_command(tmp_path):
    files = [
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / "tests" / "golden" / "launch" / f"tpu_{name}.txt" for name in CASES),
    ]
    lines = {line for file in files for line in file.read_text().splitlines() if line.startswith("gcloud ")}
    for line, error in zip(lines, lint(tmp_path, *lines), strict=True):
        assert not error, f"{line}: {error}"


@needs_gcloud
def test_the_linter_finds_what_is_wrong(tmp_path):
    wrong = "gcloud compute tpus queued-resources create r --node-id=r --node-count=2 --zone=z --best-effort"
    assert lint(tmp_path, wrong, "gcloud storage ls gs://bucket")[0]


# Faults before anything is made: one line, exit code 2, nothing made


@needs_gcloud
@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda c: setattr(c, "quota", 4), "may use 4 v5e in us-central1-a, spot, and 1 × v5e:2x4 take 8"),
        (lambda c: c.answers.update({("GET", "cloudresourcemanager"): (403, "denied")}), "project p cannot be used"),
        (lambda c: setattr(c, "services", []), "gcloud services enable tpu.googleapis.com --project=p"),
        (lambda c: c.answers.update({("GET", "acceleratorTypes"): (404, "none")}), "us-central1-a has no v5litepod-8"),
        (lambda c: c.answers.update({("GET", "runtimeVersions"): (404, "none")}), "RUNTIME_VERSION: zone"),
        (lambda c: c.gcs.buckets.clear(), "BUCKET: gs://bucket cannot be used"),
        (lambda c: setattr(c.gcs, "fault", lambda *_: 403), "BUCKET: gs://bucket cannot be used"),
    ],
    ids=["quota", "project", "api", "zone", "runtime", "no_bucket", "bucket_denied"],
)
def test_what_is_missing_is_said_before_anything_is_made(desk, break_it, message):
    break_it(desk.cloud)
    answer = desk.run("submit", "--", *TRAIN, code=2)
    assert message in last_line(answer), answer
    assert not desk.cloud.created
    assert nothing_is_left(desk)


@needs_gcloud
def test_a_bucket_elsewhere_is_refused(desk):
    desk.write(ZONE="europe-west4-b")
    answer = desk.run("check", "--", *TRAIN, code=2)
    assert "gs://bucket is in us-central1, and the TPUs in europe-west4" in last_line(answer)


@needs_gcloud
def test_a_quota_that_cannot_be_asked_for_is_only_mentioned(desk):
    desk.cloud.answers["GET", "cloudquotas"] = (403, "denied")
    assert "quota not checked" in desk.run("check", "--", *TRAIN)


@needs_gcloud
def test_tpus_that_are_refused_cost_nothing(desk):
    desk.cloud.answers["POST", "queuedResources"] = (429, "Quota limit exceeded")
    answer = desk.run("submit", "--", *TRAIN, code=1)
    assert "run was not created, and costs nothing" in last_line(answer)
    assert "Quota limit" in answer
    assert nothing_is_left(desk)


# Real machines: launch/startup.sh and launch/worker.sh, with a script for training


@needs_gcloud
def test_a_run_is_watched_to_its_end_and_deleted(desk):
    desk.write(PRICE="1.5", SECRETS="WANDB_API_KEY=wandb")
    words = ["--config.data.source=text:a b/*.txt", '--config.data.corpus=gs://b/it\'s "$HOME"; exit']
    desk.train("""
        printf '%s\\n' "$@" >"$MACHINE/../../arguments$JAX_PROCESS_ID"
        echo "${#WANDB_API_KEY} characters, port $JAX_COORDINATOR_PORT"
    """)
    desk.run("submit", "--", *TRAIN, *words)
    bundle = desk.cloud.gcs.buckets[BUCKET]["flax_mlm/run/bundle.tgz"].content
    assert b"secret" not in json.dumps(desk.cloud.queued).encode() + bundle, "secrets are read on the machines alone"
    answer = desk.run("babysit")
    assert "run is ACTIVE" in answer
    assert re.search(r"run is done, for 0\.\d\d: gs://bucket/runs/run", last_line(answer))
    assert nothing_is_left(desk)
    for index in (0, 1):
        given = (desk.cloud.folder / f"arguments{index}").read_text().splitlines()
        assert [w for w in words if w in given] == words
        assert "--workdir=gs://bucket/runs/run" in given
    log = desk.run("logs", "--worker=slice0-worker1")
    assert "training ended with exit code 0" in log
    assert "6 characters, port 8476" in log
    assert "ended with exit code 0" in desk.run("status"), "what the machines said is still there"
    absent = desk.run("logs", "--worker=slice9-worker9", code=2)
    assert "no log of slice9-worker9 yet; available: slice0-worker0 slice0-worker1" in absent


@needs_gcloud
def test_several_slices_are_nodes_of_their_own(tmp_path):
    with FakeCloud(tmp_path, hosts=1, slices=2) as cloud:
        desk = Desk(cloud)
        desk.write(SLICES=2, TPU="v5e:2x2")
        desk.train(WAIT)
        desk.run("submit", "--", *TRAIN)
        until(lambda: cloud.says("workers/slice0-worker0") and cloud.says("workers/slice1-worker0"))
        assert set(cloud.nodes) == {"run-0", "run-1"}
        desk.run("delete")
        assert nothing_is_left(desk)


@needs_gcloud
def test_stop_saves_and_keeps_the_tpus_and_submit_starts_anew_on_them(desk):
    """On the way, ssh breaks off once: gcloud runs the command again, and nothing trains twice."""
    desk.train('echo x >>"$MACHINE/../../started$JAX_PROCESS_ID"\n' + WAIT)
    desk.run("submit", "--", *TRAIN)
    started = [desk.cloud.folder / f"started{i}" for i in (0, 1)]
    until(lambda: all(file.exists() for file in started))
    (desk.cloud.folder / "drops").touch()
    desk.run("ssh", "--worker=all", "--", "sudo", "google_metadata_script_runner", "startup")
    until(lambda: desk.cloud.logs().count("a worker is already running here") >= 3)
    codes = [list((machine.folder / "home").glob("code.*/launch/worker.sh")) for machine in desk.cloud.machines["run"]]
    assert min(map(len, codes)) >= 2, "what the first runs from is still there"
    assert [file.read_text() for file in started] == ["x\n", "x\n"]
    assert "all machines have saved and exited" in desk.run("stop")
    assert "exit code 75" in desk.run("status")
    assert desk.cloud.nodes
    desk.train("exit 0")
    for machine in desk.cloud.machines["run"]:
        shutil.rmtree(machine.folder / "home" / "venv")
    desk.cloud.say("babysitter", "nobody 20 3 3600 1\n")
    assert "starting the run on the existing TPUs" in desk.run("submit", "--", *TRAIN)
    assert desk.cloud.created == 1
    assert desk.cloud.says("babysitter").startswith("nobody 0 0 3600 "), "what was spent is spent; the rest begins anew"
    until(lambda: desk.cloud.says("DONE"))
    desk.run("delete")
    assert nothing_is_left(desk)


@needs_gcloud
@pytest.mark.parametrize(
    ("train", "code", "said", "starts"),
    [
        ('echo "error: corpus not found" >&2; exit 2', 2, "2 slice0-worker0: error: corpus not found", 1),
        ('echo "stopped: the loss diverged" >&2; exit 1', 1, "1 slice0-worker0: stopped: the loss diverged", 2),
        ('[ -e "$MACHINE/again" ] && exit 0; touch "$MACHINE/again"; exit 75', 0, "", 2),
    ],
    ids=["mistake", "failure", "preempted"],
)
def test_a_worker_starts_training_again_where_that_helps(tmp_path, train, code, said, starts):
    with FakeCloud(tmp_path, hosts=1) as cloud:
        desk = Desk(cloud)
        desk.train(f'echo x >>"$MACHINE/started"\n{train}')
        cloud.machine_env["WORKER_RESTARTS"] = "1"
        machine = boot_alone(desk)
        until(lambda: "ended" in cloud.says("workers/slice0-worker0"))
        assert f"ended with exit code {code}" in cloud.says("workers/slice0-worker0")
        assert cloud.says("FAILED").strip() == said
        assert bool(cloud.says("DONE")) == (code == 0)
        assert (machine.folder / "started").read_text() == starts * "x\n"


@needs_gcloud
def test_a_machine_that_cannot_begin_says_so(tmp_path):
    with FakeCloud(tmp_path, hosts=1) as cloud:
        (cloud.folder / "no_packages").touch()
        cloud.machine_env["WORKER_PATIENCE"] = "0"
        boot_alone(Desk(cloud))
        until(lambda: cloud.says("FAILED"))
        assert cloud.says("FAILED") == "1 slice0-worker0: Python and its packages cannot be installed\n"


@needs_gcloud
def test_what_still_holds_a_tpu_is_killed_before_training(tmp_path):
    with FakeCloud(tmp_path, hosts=1) as cloud:
        desk, device = Desk(cloud), tmp_path / "accel0"
        device.touch()
        with device.open() as held:
            stale = subprocess.Popen(["sleep", "1000"], stdin=held)
        cloud.machine_env["TPU_DEVICES"] = str(device)
        desk.train("exit 0")
        boot_alone(desk)
        assert stale.wait(timeout=60) == -signal.SIGKILL


@needs_gcloud
@pytest.mark.full
def test_a_preempted_run_is_made_anew_and_ends_as_one_that_was_left_alone(desk, toy, tmp_path):
    flags = [f.replace(str(ROOT) + "/", "") for f in toy.flags(train__steps=30, train__checkpoint_every=10)]
    for file in toy.corpus.rglob("*"):
        if file.is_file():
            name = f"corpora/toy/{file.relative_to(toy.corpus)}"
            desk.cloud.gcs.put(BUCKET, name, file.read_bytes())
    flags = [f for f in flags if "data.corpus" not in f and "cache_dir" not in f]
    flags += ["--config.data.corpus=gs://bucket/corpora/toy"]
    desk.cloud.machine_env |= {"PYTHONUNBUFFERED": "1", "WORKER_EVERY": "5"}
    desk.run("submit", "--", *flags)
    babysitter = desk.start("babysit", POLL="3")
    until(lambda: "step 12/30" in desk.cloud.logs(), 240)
    desk.cloud.take_away("run")
    out, err = babysitter.communicate(timeout=400)
    assert babysitter.returncode == 0, out + err + desk.cloud.logs()
    assert "was preempted: recreating it" in err
    assert nothing_is_left(desk)
    files = desk.cloud.gcs.buckets[BUCKET]
    assert "restored step" in files["flax_mlm/run/logs/slice0-worker0.log"].content.decode()
    alone = tmp_path / "alone"
    finish(toy, alone, *toy.flags(train__steps=30, train__checkpoint_every=10), processes=2)
    assert json.loads((alone / "result.json").read_text()) == json.loads(files["runs/run/result.json"].content)
