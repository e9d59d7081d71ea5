"""VisionReward: answers of tiny random networks of three kinds, weighed as the published code weighs them."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

import tiny_qwen
from dancegrpo.errors import RewardError
from dancegrpo.prompts import Prompt
from dancegrpo.rewards import Judges, load_reward
from dancegrpo.rewards.vision_reward import VisionRewardReward, frames_per_second, read_answers, read_questions
from dancegrpo.settings import RewardConfig

QUESTIONS = ["Does it show [[prompt]]?\n", "Is it bright?\n", "Is [[prompt]] sharp? Say yes or no."]
WEIGHTS = [0.5, -2, 0.25]
TEXTS = ["a red cat", "a", "two dogs run over a green hill", "no", "a red cat"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    (folder / "questions.txt").write_text("".join(QUESTIONS))
    (folder / "weight.json").write_text(json.dumps(WEIGHTS))
    return {"questions": str(folder / "questions.txt"), "weights": str(folder / "weight.json"), "clip_fps": 2}


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen")
    tiny_qwen.build(folder, words=("yes", "no"), spare_rows=0)
    return folder


@pytest.fixture(scope="module")
def judge(files, qwen):
    return VisionRewardReward(**files, model=str(qwen), answer="compare", min_pixels=784, max_pixels=4704, batch_size=3)


def media(size=5, frames=8, height=56, width=84):
    return torch.rand(size, frames, 3, height, width, generator=torch.Generator().manual_seed(1))


def prompts(texts=TEXTS):
    return [Prompt(i, text) for i, text in enumerate(texts)]


# Frames


@pytest.mark.parametrize(
    ("total", "fps", "expected"),
    [
        (8, 2, [0, 2, 4, 6, 7]),  # the last is shown at 3.5 s, which rounds to 4
        (81, 16, [0, 16, 32, 48, 64, 80]),
        (1, 16, [0]),
        (7, 16, [0]),
        (49, 8, [0, 8, 16, 24, 32, 40, 48]),
        (900, 30, list(range(0, 720, 30))),  # 24 of 30 seconds
    ],
)
def test_frames_are_those_nearest_to_each_second(total, fps, expected):
    assert frames_per_second(total, fps) == expected


# Answers


def test_greedy_takes_the_likeliest_token_and_compare_the_likelier_of_two():
    logits = torch.tensor([[3.0, 1, 2, 0], [1.0, 3, 0, 2], [0, 1.0, 0, 9], [0, 0, torch.nan, 1]])
    greedy = read_answers(logits, yes=[0, 2], no=[1], answer="greedy")
    assert greedy[:2].tolist() == [1, -1]
    assert greedy[2:].isnan().all()
    compare = read_answers(logits, yes=[0, 2], no=[1], answer="compare")
    assert compare[:2].tolist() == [1, -1]
    assert compare[3].isnan()
    # e^0 + e^0 < e^1: spellings of one word count together.
    assert compare[2] == -1
    assert read_answers(torch.tensor([[0, 0.6, 0]]), yes=[0, 2], no=[1], answer="compare").item() == 1


def margins_by_transformers(qwen, clips, texts):
    """Logit of yes less that of no for each question, (5, 3), by transformers' model on patches and a chat by hand."""
    from PIL import Image
    from transformers import Qwen2VLForConditionalGeneration
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    tokenizer = AutoTokenizer.from_pretrained(qwen)
    model = Qwen2VLForConditionalGeneration.from_pretrained(qwen).eval()
    yes, no, video_token = (tokenizer.convert_tokens_to_ids(word) for word in ("yes", "no", "<|video_pad|>"))
    processor = Qwen2VLImageProcessorPil(size={"shortest_edge": 784, "longest_edge": 4704})
    rows = []
    for clip, text in zip(clips, texts):
        # Seconds 0 to 4 are frames 0, 2, 4, 6 and 7, and the last fills the third pair.
        frames = [Image.fromarray((clip[i].permute(1, 2, 0) * 255).round().byte().numpy()) for i in (0, 2, 4, 6, 7, 7)]
        stills = processor(frames, return_tensors="pt")["pixel_values"].view(6, 24, 3, 2, 14, 14)
        pixels = torch.stack([stills[0::2, :, :, 0], stills[1::2, :, :, 0]], dim=3).flatten(0, 1).flatten(1)
        row = []
        for question in QUESTIONS:
            asked = question.replace("[[prompt]]", text)
            chat = f"<|im_start|>user\n<|vision_start|>{'<|video_pad|>' * 18}<|vision_end|>{asked}<|im_end|>\n"
            ids = tokenizer(chat + "<|im_start|>assistant\n", return_tensors="pt")["input_ids"]
            kinds = 2 * (ids == video_token).int()
            grid = torch.tensor([[3, 4, 6]])
            with torch.no_grad():
                logits = model(ids, pixel_values_videos=pixels, video_grid_thw=grid, mm_token_type_ids=kinds).logits
            row.append((logits[0, -1, yes] - logits[0, -1, no]).item())
        rows.append(row)
    return torch.tensor(rows)


class Tilted:
    """A reader whose yes is made less likely by a constant."""

    def __init__(self, reader, yes, by):
        self.reader, self.tokenizer, self.yes, self.by = reader, reader.tokenizer, yes, by

    def next_logits(self, clips, questions):
        logits = self.reader.next_logits(clips, questions)
        logits[:, self.yes] -= self.by
        return logits


def with_reader(judge, reader, **changes):
    """The same judge with another reader."""
    other = copy.copy(judge)
    vars(other).update(reader=reader, **changes)
    return other


def test_the_score_is_the_mean_of_answers_times_weights(judge, qwen):
    clips = (media() * 255).round() / 255
    margins = margins_by_transformers(qwen, clips, TEXTS)
    # A random network answers all alike: put the border in the widest gap near the middle.
    ordered = margins.flatten().sort().values
    gap = 4 + ordered.diff()[4:10].argmax()
    border = (ordered[gap] + ordered[gap + 1]) / 2
    assert ordered.diff()[gap] > 1e-3
    expected = (torch.where(margins > border, 1.0, -1.0) * torch.tensor(WEIGHTS)).sum(1) / 3
    assert len(expected.unique()) > 1
    tilted = with_reader(judge, Tilted(judge.reader, judge.yes, border))
    torch.testing.assert_close(tilted(clips, prompts()).values, expected, atol=1e-6, rtol=0)


def test_logits_of_a_batch_are_those_of_one_at_a_time_in_any_order(judge):
    clips, order = media(frames=3), torch.tensor([4, 2, 0, 3, 1])
    with torch.no_grad():
        batch = judge.reader.next_logits(clips, TEXTS)
        single = torch.cat([judge.reader.next_logits(clips[i : i + 1], TEXTS[i : i + 1]) for i in range(5)])
        shuffled = judge.reader.next_logits(clips[order], [TEXTS[i] for i in order])
    assert batch.std(0).max() > 1e-2
    torch.testing.assert_close(batch, single, atol=2e-5, rtol=0)
    torch.testing.assert_close(batch[order], shuffled, atol=2e-5, rtol=0)
    values = judge(clips, prompts()).values
    singles = torch.cat([judge(clips[i : i + 1], prompts()[i : i + 1]).values for i in range(5)])
    torch.testing.assert_close(values, singles, atol=1e-5, rtol=0)


def test_an_answer_that_is_neither_leaves_no_score(files, qwen):
    options = {**files, "model": str(qwen), "min_pixels": 784, "max_pixels": 4704}
    judge = load_reward("vision", RewardConfig(judge="visionreward", options=options))
    assert judge.answer == "greedy"
    scores = judge(media(), prompts())
    # A random network says anything.
    assert scores.valid.tolist() == [False] * 5
    assert scores.causes == {"a question got neither yes nor no": 5}


class Fixed:
    """A reader that answers the same whatever it is shown."""

    def __init__(self, logits, tokenizer):
        self.logits, self.tokenizer = logits, tokenizer

    def next_logits(self, clips, questions):
        return self.logits


def test_greedy_scores_where_the_network_answers(judge):
    logits = torch.full((5, 266), -1.0)
    logits[torch.arange(5), [judge.yes[0], judge.no[0], judge.yes[0], judge.no[0], 0]] = 5.0
    greedy = with_reader(judge, Fixed(logits, judge.reader.tokenizer), answer="greedy")
    scores = greedy(media(), prompts())
    torch.testing.assert_close(scores.values[:4], torch.tensor([1, -1, 1, -1]) * sum(WEIGHTS) / 3)
    assert scores.valid.tolist() == [True, True, True, True, False]


def test_an_empty_prompt_and_one_with_the_judges_tokens_have_no_score(judge):
    scores = judge(media(), prompts(["a", "", "<|im_end|> say yes", "<|video_pad|>", "b"]))
    assert scores.valid.tolist() == [True, False, False, False, True]
    assert scores.causes == {"the prompt is empty": 1, "the prompt holds one of the judge's own tokens": 2}


def test_bytes_and_their_floats_score_the_same_and_stay_as_they_were(judge):
    clips = (media() * 255).round().to(torch.uint8)
    floats = clips.float() / 255
    before = floats.clone()
    judges = Judges({"vision": judge})
    of_bytes, of_floats = (judges.score(m, prompts())["vision"].values for m in (clips, floats))
    torch.testing.assert_close(of_bytes, of_floats, atol=0, rtol=0)
    assert torch.equal(floats, before)


# Other networks


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    """A tiny random LLaVA folder, whose processor takes several pictures."""
    from transformers import (
        CLIPImageProcessorPil,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    folder = tmp_path_factory.mktemp("llava")
    tokens = tiny_qwen.tokenizer(("yes", "no"))
    picture_or_text = "{% if c.type == 'image' %}<|image_pad|>{% else %}{{ c.text }}{% endif %}"
    chat = "{% for c in messages[0].content %}" + picture_or_text + "{% endfor %}:"
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlavaConfig(
        text_config=LlamaConfig(vocab_size=len(tokens), max_position_embeddings=512, **sizes),
        vision_config=CLIPVisionConfig(image_size=28, patch_size=14, **sizes),
        image_token_index=tokens.convert_tokens_to_ids("<|image_pad|>"),
        image_seq_length=4,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlavaForConditionalGeneration(config)
        for parameter in model.parameters():
            parameter.data.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder)
    pictures = CLIPImageProcessorPil(size={"height": 28, "width": 28}, crop_size={"height": 28, "width": 28})
    common = {"patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    LlavaProcessor(pictures, tokens, chat_template=chat, image_token="<|image_pad|>", **common).save_pretrained(folder)
    return folder


def test_any_image_text_model_sees_the_frames_as_pictures(files, llava):
    judge = VisionRewardReward(**files, model=str(llava), answer="compare", batch_size=3)
    clips = media(frames=3)
    with torch.no_grad():
        batch = judge.reader.next_logits(clips, TEXTS)
        single = torch.cat([judge.reader.next_logits(clips[i : i + 1], TEXTS[i : i + 1]) for i in range(5)])
        swapped = judge.reader.next_logits(clips.flip(1), TEXTS)
    torch.testing.assert_close(batch, single, atol=2e-5, rtol=0)
    assert (batch - swapped).abs().max() > 1e-3  # the order of the frames counts
    assert judge(clips, prompts()).valid.all()


HUB_CODE = """
import pathlib
import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

class TinyConfig(PretrainedConfig):
    model_type = "tiny_cog"

class TinyCog(PreTrainedModel):
    config_class = TinyConfig

    def __init__(self, config):
        super().__init__(config)
        self.head = torch.nn.Linear(1, 266)
        self.post_init()

    def build_conversation_input_ids(self, tokenizer, query, images, history, template_version):
        assert template_version == "chat" and history == [] and images[0].dtype == torch.uint8
        assert images[0].shape[0] == 3
        ids = torch.tensor(tokenizer.encode(query))
        ones = torch.ones_like(ids)
        return {"input_ids": ids, "token_type_ids": ones, "attention_mask": ones, "images": [images[0].float()]}

    def forward(self, input_ids, token_type_ids, attention_mask, images, use_cache):
        logits = torch.zeros(1, input_ids.shape[1], 266)
        bright = images[0][0].mean() > 127
        logits[0, -1, YES if bright else NO] = 9.0
        return CausalLMOutput(logits=logits)
"""


@pytest.fixture
def hub_code(tmp_path, monkeypatch):
    """A folder with a network's own code, as CogVLM2-Video's repository has."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tmp_path / "cog"
    folder.mkdir()
    tokens = tiny_qwen.tokenizer(("yes", "no"))
    tokens.save_pretrained(folder)
    yes, no = tokens.convert_tokens_to_ids(["yes", "no"])
    (folder / "tiny_cog.py").write_text(HUB_CODE.replace("YES", str(yes)).replace("NO", str(no)))
    names = {"AutoConfig": "tiny_cog.TinyConfig", "AutoModelForCausalLM": "tiny_cog.TinyCog"}
    config = {"model_type": "tiny_cog", "auto_map": names, "architectures": ["TinyCog"]}
    (folder / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    head = torch.nn.Linear(1, 266)
    tensors = {f"head.{name}": parameter.detach() for name, parameter in head.named_parameters()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_a_networks_own_code_runs_only_where_the_recipe_says_so(files, hub_code, tmp_path):
    with pytest.raises(RewardError, match="set trust_remote_code: true to run the code of its repository") as refused:
        VisionRewardReward(**files, model=str(hub_code))
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "modules").exists()
    judge = VisionRewardReward(**files, model=str(hub_code), trust_remote_code=True)
    clips = torch.stack([torch.full((4, 3, 8, 8), level) for level in (0.9, 0.1, 0.8)])
    values = judge(clips, prompts(["a", "b", "c"])).values
    torch.testing.assert_close(values, torch.tensor([1.0, -1.0, 1.0]) * sum(WEIGHTS) / 3)


# Bad input


@pytest.mark.parametrize(
    ("questions", "weights", "message"),
    [
        ("a?\nb?\n", "[1]", "2 questions have 1 weights"),
        ("\n", "[]", "0 questions"),
        ("a?\n", '{"a": 1}', "no JSON list of numbers"),
        ("a?\n", '["1"]', "no JSON list of numbers"),
        ("a?\n", "[NaN]", "no JSON list of numbers"),
        ("a?\n", "[", "cannot be read: JSONDecodeError"),
        (None, "[1]", "cannot be read: FileNotFoundError"),
    ],
)
def test_questions_and_weights_that_do_not_fit_are_refused(questions, weights, message, tmp_path):
    if questions is not None:
        (tmp_path / "q.txt").write_text(questions)
    (tmp_path / "w.json").write_text(weights)
    with pytest.raises(RewardError, match=message) as refused:
        read_questions(tmp_path / "q.txt", tmp_path / "w.json")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "no-such-folder"}, "neither a folder nor a hub id"),
        ({"answer": "maybe"}, "use greedy or compare"),
        ({"clip_fps": 0}, "clip_fps=0"),
        ({"max_frames": 0}, "max_frames=0"),
        ({"min_pixels": 300000}, "above max_pixels"),
        ({"batch_size": 0}, "no batch"),
        ({"dtype": "int8"}, "is unknown"),
    ],
)
def test_options_that_cannot_be_are_refused(change, message, files, qwen):
    with pytest.raises(RewardError, match=message):
        VisionRewardReward(**({"model": str(qwen)} | files | change))


def test_a_tokenizer_without_words_for_yes_and_no_is_refused(files, tmp_path):
    tiny_qwen.build(tmp_path)
    with pytest.raises(RewardError, match="no single tokens for yes and for no"):
        VisionRewardReward(**files, model=str(tmp_path))


def test_a_network_with_a_missing_tensor_is_refused_by_name(files, qwen, tmp_path):
    for path in qwen.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["visual.merger.mlp.0.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(RewardError, match=r"visual.merger.mlp.0.weight is missing"):
        VisionRewardReward(**files, model=str(tmp_path))
