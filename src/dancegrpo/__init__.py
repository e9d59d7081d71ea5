"""Reinforcement learning for visual generation: DanceGRPO (arXiv:2505.07818) for diffusion and rectified-flow models.

import dancegrpo

run = dancegrpo.train("shapes-flux", overrides=["iterations=20"])
print(run.report)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dancegrpo.config import load_config
    from dancegrpo.policies import load_policy
    from dancegrpo.rewards import Reward
    from dancegrpo.sampling import rollout
    from dancegrpo.trainer import train

__version__ = "0.1.0"
__all__ = ["Reward", "load_config", "load_policy", "rollout", "train"]

_HOMES = {
    "Reward": "dancegrpo.rewards",
    "load_config": "dancegrpo.config",
    "load_policy": "dancegrpo.policies",
    "rollout": "dancegrpo.sampling",
    "train": "dancegrpo.trainer",
}


def __getattr__(name: str) -> Any:
    """Loads torch and diffusers only when something that needs them is asked for."""
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
