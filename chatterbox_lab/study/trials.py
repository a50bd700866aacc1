"""Listening trials: the same speech tokens made audible in many ways, and what machines hear in each.

T3 speaks each sentence once; the ways differ in S3Gen's part alone. So every difference to the whole decode comes from
streaming, or from what a way leaves out.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import pandas as pd
import torch
from chatterbox.models.s3gen import S3GEN_SR
from chatterbox.tts import ChatterboxTTS, StreamingMetrics
from tqdm import tqdm

from ..engine.clock import StageClock
from ..engine.request import checked, encode_text
from ..engine.schedule import TOKEN_SECONDS
from ..engine.settings import ADAPTIVE, BASELINE, FAST, StreamSettings, whole_number
from ..engine.stream import render, renderer_of, speech_tokens
from ..engine.t3.decode import token_chunks
from ..engine.t3.rules import FORK, LATER, SAFE, Rules
from ..files import DATA, attribute
from ..host import apart
from ..speech.spoken import Wording, in_words
from ..voices.load import load, pick_device
from . import command
from .hearing import joins, opinion_scores, repeats, silent_end, transcribe, word_errors
from .machine import machine_facts
from .records import Record
from .upstream import upstream_tokens

HELD_OUT = DATA / "heldout.txt"
"""Everyday sentences that the lab voice was not trained on."""
PROVOKING = DATA / "provoking.txt"
"""Prompts that tempt a decoder to repeat itself, stop early or never stop."""
TEXTS = {"provoking": PROVOKING, "short": DATA / "short.txt"}
"""What the guard is tried on; the second are single letters, numbers, interjections and other texts of a few signs."""
RULES: dict[str, Rules | None] = {"none": None, "own": None, "safe": SAFE, "fork": FORK, "later": LATER}
"""By which the guard acts: none (it does not), the model's own, or those of an analyzer."""
MATTERS_WER, MATTERS_MOS = 0.02, 0.1
"""Changes below these, 2 points of word error rate and 0.1 of a mean opinion score, count as none."""
FAULTS = ["early", "runs_on", "silent_end", "repeated"]
"""What the guard may prevent: speech that stops early, runs on, ends in silence, or says words twice."""
MUTE = 3
"""Speech tokens, 0.12 s, in which nothing is said."""
_LIMIT = 400  # speech tokens of an everyday sentence, by far
_USUAL = 2  # speech tokens per text token, roughly; only a limit is made of it


@dataclass(frozen=True)
class Way:
    """How tokens become audio: ``whole`` at once, in ``upstream``'s chunks, or in ``ours``; with which settings.

    ``half fix`` has other tokens: T3 speaks again with the broken half fix, and they are rendered whole.
    """

    how: str
    settings: StreamSettings = BASELINE


def _sizes(how: str, *pairs: tuple[int, int]) -> dict[str, Way]:
    named = {f"{how}, {chunk} + {context}": (chunk, context) for chunk, context in pairs}
    return {
        name: Way(how, BASELINE.replace(chunk_size=chunk, context_window=context))
        for name, (chunk, context) in named.items()
    }


def _changed(**changes: dict[str, Any]) -> dict[str, Way]:
    return {name.replace("_", " "): Way("ours", BASELINE.replace(**fields)) for name, fields in changes.items()}


WAYS = {
    "whole": Way("whole"),
    **_sizes("upstream", (25, 50), (50, 100)),
    **_sizes("ours", (25, 0), (25, 25), (25, 50), (50, 100)),
    "growing": Way("ours", ADAPTIVE),
    **_changed(
        no_cross_fade={"fade_duration": 0},
        each_frame_once={"flow": "cached"},
        bfloat16={"flow_dtype": "bfloat16"},
        vocoder_in_bfloat16={"vocoder_dtype": "bfloat16"},
        five_steps={"flow_steps": 5},
        two_steps={"flow_steps": 2},
        half_the_prompt={"prompt_tokens": 25},
    ),
    "fast": Way("ours", FAST.replace(chunk_size=25)),
    "half fix": Way("half fix"),
}
"""By name; chunk + context in tokens. What is not said is upstream's default: chunk 25, context 50, a 20 ms fade."""


def spoken(tts: ChatterboxTTS, codes: torch.Tensor, way: Way, seed: int = 0) -> list[torch.Tensor]:
    """The chunks (1, samples) of speech tokens (n,) made audible in a way; one chunk for ``whole``."""
    if way.how == "whole":
        return [render(tts, codes, way.settings, seed=seed)]
    pieces = list(_pieces(codes, way.settings))
    return list(_upstream(tts, pieces, way.settings, seed) if way.how == "upstream" else _ours(tts, pieces, way, seed))


def _pieces(codes: torch.Tensor, settings: StreamSettings) -> Iterator[torch.Tensor]:
    sizes, start = settings.chunk_sizes(), 0
    while start < len(codes):
        size = next(sizes)
        yield codes[start : start + size]
        start += size


def _ours(tts: ChatterboxTTS, pieces: Sequence[torch.Tensor], way: Way, seed: int) -> Iterator[torch.Tensor]:
    renderer = renderer_of(tts, way.settings, seed)
    for number, piece in enumerate(pieces):
        yield renderer.push(piece, last=number == len(pieces) - 1)


def _upstream(
    tts: ChatterboxTTS, pieces: Sequence[torch.Tensor], settings: StreamSettings, seed: int
) -> Iterator[torch.Tensor]:
    """Upstream's own rendering of each chunk, on tokens that are given instead of decoded along the way."""
    torch.manual_seed(seed)
    said = torch.zeros(0, dtype=torch.long)
    for piece in pieces:
        audio, _, _ = type(tts)._process_token_buffer(
            tts, [piece], said, settings.context_window, 0.0, StreamingMetrics(chunk_count=1), False,
            settings.fade_duration,
        )  # fmt: skip
        yield audio.float()
        said = torch.cat([said, piece])


def heard(text: str, chunks: Sequence[torch.Tensor], whole: torch.Tensor, scores: bool = True) -> dict[str, Any]:
    """What recogniser, listeners and seam measures say of chunks, beside the whole decode (1, samples)."""
    audio = torch.cat(list(chunks), dim=1)
    length = min(audio.shape[1], whole.shape[1])
    row: dict[str, Any] = {"seams": len(chunks) - 1, "seconds": audio.shape[1] / S3GEN_SR}
    row |= word_errors(text, transcribe(audio)) | joins(audio[:, :length], seams(chunks), whole[:, :length])
    return row | (opinion_scores(audio, noise=False) if scores else {})


def seams(chunks: Sequence[torch.Tensor]) -> list[int]:
    """The samples at which all but the first chunk begin."""
    return [int(sample) for sample in accumulate(chunk.shape[1] for chunk in chunks[:-1])]


def half_fixed_tokens(
    tts: ChatterboxTTS, text: str, settings: StreamSettings = BASELINE, **arguments: Any
) -> torch.Tensor:
    """Upstream's tokens with the analyzer's spy on its layer and maps asked for nowhere else: the broken half fix.

    Arguments as for `upstream_tokens`.
    """
    forward = tts.t3.tfmr.forward

    def without_maps(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **dict(kwargs, output_attentions=False))

    with attribute(tts.t3.tfmr, "forward", without_maps):
        return upstream_tokens(tts, text, settings, **arguments)


def measure(
    tts: ChatterboxTTS,
    sentences: Sequence[str],
    ways: dict[str, Way],
    record: Record | None = None,
    *,
    seed: int = 0,
    scores: bool = True,
    facts: dict[str, Any] | None = None,
) -> pd.DataFrame:
    """A row for each sentence and way. Rows that ``record`` has already are not made again."""
    rows = record.rows if record else []
    done = {(row["text"], row["way"]) for row in rows}
    for text in tqdm(sentences, desc="trials", unit="sentence"):
        missing = [name for name in ways if (text, name) not in done]
        if not missing:
            continue
        codes = speech_tokens(tts, text, BASELINE.replace(backend="static"), seed=seed, max_new_tokens=_LIMIT)
        whole = spoken(tts, codes, WAYS["whole"], seed)[0]
        made = []
        for name in missing:
            chunks = _chunks(tts, text, codes, whole, ways[name], seed)
            about = {"text": text, "way": name, "how": ways[name].how, "seed": seed, **_described(ways[name].settings)}
            made.append(about | heard(text, chunks, whole, scores) | (facts or {}))
        if record:
            record.add(made)
        else:
            rows += made
    return pd.DataFrame(rows)


def _chunks(
    tts: ChatterboxTTS, text: str, codes: torch.Tensor, whole: torch.Tensor, way: Way, seed: int
) -> list[torch.Tensor]:
    if way.how == "half fix":
        codes = half_fixed_tokens(tts, text, seed=seed, max_new_tokens=_LIMIT)
        return [render(tts, codes, seed=seed)] if len(codes) else [torch.zeros_like(whole)]
    return [whole] if way.how == "whole" else spoken(tts, codes, way, seed)


def _described(settings: StreamSettings) -> dict[str, Any]:
    return {name: getattr(settings, name) for name in ("chunk_size", "context_window", "schedule")}


def provoke(
    tts: ChatterboxTTS,
    prompts: Sequence[str],
    record: Record | None = None,
    *,
    seeds: Sequence[int] = (0,),
    rules: Sequence[str] = ("own",),
    facts: dict[str, Any] | None = None,
) -> pd.DataFrame:
    """A row for each prompt and seed, without the guard and with it by each of some `RULES`: what it spoke and how.

    ``text_tokens`` counts the text, start and stop included; ``tokens`` are those of speech, ``cap`` the most that the
    guard allows; ``ended`` is as in `StreamMetrics`, the limit being four times the usual length; ``tail`` is the
    silence at the end in seconds, ``repeats`` counts words understood twice in a row. Word errors are against the text
    with its numbers and signs as words, ``wer`` is missing where it has none. A text of which the tokenizer knows
    nothing is one row that says so under ``skipped``.
    """
    rows = record.rows if record else []
    done = {(row["text"], row["seed"]) for row in rows}
    todo = [(text, seed) for text in prompts for seed in seeds if (text, seed) not in done]
    for text, seed in tqdm(todo, desc="prompts", unit="prompt"):
        made = [row | (facts or {}) for row in _provoked(tts, text, seed, rules)]
        if record:
            record.add(made)
        else:
            rows += made
    return pd.DataFrame(rows)


def _provoked(tts: ChatterboxTTS, text: str, seed: int, rules: Sequence[str]) -> Iterator[dict[str, Any]]:
    about = {"text": text, "seed": seed}
    if not _known(tts, text):
        yield about | {"skipped": "the tokenizer knows nothing of it"}
        return
    length = encode_text(tts, text).shape[1]
    limit = 4 * _USUAL * length + 100
    heard: dict[tuple[int, ...], dict[str, Any]] = {}  # the guard seldom acts, and the same tokens sound the same
    for name in ("none", *rules):
        guard = name != "none"
        settings = BASELINE.replace(backend="static", analyzer="probe", guard=guard, rules=RULES[name])
        codes, ended = said(tts, text, settings, seed, limit)
        key = tuple(codes.tolist())
        if key not in heard:
            audio = render(tts, codes, settings, seed=seed) if key else torch.zeros(1, 1)
            heard[key] = {"tail": silent_end(audio)} | _understood(in_words(text), transcribe(audio))
        kept = checked(tts, text, settings).settings.rules or FORK
        row = {"guard": guard, "rules": name, "text_tokens": length, "tokens": len(codes), "ended": ended}
        yield about | row | {"cap": kept.most(length) if guard else None} | heard[key]


def _known(tts: ChatterboxTTS, text: str) -> bool:
    ids, unknown = set(encode_text(tts, text, rows=1)[0, 1:-1].tolist()), Wording(tts).unknown
    return unknown not in ids or bool(ids - {unknown} - set(encode_text(tts, ".", rows=1)[0].tolist()))


def said(tts: ChatterboxTTS, text: str, settings: StreamSettings, seed: int, limit: int) -> tuple[torch.Tensor, str]:
    """The speech tokens (n,) of a text, and how they ended, as `StreamMetrics` has it."""
    request, clock = checked(tts, text, settings, seed=seed, max_new_tokens=limit), StageClock(tts.t3.device)
    with apart(tts.device):
        chunks = [chunk.cpu() for chunk, _ in token_chunks(tts, request, clock)]
    return torch.cat(chunks), str(clock.ended)


def _understood(text: str, words: str) -> dict[str, Any]:
    found = {"heard": words, "repeats": repeats(text, words)}
    if any(map(str.isalnum, text.encode("ascii", "ignore").decode())):
        return found | word_errors(text, words)
    return found | {"words": 0, "errors": len(words.split()), "wer": None}


def faults(table: pd.DataFrame, usual: float, beside: float = 0.0, by: str = "guard") -> pd.DataFrame:
    """Of the rows of `provoke`, how many failed in which of `FAULTS`, and the WER, by ``guard`` or ``rules``.

    Args:
        table: what `provoke` made.
        usual: speech tokens per text token of ordinary sentences; early is under half of it, running on over twice
            it or the limit, a silent end over a second.
        beside: speech tokens that a text of any length may take besides: of single words most.
        by: the column.
    """
    pace = table["tokens"] / (usual * table["text_tokens"] + beside)
    cut = table["ended"].isin(["limit", False])  # older records say whether it ended
    found = table.assign(
        early=pace < 0.5, runs_on=(pace > 2) | cut, silent_end=table["tail"] > 1, repeated=table["repeats"] > 0
    )
    groups = found.groupby(by, sort=False)
    counts = groups[FAULTS].sum().astype(int)
    return counts.assign(wer=groups["errors"].sum() / groups["words"].sum(), prompts=groups.size())


def beside(table: pd.DataFrame, rules: str = "own") -> pd.DataFrame:
    """Each prompt and seed with the guard by some ``rules``, and in columns that end in ``_before`` without it."""
    columns = ["tokens", "ended", "heard", "errors"]
    plain, ours = (table[table["rules"] == one].set_index(["text", "seed"])[columns] for one in ("none", rules))
    both = ours.join(plain, rsuffix="_before")
    return both.astype({name: int for name in both if name.startswith(("tokens", "errors"))})


def pairs(table: pd.DataFrame) -> pd.DataFrame:
    """What the guard did, by its ``rules``: each prompt and seed with it against the same without it.

    ``shorter`` and ``longer`` count what it made so, ``better`` and ``worse`` fewer and more word errors, ``errors``
    their sum. With the guard, and in columns that end in ``_before`` without it: ``mute`` counts speech of at most
    `MUTE` tokens, ``limit`` what only the limit ended, and ``longest`` is the longest speech of all in seconds.
    """
    found = {}
    for name in (one for one in table["rules"].dropna().unique() if one != "none"):
        both = beside(table, name)
        errors, tokens = both["errors"] - both["errors_before"], both["tokens"] - both["tokens_before"]
        row = {"pairs": len(both), "shorter": (tokens < 0).sum(), "longer": (tokens > 0).sum()}
        row |= {"better": (errors < 0).sum(), "worse": (errors > 0).sum(), "errors": errors.sum()}
        for when in ("_before", ""):
            said, ended = both[f"tokens{when}"], both[f"ended{when}"]
            row |= {f"mute{when}": (said <= MUTE).sum(), f"limit{when}": (ended == "limit").sum()}
            row[f"longest{when}"] = said.max() * TOKEN_SECONDS
        found[name] = row
    return pd.DataFrame.from_dict(found, orient="index")


def board(table: pd.DataFrame, against: str = "whole") -> pd.DataFrame:
    """Each way in a row, in the order of the table: WER, scores and seam measures, and how surely it differs.

    ``wer_change`` and ``plcmos_change`` are differences to the way ``against``; ``_low`` and ``_high`` bound them: the
    5th and 95th percentile over 1000 draws of the sentences with replacement, the same sentences for both ways.
    """
    words = table.groupby("text", sort=False)["words"].first()
    # A sentence's WER counts by its words, so that the mean is the errors of all over the words of all.
    weights = {"wer": words / words.mean(), "plcmos": pd.Series(1.0, words.index)}
    draws = np.random.default_rng(0).integers(0, len(words), (1000, len(words)))
    means = ["dip", "reference_dip", "flux", "reference_flux", "mel_distance"]
    found = table.groupby("way", sort=False)[means].mean()
    for place, name in enumerate(name for name in weights if name in table):
        values = table.pivot_table(name, "text", "way", "first", sort=False).loc[words.index]
        weight = weights[name]
        change = values.sub(values[against], axis=0).mul(weight, axis=0)
        drawn = change.to_numpy()[draws].sum(1) / weight.to_numpy()[draws].sum(1)[:, None]
        low, high = (pd.Series(np.quantile(drawn, q, axis=0), change.columns) for q in (0.05, 0.95))
        columns = {
            name: values.mul(weight, axis=0).mean(), f"{name}_change": change.mean(),
            f"{name}_low": low, f"{name}_high": high,
        }  # fmt: skip
        for offset, (column, series) in enumerate(columns.items()):
            found.insert(4 * place + offset, column, series)
    return found


def judged(row: pd.Series) -> str:
    """What a row of `board` allows to say: ``worse``, ``as good``, or that these sentences do not decide it.

    Worse: more word errors for sure, or a PLCMOS that is lower for sure and by `MATTERS_MOS`. As good: surely not more
    than `MATTERS_WER` more word errors, and not `MATTERS_MOS` lower. Sure is 95% on that side.
    """
    if row["wer_low"] > 0 or (row["plcmos_high"] < 0 and row["plcmos_change"] <= -MATTERS_MOS):
        return "worse"
    if row["wer_high"] <= MATTERS_WER and row["plcmos_low"] >= -MATTERS_MOS:
        return "as good"
    return "undecided"


def told(row: pd.Series) -> str:
    """A row of `board` in words: how WER and PLCMOS change, with their bounds."""
    wer, low, high = 100 * row[["wer_change", "wer_low", "wer_high"]]
    mos, mos_low, mos_high = row[["plcmos_change", "plcmos_low", "plcmos_high"]]
    return f"WER {wer:+.1f} points ({low:+.1f} to {high:+.1f}), PLCMOS {mos:+.2f} ({mos_low:+.2f} to {mos_high:+.2f})"


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of ``chatterbox-lab trials``."""
    command.add_model(parser, "lab", "a model that speaks: lab, pretrained")
    command.add_device(parser)
    parser.add_argument("--sentences", type=int, metavar="X", default=40, help="of data/heldout.txt (default: 40)")
    parser.add_argument("--seed", type=int, metavar="X", default=0, help="of tokens and noise (default: 0)")
    parser.add_argument(
        "--ways", nargs="+", metavar="X", default=list(WAYS), help=f"of {', '.join(WAYS)} (default: all)"
    )
    parser.add_argument("--guard", action="store_true", help="provoking texts instead, without the guard and with it")
    parser.add_argument("--texts", metavar="X", default="provoking", help="of --guard: provoking (default) or short")
    parser.add_argument(
        "--seeds", type=int, metavar="N", default=1, help="of --guard: seeds from --seed on (default: 1)"
    )
    rules = f"of --guard: {', '.join(list(RULES)[1:])} (default: own)"
    parser.add_argument("--rules", nargs="+", metavar="X", default=["own"], help=rules)
    command.add_record(parser, "trials_MODEL.csv, guard_MODEL.csv or short_MODEL.csv")


def run(options: argparse.Namespace) -> int:
    """Makes the sentences audible in all of `WAYS`, or with ``--guard`` provokes faults, and records what is heard."""
    sentences, seed = whole_number("sentences", options.sentences, 1), whole_number("seed", options.seed, 0, 2**63 - 1)
    if unknown := [way for way in options.ways if way not in WAYS]:
        raise ValueError(f"ways={unknown!r}: each must be one of {', '.join(map(repr, WAYS))}")
    seeds = range(seed, seed + whole_number("seeds", options.seeds, 1))
    for what, given, allowed in (("texts", [options.texts], TEXTS), ("rules", options.rules, list(RULES)[1:])):
        if wrong := [one for one in given if one not in allowed]:
            raise ValueError(f"{what}={wrong!r}: each must be one of {', '.join(map(repr, allowed))}")
    device, name = pick_device(options.device), command.model_name(options)
    kind = ("short" if options.texts == "short" else "guard") if options.guard else "trials"
    record = command.open_record(options, f"{kind}_{name}.csv")
    facts = machine_facts(device) | {"model": name, "dtype": "float32"}
    record.check(facts)
    tts = load(options.model, device=device, watermark=False)
    if options.guard:
        texts = TEXTS[options.texts].read_text().splitlines()
        table = provoke(tts, texts, record, seeds=seeds, rules=options.rules, facts=facts)
        print(pairs(table).to_markdown(floatfmt=".1f"))
    else:
        ways = {way: WAYS[way] for way in options.ways}
        measure(tts, HELD_OUT.read_text().splitlines()[:sentences], ways, record, seed=seed, facts=facts)
    record.finish()
    print(f"{len(record.rows)} rows are in {record.path.name}.")
    return 0
