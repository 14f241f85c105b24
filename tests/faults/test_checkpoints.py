"""Damage to a checkpoint folder, full disks, and kills while saving: named or survived, never silent."""

import errno
import json
import logging
import os
import queue
import random
import re
import resource
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tenacity
from etils.epath import gpath

from flax_mlm.checkpoint import manager, store
from flax_mlm.checkpoint.fingerprint import leaves as named
from flax_mlm.checkpoint.format import (
    FORMAT,
    Damaged,
    find_checkpoints,
    newest_meta,
    read_meta,
    refuse_other_start,
    restore,
)
from flax_mlm.checkpoint.store import check_name, saved_steps
from flax_mlm.config.schema import MeshConfig
from flax_mlm.distributed.mesh import make_mesh
from flax_mlm.errors import Failure, UserError
from flax_mlm.storage import files, retry
from flax_mlm.training import budget, metrics
from tests.helpers.checkpoints import META, abstract, opened, restored, same_bits, save_three, state_at
from tests.helpers.paths import ROOT
from tests.helpers.saver import State

# Coroutines that orbax drops when a checkpoint cannot be read.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A workdir with steps 10, 20 and 30."""
    workdir = tmp_path_factory.mktemp("saved")
    return save_three(workdir)


@pytest.fixture
def workdir(saved, tmp_path) -> Path:
    return shutil.copytree(saved, tmp_path / "run", symlinks=True)


def files_of(workdir: Path, step: int = 30) -> list[Path]:
    return sorted(p for p in (workdir / "checkpoints" / str(step)).rglob("*") if p.is_file())


def verdict(workdir: Path) -> str:
    """After damage to step 30: "harmless" when it is restored with the right content, "detected" when it is named,
    put away, and step 20 restored with the right content."""
    step, log = restored(workdir)
    if step == 30:
        return "harmless"
    assert step == 20, log
    assert not (workdir / "checkpoints" / "30").exists(), "it would be in the way of saving that step again"
    if (put_away := list((workdir / "checkpoints").glob(".quarantine/30-*/30"))) == []:
        return "detected"  # a save without its marker never was a checkpoint
    assert any("checkpoint 30 skipped" in line and str(put_away[0].parent) in line for line in log), log
    return "detected"


FLIPS = 10


@pytest.mark.fault(21)
@pytest.mark.parametrize("seed", [pytest.param(i, marks=[pytest.mark.full] if i else []) for i in range(12)])
def test_flipped_bytes(saved, tmp_path, outcome, seed):
    rng = random.Random(seed)
    for i in range(FLIPS):
        workdir = shutil.copytree(saved, tmp_path / str(i))
        files = [f for f in files_of(workdir) if f.stat().st_size]
        file = rng.choice(files)
        content = bytearray(file.read_bytes())
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        file.write_bytes(content)
        outcome(verdict(workdir), damages=1)


@pytest.mark.fault(21)
def test_every_kind_of_file_may_be_flipped_in_the_middle(saved, tmp_path, outcome):
    for i, name in enumerate(p.relative_to(saved) for p in files_of(saved) if p.stat().st_size):
        workdir = shutil.copytree(saved, tmp_path / str(i))
        content = bytearray((workdir / name).read_bytes())
        content[len(content) // 2] ^= 0xFF
        (workdir / name).write_bytes(content)
        what = verdict(workdir)
        matters = name.parts[2:4] in (("params", "d"), ("rest", "d"), ("meta", "metadata"))
        assert what == "detected" or not matters, f"{name} holds what matters"
        outcome(what, damages=1)


@pytest.mark.fault(22)
@pytest.mark.parametrize("keep", [0.0, 0.5, -1], ids=["emptied", "half", "all but a byte"])
def test_truncated_files(saved, tmp_path, outcome, keep):
    for i, name in enumerate(p.relative_to(saved) for p in files_of(saved) if p.stat().st_size):
        workdir = shutil.copytree(saved, tmp_path / str(i))
        size = (workdir / name).stat().st_size
        os.truncate(workdir / name, size - 1 if keep == -1 else int(size * keep))
        outcome(verdict(workdir), damages=1)


@pytest.mark.fault(23)
@pytest.mark.parametrize("what", ["params/d", "rest/d", "params", "rest", "*"])
def test_missing_arrays(workdir, outcome, what):
    found = list((workdir / "checkpoints" / "30").glob(what))
    assert found
    for path in found:
        if path.name not in ("commit_success.txt", "_CHECKPOINT_METADATA", "meta"):
            shutil.rmtree(path)
    assert verdict(workdir) == "detected"
    outcome("detected", damages=1)


@pytest.mark.fault(23)
def test_every_file_may_be_missing(saved, tmp_path, outcome):
    for i, name in enumerate(p.relative_to(saved) for p in files_of(saved)):
        workdir = shutil.copytree(saved, tmp_path / str(i))
        (workdir / name).unlink()
        outcome(verdict(workdir), damages=1)


@pytest.mark.fault(24)
@pytest.mark.parametrize(
    "damage", ["meta gone", "meta empty", "meta of another step", "not JSON", "a list", "no arrays"]
)
def test_missing_or_foreign_metadata(workdir, outcome, damage):
    file = workdir / "checkpoints" / "30" / "meta" / "metadata"
    if damage == "meta gone":
        shutil.rmtree(file.parent)
    elif damage == "meta of another step":
        shutil.copy(workdir / "checkpoints" / "20" / "meta" / "metadata", file)
    else:
        content = json.loads(file.read_text())
        del content["arrays"]
        file.write_text({"meta empty": "", "not JSON": "{", "a list": "[]", "no arrays": json.dumps(content)}[damage])
    assert verdict(workdir) == "detected"
    outcome("detected", damages=1)


@pytest.mark.fault(24)
def test_an_older_format_is_refused_and_kept(workdir, outcome):
    file = workdir / "checkpoints" / "30" / "meta" / "metadata"
    file.write_text(json.dumps({**json.loads(file.read_text()), "format": FORMAT - 1}))
    with pytest.raises(UserError, match=f"has format {FORMAT - 1}; this version of flax_mlm reads {FORMAT}; use") as e:
        restored(workdir)
    assert "\n" not in str(e.value)
    assert saved_steps(workdir) == [10, 20, 30]
    outcome("detected", damages=1)


@pytest.mark.fault(25)
@pytest.mark.parametrize("kind", ["empty folder", "junk", "link", "dangling link", "file", "leading zero", "not ASCII"])
def test_what_only_looks_like_a_checkpoint(workdir, outcome, kind):
    folder = workdir / "checkpoints"
    if kind == "empty folder":
        (folder / "999").mkdir()
    elif kind == "junk":
        (folder / "notes.txt").write_text("keep me")
        (folder / "latest").mkdir()
    elif kind == "link":
        (folder / "999").symlink_to(folder / "20")
    elif kind == "dangling link":
        (folder / "999").symlink_to(folder / "nowhere")
    elif kind == "file":
        (folder / "999").write_text("")
    elif kind == "leading zero":
        shutil.copytree(folder / "20", folder / "0999")
    else:
        shutil.copytree(folder / "20", folder / "٩٩٩")
    assert saved_steps(workdir) == [10, 20, 30]
    entries = sorted(path.name for path in folder.iterdir() if kind != "empty folder" or path.name != "999")
    assert restored(workdir)[0] == 30
    assert sorted(path.name for path in folder.iterdir()) == entries, "what is not known to be ours stays where it is"
    assert saved_steps(workdir) == [10, 20, 30]
    assert kind != "junk" or ((folder / "notes.txt").read_text() == "keep me" and (folder / "latest").is_dir())
    outcome("recovered")


@pytest.mark.parametrize("files", [["model.pt"], ["params/d/1"], ["meta/metadata", "commit_success.txt"], []])
def test_what_another_program_wrote_is_never_removed_moved_or_called_damaged(workdir, capsys, files):
    theirs = workdir / "checkpoints" / "40"
    for name in files:
        (theirs / name).parent.mkdir(parents=True, exist_ok=True)
        (theirs / name).write_text("{}")
    if not files:
        theirs.write_text("{}")
    before = sorted((workdir / "checkpoints").rglob("*"))
    checkpoints = opened(workdir, max_to_keep=3)
    assert sorted((workdir / "checkpoints").rglob("*")) == before
    if "commit_success.txt" not in files:
        assert not checkpoints.save(40, state_at(40))
        assert "40 exists, and no run of flax_mlm has written it" in capsys.readouterr().out
    checkpoints.close()
    assert {*before} <= {*(workdir / "checkpoints").rglob("*")}


def test_a_checkpoint_of_another_program_is_none_and_not_a_damaged_one(workdir, tmp_path):
    theirs = tmp_path / "theirs" / "checkpoints" / "7"
    shutil.copytree(workdir / "checkpoints" / "30" / "params", theirs / "params")
    (theirs / "commit_success.txt").touch()
    for path in (theirs, theirs.parent, theirs.parent.parent, f"{theirs.parent.parent}@7"):
        with pytest.raises(UserError, match=r"a checkpoint of another program, and none of flax_mlm, in .*; give the"):
            find_checkpoints(str(path))
    shutil.copytree(theirs, workdir / "checkpoints" / "40")
    assert newest_meta(str(workdir))[0].name == "30"


def test_a_folder_of_the_name_goes_before_a_step(workdir, tmp_path):
    assert find_checkpoints(f"{workdir}@20")[0].name == "20"
    named = shutil.copytree(workdir, f"{workdir}@20")
    assert [path.parent.parent for path in find_checkpoints(named)] == [Path(named)] * 3
    assert find_checkpoints(f"{named}@10") == [Path(named) / "checkpoints" / "10"]
    with pytest.raises(UserError, match="no checkpoint in"):
        find_checkpoints(f"{workdir}@²")


@pytest.mark.fault(26)
@pytest.mark.parametrize("steps", [(30,), (20, 30)], ids=str)
def test_without_its_marker_a_step_does_not_count(workdir, outcome, steps):
    for step in steps:
        (workdir / "checkpoints" / str(step) / "commit_success.txt").unlink()
    assert restored(workdir)[0] == 30 - 10 * len(steps)
    outcome("recovered", len(steps), damages=len(steps))


@pytest.mark.fault(27)
def test_when_all_are_damaged_nothing_begins_anew(workdir, outcome):
    for step in (10, 20, 30):
        os.truncate(workdir / "checkpoints" / str(step) / "meta" / "metadata", 100)
    for _ in range(3):  # also when they were put away by an earlier start
        with pytest.raises(UserError, match=r"none of the checkpoints in .* is sound"):
            restored(workdir)
    outcome("detected", 3, damages=3)


@pytest.mark.fault(21)
@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EMFILE, "Too many open files"),
        MemoryError(),
        ValueError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 8 bytes"),
    ],
)
def test_what_a_machine_cannot_read_is_not_taken_for_damaged(workdir, outcome, monkeypatch, error):
    import orbax.checkpoint as ocp

    def fails(*_, **__):
        raise error

    with monkeypatch.context() as m:
        m.setattr(ocp.Checkpointer, "restore", fails)
        with pytest.raises(Failure, match="cannot be read on this machine; it is kept"):
            restored(workdir)
    assert saved_steps(workdir) == [10, 20, 30]
    assert restored(workdir)[0] == 30
    outcome("detected")


HICCUPS = [OSError(errno.ESTALE, "Stale file handle"), OSError(errno.EIO, "Input/output error")]
HICCUPS += [TimeoutError(errno.ETIMEDOUT, "timed out"), ValueError("Error reading ... [os_error_code='116']")]


class FileServer:
    """A file server that fails a number of times in what `at` names, a method of a class."""

    def __init__(self, monkeypatch, at: tuple[type, str], error: Exception, times: float):
        monkeypatch.setattr(tenacity.wait_exponential, "__call__", lambda *_: 0.0)
        works = getattr(*at)
        self.left = times

        def fails(*args, **kwargs):
            if self.left <= 0:
                return works(*args, **kwargs)
            self.left -= 1
            raise error

        monkeypatch.setattr(*at, fails)


@pytest.mark.fault(21)
@pytest.mark.parametrize("at", [(gpath.PosixGPath, "read_text"), (ocp.Checkpointer, "restore")], ids=["meta", "arrays"])
@pytest.mark.parametrize("error", HICCUPS, ids=repr)
def test_a_file_server_that_fails_for_a_while_damages_nothing(workdir, outcome, monkeypatch, at, error):
    with monkeypatch.context() as m:
        server = FileServer(m, at, error, 4)
        assert restored(workdir)[0] == 30
        assert server.left == 0
    with monkeypatch.context() as m:
        FileServer(m, at, error, np.inf)
        with pytest.raises(Failure, match=r"a file server does not answer: .*; nothing is changed, start again"):
            restored(workdir)
    assert saved_steps(workdir) == [10, 20, 30]
    assert not (workdir / "checkpoints" / ".quarantine").exists()
    outcome("recovered")


@pytest.mark.fault(21)
@pytest.mark.parametrize(
    ("name", "method", "read"),
    [
        ("result.json", "read_bytes", lambda file: files.read_result(file)),
        ("metrics.jsonl", "read_bytes", lambda file: metrics.lines(file.parent)[0]),
        ("clock.json", "read_text", lambda file: {"seconds": budget.read_used(file.parent, file)[0]}),
    ],
)
def test_what_a_run_has_written_is_read_from_a_file_server_that_fails_for_a_while(
    tmp_path, outcome, monkeypatch, name, method, read
):
    content = {"seconds": 3.0, "step": 1, "kind": "train"} if name == "metrics.jsonl" else {"seconds": 3.0}
    (tmp_path / name).write_text(json.dumps(content))
    server = FileServer(monkeypatch, (Path, method), HICCUPS[0], 4)
    assert read(tmp_path / name) == content
    server.left = np.inf
    with pytest.raises(Failure, match=r"a file server does not answer: .*Stale file handle.*; nothing is changed"):
        read(tmp_path / name)
    outcome("recovered")


@pytest.mark.fault(21)
@pytest.mark.parametrize("steps", [(30,), (10, 20, 30)], ids=str)
def test_what_was_put_away_and_is_sound_is_taken_back(workdir, outcome, steps):
    for step in steps:
        store.Store(workdir / "checkpoints").quarantine(str(step))
    found, log = restored(workdir)
    assert found == 30
    assert re.fullmatch(r"checkpoint 30 is sound after all, and taken back from .*/\.quarantine/30-\w+", log[0])
    assert restored(workdir)[0] == 30
    outcome("recovered")


def test_a_step_put_away_that_is_older_than_the_newest_stays_there(workdir):
    store.Store(workdir / "checkpoints").quarantine("20")
    assert restored(workdir)[0] == 30
    assert saved_steps(workdir) == [10, 30]


@pytest.mark.fault(28)
def test_leftovers_are_swept(workdir, outcome):
    folder = workdir / "checkpoints"
    shutil.copytree(folder / "30", folder / ".trash" / "10-abc" / "10")
    shutil.copytree(folder / "30", folder / "40")
    (folder / "40" / "commit_success.txt").unlink()
    assert restored(workdir)[0] == 30
    assert sorted(p.name for p in folder.iterdir()) == ["10", "20", "30"]
    outcome("recovered", 2)


@pytest.mark.fault(31)
def test_a_copied_checkpoint_is_enough(workdir, tmp_path, outcome):
    copy = shutil.copytree(workdir / "checkpoints" / "20", tmp_path / "elsewhere" / "best model $(touch x)")
    (found,) = find_checkpoints(str(copy))
    items = restore(found, read_meta(found), {"params": abstract(state_at(0)).params})
    np.testing.assert_array_equal(items["params"]["w"], state_at(20).params["w"])
    assert not (tmp_path / "x").exists()
    outcome("recovered")


@pytest.mark.fault(33)
@pytest.mark.parametrize("mesh", [(8, 1, 1), (4, 1, 1), (2, 1, 1), (1, 1, 1), (1, 8, 1), (2, 4, 1), (2, 2, 2)], ids=str)
def test_restored_on_another_mesh(saved, tmp_path, outcome, mesh):
    workdir = tmp_path / "run"
    checkpoints = opened(workdir)
    checkpoints.save(10, state_at(10, (2, 4, 1)))
    checkpoints.close()
    assert restored(workdir, mesh)[0] == 10
    outcome("recovered")


@pytest.mark.fault(35)
@pytest.mark.parametrize("mesh", [(3, 1, 1), (16, 1, 1), (-1, 3, 1)], ids=str)
def test_a_mesh_that_does_not_fit_the_devices(outcome, mesh):
    with pytest.raises(UserError, match=r"mesh.data × mesh.fsdp × mesh.tensor is [^;]+; expected 8"):
        make_mesh(MeshConfig(*mesh))
    outcome("detected")


def changed(**leaves) -> State:
    state = abstract(state_at(0))
    return state._replace(params={k: v for k, v in {**state.params, **leaves}.items() if v is not None})


def leaf(shape: tuple[int, ...], dtype: str = "float32") -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=abstract(state_at(0)).params["b"].sharding)


def case(kind: int, state: State, said: str):
    return pytest.param(state, said, marks=pytest.mark.fault(kind), id=said)


@pytest.mark.parametrize(
    ("state", "said"),
    [
        case(36, changed(w=leaf((8, 25))), r"params/w as float32 \(8, 24\).* as float32 \(8, 25\)"),
        case(36, changed(b=leaf((23,))), r"params/b as float32 \(24,\)"),
        case(36, changed(w=leaf((24, 8))), r"params/w as float32 \(8, 24\)"),
        case(37, changed(w=leaf((8, 24), "bfloat16")), "params/w .* as bfloat16"),
        case(37, changed(b=leaf((24,), "int32")), "params/b .* as int32"),
        case(38, changed(b=None), "params/b .* not at all"),
        case(38, changed(new=leaf((3,))), "params/new not at all"),
        case(39, abstract(state_at(0))._replace(opt_state={"nu": leaf((8, 24))}), "rest/opt_state/"),
    ],
)
def test_other_arrays_are_refused_before_they_are_read(workdir, outcome, state, said):
    shutil.rmtree(workdir / "checkpoints" / "30" / "params" / "d")  # what cannot be read is never tried
    checkpoints = opened(workdir)
    with pytest.raises(UserError, match=said):
        checkpoints.restore_latest(state, print)
    checkpoints.close()
    assert saved_steps(workdir) == [10, 20, 30], "nothing is wrong with them"
    outcome("detected")


@pytest.mark.fault(41)
def test_another_corpus_is_refused(workdir, outcome):
    checkpoints = opened(workdir, {**META, "corpus": "b" * 64, "text": {"documents": 7}})
    said = "was trained on corpus aaaaaaaaaaaa, and this is bbbbbbbbbbbb: it had documents None, not 7; give"
    with pytest.raises(UserError, match=said):
        checkpoints.restore_latest(abstract(state_at(0)), print)
    checkpoints.close()
    assert saved_steps(workdir) == [10, 20, 30]
    outcome("detected")


@pytest.mark.parametrize(("theirs", "ours", "said"), [
    ({"corpus": "b" * 64, "tokenizer": {}}, {}, "another tokenizer; give"),
    ({"corpus": "b" * 64}, {}, "the same number of rows with another content; give"),
    ({"start": "c" * 64}, {}, "began with the weights cccccccccccc, and init_from has none; give the same weights"),
    ({"start": "c" * 64}, {"start": "d" * 64}, "began with the weights cccccccccccc, and init_from has dddddddddddd"),
])  # fmt: skip
def test_the_message_says_in_what_a_run_differs(theirs, ours, said):
    with pytest.raises(UserError, match=f"^here .*{said}"):
        refuse_other_start("here", {**META, **theirs}, {**META, **ours})


def full_disk(is_full: bool) -> None:
    """Files cannot grow, as on a full disk."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000 if is_full else hard, hard))


def large_state_at(step: int) -> State:
    state = state_at(step)
    w = np.random.default_rng(step).normal(size=(200, 200)).astype(np.float32)
    return state._replace(opt_state={"mu": jax.device_put(w, state.params["b"].sharding)})


@pytest.mark.fault(18)
def test_a_disk_that_is_full_once(workdir, outcome, capsys):
    checkpoints = opened(workdir, max_to_keep=3)
    full_disk(True)
    try:
        assert not (checkpoints.save(40, large_state_at(40)) and checkpoints.wait())
    finally:
        full_disk(False)
    assert checkpoints.save(50, state_at(50))
    assert checkpoints.wait()
    assert checkpoints.failed_in_a_row == 0
    checkpoints.close()
    assert "WARNING: step 40 could not be saved" in (out := capsys.readouterr().out)
    assert "step 30 is the last" in out
    assert saved_steps(workdir) == [20, 30, 50]
    assert not (workdir / "checkpoints" / "40").exists()
    assert restored(workdir)[0] == 50
    outcome("recovered")


def test_a_full_disk_is_one_line_that_says_so(tmp_path, monkeypatch, capsys, caplog):
    reports: list[str] = []
    hook = lambda report: reports.append(str(report.exc_value))  # noqa: E731
    monkeypatch.setattr(sys, "unraisablehook", hook)
    checkpoints = opened(tmp_path)
    full_disk(True)
    try:
        assert not checkpoints.save(40, large_state_at(40))
    finally:
        full_disk(False)
    for said in ("Event loop is closed", "something else"):  # the first, from tensorstore, on some full disks
        sys.unraisablehook(SimpleNamespace(exc_value=RuntimeError(said)))
    logging.getLogger("asyncio").error("Task exception was never retrieved\nfuture: <... defined at .../orbax/...>")
    checkpoints.close()
    assert caplog.text == ""
    assert re.fullmatch(r"WARNING: step 40 could not be saved \(File too large: .*\n", capsys.readouterr().out)
    assert reports == ["something else"]
    assert sys.unraisablehook == hook


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_is_full_at_the_start_is_one_line(tmp_path, monkeypatch, code):
    def full(*_, **__):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(Path, "mkdir", full)
    with pytest.raises(UserError, match=rf"--workdir: '.*' cannot be used: .*{os.strerror(code)}"):
        opened(tmp_path)


def test_a_library_that_cites_the_system_is_cut_short():
    error = ValueError("RESOURCE_EXHAUSTED: Error writing 'x': failed [os_error_code='28'] [source locations]")
    assert retry.reason(error).startswith("No space left on device: Error writing 'x': failed")
    assert (
        retry.reason(OSError(errno.ENOSPC, "No space left on device")) == "OSError: [Errno 28] No space left on device"
    )


@pytest.mark.fault(18)
def test_a_disk_so_full_that_nothing_can_be_tidied_up(workdir, outcome, monkeypatch, capsys):
    checkpoints = opened(workdir, max_to_keep=3)

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as m:
        m.setattr(checkpoints._checkpointer, "save", full)
        m.setattr(checkpoints._store, "sweep", full)
        assert not checkpoints.save(40, state_at(40))
    assert checkpoints.save(50, state_at(50))
    assert checkpoints.wait()
    checkpoints.close()
    assert "WARNING: step 40 could not be saved" in capsys.readouterr().out
    assert restored(workdir)[0] == 50
    outcome("recovered")


@pytest.mark.fault(19)
def test_a_disk_that_stays_full(workdir, outcome):
    checkpoints = opened(workdir, max_failed_saves=3)
    full_disk(True)
    try:
        with pytest.raises(Failure, match="3 saves in a row have failed; step 30 is the last one saved"):
            for step in (40, 50, 60, 70):
                checkpoints.save(step, large_state_at(step))
                checkpoints.wait()
    finally:
        full_disk(False)
    assert restored(workdir)[0] == 30
    outcome("detected", 3)


@pytest.mark.fault(20)
def test_a_folder_that_vanishes(workdir, outcome):
    checkpoints = opened(workdir, max_failed_saves=2)
    (workdir / "checkpoints").rename(workdir / "gone")
    with pytest.raises(Failure, match="2 saves in a row have failed; nothing is saved yet"):
        for step in (50, 60):
            checkpoints.save(step, state_at(step))
            checkpoints.wait()
    outcome("detected")


@pytest.mark.fault(20)
def test_a_folder_that_vanishes_while_saving(workdir, outcome, capsys):
    checkpoints = opened(workdir)
    checkpoints.save(35, state_at(35))  # the first one is waited for
    checkpoints.save(40, large_state_at(40))
    (workdir / "checkpoints").rename(workdir / "gone")
    assert not checkpoints.wait() or saved_steps(workdir) == [40], "what is said to be saved is there"
    assert "WARNING" in capsys.readouterr().out or saved_steps(workdir) == [40]
    outcome("detected")


@pytest.mark.fault(30)
def test_after_a_failed_save_the_folder_is_trusted(workdir, outcome):
    checkpoints = opened(workdir, max_to_keep=3)
    full_disk(True)
    try:
        checkpoints.save(40, large_state_at(40))
        checkpoints.wait()
    finally:
        full_disk(False)
    state = checkpoints.restore_latest(abstract(state_at(0)), print)
    same_bits(state, state_at(30))
    assert checkpoints.save(40, state_at(40)), "the same step can be saved again"
    assert checkpoints.wait(), "the same step can be saved again"
    same_bits(checkpoints.restore_latest(abstract(state_at(0)), print), state_at(40))
    checkpoints.close()
    outcome("recovered", 2)


@pytest.mark.fault(47)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_is_never_saved(workdir, outcome, value):
    checkpoints = opened(workdir)
    state = state_at(40)
    bad = np.array(state.params["w"])
    bad[3, 3] = value
    with pytest.raises(Failure, match="step 40 is not saved: 1 values of params/w are not finite"):
        checkpoints.save(
            40, state._replace(params={**state.params, "w": jax.device_put(bad, state.params["w"].sharding)})
        )
    checkpoints.close()
    assert restored(workdir)[0] == 30
    outcome("detected")


@pytest.mark.fault(49)
@pytest.mark.parametrize("attack", ["huge", "deep", "path", "absolute path", "types", "pickle", "base64"])
def test_hostile_metadata_is_refused(workdir, tmp_path, outcome, attack):
    file, canary = workdir / "checkpoints" / "30" / "meta" / "metadata", tmp_path / "canary"
    meta = json.loads(file.read_text())
    if attack == "huge":
        os.truncate(file, 1 << 30)
    elif attack == "deep":
        file.write_text("[" * 1_000_000)
    elif attack == "pickle":
        file.write_bytes(b"cos\nsystem\n(S'touch %s'\ntR." % str(canary).encode())
    else:
        if attack == "types":
            meta["arrays"] = {"params/w": [["float32"], 3, None]}
        elif attack == "base64":
            meta["tokenizer"]["base64"] = "$(touch x)"
        else:
            name = "../" * 12 + str(canary)[1:] if attack == "path" else str(canary)
            meta["tokenizer"] = {"filename": name, "base64": "AAAA"}
        meta["sha256"] = files.digest(meta)  # the attacker can do this too
        file.write_text(json.dumps(meta))
    folder = find_checkpoints(f"{workdir}@30")[0]
    with pytest.raises(Damaged, match=r"its meta is damaged \("):
        read_meta(folder)
    assert verdict(workdir) == "detected"
    assert not canary.exists()
    outcome("detected")


@pytest.mark.fault(49)
def test_pickles_in_the_place_of_arrays_are_not_loaded(workdir, tmp_path, outcome):
    canary = tmp_path / "canary"
    for file in files_of(workdir):
        if file.parent.name == "d":
            file.write_bytes(b"cos\nsystem\n(S'touch %s'\ntR." % str(canary).encode())
    assert verdict(workdir) == "detected"
    assert not canary.exists()
    outcome("detected")


@pytest.mark.fault(49)
@pytest.mark.parametrize("name", ["run; touch x", "$(touch x)", "`touch x`", "run\nname", "-rf", "%s%n", "été ✓"])
def test_names_are_only_names(saved, tmp_path, monkeypatch, outcome, name):
    monkeypatch.chdir(tmp_path)
    workdir = shutil.copytree(saved, tmp_path / name)
    assert restored(workdir)[0] == 30
    assert find_checkpoints(f"{workdir}@20")[0].name == "20"
    assert [p.name for p in tmp_path.iterdir()] == [name]
    outcome("harmless")


@pytest.mark.parametrize("name", ["run[1]", "[exp1] lr=0.1", "[!a]*?", "**", "100%", "a:b", "@"])
def test_a_run_is_saved_and_restored_under_any_name(tmp_path, name):
    save_three(tmp_path / name / "run")
    assert restored(tmp_path / name / "run")[0] == 30
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_folders_beside_the_run_do_not_get_into_its_arrays(tmp_path):
    save_three(tmp_path / "run1")
    save_three(tmp_path / "run?")
    assert restored(tmp_path / "run?")[0] == 30


@pytest.mark.parametrize(
    ("name", "said"), [("a\\b", "contains a backslash"), ("caf\udce9", "bytes that are not UTF-8")]
)
def test_names_under_which_no_array_can_be_stored_are_refused(saved, tmp_path, name, said):
    with pytest.raises(UserError, match=f"--workdir: .*{said}"):
        check_name("--workdir", tmp_path / name / "run")
    workdir = shutil.copytree(saved, tmp_path / name)
    with pytest.raises(UserError, match=f"--checkpoint: .*{said}"):
        find_checkpoints(str(workdir))


@pytest.mark.parametrize("damage", ["params/d", "rest/manifest.ocdbt", "meta"])
def test_the_first_save_is_read_back(tmp_path, monkeypatch, capsys, damage):
    """Whatever makes a save useless without a word is found at once, and not at the restart."""
    checkpoints = opened(tmp_path)
    finish = checkpoints._checkpointer.wait_until_finished

    def lose() -> None:
        finish()
        shutil.rmtree(tmp_path / "checkpoints" / "10" / damage, ignore_errors=True)
        (tmp_path / "checkpoints" / "10" / damage).unlink(missing_ok=True)

    with monkeypatch.context() as m:
        m.setattr(checkpoints._checkpointer, "wait_until_finished", lose)
        assert not checkpoints.save(10, state_at(10))
    assert "WARNING: step 10 could not be saved (Damaged: " in capsys.readouterr().out
    assert saved_steps(tmp_path) == []
    assert checkpoints.save(20, state_at(20))
    checkpoints.close()
    assert restored(tmp_path)[0] == 20


def test_a_save_that_is_never_right_ends_the_run(tmp_path, monkeypatch):
    checkpoints = opened(tmp_path, max_failed_saves=2)
    monkeypatch.setattr(
        manager, "fingerprints", lambda items: jax.tree.map(lambda x: np.zeros(3, np.uint32), named(items))
    )
    with pytest.raises(
        Failure, match=r"params/. differs from what was saved .*; 2 saves in a row have failed; nothing"
    ):
        for step in (10, 20):
            checkpoints.save(step, state_at(step))


def test_an_asked_step_is_never_replaced_by_another(workdir):
    os.truncate(workdir / "checkpoints" / "30" / "meta" / "metadata", 100)
    with pytest.raises(Damaged, match="its meta is damaged"):
        newest_meta(f"{workdir}@30")
    assert newest_meta(str(workdir))[0].name == "20"
    with pytest.raises(UserError, match="has no step 25; it has 10, 20, 30"):
        find_checkpoints(f"{workdir}@25")
    assert saved_steps(workdir) == [10, 20, 30], "asking changes nothing"


def test_retention_in_two_tiers(tmp_path):
    checkpoints = opened(tmp_path, max_to_keep=2, keep_period=30)
    seen = []
    for step in (10, 20, 23, 30, 40, 50, 57, 60, 70, 77):  # 23, 57 and 77 were saved for a preemption
        checkpoints.save(step, state_at(step))
        checkpoints.wait()
        checkpoints._retention.submit(lambda: None).result()
        seen.append(saved_steps(tmp_path))
    checkpoints.close()
    assert seen == [
        [10], [10, 20], [10, 20, 23], [20, 30], [30, 40], [30, 40, 50], [30, 40, 50, 57], [30, 50, 60], [30, 60, 70],
        [30, 60, 70, 77],
    ]  # fmt: skip
    assert list((tmp_path / "checkpoints" / ".trash").iterdir()) == []


def test_tidying_up_does_not_fall_behind(tmp_path, monkeypatch):
    """Where it is slower than the saving, what is superseded is passed over, and a run does not wait at its end."""
    checkpoints = opened(tmp_path, max_to_keep=2)
    settled, goes_on = [], threading.Event()
    monkeypatch.setattr(checkpoints._store, "sync", lambda name: (settled.append(name), goes_on.wait(60)))
    for step in (10, 20, 30, 40, 50):
        checkpoints.save(step, state_at(step))
        checkpoints.wait()
    goes_on.set()
    checkpoints.close()
    assert len(settled) == 2
    assert settled[-1] == "50"
    assert saved_steps(tmp_path) == [40, 50]


class Saver:
    """The process of saver.py, and what it has said."""

    def __init__(self, workdir: Path, steps: int, max_to_keep: int):
        env = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
        line = [sys.executable, "-m", "tests.helpers.saver", str(workdir), str(steps), str(max_to_keep)]
        self.process = subprocess.Popen(line, stdout=subprocess.PIPE, text=True, env=env, cwd=ROOT)
        self.committed, self._lines = 0, queue.Queue[str]()
        threading.Thread(target=lambda: [self._lines.put(line) for line in self.process.stdout], daemon=True).start()

    def kill_at(self, line: str, spin: int) -> None:
        """SIGKILL, some while after a line was seen."""
        while (said := self._lines.get(timeout=60).strip()) != line:
            self._note(said)
        self._note(said)
        for _ in range(spin):
            os.stat("/")
        self.process.kill()
        self.process.wait()
        while not self._lines.empty():
            self._note(self._lines.get().strip())

    def _note(self, said: str) -> None:
        if said.startswith("committed"):
            self.committed = int(said.split()[1])


@pytest.mark.parametrize(
    ("kill", "max_to_keep", "kills"),
    [
        pytest.param("saving", 2, 3, marks=pytest.mark.fault(1)),
        pytest.param("saving", 2, 9, marks=[pytest.mark.fault(1), pytest.mark.full]),
        pytest.param("committed", 1, 3, marks=pytest.mark.fault(2)),
        pytest.param("committed", 1, 9, marks=[pytest.mark.fault(2), pytest.mark.full]),
    ],
)
def test_killed_while_it_saves_or_deletes(tmp_path, outcome, kill, max_to_keep, kills):
    rng, safe = random.Random(kills), 0
    for _ in range(kills):
        saver = Saver(tmp_path, 1000, max_to_keep)
        saver.kill_at(f"{kill} {safe + rng.randint(2, 6)}", rng.randrange(20_000))
        safe = max(safe, saver.committed)
        done = subprocess.run(
            [sys.executable, "-m", "tests.helpers.saver", str(tmp_path), "0", str(max_to_keep)],
            env={**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}, cwd=ROOT, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr  # it compares every value
        found = int(done.stdout.split()[-1])
        assert found >= safe, f"step {safe} was committed, and {found} is what is left"
        safe = found
        assert not list((tmp_path / "checkpoints").glob(".quarantine/*")), "a kill leaves nothing damaged"
        assert not list((tmp_path / "checkpoints").glob(".trash/*"))
        outcome("recovered", kills=1)
