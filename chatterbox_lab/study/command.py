"""What all commands of ``chatterbox-lab`` share: options, how a record goes on, errors, interrupts, exit status.

A command is a module with two functions, and a line in the table of ``chatterbox_lab/__main__.py``::

    def add_options(parser: argparse.ArgumentParser) -> None:
        command.add_model(parser)                        # --model
        command.add_device(parser)                       # --device
        command.add_record(parser, "sweep_MODEL.csv")    # --output, --resume
        parser.add_argument("--rounds", type=int, default=3, help="measured rounds (default: %(default)s)")

    def run(options: argparse.Namespace) -> int:
        rounds = whole_number("rounds", options.rounds, 1)       # a ValueError is a usage error, status 2
        device = pick_device(options.device)
        record = command.open_record(options, f"sweep_{command.model_name(options)}.csv")
        ...                                                      # Ctrl-C: how the record goes on, status 130
        return int(failed)                                       # the exit status

A test calls it as a user does: ``main(["sweep", "--rounds", "2"])`` with `chatterbox_lab.__main__.main`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .records import Record

INTERRUPTED = 130
"""The exit status after Ctrl-C, as shells have it."""


def add_model(parser: argparse.ArgumentParser, default: str = "tiny", models: str = "") -> None:
    """Adds ``--model``; ``models`` names those that make sense where not all do."""
    from ..voices.load import MODELS  # imports PyTorch, which the list of commands does without

    known = models or ", ".join(MODELS)
    parser.add_argument(
        "--model", metavar="X", default=default, help=f"{known} or a model's folder (default: {default})"
    )


def add_device(parser: argparse.ArgumentParser, **how: Any) -> None:
    """Adds ``--device``; ``how`` is passed on to ``add_argument``."""
    usual = {"default": "auto", "help": "auto, cuda, mps or cpu (default: auto)"}
    parser.add_argument("--device", metavar="X", **usual | how)


def add_record(parser: argparse.ArgumentParser, name: str) -> None:
    """Adds ``--output`` and ``--resume`` for a record that is called ``name`` unless the user says otherwise."""
    parser.add_argument("--output", metavar="X", type=Path, help=f"CSV to write (default: build/data/{name})")
    parser.add_argument(
        "--resume", action="store_true", help="go on with an interrupted record, or add to a finished one"
    )


def model_name(options: argparse.Namespace) -> str:
    """The model in the names of records: a word, or the last part of a folder's path."""
    return Path(options.model).name


def open_record(options: argparse.Namespace, name: str) -> Record:
    """The record at ``--output``, or ``build/data/name``, gone on with where ``--resume`` says so.

    Raises:
        ValueError: it has unfinished rows and ``--resume`` is missing.
    """
    from .records import Record, output_folder  # imports pandas

    options.record = Record(options.output or output_folder("data") / name, options.resume)
    return options.record


def call(run: Callable[[argparse.Namespace], int], options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Runs a command and returns its exit status: 130 after Ctrl-C.

    A ValueError or a missing file or package is the user's to mend: its text is shown as ``parser`` shows a wrong
    option, and ends the process with status 2.
    """
    try:
        return run(options)
    except (ValueError, FileNotFoundError, ModuleNotFoundError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        record = getattr(options, "record", None)
        print("\nStopped.", record.hint() if record else "")
        return INTERRUPTED
