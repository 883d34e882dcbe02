"""Advantages: generalised advantage estimation over chunks, and the running scale of rewards."""

from __future__ import annotations

import numpy as np


def gae(
    reward: np.ndarray,
    value: np.ndarray,
    next_value: np.ndarray,
    discount: np.ndarray,
    terminated: np.ndarray,
    truncated: np.ndarray,
    gae_lambda: float,
) -> np.ndarray:
    """Advantages ``[S, N]`` (Schulman et al. 2016, arXiv 1506.02438), one step being one chunk.

    ``delta = r + discount (1 - terminated) V(next) - V`` and ``A = delta + discount lambda (1 - cut) A'`` with
    ``cut = terminated or truncated``: a time-out is worth what its last observation is worth, and nothing
    flows from one episode into another.

    Args:
        reward: ``[S, N]``. value: ``V`` of the observation acted on. next_value: ``V`` of what the chunk led to (``final_obs``,
            never the first observation of the next episode). discount: Of ``next_value``.
        terminated: The episode ended by itself. truncated: It was cut off. gae_lambda: 0: one step, 1: to the end.
    """
    delta = reward + discount * ~terminated * next_value - value
    cut = terminated | truncated
    advantage = np.zeros_like(delta)
    ahead = np.zeros_like(delta[0])
    for s in reversed(range(len(delta))):
        ahead = delta[s] + discount[s] * gae_lambda * ~cut[s] * ahead
        advantage[s] = ahead
    return advantage


class RewardScale:
    """Divides rewards by the running standard deviation of the discounted return, and clips them (as DPPO, ReinFlow and gym's
    NormalizeReward do). Without it the value network's learning rate would have to fit every task anew."""

    CLIP = 10.0

    def __init__(self, num_envs: int) -> None:
        self.returns: np.ndarray = np.zeros(num_envs)  # discounted, of the present episodes
        self.moments: np.ndarray = np.array([1e-4, 0.0, 1.0])  # count, mean, variance

    def __call__(self, reward: np.ndarray, discount: np.ndarray, ended: np.ndarray) -> np.ndarray:
        """Take in the rewards ``[N]`` of one chunk and return them scaled."""
        self.returns = self.returns * discount + reward
        count, mean, variance = self.moments
        new, delta = len(self.returns), self.returns.mean() - mean
        total = count + new
        squares = variance * count + self.returns.var() * new + delta**2 * count * new / total
        self.moments = np.array([total, mean + delta * new / total, squares / total])
        self.returns = np.where(ended, 0.0, self.returns)
        scaled: np.ndarray = np.clip(reward / np.sqrt(self.moments[2] + 1e-8), -self.CLIP, self.CLIP)
        return scaled

    def state(self) -> dict[str, np.ndarray]:
        return {"returns": self.returns, "moments": self.moments}

    def restore(self, state: dict[str, np.ndarray]) -> None:
        self.returns, self.moments = np.array(state["returns"]), np.array(state["moments"])
