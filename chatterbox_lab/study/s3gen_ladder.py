"""S3Gen from the released code to each frame once, rung by rung: what a chunk costs, and how far its mel moves.

``python -m chatterbox_lab s3gen --help`` is the command line; it needs no Jupyter.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pandas as pd
import torch
from chatterbox.tts import ChatterboxTTS
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from ..engine.clock import StageClock
from ..engine.linears import affine
from ..engine.s3gen.flow import FRAMES_PER_TOKEN
from ..engine.s3gen.vocoder import folded
from ..engine.schedule import TOKEN_SECONDS
from ..engine.settings import FAST, StreamSettings, whole_number
from ..engine.stream import renderer_of
from ..files import attribute
from ..voices.load import load, pick_device
from . import ladder
from .hearing import DECIBELS
from .ladder import STOCK, Part, Row
from .records import Record

EXACT = "plain operations"
_LONGEST = 250


def _attention_flop(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


# PyTorch 2.6 does not count attention on a CPU.
UNCOUNTED = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flop}


@dataclass(frozen=True)
class Rung(ladder.Rung):
    """One way to render. ``sound``: what a listener could notice, nothing (``same``), ``rounding``, or ``other``."""

    sound: str = "other"


_CACHED, _BFLOAT16, _VOCODER = {"flow": "cached"}, {"flow_dtype": "bfloat16"}, {"vocoder_dtype": "bfloat16"}
_FAST = {name: getattr(FAST, name) for name in ("flow", "flow_dtype", "flow_steps", "prompt_tokens", "vocoder_dtype")}
SOUNDS = {"exact": {}, "once": _CACHED, "fast": _FAST}
"""Changes of `StreamSettings` for the benchmark: upstream's mel, each frame once, and all that makes it cheaper."""
RUNGS = (
    Rung(STOCK, STOCK, sound="same"),
    Rung(EXACT, STOCK, sound="same"),
    Rung("bfloat16", EXACT, _BFLOAT16, sound="rounding"),
    Rung("bfloat16 vocoder", EXACT, _VOCODER, sound="rounding"),
    Rung("5 Euler steps", EXACT, {"flow_steps": 5}),
    Rung("voice prompt of 3 s", EXACT, {"prompt_tokens": 75}),
    Rung("each frame once", EXACT, _CACHED),
    Rung("each frame once, bfloat16", "each frame once", _CACHED | _BFLOAT16),
    Rung("and 5 Euler steps", "each frame once, bfloat16", _CACHED | _BFLOAT16 | {"flow_steps": 5}),
    Rung("and a prompt of 3 s", "and 5 Euler steps", _FAST | _BFLOAT16 | {"vocoder_dtype": "float32"}),
    Rung("and the vocoder in bfloat16", "and a prompt of 3 s", _FAST | _BFLOAT16 | _VOCODER),
)


def chosen(names: Sequence[str] | None) -> list[Rung]:
    """The rungs of these names, the released code and what it is by plain operations. Raises ValueError."""
    return ladder.chosen(RUNGS, names, always=(STOCK, EXACT))


Renders = Callable[[torch.Tensor], torch.Tensor]
"""Makes the mel (1, 80, 2 n) of the next new tokens (n,) of one speech."""


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


def ours(tts: ChatterboxTTS, settings: StreamSettings) -> Renders:
    """A `Renderer` that tells its mel; the waveform is made, too."""
    renderer = renderer_of(tts, settings, seed=0)

    def mel(tokens: torch.Tensor) -> torch.Tensor:
        renderer.push(tokens)
        return renderer.made[:, :, -FRAMES_PER_TOKEN * len(tokens) :]

    return mel


def _speech(tts: ChatterboxTTS, tokens: int, seed: int = 0) -> torch.Tensor:
    """Random speech tokens."""
    codes = tts.s3gen.flow.input_embedding.num_embeddings
    return torch.randint(codes, (tokens,), generator=torch.manual_seed(seed))


def climb(
    tts: ChatterboxTTS, rungs: Sequence[Rung], chunk_size: int, context_window: int, rounds: int, seed: int = 0
) -> Iterator[Row]:
    """Lets all rungs render the same speech side by side, a chunk each in turn, to and fro.

    The context comes first, as one chunk, and then a chunk to warm up (round -1): what is measured is how a stream
    goes on. The speech tokens are random.

    Yields:
        A row a rung and round: ``rung``, ``round``, ``seconds``, ``chunk_size``, ``context_window``, and
        ``mel_decibels``, the mean distance of its log-mel, as the vocoder gets it, to that of `EXACT` in the round.
    """
    shape = {"chunk_size": max(chunk_size, context_window), "context_window": context_window}
    makers: dict[str, Renders] = {
        rung.name: Stock(tts, context_window) if rung.name == STOCK else ours(tts, rung.settings(**shape))
        for rung in rungs
    }
    speech = _speech(tts, context_window + (rounds + 1) * chunk_size, seed)
    context, chunks = speech[:context_window], speech[context_window:].split(chunk_size)
    if len(context):
        list(ladder.side_by_side(makers, [context], tts.device, f"context of {context_window}"))
    for number, made in ladder.side_by_side(makers, chunks, tts.device, f"chunks of {chunk_size}", first=-1):
        exact = made[EXACT][0]
        for name, (mel, seconds) in made.items():
            row = {"rung": name, "round": number, "seconds": seconds}
            row |= {"chunk_size": chunk_size, "context_window": context_window}
            yield row | {"mel_decibels": DECIBELS * float((mel - exact).abs().mean())}


def first_use(tts: ChatterboxTTS, settings: StreamSettings) -> Row:
    """What a renderer costs once (see `ladder.first_use`).

    That is the weights in the form that the device reads fastest and, for ``cached``, the voice prompt.
    """
    return ladder.first_use(lambda: ours(tts, settings), tts.device)


def limits(tts: ChatterboxTTS, chunk_size: int, context_window: int) -> Row:
    """What a whole window takes at least: its ``flop`` by PyTorch's counter, and the fastest products seen here.

    ``flops_float32`` and ``flops_bfloat16`` are floating point operations a second of a product of the flow's own
    shapes, the best of some.
    """
    stock = Stock(tts, context_window)
    stock.said = torch.zeros(context_window, dtype=torch.long)
    vocoder = folded(tts.s3gen.mel2wav)  # weight norm does not get along with the counter
    with FlopCounterMode(display=False, custom_mapping=UNCOUNTED) as counter, torch.inference_mode():
        vocoder.inference(speech_feat=stock.window(torch.zeros(chunk_size, dtype=torch.long)))
    found: Row = {"flop": counter.get_total_flops()}
    window = tts.conds.gen["prompt_token"].shape[1] + context_window + chunk_size
    width = tts.s3gen.flow.decoder.estimator.final_proj.weight.shape[1]
    for name in ("float32", "bfloat16"):
        found[f"flops_{name}"] = product_flops(2 * FRAMES_PER_TOKEN * window, width, getattr(torch, name), tts.device)
    return found | {"chunk_size": chunk_size, "context_window": context_window, "rung": STOCK}


@torch.inference_mode()
def product_flops(rows: int, width: int, dtype: torch.dtype, device: str) -> float:
    """Floating point operations a second of a product (rows, width) x (width, 4 width), the best of twenty."""
    clock = StageClock(device)
    states = torch.randn(rows, width, dtype=dtype, device=device)
    product, taken = affine(torch.randn(4 * width, width, device=device), None, dtype), []
    for _ in range(20):
        with clock.stage("product"):
            product(states)
        taken.append(clock.seconds.pop("product"))
    return 2 * rows * width * 4 * width / min(taken)


def long_speech(tts: ChatterboxTTS, settings: StreamSettings, chunks: int) -> Iterator[Row]:
    """Seconds of every chunk of one long speech with these settings: does a chunk cost more the later it comes?"""
    parts = _speech(tts, chunks * settings.chunk_size).split(settings.chunk_size)
    makers = {"": ours(tts, settings)}
    for number, made in ladder.side_by_side(makers, parts, tts.device, "long speech"):
        yield {"chunk": number, "seconds": made[""][1], "chunk_size": settings.chunk_size}


def measure(
    tts: ChatterboxTTS,
    rungs: Sequence[Rung],
    shapes: Sequence[tuple[int, int]],
    rounds: int,
    *,
    long: int = 0,
    record: Record | None = None,
    facts: Mapping[str, Any] | None = None,
) -> pd.DataFrame:
    """Measures a ladder, without what its record holds already, and returns all rows.

    Args:
        tts: a model.
        rungs: from `chosen`.
        shapes: chunk sizes with their context windows.
        rounds: measured chunks a rung and shape.
        long: chunks of long speeches besides, one a round, with the last rung's settings; 0 for none.
        record: where each part's rows go as soon as they are there.
        facts: what every row says besides, such as the machine.

    Returns:
        Rows with ``run`` and ``round``: ``about`` has `first_use` of each rung and `limits` of each shape, ``chunks``
        has `climb`, ``long`` has `long_speech`.
    """
    parts: list[Part] = []

    def add(what: Row, rows_of: Callable[[], Iterable[Row]]) -> None:
        parts.append((what, rows_of))

    largest = {"chunk_size": max(map(max, shapes)), "context_window": max(window for _, window in shapes)}
    for rung in [rung for rung in rungs if rung.name != STOCK]:
        settings = rung.settings(**largest)
        add({"run": "about", "round": 0, "rung": rung.name}, lambda settings=settings: [first_use(tts, settings)])
    for shape in shapes:
        size = {"chunk_size": shape[0]}
        add({"run": "about", "round": 0} | size, lambda shape=shape: [limits(tts, *shape)])
        add({"run": "chunks", "round": rounds - 1} | size, partial(climb, tts, rungs, *shape, rounds))
    for number in range(3 if long else 0):
        what = {"run": "long", "round": number, "chunk_size": FAST.chunk_size}
        add(what, partial(long_speech, tts, FAST, long))
    return ladder.measure(ladder.due(parts, record.rows if record else []), record, facts)


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """The ladder of each shape in one table, out of one machine's record.

    Returns:
        Indexed by chunk size, context window and rung: ``s/chunk`` (median), ``RTF`` (of S3Gen alone), ``to below`` and
        ``to stock`` (median of the ratios within a round: above 1 is faster), ``range`` (of the latter), ``mel (dB)``
        (mean distance to the exact mel), ``sound``, ``first use (s)`` (once).
    """
    below, sound = ({rung.name: getattr(rung, what) for rung in RUNGS} for what in ("below", "sound"))
    measured = table[(table["run"] == "chunks") & (table["round"] >= 0)]
    first_uses = table[table["run"] == "about"].groupby("rung")["first_use_seconds"].max()
    boards = {}
    for (size, window), shape in measured.groupby(["chunk_size", "context_window"]):
        times = shape.pivot_table(index="round", columns="rung", values="seconds")
        times = times[[name for name in below if name in times]]
        columns = {
            "s/chunk": times.median(),
            "RTF": times.median() / (size * TOKEN_SECONDS),
            **ladder.compared(times, below, spread=(0, 1)),
            "mel (dB)": shape.groupby("rung")["mel_decibels"].median(),
            "sound": pd.Series(sound),
            "first use (s)": first_uses,
        }
        boards[int(size), int(window)] = pd.DataFrame(columns).loc[list(times)]
    return pd.concat(boards, names=["chunk size", "context", "rung"])


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


def growth(table: pd.DataFrame) -> pd.DataFrame:
    """Seconds a chunk by number of the chunk (down, from 0) and round (across), of the long speeches."""
    return table[table["run"] == "long"].pivot_table(index="chunk", columns="round", values="seconds")


def late_over_early(table: pd.DataFrame) -> pd.Series:
    """Cost of the 40th chunk over the 5th, or the last if there are fewer, by round; medians of three around each."""
    times = growth(table)
    return ladder.late_over_early(times, early=4, late=min(39, len(times) - 1), around=1)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    ladder.add_options(parser, "prices_MODEL_DEVICE.csv", piece="chunk")
    add = parser.add_argument
    add("--chunk-size", metavar="X", nargs="+", type=int, default=[50], help="new tokens a chunk (default: 50)")
    add("--context-window", metavar="X", type=int, help="tokens of context (default: twice the chunk size)")


def _shapes(options: argparse.Namespace) -> list[tuple[int, int]]:
    """Chunk sizes with their context windows. Raises ValueError for a value that is not allowed."""
    sizes = [whole_number("chunk-size", size, 1, _LONGEST) for size in dict.fromkeys(options.chunk_size)]
    if options.context_window is None:
        return [(size, 2 * size) for size in sizes]
    return [(size, whole_number("context-window", options.context_window, 0, 2 * _LONGEST)) for size in sizes]


def run(options: argparse.Namespace) -> int:
    """Times S3Gen, all rungs side by side; every chunk is a row of a CSV."""
    shapes, rungs = _shapes(options), chosen(options.rungs)
    rounds, long = whole_number("rounds", options.rounds, 1), whole_number("long", options.long, 0, 1000)
    device = pick_device(options.device)
    record, facts = ladder.begin(options, "prices", device)
    tts = load(options.model, device=device, watermark=False)
    table = measure(tts, rungs, shapes, rounds, long=long, record=record, facts=facts)
    path = record.finish()
    for shape, board in summary(table).groupby(level=[0, 1]):
        print(f"\nchunk {shape[0]}, context {shape[1]}:\n{board.droplevel([0, 1]).to_string(float_format='%.3g')}")
    print(f"\nagainst arithmetic:\n{floor(table).to_string(float_format='%.3g')}")
    if long:
        print("\nthe 40th chunk (or the last) over the 5th:", late_over_early(table).round(3).tolist())
    print(f"\n{len(table)} rows are in {path.name}.")
    return 0
