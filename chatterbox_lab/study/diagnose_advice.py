"""The settings that a diagnosis recommends, held against what it has measured."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, fields, replace
from statistics import median

import pandas as pd

from ..engine.schedule import Costs
from ..engine.settings import BASELINE, StreamSettings
from ..engine.t3.backends import backend_of
from .costs import HEADROOM, Recommendation, recommend
from .diagnosed import Numbers, chunk_sizes
from .subject import CLEAR, EXACT, FASTEST, FULL, SHAPE, Row, Subject, fastest

_NEAR = 0.3
"""By what share fitted costs may differ from what was measured."""


def advice(subject: Subject) -> Iterator[Row]:
    """The settings for this machine: exact where that keeps up, else the fastest.

    Costs that contradict the streams that were measured are measured again, for longer; where they still do, the
    measured chunk sizes are.
    """
    ran = (row for row in subject.rows if row["part"] == "streams" and row["variant"] == EXACT)
    paces = [row["rtf"] for row in ran if row.get("rtf") is not None and row["rtf"] == row["rtf"]]
    pace = median(paces) if paces else math.inf
    chosen = EXACT if pace < CLEAR else FASTEST
    quick, board = subject.plan is not FULL, chunk_sizes(Numbers(subject.rows))
    measured = board["RTF"].get((chosen, SHAPE["chunk_size"]), math.nan)
    lengths = [(75, 1.0), (150, 10.0)] if quick else [(150, 4.0), (150, 10.0)]
    settings, backends = BASELINE, None
    if chosen == FASTEST:
        settings = fastest(subject.tts.device)
        backends = [backend_of(settings, subject.tts.t3)]
    for tokens, seconds in lengths:
        how = {"settings": settings, "backends": backends, "tokens": tokens, "seconds": seconds}
        found = recommend(subject.tts, "balanced", **how)
        if bears(found.costs, found.context, measured):
            break
    else:
        yield from of_the_measured(settings.replace(backend=found.backend), chosen, board)
        return
    short = {name: float(f"{value:.3g}") for name, value in asdict(found.costs).items() if isinstance(value, float)}
    found = found.replace(costs=replace(found.costs, **short))  # it is pasted
    yield {"name": "call", "variant": chosen, "text": found.call}
    yield {"name": "reason", "variant": chosen, "text": found.reason}


def bears(costs: Costs, context: int, measured: float) -> bool:
    """Whether fitted costs agree with the RTF that was ``measured`` in chunks of the report's size; nan agrees."""
    expected = costs.rtf(SHAPE["chunk_size"], context, 4 * SHAPE["chunk_size"])
    near = not abs(expected / measured - 1) > _NEAR
    return costs.error <= _NEAR and near


def of_the_measured(settings: StreamSettings, chosen: str, board: pd.DataFrame) -> Iterator[Row]:
    """The rows of the advice from the measured chunk sizes: the smallest that keeps up with time to spare, else the
    one with the lowest RTF.

    Args:
        settings: what is kept.
        chosen: which stream's sizes count.
        board: from `diagnosed.chunk_sizes`.
    """
    mine = board.xs(chosen, level="stream").sort_index()
    ahead = mine[(mine["RTF"] * HEADROOM < 1) & ~(mine["underruns"] > 0)]
    best = int(ahead.index[0] if len(ahead) else mine["RTF"].idxmin())
    why = f"is the smallest that keeps up also when everything takes {HEADROOM:g} times as long"
    why = why if len(ahead) else "has the lowest RTF"
    values = {field.name: getattr(settings, field.name) for field in fields(StreamSettings)}
    values |= {"schedule": "fixed", "chunk_size": best, "context_window": 2 * best}
    numbers = f"RTF {mine['RTF'][best]:.2f}, first chunk after {mine['first chunk (s)'][best]:.2g} s"
    reason = f"Of the measured chunk sizes ({', '.join(map(str, mine.index))}), {best} {why}: {numbers}."
    varied = "What single chunks cost varied too much for a schedule that grows."
    yield {"name": "call", "variant": chosen, "text": Recommendation(**values).call}
    yield {"name": "reason", "variant": chosen, "text": f"{reason} {varied}"}
