"""Streams measured side by side: interleaved rounds, one row a run, ratios with their spread.

``python -m chatterbox_lab.bench --help`` is the command line.
"""

from __future__ import annotations

import argparse
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import pandas as pd
from chatterbox.tts import ChatterboxTTS
from tqdm.auto import tqdm

from .measure import Measured, machine_facts, written_whole
from .models import load
from .settings import ANALYZERS, StreamSettings, whole_number
from .stream import generate_stream
from .upstream import upstream_stream

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

    Raises:
        ValueError: a variant whose stream yields nothing.
    """
    rounds, warm_up = whole_number("rounds", rounds, 1), whole_number("warm_up", warm_up, 0)
    rows = []
    runs = [(turn, name) for turn in range(-warm_up, rounds) for name in variants]
    for turn, name in tqdm(runs, desc="streams", leave=False):
        last = deque(variants[name](), maxlen=1)
        if not last:
            raise ValueError(f"variant {name!r}: its stream yielded nothing, so there is nothing to measure")
        rows.append({"variant": name, "round": turn, "warm": turn >= 0} | asdict(last[0][1]))
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


def streams(
    tts: ChatterboxTTS, text: str, settings: StreamSettings, tokens: int, analyzers: Sequence[str], seed: int = 0
) -> dict[str, Callable[[], Measured]]:
    """Variants for `interleaved`: upstream's own stream and ours in the given analyzer modes, all of one length."""
    fixed = {"seed": seed, "max_new_tokens": tokens, "ignore_eos": True}
    variants = {"upstream": partial(upstream_stream, tts, text, settings, **fixed)}
    for analyzer in analyzers:
        variants[f"ours, {analyzer}"] = partial(generate_stream, tts, text, settings, analyzer=analyzer, **fixed)
    return variants


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m chatterbox_lab.bench", description="Measure upstream's stream and ours side by side."
    )
    add = partial(parser.add_argument, metavar="X")
    add("--model", default="tiny", help="tiny, random, pretrained or a voice folder (default: %(default)s)")
    add("--device", default="auto", help="auto, cuda, mps or cpu (default: %(default)s)")
    add("--dtype", default="float32", help="of T3: float32, bfloat16 or float16 (default: %(default)s)")
    add("--chunk-size", type=int, default=25, help="new speech tokens per chunk (default: %(default)s)")
    add("--context-window", type=int, default=50, help="tokens synthesised again (default: %(default)s)")
    add("--analyzers", nargs="+", default=["off", "probe"], choices=ANALYZERS, help="modes of ours: %(choices)s")
    add("--chunks", type=int, default=4, help="length of the speech in chunks (default: %(default)s)")
    add("--rounds", type=int, default=5, help="measured rounds, after one to warm up (default: %(default)s)")
    add("--text", default="The quick brown fox reads a long sentence to the lazy dog.", help="what is said")
    add("--output", type=Path, help="CSV to write, one row a run (default: only the table)")
    chosen = parser.parse_args(arguments)
    try:
        settings = StreamSettings(chunk_size=chosen.chunk_size, context_window=chosen.context_window)
        tokens = chosen.chunk_size * whole_number("chunks", chosen.chunks, 1)
        rounds = whole_number("rounds", chosen.rounds, 1)
        tts = load(chosen.model, device=chosen.device, dtype=chosen.dtype)
        runs = interleaved(streams(tts, chosen.text, settings, tokens, chosen.analyzers), rounds)
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))
    print(summary(runs, against="upstream").to_markdown(floatfmt=".3f"))
    if chosen.output:
        facts = {"model": Path(chosen.model).name, "dtype": chosen.dtype} | asdict(settings)
        with written_whole(chosen.output) as part:
            runs.assign(**facts, **machine_facts(tts.device)).to_csv(part, index=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
