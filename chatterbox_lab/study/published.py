"""What others measured of Chatterbox (``data/published.csv``), and the report's claims judged by it and by our records.

None of these figures was measured here. They stay apart: no record has their columns, and nothing that reads records
reads them.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from .records import load_results

TEXTS = ("source", "document", "commit", "date", "machine", "software", "model", "setting", "measure", "unit")
COLUMNS = (*TEXTS[:9], "value", "upper", "unit", "claim", "looked_up", "how")
MODELS = ("fork", "english", "multilingual", "turbo", "nano", "unknown")
UNITS = {
    "RTF": ("s/s",),
    "first chunk": ("s",),
    "seconds": ("s",),
    "ms a token": ("ms",),
    "ms a chunk": ("ms",),
    "tokens a second": ("1/s",),
    "peak memory": ("MB", "GB"),
    "extra memory": ("MB",),
    "factor": ("x",),
    "share of requests": ("%",),
    "positions": ("tokens",),
}
"""What can be measured, and in which units."""
UNKNOWN = "unknown"
HEADINGS = (
    "Issue Summary",
    "Alignment Stream Analyzer Bottleneck (Major)",
    "Manual Attention Fallback",
    "Small Chunk Sizes",
    "Disabled Alignment Stream Analyzer",
    "Force Disable output_attentions",
    "Optimized Chunk Configuration",
    "Before Optimization",
    "After Optimization",
    "For Best RTF Performance",
    "For Best Balance (Recommended)",
    "PyTorch Optimizations Applied",
    "Memory Usage",
    "Remaining Performance Gap",
    "Model Loading Warning",
    "KV Cache Format",
    "Additional Model Compilation",
    "Files Modified",
    "Conclusion",
)
"""The report's headings that have text, in its order."""
AUTHOR = "rossturner/chatterbox"
"""Where the report stands, and what its author published before and after it."""
REPORT = "PERFORMANCE_ANALYSIS.md"
KINDS = {
    "as released": ("chatterbox-tts", "chatterbox-streaming", "chatterbox-turbo-stream", "rsxdalv's fork", "that fork"),
    "attention maps off": ("chatterbox-streaming, ",),
    "T3 compiled or in CUDA graphs": ("T3 ",),
    "another engine": ("chatterbox.cpp", "chatterbox-vllm", "audio.cpp", "ONNX Runtime"),
    "another engine, many texts at once": ("chatterbox-vllm, batches",),
}
"""Kinds of software, by how their names begin; the longest beginning counts."""
OURS = {
    "upstream": "as released",
    "ours, off": "attention maps off",
    "ours, off, graph": "T3 compiled or in CUDA graphs",
}
"""The variants of our records that are of these kinds."""
_NEAR, _SHARE, _MATTERS = 0.25, 0.8, 1.05
"""How near a time must be to a claimed one; the share of a claimed factor that will do; the least factor that is one
where the claim names none."""


def load() -> pd.DataFrame:
    """All published figures, a row each, as they stand in ``data/published.csv``.

    Returns:
        Texts, but for ``value`` and ``upper`` (the end of a range, else nan), which are floats in ``unit``: ``source``
        (owner/repository), ``document`` (a path there, an issue or a pull request), ``commit`` (empty for threads),
        ``date`` (of the document, or ``unknown``), ``machine``, ``software``, ``model`` (of `MODELS`), ``setting``,
        ``measure`` (of `UNITS`), ``claim`` (the row of ``data/report.csv`` that it bears on, or empty), ``looked_up``
        (the day on which somebody read it), ``how`` (the whole ``document``, an ``excerpt`` of it, or ``cited`` and
        why).

    Raises:
        ValueError: as `checked`.
    """
    return checked(load_results("published"), load_results("report")["measure"])


def checked(table: pd.DataFrame, claims: Sequence[str]) -> pd.DataFrame:
    """The table with texts as texts, if each row is complete. Raises ValueError that names row, column and value."""
    if list(table.columns) != list(COLUMNS):
        raise ValueError(f"columns {list(table.columns)}: must be {list(COLUMNS)}")
    table = table.astype({"value": float, "upper": float})
    words = table.columns.difference(["value", "upper"])
    table[words] = table[words].astype(object).fillna("").astype(str)
    for number, row in enumerate(table.to_dict("records"), 2):  # as an editor counts lines
        for column, allowed, fine in _rules(row, claims):
            if not fine:
                raise ValueError(f"line {number}: {column}={row[column]!r}: must be {allowed}")
    return table


def _rules(row: Mapping[str, Any], claims: Sequence[str]) -> list[tuple[str, str, bool]]:
    """Column, what is allowed in it, whether this row has that."""
    given = [(column, "given", bool(row[column])) for column in TEXTS if column != "commit"]
    cited = row["how"].startswith("cited: ")
    return [
        *given,
        ("source", "owner/repository", bool(re.fullmatch(r"[\w.-]+/[\w.-]+", row["source"]))),
        ("date", f"a day as 2025-08-06, or {UNKNOWN}", row["date"] == UNKNOWN or _day(row["date"])),
        ("model", f"one of {', '.join(MODELS)}", row["model"] in MODELS),
        ("measure", f"one of {', '.join(UNITS)}", row["measure"] in UNITS),
        ("unit", f"one of {UNITS.get(row['measure'])}", row["unit"] in UNITS.get(row["measure"], ())),
        ("value", "a positive number", 0 < row["value"] < float("inf")),
        ("upper", "empty or above value", not row["upper"] <= row["value"]),
        ("claim", "empty or a measure of report.csv", not row["claim"] or row["claim"] in set(claims)),
        ("how", "document, excerpt, or cited: and why", cited or row["how"] in ("document", "excerpt")),
        ("looked_up", "a day, and empty for what is cited", not row["looked_up"] if cited else _day(row["looked_up"])),
    ]


def _day(text: str) -> bool:
    try:
        return str(datetime.date.fromisoformat(text)) == text
    except ValueError:
        return False


def link(row: Mapping[str, Any]) -> str:
    """Where a row's document stands, as a link in Markdown; only its name where it is not known."""
    name = f"{row['source']}, {row['document'].rpartition('/')[2]}"
    what, _, number = row["document"].rpartition(" ")
    place = {"issue": f"issues/{number}", "pull request": f"pull/{number}"}.get(what)
    if place is None and row["commit"]:
        place = f"blob/{row['commit']}/{row['document'].split(' ')[0]}"
    return f"[{name}](https://github.com/{row['source']}/{place})" if place else name


def kind(software: str) -> str:
    """Which of `KINDS` a software is. Raises ValueError for one that is of none."""
    named = [(len(begin), name) for name, begins in KINDS.items() for begin in begins if software.startswith(begin)]
    if not named:
        raise ValueError(f"software={software!r}: begins like none of KINDS")
    return max(named)[1]


def who(row: Mapping[str, Any]) -> str:
    """Who published a row: the report, its author at another time, or others."""
    if row["source"] != AUTHOR:
        return "others"
    return "the report" if row["document"] == REPORT else "the report's author, elsewhere"


def rtfs(published: pd.DataFrame, machines: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Every RTF, published or recorded here, as points of one picture, with who measured it.

    Args:
        published: from `load`.
        machines: from `streams.by_shape`, without the context window; by record.

    Returns:
        ``who`` ("our record" or as `who`), ``machine`` (which says where nobody could read the document), ``model``,
        ``kind``, ``streaming``, ``RTF`` and ``upper``.
    """
    theirs = published[published["measure"] == "RTF"]
    points = [
        {
            "who": who(row),
            "machine": row["machine"] + ("" if row["looked_up"] else " (cited)"),
            "model": row["model"],
            "kind": kind(row["software"]),
            "streaming": row["setting"].startswith("streaming"),
            "RTF": row["value"],
            "upper": row["upper"],
        }
        for row in theirs.to_dict("records")
    ]
    for record, table in machines.items():
        for (size, variant), value in table["RTF"].items():
            if variant in OURS:
                shape = {"model": "fork", "kind": OURS[variant], "streaming": size > 0}
                points.append({"who": "our record", "machine": record, **shape, "RTF": value, "upper": float("nan")})
    return pd.DataFrame(points)


def beside(report: pd.DataFrame, machines: Mapping[str, pd.DataFrame], gpus: Sequence[str]) -> pd.DataFrame:
    """The report's numbers that a stream has, beside those of each record; nan where it did not measure one.

    Args:
        report: ``data/report.csv``.
        machines: as for `rtfs`.
        gpus: the records whose memory can be held against a GPU's.

    Returns:
        Indexed by the report's ``measure``, a column a record; memory in GB.
    """
    asked = report.dropna(subset="column")
    found = {}
    for name, table in machines.items():
        values = {}
        for row in asked.itertuples():
            shape = (int(row.chunk_size), row.variant)
            value = float(table.loc[shape, row.column]) if shape in table.index else float("nan")
            if row.unit == "GB":
                value = value * 2**30 / 1e9 if name in gpus else float("nan")
            values[row.measure] = value
        found[name] = values
    return pd.DataFrame(found, index=list(asked["measure"]))


def factors(
    machines: Mapping[str, pd.DataFrame], ladders: Mapping[str, pd.DataFrame], small: int = 25
) -> dict[str, dict[str, float]]:
    """The report's factors as our records have them, by its ``measure`` and by record.

    Args:
        machines: as for `rtfs`.
        ladders: from `t3_ladder.summary`, by record. Compiled for speed (``reduce-overhead``) PyTorch records CUDA
            graphs; so compilation is the rung of graphs in bfloat16, and plain compilation where that was not measured.
        small: the chunk size before.
    """
    found: dict[str, dict[str, float]] = {}
    for name, table in machines.items():
        rtf = table["RTF"]
        most = rtf.index.unique("chunk_size").max()
        same = "ours, stock" if "ours, stock" in rtf.index.unique("variant") else "upstream"  # but for the maps
        whole = rtf.get((0, "upstream"), float("nan"))
        _put(found, "factor, attention maps on over off", name, rtf[small, same] / rtf[small, "ours, off"])
        _put(found, "factor, RTF before over after", name, rtf[small, same] / rtf[most, "ours, off"])
        _put(found, "factor, not streaming before over streaming after", name, whole / rtf[most, "ours, off"])
    for name, board in ladders.items():
        times = board["ms/token"]
        rung = next(rung for rung in ("CUDA graph, bfloat16", "compiled") if rung in times)
        _put(found, "factor, KV cache before over after", name, board["to below"]["static KV cache"])
        _put(found, "factor, before over after compilation", name, times["stock"] / times[rung])
    return found


def _put(found: dict[str, dict[str, float]], measure: str, record: str, value: float) -> None:
    if value == value:
        found.setdefault(measure, {})[record] = float(value)


def judged(
    report: pd.DataFrame, published: pd.DataFrame, ours: Mapping[str, Mapping[str, float]], same: Sequence[str] = ()
) -> pd.DataFrame:
    """The report's claims beside our records, what its author published later, and what others did.

    A claimed factor is reproduced where at least 0.8 of it was measured, one without a number where it is 1.05; any
    other number where it is met within 25%, which only the same machine can do.

    Args:
        report: ``data/report.csv``.
        published: from `load`.
        ours: by the report's ``measure``, the value of each record (`factors`, rows of `beside`).
        same: the records of an RTX 4090, which is what the report was measured on.

    Returns:
        One row a claim that something bears on: ``claim``, ``heading`` (the report's), ``our records``, ``by ours``,
        ``its author``, ``by its author``, ``others``; ranges, and verdicts in words.
    """
    rows = []
    for claim in report.to_dict("records"):
        told = published[published["claim"] == claim["measure"]]
        author = told[told["source"] == AUTHOR]
        mine = ours.get(claim["measure"], {})
        if not mine and told.empty:
            continue
        fair = claim["unit"] == "x" or set(mine) <= set(same)
        others = told.drop(author.index)
        rows.append(
            {
                "claim": in_words(claim),
                "heading": claim["heading"],
                "our records": spread(list(mine.values()), claim["unit"]),
                "by ours": verdict(claim, list(mine.values())) if fair else "another machine",
                "its author": spread(_values(author, claim["unit"]), claim["unit"]),
                "by its author": _of_author(claim, author),
                "others": "; ".join(_named(others, claim["unit"])),
            }
        )
    return pd.DataFrame(rows)


def _of_author(claim: Mapping[str, Any], rows: pd.DataFrame) -> str:
    said = verdict(claim, _values(rows, claim["unit"]))
    narrow = claim["unit"] == "GB" and rows["setting"].str.contains("tensors alone").all()
    return "undecided: tensors alone are counted" if said == "not reproduced" and narrow else said


def in_words(claim: Mapping[str, Any]) -> str:
    """A row of ``data/report.csv`` as a claim."""
    name, number, unit = claim["measure"].removeprefix("factor, "), claim["reported"], claim["unit"]
    if number != number:
        return f"{name}: matters"
    return f"{name}: {number:g}" + ("x" if unit == "x" else f" {unit}" if isinstance(unit, str) else "")


def verdict(claim: Mapping[str, Any], values: Sequence[float]) -> str:
    """What these values say of a claim, in words; nothing where there are none."""
    if not values:
        return ""
    said = claim["reported"]
    if claim["unit"] == "x":
        least = _MATTERS if said != said else max(_MATTERS, _SHARE * said)
        fits = [value >= least for value in values]
    else:
        fits = [abs(value / said - 1) <= _NEAR for value in values]
    words = {True: "reproduced", False: "not reproduced"}
    return words[fits[0]] if len(set(fits)) == 1 else "in part"


def ends(row: Mapping[str, Any], unit: Any = "") -> list[float]:
    """A row's value, and the end of its range if it is one; in the unit of a claim, which may be GB."""
    scale = 1e-3 if (unit, row["unit"]) == ("GB", "MB") else 1.0
    return [scale * row[column] for column in ("value", "upper") if row[column] == row[column]]


def _values(rows: pd.DataFrame, unit: Any) -> list[float]:
    return [value for row in rows.to_dict("records") for value in ends(row, unit)]


def _named(rows: pd.DataFrame, unit: Any) -> list[str]:
    return [f"{machine}: {spread(_values(mine, unit), unit)}" for machine, mine in rows.groupby("machine", sort=False)]


def spread(values: Sequence[float], unit: Any = "") -> str:
    """The range of values in words; nothing where there are none."""
    if not len(values):
        return ""
    low, high = f"{min(values):.3g}", f"{max(values):.3g}"
    of = "x" if unit == "x" else f" {unit}" if isinstance(unit, str) and unit else ""
    return f"{low}{of}" if low == high else f"{low}{of} to {high}{of}"


ANSWERS = {
    "attention falls back from SDPA": "Manual Attention Fallback",
    "the analyzer forces that": "Alignment Stream Analyzer Bottleneck (Major)",
    "the warning appears at model load": "Model Loading Warning",
    "the KV cache format warns": "KV Cache Format",
    "output_attentions=False alone is a fix": "Force Disable output_attentions",
    "without maps the tokens stay the same": "Disabled Alignment Stream Analyzer",
    "maps make ": "Alignment Stream Analyzer Bottleneck (Major)",
    "chunk_size=25 has the worst RTF": "Small Chunk Sizes",
    "larger chunks make the first chunk later": "Optimized Chunk Configuration",
    "one must choose between first chunk and RTF": "Optimized Chunk Configuration",
    "a context of twice the chunk costs no more": "For Best Balance (Recommended)",
    "the warning that stays": "Model Loading Warning",
    "the tuple KV cache costs time": "KV Cache Format",
    "compilation would help": "Additional Model Compilation",
    "audio quality is maintained": "Conclusion",
    "streaming is slower than not streaming": "Before Optimization",
    "chunks of 25 are a cause": "Small Chunk Sizes",
    "the maps are a cause": "Alignment Stream Analyzer Bottleneck (Major)",
    "both together bring about 2x": "Conclusion",
    "the first chunk comes later for it": "After Optimization",
    "RTF 0.5 is reached": "Remaining Performance Gap",
    "RTF 1.7 before and 0.716 after": "Conclusion",
    "11 GB of GPU memory at peak": "Memory Usage",
    "TF32 and cuDNN flags help": "PyTorch Optimizations Applied",
}
"""How the claims of notebooks that answer the report begin, and the heading there under which it says so."""


def heading(claim: str, report: pd.DataFrame) -> str:
    """The report's heading that a verdict answers; empty for what this repository asked or set itself."""
    begins = {in_words(row): row["heading"] for row in report.to_dict("records")} | ANSWERS
    return next((found for begin, found in begins.items() if claim.startswith(begin)), "")
