"""What an export is made of besides weights: the model card, and a folder that appears whole or not at all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


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
    arguments: Mapping[str, float]
    """Keyword arguments of the pipeline call."""


def card_text(card: ModelCard, usage: Usage, *, lora: bool) -> str:
    """The README.md of an export: front matter for the hub, what it is, and an example that runs."""
    from dancegrpo.shapes import PIPELINES

    shipped = card.base_model in PIPELINES
    kind = "LoRA weights for" if lora else "A complete diffusers pipeline, fine-tuned from"
    front = ["---", "library_name: diffusers", "pipeline_tag: text-to-image"]
    if not shipped and not Path(card.base_model).exists():  # the hub knows ids of its own only
        front += [f"base_model: {card.base_model}"]
    front += ["tags:", "- dancegrpo", "- reinforcement-learning", *["- lora"] * lora, "---", ""]
    body = [
        f"# {card.recipe}",
        "",
        f"{kind} `{card.base_model}`, trained by reinforcement learning with [DanceGRPO](https://arxiv.org/abs/2505.07818).",
        "",
        f"- Recipe: `{card.recipe}`, {card.iterations} iterations",
        f"- Trained on the judges: {', '.join(card.judges) or 'none'}",
        "- The base model's licence applies; a safety checker of the base model is not part of this export.",
        "",
        "## Use",
        "",
        "```python",
        *_example(card, usage, shipped=shipped, lora=lora),
        "```",
        "",
        "These are the settings it was trained and measured with; others work less well.",
    ]
    return "\n".join(front + body + (["", card.notes] if card.notes else [])) + "\n"


def _example(card: ModelCard, usage: Usage, *, shipped: bool, lora: bool) -> list[str]:
    """Lines of Python that load the weights and draw one picture the way the run did."""
    names = sorted({"DiffusionPipeline", usage.scheduler} - {""})
    lines = [f"from diffusers import {', '.join(names)}"]
    if lora:
        base = f'base_path("{card.base_model}")' if shipped else f'"{card.base_model}"'
        lines = ["from dancegrpo.shapes import base_path"] * shipped + lines
        lines += ["", f"pipe = DiffusionPipeline.from_pretrained({base})"]
        lines += ['pipe.load_lora_weights("path/to/this/folder")']
    else:
        lines += ["", 'pipe = DiffusionPipeline.from_pretrained("path/to/this/folder")']
    if usage.scheduler:
        lines += [f"pipe.scheduler = {usage.scheduler}{usage.construct}"]
    arguments = ", ".join(f"{name}={value}" for name, value in usage.arguments.items())
    return [*lines, f'image = pipe("a prompt", {arguments}).images[0]']
