"""Parts of a checkpoint that must fit each other: a mixed-up folder is one clear line, not a shape error in a layer."""

from __future__ import annotations

from pathlib import Path

from dancegrpo.errors import ModelError


def require_text_width(folder: Path, encoders: str, gives: int, denoiser: str, reads: int) -> None:
    """Raises ModelError unless what the text `encoders` give is as wide as what the `denoiser` reads, in channels."""
    if gives != reads:
        raise ModelError(
            f"the {encoders} of {folder} gives {gives} channels, its {denoiser} reads {reads}: "
            "use the text encoders that the model was trained with."
        )
