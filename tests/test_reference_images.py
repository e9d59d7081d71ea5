"""Reference images: drawn before a training, required by a model that animates them, encoded once each."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from PIL import Image

from dancegrpo import cli, trainer
from dancegrpo.config import load_config
from dancegrpo.errors import ConfigError
from dancegrpo.evaluate import pictures
from dancegrpo.inference import load_trained
from dancegrpo.media import to_image
from dancegrpo.policies.cache import CachedEncoder, ConditionCache
from dancegrpo.prompts import Prompt, open_prompts
from toy import ToyPolicy


@pytest.fixture(scope="module")
def recipe(tiny_flux_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    (folder / "unused.txt").write_text("a\n")
    told = {
        "name": "tiny",
        "threads": 1,
        "model": {"path": str(tiny_flux_path), "height": 16, "width": 16, "max_sequence_length": 16},
        "prompts": {"train": str(folder / "unused.txt")},
        "rollout": {"group_size": 4, "num_steps": 3, "noise_level": 0.7, "shift": 1.5},
        "rewards": {"size": {"judge": "jpeg"}},
        "evaluation": {"batch_size": 2},
        "tracking": {"backend": "none"},
    }
    (folder / "tiny.yaml").write_text(json.dumps(told))
    return folder / "tiny.yaml"


@pytest.fixture
def asked(tmp_path: Path) -> Path:
    rows = [{"cap": f"dot {n}", "path": f"{n}.mp4"} for n in range(5)]
    (tmp_path / "captions.json").write_text(json.dumps(rows))
    return tmp_path / "captions.json"


def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    """(exit code, standard output, standard error) of one command."""
    monkeypatch.setattr(sys, "argv", ["dancegrpo", *map(str, words)])
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        cli.main()
    captured = capsys.readouterr()
    return ended.value.code, captured.out, captured.err


def test_images_are_drawn_listed_and_kept(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], recipe: Path, asked: Path, tmp_path: Path
) -> None:
    out = tmp_path / "frames"
    words = ("make-images", f"consisid:{asked}", "--model", recipe, "--out", out)
    code, told, _ = call(monkeypatch, capsys, *words, "--json")
    assert (code, json.loads(told)) == (0, {"prompts": str(out / "prompts.jsonl")})
    made = list(open_prompts(str(out / "prompts.jsonl")))
    assert [(prompt.text, prompt.metadata) for prompt in made] == [(f"dot {n}", {"path": f"{n}.mp4"}) for n in range(5)]
    # The pictures are what the policy draws at the prompt's own position, in the same batches.
    drawn = pictures(load_trained(str(recipe)).policy, made, seed=0, batch_size=2)
    frames = [to_image(sample[0]) for _, media in drawn for sample in media]
    for prompt, frame in zip(made, frames, strict=True):
        with Image.open(prompt.image) as file:
            assert file.tobytes() == frame.tobytes()

    held = {prompt.image: (prompt.image.read_bytes(), prompt.image.stat().st_mtime_ns) for prompt in made}
    made[3].image.unlink()
    assert call(monkeypatch, capsys, *words)[0] == 0
    assert {path: path.read_bytes() for path in out.glob("*.png")} == {path: data for path, (data, _) in held.items()}
    assert all(made[n].image.stat().st_mtime_ns == held[made[n].image][1] for n in (0, 1, 4))


def test_another_seed_is_another_picture_and_a_limit_takes_the_first(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], recipe: Path, asked: Path, tmp_path: Path
) -> None:
    words = ("make-images", f"consisid:{asked}", "--model", recipe, "--out", tmp_path / "f", "--limit", 2)
    first, second = (
        (call(monkeypatch, capsys, *words, "--seed", seed), list(open_prompts(str(tmp_path / "f" / "prompts.jsonl"))))[
            1
        ]
        for seed in (0, 1)
    )
    assert [prompt.text for prompt in first] == ["dot 0", "dot 1"]
    assert not {prompt.image for prompt in first} & {prompt.image for prompt in second}
    assert first[0].image.read_bytes() != second[0].image.read_bytes()


def test_a_model_of_clips_draws_no_reference_images(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], recipe: Path, asked: Path, tmp_path: Path
) -> None:
    monkeypatch.setattr("dancegrpo.policies.flux.FluxPolicy.takes_image", True)
    code, _, err = call(monkeypatch, capsys, "make-images", asked, "--model", recipe, "--out", tmp_path / "f")
    assert (code, len(err.splitlines())) == (2, 1)
    assert "name a text-to-image model" in err
    assert not (tmp_path / "f").exists()


def test_a_file_in_the_place_of_the_folder_is_refused_before_drawing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], recipe: Path, asked: Path
) -> None:
    monkeypatch.setattr("dancegrpo.evaluate.pictures", lambda *_, **__: pytest.fail("drawn"))
    source = f"consisid:{asked}"
    code, _, err = call(monkeypatch, capsys, "make-images", source, "--model", recipe, "--out", asked)
    assert (code, len(err.splitlines())) == (2, 1)
    assert f"--out {asked} cannot be made a folder" in err


def test_prompts_of_a_table_with_an_index(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], recipe: Path, tmp_path: Path
) -> None:
    (tmp_path / "p.csv").write_text(",text\n0,a dot\n")
    code, _, err = call(
        monkeypatch, capsys, "make-images", tmp_path / "p.csv", "--model", recipe, "--out", tmp_path / "f"
    )
    assert (code, [p.text for p in open_prompts(str(tmp_path / "f" / "prompts.jsonl"))]) == (0, ["a dot"]), err


@pytest.mark.parametrize("lacking", ["train", "evaluation"])
def test_a_model_that_animates_images_is_not_trained_without_them(
    monkeypatch: pytest.MonkeyPatch, recipe: Path, tmp_path: Path, lacking: str
) -> None:
    policy = ToyPolicy(num_steps=3)
    monkeypatch.setattr(ToyPolicy, "takes_image", True, raising=False)
    monkeypatch.setattr(trainer, "load_policy", lambda *_, **__: policy)
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("it moves")
    (tmp_path / "bare.txt").write_text("a\nb\n")
    both = {"train": f"images:{tmp_path}", "evaluation": f"images:{tmp_path}"}
    sources = both | {lacking: str(tmp_path / "bare.txt")}

    def build(told: dict[str, str]) -> None:
        words = [f"prompts.{key}={value}" for key, value in told.items()]
        trainer.Trainer(load_config(recipe, [*words, f"output={tmp_path}"]), {})

    with pytest.raises(ConfigError, match=rf"prompts.{lacking}=\S*bare.txt has prompts without images"):
        build(sources)


def test_an_image_condition_is_encoded_once_and_anew_when_its_file_is_another(tmp_path: Path) -> None:
    encoded: list[Prompt] = []

    class Counting(ToyPolicy):
        def encode(self, prompts):
            encoded.extend(prompts)
            return super().encode(prompts)

    def draw(prompts: list[Prompt]) -> int:
        before = len(encoded)
        condition = CachedEncoder(Counting(), ConditionCache(tmp_path / "cache", 1 << 20)).encode(prompts)
        assert len(condition) == len(prompts)
        return len(encoded) - before

    files = [tmp_path / "a.png", tmp_path / "b.png", tmp_path / "copy of a.png"]
    for file, shade in zip(files, (1, 2, 1), strict=True):
        Image.new("RGB", (4, 4), (shade,) * 3).save(file)
    prompts = [Prompt(n, "it moves", image=file) for n, file in enumerate(files)]
    assert draw([*prompts, *prompts]) == 2
    assert draw(prompts) == 0
    files[2].write_bytes(files[1].read_bytes() + b"\0")
    assert draw(prompts) == 1
    in_memory = [Prompt(3, "it moves", image=Image.new("RGB", (4, 4), (shade,) * 3)) for shade in (1, 2, 1)]
    assert draw(in_memory) == 2
