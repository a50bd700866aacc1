"""The voice's card: what it was trained on, for how long, what it can do and what it cannot, all of it computed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from ..files import written_whole
from ..study.machine import machine_facts
from . import evaluate
from .corpus import TEACHER, Utterance
from .text import words
from .tokens import CODES

_TEXT = """# The lab voice

A small Chatterbox that this repository trained from nothing, so that a laboratory about hearing speech can speak
without a network. It has upstream's own classes in small sizes, in the released layout; `lab.load("lab")` loads it. It
is a subject for experiments, not a product: one voice, one way of speaking.

- **Sizes.** {millions:.1f} million weights in float16, {megabytes:.1f} MB with its tokenizer. T3 has {layers} layers of
  width {width}, so it has the layers that the alignment analyzers read (9, 12 and 13). They were taught to look at the
  phone that is being said.
- **Teacher.** The voice `{teacher}` of flite, CMU's free synthesiser. The lab voice sounds like its teacher: a
  man, and a machine.
- **Text.** {sentences} example sentences of WordNet 3.0 ({words} words, {vocabulary} different ones, {hours:.1f} hours
  of speech). The {held_out} sentences of `data/heldout.txt` are not among them.
- **Vocabulary.** Open. Its tokenizer holds the pronunciation of {lexicon} common words, as flite says them. T3 gets any
  other word in letters and reads it less well. Digits and abbreviations are not spelled out: write them as words.
- **Length.** It speaks best one sentence at a time. In several at once it repeats words (`paragraph` below).
- **Speech tokens.** Phones, not the released voice's codes: a token names the phones of its two mel frames and one of
  three pitch levels, {codes} codes of the 6,561. So the voice cannot clone, and another S3Gen cannot read its tokens.
- **Training.** {training}, on {machine},
  on one or two threads.{begun} The recipe below gives T3 several sentences at once from the first step on; the T3 that
  ships got them from step 1,500 on.
- **Licence.** MIT, as the repository's. flite and its voices are free for any use (Carnegie Mellon University),
  WordNet's licence lets its text be used with its notice (WordNet 3.0, Copyright 2006 by Princeton University), and
  the choice of common words is `wordfreq`'s (CC BY-SA 4.0).

## What it can do

It read held-out sentences, seed {seed}, streamed at chunk 25. The word error rate (WER) is by pocketsphinx with its
general English model; PLCMOS and DNSMOS are by speechmos, on the first twenty sentences.

{quality}

`teacher` is flite itself. `vocoder` is flite's mel through HiFT, `tokens` its speech tokens through S3Gen, without T3.
`stream` is the whole voice, `paragraph` the whole voice on {paragraph} sentences at once. All rows are in
`quality.csv`, the stages' losses in `training_*.csv`.

## Make it again

You need flite and WordNet (`apt install flite wordnet-base`) and the package's `train` extra. Each stage is one command
and goes on where Ctrl-C stopped it. They meet in `build/lab`.

```sh
lab=".venv/bin/python -m chatterbox_lab"
$lab train text     # sentences, lexicon, text tokenizer
$lab train corpus   # the teacher reads them: speech, mel, phones, pitch; 9 minutes on 2 cores
$lab train t3       # text to speech tokens
$lab train flow     # speech tokens to mel
$lab train vocoder  # mel to speech
$lab train voice    # writes the folder data/lab
$lab train measure  # reads the held-out sentences, writes this card
```

`--smoke` runs a stage in seconds with tiny sizes. `--steps`, `--batch` and `--rate` change the plan. `--voice data/lab`
goes on from a finished voice where there is no checkpoint.
"""


def facts(items: list[Utterance], folder: Path) -> dict[str, Any]:
    """What the corpus in ``folder`` was, for the card."""
    spoken = [word for item in items for word in words(item.text)]
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    replaced = [rule for rule in tokenizer["normalizer"]["normalizers"] if rule["type"] == "Replace"]
    return {
        "sentences": len(items), "words": len(spoken), "vocabulary": len(set(spoken)),
        "hours": sum(len(item.mel) for item in items) / 50 / 3600, "lexicon": len(replaced), "machine": _machine(),
        "begun": {path.stem: torch.load(path, weights_only=True)["begun"] for path in sorted(folder.glob("*.pt"))},
    }  # fmt: skip


def _machine() -> str:
    found = machine_facts()
    return f"{found['cores']} cores of {found['machine']}"


def write(voice: Path) -> None:
    """Writes ``README.md`` of a voice's folder from its ``corpus.json``, logs, weights and ``quality.csv``."""
    table = evaluate.read(voice / "quality.csv")
    config = json.loads((voice / "config.json").read_text())
    stored = [voice / name for name in ("t3_cfg.safetensors", "s3gen.safetensors", "tokenizer.json", "conds.pt")]
    logs = {path.stem.removeprefix("training_"): pd.read_csv(path) for path in sorted(voice.glob("training_*.csv"))}
    times = [
        f"{name} {log['step'].iloc[-1]:.0f} steps in {log['seconds'].iloc[-1] / 60:.0f} min"
        for name, log in logs.items()
    ]
    facts = json.loads((voice / "corpus.json").read_text())
    begun = ", ".join(f"{name} at step {step}" for name, step in facts.pop("begun").items() if step)
    told = "\n  Training went on from an earlier finished voice, in float16 (`--voice`): {}." if begun else ""
    text = _TEXT.format(
        **facts, begun=told.format(begun), teacher=TEACHER, codes=f"{CODES:,}",
        millions=sum(path.stat().st_size for path in stored[:2]) / 2e6,
        megabytes=sum(path.stat().st_size for path in stored) / 1e6, layers=config["t3_layers"],
        width=config["t3_size"], held_out=len(evaluate.held_out()), seed=table["seed"].iloc[0],
        training=", ".join(times), paragraph=evaluate.PARAGRAPH, quality=evaluate.markdown(table),
    )  # fmt: skip
    with written_whole(voice / "README.md") as part:
        part.write_text(text)
