"""Algorithms: which batch to collect, which loss on it. One short file each."""

from collections.abc import Callable

from dancegrpo.algorithms.base import Advantage, Algorithm, Learning, Workload
from dancegrpo.algorithms.ddpo import DDPO
from dancegrpo.algorithms.dpo import DPO
from dancegrpo.algorithms.dpok import DPOK
from dancegrpo.algorithms.grpo import GRPO
from dancegrpo.algorithms.nft import NFT
from dancegrpo.algorithms.policy_gradient import Pairs, PolicyGradient, gather
from dancegrpo.algorithms.refl import ReFL
from dancegrpo.algorithms.work import Part
from dancegrpo.config import RunConfig
from dancegrpo.distributed import ALONE, World
from dancegrpo.rewards import Judges

__all__ = [
    "DDPO",
    "DPO",
    "DPOK",
    "GRPO",
    "NFT",
    "Advantage",
    "Algorithm",
    "Learning",
    "Pairs",
    "Part",
    "PolicyGradient",
    "ReFL",
    "Workload",
    "build_algorithm",
    "gather",
]


def build_algorithm(config: RunConfig, judges: Judges, world: World = ALONE) -> Algorithm:
    """The algorithm that `config.algorithm.name` names. Raises ConfigError where it does not fit the judges."""
    if config.algorithm.name == "refl":
        return ReFL(config, judges, world)
    others: dict[str, Callable[[RunConfig, World], Algorithm]] = {
        "grpo": GRPO,
        "ddpo": DDPO,
        "dpok": DPOK,
        "dpo": DPO,
        "nft": NFT,
    }
    return others[config.algorithm.name](config, world)
