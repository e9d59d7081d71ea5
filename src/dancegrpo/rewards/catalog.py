"""The judges that come with the package: what each measures, what it needs, and where its class lives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Entry:
    """One shipped judge.

    target: `module:class`. takes: pictures, clips, or either. measures: one line. weights: hub files it fetches where
    the recipe gives no paths, (repository, file); file None = the whole repository. extra: the dependency group it
    needs (`pip install dancegrpo[extra]`).
    """

    target: str
    takes: Literal["pictures", "clips", "either"]
    measures: str
    weights: tuple[tuple[str, str | None], ...] = ()
    extra: str | None = None


CATALOG: dict[str, Entry] = {
    "hps": Entry(
        "dancegrpo.rewards.hps:HPSReward",
        "pictures",
        "HPS-v2.1: which picture people prefer for a prompt",
        (("xswu/HPSv2", "HPS_v2.1_compressed.pt"), ("openai/clip-vit-large-patch14", "tokenizer.json")),
    ),
    "shapes": Entry(
        "dancegrpo.rewards.shapes:ShapesReward",
        "pictures",
        "whether a drawing of the shapes world shows what its caption says, by rules",
    ),
}
"""Name in a recipe -> the judge."""
