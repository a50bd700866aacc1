"""The decode step of `StaticT3` through ``torch.compile``: one layer is compiled, and used for all of them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F

from ...kept import kept
from .backends import Setup
from .eager import EagerT3
from .static import Place, StaticT3, attention_of_one, rotated
from .static import stepper as static_stepper

logger = logging.getLogger("chatterbox_lab")
Tensors = Sequence[torch.Tensor]


class CompiledT3(StaticT3):
    """`StaticT3` with decode steps compiled; the prefill runs as it is.

    The compiled layer takes weights and cache as arguments and the cache's length as a symbol, so that neither another
    layer, a longer sequence nor a later call compiles anew. Where nothing can be compiled (no C++ compiler, no Triton)
    one line says so and the plain step runs.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.compiled: Compilation = kept(self.tfmr, "compiled", Compilation)

    def layer(
        self, index: int, hidden: torch.Tensor, tables: tuple[torch.Tensor, ...], place: Place
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `StaticT3.layer`."""
        if hidden.shape[1] == 1 and self.compiled.works:
            layer = self.tfmr.layers[index]
            norms = (layer.input_layernorm.weight, layer.post_attention_layernorm.weight)
            cache = [states[:, :, : place.window] for states in self.cache[index]]
            for states in cache:
                torch._dynamo.mark_dynamic(states, 2)
            weights = [linear.weights for linear in self.linears[index]]
            epsilon = layer.input_layernorm.variance_epsilon
            rows = hidden[:, 0].contiguous()  # other strides would compile anew
            found = self.compiled(rows, weights, norms, epsilon, cache, tables, self.head_width)
            if found is not None:
                return found[0][:, None], found[1]
        return super().layer(index, hidden, tables, place)


def stepper(setup: Setup) -> AbstractContextManager[EagerT3]:
    """Backend ``"compile"``: `StaticT3` with its decode steps compiled."""
    return static_stepper(setup, CompiledT3)


class Compilation:
    """`decode_layer` compiled, and whether it can be done here at all."""

    def __init__(self) -> None:
        self.function: Callable[..., Any] = torch.compile(decode_layer, fullgraph=True)
        self.works = True

    def __call__(self, *args: Any) -> Any:
        """What `decode_layer` returns, or None where it cannot be compiled."""
        try:
            return self.function(*args)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # each missing tool, version and back end has its own
            self.works = False
            reason = " ".join(str(error).split())[:200]
            logger.warning("backend='compile': not possible here, the plain step runs instead (%s)", reason)
            return None


def decode_layer(
    hidden: torch.Tensor, weights: list[Tensors], norms: Tensors, eps: float, cache: Tensors, tables: Tensors, size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """One layer of one decode step in one function: hidden states (2, C), from such, and queries (2, H, 1, D).

    The ``cache``, keys and values (2, H, positions, D), ends with the new position, which is written here. ``tables``
    are cosine and sine (1, D) of that position, ``size`` is D.
    """
    keys, values = cache

    def heads(weight: torch.Tensor) -> torch.Tensor:
        return product(normed, weight).to(keys.dtype).unflatten(1, (-1, 1, size))

    normed = F.rms_norm(hidden, hidden.shape[-1:], norms[0], eps)
    query, key, value = (heads(weight) for weight in weights[0])
    query = rotated(query, *tables)
    keys[:, :, -1:] = rotated(key, *tables)
    values[:, :, -1:] = value
    attend = attention_of_one if keys.device.type == "cpu" else F.scaled_dot_product_attention
    attended = attend(query, keys, values).flatten(1).to(hidden.dtype)
    hidden = hidden + product(attended, weights[1][0])
    normed = F.rms_norm(hidden, hidden.shape[-1:], norms[1], eps)
    gate, up = (product(normed, weight) for weight in weights[2])
    return hidden + product(F.silu(gate) * up, weights[3][0]), query


def product(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Rows (2, in) times a weight (out, in); in the order of `linears` where that is faster."""
    if rows.device.type == "cpu" and rows.dtype == torch.float32:
        return torch.mm(weight, rows.t()).t()
    return F.linear(rows, weight)
