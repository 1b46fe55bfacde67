"""DiPOD in Stable-Baselines3: PPO with a flow policy on Reacher-v5.

Return -60.9 -> -9.6 with beta 0.3, -60.9 -> -9.3 with beta 0: no better in so short a run. 13 s and
11 s on one CPU core.
"""

import sys
from pathlib import Path
from statistics import mean

import torch
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.vec_env import VecNormalize

sys.path += map(str, Path(__file__).resolve().parents[:3])  # this folder, and dipod.py's
from compare import compare

from dipod import FlowDraws, FlowPolicy, dipod_loss, draw_flow


class FlowActorCritic(ActorCriticPolicy):  # no log-probability: see `DiPOD.train`
    def _build(self, lr_schedule):
        super()._build(lr_schedule)  # the critic is SB3's
        sizes = *self.observation_space.shape, *self.action_space.shape
        self.actor = FlowPolicy(*sizes)
        self.optimizer = torch.optim.Adam(self.parameters(), lr_schedule(1), eps=1e-5)

    def _predict(self, obs, deterministic=False):
        noise = torch.randn(len(obs), *self.action_space.shape)
        return self.actor.sample(obs, 0 * noise if deterministic else noise)

    def forward(self, obs, deterministic=False):
        return self._predict(obs, deterministic), self.predict_values(obs), torch.zeros(len(obs))


class DiPOD(PPO):
    def train(self):
        actor, batch = self.policy.actor, next(self.rollout_buffer.get())
        obs, action = batch.observations.float(), batch.actions  # as sampled: SB3 clips a copy
        advantages = (batch.advantages - batch.advantages.mean()) / batch.advantages.std()
        draws = draw_flow(action, num_draws=2)  # once: the same for old and new
        with torch.no_grad():
            old = actor.elbo(obs, action, draws).mean(1)
            z = actor.standardize(obs, action)  # the flow's part of the action
        for step in range(self.n_epochs * len(obs) // self.batch_size):
            i = torch.randperm(len(obs))[: self.batch_size]
            some = FlowDraws(draws.time[i], draws.noise[i])
            elbo = actor.elbo(obs[i], action[i], some).mean(1)
            latent = actor.latent_elbo(obs[i], z[i], some)  # the head has no gap
            loss, info = dipod_loss(elbo, old[i], advantages[i], self.beta, distill_elbo=latent)
            assert step > 0 or info["ratio"] == 1
            error = self.policy.predict_values(obs[i])[:, 0] - batch.returns[i]
            self.policy.optimizer.zero_grad()
            (loss + error.square().mean()).backward()
            torch.nn.utils.clip_grad_norm_(self.policy.parameters(), self.max_grad_norm)
            self.policy.optimizer.step()


def train(beta, updates):
    envs = VecNormalize(make_vec_env("Reacher-v5", n_envs=16, seed=0))
    algorithm = DiPOD(FlowActorCritic, envs, 2e-3, 128, 256, 5, seed=0, stats_window_size=10**6)
    algorithm.beta = beta
    algorithm.learn(updates * 16 * 128)
    returns = [episode["r"] for episode in algorithm.ep_info_buffer]
    return mean(returns[:100]), mean(returns[-100:])


if __name__ == "__main__":
    compare(train, updates=40, beta=0.3)
