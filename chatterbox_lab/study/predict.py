"""What a GPU would do, predicted from what is counted on a CPU and from constants of a card and its host.

A stream is T3's prefill, a decode step a token, and for each chunk S3Gen on its window and the watermark. Each is some
`Work`, and takes what `Card.seconds` says: the device reads, computes and needs a moment for every kernel; unless a
CUDA graph launches them together, the host launches kernel by kernel, and the work takes the longer of both. The low
end of a range has all constants at their better ends, the high end has all at their worse ones.

The model knows no first call, no other load of the machine, no several streams at once, and no code that does other
work than the release's or ours. Nothing in it is fitted to a figure that it is compared with (see `cards`).

``python -m chatterbox_lab predict --help`` is the command line.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import nan
from typing import Any

import pandas as pd

from ..engine.schedule import TOKEN_SECONDS
from ..engine.settings import whole_number
from ..engine.t3.backends import ANALYZERS, AUTO
from ..files import written_whole
from ..voices.build import PROMPT_TOKENS
from ..voices.load import DTYPES
from .cards import RELEASED, Card, Counts, card, count, known
from .machine import machine_facts
from .records import load_results, output_folder, recorded
from .s3gen_ladder import SOUNDS
from .streams import UPSTREAM

WAYS = (UPSTREAM, "ours, off", "ours, off, static", "ours, off, graph", "ours, off, graph, fast")
CARDS = ("RTX 4090", "RTX 3090", "H100", "H200")
FULL_SIZE = ("random", "pretrained")
"""Models whose sizes were counted."""
PROMPT = 100
"""Positions before the first token: 34 of the voice, a sentence of text, the start tokens."""
ENDS = ("low", "high")
MEASURES: dict[str, Callable[[pd.DataFrame], pd.Series]] = {
    "RTF": lambda runs: runs["rtf"],
    "first chunk (s)": lambda runs: runs["latency_to_first_chunk"],
    "ms/token": lambda runs: 1e3 * runs["t3_seconds"] / runs["tokens"],
    "s/chunk": lambda runs: runs["s3gen_seconds"] / runs["chunk_count"],
}
"""What is predicted of a stream, and how its record has that: all of it, and its two parts, T3 and S3Gen."""


@dataclass(frozen=True)
class Way:
    """How T3 and S3Gen run: what was counted of each, and whether T3's step is launched as a CUDA graph."""

    step: str
    chunk: str
    graph: bool = False


@dataclass(frozen=True)
class Setting:
    """How a stream is asked for.

    Args:
        chunk_size: new tokens a chunk; 0 is the whole utterance at once.
        context_window: tokens before a chunk that are rendered with it.
        tokens: length of the speech, 25 a second.
        dtype: of T3.
        watermark: whether PerTh runs.

    Raises:
        ValueError: names the field, its value and what is allowed.
    """

    chunk_size: int = 25
    context_window: int = 50
    tokens: int = 100
    dtype: str = "float32"
    watermark: bool = True

    def __post_init__(self) -> None:
        whole_number("chunk_size", self.chunk_size, 0)
        whole_number("context_window", self.context_window, 0)
        whole_number("tokens", self.tokens, 1)
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype={self.dtype!r}: must be one of {', '.join(DTYPES)}")


def way(name: str) -> Way:
    """A way by its name in records of streams: ``upstream``, or ``ours, ANALYZER[, BACKEND][, SOUND]``.

    ``upstream, off`` and ``upstream, graph`` are the release's S3Gen after our T3 without maps, and as a CUDA graph.

    Raises:
        ValueError: a name that is none of these, or a backend that cannot be counted.
    """
    whose, *parts = name.split(", ")
    sound = parts.pop() if parts and parts[-1] in SOUNDS else "exact"
    if whose == UPSTREAM and sound == "exact" and len(parts) <= 1:
        step = parts[0] if parts else RELEASED
        if step in (RELEASED, "graph", *ANALYZERS):
            return Way(step, RELEASED, graph=step == "graph")
    if whose == "ours" and parts and parts[0] in ANALYZERS and len(parts) <= 2:
        backend = parts[1] if len(parts) == 2 else "hf"
        if backend in ("hf", AUTO, "static", "graph"):
            backend = "graph" if backend == AUTO else backend  # what it takes on CUDA
            step = parts[0] if backend == "hf" else backend
            return Way(step, sound, graph=backend == "graph")
    known_ways = "upstream[, off|graph] or ours, ANALYZER[, static|graph][, exact|once|fast]"
    raise ValueError(f"way={name!r}: must be {known_ways}; what a compiler fuses cannot be counted")


def seconds(card: Card, way: Way, setting: Setting, counts: Counts) -> dict[str, float]:
    """One stream on one card.

    Returns:
        ``RTF``, ``first chunk (s)``, ``ms/token`` (T3 with its prefill), ``s/chunk`` (S3Gen), ``tokens a second`` (of
        T3's steps alone) and ``seconds`` (all of it).
    """
    size, said, chunks, first = setting.chunk_size or setting.tokens, 0, 0, None
    flow = "bfloat16" if way.chunk == "fast" else "float32"
    prefill = card.seconds(counts.prefill(way.step, PROMPT, setting.dtype), setting.dtype)
    elapsed, stepping, rendering = prefill, 0.0, 0.0
    while said < setting.tokens:
        new = min(size, setting.tokens - said)
        step = counts.step(way.step, PROMPT + said + new / 2, setting.dtype)
        speaking = new * card.seconds(step, setting.dtype, way.graph)
        work = counts.chunk(way.chunk, PROMPT_TOKENS, min(said, setting.context_window), new)
        chunk = card.seconds(work, flow)
        elapsed += speaking + chunk + setting.watermark * card.watermark * new * TOKEN_SECONDS
        stepping, rendering, said, chunks = stepping + speaking, rendering + chunk, said + new, chunks + 1
        first = elapsed if first is None else first
    return {
        "RTF": elapsed / (setting.tokens * TOKEN_SECONDS), "first chunk (s)": first,
        "ms/token": 1e3 * (prefill + stepping) / setting.tokens, "s/chunk": rendering / chunks,
        "tokens a second": setting.tokens / stepping, "seconds": elapsed,
    }  # fmt: skip


def ranges(name: str, way_name: str, setting: Setting, counts: Counts | None = None) -> dict[str, tuple[float, float]]:
    """Low and high of everything that `seconds` says of one stream on the card of this name. Raises ValueError."""
    counts = Counts() if counts is None else counts
    fast, slow = (seconds(end, way(way_name), setting, counts) for end in card(name))
    return {measure: tuple(sorted((fast[measure], slow[measure]))) for measure in fast}


def table(cards: Sequence[str] = CARDS, ways: Sequence[str] = WAYS, setting: Setting = Setting()) -> pd.DataFrame:
    """Predictions of every way on every card.

    Returns:
        Indexed by ``card`` and ``way``: ``RTF``, ``first chunk (s)``, ``ms/token`` (of T3) and ``s/chunk`` (of S3Gen),
        each a pair of columns ``low`` and ``high``.

    Raises:
        ValueError: a card that there are no constants of, or a way that was not counted.
    """
    counts, rows = Counts(), {}
    for name in cards:
        for one in ways:
            found = ranges(name, one, setting, counts)
            rows[name, one] = {
                (measure, end): found[measure][at] for measure in MEASURES for at, end in enumerate(ENDS)
            }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis(["card", "way"])


def verdict(value: float, low: float, high: float, upper: float | None = None) -> str:
    """Where a figure, or its range to ``upper``, is: ``inside`` a prediction, ``above``, ``below``, or ``partly``."""
    upper = value if upper is None or upper != upper else upper
    if value > high or upper < low:
        return "above" if value > high else "below"
    return "inside" if low <= value and upper <= high else "partly"


def card_of(machine: str) -> str | None:
    """The card that a machine's name names, such as ``H100`` in ``NVIDIA H100 80GB HBM3``; None if none is known."""
    for name in sorted(known(), key=len, reverse=True):
        if re.search(rf"\b{re.escape(name)}\b(?! ?(Ti|Super|Laptop|Mobile|D|PCIe|NVL)\b)", machine, re.IGNORECASE):
            return name
    return None


def against_records() -> pd.DataFrame:
    """Every record of streams on a GPU in ``data/``, beside its prediction.

    Returns:
        A row a record, dtype, chunk size, context window, variant and measure: ``measured`` (median of the warm
        rounds), ``low``, ``high``, ``verdict`` (``inside``, ``above``, ``below``, or why there is no prediction).
    """
    rows, counts = [], Counts()
    for kind in ("bench", "streams"):
        try:
            found = recorded(kind)
        except FileNotFoundError:
            continue
        found = found[(found["device"] == "cuda") & (found["state"] == "warm") & found["rtf"].notna()]
        keys = ["record", "file", "machine", "model", "dtype", "chunk_size", "context_window", "variant"]
        for key, group in found.groupby(keys, sort=False):
            rows += _beside(dict(zip(keys, key, strict=True)), group, counts)
    return pd.DataFrame(rows)


def _beside(facts: dict[str, Any], group: pd.DataFrame, counts: Counts) -> list[dict[str, Any]]:
    """A record's streams of one kind as rows of `against_records`."""
    name, reason, found = card_of(facts["machine"]), None, {}
    watermark = "watermark" not in group or bool(group["watermark"].iloc[0])
    try:
        if name is None:
            reason = f"no constants of {facts['machine']}"
        elif facts["model"] not in FULL_SIZE:
            reason = f"{facts['model']!r} has other sizes than those counted"
        else:
            shape = int(facts["chunk_size"]), int(facts["context_window"]), round(group["tokens"].median())
            found = ranges(name, facts["variant"], Setting(*shape, facts["dtype"], watermark), counts)
    except ValueError as error:
        reason = str(error)
    facts = {"card": name, "label": labelled(facts["variant"], facts["chunk_size"], facts["dtype"])} | facts
    return [
        facts | {"measure": measure} | _compared(found.get(measure), reason, column(group).median())
        for measure, column in MEASURES.items()
    ]


def _compared(
    found: tuple[float, float] | None, reason: str | None, value: float, upper: float = nan
) -> dict[str, Any]:
    """A figure and its prediction, or why there is none."""
    if found is None:
        low, high, said = nan, nan, f"not predicted: {reason}"
    else:
        (low, high), said = found, verdict(value, *found, upper)
    return {"measured": value, "upper": upper, "low": low, "high": high, "verdict": said}


def labelled(way_name: str, chunk_size: int, dtype: str) -> str:
    """A way with what it was asked for, where that is not a chunk of 25 in float32."""
    shape = {0: ", not streaming", 25: ""}.get(chunk_size, f", chunk {chunk_size:g}")
    return way_name + shape + (f", {dtype}" if dtype != "float32" else "")


SOFTWARE = {
    r"vllm|\.cpp|ONNX": None,
    r"all changes|compiled|turbo-stream|that fork": None,
    r"maps off": "upstream, off",
    r"in CUDA graphs": "upstream, graph",
    r"chatterbox-|rsxdalv": UPSTREAM,
}
"""The way that a published figure was made in, by its software, the first that fits; None is work that is not counted.

Graphs of other people are taken for ours: as a graph, a step waits for memory and not for its launches.
"""
LENGTHS = (75, 750)
"""Tokens of a speech whose length is not told: 3 to 30 s; the prediction covers both."""


FACTOR = "attention maps on over maps off"
"""The one factor that is predicted."""
BESIDES = {
    "Windows": "Windows",
    "first run": "a first call",
    "emulates": "emulated bfloat16",
    "shared machine": "other load",
}
"""What a setting may tell that the model does not know, by the words that tell it."""


def against_published() -> pd.DataFrame:
    """Every figure in ``data/published.csv`` beside its prediction, in their order.

    A stream whose chunk size is not told has the release's, 25; T3 whose dtype is not told is in float32.

    Returns:
        All columns of that file, ``card``, ``way``, ``label``, ``measured`` (the value), ``low``, ``high`` and
        ``verdict`` as in `against_records` (``partly``: a published range of which a part is inside), and ``besides``,
        what is told of it that the model does not know (`BESIDES`).
    """
    counts = Counts()
    return pd.DataFrame([_published(row, counts) for row in load_results("published").to_dict("records")])


def _published(row: dict[str, Any], counts: Counts) -> dict[str, Any]:
    measure = {"first chunk": "first chunk (s)"}.get(row["measure"], row["measure"])
    one = next((one for words, one in SOFTWARE.items() if re.search(words, row["software"])), None)
    name, (size, lengths, dtype) = card_of(row["machine"]), _asked(row["setting"])
    found, reason = None, _unpredictable(row, name, one, lengths)
    if reason is None:
        asked = [Setting(size, 2 * size, length, dtype) for length in lengths]
        found = _envelope(name, one, asked, counts).get(measure)
        reason = None if found else f"{measure} is not modelled"
    besides = ", ".join(what for words, what in BESIDES.items() if words in row["setting"])
    row = row | {"card": name, "way": one or "", "label": labelled(one or row["software"], size, dtype)}
    return row | {"measure": measure, "besides": besides} | _compared(found, reason, row["value"], row["upper"])


def _unpredictable(row: dict[str, Any], name: str | None, one: str | None, lengths: tuple[int, ...]) -> str | None:
    """Why a published figure has no prediction; None if it has one."""
    reasons = {
        "the machine is not told": row["machine"] == "unknown",
        f"no constants of {row['machine']}": name is None,
        f"the model {row['model']} is not counted": row["model"] not in ("fork", "english", "unknown"),
        "its work is not counted": one is None,
        "a part of S3Gen or T3 alone": "alone" in row["setting"],
        "the length of the speech is not told": row["measure"] == "seconds" and lengths == LENGTHS,
        "a factor of other things": row["measure"] == "factor" and FACTOR not in row["setting"],
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def _asked(setting: str) -> tuple[int, tuple[int, ...], str]:
    """Chunk size (0 if not streaming), the tokens that the speech may have, and T3's dtype, as a setting tells them."""
    whole, chunk = setting.startswith("not streaming"), re.search(r"chunks of (\d+)", setting)
    size = 0 if whole else int(chunk[1]) if chunk else 25
    spoken, many = re.search(r"([\d.]+) s of audio|clip of ([\d.]+) s", setting), re.search(r"(\d+) chunks", setting)
    lengths: tuple[int, ...] = LENGTHS
    if spoken:
        lengths = (round(float(spoken[1] or spoken[2]) / TOKEN_SECONDS),)
    elif many and size:
        lengths = ((int(many[1]) - 1) * size + 1, int(many[1]) * size)
    return size, lengths, "bfloat16" if "bfloat16" in setting else "float32"


def _envelope(name: str, way_name: str, settings: Sequence[Setting], counts: Counts) -> dict[str, tuple[float, float]]:
    """The least low and the greatest high of a way over some settings.

    ``factor`` is how many times slower the release is, which has all attention maps, at either end.
    """
    found: dict[str, list[tuple[float, float]]] = {}
    for setting in settings:
        one, released = ranges(name, way_name, setting, counts), ranges(name, UPSTREAM, setting, counts)["RTF"]
        one["factor"] = tuple(sorted(released[end] / one["RTF"][end] for end in (0, 1)))
        for measure, pair in one.items():
            found.setdefault(measure, []).append(pair)
    return {measure: (min(low for low, _ in pairs), max(high for _, high in pairs)) for measure, pairs in found.items()}


def inside(compared: pd.DataFrame) -> str:
    """How many of those that have a prediction are inside it, how wide predictions are, and how many have none."""
    there = compared[compared["low"].notna()]
    if there.empty:
        return f"no predictions; {len(compared)} figures without"
    width, off = (there["high"] / there["low"]).median(), there["measured"] / (there["low"] * there["high"]) ** 0.5
    slower = off.where(there["measure"] != "tokens a second", 1 / off).median()
    return (
        f"{(there['verdict'] == 'inside').sum()} of {len(there)} inside the predicted range, which is a factor of "
        f"{width:.1f} wide (median); measured is {slower:.2f} times as slow as the range's middle (median, geometric); "
        f"{len(compared) - len(there)} figures have no prediction"
    )


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of ``chatterbox-lab predict``."""
    add = parser.add_argument
    add("--card", metavar="X", nargs="+", default=CARDS, help=f"of data/cards.csv (default: {', '.join(CARDS)})")
    add("--way", metavar="X", nargs="+", default=WAYS, help=f"names as in records (default: {'; '.join(WAYS)})")
    add("--chunk-size", metavar="X", type=int, default=25, help="new tokens a chunk, 0 is not streaming (default: 25)")
    add("--context-window", metavar="X", type=int, help="tokens rendered again (default: twice the chunk size)")
    add("--tokens", metavar="X", type=int, default=100, help="length of the speech; 25 are a second (default: 100)")
    add("--dtype", default="float32", choices=DTYPES, help="of T3: %(choices)s (default: %(default)s)")
    add("--count", action="store_true", help="count launches and FLOP anew, to build/data; half a minute on a CPU")


def run(options: argparse.Namespace) -> int:
    """Prints the predictions, and published figures and records beside theirs."""
    if options.count:
        path = output_folder("data") / "counts_random_cpu.csv"
        with written_whole(path) as part:
            count().assign(**machine_facts() | {"model": "random"}).to_csv(part, index=False)
        print(f"Written to {path.name}.")
        return 0
    context = 2 * options.chunk_size if options.context_window is None else options.context_window
    setting = Setting(options.chunk_size, context, options.tokens, options.dtype)
    print(
        "Predictions, none of them measured:", table(options.card, options.way, setting).round(3).to_string(), sep="\n"
    )
    for name, place, compared in (
        ("Published figures", ["source", "document", "machine"], against_published()),
        ("Records", ["file", "machine"], against_records()),
    ):
        shown = compared[[*place, "label", "measure", "measured", "upper", "low", "high", "verdict"]].round(3)
        print(f"\n{name} beside their predictions: {inside(compared)}", shown.to_string(index=False), sep="\n")
    return 0
