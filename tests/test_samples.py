"""A run's samples are written in the background, in order, whole, and no failure goes unheard."""

from __future__ import annotations

import json
import re
import threading
import time
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from dancegrpo import cli, evaluate, load_config, samples, train
from dancegrpo.background import BackgroundWriter
from dancegrpo.errors import CheckpointError, ConfigError, MediaError, PromptError
from dancegrpo.inference import draw
from dancegrpo.media import grid, read_media, save_image, to_uint8
from dancegrpo.policies import Condition
from dancegrpo.prompts import Prompt, open_prompts
from dancegrpo.samples import write_samples
from dancegrpo.trainer import Trainer
from toy import ToyPolicy


def test_writes_keep_their_order_and_are_done_on_leaving() -> None:
    done: list[int] = []
    with BackgroundWriter(capacity=2) as writer:
        for number in range(20):
            writer.submit(lambda number=number: (time.sleep(0.001), done.append(number)))
    assert done == list(range(20))


def test_the_caller_goes_on_while_a_file_is_written() -> None:
    go, done = threading.Event(), []
    with BackgroundWriter() as writer:
        writer.submit(lambda: (go.wait(10), done.append(threading.current_thread())))
        writer.check()
        assert done == []
        go.set()
        writer.flush()
        assert done != [threading.current_thread()]
        assert len(done) == 1


def test_what_waits_is_bounded() -> None:
    go, submitted = threading.Event(), []

    def submit_all() -> None:
        for number in range(6):
            writer.submit(lambda: go.wait(10))
            submitted.append(number)

    with BackgroundWriter(capacity=2) as writer:
        feeder = threading.Thread(target=submit_all)
        feeder.start()
        feeder.join(0.1)
        assert len(submitted) <= 3  # one under way, two waiting
        go.set()
        feeder.join(10)
        assert len(submitted) == 6


def fail() -> None:
    raise CheckpointError("cannot write 0.mp4: No space left on device; free space or name another folder")


def test_a_failure_is_raised_once_and_what_follows_it_is_dropped() -> None:
    done: list[str] = []
    go = threading.Event()
    with BackgroundWriter() as writer:
        writer.submit(lambda: go.wait(10))
        writer.submit(fail)
        writer.submit(lambda: done.append("written"), then=lambda: done.append("told"))
        go.set()
        with pytest.raises(CheckpointError, match="No space left"):
            writer.flush()
        assert done == []
        writer.submit(lambda: done.append("later"))
    assert done == ["later"]


def test_a_failure_of_the_last_write_is_raised_on_leaving() -> None:
    with pytest.raises(CheckpointError, match="No space left"), BackgroundWriter() as writer:
        writer.submit(fail)


def test_an_error_under_way_waits_for_the_files_and_stays_the_error() -> None:
    done: list[int] = []

    def interrupted() -> None:
        with BackgroundWriter() as writer:
            writer.submit(lambda: (time.sleep(0.05), done.append(1)))
            writer.submit(fail)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert done == [1]


def test_who_wanted_to_know_is_told_by_the_thread_that_checks() -> None:
    told: list[threading.Thread] = []
    with BackgroundWriter() as writer:
        writer.submit(lambda: None, then=lambda: told.append(threading.current_thread()))
        writer.flush()
        assert told == [threading.current_thread()]


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def test_pictures_are_written_as_ever(tmp_path: Path) -> None:
    pictures = torch.rand(8, 1, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    with BackgroundWriter() as writer:
        write_samples(iter(pictures), tmp_path / "new", fps=8, writer=writer)
    for number, picture in enumerate(pictures[:, 0]):
        save_image(picture, tmp_path / "old" / f"{number}.png")
    save_image(grid(list(pictures[:, 0]), columns=6), tmp_path / "old" / "grid.png")
    assert names(tmp_path / "new") == names(tmp_path / "old")
    for name in names(tmp_path / "old"):
        assert (tmp_path / "new" / name).read_bytes() == (tmp_path / "old" / name).read_bytes()


def test_large_clips_are_mp4_and_their_sheet_is_shrunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dancegrpo.samples.SHEET_SIDE", 80)
    monkeypatch.setattr("dancegrpo.video.LOSSLESS_PIXELS", 9 * 256 * 320 - 1)
    clips = torch.zeros(2, 9, 3, 256, 320) + torch.linspace(0, 1, 9).view(9, 1, 1, 1)
    with BackgroundWriter() as writer:
        write_samples(clips, tmp_path, fps=8, writer=writer)
    assert names(tmp_path) == ["0.mp4", "1.mp4", "grid.mp4", "grid.png"]
    assert read_media(tmp_path / "0.mp4").shape == (9, 3, 256, 320)
    assert read_media(tmp_path / "grid.mp4").shape == (9, 3, 64, 162)
    strips = read_media(tmp_path / "grid.png")
    assert strips.shape == (1, 3, 2 * 34 - 2, 8 * 42 - 2)
    assert strips[0, 0, 16, 20::42].tolist() == [0, 32, 64, 96, 159, 191, 223, 255]


class MovingToy(ToyPolicy):
    """Clips of 5 frames that get darker."""

    def decode(self, latents: Tensor, condition: object) -> Tensor:
        return super().decode(latents, condition) * torch.linspace(1, 0.2, 5).view(1, 5, 1, 1, 1)  # type: ignore[arg-type]


def last_frame(media, prompts):
    return media[:, -1].mean(dim=(1, 2, 3))


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict:
    monkeypatch.setattr("dancegrpo.trainer.load_policy", lambda *_, **__: MovingToy(num_steps=4))
    (tmp_path / "train.txt").write_text("one dot\ntwo dots\nthree dots\n")
    return {
        "name": "toy",
        "iterations": 2,
        "threads": 1,
        "output": str(tmp_path / "runs"),
        "model": {"path": "toy", "num_frames": 5, "fps": 10},
        "prompts": {"train": str(tmp_path / "train.txt"), "per_iteration": 2},
        "rollout": {"group_size": 4, "num_steps": 4, "noise_level": 0.7, "shift": 1.5},
        "rewards": {"dark": {"judge": "test_samples:last_frame"}},
        "evaluation": {"num_prompts": 0, "samples": 3, "every": 1},
        "optimizer": {"learning_rate": 0.1},
        "tracking": {"backend": "none"},
    }


def test_a_run_of_clips_leaves_them_and_its_report_plays_them(settings: dict) -> None:
    result = train(load_config(settings), rewards={"dark": lambda media, prompts: media.flatten(1).mean(dim=1)})
    samples = result.run_dir / "samples"
    assert names(samples) == ["000000", "000001", "000002", "prompts.json"]
    for folder in ("000000", "000001", "000002"):
        assert names(samples / folder) == ["0.webp", "1.webp", "2.webp", "grid.mp4", "grid.png"]
    before, after = (read_media(samples / folder / "1.webp") for folder in ("000000", "000002"))
    assert before.shape == after.shape == (5, 3, 2, 2)
    assert not torch.equal(before, after)
    assert len(read_media(samples / "000002" / "grid.mp4")) == 5
    assert len(json.loads((samples / "prompts.json").read_text())) == 3
    page = result.report.read_text()
    assert page.count('data-frames="5"') == 9
    assert page.count('data-fps="10.0"') == 9


def test_clips_on_disk_are_what_the_policy_drew(settings: dict) -> None:
    run = train(
        load_config(settings, ["iterations=1"]), rewards={"dark": lambda media, prompts: media.flatten(1).mean(1)}
    )
    prompts = list(open_prompts(settings["prompts"]["train"]))
    drawn = evaluate.pictures(MovingToy(num_steps=4), prompts, seed=load_config(settings).evaluation.seed, batch_size=3)
    [(_, media)] = list(drawn)
    for number, clip in enumerate(media):
        assert torch.equal(read_media(run.run_dir / "samples" / "000000" / f"{number}.webp"), to_uint8(clip))


def test_a_write_that_fails_ends_the_run_in_one_line(settings: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, *_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dancegrpo.video.Path.write_bytes", full)
    with pytest.raises(CheckpointError, match=r"^cannot write .*0\.webp: No space left on device; free space"):
        train(load_config(settings), rewards={"dark": lambda media, prompts: media.flatten(1).mean(dim=1)})
    [run] = Path(settings["output"]).glob("toy*")
    assert json.loads((run / "run.json").read_text())["status"] == "failed"
    assert not (run / "samples" / "000000").exists() or names(run / "samples" / "000000") == []


@pytest.mark.parametrize("every", [0, 1])
def test_a_write_that_fails_costs_no_iteration(settings: dict, monkeypatch: pytest.MonkeyPatch, every: int) -> None:
    """The clips drawn after the first iteration fail while the second one runs."""
    second, iterate, save_clip = threading.Event(), Trainer.iterate, samples.save_clip

    def full(clip: Tensor, path: Path, fps: float) -> None:
        if path.parent.name == "000001":
            second.wait(10)
            raise CheckpointError(f"cannot write {path}: No space left on device; free space")
        save_clip(clip, path, fps)

    def iterated(self: Trainer, iteration: int) -> dict:
        if iteration == 1:
            second.set()
            self.writer._waiting.join()
        return iterate(self, iteration)

    judge = {"dark": lambda media, prompts: media.flatten(1).mean(dim=1)}
    monkeypatch.setattr("dancegrpo.samples.save_clip", full)
    monkeypatch.setattr(Trainer, "iterate", iterated)
    with pytest.raises(CheckpointError, match=r"^cannot write .*000001/0\.webp: No space left"):
        train(load_config(settings, [f"checkpoint.every={every}", "iterations=3"]), rewards=judge)
    [run] = Path(settings["output"]).glob("toy*")
    assert max((run / "checkpoints").iterdir()).name == "000002"
    monkeypatch.setattr("dancegrpo.samples.save_clip", save_clip)
    assert train(resume=run, rewards=judge).iterations == 3
    assert [json.loads(line)["iteration"] for line in (run / "metrics.jsonl").read_text().splitlines()] == [0, 1, 2]
    assert (run / "samples" / "000002" / "grid.png").is_file()


@pytest.mark.parametrize("frames", [1, 5])
def test_a_sample_with_nan_is_named_in_one_line(tmp_path: Path, frames: int) -> None:
    media = torch.zeros(3, frames, 3, 4, 4)
    media[1, -1, 0, 2, 3] = torch.nan
    told = f"sample 1 of {tmp_path}: the samples hold NaN: look at the weights or model.dtype"
    with pytest.raises(MediaError, match=f"^{re.escape(told)}$"), BackgroundWriter() as writer:
        write_samples(media, tmp_path, fps=8, writer=writer)
    assert not (tmp_path / "grid.png").exists()


def test_sample_names_the_file_that_would_hold_nan(
    settings: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken(MovingToy):
        def decode(self, latents: Tensor, condition: object) -> Tensor:
            return super().decode(latents, condition) * torch.nan

    monkeypatch.setattr("dancegrpo.inference.load_policy", lambda *_, **__: Broken(num_steps=4))
    (tmp_path / "toy.yaml").write_text(json.dumps(settings))
    with pytest.raises(MediaError, match=r"000-00\.mp4: the samples hold NaN: look at the weights or model\.dtype$"):
        draw(str(tmp_path / "toy.yaml"), ["one dot"], count=1, seed=0, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


class AnimatingToy(MovingToy):
    """Tells what it was asked to animate."""

    takes_image = True
    asked: ClassVar[list[Prompt]] = []

    def encode(self, prompts: list[Prompt]) -> Condition:
        self.asked.extend(prompts)
        return super().encode(prompts)


def test_sample_animates_one_image_for_every_text(
    settings: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dancegrpo.inference.load_policy", lambda *_, **__: AnimatingToy(num_steps=4))
    monkeypatch.setattr(AnimatingToy, "asked", [])
    (tmp_path / "toy.yaml").write_text(json.dumps(settings))
    image = tmp_path / "first.png"
    save_image(torch.rand(3, 4, 4), image)
    words = ["sample", str(tmp_path / "toy.yaml"), "--prompt", "one", "--prompt", "two", "--count", "1"]
    monkeypatch.setattr("sys.argv", ["dancegrpo", *words, "--image", str(image), "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    assert [(prompt.text, prompt.image) for prompt in AnimatingToy.asked] == [("one", image), ("two", image)]
    assert names(tmp_path / "out") == ["000-00.mp4", "001-00.mp4"]


@pytest.mark.parametrize(
    ("policy", "texts", "image", "told"),
    [
        (AnimatingToy, ["one"], "gone.png", r"^--image .*gone\.png does not exist: name a picture file$"),
        (AnimatingToy, ["one"], None, "^toy animates images: name the first frame with --image FILE$"),
        (AnimatingToy, [], "there.png", r"^--image .*there\.png goes with --prompt: "),
        (MovingToy, ["one"], "there.png", r"^--image .*there\.png would do nothing: toy animates no images, "),
    ],
)
def test_sample_refuses_an_image_out_of_place(
    settings: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, policy, texts, image, told
) -> None:
    monkeypatch.setattr("dancegrpo.inference.load_policy", lambda *_, **__: policy(num_steps=4))
    (tmp_path / "toy.yaml").write_text(json.dumps(settings))
    save_image(torch.rand(3, 4, 4), tmp_path / "there.png")
    given = None if image is None else tmp_path / image
    with pytest.raises(PromptError, match=told):
        draw(str(tmp_path / "toy.yaml"), texts, count=1, seed=0, out=tmp_path / "out", image=given)


def test_sample_writes_clips_in_the_form_asked_for(
    settings: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dancegrpo.inference.load_policy", lambda *_, **__: MovingToy(num_steps=4))
    recipe = tmp_path / "toy.yaml"
    recipe.write_text(json.dumps(settings))
    for form, suffix in ((None, ".mp4"), ("webp", ".webp")):
        files = draw(str(recipe), ["one dot"], count=2, seed=0, out=tmp_path / "out", form=form)
        assert [file.name for file in files] == [f"000-00{suffix}", f"000-01{suffix}"]
        assert [len(read_media(file)) for file in files] == [5, 5]
    with pytest.raises(ConfigError, match=r"holds one frame, model\.num_frames=5 makes clips: use mp4 or webp"):
        draw(str(recipe), ["one dot"], count=1, seed=0, out=tmp_path / "out", form="png")
    recipe.write_text(json.dumps({**settings, "model": {"path": "toy"}}))
    with pytest.raises(ConfigError, match=r"mp4 is for clips, model\.num_frames=1 makes pictures: use png or webp"):
        draw(str(recipe), ["one dot"], count=1, seed=0, out=tmp_path / "out", form="mp4")
