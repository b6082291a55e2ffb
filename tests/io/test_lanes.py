"""Rows dealt to lanes and shared out to replicas: every row once, in an order that does not depend on the replicas."""

import itertools
import random

import pytest
import torch

from sparc_kernels.io.features import Features
from sparc_kernels.io.lanes import Lanes
from sparc_kernels.io.loader import MEMORY, Loader


def numbered(rows: int) -> Features:
    """Row i holds i + 1, so that padding is 0."""
    return Features({"a": torch.arange(1.0, rows + 1)[:, None].repeat(1, 3)}, normalize=False)


def lanes_of(features: Features, size: int, **options) -> Lanes:
    return Lanes(features, size, torch.Generator().manual_seed(3), **{"seed": 3, "memory": MEMORY, **options})


def drawn(loaders: list[Lanes], first: int, last: int, skip: int = 0) -> list[list[list[int]]]:
    """For every batch and replica its valid rows; checks that the replicas agree and that the rest is padding."""
    batches = []
    for parts in zip(*(loader.epochs(first, last, skip) for loader in loaders), strict=True):
        places = {(p.epoch, p.number, p.last, p.rows) for p in parts}
        assert len(places) == 1 and len({len(p.x["a"]) for p in parts}) == 1
        counts = parts[0].rows
        assert all((p.x["a"][n:] == 0).all() for p, n in zip(parts, counts, strict=True))
        assert len(parts[0].x["a"]) == max(counts) > 0
        batches.append([p.x["a"][:n, 0].int().tolist() for p, n in zip(parts, counts, strict=True)])
    return batches


def flat(batches) -> list[list[int]]:
    return [list(itertools.chain(*parts)) for parts in batches]


@pytest.mark.parametrize("seed", range(25))
def test_every_row_once_in_one_order_for_every_number_of_replicas(seed):
    rng = random.Random(seed)
    lanes, others = rng.choice([1, 1, 2, 3, 4]), rng.choice([1, 2, 3, 4, 6])
    rows, size = rng.randint(1, 130), 12 * rng.randint(1, 3)
    options = {"lanes": lanes, "shuffle": rng.choice(["window", "window", "official", "none"]),
               "memory": rng.choice([MEMORY, 2 * 12 * 2 * size])}  # fmt: skip
    if rng.random() < 0.4 and rows > 8:
        a, b = sorted(rng.sample(range(1, rows), 2))
        options["intervals"] = [(0, a), (b, rows)]
    features = numbered(rows)
    expected = [i + 1 for a, b in options.get("intervals", [(0, rows)]) for i in range(a, b)]
    drop = options["drop_last"] = rng.random() < 0.3 and len(expected) >= size
    alone = lanes_of(features, size, **options)
    whole = flat(drawn([alone], 0, 3))
    per_epoch = -(-len(expected) // size) if not drop else len(expected) // size
    assert len(whole) == 3 * len(alone) == 3 * per_epoch
    for epoch in range(3):
        got = sorted(itertools.chain(*whole[epoch * per_epoch : (epoch + 1) * per_epoch]))
        assert set(got) <= set(expected) if drop else got == expected
        assert len(got) == (per_epoch * size if drop else len(expected))

    def replicas(n: int) -> list[Lanes]:
        return [lanes_of(features, size, replica=i, replicas=n, **options) for i in range(n)]

    assert flat(drawn(replicas(others), 0, 3)) == whole
    # from anywhere on; a single lane goes on from the states that its batches carry
    epoch, number = divmod(rng.randint(0, 3 * per_epoch - 1), per_epoch)
    parts = replicas(others)
    states = {batch.epoch: batch.epoch_state for batch in lanes_of(features, size, **options).epochs(0, 3)}
    for part in parts:
        part.generator.set_state(states[epoch])
    assert flat(drawn(parts, epoch, 3, number)) == whole[epoch * per_epoch + number :]
    assert drawn(replicas(others), 2, 3, per_epoch) == []


def test_one_lane_is_the_loader():
    features = numbered(100)
    want = list(Loader(features, 24, torch.Generator().manual_seed(3), memory=2400).epochs(0, 3, 2))
    got = list(lanes_of(features, 24, memory=2400).epochs(0, 3, 2))
    for a, b in zip(want, got, strict=True):
        assert torch.equal(a.x["a"], b.x["a"]) and torch.equal(a.epoch_state, b.epoch_state) and a[1:4] == b[1:4]
        assert b.rows == (len(b.x["a"]),)
    for replica in range(2):
        halves = list(lanes_of(features, 24, memory=2400, replica=replica, replicas=2).epochs(0, 3, 2))
        assert all(torch.equal(a.epoch_state, b.epoch_state) for a, b in zip(want, halves, strict=True))


def test_a_lane_is_a_loader_of_its_part_and_each_replica_reads_its_own(monkeypatch):
    features, read = numbered(7), []
    real = Features.read_stream
    monkeypatch.setattr(Features, "read_stream", lambda self, s, a, b: read.append((a, b)) or real(self, s, a, b))
    parts = [lanes_of(features, 4, lanes=2, replica=i, replicas=2) for i in range(2)]
    for part, rows in zip(parts, ([1, 2, 3, 4], [5, 6, 7]), strict=True):
        read.clear()
        batches = list(part.epochs(0, 1))
        assert [b.rows for b in batches] == [(2, 2), (2, 1)]
        assert {i + 1 for a, b in read for i in range(a, b)} == set(rows)
        assert sorted(v for b in batches for v in b.x["a"][:, 0].tolist() if v) == rows
    few = [lanes_of(numbered(3), 8, lanes=4, replica=i, replicas=4) for i in range(4)]  # an empty last part
    assert [len(part.loaders) for part in few] == [1, 1, 1, 0]
    assert next(few[3].epochs(0, 1)).rows == (1, 1, 1, 0)


def test_lanes_and_epochs_have_orders_of_their_own():
    orders = [drawn([lanes_of(numbered(400), 400, lanes=2, seed=seed)], 0, 2) for seed in (3, 4)]
    first, second = (epoch[0] for epoch in orders[0])
    assert len({tuple(o) for o in (first[:200], second[:200], [v - 200 for v in first[200:]])}) == 3
    assert orders[0] != orders[1]


def test_batches_that_cannot_be_shared_out_are_refused():
    for lanes, replicas in ((5, 1), (1, 5), (2, 5)):
        wanted = rf"batch_size: expected a multiple of {lanes} \(lanes\) and {replicas} \(replicas\), got 24"
        with pytest.raises(ValueError, match=wanted):
            lanes_of(numbered(50), 24, lanes=lanes, replicas=replicas)
    with pytest.raises(ValueError, match="batch_size: expected at most 50, the rows there are, got 52"):
        lanes_of(numbered(50), 52, lanes=2, drop_last=True)
    with pytest.raises(ValueError, match="intervals: expected at least one row"):
        lanes_of(numbered(50), 52, intervals=[])
