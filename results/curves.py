"""Prints numbers that no run of a task prints, as CSV.

    python results/curves.py two_token   # the paper's diagnostic, without and with DiPOD's term
    python results/curves.py slow_flow ENV LR [STEPS]   # the flow learns at a quarter of that rate
    python results/curves.py two_doors   # likelihood and ELBO over actions of trained policies

The last one needs the runs that `python results/report.py --run control/twodoors` leaves in
runs/evidence.
"""

import csv
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


def slow_flow(write, env, rate, steps=300_000):
    """Runs of fpo and dipod whose flow's network has a quarter of the learning rate."""
    adamw = torch.optim.AdamW

    def optimizer(weights, lr, **options):
        # Order of the weights: log_std and mean (7); obs_layer, flow_layer and net (7); value (6).
        assert len(weights) == 20
        groups = [{"params": weights[:7] + weights[14:]}, {"params": weights[7:14], "lr": lr / 4}]
        return adamw(groups, lr, **options)

    torch.optim.AdamW = optimizer
    runs = [(method, seed) for method in ("fpo", "dipod") for seed in range(100, 105)]
    for number, (method, seed) in enumerate(runs, 1):
        rows = run(method, env, int(steps), seed, float(rate), (number, len(runs), 1))
        if number == 1:
            write(rows[0].keys())
        for row in rows:
            write(row.values())


def run(method, env, steps, seed, lr=control_task.LEARNING_RATE, place=(1, 1, 1), device="cpu"):
    """A run of control_task.py in this process; its rows, up to where it stopped if it did."""
    args = Namespace(env=env, policy="tight", steps=steps, lr=lr, beta=control_task.BETA)
    args.distill = None
    args.device = device
    args.resume = False
    settings = control_task.settings_of(method, seed, args)
    with TemporaryDirectory() as out, redirect_stdout(sys.stderr):
        try:
            control_task.train(settings, Path(out, "run.pt"), place, args)
        except FloatingPointError as error:
            print(f"{method}_{seed} stopped: {error}")
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
    scripts = {f.__name__: f for f in (two_token, slow_flow, two_doors)}
    scripts[sys.argv[1]](csv.writer(sys.stdout).writerow, *sys.argv[2:])
