"""Cond, and the padding of text (Berrada et al. Section 2.1, Appendix C, Eq. 7).

Legend: B texts, T places, D channels, n tokens of a text, m = ceil(T/n) copies.
"""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gesso import rng
from gesso.conditioning import Cond, concat_conds, pad_text
from gesso.config import SemanticConfig
from gesso.data.batching import text_tensors
from gesso.data.encoders.text import EncodedText, mean_tokens

F64 = torch.float64
PADDINGS = ("zero", "masked", "replicate", "noisy")


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def make_encoded_text(tokens: Tensor, lengths: Tensor) -> EncodedText:
    return EncodedText(tokens, lengths, mean_tokens(tokens, lengths))


@st.composite
def text_batches(draw) -> tuple[Tensor, Tensor]:
    """Return tokens (B, T, D) with random padding after each text, and their lengths, including 0."""
    T, D = draw(st.integers(1, 9)), draw(st.integers(1, 4))
    lengths = draw(st.lists(st.integers(0, T), min_size=1, max_size=5))
    return randn(len(lengths), T, D, seed=draw(st.integers(0, 99))), torch.tensor(lengths)


def pad_by_loop(text: list[list[float]], T: int, padding: str, beta: float, eps: Tensor) -> list[list[float]]:
    """Return Eq. 7 of one text in plain Python."""
    n, D = len(text), eps.shape[1]
    if n == 0:
        return [[0.0] * D for _ in range(T)]
    if padding in ("zero", "masked"):
        return [*text, *([0.0] * D for _ in range(T - n))]
    out = [list(text[i % n]) for i in range(T)]
    if padding == "noisy":
        m = math.ceil(T / n)
        for c in range(D):
            values = [token[c] for token in text]
            mean = sum(values) / n
            std = math.sqrt(sum((v - mean) ** 2 for v in values) / n)
            for i in range(T):
                out[i][c] += beta * math.sqrt(m - 1) * std * float(eps[i, c])
    return out


@settings(max_examples=150, deadline=None)
@given(texts=text_batches(), padding=st.sampled_from(PADDINGS), beta=st.floats(0, 2))
def test_pad_text_matches_equation_7(texts, padding, beta):
    tokens, lengths = texts
    B, T, D = tokens.shape
    eps = randn(B, T, D, seed=7)
    out, mask = pad_text(tokens, lengths, padding, beta, eps)
    for i, n in enumerate(lengths.tolist()):
        expected = pad_by_loop(tokens[i, :n].tolist(), T, padding, beta, eps[i])
        torch.testing.assert_close(out[i], torch.tensor(expected, dtype=F64), rtol=1e-12, atol=1e-12)
    if padding == "masked":
        places = torch.arange(T)
        assert mask.equal((places < lengths[:, None]) | (lengths[:, None] == 0))
        assert mask.any(1).all()
    else:
        assert mask is None


@settings(max_examples=60, deadline=None)
@given(texts=text_batches(), padding=st.sampled_from(PADDINGS))
def test_padding_ignores_values_after_the_text(texts, padding):
    tokens, lengths = texts
    changed = torch.where(torch.arange(tokens.shape[1])[:, None] < lengths[:, None, None], tokens, 1e3)
    for a, b in zip(*(pad_text(t, lengths, padding, 0.5, torch.ones_like(t)) for t in (tokens, changed)), strict=True):
        assert a is b is None or a.equal(b)


@pytest.mark.parametrize(
    "n, expected", [(1, "aaaaaaa"), (2, "abababa"), (3, "abcabca"), (5, "abcdeab"), (7, "abcdefg"), (0, "0000000")]
)
def test_replicate_padding_repeats_the_text(n, expected):
    letters = torch.arange(1.0, 8.0)[None, :, None]
    out, _ = pad_text(letters, torch.tensor([n]), "replicate")
    assert "".join("0abcdefg"[int(v)] for v in out[0, :, 0]) == expected


@settings(max_examples=60, deadline=None)
@given(T=st.integers(2, 40), n=st.integers(2, 40), beta=st.floats(0.01, 1))
def test_padding_noise_std_matches_equation_7(T, n, beta):
    """On the first copy too; none where a text fills all places, m = 1, nor of half as many places minus one, m > 2."""
    n = min(n, T)
    tokens = randn(1, T, 3) * torch.tensor([0.0, 1.0, 10.0], dtype=F64)
    tokens[:, :, 0] = 4.0  # a channel that is constant over the text
    length, ones = torch.tensor([n]), torch.ones(1, T, 3, dtype=F64)
    added = (pad_text(tokens, length, "noisy", beta, ones)[0] - pad_text(tokens, length, "replicate")[0])[0]
    m = -(-T // n)
    expected = beta * math.sqrt(m - 1) * tokens[0, :n].std(0, correction=0)
    torch.testing.assert_close(added, expected.expand(T, 3), rtol=1e-9, atol=1e-12)
    assert (m == 1) == (added.abs().max() == 0) == (n == T)


def test_single_token_text_gets_no_noise():
    out, _ = pad_text(randn(1, 5, 2), torch.tensor([1]), "noisy", 1.0, torch.ones(1, 5, 2, dtype=F64))
    assert out.equal(randn(1, 5, 2)[:, :1].expand(1, 5, 2))


def test_padding_noise_moments():
    """Over 4000 samples of one text, noise keyed to the sample has mean 0 and the std of Eq. 7."""
    cfg = SemanticConfig(kind="text", max_tokens=6, embed_dim=2, padding="noisy", padding_noise=0.3)
    text = torch.zeros(6, 2)
    text[:2] = torch.tensor([[1.0, -3.0], [2.0, 5.0]])
    n = 4000
    fields = text_tensors(cfg, make_encoded_text(text.expand(n, 6, 2), torch.full((n,), 2)), 0, torch.arange(n))
    copies = text[[0, 1, 0, 1, 0, 1]]
    std = 0.3 * math.sqrt(2) * torch.tensor([0.5, 4.0])
    assert ((fields["text"].mean(0) - copies).abs() < 5 * std / n**0.5).all()
    torch.testing.assert_close(fields["text"].std(0), std.expand(6, 2), rtol=0.05, atol=0)
    # independent between places and samples
    flat = ((fields["text"] - copies) / std).flatten(1)
    assert (flat.T @ flat / n - torch.eye(12)).abs().max() < 0.08
    assert abs(float((flat[1:] * flat[:-1]).mean())) < 0.02


def test_padding_noise_is_independent_of_the_batch():
    cfg = SemanticConfig(kind="text", max_tokens=8, embed_dim=4, padding="noisy", padding_noise=0.5)
    tokens, lengths = torch.randn(8, 8, 4, generator=torch.Generator().manual_seed(3)), torch.tensor([2, 3, 4, 5] * 2)
    sample = torch.tensor([5, 9, 11, 2, 7, 8, 3, 1])
    full_batch = text_tensors(cfg, make_encoded_text(tokens, lengths), 3, sample)["text"]
    for i in range(8):
        single = text_tensors(cfg, make_encoded_text(tokens[i : i + 1], lengths[i : i + 1]), 3, sample[i : i + 1])[
            "text"
        ]
        assert single[0].equal(full_batch[i])
    order = torch.tensor([3, 1, 0, 2, 7, 4, 6, 5])
    assert text_tensors(cfg, make_encoded_text(tokens[order], lengths[order]), 3, sample[order])["text"].equal(
        full_batch[order]
    )
    assert not text_tensors(cfg, make_encoded_text(tokens, lengths), 4, sample)["text"].allclose(full_batch, atol=1e-2)
    assert not text_tensors(cfg, make_encoded_text(tokens, lengths), 3, sample + 100)["text"].allclose(
        full_batch, atol=1e-2
    )
    eps = rng.normal(3, sample, "text padding", (8, 4))
    assert pad_text(tokens, lengths, "noisy", 0.5, eps)[0].equal(full_batch)


@pytest.mark.parametrize("padding", PADDINGS)
def test_empty_text_equals_withheld_text(padding):
    """T zero tokens, all attended, zero pooled text: the same three tensors under each padding."""
    cfg = SemanticConfig(kind="text", max_tokens=5, embed_dim=3, padding=padding, padding_noise=0.5)
    tokens, counter = torch.randn(2, 5, 3), torch.arange(2)
    empty = Cond(**text_tensors(cfg, make_encoded_text(tokens * 0, torch.zeros(2, dtype=torch.int64)), 0, counter))
    with_empty_text = Cond(**text_tensors(cfg, make_encoded_text(tokens, torch.tensor([2, 5])), 0, counter))
    with_empty_text = dataclasses.replace(with_empty_text, pooled=with_empty_text.pooled + 1)
    for cond in (empty, with_empty_text.without(semantic=True), empty.without(semantic=True)):
        assert cond.text_or_zero().equal(torch.zeros(2, 5, 3))
        assert cond.pooled_or_zero().equal(torch.zeros(2, 3))
        mask = cond.attention_mask()
        assert mask is None or mask.all()


def test_pooled_text_is_the_mean_of_the_real_tokens_under_each_padding():
    tokens, lengths = torch.zeros(2, 4, 3), torch.tensor([1, 3])
    tokens[0, :1], tokens[1, :3] = 2.0, torch.arange(9.0).reshape(3, 3)
    for padding in PADDINGS:
        cfg = SemanticConfig(kind="text", max_tokens=4, embed_dim=3, padding=padding)
        pooled = text_tensors(cfg, make_encoded_text(tokens, lengths), 0, torch.arange(2))["pooled"]
        assert pooled.equal(torch.tensor([[2.0, 2, 2], [3, 4, 5]]))


# Cond.


def full_cond(B: int = 3) -> Cond:
    return Cond(
        label=torch.arange(B), text=randn(B, 4, 2), text_mask=torch.arange(4) < torch.tensor([[1]] * B),
        pooled=randn(B, 2), control_high=randn(B, 1), control_low=randn(B, 2),
    )  # fmt: skip


def test_withholding_one_condition_keeps_the_other():
    cond = full_cond()
    both = cond.without(semantic=True, control=True)
    assert not both.has_semantic.any() and not both.has_control.any()
    assert cond.without(semantic=True).has_control is None and cond.without(control=True).has_semantic is None
    assert cond.without(control=True).without(semantic=True).has_control.any().logical_not()
    assert cond.has_semantic is None and Cond().without(semantic=True) == Cond()
    partial = dataclasses.replace(cond, has_semantic=torch.tensor([True, False, True]))
    assert partial.label_or_null(9).tolist() == [0, 9, 2]
    assert (
        partial.attention_mask().tolist()[1] == [True] * 4
        and partial.attention_mask().tolist()[0] == [True] + [False] * 3
    )


@given(cut=st.integers(1, 5))
def test_concat_inverts_slicing(cut):
    cond = full_cond(6)
    again = concat_conds([cond[:cut], cond[cut:].without(control=True)])
    for field in dataclasses.fields(Cond):
        value = getattr(again, field.name)
        if field.name == "has_control":
            assert value.tolist() == [True] * cut + [False] * (6 - cut)
        elif field.name == "has_semantic":
            assert value is None
        else:
            assert value.equal(getattr(cond, field.name))


def test_concat_rejects_different_fields():
    with pytest.raises(ValueError, match=r"Cond\.label is present in some"):
        concat_conds([Cond(label=torch.zeros(1)), Cond(pooled=torch.zeros(1, 2))])
