"""English and Multilingual say what the release's own ``T3.inference`` says."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from living.inner.said import CASES, FULL, LANGUAGES, TEXTS, released_tokens

import chatterbox_lab as lab
from chatterbox_lab.engine.t3.alignment import AlignmentTracker
from chatterbox_lab.engine.t3.rules import LATER
from chatterbox_lab.engine.variants import encode, released, variant_of

BACKENDS = ("hf", "static")
AS_RELEASED = replace(LATER, equal_tokens=2)
"""The release forces the end at two equal tokens, where its comment says three."""


def analyzer(tts: Any) -> Any:
    """The release's module with the analyzer, None where it has none."""
    module = sys.modules[type(tts.t3).__module__]
    return module if hasattr(module, "AlignmentStreamAnalyzer") else None


class Silent:
    """In the place of the release's analyzer: sees nothing, does nothing."""

    def __init__(self, *_: Any, eos_idx: int, **__: Any) -> None:
        self.eos_idx = eos_idx

    def step(self, logits: torch.Tensor, **_: Any) -> torch.Tensor:
        return logits


@pytest.fixture
def unguarded(multilingual: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    if (module := analyzer(multilingual)) is not None:
        monkeypatch.setattr(module, "AlignmentStreamAnalyzer", Silent)
    return multilingual


def differing(tts: Any, most: int, cases: Any, **settings: Any) -> tuple[int, list[torch.Tensor]]:
    """How many tokens of all texts differ from the release's, in any backend; and what was said."""
    count, spoken = 0, []
    unsaid = variant_of(tts).unsaid
    for text, seed, language in cases:
        theirs = released_tokens(tts, text, seed, most, language)
        theirs = theirs[: max(1, len(theirs) - unsaid)]
        for backend in BACKENDS:
            fixed = {"seed": seed, "max_new_tokens": most, "backend": backend, "language": language}
            ours = lab.speech_tokens(tts, text, **fixed, **settings)
            same = len(ours) == len(theirs) and torch.equal(ours, theirs)
            count += 0 if same else max(len(ours), len(theirs))
        spoken.append(ours)
    return count, spoken


def test_english_says_the_releases_tokens(english: Any) -> None:
    count, spoken = differing(english, 20 if FULL else 8, [(text, seed, None) for text, seed, _ in CASES])
    assert count == 0
    assert len({tuple(said.tolist()) for said in spoken}) > len(CASES) / 2  # texts and seeds show in what is said


def test_multilingual_says_the_releases_tokens_without_a_guard(unguarded: Any) -> None:
    count, spoken = differing(unguarded, 20 if FULL else 8, CASES, guard=False)
    assert count == 0
    assert len({tuple(said.tolist()) for said in spoken}) > len(CASES) / 2


def test_multilingual_says_the_releases_tokens_with_its_guard(
    multilingual: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if analyzer(multilingual) is None:
        assert variant_of(multilingual).settled(lab.StreamSettings()).guard is False
        return
    head = multilingual.t3.speech_head
    often = torch.zeros(head.out_features)
    often[multilingual.t3.hp.stop_speech_token] = 6.0  # so that there is an end to suppress
    monkeypatch.setattr(head, "reachable", lambda logits: type(head).reachable(head, logits) + often, raising=False)
    most = 60 if FULL else 20
    count, guarded = differing(multilingual, most, CASES, rules=AS_RELEASED)  # guarded unless it is told otherwise
    assert count == 0
    free = [
        lab.speech_tokens(multilingual, t, seed=s, language=c, max_new_tokens=most, guard=False) for t, s, c in CASES
    ]
    longer = sum(len(ours) > len(others) for ours, others in zip(guarded, free, strict=True))
    assert longer > len(CASES) / 2, "the guard suppresses ends"


@pytest.mark.parametrize("kind", ["english", "multilingual"])
def test_guidance_and_language_act(kind: str, request: pytest.FixtureRequest) -> None:
    tts = request.getfixturevalue(kind)
    fixed = {"seed": 0, "max_new_tokens": 15, "guard": False}
    codes = LANGUAGES if kind == "multilingual" else (None,)
    said = {
        (weight, code): tuple(lab.speech_tokens(tts, TEXTS[5], cfg_weight=weight, language=code, **fixed).tolist())
        for weight in (0.0, 0.5, 1.0)
        for code in codes
    }
    assert len(set(said.values())) == len(said)


@pytest.mark.parametrize("kind", ["english", "multilingual"])
def test_without_guidance_one_row_runs_and_says_the_same(kind: str, request: pytest.FixtureRequest) -> None:
    tts, code = request.getfixturevalue(kind), "de" if kind == "multilingual" else None
    rows: list[int] = []
    watched = tts.t3.speech_head.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    try:
        for seed in range(3):
            fixed = {"seed": seed, "max_new_tokens": 15, "guard": False, "language": code}
            one = [lab.speech_tokens(tts, TEXTS[4], cfg_weight=0, backend=name, **fixed) for name in BACKENDS]
            assert set(rows) == {1}
            two = lab.speech_tokens(tts, TEXTS[4], cfg_weight=1e-30, **fixed)
            assert all(torch.equal(said, two) for said in one)
            rows.clear()
    finally:
        watched.remove()


def test_the_numbers_are_those_of_the_releases_own_generate(english: Any, multilingual: Any) -> None:
    for tts in (english, multilingual):
        settings, theirs = variant_of(tts).settled(lab.StreamSettings()), released(tts)
        for name, parameter in inspect.signature(theirs.generate).parameters.items():
            if hasattr(settings, name):
                assert getattr(settings, name) == parameter.default, name


@pytest.mark.parametrize("seed", range(6))
def test_the_guard_decides_step_by_step_as_the_releases_analyzer(multilingual: Any, seed: int) -> None:
    module = analyzer(multilingual)
    if module is None:
        return
    tfmr, random = multilingual.t3.tfmr, torch.Generator().manual_seed(seed)
    config = dict(vars(tfmr.config))
    length, stop = 8 + 4 * seed, multilingual.t3.hp.stop_speech_token
    theirs = module.AlignmentStreamAnalyzer(tfmr, None, (10, 10 + length), eos_idx=stop)
    ours, decided = AlignmentTracker(length, AS_RELEASED), set()
    try:
        place = 0.0
        for step in range(90):
            place += float(torch.rand((), generator=random)) * (0.9 if step < 60 else -1.5)
            rows = torch.rand(2 if step == 0 else 1, length, generator=random) * 0.05
            rows[:, min(max(round(place), 0), length - 1)] += 0.9
            maps = torch.zeros(10 + length + 2 if step == 0 else 1, length + 12)
            maps[-len(rows) :, 10 : 10 + length] = rows
            theirs.last_aligned_attns = [maps] * 3
            token = int(torch.randint(0, 3, (), generator=random))
            logits = theirs.step(torch.zeros(1, stop + 1), next_token=token)
            forced, suppressed = float(logits[0, stop]) > 0, float(logits[0, stop]) < 0
            found = ours.update(rows, token).stop
            if step >= 2:  # a start token sampled as the first is taken for a repetition by ours
                assert (found == "force", found == "suppress") == (forced, suppressed), step
            decided.add(found)
        assert {"force", "suppress"} <= decided
    finally:
        vars(tfmr.config).update(config)
        for layer in tfmr.layers:
            layer.self_attn._forward_hooks.clear()


def test_where_the_guard_differs_on_purpose(multilingual: Any) -> None:
    quiet = torch.full((1, 12), 0.01)
    held = AlignmentTracker(12, LATER)
    held.update(torch.full((2, 12), 0.01), 6561)
    assert [held.update(quiet, token).equal_tokens for token in (7, 7, 8, 8, 8)] == [False, False, False, False, True]
    if analyzer(multilingual) is not None:  # a text of at most five tokens, with which the release fails
        assert encode(multilingual, "A", "en").shape[1] == 5
        with pytest.raises((IndexError, RuntimeError)):
            _ = [released_tokens(multilingual, "A", seed, 40, "en") for seed in range(20)]
    for seed in range(3):
        fixed = {"seed": seed, "language": "en", "max_new_tokens": 30}
        said = lab.speech_tokens(multilingual, "A", guard=True, analyzer="probe", **fixed)
        assert len(said)
