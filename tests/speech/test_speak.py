from __future__ import annotations

import gc
import itertools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import pytest
import torch

import chatterbox_lab as lab
from chatterbox_lab.engine import stream
from chatterbox_lab.engine.clock import StageClock
from chatterbox_lab.engine.request import checked
from chatterbox_lab.engine.s3gen.flow import Flow
from chatterbox_lab.engine.s3gen.render import Renderer
from chatterbox_lab.engine.s3gen.vocoder import Vocoder
from chatterbox_lab.engine.schedule import SCHEDULES
from chatterbox_lab.engine.t3.decode import token_chunks
from chatterbox_lab.speech import speak as speaking
from chatterbox_lab.speech.sentences import utterances
from chatterbox_lab.study.playout import play

TEXT = "Hello there, you. This is it now! Well? It is so."
SENTENCES = ["Hello there, you.", "This is it now!", "Well? It is so."]
FIXED = {"seed": 0, "ignore_eos": True, "flow_steps": 1, "chunk_size": 4, "max_new_tokens": 10}
SILENT = lab.Pauses(0, 0, 0)


def joined(chunks: Iterator[tuple[torch.Tensor, Any]]) -> torch.Tensor:
    return torch.cat([audio for audio, _ in chunks], dim=1)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int | None]]:
    """What T3 is asked to say, and with which seed: the tiny model says much the same whatever the text."""
    found, inner = [], speaking._request

    def noting(tts: Any, base: Any, words: str, number: int) -> Any:
        request = inner(tts, base, words, number)
        found.append((words, request.seed))
        return request

    monkeypatch.setattr(speaking, "_request", noting)
    return found


@pytest.mark.parametrize("overlap", [False, True])
def test_the_same_audio_wherever_the_text_came_from(
    tts: Any, asked: list[Any], overlap: bool, one_thread_each: None
) -> None:
    whole = joined(lab.speak(tts, TEXT, **FIXED))
    expected = [(text, speaking.seed_of(0, number)) for number, text in enumerate(SENTENCES)]
    assert asked == expected
    for pieces in (iter(TEXT), TEXT.replace(" ", " |").split("|"), [TEXT[:20], "", TEXT[20:]]):
        asked.clear()
        assert torch.equal(joined(lab.speak(tts, pieces, **FIXED, overlap=overlap)), whole)
        assert asked == expected
    assert not torch.equal(joined(lab.speak(tts, TEXT, **FIXED | {"seed": 1})), whole)


@pytest.mark.parametrize("fade_duration", [0.0, 0.02, 0.5])
@pytest.mark.parametrize("pauses", [SILENT, lab.Pauses(sentence=0.2)])
def test_every_token_becomes_960_samples_and_pauses_are_exact(tts: Any, fade_duration: float, pauses: Any) -> None:
    chunks = list(lab.speak(tts, TEXT, **FIXED, fade_duration=fade_duration, pauses=pauses))
    audio, metrics, spoken = joined(iter(chunks)), chunks[-1][1], 10 * 960
    silence = round(pauses.sentence * tts.sr)
    assert audio.shape == (1, 3 * spoken + 2 * silence)
    assert (metrics.tokens, metrics.total_audio_duration) == (30, audio.shape[1] / tts.sr)
    assert metrics.chunk_count == len(chunks)
    for number in range(2):
        start = spoken + number * (spoken + silence)
        assert not audio[:, start : start + silence].any()
        assert audio[:, start - 200 : start - 20].any()
        assert audio[:, start + silence + 20 : start + silence + 200].any()


def test_sound_fades_beside_a_pause(tts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tts.watermarker, "apply_watermark", lambda wave, **_: wave)
    given = FIXED | {"max_new_tokens": 4, "pauses": lab.Pauses(sentence=0.1)}
    found = joined(lab.speak(tts, TEXT, **given))[0]
    monkeypatch.setattr(speaking, "faded", lambda audio, _: audio)
    expected = joined(lab.speak(tts, TEXT, **given))[0]
    edge, spoken, silence = 240, 4 * 960, 2400
    rise = (1 - torch.cos(torch.pi * (torch.arange(edge) + 0.5) / edge)) / 2
    for end in (spoken, 2 * spoken + silence):
        assert expected[end - 1].abs() > 0
        expected[end - edge : end] *= rise.flip(0)
        expected[end + silence :][:edge] *= rise
    assert torch.allclose(found, expected, atol=1e-6)


def test_one_utterance_is_what_a_stream_says(tts: Any) -> None:
    said = joined(lab.speak(tts, "Hello there.", **FIXED))
    assert torch.equal(said, joined(lab.generate_stream(tts, "Hello there.", **FIXED)))


def test_one_renderer_makes_all_utterances(tts: Any) -> None:
    said = joined(lab.speak(tts, TEXT, **FIXED, pauses=SILENT))
    parts, renderer = [], None
    for number, text in enumerate(SENTENCES):
        request = checked(tts, text, **FIXED | {"seed": speaking.seed_of(0, number)})
        renderer = renderer or stream.renderer_of(tts, request.settings, 0, request.voice.gen)
        for new, _ in token_chunks(tts, request, StageClock("cpu")):
            parts.append(stream.watermark(tts, renderer.push(new)))
    parts.append(stream.watermark(tts, renderer.push(torch.zeros(0, dtype=torch.long), last=True)))
    whole = torch.cat(parts, dim=1)
    assert said.shape == whole.shape
    assert torch.equal(said[:, :-4000], whole[:, :-4000])  # the end is in one chunk, with a watermark of its own


@pytest.mark.parametrize("overlap", [False, True])
def test_what_is_complete_is_spoken_while_the_text_is_still_arriving(tts: Any, overlap: bool) -> None:
    heard = threading.Event()

    def arriving() -> Iterator[str]:
        yield "Hello there, you. Th"
        yield "is "
        assert heard.wait(60), "the text's end was wanted before its beginning was spoken"
        yield "is it!"

    chunks = lab.speak(tts, arriving(), **FIXED, overlap=overlap)
    first = [next(chunks)[1].tokens for _ in range(3)]  # the whole first utterance
    heard.set()
    assert first[-1] == 10
    assert sum(1 for _ in chunks) == 3


def test_endless_text_is_spoken_at_clauses_and_drawn_as_needed(tts: Any) -> None:
    drawn = itertools.count()
    chunks = lab.speak(tts, ("on, "[next(drawn) % 4] for _ in itertools.count()), **FIXED, longest=40)
    for _ in range(9):  # three utterances
        next(chunks)
    chunks.close()
    assert next(drawn) <= 3 * 41


class TextError(Exception):
    pass


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize(
    ("pieces", "error", "complete"),
    [
        (lambda: ["Hello there, you. This is it!", 5, "never"], TypeError, 2),
        (
            lambda: (piece if piece != "x" else 1 / 0 for piece in ["Hello there, you. This is", "x"]),
            ZeroDivisionError,
            1,
        ),
        (lambda: [5], TypeError, 0),
        (lambda: ["Hello there, you. ", "This is[pause:1000]"], ValueError, 1),
    ],
)
def test_what_was_complete_is_spoken_before_an_error(
    tts: Any, overlap: bool, pieces: Callable[[], Any], error: type[Exception], complete: int
) -> None:
    heard: list[torch.Tensor] = []
    with pytest.raises(error):
        heard.extend(audio for audio, _ in lab.speak(tts, pieces(), **FIXED, overlap=overlap, pauses=SILENT))
    assert sum(audio.shape[1] for audio in heard) == complete * 10 * 960


WRONG = [
    ({"text": ""}, ValueError, "text='': must be a string with something to say"),
    ({"text": " ?! "}, ValueError, "must be a string with something to say"),
    ({"text": "Half \ud800"}, ValueError, "half of a surrogate pair"),
    ({"text": 5}, TypeError, "text=5: must be a string or an iterable of strings, is a int"),
    ({"text": b"Hello"}, TypeError, "text=b'Hello'"),
    ({"text": None}, TypeError, "text=None"),
    ({"pauses": 0.5}, ValueError, "pauses=0.5: must be a Pauses"),
    ({"longest": 5}, ValueError, "longest=5: must be a whole number, at least 40 and at most 400"),
    ({"seed": -1}, ValueError, "seed=-1"),
    ({"max_new_tokens": 0}, ValueError, "max_new_tokens=0"),
    ({"chunk_size": 0}, ValueError, "chunk_size=0"),
    ({"tts": 3}, TypeError, "tts: must be a ChatterboxTTS"),
]


@pytest.mark.parametrize(("changes", "error", "message"), WRONG)
def test_wrong_arguments_are_refused_when_it_is_called(
    tts: Any, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    given = {"tts": tts, "text": TEXT} | changes
    with pytest.raises(error) as raised:
        lab.speak(given.pop("tts"), given.pop("text"), **given)
    assert message in str(raised.value)


@pytest.mark.parametrize("pieces", [[], ["", " "], ["***", "\n"]])
def test_an_iterable_with_nothing_to_say_is_refused_at_its_end(tts: Any, pieces: list[str]) -> None:
    with pytest.raises(ValueError, match="text: held nothing to say"):
        list(lab.speak(tts, pieces, **FIXED))


def test_a_text_may_begin_and_end_with_a_pause(tts: Any) -> None:
    audio = joined(lab.speak(tts, "[pause:0.5]Hello there.[pause:1]", **FIXED))
    assert audio.shape == (1, 10 * 960 + 36000)
    assert not audio[:, :12000].any()
    assert not audio[:, -24000:].any()


def test_a_stream_ends_with_the_token_that_it_is_at_when_it_is_stopped(tts: Any) -> None:
    stop, heard = threading.Event(), []
    for audio, _ in lab.speak(tts, TEXT, **FIXED, stop=stop):
        heard.append(audio)
        if len(heard) == 4:
            stop.set()
    assert len(heard) == 5  # the last is what waited for its cross-fade
    assert sum(audio.shape[1] for audio in heard) % 960 == 0


def test_a_stream_that_was_stopped_before_it_began_ends_without_an_error(tts: Any) -> None:
    stop = threading.Event()
    stop.set()
    assert list(lab.speak(tts, iter(TEXT), **FIXED, stop=stop)) == []


def test_closing_ends_the_threads_of_endless_text(tts: Any) -> None:
    closed, halted = threading.Event(), threading.Event()

    def endless() -> Iterator[str]:
        try:
            yield "Hello there, you. This "
            assert halted.wait(60)
            yield from itertools.repeat("is it now! This ")
        finally:
            closed.set()

    chunks = lab.speak(tts, endless(), **FIXED, overlap=True)
    next(chunks)
    threading.Timer(0.5, halted.set).start()  # while it is being closed
    chunks.close()
    assert closed.is_set()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("chatterbox_lab")]


def test_an_iterable_runs_as_its_caller_has_set_pytorch_up(tts: Any) -> None:
    seen = []

    def pieces() -> Iterator[str]:
        for piece in TEXT:
            seen.append((torch.is_autocast_enabled("cpu"), torch.is_inference_mode_enabled()))
            yield piece

    plain = joined(lab.speak(tts, TEXT, **FIXED))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(joined(lab.speak(tts, pieces(), **FIXED)), plain)
    assert set(seen) == {(True, False)}


def test_threads_share_a_model(tts: Any, one_thread_each: None) -> None:
    alone = [joined(lab.speak(tts, TEXT, **FIXED | {"seed": seed})) for seed in range(2)]
    found: dict[int, torch.Tensor] = {}

    def work(seed: int) -> None:
        torch.set_num_threads(1)
        found[seed] = joined(lab.speak(tts, iter(TEXT), **FIXED | {"seed": seed}))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert all(torch.equal(found[seed], alone[seed]) for seed in range(2))


def test_memory_does_not_grow_with_the_text(tts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    kept, lengths, inner = [], [], Renderer.push

    def push(self: Renderer, *args: Any, **kwargs: Any) -> torch.Tensor:
        audio = inner(self, *args, **kwargs)
        lengths.append((self.made.shape, len(self.context), self.vocoder.source.shape))
        return audio

    monkeypatch.setattr(Renderer, "push", push)
    text = (f"This is number {number}. " for number in itertools.count())
    for number, _ in enumerate(lab.speak(tts, text, **FIXED, context_window=8)):
        if number in (30, 120):
            gc.collect()
            kept.append(sum(type(found) is torch.Tensor for found in gc.get_objects()))
        if number == 120:
            break
    assert kept[0] == kept[1]
    assert len(set(lengths[20:])) == len(set(lengths[20:23]))


@pytest.mark.parametrize("overlap", [False, True])
def test_two_hundred_sentences_leave_memory_as_twenty_do(
    tts: Any, monkeypatch: pytest.MonkeyPatch, overlap: bool, one_thread_each: None
) -> None:
    """Of each sentence two tokens are said, and S3Gen's flow and vocoder make zeros."""
    monkeypatch.setattr(Flow, "mel", lambda _, window, *__: torch.zeros(1, 80, 2 * len(window)))
    monkeypatch.setattr(Vocoder, "__call__", lambda _, mel, __: torch.zeros(1, mel.shape[2] * 480))
    monkeypatch.setattr(tts.watermarker, "apply_watermark", lambda wave, **_: wave)
    renderers, tensors, resident, inner = [], [], [], Renderer.__init__
    monkeypatch.setattr(Renderer, "__init__", lambda self, *given: renderers.append(self) or inner(self, *given))
    given = FIXED | {"max_new_tokens": 2, "schedule": "grow", "context_window": 8, "overlap": overlap}
    text = (f"This is the sentence with number {number}, and it ends here. " for number in itertools.count())
    for number, (audio, _) in enumerate(lab.speak(tts, text, **given)):
        assert audio.shape[1] > 960
        if number in (20, 200):
            gc.collect()
            tensors.append(sum(type(found) is torch.Tensor for found in gc.get_objects()))
            resident.append(psutil.Process().memory_info().rss)
            assert len(renderers[0].context) == 8
            assert renderers[0].made.shape[2] <= max(2 * 8, renderers[0].frames)
        if number == 200:
            break
    assert len(renderers) == 1
    assert abs(tensors[1] - tensors[0]) <= (60 if overlap else 0)  # the threads are at some; a leak has 180
    assert resident[1] - resident[0] < 48 * 2**20  # the allocator's own way


@pytest.mark.parametrize("schedule", [{"schedule": "grow"}, {"flow": "cached"}, {"analyzer": "probe", "guard": True}])
def test_every_way_to_stream_speaks(tts: Any, schedule: dict[str, Any]) -> None:
    runs = [joined(lab.speak(tts, text, **FIXED, **schedule)) for text in (TEXT, iter(TEXT))]
    assert runs[0].shape == (1, 3 * 10 * 960 + 2 * round(0.2 * tts.sr))
    assert torch.equal(*runs)


PARAGRAPH = "Hello there, you. " * 5 + "This is a longer sentence, which goes on; it goes on and on. [pause:1]It ends."
GROWING = {
    "schedule": "grow",
    "max_new_tokens": 30,
    "longest": 40,
    "costs": lab.Costs(token=0.008, prefill=0.05, chunk=0.05, window_token=0.001, prompt_tokens=10, error=0.1),
}


@pytest.fixture
def pushed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """New tokens and context of every chunk that is rendered."""
    found, inner = [], Renderer.push

    def push(self: Renderer, tokens: torch.Tensor, last: bool = False) -> torch.Tensor:
        found.append((len(tokens), len(self.context)))
        return inner(self, tokens, last=last)

    monkeypatch.setattr(Renderer, "push", push)
    return found


def test_the_growing_schedule_goes_on_over_utterances(tts: Any, asked: list[Any], pushed: list[Any]) -> None:
    """And nothing underruns by the costs that it counts with."""
    given = FIXED | GROWING
    chunks = [audio.shape[1] / tts.sr for audio, _ in lab.speak(tts, PARAGRAPH, **given, context_window=20)]
    sizes = [size for size, _ in pushed]
    spoken = len(asked)
    assert sum(sizes) == 30 * spoken
    slow, clock, said, arrivals = given["costs"].slower(1.1), 0.0, 0, []
    for new, before in pushed:
        clock += slow.chunk_seconds(new, before) + slow.prefill * (new > 0 and said % 30 == 0)
        said += new
        arrivals.append(clock)
    heard = play(arrivals[: len(chunks)], chunks)
    assert heard.underruns == 0
    pushed.clear()
    for text in (iter(PARAGRAPH), [PARAGRAPH[:40], PARAGRAPH[40:]]):
        pushed.clear()
        again = [audio.shape[1] / tts.sr for audio, _ in lab.speak(tts, text, **given, context_window=20)]
        assert ([size for size, _ in pushed], again) == (sizes, chunks)
    pushed.clear()
    del given["longest"]
    joined(lab.generate_stream(tts, SENTENCES[0], **given, context_window=20))
    alone = [size for size, _ in pushed]
    assert sizes[: len(alone)] == alone
    assert len(alone) > 2
    assert len([size for size in sizes if size]) < len(alone) * spoken / 2
    assert sizes.count(30) == spoken - 1


def test_the_growing_schedule_counts_a_pause_by_itself(tts: Any, pushed: list[Any]) -> None:
    joined(lab.speak(tts, "[pause:2]Hello there, you.", **FIXED | GROWING))
    assert pushed[0][0] == 0
    assert pushed[1][0] > 2 * FIXED["chunk_size"]


def test_the_growing_schedule_counts_each_utterances_prefill(tts: Any, pushed: list[Any]) -> None:
    given = FIXED | {"schedule": "grow", "max_new_tokens": 14}
    joined(lab.speak(tts, TEXT, **given, costs=lab.Costs(prefill=9.0)))
    assert [size for size, _ in pushed] == [4, 7, 3] * 3 + [0]
    pushed.clear()
    joined(lab.speak(tts, TEXT, **given, costs=lab.Costs()))
    assert [size for size, _ in pushed] == [4, 7, 3, 14, 14, 0]


def test_a_schedule_of_ones_own_begins_anew(tts: Any, pushed: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SCHEDULES, "odd", lambda _: iter([3, 6, 9, 9, 9]))
    joined(lab.speak(tts, TEXT, **FIXED | {"schedule": "odd"}))
    assert [size for size, _ in pushed] == [3, 6, 1] * 3 + [0]


def test_seeds_of_utterances_differ_and_stay_in_range() -> None:
    seeds = [speaking.seed_of(0, number) for number in range(100)]
    assert len(set(seeds)) == 100
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert seeds[0] == 0
    assert speaking.seed_of(None, 3) is None


def test_the_sentences_of_these_tests_are_cut_as_written() -> None:
    assert [one.text for one in utterances(TEXT)] == SENTENCES
