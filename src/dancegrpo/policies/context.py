"""Context parallelism: which networks can be split over ranks, and how where diffusers does not say it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import count
from typing import Any

from torch import Tensor
from torch.nn.functional import pad

from dancegrpo.distributed import World
from dancegrpo.errors import ConfigError
from dancegrpo.settings import ModelConfig


def require_split(
    family: str,
    network: Any,
    model: ModelConfig,
    plan: Mapping[str, Any] | None,
    grid: tuple[int, ...],
    degree: int,
) -> None:
    """Raises ConfigError for a denoiser that `degree` ranks cannot compute in equal pieces.

    grid: (frames, rows, columns) or (rows, columns) of its tokens at the run's size; () = not known.
    """
    asked, kind = f"parallel.context={degree}", type(network).__name__
    if plan is None:
        raise ConfigError(f"{asked}: no sequences of {family}'s {kind} can be split, set it to 1 and use parallel.fsdp")
    heads = network.config.get("num_attention_heads")
    if heads and heads % degree:
        fitting = ", ".join(str(n) for n in range(2, heads + 1) if heads % n == 0)
        raise ConfigError(f"{asked} does not divide the {heads} attention heads of {kind}: use one of {fitting}")
    if grid and math.prod(grid) % degree:
        *frames, rows, columns = grid
        others = math.prod(frames) * columns
        near = next(r for d in count(1) for r in (rows - d, rows + d) if r > 0 and r * others % degree == 0)
        size = f"{model.height} x {model.width} pixels" + f" and {model.num_frames} frames" * bool(frames)
        raise ConfigError(
            f"{asked} does not divide the {math.prod(grid)} tokens of {size}: use model.height="
            f"{model.height // rows * near}, or another number of ranks"
        )


def filled(states: Tensor, mask: Tensor, degree: int) -> tuple[Tensor, Tensor]:
    """states (B, L, D), mask (B, L) -> both as long as the next multiple of degree; what is added is masked."""
    lacking = -states.shape[1] % degree
    if not lacking:
        return states, mask
    return pad(states, (0, 0, 0, lacking)), pad(mask, (0, lacking))


def hunyuan_plan() -> dict[str, Any]:
    """What is split and gathered in HunyuanVideo's transformer, for which diffusers has no plan.

    The refiner of the text sees all of it, on every rank; the blocks see a piece of the clip and a piece of the text.
    In its `forward` the transformer counts the tokens that the mask leaves, of the piece it has: split, the mask of a
    right-padded text is right for each piece, and the attention gathers it. The refiner wants the whole one:
    `split_text_masks`.
    """
    from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput

    tokens = ContextParallelInput(split_dim=1, expected_dims=3, split_output=True)
    angles = ContextParallelInput(split_dim=0, expected_dims=2, split_output=True)
    return {
        "": {"encoder_attention_mask": ContextParallelInput(split_dim=1, expected_dims=2)},
        "rope": {0: angles, 1: angles},
        "x_embedder": {0: tokens},
        "context_embedder": {0: tokens},
        "proj_out": ContextParallelOutput(gather_dim=1, expected_dims=3),
    }


def split_text_masks(network: Any, world: World) -> None:
    """Beside `hunyuan_plan`: the refiner of the text is given the whole mask, and blocks that treat the tokens of a
    given first frame apart (`token_replace`) are told how many of them are in this rank's piece."""

    def whole_mask(_: Any, told: tuple[Any, ...]) -> tuple[Any, ...]:
        states, timestep, mask = told
        return states, timestep, world.whole_sequence(mask)

    def own_tokens(_: Any, told: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden, *others, first_frame = told
        piece = hidden.shape[1]
        return hidden, *others, min(max(first_frame - world.piece * piece, 0), piece)

    network.context_embedder.register_forward_pre_hook(whole_mask)
    if network.config.image_condition_type == "token_replace":
        for block in (*network.transformer_blocks, *network.single_transformer_blocks):
            block.register_forward_pre_hook(own_tokens)
