"""Judges: the contract, a user's own function, the shipped ones, and the panel that asks them."""

from dancegrpo.rewards.base import FunctionReward, Reward, Scores
from dancegrpo.rewards.catalog import CATALOG
from dancegrpo.rewards.compose import Binary, OverFrames
from dancegrpo.rewards.loading import IN_PYTHON, load_judges, load_reward
from dancegrpo.rewards.panel import MIN_VALID_FRACTION, Judges
from dancegrpo.rewards.placement import Placed, load_placed

__all__ = [
    "CATALOG",
    "IN_PYTHON",
    "MIN_VALID_FRACTION",
    "Binary",
    "FunctionReward",
    "Judges",
    "OverFrames",
    "Placed",
    "Reward",
    "Scores",
    "load_judges",
    "load_placed",
    "load_reward",
]
