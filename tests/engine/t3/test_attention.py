from __future__ import annotations

import functools
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from chatterbox.models.t3.inference.alignment_stream_analyzer import AlignmentStreamAnalyzer
from chatterbox.models.t3.inference.t3_hf_backend import T3HuggingfaceBackend
from conftest import TEXT
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

import chatterbox_lab as lab
from chatterbox_lab.engine.request import encode_text
from chatterbox_lab.engine.t3 import attention, backends, eager, spies
from chatterbox_lab.engine.t3.alignment import AlignmentTracker, guard_logits
from chatterbox_lab.engine.t3.backends import ANALYZERS
from chatterbox_lab.engine.t3.decode import conditioning, decode, prompt
from chatterbox_lab.engine.t3.rules import FORK
from chatterbox_lab.study import fallback, logs, upstream
from chatterbox_lab.voices import load as models


def prefill(tts: Any) -> tuple[torch.Tensor, tuple[int, int]]:
    with torch.inference_mode():
        return prompt(tts.t3, conditioning(tts, 0.5), encode_text(tts, TEXT))


def upstream_tokens(tts: Any, seed: int, count: int, **settings: Any) -> torch.Tensor:
    return lab.upstream_tokens(tts, TEXT, seed=seed, max_new_tokens=count, ignore_eos=True, **settings)


@pytest.mark.parametrize("mode", ANALYZERS)
def test_same_seed_same_tokens_as_upstream(tts: Any, mode: str) -> None:
    for seed in (0, 1):
        expected = upstream_tokens(tts, seed, 40)
        tokens = lab.speech_tokens(tts, TEXT, seed=seed, max_new_tokens=40, ignore_eos=True, analyzer=mode)
        assert torch.equal(tokens, expected)


@pytest.mark.parametrize("mode", ANALYZERS)
def test_greedy_tokens_equal_upstreams(tts: Any, mode: str) -> None:
    expected = upstream_tokens(tts, 0, 25, temperature=1e-3)  # upstream cannot divide by zero
    greedy = lab.speech_tokens(tts, TEXT, temperature=0, max_new_tokens=25, ignore_eos=True, analyzer=mode)
    assert torch.equal(greedy, expected)


def test_upstreams_streaming_tokens_are_the_same(tts: Any) -> None:
    with upstream._borrowed(tts, lab.BALANCED.replace(ignore_eos=True)), torch.inference_mode():
        torch.manual_seed(4)
        text = encode_text(tts, TEXT)
        chunks = list(tts.inference_stream(t3_cond=tts.conds.t3, text_tokens=text, max_new_tokens=30, chunk_size=10))
    spies.remove_spies(tts.t3.tfmr)
    tokens = lab.speech_tokens(tts, TEXT, seed=4, max_new_tokens=30, ignore_eos=True)
    assert torch.equal(tokens, torch.cat(chunks, 1)[0])


def test_without_a_seed_the_default_generator_samples(tts: Any) -> None:
    torch.manual_seed(7)
    unseeded = lab.speech_tokens(tts, TEXT, max_new_tokens=10, ignore_eos=True)
    assert torch.equal(unseeded, lab.speech_tokens(tts, TEXT, seed=7, max_new_tokens=10, ignore_eos=True))


def test_the_stop_token_ends_the_stream(tts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    count = iter(range(1000))

    def stop_at_twelve(module: Any, inputs: Any, logits: torch.Tensor) -> torch.Tensor:
        if next(count) == 12:
            logits[..., tts.t3.hp.stop_speech_token] = 1e4
        return logits

    handle = tts.t3.speech_head.register_forward_hook(stop_at_twelve)
    try:
        chunks = [audio for audio, _ in lab.generate_stream(tts, TEXT, seed=0, chunk_size=6, max_new_tokens=40)]
    finally:
        handle.remove()
    assert sum(chunk.shape[1] for chunk in chunks) == 12 * 960


@pytest.mark.parametrize("heads", [attention.FORK_HEADS, attention.LATER_HEADS])
def test_rows_are_those_of_the_attention_maps(tts: Any, heads: backends.Heads) -> None:
    embeds, text = prefill(tts)
    step = torch.randn(2, 1, tts.t3.dim) * 0.02
    rows: dict[str, list[torch.Tensor]] = {}
    for mode in ("stock", "layer", "probe"):
        attend, cache = attention.Attention(tts.t3.tfmr, mode, text, heads), DynamicCache()
        rows[mode] = []
        for part in (embeds, step, step):
            attend(part, cache)
            rows[mode].append(attend.rows)
    assert [row.shape for row in rows["stock"]] == [(2, text[1] - text[0]), *[(1, text[1] - text[0])] * 2]
    for mode in ("layer", "probe"):
        for row, expected in zip(rows[mode], rows["stock"], strict=True):
            torch.testing.assert_close(row, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(("mode", "manual"), [("stock", 14), ("layer", 1), ("off", 0), ("probe", 0)])
def test_how_many_layers_fall_back(tts: Any, mode: str, manual: int) -> None:
    embeds, text = prefill(tts)
    with fallback.watch_layers(tts.t3.tfmr) as counts:
        attention.Attention(tts.t3.tfmr, mode, text)(embeds, DynamicCache())
    assert [sum(count[kind] for count in counts) for kind in ("manual", "sdpa")] == [manual, 14 - manual]
    if mode == "layer":
        assert counts[9]["manual"] == 1


@pytest.mark.parametrize("heads", [((14, 0),), ((-1, None),), ((9, 16),)])
def test_a_head_that_does_not_exist_is_refused(tts: Any, heads: backends.Heads) -> None:
    with pytest.raises(ValueError, match="heads="):
        attention.Attention(tts.t3.tfmr, "probe", (0, 5), heads)


@contextmanager
def upstreams_analyzer_active() -> Iterator[list[Any]]:
    """The line that chatterbox-streaming has commented out, put back in."""
    seen: list[Any] = []
    plain = T3HuggingfaceBackend.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = plain(self, *args, **kwargs)
        output["logits"] = self.alignment_stream_analyzer.step(output.logits)
        seen.append(self.alignment_stream_analyzer)
        return output

    T3HuggingfaceBackend.forward = forward
    try:
        yield seen
    finally:
        T3HuggingfaceBackend.forward = plain


@pytest.mark.parametrize("mode", ["stock", "layer", "probe"])
def test_rows_and_guarded_tokens_equal_upstreams_analyzer(tts: Any, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with upstreams_analyzer_active() as seen:
        expected = upstream_tokens(tts, 5, 30)
    taken: list[torch.Tensor] = []
    update = AlignmentTracker.update

    def recorded(self: AlignmentTracker, rows: torch.Tensor, token: int | None = None) -> Any:
        before = rows.clone()
        before[:, self.steps + 1 :] = 0
        taken.append(before)
        return update(self, rows, token)

    monkeypatch.setattr(AlignmentTracker, "update", recorded)
    upstreams = {"ignore_eos": True, "analyzer": mode, "guard": True, "rules": FORK}
    tokens = lab.speech_tokens(tts, TEXT, seed=5, max_new_tokens=30, **upstreams)
    assert torch.equal(tokens, expected)
    alignment = seen[-1].alignment[: len(torch.cat(taken))]
    torch.testing.assert_close(torch.cat(taken), alignment, rtol=1e-4, atol=1e-7)


def synthetic_rows(kind: str, text: int, steps: int, seed: int) -> list[torch.Tensor]:
    """Attention that walks through the text, then lingers, jumps back or loses its way."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for step in range(steps):
        focus = min(step * text // 45, text - 1)
        if kind == "repeats" and step > 50:
            focus = (step * 3) % max(1, text - 6)
        if kind == "lost":
            focus = int(torch.randint(text, (1,), generator=generator))
        row = torch.rand(2 if step == 0 else 1, text, generator=generator) * 0.02
        row[:, focus] += 0.9 if kind != "faint" else 0.05
        rows.append(row)
    return rows


def upstream_decision(analyzer: AlignmentStreamAnalyzer, rows: torch.Tensor, text: int) -> torch.Tensor:
    """Upstream's changed logits; its map starts with the text at column 0, so the first step needs rows above."""
    first = analyzer.curr_frame_pos == 0
    analyzer.last_aligned_attn = torch.cat([torch.zeros(text, text), rows]) if first else rows
    return analyzer.step(torch.zeros(2, 1, 12))


@pytest.mark.parametrize("kind", ["walks", "repeats", "lost", "faint"])
@pytest.mark.parametrize("text", [6, 20, 40])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_decisions_are_upstreams_step_by_step(tts: Any, kind: str, text: int, seed: int) -> None:
    analyzer = AlignmentStreamAnalyzer(tts.t3.tfmr, None, (0, text), eos_idx=3)
    spies.remove_spies(tts.t3.tfmr)
    tracker = AlignmentTracker(text)
    for rows in synthetic_rows(kind, text, 80, seed):
        expected = upstream_decision(analyzer, rows, text)
        state = tracker.update(rows)
        assert state.position == int(analyzer.text_position)
        assert (state.started, state.complete) == (analyzer.started, bool(analyzer.complete))
        if expected.unique().numel() > 1 or state.stop is None:  # else upstream forces and suppresses at once
            assert torch.equal(guard_logits(torch.zeros(2, 1, 12), state, 3), expected)
        else:
            assert state.stop == "force"


def test_the_synthetic_streams_reach_every_decision() -> None:
    seen = {
        tracker.update(rows).stop
        for kind in ("walks", "repeats", "lost")
        for tracker in [AlignmentTracker(20)]
        for rows in synthetic_rows(kind, 20, 80, 0)
    }
    assert seen == {"force", "suppress", None}


def test_the_guard_ends_a_long_tail(tts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    text = encode_text(tts, TEXT).shape[1]
    rows = iter(synthetic_rows("walks", text, 200, 0))
    given = property(lambda self: next(rows), lambda self, value: None)
    monkeypatch.setattr(eager.EagerT3, "rows", given)
    tokens = lab.speech_tokens(tts, TEXT, seed=0, max_new_tokens=150, analyzer="probe", guard=True)
    assert 45 < len(tokens) < 70


def test_every_stock_call_leaves_another_spy(voice: Any) -> None:
    found = []
    for _ in range(3):
        lab.upstream_tokens(voice, TEXT, seed=0, max_new_tokens=2, leave_spies=True)
        found.append(fallback.count_spies(voice.t3.tfmr))
    lab.speech_tokens(voice, TEXT, seed=0, max_new_tokens=2, analyzer="layer")
    assert fallback.count_spies(voice.t3.tfmr) == found[-1]  # put back as it was
    spies.remove_spies(voice.t3.tfmr)
    assert found == [{"hooks": n, "wrapped forwards": n} for n in (1, 2, 3)]
    assert fallback.count_spies(voice.t3.tfmr) == {"hooks": 0, "wrapped forwards": 0}


def test_the_guard_looks_on_where_the_stop_is_ignored(tts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = iter(synthetic_rows("walks", encode_text(tts, TEXT).shape[1], 200, 0))
    given = property(lambda self: next(rows), lambda self, value: None)
    monkeypatch.setattr(eager.EagerT3, "rows", given)
    tokens = lab.speech_tokens(tts, TEXT, seed=0, max_new_tokens=90, analyzer="probe", guard=True, ignore_eos=True)
    assert len(tokens) == 90
    assert tokens.max() < 6561


def test_a_watched_model_still_has_its_spies_lifted(tts: Any) -> None:
    AlignmentStreamAnalyzer(tts.t3.tfmr, None, (0, 5))
    with fallback.watch_layers(tts.t3.tfmr) as counts:
        lab.speech_tokens(tts, TEXT, seed=2, max_new_tokens=1, ignore_eos=True)
    spies.remove_spies(tts.t3.tfmr)
    assert all(set(count) == {"sdpa"} for count in counts)


@pytest.mark.parametrize("mode", ANALYZERS)
def test_tokens_in_bfloat16_equal_upstreams(mode: str) -> None:
    half = models.load("tiny", device="cpu", dtype="bfloat16")
    arguments = {"seed": 1, "max_new_tokens": 40, "ignore_eos": True, "exaggeration": 0.7}
    expected = lab.upstream_tokens(half, TEXT, **arguments)
    assert torch.equal(lab.speech_tokens(half, TEXT, analyzer=mode, **arguments), expected)
    streamed = lab.upstream_stream(half, TEXT, chunk_size=5, **arguments | {"max_new_tokens": 5})
    assert next(streamed)[0].shape == (1, 5 * 960)


def test_a_spy_left_behind_changes_nothing_in_our_stream(tts: Any) -> None:
    clean = lab.speech_tokens(tts, TEXT, seed=2, max_new_tokens=15, ignore_eos=True)
    AlignmentStreamAnalyzer(tts.t3.tfmr, None, (0, 5))
    spied = lab.speech_tokens(tts, TEXT, seed=2, max_new_tokens=15, ignore_eos=True)
    spies.remove_spies(tts.t3.tfmr)
    assert torch.equal(spied, clean)


def test_the_half_fix_looks_into_the_future(tts: Any) -> None:
    embeds, text = prefill(tts)
    result = fallback.measure_half_fix(tts.t3.tfmr, tts.t3.speech_head, embeds, text)
    assert float(result.sound.triu(1).abs().sum()) == 0
    assert 0.3 < result.future_mass < 0.7
    assert result.logits_change > 0.003
    assert result.rounding < 1e-5


def test_stock_warns_twice_and_our_path_not_at_all(tts: Any) -> None:
    with logs.catch_warnings() as stock:
        upstream_tokens(tts, 0, 2)
    fallback = [w for w in stock if "manual attention implementation" in w.message]
    cache = [w for w in stock if "tuple of tuples" in w.message]
    # Layer 9's spy asks again for itself, so it is counted like every other layer: once a forward.
    assert {w.layer for w in fallback} == set(range(14))
    assert all("t3.py" in w.called_from and "inference" in w.called_from for w in fallback)
    assert fallback[0].raised_in.startswith("modeling_llama.py")
    assert cache
    assert cache[0].layer is None
    for mode in ("off", "probe"):
        with logs.catch_warnings() as ours:
            lab.speech_tokens(tts, TEXT, seed=0, max_new_tokens=3, analyzer=mode)
        assert ours == []


def test_decode_yields_plain_tokens_and_leaves_autograd_alone(tts: Any) -> None:
    with torch.enable_grad():
        tokens = decode(tts.t3, conditioning(tts, 0.5), encode_text(tts, TEXT), lab.BALANCED, max_new_tokens=3)
        first = next(tokens)
        assert not torch.is_inference_mode_enabled()
        assert torch.is_grad_enabled()
        tokens.close()
    assert (first.shape, first.dtype) == ((1,), torch.int64)


class Made(TorchDispatchMode):
    """Counts the bytes of what operators return anew."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if isinstance(found, torch.Tensor) and not func.is_view:
            self.bytes += found.numel() * found.element_size()
        return found


@torch.inference_mode()
def test_a_late_token_copies_nothing_of_what_was_said(tts: Any) -> None:
    attend, states = attention.Attention(tts.t3.tfmr, "off", (0, 5)), torch.randn(2, 1, tts.t3.dim)
    attend(torch.randn(2, 100, tts.t3.dim))
    for length in (110, 900):
        while attend.cache.get_seq_length() < length:
            attend(states)
        with Made() as counted:
            attend(states)
        keys_and_values = 2 * 2 * length * tts.t3.dim * 4 * len(tts.t3.tfmr.layers)
        assert counted.bytes < keys_and_values / 4


@torch.inference_mode()
@pytest.mark.parametrize("mode", ["off", "probe", "layer", "stock"])
def test_the_cache_holds_what_transformers_own_would(tts: Any, mode: str) -> None:
    steps = [torch.randn(2, length, tts.t3.dim) for length in (20, *[1] * 40)]
    ours, theirs = (attention.Attention(tts.t3.tfmr, mode, (5, 12)) for _ in range(2))
    theirs.cache = DynamicCache()
    for states in steps:
        assert torch.equal(ours(states), theirs(states))
        assert mode == "off" or torch.equal(ours.rows, theirs.rows)


@pytest.mark.parametrize("mode", ["probe", "layer"])
@pytest.mark.parametrize("how", ["method", "partial", "compiled"])
def test_the_alignment_is_read_where_a_layer_has_a_forward_of_its_own(voice: Any, mode: str, how: str) -> None:
    tts = models.load("tiny", device="cpu", seed=0)
    embeds, text = prefill(tts)
    expected = attention.Attention(tts.t3.tfmr, mode, text)
    states = expected(embeds)
    for module in (tts.t3.tfmr, *tts.t3.tfmr.layers):
        inner = type(module).forward
        if how == "method":
            module.forward = types.MethodType(inner, module)
        elif how == "partial":  # as accelerate has it
            module.forward = functools.partial(inner, module)
        else:
            module.compile(backend="eager")
    found = attention.Attention(tts.t3.tfmr, mode, text)
    torch.testing.assert_close(found(embeds), states)
    torch.testing.assert_close(found.rows, expected.rows)


def test_layers_that_cannot_be_read_are_named(voice: Any) -> None:
    tts = models.load("tiny", device="cpu", seed=0)
    layer = tts.t3.tfmr.layers[9]
    inner = layer.forward
    layer.forward = lambda *args, **kwargs: inner(*args, **kwargs)
    with pytest.raises(RuntimeError, match=r"analyzer='probe'.*use analyzer='off'"):
        lab.speech_tokens(tts, TEXT, analyzer="probe", max_new_tokens=2)
