"""A diagnosis of the tiny model, measured on a little speech and once a process, for the tests that read its rows."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import pytest
import torch

from chatterbox_lab.study import diagnose, diagnose_advice, subject
from chatterbox_lab.study.subject import EXACT, FASTEST, UPSTREAM, Plan
from chatterbox_lab.voices import load as models

LITTLE = Plan(50, 1, {UPSTREAM: (50,), EXACT: (0,), FASTEST: (10,)}, 1, 3, 1, False, 1)


def little(patch: pytest.MonkeyPatch) -> None:
    """Diagnoses take seconds: little speech, and advice from a short utterance."""
    for name in ("FULL", "QUICK", "LARGE", "LARGE_QUICK"):
        patch.setattr(subject, name, LITTLE)
    recommend = diagnose_advice.recommend
    patch.setattr(
        diagnose_advice,
        "recommend",
        lambda tts, target, **how: recommend(tts, target, **how | {"tokens": 30, "seconds": 0.01}),
    )


def tiny() -> Any:
    """A model of its own with a short voice prompt."""
    tts = models.load("tiny", device="cpu", seed=0)
    gen = tts.conds.gen
    gen.update(prompt_token=gen["prompt_token"][:, :10], prompt_feat=gen["prompt_feat"][:, :20])
    gen["prompt_token_len"] = torch.tensor([10])
    return tts


def state(tts: Any) -> dict[str, Any]:
    """What a diagnosis could leave behind."""
    layers = [layer.self_attn for layer in tts.t3.tfmr.layers]
    return {
        "hooks": [len(layer._forward_hooks) for layer in layers],
        "functions": [(list(layer._forward_hooks.values()), layer.__dict__.get("forward")) for layer in layers],
        "config": dict(vars(tts.t3.tfmr.config)),
        "attributes": [sorted(vars(part)) for part in (tts, tts.t3, tts.s3gen, tts.watermarker)],
        "t3": (id(tts.t3._modules.get("patched_model")), tts.t3.compiled),
        "voice": (id(tts.conds), {name: id(value) for name, value in vars(tts.conds.t3).items()}),
        "flags": (torch.get_num_threads(), torch.backends.cudnn.benchmark, torch.get_float32_matmul_precision()),
        "random": torch.random.get_rng_state().tolist(),
    }


class Measured(NamedTuple):
    """A diagnosis: its rows, its recordings, and the model's state before and after."""

    rows: list[dict[str, Any]]
    audio: dict[str, torch.Tensor]
    before: dict[str, Any]
    after: dict[str, Any]


@cache
def measured(calls: int) -> Measured:
    """The diagnosis of a model on which upstream's generate ran so often."""
    tts, audio = tiny(), {}
    with pytest.MonkeyPatch.context() as patch:
        little(patch)
        diagnose.use(tts, calls)
        before = state(tts)
        rows = diagnose.measure(tts, model="tiny", keep=audio.__setitem__)
    return Measured(rows, audio, before, state(tts))
