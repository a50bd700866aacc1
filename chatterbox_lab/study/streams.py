"""Streams measured side by side: interleaved rounds, one row a run, ratios with their spread.

``python -m chatterbox_lab.study.streams --help`` is the command line; it needs no Jupyter.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, fields
from functools import partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from chatterbox.tts import ChatterboxTTS
from tqdm.auto import tqdm

from ..engine.clock import Measured, StreamMetrics
from ..engine.settings import ANALYZERS, BACKENDS, READ_BESIDE, StreamSettings, whole_number
from ..engine.stream import encode_text, generate_stream, speech_tokens, warm_up
from ..engine.t3.decode import step_bytes
from ..voices.load import DTYPES, MODELS, load, pick_device
from .logs import quiet
from .machine import machine_facts, read_seconds, tune_torch
from .records import Record, output_folder
from .s3gen_ladder import SOUNDS
from .upstream import upstream_stream, upstream_tokens, upstream_whole

UPSTREAM = "upstream"
KEY = ["device", "dtype", "chunk_size", "context_window", "variant", "state", "round"]
"""What tells one row of the benchmark's CSV from another."""
CONFIGURATION, SHAPE = KEY[:4], KEY[2:4]
CHECK_SEEDS = (0, 1, 2)
_BACKENDS = (*BACKENDS, "static-int8")
_MOST_TOKENS = 1000  # what upstream generates at most
Variants = Mapping[str, Callable[[], Measured]]


def streams(
    tts: ChatterboxTTS,
    text: str,
    settings: StreamSettings,
    tokens: int,
    analyzers: Sequence[str],
    backends: Sequence[str] = ("hf",),
    seed: int = 0,
    whole: bool = False,
    sounds: Sequence[str] = ("exact",),
) -> dict[str, Callable[[], Measured]]:
    """Variants for `interleaved`: upstream's own stream, and ours in each mode, backend and sound, all of one length.

    With ``whole`` upstream's ``generate`` takes the place of its stream; ours then wants one chunk of all tokens.
    """
    fixed = {"seed": seed, "max_new_tokens": tokens, "ignore_eos": True}
    released = upstream_whole if whole else upstream_stream
    variants = {UPSTREAM: partial(released, tts, text, settings, **fixed)}
    for name, chosen in _ours(analyzers, backends, sounds):
        variants[name] = partial(generate_stream, tts, text, settings, **chosen, **fixed)
    return variants


def _ours(
    analyzers: Sequence[str], backends: Sequence[str], sounds: Sequence[str] = ("exact",)
) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, sound in product(backends, sounds):
        backend, *weights = name.split("-")
        chosen = {"backend": backend} | ({"weights": weights[0]} if weights else {})
        for analyzer in analyzers:
            if backend == "hf" or analyzer in READ_BESIDE:
                names = [analyzer] + [name] * (name != "hf") + [sound] * (sound != "exact")
                yield f"ours, {', '.join(names)}", {"analyzer": analyzer} | chosen | SOUNDS[sound]


def runs(
    variants: Variants, rounds: int, warm_up: int = 1, done: Collection[tuple[str, str, int]] = ()
) -> Iterator[dict[str, Any]]:
    """Runs every variant once a round, in turn, so that a slow spell of the machine falls on all of them.

    Args:
        variants: names and what starts their stream, each with the same text, seed and length.
        rounds: measured rounds, at least 1; their rows have the ``state`` ``warm``.
        warm_up: rounds before them, ``state`` ``warm-up``: the first pays for imports, caches and autotuning.
        done: (variant, state, round) of what need not run; a variant is warmed up if any of its rounds is left.

    Yields:
        One row a run: ``variant``, ``state``, ``round``, ``error`` and the fields of the final `StreamMetrics`. A
        variant that fails gives a row with its error and no numbers, and does not run again.
    """
    failed: set[str] = set()
    for turn in range(-warm_up, rounds):
        state = "warm" if turn >= 0 else "warm-up"
        for name in list(variants)[:: -1 if turn > 0 and turn % 2 else 1]:  # to and fro
            left = any((name, "warm", number) not in done for number in range(max(turn, 0), rounds))
            if name in failed or not left or (turn >= 0 and (name, state, turn) in done):
                continue
            row = {"variant": name, "state": state, "round": turn} | metrics_of(variants[name])
            if row["error"]:
                failed.add(name)
            yield row


def metrics_of(start: Callable[[], Measured]) -> dict[str, Any]:
    """The final `StreamMetrics` of one stream, or empty fields and the error that ended it."""
    try:
        last = deque(start(), maxlen=1)
        if not last:
            raise ValueError("the stream yielded nothing, so there is nothing to measure")
        return {"error": None} | asdict(last[0][1])
    except Exception as error:  # whatever it is, the other variants are still worth measuring
        row = _failure(error)
    _free_memory()
    return row


def _failure(error: Exception) -> dict[str, Any]:
    empty = {field.name: None for field in fields(StreamMetrics)}
    return empty | {"error": f"{type(error).__name__}: {error}".splitlines()[0][:200]}


def _free_memory() -> None:
    gc.collect()
    with suppress(RuntimeError):  # a GPU that has failed an assertion answers nothing any more
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def interleaved(variants: Variants, rounds: int, warm_up: int = 1) -> pd.DataFrame:
    """All rows of `runs`, with a progress bar, for a notebook.

    Raises:
        ValueError: no rounds.
        RuntimeError: a variant that fails, by its name.
    """
    rounds, warm_up = whole_number("rounds", rounds, 1), whole_number("warm_up", warm_up, 0)
    rows = []
    for row in tqdm(runs(variants, rounds, warm_up), "streams", (warm_up + rounds) * len(variants), leave=False):
        if row["error"]:
            raise RuntimeError(f"variant {row['variant']!r}: {row['error']}")
        rows.append(row)
    return pd.DataFrame(rows).drop(columns="error")


def summary(table: pd.DataFrame, against: str = UPSTREAM, state: str = "warm") -> pd.DataFrame:
    """Medians by variant, and RTF as a ratio to ``against`` within each round: median and range.

    Raises:
        ValueError: no run of the variant ``against`` in this state.
    """
    chosen = table[(table["state"] == state) & table["rtf"].notna()]
    if against not in set(chosen["variant"]):
        raise ValueError(f"against={against!r}: must be one of {', '.join(sorted(set(chosen['variant'])))}")
    found = medians(chosen)
    rtf = chosen.pivot_table(index="round", columns="variant", values="rtf")
    ratios = rtf.div(rtf[against], axis=0)[list(found.index)]
    found["RTF ratio"] = ratios.median()
    found["ratio range"] = [f"{ratios[name].min():.2f} to {ratios[name].max():.2f}" for name in found.index]
    return found


def medians(table: pd.DataFrame) -> pd.DataFrame:
    """Medians by variant of what `runs` measured, in the units of its column names; ``x limit`` where that is known.

    The limit is the time to read T3's weights once (see `read_seconds`), the watermark's price a share of real time.
    """
    columns = {
        "RTF": table["rtf"],
        "first chunk (s)": table["latency_to_first_chunk"],
        "T3 (ms/token)": 1e3 * table["t3_seconds"] / table["tokens"],
        "S3Gen (s/chunk)": table["s3gen_seconds"] / table["chunk_count"],
        "watermark (RTF)": table["watermark_seconds"] / table["total_audio_duration"],
        "peak memory (GiB)": table["peak_memory_bytes"] / 2**30,
    }
    if "step_limit_seconds" in table:
        columns["T3 / limit"] = table["t3_seconds"] / table["tokens"] / table["step_limit_seconds"]
    return pd.DataFrame(columns).groupby(table["variant"], sort=False).median()


def token_check(
    tts: ChatterboxTTS,
    text: str,
    tokens: int,
    analyzers: Sequence[str],
    backends: Sequence[str] = ("hf",),
    done: Collection[tuple[str, str, int]] = (),
) -> Iterator[dict[str, Any]]:
    """Whether the same seed gives upstream's tokens on this device: a row a variant and seed that is not ``done``.

    ``tokens`` is how many ``T3.inference`` said (or ours, if more), ``same_tokens`` how many of ours are the same
    before the first that is not. Rounding differs between kernels, so in half precision a tie may fall the other way.
    """
    for seed in CHECK_SEEDS:
        fixed = {"seed": seed, "max_new_tokens": tokens, "ignore_eos": True}
        expected = None
        for name, chosen in _ours(analyzers, backends):
            if (name, "check", seed) in done:
                continue
            try:
                expected = upstream_tokens(tts, text, **fixed) if expected is None else expected
                said = speech_tokens(tts, text, **chosen, **fixed)
                common = min(len(said), len(expected))
                same = int((said[:common] == expected[:common]).int().cumprod(0).sum())
                found = {"tokens": max(len(said), len(expected)), "same_tokens": same, "error": None}
            except Exception as error:  # a row, as in `metrics_of`
                found = _failure(error)
            yield {"variant": name, "state": "check", "round": seed} | found


@dataclass(frozen=True)
class Plan:
    """What is to be measured: a grid over devices, dtypes of T3 and shapes of the stream."""

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
        return streams(tts, self.text, settings, *common, whole=not chunk_size, sounds=self.sounds)

    def load(self, device: str, dtype: str) -> ChatterboxTTS:
        """The model on one device in one dtype."""
        return load(self.model, device=device, dtype=dtype, watermark=self.watermark)

    def total(self) -> int:
        """Runs in all, warm-up included."""
        variants = 1 + len(list(_ours(self.analyzers, self.backends, self.sounds)))
        return len(self.devices) * len(self.dtypes) * len(self.shapes) * variants * (self.rounds + 1)


def run(plan: Plan, record: Record, *, check: bool = False, cold: bool = False) -> None:
    """Measures a plan, and adds every row to the record as soon as it is there.

    What the record holds already is not run again, unless it failed or its round was not finished.

    Args:
        plan: what to measure.
        record: where the rows go; its file is finished at the end.
        check: also compares tokens (see `token_check`).
        cold: also measures each variant's first call, at the first shape, in a process of its own.
    """
    record.rows = [row for row in record.rows if not isinstance(row.get("error"), str)]
    with tqdm(total=plan.total(), desc="runs") as bar:
        for device, dtype in ((device, dtype) for device in plan.devices for dtype in plan.dtypes):
            facts = machine_facts(device) | {"model": Path(plan.model).name, "text": plan.text, "seed": plan.seed}
            facts |= {"asked_tokens": plan.tokens, "watermark": plan.watermark, "tuned": plan.tuned}
            record.check(facts)
            facts |= {"dtype": dtype}
            try:
                _run_model(plan, device, facts, record, bar, check)
            except (RuntimeError, MemoryError) as error:  # the model itself: too large, or the device has failed
                shape = dict(zip(SHAPE, plan.shapes[0], strict=True))
                row = {"variant": "loading", "state": "warm-up", "round": -1} | _failure(error)
                record.add([row | facts | shape])
            _free_memory()  # room for the processes, and for the next model
            if cold:
                _first_calls(plan, device, facts, record)
    record.finish()


def _run_model(plan: Plan, device: str, facts: dict[str, Any], record: Record, bar: tqdm, check: bool) -> None:
    tts = plan.load(device, facts["dtype"])
    encode_text(tts, plan.text)  # says so now if the text does not fit
    size = step_bytes(tts.t3)
    facts = facts | {"step_bytes": size, "step_limit_seconds": read_seconds(size, device)}
    for shape in plan.shapes:
        bar.set_postfix_str(f"{device}, {facts['dtype']}, chunk {shape[0] or 'whole'}")
        here = facts | dict(zip(SHAPE, shape, strict=True))
        variants = plan.variants(tts, shape)
        _drop_broken_rounds(record, here, variants)
        start, due, done = bar.n, len(variants) * (plan.rounds + 1), _done(record, here)
        for row in runs(variants, plan.rounds, done=done):
            if (row["variant"], row["state"], row["round"]) not in done:
                record.add([row | here])
            bar.update()
        bar.update(start + due - bar.n)  # what was done before, or has failed
    if check:
        here = facts | dict(zip(SHAPE, plan.shapes[0], strict=True))
        for row in token_check(tts, plan.text, plan.tokens, plan.analyzers, plan.backends, _done(record, here)):
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


def _first_calls(plan: Plan, device: str, facts: dict[str, Any], record: Record) -> None:
    facts = facts | dict(zip(SHAPE, plan.shapes[0], strict=True))
    done = _done(record, facts)
    names = (UPSTREAM, *(name for name, _ in _ours(plan.analyzers, plan.backends, plan.sounds)))
    calls = [(name, state) for name in names for state in ("cold", "warmed") if name != UPSTREAM or state == "cold"]
    for name, state in tqdm([call for call in calls if (*call, 0) not in done], desc="first calls", leave=False):
        with ProcessPoolExecutor(1, get_context("spawn")) as process:
            try:
                row = process.submit(_first_call, plan, device, facts["dtype"], name, state == "warmed").result()
            except Exception as error:  # the process may have been killed
                row = _failure(error)
        record.add([{"variant": name, "state": state, "round": 0} | row | facts])


def _first_call(plan: Plan, device: str, dtype: str, variant: str, warmed: bool) -> dict[str, Any]:
    with quiet(), tune_torch() if plan.tuned else nullcontext():
        tts = plan.load(device, dtype)
        start = plan.variants(tts, plan.shapes[0])[variant]
        chosen = {name: value for name, value in start.keywords.items() if name not in ("seed", "max_new_tokens")}
        taken = warm_up(tts, start.args[2], **chosen) if warmed else None
        return metrics_of(start) | {"warm_up_seconds": taken}


def report(table: pd.DataFrame) -> str:
    """What the benchmark found, for a terminal: a table a device, dtype and state, the limit, the check, the errors."""
    parts = []
    for (device, dtype), rows in table.groupby(["device", "dtype"], sort=False):
        parts.append(f"{rows['machine'].iloc[0]} ({device}), T3 in {dtype}")
        if rows.get("step_bytes", rows["rtf"]).notna().any():
            megabytes, milliseconds = rows["step_bytes"].max() / 1e6, 1e3 * rows["step_limit_seconds"].min()
            parts.append(f"reading T3's {megabytes:.0f} MB of weights once takes {milliseconds:.2f} ms")
        for state in ("warm", "cold", "warmed"):
            if len(shapes := by_shape(rows, state).reset_index()):
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


def by_shape(table: pd.DataFrame, state: str = "warm") -> pd.DataFrame:
    """`summary` of every shape of one machine, device and dtype; without ratios where upstream itself failed.

    Returns:
        Indexed by chunk size (0 is the whole utterance), context window and variant; empty if nothing ran.
    """
    there = table[(table["state"] == state) & table["rtf"].notna()]
    tables = {
        shape: summary(group, state=state) if UPSTREAM in set(group["variant"]) else medians(group)
        for shape, group in there.groupby(SHAPE, sort=False)
    }
    return pd.concat(tables, names=[*SHAPE, "variant"]) if tables else pd.DataFrame()


def parser() -> argparse.ArgumentParser:
    """The command line's arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m chatterbox_lab.study.streams",
        description="Measure upstream's generator and ours side by side, interleaved; every run is a row of a CSV.",
    )
    add = partial(parser.add_argument, metavar="X")
    add("--model", default="tiny", help=f"{', '.join(MODELS)} or a voice folder (default: %(default)s)")
    add("--device", nargs="+", default=["auto"], help="auto, cuda, mps, cpu; several are measured in turn")
    add("--dtype", nargs="+", default=["float32"], choices=DTYPES, help="of T3: %(choices)s (default: float32)")
    add("--chunk-size", nargs="+", type=int, default=[25], help="new tokens a chunk, 0 is not streaming (default: 25)")
    add("--context-window", nargs="+", type=int, help="tokens synthesised again (default: twice the chunk size)")
    add("--analyzers", nargs="+", default=["off", "probe"], choices=ANALYZERS, help="%(choices)s (default: off probe)")
    add("--backend", nargs="+", default=["hf"], choices=_BACKENDS, help="%(choices)s (default: hf)")
    add("--sound", nargs="+", default=["exact"], choices=SOUNDS, help="S3Gen: %(choices)s (default: exact)")
    add("--tokens", type=int, default=100, help="length, rounded up to whole chunks; 25 are a second (default: 100)")
    add("--rounds", type=int, default=5, help="measured rounds, after one to warm up (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the sampling (default: %(default)s)")
    add("--text", default="The quick brown fox reads a long sentence to the lazy dog.", help="what is said")
    add("--output", type=Path, help="CSV to write (default: build/data/bench_MODEL.csv)")
    flag = partial(parser.add_argument, action="store_true")
    flag("--check", help="also verify that each variant says upstream's tokens for the same seed, on this device")
    flag("--cold", help="also measure every variant's first call in a process of its own, without and with a warm-up")
    flag("--no-watermark", help="leave the watermark out on both sides (perth need not be installed)")
    flag("--tune", help="set the report's PyTorch flags (TF32, cuDNN autotuning) for the whole run")
    flag("--resume", help="go on with an interrupted benchmark, or add to a finished one")
    flag("--quick", help="two short rounds: under a minute for tiny on 2 cores")
    return parser


def plan_of(chosen: argparse.Namespace) -> Plan:
    """The plan that the command line asks for. Raises ValueError for a value that is not allowed."""
    if not chosen.text.strip():
        raise ValueError(f"text={chosen.text!r}: must have something to say")
    tokens = 25 if chosen.quick else whole_number("tokens", chosen.tokens, 1, _MOST_TOKENS)
    chunks = [whole_number("chunk-size", size, 0, _MOST_TOKENS) for size in chosen.chunk_size]
    windows = chosen.context_window and [whole_number("context-window", size, 0) for size in chosen.context_window]
    devices = tuple(dict.fromkeys(map(pick_device, chosen.device)))
    if len({torch.device(device).type for device in devices}) < len(devices):
        raise ValueError(f"device={' '.join(devices)}: one of each kind at a time")
    return Plan(
        model=chosen.model,
        devices=devices,
        dtypes=tuple(dict.fromkeys(chosen.dtype)),
        shapes=tuple(
            dict.fromkeys((size, window) for size in chunks for window in (windows or [2 * size] if size else [0]))
        ),
        analyzers=tuple(dict.fromkeys(chosen.analyzers)),
        backends=tuple(dict.fromkeys(chosen.backend)),
        sounds=tuple(dict.fromkeys(chosen.sound)),
        text=chosen.text,
        tokens=tokens,
        rounds=2 if chosen.quick else whole_number("rounds", chosen.rounds, 1),
        seed=whole_number("seed", chosen.seed, 0, 2**63 - 1),
        watermark=not chosen.no_watermark,
        tuned=chosen.tune,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status: 1 where a variant failed or said other tokens, 130 if interrupted."""
    command = parser()
    chosen = command.parse_args(arguments)
    record = None
    try:
        plan = plan_of(chosen)
        path = chosen.output or output_folder("data") / f"bench_{Path(plan.model).name}.csv"
        record = Record(path, chosen.resume)
        with quiet(), tune_torch() if plan.tuned else nullcontext():
            run(plan, record, check=chosen.check, cold=chosen.cold)
    except (ValueError, FileNotFoundError, ModuleNotFoundError) as error:
        command.error(str(error))
    except KeyboardInterrupt:
        print("\nStopped.", record.hint() if record else "")
        return 130
    table = record.table()
    print(report(table), f"\n{len(table)} rows are in {path.name}.")
    other = table["same_tokens"] < table["tokens"] if "same_tokens" in table else False
    return int((table["error"].notna() | other).any())


if __name__ == "__main__":
    sys.exit(main())
