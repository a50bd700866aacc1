"""The decode step of `StaticT3` as CUDA graphs: captured once, replayed for every later token, text and seed.

Launching a step's operations one by one takes a host longer than a fast GPU needs to run them. A graph is launched
as one; all that differs between two steps (token, position, what was said, guidance, temperature, the random
numbers) is data in buffers that stay where they are.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from threading import Lock

import torch
from chatterbox.models.t3 import T3

from ...kept import Pool, kept
from ..linears import head_linear
from .backends import Heads, Setup
from .eager import embeddings, token_embedding
from .sampling import Sampling, sample
from .static import Place, StaticT3

logger = logging.getLogger("chatterbox_lab")
Work = Callable[[], None]
_SHORTEST = 256
"""Positions of the smallest window; each next is twice as long, and has a graph of its own."""
_GRAIN = 512
_capturing = Lock()
"""PyTorch: only one capture may be underway in a process at a time."""
_SAMPLINGS = 3
"""Ways to sample, besides the last, whose graphs are kept: callers may choose another with every call."""
_KEPT = 2
"""Sets of buffers that stay with the model for the next call, at full size 0.4 GB and more each."""


class GraphT3:
    """T3 with buffers for everything that a decode step reads and writes; a `Stepper`.

    Args:
        t3: upstream's token-to-token model; only its parts are kept.
        mode: ``off`` or ``probe``.
        heads: where the alignment is read.
        capacity: positions that fit, prefill included.
        rows: 2 for classifier-free guidance, 1 without; shapes say 2.
    """

    def __init__(self, t3: T3, mode: str, heads: Heads, capacity: int, rows: int) -> None:
        self.attend, self.batch = StaticT3(t3.tfmr, mode, (0, 0), capacity, heads, rows=rows), rows
        self.attend.reserve(capacity)  # all of it, since buffers stay where they are
        self.attend.cache.zero_()  # what a mask hides must not be nan
        self.head, self.embeddings = head_linear(t3.speech_head), embeddings(t3)
        self.start, self.capacity = t3.hp.start_speech_token, capacity
        device, width = t3.device, t3.hp.speech_tokens_dict_size
        whole = {"dtype": torch.long, "device": device}
        self.token, self.position = torch.zeros((1, 1), **whole), torch.zeros(1, **whole)
        self.spoken = torch.zeros(1, **whole)
        """Index of the next speech position."""
        self.seen = torch.zeros((1, width), dtype=torch.bool, device=device)
        self.logits = torch.zeros((rows, width), device=device)
        self.row = torch.zeros((1, capacity), device=device)
        self.numbers = torch.ones(2, device=device)
        """CFG weight and temperature."""
        self.generator = torch.Generator(device)
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.graphs: dict[tuple, Work] = {}
        self.text, self.rows, self.key, self.forgets_start = (0, 0), None, (), False

    def begin(self, setup: Setup, random: torch.Tensor) -> None:
        """Ready for another call: what was said is forgotten, and what the call may replay is captured.

        The random numbers go on from the state ``random`` of a generator.
        """
        how, self.text, self.attend.text, self.attend.length = setup.how, setup.text, setup.text, 0
        self.forgets_start = how.forgets_start
        self.spoken.zero_()
        self.seen.zero_()
        self.seen[:, self.start] = True
        self.numbers.copy_(torch.tensor([how.cfg_weight, how.temperature]))
        self.key = ("sampling", replace(how, cfg_weight=0.0, temperature=0.0))
        for key in [key for key in self.graphs if key[0] == "sampling" and key != self.key][:-_SAMPLINGS]:
            del self.graphs[key]
        if self.key not in self.graphs:  # before the seed: capturing draws random numbers
            self._capture(self.key, lambda: self._pick(how))
        for window in self._windows(setup.capacity):
            if ("step", window) not in self.graphs:
                self._capture(("step", window), partial(self._forward, window))
        self.generator.set_state(random)

    def _windows(self, needed: int) -> list[int]:
        windows = [_SHORTEST]
        while windows[-1] < needed:
            windows.append(2 * windows[-1])
        return [min(window, self.capacity) for window in windows]

    def prefill(self, embeds: torch.Tensor, voice: int) -> torch.Tensor:
        """Logits (2, V) after the prompt's embeddings (2, T, C), of which the first are the voice's."""
        hidden = self.attend.prefill(embeds, voice)
        self.rows = self.attend.rows
        self.position.fill_(self.attend.length)
        self.logits.copy_(self.head(hidden[:, -1:])[:, -1])
        return self.logits

    def step(self, position: int) -> torch.Tensor:
        """Logits (2, V) after the token picked last, whose place among the speech tokens is ``position``."""
        if position == 1 and self.forgets_start:
            self.seen.zero_().scatter_(1, self.token, True)
        self.attend.length += 1
        self.graphs["step", self._windows(self.attend.length)[-1]]()
        self.rows = self.row[:, slice(*self.text)] if self.attend.heads else None
        return self.logits

    def pick(self, logits: torch.Tensor) -> torch.Tensor:
        """One token (1, 1), sampled from the logits that came last or from what the guard has made of them."""
        if logits is not self.logits:
            self.logits.copy_(logits)
        self.graphs[self.key]()
        return self.token.clone()

    def say(self, token: torch.Tensor) -> None:
        """Goes on after this token (1, 1) instead of the one picked last."""
        self.token.copy_(token)

    def _forward(self, window: int) -> None:
        mask = (torch.arange(window, device=self.position.device) <= self.position)[None, None, None]
        hidden = token_embedding(*self.embeddings, self.token, self.spoken + 1, self.batch)
        hidden, rows = self.attend.run(hidden, Place(self.position, window, mask), (0, window))
        self.logits.copy_(self.head(hidden)[:, -1])
        if rows is not None:
            self.row[:, :window].copy_(rows)
        self.position.add_(1)
        self.spoken.add_(1)

    def _pick(self, how: Sampling) -> None:
        how = replace(how, cfg_weight=self.numbers[0], temperature=self.numbers[1])
        self.token.copy_(sample(self.logits, self.seen, how, self.generator))
        self.seen.scatter_(1, self.token, True)

    def _capture(self, key: tuple, work: Work) -> None:
        """Records the work; the buffers are as before afterwards."""
        state = (self.token, self.position, self.spoken, self.seen, self.logits, self.row)
        before = [buffer.clone() for buffer in state]

        def restore() -> None:
            for buffer, value in zip(state, before, strict=True):
                buffer.copy_(value)

        with _capturing:
            self.graphs[key] = captured(work, restore, self.generator, self.stream)
        logger.info("backend='graph': %s captured", key)


def captured(work: Work, restore: Work, generator: torch.Generator, stream: torch.cuda.Stream) -> Work:
    """The work as a CUDA graph, warmed up before (`torch.cuda.graph` asks for that) with its effects undone.

    Warm-ups and captures of one model share a stream, to which cuBLAS ties its workspace. Generators are registered
    outside of inference mode, else PyTorch's default one would be of no use to captures outside of it.
    """
    with torch.cuda.device(generator.device):
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                work()
                restore()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.inference_mode(False):
            graph.register_generator_state(torch.cuda.default_generators[torch.cuda.current_device()])
            graph.register_generator_state(generator)
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            work()
    return graph.replay


@contextmanager
def stepper(setup: Setup) -> Iterator[GraphT3]:
    """Backend ``"graph"``: buffers and graphs are kept with the model, and lent to one call at a time."""
    key = "graph", setup.analyzer, tuple(setup.heads), setup.rows
    free: Pool[GraphT3] = kept(setup.t3, key, lambda: Pool(_KEPT))
    graph = free.take(lambda graph: graph.capacity >= setup.capacity)
    if graph is None:
        free.shrink()  # too short for what is asked now: their memory goes to the longer one
        capacity = -(-setup.capacity // _GRAIN) * _GRAIN
        graph = GraphT3(setup.t3, setup.analyzer, setup.heads, capacity, setup.rows)
    generator = setup.generator or _drawn(setup.t3.device)
    try:
        graph.begin(setup, generator.get_state())
        try:
            yield graph
        finally:
            generator.set_state(graph.generator.get_state())
    finally:
        free.give(graph)


def _drawn(device: torch.device) -> torch.Generator:
    """A generator whose seed PyTorch's default one gives: that one may be drawn from by others meanwhile."""
    seed = torch.randint(2**62, (1,), device=device)
    return torch.Generator(device).manual_seed(int(seed))
