"""Models of the Hugging Face Hub, `hf:ORG/NAME`, from a hub that answers as the real one does, and from its cache."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flax_mlm.errors import UserError
from flax_mlm.hf import push
from flax_mlm.hf.folder import is_hf_folder
from flax_mlm.storage import hub as models
from flax_mlm.storage.hub import HubName
from tests.helpers.fake_hub import TOKEN
from tests.helpers.fake_model_hub import FakeModelHub
from tests.helpers.paths import ROOT

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {
    "config.json": b"{}",
    "tokenizer.json": b'{"a": 1}',
    "vocab.txt": b"a\nb\n",
    "model.safetensors": b"weights",
    "1_Pooling/config.json": b'{"b": 2}',
    "pytorch_model.bin": b"a pickle",
    "training_args.bin": b"a pickle",
    "tf_model.h5": b"another format",
    "onnx/model.safetensors": b"other weights",
    "onnx/config.json": b"{}",
    "README.md": b"a model",
}
DOWNLOADED = {"config.json", "tokenizer.json", "vocab.txt", "model.safetensors", "1_Pooling/config.json"}

# The library reads its environment when it is imported, so each use is a process of its own.
_CALL = """
import json, sys, time
from flax_mlm.errors import UserError
from flax_mlm.hf import push
from flax_mlm.storage import hub
for call in json.loads(sys.argv[1]):
    start = time.monotonic()
    try:
        function, *arguments = call
        if function == "push":
            name, private, folder = arguments
            repository = push.open_repository("--push_to", name, private)
            from pathlib import Path
            result = {"value": repository.push(Path(folder)) if folder else ""}
        else:
            result = {"value": getattr(hub, function)("init_from", *arguments)}
    except UserError as e:
        result = {"error": str(e)}
    print(json.dumps(result | {"seconds": time.monotonic() - start}))
"""


@pytest.fixture
def hub():
    with FakeModelHub() as hub:
        hub.put("org/name", FILES)
        yield hub


def results(*calls, env: dict[str, str]) -> list[dict]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    command = [sys.executable, "-c", _CALL, json.dumps(calls)]
    done = subprocess.run(command, env={**kept, **env}, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert TOKEN not in done.stdout + done.stderr
    return [json.loads(line) | {"err": done.stderr} for line in done.stdout.splitlines()]


def error_of(*call, env: dict[str, str]) -> str:
    result = results(call, env=env)[0]
    assert "error" in result, result
    assert "\n" not in result["error"]
    assert result["seconds"] < 60
    return result["error"]


def names_in(folder: str) -> set[str]:
    return {file.relative_to(folder).as_posix() for file in Path(folder).rglob("*") if file.is_file()}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("hf:org/name", HubName("org/name")),
        ("hf:gpt2", HubName("gpt2")),
        ("hf:org/a.b-c_d@v1.0", HubName("org/a.b-c_d", "v1.0")),
        ("hf:org/name@refs/pr/3", HubName("org/name", "refs/pr/3")),
        (f"hf:org/name@{COMMIT}", HubName("org/name", COMMIT)),
        ("org/name", None),
        ("gs://bucket/hf:a", None),
        ("runs/hf:a@3", None),
    ],
)
def test_names(text, expected):
    name = models.parse("init_from", text)
    assert name == expected
    assert name is None or str(name) == text
    assert name is None or name.is_pinned == (COMMIT in text)


@pytest.mark.parametrize("text", ["hf:", "hf:a/b/c", "hf:org/name@", "hf:a b", "hf:../x", "hf://a/b", "hf:a/b@x;y"])
def test_what_is_no_name_of_the_hub_is_refused(text):
    with pytest.raises(UserError, match=re.escape(f"--checkpoint is '{text}'; expected hf:ORG/NAME or")):
        models.parse("--checkpoint", text)
    with pytest.raises(UserError, match="expected hf:ORG/NAME"):
        is_hf_folder(text)


def test_a_folder_of_that_very_name_goes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("hf:org/name").mkdir(parents=True)
    assert models.parse("init_from", "hf:org/name") is None
    assert models.local("init_from", "hf:org/name") == models.pin("init_from", "hf:org/name") == "hf:org/name"
    assert not is_hf_folder("hf:org/name")


def test_files_are_downloaded_once_and_no_pickle_is(hub, tmp_path):
    commit, env = hub.refs["org/name"]["main"], hub.env(tmp_path)
    pinned, folder = results(["pin", "hf:org/name"], ["local", f"hf:org/name@{commit}"], env=env)
    assert pinned["value"] == f"hf:org/name@{commit}"
    assert {*DOWNLOADED} <= names_in(folder["value"]) <= {*DOWNLOADED, "onnx/config.json"}
    assert Path(folder["value"], "model.safetensors").read_bytes() == b"weights"
    assert not [request for request in hub.requests if ".bin" in request or ".h5" in request or "onnx/m" in request]
    hub.requests.clear()
    again = results(["local", f"hf:org/name@{commit}"], env=env)[0]
    assert again["value"] == folder["value"]
    assert not hub.requests, "a commit never changes"


def test_a_tokenizer_is_downloaded_without_weights_and_the_weights_later(hub, tmp_path):
    env = hub.env(tmp_path)
    first, second = results(["local", "hf:org/name", False], ["pin", "hf:org/name", False], env=env)
    assert "model.safetensors" not in names_in(first["value"])
    assert "tokenizer.json" in names_in(first["value"])
    whole = results(["local", second["value"]], env=env)[0]
    assert "model.safetensors" in names_in(whole["value"])


def test_a_branch_follows_the_hub_and_a_commit_stays(hub, tmp_path):
    old, env = hub.refs["org/name"]["main"], hub.env(tmp_path)
    results(["local", "hf:org/name"], env=env)
    new = hub.put("org/name", {**FILES, "model.safetensors": b"other"})
    hub.put("org/name", {**FILES, "vocab.txt": b"c"}, branch="refs/pr/1")
    branch, commit, proposed = results(
        ["local", "hf:org/name"], ["local", f"hf:org/name@{old}"], ["pin", "hf:org/name@refs/pr/1"], env=env
    )
    assert Path(branch["value"]).name == new
    assert Path(branch["value"], "model.safetensors").read_bytes() == b"other"
    assert Path(commit["value"], "model.safetensors").read_bytes() == b"weights"
    assert proposed["value"] == f"hf:org/name@{hub.refs['org/name']['refs/pr/1']}"


def test_offline_the_cache_is_read_and_what_it_lacks_is_said(hub, tmp_path):
    hub.put("org/other", FILES)
    results(["pin", "hf:org/name"], ["pin", "hf:org/other", False], env=hub.env(tmp_path))
    commit = hub.refs["org/name"]["main"]
    hub.stop()
    env = hub.env(tmp_path, HF_HUB_OFFLINE="1")
    pinned, folder = results(["pin", "hf:org/name"], ["local", f"hf:org/name@{commit}"], env=env)
    assert pinned["value"] == f"hf:org/name@{commit}"
    assert {*DOWNLOADED} <= names_in(folder["value"])
    assert not pinned["err"]
    for name, problem in (
        ("hf:org/none", "it is not in the cache"),
        ("hf:org/name@v2", "it is not in the cache"),
        ("hf:org/other", "not all of it is in the cache"),
    ):
        message = error_of("local", name, env=env)
        assert message.startswith(f"{name} cannot be read: {problem} ({tmp_path}"), message
        assert "unset HF_HUB_OFFLINE" in message


def test_no_network_ends_within_a_minute_but_a_commit_in_the_cache_needs_none(hub, tmp_path):
    env, commit = hub.env(tmp_path), hub.refs["org/name"]["main"]
    results(["pin", "hf:org/name"], env=env)
    hub.stop()
    message = error_of("local", "hf:org/name", env=env)
    assert message.startswith(f"init_from is 'hf:org/name'; {env['HF_ENDPOINT']} does not answer (")
    assert "check the network and HF_ENDPOINT" in message
    assert "value" in results(["local", f"hf:org/name@{commit}"], env=env)[0]


def test_a_hub_that_stops_midway_is_said(hub, tmp_path):
    hub.max_bytes = 3
    start = time.monotonic()
    assert "does not answer" in error_of("local", "hf:org/name", env=hub.env(tmp_path))
    assert time.monotonic() - start < 60


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("hf:org/none", "has no such model that you may read; check the name, or set HF_TOKEN if it is private"),
        ("hf:org/private", "has no such model that you may read; check the name, or set HF_TOKEN if it is private"),
        ("hf:org/gated", "does not let you read it, since it is gated; set HF_TOKEN to a token that may read it"),
        ("hf:org/name@v2", "'org/name' has no revision 'v2'; it has main, and commits"),
        ("hf:org/pickle", "it has no model.safetensors, but pytorch_model.bin, rust_model.ot; only safetensors"),
        ("hf:org/nothing", "it has no model.safetensors, but no weights; only safetensors are read"),
    ],
)
def test_what_cannot_be_read_is_said_in_one_line(hub, tmp_path, name, problem):
    hub.put("org/private", FILES)
    hub.put("org/gated", FILES)
    hub.put("org/pickle", {"config.json": b"{}", "pytorch_model.bin": b"", "rust_model.ot": b"", "a/b.bin": b""})
    hub.put("org/nothing", {"config.json": b"{}"})
    hub.closed = {"org/private": "private", "org/gated": "gated"}
    message = error_of("local", name, env=hub.env(tmp_path))
    assert message.startswith(f"init_from is '{name}'; ")
    assert problem in message


def test_a_token_opens_what_is_closed_and_is_not_shown(hub, tmp_path):
    hub.put("org/private", FILES)
    hub.put("org/gated", {**FILES, "x.json": b"{}"})
    hub.closed = {"org/private": "private", "org/gated": "gated"}
    found = results(["local", "hf:org/private"], ["local", "hf:org/gated"], env=hub.env(tmp_path, HF_TOKEN=TOKEN))
    assert all("model.safetensors" in names_in(each["value"]) for each in found)


def test_a_package_that_is_missing_is_said(tmp_path):
    (tmp_path / "huggingface_hub.py").write_text("raise ImportError('gone')")
    message = error_of("local", "hf:org/name", env={"PYTHONPATH": str(tmp_path)})
    assert message == "init_from is 'hf:org/name', which needs a package: pip install huggingface_hub (gone)"


# Uploads


@pytest.fixture
def exported(tmp_path) -> Path:
    folder = tmp_path / "exported"
    (folder / "1_Pooling").mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "1_Pooling/config.json"):
        (folder / name).write_bytes(b"new " + FILES[name])
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# A model\n")
    return folder


def test_a_push_is_one_commit_and_can_be_read_back(hub, exported, tmp_path):
    env = hub.env(tmp_path / "home", HF_TOKEN=TOKEN)
    done = results(["push", "hf:someone/new", False, str(exported)], env=env)[0]
    commit = hub.refs["someone/new"]["main"]
    assert done.get("value") == f"hf:someone/new@{commit}", done
    assert len(hub.pushed["someone/new"]) == 1
    assert hub.commits["someone/new"][commit] == {
        name: (exported / name).read_bytes() for name in names_in(str(exported))
    }
    assert "someone/new" not in hub.closed
    folder = results(["local", done["value"]], env=env)[0]["value"]
    assert Path(folder, "model.safetensors").read_bytes() == b"new weights"


def test_a_private_repository(hub, exported, tmp_path):
    env = hub.env(tmp_path / "home", HF_TOKEN=TOKEN)
    call = ["push", "hf:team/new", True, str(exported)]
    first, second = results(call, call, env=env)
    assert hub.closed["team/new"] == "private"
    assert "value" in first, first
    assert "value" in second, "it is there, and private"


def test_a_push_to_a_repository_keeps_its_other_files(hub, exported, tmp_path):
    hub.put("team/name", FILES)
    env = hub.env(tmp_path / "home", HF_TOKEN=TOKEN)
    results(["push", "hf:team/name", False, str(exported)], env=env)
    files = hub.commits["team/name"][hub.refs["team/name"]["main"]]
    assert files["vocab.txt"] == FILES["vocab.txt"]
    assert files["model.safetensors"] == b"new weights"


@pytest.mark.parametrize(
    ("name", "private", "problem"),
    [
        ("hf:someone/new", False, ", and the token of someone may only read"),
        ("hf:other/new", False, ", and the token is of someone, who may write to someone, team"),
        ("hf:org/name", False, ", where the token may read but not write"),
        ("hf:team/closed", False, ", where the token may read but not write"),
        ("hf:team/public", True, ", which is there and public, and --private makes new ones alone"),
    ],
)
def test_what_cannot_be_pushed_is_said_before_anything_is_made(hub, tmp_path, name, private, problem):
    hub.put("team/closed", FILES)
    hub.put("team/public", FILES)
    hub.readable, hub.role = {"team/closed"}, "read" if "only read" in problem else "write"
    before = sorted(hub.commits)
    message = error_of("push", name, private, "", env=hub.env(tmp_path, HF_TOKEN=TOKEN))
    assert message.startswith(f"--push_to is '{name}'{problem}"), message
    assert sorted(hub.commits) == before
    assert not hub.pushed


def test_a_push_needs_a_token_that_is_valid_and_a_network(hub, tmp_path):
    env = hub.env(tmp_path)
    assert "there is no token; set HF_TOKEN" in error_of("push", "hf:team/x", False, "", env=env)
    assert "refuses the token" in error_of("push", "hf:team/x", False, "", env=env | {"HF_TOKEN": "hf_wrong"})
    offline = env | {"HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "1"}
    assert "HF_HUB_OFFLINE is set" in error_of("push", "hf:team/x", False, "", env=offline)
    hub.stop()
    assert "does not answer" in error_of("push", "hf:team/x", False, "", env=env | {"HF_TOKEN": TOKEN})


def test_a_permission_that_ends_before_the_upload_is_said(hub, exported, tmp_path):
    hub.put("team/closed", FILES)
    hub.revoked = {"team/closed"}
    env = hub.env(tmp_path / "home", HF_TOKEN=TOKEN)
    message = error_of("push", "hf:team/closed", False, str(exported), env=env)
    assert message.startswith("--push_to is 'hf:team/closed'; http://127.0.0.1")
    assert "does not allow it" in message


@pytest.mark.parametrize("name", ["org/name", "hf:name", "hf:org/name@main", "hf:", "exported"])
def test_a_push_goes_to_a_name_of_the_hub(name):
    with pytest.raises(UserError, match=re.escape(f"--push_to is '{name}'; expected hf:ORG/NAME")):
        push.open_repository("--push_to", name, False)
