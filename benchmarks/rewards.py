"""What scoring costs beside the network's bare forward pass: `python benchmarks/rewards.py --pairs 10`.

The HPS-v2.1 judge (ViT-H-14 at 224 px, random weights: no download) scores pictures through the panel, preprocessing,
text features (cached, as in a run) and checks included; the floor is the vision tower on pixels that are ready, at the
same batch size. Both alternate in one process; the result is images per second and the median of the paired ratios.
"""

from __future__ import annotations

import argparse
import json
import statistics
from typing import Any

import torch

from dancegrpo.prompts import Prompt
from dancegrpo.rewards import Judges
from dancegrpo.rewards.clip import CosineReward, image_features
from dancegrpo.rewards.hps import HPSReward
from dancegrpo.rewards.open_clip import VIT_H_14, Architecture, Tower, build_clip
from timing import timed

SIZES = {
    "vit-h-14": VIT_H_14,
    "small": Architecture(Tower(384, 1536, 6, 6), Tower(64, 256, 1, 1), 64, 224, 14, 77, 49408),
}


class RandomHPS(HPSReward):
    """HPS with random weights, and random token ids in place of a vocabulary."""

    def __init__(self, architecture: Architecture, batch_size: int, dtype: str, device: str) -> None:
        torch.manual_seed(0)
        model = build_clip(architecture).to_empty(device="cpu")
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        for embeddings in (model.text_model.embeddings, model.vision_model.embeddings):
            embeddings.position_ids = torch.arange(embeddings.position_embedding.num_embeddings)[None]
        CosineReward.__init__(self, model, None, batch_size=batch_size, dtype=dtype, device=device)

    def tokenize(self, texts: Any) -> torch.Tensor:
        ids = torch.randint(0, 49406, (len(texts), self.model.config.text_config.max_position_embeddings))
        ids[:, -1] = 49407
        return ids


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=SIZES, default="vit-h-14")
    parser.add_argument("--images", type=int, default=8, help="per measurement")
    parser.add_argument("--side", type=int, default=512, help="of the pictures, in pixels")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--pairs", type=int, default=10, help="interleaved (judge, floor) pairs")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    judge = RandomHPS(SIZES[args.network], args.batch_size, args.dtype, args.device)
    judges = Judges({"hps": judge})
    media = torch.rand(args.images, 1, 3, args.side, args.side, device=args.device)
    prompts = [Prompt(i, f"a prompt, number {i // 4}") for i in range(args.images)]
    pixels = judge.pixels(media[:, 0])

    def bare() -> None:
        for batch in pixels.split(args.batch_size):
            image_features(judge.model, batch)

    with torch.no_grad():
        judges.score(media, prompts)  # warm-up, and the texts
        bare()
        rows = [(timed(lambda: judges.score(media, prompts)), timed(bare)) for _ in range(args.pairs)]
    shares = [floor / whole for whole, floor in rows]
    result = {
        "network": args.network,
        "side": args.side,
        "batch_size": args.batch_size,
        "dtype": args.dtype,
        "device": args.device,
        "threads": torch.get_num_threads(),
        "images_per_second": args.images / statistics.median(whole for whole, _ in rows),
        "share_of_bare_forward": statistics.median(shares),
        "shares": [round(share, 4) for share in sorted(shares)],
    }
    if args.json:
        print(json.dumps(result, indent=1))
    else:
        print(f"{args.network} on {args.device}, {args.dtype}: {result['images_per_second']:.3g} images per second")
        print(
            f"share of a bare forward pass: {result['share_of_bare_forward']:.3f}, {min(shares):.3f}-{max(shares):.3f}"
        )


if __name__ == "__main__":
    main()
