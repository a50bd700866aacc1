"""Variants that are compared take turns, to and fro, so that a slow spell of the machine falls on all of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

Variant = TypeVar("Variant")


def to_and_fro(variants: Iterable[Variant], turn: int) -> list[Variant]:
    """The variants in the order of this turn: forwards in even turns, backwards in odd ones.

    A machine that slows down steadily makes the last of each turn look slow; with every second turn reversed, each
    variant is as often early as late. A turn below 0 warms up, and its times are left out.
    """
    return list(variants)[:: -1 if turn % 2 else 1]
