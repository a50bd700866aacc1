"""What upstream's calls do to their own process: the same call after 1, 5, 20 and 50 others, and the very first.

Every call, streaming or not, leaves one more spy on layer 9: a wrapped forward that asks for the attention map, and a
hook that copies it to the CPU. None is ever removed, so that each later call runs through all of them.
``chatterbox-lab calls`` measures each call twice in turn: as an application's process would run it, and with the spies
out of the way.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import pandas as pd
import torch
from chatterbox.tts import ChatterboxTTS

from ..engine.settings import StreamSettings, whole_number
from ..engine.t3.spies import remove_spies
from ..voices.load import load, pick_device
from . import command, ladder
from .fallback import count_spies
from .machine import machine_facts
from .streams import metrics_of
from .turns import to_and_fro
from .upstream import upstream_stream, upstream_tokens, upstream_whole

Row = dict[str, Any]
TEXT = "The quick brown fox reads a long sentence to the lazy dog."
WAYS = {"whole": upstream_whole, "stream": upstream_stream}
"""Upstream's two generators: ``generate`` and ``generate_stream``."""
AFTER = (0, 1, 5, 20, 50)


@dataclass(frozen=True)
class Process:
    """A process in which upstream's generators are called again and again.

    Args:
        tts: a model of the streaming fork; nobody else may use it meanwhile.
        settings: chunk size and context window of the stream.
        tokens: speech tokens of each measured call, a multiple of the chunk size.
        rounds: measured rounds, after one to warm up.
    """

    tts: ChatterboxTTS
    settings: StreamSettings
    tokens: int
    rounds: int

    def aged(self, after: int) -> Iterator[Row]:
        """Rows of the calls that come after so many others have left their spies, found as they are.

        Returns:
            ``way``, ``left`` (whether the spies stay in the call's way), ``spies`` (hooks on the layers when it
            starts), ``round`` (-1 warms up, or is the process's first call), and the fields of `StreamMetrics`.
        """
        tfmr, fixed = self.tts.t3.tfmr, {"max_new_tokens": self.tokens, "ignore_eos": True}
        for number in range(-1, self.rounds):
            for way, left in to_and_fro(list(product(WAYS, (True, False))), max(number, 0)):
                self._spied_on(after)
                spies = count_spies(tfmr)["hooks"]
                start = partial(WAYS[way], self.tts, TEXT, self.settings, leave_spies=left, seed=0, **fixed)
                yield {"way": way, "left": left, "spies": spies, "round": number} | metrics_of(start)

    def _spied_on(self, calls: int) -> None:
        """As after so many calls. What leaves the spy is the call, whatever it says: one token is enough."""
        tfmr = self.tts.t3.tfmr
        if count_spies(tfmr)["hooks"] > calls:
            remove_spies(tfmr)
        while count_spies(tfmr)["hooks"] < calls:
            upstream_tokens(self.tts, TEXT, seed=0, max_new_tokens=1, leave_spies=True)


def factors(table: pd.DataFrame) -> pd.DataFrame:
    """How much longer a call takes with the spies in its way than without, by calls before it and way.

    Returns:
        Indexed by ``after`` and ``way``: ``RTF`` and ``lifted RTF`` (medians), ``T3 (ms/token)``, ``factor`` (median of
        the ratios of RTF within rounds), ``least`` and ``most`` of them.
    """
    rows = table[(table["round"] >= 0) & table["rtf"].notna()]
    index = ["after", "way", "round"]
    left, lifted = (rows[rows["left"] == kept].set_index(index) for kept in (True, False))
    pairs = pd.DataFrame({"RTF": left["rtf"], "lifted RTF": lifted["rtf"]})
    pairs["T3 (ms/token)"] = 1e3 * left["t3_seconds"] / left["tokens"]
    pairs["factor"] = pairs["RTF"] / pairs["lifted RTF"]
    grouped = pairs.groupby(["after", "way"], sort=False)
    return grouped.median().assign(least=grouped["factor"].min(), most=grouped["factor"].max())


def verdict(table: pd.DataFrame, way: str) -> tuple[bool | str, str]:
    """Do earlier calls slow later ones? The factor after most calls, against that where none came before.

    Where no call came before, there is nothing to lift, and what the factor is beside 1 is chance, whichever the way: a
    factor after many calls counts where it lies above all of that.

    Returns:
        Whether it holds (in words where the record cannot say), and the evidence.
    """
    found = factors(table)
    after = max(found.index.unique("after"))
    if 0 not in found.index.unique("after") or after == 0:
        return "not measured", ""
    late, chance = found.loc[after, way], found.loc[0]
    least, most = chance["least"].min(), chance["most"].max()
    told = f"{late['factor']:.2f}x after {after:.0f} calls ({late['least']:.2f} to {late['most']:.2f})"
    told += f"; {least:.2f} to {most:.2f} by chance alone"
    if late["factor"] > most:
        return True, told
    return "undecided: within chance" if late["factor"] > 1.05 else False, told


def first_call(table: pd.DataFrame) -> float:
    """How much longer the process's very first call took than the same call later: a ratio of seconds."""
    rows = table[(table["after"] == 0) & (table["way"] == "whole") & table["left"]].set_index("round")
    seconds = rows["total_generation_time"]
    return float(seconds[-1] / seconds[seconds.index >= 0].median())


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of ``chatterbox-lab calls``."""
    command.add_model(parser)
    command.add_device(parser)
    add = partial(parser.add_argument, metavar="X", type=int)
    add("--after", nargs="+", default=list(AFTER), help="calls that came before (default: 0 1 5 20 50)")
    add("--tokens", default=50, help="speech tokens a call, rounded up to whole chunks (default: %(default)s)")
    add("--chunk-size", default=25, help="new tokens a chunk of the stream (default: %(default)s)")
    add("--rounds", default=3, help="measured rounds, after one to warm up (default: %(default)s)")
    command.add_record(parser, "calls_MODEL_DEVICE.csv")


def run(options: argparse.Namespace) -> int:
    """Calls upstream again and again in this process; returns 1 where a call failed."""
    numbers = [whole_number("after", number, 0, 1000) for number in options.after]
    chunk = whole_number("chunk_size", options.chunk_size, 1, 500)
    tokens = -(-whole_number("tokens", options.tokens, 1, 1000) // chunk) * chunk
    rounds, device = whole_number("rounds", options.rounds, 1), pick_device(options.device)
    name = command.model_name(options)
    record = command.open_record(options, f"calls_{name}_{torch.device(device).type}.csv")
    facts = machine_facts(device) | {"model": name, "chunk_size": chunk, "context_window": 2 * chunk}
    facts |= {"asked_tokens": tokens}
    record.check(facts)
    settings = StreamSettings(chunk_size=chunk, context_window=2 * chunk)
    process = Process(load(options.model, device=device, watermark=False), settings, tokens, rounds)
    parts: Sequence[ladder.Part] = [({"after": number}, partial(process.aged, number)) for number in sorted(numbers)]
    table = ladder.measure(ladder.due(parts, record.rows), record, facts)
    print(factors(table).to_string(float_format="%.3g"))
    if 0 in numbers and not table["error"].notna().any():
        print(f"\nthe process's first call took {first_call(table):.2f} times as long as later ones")
    print(f"\n{len(table)} rows are in {record.finish().name}.")
    return int(table["error"].notna().any())
