"""T3's linear layers in the form that the device at hand reads fastest when a decode step brings two rows.

A decode step multiplies every weight with two vectors, the CFG pair, so reading the weights is all its work. With two
rows the usual call, ``F.linear``, reaches a quarter of an AMD CPU's memory bandwidth, and all of an Intel one's: which
form MKL reads faster is measured once a process. With one row, as without guidance, either form reads weights as fast,
and so it does where they lie the other way round, as GPT-2's do.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from functools import cache

import torch
import torch.nn.functional as F
from transformers.pytorch_utils import Conv1D

from ..cpu import onednn as _onednn
from ..kept import kept
from .t3.spies import is_spy

Product = Callable[[torch.Tensor], torch.Tensor]
"""A weight's product with rows."""
Biases = Sequence[torch.Tensor | None]
FEW = 4
"""Rows up to which a product is bound by reading the weights; more go to ``F.linear``."""


class Stacked:
    """Linear layers that take the same input, as one.

    Args:
        weights: (out, in) each, with the same ``in``; used where they are, so that many rows cost what they did.
        kind: ``loaded`` keeps the weights' values, ``int8`` rounds them to 8 bits a value for few rows.
        biases: (out,) each; none where there are none.
    """

    def __init__(
        self, weights: Sequence[torch.Tensor], kind: str = "loaded", biases: Sequence[torch.Tensor] = ()
    ) -> None:
        self.weights, self.biases = list(weights), list(biases) or [None] * len(weights)
        self._few = (_int8 if kind == "int8" else _loaded)(self.weights, self.biases)

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        """States (B, T, in) times every weight: (B, T, sum of out), in the states' dtype."""
        rows = states.flatten(0, 1)
        found = self._few(rows) if len(rows) <= FEW else _many(self.weights, self.biases, rows)
        return found.unflatten(0, states.shape[:2])


def _many(weights: Sequence[torch.Tensor], biases: Biases, rows: torch.Tensor) -> torch.Tensor:
    found = [F.linear(rows, weight, bias) for weight, bias in zip(weights, biases, strict=True)]
    return found[0] if len(found) == 1 else torch.cat(found, dim=1)


def _joined(biases: Biases) -> torch.Tensor | None:
    return None if biases[0] is None else torch.cat(list(biases))


def _loaded(weights: Sequence[torch.Tensor], biases: Biases) -> Product:
    """The product that this device and dtype does fastest with the weights' own values."""
    like = weights[0]
    if like.device.type == "cuda":  # one launch instead of several; the copy is read, the original is not
        fused, bias = torch.cat(list(weights)) if len(weights) > 1 else like, _joined(biases)
        return lambda rows: F.linear(rows, fused, bias)
    by_output = like.device.type == "cpu" and like.dtype == torch.float32 and like.is_contiguous()
    if by_output and columns_are_faster(torch.get_num_threads()):
        return lambda rows: _columns(weights, biases, rows)
    if like.device.type == "cpu" and like.dtype == torch.bfloat16 and _onednn(like.dtype):
        return _reordered(torch.cat(list(weights)).contiguous(), _joined(biases))
    return lambda rows: _many(weights, biases, rows)


@cache
def columns_are_faster(threads: int) -> bool:
    """Whether a CPU multiplies float32 weights with two rows faster as ``W x`` than as ``x W^T``; takes 50 ms once.

    So it is where MKL runs on AMD (three times), and not on Intel (half as fast). Each is timed in turn on 64 MB of
    weights, more than caches hold; the fastest of some passes counts.
    """
    weights, rows = [torch.ones(2048, 1024) for _ in range(8)], torch.ones(2, 1024)
    forms = {"columns": lambda weight: _columns([weight], [None], rows), "rows": lambda weight: F.linear(rows, weight)}
    fastest = dict.fromkeys(forms, math.inf)
    for _ in range(4):
        for name, product in forms.items():
            start = time.perf_counter()
            for weight in weights:
                product(weight)
            fastest[name] = min(fastest[name], time.perf_counter() - start)
    return fastest["columns"] < fastest["rows"]


def _columns(weights: Sequence[torch.Tensor], biases: Biases, rows: torch.Tensor) -> torch.Tensor:
    """``W x`` for the transposed rows: the same products, but MKL on AMD then reads W in the order it is stored in."""
    found = rows.new_empty(sum(len(weight) for weight in weights), len(rows))
    start = 0
    for weight, bias in zip(weights, biases, strict=True):
        own = torch.mm(weight, rows.t(), out=found[start : (start := start + len(weight))])
        if bias is not None:
            own.add_(bias[:, None])
    return found.t().contiguous()


def _reordered(weight: torch.Tensor, bias: torch.Tensor | None) -> Product:
    """oneDNN's own layout for few rows, as ``torch.compile`` gives frozen weights; a copy of the weights.

    Two rows are given twice: oneDNN's kernel for four reads the weights faster, and every row's result is the same.
    """
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, FEW)

    def product(rows: torch.Tensor) -> torch.Tensor:
        given = rows.repeat(FEW // len(rows), 1) if FEW % len(rows) == 0 else rows
        return torch.ops.mkldnn._linear_pointwise(given, packed, bias, "none", [], "")[: len(rows)]

    return product


def _int8(weights: Sequence[torch.Tensor], biases: Biases) -> Product:
    """PyTorch's dynamic quantisation: int8 weights scaled by output channel, inputs to 8 bits scaled anew each time."""
    weight = torch.cat([weight.float() for weight in weights])
    scale = weight.abs().amax(1).clamp_min(1e-12) / 127
    zero, bias = torch.zeros(len(scale), dtype=torch.long), _joined(biases)
    rounded = (weight / scale[:, None]).round_().to(torch.int8)
    packed = torch.ops.quantized.linear_prepack(
        torch._make_per_channel_quantized_tensor(rounded, scale.double(), zero, 0),
        bias if bias is None else bias.float(),
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
    if type(head) is not torch.nn.Linear and reachable is None:
        return head
    product = kept(head, kind, lambda: Stacked([head.weight], kind, [head.bias]))
    return product if reachable is None else lambda hidden: reachable(product(hidden))


def is_plain(t3: torch.nn.Module) -> bool:
    """Whether T3's layers and head can be run by other operations: plain linear ones, which nothing hooks into.

    What upstream's analyzer leaves behind does not count.
    """
    head = t3.speech_head
    right = all(_is_linear(part) for layer in layers_of(t3.tfmr) for parts in _parts(layer) for part in parts)
    known = type(head) is torch.nn.Linear or hasattr(head, "reachable")
    return right and known and not any(map(_is_hooked, (head, *t3.tfmr.modules())))


_CAPTURES = "transformers.utils.output_capturing"
"""Where the hooks come from that transformers 5 puts on all layers, for good, once somebody has asked for maps."""


def _is_hooked(module: torch.nn.Module) -> bool:
    found = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    found += [module.__dict__["forward"]] if "forward" in module.__dict__ else []
    return not all(is_spy(it) or getattr(it, "__module__", "") == _CAPTURES for it in found)


def layer_linears(tfmr: torch.nn.Module, kind: str = "loaded") -> list[tuple[Stacked, Stacked, Stacked, Stacked]]:
    """The four products of every layer: query, key and value; attention's output; gate and up, or fc; down.

    Made on the first call and kept with the model (see `kept`).

    Args:
        tfmr: T3's ``LlamaModel`` or ``GPT2Model``.
        kind: see `Stacked`.

    Raises:
        ValueError: layers that are not plain linear ones any more, such as an adapter's.
    """

    def make() -> list[tuple[Stacked, Stacked, Stacked, Stacked]]:
        found = []
        for layer in layers_of(tfmr):
            together = _parts(layer)
            for part in (part for parts in together for part in parts):
                if not _is_linear(part):
                    raise ValueError(f"T3 has a {type(part).__name__} where a plain Linear was: use backend='hf'")
            found.append(tuple(_stacked(parts, kind) for parts in together))
        return found

    with torch.inference_mode():
        return kept(tfmr, kind, make)


def layers_of(tfmr: torch.nn.Module) -> torch.nn.ModuleList:
    """The layers of T3's ``LlamaModel`` or ``GPT2Model``."""
    return tfmr.h if hasattr(tfmr, "h") else tfmr.layers


def _is_linear(part: torch.nn.Module) -> bool:
    """Whether this is what Llama has, linear without a bias, or GPT-2, a Conv1D, and nothing in its place."""
    return type(part) is Conv1D or (type(part) is torch.nn.Linear and part.bias is None)


def _stacked(parts: Sequence[torch.nn.Module], kind: str) -> Stacked:
    """Linear parts as one; a Conv1D has its weight the other way round, and is given as a view."""
    weights = [part.weight.t() if type(part) is Conv1D else part.weight for part in parts]
    return Stacked(weights, kind, [part.bias for part in parts])


def _parts(layer: torch.nn.Module) -> tuple[tuple[torch.nn.Module, ...], ...]:
    """A layer's linear parts, those together that take the same input."""
    if hasattr(layer, "ln_1"):
        return (layer.attn.c_attn,), (layer.attn.c_proj,), (layer.mlp.c_fc,), (layer.mlp.c_proj,)
    attention, mlp = layer.self_attn, layer.mlp
    return (
        (attention.q_proj, attention.k_proj, attention.v_proj),
        (attention.o_proj,),
        (mlp.gate_proj, mlp.up_proj),
        (mlp.down_proj,),
    )
