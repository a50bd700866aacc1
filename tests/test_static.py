from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import TEXT

import chatterbox_lab as lab
from chatterbox_lab import attention, static
from chatterbox_lab.decode import embed, prompt
from chatterbox_lab.settings import READ_BESIDE
from chatterbox_lab.stream import conditioning, encode_text

TEXTS = (TEXT, "No.", "One two three, four five six, seven eight nine; and ten to finish this long sentence with.")


def prefill(tts: Any, text: str = TEXT) -> tuple[torch.Tensor, tuple[int, int]]:
    with torch.inference_mode():
        return prompt(tts.t3, conditioning(tts, 0.5), encode_text(tts, text))


@pytest.mark.parametrize("mode", READ_BESIDE)
@pytest.mark.parametrize("text", TEXTS)
def test_same_seed_same_tokens_as_upstream(tts: Any, mode: str, text: str) -> None:
    for seed in range(3):
        fixed = {"seed": seed, "max_new_tokens": 40, "ignore_eos": True}
        expected = lab.upstream_tokens(tts, text, **fixed)
        assert torch.equal(lab.speech_tokens(tts, text, analyzer=mode, backend="static", **fixed), expected)


@pytest.mark.parametrize("heads", [attention.FORK_HEADS, attention.LATER_HEADS])
def test_states_and_rows_are_those_of_transformers(tts: Any, heads: attention.Heads) -> None:
    embeds, text = prefill(tts)
    ours = static.StaticT3(tts.t3.tfmr, "probe", text, embeds.shape[1] + 20, heads)
    theirs = attention.Attention(tts.t3.tfmr, "probe", text, heads)
    for position in range(20):
        states = [attend(embeds) for attend in (ours, theirs)]
        torch.testing.assert_close(*states, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ours.rows, theirs.rows, rtol=1e-4, atol=1e-7)
        embeds = embed(tts.t3, torch.tensor([[position * 7]]), position)


def test_the_rotary_tables_are_the_models_own(tts: Any) -> None:
    like = torch.zeros(1, dtype=torch.float32)
    tables = static.rotary_tables(tts.t3.tfmr.rotary_emb, 300, like)
    expected = tts.t3.tfmr.rotary_emb(like, torch.arange(300)[None])
    for table, model in zip(tables, expected, strict=True):
        torch.testing.assert_close(table, model[0], rtol=0, atol=0)


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


def test_half_precision_speaks(voice: Any) -> None:
    tts = lab.load("tiny", device="cpu", dtype="bfloat16")
    fixed = {"seed": 0, "max_new_tokens": 20, "ignore_eos": True}
    said = [lab.speech_tokens(tts, TEXT, backend=backend, **fixed) for backend in ("hf", "static")]
    assert torch.equal(*said)


def test_nothing_on_this_path_warns(tts: Any) -> None:
    with attention.catch_warnings() as caught:
        lab.speech_tokens(tts, TEXT, seed=0, max_new_tokens=3, ignore_eos=True, backend="static")
    assert not caught
