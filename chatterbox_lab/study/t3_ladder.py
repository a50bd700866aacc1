"""From the released decoding loop to the memory bandwidth, rung by rung: what a token costs, and what it changes.

``python -m chatterbox_lab t3 --help`` is the command line; it needs no Jupyter.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache, partial
from itertools import islice
from typing import Any

import pandas as pd
import torch
from chatterbox.tts import ChatterboxTTS
from torch.profiler import ProfilerActivity, profile
from tqdm.auto import tqdm

from ..engine import linears
from ..engine.request import checked
from ..engine.settings import whole_number
from ..engine.t3.backends import Stepper
from ..engine.t3.decode import conditioning, prompt, stepper_of, tokens
from ..files import attribute
from ..voices.load import load, pick_device
from . import ladder
from .ladder import STOCK, Part, Row, chosen
from .logs import quiet, quiet_profiler
from .machine import read_seconds, step_bytes
from .records import Record
from .upstream import upstream_steps

TEXT = "The quick brown fox reads a long sentence to the lazy dog."
GROUP = 8
"""Tokens that are timed together: as many as a GPU is given before the host looks at them."""
_NO_CHUNKS = 1000
_EARLY, _LATE = 80, 800


@dataclass(frozen=True)
class Rung(ladder.Rung):
    """One way to decode. ``plain`` leaves the products to F.linear."""

    dtype: str = "float32"
    plain: bool = False

    def products(self) -> AbstractContextManager[None]:
        """The rung's products, for as long as the context lasts."""
        return attribute(linears, "FEW", 0) if self.plain else nullcontext()


def rungs(device: str) -> list[Rung]:
    """The ladder of a device, from the released loop upwards."""
    static, kind = {"backend": "static"}, torch.device(device).type
    first = [
        Rung(STOCK, STOCK),
        Rung("no attention maps", STOCK, {"backend": "hf"}),
        Rung("static KV cache", "no attention maps", static, plain=True),
    ]
    if kind == "cuda":
        graph = {"backend": "graph"}
        return [
            *first,
            Rung("fused projections", "static KV cache", static),
            Rung("compiled", "fused projections", {"backend": "compile"}),
            Rung("CUDA graph", "fused projections", graph),
            Rung("CUDA graph, probe", "CUDA graph", graph | {"analyzer": "probe"}),
            Rung("CUDA graph, bfloat16", "CUDA graph", graph, dtype="bfloat16"),
        ]
    found = [
        *first,
        Rung("two-row products", "static KV cache", static),
        Rung("two-row products, probe", "two-row products", static | {"analyzer": "probe"}),
        Rung("compiled", "two-row products", {"backend": "compile"}),
        Rung("bfloat16", "two-row products", static, dtype="bfloat16"),
    ]
    return [*found, Rung("int8", "bfloat16", static | {"weights": "int8"})] if kind == "cpu" else found


class Ladder:
    """The models of a ladder, and its rungs started together.

    Args:
        model: as for `load`; loaded once a dtype, with the same weights.
        device: where.
        names: the rungs to climb; None is all of the device's. The released loop is always among them.
        seed: of random weights and of the sampling.
        text: what is said.

    Raises:
        ValueError: an unknown rung, or a text that does not fit.
    """

    def __init__(
        self, model: str, device: str, names: Sequence[str] | None = None, seed: int = 0, text: str = TEXT
    ) -> None:
        self.rungs = chosen(rungs(device), names)
        self.device, self.seed, self.text = device, seed, text
        self.models: dict[str, ChatterboxTTS] = {}
        for dtype in dict.fromkeys(rung.dtype for rung in self.rungs):
            self.models[dtype] = load(model, device=device, dtype=dtype, seed=seed, watermark=False)
            checked(self.models[dtype], text)
        self._read_seconds = cache(partial(read_seconds, device=device))

    def tokens(self, rung: Rung, count: int) -> Iterator[torch.Tensor]:
        """The tokens that a rung says, one at a time."""
        tts, fixed = self.models[rung.dtype], {"seed": self.seed, "max_new_tokens": count, "ignore_eos": True}
        if rung.name == STOCK:
            return upstream_steps(tts, self.text, **fixed)
        return tokens(tts, checked(tts, self.text, rung.settings(chunk_size=_NO_CHUNKS), **fixed))

    def climb(self, count: int, number: int = 0, names: Sequence[str] | None = None) -> list[Row]:
        """Lets all rungs say the same text side by side, a group of tokens each in turn.

        Returns:
            The rows of this round: ``rung``, ``round``, ``phase`` (``prefill`` is up to the first token, ``step`` what
            follows), ``first`` (index of the first token of the group), ``tokens``, ``seconds`` of the group; with
            ``first`` 0 also ``same_tokens``, how many of the ``count`` are as the first rung says them before the
            first that is not; ``asked_tokens`` is that count.
        """
        rungs = {rung.name: rung for rung in chosen(self.rungs, names, always=())}
        streams = {name: self.tokens(rung, count) for name, rung in rungs.items()}
        makers = {name: partial(_next, rung, streams[name]) for name, rung in rungs.items()}
        said: dict[str, list[torch.Tensor]] = {name: [] for name in rungs}
        sizes = [1] + [GROUP] * -(-(count - 1) // GROUP)
        rows = []
        try:
            for _, made in ladder.side_by_side(makers, sizes, self.device, f"round {number}", number):
                for name, (group, seconds) in made.items():
                    first = len(said[name])
                    said[name] += group
                    facts = {"rung": name, "dtype": rungs[name].dtype, "round": number}
                    facts |= {"phase": "step" if first else "prefill", "first": first, "tokens": len(group)}
                    rows.append(facts | {"seconds": seconds})
        finally:
            for stream in streams.values():
                stream.close()
        spoken = {name: torch.cat(tokens).cpu() for name, tokens in said.items()}
        reference = next(iter(spoken.values()))
        for row in rows:
            if row["first"] == 0:
                row["same_tokens"] = int((spoken[row["rung"]] == reference).int().cumprod(0).sum())
            row["asked_tokens"] = count
        return rows

    def about(self, count: int) -> list[Row]:
        """A row a rung of what is measured once; ``count`` tokens show how far its logits deviate.

        Returns:
            ``rung``, ``below``, ``dtype``, and what `ladder.first_use`, `limits`, `deviations` and `shares` say.
        """
        names = [{"below": rung.below, "rung": rung.name, "dtype": rung.dtype} for rung in self.rungs]
        first_uses = [
            ladder.first_use(lambda rung=rung: _next(rung, self.tokens(rung, 3), 3), self.device)
            for rung in tqdm(self.rungs, "first uses", leave=False)
        ]
        parts = zip(names, first_uses, map(self.limits, self.rungs), self.deviations(count), strict=True)
        rows = [name | use | limit | deviation for name, use, limit, deviation in parts]
        return [row | self.shares(rung) for row, rung in zip(rows, self.rungs, strict=True)]

    def limits(self, rung: Rung) -> Row:
        """``bytes`` of weights that a rung's step reads, and ``limit_seconds`` to read so much once.

        ``cache_bytes`` are read besides for each position before, the ``prompt`` positions among them.
        """
        t3 = self.models[rung.dtype].t3
        itemsize, size = t3.speech_head.weight.element_size(), step_bytes(t3)
        if rung.changes.get("weights") == "int8":
            size //= itemsize
        kept = 4 if torch.device(self.device).type == "cpu" else itemsize  # as `StaticT3` keeps them
        cache = 2 * 2 * len(t3.tfmr.layers) * t3.dim * kept  # keys and values of both CFG rows
        prompt = self._prompt(rung)[0].shape[1]
        return {"bytes": size, "limit_seconds": self._read_seconds(size), "cache_bytes": cache, "prompt": prompt}

    def deviations(self, count: int) -> list[Row]:
        """How far each rung's logits are from those of ``no attention maps`` in float32, along the same tokens.

        Returns:
            By rung, nothing for the released loop: ``logits_error`` (norm of the difference over the norm, of the codes
            that can be sampled), ``same_best`` (share of the positions where the likeliest code is the same).
        """
        codes = torch.cat(list(self.tokens(self.rungs[0], count)))
        reference = self._logits(Rung("", "", {"backend": "hf"}), codes)

        def deviation(logits: torch.Tensor) -> Row:
            best = (logits.argmax(-1) == reference.argmax(-1)).float().mean()
            return {"logits_error": float((logits - reference).norm() / reference.norm()), "same_best": float(best)}

        climbed = tqdm(self.rungs[1:], "deviations", leave=False)
        return [{}, *(deviation(self._logits(rung, codes)) for rung in climbed)]

    @torch.inference_mode()
    def shares(self, rung: Rung, steps: int = 8) -> Row:
        """Of a rung of static steps, seconds a step in ``products``, ``attention`` and ``rest``; nothing of others.

        By PyTorch's profiler, of the host's operators, each without those it calls; ``rest`` also has what lies
        between them. On a GPU that is the time to launch them.
        """
        if rung.changes.get("backend") != "static":
            return {}
        with self._stepper(rung, steps + 1) as (stepper, logits):
            for position in range(2):
                stepper.pick(logits(position))
            with quiet(), quiet_profiler(), profile(activities=[ProfilerActivity.CPU]) as profiler:
                start = time.perf_counter()
                for position in range(2, steps + 1):
                    stepper.pick(logits(position))
                whole = time.perf_counter() - start
        spent = dict.fromkeys(("products", "attention"), 0.0)
        for event in profiler.key_averages():
            kind = _kind(event.key)
            if kind:
                spent[kind] += event.self_cpu_time_total / 1e6
        spent["rest"] = whole - sum(spent.values())
        return {name: value / (steps - 1) for name, value in spent.items()}

    @torch.inference_mode()
    def _logits(self, rung: Rung, codes: torch.Tensor) -> torch.Tensor:
        hp, found = self.models[rung.dtype].t3.hp, []
        with self._stepper(rung, len(codes)) as (stepper, logits):
            for position, code in enumerate(codes):
                found.append(logits(position)[:, : hp.stop_speech_token].float().cpu())
                stepper.say(code.view(1, 1))
        return torch.stack(found)[..., : hp.start_speech_token]

    @contextmanager
    def _stepper(self, rung: Rung, steps: int) -> Iterator[tuple[Stepper, Callable[[int], torch.Tensor]]]:
        """T3 on a rung, with room for so many tokens, and what gives the logits (2, V) of each position in turn."""
        t3, (embeds, text) = self.models[rung.dtype].t3, self._prompt(rung)
        settings = rung.settings(chunk_size=_NO_CHUNKS, ignore_eos=True)
        with rung.products(), stepper_of(t3, settings, text, embeds.shape[1] + steps) as stepper:
            yield stepper, lambda number: stepper.step(number) if number else stepper.prefill(embeds, text[0])

    @torch.inference_mode()
    def _prompt(self, rung: Rung) -> tuple[torch.Tensor, tuple[int, int]]:
        tts = self.models[rung.dtype]
        request = checked(tts, self.text)
        return prompt(tts.t3, conditioning(tts, request.settings.exaggeration), request.text_tokens)


def _next(rung: Rung, stream: Iterator[torch.Tensor], count: int) -> list[torch.Tensor]:
    with rung.products():
        return list(islice(stream, count))


def _kind(operator: str) -> str | None:
    if operator.endswith(("::mm", "::addmm", "::_linear_pointwise", "::linear_dynamic")):
        return "products"
    if "dot_product" in operator or operator.endswith(("_attention_forward", "::bmm", "::_softmax")):
        return "attention"
    return None


def measure(
    climb: Ladder,
    tokens: int,
    rounds: int,
    *,
    long: int = 0,
    long_rungs: Sequence[str] | None = None,
    record: Record | None = None,
    facts: Mapping[str, Any] | None = None,
) -> pd.DataFrame:
    """Measures a ladder, without what its record holds already, and returns all rows.

    Args:
        climb: what to climb.
        tokens: tokens a rung and round.
        rounds: measured rounds, after one to warm up.
        long: tokens of one long run besides; 0 for none.
        long_rungs: the rungs of the long run; None is all.
        record: where each part's rows go as soon as they are there.
        facts: what every row says besides, such as the machine.

    Returns:
        Rows with ``run`` and ``round``: ``about`` has `Ladder.about`, ``short`` the rounds of `Ladder.climb`, ``long``
        the long run.
    """
    parts: list[Part] = [({"run": "about", "round": 0}, partial(climb.about, tokens))]
    for number in range(-1, rounds):  # the first warms up
        parts.append(({"run": "short", "round": number}, partial(climb.climb, tokens, number)))
    if long:
        parts.append(({"run": "long", "round": 0}, partial(climb.climb, long, names=long_rungs)))
    due = ladder.due(parts, record.rows if record else [])
    if due and len(due) < len(parts):
        climb.climb(tokens)  # warms up a process that goes on with what another began
    if long and torch.device(climb.device).type == "cuda" and parts[-1] in due:
        climb.climb(long, names=long_rungs)  # whatever a longer text captures or plans first
    return ladder.measure(due, record, facts)


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """The ladder in one table, a row a rung, out of one machine's record.

    Returns:
        Indexed by rung: ``ms/token`` (median over groups), ``to below`` and ``to stock`` (median of the ratios within
        the same group of the same round: above 1 is faster), ``range`` (quartiles of the latter), ``limit (ms)``
        (reading its weights once), ``share of limit`` (limit over time: 1 is as fast as memory allows), ``prefill
        (s)``, ``first use (s)`` (once), ``same tokens``, ``logits error``.
    """
    short = table[(table["run"] == "short") & (table["round"] >= 0)]
    steps = short[short["phase"] == "step"]
    each = steps.assign(each=steps["seconds"] / steps["tokens"])
    times = each.pivot_table(index=["round", "first"], columns="rung", values="each")
    times = times[[name for name in dict.fromkeys(table["rung"]) if name in times]]
    once, first = table.groupby("rung"), short[short["phase"] == "prefill"].groupby("rung")
    ratios = ladder.compared(times, once["below"].first().to_dict(), spread=(0.25, 0.75))
    limit, least, most = once["limit_seconds"].first(), first["same_tokens"].min(), first["asked_tokens"].max()
    columns = {
        "ms/token": 1e3 * times.median(),
        **ratios,
        "limit (ms)": 1e3 * limit,
        "share of limit": limit / times.median(),
        "prefill (s)": first["seconds"].median(),
        "first use (s)": once["first_use_seconds"].max(),
        "same tokens": least.astype(int).astype(str) + " of " + most.astype(int).astype(str),
        "logits error": once["logits_error"].max(),
    }
    return pd.DataFrame(columns).loc[list(times)].rename_axis("rung")


def growth(table: pd.DataFrame) -> pd.DataFrame:
    """Milliseconds a token by index of the token (down) and rung (across), of the long run."""
    steps = table[(table["run"] == "long") & (table["phase"] == "step")]
    each = steps.assign(ms=1e3 * steps["seconds"] / steps["tokens"])
    return each.pivot_table(index="first", columns="rung", values="ms")[list(dict.fromkeys(steps["rung"]))]


def late_over_early(table: pd.DataFrame) -> pd.Series:
    """Cost of the 800th token over the 80th, by rung; nan where the long run is shorter (see `ladder`)."""
    return ladder.late_over_early(growth(table), _EARLY, _LATE, around=40)


def bytes_late_over_early(table: pd.DataFrame) -> pd.Series:
    """The same by count: bytes of weights and cache that the two steps read, by rung."""
    about = table[table["run"] == "about"].set_index("rung")
    reads = [about["bytes"] + about["cache_bytes"] * (about["prompt"] + place) for place in (_LATE, _EARLY)]
    return reads[0] / reads[1]


def add_options(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    ladder.add_options(parser, "ladder_MODEL_DEVICE.csv", piece="token")
    add = parser.add_argument
    add("--tokens", metavar="X", type=int, default=41, help="tokens a round (default: %(default)s)")
    add("--long-rungs", metavar="X", nargs="+", help="the rungs of the long speech (default: all)")
    add("--text", metavar="X", default=TEXT, help="what is said")


def run(options: argparse.Namespace) -> int:
    """Times T3's decoding, all rungs side by side; every group of tokens is a row of a CSV."""
    asked = whole_number("tokens", options.tokens, 2 * GROUP + 1, _NO_CHUNKS)
    rounds, long = whole_number("rounds", options.rounds, 1), whole_number("long", options.long, 0, _NO_CHUNKS)
    device = pick_device(options.device)
    record, facts = ladder.begin(options, "ladder", device, text=options.text)
    climb = Ladder(options.model, device, options.rungs, text=options.text)
    chosen(climb.rungs, options.long_rungs)
    table = measure(climb, asked, rounds, long=long, long_rungs=options.long_rungs, record=record, facts=facts)
    path = record.finish()
    print(summary(table).to_string(float_format="%.3g"))
    late = late_over_early(table).dropna().round(2) if long else []
    if len(late):
        print("\nthe 800th token over the 80th:", late.to_dict())
    print(f"\n{len(table)} rows are in {path.name}.")
    return 0
