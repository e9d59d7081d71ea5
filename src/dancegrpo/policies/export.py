"""What an export is made of besides weights: the model card, and a folder that appears whole or not at all."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Task = Literal["text-to-image", "text-to-video", "image-to-video"]
"""What a pipeline does, in the hub's words."""


@dataclass(frozen=True)
class ModelCard:
    """What a run tells the people who use its weights."""

    base_model: str
    """The pipeline it was trained from: a shipped name, a folder or a hub id."""
    recipe: str
    iterations: int
    judges: tuple[str, ...]
    """The judges it was trained on, as a reader should see them."""
    notes: str = ""
    """Markdown that follows: measured results, licence, limits."""


@dataclass(frozen=True)
class Usage:
    """How diffusers samples the weights the way they were trained: what the card's example says."""

    scheduler: str
    """Class of the scheduler to set; empty where the pipeline's own is the right one."""
    construct: str
    """What follows the class's name to make one: `(shift=3.0)`."""
    arguments: Mapping[str, object]
    """Keyword arguments of the pipeline call: plain values."""
    absent: tuple[str, ...] = ()
    """Parts that a whole pipeline does without, which `from_pretrained` must be told."""
    setup: tuple[str, ...] = ()
    """Further lines of Python that prepare `pipe`, after its weights and scheduler."""
    fps: float = 8
    """Frames per second at which a clip plays."""


def plain(text: str) -> str:
    """Words from a run as one line of Markdown that can be neither markup nor HTML."""
    line = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"([\\`*\[\]|])", r"\\\1", line)


def code(text: str) -> str:
    """Words from a run as one line of code within Markdown, where nothing but a backtick ends them."""
    return f"`{' '.join(text.split()).replace('`', chr(39))}`"


def card_text(card: ModelCard, task: Task, usage: Usage, *, lora: bool) -> str:
    """The README.md of an export: front matter for the hub, what it is, and an example that runs."""
    from dancegrpo.shapes import PIPELINES

    shipped = card.base_model in PIPELINES
    kind = "LoRA weights for" if lora else "A complete diffusers pipeline, fine-tuned from"
    front = ["---", "library_name: diffusers", f"pipeline_tag: {task}"]
    # The hub knows ids of its own only.
    if not shipped and not Path(card.base_model).exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", card.base_model):
        front += [f"base_model: {card.base_model}"]
    front += ["tags:", "- dancegrpo", "- reinforcement-learning", *["- lora"] * lora, "---", ""]
    body = [
        f"# {plain(card.recipe)}",
        "",
        f"{kind} {code(card.base_model)}, trained by reinforcement learning with [DanceGRPO](https://arxiv.org/abs/2505.07818).",
        "",
        f"- Recipe: {code(card.recipe)}, {card.iterations} iterations",
        f"- Trained on the judges: {', '.join(map(plain, card.judges)) or 'none'}",
        "- The base model's licence applies; a safety checker of the base model is not part of this export.",
        "",
        "## Use",
        "",
        *["To write the clip: `pip install imageio imageio-ffmpeg`", ""] * (task != "text-to-image"),
        "```python",
        *_example(card, task, usage, shipped=shipped, lora=lora),
        "```",
        "",
        "These are the settings it was trained and measured with; others work less well.",
    ]
    return "\n".join(front + body + (["", card.notes] if card.notes else [])) + "\n"


def _example(card: ModelCard, task: Task, usage: Usage, *, shipped: bool, lora: bool) -> list[str]:
    """Lines of Python that load the weights and make one picture or clip the way the run did."""
    names = sorted({"DiffusionPipeline", usage.scheduler} - {""})
    lines = [f"from diffusers import {', '.join(names)}"]
    if task != "text-to-image":
        names = ["export_to_video", *["load_image"] * (task == "image-to-video")]
        lines += [f"from diffusers.utils import {', '.join(names)}"]
    if lora:
        name = json.dumps(card.base_model)
        base = f"base_path({name})" if shipped else name
        lines = ["from dancegrpo.shapes import base_path"] * shipped + lines
        without = "".join(f", {part}=None" for part in usage.absent)
        lines += ["", f"pipe = DiffusionPipeline.from_pretrained({base}{without})"]
        lines += ['pipe.load_lora_weights("path/to/this/folder")']
    else:
        without = "".join(f", {part}=None" for part in usage.absent)
        lines += ["", f'pipe = DiffusionPipeline.from_pretrained("path/to/this/folder"{without})']
    if usage.scheduler:
        lines += [f"pipe.scheduler = {usage.scheduler}{usage.construct}"]
    lines += usage.setup
    arguments = ", ".join(f"{name}={value!r}" for name, value in usage.arguments.items())
    if task == "text-to-image":
        return [*lines, f'image = pipe(prompt="a prompt", {arguments}).images[0]']
    first = 'image=load_image("first_frame.png"), ' if task == "image-to-video" else ""
    return [
        *lines,
        f'clip = pipe({first}prompt="a prompt", {arguments}).frames[0]',
        f'export_to_video(clip, "clip.mp4", fps={usage.fps:g})',
    ]
