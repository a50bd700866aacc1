"""The Chatterboxes that are released today: what a call does to the process, and what it costs, stock against ours.

``chatterbox-lab living`` installs each release in a folder beside the environment (`overlays`), and measures it there
in a process of its own. The rows have a ``part``:

- ``calls``: the release's own ``T3.inference`` again and again on one model: ``hooks`` on T3's layers, ``attention``
  (the implementation that the configuration names) and ``maps`` (whether it asks all layers for them) after each
  ``call``, and how many layers ran ``manual`` attention or ``sdpa`` in its steps. Call 0 is a model as loaded; the
  last ones, ``ours``, go through this package.
- ``t3``: seconds that one way takes for its tokens, ``prefill`` left out, and how many are the release's own.
- ``streams``: whole streams of ours beside the release's own ``generate`` (`living_streams`).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import transformers
from tqdm.auto import tqdm

from ..engine.request import checked
from ..engine.settings import StreamSettings, whole_number
from ..engine.stream import speech_tokens
from ..engine.t3.decode import tokens as decoded
from ..engine.t3.spies import remove_spies
from ..engine.variants import encode, variant_of
from ..files import REPOSITORY, attribute
from ..released import release
from ..voices.kinds import KINDS
from ..voices.load import load, pick_device
from . import command, living_streams
from .fallback import count_spies, watch_layers
from .logs import quiet
from .machine import machine_facts
from .overlays import OVERLAYS, environment
from .turns import to_and_fro

Row = dict[str, Any]
ASKING = ("english", "multilingual")
"""The kinds that might ask T3's layers for their maps; Turbo's code has no such place."""
STOCK = "release"
WAYS = {"hf": {"backend": "hf"}, "static": {"backend": "static"}, "int8": {"backend": "static", "weights": "int8"}}
GPU_WAYS = {"hf": WAYS["hf"], "static": WAYS["static"], "graph": {"backend": "graph"}}
"""How ours decodes, beside the release's own loop: on a CPU, on a GPU."""
TEXT = "The quick brown fox reads a long sentence to the lazy dog."
CALLS, STEPS = 3, 8
STREAMED = ("english", "turbo", "nano")
"""The kinds whose streams are measured; Multilingual has English's sizes, and T3 and S3Gen cost the same."""
_COSTLY = "tts"
"""The overlay whose costs are measured: the official release on the environment's transformers."""


def released_tokens(tts: Any, text: str, seed: int, tokens: int) -> tuple[torch.Tensor, float]:
    """What the release's own ``T3.inference`` says, and the seconds a token that it takes after the first."""
    variant, marks = variant_of(tts), []
    numbers = variant.settled(StreamSettings())
    head = tts.t3.speech_head.register_forward_hook(lambda *_: marks.append(time.perf_counter()))
    given = {"t3_cond": tts.conds.t3, "text_tokens": encode(tts, text, "en", variant.rows), "temperature": 0.8}
    given |= {"repetition_penalty": numbers.repetition_penalty, "top_p": numbers.top_p}
    torch.manual_seed(seed)
    try:
        with _no_bar(tts):
            if variant.rows == 1:  # Turbo, whose first token is not counted
                said = tts.t3.inference_turbo(**given, top_k=numbers.top_k, max_gen_len=tokens - 1)[0]
            else:
                said = tts.t3.inference(**given, cfg_weight=0.5, min_p=numbers.min_p, max_new_tokens=tokens)[0]
    finally:
        head.remove()
    return said[said < 6561], (marks[-1] - marks[0]) / max(1, len(marks) - 1)


def _no_bar(tts: Any) -> AbstractContextManager[None]:
    module = next(sys.modules[kind.__module__] for kind in type(tts.t3).__mro__ if kind.__name__ == "T3")
    return attribute(module, "tqdm", lambda steps, **_: steps)


def our_tokens(tts: Any, text: str, seed: int, tokens: int, way: str) -> tuple[torch.Tensor, float]:
    """The same through this package, with the settings of `WAYS` or `GPU_WAYS`."""
    marks: list[float] = []
    settings = StreamSettings(language="en", **(WAYS | GPU_WAYS)[way])
    request = checked(tts, text, settings, seed=seed, max_new_tokens=tokens)
    said = []
    for token in decoded(tts, request):
        said.append(token)
        marks.append(time.perf_counter())
    return torch.cat(said), (marks[-1] - marks[0]) / max(1, len(marks) - 1)


def left_behind(tts: Any) -> Row:
    """The release's hooks on T3's layers, and what its configuration says of attention."""
    config = tts.t3.tfmr.config
    return {
        "hooks": count_spies(tts.t3.tfmr)["hooks"],
        "maps": bool(config.output_attentions),
        "attention": config._attn_implementation,
    }


def calls(tts: Any) -> Iterator[Row]:
    """The rows of part ``calls``; the model is as it was afterwards."""
    yield {"call": 0, "way": STOCK} | left_behind(tts)
    try:
        for way in (STOCK, "ours"):
            for call in range(1, CALLS + 1):
                with watch_layers(tts.t3.tfmr) as counts:
                    if way == STOCK:
                        released_tokens(tts, TEXT, call, STEPS)
                    else:
                        speech_tokens(tts, TEXT, seed=call, max_new_tokens=STEPS, backend="hf", language="en")
                layers = {name: sum(count[name] > 0 for count in counts) for name in ("manual", "sdpa")}
                yield {"call": call, "way": way} | left_behind(tts) | layers
            remove_spies(tts.t3.tfmr)
    finally:
        remove_spies(tts.t3.tfmr)


def t3_costs(tts: Any, tokens: int, rounds: int) -> Iterator[Row]:
    """The rows of part ``t3``; all ways take turns, after a round to warm up."""
    ours = GPU_WAYS if torch.device(tts.device).type == "cuda" else WAYS
    ways: dict[str, Callable[..., Any]] = {STOCK: released_tokens} | {way: partial(our_tokens, way=way) for way in ours}
    for number in range(-1, rounds):
        said: dict[str, torch.Tensor] = {}
        rows = []
        for way in to_and_fro(ways, max(number, 0)):
            with unspied(tts):
                said[way], seconds = ways[way](tts, TEXT, 0, tokens)
            rows.append({"way": way, "round": number, "tokens": len(said[way]), "seconds": seconds})
        for row in rows:
            ours, theirs = said[row["way"]], said[STOCK]
            length = min(len(ours), len(theirs))
            same = int((ours[:length] == theirs[:length]).int().cumprod(0).sum())
            yield row | {"same_tokens": same}


@contextmanager
def unspied(tts: Any) -> Iterator[None]:
    """As if each call of the release were a model's first."""
    try:
        yield
    finally:
        remove_spies(tts.t3.tfmr)


def measured(options: argparse.Namespace) -> Iterator[Row]:
    """All rows of the release that is importable here."""
    for variant in options.variants:
        tts = load(options.model, variant=variant, device=options.device, watermark=False)
        facts = {"variant": variant, "release": str(release()), "transformers": transformers.__version__}
        parts = {"calls": partial(calls, tts)} if variant in ASKING else {}
        if options.costs:
            language = {"language": "en"} if variant_of(tts).multilingual else {}
            streamed = tts, KINDS[variant], options.stream_tokens, options.rounds, language
            parts["t3"] = partial(t3_costs, tts, options.tokens, options.rounds)
            if variant in STREAMED:
                parts["streams"] = partial(living_streams.costs, *streamed)
        for part, rows in parts.items():
            with quiet():
                for row in rows():
                    yield facts | {"part": part} | row


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of ``chatterbox-lab living``."""
    command.add_model(parser, models="tiny, random")
    command.add_device(parser)
    add = partial(parser.add_argument, metavar="X")
    add("--releases", nargs="+", default=list(OVERLAYS), choices=OVERLAYS, help="%(choices)s (default: all)")
    add("--variants", nargs="+", default=list(KINDS), choices=KINDS, help="%(choices)s (default: all)")
    add("--tokens", type=int, default=24, help="speech tokens of each measured call of T3 (default: %(default)s)")
    add("--stream-tokens", type=int, default=100, help="speech tokens of each stream (default: %(default)s)")
    add("--rounds", type=int, default=3, help="measured rounds, after one to warm up (default: %(default)s)")
    parser.add_argument("--costs", action="store_true", help=f"also what T3 and streams cost, of {_COSTLY!r} alone")
    parser.add_argument("--here", action="store_true", help="print, as JSON, the rows of the release importable here")
    command.add_record(parser, "living_MODEL.csv")


def run(options: argparse.Namespace) -> int:
    """Measures the releases, each in its own process; returns 1 where one could not be measured."""
    for name, least in (("tokens", 2), ("stream_tokens", 2), ("rounds", 1)):
        whole_number(name, getattr(options, name), least)
    if options.here:
        for row in measured(options):
            print(json.dumps(row), flush=True)
        return 0
    device = pick_device(options.device)
    if torch.device(device).type not in ("cpu", "cuda"):
        raise ValueError(f"device={device!r}: must be cpu or cuda")
    record = command.open_record(options, f"living_{command.model_name(options)}.csv")
    facts = machine_facts(device) | {"model": Path(options.model).name, "dtype": "float32"}
    record.check(facts)
    failed = []
    for name in options.releases:
        if any(row["overlay"] == name for row in record.rows):
            continue
        try:
            record.add([facts | {"overlay": name} | row for row in _in_overlay(name, options)])
        except RuntimeError as error:
            failed.append(f"{name}: {error}")
    print(summary(record.table()).to_string(float_format="%.3g"))
    print("\n".join(failed), file=sys.stderr)
    print(f"{len(record.rows)} rows are in {record.finish().name}.")
    return int(bool(failed))


def _in_overlay(name: str, options: argparse.Namespace) -> list[Row]:
    wanted = [sys.executable, "-m", "chatterbox_lab", "living", "--here", "--model", options.model]
    wanted += ["--device", pick_device(options.device)]
    variants = [it for it in options.variants if it in ASKING or (options.costs and name == _COSTLY)]
    wanted += ["--tokens", str(options.tokens), "--rounds", str(options.rounds)]
    wanted += ["--stream-tokens", str(options.stream_tokens)]
    wanted += ["--costs"] * (options.costs and name == _COSTLY)
    rows = []
    with tqdm(desc=name, unit="row") as bar:
        for variant in variants:  # each in a process of its own: no model runs in what another has left
            command, given = [*wanted, "--variants", variant], {"env": environment(name), "cwd": REPOSITORY}
            with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, **given) as process:
                for line in process.stdout:
                    if line.startswith("{"):
                        rows.append(json.loads(line))
                        bar.update()
            if process.returncode:
                raise RuntimeError(f"{variant} ended with status {process.returncode}, see above")
    return rows


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """Medians of part ``t3`` by release, variant and way: ``ms/token``, ``faster`` than the release, ``same tokens``.

    Where nothing was timed, the state after the last call of each way instead.
    """
    timed = table[table["part"] == "t3"]
    if timed.empty:
        last = table[table["part"] == "calls"].groupby(["overlay", "variant", "way"], sort=False).last()
        return last[["release", "call", "hooks", "maps", "attention", "manual", "sdpa"]]
    return costs(table)


def costs(table: pd.DataFrame) -> pd.DataFrame:
    """Medians of part ``t3``, by variant and way; ratios are within rounds (median, least and most)."""
    rows = table[(table["part"] == "t3") & (table["round"] >= 0)].set_index(["variant", "round"])
    stock = rows[rows["way"] == STOCK]["seconds"]
    grouped = rows.assign(faster=stock.reindex(rows.index) / rows["seconds"]).groupby(["variant", "way"], sort=False)
    columns = {
        "ms/token": 1e3 * grouped["seconds"].median(),
        "faster": grouped["faster"].median(),
        "least": grouped["faster"].min(),
        "most": grouped["faster"].max(),
        "same tokens": grouped["same_tokens"].min().astype(int),
        "of": grouped["tokens"].max().astype(int),
    }
    return pd.DataFrame(columns)


def after_calls(table: pd.DataFrame) -> pd.DataFrame:
    """Part ``calls`` in one table: what each call left and ran, by release, transformers, variant, way and call."""
    rows = table[(table["part"] == "calls") & (table["call"] > 0)]
    index = ["release", "transformers", "variant", "way", "call"]
    return rows.astype({"call": int}).set_index(index)[["hooks", "maps", "attention", "manual", "sdpa"]]
