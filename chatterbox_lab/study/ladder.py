"""What the ladders of T3 and S3Gen share: the rungs, the turns that they take, the record, and the comparison.

The lowest rung is the released code. Each further rung changes something and is compared with the rung below it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import pandas as pd
import torch
from tqdm.auto import tqdm

from ..engine.clock import StageClock, memory_in_use
from ..engine.settings import StreamSettings
from . import command
from .logs import quiet
from .machine import machine_facts
from .records import Record
from .turns import to_and_fro

STOCK = "stock"
"""The name of the lowest rung."""
Row = dict[str, Any]
Part = tuple[Row, Callable[[], Iterable[Row]]]
"""A part of a measurement: what only its rows say (such as ``run`` and ``round``), and what measures them."""


@dataclass(frozen=True)
class Rung:
    """One way to do the same work: its name in records, the rung below, and its changes of `StreamSettings`."""

    name: str
    below: str
    changes: dict[str, Any] = field(default_factory=dict)

    def settings(self, **others: Any) -> StreamSettings:
        """The settings that the rung asks for, with others that are the same on all rungs."""
        return StreamSettings(**others, **self.changes)


AnyRung = TypeVar("AnyRung", bound=Rung)
Given, Made = TypeVar("Given"), TypeVar("Made")


def chosen(rungs: Sequence[AnyRung], names: Sequence[str] | None, always: Sequence[str] = (STOCK,)) -> list[AnyRung]:
    """The rungs of these names and those that are ``always`` there, in the ladder's order; all if names is None.

    Raises:
        ValueError: a name that is no rung.
    """
    known = [rung.name for rung in rungs]
    for name in names or ():
        if name not in known:
            raise ValueError(f"rungs={name!r}: must be among {', '.join(known)}")
    return [rung for rung in rungs if not names or rung.name in {*names, *always}]


def side_by_side(
    makers: Mapping[str, Callable[[Given], Made]], given: Iterable[Given], device: str, title: str, first: int = 0
) -> Iterator[tuple[int, dict[str, tuple[Made, float]]]]:
    """Gives each maker the same pieces of work in turn.

    Args:
        makers: by the rung's name.
        given: the pieces of work.
        device: is waited for.
        title: of the progress bar.
        first: number of the first turn.

    Yields:
        A turn's number, and by name what was made and the seconds that it took.
    """
    clock = StageClock(device)
    for turn, piece in enumerate(tqdm(given, title, leave=False), first):
        made = {}
        for name in to_and_fro(makers, turn):
            start = clock.now()
            result = makers[name](piece)
            made[name] = result, clock.now() - start
        yield turn, made


def first_use(use: Callable[[], object], device: str) -> Row:
    """What only the first use of something costs: packing, compiling, capturing, reading the voice prompt.

    Returns:
        ``first_use_seconds``, by how much longer the first use takes than the second: beyond what uses of other things
        before it have made already; the very first has the process's own start in it. ``kept_bytes``, by how much
        more memory is held afterwards: by the allocator on a GPU, by the process elsewhere.
    """
    clock, before, took = StageClock(device), _held(device), []
    for _ in range(2):
        start = clock.now()
        use()
        took.append(clock.now() - start)
    return {"first_use_seconds": took[0] - took[1], "kept_bytes": _held(device) - before}


def _held(device: str) -> int:
    """Bytes that the process holds: on CUDA in the allocator once what is free is given back."""
    if torch.device(device).type != "cuda":
        return memory_in_use(device)
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved(device)


def due(parts: Iterable[Part], rows: Sequence[Mapping[str, Any]]) -> list[Part]:
    """The parts that have no row among these."""
    return [part for part in parts if not any(part[0].items() <= row.items() for row in rows)]


def measure(
    parts: Iterable[Part], record: Record | None = None, facts: Mapping[str, Any] | None = None
) -> pd.DataFrame:
    """Measures part by part, with transformers' warnings off the screen, and returns all rows.

    Each part's rows go to the record, if there is one, as soon as they are there. They carry the machine's facts.
    """
    rows: list[Row] = [] if record is None else record.rows
    keep = rows.extend if record is None else record.add
    with quiet():
        for what, rows_of in tqdm(parts, "parts", leave=False):
            keep([dict(facts or {}) | row | what | row for row in rows_of()])
    return pd.DataFrame(rows)


def compared(times: pd.DataFrame, below: Mapping[str, str], spread: tuple[float, float]) -> pd.DataFrame:
    """How many times as fast each rung is as others, by ratios within a turn: above 1 is faster.

    Args:
        times: seconds, a column a rung and a row a turn; the released code is among the columns.
        below: by rung, the one below.
        spread: quantiles.

    Returns:
        Indexed by rung: ``to below`` and ``to stock`` (medians), ``range`` (of the latter, between the quantiles).
    """
    to_below = {name: times[below[name]] / times[name] for name in times if below.get(name) in times}
    to_stock = times.rdiv(times[STOCK], axis=0)
    low, high = (to_stock.quantile(share) for share in spread)
    return pd.DataFrame(
        {
            "to below": pd.Series({name: ratio.median() for name, ratio in to_below.items()}).reindex(times.columns),
            "to stock": to_stock.median(),
            "range": [f"{low[name]:.2f} to {high[name]:.2f}" for name in times],
        }
    )


def apart(board: pd.DataFrame, other: pd.DataFrame) -> float:
    """By what share the gains over the released code differ at most, rung by rung, between two machines' ladders."""
    return float((other["to stock"] / board["to stock"] - 1).abs().max())


def late_over_early(times: pd.DataFrame, early: int, late: int, around: int) -> pd.Series:
    """Does what comes later cost more? The medians of each column near the index ``late`` over those near ``early``.

    ``times`` is indexed by the number of the token or chunk, from 0; near is at most ``around`` away.
    """
    index = times.index.to_series()
    near = [times[(index - place).abs() <= around].median() for place in (late, early)]
    return near[0] / near[1]


def add_options(parser: argparse.ArgumentParser, record: str, piece: str) -> None:
    """Adds the options that both ladders have; ``record`` is the CSV's name, ``piece`` is token or chunk."""
    command.add_model(parser)
    command.add_device(parser)
    add = parser.add_argument
    add("--rungs", metavar="X", nargs="+", help="only these, and the released code (default: all that are shown)")
    add("--rounds", metavar="X", type=int, default=3, help="measured rounds, after one to warm up (default: 3)")
    add("--long", metavar="X", type=int, default=0, help=f"{piece}s of a long speech besides (default: none)")
    command.add_record(parser, record)


def begin(options: argparse.Namespace, kind: str, device: str, **more: Any) -> tuple[Record, Row]:
    """The record that the options ask for, and the facts that go with its rows. Raises ValueError (see `Record`)."""
    name = command.model_name(options)
    record = command.open_record(options, f"{kind}_{name}_{torch.device(device).type}.csv")
    facts = machine_facts(device) | {"model": name} | more
    record.check(facts)
    return record, facts
