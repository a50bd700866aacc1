"""The page about one machine: what makes a model slow there, measured, as Markdown, HTML and in a notebook."""

from __future__ import annotations

import argparse
from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from html import escape
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from chatterbox.tts import ChatterboxTTS

from ..engine.settings import whole_number
from ..files import written_whole
from ..study import command
from ..study.diagnose import check, measure, use
from ..study.diagnosed import Numbers
from ..study.findings import HERE, Finding, findings, summary
from ..study.logs import quiet
from ..study.machine import in_words
from ..study.records import Record
from ..study.subject import EXACT, FASTEST, UPSTREAM
from ..voices.load import DTYPES, load, pick_device
from . import compare
from . import report_figures as drawn
from .report_sections import Block, Code, Judged, Picture, Table, failures, sections

MOST_BYTES = 2**20
"""Of the HTML; where three players would make it larger, the last is left out."""
_SECONDS = 4.0  # of speech in a player
_RATE = 24000
_PLAYERS = {UPSTREAM: "Before: upstream's stream", EXACT: "After: ours, exact", FASTEST: "Ours, fastest: another sound"}
_CSV = "report.csv"


@dataclass
class Report:
    """One diagnosis as a page.

    Args:
        rows: from `study.diagnose.measure`.
        audio: FLAC files of a stream of each kind, by its name.
    """

    rows: Sequence[Mapping[str, Any]]
    audio: dict[str, bytes] = field(default_factory=dict)

    @cached_property
    def numbers(self) -> Numbers:
        """The rows, asked by name."""
        return Numbers(self.rows)

    @cached_property
    def findings(self) -> list[Finding]:
        """Every possible cause with its verdict, causes first."""
        return findings(self.numbers)

    @property
    def table(self) -> pd.DataFrame:
        """Every number."""
        return self.numbers.table

    @cached_property
    def title(self) -> str:
        """The model and the machine."""
        first = self.table.iloc[0]
        return f"Chatterbox ({first['model']}) on {in_words(first)}"

    @cached_property
    def on(self) -> str:
        """What it was measured on, in a line."""
        first = self.table.iloc[0]
        release = self.numbers.words("machine", "release") or ["Chatterbox"]
        parts = [
            release[0],
            f"T3 in {first['dtype']}",
            *(f"{name} {first[name]}" for name in ("torch", "transformers")),
        ]
        return ", ".join([*parts, f"commit {first['commit']}", str(first["date"])])

    @cached_property
    def pictures(self) -> dict[str, bytes]:
        """The figures as PNG, by their file's name without the ending; those that the rows bear."""
        return drawn.pictures(self.numbers, f"{self.title} | {self.on}")

    def markdown(self) -> str:
        """The page as Markdown, with the figures and recordings beside it."""
        parts = [f"# {self.title}", self.on]
        for heading, blocks in sections(self.numbers, self.findings):
            parts += [f"## {heading}", *filter(None, (self._markdown(block) for block in blocks))]
        return "\n\n".join(parts) + "\n"

    def _markdown(self, block: Block) -> str:
        if isinstance(block, str):
            return block
        if isinstance(block, list):
            return "\n".join(f"- {line}" for line in block)
        if isinstance(block, Picture):
            return f"![{block.shows}]({block.name}.png)" if block.name in self.pictures else ""
        if isinstance(block, Table):
            lines = [list(block.rows), ["---"] * len(block.rows.columns), *block.rows.to_numpy().tolist()]
            return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)
        if isinstance(block, Code):
            return f"```python\n{block.text}\n```"
        if isinstance(block, Judged):
            return f"### {_judged(block.finding)}"
        return "\n".join(f"- [{text}]({name}.flac)" for name, text in _PLAYERS.items() if name in self.audio)

    def html(self) -> str:
        """The page as one HTML file, at most `MOST_BYTES`, that loads nothing from elsewhere."""
        head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{escape(self.title)}'
        body = f'</title></head><body style="margin: 0">{self._repr_html_()}</body>'
        return f'<!doctype html>\n<html lang="en"><head>{head}{body}</html>\n'

    def _repr_html_(self) -> str:
        wanted = [name for name in _PLAYERS if name in self.audio]
        while len(found := self._body(wanted)) > MOST_BYTES - 2048 and wanted:
            wanted.pop()
        return found

    def _body(self, players: Sequence[str]) -> str:
        css = Path(__file__).with_name("report.css").read_text(encoding="utf-8")
        parts = [f"<h1>{escape(self.title)}</h1>", f'<p class="on">{escape(self.on)}</p>']
        for heading, blocks in sections(self.numbers, self.findings):
            if heading == "Summary":
                lines = "".join(f"<p>{escape(line)}</p>" for line in blocks[0])
                parts.append(f'<div class="lead">{lines}</div>')
                continue
            parts += [f"<h2>{escape(heading)}</h2>", *(self._html(block, players) for block in blocks)]
        return f'<div class="cbl-report"><style>{css}</style>{"".join(parts)}</div>'

    def _html(self, block: Block, players: Sequence[str]) -> str:
        if isinstance(block, str):
            return f"<p>{escape(block)}</p>"
        if isinstance(block, list):
            return f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in block)}</ul>"
        if isinstance(block, Picture):
            data = self.pictures.get(block.name)
            source = "" if data is None else f"data:image/png;base64,{b64encode(data).decode()}"
            return f'<img src="{source}" alt="{escape(block.shows)}">' if source else ""
        if isinstance(block, Table):
            return _table(block)
        if isinstance(block, Code):
            return f"<pre><code>{escape(block.text)}</code></pre>"
        if isinstance(block, Judged):
            one = block.finding
            kind = ' here"' if one.verdict == HERE else '"'
            told = ", ".join(filter(None, (one.verdict, one.told_share)))
            return f'<h3>{escape(one.cause)} <span class="verdict{kind}>{escape(told)}</span></h3>'
        sounds = (
            f'<figure><figcaption>{escape(_PLAYERS[name])}</figcaption><audio controls preload="metadata" '
            f'src="data:audio/flac;base64,{b64encode(self.audio[name]).decode()}"></audio></figure>'
            for name in players
        )
        return f'<div class="players">{"".join(sounds)}</div>' if players else ""

    def save(self, folder: str | Path) -> Path:
        """Writes ``report.md``, ``report.html``, figures and recordings; returns the HTML's path."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        files: dict[str, bytes] = {f"{name}.png": data for name, data in self.pictures.items()}
        files |= {f"{name}.flac": data for name, data in self.audio.items()}
        files |= {"report.md": self.markdown().encode(), "report.html": self.html().encode()}
        for name, data in files.items():
            with written_whole(folder / name) as part:
                part.write_bytes(data)
        return folder / "report.html"


def _judged(one: Finding) -> str:
    return ": ".join([one.cause, ", ".join(filter(None, (one.verdict, one.told_share)))])


def _table(block: Table) -> str:
    head = "".join(f"<th>{escape(str(name))}</th>" for name in block.rows)
    rows = (
        f"<tr>{''.join(f'<td>{escape(str(value))}</td>' for value in row)}</tr>"
        for row in block.rows.to_numpy().tolist()
    )
    kind = ' class="words"' if block.words else ""
    return (
        f'<div class="scroll"><table{kind}><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
    )


def flac(audio: torch.Tensor, rate: int) -> bytes:
    """Audio (1, samples) as a FLAC file of 16 bits, at most four seconds."""
    return compare.flac(audio[:, : round(_SECONDS * rate)], rate)


def diagnose(
    tts: ChatterboxTTS,
    output: str | Path | None = None,
    *,
    model: str = "given",
    quick: bool = False,
    resume: bool = False,
    seed: int = 0,
) -> Report:
    """Measures what makes this model slow on this machine, and makes a page of it; the model stays as it was.

    It takes about two minutes with the lab voice on two cores, ten with Chatterbox's own size. In a notebook the result
    shows itself.

    Args:
        tts: a model of chatterbox-streaming, also one that an application has used.
        output: a folder for ``report.html``, ``report.md``, ``report.csv`` with every number, figures and recordings.
            None writes nothing.
        model: its name on the page. What is called ``random`` makes noise, and the page has no players.
        quick: half of everything.
        resume: goes on with what an interrupt left in ``output``.
        seed: of every stream.

    Raises:
        TypeError: a model that is no Chatterbox.
        ValueError: names the argument, its value and what is allowed, before the model runs.
    """
    check(tts, quick, seed)
    record = None if output is None else open_record(Path(output), resume)
    try:
        return _made(tts, record, model, quick, seed)
    except KeyboardInterrupt:
        if record is not None:
            print("Stopped.", record.hint().replace("the same command with --resume", "diagnose(..., resume=True)"))
        raise


def open_record(folder: Path, resume: bool) -> Record:
    """The rows of a report in this folder. Raises ValueError where it is a file, or has rows of an interrupted one."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output={str(folder)!r}: must be a folder, is a file")
    return Record(folder / _CSV, resume)


def _made(tts: ChatterboxTTS, record: Record | None, model: str, quick: bool, seed: int) -> Report:
    audio: dict[str, bytes] = {}
    folder = None if record is None else record.path.parent
    if folder is not None and record.rows:  # gone on with: these are of the same model
        audio |= {name: path.read_bytes() for name in _PLAYERS if (path := folder / f"{name}.flac").is_file()}

    def keep(name: str, sound: torch.Tensor) -> None:
        if model == "random":  # noise
            return
        audio[name] = flac(sound, tts.sr)
        if folder is not None:
            (folder / f"{name}.flac").write_bytes(audio[name])

    rows = measure(tts, record, model=model, quick=quick, seed=seed, keep=keep)
    report = Report(rows, {name: audio[name] for name in _PLAYERS if name in audio})
    if record is not None:
        record.finish()
        report.save(folder)
    return report


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of ``chatterbox-lab diagnose``."""
    command.add_model(parser, "lab")
    command.add_device(parser)
    add = parser.add_argument
    add("--dtype", metavar="X", default="float32", choices=DTYPES, help="of T3: %(choices)s (default: float32)")
    add("-o", "--output", metavar="X", type=Path, default=Path("build/report"), help="folder (default: %(default)s)")
    add("--resume", action="store_true", help="go on with an interrupted report")
    add("--quick", action="store_true", help="half of everything")
    add("--used", metavar="N", type=int, default=0, help="call upstream's generate so often before (default: 0)")
    add("--seed", metavar="X", type=int, default=0, help="of every stream (default: %(default)s)")


def run(options: argparse.Namespace) -> int:
    """Diagnoses a model, writes the report and prints its summary; returns 1 where a stream could not be measured."""
    used, seed = whole_number("used", options.used, 0, 1000), whole_number("seed", options.seed, 0, 2**63 - 1)
    device = pick_device(options.device)
    options.record = open_record(options.output, options.resume)
    with quiet():
        tts = load(options.model, device=device, dtype=options.dtype)
        check(tts, options.quick, seed)
        use(tts, used)
        report = _made(tts, options.record, command.model_name(options), options.quick, seed)
    print("\n".join(summary(report.numbers, report.findings)))
    for one in report.findings:
        print(f"  {_judged(one)}")
    failed = failures(report.numbers)
    print("\n".join([*failed, f"{len(report.rows)} rows, and the page: {options.output / 'report.html'}"]))
    return int(bool(failed))
