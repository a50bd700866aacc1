"""A machine's whole campaign in one command: every measurement that the notebooks read, most valuable first.

``chatterbox-lab measure`` runs other commands of this package one after the other, each in a process of its own, so
that what one leaves behind or breaks does not touch the next. Whatever a part has finished is a CSV; the same command
again goes on where it stopped.
"""

from __future__ import annotations

import argparse
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..files import REPOSITORY
from ..voices.load import pick_device
from . import command
from .machine import machine_facts
from .records import output_folder

FINISHED, FAILED, STOPPED, THERE = "finished", "failed", "stopped", "there already"


@dataclass(frozen=True)
class Part:
    """One command of a campaign.

    Args:
        name: of the part, and the beginning of its record's name.
        does: what it measures, in a line.
        call: the command and its options; where the model, the device and the record go is the campaign's.
        read_by: numbers of the notebooks that read the record.
    """

    name: str
    does: str
    call: tuple[str, ...]
    read_by: tuple[str, ...] = ()


def _part(name: str, does: str, call: str, read_by: str = "") -> Part:
    return Part(name, does, tuple(call.split()), tuple(read_by.split()))


GPU = (
    _part("selftest", "graphs and all else say upstream's tokens here", "selftest --backend graph static"),
    _part("ladder", "T3's decoding, rung by rung", "t3 --long 825", "03 04"),
    _part(
        "bench",
        "streams, stock against ours, in float32",
        "streams --chunk-size 25 50 --analyzers stock off --backend hf graph --check --rounds 3",
        "04 06",
    ),
    _part(
        "streams",
        "streams with T3 in bfloat16, by what S3Gen does",
        "streams --dtype bfloat16 --chunk-size 25 50 100 --analyzers off --backend graph"
        " --sound exact once fast --rounds 3",
        "04 06",
    ),
    _part("prices", "S3Gen's rendering, rung by rung", "s3gen --chunk-size 25 50 100 --long 40", "04"),
    _part("calls", "what upstream's calls do to later ones", "calls --after 0 5 50 --tokens 25 --rounds 3", "06"),
    _part("living", "today's releases, stock against ours", "living --costs --releases tts --rounds 2", "07"),
    _part(
        "sweep",
        "chunk sizes, chunk by chunk",
        "sweep --chunk-size 10 25 50 75 100 --backend graph --prompt short medium --schedule fixed grow --rounds 2",
        "03",
    ),
    _part("layers", "T3's steps, layer by layer and launch by launch", "layers", "02"),
    _part("windows", "S3Gen alone, by what its window is made of", "sweep --windows", "03"),
    _part("parts", "S3Gen's vocoder and encoder alone", "parts", "04"),
    _part(
        "tuned", "the same streams with the report's PyTorch flags", "streams --tune --analyzers off --backend graph"
    ),
)
"""The parts on a GPU. Those whose names no notebook reads answer questions of their own."""
CPU = (
    _part("selftest", "every backend says upstream's tokens here", "selftest --tokens 60"),
    _part("ladder", "T3's decoding, rung by rung", "t3 --long 825", "03 04"),
    _part(
        "bench",
        "streams, stock against ours",
        "streams --chunk-size 25 50 --analyzers stock off --backend hf static --check --rounds 3",
        "04 06",
    ),
    _part(
        "streams",
        "streams, by what S3Gen does, with T3 in 8 bits",
        "streams --chunk-size 50 --analyzers off --backend static static-int8 --sound exact fast --rounds 2",
        "04 06",
    ),
    _part("prices", "S3Gen's rendering, rung by rung", "s3gen --chunk-size 50", "04"),
    _part("calls", "what upstream's calls do to later ones", "calls --after 0 5 50 --tokens 25 --rounds 3", "06"),
    _part("parts", "S3Gen's vocoder and encoder alone", "parts", "04"),
    _part("living", "today's releases, stock against ours", "living --costs --rounds 2", "07"),
    _part("sweep", "chunk sizes, chunk by chunk", "sweep --chunk-size 10 25 50 100 --backend static", "03"),
    _part("layers", "T3's steps, layer by layer", "layers", "02"),
    _part("windows", "S3Gen alone, by what its window is made of", "sweep --windows", "03"),
)
"""The parts on a CPU; at Chatterbox's size they take hours there."""


def parts_for(device: str) -> tuple[Part, ...]:
    """The campaign of a kind of device."""
    return GPU if torch.device(device).type == "cuda" else CPU


def place(facts: dict[str, Any]) -> str:
    """A machine in a file's name: ``h100_80gb_hbm3``, ``rtx_4090``, or for a CPU ``cpu_amd_epyc``."""
    name = re.sub(r"nvidia|geforce|\(r\)|\(tm\)|processor|@.*", " ", str(facts["machine"]).lower())
    words = re.findall(r"[a-z0-9]+", name)[:4]
    return "_".join(words if facts["device"] != "cpu" else ["cpu", *words])


_STOPPED = (command.INTERRUPTED, -signal.SIGINT, -signal.SIGTERM)
_PATIENCE = 60.0
"""Seconds that a part has to keep what it has."""


def _ended(process: subprocess.Popen[bytes]) -> int:
    """Stops a part as Ctrl-C does, upon which commands keep what they have; one that does not end is killed."""
    if sys.platform == "win32":
        process.terminate()  # Ctrl-C would go to all of the console
    else:
        process.send_signal(signal.SIGINT)
    try:
        process.wait(_PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    return command.INTERRUPTED


@dataclass
class Campaign:
    """The parts of a machine's campaign, run one after the other.

    Args:
        model: as for `load`.
        device: as for `load`.
        folder: where the records go.
        machine: how they call the machine in their names.
        minutes: after which a part is stopped, to be resumed by the next run; None is never.
    """

    model: str
    device: str
    folder: Path
    machine: str
    minutes: float | None

    def record(self, part: Part) -> Path:
        """The CSV of a part."""
        return self.folder / f"{part.name}_{Path(self.model).name}_{self.machine}.csv"

    def command(self, part: Part) -> list[str]:
        """The part's command line, which goes on with what is unfinished."""
        path = self.record(part)
        model = str(Path(self.model).resolve()) if Path(self.model).is_dir() else self.model  # the part runs elsewhere
        where = ["--model", model, "--device", self.device, "--output", str(path)]
        resumed = ["--resume"] * path.with_suffix(".unfinished.csv").exists()
        return [sys.executable, "-m", "chatterbox_lab", *part.call, *where, *resumed]

    def run(self, part: Part, say: Callable[[str], None] = print) -> tuple[str, float]:
        """Runs a part unless its record is there; returns how it ended and the seconds that it took.

        Raises:
            KeyboardInterrupt: Ctrl-C, which the part has heard as well.
        """
        path = self.record(part)
        if path.exists() and not path.with_suffix(".unfinished.csv").exists():
            return THERE, 0.0
        start = time.monotonic()
        say(f"\n=== {part.name}: {part.does}\n{' '.join(['chatterbox-lab', *self.command(part)[3:]])}")
        with subprocess.Popen(self.command(part), cwd=REPOSITORY) as process:
            try:
                status = process.wait(60 * self.minutes if self.minutes else None)
            except subprocess.TimeoutExpired:
                status = _ended(process)
            except KeyboardInterrupt:
                process.wait()
                raise
        stopped = status in _STOPPED
        if status and not stopped and path.exists():  # else the next run would take it for done
            path.replace(path.with_suffix(".failed.csv"))
        return STOPPED if stopped else FAILED if status else FINISHED, time.monotonic() - start


def renewed(campaign: Campaign, parts: list[Part]) -> str:
    """What to do with the records that are there: the notebooks that read them, and the commands that renew them."""
    there = [part for part in parts if campaign.record(part).exists()]
    numbers = sorted({number for part in there for number in part.read_by})
    if not numbers:
        return "No record is there that a notebook reads."
    names = [campaign.record(part).name for part in there if part.read_by]
    names += [name.replace("layers_", "launches_", 1) for name in names if name.startswith("layers_")]
    files = " ".join(names)
    return (
        f"To add them to the tables and figures of notebooks {', '.join(numbers)}:\n"
        f"  move {files} to data/\n"
        f"  .venv/bin/python notebooks/run.py --in-place {' '.join(numbers)} && make readme"
    )


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of ``chatterbox-lab measure``."""
    command.add_model(parser, "random")
    command.add_device(parser)
    known = ", ".join(dict.fromkeys(part.name for part in (*GPU, *CPU)))
    add = parser.add_argument
    add("--parts", metavar="X", nargs="+", help=f"only these, in this order: {known} (default: all)")
    add("--machine", metavar="X", help="the machine's name in the records' names (default: made from its own)")
    add("--minutes", metavar="X", type=float, help="after which a part is stopped (default: 8 on CUDA, else never)")
    add("--output", metavar="X", type=Path, help="folder of the records (default: build/data)")
    add("--list", action="store_true", help="only say what would run")


def run(options: argparse.Namespace) -> int:
    """Runs the campaign; returns 1 where a part failed or was stopped."""
    device = pick_device(options.device)
    if torch.device(device).type not in ("cuda", "cpu"):
        raise ValueError(f"device={device!r}: a campaign is for cuda or cpu; its parts take --device one by one")
    known = {part.name: part for part in parts_for(device)}
    for name in options.parts or ():
        if name not in known:
            raise ValueError(f"parts={name!r}: must be among {', '.join(known)}")
    minutes = options.minutes
    if minutes is None:
        minutes = 8.0 if torch.device(device).type == "cuda" else None
    elif not minutes > 0:
        raise ValueError(f"minutes={minutes}: must be above 0")
    parts = [known[name] for name in options.parts or known]
    folder, machine = (
        (options.output or output_folder("data")).resolve(),
        options.machine or place(machine_facts(device)),
    )
    if not re.fullmatch(r"[A-Za-z0-9_-]+", machine):
        raise ValueError(f"machine={machine!r}: must be of letters, digits, '_' and '-', for the names of files")
    campaign = Campaign(options.model, device, folder, machine, minutes)
    if options.list:
        print("\n".join(f"{part.name:10} {part.does}" for part in parts))
        return 0
    folder.mkdir(parents=True, exist_ok=True)
    ended = {}
    try:
        for part in parts:
            ended[part.name] = campaign.run(part)
    finally:
        print("\n" + "\n".join(f"{name:10} {how} ({seconds:.0f} s)" for name, (how, seconds) in ended.items()))
        print(renewed(campaign, parts))
    wrong = [name for name, (how, _) in ended.items() if how in (FAILED, STOPPED)]
    if wrong:
        print(f"Not finished: {', '.join(wrong)}; the same command again goes on with them.")
    return int(bool(wrong))
