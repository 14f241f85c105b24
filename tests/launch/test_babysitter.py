"""`launch/tpu.sh babysit` and faults of TPUs: it goes on, or ends with one line; nothing that costs is left."""

import signal
import time
from collections.abc import Iterator

import pytest

from tests.helpers.desk import Desk, last_line, needs_gcloud, nothing_is_left, until
from tests.helpers.fake_cloud import FakeCloud


@pytest.fixture
def watched(tmp_path) -> Iterator[Desk]:
    """A submitted run whose machines say DONE as soon as they are there."""
    with FakeCloud(tmp_path, hosts=0) as cloud:
        cloud.on_active = lambda: cloud.say("DONE", "slice0-worker0\n")
        yield Desk(cloud)


def becomes(desk: Desk, *states: str):
    """TPUs that go from state to state."""

    def what(name: str) -> None:
        for state in states:
            time.sleep(1.0)
            desk.cloud.become(name, state)

    return what


@needs_gcloud
def test_tpus_that_never_come_are_not_waited_for_for_ever(watched):
    watched.write(MAX_WAIT_HOURS=3)
    watched.cloud.plan = [lambda _: None]
    watched.cloud.queue()
    answer = watched.run("babysit", code=1, HOUR="1")
    assert "still WAITING_FOR_RESOURCES after 3 hours (MAX_WAIT_HOURS)" in last_line(answer)
    assert nothing_is_left(watched)


@needs_gcloud
@pytest.mark.parametrize("states", [("PROVISIONING", "SUSPENDED"), ("FAILED",)], ids=["suspended", "failed"])
def test_tpus_lost_while_they_are_made_are_made_anew(watched, states):
    watched.cloud.plan = [becomes(watched, *states)]
    watched.cloud.queue()
    answer = watched.run("babysit")
    assert "recreating it (restart 1 of 20)" in answer
    assert "run is done" in answer
    assert watched.cloud.created == 2
    assert nothing_is_left(watched)


@needs_gcloud
def test_tpus_that_somebody_deleted_are_made_anew(watched):
    watched.cloud.plan = [lambda name: watched.cloud.queued.pop(name)]
    watched.cloud.queue()
    assert "run is gone: recreating it" in watched.run("babysit")
    assert watched.cloud.created == 2
    assert nothing_is_left(watched)


@needs_gcloud
def test_restarts_are_counted(watched):
    watched.write(MAX_RESTARTS=1)
    watched.cloud.plan = [becomes(watched, "SUSPENDED")] * 3
    watched.cloud.queue()
    answer = watched.run("babysit", code=1)
    assert "run: run was preempted, and was recreated 1 times (MAX_RESTARTS)" in last_line(answer)
    assert nothing_is_left(watched)


@needs_gcloud
def test_tpus_that_are_refused_when_made_anew_end_the_run(watched):
    watched.cloud.plan = [becomes(watched, "SUSPENDED")]
    watched.cloud.queue()
    watched.cloud.answers["POST", "queuedResources"] = (429, "Quota limit exceeded")
    answer = watched.run("babysit", code=1)
    assert "run cannot be recreated" in last_line(answer)
    assert "Quota limit" in last_line(answer)
    assert nothing_is_left(watched)


@needs_gcloud
@pytest.mark.parametrize("word", ["", "1 starting\n"], ids=["from_the_start", "later"])
def test_machines_that_stay_silent_are_given_up(watched, word):
    watched.cloud.on_active = lambda: word and watched.cloud.say("workers/slice0-worker0", word)
    watched.cloud.queue()
    answer = watched.run("babysit", code=1, SILENT_AFTER="1")
    assert "none of its machines has said a word for 1 s" in last_line(answer)
    assert watched.cloud.created == 3
    assert nothing_is_left(watched)


@needs_gcloud
def test_a_run_that_fails_again_and_again_is_given_up(watched):
    """A machine that never comes, say: the others name it, try again, and then the TPU is made anew."""
    why = "1 slice0-worker0: stopped: process 1 of 2 did not come within 1800 s\n"
    watched.cloud.on_active = lambda: watched.cloud.say("FAILED", why)
    watched.cloud.queue()
    answer = watched.run("babysit", code=1)
    assert "run failed 3 times, the last time: slice0-worker0: stopped: process 1 of 2" in last_line(answer)
    assert watched.cloud.created == 3
    assert nothing_is_left(watched)


@needs_gcloud
def test_a_mistake_is_not_tried_again(watched):
    watched.cloud.on_active = lambda: watched.cloud.say("FAILED", "2 slice0-worker0: error: corpus not found\n")
    watched.cloud.queue()
    answer = watched.run("babysit", code=2)
    assert "run: a mistake; slice0-worker0: error: corpus not found" in last_line(answer)
    assert watched.cloud.created == 1
    assert nothing_is_left(watched)


@needs_gcloud
def test_a_deletion_that_fails_is_tried_again(watched):
    watched.cloud.queue()
    watched.cloud.deletions_that_fail = 3
    assert "run is deleted" in watched.run("delete")
    assert nothing_is_left(watched)


@needs_gcloud
def test_what_cannot_be_deleted_is_named(watched):
    watched.cloud.queue()
    watched.cloud.deletions_that_fail = 1000
    answer = watched.run("babysit", code=1, GONE_AFTER="4")
    assert "not deleted, and billed until it is: run (ACTIVE)" in answer
    watched.cloud.deletions_that_fail = 0
    watched.run("delete")
    assert nothing_is_left(watched)


@needs_gcloud
def test_a_node_that_outlives_its_queued_resource_is_deleted_too(watched):
    watched.cloud.queue()
    until(lambda: watched.cloud.nodes)
    del watched.cloud.queued["run"]
    watched.run("delete")
    assert nothing_is_left(watched)


@needs_gcloud
def test_the_money_ends_the_run(watched):
    watched.write(PRICE=100000, MAX_COST=200)
    watched.cloud.on_active = lambda: watched.cloud.say("workers/slice0-worker0", "1 ended with exit code 75\n")
    watched.cloud.queue()
    answer = watched.run("babysit", code=1)
    assert "(MAX_COST is 200); it is saved" in last_line(answer)
    assert "all machines have saved and exited" in answer
    assert nothing_is_left(watched)


@pytest.fixture
def long_run(watched) -> Desk:
    """A run that is at work, and goes on and on."""
    watched.cloud.on_active = lambda: watched.cloud.say("workers/slice0-worker0", "1 at work\n")
    watched.cloud.queue()
    until(lambda: watched.cloud.says("workers/slice0-worker0"))  # before that, its coming undoes what a test changes
    return watched


@needs_gcloud
def test_two_babysitters(long_run):
    first = long_run.start("babysit")
    until(lambda: long_run.cloud.says("babysitter"))
    assert "has a babysitter already" in last_line(long_run.run("babysit", code=2))
    first.send_signal(signal.SIGTERM)
    _, err = first.communicate(timeout=60)
    assert first.returncode == 130
    assert "the TPUs run on without a babysitter and continue to be billed" in err
    second = long_run.start("babysit")  # the first has said that it goes
    until(lambda: "nobody" not in long_run.cloud.says("babysitter"))
    second.kill()
    second.communicate()
    assert "has a babysitter already" in long_run.run("babysit", code=2), "it cannot know yet that the second is dead"


@needs_gcloud
def test_a_run_that_is_told_to_stop_keeps_its_tpus(long_run):
    first = long_run.start("babysit")
    until(lambda: long_run.cloud.says("babysitter"))
    long_run.cloud.say("STOP", "now\n")
    _, err = first.communicate(timeout=60)
    assert first.returncode == 0, err
    assert "Its TPUs continue to be billed" in err, err
    assert long_run.cloud.nodes
    assert "nobody" in long_run.cloud.says("babysitter")


@needs_gcloud
def test_a_babysitter_that_was_killed_is_followed_and_its_counts_stay(long_run):
    long_run.write(MAX_RESTARTS=1)
    long_run.cloud.say("babysitter", f"killed 1 0 3600 {int(time.time()) - 1000}\n")
    long_run.cloud.become("run", "SUSPENDED")
    answer = long_run.run("babysit", code=1)
    assert "was recreated 1 times (MAX_RESTARTS)" in last_line(answer)
    assert nothing_is_left(long_run)


@needs_gcloud
def test_an_api_that_is_down_for_a_while_is_waited_for(long_run):
    babysitter = long_run.start("babysit")
    until(lambda: long_run.cloud.says("babysitter"))
    long_run.cloud.answers["GET", "queuedResources"] = (403, "denied for a while")
    asked = len(long_run.cloud.calls)
    until(lambda: len(long_run.cloud.calls) > asked + 3)
    long_run.cloud.answers.clear()
    long_run.cloud.say("DONE", "slice0-worker0\n")
    _, err = babysitter.communicate(timeout=120)
    assert babysitter.returncode == 0
    assert "cannot see run (1 of 20)" in err
    assert nothing_is_left(long_run)


@needs_gcloud
def test_tpus_that_cannot_be_seen_any_more_are_named(long_run):
    babysitter = long_run.start("babysit", POLL="0")
    until(lambda: long_run.cloud.says("babysitter"))
    long_run.cloud.answers["GET", "queuedResources"] = (403, "denied")
    _, err = babysitter.communicate(timeout=120)
    assert babysitter.returncode == 1
    assert "it may exist and be billed: bash launch/tpu.sh delete" in err


@needs_gcloud
def test_a_bucket_that_is_denied_ends_the_run(long_run):
    babysitter = long_run.start("babysit", POLL="0")
    until(lambda: long_run.cloud.says("babysitter"))
    long_run.cloud.gcs.fault = lambda *_: 403
    _, err = babysitter.communicate(timeout=120)
    assert babysitter.returncode == 1
    assert "gs://bucket cannot be read" in err
    assert nothing_is_left(long_run)


# The whole way, with real training
