"""The judges that come with the package: what each measures, what it needs, and where its class lives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Entry:
    """One shipped judge.

    target: `module:class`. takes: pictures, clips, or either. measures: one line. weights: hub files it fetches where
    the recipe gives no paths, (repository, file); file None = the whole repository. extra: the dependency group it
    needs (`pip install dancegrpo[extra]`). placing: options that say where and how it is asked, not what it says: a
    resumed run may change them.
    """

    target: str
    takes: Literal["pictures", "clips", "either"]
    measures: str
    weights: tuple[tuple[str, str | None], ...] = ()
    extra: str | None = None
    placing: tuple[str, ...] = ()


CATALOG: dict[str, Entry] = {
    "aesthetic": Entry(
        "dancegrpo.rewards.aesthetic:AestheticReward",
        "pictures",
        "LAION aesthetic predictor: how beautiful a picture is, whatever the prompt",
        (("trl-lib/ddpo-aesthetic-predictor", "aesthetic-model.pth"), ("openai/clip-vit-large-patch14", None)),
    ),
    "appearance": Entry(
        "dancegrpo.rewards.appearance:AppearanceReward",
        "either",
        "saturation, edges, fine texture and variety of colours: numbers to watch, with weight 0",
    ),
    "clip": Entry(
        "dancegrpo.rewards.clip_score:ClipScoreReward",
        "pictures",
        "CLIP score: how well a picture fits its prompt, by any CLIP",
        (("openai/clip-vit-large-patch14", None),),
    ),
    "geneval": Entry(
        "dancegrpo.rewards.geneval:GenEvalReward",
        "pictures",
        "GenEval: whether a picture shows the objects, counts, colors and positions its prompt names",
        (("facebook/mask2former-swin-small-coco-instance", None), ("openai/clip-vit-large-patch14", None)),
    ),
    "hps": Entry(
        "dancegrpo.rewards.hps:HPSReward",
        "pictures",
        "HPS-v2.1: which picture people prefer for a prompt",
        (("xswu/HPSv2", "HPS_v2.1_compressed.pt"), ("openai/clip-vit-large-patch14", "tokenizer.json")),
    ),
    "human": Entry(
        "dancegrpo.rewards.human:HumanReward",
        "either",
        "what people prefer: they rank or rate each group on a page in the browser",
        placing=("port", "per_page", "fps", "wait"),
    ),
    "service": Entry(
        "dancegrpo.rewards.service.client:ServiceReward",
        "either",
        "any judge that runs in another process or on another machine, asked over HTTP",
        placing=("urls", "token_env", "token_file", "wait", "timeout", "connect_timeout", "retries", "backoff"),
    ),
    "imagereward": Entry(
        "dancegrpo.rewards.image_reward:ImageRewardReward",
        "pictures",
        "ImageReward v1.0: which picture people prefer for a prompt",
        (("THUDM/ImageReward", "ImageReward.pt"), ("google-bert/bert-base-uncased", "tokenizer.json")),
    ),
    "jpeg": Entry(
        "dancegrpo.rewards.jpeg:JpegReward",
        "pictures",
        "how well a picture compresses as JPEG, in kilobytes",
    ),
    "motion": Entry(
        "dancegrpo.rewards.motion:MotionReward",
        "either",
        "whether a clip of the moving-shapes world looks, moves and means what it should, by rules",
    ),
    "ocr": Entry(
        "dancegrpo.rewards.ocr:OCRReward",
        "pictures",
        "whether a picture shows the words that its prompt puts in quotation marks",
        extra="ocr",
    ),
    "pickscore": Entry(
        "dancegrpo.rewards.pickscore:PickScoreReward",
        "pictures",
        "PickScore: which picture people would pick for a prompt",
        (("yuvalkirstain/PickScore_v1", None), ("laion/CLIP-ViT-H-14-laion2B-s32B-b79K", "tokenizer.json")),
    ),
    "shapes": Entry(
        "dancegrpo.rewards.shapes:ShapesReward",
        "pictures",
        "whether a drawing of the shapes world shows what its caption says, by rules",
    ),
    "videoalign": Entry(
        "dancegrpo.rewards.video_align:VideoAlignReward",
        "clips",
        "VideoAlign: a clip's visual quality, motion quality and fit to its prompt, as people rate them",
        (("KwaiVGI/VideoReward", "model_config.json"), ("Qwen/Qwen2-VL-2B-Instruct", None)),
    ),
    "visionreward": Entry(
        "dancegrpo.rewards.vision_reward:VisionRewardReward",
        "clips",
        "VisionReward (video): a list of yes/no questions about a clip, weighted by what people prefer",
        (("THUDM/VisionReward-Video", None),),
    ),
    "vlm": Entry(
        "dancegrpo.rewards.vlm:VLMReward",
        "either",
        "what a vision-language model behind an OpenAI-compatible endpoint answers to your rubric",
        placing=("url", "api_key_env", "timeout", "retries", "concurrency"),
    ),
}
"""Name in a recipe -> the judge."""
