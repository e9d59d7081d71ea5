"""People as judges: a page in the browser, votes in a file."""

from dancegrpo.rewards.human.judge import HumanReward
from dancegrpo.rewards.human.votes import fingerprint, group_key

__all__ = ["HumanReward", "fingerprint", "group_key"]
