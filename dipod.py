# MIT License, Copyright (c) 2026 The DiPOD reference implementation authors.
"""DiPOD: Diffusion Policy Optimization without Drifting Apart (arXiv 2606.13795), in one file.

RL on a diffusion policy cannot evaluate log pi(a|o). It climbs a lower bound instead:

    log_prob = log pi(a|o)          the sampler's true log-likelihood
    elbo    <= log_prob             the bound that is cheap to estimate
    gap      = log_prob - elbo      >= 0

    true policy gradient   E[A grad log_prob]     A the advantage, E the mean over pi
    proxy policy gradient  E[A grad elbo] = E[A grad log_prob] - E[A grad gap]

First drift: updates on the proxy let the gap grow. Second drift: E[A grad gap] then turns the proxy
away from the true gradient. On policy E[grad log_prob] = 0, so E[grad elbo] = -E[grad gap]: raising
the ELBO of the policy's own samples (self-distillation) only lowers their gap. DiPOD adds their
mean ELBO to every policy-gradient update. `two_token`, section 5, shows it all in 30 lines.

Shapes: B samples, N draws (of masks or noise, to estimate an ELBO), T tokens of which L are
maskable, V vocabulary, O observation and A action dimensions. Likelihoods are in nats; higher is
better. A wrong argument is a ValueError that names it. [DiPOD] marks what DiPOD adds to a loss.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn


# 1. The loss. The sections below only provide the ELBOs that go into it.
def _expect(ok, name, rule, got):
    if isinstance(ok, Tensor) and (ok.device.type != "cpu" or torch.compiler.is_compiling()):
        return  # only a CPU tensor's value is checked: reading a GPU's would stall it
    if not ok:
        raise ValueError(f"{name}: expected {rule}, got {got}")


def _check_shapes(**expected):
    """Same letter, same size, nothing broadcasts: _check_shapes(elbo=(elbo, "BN"), ...)."""
    sizes = {"1": 1}
    for name, (tensor, letters) in expected.items():
        sizes = dict(zip(letters, tensor.shape)) | sizes  # the first tensor with a letter sets it
        want = tuple(sizes.get(letter, letter) for letter in letters)
        rule = f"shape ({', '.join(letters)}) = {want}, none of them 0"
        _expect(tensor.shape == want and 0 not in want, name, rule, tuple(tensor.shape))


def dipod_loss(
    elbo,
    old_elbo,
    advantages,
    beta=0.05,
    clip=0.2,
    trust_region="ppo",
    weight=None,
    distill_elbo=None,
):
    """DiPOD, Algorithm 2: -mean(surrogate(exp(elbo - old_elbo), A)) - beta * mean(distill_elbo).

    Args:
        elbo: (B,) for one ratio per sample (FPO: the mean over draws), or (B, N) for one per draw.
            A sequence's log ratio grows with its length L: for long ones pass all ELBOs / L.
        old_elbo: as `elbo`, by the policy that sampled, from the same draws. A constant.
        advantages: (B,).
        beta: >= 0, in the unit of the advantages, to which it is added (below). 0: FPO, 2507.21053.
        clip: > 0, the ratio's trust region is 1 - clip to 1 + clip. A ratio is capped at exp(10).
        trust_region: "ppo", "spo" or "aspo", see `_surrogate`.
        weight: (B,) >= 0, so that a mean over samples is sum(w*x) / sum(w). If a batch is split,
            multiply each part's loss by its share of sum(w). Lengths only with ELBOs per token.
        distill_elbo: (B,) or (B, M), the ELBO that beta multiplies, if it is not `elbo`: that of
            newly sampled actions, or of the flow alone (`FlowPolicy.latent_elbo`).
    Returns: loss, 0-d; info, detached 0-d "policy_loss", "elbo", "ratio", "clip_fraction".
    """
    beta, weight = _check_loss(elbo, advantages, beta, weight)
    distill_elbo = elbo if distill_elbo is None else distill_elbo
    shape = "B" if distill_elbo.dim() == 1 else "BM"
    _check_shapes(advantages=(advantages, "B"), distill_elbo=(distill_elbo, shape))
    _expect(old_elbo.shape == elbo.shape, "old_elbo", f"{elbo.shape} as elbo", old_elbo.shape)
    _expect(not isinstance(clip, Tensor) or clip.dim() == 0, "clip", "one number", clip)
    _expect(clip > 0, "clip", "a number > 0", clip)
    log_ratio = _rows(elbo, weight) - _rows(old_elbo.detach(), weight)  # (B, N) or (B, 1)
    excess = (log_ratio - 10).clamp(min=0)  # exp(10) is the largest ratio
    ratio = (log_ratio - excess.detach()).exp()  # clamp(max=10) would lose the gradient there
    width = clip * torch.ones_like(ratio)  # torch.compile would compile anew for each number
    policy_loss = -_mean(_surrogate(ratio, advantages, width, trust_region), weight)
    # Before the first update (ratio 1, nothing clipped), and if distill_elbo is elbo, the gradient
    # of this loss is that of -mean((A + beta) * elbo): DiPOD is an advantage shifted by beta.
    # Algorithm 1 alternates two special cases: beta = 0, and advantages of 0 on fresh samples.
    loss = policy_loss - beta * _mean(distill_elbo, weight)  # [DiPOD]
    info = {"policy_loss": policy_loss, "elbo": _mean(elbo, weight), "ratio": _mean(ratio, weight)}
    info["clip_fraction"] = _mean((ratio - 1).abs() > width, weight)
    return loss, {name: value.detach() for name, value in info.items()}


def _surrogate(ratio, advantages, clip, trust_region):
    """PPO's clip (1707.06347), SPO's penalty (2401.16025), FPO++'s ASPO (2602.02481)."""
    a = advantages[:, None]
    ppo = torch.minimum(ratio * a, ratio.clamp(1 - clip, 1 + clip) * a)
    spo = ratio * a - a.abs() / (2 * clip) * (ratio - 1).square()
    surrogates = {"ppo": ppo, "spo": spo, "aspo": torch.where(a > 0, ppo, spo)}
    _expect(trust_region in surrogates, "trust_region", f"one of {[*surrogates]}", trust_region)
    return surrogates[trust_region]


def _check_loss(elbo, advantages, beta, weight):
    """Checks what `dipod_loss` and `spg_loss` share. Returns beta and weight (B,), by default 1."""
    weight = _upcast(torch.ones_like(advantages) if weight is None else weight)
    shape = "B" if elbo.dim() == 1 else "BN"
    _check_shapes(elbo=(elbo, shape), advantages=(advantages, "B"), weight=(weight, "B"))
    _expect(not isinstance(beta, Tensor) or beta.dim() == 0, "beta", "one number", beta)
    _expect((beta >= 0) & (beta < math.inf), "beta", "a finite number >= 0", beta)
    usable = (weight >= 0).all() & (weight.sum() > 0) & (weight.sum() < math.inf)
    _expect(usable, "weight", "finite values >= 0 with a sum > 0", weight)
    return 1.0 * beta, weight  # torch.compile drops the gradient if beta is the int 0


def _upcast(x):
    """float32 or better: bfloat16 rounds an ELBO of -40 to a multiple of 0.25."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _rows(x, weight):
    """x, (B,) or (B, N), as (B, 1) or (B, N); 0 where the weight is 0, because 0 * NaN is NaN."""
    return _upcast(x).view(len(x), -1).masked_fill(weight[:, None] == 0, 0.0)


def _mean(x, weight):
    """Mean over draws, then weighted mean over samples: 0-d. All weights 0, unchecked, give 0."""
    per_sample = _rows(x, weight).mean(1)
    return (weight * per_sample).sum() / weight.sum().clamp(min=torch.finfo(weight.dtype).tiny)


def spg_loss(elbo, eubo, advantages, beta=0.05, mix=0.5, weight=None):
    """SPG (2510.09541) with DiPOD's regularizer: mean(-A * score) - beta * mean(elbo), no ratio.

    score is elbo where A > 0, else mix * eubo + (1 - mix) * elbo. eubo (B,) is an upper bound on
    log_prob (`masked_bounds`), elbo is (B,) or (B, N), 0 <= mix <= 1; the rest as in `dipod_loss`.
    Returns: loss, 0-d; info, detached 0-d "policy_loss", "elbo", "eubo".
    """
    beta, weight = _check_loss(elbo, advantages, beta, weight)
    _expect(eubo.shape == weight.shape, "eubo", f"{weight.shape} as advantages", eubo.shape)
    _expect(0 <= mix <= 1, "mix", "a number in [0, 1]", mix)
    elbo = _rows(elbo, weight).mean(1)
    eubo = _rows(eubo, weight).mean(1)
    score = torch.where(advantages > 0, elbo, mix * eubo + (1 - mix) * elbo)
    policy_loss = -_mean(advantages * score, weight)
    loss = policy_loss - beta * _mean(elbo, weight)  # [DiPOD]
    info = {"policy_loss": policy_loss, "elbo": _mean(elbo, weight), "eubo": _mean(eubo, weight)}
    return loss, {name: value.detach() for name, value in info.items()}


def group_advantages(rewards, normalize=True):
    """GRPO's advantages (P, G) of rewards (P, G): G >= 2 samples of each prompt (2402.03300)."""
    _check_shapes(rewards=(rewards, "PG"))
    _expect(rewards.shape[1] >= 2, "rewards", "(P, G) with G >= 2", tuple(rewards.shape))
    rewards = _upcast(rewards)
    relative = rewards - rewards[:, :1]  # exactly 0 if all of a group are equal
    centred = relative - relative.mean(1, keepdim=True)
    return centred / (relative.std(1, keepdim=True) + 1e-4) if normalize else centred


# 2. Masked diffusion (LLaDA, 2502.09992). The sampler reveals one random masked token per step. A
# draw for its ELBO: k uniform in 1..L, k random tokens masked, their log-probabilities times L / k.
class MaskDraws(NamedTuple):
    """Which tokens each draw masks. Old and new ELBO share it; a minibatch indexes both fields."""

    mask: Tensor  # (B, N, T) bool
    weight: Tensor  # (B, N) float, L / k


def draw_masks(maskable, num_draws, generator=None):
    """MaskDraws, N = num_draws, in pairs, whose mean varies less than that of independent draws.

    A pair masks the first k and the last L+1-k tokens of one random order. maskable: (B, T) bool,
    every token that the sampler filled, those after an EOS too: where its input was mask_id.
    """
    _check_shapes(maskable=(maskable, "BT"))
    _expect(num_draws >= 1, "num_draws", "a number >= 1", num_draws)
    _expect(maskable.any(1).all(), "maskable", "a maskable token in each row", maskable)
    random = {"device": maskable.device, "dtype": torch.float32, "generator": generator}
    pairs = (num_draws + 1) // 2
    length = maskable.sum(1, keepdim=True)  # (B, 1), L
    index = (torch.rand(len(maskable), pairs, **random) * length).long()  # (B, pairs), k - 1
    key = torch.rand(len(maskable), pairs, maskable.shape[1], **random)  # its order is random
    key = key.masked_fill(~maskable[:, None], math.inf)
    kth = key.sort(-1).values.gather(-1, index[..., None])  # (B, pairs, 1), key of the k-th token
    mask = torch.stack((key <= kth, key >= kth), 2).flatten(1, 2)[:, :num_draws]
    mask = mask & maskable[:, None]
    return MaskDraws(mask, length.float() / mask.sum(-1).clamp(min=1))


def _masked_log_prob(model, tokens, mask, mask_id):
    """log p(token | unmasked tokens) where mask (B, N, T) is set, 0 elsewhere; one forward pass."""
    tokens = tokens[:, None].expand_as(mask)
    logits = model(tokens.masked_fill(mask, mask_id).flatten(0, 1))  # (B*N, T, V)
    targets = tokens[mask].long()  # (M,): only the masked tokens pay for a softmax over V
    _expect((targets != mask_id).all(), "tokens", "no mask_id left in the completion", mask_id)
    log_p = _upcast(logits[mask.flatten(0, 1)]).log_softmax(-1).gather(1, targets[:, None])
    return log_p.new_zeros(mask.shape).masked_scatter(mask, log_p)


def masked_elbo(model, tokens, draws, mask_id):
    """ELBO (B, N) = (L/k) * sum over masked i of log p(x_i | unmasked), in nats per sequence.

    tokens: (B, T) int, as sampled. model: tokens (M, T) -> logits (M, T, V), -inf for mask_id if it
    is below V. Old and new need dropout off and the same autocast, or the first ratio is not 1.
    """
    mask, weight = draws
    _check_shapes(tokens=(tokens, "BT"), mask=(mask, "BNT"), weight=(weight, "BN"))
    return weight * _masked_log_prob(model, tokens, mask, mask_id).sum(-1)


def masked_bounds(model, tokens, draws, mask_id, power=1.0):
    """elbo (B, N) and SPG's upper bound, eubo (B,), from one forward pass; nats per sequence.

    eubo = L * mean over i of log(mean over draws of masked_i * weight * p_i^power) / power, i being
    the tokens that some draw masks (2510.09541). It bounds log pi from above if the power is
    large (>= L is enough, by Hoelder) and the draws are many; at power 1 it can lie below.
    """
    mask, weight = draws
    _check_shapes(tokens=(tokens, "BT"), mask=(mask, "BNT"), weight=(weight, "BN"))
    _expect(1 <= power < math.inf, "power", "a finite number >= 1", power)
    log_p = _masked_log_prob(model, tokens, mask, mask_id)
    terms = (power * log_p + weight.log()[..., None]).masked_fill(~mask, -math.inf)
    log_mean = terms.logsumexp(1) - math.log(mask.shape[1])  # -inf where no draw masks the token
    seen = mask.any(1)  # (B, T)
    total = log_mean.masked_fill(~seen, 0.0).sum(1) / power
    length = (weight * mask.sum(-1)).amax(1)  # L, because weight = L / k
    return weight * log_p.sum(-1), length * total / seen.sum(1).clamp(min=1)


@torch.no_grad()
def sample_masked(model, tokens, mask_id, temperature=1.0, generator=None):
    """Fills every mask_id in tokens (B, T): the policy. A step reveals one token of each row.

    It never emits mask_id. So a model that has an output for it must give it logit -inf, or its
    ELBO is not that of this sampler. temperature: 1, or samples are off policy; 0 is argmax.
    """
    _check_shapes(tokens=(tokens, "BT"))
    _expect(temperature >= 0, "temperature", "a number >= 0", temperature)
    masked = tokens == mask_id
    num_masked = masked.sum(1)
    order = torch.rand(tokens.shape, dtype=torch.float32, device=tokens.device, generator=generator)
    order = order.masked_fill(~masked, math.inf).argsort(1)  # masked positions come first
    tokens = tokens.clone()
    for step in range(int(num_masked.max())):
        row = (step < num_masked).nonzero()[:, 0]  # the rows that still hold a mask
        position = order[row, step]
        logits = model(tokens)
        _check_shapes(tokens=(tokens, "BT"), logits=(logits, "BTV"))
        logits = _upcast(logits[row, position])
        if 0 <= mask_id < logits.shape[1]:
            logits[:, mask_id] = -math.inf
        probability = (logits / max(temperature, 1e-6)).softmax(1)
        token = torch.multinomial(probability, 1, generator=generator)[:, 0]
        tokens[row, position] = token.to(tokens.dtype)
    return tokens


# 3. Flow policy (FPO, 2507.21053). An ODE carries noise at time 1 to the action at time 0, back
# along x = alpha * action + sigma * noise. On FPO's path "linear" tau = time, alpha = 1 - tau and
# sigma = tau. On "vp" tau = time * pi/2, alpha = cos(tau) and sigma = sin(tau), and if actions are
# standard normal, the best velocity is 0. Networks see time in [0, 1] and return dx/dtau.

_TAU = {"linear": 1.0, "vp": math.pi / 2}  # tau at time 1
_NORMAL = torch.distributions.Normal(0.0, 1.0, validate_args=False)


class FlowDraws(NamedTuple):
    """Time and noise of each draw. Old and new ELBO share it; a minibatch indexes both fields."""

    time: Tensor  # (B, N, 1) in [0, 1]
    noise: Tensor  # (B, N, A) standard normal


def draw_flow(action, num_draws, generator=None):
    """FlowDraws for actions (B, A), N = num_draws, in pairs (time, noise), (1 - time, -noise).

    At velocity 0 a pair's mean ELBO is f(action) + g(noise): the draws cancel in the ratio.
    """
    _check_shapes(action=(action, "BA"))
    _expect(num_draws >= 1, "num_draws", "a number >= 1", num_draws)
    random = {"device": action.device, "dtype": action.dtype, "generator": generator}
    pairs = (num_draws + 1) // 2
    time = torch.rand(len(action), pairs, **random)
    noise = torch.randn(len(action), pairs, action.shape[1], **random)
    time = torch.stack((time, 1 - time), 2).flatten(1)[..., None]
    noise = torch.stack((noise, -noise), 2).flatten(1, 2)
    return FlowDraws(time[:, :num_draws], noise[:, :num_draws])


def _on_path(velocity, action, time, noise, path):
    """x, the target dx/dtau, the velocity at x, all (B, N, A), and alpha and sigma (B, N, 1)."""
    _check_shapes(action=(action, "BA"), time=(time, "BN1"), noise=(noise, "BNA"))
    _expect(path in _TAU, "path", f"one of {[*_TAU]}", path)
    a = _upcast(action)[:, None]
    eps = _upcast(noise)
    tau = _upcast(time) * _TAU[path]
    alpha, sigma = (1 - tau, tau) if path == "linear" else (tau.cos(), tau.sin())
    x = alpha * a + sigma * eps
    target = eps - a if path == "linear" else alpha * eps - sigma * a
    v = velocity(x.to(action.dtype), time.to(action.dtype))
    _expect(v.shape == noise.shape, "velocity", f"{noise.shape} as noise", v.shape)
    return x, target, v, alpha, sigma


def flow_elbo(velocity, action, draws, path="linear"):
    """Minus the conditional flow matching loss (B, N), a mean over action dimensions.

    FPO's stand-in for the ELBO, equal up to weighting and a constant; `flow_bound` is in nats.
    velocity: (x (B, N, A), time (B, N, 1)) -> (B, N, A), whose target is noise - action on "linear"
    and cos(tau) noise - sin(tau) action on "vp". If your model has noise at time 0, no error tells
    you: wrap it as -model(x, 1 - time). action: (B, A), as sampled, unclipped.
    """
    _, target, v, _, _ = _on_path(velocity, action, *draws, path)
    return -(v - target).square().mean(-1)


def _solver(velocity, num_steps, method, path):
    """The ODE solver's step(x, i), from time 1 - i / num_steps to 1 - (i + 1) / num_steps."""
    _expect(num_steps >= 1, "num_steps", "a number >= 1", num_steps)
    _expect(method in ("midpoint", "euler"), "method", "'midpoint' or 'euler'", method)
    _expect(path in _TAU, "path", f"one of {[*_TAU]}", path)
    dtau = _TAU[path] / num_steps

    def step(x, i):
        time = 1 - i / num_steps
        v = velocity(x, x.new_full((len(x), 1), time))
        _expect(v.shape == x.shape, "velocity", f"{x.shape} as noise", v.shape)
        if method == "midpoint":
            middle = x.sub(v, alpha=dtau / 2)
            v = velocity(middle, x.new_full((len(x), 1), time - 0.5 / num_steps))
        return x.sub(v, alpha=dtau)

    return step


def flow_sample(velocity, noise, num_steps, method="midpoint", path="linear"):
    """Action (B, A): integrates velocity(x (B, A), time (B, 1)) from noise (B, A); differentiable.

    "midpoint" with n steps costs what "euler" with 2n does, and narrows the policy less.
    """
    _check_shapes(noise=(noise, "BA"))
    step = _solver(velocity, num_steps, method, path)
    x = noise
    for i in range(num_steps):
        x = step(x, i)
    return x


def mlp(inputs, outputs, last_gain):
    """Tanh network with two hidden layers of 64 and PPO's orthogonal initialisation."""
    layers = [nn.Linear(inputs, 64), nn.Linear(64, 64), nn.Linear(64, outputs)]
    for layer, gain in zip(layers, (2**0.5, 2**0.5, last_gain)):
        nn.init.orthogonal_(layer.weight, gain)
        nn.init.zeros_(layer.bias)
    return nn.Sequential(layers[0], nn.Tanh(), layers[1], nn.Tanh(), layers[2])


class FlowPolicy(nn.Module):
    """A diffusion policy, action = mean(obs) + std * z, where the flow carries noise to z.

    tight: mean and std are learned, the path is "vp", and the flow's last layer starts at 0. So z
        starts standard normal, the policy is PPO's Gaussian at first, and the gap is 0.
    not tight, FPO's textbook flow: mean 0, std 1, path "linear", and a large gap at the start.
    flow=False: z is the noise. PPO's Gaussian policy, whose ELBO is its log-likelihood.
    scale: factor of the velocity; the smaller, the more slowly z leaves the normal distribution.
    num_steps: midpoint steps of the sampler; with too few, each distillation narrows z a little.
    """

    def __init__(self, obs_dim, action_dim, tight=True, flow=True, scale=0.02, num_steps=5):
        super().__init__()
        _expect(tight or flow, "flow", "True in a policy that is not tight", flow)
        self.flow = flow
        self.scale = scale if flow else 0.0
        self.solver = {"num_steps": num_steps, "path": "vp" if tight else "linear"}
        self.mean = mlp(obs_dim, action_dim, 0.01) if tight else None
        self.log_std = nn.Parameter(torch.zeros(action_dim), requires_grad=tight)
        # One layer on (obs, time, x) in two parts: the observation's runs once, not once per draw.
        self.obs_layer = nn.Linear(obs_dim, 64)
        self.flow_layer = nn.Linear(2 + action_dim, 64, bias=False)
        self.net = nn.Sequential(nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, action_dim))
        for layer in (self.obs_layer, self.flow_layer, self.net):
            layer.requires_grad_(flow)  # DistributedDataParallel waits for every gradient
        if tight:
            nn.init.zeros_(self.net[-1].weight)
            nn.init.zeros_(self.net[-1].bias)

    def velocity(self, obs):
        """The flow's field(x, time) at these observations (B, O); x is (B, A) or (B, N, A)."""
        context = self.obs_layer(obs)

        def field(x, time):
            angle = time * (math.pi / 2)
            sin = angle.sin()
            hidden = self.flow_layer(torch.cat((angle.cos(), sin, x), -1))
            v = self.net(hidden + (context if x.dim() == 2 else context[:, None]))
            # On "vp" the best field is 0 at time 0; with any other the bound diverges.
            return v * (self.scale * sin if self.solver["path"] == "vp" else self.scale)

        return field

    @torch.no_grad()
    def sample(self, obs, noise):
        """Actions (B, A) for observations (B, O) and standard normal noise (B, A)."""
        _check_shapes(log_std=(self.log_std, "A"), obs=(obs, "BO"), noise=(noise, "BA"))
        z = flow_sample(self.velocity(obs), noise, **self.solver) if self.flow else noise
        return z if self.mean is None else self.mean(obs) + self.log_std.exp() * z

    def standardize(self, obs, action):
        """z (B, A), the flow's part of these actions."""
        _check_shapes(log_std=(self.log_std, "A"), obs=(obs, "BO"), action=(action, "BA"))
        return action if self.mean is None else (action - self.mean(obs)) / self.log_std.exp()

    def latent_elbo(self, obs, z, draws):
        """(B, N), of the flow's part z alone: A * `flow_elbo`; exact and (B, 1) without a flow."""
        _check_shapes(log_std=(self.log_std, "A"), obs=(obs, "BO"), z=(z, "BA"))
        if not self.flow:
            return _NORMAL.log_prob(_upcast(z)).sum(-1, keepdim=True)
        return z.shape[1] * flow_elbo(self.velocity(obs), z, draws, self.solver["path"])

    def elbo(self, obs, action, draws):
        """(B, N), of actions (B, A): that of z, minus log std (a change of variables)."""
        return self.latent_elbo(obs, self.standardize(obs, action), draws) - self.log_std.sum()

    def log_prob(self, obs, noise):
        """Exact log-likelihood (B,) of `sample(obs, noise)`; gradient at the fixed action."""
        z = self.standardize(obs, self.sample(obs, noise))
        _, log_prob = flow_log_prob(self.velocity(obs), noise, **self.solver, action=z)
        return log_prob - self.log_std.sum()

    def bound(self, obs, action, draws):
        """ELBO (B, N) in nats; "linear" leaves out times below 0.005, since it diverges at 0."""
        z = self.standardize(obs, action)
        path = self.solver["path"]
        min_time = 0.0 if path == "vp" else 0.005
        return flow_bound(self.velocity(obs), z, draws, path, min_time) - self.log_std.sum()


# 4. Measuring the drift: exact likelihoods, the bound in nats, alignment.
def exact_likelihood(model, tokens, maskable, mask_id):
    """log_prob (B,) of `sample_masked` and elbo (B,) in nats, exact and differentiable.

    F(S) is the probability that the first |S| reveals are x's tokens at S. F({}) = 1, F(S + i) +=
    F(S) p(x_i|x_S) / (L - |S|), log_prob = log F(all). elbo is the sum over sizes s of the mean
    over |S| = s of the mean over i not in S of log p(x_i|x_S). maskable: (B, T) bool, the same
    L <= 14 in each row, because all 2^L - 1 contexts go through the model at once.
    """
    _check_shapes(tokens=(tokens, "BT"), maskable=(maskable, "BT"))
    lengths = maskable.sum(1).unique().tolist()
    length = lengths[0]
    _expect(len(lengths) == 1 and 0 < length < 15, "maskable", "one length from 1 to 14", lengths)
    subsets = torch.arange(2**length - 1, device=tokens.device)  # bit i of S: token i is revealed
    hidden = (subsets[:, None] >> torch.arange(length, device=tokens.device)) % 2 == 0  # (S, L)
    region = maskable[:, None].expand(-1, len(subsets), -1)  # (B, S, T), S subsets
    mask = region.masked_scatter(region, hidden.expand(len(tokens), -1, -1))
    log_p = _masked_log_prob(model, tokens, mask, mask_id)[region].view(-1, *hidden.shape)

    contexts = log_p.unbind(1)  # with log_p[:, S] the backward pass would cost 4^L
    log_f = [log_p.new_zeros(len(tokens))]
    for subset in range(1, 2**length):
        members = [i for i in range(length) if subset >> i & 1]
        terms = [log_f[subset - 2**i] + contexts[subset - 2**i][:, i] for i in members]
        terms = torch.stack(terms).clamp(min=-1e30)  # logsumexp of -inf alone has a NaN gradient
        log_f.append(terms.logsumexp(0) - math.log(length - len(members) + 1))
    share = [1 / (math.comb(length, n) * n) for n in hidden.sum(1).tolist()]  # of each term
    with torch.autocast(tokens.device.type, enabled=False):  # else the product would be bfloat16
        return log_f[-1], log_p.sum(2) @ log_p.new_tensor(share)


def flow_log_prob(velocity, noise, num_steps, method="midpoint", path="linear", action=None):
    """action (B, A) of `flow_sample`, detached, and the discrete sampler's exact log_prob (B,).

    log_prob = log N(noise) - sum over steps of log|det Jacobian|. Its gradient holds the action
    fixed, so the noise that leads there moves with the parameters. To get it, each step is inverted
    by one Newton step from its stored start: no value changes, the gradient is the inverse's. Pass
    z = (a - mean) / std as `action` to differentiate mean and std too. If the map from noise to
    action is not one to one, this is a lower bound.
    """
    _check_shapes(noise=(noise, "BA"), action=(noise if action is None else action, "BA"))
    step = _solver(velocity, num_steps, method, path)

    def jacobian(x, i):  # (B, A, A); rows are independent, so their sum serves all of them
        return torch.func.jacrev(lambda x: step(x, i).sum(0))(x).movedim(1, 0)

    states = [noise.detach()]
    with torch.no_grad():
        for i in range(num_steps):
            states.append(step(states[i], i))
    x = states[-1] if action is None else action
    log_det = 0.0
    for i in reversed(range(num_steps)):
        error = step(states[i], i) - x
        x = states[i] - torch.linalg.solve_ex(jacobian(states[i], i).detach(), error)[0]
        log_det = log_det + torch.linalg.slogdet(jacobian(x, i))[1]
    return states[-1], _NORMAL.log_prob(x).sum(-1) - log_det


def flow_bound(velocity, action, draws, path="linear", min_time=0.0):
    """The flow's ELBO (B, N) in nats, one estimate per draw; arguments as in `flow_elbo`.

    log N(action) - integral over tau of (alpha / sigma) (|v - u|^2 - |v0 - u|^2), u the target and
    v0 the exact velocity of a standard normal (VDM's bound, 2107.00630). Time starts at min_time,
    because at 0 it converges only if v = v0. It bounds the SDE's log-likelihood; the sampler is the
    ODE, so the gap of one sample can be negative, but not its mean on policy.
    """
    _expect(0 <= min_time < 1, "min_time", "a number in [0, 1)", min_time)
    time = min_time + (1 - min_time) * _upcast(draws.time)
    x, u, v, alpha, sigma = _on_path(velocity, action, time, draws.noise, path)
    v0 = (sigma - alpha) / (alpha**2 + sigma**2) * x if path == "linear" else 0 * x
    excess = (v - u).square().sum(-1) - (v0 - u).square().sum(-1)
    weight = (alpha / sigma.clamp(min=1e-30))[..., 0]  # at sigma = 0 the excess is 0, as v = v0
    integral = (1 - min_time) * _TAU[path] * weight * excess
    return _NORMAL.log_prob(_upcast(action)).sum(-1)[:, None] - integral


def alignment(proxy, true, parameters):
    """Cosine of the gradients of proxy, mean(A * elbo), and true, mean(A * log_prob), both 0-d."""
    _check_shapes(proxy=(proxy, ""), true=(true, ""))
    _expect(not isinstance(parameters, Tensor), "parameters", "a list of tensors", "a tensor")
    parameters = [p for p in parameters if p.requires_grad]
    gradients = []
    for y in (proxy, true):
        gradient = torch.autograd.grad(y, parameters, retain_graph=True, materialize_grads=True)
        gradients.append(torch.cat([_upcast(part).flatten() for part in gradient]))
    a, b = gradients
    return a.dot(b) / (a.norm() * b.norm())  # NaN where a gradient is 0, or its square overflows


# 5. The two-token example, the paper's Figure 2: both drifts, exactly.
def two_token(beta=0.2, steps=1500, lr=0.1, rewards=(0.8, 1.0, 0.7, 1.0)):
    """Two tokens over {A, B}, six logits that start at 0, and rewards of AA, AB, BA, BB.

    Gradient ascent along E_pi[(A + beta) grad elbo] with A = r - E_pi[r], expectations exact.
    Returns "gap_AA", mean "gap", "alignment" and mean "reward" under pi: (steps+1,) float64 each.
    """
    theta = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)

    def model(tokens):  # (M, 2), where A, B and mask are 0, 1, 2 -> logits (M, 2, 2)
        # theta[i, j] is the logit of "token i is A" where the other token is j.
        logit_a = torch.stack((theta[0, tokens[:, 1]], theta[1, tokens[:, 0]]), 1)
        return torch.stack((logit_a, torch.zeros_like(logit_a)), -1)

    sequences = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]])
    maskable = torch.ones_like(sequences, dtype=torch.bool)
    reward = torch.tensor(rewards, dtype=torch.float64)
    rows = []
    for _ in range(steps + 1):
        log_prob, elbo = exact_likelihood(model, sequences, maskable, mask_id=2)
        pi = log_prob.detach().exp()
        gap = (log_prob - elbo).detach()
        advantage = reward - pi @ reward
        cosine = alignment((pi * advantage) @ elbo, (pi * advantage) @ log_prob, [theta])
        rows.append(torch.stack((gap[0], pi @ gap, cosine, pi @ reward)))
        (gradient,) = torch.autograd.grad((pi * (advantage + beta)) @ elbo, theta)  # [DiPOD]
        with torch.no_grad():
            theta += lr * gradient
    return dict(zip(("gap_AA", "gap", "alignment", "reward"), torch.stack(rows).unbind(1)))


# The method ends here. Below is what lm_task.py and control_task.py run and report with.

import argparse
import csv
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

# Colour-blind safe (Okabe and Ito); a method has one colour in every figure.
COLORS = {"fpo": "#D55E00", "dipod": "#0072B2", "ppo": "black", "exact": "#CC79A7"}
COLORS |= {"positives": "#009E73", "fpo++": "#E69F00", "dipod++": "#56B4E9", "distill": "#009E73"}
COLORS |= {"interleave": "#999999", "spg": "#E69F00", "spg-dipod": "#56B4E9", "d1": "#F0E442"}
HEADER = "method     seed      step {:>9}  gap/nats alignment   steps/s time left"  # of `Run.add`


def task_parser(doc, methods, default):
    """The flags that both tasks have. An error is one line, without the usage."""
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, description=doc, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--methods", nargs="+", choices=methods, default=default, help=", ".join(methods))
    add("--seeds", type=number(int, 1), default=1, metavar="N", help="runs of each method")
    add("--first-seed", type=number(int, 0), default=0, metavar="S", help="seeds S to S + N - 1")
    add("--jobs", type=number(int, 1), default=os.cpu_count(), help="parallel processes")
    add("--out", help="directory of the records (default: a fresh one in runs/)")
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--resume", action="store_true", help="go on from the records in --out")
    group.add_argument("--overwrite", action="store_true", help="replace the records in --out")
    usable = {"cuda": torch.cuda.is_available(), "cpu": True, "mps": torch.mps.is_available()}
    devices = [name for name in usable if usable[name]]
    add("--device", choices=devices, default=devices[0], help=", ".join(devices))
    return parser


def number(kind, low):
    """An argparse type: finite, at least `low`, and whole if kind is int."""

    def number(text):
        rule = f"a {'whole' if kind is int else 'finite'} number of at least {low}"
        if (kind is int and not text.isdigit()) or not low <= kind(text) < math.inf:
            raise argparse.ArgumentTypeError(f"expected {rule}, got {text}")
        return kind(text)

    return number


def load(path, task):
    """The record of a run of this task; ValueError for any other file."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        owner = dict(state)["settings"]["task"]
    except Exception as error:  # noqa: BLE001 - foreign and truncated files raise a dozen kinds
        raise ValueError(f"{path}: not a checkpoint ({type(error).__name__})") from None
    _expect(owner == task, str(path), f"a checkpoint of {task}_task.py", f"one of {owner}_task.py")
    return state


def prepare(args, settings_of, inputs=()):
    """{path: settings} of this command's runs; ValueError if they would harm what --out holds."""
    _expect(args.out or not args.resume, "--resume", "an --out that holds the runs", "none")
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    runs = [settings_of(method, seed, args) for seed in seeds for method in args.methods]
    names = (f"runs/{runs[0]['task']}-{i}" for i in range(1, 10**6))
    out = Path(args.out or next(name for name in names if not Path(name).exists()))
    records = {out / f"{run['method']}_{run['seed']}.pt": run for run in runs}
    _expect(len(records) == len(runs), "--methods", "each method once", args.methods)
    clash = {path.resolve() for path in inputs} & {path.resolve() for path in records}
    _expect(not clash, "--base", "no record that is written here", ", ".join(map(str, clash)))
    for path in out.glob("*.pt"):
        if path in records and args.overwrite:
            continue
        old = load(path, runs[0]["task"])["settings"]
        if path in records and not args.resume:
            raise ValueError(f"{path} exists: --resume goes on from it, --overwrite replaces it")
        new = records.get(path, old)
        if path not in records and old["method"] in args.methods:
            new = settings_of(old["method"], old["seed"], args)  # all seeds are averaged
        changed = sorted(f"{name} {value}" for name, value in new.items() - old.items())
        _expect(new == old, "--out", f"the settings of {path}", ", ".join(changed))
    out.mkdir(parents=True, exist_ok=bool(args.out))
    tempfile.TemporaryFile(dir=out).close()  # OSError where nothing can be written
    if args.overwrite:
        for path in records:
            path.unlink(missing_ok=True)
            path.with_suffix(".csv").unlink(missing_ok=True)
    return records


class Run:
    """A run's record: METHOD_SEED.pt, from which it goes on, and METHOD_SEED.csv, its rows."""

    def __init__(self, path, settings, parts, place, resume):
        self.path = path
        self.settings = settings
        self.parts = parts
        self.place = place  # number of this run, of all runs, --jobs
        self.rows = []
        self.time = time.monotonic()  # of the last row
        if path.exists():  # if it is not to be resumed, another command has written it meanwhile
            _expect(resume, "--out", "no record of this run", path)
            state = load(path, settings["task"])
            self.rows = state["rows"]
            for name, part in parts.items():
                part.load_state_dict(state[name])
            torch.set_rng_state(state["rng"][0])
            torch.cuda.set_rng_state_all(state["rng"][1:])
        self.step = self.rows[-1]["step"] if self.rows else 0

    def add(self, row):
        """Saves a row, whose first columns are step, score, gap and alignment, then prints it."""
        self.rows.append({"method": self.settings["method"], "seed": self.settings["seed"]} | row)
        state = {name: part.state_dict() for name, part in self.parts.items()}
        rng = [torch.get_rng_state()]
        if torch.cuda.is_initialized():
            rng += torch.cuda.get_rng_state_all()
        state |= {"settings": self.settings, "rows": self.rows, "rng": rng}
        partial = self.path.with_suffix(".partial")
        with open(partial, "w", newline="") as file:
            writer = csv.DictWriter(file, self.rows[0])
            writer.writeheader()
            writer.writerows(self.rows)
        os.replace(partial, self.path.with_suffix(".csv"))
        torch.save(state, partial)
        os.replace(partial, self.path)
        method, seed, step, score, gap, cosine = list(self.rows[-1].values())[:6]
        number, runs, jobs = self.place
        steps = self.settings["steps"]
        now = time.monotonic()
        speed = (step - self.step) / (now - self.time)  # since the last row
        self.step = step
        self.time = now
        rounds = (runs - 1) // jobs - (number - 1) // jobs  # of `jobs` runs each, still to come
        left = int((max(steps - step, 0) + steps * rounds) / speed)  # seconds of the whole command
        line = f"{method:<10} {seed:>4} {step:>9} {score:>9.4g} {gap:>9.3g} {cosine:>9.3f}"
        line += f" {show(speed):>9} {left // 60:>6}:{left % 60:02}  run {number} of {runs}"
        print(line.replace("nan", "  -") + "\n", end="", flush=True)  # one write, never mixed


def run_all(train, records, args, score):
    """Calls train(settings, path, place, args) for all runs in parallel; {path: error} if any."""
    errors = {}
    futures = {}
    pool = ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn"), start_worker)
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # workers inherit it: Ctrl-C is ours
    for number, (path, settings) in enumerate(records.items(), 1):
        place = (number, len(records), args.jobs)
        futures[pool.submit(attempt, train, settings, path, place, args)] = path
    signal.signal(signal.SIGINT, handler)
    print(f"records: {next(iter(records)).parent}\n{HEADER.format(score)}", flush=True)
    for future in as_completed(futures):
        path = futures[future]
        error = "a process of this command was killed" if future.exception() else future.result()
        if error:
            errors[path] = error
            print(f"{path.stem} stopped: {error}", file=sys.stderr)
    pool.shutdown()
    return errors


def attempt(train, *arguments):
    """train's error as one line: not every exception survives the way between processes."""
    try:
        train(*arguments)
    except BaseException as error:  # noqa: BLE001 - whatever it is, the other runs go on
        return f"{type(error).__name__}: {error}".splitlines()[0]


def command(main):
    """Runs a task's main. Ctrl-C is one line, and no process stays behind."""
    try:
        main()
    except KeyboardInterrupt:
        for worker in multiprocessing.active_children():
            worker.kill()
        print("interrupted: --resume --out DIRECTORY goes on with its runs", file=sys.stderr)
        raise SystemExit(130) from None


def start_worker():
    """One torch thread, because the networks are small; and no worker outlives its parent."""
    torch.set_num_threads(1)

    def follow_parent():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=follow_parent, daemon=True).start()


def finish(records, errors):
    """Table and figure of all runs in --out; stopped ones are named, not averaged. Exit status."""
    first, settings = next(iter(records.items()))
    runs = {path: {"settings": records[path], "rows": []} for path in errors}
    for path in sorted(first.parent.glob("*.pt")):
        runs[path] = load(path, settings["task"])
    summaries = {}
    for path, run in runs.items():
        step = run["rows"][-1]["step"] if run["rows"] else 0
        steps = run["settings"]["steps"]
        if step < steps:
            print(f"{path.stem}: step {step} of {steps}, stopped: {errors.get(path, 'unfinished')}")
        else:
            summaries.setdefault(run["settings"]["method"], []).append(summary(run["rows"]))
    print(f"\n{'method':<10} seeds  {'final':<26}  {'mean of the run':<26}  {'gap':<26}  alignment")
    for method, values in summaries.items():
        cells = [f"{spread(column.tolist()):<26}" for column in torch.stack(values).T]
        print(f"{method:<10} {len(values):>5}  {'  '.join(cells)}".rstrip())
    print(f"\nrecords and CSVs: {first.parent}")
    try:
        draw([run for run in runs.values() if run["rows"]], first.parent / "figure.png")
        print(f"figure: {first.parent / 'figure.png'}")
    except Exception as error:  # noqa: BLE001 - no matplotlib, or an MPLBACKEND unknown to it
        print(f"no figure: {error}")
    return 1 if errors else 0


def spread(values):
    """Mean [lowest..highest] of the values that are numbers."""
    known = [value for value in values if not math.isnan(value)]
    if not known:
        return "-"
    ends = f" [{show(min(known))}..{show(max(known))}]" if len(known) > 1 else ""
    return show(sum(known) / len(known)) + ends


def show(x):
    """A number as a person would write it."""
    return f"{x:,.0f}" if 100 <= abs(x) < 1e5 else f"{x:.3g}"


def summary(rows):
    """(4,): score over the last tenth of the steps and over all; gap, alignment over that tenth."""
    table = torch.tensor([list(row.values())[2:6] for row in rows], dtype=torch.float64)
    end = table[table[:, 0] > 0.9 * table[-1, 0]].nanmean(0)
    return torch.stack((end[1], table[:, 1].nanmean(), end[2], end[3]))


def draw(runs, file):
    """Score, gap and alignment over steps: a line for each run, a colour for each method."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 2.8), layout="constrained")
    axes = figure.subplots(1, 3)
    handles = {}
    for run in reversed(runs):  # dipod over ppo
        method = run["settings"]["method"]
        steps = [row["step"] for row in run["rows"]]
        for axis, column in zip(axes, list(run["rows"][0])[3:6]):
            values = [row[column] for row in run["rows"]]
            (handles[method],) = axis.plot(steps, values, color=COLORS.get(method))
            axis.set(xlabel="steps", ylabel=column)
            axis.locator_params(axis="x", nbins=4)
    axes[1].set_yscale("symlog", linthresh=1)  # a gap that opens passes 1e6 nats
    axes[1].yaxis.set_major_formatter("{x:g}")
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=4)
    figure.savefig(file, dpi=140)
