"""DiPOD in rsl_rl: its PPO with a flow policy, on a point mass that has to come to rest.

Return -67.3 -> -5.7 with beta 0.3 and with beta 0: no better. 7 s each on one core.
"""

import sys
from pathlib import Path

import torch
from rsl_rl.algorithms import PPO
from rsl_rl.models import MLPModel
from rsl_rl.runners import OnPolicyRunner

sys.path += map(str, Path(__file__).resolve().parents[:3])  # this folder, and dipod.py's
from compare import compare
from point_mass import CONFIG, PointMass

from dipod import FlowDraws, FlowPolicy, dipod_loss, draw_flow


class FlowActor(MLPModel):  # rsl_rl's actor with a flow policy in place of its MLP
    output_std, output_distribution_params = torch.ones(1), None  # the first is only logged

    def __init__(self, obs, obs_groups, obs_set, num_actions):
        super().__init__(obs, obs_groups, obs_set, num_actions)
        self.mlp = FlowPolicy(self.obs_dim, num_actions)

    def forward(self, obs, stochastic_output=False):
        x = self.get_latent(obs)
        noise = stochastic_output * torch.randn(len(x), *self.mlp.log_std.shape)
        action = self.mlp.sample(x, noise)
        draws = draw_flow(action, num_draws=2)  # PPO.act stores them: the same for old and new
        self.old_elbo = self.mlp.elbo(x, action, draws).mean(1)
        self.output_distribution_params = (*draws, self.mlp.standardize(x, action))
        return action

    def get_output_log_prob(self, actions):
        return self.old_elbo  # of the actions of the last `forward`


class DiPOD(PPO):  # no entropy bonus, no adaptive rate: both need a distribution
    def update(self):
        batches = self.storage.mini_batch_generator(self.num_mini_batches, self.num_learning_epochs)
        for step, batch in enumerate(batches):
            obs, old = self.actor.get_latent(batch.observations), batch.old_actions_log_prob[:, 0]
            time, noise, z = batch.old_distribution_params
            elbo = self.actor.mlp.elbo(obs, batch.actions, FlowDraws(time, noise)).mean(1)
            latent = self.actor.mlp.latent_elbo(obs, z, FlowDraws(time, noise))  # no head
            a = batch.advantages[:, 0]
            loss, info = dipod_loss(elbo, old, a, self.beta, self.clip_param, distill_elbo=latent)
            assert step > 0 or info["ratio"] == 1
            value_loss = (self.critic(batch.observations) - batch.returns).square().mean()
            self.optimizer.zero_grad()
            (loss + value_loss).backward()
            torch.nn.utils.clip_grad_norm_(self.actor.parameters(), self.max_grad_norm)
            self.optimizer.step()
        self.storage.clear()
        return {"surrogate": info["policy_loss"], "value": value_loss.detach()}


def train(beta, updates):
    config = {**CONFIG, "actor": {"class_name": FlowActor}, "algorithm": {"class_name": DiPOD}}
    runner = OnPolicyRunner(PointMass(), config)
    runner.alg.beta = beta
    runner.learn(updates)
    return runner.env.returns[0], runner.env.returns[-1]


if __name__ == "__main__":
    compare(train, updates=60, beta=0.3)
