"""The first sound: written whole, played as it is made, told in plain words."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from array import array
from collections.abc import Iterator
from pathlib import Path

import pytest
import soundfile
import torch
from conftest import TEXT

import chatterbox_lab as lab
from chatterbox_lab.__main__ import main
from chatterbox_lab.show import speak
from chatterbox_lab.voices import build

SHORT = ["--most", "0.4", "--chunk-size", "4"]  # ten tokens


@pytest.fixture
def loaded(tts: build.LabTTS, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The command speaks with the shared model, in an empty folder; which models it asked for."""
    asked: list[str] = []
    monkeypatch.setattr(speak, "load", lambda model, **_: asked.append(model) or tts)
    monkeypatch.chdir(tmp_path)
    return asked


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for programs, before all others; what looks for a player finds only what is in it."""
    folder = tmp_path / "programs"
    folder.mkdir()
    found = speak.shutil.which
    monkeypatch.setattr(speak.shutil, "which", lambda name: found(name, path=str(folder)))
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return folder


def install(folder: Path, name: str, script: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


def samples(path: Path) -> list[int]:
    return soundfile.read(path, dtype="int16")[0].tolist()


def test_a_text_becomes_a_wav_and_its_speed_is_told(
    loaded: list[str], tmp_path: Path, tts: build.LabTTS, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["speak", TEXT, *SHORT, "--seed", "3"]) == 0
    assert loaded == ["lab"]
    said = capsys.readouterr().out
    assert "speech.wav: 0.40 s of speech. It ends at --most." in said
    assert all(words in said for words in ("First chunk after", "RTF", "Once a process", "to load", "to warm up"))
    audio, rate = soundfile.read(tmp_path / "speech.wav")
    assert (rate, len(audio)) == (24000, 10 * 960)
    stream = lab.generate_stream(tts, TEXT, lab.BALANCED, seed=3, max_new_tokens=10, chunk_size=4)
    expected = torch.cat([chunk for chunk, _ in stream], dim=1)[0]
    torch.testing.assert_close(torch.from_numpy(audio).float(), expected, rtol=0, atol=1e-4)
    assert [file.name for file in tmp_path.iterdir()] == ["speech.wav"]


def test_each_chunk_is_told_and_played_as_soon_as_it_is_made(
    loaded: list[str], program: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    install(program, "aplay", f"cat > {tmp_path}/played.raw")
    assert main(["speak", TEXT, *SHORT, "--stream", "--play", "-o", "said.wav"]) == 0
    said = capsys.readouterr().out
    assert [f"chunk {number} after" in said for number in (1, 2, 3, 4)] == [True, True, True, False]
    written = samples(tmp_path / "said.wav")
    assert array("h", (tmp_path / "played.raw").read_bytes()).tolist() == written
    assert any(written)


def test_a_chunk_is_played_before_the_next_is_made(
    loaded: list[str], monkeypatch: pytest.MonkeyPatch, program: Path
) -> None:
    order: list[str] = []
    install(program, "aplay", "cat > /dev/null")
    monkeypatch.setattr(speak.Player, "push", lambda self, audio: order.append("played"))
    generate = speak.generate_stream

    def stream(*args: object, **kwargs: object) -> object:
        for item in generate(*args, **kwargs):
            order.append("made")
            yield item

    monkeypatch.setattr(speak, "generate_stream", stream)
    assert main(["speak", TEXT, *SHORT, "--stream", "--play"]) == 0
    assert order == ["made", "played"] * 3
    order.clear()
    assert main(["speak", TEXT, *SHORT, "--play"]) == 0
    assert order == ["made"] * 3 + ["played"]


def test_a_player_that_plays_files_alone_gets_the_file(loaded: list[str], program: Path, tmp_path: Path) -> None:
    install(program, "afplay", f"echo $1 > {tmp_path}/played.txt")
    assert main(["speak", TEXT, *SHORT, "--play", "--stream"]) == 0
    assert (tmp_path / "played.txt").read_text() == "speech.wav\n"


@pytest.mark.parametrize("how", [["--play"], ["--play", "--stream"]])
def test_a_player_that_fails_is_told_and_the_file_is_there(
    loaded: list[str], program: Path, tmp_path: Path, how: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    install(program, "paplay", "exit 3")
    assert main(["speak", TEXT, *SHORT, *how]) == 1
    assert "paplay ended with status 3; is there a sound device?" in capsys.readouterr().err
    assert len(samples(tmp_path / "speech.wav")) == 10 * 960


def test_an_interrupt_ends_the_player_and_writes_nothing(
    loaded: list[str],
    program: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    install(program, "aplay", "exec sleep 3600")
    players: list[subprocess.Popen] = []
    start = speak.subprocess.Popen

    def started(*args: object, **kwargs: object) -> subprocess.Popen:
        players.append(start(*args, **kwargs))
        return players[-1]

    def stop(*_: object, **__: object) -> Iterator[None]:
        yield from ()
        raise KeyboardInterrupt

    monkeypatch.setattr(speak.subprocess, "Popen", started)
    monkeypatch.setattr(speak, "generate_stream", stop)
    (tmp_path / "speech.wav").write_text("as it was")
    assert main(["speak", TEXT, "--play"]) == 130
    assert "Stopped." in capsys.readouterr().out
    assert [player.poll() is not None for player in players] == [True]
    assert (tmp_path / "speech.wav").read_text() == "as it was"


def test_the_text_may_come_from_the_standard_input(loaded: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(speak, "generate_stream", lambda tts, text, *_, **__: asked.append(text) or iter([]))
    monkeypatch.setattr(sys, "stdin", io.StringIO("Read from a pipe.\n"))
    assert main(["speak", "-"]) == 1
    assert asked == ["Read from a pipe.\n"]


def test_a_model_that_says_nothing_writes_nothing(
    loaded: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(speak, "generate_stream", lambda *_, **__: iter([]))
    assert main(["speak", TEXT]) == 1
    assert "The model said nothing." in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ([" "], "text=' ': must be a string with something to say"),
        ([TEXT, "--chunk-size", "0"], "chunk_size=0: must be"),
        ([TEXT, "--seed", "-1"], "seed=-1: must be"),
        ([TEXT, "--most", "0"], "most=0: must be 0.04 to 40 seconds"),
        ([TEXT, "--most", "nan"], "most=nan: must be"),
        ([TEXT, "-o", "speech.mp3"], "output='speech.mp3': must end in .wav"),
        ([TEXT, "-o", "nowhere/speech.wav"], "output='nowhere/speech.wav': there is no folder 'nowhere'"),
        ([TEXT, "--preset", "slow"], "argument --preset: invalid choice: 'slow'"),
        ([TEXT, "--reference", "nobody.wav"], "'nobody.wav': no such file"),
        ([TEXT, "--device", "cuda:99"], "device='cuda:99': not available here"),
        ([TEXT, "--play"], "--play: needs one of aplay, paplay, ffplay, play, afplay, and none of them is installed"),
    ],
)
def test_what_is_wrong_is_named_before_a_model_is_loaded(
    wrong: list[str], message: str, loaded: list[str], program: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["speak", *wrong])
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err
    assert loaded == []


def test_a_voice_that_cannot_clone_says_so(
    loaded: list[str],
    tmp_path: Path,
    tts: build.LabTTS,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    soundfile.write(tmp_path / "me.wav", torch.rand(24000).numpy(), 24000)
    monkeypatch.setattr(tts, "ve", None)
    with pytest.raises(SystemExit):
        main(["speak", TEXT, "--reference", "me.wav"])
    assert "this voice cannot clone" in capsys.readouterr().err


def test_nothing_but_its_own_words_reaches_the_terminal(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "chatterbox_lab", "speak", "Hello.", "--model", "tiny", *SHORT, "--stream"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stderr == ""
    firsts = [line.split()[0] for line in done.stdout.splitlines()]
    assert firsts == ["chunk", "chunk", "chunk", "speech.wav:", "First", "Once"]
