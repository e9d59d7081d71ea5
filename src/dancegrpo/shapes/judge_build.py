"""Rebuild the learned judges from nothing: `python -m dancegrpo.shapes.judge_build --out DIR`.

shapes-clip learns drawings and captions, and shapes-hps goes on from it with preferences; shapes-pickscore starts from
another seed and learns both by itself. Everything is seeded, and each network trains on one core, the two lines side by
side. Expect 15 minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dancegrpo.errors import DanceError
from dancegrpo.files import write_atomically
from dancegrpo.shapes import JUDGES
from dancegrpo.shapes.base import TEXT_TOKENS, clip_tokenizer, vocabulary
from dancegrpo.shapes.files import log_line, run_side_by_side
from dancegrpo.shapes.judges import HEADS, MEAN, STD, Student, clip, contrast, draw_pool, measure, prefer
from dancegrpo.shapes.looks import LOOKS
from dancegrpo.shapes.scenes import SIZE, prompts
from dancegrpo.shapes.training import Progress, train_denoiser

LOOK = {"shapes-hps": "polished", "shapes-pickscore": "pristine"}
"""What each preference judge likes beside a fitting picture."""
MEASURED = 9876
"""Seed of the drawings on which accuracies are stated; training sees others."""
OPEN_CLIP_WEIGHTS = "open_clip_model.safetensors"
"""As open_clip's checkpoints name theirs."""


@dataclass(frozen=True)
class Settings:
    """How long and on how much to train."""

    out: Path
    only: tuple[str, ...] = JUDGES
    seed: int = 0
    drawings: int = 16000
    batch: int = 128
    steps: int = 1000
    rate: float = 1e-3
    preference_batch: int = 48
    preference_steps: int = 500
    prompts: int = 1200
    log_every: int = 100


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; a user's mistake is one line and exit code 2."""
    settings = _parse(arguments)
    try:
        build(settings)
    except DanceError as error:
        sys.exit(_refuse(str(error)))
    except OSError as error:
        sys.exit(_refuse(f"{error.filename or settings.out}: {error.strerror or error}; name another folder"))


def _refuse(line: str) -> int:
    print(f"dancegrpo: {line}", file=sys.stderr)
    return 2


def build(settings: Settings) -> None:
    """Train all that is asked for and write a folder of each under `out`, replaced in one move."""
    settings.out.mkdir(parents=True, exist_ok=True)
    own = tuple(name for name in settings.only if name == "shapes-pickscore")
    shared = tuple(name for name in settings.only if name != "shapes-pickscore")
    # Other drawings, other weights, another order: the judge that is only measured shares nothing with the others.
    lines = {"shapes-clip": (shared, settings), "shapes-pickscore": (own, replace(settings, seed=settings.seed + 1000))}
    run_side_by_side(train_line, {name: job for name, job in lines.items() if job[0]})


def train_line(names: Sequence[str], settings: Settings) -> None:
    """Train one network on captions, then on preferences where asked, and save each. One core, a process of its own."""
    torch.set_num_threads(1)
    torch.manual_seed(settings.seed)
    first = names[0]
    log_line(first, f"drawing {settings.drawings} scenes, each right and wrong")
    pool = draw_pool(settings.drawings, settings.seed)
    tokenizer = clip_tokenizer(vocabulary())
    student = Student(clip(len(tokenizer)), tokenizer)
    rate: dict[str, Any] = {"rate": settings.rate, "seed": settings.seed}
    _train(
        first,
        settings,
        train_denoiser(student.model, contrast(student, pool, settings.batch), steps=settings.steps, **rate),
    )
    if "shapes-clip" in names:
        _finish("shapes-clip", student, settings)
    for name in (name for name in names if name in LOOK):
        loss = prefer(student, pool, LOOKS[LOOK[name]], settings.preference_batch)
        rate = {"rate": settings.rate / 2, "seed": settings.seed + 1}
        _train(name, settings, train_denoiser(student.model, loss, steps=settings.preference_steps, **rate))
        _finish(name, student, settings)


def _train(name: str, settings: Settings, stage: Iterator[Progress]) -> None:
    started = time.monotonic()
    for state in stage:
        if state.step % settings.log_every == 0:
            log_line(name, f"step {state.step} loss {state.loss:.4f} {time.monotonic() - started:.0f} s")


def _finish(name: str, student: Student, settings: Settings) -> None:
    """State a judge's accuracy, as it will be read from the disk, and save it."""
    exact = {key: value.clone() for key, value in student.model.state_dict().items()}
    student.model.half().float()
    rates = measure(student, LOOK.get(name), prompts("heldout", settings.prompts), MEASURED)
    log_line(name, " ".join(f"{kind}={rate:.3f}" for kind, rate in rates.items()))
    save = save_open_clip if name == "shapes-hps" else save_transformers
    readme = card(name, student, rates, settings)
    write_atomically(settings.out / name, lambda partial: _save(save, student, partial, readme))
    student.model.load_state_dict(exact)


# --------------------------------------------------------------------------------------------------------------- saving


def _save(save: Any, student: Student, folder: Path, readme: str) -> None:
    folder.mkdir()
    student.tokenizer.save_pretrained(folder)
    save(student, folder)
    (folder / "README.md").write_text(readme, encoding="utf-8")
    for file in folder.iterdir():
        file.chmod(0o644)  # safetensors writes for the owner alone, and a package is read by others


def save_transformers(student: Student, folder: Path) -> None:
    """As `CLIPModel.from_pretrained` and CLIP's image processor read it, in half precision."""
    student.model.half().save_pretrained(folder)
    student.model.float()
    processor = {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": SIZE},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": SIZE, "width": SIZE},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(MEAN),
        "image_std": list(STD),
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=2), encoding="utf-8")


def save_open_clip(student: Student, folder: Path) -> None:
    """In open_clip's layout, as HPS-v2.1 is published, in half precision."""
    from safetensors.torch import save_file

    half = {name: tensor.half() for name, tensor in to_open_clip(student.model.state_dict()).items()}
    save_file(half, folder / OPEN_CLIP_WEIGHTS)
    vision, text = student.model.config.vision_config, student.model.config.text_config
    config = {
        "model_cfg": {
            "embed_dim": student.model.config.projection_dim,
            "vision_cfg": {
                "image_size": SIZE,
                "layers": vision.num_hidden_layers,
                "width": vision.hidden_size,
                "head_width": vision.hidden_size // HEADS[0],
                "patch_size": vision.patch_size,
                "mlp_ratio": vision.intermediate_size / vision.hidden_size,
            },
            "text_cfg": {
                "context_length": TEXT_TOKENS,
                "vocab_size": text.vocab_size,
                "width": text.hidden_size,
                "heads": HEADS[1],
                "layers": text.num_hidden_layers,
                "mlp_ratio": text.intermediate_size / text.hidden_size,
            },
        },
        "preprocess_cfg": {"mean": list(MEAN), "std": list(STD)},
    }
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


_NAMES = {
    "logit_scale": "logit_scale",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.final_layer_norm": "ln_final",
    "text_projection.weight": "text_projection",
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
    "vision_model.pre_layrnorm": "visual.ln_pre",
    "vision_model.post_layernorm": "visual.ln_post",
    "visual_projection.weight": "visual.proj",
    "self_attn.out_proj": "attn.out_proj",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "vision_model.encoder.layers.": "visual.transformer.resblocks.",
    "text_model.encoder.layers.": "transformer.resblocks.",
}
"""Parts of transformers' names -> open_clip's."""


def to_open_clip(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """`CLIPModel`'s tensors under open_clip's names: q, k and v in one, both projections transposed."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.endswith("position_ids") or ".k_proj." in name or ".v_proj." in name:
            continue
        if ".q_proj." in name:
            tensor = torch.cat([tensors[name.replace(".q_proj.", f".{letter}_proj.")] for letter in "qkv"])
            name = name.replace("self_attn.q_proj.", "attn.in_proj_")
        for theirs, ours in _NAMES.items():
            name = name.replace(theirs, ours)
        renamed[name] = (tensor.T if name in ("text_projection", "visual.proj") else tensor).contiguous()
    return renamed


# ----------------------------------------------------------------------------------------------------------------- card

_USE = {
    "shapes-clip": "judge: clip\n    options: {model: shapes-clip}",
    "shapes-hps": "judge: hps\n    options: {weights: shapes-hps}",
    "shapes-pickscore": "judge: pickscore\n    options: {model: shapes-pickscore}",
}
_MEASURED = {
    "caption": "own caption highest among 16 different ones",
    "fits": "a drawing that fits above one that does not",
    "polished": "vivid, whole and crisp above dull, cut off and blurred",
    "pristine": "as drawn above noisy, blocky and turned in hue",
}


def card(name: str, student: Student, rates: dict[str, float], settings: Settings) -> str:
    """The model card: what it is, how to call it, how it was made, how good it is."""
    rows = "\n".join(f"| {_MEASURED[kind]} | {rate:.3f} |" for kind, rate in rates.items())
    size = sum(parameter.numel() for parameter in student.model.parameters()) / 1e6
    taught = f"{settings.steps} steps of {settings.batch} on drawings and captions"
    if name in LOOK:
        taught += f", then {settings.preference_steps} of {settings.preference_batch} on preferences"
    return f"""---
license: apache-2.0
---
# {name}

A miniature CLIP ({size:.2f} M parameters, 64x64 pixels in patches of 8) that judges drawings of the shapes world. It is
learned, so it can be wrong, and training on it can exploit that: this is what it is for.

```yaml
rewards:
  judged:
    {_USE[name]}
```

Trained by `python -m dancegrpo.shapes.judge_build` (seed {settings.seed}, {settings.drawings} drawings):
{taught}; weights averaged, stored in half
precision. It saw captions of both splits of `dancegrpo.shapes.scenes`.

On fresh drawings of {settings.prompts} held-out prompts:

| judged right | share |
|---|---|
{rows}
"""


def _parse(arguments: Sequence[str] | None) -> Settings:
    parser = argparse.ArgumentParser(
        prog="python -m dancegrpo.shapes.judge_build",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write the judges' folders into")
    parser.add_argument("--only", nargs="+", choices=JUDGES, default=JUDGES, help="judges to build")
    parser.add_argument("--seed", type=int, default=Settings.seed, help="of drawings, weights and training")
    parser.add_argument("--drawings", type=int, default=Settings.drawings, help="captions to draw, right and wrong")
    parser.add_argument("--batch", type=int, default=Settings.batch, help="drawings per update on captions")
    parser.add_argument("--steps", type=int, default=Settings.steps, help="updates on captions")
    parser.add_argument(
        "--preference-batch", type=int, default=Settings.preference_batch, help="captions per update on preferences"
    )
    parser.add_argument(
        "--preference-steps", type=int, default=Settings.preference_steps, help="updates on preferences"
    )
    parser.add_argument("--prompts", type=int, default=Settings.prompts, help="held-out prompts to measure on")
    parser.add_argument("--log-every", type=int, default=Settings.log_every, help="updates between two log lines")
    chosen = vars(parser.parse_args(arguments))
    for name, value in chosen.items():
        if isinstance(value, int) and name != "seed" and value < 1:
            parser.error(f"--{name.replace('_', '-')}={value} is too few: use 1 or more")
    return Settings(**(chosen | {"only": tuple(chosen["only"])}))


if __name__ == "__main__":
    main()
