from __future__ import annotations

import pandas as pd
import pytest

from chatterbox_lab.study import living_streams
from chatterbox_lab.study.living_streams import CHUNKS, EXACT, FASTEST, NEW, STOCK, WHOLE
from chatterbox_lab.voices import load as models
from chatterbox_lab.voices.kinds import KINDS


def test_every_way_speaks_and_the_voice_is_as_before() -> None:
    tts = models.load("tiny", device="cpu", watermark=False)  # its own: the release's calls leave things on it
    conds = tts.conds
    rows = pd.DataFrame(living_streams.costs(tts, KINDS["english"], tokens=26, rounds=1, language={}))
    assert tts.conds is conds
    wanted = {(STOCK, 0), (EXACT, WHOLE), (EXACT, 50)} | {(way, size) for way in (FASTEST, NEW) for size in CHUNKS}
    assert set(rows.groupby(["way", "chunk_size"]).groups) == wanted
    assert (rows.groupby(["way", "chunk_size"]).size() == 1).all()
    ours = rows[rows["way"].isin([EXACT, FASTEST])]
    assert (ours["audio_seconds"] == 26 * 0.04).all()
    assert (ours["t3_seconds"] + ours["s3gen_seconds"] <= ours["seconds"]).all()
    assert (ours.loc[ours["chunk_size"] == 25, "first_seconds"] < ours.loc[ours["chunk_size"] == 25, "seconds"]).all()
    stock = rows[rows["way"] == STOCK]
    assert (stock["audio_seconds"] <= 26 * 0.04).all()  # what is no speech is dropped
    assert (stock["first_seconds"] == stock["seconds"]).all()


def test_the_board_has_medians_and_ratios_within_rounds() -> None:
    audio = 2.0
    rows = [
        {"part": "streams", "variant": "nano", "way": way, "chunk_size": size, "round": number}
        | {"seconds": seconds, "first_seconds": first, "t3_seconds": 0.25 * seconds, "audio_seconds": audio}
        | ({} if way == STOCK else {"s3gen_seconds": 0.5 * seconds})
        for number, scale in enumerate((1.0, 2.0, 1.0))
        for way, size, seconds, first in ((STOCK, 0, 8.0 * scale, 8.0), (FASTEST, 25, 1.0 * scale, 0.5))
    ]
    rows.append({"part": "t3", "variant": "nano", "way": STOCK, "round": 0, "seconds": 1.0})
    board = living_streams.board(pd.DataFrame(rows)).loc["nano"]
    ours, stock = board.loc[(FASTEST, 25)], board.loc[(STOCK, 0)]
    assert ours[["RTF", "least", "most", "first sound", "faster"]].tolist() == [0.5, 0.5, 1.0, 0.5, 8.0]
    assert ours[["t3", "s3gen", "rest"]].tolist() == pytest.approx([0.125, 0.25, 0.125])
    assert stock[["RTF", "t3", "s3gen", "rest"]].tolist() == pytest.approx([4, 1, 3, 0])
