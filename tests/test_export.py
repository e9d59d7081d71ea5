"""Exports load with diffusers alone and make the same pictures; a folder appears whole or not at all."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest
import torch

from dancegrpo.errors import CheckpointError
from dancegrpo.policies import ModelCard, Policy
from dancegrpo.policies.export import Usage, card_text
from dancegrpo.settings import LoraConfig, RolloutConfig
from test_policies import LORA, deterministic, noise, perturb, pipeline_of, policy_of, prompts, use_ddim
from tiny import PROMPTS, TINY_SIZE

CARD = ModelCard("tiny/base", "my-recipe", 120, ("hps (weight 0.7)", "clip (weight 1.4)"), notes="Pass rate 0.61.")
STEPS = 3


@pytest.fixture(params=["sd", "flux"])
def family(request, tiny_sd_path: Path, tiny_flux_path: Path) -> Path:
    return tiny_sd_path if request.param == "sd" else tiny_flux_path


def trained(path: Path, lora: LoraConfig | None = None, **model: object) -> Policy:
    policy = policy_of(path, RolloutConfig(num_steps=STEPS), lora=lora, guidance_scale=4.0, **model)
    perturb(policy)
    return policy


def pictures(policy: Policy) -> torch.Tensor:
    condition = policy.encode(prompts(PROMPTS[0]))[[0, 0]]
    return policy.decode(deterministic(policy, condition, noise(policy, 2)), condition)[:, 0].detach()


def pictures_by_diffusers(pipeline, policy: Policy) -> torch.Tensor:
    if "PNDM" in type(pipeline.scheduler).__name__:
        use_ddim(pipeline)
    call = {"guidance_scale": 4.0, "num_inference_steps": STEPS, "height": TINY_SIZE, "width": TINY_SIZE}
    return pipeline(PROMPTS[0], num_images_per_prompt=2, latents=noise(policy, 2), output_type="pt", **call).images


def test_an_exported_pipeline_makes_the_same_pictures_in_diffusers(family: Path, tmp_path: Path) -> None:
    policy = trained(family)
    policy.export(tmp_path / "out", CARD)
    ours = pictures(policy)
    assert torch.equal(ours, pictures_by_diffusers(pipeline_of(tmp_path / "out"), policy))
    assert not torch.equal(ours, pictures_by_diffusers(pipeline_of(family), policy))


def test_an_exported_pipeline_keeps_the_shipped_scheduler(family: Path, tmp_path: Path) -> None:
    trained(family).export(tmp_path / "out", CARD)
    before, after = (
        json.loads((p / "scheduler/scheduler_config.json").read_text()) for p in (family, tmp_path / "out")
    )
    assert after == before


def test_exported_lora_weights_make_the_same_pictures_in_diffusers(family: Path, tmp_path: Path) -> None:
    policy = trained(family, LORA)
    policy.export(tmp_path / "out", CARD)
    pipeline = pipeline_of(family)
    before = pictures_by_diffusers(pipeline, policy)
    pipeline.load_lora_weights(tmp_path / "out")
    ours = pictures(policy)
    torch.testing.assert_close(pictures_by_diffusers(pipeline, policy), ours, atol=1e-6, rtol=0)
    assert (before - ours).abs().max() > 1e-3


def test_an_export_within_use_weights_holds_those_weights(family: Path, tmp_path: Path) -> None:
    policy = trained(family)
    average = {name: weight.detach() * 0.9 for name, weight in policy.trainable().items()}
    with policy.use_weights(average):
        policy.export(tmp_path / "out", CARD)
    exported = policy_of(tmp_path / "out", RolloutConfig(num_steps=STEPS)).trainable()
    assert all(torch.equal(exported[name], weight) for name, weight in average.items())


def test_an_export_can_be_trained_further(family: Path, tmp_path: Path) -> None:
    policy = trained(family)
    policy.export(tmp_path / "out", CARD)
    assert torch.equal(
        pictures(policy_of(tmp_path / "out", RolloutConfig(num_steps=STEPS), guidance_scale=4.0)), pictures(policy)
    )


@pytest.mark.parametrize("lora", [None, LORA])
def test_the_card_says_what_it_is_and_how_to_use_it(family: Path, tmp_path: Path, lora: LoraConfig | None) -> None:
    trained(family, lora).export(tmp_path / "out", CARD)
    text = (tmp_path / "out" / "README.md").read_text()
    for fact in (
        "tiny/base",
        "my-recipe",
        "120 iterations",
        "hps (weight 0.7)",
        "Pass rate 0.61.",
        f"height={TINY_SIZE}",
    ):
        assert fact in text
    assert ("load_lora_weights" in text) == (lora is not None)
    ast.parse(text.split("```python\n")[1].split("```")[0])  # the example is Python


def test_the_card_sets_the_schedule_of_a_shifted_run(tiny_flux_path: Path, tmp_path: Path) -> None:
    policy = policy_of(tiny_flux_path, RolloutConfig(num_steps=STEPS, shift=2.5))
    policy.export(tmp_path / "out", CARD)
    assert "FlowMatchEulerDiscreteScheduler(shift=2.5)" in (tmp_path / "out" / "README.md").read_text()


def test_the_card_of_a_shipped_base_loads_it_by_name() -> None:
    card = ModelCard("shapes-flux", "shapes-flux", 100, ("shapes",))
    text = card_text(card, "text-to-image", Usage("", "", {"num_inference_steps": 6}), lora=True)
    assert 'from_pretrained(base_path("shapes-flux"))' in text
    assert "base_model:" not in text


@pytest.mark.parametrize("task", ["text-to-video", "image-to-video"])
def test_the_card_of_clips_plays_them_as_the_run_did_and_says_what_writing_takes(task: str) -> None:
    text = card_text(CARD, task, Usage("", "", {"num_frames": 9}, fps=12.5), lora=False)
    prose, example = text.split("```")[0], text.split("```python\n")[1].split("```")[0]
    assert "pip install imageio imageio-ffmpeg" in prose
    assert 'export_to_video(clip, "clip.mp4", fps=12.5)' in example
    ast.parse(example)


def test_an_export_refuses_a_folder_with_files(tiny_sd_path: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="not empty"):
        trained(tiny_sd_path).export(tmp_path / "out", CARD)
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "notes.txt"]


def test_an_export_fills_an_empty_folder(tiny_sd_path: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    trained(tiny_sd_path).export(tmp_path / "out", CARD)
    assert (tmp_path / "out" / "model_index.json").is_file()


def test_an_export_that_cannot_be_written_is_one_line(tiny_sd_path: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(CheckpointError, match="cannot write") as caught:
        trained(tiny_sd_path).export(tmp_path / "file" / "out", CARD)
    assert "\n" not in str(caught.value)


def test_an_export_does_not_tell_where_its_base_lay(family: Path, tmp_path: Path) -> None:
    trained(family).export(tmp_path / "out", CARD)
    told = "".join(file.read_text() for file in (tmp_path / "out").rglob("*.json"))
    assert str(family) not in told
    assert str(family.parent) not in told
