"""Gradient projection and weight normalization equal EDM2's normalization in the forward pass (Algorithm 1)."""

import torch
from helpers.network_cases import edm2_and_reference
from hypothesis import given, settings
from hypothesis import strategies as st

from gesso.conditioning import Cond
from gesso.models import mp


def test_thirty_adam_steps_equal_in_forward_normalization():
    net, x, c_noise, label, reference = edm2_and_reference()
    target = torch.randn_like(x)
    sphere = mp.sphere_weights(net)
    mp.normalize_weights_(sphere)
    names = dict(net.named_parameters())
    twins = {k: p.detach().clone().requires_grad_(True) for k, p in names.items()}
    on_sphere = {id(p) for p in sphere}
    buffers = dict(net.named_buffers())
    actual = torch.optim.Adam(net.parameters(), lr=1e-2, betas=(0.9, 0.99))
    expected = torch.optim.Adam(twins.values(), lr=1e-2, betas=(0.9, 0.99))
    start = {k: p.detach().clone() for k, p in names.items()}
    for _ in range(30):
        actual.zero_grad()
        (net(x, c_noise, c_noise, Cond(label=label)) - target).square().mean().backward()
        mp.project_gradients(sphere)

        expected.zero_grad()
        with torch.no_grad():  # Algorithm 1: force the raw weights to rms 1 at the start of a training forward
            for k, twin in twins.items():
                if id(names[k]) in on_sphere:
                    rms = twin.flatten(1).square().mean(1).sqrt()
                    twin.div_(rms.reshape(-1, *[1] * (twin.ndim - 1)))
        (reference({**twins, **buffers}) - target).square().mean().backward()
        for k, p in names.items():
            torch.testing.assert_close(p.grad, twins[k].grad, rtol=0, atol=1e-10)
        actual.step()
        mp.normalize_weights_(sphere)
        expected.step()
    for k, p in names.items():
        twin = twins[k].detach()
        if id(p) in on_sphere:
            twin = mp.unit_rms(twin)
        torch.testing.assert_close(p.detach(), twin, rtol=0, atol=1e-10)
        assert (p.detach() - start[k]).abs().max() > 1e-3, k


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(0, 5), columns=st.integers(1, 40), seed=st.integers(0, 10**6))
def test_projection_and_renormalization(rows, columns, seed):
    g = torch.Generator().manual_seed(seed)
    w = torch.nn.Parameter(torch.randn(rows, columns, generator=g, dtype=torch.float64) + 0.1)
    w.grad = torch.randn(rows, columns, generator=g, dtype=torch.float64)
    before = w.grad.clone()
    mp.project_gradients([w])
    assert (w.grad * w).sum(1).abs().max().item() < 1e-9 if rows else True
    # What was taken away lies along the row.
    removed = before - w.grad
    cosine = torch.nn.functional.cosine_similarity(removed, w.detach(), dim=1).abs()
    assert ((cosine - 1).abs() < 1e-6).logical_or(removed.norm(dim=1) < 1e-9).all()
    direction = w.detach().clone()
    mp.normalize_weights_([w])
    torch.testing.assert_close(w.detach().square().mean(1), torch.ones(rows, dtype=torch.float64))
    assert (torch.nn.functional.cosine_similarity(direction, w.detach(), dim=1) > 1 - 1e-12).all()


def test_projection_skips_weights_without_gradient():
    w = torch.nn.Parameter(torch.ones(2, 3))
    mp.project_gradients([w])
    assert w.grad is None
