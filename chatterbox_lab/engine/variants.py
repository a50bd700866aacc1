"""What differs between one Chatterbox and another, as numbers and names; nothing else here asks which it is.

A model is told by what it is, its classes and what they offer, and never by the version of a package.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from threading import Lock
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from transformers import GPT2Model, LlamaModel

from .settings import StreamSettings
from .t3 import rules
from .t3.backends import FORK_HEADS, LATER_HEADS, Heads


@dataclass(frozen=True)
class Variant:
    """One kind of Chatterbox.

    Args:
        name: in words.
        sampling: what is done to the logits after guidance, in this order (`sampling.STEPS`).
        defaults: what the fields of `StreamSettings` mean that are None.
        heads: the (layer, head) pairs of T3 that walk through the text; none where none are known.
        starts: how often the start token is fed before the first speech token is sampled.
        codes: the first of the sampled codes that is no speech and is not rendered; None where all are.
        unsaid: last speech tokens that are not rendered.
        multilingual: whether the text needs a language.
        rows: of T3 with classifier-free guidance; 1 where there is none.
        forgets_start: whether the start token pays the repetition penalty in the first step alone.
        after: speech tokens that are rendered after those of the text.
        backbone: T3's transformer.
    """

    name: str
    sampling: tuple[str, ...]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    heads: Heads = LATER_HEADS
    starts: int = 2
    codes: int | None = 6561
    unsaid: int = 0
    multilingual: bool = False
    rows: int = 2
    forgets_start: bool = False
    after: tuple[int, ...] = ()
    backbone: type[torch.nn.Module] = LlamaModel

    def settled(self, settings: StreamSettings) -> StreamSettings:
        """The settings with this model's own numbers where they say None; a guard that is on by default reads.

        Raises ValueError for an analyzer where nothing is known to analyze.
        """
        if settings.analyzer != "off" and not self.heads:
            known = f"no head of {self.name}'s T3 is known to follow the text"
            raise ValueError(f"analyzer={settings.analyzer!r}: must be 'off', and guard False: {known}")
        missing = {name: value for name, value in self.defaults.items() if getattr(settings, name) is None}
        if missing.get("guard") and settings.analyzer == "off":
            missing["analyzer"] = "probe"
        return settings.replace(**missing) if missing else settings

    def ended(self, codes: torch.Tensor) -> torch.Tensor:
        """The last codes (n,) of an utterance with what is rendered after them."""
        return torch.cat([codes, codes.new_tensor(self.after)])


_LATER_ORDER = ("penalty", "temperature", "min_p", "top_p", "top_k")
_FORK_NUMBERS = {"repetition_penalty": 2.0, "top_p": 0.8, "min_p": 0.0, "top_k": 0}
_LATER_NUMBERS = {"repetition_penalty": 1.2, "top_p": 1.0, "min_p": 0.05, "top_k": 0}

STREAMING = Variant(
    "the streaming fork",
    ("temperature", "penalty", "min_p", "top_p", "top_k"),
    _FORK_NUMBERS | {"guard": False, "rules": rules.SAFE},
    FORK_HEADS,
    codes=None,
)
"""chatterbox-streaming 0.1.2, whose numbers are fixed in ``ChatterboxTTS.inference_stream``."""
ENGLISH = Variant("English", _LATER_ORDER, _LATER_NUMBERS | {"guard": False, "rules": rules.SAFE})
"""``ChatterboxTTS`` of chatterbox-tts 0.1.7 and chatterbox-light 1.0."""
MULTILINGUAL = Variant(
    "Multilingual",
    _LATER_ORDER,
    _LATER_NUMBERS | {"repetition_penalty": 2.0, "guard": True, "rules": rules.LATER},
    multilingual=True,
)
"""``ChatterboxMultilingualTTS`` of chatterbox-tts 0.1.7, whose analyzer acts."""
MULTILINGUAL_UNGUARDED = replace(
    MULTILINGUAL,
    name="Multilingual without an analyzer",
    defaults=_LATER_NUMBERS | {"guard": False, "rules": rules.SAFE},
    unsaid=1,
)
"""That of chatterbox-light 1.0, with which Multilingual v3 came: the sound of the last token is cut off as noise."""
TURBO = Variant(
    "Turbo",
    ("temperature", "top_k", "top_p", "min_p", "penalty"),
    {"repetition_penalty": 1.2, "top_p": 0.95, "min_p": 0.0, "top_k": 1000, "guard": False, "rules": rules.SAFE},
    heads=(),
    starts=1,
    rows=1,
    forgets_start=True,
    after=(4299,) * 3,
    backbone=GPT2Model,
)
"""``ChatterboxTurboTTS`` of chatterbox-tts 0.1.7 and chatterbox-light 1.0, Nano among them (``T3.inference_turbo``).

It ignores guidance and exaggeration, and ends with silence (``S3GEN_SIL``). The release ignores min_p, takes a
temperature of 0 for 1, and goes on where the very first token is a stop; ours does not.
"""

_PARTS = ("t3", "s3gen", "ve", "tokenizer", "conds", "device", "sr")
_CLASSES = (
    "chatterbox.tts.ChatterboxTTS",
    "chatterbox.mtl_tts.ChatterboxMultilingualTTS",
    "chatterbox.tts_turbo.ChatterboxTurboTTS",
)


def released(tts: Any) -> type | None:
    """The class of the release that a model is of, or derived from; None for what is no Chatterbox."""
    return next((kind for kind in type(tts).__mro__ if _named(kind) in _CLASSES), None)


def variant_of(tts: Any) -> Variant:
    """What this model is. Raises TypeError for what is no Chatterbox that this package runs; it is not touched."""
    kind = released(tts)
    if kind is None or not all(hasattr(tts, part) for part in _PARTS):
        allowed = "a ChatterboxTTS or ChatterboxMultilingualTTS of chatterbox-streaming, chatterbox-tts or its kin"
        raise TypeError(f"tts: must be {allowed}, or a ChatterboxTurboTTS, is a {_named(type(tts))}")
    if _named(kind) == _CLASSES[0]:
        found = STREAMING if hasattr(kind, "inference_stream") else ENGLISH
    elif _named(kind) == _CLASSES[1]:
        guarded = hasattr(_home(_t3_class(tts)), "AlignmentStreamAnalyzer")
        found = MULTILINGUAL if guarded else MULTILINGUAL_UNGUARDED
    else:
        found = TURBO
    backbone = getattr(tts.t3, "tfmr", None)
    if not isinstance(backbone, found.backbone):
        what = f"its T3 must be a {found.backbone.__name__}, is a {_named(type(backbone))}"
        raise TypeError(f"tts: {what}; this Chatterbox is not supported")
    return found


def _t3_class(tts: Any) -> type:
    t3 = getattr(tts.t3, "_orig_mod", tts.t3)  # compiled as a whole
    return next((kind for kind in type(t3).__mro__ if kind.__name__ == "T3"), type(t3))


def _named(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _home(kind: type) -> ModuleType:
    return sys.modules[kind.__module__]


def punctuated(tts: Any, text: str) -> str:
    """The text as the release's own ``punc_norm`` has it."""
    return _home(released(tts)).punc_norm(text)


def encode(tts: Any, text: str, language: str | None = None, rows: int = 2) -> torch.Tensor:
    """Text tokens (rows, S), int64 on the model's device, with start and stop but for Turbo; the rows are alike.

    Args:
        tts: a Chatterbox.
        text: what is said.
        language: a code such as ``"fr"``; ``""`` gives a multilingual model no language, None only suits others.
        rows: 2 for classifier-free guidance, 1 without.

    Raises:
        ValueError: a text that is none or does not fit, a language that the model does not speak or lacks.
    """
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"text={text!r}: must be a string with something to say")
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise ValueError(f"text={text!r}: must be Unicode, has half of a surrogate pair")
    hp, spoken, words = tts.t3.hp, _language(tts, language), punctuated(tts, text)
    own = hasattr(tts.tokenizer, "text_to_tokens")
    tokens = tts.tokenizer.text_to_tokens(words, **spoken) if own else _subwords(tts.tokenizer, words)
    count, most = tokens.shape[1], min(hp.max_text_tokens, getattr(tts.tokenizer, "model_max_length", math.inf))
    if count > most:
        raise ValueError(f"text of {len(text)} characters: is {count} text tokens, {most} fit; speak it in parts")
    if own:
        tokens = F.pad(F.pad(tokens, (1, 0), value=hp.start_text_token), (0, 1), value=hp.stop_text_token)
    return tokens.long().to(tts.device).repeat(rows, 1)


_one_at_a_time = Lock()
"""For transformers' tokenizers, which refuse a second thread while a first sets how they cut and pad."""


def _subwords(tokenizer: Any, text: str) -> torch.Tensor:
    """Text tokens (1, S) of a transformers tokenizer, of the whole text however long."""
    with _one_at_a_time:
        return tokenizer(text, return_tensors="pt", verbose=False).input_ids


def _language(tts: Any, language: str | None) -> dict[str, str | None]:
    """What the model's tokenizer is told. Raises ValueError."""
    variant = variant_of(tts)
    if not variant.multilingual:
        if language not in (None, "", "en"):
            raise ValueError(f"language={language!r}: this model speaks English ('en') alone")
        return {}
    known = _home(released(tts)).SUPPORTED_LANGUAGES
    code = language.lower() if isinstance(language, str) else language
    if code is None or (code and code not in known):
        raise ValueError(f"language={language!r}: must be one of {', '.join(known)}")
    return {"language_id": code or None}
