from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

import chatterbox_lab as lab
from chatterbox_lab.engine.t3.sampling import Sampling, sample
from chatterbox_lab.engine.variants import ENGLISH

VOCABULARY, STOP = 8194, 6562


def as_upstream(logits: torch.Tensor, history: torch.Tensor, settings: lab.StreamSettings, seed: int) -> torch.Tensor:
    """The sampling of chatterbox-streaming's ``T3.inference``, operation by operation."""
    logits = logits[:1] + settings.cfg_weight * (logits[:1] - logits[1:])
    if settings.temperature != 1.0:
        logits = logits / settings.temperature
    logits = RepetitionPenaltyLogitsProcessor(2.0)(history, logits)
    probabilities = TopPLogitsWarper(0.8)(None, logits).softmax(-1)
    return torch.multinomial(probabilities, 1, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [0.3, 0.8, 1.0, 1.7])
def test_the_draws_are_upstreams(dtype: torch.dtype, temperature: float) -> None:
    settings = lab.StreamSettings(temperature=temperature, cfg_weight=0.7)
    for seed in range(25):
        torch.manual_seed(1000 + seed)
        logits, history = 3 * torch.randn(2, VOCABULARY).to(dtype), torch.randint(0, VOCABULARY, (1, 40))
        seen = torch.zeros(1, VOCABULARY, dtype=torch.bool).scatter_(1, history, True)
        generator = torch.Generator().manual_seed(seed)
        token = sample(logits.clone(), seen, Sampling.of(settings, STOP), generator)
        assert token.shape == (1, 1)
        assert torch.equal(token, as_upstream(logits, history, settings, seed))


def as_official(logits: torch.Tensor, history: torch.Tensor, settings: lab.StreamSettings, seed: int) -> torch.Tensor:
    """The sampling of chatterbox-tts 0.1.7's ``T3.inference``, operation by operation, and a top_k after it."""
    logits = logits[:1] + torch.as_tensor(settings.cfg_weight, dtype=logits.dtype) * (logits[:1] - logits[1:])
    logits = RepetitionPenaltyLogitsProcessor(settings.repetition_penalty)(history, logits)
    if settings.temperature != 1.0:
        logits = logits / settings.temperature
    logits = MinPLogitsWarper(settings.min_p)(history, logits)
    logits = TopPLogitsWarper(settings.top_p)(history, logits)
    if settings.top_k:
        logits = TopKLogitsWarper(settings.top_k)(history, logits)
    return torch.multinomial(logits.softmax(-1), 1, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("numbers", [(1.2, 1.0, 0.05, 0), (2.0, 0.9, 0.0, 0), (1.0, 0.5, 0.2, 7), (1.3, 1.0, 0.0, 1)])
def test_the_draws_are_those_of_the_official_release(numbers: tuple[float, float, float, int]) -> None:
    penalty, top_p, min_p, top_k = numbers
    settings = lab.StreamSettings(cfg_weight=0.5, repetition_penalty=penalty, top_p=top_p, min_p=min_p, top_k=top_k)
    for seed in range(25):
        torch.manual_seed(2000 + seed)
        logits, history = 3 * torch.randn(2, VOCABULARY), torch.randint(0, VOCABULARY, (1, 40))
        seen = torch.zeros(1, VOCABULARY, dtype=torch.bool).scatter_(1, history, True)
        generator, how = torch.Generator().manual_seed(seed), Sampling.of(settings, STOP, ENGLISH)
        token = sample(logits.clone(), seen, how, generator)
        assert torch.equal(token, as_official(logits, history, settings, seed))
    assert sample(logits.clone(), seen, replace(how, top_k=1)) == sample(logits, seen, replace(how, greedy=True))


def test_without_guidance_one_row_is_enough() -> None:
    logits, seen = 3 * torch.randn(2, VOCABULARY), torch.zeros(1, VOCABULARY, dtype=torch.bool)
    how = Sampling.of(lab.StreamSettings(cfg_weight=0, ignore_eos=True), STOP)
    tokens = [sample(rows.clone(), seen, how, torch.Generator().manual_seed(1)) for rows in (logits, logits[:1])]
    assert torch.equal(*tokens)
    given = logits[:1].clone()
    sample(given, seen, how)
    assert torch.equal(given, logits[:1])


def test_numbers_may_be_tensors() -> None:
    logits, seen = torch.randn(2, VOCABULARY), torch.zeros(1, VOCABULARY, dtype=torch.bool)
    plain = Sampling(0.5, 0.8, False, None)
    given = Sampling(torch.tensor(0.5), torch.tensor(0.8), False, None)
    tokens = [sample(logits.clone(), seen, how, torch.Generator().manual_seed(3)) for how in (plain, given)]
    assert torch.equal(*tokens)


def test_what_is_left_out_is_never_sampled() -> None:
    logits = torch.zeros(2, VOCABULARY)
    logits[:, STOP] = 100.0
    seen = torch.zeros(1, VOCABULARY, dtype=torch.bool)
    for temperature in (0.0, 0.8):
        for ignored in (False, True):
            how = Sampling.of(lab.StreamSettings(temperature=temperature, ignore_eos=ignored), STOP)
            assert (int(sample(logits.clone(), seen, how)) == STOP) != ignored


def test_greedy_takes_the_most_likely_after_the_penalty() -> None:
    logits = torch.zeros(2, VOCABULARY)
    logits[:, 5], logits[:, 7] = 3.0, 2.0
    seen = torch.zeros(1, VOCABULARY, dtype=torch.bool)
    how = Sampling.of(lab.StreamSettings(temperature=0), STOP)
    assert int(sample(logits.clone(), seen, how)) == 5
    seen[:, 5] = True
    assert int(sample(logits.clone(), seen, how)) == 7
