"""One style for every figure, readable in black and white, with what it was measured on inside the file."""

from .chunks import *  # noqa: F403
