"""The lab voice: its sizes, its parts in training, and the folder that they end up in."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from chatterbox.tts import Conditionals

from ..voices import build
from ..voices.build import LabTTS
from ..voices.config import ModelConfig
from ..voices.load import place
from . import flow, t3, vocoder
from .corpus import Utterance
from .phones import FIRST_ID, SYMBOLS
from .tokens import CodeEmbedding, codes

LAB = ModelConfig(
    t3_size=160, t3_mlp=416, t3_layers=14, text_vocab=FIRST_ID + len(SYMBOLS), speech_vocab=6563, encoder_size=96,
    encoder_mlp=384, encoder_heads=2, encoder_blocks=3, encoder_up_blocks=1, unet_size=96, unet_heads=2,
    unet_head_size=48, unet_blocks=1, unet_mid_blocks=2, vocoder_size=128, vocoder_kernels=(3, 7), f0_size=64,
    clone=False,
)  # fmt: skip
SMALL = replace(
    LAB, t3_size=64, t3_mlp=64, t3_heads=16, encoder_size=32, encoder_mlp=32, encoder_blocks=1, unet_size=16,
    unet_heads=1, unet_head_size=16, unet_mid_blocks=1, vocoder_size=32, vocoder_kernels=(3,), f0_size=16,
)  # fmt: skip
"""The same in the smallest sizes, to try the stages with."""

PROMPT_TOKENS = 50  # two seconds of the teacher, which every window of a stream begins with
STAGES = ("t3", "flow", "vocoder")


def parts(config: ModelConfig, seed: int = 0) -> dict[str, torch.nn.Module]:
    """T3, flow and vocoder with new weights, as the stages train them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tts = build.assemble(config, None, watermark=False)
        tts.t3.cond_enc.perceiver = None  # no reference speech: T3 would carry a network that never runs
        return {
            "t3": t3.prepare(tts.t3),
            "flow": flow.prepare(tts.s3gen.flow),
            "vocoder": vocoder.prepare(tts.s3gen.mel2wav),
        }


def resume(name: str, module: torch.nn.Module, tts: LabTTS) -> None:
    """Gives a stage's module the weights of a finished voice. Raises ValueError where they do not fit."""
    finished = {"t3": tts.t3, "flow": tts.s3gen.flow, "vocoder": tts.s3gen.mel2wav}[name].state_dict()
    shared = {part: key for key, part in module.named_modules() if isinstance(part, CodeEmbedding)}
    tables = {part: finished.pop(f"{key.removesuffix('.table')}.weight") for part, key in shared.items()}
    try:
        for part, table in tables.items():
            part.fill(table)
        missing = module.load_state_dict(finished, strict=False).missing_keys
    except RuntimeError as error:
        raise ValueError(f"{name}: the voice has other sizes than the recipe's ({error})") from error
    missing = [key for key in missing if not key.startswith(tuple(shared.values()))]
    if missing:
        raise ValueError(f"{name}: the voice has no {', '.join(missing)}")


def assemble(folder: Path, config: ModelConfig, prompt: Utterance) -> LabTTS:
    """The voice from the averaged weights of the stages' checkpoints, new weights where there is none."""
    trained = parts(config)
    for name, module in trained.items():
        checkpoint = folder / f"{name}.pt"
        if checkpoint.exists():
            module.load_state_dict(torch.load(checkpoint, weights_only=True)["averaged"])
    tts = build.assemble(config, folder / "tokenizer.json", watermark=True)
    with torch.no_grad():
        tts.t3.load_state_dict(t3.finish(trained["t3"]), strict=False)
        tts.s3gen.flow.load_state_dict(flow.finish(trained["flow"]))
    tts.s3gen.mel2wav.load_state_dict(trained["vocoder"].state_dict())
    tts.conds = conditionals(tts, prompt)
    return place(tts, "cpu", torch.float32)


def conditionals(tts: LabTTS, prompt: Utterance) -> Conditionals:
    """What T3 and S3Gen are told of the speaker: constants, and two seconds of the teacher."""
    tokens = torch.from_numpy(codes(prompt))[None, :PROMPT_TOKENS]
    mel = torch.from_numpy(prompt.mel).float()[None, : 2 * tokens.shape[1]]
    gen = {
        "prompt_token": tokens, "prompt_token_len": torch.tensor([tokens.shape[1]]), "prompt_feat": mel,
        "prompt_feat_len": None, "embedding": flow.speaker(),
    }  # fmt: skip
    return Conditionals(t3.speaker(tts.t3), gen)


def prompt_of(items: list[Utterance]) -> Utterance:
    """The first utterance that is long enough to be the voice prompt and ends no sooner than it does."""
    return next(item for item in items if len(item.mel) >= 2 * PROMPT_TOKENS)
