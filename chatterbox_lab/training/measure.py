"""Measures a finished voice of this recipe: the held-out sentences read by it, and what was understood."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..engine.settings import whole_number
from ..study import command
from ..study.logs import quiet
from ..study.records import output_folder
from ..voices.load import load, pick_device
from . import evaluate


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of ``chatterbox-lab words``."""
    command.add_model(parser, "lab", "lab")
    command.add_device(parser)
    parser.add_argument("--sentences", type=int, metavar="X", default=100, help="of data/heldout.txt (default: 100)")
    scored = "of these, how many listeners score, which takes as long as all the rest (default: 20)"
    parser.add_argument("--scored", type=int, metavar="X", default=20, help=scored)
    parser.add_argument("--output", type=Path, metavar="X", help="CSV to write (default: build/data/quality_MODEL.csv)")


def run(options: argparse.Namespace) -> int:
    """Reads the sentences with a model, writes what was understood, and prints word error rates and scores."""
    sentences, scored = whole_number("sentences", options.sentences, 1), whole_number("scored", options.scored, 0)
    device = pick_device(options.device)
    path = options.output or output_folder("data") / f"quality_{command.model_name(options)}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    with quiet():
        tts = load(options.model, device=device, watermark=False)
        table = evaluate.measure(tts, path, evaluate.held_out(sentences), scored=scored)
    print(evaluate.summary(table).to_markdown(floatfmt=".3f"))
    print(f"\n{len(table)} rows are in {path.name}.")
    return 0
