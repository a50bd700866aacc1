"""From the logits of a CFG pair to one speech token, in the release's order, without making the host wait."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers.generation.logits_process import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from ..settings import StreamSettings
from ..variants import STREAMING, Variant


@dataclass(frozen=True)
class Sampling:
    """How to sample; the first two numbers may be float32 tensors (), to be changed under a captured graph."""

    cfg_weight: float | torch.Tensor
    temperature: float | torch.Tensor
    greedy: bool
    never: int | None
    """A token that is not to be sampled."""
    order: tuple[str, ...] = STREAMING.sampling
    """What is done to the logits after guidance: names in `STEPS`."""
    penalty: float = 2.0
    top_p: float = 0.8
    min_p: float = 0.0
    top_k: int = 0
    forgets_start: bool = False
    """Whether the start token pays the penalty in the first step alone."""

    @classmethod
    def of(cls, settings: StreamSettings, stop: int, variant: Variant = STREAMING) -> Sampling:
        """What the settings ask for, of this kind of model; a temperature of 0 is greedy."""
        settings = variant.settled(settings)
        greedy = settings.temperature == 0
        temperature, never = 1.0 if greedy else settings.temperature, stop if settings.ignore_eos else None
        numbers = settings.repetition_penalty, settings.top_p, settings.min_p, settings.top_k
        return cls(settings.cfg_weight, temperature, greedy, never, variant.sampling, *numbers, variant.forgets_start)


def _penalised(logits: torch.Tensor, seen: torch.Tensor, how: Sampling) -> torch.Tensor:
    # as transformers' RepetitionPenaltyLogitsProcessor, with the tokens as a mask, whose size does not change
    return torch.where(seen, torch.where(logits < 0, logits * how.penalty, logits / how.penalty), logits)


def _likeliest(logits: torch.Tensor, seen: torch.Tensor, how: Sampling) -> torch.Tensor:
    return TopPLogitsWarper(how.top_p)(None, logits) if how.top_p < 1 else logits


STEPS: dict[str, Callable[[torch.Tensor, torch.Tensor, Sampling], torch.Tensor]] = {
    "temperature": lambda logits, seen, how: logits / how.temperature,
    "penalty": _penalised,
    "min_p": lambda logits, seen, how: MinPLogitsWarper(how.min_p)(None, logits) if how.min_p else logits,
    "top_p": _likeliest,
    "top_k": lambda logits, seen, how: TopKLogitsWarper(how.top_k)(None, logits) if how.top_k else logits,
}
"""What a release may do to logits (1, V), given which tokens were said before (1, V)."""
_EITHER_WAY = ("temperature", "penalty")  # the others never remove the likeliest token


def sample(
    logits: torch.Tensor, seen: torch.Tensor, how: Sampling, generator: torch.Generator | None = None
) -> torch.Tensor:
    """One token, int64 (1, 1).

    Args:
        logits: (2, V), of the conditional and the unconditional row, or (1, V) without guidance.
        seen: bool (1, V), True for tokens said before; they pay the repetition penalty.
        how: guidance, temperature and what is left out.
        generator: on the device of the logits; None is PyTorch's default generator.
    """
    guided = len(logits) == 2
    logits = logits[:1] + how.cfg_weight * (logits[:1] - logits[1:]) if guided else logits.clone()
    if how.never is not None:
        logits[:, how.never] = -torch.inf
    for step in how.order:
        if not how.greedy or step in _EITHER_WAY:
            logits = STEPS[step](logits, seen, how)
    if how.greedy:
        return logits.argmax(-1, keepdim=True)
    probabilities = logits.softmax(-1)
    # What torch.multinomial does and draws, less its look at the probabilities, for which the host would wait.
    return (probabilities / torch.empty_like(probabilities).exponential_(generator=generator)).argmax(-1, keepdim=True)
