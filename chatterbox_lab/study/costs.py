"""What a machine takes for a token and a chunk, and the settings that follow from it."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import islice
from typing import Any

import numpy as np
import pandas as pd
import torch
from chatterbox.models.t3 import T3
from chatterbox.tts import ChatterboxTTS
from tqdm.auto import tqdm

from ..cpu import emulation
from ..engine.clock import StageClock
from ..engine.linears import is_plain
from ..engine.request import checked
from ..engine.schedule import TOKEN_SECONDS, Costs
from ..engine.settings import BASELINE, StreamSettings, whole_number
from ..engine.stream import speech_tokens
from ..engine.t3.backends import BACKENDS
from .chunks import PROMPTS, measured_chunks
from .machine import in_words, machine_facts
from .playout import expected
from .turns import to_and_fro

TARGETS = ("latency", "balanced", "rtf")
HEADROOM = 1.5
"""How many times as long everything may take before a balanced stream underruns."""
NEAR = 1.05
"""How much above the lowest RTF counts as near it."""
_SLOW_TO_START = ("compile",)  # half a minute, which is more than a recommendation may take
_UTTERANCE = 500  # tokens, 20 s of speech: what an RTF is quoted for
_WITHIN = 0.9  # share of the chunks that the model's error covers


@dataclass(frozen=True)
class Fit:
    """The cost model fitted to measured chunks.

    Args:
        costs: the model, with its error.
        coefficients: ``value`` and ``error`` (standard error) in seconds, by name.
        explained: share of the variance of T3's and of the renderer's times that the model explains (R squared).
        chunks: how many were fitted.
    """

    costs: Costs
    coefficients: pd.DataFrame
    explained: dict[str, float]
    chunks: int


def fit(chunks: pd.DataFrame) -> Fit:
    """Fits `Costs` to the rows of `measured_chunks` of one machine, model and backend.

    T3 costs a prefill, in the first chunk, and so much a token. Rendering (S3Gen and watermark) costs so much a chunk
    and so much a token of the window. The fit is by least squares of relative errors, so that a chunk of 5 tokens
    counts like one of 500.

    Raises:
        ValueError: fewer than three chunks, or chunks of only one size.
    """
    if len(chunks) < 3 or chunks["window_tokens"].nunique() < 2 or chunks["new_tokens"].nunique() < 2:
        raise ValueError(f"chunks: must be three or more of different sizes, not {len(chunks)}")
    first = (chunks["chunk"] == 0).to_numpy(float)
    rendering = (chunks["s3gen_seconds"] + chunks["watermark_seconds"]).to_numpy()
    t3 = _line({"prefill": first, "token": chunks["new_tokens"]}, chunks["t3_seconds"].to_numpy())
    renderer = _line({"chunk": np.ones(len(chunks)), "window_token": chunks["window_tokens"]}, rendering)
    found = pd.concat([t3[0], renderer[0]])
    values = found["value"].to_dict()
    bounded = {name: value if name == "chunk" else max(0.0, value) for name, value in values.items()}
    short = {name: float(f"{value:.4g}") for name, value in bounded.items()}  # they are printed, and pasted
    costs = Costs(**short, prompt_tokens=int(chunks["prompt_tokens"].iloc[0]))
    over = (chunks["t3_seconds"].to_numpy() + rendering) / predicted(costs, chunks) - 1
    error = max(0.0, round(float(np.quantile(over, _WITHIN)), 3))
    return Fit(replace(costs, error=error), found, {"T3": t3[1], "renderer": renderer[1]}, len(chunks))


def fit_windows(rows: pd.DataFrame) -> Fit:
    """Fits what a window's parts cost to the rows of `sweep.windows` of one machine.

    S3Gen's flow works on the whole window, its vocoder on all but the voice prompt. So a token of the prompt
    (``prompt_token``) costs less than one of context or speech (``window_token``); every window costs ``chunk``.
    `Costs` has one cost for both kinds of token: the prompt's length is fixed, so its ``chunk`` takes the difference.
    """
    inside = rows["context_tokens"] + rows["new_tokens"]
    columns = {"chunk": np.ones(len(rows)), "prompt_token": rows["prompt_tokens"], "window_token": inside}
    table, explained = _line(columns, rows["s3gen_seconds"].to_numpy())
    chunk, prompt, window = table["value"]
    longest = int(rows["prompt_tokens"].max())
    costs = Costs(chunk=float(chunk + (prompt - window) * longest), window_token=float(window), prompt_tokens=longest)
    return Fit(costs, table, {"renderer": explained}, len(rows))


def predicted(costs: Costs, chunks: pd.DataFrame) -> np.ndarray:
    """Seconds of each chunk by the model; the first with the prefill."""
    rows = zip(chunks["new_tokens"], chunks["context_tokens"], chunks["chunk"], strict=True)
    return np.array([costs.chunk_seconds(new, before) + costs.prefill * (number == 0) for new, before, number in rows])


def shares(costs: Costs, settings: Sequence[StreamSettings], tokens: int = _UTTERANCE) -> pd.DataFrame:
    """What the RTF of an utterance is made of, by the cost model: a row a setting, a part a column.

    The parts are ``T3`` with its prefill, and of rendering ``new speech``, ``context`` that is rendered again, and
    ``every chunk``: what a chunk of any size costs, which is mostly the voice prompt.
    """
    rows = {}
    for chosen in settings:
        chunks = expected(costs, chosen.chunk_sizes(), tokens, chosen.context)
        seconds = {
            "T3": costs.prefill + costs.token * tokens,
            "new speech": costs.window_token * tokens,
            "context": costs.window_token * sum(chunk.before for chunk in chunks),
            "every chunk": costs.render_seconds(0, 0) * len(chunks),
        }
        name = (
            f"chunk {chosen.chunk_size}" + (", growing" * (chosen.schedule == "grow")) + f", context {chosen.context}"
        )
        rows[name] = {part: value / (tokens * TOKEN_SECONDS) for part, value in seconds.items()}
    return pd.DataFrame.from_dict(rows, orient="index")


def _line(columns: dict[str, Any], seconds: np.ndarray) -> tuple[pd.DataFrame, float]:
    """Coefficients with standard errors of ``seconds = sum(coefficient * column)``, and the variance explained."""
    design = np.column_stack([np.asarray(column, float) for column in columns.values()])
    weighted = design / seconds[:, None]
    value, *_ = np.linalg.lstsq(weighted, np.ones(len(seconds)), rcond=None)
    freedom = max(1, len(seconds) - len(value))
    variance = ((weighted @ value - 1) ** 2).sum() / freedom
    error = np.sqrt(np.diag(variance * np.linalg.pinv(weighted.T @ weighted)))
    residual = ((design @ value - seconds) ** 2).sum()
    explained = 1 - residual / ((seconds - seconds.mean()) ** 2).sum()
    return pd.DataFrame({"value": value, "error": error}, index=list(columns)), float(explained)


def calibrate(
    tts: ChatterboxTTS, settings: StreamSettings = BASELINE, *, tokens: int = 150, seconds: float = 5.0, seed: int = 0
) -> Fit:
    """Measures what this machine takes: one utterance in chunks that double, again until ``seconds`` have gone by.

    The first pass warms up every length. It is left out unless it alone took longer than ``seconds``.

    Args:
        tts: a model from `load`, or any upstream ``ChatterboxTTS``.
        settings: analyzer, backend, weights and context are used.
        tokens: length of the utterance, at least 30; 75 are enough on a slow machine.
        seconds: after how long no further pass is begun.
        seed: of the sampling.

    Raises:
        ValueError: names the argument, its value and what is allowed, before a model runs.
    """
    tokens = whole_number("tokens", tokens, 30, 1000)
    spoken = settings.replace(language=settings.language or "en")
    doubling = spoken.replace(schedule="grow", chunk_size=5, max_chunk_size=tokens, costs=Costs())
    checked(tts, PROMPTS["medium"], doubling, seed=seed, max_new_tokens=tokens)
    clock, rows, passes = StageClock(tts.device), [], 0
    start = clock.now()
    with tqdm(desc="calibrating", unit=" chunks", leave=False) as bar:
        while passes < 2 or clock.now() - start < seconds:
            for row in measured_chunks(tts, PROMPTS["medium"], doubling, seed=seed, tokens=tokens):
                rows.append(row | {"pass": passes})
                bar.update()
            passes += 1
            if passes == 1 and clock.now() - start > seconds:
                break
    table = pd.DataFrame(rows)
    return fit(table[table["pass"] > 0] if passes > 1 else table)


@dataclass(frozen=True)
class Recommendation(StreamSettings):
    """`StreamSettings` for this machine, with the reason in words and the costs it was computed from."""

    reason: str = ""

    def __str__(self) -> str:
        return f"{self.reason}\n{self.call}"

    @property
    def call(self) -> str:
        """The settings as an expression to paste into an application."""
        usual = StreamSettings()
        changed = [
            f"{field.name}={getattr(self, field.name)!r}"
            for field in fields(StreamSettings)
            if getattr(self, field.name) != getattr(usual, field.name)
        ]
        return f"StreamSettings({', '.join(changed)})"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:  # what a notebook shows
        printer.text(str(self))


def recommend(
    tts: ChatterboxTTS,
    target: str = "balanced",
    *,
    settings: StreamSettings = BASELINE,
    backends: Sequence[str] | None = None,
    tokens: int = 150,
    seconds: float = 5.0,
) -> Recommendation:
    """Measures this machine for some seconds and returns the settings it should use, with the reason in words.

    Args:
        tts: a model from `load`, or any upstream ``ChatterboxTTS``.
        target: ``"latency"``: the smallest first chunk without an underrun, and growing ones after it. ``"balanced"``:
            the same where everything may take 1.5 times as long. ``"rtf"``: the smallest fixed chunk that comes near
            the lowest RTF, for files.
        settings: what is kept: context, sound, sampling, analyzer and guard; ``max_chunk_size`` is the largest chunk.
            Only a bfloat16 of flow or vocoder that is slower here, because this CPU emulates it, becomes ``"auto"``.
        backends: of T3; the fastest is taken. By default all that say upstream's tokens and start within seconds.
        tokens: see `calibrate`.
        seconds: see `calibrate`.

    Raises:
        ValueError: an unknown target, or another argument that is not allowed.
    """
    if target not in TARGETS:
        raise ValueError(f"target={target!r}: must be one of {', '.join(map(repr, TARGETS))}")
    settings, why = _multiplied(settings, tts.s3gen.device)
    times = token_seconds(tts, settings, exact_backends(tts.t3, settings) if backends is None else backends)
    settings = settings.replace(backend=min(times, key=times.get))
    found = calibrate(tts, settings, tokens=tokens, seconds=seconds)
    advised = advise(found.costs, target, settings, times)
    where = in_words(machine_facts(tts.device))
    return replace(advised, reason=f"On {where}: {advised.reason}{why}")


def _multiplied(settings: StreamSettings, device: torch.device) -> tuple[StreamSettings, str]:
    """The settings without a dtype that is slower here, and why; they keep their way on other machines."""
    asked = [name for name in ("flow_dtype", "vocoder_dtype") if getattr(settings, name) == "bfloat16"]
    costs = emulation(device) if asked else {}
    if not costs:
        return settings, ""
    slower = f"{costs[max(costs)]:.2g} times as long as in float32"
    instead = ", ".join(f"{name}='auto'" for name in asked)
    why = f" {instead}, since this CPU emulates bfloat16, whose products take {slower}."
    return settings.replace(**dict.fromkeys(asked, "auto")), why


def exact_backends(t3: T3, settings: StreamSettings) -> list[str]:
    """The backends that say upstream's tokens with this model and these settings, and that start within seconds."""
    plain = is_plain(t3)
    fitting = {
        name: row
        for name, row in BACKENDS.items()
        if (not row.devices or t3.device.type in row.devices)
        and settings.analyzer in row.analyzers
        and settings.weights in row.weights
    }
    exact = (name for name, row in fitting.items() if row.exact and (plain or not row.plain))
    return [name for name in exact if name not in _SLOW_TO_START]


def token_seconds(tts: ChatterboxTTS, settings: StreamSettings, backends: Sequence[str]) -> dict[str, float]:
    """Seconds a token of T3 in each backend, prefill included: the median of three turns of 25 tokens."""
    candidates = {name: settings.replace(backend=name, language=settings.language or "en") for name in backends}
    if not candidates:
        raise ValueError("backends=(): must have at least one")
    for chosen in candidates.values():
        checked(tts, PROMPTS["medium"], chosen)
    clock, taken = StageClock(tts.device), {name: [] for name in candidates}
    for turn in range(-1, 3):
        for name in to_and_fro(candidates, turn):
            start = clock.now()
            speech_tokens(tts, PROMPTS["medium"], candidates[name], seed=0, max_new_tokens=25, ignore_eos=True)
            taken[name].append((clock.now() - start) / 25)
    return {name: statistics.median(times[1:]) for name, times in taken.items()}  # the first warms up


def advise(
    costs: Costs, target: str, settings: StreamSettings = BASELINE, times: dict[str, float] | None = None
) -> Recommendation:
    """The settings that follow from known costs; see `recommend`. ``times`` are each backend's seconds a token."""
    most = settings.max_chunk_size
    lowest = costs.rtf(most, settings.context, _UTTERANCE)
    paces = {"latency": [costs], "balanced": [costs.slower(HEADROOM), costs], "rtf": []}[target]
    firsts = [(pace, pace.smallest_chunk(settings.context, settings.fade_duration)) for pace in paces]
    pace, first = next(((pace, first) for pace, first in firsts if first is not None and first <= most), (costs, None))
    if first is not None:
        chosen = settings.replace(schedule="grow", chunk_size=first, costs=pace)
        sure = "by these costs" if pace is costs else f"when everything takes {HEADROOM:g} times as long"
        spoken = f"{first} tokens ({first * TOKEN_SECONDS:.2g} s of speech)"
        why = f"{spoken} are the smallest first chunk that plays without a gap {sure}"
    else:
        near = (size for size in range(1, most) if costs.rtf(size, settings.context, _UTTERANCE) <= NEAR * lowest)
        chosen = settings.replace(schedule="fixed", chunk_size=next(near, most))
        why = f"{chosen.chunk_size} tokens are the smallest chunk within {NEAR - 1:.0%} of the lowest RTF"
        if target != "rtf":
            why = f"{_too_slow(costs, settings)}, so collect speech before playing it; {why}"
    reason = f"{_words(costs, chosen, times)}; {why}. {_expected(costs, chosen)}"
    values = {field.name: getattr(chosen, field.name) for field in fields(StreamSettings)}
    return Recommendation(**values, reason=reason)


def _too_slow(costs: Costs, settings: StreamSettings) -> str:
    """Why no chunk size is sure to keep up with the listener."""
    smallest = replace(costs, error=0.0).smallest_chunk(settings.context, settings.fade_duration)
    if smallest is not None and smallest <= settings.max_chunk_size:
        return f"chunks of {smallest} tokens would keep up, but not with times that vary by {costs.error:.0%} as here"
    limit = f"in chunks of at most {settings.max_chunk_size} tokens"
    return f"speech does not keep up with the listener {'at all' if smallest is None else limit} here"


def _words(costs: Costs, chosen: StreamSettings, times: dict[str, float] | None) -> str:
    times = times or {}
    beside = ", ".join(f"{name!r} {1e3 * time:.3g} ms" for name, time in times.items())
    beside = f" (with the prefill of a second of speech: {beside})" * (len(times) > 1)
    mostly = "" if chosen.flow == "cached" else ", which is mostly the voice prompt,"
    return (
        f"Backend {chosen.backend!r} takes {1e3 * costs.token:.3g} ms a token{beside}; rendering a chunk costs "
        f"{costs.render_seconds(0, 0):.2g} s whatever its size{mostly} and "
        f"{1e3 * costs.window_token:.2g} ms for each token of context or speech (nine in ten chunks exceed this by "
        f"less than {costs.error:.1%})"
    )


def _expected(costs: Costs, chosen: StreamSettings) -> str:
    chunks = expected(costs, chosen.chunk_sizes(), _UTTERANCE, chosen.context, chosen.fade)
    sizes = ", ".join(str(size) for size in islice(chosen.chunk_sizes(), 4))
    duration = _UTTERANCE * TOKEN_SECONDS
    return (
        f"Expected: first chunk after {chunks[0].arrival:.2g} s, RTF {chunks[-1].arrival / duration:.2g} over "
        f"{duration:.0f} s of speech, in chunks of {sizes}, ..."
    )
