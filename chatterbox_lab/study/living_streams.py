"""Whole streams of today's releases: how fast each model speaks here, beside the release's own call.

No release streams, so its own call is the whole utterance, and its first sound the last. Ours speaks with the
released sound, in one piece and in chunks of 50 tokens, and streams at its fastest in chunks of 25 and 50, with a voice
that was heard before and with a new one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from io import StringIO
from typing import Any

import pandas as pd
import torch

from ..engine.settings import FAST, StreamSettings
from ..engine.stream import generate_stream
from ..engine.t3.spies import remove_spies
from ..files import attribute
from ..voices.build import random_conditionals
from ..voices.kinds import Kind
from .turns import to_and_fro

Row = dict[str, Any]
STOCK, EXACT, FASTEST, NEW = "release", "ours", "ours, fast, int8", "ours, fast, int8, new voice"
FASTEST_GPU, NEW_GPU = "ours, fast, graph", "ours, fast, graph, new voice"
"""On a GPU, where T3 runs as CUDA graphs instead of with rounded weights."""
CHUNKS = (25, 50)
WHOLE = 1000
"""The chunk size of a stream that is one chunk, beside which the release's own call is fair."""
TEXT = "The quick brown fox reads a long sentence to the lazy dog, and then another one, since it is such a fine day."
PARTS = ("t3", "s3gen", "rest")
"""What the time goes to; ``rest`` is all that is neither."""


def settings_of(way: str, chunk_size: int) -> StreamSettings:
    """How a way streams; the context is twice the chunk where the sound is the released one, as in the report."""
    if way == EXACT:
        return StreamSettings(chunk_size=chunk_size, context_window=2 * chunk_size)
    decoding = {"backend": "static", "weights": "int8"} if way == FASTEST else {"backend": "graph"}
    return FAST.replace(chunk_size=chunk_size, **decoding)


def ways_on(device: str) -> list[tuple[str, int]]:
    """Ours on this kind of device: the ways with their chunk sizes, the fastest with each of `CHUNKS` last."""
    fastest = FASTEST_GPU if device == "cuda" else FASTEST
    return [(EXACT, WHOLE), (EXACT, CHUNKS[-1]), *((fastest, size) for size in CHUNKS)]


def stock(tts: Any, tokens: int, language: dict[str, str]) -> Row:
    """The release's own ``generate``, ended after so many speech tokens; seconds of T3 and of all."""
    name, most = (
        ("inference_turbo", "max_gen_len") if tts.t3.cfg.model_type == "gpt2" else ("inference", "max_new_tokens")
    )
    spent, own = [], getattr(tts.t3, name)

    def shorter(**given: Any) -> torch.Tensor:
        start = time.perf_counter()
        said = own(**given | {most: tokens - (name == "inference_turbo")})  # whose first token is not counted
        spent.append(time.perf_counter() - start)
        return said

    try:
        with attribute(tts.t3, name, shorter), redirect_stdout(StringIO()), redirect_stderr(StringIO()):  # its bars
            torch.manual_seed(0)
            start = time.perf_counter()
            wav = tts.generate(TEXT, **language)
            seconds = time.perf_counter() - start
    finally:
        remove_spies(tts.t3.tfmr)
    found = {"seconds": seconds, "first_seconds": seconds, "t3_seconds": sum(spent)}
    return found | {"audio_seconds": wav.shape[1] / tts.sr}


def streamed(tts: Any, way: str, chunk_size: int, tokens: int, language: dict[str, str]) -> Row:
    """One stream of ours, with the seconds of its stages."""
    fixed = {"seed": 0, "max_new_tokens": tokens, "ignore_eos": True} | language
    *_, (_, metrics) = generate_stream(tts, TEXT, settings_of(way, chunk_size), **fixed)
    return {
        "seconds": metrics.total_generation_time,
        "first_seconds": metrics.latency_to_first_chunk,
        "t3_seconds": metrics.t3_seconds,
        "s3gen_seconds": metrics.s3gen_seconds,
        "audio_seconds": metrics.total_audio_duration,
    }


def costs(tts: Any, kind: Kind, tokens: int, rounds: int, language: dict[str, str]) -> Iterator[Row]:
    """Rows of all ways in turns.

    The same stream comes before each that is measured, so that what is made once a length is there: an application has
    one way, whose voice stays read and whose shapes are known, where many in turns push one another out. The release's
    own call, which keeps nothing, is begun with two tokens alone.

    Args:
        tts: a model of the release at hand, without a watermark.
        kind: of which it is, to draw new voices.
        tokens: of a stream.
        rounds: measured ones.
        language: ``language`` of the call where the model needs one.
    """
    spelled = {"language_id": language["language"]} if language else {}
    ways: dict[tuple[str, int], Callable[..., Row]] = {(STOCK, 0): partial(stock, tts, language=spelled)}
    sized = ways_on(torch.device(tts.device).type)
    ways |= {(way, size): partial(streamed, tts, way, size, language=language) for way, size in sized}
    fastest, known = sized[-1][0], tts.conds
    new = NEW if fastest == FASTEST else NEW_GPU

    def of_a_stranger(size: int, tokens: int) -> Row:
        tts.conds = random_conditionals(tts.t3.hp, kind).to(tts.device)
        try:
            return streamed(tts, fastest, size, size, language)
        finally:
            tts.conds = known

    ways |= {(new, size): partial(of_a_stranger, size) for size in CHUNKS}
    for number in range(rounds):
        for way, size in to_and_fro(list(ways), number):
            ways[way, size](tokens=2 if way == STOCK else tokens)
            yield {"way": way, "chunk_size": size, "round": number} | ways[way, size](tokens=tokens)


def board(table: pd.DataFrame) -> pd.DataFrame:
    """Medians by variant, way and chunk size: ``RTF`` with its least and most, ``first sound`` in seconds, and parts.

    Parts (`PARTS`) are seconds a second of speech, as RTF is; ``faster`` is the release's RTF over this one, within
    rounds. A new voice has a first sound only.
    """
    rows = table[table["part"] == "streams"].copy()
    audio = rows["audio_seconds"]
    rows["RTF"], rows["t3"], rows["s3gen"] = (rows[f"{name}seconds"] / audio for name in ("", "t3_", "s3gen_"))
    stock = rows["way"] == STOCK
    rows.loc[stock, "s3gen"] = rows["RTF"] - rows["t3"]  # all that is not T3
    rows["rest"] = rows["RTF"] - rows["t3"] - rows["s3gen"]
    theirs = rows[stock].set_index(["variant", "round"])["RTF"]
    rows["faster"] = theirs.reindex(pd.MultiIndex.from_frame(rows[["variant", "round"]])).to_numpy() / rows["RTF"]
    grouped = rows.groupby(["variant", "way", "chunk_size"], sort=False)
    found = {"RTF": grouped["RTF"].median(), "least": grouped["RTF"].min(), "most": grouped["RTF"].max()}
    found |= {"first sound": grouped["first_seconds"].median(), "faster": grouped["faster"].median()}
    found |= {part: grouped[part].median() for part in PARTS}
    return pd.DataFrame(found)
