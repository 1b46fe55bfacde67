"""Prints the numbers behind two figures as CSV.

    python results/curves.py two_token    # the paper's diagnostic, without and with DiPOD's term
    python results/curves.py two_doors    # likelihood and ELBO over the actions of trained policies

The second one needs the runs of `python results/report.py --run control_twodoors`.
"""

import csv
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import control_task
import dipod

POINTS = 1000  # actions of a policy, each as probable as the next


def two_token(write):
    """gap of AA, mean gap, alignment and reward after each tenth update."""
    write(["beta", "update", "gap_AA", "gap", "alignment", "reward"])
    for beta in (0.0, 0.2):
        curves = dipod.two_token(beta=beta)
        for update in range(0, len(curves["gap"]), 10):
            write([beta, update, *(curve[update].item() for curve in curves.values())])


def two_doors(write):
    """Log-likelihood and ELBO in nats of the actions that evenly spread noise leads to."""
    write(["method", "action", "log_prob", "elbo"])
    quantiles = (torch.arange(POINTS) + 0.5) / POINTS
    noise = torch.distributions.Normal(0.0, 1.0).icdf(quantiles)[:, None]
    for method in ("fpo", "dipod", "ppo"):
        state = dipod.load(ROOT / f"runs/evidence/control_twodoors/{method}_100.pt", "control")
        policy = control_task.make_policy(state["settings"], obs_dim=1, action_dim=1)
        policy.load_state_dict(state["policy"])
        obs = torch.zeros(POINTS, 1)  # all that the environment shows
        action = policy.sample(obs, noise)
        log_prob = policy.log_prob(obs, noise)
        elbo = log_prob
        if policy.flow:
            generator = torch.Generator().manual_seed(0)
            draws = dipod.draw_flow(action, 2000, generator)
            elbo = policy.bound(obs, action, draws).mean(1)
        for row in zip(action[:, 0].tolist(), log_prob.tolist(), elbo.tolist()):
            write([method, *row])


if __name__ == "__main__":
    {"two_token": two_token, "two_doors": two_doors}[sys.argv[1]](csv.writer(sys.stdout).writerow)
