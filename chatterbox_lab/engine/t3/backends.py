"""What can run T3: a row for each backend, and what every one of them does.

A backend is one file with a function that takes a `Setup` and gives a `Stepper` for as long as its context lasts, and
one row in `BACKENDS`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:  # settings and --help read this table, and need no PyTorch
    import torch
    from chatterbox.models.t3 import T3

    from ..settings import StreamSettings
    from .sampling import Sampling

ANALYZERS = ("stock", "layer", "off", "probe")
READ_BESIDE = ("off", "probe")
"""The analyzer modes that need no attention maps."""
AUTO = "auto"
Span = tuple[int, int]
"""A half-open range of positions in the sequence."""
Heads = Sequence[tuple[int, int | None]]
"""(layer, head) pairs; head None is the mean of a layer's heads."""
FORK_HEADS: Heads = ((9, None),)
"""(layer, head) pairs that the streaming fork's analyzer reads: layer 9, the mean of its heads."""
LATER_HEADS: Heads = ((12, 15), (13, 11), (9, 2))
"""What later Chatterbox releases read: one head in each of three layers."""


class Stepper(Protocol):
    """T3 for one call: a prompt, and then a token at a time."""

    @property
    def rows(self) -> torch.Tensor | None:
        """Attention to the text (rows, text tokens), float32, of the positions that came last; None if not read."""

    def prefill(self, embeds: torch.Tensor, voice: int) -> torch.Tensor:
        """Logits (rows, V) after a prompt's embeddings (rows, T, C), of which the first ``voice`` are the voice's."""

    def step(self, position: int) -> torch.Tensor:
        """Logits (rows, V) after the token picked last, whose place among the speech tokens is ``position``."""

    def pick(self, logits: torch.Tensor) -> torch.Tensor:
        """One token (1, 1) sampled from the logits (rows, V)."""

    def say(self, token: torch.Tensor) -> None:
        """Goes on after this token (1, 1) instead of the one picked last."""


@dataclass(frozen=True)
class Setup:
    """What a backend is set up for: one call.

    Args:
        t3: upstream's token-to-token model.
        analyzer: how the alignment is read (see `StreamSettings`).
        heads: from which it is read.
        text: where the text tokens are.
        capacity: positions that are needed at most, prefill included.
        weights: of the decode steps (see `StreamSettings`).
        how: guidance, temperature and what is never sampled.
        generator: of the sampling, on T3's device; None is PyTorch's default generator.
        rows: 2 for classifier-free guidance, 1 without.
    """

    t3: T3
    analyzer: str
    heads: Heads
    text: Span
    capacity: int
    weights: str
    how: Sampling
    generator: torch.Generator | None = None
    rows: int = 2


@dataclass(frozen=True)
class Backend:
    """One way to run T3.

    Args:
        stepper: gives the `Stepper` of a `Setup`.
        analyzers: the modes that it can read the alignment in.
        devices: the kinds of device that it runs on; none named is any.
        weights: the forms of T3's weights that it can decode with.
        exact: whether it says upstream's tokens for the same seed, in float32 with the weights as loaded.
        plain: whether it runs T3's layers by operations of its own, past hooks, adapters and patches on them.
    """

    stepper: Callable[[Setup], AbstractContextManager[Stepper]]
    analyzers: tuple[str, ...] = READ_BESIDE
    devices: tuple[str, ...] = ()
    weights: tuple[str, ...] = ("loaded",)
    exact: bool = True
    plain: bool = True


def _in(module: str) -> Callable[[Setup], AbstractContextManager[Stepper]]:
    """The function ``stepper`` of a module beside this one, imported at its first use."""
    return lambda setup: import_module(f".{module}", __package__).stepper(setup)


BACKENDS: dict[str, Backend] = {
    "hf": Backend(_in("attention"), analyzers=ANALYZERS, plain=False),
    "static": Backend(_in("static"), weights=("loaded", "int8")),
    "compile": Backend(_in("compiled")),
    "graph": Backend(_in("graph"), devices=("cuda",)),
}
_FASTEST_FIRST = {"cpu": ("static", "hf"), "cuda": ("graph", "static", "hf")}
"""What ``"auto"`` chooses from, by device; elsewhere it is ``"hf"``, since nobody has tried more.

``"graph"`` is there because on an H100 it says upstream's tokens, also in threads that capture at once
(``test_graph.py``, and ``chatterbox-lab selftest`` on any other GPU).
"""


def backend_of(settings: StreamSettings, t3: T3) -> str:
    """The name of the backend that runs this model with these settings.

    ``"auto"`` is the fastest that says upstream's tokens: ``"graph"`` on CUDA, ``"static"`` on a CPU, and ``"hf"``
    elsewhere, where the analyzer needs attention maps, or where T3's layers are not the release's own any more
    (adapters, quantised layers, hooks).

    Raises:
        ValueError: a backend or weights that the device does not have.
    """
    from ..linears import is_plain

    kind, name = t3.device.type, settings.backend
    if settings.weights == "int8" and kind != "cpu":
        raise ValueError(f"weights='int8': is for CPUs, the model is on {kind}; load it with dtype='bfloat16'")
    if name != AUTO:
        devices = BACKENDS[name].devices
        if devices and kind not in devices:
            there = ", ".join(repr(other) for other, row in BACKENDS.items() if not row.devices or kind in row.devices)
            needed = f"needs a {' or '.join(devices).upper()} device, the model is on {kind}"
            raise ValueError(f"backend={name!r}: {needed}; choose one of {there}")
        return name
    plain = is_plain(t3)
    for name in _FASTEST_FIRST.get(kind, ("hf",)):
        row = BACKENDS[name]
        if settings.analyzer in row.analyzers and settings.weights in row.weights and (plain or not row.plain):
            return name
    raise ValueError(f"weights={settings.weights!r}: only 'hf' runs layers with adapters or hooks, and only as loaded")
