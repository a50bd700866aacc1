"""Text tokens to speech tokens: prefill once, then one decode step a token."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import AbstractContextManager, closing
from dataclasses import replace
from functools import partial
from itertools import islice
from threading import Event, Lock

import torch
from chatterbox.models.t3 import T3
from chatterbox.models.t3.modules.cond_enc import T3Cond
from chatterbox.tts import ChatterboxTTS

from ...host import switches_kept
from ...kept import Recent, kept
from ..clock import Ended, StageClock
from ..request import Request
from ..request import conditioning as conditioning
from ..schedule import TOKEN_SECONDS
from ..settings import StreamSettings
from ..variants import STREAMING, Variant
from .alignment import LAST_SOUND, MOST_HELD, Guard
from .backends import BACKENDS, Setup, Span, Stepper, backend_of
from .eager import embed
from .sampling import Sampling
from .words import Account

_AHEAD = 8
"""Decode steps that a GPU is given before the host waits to see whether one of them was the last."""


def token_chunks(
    tts: ChatterboxTTS,
    request: Request,
    clock: StageClock,
    halted: Event | None = None,
    sizes: Iterator[int] | None = None,
) -> Generator[tuple[torch.Tensor, bool], None, None]:
    """The new speech tokens (n,) of each chunk, and whether it is the last; n may be 0 for the last.

    T3's work is stage ``t3`` on the clock, which is also told the words, how many seconds have been decoded, and how
    the speech ended. Once ``halted`` or the request's ``stop`` is set, T3 ends with the token that it is at, and what
    does not fill a chunk is dropped. ``sizes`` are the settings', or go on with those of a text.
    """
    ends = [request.stop] + ([] if halted is None else [halted])
    sizes, said, last = request.settings.chunk_sizes() if sizes is None else sizes, 0, False
    account = Account(request.words, request.text_tokens.shape[1], clock.words, clock.decoded)
    stopped = partial(any_set, ends)
    with closing(tokens(tts, request, account, stopped)) as stream:  # an error must not leave T3 suspended
        while not last:
            size = next(sizes)
            with clock.stage("t3"):
                new = list(islice(stream, size))
                chunk = torch.cat(new) if new else torch.zeros(0, dtype=torch.long)
            if stopped():
                clock.ended = None
                return
            said += len(new)
            last = len(new) < size or said == request.max_new_tokens
            if last:
                account.end("limit", said)  # where that is how it ended, T3 is suspended after its last token
                clock.tell_end(account.ended, 0 if request.settings.ignore_eos else request.max_new_tokens)
                chunk = request.variant.ended(chunk)
            clock.decoded += len(chunk) * TOKEN_SECONDS
            yield chunk, last


def any_set(events: Iterable[Event]) -> bool:
    """Whether one of them is."""
    return any(event.is_set() for event in events)


def tokens(
    tts: ChatterboxTTS, request: Request, account: Account | None = None, stopped: Callable[[], bool] | None = None
) -> Generator[torch.Tensor, None, None]:
    """The speech tokens of a request that are rendered, one at a time (see `decode`).

    They end with the step at which ``stopped``, None for the request's own ``stop``, says so.
    """
    generator = None if request.seed is None else torch.Generator(tts.t3.device).manual_seed(request.seed)
    given, fixed = (request.voice.t3, request.text_tokens, request.settings), {"variant": request.variant}
    fixed |= {"generator": generator, "max_new_tokens": request.max_new_tokens, "account": account}
    fixed["stopped"] = request.stop.is_set if stopped is None else stopped
    stream = decode(tts.t3, *given, **fixed)
    return _without_the_last(stream, request.variant.unsaid) if request.variant.unsaid else stream


def _without_the_last(stream: Generator[torch.Tensor, None, None], count: int) -> Generator[torch.Tensor, None, None]:
    """All but the last of them, of which there are so many; the first in any case."""
    said, waiting = False, deque[torch.Tensor]()
    with closing(stream):
        for token in stream:
            waiting.append(token)
            if len(waiting) > count:
                yield waiting.popleft()
                said = True
    if waiting and not said:
        yield waiting.popleft()


@torch.inference_mode()
def decode(
    t3: T3,
    cond: T3Cond,
    text_tokens: torch.Tensor,
    settings: StreamSettings,
    *,
    generator: torch.Generator | None = None,
    max_new_tokens: int = 1000,
    variant: Variant = STREAMING,
    account: Account | None = None,
    stopped: Callable[[], bool] = bool,
) -> Generator[torch.Tensor, None, None]:
    """Samples speech tokens until the stop token or ``max_new_tokens``.

    Args:
        t3: upstream's token-to-token model.
        cond: its conditioning, on T3's device and in its dtype.
        text_tokens: (2, S), twice the same for classifier-free guidance, or (1, S) without, as `variants.encode` does.
        settings: temperature, guidance, analyzer, guard, backend, weights and ``ignore_eos`` are used; on a GPU also
            the chunk size, at whose end the host looks at the tokens at the latest.
        generator: of the sampling, on T3's device; None is PyTorch's default generator.
        max_new_tokens: the most tokens to sample, the stop token included.
        variant: the kind of model: its sampling, the heads from which alignment is read, what is speech.
        account: is told each step's attention, where it is read, and how the speech ended.
        stopped: is asked after every step whether the speech is no longer wanted.

    Yields:
        One token at a time, int64 (1,), on T3's device; never the stop token or another start token.
    """
    settings = variant.settled(settings)
    embeds, text = prompt(t3, cond, text_tokens, variant.starts)
    guard = Guard(text_tokens.shape[1], settings.rules, not settings.ignore_eos) if settings.guard else None
    start, stop = t3.hp.start_speech_token, t3.hp.stop_speech_token
    end = t3.hp.speech_tokens_dict_size if variant.codes is None else variant.codes
    most = max_new_tokens if guard is None else min(max_new_tokens, guard.most)
    how: Ended = "limit" if most == max_new_tokens else "guard"
    held, given = list[tuple[torch.Tensor | None, torch.Tensor | None]](), 0  # one at most without a guard

    def passed(steps: Iterable[tuple[torch.Tensor | None, torch.Tensor | None]]) -> Iterator[torch.Tensor]:
        nonlocal given
        for token, row in steps:
            if row is not None:
                account.heard(row, given)
            if token is not None:
                given += 1
                yield token

    fixed = {"variant": variant, "generator": generator, "rows": len(text_tokens)}
    with (
        stepper_of(t3, settings, text, embeds.shape[1] + max_new_tokens, **fixed) as stepper,
        closing(_steps(stepper, embeds, text[0], settings, most, (start, stop), guard, account)) as steps,
    ):
        for token, code, row in steps:
            if stopped():
                return
            if code == stop:
                how = "guard" if guard is not None and guard.forces else "stop"
                break
            held.append((token if code != start and code < end else None, row))
            if guard is None or not guard.trailing:
                yield from passed(held)
                held.clear()
            elif len(held) == MOST_HELD:
                break
    if len(held) > LAST_SOUND:
        how = "guard"
    yield from passed(held[:LAST_SOUND])
    if account is not None:
        account.end(how, min(given, max(1, given - variant.unsaid)))


def _steps(
    stepper: Stepper,
    embeds: torch.Tensor,
    voice: int,
    settings: StreamSettings,
    most: int,
    edges: tuple[int, int],
    guard: Guard | None,
    account: Account | None,
) -> Generator[tuple[torch.Tensor, int, torch.Tensor | None], None, None]:
    """Each token (1,) that is sampled, its number, and the attention (text tokens,) behind it for the ``account``.

    ``edges`` are the start and the stop token.
    """
    on_gpu, reads = embeds.device.type == "cuda", account is not None and account.reads
    ahead, said, last = _AHEAD if on_gpu and guard is None else 1, 0, edges[0]
    while said < most:
        picked, rows = [], []
        for _ in range(steps_ahead(ahead, settings.chunk_size, said, most)):
            logits = stepper.step(said) if said else stepper.prefill(embeds, voice)
            attention = stepper.rows if reads or guard is not None else None
            if reads:
                rows.append(attention[-1].clone())  # a graph writes the next step's into the same memory
            if guard is not None:
                logits = guard.led(logits, attention, last, edges[1])
            picked.append(stepper.pick(logits)[0])
            said += 1
        seen = torch.stack(rows).cpu() if reads else [None] * len(picked)
        for token, code, row in zip(picked, torch.cat(picked).tolist(), seen, strict=True):  # waits for the device
            last = code
            yield token, code, row


def steps_ahead(ahead: int, chunk_size: int, said: int, most: int) -> int:
    """Steps to launch before the host looks at the tokens: the first alone, and none beyond the end of a chunk."""
    return min(ahead, chunk_size - said % chunk_size, most - said) if said else 1


def stepper_of(
    t3: T3,
    settings: StreamSettings,
    text: Span,
    capacity: int,
    *,
    variant: Variant = STREAMING,
    generator: torch.Generator | None = None,
    rows: int = 2,
) -> AbstractContextManager[Stepper]:
    """T3 in the settings' backend, for a prompt whose text is at these positions; arguments as for `Setup`."""
    how = Sampling.of(settings, t3.hp.stop_speech_token, variant)
    setup = Setup(t3, settings.analyzer, variant.heads, text, capacity, settings.weights, how, generator, rows)
    return BACKENDS[backend_of(settings, t3)].stepper(setup)


def prompt(t3: T3, cond: T3Cond, text_tokens: torch.Tensor, starts: int = 2) -> tuple[torch.Tensor, Span]:
    """Input embeddings (rows, T, C) of the prefill, and where in it the text tokens are.

    As upstream's ``prepare_input_embeds``: the voice, the text (none in the second row, for CFG), the start token. The
    start token is there twice: upstream feeds it again, and its models were used, its analyzer written, that way. Only
    Turbo has it once.
    """
    rows, voice = len(text_tokens), _voice(t3, cond)
    text = t3.text_emb(text_tokens)
    text[1:].zero_()
    if t3.text_pos_emb is not None:
        text = text + t3.text_pos_emb(text_tokens)
    start = embed(t3, torch.full_like(text_tokens[:1, :1], t3.hp.start_speech_token), 0, rows)
    length = voice.shape[1]
    embeds = torch.cat([voice.expand(rows, -1, -1), text, *[start] * starts], dim=1)
    return embeds, (length, length + text_tokens.shape[1])


@torch.no_grad()
def _voice(t3: T3, cond: T3Cond) -> torch.Tensor:
    """The conditioning's embeddings (1, T, C); those of the last few voices are kept with the model."""
    given = {name: value for name, value in vars(cond).items() if torch.is_tensor(value)}
    recent: Recent = kept(t3, "conditioning", Recent)
    return recent.value(given, lambda: _prepared(t3, cond))


def _prepared(t3: T3, cond: T3Cond) -> torch.Tensor:
    with _one_at_a_time, switches_kept():
        return t3.prepare_conditioning(replace(cond))


_one_at_a_time = Lock()
"""For upstream's Perceiver, which switches SDPA's kernels for the whole process and back."""
