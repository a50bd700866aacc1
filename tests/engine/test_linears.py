from __future__ import annotations

import gc
import time
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import TEXT
from transformers import GPT2Config, GPT2Model

import chatterbox_lab as lab
from chatterbox_lab import kept
from chatterbox_lab.engine import linears

SHAPES = [((96, 96, 96), 96), ((40, 24), 64), ((128,), 32)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 2, 30])
@pytest.mark.parametrize(("outs", "width"), SHAPES)
@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_stacked_layers_give_what_each_alone_gives(
    outs: tuple[int, ...],
    width: int,
    rows: int,
    dtype: torch.dtype,
    columns: bool,
    biased: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(linears, "columns_are_faster", lambda threads: columns)
    torch.manual_seed(0)
    weights = [torch.randn(out, width, dtype=dtype) for out in outs]
    biases = [torch.randn(out, dtype=dtype) if biased else None for out in outs]
    states = torch.randn(2, rows, width, dtype=dtype)
    found = linears.Stacked(weights, biases=biases)(states)
    expected = torch.cat([F.linear(states, *part) for part in zip(weights, biases, strict=True)], dim=-1)
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected, **({"rtol": 1e-5, "atol": 1e-4} if dtype == torch.float32 else {}))


@pytest.mark.parametrize("faster", [False, True])
def test_both_forms_of_few_rows_say_upstreams_tokens(tts: Any, faster: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    kept._kept.clear()
    used: list[int] = []
    columns = linears._columns
    monkeypatch.setattr(linears, "columns_are_faster", lambda threads: faster)
    monkeypatch.setattr(linears, "_columns", lambda *given: used.append(len(given[-1])) or columns(*given))
    fixed = {"seed": 3, "max_new_tokens": 25, "ignore_eos": True}
    said = lab.speech_tokens(tts, TEXT, backend="static", **fixed)
    assert torch.equal(said, lab.upstream_tokens(tts, TEXT, **fixed))
    assert bool(used) == faster
    kept._kept.clear()


@pytest.mark.parametrize("slow", ["_columns", "linear"])
def test_the_slower_form_is_not_taken(slow: str, monkeypatch: pytest.MonkeyPatch) -> None:
    linears.columns_are_faster.cache_clear()
    where = linears if slow == "_columns" else linears.F
    original = getattr(where, slow)

    def slowed(*given: Any) -> torch.Tensor:
        time.sleep(0.01)
        return original(*given)

    with monkeypatch.context() as patched:
        patched.setattr(where, slow, slowed)
        assert linears.columns_are_faster(torch.get_num_threads()) == (slow == "linear")
    assert linears.columns_are_faster(torch.get_num_threads()) == (slow == "linear")  # once a process
    linears.columns_are_faster.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("biased", [False, True])
def test_int8_is_close_for_few_rows_and_exact_for_many(dtype: torch.dtype, biased: bool) -> None:
    torch.manual_seed(0)
    weights = [torch.randn(256, 512, dtype=dtype), torch.randn(128, 512, dtype=dtype)]
    biases = [30 * torch.randn(len(weight), dtype=dtype) if biased else None for weight in weights]
    stacked = linears.Stacked(weights, "int8", biases)
    for rows, exact in ((1, False), (2, False), (8, True)):
        states = torch.randn(2, rows, 512, dtype=dtype)
        expected = torch.cat([F.linear(states, *part) for part in zip(weights, biases, strict=True)], dim=-1).float()
        error = float((stacked(states).float() - expected).norm() / expected.norm())
        assert error == 0 if exact else 0 < error < 0.02


def test_what_is_kept_is_made_again_for_other_weights() -> None:
    layer, made = torch.nn.Linear(4, 4), []
    for _ in range(2):
        kept.kept(layer, "key", lambda: made.append(1))
    assert len(made) == 1
    with torch.no_grad():
        layer.weight.mul_(2)
    kept.kept(layer, "key", lambda: made.append(1))
    assert len(made) == 2
    layer.to(torch.bfloat16)
    kept.kept(layer, "key", lambda: made.append(1))
    assert len(made) == 3


@pytest.mark.parametrize("chosen", [{}, {"weights": "int8"}])
def test_a_model_that_is_let_go_takes_everything_with_it(chosen: dict[str, str]) -> None:
    tts = lab.load("tiny", device="cpu", watermark=False)
    lab.speech_tokens(tts, TEXT, seed=0, max_new_tokens=3, backend="static", **chosen)
    there = [weakref.ref(module) for module in (tts.t3, tts.t3.tfmr, tts.t3.speech_head)]
    del tts
    gc.collect()
    assert [module() for module in there] == [None] * 3


def test_layers_that_are_no_plain_linear_ones_are_refused() -> None:
    tts = lab.load("tiny", device="cpu", watermark=False)
    layer = tts.t3.tfmr.layers[2].mlp
    layer.up_proj = torch.nn.Sequential(layer.up_proj)
    with pytest.raises(ValueError, match="a Sequential where a plain Linear was: use backend='hf'"):
        lab.speech_tokens(tts, TEXT, seed=0, max_new_tokens=3, backend="static")


def test_a_model_made_in_inference_mode_speaks() -> None:
    with torch.inference_mode():
        tts = lab.load("tiny", device="cpu", watermark=False)
        assert len(lab.speech_tokens(tts, TEXT, seed=0, max_new_tokens=3, ignore_eos=True, backend="static")) == 3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_head_is_the_modules_own(dtype: str) -> None:
    tts = lab.load("tiny", device="cpu", dtype=dtype, watermark=False)
    for head in (tts.t3.speech_head, torch.nn.Linear(96, 80, dtype=tts.t3.speech_head.weight.dtype)):
        hidden = torch.randn(2, 1, head.in_features, dtype=head.weight.dtype)
        with torch.inference_mode():
            torch.testing.assert_close(linears.head_linear(head)(hidden), head(hidden))
    adapted = torch.nn.Sequential(torch.nn.Linear(8, 8))
    assert linears.head_linear(adapted) is adapted


@pytest.mark.parametrize("columns", [False, True])
def test_weights_that_lie_by_input_are_read_as_they_lie(columns: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """GPT-2's, which come with one row: no form of it is faster, and a turned copy would take as much memory again."""
    monkeypatch.setattr(linears, "columns_are_faster", lambda threads: columns)
    monkeypatch.setattr(linears, "_columns", None)  # would read them across
    tfmr = GPT2Model(GPT2Config(n_layer=2, n_embd=64, n_head=2, n_positions=16, vocab_size=8))
    layer = tfmr.h[1]
    parts = layer.attn.c_attn, layer.attn.c_proj, layer.mlp.c_fc, layer.mlp.c_proj
    for part, product in zip(parts, linears.layer_linears(tfmr)[1], strict=True):
        torch.nn.init.normal_(part.bias)
        states = torch.randn(1, 1, part.weight.shape[0])
        with torch.inference_mode():
            torch.testing.assert_close(product(states), part(states))
        assert product.weights[0].data_ptr() == part.weight.data_ptr()
    layer.mlp.c_fc = torch.nn.Sequential(layer.mlp.c_fc)
    with pytest.raises(ValueError, match="a Sequential where a plain Linear was"):
        linears.layer_linears(tfmr)


def test_int8_speaks_and_says_other_tokens_only_by_rounding(tts: Any) -> None:
    fixed = {"seed": 0, "max_new_tokens": 20, "ignore_eos": True, "backend": "static"}
    loaded, rounded = (lab.speech_tokens(tts, TEXT, weights=kind, **fixed) for kind in ("loaded", "int8"))
    assert len(loaded) == len(rounded) == 20
    assert loaded[0] == rounded[0]  # the prefill is not rounded


@pytest.mark.parametrize("backend", ["hf", "compile", "graph"])
def test_int8_needs_the_static_backend(backend: str) -> None:
    with pytest.raises(ValueError, match=f"weights='int8' with backend='{backend}': only 'static'"):
        lab.StreamSettings(weights="int8", backend=backend)


def test_a_model_speaks_with_the_weights_it_has_now() -> None:
    tts = lab.load("tiny", device="cpu", watermark=False)
    fixed = {"seed": 0, "max_new_tokens": 5, "ignore_eos": True, "backend": "static"}
    lab.speech_tokens(tts, TEXT, **fixed)
    with torch.no_grad():
        for weight in tts.t3.tfmr.layers[3].parameters():
            weight.mul_(1.5)
    expected = lab.upstream_tokens(tts, TEXT, seed=0, max_new_tokens=5, ignore_eos=True)
    assert torch.equal(lab.speech_tokens(tts, TEXT, **fixed), expected)
