from __future__ import annotations

import copy
import inspect
import itertools
import re
import types
import warnings
from collections.abc import Callable, Iterator
from dataclasses import fields
from threading import Event
from typing import Any

import numpy as np
import pytest
import torch
from chatterbox.tts import ChatterboxTTS, StreamingMetrics, punc_norm
from conftest import TEXT
from ends import stopping
from transformers import GPT2Config, GPT2Model

import chatterbox_lab as lab
from chatterbox_lab.engine import stream
from chatterbox_lab.engine.s3gen.render import Renderer
from chatterbox_lab.engine.t3 import decode
from chatterbox_lab.study import upstream

METHODS = ("generate", "generate_stream", "prepare_conditionals")
RECORDING = (0.1 * np.random.default_rng(0).standard_normal(48000).astype(np.float32), 24000)
OTHER = (0.1 * np.random.default_rng(1).standard_normal(48000).astype(np.float32), 24000)
VALUES: dict[str, Any] = {
    "text": "Something else.",
    "audio_prompt_path": RECORDING,
    "wav_fpath": RECORDING,
    "exaggeration": 0.9,
    "cfg_weight": 0.3,
    "temperature": 0.7,
    "chunk_size": 3,
    "context_window": 9,
    "fade_duration": 0.01,
    "print_metrics": False,
}
"""Something other than the default for every parameter of the release."""


class StageError(Exception):
    pass


pytestmark = pytest.mark.filterwarnings("ignore:the recording")


def plain(tts: Any) -> ChatterboxTTS:
    """The same model as an object of upstream's own class."""
    other = ChatterboxTTS.__new__(ChatterboxTTS)
    vars(other).update(vars(tts))
    return other


@pytest.fixture(params=[True, False], ids=["lab's class", "upstream's class"])
def model(request: pytest.FixtureRequest, tts: Any) -> Any:
    return tts if request.param else plain(tts)


def release(name: str) -> dict[str, inspect.Parameter]:
    parameters = dict(inspect.signature(getattr(ChatterboxTTS, name)).parameters)
    del parameters["self"]
    return parameters


def run(result: Any) -> Any:
    """The chunks of a stream; what else was returned as it is."""
    return list(result) if inspect.isgenerator(result) else result


def alone(tts: Any) -> Any:
    """The model as upstream's own methods expect it; they leave nothing on it."""
    return upstream._alone(tts, stream.checked(tts, TEXT, lab.BASELINE, seed=0))


@pytest.fixture
def arrived(monkeypatch: pytest.MonkeyPatch) -> list[tuple[torch.Tensor, lab.StreamSettings, Any]]:
    """Text tokens, settings and conditioning with which T3 was asked to speak; it says nothing."""
    calls: list[tuple[torch.Tensor, lab.StreamSettings, Any]] = []

    def nothing(t3: Any, cond: Any, text: torch.Tensor, settings: lab.StreamSettings, **_: Any) -> Iterator[None]:
        calls.append((text, settings, cond))
        yield from ()

    monkeypatch.setattr(decode, "decode", nothing)
    return calls


def ways(name: str) -> Iterator[tuple[str, tuple[Any, ...], dict[str, Any]]]:
    """A call for every parameter of the release, once by its position and once by its keyword."""
    names = list(release(name))
    for number, parameter in enumerate(names):
        yield f"{parameter}, by position", tuple(VALUES[other] for other in names[: number + 1]), {}
        needed = {other: VALUES[other] for other in names if release(name)[other].default is inspect.Parameter.empty}
        yield f"{parameter}, by keyword", (), needed | {parameter: VALUES[parameter]}


@pytest.mark.parametrize("name", METHODS)
def test_every_parameter_of_the_release_is_tried(name: str) -> None:
    assert release(name).keys() <= VALUES.keys()
    assert all(VALUES[parameter] is not found.default for parameter, found in release(name).items())


@pytest.mark.parametrize("name", METHODS[:2])
def test_every_parameter_arrives_by_position_and_by_keyword(
    model: Any, name: str, arrived: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    own = model.conds
    for way, positional, keywords in ways(name):
        model.conds = own
        del arrived[:]
        with lab.patch(model):
            run(getattr(model, name)(*positional, **keywords))
        given = dict(zip(release(name), positional, strict=False)) | keywords
        expected = {k: given.get(k, p.default) for k, p in release(name).items()}
        ((text, settings, cond),) = arrived
        assert torch.equal(text, stream.checked(model, expected.pop("text")).text_tokens), way
        assert (model.conds is own) == (expected.pop("audio_prompt_path") is None), way
        expected.pop("print_metrics", None)
        assert {k: getattr(settings, k) for k in expected} == expected, way
        assert cond.emotion_adv.item() == pytest.approx(expected["exaggeration"]), way
        assert torch.equal(cond.speaker_emb, model.conds.t3.speaker_emb), way


def test_the_voice_is_prepared_by_position_and_by_keyword(model: Any) -> None:
    for way, positional, keywords in ways("prepare_conditionals"):
        with lab.patch(model):
            assert model.prepare_conditionals(*positional, **keywords) is None
        given = dict(zip(release("prepare_conditionals"), positional, strict=False)) | keywords
        strength = given.get("exaggeration", release("prepare_conditionals")["exaggeration"].default)
        assert model.conds.t3.emotion_adv.item() == pytest.approx(strength), way


@pytest.mark.parametrize("name", METHODS)
def test_what_the_release_does_not_take_is_refused_as_by_it(model: Any, name: str) -> None:
    calls = [((), {}), ((*(None for _ in release(name)), 1), {}), ((TEXT,), {"chunksize": 3})]
    for positional, keywords in calls:
        with pytest.raises(TypeError):
            getattr(ChatterboxTTS, name)(model, *positional, **keywords)
        with lab.patch(model), pytest.raises(TypeError):
            getattr(model, name)(*positional, **keywords)


@pytest.mark.parametrize("name", METHODS)
def test_a_patched_method_looks_like_the_releases(model: Any, name: str) -> None:
    theirs = getattr(ChatterboxTTS, name) if type(model) is ChatterboxTTS else getattr(type(model), name)
    with lab.patch(model):
        ours = getattr(model, name)
        assert (ours.__name__, ours.__doc__) == (theirs.__name__, theirs.__doc__)
        defaults = {k: p.default for k, p in inspect.signature(ours).parameters.items()}
    expected = {k: p.default for k, p in release(name).items()}
    own = {} if name == "prepare_conditionals" else {"seed": None, "max_new_tokens": 1000, "stop": None}
    assert defaults == expected | own


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """The speech tokens that are rendered."""
    tokens: list[torch.Tensor] = []
    inner = Renderer.push
    monkeypatch.setattr(
        Renderer, "push", lambda self, new, last=False: tokens.append(new.cpu()) or inner(self, new, last=last)
    )
    return tokens


TEXTS = ["", "   ", " \n\t", "hello", "Wait... what?", "“Quoted”; dashed — said"]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("name", METHODS[:2])
def test_a_text_reaches_t3_as_upstreams_does(
    model: Any, name: str, text: str, arrived: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs: list[torch.Tensor] = []

    def inference(**given: Any) -> None:
        theirs.append(given["text_tokens"])
        raise StageError

    with monkeypatch.context() as changed:
        changed.setattr(model.t3, "inference", inference)
        with pytest.raises(StageError):
            ChatterboxTTS.generate(model, text)
    with lab.patch(model):
        run(getattr(model, name)(text))
    assert torch.equal(arrived[0][0], theirs[0].long())


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("name", METHODS[:2])
def test_a_text_is_said_as_upstream_says_it(model: Any, name: str, text: str, said: list[torch.Tensor]) -> None:
    normed = punc_norm(text)
    expected = upstream.upstream_tokens(model, normed, lab.BASELINE, seed=3, max_new_tokens=8, ignore_eos=True)
    with lab.patch(model, ignore_eos=True):
        run(getattr(model, name)(text, seed=3, max_new_tokens=8))
    assert torch.equal(torch.cat(said), expected)


def test_upstream_itself_takes_a_text_without_words(tts: Any, capsys: pytest.CaptureFixture[str]) -> None:
    for text in ("", "   "):
        with alone(tts), stopping(tts, 2):
            assert ChatterboxTTS.generate(tts, text).shape[0] == 1


@pytest.mark.parametrize("text", [None, 7, b"Hello."])
@pytest.mark.parametrize("name", METHODS[:2])
def test_what_is_no_text_is_refused_at_the_call(model: Any, name: str, text: Any) -> None:
    before = model.conds
    with lab.patch(model), pytest.raises(ValueError, match="text="):
        getattr(model, name)(text, RECORDING)
    assert model.conds is before


@pytest.mark.parametrize("name", METHODS[:2])
def test_seed_length_and_stop_work_on_patched_methods(model: Any, name: str) -> None:
    def audio(**given: Any) -> torch.Tensor:
        found = run(getattr(model, name)(TEXT, **given))
        return found if name == "generate" else torch.cat([chunk for chunk, _ in found], dim=1)

    with lab.patch(model, ignore_eos=True, flow_steps=2):
        one, other = audio(seed=5, max_new_tokens=4), audio(seed=6, max_new_tokens=4)
        assert one.shape == other.shape == (1, 4 * 960)
        assert torch.equal(one, audio(seed=5, max_new_tokens=4))
        assert not torch.equal(one, other)
        torch.manual_seed(5)
        first = audio(max_new_tokens=4)
        assert not torch.equal(first, audio(max_new_tokens=4))
        stop, count = Event(), itertools.count()
        handle = model.t3.speech_head.register_forward_hook(lambda *_: stop.set() if next(count) == 3 else None)
        try:
            stopped = getattr(model, name)(TEXT, seed=5, stop=stop)
            seconds = stopped.shape[1] if name == "generate" else sum(chunk.shape[1] for chunk, _ in stopped)
        finally:
            handle.remove()
        assert seconds <= 5 * 960
        for bad in ({"seed": -1}, {"max_new_tokens": 0}, {"stop": True}):
            with pytest.raises(ValueError, match=f"{next(iter(bad))}="):
                getattr(model, name)(TEXT, **bad)


def printed(text: str) -> list[str]:
    return [re.sub(r"\d+", "N", line) for line in text.splitlines()]


@pytest.mark.parametrize("print_metrics", [True, False, None])
def test_the_report_is_upstreams(tts: Any, print_metrics: bool | None, capsys: pytest.CaptureFixture[str]) -> None:
    given = {"chunk_size": 4} | ({} if print_metrics is None else {"print_metrics": print_metrics})
    with alone(tts), stopping(tts, 8):
        list(ChatterboxTTS.generate_stream(tts, TEXT, **given))
    expected = printed(capsys.readouterr().out)
    with lab.patch(tts), stopping(tts, 8):
        found = list(tts.generate_stream(TEXT, **given))
    assert printed(capsys.readouterr().out) == expected
    assert len(expected) == (0 if print_metrics is False else 5)
    assert sum(audio.shape[1] for audio, _ in found) == 8 * 960


def test_what_is_returned_is_as_upstreams(model: Any, capsys: pytest.CaptureFixture[str]) -> None:
    def kind(audio: torch.Tensor) -> tuple[Any, ...]:
        return type(audio), audio.dtype, audio.device, audio.requires_grad, audio.ndim, audio.shape

    with alone(model), stopping(model, 8):
        theirs = [ChatterboxTTS.generate(model, TEXT)]
    with alone(model), stopping(model, 8):
        chunks = list(ChatterboxTTS.generate_stream(model, TEXT, chunk_size=4))
    with lab.patch(model), stopping(model, 8):
        ours = [model.generate(TEXT)]
    with lab.patch(model), stopping(model, 8):
        result = model.generate_stream(TEXT, chunk_size=4)
        assert isinstance(result, types.GeneratorType)
        patched = list(result)
    assert [kind(audio) for audio in ours] == [kind(audio) for audio in theirs] == [(*kind(ours[0])[:5], (1, 8 * 960))]
    assert {kind(audio)[:5] for audio, _ in patched} == {kind(audio)[:5] for audio, _ in chunks}
    assert len({id(metrics) for _, metrics in patched}) == len({id(metrics) for _, metrics in chunks}) == 1
    ours, theirs = patched[-1][1], chunks[-1][1]
    assert {field.name for field in fields(StreamingMetrics)} <= {field.name for field in fields(ours)}
    for field in fields(StreamingMetrics):
        assert type(getattr(ours, field.name)) is type(getattr(theirs, field.name)), field.name
    assert ours.total_audio_duration == pytest.approx(8 * 0.04)


@pytest.mark.parametrize("name", METHODS[:2])
def test_the_recordings_voice_is_the_models_from_then_on(model: Any, name: str) -> None:
    with lab.patch(model, ignore_eos=True):
        run(getattr(model, name)(TEXT, RECORDING, 0.9, seed=0, max_new_tokens=3))
        voice = model.conds
        run(getattr(model, name)(TEXT, seed=0, max_new_tokens=3, exaggeration=0.9))
        assert model.conds is voice
        run(getattr(model, name)(TEXT, audio_prompt_path=OTHER, seed=0, max_new_tokens=3))
    assert model.conds is not voice
    assert not torch.equal(voice.gen["prompt_feat"], model.conds.gen["prompt_feat"])
    assert voice.t3.emotion_adv.item() == pytest.approx(0.9)
    assert model.conds.t3.emotion_adv.item() == pytest.approx(0.5)


@pytest.mark.parametrize("name", METHODS[:2])
def test_a_call_that_fails_leaves_the_voice(model: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = copy.deepcopy(model.conds)
    voice = model.conds
    with lab.patch(model), monkeypatch.context() as broken:
        broken.setattr(Renderer, "push", lambda *_, **__: (_ for _ in ()).throw(StageError()))
        with pytest.raises(StageError):
            run(getattr(model, name)(TEXT, max_new_tokens=3, exaggeration=0.9))
    for bad in ({"temperature": -1}, {"exaggeration": float("nan")}, {"cfg_weight": None}):
        with lab.patch(model), pytest.raises(ValueError, match=f"{next(iter(bad))}="):
            getattr(model, name)(TEXT, RECORDING, **bad)
    assert model.conds is voice
    assert torch.equal(voice.t3.emotion_adv, before.t3.emotion_adv)
    assert all(torch.equal(v, before.gen[k]) for k, v in voice.gen.items() if torch.is_tensor(v))


def test_a_model_without_a_voice_speaks_with_a_recordings(model: Any) -> None:
    model.conds = None
    with lab.patch(model, ignore_eos=True):
        for name in METHODS[:2]:
            with pytest.raises(ValueError, match="no voice"):
                getattr(model, name)(TEXT)
        assert model.generate(TEXT, RECORDING, max_new_tokens=1).shape == (1, 960)
        model.conds = None
        assert run(model.generate_stream(TEXT, RECORDING, max_new_tokens=1))[0][0].shape == (1, 960)


def test_a_patch_can_be_put_on_again_and_survives_an_error(model: Any) -> None:
    before = dict(vars(model))
    for _ in range(3):
        with pytest.raises(StageError), lab.patch(model):
            raise StageError
        assert vars(model) == before
    lab.patch(model).undo()
    assert vars(model) == before


def test_a_stream_that_was_begun_goes_on_after_the_patch_ends(model: Any) -> None:
    with lab.patch(model, ignore_eos=True):
        begun = model.generate_stream(TEXT, RECORDING, chunk_size=2, max_new_tokens=4, print_metrics=False)
        next(begun)
    assert len(list(begun)) == 1


# What no Chatterbox of this kind is


class ChatterboxTurboTTS:
    """What is particular to the later release: GPT-2 in the place of Llama."""

    def __init__(self, **parts: Any) -> None:
        self.sr, self.device, self.conds = 24000, "cpu", None
        vars(self).update(parts)


def gpt2(tts: Any) -> types.SimpleNamespace:
    return types.SimpleNamespace(tfmr=GPT2Model(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=9)), hp=tts.t3.hp)


def another_t3(tts: Any) -> ChatterboxTTS:
    other = plain(tts)
    other.t3 = gpt2(tts)
    return other


OTHERS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "an empty namespace": (lambda _: types.SimpleNamespace(), "types.SimpleNamespace"),
    "an object": (lambda _: object(), "builtins.object"),
    "None": (lambda _: None, "NoneType"),
    "the class": (lambda _: ChatterboxTTS, "builtins.type"),
    "T3 alone": (lambda tts: tts.t3, "T3"),
    "Turbo": (lambda tts: ChatterboxTurboTTS(t3=gpt2(tts), s3gen=tts.s3gen, ve=tts.ve), "ChatterboxTurboTTS"),
    "Chatterbox with GPT-2": (another_t3, "GPT2Model"),
}


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize(
    "call",
    [
        lambda tts: lab.patch(tts),
        lambda tts: lab.patch(tts, analyzer="probe"),
        lambda tts: lab.generate_stream(tts, TEXT),
        lambda tts: lab.generate(tts, TEXT),
        lambda tts: lab.speech_tokens(tts, TEXT),
        lambda tts: lab.warm_up(tts),
    ],
    ids=["patch", "patch with a setting", "generate_stream", "generate", "speech_tokens", "warm_up"],
)
def test_another_kind_of_model_is_named_and_left_alone(tts: Any, kind: str, call: Callable[[Any], Any]) -> None:
    make, name = OTHERS[kind]
    other = make(tts)
    before = dict(vars(other)) if hasattr(other, "__dict__") else None
    with pytest.raises(TypeError, match=f"^tts: .*{name}"):
        call(other)
    assert before is None or dict(vars(other)) == before


def test_a_copy_of_a_patched_model_speaks_in_its_own_voice(tts: Any) -> None:
    """One copy of the model a user, each with a voice of its own, is what applications do."""
    other = copy.deepcopy(tts.conds)
    other.t3.speaker_emb = -other.t3.speaker_emb
    other.gen["embedding"] = -other.gen["embedding"]
    fixed = {"seed": 0, "max_new_tokens": 5}
    plain = copy.copy(tts)
    plain.conds = other
    expected = [lab.generate(model, TEXT, lab.BASELINE, **fixed, ignore_eos=True) for model in (tts, plain)]
    with lab.patch(tts, ignore_eos=True):
        twin, own = copy.copy(tts), tts.conds
        twin.conds = other
        assert torch.equal(twin.generate(TEXT, **fixed), expected[1])
        assert torch.equal(tts.generate(TEXT, **fixed), expected[0])
        chunks = [audio for audio, _ in twin.generate_stream(TEXT, print_metrics=False, **fixed)]
        assert torch.equal(torch.cat(chunks, dim=1), expected[1])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            twin.prepare_conditionals((np.random.default_rng(0).normal(0, 0.1, 48000), 24000))
        assert tts.conds is own
        assert twin.conds is not other
    assert type(tts) is type(plain)
    assert torch.equal(tts.conds.gen["embedding"], own.gen["embedding"])


def test_a_class_with_a_preparation_of_its_own_kind_keeps_it(tts: Any) -> None:
    class Louder(type(tts)):
        def prepare_conditionals(self, wav_fpath: Any, exaggeration: float = 0.5, *, gain: float = 1.0) -> None:
            self.gain = gain

    model = copy.copy(tts)
    model.__class__ = Louder
    with lab.patch(model):
        model.prepare_conditionals("nothing.wav", gain=2.0)
    assert model.gain == 2.0
    assert type(model) is Louder


def test_a_model_that_was_never_built_is_refused_by_name() -> None:
    empty = ChatterboxTTS.__new__(ChatterboxTTS)
    with pytest.raises(TypeError, match="ChatterboxTTS"):
        lab.patch(empty)
    assert vars(empty) == {}


def test_a_copy_that_outlives_the_patch_has_its_own_methods_again(tts: Any) -> None:
    patch = lab.patch(tts)
    twin = copy.copy(tts)
    patch.undo()
    assert not hasattr(twin.generate_stream, "patch")
    with lab.patch(twin, ignore_eos=True):
        assert twin.generate(TEXT, max_new_tokens=2).shape == (1, 1920)
