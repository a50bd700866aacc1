"""Paths in ``data/``, files that are written whole or not at all, one attribute changed and put back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path`` that takes its place on success and is gone on failure."""
    part = path.with_name(f".{path.stem}.part{path.suffix}")
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def attribute(owner: Any, name: str, value: Any) -> Iterator[None]:
    """An attribute of this one object (or module), put back as it was afterwards."""
    missing = object()
    before = vars(owner).get(name, missing)
    setattr(owner, name, value)
    try:
        yield
    finally:
        delattr(owner, name)
        if before is not missing:
            setattr(owner, name, before)


def check_recording(path: str | Path) -> None:
    """Raises ValueError unless ``path`` is a recording that can be read, of a second or more."""
    import soundfile  # half a second to import, for the few who clone a voice

    if not isinstance(path, (str, Path)) or not Path(path).is_file():
        raise ValueError(f"audio_prompt_path={str(path)!r}: no such file")
    try:
        seconds = soundfile.info(str(path)).duration
    except soundfile.LibsndfileError as error:
        raise ValueError(f"audio_prompt_path={str(path)!r}: not readable as audio ({error})") from error
    if seconds < 1:
        raise ValueError(f"audio_prompt_path={str(path)!r}: {seconds:.2f} s long, must be at least 1 s")
