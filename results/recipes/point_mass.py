"""The made-up task of the rsl_rl recipe: a force in two dimensions brings a point to the origin."""

import torch
from rsl_rl.env import VecEnv
from tensordict import TensorDict

CONFIG = {
    "num_steps_per_env": 32,
    "obs_groups": {"actor": ["policy"], "critic": ["policy"]},
    "critic": {"class_name": "MLPModel", "hidden_dims": [64, 64]},
}


class PointMass(VecEnv):
    """64 points. The reward is minus the distance; `returns` has the mean one of each episode."""

    num_envs, num_actions, max_episode_length, device, cfg = 64, 2, 64, "cpu", {}

    def __init__(self):
        self.returns = []
        self.restart()

    def restart(self):
        self.position = torch.rand(64, 2) * 2 - 1
        self.speed = torch.zeros(64, 2)
        self.total = torch.zeros(64)
        self.episode_length_buf = torch.zeros(64, dtype=torch.long)

    def get_observations(self):
        state = torch.cat((self.position, 10 * self.speed), 1)
        return TensorDict({"policy": state}, batch_size=64)

    def step(self, actions):
        self.speed = 0.9 * self.speed + 0.02 * actions.clamp(-1, 1)
        self.position = self.position + self.speed
        reward = -self.position.norm(dim=1)
        self.total = self.total + reward
        self.episode_length_buf = self.episode_length_buf + 1
        done = self.episode_length_buf == self.max_episode_length
        if done.all():
            self.returns.append(self.total.mean().item())
            self.restart()
        return self.get_observations(), reward, done, {"time_outs": done}
