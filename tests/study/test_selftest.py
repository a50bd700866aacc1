"""The self-test passes where backends are right, and says what is wrong where one is not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from chatterbox_lab.__main__ import main
from chatterbox_lab.engine.t3 import static
from chatterbox_lab.engine.t3.backends import BACKENDS, Setup
from chatterbox_lab.study import selftest
from chatterbox_lab.study.selftest import SelfTest, exact_backends

Answer = tuple[bool, str]


def answers(tts: Any, *names: str) -> dict[str, Answer]:
    questions = SelfTest(tts, most=40, backends=("static",)).questions()
    return {name: question() for name, question in questions.items() if not names or name.startswith(names)}


def test_a_right_backend_passes_every_question(tts: Any) -> None:
    found = answers(tts)
    assert len(found) == 6
    assert [name for name, (passed, _) in found.items() if not passed] == []
    assert found["same tokens, static, off"][1] == "upstream's, 2, 8, 40, 8 of them"
    assert found["whole streams, the same again, static"][1].startswith("960 samples a token")


def test_a_backend_that_says_other_tokens_is_caught(tts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def wrong(setup: Setup) -> Iterator[Any]:
        with static.stepper(setup) as stepper:
            step = stepper.step

            def later(position: int) -> torch.Tensor:
                logits = step(position)
                return logits if position < 12 else logits.flip(-1)

            stepper.step = later
            yield stepper

    monkeypatch.setitem(BACKENDS, "static", replace(BACKENDS["static"], stepper=wrong))
    passed, found = answers(tts, "same tokens, static, off")["same tokens, static, off"]
    assert not passed
    assert found in ("12 of 40 for seed 2", "13 of 40 for seed 2", "14 of 40 for seed 2")


def test_a_freeze_is_caught(tts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    paces = iter([0.1, 0.5])
    monkeypatch.setattr(SelfTest, "_pace", lambda self, backend: next(paces))
    assert answers(tts, "a cache")["a cache that has grown, static"] == (False, "5.00 times as long as before")


def test_what_raises_is_a_row_with_its_error() -> None:
    def broken() -> Answer:
        raise RuntimeError("CUDA error: out of luck\nand more")

    assert list(selftest.asked(broken)) == [{"passed": False, "found": "RuntimeError: CUDA error: out of luck"}]


def test_the_newest_backend_of_a_device_comes_first() -> None:
    assert exact_backends("cpu") == ("static", "hf")
    assert exact_backends("cuda:0") == ("graph", "static", "hf")


def test_the_command_records_and_tells(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "selftest.csv"
    line = ["selftest", "--model", "tiny", "--device", "cpu", "--tokens", "20", "--backend", "static"]
    assert main([*line, "--output", str(path)]) == 0
    assert capsys.readouterr().out.count("passed  ") == 6
    assert pd.read_csv(path)["passed"].all()
    monkeypatch.setattr(SelfTest, "threads", lambda self, backend: (False, "3 of 4 threads"))
    assert main([*line, "--output", str(tmp_path / "again.csv")]) == 1
    assert "FAILED  threads, static" in capsys.readouterr().out


def test_bad_options_are_refused_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["selftest", "--tokens", "3"])
    assert "tokens=3" in capsys.readouterr().err
