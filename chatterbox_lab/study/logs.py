"""The warnings that transformers logs: caught with the layer and the call that raised them, or kept quiet.

This and `fallback` also run under other releases of transformers, so they import neither chatterbox nor pandas.
"""

from __future__ import annotations

import logging
import os
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class CaughtWarning:
    """One warning of transformers, as often as it is raised.

    Args:
        message: its text.
        raised_in: the line that raised it, as ``file:line function``.
        layer: the number of the layer that was running, if one was.
        called_from: the lines of chatterbox above it, the innermost first.
    """

    message: str
    raised_in: str
    layer: int | None
    called_from: str


@contextmanager
def catch_warnings() -> Iterator[list[CaughtWarning]]:
    """Catches every warning that transformers logs, each time it is raised, and prints none.

    Outside this context transformers raises most warnings once a process: ``warning_once`` remembers them.
    """
    caught: list[CaughtWarning] = []
    logger = logging.getLogger("transformers")
    import_module("transformers.utils.logging")  # gives Logger its warning_once
    once, handlers, level = logging.Logger.warning_once, logger.handlers[:], logger.level
    logging.Logger.warning_once = logging.Logger.warning
    logger.handlers = [_Catcher(caught)]
    logger.setLevel(logging.WARNING)
    try:
        yield caught
    finally:
        logging.Logger.warning_once = once
        logger.handlers = handlers
        logger.setLevel(level)


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps transformers' warnings off the screen. It costs no time, so use it around what is timed."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def warning_table(caught: Sequence[CaughtWarning]) -> pd.DataFrame:
    """The caught warnings, by text and place: ``warning``, ``raised in``, ``called from``, ``layers``, ``times``."""
    import pandas as pd

    groups: dict[tuple[str, str, str], list[CaughtWarning]] = {}
    for warning in caught:
        groups.setdefault((warning.message, warning.raised_in, warning.called_from), []).append(warning)
    columns = ["warning", "raised in", "called from", "layers", "times"]
    rows = [(*site, _ranges({w.layer for w in group} - {None}), len(group)) for site, group in groups.items()]
    return pd.DataFrame(rows, columns=columns)


def _ranges(numbers: set[int]) -> str:
    """Sorted numbers with runs joined: {0, 1, 2, 5} is ``0-2, 5``."""
    text: list[str] = []
    for number in sorted(numbers):
        if number - 1 in numbers:
            text[-1] = f"{text[-1].split('-')[0]}-{number}"
        else:
            text.append(str(number))
    return ", ".join(text)


class _Catcher(logging.Handler):
    def __init__(self, caught: list[CaughtWarning]) -> None:
        super().__init__()
        self.caught = caught

    def emit(self, record: logging.LogRecord) -> None:
        frames = [frame for frame, _ in traceback.walk_stack(None)]
        layers = [getattr(frame.f_locals.get("self"), "layer_idx", None) for frame in frames]
        callers = [_site(frame) for frame in frames if frame.f_globals["__name__"].startswith("chatterbox.")]
        self.caught.append(
            CaughtWarning(
                message=record.getMessage(),
                raised_in=f"{record.filename}:{record.lineno} {record.funcName}",
                layer=next((layer for layer in layers if layer is not None), None),
                called_from=" < ".join(callers),
            )
        )


def _site(frame: Any) -> str:
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} {frame.f_code.co_name}"


@contextmanager
def quiet_profiler() -> Iterator[None]:
    """Keeps PyTorch's profiler from reporting a missing GPU as an error; it reads this variable at its first use."""
    before = os.environ.get("KINETO_LOG_LEVEL")
    os.environ["KINETO_LOG_LEVEL"] = before or "99"
    try:
        yield
    finally:
        if before is None:
            del os.environ["KINETO_LOG_LEVEL"]
