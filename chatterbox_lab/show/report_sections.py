"""What stands in a diagnosis, section by section, as paragraphs, tables and figures; every number from its rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pandas as pd

from ..study.claims import reported
from ..study.diagnosed import NAMES, Numbers, before_after, chunk_sizes, gap
from ..study.findings import Finding, clean, summary
from ..study.subject import CLEAR, EXACT, FASTEST, UPSTREAM


@dataclass(frozen=True)
class Picture:
    """A figure of the page: its file's name without the ending, and what it shows."""

    name: str
    shows: str


@dataclass(frozen=True)
class Table:
    """A table of texts; ``words``: no column of numbers but the first is meant."""

    rows: pd.DataFrame
    words: bool = False


@dataclass(frozen=True)
class Code:
    """What is to be pasted."""

    text: str


@dataclass(frozen=True)
class Judged:
    """The heading of a cause."""

    finding: Finding


class Players:
    """Where the recordings go."""


Block = str | list[str] | Picture | Table | Code | Judged | Players


def _number(value: float, digits: str = ".2f") -> str:
    return "not measured" if value != value else format(value, digits)


def _before_after(n: Numbers, short: bool) -> list[Block]:
    board = before_after(n)
    rows = []
    for name, text in NAMES.items():
        if name in board.index:
            mine = board.loc[name]
            spread = f"{mine['faster']:.2f}x ({mine['least']:.2f} to {mine['most']:.2f})"
            numbers = {key: _number(mine[key]) for key in ("RTF", "first chunk (s)")}
            more = {key: _number(mine[key], ".3g") for key in ("T3 (ms/token)", "S3Gen (s/chunk)", "watermark (RTF)")}
            rows.append({"stream": text} | numbers | {"faster": spread} | more)
    if not rows:
        return ["No stream was measured."]
    count = n.rows("streams", "stream", variant=UPSTREAM, chunk_size=25)
    told = (
        f"Medians of {len(count)} rounds in which all took turns, in chunks of 25 tokens with a context of 50; faster "
    )
    told += "is upstream's streaming RTF over this one within a round, with quartiles (the range of fewer than four)."
    shown: list[Block] = [Table(pd.DataFrame(rows)), told, *failures(n)]
    return shown if short else [*shown, Picture("streams", "Where the time of each stream goes"), Players()]


def failures(n: Numbers) -> list[str]:
    """What could not be measured, and why."""
    rows = n.table[n.table["error"].notna()]
    told = {f"{row['variant']} could not be measured: {row['error']}" for row in rows.to_dict("records")}
    return sorted(told)


def _causes(found: Sequence[Finding], short: bool) -> list[Block]:
    rows = [{"cause": one.cause, "verdict": one.verdict, "share of the time": one.told_share or "-"} for one in found]
    note = "Ratios are medians, with quartiles in parentheses, or the range of fewer than four rounds. Shares overlap."
    board: list[Block] = [Table(pd.DataFrame(rows), words=True), note]
    if short:
        return board
    each = ([Judged(one), list(one.evidence)] if one.evidence else [Judged(one)] for one in found)
    return [
        *board,
        Picture("layers", "Which attention each layer runs"),
        *(block for blocks in each for block in blocks),
    ]


def _sizes(n: Numbers) -> list[Block]:
    board = chunk_sizes(n)
    rows = [
        {
            "stream": NAMES[name], "chunk size": size, "RTF": _number(mine["RTF"]),
            "first chunk (s)": _number(mine["first chunk (s)"]), "chunks": f"{mine['chunks']:.0f}",
            "underruns": f"{mine['underruns']:.0f}", "silence (s)": _number(mine["silence (s)"]),
        }
        for (name, size), mine in board.iterrows()
    ]  # fmt: skip
    if not rows:
        return ["No chunk size was measured."]
    told = "An underrun is a chunk that comes too late for who listens from the first on; silence is what that adds."
    return [Table(pd.DataFrame(rows)), told, Picture("sizes", "RTF and first chunk by chunk size")]


def _memory(n: Numbers) -> list[Block]:
    peaks = {NAMES[name]: mine["peak memory (GiB)"] for name, mine in before_after(n).iterrows()}
    what = {"cuda": "the most that PyTorch's allocator held", "mps": "what the driver had allocated"}
    how = what.get(n.device, "the whole process, with what earlier streams have left in it")
    told = [f"{name}: {peak:.2f} GiB" for name, peak in peaks.items() if peak == peak]
    return [f"Peak memory, {how}:", told] if told else ["Memory was not measured."]


def _advice(n: Numbers) -> list[Block]:
    call, reason = n.words("advice", "call"), n.words("advice", "reason")
    if not call:
        return ["Not measured."]
    sound, board = [], before_after(n)
    if len(n.rows("advice", "call", variant=FASTEST)) and EXACT in board.index:
        pace = board.loc[EXACT, "RTF"]
        sound = [f"The exact stream has an RTF of {pace:.2f}; {CLEAR:g} is wanted, so this one has another sound."]
    names = [name for name in ("Costs", "StreamSettings") if name in call[0]]
    use_it = f"from chatterbox_lab import {', '.join(names)}, generate_stream\n\nsettings = {call[0]}\n"
    return [*sound, Code(f"{use_it}for audio, metrics in generate_stream(tts, text, settings):\n    ..."), *reason]


def _gap(n: Numbers) -> list[Block]:
    board = gap(n)
    rows = [
        {
            "stream": NAMES[stream], "part": part, "now (RTF)": _number(mine["now"], ".3f"),
            "the hardware allows (RTF)": "not known" if mine["limit"] != mine["limit"] else f"{mine['limit']:.3f}",
            "now / limit": "-" if mine["limit"] != mine["limit"] else f"{mine['now'] / mine['limit']:.1f}x",
            "set by": mine["by"],
        }
        for (stream, part), mine in board.iterrows()
    ]  # fmt: skip
    if not rows:
        return ["Not measured."]
    known = board[board["limit"].notna()]
    worst = (known["now"] / known["limit"]).idxmax() if len(known) else None
    ratio = f"{known.loc[worst, 'now'] / known.loc[worst, 'limit']:.1f}" if worst else ""
    said = [f"The furthest from its limit is {worst[1]} of {NAMES[worst[0]]}: {ratio}x."] if worst else []
    return [Table(pd.DataFrame(rows)), *said]


def _reported(n: Numbers) -> list[Block]:
    rows = reported(n)
    if rows.empty:
        return ["The report's numbers come with a checkout of the repository."]
    names = {"heading": "heading in the report", "measure": "claim"}
    said = "The report measured released weights on an RTX 4090; after is its fix, here our exact stream."
    return [said, Table(rows.rename(columns=names), words=True)]


def _machine(n: Numbers) -> list[Block]:
    first = n.table.iloc[0]
    known = (
        "machine",
        "device",
        "cpu",
        "cpu_capability",
        "bfloat16",
        "cores",
        "threads",
        "memory_gib",
        "system",
        "python",
    )
    known += ("cuda",) * (first["device"] == "cuda")  # else it is what PyTorch was built for, not what is there
    rows = [(name, first[name]) for name in (*known, "torch", "transformers", "diffusers") if name in first]
    found = n.table[n.table["part"].isin(["machine", "found"])]
    for row in found.to_dict("records"):
        value = row["text"] if isinstance(row.get("text"), str) else f"{row['value']:g}"
        where = f" {row['layer']:.0f}" if row.get("layer") == row.get("layer") and row.get("layer") is not None else ""
        rows.append((row["name"] + where, value))
    told = pd.DataFrame(dict(rows).items(), columns=["fact", "value"]).replace({"fact": {"_": " "}}, regex=True)
    return [Table(told, words=True)]


def sections(n: Numbers, found: Sequence[Finding]) -> Iterator[tuple[str, list[Block]]]:
    """Headings with what stands below them; short where there is nothing to complain about."""
    short = clean(found)
    yield "Summary", [summary(n, found)]
    yield "Before and after", _before_after(n, short)
    yield "Root causes", _causes(found, short)
    if not short:
        yield "Chunk sizes", _sizes(n)
        yield "Memory", _memory(n)
    yield "Recommended settings", _advice(n)
    if not short:
        yield "The gap that remains", _gap(n)
        yield "The report's numbers, and yours", _reported(n)
    yield "This machine", _machine(n)
