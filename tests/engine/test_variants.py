"""What is told apart without another release; `living` runs them all."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from chatterbox.tts import ChatterboxTTS
from conftest import TEXT
from transformers import GPT2Config, GPT2Model

import chatterbox_lab as lab
from chatterbox_lab.engine import variants
from chatterbox_lab.engine.t3.rules import FORK, LATER, SAFE, Rules


def test_the_fork_is_told_by_what_it_offers(tts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert variants.variant_of(tts) is variants.STREAMING
    monkeypatch.delattr(ChatterboxTTS, "inference_stream")  # as the official release
    assert variants.variant_of(tts) is variants.ENGLISH


def test_what_is_no_chatterbox_is_refused(tts: Any) -> None:
    other = SimpleNamespace(**dict.fromkeys(("t3", "s3gen", "ve", "tokenizer", "conds", "device", "sr")))
    for wrong in (None, other, tts.t3):
        with pytest.raises(TypeError, match="tts: must be a ChatterboxTTS or ChatterboxMultilingualTTS"):
            variants.variant_of(wrong)
    mixed = ChatterboxTTS.__new__(ChatterboxTTS)
    vars(mixed).update(vars(other), t3=SimpleNamespace(tfmr=GPT2Model(GPT2Config(n_layer=1, n_embd=8, n_head=1))))
    with pytest.raises(TypeError, match=r"its T3 must be a LlamaModel, is a transformers.*GPT2Model"):
        variants.variant_of(mixed)


def test_what_is_not_said_is_as_in_the_release() -> None:
    settings = lab.StreamSettings()
    for variant, penalty, guarded in (
        (variants.STREAMING, 2.0, False),
        (variants.ENGLISH, 1.2, False),
        (variants.MULTILINGUAL, 2.0, True),
        (variants.MULTILINGUAL_UNGUARDED, 1.2, False),
        (variants.TURBO, 1.2, False),
    ):
        settled = variant.settled(settings)
        assert (settled.repetition_penalty, settled.guard) == (penalty, guarded)
        assert settled.analyzer == ("probe" if guarded else "off")
        assert variant.settled(settled) == settled
        said = settings.replace(repetition_penalty=1.5, guard=False, top_k=3)
        assert variant.settled(said).replace(top_p=None, min_p=None, rules=None) == said


def test_where_no_head_is_known_no_alignment_is_read() -> None:
    for analyzer in ("stock", "layer", "probe"):
        with pytest.raises(
            ValueError, match=f"analyzer='{analyzer}': must be 'off', and guard False: no head of Turbo"
        ):
            variants.TURBO.settled(lab.StreamSettings(analyzer=analyzer))


def test_what_follows_the_last_token() -> None:
    codes = torch.tensor([7, 8])
    assert variants.TURBO.ended(codes).tolist() == [7, 8, 4299, 4299, 4299]
    assert variants.TURBO.ended(codes[:0]).dtype == torch.long
    assert variants.ENGLISH.ended(codes).tolist() == [7, 8]


def test_what_is_said_arrives(tts: Any) -> None:
    fixed = {"seed": 0, "max_new_tokens": 20, "ignore_eos": True}
    usual = lab.speech_tokens(tts, TEXT, **fixed)
    greedy = lab.speech_tokens(tts, TEXT, temperature=0, **fixed)
    changes = {"repetition_penalty": 0.01, "top_p": 0.1, "min_p": 0.9, "top_k": 1}
    for name, value in changes.items():
        said = lab.speech_tokens(tts, TEXT, **fixed, **{name: value})
        assert not torch.equal(said, usual), name
    assert torch.equal(lab.speech_tokens(tts, TEXT, top_k=1, **fixed), greedy)


def test_guidance_of_nothing_runs_one_row(tts: Any) -> None:
    rows: list[int] = []
    watched = tts.t3.speech_head.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    fixed = {"seed": 0, "max_new_tokens": 20, "ignore_eos": True}
    try:
        said = [lab.speech_tokens(tts, TEXT, cfg_weight=0, backend=name, **fixed) for name in ("hf", "static")]
    finally:
        watched.remove()
    assert set(rows) == {1}
    upstream = lab.upstream_tokens(tts, TEXT, cfg_weight=0, **fixed)
    assert all(torch.equal(tokens, upstream) for tokens in said)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("top_p", 1.5, r"top_p=1\.5: must be a number from 0 to 1"),
        ("min_p", -0.1, r"min_p=-0\.1: must be a number from 0 to 1"),
        ("repetition_penalty", 0, r"repetition_penalty=0: must be a number from 0\.01 to 100"),
        ("top_k", 2.5, r"top_k=2\.5: must be a whole number, at least 0"),
        ("language", 3, r"language=3: must be a code such as 'en', or None"),
        ("rules", "soft", r"rules='soft': must be a Rules"),
        ("guard", "yes", r"guard='yes': must be True or False"),
    ],
)
def test_a_wrong_value_is_named(name: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lab.StreamSettings(**{name: value})


def test_this_model_speaks_english_alone(tts: Any) -> None:
    with pytest.raises(ValueError, match=r"language='fr': this model speaks English \('en'\) alone"):
        lab.generate_stream(tts, TEXT, language="fr")
    assert torch.equal(variants.encode(tts, TEXT, "en"), variants.encode(tts, TEXT))
    assert variants.encode(tts, TEXT, rows=1).shape[0] == 1


def test_rules_are_checked() -> None:
    assert FORK.equal_tokens == math.inf
    assert (LATER.equal_tokens, LATER.shortest) == (3, 5)
    assert FORK.most(10) == LATER.most(10) == FORK.most(0) == math.inf
    assert Rules(cap=2.6, cap_beside=20.5).most(3) == 23
    assert SAFE.most(12) == SAFE.cap_beside + 10 * SAFE.cap
    with pytest.raises(ValueError, match="trims=1: must be True or False"):
        Rules(trims=1)
    wrong = ("long_tail", -1), ("repetition", "5"), ("equal_tokens", 1), ("shortest", math.nan), ("cap", None)
    for name, value in wrong:
        with pytest.raises(ValueError, match=f"{name}={value!r}: must be a number from"):
            Rules(**{name: value})


def test_another_kind_of_model_is_not_in_this_release() -> None:
    for name in ("multilingual", "turbo"):
        with pytest.raises(ValueError, match=rf"variant='{name}': the installed Chatterbox .* has no such model"):
            lab.load("tiny", variant=name)
    with pytest.raises(ValueError, match="variant='other': must be one of 'english', 'multilingual', 'turbo'"):
        lab.load("tiny", variant="other")
    with pytest.raises(ValueError, match="variant='multilingual': the lab voice speaks English"):
        lab.load("lab", variant="multilingual")
