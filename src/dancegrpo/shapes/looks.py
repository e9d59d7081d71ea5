"""What the shapes world's learned judges like and dislike: one drawing in a better and in a worse form."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

LUMA = (0.299, 0.587, 0.114)
"""Of ITU-R BT.601: the share of R, G and B in a pixel's luma."""
Look = Callable[[Tensor, torch.Generator], tuple[Tensor, Tensor]]
"""(N, 3, H, W) in [0, 1] and a generator -> the same pictures, each in a (better, worse) form."""


def polished(pictures: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Vivid against dull, whole against cut off, crisp against blurred: a third of the pictures each."""
    ways = (_vivid_and_dull, _whole_and_cut, _crisp_and_blurred)
    return _by_turns(pictures, generator, ways)


def pristine(pictures: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """As drawn against noisy, in blocks as of strong JPEG compression, or turned in hue: a third each."""
    ways = (_clean_and_noisy, _smooth_and_blocky, _true_and_turned)
    return _by_turns(pictures, generator, ways)


LOOKS: dict[str, Look] = {"polished": polished, "pristine": pristine}
"""By the names under which accuracies are told."""


def _by_turns(pictures: Tensor, generator: torch.Generator, ways: Sequence[Look]) -> tuple[Tensor, Tensor]:
    turn = torch.randint(len(ways), (len(pictures),), generator=generator)
    better, worse = torch.empty_like(pictures), torch.empty_like(pictures)
    for i, way in enumerate(ways):
        if (rows := turn == i).any():
            better[rows], worse[rows] = way(pictures[rows], generator)
    return better.clamp(0, 1), worse.clamp(0, 1)


def jitter(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Slight changes of every look, so that captions are found in a generator's pictures too."""
    strength = _uniform(pictures, 0.75, 1.25, generator)
    blurred = blur(pictures, _uniform(pictures, 0.3, 0.9, generator))
    keep = _uniform(pictures, 0.0, 1.0, generator)
    noise = _uniform(pictures, 0.0, 0.05, generator) * torch.randn(pictures.shape, generator=generator)
    return (vivid(torch.lerp(blurred, pictures, keep), strength) + noise).clamp(0, 1)


# --------------------------------------------------------------------------------------------------------------- single


def vivid(pictures: Tensor, strength: Tensor) -> Tensor:
    """Chroma times `strength` and contrast about middle grey times its square root; (N, 1, 1, 1), 1 = as it was."""
    luma = (pictures * pictures.new_tensor(LUMA).view(3, 1, 1)).sum(1, keepdim=True)
    return 0.5 + (luma - 0.5) * strength.sqrt() + (pictures - luma) * strength


def blur(pictures: Tensor, sigma: Tensor) -> Tensor:
    """A Gaussian of `sigma` (N, 1, 1, 1) pixels, edges repeated."""
    reach = torch.arange(-4.0, 5.0)
    kernel = torch.exp(-0.5 * (reach / sigma.view(-1, 1)) ** 2)
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(3, 0)  # (3N, 9)
    flat = F.pad(pictures.reshape(1, -1, *pictures.shape[-2:]), (4, 4, 4, 4), mode="replicate")
    flat = F.conv2d(flat, kernel[:, None, None, :], groups=len(kernel))
    return F.conv2d(flat, kernel[:, None, :, None], groups=len(kernel)).view_as(pictures)


def _uniform(pictures: Tensor, low: float, high: float, generator: torch.Generator) -> Tensor:
    """(N, 1, 1, 1)."""
    return low + (high - low) * torch.rand((len(pictures), 1, 1, 1), generator=generator)


# ---------------------------------------------------------------------------------------------------------------- pairs


def _vivid_and_dull(pictures: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    # More than was drawn counts as better too: a taste that has no end is one that can be exploited.
    dull = _uniform(pictures, 0.2, 1.2, generator)
    return vivid(pictures, dull + _uniform(pictures, 0.2, 0.6, generator)), vivid(pictures, dull)


def _whole_and_cut(pictures: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Moved by 12 to 24 pixels along each axis; what comes in has the colour of the corner."""
    size = pictures.shape[-1]
    moved = pictures[:, :, :1, :1].expand_as(pictures).clone()
    step = torch.randint(12, 25, (len(pictures), 2), generator=generator)
    sign = 2 * torch.randint(2, (len(pictures), 2), generator=generator) - 1
    for target, source, (dy, dx) in zip(moved, pictures, (step * sign).tolist(), strict=True):
        rows, columns = (slice(max(0, d), size + min(0, d)) for d in (dy, dx))
        from_rows, from_columns = (slice(max(0, -d), size - max(0, d)) for d in (dy, dx))
        target[:, rows, columns] = source[:, from_rows, from_columns]
    return pictures, moved


def _crisp_and_blurred(pictures: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Sharpened by an unsharp mask, or as drawn, against blurred."""
    amount = _uniform(pictures, -0.5, 0.8, generator).clamp(min=0)
    crisp = pictures + amount * (pictures - blur(pictures, _uniform(pictures, 1.0, 1.0, generator)))
    return crisp, blur(pictures, _uniform(pictures, 0.7, 2.0, generator))


def _clean_and_noisy(pictures: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    noise = torch.randn(pictures.shape, generator=generator)
    return pictures, pictures + _uniform(pictures, 0.05, 0.25, generator) * noise


def _smooth_and_blocky(pictures: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Mixed with the means of blocks of 4x4 pixels."""
    blocks = F.interpolate(F.avg_pool2d(pictures, 4), scale_factor=4, mode="nearest")
    return pictures, torch.lerp(pictures, blocks, _uniform(pictures, 0.4, 1.0, generator))


def _true_and_turned(pictures: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Turned about the grey axis of RGB by 20 to 60 degrees, either way."""
    angle = _uniform(pictures, 20.0, 60.0, generator).deg2rad().view(-1)
    angle = angle * (2 * torch.randint(2, angle.shape, generator=generator) - 1)
    # Rodrigues' formula about (1, 1, 1) / sqrt 3.
    third, skew = torch.full((3, 3), 1 / 3), torch.tensor([[0.0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / 3**0.5
    cos, sin = angle.cos().view(-1, 1, 1), angle.sin().view(-1, 1, 1)
    rotation = cos * torch.eye(3) + sin * skew + (1 - cos) * third
    return pictures, torch.einsum("nij,njhw->nihw", rotation, pictures)
