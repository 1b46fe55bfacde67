"""Tests of the method: every formula against a slow one written out, value and gradient."""

import itertools
import math

import numpy as np
import pytest
import torch

import dipod
from dipod import FlowDraws, FlowPolicy, MaskDraws

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


def test_group_advantages_by_hand():
    rewards = torch.tensor([[0.0, 0.0, 1.0], [0.1, 0.1, 0.1]], requires_grad=True)
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
        for time in torch.tensor([1, 2 / 3, 1 / 3]).double().view(3, 1, 1).expand(3, 4, 1):
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
        ("action", lambda: dipod.flow_log_prob(torch.mul, BA, 2, action=BA[:1])),
    ],
)
def test_wrong_call(argument, call):
    with pytest.raises(ValueError, match=f"^{argument}: expected .* got "):
        call()
