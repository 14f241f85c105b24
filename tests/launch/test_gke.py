"""launch/gke.sh and launch/sky.yaml: what they print is valid, and its command starts workers.

Nothing here asks a cluster. Manifests are held against the schema of JobSet's own resource definition, and their start
command runs here, once for every pod.

Run `bash launch/test.sh tests/launch/test_gke.py --update_golden` when a difference to the files in tests/golden/launch
is meant.
"""

import copy
import json
import os
import re
import shlex
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from tests.helpers.golden import compare_golden
from tests.helpers.paths import ROOT
from tests.helpers.scripts import environment_with_everything, executable

SCHEMA = yaml.safe_load((ROOT / "tests" / "launch" / "jobset_schema.yaml").read_text())
BERT = "--config=bert_base"


class Gke:
    """launch/gke.sh, with a `gcloud` whose buckets are folders."""

    def __init__(self, folder: Path):
        self.folder, self.buckets = folder, folder / "buckets"
        self.buckets.mkdir()
        # gcloud storage cp --quiet FROM TO, with the options anywhere
        executable(
            folder / "bin" / "gcloud",
            f"""#!/bin/bash
echo "$@" >>{folder}/gcloud.log
paths=()
for a in "${{@:3}}"; do
  case $a in --*) ;; gs://*) paths+=("{self.buckets}/${{a#gs://}}") ;; *) paths+=("$a") ;; esac
done
mkdir -p "$(dirname "${{paths[1]}}")"
cp "${{paths[0]}}" "${{paths[1]}}" || exit 2
""",
        )
        executable(folder / "venv" / "bin" / "python", "#!/bin/bash\n")  # finds no mistakes in what is for train
        self.env = os.environ | {
            "PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "VENV": str(folder / "venv"), "PYTHONPATH": str(ROOT)
        }  # fmt: skip

    def run(self, *arguments: str, **job: str) -> subprocess.CompletedProcess:
        job = {"RUN": "bert", "PROJECT": "my-project", "TPU": "v5e:4x4", "BUCKET": "my-bucket"} | job
        (self.folder / "job.env").write_text("".join(f"{key}={value}\n" for key, value in job.items()))
        line = ["bash", ROOT / "launch" / "gke.sh", "job.env", *arguments]
        return subprocess.run(line, capture_output=True, text=True, env=self.env, cwd=self.folder)

    def manifest(self, **job: str) -> dict[str, Any]:
        done = self.run("--dry_run", "--", BERT, **job)
        assert done.returncode == 0, done.stderr
        return yaml.safe_load(done.stdout)


@pytest.fixture
def gke(tmp_path) -> Gke:
    return Gke(tmp_path)


def parts(manifest: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """The spec of the Job, of the pod, and of its container."""
    (job,) = manifest["spec"]["replicatedJobs"]
    pod = job["template"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    return job["template"]["spec"], pod, container


GOLDENS: dict[str, dict[str, str]] = {
    "v5e-4x4_spot": {},
    "v5e-1x1_on_demand": {"TPU": "v5e:1x1", "PROVISIONING": "on_demand"},
    "v5p-4x4x4_spot": {"TPU": "v5p:4x4x4", "SERVICE_ACCOUNT": "trainer", "NAMESPACE": "nlp", "MAX_RESTARTS": "100"},
    "tpu7x-2x2x2_2_slices_reserved": {
        "TPU": "tpu7x:2x2x2", "SLICES": "2", "PROVISIONING": "reserved", "IMAGE": "eu.gcr.io/p/train@sha256:0a",
    },
}  # fmt: skip


@pytest.mark.parametrize("name", GOLDENS)
def test_dry_run_prints_commands_and_manifest(request, gke, name):
    done = gke.run("--dry_run", "--", BERT, **GOLDENS[name])
    text = re.sub(r"\S*/tmp\.\w+/", "TEMPORARY/", done.stderr) + done.stdout
    compare_golden(request, f"launch/gke_{name}.txt", text)
    assert not (gke.folder / "gcloud.log").exists()
    validate(yaml.safe_load(done.stdout))


def validate(manifest: dict[str, Any]) -> None:
    """Against the schemas, and what JobSet and Kubernetes check beyond theirs."""
    jsonschema.validate(manifest, SCHEMA, cls=jsonschema.Draft202012Validator)
    job, pod, container = parts(manifest)
    assert job["parallelism"] == job["completions"]
    assert pod["restartPolicy"] == "Never", "podFailurePolicy needs it"
    for rule in job["podFailurePolicy"]["rules"]:
        assert rule["onExitCodes"]["containerName"] == container["name"]
    assert {v["name"] for v in container["volumeMounts"]} == {v["name"] for v in pod["volumes"]}
    for rule in manifest["spec"]["failurePolicy"]["rules"]:
        assert set(rule["onJobFailureReasons"]) <= {
            "BackoffLimitExceeded", "DeadlineExceeded", "FailedIndexes", "MaxFailedIndexesExceeded", "PodFailurePolicy"
        }  # fmt: skip
    for name in (manifest["metadata"]["name"], f"{manifest['metadata']['name']}-slice-9999-99999-abcde"):
        assert len(name) <= 63


def test_a_manifest_with_an_unknown_or_wrong_field_is_not_valid(gke):
    """The check itself: it must see a misspelt field at every depth."""
    sound = gke.manifest()
    validate(sound)
    job = "spec", "replicatedJobs", 0, "template", "spec"
    pod = *job, "template", "spec"
    places: list[tuple[Any, ...]] = [(), ("metadata",), ("spec",), ("spec", "failurePolicy", "rules", 0), job[:3], job]
    places += [pod, (*job, "podFailurePolicy", "rules", 0, "onExitCodes"), (*pod, "containers", 0)]
    places += [(*pod, "tolerations", 0), (*pod, "containers", 0, "resources"), (*pod, "volumes", 0, "emptyDir")]
    for place in places:
        broken = copy.deepcopy(sound)
        at(broken, place)["maxRestart"] = 3
        with pytest.raises(jsonschema.ValidationError, match="'maxRestart' was unexpected"):
            validate(broken)
    for place, name, value in [
        (("spec",), "replicatedJobs", {}),
        (("spec", "failurePolicy", "rules", 0), "action", "FailJob"),
        (job, "backoffLimit", "0"),
        ((*pod, "nodeSelector"), "cloud.google.com/gke-spot", True),
        ((*pod, "containers", 0, "env", 0), "value", 0),
    ]:
        broken = copy.deepcopy(sound)
        at(broken, place)[name] = value
        with pytest.raises(jsonschema.ValidationError):
            validate(broken)


def at(tree: Any, place: tuple[Any, ...]) -> Any:
    for step in place:
        tree = tree[step]
    return tree


@pytest.mark.parametrize("name", GOLDENS)
def test_kubernetes_own_schema_accepts_the_job(gke, name):
    reason = "pip install kubernetes-validate, which is large"
    kubernetes_validate = pytest.importorskip("kubernetes_validate", reason=reason)
    job, _, _ = parts(gke.manifest(**GOLDENS[name]))
    whole = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "bert"}, "spec": job}
    for version in ("1.30", "1.34"):
        kubernetes_validate.validate(whole, version, strict=True)
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(whole | {"spec": job | {"backoffLimits": 0}}, "1.34", strict=True)


def test_kubectl_reads_what_we_mean(gke):
    """Most of kubectl wants a cluster, also for a dry run; to add a label to a file it does not."""
    if not shutil.which("kubectl"):
        pytest.skip("no kubectl here")
    done = gke.run("--dry_run", "--", BERT)
    line = ["kubectl", "label", "--local", "-f", "-", "a=b", "-o", "json"]
    read = subprocess.run(line, input=done.stdout, capture_output=True, text=True)
    assert read.returncode == 0, read.stderr
    labelled = yaml.safe_load(done.stdout)
    labelled["metadata"]["labels"] = {"a": "b"}
    assert json.loads(read.stdout) == labelled


@pytest.mark.parametrize(
    ("tpu", "accelerator", "hosts", "chips"),
    [
        ("v5e:1x1", "tpu-v5-lite-podslice", 1, 1),  # ct5lp-hightpu-1t
        ("v5e:2x2", "tpu-v5-lite-podslice", 1, 4),
        ("v5e:2x4", "tpu-v5-lite-podslice", 1, 8),
        ("v5e:4x4", "tpu-v5-lite-podslice", 4, 4),
        ("v5e:16x16", "tpu-v5-lite-podslice", 64, 4),
        ("v6e:1x1", "tpu-v6e-slice", 1, 1),  # ct6e-standard-1t
        ("v6e:2x4", "tpu-v6e-slice", 1, 8),
        ("v6e:8x16", "tpu-v6e-slice", 32, 4),
        ("v4:2x2x1", "tpu-v4-podslice", 1, 4),
        ("v4:2x2x4", "tpu-v4-podslice", 4, 4),
        ("v4:16x16x16", "tpu-v4-podslice", 1024, 4),
        ("v5p:2x4x4", "tpu-v5p-slice", 8, 4),
        ("v5p:4x4x12", "tpu-v5p-slice", 48, 4),
        ("v5p:16x16x24", "tpu-v5p-slice", 1536, 4),
        ("tpu7x:1x1x1", "tpu7x", 1, 1),  # tpu7x-standard-1t
        ("tpu7x:2x2x1", "tpu7x", 1, 4),
        ("tpu7x:4x8x8", "tpu7x", 64, 4),
    ],
)
def test_every_topology_gets_its_nodes(gke, tpu, accelerator, hosts, chips):
    manifest = gke.manifest(TPU=tpu)
    validate(manifest)
    job, pod, container = parts(manifest)
    assert job["parallelism"] == hosts
    assert job["completionMode"] == "Indexed"
    assert job["backoffLimit"] == 0
    assert container["resources"]["limits"] == {"google.com/tpu": chips}
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-accelerator"] == accelerator
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == tpu.partition(":")[2]
    # Single hosts may share a node pool, also with those of other runs.
    assert ("annotations" in manifest["metadata"]) == (hosts > 1)


@pytest.mark.parametrize(
    ("job", "message"),
    [
        ({"TPU": "v5e:5x3"}, "TPU is 'v5e:5x3'; v5e comes as 1x1, 2x2"),
        ({"TPU": "v5e:4x4x4"}, "v5e comes as"),
        ({"TPU": "v6e:4x2"}, "v6e comes as"),
        ({"TPU": "v6e:16x32"}, "v6e comes as"),
        ({"TPU": "v5p:4x4"}, "v5p comes as 2x2x1"),
        ({"TPU": "v5p:1x1x1"}, "v5p comes as"),
        ({"TPU": "v5p:8x4x4"}, "multiples of 4 that do not decrease"),
        ({"TPU": "v5p:4x8x4"}, "multiples of 4 that do not decrease"),
        ({"TPU": "v4:4x4x6"}, "v4 comes as"),
        ({"TPU": "v4:16x16x20"}, "4096 chips at most"),
        ({"TPU": "tpu7x:2x2x6"}, "tpu7x comes as"),
        ({"TPU": "v5p:08x08x08"}, "TPU is 'v5p:08x08x08'"),  # no octal numbers
        ({"SLICES": "08"}, "SLICES is '08'; it takes a whole number"),
        ({"NAMESPACE": 'x"\\n  y: 1'}, "NAMESPACE is"),
        ({"IMAGE": 'x", command: ["sh"]'}, "IMAGE is"),
        ({"BUCKET": "b;touch canary"}, "BUCKET is 'b;touch canary'; on GKE it takes the name of a bucket"),
        ({"SERVICE_ACCOUNT": "me@my-project.iam.gserviceaccount.com"}, "it takes a service account of Kubernetes"),
        ({"RUN": "a: b"}, "RUN is 'a: b'"),
    ],
)
def test_a_mistake_is_refused_in_one_line(gke, job, message):
    done = gke.run("--", BERT, **job)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    assert message in done.stderr
    assert not (gke.folder / "gcloud.log").exists()
    assert not (gke.folder / "canary").exists()


def test_mistakes_in_what_is_for_train_are_found_before_anything_is_uploaded(gke):
    gke.env["VENV"] = str(environment_with_everything(gke.folder / "real"))
    done = gke.run("--", BERT, "--config.train.steps=x")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    assert "--config.train.steps is 'x'" in done.stderr
    assert not (gke.folder / "gcloud.log").exists()
    assert gke.run("--steps=3").returncode == 2


def test_names_that_yaml_would_take_for_something_else_stay_names(gke):
    manifest = gke.manifest(RUN="null", NAMESPACE="123", SERVICE_ACCOUNT="1e3", IMAGE="1.5")
    assert manifest["metadata"] == manifest["metadata"] | {"name": "null", "namespace": "123"}
    validate(manifest)


def test_nothing_is_printed_where_the_upload_fails(gke):
    executable(gke.folder / "bin" / "gcloud", "#!/bin/bash\nexit 1\n")
    done = gke.run("--", BERT)
    assert done.returncode == 1
    assert done.stdout == ""


def test_mistakes_end_the_run_and_preemptions_do_not(gke):
    manifest = gke.manifest(MAX_RESTARTS="7")
    job, _, _ = parts(manifest)
    (rule,) = job["podFailurePolicy"]["rules"]
    assert (rule["action"], rule["onExitCodes"]["operator"], rule["onExitCodes"]["values"]) == ("FailJob", "In", [2])
    policy = manifest["spec"]["failurePolicy"]
    assert policy["maxRestarts"] == 7
    assert policy["rules"] == [{"name": "mistake", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}]


def test_provisioning_chooses_nodes(gke):
    spot = "cloud.google.com/gke-spot"
    for provisioning in ("spot", "reserved", "on_demand"):
        _, pod, _ = parts(gke.manifest(PROVISIONING=provisioning))
        assert (pod["nodeSelector"].get(spot) == "true") == (provisioning == "spot")
        assert any(t["key"] == spot for t in pod["tolerations"]) == (provisioning == "spot")


WORKER = """#!/bin/bash
printf '%s\\n' "$1" "$PWD" "$WORKER_RESTARTS" "$(tr '\\0' ' ' <job/arguments)" "$(grep ^RUN job/env)"
exit "${CODE:-0}"
"""


@pytest.fixture
def start(gke) -> Callable[..., subprocess.CompletedProcess]:
    """Starts a pod of a run as Kubernetes does, with a worker that says what it was given."""
    done = gke.run("--", BERT, "--config.data.source=text:my texts/*.txt", TPU="v5p:2x2x2", SLICES="2")
    assert done.returncode == 0, done.stderr
    job, _, container = parts(yaml.safe_load(done.stdout))
    assert job["completions"] == 2
    bundle = gke.buckets / "my-bucket" / "flax_mlm" / "bert" / "bundle.tgz"
    with tarfile.open(bundle) as archive:
        archive.extractall(gke.folder / "unpacked", filter="data")
    executable(gke.folder / "unpacked" / "launch" / "worker.sh", WORKER)
    subprocess.run(["tar", "-czf", bundle, "-C", gke.folder / "unpacked", "."], check=True)

    def start(where: Path, **env: str) -> subprocess.CompletedProcess:
        where.mkdir()  # stands for workingDir
        path = {"PATH": gke.env["PATH"]} | {e["name"]: e["value"] for e in container["env"]} | env
        return subprocess.run(container["command"], env=path, cwd=where, capture_output=True, text=True)

    return start


def test_the_start_command_starts_the_worker_of_each_pod(start, tmp_path):
    names = []
    for piece in range(2):
        for worker in range(2):
            where = tmp_path / f"pod{piece}{worker}"
            done = start(where, MEGASCALE_SLICE_ID=str(piece), TPU_WORKER_ID=str(worker))
            assert done.returncode == 0, done.stderr
            name, cwd, restarts, arguments, run = done.stdout.splitlines()
            assert (cwd, restarts, run) == (str(where), "0", "RUN=bert")
            workdir = "--workdir=gs://my-bucket/runs/bert"
            assert arguments == f"{BERT} --config.data.source=text:my texts/*.txt {workdir} "
            assert (where / "flax_mlm" / "train.py").exists()
            assert (where / "flax_mlm" / "configs" / "base.py").exists()
            names.append(name)
    assert names == ["slice0-worker0", "slice0-worker1", "slice1-worker0", "slice1-worker1"]
    assert start(tmp_path / "alone").stdout.startswith("slice0-worker0\n")  # one slice, one host


def test_exit_codes_of_the_worker_are_those_of_the_pod(start, tmp_path):
    for code in (1, 2, 75, 143):
        assert start(tmp_path / str(code), CODE=str(code)).returncode == code


def test_a_bundle_that_cannot_be_fetched_is_no_mistake_of_the_user(gke, start, tmp_path):
    bundle = gke.buckets / "my-bucket" / "flax_mlm" / "bert" / "bundle.tgz"
    bundle.write_bytes(bundle.read_bytes()[:1000])
    assert start(tmp_path / "cut").returncode == 1  # of tar, 2
    bundle.unlink()
    assert start(tmp_path / "gone").returncode == 1  # of gcloud, 2


# SkyPilot

SKY = ROOT / "launch" / "sky.yaml"


def test_sky_runs_train_on_what_its_variables_say(tmp_path):
    task = yaml.safe_load(SKY.read_text())
    assert set(task) == {"name", "workdir", "resources", "envs", "setup", "run"}
    executable(
        tmp_path / ".venv" / "bin" / "python", '#!/bin/bash\nprintf "%q " "$@" "$JAX_COORDINATOR_PORT"\nexit 75\n'
    )
    env = {"PATH": os.environ["PATH"], "CONFIG": "c.py", "WORKDIR": "gs://b/a run", "CORPUS": "gs://b/$(touch canary)"}
    done = subprocess.run(["bash", "-c", task["run"]], env=env, cwd=tmp_path, capture_output=True, text=True)
    assert set(env) - {"PATH"} == set(task["envs"])
    assert (ROOT / "configs" / f"{task['envs']['CONFIG']}.py").exists()
    line = [
        "-m",
        "flax_mlm.train",
        "--config=c.py",
        f"--workdir={env['WORKDIR']}",
        f"--config.data.corpus={env['CORPUS']}",
    ]
    assert shlex.split(done.stdout) == [*line, "8476"]
    assert done.returncode in task["resources"]["job_recovery"]["recover_on_exit_codes"]
    for file in re.findall(r"-r (\S+)", task["setup"]):
        assert (ROOT / file).exists()


def test_skypilot_takes_the_task():
    """SKYPILOT=/path/to/python of an environment with skypilot, which does not bear our packages."""
    python = os.environ.get("SKYPILOT")
    if not python:
        pytest.skip("SKYPILOT names no Python with skypilot")
    code = (
        "import sys, yaml, sky; given = {'WORKDIR': 'gs://b/w', 'CORPUS': 'gs://b/c'}\n"
        "task = sky.Task.from_yaml_config(yaml.safe_load(open(sys.argv[1])), list(given.items()))\n"
        "print(task.resources, task.envs)"
    )
    done = subprocess.run([python, "-c", code, SKY], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "tpu-v5litepod-16" in done.stdout, done.stderr
    bad = SKY.read_text().replace("use_spot", "use_spots")
    done = subprocess.run([python, "-c", code, "/dev/stdin"], capture_output=True, text=True, cwd=ROOT, input=bad)
    assert done.returncode != 0
    assert "use_spots" in done.stderr
