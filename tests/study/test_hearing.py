"""Each measure hears what it is for, and nothing where there is nothing."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
import torch

from chatterbox_lab.study import hearing
from chatterbox_lab.training.corpus import read_aloud

needs_flite = pytest.mark.skipif(shutil.which("flite") is None, reason="flite is not installed")
SENTENCE = "The children are playing in the garden behind the school."
RATE, SEAM = 24000, 12000


def tone(hertz: float = 200, seconds: float = 1) -> torch.Tensor:
    return 0.3 * torch.sin(2 * torch.pi * hertz * torch.arange(int(seconds * RATE)) / RATE)


def faded_in(seam: int = SEAM) -> torch.Tensor:
    audio = tone()
    audio[seam : seam + 480] *= torch.linspace(0, 1, 480)
    return audio


@pytest.fixture(scope="module")
def speech() -> torch.Tensor:
    return read_aloud(SENTENCE)[0]


@needs_flite
def test_the_teachers_sentence_is_understood(speech: torch.Tensor) -> None:
    heard = hearing.transcribe(speech[None])
    assert heard == heard.lower()
    assert hearing.word_errors(SENTENCE, heard)["wer"] <= 0.2


@needs_flite
def test_what_was_heard_before_does_not_change_what_is_understood(speech: torch.Tensor) -> None:
    noise = 0.02 * torch.randn(speech.shape, generator=torch.Generator().manual_seed(0))
    unclear = (speech + noise)[: 2 * RATE]
    first = hearing.transcribe(unclear)
    hearing.transcribe(0.5 * speech)
    assert hearing.transcribe(unclear) == first


@pytest.mark.parametrize("level", [0, 1e-4])
def test_in_silence_nothing_is_understood(level: float) -> None:
    noise = torch.randn(RATE, generator=torch.Generator().manual_seed(0))
    assert hearing.transcribe(level * noise) == ""


@pytest.mark.parametrize(
    ("understood", "errors"),
    [
        ("the old man walked slowly", 0),
        ("The OLD man -- walked, slowly!", 0),
        ("the old man talked slowly", 1),  # a substitution
        ("the the old man walked slowly", 1),  # an insertion
        ("the man walked slowly", 1),  # a deletion
        ("a man walked so slowly", 3),  # one of each
        ("", 5),
    ],
)
def test_word_errors_counts_words_and_nothing_else(understood: str, errors: int) -> None:
    found = hearing.word_errors("The old man walked slowly.", understood)
    assert found == {"words": 5, "errors": errors, "wer": errors / 5}


@pytest.mark.parametrize(
    ("said", "understood", "count"),
    [
        ("A short story.", "a short short story", 1),
        ("A short story.", "a short story a short story", 1),
        ("On our street.", "on our on our on our street", 3),
        ("No, no, no.", "no no no", 0),
        ("No, no, no.", "no no", 0),
        ("Yes.", "", 0),
    ],
)
def test_words_said_twice_in_a_row_are_counted(said: str, understood: str, count: int) -> None:
    assert hearing.repeats(said, understood) == count


@pytest.mark.parametrize("said", ["", " ", "...?!"])
def test_errors_of_nothing_said_are_refused(said: str) -> None:
    with pytest.raises(ValueError, match=r"said=.*at least one word"):
        hearing.word_errors(said, "hello")


def test_the_rate_of_many_sentences_weighs_them_by_their_words() -> None:
    rows = [hearing.word_errors("yes", "no"), hearing.word_errors("one two three four", "one two three four")]
    assert hearing.word_error_rate(pd.DataFrame(rows)) == 1 / 5


@needs_flite
def test_listeners_hear_lost_pieces(speech: torch.Tensor) -> None:
    broken = speech.clone()
    for start in range(0, len(broken), RATE // 10):
        broken[start : start + RATE // 50] = 0
    clean, gaps = hearing.opinion_scores(speech), hearing.opinion_scores(broken)
    assert all(1 <= score <= 5 for scores in (clean, gaps) for score in scores.values())
    assert clean["plcmos"] > gaps["plcmos"] + 1
    assert clean["dnsmos"] > gaps["dnsmos"]


def test_a_fade_from_zero_is_a_dip_at_its_own_seam_only() -> None:
    elsewhere, here = hearing.seam_dips(faded_in()[None], [SEAM // 2, SEAM])
    assert abs(elsewhere) < 0.1
    assert -20 < here < -6


def test_a_steady_tone_has_no_dips_also_at_its_edges() -> None:
    assert np.abs(hearing.seam_dips(tone(), [1, 240, SEAM, RATE - 240, RATE - 1])).max() < 0.5


def test_silence_has_nothing_to_dip() -> None:
    audio = tone()
    audio[SEAM - 2000 : SEAM + 2000] = 0
    beside, within = hearing.seam_dips(audio, [SEAM // 2, SEAM])
    assert math.isfinite(beside)
    assert math.isnan(within)


def test_flux_hears_a_change_of_sound_and_not_of_phase() -> None:
    jump = torch.cat([tone()[:SEAM], tone(1000)[SEAM:]])
    steady = hearing.seam_flux(tone(), [SEAM, SEAM + 10])
    before, at = hearing.seam_flux(jump, [SEAM // 2, SEAM])
    assert max(*steady, before) < 0.1
    assert at > 1


def test_flux_at_the_edges_is_finite() -> None:
    assert np.isfinite(hearing.seam_flux(tone(), [1, RATE - 1])).all()


def test_the_distance_of_mels_grows_with_the_difference() -> None:
    assert hearing.mel_distance(tone(), tone()) == 0
    near, far = (hearing.mel_distance(tone() * factor, tone()) for factor in (0.9, 0.5))
    assert 0 < near < far < 20 * math.log10(2) + 0.1  # half the amplitude is 6 dB less, but not where there was none


def test_mels_of_different_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="as long as the reference, 12000"):
        hearing.mel_distance(tone(), tone(seconds=0.5))


def test_joins_are_told_beside_those_of_the_reference() -> None:
    seams = [SEAM // 2, SEAM]
    found = hearing.joins(faded_in(), seams, tone())
    assert found["dip"] == pytest.approx(hearing.seam_dips(faded_in(), seams).mean())
    assert found["flux"] == hearing.seam_flux(faded_in(), seams).mean()
    alone = hearing.joins(tone(), seams)
    assert (found["reference_dip"], found["reference_flux"]) == (alone["dip"], alone["flux"])
    assert found["mel_distance"] == hearing.mel_distance(faded_in(), tone())
    assert set(alone) == {"dip", "flux"}


def test_an_utterance_without_seams_has_no_joins() -> None:
    assert all(math.isnan(value) for value in hearing.joins(tone(), []).values())


def test_where_all_is_silent_nothing_dips_or_changes() -> None:
    found = hearing.joins(torch.zeros(RATE), [SEAM])
    assert math.isnan(found["dip"])
    assert found["flux"] == 0


@pytest.mark.parametrize("measure", [hearing.seam_dips, hearing.seam_flux, hearing.joins])
@pytest.mark.parametrize("seam", [-1, 0, RATE, RATE + 1])
def test_a_seam_outside_the_audio_is_refused(measure: Callable, seam: int) -> None:
    with pytest.raises(ValueError, match=rf"seams={seam}: must lie within"):
        measure(tone(), [SEAM, seam])


@pytest.mark.parametrize(
    "audio", [torch.zeros(0), torch.zeros(2, RATE), torch.zeros(1, 1, RATE), torch.full((RATE,), torch.nan)]
)
def test_what_is_no_audio_is_refused(audio: torch.Tensor) -> None:
    for measure in (hearing.transcribe, hearing.opinion_scores, lambda a: hearing.seam_dips(a, [SEAM])):
        with pytest.raises(ValueError, match="audio="):
            measure(audio)
    with pytest.raises(ValueError, match="audio="):
        hearing.mel_distance(audio, audio)
