"""A tiny masked-diffusion language model, post-trained with the drift measured exactly.

    python lm_task.py                          # pretrain, then fpo, dipod, positives from the base
    python lm_task.py --seeds 5                # seed s starts from base model s mod 3
    python lm_task.py --lr 1e-3 --inner 2      # large steps, where the drift is plainest
    python lm_task.py --base runs/lm-1/base/base_0.pt --methods exact d1 spg spg-dipod interleave
    torchrun --nproc-per-node 2 lm_task.py     # each run on two processes, prompts split

The prompt is a two-digit target, the completion an expression: `13:9+3+1`. Reward 1 if it has the
right form and equals the target, else 0. All completions have 5 tokens, so 2^5 contexts give the
exact likelihood of a real transformer while it trains. Shapes: P prompts of G samples, B = P * G
completions, T tokens of which L are the completion, N draws, V vocabulary.
"""

import math
import os
import time
import zlib
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

import dipod

CHARS = "0123456789+-:"
MASK = 13  # an input only: the model has no output for it
PLUS, MINUS = CHARS.index("+"), CHARS.index("-")
PROMPT, LENGTH = 3, 5  # tokens of the prompt and of the completion
TRUTH = 0.7  # share of pretraining expressions with their value as target; else a random one
BASES = 3  # run s starts from base model s mod 3
PRETRAINING = 1800  # updates of a base model
SAMPLES = 8  # G, completions of each prompt
DRAWS = 4  # masks of a completion, kept for old, new and all inner updates
CLIP = 0.2
BETA = 0.3  # in advantage per nat of a sequence's ELBO
TARGETS = torch.arange(28)  # all values from 0 on that an expression can have
HELD_OUT = TARGETS[2::4]  # every fourth, which RL never sees
TRAINED = TARGETS[TARGETS % 4 != 2]
RANK = int(os.environ.get("RANK", "0"))  # torchrun's
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", "0"))
WORLD = int(os.environ.get("WORLD_SIZE", "1"))
ROWS = 10  # rows of a run's record, about; exact likelihoods cost as much as several iterations

# likelihood: what stands in the ratio. beta: whether the loss has DiPOD's regularizer. positive:
# negative advantages are set to 0, the control that a sceptic asks for. distill: Algorithm 1, whose
# every second rollout is for self-distillation, so that all methods have as many rollouts.
METHODS = {
    "fpo": {"likelihood": "elbo", "beta": False, "positive": False, "distill": False},
    "dipod": {"likelihood": "elbo", "beta": True, "positive": False, "distill": False},
    "positives": {"likelihood": "elbo", "beta": False, "positive": True, "distill": False},
    "exact": {"likelihood": "exact", "beta": False, "positive": False, "distill": False},
    "spg": {"likelihood": "bounds", "beta": False, "positive": False, "distill": False},
    "spg-dipod": {"likelihood": "bounds", "beta": True, "positive": False, "distill": False},
    "d1": {"likelihood": "one step", "beta": False, "positive": False, "distill": False},
    "interleave": {"likelihood": "elbo", "beta": False, "positive": False, "distill": True},
}


def rewards(tokens):
    """(B,): 1 where prompt and completion (B, T) state a true sum in the right form, else 0."""
    target = 10 * tokens[:, 0] + tokens[:, 1]
    digits, signs = tokens[:, PROMPT::2], tokens[:, PROMPT + 1 :: 2]
    well_formed = (digits < 10).all(1) & ((signs == PLUS) | (signs == MINUS)).all(1)
    return (well_formed & (values(tokens[:, PROMPT:]) == target)).float()


def values(completion):
    """(M,): what the expressions (M, L) come to."""
    sign = torch.where(completion[:, 1::2] == PLUS, 1, -1)
    return completion[:, 0] + (sign * completion[:, 2::2]).sum(1)


def start_tokens(targets):
    """(B, T): the prompt of each target and a masked completion, what the sampler is given."""
    tokens = targets.new_full((len(targets), PROMPT + LENGTH), MASK)
    tokens[:, 0] = targets // 10
    tokens[:, 1] = targets % 10
    tokens[:, 2] = CHARS.index(":")
    return tokens


class Model(nn.Module):
    """Bidirectional pre-LN transformer of 0.07 M parameters, tokens (M, T) -> logits (M, T, V)."""

    def __init__(self, dim=64):
        super().__init__()
        self.embed = nn.Embedding(len(CHARS) + 1, dim)
        self.position = nn.Parameter(torch.randn(PROMPT + LENGTH, dim))
        options = {"dropout": 0.0, "batch_first": True, "norm_first": True}
        layer = nn.TransformerEncoderLayer(dim, 4, 2 * dim, **options)
        self.encoder = nn.TransformerEncoder(layer, 2, nn.LayerNorm(dim), False)
        self.head = nn.Linear(dim, len(CHARS))

    def forward(self, tokens):
        tokens, row = tokens.unique(dim=0, return_inverse=True)  # equal inputs are evaluated once
        return self.head(self.encoder(self.embed(tokens) + self.position))[row]


def pretrain(settings, path, place, args):
    """Trains a base model on random expressions, of which TRUTH state their value as the target."""
    torch.manual_seed(settings["seed"])
    model = Model().to(args.device)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01, fused=True)
    steps = settings["steps"]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, steps, pct_start=0.1)
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
    run = dipod.Run(path, settings, parts, place, resume=True)
    digits = torch.arange(10)
    signs = torch.tensor([PLUS, MINUS])
    completions = torch.cartesian_prod(digits, signs, digits, signs, digits)
    completions = completions[values(completions) >= 0]
    for step in range(run.step + 1, steps + 1):
        chosen = completions[torch.randint(len(completions), (256,))]
        lies = torch.randint(len(TARGETS), (256,))
        tokens = start_tokens(torch.where(torch.rand(256) < TRUTH, values(chosen), lies))
        maskable = tokens == MASK
        tokens[:, PROMPT:] = chosen
        draws = dipod.draw_masks(maskable.to(args.device), 1)
        loss = -dipod.masked_elbo(model, tokens.to(args.device), draws, MASK).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % (steps // 4) == 0:
            run.add({"step": step, "elbo": -loss.item(), "gap": math.nan, "alignment": math.nan})


def likelihood(model, kind, tokens, maskable, draws):
    """What stands for the log-likelihood in the ratio: (B,), or (B, L) for d1's ratio per token."""
    if kind == "exact":
        return dipod.exact_likelihood(model, tokens, maskable, MASK)[0]
    if kind == "one step":  # d1 (2504.12216): each token's likelihood in the fully masked context
        log_p = model(tokens.masked_fill(maskable, MASK)).log_softmax(-1)
        return log_p.gather(2, tokens[..., None])[:, PROMPT:, 0]
    return dipod.masked_elbo(model, tokens, draws, MASK).mean(1)


def drift(model, tokens, maskable, advantages):
    """Exact gap and alignment on a rollout, before the updates on it."""
    log_prob, elbo = dipod.exact_likelihood(model, tokens, maskable, MASK)
    proxy = (advantages * elbo).mean()
    cosine = dipod.alignment(proxy, (advantages * log_prob).mean(), model.parameters())
    measured = {"gap": log_prob - elbo, "alignment": cosine, "log_prob": log_prob}
    return {name: value.mean().item() for name, value in measured.items()}


def sample(model, targets, each, generator=None):
    """`each` completions of every target: tokens (B, T), their maskable (B, T), rewards (B,)."""
    start = start_tokens(targets.repeat_interleave(each)).to(model.position.device)
    tokens = dipod.sample_masked(model, start, MASK, generator=generator)
    return tokens, start == MASK, rewards(tokens)


def train(settings, path, place, args):
    """One run of RL from a base model. A resumed one goes on from its record."""
    torch.manual_seed(settings["seed"])
    model = load_model(args.base[settings["seed"] % len(args.base)], args.device)
    net = nn.parallel.DistributedDataParallel(model) if WORLD > 1 else model  # averages gradients
    optimizer = torch.optim.AdamW(model.parameters(), settings["lr"], weight_decay=0.01, fused=True)
    final_rate = 0.0 if settings["decay"] else 1.0
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, final_rate, settings["steps"])
    parts = {"model": model, "optimizer": optimizer, "decay": decay}
    run = dipod.Run(path, settings, parts, place, args.resume)
    if RANK > 0:  # other prompts than those of rank 0, which alone keeps a record
        torch.manual_seed(settings["seed"] + 1000 * RANK + run.step)
    kind = settings["likelihood"]
    history = []
    for step in range(run.step + 1, settings["steps"] + 1):
        chosen = TRAINED[torch.randint(len(TRAINED), (settings["prompts"] // WORLD,))]
        tokens, maskable, right = sample(model, chosen, SAMPLES)
        groups = dipod.group_advantages(right.view(-1, SAMPLES))
        advantages = groups.flatten()
        due = step in (1, settings["steps"]) or step % max(1, settings["steps"] // ROWS) == 0
        measured = drift(model, tokens, maskable, advantages) if due and RANK == 0 else {}
        if settings["positive"]:
            advantages = advantages.clamp(min=0)
        distilling = settings["distill"] and step % 2 == 0
        if distilling:  # the regularizer alone
            advantages = torch.zeros_like(advantages)
        beta = 1.0 if distilling else settings["beta"]
        draws = dipod.draw_masks(maskable, DRAWS)
        with torch.no_grad():
            old = likelihood(model, kind, tokens, maskable, draws)  # SPG does not use it
        for _ in range(settings["distill"] if distilling else settings["inner"]):
            if kind == "bounds":
                elbo, eubo = dipod.masked_bounds(net, tokens, draws, MASK, power=1.5)
                loss, info = dipod.spg_loss(elbo, eubo, advantages, beta)
            else:
                new = likelihood(net, kind, tokens, maskable, draws)
                loss, info = dipod.dipod_loss(new, old, advantages, beta, CLIP)
            optimizer.zero_grad()
            loss.backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        decay.step()
        if not norm.isfinite():  # once per rollout, or every update waits for a GPU
            raise FloatingPointError(f"non-finite gradient at step {step}")
        equal = (groups == 0).all(1).float().mean()
        ratio = info.get("ratio", torch.full_like(equal, math.nan))  # SPG has none
        history.append(torch.stack((right.mean(), equal, ratio)))
        if due and RANK == 0:
            reward, equal, ratio = torch.stack(history).mean(0).tolist()
            generator = torch.Generator(args.device).manual_seed(step)  # not the training's
            held_out = sample(model, HELD_OUT, 16, generator)[2].mean().item()
            row = {"step": step, "reward": reward} | measured
            run.add(row | {"held_out": held_out, "equal_groups": equal, "ratio": ratio})
            history = []


def load_model(path, device="cpu"):
    """The model of a record."""
    model = Model()
    model.load_state_dict(dipod.load(path, "lm")["model"])
    return model.to(device)


def show(path):
    """Six completions of a model."""
    tokens, _, right = sample(load_model(path), TARGETS[2::5], 1, torch.Generator().manual_seed(0))
    completions = []
    for row, reward in zip(tokens.tolist(), right.tolist()):
        text = "".join(CHARS[token] for token in row)
        completions.append(f"{text} {'right' if reward else 'wrong'}")
    print(f"{path.stem:<12}", ", ".join(completions))


def settings_of(method, seed, args):
    """The flags that a run depends on. Only a run with the same settings resumes its record."""
    flags = ("steps", "lr", "inner", "prompts", "decay")
    settings = METHODS[method] | {name: getattr(args, name) for name in flags}
    settings |= {"task": "lm", "method": method, "seed": seed, "processes": WORLD, "base": None}
    settings["beta"] *= args.beta  # 0 if the method has none
    settings["distill"] *= args.distill
    if args.base:  # a checksum, because another file can have the same name
        settings["base"] = zlib.crc32(args.base[seed % len(args.base)].read_bytes())
    return settings


def pretrain_bases(folder, args):
    """Paths of the base models in a folder; those that the runs need are pretrained there."""
    folder.mkdir(exist_ok=True)
    paths = [folder / f"base_{base}.pt" for base in range(BASES)]
    records = {}
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        base = seed % BASES
        records[paths[base]] = {"task": "lm", "method": "base", "seed": base, "steps": PRETRAINING}
    if dipod.run_all(pretrain, records, args, "elbo"):
        raise SystemExit(1)
    return paths


def train_together(records, args):
    """torchrun: all processes take part in each run, one run after the other."""
    if args.device == "cuda":
        torch.cuda.set_device(LOCAL_RANK)
    dist.init_process_group("nccl" if args.device == "cuda" else "gloo")
    shared = [records, args.base]
    dist.broadcast_object_list(shared)  # those of rank 0
    records, args.base = shared
    if RANK == 0:
        print(dipod.HEADER.format("reward"), flush=True)
    errors = {}
    for number, (path, settings) in enumerate(records.items(), 1):
        try:
            train(settings, path, (number, len(records), 1), args)
        except FloatingPointError as error:
            errors[path] = str(error)
    dist.barrier()
    dist.destroy_process_group()
    time.sleep(0.2)  # gloo's threads need the interpreter once more, or the exit aborts
    return errors


def main():
    """The command line."""
    parser = dipod.task_parser(__doc__, METHODS, ["fpo", "dipod", "positives"])
    add, number = parser.add_argument, dipod.number
    add("--steps", type=number(int, 1), default=300, help="rollouts of a run")
    add("--lr", type=number(float, 1e-9), default=3e-4, help="learning rate")
    add("--beta", type=number(float, 0), default=BETA, help="weight of DiPOD's regularizer")
    add("--inner", type=number(int, 1), default=8, help="updates on a rollout")
    add("--distill", type=number(int, 1), default=2, help="interleave: updates that distill")
    add("--prompts", type=number(int, 1), default=8, help="prompts of a rollout, 8 samples each")
    add("--decay", action="store_true", help="the learning rate decays linearly to 0")
    add("--base", nargs="+", type=Path, default=[], metavar="FILE", help="default: pretrained")
    args = parser.parse_args()
    if args.device == "cuda" and LOCAL_RANK >= torch.cuda.device_count():
        parser.error("--device: expected a GPU for each process, or --device cpu")
    if RANK > 0:  # rank 0 checks, and says what to run
        return train_together(None, args)
    try:
        held = Path(args.out, "base").glob("*.pt") if args.out else []
        for path in args.base or held:
            load_model(path)
        if args.prompts % WORLD:
            raise ValueError(f"--prompts: expected a multiple of {WORLD} processes")
        records = dipod.prepare(args, settings_of, args.base)
        if not args.base:
            args.base = pretrain_bases(next(iter(records)).parent / "base", args)
    except (ValueError, OSError, RuntimeError) as error:
        parser.error(str(error).splitlines()[0])
    if WORLD > 1:
        errors = train_together(records, args)
    else:
        errors = dipod.run_all(train, records, args, "reward")
    status = dipod.finish(records, errors)
    for path in [*args.base, *records]:
        if path.exists():
            show(path)
    raise SystemExit(status)


if __name__ == "__main__":
    dipod.command(main)
