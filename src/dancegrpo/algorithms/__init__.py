"""Algorithms: which batch to collect, which loss on it. One short file each."""

from dancegrpo.algorithms.base import Advantage, Algorithm, Pairs
from dancegrpo.algorithms.grpo import GRPO
from dancegrpo.config import RunConfig

__all__ = ["GRPO", "Advantage", "Algorithm", "Pairs", "build_algorithm"]


def build_algorithm(config: RunConfig) -> Algorithm:
    """The algorithm that `config.algorithm.name` names."""
    return {"grpo": GRPO}[config.algorithm.name](config)
