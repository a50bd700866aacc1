from __future__ import annotations

import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TEXT
from IPython.display import Audio

import chatterbox_lab as lab
from chatterbox_lab.engine.clock import StreamMetrics, Word
from chatterbox_lab.show import player as player_module
from chatterbox_lab.show.player import Player, front_end, play

SHORT = {"chunk_size": 3, "context_window": 3, "max_new_tokens": 12, "seed": 0, "ignore_eos": True}


class Page:
    """The front end of a player: what it was sent, and what it answers."""

    def __init__(self, player: Player, monkeypatch: pytest.MonkeyPatch) -> None:
        self.player, self.sent, self.words, self.silenced = player, [], [], False
        monkeypatch.setattr(player, "send", self._take)

    def _take(self, content: dict[str, Any], buffers: list[bytes] | None = None) -> None:
        if content["kind"] == "chunk":
            self.sent.append((content, buffers))
        if content["kind"] == "words":
            self.words.append((content["run"], content["index"], [word for word, _, _ in content["words"]]))
        self.silenced |= content["kind"] == "silence"

    def says(self, kind: str) -> None:
        self.player._handle_custom_msg({"kind": kind}, [])

    def numbers(self) -> list[int]:
        return [content["index"] for content, _ in self.sent]

    def audio(self) -> torch.Tensor:
        return torch.from_numpy(np.concatenate([np.frombuffer(buffers[0], "<f4") for _, buffers in self.sent]).copy())


class Tap:
    """A stream of short chunks that waits before each until it is let on, and knows how it was closed.

    With ``words`` it tells so many before each chunk, and before its end.
    """

    def __init__(self, count: int, fails_at: int | None = None, words: tuple[int, ...] = ()) -> None:
        self.count, self.fails_at, self.words = count, fails_at, words
        self.gate = threading.Semaphore(0)
        self.closed_in: str | None = None

    def let(self, count: int) -> None:
        for _ in range(count):
            self.gate.release()

    def stream(self) -> Iterator[tuple[torch.Tensor, StreamMetrics]]:
        metrics = StreamMetrics()
        try:
            for index in range(self.count):
                self.gate.acquire(timeout=60)
                if index == self.fails_at:
                    raise OSError("the disk is full")
                metrics.chunk_count += 1
                metrics.t3_seconds += 1.0 + index
                metrics.s3gen_seconds += 0.5
                self.tell(metrics, index)
                yield torch.full((1, 10), float(index)), metrics
            self.tell(metrics, self.count)
            metrics.rtf = 0.25
        finally:
            self.closed_in = threading.current_thread().name

    def tell(self, metrics: StreamMetrics, index: int) -> None:
        for _ in range(self.words[index] if self.words else 0):
            number = len(metrics.words)
            metrics.words.append(Word(f"w{number}", float(number), number + 1.0))


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_audio_and_records_are_those_of_the_stream(tts: Any) -> None:
    chunks = [(audio, dict(vars(metrics))) for audio, metrics in lab.generate_stream(tts, TEXT, **SHORT)]
    player = Player()
    player.start(lab.generate_stream(tts, TEXT, **SHORT))
    assert player.wait()
    assert player.state == "done"
    assert torch.equal(player.audio, torch.cat([audio for audio, _ in chunks], dim=1))
    assert [chunk.samples for chunk in player.chunks] == [audio.shape[1] for audio, _ in chunks]
    assert [chunk.index for chunk in player.chunks] == list(range(4))
    arrivals = [chunk.arrival for chunk in player.chunks]
    assert arrivals == sorted(arrivals)
    assert all(chunk.t3_seconds > 0 and chunk.s3gen_seconds > 0 for chunk in player.chunks)
    assert player.seconds == 12 * 960 / 24000
    assert player.metrics["tokens"] == 12


def test_stage_times_are_those_of_the_chunk_alone() -> None:
    tap = Tap(3)
    tap.let(3)
    player = Player()
    player.start(tap.stream())
    player.wait()
    assert [chunk.t3_seconds for chunk in player.chunks] == [1.0, 2.0, 3.0]
    assert [chunk.s3gen_seconds for chunk in player.chunks] == [0.5, 0.5, 0.5]
    assert player.metrics["rtf"] == 0.25  # known only after the last chunk


@pytest.mark.parametrize("ready_after", [0, 2, 4])
def test_no_chunk_is_lost_or_sent_twice_whenever_the_page_is_ready(
    monkeypatch: pytest.MonkeyPatch, ready_after: int
) -> None:
    tap, player = Tap(4), Player()
    page = Page(player, monkeypatch)
    player.start(tap.stream())
    tap.let(ready_after)
    until(lambda: len(player.chunks) == ready_after)
    page.says("ready")
    tap.let(4 - ready_after)
    player.wait()
    assert page.numbers() == [0, 1, 2, 3]
    assert torch.equal(page.audio(), player.audio[0])
    assert [content["play"] for content, _ in page.sent] == [True, False, False, False]
    assert {content["run"] for content, _ in page.sent} == {1}


def test_ready_in_the_midst_of_generation_keeps_the_order(monkeypatch: pytest.MonkeyPatch) -> None:
    player = Player()
    page = Page(player, monkeypatch)
    metrics = StreamMetrics()
    player.start((torch.zeros(1, 10), metrics) for _ in range(2000))
    until(lambda: len(player.chunks) > 20)
    page.says("ready")
    player.wait()
    assert page.numbers() == list(range(2000))


def test_a_reloaded_page_gets_all_chunks_again_and_does_not_start_to_sound(monkeypatch: pytest.MonkeyPatch) -> None:
    tap, player = Tap(3), Player()
    page = Page(player, monkeypatch)
    page.says("ready")
    player.start(tap.stream())
    tap.let(2)
    until(lambda: len(page.sent) == 2)
    page.sent.clear()
    page.says("ready")
    assert page.numbers() == [0, 1]
    tap.let(1)
    player.wait()
    assert page.numbers() == [0, 1, 2]
    assert not any(content["play"] for content, _ in page.sent)


def test_words_are_kept_and_only_new_ones_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    tap, player = Tap(3, words=(2, 0, 1, 2)), Player()
    page = Page(player, monkeypatch)
    page.says("ready")
    page.words.clear()
    player.start(tap.stream())
    tap.let(3)
    player.wait()
    assert player.words == [Word(f"w{number}", float(number), number + 1.0) for number in range(5)]
    assert page.words == [(1, 0, ["w0", "w1"]), (1, 2, ["w2"]), (1, 3, ["w3", "w4"])]
    assert page.numbers() == [0, 1, 2]
    page.words.clear()
    page.says("ready")
    assert page.words == [(1, 0, ["w0", "w1", "w2", "w3", "w4"])]
    tap = Tap(1, words=(1, 0))
    tap.let(1)
    player.start(tap.stream())
    player.wait()
    assert player.words == [Word("w0", 0.0, 1.0)]
    assert page.words[1:] == [(2, 0, ["w0"])]


@pytest.mark.parametrize("ready_after", [0, 1, 3])
def test_no_word_is_lost_or_sent_twice_whenever_the_page_is_ready(
    monkeypatch: pytest.MonkeyPatch, ready_after: int
) -> None:
    tap, player = Tap(3, words=(1, 1, 1, 1)), Player()
    page = Page(player, monkeypatch)
    player.start(tap.stream())
    tap.let(ready_after)
    until(lambda: len(player.chunks) == ready_after)
    page.says("ready")
    tap.let(3 - ready_after)
    player.wait()
    got: list[str] = []
    for _, index, words in page.words:
        assert index == len(got)
        got += words
    assert got == ["w0", "w1", "w2", "w3"]


def test_words_of_a_real_stream_are_those_of_its_metrics(tts: Any) -> None:
    how = SHORT | {"analyzer": "probe", "max_new_tokens": 60}
    *_, (_, metrics) = lab.generate_stream(tts, TEXT, **how)
    player = Player()
    player.start(lab.generate_stream(tts, TEXT, **how))
    player.wait()
    assert player.words == metrics.words
    assert [word for word, _, _ in player.words] == TEXT.split()[: len(player.words)]
    assert player.words


@pytest.mark.parametrize(
    ("ended", "note"),
    [
        (None, ""),
        ("stop", ""),
        ("limit", "cut at max_new_tokens after 7 tokens"),
        ("guard", "ended by the guard after 7 tokens"),
    ],
)
def test_what_did_not_end_by_itself_is_noted(ended: Any, note: str) -> None:
    player, metrics = Player(), StreamMetrics(tokens=7)

    def stream() -> Iterator[tuple[torch.Tensor, StreamMetrics]]:
        yield torch.zeros(1, 10), metrics
        metrics.ended = ended

    player.start(stream())
    player.wait()
    assert (player.metrics["ended"], player.metrics["note"]) == (ended, note)


@pytest.mark.parametrize("by", ["python", "page"])
def test_stop_ends_the_stream_in_its_own_thread(by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tap, player = Tap(100), Player()
    page = Page(player, monkeypatch)
    page.says("ready")
    stream = tap.stream()  # held here, so that nothing but the player closes it
    player.start(stream)
    tap.let(2)
    until(lambda: len(player.chunks) == 2)
    player.stop() if by == "python" else page.says("stop")
    assert player.state == "streaming"
    assert "stopping" in player.message
    assert page.silenced
    tap.let(1)
    assert player.wait()
    assert (player.state, player.message) == ("stopped", "")
    assert page.numbers() == [0, 1]  # the chunk that was under way is dropped
    assert tap.closed_in == "chatterbox-player"


def test_stopping_a_real_stream_leaves_the_model_as_it_was(tts: Any) -> None:
    player = Player(on_chunk=lambda _: player.stop())
    player.start(lab.generate_stream(tts, TEXT, analyzer="layer", **SHORT | {"max_new_tokens": 1000}))
    player.wait()
    assert player.state == "stopped"
    assert len(player.chunks) == 1


def test_a_failure_is_shown_kept_and_raised_on_waiting() -> None:
    tap, ended = Tap(3, fails_at=1), []
    tap.let(2)
    player = Player(on_end=ended.append)
    player.start(tap.stream())
    for _ in range(2):
        with pytest.raises(OSError, match="the disk is full"):
            player.wait()
    assert (player.state, player.message) == ("failed", "the disk is full")
    assert player.audio.shape == (1, 10)
    assert ended == [player]
    tap = Tap(1)
    tap.let(1)
    player.start(tap.stream())
    assert player.wait()
    assert (player.state, player.message, player.error) == ("done", "", None)


def test_a_second_start_is_refused_while_the_first_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    tap, second, player = Tap(2), Tap(1), Player()
    page = Page(player, monkeypatch)
    page.says("ready")
    player.start(tap.stream())
    with pytest.raises(RuntimeError, match="still generating"):
        player.start(second.stream())
    assert player.wait(timeout=0.01) is False
    tap.let(2)
    player.wait()
    second.let(1)
    player.start(second.stream())
    player.wait()
    assert [(content["run"], content["index"], content["play"]) for content, _ in page.sent] == [
        (1, 0, True), (1, 1, False), (2, 0, True),
    ]  # fmt: skip
    assert len(player.chunks) == 1


def test_an_interrupt_while_waiting_leaves_the_player_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    tap, player = Tap(2), Player()
    player.start(tap.stream())
    thread = player._thread
    monkeypatch.setattr(thread, "join", lambda timeout=None: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        player.wait()
    monkeypatch.undo()
    tap.let(2)
    player.wait()
    assert (player.state, len(player.chunks)) == ("done", 2)


def test_hooks_hear_of_every_chunk_and_of_the_end() -> None:
    heard: list[Any] = []
    tap = Tap(2)
    tap.let(2)
    player = Player(on_chunk=lambda record: heard.append(record.index), on_end=lambda p: heard.append(p.state))
    player.start(tap.stream())
    player.wait()
    assert heard == [0, 1, "done"]


def test_the_pages_numbers_reach_python_and_begin_anew_with_a_run() -> None:
    player, tap = Player(), Tap(1)
    player.set_state({"played": 1.5, "buffered": 0.25, "underruns": 2, "sounding": True})
    assert (player.played, player.buffered, player.underruns, player.sounding) == (1.5, 0.25, 2, True)
    player.start(tap.stream())
    assert (player.played, player.buffered, player.underruns) == (0, 0, 0)
    tap.let(1)
    player.wait()


def test_a_closed_player_stops_generating() -> None:
    tap, player = Tap(100), Player()
    player.start(tap.stream())
    player.close()
    tap.let(1)
    player.wait()
    assert player.state == "stopped"


@pytest.mark.parametrize("sample_rate", [0, 24000.5, 7999, 96001, "24000"])
def test_a_sample_rate_that_no_browser_plays_is_refused(sample_rate: Any) -> None:
    with pytest.raises(ValueError, match="sample_rate="):
        Player(sample_rate=sample_rate)


def test_without_a_front_end_the_stream_becomes_a_plain_audio(tts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHATTERBOX_LAB_WIDGETS", "0")
    audio = play(lab.generate_stream(tts, TEXT, **SHORT), tts.sr)
    assert isinstance(audio, Audio)
    assert len(audio.data) == 44 + 2 * 12 * 960  # a WAV of 16 bits
    with pytest.raises(ValueError, match="nothing to play"):
        play(iter(()))


def test_with_a_front_end_a_started_player_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHATTERBOX_LAB_WIDGETS", "1")
    tap = Tap(1)
    started = play(tap.stream(), 16000, "a title")
    assert (started.state, started.sample_rate, started.title) == ("streaming", 16000, "a title")
    tap.let(1)
    started.wait()
    assert repr(started) == "Player('a title'): done, 1 chunks, 0.00 s of audio"


@pytest.mark.parametrize(
    ("environment", "kernel", "names", "modules", "expected"),
    [
        ({}, True, {}, (), False),  # nbclient, papermill, nbval
        ({"JPY_SESSION_NAME": "a.ipynb"}, True, {}, (), True),
        ({"JPY_SESSION_NAME": "a.ipynb"}, False, {}, (), False),  # a script that a cell started
        ({}, True, {"__vsc_ipynb_file__": "a.ipynb"}, (), True),
        ({}, True, {}, ("google.colab",), True),
        ({"CHATTERBOX_LAB_WIDGETS": "1"}, False, {}, (), True),
        ({"CHATTERBOX_LAB_WIDGETS": "0", "JPY_SESSION_NAME": "a.ipynb"}, True, {}, (), False),
    ],
)
def test_front_end_is_guessed_from_where_the_kernel_runs(
    environment: dict[str, str],
    kernel: bool,
    names: dict[str, str],
    modules: tuple[str, ...],
    expected: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("CHATTERBOX_LAB_WIDGETS", "JPY_SESSION_NAME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    for name in modules:
        monkeypatch.setitem(sys.modules, name, SimpleNamespace())
    shell = SimpleNamespace(user_ns=names, **({"kernel": None} if kernel else {}))
    monkeypatch.setattr(player_module, "get_ipython", lambda: shell)
    assert front_end() is expected


def test_plain_python_has_no_front_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CHATTERBOX_LAB_WIDGETS", raising=False)
    monkeypatch.setenv("JPY_SESSION_NAME", "a.ipynb")
    assert front_end() is False


def test_the_javascript_parses() -> None:
    node = shutil.which("node")
    if node is None:
        pytest.skip("no node on this machine; the browser test reads the file as well")
    source = Player._esm.contents if hasattr(Player._esm, "contents") else str(Player._esm)
    result = subprocess.run(
        [node, "--input-type=module", "--check"], input=str(source), text=True, capture_output=True, check=False
    )
    assert result.returncode == 0, result.stderr
