"""Text rendering: which text is wanted, how near the picture's text comes, and the real OCR on rendered text."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dancegrpo.errors import RewardError
from dancegrpo.prompts import Prompt
from dancegrpo.rewards import load_reward
from dancegrpo.rewards.ocr import OCRReward, normalize_text, text_score, wanted_text
from dancegrpo.settings import RewardConfig

SIGN = Prompt(0, 'a sign that says "Hello World"')


def edit_distance(a, b):
    """By the recurrence."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a):
        above, row = row, [i + 1]
        for j, y in enumerate(b):
            row.append(min(above[j] + (x != y), above[j + 1] + 1, row[j] + 1))
    return row[-1]


@pytest.fixture
def judge():
    """A judge that reads what the picture's first red value says."""
    pytest.importorskip("rapidfuzz")
    lines = {0: [], 1: ["Hello", "World"], 2: ["HELLO W0RLD"], 3: ["see: hello world!"], 4: ["lots of other text"]}
    return OCRReward(reader=lambda picture: lines[int(picture[0, 0, 0])])


def marked(*values):
    pictures = torch.zeros(len(values), 1, 3, 4, 4)
    pictures[:, 0, 0, 0, 0] = torch.tensor(values) / 255
    return pictures


# What is wanted


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        (SIGN, "Hello World"),
        (Prompt(0, "a poster, “Open” above «ici»"), "Open ici"),
        (Prompt(0, 'a "STOP" sign and a "GO" sign'), "STOP GO"),
        (Prompt(0, 'a "STOP" sign', metadata={"text": "GO"}), "GO"),
        (Prompt(0, 'a "STOP" sign', metadata={"text": "  "}), "STOP"),
        (Prompt(0, "the cat's hat isn't here"), ""),
        (Prompt(0, 'an inch mark: 5" wide'), ""),
        (Prompt(0, 'nothing ""'), ""),
    ],
)
def test_the_text_wanted_is_the_metadatas_or_what_is_quoted(prompt, expected):
    assert wanted_text(prompt) == expected


def test_case_and_whitespace_do_not_count():
    assert normalize_text(" Hello\n WORLD\t") == "helloworld"


# The rule


@settings(deadline=None)
@given(st.text("abc", min_size=1, max_size=6), st.text("abc", max_size=9))
def test_the_score_is_one_minus_the_edit_distance_over_the_length(wanted, read):
    rapidfuzz = pytest.importorskip("rapidfuzz")
    score = text_score(wanted, read, rapidfuzz.distance.Levenshtein.distance)
    expected = 1.0 if wanted in read else max(0.0, 1 - edit_distance(wanted, read) / len(wanted))
    assert score == pytest.approx(expected)


def test_pictures_are_scored_by_the_text_read_in_them(judge):
    scores = judge(marked(0, 1, 2, 3, 4), [SIGN] * 5)
    assert scores.values.tolist() == pytest.approx([0, 1, 0.9, 1, 0])
    assert scores.valid.all()


def test_a_prompt_without_text_has_no_score(judge):
    scores = judge(marked(1, 1), [Prompt(0, "a sign"), SIGN])
    assert scores.valid.tolist() == [False, True]
    assert scores.values.isnan().tolist() == [True, False]
    assert scores.causes == {"the prompt asks for no text in quotation marks": 1}


def test_a_picture_the_reader_fails_on_is_masked_alone(judge):
    scores = judge(marked(1, 9), [SIGN, SIGN])
    assert scores.valid.tolist() == [True, False]
    (cause,) = scores.causes
    assert cause.startswith("KeyError: 9")


def test_batches_and_bytes_agree(judge):
    pictures = marked(2, 1, 0, 4, 3)
    values = judge(pictures, [SIGN] * 5).values
    single = torch.cat([judge(picture[None], [SIGN]).values for picture in pictures])
    assert torch.equal(values, single)
    assert torch.equal(values.flip(0), judge(pictures.flip(0), [SIGN] * 5).values)
    assert torch.equal(values, judge((pictures * 255).round().byte(), [SIGN] * 5).values)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threads": 0}, "threads=0 of the ocr judge"),
        ({"min_confidence": 1.5}, "min_confidence=1.5 of the ocr judge is out of range"),
    ],
)
def test_options_that_cannot_be_are_refused(options, message):
    with pytest.raises(RewardError, match=message):
        OCRReward(**options)


@pytest.mark.parametrize("module", ["rapidfuzz.distance", "rapidocr", "onnxruntime"])
def test_without_the_extra_the_error_says_how_to_get_it(module, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)  # an import of it fails
    with pytest.raises(RewardError, match=r"pip install 'dancegrpo\[ocr\]'") as refused:
        OCRReward()
    assert "\n" not in str(refused.value)


# The real library


def rendered(text, size=(64, 160)):
    from PIL import Image, ImageDraw, ImageFont

    image = Image.new("RGB", size[::-1], (250, 240, 200))
    ImageDraw.Draw(image).text((12, 14), text, fill=(20, 20, 120), font=ImageFont.load_default(28))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None, None].float() / 255


@pytest.mark.slow
def test_rendered_text_is_read():
    for module in ("rapidocr", "onnxruntime", "rapidfuzz"):
        pytest.importorskip(module)
    judge = load_reward("text", RewardConfig(judge="ocr"))
    pictures = torch.cat([rendered("Bakery"), rendered("Battery"), torch.full((1, 1, 3, 64, 160), 0.8)])
    scores = judge(pictures, [Prompt(i, 'a shop with a sign that says "bakery"') for i in range(3)])
    assert scores.values[0] == 1
    assert 0.3 < scores.values[1] < 1
    assert scores.values[2] == 0
    assert scores.valid.all()
