"""The kinds of model that can be loaded: upstream's classes, and the names of their files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
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
        t3: names that the weights of T3 may have, the first that is there counts.
        tokenizer: name of its file.
        files: that a download takes, besides the tokenizer and the voice.
        text_vocab: text tokens of the released size.
    """

    module: str
    released: str
    t3: tuple[str, ...]
    tokenizer: str
    files: tuple[str, ...]
    text_vocab: int

    @property
    def weights(self) -> tuple[str, str, str]:
        """Names, without their ending, of T3's weights as they are saved, S3Gen's and the voice encoder's."""
        return self.t3[0], "s3gen", "ve"

    def home(self) -> ModuleType:
        """The module of the released class. Raises ValueError where the installed Chatterbox has none."""
        try:
            return import_module(self.module)
        except ModuleNotFoundError as error:
            raise ValueError(
                f"variant={next(name for name, kind in KINDS.items() if kind is self)!r}: the installed Chatterbox "
                f"({release()}) has no such model; chatterbox-tts and chatterbox-light have"
            ) from error


KINDS = {
    "english": Kind(
        "chatterbox.tts",
        "ChatterboxTTS",
        ("t3_cfg",),
        "tokenizer.json",
        ("t3_cfg.safetensors", "s3gen.safetensors", "ve.safetensors"),
        704,
    ),
    "multilingual": Kind(
        "chatterbox.mtl_tts",
        "ChatterboxMultilingualTTS",
        ("t3_mtl23ls_v2", "t3_mtl23ls_v3"),
        "grapheme_mtl_merged_expanded_v1.json",
        ("t3_mtl23ls_v2.safetensors", "s3gen.pt", "ve.pt", _CANGJIE),
        2454,
    ),
}
"""By the name that `load` takes."""


class Lab:
    """Goes before upstream's class; takes the voice of a recording once, and refuses one that cannot be used."""

    config = ModelConfig()
    kind = KINDS["english"]

    def prepare_conditionals(self, wav_fpath: Any, exaggeration: float = 0.5) -> None:
        """Takes the voice of a recording (`recordings.read` says which).

        Raises ValueError where the model cannot clone or the recording cannot be used.
        """
        recordings.check_clones(self)
        self.conds = recordings.prepared(self, recordings.read(wav_fpath), exaggeration)


class LabTTS(Lab, ChatterboxTTS):
    """Upstream's ``ChatterboxTTS``, the fork's or English."""


@cache
def class_of(variant: str) -> type:
    """What a model of this kind is here: `Lab` before upstream's own class. Raises ValueError as `Kind.home`."""
    kind = KINDS[variant]
    if variant == "english":
        return LabTTS
    theirs = getattr(kind.home(), kind.released)
    body = {"kind": kind, "__module__": __name__, "__doc__": f"Upstream's ``{kind.released}``."}
    own = globals()["LabMultilingualTTS"] = type("LabMultilingualTTS", (Lab, theirs), body)  # where pickle looks
    return own


def tokenizer_of(kind: Kind, path: Path) -> Any:
    """Upstream's tokenizer of a file; what else it reads comes from the same folder, and nothing from a network."""
    if kind is KINDS["english"]:
        return EnTokenizer(str(path))
    with _no_hub(path.parent):
        return tokenizers_module.MTLTokenizer(str(path))


def tables_of(tokenizer: Any) -> dict[str, list[str]]:
    """What a tokenizer has read besides its own file, by the name of the file to write it to."""
    codes = getattr(getattr(tokenizer, "cangjie_converter", None), "word2cj", {})
    return {_CANGJIE: [f"{character}\t{code}" for character, code in codes.items()]} if codes else {}


@contextmanager
def _no_hub(folder: Path) -> Iterator[None]:
    module = import_module("chatterbox.models.tokenizers.tokenizer")
    cached = module.hf_hub_download

    def here(repo_id: str, filename: str, **_: Any) -> str:  # upstream warns of what Chinese lacks without the file
        file = folder / filename
        return str(file) if file.exists() else cached(repo_id=repo_id, filename=filename, local_files_only=True)

    with attribute(module, "hf_hub_download", here):
        yield
