from __future__ import annotations

import io
import logging
import subprocess
import sys
from typing import Any

import pytest
from transformers.utils import logging as transformers_logging

from chatterbox_lab.study import logs

LOGGER = transformers_logging.get_logger("transformers.test")


class Layer:
    layer_idx = 9

    def forward(self) -> None:
        LOGGER.warning_once("falls back")


def test_a_warning_is_caught_each_time_with_the_layer_that_raised_it() -> None:
    with logs.catch_warnings() as caught:
        for _ in range(2):
            Layer().forward()
            LOGGER.warning_once("the cache is a tuple")
    assert [(warning.message, warning.layer) for warning in caught] == [
        ("falls back", 9), ("the cache is a tuple", None), ("falls back", 9), ("the cache is a tuple", None)
    ]  # fmt: skip
    assert caught[0].raised_in.startswith("test_logs.py:")
    assert caught[0].raised_in.endswith(" forward")
    assert caught[0].called_from == ""  # chatterbox has no part in it


def test_a_caught_warning_is_not_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(logging.getLogger("transformers"), "handlers", [logging.StreamHandler(screen)])
    with logs.catch_warnings():
        LOGGER.warning("unseen")
    LOGGER.warning("seen")
    assert screen.getvalue() == "seen\n"


def test_what_chatterbox_calls_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    module: dict[str, Any] = {"__name__": "chatterbox.tts", "layer": Layer()}
    exec(compile("def generate(): layer.forward()\ndef speak(): generate()", "somewhere/tts.py", "exec"), module)
    with logs.catch_warnings() as caught:
        module["speak"]()
    assert caught[0].called_from == "tts.py:1 generate < tts.py:2 speak"


@pytest.mark.parametrize("context", [logs.catch_warnings, logs.quiet])
def test_the_logger_is_as_before_also_after_an_error(context: Any) -> None:
    logger = logging.getLogger("transformers")
    before = logger.level, logger.handlers[:], logging.Logger.warning_once
    with pytest.raises(KeyError), context():
        raise KeyError
    assert (logger.level, logger.handlers, logging.Logger.warning_once) == before


def test_quiet_lets_no_warning_through(caplog: pytest.LogCaptureFixture) -> None:
    with logs.quiet():
        LOGGER.warning("falls back")
        assert not LOGGER.isEnabledFor(logging.WARNING)
        assert LOGGER.isEnabledFor(logging.ERROR)
    assert not caplog.records


def test_the_table_has_a_row_a_text_and_place() -> None:
    def caught(message: str, layer: int | None) -> logs.CaughtWarning:
        return logs.CaughtWarning(message, "llama.py:1 forward", layer, "t3.py:2 inference")

    layers = [0, 1, 2, 5, None, 1]
    table = logs.warning_table([*(caught("falls back", layer) for layer in layers), caught("tuple", None)])
    assert table.to_dict("records") == [
        {"warning": "falls back", "raised in": "llama.py:1 forward", "called from": "t3.py:2 inference"}
        | {"layers": "0-2, 5", "times": 6},
        {"warning": "tuple", "raised in": "llama.py:1 forward", "called from": "t3.py:2 inference"}
        | {"layers": "", "times": 1},
    ]
    assert list(logs.warning_table([])) == ["warning", "raised in", "called from", "layers", "times"]


@pytest.mark.parametrize("module", ["logs", "fallback"])
def test_other_releases_of_transformers_are_watched_without_chatterbox_or_pandas(module: str) -> None:
    blocked = "import sys; sys.modules.update(pandas=None); "
    looked = "; assert 'chatterbox' not in sys.modules"
    subprocess.run([sys.executable, "-c", f"{blocked}import chatterbox_lab.study.{module}{looked}"], check=True)
