from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2Model

from chatterbox_lab.engine.linears import layer_linears
from chatterbox_lab.engine.t3 import attention, backbone, static

VOICE, TEXT, CAPACITY = 20, (20, 30), 460  # beyond `attention.LONG`


@pytest.fixture(scope="module")
def gpt2() -> GPT2Model:
    """GPT-2 as in a loaded Turbo, with weights so large that all of them show."""
    torch.manual_seed(0)
    sizes = {"n_layer": 3, "n_embd": 64, "n_head": 4, "n_positions": CAPACITY, "vocab_size": 8}
    tfmr = GPT2Model(GPT2Config(**sizes, attn_implementation="sdpa")).eval()
    del tfmr.wte
    with torch.no_grad():
        for weight in tfmr.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.1 if weight.ndim > 1 else 0.5)
    return tfmr


def transformers_own(tfmr: GPT2Model, embeds: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """All hidden states (rows, T, C) of a sequence, and the attention maps (layers, rows, H, T, T)."""
    implementation, tfmr.config._attn_implementation = tfmr.config._attn_implementation, "eager"
    try:
        with torch.inference_mode():
            found = tfmr(inputs_embeds=embeds, output_attentions=True)
    finally:
        tfmr.config._attn_implementation = implementation
    return found.last_hidden_state, torch.stack(found.attentions)


def near(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    return float((ours - theirs).abs().max()) < 1e-4 * float(theirs.abs().max())


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("length", [32, attention.LONG])
def test_gpt2s_states_and_rows_are_those_of_transformers(gpt2: GPT2Model, rows: int, length: int) -> None:
    embeds = torch.randn(rows, length + 20, 64)
    states, maps = transformers_own(gpt2, embeds)
    heads = ((1, 2), (2, None))
    attend = static.StaticT3(gpt2, "probe", TEXT, CAPACITY, heads, rows=rows)
    found = [attend.prefill(embeds[:, :length], VOICE)]
    expected = torch.stack([maps[1][0, 2], maps[2][0].mean(0)]).mean(0)[:, slice(*TEXT)]
    torch.testing.assert_close(attend.rows, expected[TEXT[1] : length], rtol=1e-4, atol=1e-6)
    for place in range(length, length + 20):
        found.append(attend(embeds[:, place : place + 1]))
        torch.testing.assert_close(attend.rows, expected[place : place + 1], rtol=1e-4, atol=1e-6)
    assert near(torch.cat(found, dim=1), states[:, VOICE:])


def test_gpt2_with_rounded_weights_is_near(gpt2: GPT2Model) -> None:
    embeds = torch.randn(1, 60, 64)
    states, _ = transformers_own(gpt2, embeds)
    attend = static.StaticT3(gpt2, "off", TEXT, CAPACITY, weights="int8", rows=1)
    prompt = attend.prefill(embeds[:, :40], VOICE)
    assert near(prompt, states[:, VOICE:40])  # the prefill is not rounded
    steps = torch.cat([attend(embeds[:, place : place + 1]) for place in range(40, 60)], dim=1)
    error = float((steps - states[:, 40:]).norm() / states[:, 40:].norm())
    assert 0 < error < 0.1


def test_gpt2_in_half_precision_is_near(gpt2: GPT2Model) -> None:
    embeds = torch.randn(1, 60, 64)
    states, _ = transformers_own(gpt2, embeds)
    half = GPT2Model(gpt2.config).eval()
    del half.wte
    half.load_state_dict(gpt2.state_dict())
    attend = static.StaticT3(half.bfloat16(), "off", TEXT, CAPACITY, rows=1)
    found = [attend.prefill(embeds[:, :40].bfloat16(), VOICE)]
    found += [attend(embeds[:, place : place + 1].bfloat16()) for place in range(40, 60)]
    steps = torch.cat(found, dim=1)
    assert steps.dtype == torch.bfloat16
    assert float((steps - states[:, VOICE:]).norm() / states[:, VOICE:].norm()) < 0.05


def test_gpt2s_voice_goes_through_the_layers_once(gpt2: GPT2Model, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: list[int] = []
    enter = backbone.GPT2.enter

    def counted(self: Any, index: int, hidden: torch.Tensor, tables: Any) -> Any:
        lengths.append(hidden.shape[1])
        return enter(self, index, hidden, tables)

    monkeypatch.setattr(backbone.GPT2, "enter", counted)
    voice = torch.randn(1, VOICE, 64)
    for text in (7, 11):
        embeds = torch.cat([voice, torch.randn(1, text, 64)], dim=1)
        attend = static.StaticT3(gpt2, "off", TEXT, CAPACITY, rows=1)
        assert near(attend.prefill(embeds, VOICE), transformers_own(gpt2, embeds)[0][:, VOICE:])
    assert lengths == [VOICE] * 3 + [7] * 3 + [11] * 3


def test_gpt2_is_run_by_transformers_too(gpt2: GPT2Model) -> None:
    """Whatever kind of cache this version of it takes."""
    embeds = torch.randn(1, 60, 64)
    states, _ = transformers_own(gpt2, embeds)
    for _ in range(2):  # a second call begins anew
        attend = attention.Attention(gpt2, "off", TEXT)
        found = [attend.prefill(embeds[:, :40], VOICE)]
        found += [attend(embeds[:, place : place + 1]) for place in range(40, 60)]
        assert near(torch.cat(found, dim=1), states)


@pytest.mark.parametrize("head", [(3, 0), (0, 4), (-1, None)])
def test_heads_that_gpt2_lacks_are_refused(gpt2: GPT2Model, head: tuple[int, int | None]) -> None:
    with pytest.raises(ValueError, match="is not within 3 layers of 4 heads"):
        static.StaticT3(gpt2, "probe", TEXT, CAPACITY, [head])


def test_the_rotary_tables_are_the_models_own(tts: Any) -> None:
    like = torch.zeros(1, dtype=torch.float32)
    tables = backbone.rotary_tables(tts.t3.tfmr.rotary_emb, 300, like)
    cosine, sine = (table[0] for table in tts.t3.tfmr.rotary_emb(like, torch.arange(300)[None]))
    sine[:, : sine.shape[1] // 2] *= -1  # the sign that rotate_half gives to what it moves there
    for table, model in zip(tables, (cosine, sine), strict=True):
        torch.testing.assert_close(table, model, rtol=0, atol=0)


def test_products_of_a_backbone_are_kept_with_the_transformer(gpt2: GPT2Model) -> None:
    assert static.StaticT3(gpt2, "off", TEXT, 10, rows=1).backbone.linears is layer_linears(gpt2)
