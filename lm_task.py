"""A tiny character-level masked-diffusion LM, pretrained and post-trained, with both drifts measured exactly.

    python lm_task.py                                     # pretrain, then fpo, dipod, positives from the same base
    python lm_task.py --seeds 5                           # seed s starts from base model s mod 3
    python lm_task.py --lr 1e-3 --inner 2                 # large steps, where the drift is plainest
    python lm_task.py --base runs/lm/base_0.pt            # reuse a base model
    python lm_task.py --base runs/lm/base_0.pt --check    # the sampler's frequencies beside the exact likelihoods
    python lm_task.py --samples                           # also print completions of the base and the trained models
    python lm_task.py --benchmark                         # where the time goes

The prompt is a two-digit target, the completion digits and signs: `13:9+3+1`. Reward 1 if the completion is a sum of
the right form that equals the target, else 0. The length is fixed, so 2^5 contexts give the exact likelihood of a real
transformer while it trains. Shapes: B = P*G completions (P prompts of G samples), T tokens, L maskable, N draws.
"""

import math
from itertools import product
from pathlib import Path
from time import monotonic

import torch
from torch import Tensor, nn

import dipod
from dipod import (
    alignment,
    dipod_loss,
    draw_masks,
    exact_likelihood,
    group_advantages,
    masked_bounds,
    masked_elbo,
    sample_masked,
    spg_loss,
)

CHARS, MASK = "0123456789+-:", 13  # MASK is an input only: the model has no output for it
PLUS, MINUS, PROMPT = CHARS.index("+"), CHARS.index("-"), 3
SAMPLES, DRAWS = 8, 4  # of each prompt; of each completion, kept for old, new and all inner updates

# What a run has unless its method or a flag says otherwise. `loss`: which of dipod.py's losses, `score`: on what.
COMMON = {"lr": 3e-4, "clip": 0.2, "loss": "ratio", "score": "elbo", "beta": 0.0, "mix": 0.0, "positives": False}
COMMON |= {"mixed": False, "distill_every": 0, "kl": 0.0, "exact_beta": 0.0}
# interleave, Algorithm 1, spends every second rollout on self-distillation, so that all methods have the same numbers
# of samples and updates. Controls: dipod-mixed leaves groups of equal rewards out of the regularizer, for without
# advantages nothing but it would move them; fpo-kl is held near the base model instead of tight, fpo-exact has DiPOD's
# term on the exact log-likelihood, where it is no pressure on the gap, and distill only distils, distill-exact by the
# exact log-likelihood: what that does to a policy by itself.
METHODS = {
    "fpo": {},
    "dipod": {"beta": 0.3},
    "dipod-mixed": {"beta": 0.3, "mixed": True},
    "positives": {"positives": True},
    "interleave": {"distill_every": 2},
    "distill": {"distill_every": 1},
    "distill-exact": {"distill_every": 1, "score": "exact"},
    "fpo-kl": {"kl": 0.01},
    "fpo-exact": {"exact_beta": 0.3},
    "spg": {"loss": "spg", "mix": 0.5},
    "spg-dipod": {"loss": "spg", "mix": 0.5, "beta": 0.3},
    "reinforce": {"loss": "spg"},
    "exact": {"score": "exact"},
    "d1": {"score": "one_step"},
}
COLUMNS = ["method", "seed", "step", "reward", "held_out", "elbo", "log_prob", "gap", "gap_success", "gap_failure"]
COLUMNS += ["alignment", "noise_floor", "ratio", "clip_fraction", "equal_groups", "wall"]
PANELS = {"reward": "reward (share right)", "gap": "gap (nats)", "alignment": "alignment (cosine)"}


# The task


def encode(text: str) -> list[int]:
    """Tokens of a text in CHARS."""
    return [CHARS.index(c) for c in text]


def decode(tokens) -> str:
    """Text of tokens, `_` for a mask."""
    return "".join((CHARS + "_")[int(t)] for t in tokens)


def rewards(tokens: Tensor, graded: bool = False) -> Tensor:
    """1 where prompt and completion (B, T) read `target:digit sign digit ...` and it is true, else 0; (B,) float.

    With `graded` a well-formed completion that is wrong by e has 1/(1+e).
    """
    target, completion = 10 * tokens[:, 0] + tokens[:, 1], tokens[:, PROMPT:]
    digits, signs = completion[:, 0::2], completion[:, 1::2]
    well_formed = (digits < 10).all(1) & ((signs == PLUS) | (signs == MINUS)).all(1)
    total = digits[:, 0] + (torch.where(signs == PLUS, 1, -1) * digits[:, 1:]).sum(1)
    return well_formed / (1.0 + (total - target).abs()) if graded else (well_formed & (total == target)).float()


def expressions(digits: int) -> tuple[Tensor, Tensor]:
    """All completions with `digits` digits and a value >= 0, as tokens (M, 2*digits-1), and their values (M,)."""
    if digits > 3:  # too many to list: a random million of them
        parts = torch.randint(0, 10, (10**6, digits)), torch.randint(PLUS, MINUS + 1, (10**6, digits - 1))
        grid = torch.zeros(10**6, 2 * digits - 1, dtype=torch.long)
        grid[:, 0::2], grid[:, 1::2] = parts
    else:
        choices = [range(10) if i % 2 == 0 else (PLUS, MINUS) for i in range(2 * digits - 1)]
        grid = torch.tensor(list(product(*choices)))
    value = grid[:, 0] + (torch.where(grid[:, 1::2] == PLUS, 1, -1) * grid[:, 2::2]).sum(1)
    return grid[value >= 0], value[value >= 0]


def prompts(targets: Tensor, length: int) -> Tensor:
    """(B, T): each target's prompt and a fully masked completion."""
    colon, masks = torch.full_like(targets, CHARS.index(":")), targets.new_full((len(targets), length), MASK)
    return torch.cat((torch.stack((targets // 10, targets % 10, colon), 1), masks), 1)


def maskable_of(tokens: Tensor) -> Tensor:
    """(B, T) bool: the completion of each row."""
    return (torch.arange(tokens.shape[1], device=tokens.device) >= PROMPT).expand_as(tokens)


def split_targets(digits: int) -> tuple[Tensor, Tensor]:
    """Targets that RL trains on, and those it never sees (every fourth)."""
    targets = torch.arange(9 * digits + 1)
    return targets[targets % 4 != 2], targets[targets % 4 == 2]


class Model(nn.Module):
    """Bidirectional pre-LN transformer; tokens (M, T) -> logits (M, T, V), no output for the mask token."""

    def __init__(self, width: int, dim: int = 64):
        super().__init__()
        self.embed, self.position = nn.Embedding(len(CHARS) + 1, dim), nn.Parameter(torch.randn(width, dim))
        layer = nn.TransformerEncoderLayer(dim, 4, 2 * dim, dropout=0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, nn.LayerNorm(dim), enable_nested_tensor=False)
        self.head = nn.Linear(dim, len(CHARS))

    def forward(self, tokens: Tensor) -> Tensor:
        if tokens.device.type != "cpu":  # where counting distinct rows would make the GPU wait
            return self.head(self.encoder(self.embed(tokens) + self.position))
        tokens, row = tokens.unique(dim=0, return_inverse=True)  # equal masked inputs are evaluated once
        return self.head(self.encoder(self.embed(tokens) + self.position))[row]


def pretrain(name: str, seed: int, args, steps: int = 2000) -> Path:
    """Trains a base model on random expressions whose stated target is right with probability args.truth; saves it."""
    torch.manual_seed(seed)
    device, length, started = dipod.pick_device(args.device), 2 * args.digits - 1, monotonic()
    model = Model(PROMPT + length).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps, pct_start=0.1)  # warm-up, cosine
    completion, value = expressions(args.digits)
    for step in range(1, steps + 1):
        chosen = torch.randint(len(value), (256,))
        lie = torch.randint(0, 9 * args.digits + 1, (256,))
        tokens = prompts(torch.where(torch.rand(256) < args.truth, value[chosen], lie), length)
        maskable = (tokens == MASK).to(device)
        tokens[:, PROMPT:] = completion[chosen]
        loss = -masked_elbo(model, tokens.to(device), draw_masks(maskable, 1), MASK).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % (steps // 8) == 0:
            left = (monotonic() - started) / step * (steps - step)
            print(f"{name} {seed}  step {step}/{steps}  elbo {-loss.item():.2f} nats  left {left:.0f} s", flush=True)
    path = dipod.checkpoint_path(args.out, name, seed)
    dipod.save_checkpoint(path, {"model": model.state_dict(), "digits": args.digits, "rows": []})
    return path


def load_model(path: Path, device) -> tuple[Model, int]:
    """A saved model and its number of digits."""
    state = dipod.load_checkpoint(path, device)
    if "digits" not in state:
        dipod.fail(f"{path}: not a checkpoint of lm_task.py")
    model = Model(PROMPT + 2 * state["digits"] - 1).to(device)
    model.load_state_dict(state["model"])
    return model, state["digits"]


# Post-training


def score(model, kind: str, tokens: Tensor, maskable: Tensor, draws) -> Tensor:
    """What stands for the log-likelihood in the ratio: (B,), or (B, L) for d1's one ratio per token."""
    if kind == "exact":
        return exact_likelihood(model, tokens, maskable, MASK)[0]
    if kind == "one_step":  # d1: every token's log-probability from the fully masked completion
        log_p = model(torch.where(maskable, MASK, tokens)).log_softmax(-1)
        return log_p.gather(2, tokens[..., None])[:, PROMPT:, 0]
    return masked_elbo(model, tokens, draws, MASK).mean(1)


def loss_of(settings: dict, model, rollout: tuple, advantages: Tensor, old: Tensor, anchor: Tensor) -> tuple:
    """The method's loss on one rollout (tokens, maskable, draws), and its info."""
    if settings["loss"] == "spg":
        tokens, _, draws = rollout
        elbo, eubo = masked_bounds(model, tokens, draws, MASK, power=1.5)
        return spg_loss(elbo, eubo, advantages, settings["beta"], settings["mix"])
    new, weight = score(model, settings["score"], *rollout), None
    if settings["mixed"]:  # hardly above 0 elsewhere, for a rollout may have nothing else
        weight = (advantages.view(-1, SAMPLES) != 0).any(1).float().clamp(min=1e-6).repeat_interleave(SAMPLES)
    loss, info = dipod_loss(new, old, advantages, settings["beta"], settings["clip"], weight=weight)
    if weight is not None:  # a mean over all samples, as the other methods'
        loss = loss * weight.mean()
    if settings["kl"]:  # on policy the gradient of half the square is that of KL(pi || base), both by their ELBOs
        loss = loss + settings["kl"] * 0.5 * (new - anchor).square().mean()
    if settings["exact_beta"]:
        loss = loss - settings["exact_beta"] * score(model, "exact", *rollout).mean()
    return loss, info


def drift(model, tokens: Tensor, maskable: Tensor, reward: Tensor, advantages: Tensor) -> dict[str, float]:
    """Exact gap and alignment on the on-policy batch before its first update; gap of right and of wrong answers."""
    log_prob, elbo = exact_likelihood(model, tokens, maskable, MASK)
    gap, parameters, weighted = (log_prob - elbo).detach(), list(model.parameters()), advantages * log_prob
    return {
        "elbo": elbo.mean().item(),
        "log_prob": log_prob.mean().item(),
        "gap": gap.mean().item(),
        "gap_success": gap[reward == 1].mean().item(),
        "gap_failure": gap[reward == 0].mean().item(),
        "alignment": alignment((advantages * elbo).mean(), weighted.mean(), parameters).item(),
        "noise_floor": alignment(weighted[0::2].mean(), weighted[1::2].mean(), parameters).item(),
    }


def sample_rewards(model, targets: Tensor, length: int, each: int, device, generator=None) -> tuple[Tensor, Tensor]:
    """`each` completions of every target: tokens (B, T) and whether they are right (B,)."""
    start = prompts(targets.repeat_interleave(each), length).to(device)
    tokens = sample_masked(model, start, MASK, generator=generator)
    return tokens, rewards(tokens)


def train(method: str, seed: int, args) -> list[dict]:
    """One run of RL from the base model; its rows of metrics.csv. Resumes from the run's checkpoint if args.resume."""
    device, started, path = dipod.pick_device(args.device), monotonic(), dipod.checkpoint_path(args.out, method, seed)
    flags = ("inner", "prompts", "graded", "decay", "decay_beta")
    settings = COMMON | METHODS[method] | {k: getattr(args, k) for k in flags}
    settings |= {k: v for k in ("lr", "clip") if (v := getattr(args, k)) is not None}
    settings |= {k: args.beta for k in ("beta", "kl", "exact_beta") if args.beta is not None and settings[k]}
    torch.manual_seed(seed)
    watch = torch.Generator(device).manual_seed(seed)  # diagnostics draw from their own
    (model, digits), (base, _) = (load_model(args.base[seed % len(args.base)], device) for _ in range(2))
    net, rank, own_prompts = dipod.parallel(model), dipod.world()[0], dipod.share_of("--prompts", args.prompts)
    (targets, unseen), length = split_targets(digits), 2 * digits - 1
    optimizer = torch.optim.AdamW(model.parameters(), settings["lr"], weight_decay=0.01, fused=True)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0 if args.decay else 1.0, args.steps)
    parts, start, rows, wall = {"model": model, "optimizer": optimizer, "decay": decay}, 0, [], 0.0
    if rank > 0:  # other prompts and noise than rank 0's
        torch.manual_seed(seed + 1000 * rank)
    if args.resume and path.exists():
        state = dipod.restore(path, settings, parts, watch, device)
        start, rows, wall = state["iteration"], state["rows"], state["wall"]
    every, seen, equal, infos = max(1, args.steps // args.rows), [], [], []
    for iteration in range(start, args.steps):
        chosen = targets[torch.randint(len(targets), (own_prompts,))]
        tokens, right = sample_rewards(model, chosen, length, SAMPLES, device)
        maskable = maskable_of(tokens)
        advantages = group_advantages(rewards(tokens, args.graded).view(-1, SAMPLES))
        seen.append(right.mean())
        equal.append((advantages == 0).all(1).float().mean())
        advantages = advantages.flatten()
        due = iteration == args.steps - 1 or (iteration + 1) % every == 0
        measured = dict.fromkeys(COLUMNS[5:12], math.nan)
        if due and not args.no_drift:
            measured |= drift(model, tokens, maskable, right, advantages)
        if settings["positives"]:
            advantages = advantages.clamp(min=0)
        left = 1 - iteration / args.steps if args.decay_beta else 1.0
        now = settings | {"beta": settings["beta"] * left}
        if (n := settings["distill_every"]) and iteration % n == n - 1:  # Algorithm 1's other half [DiPOD]
            advantages, now = torch.zeros_like(advantages), settings | {"beta": 1.0}
        rollout, old, anchor = (tokens, maskable, draw_masks(maskable, DRAWS)), None, None
        with torch.no_grad():
            if settings["loss"] == "ratio":
                old = score(model, settings["score"], *rollout)
            if settings["kl"]:
                anchor = score(base, settings["score"], *rollout)
        for _ in range(args.inner):
            loss, info = loss_of(now, net, rollout, advantages, old, anchor)
            optimizer.zero_grad()
            loss.backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            nan = torch.full_like(norm, math.nan)
            infos.append(torch.stack([info.get(k, nan) for k in ("ratio", "clip_fraction")]))
        decay.step()
        if not bool(norm.isfinite()):  # once per rollout: the updates themselves never wait for a GPU
            raise FloatingPointError(f"{method} seed {seed} step {iteration + 1}: non-finite gradient; stopped")
        if due:
            means = torch.stack((*torch.stack(infos).mean(0), torch.stack(seen).mean(), torch.stack(equal).mean()))
            step = iteration + 1
            row = measured | {"method": method, "seed": seed, "step": step, "wall": wall + monotonic() - started}
            row |= zip(("ratio", "clip_fraction", "reward", "equal_groups"), dipod.world_mean(means).tolist())
            row["held_out"] = sample_rewards(model, unseen, length, 16, device, watch)[1].mean().item()
            rows.append({k: row[k] for k in COLUMNS})
            seen, equal, infos = [], [], []
            state = {"settings": settings, "digits": digits, "iteration": step, "rows": rows, "wall": row["wall"]}
            state |= dipod.snapshot(parts, watch) | {"skipped": start / args.steps}
            dipod.report(args, rows[-1], state, started, step / args.steps)
    return rows


# Looking at a model


def show_samples(paths: list[Path], device) -> None:
    """A dozen prompt/completion/reward lines of each model."""
    for path in paths:
        model, digits = load_model(path, device)
        torch.manual_seed(0)
        targets = torch.cat(split_targets(digits))[:: 3 * digits - 2][:4]
        tokens, reward = sample_rewards(model, targets, 2 * digits - 1, 3, device)
        print(f"\n{path.stem}")
        for row, right in zip(tokens, reward):
            print(f"  {decode(row)}  {'right' if right else 'wrong'}")


def check_sampler(path: Path, device, draws: int = 20_000) -> None:
    """Frequencies of a prompt's likeliest completions beside their exact likelihoods."""
    model, digits = load_model(path, device)
    torch.manual_seed(0)
    tokens, _ = sample_rewards(model, torch.tensor([13]), 2 * digits - 1, draws, device)
    distinct, counts = tokens.unique(dim=0, return_counts=True)
    distinct, counts = (x[counts.argsort(descending=True)[:500]] for x in (distinct, counts))
    with torch.no_grad():
        exact = exact_likelihood(model, distinct, maskable_of(distinct), MASK)[0].exp()
    # the likeliest, not the most frequent: those were chosen for having been drawn too often
    print(f"{draws} completions of `13:`; the 12 likeliest. z: (observed - exact) in standard errors")
    for i in exact.argsort(descending=True)[:12].tolist():
        p, observed = exact[i].item(), counts[i].item() / draws
        z = (observed - p) / math.sqrt(p * (1 - p) / draws)
        print(f"  {decode(distinct[i])}  observed {observed:.4f}  exact {p:.4f}  z {z:+.1f}")


def benchmark(args, repeats: int = 40) -> None:
    """Completions, ELBOs and exact likelihoods per second, beside a bare forward pass of the same tokens."""
    import resource

    torch.set_num_threads(1)
    device, length = dipod.pick_device(args.device), 2 * args.digits - 1
    model, targets = Model(PROMPT + length).to(device), split_targets(args.digits)[0][:8]
    tokens, _ = sample_rewards(model, targets, length, SAMPLES, device)
    maskable = maskable_of(tokens)
    draws = draw_masks(maskable, DRAWS)
    inputs, size = torch.where(draws.mask, MASK, tokens[:, None]).flatten(0, 1), len(tokens)

    def per_second(count: int, f) -> float:
        times = []
        for _ in range(repeats + 1):  # the first one warms up
            begun = monotonic()
            f()
            times.append(monotonic() - begun)
        return count / sorted(times[1:])[repeats // 2]

    with torch.no_grad():
        sampling = per_second(size, lambda: sample_rewards(model, targets, length, SAMPLES, device))
        bare = per_second(len(inputs), lambda: model(inputs))
        elbo = per_second(len(inputs), lambda: masked_elbo(model, tokens, draws, MASK))
        exact = per_second(size, lambda: exact_likelihood(model, tokens, maskable, MASK))
    bare_both = per_second(len(inputs), lambda: model(inputs).sum().backward())
    both = per_second(len(inputs), lambda: masked_elbo(model, tokens, draws, MASK).sum().backward())
    print(f"{size} completions of {length} tokens, {DRAWS} draws, 1 thread, {device}; medians of {repeats}")
    print(f"  sampling          {sampling:8.0f} completions/s")
    print(f"  ELBO              {elbo:8.0f} evaluations/s, {elbo / bare:.2f} of a bare forward pass")
    print(f"  ELBO and gradient {both:8.0f} evaluations/s, {both / bare_both:.2f} of a bare forward and backward pass")
    print(f"  exact likelihood  {exact:8.0f} completions/s")
    untrained = args.out / "untrained.pt"  # enough to measure speed
    dipod.make_directory(args.out)
    dipod.save_checkpoint(untrained, {"model": model.state_dict(), "digits": args.digits, "rows": []})
    args.base, args.steps, args.rows, args.no_drift = [untrained], 30, 1, True
    begun = monotonic()
    train("dipod", 0, args)
    print(f"  end to end        {args.steps / (monotonic() - begun):8.1f} iterations/s of dipod")
    print(f"  peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")


def pretrain_bases(args) -> list[Path]:
    """The N base models of --bases; pretrains in parallel processes those that the runs need (--resume: and lack)."""
    paths = [dipod.checkpoint_path(args.out, "base", s) for s in range(args.bases)]
    needed = {seed % args.bases for seed in range(args.first_seed, args.first_seed + args.seeds)}
    missing = [("base", s) for s in sorted(needed) if not (args.resume and paths[s].exists())]
    if dipod.world()[0] == 0 and missing:
        dipod.make_directory(args.out)
        dipod.run_in_pool(pretrain, missing, args)
    if dipod.world()[1] > 1:
        torch.distributed.barrier()
    return paths


def main() -> None:
    """The command line."""
    parser = dipod.task_parser(__doc__, METHODS, ["fpo", "dipod", "positives"], 300, "RL iterations", "runs/lm")
    parser.set_defaults(rows=10)  # the exact likelihoods of a row cost as much as several iterations
    add, at_least = parser.add_argument, dipod.at_least
    add("--base", type=Path, nargs="+", metavar="FILE", help="pretrained models; default: pretrain them into --out")
    add("--bases", type=at_least(1), default=3, metavar="N", help="run s starts from base s mod N")
    add("--truth", type=float, default=0.7, help="share of true statements in the pretraining")
    add("--graded", action="store_true", help="train on 1/(1+error) instead of right or wrong")
    add("--inner", type=at_least(1), default=8, help="updates on each rollout")
    add("--prompts", type=at_least(1), default=8, help="prompts of a rollout, 8 samples each")
    add("--digits", type=int, choices=(2, 3, 4), default=3, help="of a completion, 2*digits-1 tokens")
    add("--samples", action="store_true", help="print completions of the base and of each trained model")
    add("--check", action="store_true", help="compare the sampler with exact likelihoods and leave")
    add("--benchmark", action="store_true", help="measure speed and leave")
    args = parser.parse_args()
    if not 0 <= args.truth <= 1:
        parser.error(f"--truth: expected a share in [0, 1], got {args.truth:g}")
    device = dipod.pick_device(args.device)
    if args.benchmark:
        return benchmark(args)
    torch.set_num_threads(1)
    dipod.join_world(device)
    args.base = args.base or pretrain_bases(args)
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    used = list(dict.fromkeys(args.base[seed % len(args.base)] for seed in seeds))
    args.digits = load_model(used[0], device)[1]
    if args.check:
        return check_sampler(used[0], device)
    for path in used:
        torch.manual_seed(0)
        model, parts = load_model(path, device)[0], split_targets(args.digits)
        shares = [sample_rewards(model, t, 2 * args.digits - 1, 64, device)[1].mean() for t in parts]
        print(f"base model {path}: reward {shares[0]:.3f}, on held-out targets {shares[1]:.3f}")
    title = f"lr {COMMON['lr'] if args.lr is None else args.lr:g}, {args.inner} inner updates"
    dipod.finish(dipod.launch(train, args, COLUMNS), args, "reward", PANELS, title)
    if args.samples:
        runs = product(args.methods, seeds)
        show_samples([*used, *(dipod.checkpoint_path(args.out, *run) for run in runs)], device)


if __name__ == "__main__":
    main()
