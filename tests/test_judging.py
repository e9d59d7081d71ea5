"""Judges outside training: `dancegrpo score` and `dancegrpo rewards`."""

from __future__ import annotations

import csv
import importlib
import io
import json

import av
import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from dancegrpo.cli import app
from dancegrpo.errors import CheckpointError, ConfigError, MediaError, PromptError, RewardError
from dancegrpo.judging import list_judges, score_files
from dancegrpo.media import find_media, read_media
from dancegrpo.rewards import CATALOG

JUDGE = "judge_of_tests:brightness"


@pytest.fixture(autouse=True)
def brightness(tmp_path, monkeypatch):
    """A judge in the current folder: the mean of the picture, none for the prompt `silent`."""
    code = "def brightness(images, prompts, times=1):\n"
    code += "    return [None if p == 'silent' else float(i.mean()) * times for i, p in zip(images, prompts)]\n"
    (tmp_path / "judge_of_tests.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    monkeypatch.delitem(importlib.import_module("sys").modules, "judge_of_tests", raising=False)


def picture(path, level, size=(6, 4)):
    Image.new("RGB", size, (level,) * 3).save(path)
    return path


def test_files_are_scored_in_the_order_a_person_counts_whatever_their_sizes(tmp_path):
    folder = tmp_path / "made"
    folder.mkdir()
    for number, level, size in ((10, 255, (6, 4)), (2, 51, (5, 5)), (1, 0, (6, 4))):
        picture(folder / f"{number}.png", level, size)
    rows = score_files(JUDGE, ["options.times=2"], [folder], prompt="x")
    assert [row.file.name for row in rows] == ["1.png", "2.png", "10.png"]
    assert [row.value for row in rows] == pytest.approx([0.0, 0.4, 2.0])


def test_prompts_go_with_files_and_a_failure_is_told_not_numbered(tmp_path):
    for name in "ab":
        picture(tmp_path / f"{name}.png", 255)
    (tmp_path / "prompts.txt").write_text("loud\nsilent\n")
    rows = score_files(JUDGE, [], [tmp_path], prompts=str(tmp_path / "prompts.txt"))
    assert [(row.prompt, row.value, row.cause) for row in rows] == [
        ("loud", 1.0, None),
        ("silent", None, "the score is not a finite number"),
    ]


def test_a_clip_is_scored_by_all_its_frames(tmp_path):
    frames = [Image.new("RGB", (4, 4), (level,) * 3) for level in (0, 255)]
    frames[0].save(tmp_path / "clip.webp", save_all=True, append_images=frames[1:], lossless=True)
    (row,) = score_files(JUDGE, [], [tmp_path / "clip.webp"], prompt="x")
    assert row.value == pytest.approx(0.5)


def test_mp4_frames_come_back_in_order(tmp_path):
    with av.open(str(tmp_path / "clip.mp4"), "w") as file:
        stream = file.add_stream("mpeg4", rate=4)
        stream.width, stream.height, stream.pix_fmt = 32, 16, "yuv420p"
        for level in (20, 120, 220):
            pixels = np.full((16, 32, 3), level, np.uint8)
            file.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        file.mux(stream.encode())
    read = read_media(tmp_path / "clip.mp4")
    assert read.shape == (3, 3, 16, 32)
    assert read.dtype == torch.uint8
    assert read.float().mean((1, 2, 3)).tolist() == pytest.approx([20, 120, 220], abs=6)


def test_what_is_transparent_shows_white(tmp_path):
    Image.new("RGBA", (2, 2), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert bool((read_media(tmp_path / "clear.png") == 255).all())


@pytest.mark.parametrize(("suffix", "content"), [("png", b"\x89PNG\r\n\x1a\nhalf"), ("mp4", b"no clip"), ("gif", b"")])
def test_a_damaged_file_is_named(tmp_path, suffix, content):
    path = tmp_path / f"broken.{suffix}"
    path.write_bytes(content)
    with pytest.raises(MediaError, match=rf"broken\.{suffix} cannot be read .*damaged"):
        read_media(path)


def test_sixteen_bit_pictures_are_refused_rather_than_read_as_white(tmp_path):
    Image.fromarray(np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)).save(tmp_path / "deep.png")
    with pytest.raises(MediaError, match=r"deep\.png has more than 8 bits per channel"):
        read_media(tmp_path / "deep.png")


def test_a_clip_without_video_is_named(tmp_path):
    with av.open(str(tmp_path / "sound.mp4"), "w") as file:
        stream = file.add_stream("aac", rate=8000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        sound.sample_rate = 8000
        file.mux(stream.encode(sound))
        file.mux(stream.encode())
    with pytest.raises(MediaError, match=r"sound\.mp4 has no video in it"):
        read_media(tmp_path / "sound.mp4")


def test_names_with_odd_digits_are_sorted_all_the_same(tmp_path):
    for name in ("1²3.png", "10.png", "9.png"):
        picture(tmp_path / name, 0)
    assert [path.name for path in find_media([tmp_path])] == ["1²3.png", "9.png", "10.png"]


def test_many_shapes_are_scored_without_holding_them_all(tmp_path, monkeypatch):
    monkeypatch.setattr("dancegrpo.judging._HELD", 3)
    for number in range(8):
        picture(tmp_path / f"{number}.png", number, (number + 1, 2))
    rows = score_files(JUDGE, [], [tmp_path], prompt="x")
    assert [row.value for row in rows] == pytest.approx([number / 255 for number in range(8)])


def test_the_prompts_column_can_be_named(tmp_path):
    picture(tmp_path / "a.png", 255)
    (tmp_path / "p.jsonl").write_text('{"prompt": "a dog", "tag": "single_object", "include": []}\n')
    (row,) = score_files(JUDGE, [], [tmp_path / "a.png"], prompts=str(tmp_path / "p.jsonl"), column="prompt")
    assert row.prompt == "a dog"


def test_a_truncated_picture_is_named(tmp_path):
    whole = tmp_path / "whole.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(whole)
    (tmp_path / "cut.png").write_bytes(whole.read_bytes()[:3000])
    with pytest.raises(MediaError, match=r"cut\.png cannot be read"):
        read_media(tmp_path / "cut.png")


def test_paths_that_are_no_media_are_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "empty").mkdir()
    for path, message in (
        ("gone.png", "does not exist"),
        ("notes.txt", "no picture or clip: use"),
        ("empty", "no picture or clip in"),
    ):
        with pytest.raises(MediaError, match=message):
            find_media([tmp_path / path])


def test_as_many_prompts_as_files_are_asked_for(tmp_path):
    picture(tmp_path / "a.png", 0)
    (tmp_path / "prompts.txt").write_text("one\ntwo\n")
    with pytest.raises(PromptError, match="2 prompts for 1 files"):
        score_files(JUDGE, [], [tmp_path], prompts=str(tmp_path / "prompts.txt"))
    with pytest.raises(PromptError, match="both given"):
        score_files(JUDGE, [], [tmp_path], prompts=str(tmp_path / "prompts.txt"), prompt="x")


@pytest.mark.parametrize(
    ("judge", "overrides", "error", "message"),
    [
        ("hsp", [], RewardError, "did you mean 'hps'"),
        (JUDGE, ["option.times=2"], ConfigError, "options"),
        (JUDGE, ["options.tmes=2"], RewardError, "times"),
        (JUDGE, ["weight"], ConfigError, "not key=value"),
    ],
)
def test_a_wrong_judge_or_setting_is_one_line(tmp_path, judge, overrides, error, message):
    picture(tmp_path / "a.png", 0)
    with pytest.raises(error, match=message) as refused:
        score_files(judge, overrides, [tmp_path], prompt="x")
    assert "\n" not in str(refused.value)


def test_the_command_prints_a_table_json_and_csv(tmp_path):
    picture(tmp_path / "a.png", 255)
    picture(tmp_path / "b.png", 0)
    (tmp_path / "p.txt").write_text("loud\nsilent\n")
    call = ["score", JUDGE, "--media", str(tmp_path), "--prompts", str(tmp_path / "p.txt")]
    table = CliRunner().invoke(app, [*call, "--csv", str(tmp_path / "out.csv")])
    assert table.exit_code == 0, table.output
    assert "1.0000" in table.output
    assert "mean of 1 of 2" in table.output
    told = json.loads(CliRunner().invoke(app, [*call, "--json"]).output)
    assert (told["mean"], told["scored"], told["files"][1]["score"]) == (1.0, 1, None)
    rows = list(csv.DictReader(io.StringIO((tmp_path / "out.csv").read_text())))
    assert [row["score"] for row in rows] == ["1.0", ""]


def test_scores_are_printed_before_a_file_that_cannot_be_written_is_told_of(tmp_path):
    path = picture(tmp_path / "a.png", 255)
    told = CliRunner().invoke(app, ["score", JUDGE, "--media", str(path), "--csv", "/proc/nowhere/a.csv"])
    assert "1.0000" in told.output
    assert isinstance(told.exception, CheckpointError)


def test_the_command_fails_where_nothing_could_be_scored(tmp_path):
    path = picture(tmp_path / "a.png", 255)
    told = CliRunner().invoke(app, ["score", JUDGE, "--media", str(path), "--prompt", "silent"])
    assert told.exit_code == 1
    assert "mean of 0 of 1" in told.output


def test_every_shipped_judge_is_listed_with_what_it_needs(monkeypatch):
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda repo, file: None)
    listed = {judge.name: judge for judge in list_judges()}
    assert listed.keys() == CATALOG.keys()
    assert listed["hps"].weights[0] == ("xswu/HPSv2/HPS_v2.1_compressed.pt", False)
    told = CliRunner().invoke(app, ["rewards"]).output
    assert "HPS_v2.1_compressed.pt (not here)" in told


def test_weights_in_the_cache_are_seen(monkeypatch):
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda repo, file: f"/cache/{file}")
    assert all(here for judge in list_judges() for _, here in judge.weights)


@pytest.mark.parametrize(("line", "here"), [("numpy>=1", True), ("no-such-package", False), (None, False)])
def test_an_extra_counts_as_installed_where_all_of_it_is(monkeypatch, line, here):
    lines = [f'{line}; extra == "ocr"'] if line else ["torch", "wandb; extra == 'wandb'"]
    monkeypatch.setattr("importlib.metadata.requires", lambda name: lines)
    assert {judge.name: judge.extra for judge in list_judges()}["ocr"] == ("ocr", here)


@pytest.mark.parametrize("name", sorted(CATALOG))
def test_every_entry_names_a_class_that_exists(name):
    module, _, attribute = CATALOG[name].target.partition(":")
    judge = getattr(importlib.import_module(module), attribute)
    assert getattr(judge, "pictures_only", False) == (CATALOG[name].takes == "pictures" and name != "shapes")
