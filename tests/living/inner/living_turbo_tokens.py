"""Turbo and Nano say what the release's own ``T3.inference_turbo`` says."""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from living.inner.conftest import lively
from living.inner.said import TEXTS

import chatterbox_lab as lab
from chatterbox_lab.engine import variants
from chatterbox_lab.engine.clock import StageClock
from chatterbox_lab.engine.request import checked
from chatterbox_lab.engine.t3 import backbone, backends, decode, graph, sampling
from chatterbox_lab.engine.variants import TURBO, encode, punctuated, released, variant_of

BACKENDS = ("hf", "static")
SAID = ("No.", TEXTS[5], " ".join(TEXTS[7:9]))
SILENCE = [4299] * 3


def trace(tts: Any) -> list[Any]:
    """What a call could leave on T3: hooks, attributes, its configuration, the voice."""
    parts = list(tts.t3.modules())
    hooks = [(dict(part._forward_hooks), dict(part._forward_pre_hooks)) for part in parts]
    own = [sorted(name for name in vars(part) if not name.startswith("_")) for part in parts]
    voice = [(name, id(value)) for name, value in vars(tts.conds.t3).items()]
    return [type(tts), hooks, own, str(tts.t3.tfmr.config), voice, id(tts.conds.t3), sorted(vars(tts))]


@pytest.fixture(scope="module", params=["turbo", "nano"])
def built(request: pytest.FixtureRequest) -> Any:
    try:
        tts = lively(lab.load("tiny", variant=request.param, device="cpu", seed=0))
    except ValueError as error:
        pytest.skip(str(error))
    head = tts.t3.speech_head
    plain = torch.nn.Linear(head.in_features, head.out_features)  # a release's may say anything, the start token too
    plain.load_state_dict(head.state_dict())
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        plain.weight.mul_(5)
        tts.t3.tfmr.wpe.weight.mul_(20)
        for part in tts.t3.tfmr.modules():
            if getattr(part, "bias", None) is not None and part.bias.ndim == 1:
                part.bias.add_(torch.randn_like(part.bias), alpha=0.1)
    tts.t3.speech_head = plain
    return tts


@pytest.fixture
def tts(built: Any) -> Iterator[Any]:
    """The shared model; the test fails if it leaves anything behind on it."""
    before, conds = trace(built), built.conds
    yield built
    built.conds = conds
    assert trace(built) == before


@torch.inference_mode()  # as the release decorates it, but not in every version
def released_tokens(tts: Any, text: str, seed: int, most: int, **changes: Any) -> torch.Tensor:
    """What the release says, as its ``generate`` goes on with it, of so many tokens at most."""
    numbers = tts.tokenizer(punctuated(tts, text), return_tensors="pt", padding=True, truncation=True).input_ids
    torch.manual_seed(seed)
    given = {"t3_cond": replace(tts.conds.t3), "text_tokens": numbers, "max_gen_len": most - 1}
    said = tts.t3.inference_turbo(**given, **changes)[0]
    return said[said < 6561]


@pytest.mark.parametrize(
    "changes",
    [{}, {"temperature": 1.0, "top_k": 0}, {"top_k": 5, "top_p": 1.0}, {"repetition_penalty": 1.0}],
    ids=lambda changes: ",".join(changes) or "usual",
)
def test_the_releases_tokens_are_said(tts: Any, changes: dict[str, Any]) -> None:
    spoken = set()
    for text in SAID:
        for seed in range(3):
            theirs = released_tokens(tts, text, seed, 20, **changes)
            for backend in BACKENDS:
                ours = lab.speech_tokens(tts, text, seed=seed, max_new_tokens=20, backend=backend, **changes)
                assert torch.equal(ours, theirs), (text, seed, backend)
            spoken.add(tuple(ours.tolist()))
    assert len(spoken) == 9


def test_text_position_and_voice_act(tts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fixed = {"temperature": 0, "max_new_tokens": 15}
    said = [lab.speech_tokens(tts, text, **fixed) for text in SAID]
    other = tts.conds.t3.cond_prompt_speech_tokens.flip(1)
    tts.conds = replace(tts.conds, t3=replace(tts.conds.t3, cond_prompt_speech_tokens=other))
    said.append(lab.speech_tokens(tts, SAID[0], **fixed))
    monkeypatch.setattr(backbone.GPT2, "begin", lambda self, hidden, position: (hidden, ()))
    said.append(lab.speech_tokens(tts, SAID[1], backend="static", **fixed))
    assert len({tuple(codes.tolist()) for codes in said}) == 5


@pytest.fixture
def anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets ``graph`` run on a CPU, where nothing is captured: the work is run as it is."""
    monkeypatch.setitem(backends.BACKENDS, "graph", replace(backends.BACKENDS["graph"], devices=()))
    monkeypatch.setattr(graph, "captured", lambda work, *_: work)


@pytest.mark.parametrize("backend", [*BACKENDS, "graph"])
def test_the_start_token_pays_once_and_again_when_it_was_said(
    tts: Any, backend: str, anywhere: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    start, stop = tts.t3.hp.start_speech_token, tts.t3.hp.stop_speech_token
    before = tts.t3.speech_head.bias.detach().clone()
    penalised: list[list[int]] = []
    pick = sampling.STEPS["penalty"]

    def watched(logits: torch.Tensor, seen: torch.Tensor, how: Any) -> torch.Tensor:
        penalised.append(seen[0].nonzero().flatten().tolist())
        return pick(logits, seen, how)

    try:
        with torch.no_grad():
            tts.t3.speech_head.bias[start] += 40
            tts.t3.speech_head.bias[stop] -= 100
        monkeypatch.setitem(sampling.STEPS, "penalty", watched)
        count = 0
        for seed in range(4):
            penalised.clear()
            changes = {"repetition_penalty": 1.5, "temperature": 5.0}
            theirs = released_tokens(tts, SAID[1], seed, 20, **changes)
            ours = lab.speech_tokens(tts, SAID[1], seed=seed, max_new_tokens=20, backend=backend, **changes)
            assert torch.equal(ours, theirs)
            count += len(ours)
            assert penalised[0] == [start]
            assert len(penalised[1]) == 1
        assert 0 < count < 4 * 20  # the start token was said, is not heard, and ends nothing
    finally:
        with torch.no_grad():
            tts.t3.speech_head.bias.copy_(before)


def test_a_stop_token_as_the_very_first_ends(tts: Any) -> None:
    """The release looks for it from the second token on: it goes on, and cuts the first stop out of what it says."""
    stop, before = tts.t3.hp.stop_speech_token, tts.t3.speech_head.bias.detach().clone()
    try:
        with torch.no_grad():
            tts.t3.speech_head.bias[stop] += 40
        for seed in range(3):
            for backend in BACKENDS:
                assert len(lab.speech_tokens(tts, SAID[1], seed=seed, max_new_tokens=20, backend=backend)) == 0
        goes_on = {"top_k": 0, "top_p": 1.0, "repetition_penalty": 100.0}
        assert len(lab.speech_tokens(tts, SAID[1], seed=0, max_new_tokens=20, **goes_on)) == 0
        assert len(released_tokens(tts, SAID[1], 0, 20, **goes_on)) > 0
        audio = lab.generate(tts, SAID[1], seed=0)
        assert audio.shape[1] == 960 * len(SILENCE)
        chunks = [chunk.shape[1] for chunk, _ in lab.generate_stream(tts, SAID[1], seed=0)]
        assert sum(chunks) == 960 * len(SILENCE)
    finally:
        with torch.no_grad():
            tts.t3.speech_head.bias.copy_(before)


@torch.inference_mode()
def test_states_are_those_of_transformers(tts: Any) -> None:
    embeds, text = decode.prompt(tts.t3, tts.conds.t3, encode(tts, SAID[1], rows=1), TURBO.starts)
    assert text == (376, 376 + encode(tts, SAID[1]).shape[1])
    assert embeds.shape[:2] == (1, text[1] + 1)
    setup = backends.Setup(tts.t3, "off", (), text, 500, "loaded", sampling.Sampling.of(lab.BALANCED, 6562, TURBO))
    with backends.BACKENDS["static"].stepper(replace(setup, rows=1)) as stepper:
        found = [stepper.attend.prefill(embeds, text[0])]
        tokens = torch.randint(0, 6561, (20, 1, 1), generator=torch.Generator().manual_seed(0))
        found += [stepper.attend(tts.t3.speech_emb(token)) for token in tokens]
    whole = torch.cat([embeds, tts.t3.speech_emb(tokens[:, :, 0].T)], dim=1)
    theirs = tts.t3.tfmr(inputs_embeds=whole).last_hidden_state[:, text[0] :]
    assert (torch.cat(found, dim=1) - theirs).abs().max() < 1e-4 * theirs.abs().max()


def test_rounded_weights_are_near(tts: Any) -> None:
    logits: dict[str, list[torch.Tensor]] = {"loaded": [], "int8": []}
    codes = lab.speech_tokens(tts, SAID[2], seed=0, max_new_tokens=20)
    for weights, found in logits.items():
        settings = TURBO.settled(lab.StreamSettings(weights=weights, backend="static"))
        with torch.inference_mode():
            embeds, text = decode.prompt(tts.t3, tts.conds.t3, encode(tts, SAID[2], rows=1), 1)
            with decode.stepper_of(tts.t3, settings, text, 600, variant=TURBO, rows=1) as stepper:
                found.append(stepper.prefill(embeds, text[0]))
                for position, code in enumerate(codes, 1):
                    stepper.say(code.view(1, 1))
                    found.append(stepper.step(position))
    loaded, rounded = (torch.cat(found) for found in logits.values())
    torch.testing.assert_close(rounded[0], loaded[0])  # the prefill is not rounded
    assert 0 < float((rounded - loaded).norm() / loaded.norm()) < 0.1
    assert len(lab.speech_tokens(tts, SAID[1], seed=0, weights="int8", max_new_tokens=10, ignore_eos=True)) > 0


def test_a_second_call_runs_only_its_text(tts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    lab.speech_tokens(tts, SAID[0], seed=0, max_new_tokens=1)
    lengths: list[int] = []
    begin = backbone.GPT2.begin

    def counted(self: Any, hidden: torch.Tensor, position: torch.Tensor) -> Any:
        lengths.append(hidden.shape[1])
        return begin(self, hidden, position)

    monkeypatch.setattr(backbone.GPT2, "begin", counted)
    for text in SAID:
        lab.speech_tokens(tts, text, seed=0, max_new_tokens=1)
        assert lengths.pop() == encode(tts, text).shape[1] + 1
    assert not lengths


@pytest.mark.parametrize("backend", ["compile", "graph"])
def test_backends_that_build_on_static_say_the_same(tts: Any, backend: str, anywhere: None) -> None:
    for seed in range(3):
        theirs = released_tokens(tts, SAID[1], seed, 20)
        said = lab.speech_tokens(tts, SAID[1], seed=seed, max_new_tokens=20, backend=backend)
        assert torch.equal(said, theirs)


def test_guidance_and_exaggeration_change_nothing_and_min_p_does(tts: Any) -> None:
    fixed = {"seed": 0, "max_new_tokens": 20}
    usual = lab.speech_tokens(tts, SAID[1], **fixed)
    for ignored in ({"cfg_weight": 0.0}, {"cfg_weight": 1.0}, {"exaggeration": 2.0}, {"min_p": 0.0}):
        assert torch.equal(lab.speech_tokens(tts, SAID[1], **fixed, **ignored), usual)
    assert checked(tts, SAID[1]).text_tokens.shape[0] == 1
    assert not torch.equal(lab.speech_tokens(tts, SAID[1], min_p=0.9, **fixed), usual)
    greedy = [lab.speech_tokens(tts, SAID[1], temperature=0, seed=seed, max_new_tokens=20) for seed in range(2)]
    assert torch.equal(*greedy)  # the release takes a temperature of 0 for 1
    assert not torch.equal(greedy[0], usual)


def test_the_numbers_are_those_of_the_releases_own_generate(tts: Any) -> None:
    assert variant_of(tts) is TURBO
    settings = TURBO.settled(lab.StreamSettings())
    ignored = ("cfg_weight", "exaggeration")
    for name, parameter in inspect.signature(released(tts).generate).parameters.items():
        if hasattr(settings, name) and name not in ignored:
            assert getattr(settings, name) == parameter.default, name
    assert list(TURBO.after) == [sys.modules[released(tts).__module__].S3GEN_SIL] * 3 == SILENCE


def test_a_text_is_what_the_releases_tokenizer_makes_of_it(tts: Any) -> None:
    for text in (*SAID, "Oh [laugh] well", "a  \u2026 \u00e9t\u00e9", "x" * 300):
        theirs = tts.tokenizer(punctuated(tts, text), return_tensors="pt", padding=True, truncation=True).input_ids
        assert torch.equal(encode(tts, text, rows=1), theirs)
    laugh = tts.tokenizer.convert_tokens_to_ids("[laugh]")
    assert laugh in encode(tts, "Oh [laugh] well").tolist()[0]
    with pytest.raises(ValueError, match="language='fr': this model speaks English"):
        lab.generate_stream(tts, "Hello.", language="fr")
    assert torch.equal(encode(tts, "Hello.", "en"), encode(tts, "Hello."))


def test_a_text_that_does_not_fit_is_refused_and_not_cut(tts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tts.tokenizer, "model_max_length", 64)
    assert encode(tts, "a" * 63 + ".").shape[1] == 64
    with pytest.raises(ValueError, match="text of 65 characters: is 65 text tokens, 64 fit"):
        lab.generate_stream(tts, "a" * 64 + ".")
    monkeypatch.setattr(tts.tokenizer, "model_max_length", 10**30)
    monkeypatch.setattr(tts.t3.hp, "max_text_tokens", 32, raising=False)
    with pytest.raises(ValueError, match="is 40 text tokens, 32 fit"):
        lab.generate_stream(tts, "a" * 39 + ".")


@pytest.mark.parametrize("analyzer", ["stock", "layer", "probe"])
def test_no_alignment_is_read(tts: Any, analyzer: str) -> None:
    for guard in (None, True):
        with pytest.raises(ValueError, match=f"analyzer='{analyzer}': must be 'off'"):
            lab.generate_stream(tts, "Hello.", analyzer=analyzer, guard=guard)


@pytest.mark.parametrize("chunk_size", [7, 20, 50])
def test_silence_ends_the_last_chunk_and_is_no_token_of_the_text(tts: Any, chunk_size: int) -> None:
    for most in (1, 20, 21):
        request = checked(tts, SAID[1], seed=0, max_new_tokens=most, ignore_eos=True, chunk_size=chunk_size)
        chunks = list(decode.token_chunks(tts, request, StageClock("cpu")))
        said = lab.speech_tokens(tts, SAID[1], seed=0, max_new_tokens=most, ignore_eos=True)
        assert torch.cat([codes for codes, _ in chunks]).tolist() == said.tolist() + SILENCE
        assert [last for _, last in chunks] == [False] * (len(chunks) - 1) + [True]


@pytest.mark.parametrize("settings", [lab.BASELINE, lab.FAST], ids=["exact", "fast"])
def test_every_token_and_the_silence_become_their_samples(tts: Any, settings: lab.StreamSettings) -> None:
    fixed = {"seed": 0, "ignore_eos": True, "chunk_size": 10}
    for most in (9, 10, 11):
        count = len(lab.speech_tokens(tts, SAID[1], settings, max_new_tokens=most, **fixed))
        chunks = [audio for audio, _ in lab.generate_stream(tts, SAID[1], settings, max_new_tokens=most, **fixed)]
        assert sum(audio.shape[1] for audio in chunks) == 960 * (count + len(SILENCE))
    assert lab.generate(tts, SAID[1], settings, max_new_tokens=most, **fixed).shape[1] == 960 * (count + len(SILENCE))


def test_what_is_no_turbo_is_refused(tts: Any, english: Any) -> None:
    mixed = copy.copy(tts)
    mixed.t3 = english.t3
    with pytest.raises(TypeError, match=r"its T3 must be a GPT2Model, is a transformers.*LlamaModel"):
        variants.variant_of(mixed)
