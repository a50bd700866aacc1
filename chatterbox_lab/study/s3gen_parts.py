"""S3Gen's vocoder and encoder alone: the released code beside plain operations, in float32 and in bfloat16.

With Turbo's two steps these two are most of S3Gen. ``chatterbox-lab parts`` lets all ways take turns on the same input.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import pandas as pd
import torch
from torch.utils.flop_counter import FlopCounterMode

from ..engine.s3gen.encoder import Encoder
from ..engine.s3gen.flow import FRAMES_PER_TOKEN
from ..engine.s3gen.hift import HiFT
from ..engine.s3gen.vocoder import SAMPLES_PER_FRAME, folded
from ..engine.schedule import TOKEN_SECONDS
from ..engine.settings import whole_number
from ..voices.load import load, pick_device
from . import command, ladder
from .ladder import STOCK, Part, Row
from .machine import machine_facts
from .s3gen_ladder import UNCOUNTED, product_flops

PLAIN, ROUNDED = "plain operations", "bfloat16"
WAYS = (STOCK, "weight norm folded", PLAIN, ROUNDED)
"""From the released code on; the encoder has no weight norm."""
TOKENS = {"vocoder": (31, 62), "encoder": (150, 300)}
"""Tokens at once: what a chunk of 25 and of 50 gives the vocoder, and windows with a short and a whole voice prompt."""
_PACKED = 512
"""Rows of the product that gives the limit: as many as the encoder's."""


def vocoders(tts: Any) -> dict[str, Callable[[int], torch.Tensor]]:
    """By way, what makes a waveform (1, 960 n) of n random tokens' mel and excitation."""
    hift = tts.s3gen.mel2wav
    plain = folded(hift)
    ways: dict[str, Callable[..., torch.Tensor]] = {
        STOCK: hift.decode,
        WAYS[1]: plain.decode,
        PLAIN: HiFT(plain),
        ROUNDED: HiFT(plain, torch.bfloat16),
    }

    def made(decode: Callable[..., torch.Tensor], tokens: int) -> torch.Tensor:
        random, frames = torch.Generator().manual_seed(tokens), FRAMES_PER_TOKEN * tokens
        mel = torch.randn(1, 80, frames, generator=random) - 5
        source = 0.1 * torch.randn(1, 1, frames * SAMPLES_PER_FRAME, generator=random)
        return decode(mel.to(tts.device), source.to(tts.device))

    return {name: partial(made, decode) for name, decode in ways.items()}


def encoders(tts: Any) -> dict[str, Callable[[int], torch.Tensor]]:
    """By way, what encodes a window of n random tokens: (1, 2 n, 80)."""
    flow = tts.s3gen.flow

    def released(tokens: torch.Tensor) -> torch.Tensor:
        embedded = flow.input_embedding(tokens)
        hidden, _ = flow.encoder(embedded, torch.tensor([tokens.shape[1]], device=tokens.device))
        return flow.encoder_proj(hidden)

    ways = {STOCK: released, PLAIN: Encoder(flow), ROUNDED: Encoder(flow, torch.bfloat16)}

    def made(encode: Callable[..., torch.Tensor], tokens: int) -> torch.Tensor:
        codes = torch.randint(0, 6561, (1, tokens), generator=torch.Generator().manual_seed(tokens))
        return encode(codes.to(tts.device))

    return {name: partial(made, encode) for name, encode in ways.items()}


@torch.inference_mode()
def climb(
    part: str, makers: Mapping[str, Callable[[int], torch.Tensor]], tokens: int, rounds: int, device: str
) -> Iterator[Row]:
    """A row a way and round, all ways in turns after two rounds to warm up.

    ``moved`` is how far the result is from the released one, relative to its norm.
    """
    with FlopCounterMode(display=False, custom_mapping=UNCOUNTED) as counter:
        makers[WAYS[1] if part == "vocoder" else STOCK](tokens)  # weight norm does not get along with the counter
    given = [tokens] * (rounds + 2)
    for number, made in ladder.side_by_side(makers, given, device, f"{part}, {tokens} tokens", first=-2):
        exact = made[STOCK][0]
        for way, (result, seconds) in made.items():
            row = {"way": way, "round": number, "seconds": seconds, "flop": counter.get_total_flops()}
            yield row | {"moved": float((result - exact).norm() / exact.norm())}


def measure(tts: Any, rounds: int, record: Any = None, facts: Mapping[str, Any] | None = None) -> pd.DataFrame:
    """All rows: for each of `TOKENS` those of `climb`, and one with the speed of plain products here (`limits`)."""
    parts: list[Part] = []
    for part, makers_of in (("vocoder", vocoders), ("encoder", encoders)):
        makers = makers_of(tts)
        for tokens in TOKENS[part]:
            what = {"part": part, "tokens": tokens, "round": rounds - 1}
            parts.append((what, partial(climb, part, makers, tokens, rounds, tts.device)))
    parts.append(({"part": "limits"}, lambda: [limits(tts.device)]))
    return ladder.measure(ladder.due(parts, record.rows if record else []), record, facts)


def limits(device: str) -> Row:
    """Floating point operations a second of a plain product here, by dtype."""
    return {f"flops_{name}": product_flops(_PACKED, 512, getattr(torch, name), device) for name in ("float32", ROUNDED)}


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """One machine's record in one table.

    Returns:
        Indexed by part, tokens and way: ``s a second`` of speech (median), ``to stock`` (median of the ratios within a
        round: above 1 is faster) with its ``range``, ``share of the limit`` (what a plain product of this dtype would
        take, over the time), ``moved`` (the largest).
    """
    limit = table[table["part"] == "limits"].iloc[0]
    rows = table[(table["part"] != "limits") & (table["round"] >= 0)]
    boards = {}
    for (part, tokens), shape in rows.groupby(["part", "tokens"], sort=False):
        times = shape.pivot_table(index="round", columns="way", values="seconds")
        times = times[[way for way in WAYS if way in times]]
        fastest = pd.Series({way: limit[f"flops_{ROUNDED if way == ROUNDED else 'float32'}"] for way in times})
        boards[part, int(tokens)] = pd.DataFrame(
            {
                "s a second": times.median() / (tokens * TOKEN_SECONDS),
                **ladder.compared(times, {}, spread=(0, 1))[["to stock", "range"]],
                "share of the limit": shape["flop"].iloc[0] / fastest / times.median(),
                "moved": shape.groupby("way")["moved"].max(),
            }
        ).loc[list(times)]
    return pd.concat(boards, names=["part", "tokens", "way"])


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of ``chatterbox-lab parts``."""
    command.add_model(parser)
    command.add_device(parser)
    parser.add_argument("--rounds", metavar="X", type=int, default=9, help="measured rounds (default: %(default)s)")
    command.add_record(parser, "parts_MODEL_DEVICE.csv")


def run(options: argparse.Namespace) -> int:
    """Times both parts, and prints them."""
    rounds, device = whole_number("rounds", options.rounds, 1), pick_device(options.device)
    name = command.model_name(options)
    record = command.open_record(options, f"parts_{name}_{torch.device(device).type}.csv")
    facts = machine_facts(device) | {"model": name}
    record.check(facts)
    table = measure(load(options.model, device=device, watermark=False), rounds, record, facts)
    path = record.finish()
    print(summary(table).to_string(float_format="%.3g"))
    print(f"\n{len(table)} rows are in {path.name}.")
    return 0
