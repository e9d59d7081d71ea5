"""The GenEval judge end to end: a tiny random Mask2Former and a tiny random CLIP, saved like the published ones."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from dancegrpo.errors import RewardError
from dancegrpo.prompts import Prompt
from dancegrpo.rewards import Judges, load_reward
from dancegrpo.rewards.geneval import GenEvalReward, Output, instances, object_crop
from dancegrpo.rewards.geneval_rule import COLORS, Detection, read_task
from dancegrpo.rewards.geneval_rule import judge as rule
from dancegrpo.settings import RewardConfig
from dancegrpo.statistics import summarize
from tiny import _clip_tokenizer

# COCO's classes as the published checkpoint names them.
LABELS = """person, bicycle, car, motorbike, aeroplane, bus, train, truck, boat, traffic light, fire hydrant, stop sign,
parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, backpack, umbrella, handbag,
tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, skateboard, surfboard,
tennis racket, bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange, broccoli, carrot,
hot dog, pizza, donut, cake, chair, sofa, pottedplant, bed, diningtable, toilet, tvmonitor, laptop, mouse, remote,
keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, book, clock, vase, scissors, teddy bear,
hair drier, toothbrush""".replace("\n", " ").split(", ")
SEEN = ("bench", "dog", "cup")
"""Classes that the tiny detector is made to see everywhere."""


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    """A folder with a Mask2Former-Swin of 80 classes and its preprocessor; it sees `SEEN`, here more and there less."""
    from transformers import (
        Mask2FormerConfig,
        Mask2FormerForUniversalSegmentation,
        Mask2FormerImageProcessorPil,
        SwinConfig,
    )

    stages = ["stage1", "stage2", "stage3", "stage4"]
    swin = SwinConfig(embed_dim=8, depths=[1] * 4, num_heads=[1, 1, 2, 2], window_size=2, out_features=stages)
    sizes = {"feature_size": 32, "mask_feature_size": 32, "hidden_dim": 32, "dim_feedforward": 32}
    layers = {"encoder_feedforward_dim": 32, "encoder_layers": 1, "decoder_layers": 2, "num_attention_heads": 2}
    labels = dict(enumerate(LABELS))
    config = Mask2FormerConfig(backbone_config=swin, num_queries=8, id2label=labels, **sizes, **layers)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(3)
        model = Mask2FormerForUniversalSegmentation(config)
        model.class_predictor.weight.normal_(std=0.35)
        model.class_predictor.bias[[LABELS.index(name) for name in SEEN]] += 5
    folder = tmp_path_factory.mktemp("detector")
    model.save_pretrained(folder)
    Mask2FormerImageProcessorPil(size={"shortest_edge": 64, "longest_edge": 128}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A folder with a CLIP of random weights, its tokenizer and its preprocessor."""
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

    tokenizer, shared = _clip_tokenizer(), {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    text = shared | {"vocab_size": len(tokenizer), "hidden_size": 16, "bos_token_id": tokenizer.bos_token_id}
    text |= {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    vision = shared | {"hidden_size": 16, "image_size": 28, "patch_size": 14}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=8, initializer_factor=20.0)
    folder = tmp_path_factory.mktemp("clip")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    crop = {"height": 28, "width": 28}
    CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size=crop).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def options(detector, clip):
    """Of a judge whose thresholds suit a detector that is never certain."""
    return {"detector": str(detector), "clip": str(clip), "threshold": 0.06, "counting_threshold": 0.15}


@pytest.fixture(scope="module")
def judge(options):
    return GenEvalReward(**options)


@pytest.fixture
def own_judge(options):
    """One that a test may break."""
    return GenEvalReward(**options)


def media(size=4, height=40, width=56, seed=1):
    """Smooth random pictures, as bytes."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(size, 3, 5, 7, generator=generator)
    fine = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bicubic").clamp(0, 1)
    return (fine[:, None] * 255).round().to(torch.uint8)


def asks(*include, tag="two_object", **others):
    return {"tag": tag, "include": list(include), **others}


def of(name, count=1, **others):
    return {"class": name, "count": count, **others}


METADATA = [
    asks(of("bench")),
    asks(of("cup", 3)),
    asks(of("dog", color="red"), of("cup", color="blue")),
    asks(of("dog"), of("bench", position=["left of", 0])),
    asks(of("bench", 3), tag="counting", exclude=[of("bench", 4)]),
    asks(of("couch")),
    *[asks(of("bench", color=color)) for color in ("red", "blue", "purple")],
    asks(of("dog", color="green")),
]


def every_pair():
    """All of four pictures with all the metadata."""
    pictures = media()
    prompts = [Prompt(i, "any", metadata=METADATA[i // 4]) for i in range(4 * len(METADATA))]
    return pictures.repeat(len(METADATA), 1, 1, 1, 1), prompts


def ask(judge, metadata, picture):
    return judge(picture[None], [Prompt(0, "any", metadata=metadata)])


# Against the same steps taken differently


@pytest.fixture(scope="module")
def reference_objects(detector):
    """picture (1, 3, H, W) uint8 -> by class the (score, box, mask) of all queries, most certain first.

    By transformers' own model and processor on a PIL image, all masks at once.
    """
    from transformers import Mask2FormerForUniversalSegmentation, Mask2FormerImageProcessorPil

    model = Mask2FormerForUniversalSegmentation.from_pretrained(detector).eval()
    processor = Mask2FormerImageProcessorPil.from_pretrained(detector)

    def objects(picture):
        image = Image.fromarray(picture[0].permute(1, 2, 0).numpy())
        inputs = processor(image, return_tensors="pt")
        with torch.no_grad():
            output = model(**inputs)
        masks = output.masks_queries_logits
        for size in (inputs["pixel_values"].shape[-2:], image.size[::-1]):
            masks = torch.nn.functional.interpolate(masks, size=size, mode="bilinear", align_corners=False)
        inside = masks[0] > 0
        certainty = (masks[0].double().sigmoid() * inside).sum((1, 2)) / (inside.sum((1, 2)) + 1e-6)
        scores = output.class_queries_logits[0].softmax(-1)[:, :-1].double() * certainty[:, None]
        boxes = []
        for mask in inside:
            y, x = np.nonzero(mask.numpy())
            boxes.append((x.min(), y.min(), x.max() + 1, y.max() + 1) if len(x) else (0, 0, 0, 0))
        found = {}
        for name in SEEN:
            column = scores[:, LABELS.index(name)]
            ranked = column.argsort(descending=True).tolist()
            found[name] = [(column[query].item(), boxes[query], inside[query].numpy()) for query in ranked]
        return found

    return objects


@pytest.fixture(scope="module")
def reference_colors(clip):
    """(PIL images, class) -> their colors, by the forward pass of transformers' CLIP."""
    from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

    model, tokenizer = CLIPModel.from_pretrained(clip).eval(), CLIPTokenizer.from_pretrained(clip)
    processor = CLIPImageProcessorPil.from_pretrained(clip)

    def colors(crops, name):
        pixels, similarities = processor(images=crops, return_tensors="pt"), []
        for color in COLORS:
            texts = [f"a photo of a {color}{rest}" for rest in (f" {name}", f"-colored {name}", " object")]
            with torch.no_grad():
                output = model(**pixels, **tokenizer(texts, padding=True, return_tensors="pt"))
            mean = output.text_embeds.mean(0)
            similarities.append(output.image_embeds @ (mean / mean.norm()))
        return [COLORS[index] for index in torch.stack(similarities, 1).argmax(1).tolist()]

    return colors


@pytest.mark.parametrize(("height", "width"), [(40, 56), (64, 64), (90, 33)])
def test_objects_equal_those_of_all_masks_at_once(height, width, judge, reference_objects):
    picture = media(1, height, width)[0]
    output = judge._detect(picture.permute(0, 2, 3, 1).numpy())[0]
    found = instances(output, {LABELS.index(name): name for name in SEEN}, 0.05, 16)
    reference = reference_objects(picture)
    expected = {name: [one for one in these if one[0] > 0.05] for name, these in reference.items()}
    assert sum(map(len, expected.values())) > 2
    for name in SEEN:
        assert [one.score for one in found[name]] == pytest.approx([score for score, _, _ in expected[name]], abs=1e-5)
        assert [one.box for one in found[name]] == [box for _, box, _ in expected[name]]
        for one, (_, _, mask) in zip(found[name], expected[name], strict=True):
            np.testing.assert_array_equal(one.mask, mask)


def test_colors_equal_those_of_clips_own_forward_pass(judge, reference_colors):
    pictures = media(24)[:, 0].permute(0, 2, 3, 1).numpy()
    found = Detection((3, 4, 41, 37), 0.9, np.ones((40, 56), dtype=bool))
    told = [color for picture in pictures for color in judge.colors(picture, "dog", [found])]
    crops = [Image.fromarray(picture).crop((3, 4, 41, 37)) for picture in pictures]
    assert told == reference_colors(crops, "dog")
    assert len(set(told)) > 1


def test_an_object_is_cut_out_before_grey_as_pil_would():
    picture = media(1)[0, 0].permute(1, 2, 0).numpy()
    mask = np.add.outer(np.arange(40), np.arange(56)) % 3 == 0
    crop = object_crop(picture, Detection((5, 7, 30, 21), 0.9, mask))
    image = Image.fromarray(picture)
    expected = Image.composite(image, Image.new("RGB", image.size, "#999"), Image.fromarray(mask)).crop((5, 7, 30, 21))
    np.testing.assert_array_equal(np.asarray(crop), np.asarray(expected))


def test_verdicts_are_the_rules_on_the_objects_and_colors_found(judge, reference_objects, reference_colors):
    pictures, prompts = every_pair()
    objects = [reference_objects(picture) for picture in pictures[:4]]
    expected = []
    for index, prompt in enumerate(prompts):
        threshold = 0.15 if prompt.metadata["tag"] == "counting" else 0.06
        found = {
            name: [Detection(box, score, mask) for score, box, mask in these if score > threshold]
            for name, these in objects[index % 4].items()
        }
        image = pictures[index][0].permute(1, 2, 0).numpy()

        def colors(name, chosen, image=image):
            return reference_colors([object_crop(image, one) for one in chosen], name)

        verdict = rule(read_task(prompt.metadata), found, colors)
        expected.append((float(verdict.correct), verdict.credit))
    correct, credit = map(list, zip(*expected, strict=True))
    exact = judge(pictures, prompts)
    assert exact.valid.all()
    assert exact.values.tolist() == correct
    assert exact.extra["pass"].tolist() == correct
    assert 0.1 < np.mean(correct) < 0.9
    judge.partial = True
    try:
        graded = judge(pictures[4:8], prompts[4:8])
    finally:
        judge.partial = False
    assert graded.values.tolist() == pytest.approx(credit[4:8])
    assert graded.extra["pass"].tolist() == correct[4:8]
    assert set(credit[4:8]) - {0.0, 1.0}


# What must not matter


def test_a_batch_scores_like_one_at_a_time_in_any_order(judge):
    pictures, prompts = every_pair()
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(0)).tolist()
    whole = judge(pictures[order], [prompts[i] for i in order])
    single = {i: judge(pictures[i : i + 1], prompts[i : i + 1]).values.item() for i in order[:8]}
    assert {i: whole.values[order.index(i)].item() for i in single} == single


def test_bytes_score_like_the_same_floats_and_stay_as_they_are(judge):
    pictures, prompts = every_pair()
    chosen = slice(36, 40)
    floats = pictures[chosen].float() / 255
    before = floats.clone()
    judge_floats = judge(floats, prompts[chosen]).values
    assert torch.equal(judge_floats, judge(pictures[chosen], prompts[chosen]).values)
    assert torch.equal(floats, before)


def test_the_order_of_scoring_does_not_matter(options, judge):
    pictures, prompts = every_pair()
    fresh = GenEvalReward(**options)
    assert torch.equal(fresh(pictures[36:40], prompts[36:40]).values, judge(pictures[36:40], prompts[36:40]).values)


# Thresholds and the detector's output


def planted(*objects, classes=4, side=8):
    """The output that says: for each query (class, logit, columns of the mask), on a picture of side x side."""
    class_logits = torch.zeros(len(objects), classes + 1)
    mask_logits = torch.full((len(objects), side, side), -9.0)
    for query, (label, logit, columns) in enumerate(objects):
        class_logits[query, label] = logit
        mask_logits[query, :, columns] = 9.0
    return Output(class_logits, mask_logits, ((side, side), (side, side)))


def test_one_objects_score_and_box_by_hand():
    found = instances(planted((1, 3.0, slice(2, 5))), {1: "cup", 2: "dog"}, 0.3, 16)
    (one,) = found["cup"]
    assert found["dog"] == []
    e = np.exp(3)
    assert one.score == pytest.approx(e / (e + 4) / (1 + np.exp(-9)), abs=1e-6)
    assert one.box == (2, 0, 5, 8)
    assert one.mask.sum() == 24


def test_objects_come_most_certain_first_and_at_most_so_many_of_a_class():
    output = planted((1, 3.0, slice(0, 2)), (1, 5.0, slice(2, 4)), (1, 4.0, slice(4, 6)), (2, 3.5, slice(6, 8)))
    found = instances(output, {1: "cup", 2: "dog"}, 0.3, 2)
    assert [one.box[0] for one in found["cup"]] == [2, 4]
    assert [one.box[0] for one in found["dog"]] == [6]


def test_objects_that_cover_each_other_stay():
    assert len(instances(planted((1, 3.0, slice(0, 4)), (1, 3.0, slice(0, 4))), {1: "cup"}, 0.3, 16)["cup"]) == 2


def test_the_probability_of_no_object_makes_no_object():
    assert instances(planted((4, 9.0, slice(0, 4))), {i: str(i) for i in range(4)}, 0.3, 16) == {
        str(i): [] for i in range(4)
    }


def test_a_query_without_a_mask_is_no_object():
    assert instances(planted((1, 9.0, slice(0, 0))), {1: "cup"}, 0.0, 16)["cup"] == []


def test_only_counting_asks_for_the_higher_certainty(own_judge):
    own_judge.counting_threshold = 0.99
    picture = media(1)[0]
    assert ask(own_judge, asks(of("bench"), tag="single_object"), picture).values.item() == 1
    assert ask(own_judge, asks(of("bench"), tag="counting"), picture).values.item() == 0


def test_every_class_of_coco_is_known_by_genevals_name(judge):
    renamed = {"motorcycle", "airplane", "couch", "potted plant", "dining table", "tv"}
    renamed |= {"computer mouse", "tv remote", "computer keyboard"}
    kept = set(LABELS) - {"motorbike", "aeroplane", "sofa", "pottedplant", "diningtable", "tvmonitor"}
    assert judge.classes.keys() == renamed | kept - {"mouse", "remote", "keyboard"}
    assert judge.classes["tv remote"] == LABELS.index("remote")


# Samples without a score


def test_prompts_without_the_metadata_are_masked_and_the_others_scored(judge):
    pictures, prompts = every_pair()
    mixed = [prompts[0], Prompt(1, "a bench"), prompts[1], Prompt(2, "x", metadata=asks(of("wombat")))]
    scores = judge(pictures[[0, 0, 1, 1]], mixed)
    assert scores.valid.tolist() == [True, False, True, False]
    assert scores.values[[0, 2]].tolist() == judge(pictures[:2], prompts[:2]).values.tolist()
    assert scores.values.isnan().tolist() == [False, True, False, True]
    no_class = "the detector knows no class 'wombat'"
    assert scores.causes == {"the prompt has no GenEval metadata (tag, include)": 1, no_class: 1}


def test_a_batch_of_prompts_without_the_metadata_has_no_score_at_all(judge):
    scores = judge(media(2), [Prompt(0, "a"), Prompt(1, "b")])
    assert not scores.valid.any()
    assert scores.causes == {"the prompt has no GenEval metadata (tag, include)": 2}


@pytest.mark.parametrize("value", [float("nan"), 1.5, -0.1])
def test_broken_pixels_are_masked(value, judge):
    pictures, prompts = every_pair()
    floats = pictures[:2].float() / 255
    floats[0, 0, 0, 0, 0] = value
    scores = judge(floats, prompts[:2])
    assert scores.valid.tolist() == [False, True]
    assert scores.causes == {"the picture has values outside [0, 1] or not finite": 1}


@pytest.mark.parametrize("part", ["class_predictor.bias", "model.pixel_level_module.decoder.mask_projection.bias"])
def test_a_detector_that_overflows_gives_no_score(part, own_judge):
    own_judge.model["detector"].get_parameter(part).fill_(float("nan"))
    scores = ask(own_judge, METADATA[0], media(1)[0])
    assert not scores.valid.any()
    assert scores.causes == {"the detector's output is not finite": 1}


def test_a_color_classifier_that_overflows_gives_no_score(own_judge):
    own_judge.model["clip"].visual_projection.weight.fill_(float("nan"))
    scores = ask(own_judge, asks(of("bench", color="red")), media(1)[0])
    assert not scores.valid.any()
    assert scores.causes == {"the color classifier's output is not finite": 1}
    assert ask(own_judge, asks(of("bench")), media(1)[0]).valid.all()


def test_clips_are_refused(judge):
    with pytest.raises(RewardError, match="takes pictures, not clips of 2 frames"):
        judge(torch.zeros(1, 2, 3, 8, 8), [Prompt(0, "a", metadata=METADATA[0])])


# In a run


def test_a_recipe_names_it_and_its_pass_rate_comes_by_task(options):
    config = RewardConfig(judge="geneval", options={**options, "partial": True, "batch_size": 3})
    pictures, prompts = every_pair()
    chosen = [0, 1, 2, 3, 16, 17, 18, 19]
    scores = Judges({"geneval": load_reward("geneval", config)}).score(pictures[chosen], [prompts[i] for i in chosen])
    told = scores["geneval"]
    columns = {"geneval": told.values.tolist(), "geneval/pass": told.extra["pass"].tolist()}
    tasks = [prompts[i].metadata["tag"] for i in chosen]
    record = {"iteration": 0, "columns": columns, "valid": {"geneval": told.valid.tolist()}, "tasks": tasks}
    summary = summarize(record)
    passed = told.extra["pass"].view(2, 4).mean(1).tolist()
    rates = {task: rate.rate for task, rate in summary.tasks["geneval/pass"].items()}
    assert rates == {"two_object": passed[0], "counting": passed[1]}
    assert summary.task_mean("geneval/pass") == pytest.approx(sum(passed) / 2)


def test_half_precision_scores_every_sample(options):
    pictures, prompts = every_pair()
    scores = GenEvalReward(**options, dtype="bfloat16")(pictures[36:], prompts[36:])
    assert scores.valid.all()
    assert set(scores.values.tolist()) <= {0.0, 1.0}


# Checkpoints


def altered(folder, target, change):
    """A copy of a checkpoint folder, its tensors changed."""
    shutil.copytree(folder, target)
    tensors = load_file(target / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return str(target)


BLOCK = "model.pixel_level_module.encoder.encoder.layers.0.blocks.0.attention.self"


def test_older_checkpoints_with_index_buffers_and_without_the_loss_load(detector, options, tmp_path, judge):
    def change(tensors):
        tensors[f"{BLOCK}.relative_position_index"] = torch.zeros(4, 4, dtype=torch.int64)
        del tensors["criterion.empty_weight"]

    loaded = GenEvalReward(**{**options, "detector": altered(detector, tmp_path / "old", change)})
    pictures = media(1)[:, 0].permute(0, 2, 3, 1).numpy()
    mine, other = loaded._detect(pictures)[0], judge._detect(pictures)[0]
    assert torch.equal(mine.class_logits, other.class_logits)
    assert torch.equal(mine.mask_logits, other.mask_logits)


@pytest.mark.parametrize(
    ("which", "change", "message"),
    [
        ("detector", lambda t: t.pop("class_predictor.weight"), "class_predictor.weight is missing"),
        ("detector", lambda t: t.update(spare=torch.zeros(1)), "spare is extra"),
        ("detector", lambda t: t.update({"class_predictor.bias": torch.zeros(5)}), r"class_predictor.bias is \(5,\)"),
        ("clip", lambda t: t.pop("visual_projection.weight"), "visual_projection.weight is missing"),
        ("clip", lambda t: t.update(spare=torch.zeros(1)), "spare is extra"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_by_name(which, change, message, detector, clip, options, tmp_path):
    path = altered({"detector": detector, "clip": clip}[which], tmp_path / "bad", change)
    with pytest.raises(RewardError, match=message) as caught:
        GenEvalReward(**{**options, which: path})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("which", ["detector", "clip"])
def test_a_folder_without_its_preprocessor_is_refused(which, detector, clip, options, tmp_path):
    folder = shutil.copytree({"detector": detector, "clip": clip}[which], tmp_path / "bare")
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(RewardError, match=f"{which}=.*has no preprocessor") as caught:
        GenEvalReward(**{**options, which: str(folder)})
    assert "\n" not in str(caught.value)


def test_a_tokenizer_of_another_vocabulary_is_refused(clip, options, tmp_path):
    folder = shutil.copytree(clip, tmp_path / "other")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["vocab_size"] += 1
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    embedding = tensors["text_model.embeddings.token_embedding.weight"]
    tensors["text_model.embeddings.token_embedding.weight"] = torch.cat([embedding, embedding[:1]])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RewardError, match="ends texts with id"):
        GenEvalReward(**{**options, "clip": str(folder)})


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"threshold": 1.0}, "threshold=1.0 of the geneval judge is no score: use 0 or more, less than 1."),
        ({"counting_threshold": -0.1}, "counting_threshold=-0.1 of the geneval judge"),
        ({"max_objects": 0}, "max_objects=0 of the geneval judge finds nothing: use 1 or more."),
        ({"dtype": "int8"}, "dtype='int8' of the geneval judge is unknown"),
        ({"batch_size": 0}, "batch_size=0 of the geneval judge"),
        ({"detector": "/nowhere"}, "detector='/nowhere' of the geneval judge is neither a folder nor a hub id"),
        ({"clip": "/nowhere"}, "clip='/nowhere' of the geneval judge is neither a folder nor a hub id"),
    ],
)
def test_settings_that_cannot_be_are_refused(wrong, message, options):
    with pytest.raises(RewardError) as caught:
        GenEvalReward(**{**options, **wrong})
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)
