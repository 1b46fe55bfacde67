"""Tests: every formula against brute force, value and gradient; every command as a user runs it."""

import csv
import math
import os
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

import control_task
import dipod
import lm_task
from dipod import FlowPolicy

ROOT = Path(__file__).parent


# The control task


def control_args(**changes):
    args = {"device": "cpu", "resume": False, "env": "Reacher-v5", "policy": "tight"}
    args |= {"steps": 4096, "lr": 2e-3, "beta": 0.3, "distill": 1}
    return Namespace(**args | changes)


def small_batch(policy, size=64):
    """A batch as `rollout` gives it, of random observations and advantages."""
    obs = torch.randn(size, policy.obs_layer.in_features)
    noise = torch.randn(size, len(policy.log_std))
    batch = {"obs": obs, "noise": noise, "action": policy.sample(obs, noise)}
    return batch | {"advantages": torch.randn(size), "returns": torch.randn(size)}


def test_gae_bootstraps_truncated_episodes_and_cuts_all():
    torch.manual_seed(0)
    steps, envs = 7, 3
    rewards, values, next_values = torch.randn(3, steps, envs).unbind()
    terminated = torch.rand(steps, envs) < 0.2
    done = terminated | (torch.rand(steps, envs) < 0.2)
    advantages = control_task.gae(rewards, values, next_values, terminated, done)
    for e in range(envs):
        for t in range(steps):
            total, discount = 0.0, 1.0
            for s in range(t, steps):  # the definition: a sum of TD errors up to the episode's end
                bootstrap = 0.0 if terminated[s, e] else control_task.GAMMA * next_values[s, e]
                total += discount * (rewards[s, e] + bootstrap - values[s, e])
                if done[s, e]:
                    break
                discount *= control_task.GAMMA * control_task.LAMBDA
            torch.testing.assert_close(advantages[t, e], torch.as_tensor(total))


class Countdown(gym.Env):
    """Observes the step; truncated after 3 steps, or terminated then if the action is positive."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (1,), np.float64)
    action_space = gym.spaces.Box(-2, 2, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.time = 0
        return np.zeros(1), {}

    def step(self, action):
        assert abs(action[0]) <= 2, "the environment gets clipped actions"
        self.time += 1
        over = self.time == 3
        terminated = bool(over and action[0] > 0)
        return np.full(1, self.time, float), 1.0, terminated, over and not terminated, {}


gym.register("Countdown-v0", entry_point=Countdown)


def test_rollout_bootstraps_from_the_final_observation_and_keeps_actions_unclipped():
    torch.manual_seed(0)
    envs = control_task.make_envs("Countdown-v0", control_task.NUM_ENVS)
    obs, _ = envs.reset(seed=0)
    policy, norm = FlowPolicy(1, 1, flow=False), control_task.ObservationNorm(1)
    policy.log_std.data.fill_(1.0)
    seen = []

    def value(x):
        seen.append(x)
        return 10.0 * x

    batch, _, returns = control_task.rollout(policy, value, norm, envs, obs)
    assert batch["action"].abs().max() > 1.5
    assert returns
    assert set(returns) == {3.0}  # the raw reward, not the normalised one
    first, last = seen  # observations acted on are 0, 1, 2; those led to are 1, 2, 3
    assert set(first.flatten().round().tolist()) == {0.0, 1.0, 2.0}
    assert set(last.flatten().round().tolist()) == {1.0, 2.0, 3.0}
    obs = batch["obs"].view(control_task.ROLLOUT, control_task.NUM_ENVS)
    action = batch["action"].view(control_task.ROLLOUT, control_task.NUM_ENVS)
    advantages = batch["advantages"].view(control_task.ROLLOUT, control_task.NUM_ENVS)
    end = obs.round() == 2
    truncated = advantages[end & (action < 0)]
    terminated = advantages[end & (action > 0)]
    assert (
        truncated.min() - terminated.max() > 20
    )  # gamma * value(3) = 29.7, less the rewards' scale


def test_observation_norm_has_the_moments_of_all_batches():
    torch.manual_seed(0)
    norm = control_task.ObservationNorm(3)
    batches = [3 + 2 * torch.randn(50, 3), torch.randn(70, 3)]
    for batch in batches:
        norm.update(batch)
    together = torch.cat(batches)
    torch.testing.assert_close(norm.mean, together.mean(0), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(norm.var, together.var(0, correction=0), atol=1e-4, rtol=1e-4)


def test_two_doors_needs_a_coin():
    rng = np.random.default_rng(0)
    found = {"one side": 0.0, "coin": 0.0}
    env = gym.make("TwoDoors-v0")
    for name in found:
        for seed in range(400):
            env.reset(seed=seed)
            done = False
            while not done:
                side = rng.choice((-0.7, 0.7)) if name == "coin" else 0.7
                _, reward, done, _, _ = env.step(np.array([side], np.float32))
                found[name] += reward / 400
    assert abs(found["one side"] - 1 / 2) < 0.08
    assert abs(found["coin"] - 15 / 16) < 0.04


def test_first_ratio_is_1_and_the_regularizer_leaves_the_head_alone(monkeypatch):
    torch.manual_seed(0)
    policy, value = FlowPolicy(4, 2), dipod.mlp(4, 1, 1.0)
    nn.init.normal_(policy.net[-1].weight, std=3.0)  # a flow that does something
    optimizer = torch.optim.SGD([*policy.parameters(), *value.parameters()], lr=0.0)
    head_and_flow = [policy.log_std, policy.net[-1].weight]
    calls = []

    def loss(elbo, old_elbo, advantages, beta, *args, distill_elbo):
        gradients = None
        if distill_elbo is not None:
            options = {"retain_graph": True, "allow_unused": True}
            gradients = torch.autograd.grad(distill_elbo.mean(), head_and_flow, **options)
        calls.append((elbo.shape, beta, gradients))
        return dipod.dipod_loss(elbo, old_elbo, advantages, beta, *args, distill_elbo=distill_elbo)

    monkeypatch.setattr(control_task, "dipod_loss", loss)
    for method in ("fpo", "dipod++"):
        settings = control_task.settings_of(method, 0, control_args())
        info = control_task.update(policy, value, optimizer, small_batch(policy), settings)
        assert info["ratio"] == pytest.approx(1.0, abs=1e-6)
        assert info["clip_fraction"] == 0
    assert calls[0] == ((64,), 0, None)
    shape, beta, (head, flow) = calls[-1]
    assert shape == (64, control_task.DRAWS)
    assert beta == 0.3
    assert head is None
    assert flow.abs().sum() > 0


def test_fpo_and_dipod_differ_in_beta_alone():
    settings = {m: control_task.settings_of(m, 0, control_args()) for m in control_task.METHODS}
    differ = {k for k in settings["fpo"] if settings["fpo"][k] != settings["dipod"][k]}
    assert differ == {"method", "beta"}
    differ = {k for k in settings["fpo"] if settings["fpo"][k] != settings["ppo"][k]}
    assert differ == {"method"}


def test_self_distillation_tightens_the_textbook_flow():
    torch.manual_seed(0)
    policy, value = FlowPolicy(3, 2, tight=False), dipod.mlp(3, 1, 1.0)
    optimizer = torch.optim.AdamW([*policy.parameters(), *value.parameters()], 3e-3)
    obs, noise = torch.randn(256, 3), torch.randn(256, 2)
    gaps = []
    for _ in range(2):
        with torch.no_grad():
            action = policy.sample(obs, noise)
            draws = dipod.draw_flow(action, 16)
            gaps.append(
                (policy.log_prob(obs, noise) - policy.bound(obs, action, draws).mean(1)).mean()
            )
        control_task.self_distill(policy, value, optimizer, obs, 150)
    assert gaps[1] < 0.5 * gaps[0]


# The language task


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("13:9+3+1", 1),
        ("13:9+3+2", 0),
        ("07:9-3+1", 1),
        ("00:1-0-1", 1),
        ("13:9+31+", 0),
        ("13:9:3+1", 0),
        ("13:+9+31", 0),
    ],
)
def test_reward_by_hand(text, reward):
    tokens = torch.tensor([[lm_task.CHARS.index(c) for c in text]])
    assert lm_task.rewards(tokens).tolist() == [reward]
    assert lm_task.text(tokens[0]) == text


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A base model after eight updates: enough to run everything."""
    path = tmp_path_factory.mktemp("base") / "base_0.pt"
    settings = {"task": "lm", "method": "base", "seed": 0, "steps": 8}
    lm_task.pretrain(settings, path, (1, 1, 1), Namespace(device="cpu"))
    return path


def lm_args(base, **changes):
    args = {"device": "cpu", "resume": False, "base": [base], "steps": 4, "lr": 1e-3, "beta": 0.3}
    args |= {"inner": 2, "prompts": 2, "decay": False}
    return Namespace(**args | changes)


def test_lm_likelihood_sums_to_one_over_what_the_sampler_gives(base):
    torch.manual_seed(0)
    model = lm_task.load_model(base)
    tokens, maskable, _ = lm_task.sample(model, torch.tensor([13]), 4000)
    distinct, counts = tokens.unique(dim=0, return_counts=True)
    with torch.no_grad():
        log_prob, elbo = dipod.exact_likelihood(
            model, distinct, maskable[: len(distinct)], lm_task.MASK
        )
    assert (elbo <= log_prob + 1e-4).all()
    assert log_prob.exp().sum() < 1.0
    # Sum of observed - expected over the sampled completions' likeliest: within three deviations.
    likely = log_prob.exp().topk(20).indices
    p = log_prob[likely].exp().sum().item()
    observed = counts[likely].sum().item() / 4000
    assert abs(observed - p) < 4 * math.sqrt(p * (1 - p) / 4000) + 0.01


def test_lm_methods_are_what_they_say(base):
    torch.manual_seed(0)
    model = lm_task.load_model(base)
    tokens, maskable, _ = lm_task.sample(model, lm_task.TARGETS[:4], 4)
    batch = (tokens, maskable, dipod.draw_masks(maskable, 4))
    advantages = torch.randn(16)
    for method in ("fpo", "exact", "d1"):
        settings = lm_task.settings_of(method, 0, lm_args(base))
        old = lm_task.likelihood(model, settings["likelihood"], *batch).detach()
        loss, info = lm_task.loss_of(settings, model, batch, advantages, old)
        assert info["ratio"] == pytest.approx(1.0, abs=1e-6)
        assert loss.item() == pytest.approx(-advantages.mean().item(), abs=1e-5)
    settings = lm_task.settings_of("spg-dipod", 0, lm_args(base))
    elbo, eubo = dipod.masked_bounds(model, tokens, batch[2], lm_task.MASK, 1.5)
    expected, _ = dipod.spg_loss(elbo, eubo, advantages, 0.3)
    loss, _ = lm_task.loss_of(settings, model, batch, advantages, None)
    torch.testing.assert_close(loss, expected)


# Commands


def run(*command, **options):
    """A command of this project, as a user runs it."""
    command = [sys.executable, *map(str, command)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, **options)


def csv_rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="session")
def control(tmp_path_factory):
    """All control methods for two rollouts: output and directory."""
    out = tmp_path_factory.mktemp("control")
    command = ["control_task.py", "--steps", 4096, "--distill", 1, "--out", out, "--jobs", 2]
    return run(*command, "--methods", *control_task.METHODS), out


@pytest.fixture(scope="session")
def lm(tmp_path_factory, base):
    """All language methods for four rollouts, and one whose learning rate makes it diverge."""
    out = tmp_path_factory.mktemp("lm")
    command = ["lm_task.py", "--steps", 4, "--prompts", 2, "--inner", 2, "--base", base]
    command += ["--out", out, "--jobs", 2]
    hot = run(*command, "--methods", "exact", "--first-seed", 1, "--lr", 1e30)
    return run(*command, "--methods", *lm_task.METHODS), hot, out


def check_output(result, out, methods, score):
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    lines = result.stdout.splitlines()
    table = lines[lines.index("") + 1 :]
    for method in methods:
        assert any(line.split()[:2] == [method, "1"] for line in table), method
        rows = csv_rows(out / f"{method}_0.csv")
        assert list(rows[0])[:6] == ["method", "seed", "step", score, "gap", "alignment"]
        printed = [line for line in lines if line.split()[:2] == [method, "0"]]
        assert [row["step"] for row in rows] == [line.split()[2] for line in printed]
    assert max(map(len, lines[: lines.index("")])) <= 100
    assert (out / "figure.png").stat().st_size > 10_000


def test_control_end_to_end(control):
    result, out = control
    check_output(result, out, control_task.METHODS, "return")
    evaluation = run("control_task.py", "--eval", out / "dipod_0.pt")
    assert evaluation.returncode == 0, evaluation.stderr
    assert len(evaluation.stdout.splitlines()) == 2


def test_lm_end_to_end(lm):
    result, _, out = lm
    check_output(result, out, lm_task.METHODS, "reward")
    shown = [line for line in result.stdout.splitlines() if line.count(":") == 6]
    assert len(shown) == 1 + len(lm_task.METHODS)  # the base's completions and each model's


def test_a_diverged_run_is_named_and_not_averaged(lm):
    result, hot, out = lm
    assert hot.returncode == 1
    why = "stopped: FloatingPointError: non-finite gradient at step 1"
    assert f"exact_1: step 0 of 4, {why}" in hot.stdout
    assert hot.stderr == f"exact_1 {why}\n"
    assert not (out / "exact_1.pt").exists()
    assert "exact_1" not in result.stdout


def test_same_seed_same_numbers(control, lm, base, tmp_path):
    for task, args, out in (
        (control_task, control_args(), control[1]),
        (lm_task, lm_args(base), lm[2]),
    ):
        settings = task.settings_of("dipod", 0, args)
        if task is lm_task:
            settings["lr"] = 3e-4
        task.train(settings, tmp_path / "dipod_0.pt", (1, 1, 1), args)
        assert csv_rows(tmp_path / "dipod_0.csv") == csv_rows(out / "dipod_0.csv")
        (tmp_path / "dipod_0.pt").unlink()


def test_killed_and_resumed_equals_uninterrupted(base, tmp_path):
    command = ["lm_task.py", "--steps", 20, "--prompts", 2, "--inner", 2, "--base", base]
    command += ["--methods", "dipod", "--decay", "--out"]
    process = subprocess.Popen(
        [sys.executable, *map(str, command), tmp_path / "cut"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    process.stdout.readline()  # the header
    printed = [process.stdout.readline() for _ in range(3)]
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before = csv_rows(tmp_path / "cut" / "dipod_0.csv")
    assert [row["step"] for row in before][:3] == [line.split()[2] for line in printed]
    assert len(before) < 10, "killed before the end"
    resumed = run(*command, tmp_path / "cut", "--resume")
    assert resumed.returncode == 0, resumed.stderr
    args = lm_args(base, steps=20, lr=3e-4, decay=True)
    settings = lm_task.settings_of("dipod", 0, args)
    lm_task.train(settings, tmp_path / "dipod_0.pt", (1, 1, 1), args)
    assert csv_rows(tmp_path / "cut" / "dipod_0.csv") == csv_rows(tmp_path / "dipod_0.csv")


def test_a_nan_stops_the_run_and_leaves_the_last_good_record(tmp_path, monkeypatch):
    settings = control_task.settings_of("fpo", 0, control_args(steps=20480))
    rollout, calls = control_task.rollout, []

    def broken(*args):
        batch, obs, returns = rollout(*args)
        calls.append(1)
        if len(calls) == 4:
            batch["advantages"][:] = math.nan
        return batch, obs, returns

    monkeypatch.setattr(control_task, "rollout", broken)
    path = tmp_path / "fpo_0.pt"
    with pytest.raises(FloatingPointError, match="non-finite gradient at step 8192"):
        control_task.train(settings, path, (1, 1, 1), control_args())
    state = dipod.load(path, "control")
    assert [row["step"] for row in state["rows"]] == [4096, 6144]
    assert all(p.isfinite().all() for p in state["policy"].values())


def good_train(settings, path, place, args):
    record = dipod.Run(path, settings, {"layer": nn.Linear(1, 1)}, place, args.resume)
    row = {"step": settings["steps"], "reward": 1.0, "gap": 0.0, "alignment": math.nan}
    record.add(1, row)


def some_raise(settings, path, place, args):
    if settings["seed"] == 0:
        raise MemoryError("no room\nfor two lines")
    good_train(settings, path, place, args)


def test_an_exception_in_one_run_is_one_line_and_the_others_go_on(tmp_path, capfd, monkeypatch):
    records = {}
    for seed in range(2):
        settings = {"task": "lm", "method": "fpo", "seed": seed, "steps": 3}
        records[tmp_path / f"fpo_{seed}.pt"] = settings
    errors = dipod.run_all(some_raise, records, Namespace(jobs=1, resume=False), "reward")

    def no_figure(*args):
        raise ImportError("no module named matplotlib")

    monkeypatch.setattr(dipod, "draw", no_figure)
    assert dipod.finish(records, errors) == 1
    out, err = capfd.readouterr()
    assert err == "fpo_0 stopped: MemoryError: no room\n"
    assert "fpo_0: step 0 of 3, stopped: MemoryError: no room" in out
    assert "fpo            1  1 [1..1]" in out
    assert "no figure: no module named matplotlib" in out


def test_the_default_out_is_fresh_each_time(base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = lm_args(base, out=None, overwrite=False, first_seed=0, seeds=1, methods=["fpo"])
    names = [next(iter(dipod.prepare(args, lm_task.settings_of))).parent.name for _ in range(3)]
    assert names == ["lm-1", "lm-2", "lm-3"]


WRONG_COMMANDS = [
    ("control", "--lr 0", "--lr: expected a finite number"),
    ("control", "--beta nan", "--beta: expected a finite number"),
    ("control", "--steps 1e5", "--steps: expected a whole number"),
    ("control", "--methods fpo fpo", "--methods: expected each method once"),
    ("control", "--env Nowhere-v0", "--env Nowhere-v0: NameNotFound"),
    ("control", "--env CartPole-v1", "--env CartPole-v1: expected vectors and bounded actions"),
    ("control", "--env Broken-v0", "--env Broken-v0: OSError: no wheels"),
    ("control", "--eval LM/dipod_0.pt", "expected a checkpoint of control_task.py"),
    ("control", "--eval README.md", "not a checkpoint"),
    ("control", "--eval CUT", "not a checkpoint"),
    (
        "control",
        "--gif a.mp4 --eval CONTROL/dipod_0.pt",
        "--gif: expected a name that ends in .gif",
    ),
    ("control", "--out README.md/x", "README.md"),
    ("control", "--out CONTROL --methods dipod", "--resume goes on"),
    ("control", "--out CONTROL --methods dipod --resume --steps 8192", "steps 8192"),
    ("control", "--out LM --methods dipod --resume", "expected a checkpoint of control_task.py"),
    ("lm", "--base CONTROL/dipod_0.pt", "expected a checkpoint of lm_task.py"),
    ("lm", "--base LM/dipod_0.pt --out LM --methods dipod --overwrite", "--base"),
    ("lm", "--base LM/fpo_0.pt --out LM --methods dipod --resume", "base"),
    ("lm", "--inner 0", "--inner: expected a whole number of at least 1"),
]


def broken_env(**kwargs):
    raise OSError("no wheels")


gym.register("Broken-v0", entry_point=broken_env)


@pytest.mark.parametrize(("task", "arguments", "said"), WRONG_COMMANDS)
def test_wrong_command_is_one_line_and_status_2(
    task, arguments, said, control, lm, tmp_path, monkeypatch, capsys
):
    cut = tmp_path / "cut.pt"
    cut.write_bytes((lm[2] / "dipod_0.pt").read_bytes()[:2000])
    places = {"CONTROL": control[1], "LM": lm[2], "CUT": cut, "README": ROOT / "README"}
    for name, place in places.items():
        arguments = arguments.replace(name, str(place))
    monkeypatch.setattr(sys, "argv", [f"{task}_task.py", *arguments.split()])
    monkeypatch.chdir(tmp_path)
    before = (lm[2] / "dipod_0.pt").read_bytes()
    with pytest.raises(SystemExit) as stop:
        {"control": control_task, "lm": lm_task}[task].main()
    out, err = capsys.readouterr()
    assert stop.value.code == 2
    assert out == ""
    assert len(err.splitlines()) == 1
    assert said in err
    assert (lm[2] / "dipod_0.pt").read_bytes() == before


def one_step(rank, world, base, path):
    """A process's share of two prompts' completions, one update, and the weights after it."""
    if world > 1:
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29517")
        dist.init_process_group("gloo", rank=rank, world_size=world)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = lm_task.load_model(base)
    net = nn.parallel.DistributedDataParallel(model) if world > 1 else model
    tokens, maskable, _ = lm_task.sample(model, torch.tensor([5, 9]), 4)
    advantages, draws = torch.randn(8), dipod.draw_masks(maskable, 4)
    part = slice(rank * 8 // world, (rank + 1) * 8 // world)
    batch = (tokens[part], maskable[part], dipod.MaskDraws(draws.mask[part], draws.weight[part]))
    settings = {"likelihood": "elbo", "beta": 0.3}
    with torch.no_grad():
        old = lm_task.likelihood(model, "elbo", *batch)
    loss, _ = lm_task.loss_of(settings, net, batch, advantages[part], old)
    loss.backward()
    torch.save([p.grad for p in model.parameters()], f"{path}_{rank}.pt")
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()
        time.sleep(0.2)


def test_two_processes_with_half_the_batch_take_the_step_of_one(base, tmp_path):
    one_step(0, 1, base, tmp_path / "one")
    torch.multiprocessing.spawn(one_step, (2, base, tmp_path / "two"), nprocs=2)
    alone = torch.load(tmp_path / "one_0.pt")
    for rank in range(2):
        together = torch.load(tmp_path / f"two_{rank}.pt")
        for a, b in zip(alone, together):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_the_method_stands_alone(tmp_path):
    method, _ = (ROOT / "dipod.py").read_text().split("# The method ends here.")
    (tmp_path / "copied.py").write_text(method)
    code = "import copied; print(sorted(copied.two_token(steps=1)))"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert result.stdout == "['alignment', 'gap', 'gap_AA', 'reward']\n", result.stderr
    imported = {
        line.split()[1].split(".")[0]
        for line in method.splitlines()
        if line[:5] == "from " or line[:7] == "import "
    }
    assert imported <= {"math", "typing", "torch"}
