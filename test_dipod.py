"""Tests: every formula against brute force, value and gradient; commands as a user runs them."""

import itertools
import math
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import gymnasium as gym
import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

import control_task
import dipod
import lm_task
from dipod import FlowDraws, FlowPolicy, MaskDraws

ROOT = Path(__file__).parent
torch.set_num_threads(1)
PATHS = pytest.mark.parametrize("path", ["linear", "vp"])
NORMAL = torch.distributions.Normal(0.0, 1.0)


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


def leaf(*shape):
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def gradient(y, x):
    return torch.autograd.grad(y, x, retain_graph=True, materialize_grads=True)[0]


def same(a, b, *inputs):
    """Equal values, and equal gradients of one random projection of them."""
    torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    direction = torch.randn_like(a)
    for x in inputs:
        ours, expected = (gradient((direction * y).sum(), x) for y in (a, b))
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)


def loss_by_loop(elbo, old_elbo, advantages, beta, clip, trust_region, weight, distill_elbo):
    total = 0.0
    for b, a in enumerate(advantages):
        surrogates = []
        for new, old in zip(elbo[b].reshape(-1), old_elbo[b].reshape(-1)):
            ratio = math.e ** (new - old.detach())
            ppo = min(ratio * a, min(max(ratio, 1 - clip), 1 + clip) * a)
            spo = ratio * a - abs(a) / (2 * clip) * (ratio - 1) ** 2
            kinds = {"ppo": ppo, "spo": spo, "aspo": ppo if a > 0 else spo}
            surrogates.append(kinds[trust_region])
        objective = sum(surrogates) / len(surrogates) + beta * distill_elbo[b].mean()
        total = total - weight[b] * objective / weight.sum()
    return total


@pytest.mark.parametrize("trust_region", ["ppo", "spo", "aspo"])
@pytest.mark.parametrize("shape", [(12,), (12, 3)])
@pytest.mark.parametrize("weight", [None, torch.arange(12.0) / 100])
def test_dipod_loss_against_a_loop(trust_region, shape, weight):
    elbo, old_elbo = 0.3 * leaf(*shape), 0.3 * leaf(*shape)
    distill_elbo = leaf(12, 3)
    arguments = (elbo, old_elbo, leaf(12), 0.3, 0.2, trust_region)
    loss, info = dipod.dipod_loss(*arguments, weight)
    w = torch.ones(12).double() if weight is None else weight.double()
    same(loss, loss_by_loop(*arguments, w, elbo), elbo, old_elbo)
    ratio = (elbo - old_elbo).exp().detach().view(12, -1)
    assert info["ratio"].item() == pytest.approx((w @ ratio.mean(1) / w.sum()).item())
    clipped = ((ratio - 1).abs() > 0.2).double()
    assert info["clip_fraction"].item() == pytest.approx((w @ clipped.mean(1) / w.sum()).item())
    same(info["policy_loss"], loss.detach() + 0.3 * info["elbo"])
    # Another ELBO for the regularizer, (B, M) or (B, N), replaces that term alone.
    loss, again = dipod.dipod_loss(*arguments, weight, distill_elbo)
    same(loss, loss_by_loop(*arguments, w, distill_elbo), elbo, distill_elbo)
    assert again == info and not any(value.requires_grad for value in info.values())


def test_spg_loss_against_a_loop():
    elbo, eubo = leaf(12, 3), leaf(12)
    advantages, weight = leaf(12), torch.arange(12.0)
    expected = 0.0
    for b, a in enumerate(advantages):
        lower = elbo[b].mean()
        score = lower if a > 0 else 0.25 * eubo[b] + 0.75 * lower
        expected = expected - weight[b] * (a * score + 0.3 * lower) / weight.sum()
    for lower in (elbo, elbo.mean(1)):
        loss, _ = dipod.spg_loss(lower, eubo, advantages, beta=0.3, mix=0.25, weight=weight)
        same(loss, expected, elbo, eubo)


def test_before_the_first_update_dipod_is_an_advantage_shifted_by_beta():
    draws, advantages = leaf(6, 4), leaf(6)
    shifted = -((advantages + 0.3) * draws.mean(1)).mean()
    for elbo, unit in ((draws, 1), (draws.mean(1), 1), (draws.mean(1) / 7, 7)):
        loss, info = dipod.dipod_loss(elbo, elbo.detach(), advantages, beta=0.3)
        torch.testing.assert_close(unit * gradient(loss, draws), gradient(shifted, draws))
        assert info["ratio"] == 1 and info["clip_fraction"] == 0


def test_the_cap_of_the_log_ratio_leaves_the_gradient():
    elbo = torch.tensor([50.0], requires_grad=True)
    loss, _ = dipod.dipod_loss(elbo, torch.zeros(1), -torch.ones(1), beta=0.0)
    same(loss, math.exp(10) * (elbo[0] - 49), elbo)


def test_losses_are_those_of_the_authors_published_code():
    # Advantage, old and new ELBO for FPO; ELBO and EUBO per token and length for SPG.
    text = """
        1.0 -18.393060684 -17.932073593 -2.235543489 -2.235543489 8
       -0.5  -3.820459127  -3.615159750 -2.428487062 -2.454542364 6
        0.3 -15.894586563 -16.329538345 -2.481782198 -2.481782198 8
       -1.2  -3.756222248  -3.587201357 -2.470957041 -2.512751943 3
        0.0 -19.982540131 -19.993322372 -2.521459341 -2.860823531 8
        0.4 -20.367469788 -21.067516327 -2.380939722 -2.380939722 8"""
    samples = torch.tensor([float(x) for x in text.split()]).double().view(6, 6)
    advantages, old_elbo, elbo, per_token, eubo, length = samples.unbind(1)
    fpo, _ = dipod.dipod_loss(elbo, old_elbo, advantages)  # by default beta = 0.05, clip = 0.2
    spg, _ = dipod.spg_loss(per_token, eubo, advantages, weight=length)  # and mix = 0.5
    assert [fpo.item(), spg.item()] == pytest.approx([0.76139118821, 0.49052418349], abs=1e-6)
    # FPO++ without a regularizer, where only log ratios matter: those of 4 draws, then A.
    text = """
       -0.076734232  0.116757475  0.136795607  0.200402324 -1.363382699 -0.100011288 -0.218998512
       -0.049982800 -0.004819553  0.623938958  0.645399365  0.337374140  0.769810335  0.612490570
       -1.048961992  0.196064577  0.476636495  0.105920653 -0.052380123  0.329320921 -0.152706804
       0.011380255 -0.014868820 -0.192097170  1.586795456 -0.126761320  0.118988855  0.949055298
       -0.013685602 -0.297627696 -0.192718097 -0.196481219 -0.209014063  0.082311957  0.551272738"""
    samples = torch.tensor([float(x) for x in text.split()]).view(7, 5)
    batch = (samples[:, :4], 0 * samples[:, :4], samples[:, 4], 0.0, 0.05)
    losses = [dipod.dipod_loss(*batch, kind)[0].item() for kind in ("ppo", "spo", "aspo")]
    assert losses == pytest.approx([0.14299066441, 1.69670488314, 1.59472412250], abs=1e-6)


def both_losses(elbo, other, advantages, weight=None, beta=0.3, clip=0.2):
    loss, _ = dipod.dipod_loss(elbo, other, advantages, beta, clip, "aspo", weight)
    spg, _ = dipod.spg_loss(elbo, other.mean(1), advantages, beta, weight=weight)
    return torch.stack((loss, spg))


def test_weight_0_removes_a_row_whatever_it_holds():
    elbo, other = leaf(3, 2), leaf(3, 2)
    advantages = leaf(3)
    row = torch.tensor([[math.nan, -math.inf]])
    padded = (torch.cat((elbo, row)), torch.cat((other, row)), torch.cat((advantages, row[0, :1])))
    losses = both_losses(*padded, torch.tensor([1.0, 1.0, 1.0, 0.0]))
    same(losses, both_losses(elbo, other, advantages), elbo)


def test_compiles_to_one_graph_while_beta_and_clip_are_scheduled():
    def train_loss(action, draws, old_elbo, advantages, weight, beta, clip):
        elbo = dipod.flow_elbo(torch.mul, action, draws, "linear")
        elbo = elbo + dipod.flow_elbo(torch.mul, action, draws, "vp")
        return both_losses(elbo, old_elbo, advantages, weight, beta, clip)

    # With the backend "eager", a number that is compiled anew at each of its values goes unseen.
    torch.compiler.reset()
    compiled = torch.compile(train_loss, fullgraph=True, backend="aot_eager")
    action = leaf(3, 2)
    batch = (action, dipod.draw_flow(action, 2), leaf(3, 2), leaf(3))
    for i in range(1, 13):
        rest = (torch.ones(3), 0.03 * i, 0.02 * i)
        same(compiled(*batch, *rest), train_loss(*batch, *rest), action)
    # Values are not read in a graph, and weights that are all 0 must not give NaN.
    same(compiled(*batch, torch.zeros(3), 0.3, 0.2), 0 * action.sum(0), action)


def test_bfloat16_networks_have_float32_elbos_and_losses():
    action, elbos = torch.randn(8, 2).bfloat16(), -3 * torch.rand(2, 8, 4).bfloat16()
    logits, tokens = torch.randn(4, 3).bfloat16(), torch.zeros(8, 3).long()
    masks, flows = dipod.draw_masks(tokens == 0, 4), dipod.draw_flow(action, 4)

    def results(dtype):  # the inputs are rounded already, and nothing else is
        draws = FlowDraws(flows.time.to(dtype), flows.noise.to(dtype))
        flow = (lambda x, time: 0 * x.view(dtype) + time.view(dtype), action.to(dtype), draws, "vp")
        elbo, _ = dipod.masked_bounds(lambda x: logits.to(dtype)[x], tokens, masks, 3)
        exact = dipod.exact_likelihood(lambda x: logits.to(dtype)[x], tokens, tokens == 0, 3)
        losses = both_losses(*elbos.to(dtype), torch.ones(8), torch.full((8,), 3e4).half())
        return [dipod.flow_elbo(*flow), dipod.flow_bound(*flow), elbo, *exact, losses]

    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(results(torch.bfloat16), results(torch.float32))  # dtypes too


def test_group_advantages_by_hand():
    rewards = torch.tensor([[0.0, 0.0, 1.0], [0.9, 0.9, 0.9]], requires_grad=True)
    centred = rewards[0] - rewards[0].sum() / 3
    std = (centred.square().sum() / 2).sqrt()
    same(dipod.group_advantages(rewards, normalize=False)[0], centred, rewards)
    same(dipod.group_advantages(rewards)[0], centred / (std + 1e-4), rewards)
    assert (dipod.group_advantages(rewards)[1] == 0).all()  # exactly


# Masked diffusion. Tokens are 0 and 1, and the mask is 2.

ALL_TRIPLES = torch.tensor(list(itertools.product((0, 1), repeat=3)))


def lookup_model(width):
    """A model without structure and its logits: free ones for every context."""
    logits = leaf(3**width, width, 2)
    return lambda tokens: 2 * logits[(tokens * 3 ** torch.arange(width)).sum(-1)], logits


def test_draw_masks_is_uniform_in_every_column_and_antithetic_in_pairs():
    maskable = torch.tensor([False, True, True, True]).expand(20_000, -1)
    mask, weight = dipod.draw_masks(maskable, 3)
    assert torch.equal(weight, 3 / mask.sum(-1))
    # A pair masks every token, and one of them twice.
    assert mask[:, :2, 1:].any(1).all() and (mask[:, :2].sum((1, 2)) == 4).all()
    for column, k in itertools.product(range(3), (1, 2, 3)):
        for masked in itertools.combinations((1, 2, 3), k):
            wanted = torch.tensor([i in masked for i in range(4)])
            share = (mask[:, column] == wanted).all(1).double().mean().item()
            assert share == pytest.approx(1 / 3 / math.comb(3, k), abs=0.012)


@pytest.mark.parametrize(("power", "num_draws"), [(1.0, 1), (4.0, 5)])
def test_masked_elbo_and_masked_bounds_against_loops(power, num_draws):
    (model, logits), tokens = lookup_model(4), torch.randint(0, 2, (4, 4)).int()
    maskable = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 1]]).bool()
    draws = dipod.draw_masks(maskable, num_draws)
    elbo, eubo = dipod.masked_bounds(model, tokens, draws, np.int64(2), power)
    same(dipod.masked_elbo(model, tokens, draws, 2), elbo, logits)
    for b, length in enumerate((3, 2, 4, 1)):
        upper = {}  # has no entry for a token that no draw masks
        for n, mask in enumerate(draws.mask[b]):
            log_p = model(tokens[b].where(~mask, 2)[None])[0].log_softmax(-1)
            masked = mask.nonzero()[:, 0].tolist()
            weight = length / len(masked)
            same(elbo[b, n], weight * sum(log_p[i, tokens[b, i]] for i in masked), logits)
            for i in masked:
                upper[i] = upper.get(i, 0.0) + weight * log_p[i, tokens[b, i]].exp() ** power
        per_token = [(total / num_draws).log() / power for total in upper.values()]
        same(eubo[b], length * sum(per_token) / len(per_token), logits)
    nothing_masked = MaskDraws(torch.zeros_like(draws.mask), draws.weight)
    for bound in dipod.masked_bounds(model, tokens, nothing_masked, 2, power):
        same(bound, 0 * bound.detach() + 0 * logits.sum(), logits)


def test_sample_masked_fills_every_mask_and_only_those():
    def model(tokens):  # the mask token, 4, is the likeliest output
        return torch.tensor([0.0, 0.0, 0.0, 1.0, 9.0]).expand(*tokens.shape, -1)

    # Left padding (0), prompts, and rows of 3, 1, 0 and 4 masks.
    start = torch.tensor([[4, 1, 4, 4], [0, 0, 2, 4], [1, 2, 3, 0], [4, 4, 4, 4]]).int()
    tokens = dipod.sample_masked(model, start, np.int64(4))
    assert (tokens < 4).all()
    assert torch.equal(tokens.where(start < 4, 4), start)
    assert torch.equal(dipod.sample_masked(model, start, 4, 0.0), start.where(start < 4, 3))


def test_exact_likelihood_against_all_decoding_orders_and_the_sampler():
    (model, logits), maskable = lookup_model(4), torch.tensor([[1, 1, 0, 1]] * 8).bool()
    tokens = torch.tensor([(a, b, 1, c) for a, b, c in ALL_TRIPLES.tolist()])
    log_prob, elbo = dipod.exact_likelihood(model, tokens, maskable, 2)
    pi = log_prob.exp().detach()
    start = tokens.masked_fill(maskable, 2)
    samples = dipod.sample_masked(model, start[:1].expand(40_000, -1), 2)
    for b in range(8):
        orders = []
        for order in itertools.permutations((0, 1, 3)):
            context, total = start[b].clone(), 0.0
            for i in order:
                total = total + model(context[None])[0, i].log_softmax(-1)[tokens[b, i]]
                context[i] = tokens[b, i]
            orders.append(total)
        same(log_prob[b], torch.stack(orders).exp().mean().log(), logits)
        same(elbo[b], torch.stack(orders).mean(), logits)
        share = (samples == tokens[b]).all(1).double().mean()
        assert (share - pi[b]).abs() < 4 * (pi[b] / 40_000).sqrt()
    # On policy the likelihood has no gradient, so that of the ELBO is minus that of the gap.
    same(gradient(pi @ elbo, logits), -gradient(pi @ (log_prob - elbo), logits))
    logits.data[71, :, 1] = -math.inf  # the first step, in context (2, 2, 1, 2), reveals no 1
    log_prob, _ = dipod.exact_likelihood(model, tokens, maskable, 2)
    assert gradient(log_prob[1], logits).isfinite().all()


def make_policy(**form):
    policy = FlowPolicy(3, 2, scale=0.5, **form).double()
    for p in policy.parameters():
        p.data += 0.3 * torch.randn_like(p) * p.requires_grad
    return policy


def test_draw_flow_is_uniform_and_normal_in_antithetic_pairs():
    time, noise = dipod.draw_flow(torch.zeros(20_000, 2), 3)
    for x, mean, variance in ((time, 1 / 2, 1 / 12), (noise, 0.0, 1.0)):
        assert x.mean(0).numpy() == pytest.approx(mean, abs=0.03)
        assert x.var(0).numpy() == pytest.approx(variance, rel=0.05)
    assert torch.equal(time[:, 0], 1 - time[:, 1]) and torch.equal(noise[:, 0], -noise[:, 1])
    assert time.shape == (20_000, 3, 1) and not torch.equal(time[:, 0], time[:, 2])


@PATHS
def test_flow_elbo_and_flow_bound_against_loops(path):
    def coefficients(time):  # x = alpha * action + sigma * noise, and the derivatives
        if path == "linear":
            return 1 - time, time, -1.0, 1.0
        tau = math.pi / 2 * time
        return torch.cos(tau), torch.sin(tau), -torch.sin(tau), torch.cos(tau)

    policy, action = make_policy(), leaf(4, 2)
    velocity, weights = policy.velocity(leaf(4, 3)), policy.flow_layer.weight
    time, noise = draws = dipod.draw_flow(action, 3)
    a = action[:, None]
    alpha, sigma, d_alpha, d_sigma = coefficients(time)
    error = velocity(alpha * a + sigma * noise, time) - d_alpha * a - d_sigma * noise
    same(dipod.flow_elbo(velocity, action, draws, path), -(error**2).mean(2), weights, action)
    pair = dipod.flow_elbo(lambda x, time: 0 * x, action, dipod.draw_flow(action, 2), path).sum()
    same(gradient(pair, action), -2 * action.detach() if path == "linear" else -action.detach())
    # VDM's form: half the slope of the signal-to-noise ratio times the squared error of the action
    # that the velocity predicts, less that of a standard normal's best prediction.
    alpha, sigma, _, d_sigma = coefficients(0.1 + 0.9 * time)
    x = alpha * a + sigma * noise
    predicted = d_sigma * x - sigma * velocity(x, 0.1 + 0.9 * time)
    best = alpha * x / (alpha**2 + sigma**2)
    length = 0.9 if path == "linear" else 0.9 * math.pi / 2
    integral = length * alpha / sigma**3 * ((predicted - a) ** 2 - (best - a) ** 2)
    bound = dipod.flow_bound(velocity, action, draws, path, min_time=0.1)
    same(bound, (NORMAL.log_prob(a) - integral).sum(2), weights, action)


def exact_log_prob(sample, noise):
    """By the Jacobian of the whole map; the gradient is that at the fixed action."""

    def jacobian(x):
        return torch.func.jacrev(lambda x: sample(x).sum(0))(x).movedim(1, 0)

    moved = sample(noise) - sample(noise).detach()
    noise = noise - torch.linalg.solve(jacobian(noise).detach(), moved)
    return NORMAL.log_prob(noise).sum(1) - torch.linalg.det(jacobian(noise)).abs().log()


@PATHS
@pytest.mark.parametrize("method", ["euler", "midpoint"])
def test_flow_sample_against_a_loop_and_flow_log_prob_is_exact_with_the_score(method, path):
    policy, noise = make_policy(), leaf(4, 2)
    velocity, weights = policy.velocity(leaf(4, 3)), policy.flow_layer.weight
    dtau = (1.0 if path == "linear" else math.pi / 2) / 3

    def sample(x):
        for t in torch.tensor([1, 2 / 3, 1 / 3]).double().view(3, 1, 1).expand(3, 4, 1):
            slope = velocity(x, t)
            if method == "midpoint":
                slope = velocity(x - dtau / 2 * slope, t - 1 / 6)
            x = x - dtau * slope
        return x

    same(dipod.flow_sample(velocity, noise, 3, method, path), sample(noise), noise, weights)
    action, log_prob = dipod.flow_log_prob(velocity, noise, 3, method, path)
    same(action, sample(noise).detach())
    same(log_prob, exact_log_prob(sample, noise.detach()), weights)


def test_midpoint_narrows_a_std_of_0_4_less_than_euler_at_the_same_cost():
    def velocity(x, time):  # the exact one of normal actions, on the path "vp"
        sin, cos = (math.pi / 2 * time).sin(), (math.pi / 2 * time).cos()
        return sin * cos * (1 - 0.4**2) / (cos**2 * 0.4**2 + sin**2) * x

    solvers = [(2, "midpoint", 0.753), (5, "midpoint", 0.977), (10, "euler", 0.953)]
    for num_steps, method, kept in solvers:
        action = dipod.flow_sample(velocity, torch.ones(1, 1), num_steps, method, "vp")
        assert action.item() / 0.4 == pytest.approx(kept, abs=1e-3)


@pytest.mark.parametrize("form", [{"tight": True}, {"tight": False}, {"flow": False}])
def test_policy_has_the_sampler_s_density_and_a_bound_below_it(form):
    policy = make_policy(**form)
    parameters = [p for p in policy.parameters() if p.requires_grad]
    obs, noise = torch.randn(500, 3).double(), torch.randn(500, 2).double()

    def sample(noise):  # policy.sample, but with a gradient
        if policy.flow:
            noise = dipod.flow_sample(policy.velocity(obs), noise, **policy.solver)
        return policy.mean(obs) + policy.log_std.exp() * noise if policy.mean else noise

    action = policy.sample(obs, noise)
    same(action, sample(noise).detach())
    log_prob = policy.log_prob(obs, noise)
    same(log_prob, exact_log_prob(sample, noise), *parameters)
    draws = dipod.draw_flow(action, 16)
    elbo = policy.elbo(obs, action, draws)
    torch.autograd.grad(elbo.sum(), parameters, retain_graph=True)  # an error if one is unused
    if not policy.flow:
        same(elbo[:, 0], log_prob, *parameters)
        return
    z = (action - policy.mean(obs)) / policy.log_std.exp() if policy.mean else action
    path, min_time = ("vp", 0.0) if form["tight"] else ("linear", 0.005)
    flow_elbo = 2 * dipod.flow_elbo(policy.velocity(obs), z, draws, path)
    same(elbo, flow_elbo - policy.log_std.sum(), *parameters)
    draws.time[0] = 0.0  # where the bound on the path "vp" would diverge if the field were not 0
    bound = dipod.flow_bound(policy.velocity(obs), z, draws, path, min_time)
    same(policy.bound(obs, action, draws), bound - policy.log_std.sum(), *parameters)
    assert policy.bound(obs, action, draws).mean() < log_prob.mean()


def test_alignment_by_hand():
    a, b = leaf(2), leaf(1)
    proxy, true = 3 * a[0] + 4 * b.sum(), 5 * a.sum()  # gradients (3, 0, 4) and (5, 5, 0)
    cosine = dipod.alignment(proxy, true, iter([a, b, leaf(3), torch.ones(1)]))
    assert cosine.item() == pytest.approx(15 / (5 * math.sqrt(50)))


def test_two_token_against_the_formulas_written_out():
    rewards = torch.tensor([0.8, 1.0, 0.7, 1.0]).double()
    history = dipod.two_token(beta=0.1, steps=20, lr=2.0)
    theta = torch.zeros(6).double().requires_grad_()
    for step in range(21):
        p1_a, p1_b, p1_m, p2_a, p2_b, p2_m = theta.sigmoid()  # of A, given the other token
        q1_a, q1_b, q1_m, q2_a, q2_b, q2_m = 1 - theta.sigmoid()  # of B
        left = torch.stack((p1_m * p2_a, p1_m * q2_a, q1_m * p2_b, q1_m * q2_b))
        right = torch.stack((p2_m * p1_a, q2_m * p1_b, p2_m * q1_a, q2_m * q1_b))
        log_prob, elbo = ((left + right) / 2).log(), (left.log() + right.log()) / 2
        pi, gap = log_prob.exp().detach(), (log_prob - elbo).detach()
        a = rewards - pi @ rewards
        proxy, true = gradient((pi * a) @ elbo, theta), gradient((pi * a) @ log_prob, theta)
        cosine = proxy @ true / (proxy.norm() * true.norm())
        row = [history[name][step] for name in ("gap_AA", "gap", "alignment", "reward")]
        same(torch.stack(row), torch.stack((gap[0], pi @ gap, cosine, pi @ rewards)))
        theta.data += 2.0 * (proxy + 0.1 * gradient(pi @ elbo, theta))


def test_everything_is_made_on_the_device_of_the_input():
    with torch.device("meta"):
        b, bn = torch.ones(3), torch.ones(3, 4)
    draws = dipod.draw_flow(bn, 2)  # bn may as well be actions
    results = [*dipod.draw_masks(bn > 0, 3), *draws, dipod.group_advantages(bn)]
    results += [dipod.dipod_loss(bn, bn, b, weight=b)[0], dipod.spg_loss(bn, b, b, weight=b)[0]]
    for path in ("linear", "vp"):
        results += dipod.flow_log_prob(torch.mul, bn, 2, path=path)
        results.append(dipod.flow_elbo(torch.mul, bn, draws, path))
        results.append(dipod.flow_bound(torch.mul, bn, draws, path))
    assert all(x.is_meta for x in results)


def test_the_method_stands_alone():
    method, _ = (ROOT / "dipod.py").read_text().split("# The method ends here.")
    assert set(re.findall(r"(?m)^(?:from|import) (\w+)", method)) == {"math", "typing", "torch"}


SNIPPETS = re.findall(r"(?ms)^```python\n(.*?)^```", (ROOT / "README.md").read_text())


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_snippet_of_the_readme_starts_at_a_ratio_of_1_and_trains(snippet, tmp_path, monkeypatch):
    loss = mock.Mock(wraps=dipod.dipod_loss)
    monkeypatch.setattr(dipod, "dipod_loss", loss)
    (tmp_path / "snippet.py").write_text(snippet)
    names = runpy.run_path(tmp_path / "snippet.py")
    model, policy = lm_task.Model(), FlowPolicy(3, 2, tight=False)
    optimizer = torch.optim.Adam([*model.parameters(), *policy.parameters()])
    if "language_step" in names:
        start = lm_task.start_tokens(torch.arange(2).repeat_interleave(8))
        names["language_step"](model, optimizer, start, lm_task.rewards, lm_task.MASK)
    else:
        obs = torch.randn(32, 3)
        action = policy.sample(obs, torch.randn(32, 2))
        names["flow_step"](policy.velocity, optimizer, obs, action, torch.randn(32))
    log_ratios = [call.args[0] - call.args[1] for call in loss.call_args_list]
    assert log_ratios[0].abs().max() < 1e-5 < log_ratios[-1].abs().max()


B, BN = torch.ones(3), torch.ones(3, 4)
BA, BT = torch.ones(3, 2), torch.zeros(3, 5).long()
MASKS = MaskDraws(torch.ones(3, 4, 5).bool(), BN)
FLOWS = FlowDraws(BN[..., None] / 2, torch.ones(3, 4, 2))
MODEL = torch.nn.Embedding(4, 3)


@pytest.mark.parametrize(
    ("argument", "call"),
    [
        ("advantages", lambda: dipod.dipod_loss(B, B, B[:, None])),  # would broadcast to (B, B)
        ("old_elbo", lambda: dipod.dipod_loss(BN, BN[:, :1], B)),
        ("weight", lambda: dipod.spg_loss(BN, B, B, weight=0 * B)),
        ("beta", lambda: dipod.dipod_loss(BN, BN, B, beta=-0.1)),
        ("beta", lambda: dipod.spg_loss(BN, B, B, beta=B.to("meta"))),
        ("clip", lambda: dipod.dipod_loss(BN, BN, B, clip=0.0)),
        ("trust_region", lambda: dipod.dipod_loss(BN, BN, B, trust_region="trpo")),
        ("distill_elbo", lambda: dipod.dipod_loss(B, B, B, distill_elbo=B[:2])),
        ("mix", lambda: dipod.spg_loss(BN, B, B, mix=2.0)),
        ("rewards", lambda: dipod.group_advantages(B[:, None])),  # one sample of each prompt
        ("maskable", lambda: dipod.draw_masks(BT > 0, 4)),  # empty completions
        ("tokens", lambda: dipod.masked_elbo(MODEL, BT, MASKS, 0)),  # the mask is a token
        ("maskable", lambda: dipod.exact_likelihood(MODEL, BT, torch.ones(3, 5).tril() > 0, 3)),
        ("logits", lambda: dipod.sample_masked(torch.nn.Identity(), BT, 0)),
        ("power", lambda: dipod.masked_bounds(MODEL, BT, MASKS, 3, power=0.5)),
        ("method", lambda: dipod.flow_log_prob(torch.mul, BA, 2, "heun")),
        ("path", lambda: dipod.flow_elbo(torch.mul, BA, FLOWS, "cosine")),
        ("min_time", lambda: dipod.flow_bound(torch.mul, BA, FLOWS, min_time=1.0)),
        ("parameters", lambda: dipod.alignment(B.sum(), B.sum(), B)),
        ("velocity", lambda: dipod.flow_elbo(lambda x, time: time, BA, FLOWS)),
    ],
)
def test_wrong_call(argument, call):
    with pytest.raises(ValueError, match=f"^{argument}: expected .* got "):
        call()


def test_gae_bootstraps_truncated_episodes_and_cuts_all():
    rewards, values, next_values = torch.randn(3, 7, 1).unbind()
    terminated = torch.tensor([0, 0, 1, 0, 0, 0, 0]).bool()[:, None]
    done = torch.tensor([0, 0, 1, 0, 1, 0, 0]).bool()[:, None]
    advantages = control_task.gae(rewards, values, next_values, terminated, done)
    for t in range(7):
        total, discount = 0.0, 1.0
        for s in range(t, 7):  # the definition: a sum of TD errors up to the episode's end
            bootstrap = 0.0 if terminated[s] else control_task.GAMMA * next_values[s]
            total += discount * (rewards[s] + bootstrap - values[s])
            if done[s]:
                break
            discount *= control_task.GAMMA * control_task.LAMBDA
        torch.testing.assert_close(advantages[t], total)


class Counter(control_task.TwoDoors):  # shows how many of its three steps are over
    def step(self, action):
        self.tries += 1
        return np.full(1, self.tries, np.float32), 0.0, False, self.tries == 3, {}


def test_rollout_keeps_unclipped_actions_and_bootstraps_from_the_final_observation():
    gym.register("Counter-v0", entry_point=Counter)
    envs = control_task.make_envs("Counter-v0", 16)
    policy, _, norm = control_task.make_networks({"method": "fpo", "policy": "tight"}, envs)
    norm[0].running_mean.fill_(5.0)  # so a normalised observation is 5 less
    with mock.patch.object(envs.unwrapped, "step", wraps=envs.unwrapped.step) as step:
        samples, _, _ = control_task.rollout(policy, nn.Identity(), norm, envs, envs.reset()[0])
    obs, _, action, advantages, _ = samples
    received = np.concatenate([call.args[0] for call in step.call_args_list])
    assert action.abs().max() > 1.5 and (received == action.numpy().clip(-1, 1)).all()
    # The value is the observation. The last step leads from -3 to -2, not to the next episode.
    assert advantages[obs[:, 0].round() == -3].tolist() == pytest.approx([1.02] * 672, abs=1e-3)
    envs.load_state_dict(envs.state_dict())  # a resumed run computes in float64 too
    assert envs.return_rms.mean.dtype == envs.return_rms.var.dtype == np.float64


@pytest.mark.parametrize("per_draw", [False, True])
def test_update_and_self_distill_against_the_formulas(per_draw):
    networks = policy, value = nn.ModuleList([make_policy().float(), nn.Linear(3, 1)])
    weights = [*networks.parameters()]
    optimizer = torch.optim.SGD(weights, lr=0.0)
    obs, noise = torch.randn(256, 3), torch.randn(256, 2)
    a, targets = torch.randn(2, 256)
    action = policy.sample(obs, noise)
    settings = {"beta": 0.3, "per_draw": per_draw, "updates": 1}

    def check(loss, function, *arguments):  # the gradients that an update leaves, clipped
        networks.zero_grad()
        loss.backward()
        for network in networks:
            nn.utils.clip_grad_norm_(network.parameters(), 0.5)
        expected = [p.grad for p in weights]
        torch.manual_seed(1)
        result = function(policy, value, optimizer, *arguments)
        torch.testing.assert_close([p.grad for p in weights], expected, rtol=1e-3, atol=1e-5)
        return result

    torch.manual_seed(1)
    draws, z = dipod.draw_flow(action, 2), policy.standardize(obs, action).detach()
    loss = (value(obs)[:, 0] - targets).square().mean()
    loss = loss - ((a - a.mean()) / a.std() * policy.elbo(obs, action, draws).mean(1)).mean()
    loss = loss - 0.3 * policy.latent_elbo(obs, z, draws).mean()
    with mock.patch.object(control_task, "dipod_loss", wraps=dipod.dipod_loss) as used:
        info = check(loss, control_task.update, [obs, noise, action, a, targets], settings)
    assert info["ratio"] == pytest.approx(1, abs=1e-5) and info["clip_fraction"] == 0
    how = (used.call_args.args[0].dim(), used.call_args.kwargs["trust_region"])
    assert how == ((2, "aspo") if per_draw else (1, "ppo"))
    torch.manual_seed(1)
    x, fresh = obs[torch.randint(256, (256,))], torch.randn(256, 2)
    z = policy.standardize(x, policy.sample(x, fresh)).detach()
    loss = -policy.latent_elbo(x, z, dipod.draw_flow(z, 2)).mean()
    check(loss, control_task.self_distill, obs, settings)


def test_drift_against_the_formulas():
    policy = make_policy().float()
    obs, noise = torch.randn(256, 3), torch.randn(256, 2)
    samples = [obs, noise, policy.sample(obs, noise), *torch.randn(2, 256)]
    measured = control_task.drift(policy, samples, torch.Generator())
    generator = torch.Generator()
    some = torch.randperm(256, generator=generator)
    obs, noise, action, a, _ = (column[some] for column in samples)
    a = a - a.mean()
    draws = dipod.draw_flow(action, 16, generator)
    log_prob, elbo = policy.log_prob(obs, noise), policy.elbo(obs, action, draws).mean(1)
    cosine = dipod.alignment((a * elbo).mean(), (a * log_prob).mean(), policy.parameters())
    gap = (log_prob - policy.bound(obs, action, draws).mean(1)).mean()
    expected = torch.stack((gap, cosine, -log_prob.mean())).tolist()  # entropy last
    assert list(measured.values()) == pytest.approx(expected, rel=1e-4)


def test_reward_by_hand():
    right = {"13:9+3+1": 1, "05:9-3-1": 1, "13:9+3+2": 0, "11:9+3:1": 0, "13:1+-+1": 0}
    tokens = torch.tensor([[lm_task.CHARS.index(char) for char in line] for line in right])
    assert lm_task.rewards(tokens).tolist() == list(right.values())


def compare_gradients(rank, store):
    """In each of two processes: that of half the batch, averaged, is that of the whole batch."""
    dist.init_process_group("gloo", store, rank=rank, world_size=2)
    torch.manual_seed(0)
    model = lm_task.Model()
    tokens, maskable, _ = lm_task.sample(model, torch.tensor([5, 9]), 4)
    advantages, draws = torch.randn(8), dipod.draw_masks(maskable, 4)

    def gradients(net, part):
        model.zero_grad()
        some = MaskDraws(draws.mask[part], draws.weight[part])
        elbo = dipod.masked_elbo(net, tokens[part], some, lm_task.MASK).mean(1)
        loss, _ = dipod.dipod_loss(elbo, elbo.detach() - 0.1, advantages[part])
        loss.backward()
        return [p.grad.clone() for p in model.parameters()]

    whole = gradients(model, slice(0, 8))
    half = gradients(nn.parallel.DistributedDataParallel(model), slice(4 * rank, 4 * rank + 4))
    torch.testing.assert_close(half, whole, atol=1e-5, rtol=1e-4)
    dist.barrier()
    dist.destroy_process_group()
    time.sleep(0.2)  # gloo's threads need the interpreter once more, or the exit aborts


def test_two_processes_with_half_the_batch_take_the_step_of_one(tmp_path):
    torch.multiprocessing.spawn(compare_gradients, (f"file://{tmp_path}/store",), nprocs=2)


TASKS = {"control": control_task, "lm": lm_task}
PIPED = {"cwd": ROOT, "stdout": subprocess.PIPE, "text": True}


def call_main(task, *arguments):  # its exit status, in this process because imports are slow
    argv = [f"{task}_task.py", *map(str, arguments)]
    with mock.patch.object(sys, "argv", argv), pytest.raises(SystemExit) as stop:
        TASKS[task].main()
    return stop.value.code


@pytest.fixture(scope="session")
def smoke(tmp_path_factory):
    """Both tasks at once with all their methods and few steps: {task: (output, directory)}."""
    short_lm = "import lm_task; lm_task.PRETRAINING = 8; lm_task.main()"
    commands = {
        "control": ["control_task.py", "--steps", "4096", "--distill", "1"],
        "lm": ["-c", short_lm, "--steps", "4", "--prompts", "2", "--inner", "2"],
    }
    started = {}
    for task, command in commands.items():
        out = tmp_path_factory.mktemp(task)
        command += ["--out", out, "--jobs", "1", "--methods", *TASKS[task].METHODS]
        started[task] = (subprocess.Popen([sys.executable, *command], **PIPED), out)
    return {task: (process.communicate()[0], out) for task, (process, out) in started.items()}


@pytest.mark.parametrize(("task", "score"), [("control", "return"), ("lm", "reward")])
def test_smoke_run_prints_and_records_all_methods(task, score, smoke):
    output, out = smoke[task]
    lines = output.splitlines()
    end = lines.index("")  # of the rows; then comes the table
    for method in TASKS[task].METHODS:
        assert any(line.split()[:2] == [method, "1"] for line in lines[end:]), method
        header, *rows = (out / f"{method}_0.csv").read_text().splitlines()
        assert header.startswith(f"method,seed,step,{score},gap,alignment,")
        printed = [line for line in lines if line.split()[:2] == [method, "0"]]
        assert [row.split(",")[2] for row in rows] == [line.split()[2] for line in printed]
    assert max(map(len, lines[:end])) <= 100
    assert (out / "figure.png").stat().st_size > 10_000


def test_same_seed_same_numbers_in_a_fresh_directory(smoke, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("runs/control-1").mkdir(parents=True)
    assert call_main("control", "--steps", 4096, "--methods", "dipod") == 0
    csvs = (Path("runs/control-2/dipod_0.csv"), smoke["control"][1] / "dipod_0.csv")
    assert csvs[0].read_text() == csvs[1].read_text()


def test_killed_and_resumed_equals_uninterrupted(smoke, tmp_path):
    base, cut = smoke["lm"][1] / "base" / "base_0.pt", tmp_path / "cut"
    flags = "--device cpu --steps 20 --prompts 2 --inner 2 --methods dipod --decay --base"
    command = [*flags.split(), base, "--out"]
    killed = [sys.executable, "lm_task.py", *command, cut]
    process = subprocess.Popen(killed, start_new_session=True, **PIPED)
    rows = (line for line in process.stdout if line.startswith("dipod"))
    printed = [next(rows).split()[2] for _ in range(3)]
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    steps = [row.split(",")[2] for row in (cut / "dipod_0.csv").read_text().splitlines()]
    assert steps[1:4] == printed and steps[-1] != "20"  # killed before the end
    assert call_main("lm", *command, cut, "--resume") == 0
    assert call_main("lm", *command, tmp_path) == 0
    assert (cut / "dipod_0.csv").read_text() == (tmp_path / "dipod_0.csv").read_text()


def test_a_diverged_run_is_named_and_costs_the_others_nothing(smoke, tmp_path, capfd, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # as if it were not installed
    shutil.copy(smoke["lm"][1] / "fpo_0.pt", tmp_path)
    command = ["--methods", "exact", "--steps", 4, "--lr", 1e30, "--out", tmp_path]
    assert call_main("lm", *command, "--base", smoke["lm"][1] / "base" / "base_0.pt") == 1
    output, errors = capfd.readouterr()
    why = "stopped: FloatingPointError: non-finite gradient at step 1\n"
    assert errors == f"exact_0 {why}"
    assert f"exact_0: step 0 of 4, {why}" in output
    assert "\nfpo            1  " in output and "\nexact  " not in output
    assert "no figure: " in output


@pytest.mark.parametrize(
    ("task", "arguments", "said"),
    [
        ("control", "--lr 0", "--lr: expected a finite number"),
        ("control", "--steps 1e5", "--steps: expected a whole number"),
        ("control", "--methods ppo ppo", "--methods: expected each method once"),
        ("control", "--env CartPole-v1", "--env CartPole-v1: expected vectors and bounded float"),
        ("control", "--env Nowhere-v0", "--env Nowhere-v0: NameNotFound"),
        ("control", "--eval CUT", "not a checkpoint"),
        ("control", "--gif a.mp4 --eval CONTROL/dipod_0.pt", "--gif: expected a name that ends"),
        ("control", "--out CUT/x", "cut.pt"),
        ("control", "--out CONTROL --methods dipod", "--resume goes on"),
        ("control", "--out CONTROL --methods dipod --resume --steps 8192", "steps 8192"),
        ("control", "--out CONTROL --methods dipod --first-seed 9 --lr 1", "lr 1"),
        ("control", "--resume", "--resume: expected an --out"),
        ("control", "--out LM --methods ppo", "expected a checkpoint of control_task.py"),
        ("lm", "--base LM/dipod_0.pt --out LM --methods dipod --overwrite", "--base"),
        ("lm", "--base LM/fpo_0.pt --out LM --methods dipod --resume", "base"),
    ],
)
def test_wrong_command_is_one_line_and_status_2(task, arguments, said, smoke, tmp_path, capsys):
    cut, record = tmp_path / "cut.pt", smoke["lm"][1] / "dipod_0.pt"
    before = record.read_bytes()
    cut.write_bytes(before[:2000])
    for name, place in {"CONTROL": smoke["control"][1], "LM": smoke["lm"][1], "CUT": cut}.items():
        arguments = arguments.replace(name, str(place))
    assert call_main(task, *arguments.split()) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert said in err
    assert record.read_bytes() == before
