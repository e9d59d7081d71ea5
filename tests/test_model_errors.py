"""A model that is missing, damaged or unsupported is one clear line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from dancegrpo.errors import ModelError
from dancegrpo.policies import load_policy
from dancegrpo.settings import ModelConfig, RolloutConfig
from tiny import TINY_SIZE


def error_of(path: Path | str) -> str:
    config = ModelConfig(path=str(path), height=TINY_SIZE, width=TINY_SIZE, device="cpu")
    with pytest.raises(ModelError) as caught:
        load_policy(config, RolloutConfig(num_steps=3))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def no_index(folder: Path) -> None:
    (folder / "model_index.json").unlink()


def broken_index(folder: Path) -> None:
    (folder / "model_index.json").write_text('{"_class_name": ')


def other_class(folder: Path) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": "KandinskyPipeline"}))


def no_vae(folder: Path) -> None:
    shutil.rmtree(folder / "vae")


def no_tokenizer(folder: Path) -> None:
    shutil.rmtree(folder / "tokenizer")


def no_text_weights(folder: Path) -> None:
    (folder / "text_encoder" / "model.safetensors").unlink()


def truncated(folder: Path) -> None:
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def empty_file(folder: Path) -> None:
    (folder / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"")


def a_weight_short(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    del tensors["conv_in.weight"]
    save_file(tensors, file)


def broken_config(folder: Path) -> None:
    (folder / "unet" / "config.json").write_text("{")


def missing_shard(folder: Path) -> None:
    index = {"weight_map": {"conv_in.weight": "diffusion_pytorch_model-00002-of-00002.safetensors"}}
    (folder / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))


def zero_terminal_snr(folder: Path) -> None:
    file = folder / "scheduler" / "scheduler_config.json"
    extra = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    file.write_text(json.dumps(json.loads(file.read_text()) | extra))


def sample_prediction(folder: Path) -> None:
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"prediction_type": "sample"}))


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (no_index, ["model_index.json"]),
        (broken_index, ["model_index.json", "JSON"]),
        (other_class, ["KandinskyPipeline", "StableDiffusionPipeline", "FluxPipeline"]),
        (no_vae, ["vae is missing"]),
        (no_tokenizer, ["tokenizer is missing"]),
        (no_text_weights, ["text_encoder has no weights"]),
        (truncated, ["unet/diffusion_pytorch_model.safetensors", "truncated"]),
        (empty_file, ["vae/diffusion_pytorch_model.safetensors", "truncated"]),
        (a_weight_short, ["unet", "conv_in.weight"]),
        (broken_config, ["does not load"]),
        (missing_shard, ["00002-of-00002", "missing"]),
        (zero_terminal_snr, ["alpha_bar"]),
        (sample_prediction, ["prediction_type=sample"]),
    ],
)
def test_a_damaged_folder_is_one_line(
    tiny_sd_path: Path, tmp_path: Path, damage: Callable[[Path], None], named: list[str]
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_sd_path, folder)
    damage(folder)
    message = error_of(folder)
    assert all(part in message for part in named)


@pytest.mark.parametrize("path", ["./no/such/folder", "/no/such/folder", "shapes-flx"])
def test_a_path_that_leads_nowhere_names_the_shipped_pipelines(path: str) -> None:
    message = error_of(path)
    assert path in message
    assert "shapes-flux" in message


def test_a_hub_id_that_cannot_be_reached_is_one_line() -> None:
    assert "nobody/no-such-model" in error_of("nobody/no-such-model")
