"""Grids of settings, measured chunk by chunk: a row a chunk, resumable, in this process or over many through joblib."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from chatterbox.tts import ChatterboxTTS
from joblib import Parallel, delayed
from tqdm.auto import tqdm

from ..engine.clock import StageClock
from ..engine.s3gen.render import Renderer
from ..engine.schedule import SCHEDULES
from ..engine.settings import BALANCED, StreamSettings, whole_number
from ..engine.t3.backends import ANALYZERS, AUTO, BACKENDS
from ..voices.kinds import KINDS
from ..voices.load import DTYPES, load, pick_device
from . import command
from .chunks import PROMPTS, TOKENS_PER_CHARACTER, measured_chunks
from .logs import quiet
from .machine import CHATTERBOX, kind_in_words, machine_facts
from .playout import play
from .records import Record
from .turns import to_and_fro

SETTING = ["chunk_size", "context_window", "analyzer", "backend", "weights", "schedule", "max_chunk_size"]
"""The columns that hold what was asked for."""
RUN = ["device", "dtype", "prompt", *SETTING, "round"]
"""What tells the chunks of one run from those of another."""


@dataclass(frozen=True)
class Point:
    """One point of a grid: a prompt's name and the settings it is spoken with."""

    prompt: str
    settings: StreamSettings

    def __post_init__(self) -> None:
        if self.prompt not in PROMPTS:
            raise ValueError(f"prompt={self.prompt!r}: must be one of {', '.join(map(repr, PROMPTS))}")

    @property
    def key(self) -> dict[str, Any]:
        """The columns that identify the point in a table."""
        return {"prompt": self.prompt} | {name: getattr(self.settings, name) for name in SETTING}

    @property
    def tokens(self) -> int:
        """Speech tokens that are said."""
        return round(len(PROMPTS[self.prompt]) * TOKENS_PER_CHARACTER)


def grid(
    chunk_sizes: Iterable[int],
    context_windows: Iterable[int] | None = None,
    *,
    prompts: Iterable[str] = ("medium",),
    settings: StreamSettings = BALANCED,
    **choices: Iterable[Any],
) -> list[Point]:
    """Every combination, each checked before anything runs.

    Args:
        chunk_sizes: new tokens a chunk; of the first one where ``schedule`` is ``"grow"``.
        context_windows: tokens of context; twice the chunk size if not given.
        prompts: names in `PROMPTS`.
        settings: what the grid does not vary.
        **choices: other fields of `StreamSettings` with their values, such as ``backend=("hf", "static")``.

    Raises:
        ValueError: a value that is not allowed, an unknown prompt or setting, or nothing to measure.
    """
    windows = None if context_windows is None else list(context_windows)
    named = [dict(zip(choices, values, strict=True)) for values in product(*choices.values())]
    found = [
        Point(prompt, settings.replace(chunk_size=size, context_window=window, **chosen))
        for prompt in prompts
        for size in chunk_sizes
        for window in ([2 * size] if windows is None else windows)
        for chosen in named
    ]
    if not found:
        raise ValueError("chunk_sizes, context_windows, prompts and choices: each must have at least one value")
    return list(dict.fromkeys(found))


@dataclass(frozen=True)
class Sweep:
    """What a worker needs to measure any point: the model, by name, and what is the same for all points."""

    model: str = "tiny"
    device: str = "auto"
    dtype: str = "float32"
    seed: int = 0
    watermark: bool = True
    variant: str = "english"

    def once(self, point: Point, number: int) -> list[dict[str, Any]]:
        """The rows of one run of a point; a row with its error if it fails."""
        facts = _facts(self) | point.key | {"round": number, "error": None}
        try:
            with quiet():
                tts = _model(self)
                speak = partial(
                    measured_chunks, tts, PROMPTS[point.prompt], point.settings, seed=self.seed, tokens=point.tokens
                )
                _warm_up(self, point, speak)
                return [facts | row for row in speak()]
        except Exception as error:  # of any kind: the other points are still worth measuring
            return [facts | {"chunk": 0, "error": f"{type(error).__name__}: {error}".splitlines()[0][:200]}]


@lru_cache(maxsize=1)
def _model(sweep: Sweep) -> ChatterboxTTS:
    how = {"device": sweep.device, "dtype": sweep.dtype, "seed": sweep.seed, "watermark": sweep.watermark}
    return load(sweep.model, variant=sweep.variant, **how)


@lru_cache(maxsize=1)
def _facts(sweep: Sweep) -> dict[str, Any]:
    model = Path(sweep.model).name + f", {sweep.variant}" * (sweep.variant != "english")
    what = {"model": model, "dtype": sweep.dtype, "seed": sweep.seed, "watermark": sweep.watermark}
    return machine_facts(pick_device(sweep.device)) | what


_WARM: set[tuple[Sweep, Point]] = set()


def _warm_up(sweep: Sweep, point: Point, speak: partial[Iterator[dict[str, Any]]]) -> None:
    """Once a process and point: oneDNN, cuDNN and graphs pay for every length that they have not seen."""
    if (sweep, point) not in _WARM:
        for _ in speak():
            pass
        _WARM.add((sweep, point))


def measure(
    points: Sequence[Point],
    sweep: Sweep,
    record: Record,
    *,
    rounds: int = 3,
    jobs: int | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """Measures every point once a round, and adds its rows to the record as soon as they are there.

    What the record holds already is not run again, unless it failed. Stopped by an interrupt, the record keeps what
    was done, and the same call goes on. The points take turns, see `to_and_fro`.

    Args:
        points: from `grid`.
        sweep: the model and where it runs.
        record: where the rows go; its file is finished at the end.
        rounds: measured runs of each point, at least 1; each process runs a point once before, to warm up.
        jobs: processes; more than one share the machine, and so measure a shared machine. None is one, or what
            ``joblib.parallel_config`` says around the call: its backend may be a dask or ray cluster.
        progress: shows a bar.

    Returns:
        All rows, see `measured_chunks`; with the machine's facts, which each worker states of itself.

    Raises:
        ValueError: no points or rounds, or a record from another commit, version or seed.
    """
    rounds = whole_number("rounds", rounds, 1)
    jobs = None if jobs is None else whole_number("jobs", jobs, 1)
    if not points:
        raise ValueError("points=[]: must have at least one, see grid")
    same = ("model", "device", "commit", "torch", *CHATTERBOX, "seed", "watermark")
    record.check({name: value for name, value in _facts(sweep).items() if name in same})
    record.rows = [row for row in record.rows if not isinstance(row.get("error"), str)]
    done = {tuple(row[name] for name in RUN) for row in record.rows}
    fixed = {name: _facts(sweep)[name] for name in ("device", "dtype")}
    due = [
        (point, number)
        for number in range(rounds)
        for point in to_and_fro(points, number)
        if tuple((fixed | point.key | {"round": number})[name] for name in RUN) not in done
    ]
    work = Parallel(n_jobs=jobs, return_as="generator_unordered")(delayed(sweep.once)(*task) for task in due)
    for rows in tqdm(work, "sweep", len(due), disable=not progress):
        record.add(rows)
    _model.cache_clear()
    record.finish()
    return record.table()


def by_run(table: pd.DataFrame) -> pd.DataFrame:
    """One row a run: RTF, first chunk, chunks, and what a listener gets who starts with the first chunk.

    Where the table has several machines, or kinds of CPU, ``on`` says which.
    """
    table, found = table[table["error"].isna()], []
    table = table.assign(on=[kind_in_words(row) for row in table.to_dict("records")])
    for key, chunks in table.groupby(["on", *RUN], sort=False):
        chunks = chunks.sort_values("chunk")
        heard = play(chunks["arrival_seconds"].tolist(), chunks["audio_seconds"].tolist())
        found.append(
            dict(zip(["on", *RUN], key, strict=True))
            | {
                "rtf": chunks["arrival_seconds"].iloc[-1] / chunks["audio_seconds"].sum(),
                "first_chunk": chunks["arrival_seconds"].iloc[0],
                "chunks": len(chunks),
                "underruns": heard.underruns,
                "silence": heard.silence,
            }
        )
    runs = pd.DataFrame(found)
    return runs if len(set(table["on"])) > 1 else runs.drop(columns="on", errors="ignore")


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """Medians over the rounds of each point, the range of its RTF, and whether it is on the Pareto front.

    The front is, for each device, dtype and prompt, of the points that no other beats in both RTF and first chunk. No
    median and no front mixes machines: see `by_run`.
    """
    runs = by_run(table)
    each = runs.groupby([name for name in ("on", *RUN[:-1]) if name in runs], sort=False)
    found = pd.DataFrame(
        {
            "RTF": each["rtf"].median(),
            "lowest RTF": each["rtf"].min(),
            "highest RTF": each["rtf"].max(),
            "first chunk (s)": each["first_chunk"].median(),
            "chunks": each["chunks"].max(),
            "underruns": each["underruns"].median(),
            "silence (s)": each["silence"].median(),
        }
    ).reset_index()
    where = found.groupby(_place(found), sort=False, group_keys=False)
    found["front"] = pd.concat([_front(group) for _, group in where])
    return found


def _place(table: pd.DataFrame) -> list[str]:
    """The columns of a summary within which points are compared."""
    return [name for name in ("on", *RUN[:3]) if name in table]


def _front(points: pd.DataFrame) -> pd.Series:
    axes = points[["RTF", "first chunk (s)"]].to_numpy()
    beaten = [bool(((axes <= mine).all(1) & (axes < mine).any(1)).any()) for mine in axes]
    return ~pd.Series(beaten, index=points.index)


WINDOWS = ((1, 0, 25), (1, 50, 25), (1, 0, 75), (1, 0, 150), (1, 0, 225), (2, 0, 25), (2, 125, 75), (2, 0, 200))
WINDOWS += ((5, 0, 25), (5, 0, 225))
"""Windows that show whether S3Gen's time depends on their length alone: each is the voice prompt, whole, half or a
fifth, with tokens of context and chunk."""


def windows(
    tts: ChatterboxTTS, parts: Sequence[tuple[int, int, int]] = WINDOWS, *, rounds: int = 3, seed: int = 0
) -> Iterator[dict[str, Any]]:
    """Seconds that S3Gen alone takes for windows made of different parts, with random speech tokens.

    All windows take turns (see `to_and_fro`), after one to warm up.

    Args:
        tts: a model from `load`, or any upstream ``ChatterboxTTS``.
        parts: for each window, what its voice prompt's length is divided by, and tokens of the context and the chunk.
        rounds: measured turns.
        seed: of the speech tokens.

    Yields:
        A row a window and round: ``prompt_tokens``, ``context_tokens``, ``new_tokens``, ``window_tokens``,
        ``s3gen_seconds``, ``round``.
    """
    clock, codes = StageClock(tts.device), tts.s3gen.flow.input_embedding.num_embeddings
    longest = max(context + new for _, context, new in parts)
    speech = torch.randint(codes, (longest,), generator=torch.Generator().manual_seed(seed))
    for number in range(-1, whole_number("rounds", rounds, 1)):
        for divisor, context, new in to_and_fro(parts, number):
            renderer = Renderer(tts.s3gen, _shortened(tts.conds.gen, divisor), context, 0, seed)
            renderer.push(speech[:context])
            start = clock.now()
            renderer.push(speech[context : context + new])
            took = clock.now() - start
            sizes = {"prompt_tokens": renderer.flow.prompt_token.shape[1], "context_tokens": context, "new_tokens": new}
            if number >= 0:
                yield sizes | {"window_tokens": sum(sizes.values()), "s3gen_seconds": took, "round": number}


def _shortened(ref: dict[str, Any], divisor: int) -> dict[str, Any]:
    tokens = ref["prompt_token"].shape[1] // divisor
    frames = tokens * ref["prompt_feat"].shape[1] // ref["prompt_token"].shape[1]
    return ref | {"prompt_token": ref["prompt_token"][:, :tokens], "prompt_feat": ref["prompt_feat"][:, :frames]}


def report(table: pd.DataFrame) -> str:
    """The summary of every machine, dtype and prompt for a terminal, and what failed."""
    failed = table[table["error"].notna()]
    lost = [f"FAILED {row.prompt}, chunk {row.chunk_size}, {row.backend}: {row.error}" for row in failed.itertuples()]
    if len(failed) == len(table):
        return "\n".join(lost)
    parts, points = [], summary(table)
    for (*on, device, dtype, prompt), rows in points.groupby(_place(points), sort=False):
        rows = rows.drop(columns=_place(points))
        rows = rows.drop(columns=[name for name in SETTING[2:] if len(set(rows[name])) == 1])
        title = ", ".join([*on, device, f"T3 in {dtype}", prompt])
        parts.append(f"{title}:\n{rows.to_string(index=False, float_format='%.3f')}\n")
    return "\n".join(parts + lost)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of ``chatterbox-lab sweep``."""
    add, flag = partial(parser.add_argument, metavar="X"), partial(parser.add_argument, action="store_true")
    sizes = [10, 25, 50, 75, 100, 150]
    command.add_model(parser)
    command.add_device(parser)
    add("--variant", default="english", choices=KINDS, help="%(choices)s, from its own release (default: %(default)s)")
    add("--dtype", default="float32", choices=DTYPES, help="of T3: %(choices)s (default: %(default)s)")
    add("--chunk-size", nargs="+", type=int, default=sizes, help=f"new tokens (default: {' '.join(map(str, sizes))})")
    add("--context-window", nargs="+", type=int, help="tokens rendered again (default: twice the chunk size)")
    add("--prompt", nargs="+", default=["medium"], choices=list(PROMPTS), help="%(choices)s (default: medium)")
    add("--analyzer", nargs="+", default=["off"], choices=ANALYZERS, help="%(choices)s (default: off)")
    add("--backend", nargs="+", default=["static"], choices=(AUTO, *BACKENDS), help="%(choices)s (default: static)")
    add("--schedule", nargs="+", default=["fixed"], choices=list(SCHEDULES), help="%(choices)s (default: fixed)")
    add("--rounds", type=int, default=3, help="measured runs of each point (default: %(default)s)")
    add(
        "--jobs",
        type=int,
        default=1,
        help="processes; they share the machine, so 1 for timings to rely on (default: 1)",
    )
    add("--seed", type=int, default=0, help="of the sampling and of random weights (default: 0)")
    flag("--no-watermark", help="leave the watermark out")
    flag("--windows", help="measure S3Gen alone, by what its window is made of, instead of the grid")
    command.add_record(parser, "sweep_MODEL.csv, or windows_MODEL.csv")


def run(options: argparse.Namespace) -> int:
    """Measures the grid, or with ``--windows`` S3Gen alone; returns 1 where a point failed."""
    choices = {"analyzer": options.analyzer, "backend": options.backend, "schedule": options.schedule}
    points = grid(options.chunk_size, options.context_window, prompts=options.prompt, **choices)
    rounds, seed = whole_number("rounds", options.rounds, 1), whole_number("seed", options.seed, 0, 2**63 - 1)
    device = pick_device(options.device)
    sweep = Sweep(options.model, device, options.dtype, seed, not options.no_watermark, options.variant)
    kind = "windows" if options.windows else "sweep"
    record = command.open_record(options, f"{kind}_{command.model_name(options)}.csv")
    if options.windows:
        _record_windows(sweep, record, rounds)
        return 0
    table = measure(points, sweep, record, rounds=rounds, jobs=options.jobs)
    print(report(table), f"\n{len(table)} rows are in {record.path.name}.")
    return int(table["error"].notna().any())


def _record_windows(sweep: Sweep, record: Record, rounds: int) -> None:
    """Records `windows` of the sweep's model, and prints their medians."""
    record.check(_facts(sweep))
    rows = windows(_model(sweep), rounds=rounds, seed=sweep.seed)
    for row in tqdm(rows, "windows", rounds * len(WINDOWS)):
        record.add([row | _facts(sweep)])
    record.finish()
    parts = ["prompt_tokens", "context_tokens", "new_tokens", "window_tokens"]
    print(record.table().groupby(parts)["s3gen_seconds"].median().sort_values().to_string())
