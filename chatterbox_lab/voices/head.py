"""A speech head for random weights, which have not learned which codes exist."""

from __future__ import annotations

import torch
from chatterbox.models.s3tokenizer import SPEECH_VOCAB_SIZE
from chatterbox.models.t3.modules.t3_config import T3Config

_STOP = T3Config().stop_speech_token
NEVER = -1.0e4  # a logit that no sampling reaches; finite, because CFG subtracts logits and inf - inf is nan


class FlowCodesHead(torch.nn.Linear):
    """A speech head for random weights: of its 8194 outputs only the flow's codes and stop can be sampled.

    A trained head has learned that; a random one emits other codes about one time in five, and the flow has no
    embedding for them.
    """

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits (..., 8194) with the codes that the flow cannot take out of reach."""
        return self.reachable(super().forward(hidden))

    def reachable(self, logits: torch.Tensor) -> torch.Tensor:
        """The logits, changed in place."""
        logits[..., _STOP + 1 :] = NEVER
        logits[..., SPEECH_VOCAB_SIZE:_STOP] = NEVER
        return logits
