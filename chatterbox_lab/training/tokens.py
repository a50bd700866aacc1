"""Speech tokens: which phones a token's two mel frames belong to, and how high the voice is.

Chatterbox's own tokens come from a recogniser's encoder, so they say what is spoken. These say it by name: token =
(first frame's phone * phones + second frame's phone) * 3 + level. That is 5,043 of the 6,561 codes. Because they are
read off the teacher's phone times, no network is needed, and so the voice cannot take over another one's speech.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from .corpus import Utterance, steady
from .phones import PHONES

LEVELS = 3  # of pitch: low or unvoiced, middle, high
CODES = len(PHONES) ** 2 * LEVELS
THRESHOLDS = (96.0, 107.0)  # Hz: thirds of the teacher's voiced frames, measured on the corpus


def codes(item: Utterance) -> np.ndarray:
    """The utterance's speech tokens, (frames / 2,) int64."""
    phones = item.phones.astype(np.int64).reshape(-1, 2)
    pitch = steady(item.pitch).reshape(-1, 2)
    voiced = pitch > 0
    mean = np.where(voiced.any(1), pitch.sum(1) / np.maximum(voiced.sum(1), 1), 0)
    return (phones[:, 0] * len(PHONES) + phones[:, 1]) * LEVELS + np.digitize(mean, THRESHOLDS)


def parts(code: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """First phone, second phone and pitch level of each code; codes that mean nothing read as the highest there is."""
    code = code.clamp(0, CODES - 1)
    pair = code // LEVELS
    return pair // len(PHONES), pair % len(PHONES), code % LEVELS


class CodeEmbedding(torch.nn.Module):
    """Vectors of the codes as sums of their parts' vectors, so that a rare code shares what common ones learned."""

    def __init__(self, rows: int, size: int, *, scale: float = 1.0, own: bool = False) -> None:
        super().__init__()
        self.rows = rows
        self.tables = torch.nn.ModuleList(
            torch.nn.Embedding(count, size) for count in (len(PHONES), len(PHONES), LEVELS)
        )
        for table in self.tables:
            torch.nn.init.normal_(table.weight, std=scale / 3**0.5)
        extra = rows if own else rows - CODES  # specials such as start and stop share nothing
        self.own = torch.nn.Parameter(torch.zeros(extra, size) if own else scale * torch.randn(extra, size))

    def weight(self) -> torch.Tensor:
        """All vectors as one table (rows, size), which is what the released layout holds."""
        shared = sum(table(part) for table, part in zip(self.tables, parts(torch.arange(CODES)), strict=True))
        if len(self.own) == self.rows:
            return torch.cat([shared, torch.zeros_like(self.own[CODES:])]) + self.own
        return torch.cat([shared, self.own])

    @torch.no_grad()
    def fill(self, table: torch.Tensor) -> None:
        """Takes its vectors from a table (rows, size): the shared ones fit it best, its own are what is left."""
        counts = [len(shared.weight) for shared in self.tables]
        found = parts(torch.arange(CODES))
        design = torch.cat([F.one_hot(part, count) for part, count in zip(found, counts, strict=True)], 1).double()
        fitted = torch.linalg.lstsq(design, table[:CODES].double(), driver="gelsd").solution.float()
        for shared, weight in zip(self.tables, fitted.split(counts), strict=True):
            shared.weight.copy_(weight)
        self.own.zero_()
        self.own.copy_((table.float() - self.weight())[-len(self.own) :])

    def forward(self, code: torch.Tensor) -> torch.Tensor:
        """Vectors (..., size) of codes (...)."""
        return F.embedding(code, self.weight())
