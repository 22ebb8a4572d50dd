"""Orders: permutations whatever their kind, keyed to seed and epoch, evenly drawn; what windows and groups promise."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2

from gesso.data import samplers
from gesso.data.samplers import BucketSampler, EpochShuffle, ShardWindowShuffle, feistel_permutation
from gesso.errors import UsageError

SEEDS = st.integers(0, 2**64 - 1)
EPOCHS = st.integers(0, 10**6)


def chi_square(observed: torch.Tensor, expected: float) -> float:
    """Probability of counts at least this uneven, were they drawn evenly."""
    return float(chi2.sf(((observed - expected) ** 2 / expected).sum().item(), observed.numel() - 1))


# ---- feistel ----


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 3000), seed=SEEDS)
def test_feistel_is_a_bijection_for_every_n(n, seed):
    assert feistel_permutation(n, seed, "x", torch.arange(n)).sort().values.equal(torch.arange(n))


@pytest.mark.parametrize("n", [samplers.MAX_STORED_PERMUTATION + 1, 14_197_122, 10**9 + 7, 2**40, 2**61 - 1])
def test_feistel_of_large_sets_stays_inside_and_never_repeats(n):
    positions = torch.cat([torch.arange(1000), n - 1 - torch.arange(1000), n // 2 + torch.arange(1000)])
    out = feistel_permutation(n, 3, "x", positions)
    assert ((out >= 0) & (out < n)).all() and len(out.unique()) == len(positions)
    # One by one it is the same, and another key is another permutation.
    assert torch.cat([feistel_permutation(n, 3, "x", part) for part in positions[::300].split(1)]).equal(out[::300])
    assert (feistel_permutation(n, 4, "x", positions) == out).sum() < 5 and (
        feistel_permutation(n, 3, "y", positions) == out
    ).sum() < 5


def test_feistel_that_walks_is_a_bijection(monkeypatch):
    """A rectangle that is far too large: most places go through it again."""
    monkeypatch.setattr(samplers.math, "isqrt", lambda n: 400)
    for n in (1, 2, 700, 1201):
        assert feistel_permutation(n, 0, "x", torch.arange(n)).sort().values.equal(torch.arange(n))


def test_feistel_keyed_values():
    """Integers alone: equal on every machine."""
    assert feistel_permutation(10**9, 0, "order of epoch 0", torch.arange(4)).tolist() == FIRST_OF_A_BILLION


N, POSITIONS = 71 * 71, (0, 1, 71, 2600)
"""a rectangle of 71 x 71: positions 0 and 1 share their row, 0 and 71 their column"""


def by_feistel(seed):
    return feistel_permutation(N, seed, "x", torch.tensor(POSITIONS))


def by_sorting(seed):
    return EpochShuffle(N, seed)(torch.tensor(POSITIONS))


def check_of_many_keys(source, draws=600):
    """Any image is as often at a position as any other; at two positions any two are."""
    place = torch.stack([source(seed) for seed in range(draws)])
    for position in range(len(POSITIONS)):
        assert chi_square(torch.bincount(place[:, position] * 60 // N, minlength=60), draws / 60) > 1e-3
        assert chi_square(torch.bincount(place[:, position] % 61, minlength=61), draws / 61) > 1e-3
    for other in range(1, len(POSITIONS)):
        both = place[:, 0] * 7 // N * 7 + place[:, other] * 7 // N
        assert chi_square(torch.bincount(both, minlength=49), draws / 49) > 1e-3
        apart = (place[:, other] - place[:, 0]) % N
        assert chi_square(torch.bincount(apart * 60 // N, minlength=60), draws / 60) > 1e-3


def check_of_one_key(stride):
    """Of 2^34 images: fixed steps of position give no fixed steps of image, and cells of both are even."""
    n = 2**34  # 2^17 x 2^17
    position = torch.arange(60_000) * stride
    out = feistel_permutation(n, 1, "x", position)
    count = len(out) - 1
    assert chi_square(torch.bincount(out[1:] * 256 // n, minlength=256), count / 256) > 1e-3
    assert chi_square(torch.bincount(out[1:] % 251, minlength=251), count / 251) > 1e-3
    assert chi_square(torch.bincount((out[1:] - out[:-1]) % n * 256 // n, minlength=256), count / 256) > 1e-3
    assert chi_square(torch.bincount(out[1:] * 16 // n * 16 + out[:-1] * 16 // n, minlength=256), count / 256) > 1e-3
    assert abs(torch.corrcoef(torch.stack([position.double(), out.double()]))[0, 1]) < 4 / math.sqrt(count)


@pytest.mark.parametrize("source", [by_feistel, by_sorting])
def test_permutations_of_many_keys_are_even(source):
    check_of_many_keys(source)


@pytest.mark.parametrize("stride", [1, 7919, 2**17])
def test_a_large_permutation_has_no_trend(stride):
    check_of_one_key(stride)


def test_too_few_rounds_would_be_noticed(monkeypatch):
    monkeypatch.setattr(samplers, "FEISTEL_ROUNDS", 2)
    with pytest.raises(AssertionError):
        check_of_many_keys(by_feistel, draws=300)
    with pytest.raises(AssertionError):
        check_of_one_key(2**17)


def test_large_permutation_is_not_stored():
    order = EpochShuffle(13_151_276, 0)
    order(torch.arange(2048))
    assert order._permutation._stored.cache_info().currsize == 0


# ---- Order ----


@settings(max_examples=30, deadline=None)
@given(n=st.integers(400, 2000), seed=SEEDS, epoch=EPOCHS)
def test_epochs_of_a_large_set_are_permutations(n, seed, epoch):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(samplers, "MAX_STORED_PERMUTATION", 100)
        large = EpochShuffle(n, seed)
        first, second = large(epoch * n + torch.arange(2 * n)).split(n)
    assert first.sort().values.equal(torch.arange(n)) and second.sort().values.equal(torch.arange(n))
    assert (first == second).sum() < 20


def test_what_is_large():
    """The same order as ever up to LARGE: by sorting."""
    small, large = EpochShuffle(1000, 0), EpochShuffle(samplers.MAX_STORED_PERMUTATION + 1, 0)
    assert not small(torch.arange(1000)).equal(feistel_permutation(1000, 0, "order of epoch 0", torch.arange(1000)))
    indices = torch.arange(50)
    assert large(indices).equal(
        feistel_permutation(samplers.MAX_STORED_PERMUTATION + 1, 0, "order of epoch 0", indices)
    )
    assert large(samplers.MAX_STORED_PERMUTATION + 1 + indices).equal(
        feistel_permutation(samplers.MAX_STORED_PERMUTATION + 1, 0, "order of epoch 1", indices)
    )


# ---- Windowed ----

COUNTS = st.lists(st.integers(0, 30), min_size=1, max_size=12).filter(any)


@settings(max_examples=50, deadline=None)
@given(counts=COUNTS, window=st.integers(1, 14), seed=SEEDS, epoch=EPOCHS)
def test_windowed_epochs_are_permutations_of_few_shards_at_a_time(counts, window, seed, epoch):
    windowed, n = ShardWindowShuffle(counts, window, seed), sum(counts)
    start = epoch * n
    out = windowed(start + torch.arange(n))
    assert windowed.n == n and out.sort().values.equal(torch.arange(n))
    shard_of = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    # Shards come in runs: `window` of them, then others, and none comes back.
    seen = list(dict.fromkeys(shard_of[out].tolist()))
    k, left = 0, {s for s, count in enumerate(counts) if count}
    while k < n:
        now = windowed.shards_for(start + k, start + k + 1)
        assert len(now) == min(window, len(counts)) or k + sum(counts[s] for s in now) == n
        size = sum(counts[s] for s in now)
        assert set(shard_of[out[k : k + size]].tolist()) == {s for s in now if counts[s]} <= left
        assert size <= windowed.max_window_size
        left -= set(now)
        k += size
    assert not left and len(seen) == sum(map(bool, counts))


@settings(max_examples=40, deadline=None)
@given(counts=COUNTS, window=st.integers(1, 14), seed=SEEDS, first=st.integers(0, 10**6), length=st.integers(1, 80))
def test_shards_are_those_of_the_samples(counts, window, seed, first, length):
    windowed = ShardWindowShuffle(counts, window, seed)
    shard_of = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    needed = list(dict.fromkeys(shard_of[windowed(first + torch.arange(length))].tolist()))
    actual = windowed.shards_for(first, first + length)
    assert set(needed) <= set(actual) and len(actual) == len(set(actual))
    # In order of need: a shard of a later window never stands before one of an earlier.
    by_sample = [windowed.shards_for(k, k + 1) for k in range(first, first + length)]
    expected = list(dict.fromkeys(itertools.chain(*by_sample)))
    assert actual == expected
    ahead = windowed.shards_for(first, first + 1 + windowed.max_window_size)
    assert set(windowed.shards_for(first, first + 1)) <= set(ahead) or len(counts) == 1
    assert windowed.shards_for(first, first) == []


def test_windowed_depends_on_the_counter_seed_and_epoch_alone():
    counts = [40, 50, 60, 70, 80]
    full = ShardWindowShuffle(counts, 2, 5)(torch.arange(900))
    backwards = ShardWindowShuffle(counts, 2, 5)
    assert torch.cat([backwards(part) for part in torch.arange(900).flip(0).split(37)]).flip(0).equal(full)
    assert (full[:300] == full[300:600]).sum() < 15
    assert (ShardWindowShuffle(counts, 2, 6)(torch.arange(300)) == full[:300]).sum() < 15
    assert ShardWindowShuffle(counts, 2, 5)(torch.tensor([299, 0, 300, 5])).tolist() == full[[299, 0, 300, 5]].tolist()


def test_windowed_is_even():
    """Any image may be first; and of two windows each shard is as often in either."""
    counts, draws = [7, 20, 13, 10], 1500
    first = torch.cat([ShardWindowShuffle(counts, 2, seed)(torch.tensor([0])) for seed in range(draws)])
    # Shards are even, images within a pair of shards are: the chance of an image of shard s.
    pairs = list(itertools.combinations(range(4), 2))
    chance = [sum(1 / (counts[a] + counts[b]) for a, b in pairs if s in (a, b)) / 6 for s in range(4)]
    expected = torch.tensor([c for s, c in enumerate(chance) for _ in range(counts[s])]) * draws
    assert abs(float(expected.sum()) - draws) < 1e-2
    observed = torch.bincount(first, minlength=50)
    assert chi2.sf(((observed - expected) ** 2 / expected).sum().item(), 49) > 1e-3


# ---- Grouped ----


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=6).filter(lambda s: max(s) >= 7),
    batch_size=st.integers(1, 7), seed=SEEDS, epoch=EPOCHS,
)  # fmt: skip
def test_batches_of_one_group(sizes, batch_size, seed, epoch):
    generator = torch.Generator().manual_seed(seed % 2**32)
    group = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    group = group[torch.randperm(len(group), generator=generator)]
    grouped = BucketSampler(group, batch_size, seed)
    assert grouped.n == sum(size // batch_size for size in sizes) * batch_size
    out = grouped(epoch * grouped.n + torch.arange(grouped.n))
    batches = group[out].view(-1, batch_size)
    assert (batches == batches[:, :1]).all()
    assert len(out.unique()) == grouped.n and out.min() >= 0 and out.max() < len(group)
    assert torch.bincount(batches[:, 0], minlength=len(sizes)).tolist() == [size // batch_size for size in sizes]
    assert grouped.unused == {g: size for g, size in enumerate(sizes) if 0 < size < batch_size}
    # Any counters, of any epochs, in any order.
    batch_positions = torch.randint(0, 5 * grouped.n, (12,), generator=generator)
    assert torch.cat([grouped(k) for k in batch_positions.split(1)]).equal(
        BucketSampler(group.numpy(), batch_size, seed)(batch_positions)
    )


def test_other_images_sit_out_each_epoch_and_batches_of_groups_mix():
    group = torch.tensor([0] * 19 + [1] * 35)
    grouped, epochs = BucketSampler(group, 10, 0), 900
    out = grouped(torch.arange(epochs * grouped.n)).view(epochs, 4, 10)
    # 19 images, 10 seen per epoch; 35 images, 30 seen.
    seen = torch.bincount(out.flatten(), minlength=54)
    for images, share in ((seen[:19], 10 / 19), (seen[19:], 30 / 35)):
        z = (images - epochs * share) / math.sqrt(epochs * share * (1 - share))
        assert z.abs().max() < 4.5
    # The one batch of group 0 is as often the first as the last.
    place = (group[out[:, :, 0]] == 0).float().argmax(dim=1)
    assert chi_square(torch.bincount(place, minlength=4), epochs / 4) > 1e-3


def test_no_group_fills_a_batch():
    with pytest.raises(UsageError, match=r"train\.batch_size=8, and the largest bucket has 5"):
        BucketSampler(torch.tensor([0, 0, 1, 1, 1, 1, 1]), 8, 0)


FIRST_OF_A_BILLION = [355154919, 79505388, 175132415, 822257610]
