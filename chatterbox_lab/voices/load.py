"""One door for every model: a small or a full-size one with random weights, the released one, or a folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from chatterbox import tts as tts_module
from huggingface_hub import snapshot_download

from ..cpu import warn_of_emulation
from ..files import LAB_VOICE
from ..host import building
from .build import LabTTS, assemble, random_conditionals
from .config import TINY, ModelConfig
from .folder import complete, fill
from .kinds import KINDS, Kind

MODELS = ("lab", "tiny", "random", "pretrained")
DTYPES = ("float32", "bfloat16", "float16")


_RANDOM = ("tiny", "random")


def load(
    model: str | Path = "lab",
    *,
    variant: str = "english",
    device: str = "auto",
    dtype: str | torch.dtype = "float32",
    seed: int = 0,
    watermark: bool = True,
) -> LabTTS:
    """A voice, ready to speak: an upstream ``ChatterboxTTS``, ``ChatterboxMultilingualTTS`` or ``ChatterboxTurboTTS``.

    Args:
        model: ``"lab"`` (the trained voice in ``data/lab``: small, speaks English), ``"tiny"`` (small sizes, random
            weights), ``"random"`` (Chatterbox's sizes, random weights: real costs, no speech), ``"pretrained"``
            (ResembleAI/chatterbox, chatterbox-turbo or chatterbox-nano from the Hugging Face hub or its cache), or the
            path of a voice folder.
        variant: ``"english"``, or ``"multilingual"``, ``"turbo"`` or ``"nano"``, which chatterbox-streaming does not
            have. Files are named as released (`kinds.KINDS`): ``t3_cfg``, ``s3gen``, ``ve``, ``tokenizer.json`` and
            ``conds.pt``; ``t3_mtl23ls_v2`` or ``_v3`` with ``grapheme_mtl_merged_expanded_v1.json`` for Multilingual;
            ``t3_turbo_v1`` or ``t3_nano_v1`` with ``s3gen_meanflow`` and the files of a GPT-2 tokenizer for these.
            Weights may be safetensors or pt.
        device: ``"auto"`` is CUDA if there is one, else MPS, else the CPU; or any torch device.
        dtype: of T3's weights: float32, bfloat16 or float16. S3Gen stays in float32.
        seed: of random weights, and, in the fork, of the noise that the flow starts from.
        watermark: upstream's PerTh watermark on every chunk; False leaves it out and does not need ``perth``.

    Raises:
        ValueError: an unknown model, device, dtype or seed, or a checkpoint whose keys or shapes do not fit.
        FileNotFoundError: a missing folder, file or network, with what was looked for and how to go on.
        ModuleNotFoundError: the watermark is wanted and its package, ``resemble-perth``, is missing or incomplete; or
            pyloudnorm, for Turbo and Nano.
    """
    kind = _kind(variant, model)
    perth = getattr(tts_module, "perth", None)  # chatterbox-light has no watermark
    if watermark and perth is not None and perth.PerthImplicitWatermarker is None:
        missing = "watermark=True: resemble-perth is not installed, or without its parts"
        raise ModuleNotFoundError(f"{missing}; pip install resemble-perth, or load(..., watermark=False)")
    device, dtype = pick_device(device), _dtype(dtype)
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise ValueError(f"seed={seed!r}: must be a whole number, at least 0")
    folder = None if isinstance(model, str) and model in _RANDOM else _folder(model, kind)
    if dtype == torch.bfloat16:
        warn_of_emulation("load(dtype='bfloat16')", "dtype='float32' is what T3 was released in.", device)
    sizes = replace(TINY, **kind.tiny) if model == "tiny" else ModelConfig(**kind.sizes, trained=folder is not None)
    config = sizes if folder is None else ModelConfig.read(folder / "config.json", sizes)
    if folder is not None:
        complete(folder, kind, config.clone)
    with torch.random.fork_rng(devices=[]), building():
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed the GPU's generators as well
        tts = assemble(config, None if folder is None else folder / kind.tokenizer[0][0], watermark, variant)
        if folder is None:
            tts.conds = random_conditionals(tts.t3.hp, kind)
        else:
            fill(tts, folder)
        return place(tts, device, dtype)


def _kind(variant: str, model: str | Path) -> Kind:
    if variant not in KINDS:
        raise ValueError(f"variant={variant!r}: must be one of {', '.join(map(repr, KINDS))}")
    if model == "lab" and variant != "english":
        others = ", ".join(map(repr, MODELS[1:]))
        raise ValueError(f"variant={variant!r}: the lab voice speaks English; take one of {others} or a folder")
    KINDS[variant].home()
    return KINDS[variant]


def pick_device(device: str) -> str:
    """The device meant: CUDA, MPS or the CPU for ``auto``. Raises ValueError for one that is not here."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        kind = torch.device(device).type
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device={device!r}: not available here ({reason}); 'auto' takes what there is") from error
    if kind not in ("cuda", "mps", "cpu"):
        raise ValueError(f"device={device!r}: must be 'auto', 'cuda', 'mps' or 'cpu'")
    return device


def _dtype(dtype: str | torch.dtype) -> torch.dtype:
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise ValueError(f"dtype={dtype!r}: must be one of {', '.join(DTYPES)}")
    return getattr(torch, name)


def _folder(model: str | Path, kind: Kind) -> Path:
    if not isinstance(model, (str, Path)) or not str(model).strip():
        raise ValueError(f"model={model!r}: must be one of {', '.join(MODELS)} or the path of a voice folder")
    if model == "pretrained":
        return _download(kind)
    folder = LAB_VOICE if model == "lab" else Path(model)
    if folder.is_dir():
        return folder
    if model == "lab":
        raise FileNotFoundError("model='lab': the trained voice is not in data/lab; 'tiny' needs no files")
    raise FileNotFoundError(f"model={str(model)!r}: must be one of {', '.join(MODELS)} or an existing voice folder")


def _download(kind: Kind) -> Path:
    patterns = kind.downloads
    try:
        return Path(snapshot_download(kind.hub, allow_patterns=patterns))
    except Exception as error:  # the hub raises many kinds: no network, no cache, no such revision
        raise FileNotFoundError(
            f"model='pretrained': {', '.join(patterns)} of {kind.hub} are neither in the Hugging Face cache nor can be "
            f"fetched ({type(error).__name__}). Offline: copy these files to a folder and load('that/folder'), "
            f"or go on with 'lab' (a small voice that ships here) or 'random' (same costs, no speech)."
        ) from error


def place(tts: LabTTS, device: str, dtype: torch.dtype) -> LabTTS:
    """The model moved to a device, T3 in this dtype, ready for inference."""
    rotary = getattr(tts.t3.tfmr, "rotary_emb", None)  # GPT-2 has learned its positions
    frequencies = None if rotary is None else rotary.inv_freq.clone()
    tts.t3.to(device=device, dtype=dtype).eval()
    if rotary is not None:
        rotary.inv_freq = frequencies.to(device)  # RoPE's angles lose whole positions when rounded to 16 bits
    tts.s3gen.to(device).eval()
    if tts.ve is not None:
        tts.ve.to(device).eval()
    tts.device = device
    if tts.conds is not None:
        tts.conds.t3.to(device=device, dtype=dtype)
        tts.conds.to(device)
    return tts
