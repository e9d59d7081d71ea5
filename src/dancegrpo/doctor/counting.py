"""Bytes and floating-point operations of one pass, counted while it runs on pretended tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from dancegrpo.memory import TensorBytes

KINDS = ("product", "convolution", "attention")
"""What operations come from: each reaches a speed of its own."""

_DEVICE = torch.ops.prim.device.default
_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class Counter(TensorBytes):
    """`TensorBytes` that also counts the floating-point operations of products, convolutions and attention.

    A multiplication and an addition are two. Passes over elements (norms, activations) are not counted: on the
    networks here they are a small share of the operations, if not of the time.
    """

    def __init__(self, held: Iterable[Tensor] = ()) -> None:
        super().__init__(held)
        self.base = self.live
        """Bytes that were held from the start."""
        self.flops: dict[str, int] = dict.fromkeys(KINDS, 0)
        """Operations so far by what makes them, of `KINDS`."""
        self.attended = 0
        """Bytes so far of what goes into attention and comes out: what ranks that split a sequence exchange."""

    @property
    def grown(self) -> int:
        """The peak since the last `restart`, above what was held from the start."""
        return self.peak - self.base

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs one operation and counts it."""
        if func is _DEVICE and isinstance(args[0], FakeTensor):
            return args[0].fake_device  # asked so often that it is half of the time
        out = super().__torch_dispatch__(func, types, args, kwargs)
        packet = getattr(func, "_overloadpacket", None)
        if packet is _ATTENTION:
            query, key, value = (tensor.shape for tensor in args[:3])
            self.flops["attention"] += int(sdpa_flop_count(query, key, value))
            self.attended += args[0].nbytes + sum(tensor.nbytes for tensor in args[:3])
        elif packet is _ATTENTION_BACKWARD:
            gradient, query, key, value = (tensor.shape for tensor in args[:4])
            self.flops["attention"] += int(sdpa_backward_flop_count(gradient, query, key, value))
            self.attended += sum(tensor.nbytes for tensor in args[:4])
        elif (counted := flop_registry.get(packet)) is not None:
            kind = "convolution" if "convolution" in str(packet) else "product"
            self.flops[kind] += int(counted(*args, **(kwargs or {}), out_val=out))
        return out
