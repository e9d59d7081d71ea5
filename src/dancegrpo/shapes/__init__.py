"""The miniature world: captioned drawings and clips, judges that are never wrong about them, and base pipelines."""

from __future__ import annotations

from pathlib import Path

DRAWN = ("shapes-flux", "shapes-sd")
FILMED = ("shapes-video", "shapes-i2v")
PIPELINES = (*DRAWN, *FILMED)
"""Names of the diffusers pipelines that ship inside the package: those that draw, and those that film."""

JUDGES = ("shapes-clip", "shapes-hps", "shapes-pickscore")
"""Names of the learned judges that ship inside the package."""


def base_path(name: str) -> Path:
    """The folder of a shipped pipeline, ready for `DiffusionPipeline.from_pretrained`.

    Raises ModelError when the name is unknown or the folder is missing from the installation.
    """
    from importlib.resources import files

    from dancegrpo.errors import ModelError

    if name not in PIPELINES:
        raise ModelError(f"unknown built-in pipeline {name!r}: choose one of {', '.join(PIPELINES)}.")
    folder = Path(str(files(__package__))) / "weights" / name
    if not (folder / "model_index.json").is_file():
        raise ModelError(
            f"{folder} holds no pipeline: reinstall, or run `python -m dancegrpo.shapes.build --out {folder.parent}`."
        )
    return folder


def judge_path(name: str) -> Path:
    """The folder of a shipped judge, ready for the class that loads the published one.

    Raises ModelError when the name is unknown or the folder is missing from the installation.
    """
    from importlib.resources import files

    from dancegrpo.errors import ModelError

    if name not in JUDGES:
        raise ModelError(f"unknown built-in judge {name!r}: choose one of {', '.join(JUDGES)}.")
    folder = Path(str(files(__package__))) / "weights" / "judges" / name
    if not (folder / "tokenizer_config.json").is_file():
        remedy = f"reinstall, or run `python -m dancegrpo.shapes.judge_build --out {folder.parent}`"
        raise ModelError(f"{folder} holds no judge: {remedy}.")
    return folder
