"""Conditioning and text to speech tokens, one at a time: prefill once, then one decode step a token."""

from __future__ import annotations

from collections.abc import Generator

import torch
from chatterbox.models.t3 import T3
from chatterbox.models.t3.modules.cond_enc import T3Cond
from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor, TopPLogitsWarper

from .alignment import AlignmentTracker, guard_logits
from .attention import FORK_HEADS, Attention, Heads
from .settings import StreamSettings
from .static import StaticT3

TOP_P = 0.8  # both fixed in chatterbox-streaming (tts.py, inference_stream)
REPETITION_PENALTY = 2.0


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
        settings: temperature, guidance, analyzer, guard and ``ignore_eos`` are used.
        generator: of the sampling, on T3's device; None is PyTorch's default generator.
        max_new_tokens: the most tokens to sample, the stop token included.
        heads: the (layer, head) pairs from which alignment is read.

    Yields:
        One token at a time, int64 (1,), on T3's device; never the stop token or another start token.
    """
    embeds, text = prompt(t3, cond, text_tokens)
    attend = _transformer(t3, settings, text, embeds.shape[1] + max_new_tokens, heads)
    tracker = AlignmentTracker(text_tokens.shape[1]) if settings.guard else None
    start, stop = t3.hp.start_speech_token, t3.hp.stop_speech_token
    history = torch.tensor([[start]], device=t3.device)
    for step in range(max_new_tokens):
        logits = t3.speech_head(attend(embeds)[:, -1])
        if tracker is not None:
            alignment = tracker.update(attend.rows)
            if not settings.ignore_eos:
                logits = guard_logits(logits.float(), alignment, stop)
        token = sample(logits, history, settings, stop, generator)
        code = int(token)  # waits for the device
        if code == stop:
            return
        if code != start:
            yield token[0]
        history = torch.cat([history, token], dim=1)
        embeds = embed(t3, token, step + 1)


def _transformer(
    t3: T3, settings: StreamSettings, text: tuple[int, int], capacity: int, heads: Heads
) -> Attention | StaticT3:
    if settings.backend == "static":
        return StaticT3(t3.tfmr, settings.analyzer, text, capacity, heads)
    return Attention(t3.tfmr, settings.analyzer, text, heads)


def prompt(t3: T3, cond: T3Cond, text_tokens: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int]]:
    """Input embeddings (2, T, C) of the prefill, and where in it the text tokens are."""
    start = torch.full_like(text_tokens[:, :1], t3.hp.start_speech_token)
    embeds, length = t3.prepare_input_embeds(t3_cond=cond, text_tokens=text_tokens, speech_tokens=start)
    # Upstream feeds the start token a second time; its models were used, and its analyzer written, that way.
    embeds = torch.cat([embeds, embed(t3, start[:1], 0)], dim=1)
    return embeds, (length, length + text_tokens.shape[1])


def step_bytes(t3: T3) -> int:
    """Bytes of weights that every decode step reads: layers, last norm and speech head, once for both CFG rows."""
    modules = (t3.tfmr.layers, t3.tfmr.norm, t3.speech_head)
    return sum(weight.numel() * weight.element_size() for module in modules for weight in module.parameters())


def embed(t3: T3, token: torch.Tensor, position: int) -> torch.Tensor:
    """The embedding (2, 1, C) of one speech token for the conditional and the unconditional row."""
    return (t3.speech_emb(token) + t3.speech_pos_emb.get_fixed_embedding(position)).expand(2, -1, -1)


def sample(
    logits: torch.Tensor, history: torch.Tensor, settings: StreamSettings, stop: int, generator: torch.Generator | None
) -> torch.Tensor:
    """One token (1, 1) from the logits (2, V) of the CFG pair, in upstream's order of operations."""
    logits = logits[:1] + settings.cfg_weight * (logits[:1] - logits[1:])
    if settings.ignore_eos:
        logits[:, stop] = -torch.inf
    greedy = settings.temperature == 0
    if not greedy and settings.temperature != 1.0:
        logits = logits / settings.temperature
    logits = RepetitionPenaltyLogitsProcessor(REPETITION_PENALTY)(history, logits)
    if greedy:
        return logits.argmax(-1, keepdim=True)
    probabilities = TopPLogitsWarper(TOP_P)(None, logits).softmax(-1)
    return torch.multinomial(probabilities, num_samples=1, generator=generator)
