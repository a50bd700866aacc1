"""The flow learns to draw the teacher's mel from speech tokens, after a piece of mel that it is given."""

from __future__ import annotations

import random

import numpy as np
import torch
import torch.nn.functional as F
from chatterbox.models.s3gen.flow import CausalMaskedDiffWithXvec
from torch.nn.functional import normalize

from .corpus import Utterance
from .tokens import CodeEmbedding, codes

WINDOW = 100  # tokens of a training example: a prompt, a context and a chunk
PROMPTED = 0.85  # of the examples begin with given mel, as every window of a stream does
BLOCKS = (0, 0, 25, 50)  # tokens: frames may look ahead to the end of their block only, 0 for everywhere


def prepare(flow: CausalMaskedDiffWithXvec) -> CausalMaskedDiffWithXvec:
    """Gives the flow an embedding whose vectors share what codes have in common, and switches dropout off."""
    flow.input_embedding = CodeEmbedding(flow.vocab_size, flow.input_size)
    flow.decoder.lock = None  # it guards TensorRT only, and a module that holds a lock cannot be copied
    return flow.eval()  # in evaluation mode there is no dropout; nothing else in these classes depends on the mode


def finish(flow: CausalMaskedDiffWithXvec) -> dict[str, torch.Tensor]:
    """The flow's weights in the released layout."""
    state = {key: value for key, value in flow.state_dict().items() if not key.startswith("input_embedding")}
    return state | {"input_embedding.weight": flow.input_embedding.weight()}


def speaker() -> torch.Tensor:
    """The one speaker's vector (1, 192), where a voice that clones has what its speaker encoder hears."""
    return torch.full((1, 192), 192**-0.5)


def losses(flow: CausalMaskedDiffWithXvec, mel: torch.Tensor, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """Flow matching as upstream has it (``compute_loss``), and how far the encoder alone is from the mel.

    Args:
        mel: (B, 2 T, 80), log.
        tokens: (B, T).
    """
    size = mel.shape[1]
    hidden, _ = flow.encoder(flow.input_embedding(tokens), torch.full((len(mel),), tokens.shape[1]))
    mean = flow.encoder_proj(hidden)
    given = torch.where(torch.rand(len(mel)) < PROMPTED, 0.7 * torch.rand(len(mel)), 0.0) * size
    prompt = mel * (torch.arange(size) < given[:, None])[..., None]
    flow.decoder.estimator.static_chunk_size = 2 * random.Random(int(torch.randint(2**31, ()))).choice(BLOCKS)
    try:
        matching, _ = flow.decoder.compute_loss(
            mel.transpose(1, 2), torch.ones(len(mel), 1, size), mean.transpose(1, 2),
            flow.spk_embed_affine_layer(normalize(speaker(), dim=1)).expand(len(mel), -1),
            cond=prompt.transpose(1, 2),
        )  # fmt: skip
    finally:
        flow.decoder.estimator.static_chunk_size = 0
    return {"matching": matching, "mean": F.l1_loss(mean, mel)}


class Batches:
    """Windows of the corpus read one sentence after the other; which ones is drawn from the step's number alone."""

    def __init__(self, items: list[Utterance], size: int) -> None:
        self.mel = np.concatenate([item.mel for item in items])
        self.tokens = np.concatenate([codes(item) for item in items])
        self.size = size

    def __call__(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Mel (B, 2 T, 80) and tokens (B, T) of a step. A sentence from elsewhere follows the first part."""
        draw = np.random.default_rng(step)
        chosen = []
        for _ in range(self.size):
            prompt = int(draw.integers(0, WINDOW))
            chosen.append(np.concatenate([self._some(draw, prompt), self._some(draw, WINDOW - prompt)]))
        index = np.stack(chosen)
        frames = np.stack([2 * index, 2 * index + 1], -1).reshape(self.size, -1)
        return torch.from_numpy(self.mel[frames].astype(np.float32)), torch.from_numpy(self.tokens[index])

    def _some(self, draw: np.random.Generator, count: int) -> np.ndarray:
        start = int(draw.integers(0, max(1, len(self.tokens) - count)))
        return np.arange(start, start + count) % len(self.tokens)  # a corpus shorter than a window comes round again
