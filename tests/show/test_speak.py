"""The first sound: written whole, played as it is made, told in plain words."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import threading
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


@pytest.mark.filterwarnings("ignore:max_new_tokens=")
def test_a_text_becomes_a_wav_and_its_speed_is_told(
    loaded: list[str], tmp_path: Path, tts: build.LabTTS, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["speak", TEXT, *SHORT, "--seed", "3"]) == 0
    assert loaded == ["lab"]
    said = capsys.readouterr().out
    assert "speech.wav: 0.40 s of speech. An utterance was cut at the 0.4 s of --most: raise --most." in said
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
    spoken = speak.speak

    def stream(*args: object, **kwargs: object) -> object:
        for item in spoken(*args, **kwargs):
            order.append("made")
            yield item

    monkeypatch.setattr(speak, "speak", stream)
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
    monkeypatch.setattr(speak, "speak", stop)
    (tmp_path / "speech.wav").write_text("as it was")
    assert main(["speak", TEXT, "--play"]) == 130
    assert "Stopped." in capsys.readouterr().out
    assert [player.poll() is not None for player in players] == [True]
    assert (tmp_path / "speech.wav").read_text() == "as it was"


@pytest.mark.filterwarnings("ignore:max_new_tokens=")
def test_a_text_of_any_length_is_spoken_in_utterances_and_whole_only_if_asked_for(
    loaded: list[str], tmp_path: Path, tts: build.LabTTS, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "Hello there, you. This is it now!"
    assert main(["speak", text, *SHORT]) == 0
    pause = round(lab.Pauses().sentence * 24000)
    assert len(samples(tmp_path / "speech.wav")) == 2 * 10 * 960 + pause
    assert main(["speak", text, *SHORT, "--whole", "-o", "whole.wav"]) == 0
    stream = lab.generate_stream(tts, text, lab.BALANCED, seed=0, max_new_tokens=10, chunk_size=4)
    audio = torch.cat([chunk for chunk, _ in stream], dim=1)
    assert samples(tmp_path / "whole.wav") == lab.pcm16(audio).tolist()
    assert "It was cut at the 0.4 s of --most: raise --most." in capsys.readouterr().out


def test_speech_begins_before_the_end_of_the_standard_input(
    loaded: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    heard, in_time = threading.Event(), []
    reading, writing = os.pipe()

    def write() -> None:
        with os.fdopen(writing, "w") as pipe:
            pipe.write("Hello there, you. This is")
            pipe.flush()
            in_time.append(heard.wait(60))
            pipe.write(" it now!\n")

    spoken = speak.speak

    def stream(*args: object, **kwargs: object) -> Iterator[object]:
        for item in spoken(*args, **kwargs):
            heard.set()
            yield item

    monkeypatch.setattr(speak, "speak", stream)
    writer = threading.Thread(target=write)
    writer.start()
    with os.fdopen(reading) as pipe:
        monkeypatch.setattr(sys, "stdin", pipe)
        assert main(["speak", "-", *SHORT]) == 0
    writer.join()
    assert in_time == [True]
    assert "than real time, waiting for the text included." in capsys.readouterr().out
    piped = samples(tmp_path / "speech.wav")
    assert main(["speak", "Hello there, you. This is it now!", *SHORT]) == 0
    assert samples(tmp_path / "speech.wav") == piped


def test_whole_waits_for_the_whole_standard_input(loaded: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(speak, "generate_stream", lambda tts, text, *_, **__: asked.append(text) or iter([]))
    monkeypatch.setattr(sys, "stdin", io.StringIO("Read from a pipe.\n"))
    assert main(["speak", "-", "--whole"]) == 1
    assert asked == ["Read from a pipe.\n"]


def test_a_standard_input_with_nothing_to_say_is_named(
    loaded: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(" ...\n"))
    with pytest.raises(SystemExit):
        main(["speak", "-"])
    assert "text: held nothing to say" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:max_new_tokens=")
@pytest.mark.parametrize("name", ["said.srt", "said.vtt"])
@pytest.mark.parametrize("how", [[], ["--whole"]])
def test_subtitles_are_those_of_the_words_and_change_no_sound(
    loaded: list[str], tmp_path: Path, tts: build.LabTTS, how: list[str], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    said = ["speak", TEXT, "--most", "4", *how]
    assert main([*said, "--subtitles", name]) == 0
    spoken = lab.generate_stream if how else lab.speak
    *_, (_, metrics) = spoken(tts, TEXT, lab.BALANCED, seed=0, max_new_tokens=100, analyzer="probe")
    lab.subtitles(metrics.words, f"expected{name}")
    assert (tmp_path / name).read_text() == (tmp_path / f"expected{name}").read_text()
    assert f"{name}: {len(metrics.words)} words." in capsys.readouterr().out
    with_words = samples(tmp_path / "speech.wav")
    assert main(said) == 0
    assert samples(tmp_path / "speech.wav") == with_words


def test_without_a_word_there_are_no_subtitles_and_it_says_so(
    loaded: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(speak, "speak", lambda *_, **__: made_up(words=[]))
    assert main(["speak", TEXT, "--subtitles", "said.srt"]) == 1
    assert "no word was found in the speech, so said.srt was not written" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["speech.wav"]


def made_up(**fields: object) -> Iterator[tuple[torch.Tensor, lab.StreamMetrics]]:
    yield (
        torch.zeros(1, 960),
        lab.StreamMetrics(rtf=0.5, latency_to_first_chunk=0.1, total_audio_duration=0.04, **fields),
    )


@pytest.mark.parametrize(
    ("ended", "how", "told"),
    [
        ("stop", [], "0.04 s of speech.\n"),
        (None, [], "0.04 s of speech.\n"),
        ("guard", [], "0.04 s of speech. The guard ended it, as it strayed from the text: try another --seed.\n"),
        ("limit", [], "An utterance was cut at the 40 s of --most: try another --seed.\n"),
        ("limit", ["--whole"], "It was cut at the 40 s of --most: leave out --whole.\n"),
        ("limit", ["--whole", "--most", "39"], "It was cut at the 39 s of --most: raise --most.\n"),
    ],
)
def test_how_it_ended_is_told_and_what_to_change(
    ended: str | None,
    how: list[str],
    told: str,
    loaded: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(
        speak, "generate_stream" if "--whole" in how else "speak", lambda *_, **__: made_up(ended=ended)
    )
    assert main(["speak", TEXT, *how]) == 0
    assert told in capsys.readouterr().out


def test_a_model_that_says_nothing_writes_nothing(
    loaded: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(speak, "speak", lambda *_, **__: iter([]))
    assert main(["speak", TEXT]) == 1
    assert "The model said nothing." in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ([" "], "text=' ': must be a string with something to say"),
        (["..."], "text='...': must be a string with something to say"),
        ([" ", "--whole"], "text=' ': must be a string with something to say"),
        ([TEXT, "--subtitles", "said.ass"], "subtitles='said.ass': must end in .srt or .vtt"),
        ([TEXT, "--subtitles", "nowhere/a.vtt"], "subtitles='nowhere/a.vtt': there is no folder 'nowhere'"),
        (
            [TEXT, "--subtitles", "a.vtt", "--variant", "turbo"],
            "subtitles='a.vtt': cannot be written with --variant turbo",
        ),
        (
            [TEXT, "--subtitles", "a.vtt", "--variant", "nano"],
            "subtitles='a.vtt': cannot be written with --variant nano",
        ),
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
