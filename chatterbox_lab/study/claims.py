"""Every number and claim of the report that started this, in ``data/report.csv``, beside what a diagnosis found."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import pandas as pd

from .diagnosed import NAMES, Numbers, before_after, chunk_sizes, medians, told
from .findings import NOT_MEASURED, findings
from .records import load_results
from .subject import EXACT, SHAPE, UPSTREAM

NO_MEASUREMENT = "a setting or a line of code"
_STREAMS = {"upstream": UPSTREAM, "ours, off": EXACT}  # as data/report.csv calls them
_GIGABYTE = 1e9
_SETTINGS = ("line", "files", "temperature", "cfg_weight", "context window", "factor, context window")


def reported(n: Numbers) -> pd.DataFrame:
    """One row a claim, all texts: ``heading`` in the report, ``measure``, ``reported`` there, and ``here``.

    Empty where the repository's records are not there, as with an installed package.
    """
    try:
        claims = load_results("report")
    except FileNotFoundError:
        return pd.DataFrame(columns=["heading", "measure", "reported", "here"])
    rows = [
        {"heading": claim["heading"], "measure": claim["measure"], "reported": _said(claim), "here": here(n, claim)}
        for claim in claims.to_dict("records")
    ]
    return pd.DataFrame(rows)


def _said(claim: Mapping[str, Any]) -> str:
    ends = [f"{claim[name]:g}" for name in ("reported", "upper") if claim[name] == claim[name]]
    unit = claim["unit"] if isinstance(claim["unit"], str) else ""
    return f"{' to '.join(ends)}{unit if unit == 'x' else f' {unit}'}".strip() if ends else "in words"


def here(n: Numbers, claim: Mapping[str, Any]) -> str:
    """What this machine has in place of a claim, or that there is nothing to measure or nothing measured."""
    measure = claim["measure"]
    if measure in _ANSWERS:
        return (_ANSWERS[measure](n) or [NOT_MEASURED])[0]
    if measure.startswith(_SETTINGS):
        return NO_MEASUREMENT
    value = _number(n, claim.get("column"), _STREAMS.get(claim.get("variant")), claim.get("chunk_size"))
    unit = claim["unit"] if isinstance(claim["unit"], str) else ""
    value *= 2**30 / _GIGABYTE if unit == "GB" else 1
    return NOT_MEASURED if math.isnan(value) else f"{value:.2f} {unit}".strip()


def _number(n: Numbers, column: Any, stream: str | None, size: Any) -> float:
    """One number of this machine; a chunk size of 0 is all of the speech as one piece."""
    if stream is None or ("memory" in str(column) and n.device != "cuda"):
        return math.nan  # a process is not a GPU
    whole = pd.concat([n.rows(part, "stream", variant=stream, chunk_size=0) for part in ("streams", "sizes")])
    if size == 0 and len(whole):
        return medians(whole)[column]
    board = chunk_sizes(n)
    if column not in board or stream not in board.index.unique("stream"):
        return math.nan
    mine = board.xs(stream, level="stream")
    mine = mine[mine["chunks"] == 1].tail(1) if size == 0 else mine[mine.index == size]
    return float(mine[column].iloc[0]) if len(mine) else math.nan


_FIXED = 100
"""Tokens a chunk of the report's "after"."""


def _rtf(n: Numbers, stream: str, size: int = SHAPE["chunk_size"]) -> float:
    return _number(n, "RTF", stream, size)


def _best(n: Numbers) -> list[str]:
    board = before_after(n)["RTF"].dropna()
    return told("{rtf:.2f}, {name}", rtf=board.min(), name=NAMES[board.idxmin()]) if len(board) else []


def _layers(n: Numbers) -> list[str]:
    rows = n.rows("attention", "layer", variant=UPSTREAM)
    return [f"{int((rows['manual'] > 0).sum())} of {len(rows)} layers"] if len(rows) else []


def _asked(n: Numbers) -> list[str]:
    asked = n.words("attention", "asked", variant=UPSTREAM)
    return [f"asked by {asked[0]}"] if asked else []


def _over(n: Numbers, before: float) -> list[str]:
    """So many times as long as ours, exact, in chunks of the size that the report's fix has."""
    return told("{ratio:.2f}x", ratio=before / _rtf(n, EXACT, _FIXED))


def _lowest(n: Numbers) -> list[str]:
    board = chunk_sizes(n)
    if EXACT not in board.index.unique("stream"):
        return []
    rtf = board.xs(EXACT, level="stream")["RTF"]
    return [f"{rtf.idxmin()} tokens, of {', '.join(map(str, rtf.index))}"]


def _recommended(n: Numbers) -> list[str]:
    call = n.words("advice", "call")
    size = re.search(r"chunk_size=(\d+)", call[0]) if call else None
    return [f"{size[1]} tokens, recommended"] if size else []


def _flags(n: Numbers) -> list[str]:
    (one,) = (one for one in findings(n) if "flags" in one.cause)
    return [one.verdict]


def _cache(n: Numbers) -> list[str]:
    copy, step = n("step", "cache_copy", "seconds"), n("step", "step", "seconds", variant="released")
    return told("{factor:.2f}x, without the copy", factor=step / (step - copy))


def _compiled(n: Numbers) -> list[str]:
    backend, ratio = n.words("t3", "backend"), n.ratio("t3", "token", (UPSTREAM, EXACT))
    return told("{ratio}, backend {name!r}", ratio=ratio, name=backend[0] if backend else None)


_ANSWERS: dict[str, Callable[[Numbers], list[str]]] = {
    "RTF, as first noticed": lambda n: told("{rtf:.2f}", rtf=_rtf(n, UPSTREAM)),
    "RTF, expected": _best,
    "RTF, target": _best,
    "factor, attention maps on over off": lambda n: told("{ratio}", ratio=n.ratio("step", "step", ("stock", "off"))),
    "line of alignment_stream_analyzer.py that forces the maps": _asked,
    "manual attention in place of SDPA": _layers,
    "chunk size, before": lambda n: told("RTF {rtf:.2f}, upstream", rtf=_rtf(n, UPSTREAM)),
    "chunk size, after": lambda n: told("RTF {a:.2f} to {b:.2f}, ours", a=_rtf(n, EXACT, 50), b=_rtf(n, EXACT, 100)),
    "factor, not streaming before over streaming after": lambda n: _over(n, _rtf(n, UPSTREAM, 0)),
    "chunk size, best RTF": _lowest,
    "chunk size, best balance": _recommended,
    "TF32 and cuDNN's benchmark mode help": _flags,
    "factor, KV cache before over after": _cache,
    "factor, before over after compilation": _compiled,
    "factor, RTF before over after": lambda n: _over(n, _rtf(n, UPSTREAM)),
}
"""What answers a claim that is no number of one stream."""
