from __future__ import annotations

import gc
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch
from conftest import TEXT

import chatterbox_lab as lab
from chatterbox_lab.host import apart, building, switches_kept, without_cudnns_attention


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def default_device(device: str) -> Iterator[None]:
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


HOSTS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "meta": lambda: default_device("meta"),
    "meta context": lambda: torch.device("meta"),
    "gradients": torch.enable_grad,
    "no gradients": torch.no_grad,
    "inference mode": torch.inference_mode,
    "deterministic": deterministic,
}
WAYS = {
    "plain": {},
    "transformers": {"backend": "hf", "analyzer": "stock"},
    "guarded": {"backend": "hf", "analyzer": "probe", "guard": True},
    "layer": {"analyzer": "layer"},
    "int8": {"weights": "int8", "analyzer": "probe"},
    "fast": {"flow": "cached", "flow_dtype": "bfloat16", "prompt_tokens": 5},
    "overlapped": {"overlap": True},
    "growing": {"schedule": "grow"},
}
FIXED = {"seed": 0, "ignore_eos": True, "flow_steps": 2, "chunk_size": 4, "max_new_tokens": 10}


def state() -> tuple[Any, ...]:
    """All that an application may have set, for this thread and the process."""
    new = torch.empty(0)
    return (
        (new.dtype, new.device, torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_num_threads()),
        (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")),
        (torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision()),
        (torch.backends.cuda.math_sdp_enabled(), torch.backends.cuda.flash_sdp_enabled()),
        (torch.backends.cuda.mem_efficient_sdp_enabled(), torch.backends.cuda.cudnn_sdp_enabled()),
    )


@pytest.fixture
def one_thread() -> Iterator[None]:
    """With more, sums are cut elsewhere in an overlapped stage, and round otherwise."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def streamed(tts: Any, way: str) -> torch.Tensor:
    """The audio of a stream; between its chunks the application finds its own ways."""
    parts, before = [], state()
    for audio, _ in lab.generate_stream(tts, TEXT, **(FIXED | WAYS[way])):
        assert state() == before
        parts.append(audio)
    return torch.cat(parts, dim=1)


@pytest.fixture(scope="module")
def alone(voice: Any) -> dict[str, torch.Tensor]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found = {way: streamed(voice, way) for way in WAYS}
    torch.set_num_threads(threads)
    return found


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("way", WAYS)
def test_a_stream_is_the_same_in_every_host_and_leaves_it_as_it_was(
    tts: Any, one_thread: None, alone: dict[str, torch.Tensor], host: str, way: str
) -> None:
    with HOSTS[host]():
        before = state()
        audio = streamed(tts, way)
        assert state() == before
    assert audio.dtype == torch.float32
    assert torch.equal(audio, alone[way])


@pytest.mark.parametrize("host", HOSTS)
def test_everything_else_is_the_same_in_every_host(tts: Any, one_thread: None, host: str) -> None:
    def made() -> list[torch.Tensor]:
        few = {"seed": 0, "max_new_tokens": 5, "ignore_eos": True, "flow_steps": 1}
        lab.forget(tts)
        lab.warm_up(tts, flow_steps=1, chunk_size=3, context_window=3)
        found = [lab.generate(tts, TEXT, **few), lab.speech_tokens(tts, TEXT, **few)]
        with lab.patch(tts, flow_steps=1, ignore_eos=True):
            patched = tts.generate_stream(TEXT, chunk_size=4, print_metrics=False, seed=0, max_new_tokens=5)
            found += [audio for audio, _ in patched]
        return found

    expected = made()
    with HOSTS[host]():
        before = state()
        found = made()
        assert state() == before
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("host", HOSTS)
def test_a_model_and_a_voice_are_the_same_in_every_host(host: str) -> None:
    samples = torch.rand(48000, generator=torch.Generator().manual_seed(0)).numpy() - 0.5

    def made() -> list[torch.Tensor]:
        tts = lab.load("tiny", device="cpu", seed=0)
        with pytest.warns(UserWarning, match="only 2.0 s"):
            tts.prepare_conditionals((samples, 24000))
        parts = [*tts.t3.state_dict().values(), *tts.s3gen.state_dict().values(), *tts.ve.state_dict().values()]
        voice = [value for value in (*vars(tts.conds.t3).values(), *tts.conds.gen.values()) if torch.is_tensor(value)]
        return parts + voice

    expected = made()
    with HOSTS[host]():
        before = state()
        found = made()
        assert state() == before
        assert not any(tensor.requires_grad and tensor.grad_fn is not None for tensor in found)
    for one, other in zip(found, expected, strict=True):
        assert (one.dtype, one.device) == (other.dtype, other.device)
        assert torch.equal(one, other)


@pytest.mark.parametrize("overlap", [False, True])
def test_another_number_of_threads_between_two_chunks_stays(tts: Any, overlap: bool) -> None:
    before, seen = torch.get_num_threads(), []
    try:
        torch.set_num_threads(4)
        for number, _ in enumerate(lab.generate_stream(tts, TEXT, **FIXED, overlap=overlap)):
            torch.set_num_threads(3 + number)
            later = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
            later.start()
            later.join()
        assert torch.get_num_threads() == 3 + number
        assert seen == [3 + n for n in range(number + 1)]
        later = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
        later.start()
        later.join()
        assert seen[-1] == 3 + number
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("wanted", [True, False])
def test_cudnns_attention_is_back_when_the_last_thread_has_left(wanted: bool) -> None:
    enabled = torch.backends.cuda.cudnn_sdp_enabled
    before = enabled()
    torch.backends.cuda.enable_cudnn_sdp(wanted)
    try:
        first, second = without_cudnns_attention(), without_cudnns_attention()
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)  # as threads do: the first to come is the first to go
        assert not enabled()
        second.__exit__(None, None, None)
        assert enabled() == wanted
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def with_a_graph() -> list[torch.Tensor]:
    gc.collect()
    return [item for item in gc.get_objects() if type(item) is torch.Tensor and item.grad_fn is not None]


def test_nothing_that_was_made_keeps_a_graph(voice: Any) -> None:
    """Whatever runs a network: an application in gradient mode would keep every result's whole history."""
    tts = lab.load("tiny", device="cpu", seed=0)
    before = {id(tensor) for tensor in with_a_graph()}  # other tests train
    samples = torch.rand(48000, generator=torch.Generator().manual_seed(0)).numpy() - 0.5
    few = {"max_new_tokens": 5, "ignore_eos": True, "flow_steps": 1}
    with torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tts.prepare_conditionals((samples, 24000))
        made = [[lab.generate(tts, TEXT, **few), lab.speech_tokens(tts, TEXT, **few), tts.conds]]
        for way in WAYS.values():
            made.append(list(lab.generate_stream(tts, TEXT, chunk_size=3, **few | way)))
        with lab.patch(tts, flow_steps=1, ignore_eos=True):
            tts.prepare_conditionals((samples, 16000))
            made.append(list(tts.generate_stream(TEXT, (samples, 8000), max_new_tokens=5, print_metrics=False)))
            made.append([tts.generate(TEXT, (samples, 22050), max_new_tokens=5)])
        lab.warm_up(tts, flow_steps=1, chunk_size=3, context_window=3)
        made.append(list(lab.upstream_stream(tts, TEXT, chunk_size=3, max_new_tokens=3, seed=0)))
        made.append([lab.upstream_tokens(tts, TEXT, max_new_tokens=3)])
    found = [tensor for tensor in with_a_graph() if id(tensor) not in before]
    assert len(made) == len(WAYS) + 5
    assert not found, [(tensor.shape, tensor.grad_fn) for tensor in found[:5]]


def test_builders_at_once_leave_the_default_dtype_and_a_stream_alone(tts: Any, one_thread: None) -> None:
    expected = streamed(tts, "plain")
    with default_dtype(torch.float64):
        first, second = building(), building()
        first.__enter__()
        chunks = lab.generate_stream(tts, TEXT, **FIXED)
        parts = [next(chunks)[0]]
        second.__enter__()
        first.__exit__(None, None, None)
        assert torch.get_default_dtype() == torch.float32
        with apart("cpu"):
            second.__exit__(None, None, None)  # in another thread, in the midst of this one's chunk
            assert torch.zeros(1).dtype == torch.float32
        assert torch.get_default_dtype() == torch.float64
        parts += [audio for audio, _ in chunks]
    assert torch.equal(torch.cat(parts, dim=1), expected)


def test_the_perceivers_switches_do_not_outlive_it() -> None:
    enabled, before = torch.backends.cuda.cudnn_sdp_enabled, torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(True)
    try:
        inside = without_cudnns_attention()
        inside.__enter__()
        with switches_kept(), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            inside.__exit__(None, None, None)  # another thread leaves before it
        assert enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def test_overlapped_streams_in_new_threads_leave_the_number_of_threads(tts: Any) -> None:
    before, seen = torch.get_num_threads(), []

    def in_a_thread(work: Callable[[], Any]) -> None:
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()

    def speaks() -> None:
        for _ in range(3):
            in_a_thread(lambda: list(lab.generate_stream(tts, "Hi.", **FIXED, overlap=True)))

    try:
        torch.set_num_threads(2)
        clients = [threading.Thread(target=speaks) for _ in range(4)]
        for client in clients:
            client.start()
        for client in clients:
            client.join()
        in_a_thread(lambda: seen.append(torch.get_num_threads()))
        assert seen == [2]
    finally:
        torch.set_num_threads(before)
