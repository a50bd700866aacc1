"""A model's folder in the released layout: weights, tokenizer, voice and sizes, read and written."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from chatterbox.models.t3.modules.cond_enc import T3Cond
from safetensors.torch import load_file, save_file

from ..files import written_whole
from .kinds import Kind, LabTTS, write_tokenizer

# Computed when the classes are built, so a checkpoint need not hold them (S3Tokenizer.ignore_state_dict_missing).
_COMPUTED = ("_mel_filters", "window")
# GPT-2's own embedding of words, which released weights hold and T3 does without (ChatterboxTurboTTS.from_local).
_UNUSED = "tfmr.wte.weight"


def complete(folder: Path, kind: Kind, clone: bool) -> None:
    """Raises FileNotFoundError for the first file that a model of this kind lacks; ``clone`` as in `ModelConfig`."""
    weights = [kind.t3, (kind.s3gen,)] + [("ve",)] * clone
    for names in (*kind.tokenizer, *map(_files, weights)):
        find(folder, *names)


def _files(names: Sequence[str]) -> list[str]:
    return [f"{name}{ending}" for name in names for ending in (".safetensors", ".pt")]


def fill(tts: LabTTS, folder: Path) -> None:
    """Loads weights and voice of a folder into a model of its sizes. Raises ValueError or FileNotFoundError."""
    parts = {tts.kind.t3: tts.t3, (tts.kind.s3gen,): tts.s3gen} | ({("ve",): tts.ve} if tts.config.clone else {})
    for names, module in parts.items():
        _load_weights(module, folder, names)
    if (folder / "conds.pt").exists():
        found = _read_conds(folder / "conds.pt")
        tts.conds = tts.kind.home().Conditionals(T3Cond(**found["t3"]), found["gen"])


def _load_weights(module: torch.nn.Module, folder: Path, names: Sequence[str]) -> None:
    path = find(folder, *_files(names))
    name = path.stem
    state = _read(path)
    if "model" in state:  # the released t3_cfg.pt wraps its weights
        state = state["model"][0]
    _check_keys(module.state_dict(), state, f"{folder.name}/{name}")
    module.load_state_dict(state, strict=False)


def _read(path: Path) -> dict[str, Any]:
    """What a file of tensors holds; nothing in it is executed. Raises ValueError naming the file."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what unpickling junk can raise has no common base
        raise ValueError(f"{path}: not readable as tensors ({type(error).__name__})") from error


def _read_conds(path: Path) -> dict[str, Any]:
    found = _read(path)
    parts = {"t3": ("speaker_emb", "emotion_adv"), "gen": ("prompt_token", "prompt_feat", "embedding")}
    missing = [f"{part}.{key}" for part, keys in parts.items() for key in keys if key not in found.get(part, {})]
    if missing:
        raise ValueError(f"{path}: {_some('missing', missing)}")
    return found


def _check_keys(expected: dict[str, torch.Tensor], found: dict[str, torch.Tensor], where: str) -> None:
    missing = [key for key in expected if key not in found and not key.endswith(_COMPUTED)]
    unknown = [key for key in found if key not in expected and not key.endswith((*_COMPUTED, _UNUSED))]
    shapes = [
        f"{key} {tuple(found[key].shape)} instead of {tuple(tensor.shape)}"
        for key, tensor in expected.items()
        if key in found and found[key].shape != tensor.shape
    ]
    faults = [_some(kind, keys) for kind, keys in (("missing", missing), ("unknown", unknown), ("shape", shapes))]
    if any(faults):
        raise ValueError(f"{where}: does not fit the sizes in config.json: {'; '.join(filter(None, faults))}")


def _some(kind: str, keys: list[str]) -> str:
    more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
    return f"{kind}: {', '.join(keys[:3])}{more}" if keys else ""


def find(folder: Path, *names: str) -> Path:
    """The first of these files that is there; raises FileNotFoundError, with what the folder holds, for none."""
    found = next((folder / name for name in names if (folder / name).is_file()), None)
    if found is None:
        there = ", ".join(sorted(file.name for file in folder.iterdir())) or "nothing"
        raise FileNotFoundError(f"{folder}: no {' or '.join(names)}; the folder holds {there}")
    return found


def save(tts: LabTTS, folder: str | Path, *, half: bool = False) -> Path:
    """Writes a voice folder in the released layout (safetensors, config.json), each file whole or not at all.

    ``half`` stores the weights in float16, which `load` turns back into float32.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    modules = zip(tts.kind.weights, (tts.t3, tts.s3gen, tts.ve), strict=True)
    for name, module in modules:
        if module is not None:
            with written_whole(folder / f"{name}.safetensors") as part:
                save_file(_weights(module, half), part)
    with TemporaryDirectory(prefix=".tokenizer", dir=folder) as scratch:
        write_tokenizer(tts.kind, tts.tokenizer, Path(scratch))
        for file in Path(scratch).iterdir():
            file.replace(folder / file.name)
    with written_whole(folder / "config.json") as part:
        part.write_text(json.dumps(asdict(tts.config), indent=1) + "\n")
    if tts.conds is not None:
        with written_whole(folder / "conds.pt") as part:
            tts.conds.save(part)
    return folder


def _weights(module: torch.nn.Module, half: bool = False) -> dict[str, torch.Tensor]:
    """The module's own weights; upstream's inference hangs a second view of T3 into it as ``patched_model``."""
    own = {key: value for key, value in module.state_dict().items() if not key.startswith("patched_model.")}
    if hasattr(module, "is_gpt") and module.is_gpt:  # the release loads nothing without it
        own[_UNUSED] = torch.zeros(module.cfg.vocab_size, module.dim)
    stored = {key: value.half() if half and value.is_floating_point() else value for key, value in own.items()}
    return {key: value.detach().cpu().contiguous() for key, value in stored.items()}
