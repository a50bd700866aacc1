from __future__ import annotations

import gc
import inspect
import itertools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from chatterbox.tts import ChatterboxTTS
from conftest import TEXT, trace

import chatterbox_lab as lab
from chatterbox_lab.engine import stream
from chatterbox_lab.engine.s3gen.flow import Flow
from chatterbox_lab.engine.s3gen.render import Renderer
from chatterbox_lab.engine.s3gen.vocoder import Vocoder
from chatterbox_lab.engine.t3 import decode, spies
from chatterbox_lab.engine.t3.backends import ANALYZERS
from chatterbox_lab.engine.variants import STREAMING
from chatterbox_lab.study import fallback, upstream

FIXED = {"seed": 0, "ignore_eos": True, "flow_steps": 2}  # two Euler steps, for time: nothing here is about the sound


def joined(chunks: Iterator[tuple[torch.Tensor, Any]]) -> torch.Tensor:
    return torch.cat([audio for audio, _ in chunks], dim=1)


@pytest.mark.parametrize("chunk_size", [1, 7, 25, 60])
@pytest.mark.parametrize(("context_window", "fade_duration"), [(0, 0.02), (0, 0.0), (3, 0.013), (50, 0.5)])
def test_every_token_becomes_exactly_960_samples(
    tts: Any, chunk_size: int, context_window: int, fade_duration: float
) -> None:
    chunks = list(
        lab.generate_stream(
            tts, TEXT, chunk_size=chunk_size, context_window=context_window, fade_duration=fade_duration,
            max_new_tokens=25, **FIXED,
        )
    )  # fmt: skip
    metrics = chunks[-1][1]
    assert sum(audio.shape[1] for audio, _ in chunks) == 25 * 960
    assert all(audio.shape[0] == 1 and audio.shape[1] > 0 and audio.isfinite().all() for audio, _ in chunks)
    assert metrics.tokens == 25
    assert metrics.total_audio_duration == 1.0
    assert metrics.chunk_count == len(chunks) == -(-25 // chunk_size)


def test_a_growing_schedule_cuts_as_planned_and_can_be_repeated(tts: Any) -> None:
    settings = lab.BALANCED.replace(schedule="grow", chunk_size=3, max_chunk_size=20, fade_duration=0)
    runs = [list(lab.generate_stream(tts, TEXT, settings, max_new_tokens=60, **FIXED)) for _ in range(2)]
    assert [audio.shape[1] / 960 for audio, _ in runs[0]] == [3, 6, 12, 20, 19]
    assert list(itertools.islice(settings.chunk_sizes(), 5)) == [3, 6, 12, 20, 20]
    assert torch.equal(joined(iter(runs[0])), joined(iter(runs[1])))
    expected = lab.speech_tokens(tts, TEXT, max_new_tokens=60, **FIXED)
    assert torch.equal(lab.speech_tokens(tts, TEXT, settings, max_new_tokens=60, **FIXED), expected)


def test_an_application_gets_the_growing_schedule_by_the_patch(tts: Any) -> None:
    with lab.patch(tts, schedule="grow", ignore_eos=True):
        stream = tts.generate_stream(TEXT, chunk_size=4, print_metrics=False)
        samples = [next(stream)[0].shape[1] for _ in range(3)]
        stream.close()
    assert samples == [4 * 960 - 480, 7 * 960, 14 * 960]


@pytest.mark.parametrize("stop_at", [0, 1, 10, 14, 20])
def test_the_last_chunk_is_never_lost_when_speech_stops(tts: Any, stop_at: int) -> None:
    count = itertools.count()

    def stop(module: Any, inputs: Any, logits: torch.Tensor) -> torch.Tensor:
        logits[..., tts.t3.hp.stop_speech_token] = 1e4 if next(count) == stop_at else -1e4
        return logits

    handle = tts.t3.speech_head.register_forward_hook(stop)
    try:
        chunks = list(lab.generate_stream(tts, TEXT, chunk_size=10, seed=0, max_new_tokens=40))
    finally:
        handle.remove()
    assert sum(audio.shape[1] for audio, _ in chunks) == stop_at * 960


@pytest.mark.parametrize("mode", ANALYZERS)
def test_same_seed_and_settings_give_the_same_audio(tts: Any, mode: str) -> None:
    runs = [joined(lab.generate_stream(tts, TEXT, analyzer=mode, max_new_tokens=8, **FIXED)) for _ in range(2)]
    other = joined(lab.generate_stream(tts, TEXT, max_new_tokens=8, seed=1, ignore_eos=True))
    assert torch.equal(*runs)
    assert not torch.equal(runs[0], other)


def test_one_chunk_is_the_whole_utterance(tts: Any) -> None:
    whole = lab.generate(tts, TEXT, max_new_tokens=12, **FIXED)
    assert torch.equal(joined(lab.generate_stream(tts, TEXT, chunk_size=12, max_new_tokens=12, **FIXED)), whole)


def test_upstreams_whole_utterance_is_measured_like_a_stream(tts: Any) -> None:
    expected = lab.upstream_tokens(tts, TEXT, max_new_tokens=12, **FIXED)
    (audio, metrics), *more = list(upstream.upstream_whole(tts, TEXT, max_new_tokens=12, **FIXED))
    assert not more
    assert audio.shape == (1, len(expected) * 960)
    assert (metrics.tokens, metrics.chunk_count) == (len(expected), 1)
    assert metrics.t3_seconds > 0
    assert metrics.s3gen_seconds > 0
    parts = metrics.t3_seconds + metrics.s3gen_seconds + metrics.watermark_seconds
    assert parts <= metrics.total_generation_time


def test_chunks_do_not_change_what_is_said(tts: Any) -> None:
    """Audio differs only by S3Gen's view of the future; the tokens behind it are the same."""
    whole = lab.generate(tts, TEXT, max_new_tokens=40, **FIXED)
    streamed = joined(lab.generate_stream(tts, TEXT, chunk_size=10, context_window=30, max_new_tokens=40, **FIXED))
    assert torch.cosine_similarity(whole, streamed).item() > 0.8


def test_audio_is_plain_and_the_callers_mode_untouched(tts: Any) -> None:
    for audio, _ in lab.generate_stream(tts, TEXT, chunk_size=3, max_new_tokens=6, **FIXED):
        assert (audio.dtype, audio.device.type, audio.is_inference()) == (torch.float32, "cpu", False)
        assert not torch.is_inference_mode_enabled()
        audio.mul_(0.5)
    assert not lab.speech_tokens(tts, TEXT, max_new_tokens=2).is_inference()


def test_arguments_leave_the_voice_as_it_is(tts: Any) -> None:
    before = tts.conds.t3.emotion_adv.clone()
    lab.speech_tokens(tts, TEXT, exaggeration=3.0, max_new_tokens=2)
    assert torch.equal(tts.conds.t3.emotion_adv, before)


def test_exaggeration_reaches_t3(tts: Any) -> None:
    neutral, excited = (
        tts.t3.prepare_conditioning(decode.conditioning(tts, exaggeration)) for exaggeration in (0.5, 3.0)
    )
    changed = (neutral - excited).abs().amax(dim=(0, 2)) > 0
    assert changed.tolist() == [False] * (len(changed) - 1) + [True]  # the emotion's is the last position


def test_two_streams_of_one_model_may_take_turns(tts: Any) -> None:
    arguments = {"chunk_size": 5, "max_new_tokens": 15, "ignore_eos": True}
    alone = [joined(lab.generate_stream(tts, TEXT, seed=seed, **arguments)) for seed in (0, 1)]
    streams = [lab.generate_stream(tts, TEXT, seed=seed, analyzer="probe", **arguments) for seed in (0, 1)]
    together: list[list[torch.Tensor]] = [[], []]
    for pair in zip(*streams, strict=True):
        for parts, (audio, _) in zip(together, pair, strict=True):
            parts.append(audio)
    assert all(torch.equal(one, torch.cat(parts, 1)) for one, parts in zip(alone, together, strict=True))


class StageError(Exception):
    pass


@pytest.mark.parametrize("mode", ANALYZERS)
@pytest.mark.parametrize("end", ["success", "exception", "interrupt", "close", "forgotten"])
@pytest.mark.parametrize("spied", [False, True])
def test_the_layers_are_as_before_however_a_call_ends(
    voice: Any, mode: str, end: str, spied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if spied:  # what a plain generate() leaves behind stays where it was, too
        lab.upstream_tokens(voice, TEXT, max_new_tokens=1, leave_spies=True)
    before = trace(voice)
    error = {"exception": StageError, "interrupt": KeyboardInterrupt}.get(end)
    chunks = lab.generate_stream(voice, TEXT, chunk_size=2, max_new_tokens=6, analyzer=mode, **FIXED)
    next(chunks)
    assert trace(voice) == before  # also while the caller has its turn
    if error:
        monkeypatch.setattr(torch.nn.functional, "silu", lambda *_, **__: (_ for _ in ()).throw(error()))
        with pytest.raises(error):
            list(chunks)
        monkeypatch.undo()
    elif end == "success":
        list(chunks)
    elif end == "close":
        chunks.close()
    del chunks
    gc.collect()
    assert trace(voice) == before
    spies.remove_spies(voice.t3.tfmr)


@pytest.mark.parametrize("end", ["success", "close"])
def test_upstreams_stream_is_cleared_away_after_it(tts: Any, end: str) -> None:
    chunks = lab.upstream_stream(tts, TEXT, chunk_size=3, max_new_tokens=6, **FIXED)
    audio, metrics = next(chunks)
    if end == "success":
        assert len(list(chunks)) == 1
        assert metrics.tokens == 6
        assert metrics.total_audio_duration == pytest.approx(6 * 0.04)
    chunks.close()
    assert audio.shape == (1, 3 * 960)
    assert 0 < metrics.t3_seconds + metrics.s3gen_seconds <= metrics.total_generation_time
    assert fallback.count_spies(tts.t3.tfmr) == {"hooks": 0, "wrapped forwards": 0}


def test_a_hundred_calls_leave_nothing_behind(tts: Any) -> None:
    memory = []
    before = trace(tts)
    for call in range(100):
        chunks = lab.generate_stream(
            tts, "Hi.", chunk_size=1, context_window=0, max_new_tokens=2, analyzer=ANALYZERS[call % 4], **FIXED
        )
        aborted = call % 11 == 5 or call == 3  # 10 of them, in every mode
        for _ in chunks:
            if aborted:
                break
        if aborted and call % 2:
            with pytest.raises(StageError):
                chunks.throw(StageError)
        del chunks
        if call in (49, 99):
            gc.collect()
            tensors = sum(type(found) is torch.Tensor for found in gc.get_objects())
            memory.append((tensors, psutil.Process().memory_info().rss))
    assert trace(tts) == before
    assert fallback.count_spies(tts.t3.tfmr) == {"hooks": 0, "wrapped forwards": 0}
    assert memory[1][0] == memory[0][0]
    assert memory[1][1] - memory[0][1] < 48 * 2**20  # the allocator's own way


def test_a_chunk_costs_the_same_however_much_was_said(tts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    work: list[int] = []
    inner = Flow.mel

    def counted(self: Flow, *args: Any) -> torch.Tensor:
        work.append(inner(self, *args).shape[2])
        return inner(self, *args)

    monkeypatch.setattr(Flow, "mel", counted)
    list(lab.generate_stream(tts, TEXT, chunk_size=2, context_window=4, max_new_tokens=30, **FIXED))
    assert work == [4, 8, *[12] * 13]


FLOWS = [{"flow": "cached"}, {"flow_dtype": "bfloat16"}, {"flow_steps": 4}]


@pytest.mark.parametrize("changes", [*FLOWS, {"prompt_tokens": 5}])
def test_every_way_to_make_mel_streams_the_same_tokens(tts: Any, changes: dict[str, Any]) -> None:
    settings, fixed = lab.BASELINE.replace(chunk_size=9, **changes), {"seed": 0, "ignore_eos": True}
    runs = [list(lab.generate_stream(tts, TEXT, settings, max_new_tokens=30, **fixed)) for _ in range(2)]
    audio = joined(iter(runs[0]))
    assert audio.shape == (1, 30 * 960)
    assert torch.equal(audio, joined(iter(runs[1])))  # repeatable, also with what is kept between streams
    plain = joined(lab.generate_stream(tts, TEXT, lab.BASELINE, chunk_size=9, max_new_tokens=30, **fixed))
    assert not torch.equal(audio, plain)
    assert lab.generate(tts, TEXT, settings, max_new_tokens=5, **fixed).shape == (1, 5 * 960)


@pytest.fixture
def no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


@pytest.mark.parametrize("seed", [0, None])
@pytest.mark.parametrize(
    "changes", [{}, {"flow": "cached"}, {"schedule": "grow"}, {"analyzer": "probe", "guard": True}]
)
def test_overlapped_stages_say_the_same(
    tts: Any, no_thread_is_left: None, one_thread_each: None, changes: dict[str, Any], seed: int | None
) -> None:
    settings = lab.BASELINE.replace(chunk_size=6, ignore_eos=True, **changes)
    runs, states = [], []
    for overlap in (False, True):
        torch.manual_seed(3)
        runs.append(list(lab.generate_stream(tts, TEXT, settings, max_new_tokens=40, overlap=overlap, seed=seed)))
        states.append(torch.get_rng_state())
    assert [audio.shape for audio, _ in runs[1]] == [audio.shape for audio, _ in runs[0]]
    assert torch.equal(joined(iter(runs[1])), joined(iter(runs[0])))
    assert torch.equal(*states)
    metrics = runs[1][-1][1]
    assert (metrics.tokens, metrics.total_audio_duration) == (40, 40 / 25)
    assert min(metrics.t3_seconds, metrics.s3gen_seconds, metrics.watermark_seconds) > 0


def test_overlapped_stages_share_pytorchs_threads(
    tts: Any, no_thread_is_left: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, set[int]] = {"decode": set(), "push": set(), "watermark": set()}

    def noting(name: str, inner: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: seen[name].add(torch.get_num_threads()) or inner(*args, **kwargs)

    for owner, name in ((decode, "decode"), (Renderer, "push"), (stream, "watermark")):
        monkeypatch.setattr(owner, name, noting(name, getattr(owner, name)))
    before = torch.get_num_threads()
    torch.set_num_threads(5)
    try:
        list(lab.generate_stream(tts, "Hi.", chunk_size=1, max_new_tokens=2, overlap=True, **FIXED))
        assert torch.get_num_threads() == 5
    finally:
        torch.set_num_threads(before)
    assert seen == {"decode": {2}, "push": {2}, "watermark": {1}}


def test_t3_stops_after_its_token_when_an_overlapped_stream_is_closed(
    tts: Any, no_thread_is_left: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps, events = itertools.count(1), []
    inner = stream.token_chunks
    monkeypatch.setattr(stream, "token_chunks", lambda *args: events.append(args[-1]) or inner(*args))

    def waiting(*_: Any) -> None:
        if next(steps) == 15:
            assert events[0].wait(60)

    handle = tts.t3.speech_head.register_forward_hook(waiting)
    try:
        speaking = lab.generate_stream(tts, TEXT, chunk_size=10, max_new_tokens=900, overlap=True, **FIXED)
        assert next(speaking)[1].tokens == 10
        speaking.close()
    finally:
        handle.remove()
    assert next(steps) <= 16  # it may be closed before T3 got so far


def test_tokens_of_an_overlapped_stream_are_counted_when_they_are_heard(tts: Any, no_thread_is_left: None) -> None:
    stream = lab.generate_stream(tts, TEXT, chunk_size=5, max_new_tokens=40, overlap=True, **FIXED)
    assert [next(stream)[1].tokens for _ in range(3)] == [5, 10, 15]
    stream.close()


@pytest.mark.parametrize("end", ["close", "t3", "s3gen", "watermark"])
def test_an_overlapped_stream_leaves_nothing_behind(
    tts: Any, no_thread_is_left: None, end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, chunks = trace(tts), 0
    broken = {"t3": (decode, "decode"), "s3gen": (Renderer, "push"), "watermark": (stream, "watermark")}
    if end != "close":
        owner, name = broken[end]
        inner, calls = getattr(owner, name), itertools.count()

        def breaking(*args: Any, **kwargs: Any) -> Any:
            if end == "t3":
                return itertools.chain(itertools.islice(inner(*args, **kwargs), 12), fail())
            if next(calls) == 2:
                raise MemoryError("not enough")
            return inner(*args, **kwargs)

        def fail() -> Iterator[None]:
            raise MemoryError("not enough")
            yield

        def closeable(*args: Any, **kwargs: Any) -> Any:
            yield from breaking(*args, **kwargs)

        monkeypatch.setattr(owner, name, closeable if end == "t3" else breaking)
    speaking = lab.generate_stream(tts, TEXT, chunk_size=6, max_new_tokens=900, overlap=True, analyzer="stock", **FIXED)
    with pytest.raises(MemoryError, match="not enough") if end != "close" else nullcontext():
        for _ in speaking:
            chunks += 1
            if end == "close" and chunks == 2:
                speaking.close()
                break
    assert chunks == 2
    assert trace(tts) == before


@pytest.mark.parametrize("changes", [{}, {"schedule": "grow", "max_chunk_size": 20}, {"flow": "cached"}])
def test_after_a_warm_up_a_stream_meets_no_new_length(
    tts: Any, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths: list[int] = []
    vocode = Vocoder.__call__
    monkeypatch.setattr(
        Vocoder, "__call__", lambda self, mel, new: lengths.append(mel.shape[2]) or vocode(self, mel, new)
    )
    settings = lab.BALANCED.replace(chunk_size=7, context_window=12, **changes)
    state = torch.get_rng_state()
    assert lab.warm_up(tts, settings) > 0
    assert torch.equal(torch.get_rng_state(), state)
    warm = set(lengths)
    del lengths[:]
    list(lab.generate_stream(tts, TEXT, settings, max_new_tokens=100, **FIXED))
    assert set(lengths) <= warm
    with pytest.raises(ValueError, match="chunk_size=0"):
        lab.warm_up(tts, chunk_size=0)


def test_the_watermark_is_there_and_keeps_the_length(tts: Any) -> None:
    audio = 0.1 * torch.randn(1, 24000)
    for samples in (1, 480, 960, 2000, 24000):
        assert stream.watermark(tts, audio[:, :samples]).shape == (1, samples)
    marked = stream.watermark(tts, audio)
    found = [tts.watermarker.get_watermark(signal[0].numpy(), sample_rate=24000).mean() for signal in (marked, audio)]
    assert found[0] > 0.9 > found[1]


def test_metrics_add_up(tts: Any) -> None:
    seen = []
    for _, metrics in lab.generate_stream(tts, TEXT, chunk_size=5, max_new_tokens=20, **FIXED):
        seen.append((metrics.total_generation_time, metrics.tokens, metrics.chunk_count))
    assert seen == sorted(seen)
    assert metrics.latency_to_first_chunk == seen[0][0]
    assert metrics.rtf == pytest.approx(metrics.total_generation_time / metrics.total_audio_duration)
    stages = metrics.t3_seconds + metrics.s3gen_seconds + metrics.watermark_seconds
    assert 0.5 * metrics.total_generation_time < stages <= metrics.total_generation_time
    assert metrics.peak_memory_bytes > 10**8


def test_the_callers_time_is_not_counted(tts: Any) -> None:
    for _, metrics in lab.generate_stream(tts, TEXT, chunk_size=2, max_new_tokens=4, **FIXED):
        before = metrics.total_generation_time
        time.sleep(5 * before)
    assert metrics.total_generation_time < 5 * before


# The three snippets of the report, to the letter, `model` and `text` given; they must run unchanged inside a patch.
SNIPPETS = [
    """model.generate_stream(
    text=text,
    chunk_size=75,         # Efficient chunk size
    context_window=150,    # 2x chunk_size for quality
    temperature=0.8,
    cfg_weight=0.5
)""",
    """model.generate_stream(
    text=text,
    chunk_size=50,         # Balance of latency vs efficiency
    context_window=100,    # 2x chunk_size for proper continuity
    temperature=0.8,
    cfg_weight=0.5
)""",
]
FLAGS = """torch.set_float32_matmul_precision('high')  # TensorFloat-32
torch.backends.cudnn.benchmark = True      # Optimize for consistent shapes
torch.backends.cuda.matmul.allow_tf32 = True  # Enable TF32 on Ampere
"""


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_the_reports_snippets_run_unchanged(
    tts: Any, snippet: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tts.t3.hp, "max_speech_tokens", 4096)
    with lab.tune_torch(), lab.patch(tts):
        exec(FLAGS, {"torch": torch})
        chunks = eval(snippet, {"model": tts, "text": TEXT})
        audio, metrics = next(chunks)
        chunks.close()
    size = 75 if "75" in snippet else 50
    assert audio.shape == (1, size * 960 - 480)
    assert metrics.tokens == size
    assert "Latency to first chunk" in capsys.readouterr().out
    assert torch.get_float32_matmul_precision() == "highest"


def test_a_patch_keeps_upstreams_signatures_and_undoes_itself(tts: Any) -> None:
    plain = tts.generate_stream
    with lab.patch(tts):
        for name in ("generate_stream", "generate", "prepare_conditionals"):
            ours, theirs = (
                inspect.signature(function).parameters
                for function in (getattr(tts, name), getattr(ChatterboxTTS, name))
            )
            added = {k: p for k, p in ours.items() if k not in theirs}
            kept = [(k, p.kind, p.default) for k, p in ours.items() if k in theirs]
            assert kept == [(k, p.kind, p.default) for k, p in theirs.items() if k != "self"]
            assert list(added) == (["seed", "max_new_tokens", "stop"] if name.startswith("generate") else [])
            assert all(p.kind is p.KEYWORD_ONLY and p.default is not p.empty for p in added.values())
        assert tts.generate_stream != plain
    assert tts.generate_stream == plain
    patch = lab.patch(tts, analyzer="probe")
    assert tts.generate_stream != plain
    patch.undo()
    patch.undo()
    assert tts.generate_stream == plain


def test_a_patched_model_says_what_ours_says(tts: Any) -> None:
    with upstream.stop_suppressed(tts.t3):
        with lab.patch(tts):
            torch.manual_seed(3)
            patched = list(itertools.islice(tts.generate_stream(TEXT, chunk_size=5, print_metrics=False), 3))
        torch.manual_seed(3)
        ours = list(itertools.islice(lab.generate_stream(tts, TEXT, lab.BASELINE, chunk_size=5), 3))
    assert all(torch.equal(one, other) for (one, _), (other, _) in zip(patched, ours, strict=True))


def test_every_argument_of_a_patched_call_arrives(tts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    arrived: list[lab.StreamSettings] = []

    def nothing(t3: Any, cond: Any, text: Any, settings: lab.StreamSettings, **_: Any) -> Any:
        arrived.append(settings)
        yield from ()

    monkeypatch.setattr(decode, "decode", nothing)
    spoken = {"temperature": 0.7, "cfg_weight": 0.3, "exaggeration": 0.9}
    cut = {"chunk_size": 5, "context_window": 9, "fade_duration": 0.01}
    with lab.patch(tts, analyzer="probe", guard=True):
        list(tts.generate_stream(TEXT, **spoken, **cut))
        tts.generate(TEXT, **spoken)
    for settings, wanted in zip(arrived, (spoken | cut, spoken), strict=True):
        assert settings == STREAMING.settled(lab.StreamSettings(analyzer="probe", guard=True, **wanted))


def test_a_second_patch_is_refused(tts: Any) -> None:
    with lab.patch(tts):
        with pytest.raises(ValueError, match="already patched"):
            lab.patch(tts)
        assert tts.generate_stream.patch.tts is tts
    assert "generate_stream" not in vars(tts)


def test_a_recording_belongs_to_the_patched_calls_alone(tts: Any) -> None:
    for call in (lab.generate_stream, lab.generate, lab.speech_tokens, lab.warm_up):
        with pytest.raises(ValueError, match="recording='voice': no such setting"):
            call(tts, *([] if call is lab.warm_up else [TEXT]), recording="voice")


def test_a_patch_takes_the_place_of_an_applications_own_wrapper(tts: Any) -> None:
    plain = tts.generate_stream
    tts.generate_stream = lambda *args, **kwargs: plain(*args, **kwargs)
    with lab.patch(tts, ignore_eos=True):
        stream = tts.generate_stream(TEXT, None, 0.5, 0.5, 0.8, 4, print_metrics=False)
        assert next(stream)[0].shape == (1, 4 * 960 - 480)
        stream.close()
    del tts.generate_stream


def test_a_seed_may_be_given_to_a_warm_up(tts: Any) -> None:
    assert lab.warm_up(tts, lab.BASELINE, chunk_size=2, context_window=0, seed=3) > 0


@pytest.mark.parametrize("call", [lab.generate, stream.render])
def test_silence_is_an_empty_utterance(tts: Any, call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    none = torch.zeros(0, dtype=torch.long)
    monkeypatch.setattr(stream, "_all_tokens", lambda *_, **__: none)
    audio = call(tts, none if call is stream.render else TEXT)
    assert (audio.shape, audio.dtype) == ((1, 0), torch.float32)


def test_upstream_loses_what_does_not_fill_a_chunk(tts: Any) -> None:
    """Its loop ends at the token limit without yielding its buffer; ours says all of it."""
    heard = {}
    for name, call in (("upstream", lab.upstream_stream), ("ours", lab.generate_stream)):
        heard[name] = joined(call(tts, TEXT, chunk_size=4, max_new_tokens=6, **FIXED)).shape[1] / 960
    assert heard == {"upstream": 4, "ours": 6}


def test_sixteen_bit_samples_are_clamped_not_wrapped() -> None:
    audio = torch.tensor([[0.0, 1.0, 1.7, -1.0, -3.0, 0.5, -1e-6]])
    for shaped in (audio, audio[0], audio.double(), audio.clone().requires_grad_()):
        found = lab.pcm16(shaped)
        assert found.dtype == np.int16
        assert found.tolist() == [0, 32767, 32767, -32767, -32767, 16384, 0]
    assert lab.pcm16(torch.zeros(1, 0)).tobytes() == b""
    with pytest.raises(ValueError, match="audio of shape"):
        lab.pcm16(torch.zeros(2, 5))
    with pytest.raises(ValueError, match="audio has samples that are NaN"):
        lab.pcm16(torch.tensor([0.0, float("nan")]))
