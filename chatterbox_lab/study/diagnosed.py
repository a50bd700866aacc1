"""The rows of a diagnosis, asked by name, and the tables that are made of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from ..engine.clock import NUMBERS
from ..engine.schedule import TOKEN_SECONDS
from .subject import EXACT, FASTEST, SHAPE, UPSTREAM

WHOLE = "upstream, whole"
NAMES = {
    WHOLE: "upstream, not streaming",
    UPSTREAM: "upstream, streaming",
    EXACT: "ours, exact",
    FASTEST: "ours, fastest",
}
"""The streams in words, in the order in which they are shown."""


_COLUMNS = ("part", "name", "variant", "round", "value", "text", "seconds", "layer", "at", "chunk_size", "error")
_COLUMNS += ("prompt_tokens", "context_tokens", "manual", "sdpa", "underruns", "silence_seconds")
_COLUMNS += NUMBERS


class Numbers:
    """The rows of one diagnosis, asked by name; what is not there is nan."""

    def __init__(self, rows: Sequence[Mapping[str, Any]]) -> None:
        table = pd.DataFrame(rows)
        self.table = table.reindex(columns=list(dict.fromkeys([*table.columns, *_COLUMNS])))  # of parts not measured

    def rows(self, part: str, name: str, **where: Any) -> pd.DataFrame:
        """The rows of this name that have these values."""
        table = self.table[(self.table["part"] == part) & (self.table["name"] == name)]
        for column, value in where.items():
            table = table[table[column] == value]
        return table

    def __call__(self, part: str, name: str, column: str = "value", **where: Any) -> float:
        """The median of a column."""
        return float(self.rows(part, name, **where)[column].astype(float).median())

    def words(self, part: str, name: str, **where: Any) -> list[str]:
        """The texts of these rows."""
        return list(self.rows(part, name, **where)["text"].dropna())

    def ratio(self, part: str, name: str, variants: tuple[str, str], column: str = "seconds") -> Spread:
        """One variant over another within the same round."""
        one, other = (self.rows(part, name, variant=variant).set_index("round") for variant in variants)
        return Spread.of((one[column] / other[column]).astype(float).dropna())

    def share(self, stage: str) -> float:
        """The share of a stage in upstream's stream."""
        rows = self.rows("streams", "stream", variant=UPSTREAM, chunk_size=SHAPE["chunk_size"])
        return float((rows[stage] / rows["total_generation_time"]).astype(float).median())

    @property
    def device(self) -> str:
        """cpu, cuda or mps."""
        return str(self.table["device"].iloc[0])


@dataclass(frozen=True)
class Spread:
    """A median with its quartiles, or its range where there are fewer than four values."""

    median: float = math.nan
    low: float = math.nan
    high: float = math.nan

    @classmethod
    def of(cls, values: pd.Series) -> Spread:
        """That of these values; nan without any."""
        ends = (0.25, 0.75) if len(values) >= 4 else (0.0, 1.0)
        return cls(float(values.median()), *(float(values.quantile(end)) for end in ends)) if len(values) else cls()

    def __str__(self) -> str:
        return f"{self.median:.2f}x ({self.low:.2f}x to {self.high:.2f}x)"

    @property
    def saved(self) -> float:
        """The share of the time that goes away where this is with something over without it."""
        return 1 - 1 / self.median


def told(text: str, **numbers: Any) -> list[str]:
    """A sentence with its numbers, or none where one of them is missing."""
    values = [value.median if isinstance(value, Spread) else value for value in numbers.values()]
    missing = any(value is None or (isinstance(value, float) and math.isnan(value)) for value in values)
    return [] if missing else [text.format(**numbers)]


def percent(share: float) -> str | None:
    """A share in words, with a decimal where it is small; None for nan."""
    if math.isnan(share):
        return None
    return f"{share:.0%}" if share == 0 or share >= 0.1 else f"{share:.1%}"


def duration(seconds: float) -> str | None:
    """Seconds, or milliseconds or microseconds where they are few; None for nan."""
    if math.isnan(seconds):
        return None
    for unit, factor in (("s", 1.0), ("ms", 1e3)):
        if seconds * factor >= 0.9995:
            return f"{seconds * factor:.3g} {unit}"
    return f"{1e6 * seconds:.3g} \N{MICRO SIGN}s"


def medians(rows: pd.DataFrame) -> dict[str, float]:
    """A stream's numbers over its rounds, by the names that data/report.csv uses."""
    pieces = {
        "T3 (ms/token)": 1e3 * rows["t3_seconds"] / rows["tokens"],
        "S3Gen (s/chunk)": rows["s3gen_seconds"] / rows["chunk_count"],
        "watermark (RTF)": rows["watermark_seconds"] / rows["total_audio_duration"],
        "peak memory (GiB)": rows["peak_memory_bytes"] / 2**30,
    }
    told = {"RTF": rows["rtf"], "first chunk (s)": rows["latency_to_first_chunk"]} | pieces
    return {name: float(values.median()) for name, values in told.items()}


def before_after(n: Numbers) -> pd.DataFrame:
    """The streams side by side, indexed as `NAMES`.

    ``faster`` is upstream's RTF over this one within rounds, from ``least`` to ``most`` (see `Spread`); else as
    `medians`.
    """
    rows = n.rows("streams", "stream")
    rows = rows[rows["rtf"].notna()]
    rows = rows.assign(variant=rows["variant"].mask(rows["chunk_size"] == 0, WHOLE)).set_index("round")
    stock, found = rows[rows["variant"] == UPSTREAM]["rtf"], {}
    for name in NAMES:
        mine = rows[rows["variant"] == name]
        if len(mine):
            faster = Spread.of((stock / mine["rtf"]).dropna())
            spread = {"faster": faster.median, "least": faster.low, "most": faster.high}
            found[name] = medians(mine) | spread
    return pd.DataFrame(list(found.values()), index=list(found), columns=None if found else ["RTF"])


def chunk_sizes(n: Numbers) -> pd.DataFrame:
    """Medians by stream and chunk size: as `medians`, ``chunks``, ``underruns`` and ``silence (s)``."""
    table = pd.concat([n.rows("sizes", "stream"), n.rows("streams", "stream")])
    index = ["stream", "chunk size"]
    table = table[table["rtf"].notna() & (table["chunk_size"] > 0)]
    if table.empty:
        return pd.DataFrame(columns=["RTF"], index=pd.MultiIndex.from_arrays([[], []], names=index))
    found = {}
    asked = [(name, size) for name in NAMES for size in sorted(set(table["chunk_size"]))]
    for name, size in asked:
        rows = table[(table["variant"] == name) & (table["chunk_size"] == size)]
        if rows.empty:
            continue
        rows = rows[rows["part"] == rows["part"].iloc[0]]  # those that took turns with the other sizes
        more = {"chunks": "chunk_count", "underruns": "underruns", "silence (s)": "silence_seconds"}
        found[name, int(size)] = medians(rows) | {key: float(rows[column].median()) for key, column in more.items()}
    return pd.DataFrame(found.values(), pd.MultiIndex.from_tuples(found, names=index))


def gap(n: Numbers) -> pd.DataFrame:
    """What is left by part, for the exact and the fastest stream, in seconds of computing for a second of speech.

    Returns:
        Indexed by stream and part: ``now``, ``limit`` (nan where none is known) and ``by`` (what sets it).
    """
    board, found = before_after(n), {}
    weights = {EXACT: "loaded", FASTEST: "int8" if n.device == "cpu" else "loaded"}
    for name in (EXACT, FASTEST):
        if name not in board.index:
            continue
        rows = n.rows("streams", "stream", variant=name)
        stages = {stage: float((rows[stage] / rows["total_audio_duration"]).median()) for stage in _STAGES}
        reading = n("step", "limit", "seconds", variant=weights[name]) / TOKEN_SECONDS
        found[name, "T3"] = (stages["t3_seconds"], reading, "reading the weights once a token")
        window = n("s3gen", "limit", "seconds") / (SHAPE["chunk_size"] * TOKEN_SECONDS) if name == EXACT else math.nan
        by = "its arithmetic at the speed of plain products" if name == EXACT else "not counted"
        found[name, "S3Gen"] = (stages["s3gen_seconds"], window, by)
        found[name, "watermark"] = (stages["watermark_seconds"], math.nan, "not counted")
    table = pd.DataFrame.from_dict(found, orient="index", columns=["now", "limit", "by"])
    table.index = pd.MultiIndex.from_tuples(found, names=["stream", "part"]) if found else table.index
    return table


_STAGES = ("t3_seconds", "s3gen_seconds", "watermark_seconds")
