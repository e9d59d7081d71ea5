"""Three tiny CLIPs that judge drawings as the published judges judge pictures: learned, and so not always right.

`shapes-clip` learns which caption belongs to which drawing (InfoNCE, arXiv:2103.00020). `shapes-hps` is fine-tuned
from it on pairs of pictures for one caption, of which one is preferred (a softmax over the two scaled cosines, as in
HPS v2, arXiv:2306.09341): the one that fits, and the one that is vivid, whole and crisp. `shapes-pickscore` is another
network with other tastes (arXiv:2305.01569): it prefers what fits, and what is clean, smooth and true in hue. What a
network has learned to like can be had without drawing better pictures, which is what reward hacking is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from dancegrpo.prompts import Prompt
from dancegrpo.shapes.base import TEXT_TOKENS
from dancegrpo.shapes.looks import LOOKS, Look, jitter
from dancegrpo.shapes.scenes import BACKGROUNDS, COLORS, SHAPES, SIZE, Entity, Scene, draw, sample_scene
from dancegrpo.shapes.verifier import judge
from dancegrpo.shapes.wordings import MIRRORED, every_scene, wordings

if TYPE_CHECKING:
    from transformers import CLIPModel

HEADS = (4, 4)
"""Attention heads of the (vision, text) tower: tensors do not tell them."""
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""CLIP's, per channel: the loaders of published judges expect them."""
MAX_SCALE = 100.0
"""Of the learned logit scale, as in CLIP."""
CANONICAL = 0.5
"""Share of the drawings whose caption is of the kind the base pipelines were trained on, in its plain words."""
CHOICES = 16
"""Captions among which a drawing's own is to be found, where that is measured."""


def clip(vocabulary: int) -> CLIPModel:
    """Untrained: 64x64 pictures in patches of 8, texts of 16 tokens; about 0.37 M parameters."""
    from transformers import CLIPConfig, CLIPModel

    vision_heads, text_heads = HEADS
    common = {"hidden_act": "gelu", "projection_dim": 64}
    vision = {"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 3, "num_attention_heads": vision_heads}
    text = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": text_heads}
    tokens = {"bos_token_id": vocabulary - 2, "eos_token_id": vocabulary - 1, "pad_token_id": vocabulary - 1}
    return CLIPModel(
        CLIPConfig(
            projection_dim=64,
            vision_config=common | vision | {"image_size": SIZE, "patch_size": 8},
            text_config=common | text | tokens | {"vocab_size": vocabulary, "max_position_embeddings": TEXT_TOKENS},
        )
    )


@dataclass(frozen=True)
class Student:
    """A CLIP that learns, with its tokenizer."""

    model: CLIPModel
    tokenizer: Any

    def see(self, pictures: Tensor) -> Tensor:
        """(N, 3, 64, 64) in [0, 1] -> (N, 64) of unit length."""
        mean, std = (pictures.new_tensor(values).view(3, 1, 1) for values in (MEAN, STD))
        return F.normalize(self.model.get_image_features((pictures - mean) / std).pooler_output, dim=-1)

    def read(self, texts: Sequence[str]) -> Tensor:
        """N texts -> (N, 64) of unit length."""
        ids = self.tokenizer(list(texts), padding="max_length", max_length=TEXT_TOKENS, return_tensors="pt")
        return F.normalize(self.model.get_text_features(ids["input_ids"]).pooler_output, dim=-1)

    def scale(self) -> Tensor:
        """What cosines are multiplied by before a softmax."""
        return self.model.logit_scale.exp().clamp(max=MAX_SCALE)


# ----------------------------------------------------------------------------------------------------------------- data


@dataclass(frozen=True)
class Pool:
    """N captioned drawings to train on. right, wrong: (N, 3, 64, 64) uint8; the wrong one does not fit its caption."""

    texts: tuple[str, ...]
    right: Tensor
    wrong: Tensor


def ask(rng: np.random.Generator) -> tuple[Scene, str]:
    """A scene and a text that asks for it, of either split."""
    if rng.random() < CANONICAL:
        scene = sample_scene(rng)
        return scene, scene.caption
    pool = every_scene()
    scene = pool[rng.integers(len(pool))]
    texts = wordings(scene)
    return scene, texts[rng.integers(len(texts))]


def draw_pool(n: int, seed: int) -> Pool:
    """`n` captions, each with a drawing of it and one that fails; the same ones for the same seed."""
    rng = np.random.default_rng(seed)
    asked = [ask(rng) for _ in range(n)]
    right = _media([draw(scene, rng) for scene, _ in asked])
    return Pool(tuple(text for _, text in asked), right, draw_wrong([scene for scene, _ in asked], rng))


def draw_wrong(scenes: Sequence[Scene], rng: np.random.Generator) -> Tensor:
    """(N, 3, 64, 64) uint8: of each scene a drawing that the verifier fails."""
    media = torch.empty((len(scenes), 3, SIZE, SIZE), dtype=torch.uint8)
    left = list(range(len(scenes)))
    while left:
        # Another scene may fit by chance: what a caption leaves open is drawn at random.
        media[left] = _media([draw(mistaken(scenes[i], rng), rng) for i in left])
        requests = [Prompt(i, scenes[i].caption, metadata=scenes[i].to_metadata()) for i in left]
        fits = judge(media[left].numpy().astype(np.float32) / 255, requests).exact
        left = [i for i, fit in zip(left, fits, strict=True) if fit]
    return media


def _media(pictures: Sequence[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()


def mistaken(scene: Scene, rng: np.random.Generator) -> Scene:
    """A scene with one thing wrong, or another scene altogether."""
    near = [_with_other_shape, _with_other_color]
    near += [_elsewhere] if scene.relation else [_with_one_more] if len(scene.entities) < 4 else []
    near += [_with_one_less] if len(scene.entities) > 1 else []
    near += [_on_other_background] if scene.background else []
    ways: list[Callable[[Scene, np.random.Generator], Scene]] = [*near, lambda _, rng: sample_scene(rng)]
    return ways[rng.integers(len(ways))](scene, rng)


def _other(names: Sequence[str] | Mapping[str, Any], name: str | None, rng: np.random.Generator) -> str:
    others = [other for other in names if other != name]
    return others[rng.integers(len(others))]


def _with(scene: Scene, index: int, entity: Entity) -> Scene:
    return replace(scene, entities=(*scene.entities[:index], entity, *scene.entities[index + 1 :]))


def _with_other_shape(scene: Scene, rng: np.random.Generator) -> Scene:
    index = int(rng.integers(len(scene.entities)))
    entity = scene.entities[index]
    return _with(scene, index, replace(entity, shape=_other(SHAPES, entity.shape, rng)))


def _with_other_color(scene: Scene, rng: np.random.Generator) -> Scene:
    index = int(rng.integers(len(scene.entities)))
    entity = scene.entities[index]
    return _with(scene, index, replace(entity, color=_other(COLORS, entity.color, rng)))


def _elsewhere(scene: Scene, rng: np.random.Generator) -> Scene:
    return replace(scene, relation=_other(MIRRORED, scene.relation, rng))


def _with_one_more(scene: Scene, rng: np.random.Generator) -> Scene:
    return replace(scene, entities=(*scene.entities, Entity(SHAPES[rng.integers(len(SHAPES))])))


def _with_one_less(scene: Scene, rng: np.random.Generator) -> Scene:
    index = int(rng.integers(len(scene.entities)))
    return replace(scene, entities=scene.entities[:index] + scene.entities[index + 1 :], relation=None)


def _on_other_background(scene: Scene, rng: np.random.Generator) -> Scene:
    return replace(scene, background=_other(BACKGROUNDS, scene.background, rng))


# --------------------------------------------------------------------------------------------------------------- losses


def contrastive_loss(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """InfoNCE in both directions (arXiv:2103.00020, figure 3). image, text: (N, D) of unit length, matching by row."""
    logits = scale * image @ text.T
    own = torch.arange(len(logits))
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


def preference_loss(better: Tensor, worse: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """-log softmax of the preferred picture among the two (arXiv:2306.09341, equation 2). All features (N, D)."""
    return F.softplus(scale * ((worse - better) * text).sum(-1)).mean()


def contrast(student: Student, pool: Pool, batch: int) -> Callable[[torch.Generator], Tensor]:
    """The loss of one step on pairs of drawing and caption, for `train_denoiser`."""

    def loss(generator: torch.Generator) -> Tensor:
        rows = distinct_rows(pool, batch, generator)
        pictures = jitter(pool.right[rows].float() / 255, generator)
        text = student.read([pool.texts[i] for i in rows.tolist()])
        return contrastive_loss(student.see(pictures), text, student.scale())

    return loss


def prefer(student: Student, pool: Pool, look: Look, batch: int) -> Callable[[torch.Generator], Tensor]:
    """The loss of one step on both kinds of preferences, and, so that captions stay understood, on contrast."""

    def loss(generator: torch.Generator) -> Tensor:
        rows = distinct_rows(pool, batch, generator)
        right, wrong = (pictures[rows].float() / 255 for pictures in (pool.right, pool.wrong))
        better, worse = look(right, generator)
        shown = torch.cat([jitter(right, generator), jitter(wrong, generator), better, worse])
        right, wrong, better, worse = student.see(shown).chunk(4)
        text, scale = student.read([pool.texts[i] for i in rows.tolist()]), student.scale()
        preferences = preference_loss(right, wrong, text, scale) + preference_loss(better, worse, text, scale)
        return preferences + contrastive_loss(right, text, scale)

    return loss


def distinct_rows(pool: Pool, batch: int, generator: torch.Generator) -> Tensor:
    """(<= batch,) rows at random, no text twice: a drawing fits its caption wherever that stands."""
    rows = torch.randperm(len(pool.texts), generator=generator)[:batch].tolist()
    return torch.tensor(list({pool.texts[row]: row for row in rows}.values()))


# ------------------------------------------------------------------------------------------------------------- measures


@torch.no_grad()
def measure(student: Student, look: str | None, requests: Sequence[Prompt], seed: int) -> dict[str, float]:
    """Shares of fresh drawings of these prompts that are judged right.

    `caption`: the own one scores highest among 16 random different ones. `fits`: the drawing scores above one that
    fails. The name of the look, where one is given: the better-looking of the two pictures scores higher.
    """
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    scenes = [Scene.from_metadata(prompt.metadata) for prompt in requests]
    right = _media([draw(scene, rng) for scene in scenes]).float() / 255
    texts = sorted({prompt.text for prompt in requests})
    known, image = student.read(texts), student.see(right)
    own = torch.tensor([texts.index(prompt.text) for prompt in requests])
    others = torch.stack([torch.from_numpy(rng.permutation(len(texts))[: CHOICES - 1]) for _ in requests])
    # Where the own caption was drawn among the others, it competes with fewer.
    scores = (known[others] * image[:, None]).sum(-1).masked_fill(others == own[:, None], -torch.inf)
    mine = (known[own] * image).sum(-1)
    wrong = student.see(draw_wrong(scenes, rng).float() / 255)
    found = {
        "caption": (mine > scores.amax(1)).float().mean().item(),
        "fits": (mine > (known[own] * wrong).sum(-1)).float().mean().item(),
    }
    if look is not None:
        better, worse = (student.see(pictures) for pictures in LOOKS[look](right, generator))
        found[look] = (((better - worse) * known[own]).sum(-1) > 0).float().mean().item()
    return found
