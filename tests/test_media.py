"""Pictures keep their pixels on the way to a file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from dancegrpo.errors import CheckpointError
from dancegrpo.media import grid, save_image, to_uint8


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
