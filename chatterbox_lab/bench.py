"""Streams measured side by side: interleaved rounds, one row a run, ratios with their spread."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import asdict

import pandas as pd
from tqdm.auto import tqdm

from .measure import Measured
from .settings import whole_number

COLUMNS = {
    "rtf": "RTF",
    "latency_to_first_chunk": "first chunk (s)",
    "t3_seconds": "T3 (s)",
    "s3gen_seconds": "S3Gen (s)",
    "watermark_seconds": "watermark (s)",
}


def interleaved(variants: Mapping[str, Callable[[], Measured]], rounds: int, warm_up: int = 1) -> pd.DataFrame:
    """Runs every variant once a round, in turn, so that a slow spell of the machine falls on all of them.

    Args:
        variants: names and what starts their stream, each with the same text, seed and length.
        rounds: measured rounds, at least 1.
        warm_up: rounds before them whose rows say ``warm=False``; the first pays for imports, caches and autotuning.

    Returns:
        One row a run: ``variant``, ``round``, ``warm``, and the fields of the final `StreamMetrics`.
    """
    rounds, warm_up = whole_number("rounds", rounds, 1), whole_number("warm_up", warm_up, 0)
    rows = []
    runs = [(turn, name) for turn in range(-warm_up, rounds) for name in variants]
    for turn, name in tqdm(runs, desc="streams", leave=False):
        last = deque(variants[name](), maxlen=1)
        rows += [{"variant": name, "round": turn, "warm": turn >= 0} | asdict(metrics) for _, metrics in last]
    return pd.DataFrame(rows)


def summary(runs: pd.DataFrame, against: str) -> pd.DataFrame:
    """Medians of the warm runs by variant, and RTF as a ratio to ``against`` within each round: median and range.

    Raises:
        ValueError: no warm run of the variant ``against``.
    """
    warm = runs[runs["warm"]]
    if against not in set(warm["variant"]):
        raise ValueError(f"against={against!r}: must be one of {', '.join(sorted(set(warm['variant'])))}")
    table = warm.groupby("variant", sort=False)[list(COLUMNS)].median().rename(columns=COLUMNS)
    rtf = warm.pivot_table(index="round", columns="variant", values="rtf")
    ratios = rtf.div(rtf[against], axis=0)[list(table.index)]
    table["RTF ratio"] = ratios.median()
    table["ratio range"] = [f"{ratios[name].min():.2f} to {ratios[name].max():.2f}" for name in table.index]
    return table
