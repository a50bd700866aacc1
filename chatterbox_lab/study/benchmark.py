"""The benchmark: upstream's generator and ours over devices, dtypes and shapes; every run is a row of a CSV."""

from __future__ import annotations

import argparse
from collections.abc import Collection, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from chatterbox.tts import ChatterboxTTS
from tqdm.auto import tqdm

from ..engine.request import encode_text
from ..engine.settings import StreamSettings, whole_number
from ..engine.t3.backends import ANALYZERS
from ..engine.warm import warm_up
from ..voices.load import DTYPES, load, pick_device
from . import command, streams
from .logs import quiet
from .machine import machine_facts, read_seconds, step_bytes, tune_torch
from .records import Record
from .s3gen_ladder import SOUNDS
from .streams import SHAPE, UPSTREAM, Variants

CONFIGURATION = ["device", "dtype", *SHAPE]
KEY = [*CONFIGURATION, "variant", "state", "round"]
"""What tells one row of the benchmark's CSV from another."""
_MOST_TOKENS = 1000  # what upstream generates at most


@dataclass(frozen=True)
class Grid:
    """What is to be measured: every device, dtype of T3 and shape of the stream."""

    model: str
    devices: tuple[str, ...]
    dtypes: tuple[str, ...]
    shapes: tuple[tuple[int, int], ...]
    """Chunk sizes with their context windows; a chunk size of 0 is the whole utterance at once."""
    analyzers: tuple[str, ...]
    backends: tuple[str, ...]
    sounds: tuple[str, ...]
    text: str
    tokens: int
    rounds: int
    seed: int
    watermark: bool
    tuned: bool

    def variants(self, tts: ChatterboxTTS, shape: tuple[int, int]) -> Variants:
        """The streams of one shape. Upstream loses what does not fill a chunk, so the length is made of whole ones."""
        chunk_size, context_window = shape
        tokens = -(-self.tokens // chunk_size) * chunk_size if chunk_size else self.tokens
        settings = StreamSettings(chunk_size=chunk_size or tokens, context_window=context_window)
        common = (tokens, self.analyzers, self.backends, self.seed)
        return streams.variants(tts, self.text, settings, *common, whole=not chunk_size, sounds=self.sounds)

    def load(self, device: str, dtype: str) -> ChatterboxTTS:
        """The model on one device in one dtype."""
        return load(self.model, device=device, dtype=dtype, watermark=self.watermark)

    def total(self) -> int:
        """Runs in all, warm-up included."""
        return len(self.devices) * len(self.dtypes) * len(self.shapes) * len(self.names()) * (self.rounds + 1)

    def names(self) -> list[str]:
        """The variants of a shape."""
        return [UPSTREAM, *(name for name, _ in streams.ours(self.analyzers, self.backends, self.sounds))]


def measure(grid: Grid, record: Record, *, check: bool = False, cold: bool = False) -> pd.DataFrame:
    """Measures a grid, and adds every row to the record as soon as it is there.

    What the record holds already is not run again, unless it failed or its round was not finished.

    Args:
        grid: what to measure.
        record: where the rows go; its file is finished at the end.
        check: also compares tokens (see `streams.token_check`).
        cold: also measures each variant's first call, at the first shape, in a process of its own.

    Returns:
        All rows of the record.
    """
    record.rows = [row for row in record.rows if not isinstance(row.get("error"), str)]
    with tqdm(total=grid.total(), desc="runs") as bar:
        for device, dtype in ((device, dtype) for device in grid.devices for dtype in grid.dtypes):
            facts = machine_facts(device) | {"model": Path(grid.model).name, "text": grid.text, "seed": grid.seed}
            facts |= {"asked_tokens": grid.tokens, "watermark": grid.watermark, "tuned": grid.tuned}
            record.check(facts)
            facts |= {"dtype": dtype}
            try:
                _measure_model(grid, device, facts, record, bar, check)
            except (RuntimeError, MemoryError) as error:  # the model itself: too large, or the device has failed
                shape = dict(zip(SHAPE, grid.shapes[0], strict=True))
                row = {"variant": "loading", "state": "warm-up", "round": -1} | streams.failure(error)
                record.add([row | facts | shape])
            streams.free_memory()  # room for the processes, and for the next model
            if cold:
                _first_calls(grid, device, facts, record)
    record.finish()
    return record.table()


def _measure_model(grid: Grid, device: str, facts: dict[str, Any], record: Record, bar: tqdm, check: bool) -> None:
    tts = grid.load(device, facts["dtype"])
    encode_text(tts, grid.text)  # says so now if the text does not fit
    size = step_bytes(tts.t3)
    facts = facts | {"step_bytes": size, "step_limit_seconds": read_seconds(size, device)}
    for shape in grid.shapes:
        bar.set_postfix_str(f"{device}, {facts['dtype']}, chunk {shape[0] or 'whole'}")
        here = facts | dict(zip(SHAPE, shape, strict=True))
        variants = grid.variants(tts, shape)
        _drop_broken_rounds(record, here, variants)
        start, due, done = bar.n, len(variants) * (grid.rounds + 1), _done(record, here)
        for row in streams.runs(variants, grid.rounds, done=done):
            if (row["variant"], row["state"], row["round"]) not in done:
                record.add([row | here])
            bar.update()
        bar.update(start + due - bar.n)  # what was done before, or has failed
    if check:
        here = facts | dict(zip(SHAPE, grid.shapes[0], strict=True))
        for row in streams.token_check(tts, grid.text, grid.tokens, grid.analyzers, grid.backends, _done(record, here)):
            record.add([row | here])


def _drop_broken_rounds(record: Record, facts: dict[str, Any], variants: Collection[str]) -> None:
    """Ratios are within rounds: one that lacks a variant is forgotten, and runs again as a whole."""
    done = _done(record, facts)
    rounds = {number for _, state, number in done if state == "warm"}
    broken = {number for number in rounds if any((name, "warm", number) not in done for name in variants)}
    record.rows = [
        row
        for row in record.rows
        if not (_belongs(row, facts) and row["state"] == "warm" and int(row["round"]) in broken)
    ]


def _done(record: Record, facts: dict[str, Any]) -> set[tuple[str, str, int]]:
    """(variant, state, round) of the rows of this configuration."""
    mine = (row for row in record.rows if _belongs(row, facts))
    return {(row["variant"], row["state"], int(row["round"])) for row in mine}


def _belongs(row: Mapping[str, Any], facts: Mapping[str, Any]) -> bool:
    return all(row.get(name) == facts[name] for name in CONFIGURATION)


def _first_calls(grid: Grid, device: str, facts: dict[str, Any], record: Record) -> None:
    facts = facts | dict(zip(SHAPE, grid.shapes[0], strict=True))
    done = _done(record, facts)
    calls = [
        (name, state) for name in grid.names() for state in ("cold", "warmed") if name != UPSTREAM or state == "cold"
    ]
    for name, state in tqdm([call for call in calls if (*call, 0) not in done], desc="first calls", leave=False):
        with ProcessPoolExecutor(1, get_context("spawn")) as process:
            try:
                row = process.submit(_first_call, grid, device, facts["dtype"], name, state == "warmed").result()
            except Exception as error:  # the process may have been killed
                row = streams.failure(error)
        record.add([{"variant": name, "state": state, "round": 0} | row | facts])


def _first_call(grid: Grid, device: str, dtype: str, variant: str, warmed: bool) -> dict[str, Any]:
    with quiet(), tune_torch() if grid.tuned else nullcontext():
        tts = grid.load(device, dtype)
        start = grid.variants(tts, grid.shapes[0])[variant]
        chosen = {name: value for name, value in start.keywords.items() if name not in ("seed", "max_new_tokens")}
        taken = warm_up(tts, start.args[2], **chosen) if warmed else None
        return streams.metrics_of(start) | {"warm_up_seconds": taken}


def report(table: pd.DataFrame) -> str:
    """What the benchmark found, for a terminal: a table a device, dtype and state, the limit, the check, the errors."""
    parts = []
    for (device, dtype), rows in table.groupby(["device", "dtype"], sort=False):
        parts.append(f"{rows['machine'].iloc[0]} ({device}), T3 in {dtype}")
        if rows.get("step_bytes", rows["rtf"]).notna().any():
            megabytes, milliseconds = rows["step_bytes"].max() / 1e6, 1e3 * rows["step_limit_seconds"].min()
            parts.append(f"reading T3's {megabytes:.0f} MB of weights once takes {milliseconds:.2f} ms")
        for state in ("warm", "cold", "warmed"):
            if len(shapes := streams.by_shape(rows, state).reset_index()):
                shapes["chunk_size"] = shapes["chunk_size"].replace(0, "whole")
                parts.append(f"\n{state}:\n{shapes.to_string(index=False, float_format='%.3f')}\n")
        checked = rows[(rows["state"] == "check") & rows["error"].isna()]
        for name, seeds in checked.groupby("variant", sort=False):
            same = (seeds["same_tokens"] == seeds["tokens"]).sum()
            least = int(seeds["same_tokens"].min())
            parts.append(f"same tokens as upstream, {name}: {same} of {len(seeds)} seeds (at least {least} tokens)")
    failed = table[table["error"].notna()]
    parts += [
        f"FAILED {row.device}, {row.dtype}, chunk {row.chunk_size}, {row.variant}: {row.error}"
        for row in failed.itertuples()
    ]
    return "\n".join(parts)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of ``chatterbox-lab streams``."""
    add, flag = partial(parser.add_argument, metavar="X"), partial(parser.add_argument, action="store_true")
    command.add_model(parser)
    command.add_device(
        parser, nargs="+", default=["auto"], help="auto, cuda, mps, cpu; several in turn (default: auto)"
    )
    add("--dtype", nargs="+", default=["float32"], choices=DTYPES, help="of T3: %(choices)s (default: float32)")
    add("--chunk-size", nargs="+", type=int, default=[25], help="new tokens a chunk, 0 is not streaming (default: 25)")
    add("--context-window", nargs="+", type=int, help="tokens rendered again (default: twice the chunk size)")
    add("--analyzers", nargs="+", default=["off", "probe"], choices=ANALYZERS, help="%(choices)s (default: off probe)")
    add("--backend", nargs="+", default=["hf"], choices=streams.CHOICES, help="%(choices)s (default: hf)")
    add("--sound", nargs="+", default=["exact"], choices=SOUNDS, help="S3Gen: %(choices)s (default: exact)")
    add("--tokens", type=int, default=100, help="length, rounded up to whole chunks; 25 are a second (default: 100)")
    add("--rounds", type=int, default=5, help="measured rounds, after one to warm up (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the sampling (default: %(default)s)")
    add("--text", default="The quick brown fox reads a long sentence to the lazy dog.", help="what is said")
    flag("--check", help="also verify that each variant says upstream's tokens for the same seed, on this device")
    flag("--cold", help="also measure every variant's first call in a process of its own, without and with a warm-up")
    flag("--no-watermark", help="leave the watermark out on both sides (perth need not be installed)")
    flag("--tune", help="set the report's PyTorch flags (TF32, cuDNN autotuning) for the whole run")
    flag("--quick", help="two short rounds: under a minute for tiny on 2 cores")
    command.add_record(parser, "bench_MODEL.csv")


def run(options: argparse.Namespace) -> int:
    """Measures what the options ask for; returns 1 where a variant failed, or said other tokens than upstream."""
    grid = grid_of(options)
    record = command.open_record(options, f"bench_{command.model_name(options)}.csv")
    with quiet(), tune_torch() if grid.tuned else nullcontext():
        table = measure(grid, record, check=options.check, cold=options.cold)
    print(report(table), f"\n{len(table)} rows are in {record.path.name}.")
    other = table["same_tokens"] < table["tokens"] if "same_tokens" in table else False
    return int((table["error"].notna() | other).any())


def grid_of(options: argparse.Namespace) -> Grid:
    """The grid that the command line asks for. Raises ValueError for a value that is not allowed."""
    if not options.text.strip():
        raise ValueError(f"text={options.text!r}: must have something to say")
    tokens = 25 if options.quick else whole_number("tokens", options.tokens, 1, _MOST_TOKENS)
    chunks = [whole_number("chunk-size", size, 0, _MOST_TOKENS) for size in options.chunk_size]
    windows = options.context_window and [whole_number("context-window", size, 0) for size in options.context_window]
    devices = tuple(dict.fromkeys(map(pick_device, options.device)))
    if len({torch.device(device).type for device in devices}) < len(devices):
        raise ValueError(f"device={' '.join(devices)}: one of each kind at a time")
    return Grid(
        model=options.model,
        devices=devices,
        dtypes=tuple(dict.fromkeys(options.dtype)),
        shapes=tuple(
            dict.fromkeys((size, window) for size in chunks for window in (windows or [2 * size] if size else [0]))
        ),
        analyzers=tuple(dict.fromkeys(options.analyzers)),
        backends=tuple(dict.fromkeys(options.backend)),
        sounds=tuple(dict.fromkeys(options.sound)),
        text=options.text,
        tokens=tokens,
        rounds=2 if options.quick else whole_number("rounds", options.rounds, 1),
        seed=whole_number("seed", options.seed, 0, 2**63 - 1),
        watermark=not options.no_watermark,
        tuned=options.tune,
    )
