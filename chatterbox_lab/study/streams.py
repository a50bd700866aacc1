"""Streams measured side by side: interleaved rounds, one row a run, ratios with their spread."""

from __future__ import annotations

import gc
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from itertools import product
from typing import Any

import pandas as pd
import torch
from chatterbox.tts import ChatterboxTTS
from tqdm.auto import tqdm

from ..engine.clock import NUMBERS, Measured
from ..engine.settings import StreamSettings, whole_number
from ..engine.stream import generate_stream, speech_tokens
from ..engine.t3.backends import AUTO, BACKENDS
from .s3gen_ladder import SOUNDS
from .turns import to_and_fro
from .upstream import upstream_stream, upstream_tokens, upstream_whole

UPSTREAM = "upstream"
SHAPE = ["chunk_size", "context_window"]
CHECK_SEEDS = (0, 1, 2)
CHOICES = (AUTO, *BACKENDS, "static-int8")
"""Backends of T3 to compare, the last with weights rounded to 8 bits."""
Variants = Mapping[str, Callable[[], Measured]]


def variants(
    tts: ChatterboxTTS,
    text: str,
    settings: StreamSettings,
    tokens: int,
    analyzers: Sequence[str],
    backends: Sequence[str] = ("hf",),
    seed: int = 0,
    whole: bool = False,
    sounds: Sequence[str] = ("exact",),
) -> dict[str, Callable[[], Measured]]:
    """Variants for `interleaved`: upstream's own stream, and ours in each mode, backend and sound, all of one length.

    With ``whole`` upstream's ``generate`` takes the place of its stream; ours then wants one chunk of all tokens.
    """
    fixed = {"seed": seed, "max_new_tokens": tokens, "ignore_eos": True}
    released = upstream_whole if whole else upstream_stream
    found = {UPSTREAM: partial(released, tts, text, settings, **fixed)}
    for name, chosen in ours(analyzers, backends, sounds):
        found[name] = partial(generate_stream, tts, text, settings, **chosen, **fixed)
    return found


def ours(
    analyzers: Sequence[str], backends: Sequence[str], sounds: Sequence[str] = ("exact",)
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Our variants by name, with the fields of `StreamSettings` that make them; those that can be, in this order.

    Args:
        analyzers: modes of the alignment analyzer.
        backends: of `CHOICES`; one that cannot read an analyzer's maps is left out there.
        sounds: names in `SOUNDS`.
    """
    for name, sound in product(backends, sounds):
        backend, *weights = name.split("-")
        chosen = {"backend": backend} | ({"weights": weights[0]} if weights else {})
        for analyzer in analyzers:
            if backend == AUTO or analyzer in BACKENDS[backend].analyzers:
                names = [analyzer] + [name] * (name != "hf") + [sound] * (sound != "exact")
                yield f"ours, {', '.join(names)}", {"analyzer": analyzer} | chosen | SOUNDS[sound]


def runs(
    variants: Variants, rounds: int, warm_up: int = 1, done: Collection[tuple[str, str, int]] = ()
) -> Iterator[dict[str, Any]]:
    """Runs every variant once a round; they take turns (see `to_and_fro`).

    Args:
        variants: names and what starts their stream, each with the same text, seed and length.
        rounds: measured rounds, at least 1; their rows have the ``state`` ``warm``.
        warm_up: rounds before them, ``state`` ``warm-up``: the first pays for imports, caches and autotuning.
        done: (variant, state, round) of what need not run; a variant is warmed up if any of its rounds is left.

    Yields:
        One row a run: ``variant``, ``state``, ``round``, ``error`` and the numbers of the final `StreamMetrics`. A
        variant that fails gives a row with its error and no numbers, and does not run again.
    """
    failed: set[str] = set()
    for turn in range(-warm_up, rounds):
        state = "warm" if turn >= 0 else "warm-up"
        for name in to_and_fro(variants, max(turn, 0)):
            left = any((name, "warm", number) not in done for number in range(max(turn, 0), rounds))
            if name in failed or not left or (turn >= 0 and (name, state, turn) in done):
                continue
            row = {"variant": name, "state": state, "round": turn} | metrics_of(variants[name])
            if row["error"]:
                failed.add(name)
            yield row


def metrics_of(start: Callable[[], Measured]) -> dict[str, Any]:
    """The final `StreamMetrics` of one stream, or empty fields and the error that ended it."""
    try:
        last = deque(start(), maxlen=1)
        if not last:
            raise ValueError("the stream yielded nothing, so there is nothing to measure")
        return {"error": None} | last[0][1].numbers()
    except Exception as error:  # of any kind: the other variants are still worth measuring
        row = failure(error)
    free_memory()
    return row


def failure(error: Exception) -> dict[str, Any]:
    """What stands in a row for the `StreamMetrics` of a run that failed: empty fields, and the error in a line."""
    empty = dict.fromkeys(NUMBERS)
    return empty | {"error": f"{type(error).__name__}: {error}".splitlines()[0][:200]}


def free_memory() -> None:
    """Gives back what a run, or a model that nobody holds any more, has left behind."""
    gc.collect()
    with suppress(RuntimeError):  # a GPU that has failed an assertion answers nothing any more
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def interleaved(variants: Variants, rounds: int, warm_up: int = 1) -> pd.DataFrame:
    """All rows of `runs`, with a progress bar, for a notebook.

    Raises:
        ValueError: no rounds.
        RuntimeError: a variant that fails, by its name.
    """
    rounds, warm_up = whole_number("rounds", rounds, 1), whole_number("warm_up", warm_up, 0)
    rows = []
    for row in tqdm(runs(variants, rounds, warm_up), "streams", (warm_up + rounds) * len(variants), leave=False):
        if row["error"]:
            raise RuntimeError(f"variant {row['variant']!r}: {row['error']}")
        rows.append(row)
    return pd.DataFrame(rows).drop(columns="error")


def summary(table: pd.DataFrame, against: str = UPSTREAM, state: str = "warm") -> pd.DataFrame:
    """Medians by variant, and RTF as a ratio to ``against`` within each round: median and range.

    Raises:
        ValueError: no run of the variant ``against`` in this state.
    """
    chosen = table[(table["state"] == state) & table["rtf"].notna()]
    if against not in set(chosen["variant"]):
        raise ValueError(f"against={against!r}: must be one of {', '.join(sorted(set(chosen['variant'])))}")
    found = medians(chosen)
    rtf = chosen.pivot_table(index="round", columns="variant", values="rtf")
    ratios = rtf.div(rtf[against], axis=0)[list(found.index)]
    found["RTF ratio"] = ratios.median()
    found["ratio range"] = [f"{ratios[name].min():.2f} to {ratios[name].max():.2f}" for name in found.index]
    return found


def medians(table: pd.DataFrame) -> pd.DataFrame:
    """Medians by variant of what `runs` measured, in the units of the column names.

    ``watermark (RTF)`` is a share of real time. ``T3 / limit`` is there where the record knows the limit, which is the
    time to read T3's weights once (see `read_seconds`).
    """
    columns = {
        "RTF": table["rtf"],
        "first chunk (s)": table["latency_to_first_chunk"],
        "T3 (ms/token)": 1e3 * table["t3_seconds"] / table["tokens"],
        "S3Gen (s/chunk)": table["s3gen_seconds"] / table["chunk_count"],
        "watermark (RTF)": table["watermark_seconds"] / table["total_audio_duration"],
        "peak memory (GiB)": table["peak_memory_bytes"] / 2**30,
    }
    if "step_limit_seconds" in table:
        columns["T3 / limit"] = table["t3_seconds"] / table["tokens"] / table["step_limit_seconds"]
    return pd.DataFrame(columns).groupby(table["variant"], sort=False).median()


def by_shape(table: pd.DataFrame, state: str = "warm") -> pd.DataFrame:
    """`summary` of every shape of one machine, device and dtype; without ratios where upstream itself failed.

    Returns:
        Indexed by chunk size (0 is the whole utterance), context window and variant; empty if nothing ran.
    """
    there = table[(table["state"] == state) & table["rtf"].notna()]
    tables = {
        shape: summary(group, state=state) if UPSTREAM in set(group["variant"]) else medians(group)
        for shape, group in there.groupby(SHAPE, sort=False)
    }
    return pd.concat(tables, names=[*SHAPE, "variant"]) if tables else pd.DataFrame()


def token_check(
    tts: ChatterboxTTS,
    text: str,
    tokens: int,
    analyzers: Sequence[str],
    backends: Sequence[str] = ("hf",),
    done: Collection[tuple[str, str, int]] = (),
) -> Iterator[dict[str, Any]]:
    """Whether the same seed gives upstream's tokens on this device: a row a variant and seed that is not ``done``.

    ``tokens`` is how many ``T3.inference`` said (or ours, if more), ``same_tokens`` how many of ours are the same
    before the first that is not. Rounding differs between kernels, so in half precision a tie may fall the other way.
    """
    for seed in CHECK_SEEDS:
        fixed = {"seed": seed, "max_new_tokens": tokens, "ignore_eos": True}
        expected = None
        for name, chosen in ours(analyzers, backends):
            if (name, "check", seed) in done:
                continue
            try:
                expected = upstream_tokens(tts, text, **fixed) if expected is None else expected
                said = speech_tokens(tts, text, **chosen, **fixed)
                common = min(len(said), len(expected))
                same = int((said[:common] == expected[:common]).int().cumprod(0).sum())
                found = {"tokens": max(len(said), len(expected)), "same_tokens": same, "error": None}
            except Exception as error:  # a row, as in `metrics_of`
                found = failure(error)
            yield {"variant": name, "state": "check", "round": seed} | found
