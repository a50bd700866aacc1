"""Conditioning and text to speech tokens, one at a time: prefill once, then one decode step a token."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager

import torch
from chatterbox.models.t3 import T3
from chatterbox.models.t3.modules.cond_enc import T3Cond

from ...files import attribute
from ..linears import head_linear, kept
from ..settings import StreamSettings
from .alignment import AlignmentTracker, guard_logits
from .attention import FORK_HEADS, Attention, Heads
from .compiled import CompiledT3
from .graph import GraphT3, borrowed_graph
from .sampling import Sampling, sample
from .static import StaticT3, token_embedding

_AHEAD = 8
"""Decode steps that a GPU is given before the host waits to see whether one of them was the last."""


class EagerT3:
    """T3 step by step, every operation launched as it comes.

    Args:
        t3: upstream's token-to-token model.
        attend: its transformer, `Attention` or `StaticT3`, with nothing said yet.
        how: guidance, temperature and what is left out.
        generator: of the sampling, on T3's device; None is PyTorch's default generator.
    """

    def __init__(
        self, t3: T3, attend: Attention | StaticT3, how: Sampling, generator: torch.Generator | None = None
    ) -> None:
        self.t3, self.attend, self.how, self.generator = t3, attend, how, generator
        static = isinstance(attend, StaticT3)
        self.head = head_linear(t3.speech_head, attend.weights) if static else t3.speech_head
        self.seen = torch.zeros((1, t3.hp.speech_tokens_dict_size), dtype=torch.bool, device=t3.device)
        self.seen[:, t3.hp.start_speech_token] = True
        self.token: torch.Tensor | None = None

    def say(self, token: torch.Tensor) -> None:
        """Goes on after this token (1, 1) instead of the one picked last."""
        self.token = token

    @property
    def rows(self) -> torch.Tensor | None:
        """Attention to the text (rows, text tokens) of the positions that came last."""
        return self.attend.rows

    def prefill(self, embeds: torch.Tensor, voice: int) -> torch.Tensor:
        """Logits (2, V) after the prompt's embeddings (2, T, C), of which the first are the voice's."""
        static = isinstance(self.attend, StaticT3)
        hidden = self.attend.prefill(embeds, voice) if static else self.attend(embeds)
        return self.t3.speech_head(hidden[:, -1:])[:, -1]

    def step(self, position: int) -> torch.Tensor:
        """Logits (2, V) after the token picked last, whose place among the speech tokens is ``position``."""
        return self.head(self.attend(embed(self.t3, self.token, position)))[:, -1]

    def pick(self, logits: torch.Tensor) -> torch.Tensor:
        """One token (1, 1) sampled from the logits (2, V)."""
        self.token = sample(logits, self.seen, self.how, self.generator)
        self.seen.scatter_(1, self.token, True)
        return self.token


@torch.inference_mode()
def decode(
    t3: T3,
    cond: T3Cond,
    text_tokens: torch.Tensor,
    settings: StreamSettings,
    *,
    generator: torch.Generator | None = None,
    max_new_tokens: int = 1000,
    heads: Heads = FORK_HEADS,
) -> Generator[torch.Tensor, None, None]:
    """Samples speech tokens until the stop token or ``max_new_tokens``.

    Args:
        t3: upstream's token-to-token model.
        cond: its conditioning, on T3's device and in its dtype.
        text_tokens: (2, S), twice the same for classifier-free guidance, with start and stop.
        settings: temperature, guidance, analyzer, guard, backend, weights and ``ignore_eos`` are used; on a GPU also
            the chunk size, at whose end the host looks at the tokens at the latest.
        generator: of the sampling, on T3's device; None is PyTorch's default generator.
        max_new_tokens: the most tokens to sample, the stop token included.
        heads: the (layer, head) pairs from which alignment is read.

    Yields:
        One token at a time, int64 (1,), on T3's device; never the stop token or another start token.
    """
    embeds, text = prompt(t3, cond, text_tokens)
    tracker = AlignmentTracker(text_tokens.shape[1]) if settings.guard else None
    start, stop = t3.hp.start_speech_token, t3.hp.stop_speech_token
    ahead = _AHEAD if t3.device.type == "cuda" and tracker is None else 1
    said = 0
    with stepper_of(t3, settings, text, embeds.shape[1] + max_new_tokens, heads, generator) as stepper:
        while said < max_new_tokens:
            tokens = []
            for _ in range(steps_ahead(ahead, settings.chunk_size, said, max_new_tokens)):
                logits = stepper.step(said) if said else stepper.prefill(embeds, text[0])
                if tracker is not None:
                    alignment = tracker.update(stepper.rows)
                    if not settings.ignore_eos:
                        logits = guard_logits(logits.float(), alignment, stop)
                tokens.append(stepper.pick(logits)[0])
                said += 1
            for token, code in zip(tokens, torch.cat(tokens).tolist(), strict=True):  # waits for the device
                if code == stop:
                    return
                if code != start:
                    yield token


def steps_ahead(ahead: int, chunk_size: int, said: int, most: int) -> int:
    """Steps to launch before the host looks at the tokens: the first alone, and none beyond the end of a chunk."""
    return min(ahead, chunk_size - said % chunk_size, most - said) if said else 1


@contextmanager
def stepper_of(
    t3: T3,
    settings: StreamSettings,
    text: tuple[int, int],
    capacity: int,
    heads: Heads,
    generator: torch.Generator | None = None,
) -> Iterator[EagerT3 | GraphT3]:
    """T3 in the settings' backend, ready for a prompt whose text is at these positions; arguments as `decode`."""
    how = Sampling.of(settings, t3.hp.stop_speech_token)
    mode, weights = settings.analyzer, settings.weights
    if settings.backend == "graph":
        with borrowed_graph(t3, mode, heads, capacity) as graph:
            graph.begin(text, how, generator, capacity)
            try:
                yield graph
            finally:
                graph.end(generator)
        return
    if settings.backend == "hf":
        attend = Attention(t3.tfmr, mode, text, heads)
    else:
        kind = {"static": StaticT3, "compile": CompiledT3}[settings.backend]
        attend = kind(t3.tfmr, mode, text, capacity, heads, weights)
    yield EagerT3(t3, attend, how, generator)


def check_backend(settings: StreamSettings, device: torch.device) -> None:
    """Raises ValueError where the settings ask for what the device does not have."""
    if settings.backend == "graph" and device.type != "cuda":
        raise ValueError(
            f"backend='graph': needs a CUDA device, the model is on {device}; choose 'static' or 'compile'"
        )
    if settings.weights == "int8" and device.type != "cpu":
        raise ValueError(f"weights='int8': is for CPUs, the model is on {device}; load it with dtype='bfloat16'")


def prompt(t3: T3, cond: T3Cond, text_tokens: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int]]:
    """Input embeddings (2, T, C) of the prefill, and where in it the text tokens are."""
    start, voice = torch.full_like(text_tokens[:, :1], t3.hp.start_speech_token), _voice(t3, cond)
    with attribute(t3, "prepare_conditioning", lambda cond: voice):
        embeds, length = t3.prepare_input_embeds(t3_cond=cond, text_tokens=text_tokens, speech_tokens=start)
    # Upstream feeds the start token a second time; its models were used, and its analyzer written, that way.
    embeds = torch.cat([embeds, embed(t3, start[:1], 0)], dim=1)
    return embeds, (length, length + text_tokens.shape[1])


def _voice(t3: T3, cond: T3Cond) -> torch.Tensor:
    """The conditioning's embeddings (1, T, C); those of the last voice are kept with the model."""
    given = {name: value for name, value in vars(cond).items() if torch.is_tensor(value)}
    last: list = kept(t3, "conditioning", list)
    if not last or last[0].keys() != given.keys() or any(not torch.equal(last[0][name], given[name]) for name in given):
        copy = {name: value.clone() for name, value in given.items()}
        last[:] = copy, t3.prepare_conditioning(cond)
    return last[1]


def step_bytes(t3: T3) -> int:
    """Bytes of weights that every decode step reads: layers, last norm and speech head, once for both CFG rows."""
    modules = (t3.tfmr.layers, t3.tfmr.norm, t3.speech_head)
    return sum(weight.numel() * weight.element_size() for module in modules for weight in module.parameters())


def embed(t3: T3, token: torch.Tensor, position: int) -> torch.Tensor:
    """The embedding (2, 1, C) of one speech token for the conditional and the unconditional row."""
    return token_embedding(t3.speech_emb, t3.speech_pos_emb.emb, token, position)
