"""The voice that ships: it loads, it is small, it speaks, and its alignment shows where the analyzers look."""

from __future__ import annotations

import pandas as pd
import pytest
import torch

import chatterbox_lab as lab
from chatterbox_lab.engine.request import encode_text
from chatterbox_lab.engine.t3.attention import FORK_HEADS, LATER_HEADS, Attention
from chatterbox_lab.engine.t3.decode import conditioning
from chatterbox_lab.files import REPOSITORY
from chatterbox_lab.study import hearing as quality
from chatterbox_lab.study import trials
from chatterbox_lab.training import evaluate
from chatterbox_lab.voices import build, config

FOLDER = REPOSITORY / "data" / "lab"
SENTENCES = trials.HELD_OUT.read_text().splitlines()[:6]


@pytest.fixture(scope="module")
def spoken() -> build.LabTTS:
    """The shipped voice, without a watermark."""
    return lab.load(device="cpu", watermark=False)


def test_it_is_the_default_and_fits_into_25_mb(spoken: build.LabTTS) -> None:
    assert spoken.config == config.ModelConfig.read(FOLDER / "config.json")
    assert spoken.config.t3_layers >= 14
    stored = [FOLDER / name for name in ("t3_cfg.safetensors", "s3gen.safetensors", "tokenizer.json", "conds.pt")]
    assert sum(file.stat().st_size for file in stored) <= 25e6


def test_a_stream_of_sentences_it_never_saw_is_understood(spoken: build.LabTTS) -> None:
    rows = []
    for text in SENTENCES:
        audio = torch.cat([chunk for chunk, _ in lab.generate_stream(spoken, text, lab.BASELINE, seed=0)], dim=1)
        rows.append(quality.word_errors(text, quality.transcribe(audio)))
    assert quality.word_error_rate(pd.DataFrame(rows)) < 0.3  # of the hundred it is under 0.15, see the card


@pytest.mark.parametrize("heads", [FORK_HEADS, LATER_HEADS], ids=["fork", "later"])
def test_its_alignment_walks_through_the_text(spoken: build.LabTTS, heads: object) -> None:
    settings = lab.BASELINE.replace(analyzer="probe")
    codes = lab.speech_tokens(spoken, SENTENCES[0], settings, seed=0)
    text = encode_text(spoken, SENTENCES[0])
    embeds, begin = spoken.t3.prepare_input_embeds(
        t3_cond=conditioning(spoken, 0.5),
        text_tokens=text,
        speech_tokens=torch.full((2, 1), spoken.t3.hp.start_speech_token),
    )
    speech = torch.cat([torch.tensor([spoken.t3.hp.start_speech_token]), codes])
    place = torch.arange(len(speech))
    fed = spoken.t3.speech_emb(speech) + spoken.t3.speech_pos_emb.emb(place)
    attention = Attention(spoken.t3.tfmr, "probe", (begin, begin + text.shape[1]), heads)
    attention(torch.cat([embeds, fed.expand(2, -1, -1)], dim=1))
    looked = attention.rows[1:].argmax(1)
    assert (looked.diff() >= 0).float().mean() > 0.9
    assert looked[0] <= 3
    assert looked[-1] >= text.shape[1] - 4


def test_the_analyzer_sees_it_start_and_complete_without_forcing_it(spoken: build.LabTTS) -> None:
    for text in SENTENCES:
        free = lab.speech_tokens(spoken, text, lab.BASELINE.replace(analyzer="probe"), seed=0)
        guarded = lab.speech_tokens(spoken, text, lab.BASELINE.replace(analyzer="probe", guard=True), seed=0)
        assert torch.equal(free, guarded)


def test_words_of_the_lexicon_are_read_as_phones_and_others_as_letters(spoken: build.LabTTS) -> None:
    tokens = spoken.tokenizer.tokenizer.encode("water[SPACE]zzyzx").tokens
    assert len(tokens) == len(["w", "ao", "t", "er"]) + 1 + len("zzyzx")
    assert tokens[-5:] == list("zzyzx")


def test_the_card_and_the_measures_ship_with_it() -> None:
    card = (FOLDER / "README.md").read_text()
    table = evaluate.read(FOLDER / "quality.csv")
    assert evaluate.markdown(table) in card
    assert set(table["path"]) == set(evaluate.PATHS)
    assert len(table[table["path"] == "stream"]) == 100
