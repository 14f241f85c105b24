"""Two jobs in one workdir: one of them is refused, and a dead one is no obstacle."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flax_mlm.errors import UserError
from flax_mlm.storage import lease
from tests.helpers.paths import ROOT

HOLDER = """
import sys, time
from pathlib import Path
from flax_mlm.storage import lease
from flax_mlm.errors import UserError
if sys.argv[3:]:
    def flock(*_):
        raise OSError(38, "Function not implemented")
    lease.fcntl.flock = flock
try:
    held = lease.Lease(Path(sys.argv[1]), sys.argv[2])
    held.take(print, stale=1.0)
except UserError as e:
    print("refused", e, flush=True)
else:
    print("taken", flush=True)
    sys.stdin.readline()
    held.release()
"""


class Holder:
    def __init__(self, workdir: Path, name: str = "holder", locks: bool = True):
        self.process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(workdir), name, *([] if locks else ["no locks"])],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
        )  # fmt: skip

    def said(self) -> str:
        """ "taken" or "refused", and why."""
        for line in self.process.stdout:
            if line.startswith(("taken", "refused")):
                return line.strip()
        raise AssertionError("it ended")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def release(self) -> None:
        self.process.communicate("\n", timeout=20)


def take(workdir: Path, name: str = "mine", stale: float = 0.5) -> tuple[lease.Lease, list[str]]:
    log: list[str] = []
    held = lease.Lease(workdir, name)
    held.take(log.append, stale)
    return held, log


@pytest.mark.fault(29)
def test_a_second_job_is_refused(tmp_path, outcome):
    holder = Holder(tmp_path)
    assert holder.said() == "taken"
    with pytest.raises(UserError, match=f"is in use by process {holder.process.pid} on .* since 20"):
        take(tmp_path)
    assert lease.holder(tmp_path) == "holder"
    holder.release()
    assert lease.holder(tmp_path) == ""
    assert list(tmp_path.iterdir()) == []
    mine, log = take(tmp_path)
    mine.check()
    mine.release()
    assert log == []
    assert list(tmp_path.iterdir()) == []
    outcome("detected")


@pytest.mark.fault(3)
def test_a_killed_holder_is_replaced_at_once(tmp_path, outcome):
    for _ in range(10):
        holder = Holder(tmp_path)
        assert holder.said() == "taken"
        holder.kill()
        assert (tmp_path / "lease.json").exists()
        mine, log = take(tmp_path, stale=1000.0)
        assert len(log) == 1
        assert log[0].startswith(f"taking over '{tmp_path}' from process {holder.process.pid} ")
        mine.check()
        mine.release()
        outcome("recovered", kills=1)


@pytest.mark.fault(29)
@pytest.mark.parametrize("left", ["nothing", "dead holder"])
@pytest.mark.parametrize("locks", [True, False])
def test_of_eight_at_once_one_wins(tmp_path, outcome, left, locks):
    if left == "dead holder":
        dead = Holder(tmp_path)
        dead.said()
        dead.kill()
    eight = [Holder(tmp_path, f"job{i}", locks) for i in range(8)]
    said = [holder.said() for holder in eight]
    winners = [i for i, line in enumerate(said) if line == "taken"]
    others = [line for line in said if line != "taken"]
    assert len(winners) == 1
    assert all("is in use by" in line or "now belongs to" in line for line in others)
    assert lease.holder(tmp_path) == f"job{winners[0]}"
    for holder in eight:
        holder.release()
    assert list(tmp_path.iterdir()) == []
    outcome("detected", 7, kills=int(left != "nothing"))


@pytest.mark.fault(29)
def test_a_holder_elsewhere_is_watched(tmp_path, outcome):
    """As two machines see each other: only through the file."""
    mine, _ = take(tmp_path)
    file = tmp_path / "lease.json"
    about = json.loads(file.read_text()) | {"host": "elsewhere", "run_id": "theirs"}
    mine.release()
    file.write_text(json.dumps(about))
    other, log = take(tmp_path)
    assert [line.split()[-1] for line in log] == ["is", "gone"]
    assert "on elsewhere" in log[0]
    other.release()

    file.write_text(json.dumps(about))
    changer = subprocess.Popen(
        [sys.executable, "-c", "import sys,time; time.sleep(1); open(sys.argv[1], 'a').write(' ')", str(file)]
    )
    with pytest.raises(UserError, match=r"in use by process .* on elsewhere"):
        take(tmp_path, stale=20.0)
    changer.wait()
    outcome("detected", 2)


@pytest.mark.fault(29)
def test_a_job_that_lost_its_lease_writes_no_more(tmp_path, outcome):
    mine, _ = take(tmp_path)
    (tmp_path / "lease.json").write_text(
        json.dumps({"run_id": "theirs", "pid": 1, "host": "elsewhere", "since": "now"})
    )
    with pytest.raises(UserError, match="now belongs to process 1 on elsewhere since now; this job must not write"):
        mine.check()
    mine.release()
    assert lease.holder(tmp_path) == "theirs", "it is not ours to remove"
    (tmp_path / "lease.json").unlink()
    with pytest.raises(UserError, match=r"has lost its lease.json"):
        mine.check()
    outcome("detected", 2)


@pytest.mark.fault(29)
def test_a_stopped_holder_notices_that_it_was_replaced(tmp_path, monkeypatch, outcome):
    holder = Holder(tmp_path)
    assert holder.said() == "taken"
    holder.process.send_signal(signal.SIGSTOP)
    monkeypatch.setattr(lease, "_machine", lambda: {"host": "another", "boot": "", "processes": ""})
    mine, log = take(tmp_path)
    assert len(log) == 2
    holder.process.send_signal(signal.SIGCONT)
    time.sleep(lease._BEAT + 1)  # its next beats must not overwrite ours
    mine.check()
    holder.release()
    mine.check()
    mine.release()
    outcome("recovered")


@pytest.mark.fault(29)
@pytest.mark.parametrize(
    "content", [b"", b"{", b"[1]", b"\xff\x00", b"[" * 100_000, b'{"pid": "x", "host": [], "run_id": 7}']
)
def test_a_lease_that_says_nothing_is_watched_too(tmp_path, outcome, content):
    (tmp_path / "lease.json").write_bytes(content)
    mine, log = take(tmp_path, stale=0.2)
    assert len(log) == 2
    assert "waiting" in log[0]
    mine.check()
    mine.release()
    outcome("recovered")


@pytest.mark.fault(49)
@pytest.mark.parametrize("kind", ["folder", "link", "pipe", "huge"])
def test_a_lease_that_is_no_file(tmp_path, outcome, kind):
    workdir, file = tmp_path / "run", tmp_path / "run" / "lease.json"
    workdir.mkdir()
    if kind == "folder":
        file.mkdir()
    elif kind == "link":
        file.symlink_to("/etc/passwd")
    elif kind == "pipe":
        os.mkfifo(file)
    else:
        file.touch()
        os.truncate(file, 1 << 33)
    if kind in ("folder", "link"):
        with pytest.raises(UserError, match=r"--workdir: .* cannot be used"):
            take(workdir)
    else:
        take(workdir)[0].release()
    outcome("detected")


@pytest.mark.fault(3)
def test_a_process_number_that_was_given_to_another(tmp_path, outcome):
    mine, _ = take(tmp_path)
    file = tmp_path / "lease.json"
    about = json.loads(file.read_text())
    mine.release()
    file.write_text(json.dumps({**about, "started": "1", "run_id": "theirs"}))  # our pid, an earlier process
    other, log = take(tmp_path, stale=1000.0)
    assert len(log) == 1
    assert "which is gone" in log[0]
    other.release()
    outcome("recovered")
