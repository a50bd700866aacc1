"""Paths in ``data/``, files that are written whole or not at all, one attribute changed and put back, extras."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
_PACKED = Path(__file__).resolve().parent / "data"
DATA = _PACKED if _PACKED.is_dir() else REPOSITORY / "data"
"""What a wheel has of ``data/``, inside the package; all of it in a checkout."""
LAB_VOICE = DATA / "lab"
"""The folder of the trained voice."""

_NOTEBOOKS = """anywidget IPython ipywidgets jiwer joblib jupyterlab matplotlib onnxruntime pandas papermill
pocketsphinx seaborn speechmos tabulate tqdm traitlets"""
EXTRAS = dict.fromkeys(_NOTEBOOKS.split(), "notebooks") | {"wordfreq": "train"}
"""Which extra of pyproject.toml brings what is not needed to speak, by the name that is imported."""


class NotInstalledError(ModuleNotFoundError):
    """A package that an extra brings is missing; the text says which, and how to install it."""


@contextmanager
def extras_named() -> Iterator[None]:
    """Where a package of an extra is missing, raises `NotInstalledError`, which names the extra."""
    try:
        yield
    except ModuleNotFoundError as error:
        missing = (error.name or "").split(".")[0]
        if isinstance(error, NotInstalledError) or missing not in EXTRAS:
            raise
        extra = f'pip install "chatterbox-lab[{EXTRAS[missing]}]"'
        text = f"{missing} is not installed; what needs it comes with the extra {EXTRAS[missing]!r}: {extra}"
        raise NotInstalledError(text, name=missing) from None


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
