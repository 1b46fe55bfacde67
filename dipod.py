"""DiPOD: Diffusion Policy Optimization without Drifting Apart (arXiv 2606.13795), in one file.

    python dipod.py                       # the paper's two-token diagnostic, a table
    python dipod.py --plot two_token.png  # its figure: the first drift and the second drift

RL on a diffusion policy cannot evaluate log pi(a|o) and climbs its ELBO instead. In this file

    log_prob = log pi(a|o)        the sampler's true log-likelihood
    elbo    <= log_prob           the bound that is cheap to estimate
    gap      = log_prob - elbo    >= 0

    true  policy gradient   E[A grad log_prob]
    proxy policy gradient   E[A grad elbo] = E[A grad log_prob] - E[A grad gap]

First drift: updates on the proxy let the gap grow. Second drift: where grad gap != 0 the proxy turns away from the true
gradient. On policy E[grad log_prob] = 0, so E[grad elbo] = -E[grad gap]: maximising the ELBO of one's own samples
(self-distillation) is pure descent on the gap, which does not ask about rewards. DiPOD adds that term to every update,
so that the reward's pull and the bound's stay together; alone, and for long, the term would close the gap at any price.

Higher is better everywhere, likelihoods are in nats, and the lines that differ from PPO carry the tag [DiPOD].
Shapes: B samples, T tokens of which L are maskable, N draws, A action dimensions, V vocabulary, P prompts of G samples.
"""

import argparse
import csv
import math
import multiprocessing
import os
import pickle
import signal
import statistics
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from itertools import combinations, product
from pathlib import Path
from time import monotonic, sleep
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Checks. Every public function names the argument, what was expected and what came; nothing broadcasts silently.

_KINDS = {"bool": lambda x: x.dtype == torch.bool, "float": Tensor.is_floating_point}
_KINDS["int"] = lambda x: not (x.dtype == torch.bool or x.is_floating_point() or x.is_complex())


def _check(**arguments: tuple[Tensor, str, str]) -> None:
    """Checks name=(tensor, "BNT", kind): a letter is one size >= 1 in all tensors of the call, a digit is itself."""
    sizes, first = {}, None
    for name, (x, letters, kind) in arguments.items():
        want = f"a {kind} tensor of shape ({', '.join(letters)})"
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: expected {want}, got {type(x).__name__}")
        if not _KINDS[kind](x):
            raise TypeError(f"{name}: expected {want}, got dtype {x.dtype}")
        if x.dim() != len(letters):
            raise ValueError(f"{name}: expected {want}, got shape {tuple(x.shape)}")
        for letter, size in zip(letters, x.shape):
            known, source = sizes.setdefault(letter, (int(letter) if letter.isdigit() else size, name))
            if size != known or size == 0:
                rule = "at least 1" if size == 0 else f"{known} (from {source})"
                raise ValueError(f"{name}: expected {want} with {letter} = {rule}, got shape {tuple(x.shape)}")
        first = first or (name, x.device)
        if x.device != first[1]:
            raise ValueError(f"{name}: expected device {first[1]} (from {first[0]}), got {x.device}")


def _check_number(name: str, value, low: float, high: float = math.inf, integer: bool = False, above: bool = False):
    """Checks low <= value <= high and finite, or low < value where `above`."""
    if isinstance(value, bool) or not isinstance(value, int if integer else (int, float)):
        raise TypeError(f"{name}: expected {'an int' if integer else 'a number'}, got {type(value).__name__}")
    if not (low <= value <= high and math.isfinite(value)) or (above and value == low):
        raise ValueError(f"{name}: expected a value {'>' if above else '>='} {low} and <= {high}, got {value}")


def _check_name(name: str, value: str, known) -> None:
    if value not in known:
        raise ValueError(f"{name}: expected one of {', '.join(known)}, got {value!r}")


def _check_values(name: str, x: Tensor, ok: Callable[[Tensor], Tensor], expected: str) -> None:
    """Checks values where reading them is free: on the CPU, outside torch.compile (no GPU sync, no graph break)."""
    if not torch.compiler.is_compiling() and x.device.type == "cpu" and not bool(ok(x.detach()).all()):
        raise ValueError(f"{name}: expected {expected}, got {x.detach()}")


def _at_least_float32(x: Tensor) -> Tensor:
    """ELBOs are differences of large sums: never in half precision, whatever autocast or the model's dtype says."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


# 1. Masked diffusion (discrete): a completion of L tokens, revealed one random position at a time. --------------------
# The paper's preliminaries; LLaDA (arXiv 2502.09992). The ELBO masks k of the L tokens, k uniform on 1..L,
# and weights the masked log-probabilities by L/k. That is the bound of the sampler below, which unmasks one at a time.


class MaskDraws(NamedTuple):
    """Which tokens each draw masks. Keep one for old and new ELBO: with fresh masks the ratio is noise."""

    mask: Tensor  # (B, N, T) bool
    weight: Tensor  # (B, N) float, L/k


def draw_masks(maskable: Tensor, num_draws: int, generator: torch.Generator | None = None) -> MaskDraws:
    """Draws masks for `masked_elbo`: k of L tokens, k uniform on 1..L, uniformly which.

    Every draw is unbiased. Together they are antithetic and stratified: draws come in pairs that mask the first k and
    the last L+1-k of one random order, and the pairs' k are spread over 1..L. Never k = 0: that would train nothing,
    and the fully masked context, the sampler's first step, needs its share.

    Args:
        maskable: (B, T) bool, the completion's tokens, at least one in each row.
        num_draws: N.
        generator: on `maskable`'s device; default the global one.
    Returns: MaskDraws. A row without maskable tokens has weight 0 where values are not checked (see Raises).
    Raises: ValueError: wrong shape, num_draws < 1, or (on the CPU) no maskable token in a row. TypeError: wrong type.
    """
    _check(maskable=(maskable, "BT", "bool"))
    _check_number("num_draws", num_draws, 1, integer=True)
    not_empty = "at least one maskable token in each row (no empty completion)"
    _check_values("maskable", maskable.any(-1), lambda x: x, not_empty)
    random = {"device": maskable.device, "generator": generator}
    batch, pairs = len(maskable), (num_draws + 1) // 2
    length = maskable.sum(-1)[:, None]  # (B, 1)
    # {k, L+1-k} is one pair, so stratify over half the unit interval; a coin says which of the two comes first.
    stratum = torch.rand(batch, pairs, **random).argsort(-1)
    u = (stratum + torch.rand(batch, pairs, **random)) / (2 * pairs)
    u = torch.where(torch.rand(batch, pairs, **random) < 0.5, u, 1 - u)
    k = (1 + (u * length).long()).minimum(length)  # (B, pairs)
    order = torch.rand(batch, pairs, maskable.shape[1], **random)
    rank = order.masked_fill(~maskable[:, None], 2.0).argsort(-1).argsort(-1)  # maskable tokens have ranks 0..L-1
    first, last = rank < k[..., None], rank >= k[..., None] - 1
    mask = (torch.stack((first, last), 2).flatten(1, 2) & maskable[:, None])[:, :num_draws]
    weight = length / mask.sum(-1).clamp(min=1)
    return MaskDraws(mask, weight)


def _logits(model, inputs: Tensor) -> Tensor:
    """The model's logits (M, T, V) for inputs (M, T), at least float32."""
    if not callable(model):
        raise TypeError(f"model: expected a callable, tokens (M, T) -> logits (M, T, V), got {type(model).__name__}")
    logits = model(inputs)
    if not isinstance(logits, Tensor):
        got = type(logits).__name__
        raise TypeError(f"model: expected a tensor of logits (M, T, V), got {got} (pass its .logits?)")
    if logits.dim() != 3 or logits.shape[:2] != inputs.shape:
        raise ValueError(f"model: expected logits of shape {(*inputs.shape, 'V')}, got {tuple(logits.shape)}")
    return _at_least_float32(logits)


def _masked_log_prob(model, tokens: Tensor, mask: Tensor, mask_id: int) -> Tensor:
    """log p(token | the unmasked tokens) in nats where mask (B, N, T) is set, 0 elsewhere; one batched forward pass."""
    logits = _logits(model, torch.where(mask, mask_id, tokens[:, None]).flatten(0, 1))  # (B*N, T, V)
    scored, vocabulary = torch.where(mask, tokens[:, None], 0), logits.shape[-1]
    in_range = f"every scored token in 0..V-1 = {vocabulary - 1}"
    _check_values("tokens", scored, lambda x: (x >= 0) & (x < vocabulary), in_range)
    nll = F.cross_entropy(logits.flatten(0, 1), scored.flatten().long(), reduction="none")
    return -nll.view(mask.shape).masked_fill(~mask, 0.0)


def _check_masked(tokens: Tensor, draws: MaskDraws, mask_id: int) -> None:
    if not (isinstance(draws, tuple) and len(draws) == 2):
        raise TypeError(f"draws: expected MaskDraws(mask, weight), got {type(draws).__name__}")
    mask, weight = (draws[0], "BNT", "bool"), (draws[1], "BN", "float")
    _check(tokens=(tokens, "BT", "int"), **{"draws.mask": mask, "draws.weight": weight})
    _check_number("mask_id", mask_id, 0, integer=True)


def masked_elbo(model, tokens: Tensor, draws: MaskDraws, mask_id: int) -> Tensor:
    """ELBO of masked diffusion, one estimate per draw: (L/k) * sum over masked i of log p(x_i | unmasked).

    Args:
        model: callable, tokens (M, T) -> logits (M, T, V).
        tokens: (B, T) int, prompt and completion.
        draws: MaskDraws for these tokens.
        mask_id: the mask token.
    Returns: (B, N) nats per sequence (not per token); the mean over draws estimates the ELBO, at least float32.
    Raises: ValueError: wrong shapes, or (on the CPU) a scored token outside 0..V-1. TypeError: wrong types.
    Source: LLaDA (arXiv 2502.09992), the form of its bound with L/k.
    """
    _check_masked(tokens, draws, mask_id)
    mask, weight = draws
    return weight * _masked_log_prob(model, tokens, mask, mask_id).sum(-1)


def masked_bounds(model, tokens: Tensor, draws: MaskDraws, mask_id: int, power: float = 1.0) -> tuple[Tensor, Tensor]:
    """ELBO and SPG's EUBO from one forward pass.

    eubo = L * mean over scored tokens i of (1/power) log mean over draws of [masked_i * weight * p(x_i|z)^power]; a
    token is scored if at least one draw masks it. With infinitely many draws it is an upper bound of log pi for large
    power only (power >= L suffices, by Hoelder); at power = 1 it can lie below log pi. Few draws sit below the limit.

    Args:
        model, tokens, draws, mask_id: as in `masked_elbo`.
        power: >= 1, SPG's beta.
    Returns: elbo (B, N) and eubo (B,), nats per sequence.
    Raises: As `masked_elbo`; ValueError for power < 1.
    Source: SPG (arXiv 2510.09541), its evidence upper bound.
    """
    _check_masked(tokens, draws, mask_id)
    _check_number("power", power, 1.0)
    mask, weight = draws
    log_p = _masked_log_prob(model, tokens, mask, mask_id)
    scored = mask.any(1)  # (B, T)
    # In log space; a token that no draw masks is neutralised first, for logsumexp of only -inf has no gradient.
    terms = (power * log_p + weight.log()[..., None]).masked_fill(~mask & scored[:, None], -math.inf)
    per_token = (terms.logsumexp(1) - math.log(mask.shape[1])).masked_fill(~scored, 0.0) / power
    length = (weight * mask.sum(-1)).mean(1)  # L, since weight = L/k
    return weight * log_p.sum(-1), length * per_token.sum(-1) / scored.sum(-1)


@torch.no_grad()
def sample_masked(
    model, tokens: Tensor, mask_id: int, temperature: float = 1.0, generator: torch.Generator | None = None
) -> Tensor:
    """Fills every mask: reveals one uniformly random masked position of each row per step, the policy's sampler.

    Args:
        model: callable, tokens (M, T) -> logits (M, T, V).
        tokens: (B, T) int, `mask_id` where a token is to be sampled; rows may differ in how many.
        mask_id: never sampled. If it is among the V outputs, give it logit -inf in the model, or the likelihoods of
            this file, which do not renormalise, are not those of this sampler.
        temperature: of the token's distribution, 0 for argmax; the likelihoods of this file are those at 1.
        generator: on `tokens`' device; default the global one.
    Returns: (B, T) tokens without masks.
    Raises: ValueError: wrong shape or temperature < 0. TypeError: wrong types.
    """
    _check(tokens=(tokens, "BT", "int"))
    _check_number("mask_id", mask_id, 0, integer=True)
    _check_number("temperature", temperature, 0)
    masked, rows = tokens == mask_id, torch.arange(len(tokens), device=tokens.device)
    num_steps = tokens.shape[1] if tokens.is_meta else int(masked.sum(-1).max())
    order = torch.rand(tokens.shape, device=tokens.device, generator=generator).masked_fill(~masked, 2.0).argsort(-1)
    tokens = tokens.clone()
    for position in order[:, :num_steps].unbind(1):  # (B,), a row with fewer masks finds none left
        logits = _logits(model, tokens)[rows, position]
        if mask_id < logits.shape[-1]:
            logits = logits.index_fill(-1, rows.new_tensor([mask_id]), -math.inf)
        token = logits.argmax(-1)
        if temperature > 0:
            token = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)[:, 0]
        tokens[rows, position] = torch.where(masked[rows, position], token.to(tokens.dtype), tokens[rows, position])
    return tokens


# 2. Flow policy (continuous): an ODE carries noise at t = 1 to the action at t = 0. -----------------------------------
# The paper's preliminaries; FPO (arXiv 2507.21053). The linear path is FPO's; the variance-preserving one ("vp") has
# the exact velocity 0 for a standard normal, so that a zero network starts with a tight bound. `time` is always in
# [0, 1]; the path's own clock runs over `_SPAN`, and a velocity is a derivative by that clock.

_SPAN = {"linear": 1.0, "vp": math.pi / 2}


class FlowDraws(NamedTuple):
    """Time and noise of each draw. Keep one for old and new ELBO."""

    time: Tensor  # (B, N, 1) in [0, 1]
    noise: Tensor  # (B, N, A) standard normal


def draw_flow(
    action: Tensor, num_draws: int, generator: torch.Generator | None = None, mirror: bool = False
) -> FlowDraws:
    """Draws time ~ U[0, 1] and noise ~ N(0, I) for `flow_elbo`; each draw unbiased, together antithetic and stratified.

    Draws come in pairs with the same time and opposite noise, and the pairs' times are spread over [0, 1].

    Args:
        action: (B, A) float, for its shape, dtype and device only.
        num_draws: N.
        generator: on `action`'s device; default the global one.
        mirror: half of the pairs have the others' times, t as 1-t. With N a multiple of 4, A times the mean over draws
            of the "vp" `flow_elbo` of a zero velocity is then log N(action) but for a constant of the draws, exactly,
            for sin^2 + cos^2 = 1; without, on average.
    Raises: ValueError: wrong shape or num_draws < 1. TypeError: wrong type.
    """
    _check(action=(action, "BA", "float"))
    _check_number("num_draws", num_draws, 1, integer=True)
    random = {"device": action.device, "dtype": action.dtype, "generator": generator}
    pairs = (num_draws + 1) // 2
    stratum = torch.rand(len(action), pairs, **random).argsort(-1)
    time = (stratum + torch.rand(len(action), pairs, **random)) / pairs
    if mirror:
        half = pairs // 2
        time = torch.cat((time[:, :half], 1 - time[:, :half], time[:, 2 * half :]), 1)
    noise = torch.randn(len(action), pairs, action.shape[1], **random)
    time, noise = time.repeat_interleave(2, 1)[..., None], torch.stack((noise, -noise), 2).flatten(1, 2)
    return FlowDraws(time[:, :num_draws], noise[:, :num_draws])


def _flow_path(time: Tensor, path: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """alpha and sigma of x = alpha*action + sigma*noise, and their derivatives by the path's clock."""
    if path == "linear":
        return 1 - time, time, -torch.ones_like(time), torch.ones_like(time)
    cos, sin = (_SPAN[path] * time).cos(), (_SPAN[path] * time).sin()
    return cos, sin, -sin, cos


def _check_flow(action: Tensor, draws: FlowDraws, path: str) -> None:
    if not (isinstance(draws, tuple) and len(draws) == 2):
        raise TypeError(f"draws: expected FlowDraws(time, noise), got {type(draws).__name__}")
    time, noise = (draws[0], "BN1", "float"), (draws[1], "BNA", "float")
    _check(action=(action, "BA", "float"), **{"draws.time": time, "draws.noise": noise})
    _check_name("path", path, _SPAN)


def _call(velocity, x: Tensor, time: Tensor) -> Tensor:
    if not callable(velocity):
        raise TypeError(f"velocity: expected a callable (x, time) -> tensor like x, got {type(velocity).__name__}")
    v = velocity(x, time)
    if not isinstance(v, Tensor):
        raise TypeError(f"velocity: expected a tensor of shape {tuple(x.shape)}, got {type(v).__name__}")
    if v.shape != x.shape:
        raise ValueError(f"velocity: expected shape {tuple(x.shape)} as x, got {tuple(v.shape)}")
    return v


def flow_elbo(velocity, action: Tensor, draws: FlowDraws, path: str = "linear") -> Tensor:
    """Minus the conditional flow matching loss, one estimate per draw; FPO's stand-in for the ELBO.

    x = (1-t)*action + t*noise, target noise - action ("linear"); or x = cos(tau)*action + sin(tau)*noise, target
    cos(tau)*noise - sin(tau)*action, tau = t*pi/2 ("vp"). It is the ELBO only up to weighting and a constant:
    `flow_bound` is the bound itself, in nats.

    Args:
        velocity: callable, (x (..., A), time (..., 1)) -> (..., A); here x is (B, N, A).
        action: (B, A) float, unclipped, as sampled.
        draws: FlowDraws for these actions.
        path: "linear" or "vp".
    Returns: (B, N), minus the mean over action dimensions of the squared error; higher is better, at least float32.
    Raises: ValueError: wrong shapes, unknown path, or a velocity of another shape. TypeError: wrong types.
    Source: FPO (arXiv 2507.21053).
    """
    _check_flow(action, draws, path)
    time, noise = draws
    alpha, sigma, d_alpha, d_sigma = _flow_path(time, path)
    x, target = alpha * action[:, None] + sigma * noise, d_alpha * action[:, None] + d_sigma * noise
    error = _at_least_float32(_call(velocity, x, time)) - _at_least_float32(target)
    return -error.square().mean(-1)


def _solver_step(velocity, x: Tensor, time: float, num_steps: int, method: str, path: str) -> Tensor:
    """One step of dx/dt = velocity from `time` to time - 1/num_steps."""
    step, at = _SPAN[path] / num_steps, lambda t: x.new_full((len(x), 1), t)
    if method == "euler":
        return x.sub(_call(velocity, x, at(time)), alpha=step)
    middle = x.sub(_call(velocity, x, at(time)), alpha=step / 2)
    return x.sub(_call(velocity, middle, at(time - 0.5 / num_steps)), alpha=step)


def _check_solver(noise: Tensor, num_steps: int, method: str, path: str) -> None:
    _check(noise=(noise, "BA", "float"))
    _check_number("num_steps", num_steps, 1, integer=True)
    _check_name("method", method, ("midpoint", "euler"))
    _check_name("path", path, _SPAN)


def flow_sample(velocity, noise: Tensor, num_steps: int, method: str = "midpoint", path: str = "linear") -> Tensor:
    """Integrates dx/dt = velocity from noise (t = 1) to the action (t = 0).

    Midpoint with n steps costs as much as Euler with 2n, and shrinks the policy's spread far less when it is distilled
    on its own samples.

    Args:
        velocity: callable, (x (B, A), time (B, 1)) -> (B, A).
        noise: (B, A) float, standard normal.
        num_steps: solver steps; "midpoint" calls the velocity twice in each, "euler" once.
        method: "midpoint" or "euler".
        path: "linear" or "vp", as in `flow_elbo`.
    Returns: action (B, A), differentiable.
    Raises: ValueError: wrong shapes, num_steps < 1, unknown method or path. TypeError: wrong types.
    """
    _check_solver(noise, num_steps, method, path)
    x = noise
    for i in range(num_steps):
        x = _solver_step(velocity, x, 1 - i / num_steps, num_steps, method, path)
    return x


# 3. Policy gradient on the ELBO, and DiPOD. ---------------------------------------------------------------------------
# The paper's method, Algorithms 1 and 2. FPO puts exp(elbo - old_elbo) where PPO (arXiv 1707.06347) has the likelihood
# ratio. Before the first update (ratio 1, nothing clipped) Algorithm 2's gradient is E[(A + beta) grad elbo]: DiPOD is
# then an advantage shifted by beta. Algorithm 1, which interleaves self-distillation, is `beta * elbo` alone on fresh
# samples. The term is on policy at a rollout's first update; repeated on the same samples it also fits them:
# control_task.py's dipod-fresh samples anew, its dipod-flow leaves out the part whose likelihood is exact.


def _weighted_mean(weight: Tensor | None, size: Tensor) -> Callable[[Tensor], Tensor]:
    """Mean over samples as sum(w*x)/sum(w); x is (B,) or (B, N), N averaged first."""
    if weight is None:
        return Tensor.mean
    _check(elbo=(size, "BN"[: size.dim()], "float"), weight=(weight, "B", "float"))
    _check_values("weight", weight, lambda w: (w >= 0) & (w.sum() > 0), "values >= 0 with a sum > 0")
    return lambda x: (weight * (x if x.dim() == 1 else x.mean(1))).sum() / weight.sum()


def dipod_loss(
    elbo: Tensor,
    old_elbo: Tensor,
    advantages: Tensor,
    beta: float = 0.05,
    clip: float = 0.2,
    trust_region: str = "ppo",
    weight: Tensor | None = None,
    max_log_ratio: float = 10.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """DiPOD, Algorithm 2: a trust-region surrogate on the ELBO ratio, and the on-policy ELBO regularizer.

    loss = mean(-surrogate(ratio, A)) - beta * mean(elbo), ratio = exp(elbo - old_elbo). beta = 0 is FPO.

    Args:
        elbo: (B,) for one ratio per sample (FPO: the mean over draws) or (B, N) for one per draw (FPO++). Same draws as
            `old_elbo`.
        old_elbo: as `elbo`, from the policy that sampled; taken as a constant.
        advantages: (B,).
        beta: >= 0, in units of advantage per unit of `elbo`: on a per-token ELBO the same beta is L times weaker than
            on a per-sequence one.
        clip: > 0, half-width of the trust region in ratio.
        trust_region: "ppo", min(ratio*A, clamp(ratio, 1-clip, 1+clip)*A); "spo", ratio*A - |A|/(2 clip) (ratio-1)^2;
            "aspo" (FPO++), ppo where A > 0 and spo elsewhere.
        weight: (B,) >= 0 or None; every mean over samples becomes sum(w*x)/sum(w). Completion lengths for length
            weighting, 0 for steps that must not count.
        max_log_ratio: the log ratio is capped here from above, with a straight-through gradient, so that exp is finite.
    Returns: loss, 0-d; info, detached 0-d tensors "policy_loss", "elbo", "ratio", "clip_fraction" (share of ratios that
        are farther than clip from 1).
    Raises: ValueError: wrong shapes, clip <= 0, unknown trust_region, bad weights (on the CPU). TypeError: wrong types.
    Source: arXiv 2606.13795 Algorithm 2; FPO (2507.21053); SPO and ASPO as in FPO++ (2602.02481).
    """
    shape = "BN" if isinstance(elbo, Tensor) and elbo.dim() == 2 else "B"
    _check(elbo=(elbo, shape, "float"), old_elbo=(old_elbo, shape, "float"), advantages=(advantages, "B", "float"))
    _check_number("beta", beta, 0)
    _check_number("clip", clip, 0, above=True)
    _check_number("max_log_ratio", max_log_ratio, 0, above=True)
    _check_name("trust_region", trust_region, ("ppo", "spo", "aspo"))
    mean = _weighted_mean(weight, elbo)
    a = advantages if shape == "B" else advantages[:, None]
    log_ratio = elbo - old_elbo.detach()
    ratio = (log_ratio - (log_ratio - max_log_ratio).clamp(min=0).detach()).exp()
    surrogate = torch.minimum(ratio * a, ratio.clamp(1 - clip, 1 + clip) * a)
    if trust_region != "ppo":
        spo = ratio * a - a.abs() / (2 * clip) * (ratio - 1).square()
        surrogate = spo if trust_region == "spo" else torch.where(a > 0, surrogate, spo)
    policy_loss, mean_elbo, ratio = -mean(surrogate), mean(elbo), ratio.detach()
    loss = policy_loss - beta * mean_elbo  # [DiPOD]
    clipped = ((ratio - 1).abs() > clip).to(ratio.dtype)
    info = {"policy_loss": policy_loss.detach(), "elbo": mean_elbo.detach()}
    return loss, info | {"ratio": mean(ratio), "clip_fraction": mean(clipped)}


def spg_loss(
    elbo: Tensor, eubo: Tensor, advantages: Tensor, beta: float = 0.05, mix: float = 0.5, weight: Tensor | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """SPG with DiPOD's regularizer: climb good samples' ELBO, descend a mix of EUBO and ELBO of bad ones; no ratio.

    score = elbo where A > 0, else mix*eubo + (1-mix)*elbo; loss = mean(-A*score) - beta*mean(elbo). beta = 0 is SPG.

    Args:
        elbo: (B,), or (B, N) of which the mean over draws is taken, nats.
        eubo: (B,) nats.
        advantages: (B,).
        beta: >= 0, as in `dipod_loss`.
        mix: in [0, 1].
        weight: (B,) or None, as in `dipod_loss`.
    Returns: loss, 0-d; info, detached 0-d tensors "policy_loss", "elbo", "eubo".
    Raises: ValueError: wrong shapes, beta < 0, mix outside [0, 1], bad weights (on the CPU). TypeError: wrong types.
    Source: SPG (arXiv 2510.09541) with arXiv 2606.13795 Algorithm 2.
    """
    shape = "BN" if isinstance(elbo, Tensor) and elbo.dim() == 2 else "B"
    _check(elbo=(elbo, shape, "float"), eubo=(eubo, "B", "float"), advantages=(advantages, "B", "float"))
    _check_number("beta", beta, 0)
    _check_number("mix", mix, 0, 1)
    elbo = elbo if shape == "B" else elbo.mean(1)
    mean = _weighted_mean(weight, elbo)
    score = torch.where(advantages > 0, elbo, mix * eubo + (1 - mix) * elbo)
    policy_loss, mean_elbo = -mean(advantages * score), mean(elbo)
    loss = policy_loss - beta * mean_elbo  # [DiPOD]
    return loss, {"policy_loss": policy_loss.detach(), "elbo": mean_elbo.detach(), "eubo": mean(eubo).detach()}


def group_advantages(rewards: Tensor, normalize: bool = True) -> Tensor:
    """GRPO's advantages: rewards less their group's mean, over (standard deviation + 1e-4) if `normalize`.

    Args:
        rewards: (P, G) float, G >= 2 samples of each of P prompts.
        normalize: divide by the group's unbiased standard deviation (torch's default).
    Returns: (P, G); exactly 0 in a group of equal rewards, which teaches nothing.
    Raises: ValueError: wrong shape or G < 2. TypeError: wrong type.
    Source: GRPO (arXiv 2402.03300).
    """
    _check(rewards=(rewards, "PG", "float"))
    if rewards.shape[1] < 2:
        raise ValueError(f"rewards: expected G >= 2 samples in a group, got shape {tuple(rewards.shape)}")
    relative = rewards - rewards[:, :1]  # exact zeros for equal rewards, where a rounded mean would leave noise
    centred = relative - relative.mean(1, keepdim=True)
    return centred / (relative.std(1, keepdim=True) + 1e-4) if normalize else centred


# 4. Measuring the drift: exact likelihoods, the gap, and the alignment of proxy and true gradient. --------------------
# The paper's double drift. Exact, so small: 2^L contexts of a completion, A x A Jacobians of an action.


def exact_likelihood(
    model, tokens: Tensor, maskable: Tensor, mask_id: int, batch_size: int = 8192
) -> tuple[Tensor, Tensor]:
    """Exact log-likelihood of `sample_masked` and exact ELBO, from all 2^L - 1 contexts of a row; differentiable.

    The dynamic programme over revealed subsets S: F({}) = 1, F(S+i) += F(S) p(x_i|x_S) / (L-|S|), pi(x) = F(all), in
    log space. ELBO: sum over sizes s of the mean over |S| = s of the mean over i not in S of log p(x_i|x_S).

    Args:
        model: callable, tokens (M, T) -> logits (M, T, V).
        tokens: (B, T) int.
        maskable: (B, T) bool, 1 <= L <= 14 tokens in each row; rows may differ in L.
        mask_id: the mask token.
        batch_size: contexts in one forward pass.
    Returns: log_prob (B,) and elbo (B,), nats.
    Raises: ValueError: wrong shapes, an empty row, L > 14. TypeError: wrong types.
    """
    _check(tokens=(tokens, "BT", "int"), maskable=(maskable, "BT", "bool"))
    _check_number("mask_id", mask_id, 0, integer=True)
    _check_number("batch_size", batch_size, 1, integer=True)
    lengths = [maskable.shape[1]] if maskable.is_meta else sorted(set(maskable.sum(-1).tolist()))
    if lengths[0] < 1 or lengths[-1] > 14:
        raise ValueError(f"maskable: expected 1 to 14 maskable tokens in each row (2^L contexts), got {lengths}")
    if len(lengths) > 1:  # rows of different lengths, one at a time
        rows = zip(tokens.split(1), maskable.split(1))
        parts = [exact_likelihood(model, t, m, mask_id, batch_size) for t, m in rows]
        return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])

    length, (batch, width), device = lengths[0], tokens.shape, tokens.device
    bit = torch.arange(length, device=device)
    revealed = (torch.arange(2**length - 1, device=device)[:, None] >> bit & 1).bool()  # (S, L): S counts subsets
    position = maskable.int().argsort(dim=-1, descending=True, stable=True)[:, None, :length]
    position = position.expand(-1, len(revealed), -1)
    mask = maskable.new_zeros(batch, len(revealed), width).scatter(2, position, ~revealed.expand(batch, -1, -1))
    rows_of = tokens[:, None].expand(-1, len(revealed), -1).flatten(0, 1)
    chunks = zip(rows_of.split(batch_size), mask.flatten(0, 1)[:, None].split(batch_size))
    log_p = torch.cat([_masked_log_prob(model, t, m, mask_id)[:, 0] for t, m in chunks])
    log_p = log_p.view(batch, -1, width).gather(2, position)  # (B, S, L): log p(x_i | x_S), 0 for i in S

    share = log_p.new_tensor([1 / (math.comb(length, s) * (length - s)) for s in range(length)])
    elbo = (log_p.sum(-1) * share[revealed.sum(-1)]).sum(-1)
    log_f, place = log_p.new_zeros(batch, 1), torch.zeros(2**length, dtype=torch.long, device=device)
    for s in range(1, length + 1):  # all subsets of size s at once, each from its s predecessors S-i
        member = torch.tensor(list(combinations(range(length), s)), device=device)  # (subsets, s)
        subset = (1 << member).sum(-1)
        before = subset[:, None] - (1 << member)
        log_f = (log_f[:, place[before]] + log_p[:, before, member]).logsumexp(-1) - math.log(length - s + 1)
        place[subset] = torch.arange(len(subset), device=device)
    return log_f[:, 0], elbo


def flow_log_prob(
    velocity,
    noise: Tensor,
    num_steps: int,
    method: str = "midpoint",
    path: str = "linear",
    action: Tensor | None = None,
    return_invertible: bool = False,
) -> tuple[Tensor, ...]:
    """Samples like `flow_sample` and returns the exact log-likelihood of that discrete sampler's action.

    log_prob = log N(noise) - sum over solver steps of log|det Jacobian|. Its gradient is the score, d log pi(a)/d theta
    at the action held fixed: the noise that leads to a fixed action moves with theta, which one differentiable Newton
    step per solver step, back along the stored path, accounts for (its value is the path itself, its derivative the
    implicit function's).

    Args:
        velocity, noise (B, A), num_steps, method, path: as in `flow_sample`. Rows must not interact.
        action: (B, A), the flow's action again where it carries a graph, as (a - mean) / std does when the flow is
            whitened; the score then includes that graph.
        return_invertible: also return which samples had det > 0 in every step. Elsewhere the map folds over: another
            noise leads to the same action, and log_prob, which leaves it out, is not to be trusted.
    Returns: action (B, A), detached; log_prob (B,) nats; invertible (B,) bool if asked for.
    Raises: ValueError: wrong shapes, num_steps < 1, unknown method or path. TypeError: wrong types.
    """
    _check_solver(noise, num_steps, method, path)
    times = [1 - i / num_steps for i in range(num_steps)]

    def step(x, time):
        return _solver_step(velocity, x, time, num_steps, method, path)

    def jacobian(x, time):  # (B, A, A); rows do not interact, so A vector-Jacobian products serve the whole batch
        return torch.func.jacrev(lambda y: step(y, time).sum(0))(x).movedim(1, 0)

    points = [noise.detach()]
    with torch.no_grad():
        for time in times:
            points.append(step(points[-1], time))
    y, log_det, invertible = points[-1], 0.0, torch.ones_like(noise[:, 0], dtype=torch.bool)
    if action is not None:
        _check(noise=(noise, "BA", "float"), action=(action, "BA", "float"))
        y = y + (action - action.detach())
    for x, time in zip(reversed(points[:-1]), reversed(times)):
        error = step(x, time) - y  # value 0
        y = x - torch.linalg.solve_ex(jacobian(x, time).detach(), error[..., None])[0][..., 0]
        sign, log_abs_det = torch.linalg.slogdet(jacobian(y, time))
        log_det, invertible = log_det + log_abs_det, invertible & (sign > 0)
    log_prob = -0.5 * (y.square() + math.log(2 * math.pi)).sum(-1) - log_det
    return (points[-1], log_prob, invertible) if return_invertible else (points[-1], log_prob)


def flow_bound(velocity, action: Tensor, draws: FlowDraws, path: str = "linear", min_time: float = 0.0) -> Tensor:
    """The flow's true ELBO in nats, one estimate per draw, so that a gap of 0 means tight.

    log N(action) - integral over the path's clock of (alpha/sigma) (|v-u|^2 - |v0-u|^2), u = dx/dt and v0 the exact
    velocity of a standard normal, for which the bound is tight. For "vp", v0 = 0 and alpha/sigma = cot(tau). It bounds
    the likelihood of the SDE with this velocity while the sampler is the ODE: one sample's gap may be negative, the
    mean over the policy's own samples may not.

    Args:
        velocity, action (B, A), draws, path: as in `flow_elbo`.
        min_time: the integral starts here. It converges at 0 only if velocity = v0 there (for "vp" an output that
            vanishes like sin(tau)); else truncate, and say so.
    Returns: (B, N) nats.
    Raises: As `flow_elbo`; ValueError for min_time outside [0, 1].
    Source: the variational bound of VDM (arXiv 2107.00630), written for a velocity.
    """
    _check_flow(action, draws, path)
    _check_number("min_time", min_time, 0, 1)
    time, noise = min_time + (1 - min_time) * draws[0], draws[1]
    alpha, sigma, d_alpha, d_sigma = _flow_path(time, path)
    x, u = alpha * action[:, None] + sigma * noise, d_alpha * action[:, None] + d_sigma * noise
    v, v0 = _call(velocity, x, time), (alpha * d_alpha + sigma * d_sigma) / (alpha**2 + sigma**2) * x
    weight = alpha / sigma.clamp(min=torch.finfo(sigma.dtype).tiny)  # at sigma = 0 the rest is 0, or the bound diverges
    integrand = weight * ((v - v0) * (v + v0 - 2 * u)).sum(-1, keepdim=True)
    log_normal = -0.5 * (action.square() + math.log(2 * math.pi)).sum(-1)
    return log_normal[:, None] - (1 - min_time) * _SPAN[path] * integrand[..., 0]


def alignment(proxy: Tensor, true: Tensor, parameters) -> Tensor:
    """Cosine of the gradients of two scalars over `parameters`; 1: the same direction, NaN where a gradient is 0.

    Args:
        proxy, true: 0-d tensors with a graph, for instance mean(A * elbo) and mean(A * log_prob). The graph is kept.
        parameters: iterable of tensors that require a gradient.
    Returns: 0-d tensor, detached.
    Raises: ValueError: not 0-d, or no parameters. TypeError: wrong types.
    Source: arXiv 2606.13795, second drift.
    """
    _check(proxy=(proxy, "", "float"), true=(true, "", "float"))
    parameters = list(parameters)
    if not parameters:
        raise ValueError("parameters: expected at least one tensor, got none")

    def flat_gradient(y):
        gradients = torch.autograd.grad(y, parameters, retain_graph=True, allow_unused=True, materialize_grads=True)
        return torch.cat([g.flatten() for g in gradients])

    a, b = flat_gradient(proxy), flat_gradient(true)
    return (a @ b) / (a.norm() * b.norm())


# 5. The two-token example: both drifts, exactly. ----------------------------------------------------------------------
# The paper's controlled diagnostic, its Figure 2.


def two_token(
    beta: float = 0.2, steps: int = 1500, lr: float = 0.1, rewards: tuple[float, ...] = (0.8, 1.0, 0.7, 1.0)
) -> dict[str, Tensor]:
    """The paper's controlled diagnostic: two tokens over {A, B}, six logits, every expectation exact.

    Plain gradient ascent on E_pi[(A + beta) grad elbo], A = r - E_pi[r].

    Args:
        beta: >= 0, weight of the on-policy ELBO regularizer.
        steps: updates.
        lr: step size.
        rewards: of AA, AB, BA, BB.
    Returns: dict of (steps+1,) float64 tensors, before each update and after the last: "gap_AA" and "gap" (mean under
        pi) in nats, "alignment" of E_pi[A grad elbo] with E_pi[A grad log_prob], "reward" (expected).
    Raises: ValueError: beta < 0, steps < 0, lr <= 0 or not four rewards. TypeError: wrong types.
    """
    _check_number("beta", beta, 0)
    _check_number("steps", steps, 0, integer=True)
    _check_number("lr", lr, 0, above=True)
    if len(rewards) != 4:
        raise ValueError(f"rewards: expected four numbers (AA, AB, BA, BB), got {rewards}")
    # logits of A: p(x1|M,A), p(x1|M,M), p(x2|A,M), p(x2|M,M), p(x1|M,B), p(x2|B,M); A, B, M are tokens 0, 1, 2.
    theta = torch.zeros(6, dtype=torch.float64, requires_grad=True)
    x1_given, x2_given = torch.tensor([0, 4, 1]), torch.tensor([2, 5, 3])  # which logit, by the other token

    def model(tokens):  # (M, 2) -> (M, 2, 2)
        logit_a = theta[torch.stack((x1_given[tokens[:, 1]], x2_given[tokens[:, 0]]), 1)]
        return torch.stack((logit_a, torch.zeros_like(logit_a)), -1)

    sequences = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]])
    maskable = torch.ones_like(sequences, dtype=torch.bool)
    reward = torch.tensor(rewards, dtype=torch.float64)
    history = {name: torch.empty(steps + 1, dtype=torch.float64) for name in ("gap_AA", "gap", "alignment", "reward")}
    for step in range(steps + 1):
        log_prob, elbo = exact_likelihood(model, sequences, maskable, mask_id=2)
        pi, gap = log_prob.detach().exp(), (log_prob - elbo).detach()
        advantage = reward - pi @ reward
        proxy, true = (pi * advantage) @ elbo, (pi * advantage) @ log_prob
        values = gap[0], pi @ gap, alignment(proxy, true, [theta]), pi @ reward
        for record, value in zip(history.values(), values):
            record[step] = value
        (gradient,) = torch.autograd.grad((pi * (advantage + beta)) @ elbo, theta)  # [DiPOD]
        with torch.no_grad():
            theta += lr * gradient
    return history


# ======================================================================================================================
# The method ends here. Below: running and reporting, which both tasks need and nobody has to copy.

# Okabe and Ito's colour-blind safe palette, then Paul Tol's; a method has one colour in every figure.
COLORS = {"fpo": "#D55E00", "dipod": "#0072B2", "ppo": "#000000", "exact": "#000000", "positives": "#009E73"}
COLORS |= {"dipod-fresh": "#009E73", "dipod-flow": "#CC79A7", "dipod-mixed": "#56B4E9", "dipod++": "#56B4E9"}
COLORS |= {"fpo++": "#E69F00", "spg": "#E69F00", "spg-dipod": "#44AA99", "d1": "#F0E442", "interleave": "#882255"}
COLORS |= {"distill": "#999999", "reinforce": "#117733", "fpo-kl": "#DDCC77"}
COLORS |= {"fpo-exact": "#332288", "distill-exact": "#88CCEE"}


def task_parser(doc: str, methods, default, steps: int, unit: str, out: str) -> argparse.ArgumentParser:
    """The flags that both tasks have; `unit` says what --steps counts."""
    summary, _, usage = doc.partition("\n\n")
    known = f"of {', '.join(methods)} (default: {' '.join(default)})"
    parser = argparse.ArgumentParser(description=summary, epilog=usage, formatter_class=_Defaults)
    add, own, devices = parser.add_argument, "default: the method's own", ("auto", "cpu", "cuda", "mps")
    add("--methods", nargs="+", choices=methods, default=default, metavar="M", help=known)
    add("--seeds", type=at_least(1), default=1, metavar="N", help="run seeds 0..N-1")
    add("--first-seed", type=at_least(0), default=0, metavar="S", help="run S..S+N-1 instead")
    add("--jobs", type=at_least(1), default=os.cpu_count(), help="processes, one torch thread each")
    add("--steps", type=at_least(1), default=steps, help=f"{unit} of each run")
    add("--beta", type=at_least(0, float), help=f"weight of the on-policy ELBO; {own}")
    add("--clip", type=at_least(0, float), help=f"half-width of the trust region; {own}")
    add("--lr", type=at_least(0, float), help=f"learning rate; {own}")
    add("--decay", action="store_true", help="decay the learning rate linearly to 0")
    add("--decay-beta", action="store_true", help="decay beta linearly to 0")
    add("--out", type=Path, default=Path(out), metavar="DIR", help="tables, figure and checkpoints")
    add("--resume", action="store_true", help="go on from the checkpoints in --out")
    add("--device", choices=devices, default="auto", help="auto: cuda if there is one, else cpu")
    add("--rows", type=at_least(1), default=30, help="progress lines and metrics rows of each run")
    add("--no-drift", action="store_true", help="do not measure gap and alignment while training")
    return parser


class _Defaults(argparse.RawDescriptionHelpFormatter):
    """Shows a default where there is one to show."""

    def _get_help_string(self, action):
        plain = action.default in (None, False, argparse.SUPPRESS) or isinstance(action.default, list)
        return action.help + ("" if plain else " (default: %(default)s)")


def at_least(low: int, kind: type = int):
    """An argparse type: finite numbers >= low, whole ones unless `kind` is float."""

    def number(text: str):
        if not low <= kind(text) < math.inf:
            sort = "whole" if kind is int else "finite"
            raise argparse.ArgumentTypeError(f"expected a {sort} number >= {low}, got {text}")
        return kind(text)

    return number


def fail(message: str):
    """Ends the program with one clear line and exit status 2."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def pick_device(name: str) -> torch.device:
    """The device that --device names; one clear line if this torch does not have it."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ and torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    return torch.device(name) if available[name] else fail(f"--device {name}: this torch has no such device")


def world() -> tuple[int, int]:
    """Rank and number of processes under torchrun, else (0, 1)."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def join_world(device: torch.device) -> None:
    """Under torchrun, joins the other processes: nccl on GPUs, gloo elsewhere."""
    if world()[1] > 1:
        torch.set_num_threads(1)
        torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")


def leave_world() -> None:
    """Parts from the other processes, all at once."""
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    sleep(0.2)  # gives up the interpreter's lock: gloo's threads need it to drop their last work, or abort the exit


def parallel(module: torch.nn.Module) -> torch.nn.Module:
    """The module whose gradients are averaged over all processes: DistributedDataParallel under torchrun."""
    return torch.nn.parallel.DistributedDataParallel(module) if world()[1] > 1 else module


def world_mean(x: Tensor) -> Tensor:
    """Mean over processes."""
    if world()[1] > 1:
        x = x.clone()
        torch.distributed.all_reduce(x)
    return x / world()[1]


def share_of(name: str, total: int) -> int:
    """This process's part of `total` prompts, environments or samples."""
    size = world()[1]
    return total // size if total % size == 0 else fail(f"{name} {total}: expected a multiple of {size} processes")


def make_directory(path: Path) -> None:
    """Makes --out and tries to write there; one clear line if that fails."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        (path / "metrics.partial").touch()
    except OSError as e:
        fail(f"--out {path}: cannot write there ({e.strerror})")


def checkpoint_path(out: Path, method: str, seed: int) -> Path:
    """Where a run keeps its checkpoint."""
    return Path(out) / f"{method}_{seed}.pt"


def save_checkpoint(path: Path, state: dict) -> None:
    """Writes atomically: a reader, or a run killed at any moment, finds the old file or the new one, whole."""
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    os.replace(partial, path)


def load_checkpoint(path: Path, device="cpu") -> dict:
    """Loads what `save_checkpoint` wrote; tensors and plain values only, never code. One clear line if it cannot."""
    if not Path(path).is_file():
        fail(f"{path}: no such checkpoint")
    try:
        state = torch.load(path, map_location=device, weights_only=True)
        return state if "rows" in state else fail(f"{path}: not a checkpoint of this project")
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, pickle.UnpicklingError) as e:
        fail(f"{path}: not a readable checkpoint ({type(e).__name__})")


def snapshot(parts: dict, watch: torch.Generator) -> dict:
    """What a run goes on from: the states of its parts (all with a state_dict) and of every process's generators."""
    own = [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [])]
    states = [own] * world()[1]
    if world()[1] > 1:
        torch.distributed.all_gather_object(states, own)
    return {name: part.state_dict() for name, part in parts.items()} | {"rng": states, "watch": watch.get_state()}


def restore(path: Path, settings: dict, parts: dict, watch: torch.Generator, device) -> dict:
    """Brings a run's parts and generators to where its checkpoint left them; one clear line if the settings differ."""
    state, (rank, size) = load_checkpoint(path, device), world()
    if (had := len(state.get("rng", ()))) != size:  # first, for a minibatch's share depends on it
        fail(f"--resume: expected {had} processes, as the checkpoint had, got {size}")
    if changed := [k for k, v in settings.items() if state.get("settings", {}).get(k) != v]:
        fail(f"--resume: {path} was trained with other settings ({', '.join(changed)})")
    for name, part in parts.items():
        part.load_state_dict(state[name])
    watch.set_state(state["watch"].cpu())
    torch.set_rng_state(state["rng"][rank][0].cpu())
    if len(state["rng"][rank]) > 1:
        torch.cuda.set_rng_state_all([s.cpu() for s in state["rng"][rank][1:]])
    return state


def report(args: argparse.Namespace, row: dict, state: dict, started: float, done: float) -> None:
    """Checkpoint first, then the row to metrics.csv, then to the terminal: what was printed is never lost.

    `started` is when this process began, `done` the share (0, 1] of the run behind it; state["rows"] holds all rows.
    """
    if world()[0] > 0:
        return
    save_checkpoint(checkpoint_path(args.out, row["method"], row["seed"]), state)
    with open(args.out / "metrics.csv", "a", newline="") as file:  # one write, appended whole
        file.write(",".join(_text(v) for v in row.values()) + "\r\n")
    elapsed, skipped = monotonic() - started, state["skipped"]
    left = elapsed * (1 - done) / max(done - skipped, 1e-9)
    total = round(row["step"] / done)
    speed = (row["step"] - skipped * total) / max(elapsed, 1e-9)
    shown = "  ".join(f"{k} {_short(v)}" for k, v in row.items() if k not in ("method", "seed", "step", "wall"))
    name = f"{row['method']:<10} seed {row['seed']}  step {row['step']}/{total}"
    print(f"{name}  {shown}  {speed:.0f} steps/s  left {int(left) // 60}:{int(left) % 60:02d}", flush=True)


def _text(value) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _short(value) -> str:
    return str(value) if not isinstance(value, float) else "-" if math.isnan(value) else f"{value:.3g}"


def launch(train: Callable, args: argparse.Namespace, columns: list[str]) -> list[dict]:
    """Runs train(method, seed, args) for each method and seed, in parallel processes; the rows of metrics.csv.

    A run that stops on FloatingPointError says so in a line, keeps its last checkpoint and makes the exit status 1.
    Under torchrun the processes share each run instead, one run after the other, and rank 0 alone writes.
    """
    runs = [(method, seed) for seed in range(args.first_seed, args.first_seed + args.seeds) for method in args.methods]
    saved, (rank, size) = [checkpoint_path(args.out, *run) for run in runs], world()
    if rank == 0:
        make_directory(args.out)
        for path in saved if not args.resume else ():
            path.unlink(missing_ok=True)
        collect_rows(args, saved, columns)
    if size == 1:
        failed = run_in_pool(train, runs, args)
    else:
        torch.distributed.barrier()
        failed = sum(stopped(lambda run=run: train(*run, args), rank) for run in runs) > 0
        leave_world()
    rows = collect_rows(args, saved, columns) if rank == 0 else []
    if failed or rank > 0:
        raise SystemExit(int(failed))
    return rows


def collect_rows(args: argparse.Namespace, saved: list[Path], columns: list[str]) -> list[dict]:
    """Writes metrics.csv anew from the checkpoints, which hold every row that was reported, once."""
    if args.resume:  # also the runs of earlier commands that this one does not repeat
        saved = saved + sorted(set(args.out.glob("*.pt")) - set(saved))
    rows = [row for path in saved if path.exists() for row in load_checkpoint(path)["rows"]]
    write_csv(args.out / "metrics.csv", rows, columns)
    return rows


def stopped(run: Callable, rank: int = 0) -> bool:
    """Whether a run stopped on a non-finite number; rank 0 says so."""
    try:
        run()
    except FloatingPointError as e:
        if rank == 0:
            print(f"error: {e}", file=sys.stderr, flush=True)
        return True
    return False


def run_in_pool(train: Callable, runs: list[tuple[str, int]], args: argparse.Namespace) -> bool:
    """Whether one of the runs stopped on a non-finite number. Ctrl-C ends them all; --resume goes on."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(args.jobs, len(runs)), spawn, start_worker) as pool:
        futures = [pool.submit(train, *run, args) for run in runs]
        try:
            return sum(stopped(future.result) for future in as_completed(futures)) > 0
        except BaseException as e:
            for worker in multiprocessing.active_children():
                worker.terminate()
            if not isinstance(e, KeyboardInterrupt):
                raise
            print(f"interrupted; --resume goes on from the checkpoints in {args.out}", file=sys.stderr)
            raise SystemExit(130) from None


def start_worker() -> None:
    """One torch thread, for small networks gain nothing from more; and no work on for a parent that was killed."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which ends the workers
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def write_csv(path: Path, rows: list[dict], columns: list[str]) -> None:
    """Writes rows atomically, numbers with six digits."""
    partial = path.with_suffix(".partial")
    with open(partial, "w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows({k: _text(v) for k, v in row.items()} for row in rows)
    os.replace(partial, path)


def read_csv(paths) -> list[dict]:
    """Rows of metrics files with numbers as numbers."""
    rows = []
    for path in paths:
        try:
            with open(path, newline="") as file:
                rows += [{k: v if k == "method" else float(v) for k, v in row.items()} for row in csv.DictReader(file)]
        except (OSError, ValueError, TypeError) as e:
            fail(f"{path}: not a readable metrics file ({e})")
    return rows or fail(f"{', '.join(map(str, paths))}: no rows")


def _mean(values) -> float:
    known = [v for v in values if not math.isnan(v)]
    return sum(known) / len(known) if known else math.nan


def summarise(rows: list[dict], score: str, last: float = 0.1) -> list[dict]:
    """A line per method and seed: means over the last tenth of the steps, `score`'s mean over all of them, its peak."""
    lines = []
    for method, seed in dict.fromkeys((row["method"], row["seed"]) for row in rows):
        run = [row for row in rows if (row["method"], row["seed"]) == (method, seed)]
        end = [row for row in run if row["step"] > (1 - last) * run[-1]["step"]]
        line = {"method": method, "seed": seed, f"final_{score}": _mean(row[score] for row in end)}
        line["area"] = _mean(row[score] for row in run)
        line["peak"] = max((row[score] for row in run if not math.isnan(row[score])), default=math.nan)
        for name in ("gap", "alignment", *(k for k in ("held_out", "entropy") if k in run[0])):
            line[name] = _mean(row[name] for row in end)
        lines.append(line | {"wall": run[-1]["wall"]})
    return lines


def print_table(lines: list[dict]) -> None:
    """A row per method: mean over seeds, [min..max] with more than one."""
    names = [k for k in lines[0] if k not in ("method", "seed")]
    table = [["method", "seeds", *names]]
    for method in dict.fromkeys(line["method"] for line in lines):
        own = [line for line in lines if line["method"] == method]
        cells = []
        for name in names:
            values = [line[name] for line in own if not math.isnan(line[name])]
            cell = _short(_mean(values))
            cells.append(cell + (f" [{min(values):.3g}..{max(values):.3g}]" if len(values) > 1 else ""))
        table.append([method, str(len(own)), *cells])
    widths = [max(map(len, column)) for column in zip(*table)]
    print("\n" + "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in table))


def print_differences(lines: list[dict]) -> None:
    """Differences of each two methods in `final` and `area` over the seeds that both have, with a paired t interval."""
    t95 = 12.7, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26  # Student's t, 2..10 seeds
    names = [k for k in lines[0] if k.startswith("final") or k == "area"]
    for (one, other), name in product(combinations(dict.fromkeys(line["method"] for line in lines), 2), names):
        values = {(line["method"], line["seed"]): line[name] for line in lines}
        pairs = [v - values[other, s] for (m, s), v in values.items() if m == one and (other, s) in values]
        if (n := len(pairs)) > 1:
            mean, half = statistics.mean(pairs), t95[min(n, 10) - 2] * statistics.stdev(pairs) / math.sqrt(n)
            interval = f"{mean:.3g}, 95 % interval {mean - half:.3g} to {mean + half:.3g}"
            print(f"{one} - {other}, {name}: {interval}, above 0 on {sum(d > 0 for d in pairs)} of {n} seeds")


def draw_figure(rows: list[dict], panels: dict[str, str], path: Path, title: str = "") -> None:
    """A panel per column, a line per method (the mean), a band over seeds (min..max)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    methods = list(dict.fromkeys(row["method"] for row in rows))
    figure, axes = plt.subplots(1, len(panels), figsize=(3.4 * len(panels), 2.9), layout="constrained")
    for axis, (column, label) in zip(axes, panels.items()):
        for i, method in enumerate(methods):
            by_step = {}
            for row in rows:
                if row["method"] == method and not math.isnan(row[column]):
                    by_step.setdefault(row["step"], []).append(row[column])
            color = COLORS.get(method) or plt.get_cmap("viridis")(0.9 - 0.9 * i / len(methods))
            steps, values = sorted(by_step), [by_step[step] for step in sorted(by_step)]
            axis.plot(steps, [_mean(v) for v in values], color=color, label=method, linewidth=2)
            low, high = [min(v) for v in values], [max(v) for v in values]
            axis.fill_between(steps, low, high, color=color, alpha=0.2, linewidth=0)
        unit = {"return": "environment steps", "reward": "RL iterations"}.get(next(iter(panels)), "updates")
        axis.set(xlabel=unit, ylabel=label)
        if column.startswith("gap") and axis.get_ylim()[1] > 10:  # a hundredth of a nat beside hundreds
            axis.set_yscale("symlog", linthresh=0.1)
            axis.set_ylim(bottom=-0.1)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False)
    figure.suptitle(title)
    save_figure(figure, path)
    plt.close(figure)


def save_figure(figure, path) -> None:
    """Writes a figure's PNG; one clear line if that fails."""
    try:
        figure.savefig(path, dpi=110)
    except (OSError, ValueError) as e:
        fail(f"{path}: cannot write the figure there ({e})")


def finish(rows: list[dict], args: argparse.Namespace, score: str, panels: dict[str, str], title: str = "") -> None:
    """summary.csv, the table and figure.png of a finished command."""
    lines = summarise(rows, score)
    write_csv(args.out / "summary.csv", lines, list(lines[0]))
    print_table(lines)
    try:
        draw_figure(rows, panels, args.out / "figure.png", title)
    except ImportError:
        print("no figure: matplotlib is not installed")
    print(f"\nwritten to {args.out}: metrics.csv, summary.csv, figure.png and a checkpoint per run")


def main() -> None:
    """The two-token diagnostic, or the table and figure of metrics files."""
    parser = argparse.ArgumentParser(description="The two-token diagnostic: both drifts, exactly (paper, Figure 2).")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw gap and alignment over the updates")
    parser.add_argument("--report", type=Path, nargs="+", metavar="CSV", help="the table of metrics files, and leave")
    parser.add_argument("--figure", type=Path, metavar="FILE", help="with --report: also the figure")
    parser.add_argument("--title", default="", help="with --figure")
    args = parser.parse_args()
    if args.report:
        rows = read_csv(args.report)
        score = "return" if "return" in rows[0] else "reward"
        lines = summarise(rows, score)
        print_table(lines)
        print_differences(lines)
        panels = {score: score, "gap": "gap (nats)", "alignment": "alignment (cosine)"}
        return draw_figure(rows, panels, args.figure, args.title) if args.figure else None
    torch.set_num_threads(1)  # six logits
    rows = []
    print(f"{'beta':>5} {'gap on AA':>10} {'mean gap':>10} {'alignment':>10} {'reward':>10}   nats; after 1500 updates")
    for beta in (0.0, 0.05, 0.1, 0.2, 0.5):
        history = two_token(beta)
        steps = [dict(zip(history, values)) for values in zip(*(v.tolist() for v in history.values()))]
        rows += [{"method": f"beta {beta:g}", "step": step} | values for step, values in enumerate(steps)]
        print(f"{beta:5}", *(f"{value:10.4f}" for value in steps[-1].values()))
    if args.plot:
        draw_figure(rows, {"gap_AA": "gap on AA (nats)", "alignment": "alignment (cosine)"}, args.plot)
        print(f"written: {args.plot}")


if __name__ == "__main__":
    main()
