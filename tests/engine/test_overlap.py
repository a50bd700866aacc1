from __future__ import annotations

import _thread
import gc
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, nullcontext
from threading import Event
from typing import Any

import pytest
import torch

from chatterbox_lab.engine.clock import StageClock
from chatterbox_lab.engine.overlap import own_share, pipelined


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


class Source:
    """Counts up; remembers how far it came, and whether and where it was closed."""

    def __init__(self, count: int = 10, fails_at: int | None = None) -> None:
        self.count, self.fails_at = count, fails_at
        self.made = 0
        self.closed_in: str | None = None

    def __call__(self, halted: Event) -> Generator[int, None, None]:
        try:
            for number in range(self.count):
                if number == self.fails_at:
                    raise ValueError(f"source at {number}")
                self.made += 1
                yield number
        finally:
            self.closed_in = threading.current_thread().name


def run(source: Source, *stages: Callable[[Any], Any], **rest: Any) -> Generator[Any, None, None]:
    return pipelined(source, *stages, inside=lambda number: nullcontext(), **rest)


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_items_pass_all_stages_in_order() -> None:
    stages = lambda x: x + 1, lambda x: 10 * x
    expected = [10 * (number + 1) for number in range(10)]
    assert list(run(Source(), *stages)) == expected


def test_the_first_item_does_not_wait_for_the_second() -> None:
    second = Event()

    def slow(number: int) -> int:
        if number == 1:
            assert second.wait(60)
        return number

    items = run(Source(2), slow)
    assert next(items) == 0
    second.set()
    assert list(items) == [1]


def test_work_runs_ahead_but_by_a_bounded_amount() -> None:
    source, rendered = Source(100), []
    items = run(source, lambda x: rendered.append(x) or x, ahead=1)
    assert next(items) == 0
    until(lambda: len(rendered) == 4)  # the one that was taken, one for each thread, one that waits
    time.sleep(0.2)
    assert (source.made, len(rendered)) == (4, 4)
    items.close()
    assert source.closed_in == "chatterbox_lab-0"


def test_an_error_comes_after_what_was_there_before() -> None:
    def failing(number: int) -> int:
        if number == 3:
            raise KeyError("three")
        return number

    for stages in ([failing], [failing, abs], [abs, failing]):
        seen = []
        with pytest.raises(KeyError, match="three") as found:
            seen.extend(run(Source(), *stages))
        assert seen == [0, 1, 2]
        assert any(entry.name == "failing" for entry in found.traceback)
    seen = []
    source = Source(fails_at=2)
    with pytest.raises(ValueError, match="source at 2"):
        seen.extend(run(source, abs))
    assert source.made == 2


def test_no_stage_begins_another_item_once_it_is_not_wanted() -> None:
    begun, at_work, go = [], Event(), Event()

    def slow(number: int) -> int:
        begun.append(number)
        if number == 1:
            at_work.set()
            assert go.wait(60)
        return number

    items = run(Source(100), slow, abs)
    assert next(items) == 0
    assert at_work.wait(60)
    closing = threading.Thread(target=items.close)
    closing.start()
    time.sleep(0.05)
    go.set()
    closing.join(60)
    assert begun == [0, 1]


def test_a_context_that_fails_is_the_error_that_is_raised() -> None:
    @contextmanager
    def inside(number: int) -> Iterator[None]:
        if number == 1:
            raise MemoryError("no stream")
        yield

    with pytest.raises(MemoryError, match="no stream"):
        list(pipelined(Source(3), abs, abs, inside=inside))


@pytest.mark.parametrize("error", [KeyboardInterrupt, GeneratorExit, RuntimeError])
def test_leaving_early_stops_everything_and_closes_the_source_in_its_thread(error: type[BaseException]) -> None:
    source = Source(10**9)
    items = run(source, abs, abs)
    next(items)
    with pytest.raises(error):
        items.throw(error)
    assert source.closed_in == "chatterbox_lab-0"


def test_an_interrupt_while_waiting_stops_everything() -> None:
    def interrupting(number: int) -> int:
        if number == 2:
            until(lambda: len(seen) == 2)
            _thread.interrupt_main()
            time.sleep(0.1)
        return number

    source, seen = Source(10**9), []
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        with pytest.raises(KeyboardInterrupt):
            seen.extend(run(source, interrupting))
    finally:
        signal.signal(signal.SIGINT, before)
    assert seen == [0, 1]
    assert source.closed_in == "chatterbox_lab-0"


def test_one_that_is_forgotten_may_be_collected_in_its_own_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    forgotten, unraisable = Event(), []
    monkeypatch.setattr("sys.unraisablehook", unraisable.append)

    def collecting(number: int) -> int:
        if number == 1:
            assert forgotten.wait(60)
            gc.collect()
        return number

    source = Source(10**9)
    items = run(source, collecting)
    next(items)
    cycle: list[Any] = [items]
    cycle.append(cycle)
    gc.disable()
    try:
        del items, cycle
        forgotten.set()
        until(lambda: not any(thread.name.startswith("chatterbox_lab-") for thread in threading.enumerate()))
    finally:
        gc.enable()
    assert source.closed_in == "chatterbox_lab-0"
    assert not unraisable


def test_a_source_at_work_sees_that_it_is_not_wanted() -> None:
    waited: list[bool] = []
    at_work = Event()

    def source(halted: Event) -> Generator[int, None, None]:
        yield 0
        at_work.set()
        waited.append(halted.wait(60))

    items = run(source)
    next(items)
    assert at_work.wait(60)
    items.close()
    assert waited == [True]


def test_each_thread_has_its_context() -> None:
    entered: dict[int, str] = {}
    left = []

    @contextmanager
    def inside(number: int) -> Iterator[None]:
        entered[number] = threading.current_thread().name
        yield
        left.append(number)

    assert list(pipelined(Source(3), abs, abs, inside=inside)) == [0, 1, 2]
    assert entered == {number: f"chatterbox_lab-{number}" for number in range(3)}
    assert sorted(left) == [0, 1, 2]


def test_a_share_of_pytorchs_threads_is_given_back() -> None:
    before, seen = torch.get_num_threads(), []

    def inside(number: int) -> Any:
        return own_share(torch.device("cpu"), number + 1)

    def stage(number: int) -> int:
        seen.append(torch.get_num_threads())
        return number

    list(pipelined(Source(2), stage, inside=inside))
    assert seen == [2, 2]
    assert torch.get_num_threads() == before
    later: list[int] = []
    thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert later == [before]


def test_on_a_gpu_a_thread_has_a_stream_and_its_clock_waits_for_that_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    device, calls = torch.device("cuda", 0), []

    class Stream:
        def __init__(self, where: torch.device) -> None:
            calls.append(("made", where))

        def synchronize(self) -> None:
            calls.append(("waited", self))

    @contextmanager
    def entered(stream: Stream) -> Iterator[None]:
        monkeypatch.setattr(torch.cuda, "current_stream", lambda _: stream)
        yield
        calls.append(("left", stream))

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", entered)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: calls.append(("waited for all", None)))
    threads = torch.get_num_threads()
    with own_share(device, 1):
        stream = torch.cuda.current_stream(device)
        with StageClock(device, whole=False).stage("t3"):
            pass
    assert calls == [("made", device), ("waited", stream), ("waited", stream), ("left", stream)]
    assert torch.get_num_threads() == threads
