"""The server of the engine's README, run as it is printed, with clients that listen, come together and leave."""

from __future__ import annotations

import io
import re
import socket
import wave
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from threading import Barrier, Event, Lock, Thread
from threading import enumerate as running_threads
from typing import Any

import httpx
import pytest
import uvicorn
from conftest import TEXT
from websockets.sync.client import connect

import chatterbox_lab as lab
from chatterbox_lab.engine.t3 import eager
from chatterbox_lab.files import REPOSITORY
from chatterbox_lab.speech import speak as spoken
from chatterbox_lab.speech.speak import speak

README = REPOSITORY / "chatterbox_lab" / "engine" / "README.md"
CHUNK, MOST = 5, 12
SETTINGS = lab.FAST.replace(chunk_size=CHUNK, flow_steps=1, ignore_eos=True)
HEADER = 44
PATIENCE = 20.0
"""Seconds until a test fails that waits for what does not come."""


class Steps:
    """T3's decode steps, counted; in some of them the model does what a test wants first."""

    def __init__(self) -> None:
        self.count, self.lock = 0, Lock()
        self.before: dict[int, Callable[[], object]] = {}
        self.sample = eager.sample

    def __call__(self, *args: Any) -> Any:
        with self.lock:
            self.count += 1
            first = self.before.get(self.count)
        if first is not None:
            first()
        return self.sample(*args)


@dataclass
class Watched:
    """A stream that the server has begun."""

    stop: Event
    ended: Event = field(default_factory=Event)

    def passing(self, chunks: Iterator[Any]) -> Generator[Any, None, None]:
        try:
            yield from chunks
        finally:
            self.ended.set()


@dataclass
class Served:
    """The running server, and what it has the model do."""

    address: str
    server: uvicorn.Server
    steps: Steps
    streams: list[Watched]


def section() -> str:
    return README.read_text().partition("## Serve it\n")[2].partition("\n## ")[0]


@pytest.fixture
def served(tts: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Iterator[Served]:
    """The README's server, in short chunks; the test fails if it logs an error or leaves a thread behind."""
    threads, streams = set(running_threads()), []
    scope: dict[str, Any] = {}
    with monkeypatch.context() as patch:
        patch.setattr("chatterbox_lab.voices.load.load", lambda *_, **__: tts)
        (server_py,) = re.findall(r"^```python\n(.*?)^```", section(), re.DOTALL | re.MULTILINE)
        exec(server_py, scope)
    scope["SETTINGS"] = SETTINGS

    def watched(*args: Any, stop: Event, **kwargs: Any) -> Iterator[Any]:
        chunks = speak(*args, stop=stop, max_new_tokens=MOST, **kwargs)
        streams.append(Watched(stop))
        return streams[-1].passing(chunks)

    steps = Steps()
    monkeypatch.setattr(spoken, "speak", watched)
    monkeypatch.setattr(eager, "sample", steps)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(scope["app"], log_config=None))
        running = Thread(target=server.run, kwargs={"sockets": [listener]})
        running.start()  # the socket listens already: clients wait until the server answers
        yield Served(f"127.0.0.1:{listener.getsockname()[1]}", server, steps, streams)
        server.should_exit = True
        running.join(PATIENCE)
    assert not running.is_alive()
    assert set(running_threads()) <= threads
    assert all(begun.ended.is_set() for begun in streams)
    assert not [record.getMessage() for record in caplog.get_records("call") if record.levelname == "ERROR"]


Client = Callable[..., AbstractContextManager[Iterator[bytes]]]


@contextmanager
def http(address: str, text: str = TEXT, seed: int = 0) -> Iterator[Iterator[bytes]]:
    """The body as it comes; the connection is closed at the end, whatever is still to come."""
    query = {"text": text, "seed": seed}
    with httpx.stream("GET", f"http://{address}/speak", params=query, timeout=2 * PATIENCE, trust_env=False) as answer:
        assert (answer.status_code, answer.headers["content-type"]) == (200, "audio/wav")
        yield answer.iter_raw()


@contextmanager
def websocket(address: str, text: str = TEXT, seed: int = 0) -> Iterator[Iterator[bytes]]:
    """The binary messages of one text; the connection is closed in WebSocket's way at the end."""
    with connect(f"ws://{address}/ws?seed={seed}", proxy=None) as client:
        client.send(text)
        yield iter(lambda: client.recv(timeout=2 * PATIENCE), "end")


@contextmanager
def lost_websocket(address: str) -> Iterator[Iterator[bytes]]:
    """As `websocket`, with a connection that ends without a word."""
    with connect(f"ws://{address}/ws", proxy=None) as client:
        client.send(TEXT)
        yield iter(client)
        client.socket.shutdown(socket.SHUT_RDWR)


def alone(tts: Any, text: str = TEXT, seed: int = 0) -> list[bytes]:
    """The samples of each chunk, without a server."""
    chunks = speak(tts, text, SETTINGS, seed=seed, max_new_tokens=MOST)
    return [lab.pcm16(audio).tobytes() for audio, _ in chunks]


def heard(client: Client, address: str, text: str = TEXT, seed: int = 0) -> bytes:
    """All samples that a client gets."""
    with client(address, text, seed) as parts:
        return b"".join(parts)[HEADER if client is http else 0 :]


both = pytest.mark.parametrize("client", [http, websocket])


def test_a_file_is_announced_as_what_follows(tts: Any, served: Served) -> None:
    expected = alone(tts)
    with http(served.address) as parts:
        body = b"".join(parts)
    assert body[HEADER:] == b"".join(expected)
    endless = (2**32 - 1).to_bytes(4, "little")
    assert (body[:4], body[4:8], body[8:16]) == (b"RIFF", endless, b"WAVEfmt ")
    assert (body[36:40], body[40:HEADER]) == (b"data", endless)
    with wave.open(io.BytesIO(body)) as file:
        assert (file.getnchannels(), file.getsampwidth(), file.getframerate()) == (1, 2, tts.sr)
        assert file.readframes(len(body)) == body[HEADER:]


def test_every_chunk_is_a_message_and_further_texts_may_follow_at_once(tts: Any, served: Served) -> None:
    texts = [TEXT, "And more."]
    with connect(f"ws://{served.address}/ws", proxy=None) as client:
        for text in texts:
            client.send(text)
        for text in texts:
            assert list(iter(lambda: client.recv(timeout=PATIENCE), "end")) == alone(tts, text)


@both
def test_the_first_chunk_arrives_before_the_second_is_made(tts: Any, served: Served, client: Client) -> None:
    expected, arrived, waited = alone(tts), Event(), []
    served.steps.before[served.steps.count + CHUNK + 1] = lambda: waited.append(arrived.wait(PATIENCE))
    wanted, body = len(expected[0]) + (HEADER if client is http else 0), b""
    with client(served.address) as parts:
        while len(body) < wanted:
            body += next(parts)
        arrived.set()
        body += b"".join(parts)
    assert waited == [True]
    assert body.endswith(b"".join(expected))


@pytest.mark.parametrize("client", [http, websocket, lost_websocket])
def test_a_client_that_leaves_stops_the_model_in_the_midst_of_a_chunk(tts: Any, served: Served, client: Client) -> None:
    midst, noticed = Event(), []
    served.steps.before[3] = lambda: (midst.set(), noticed.append(served.streams[0].stop.wait(PATIENCE)))
    with client(served.address):
        assert midst.wait(PATIENCE)
    assert served.streams[0].ended.wait(2 * PATIENCE)
    assert noticed == [True]
    assert served.steps.count == 3  # the token that it was at, of a chunk of five
    assert heard(http, served.address) == b"".join(alone(tts))


@both
def test_a_server_that_is_told_to_end_stops_the_model(
    served: Served, client: Client, caplog: pytest.LogCaptureFixture
) -> None:
    midst, noticed = Event(), []
    served.steps.before[3] = lambda: (midst.set(), noticed.append(served.streams[0].stop.wait(PATIENCE)))
    with client(served.address):
        assert midst.wait(PATIENCE)
        served.server.config.timeout_graceful_shutdown = 1
        served.server.should_exit = True
        assert served.streams[0].ended.wait(2 * PATIENCE)
    assert noticed == [True]
    assert served.steps.count == 3
    caplog.clear()  # uvicorn calls it an error that a client had not got all


def test_a_client_that_leaves_between_two_texts_leaves_nothing_behind(tts: Any, served: Served) -> None:
    assert heard(websocket, served.address) == b"".join(alone(tts))
    with connect(f"ws://{served.address}/ws", proxy=None):
        pass


@pytest.mark.parametrize("clients", [(http, http), (websocket, http)])
def test_clients_at_once_each_get_what_they_would_get_alone(
    tts: Any, served: Served, clients: tuple[Client, Client]
) -> None:
    wishes = [(TEXT, 1), ("Something else is said here.", 2)]
    expected = [b"".join(alone(tts, *wish)) for wish in wishes]
    together, begun = Barrier(2), served.steps.count
    for step in range(2 * MOST):  # no token of one without a token of the other
        served.steps.before[begun + step + 1] = lambda: together.wait(PATIENCE)
    with ThreadPoolExecutor(2) as pool:
        got = [
            pool.submit(heard, *given, *wish)
            for *given, wish in zip(clients, 2 * [served.address], wishes, strict=True)
        ]
        assert [future.result() for future in got] == expected
    assert served.steps.count == begun + 2 * MOST


def test_what_cannot_be_said_is_a_bad_request(served: Served) -> None:
    for query, says in (
        ({"text": " "}, "text=' ': must be a string with something to say"),
        ({}, "text='': must be a string with something to say"),
        ({"text": TEXT, "seed": "-1"}, "seed=-1: must be a whole number"),
        ({"text": TEXT, "seed": "one"}, "'one'"),
        ({"text": "..."}, "text='...': must be a string with something to say"),
    ):
        answer = httpx.get(f"http://{served.address}/speak", params=query, trust_env=False, timeout=PATIENCE)
        assert answer.status_code == 400
        assert says in answer.text
    assert served.steps.count == 0


def test_what_cannot_be_said_is_an_error_message_and_the_talk_goes_on(tts: Any, served: Served) -> None:
    with connect(f"ws://{served.address}/ws", proxy=None) as client:
        for nothing in (" ", b"bytes"):
            client.send(nothing)
            assert re.match(r"error: text=.* must be a string", client.recv(timeout=PATIENCE))
        assert served.steps.count == 0
        client.send(TEXT)
        assert list(iter(lambda: client.recv(timeout=PATIENCE), "end")) == alone(tts)
