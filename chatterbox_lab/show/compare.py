"""Recordings side by side in a notebook, each with its waveform and its seams."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Mapping, Sequence
from html import escape
from io import BytesIO

import numpy as np
import soundfile
import torch
from IPython.display import HTML

from ..engine.stream import pcm16
from .colors import SEAM

_COLUMNS = 400  # of a waveform
_CARD = """<figure style="flex: 1 1 15em; margin: 0; min-width: 0">
<figcaption style="overflow-wrap: anywhere"><b>{name}</b><br>{note}</figcaption>
<svg viewBox="0 0 {width} 2" preserveAspectRatio="none" role="img" aria-label="waveform of {name}, {seams} seams"
 style="width: 100%; height: 64px; margin: 4px 0"><path d="{wave}" fill="currentColor" opacity="0.6"/>
<path d="{lines}" stroke="{color}" stroke-width="1.5" stroke-dasharray="4 3" vector-effect="non-scaling-stroke"/></svg>
<audio controls style="width: 100%" src="{source}"></audio></figure>"""


def recordings(
    spoken: Mapping[str, Sequence[torch.Tensor]], sample_rate: int = 24000, notes: Mapping[str, str] | None = None
) -> HTML:
    """Recordings side by side, with their waveforms and the seams between their chunks; needs no kernel to be heard.

    Args:
        spoken: by name, the chunks of each, (1, samples), float32; all are drawn to one scale of time and level.
        sample_rate: samples per second.
        notes: a line to stand under a name.

    Raises:
        ValueError: nothing to compare, or a recording without audio.
    """
    empty = [name for name, chunks in spoken.items() if not sum(chunk.shape[1] for chunk in chunks)]
    if empty or not spoken:
        raise ValueError(f"spoken={list(spoken)}: every recording needs audio" + f", {empty} have none" * bool(empty))
    waves = {name: torch.cat(list(chunks), dim=1)[0].clamp(-1, 1).numpy() for name, chunks in spoken.items()}
    longest = max(len(wave) for wave in waves.values())
    loudest = max(np.abs(wave).max() for wave in waves.values()) or 1
    cards = []
    for name, wave in waves.items():
        seams = np.cumsum([chunk.shape[1] for chunk in spoken[name]])[:-1] / longest * _COLUMNS
        edges = np.linspace(0, len(wave), round(_COLUMNS * len(wave) / longest) + 1)[:-1].astype(int)
        level = np.maximum.reduceat(np.abs(wave), edges) / loudest
        drawn = {
            "wave": " ".join(f"M{x} {1 - y:.3f}h1V{1 + y:.3f}h-1z" for x, y in enumerate(level)),
            "lines": " ".join(f"M{x:.1f} 0V2" for x in seams),
            "source": f"data:audio/flac;base64,{b64encode(flac(torch.from_numpy(wave), sample_rate)).decode()}",
        }
        texts = {"name": escape(name), "note": escape((notes or {}).get(name, ""))}
        cards.append(_CARD.format(**texts, **drawn, width=_COLUMNS, seams=len(seams), color=SEAM))
    return HTML(f'<div style="display: flex; flex-wrap: wrap; gap: 12px 20px">{"".join(cards)}</div>')


def flac(audio: torch.Tensor, rate: int) -> bytes:
    """Audio (1, samples) or (samples,) as a FLAC file of 16-bit samples: half of a WAV, and every browser plays it."""
    buffer = BytesIO()
    soundfile.write(buffer, pcm16(audio), rate, format="FLAC", subtype="PCM_16")
    return buffer.getvalue()
