"""The one command line: ``chatterbox-lab NAME ...``, or ``python -m chatterbox_lab NAME ...``.

A command's module is imported when it is called, so that the list of them is there at once.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NamedTuple

from .files import NotInstalledError, extras_named


class Command(NamedTuple):
    """A command: its module (with ``add_options`` and ``run``), what it does in a line, and its options in use."""

    module: str
    does: str
    example: str


COMMANDS = {
    "speak": Command("show.speak", "say a text: the first sound, its RTF and its first chunk", '"Hello there." --play'),
    "diagnose": Command("show.report", "a page about what makes a model slow on this machine", "--model lab --quick"),
    "measure": Command(
        "study.campaign", "the whole campaign for a machine, most valuable first", "--model tiny --minutes 1"
    ),
    "selftest": Command("study.selftest", "whether every backend is right on this device", "--model tiny --tokens 60"),
    "streams": Command(
        "study.benchmark", "upstream's generator and ours side by side", "--model random --chunk-size 25 50 --check"
    ),
    "layers": Command(
        "study.layers", "T3's steps layer by layer, in every analyzer mode", "--model random --lengths 256"
    ),
    "t3": Command("study.t3_ladder", "T3's decoding rung by rung, down to the memory's speed", "--model random"),
    "s3gen": Command("study.s3gen_ladder", "S3Gen's rendering rung by rung", "--model random --chunk-size 25 50"),
    "parts": Command("study.s3gen_parts", "S3Gen's vocoder and encoder alone, released and ours", "--model random"),
    "sweep": Command(
        "study.sweep",
        "a grid of stream settings, chunk by chunk",
        "--model lab --chunk-size 10 25 50 --backend hf static",
    ),
    "calls": Command(
        "study.calls", "what upstream's calls do to those after them in one process", "--model lab --after 0 5 20"
    ),
    "trials": Command("study.trials", "what recogniser and listeners say of every way to render", "--sentences 10"),
    "paragraphs": Command(
        "study.paragraphs", "long texts whole, in utterances and sentence by sentence", "--paragraphs 10"
    ),
    "word-times": Command(
        "study.word_times", "when a stream tells each word, against its audio", "--model lab --sentences 10"
    ),
    "aligner": Command("training.aligner", "how far the judge of word-times is off itself", "--sentences 10"),
    "words": Command("training.measure", "how well a voice of the recipe reads sentences it never saw", "--model lab"),
    "releases": Command(
        "study.releases", "what other releases of transformers do (downloads them)", "--cache build/releases"
    ),
    "living": Command(
        "study.living", "today's releases of Chatterbox, stock against ours (downloads them)", "--model tiny"
    ),
    "predict": Command(
        "study.predict", "what a GPU would do, predicted, and beside it what was measured", "--card H100 --tokens 50"
    ),
    "train": Command("training.__main__", "the recipe of the lab voice, a stage a call", "text --smoke"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit status: 0, 1 where something failed, 130 after Ctrl-C; 2 is raised."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    top = argparse.ArgumentParser(
        prog="chatterbox-lab",
        description="Chatterbox TTS in a stream: speak, measure, train.",
        epilog=f"example: chatterbox-lab speak {COMMANDS['speak'].example} (NAME --help says more about each)",
    )
    named = top.add_subparsers(dest="name", metavar="NAME", required=True)
    parsers = {
        name: named.add_parser(
            name,
            help=one.does,
            description=one.does[0].upper() + one.does[1:] + ".",
            epilog=f"example: chatterbox-lab {name} {one.example}",
        )
        for name, one in COMMANDS.items()
    }
    if not arguments or arguments[0] not in COMMANDS:
        top.parse_args(arguments)  # --help, or an error
        return 0
    name = arguments[0]
    try:
        with extras_named():
            from .study import command  # needs a Chatterbox, which the list of commands does without

            module = import_module(f"chatterbox_lab.{COMMANDS[name].module}")
            module.add_options(parsers[name])
    except NotInstalledError as missing:
        parsers[name].error(str(missing))
    return command.call(extras_named()(module.run), top.parse_args(arguments), parsers[name])


if __name__ == "__main__":
    sys.exit(main())
