"""Fills the tables of README.md from the recorded measurements: ``make readme``."""

from __future__ import annotations

import sys
from functools import partial

import pandas as pd

from chatterbox_lab.files import written_whole
from chatterbox_lab.study import layers as profiler
from chatterbox_lab.study import s3gen_ladder as prices
from chatterbox_lab.study import streams as bench
from chatterbox_lab.study import t3_ladder as ladder
from chatterbox_lab.study.records import REPOSITORY, load_results, recorded
from chatterbox_lab.training import evaluate

README = REPOSITORY / "README.md"


def streams_table(name: str = "01_streams_lab_cpu") -> str:
    """Stock and patched side by side, in Markdown, with what it was measured on."""
    runs = load_results(name)
    table = bench.summary(runs).drop(columns="peak memory (GiB)").rename_axis("stream").round(2)
    first, warm = runs.iloc[0], runs[runs["state"] == "warm"]
    return (
        f"{table.to_markdown()}\n\n"
        f"Medians of {warm['round'].nunique()} interleaved rounds, {first.tokens} speech tokens each "
        f"({first.total_audio_duration:.0f} s of audio), model `{first.model}`, chunk {first.chunk_size}, context "
        f"{first.context_window}, on {first.machine} with {first.cores} cores (torch {first.torch}, commit "
        f"{first.commit}, {first.date})."
    )


def full_size(kind: str) -> pd.DataFrame:
    """The records of Chatterbox's own sizes."""
    return recorded(kind).query("model not in ('tiny', 'lab')")


def sizes_table() -> str:
    """Every recorded machine of the benchmark, by chunk size."""
    tables = {name: bench.by_shape(runs) for name, runs in full_size("bench").groupby("record", sort=False)}
    table = pd.concat(tables, names=["machine"]).drop(columns=["peak memory (GiB)", "watermark (RTF)"]).round(2)
    table = table.reset_index().rename(columns={"chunk_size": "chunk", "context_window": "context"})
    table["chunk"] = table["chunk"].astype(str).replace("0", "whole")
    return table.to_markdown(index=False)


def price_table() -> str:
    """A step in every mode over one in ``off``, for every machine that the profiler was recorded on."""
    tables = {name: profiler.steps(costs) for name, costs in full_size("layers").groupby("record", sort=False)}
    table = pd.concat(tables, names=["machine"])[list(profiler.MODES)].reset_index()
    return table.round(2).to_markdown(index=False)


def ladder_table() -> str:
    """T3's decoding rung by rung, for every machine that the ladder was recorded on."""
    records = (
        recorded("ladder", leave_out=["dtype"]).query("model not in ('tiny', 'lab')").groupby("record", sort=False)
    )
    columns = ["ms/token", "to below", "to stock", "limit (ms)", "share of limit", "prefill (s)", "same tokens"]
    tables = {name: ladder.summary(rows)[columns].round(2) for name, rows in records}
    return pd.concat(tables, names=["machine"]).reset_index().to_markdown(index=False)


def prices_table() -> str:
    """S3Gen rung by rung at chunks of 50, for every machine that its prices were recorded on."""
    columns = ["s/chunk", "RTF", "to below", "to stock", "range", "mel (dB)", "sound"]
    records = full_size("prices").groupby("record", sort=False)
    tables = {name: prices.summary(rows).loc[50, 100][columns] for name, rows in records}
    return pd.concat(tables, names=["machine"]).round(2).reset_index().to_markdown(index=False)


def closed_table() -> str:
    """Whole streams before and after, for every machine that they were recorded on."""
    columns = ["RTF", "first chunk (s)", "T3 (ms/token)", "S3Gen (s/chunk)", "RTF ratio"]
    tables = {name: bench.by_shape(runs)[columns] for name, runs in full_size("streams").groupby("record", sort=False)}
    table = pd.concat(tables, names=["machine"]).round(3).reset_index()
    return table.rename(columns={"chunk_size": "chunk", "context_window": "context"}).to_markdown(index=False)


def voice_table() -> str:
    """How well the lab voice speaks held-out sentences, stage by stage."""
    return evaluate.markdown(evaluate.read(REPOSITORY / "data" / "lab" / "quality.csv"))


END = "<!-- end -->"
TABLES = {"streams": streams_table, "ladder": ladder_table, "sizes": sizes_table, "price": price_table}
TABLES |= {"prices": prices_table, "closed": closed_table, "voice": voice_table}
TABLES |= {"lab": partial(streams_table, "bench_lab_cpu")}


def filled(text: str) -> str:
    """The README's text with what stands between its table markers made anew."""
    for name, made in TABLES.items():
        marker = f"<!-- {name} -->\n"
        if marker not in text:
            raise ValueError(f"README.md: the marker {marker.strip()} is gone")
        before, after = text.split(marker, 1)
        text = f"{before}{marker}{made()}\n{after[after.index(END) :]}"
    return text


def main() -> None:
    """Writes README.md if a table has changed."""
    before = README.read_text()
    after = filled(before)
    if after == before:
        sys.exit("README.md: nothing to change")
    with written_whole(README) as part:
        part.write_text(after)


if __name__ == "__main__":
    main()
