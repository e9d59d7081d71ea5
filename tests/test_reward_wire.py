"""What travels between a judge's client and server."""

from __future__ import annotations

import base64
import datetime
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save

from dancegrpo.prompts import Prompt
from dancegrpo.rewards import Scores
from dancegrpo.rewards.service import wire
from dancegrpo.rewards.service.png import unpack_json
from dancegrpo.rewards.service.wire import WireError

NASTY = ["two\nlines", "<script>alert('x')</script>", 'quote " and \\', "\u202e\u0000 零 🎨", "half a pair \ud83d"]


def unpack(body, folder=Path("/nonexistent"), most=64):
    return wire.unpack_request(body, folder, most)


def answer(**changes):
    told = {"id": "1", "judge": "j", "values": [0.5, None], "valid": [True, False], "extra": {}, "causes": {"dark": 1}}
    return json.dumps(told | changes).encode()


def png(array, **options):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG", **options)
    return base64.b64encode(buffer.getvalue()).decode()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float16, torch.bfloat16])
def test_media_survive_bit_for_bit(dtype):
    media = torch.rand(2, 3, 3, 4, 5, generator=torch.Generator().manual_seed(0)).mul(200).to(dtype)
    got = unpack(wire.pack_request("7", media, [Prompt(0, "a"), Prompt(1, "b")]))
    assert got.id == "7"
    assert got.media.dtype == dtype
    assert torch.equal(got.media, media)


def test_all_levels_of_a_byte_travel_as_bytes():
    media = (torch.arange(256) / 255).expand(1, 1, 3, 1, 256)
    packed = wire.compact(media)
    assert packed.dtype == torch.uint8
    assert torch.equal(packed.float() / 255, media)


@pytest.mark.parametrize("odd", [0.5, 1 / 255 + 1e-9, -1 / 255, 256 / 255, float("nan"), float("inf")])
def test_one_value_that_no_byte_stands_for_keeps_floats(odd):
    media = torch.zeros(1, 1, 3, 2, 2)
    media[0, 0, 1, 1, 1] = odd
    packed = wire.compact(media)
    torch.testing.assert_close(packed, media, rtol=0, atol=0, equal_nan=True)


def test_prompts_survive_with_all_their_fields(tmp_path):
    picture = tmp_path / "start.png"
    picture.write_bytes(b"\x89PNG any bytes")
    metadata = {"n": 3, "nested": {"list": [1.5, None, True]}}
    prompts = [Prompt(i, text, "no " + text, picture, metadata) for i, text in enumerate(NASTY)]
    (tmp_path / "in").mkdir()
    body = wire.pack_request("x", torch.zeros(len(NASTY), 1, 3, 2, 2), prompts)
    got = unpack(body, tmp_path / "in").prompts
    assert [(p.id, p.text, p.negative, p.metadata) for p in got] == [
        (p.id, p.text, p.negative, p.metadata) for p in prompts
    ]
    assert {p.image.read_bytes() for p in got} == {picture.read_bytes()}
    assert len(list((tmp_path / "in").iterdir())) == 1


def test_pictures_in_memory_travel_once_each_and_look_the_same(tmp_path):
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 256, (3, 5, 3), dtype=np.uint8)) for _ in range(2)]
    images = [pictures[0], pictures[1], pictures[0], pictures[1].copy(), None, pictures[0].convert("CMYK")]
    prompts = [Prompt(i, "a", image=image) for i, image in enumerate(images)]
    got = unpack(wire.pack_request("", torch.zeros(6, 1, 3, 1, 1), prompts), tmp_path).prompts
    assert len(list(tmp_path.iterdir())) == 3
    for sent, arrived in zip(prompts, got, strict=True):
        if sent.image is None:
            assert arrived.image is None
        else:
            with Image.open(arrived.image) as picture:
                assert picture.tobytes() == sent.image.convert("RGB").tobytes()


def test_a_turned_picture_arrives_upright(tmp_path):
    exif, data = Image.Exif(), io.BytesIO()
    exif[274] = 6  # a quarter turn to the right shows it upright
    Image.fromarray(np.arange(6, dtype=np.uint8).reshape(2, 3)).save(data, "PNG", exif=exif)
    (got,) = unpack(
        wire.pack_request("", torch.zeros(1, 1, 3, 1, 1), [Prompt(0, "a", image=Image.open(data))]), tmp_path
    ).prompts
    with Image.open(got.image) as picture:
        assert np.asarray(picture).tolist() == [[3, 0], [4, 1], [5, 2]]
        assert 274 not in picture.getexif()


@pytest.mark.parametrize(("content", "cause"), [(None, "cannot be read"), (b"", "is empty")])
def test_an_image_that_is_lost_is_no_request(tmp_path, content, cause):
    picture = tmp_path / "start.png"
    if content is not None:
        picture.write_bytes(content)
    with pytest.raises(WireError, match=rf"the image of prompt 2 cannot be sent: .*start.png {cause}"):
        wire.pack_request("", torch.zeros(1, 1, 3, 1, 1), [Prompt(2, "a", image=picture)])


def test_dates_of_tables_become_text():
    metadata = {"created_at": datetime.datetime(2023, 6, 20, 1, 2, 3), "day": datetime.date(2023, 6, 20)}
    (got,) = unpack(wire.pack_request("", torch.zeros(1, 1, 3, 1, 1), [Prompt(0, "a", metadata=metadata)])).prompts
    assert got.metadata == {"created_at": "2023-06-20T01:02:03", "day": "2023-06-20"}


def test_numbers_of_tables_become_numbers():
    metadata = {"a": np.int64(3), "b": np.array([0.5, 1.0]), "c": np.float32(0.25)}
    (got,) = unpack(wire.pack_request("", torch.zeros(1, 1, 3, 1, 1), [Prompt(0, "a", metadata=metadata)])).prompts
    assert got.metadata == {"a": 3, "b": [0.5, 1.0], "c": 0.25}


def test_metadata_that_json_cannot_hold_is_refused():
    with pytest.raises(WireError, match="the metadata of prompt 4 cannot be sent: set is not JSON"):
        wire.pack_request("", torch.zeros(1, 1, 3, 1, 1), [Prompt(4, "a", metadata={"s": {1}})])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=6))
def test_every_float32_survives_the_answer(numbers):
    values = torch.tensor(numbers, dtype=torch.float32)
    scores = Scores(values, torch.ones(len(values), dtype=torch.bool), {"half": values})
    got = wire.read_answer(wire.pack_answer("1", "j", scores), "1", "j", len(values))
    assert torch.equal(got.values, values)
    assert torch.equal(got.extra["half"], values)


def test_masked_samples_and_columns_survive_the_answer():
    scores = Scores(
        torch.tensor([0.1, torch.nan]),
        torch.tensor([True, False]),
        {"pass": torch.tensor([True, False]), "count": torch.tensor([3, 4]), "x": torch.tensor([torch.nan, 2.0])},
        {"dark": 1},
    )
    got = wire.read_answer(wire.pack_answer("1", "j", scores), "1", "j", 2)
    assert got.valid.tolist() == [True, False]
    assert got.values[1].isnan()
    assert got.extra["pass"].tolist() == [True, False]
    assert (got.extra["count"].dtype, got.extra["count"].tolist()) == (torch.int64, [3, 4])
    assert got.extra["x"].isnan().tolist() == [True, False]
    assert got.causes == {"dark": 1}


def test_a_masked_sample_never_keeps_a_number():
    got = wire.read_answer(answer(values=[0.5, 9.0]), "1", "j", 2)
    assert got.values.isnan().tolist() == [False, True]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"<html>", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[1, 2]", "no values"),
        (answer().replace(b"0.5", b"NaN"), "not JSON"),
        (answer().replace(b"0.5", b"1e999"), "no finite number"),
        (answer().replace(b"0.5", b"1e300"), "no finite number"),
        (answer(values=[None, None]), "no finite number"),
        (answer(values=[0.5]), "1 entries in values for 2 samples"),
        (answer(values=0.5), "no list in values"),
        (answer(values=["0.5", None]), "other than numbers in values"),
        (answer(values=[True, None]), "other than numbers in values"),
        (answer(values=[10**400, None]), "out of range in values"),
        (answer(valid=[1, 0]), "not true or false"),
        (answer(extra={"e": [1]}), "1 entries in e"),
        (answer(extra=[1]), "extra is no object"),
        (answer(judge="k"), "another judge answered \\('k' instead of 'j'\\)"),
        (answer(id="2"), "belongs to another request"),
    ],
)
def test_a_rubbish_answer_is_refused(body, message):
    with pytest.raises(WireError, match=message):
        wire.read_answer(body, "1", "j", 2)


@pytest.mark.parametrize("causes", [{"dark": 99}, {"dark": -1}, {"dark": "x"}, ["dark"], None])
def test_causes_that_make_no_sense_are_dropped(causes):
    assert wire.read_answer(answer(causes=causes), "1", "j", 2).causes == {}


def body_of(told, media=None, **tensors):
    media = torch.zeros(1, 1, 3, 2, 2) if media is None else media
    return save({"media": media, **tensors}, {"request": told if isinstance(told, str) else json.dumps(told)})


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "no request in safetensors"),
        (b"\xff" * 64, "no request in safetensors"),
        (b"\x80\x04K\x01.", "no request in safetensors"),
        (body_of("{"), "no request in safetensors"),
        (save({"media": torch.zeros(1)}), "no request in safetensors"),
        (save({"other": torch.zeros(1)}, {"request": "{}"}), "no tensor named media"),
        (body_of([]), "no JSON object with a list of prompts"),
        (body_of({"prompts": ["a", "b"]}), "1 samples came with 2 prompts"),
        (body_of({"prompts": [3]}), "prompt 0 is neither"),
        (body_of({"prompts": [{"text": 3}]}), "prompt 0: text is no str"),
        (body_of({"prompts": [{"text": "a", "id": True}]}), "prompt 0: id is no int"),
        (body_of({"prompts": [{"text": "a", "path": "/etc/passwd"}]}), "unknown field"),
        (body_of({"prompts": [{"text": "a", "image": "/etc/passwd"}]}), "image that did not come"),
        (body_of({"prompts": ["a"], "id": 3}), "id is no text"),
        (body_of({"prompts": ["a"]}, torch.zeros(1, 3, 2, 2)), "shape \\(1, 3, 2, 2\\)"),
        (body_of({"prompts": ["a"]}, torch.zeros(1, 0, 3, 2, 2)), "shape \\(1, 0, 3, 2, 2\\)"),
        (body_of({"prompts": ["a"]}, torch.zeros(1, 1, 3, 2, 2, dtype=torch.int64)), "media are int64"),
        (body_of({"prompts": ["a"] * 9}, torch.zeros(9, 1, 3, 2, 2)), "9 samples came at once: send at most 8"),
    ],
)
def test_a_malformed_request_is_refused(body, message):
    with pytest.raises(WireError, match=message):
        unpack(body, most=8)


def test_pictures_of_other_languages_arrive_as_they_are():
    array = np.random.default_rng(0).integers(0, 256, (2, 5, 4, 3), dtype=np.uint8)
    body = json.dumps({"prompts": ["a", {"text": "b"}], "media": [png(array[0]), [png(array[1])]]}).encode()
    got = unpack_json(body, 8, 10_000)
    assert got.media.shape == (2, 1, 3, 5, 4)
    assert torch.equal(got.media[:, 0].permute(0, 2, 3, 1), torch.from_numpy(array))
    assert [prompt.text for prompt in got.prompts] == ["a", "b"]


def test_grey_pictures_have_three_equal_channels():
    array = np.arange(6, dtype=np.uint8).reshape(2, 3)
    got = unpack_json(json.dumps({"prompts": ["a"], "media": [png(array)]}).encode(), 8, 10_000)
    assert torch.equal(got.media[0, 0], torch.from_numpy(array).expand(3, 2, 3))


RGB = np.zeros((2, 2, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("media", "message", "status"),
    [
        ([], "no list of media", 400),
        ("x", "no list of media", 400),
        ([3], "neither a base64 PNG nor a list", 422),
        (["%%%"], "no base64 PNG", 422),
        ([base64.b64encode(b"GIF89a").decode()], "no base64 PNG", 422),
        ([png(RGB)[:40]], "no base64 PNG", 422),
        ([png(np.zeros((2, 2, 4), dtype=np.uint8))], "no 8-bit RGB or grey PNG", 422),
        ([png(np.zeros((2, 2), dtype=np.uint16))], "no 8-bit RGB or grey PNG", 422),
        ([[png(RGB), png(np.zeros((3, 2, 3), dtype=np.uint8))]], "frames of sample 0 differ", 422),
        ([png(np.zeros((40, 40, 3), dtype=np.uint8))], "larger than a request may be", 413),
    ],
)
def test_malformed_pictures_are_refused(media, message, status):
    with pytest.raises(WireError, match=message) as caught:
        unpack_json(json.dumps({"prompts": ["a"] * len(media), "media": media}).encode(), 8, 1000)
    assert caught.value.status == status


def test_samples_of_different_sizes_are_refused():
    body = {"prompts": ["a", "b"], "media": [png(RGB), png(np.zeros((3, 2, 3), dtype=np.uint8))]}
    with pytest.raises(WireError, match="samples differ in size"):
        unpack_json(json.dumps(body).encode(), 8, 1000)


def test_another_machines_words_become_one_short_printable_line():
    assert wire.shorten("a\nb\x1b[31m\u202ec") == "a b?[31m?c"
    assert len(wire.shorten("x" * 10_000)) == 300
