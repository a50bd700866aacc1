"""Everything about the graph backend that does not need CUDA: what is captured runs as it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import TEXT
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import chatterbox_lab as lab
from chatterbox_lab import kept
from chatterbox_lab.engine.request import encode_text
from chatterbox_lab.engine.t3 import attention, decode, graph
from chatterbox_lab.engine.t3.backends import BACKENDS
from chatterbox_lab.engine.t3.decode import conditioning

LONG = "One two three, four five six, seven eight nine; and ten to finish this long sentence with."


class Operations(TorchDispatchMode):
    """Records operators with the very tensors that they read and wrote, as a capture does."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            raise RuntimeError(f"{func} waits for the device: not permitted in a capture")
        found = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, found))
        return found

    @torch.inference_mode()
    def replay(self) -> None:
        """Runs the operators again, into the same memory; no line of Python that led to them is run."""
        for func, args, kwargs, before in self.calls:
            found = func(*args, **kwargs)
            if not func._schema.is_mutable:  # of what was a view, the copy changes nothing
                for old, new in zip(tree_leaves(before), tree_leaves(found), strict=True):
                    if isinstance(old, torch.Tensor):
                        old.copy_(new)


class Recorder:
    """Stands in for the capture: warms up as it does, and replays operators instead of kernels."""

    def __init__(self) -> None:
        self.captures = self.underway = 0

    def __call__(self, work: Callable[[], None], restore: Callable[[], None], *_: Any) -> Callable[[], None]:
        self.underway += 1
        try:
            return self._captured(work, restore)
        finally:
            self.underway -= 1

    def _captured(self, work: Callable[[], None], restore: Callable[[], None]) -> Callable[[], None]:
        assert self.underway == 1, "PyTorch allows one capture at a time"
        self.captures += 1
        for _ in range(2):
            work()
            restore()
        with Operations() as operations:
            work()
        restore()  # a capture runs nothing
        return operations.replay


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorder]:
    found = Recorder()
    kept._kept.clear()
    monkeypatch.setattr(graph, "captured", found)
    monkeypatch.setitem(BACKENDS, "graph", replace(BACKENDS["graph"], devices=("cpu",)))
    yield found
    kept._kept.clear()


def test_a_cpu_is_refused_with_a_clear_error(tts: Any) -> None:
    with pytest.raises(ValueError, match="backend='graph': needs a CUDA device, the model is on cpu"):
        lab.generate_stream(tts, TEXT, backend="graph")


@pytest.mark.parametrize("mode", ["off", "probe"])
def test_same_tokens_as_upstream_for_any_text_seed_and_setting(tts: Any, recorder: Recorder, mode: str) -> None:
    for text, seed, temperature, cfg_weight in ((TEXT, 0, 0.8, 0.5), ("No.", 1, 0.6, 0.2), (LONG, 2, 1.0, 0.9)):
        fixed = {"seed": seed, "temperature": temperature, "cfg_weight": cfg_weight}
        fixed |= {"max_new_tokens": 30, "ignore_eos": True}
        said = lab.speech_tokens(tts, text, backend="graph", analyzer=mode, **fixed)
        assert torch.equal(said, lab.upstream_tokens(tts, text, **fixed))
    assert recorder.captures == 2  # one window of the step, one way to sample


def test_what_waits_for_the_device_is_noticed() -> None:
    token = torch.tensor([3])
    with pytest.raises(RuntimeError, match="waits for the device"):
        Recorder()(lambda: print(int(token)), lambda: None)


def test_a_long_text_goes_from_window_to_window(tts: Any, recorder: Recorder, caplog: pytest.LogCaptureFixture) -> None:
    fixed = {"seed": 0, "max_new_tokens": 230, "ignore_eos": True}
    caplog.set_level("INFO", "chatterbox_lab")
    said = lab.speech_tokens(tts, TEXT, backend="graph", **fixed)
    assert torch.equal(said, lab.speech_tokens(tts, TEXT, backend="static", **fixed))
    assert recorder.captures == 3
    reported = [line.removesuffix(" captured").removeprefix("backend='graph': ") for line in caplog.messages]
    assert reported[0].startswith("('sampling', Sampling(")
    assert reported[1:] == ["('step', 256)", "('step', 512)"]


@pytest.mark.parametrize("ignore_eos", [False, True])
def test_the_guard_decides_as_with_transformers(tts: Any, recorder: Recorder, ignore_eos: bool) -> None:
    fixed = {"seed": 5, "max_new_tokens": 40, "guard": True, "analyzer": "probe", "ignore_eos": ignore_eos}
    said = [lab.speech_tokens(tts, TEXT, backend=backend, **fixed) for backend in ("hf", "graph")]
    assert torch.equal(*said)


def test_greedy_is_a_graph_of_its_own(tts: Any, recorder: Recorder) -> None:
    for temperature in (0.8, 0.0, 0.8, 0.0):
        fixed = {"seed": 0, "max_new_tokens": 10, "temperature": temperature, "ignore_eos": True}
        said = [lab.speech_tokens(tts, TEXT, backend=backend, **fixed) for backend in ("hf", "graph")]
        assert torch.equal(*said)
    assert recorder.captures == 3


def test_ways_to_sample_are_forgotten(tts: Any, recorder: Recorder) -> None:
    fixed = {"seed": 0, "max_new_tokens": 5, "ignore_eos": True}
    for number in range(8):
        said = lab.speech_tokens(tts, TEXT, backend="graph", top_p=0.5 + 0.05 * number, **fixed)
        assert torch.equal(said, lab.speech_tokens(tts, TEXT, backend="static", top_p=0.5 + 0.05 * number, **fixed))
    free = kept.kept(tts.t3, ("graph", "off", tuple(attention.FORK_HEADS), 2), kept.Pool)
    found = free.take(lambda graph: True)
    assert len([key for key in found.graphs if key[0] == "sampling"]) == 4
    free.give(found)


def test_two_streams_at_once_do_not_share_a_cache(tts: Any, recorder: Recorder) -> None:
    fixed = {"max_new_tokens": 20, "ignore_eos": True}
    alone = [lab.speech_tokens(tts, TEXT, seed=seed, backend="graph", **fixed) for seed in (0, 1)]
    cond, text_tokens = conditioning(tts, 0.5), encode_text(tts, TEXT)
    settings = lab.StreamSettings(backend="graph", ignore_eos=True)
    streams = [
        decode.decode(
            tts.t3, cond, text_tokens, settings, generator=torch.Generator().manual_seed(seed), max_new_tokens=20
        )
        for seed in (0, 1)
    ]
    together = list(zip(*streams, strict=True))
    for seed in (0, 1):
        assert torch.equal(torch.cat([pair[seed] for pair in together]), alone[seed])


def test_threads_capture_one_at_a_time(tts: Any, recorder: Recorder) -> None:
    fixed = {"max_new_tokens": 10, "ignore_eos": True, "backend": "graph"}
    alone = [lab.speech_tokens(tts, TEXT, seed=seed, **fixed) for seed in range(4)]
    kept._kept.clear()
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda seed: lab.speech_tokens(tts, TEXT, seed=seed, **fixed), range(4)))
    assert all(map(torch.equal, together, alone))
    assert recorder.captures > 2  # more than one thread has met this


def test_a_graph_is_given_back_by_a_call_that_failed(tts: Any, recorder: Recorder) -> None:
    fixed = {"seed": 0, "max_new_tokens": 10, "ignore_eos": True, "backend": "graph"}
    stream = lab.generate_stream(tts, TEXT, chunk_size=5, **fixed)
    next(stream)
    stream.close()
    free = kept.kept(tts.t3, ("graph", "off", tuple(attention.FORK_HEADS), 2), kept.Pool)
    assert len(free) == 1
    said = lab.speech_tokens(tts, LONG, **fixed)
    assert torch.equal(said, lab.speech_tokens(tts, LONG, **fixed | {"backend": "static"}))
    assert len(free) == 1
    assert recorder.captures == 2


def test_a_renderer_that_fails_gives_the_graph_back(
    tts: Any, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("no audio today")

    monkeypatch.setattr("chatterbox_lab.engine.stream.Renderer.push", broken)
    with pytest.raises(RuntimeError, match="no audio today") as caught:
        list(lab.generate_stream(tts, TEXT, chunk_size=5, seed=0, max_new_tokens=10, ignore_eos=True, backend="graph"))
    assert caught.tb is not None  # as in a notebook, where the last error's frames stay
    assert len(kept.kept(tts.t3, ("graph", "off", tuple(attention.FORK_HEADS), 2), kept.Pool)) == 1


def test_without_a_seed_the_default_generator_gives_one(tts: Any, recorder: Recorder) -> None:
    said, fixed = [], {"max_new_tokens": 20, "ignore_eos": True, "backend": "graph"}
    for _ in range(2):
        torch.manual_seed(1)
        said += [lab.speech_tokens(tts, TEXT, **fixed) for _ in range(2)]
    assert torch.equal(said[0], said[2])
    assert torch.equal(said[1], said[3])
    assert not torch.equal(said[0], said[1])
    stream = lab.generate_stream(tts, TEXT, **fixed, chunk_size=5, flow_steps=1)
    next(stream)
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    stream.close()
    assert torch.equal(torch.rand(1), expected)  # an application's generator is not set back by a stream that ends


def test_the_host_looks_at_the_tokens_at_a_chunks_end_at_the_latest() -> None:
    looks, said = [], 0
    while said < 60:
        said += decode.steps_ahead(8, 25, said, 60)
        looks.append(said)
    assert looks == [1, 9, 17, 25, 33, 41, 49, 50, 58, 60]


@pytest.mark.parametrize("backend", ["hf", "static"])
def test_what_is_sampled_after_the_stop_token_is_not_said(
    tts: Any, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = tts.t3.speech_head
    stop, often = tts.t3.hp.stop_speech_token, torch.zeros(head.out_features)
    often[stop] = 4.0  # so that the random model stops in the middle of what is launched at once
    monkeypatch.setattr(head, "reachable", lambda logits: type(head).reachable(head, logits) + often, raising=False)
    monkeypatch.setattr(decode, "_AHEAD", 1)
    fixed = {"max_new_tokens": 60, "backend": backend}
    one_by_one = [lab.speech_tokens(tts, TEXT, seed=seed, **fixed) for seed in range(4)]
    assert {len(said) % 8 for said in one_by_one} - {0}
    monkeypatch.setattr(decode, "steps_ahead", lambda ahead, chunk, said, most: min(8, most - said))
    for seed, said in enumerate(one_by_one):
        assert torch.equal(lab.speech_tokens(tts, TEXT, seed=seed, **fixed), said)


@pytest.fixture(scope="module")
def on_gpu() -> Any:
    """The tiny model on a real GPU, where graphs are captured and replayed."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return lab.load("tiny", device="cuda", seed=0, watermark=False)


@pytest.mark.parametrize("mode", ["off", "probe"])
def test_on_a_gpu_backends_say_upstreams_tokens(on_gpu: Any, mode: str) -> None:
    for text, seed, most in (("No.", 1, 5), (TEXT, 0, 60), (LONG, 2, 300), (TEXT, 3, 60)):  # short again, after long
        fixed = {"seed": seed, "max_new_tokens": most, "ignore_eos": True}
        upstream = lab.upstream_tokens(on_gpu, text, **fixed)
        for name in ("hf", "static", "graph"):  # a compiler would take minutes; the ladder of T3 compares it, too
            said = lab.speech_tokens(on_gpu, text, backend=name, analyzer=mode, **fixed)
            assert torch.equal(said, upstream), (name, text)


def test_on_a_gpu_the_guard_and_greedy_decide_as_with_transformers(on_gpu: Any) -> None:
    for changes in ({"guard": True, "analyzer": "probe"}, {"temperature": 0.0}):
        fixed = {"seed": 5, "max_new_tokens": 40, **changes}
        said = [lab.speech_tokens(on_gpu, TEXT, backend=backend, **fixed) for backend in ("hf", "graph")]
        assert torch.equal(*said)


def test_on_a_gpu_a_stream_is_whole_and_the_same_again(on_gpu: Any) -> None:
    for settings in (lab.BALANCED, lab.FAST, lab.FAST.replace(overlap=True, schedule="grow")):
        fixed = {"seed": 0, "max_new_tokens": 70, "ignore_eos": True, "backend": "graph"}
        sounds = [
            torch.cat([audio for audio, _ in lab.generate_stream(on_gpu, TEXT, settings, **fixed)], dim=1)
            for _ in range(2)
        ]
        assert sounds[0].shape == (1, 70 * 960)
        assert torch.allclose(*sounds, atol=1e-3)


def test_on_a_gpu_threads_get_what_they_would_alone(on_gpu: Any) -> None:
    fixed = {"max_new_tokens": 60, "ignore_eos": True, "backend": "graph"}
    lab.warm_up(on_gpu, lab.StreamSettings(backend="graph"))
    alone = [lab.speech_tokens(on_gpu, TEXT, seed=seed, **fixed) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda seed: lab.speech_tokens(on_gpu, TEXT, seed=seed, **fixed), range(4)))
    assert all(map(torch.equal, together, alone))


def test_on_a_gpu_calls_of_all_lengths_leave_the_memory_level(on_gpu: Any) -> None:
    def after_some_calls() -> int:
        for most in (10, 400, 60):
            lab.speech_tokens(on_gpu, TEXT, seed=0, max_new_tokens=most, ignore_eos=True, backend="graph")
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()

    before = [after_some_calls() for _ in range(2)][-1]
    assert [after_some_calls() for _ in range(3)][-1] <= before + 2**20
