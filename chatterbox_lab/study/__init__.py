"""Instruments: what is measured, and what follows from it."""

from .. import released as released
