"""S3Gen from the released code to each frame once, rung by rung: what a chunk costs, and how far its mel moves.

``python -m chatterbox_lab.study.s3gen_ladder --help`` is the command line; it needs no Jupyter.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from chatterbox.tts import ChatterboxTTS
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from tqdm.auto import tqdm

from ..engine.clock import StageClock, memory_in_use, synchronize
from ..engine.linears import affine
from ..engine.s3gen.flow import FRAMES_PER_TOKEN, FlowPlan
from ..engine.s3gen.render import Renderer
from ..engine.s3gen.vocoder import folded
from ..engine.schedule import TOKEN_SECONDS
from ..engine.settings import FAST, StreamSettings, whole_number
from ..files import attribute
from ..voices.load import load, pick_device
from .logs import quiet
from .machine import machine_facts
from .records import Record, output_folder

STOCK, EXACT = "stock", "plain operations"
DECIBELS = 20 / math.log(10)
"""A mel here is the natural logarithm of an amplitude."""
_LONGEST = 250


def _attention_flop(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


# PyTorch 2.6 does not count attention on a CPU.
_UNCOUNTED = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flop}


@dataclass(frozen=True)
class Rung:
    """One way to render: ``changes`` of `StreamSettings`, and the rung that it is compared with.

    ``sound`` says what a listener could notice: nothing (``same``), ``rounding``, or ``other``.
    """

    name: str
    below: str
    sound: str = "other"
    changes: dict[str, Any] = field(default_factory=dict)

    @property
    def plan(self) -> FlowPlan:
        """How the rung makes mel."""
        return FlowPlan.of(StreamSettings(**self.changes))


_CACHED = {"flow": "cached"}
_FAST = {name: getattr(FAST, name) for name in ("flow", "flow_dtype", "flow_steps", "prompt_tokens")}
SOUNDS = {"exact": {}, "once": _CACHED, "fast": _FAST}
"""Changes of `StreamSettings` for the benchmark: upstream's mel, each frame once, and all that makes it cheaper."""
RUNGS = (
    Rung(STOCK, STOCK, "same"),
    Rung(EXACT, STOCK, "same"),
    Rung("bfloat16", EXACT, "rounding", {"flow_dtype": "bfloat16"}),
    Rung("mel continued", EXACT, "other", {"flow": "continue"}),
    Rung("guided 5 steps of 10", EXACT, "other", {"guided_steps": 5}),
    Rung("5 Euler steps", EXACT, "other", {"flow_steps": 5}),
    Rung("voice prompt of 3 s", EXACT, "other", {"prompt_tokens": 75}),
    Rung("each frame once", EXACT, "other", _CACHED),
    Rung("each frame once, bfloat16", "each frame once", "other", _CACHED | {"flow_dtype": "bfloat16"}),
    Rung("and 5 Euler steps", "each frame once, bfloat16", "other", {k: v for k, v in _FAST.items() if k[0] == "f"}),
    Rung("and a prompt of 3 s", "and 5 Euler steps", "other", _FAST),
)


def chosen_rungs(names: Sequence[str] | None) -> list[Rung]:
    """The released code and the rungs of these names, in the ladder's order; None is all. Raises ValueError."""
    for name in names or ():
        if name not in {rung.name for rung in RUNGS}:
            raise ValueError(f"rungs={name!r}: must be among {', '.join(rung.name for rung in RUNGS)}")
    return [rung for rung in RUNGS if not names or rung.name in names or rung.name in (STOCK, EXACT)]


class Stock:
    """The released S3Gen on the windows that its stream gives it, with the noise that ours has there.

    Upstream indexes its noise from the window's start; with ours in its place the two mels can be compared.
    """

    def __init__(self, tts: ChatterboxTTS, context_window: int) -> None:
        self.s3gen, self.ref, self.context_window = tts.s3gen, tts.conds.gen, context_window
        self.said = torch.zeros(0, dtype=torch.long)

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        """The mel (1, 80, 2 n) of the new tokens (n,); the window's waveform is made, too."""
        mel = self.window(tokens)
        self.s3gen.hift_inference(mel)
        return mel[:, :, -FRAMES_PER_TOKEN * len(tokens) :]

    def window(self, tokens: torch.Tensor) -> torch.Tensor:
        """The mel of the context and the new tokens (n,)."""
        before = self.said[max(0, len(self.said) - self.context_window) :]
        start, window = FRAMES_PER_TOKEN * (len(self.said) - len(before)), torch.cat([before, tokens])
        self.said = torch.cat([self.said, tokens])
        decoder, prompt = self.s3gen.flow.decoder, self.ref["prompt_feat"].shape[1]
        noise = decoder.rand_noise
        ours = torch.cat([noise[:, :, :prompt], noise.roll(-start, 2)[:, :, prompt:]], dim=2)
        with attribute(decoder, "rand_noise", ours):
            return self.s3gen.flow_inference(window.to(self.s3gen.device), ref_dict=self.ref, finalize=True)


class Ours:
    """A `Renderer` that tells its mel."""

    def __init__(self, tts: ChatterboxTTS, rung: Rung, context_window: int, largest_chunk: int) -> None:
        fade = round(StreamSettings().fade * tts.sr)
        self.renderer = Renderer(tts.s3gen, tts.conds.gen, context_window, fade, 0, rung.plan, largest_chunk)

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        """The mel (1, 80, 2 n) of the new tokens (n,)."""
        self.renderer.push(tokens)
        return self.renderer.made[:, :, -FRAMES_PER_TOKEN * len(tokens) :]


def climb(
    tts: ChatterboxTTS, rungs: Sequence[Rung], chunk_size: int, context_window: int, rounds: int, seed: int = 0
) -> Iterator[dict[str, Any]]:
    """Lets all rungs render the same speech side by side, a chunk each in turn, to and fro.

    The context comes first, as one chunk, and then a chunk to warm up (round -1): what is measured is how a stream
    goes on. The speech tokens are random.

    Yields:
        A row a rung and round: ``rung``, ``round``, ``seconds``, ``chunk_size``, ``context_window``, and
        ``mel_decibels``, the mean distance of its log-mel to that of `EXACT` in the same round.
    """
    largest = max(chunk_size, context_window)
    makers = {rung.name: Ours(tts, rung, context_window, largest) for rung in rungs if rung.name != STOCK}
    makers[STOCK] = Stock(tts, context_window)
    codes = tts.s3gen.flow.input_embedding.num_embeddings
    speech = torch.randint(codes, (context_window + (rounds + 1) * chunk_size,), generator=torch.manual_seed(seed))
    names = [rung.name for rung in rungs]
    if context_window:
        for name in tqdm(names, f"context of {context_window}", leave=False):
            makers[name](speech[:context_window])
    parts = speech[context_window:].split(chunk_size)
    for number, part in enumerate(tqdm(parts, f"chunks of {chunk_size}", leave=False), -1):
        rows, mels = [], {}
        for name in names[:: -1 if number % 2 else 1]:
            start = time.perf_counter()
            mels[name] = makers[name](part)
            synchronize(tts.device)
            row = {"rung": name, "round": number, "seconds": time.perf_counter() - start}
            rows.append(row | {"chunk_size": chunk_size, "context_window": context_window})
        for row in rows:
            row["mel_decibels"] = DECIBELS * float((mels[row["rung"]] - mels[EXACT]).abs().mean())
        yield from rows


def first_uses(
    tts: ChatterboxTTS, rungs: Sequence[Rung], context_window: int, largest: int
) -> Iterator[dict[str, Any]]:
    """A row a rung: what is paid once, in seconds, and the memory that it holds then, in bytes.

    ``first_use_seconds`` is for the weights in the form that the device reads fastest and, for ``cached``, for the
    voice prompt, beyond what the rungs before have made already. ``kept_bytes`` is by how much the process has grown.
    """
    for rung in tqdm([rung for rung in rungs if rung.name != STOCK], "first uses", leave=False):
        before, clock = memory_in_use(tts.device), StageClock(tts.device)
        with clock.stage("use"):
            maker = Ours(tts, rung, context_window, largest)
        yield {
            "rung": rung.name,
            "first_use_seconds": clock.seconds["use"],
            "kept_bytes": memory_in_use(tts.device) - before,
        }
        del maker


def limits(tts: ChatterboxTTS, chunk_size: int, context_window: int) -> dict[str, Any]:
    """What a whole window takes at least: its ``flop`` by PyTorch's counter, and the fastest products seen here.

    ``flops_float32`` and ``flops_bfloat16`` are floating point operations a second of a product of the flow's own
    shapes, the best of some.
    """
    stock = Stock(tts, context_window)
    stock.said = torch.zeros(context_window, dtype=torch.long)
    vocoder = folded(tts.s3gen.mel2wav)  # weight norm does not get along with the counter
    with FlopCounterMode(display=False, custom_mapping=_UNCOUNTED) as counter, torch.inference_mode():
        vocoder.inference(speech_feat=stock.window(torch.zeros(chunk_size, dtype=torch.long)))
    found: dict[str, Any] = {"flop": counter.get_total_flops()}
    window = tts.conds.gen["prompt_token"].shape[1] + context_window + chunk_size
    width = tts.s3gen.flow.decoder.estimator.final_proj.weight.shape[1]
    for name in ("float32", "bfloat16"):
        found[f"flops_{name}"] = _product_flops(2 * FRAMES_PER_TOKEN * window, width, getattr(torch, name), tts.device)
    return found | {"chunk_size": chunk_size, "context_window": context_window, "rung": STOCK}


@torch.inference_mode()
def _product_flops(rows: int, width: int, dtype: torch.dtype, device: str) -> float:
    clock = StageClock(device)
    states = torch.randn(rows, width, dtype=dtype, device=device)
    product, taken = affine(torch.randn(4 * width, width, device=device), None, dtype), []
    for _ in range(20):
        with clock.stage("product"):
            product(states)
        taken.append(clock.seconds.pop("product"))
    return 2 * rows * width * 4 * width / min(taken)


def late_chunks(tts: ChatterboxTTS, settings: StreamSettings, chunks: int) -> Iterator[dict[str, Any]]:
    """Seconds of every chunk of one long speech with these settings: does a chunk cost more the later it comes?"""
    rung = Rung("", EXACT, changes={name: getattr(settings, name) for name in _FAST})
    ours = Ours(tts, rung, settings.context, settings.chunk_size)
    codes = tts.s3gen.flow.input_embedding.num_embeddings
    speech = torch.randint(codes, (chunks * settings.chunk_size,), generator=torch.manual_seed(0))
    for number, part in enumerate(tqdm(speech.split(settings.chunk_size), "long speech", leave=False)):
        start = time.perf_counter()
        ours(part)
        synchronize(tts.device)
        yield {"chunk": number, "seconds": time.perf_counter() - start}


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """The ladder of each shape in one table, out of one machine's record.

    Returns:
        Indexed by chunk size, context window and rung: ``s/chunk`` (median), ``RTF`` (of S3Gen alone), ``to below`` and
        ``to stock`` (median of the ratios within a round: above 1 is faster), ``range`` (of the latter), ``mel (dB)``
        (mean distance to the exact mel), ``sound``, ``first use (s)`` (once).
    """
    below, sound = ({rung.name: getattr(rung, what) for rung in RUNGS} for what in ("below", "sound"))
    measured = table[(table["run"] == "chunks") & (table["round"] >= 0)]
    about = table[table["run"] == "about"].dropna(subset=["rung"]).groupby("rung")["first_use_seconds"].max()
    rows = {}
    for (size, window), shape in measured.groupby(["chunk_size", "context_window"]):
        times = shape.pivot_table(index="round", columns="rung", values="seconds")
        for name in [name for name in below if name in times]:
            to_stock = times[STOCK] / times[name]
            to_below = times[below[name]] / times[name] if below[name] in times else to_stock * math.nan
            rows[int(size), int(window), name] = {
                "s/chunk": times[name].median(),
                "RTF": times[name].median() / (size * TOKEN_SECONDS),
                "to below": to_below.median(),
                "to stock": to_stock.median(),
                "range": f"{to_stock.min():.2f} to {to_stock.max():.2f}",
                "mel (dB)": shape.loc[shape["rung"] == name, "mel_decibels"].median(),
                "sound": sound[name],
                "first use (s)": about.get(name),
            }
    found = pd.DataFrame.from_dict(rows, orient="index")
    return found.rename_axis(["chunk size", "context", "rung"])


def floor(table: pd.DataFrame) -> pd.DataFrame:
    """Whole windows against arithmetic: ``TFLOP``, the best ``s`` at the speed of plain products, and what was reached.

    Returns:
        Indexed by shape and rung, for the rungs that do all of a window's work.
    """
    about = table[(table["run"] == "about") & table["flop"].notna()].set_index(["chunk_size", "context_window"])
    board, rows = summary(table), {}
    for (size, window), limit in about.iterrows():
        for rung, dtype in ((STOCK, "float32"), (EXACT, "float32"), ("bfloat16", "bfloat16")):
            if (size, window, rung) in board.index:
                least, took = limit["flop"] / limit[f"flops_{dtype}"], board.loc[(size, window, rung), "s/chunk"]
                rows[int(size), int(window), rung] = {
                    "TFLOP": limit["flop"] / 1e12, "products (GFLOP/s)": limit[f"flops_{dtype}"] / 1e9,
                    "at that speed (s)": least, "s/chunk": took, "share of the limit": least / took,
                }  # fmt: skip
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis(["chunk size", "context", "rung"])


def late_over_early(table: pd.DataFrame, early: int = 4, late: int = 40) -> pd.Series:
    """Cost of the ``late``-th chunk over the ``early``-th, counted from 1, by round; medians of three around each."""
    long = table[table["run"] == "long"].pivot_table(index="chunk", columns="round", values="seconds")
    near = [long.loc[place - 2 : place].median() for place in (late, early + 1)]
    return near[0] / near[1]


def measured(
    tts: ChatterboxTTS,
    rungs: Sequence[Rung],
    shapes: Sequence[tuple[int, int]],
    rounds: int,
    *,
    long: int = 0,
    done: Collection[tuple[Any, ...]] = (),
) -> Iterator[list[dict[str, Any]]]:
    """Measures part by part, and yields each part's rows, with ``run``: ``about``, ``chunks`` or ``long``.

    Args:
        tts: a model.
        rungs: from `chosen_rungs`.
        shapes: chunk sizes with their context windows.
        rounds: measured chunks a rung and shape.
        long: chunks of long speeches besides, one a round, with the last rung's settings; 0 for none.
        done: ``run``, ``chunk_size`` and ``round`` of parts that need not be measured.
    """
    if ("about", shapes[0][0], 0) not in done:
        largest = max(map(max, shapes))
        for row in first_uses(tts, rungs, max(window for _, window in shapes), largest):
            yield [row | {"run": "about", "round": 0}]
    for size, window in shapes:
        if ("about", size, 0) not in done:
            yield [limits(tts, size, window) | {"run": "about", "round": 0}]
        if ("chunks", size, rounds - 1) not in done:
            yield [row | {"run": "chunks"} for row in climb(tts, rungs, size, window, rounds)]
    for number in range(3 if long else 0):
        if ("long", FAST.chunk_size, number) not in done:
            rows = list(late_chunks(tts, FAST, long))
            yield [row | {"run": "long", "round": number, "chunk_size": FAST.chunk_size} for row in rows]


def parser() -> argparse.ArgumentParser:
    """The command line's arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m chatterbox_lab.study.s3gen_ladder",
        description="Time S3Gen rung by rung, all rungs side by side; every chunk is a row of a CSV.",
    )
    add = partial(parser.add_argument, metavar="X")
    add("--model", default="tiny", help="tiny, random, pretrained or a voice folder (default: %(default)s)")
    add("--device", default="auto", help="auto, cuda, mps or cpu (default: %(default)s)")
    add("--rungs", nargs="+", help="only these, beside the released code (default: all; see the table printed)")
    add("--chunk-size", nargs="+", type=int, default=[50], help="new tokens a chunk, several in turn (default: 50)")
    add("--context-window", type=int, help="tokens of context (default: twice the chunk size)")
    add("--rounds", type=int, default=3, help="measured chunks, after the context and one more (default: %(default)s)")
    add("--long", type=int, default=0, help="chunks of three long speeches besides (default: none)")
    add("--output", type=Path, help="CSV to write (default: build/data/prices_MODEL_DEVICE.csv)")
    parser.add_argument("--resume", action="store_true", help="go on with an interrupted measurement")
    return parser


def shapes_of(chosen: argparse.Namespace) -> list[tuple[int, int]]:
    """Chunk sizes with their context windows. Raises ValueError for a value that is not allowed."""
    sizes = [whole_number("chunk-size", size, 1, _LONGEST) for size in dict.fromkeys(chosen.chunk_size)]
    if chosen.context_window is None:
        return [(size, 2 * size) for size in sizes]
    return [(size, whole_number("context-window", chosen.context_window, 0, 2 * _LONGEST)) for size in sizes]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status, 130 if interrupted."""
    command = parser()
    chosen = command.parse_args(arguments)
    record = None
    try:
        shapes, rungs = shapes_of(chosen), chosen_rungs(chosen.rungs)
        rounds, long = whole_number("rounds", chosen.rounds, 1), whole_number("long", chosen.long, 0, 1000)
        device = pick_device(chosen.device)
        name = Path(chosen.model).name
        path = chosen.output or output_folder("data") / f"prices_{name}_{torch.device(device).type}.csv"
        record = Record(path, chosen.resume)
        facts: Mapping[str, Any] = machine_facts(device) | {"model": name}
        record.check(facts)
        tts = load(chosen.model, device=device, watermark=False)
        done = [(row["run"], row.get("chunk_size"), row["round"]) for row in record.rows]
        with quiet():
            for rows in measured(tts, rungs, shapes, rounds, long=long, done=done):
                record.add([dict(facts) | row for row in rows])
        record.finish()
    except (ValueError, FileNotFoundError) as error:
        command.error(str(error))
    except KeyboardInterrupt:
        print("\nStopped.", record.hint() if record else "")
        return 130
    table = record.table()
    for shape, board in summary(table).groupby(level=[0, 1]):
        print(f"\nchunk {shape[0]}, context {shape[1]}:\n{board.droplevel([0, 1]).to_string(float_format='%.3g')}")
    print(f"\nagainst arithmetic:\n{floor(table).to_string(float_format='%.3g')}")
    if long:
        print("\nthe 40th chunk over the 4th:", late_over_early(table, late=min(40, long)).round(3).tolist())
    print(f"\n{len(table)} rows are in {path.name}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
