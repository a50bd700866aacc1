"""T3's linear layers in the form that the device at hand reads fastest when a decode step brings two rows.

A decode step multiplies every weight with two vectors, the CFG pair, so reading the weights is all its work. With two
rows the usual call, ``F.linear``, reaches a quarter of an AMD CPU's memory bandwidth, and all of an Intel one's: which
form MKL reads faster is measured once a process.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from functools import cache

import torch
import torch.nn.functional as F

from ..cpu import onednn as _onednn
from ..kept import kept
from .t3.spies import is_spy

Product = Callable[[torch.Tensor], torch.Tensor]
"""A weight's product with rows."""
FEW = 4
"""Rows up to which a product is bound by reading the weights; more go to ``F.linear``."""


class Stacked:
    """Linear layers without bias that take the same input, as one.

    Args:
        weights: (out, in) each, with the same ``in``; used where they are, so that many rows cost what they did.
        kind: ``loaded`` keeps the weights' values, ``int8`` rounds them to 8 bits a value for few rows.
    """

    def __init__(self, weights: Sequence[torch.Tensor], kind: str = "loaded") -> None:
        self.weights = list(weights)
        self._few = _int8(weights) if kind == "int8" else _loaded(weights)

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        """States (B, T, in) times every weight: (B, T, sum of out), in the states' dtype."""
        rows = states.flatten(0, 1)
        found = self._few(rows) if len(rows) <= FEW else _many(self.weights, rows)
        return found.unflatten(0, states.shape[:2])


def _many(weights: Sequence[torch.Tensor], rows: torch.Tensor) -> torch.Tensor:
    found = [F.linear(rows, weight) for weight in weights]
    return found[0] if len(found) == 1 else torch.cat(found, dim=1)


def _loaded(weights: Sequence[torch.Tensor]) -> Product:
    """The product that this device and dtype does fastest with the weights' own values."""
    like = weights[0]
    if like.device.type == "cuda":  # one launch instead of several; the copy is read, the original is not
        fused = torch.cat(list(weights)) if len(weights) > 1 else like
        return lambda rows: F.linear(rows, fused)
    if like.device.type == "cpu" and like.dtype == torch.float32 and columns_are_faster(torch.get_num_threads()):
        return lambda rows: _columns(weights, rows)
    if like.device.type == "cpu" and like.dtype == torch.bfloat16 and _onednn(like.dtype):
        return _reordered(torch.cat(list(weights)))
    return lambda rows: _many(weights, rows)


@cache
def columns_are_faster(threads: int) -> bool:
    """Whether a CPU multiplies float32 weights with two rows faster as ``W x`` than as ``x W^T``; takes 50 ms once.

    So it is where MKL runs on AMD (three times), and not on Intel (half as fast). Each is timed in turn on 64 MB of
    weights, more than caches hold; the fastest of some passes counts.
    """
    weights, rows = [torch.ones(2048, 1024) for _ in range(8)], torch.ones(2, 1024)
    forms = {"columns": lambda weight: _columns([weight], rows), "rows": lambda weight: F.linear(rows, weight)}
    fastest = dict.fromkeys(forms, math.inf)
    for _ in range(4):
        for name, product in forms.items():
            start = time.perf_counter()
            for weight in weights:
                product(weight)
            fastest[name] = min(fastest[name], time.perf_counter() - start)
    return fastest["columns"] < fastest["rows"]


def _columns(weights: Sequence[torch.Tensor], rows: torch.Tensor) -> torch.Tensor:
    """``W x`` for the transposed rows: the same products, but MKL on AMD then reads W in the order it is stored in."""
    found = rows.new_empty(sum(len(weight) for weight in weights), len(rows))
    start = 0
    for weight in weights:
        torch.mm(weight, rows.t(), out=found[start : (start := start + len(weight))])
    return found.t().contiguous()


def _reordered(weight: torch.Tensor) -> Product:
    """oneDNN's own layout for few rows, as ``torch.compile`` gives frozen weights; a copy of the weights.

    Two rows are given twice: oneDNN's kernel for four reads the weights faster, and every row's result is the same.
    """
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, FEW)

    def product(rows: torch.Tensor) -> torch.Tensor:
        given = rows.repeat(FEW // len(rows), 1) if FEW % len(rows) == 0 else rows
        return torch.ops.mkldnn._linear_pointwise(given, packed, None, "none", [], "")[: len(rows)]

    return product


def _int8(weights: Sequence[torch.Tensor]) -> Product:
    """PyTorch's dynamic quantisation: int8 weights scaled by output channel, inputs to 8 bits scaled anew each time."""
    weight = torch.cat([weight.float() for weight in weights])
    scale = weight.abs().amax(1).clamp_min(1e-12) / 127
    zero = torch.zeros(len(scale), dtype=torch.long)
    rounded = (weight / scale[:, None]).round_().to(torch.int8)
    packed = torch.ops.quantized.linear_prepack(
        torch._make_per_channel_quantized_tensor(rounded, scale.double(), zero, 0), None
    )
    # reduce_range keeps 8-bit products within the 16-bit sums of processors without VNNI
    return lambda rows: torch.ops.quantized.linear_dynamic(rows.float(), packed, True).to(rows.dtype)


def affine(weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype, gelu: bool = False) -> Product:
    """``x W^T + b`` of many rows for states (..., in) of any dtype, which are taken, and come back, as ``dtype``.

    Args:
        weight: (out, in).
        bias: (out,), or None.
        dtype: what the product is made in.
        gelu: whether GELU (the exact one) follows.
    """
    weight, bias = weight.detach().to(dtype), None if bias is None else bias.detach().to(dtype)
    if weight.device.type == "cpu" and _onednn(dtype):  # sums, bias and GELU in one pass, and faster than MKL's on AMD
        packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())
        after = ("gelu", [], "none") if gelu else ("none", [], "")
        return lambda states: torch.ops.mkldnn._linear_pointwise(states.to(dtype), packed, bias, *after)
    finish = F.gelu if gelu else torch.nn.Identity()
    return lambda states: finish(F.linear(states.to(dtype), weight, bias))


def multiplies(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the device multiplies this dtype, float32 or bfloat16, and does not emulate it."""
    if device.type == "cpu":
        return _onednn(dtype)
    return dtype == torch.float32 or (device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False))


def head_linear(head: torch.nn.Module, kind: str = "loaded") -> Product:
    """The speech head's product for hidden states (B, T, C), made as `Stacked` and kept with the head.

    A head may be a Linear that does something to its logits afterwards, in a method ``reachable``.
    """
    reachable = getattr(head, "reachable", None)
    if (type(head) is not torch.nn.Linear and reachable is None) or head.bias is not None:
        return head
    product = kept(head, kind, lambda: Stacked([head.weight], kind))
    return product if reachable is None else lambda hidden: reachable(product(hidden))


def is_plain(t3: torch.nn.Module) -> bool:
    """Whether T3's layers and head can be run by other operations: plain linear ones, which nothing hooks into.

    What upstream's analyzer leaves behind does not count.
    """
    head = t3.speech_head
    linears = [part for layer in t3.tfmr.layers for parts in _parts(layer) for part in parts]
    right = all(type(part) is torch.nn.Linear and part.bias is None for part in linears)
    known = type(head) is torch.nn.Linear or hasattr(head, "reachable")
    return right and known and not any(map(_is_hooked, (head, *t3.tfmr.modules())))


_CAPTURES = "transformers.utils.output_capturing"
"""Where the hooks come from that transformers 5 puts on all layers, for good, once somebody has asked for maps."""


def _is_hooked(module: torch.nn.Module) -> bool:
    found = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    found += [module.__dict__["forward"]] if "forward" in module.__dict__ else []
    return not all(is_spy(it) or getattr(it, "__module__", "") == _CAPTURES for it in found)


def layer_linears(tfmr: torch.nn.Module, kind: str = "loaded") -> list[tuple[Stacked, Stacked, Stacked, Stacked]]:
    """The four products of every layer: query, key and value; attention's output; gate and up; down.

    Made on the first call and kept with the model (see `kept`).

    Args:
        tfmr: T3's ``LlamaModel``.
        kind: see `Stacked`.

    Raises:
        ValueError: layers that are not plain linear ones any more, such as an adapter's.
    """

    def make() -> list[tuple[Stacked, Stacked, Stacked, Stacked]]:
        found = []
        for layer in tfmr.layers:
            together = _parts(layer)
            for part in (part for parts in together for part in parts):
                if type(part) is not torch.nn.Linear or part.bias is not None:
                    raise ValueError(f"T3 has a {type(part).__name__} where a plain Linear was: use backend='hf'")
            found.append(tuple(Stacked([part.weight for part in parts], kind) for parts in together))
        return found

    with torch.inference_mode():
        return kept(tfmr, kind, make)


def _parts(layer: torch.nn.Module) -> tuple[tuple[torch.nn.Module, ...], ...]:
    """A layer's linear parts, those together that take the same input."""
    attention, mlp = layer.self_attn, layer.mlp
    return (
        (attention.q_proj, attention.k_proj, attention.v_proj),
        (attention.o_proj,),
        (mlp.gate_proj, mlp.up_proj),
        (mlp.down_proj,),
    )
