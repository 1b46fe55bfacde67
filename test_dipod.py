"""Tests: every formula against brute force, value and gradient; every command as a user runs it."""

import csv
import itertools
import math
import os
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

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


# The loss


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
@pytest.mark.parametrize("weight", [None, torch.arange(12.0)])
def test_dipod_loss_against_a_loop(trust_region, shape, weight):
    elbo, old_elbo, distill_elbo = 0.3 * leaf(*shape), 0.3 * leaf(*shape), leaf(12, 3)
    arguments = (elbo, old_elbo, leaf(12), 0.3, 0.2, trust_region)
    loss, info = dipod.dipod_loss(*arguments, weight)
    w = torch.ones(12).double() if weight is None else weight.double()
    same(loss, loss_by_loop(*arguments, w, elbo), elbo, old_elbo)
    ratio = (elbo - old_elbo).exp()
    clipped = ((ratio - 1).abs() > 0.2).double()
    for name, x in {"elbo": elbo, "ratio": ratio, "clip_fraction": clipped}.items():
        mean = w @ x.detach().view(12, -1).mean(1) / w.sum()
        assert info[name].item() == pytest.approx(mean.item())
    same(info["policy_loss"], loss.detach() + 0.3 * info["elbo"])
    # Another ELBO for the regularizer, (B, M) or (B, N), replaces that term alone.
    loss, _ = dipod.dipod_loss(*arguments, weight, distill_elbo)
    same(loss, loss_by_loop(*arguments, w, distill_elbo), elbo, distill_elbo)


def test_spg_loss_against_a_loop():
    elbo, eubo, advantages, weight = leaf(12, 3), leaf(12), leaf(12), torch.arange(12.0)
    expected = 0.0
    for b, a in enumerate(advantages):
        lower = elbo[b].mean()
        score = lower if a > 0 else 0.25 * eubo[b] + 0.75 * lower
        expected = expected - weight[b] * (a * score + 0.3 * lower) / weight.sum()
    for lower in (elbo, elbo.mean(1)):
        loss, _ = dipod.spg_loss(lower, eubo, advantages, beta=0.3, mix=0.25, weight=weight)
        same(loss, expected, elbo, eubo)


def both_losses(elbo, other, advantages, weight=None, beta=0.3, clip=0.2):
    loss, _ = dipod.dipod_loss(elbo, other, advantages, beta, clip, "aspo", weight)
    spg, _ = dipod.spg_loss(elbo, other.mean(1), advantages, beta, weight=weight)
    return torch.stack((loss, spg))


@pytest.mark.parametrize("bad", [math.nan, -math.inf])
def test_weight_0_removes_a_row_whatever_it_holds(bad):
    elbo, other, advantages = leaf(3, 2), leaf(3, 2), leaf(3)
    row = torch.full((1, 2), bad)
    padded = (torch.cat((elbo, row)), torch.cat((other, row)), torch.cat((advantages, row[0, :1])))
    losses = both_losses(*padded, torch.tensor([1.0, 1.0, 1.0, 0.0]))
    same(losses, both_losses(elbo, other, advantages), elbo)


def test_weights_that_are_all_0_give_0_where_values_are_not_read():
    elbo = leaf(3, 2)
    compiled = torch.compile(both_losses, fullgraph=True, backend="eager")
    same(compiled(elbo, elbo.detach(), leaf(3), torch.zeros(3)), 0 * elbo.sum(0), elbo)


@PATHS
def test_compiles_to_one_graph_while_beta_and_clip_are_scheduled(path):
    def train_loss(action, draws, old_elbo, advantages, beta, clip):
        elbo = dipod.flow_elbo(torch.mul, action, draws, path)
        return both_losses(elbo, old_elbo, advantages, None, beta, clip)

    # With the backend "eager", a number that is compiled anew at each of its values goes unseen.
    torch.compiler.reset()
    compiled = torch.compile(train_loss, fullgraph=True, backend="aot_eager")
    action = leaf(3, 2)
    fixed = (action, dipod.draw_flow(action, 2), leaf(3, 2), leaf(3))
    for i in range(1, 21):
        schedule = (0.03 * i, 0.02 * i)
        same(compiled(*fixed, *schedule), train_loss(*fixed, *schedule), action)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_networks_have_float32_elbos_and_losses(dtype):
    action, tokens = torch.randn(8, 2), torch.zeros(8, 3).long()
    masks = dipod.draw_masks(tokens == 0, 4)
    inputs = (torch.zeros(2, 2), torch.randn(2), torch.randn(4, 3), -3 * torch.rand(2, 8, 4))
    inputs = (*inputs, action, *dipod.draw_flow(action, 4))

    def results(precision):  # the inputs are rounded to dtype, and nothing else may be
        slope, bias, logits, elbos, a, *draws = (x.to(dtype).to(precision) for x in inputs)
        flow = (lambda x, time: torch.nn.functional.linear(x, slope, bias), a, FlowDraws(*draws))
        bounds = dipod.masked_bounds(lambda tokens: logits[tokens], tokens, masks, 3)
        losses = both_losses(*elbos, torch.ones(8))
        return [dipod.flow_elbo(*flow), dipod.flow_bound(*flow), *bounds, losses]

    for half, full in zip(results(dtype), results(torch.float32)):
        torch.testing.assert_close(half, full)  # the dtypes too


def test_before_the_first_update_dipod_is_an_advantage_shifted_by_beta():
    draws, advantages = leaf(6, 4), leaf(6)
    shifted = -((advantages + 0.3) * draws.mean(1)).mean()
    for elbo in (draws, draws.mean(1)):
        loss, info = dipod.dipod_loss(elbo, elbo.detach(), advantages, beta=0.3)
        torch.testing.assert_close(gradient(loss, draws), gradient(shifted, draws))
        assert info["ratio"] == 1 and info["clip_fraction"] == 0


def test_the_cap_of_the_log_ratio_leaves_the_gradient():
    elbo = torch.tensor([50.0], requires_grad=True)
    loss, _ = dipod.dipod_loss(elbo, torch.zeros(1), torch.tensor([-1.0]), beta=0.0)
    assert loss.item() == pytest.approx(math.exp(10))
    assert gradient(loss, elbo).item() == pytest.approx(math.exp(10))


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
    fpo, _ = dipod.dipod_loss(elbo, old_elbo, advantages, beta=0.05, clip=0.2)
    spg, _ = dipod.spg_loss(per_token, eubo, advantages, beta=0.05, mix=0.5, weight=length)
    assert [fpo.item(), spg.item()] == pytest.approx([0.76139118821, 0.49052418349], abs=1e-6)
    # FPO++ without a regularizer, where only the log ratios matter: those of 4 draws; advantage.
    text = """
       -0.076734232  0.116757475  0.136795607  0.200402324 -1.363382699
       -0.100011288 -0.218998512 -0.049982800 -0.004819553  0.623938958
        0.645399365  0.337374140  0.769810335  0.612490570 -1.048961992
        0.196064577  0.476636495  0.105920653 -0.052380123  0.329320921
       -0.152706804  0.011380255 -0.014868820 -0.192097170  1.586795456
       -0.126761320  0.118988855  0.949055298 -0.013685602 -0.297627696
       -0.192718097 -0.196481219 -0.209014063  0.082311957  0.551272738"""
    samples = torch.tensor([float(x) for x in text.split()]).view(7, 5)
    ratio, advantages = samples[:, :4], samples[:, 4]
    losses = []
    for trust_region in ("ppo", "spo", "aspo"):
        losses.append(dipod.dipod_loss(ratio, 0 * ratio, advantages, 0.0, 0.05, trust_region)[0])
    expected = torch.tensor([0.14299066441, 1.69670488314, 1.59472412250])
    torch.testing.assert_close(torch.stack(losses), expected, rtol=0, atol=1e-6)


def test_group_advantages_by_hand():
    rewards = torch.tensor([[0.0, 0.0, 1.0], [0.9, 0.9, 0.9]], requires_grad=True)
    centred = rewards[0] - rewards[0].sum() / 3
    std = (centred.square().sum() / 2).sqrt()
    same(dipod.group_advantages(rewards, normalize=False)[0], centred, rewards)
    same(dipod.group_advantages(rewards)[0], centred / (std + 1e-4), rewards)
    assert (dipod.group_advantages(rewards)[1] == 0).all()  # exactly


# Masked diffusion


def table(width):
    """A model without structure and its logits: free ones for every context of 0, 1 and mask 2."""
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


@pytest.mark.parametrize(("power", "num_draws"), [(1.0, 1), (1.5, 2), (4.0, 5)])
def test_masked_elbo_and_masked_bounds_against_loops(power, num_draws):
    (model, logits), tokens = table(4), torch.randint(0, 2, (4, 4))
    maskable = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 1]]).bool()
    draws = dipod.draw_masks(maskable, num_draws)
    elbo, eubo = dipod.masked_bounds(model, tokens, draws, 2, power)
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


def test_masked_elbo_is_unbiased_and_eubo_is_above_for_large_powers_only():
    (model, _), tokens = table(3), torch.tensor(list(itertools.product(range(2), repeat=3)))
    log_prob, exact = dipod.exact_likelihood(model, tokens, tokens >= 0, 2)
    draws = dipod.draw_masks(tokens >= 0, 8000)
    elbo, eubo = dipod.masked_bounds(model, tokens, draws, 2, power=3.0)
    pairs = elbo.view(8, 4000, 2).mean(2)
    assert ((pairs.mean(1) - exact).abs() < 4 * pairs.std(1) / math.sqrt(4000)).all()
    assert (eubo > log_prob).all()
    assert (dipod.masked_bounds(model, tokens, draws, 2, power=1.0)[1] < log_prob - 0.1).any()


def test_masked_bounds_of_a_row_that_no_draw_masks_are_0_with_gradient_0():
    (model, logits), draws = table(3), MaskDraws(torch.zeros(1, 2, 3) > 0, torch.ones(1, 2))
    for bound in dipod.masked_bounds(model, torch.zeros(1, 3).long(), draws, 2):
        assert (bound == 0).all() and (gradient(bound.sum(), logits) == 0).all()


@pytest.mark.parametrize("mask_id", [2, np.int64(2)])
def test_mask_id_may_be_a_numpy_integer_and_is_refused_among_the_scored_tokens(mask_id):
    (model, _), tokens = table(3), torch.tensor([[2, 0, 1]])
    assert (dipod.sample_masked(model, tokens, mask_id) != 2).all()
    in_the_prompt = dipod.draw_masks(tokens != 2, 2)
    assert dipod.masked_elbo(model, tokens, in_the_prompt, mask_id).isfinite().all()
    with pytest.raises(ValueError, match="^tokens: "):
        dipod.exact_likelihood(model, tokens, tokens >= 0, mask_id)


def test_sample_masked_fills_every_mask_and_only_those():
    def model(tokens):  # the mask token, 4, is the likeliest output
        return torch.tensor([0.0, 0.0, 0.0, 1.0, 9.0]).expand(*tokens.shape, -1)

    # Left padding (0), prompts, and rows of 3, 1, 0 and 4 masks.
    tokens = torch.tensor([[4, 1, 4, 4], [0, 0, 2, 4], [1, 2, 3, 0], [4, 4, 4, 4]])
    before = tokens.clone()
    filled = dipod.sample_masked(model, tokens, 4)
    assert (filled < 4).all() and torch.equal(tokens, before)
    assert torch.equal(filled[before < 4], before[before < 4])
    likeliest = dipod.sample_masked(model, tokens, 4, temperature=0.0)
    assert torch.equal(likeliest, before.where(before < 4, 3))


def test_exact_likelihood_against_all_decoding_orders_and_the_sampler():
    (model, logits), maskable = table(4), torch.tensor([True, True, False, True]).expand(8, 4)
    tokens = torch.tensor([(a, b, 1, c) for a, b, c in itertools.product(range(2), repeat=3)])
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
    assert gradient(pi @ log_prob, logits).abs().max() < 1e-12
    on_policy = gradient(pi @ elbo, logits)
    same(on_policy, -gradient(pi @ (log_prob - elbo), logits))
    assert on_policy.norm() > 0.01


# Flow policy


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
    assert torch.equal(time[:, 0], time[:, 1]) and torch.equal(noise[:, 0], -noise[:, 1])
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
    """By the Jacobian of the whole map. Gradient: the noise moves so that the action stays."""

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


@pytest.mark.parametrize("std", [1.0, 0.5, 0.1])
def test_midpoint_keeps_the_spread_that_euler_loses_at_equal_cost(std):
    def velocity(x, t):  # the exact field of actions that are normal with this std
        return (t - (1 - t) * std**2) / (t**2 + (1 - t) ** 2 * std**2) * x

    noise = torch.ones(1, 1).double()  # the map is linear: one unit of noise becomes the std
    midpoint = dipod.flow_sample(velocity, noise, 5, "midpoint").item() / std
    euler = dipod.flow_sample(velocity, noise, 10, "euler").item() / std
    assert abs(midpoint - 1) < 0.13
    assert euler < midpoint - 0.1


@pytest.mark.parametrize("form", [{"tight": True}, {"tight": False}, {"flow": False}])
def test_policy_has_the_sampler_s_density_and_a_bound_below_it(form):
    policy = make_policy(**form)
    parameters = [p for p in policy.parameters() if p.requires_grad]
    obs, noise = torch.randn(500, 3).double(), torch.randn(500, 2).double()

    def sample(noise):  # with a gradient, which policy.sample has not
        if policy.flow:
            noise = dipod.flow_sample(policy.velocity(obs), noise, **policy.solver)
        return policy.mean(obs) + policy.log_std.exp() * noise if policy.mean else noise

    action = policy.sample(obs, noise)
    same(action, sample(noise).detach())
    log_prob = policy.log_prob(obs, noise)
    same(log_prob, exact_log_prob(sample, noise), *parameters)
    draws = dipod.draw_flow(action, 16)
    elbo = policy.elbo(obs, action, draws)
    if not policy.flow:
        same(elbo[:, 0], log_prob, *parameters)
        return
    z = (action - policy.mean(obs)) / policy.log_std.exp() if policy.mean else action
    flow_elbo = 2 * dipod.flow_elbo(policy.velocity(obs), z, draws, policy.solver["path"])
    same(elbo, flow_elbo - policy.log_std.sum(), *parameters)
    assert policy.bound(obs, action, draws).mean() < log_prob.mean()
    at_time_0 = policy.velocity(obs)(z, torch.zeros(500, 1))
    assert form["tight"] == (at_time_0 == 0).all()  # or the bound on the path "vp" would diverge


def test_policy_starts_tight_with_the_gaussian_s_score():
    policy = FlowPolicy(3, 2).double()
    policy.log_std.data += 0.3
    obs, noise = torch.randn(5, 3).double(), torch.randn(5, 2).double()
    action = policy.sample(obs, noise)
    gaussian = torch.distributions.Normal(policy.mean(obs), policy.log_std.exp())
    score = gaussian.log_prob(action).sum(1, keepdim=True)
    # Over these draws cos, sin, their squares and the noise average as over all times and noise.
    time = torch.tensor([0.25, 0.25, 0.75, 0.75]).view(1, 4, 1).expand(5, 4, 1)
    draws = FlowDraws(time, torch.tensor([1.0, -1.0, 1.0, -1.0]).view(1, 4, 1).expand(5, 4, 2))
    head = [*policy.mean.parameters(), policy.log_std]
    same(policy.log_prob(obs, noise)[:, None], score, *head)
    same(policy.bound(obs, action, draws), score.expand(5, 4))
    elbo = policy.elbo(obs, action, draws).mean(1, keepdim=True)
    same(elbo - elbo.detach(), score - score.detach(), *head)


# The drift


def test_alignment_by_hand():
    a, b, unused = leaf(2), leaf(1), leaf(3)
    proxy, true = 3 * a[0] + 4 * b.sum(), 5 * a.sum()  # gradients (3, 0, 4) and (5, 5, 0)
    cosine = dipod.alignment(proxy, true, iter([a, b, unused]))
    assert cosine.item() == pytest.approx(15 / (5 * math.sqrt(50)))
    assert dipod.alignment(proxy, 0 * true, [a, b]).isnan()


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


# Devices and wrong calls


def test_everything_is_made_on_the_device_of_the_input():
    with torch.device("meta"):
        b, bn, action = torch.ones(3), torch.ones(3, 4), torch.ones(3, 2)
    draws = dipod.draw_flow(action, 4)
    results = [*dipod.draw_masks(bn > 0, 3), *draws, dipod.group_advantages(bn)]
    results += [dipod.dipod_loss(bn, bn, b, weight=b)[0], dipod.spg_loss(bn, b, b, weight=b)[0]]
    for path in ("linear", "vp"):
        results.append(dipod.flow_elbo(torch.mul, action, draws, path))
        results.append(dipod.flow_bound(torch.mul, action, draws, path))
        results += dipod.flow_log_prob(torch.mul, action, 2, path=path)
    assert all(x.is_meta for x in results)


B, BN, BA, BT = torch.ones(3), torch.ones(3, 4), torch.ones(3, 2), torch.zeros(3, 5).long()
MASKS = MaskDraws(torch.ones(3, 4, 5).bool(), BN)
FLOWS = FlowDraws(BN[..., None] / 2, torch.ones(3, 4, 2))
MODEL = torch.nn.Embedding(4, 3)


@pytest.mark.parametrize(
    ("argument", "call"),
    [
        ("advantages", lambda: dipod.dipod_loss(B, B, B[:, None])),  # would make (B, B)
        ("old_elbo", lambda: dipod.dipod_loss(BN, BN[:, :1], B)),
        ("elbo", lambda: dipod.dipod_loss(BN[None], BN[None], B)),
        ("elbo", lambda: dipod.dipod_loss(BN[:, :0], BN[:, :0], B)),
        ("distill_elbo", lambda: dipod.dipod_loss(BN, BN, B, distill_elbo=B[:1])),
        ("weight", lambda: dipod.dipod_loss(BN, BN, B, weight=-B)),
        ("weight", lambda: dipod.spg_loss(BN, B, B, weight=0 * B)),
        ("beta", lambda: dipod.dipod_loss(BN, BN, B, beta=-0.1)),
        ("beta", lambda: dipod.spg_loss(BN, B, B, beta=math.nan)),
        ("clip", lambda: dipod.dipod_loss(BN, BN, B, clip=0.0)),
        ("trust_region", lambda: dipod.dipod_loss(BN, BN, B, trust_region="trpo")),
        ("eubo", lambda: dipod.spg_loss(BN, B[:, None], B)),
        ("mix", lambda: dipod.spg_loss(BN, B, B, mix=1.1)),
        ("rewards", lambda: dipod.group_advantages(B[:, None])),  # one sample of each prompt
        ("maskable", lambda: dipod.draw_masks(BT > 0, 4)),  # empty completions
        ("mask", lambda: dipod.masked_bounds(MODEL, BT[:, 1:], MASKS, 3)),
        ("power", lambda: dipod.masked_bounds(MODEL, BT, MASKS, 3, power=0.5)),
        ("maskable", lambda: dipod.exact_likelihood(MODEL, BT, torch.ones(3, 5).tril() > 0, 3)),
        ("time", lambda: dipod.flow_elbo(torch.mul, BA, FlowDraws(BN, FLOWS.noise))),
        ("velocity", lambda: dipod.flow_elbo(lambda x, time: time, BA, FLOWS)),
        ("velocity", lambda: dipod.flow_bound(lambda x, time: time, BA, FLOWS)),
        ("path", lambda: dipod.flow_elbo(torch.mul, BA, FLOWS, path="cosine")),
        ("noise", lambda: dipod.flow_sample(torch.mul, B, 2)),
        ("method", lambda: dipod.flow_sample(torch.mul, BA, 2, method="heun")),
        ("num_steps", lambda: dipod.flow_sample(torch.mul, BA, 0)),
        ("action", lambda: FlowPolicy(5, 2).elbo(B[:, None].expand(3, 5), B[:, None], FLOWS)),
        ("z", lambda: FlowPolicy(5, 2).latent_elbo(torch.ones(1, 5), BA, FLOWS)),
        ("action", lambda: dipod.flow_log_prob(torch.mul, BA, 2, action=BA[:1])),
    ],
)
def test_wrong_call(argument, call):
    with pytest.raises(ValueError, match=f"^{argument}: expected .* got "):
        call()


# The control task


def control_args(**changes):
    args = {"device": "cpu", "resume": False, "env": "Reacher-v5", "policy": "tight"}
    args |= {"steps": 4096, "lr": control_task.LEARNING_RATE, "beta": 0.3, "distill": 1}
    return Namespace(**args | changes)


def small_batch(policy, size=64):
    """A batch as `rollout` gives it, of random observations and advantages."""
    obs = torch.randn(size, policy.obs_layer.in_features)
    noise = torch.randn(size, len(policy.log_std))
    batch = {"obs": obs, "noise": noise, "action": policy.sample(obs, noise)}
    return batch | {"advantages": torch.randn(size), "returns": torch.randn(size)}


def test_gae_bootstraps_truncated_episodes_and_cuts_all():
    steps, envs = 7, 3
    rewards, values, next_values = torch.randn(3, steps, envs).unbind()
    terminated = torch.rand(steps, envs) < 0.2
    done = terminated | (torch.rand(steps, envs) < 0.2)
    advantages = control_task.gae(rewards, values, next_values, terminated, done)
    for e in range(envs):
        for t in range(steps):
            total, discount = 0.0, 1.0
            for s in range(t, steps):  # the definition: a sum of TD errors up to the episode's end
                bootstrap = 0.0 if terminated[s, e] else control_task.GAMMA * next_values[s, e]
                total += discount * (rewards[s, e] + bootstrap - values[s, e])
                if done[s, e]:
                    break
                discount *= control_task.GAMMA * control_task.LAMBDA
            torch.testing.assert_close(advantages[t, e], torch.as_tensor(total))


class Countdown(gym.Env):
    """Observes the step; truncated after 3 steps, or terminated then if the action is positive."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (1,), np.float64)
    action_space = gym.spaces.Box(-2, 2, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.time = 0
        return np.zeros(1), {}

    def step(self, action):
        assert abs(action[0]) <= 2, "the environment gets clipped actions"
        self.time += 1
        over = self.time == 3
        terminated = bool(over and action[0] > 0)
        return np.full(1, self.time, float), 1.0, terminated, over and not terminated, {}


gym.register("Countdown-v0", entry_point=Countdown)


def test_rollout_bootstraps_from_the_final_observation_and_keeps_actions_unclipped():
    envs = control_task.make_envs("Countdown-v0", control_task.NUM_ENVS)
    obs, _ = envs.reset(seed=0)
    policy, norm = FlowPolicy(1, 1, flow=False), control_task.observation_norm(1)
    policy.log_std.data.fill_(1.0)
    seen = []

    def value(x):
        seen.append(x)
        return 10.0 * x

    batch, _, returns = control_task.rollout(policy, value, norm, envs, obs)
    assert batch["action"].abs().max() > 1.5
    assert returns
    assert set(returns) == {3.0}  # the raw reward, not the normalised one
    first, last = seen  # observations acted on are 0, 1, 2; those led to are 1, 2, 3
    assert set(first.flatten().round().tolist()) == {0.0, 1.0, 2.0}
    assert set(last.flatten().round().tolist()) == {1.0, 2.0, 3.0}
    obs = batch["obs"].view(control_task.ROLLOUT, control_task.NUM_ENVS)
    action = batch["action"].view(control_task.ROLLOUT, control_task.NUM_ENVS)
    advantages = batch["advantages"].view(control_task.ROLLOUT, control_task.NUM_ENVS)
    end = obs.round() == 2
    truncated = advantages[end & (action < 0)]
    terminated = advantages[end & (action > 0)]
    assert (
        truncated.min() - terminated.max() > 20
    )  # gamma * value(3) = 29.7, less the rewards' scale


@pytest.mark.parametrize("method", ["ppo", "fpo", "dipod", "dipod++"])
def test_the_first_ratio_is_1(method):
    policy, value = FlowPolicy(4, 2, flow=method != "ppo"), dipod.mlp(4, 1, 1.0)
    nn.init.normal_(policy.net[-1].weight, std=3.0)  # a flow that does something
    optimizer = torch.optim.SGD([*policy.parameters(), *value.parameters()], lr=0.0)
    settings = control_task.settings_of(method, 0, control_args())
    info = control_task.update(policy, value, optimizer, small_batch(policy), settings)
    assert info["ratio"] == pytest.approx(1.0, abs=1e-6)
    assert info["clip_fraction"] == 0


def test_fpo_and_dipod_differ_in_beta_alone():
    settings = {m: control_task.settings_of(m, 0, control_args()) for m in control_task.METHODS}
    differ = {k for k in settings["fpo"] if settings["fpo"][k] != settings["dipod"][k]}
    assert differ == {"method", "beta"}
    differ = {k for k in settings["fpo"] if settings["fpo"][k] != settings["ppo"][k]}
    assert differ == {"method"}


def test_self_distillation_tightens_the_textbook_flow():
    policy, value = FlowPolicy(3, 2, tight=False), dipod.mlp(3, 1, 1.0)
    optimizer = torch.optim.AdamW([*policy.parameters(), *value.parameters()], 3e-3)
    obs, noise = torch.randn(256, 3), torch.randn(256, 2)
    gaps = []
    for _ in range(2):
        with torch.no_grad():
            action = policy.sample(obs, noise)
            draws = dipod.draw_flow(action, 16)
            gaps.append(
                (policy.log_prob(obs, noise) - policy.bound(obs, action, draws).mean(1)).mean()
            )
        control_task.self_distill(policy, value, optimizer, obs, 150)
    assert gaps[1] < 0.5 * gaps[0]


# The language task


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("13:9+3+1", 1),
        ("13:9+3+2", 0),
        ("07:9-3+1", 1),
        ("00:1-0-1", 1),
        ("13:9+31+", 0),
        ("13:9:3+1", 0),
        ("13:+9+31", 0),
    ],
)
def test_reward_by_hand(text, reward):
    tokens = torch.tensor([[lm_task.CHARS.index(c) for c in text]])
    assert lm_task.rewards(tokens).tolist() == [reward]
    assert lm_task.text(tokens[0]) == text


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A base model after eight updates: enough to run everything."""
    path = tmp_path_factory.mktemp("base") / "base_0.pt"
    settings = {"task": "lm", "method": "base", "seed": 0, "steps": 8}
    lm_task.pretrain(settings, path, (1, 1, 1), Namespace(device="cpu"))
    return path


def lm_args(base, **changes):
    args = {"device": "cpu", "resume": False, "base": [base], "steps": 4, "lr": 1e-3, "beta": 0.3}
    args |= {"inner": 2, "prompts": 2, "decay": False}
    return Namespace(**args | changes)


def test_lm_methods_are_what_they_say(base):
    model = lm_task.load_model(base)
    tokens, maskable, _ = lm_task.sample(model, lm_task.TARGETS[:4], 4)
    batch = (tokens, maskable, dipod.draw_masks(maskable, 4))
    advantages = torch.randn(16)
    for method in ("fpo", "exact", "d1"):
        settings = lm_task.settings_of(method, 0, lm_args(base))
        old = lm_task.likelihood(model, settings["likelihood"], *batch).detach()
        loss, info = lm_task.loss_of(settings, model, batch, advantages, old)
        assert info["ratio"] == pytest.approx(1.0, abs=1e-6)
        assert loss.item() == pytest.approx(-advantages.mean().item(), abs=1e-5)
    settings = lm_task.settings_of("spg-dipod", 0, lm_args(base))
    elbo, eubo = dipod.masked_bounds(model, tokens, batch[2], lm_task.MASK, 1.5)
    expected, _ = dipod.spg_loss(elbo, eubo, advantages, 0.3)
    loss, _ = lm_task.loss_of(settings, model, batch, advantages, None)
    torch.testing.assert_close(loss, expected)


# Commands


def run(*command, **options):
    """A command of this project, as a user runs it."""
    command = [sys.executable, *map(str, command)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, **options)


def csv_rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="session")
def control(tmp_path_factory):
    """All control methods for two rollouts: output and directory."""
    out = tmp_path_factory.mktemp("control")
    command = ["control_task.py", "--steps", 4096, "--distill", 1, "--out", out, "--jobs", 2]
    return run(*command, "--methods", *control_task.METHODS), out


@pytest.fixture(scope="session")
def lm(tmp_path_factory, base):
    """All language methods for four rollouts, and one whose learning rate makes it diverge."""
    out = tmp_path_factory.mktemp("lm")
    command = ["lm_task.py", "--steps", 4, "--prompts", 2, "--inner", 2, "--base", base]
    command += ["--out", out, "--jobs", 2]
    hot = run(*command, "--methods", "exact", "--first-seed", 1, "--lr", 1e30)
    return run(*command, "--methods", *lm_task.METHODS), hot, out


def check_output(result, out, methods, score):
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    lines = result.stdout.splitlines()
    table = lines[lines.index("") + 1 :]
    for method in methods:
        assert any(line.split()[:2] == [method, "1"] for line in table), method
        rows = csv_rows(out / f"{method}_0.csv")
        assert list(rows[0])[:6] == ["method", "seed", "step", score, "gap", "alignment"]
        printed = [line for line in lines if line.split()[:2] == [method, "0"]]
        assert [row["step"] for row in rows] == [line.split()[2] for line in printed]
    assert max(map(len, lines[: lines.index("")])) <= 100
    assert (out / "figure.png").stat().st_size > 10_000


def test_control_end_to_end(control):
    result, out = control
    check_output(result, out, control_task.METHODS, "return")
    evaluation = run("control_task.py", "--eval", out / "dipod_0.pt")
    assert evaluation.returncode == 0, evaluation.stderr
    assert len(evaluation.stdout.splitlines()) == 2


def test_lm_end_to_end(lm):
    result, _, out = lm
    check_output(result, out, lm_task.METHODS, "reward")
    shown = [line for line in result.stdout.splitlines() if line.count(":") == 6]
    assert len(shown) == 1 + len(lm_task.METHODS)  # the base's completions and each model's


def test_a_diverged_run_is_named_and_not_averaged(lm):
    result, hot, out = lm
    assert hot.returncode == 1
    why = "stopped: FloatingPointError: non-finite gradient at step 1"
    assert f"exact_1: step 0 of 4, {why}" in hot.stdout
    assert f"exact_1 {why}\n" in hot.stderr
    assert not (out / "exact_1.pt").exists()
    assert "exact_1" not in result.stdout


def test_same_seed_same_numbers(control, lm, base, tmp_path):
    for task, args, out in (
        (control_task, control_args(), control[1]),
        (lm_task, lm_args(base), lm[2]),
    ):
        settings = task.settings_of("dipod", 0, args)
        if task is lm_task:
            settings["lr"] = 3e-4
        task.train(settings, tmp_path / "dipod_0.pt", (1, 1, 1), args)
        assert csv_rows(tmp_path / "dipod_0.csv") == csv_rows(out / "dipod_0.csv")
        (tmp_path / "dipod_0.pt").unlink()


def test_killed_and_resumed_equals_uninterrupted(base, tmp_path):
    command = ["lm_task.py", "--steps", 20, "--prompts", 2, "--inner", 2, "--base", base]
    command += ["--methods", "dipod", "--decay", "--out"]
    process = subprocess.Popen(
        [sys.executable, *map(str, command), tmp_path / "cut"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    process.stdout.readline()  # the header
    printed = [process.stdout.readline() for _ in range(3)]
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before = csv_rows(tmp_path / "cut" / "dipod_0.csv")
    assert [row["step"] for row in before][:3] == [line.split()[2] for line in printed]
    assert len(before) < 10, "killed before the end"
    resumed = run(*command, tmp_path / "cut", "--resume")
    assert resumed.returncode == 0, resumed.stderr
    args = lm_args(base, steps=20, lr=3e-4, decay=True)
    settings = lm_task.settings_of("dipod", 0, args)
    lm_task.train(settings, tmp_path / "dipod_0.pt", (1, 1, 1), args)
    assert csv_rows(tmp_path / "cut" / "dipod_0.csv") == csv_rows(tmp_path / "dipod_0.csv")


def test_a_nan_stops_the_run_and_leaves_the_last_good_record(tmp_path, monkeypatch):
    settings = control_task.settings_of("fpo", 0, control_args(steps=20480))
    rollout, calls = control_task.rollout, []

    def broken(*args):
        batch, obs, returns = rollout(*args)
        calls.append(1)
        if len(calls) == 4:
            batch["advantages"][:] = math.nan
        return batch, obs, returns

    monkeypatch.setattr(control_task, "rollout", broken)
    path = tmp_path / "fpo_0.pt"
    with pytest.raises(FloatingPointError, match="non-finite gradient at step 8192"):
        control_task.train(settings, path, (1, 1, 1), control_args())
    state = dipod.load(path, "control")
    assert [row["step"] for row in state["rows"]] == [4096, 6144]
    assert all(p.isfinite().all() for p in state["policy"].values())


def good_train(settings, path, place, args):
    record = dipod.Run(path, settings, {"layer": nn.Linear(1, 1)}, place, args.resume)
    row = {"step": settings["steps"], "reward": 1.0, "gap": 0.0, "alignment": math.nan}
    record.add(1, row)


def some_raise(settings, path, place, args):
    if settings["seed"] == 0:
        raise MemoryError("no room\nfor two lines")
    good_train(settings, path, place, args)


def test_an_exception_in_one_run_is_one_line_and_the_others_go_on(tmp_path, capfd, monkeypatch):
    records = {}
    for seed in range(2):
        settings = {"task": "lm", "method": "fpo", "seed": seed, "steps": 3}
        records[tmp_path / f"fpo_{seed}.pt"] = settings
    errors = dipod.run_all(some_raise, records, Namespace(jobs=1, resume=False), "reward")

    def no_figure(*args):
        raise ImportError("no module named matplotlib")

    monkeypatch.setattr(dipod, "draw", no_figure)
    assert dipod.finish(records, errors) == 1
    out, err = capfd.readouterr()
    assert "fpo_0 stopped: MemoryError: no room\n" in err
    assert "fpo_0: step 0 of 3, stopped: MemoryError: no room" in out
    assert "fpo            1  1  " in out
    assert "no figure: no module named matplotlib" in out


def test_the_default_out_is_fresh_each_time(base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = lm_args(base, out=None, overwrite=False, first_seed=0, seeds=1, methods=["fpo"])
    names = [next(iter(dipod.prepare(args, lm_task.settings_of))).parent.name for _ in range(3)]
    assert names == ["lm-1", "lm-2", "lm-3"]


WRONG_COMMANDS = [
    ("control", "--lr 0", "--lr: expected a finite number"),
    ("control", "--beta nan", "--beta: expected a finite number"),
    ("control", "--steps 1e5", "--steps: expected a whole number"),
    ("control", "--methods fpo fpo", "--methods: expected each method once"),
    ("control", "--env Nowhere-v0", "--env Nowhere-v0: NameNotFound"),
    ("control", "--env CartPole-v1", "--env CartPole-v1: expected vectors and bounded actions"),
    ("control", "--env Broken-v0", "--env Broken-v0: OSError: no wheels"),
    ("control", "--eval LM/dipod_0.pt", "expected a checkpoint of control_task.py"),
    ("control", "--eval README.md", "not a checkpoint"),
    ("control", "--eval CUT", "not a checkpoint"),
    (
        "control",
        "--gif a.mp4 --eval CONTROL/dipod_0.pt",
        "--gif: expected a name that ends in .gif",
    ),
    ("control", "--out README.md/x", "README.md"),
    ("control", "--out CONTROL --methods dipod", "--resume goes on"),
    ("control", "--out CONTROL --methods dipod --resume --steps 8192", "steps 8192"),
    ("control", "--out LM --methods ppo", "expected a checkpoint of control_task.py"),
    ("lm", "--base CONTROL/dipod_0.pt", "expected a checkpoint of lm_task.py"),
    ("lm", "--base LM/dipod_0.pt --out LM --methods dipod --overwrite", "--base"),
    ("lm", "--base LM/fpo_0.pt --out LM --methods dipod --resume", "base"),
    ("lm", "--inner 0", "--inner: expected a whole number of at least 1"),
]


def broken_env(**kwargs):
    raise OSError("no wheels")


gym.register("Broken-v0", entry_point=broken_env)


@pytest.mark.parametrize(("task", "arguments", "said"), WRONG_COMMANDS)
def test_wrong_command_is_one_line_and_status_2(
    task, arguments, said, control, lm, tmp_path, monkeypatch, capsys
):
    cut = tmp_path / "cut.pt"
    cut.write_bytes((lm[2] / "dipod_0.pt").read_bytes()[:2000])
    places = {"CONTROL": control[1], "LM": lm[2], "CUT": cut, "README": ROOT / "README"}
    for name, place in places.items():
        arguments = arguments.replace(name, str(place))
    monkeypatch.setattr(sys, "argv", [f"{task}_task.py", *arguments.split()])
    monkeypatch.chdir(tmp_path)
    before = (lm[2] / "dipod_0.pt").read_bytes()
    with pytest.raises(SystemExit) as stop:
        {"control": control_task, "lm": lm_task}[task].main()
    out, err = capsys.readouterr()
    assert stop.value.code == 2
    assert out == ""
    assert len(err.splitlines()) == 1
    assert said in err
    assert (lm[2] / "dipod_0.pt").read_bytes() == before


def one_step(rank, world, base, path):
    """A process's share of two prompts' completions, one update, and the weights after it."""
    if world > 1:
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29517")
        dist.init_process_group("gloo", rank=rank, world_size=world)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = lm_task.load_model(base)
    net = nn.parallel.DistributedDataParallel(model) if world > 1 else model
    tokens, maskable, _ = lm_task.sample(model, torch.tensor([5, 9]), 4)
    advantages, draws = torch.randn(8), dipod.draw_masks(maskable, 4)
    part = slice(rank * 8 // world, (rank + 1) * 8 // world)
    batch = (tokens[part], maskable[part], dipod.MaskDraws(draws.mask[part], draws.weight[part]))
    settings = {"likelihood": "elbo", "beta": 0.3}
    with torch.no_grad():
        old = lm_task.likelihood(model, "elbo", *batch)
    loss, _ = lm_task.loss_of(settings, net, batch, advantages[part], old)
    loss.backward()
    torch.save([p.grad for p in model.parameters()], f"{path}_{rank}.pt")
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()
        time.sleep(0.2)


def test_two_processes_with_half_the_batch_take_the_step_of_one(base, tmp_path):
    one_step(0, 1, base, tmp_path / "one")
    torch.multiprocessing.spawn(one_step, (2, base, tmp_path / "two"), nprocs=2)
    alone = torch.load(tmp_path / "one_0.pt")
    for rank in range(2):
        together = torch.load(tmp_path / f"two_{rank}.pt")
        for a, b in zip(alone, together):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_the_method_stands_alone(tmp_path):
    method, _ = (ROOT / "dipod.py").read_text().split("# The method ends here.")
    (tmp_path / "copied.py").write_text(method)
    code = "import copied; print(sorted(copied.two_token(steps=1)))"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert result.stdout == "['alignment', 'gap', 'gap_AA', 'reward']\n", result.stderr
    imported = {
        line.split()[1].split(".")[0]
        for line in method.splitlines()
        if line[:5] == "from " or line[:7] == "import "
    }
    assert imported <= {"math", "typing", "torch"}
