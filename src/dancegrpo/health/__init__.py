"""What an iteration says of itself, what is wrong with a run in plain words, and when to skip, go back or stop."""

from dancegrpo.health.alarms import Alarm, Monitor, alarms_of
from dancegrpo.health.guard import Decision, Guard
from dancegrpo.health.metrics import (
    Clock,
    Looks,
    log_prob_rounding,
    peak_memory_mb,
    restart_peak,
    reward_metrics,
    use_threads,
)

__all__ = [
    "Alarm",
    "Clock",
    "Decision",
    "Guard",
    "Looks",
    "Monitor",
    "alarms_of",
    "log_prob_rounding",
    "peak_memory_mb",
    "restart_peak",
    "reward_metrics",
    "use_threads",
]
