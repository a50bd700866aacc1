from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from conftest import TEXT
from torch.utils._python_dispatch import TorchDispatchMode

import chatterbox_lab as lab
from chatterbox_lab import kept
from chatterbox_lab.engine.request import encode_text
from chatterbox_lab.engine.t3 import attention, backends, static
from chatterbox_lab.engine.t3.backends import READ_BESIDE
from chatterbox_lab.engine.t3.decode import conditioning, prompt
from chatterbox_lab.engine.t3.eager import embed
from chatterbox_lab.study import logs

TEXTS = (TEXT, "No.", "One two three, four five six, seven eight nine; and ten to finish this long sentence with.")


def prefill(tts: Any, text: str = TEXT) -> tuple[torch.Tensor, tuple[int, int]]:
    with torch.inference_mode():
        return prompt(tts.t3, conditioning(tts, 0.5), encode_text(tts, text))


@pytest.mark.parametrize("mode", READ_BESIDE)
@pytest.mark.parametrize("text", TEXTS)
def test_same_seed_same_tokens_as_upstream(tts: Any, mode: str, text: str) -> None:
    for seed in range(2):
        fixed = {"seed": seed, "max_new_tokens": 30, "ignore_eos": True}
        expected = lab.upstream_tokens(tts, text, **fixed)
        assert torch.equal(lab.speech_tokens(tts, text, analyzer=mode, backend="static", **fixed), expected)


@pytest.mark.parametrize("heads", [attention.FORK_HEADS, attention.LATER_HEADS])
def test_states_and_rows_are_those_of_transformers(tts: Any, heads: backends.Heads) -> None:
    embeds, text = prefill(tts)
    ours = static.StaticT3(tts.t3.tfmr, "probe", text, embeds.shape[1] + 20, heads)
    theirs = attention.Attention(tts.t3.tfmr, "probe", text, heads)
    for position in range(20):
        states = [attend(embeds) for attend in (ours, theirs)]
        torch.testing.assert_close(*states, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ours.rows, theirs.rows, rtol=1e-4, atol=1e-7)
        embeds = embed(tts.t3, torch.tensor([[position * 7]]), position)


def test_the_cache_is_made_once_and_stays_where_it_is(tts: Any) -> None:
    embeds, text = prefill(tts)
    attend = static.StaticT3(tts.t3.tfmr, "off", text, embeds.shape[1] + 2)
    place = attend.cache.data_ptr()
    for _ in range(3):
        attend(embeds)
        embeds = embeds[:, :1]
    assert attend.cache.data_ptr() == place
    with pytest.raises(ValueError, match=rf"position {attend.length + 1}: the cache was made for {attend.length}"):
        attend(embeds)


def test_the_guard_decides_as_with_transformers(tts: Any) -> None:
    fixed = {"seed": 5, "max_new_tokens": 40, "guard": True, "analyzer": "probe"}
    said = [lab.speech_tokens(tts, TEXT, backend=backend, **fixed) for backend in ("hf", "static")]
    assert torch.equal(*said)


@pytest.mark.parametrize("mode", ["stock", "layer"])
def test_modes_that_need_maps_are_refused(tts: Any, mode: str) -> None:
    with pytest.raises(ValueError, match=f"analyzer='{mode}' with backend='static'"):
        lab.StreamSettings(analyzer=mode, backend="static")
    with pytest.raises(ValueError, match=f"mode='{mode}'"):
        static.StaticT3(tts.t3.tfmr, mode, (0, 5), 10)


def test_long_and_short_texts_are_attended_to_alike(tts: Any) -> None:
    torch.manual_seed(0)
    query = torch.randn(2, 16, 1, 64)
    for length in (1, 5, attention.LONG, attention.LONG + 1, 1000):
        key, value = attention.room((2, 2, 16, length, 64), query).normal_()
        given = query, key[:, :, :length], value[:, :, :length]
        expected = torch.nn.functional.scaled_dot_product_attention(*given)
        torch.testing.assert_close(static.attention(*given, None), expected, rtol=1e-5, atol=1e-6)


def test_half_precision_speaks(voice: Any) -> None:
    tts = lab.load("tiny", device="cpu", dtype="bfloat16")
    fixed = {"seed": 0, "max_new_tokens": 20, "ignore_eos": True}
    said = [lab.speech_tokens(tts, TEXT, backend=backend, **fixed) for backend in ("hf", "static")]
    assert torch.equal(*said)


@pytest.mark.parametrize("chosen", [{}, {"weights": "int8"}, {"analyzer": "probe", "guard": True}])
def test_nothing_on_this_path_warns(chosen: dict[str, Any]) -> None:
    with logs.catch_warnings() as caught:
        tts = lab.load("tiny", device="cpu", watermark=False)
        for _ in range(2):
            lab.speech_tokens(tts, TEXT, seed=0, max_new_tokens=3, ignore_eos=True, backend="static", **chosen)
    assert not caught


def test_a_voice_is_prefilled_once(tts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    positions: list[int] = []
    run = static.StaticT3.run

    def counted(self: Any, hidden: torch.Tensor, *rest: Any) -> Any:
        positions.append(hidden.shape[1])
        return run(self, hidden, *rest)

    monkeypatch.setattr(static.StaticT3, "run", counted)
    kept._kept.clear()
    for text in TEXTS:
        embeds, where = prefill(tts, text)
        attend = static.StaticT3(tts.t3.tfmr, "probe", where, embeds.shape[1])
        states = attend.prefill(embeds, where[0])
        whole = attention.Attention(tts.t3.tfmr, "probe", where)
        torch.testing.assert_close(states, whole(embeds)[:, where[0] :], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(attend.rows, whole.rows, rtol=1e-4, atol=1e-7)
    assert positions.count(where[0]) == 1
    assert len(positions) == 1 + len(TEXTS)


def test_the_conditioning_is_made_once_for_each_of_the_last_voices(tts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    encode = tts.t3.cond_enc.forward
    monkeypatch.setattr(tts.t3.cond_enc, "forward", lambda cond: made.append(cond) or encode(cond))
    kept._kept.clear()
    for exaggeration, count in ((0.5, 1), (0.5, 1), (0.9, 2), (0.9, 2), (0.5, 2), (1, 3), (2, 4), (3, 5), (0.9, 6)):
        prompt(tts.t3, conditioning(tts, exaggeration), encode_text(tts, TEXT))
        assert len(made) == count


@pytest.mark.parametrize("backend", ["hf", "static"])
def test_another_voice_is_heard_at_once(tts: Any, backend: str) -> None:
    for exaggeration in (0.5, 2.0, 0.5):
        fixed = {"seed": 1, "max_new_tokens": 30, "ignore_eos": True, "exaggeration": exaggeration}
        assert torch.equal(
            lab.speech_tokens(tts, TEXT, backend=backend, **fixed), lab.upstream_tokens(tts, TEXT, **fixed)
        )


class Work(TorchDispatchMode):
    """Counts operators, and the bytes of what they return anew."""

    def __init__(self) -> None:
        super().__init__()
        self.count = self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        found = func(*args, **(kwargs or {}))
        self.count += 1
        if isinstance(found, torch.Tensor) and not func.is_view:
            self.bytes += found.numel() * found.element_size()
        return found


@pytest.mark.parametrize("mode", READ_BESIDE)
def test_a_late_token_is_the_same_work_as_an_early_one(tts: Any, mode: str) -> None:
    embeds, text = prefill(tts)
    attend = static.StaticT3(tts.t3.tfmr, mode, text, embeds.shape[1] + 900)
    attend(embeds)
    attend.reserve(attend.capacity)
    work = []
    for length in (80, 800):
        attend.length = embeds.shape[1] + length
        with Work() as counted:
            attend(embeds[:, :1])
        work.append((counted.count, counted.bytes))
    early, late = work
    assert late[0] == early[0]
    config = tts.t3.tfmr.config
    scores = (
        720 * config.num_attention_heads * 4
    )  # bytes: nothing else may be as long as the text, least of all a cache
    assert late[1] - early[1] <= scores * (2 * 2 * config.num_hidden_layers + 20 * len(attend.heads))


def test_calls_leave_no_memory_behind(tts: Any) -> None:
    def tensors() -> int:
        gc.collect()
        return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())

    counts = []
    for seed in range(4):
        lab.speech_tokens(tts, TEXT, seed=seed, max_new_tokens=10, ignore_eos=True, backend="static")
        counts.append(tensors())
    assert counts[1] == counts[3]


def test_on_a_cpu_the_positions_of_a_coordinate_lie_side_by_side(tts: Any) -> None:
    """Else a token that comes after thousands of others takes twice as long."""
    attend, states = static.StaticT3(tts.t3.tfmr, "off", (0, 5), attention.LONG + 100), torch.randn(2, 20, tts.t3.dim)
    assert attend.cache.stride(5) == 1  # a few are read faster the other way
    kept_before = []
    while attend.length < attention.LONG + 80:
        attend(states)
        kept_before.append(attend.cache[:, :, :, :, : attend.length].clone())
    assert attend.cache.stride(4) == 1
    assert all(torch.equal(before, attend.cache[:, :, :, :, : before.shape[4]]) for before in kept_before)
    with pytest.raises(ValueError, match="the cache was made for"):
        attend(torch.randn(2, 130, tts.t3.dim))
    assert attention.room((2, 1000, 8), torch.empty(0, device="meta")).stride() == (8000, 8, 1)
