"""Makes the lab voice, a stage a call: text, corpus, t3, flow, vocoder, voice. Each goes on where it stopped.

The stage ``measure`` then reads the held-out sentences with the voice and writes what was understood into its folder.
``chatterbox-lab train STAGE`` and ``python -m chatterbox_lab.training STAGE`` are the same.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import pandas as pd
import tokenizers
import torch

from ..files import REPOSITORY, written_whole
from ..study import command
from ..voices import config
from ..voices.folder import save
from ..voices.load import load
from . import card, corpus, evaluate, flow, t3, text, vocoder, voice
from .loop import Plan, Stage

PLANS = {
    "t3": Plan(steps=5200, batch=16, rate=2e-3, warmup=150),
    "flow": Plan(steps=6000, batch=8, rate=1.5e-3),
    "vocoder": Plan(steps=6000, batch=8, rate=1e-3, warmup=20, average=0.995),
}
HELD_BACK = 64  # utterances at the corpus's end that no stage learns from


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of ``chatterbox-lab train``."""
    folder, voice_folder = REPOSITORY / "build" / "lab", REPOSITORY / "data" / "lab"
    add = partial(parser.add_argument, metavar="X")
    parser.add_argument("stage", choices=STAGES, metavar="STAGE", help="%(choices)s, in this order")
    add("--folder", type=Path, default=folder, help="where the stages meet (default: build/lab)")
    add("--steps", type=_positive, help="of training, instead of the recipe's")
    add("--batch", type=_positive, help="examples a step, instead of the recipe's")
    add("--rate", type=float, help="highest learning rate, instead of the recipe's")
    add("--voice", type=Path, help="a finished model to go on from, where there is no checkpoint")
    add("--sentences", type=_positive, default=16000, help="that the teacher reads (default: 16000)")
    add("--lexicon", type=_positive, default=25000, help="words with known phones (default: 25000)")
    add("--jobs", type=_positive, default=2, help="processes that make the corpus (default: 2)")
    add("--threads", type=_positive, default=torch.get_num_threads(), help="of a training stage")
    add("--to", type=Path, default=voice_folder, help="the model's folder (default: data/lab)")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, a few steps: does the recipe run?")


def run(options: argparse.Namespace) -> int:
    """Runs a stage."""
    torch.set_num_threads(options.threads)
    STAGES[options.stage](options)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """``python -m chatterbox_lab.training``; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m chatterbox_lab.training", description=__doc__)
    add_options(parser)
    return command.call(run, parser.parse_args(arguments), parser)


def _positive(value: str) -> int:
    number = int(value)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{value}: must be at least 1")
    return number


def _text(options: argparse.Namespace) -> None:
    sizes = (6, 300) if options.smoke else (options.sentences, options.lexicon)
    text.prepare(options.folder, *sizes)


def _corpus(options: argparse.Namespace) -> None:
    corpus.make(options.folder, options.jobs)


def _train(name: str) -> Callable[[argparse.Namespace], None]:
    def train(options: argparse.Namespace) -> None:
        plan = _plan(name, options)
        items = corpus.load(options.folder, speech=name == "vocoder")
        held = min(HELD_BACK, len(items) // 4)
        module = voice.parts(_config(options))[name]
        log = _resumed(name, module, options.voice) if options.voice else None
        stage = Stage(name, module, plan, options.folder, log)
        losses, check = _BATCHES[name](options, stage, items[:-held], items[-held:])
        stage.run(losses, check)

    return train


def _resumed(name: str, module: torch.nn.Module, folder: Path) -> list[dict[str, float]]:
    voice.resume(name, module, load(folder, device="cpu", watermark=False))
    return pd.read_csv(folder / f"training_{name}.csv").to_dict("records")


def _plan(name: str, options: argparse.Namespace) -> Plan:
    given = {key: value for key in ("steps", "batch", "rate") if (value := getattr(options, key)) is not None}
    smoke = {"steps": 2, "batch": 2, "every": 1} if options.smoke else {}
    return replace(PLANS[name], **smoke | given)


def _config(options: argparse.Namespace) -> config.ModelConfig:
    return voice.SMALL if options.smoke else voice.LAB


def _t3(options: argparse.Namespace, stage: Stage, items: list, held: list) -> tuple:
    vocabulary = tokenizers.Tokenizer.from_file(str(options.folder / "tokenizer.json")).get_vocab()
    lexicon = json.loads((options.folder / "lexicon.json").read_text())
    codec = t3.text_codec(vocabulary, lexicon, stage.module)
    batches, unseen = t3.Batches(items, codec, stage.plan.batch), t3.Batches(held, codec, min(16, len(held)))

    @torch.no_grad()
    def check() -> dict[str, float]:
        found = t3.losses(stage.averaged, unseen(0, spelled=0, several=False), training=False)
        letters = t3.losses(stage.averaged, unseen(0, spelled=1, several=False), training=False)
        return {"held_out": float(found["entropy"]), "held_out_letters": float(letters["entropy"])}

    return lambda step: t3.losses(stage.module, batches(step)), check


def _flow(options: argparse.Namespace, stage: Stage, items: list, held: list) -> tuple:
    batches, unseen = flow.Batches(items, stage.plan.batch), flow.Batches(held, 8)
    return lambda step: flow.losses(stage.module, *batches(step)), _unseen(stage, flow.losses, unseen)


def _vocoder(options: argparse.Namespace, stage: Stage, items: list, held: list) -> tuple:
    batches, unseen = vocoder.Batches(items, stage.plan.batch), vocoder.Batches(held, 8)
    return lambda step: vocoder.losses(stage.module, *batches(step)), _unseen(stage, vocoder.losses, unseen)


def _unseen(stage: Stage, losses: Callable, batches: Callable) -> Callable[[], dict[str, float]]:
    @torch.no_grad()
    def check() -> dict[str, float]:
        torch.manual_seed(0)
        return {f"held_out_{name}": float(value) for name, value in losses(stage.averaged, *batches(0)).items()}

    return check


def _voice(options: argparse.Namespace) -> None:
    items = corpus.load(options.folder, speech=False)
    tts = voice.assemble(options.folder, _config(options), voice.prompt_of(items))
    save(tts, options.to, half=True)
    with written_whole(options.to / "corpus.json") as part:
        part.write_text(json.dumps(card.facts(items, options.folder), indent=1) + "\n")
    for name in _BATCHES:
        if (options.folder / f"{name}.csv").exists():
            shutil.copy(options.folder / f"{name}.csv", options.to / f"training_{name}.csv")
    print(f"{options.to}: {sum(file.stat().st_size for file in options.to.iterdir()) / 1e6:.1f} MB")


def _measure(options: argparse.Namespace) -> None:
    sentences = evaluate.held_out(2 if options.smoke else None)
    tts = load(options.to, device="cpu", watermark=False)
    table = evaluate.measure(tts, options.to / "quality.csv", sentences, scored=0 if options.smoke else 20)
    card.write(options.to)
    print(evaluate.summary(table).to_markdown(floatfmt=".3f"))


_BATCHES = {"t3": _t3, "flow": _flow, "vocoder": _vocoder}
STAGES = (
    {"text": _text, "corpus": _corpus}
    | {name: _train(name) for name in _BATCHES}
    | {"voice": _voice, "measure": _measure}
)

if __name__ == "__main__":
    sys.exit(main())
