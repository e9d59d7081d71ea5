"""Named statistics of pictures, by which a change of looks can be told in numbers. No weights, no taste.

Each takes media (B, F, 3, H, W) float in [0, 1], F = 1 for pictures, and returns (B,) float32: of a clip, the mean over
its frames. Values outside [0, 1] are cut off; a NaN pixel makes its statistics NaN.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

LUMA = (0.299, 0.587, 0.114)
"""Of ITU-R BT.601: the share of R, G and B in a pixel's luma."""
EDGE = 0.1
"""Luma gradient magnitude per pixel above which a pixel counts as an edge; from black to white is 1."""
LEVELS = 8
"""Bins per channel of the colour histogram: 512 colours."""
REPEATS = 8
"""Fewest repeats across a picture that make a pattern a lattice."""
PEAK = 20.0
"""How far above its surroundings in the spectrum a frequency's energy must stand to be a peak; noise stays below."""


def saturation(media: Tensor) -> Tensor:
    """Mean chroma, max(R, G, B) - min(R, G, B) of a pixel: 0 = grey, 1 = pure red, green, blue or their mixtures.

    Chroma rather than HSV's quotient, which calls a nearly black pixel fully saturated.
    """
    return _per_sample(media, lambda frames: (frames.amax(1) - frames.amin(1)).mean((-2, -1)))


def edge_density(media: Tensor) -> Tensor:
    """Share of pixels, in [0, 1], whose luma changes by more than `EDGE` per pixel.

    The gradient is central differences inside and one-sided at the frame; its magnitude the Euclidean norm.
    """

    def density(frames: Tensor) -> Tensor:
        dy, dx = torch.gradient(_luma(frames), dim=(-2, -1))
        magnitude = torch.hypot(dy, dx)
        # A comparison would turn NaN into "no edge".
        return torch.where(magnitude.isnan(), magnitude, (magnitude > EDGE).float()).mean((-2, -1))

    return _per_sample(media, density)


def high_frequency(media: Tensor) -> Tensor:
    """Share of the luma's spectral energy, in [0, 1], above half the Nyquist frequency; the mean (DC) is left out.

    A frequency is above where either of its axes has more than a quarter of a cycle per pixel. 0 for a flat picture.
    """

    def share(frames: Tensor) -> Tensor:
        luma = _luma(frames)
        # The mean is taken off before the transform: rounding would leave a flat picture with a spectrum.
        energy = torch.fft.fft2(luma - luma.mean((-2, -1), keepdim=True)).abs() ** 2
        energy[..., 0, 0] = 0
        fy, fx = (torch.fft.fftfreq(n, device=luma.device).abs() for n in luma.shape[-2:])
        above = torch.maximum(fy[:, None], fx[None, :]) > 0.25
        total, high = energy.sum((-2, -1)), (energy * above).sum((-2, -1))
        flat = total <= 1e-9 * luma[0].numel() ** 2  # a variance of 1e-9: far below a step of 1/255
        return torch.where(flat, 0.0, high / total.clamp(min=torch.finfo(total.dtype).tiny))

    return _per_sample(media, share)


def color_entropy(media: Tensor) -> Tensor:
    """Shannon entropy in bits, 0 to 9, of the colours in `LEVELS` equal bins per RGB channel; 0 = one colour."""

    def entropy(frames: Tensor) -> Tensor:
        unknown = frames.isnan().any(1).any(-1).any(-1)
        bins = (frames.nan_to_num() * LEVELS).long().clamp(max=LEVELS - 1)
        codes = (bins[:, 0] * LEVELS + bins[:, 1]) * LEVELS + bins[:, 2]
        counts = codes.new_zeros((len(frames), LEVELS**3), dtype=torch.float32)
        flat = codes.flatten(1)
        counts.scatter_add_(1, flat, torch.ones_like(flat, dtype=torch.float32))
        bits = torch.special.entr(counts / flat.shape[1]).sum(1) / torch.log(torch.tensor(2.0, device=frames.device))
        return bits.masked_fill(unknown, torch.nan)

    return _per_sample(media, entropy)


def grid(media: Tensor) -> Tensor:
    """How much of a picture's texture is a lattice, in [0, 1]: the share of the luma's energy that sits in peaks.

    Of frequencies with at least `REPEATS` cycles across the picture along either axis, under a Hann window. A peak has
    more than `PEAK` times the energy around it: the geometric mean of four neighbours, three and four bins away on
    both sides, in whichever of eight directions has most. A lattice has a smooth background in all of them, an edge's
    streak does not in its own, noise and 1/f texture in none. 0 for a flat picture, and below 16 pixels a side.
    """

    def share(frames: Tensor) -> Tensor:
        luma, size = _luma(frames), frames.shape[-2:]
        down, across = (torch.hann_window(n, periodic=False, device=luma.device) for n in size)
        window = down[:, None] * across
        weight = window.sum().clamp(min=torch.finfo(luma.dtype).tiny)
        centred = (luma - (luma * window).sum((-2, -1), keepdim=True) / weight) * window
        energy = torch.fft.fft2(centred).abs() ** 2 / luma[0].numel() / window.square().sum().clamp(min=1e-9)
        cycles = [torch.fft.fftfreq(n, 1 / n, device=luma.device).abs() for n in size]
        texture = energy * (torch.maximum(cycles[0][:, None], cycles[1][None, :]) >= REPEATS)
        total = texture.sum((-2, -1))
        peaks = (texture * (texture > PEAK * _surroundings(energy))).sum((-2, -1))
        # Two millionths is the variance of rounding to 8 bits, and a little more.
        return torch.where(total <= 2e-6, 0.0, peaks / total.clamp(min=torch.finfo(total.dtype).tiny))

    return _per_sample(media, share)


def _surroundings(energy: Tensor) -> Tensor:
    """(N, H, W) spectra -> the geometric mean of each bin's neighbours in the direction where it is largest."""
    # The floor keeps what float32 cannot resolve from looking like a valley.
    floor = energy.amax((-2, -1), keepdim=True) * 1e-10
    log = (energy + floor).clamp(min=torch.finfo(energy.dtype).tiny).log()
    slopes = ((0, 1), (0.5, 1), (1, 1), (1, 0.5), (1, 0), (1, -0.5), (1, -1), (0.5, -1))
    highest = torch.full_like(log, -torch.inf)
    for dy, dx in slopes:
        along = torch.zeros_like(log)
        for away in (-4, -3, 3, 4):
            along += log.roll((round(away * dy), round(away * dx)), (-2, -1)) / 4
        highest = torch.maximum(highest, along)
    return highest.exp()


STATISTICS: dict[str, Callable[[Tensor], Tensor]] = {
    "saturation": saturation,
    "edge_density": edge_density,
    "high_frequency": high_frequency,
    "color_entropy": color_entropy,
    "grid": grid,
}
"""All of them, by name."""


def _luma(frames: Tensor) -> Tensor:
    """(N, 3, H, W) -> (N, H, W)."""
    return (frames * frames.new_tensor(LUMA).view(3, 1, 1)).sum(1)


@torch.no_grad()
def _per_sample(media: Tensor, of_frames: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply (N, 3, H, W) -> (N,) to every frame. ValueError for media of another shape, or of less than 2x2 pixels."""
    if media.ndim != 5 or media.shape[2] != 3 or min(media.shape[3:]) < 2:
        raise ValueError(f"media {tuple(media.shape)}: use (B, F, 3, H, W) with at least 2x2 pixels.")
    frames = media.detach().float().flatten(0, 1).clamp(0, 1)
    return of_frames(frames).view(media.shape[:2]).mean(1).float()
