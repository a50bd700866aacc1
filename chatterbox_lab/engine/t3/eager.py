"""T3 step by step, every operation launched as it comes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from .backends import Setup
from .sampling import sample


class Attends(Protocol):
    """T3's transformer with all that was said before, such as `Attention` and `StaticT3`."""

    rows: torch.Tensor | None

    def prefill(self, embeds: torch.Tensor, voice: int) -> torch.Tensor:
        """Hidden states (rows, T, C), at least of the last position, of a prompt's embeddings (rows, T, C)."""

    def __call__(self, embeds: torch.Tensor) -> torch.Tensor:
        """Hidden states (rows, T, C) of the embeddings (rows, T, C) that follow."""


class EagerT3:
    """The `Stepper` of every backend that launches its operations one by one.

    Args:
        setup: of the call.
        attend: T3's transformer, with nothing said yet.
        head: logits (rows, T, V) of hidden states (rows, T, C), for decode steps.
    """

    def __init__(self, setup: Setup, attend: Attends, head: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.t3, self.how, self.generator, self.batch = setup.t3, setup.how, setup.generator, setup.rows
        self.attend, self.head = attend, head
        self.seen = torch.zeros((1, self.t3.hp.speech_tokens_dict_size), dtype=torch.bool, device=self.t3.device)
        self.seen[:, self.t3.hp.start_speech_token] = True
        self.token: torch.Tensor | None = None

    @property
    def rows(self) -> torch.Tensor | None:
        """As `Stepper.rows`."""
        return self.attend.rows

    def prefill(self, embeds: torch.Tensor, voice: int) -> torch.Tensor:
        """As `Stepper.prefill`."""
        return self.t3.speech_head(self.attend.prefill(embeds, voice)[:, -1:])[:, -1]

    def step(self, position: int) -> torch.Tensor:
        """As `Stepper.step`."""
        if position == 1 and self.how.forgets_start:
            self.seen.zero_().scatter_(1, self.token, True)
        return self.head(self.attend(embed(self.t3, self.token, position, self.batch)))[:, -1]

    def pick(self, logits: torch.Tensor) -> torch.Tensor:
        """As `Stepper.pick`."""
        self.token = sample(logits, self.seen, self.how, self.generator)
        self.seen.scatter_(1, self.token, True)
        return self.token

    def say(self, token: torch.Tensor) -> None:
        """As `Stepper.say`."""
        self.token = token


def embed(t3: torch.nn.Module, token: torch.Tensor, position: int, rows: int = 2) -> torch.Tensor:
    """The embedding (rows, 1, C) of one speech token (1, 1), the same for the conditional and the unconditional row."""
    return token_embedding(*embeddings(t3), token, position, rows)


def embeddings(t3: torch.nn.Module) -> tuple[torch.nn.Embedding, torch.nn.Embedding | None]:
    """T3's embeddings of speech tokens, and of their places; None where the transformer has the places."""
    return t3.speech_emb, None if t3.speech_pos_emb is None else t3.speech_pos_emb.emb


def token_embedding(
    words: torch.nn.Embedding,
    places: torch.nn.Embedding | None,
    token: torch.Tensor,
    position: int | torch.Tensor,
    rows: int,
) -> torch.Tensor:
    """The embedding (rows, 1, C) of a speech token (1, 1) at its place, an int or int64 (1,)."""
    found = words(token) if places is None else words(token) + places.weight[position]
    return found.expand(rows, -1, -1)
