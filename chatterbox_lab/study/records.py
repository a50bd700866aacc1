"""What was measured, and on what: the facts of the machine, results written whole, and what ``data/`` holds."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from ..files import REPOSITORY, written_whole
from .machine import CPU_KIND, in_words


def output_folder(kind: str) -> Path:
    """Where a run puts its ``figures`` or ``data``: in ``build/``, or under ``CHATTERBOX_LAB_OUTPUT`` if that is set.

    What the repository's own folders hold was recorded on purpose (``notebooks/run.py --in-place``), and a table of the
    README may be made from it.
    """
    folder = Path(os.environ.get("CHATTERBOX_LAB_OUTPUT", REPOSITORY / "build")) / kind
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def save_results(table: pd.DataFrame, name: str, facts: dict[str, Any]) -> Path:
    """Writes ``name.csv`` (see `output_folder`) whole or not at all: the table, with the machine's facts as columns."""
    path = output_folder("data") / f"{name}.csv"
    with written_whole(path) as part:
        table.assign(**facts).to_csv(part, index=False)
    return path


class Record:
    """Rows that are written to disk as they are made, so that you can stop a long measurement and resume it.

    They collect in ``NAME.unfinished.csv``, which is written whole after every addition; `finish` moves it to
    ``NAME.csv``, whose former content stays until then.

    Args:
        path: of the finished CSV.
        resume: starts from the unfinished rows, or from the finished ones if there are no unfinished ones.

    Raises:
        ValueError: there are unfinished rows and ``resume`` is False, or the file is not a CSV.
    """

    def __init__(self, path: Path, resume: bool = False) -> None:
        self.path, self.unfinished = path, path.with_suffix(".unfinished.csv")
        self.rows: list[dict[str, Any]] = []
        if self.unfinished.exists() and not resume:
            raise ValueError(f"{self.unfinished.name} holds an interrupted measurement: resume it, or delete the file")
        before = next((file for file in (self.unfinished, path) if resume and file.exists()), None)
        if before is not None:
            self.rows = _read(before).to_dict("records")
        path.parent.mkdir(parents=True, exist_ok=True)

    @classmethod
    def continued(cls, path: Path) -> Record:
        """Resumes what an interrupt left unfinished; starts anew if there is nothing."""
        return cls(path, resume=path.with_suffix(".unfinished.csv").exists())

    def check(self, facts: dict[str, Any]) -> None:
        """Raises ValueError if earlier rows of this device come from other versions, another machine or commit.

        What makes a CPU of the same name another kind (`CPU_KIND`) is compared where the rows know it.
        """
        for row in self.rows:
            for name in facts if row.get("device") == facts["device"] else ():
                unknown = name in CPU_KIND and _missing(row.get(name))
                if name != "date" and not unknown and _text(row.get(name)) != _text(facts[name]):
                    raise ValueError(
                        f"{self.path.name} was measured with {name} {row.get(name)}, here it is {facts[name]}"
                    )

    def add(self, rows: list[dict[str, Any]]) -> None:
        """Appends rows, and writes all."""
        self.rows += rows
        with written_whole(self.unfinished) as part:
            self.table().to_csv(part, index=False)

    def hint(self) -> str:
        """How to resume after an interrupt."""
        if not self.unfinished.exists():
            return "Nothing was measured yet."
        return f"{self.unfinished.name} has {len(self.rows)} rows; the same command with --resume goes on."

    def table(self) -> pd.DataFrame:
        """All rows so far."""
        return pd.DataFrame(self.rows)

    def finish(self) -> Path:
        """Replaces the last finished rows by these; returns their path."""
        if self.unfinished.exists():
            self.unfinished.replace(self.path)
        return self.path


def load_results(name: str) -> pd.DataFrame:
    """The recorded measurements ``data/name.csv`` of the repository. Raises FileNotFoundError naming what exists."""
    path = REPOSITORY / "data" / f"{name}.csv"
    if not path.exists():
        there = ", ".join(sorted(file.stem for file in path.parent.glob("*.csv"))) or "none"
        raise FileNotFoundError(f"no recorded measurement {name!r} in data/; there are: {there}")
    return _read(path)


def _read(path: Path) -> pd.DataFrame:
    # A commit may consist of digits; an empty field is the only missing value.
    return pd.read_csv(path, dtype={"commit": str}, keep_default_na=False, na_values=[""])


def _missing(value: Any) -> bool:
    return value is None or value == "" or value != value  # an empty field of a CSV is read as nan


def _text(value: Any) -> str:
    """A value as it is compared: whole numbers alike, also from a column that empty fields have made a float's."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def recorded(kind: str, leave_out: Sequence[str] = ()) -> pd.DataFrame:
    """All of the repository's ``data/KIND_*.csv`` in one table; ``record`` says in words what each was measured on.

    Facts to ``leave_out`` do not tell one record from another. Raises FileNotFoundError if there is no such file.
    """
    files = sorted((REPOSITORY / "data").glob(f"{kind}_*.csv"))
    names = [file.stem for file in files if not file.stem.endswith(".unfinished")]
    if not names:
        raise FileNotFoundError(f"no recorded measurement {kind}_*.csv in data/")
    table = pd.concat([load_results(name).assign(file=name) for name in names], ignore_index=True)
    facts = table.drop(columns=list(leave_out)).to_dict("records")
    table["record"] = [described(row) for row in facts]
    several = table.groupby("record")["file"].transform("nunique") > 1  # the same machine, measured twice
    table.loc[several, "record"] += " (" + table["file"] + ")"
    return table


def one_of_each_kind(machines: Mapping[str, pd.DataFrame]) -> dict[str, pd.DataFrame]:
    """The first record of each kind of device, for figures that have no room for more; ``machines`` are by name.

    CPUs of different names are different kinds: they multiply at very different speeds.
    """
    first = {}
    for name, table in machines.items():
        row = table.iloc[0]
        first.setdefault((row["device"], row["machine"] if row["device"] == "cpu" else ""), name)
    return {name: machines[name] for name in first.values()}


def described(facts: Mapping[str, Any]) -> str:
    """A machine and what ran on it in one line, from the columns that a record carries."""
    parts = [in_words(facts), *(facts[name] for name in ("model", "dtype") if name in facts)]
    if facts.get("watermark") is False:
        parts.append("no watermark")
    if facts.get("tuned") is True:
        parts.append("tuned")
    return ", ".join(parts)


Finding = tuple[str, bool | str, str] | tuple[str, bool | str, str, str]


def conclude(notebook: str, findings: Sequence[Finding], facts: dict[str, Any]) -> pd.DataFrame:
    """Prints a notebook's verdicts, and saves them as ``NN_verdicts.csv``, from which the scorecard is made.

    Args:
        notebook: its file's name without the ending.
        findings: claim, whether it holds (or in words why that is not known), the evidence, and on which machine if
            that is not the one at hand; computed, never typed.
        facts: of the machine.

    Returns:
        One row a claim: ``claim``, ``verdict``, ``evidence``, ``on``, ``notebook``.
    """
    words = {True: "reproduced", False: "not reproduced"}
    rows = [
        (claim, holds if isinstance(holds, str) else words[bool(holds)], evidence, *(where or [""]))
        for claim, holds, evidence, *where in findings
    ]
    table = pd.DataFrame(rows, columns=["claim", "verdict", "evidence", "on"]).assign(notebook=notebook)
    save_results(table, f"{notebook[:2]}_verdicts", facts)
    widths = table["claim"].str.len().max(), table["verdict"].str.len().max()
    for machine, group in table.groupby("on", sort=False):
        if table["on"].any():
            print(f"on {machine}:" if machine else "in general:")
        for row in group.itertuples():
            print(f"{row.claim:<{widths[0]}}  {row.verdict:<{widths[1]}}  {row.evidence}")
    return table
