"""The sizes of a model, as its ``config.json`` holds them."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class ModelConfig:
    """The sizes of a voice; the defaults are Chatterbox's own.

    ``clone`` says whether the folder holds the networks that turn a reference recording into a voice, ``trained``
    whether the speech head has learned which codes exist (see `FlowCodesHead`).
    ``*_heads`` of T3 are as many as the later analyzers address (head 15), so keep 16 where they should work.
    """

    t3_size: int = 1024
    t3_mlp: int = 4096
    t3_layers: int = 30
    t3_heads: int = 16
    text_vocab: int = 704
    speech_vocab: int = 8194
    encoder_size: int = 512
    encoder_mlp: int = 2048
    encoder_heads: int = 8
    encoder_blocks: int = 6
    encoder_up_blocks: int = 4
    unet_size: int = 256
    unet_heads: int = 8
    unet_head_size: int = 64
    unet_blocks: int = 4
    unet_mid_blocks: int = 12
    vocoder_size: int = 512
    vocoder_kernels: tuple[int, ...] = (3, 7, 11)
    f0_size: int = 512
    trained: bool = True
    clone: bool = True
    tokenizer_size: int = 1280
    tokenizer_layers: int = 6
    speaker_growth: int = 32
    voice_encoder_size: int = 256

    def __post_init__(self) -> None:
        for size, part in (
            ("t3_size", 2 * self.t3_heads),
            ("encoder_size", self.encoder_heads),
            ("tokenizer_size", 64),
        ):
            if getattr(self, size) % part:  # T3's heads are even for RoPE; the tokenizer's are 64 wide
                raise ValueError(f"{size}={getattr(self, size)}: must be a multiple of {part}")

    @classmethod
    def read(cls, path: Path, otherwise: ModelConfig | None = None) -> ModelConfig:
        """The sizes in a ``config.json``; where there is no such file the other ones, or Chatterbox's own.

        Raises ValueError.
        """
        if not path.exists():
            return otherwise or cls()
        try:
            values = json.loads(path.read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"{path.name}: not valid JSON ({error})") from error
        if not isinstance(values, dict):
            raise ValueError(f"{path.name}: must hold an object of sizes, not {type(values).__name__}")
        known = {field.name: field.default for field in fields(cls)}
        for name, value in values.items():
            if name not in known:
                raise ValueError(f"{path.name}: {name!r} is no size of a voice; there are {', '.join(known)}")
            values[name] = _like(known[name], value, f"{path.name}: {name}")
        return replace(otherwise or cls(), **values)


def _like(default: Any, value: Any, name: str) -> Any:
    if isinstance(default, tuple):
        value = tuple(value) if isinstance(value, list) else value
        right = isinstance(value, tuple) and value and all(type(item) is int and item > 0 for item in value)
    else:
        right = type(value) is type(default) and (isinstance(value, bool) or value > 0)
    if not right:
        raise ValueError(f"{name}={value!r}: must be like {default!r}, and positive")
    return value


TINY = ModelConfig(
    t3_size=192, t3_mlp=384, t3_layers=14, encoder_size=64, encoder_mlp=128, encoder_heads=2, encoder_blocks=2,
    encoder_up_blocks=1, unet_size=32, unet_heads=1, unet_head_size=16, unet_blocks=1, unet_mid_blocks=1,
    vocoder_size=64, vocoder_kernels=(3,), f0_size=64, tokenizer_size=64, tokenizer_layers=1, speaker_growth=4,
    voice_encoder_size=32, trained=False,
)  # fmt: skip
