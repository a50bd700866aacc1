"""Fills the tables of README.md from the recorded measurements: ``make readme``."""

from __future__ import annotations

import re
import sys

import pandas as pd

from chatterbox_lab.bench import summary
from chatterbox_lab.records import REPOSITORY, load_results, written_whole

README = REPOSITORY / "README.md"


def streams_table(name: str = "01_streams_tiny_cpu") -> str:
    """Stock and patched side by side, in Markdown, with what it was measured on."""
    runs = load_results(name)
    table = summary(runs, against="upstream").rename_axis("stream").round(2)
    first, warm = runs.iloc[0], runs[runs["warm"]]
    return (
        f"{table.to_markdown()}\n\n"
        f"Medians of {warm['round'].nunique()} interleaved rounds, {first.tokens} speech tokens each "
        f"({first.total_audio_duration:.0f} s of audio), model `{first.model}`, chunk {first.chunk_size}, context "
        f"{first.context_window}, on {first.machine} with {first.cores} cores (torch {first.torch}, commit "
        f"{first.commit}, {first.date})."
    )


def filled(text: str) -> str:
    """The README's text with what stands between its table markers made anew."""
    pattern = re.compile(r"(<!-- streams -->\n).*?(<!-- end -->)", re.DOTALL)
    if not pattern.search(text):
        raise ValueError("README.md: the markers <!-- streams --> and <!-- end --> are gone")
    table = streams_table()
    return pattern.sub(lambda match: f"{match[1]}{table}\n{match[2]}", text)


def main() -> None:
    """Writes README.md if a table has changed."""
    pd.set_option("display.precision", 2)
    before = README.read_text()
    after = filled(before)
    if after == before:
        sys.exit("README.md: nothing to change")
    with written_whole(README) as part:
        part.write_text(after)


if __name__ == "__main__":
    main()
