"""The recipe of the lab voice, run in the smallest sizes, and what its stages promise one another."""

from __future__ import annotations

import json
import random
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from chatterbox.models.tokenizers import EnTokenizer

import chatterbox_lab as lab
from chatterbox_lab.engine.request import encode_text
from chatterbox_lab.engine.t3 import decode, eager
from chatterbox_lab.training import __main__ as training
from chatterbox_lab.training import corpus, evaluate, flow, phones, t3, text, tokens, vocoder, voice
from chatterbox_lab.training.loop import Plan, Stage
from chatterbox_lab.voices import build

needs_teacher = pytest.mark.skipif(
    shutil.which("flite") is None or not text.WORDNET.is_dir(), reason="flite or wordnet-base is not installed"
)
SENTENCE = "We know that man, and don't you think he is right?"  # all words are common ones


def run(folder: Path, stage: str, *more: str) -> int:
    threads = torch.get_num_threads()
    try:
        return training.main(
            [stage, "--smoke", f"--folder={folder}", f"--to={folder / 'voice'}", "--threads=1", "--jobs=1", *more]
        )
    finally:
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the whole recipe has run."""
    made = tmp_path_factory.mktemp("recipe")
    for stage in ("text", "corpus", *voice.STAGES, "voice"):
        run(made, stage)
    return made


@pytest.fixture(scope="module")
def spoken(folder: Path) -> build.LabTTS:
    return lab.load(folder / "voice", device="cpu", watermark=False)


@pytest.fixture(scope="module")
def lexicon(folder: Path) -> dict[str, str]:
    return json.loads((folder / "lexicon.json").read_text())


@pytest.fixture(scope="module")
def read(lexicon: dict[str, str]) -> corpus.Utterance:
    """The teacher's reading of SENTENCE."""
    return corpus.utterance(SENTENCE, lexicon)


@pytest.fixture(scope="module")
def codec(spoken: build.LabTTS, lexicon: dict[str, str]) -> t3.TextCodec:
    return t3.text_codec(spoken.tokenizer.tokenizer.get_vocab(), lexicon, spoken.t3)


def inputs(folder: Path, to: Path) -> Path:
    """What the training stages read, in a folder of its own."""
    to.mkdir()
    for file in folder.iterdir():
        if file.suffix in (".json", ".npz"):
            shutil.copy(file, to)
    return to


def checkpoint(folder: Path, name: str) -> dict[str, Any]:
    return torch.load(folder / f"{name}.pt", weights_only=True)


def assert_same(ours: Any, theirs: Any, where: str = "") -> None:
    if torch.is_tensor(ours):
        assert torch.equal(ours, theirs), where
    elif isinstance(ours, dict):
        assert ours.keys() == theirs.keys(), where
        for key in ours:
            assert_same(ours[key], theirs[key], f"{where}.{key}")
    else:
        assert ours == theirs, where


# The whole recipe


@needs_teacher
def test_the_recipes_voice_loads_and_streams(spoken: build.LabTTS) -> None:
    settings = {"seed": 0, "max_new_tokens": 30}
    chunks = [audio for audio, _ in lab.generate_stream(spoken, SENTENCE, chunk_size=10, context_window=10, **settings)]
    said = lab.speech_tokens(spoken, SENTENCE, **settings)
    assert len(chunks) > 1
    assert sum(audio.shape[1] for audio in chunks) == 960 * len(said) > 0
    assert all(audio.isfinite().all() for audio in chunks)


@needs_teacher
@pytest.mark.parametrize("name", voice.STAGES)
def test_the_voice_holds_what_the_stages_learned(folder: Path, spoken: build.LabTTS, name: str) -> None:
    held, module = checkpoint(folder, name), voice.parts(voice.SMALL)[name]
    before = {key: value.clone() for key, value in module.state_dict().items()}
    module.load_state_dict(held["averaged"])
    assert any(not torch.equal(before[key], value) for key, value in module.state_dict().items())
    finish = {"t3": t3.finish, "flow": flow.finish, "vocoder": lambda module: module.state_dict()}[name]
    loaded = {"t3": spoken.t3, "flow": spoken.s3gen.flow, "vocoder": spoken.s3gen.mel2wav}[name].state_dict()
    for key, value in finish(module).items():
        assert torch.equal(value.half().float(), loaded[key].float()), key


@needs_teacher
@pytest.mark.parametrize("name", voice.STAGES)
def test_a_finished_stage_goes_on_only_to_more_steps(
    folder: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    again = inputs(folder, tmp_path / "again")
    shutil.copy(folder / f"{name}.pt", again)
    run(again, name)
    assert f"{name}: goes on from step 2" in capsys.readouterr().out
    assert_same(checkpoint(again, name), checkpoint(folder, name))
    run(again, name, "--steps=3")
    assert checkpoint(again, name)["step"] == 3
    log = pd.read_csv(again / f"{name}.csv")
    assert log.step.tolist() == [1, 2, 3]
    assert log.notna().all(axis=None)
    assert any(column.startswith("held_out") for column in log)


@needs_teacher
@pytest.mark.parametrize("name", voice.STAGES)
def test_an_interrupted_stage_ends_where_an_uninterrupted_one_does(
    folder: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, parted = inputs(folder, tmp_path / "whole"), inputs(folder, tmp_path / "parted")
    run(whole, name, "--steps=3")

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    for seed, method in enumerate(("_record", "_descend")):  # while it evaluates after a step, and before a step
        with monkeypatch.context() as patch:
            patch.setattr(Stage, method, stop)
            assert run(parted, name, "--steps=3") == 130
        torch.manual_seed(seed), random.seed(seed), np.random.seed(seed)  # noqa: NPY002
    assert checkpoint(parted, name)["step"] == 1
    run(parted, name, "--steps=3")
    ours, theirs = checkpoint(parted, name), checkpoint(whole, name)
    assert ours["step"] == theirs["step"] == 3
    for part in ("module", "averaged", "optimizer"):
        assert_same(ours[part], theirs[part], part)


@needs_teacher
@pytest.mark.parametrize("name", voice.STAGES)
def test_a_stage_goes_on_from_a_finished_voice(
    folder: Path, spoken: build.LabTTS, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    again, module = inputs(folder, tmp_path / "again"), voice.parts(voice.SMALL)[name]
    voice.resume(name, module, spoken)
    finish = {"t3": t3.finish, "flow": flow.finish, "vocoder": lambda module: module.state_dict()}[name]
    loaded = {"t3": spoken.t3, "flow": spoken.s3gen.flow, "vocoder": spoken.s3gen.mel2wav}[name].state_dict()
    for key, value in finish(module).items():
        torch.testing.assert_close(value, loaded[key].float(), rtol=0, atol=2e-3, msg=key)  # the file is in float16
    run(again, name, f"--voice={folder / 'voice'}", "--steps=3")
    held, log = checkpoint(again, name), pd.read_csv(again / f"{name}.csv")
    assert (held["begun"], held["step"]) == (2, 3)
    assert log.step.tolist() == [1, 2, 3]
    assert log.seconds.is_monotonic_increasing
    run(again, name, f"--voice={folder / 'voice'}", "--steps=4")  # a checkpoint goes before the voice
    assert f"{name}: goes on from step 3" in capsys.readouterr().out


def test_a_voice_that_does_not_fit_is_refused(request: pytest.FixtureRequest) -> None:
    module, tiny = voice.parts(voice.SMALL)["t3"], request.getfixturevalue("voice")
    with pytest.raises(ValueError, match="t3: the voice has other sizes"):
        voice.resume("t3", module, tiny)
    shorter = build.assemble(replace(voice.SMALL, t3_layers=13), None, watermark=False)
    with pytest.raises(ValueError, match=r"t3: the voice has no tfmr\.layers\.13"):
        voice.resume("t3", module, shorter)


@needs_teacher
def test_measure_writes_a_row_for_each_path(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(evaluate, "transcribe", lambda _: "nothing")  # the recogniser takes long over noise
    monkeypatch.setattr(evaluate, "streamed", lambda *_: torch.zeros(1, 960))
    run(folder, "measure")
    table = pd.read_csv(folder / "voice" / "quality.csv")
    told = table.groupby("text").path.apply(tuple).to_dict()
    assert told.pop(" ".join(evaluate.held_out(2))) == ("paragraph",)
    assert told == dict.fromkeys(evaluate.held_out(2), evaluate.PATHS[:-1])
    assert (table.wer == 1).all()
    lengths = table.pivot_table(index="text", columns="path", values="seconds").loc[evaluate.held_out(2)]
    assert (lengths.vocoder == lengths.tokens).all()
    assert ((lengths.teacher - lengths.vocoder).abs() < 1).all()
    printed = capsys.readouterr().out
    assert all(path in printed for path in evaluate.PATHS)


# Loop


def test_the_rate_rises_then_falls() -> None:
    plan = Plan(steps=100, batch=1, warmup=10)
    factors = [plan.factor(step) for step in range(101)]
    assert factors[0] == 0.1
    assert factors.index(max(factors)) in (9, 10)
    assert max(factors) == 1
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert factors[-1] == pytest.approx(0.02)


def test_an_optimizer_that_begins_later_warms_up_there() -> None:
    plan = Plan(steps=100, batch=1, warmup=10)
    assert [plan.factor(50 + i, begun=50) / plan.factor(50 + i) for i in range(12)] == pytest.approx(
        [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1, 1, 1]
    )


@pytest.mark.parametrize("sizes", [{"steps": 0, "batch": 1}, {"steps": 1, "batch": 0}])
def test_a_plan_of_nothing_is_refused(sizes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="must be at least 1"):
        Plan(**sizes)


# Text


def test_held_out_sentences_are_never_learned(tmp_path: Path) -> None:
    held = evaluate.held_out()
    examples = [held[0], held[1].rstrip(".").lower(), "a dog is here now", "two words"]
    quoted = "; ".join(f'"{example}"' for example in examples)
    (tmp_path / "data.noun").write_text(f"0001 | a gloss; {quoted}\n")
    assert text.sentences(9, wordnet=tmp_path) == ["A dog is here now."]


@needs_teacher
def test_sentences_are_chosen_by_the_seed_from_all_of_wordnet() -> None:
    everything = text.sentences(10**6)
    held = {" ".join(text.words(line)) for line in evaluate.held_out()}
    assert len(everything) > 16000
    assert not held & {" ".join(text.words(sentence)) for sentence in everything}
    assert text.sentences(50) == everything[:50]
    assert text.sentences(50, seed=1) != everything[:50]


def test_without_wordnet_or_flite_it_is_said_how_to_get_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match="apt install wordnet-base"):
        text.sentences(1, wordnet=tmp_path / "none")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="apt install flite"):
        text.pronunciations(["hello"])
    with pytest.raises(FileNotFoundError, match="apt install flite"):
        corpus.read_aloud("Hello.")
    with pytest.raises(FileNotFoundError, match="training corpus"):
        corpus.load(tmp_path)


LITTLE = {"the": "dh ax", "sister": "s ih1 s t er", "don": "d aa1 n", "s": "eh1 s", "t": "t iy1"}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("The sister.", "{the} {sister}."),
        ("the THE", "{the} {the}"),
        ("other theme, sisters", "other theme, sisters"),  # words within words stay
        ("The sister's", "{the} sister's"),  # a word is read as a whole or spelled as a whole
        ("don't", "don't"),
    ],
)
def test_words_of_the_lexicon_become_phones_and_others_stay_letters(given: str, expected: str) -> None:
    written = {word: phones.spelled(pronunciation) for word, pronunciation in LITTLE.items()}
    assert text.tokenizer(LITTLE).normalizer.normalize_str(given) == expected.format(**written)


def test_an_unknown_phone_is_refused() -> None:
    with pytest.raises(ValueError, match="'qq' is no phone"):
        phones.spelled("hh qq")


@needs_teacher
def test_the_codec_gives_the_ids_of_the_voices_own_tokenizer(
    folder: Path, spoken: build.LabTTS, codec: t3.TextCodec, read: corpus.Utterance, tmp_path: Path
) -> None:
    example = codec.example(read, 0, random.Random(0))
    assert example.text.tolist() == encode_text(spoken, SENTENCE)[0].tolist()
    assert example.text.max() >= phones.FIRST_ID
    assert EnTokenizer(str(folder / "tokenizer.json")).encode(SENTENCE) == example.text[1:-1].tolist()
    text.tokenizer({}).save(str(tmp_path / "letters.json"))
    letters = codec.example(read, 1, random.Random(0)).text
    assert letters[1:-1].tolist() == EnTokenizer(str(tmp_path / "letters.json")).encode(SENTENCE)
    assert letters.max() < phones.FIRST_ID


@needs_teacher
def test_every_text_of_the_corpus_is_spelled_in_whole_words(
    folder: Path, spoken: build.LabTTS, lexicon: dict[str, str]
) -> None:
    common = {word for word in text.common_words(300) if word in lexicon}
    for sentence in json.loads((folder / "sentences.json").read_text()):
        ids = spoken.tokenizer.encode(sentence)
        spelled = "".join(spoken.tokenizer.tokenizer.id_to_token(i) for i in ids).replace("[SPACE]", " ")
        written = re.sub(
            r"[a-z']+", lambda w: phones.spelled(lexicon[w[0]]) if w[0] in common else w[0], sentence.lower()
        )
        assert spelled == written


def test_a_vocabulary_without_phones_is_refused(voice: build.LabTTS) -> None:
    with pytest.raises(ValueError, match="has no phones"):
        t3.text_codec(build.letter_tokenizer().get_vocab(), {}, voice.t3)


# Corpus and tokens


@needs_teacher
def test_shards_that_are_there_are_kept_and_others_made(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus, "SHARD", 2)
    for name in ("sentences.json", "lexicon.json"):
        shutil.copy(folder / name, tmp_path)
    corpus.make(tmp_path, jobs=1, limit=4)
    first, second = sorted(tmp_path.glob("shard_*.npz"))
    made = {name: value.copy() for name, value in np.load(second).items()}
    first.write_bytes(b"kept")
    second.unlink()
    corpus.make(tmp_path, jobs=1, limit=4)
    assert first.read_bytes() == b"kept"
    again = np.load(second)
    assert all(np.array_equal(again[name], value) for name, value in made.items())


@needs_teacher
def test_the_corpus_describes_every_frame(folder: Path) -> None:
    items = corpus.load(folder)
    assert len(items) >= 4
    for item in items:
        frames = len(item.mel)
        assert frames % 2 == 0
        assert (len(item.speech), len(item.phones), len(item.pitch)) == (frames * corpus.HOP, frames, frames)
        assert len(item.spans) == len(text.words(item.text))
        for name, first, end in (span for word in item.spans for span in word):
            assert set(item.phones[first:end]) <= {phones.PHONES.index(name)}
        assert np.abs(item.speech).max() > 1000
    assert len(corpus.load(folder, speech=False)[0].speech) == 0


@needs_teacher
def test_tokens_say_phones_and_pitch(read: corpus.Utterance) -> None:
    first, second, level = tokens.parts(torch.from_numpy(tokens.codes(read)))
    assert first.tolist() == read.phones[::2].tolist()
    assert second.tolist() == read.phones[1::2].tolist()
    assert set(level.tolist()) == {0, 1, 2}
    voiceless = (corpus.steady(read.pitch).reshape(-1, 2) == 0).all(1)
    assert (level[torch.from_numpy(voiceless)] == 0).all()


def test_every_code_is_the_sum_of_its_parts() -> None:
    every = torch.arange(tokens.CODES)
    first, second, level = tokens.parts(every)
    assert torch.equal((first * len(phones.PHONES) + second) * tokens.LEVELS + level, every)
    assert tokens.parts(torch.tensor([6560])) == tokens.parts(torch.tensor([tokens.CODES - 1]))


@pytest.mark.parametrize("own", [False, True])
def test_the_table_of_an_embedding_is_what_it_gives(own: bool) -> None:
    embedding = tokens.CodeEmbedding(6563, 8, own=own)
    torch.nn.init.normal_(embedding.own)
    code = torch.tensor([[0, 1], [tokens.CODES - 1, 1234]])
    shared = sum(table(part) for table, part in zip(embedding.tables, tokens.parts(code), strict=True))
    expected = shared + embedding.own[code] if own else shared
    torch.testing.assert_close(embedding(code), expected)
    assert torch.equal(embedding(torch.tensor([6561, 6562])), embedding.own[-2 if not own else 6561 :][:2])
    assert torch.equal(embedding(torch.arange(6563)), embedding.weight())


# Batches


@needs_teacher
@pytest.mark.parametrize("name", voice.STAGES)
def test_a_batch_is_drawn_from_the_number_of_its_step(folder: Path, codec: t3.TextCodec, name: str) -> None:
    items = corpus.load(folder)
    batches = {
        "t3": lambda: t3.Batches(items, codec, 2),
        "flow": lambda: flow.Batches(items, 2),
        "vocoder": lambda: vocoder.Batches(items, 2),
    }[name]
    shown = batches()
    first, other = shown(1), shown(2)
    random.seed(5), np.random.seed(5), torch.manual_seed(5)  # noqa: NPY002
    assert str(batches()(1)) == str(first) != str(other)


@needs_teacher
def test_a_window_may_be_longer_than_the_corpus(read: corpus.Utterance) -> None:
    mel, codes = flow.Batches([read], 3)(0)
    assert len(read.mel) // 2 < flow.WINDOW
    assert codes.shape == (3, flow.WINDOW)
    assert mel.shape == (3, 2 * flow.WINDOW, 80)
    shown = {tuple(pair) for pair in mel.reshape(3 * flow.WINDOW, -1)[:, :1].tolist()}
    assert shown <= {tuple(pair) for pair in torch.from_numpy(read.mel).float().reshape(-1, 160)[:, :1].tolist()}


@needs_teacher
def test_t3_is_told_to_look_at_the_phone_it_says(codec: t3.TextCodec, read: corpus.Utterance) -> None:
    example = codec.example(read, 0, random.Random(0))
    assert len(example.position) == len(example.speech) + 1
    assert (example.position.diff() >= 0).all()
    assert example.position[-1] == len(example.text) - 1
    names = {codec.ids[symbol]: phone.rstrip("1") for phone, symbol in phones.SYMBOLS.items()}
    said = [phones.PHONES[phone] for phone in read.phones[::2]]
    seen = [names.get(int(example.text[place])) for place in example.position[:-1]]
    pairs = [(ours, theirs) for ours, theirs in zip(said, seen, strict=True) if ours != phones.PAUSE]
    assert sum(ours == theirs for ours, theirs in pairs) > 0.8 * len(pairs)


@needs_teacher
def test_sentences_said_one_after_the_other_look_at_their_own_text(codec: t3.TextCodec, read: corpus.Utterance) -> None:
    one, space = codec.example(read, 0, random.Random(0)), codec.ids["[SPACE]"]
    both = t3.joined([one, one], space)
    assert both.text.tolist() == [*one.text[:-1].tolist(), space, *one.text[1:].tolist()]
    assert both.speech.tolist() == 2 * one.speech.tolist()
    seen = one.text[one.position].tolist()
    assert both.text[both.position].tolist() == [*seen[:-1], *seen]
    assert (both.position.diff() >= 0).all()


# Released layout


def test_finished_weights_have_the_released_names() -> None:
    trained, released = voice.parts(voice.SMALL), build.SizedS3Gen(voice.SMALL)
    target = build._t3(voice.SMALL)
    target.cond_enc.perceiver = None
    target.load_state_dict(t3.finish(trained["t3"]), strict=True)
    released.flow.load_state_dict(flow.finish(trained["flow"]), strict=True)
    released.mel2wav.load_state_dict(trained["vocoder"].state_dict(), strict=True)
    code = torch.tensor([0, 17, tokens.CODES - 1, 6560])
    assert torch.equal(released.flow.input_embedding(code), trained["flow"].input_embedding(code))
    hidden = torch.randn(3, target.dim)
    torch.testing.assert_close(target.speech_head(hidden), trained["t3"].speech_head(hidden))


@torch.no_grad()
@pytest.mark.parametrize("conditional", [True, False])
def test_t3_learns_from_what_it_is_fed_when_it_speaks(conditional: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = voice.parts(voice.SMALL)["t3"].eval()
    draw = torch.Generator().manual_seed(0)
    written = torch.tensor([255, *torch.randint(3, 255, (9,), generator=draw).tolist(), 0])
    said = torch.randint(tokens.CODES, (12,), generator=draw)
    example = t3.Example(written, said, torch.zeros(13, dtype=torch.long))
    monkeypatch.setattr(t3, "WITHOUT_TEXT", 1.1)  # training drops the text of all sentences
    monkeypatch.setattr(t3, "WRONG", -1.0)  # and exchanges no token
    logits: list[torch.Tensor] = []
    trained.speech_head.register_forward_hook(lambda *call: logits.append(call[2]))
    longer = t3.Example(written, said.repeat(2), torch.zeros(25, dtype=torch.long))  # the batch is padded
    t3.losses(trained, [example, longer], training=not conditional)

    finished = build._t3(voice.SMALL).eval()
    finished.cond_enc.perceiver = None
    finished.load_state_dict(t3.finish(trained))
    embeds, _ = decode.prompt(finished, t3.speaker(finished), written.repeat(2, 1))
    fed = [eager.embed(finished, token.view(1, 1), i + 1) for i, token in enumerate(said)]
    hidden = finished.tfmr(inputs_embeds=torch.cat([embeds, *fed], 1)).last_hidden_state
    spoken = finished.speech_head(hidden)[0 if conditional else 1, -len(said) - 1 :]
    torch.testing.assert_close(logits[0][: len(said) + 1], spoken, rtol=1e-3, atol=1e-4)


def test_the_flow_is_left_as_it_was_whatever_a_step_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    trained = voice.parts(voice.SMALL)["flow"]
    monkeypatch.setattr(flow, "BLOCKS", (25,))
    drawn: list[int] = []
    estimator = trained.decoder.estimator
    estimator.register_forward_pre_hook(lambda *_: drawn.append(estimator.static_chunk_size))
    flow.losses(trained, torch.randn(1, 2 * flow.WINDOW, 80), torch.randint(tokens.CODES, (1, flow.WINDOW)))
    assert drawn == [50]
    assert estimator.static_chunk_size == 0
    assert not trained.training
