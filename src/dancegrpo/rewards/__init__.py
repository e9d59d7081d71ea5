"""Judges: the contract, a user's own function, the shipped ones, and the panel that asks them."""

from dancegrpo.rewards.base import FunctionReward, Reward, Scores
from dancegrpo.rewards.loading import IN_PYTHON, SHIPPED, load_judges, load_reward
from dancegrpo.rewards.panel import MIN_VALID_FRACTION, Judges

__all__ = [
    "IN_PYTHON",
    "MIN_VALID_FRACTION",
    "SHIPPED",
    "FunctionReward",
    "Judges",
    "Reward",
    "Scores",
    "load_judges",
    "load_reward",
]
