from __future__ import annotations

from itertools import repeat

import pytest

from chatterbox_lab.engine.schedule import Costs
from chatterbox_lab.study.playout import expected, play


def test_silence_is_what_is_missing_when_a_chunk_arrives() -> None:
    heard = play([1.0, 1.5, 4.0, 4.5], [1.0, 1.0, 0.5, 1.0])
    assert heard.levels == (0.5, -1.0, 0.0)
    assert heard.underruns == 1
    assert heard.silence == 1.0


def test_a_stream_of_no_or_one_chunk_has_no_underruns() -> None:
    assert play([], []).levels == play([3.0], [1.0]).levels == ()


def test_every_chunk_needs_its_arrival_and_its_sound() -> None:
    with pytest.raises(ValueError, match="seconds of 1 chunks: must be as many as arrivals, 2"):
        play([1.0, 2.0], [1.0])


def test_the_expected_chunks_are_those_of_the_cost_model() -> None:
    costs = Costs(token=0.01, prefill=0.5, chunk=1.0, window_token=0.0, prompt_tokens=0)
    chunks = expected(costs, repeat(10), 25, context_window=15, fade=0.02)
    assert [(chunk.new, chunk.before) for chunk in chunks] == [(10, 0), (10, 10), (5, 15)]
    assert [chunk.arrival for chunk in chunks] == pytest.approx([1.6, 2.7, 3.75])
    assert [chunk.seconds for chunk in chunks] == pytest.approx([0.38, 0.4, 0.22])  # the fade waits for the next chunk
