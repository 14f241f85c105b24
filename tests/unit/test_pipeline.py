"""Batches are a function of (corpora, seed, step), whatever the hosts and restarts."""

import hashlib
import itertools
import os
import socket
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flax_mlm.data import pipeline
from flax_mlm.data.stream import Stream
from flax_mlm.errors import UserError
from tests.helpers.paths import ROOT


class Rows:
    """Rows whose tokens tell their number."""

    seq_len, pad_id = 3, 0

    def __init__(self, num_rows: int):
        self.num_rows = num_rows
        self.seen: list[int] = []

    def read(self, indices: np.ndarray) -> np.ndarray:
        self.seen += indices.tolist()
        return np.repeat(indices[:, None] + 1, 3, axis=1).astype(np.int32)


def stream(rows, start, stop, batch=8, seed=0, **more) -> list[dict[str, np.ndarray]]:
    options = {"seed": seed, "global_batch_size": batch, "start_step": start, "stop_step": stop}
    return list(pipeline.train_batches(rows, **options, **more))


def numbers(batches) -> np.ndarray:
    return np.concatenate([b["tokens"][:, 0] - 1 for b in batches])


def test_shapes_and_types():
    (batch,) = stream(Rows(10), 5, 6)
    assert batch["tokens"].shape == (8, 3)
    assert batch["tokens"].dtype == np.int32
    assert batch["row_ids"].dtype == np.uint32
    np.testing.assert_array_equal(batch["row_ids"], [[0, p] for p in range(40, 48)])


@settings(max_examples=8, deadline=None)
@given(st.integers(1, 70), st.integers(0, 2**31))
def test_every_epoch_has_every_row_once(num_rows, seed):
    order = numbers(stream(Rows(num_rows), 0, num_rows, batch=4, seed=seed)).reshape(4, num_rows)
    for epoch in order:
        assert sorted(epoch) == list(range(num_rows))


def test_orders_are_fresh_and_look_random():
    n, epochs = 64, 600
    order = numbers(stream(Rows(n), 0, epochs, batch=n)).reshape(epochs, n)
    assert len({tuple(e) for e in order}) == epochs  # the plain operation repeats itself after 256 epochs
    assert not np.array_equal(order, numbers(stream(Rows(n), 0, epochs, batch=n, seed=1)).reshape(epochs, n))
    first = np.bincount(order[:, 0], minlength=n)
    assert ((first - epochs / n) ** 2 / (epochs / n)).sum() < 120  # chi-squared, 63 degrees: p about 1e-5
    assert abs((order == np.arange(n)).sum(axis=1).mean() - 1) < 0.15
    assert abs((np.diff(order, axis=1) == 1).sum(axis=1).mean() - 63 / 64) < 0.15


@pytest.mark.parametrize("corpora", [None, Stream((20, 10, 7), (5, 2, 1))])
def test_restart_gives_the_same_stream(corpora):
    whole, tail = stream(Rows(37), 0, 20, stream=corpora), stream(Rows(37), 13, 20, stream=corpora)
    assert len(tail) == 7
    for a, b in zip(whole[13:], tail, strict=True):
        assert all(np.array_equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("corpora", [None, Stream((20, 10, 7), (5, 2, 1))])
@pytest.mark.parametrize("hosts", [1, 2, 4, 8])
def test_hosts_share_the_same_batches(hosts, corpora):
    whole = stream(Rows(37), 3, 9, stream=corpora)
    rows = Rows(37)
    host_rows = np.random.default_rng(0).permutation(8).reshape(hosts, -1)  # as devices lie in a mesh
    parts = [stream(rows, 3, 9, local_rows=own, stream=corpora) for own in host_rows]
    for step, batch in enumerate(whole):
        for key in batch:
            np.testing.assert_array_equal(batch[key][host_rows.ravel()], np.concatenate([p[step][key] for p in parts]))
    assert len(rows.seen) == 6 * 8  # each row is read by one host only


def test_the_stream_of_one_corpus_is_for_ever():
    """Runs go on with the batches that they began with, whatever version of this program they are continued by."""
    found = hashlib.sha256()
    for rows, start, stop in ((37, 0, 20), (1000, 2**29 - 1, 2**29 + 1), (10**6, 10**7, 10**7 + 3)):
        for batch in stream(Rows(rows), start, stop, seed=5):
            found.update(batch["tokens"].tobytes() + batch["row_ids"].tobytes())
    assert found.hexdigest() == "b1587a4e5095453232e44d23c47b17d8463f88b1e9890fd6a2ec9c2224004dac"


@settings(max_examples=8, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 12), st.integers(1, 9)), min_size=2, max_size=4), st.integers(0, 2**31))
def test_every_epoch_of_every_corpus_has_each_of_its_rows_once(corpora, seed):
    num_rows, weights = zip(*corpora, strict=True)
    order = numbers(stream(Rows(sum(num_rows)), 0, 30, seed=seed, stream=Stream(num_rows, weights)))
    for first, rows in zip(itertools.accumulate(num_rows, initial=0), num_rows, strict=False):
        own = order[(first <= order) & (order < first + rows)] - first
        epochs = [own[i : i + rows].tolist() for i in range(0, len(own), rows)]
        assert all(sorted(epoch) == list(range(rows)) for epoch in epochs[:-1])
        assert len(set(epochs[-1])) == len(epochs[-1])
    share = (order < num_rows[0]).sum() / len(order)
    assert abs(share - weights[0] / sum(weights)) <= 1 / len(order)


def test_corpora_of_the_same_size_have_orders_of_their_own():
    corpora = Stream((50, 50), (1, 1))
    batches = stream(Rows(100), 0, 25, stream=corpora)
    order = numbers(batches)
    first, second = order[order < 50], order[order >= 50] - 50
    assert sorted(first[:50]) == sorted(second[:50])
    assert not np.array_equal(first, second)
    ids = np.concatenate([batch["row_ids"] for batch in batches])
    assert len(np.unique(ids, axis=0)) == len(ids), "the same row number in two corpora would have the same masks"


def test_other_weights_from_a_row_on():
    """As a later part of a run may have: from row 88 on, with the positions reached there."""
    before = Stream((30, 20), (3, 1))
    after = Stream((30, 20), (1, 4), first=88, starts=before.positions(88))
    order = numbers(stream(Rows(50), 0, 11, stream=before) + stream(Rows(50), 11, 21, stream=after))
    second = order[order >= 30] - 30
    assert len(second) == 22 + 64, "the change is within an epoch"
    for epoch in range(4):
        assert sorted(second[20 * epoch : 20 * epoch + 20]) == list(range(20))


def test_positions_beyond_32_bits():
    step = 2**29 - 1  # of 8 rows: the last one below 2**32, and the first one after
    batches = stream(Rows(1000), step, step + 2)
    ids = np.concatenate([b["row_ids"] for b in batches]).astype(np.int64)
    np.testing.assert_array_equal((ids[:, 0] << 32) + ids[:, 1], np.arange(2**32 - 8, 2**32 + 8))
    assert len(set(ids[:, 0])) == 2


@pytest.mark.parametrize("corpora", [None, Stream((6 * 10**5, 4 * 10**5), (7, 3))])
def test_a_far_step_is_reached_at_once(corpora):
    """As many rows are read for it as for step 0: its own, and those of the few that are made ahead."""
    rows = Rows(10**6)
    options = {"start_step": 10**7, "stop_step": 10**9, "stream": corpora}
    batches = pipeline.train_batches(rows, seed=0, global_batch_size=8, **options)
    assert len(list(itertools.islice(batches, 3))) == 3
    batches.close()
    assert 3 <= len(rows.seen) / 8 <= 3 + 8


_IN_ANY_ORDER = """
import sys
import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh
from flax_mlm.distributed.batches import local_rows, shard_replicated_rows, shard_rows
from flax_mlm.distributed.mesh import AXES, replicate

jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
rows = np.arange(24).reshape(12, 2)
for order, shape in (([0, 2, 3, 1], (2, 2, 1)), ([3, 0, 1, 2], (4, 1, 1)), ([0, 2, 3, 1], (2, 1, 2))):
    mesh = Mesh(np.array(jax.devices())[order].reshape(shape), AXES, (AxisType.Explicit,) * 3)
    with jax.set_mesh(mesh):
        own = shard_rows(rows[local_rows(mesh, 12)], mesh)
        for found in (own, shard_replicated_rows(rows, mesh)):
            np.testing.assert_array_equal(jax.jit(replicate)(found), rows)
"""


def test_rows_reach_their_devices_however_the_devices_of_a_host_lie_in_the_mesh():
    """The mesh of a TPU slice follows its rings, not its hosts; and with `tensor` hosts may have the same rows."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{s.getsockname()[1]}"
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "PYTHONPATH": str(ROOT)}
    line = [sys.executable, "-c", _IN_ANY_ORDER, address]
    hosts = [subprocess.Popen([*line, str(i)], env=env, stderr=subprocess.PIPE, text=True) for i in range(2)]
    said = [host.communicate(timeout=120)[1] for host in hosts]
    assert [host.returncode for host in hosts] == [0, 0], said


def test_wrong_batches():
    for corpora in (None, Stream((0, 0), (1, 1))):
        with pytest.raises(UserError, match="no training rows"):
            stream(Rows(0), 0, 1, stream=corpora)


@pytest.mark.parametrize("hosts", [1, 2, 4])
@pytest.mark.parametrize("wanted", [range(21), [0, 4, 8, 12, 16], [3], range(5, 21)])
def test_evaluation_sees_each_row_once(hosts, wanted):
    wanted = np.array(wanted)
    host_rows = np.arange(8).reshape(hosts, -1)
    parts = [list(pipeline.eval_batches(Rows(21), wanted, batch_size=8, local_rows=own)) for own in host_rows]
    assert len({len(p) for p in parts}) == 1  # every host takes part in every step
    batch = {k: np.concatenate([p[s][k] for s in range(len(parts[0])) for p in parts]) for k in ("tokens", "row_ids")}
    count = len(wanted)
    assert batch["row_ids"].dtype == np.uint32
    assert len(batch["tokens"]) == -(-count // 8) * 8
    np.testing.assert_array_equal(batch["row_ids"][:count, 1], wanted)
    np.testing.assert_array_equal(batch["tokens"][:count, 0] - 1, wanted)
    assert (batch["tokens"][count:] == 0).all()
