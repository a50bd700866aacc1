"""Fills the tables of the READMEs from the recorded measurements, and draws the title figure: ``make readme``."""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from chatterbox_lab.files import REPOSITORY, written_whole
from chatterbox_lab.show import figures
from chatterbox_lab.study import ladder, living_streams, s3gen_ladder, streams, t3_ladder
from chatterbox_lab.study.machine import in_words
from chatterbox_lab.study.records import load_results, one_of_each_kind, recorded

README = REPOSITORY / "README.md"
ENGINE = REPOSITORY / "chatterbox_lab" / "engine" / "README.md"
FIGURE = "00_result"

RESULTS = {
    "The lab voice": ("bench_lab_cpu", (25, 50)),
    "Chatterbox's size, CPU": ("streams_random_cpu", (50, 100)),
    "Chatterbox's size, GPU": ("bench_random_h100", (25, 50)),
}
"""Title of each part of the result: the record in ``data/``, its chunk size and context window."""
LIVING, LIVING_CHUNK = {"Nano's size, CPU": "nano"}, 50
"""The same for models of today's releases, which do not stream: their own call beside ours at its fastest."""
LIVING_RECORD = "living_random_cpu"
STREAMS = {
    "upstream": ("upstream", "released"),
    "ours, off, static": ("ours, exact", "same"),
    "ours, off, static, fast": ("ours, fast", "other"),
    "ours, off, static-int8, fast": ("ours, fast, int8", "other"),
    "ours, off, graph": ("ours, exact, graph", "same"),
}
"""The variants that the result shows where a record has them: what it calls them, and how they sound."""
OLDER = {"cpu_capability": "AVX512", "bfloat16": True}
"""The kind of CPU of the records that are older than its columns: one machine's, see data/README.md."""


def boards() -> dict[str, pd.DataFrame]:
    """RTF, first chunk, gain and sound of the streams in ``STREAMS``, for each part of the result."""
    tables = {}
    for title, (name, shape) in RESULTS.items():
        board = streams.by_shape(load_results(name)).loc[shape]
        shown = board.loc[[variant for variant in STREAMS if variant in board.index]]
        shown = shown.assign(
            faster=(1 / shown["RTF ratio"]).map("{:.1f}x".format), sound=[STREAMS[name][1] for name in shown.index]
        )
        shown.index = [STREAMS[name][0] for name in shown.index]
        tables[f"{title}, chunk {shape[0]}"] = shown[["RTF", "first chunk (s)", "faster", "sound"]]
    return tables | living_boards()


def living_boards() -> dict[str, pd.DataFrame]:
    """As `boards`, of `LIVING`."""
    ways = {(living_streams.STOCK, 0): "its own call", (living_streams.FASTEST, LIVING_CHUNK): "ours, fast, int8"}
    whole, tables = living_streams.board(load_results(LIVING_RECORD)), {}
    for title, variant in LIVING.items():
        shown = whole.loc[variant].loc[list(ways)].rename(columns={"first sound": "first chunk (s)"})
        shown = shown.assign(faster=shown["faster"].map("{:.1f}x".format), sound=["released", "other"])
        shown.index = list(ways.values())
        tables[f"{title}, chunk {LIVING_CHUNK}"] = shown[["RTF", "first chunk (s)", "faster", "sound"]]
    return tables


def result_table() -> str:
    """Upstream's stream and ours, in Markdown, with what they were measured on."""
    table = pd.concat(boards(), names=["model", "stream"]).drop(columns="sound").reset_index()
    table["model"] = table["model"].mask(table["model"].duplicated(), "")
    return f"{_markdown(table)}\n\n{_measured_on()}"


def with_kind(facts: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
    """A record's row with its kind of CPU, also where it is older than the columns for it."""
    return dict(facts) | (OLDER if pd.isna(facts.get("cpu_capability")) else {})


def _measured_on() -> str:
    runs = [load_results(name) for name, _ in RESULTS.values()]
    living = load_results(LIVING_RECORD).query("part == 'streams'")
    counts = [table[table["state"] == "warm"]["round"].nunique() for table in runs] + [living["round"].nunique()]
    rounds, first = "/".join(map(str, counts)), [with_kind(table.iloc[0]) for table in runs]
    seconds = "/".join(dict.fromkeys(f"{row['total_audio_duration']:.0f}" for row in first))
    first.append(living.iloc[0].to_dict())
    machines = dict.fromkeys(f"{in_words(row)}, torch {row['torch']}" for row in first)
    return f"{seconds} s of speech a stream; medians of {rounds} rounds, streams in turn; {' / '.join(machines)}."


def _markdown(table: pd.DataFrame) -> str:
    return table.to_markdown(index=False, floatfmt=".2f")


def full_size(kind: str, leave_out: tuple[str, ...] = ()) -> pd.DataFrame:
    """The records of Chatterbox's own sizes; each names its kind of CPU."""
    rows = recorded(kind, leave_out=leave_out).query("model not in ('tiny', 'lab')")
    each = rows.to_dict("records")
    return rows.assign(record=[row["record"].replace(in_words(row), in_words(with_kind(row))) for row in each])


def t3_table() -> str:
    """T3's decoding rung by rung, for one machine of each kind; how far the others' gains are from it, in words."""
    columns = ["ms/token", "to stock", "limit (ms)", "prefill (s)", "same tokens"]
    records = dict(list(full_size("ladder", leave_out=("dtype",)).groupby("record", sort=False)))
    return _by_machine(records, {name: t3_ladder.summary(rows)[columns] for name, rows in records.items()})


def s3gen_table() -> str:
    """S3Gen rung by rung at chunks of 50, as `t3_table`."""
    columns = ["s/chunk", "RTF", "to stock", "mel (dB)", "sound"]
    records = dict(list(full_size("prices").groupby("record", sort=False)))
    return _by_machine(
        records, {name: s3gen_ladder.summary(rows).loc[50, 100][columns] for name, rows in records.items()}
    )


def _by_machine(records: dict[str, pd.DataFrame], tables: dict[str, pd.DataFrame]) -> str:
    kinds, shown, parts = (
        {name: rows["device"].iloc[0] for name, rows in records.items()},
        one_of_each_kind(records),
        [],
    )
    for name in shown:
        parts.append(f"{name}:\n\n{_markdown(tables[name].rename_axis('rung').reset_index())}")
        parts += [
            _beside(other, tables[other], tables[name])
            for other in records
            if kinds[other] == kinds[name] and other not in shown
        ]
    return "\n\n".join(parts)


def _beside(name: str, table: pd.DataFrame, shown: pd.DataFrame) -> str:
    """How far a ladder is from one that is shown, in words."""
    told = f"{name}: every `to stock` within {ladder.apart(shown, table):.0%} of these"
    if "same tokens" in table:
        other = table["same tokens"][table["same tokens"] != shown["same tokens"]]
        told += "".join(f"; {rung}: {same} tokens the same" for rung, same in other.items())
    return f"{told}."


END = "<!-- end -->"
TABLES: dict[Path, dict[str, Callable[[], str]]] = {
    README: {"result": result_table},
    ENGINE: {"t3": t3_table, "s3gen": s3gen_table},
}
"""Each README's tables by the name in their marker, ``<!-- name -->``."""


def filled(path: Path) -> str:
    """A README's text with what stands between its table markers made anew. Raises ValueError for a lost marker."""
    text = path.read_text()
    for name, made in TABLES[path].items():
        marker = f"<!-- {name} -->\n"
        if marker not in text:
            raise ValueError(f"{path.relative_to(REPOSITORY)}: the marker {marker.strip()} is gone")
        before, after = text.split(marker, 1)
        text = f"{before}{marker}{made()}\n{after[after.index(END) :]}"
    return text


def draw() -> Path:
    """Draws the title figure from the records, into the folder of figures; returns the path of the PNG."""
    figures.set_style()
    names = [*(name for name, _ in RESULTS.values()), LIVING_RECORD]
    origin = figures.origin(*(with_kind(load_results(name).iloc[0]) for name in names))
    return figures.save(figures.stream_bars(boards()), FIGURE, origin)


def main() -> None:
    """Writes the READMEs and the title figure in place."""
    os.environ["CHATTERBOX_LAB_OUTPUT"] = str(REPOSITORY)
    for path in TABLES:
        with written_whole(path) as part:
            part.write_text(filled(path))
    print(f"READMEs filled, {draw().relative_to(REPOSITORY)} drawn")


if __name__ == "__main__":
    main()
