"""The machine at hand: its facts, as every record carries them, its memory's speed, and PyTorch's speed flags."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch

from ..engine.clock import StageClock
from ..engine.linears import layers_of, multiplies
from ..files import DATA, REPOSITORY
from ..released import DISTRIBUTIONS, release

CHATTERBOX = (*DISTRIBUTIONS, "chatterbox")
"""The columns of which a record has one, under which it names the Chatterbox that was imported."""
CPU_KIND = ("cpu_family", "cpu_model", "cpu_capability", "bfloat16")
"""The columns that tell apart two CPUs of one name; records made before they were kept lack them."""
_CPUINFO = Path("/proc/cpuinfo")


def machine_facts(device: str | torch.device = "cpu") -> dict[str, Any]:
    """What a measurement ran on: processor, cores, memory, accelerator, versions, commit and date (UTC).

    Two CPUs of one name may differ in what they can do: ``cpu_family`` and ``cpu_model`` are the processor's own
    numbers (empty where the system does not tell), ``cpu_capability`` is the instruction set that PyTorch uses, such as
    AVX2 or AVX512, and ``bfloat16`` whether oneDNN multiplies it here or refuses to.
    """
    facts: dict[str, Any] = {
        "machine": torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else _cpu_name(),
        "device": torch.device(device).type,
        "cpu": _cpu_name(),
        "cpu_family": _number(_cpuinfo("cpu family")),
        "cpu_model": _number(_cpuinfo("model")),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "bfloat16": multiplies(torch.bfloat16, torch.device("cpu")),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "system": platform.system(),
        "python": platform.python_version(),
        "cuda": torch.version.cuda or "none",
    }
    facts |= {"torch": _version("torch"), "transformers": _version("transformers")}
    facts |= _chatterbox() | {"diffusers": _version("diffusers")}
    facts["commit"] = commit()
    facts["date"] = datetime.now(UTC).strftime("%Y-%m-%d")
    return facts


def commit() -> str:
    """This checkout's short commit, ``+`` appended when the package differs from it.

    ``unknown`` where the package is no checkout of its own, such as one that is installed inside another repository.
    """
    git, code = ["git", "-C", str(REPOSITORY)], REPOSITORY / "chatterbox_lab"
    try:
        found = subprocess.run(
            [*git, "rev-parse", "--show-toplevel", "--short", "HEAD"], capture_output=True, text=True, check=True
        )
        subprocess.run([*git, "ls-files", "--error-unmatch", str(code)], capture_output=True, check=True)
        clean = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", str(code)])
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    top, head = found.stdout.splitlines()
    if Path(top).resolve() != REPOSITORY or DATA.parent != REPOSITORY:  # a wheel has its data inside the package
        return "unknown"
    return head + "+" * clean.returncode


def in_words(facts: Mapping[str, Any]) -> str:
    """The machine of a record's row, such as ``AMD EPYC with AVX512 and bfloat16, 2 cores``.

    A GPU is its name alone; a record that is older than its CPU's kind says ``AMD EPYC, 2 cores``.
    """
    if facts["device"] != "cpu":
        return str(facts["machine"])
    capability = facts.get("cpu_capability")
    known = isinstance(capability, str)  # else missing, or nan in a table with newer records
    kind = f" with {capability}" + " and bfloat16" * (str(facts.get("bfloat16")) == "True") if known else ""
    return f"{facts['machine']}{kind}, {facts['cores']} cores"


def kind_in_words(facts: Mapping[str, Any]) -> str:
    """`in_words`, with what else tells two CPUs of one name apart, where the record knows it."""
    numbers = {name: facts.get(f"cpu_{name}") for name in ("family", "model") if facts["device"] == "cpu"}
    known = (f", {name} {number:.0f}" for name, number in numbers.items() if isinstance(number, (int, float)))
    return in_words(facts) + "".join(text for text in known if not text.endswith("nan"))


def _cpu_name() -> str:
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def _cpuinfo(name: str) -> str:
    """What Linux says of the first processor under this name; empty elsewhere."""
    try:
        lines = _CPUINFO.read_text().splitlines()
    except OSError:
        return ""
    found = (line.partition(":") for line in lines)
    return next((value.strip() for key, _, value in found if key.strip() == name), "")


def _number(text: str) -> int | str:
    return int(text) if text.isdecimal() else ""


def _chatterbox() -> dict[str, str]:
    """The Chatterbox that is imported, of whichever are installed: its version under its name."""
    try:
        found = release()
    except (LookupError, RuntimeError):  # a source tree by itself, or two releases in one folder
        return {"chatterbox": "unknown"}
    return {found.distribution: found.version} if found.distribution in DISTRIBUTIONS else {"chatterbox": str(found)}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def read_seconds(size: int, device: str | torch.device, repeats: int = 10) -> float:
    """Seconds that this device takes to read ``size`` bytes of its memory once: the fastest of some sums over them.

    A step that reads that many bytes of weights is not expected to be faster (the memory bound of the roofline
    model); weights that fit into a cache are read from there, here as in the step.
    """
    buffer = torch.ones(max(1, size // 4), device=device)
    clock = StageClock(device)
    taken = []
    for _ in range(repeats):
        with clock.stage("read"):
            buffer.sum()
        taken.append(clock.seconds.pop("read"))
    return min(taken)


def step_bytes(t3: torch.nn.Module) -> int:
    """Bytes of weights that every decode step reads: layers, last norm and speech head, once for both CFG rows."""
    norm = t3.tfmr.ln_f if hasattr(t3.tfmr, "ln_f") else t3.tfmr.norm  # GPT-2's, Llama's
    modules = (*layers_of(t3.tfmr), norm, t3.speech_head)
    return sum(weight.numel() * weight.element_size() for module in modules for weight in module.parameters())


class TorchFlags:
    """The values that PyTorch's speed flags had before `tune_torch`; restores them on request or on leaving."""

    def __init__(self) -> None:
        self.matmul_precision = torch.get_float32_matmul_precision()
        self.cudnn_benchmark = torch.backends.cudnn.benchmark
        self.allow_tf32 = torch.backends.cuda.matmul.allow_tf32

    def restore(self) -> None:
        """Puts the flags back; may be called more than once."""
        # allow_tf32 writes the precision as well, so the precision comes last.
        torch.backends.cuda.matmul.allow_tf32 = self.allow_tf32
        torch.backends.cudnn.benchmark = self.cudnn_benchmark
        torch.set_float32_matmul_precision(self.matmul_precision)

    def __enter__(self) -> TorchFlags:
        return self

    def __exit__(self, *exc: object) -> None:
        self.restore()


def tune_torch() -> TorchFlags:
    """Sets the report's three PyTorch flags for this process and returns what to restore.

    TF32 for float32 matrix products and cuDNN's autotuning; none of them touches a CPU. Use as
    ``with tune_torch(): ...`` or call ``.restore()`` on what comes back.
    """
    before = TorchFlags()
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    torch.backends.cuda.matmul.allow_tf32 = True
    return before
