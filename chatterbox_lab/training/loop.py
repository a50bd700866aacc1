"""One training loop for every stage: seeded, resumable, averaged weights, a log that a notebook can plot."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from tqdm import tqdm

from ..files import written_whole

Loss = Callable[[int], dict[str, torch.Tensor]]


@dataclass(frozen=True)
class Plan:
    """How long and how fast a stage learns: ``steps`` of AdamW at ``rate``, after a warm-up down by a cosine."""

    steps: int
    batch: int
    rate: float = 1e-3
    warmup: int = 100
    decay: float = 0.01  # weight decay
    average: float = 0.998  # of the exponentially averaged weights, which are what a stage is used with
    every: int = 100  # steps between two rows of the log
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch < 1:
            raise ValueError(f"steps={self.steps}, batch={self.batch}: must be at least 1")

    def factor(self, step: int, begun: int = 0) -> float:
        """The learning rate of a step as a part of ``rate``, for an optimizer that began at step ``begun``."""
        done = min(1.0, max(0, step - self.warmup) / max(1, self.steps - self.warmup))
        return min(1.0, (step - begun + 1) / self.warmup) * (0.02 + 0.98 * (1 + math.cos(math.pi * done)) / 2)


class Stage:
    """A module in training, with its checkpoint ``<name>.pt`` and its log ``<name>.csv`` in ``folder``."""

    def __init__(
        self, name: str, module: torch.nn.Module, plan: Plan, folder: Path, log: list[dict[str, float]] | None = None
    ) -> None:
        """Goes on from the checkpoint; else from ``module`` as it is, which learned what its ``log`` says."""
        self.name, self.module, self.plan, self.folder = name, module, plan, folder
        self.optimizer = torch.optim.AdamW(
            module.parameters(), lr=plan.rate, betas=(0.9, 0.98), weight_decay=plan.decay
        )
        self.averaged = copy.deepcopy(module).requires_grad_(False)
        self.log = list(log or [])
        self.step, self.seconds = (int(self.log[-1]["step"]), self.log[-1]["seconds"]) if self.log else (0, 0.0)
        self.begun = self.step  # where the optimizer knows nothing yet
        if self.checkpoint.exists():
            self._resume()

    @property
    def checkpoint(self) -> Path:
        """Where the weights, the averaged weights, the optimizer's state and the log are kept."""
        return self.folder / f"{self.name}.pt"

    def _resume(self) -> None:
        held = torch.load(self.checkpoint, weights_only=True)
        self.module.load_state_dict(held["module"])
        self.averaged.load_state_dict(held["averaged"])
        self.optimizer.load_state_dict(held["optimizer"])
        self.step, self.seconds, self.log, self.begun = (held[key] for key in ("step", "seconds", "log", "begun"))
        print(f"{self.name}: goes on from step {self.step}")

    def run(self, losses: Loss, evaluate: Callable[[], dict[str, float]] | None = None) -> None:
        """Trains to the plan's last step; an interrupt keeps what was learned.

        Args:
            losses: named losses of a step's batch; their sum is descended. It is given the step's number, from which
                it draws its batch, so that a resumed run sees what an uninterrupted one would have seen.
            evaluate: figures on held-out data, for the log.
        """
        try:
            for step in self._steps():
                row = self._descend(losses(step))
                self.step = step + 1  # before the log's row, whose evaluation may be interrupted
                if self.step % self.plan.every == 0 or self.step == self.plan.steps:
                    self._record(row, evaluate)
        finally:
            self.save()

    def _steps(self) -> Iterator[int]:
        bar = tqdm(initial=self.step, total=self.plan.steps, desc=self.name, unit="step", mininterval=5)
        with bar:
            while self.step < self.plan.steps:
                torch.manual_seed(self.plan.seed * 1_000_003 + self.step)
                start = time.perf_counter()
                yield self.step
                self.seconds += time.perf_counter() - start
                bar.update()

    def _descend(self, losses: dict[str, torch.Tensor]) -> dict[str, float]:
        for group in self.optimizer.param_groups:
            group["lr"] = self.plan.rate * self.plan.factor(self.step, self.begun)
        self.optimizer.zero_grad(set_to_none=True)
        sum(losses.values()).backward()
        torch.nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
        self.optimizer.step()
        with torch.no_grad():
            keep = min(self.plan.average, (1 + self.step) / (10 + self.step))
            pairs = zip(self.averaged.parameters(), self.module.parameters(), strict=True)
            for mean, new in pairs:
                mean.lerp_(new, 1 - keep)
        return {name: float(value.detach()) for name, value in losses.items()}

    def _record(self, row: dict[str, float], evaluate: Callable[[], dict[str, float]] | None) -> None:
        held_out = evaluate() if evaluate else {}
        self.log.append({"step": self.step, "seconds": self.seconds} | row | held_out)
        tqdm.write(f"{self.name} {self.step}: " + ", ".join(f"{k} {v:.3f}" for k, v in (row | held_out).items()))
        self.save()

    def save(self) -> None:
        """Writes the checkpoint and the log, each whole or not at all."""
        self.folder.mkdir(parents=True, exist_ok=True)
        held = {
            "module": self.module.state_dict(), "averaged": self.averaged.state_dict(),
            "optimizer": self.optimizer.state_dict(), "step": self.step, "seconds": self.seconds,
            "log": self.log, "begun": self.begun,
        }  # fmt: skip
        with written_whole(self.checkpoint) as part:
            torch.save(held, part)
        with written_whole(self.folder / f"{self.name}.csv") as part:
            pd.DataFrame(self.log).to_csv(part, index=False)


def padded(rows: list[torch.Tensor], value: float = 0) -> torch.Tensor:
    """Rows of different lengths as one tensor (rows, longest, ...), filled up with ``value``."""
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)
