"""What makes this model slow on this machine: the measurements behind `chatterbox_lab.diagnose`, part by part.

`findings` says what the rows mean, and ``show.report`` makes a page of both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stderr
from functools import partial
from io import StringIO
from types import SimpleNamespace
from typing import Any

import torch
from chatterbox.tts import ChatterboxTTS
from tqdm.auto import tqdm

from ..cpu import emulation
from ..engine.clock import Measured, StageClock
from ..engine.settings import BASELINE, whole_number
from ..engine.stream import generate_stream
from ..engine.variants import STREAMING, variant_of
from ..files import attribute
from ..released import release
from .diagnose_advice import advice
from .diagnose_t3 import attention, step, t3
from .fallback import count_spies
from .logs import quiet
from .machine import TorchFlags, machine_facts, tune_torch
from .playout import play
from .records import Record
from .streams import failure, free_memory
from .subject import EXACT, FASTEST, SHAPE, TEXT, TUNED, UPSTREAM, Row, Subject, as_found, fastest  # fmt: skip
from .turns import to_and_fro
from .upstream import upstream_stream, upstream_whole

_PATIENCE = 15.0
"""Seconds; a first call that took longer is not run again."""
WINDOWS = ((1, 0), (1, SHAPE["context_window"]), (5, 0))
"""Windows of S3Gen: what its voice prompt is divided by, and tokens of context; a released chunk comes on top."""


def machine(subject: Subject) -> Iterator[Row]:
    """Threads and PyTorch's flags; the rest of the machine is in every row."""
    flags, facts = TorchFlags(), machine_facts(subject.tts.device)
    yield {"name": "threads", "value": facts["threads"]}
    yield {"name": "cores", "value": facts["cores"]}
    yield {"name": "allow_tf32", "value": int(flags.allow_tf32)}
    yield {"name": "cudnn_benchmark", "value": int(flags.cudnn_benchmark)}
    yield {"name": "matmul_precision", "text": flags.matmul_precision}
    for rows, ratio in emulation(subject.tts.device).items():
        yield {"name": "bfloat16_emulated", "value": ratio, "at": rows}
    yield {"name": "release", "text": _release()}


def _release() -> str:
    try:
        return str(release())
    except (LookupError, RuntimeError) as error:  # a checkout by itself, or two in one folder
        return str(error).split(":")[0]


def found(subject: Subject) -> Iterator[Row]:
    """The model as it was handed over: what earlier calls have left on it."""
    tts, config = subject.tts, subject.tfmr.config
    spies = count_spies(subject.tfmr)
    yield {"name": "hooks", "value": spies["hooks"]}
    yield {"name": "wrapped_forwards", "value": spies["wrapped forwards"]}
    for number, layer in enumerate(subject.tfmr.layers):
        left = count_spies(SimpleNamespace(layers=[layer]))
        if any(left.values()):
            yield {"name": "spied_layer", "layer": number, "value": max(left.values())}
    yield {"name": "attention", "text": config._attn_implementation}
    yield {"name": "output_attentions", "value": int(bool(config.output_attentions))}
    yield {"name": "called_before", "value": int(bool(tts.t3.compiled) or any(spies.values()))}
    yield {"name": "patched", "value": int("generate_stream" in vars(tts))}
    yield {"name": "layers", "value": len(subject.tfmr.layers)}
    yield {"name": "prompt_tokens", "value": tts.conds.gen["prompt_token"].shape[1]}


def first(subject: Subject) -> Iterator[Row]:
    """Upstream's first chunk of 25 tokens, before anything else runs here; where that is quick, the same once more."""
    for call in (0, 1):
        start = partial(upstream_stream, subject.tts, TEXT, BASELINE, **subject.of(SHAPE["chunk_size"]))
        row, _ = spoken(start, subject.tts.sr)
        subject.rows = [*subject.rows, {"part": "first"} | row]
        yield {"name": "call", "at": call, "variant": UPSTREAM} | SHAPE | row
        if row["total_generation_time"] > _PATIENCE:  # a slow first call may be a cold one
            return


@torch.inference_mode()
def s3gen(subject: Subject) -> Iterator[Row]:
    """The released S3Gen on windows of different parts, and what a window takes at the speed of plain products."""
    from .s3gen_ladder import limits  # counts by the released flow

    tts, plan, clock = subject.tts, subject.plan, StageClock(subject.tts.device)
    longest, new = max(context for _, context in WINDOWS), SHAPE["chunk_size"]
    codes = torch.randint(6561, (longest + new,), generator=torch.Generator().manual_seed(subject.seed))
    for number in range(-1 if plan.warm_up else 0, plan.repeats if plan.warm_up else 1):
        for divisor, context in to_and_fro(WINDOWS, max(number, 0)):
            ref = _shortened(tts.conds.gen, divisor)
            window = codes[: context + new].to(tts.device)
            start = clock.now()
            tts.s3gen.inference(speech_tokens=window, ref_dict=ref)
            took, prompt_tokens = clock.now() - start, ref["prompt_token"].shape[1]
            if number >= 0:
                sizes = {"prompt_tokens": prompt_tokens, "context_tokens": context, "new_tokens": new}
                yield {"name": "window", "round": number, "seconds": took} | sizes
    found = limits(tts, new, SHAPE["context_window"])
    yield {"name": "limit", "value": found["flop"], "seconds": found["flop"] / found["flops_float32"]}
    yield {"name": "products", "value": found["flops_float32"]}


def _shortened(ref: Mapping[str, Any], divisor: int) -> dict[str, Any]:
    """A voice with the first part of its prompt."""
    tokens = max(1, ref["prompt_token"].shape[1] // divisor)
    frames = tokens * ref["prompt_feat"].shape[1] // ref["prompt_token"].shape[1]
    lengths = {"prompt_token_len": torch.full_like(ref["prompt_token_len"], tokens)}
    cut = {"prompt_token": ref["prompt_token"][:, :tokens], "prompt_feat": ref["prompt_feat"][:, :frames]}
    return dict(ref) | cut | lengths


def streams(subject: Subject) -> Iterator[Row]:
    """Whole streams in turns: upstream's, its call that does not stream, ours that is exact, and our fastest."""
    plan = subject.plan
    ways = {(name, 25): _stream(subject, name, 25, plan.tokens) for name in (UPSTREAM, EXACT, FASTEST)}
    ways[UPSTREAM, 0] = partial(upstream_whole, subject.tts, TEXT, BASELINE, **subject.of(plan.tokens))
    if torch.device(subject.tts.device).type == "cuda":
        ways[TUNED, 25] = partial(_tuned, ways[UPSTREAM, 25])
    yield from _in_turns(subject, ways, plan.rounds, listen=True)


def _tuned(start: Callable[[], Measured]) -> Measured:
    with tune_torch():
        yield from start()


def sizes(subject: Subject) -> Iterator[Row]:
    """The streams in chunks of other sizes, with a context of twice the chunk as in the report."""
    plan = subject.plan
    asked = [(name, size) for name, chosen in plan.sizes.items() for size in chosen]
    ways = {(name, size): _stream(subject, name, size, max(plan.chunks * size, plan.tokens)) for name, size in asked}
    yield from _in_turns(subject, ways, plan.size_rounds)


def _stream(subject: Subject, name: str, size: int, tokens: int) -> Callable[[], Measured]:
    """A stream in chunks of one size; its length is made of whole ones, because upstream loses what is left."""
    settings = fastest(subject.tts.device) if name == FASTEST else BASELINE
    size = size or tokens
    settings = settings.replace(chunk_size=size, context_window=2 * size)
    start = upstream_stream if name == UPSTREAM else generate_stream
    return partial(start, subject.tts, TEXT, settings, **subject.of(-(-tokens // size) * size))


def _in_turns(
    subject: Subject, ways: Mapping[tuple[str, int], Callable[[], Measured]], rounds: int, listen: bool = False
) -> Iterator[Row]:
    """A row a stream and round; what fails once does not run again."""
    failed = set()
    for number in range(-1 if subject.plan.warm_up else 0, rounds):
        for name, size in to_and_fro(list(ways), max(number, 0)):
            if (name, size) in failed:
                continue
            try:
                row, audio = spoken(ways[name, size], subject.tts.sr)
                row |= {"error": None}
                if listen and size and number == rounds - 1:
                    subject.keep(name, audio)
            except Exception as error:  # the other streams are still worth measuring
                row = failure(error)
                failed.add((name, size))
            free_memory()
            if number >= 0 or row["error"]:
                shape = {"chunk_size": size, "context_window": 2 * size}
                yield {"name": "stream", "variant": name, "round": max(number, 0)} | shape | row


def spoken(start: Callable[[], Measured], rate: int) -> tuple[Row, torch.Tensor]:
    """The final metrics of a stream with what a listener would have waited, and its audio (1, samples)."""
    arrivals, pieces, metrics = [], [], None
    for audio, metrics in start():
        arrivals.append(metrics.total_generation_time)
        pieces.append(audio)
    if metrics is None:
        raise ValueError("the stream yielded nothing, so there is nothing to measure")
    heard = play(arrivals, [piece.shape[1] / rate for piece in pieces])
    waited = {"underruns": heard.underruns, "silence_seconds": heard.silence}
    return metrics.numbers() | waited, torch.cat(pieces, dim=1)


PARTS: dict[str, Callable[[Subject], Iterator[Row]]] = {
    "machine": machine, "found": found, "first": first, "attention": attention, "t3": t3, "step": step,
    "s3gen": s3gen, "streams": streams, "sizes": sizes, "advice": advice,
}  # fmt: skip
"""What is measured, in this order: ``first`` is a process's first stream, so nothing may run before it."""


def use(tts: ChatterboxTTS, calls: int) -> None:
    """Calls upstream's own ``generate`` so often, for a second of speech each, and leaves what it leaves."""
    inference = tts.t3.inference

    def shorter(**given: Any) -> torch.Tensor:
        return inference(**given | {"max_new_tokens": 25})

    with attribute(tts.t3, "inference", shorter), quiet(), redirect_stderr(StringIO()):  # its bar
        for number in range(calls):
            torch.manual_seed(number)
            ChatterboxTTS.generate(tts, TEXT)


def _same_model(tts: ChatterboxTTS, rows: Sequence[Row], record: Record | None) -> None:
    """Raises ValueError where rows were begun on a model with other spies than this one has."""
    before = [row["value"] for row in rows if row["part"] == "found" and row["name"] == "hooks"]
    now = count_spies(tts.t3.tfmr)["hooks"]
    if before and before[0] != now:
        found = f"{before[0]:.0f} spies of earlier calls on the model, here it is {now}"
        raise ValueError(f"{record.path.name} was begun with {found}")


def check(tts: Any, quick: bool, seed: int) -> None:
    """Raises TypeError or ValueError, naming argument and value, for what `measure` does not take."""
    variant = variant_of(tts)
    if variant is not STREAMING:
        text = f"tts: {variant.name} has no stream of its own to compare with; must be a model of chatterbox-streaming"
        raise ValueError(f"{text}. What {variant.name} costs: chatterbox-lab living --costs")
    if tts.conds is None:
        raise ValueError("tts: the model has no voice: call tts.prepare_conditionals(recording) first")
    if not isinstance(quick, bool):
        raise ValueError(f"quick={quick!r}: must be True or False")
    whole_number("seed", seed, 0, 2**63 - 1)


def measure(
    tts: ChatterboxTTS,
    record: Record | None = None,
    *,
    model: str = "given",
    quick: bool = False,
    seed: int = 0,
    keep: Callable[[str, torch.Tensor], None] = lambda name, audio: None,
) -> list[Row]:
    """Measures part by part what `PARTS` names, without what the record holds, and leaves the model as it was.

    What this package derives from a model's weights stays with the model (`chatterbox_lab.forget` drops it).

    Args:
        tts: a model of chatterbox-streaming, fresh or used.
        record: where each part's rows go as soon as it is done; it is not finished here.
        model: its name, in every row.
        quick: half of everything.
        seed: of every stream.
        keep: see `Subject`.

    Returns:
        All rows, with ``part``, ``name`` and the machine's facts. Times are ``seconds``, other numbers ``value``,
        words ``text``; a stream has the fields of `StreamMetrics`, ``underruns`` and ``silence_seconds``.

    Raises:
        TypeError: a model that is no Chatterbox.
        ValueError: names the argument, its value and what is allowed; or a record of another machine or version.
    """
    check(tts, quick, seed)
    dtype = str(tts.t3.speech_head.weight.dtype).removeprefix("torch.")
    facts = machine_facts(tts.device) | {"model": model, "dtype": dtype, "quick": quick, "seed": seed}
    if record is not None:
        record.check(facts)
    rows = [] if record is None else record.rows
    if {row["part"] for row in rows} < PARTS.keys():  # else nothing is measured any more
        _same_model(tts, rows, record)
    devices = [torch.device(tts.device)] if torch.device(tts.device).type == "cuda" else []
    with tqdm(PARTS.items(), "diagnosis", leave=False) as bar, quiet(), torch.random.fork_rng(devices=devices):
        for part, measured in bar:
            bar.set_postfix_str(part)
            if any(row["part"] == part for row in rows):
                continue
            with as_found(tts):
                subject = Subject(tts, quick, seed, keep, rows)
                new = [facts | {"part": part} | row for row in measured(subject)]
            rows.extend(new) if record is None else record.add(new)
            rows = rows if record is None else record.rows
    return rows
