"""Preference files: how they are read, fitted to a model and refused; DPO learning from one, end to end."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from PIL import Image

from dancegrpo import load_config, train
from dancegrpo.errors import ConfigError, MediaError, PromptError
from dancegrpo.media import save_image
from dancegrpo.policies import load_policy
from dancegrpo.preferences import fit, read_pair
from dancegrpo.prompts import Prompt, open_prompts
from dancegrpo.run_folder import RunFolder
from dancegrpo.trainer import Trainer
from dancegrpo.video import save_clip
from test_trainer import assert_same_run, metrics
from toy import ToyPolicy

BLACK, WHITE = (0, 0, 0), (255, 255, 255)


def picture(path: Path, colour: tuple[int, int, int], size: tuple[int, int] = (4, 4)) -> Path:
    Image.new("RGB", size, colour).save(path)
    return path


def encoded(colour: tuple[int, int, int], size: tuple[int, int] = (4, 4)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two pictures, `white.png` and `black.png`."""
    picture(tmp_path / "white.png", WHITE)
    picture(tmp_path / "black.png", BLACK)
    return tmp_path


def records(path: Path, rows: list[dict[str, Any]]) -> Path:
    match path.suffix:
        case ".jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        case ".csv":
            with path.open("w", newline="") as file:
                writer = csv.DictWriter(file, rows[0])
                writer.writeheader()
                writer.writerows(rows)
        case _:
            pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)
    return path


def row(text: str = "a wall", chosen: Any = "white.png", rejected: Any = "black.png", **more: Any) -> dict[str, Any]:
    return {"prompt": text, "chosen": chosen, "rejected": rejected, **more}


def compared(first: float | None, second: float | None, caption: str = "a wall") -> dict[str, Any]:
    """A row of Pick-a-Pic: white, black, and how they were judged."""
    labels = {"label_0": first, "label_1": second, "has_label": True, "user_id": 7}
    return {"caption": caption, "jpg_0": encoded(WHITE), "jpg_1": encoded(BLACK), **labels}


def refusal(source: str, **options: Any) -> str:
    with pytest.raises(PromptError) as caught:
        list(open_prompts(source, **options))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def brightness(prompt: Prompt, shape: tuple[int, ...] = (1, 3, 4, 4)) -> tuple[float, float]:
    chosen, rejected = read_pair(prompt, shape)
    return chosen.mean().item(), rejected.mean().item()


# ------------------------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_each_record_brings_its_two_sides(folder: Path, suffix: str) -> None:
    file = records(folder / f"p.{suffix}", [row(), row("a door", "black.png", "white.png")])
    found = list(open_prompts(f"preferences:{file}"))
    assert [prompt.text for prompt in found] == ["a wall", "a door"]
    assert found[0].pair == (folder / "white.png", folder / "black.png")
    assert [brightness(prompt) for prompt in found] == [(1.0, 0.0), (0.0, 1.0)]
    assert all(not prompt.metadata for prompt in found)


@pytest.mark.parametrize("struct", [False, True])
def test_pictures_may_lie_in_the_table(folder: Path, struct: bool) -> None:
    def side(colour: tuple[int, int, int]) -> Any:
        return {"bytes": encoded(colour), "path": None} if struct else encoded(colour)

    rows = [row(f"wall {n}", side(WHITE), side(BLACK), who="me") for n in range(5)]
    source = open_prompts(f"preferences:{records(folder / 'p.parquet', rows)}")
    assert [brightness(source[index]) for index in (4, 0, 3)] == [(1.0, 0.0)] * 3
    assert source[4].text == "wall 4"
    assert source[4].metadata == {"who": "me"}


def test_a_table_may_hold_one_side_and_name_the_other(folder: Path) -> None:
    file = records(folder / "p.parquet", [row(chosen=encoded(WHITE))])
    assert brightness(open_prompts(f"preferences:{file}")[0]) == (1.0, 0.0)


def test_a_record_may_bring_an_image_beside_its_pair(folder: Path) -> None:
    rows = [row(chosen=encoded(WHITE), image=encoded((9, 9, 9)), negative="blur") for _ in range(3)]
    source = open_prompts(f"preferences:{records(folder / 'p.parquet', rows)}")
    assert source.first_without_image is None
    assert source[2].image.getpixel((0, 0)) == (9, 9, 9)
    assert source[2].negative == "blur"
    assert brightness(source[2]) == (1.0, 0.0)


def test_datasets_of_the_hub_are_read(folder: Path) -> None:
    (folder / "set").mkdir()
    records(folder / "set" / "train.parquet", [compared(0.0, 1.0), compared(0.5, 0.5), compared(1.0, 0.0)])
    source = open_prompts(f"pickapic-pairs:hf:{folder / 'set'}")
    assert [brightness(prompt) for prompt in source] == [(0.0, 1.0), (1.0, 0.0)]
    assert source.ties == 1


@pytest.mark.parametrize("name", ["prompt", "text", "wording"])
def test_the_text_is_in_prompt_or_text_or_the_column_that_is_named(folder: Path, name: str) -> None:
    record = {name: "a wall", "chosen": "white.png", "rejected": "black.png"}
    column = {"column": name} if name == "wording" else {}
    file = records(folder / "p.jsonl", [record])
    assert [prompt.text for prompt in open_prompts(f"preferences:{file}", **column)] == ["a wall"]


def test_pictures_may_lie_in_a_folder_of_their_own(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    file = records(tmp_path_factory.mktemp("list") / "p.jsonl", [row(chosen="elsewhere/white.png")])
    assert brightness(open_prompts(f"preferences:{file}", images=str(folder))[0]) == (1.0, 0.0)


def test_pick_a_pic_labels_decide_and_ties_are_counted(folder: Path) -> None:
    rows = [compared(1, 0), compared(0.5, 0.5), compared(0, 1), compared(None, None), compared(1, 0, " ")]
    source = open_prompts(f"pickapic-pairs:{records(folder / 'p.parquet', rows)}")
    assert [brightness(prompt) for prompt in source] == [(1.0, 0.0), (0.0, 1.0)]
    assert source.ties == 2
    assert "jpg_0" not in source[0].metadata


def test_a_prompt_of_several_pairs_keeps_them_all_and_unique_only_repeats(folder: Path) -> None:
    rows = [row(), row(chosen="black.png", rejected="white.png"), row()]
    file = records(folder / "p.jsonl", rows)
    assert len(open_prompts(f"preferences:{file}")) == 3
    assert len(open_prompts(f"preferences:{file}", unique=True)) == 2


def test_repeats_of_pictures_in_a_table_are_told_by_their_bytes(folder: Path) -> None:
    rows = [compared(1, 0), compared(0, 1), compared(1, 0)]
    assert len(open_prompts(f"pickapic-pairs:{records(folder / 'p.parquet', rows)}", unique=True)) == 2


def test_pictures_in_a_table_stay_there_until_asked_for(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dancegrpo.prompt_tables.CHECKED", 2)
    monkeypatch.setattr("dancegrpo.prompts.CHECKED", 2)
    rows = [row(f"wall {n}", encoded(WHITE), encoded(BLACK)) for n in range(8)]
    asked: list[list[str] | None] = []
    batches = pq.ParquetFile.iter_batches

    def noted(self: Any, size: int, columns: list[str]) -> Any:
        for batch in batches(self, size, columns=columns):
            asked.append(columns)
            yield batch

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", noted)
    source = open_prompts(f"preferences:{records(folder / 'p.parquet', rows)}")
    assert asked == [["prompt"], ["chosen", "rejected"]]
    assert brightness(source[7]) == (1.0, 0.0)


# ------------------------------------------------------------------------------------------------------------- refused


def test_a_missing_picture_is_named(folder: Path) -> None:
    told = refusal(f"preferences:{records(folder / 'p.jsonl', [row(), row(rejected='gone.png')])}")
    assert told.startswith(f"{folder / 'p.jsonl'} line 2: image 'gone.png' is not a file")


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_a_corrupt_picture_is_named(folder: Path, suffix: str) -> None:
    (folder / "bad.png").write_bytes(b"no picture")
    told = refusal(f"preferences:{records(folder / f'p.{suffix}', [row(rejected='bad.png')])}")
    assert f"image {folder / 'bad.png'} cannot be read" in told


def test_corrupt_bytes_name_their_row(folder: Path) -> None:
    rows = [compared(1, 0), compared(1, 0) | {"jpg_1": b"no picture"}]
    told = refusal(f"pickapic-pairs:{records(folder / 'p.parquet', rows)}")
    assert told.startswith(f"{folder / 'p.parquet'} row 2: image in its bytes cannot be read")


def test_a_picture_beyond_the_checked_ones_is_named_when_it_is_drawn(folder: Path, monkeypatch) -> None:
    monkeypatch.setattr("dancegrpo.prompts.CHECKED", 1)
    (folder / "bad.png").write_bytes(b"no picture")
    source = open_prompts(f"preferences:{records(folder / 'p.jsonl', [row(), row(rejected='bad.png')])}")
    with pytest.raises(PromptError, match=r"image .*bad\.png cannot be read"):
        read_pair(source[1], (1, 3, 4, 4))


def test_only_ties_are_refused_with_their_number(folder: Path) -> None:
    rows = [compared(0.5, 0.5), compared(0.5, 0.5)]
    told = refusal(f"pickapic-pairs:{records(folder / 'p.parquet', rows)}")
    assert told == f"{folder / 'p.parquet'} holds only ties (2): none of them is a pair to learn from"


@pytest.mark.parametrize(("suffix", "place"), [("jsonl", " line 1"), ("csv", " line 1"), ("parquet", "")])
def test_a_file_without_a_side_names_the_columns_that_it_has(folder: Path, suffix: str, place: str) -> None:
    file = records(folder / f"p.{suffix}", [{"prompt": "a wall", "chosen": "white.png", "worse": "black.png"}])
    rule = "has no field 'rejected' (it has prompt, chosen, worse): a pair needs chosen, rejected"
    assert refusal(f"preferences:{file}") == f"{file}{place} {rule}"


def test_a_file_without_labels_names_the_columns_that_it_has(folder: Path) -> None:
    record = compared(1, 0)
    del record["label_1"]
    told = refusal(f"pickapic-pairs:{records(folder / 'p.parquet', [record])}")
    assert "has no field 'label_1' (it has caption, jpg_0, jpg_1, label_0, has_label, user_id)" in told


def test_a_file_without_a_text_names_the_columns_that_it_has(folder: Path) -> None:
    told = refusal(f"preferences:{records(folder / 'p.jsonl', [{'chosen': 'white.png', 'rejected': 'black.png'}])}")
    assert told.endswith("has no field 'prompt' (it has chosen, rejected): set prompts.column to the right one")


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_an_empty_side_is_refused(folder: Path, suffix: str) -> None:
    empty = None if suffix == "parquet" else ""
    told = refusal(f"preferences:{records(folder / f'p.{suffix}', [row(), row(rejected=empty)])}")
    assert told.endswith("has nothing in 'rejected': a pair needs both sides")


def test_an_empty_side_among_bytes_is_refused(folder: Path) -> None:
    told = refusal(
        f"pickapic-pairs:{records(folder / 'p.parquet', [compared(1, 0), compared(1, 0) | {'jpg_0': None}])}"
    )
    assert told == f"{folder / 'p.parquet'} row 2 has nothing in 'jpg_0': a pair needs both sides"


def test_a_picture_against_itself_is_refused(folder: Path) -> None:
    told = refusal(f"preferences:{records(folder / 'p.jsonl', [row(rejected='./white.png')])}")
    assert told.endswith(f"chosen and rejected are both {folder / 'white.png'}: a pair needs two pictures")


def test_bytes_against_themselves_are_refused(folder: Path) -> None:
    record = compared(1, 0) | {"jpg_1": encoded(WHITE)}
    told = refusal(f"pickapic-pairs:{records(folder / 'p.parquet', [record])}")
    assert told.endswith("row 1: jpg_0 and jpg_1 are both the same bytes: a pair needs two pictures")


def test_a_label_that_is_none_is_refused(folder: Path) -> None:
    told = refusal(f"pickapic-pairs:{records(folder / 'p.parquet', [compared(0.7, 0.3)])}")
    assert told.endswith("row 1: label_0=0.7 is no label: use 1 for the preferred side, 0, or 0.5 for a tie")


def test_a_folder_of_pictures_has_no_pairs(folder: Path) -> None:
    assert "has one picture for a text" in refusal(f"preferences:images:{folder}")
    assert refusal("preferences:") == "preferences: names nothing: write preferences:FILE"


# -------------------------------------------------------------------------------------------------------------- fitted


def test_a_picture_of_the_models_size_is_not_touched() -> None:
    values = torch.randint(256, (2, 3, 5, 7), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(fit(values, 5, 7), values.float() / 255)


@pytest.mark.parametrize(("size", "wanted"), [((40, 23), (8, 8)), ((9, 31), (8, 16)), ((5, 4), (10, 10))])
def test_pictures_are_resampled_as_pillow_does_and_cut_around_the_centre(size, wanted) -> None:
    (h, w), (height, width) = size, wanted
    values = np.random.default_rng(1).integers(0, 256, (h, w), dtype=np.uint8)
    scale = max(height / h, width / w)
    rows, columns = max(height, int(h * scale + 1e-9)), max(width, int(w * scale + 1e-9))
    resized = Image.fromarray(values.astype(np.float32) / 255).resize((columns, rows), Image.Resampling.BICUBIC)
    top, left = (rows - height) // 2, (columns - width) // 2
    expected = np.clip(np.asarray(resized), 0, 1)[top : top + height, left : left + width]
    ours = fit(torch.from_numpy(values).expand(1, 3, h, w), height, width)
    np.testing.assert_allclose(ours[0, 0].numpy(), expected, atol=2e-6)


@hypothesis_settings(max_examples=40, deadline=None)
@given(st.integers(1, 70), st.integers(1, 70), st.integers(1, 20), st.integers(1, 20))
def test_every_size_is_met_within_the_range(h: int, w: int, height: int, width: int) -> None:
    values = torch.randint(256, (1, 3, h, w), dtype=torch.uint8, generator=torch.Generator().manual_seed(h))
    fitted = fit(values, height, width)
    assert fitted.shape == (1, 3, height, width)
    assert fitted.min() >= 0
    assert fitted.max() <= 1


def test_a_picture_stands_as_its_file_says_and_shows_white_through(tmp_path: Path) -> None:
    lying = Image.new("RGBA", (2, 1), (0, 0, 0, 255))
    lying.putpixel((0, 0), (9, 9, 9, 0))
    exif = lying.getexif()
    exif[274] = 8  # its right side is up
    lying.save(tmp_path / "a.png", exif=exif)
    picture(tmp_path / "b.png", WHITE, (1, 2))
    chosen, _ = read_pair(Prompt(0, "x", pair=(tmp_path / "a.png", tmp_path / "b.png")), (1, 3, 2, 1))
    assert chosen[0, 0, :, 0].tolist() == [0.0, 1.0]


def clip(path: Path, frames: int) -> Path:
    save_clip(torch.stack([torch.full((3, 16, 16), n / frames) for n in range(frames)]), path, fps=8)
    return path


def test_clips_are_cut_to_the_models_frames_and_short_ones_refused(tmp_path: Path) -> None:
    long, short = clip(tmp_path / "long.mp4", 7), clip(tmp_path / "short.mp4", 3)
    prompt = Prompt(4, "x", pair=(long, clip(tmp_path / "other.mp4", 5)))
    chosen, rejected = read_pair(prompt, (5, 3, 16, 16))
    assert chosen.shape == rejected.shape == (5, 3, 16, 16)
    torch.testing.assert_close(chosen.mean((1, 2, 3)), torch.arange(5) / 7, atol=0.02, rtol=0)
    with pytest.raises(PromptError, match=r"pair of prompt 4 .*short\.mp4 has 3 of 5 frames"):
        read_pair(Prompt(4, "x", pair=(long, short)), (5, 3, 16, 16))
    with pytest.raises(PromptError, match="a side in its bytes has 1 of 5 frames"):
        read_pair(Prompt(4, "x", pair=(long, encoded(WHITE))), (5, 3, 16, 16))


def test_a_damaged_clip_is_named(tmp_path: Path) -> None:
    (tmp_path / "bad.mp4").write_bytes(b"no clip")
    with pytest.raises(MediaError, match=r"bad\.mp4 cannot be read"):
        read_pair(Prompt(0, "x", pair=(tmp_path / "bad.mp4", tmp_path / "bad.mp4")), (5, 3, 16, 16))


def test_a_prompt_without_a_pair_is_refused() -> None:
    with pytest.raises(PromptError, match=r"prompt 3 \('x'\) has no pair: name the file as preferences:FILE"):
        read_pair(Prompt(3, "x"), (1, 3, 4, 4))


# ------------------------------------------------------------------------------------------------------------- learned


def drawn(path: Path, folder: Path, count: int) -> Path:
    """A preference file of pictures that a pipeline drew for `count` prompts: the brighter of two is preferred."""
    from dancegrpo.evaluate import pictures
    from dancegrpo.settings import ModelConfig, RolloutConfig

    size = {"height": 16, "width": 16, "max_sequence_length": 16, "device": "cpu"}
    policy = load_policy(ModelConfig(path=str(path), **size), RolloutConfig(num_steps=3, shift=1.5))
    prompts, lines = [Prompt(n, f"a drawing of {n} dots") for n in range(count)], []
    sides = [torch.cat([media for _, media in pictures(policy, prompts, seed=s, batch_size=8)]) for s in (1, 2)]
    for prompt, *pair in zip(prompts, *sides, strict=True):
        pair.sort(key=lambda media: -media.mean().item())
        for name, media in zip(("chosen", "rejected"), pair, strict=True):
            save_image(media[0], folder / f"{prompt.id}-{name}.png")
        names = {name: f"{prompt.id}-{name}.png" for name in ("chosen", "rejected")}
        lines.append(json.dumps({"prompt": prompt.text, **names}) + "\n")
    (folder / "pairs.jsonl").write_text("".join(lines))
    return folder / "pairs.jsonl"


@pytest.fixture(scope="module")
def pairs(tiny_flux_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return drawn(tiny_flux_path, tmp_path_factory.mktemp("pairs"), 4)


@pytest.fixture
def offline(tiny_flux_path: Path, pairs: Path, tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "held.txt").write_text("one dot\ntwo dots\n")
    return {
        "name": "offline",
        "iterations": 2,
        "threads": 1,
        "output": str(tmp_path / "runs"),
        "model": {"path": str(tiny_flux_path), "height": 16, "width": 16, "max_sequence_length": 16, "device": "cpu"},
        "prompts": {"train": f"preferences:{pairs}", "evaluation": str(tmp_path / "held.txt"), "per_iteration": 4},
        "rollout": {"group_size": 1, "num_steps": 3, "shift": 1.5, "batch_size": 3},
        "rewards": {},
        "algorithm": {"name": "dpo", "dpo": {"source": "offline"}},
        "optimizer": {"learning_rate": 1e-3},
        "update": {"updates_per_rollout": 2},
        "ema": {"decay": 0.9},
        "evaluation": {"num_prompts": 2, "samples": 2, "every": 1},
        "checkpoint": {"every": 1},
        "tracking": {"backend": "none"},
    }


def test_a_run_on_a_file_of_pairs_draws_no_samples_and_needs_no_judge(offline) -> None:
    run = train(load_config(offline)).run_dir
    rows = metrics(run)
    assert [row["samples/total"] for row in rows] == [0, 0]
    assert [row["pairs/trained"] for row in rows] == [16, 16]  # 4 pairs of 4 draws
    assert all(row["train/updates"] == 2 for row in rows)
    assert rows[0]["train/loss"] > 0
    assert not (run / "evaluations").is_dir() or not list((run / "evaluations").iterdir())
    assert (run / "samples" / "000002" / "grid.png").is_file()
    assert "<html" in (run / "report.html").read_text()
    assert RunFolder(run).info()["status"] == "finished"


def test_a_judge_of_weight_0_is_asked_at_evaluations_alone(offline) -> None:
    offline["rewards"] = {"bright": {"judge": "test_trainer:brightness", "weight": 0}}
    run = train(load_config(offline)).run_dir
    assert sorted(path.name for path in (run / "evaluations").iterdir()) == [f"{n:06d}.json" for n in range(3)]
    measured = json.loads((run / "evaluations" / "000002.json").read_text())
    assert all(value is not None for value in measured["columns"]["bright"])
    assert not any(name.startswith("reward/") for name in metrics(run)[0])


def test_learning_from_pairs_prefers_what_was_preferred(offline) -> None:
    longer = ["iterations=12", "optimizer.learning_rate=3e-3", "evaluation.num_prompts=0", "evaluation.samples=0"]
    rows = metrics(train(load_config(offline, longer)).run_dir)
    assert rows[0]["train/preference_accuracy"] < 0.6  # the start prefers neither
    assert sum(row["train/preference_accuracy"] for row in rows[-3:]) / 3 >= 0.9
    assert rows[-1]["train/preference_margin"] > 10 * abs(rows[0]["train/preference_margin"])


def test_a_resumed_run_on_pairs_equals_an_uninterrupted_one(offline, tmp_path: Path) -> None:
    whole = train(load_config(offline)).run_dir
    part = train(load_config(offline, ["iterations=1"]), out=tmp_path / "part").run_dir
    train(resume=part, overrides=["iterations=2"])
    assert_same_run(whole, part)


def test_the_autoencoder_gets_so_many_pairs_at_once_as_the_rollouts_batch_has(offline, monkeypatch) -> None:
    trainer, sizes = Trainer(load_config(offline), {}), []
    latents = type(trainer.policy).latents
    monkeypatch.setattr(
        type(trainer.policy),
        "latents",
        lambda self, media, told: sizes.append(len(media)) or latents(self, media, told),
    )
    trainer.iterate(0)
    assert sizes == [3, 3, 1, 1]


def test_a_run_says_how_many_ties_it_left_out(offline, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    rows = [compared(1, 0, f"wall {n}") for n in range(4)] + [compared(0.5, 0.5)]
    file = records(tmp_path / "pick.parquet", rows)
    offline["prompts"]["train"] = f"pickapic-pairs:{file}"
    train(load_config(offline, ["iterations=1", "evaluation.num_prompts=0", "evaluation.samples=0"]))
    told = " ".join(capfd.readouterr().err.split())
    assert "1 ties of pickapic-pairs:" in told
    assert "make no pair and are left out" in told


def test_offline_learning_needs_pairs(offline, tmp_path: Path) -> None:
    offline["prompts"]["train"] = str(tmp_path / "held.txt")
    rule = r"^algorithm\.dpo\.source=offline learns from recorded pairs, and prompts\.train=.*held\.txt brings none"
    with pytest.raises(ConfigError, match=rule):
        Trainer(load_config(offline), {})


@pytest.mark.parametrize("name", ["dpo", "grpo"])
def test_pairs_need_an_algorithm_that_reads_them(offline, name: str) -> None:
    offline |= {"algorithm": {"name": name}, "rewards": {"bright": {"judge": "test_trainer:brightness"}}}
    offline["rollout"] |= {"group_size": 2, "noise_level": 0.5}
    offline["update"] = {}
    own = r"algorithm\.dpo\.source=online" if name == "dpo" else r"algorithm\.name=grpo"
    with pytest.raises(ConfigError, match=rf"prompts\.train=preferences:.* brings recorded pairs, which {own}"):
        Trainer(load_config(offline), {})


def test_a_model_that_turns_no_pictures_into_latents_is_refused_at_the_start(offline, monkeypatch) -> None:
    monkeypatch.setattr("dancegrpo.trainer.load_policy", lambda *_, **__: ToyPolicy())
    with pytest.raises(ConfigError, match="ToyPolicy turns no pictures into latents"):
        Trainer(load_config(offline), {})


def test_held_out_prompts_may_come_from_a_file_of_pairs(offline) -> None:
    offline["prompts"]["evaluation"] = offline["prompts"]["train"]
    held_out = Trainer(load_config(offline), {}).held_out
    assert [prompt.text for prompt in held_out] == [f"a drawing of {prompt.id} dots" for prompt in held_out]
    assert len(held_out) == 2
