"""A workdir that is another program's is refused before anything in it is touched."""

import json
import shutil
from pathlib import Path

import pytest

from flax_mlm.errors import UserError
from flax_mlm.training import run_config

_FOREIGN = {
    "a torch run": {"checkpoints/1000/model.pt": "x", "checkpoints/2000/model.pt": "x"},
    "a loose file named like a step": {"checkpoints/1000": "x"},
    "an orbax run": {"checkpoints/1000/params/d/1": "x", "checkpoints/1000/commit_success.txt": ""},
    "an orbax run with other metadata": {"checkpoints/7/meta/metadata": '{"epoch": 7}'},
    "a Hugging Face folder": {"config.json": '{"model_type": "bert"}', "model.safetensors": "x"},
    "a config that is no JSON": {"config.json": "steps: 7"},
    "other metrics": {"metrics.jsonl": '{"epoch": 7}'},
}


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _fill(folder: Path, files: dict[str, str]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)


@pytest.mark.parametrize("files", _FOREIGN.values(), ids=_FOREIGN)
def test_what_another_program_wrote_is_refused(tmp_path, files):
    _fill(tmp_path, files)
    with pytest.raises(UserError, match="which no run of flax_mlm has written; use a new folder, or move it away"):
        run_config.refuse_foreign(tmp_path)


def test_train_touches_nothing_of_another_program(toy, tmp_path):
    _fill(tmp_path, _FOREIGN["a torch run"])
    before = _contents(tmp_path)
    done = toy.run("train", f"--workdir={tmp_path}", *toy.flags())
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: --workdir: '{tmp_path}' holds 'checkpoints/")
    assert _contents(tmp_path) == before


@pytest.mark.parametrize("files", [
    {"checkpoints/1000/model.pt": "x"},
    {"checkpoints/1000": "x"},
    {"checkpoints/1000/params/_METADATA": "{}", "checkpoints/1000/_CHECKPOINT_METADATA": "{}"},
    {"checkpoints/1000/params/d/1": "x", "checkpoints/1000/commit_success.txt": ""},
    {"checkpoints/1000/meta/metadata": '{"epoch": 7}', "checkpoints/1000/commit_success.txt": ""},
])  # fmt: skip
def test_what_another_program_put_between_the_steps_of_a_run_is_refused(tmp_path, trained_run, files):
    shutil.copy(trained_run / "config.json", tmp_path)
    _fill(tmp_path, files)
    with pytest.raises(UserError, match="holds 'checkpoints/1000', which no run"):
        run_config.refuse_foreign(tmp_path)


@pytest.mark.parametrize("files", [
    {"checkpoints/1000/params.orbax-checkpoint-tmp/d/1": "x"},
    {"checkpoints/1000/params/d/1": "x", "checkpoints/1000/rest.orbax-checkpoint-tmp/d/1": "x"},
    {"checkpoints/1000/rest/d/1": "x", "checkpoints/1000/commit_success.txt": "", "checkpoints/1000/.DS_Store": ""},
    {"checkpoints/best.txt": "1000", "checkpoints/01000/model.pt": "x"},
])  # fmt: skip
def test_what_a_run_may_have_left_or_does_not_touch_is_no_reason_to_refuse(tmp_path, trained_run, files):
    shutil.copy(trained_run / "config.json", tmp_path)
    _fill(tmp_path, files)
    run_config.refuse_foreign(tmp_path)


@pytest.mark.parametrize("files", [{}, {"train.log": "step 1"}, {"checkpoints/.trash/1-abc/1/params/d": "x"}])
def test_what_no_run_would_change_is_no_reason_to_refuse(tmp_path, files):
    _fill(tmp_path, files)
    run_config.refuse_foreign(tmp_path)


def test_a_run_is_ours(tmp_path, trained_run):
    run_config.refuse_foreign(trained_run)
    metadata = next((trained_run / "checkpoints").glob("*/meta/metadata"))
    _fill(tmp_path, {"checkpoints/7/meta/metadata": metadata.read_text()})
    assert json.loads(metadata.read_text())["format"]
    run_config.refuse_foreign(tmp_path)
