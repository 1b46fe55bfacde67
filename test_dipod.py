"""Tests: every formula against brute force, value and gradient. pytest -q, under 3 minutes."""

import argparse
import copy
import itertools
import math
import random
import subprocess
import sys
import time
from pathlib import Path

import gymnasium
import gymnasium.utils.env_checker
import numpy as np
import pytest
import torch
from torch import Tensor

import control_task
import dipod
import lm_task
from dipod import FlowDraws, MaskDraws

HERE = Path(__file__).parent
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


class Table:
    """A masked-diffusion model without structure: independent logits for every context. Tokens 0..V-1, V is the mask."""

    def __init__(self, width: int, vocabulary: int, scale: float = 1.0):
        self.base = vocabulary + 1
        self.logits = (scale * torch.randn(self.base**width, width, vocabulary, dtype=torch.float64)).requires_grad_()

    def __call__(self, tokens: Tensor) -> Tensor:
        powers = self.base ** torch.arange(tokens.shape[1])
        return self.logits[(tokens * powers).sum(-1)]


def gradient(y: Tensor, x: Tensor) -> Tensor:
    return torch.autograd.grad(y, x, retain_graph=True)[0]


def same_value_and_gradient(a: Tensor, b: Tensor, x: Tensor) -> None:
    weights = torch.randn(a.shape, dtype=a.dtype)
    torch.testing.assert_close(a, b)
    torch.testing.assert_close(gradient((weights * a).sum(), x), gradient((weights * b).sum(), x))


def decoding_orders(model, tokens: Tensor, maskable: Tensor, mask_id: int) -> tuple[Tensor, Tensor]:
    """log_prob and ELBO of one row, decoding order by decoding order."""
    positions = maskable.nonzero()[:, 0].tolist()
    per_order = []
    for order in itertools.permutations(positions):
        context, total = tokens.clone(), 0.0
        context[positions] = mask_id
        for i in order:
            total = total + model(context[None])[0, i].log_softmax(-1)[tokens[i]]
            context[i] = tokens[i]
        per_order.append(total)
    per_order = torch.stack(per_order)
    return per_order.logsumexp(0) - math.log(len(per_order)), per_order.mean()


# 1. Masked diffusion


def test_exact_likelihood_is_the_mean_over_decoding_orders():
    model = Table(4, 2)
    tokens = torch.tensor([[0, 1, 1, 0], [1, 1, 0, 0], [0, 0, 0, 1]])
    maskable = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 0], [1, 1, 0, 1]]).bool()  # rows of different lengths
    log_prob, elbo = dipod.exact_likelihood(model, tokens, maskable, 2, batch_size=5)
    brute = [decoding_orders(model, t, m, 2) for t, m in zip(tokens, maskable)]
    same_value_and_gradient(log_prob, torch.stack([b[0] for b in brute]), model.logits)
    same_value_and_gradient(elbo, torch.stack([b[1] for b in brute]), model.logits)
    assert (log_prob > elbo).all()


def test_exact_likelihood_sums_to_one_and_proxy_gradient_is_minus_the_gap_on_policy():
    model = Table(4, 3)
    completions = torch.tensor(list(itertools.product(range(3), repeat=3)))
    tokens = torch.cat((torch.ones(27, 1, dtype=torch.long), completions), 1)
    maskable = torch.tensor([[False, True, True, True]]).expand(27, -1)
    log_prob, elbo = dipod.exact_likelihood(model, tokens, maskable, 3)
    pi = log_prob.exp()
    torch.testing.assert_close(pi.sum(), torch.ones((), dtype=torch.float64))
    pi = pi.detach()
    on_policy_elbo, on_policy_gap = gradient(pi @ elbo, model.logits), gradient(pi @ (log_prob - elbo), model.logits)
    torch.testing.assert_close(on_policy_elbo, -on_policy_gap)
    assert on_policy_gap.norm() > 0.01


def test_sampler_has_the_exact_likelihood():
    model, generator = Table(3, 2, 1.5), torch.Generator().manual_seed(1)
    start = torch.tensor([[0, 2, 2]]).expand(40_000, -1)
    samples = dipod.sample_masked(model, start, 2, generator=generator)
    assert (samples[:, 0] == 0).all()
    for a, b in itertools.product(range(2), repeat=2):
        tokens = torch.tensor([[0, a, b]])
        p = dipod.exact_likelihood(model, tokens, tokens.new_tensor([[0, 1, 1]]).bool(), 2)[0].exp().item()
        seen = (samples == tokens).all(-1).float().mean().item()
        assert abs(seen - p) < 4 * math.sqrt(p * (1 - p) / len(samples))


def test_sampler_fills_every_mask_and_only_those():
    def model(tokens):  # the mask token, 4, is the likeliest output
        return torch.tensor([0.0, 0.0, 0.0, 1.0, 9.0]).expand(*tokens.shape, -1)

    tokens = torch.tensor([[4, 0, 4, 4], [1, 2, 3, 0], [4, 4, 4, 4]])
    filled = dipod.sample_masked(model, tokens, 4)
    assert (filled < 4).all() and (filled[1] == tokens[1]).all() and filled[0, 1] == 0
    assert (dipod.sample_masked(model, tokens, 4, temperature=0.0)[tokens == 4] == 3).all()
    assert (tokens == 4).sum() == 7  # the input is left alone


def test_masked_elbo_against_loops_and_enumeration():
    model, tokens = Table(4, 2), torch.randint(0, 2, (3, 4))
    maskable = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 0], [1, 1, 1, 1]]).bool()
    draws = dipod.draw_masks(maskable, 5)
    elbo = dipod.masked_elbo(model, tokens, draws, 2)
    brute = torch.zeros_like(elbo)
    for b, n in itertools.product(range(3), range(5)):
        hidden = draws.mask[b, n].nonzero()[:, 0]
        context = tokens[b].clone()
        context[hidden] = 2
        log_p = model(context[None])[0].log_softmax(-1)
        brute[b, n] = maskable[b].sum() / len(hidden) * sum(log_p[i, tokens[b, i]] for i in hidden)
    same_value_and_gradient(elbo, brute, model.logits)
    # all masks of each size, sizes equally likely: the estimate's expectation is the exact ELBO
    row, masks, weights, shares = tokens[:1], [], [], []
    for k in (1, 2, 3, 4):
        for chosen in itertools.combinations(range(4), k):
            masks.append([i in chosen for i in range(4)])
            weights.append(4 / k)
            shares.append(1 / 4 / math.comb(4, k))
    every = MaskDraws(torch.tensor([masks]), torch.tensor([weights]))
    expected = (dipod.masked_elbo(model, row, every, 2) * torch.tensor(shares)).sum(1)
    exact = dipod.exact_likelihood(model, row, torch.ones_like(row).bool(), 2)[1]
    torch.testing.assert_close(expected, exact)


def test_draw_masks_every_column_is_uniform():
    maskable = torch.tensor([[0, 1, 1, 1, 1, 1]]).bool().expand(20_000, -1)
    for num_draws in (1, 2, 3, 4, 8):
        mask, weight = dipod.draw_masks(maskable, num_draws, torch.Generator().manual_seed(0))
        k = mask.sum(-1)
        assert not mask[..., 0].any()
        torch.testing.assert_close(weight, 5 / k)
        for size in range(1, 6):  # sizes uniform in each column; given the size, tokens uniform
            assert ((k == size).float().mean(0) - 0.2).abs().max() < 0.015
            shares = torch.stack([mask[:, n][k[:, n] == size].float().mean(0)[1:] for n in range(num_draws)])
            assert (shares - size / 5).abs().max() < 0.04


def test_draw_masks_is_unbiased_with_15_percent_less_variance():
    embed, first, second = torch.randn(3, 16), torch.randn(96, 64) / 8, torch.randn(64, 12) / 4

    def model(tokens):  # unlike Table, contexts that share tokens are alike, as in a network
        return (torch.tanh(embed[tokens].flatten(1) @ first) @ second).view(-1, 6, 2)

    tokens = torch.tensor([[0, 1, 1, 0, 1, 0]]).expand(8000, -1)
    maskable = torch.ones_like(tokens).bool()
    with torch.no_grad():
        exact = dipod.exact_likelihood(model, tokens[:1], maskable[:1], 2)[1]
        ours = dipod.masked_elbo(model, tokens, dipod.draw_masks(maskable, 4), 2).mean(1)
        singles = [dipod.draw_masks(maskable, 1) for _ in range(4)]
        independent = MaskDraws(*(torch.cat(parts, 1) for parts in zip(*singles)))
        plain = dipod.masked_elbo(model, tokens, independent, 2).mean(1)
    for estimate in (ours, plain):
        assert abs(estimate.mean() - exact) < 4 * estimate.std() / math.sqrt(8000)
    assert ours.var() < 0.85 * plain.var()


def test_masked_bounds_against_loops():
    model, tokens = Table(4, 2), torch.randint(0, 2, (3, 4))
    maskable = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 0], [1, 1, 1, 1]]).bool()
    for power, num_draws in ((1.0, 1), (1.5, 2), (4.0, 3)):  # with one draw some tokens are not scored
        draws = dipod.draw_masks(maskable, num_draws)
        elbo, eubo = dipod.masked_bounds(model, tokens, draws, 2, power)
        same_value_and_gradient(elbo, dipod.masked_elbo(model, tokens, draws, 2), model.logits)
        brute = []
        for b in range(3):
            per_token = []
            for i in range(4):
                terms = []
                for n in range(num_draws):
                    context = torch.where(draws.mask[b, n], 2, tokens[b])
                    p = model(context[None])[0, i].softmax(-1)[tokens[b, i]]
                    terms.append(draws.mask[b, n, i] * draws.weight[b, n] * p**power)
                if any(draws.mask[b, :, i]):
                    per_token.append(torch.log(sum(terms) / num_draws) / power)
            brute.append(maskable[b].sum() * sum(per_token) / len(per_token))
        same_value_and_gradient(eubo, torch.stack(brute), model.logits)
        assert gradient(eubo.sum(), model.logits).isfinite().all()


def test_eubo_bounds_for_large_power_only():
    model = Table(3, 2, 3.0)
    sequences = torch.tensor(list(itertools.product(range(2), repeat=3)))
    masks, weights = [], []
    for k in (1, 2, 3):  # every mask, repeated so that sizes are equally likely
        for chosen in itertools.combinations(range(3), k):
            for _ in range(3 // math.comb(3, k)):
                masks.append([i in chosen for i in range(3)])
                weights.append(3 / k)
    draws = MaskDraws(torch.tensor([masks] * 8), torch.tensor([weights] * 8))
    log_prob, exact = dipod.exact_likelihood(model, sequences, torch.ones_like(sequences).bool(), 2)
    elbo, upper = dipod.masked_bounds(model, sequences, draws, 2, power=3.0)
    torch.testing.assert_close(elbo.mean(1), exact)
    assert (upper >= log_prob).all()
    assert (dipod.masked_bounds(model, sequences, draws, 2, power=1.0)[1] < log_prob).any()


# 2. Flow policy


def tiny_field(width: int = 2):
    """A smooth field with parameters, different in every row through `context`."""
    weights = (0.7 * torch.randn(4, width, width, dtype=torch.float64)).requires_grad_()
    context = torch.randn(5, width, dtype=torch.float64)

    def velocity(x, time):
        rows = context if x.dim() == 2 else context[:, None]
        return torch.tanh(x @ weights[0] + rows @ weights[1] + time * weights[3, 0]) @ weights[2]

    return velocity, weights


def test_flow_elbo_against_loops():
    velocity, weights = tiny_field()
    action = torch.randn(5, 2, dtype=torch.float64)
    draws = dipod.draw_flow(action, 3)
    for path in ("linear", "vp"):
        elbo = dipod.flow_elbo(velocity, action, draws, path)
        errors = []
        for n in range(3):
            t, noise = draws.time[:, n], draws.noise[:, n]
            if path == "linear":
                x, target = t * noise + (1 - t) * action, noise - action
            else:
                c, s = torch.cos(t * math.pi / 2), torch.sin(t * math.pi / 2)
                x, target = c * action + s * noise, c * noise - s * action
            errors.append(-((velocity(x, t) - target) ** 2).sum(-1) / 2)
        same_value_and_gradient(elbo, torch.stack(errors, 1), weights)


def test_flow_elbo_by_hand():
    draws = FlowDraws(torch.tensor([[[0.25]]]), torch.tensor([[[2.0, 0.0]]]))
    elbo = dipod.flow_elbo(lambda x, t: x + t, torch.tensor([[1.0, -1.0]]), draws)
    # x = (1.25, -.75), v = (1.5, -.5), target = (1, 1): errors .5 and -1.5
    torch.testing.assert_close(elbo, torch.tensor([[-(0.25 + 2.25) / 2]]))


def test_draw_flow_every_column_is_uniform_and_normal():
    draws = dipod.draw_flow(torch.zeros(20_000, 2), 4, torch.Generator().manual_seed(0))
    assert draws.time.shape == (20_000, 4, 1) and draws.noise.shape == (20_000, 4, 2)
    assert (draws.time.mean(0) - 0.5).abs().max() < 0.01 and (draws.time.var(0) - 1 / 12).abs().max() < 0.003
    assert draws.noise.mean(0).abs().max() < 0.03 and (draws.noise.var(0) - 1).abs().max() < 0.05
    torch.testing.assert_close(draws.noise[:, 0], -draws.noise[:, 1])  # antithetic, at the same time
    assert ((draws.time[:, 0] < 0.5) != (draws.time[:, 2] < 0.5)).all()  # stratified


def test_mirrored_draws_have_the_others_times_from_the_other_end():
    for num_draws, mirrored in ((1, 0), (2, 0), (3, 1), (4, 2), (6, 2), (8, 4)):
        draws = dipod.draw_flow(torch.zeros(20_000, 2), num_draws, torch.Generator().manual_seed(0), mirror=True)
        time, pairs = draws.time[..., 0], (num_draws + 1) // 2
        assert time.shape == (20_000, num_draws)
        assert (time.mean(0) - 0.5).abs().max() < 0.01 and (time.var(0) - 1 / 12).abs().max() < 0.003
        torch.testing.assert_close(time[:, 2 * (pairs // 2) :][:, :mirrored], 1 - time[:, :mirrored])


def test_flow_sample_euler_and_midpoint_by_hand():
    noise = torch.tensor([[1.0], [-2.0]], dtype=torch.float64)

    def field(x, t):
        return x * t

    x = noise
    for t in (1.0, 0.5):
        x = x - 0.5 * x * t
    torch.testing.assert_close(dipod.flow_sample(field, noise, 2, "euler"), x)
    x = noise
    for t in (1.0, 0.5):
        middle = x - 0.25 * x * t
        x = x - 0.5 * middle * (t - 0.25)
    torch.testing.assert_close(dipod.flow_sample(field, noise, 2, "midpoint"), x)
    exact = noise * math.exp(-0.5)
    errors = {m: (dipod.flow_sample(field, noise, 64, m) - exact).abs().max() for m in ("euler", "midpoint")}
    assert errors["midpoint"] < 1e-4 < errors["euler"]
    vp = dipod.flow_sample(lambda x, t: torch.ones_like(x), noise, 4, path="vp")
    torch.testing.assert_close(vp, noise - math.pi / 2)  # the path's own clock


@pytest.mark.parametrize("std", [1.0, 0.3, 0.1])
def test_midpoint_keeps_the_spread_that_euler_shrinks_at_equal_cost(std):
    def velocity(x, t):  # exact for actions ~ N(0, std^2): what distilling that policy on its samples converges to
        return (t - (1 - t) * std**2) / (t**2 + (1 - t) ** 2 * std**2) * x

    one = torch.ones(1, 1, dtype=torch.float64)
    euler, midpoint = dipod.flow_sample(velocity, one, 10, "euler") / std, dipod.flow_sample(velocity, one, 5) / std
    assert euler < 0.9 and abs(midpoint - 1) < 0.5 * abs(euler - 1)


@pytest.mark.parametrize("path", ["linear", "vp"])
@pytest.mark.parametrize("method", ["euler", "midpoint"])
def test_flow_log_prob_is_exact_and_its_gradient_the_score(method, path):
    velocity, weights = tiny_field()
    noise = torch.randn(5, 2, dtype=torch.float64)
    solver = {"num_steps": 3, "method": method, "path": path}
    action, log_prob, invertible = dipod.flow_log_prob(velocity, noise, **solver, return_invertible=True)
    torch.testing.assert_close(action, dipod.flow_sample(velocity, noise, **solver).detach())
    assert invertible.all()

    def brute(row):  # numerical Jacobian of the whole map from noise to action
        def sample(z):
            return dipod.flow_sample(velocity, torch.cat((noise[:row], z[None], noise[row + 1 :])), **solver)[row]

        columns = [(sample(noise[row] + e) - sample(noise[row] - e)) / 2e-5 for e in 1e-5 * torch.eye(2).double()]
        normal = -0.5 * (noise[row] ** 2).sum() - math.log(2 * math.pi)
        return normal - torch.linalg.det(torch.stack(columns, 1)).abs().log()

    torch.testing.assert_close(log_prob, torch.stack([brute(b) for b in range(5)]), rtol=1e-6, atol=1e-6)

    scores = torch.stack([gradient(log_prob[b], weights) for b in range(5)])

    def log_prob_at_fixed_action(change: Tensor):  # find the noise that leads to the same action again
        with torch.no_grad():
            weights.add_(change)
            z = noise.clone()
            for _ in range(50):
                jacobian = torch.func.jacrev(lambda y: dipod.flow_sample(velocity, y, **solver).sum(0))(z).movedim(1, 0)
                error = dipod.flow_sample(velocity, z, **solver) - action
                z = z - torch.linalg.solve(jacobian, error[..., None])[..., 0]
            result = dipod.flow_log_prob(velocity, z, **solver)[1]
            weights.sub_(change)
        return result

    for _ in range(3):
        direction = torch.randn_like(weights)
        numerical = (log_prob_at_fixed_action(1e-4 * direction) - log_prob_at_fixed_action(-1e-4 * direction)) / 2e-4
        torch.testing.assert_close((scores * direction).sum((1, 2, 3)), numerical, rtol=1e-4, atol=1e-5)


def test_flow_log_prob_closed_form_and_folded_samples():
    w = torch.tensor(0.6, dtype=torch.float64, requires_grad=True)
    noise = torch.randn(6, 1, dtype=torch.float64)
    action, log_prob = dipod.flow_log_prob(lambda x, t: w * x, noise, 4, "euler")
    std = (1 - w / 4) ** 4
    normal = torch.distributions.Normal(0, std).log_prob(action[:, 0])
    same_value_and_gradient(log_prob, normal, w)

    def folding(x, t):  # step Jacobian 1 - 3 cos(x): negative near 0
        return 3 * torch.sin(x)

    noise = torch.tensor([[0.1], [3.0]])
    _, _, invertible = dipod.flow_log_prob(folding, noise, 1, "euler", return_invertible=True)
    assert invertible.tolist() == [False, True]


def test_flow_log_prob_through_a_whitening_head():
    shift, log_std = torch.zeros(2, requires_grad=True), torch.tensor([0.3, -0.2], requires_grad=True)
    noise = torch.randn(4, 2)
    action = (shift + log_std.exp() * noise).detach()
    z = (action - shift) * (-log_std).exp()
    log_prob = dipod.flow_log_prob(lambda x, t: 0 * x, noise, 2, path="vp", action=z)[1] - log_std.sum()
    normal = torch.distributions.Normal(shift, log_std.exp()).log_prob(action).sum(-1)
    same_value_and_gradient(log_prob, normal, shift)
    same_value_and_gradient(log_prob, normal, log_std)


@pytest.mark.parametrize("path", ["linear", "vp"])
@pytest.mark.parametrize("std", [1.0, 0.5, 1.7])
def test_flow_bound_is_tight_for_a_normal(path, std):
    def velocity(x, time):  # exact for actions ~ N(0, std^2): E[dx/dt | x]
        if path == "linear":
            a, s, da, ds = 1 - time, time, -1.0, 1.0
        else:
            a, s = torch.cos(time * math.pi / 2), torch.sin(time * math.pi / 2)
            da, ds = -s, a
        return (a * da * std**2 + s * ds) / (a**2 * std**2 + s**2) * x

    action = torch.tensor([[0.3], [-1.2]], dtype=torch.float64)
    grid = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    time = grid.repeat_interleave(2)[None, :, None].expand(2, -1, -1)
    noise = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(4000)[None, :, None].expand(2, -1, -1)
    bound = dipod.flow_bound(velocity, action, FlowDraws(time, noise), path).mean(
        1
    )  # the integrand is quadratic in noise
    exact = torch.distributions.Normal(0.0, std).log_prob(action[:, 0])
    torch.testing.assert_close(bound, exact, rtol=0, atol=1e-3)
    # on policy the mean gap of another field is the weighted integral of its squared distance; +-std has the moments needed
    action = torch.tensor([[std], [-std]], dtype=torch.float64)
    exact = torch.distributions.Normal(0.0, std).log_prob(action[:, 0])
    worse = dipod.flow_bound(lambda x, t: velocity(x, t) + 0.3 * t, action, FlowDraws(time, noise), path).mean(1)
    ratio, span = ((1 - grid) / grid, 1.0) if path == "linear" else (1 / torch.tan(grid * math.pi / 2), math.pi / 2)
    assert (exact - worse).mean().item() == pytest.approx(span * (ratio * (0.3 * grid) ** 2).mean().item(), abs=2e-3)


# 3. Policy gradient on the ELBO, and DiPOD


def reference_loss(elbo, old, advantages, beta, clip, trust_region, weight):
    """dipod_loss, one ratio after the other."""
    total = total_weight = 0.0
    for b in range(len(advantages)):
        a, losses = advantages[b], []
        for new, was in zip(elbo[b].reshape(-1), old[b].reshape(-1)):
            ratio = math.e ** (new - was)
            limited = min(max(ratio, ratio.new_tensor(1 - clip)), ratio.new_tensor(1 + clip))
            ppo = min(ratio * a, limited * a)
            spo = ratio * a - abs(a) / (2 * clip) * (ratio - 1) ** 2
            kind = {"ppo": ppo, "spo": spo, "aspo": ppo if a > 0 else spo}[trust_region]
            losses.append(-kind - beta * new)
        w = 1.0 if weight is None else weight[b]
        total, total_weight = total + w * sum(losses) / len(losses), total_weight + w
    return total / total_weight


@pytest.mark.parametrize("trust_region", ["ppo", "spo", "aspo"])
@pytest.mark.parametrize("shape", [(12,), (12, 3)])
@pytest.mark.parametrize("weighted", [False, True])
def test_dipod_loss_against_a_loop(trust_region, shape, weighted):
    old = torch.randn(shape, dtype=torch.float64)
    elbo = (old + 0.4 * torch.randn(shape, dtype=torch.float64)).requires_grad_()
    advantages = torch.randn(12, dtype=torch.float64)
    weight = torch.tensor([0.0, 1, 2, 3] * 3, dtype=torch.float64) if weighted else None
    loss, info = dipod.dipod_loss(elbo, old, advantages, 0.3, 0.2, trust_region, weight)
    same_value_and_gradient(loss, reference_loss(elbo, old, advantages, 0.3, 0.2, trust_region, weight), elbo)
    assert all(v.shape == () and not v.requires_grad for v in info.values())
    torch.testing.assert_close(info["policy_loss"] - 0.3 * info["elbo"], loss.detach())
    if not weighted:
        ratio = (elbo - old).exp().detach()
        torch.testing.assert_close(info["ratio"], ratio.mean())
        torch.testing.assert_close(info["clip_fraction"], ((ratio - 1).abs() > 0.2).double().mean())


@pytest.mark.parametrize(
    ("ratio", "advantage", "ppo", "ppo_slope", "spo", "spo_slope"),
    # slope: of the surrogate by the log ratio. spo = ratio*A - |A|/.4 (ratio-1)^2
    [
        (1.5, 2.0, 2.4, 0.0, 3.0 - 5 * 0.25, 1.5 * (2 - 10 * 0.5)),
        (0.5, 2.0, 1.0, 1.0, 1.0 - 5 * 0.25, 0.5 * (2 + 10 * 0.5)),
        (1.5, -2.0, -3.0, -3.0, -3.0 - 5 * 0.25, 1.5 * (-2 - 10 * 0.5)),
        (0.5, -2.0, -1.6, 0.0, -1.0 - 5 * 0.25, 0.5 * (-2 + 10 * 0.5)),
        (1.0, 2.0, 2.0, 2.0, 2.0, 2.0),
        (1.0, -2.0, -2.0, -2.0, -2.0, -2.0),
    ],
)
def test_trust_regions_by_hand(ratio, advantage, ppo, ppo_slope, spo, spo_slope):
    expected = {"ppo": (ppo, ppo_slope), "spo": (spo, spo_slope)}
    expected["aspo"] = expected["ppo" if advantage > 0 else "spo"]
    for name, (value, slope) in expected.items():
        elbo = torch.tensor([math.log(ratio)], dtype=torch.float64, requires_grad=True)
        zero, a = torch.zeros(1, dtype=torch.float64), torch.tensor([advantage], dtype=torch.float64)
        loss, _ = dipod.dipod_loss(elbo, zero, a, beta=0.0, clip=0.2, trust_region=name)
        assert loss.item() == pytest.approx(-value)
        assert gradient(loss, elbo).item() == pytest.approx(-slope)


def test_before_the_first_update_dipod_is_an_advantage_shifted_by_beta():
    model, tokens = Table(3, 2), torch.randint(0, 2, (6, 3))
    elbo = dipod.masked_elbo(model, tokens, dipod.draw_masks(torch.ones_like(tokens).bool(), 4), 2)
    advantages = torch.randn(6, dtype=torch.float64)
    for score in (elbo, elbo.mean(1)):
        loss, info = dipod.dipod_loss(score, score.detach(), advantages, beta=0.3)
        shifted = -((advantages + 0.3) * elbo.mean(1)).mean()
        torch.testing.assert_close(gradient(loss, model.logits), gradient(shifted, model.logits))
        assert info["ratio"] == 1 and info["clip_fraction"] == 0
        plain, _ = dipod.dipod_loss(score, score.detach(), advantages, beta=0.0)
        fpo = -(advantages * (elbo.mean(1) - elbo.mean(1).detach()).exp()).mean()
        same_value_and_gradient(plain, fpo, model.logits)


def test_log_ratio_cap_is_straight_through_and_old_elbo_a_constant():
    elbo, old = torch.tensor([50.0], requires_grad=True), torch.tensor([0.0], requires_grad=True)
    loss, _ = dipod.dipod_loss(elbo, old, torch.tensor([-1.0]), beta=0.0)
    assert loss.item() == pytest.approx(math.exp(10))
    assert gradient(loss, elbo).item() == pytest.approx(math.exp(10))
    assert torch.autograd.grad(loss, old, allow_unused=True)[0] is None


def test_spg_loss_by_hand():
    elbo = torch.tensor([[-3.0, -1.0], [-4.0, -4.0], [-6.0, -4.0]], requires_grad=True)
    eubo = torch.tensor([-1.0, -2.0, -3.0], requires_grad=True)
    advantages = torch.tensor([1.0, -2.0, 0.0])
    loss, info = dipod.spg_loss(elbo, eubo, advantages, beta=0.3, mix=0.25)
    # scores -2, .25*-2 + .75*-4 = -3.5, and one that A = 0 silences; mean ELBO -11/3
    assert loss.item() == pytest.approx((2 - 2 * 3.5) / 3 + 0.3 * 11 / 3)
    torch.testing.assert_close(gradient(loss, eubo), torch.tensor([0.0, 2 * 0.25 / 3, 0.0]))
    expected = torch.tensor([[-0.5] * 2, [0.75] * 2, [0.0] * 2]) / 3 - 0.1 / 2
    torch.testing.assert_close(gradient(loss, elbo), expected)
    torch.testing.assert_close(loss, dipod.spg_loss(elbo.mean(1), eubo, advantages, beta=0.3, mix=0.25)[0])
    weight = torch.tensor([1.0, 0.0, 0.0])
    assert dipod.spg_loss(elbo, eubo, advantages, 0.3, 0.25, weight)[0].item() == pytest.approx(2 + 0.6)
    assert info["elbo"].item() == pytest.approx(-11 / 3) and info["eubo"].item() == pytest.approx(-2)


def test_group_advantages_by_hand():
    rewards = torch.tensor([[0.0, 0.0, 1.0], [0.7, 0.7, 0.7]])
    std = math.sqrt(((1 / 3) ** 2 * 2 + (2 / 3) ** 2) / 2)
    expected = torch.tensor([[-1 / 3, -1 / 3, 2 / 3], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(dipod.group_advantages(rewards, normalize=False), expected)
    torch.testing.assert_close(dipod.group_advantages(rewards), expected / (std + 1e-4))
    assert (dipod.group_advantages(rewards)[1] == 0).all()  # exactly


# 4. and 5. The drift


def test_alignment():
    a, b = torch.tensor([1.0, 0.0], requires_grad=True), torch.tensor(2.0, requires_grad=True)
    unused = torch.zeros(3, requires_grad=True)
    proxy, true = 3 * a[0] + 4 * b, (5 * a).sum()
    # gradients over (a, b): (3, 0, 4) and (5, 5, 0)
    expected = 15 / (5 * math.sqrt(50))
    assert dipod.alignment(proxy, true, [a, b, unused]).item() == pytest.approx(expected)
    assert dipod.alignment(proxy, -proxy, [a]).item() == pytest.approx(-1)
    assert dipod.alignment(proxy, (0 * a).sum(), [a, b]).isnan()


def two_token_by_hand(theta, rewards):
    """log_prob, ELBO and reward of AA, AB, BA, BB from the six logits, written out."""
    p = {}
    for name, logit in zip(("1|A", "1|M", "2|A", "2|M", "1|B", "2|B"), theta):
        p[name] = {"A": torch.sigmoid(logit), "B": torch.sigmoid(-logit)}
    pairs = []
    for x1, x2 in ("AA", "AB", "BA", "BB"):
        left = p["1|M"][x1] * p[f"2|{x1}"][x2]
        right = p["2|M"][x2] * p[f"1|{x2}"][x1]
        pairs.append((torch.log((left + right) / 2), (torch.log(left) + torch.log(right)) / 2))
    log_prob, elbo = (torch.stack(x) for x in zip(*pairs))
    return log_prob, elbo, torch.tensor(rewards, dtype=torch.float64)


def test_two_token_against_the_formulas_written_out():
    rewards, theta = (0.8, 1.0, 0.7, 1.0), torch.zeros(6, dtype=torch.float64, requires_grad=True)
    history = dipod.two_token(beta=0.1, steps=40, lr=2.0, rewards=rewards)
    assert {name: (v.shape, v.dtype) for name, v in history.items()} == dict.fromkeys(
        ("gap_AA", "gap", "alignment", "reward"), (torch.Size([41]), torch.float64)
    )
    for step in range(41):
        log_prob, elbo, r = two_token_by_hand(theta, rewards)
        pi = log_prob.exp().detach()
        a = r - (pi * r).sum()
        g_elbo, g_true = gradient((pi * a * elbo).sum(), theta), gradient((pi * a * log_prob).sum(), theta)
        values = {"gap_AA": (log_prob - elbo)[0], "gap": (pi * (log_prob - elbo)).sum(), "reward": (pi * r).sum()}
        values["alignment"] = g_elbo @ g_true / (g_elbo.norm() * g_true.norm())
        for name, value in values.items():
            torch.testing.assert_close(history[name][step], value.detach(), msg=f"{name} at {step}")
        theta = (theta + 2.0 * gradient((pi * (a + 0.1) * elbo).sum(), theta)).detach().requires_grad_()


def test_two_token_beta_keeps_the_bound_tight():
    plain, ours = dipod.two_token(0.0, steps=150, lr=1.0), dipod.two_token(0.5, steps=150, lr=1.0)
    assert plain["gap_AA"][-1] > 10 * ours["gap_AA"][-1] > 0
    assert plain["alignment"][-1] < 0.9 and ours["alignment"][-1] > 0.99
    assert ours["reward"][-1] > 0.95


# control_task.py


def control_args(out, **changes) -> argparse.Namespace:
    defaults = {"env": "Reacher-v5", "num_envs": 4, "policy": "whitened", "no_head": False, "flow_steps": 2}
    defaults |= dict.fromkeys(("draws", "epochs", "minibatch", "lr", "clip", "beta"))
    defaults |= {"solver": "midpoint", "device": "cpu", "decay": False, "decay_beta": False, "std_lr": 1.0}
    defaults |= {"mirror": False, "flow_scale": None}
    defaults |= {"steps": 1536, "rows": 2, "no_drift": False, "resume": False, "out": Path(out)}
    return argparse.Namespace(**(defaults | changes))


def test_gae_with_truncation_against_a_slow_loop():
    steps, envs, gamma, lam = 12, 3, 0.9, 0.8
    rewards, values, next_values = torch.randn(3, steps, envs)
    done = torch.rand(steps, envs) < 0.3
    terminated = done & (torch.rand(steps, envs) < 0.5)
    assert (done & ~terminated).any() and terminated.any()
    ours = control_task.gae(rewards, values, next_values, terminated, done, gamma, lam)
    for t, e in itertools.product(range(steps), range(envs)):
        total, discount = 0.0, 1.0
        for s in range(t, steps):
            bootstrap = 0.0 if terminated[s, e] else gamma * next_values[s, e]
            total += discount * (rewards[s, e] + bootstrap - values[s, e])
            discount *= gamma * lam
            if done[s, e]:
                break
        assert ours[t, e].item() == pytest.approx(float(total), abs=1e-5)


def collect(method, tmp_path, **changes):
    args = control_args(tmp_path, **changes)
    settings, envs, policy, value, optimizer = control_task.build(method, 0, args)
    statistics = control_task.Statistics(settings["obs_dim"], args.num_envs)
    obs, _ = envs.reset(seed=0)
    batch, _, _ = control_task.rollout(policy, value, envs, obs, statistics, "cpu")
    return settings, policy, value, optimizer, batch, statistics


def test_rollout_bootstraps_from_the_final_observation(tmp_path):
    args = control_args(tmp_path)  # Reacher: every episode is truncated at 50 steps, none terminates
    settings, envs, policy, value, _ = control_task.build("ppo", 0, args)
    statistics, seen = control_task.Statistics(settings["obs_dim"], 4), []
    step = envs.step

    def spy(action):
        result = step(action)
        seen.append(result)
        return result

    envs.step = spy
    obs, _ = envs.reset(seed=0)
    first = obs.copy()
    batch, _, episodes = control_task.rollout(policy, value, envs, obs, statistics, "cpu")
    done = np.stack([r[2] | r[3] for r in seen])
    assert done.sum() == 8 and len(episodes) == 8 and not np.stack([r[2] for r in seen]).any()
    fresh = control_task.Statistics(settings["obs_dim"], 4)  # as frozen during the rollout
    all_obs = np.stack([first, *(r[0] for r in seen)])
    values = value(fresh.normalize(all_obs.reshape(-1, settings["obs_dim"]), "cpu")).view(129, 4).detach()
    next_values = values[1:].clone()
    for t, e in zip(*done.nonzero()):
        final = fresh.normalize(seen[t][4]["final_obs"][e][None], "cpu")
        next_values[t, e] = value(final)[0, 0].detach()
    rewards = torch.tensor(np.stack([r[1] for r in seen]), dtype=torch.float32)
    never = torch.zeros(128, 4, dtype=torch.bool)
    expected = control_task.gae(rewards, values[:-1], next_values, never, torch.from_numpy(done))
    torch.testing.assert_close(batch["advantages"].view(128, 4), expected, rtol=1e-4, atol=1e-4)
    assert (statistics.obs.mean != fresh.obs.mean).any()  # updated afterwards


def test_whitened_flow_starts_tight_with_the_gaussian_score(tmp_path):
    _, policy, _, _, batch, _ = collect("dipod", tmp_path)
    obs, noise, action = (batch[k][:64] for k in ("obs", "noise", "action"))
    draws = dipod.draw_flow(action, 4)
    log_prob, bound, invertible = policy.nats(obs, noise, action, draws)
    normal = torch.distributions.Normal(policy.head.mean(obs), policy.head.log_std.exp()).log_prob(action).sum(-1)
    torch.testing.assert_close(log_prob, normal)
    torch.testing.assert_close(bound, normal)
    assert invertible.all()
    # the training ELBO's expectation has the Gaussian's score: a fine grid of times, antithetic noise of unit variance
    time = ((torch.arange(64) + 0.5) / 64).repeat_interleave(2)[None, :, None].expand(64, -1, -1)
    noise = torch.tensor([1.0, -1.0]).repeat(64)[None, :, None].expand(64, -1, 2)
    elbo = policy(obs, action, FlowDraws(time, noise)).mean(1)
    weights = torch.randn(64)
    for parameter in policy.head.parameters():
        ours = gradient((weights * elbo).sum(), parameter)
        torch.testing.assert_close(ours, gradient((weights * normal).sum(), parameter), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", [("linear", False), ("whitened", False), ("whitened", True)])
def test_nats_is_the_sampler_and_the_bound_lies_below(kind, tmp_path):
    policy_name, no_head = kind
    _, policy, _, _, batch, _ = collect("dipod", tmp_path, policy=policy_name, no_head=no_head, flow_steps=8)
    for p in policy.parameters():
        p.data += 0.3 * torch.randn_like(p)
    obs, noise = batch["obs"], batch["noise"]
    action = policy.act(obs, noise).detach()
    log_prob, bound, invertible = policy.nats(obs, noise, action, dipod.draw_flow(action, 256))
    share = invertible.float().mean()
    assert share > 0.9
    eps = 1e-3
    columns = [(policy.act(obs, noise + e) - policy.act(obs, noise - e)) / (2 * eps) for e in eps * torch.eye(2)]
    normal = torch.distributions.Normal(0, 1).log_prob(noise).sum(-1)
    numerical = normal - torch.linalg.det(torch.stack(columns, -1)).abs().log()
    error = (log_prob - numerical).abs()
    assert error[invertible].quantile(0.9) < 0.05
    assert (log_prob - bound)[invertible].mean() > 0


@pytest.mark.parametrize("solver", ["midpoint", "euler"])
@pytest.mark.parametrize("policy_name", ["linear", "whitened"])
def test_the_sampler_s_field_is_the_policy_s(policy_name, solver):
    policy = control_task.FlowPolicy(5, 3, policy_name, True, 4, solver)
    for p in policy.parameters():
        p.data += 0.3 * torch.randn_like(p)
    obs, noise = torch.randn(6, 5), torch.randn(6, 3)
    z = dipod.flow_sample(policy.velocity(obs), noise, **policy.solver)
    assert (z - noise).abs().max() > 0.1
    expected = policy.head.act(obs, z) if policy.head else z
    torch.testing.assert_close(policy.act(obs, noise), expected.detach())


def test_two_doors_needs_a_coin():
    gymnasium.utils.env_checker.check_env(gymnasium.make("TwoDoors-v0").unwrapped, skip_render_check=True)
    env, opened = control_task.TwoDoors(), {"coin": 0, "one side": 0}
    random_sign = np.random.default_rng(0)
    for name in opened:
        for episode in range(2000):
            env.reset(seed=episode)
            done = False
            while not done:
                side = random_sign.choice((-1, 1)) if name == "coin" else 1
                _, reward, done, truncated, _ = env.step(np.array([0.7 * side], np.float32))
                assert not truncated
            opened[name] += reward
    assert opened["coin"] / 2000 == pytest.approx(15 / 16, abs=0.02)
    assert opened["one side"] / 2000 == pytest.approx(1 / 2, abs=0.04)


def test_flat_optimizer_takes_the_steps_of_torch_s_own():
    ours = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
    plain = copy.deepcopy(ours)
    flat = control_task.make_optimizer((ours[0], ours[2]), 1e-2)
    adam = torch.optim.AdamW(plain.parameters(), 1e-2, eps=1e-5, weight_decay=0.0)
    for _ in range(3):
        x = 10 * torch.randn(8, 3)
        norm = control_task.step_optimizer(flat, ours(x).square().mean())
        adam.zero_grad()
        plain(x).square().mean().backward()
        norms = [torch.nn.utils.clip_grad_norm_(plain[i].parameters(), control_task.MAX_GRAD_NORM) for i in (0, 2)]
        torch.testing.assert_close(norm, torch.stack(norms))
        adam.step()
        for a, b in zip(ours.parameters(), plain.parameters()):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("method", ["ppo", "dipod"])
def test_std_lr_is_the_learning_rate_of_the_log_std_alone(method, tmp_path):
    moved = {}
    for std_lr in (1.0, 3.0):
        settings, policy, value, optimizer, batch, _ = collect(method, tmp_path, std_lr=std_lr)
        before = {name: p.clone() for name, p in policy.named_parameters()}
        settings |= {"epochs": 1, "minibatch": len(batch["obs"])}  # one update: Adam's first is lr * sign(gradient)
        control_task.update(policy, value, optimizer, batch, settings)
        moved[std_lr] = {name: (p - before[name]).abs().max().item() for name, p in policy.named_parameters()}
    for name, distance in moved[1.0].items():
        factor = 3.0 if name.endswith("log_std") else 1.0
        assert moved[3.0][name] == pytest.approx(factor * distance, rel=1e-3, abs=1e-9)
    assert any(name.endswith("log_std") for name in moved[1.0])


def test_ratio_is_1_before_the_first_update_and_the_loss_sees_unclipped_actions(tmp_path):
    for method in ("ppo", "dipod", "fpo++"):
        settings, policy, value, optimizer, batch, _ = collect(method, tmp_path)
        assert (batch["action"].abs() > 1).any()
        torch.testing.assert_close(policy.act(batch["obs"], batch["noise"]).detach(), batch["action"])
        settings |= {"lr": 0.0, "epochs": 1}
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        info = control_task.update(policy, value, optimizer, batch, settings)
        assert info["ratio"] == pytest.approx(1, abs=1e-5) and info["clip_fraction"] == 0


def test_dipod_fits_the_rollout_s_actions_and_dipod_fresh_does_not(tmp_path):
    gain = {}
    for method in ("dipod", "dipod-fresh"):
        settings, policy, value, optimizer, batch, _ = collect(method, tmp_path)
        batch["advantages"] = torch.zeros_like(batch["advantages"])  # nothing but the regularizer
        draws = dipod.draw_flow(batch["action"], 64)
        before = policy(batch["obs"], batch["action"], draws).mean().item()
        control_task.update(policy, value, optimizer, batch, settings | {"epochs": 40, "lr": 1e-3})
        gain[method] = policy(batch["obs"], batch["action"], draws).mean().item() - before
    assert gain["dipod"] > 0.02 and gain["dipod-fresh"] < 0.01


def test_dipod_flow_s_regularizer_leaves_the_head_alone(tmp_path):
    moved = {}
    for method in ("dipod", "dipod-flow"):
        settings, policy, value, optimizer, batch, _ = collect(method, tmp_path)
        policy.rest[-1].weight.data.normal_()  # a flow with a gap
        batch["action"] = policy.act(batch["obs"], batch["noise"])
        batch["advantages"] = torch.zeros_like(batch["advantages"])  # nothing but the regularizer
        before = {name: p.clone() for name, p in policy.named_parameters()}
        control_task.update(policy, value, optimizer, batch, settings | {"epochs": 2})
        moved[method] = {name: not torch.equal(p, before[name]) for name, p in policy.named_parameters()}
    assert all(moved["dipod"].values())
    assert all(moves != name.startswith("head.") for name, moves in moved["dipod-flow"].items())


def test_flow_only_elbo_is_the_whole_one_but_for_the_head_s_log_det(tmp_path):
    _, policy, _, _, batch, _ = collect("dipod-flow", tmp_path)
    for p in policy.parameters():
        p.data += 0.3 * torch.randn_like(p)
    obs, action = batch["obs"], batch["action"]
    draws = dipod.draw_flow(action, 4)
    whole, flow = policy(obs, action, draws), policy(obs, policy.whiten(obs, action), draws, flow_only=True)
    torch.testing.assert_close(whole, flow - policy.head.log_std.sum())


def test_without_the_flow_mirrored_draws_give_the_gaussian_s_ratio(tmp_path):
    """flow_scale=0 leaves PPO's policy, and four mirrored draws its log-likelihood but for a constant of each sample."""
    _, policy, _, _, batch, _ = collect("fpo", tmp_path, flow_scale=0.0)
    obs, action, parameters = batch["obs"], batch["action"] + 1, list(policy.head.parameters())
    for mirror in (True, False):
        draws, values, gradients = dipod.draw_flow(action, 4, None, mirror), [], []
        for shift in (0.0, 0.2):
            policy.head.log_std.data += shift
            pair = policy(obs, action, draws).mean(1), policy.head(obs, action, draws)[:, 0]
            values.append([x.detach() for x in pair])
            gradients = [torch.autograd.grad(batch["advantages"] @ x, parameters) for x in pair]
        ratio, gaussian = (after - before for before, after in zip(*values))
        assert torch.allclose(ratio, gaussian, atol=1e-4) == mirror
        assert all(torch.allclose(g, h, rtol=1e-3, atol=1e-2) for g, h in zip(*gradients)) == mirror


def test_learning_rate_decays_linearly(tmp_path):
    rates = []
    for changes in ({"steps": 2048}, {"steps": 2048, "decay": True}):
        control_task.train("ppo", 0, control_args(tmp_path, rows=4, **changes))
        rates.append(torch.load(tmp_path / "ppo_0.pt", weights_only=True)["optimizer"]["param_groups"][0]["lr"])
    assert rates[0] == 1e-3 and rates[1] == pytest.approx(1e-3 / 4)  # of 4 rollouts the first trains nothing


def test_beta_decays_linearly_if_asked(base, tmp_path, monkeypatch):
    seen = {control_task: [], lm_task: []}
    update, loss_of = control_task.update, lm_task.loss_of
    monkeypatch.setattr(control_task, "update", lambda *a: (seen[control_task].append(a[-1]["beta"]), update(*a))[1])
    monkeypatch.setattr(lm_task, "loss_of", lambda now, *a: (seen[lm_task].append(now["beta"]), loss_of(now, *a))[1])
    for decay_beta in (False, True):
        control_task.train("dipod", 0, control_args(tmp_path, steps=2048, beta=0.4, decay_beta=decay_beta))
        lm_task.train("dipod", 0, lm_args(tmp_path, base, inner=1, beta=0.4, decay_beta=decay_beta))
    assert seen[control_task] == pytest.approx([0.4] * 3 + [0.3, 0.2, 0.1])  # of 4 rollouts the first trains nothing
    assert seen[lm_task] == pytest.approx([0.4] * 4 + [0.4, 0.3, 0.2, 0.1])


def test_flags_replace_the_method_s_own_settings(tmp_path):
    flags = {"lr": 0.5, "clip": 0.6, "draws": 3, "epochs": 7, "minibatch": 32, "beta": 0.9}
    assert flags.items() <= control_task.build("dipod", 0, control_args(tmp_path, **flags))[0].items()
    assert control_task.build("fpo", 0, control_args(tmp_path, **flags))[0]["beta"] == 0  # or it were not FPO


def test_a_minibatch_of_one_sample_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        control_task.build("dipod", 0, control_args(tmp_path, minibatch=73))  # 512 = 7 * 73 + 1
    assert "--minibatch: expected not to leave one of 512 samples over, got 73" in capsys.readouterr().err


def test_fpo_and_dipod_differ_in_beta_alone():
    for task in (control_task, lm_task):
        settings = {name: task.COMMON | own for name, own in task.METHODS.items()}
        for plain, ours in (("fpo", "dipod"), ("fpo++", "dipod++"), ("spg", "spg-dipod")):
            if plain in settings:
                assert settings[plain] | {"beta": 0.3} == settings[ours] and settings[plain]["beta"] == 0


def test_no_two_methods_of_a_task_share_a_colour():
    for task in (control_task, lm_task):
        assert len({dipod.COLORS[method] for method in task.METHODS}) == len(task.METHODS)


@pytest.mark.parametrize("method", control_task.METHODS)
def test_control_same_seed_same_numbers_with_or_without_diagnostics(method, tmp_path, capsys):
    runs = []
    for changes in ({}, {}, {"no_drift": True}):
        runs.append(control_task.train(method, 3, control_args(tmp_path, **changes)))
    for rows in runs:
        for row in rows:
            row.pop("wall")
    assert len(runs[0]) == 2 and repr(runs[0]) == repr(runs[1])
    measured = ("gap", "alignment", "noise_floor", "invalid", "entropy")
    for with_drift, without in zip(runs[0], runs[2]):
        assert {k: v for k, v in with_drift.items() if k not in measured} == {
            k: v for k, v in without.items() if k not in measured
        }
    if method != "ppo":
        assert all(math.isfinite(runs[0][-1][k]) for k in measured)


def run_task(*arguments, cwd=HERE) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=cwd, capture_output=True, text=True, timeout=170, check=False
    )


def fails_with_one_line(main, arguments, said, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["task", *arguments])
    monkeypatch.chdir(HERE)
    with pytest.raises(SystemExit) as stopped:
        main()
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and said in error and "error: " in error.splitlines()[-1]


def test_control_end_to_end(tmp_path):
    out = tmp_path / "out"
    done = run_task("control_task.py", "--steps", 1024, "--num-envs", 4, "--seeds", 2, "--jobs", 2, "--out", out)
    assert done.returncode == 0, done.stderr
    metrics = dipod.read_csv([out / "metrics.csv"])
    assert {(r["method"], r["seed"]) for r in metrics} == set(itertools.product(("fpo", "dipod", "ppo"), (0, 1)))
    assert list(metrics[0]) == control_task.COLUMNS
    summary = (out / "summary.csv").read_text().splitlines()
    assert len(summary) == 7 and summary[0].startswith("method,seed,final_return,area,peak,gap,alignment")
    assert (out / "figure.png").read_bytes()[:4] == b"\x89PNG"
    assert "left 0:00" in done.stdout and "dipod" in done.stdout.splitlines()[-4]
    picture = ["--actions", out / "actions.png"]
    one, two = (run_task("control_task.py", "--eval", out / "dipod_1.pt", *more) for more in ([], picture))
    assert (out / "actions.png").exists()
    two.stdout = two.stdout.removesuffix(f"written: {out / 'actions.png'}\n")
    assert one.returncode == 0 and one.stdout == two.stdout and one.stdout.count("20 episodes") == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--env", "NoSuch-v5"], "--env NoSuch-v5"),
        (["--env", "CartPole-v1"], "--env CartPole-v1: expected one-dimensional Box actions"),
        (["--methods", "fop"], "invalid choice: 'fop'"),
        (["--eval", "missing.pt"], "missing.pt: no such checkpoint"),
        (["--eval", "README.md"], "README.md: not a readable checkpoint"),
        (["--out", "/proc/none"], "--out /proc/none: cannot write there"),
        (["--seeds", "0"], "expected a whole number >= 1, got 0"),
        (["--beta", "-1"], "expected a finite number >= 0, got -1"),
        (["--device", "cuda"], "--device cuda"),
        (["--render", "x.gif"], "--render and --actions need --eval"),
    ],
)
def test_control_bad_input_is_one_line_and_status_2(arguments, said, monkeypatch, capsys):
    if arguments == ["--device", "cuda"] and torch.cuda.is_available():
        pytest.skip("there is one")
    fails_with_one_line(control_task.main, arguments, said, monkeypatch, capsys)


def test_a_broken_mujoco_gl_is_one_clear_line(monkeypatch):
    monkeypatch.setenv("MUJOCO_GL", "bad")
    done = run_task("control_task.py", "--steps", 1)
    assert done.returncode == 2 and done.stderr.startswith("error: --env Reacher-v5: ") and done.stderr.count("\n") == 1


def test_environments_are_made_without_warnings(capfd):
    control_task.make_envs("HalfCheetah-v5", 2).close()  # newer versions of MuJoCo complain about its model
    assert capfd.readouterr() == ("", "")


# lm_task.py


def lm_args(out, base, **changes) -> argparse.Namespace:
    defaults = {
        "base": [base],
        "graded": False,
        "device": "cpu",
        "beta": None,
        "clip": None,
        "lr": None,
        "decay": False,
        "decay_beta": False,
        "digits": 3,
    }
    defaults |= {"inner": 2, "prompts": 4, "steps": 4, "rows": 2, "no_drift": False, "resume": False, "out": Path(out)}
    return argparse.Namespace(**(defaults | changes))


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A base model after a few pretraining steps."""
    out = tmp_path_factory.mktemp("base")
    return lm_task.pretrain("base", 0, argparse.Namespace(truth=0.7, device="cpu", digits=3, out=out), steps=40)


def test_tokenizer_round_trip():
    text = "13:9+3+1"
    assert lm_task.decode(lm_task.encode(text)) == text
    assert lm_task.decode([1, lm_task.MASK]) == "1_"


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("13:9+3+1", 1),
        ("00:1+2-3", 1),
        ("05:9-1-3", 1),
        ("27:9+9+9", 1),
        ("13:9+3+2", 0),  # wrong
        ("31:9+3+1", 0),
        ("13:9+3-1", 0),
        ("13:93++1", 0),  # malformed
        ("13:+9+31", 0),
        ("13:9+3+:", 0),
        ("13:9:3:1", 0),
        ("13:9+3+_", 0),  # unfinished
    ],
)
def test_reward_by_hand(text, reward):
    tokens = torch.tensor([[lm_task.MASK if c == "_" else lm_task.encode(c)[0] for c in text]])
    assert lm_task.rewards(tokens).tolist() == [reward]


def test_expressions_and_targets():
    completion, value = lm_task.expressions(3)
    texts = [lm_task.decode(row) for row in completion]
    assert len(set(texts)) == len(texts) and all(eval(t) == v for t, v in zip(texts, value.tolist()))
    start = lm_task.prompts(value, 5)
    start[:, 3:] = completion
    assert (lm_task.rewards(start) == 1).all()
    seen, unseen = lm_task.split_targets(3)
    assert sorted(seen.tolist() + unseen.tolist()) == list(range(28)) and len(unseen) == 7


def test_lm_likelihood_sums_to_one_and_matches_the_sampler(base):
    model, _ = lm_task.load_model(base, "cpu")
    tokens = torch.cat((lm_task.prompts(torch.tensor([13]), 5)[:, :6],) * 13**3)  # 13: and three masks, a shorter task
    short = lm_task.Model(6)
    short.load_state_dict(model.state_dict() | {"position": model.position[:6].detach()})
    tokens[:, 3:] = torch.cartesian_prod(*[torch.arange(13)] * 3)
    maskable = torch.zeros_like(tokens).bool()
    maskable[:, 3:] = True
    with torch.no_grad():
        log_prob, elbo = dipod.exact_likelihood(short, tokens, maskable, lm_task.MASK)
    assert log_prob.exp().sum().item() == pytest.approx(1, abs=1e-4) and (log_prob >= elbo - 1e-4).all()
    start = tokens[:1].repeat(30_000, 1).masked_fill(maskable[:1], lm_task.MASK)
    sampled = dipod.sample_masked(short, start, lm_task.MASK)
    assert (sampled != lm_task.MASK).all()  # the model has no such output
    index = (sampled[:, 3:] * torch.tensor([169, 13, 1])).sum(-1)
    seen = torch.bincount(index, minlength=13**3) / len(index)
    p = log_prob.exp()
    top = p.argsort(descending=True)[:30]
    z = (seen[top] - p[top]) / (p[top] * (1 - p[top]) / len(index)).sqrt()
    assert z.abs().max() < 4.5 and z.std() < 1.5


@pytest.mark.parametrize("method", lm_task.METHODS)
def test_lm_same_seed_same_numbers_with_or_without_diagnostics(method, base, tmp_path):
    runs = [lm_task.train(method, 1, lm_args(tmp_path, base, no_drift=off)) for off in (False, False, True)]
    for rows in runs:
        for row in rows:
            row.pop("wall")
    assert repr(runs[0]) == repr(runs[1]) and [row["step"] for row in runs[0]] == [2, 4]
    measured = lm_task.COLUMNS[5:12]
    for full, bare in zip(runs[0], runs[2]):
        assert repr({k: v for k, v in full.items() if k not in measured}) == repr(
            {k: v for k, v in bare.items() if k not in measured}
        )
        assert full["gap"] > 0 and full["elbo"] + full["gap"] == pytest.approx(full["log_prob"], abs=1e-4)


def test_lm_scores_against_the_sampler_s_exact_quantities(base):
    model, _ = lm_task.load_model(base, "cpu")
    tokens = torch.tensor([lm_task.encode("13:9+3+1"), lm_task.encode("07:3+3+1")])
    maskable = torch.zeros_like(tokens).bool()
    maskable[:, 3:] = True
    one_step = lm_task.score(model, "one_step", tokens, maskable, None)
    masked = torch.where(maskable, lm_task.MASK, tokens)
    log_p = model(masked).log_softmax(-1)
    for b, i in itertools.product(range(2), range(5)):
        assert one_step[b, i].item() == pytest.approx(log_p[b, 3 + i, tokens[b, 3 + i]].item(), abs=1e-6)
    exact = dipod.exact_likelihood(model, tokens, maskable, lm_task.MASK)
    torch.testing.assert_close(lm_task.score(model, "exact", tokens, maskable, None), exact[0])
    draws = dipod.draw_masks(maskable, 4000)
    torch.testing.assert_close(lm_task.score(model, "elbo", tokens, maskable, draws), exact[1], rtol=0, atol=0.05)


def test_lm_mixed_regularizes_groups_with_an_advantage_alone(base):
    model, _ = lm_task.load_model(base, "cpu")
    torch.manual_seed(0)
    tokens, _ = lm_task.sample_rewards(model, torch.tensor([3, 7]), 5, lm_task.SAMPLES, "cpu")
    maskable = torch.arange(8).expand(16, -1) >= 3
    draws, settings = dipod.draw_masks(maskable, 4), lm_task.COMMON | lm_task.METHODS["dipod-mixed"]
    rollout, old = (tokens, maskable, draws), dipod.masked_elbo(model, tokens, draws, lm_task.MASK).mean(1).detach()

    def gradient(loss):
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])

    advantages = torch.cat((torch.linspace(-1, 1, 8), torch.zeros(8)))
    loss, _ = lm_task.loss_of(settings, model, rollout, advantages, old, None)
    elbo = dipod.masked_elbo(model, tokens, draws, lm_task.MASK).mean(1)
    expected = gradient(-((advantages + 0.3) * elbo)[:8].sum() / 16)  # before the first update, over the first group
    torch.testing.assert_close(gradient(loss), expected, rtol=1e-3, atol=2e-5)
    loss, _ = lm_task.loss_of(settings, model, rollout, torch.zeros(16), old, None)  # nothing to learn from
    assert gradient(loss).norm() < 1e-4 * expected.norm()


def test_paired_differences(capsys):
    runs = ("a", 0, 3.0), ("a", 1, 5.0), ("b", 1, 1.0), ("b", 0, 5.0), ("c", 7, 1.0)
    dipod.print_differences([{"method": m, "seed": s, "final_x": v, "area": 2 * v, "gap": 9.0} for m, s, v in runs])
    # a - b = -2 and 4: mean 1, standard error 3, Student's t of one degree of freedom 12.7; c shares no seeds
    final = "a - b, final_x: 1, 95 % interval -37.1 to 39.1, above 0 on 1 of 2 seeds\n"
    assert capsys.readouterr().out == final + "a - b, area: 2, 95 % interval -74.2 to 78.2, above 0 on 1 of 2 seeds\n"


def test_lm_end_to_end(base, tmp_path):
    out = tmp_path / "out"
    options = ["--base", base, "--steps", 3, "--prompts", 2, "--samples", "--out", out]
    done = run_task("lm_task.py", *options, "--methods", "fpo", "dipod", "--jobs", 2)
    assert done.returncode == 0, done.stderr
    metrics = dipod.read_csv([out / "metrics.csv"])
    assert list(metrics[0]) == lm_task.COLUMNS and len(metrics) == 6
    assert done.stdout.count("right") + done.stdout.count("wrong") >= 36
    report = run_task("dipod.py", "--report", out / "metrics.csv", "--figure", tmp_path / "f.png")
    assert report.returncode == 0 and "fpo" in report.stdout and (tmp_path / "f.png").exists()
    check = run_task("lm_task.py", "--base", base, "--check")
    assert check.returncode == 0 and check.stdout.count("observed") == 13


# Stopping and going on


def test_resume_equals_an_uninterrupted_run(base, tmp_path, monkeypatch):
    for task, lr, args in (
        (
            lm_task,
            lm_task.COMMON["lr"],
            lambda out, **k: lm_args(out, base, steps=6, rows=6, decay=True, decay_beta=True, **k),
        ),
        (
            control_task,
            control_task.POLICIES["whitened"]["lr"],
            lambda out, **k: control_args(out, steps=2048, rows=4, decay=True, decay_beta=True, **k),
        ),
    ):
        for name in ("whole", "parts"):
            (tmp_path / name).mkdir(exist_ok=True)
        whole = task.train("dipod", 0, args(tmp_path / "whole"))
        report = dipod.report

        def killed(a, row, state, started, done, report=report):
            report(a, row, state, started, done)
            if len(state["rows"]) == 2:
                raise KeyboardInterrupt

        monkeypatch.setattr(dipod, "report", killed)
        with pytest.raises(KeyboardInterrupt):
            task.train("dipod", 0, args(tmp_path / "parts"))
        monkeypatch.setattr(dipod, "report", report)
        parts = task.train("dipod", 0, args(tmp_path / "parts", resume=True))
        for row in whole + parts:
            row.pop("wall")
        assert [r["step"] for r in parts] == [r["step"] for r in whole]
        assert repr(parts[:2]) == repr(whole[:2])
        rates = [
            torch.load(tmp_path / n / "dipod_0.pt")["optimizer"]["param_groups"][0]["lr"] for n in ("whole", "parts")
        ]
        assert rates[0] == pytest.approx(rates[1]) and rates[0] < lr / 3
        if task is lm_task:
            assert repr(parts) == repr(whole)  # bit for bit; the control task's environments start new episodes


def test_kill_9_at_random_moments_loses_no_reported_row_and_repeats_none(base, tmp_path):
    def run(out, *extra):
        options = ["lm_task.py", "--base", base, "--steps", 16, "--rows", 16, "--prompts", 2, "--jobs", 2, "--out", out]
        command = [sys.executable, *map(str, options), "--methods", "fpo", "dipod", *extra]
        return subprocess.Popen(command, cwd=HERE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def rows(out):
        table = dipod.read_csv([out / "metrics.csv"])
        return sorted(repr({k: v for k, v in row.items() if k != "wall"}) for row in table), table

    whole = run(tmp_path / "whole")
    assert whole.communicate() and whole.returncode == 0
    reported, moment = set(), random.Random(0)
    for kill_after in (2, 9, None):  # so many lines of this process, and a random while: between two lines
        process, new = run(tmp_path / "parts", *(["--resume"] if reported else [])), 0
        for line in process.stdout:
            words = line.split()
            if len(words) > 4 and words[1] == "seed":
                reported.add((words[0], int(words[4].split("/")[0])))
                new += 1
                if new == kill_after:
                    time.sleep(moment.uniform(0, 0.2))
                    process.kill()
        process.wait()
        here = [(r["method"], int(r["step"])) for r in rows(tmp_path / "parts")[1]]
        assert len(here) == len(set(here)) and reported <= set(here)
        assert (process.returncode == 0) == (kill_after is None)
    assert rows(tmp_path / "parts")[0] == rows(tmp_path / "whole")[0]


def test_a_nan_stops_the_run_in_one_line_and_leaves_the_last_good_checkpoint(base, tmp_path, monkeypatch):
    for task, args in (
        (lm_task, lm_args(tmp_path, base, steps=9, rows=9)),
        (control_task, control_args(tmp_path, steps=4096, rows=8)),
    ):
        report, loss = dipod.report, dipod.dipod_loss

        def poisoned(a, row, state, started, done, report=report, task=task, loss=loss):
            report(a, row, state, started, done)
            if len(state["rows"]) == 2:
                nan = lambda *x, loss=loss, **k: (loss(*x, **k)[0] * math.nan, loss(*x, **k)[1])
                monkeypatch.setattr(task, "dipod_loss", nan)

        monkeypatch.setattr(dipod, "report", poisoned)
        with pytest.raises(FloatingPointError, match="dipod seed 0 step .*: non-finite gradient"):
            task.train("dipod", 0, args)
        monkeypatch.setattr(dipod, "report", report)
        monkeypatch.setattr(task, "dipod_loss", loss)
        state = dipod.load_checkpoint(dipod.checkpoint_path(tmp_path, "dipod", 0))
        weights = state["model"] if task is lm_task else state["policy"]
        assert len(state["rows"]) == 2 and all(w.isfinite().all() for w in weights.values())


# Bad input, devices, other people's trainers


def plain_model(tokens):
    return torch.zeros(*tokens.shape, 3, device=tokens.device)


def plain_field(x, time):
    return 0.5 * x


B3 = torch.tensor([-1.0, -2.0, -3.0])
MASKS = torch.tensor([[[True, True, False], [True, False, True]]] * 2)
# function -> (its call by arguments, those arguments: a tensor, or a number with bad values, or a name)
CALLS = {
    "draw_masks": {"maskable": torch.ones(2, 3).bool(), "num_draws": (2, 0, -1)},
    "masked_elbo": {
        "model": plain_model,
        "tokens": torch.zeros(2, 3).long(),
        "draws.mask": MASKS,
        "draws.weight": 1.5 * torch.ones(2, 2),
        "mask_id": (2, -1),
    },
    "sample_masked": {
        "model": plain_model,
        "tokens": torch.tensor([[0, 3, 3], [3, 1, 3]]),
        "mask_id": (3, -1),
        "temperature": (1.0, -0.1, math.inf),
    },
    "draw_flow": {"action": torch.zeros(2, 3), "num_draws": (2, 0, -1)},
    "flow_elbo": {
        "velocity": plain_field,
        "action": torch.zeros(2, 3),
        "draws.time": 0.5 * torch.ones(2, 4, 1),
        "draws.noise": torch.ones(2, 4, 3),
        "path": "vp",
    },
    "flow_sample": {
        "velocity": plain_field,
        "noise": torch.zeros(2, 3),
        "num_steps": (2, 0, -3),
        "method": "euler",
        "path": "linear",
    },
    "dipod_loss": {
        "elbo": B3,
        "old_elbo": B3,
        "advantages": B3,
        "beta": (0.1, -0.1, math.inf),
        "clip": (0.2, 0.0, -1.0),
        "trust_region": "ppo",
        "weight": torch.ones(3),
        "max_log_ratio": (10.0, 0.0),
    },
    "spg_loss": {
        "elbo": B3,
        "eubo": B3,
        "advantages": B3,
        "beta": (0.1, -0.1),
        "mix": (0.5, -0.1, 1.1),
        "weight": torch.ones(3),
    },
    "group_advantages": {"rewards": torch.zeros(2, 4)},
    "alignment": {"proxy": torch.tensor(1.0), "true": torch.tensor(1.0), "parameters": [torch.zeros(2)]},
    "two_token": {"beta": (0.1, -1.0), "steps": (1, -1), "lr": (0.1, 0.0)},
}
CALLS["masked_bounds"] = CALLS["masked_elbo"] | {"power": (1.5, 0.5, math.inf)}
CALLS["exact_likelihood"] = {
    "model": plain_model,
    "tokens": torch.zeros(2, 3).long(),
    "maskable": torch.ones(2, 3).bool(),
    "mask_id": (2, -1),
    "batch_size": (8, 0),
}
CALLS["flow_bound"] = CALLS["flow_elbo"] | {"min_time": (0.1, -0.1, 1.1)}
CALLS["flow_log_prob"] = CALLS["flow_sample"] | {"action": torch.zeros(2, 3)}


def call(function: str, arguments: dict):
    values = {k: v[0] if isinstance(v, tuple) else v for k, v in arguments.items()}
    for kind, names in ((MaskDraws, ("mask", "weight")), (FlowDraws, ("time", "noise"))):
        if f"draws.{names[0]}" in values:
            values["draws"] = kind(*(values.pop(f"draws.{name}") for name in names))
    return getattr(dipod, function)(**values)


def wrong_values(x, alone: bool):
    """What each kind of argument must not be, with the error it earns."""
    if isinstance(x, Tensor):
        yield from ((v, ValueError) for v in (x[None], x.expand(2, *x.shape) if not x.dim() else x[0]))
        yield from ((v, TypeError) for v in (x.tolist(), None, x.long() if x.is_floating_point() else x.float()))
        if x.dim():
            yield x[:0], ValueError
        if x.dim() and not alone:
            yield torch.cat((x, x)), ValueError  # another B
            yield x[:1], ValueError  # would broadcast
        if x.dim() > 1 and not alone:
            yield x[..., :0], ValueError
        if not alone:
            yield x.to("meta"), ValueError
    elif isinstance(x, tuple):
        yield from ((v, ValueError) for v in x[1:])
        yield from ((v, TypeError) for v in ("1", None, True, torch.ones(())))
        if isinstance(x[0], float):
            yield math.nan, ValueError
        else:
            yield 1.5, TypeError
    elif isinstance(x, str):
        yield from ((v, ValueError) for v in ("pop", "", None, 3))
    elif callable(x):
        yield from ((v, TypeError) for v in (None, 3, lambda *a: [1.0]))
        yield lambda *a: x(*a)[:1], ValueError
        yield lambda *a: x(*a)[..., 0], ValueError


def wrong_calls():
    for function, arguments in CALLS.items():
        tensors = sum(isinstance(x, Tensor) for x in arguments.values())
        for name, x in arguments.items():
            if name in ("weight", "action") and tensors > 1 and function != "flow_elbo":
                cases = [c for c in wrong_values(x, False) if c[0] is not None]  # optional
            else:
                cases = list(wrong_values(x, alone=tensors == 1 or function == "alignment"))
            for i, (value, error) in enumerate(cases):
                yield pytest.param(function, name, value, error, id=f"{function}-{name}-{i}")


WRONG = list(wrong_calls())


def test_there_are_enough_wrong_calls_and_the_right_ones_pass():
    assert len(WRONG) >= 150
    for function, arguments in CALLS.items():
        if function == "alignment":
            x = torch.ones(2, requires_grad=True)
            arguments = {"proxy": x.sum(), "true": x.sum(), "parameters": [x]}
        call(function, arguments)


@pytest.mark.parametrize(("function", "name", "value", "error"), WRONG)
def test_wrong_call(function, name, value, error):
    arguments = CALLS[function] | {name: value if not isinstance(value, tuple) else value[0]}
    with pytest.raises(error) as caught:
        call(function, arguments)
    message = str(caught.value)
    family = (
        {name, *(k for k, v in arguments.items() if isinstance(v, Tensor))} if isinstance(value, Tensor) else {name}
    )
    assert any(f"{n}:" in message for n in family) and "expected" in message and "got" in message


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda: dipod.draw_masks(torch.tensor([[True], [False]]), 2), "maskable: .*empty completion"),
        (
            lambda: dipod.exact_likelihood(plain_model, torch.zeros(1, 3).long(), torch.zeros(1, 3).bool(), 2),
            "maskable: .*1 to 14",
        ),
        (
            lambda: dipod.exact_likelihood(plain_model, torch.zeros(1, 15).long(), torch.ones(1, 15).bool(), 2),
            "maskable: .*1 to 14",
        ),
        (lambda: dipod.dipod_loss(B3, B3, B3, weight=torch.zeros(3)), "weight: .*sum > 0"),
        (lambda: dipod.dipod_loss(B3, B3, B3, weight=-torch.ones(3)), "weight: .*>= 0"),
        (lambda: dipod.dipod_loss(B3, B3[:, None], B3), "old_elbo: .*shape"),
        (lambda: dipod.dipod_loss(B3[:, None].expand(3, 2), B3[:, None], B3), "old_elbo: .*N = 2"),
        (lambda: dipod.group_advantages(torch.zeros(2, 1)), "rewards: .*G >= 2"),
        (
            lambda: dipod.masked_elbo(plain_model, 5 * torch.ones(2, 3).long(), MaskDraws(MASKS, torch.ones(2, 2)), 2),
            "tokens: .*0..V-1",
        ),
        (lambda: dipod.masked_elbo(plain_model, torch.zeros(2, 3).long(), MASKS, 2), "draws: expected MaskDraws"),
        (lambda: dipod.flow_elbo(plain_field, torch.zeros(2, 3), None), "draws: expected FlowDraws"),
        (lambda: dipod.alignment(B3.sum(), B3.sum(), []), "parameters: .*at least one"),
        (lambda: dipod.two_token(rewards=(1.0, 2.0)), "rewards: .*four"),
    ],
)
def test_wrong_call_by_value(wrong, said):
    with pytest.raises((ValueError, TypeError), match=said):
        wrong()


def test_meta_device_everywhere():
    """Nothing is made on the wrong device: the meta device would refuse to mix with it."""
    for function, arguments in CALLS.items():
        if function in ("two_token", "alignment"):
            continue
        moved = {k: v.to("meta") if isinstance(v, Tensor) else v for k, v in arguments.items()}
        result = call(function, moved)
        expected = call(function, arguments)
        for a, b in zip(*(r if isinstance(r, tuple) else (r,) for r in (result, expected))):
            if isinstance(a, Tensor):
                assert a.is_meta and a.shape == b.shape and a.dtype == b.dtype
    x = torch.ones(2, requires_grad=True, device="meta")
    assert dipod.alignment(x.sum(), (x * x).sum(), [x]).is_meta


def test_random_shapes_give_the_documented_shapes():
    generator = torch.Generator().manual_seed(0)
    for _ in range(30):
        b, t, n, a = (int(torch.randint(1, 6, (), generator=generator)) for _ in range(4))
        maskable = torch.rand(b, t, generator=generator) < 0.5
        maskable[:, 0] = True
        tokens, draws = torch.zeros(b, t).long(), dipod.draw_masks(maskable, n, generator)
        assert draws.mask.shape == (b, n, t) and draws.weight.shape == (b, n)
        assert dipod.masked_elbo(plain_model, tokens, draws, 3).shape == (b, n)
        assert [x.shape for x in dipod.masked_bounds(plain_model, tokens, draws, 3)] == [(b, n), (b,)]
        assert [x.shape for x in dipod.exact_likelihood(plain_model, tokens, maskable, 3)] == [(b,), (b,)]
        assert dipod.sample_masked(plain_model, tokens.masked_fill(maskable, 3), 3).shape == (b, t)
        action = torch.zeros(b, a)
        flow = dipod.draw_flow(action, n, generator)
        assert flow.time.shape == (b, n, 1) and flow.noise.shape == (b, n, a)
        for path in ("linear", "vp"):
            assert dipod.flow_elbo(plain_field, action, flow, path).shape == (b, n)
            assert dipod.flow_bound(plain_field, action, flow, path, 0.01).shape == (b, n)
            assert [x.shape for x in dipod.flow_log_prob(plain_field, action, 2, path=path)] == [(b, a), (b,)]
        for elbo in (torch.zeros(b), torch.zeros(b, n)):
            loss, info = dipod.dipod_loss(elbo, elbo, torch.ones(b))
            assert loss.shape == () and all(v.shape == () for v in info.values())


def test_half_precision_models_give_float32_elbos():
    tokens, net = torch.zeros(2, 3).long(), torch.nn.Sequential(torch.nn.Embedding(3, 8), torch.nn.Linear(8, 2))
    draws, field = dipod.draw_masks(torch.ones(2, 3).bool(), 2), torch.nn.Linear(3, 3)
    action, flow = torch.zeros(2, 3), dipod.draw_flow(torch.zeros(2, 3), 2)
    full = dipod.masked_elbo(net, tokens, draws, 2), dipod.flow_elbo(lambda x, t: field(x), action, flow)
    with torch.autocast("cpu", torch.bfloat16):
        assert net(tokens).dtype == torch.bfloat16
        half = dipod.masked_elbo(net, tokens, draws, 2), dipod.flow_elbo(lambda x, t: field(x), action, flow)
        assert dipod.sample_masked(net, tokens + 2, 2).max() < 2
    for a, b in zip(full, half):
        assert b.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=0.02, atol=0.05)


def test_compiled_without_graph_breaks():
    table, tokens = torch.randn(3, 2), torch.zeros(2, 3).long()
    draws, action = dipod.draw_masks(torch.ones(2, 3).bool(), 2), torch.randn(2, 3)
    flow, old, a = dipod.draw_flow(action, 2), torch.randn(2, 2), torch.randn(2)
    functions = [
        lambda: dipod.masked_elbo(lambda t: table[t], tokens, draws, 2),
        lambda: dipod.masked_bounds(lambda t: table[t], tokens, draws, 2, 1.5)[1],
        lambda: dipod.flow_elbo(plain_field, action, flow, "vp"),
        lambda: dipod.dipod_loss(old + 0.1, old, a, trust_region="aspo", weight=a.abs())[0],
        lambda: dipod.spg_loss(old, old.mean(1), a)[0],
    ]
    for f in functions:
        torch.testing.assert_close(torch.compile(f, fullgraph=True, backend="aot_eager")(), f())


def test_left_padding_and_completions_of_different_lengths():
    """A Hugging Face style batch: padded prompts on the left, completions masked after their EOS, logits in an output."""
    model = Table(5, 2)
    tokens = torch.tensor([[0, 0, 1, 1, 0], [1, 0, 1, 0, 0]])
    maskable = torch.tensor([[0, 0, 1, 1, 1], [0, 0, 1, 0, 0]]).bool()  # lengths 3 and 1
    draws, length = dipod.draw_masks(maskable, 4), maskable.sum(1).double()
    elbo = dipod.masked_elbo(model, tokens, draws, 2)
    for b in range(2):  # a row's ELBO does not depend on its neighbours
        alone = dipod.masked_elbo(model, tokens[b : b + 1], MaskDraws(*(d[b : b + 1] for d in draws)), 2)
        torch.testing.assert_close(alone[0], elbo[b])
    advantages = torch.tensor([1.0, -1.0]).double()
    info = dipod.dipod_loss(elbo.mean(1), elbo.mean(1).detach(), advantages, weight=length)[1]
    assert info["policy_loss"].item() == pytest.approx(-(3 - 1) / 4)
    assert info["elbo"].item() == pytest.approx(((length * elbo.mean(1)).sum() / 4).item())


def test_gradient_accumulation_equals_the_full_batch():
    x = torch.randn(8, 3, requires_grad=True)
    old, a = torch.randn(8, 3), torch.randn(8)
    whole = gradient(dipod.dipod_loss(x, old, a)[0], x)
    parts = sum(gradient(dipod.dipod_loss(x[i], old[i], a[i])[0], x) / 4 for i in torch.arange(8).split(2))
    torch.testing.assert_close(whole, parts)


def test_frozen_parameters_get_no_gradient():
    frozen, adapter = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
    frozen.requires_grad_(False)
    action = torch.randn(4, 3)
    draws = dipod.draw_flow(action, 4)
    elbo = dipod.flow_elbo(lambda x, t: frozen(x) + adapter(x), action, draws)
    dipod.dipod_loss(elbo, elbo.detach(), torch.randn(4))[0].backward()
    assert frozen.weight.grad is None and adapter.weight.grad.norm() > 0 and action.grad is None


ONE_STEP = """
import argparse, sys, torch
import control_task, dipod, lm_task

def control_step(rank, size):
    args = argparse.Namespace(env="Reacher-v5", policy="whitened", no_head=False, flow_steps=2, solver="midpoint", num_envs=4)
    vars(args).update(draws=2, epochs=None, minibatch=None, std_lr=1.0, lr=None, decay=False, decay_beta=False, clip=None, beta=None, device="cpu")
    vars(args).update(mirror=False, flow_scale=None)
    control_task.POLICIES["whitened"]["minibatch"] = 64
    settings, envs, policy, value, optimizer = control_task.build("dipod", 0, args)
    torch.manual_seed(1)
    batch = {"obs": torch.randn(64, settings["obs_dim"]), "action": torch.randn(64, settings["action_dim"])}
    batch |= {"advantages": torch.randn(64), "returns": torch.randn(64)}
    draws = dipod.draw_flow(batch["action"], 2)
    mine = slice(64 // size * rank, 64 // size * (rank + 1))
    control_task.draw_flow = lambda *_, **__: dipod.FlowDraws(*(d[mine] for d in draws))
    settings["epochs"] = 3
    nets = dipod.parallel(policy), dipod.parallel(value)
    control_task.update(*nets, optimizer, {k: v[mine] for k, v in batch.items()}, settings)
    statistics = control_task.Statistics(settings["obs_dim"], 1)
    statistics.obs.update_from_moments(*control_task.moments(batch["obs"][mine].numpy()))
    moments = [torch.as_tensor(statistics.obs.mean), torch.as_tensor(statistics.obs.var)]
    return [*policy.parameters(), *value.parameters(), *moments]

def lm_step(rank, size):
    torch.manual_seed(0)
    model = lm_task.Model(8).double()
    net, optimizer = dipod.parallel(model), torch.optim.AdamW(model.parameters(), 1e-3)
    tokens, advantages = torch.randint(0, 13, (8, 8)), torch.randn(8).double()
    maskable = torch.zeros_like(tokens, dtype=torch.bool)
    maskable[:, 3:] = True
    draws = dipod.draw_masks(maskable, 4)
    mine = slice(8 // size * rank, 8 // size * (rank + 1))
    draws = dipod.MaskDraws(*(d[mine] for d in draws))
    with torch.no_grad():
        old = dipod.masked_elbo(model, tokens[mine], draws, 13).mean(1)
    for _ in range(3):
        elbo = dipod.masked_elbo(net, tokens[mine], draws, 13).mean(1)
        loss, _ = dipod.dipod_loss(elbo, old, advantages[mine], 0.3)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return list(model.parameters())

rank, size = dipod.world()
dipod.join_world(torch.device("cpu"))
torch.set_num_threads(1)
result = [x.detach().double() for x in control_step(rank, size) + lm_step(rank, size)]
if rank == 0:
    torch.save(result, sys.argv[1])
if size > 1:
    dipod.leave_world()
"""


def test_two_processes_with_half_the_batch_take_the_step_of_one(tmp_path):
    script = tmp_path / "one_step.py"
    script.write_text(f"import sys\nsys.path.insert(0, {str(HERE)!r})\n{ONE_STEP}")
    one = run_task(script, tmp_path / "one.pt")
    assert one.returncode == 0, one.stderr
    two = run_task("-m", "torch.distributed.run", "--nproc-per-node", 2, script, tmp_path / "two.pt")
    assert two.returncode == 0, two.stderr
    for a, b in zip(torch.load(tmp_path / "one.pt"), torch.load(tmp_path / "two.pt")):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_torchrun_trains_and_rank_0_alone_writes(base, tmp_path):
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", 2]
    options = ["--methods", "dipod", "--rows", 2, "--out", tmp_path]
    done = run_task(*launcher, "lm_task.py", "--base", base, "--steps", 2, "--prompts", 2, *options)
    assert done.returncode == 0, done.stderr
    assert len(dipod.read_csv([tmp_path / "metrics.csv"])) == 2 and done.stdout.count("written to") == 1
    more = ["--base", base, "--steps", 4, "--prompts", 2, "--methods", "dipod", "--rows", 4]
    resumed = run_task(*launcher, "lm_task.py", *more, "--resume", "--out", tmp_path)
    whole = run_task(*launcher, "lm_task.py", *more, "--out", tmp_path / "whole")
    assert resumed.returncode == whole.returncode == 0, resumed.stderr + whole.stderr
    parts, uninterrupted = (dipod.read_csv([out / "metrics.csv"]) for out in (tmp_path, tmp_path / "whole"))
    assert repr([row | {"wall": 0} for row in parts]) == repr([row | {"wall": 0} for row in uninterrupted])
    assert len(parts) == 4
    done = run_task(*launcher, "control_task.py", "--num-envs", 4, "--steps", 1536, *options)
    assert done.returncode == 0, done.stderr
    rows = dipod.read_csv([tmp_path / "metrics.csv"])
    assert [row["step"] for row in rows] == [1024, 1536] and all(math.isfinite(row["gap"]) for row in rows)


def test_another_number_of_processes_is_refused(tmp_path, monkeypatch, capsys):
    dipod.save_checkpoint(tmp_path / "fpo_0.pt", {"rows": [], "rng": [[torch.get_rng_state()]] * 2})
    with pytest.raises(SystemExit):
        dipod.restore(tmp_path / "fpo_0.pt", {"minibatch": 256}, {}, torch.Generator(), "cpu")
    assert "--resume: expected 2 processes, as the checkpoint had, got 1" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit):
        dipod.share_of("--num-envs", 3)
    assert "--num-envs 3: expected a multiple of 2 processes" in capsys.readouterr().err


def test_a_stopped_run_says_so_in_one_line(capsys):
    def diverged():
        raise FloatingPointError("fpo seed 0 step 9: non-finite gradient; stopped")

    assert dipod.stopped(diverged) and not dipod.stopped(lambda: None)
    assert capsys.readouterr().err == "error: fpo seed 0 step 9: non-finite gradient; stopped\n"


def test_ratio_per_draw_over_several_epochs_of_stored_draws():
    """An rsl_rl style runner: draws and old ELBO stored once, indexed by minibatch in every epoch."""
    net, action, advantages = torch.nn.Linear(2, 2), torch.randn(12, 2), torch.randn(12)
    draws = dipod.draw_flow(action, 4)
    with torch.no_grad():
        old = dipod.flow_elbo(lambda x, t: net(x), action, draws)
    optimizer = torch.optim.SGD(net.parameters(), 0.05)
    for epoch in range(3):
        for i in torch.arange(12).split(6):
            elbo = dipod.flow_elbo(lambda x, t: net(x), action[i], FlowDraws(draws.time[i], draws.noise[i]))
            if epoch == 0 and i[0] == 0:
                torch.testing.assert_close(elbo.detach(), old[i])
            loss, info = dipod.dipod_loss(elbo, old[i], advantages[i], 0.1, trust_region="aspo")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert info["ratio"] != 1 and torch.isfinite(loss)


def test_a_model_output_object_is_named_and_its_logits_work():
    class Output:
        logits = torch.zeros(4, 3, 2)

    tokens, draws = torch.zeros(2, 3).long(), MaskDraws(MASKS, torch.ones(2, 2))
    with pytest.raises(TypeError, match=r"model: expected .* got Output \(pass its .logits\?\)"):
        dipod.masked_elbo(lambda t: Output(), tokens, draws, 2)
    assert dipod.masked_elbo(lambda t: Output().logits, tokens, draws, 2).shape == (2, 2)


def test_random_wrong_shapes_never_give_a_result_of_another_shape():
    generator = torch.Generator().manual_seed(0)

    def shape():
        return torch.randint(0, 4, (int(torch.randint(0, 4, (), generator=generator)),), generator=generator).tolist()

    calls = [
        (lambda a, b, c, d, e: dipod.dipod_loss(a, b, c)[0], lambda a, e: ()),
        (lambda a, b, c, d, e: dipod.spg_loss(a, b, c)[0], lambda a, e: ()),
        (lambda a, b, c, d, e: dipod.flow_elbo(plain_field, a, FlowDraws(d, e)), lambda a, e: e.shape[:2]),
        (lambda a, b, c, d, e: dipod.group_advantages(a), lambda a, e: a.shape),
    ]
    passed = 0
    for _ in range(3000):
        tensors = [torch.rand(shape(), generator=generator) for _ in range(5)]
        for f, expected in calls:
            try:
                assert f(*tensors).shape == expected(tensors[0], tensors[4])
                passed += 1
            except ValueError:
                continue
    assert passed > 50


def test_a_truncated_checkpoint_is_one_clear_line(base, tmp_path, capsys):
    (tmp_path / "cut.pt").write_bytes(base.read_bytes()[:5000])
    with pytest.raises(SystemExit):
        dipod.load_checkpoint(tmp_path / "cut.pt")
    assert "cut.pt: not a readable checkpoint" in capsys.readouterr().err


def test_the_other_task_s_checkpoint_is_one_clear_line(base, tmp_path, capsys):
    control_task.train("ppo", 0, control_args(tmp_path, steps=1024))
    lm_task.train("fpo", 0, lm_args(tmp_path, base, steps=1))
    for load, own, other in (
        (control_task.load_policy, tmp_path / "ppo_0.pt", tmp_path / "fpo_0.pt"),
        (lambda path: lm_task.load_model(path, "cpu"), tmp_path / "fpo_0.pt", tmp_path / "ppo_0.pt"),
    ):
        load(own)
        with pytest.raises(SystemExit):
            load(other)
        assert f"{other}: not a checkpoint of" in capsys.readouterr().err


def test_resume_with_other_settings_is_refused(base, tmp_path, capsys):
    for task, args in ((lm_task, lm_args(tmp_path, base, steps=1)), (control_task, control_args(tmp_path, steps=1024))):
        task.train("dipod", 0, args)
        args.lr, args.decay, args.resume = 0.5, True, True
        with pytest.raises(SystemExit):
            task.train("dipod", 0, args)
        assert "dipod_0.pt was trained with other settings (" in (said := capsys.readouterr().err)
        assert {"lr", "decay"} == set(said[said.index("(") + 1 : said.index(")")].split(", "))
        (tmp_path / "dipod_0.pt").unlink()
