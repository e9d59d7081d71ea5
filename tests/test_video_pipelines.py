"""The shipped pipelines of clips, their parts, and their build."""

import json

import numpy as np
import pytest
import torch

from dancegrpo.shapes import FILMED, base_path
from dancegrpo.shapes.base import TEXT_TOKENS
from dancegrpo.shapes.build import Settings, build
from dancegrpo.shapes.clips import clip_prompts, i2v_prompts
from dancegrpo.shapes.motion import judge_clips
from dancegrpo.shapes.training import text_tokens, to_model
from dancegrpo.shapes.video_base import llama_tokenizer, vocabulary
from dancegrpo.shapes.video_training import (
    clips_reading,
    deployment,
    encode_clips,
    film,
    film_by,
    photograph,
    reconstruction,
)


@pytest.fixture(scope="module", params=FILMED)
def pipeline(request):
    from diffusers import DiffusionPipeline

    loaded = DiffusionPipeline.from_pretrained(base_path(request.param))
    loaded.set_progress_bar_config(disable=True)
    return loaded


def requests_of(pipeline, n):
    return list((i2v_prompts if "Image" in type(pipeline).__name__ else clip_prompts)("heldout", n))


def test_every_caption_word_is_one_token_and_captions_fit():
    tokenizer = llama_tokenizer(vocabulary())
    for caption in clips_reading().captions:
        ids = tokenizer(caption).input_ids
        assert len(ids) == 1 + len(caption.split())  # the first one begins the text
        assert len(ids) <= TEXT_TOKENS


def test_distinct_text_gets_distinct_ids_even_outside_the_vocabulary():
    tokenizer = llama_tokenizer(vocabulary())
    texts = ["a dog", "a cat", "a red circle", "a circle red", "7 zebras!", "über"]
    assert len({tuple(tokenizer(text).input_ids) for text in texts}) == len(texts)
    assert tokenizer.decode(tokenizer("7 zebras!").input_ids, skip_special_tokens=True).strip() == "7 zebras!"


def test_captions_that_say_different_things_have_different_targets():
    reading = clips_reading()
    assert len({tuple(row) for row in reading.targets.tolist()}) == len(reading.captions)


def test_the_classes_are_the_real_ones():
    parts = {name: json.loads((base_path(name) / "model_index.json").read_text()) for name in FILMED}
    classes = {"shapes-video": "HunyuanVideoPipeline", "shapes-i2v": "HunyuanSkyreelsImageToVideoPipeline"}
    for name, held in parts.items():
        assert (held["_class_name"], held["transformer"][1]) == (classes[name], "HunyuanVideoTransformer3DModel")
        assert (held["vae"][1], held["text_encoder"][1]) == ("AutoencoderKLHunyuanVideo", "LlamaModel")


def test_weights_are_float32_once_loaded(pipeline):
    networks = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
    assert {p.dtype for network in networks for p in network.parameters()} == {torch.float32}


def test_clips_come_out_the_same_for_the_same_noise_and_differ_for_another(pipeline):
    requests = requests_of(pipeline, 4)
    clips = [film_by(pipeline, requests, seed, frames=9, guidance=1.0) for seed in (5, 5, 6)]
    assert clips[0].shape == (4, 9, 3, 32, 32)
    assert clips[0].min() >= 0
    assert clips[0].max() <= 1
    assert torch.equal(clips[0], clips[1])
    assert not torch.equal(clips[0], clips[2])


def test_the_words_matter(pipeline):
    """The motion asked for is seen more often than the one that another prompt asks for."""
    requests = requests_of(pipeline, 64)
    clips = film_by(pipeline, requests, 1, frames=9, guidance=1.0).numpy()
    turned = requests[1:] + requests[:1]
    asked, other = judge_clips(clips, requests).ta, judge_clips(clips, turned).ta
    assert asked.mean() > other.mean() + 0.1


def test_latents_have_unit_variance(pipeline):
    animates = "Image" in type(pipeline).__name__
    frames = film(40, 99, first_frames=animates).frames
    latents = encode_clips(pipeline.vae, frames)[0] * pipeline.vae.config.scaling_factor
    assert latents.square().mean().item() == pytest.approx(1.0, abs=0.15)


def test_the_autoencoder_keeps_clips_recognisable(pipeline):
    kept = reconstruction(pipeline.vae, film(60, 98), 60)
    assert kept["mq"] > 0.9
    assert kept["ta"] > 0.9


def test_the_card_states_the_call(pipeline):
    name = "shapes-i2v" if "Image" in type(pipeline).__name__ else "shapes-video"
    card = (base_path(name) / "README.md").read_text()
    assert all(f"{key}={json.dumps(value)}" in card for key, value in deployment().items())


def test_footage_is_seeded_and_right():
    first, again, other = film(8, 1), film(8, 1), film(8, 2)
    assert torch.equal(first.frames, again.frames)
    assert not torch.equal(first.frames, other.frames)
    stills = photograph(8, 1)
    assert stills.frames.shape == (8, 3, 1, 32, 32)
    assert np.isclose(float(to_model(torch.tensor([0, 255], dtype=torch.uint8)).sum()), 0.0)


def test_texts_are_padded_on_the_right():
    tokenizer = llama_tokenizer(vocabulary())
    ids = text_tokens(tokenizer, ["a red circle", "a large red circle moves left slowly"])
    assert ids.shape == (2, TEXT_TOKENS)
    assert (ids[:, 0] == tokenizer.bos_token_id).all()
    assert (ids[0, 4:] == tokenizer.pad_token_id).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", FILMED)
def test_the_build_makes_loadable_pipelines_from_nothing(name, tmp_path):
    from diffusers import DiffusionPipeline

    small = {"clips": 64, "stills": 8, "video_vae_steps": 4, "text_steps": 2, "video_steps": 2, "i2v_steps": 2}
    build(Settings(tmp_path, only=(name,), look_every=1, **small))
    made = DiffusionPipeline.from_pretrained(tmp_path / name)
    assert film_by(made, requests_of(made, 2), 0, frames=9, guidance=1.0).shape == (2, 9, 3, 32, 32)
