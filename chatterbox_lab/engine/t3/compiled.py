"""Llama's decode step through ``torch.compile``: what is before and after attention, once for all layers.

Attention and the cache stay outside: compiled, a write into a part of the cache becomes a copy of all of it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F

from ...kept import kept
from ..linears import columns_are_faster
from .backbone import Llama, Tables, backbone_of, rotated
from .backends import Setup
from .eager import EagerT3
from .static import stepper as static_stepper

logger = logging.getLogger("chatterbox_lab")
Tensors = Sequence[torch.Tensor]


class CompiledLlama(Llama):
    """`Llama` with decode steps compiled; the prefill runs as it is.

    The compiled functions take weights as arguments and know nothing of lengths, so that neither another layer, a
    longer sequence nor a later call compiles anew. Where nothing can be compiled (no C++ compiler, no Triton) one line
    says so and the plain step runs.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.compiled: Compilation = kept(self.tfmr, "compiled", Compilation)
        self.columns = self.like.device.type == "cpu" and columns_are_faster(torch.get_num_threads())

    def enter(self, index: int, hidden: torch.Tensor, tables: Tables) -> Tables:
        """As `Llama.enter`."""
        if hidden.shape[1] == 1 and self.compiled.works:
            norm, weights = self.layers[index].input_layernorm, self.linears[index][0].weights
            like = self.like, hidden.shape[2] // self.heads
            found = self.compiled(
                "enter", _rows(hidden), weights, norm.weight, norm.variance_epsilon, tables, *like, self.columns
            )
            if found is not None:
                return found
        return super().enter(index, hidden, tables)

    def leave(self, index: int, hidden: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """As `Llama.leave`."""
        if hidden.shape[1] == 1 and self.compiled.works:
            norm = self.layers[index].post_attention_layernorm
            weights = [linear.weights for linear in self.linears[index][1:]]
            rows = _rows(hidden), attended.flatten(1).contiguous()
            found = self.compiled("leave", *rows, weights, norm.weight, norm.variance_epsilon, self.columns)
            if found is not None:
                return found[:, None]
        return super().leave(index, hidden, attended)


def _rows(hidden: torch.Tensor) -> torch.Tensor:
    return hidden[:, 0].contiguous()  # other strides would compile anew


def stepper(setup: Setup) -> AbstractContextManager[EagerT3]:
    """Backend ``"compile"``: Llama's decode steps compiled, those of others as in ``"static"``."""
    return static_stepper(setup, CompiledLlama if backbone_of(setup.t3.tfmr) is Llama else None)


class Compilation:
    """`enter` and `leave` compiled, and whether that can be done here at all."""

    def __init__(self) -> None:
        self.functions: dict[str, Callable[..., Any]] = {
            function.__name__: torch.compile(function, fullgraph=True) for function in (enter, leave)
        }
        self.works = True

    def __call__(self, name: str, *args: Any) -> Any:
        """What the function of this name returns, or None where it cannot be compiled."""
        try:
            with torch._C.DisableTorchFunction():  # modes that Dynamo cannot see through
                return self.functions[name](*args)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # each missing tool, version and back end has its own
            if self.works:  # one thread says it for all
                self.works = False
                reason = " ".join(str(error).split())[:200]
                logger.warning("backend='compile': not possible here, the plain step runs instead (%s)", reason)
            return None


def enter(
    hidden: torch.Tensor,
    weights: Tensors,
    norm: torch.Tensor,
    eps: float,
    tables: Tensors,
    like: torch.Tensor,
    size: int,
    columns: bool,
) -> tuple[torch.Tensor, ...]:
    """Query, key and value (2, H, 1, D) of a decode step's hidden states (2, C), in the dtype of ``like``.

    ``tables`` are cosine and sine (1, D) of the new position, ``size`` is D.
    """
    normed = F.rms_norm(hidden, hidden.shape[-1:], norm, eps)
    query, key, value = (
        product(normed, weight, columns).to(like.dtype).unflatten(1, (-1, 1, size)) for weight in weights
    )
    return rotated(query, *tables), rotated(key, *tables), value


def leave(
    hidden: torch.Tensor, attended: torch.Tensor, weights: list[Tensors], norm: torch.Tensor, eps: float, columns: bool
) -> torch.Tensor:
    """A layer's hidden states (2, C) after what was attended to (2, C), of those before (2, C)."""
    hidden = hidden + product(attended.to(hidden.dtype), weights[0][0], columns)
    normed = F.rms_norm(hidden, hidden.shape[-1:], norm, eps)
    gate, up = (product(normed, weight, columns) for weight in weights[1])
    return hidden + product(F.silu(gate) * up, weights[2][0], columns)


def product(rows: torch.Tensor, weight: torch.Tensor, columns: bool) -> torch.Tensor:
    """Rows (2, in) times a weight (out, in); by columns, as in `linears`, where that is faster."""
    if columns and rows.dtype == torch.float32:
        return torch.mm(weight, rows.t()).t()
    return F.linear(rows, weight)
