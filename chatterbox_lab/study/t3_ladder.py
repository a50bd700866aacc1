"""From the released decoding loop to the memory bandwidth, rung by rung: what a token costs, and what it changes.

``python -m chatterbox_lab.study.t3_ladder --help`` is the command line; it needs no Jupyter.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from chatterbox.tts import ChatterboxTTS
from torch.profiler import ProfilerActivity, profile
from tqdm.auto import tqdm

from ..engine.clock import memory_in_use, synchronize
from ..engine.linears import plain_products
from ..engine.settings import StreamSettings, whole_number
from ..engine.stream import conditioning, encode_text
from ..engine.t3.attention import FORK_HEADS
from ..engine.t3.decode import decode, prompt, step_bytes, stepper_of
from ..voices.load import load, pick_device
from .logs import quiet
from .machine import machine_facts, read_seconds
from .records import Record, output_folder
from .upstream import upstream_steps

STOCK = "stock"
TEXT = "The quick brown fox reads a long sentence to the lazy dog."
GROUP = 8
"""Tokens that are timed together: as many as a GPU is given before the host looks at them."""
_NO_CHUNKS = 1000


@dataclass(frozen=True)
class Rung:
    """One way to decode. ``below`` is the rung that it is compared with; ``plain`` leaves the products to F.linear."""

    name: str
    below: str
    dtype: str = "float32"
    settings: dict[str, str] = field(default_factory=dict)
    plain: bool = False


def rungs(device: str) -> list[Rung]:
    """The ladder of a device, from the released loop upwards."""
    static, stock = {"backend": "static"}, Rung(STOCK, STOCK)
    off = Rung("no attention maps", STOCK, settings={"backend": "hf"})
    cache = Rung("static KV cache", off.name, settings=static, plain=True)
    if torch.device(device).type == "cuda":
        graph = {"backend": "graph"}
        return [
            stock,
            off,
            cache,
            Rung("fused projections", cache.name, settings=static),
            Rung("compiled", "fused projections", settings={"backend": "compile"}),
            Rung("CUDA graph", "fused projections", settings=graph),
            Rung("CUDA graph, probe", "CUDA graph", settings=graph | {"analyzer": "probe"}),
            Rung("CUDA graph, bfloat16", "CUDA graph", "bfloat16", graph),
        ]
    ladder = [
        stock,
        off,
        cache,
        Rung("two-row products", cache.name, settings=static),
        Rung("two-row products, probe", "two-row products", settings=static | {"analyzer": "probe"}),
        Rung("compiled", "two-row products", settings={"backend": "compile"}),
        Rung("bfloat16", "two-row products", "bfloat16", static),
    ]
    int8 = Rung("int8", "bfloat16", settings=static | {"weights": "int8"})
    return [*ladder, int8] if torch.device(device).type == "cpu" else ladder


def chosen_rungs(known: Sequence[Rung], names: Sequence[str] | None) -> list[Rung]:
    """The rungs of these names, in the ladder's order; None is all. Raises ValueError for an unknown name."""
    for name in names or ():
        if name not in {rung.name for rung in known}:
            raise ValueError(f"rungs={name!r}: must be among {', '.join(rung.name for rung in known)}")
    return [rung for rung in known if not names or rung.name in names]


class Ladder:
    """The models of a ladder, and its rungs started together.

    Args:
        model: as for `models.load`; loaded once a dtype, with the same weights.
        device: where.
        names: the rungs to climb; None is all of the device's. The released loop is always among them.
        seed: of random weights and of the sampling.

    Raises:
        ValueError: an unknown rung, or a text that does not fit.
    """

    def __init__(
        self, model: str, device: str, names: Sequence[str] | None = None, seed: int = 0, text: str = TEXT
    ) -> None:
        self.rungs = chosen_rungs(rungs(device), names and [STOCK, *names])
        self.device, self.seed, self.text = device, seed, text
        self.models: dict[str, ChatterboxTTS] = {}
        for dtype in dict.fromkeys(rung.dtype for rung in self.rungs):
            self.models[dtype] = load(model, device=device, dtype=dtype, seed=seed, watermark=False)
            encode_text(self.models[dtype], text)
        self.prompt = self._prompt(next(iter(self.models.values())))[0].shape[1]
        """Positions of the prompt: the voice, the text and the start of speech."""

    @torch.inference_mode()
    def _prompt(self, tts: ChatterboxTTS) -> tuple[torch.Tensor, tuple[int, int]]:
        return prompt(tts.t3, conditioning(tts, StreamSettings().exaggeration), encode_text(tts, self.text))

    def tokens(self, rung: Rung, count: int) -> Iterator[torch.Tensor]:
        """The tokens that a rung says, one at a time."""
        tts = self.models[rung.dtype]
        if rung.name == STOCK:
            return upstream_steps(tts, self.text, seed=self.seed, max_new_tokens=count, ignore_eos=True)
        settings = self.settings(rung)
        generator = torch.Generator(tts.t3.device).manual_seed(self.seed)
        given = conditioning(tts, settings.exaggeration), encode_text(tts, self.text), settings
        return decode(tts.t3, *given, generator=generator, max_new_tokens=count)

    def settings(self, rung: Rung) -> StreamSettings:
        """What a rung asks of `decode`."""
        return StreamSettings(chunk_size=_NO_CHUNKS, ignore_eos=True, **rung.settings)

    def climb(self, count: int, number: int = 0, names: Sequence[str] | None = None) -> list[dict[str, Any]]:
        """Lets all rungs say the same text side by side, a group of tokens each in turn.

        Returns:
            The rows of this round: ``rung``, ``round``, ``phase`` (``prefill`` is up to the first token, ``step`` what
            follows), ``first`` (index of the first token of the group), ``tokens``, ``seconds`` of the group; with
            ``first`` 0 also ``same_tokens``, how many of the ``count`` are as the first rung says them before the
            first that is not.
        """
        rungs = chosen_rungs(self.rungs, names)
        streams = {rung.name: self.tokens(rung, count) for rung in rungs}
        said: dict[str, list[torch.Tensor]] = {rung.name: [] for rung in rungs}
        rows = []
        try:
            for turn, first in enumerate(tqdm([0, *range(1, count, GROUP)], f"round {number}", leave=False)):
                for rung in rungs[:: -1 if (turn + number) % 2 else 1]:  # to and fro
                    start = time.perf_counter()
                    with plain_products() if rung.plain else nullcontext():
                        group = list(islice(streams[rung.name], GROUP if first else 1))
                        synchronize(self.device)
                    seconds = time.perf_counter() - start
                    said[rung.name] += group
                    phase = "step" if first else "prefill"
                    facts = {"rung": rung.name, "dtype": rung.dtype, "round": number, "phase": phase}
                    rows.append(facts | {"first": first, "tokens": len(group), "seconds": seconds})
        finally:
            for stream in streams.values():
                stream.close()
        spoken = {name: torch.cat(tokens).cpu() for name, tokens in said.items()}
        for row in rows:
            if row["first"] == 0:
                row["same_tokens"] = int((spoken[row["rung"]] == spoken[rungs[0].name]).int().cumprod(0).sum())
        return rows

    def first_uses(self) -> list[dict[str, Any]]:
        """A row a rung: ``first_use_seconds``, what its first use costs once (packing, compiling, capturing).

        That is beyond what the rungs before it have made already, the first of all pays for the process's own start,
        and a compilation may be found in PyTorch's cache on disk. ``kept_bytes`` is by how much more memory is held
        afterwards: by the allocator on a GPU, by the process elsewhere.
        """
        rows = []
        for rung in tqdm(self.rungs, "first uses", leave=False):
            before, took = _held(self.device), []
            for _ in range(2):
                start = time.perf_counter()
                list(self.tokens(rung, 3))
                synchronize(self.device)
                took.append(time.perf_counter() - start)
            kept = _held(self.device) - before
            uses = {"first_use_seconds": took[0] - took[1], "kept_bytes": kept}
            rows.append({"rung": rung.name, "dtype": rung.dtype} | uses)
        return rows

    def deviations(self, count: int) -> list[dict[str, Any]]:
        """How far each rung's logits are from those of ``no attention maps`` in float32, along the same tokens.

        Returns:
            A row a rung: ``logits_error`` (norm of the difference over the norm, of the codes that can be sampled),
            ``same_best`` (share of the positions where the likeliest code is the same).
        """
        codes = torch.cat(list(self.tokens(self.rungs[0], count)))
        reference = self._logits(Rung("", "", settings={"backend": "hf"}), codes)
        rows = []
        for rung in tqdm([rung for rung in self.rungs if rung.name != STOCK], "deviations", leave=False):
            logits = self._logits(rung, codes)
            error = float((logits - reference).norm() / reference.norm())
            best = float((logits.argmax(-1) == reference.argmax(-1)).float().mean())
            rows.append({"rung": rung.name, "dtype": rung.dtype, "logits_error": error, "same_best": best})
        return rows

    @torch.inference_mode()
    def _logits(self, rung: Rung, codes: torch.Tensor) -> torch.Tensor:
        tts, settings = self.models[rung.dtype], self.settings(rung)
        embeds, text = self._prompt(tts)
        stop, found = tts.t3.hp.stop_speech_token, []
        with (
            plain_products() if rung.plain else nullcontext(),
            stepper_of(tts.t3, settings, text, embeds.shape[1] + len(codes), FORK_HEADS) as stepper,
        ):
            for position in range(len(codes)):
                logits = stepper.step(position) if position else stepper.prefill(embeds, text[0])
                found.append(logits[:, :stop].float().cpu())
                stepper.say(codes[position].view(1, 1))
        return torch.stack(found)[..., : tts.t3.hp.start_speech_token]

    def shares(self) -> list[dict[str, Any]]:
        """A row a rung of static steps: seconds a step in ``products``, ``attention`` and ``rest``.

        By PyTorch's profiler, of the host's operators, each without those it calls; ``rest`` also has what lies
        between them. On a GPU that is the time to launch them.
        """
        return [self._shares(rung) for rung in self.rungs if rung.settings.get("backend") == "static"]

    @torch.inference_mode()
    def _shares(self, rung: Rung, steps: int = 8) -> dict[str, Any]:
        tts, settings = self.models[rung.dtype], self.settings(rung)
        embeds, text = self._prompt(tts)
        with (
            plain_products() if rung.plain else nullcontext(),
            stepper_of(tts.t3, settings, text, embeds.shape[1] + steps + 1, FORK_HEADS) as stepper,
        ):
            stepper.pick(stepper.prefill(embeds, text[0]))
            stepper.pick(stepper.step(1))
            with quiet(), profile(activities=[ProfilerActivity.CPU]) as profiler:
                start = time.perf_counter()
                for position in range(2, steps + 1):
                    stepper.pick(stepper.step(position))
                whole = time.perf_counter() - start
        spent = dict.fromkeys(("products", "attention"), 0.0)
        for event in profiler.key_averages():
            kind = _kind(event.key)
            if kind:
                spent[kind] += event.self_cpu_time_total / 1e6
        spent["rest"] = whole - sum(spent.values())
        return {"rung": rung.name, "dtype": rung.dtype} | {name: value / (steps - 1) for name, value in spent.items()}

    def limits(self) -> list[dict[str, Any]]:
        """A row a rung: ``bytes`` of weights that its step reads, and ``limit_seconds`` to read so much once.

        ``cache_bytes`` are read besides for each position before, the ``prompt`` positions among them.
        """
        rows, taken = [], {}
        for rung in self.rungs:
            t3 = self.models[rung.dtype].t3
            itemsize, size = t3.speech_head.weight.element_size(), step_bytes(t3)
            if rung.settings.get("weights") == "int8":
                size //= itemsize
            if size not in taken:
                taken[size] = read_seconds(size, self.device)
            kept = 4 if torch.device(self.device).type == "cpu" else itemsize  # as `StaticT3` keeps them
            cache = 2 * 2 * len(t3.tfmr.layers) * t3.dim * kept  # keys and values of both CFG rows
            found = {"bytes": size, "limit_seconds": taken[size], "cache_bytes": cache, "prompt": self.prompt}
            rows.append({"rung": rung.name, "dtype": rung.dtype} | found)
        return rows


def _held(device: str) -> int:
    """Bytes that the process holds: on CUDA in the allocator once what is free is given back."""
    if torch.device(device).type != "cuda":
        return memory_in_use(device)
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved(device)


def _kind(operator: str) -> str | None:
    if operator.endswith(("::mm", "::addmm", "::_linear_pointwise", "::linear_dynamic")):
        return "products"
    if "dot_product" in operator or operator.endswith(("_attention_forward", "::bmm", "::_softmax")):
        return "attention"
    return None


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
    names = [name for name in dict.fromkeys(table["rung"]) if name in times]
    below = table.dropna(subset=["below"]).drop_duplicates("rung").set_index("rung")["below"]
    rows = {}
    for name in names:
        own = table[table["rung"] == name]
        speedup = times[STOCK] / times[name]
        low, high = speedup.quantile([0.25, 0.75])
        limit = own["limit_seconds"].dropna().iloc[0]
        ratio = times[below[name]] / times[name] if below[name] in times else pd.Series(dtype=float)
        first = own[(own["phase"] == "prefill") & (own["run"] == "short") & (own["round"] >= 0)]
        rows[name] = {
            "ms/token": 1e3 * times[name].median(),
            "to below": ratio.median(),
            "to stock": speedup.median(),
            "range": f"{low:.2f} to {high:.2f}",
            "limit (ms)": 1e3 * limit,
            "share of limit": limit / times[name].median(),
            "prefill (s)": first["seconds"].median(),
            "first use (s)": own["first_use_seconds"].max(),
            "same tokens": f"{int(first['same_tokens'].min())} of {int(first['asked_tokens'].max())}",
            "logits error": own["logits_error"].max(),
        }
    found = pd.DataFrame.from_dict(rows, orient="index").rename_axis("rung")
    found.loc[STOCK, "to below"] = 1.0
    return found


def growth(table: pd.DataFrame) -> pd.DataFrame:
    """Milliseconds a token by index of the token (down) and rung (across), of the long run."""
    steps = table[(table["run"] == "long") & (table["phase"] == "step")]
    each = steps.assign(ms=1e3 * steps["seconds"] / steps["tokens"])
    return each.pivot_table(index="first", columns="rung", values="ms")[list(dict.fromkeys(steps["rung"]))]


def late_over_early(times: pd.DataFrame, early: int = 80, late: int = 800, around: int = 40) -> pd.Series:
    """Cost of the ``late``-th token over the ``early``-th, by rung; medians over the tokens ``around`` each."""
    index = times.index.to_series()
    near = [times[(index - place).abs() <= around].median() for place in (late, early)]
    return near[0] / near[1]


def bytes_late_over_early(table: pd.DataFrame, early: int = 80, late: int = 800) -> pd.Series:
    """The same by count: bytes of weights and cache that the two steps read, by rung."""
    about = table[table["run"] == "about"].set_index("rung")
    reads = [about["bytes"] + about["cache_bytes"] * (about["prompt"] + place) for place in (late, early)]
    return reads[0] / reads[1]


def parser() -> argparse.ArgumentParser:
    """The command line's arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m chatterbox_lab.study.t3_ladder",
        description="Time T3's decoding rung by rung, all rungs side by side; every group of tokens is a row of a CSV.",
    )
    add = partial(parser.add_argument, metavar="X")
    add("--model", default="tiny", help="tiny, random, pretrained or a voice folder (default: %(default)s)")
    add("--device", default="auto", help="auto, cuda, mps or cpu (default: %(default)s)")
    add("--rungs", nargs="+", help="only these, beside the released loop (default: all; see the table printed)")
    add("--tokens", type=int, default=41, help="tokens a round (default: %(default)s)")
    add("--rounds", type=int, default=3, help="measured rounds, after one to warm up (default: %(default)s)")
    add("--long", type=int, default=0, help="tokens of one long run besides, to see the cost grow (default: none)")
    add("--long-rungs", nargs="+", help="the rungs of the long run (default: all)")
    add("--text", default=TEXT, help="what is said")
    add("--output", type=Path, help="CSV to write (default: build/data/ladder_MODEL_DEVICE.csv)")
    parser.add_argument("--resume", action="store_true", help="go on with an interrupted measurement")
    return parser


def measured(
    ladder: Ladder,
    tokens: int,
    rounds: int,
    *,
    long: int = 0,
    long_rungs: Sequence[str] | None = None,
    done: Collection[tuple[str, int]] = (),
) -> Iterator[list[dict[str, Any]]]:
    """Measures a ladder part by part, and yields each part's rows.

    Args:
        ladder: what to climb.
        tokens: tokens a rung and round.
        rounds: measured rounds, after one to warm up.
        long: tokens of one long run besides; 0 for none.
        long_rungs: the rungs of the long run; None is all.
        done: ``run`` and ``round`` of the parts that need not be measured.

    Yields:
        Rows with ``run`` and ``round``: ``about`` has a row a rung of what is measured once (`Ladder.limits`,
        ``first_uses``, ``deviations``, ``shares``), ``short`` the rounds of `Ladder.climb`, ``long`` the long run.
    """
    if ("about", 0) not in done:
        about = {rung.name: {"below": rung.below} for rung in ladder.rungs}
        for part in (ladder.first_uses(), ladder.limits(), ladder.deviations(tokens), ladder.shares()):
            for row in part:
                about[row["rung"]] |= row
        yield [row | {"run": "about", "round": 0} for row in about.values()]
    elif any(("short", number) not in done for number in range(rounds)) or long:
        ladder.climb(tokens)  # warms up a process that goes on with what another began
    for number in range(-1, rounds):  # the first warms up
        if ("short", number) not in done:
            yield [row | {"asked_tokens": tokens, "run": "short"} for row in ladder.climb(tokens, number)]
    if long and ("long", 0) not in done:
        if torch.device(ladder.device).type == "cuda":
            ladder.climb(long, names=long_rungs)  # whatever a longer text has captured or planned first
        yield [row | {"asked_tokens": long, "run": "long"} for row in ladder.climb(long, names=long_rungs)]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status, 130 if interrupted."""
    command = parser()
    chosen = command.parse_args(arguments)
    record = None
    try:
        whole_number("tokens", chosen.tokens, 2 * GROUP + 1, _NO_CHUNKS)
        whole_number("rounds", chosen.rounds, 1)
        whole_number("long", chosen.long, 0, _NO_CHUNKS)
        device = pick_device(chosen.device)
        name = Path(chosen.model).name
        path = chosen.output or output_folder("data") / f"ladder_{name}_{torch.device(device).type}.csv"
        record = Record(path, chosen.resume)
        facts = machine_facts(device) | {"model": name, "text": chosen.text}
        record.check(facts)
        ladder = Ladder(chosen.model, device, chosen.rungs, text=chosen.text)
        chosen_rungs(ladder.rungs, chosen.long_rungs)
        done = [(row["run"], row["round"]) for row in record.rows]
        long = {"long": chosen.long, "long_rungs": chosen.long_rungs}
        with quiet():
            for rows in measured(ladder, chosen.tokens, chosen.rounds, **long, done=done):
                record.add([facts | row for row in rows])
        record.finish()
    except (ValueError, FileNotFoundError) as error:
        command.error(str(error))
    except KeyboardInterrupt:
        print("\nStopped.", record.hint() if record else "")
        return 130
    table = record.table()
    print(summary(table).to_string(float_format="%.3g"))
    late = late_over_early(growth(table)).dropna().round(2) if chosen.long else []
    if len(late):
        print("\nthe 800th token over the 80th:", late.to_dict())
    print(f"\n{len(table)} rows are in {path.name}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
