"""Prints numbers that no run of a task prints, as CSV.

    python results/curves.py two_token      # the paper's diagnostic, without and with DiPOD's term
    python results/curves.py coarse_sampler # runs of dipod whose sampler takes two steps, not five
    python results/curves.py same_time ENV  # runs of dipod whose draws have one time in each pair
    python results/curves.py two_doors      # likelihood and ELBO over actions of trained policies

The last one needs the runs that `python results/report.py --run control/twodoors` leaves in
runs/evidence.
"""

import csv
import functools
import sys
from argparse import Namespace
from contextlib import redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import control_task
import dipod

RUNS = ROOT / "runs" / "evidence"
NOISES = 200_000


def two_token(write):
    """gap of AA, mean gap, alignment and reward after each tenth update."""
    write(["beta", "update", "gap_AA", "gap", "alignment", "reward"])
    for beta in (0.0, 0.2):
        curves = dipod.two_token(beta=beta)
        for update in range(0, len(curves["gap"]), 10):
            write([beta, update, *(curve[update].item() for curve in curves.values())])


def coarse_sampler(write):
    """The rows of `dipod` in control/reacher, but with a sampler of two steps."""
    control_task.FlowPolicy = functools.partial(dipod.FlowPolicy, num_steps=2)
    train_dipod("Reacher-v5", 5, write)


def same_time(write, env="Reacher-v5"):
    """The rows of `dipod` in control/..., but with draws in pairs of one time."""

    def draw_flow(*arguments):
        time, noise = dipod.draw_flow(*arguments)
        return dipod.FlowDraws(time[:, ::2].repeat_interleave(2, dim=1), noise)

    control_task.draw_flow = draw_flow
    train_dipod(env, 10, write)


def train_dipod(env, seeds, write):
    """Writes the rows of runs of 500,000 steps, with seeds from 100 on."""
    for i in range(seeds):
        rows = run("dipod", env, 500_000, 100 + i, (i + 1, seeds, 1))
        if i == 0:
            write(rows[0].keys())
        for row in rows:
            write(row.values())


def run(method, env, steps, seed, place=(1, 1, 1)):
    """A run of control_task.py in this process, diagnostics and record included; its rows."""
    args = Namespace(env=env, policy="tight", steps=steps, distill=None)
    args.lr, args.beta = control_task.LEARNING_RATE, control_task.BETA
    args.device, args.resume = "cpu", False
    settings = control_task.settings_of(method, seed, args)
    with TemporaryDirectory() as out, redirect_stdout(sys.stderr):
        control_task.train(settings, Path(out, "run.pt"), place, args)
        return dipod.load(Path(out, "run.pt"), "control")["rows"]


def two_doors(write):
    """Log-likelihood and ELBO in nats over the action axis.

    The likelihood is counted: the share of evenly spread noise that ends in each bin.
    """
    write(["method", "action", "log_prob", "elbo"])
    noise = torch.distributions.Normal(0.0, 1.0).icdf((torch.arange(NOISES) + 0.5) / NOISES)
    edges = torch.linspace(-1.5, 1.5, 151)
    width = edges[1] - edges[0]
    action = (edges[:-1] + edges[1:]) / 2
    envs = control_task.make_envs("TwoDoors-v0", 1)
    obs = torch.zeros(1, 1)  # all that the environment shows
    for method in ("fpo", "dipod"):
        state = dipod.load(RUNS / "control" / "twodoors" / f"{method}_100.pt", "control")
        policy, _, _ = control_task.make_networks(state["settings"], envs)
        policy.load_state_dict(state["policy"])
        samples = policy.sample(obs.expand(NOISES, 1), noise[:, None])
        log_prob = (torch.histogram(samples, edges).hist / NOISES / width).log()
        draws = dipod.draw_flow(action[:, None], 2000, torch.Generator().manual_seed(0))
        elbo = policy.bound(obs.expand(150, 1), action[:, None], draws).mean(1)
        for row in zip(action.tolist(), log_prob.tolist(), elbo.tolist()):
            write([method, *row])


if __name__ == "__main__":
    torch.set_num_threads(1)
    scripts = {f.__name__: f for f in (two_token, coarse_sampler, same_time, two_doors)}
    scripts[sys.argv[1]](csv.writer(sys.stdout).writerow, *sys.argv[2:])
