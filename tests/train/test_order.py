"""Which picture stands where: permutations in closed form, windows of shards, turns of buckets."""

from collections import Counter
from itertools import islice, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2

from train.data.order import ROUNDS, Shuffled, Turns, permuted
from train.randomness import normal, randomness


def keys(number: int) -> list[int]:
    return np.random.default_rng(number).integers(0, 2**64, ROUNDS, np.uint64).tolist()


def shuffled(
    count: int, repeats: list[int] | None = None, blocks: list[int] | None = None, window: int = 0, seed: int = 0
):
    ends = range(1, count + 1) if repeats is None else np.cumsum(repeats)
    return Shuffled(range(count), ends, blocks or [int(ends[-1])], window, seed, "0")


# The permutation


def test_it_is_a_bijection_at_every_size():
    for size in (*range(1, 130), 1000, 2500, 4095, 4096, 4097):
        assert sorted(permuted(index, size, keys(size)) for index in range(size)) == list(range(size))


@given(size=st.integers(1, 10**15), index=st.integers(0, 10**15), number=st.integers(0, 10**6))
@settings(max_examples=200, deadline=None)
def test_it_stays_within_any_size(size, index, number):
    assert 0 <= permuted(index % size, size, keys(number)) < size


@pytest.mark.parametrize("size", [2, 3, 4, 5, 8, 17])
def test_every_ordered_pair_of_places_is_equally_likely(size):
    """Chi-square of where the first and the last go, over keys; chance passes the limit once in 10^4."""
    trials = 100 * size * (size - 1)
    pairs = Counter((permuted(0, size, keys(n)), permuted(size - 1, size, keys(n))) for n in range(trials))
    expected = trials / (size * (size - 1))
    possible = [(a, b) for a in range(size) for b in range(size) if a != b]
    statistic = sum((pairs[pair] - expected) ** 2 / expected for pair in possible)
    assert pairs.total() == sum(pairs[pair] for pair in possible)
    assert statistic < chi2.ppf(1 - 1e-4, len(possible) - 1)


def test_neighbours_part_in_a_large_set():
    """Steps between the images of neighbours are as those of independent draws: a third of the size long."""
    size, count = 10**9, 4000
    images = np.array([permuted(index, size, keys(0)) for index in range(count)], float) / size
    assert abs(images.mean() - 0.5) < 4 * (1 / 12 / count) ** 0.5
    assert abs(np.corrcoef(images[1:], images[:-1])[0, 1]) < 4 / count**0.5
    assert abs(np.abs(np.diff(images)).mean() - 1 / 3) < 4 * (1 / 18 / count) ** 0.5
    counts = np.histogram(images, 50, (0, 1))[0]
    assert ((counts - count / 50) ** 2 / (count / 50)).sum() < chi2.ppf(1 - 1e-4, 49)


def test_a_billion_pictures_need_no_memory():
    order = shuffled(10**9)
    seen = {order[position] for position in range(2000)}
    assert len(seen) == 2000
    assert min(seen) < 10**7
    assert max(seen) > 99 * 10**7
    assert all(not isinstance(value, np.ndarray) or len(value) < 3 for value in vars(order).values())


# The order of one bucket


@given(
    repeats=st.lists(st.integers(1, 4), min_size=1, max_size=30),
    cuts=st.lists(st.integers(0, 30), max_size=6),
    window=st.integers(0, 4),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_an_epoch_holds_each_picture_as_often_as_it_repeats(repeats, cuts, window, seed):
    """Whatever the shards, empty ones too."""
    edges = [0, *sorted(min(cut, len(repeats)) for cut in cuts), len(repeats)]
    blocks = [sum(repeats[start:end]) for start, end in pairwise(edges)]
    order = shuffled(len(repeats), repeats, blocks, window, seed)
    for epoch in range(2):
        first = epoch * len(order)
        seen = Counter(order[position] for position in range(first, first + len(order)))
        assert seen == dict(enumerate(repeats))


def test_every_epoch_and_seed_has_an_order_of_its_own():
    orders = {tuple(shuffled(10, seed=seed)[position] for position in range(10 * epoch, 10 * epoch + 10))
              for seed in range(3) for epoch in range(5)}  # fmt: skip
    assert len(orders) == 15


def test_a_position_needs_none_before_it():
    repeats, blocks = [1 + n % 3 for n in range(40)], [20, 0, 35, 24]
    forwards = shuffled(40, repeats, blocks, 2)
    straight = [forwards[position] for position in range(300)]
    backwards = shuffled(40, repeats, blocks, 2)
    assert [backwards[position] for position in reversed(range(300))][::-1] == straight


def test_a_window_mixes_its_shards_and_no_others():
    order = shuffled(60, blocks=[6] * 10, window=3)
    sets = []
    for epoch in (0, 1):
        shards = [order[position] // 6 for position in range(60 * epoch, 60 * epoch + 60)]
        groups = [set(shards[start : start + 18]) for start in (0, 18, 36, 54)]
        assert [len(group) for group in groups] == [3, 3, 3, 1]
        assert set.union(*groups) == set(range(10))
        assert all(len(set(shards[start : start + 6])) > 1 for start in (0, 6, 12))
        sets.append([frozenset(group) for group in groups])
    assert sets[0] != sets[1], "each epoch shuffles the shards"
    assert len({shuffled(60, blocks=[6] * 10)[position] // 6 for position in range(18)}) > 3, "0 is the whole set"


# Turns of buckets


@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=6),
    batch_size=st.integers(1, 16),
    parts=st.integers(1, 5),
    seed=st.integers(0, 99),
)
@settings(max_examples=80, deadline=None)
def test_after_e_epochs_a_bucket_has_had_its_share(lengths, batch_size, parts, seed):
    turns = Turns(tuple(lengths), batch_size, parts, seed)
    batch, had = 0, Counter()
    for epoch in range(1, 5):
        due = {bucket: epoch * length // batch_size for bucket, length in enumerate(lengths)}
        while batch < sum(due.values()):
            bucket, own = turns[batch]
            had[bucket, own] += 1
            batch += 1
        assert had == {(bucket, own): 1 for bucket, count in due.items() for own in range(count)}


def test_turns_are_shuffled_and_a_function_of_the_seed():
    one, again, other = (Turns((400, 300, 100), 10, 1, seed) for seed in (0, 0, 1))
    buckets = [one[batch][0] for batch in range(160)]
    assert buckets == [again[batch][0] for batch in reversed(range(160))][::-1]
    assert buckets != [other[batch][0] for batch in range(160)]
    assert buckets[:80] != buckets[80:]
    assert 20 < sum(a != b for a, b in pairwise(buckets[:80])) < 75


def test_turns_in_parts_keep_the_buckets_in_step():
    """With windows of shards all buckets go through them at about the same time."""
    turns = Turns((4000, 2000), 10, 20, 0)
    for part in range(20):
        owns = [turns[batch] for batch in range(30 * part, 30 * part + 30)]
        assert Counter(bucket for bucket, _ in owns) == {0: 20, 1: 10}
        assert {own // 20 if bucket == 0 else own // 10 for bucket, own in owns} == {part}


# Randomness


def test_randomness_is_independent_between_streams_and_pinned():
    draws = {(seed, position, name): randomness(seed, position, name).random()
             for seed in range(3) for position in range(3) for name in ("visit", "noise")}  # fmt: skip
    assert len(set(draws.values())) == len(draws)
    # A checkpoint of an older version goes on with the same stream.
    assert randomness(0, 0, "noise").random() == 0.7804192740889795
    assert [shuffled(1000)[position] for position in range(5)] == [766, 89, 466, 112, 327]


def test_noise_has_unit_variance():
    class Place:
        def __init__(self, position):
            self.position = position

    noise = normal(0, [*islice(map(Place, range(1000)), 200)], "noise", (4, 8, 8)).double()
    assert abs(noise.mean()) < 0.02
    assert abs(noise.std() - 1) < 0.02
