"""The errors a user can cause. Each message is one line: the value, the rule, the remedy."""

from dancegrpo.redaction import redact


class DanceError(Exception):
    """Base of every error that is the user's to mend; the command line prints it as one line and exits with 2.

    Messages hold no secrets: they go through `redact`.
    """

    def __init__(self, *words: object) -> None:
        super().__init__(*(redact(word) if isinstance(word, str) else word for word in words))


class ConfigError(DanceError):
    """A recipe, an override or a combination of settings that cannot run."""


class PromptError(DanceError):
    """A prompt file that is missing, empty or malformed (the message names the line)."""


class ModelError(DanceError):
    """A model folder that is missing, half-written, or of a class that no policy covers."""


class RewardError(DanceError):
    """A judge that cannot be loaded, or that failed on too many samples for the run to go on."""


class DeadJudgeError(RewardError):
    """Judges left too many samples of an iteration without a score: nothing may be learnt of it."""


class MediaError(DanceError):
    """A picture or clip that is missing, damaged, or no picture or clip at all."""


class CheckpointError(DanceError):
    """A run folder or checkpoint that cannot be written, read or resumed."""


class RankError(DanceError):
    """Another process of the run that is gone, hangs, failed or never came."""


class OutOfMemoryError(DanceError):
    """Memory that does not suffice; the message names the phase and the settings that help."""
