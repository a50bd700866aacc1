"""The kinds of model that can be loaded: upstream's classes, and the names of their files."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from chatterbox.models import tokenizers as tokenizers_module
from chatterbox.models.tokenizers import EnTokenizer
from chatterbox.tts import ChatterboxTTS

from .. import recordings
from ..files import attribute
from ..released import folder as chatterbox_folder
from ..released import release
from .config import ModelConfig

_CANGJIE = "Cangjie5_TC.json"
"""Codes of Chinese characters, a list of ``character<tab>code``."""


@dataclass(frozen=True)
class Kind:
    """What differs between the kinds on disk and in memory.

    Args:
        module: of the released class and of its ``Conditionals``.
        released: the name of that class.
        hub: repository of the released weights on the Hugging Face hub.
        t3: names that the weights of T3 may have, the first that is there counts.
        tokenizer: its files, each under one of these names.
        files: that a download takes, besides the tokenizer and the voice.
        sizes: of the released model, where they are not `ModelConfig`'s own.
        tiny: those of the small one, where they are not `TINY`'s.
        s3gen: name of the weights of S3Gen.
        turbo: whether T3 is a GPT-2, with a tokenizer of transformers, and S3Gen's flow a meanflow (two steps).
    """

    module: str
    released: str
    hub: str
    t3: tuple[str, ...]
    tokenizer: tuple[tuple[str, ...], ...]
    files: tuple[str, ...]
    sizes: Mapping[str, int] = field(default_factory=dict)
    tiny: Mapping[str, int] = field(default_factory=dict)
    s3gen: str = "s3gen"
    turbo: bool = False

    @property
    def weights(self) -> tuple[str, str, str]:
        """Names, without their ending, of T3's weights as they are saved, S3Gen's and the voice encoder's."""
        return self.t3[0], self.s3gen, "ve"

    @property
    def downloads(self) -> list[str]:
        """What is fetched from the hub."""
        return [*self.files, *(names[0] for names in self.tokenizer), "conds.pt"]

    def home(self) -> ModuleType:
        """The module of the released class.

        Raises:
            ValueError: the installed Chatterbox has none.
            ModuleNotFoundError: a package that this module imports is missing, such as pyloudnorm.
        """
        variant = next(name for name, kind in KINDS.items() if kind is self)
        try:
            return import_module(self.module)
        except ModuleNotFoundError as error:
            if error.name != self.module:
                raise ModuleNotFoundError(
                    f"variant={variant!r}: {self.module} needs {error.name}; pip install {error.name}", name=error.name
                ) from error
            raise ValueError(
                f"variant={variant!r}: the installed Chatterbox ({_installed()}) has no such model; "
                f"chatterbox-tts and chatterbox-light have"
            ) from error


def _installed() -> str:
    """Which Chatterbox this is: its release, or the folder of a checkout that pip knows nothing of."""
    try:
        return str(release())
    except (LookupError, RuntimeError):
        return str(chatterbox_folder())


_TURBO = Kind(
    "chatterbox.tts_turbo",
    "ChatterboxTurboTTS",
    "ResembleAI/chatterbox-turbo",
    ("t3_turbo_v1",),
    (("tokenizer_config.json",), ("vocab.json", "tokenizer.json"), ("merges.txt", "tokenizer.json")),
    (
        *("t3_turbo_v1.safetensors", "s3gen_meanflow.safetensors", "ve.safetensors"),
        *("added_tokens.json", "special_tokens_map.json"),
    ),
    {"text_vocab": 50276, "speech_vocab": 6563, "t3_layers": 24},
    {"text_vocab": 266, "speech_vocab": 6563, "t3_layers": 4},
    "s3gen_meanflow",
    turbo=True,
)
KINDS = {
    "english": Kind(
        "chatterbox.tts",
        "ChatterboxTTS",
        "ResembleAI/chatterbox",
        ("t3_cfg",),
        (("tokenizer.json",),),
        ("t3_cfg.safetensors", "s3gen.safetensors", "ve.safetensors"),
    ),
    "multilingual": Kind(
        "chatterbox.mtl_tts",
        "ChatterboxMultilingualTTS",
        "ResembleAI/chatterbox",
        ("t3_mtl23ls_v2", "t3_mtl23ls_v3"),
        (("grapheme_mtl_merged_expanded_v1.json",),),
        ("t3_mtl23ls_v2.safetensors", "s3gen.pt", "ve.pt", _CANGJIE),
        {"text_vocab": 2454},
        {"text_vocab": 2454},
    ),
    "turbo": _TURBO,
    "nano": replace(
        _TURBO,
        hub="ResembleAI/chatterbox-nano",
        t3=("t3_nano_v1",),
        files=("t3_nano_v1.safetensors", *_TURBO.files[1:]),
        sizes=_TURBO.sizes | {"t3_size": 768, "t3_mlp": 3072, "t3_layers": 12, "t3_heads": 12},
        tiny=_TURBO.tiny | {"t3_layers": 3, "t3_heads": 12},
    ),
}
"""By the name that `load` takes. Sizes of Turbo and Nano: ``ChatterboxTurboTTS.from_local``."""


class Lab:
    """Goes before upstream's class; takes the voice of a recording once, and refuses one that cannot be used."""

    config = ModelConfig()
    kind = KINDS["english"]

    def prepare_conditionals(self, wav_fpath: Any, exaggeration: float = 0.5) -> None:
        """Takes the voice of a recording (`recordings.read` says which).

        Raises ValueError where the model cannot clone or the recording cannot be used.
        """
        self.conds = recordings.prepared(self, recordings.taken(self, wav_fpath), exaggeration)


class LabTurbo(Lab):
    """The same for Turbo and Nano, which bring a recording to -27 LUFS."""

    def prepare_conditionals(self, wav_fpath: Any, exaggeration: float = 0.5, norm_loudness: bool = True) -> None:
        """Takes the voice of a recording of more than 5 s; ``exaggeration`` does nothing in these models.

        Raises ValueError as `Lab.prepare_conditionals`.
        """
        self.conds = recordings.prepared(self, recordings.taken(self, wav_fpath, norm_loudness), exaggeration)


class LabTTS(Lab, ChatterboxTTS):
    """Upstream's ``ChatterboxTTS``, the fork's or English."""


@cache
def class_of(variant: str) -> type:
    """What a model of this kind is here: `Lab` before upstream's own class. Raises ValueError as `Kind.home`."""
    kind = KINDS[variant]
    if variant == "english":
        return LabTTS
    theirs, name = getattr(kind.home(), kind.released), f"Lab{variant.title()}TTS"
    body = {"kind": kind, "__module__": __name__, "__doc__": f"Upstream's ``{kind.released}``."}
    own = globals()[name] = type(name, (LabTurbo if kind.turbo else Lab, theirs), body)  # where pickle looks
    return own


def tokenizer_of(kind: Kind, path: Path) -> Any:
    """Upstream's tokenizer of a file; what else it reads comes from the same folder, and nothing from a network."""
    if kind is KINDS["english"]:
        return EnTokenizer(str(path))
    if kind.turbo:
        return _gpt2_tokenizer(path.parent)
    with _no_hub(path.parent):
        return tokenizers_module.MTLTokenizer(str(path))


def _gpt2_tokenizer(folder: Path) -> Any:
    """As ``ChatterboxTurboTTS.from_local`` has it; no code that comes with the files runs. Raises ValueError."""
    from transformers import AutoTokenizer  # no other kind needs it

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # what tokenizers raises has no common base
        text = f"{folder}: its tokenizer is not readable ({type(error).__name__}: {error})"
        raise ValueError(text) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def write_tokenizer(kind: Kind, tokenizer: Any, folder: Path) -> None:
    """The tokenizer's files in the released layout, and the tables that it has read besides."""
    if kind.turbo:
        tokenizer.save_pretrained(folder)
        tokenizer.backend_tokenizer.model.save(str(folder))  # vocab.json, merges.txt: not by transformers 5
        return
    tokenizer.tokenizer.save(str(folder / kind.tokenizer[0][0]), pretty=False)
    if codes := getattr(getattr(tokenizer, "cangjie_converter", None), "word2cj", {}):
        table = [f"{character}\t{code}" for character, code in codes.items()]
        (folder / _CANGJIE).write_text(json.dumps(table, ensure_ascii=False), encoding="utf-8")


@contextmanager
def _no_hub(folder: Path) -> Iterator[None]:
    module = import_module("chatterbox.models.tokenizers.tokenizer")
    cached = module.hf_hub_download

    def here(repo_id: str, filename: str, **_: Any) -> str:  # upstream warns of what Chinese lacks without the file
        file = folder / filename
        return str(file) if file.exists() else cached(repo_id=repo_id, filename=filename, local_files_only=True)

    with attribute(module, "hf_hub_download", here):
        yield
