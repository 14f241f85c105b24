"""A workdir that is another program's is refused before anything in it is touched."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from flax_mlm.config.load import build, from_dict
from flax_mlm.config.schema import Config
from flax_mlm.errors import UserError
from flax_mlm.hf.folder import ARCHITECTURES, Folder
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


def _config(folder: Path, **changes: Any) -> Config:
    values = from_dict(json.loads((folder / "config.json").read_text()))
    values.update_from_flattened_dict(changes)
    return build(values)


@pytest.mark.parametrize("damage", ["lost", "empty", "cut", "zeros"])
def test_a_lost_or_damaged_config_is_restored_from_the_newest_checkpoint(tmp_path, trained_run, damage):
    run, lines = shutil.copytree(trained_run, tmp_path / "run"), list[str]()
    config, file = _config(run), run / "config.json"
    before = file.read_text()
    file.write_text({"lost": "", "empty": "", "cut": before[:99], "zeros": "\0" * 99}[damage])
    if damage == "lost":
        file.unlink()
    run_config.refuse_foreign(run)
    with pytest.raises(UserError, match=r"holds a run with optimizer.learning_rate = 0.01, and this one has 0.5; use"):
        run_config.take(run, _config(trained_run, **{"optimizer.learning_rate": 0.5}), lines.append)
    run_config.take(run, config, lines.append)
    assert lines == [f"{file} was lost or damaged, and is restored as the newest checkpoint has it"]
    assert file.read_text() == before


def test_a_config_of_another_program_beside_our_checkpoints_is_refused(tmp_path, trained_run):
    run = shutil.copytree(trained_run, tmp_path / "run")
    (run / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(UserError, match=r"holds 'config.json', which no run of flax_mlm has written"):
        run_config.refuse_foreign(run)


def test_weights_are_known_under_another_path(tmp_path):
    for name, content in (("a", b"x"), ("b", b"x"), ("c", b"y")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(content)
    a, b, c = (Folder(tmp_path / name, ARCHITECTURES[0], {}, {}).fingerprint() for name in "abc")
    assert a == b
    assert a != c


def test_paths_may_change_also_in_phases(tmp_path, trained_run):
    phases = "50%: data.corpus=a, objective.mask_rate=0.4"
    shutil.copy(trained_run / "config.json", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(_config(tmp_path, **{"train.phases": phases}).to_dict()))
    moved = {"data.corpus": "x", "data.source": "text:y", "tokenizer.path": "z"}
    config = _config(tmp_path, **moved, **{"train.phases": phases.replace("=a", "=b")})
    run_config.take(tmp_path, config)
    assert _config(tmp_path) != config
    run_config.record(tmp_path, config)
    assert _config(tmp_path) == config
    other = phases.replace("0.4", "0.3")
    with pytest.raises(UserError, match=r"holds a run with train.phases = 50%: .*, and this one has 50%: "):
        run_config.take(tmp_path, _config(tmp_path, **{"train.phases": other}))
