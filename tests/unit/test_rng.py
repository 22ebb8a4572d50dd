"""Random numbers keyed to a sample: known answers, independence of the batch, distributions."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gesso import rng
from gesso.data.samplers import EpochShuffle


@pytest.mark.parametrize(
    "counter, key, answer",
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_known_answers(counter, key, answer):
    """The vectors published with Philox4x32-10 (Random123's kat_vectors)."""
    words = [torch.tensor([int(w, 16)]) for w in counter.split()]
    out = rng.philox(words, tuple(int(w, 16) for w in key.split()))
    assert [f"{int(w):08x}" for w in out] == answer.split()


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**64 - 1),
    samples=st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=20),
    n=st.integers(1, 9),
)
def test_draws_are_independent_of_the_batch(seed, samples, n):
    batched = rng.normal(seed, torch.tensor(samples), "noise", (n,))
    for i, sample in enumerate(samples):
        assert rng.normal(seed, torch.tensor([sample]), "noise", (n,))[0].equal(batched[i])
    # A longer draw begins with the shorter one.
    longer = rng.uniform(seed, torch.tensor(samples), "noise", n + 3)
    assert longer[:, :n].equal(rng.uniform(seed, torch.tensor(samples), "noise", n))


def test_layout_and_threads_do_not_change_normals():
    sample = torch.arange(1001)
    full = rng.normal(3, sample, "noise", (3, 5, 7))
    halves = torch.cat([rng.normal(3, part, "noise", (3, 5, 7)) for part in sample.split(337)])
    assert full.equal(halves)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    assert rng.normal(3, sample, "noise", (3, 5, 7)).equal(full)
    torch.set_num_threads(threads)


def test_draws_depend_on_seed_sample_and_purpose():
    base = rng.random_bits(1, torch.tensor([2]), "a", 4)
    for changed in (
        rng.random_bits(2, torch.tensor([2]), "a", 4), rng.random_bits(1 + 2**40, torch.tensor([2]), "a", 4),
        rng.random_bits(1, torch.tensor([2 + 2**35]), "a", 4), rng.random_bits(1, torch.tensor([2]), "b", 4),
    ):  # fmt: skip
        assert (base == changed).sum() == 0


def test_distributions():
    u = rng.uniform(0, torch.arange(4000), "u", 50).flatten()
    assert u.min() > 0 and u.max() < 1
    # Kolmogorov distance of 200,000 uniforms: above 1.95/sqrt(n) with probability 1e-3.
    order = u.sort().values
    assert (order - torch.linspace(0, 1, len(u), dtype=torch.float64)).abs().max() < 1.95 / math.sqrt(len(u))
    z = rng.normal(0, torch.arange(4000), "z", (50,), torch.float64).flatten()
    n = len(z)
    assert abs(z.mean()) < 4 / math.sqrt(n) and abs(z.var() - 1) < 4 * math.sqrt(2 / n)
    assert abs((z**4).mean() - 3) < 4 * math.sqrt(96 / n)
    neighbours = rng.normal(0, torch.arange(4000), "z", (50,), torch.float64)
    assert abs((neighbours[1:] * neighbours[:-1]).mean()) < 4 / math.sqrt(n)
    assert abs((neighbours[:, 1:] * neighbours[:, :-1]).mean()) < 4 / math.sqrt(n)


@settings(max_examples=25, deadline=None)
@given(n=st.integers(1, 200), seed=st.integers(0, 2**63), epoch=st.integers(0, 10**6))
def test_every_epoch_is_a_permutation(n, seed, epoch):
    order = EpochShuffle(n, seed)
    assert order(epoch * n + torch.arange(n)).sort().values.equal(torch.arange(n))


def test_order_depends_only_on_the_position():
    order = EpochShuffle(17, seed=5)
    full = order(torch.arange(100))
    assert torch.cat([EpochShuffle(17, seed=5)(part) for part in torch.arange(100).split(9)]).equal(full)
    assert not full[:17].equal(full[17:34])
    assert not EpochShuffle(17, seed=6)(torch.arange(17)).equal(full[:17])


def test_order_is_the_same_on_every_machine():
    """Integer arithmetic and a stable sort give these first values of seed 0."""
    assert EpochShuffle(10, seed=0)(torch.arange(10)).tolist() == [int(c) for c in FIRST_EPOCH]


FIRST_EPOCH = "4305961728"
