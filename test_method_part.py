"""Tests of the method: every formula against a slow one written out, value and gradient."""

import inspect
import itertools
import math

import numpy as np
import pytest
import torch
from torch.utils._pytree import tree_map_only

import dipod
from dipod import FlowDraws, FlowPolicy, MaskDraws

torch.set_num_threads(1)
PATHS = pytest.mark.parametrize("path", ["linear", "vp"])
NORMAL = torch.distributions.Normal(0.0, 1.0)


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


def randn(*shape):
    return torch.randn(shape, dtype=torch.float64)


def leaf(*shape):
    return randn(*shape).requires_grad_()


def gradient(y, x):
    return torch.autograd.grad(y, x, retain_graph=True, materialize_grads=True)[0]


def same(a, b, *inputs):
    """Equal values, and equal gradients of one random projection of them."""
    torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    direction = torch.randn_like(a)
    for x in inputs:
        ours, expected = (gradient((direction * y).sum(), x) for y in (a, b))
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)


# 1. The loss


def loss_by_loop(elbo, old_elbo, advantages, beta, clip, trust_region, weight, distill_elbo):
    total = 0.0
    for b, a in enumerate(advantages):
        surrogates = []
        for new, old in zip(elbo[b].reshape(-1), old_elbo[b].reshape(-1)):
            ratio = math.e ** (new - old)
            ppo = min(ratio * a, min(max(ratio, 1 - clip), 1 + clip) * a)
            spo = ratio * a - abs(a) / (2 * clip) * (ratio - 1) ** 2
            aspo = ppo if a > 0 else spo
            surrogates.append({"ppo": ppo, "spo": spo, "aspo": aspo}[trust_region])
        objective = sum(surrogates) / len(surrogates) + beta * distill_elbo[b].mean()
        total = total - weight[b] * objective
    return total / weight.sum()


@pytest.mark.parametrize("trust_region", ["ppo", "spo", "aspo"])
@pytest.mark.parametrize("shape", [(12,), (12, 3)])
@pytest.mark.parametrize("weight", [None, torch.arange(12.0)])
def test_dipod_loss_against_a_loop(trust_region, shape, weight):
    elbo, distill_elbo = leaf(*shape), leaf(12, 5)
    old_elbo = elbo.detach() + 0.4 * randn(*shape)
    arguments = (elbo, old_elbo, randn(12), 0.3, 0.2, trust_region)
    w = torch.ones(12) if weight is None else weight
    loss, info = dipod.dipod_loss(*arguments, weight)
    same(loss, loss_by_loop(*arguments, w, elbo), elbo)
    ratio = (elbo - old_elbo).exp().detach()
    clipped = ((ratio - 1).abs() > 0.2).double()
    for name, x in {"elbo": elbo, "ratio": ratio, "clip_fraction": clipped}.items():
        same(info[name], w.double() @ x.detach().view(12, -1).mean(1) / w.sum())
    same(info["policy_loss"], loss.detach() + 0.3 * info["elbo"])
    # Another ELBO for the regularizer, with a number of draws of its own, replaces that term alone.
    loss, _ = dipod.dipod_loss(*arguments, weight, distill_elbo)
    same(loss, loss_by_loop(*arguments, w, distill_elbo), elbo, distill_elbo)


@pytest.mark.parametrize("shape", [(12,), (12, 3)])
@pytest.mark.parametrize("weight", [None, torch.arange(12.0)])
def test_spg_loss_against_a_loop(shape, weight):
    elbo, eubo, advantages = leaf(*shape), leaf(12), randn(12)
    w = torch.ones(12) if weight is None else weight
    expected = 0.0
    for b, a in enumerate(advantages):
        lower = elbo[b].mean()
        score = lower if a > 0 else 0.25 * eubo[b] + 0.75 * lower
        expected = expected - w[b] * (a * score + 0.3 * lower) / w.sum()
    loss, _ = dipod.spg_loss(elbo, eubo, advantages, 0.3, 0.25, weight)
    same(loss, expected, elbo, eubo)


def test_before_the_first_update_dipod_is_an_advantage_shifted_by_beta():
    draws, advantages = leaf(6, 4), randn(6)
    shifted = -((advantages + 0.3) * draws.mean(1)).mean()
    for elbo in (draws, draws.mean(1)):
        loss, info = dipod.dipod_loss(elbo, elbo.detach(), advantages, beta=0.3)
        torch.testing.assert_close(gradient(loss, draws), gradient(shifted, draws))
        assert info["ratio"] == 1 and info["clip_fraction"] == 0


def test_cap_of_the_log_ratio_keeps_the_gradient_and_old_elbo_is_a_constant():
    elbo, old_elbo = torch.tensor([50.0], requires_grad=True), torch.zeros(1, requires_grad=True)
    loss, _ = dipod.dipod_loss(elbo, old_elbo, torch.tensor([-1.0]), beta=0.0)
    assert loss.item() == pytest.approx(math.exp(10))
    assert gradient(loss, elbo).item() == pytest.approx(math.exp(10))
    assert gradient(loss, old_elbo) == 0


def both_losses(elbo, other, advantages, weight=None, beta=0.3, clip=0.2):
    loss, _ = dipod.dipod_loss(elbo, other, advantages, beta, clip, "aspo", weight)
    spg, _ = dipod.spg_loss(elbo, other.mean(1), advantages, beta, weight=weight)
    return torch.stack((loss, spg))


@pytest.mark.parametrize("bad", [math.nan, -math.inf])
def test_weight_0_removes_a_row_whatever_it_holds(bad):
    elbo, other, advantages = leaf(3, 2), randn(3, 2), randn(3)
    row = torch.full((1, 2), bad)
    padded = (torch.cat((elbo, row)), torch.cat((other, row)), torch.cat((advantages, row[0, :1])))
    losses = both_losses(*padded, torch.tensor([1.0, 1.0, 1.0, 0.0]))
    same(losses, both_losses(elbo, other, advantages), elbo)


def test_weights_that_are_all_0_are_refused_where_values_are_read_and_give_0_elsewhere():
    elbo = leaf(3, 2)
    arguments = (elbo, elbo.detach(), randn(3), torch.zeros(3))
    with pytest.raises(ValueError, match="weight"):
        both_losses(*arguments)
    losses = torch.compile(both_losses, fullgraph=True, backend="eager")(*arguments)
    same(losses, 0 * elbo.sum(0), elbo)


@PATHS
def test_compiles_to_one_graph_while_beta_and_clip_are_scheduled(path):
    def train_loss(action, draws, old_elbo, advantages, beta, clip):
        elbo = dipod.flow_elbo(lambda x, time: x * time, action, draws, path)
        return both_losses(elbo, old_elbo, advantages, None, beta, clip)

    # With the backend "eager", a number that is compiled anew at each of its values goes unseen.
    torch.compiler.reset()
    compiled = torch.compile(train_loss, fullgraph=True, backend="aot_eager")
    action = leaf(3, 2)
    fixed = (dipod.draw_flow(action, 2), randn(3, 2), randn(3))
    for i in range(1, 21):
        schedule = (0.03 * i, 0.02 * i)
        same(compiled(action, *fixed, *schedule), train_loss(action, *fixed, *schedule), action)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_networks_have_float32_elbos_and_losses(dtype):
    network, table = torch.nn.Linear(2, 2), torch.randn(4, 3)
    tokens, action = torch.zeros(8, 3).long(), torch.randn(8, 2)
    masks, draws = dipod.draw_masks(tokens == 0, 4), dipod.draw_flow(action, 4)
    results = []
    for precision in (torch.float32, dtype):
        field, logits, a = (x.to(precision) for x in (network, table, action))
        results.append([*dipod.masked_bounds(lambda t: logits[t], tokens, masks, 3)])
        for score in (dipod.flow_elbo, dipod.flow_bound):
            results[-1].append(score(lambda x, time: field(x), a, draws))
    for full, half in zip(*results):
        torch.testing.assert_close(full, half, rtol=0.05, atol=0.05)  # this compares dtypes too
    elbo, other = (-2 - torch.rand(2, 8, 4)).to(dtype)
    losses, full = (both_losses(*x, torch.ones(8)) for x in ((elbo, other), (elbo.float(), other)))
    torch.testing.assert_close(losses, full)


def test_losses_are_those_of_the_authors_published_code():
    # Their outputs for random inputs of ours. First FPO for language, and SPG.
    advantages = torch.tensor([1.0, -0.5, 0.3, -1.2, 0.0, 0.4])
    old = [-18.393060684, -3.820459127, -15.894586563, -3.756222248, -19.982540131, -20.367469788]
    new = [-17.932073593, -3.61515975, -16.329538345, -3.587201357, -19.993322372, -21.067516327]
    fpo, _ = dipod.dipod_loss(torch.tensor(new), torch.tensor(old), advantages, beta=0.05, clip=0.2)
    assert fpo.item() == pytest.approx(0.7613911882116764, abs=1e-6)
    elbo = [-2.235543489, -2.428487062, -2.481782198, -2.470957041, -2.521459341, -2.380939722]
    eubo = [-2.235543489, -2.454542364, -2.481782198, -2.512751943, -2.860823531, -2.380939722]
    lengths = torch.tensor([8.0, 6.0, 8.0, 3.0, 8.0, 8.0])
    spg, _ = dipod.spg_loss(*torch.tensor([elbo, eubo]), advantages, 0.05, 0.5, weight=lengths)
    assert spg.item() == pytest.approx(0.49052418348750965, abs=1e-6)
    # FPO++ without a regularizer, where only the log ratios matter: 4 draws of 7 samples.
    log_ratio = """-0.076734232  0.116757475  0.136795607  0.200402324
                   -0.100011298 -0.218998512 -0.049982661 -0.004819553
                    0.645399208  0.337374140  0.769810335  0.612490560
                    0.196064577  0.476636495  0.105920653 -0.052380123
                   -0.152706804  0.011380255 -0.014868820 -0.192197200
                   -0.126761320  0.118988855  0.949055298 -0.013685596
                   -0.192718097 -0.196481219 -0.209014063  0.082311957"""
    log_ratio = torch.tensor([float(x) for x in log_ratio.split()]).view(7, 4)
    advantages = [-1.363382699, 0.623938958, -1.048961992, 0.329320921]
    advantages = torch.tensor([*advantages, 1.586795456, -0.297627696, 0.551272738])
    per_draw = {"ppo": 0.14299066441215838, "spo": 1.6967048831405325, "aspo": 1.5947241225001492}
    for trust_region, expected in per_draw.items():
        loss, _ = dipod.dipod_loss(log_ratio, 0 * log_ratio, advantages, 0.0, 0.05, trust_region)
        assert loss.item() == pytest.approx(expected, abs=1e-6)


def test_group_advantages_by_hand():
    rewards = torch.tensor([[0.0, 0.0, 1.0], [0.7, 0.7, 0.7]], requires_grad=True)
    centred = rewards[0] - rewards[0].sum() / 3
    same(dipod.group_advantages(rewards, normalize=False)[0], centred, rewards)
    std = (centred.square().sum() / 2).sqrt()
    same(dipod.group_advantages(rewards)[0], centred / (std + 1e-4), rewards)
    assert (dipod.group_advantages(rewards)[1] == 0).all()  # exactly


# 2. Masked diffusion


class Table:
    """A model without structure: tokens 0..V-1, V the mask, free logits for every context."""

    def __init__(self, width, vocabulary):
        self.powers = (vocabulary + 1) ** torch.arange(width)
        self.logits = leaf((vocabulary + 1) ** width, width, vocabulary)

    def __call__(self, tokens):
        return 2 * self.logits[(tokens * self.powers).sum(-1)]


def test_draw_masks_is_uniform_in_every_column_and_antithetic_in_pairs():
    maskable = torch.tensor([False, True, True, True, True]).expand(20_000, -1)
    mask, weight = dipod.draw_masks(maskable, 3)
    size = mask.sum(-1)
    assert not mask[..., 0].any() and (weight * size == 4).all()
    for column, k in itertools.product(range(3), range(1, 5)):
        chosen = size[:, column] == k
        assert chosen.double().mean().item() == pytest.approx(1 / 4, abs=0.02)
        shares = mask[chosen, column, 1:].double().mean(0)
        assert shares.numpy() == pytest.approx(k / 4, abs=0.04)
    # A pair masks every token, and one of them twice.
    assert mask[:, :2, 1:].any(1).all() and (size[:, :2].sum(1) == 5).all()


@pytest.mark.parametrize(("power", "num_draws"), [(1.0, 1), (1.5, 2), (4.0, 5)])
def test_masked_elbo_and_masked_bounds_against_loops(power, num_draws):
    model, tokens = Table(4, 2), torch.randint(0, 2, (4, 4))
    maskable = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 1]]).bool()
    draws = dipod.draw_masks(maskable, num_draws)
    elbo, eubo = dipod.masked_bounds(model, tokens, draws, 2, power)
    same(dipod.masked_elbo(model, tokens, draws, 2), elbo, model.logits)
    for b, length in enumerate((3, 2, 4, 1)):
        upper = {}  # has no entry for a token that no draw masks
        for n, mask in enumerate(draws.mask[b]):
            log_p = model(tokens[b].where(~mask, 2)[None])[0].log_softmax(-1)
            masked = mask.nonzero()[:, 0].tolist()
            weight = length / len(masked)
            estimate = weight * sum(log_p[i, tokens[b, i]] for i in masked)
            same(elbo[b, n], estimate, model.logits)
            for i in masked:
                upper[i] = upper.get(i, 0.0) + weight * log_p[i, tokens[b, i]].exp() ** power
        per_token = [(total / num_draws).log() / power for total in upper.values()]
        same(eubo[b], length * sum(per_token) / len(per_token), model.logits)


def test_masked_elbo_is_unbiased_and_eubo_is_above_for_large_powers_only():
    model, tokens = Table(3, 2), torch.tensor(list(itertools.product(range(2), repeat=3)))
    log_prob, exact = dipod.exact_likelihood(model, tokens, tokens >= 0, 2)
    draws = dipod.draw_masks(tokens >= 0, 8000)
    elbo, eubo = dipod.masked_bounds(model, tokens, draws, 2, power=3.0)
    for column in (elbo[:, ::2], elbo[:, 1::2]):
        assert ((column.mean(1) - exact).abs() < 4 * column.std(1) / math.sqrt(4000)).all()
    assert (eubo > log_prob).all()
    assert (dipod.masked_bounds(model, tokens, draws, 2, power=1.0)[1] < log_prob - 0.1).any()


def test_masked_bounds_of_a_row_that_no_draw_masks_are_0_with_gradient_0():
    model = Table(3, 2)
    draws = MaskDraws(torch.zeros(1, 2, 3).bool(), torch.ones(1, 2))
    for bound in dipod.masked_bounds(model, torch.zeros(1, 3).long(), draws, 2):
        assert (bound == 0).all() and (gradient(bound.sum(), model.logits) == 0).all()


@pytest.mark.parametrize("mask_id", [2, np.int64(2), np.int32(2)])
def test_mask_id_may_be_a_numpy_integer_and_is_refused_among_the_scored_tokens(mask_id):
    model, tokens = Table(3, 2), torch.tensor([[2, 0, 1]])
    assert (dipod.sample_masked(model, tokens, mask_id) != 2).all()
    in_the_prompt = dipod.draw_masks(tokens != 2, 2)
    assert dipod.masked_elbo(model, tokens, in_the_prompt, mask_id).isfinite().all()
    with pytest.raises(ValueError, match="tokens"):
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


# 3. Flow policy


def tiny_field():
    """A smooth field with parameters, different in each of 4 rows."""
    weights, rows = leaf(4, 2, 2), randn(4, 2)

    def velocity(x, time):
        shift = rows if x.dim() == 2 else rows[:, None]
        hidden = torch.tanh(x @ weights[0] + shift @ weights[1] + time * weights[3, 0])
        return 0.5 * hidden @ weights[2]

    return velocity, weights


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

    (velocity, weights), action = tiny_field(), leaf(4, 2)
    draws = dipod.draw_flow(action, 3)
    elbo = dipod.flow_elbo(velocity, action, draws, path)
    bound = dipod.flow_bound(velocity, action, draws, path, min_time=0.1)
    for n, (time, noise) in enumerate(zip(draws.time.unbind(1), draws.noise.unbind(1))):
        alpha, sigma, d_alpha, d_sigma = coefficients(time)
        error = velocity(alpha * action + sigma * noise, time) - d_alpha * action - d_sigma * noise
        same(elbo[:, n], -(error**2).sum(1) / 2, weights, action)
        # VDM's form: half the slope of the signal-to-noise ratio times the squared error of the
        # action that the velocity predicts, less that of a standard normal's best prediction.
        alpha, sigma, _, d_sigma = coefficients(0.1 + 0.9 * time)
        x = alpha * action + sigma * noise
        predicted = d_sigma * x - sigma * velocity(x, 0.1 + 0.9 * time)
        best = alpha * x / (alpha**2 + sigma**2)
        excess = ((predicted - action) ** 2 - (best - action) ** 2).sum(1)
        length = 0.9 if path == "linear" else 0.9 * math.pi / 2
        integral = length * (alpha / sigma**3)[:, 0] * excess
        same(bound[:, n], NORMAL.log_prob(action).sum(1) - integral, weights, action)


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
    (velocity, weights), noise = tiny_field(), leaf(4, 2)
    dtau = (1.0 if path == "linear" else math.pi / 2) / 3

    def sample(x):
        for time in (1, 2 / 3, 1 / 3):
            slope = velocity(x, time)
            if method == "midpoint":
                slope = velocity(x - dtau / 2 * slope, time - 1 / 6)
            x = x - dtau * slope
        return x

    same(dipod.flow_sample(velocity, noise, 3, method, path), sample(noise), noise, weights)
    action, log_prob = dipod.flow_log_prob(velocity, noise, 3, method, path)
    same(action, sample(noise).detach())
    same(log_prob, exact_log_prob(sample, noise.detach()), weights)


@pytest.mark.parametrize("form", [{"tight": True}, {"tight": False}, {"flow": False}])
def test_policy_s_density_elbo_and_bound(form):
    policy = FlowPolicy(3, 2, scale=0.5, **form).double()
    parameters = [p for p in policy.parameters() if p.requires_grad]
    for p in parameters:
        p.data += 0.3 * randn(*p.shape)
    obs, noise = randn(500, 3), randn(500, 2)

    def sample(noise):  # with a gradient, which policy.sample has not
        z = (
            dipod.flow_sample(policy.velocity(obs), noise, **policy.solver)
            if policy.flow
            else noise
        )
        return policy.mean(obs) + policy.log_std.exp() * z if policy.mean else z

    action = policy.sample(obs, noise)
    same(action, sample(noise).detach())
    log_prob = policy.log_prob(obs, noise)
    same(log_prob, exact_log_prob(sample, noise), *parameters)
    draws = dipod.draw_flow(action, 16)
    elbo = policy.elbo(obs, action, draws)
    if policy.flow:
        z = (action - policy.mean(obs)) / policy.log_std.exp() if policy.mean else action
        expected = 2 * dipod.flow_elbo(policy.velocity(obs), z, draws, policy.solver["path"])
        same(elbo, expected - policy.log_std.sum(), *parameters)
        assert (log_prob - policy.bound(obs, action, draws)).mean() > 0
    else:
        same(elbo[:, 0], log_prob, *parameters)


def test_policy_starts_tight_with_the_gaussian_s_score():
    policy = FlowPolicy(3, 2).double()
    obs, noise = randn(5, 3), randn(5, 2)
    action = policy.sample(obs, noise)
    gaussian = torch.distributions.Normal(policy.mean(obs), policy.log_std.exp())
    score = gaussian.log_prob(action).sum(1, keepdim=True)
    # These draws average cos, sin, their squares and noise times them as the whole interval does.
    time = torch.tensor([0.25, 0.25, 0.75, 0.75]).view(1, 4, 1).expand(5, 4, 1)
    draws = FlowDraws(time, torch.tensor([1.0, -1.0, 1.0, -1.0]).view(1, 4, 1).expand(5, 4, 2))
    head = [*policy.mean.parameters(), policy.log_std]
    same(policy.log_prob(obs, noise)[:, None], score, *head)
    same(policy.bound(obs, action, draws), score.expand(5, 4))
    elbo = policy.elbo(obs, action, draws).mean(1, keepdim=True)
    same(elbo - elbo.detach(), score - score.detach(), *head)


# 4. and 5. The drift


def test_exact_likelihood_against_all_decoding_orders_and_the_sampler():
    model = Table(4, 2)
    completions = torch.tensor(list(itertools.product(range(2), repeat=3)))
    tokens = torch.cat((torch.ones(8, 1).long(), completions), 1)
    maskable = torch.tensor([False, True, True, True]).expand(8, 4)
    log_prob, elbo = dipod.exact_likelihood(model, tokens, maskable, 2)
    pi = log_prob.exp().detach()
    samples = dipod.sample_masked(
        model, tokens[:1].expand(40_000, -1).masked_fill(maskable[:1], 2), 2
    )
    for b in range(8):
        orders = []
        for order in itertools.permutations((1, 2, 3)):
            context = tokens[b].masked_fill(maskable[b], 2)
            total = 0.0
            for i in order:
                total = total + model(context[None])[0, i].log_softmax(-1)[tokens[b, i]]
                context[i] = tokens[b, i]
            orders.append(total)
        orders = torch.stack(orders)
        same(log_prob[b], orders.exp().mean().log(), model.logits)
        same(elbo[b], orders.mean(), model.logits)
        share = (samples == tokens[b]).all(1).double().mean()
        assert (share - pi[b]).abs() < 4 * (pi[b] / 40_000).sqrt()
    # On policy the likelihood has no gradient, so that of the ELBO is minus that of the gap.
    assert pi.sum().item() == pytest.approx(1)
    assert gradient(pi @ log_prob, model.logits).abs().max() < 1e-12
    on_policy = gradient(pi @ elbo, model.logits)
    same(on_policy, -gradient(pi @ (log_prob - elbo), model.logits))
    assert on_policy.norm() > 0.01


def test_alignment_by_hand():
    a, b, unused = leaf(2), leaf(1), leaf(3)
    proxy, true = 3 * a[0] + 4 * b.sum(), 5 * a.sum()
    # The gradients over (a, b) are (3, 0, 4) and (5, 5, 0).
    cosine = dipod.alignment(proxy, true, iter([a, b, unused]))
    assert cosine.item() == pytest.approx(15 / (5 * math.sqrt(50)))
    assert dipod.alignment(proxy, 0 * true, [a, b]).isnan()


def test_two_token_against_the_formulas_written_out():
    rewards = torch.tensor([0.8, 1.0, 0.7, 1.0]).double()
    history = dipod.two_token(beta=0.1, steps=40, lr=2.0)
    theta = torch.zeros(6).double().requires_grad_()
    for step in range(41):
        p1_a, p1_b, p1_m, p2_a, p2_b, p2_m = theta.sigmoid()  # of A, given the other token
        q1_a, q1_b, q1_m, q2_a, q2_b, q2_m = 1 - theta.sigmoid()
        left = torch.stack((p1_m * p2_a, p1_m * q2_a, q1_m * p2_b, q1_m * q2_b))
        right = torch.stack((p2_m * p1_a, q2_m * p1_b, p2_m * q1_a, q2_m * q1_b))
        log_prob, elbo = ((left + right) / 2).log(), (left.log() + right.log()) / 2
        pi, gap = log_prob.exp().detach(), (log_prob - elbo).detach()
        a = rewards - pi @ rewards
        proxy, true = gradient((pi * a) @ elbo, theta), gradient((pi * a) @ log_prob, theta)
        cosine = proxy @ true / (proxy.norm() * true.norm())
        expected = {"gap_AA": gap[0], "gap": pi @ gap, "alignment": cosine, "reward": pi @ rewards}
        for name, value in expected.items():
            same(history[name][step], value)
        with torch.no_grad():
            theta += 2.0 * gradient((pi * (a + 0.1)) @ elbo, theta)
    assert len(history["gap"]) == 41


# Devices and wrong calls


def field(x, time):
    return 0.5 * x


def model(tokens):
    return torch.zeros(*tokens.shape, 3, device=tokens.device)


B, BN, BA, BT = torch.ones(3), torch.ones(3, 4), torch.ones(3, 2), torch.zeros(3, 5).long()
MASK, FLOW = (
    MaskDraws(torch.ones(3, 4, 5) > 0, BN),
    FlowDraws(BN[..., None] / 2, torch.ones(3, 4, 2)),
)
CALLS = {
    "dipod_loss": {"elbo": BN, "old_elbo": BN, "advantages": B, "weight": B},
    "spg_loss": {"elbo": BN, "eubo": B, "advantages": B, "weight": B},
    "group_advantages": {"rewards": BN},
    "draw_masks": {"maskable": BT == 0, "num_draws": 4},
    "draw_flow": {"action": BA, "num_draws": 4},
    "flow_elbo": {"velocity": field, "action": BA, "draws": FLOW},
    "flow_bound": {"velocity": field, "action": BA, "draws": FLOW},
    "flow_sample": {"velocity": field, "noise": BA, "num_steps": 2},
    "flow_log_prob": {"velocity": field, "noise": BA, "num_steps": 2, "action": BA},
    "masked_elbo": {"model": model, "tokens": BT, "draws": MASK, "mask_id": 3},
    "masked_bounds": {"model": model, "tokens": BT, "draws": MASK, "mask_id": 3},
    "sample_masked": {"model": model, "tokens": BT, "mask_id": 3},
    "exact_likelihood": {"model": model, "tokens": BT, "maskable": BT == 0, "mask_id": 3},
    "alignment": {"proxy": B.sum(), "true": B.sum(), "parameters": [B]},
    "two_token": {"steps": 1},
}


@pytest.mark.parametrize("name", list(CALLS)[:9])
def test_everything_is_made_on_the_device_of_the_input(name):
    on_meta = tree_map_only(torch.Tensor, lambda x: x.to("meta"), CALLS[name])
    ours, expected = (getattr(dipod, name)(**arguments) for arguments in (on_meta, CALLS[name]))
    tree_map_only(torch.Tensor, lambda x: x.to("meta"), expected)
    torch.testing.assert_close(ours, tree_map_only(torch.Tensor, lambda x: x.to("meta"), expected))


@pytest.mark.parametrize(
    ("name", "wrong", "said"),
    [
        ("dipod_loss", {"advantages": B[:, None]}, "advantages"),  # would broadcast to (B, B)
        ("dipod_loss", {"elbo": B[:, None], "old_elbo": B}, "old_elbo"),
        ("dipod_loss", {"elbo": BN[None], "old_elbo": BN[None]}, "elbo"),
        ("dipod_loss", {"elbo": BN[:, :0], "old_elbo": BN[:, :0]}, "elbo"),
        ("dipod_loss", {"distill_elbo": B[:1]}, "distill_elbo"),
        ("dipod_loss", {"weight": B[:, None]}, "weight"),
        ("dipod_loss", {"weight": torch.tensor([1.0, 1.0, -1.0])}, "weight"),
        ("dipod_loss", {"beta": -0.1}, "beta"),
        ("dipod_loss", {"beta": math.nan}, "beta"),
        ("dipod_loss", {"clip": 0.0}, "clip"),
        ("dipod_loss", {"trust_region": "trpo"}, "trust_region"),
        ("spg_loss", {"eubo": B[:, None]}, "eubo"),
        ("spg_loss", {"mix": 1.1}, "mix"),
        ("spg_loss", {"weight": 0 * B}, "weight"),
        ("group_advantages", {"rewards": B[:, None]}, "rewards"),  # G = 1
        ("draw_masks", {"maskable": BT > 0}, "maskable"),  # empty completions
        ("draw_flow", {"action": BA[:, :0]}, "action"),
        ("masked_elbo", {"draws": MASK._replace(weight=B)}, "weight"),
        ("masked_bounds", {"tokens": BT[:1]}, "mask"),
        ("masked_bounds", {"power": 0.5}, "power"),
        ("sample_masked", {"temperature": -1.0}, "temperature"),
        ("exact_likelihood", {"maskable": torch.ones(3, 5).tril() > 0}, "maskable"),
        ("flow_elbo", {"draws": FLOW._replace(time=BN)}, "time"),
        ("flow_elbo", {"velocity": lambda x, time: x[..., :1]}, "velocity"),
        ("flow_elbo", {"path": "cosine"}, "path"),
        ("flow_bound", {"velocity": lambda x, time: x[..., :1]}, "velocity"),
        ("flow_sample", {"noise": B}, "noise"),
        ("flow_sample", {"method": "heun"}, "method"),
        ("flow_sample", {"num_steps": 0}, "num_steps"),
        ("flow_log_prob", {"action": BA[:1]}, "action"),
        ("alignment", {"proxy": B}, "proxy"),
        ("two_token", {"beta": -1.0}, "beta"),
    ],
)
def test_wrong_call(name, wrong, said):
    with pytest.raises(ValueError, match=rf"^{said}: expected .*, got "):
        getattr(dipod, name)(**CALLS[name] | wrong)
