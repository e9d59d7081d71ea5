"""Statistics of pictures: closed forms, and the judge that reports them."""

from __future__ import annotations

import colorsys
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dancegrpo.errors import RewardError
from dancegrpo.image_statistics import STATISTICS, color_entropy, edge_density, grid, high_frequency, saturation
from dancegrpo.prompts import Prompt
from dancegrpo.rewards import load_reward
from dancegrpo.rewards.appearance import AppearanceReward
from dancegrpo.settings import RewardConfig

SIZE = 16


def flat(red: float, green: float, blue: float, size: int = SIZE) -> torch.Tensor:
    """(1, 1, 3, H, W)."""
    return torch.tensor([red, green, blue]).view(1, 1, 3, 1, 1).expand(1, 1, 3, size, size)


def checkerboard(cell: int, low: float = 0.0, high: float = 1.0) -> torch.Tensor:
    """(1, 1, 3, 16, 16), grey, squares of `cell` pixels."""
    index = torch.arange(SIZE) // cell
    odd = (index[:, None] + index[None, :]) % 2
    return (low + (high - low) * odd).expand(1, 1, 3, SIZE, SIZE)


def wave(cycles_x: int, cycles_y: int = 0) -> torch.Tensor:
    """(1, 1, 3, 16, 16): a grey cosine of so many cycles along each axis."""
    t = 2 * math.pi * torch.arange(SIZE) / SIZE
    return (0.5 + 0.4 * torch.cos(cycles_y * t[:, None] + cycles_x * t[None, :])).expand(1, 1, 3, SIZE, SIZE)


def noise(size: int = 3, frames: int = 1) -> torch.Tensor:
    return torch.rand(size, frames, 3, 12, 20, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", STATISTICS)
@pytest.mark.parametrize("level", [0.0, 0.3, 1.0])
def test_flat_grey_has_nothing(name, level):
    assert STATISTICS[name](flat(level, level, level)).item() == 0.0


@pytest.mark.parametrize("name", ["edge_density", "high_frequency", "color_entropy"])
def test_any_flat_colour_has_neither_edges_nor_texture_nor_variety(name):
    assert STATISTICS[name](flat(0.9, 0.2, 0.4)).item() == 0.0


@given(st.tuples(*[st.floats(0, 1, width=32)] * 3))
@settings(max_examples=50, deadline=None)
def test_saturation_is_hsv_saturation_times_value(color):
    _, s, v = colorsys.rgb_to_hsv(*color)
    assert saturation(flat(*color, size=2)).item() == pytest.approx(s * v, abs=1e-6)


def test_saturation_is_the_mean_over_pixels():
    half = torch.cat([flat(1, 0, 0), flat(0.5, 0.5, 0.5)], dim=-1)
    assert saturation(half).item() == pytest.approx(0.5)


def test_a_step_is_an_edge_two_pixels_wide():
    """Central differences see a step from both of its sides."""
    picture = torch.cat([flat(0, 0, 0), flat(1, 1, 1)], dim=-1)
    assert edge_density(picture).item() == pytest.approx(2 / (2 * SIZE))


def test_edge_density_of_a_ramp_is_all_or_nothing():
    ramp = torch.arange(SIZE) / 100  # 0.01 per pixel
    picture = ramp.expand(1, 1, 3, SIZE, SIZE)
    assert edge_density(picture).item() == 0.0
    steep = torch.arange(6) / 9  # 0.111 per pixel
    assert edge_density(steep.expand(1, 1, 3, 6, 6)).item() == 1.0


@pytest.mark.parametrize(
    ("x", "y", "share"), [(1, 0, 0), (4, 0, 0), (5, 0, 1), (8, 0, 1), (0, 7, 1), (3, 6, 1), (2, 3, 0)]
)
def test_a_wave_is_above_half_the_nyquist_frequency_or_not(x, y, share):
    """16 pixels: Nyquist is 8 cycles, half of it 4, and 4 itself is not above."""
    assert high_frequency(wave(x, y)).item() == pytest.approx(share, abs=1e-5)


def test_two_waves_share_the_energy_by_their_squared_amplitudes():
    mixed = 0.5 + 0.25 * (wave(2) - 0.5) / 0.4 + 0.125 * (wave(6) - 0.5) / 0.4
    assert high_frequency(mixed).item() == pytest.approx(0.125**2 / (0.25**2 + 0.125**2), abs=1e-5)


def test_a_checkerboard_of_pixels_is_all_texture():
    assert high_frequency(checkerboard(1)).item() == pytest.approx(1.0, abs=1e-6)


def test_a_coarse_checkerboard_has_the_texture_of_its_harmonics():
    """Cells of 4: a square wave of period 8, whose samples have the frequencies 2 and 6 of 16 along each axis."""
    low, high = (1 / math.sin(math.pi * k / 8) ** 2 for k in (1, 3))
    expected = 1 - (low / (low + high)) ** 2
    assert high_frequency(checkerboard(4)).item() == pytest.approx(expected, abs=1e-5)


def test_high_frequency_has_nothing_of_brightness_and_contrast():
    picture = checkerboard(4, 0.4, 0.5)
    torch.testing.assert_close(high_frequency(picture), high_frequency(checkerboard(4)), atol=1e-4, rtol=0)


@pytest.mark.parametrize("colors", [2, 4, 8])
def test_equally_many_pixels_of_n_colours_are_log2_n_bits(colors):
    stripes = torch.arange(SIZE) % colors / 8 + 1 / 16  # the middles of bins
    assert color_entropy(stripes.expand(1, 1, 3, SIZE, SIZE)).item() == pytest.approx(math.log2(colors), abs=1e-6)


def test_colour_entropy_of_noise_is_that_of_its_histogram():
    picture = noise(1)
    counts = np.histogramdd(picture[0, 0].flatten(1).T.numpy(), bins=8, range=[(0, 1)] * 3)[0].ravel()
    share = counts[counts > 0] / counts.sum()
    assert color_entropy(picture).item() == pytest.approx(-(share * np.log2(share)).sum(), abs=1e-5)


def grey(luma: torch.Tensor) -> torch.Tensor:
    """(H, W) -> (1, 1, 3, H, W)."""
    return luma.expand(1, 1, 3, *luma.shape)


def lattice(size: int, period: float, amplitude: float = 0.2) -> torch.Tensor:
    """(H, W): two crossing waves around 0.5."""
    wave = torch.cos(2 * math.pi * torch.arange(size) / period)
    return 0.5 + amplitude * (wave[:, None] + wave)


def natural(size: int, exponent: float = 1.0, seed: int = 0) -> torch.Tensor:
    """(H, W): noise whose amplitude falls with frequency to the power of `exponent`, mean 0.5, spread 0.15."""
    white = torch.randn(size, size, generator=torch.Generator().manual_seed(seed))
    frequency = torch.fft.fftfreq(size)
    radius = torch.hypot(frequency[:, None], frequency).clamp(min=1 / size)
    texture = torch.fft.ifft2(torch.fft.fft2(white) / radius**exponent).real
    return (0.5 + 0.15 * (texture - texture.mean()) / texture.std()).clamp(0, 1)


@pytest.mark.parametrize("size", [64, 96])
@pytest.mark.parametrize("period", [2, 3, 5.3, 8])
def test_a_lattice_is_all_grid(size, period):
    assert grid(grey(lattice(size, period))).item() == pytest.approx(1.0, abs=2e-3)


def test_a_tiled_motif_is_all_grid_with_its_harmonics():
    motif = torch.rand(8, 8, generator=torch.Generator().manual_seed(0))
    assert grid(grey(motif.repeat(16, 16))).item() == pytest.approx(1.0, abs=2e-3)


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0, 1.5])
@pytest.mark.parametrize("seed", [0, 1])
def test_natural_textures_have_no_grid(exponent, seed):
    assert grid(grey(natural(64, exponent, seed))).item() < 0.01


@pytest.mark.parametrize("angle", [0, 10, 22.5, 45, 70])
def test_a_single_edge_of_any_direction_is_no_grid(angle):
    t, turn = torch.arange(64) - 31.5, math.radians(angle)
    side = math.cos(turn) * t + math.sin(turn) * t[:, None]
    assert grid(grey((side / 2).sigmoid())).item() < 0.01


def test_a_lattice_shows_on_a_natural_picture_by_its_share_of_the_texture():
    picture, waves = natural(128), lattice(128, 4, 0.08) - 0.5
    found = grid(grey((picture + waves).clamp(0, 1))).item()
    assert 0.3 < found < 0.7
    assert grid(grey((picture + waves / 4).clamp(0, 1))).item() < found / 4


def test_the_grid_has_nothing_of_brightness_and_contrast():
    picture = (natural(64) + lattice(64, 4, 0.05) - 0.5).clamp(0.1, 0.9)
    assert grid(grey(0.2 + 0.5 * picture)).item() == pytest.approx(grid(grey(picture)).item(), abs=1e-4)


def test_fewer_than_eight_repeats_are_no_lattice():
    assert grid(grey(lattice(64, 64 / 4))).item() == 0.0
    assert grid(checkerboard(1)[..., :12, :12]).item() == 0.0


def test_rounding_to_bytes_is_no_lattice():
    ramp = torch.linspace(0.2, 0.8, 64).expand(64, 64)
    assert grid(grey((ramp * 255).round() / 255)).item() == 0.0


@pytest.mark.parametrize("name", STATISTICS)
def test_a_clip_is_the_mean_of_its_frames(name):
    clip = noise(2, frames=3)
    each = torch.stack([STATISTICS[name](clip[:, i : i + 1]) for i in range(3)])
    torch.testing.assert_close(STATISTICS[name](clip), each.mean(0), atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", STATISTICS)
def test_mirroring_changes_nothing(name):
    torch.testing.assert_close(STATISTICS[name](noise().flip(-1)), STATISTICS[name](noise()), atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", STATISTICS)
def test_a_nan_pixel_spoils_its_own_picture_only(name):
    media = noise().clone()
    media[1, 0, 0, 3, 3] = torch.nan
    assert STATISTICS[name](media).isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (2, 1, 4, 8, 8), (2, 1, 3, 1, 8)])
def test_media_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"use \(B, F, 3, H, W\) with at least 2x2 pixels"):
        saturation(torch.zeros(shape))


def test_the_judge_reports_every_statistic_by_name():
    judge = load_reward("looks", RewardConfig(judge="appearance", weight=0))
    media = noise()
    scores = judge(media, [Prompt(i, "x") for i in range(3)])
    assert scores.extra.keys() == STATISTICS.keys()
    for name, column in scores.extra.items():
        torch.testing.assert_close(column, STATISTICS[name](media), atol=0, rtol=0)
    torch.testing.assert_close(scores.values, saturation(media), atol=0, rtol=0)
    assert scores.valid.all()


def test_the_judge_reads_bytes_as_fractions():
    pictures = (noise() * 255).round().to(torch.uint8)
    of_bytes, of_floats = (AppearanceReward()(m, [Prompt(0, "x")] * 3) for m in (pictures, pictures.float() / 255))
    torch.testing.assert_close(of_bytes.extra["color_entropy"], of_floats.extra["color_entropy"], atol=0, rtol=0)


def test_the_judge_gives_no_score_to_a_picture_with_a_nan():
    media = noise().clone()
    media[0, 0, 1, 2, 2] = torch.nan
    scores = AppearanceReward()(media, [Prompt(0, "x")] * 3)
    assert scores.valid.tolist() == [False, True, True]
    assert scores.causes == {"the score is not a finite number": 1}


def test_the_judge_refuses_media_of_another_shape():
    with pytest.raises(RewardError, match="media"):
        AppearanceReward()(torch.zeros(2, 8, 8), [Prompt(0, "x")] * 2)
