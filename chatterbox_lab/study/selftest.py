"""Is every backend right on this device? What its tests ask on a CPU, asked again of the machine and model at hand.

``chatterbox-lab selftest`` needs no second machine: upstream's own ``T3.inference`` on the same device says which
tokens are right. Each question is a row of a record, ``passed`` or not, with what was found.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from typing import Any

import pandas as pd
import torch
from chatterbox.tts import ChatterboxTTS

from ..engine.clock import StageClock
from ..engine.settings import BALANCED, FAST, StreamSettings, whole_number
from ..engine.stream import generate_stream, speech_tokens
from ..engine.t3.backends import BACKENDS, READ_BESIDE
from ..engine.warm import warm_up
from ..voices.load import load, pick_device
from . import command, ladder
from .machine import machine_facts
from .upstream import upstream_tokens

Row = dict[str, Any]
SHORT, MIDDLE = "No.", "The quick brown fox reads a long sentence to the lazy dog."
LONG = "One two three, four five six, seven eight nine; and ten to finish this long sentence with."
LENGTHS = ((SHORT, 1, 0.02), (MIDDLE, 0, 0.2), (LONG, 2, 1.0), (MIDDLE, 3, 0.2))
"""Text, seed and share of the most tokens: short ones again after the long one, for which buffers have grown."""
THREADS = 4
SLOWER = 2.0
"""A short call that takes so many times as long once the cache has grown counts as frozen; a public fork fell 14-fold
(rossturner/chatterbox, docs/plans/fix-cuda-graph-cache-invalidation: 70 steps a second, 5 after a resize)."""
LEAK = 2**20
"""Bytes that calls of all lengths may leave behind at most, beyond what the first two of them keep."""


@dataclass(frozen=True)
class SelfTest:
    """The questions, by name, each of which gives whether it passed and what was found.

    Args:
        tts: a model of the streaming fork, in float32; nobody else may use it meanwhile.
        most: tokens of the longest call.
        backends: those that are asked; none named is all that say upstream's tokens here without a compiler.
    """

    tts: ChatterboxTTS
    most: int = 300
    backends: tuple[str, ...] = ()
    upstreams: dict[tuple, torch.Tensor] = field(default_factory=dict)
    """What upstream said, by text and how: it is asked once."""

    def questions(self) -> dict[str, Callable[[], tuple[bool, str]]]:
        """By name, in the order in which they are asked: what counts most comes first."""
        backends = self.backends or exact_backends(self.tts.device)
        pairs = list(product(backends, READ_BESIDE))
        asked = {f"same tokens, {name}, {mode}": partial(self.same_tokens, name, mode) for name, mode in pairs}
        for title, question in (
            ("a cache that has grown", self.no_freeze),
            ("threads", self.threads),
            *([("memory", self.memory)] if torch.device(self.tts.device).type == "cuda" else []),
            ("guard and greedy", self.guard_and_greedy),
            ("whole streams, the same again", self.whole_streams),
        ):
            asked |= {f"{title}, {name}": partial(question, name) for name in backends}
        return asked

    def same_tokens(self, backend: str, mode: str) -> tuple[bool, str]:
        """Whether a backend says upstream's tokens, for texts of three lengths, and for a short one after the long."""
        wrong = []
        for text, seed, share in LENGTHS:
            fixed = {"seed": seed, "max_new_tokens": max(2, int(share * self.most)), "ignore_eos": True}
            said = self._said(text, backend=backend, analyzer=mode, **fixed)
            same = (said == self._upstreams(text, **fixed)).int().cumprod(0).sum()
            wrong += [f"{int(same)} of {len(said)} for seed {seed}"] * (int(same) < len(said))
        lengths = ", ".join(str(max(2, int(share * self.most))) for *_, share in LENGTHS)
        return not wrong, "; ".join(wrong) or f"upstream's, {lengths} of them"

    def no_freeze(self, backend: str) -> tuple[bool, str]:
        """Whether a short call is as fast after a long one, which needs a larger cache, as before; medians of five."""
        before = self._pace(backend)
        self._said(LONG, backend=backend, seed=0, max_new_tokens=self.most, ignore_eos=True)
        after = self._pace(backend)
        return after < SLOWER * before, f"{after / before:.2f} times as long as before"

    def threads(self, backend: str) -> tuple[bool, str]:
        """Whether threads that begin at once say what each says alone."""
        fixed = {"max_new_tokens": max(2, self.most // 5), "ignore_eos": True, "backend": backend}
        warm_up(self.tts, StreamSettings(backend=backend))
        alone = [self._said(MIDDLE, seed=seed, **fixed) for seed in range(THREADS)]
        with ThreadPoolExecutor(THREADS) as pool:
            together = list(pool.map(lambda seed: self._said(MIDDLE, seed=seed, **fixed), range(THREADS)))
        same = sum(map(torch.equal, together, alone))
        return same == THREADS, f"{same} of {THREADS} threads say what they say alone"

    def memory(self, backend: str) -> tuple[bool, str]:
        """Whether calls of all lengths leave the memory of a GPU level; elsewhere nobody counts tensors."""

        def after_some_calls() -> int:
            for share in (0.03, 1.0, 0.2):
                self._said(LONG, backend=backend, seed=0, max_new_tokens=max(2, int(share * self.most)))
            torch.cuda.synchronize()
            return torch.cuda.memory_allocated(self.tts.device)

        before = [after_some_calls() for _ in range(2)][-1]
        more = [after_some_calls() for _ in range(2)][-1] - before
        return more <= LEAK, f"{more / 2**20:.1f} MiB more than before"

    def guard_and_greedy(self, backend: str) -> tuple[bool, str]:
        """Whether the guard and greedy decoding decide as through transformers."""
        wrong = []
        for changes in ({"guard": True, "analyzer": "probe"}, {"temperature": 0.0}):
            fixed = {"seed": 5, "max_new_tokens": max(2, self.most // 8)} | changes
            said = [self._said(MIDDLE, backend=name, **fixed) for name in ("hf", backend)]
            wrong += [next(iter(changes))] * (not torch.equal(*said))
        return not wrong, f"other tokens with {' and '.join(wrong)}" if wrong else "as with transformers"

    def whole_streams(self, backend: str) -> tuple[bool, str]:
        """Whether each token becomes 960 samples, and the same seed the same sound twice, also in threads."""
        tokens = max(25, self.most // 6)
        fixed = {"seed": 0, "max_new_tokens": tokens, "ignore_eos": True, "backend": backend}
        most = 0.0
        for settings in (BALANCED, FAST, FAST.replace(overlap=True, schedule="grow")):
            sounds = [
                torch.cat([audio for audio, _ in generate_stream(self.tts, MIDDLE, settings, **fixed)], dim=1)
                for _ in range(2)
            ]
            if any(sound.shape != (1, tokens * 960) for sound in sounds):
                return False, f"{sounds[0].shape[1]} and {sounds[1].shape[1]} samples for {tokens} tokens"
            most = max(most, float((sounds[0] - sounds[1]).abs().max()))
        return most < 1e-3, f"960 samples a token, twice the same to {most:.1e}"

    def _said(self, text: str, **how: Any) -> torch.Tensor:
        return speech_tokens(self.tts, text, **how)

    def _upstreams(self, text: str, **fixed: Any) -> torch.Tensor:
        key = (text, *fixed.values())
        if key not in self.upstreams:
            self.upstreams[key] = upstream_tokens(self.tts, text, **fixed)
        return self.upstreams[key]

    def _pace(self, backend: str) -> float:
        """Seconds of a short call, the median of five."""
        clock, taken = StageClock(self.tts.device), []
        for _ in range(5):
            start = clock.now()
            self._said(MIDDLE, backend=backend, seed=0, max_new_tokens=max(2, self.most // 8), ignore_eos=True)
            taken.append(clock.now() - start)
        return sorted(taken)[2]


def exact_backends(device: str) -> tuple[str, ...]:
    """The backends that say upstream's tokens on a device, the newest first; without a compiler (minutes)."""
    kind, rows = torch.device(device).type, reversed(BACKENDS.items())
    return tuple(name for name, row in rows if row.exact and name != "compile" and kind in (row.devices or (kind,)))


def asked(question: Callable[[], tuple[bool, str]]) -> Iterator[Row]:
    """The row of one question: ``passed``, ``found``, and the error if it raised one."""
    try:
        passed, found = question()
    except Exception as error:  # of any kind: the other questions are still worth asking
        passed, found = False, f"{type(error).__name__}: {error}".splitlines()[0][:200]
    yield {"passed": bool(passed), "found": found}


def summary(table: pd.DataFrame) -> str:
    """A line a question."""
    width = table["question"].str.len().max()
    return "\n".join(
        f"{'passed' if row.passed else 'FAILED'}  {row.question:<{width}}  {row.found}" for row in table.itertuples()
    )


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of ``chatterbox-lab selftest``."""
    command.add_model(parser)
    command.add_device(parser)
    parser.add_argument("--tokens", metavar="X", type=int, default=300, help="of the longest call (default: 300)")
    parser.add_argument(
        "--backend", metavar="X", nargs="+", choices=BACKENDS, help="%(choices)s (default: all that are exact there)"
    )
    command.add_record(parser, "selftest_MODEL_DEVICE.csv")


def run(options: argparse.Namespace) -> int:
    """Asks every question of the model on the device; returns 1 where one is not passed."""
    most, device = whole_number("tokens", options.tokens, 20, 900), pick_device(options.device)
    name = command.model_name(options)
    record = command.open_record(options, f"selftest_{name}_{torch.device(device).type}.csv")
    facts = machine_facts(device) | {"model": name, "dtype": "float32", "asked_tokens": most}
    record.check(facts)
    tts = load(options.model, device=device, watermark=False)
    questions = SelfTest(tts, most, tuple(options.backend or ())).questions()
    parts = [({"question": title}, partial(asked, question)) for title, question in questions.items()]
    table = ladder.measure(ladder.due(parts, record.rows), record, facts)
    record.finish()
    print(summary(table))
    return int(not table["passed"].all())
