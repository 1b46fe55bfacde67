"""Continuous control with a flow policy on MuJoCo: FPO, FPO + DiPOD and a Gaussian PPO side by side, drift measured.

    python control_task.py                                        # fpo, dipod, ppo on the default environment
    python control_task.py --env HalfCheetah-v5 --seeds 3 --jobs 2
    python control_task.py --policy linear                        # FPO's textbook flow
    python control_task.py --epochs 10 --minibatch 256 --lr 1e-3 --decay  # PPO's many small updates: slower
    python control_task.py --eval runs/control/dipod_0.pt         # 20 stochastic episodes, 20 with zero noise
    python control_task.py --eval runs/control/dipod_0.pt --render dipod.gif
    python control_task.py --env TwoDoors-v0 --steps 400000       # where a Gaussian cannot win
    python control_task.py --eval runs/control/*.pt --actions actions.png  # histograms of what they do there
    python control_task.py --benchmark --env HalfCheetah-v5       # where the time goes

Actions live in [-1, 1] per dimension and are rescaled to the environment's bounds. Shapes: S steps of a rollout, E
environments, B = S*E samples, N draws, A action dimensions, O observation dimensions.
"""

import math
import warnings
from itertools import pairwise
from time import monotonic

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import AutoresetMode
from gymnasium.wrappers.utils import RunningMeanStd
from gymnasium.wrappers.vector import ClipAction, RecordEpisodeStatistics, RescaleAction
from torch import Tensor, nn

import dipod
from dipod import FlowDraws, alignment, dipod_loss, draw_flow, flow_bound, flow_elbo, flow_log_prob, flow_sample

ROLLOUT, GAMMA, LAMBDA, MAX_GRAD_NORM, MIN_TIME = 128, 0.99, 0.95, 0.5, 0.005

# What a run has unless its method, its policy or a flag says otherwise.
COMMON = {"beta": 0.0, "trust_region": "ppo", "per_draw": False, "fresh": False, "flow_only": False}
COMMON |= {"every": 0, "distill": 0, "first": 0}
# `fpo` and `dipod` differ in beta alone, as do `fpo++` and `dipod++`. interleave is Algorithm 1: after every `every`
# rollouts `distill` updates of self-distillation. distill: `first` such updates of the untrained flow, then fpo++.
# dipod-fresh takes the regularizer on actions sampled at each update: on the rollout's own, epoch after epoch, it also
# fits those actions. dipod-flow takes it on the flow's part z of the rollout's actions, so that the Gaussian head,
# which has no gap, is left out.
METHODS = {
    "ppo": {},
    "fpo": {},
    "dipod": {"beta": 0.3},
    "dipod-fresh": {"beta": 0.3, "fresh": True},
    "dipod-flow": {"beta": 0.3, "flow_only": True},
    "fpo++": {"trust_region": "aspo", "per_draw": True},
    "dipod++": {"trust_region": "aspo", "per_draw": True, "beta": 0.3},
    "interleave": {"every": 1, "distill": 2},
    "distill": {"trust_region": "aspo", "per_draw": True, "first": 200},
}
# One configuration per policy for all environments; linear has FPO's own. README.md says what else was tried.
POLICIES = {
    "gaussian": {"lr": 1e-3, "clip": 0.2, "draws": 1, "epochs": 10, "minibatch": 256},
    "linear": {"lr": 1e-3, "clip": 0.05, "draws": 8, "epochs": 10, "minibatch": 512},
    "whitened": {"lr": 3e-3, "clip": 0.2, "draws": 4, "epochs": 4, "minibatch": 512},
}
COLUMNS = ["method", "seed", "step", "return", "elbo", "gap", "alignment", "noise_floor", "invalid", "ratio"]
COLUMNS += ["clip_fraction", "entropy", "wall"]
PANELS = {"return": "return of finished episodes", "gap": "gap (nats)", "alignment": "alignment (cosine)"}


def mlp(sizes: list[int], last_gain: float) -> nn.Sequential:
    """Tanh MLP with PPO's orthogonal initialisation."""
    layers = []
    for i, (a, b) in enumerate(pairwise(sizes)):
        linear = nn.Linear(a, b)
        nn.init.orthogonal_(linear.weight, last_gain if i == len(sizes) - 2 else math.sqrt(2))
        nn.init.zeros_(linear.bias)
        layers += [linear, nn.Tanh()]
    return nn.Sequential(*layers[:-1])


class GaussianPolicy(nn.Module):
    """PPO's policy, action = mean(obs) + std * noise; its ELBO is its log-likelihood, gap 0."""

    def __init__(self, obs_dim: int, action_dim: int):
        super().__init__()
        self.mean = mlp([obs_dim, 64, 64, action_dim], 0.01)
        self.log_std = nn.Parameter(torch.zeros(action_dim))

    def act(self, obs: Tensor, noise: Tensor) -> Tensor:
        return self.mean(obs) + self.log_std.exp() * noise

    def actor(self):
        """As the flow's: there is nothing to compute once."""
        return self.act

    def whiten(self, obs: Tensor, action: Tensor) -> Tensor:
        return (action - self.mean(obs)) * (-self.log_std).exp()

    def forward(self, obs: Tensor, action: Tensor, draws: FlowDraws) -> Tensor:
        """The ELBO (B, 1): the log-likelihood itself, in nats."""
        z = self.whiten(obs, action)
        return (-0.5 * z.square() - self.log_std - 0.5 * math.log(2 * math.pi)).sum(-1, keepdim=True)


class FlowPolicy(nn.Module):
    """A velocity field of 64x2 SiLU on (observation, time embedding, x), with or without a Gaussian head.

    "linear" is FPO's textbook flow. "whitened" starts tight: the path preserves variance, the last layer is zero, so
    that the flow is a standard normal z with gap 0, and action = mean(obs) + std * z; head=False: mean 0 and std 1.
    """

    def __init__(self, obs_dim, action_dim, kind: str, head: bool, num_steps: int, solver: str, out_scale=None):
        super().__init__()
        self.path = "linear" if kind == "linear" else "vp"
        self.head = GaussianPolicy(obs_dim, action_dim) if head and kind == "whitened" else None
        self.solver = {"num_steps": num_steps, "method": solver, "path": self.path}
        # One Linear on the concatenation, in two parts: the observation's is computed once per call, not once per draw.
        self.obs_in, self.inner_in = nn.Linear(obs_dim, 64), nn.Linear(8 + action_dim, 64, bias=False)
        self.rest = nn.Sequential(nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, action_dim))
        self.out_scale = (0.05 if self.head else 0.25) if out_scale is None else out_scale
        if kind == "whitened":
            nn.init.zeros_(self.rest[-1].weight)
            nn.init.zeros_(self.rest[-1].bias)
        calls = [1 - i / num_steps for i in range(num_steps)]
        if solver == "midpoint":
            calls = [t - half / num_steps for t in calls for half in (0, 0.5)]
        self.register_buffer("frequency", 2.0 ** torch.arange(4), persistent=False)
        embedding, scale = self.embed(torch.tensor(calls)[:, None])
        self.register_buffer("call_embedding", embedding, persistent=False)
        self.call_scales = scale.squeeze(1).tolist()

    def embed(self, time: Tensor) -> tuple[Tensor, Tensor]:
        """Embedding (..., 8) of the time, and the output's scale: sin(tau) on the "vp" path.

        E[u | x] vanishes at tau = 0; an output that did not would make the true bound diverge there.
        """
        angle = time * self.frequency
        rise = (time * (math.pi / 2)).sin() if self.path == "vp" else torch.ones_like(time)
        return torch.cat((angle.cos(), angle.sin()), -1), rise * self.out_scale

    def velocity(self, obs: Tensor):
        """The field for these observations (B, O)."""
        context = self.obs_in(obs)

        def field(x: Tensor, time: Tensor) -> Tensor:
            embedding, scale = self.embed(time)
            inner = self.inner_in(torch.cat((embedding, x), -1))
            return scale * self.rest((context if x.dim() == 2 else context[:, None]) + inner)

        return field

    def actor(self):
        """act(obs, noise) -> action for one rollout, under no_grad; what neither obs nor x changes is computed here."""
        time_weight, x_weight = self.inner_in.weight.T.split((8, self.inner_in.in_features - 8))
        obs_weight, at_time = self.obs_in.weight.T, (self.call_embedding @ time_weight + self.obs_in.bias)[:, None]
        (w1, b1), (w2, b2) = ((layer.weight.T, layer.bias) for layer in (self.rest[1], self.rest[3]))

        def act(obs: Tensor, noise: Tensor) -> Tensor:
            calls = iter(zip((obs @ obs_weight + at_time).unbind(), self.call_scales))  # in the solver's order of times

            def field(x: Tensor, time: Tensor) -> Tensor:
                first, scale = next(calls)
                hidden = nn.functional.silu(torch.addmm(first, x, x_weight), inplace=True)
                hidden = nn.functional.silu(torch.addmm(b1, hidden, w1), inplace=True)
                return torch.addmm(b2, hidden, w2, beta=scale, alpha=scale)

            z = flow_sample(field, noise, **self.solver)
            return self.head.act(obs, z) if self.head else z

        return act

    def act(self, obs: Tensor, noise: Tensor) -> Tensor:
        with torch.no_grad():
            return self.actor()(obs, noise)

    def whiten(self, obs: Tensor, action: Tensor) -> Tensor:
        """The flow's part z of actions: what it sampled, before the head's mean and std."""
        return self.head.whiten(obs, action) if self.head else action

    def forward(self, obs: Tensor, action: Tensor, draws: FlowDraws, flow_only: bool = False) -> Tensor:
        """The ELBO (B, N): linear, minus the CFM loss; whitened, up to a constant, at first with the Gaussian's score.

        With `flow_only` the actions are the flow's part z, and the ELBO is the flow's, without the head.
        """
        if self.path == "linear":
            draws = draws._replace(time=MIN_TIME + (1 - 2 * MIN_TIME) * draws.time)
            return flow_elbo(self.velocity(obs), action, draws)
        z = action if flow_only else self.whiten(obs, action)
        elbo = action.shape[1] * flow_elbo(self.velocity(obs), z, draws, "vp")
        return elbo - self.head.log_std.sum() if self.head and not flow_only else elbo

    def nats(self, obs: Tensor, noise: Tensor, action: Tensor, draws: FlowDraws) -> tuple[Tensor, Tensor, Tensor]:
        """Exact log_prob (B,) of the actions that `noise` leads to, their ELBO (B,), and which are invertible (B,)."""
        z = self.whiten(obs, action)
        velocity, log_det = self.velocity(obs), self.head.log_std.sum() if self.head else 0.0
        _, log_prob, invertible = flow_log_prob(velocity, noise, **self.solver, action=z, return_invertible=True)
        bound = flow_bound(velocity, z, draws, self.path, 0.0 if self.path == "vp" else MIN_TIME).mean(1)
        return log_prob - log_det, bound - log_det, invertible


def make_policy(settings: dict) -> nn.Module:
    """The policy that `settings`, as a checkpoint holds them, describe."""
    if settings["policy"] == "gaussian":
        return GaussianPolicy(settings["obs_dim"], settings["action_dim"])
    names = ("obs_dim", "action_dim", "policy", "head", "flow_steps", "solver")
    return FlowPolicy(*(settings[name] for name in names), settings.get("flow_scale"))  # older checkpoints have none


class TwoDoors(gym.Env):
    """A door hidden at -0.7 or +0.7 opens to an action within 0.2 of it: reward 1; four tries, nothing seen, no memory.

    One side always finds 1/2 of the doors, a coin tossed at each try 15/16: a Gaussian has to choose or to stay wide.
    """

    def __init__(self):
        self.observation_space = gym.spaces.Box(-1, 1, (1,), np.float32)
        self.action_space = gym.spaces.Box(-1, 1, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.door, self.tries = self.np_random.choice((-0.7, 0.7)), 0
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.tries += 1
        opens = bool(abs(action[0] - self.door) < 0.2)
        return np.zeros(1, np.float32), float(opens), opens or self.tries == 4, False, {}


gym.register("TwoDoors-v0", entry_point=TwoDoors)


def make_envs(env: str, num_envs: int):
    """Vector environment for policies in [-1, 1]; refuses what the policies cannot act in."""
    try:
        import mujoco

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            mujoco.set_mju_user_warning(lambda text: None)  # a newer MuJoCo's, about gymnasium's own models
            modes = {"autoreset_mode": AutoresetMode.SAME_STEP}
            envs = gym.make_vec(env, num_envs=num_envs, vectorization_mode="sync", vector_kwargs=modes)
            mujoco.set_mju_user_warning(None)
    except (gym.error.Error, ImportError, AttributeError, RuntimeError) as e:  # the last two: a broken MUJOCO_GL
        dipod.fail(f"--env {env}: {str(e).splitlines()[0]}")
    for name, space in (("observations", envs.single_observation_space), ("actions", envs.single_action_space)):
        if not isinstance(space, gym.spaces.Box) or len(space.shape) != 1:
            dipod.fail(f"--env {env}: expected one-dimensional Box {name}, got {space}")
    if not space.is_bounded():
        dipod.fail(f"--env {env}: expected bounded actions, got {space}")
    one = np.ones(space.shape, np.float32)
    if (space.low != -1).any() or (space.high != 1).any():
        envs = RescaleAction(envs, -one, one)
    return RecordEpisodeStatistics(ClipAction(envs))


class Statistics:
    """Running observation mean and variance, and the scale of rewards; frozen between two calls of `update`."""

    def __init__(self, obs_dim: int, num_envs: int):
        self.obs, self.returns = RunningMeanStd(shape=(obs_dim,)), RunningMeanStd()
        self.running = np.zeros(num_envs)

    def normalize(self, obs: np.ndarray, device) -> Tensor:
        z = (obs - self.obs.mean) / np.sqrt(self.obs.var + 1e-8)
        return torch.from_numpy(z.clip(-10, 10).astype(np.float32)).to(device)

    def update(self, raw_obs: np.ndarray, rewards: np.ndarray, done: np.ndarray) -> None:
        self.obs.update_from_moments(*moments(raw_obs.reshape(-1, raw_obs.shape[-1])))
        returns = np.empty_like(rewards)
        for t in range(len(rewards)):
            self.running = self.running * GAMMA + rewards[t]
            returns[t] = self.running
            self.running = self.running * ~done[t]
        self.returns.update_from_moments(*moments(returns.flatten()))

    def scale(self, rewards: np.ndarray) -> np.ndarray:
        return rewards / np.sqrt(self.returns.var + 1e-8)

    def state_dict(self) -> dict:
        pairs = {"obs": self.obs, "returns": self.returns}
        return {k: [torch.as_tensor(v.mean), torch.as_tensor(v.var), float(v.count)] for k, v in pairs.items()}

    def load_state_dict(self, state: dict) -> None:
        for target, (mean, var, count) in ((self.obs, state["obs"]), (self.returns, state["returns"])):
            target.mean, target.var, target.count = mean.cpu().numpy(), var.cpu().numpy(), count


def moments(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """Mean, variance and number of the rows of x, over all processes."""
    mean, var, size = x.mean(0), x.var(0), dipod.world()[1]
    if size > 1:
        mean, square = dipod.world_mean(torch.as_tensor(np.stack((mean, var + mean**2)))).numpy()
        var = square - mean**2
    return mean, var, size * len(x)


def normalize(advantages: Tensor) -> Tensor:
    """Mean 0 and standard deviation 1 over the minibatches of all processes."""
    if (size := dipod.world()[1]) == 1:
        return (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    centred, count = advantages - dipod.world_mean(advantages.mean()), size * len(advantages)
    return centred / ((dipod.world_mean(centred.square().mean()) * count / (count - 1)).sqrt() + 1e-8)


def gae(rewards, values, next_values, terminated, done, gamma=GAMMA, lam=LAMBDA) -> Tensor:
    """Generalised advantage estimates, all arguments and the result (S, E).

    `next_values` is the value of the observation that the step led to, the episode's last one where it ended:
    truncation is not termination, it bootstraps; either way nothing flows back from the next episode.
    """
    delta = rewards + gamma * next_values * ~terminated - values
    advantages, running = torch.empty_like(delta), torch.zeros_like(delta[0])
    for t in reversed(range(len(delta))):
        running = delta[t] + gamma * lam * ~done[t] * running
        advantages[t] = running
    return advantages


@torch.no_grad()
def rollout(policy, value, envs, obs: np.ndarray, statistics: Statistics, device) -> tuple[dict, np.ndarray, list]:
    """One rollout under fixed statistics: a batch of (B, ...) tensors, the raw last observation, finished returns."""
    keep = {k: [] for k in ("raw", "obs", "noise", "action", "next", "reward", "terminated", "done")}
    act, episodes, action_dim = policy.actor(), [], envs.single_action_space.shape[0]
    for _ in range(ROLLOUT):
        x = statistics.normalize(obs, device)
        noise = torch.randn(len(obs), action_dim, device=device)
        action = act(x, noise)  # unclipped: the environment clips, the loss must not
        next_obs, reward, terminated, truncated, info = envs.step(action.cpu().numpy())
        done, last = terminated | truncated, next_obs
        if done.any():
            last = next_obs.copy()
            last[done] = np.stack(info["final_obs"][done])
            episodes += info["episode"]["r"][done].tolist()
        for name, item in zip(keep, (obs, x, noise, action, last, reward, terminated, done)):
            keep[name].append(item)
        obs = next_obs
    raw, rewards, done = (np.stack(keep[name]) for name in ("raw", "reward", "done"))
    batch = {name: torch.cat(keep[name]) for name in ("obs", "noise", "action")}
    values = value(batch["obs"]).view(done.shape)
    next_values = value(statistics.normalize(np.concatenate(keep["next"]), device)).view(done.shape)
    arrays = statistics.scale(rewards).astype(np.float32), np.stack(keep["terminated"]), done
    rewards_t, terminated_t, done_t = (torch.from_numpy(a).to(device) for a in arrays)
    advantages = gae(rewards_t, values, next_values, terminated_t, done_t)
    batch |= {"advantages": advantages.flatten(), "returns": (advantages + values).flatten()}
    statistics.update(raw, rewards, done)  # from the next rollout on
    return batch, obs, episodes


def drift(policy: FlowPolicy, batch: dict, generator: torch.Generator, samples: int = 512) -> dict[str, float]:
    """Gap, alignment and entropy on on-policy samples, exactly; from the batch before its first update.

    noise_floor is the cosine between the true gradients of two halves of the samples: what sampling noise alone does.
    """
    some = torch.randperm(len(batch["obs"]), generator=generator, device=batch["obs"].device)[:samples]
    obs, noise, action, advantages = (batch[k][some] for k in ("obs", "noise", "action", "advantages"))
    draws, parameters = draw_flow(action, 16, generator), list(policy.parameters())
    log_prob, bound, invertible = policy.nats(obs, noise, action, draws)
    proxy, true = policy(obs, action, draws).mean(1), torch.where(invertible, log_prob, 0.0)
    advantages = (advantages - advantages.mean()) * invertible
    weighted, half, count = advantages * true, len(some) // 2, invertible.sum()
    return {
        "gap": float(((log_prob - bound).detach() * invertible).sum() / count),
        "alignment": float(alignment((advantages * proxy).mean(), weighted.mean(), parameters)),
        "noise_floor": float(alignment(weighted[:half].mean(), weighted[half:].mean(), parameters)),
        "invalid": float(1 - count / len(some)),
        "entropy": float(-true.detach().sum() / count),
    }


def build(method: str, seed: int, args) -> tuple:
    """Everything a run starts from: settings, environments, policy, value function and their optimiser."""
    kind = "gaussian" if method == "ppo" else args.policy
    settings = COMMON | POLICIES[kind] | METHODS[method]
    settings |= {k: v for k in ("lr", "clip", "draws", "epochs", "minibatch") if (v := getattr(args, k)) is not None}
    settings["beta"] = args.beta if args.beta is not None and settings["beta"] else settings["beta"]
    settings["minibatch"] = dipod.share_of("minibatch", settings["minibatch"])
    torch.manual_seed(seed)
    envs = make_envs(args.env, dipod.share_of("--num-envs", args.num_envs))
    if (size := ROLLOUT * envs.num_envs) % settings["minibatch"] == 1 == dipod.world()[1]:  # one has no deviation
        dipod.fail(f"--minibatch: expected not to leave one of {size} samples over, got {settings['minibatch']}")
    obs_dim, action_dim = envs.single_observation_space.shape[0], envs.single_action_space.shape[0]
    settings |= {"method": method, "seed": seed, "env": args.env, "policy": kind, "head": not args.no_head}
    settings |= {"obs_dim": obs_dim, "action_dim": action_dim, "flow_steps": args.flow_steps, "solver": args.solver}
    settings |= {"decay": args.decay, "decay_beta": args.decay_beta, "std_lr": args.std_lr}
    settings |= {"mirror": args.mirror, "flow_scale": args.flow_scale}
    device = dipod.pick_device(args.device)
    policy, value = make_policy(settings).to(device), mlp([obs_dim, 64, 64, 1], 1.0).to(device)
    return settings, envs, policy, value, make_optimizer((policy, value), settings["lr"], args.std_lr)


def make_optimizer(modules: tuple, lr: float, std_lr: float = 1.0) -> torch.optim.Optimizer:
    """AdamW on flat parameters of which the modules' are views: one operation where many small tensors cost many.

    One, unless a Gaussian's log std, the policy's first parameter, is to have a learning rate of its own, std_lr * lr.
    """
    parameters = [p for module in modules for p in module.parameters()]
    sizes = [p.numel() for p in parameters]
    flat = torch.cat([p.detach().flatten() for p in parameters])
    gradients = torch.zeros_like(flat)
    for p, weight, gradient in zip(parameters, flat.split(sizes), gradients.split(sizes)):
        p.data, p.grad = weight.view_as(p), gradient.view_as(p)
    named, groups = modules[0].named_parameters(), []
    std = sum(p.numel() for name, p in named if name.endswith("log_std")) if std_lr != 1 else 0
    for part, rate in ((slice(std), std_lr * lr), (slice(std, None), lr)):
        group = nn.Parameter(flat[part])
        group.grad = gradients[part]
        groups += [{"params": [group], "lr": rate}] if group.numel() else []
    optimizer = torch.optim.AdamW(groups, eps=1e-5, weight_decay=0.0, fused=True)
    optimizer.gradients = gradients.split([sum(p.numel() for p in module.parameters()) for module in modules])
    return optimizer


def step_optimizer(optimizer: torch.optim.Optimizer, loss: Tensor) -> Tensor:
    """One update, each module's gradient clipped by itself; the norms before clipping, for the check on NaN."""
    for gradient in optimizer.gradients:
        gradient.zero_()  # not optimizer.zero_grad(), which would cut the modules' gradients off
    loss.backward()
    norms = torch.stack([gradient.norm() for gradient in optimizer.gradients])
    for gradient, factor in zip(optimizer.gradients, (MAX_GRAD_NORM / (norms + 1e-6)).clamp(max=1.0)):
        gradient.mul_(factor)
    optimizer.step()
    return norms


def update(policy, value, optimizer, batch: dict, settings: dict) -> dict[str, float]:
    """PPO's epochs of minibatches on one rollout; mean of the losses' info over them."""
    obs, action, advantages, returns = (batch[k] for k in ("obs", "action", "advantages", "returns"))
    draws, beta = draw_flow(action, settings["draws"], mirror=settings["mirror"]), settings["beta"]
    apart = settings["fresh"] or settings["flow_only"]  # the regularizer is not on the ratio's ELBO
    with torch.no_grad():
        old_elbo = policy(obs, action, draws)  # (B, N), once per rollout, and the same draws in every epoch
        flow = getattr(policy, "module", policy).whiten(obs, action)  # by the policy that sampled, in every epoch
    infos, norms, columns = [], [], (obs, action, flow, *draws, old_elbo, advantages, returns)
    for _ in range(settings["epochs"]):
        order = torch.randperm(len(obs), device=obs.device)
        for x, a, z, t, eps, old, adv, ret in zip(*(c[order].split(settings["minibatch"]) for c in columns)):
            elbo = policy(x, a, FlowDraws(t, eps))
            if not settings["per_draw"]:
                elbo, old = elbo.mean(1), old.mean(1)
            trust = settings["clip"], settings["trust_region"]
            loss, info = dipod_loss(elbo, old, normalize(adv), 0.0 if apart else beta, *trust)
            if settings["fresh"]:
                loss = loss - beta * fresh_elbo(policy, x, settings)  # [DiPOD]
            elif apart:
                loss = loss - beta * policy(x, z, FlowDraws(t, eps), flow_only=True).mean()  # [DiPOD]
            value_loss = nn.functional.mse_loss(value(x)[:, 0], ret)
            norms.append(step_optimizer(optimizer, loss + value_loss))
            infos.append(torch.stack([info[k] for k in ("elbo", "ratio", "clip_fraction")]))
    check_finite(norms)
    return dict(zip(("elbo", "ratio", "clip_fraction"), dipod.world_mean(torch.stack(infos).mean(0)).tolist()))


def check_finite(norms: list[Tensor]) -> None:
    """Raises FloatingPointError if a gradient norm is NaN or infinite."""
    if not bool(torch.stack(norms).isfinite().all()):  # once per rollout: the update loop itself never waits for a GPU
        raise FloatingPointError("non-finite gradient")


def fresh_elbo(policy, obs: Tensor, settings: dict) -> Tensor:
    """Mean ELBO of actions that the policy (or its DistributedDataParallel) samples now: on policy at every update."""
    with torch.no_grad():
        noise = torch.randn(len(obs), settings["action_dim"], device=obs.device)
        action = getattr(policy, "module", policy).act(obs, noise)
    return policy(obs, action, draw_flow(action, settings["draws"], mirror=settings["mirror"])).mean()


def self_distill(policy, optimizer, obs: Tensor, settings: dict, updates: int) -> None:
    """Algorithm 1's other half: maximise the ELBO of freshly sampled actions. [DiPOD]"""
    norms = []
    for _ in range(updates):
        x = obs[torch.randint(len(obs), (settings["minibatch"],), device=obs.device)]
        norms.append(step_optimizer(optimizer, -fresh_elbo(policy, x, settings)))
    check_finite(norms)


def train(method: str, seed: int, args) -> list[dict]:
    """One run; its rows of metrics.csv. Resumes from the run's checkpoint if args.resume (episodes start anew)."""
    settings, envs, policy, value, optimizer = build(method, seed, args)
    device, started, wall, rows, start = next(value.parameters()).device, monotonic(), 0.0, [], 0
    rank, nets = dipod.world()[0], (dipod.parallel(policy), dipod.parallel(value))
    size = ROLLOUT * args.num_envs
    iterations, episodes = max(2, math.ceil(args.steps / size)), []
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0 if args.decay else 1.0, iterations)
    statistics = Statistics(settings["obs_dim"], envs.num_envs)
    watch = torch.Generator(device).manual_seed(seed)  # diagnostics draw from their own
    path = dipod.checkpoint_path(args.out, method, seed)
    if rank > 0:  # other noise than rank 0's, from the same weights
        torch.manual_seed(seed + 1000 * rank)
    parts = {"policy": policy, "value": value, "optimizer": optimizer, "decay": decay, "statistics": statistics}
    if args.resume and path.exists():
        state = dipod.restore(path, settings, parts, watch, device)
        start, rows, wall = state["iteration"], state["rows"], state["wall"]
    obs, _ = envs.reset(seed=1000 * seed + start + rank * envs.num_envs)
    every = max(1, iterations // args.rows)
    for iteration in range(start, iterations):
        batch, obs, finished = rollout(policy, value, envs, obs, statistics, device)
        episodes += finished
        try:
            if iteration == 0:  # the first rollout fills the statistics: what the networks see would change under them
                if settings["first"]:
                    self_distill(nets[0], optimizer, batch["obs"], settings, settings["first"])
                continue
            due = iteration == iterations - 1 or iteration % every == 0
            measured = dict.fromkeys(("gap", "alignment", "noise_floor", "invalid", "entropy"), math.nan)
            if due and method != "ppo" and not args.no_drift:
                measured |= drift(policy, batch, watch)
            left = 1 - iteration / iterations if args.decay_beta else 1.0
            info = update(*nets, optimizer, batch, settings | {"beta": settings["beta"] * left})
            if settings["every"] and iteration % settings["every"] == 0:
                self_distill(nets[0], optimizer, batch["obs"], settings, settings["distill"])
            decay.step()
        except FloatingPointError as e:
            raise FloatingPointError(f"{method} seed {seed} step {(iteration + 1) * size}: {e}; stopped") from None
        if due:
            now = wall + monotonic() - started
            row = {"method": method, "seed": seed, "step": (iteration + 1) * size, "wall": now} | measured | info
            total, count = dipod.world_mean(torch.tensor([sum(episodes), len(episodes)], dtype=torch.float64)).tolist()
            row["return"], episodes = total / count if count else math.nan, []
            rows.append({k: row[k] for k in COLUMNS})
            state = {"settings": settings, "iteration": iteration + 1, "rows": rows, "wall": now}
            state |= dipod.snapshot(parts, watch) | {"skipped": start / iterations}
            dipod.report(args, rows[-1], state, started, (iteration + 1) / iterations)
    envs.close()
    return rows


def load_policy(path) -> tuple[nn.Module, Statistics, dict]:
    """A checkpoint's policy, its observation statistics and its settings."""
    state = dipod.load_checkpoint(path)
    settings = state["settings"] if "policy" in state else dipod.fail(f"{path}: not a checkpoint of control_task.py")
    policy, statistics = make_policy(settings), Statistics(settings["obs_dim"], 1)
    policy.load_state_dict(state["policy"])
    statistics.load_state_dict(state["statistics"])
    return policy, statistics, settings


@torch.no_grad()
def evaluate(path, episodes: int = 20) -> dict[str, np.ndarray]:
    """Returns of `episodes` whole episodes with the policy's noise, and of as many with zero noise."""
    policy, statistics, settings = load_policy(path)
    results, generator = {}, torch.Generator().manual_seed(0)
    for name, scale in (("stochastic", 1.0), ("zero noise", 0.0)):
        envs = make_envs(settings["env"], episodes)
        obs, _ = envs.reset(seed=10**6)
        returns = np.full(episodes, np.nan)
        while np.isnan(returns).any():
            noise = scale * torch.randn(episodes, settings["action_dim"], generator=generator)
            obs, _, terminated, truncated, info = envs.step(policy.act(statistics.normalize(obs, "cpu"), noise).numpy())
            # an environment's first episode alone counts, or short episodes would count more often
            first = (terminated | truncated) & np.isnan(returns)
            returns[first] = info["episode"]["r"][first] if first.any() else 0
        results[name] = returns
        print(f"{settings['method']} on {settings['env']}, {episodes} episodes, {name}: ", end="")
        print(f"return {returns.mean():.1f} +- {returns.std():.1f} [{returns.min():.1f}..{returns.max():.1f}]")
        envs.close()
    return results


@torch.no_grad()
def render(path, file: str) -> None:
    """An episode of a trained policy as an animated GIF."""
    import imageio
    import mujoco

    policy, statistics, settings = load_policy(path)
    try:
        env = gym.make(settings["env"], render_mode="rgb_array")
        obs, _ = env.reset(seed=0)
        frames, done = [env.render()], False
    except (gym.error.Error, ImportError, AttributeError, RuntimeError, TypeError, mujoco.FatalError) as e:
        dipod.fail(f"--render: no picture from {settings['env']} ({e}); without a screen, set MUJOCO_GL=egl or osmesa")
    low, high, generator = env.action_space.low, env.action_space.high, torch.Generator().manual_seed(0)
    while not done:
        noise = torch.randn(1, settings["action_dim"], generator=generator)
        action = policy.act(statistics.normalize(obs[None], "cpu"), noise)[0].clamp(-1, 1).numpy()
        obs, _, terminated, truncated, _ = env.step(low + (action + 1) / 2 * (high - low))
        frames.append(env.render())
        done = terminated or truncated
    try:
        imageio.mimsave(file, frames[:300], duration=1000 / env.metadata["render_fps"], loop=0)
    except (OSError, ValueError) as e:
        dipod.fail(f"--render {file}: cannot write there ({e})")
    print(f"written: {file} ({len(frames[:300])} frames)")


@torch.no_grad()
def draw_actions(paths: list, file: str, count: int = 20_000) -> None:
    """Histograms of each policy's first action dimension at its environment's first observation."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(3.4, 2.9), layout="constrained")
    for path in paths:
        policy, statistics, settings = load_policy(path)
        envs, generator = make_envs(settings["env"], 1), torch.Generator().manual_seed(0)
        obs = statistics.normalize(envs.reset(seed=10**6)[0], "cpu").expand(count, -1)
        action = policy.act(obs, torch.randn(count, settings["action_dim"], generator=generator))[:, 0]
        style = {"histtype": "step", "linewidth": 2, "color": dipod.COLORS[settings["method"]]}
        axis.hist(action.clamp(-1, 1), np.linspace(-1, 1, 51), density=True, label=settings["method"], **style)
        envs.close()
    axis.set(xlabel="action, first dimension", ylabel="density", title=settings["env"])
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    dipod.save_figure(figure, file)
    print(f"written: {file}")


def benchmark(args, rollouts: int = 15) -> None:
    """Env steps per second: bare environment, sampling, update, end to end; medians, for other work disturbs."""
    import resource

    torch.set_num_threads(1)
    for method in args.methods:
        settings, envs, policy, value, optimizer = build(method, 0, args)
        device, statistics = next(value.parameters()).device, Statistics(settings["obs_dim"], args.num_envs)
        obs, _ = envs.reset(seed=0)
        bare, size = envs.unwrapped, ROLLOUT * args.num_envs
        actions = [bare.action_space.sample() for _ in range(ROLLOUT)]
        seconds = {name: [] for name in ("bare environment", "sampling", "update", "end to end")}
        for i in range(rollouts + 1):  # the first one warms up
            t = [monotonic()]
            for action in actions:
                bare.step(action)
            t.append(monotonic())
            with torch.no_grad():
                x, act = statistics.normalize(obs, device), policy.actor()
                for _ in range(ROLLOUT):
                    act(x, torch.randn(args.num_envs, settings["action_dim"], device=device))
            t.append(monotonic())
            batch, obs, _ = rollout(policy, value, envs, obs, statistics, device)
            t.append(monotonic())
            update(policy, value, optimizer, batch, settings)
            t.append(monotonic())
            if i:
                for name, s in zip(seconds, (t[1] - t[0], t[2] - t[1], t[4] - t[3], t[4] - t[2])):
                    seconds[name].append(s)
        print(f"{method} on {args.env}, {args.num_envs} environments, 1 thread, {device}")
        speed = {name: size / float(np.median(s)) for name, s in seconds.items()}
        for name, s in speed.items():
            print(f"  {name:<17} {s:8.0f} env steps/s")
        print(f"  end to end / bare environment: {speed['end to end'] / speed['bare environment']:.2f}")
        print(f"  peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")


def main() -> None:
    """The command line."""
    parser = dipod.task_parser(__doc__, METHODS, ["fpo", "dipod", "ppo"], 200_000, "environment steps", "runs/control")
    add, at_least, own = parser.add_argument, dipod.at_least, "default: the policy's own"
    add("--env", default="Reacher-v5", help="gymnasium environment, Box observations and bounded Box actions")
    add("--policy", choices=("linear", "whitened"), default="whitened", help="the flow of all but ppo")
    add("--no-head", action="store_true", help="whitened without the Gaussian head: mean 0, std 1")
    add("--num-envs", type=at_least(1), default=16, help="environments stepped together")
    add("--flow-steps", type=at_least(1), default=5, help="solver steps of a sample")
    add("--solver", choices=("midpoint", "euler"), default="midpoint", help="2 or 1 network calls a step")
    add("--draws", type=at_least(1), help=f"(time, noise) draws of an action; {own}")
    add("--epochs", type=at_least(1), help=f"passes over each rollout; {own}")
    add("--minibatch", type=at_least(2), help=f"samples of an update; {own}")
    add("--mirror", action="store_true", help="mirror the draws' times, t and 1-t: a ratio with less noise")
    add("--flow-scale", type=at_least(0, float), help=f"factor of the flow's output, 0: none, a Gaussian; {own}")
    add("--std-lr", type=at_least(0, float), default=1.0, help="learning rate of the Gaussian's log std, times --lr")
    add("--eval", nargs="+", metavar="CHECKPOINT", help="evaluate trained policies and leave")
    add("--render", metavar="FILE.gif", help="with --eval: also an episode of the first one as a GIF")
    add("--actions", metavar="FILE.png", help="with --eval: also histograms of their actions")
    add("--benchmark", action="store_true", help="measure speed and leave")
    args = parser.parse_args()
    if (args.render or args.actions) and not args.eval:
        parser.error("--render and --actions need --eval CHECKPOINT")
    if args.eval:
        for path in args.eval:
            evaluate(path)
        if args.render:
            render(args.eval[0], args.render)
        return draw_actions(args.eval, args.actions) if args.actions else None
    make_envs(args.env, 1).close()  # a wrong name ends here, in one line, before any process starts
    dipod.join_world(dipod.pick_device(args.device))
    if args.benchmark:
        return benchmark(args)
    methods = ", ".join(args.methods)
    print(f"{args.env}, {args.policy} flow, {args.steps} steps, methods {methods}, {args.seeds} seed(s)")
    dipod.finish(dipod.launch(train, args, COLUMNS), args, "return", PANELS, args.env)


if __name__ == "__main__":
    main()
