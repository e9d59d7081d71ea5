"""Frozen linear layers in 8 bits: a base that adapters are trained on takes half the memory of bfloat16."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


class Int8Linear(nn.Linear):
    """A frozen linear layer whose weight (out, in) is stored as int8, with one float32 scale per output.

    w ~ scale * q, q in [-127, 127], scale = max |w| of the row / 127: no element is off by more than scale / 2.
    Products are made in the dtype of the input (autocast's, where it is on) with the weight widened for the moment of
    the product, forwards and again backwards: autograd keeps the 8 bits. The gradient for the input is exactly that of
    the widened weight.
    """

    scale: Tensor

    def __init__(self, in_features: int, out_features: int, *, bias: Tensor | None) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach(), requires_grad=False))

    @classmethod
    @torch.no_grad()
    def of(cls, layer: nn.Linear) -> Int8Linear:
        """The layer's weight, rounded to the nearest; its bias as it is."""
        made = cls(layer.in_features, layer.out_features, bias=layer.bias)
        weight = layer.weight.detach().float()
        scale = weight.abs().amax(dim=1, keepdim=True) / 127
        steps = (weight / torch.where(scale > 0, scale, 1.0)).round()
        made.weight = nn.Parameter(steps.to(torch.int8), requires_grad=False)
        made.register_buffer("scale", scale)
        return made.train(layer.training)

    def widened(self, dtype: torch.dtype) -> Tensor:
        """The weight (out, in) that the products are made with."""
        return widen(self.weight, self.scale, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out)."""
        kind = x.device.type
        if torch.is_autocast_enabled(kind):
            x = x.to(torch.get_autocast_dtype(kind))
        product: Any = _Product.apply(x, self.weight, self.scale, self.bias)
        return product


def widen(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """int8 (out, in) and scales (out, 1) -> (out, in) of `dtype`."""
    return weight.to(dtype) * scale.to(dtype)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight, scale)
        return nn.functional.linear(x, widen(weight, scale, x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        weight, scale = ctx.saved_tensors
        return gradients[0] @ widen(weight, scale, gradients[0].dtype), None, None, None


def quantize(networks: Iterable[nn.Module]) -> int:
    """Replaces the linear layers of all repeated blocks by `Int8Linear`; returns how many there were.

    Those are nearly all of a transformer's weights. What comes before and after the blocks (embeddings, the projection
    to latents) is small, sets the scale of everything, and stays as it is.
    """
    count = 0
    for network in networks:
        blocks = [block for part in network.modules() if isinstance(part, nn.ModuleList) for block in part]
        for part in {id(inner): inner for block in blocks for inner in block.modules()}.values():
            for name, layer in list(part.named_children()):
                if type(layer) is nn.Linear:  # its subclasses have forwards of their own
                    setattr(part, name, Int8Linear.of(layer))
                    count += 1
    return count
