"""Pictures and clips keep their pixels on the way to a file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from dancegrpo.errors import CheckpointError
from dancegrpo.media import grid, read_media, save_image, to_uint8
from dancegrpo.video import clip_grid, clip_suffix, film_strips, fit, save_clip


def test_rounding_is_the_diffusers_image_processors() -> None:
    # Every midpoint between two pixel values, and its neighbours, as well as values outside the range.
    values = torch.cat([(torch.arange(-2, 258) + offset) / 255 for offset in (0.0, 0.49999, 0.5, 0.50001)])
    picture = values.reshape(1, 1, 4, -1).expand(1, 3, -1, -1)
    processor = VaeImageProcessor(do_normalize=False)
    theirs = processor.postprocess(picture, output_type="np", do_denormalize=[False]).clip(0, 1)
    expected = np.asarray(VaeImageProcessor.numpy_to_pil(theirs)[0])
    assert np.array_equal(to_uint8(picture[0]).permute(1, 2, 0).numpy(), expected)


def test_a_saved_picture_reads_back_to_the_last_bit(tmp_path: Path) -> None:
    picture = torch.rand(3, 5, 7, generator=torch.Generator().manual_seed(0))
    save_image(picture, tmp_path / "new" / "0.png")
    read = torch.from_numpy(np.asarray(Image.open(tmp_path / "new" / "0.png")).copy()).permute(2, 0, 1)
    assert torch.equal(read, to_uint8(picture))


def test_a_failed_write_keeps_the_old_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "0.png"
    save_image(torch.zeros(3, 4, 4), path)
    old = path.read_bytes()

    def full(self: Image.Image, file: Path, **_: object) -> None:
        Path(file).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(CheckpointError, match="No space left"):
        save_image(torch.ones(3, 4, 4), path)
    assert path.read_bytes() == old
    assert [file.name for file in tmp_path.iterdir()] == ["0.png"]


def test_nan_is_refused() -> None:
    with pytest.raises(ValueError, match="NaN"):
        to_uint8(torch.tensor([0.0, float("nan")]))


def test_grid_puts_pictures_row_by_row() -> None:
    pictures = [torch.full((3, 2, 3), value) for value in (0.1, 0.2, 0.3)]
    sheet = grid(pictures, columns=2, padding=1, background=1.0)
    expected = torch.tensor(
        [
            [0.1, 0.1, 0.1, 1.0, 0.2, 0.2, 0.2],
            [0.1, 0.1, 0.1, 1.0, 0.2, 0.2, 0.2],
            [1.0] * 7,
            [0.3, 0.3, 0.3, 1.0, 1.0, 1.0, 1.0],
            [0.3, 0.3, 0.3, 1.0, 1.0, 1.0, 1.0],
        ]
    )
    assert torch.equal(sheet, expected.expand(3, -1, -1))


def test_grid_refuses_unequal_pictures() -> None:
    with pytest.raises(ValueError, match="do not share a grid"):
        grid([torch.zeros(3, 2, 2), torch.zeros(3, 2, 3)], columns=2)


def moving(frames: int = 9, height: int = 32, width: int = 32) -> torch.Tensor:
    """(F, 3, H, W): a red and a blue block on dark ground that move apart, one pixel per frame."""
    clip = torch.full((frames, 3, height, width), 8 / 255)
    for frame in range(frames):
        clip[frame, :, 4:12, 2 + frame : 10 + frame] = torch.tensor([0.86, 0.16, 0.16])[:, None, None]
        clip[frame, :, 18:26, 20 - frame : 28 - frame] = torch.tensor([0.16, 0.24, 0.86])[:, None, None]
    return clip


def noise(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("fps", [8.0, 24.0, 29.97])
def test_an_mp4_reads_back_nearly_as_it_was(tmp_path: Path, fps: float) -> None:
    save_clip(moving(), tmp_path / "0.mp4", fps)
    read = read_media(tmp_path / "0.mp4")
    assert read.shape == (9, 3, 256, 256)  # enlarged eightfold, to be seen
    large = to_uint8(moving()).repeat_interleave(8, 2).repeat_interleave(8, 3)
    error = (read.int() - large.int()).abs().float()
    assert error.mean() < 0.5
    assert error[:, :, 4::8, 4::8].mean() < 0.5  # blocks' middles: no colour bleeds that far
    assert error.amax(dim=(0, 1)).median() <= 2


def test_what_players_are_told_of_an_mp4(tmp_path: Path) -> None:
    import av

    save_clip(moving(5, 40, 64), tmp_path / "0.mp4", 12.5)
    with av.open(str(tmp_path / "0.mp4")) as container:
        [stream] = container.streams
        assert (stream.codec_context.name, stream.pix_fmt) == ("h264", "yuv420p")
        assert (stream.height, stream.width) == (160, 256)
        assert float(stream.average_rate) == 12.5
        assert stream.frames == 5
        assert (stream.codec_context.colorspace, stream.codec_context.color_range) == (1, 1)
    data = (tmp_path / "0.mp4").read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")  # plays while it loads


def test_odd_sides_become_even_by_repeating_the_edge(tmp_path: Path) -> None:
    clip = moving(3, 301, 401)
    save_clip(clip, tmp_path / "0.mp4", 8)
    read = read_media(tmp_path / "0.mp4").int()
    assert read.shape == (3, 3, 302, 402)
    assert (read[:, :, :301, :401] - to_uint8(clip).int()).abs().float().mean() < 0.5


@pytest.mark.parametrize("clip", [moving(), noise(4, 3, 7, 5), noise(1, 3, 6, 6)], ids=["moving", "noise", "one frame"])
def test_webp_loses_nothing(tmp_path: Path, clip: torch.Tensor) -> None:
    save_clip(clip, tmp_path / "0.webp", 8)
    assert torch.equal(read_media(tmp_path / "0.webp"), to_uint8(clip))


def test_a_frozen_clip_keeps_all_its_frames(tmp_path: Path) -> None:
    clip = moving(1).repeat(9, 1, 1, 1)
    for name in ("0.webp", "0.mp4"):
        save_clip(clip, tmp_path / name, 8)
        assert len(read_media(tmp_path / name)) == 9


def test_webp_lasts_as_long_as_its_frames(tmp_path: Path) -> None:
    save_clip(noise(25, 3, 4, 4), tmp_path / "0.webp", 24)
    with Image.open(tmp_path / "0.webp") as file:
        durations = []
        for index in range(file.n_frames):
            file.seek(index)
            file.load()
            durations.append(file.info["duration"])
        assert file.info["loop"] == 0
    assert set(durations) == {41, 42}
    assert sum(durations) == round(25 / 24 * 1000)


def test_a_clip_of_bytes_is_the_clip(tmp_path: Path) -> None:
    save_clip(to_uint8(moving()), tmp_path / "bytes.webp", 8)
    save_clip(moving(), tmp_path / "floats.webp", 8)
    assert (tmp_path / "bytes.webp").read_bytes() == (tmp_path / "floats.webp").read_bytes()


def test_a_failed_mp4_keeps_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import av

    save_clip(moving(3), tmp_path / "0.mp4", 8)
    old = (tmp_path / "0.mp4").read_bytes()

    def full(*_: object, **__: object) -> None:
        raise av.FFmpegError(28, "No space left on device")

    monkeypatch.setattr(av.VideoFrame, "from_ndarray", full)
    with pytest.raises(CheckpointError, match="No space left"):
        save_clip(moving(3), tmp_path / "0.mp4", 8)
    assert (tmp_path / "0.mp4").read_bytes() == old
    assert [file.name for file in tmp_path.iterdir()] == ["0.mp4"]


def test_what_is_no_clip_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="NaN"):
        save_clip(torch.full((2, 3, 4, 4), float("nan")), tmp_path / "0.webp", 8)
    with pytest.raises(ValueError, match=r"a clip is \(F, 3, H, W\), not \(3, 4, 4\)"):
        save_clip(torch.zeros(3, 4, 4), tmp_path / "0.webp", 8)
    with pytest.raises(ValueError, match=r"0.gif: clips are written as .mp4 or .webp"):
        save_clip(torch.zeros(2, 3, 4, 4), tmp_path / "0.gif", 8)


def test_small_clips_are_kept_without_loss_and_large_ones_as_mp4() -> None:
    assert clip_suffix(torch.empty(9, 3, 32, 32)) == ".webp"
    assert clip_suffix(torch.empty(53, 3, 480, 480)) == ".mp4"


def test_fit_averages_what_is_too_large_and_leaves_the_rest() -> None:
    clip = noise(2, 3, 8, 12)
    assert torch.allclose(fit(clip, 6), torch.nn.functional.avg_pool2d(clip, 2), atol=1e-6)
    assert fit(clip, 12) is clip


def test_a_moving_grid_holds_every_clip_in_step() -> None:
    clips = [
        torch.full((4, 3, 2, 2), 10 * k, dtype=torch.uint8) + torch.arange(4).view(4, 1, 1, 1).byte() for k in (1, 2, 3)
    ]
    sheet = clip_grid(clips, columns=2)
    assert sheet.shape == (4, 3, 6, 6)
    assert sheet[:, 0, 0, [0, 4]].tolist() == [[10 + f, 20 + f] for f in range(4)]
    assert sheet[:, 0, 4, [0, 4]].tolist() == [[30 + f, 255] for f in range(4)]


def test_film_strips_go_from_the_first_frame_to_the_last() -> None:
    clips = [torch.arange(k, k + 9).byte().view(9, 1, 1, 1).expand(9, 3, 2, 2) for k in (0, 100)]
    sheet = film_strips(clips, columns=3)
    assert sheet[0, ::4, ::4].tolist() == [[0, 4, 8], [100, 104, 108]]
