"""Environment steps per second on HalfCheetah-v5: the bare environment, this project, and its peer.

    pip install stable-baselines3      # optional: the peer is left out without it
    python results/speed.py
    python results/speed.py gpu        # this project on the GPU too, without the peer, once

One thread and 16 environments everywhere, and as many updates for Stable-Baselines3's PPO as for
this project's methods. All are timed in turn, three times; a row is the median. It prints a CSV and
takes five minutes on an idle machine.
"""

import csv
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import curves

import control_task as task

ENV = "HalfCheetah-v5"
STEPS = 200_000


def bare_environment():
    """The vector environment alone, with random actions."""
    envs = task.make_envs(ENV, task.NUM_ENVS).unwrapped
    envs.reset(seed=0)
    actions = [envs.action_space.sample() for _ in range(STEPS // task.NUM_ENVS)]
    started = time.monotonic()
    for action in actions:
        envs.step(action)
    return STEPS / (time.monotonic() - started)


def this_project(method, device="cpu"):
    """A run of control_task.py, as it is, diagnostics and record included."""
    started = time.monotonic()
    curves.run(method, ENV, STEPS, seed=0, device=device)
    return STEPS / (time.monotonic() - started)


def stable_baselines3():
    """Its Gaussian PPO with the same networks, normalisation, rollouts and minibatches."""
    from stable_baselines3 import PPO
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.vec_env import VecNormalize

    envs = VecNormalize(make_vec_env(ENV, task.NUM_ENVS, seed=0))
    sizes = {"n_steps": task.ROLLOUT, "batch_size": task.MINIBATCH, "n_epochs": task.EPOCHS}
    model = PPO("MlpPolicy", envs, device="cpu", **sizes)
    started = time.monotonic()
    model.learn(STEPS)
    return STEPS / (time.monotonic() - started)


def main():
    """Prints the CSV."""
    torch.set_num_threads(1)
    measured = {"environment": bare_environment}
    measured |= {method: lambda method=method: this_project(method) for method in ("dipod", "ppo")}
    gpu = sys.argv[1:] == ["gpu"]
    if gpu:
        measured["dipod-gpu"] = lambda: this_project("dipod", "cuda")
        measured["ppo-gpu"] = lambda: this_project("ppo", "cuda")
    else:
        try:
            import stable_baselines3 as _

            measured["stable-baselines3"] = stable_baselines3
        except ImportError:
            print("Stable-Baselines3 is not installed", file=sys.stderr)
    speeds = {name: [] for name in measured}
    for _ in range(1 if gpu else 3):
        for name, measure in measured.items():
            speeds[name].append(measure())
    bare = statistics.median(speeds["environment"])
    write = csv.writer(sys.stdout).writerow
    write(["what", "steps_per_second", "share"])  # of the bare environment's speed
    for name, values in speeds.items():
        speed = statistics.median(values)
        write([name, f"{speed:,.0f}", f"{speed / bare:.2f}"])


if __name__ == "__main__":
    main()
