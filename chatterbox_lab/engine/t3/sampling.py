"""From the logits of a CFG pair to one speech token, in upstream's order, without making the host wait."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers.generation.logits_process import TopPLogitsWarper

from ..settings import StreamSettings

TOP_P = 0.8  # both fixed in chatterbox-streaming (tts.py, inference_stream)
REPETITION_PENALTY = 2.0


@dataclass(frozen=True)
class Sampling:
    """How to sample; the two numbers may be float32 tensors (), to be changed under a captured graph."""

    cfg_weight: float | torch.Tensor
    temperature: float | torch.Tensor
    greedy: bool
    never: int | None
    """A token that is not to be sampled."""

    @classmethod
    def of(cls, settings: StreamSettings, stop: int) -> Sampling:
        """What the settings ask for; a temperature of 0 is greedy."""
        greedy = settings.temperature == 0
        temperature = 1.0 if greedy else settings.temperature
        return cls(settings.cfg_weight, temperature, greedy, stop if settings.ignore_eos else None)


def sample(
    logits: torch.Tensor, seen: torch.Tensor, how: Sampling, generator: torch.Generator | None = None
) -> torch.Tensor:
    """One token, int64 (1, 1).

    Args:
        logits: (2, V), of the conditional and the unconditional row.
        seen: bool (1, V), True for tokens said before; they pay the repetition penalty.
        how: guidance, temperature and what is left out.
        generator: on the device of the logits; None is PyTorch's default generator.
    """
    logits = logits[:1] + how.cfg_weight * (logits[:1] - logits[1:])
    if how.never is not None:
        logits[:, how.never] = -torch.inf
    logits = logits / how.temperature
    # as transformers' RepetitionPenaltyLogitsProcessor, with the tokens as a mask, whose size does not change
    penalised = torch.where(logits < 0, logits * REPETITION_PENALTY, logits / REPETITION_PENALTY)
    logits = torch.where(seen, penalised, logits)
    if how.greedy:
        return logits.argmax(-1, keepdim=True)
    probabilities = TopPLogitsWarper(TOP_P)(None, logits).softmax(-1)
    # What torch.multinomial does and draws, less its look at the probabilities, for which the host would wait.
    return (probabilities / torch.empty_like(probabilities).exponential_(generator=generator)).argmax(-1, keepdim=True)
