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
from .costs import Recommendation, recommend
from .diagnosed import Numbers, chunk_sizes
from .subject import CLEAR, EXACT, FASTEST, FULL, SHAPE, Row, Subject, fastest

_NEAR = 0.3
"""By what share fitted costs may differ from what was measured."""


def advice(subject: Subject) -> Iterator[Row]:
    """The settings for this machine: exact where that keeps up, else the fastest.

    Costs that contradict the streams that were measured are measured again, for longer; where they still do, the
    measured chunk size with the lowest RTF is the advice.
    """
    ran = (row for row in subject.rows if row["part"] == "streams" and row["variant"] == EXACT)
    paces = [row["rtf"] for row in ran if row.get("rtf") is not None and row["rtf"] == row["rtf"]]
    pace = median(paces) if paces else math.inf
    chosen = EXACT if pace < CLEAR else FASTEST
    quick, measured = subject.plan is not FULL, chunk_sizes(Numbers(subject.rows))["RTF"]
    lengths = [(75, 1.0), (150, 10.0)] if quick else [(150, 4.0), (150, 10.0)]
    settings, backends = BASELINE, None
    if chosen == FASTEST:
        settings = fastest(subject.tts.device)
        backends = [backend_of(settings, subject.tts.t3)]
    for tokens, seconds in lengths:
        how = {"settings": settings, "backends": backends, "tokens": tokens, "seconds": seconds}
        found = recommend(subject.tts, "balanced", **how)
        if bears(found.costs, found.context, measured.get((chosen, SHAPE["chunk_size"]), math.nan)):
            break
    else:
        yield from _lowest(settings.replace(backend=found.backend), chosen, measured)
        return
    short = {name: float(f"{value:.3g}") for name, value in asdict(found.costs).items() if isinstance(value, float)}
    found = found.replace(costs=replace(found.costs, **short))  # it is pasted
    yield {"name": "call", "variant": chosen, "text": found.call}
    yield {"name": "reason", "variant": chosen, "text": found.reason}


def bears(costs: Costs, context: int, measured: float) -> bool:
    """Whether fitted costs agree with the RTF that was ``measured`` in chunks of the report's size; nan agrees."""
    expected = costs.rtf(SHAPE["chunk_size"], context, 4 * SHAPE["chunk_size"])
    near = not abs(expected / measured - 1) > _NEAR
    return costs.window_token >= 0 and costs.error <= _NEAR and near


def _lowest(settings: StreamSettings, chosen: str, measured: pd.Series) -> Iterator[Row]:
    """The measured chunk size with the lowest RTF as the advice."""
    rtf = measured.xs(chosen, level="stream")
    best = int(rtf.idxmin())
    values = {field.name: getattr(settings, field.name) for field in fields(StreamSettings)}
    values |= {"schedule": "fixed", "chunk_size": best, "context_window": 2 * best}
    reason = (
        f"Of the measured chunk sizes ({', '.join(map(str, rtf.index))}), {best} has the lowest RTF, {rtf.min():.2f}"
    )
    text = "what single chunks cost varied too much here for more"
    yield {"name": "call", "variant": chosen, "text": Recommendation(**values).call}
    yield {"name": "reason", "variant": chosen, "text": f"{reason}; {text}."}
