from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from conftest import TEXT

import chatterbox_lab as lab
from chatterbox_lab import kept
from chatterbox_lab.engine.request import checked
from chatterbox_lab.engine.t3 import decode
from chatterbox_lab.voices.build import LabTTS

T3_WAYS = {
    "hf": {"backend": "hf"},
    "static": {"backend": "static"},
    "probe": {"backend": "static", "analyzer": "probe", "guard": True},
    "compile": {"backend": "compile"},
    "int8": {"backend": "static", "weights": "int8"},
}
S3GEN_WAYS = {"window": {}, "cached": {"flow": "cached"}, "bfloat16": {"flow_dtype": "bfloat16"}}
FIXED = {"seed": 0, "max_new_tokens": 8, "ignore_eos": True, "flow_steps": 1}


def low_rank(weight: torch.Tensor) -> torch.Tensor:
    """What a merged adapter of rank 4 adds to a weight, large enough to change what is said."""
    draw = torch.Generator().manual_seed(0)
    rows = weight.flatten(1)
    up = torch.randn(rows.shape[0], 4, generator=draw)
    return (up @ torch.randn(4, rows.shape[1], generator=draw)).reshape(weight.shape) * rows.std()


@torch.no_grad()
def in_place(module: torch.nn.Module, name: str) -> None:
    weight = module.get_parameter(name)
    weight.add_(low_rank(weight))


def through_data(module: torch.nn.Module, name: str) -> None:
    weight = module.get_parameter(name)
    weight.data.add_(low_rank(weight.data))


def other_data(module: torch.nn.Module, name: str) -> None:
    weight = module.get_parameter(name)
    weight.data = weight.data + low_rank(weight.data)


def loaded(module: torch.nn.Module, name: str) -> None:
    state = {key: value.clone() for key, value in module.state_dict().items()}
    state[name] += low_rank(state[name])
    module.load_state_dict(state)


@torch.no_grad()
def another_parameter(module: torch.nn.Module, name: str) -> None:
    parent, _, last = name.rpartition(".")
    weight = module.get_parameter(name)
    setattr(module.get_submodule(parent), last, torch.nn.Parameter(weight + low_rank(weight)))


CHANGES = {change.__name__: change for change in (in_place, through_data, other_data, loaded, another_parameter)}
T3_PLACES = (
    "tfmr.layers.3.self_attn.q_proj.weight",
    "tfmr.layers.5.mlp.down_proj.weight",
    "speech_head.weight",
    "text_emb.weight",
    "cond_enc.spkr_enc.weight",
)


@pytest.fixture
def own(voice: LabTTS) -> LabTTS:
    """A model of its own, since its weights are about to change."""
    tts = lab.load("tiny", device="cpu", seed=0, watermark=False)
    tts.conds = voice.conds
    return tts


@torch.inference_mode()
def logits(tts: LabTTS, way: str) -> torch.Tensor:
    """Of the prompt and of a decode step, as a call that is made now has them."""
    request = checked(tts, TEXT, **T3_WAYS[way])
    embeds, text = decode.prompt(tts.t3, request.voice.t3, request.text_tokens)
    with decode.stepper_of(tts.t3, request.settings, text, embeds.shape[1] + 2) as stepper:
        first = stepper.prefill(embeds, text[0]).clone()
        stepper.say(torch.tensor([[77]]))
        return torch.stack([first, stepper.step(1)])


@pytest.mark.parametrize("way", T3_WAYS)
def test_weights_of_t3_that_changed_after_a_call_are_heard(own: LabTTS, way: str) -> None:
    for change in CHANGES.values() if way != "compile" else [through_data]:  # which compiles anew
        for place in T3_PLACES if (way, change) == ("static", through_data) else T3_PLACES[:1]:
            before = logits(own, way)
            change(own.t3, place)
            after = logits(own, way)
            assert not torch.equal(before, after), (change, place)
            kept._kept.clear()
            assert torch.equal(after, logits(own, way)), (change, place)


@pytest.mark.parametrize("way", S3GEN_WAYS)
def test_weights_of_s3gen_that_changed_after_a_call_are_heard(own: LabTTS, way: str) -> None:
    def streamed() -> torch.Tensor:
        chunks = lab.generate_stream(own, TEXT, **FIXED, chunk_size=4, **S3GEN_WAYS[way])
        return torch.cat([audio for audio, _ in chunks], dim=1)

    places = {
        own.s3gen.flow: ["decoder.estimator.mid_blocks.0.1.0.attn1.to_q.weight", "encoder_proj.weight"],
        own.s3gen.mel2wav: ["conv_pre.parametrizations.weight.original1"],
    }
    for change in CHANGES.values():
        for module, names in places.items():
            for name in names if change is through_data else names[:1]:
                before = streamed()
                change(module, name)
                after = streamed()
                assert not torch.equal(before, after), (change, name)
                kept._kept.clear()
                assert torch.equal(after, streamed()), (change, name)


def test_a_single_number_behind_pytorchs_back_needs_forget(own: LabTTS) -> None:
    weight = own.t3.speech_head.weight
    before = lab.speech_tokens(own, TEXT, weights="int8", **FIXED)
    weight.data[before[0]] = -weight.data[before[0]]
    lab.forget(own)
    assert not torch.equal(before, lab.speech_tokens(own, TEXT, weights="int8", **FIXED))


def test_forget_gives_the_memory_back(own: LabTTS) -> None:
    lab.generate(own, TEXT, weights="int8", **FIXED)
    made = [weakref.ref(kept.kept(part, key, dict)) for part, key in _entries(own)]
    assert len(made) > 3
    lab.forget(own)
    gc.collect()
    assert not any(reference() is not None for reference in made)
    assert not list(_entries(own))


def _entries(tts: LabTTS) -> Iterator[tuple[torch.nn.Module, Any]]:
    for part in (tts.t3, tts.s3gen, tts.ve):
        for module in part.modules():
            for key, value in kept._kept.get(module, (None, {}))[1].items():
                if hasattr(value, "__weakref__"):
                    yield module, key


def test_the_last_few_are_kept() -> None:
    recent, made = kept.Recent(3), []

    def value(number: int) -> int:
        given = {"one": torch.full((2,), float(number)), "two": torch.arange(number)}
        return recent.value(given, lambda: made.append(number) or 10 * number)

    assert [value(number) for number in (1, 2, 3, 1, 4, 1, 3, 2, 3, 4)] == [10, 20, 30, 10, 40, 10, 30, 20, 30, 40]
    assert made == [1, 2, 3, 4, 2, 4]


def test_what_is_given_later_does_not_change_what_was_compared() -> None:
    recent, voice = kept.Recent(), torch.zeros(2)
    assert recent.value({"voice": voice}, lambda: "zeros") == "zeros"
    voice += 1
    assert recent.value({"voice": voice}, lambda: "ones") == "ones"
    assert recent.value({"voice": torch.zeros(2)}, lambda: "again") == "zeros"


@pytest.mark.parametrize("most", [None, 3])
def test_a_pool_lends_to_one_at_a_time(most: int | None) -> None:
    pool: kept.Pool[list[int]] = kept.Pool(most)
    for number in range(4):
        pool.give([number])
    assert len(pool) == (4 if most is None else 3)
    used: set[int] = set()
    clashes: list[int] = []

    def takes() -> None:
        for _ in range(2000):
            item = pool.take(lambda item: item[0] % 2 == 1)
            if item is not None:
                if item[0] in used:
                    clashes.append(item[0])
                used.add(item[0])
                used.discard(item[0])
                pool.give(item)

    threads = [threading.Thread(target=takes) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not clashes
    pool.shrink(1)
    assert len(pool) == 1
