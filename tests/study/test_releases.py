"""What is recorded of other releases of transformers, tried on the one that is here."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from chatterbox_lab.__main__ import main
from chatterbox_lab.study import releases
from chatterbox_lab.study.records import load_results

HERE = "4.46.3"


def test_a_release_is_probed_in_a_process_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / HERE).mkdir()  # an empty overlay: the environment's own release
    output = tmp_path / "new" / "transformers.csv"
    assert main(["releases", "--releases", HERE, "--cache", str(tmp_path), "--output", str(output)]) == 0
    assert "1 rows are in transformers.csv." in capsys.readouterr().out
    found = pd.read_csv(output)
    recorded = load_results("transformers")
    assert list(found.columns) == list(recorded.columns) == list(releases.COLUMNS)
    counted = ["torch", "attention_maps", "layers_sdpa", "layers_manual", "warning", "tuple_cache", "spy_map"]
    theirs = recorded[recorded["transformers"] == HERE]
    assert found[counted].to_dict("records") == theirs[counted].to_dict("records")
    masses = found["spy_future_mass"].item(), theirs["spy_future_mass"].item()
    assert masses[0] == pytest.approx(masses[1], abs=0.01)
    assert found["probe_difference"].item() < 1e-5


def test_probing_needs_nothing_but_torch_and_transformers() -> None:
    code = (
        "import sys; from chatterbox_lab.study import releases\n"
        "assert not releases.probe_release()['error']\n"
        "print([name for name in ('chatterbox', 'pandas') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1:] == ["[]"], done.stderr


def test_a_release_that_cannot_be_had_is_told_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "transformers.csv"
    output.write_text("as it was\n")
    monkeypatch.setattr(releases, "_installer", lambda: [sys.executable, "-c", "raise SystemExit('no network')"])
    assert main(["releases", "--releases", "5.0.0", "--cache", str(tmp_path), "--output", str(output)]) == 1
    assert "transformers 5.0.0: installing: no network" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["transformers.csv"]
    assert output.read_text() == "as it was\n"


def test_another_release_than_the_one_asked_for_is_no_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "4.48.3").mkdir()
    command = ["releases", "--releases", "4.48.3", "--cache", str(tmp_path), "--output", str(tmp_path / "all.csv")]
    assert main(command) == 1
    assert f"transformers 4.48.3: probing: transformers {HERE} was imported" in capsys.readouterr().err
