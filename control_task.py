"""Continuous control with a flow policy on MuJoCo: FPO, DiPOD and a Gaussian PPO side by side.

    python control_task.py                                   # fpo, dipod, ppo on Reacher-v5
    python control_task.py --env Hopper-v5 --seeds 5         # five seeds of each
    python control_task.py --policy textbook --methods fpo++ distill dipod++
    python control_task.py --env TwoDoors-v0                 # where a Gaussian cannot win
    python control_task.py --eval runs/control-1/dipod_0.pt --gif dipod.gif

A policy acts in [-1, 1] per dimension, rescaled to the environment's bounds. Shapes: S steps of a
rollout, E environments, B = S * E samples, N draws, A action dimensions, O observation dimensions.
"""

import copy
import math
import warnings

import gymnasium as gym
import mujoco
import numpy as np
import torch
from gymnasium.wrappers import vector as wrappers
from torch import nn

import dipod
from dipod import FlowDraws, FlowPolicy, alignment, dipod_loss, draw_flow, mlp

# One configuration for every method and environment, so that fpo and dipod differ in beta alone
# and ppo in the policy alone. Learning rate and minibatch have the best mean rank of dipod and ppo
# on Reacher, Hopper and HalfCheetah, seeds 20 to 22. The others are the usual ones of PPO.
NUM_ENVS = 16
ROLLOUT = 128  # steps of each environment between two rounds of updates
EPOCHS = 5
MINIBATCH = 256  # 8 minibatches in each epoch, so 40 updates on a rollout
LEARNING_RATE = 4e-3  # decays linearly to 0
CLIP = 0.2
GAMMA = 0.99
LAMBDA = 0.95
MAX_GRAD_NORM = 0.5
DRAWS = 2  # (time, noise) of an action: one pair of `draw_flow`
BETA = 0.3  # in advantage per unit of `FlowPolicy.latent_elbo`
SCALE = {"tight": 0.02, "textbook": 0.25}  # factor of the velocity, see `FlowPolicy`
ROWS = 20  # rows of a run's record, about

# beta: whether the loss has DiPOD's regularizer. per_draw: FPO++'s one ratio per draw and "aspo".
# distill: self-distillation before training (closes the gap) or after each rollout (Algorithm 1).
METHODS = {
    "ppo": {"beta": False, "per_draw": False, "distill": None},
    "fpo": {"beta": False, "per_draw": False, "distill": None},
    "dipod": {"beta": True, "per_draw": False, "distill": None},
    "fpo++": {"beta": False, "per_draw": True, "distill": None},
    "dipod++": {"beta": True, "per_draw": True, "distill": None},
    "distill": {"beta": False, "per_draw": True, "distill": "before", "updates": 16_000},
    "interleave": {"beta": False, "per_draw": False, "distill": "after", "updates": 8},
}


class TwoDoors(gym.Env):
    """A door hidden at -0.7 or 0.7 opens to an action within 0.2 of it: reward 1, in four tries.

    Nothing is seen or remembered. Always the same side finds half of the doors, a random side at
    each try 15 of 16. So the best policy has two modes, and a Gaussian has one.
    """

    observation_space = action_space = gym.spaces.Box(-1, 1, (1,))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.door = self.np_random.choice((-0.7, 0.7))
        self.tries = 0
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.tries += 1
        opens = bool(abs(action[0] - self.door) < 0.2)
        return np.zeros(1, np.float32), float(opens), opens or self.tries == 4, False, {}


gym.register("TwoDoors-v0", entry_point=TwoDoors)


def make_envs(env, num_envs, **kwargs):
    """Vector environment for actions in [-1, 1]; ValueError if the policies cannot act in it."""
    warnings.simplefilter("ignore")  # gymnasium's and glfw's: the errors say what is missing
    mujoco.set_mju_user_warning(lambda text: None)  # about gymnasium's own models
    try:
        envs = gym.make_vec(env, num_envs, "sync", {"autoreset_mode": "SameStep"}, **kwargs)
    except Exception as error:  # noqa: BLE001 - a constructor may raise anything
        raise ValueError(f"--env {env}: {type(error).__name__}: {error}") from None
    spaces = (envs.single_observation_space, envs.single_action_space)
    vectors = all(isinstance(space, gym.spaces.Box) and len(space.shape) == 1 for space in spaces)
    if not vectors or not spaces[1].is_bounded() or spaces[1].dtype.kind != "f":
        raise ValueError(f"--env {env}: expected vectors and bounded float actions, got {spaces}")
    envs = wrappers.ClipAction(wrappers.RescaleAction(envs, np.float32(-1), np.float32(1)))
    return RewardNorm(wrappers.RecordEpisodeStatistics(envs), GAMMA)


class RewardNorm(wrappers.NormalizeReward):
    """gymnasium's wrapper, with its running variance in the checkpoint, in float64 as it was."""

    def state_dict(self):
        return {name: float(value) for name, value in vars(self.return_rms).items()}

    def load_state_dict(self, state):
        vars(self.return_rms).update({name: np.float64(x) for name, x in state.items()})


def gae(rewards, values, next_values, terminated, done):
    """Generalised advantage estimates (S, E). Truncation is not termination: it bootstraps."""
    delta = rewards + GAMMA * next_values.masked_fill(terminated, 0.0) - values
    advantages = torch.empty_like(delta)
    running = torch.zeros_like(delta[0])
    for t in reversed(range(len(delta))):
        running = delta[t] + GAMMA * LAMBDA * ~done[t] * running
        advantages[t] = running
    return advantages


@torch.inference_mode()
def rollout(policy, value, norm, envs, obs):
    """ROLLOUT steps: samples (B, ...), the last observation, the returns of finished episodes."""
    actor, actor_norm = (copy.deepcopy(net).cpu() for net in (policy, norm))  # faster than a GPU
    steps, returns = [], []
    for _ in range(ROLLOUT):
        raw = torch.as_tensor(obs, dtype=torch.float32)
        noise = torch.randn(NUM_ENVS, len(policy.log_std))
        action = actor.sample(actor_norm(raw), noise)  # unclipped: only the environment clips
        obs, reward, terminated, truncated, info = envs.step(action.numpy())
        done = terminated | truncated
        last = obs.astype(np.float32)
        if done.any():
            last[done] = np.stack(info["final_obs"][done])  # not the next episode's first
            returns += info["episode"]["r"][done].tolist()
        steps.append((raw, noise, action, last, reward.astype(np.float32), terminated, done))
    device = policy.log_std.device
    columns = [torch.as_tensor(np.stack(column), device=device) for column in zip(*steps)]
    raw, noise, action, last, reward, terminated, done = columns
    x = norm(raw.flatten(0, 1)).view_as(raw)
    values = value(x)[..., 0]
    next_values = value(norm(last.flatten(0, 1)).view_as(raw))[..., 0]
    advantages = gae(reward, values, next_values, terminated, done)
    norm.train()(raw.flatten(0, 1))  # counts from the next rollout on
    norm.eval()
    samples = (x, noise, action, advantages, advantages + values)
    return [column.flatten(0, 1) for column in samples], obs, returns


def drift(policy, samples, generator):
    """Gap in nats, alignment and entropy before the updates; `generator` is not the training's."""
    some = torch.randperm(len(samples[0]), generator=generator, device=generator.device)[:512]
    obs, noise, action, advantages, _ = (column[some] for column in samples)
    draws = draw_flow(action, 16, generator)
    log_prob = policy.log_prob(obs, noise)
    gap = log_prob - policy.bound(obs, action, draws).mean(1)
    advantages = advantages - advantages.mean()
    proxy = (advantages * policy.elbo(obs, action, draws).mean(1)).mean()
    cosine = alignment(proxy, (advantages * log_prob).mean(), policy.parameters())
    measured = {"gap": gap.mean(), "alignment": cosine, "entropy": -log_prob.mean()}
    return {name: value.item() for name, value in measured.items()}


def step_optimizer(optimizer, policy, value, loss):
    """One update, gradients clipped for each network. Returns the policy's gradient norm."""
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(value.parameters(), MAX_GRAD_NORM)
    grad_norm = nn.utils.clip_grad_norm_(policy.parameters(), MAX_GRAD_NORM)
    optimizer.step()
    return grad_norm


def update(policy, value, optimizer, samples, settings):
    """PPO's epochs of minibatches on one rollout. Returns the mean of the losses' infos."""
    obs, _, action, advantages, targets = samples
    draws = draw_flow(action, DRAWS)
    with torch.no_grad():
        old_elbo = policy.elbo(obs, action, draws)  # (B, N), once, with the draws of every epoch
        z = policy.standardize(obs, action)  # the flow's part, as sampled
    columns = (obs, action, z, *draws, old_elbo, advantages, targets)
    beta = settings["beta"]
    options = {"clip": CLIP, "trust_region": "aspo" if settings["per_draw"] else "ppo"}
    infos = []
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(obs), device=obs.device).split(MINIBATCH):
            x, a, z_old, time, noise, old, advantage, target = (c[rows] for c in columns)
            elbo = policy.elbo(x, a, FlowDraws(time, noise))
            if not settings["per_draw"]:
                elbo, old = elbo.mean(1), old.mean(1)
            # Without the head, which has no gap and would only lose its std.
            distill = policy.latent_elbo(x, z_old, FlowDraws(time, noise)) if beta else None
            advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
            loss, info = dipod_loss(elbo, old, advantage, beta, distill_elbo=distill, **options)
            value_loss = nn.functional.mse_loss(value(x)[:, 0], target)
            info["grad_norm"] = step_optimizer(optimizer, policy, value, loss + value_loss)
            infos.append(info)
    return {name: torch.stack([info[name] for info in infos]).mean().item() for name in infos[0]}


def self_distill(policy, value, optimizer, obs, settings):
    """Raises the ELBO of fresh samples, Algorithm 1's other half. Returns the last grad norm."""
    for _ in range(settings["updates"]):
        x = obs[torch.randint(len(obs), (MINIBATCH,), device=obs.device)]
        with torch.no_grad():
            noise = torch.randn(MINIBATCH, len(policy.log_std), device=obs.device)
            z = policy.standardize(x, policy.sample(x, noise))
        elbo = policy.latent_elbo(x, z, draw_flow(z, DRAWS))
        loss, _ = dipod_loss(elbo, elbo, torch.zeros_like(elbo[:, 0]), beta=1.0)
        grad_norm = step_optimizer(optimizer, policy, value, loss)
    return grad_norm


def make_networks(settings, envs):
    """Policy, value, and a normalisation by the average mean and variance of the rollouts."""
    obs_dim, action_dim = envs.single_observation_space.shape[0], envs.single_action_space.shape[0]
    flow, tight = settings["method"] != "ppo", settings["policy"] == "tight"
    policy = FlowPolicy(obs_dim, action_dim, tight or not flow, flow, SCALE[settings["policy"]])
    norm = nn.BatchNorm1d(obs_dim, affine=False, momentum=None)
    norm = nn.Sequential(norm, nn.Hardtanh(-10.0, 10.0)).eval()
    return policy, mlp(obs_dim, 1, 1.0), norm


def train(settings, path, place, args):
    """One run. A resumed one goes on from its record, but its episodes start anew."""
    torch.manual_seed(settings["seed"])
    envs = make_envs(settings["env"], NUM_ENVS)
    policy, value, norm = (net.to(args.device) for net in make_networks(settings, envs))
    weights = [*policy.parameters(), *value.parameters()]
    optimizer = torch.optim.AdamW(weights, settings["lr"], eps=1e-5, weight_decay=0.0, fused=True)
    size = NUM_ENVS * ROLLOUT
    iterations = max(2, math.ceil(settings["steps"] / size))
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, iterations)
    parts = {"policy": policy, "value": value, "norm": norm, "envs": envs}
    parts |= {"optimizer": optimizer, "decay": decay}
    run = dipod.Run(path, settings, parts, place, args.resume)
    obs, _ = envs.reset(seed=1000 * settings["seed"] + run.step // size)
    returns = []
    score = run.rows[-1]["return"] if run.rows else math.nan
    for iteration in range(run.step // size, iterations):
        samples, obs, finished = rollout(policy, value, norm, envs, obs)
        returns += finished
        if iteration == 0:  # only for the observation statistics, which change the inputs
            if settings["distill"] == "before":
                self_distill(policy, value, optimizer, norm(samples[0]), settings)
            continue
        due = iteration in (1, iterations - 1) or (iteration + 1) % max(1, iterations // ROWS) == 0
        measured = {"gap": math.nan, "alignment": math.nan, "entropy": math.nan}
        if due and settings["method"] != "ppo":
            measured = drift(policy, samples, torch.Generator(args.device).manual_seed(iteration))
        info = update(policy, value, optimizer, samples, settings)
        grad_norm = info.pop("grad_norm")
        if settings["distill"] == "after":
            grad_norm += self_distill(policy, value, optimizer, samples[0], settings).item()
        step = (iteration + 1) * size
        if not math.isfinite(grad_norm + norm[0].running_var.sum()):  # once, as a GPU waits here
            raise FloatingPointError(f"non-finite gradient or observation at step {step}")
        decay.step()
        if due:
            score = float(np.mean(returns)) if returns else score  # no episode may have ended
            run.add({"step": step, "return": score} | measured | info)
            returns = []


@torch.no_grad()
def play(state, episodes, noise_scale=1.0, **kwargs):
    """Episode returns (episodes,) of a record's policy, one in each environment, and the frames."""
    envs = make_envs(state["settings"]["env"], episodes, **kwargs)
    policy, _, norm = make_networks(state["settings"], envs)
    policy.load_state_dict(state["policy"])
    norm.load_state_dict(state["norm"])
    obs, _ = envs.reset(seed=10**6)
    generator = torch.Generator().manual_seed(0)
    returns, frames = np.full(episodes, np.nan), []
    while np.isnan(returns).any():
        if kwargs and len(frames) < 300:
            frames.append(envs.render()[0][::3, ::3])  # small, so that a GIF is below a megabyte
        noise = noise_scale * torch.randn(episodes, len(policy.log_std), generator=generator)
        action = policy.sample(norm(torch.as_tensor(obs, dtype=torch.float32)), noise)
        obs, _, terminated, truncated, info = envs.step(action.numpy())
        first = (terminated | truncated) & np.isnan(returns)  # later episodes do not count
        if first.any():
            returns[first] = info["episode"]["r"][first]
    return returns, frames


def evaluate(paths, gif):
    """Prints returns with the policy's noise and without; writes an episode of the first policy."""
    states = [dipod.load(path, "control") for path in paths]
    if gif:
        import imageio  # comes with gymnasium[mujoco]

        open(gif, "ab").close()  # an error here comes before the work
        try:
            _, frames = play(states[0], 1, render_mode="rgb_array", camera_name="track")
        except Exception as error:  # noqa: BLE001 - without a display anything may fail
            raise ValueError(f"--gif: no picture here, MUJOCO_GL may help ({error})") from None
        imageio.mimsave(gif, frames[::3], duration=40, loop=0)
    for path, state in zip(paths, states):
        for name, scale in (("with noise", 1.0), ("without", 0.0)):
            returns, _ = play(state, 20, scale)
            print(f"{path}, 20 episodes {name}: return {dipod.spread(returns)}")


def settings_of(method, seed, args):
    """The flags that a run depends on. Only a run with the same settings resumes its record."""
    settings = {"task": "control", "method": method, "seed": seed, "env": args.env}
    settings |= {"policy": args.policy, "steps": args.steps, "lr": args.lr} | METHODS[method]
    settings["beta"] *= args.beta  # 0 if the method has none
    if settings["distill"] and args.distill is not None:
        settings["updates"] = args.distill
    return settings


def main():
    """The command line."""
    parser = dipod.task_parser(__doc__, METHODS, ["fpo", "dipod", "ppo"])
    add, number = parser.add_argument, dipod.number
    add("--steps", type=number(int, 1), default=400_000, help="environment steps of a run")
    add("--lr", type=number(float, 1e-9), default=LEARNING_RATE, help="learning rate")
    add("--beta", type=number(float, 0), default=BETA, help="weight of DiPOD's regularizer")
    add("--env", default="Reacher-v5", help="a gymnasium environment with Box spaces")
    add("--policy", choices=SCALE, default="tight", help="the flow of all but ppo")
    add("--distill", type=number(int, 1), metavar="N", help="updates of self-distillation")
    add("--eval", nargs="+", metavar="CHECKPOINT", help="evaluate trained policies, and leave")
    add("--gif", metavar="FILE.gif", help="with --eval: an episode of the first policy")
    args = parser.parse_args()
    if args.gif and not (args.eval and args.gif.endswith(".gif")):
        parser.error("--gif: expected a name that ends in .gif, and --eval CHECKPOINT")
    try:
        if args.eval:
            return evaluate(args.eval, args.gif)
        make_envs(args.env, 1).close()
        records = dipod.prepare(args, settings_of)
    except (ValueError, OSError, RuntimeError) as error:
        parser.error(str(error).splitlines()[0])
    print(f"{args.env}, {args.steps} steps, {args.policy} policy")
    errors = dipod.run_all(train, records, args, "return")
    raise SystemExit(dipod.finish(records, errors))


if __name__ == "__main__":
    dipod.command(main)
