"""Turbo and Nano: loaded, saved, given the voice of a recording, patched, and spoken with."""

from __future__ import annotations

import copy
import inspect
import itertools
import json
import pickle
import shutil
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import soundfile
import torch
from chatterbox import tts_turbo
from chatterbox.models.s3gen.decoder import ConditionalDecoder
from chatterbox.models.t3 import T3
from chatterbox.models.t3.llama_configs import LLAMA_CONFIGS
from chatterbox.models.t3.modules.t3_config import T3Config
from chatterbox.models.voice_encoder import VoiceEncoder
from chatterbox.tts_turbo import ChatterboxTurboTTS
from ends import stopping

import chatterbox_lab as lab
from chatterbox_lab import recordings
from chatterbox_lab.__main__ import main
from chatterbox_lab.engine import patch as patching
from chatterbox_lab.engine.s3gen.render import Renderer
from chatterbox_lab.show import speak
from chatterbox_lab.show.explorer import Explorer
from chatterbox_lab.study.machine import step_bytes
from chatterbox_lab.voices import build
from chatterbox_lab.voices import load as models
from chatterbox_lab.voices.config import ModelConfig
from chatterbox_lab.voices.folder import save
from chatterbox_lab.voices.kinds import KINDS

TEXT = "Hello there [laugh] my friends."
RATE = 24000
pytestmark = pytest.mark.filterwarnings("ignore:the recording")


class StageError(Exception):
    """Ends a call of the release where the test has seen enough."""


def left(tts: Any) -> list[Any]:
    """What a call could leave on a model."""
    hooks = sum(len(part._forward_hooks) + ("forward" in vars(part)) for part in tts.t3.modules())
    own = [list(vars(part)) for part in (tts, tts.t3, tts.t3.tfmr, tts.s3gen)]
    return [type(tts), hooks, own, str(tts.t3.tfmr.config)]


@pytest.fixture(params=["turbo", "nano"])
def tts(request: pytest.FixtureRequest) -> Iterator[Any]:
    """Either model; the test fails if it leaves anything behind on it."""
    model = request.getfixturevalue(request.param)
    before, conds = left(model), model.conds
    yield model
    model.conds = conds
    assert left(model) == before


@pytest.fixture(scope="module")
def folders(turbo: Any, nano: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[type, Path]:
    return {type(tts): save(tts, tmp_path_factory.mktemp("model")) for tts in (turbo, nano)}


@pytest.fixture
def folder(tts: Any, folders: dict[type, Path], tmp_path: Path) -> Path:
    """A copy of the saved model that the test may change."""
    for file in folders[type(tts)].iterdir():
        shutil.copy(file, tmp_path)
    return tmp_path


def variant(tts: Any) -> str:
    return next(name for name, kind in KINDS.items() if kind is tts.kind)


def tensors(conds: Any) -> dict[str, torch.Tensor]:
    return {name: value for name, value in (vars(conds.t3) | conds.gen).items() if torch.is_tensor(value)}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def sound(seconds: float, rate: int = RATE, seed: int = 0) -> np.ndarray:
    """A hum that swells and falls, with a little noise, float32 (n,)."""
    times = np.arange(round(seconds * rate)) / rate
    noise = np.random.default_rng(seed).normal(0, 0.01, len(times))
    hum = sum(np.sin(2 * np.pi * 120 * k * times) / k for k in range(1, 20))
    return (0.1 * hum * np.sin(2 * np.pi * 2 * times) ** 2 + noise).astype(np.float32)


def written(path: Path, seconds: float, rate: int = RATE, channels: int = 1) -> Path:
    soundfile.write(path, np.stack([sound(seconds, rate, seed) for seed in range(channels)], axis=1), rate)
    return path


# Loading and saving


def test_a_small_model_is_of_the_releases_classes_in_its_shapes(tts: Any) -> None:
    assert isinstance(tts, ChatterboxTurboTTS)
    assert type(tts.t3) is T3
    assert tts.t3.is_gpt
    assert not hasattr(tts.t3.tfmr, "wte")
    assert tts.t3.speech_head.bias.shape == (6563,)
    assert tts.conds.t3.cond_prompt_speech_tokens.shape == (1, 375)
    assert tts.conds.gen["prompt_token"].shape == (1, 250)
    assert isinstance(tts.conds, tts_turbo.Conditionals)
    assert getattr(tts, "model_label", variant(tts).title()) == variant(tts).title()
    assert "chatterbox_lab" not in LLAMA_CONFIGS
    assert pickle.loads(pickle.dumps(type(tts))) is type(tts)
    with torch.no_grad():
        assert tts.t3.prepare_conditioning(copy.copy(tts.conds.t3)).shape[1] == 376
    logits = tts.t3.speech_head(10 * torch.randn(64, tts.t3.dim))
    assert (logits[:, 6561] < -1000).all()  # random weights never sample the start token
    assert (logits[:, [0, 6560, 6562]] > -1000).all()


@torch.inference_mode()
def test_the_end_of_a_step_matters_to_random_weights(tts: Any) -> None:
    unet = tts.s3gen.flow.decoder.estimator
    mel, one = torch.randn(1, 80, 6), torch.ones(1)
    ends = [unet(mel, torch.ones(1, 1, 6), mel, 0 * one, torch.randn(1, 80) * 0, mel, r=end * one) for end in (0.5, 1)]
    assert (ends[0] - ends[1]).abs().max() > 1e-3


def test_the_full_size_has_the_releases_keys_and_shapes() -> None:
    def shapes(module: torch.nn.Module) -> dict[str, torch.Size]:
        return {key: value.shape for key, value in module.state_dict().items()}

    sizes = {"turbo": "GPT2_medium"} | ({"nano": "GPT2_small"} if "GPT2_small" in LLAMA_CONFIGS else {})
    for name, backbone in sizes.items():
        hp = T3Config(text_tokens_dict_size=50276)  # as in from_local
        hp.llama_config_name, hp.speech_tokens_dict_size = backbone, 6563
        hp.input_pos_emb, hp.speech_cond_prompt_len = None, 375
        hp.use_perceiver_resampler = hp.emotion_adv = False
        config = ModelConfig(**KINDS[name].sizes)
        with torch.device("meta"):
            theirs, ours = T3(hp), build._t3(config, KINDS[name])
            flow = build._flow_decoder(config, meanflow=True).estimator
            unet = ConditionalDecoder(
                in_channels=320, out_channels=80, causal=True, channels=[256], dropout=0.0, attention_head_dim=64,
                n_blocks=4, num_mid_blocks=12, num_heads=8, act_fn="gelu", meanflow=True,
            )  # fmt: skip
        del theirs.tfmr.wte
        assert shapes(ours) == shapes(theirs)
        assert shapes(flow) == shapes(unet)
        assert vars(ours.hp) | {"llama_config_name": backbone} == vars(hp)
        assert ours.cfg.to_dict() | {"n_inner": None} == theirs.cfg.to_dict()


def test_tags_are_single_tokens(tts: Any) -> None:
    plain, tagged = (tts.tokenizer(text).input_ids for text in ("Hm .", "Hm [clear throat]."))
    assert len(tagged) == len(plain) + 1
    assert max(tagged) == len(build.TAGS) + 256 - build.TAGS[::-1].index("[clear throat]")
    assert len(tts.tokenizer) == tts.config.text_vocab
    for text in ("Crème brûlée, 5 € [laugh]", "a\nb"):
        assert tts.tokenizer.decode(tts.tokenizer(text).input_ids) == text
    padded = tts.tokenizer("Hi.", return_tensors="pt", padding=True, truncation=True)  # as the release calls it
    assert padded.input_ids.shape == (1, 3)


def test_a_folder_loads_as_it_was_saved(tts: Any, folder: Path) -> None:
    names = {"ve.safetensors", "s3gen_meanflow.safetensors", f"t3_{variant(tts)}_v1.safetensors", "conds.pt"}
    names |= {"vocab.json", "merges.txt", "tokenizer_config.json", "config.json"}
    assert {file.name for file in folder.iterdir()} >= names
    assert not [file for file in folder.iterdir() if file.name.startswith(".")]
    again = lab.load(folder, variant=variant(tts), device="cpu")
    for part in ("t3", "s3gen", "ve"):
        assert same(getattr(again, part).state_dict(), getattr(tts, part).state_dict())
    assert again.config == tts.config
    assert again.tokenizer(TEXT).input_ids == tts.tokenizer(TEXT).input_ids
    assert same(tensors(again.conds), tensors(tts.conds))
    for file in ("tokenizer.json", "added_tokens.json", "special_tokens_map.json"):  # of transformers 4, or 5, alone
        (folder / file).unlink(missing_ok=True)
    (folder / "added_tokens.json").write_text(json.dumps(tts.tokenizer.get_added_vocab()))
    again = lab.load(folder, variant=variant(tts), device="cpu", dtype="bfloat16")
    assert again.tokenizer(TEXT).input_ids == tts.tokenizer(TEXT).input_ids
    assert {weight.dtype for weight in again.t3.parameters()} == {torch.bfloat16}


def test_the_release_reads_what_is_saved(tts: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, extra = tts.config, {}
    if variant(tts) == "nano":
        extra = {"nano": True}
        if "nano" not in inspect.signature(ChatterboxTurboTTS.from_local).parameters:
            return  # chatterbox-tts 0.1.7
    for name in {"GPT2_medium", "GPT2_small"} & LLAMA_CONFIGS.keys():
        monkeypatch.setitem(LLAMA_CONFIGS, name, build._gpt2_sizes(config))
    monkeypatch.setattr(tts_turbo, "T3Config", lambda text_tokens_dict_size: T3Config(config.text_vocab))
    monkeypatch.setattr(tts_turbo, "S3Gen", partial(build.SizedS3Gen, config))
    monkeypatch.setattr(tts_turbo, "VoiceEncoder", lambda: VoiceEncoder(build._voice_encoder_config(config)))
    theirs = ChatterboxTurboTTS.from_local(folder, "cpu", **extra)
    assert same(theirs.t3.state_dict(), tts.t3.state_dict())
    assert theirs.tokenizer(TEXT).input_ids == tts.tokenizer(TEXT).input_ids
    with lab.patch(theirs):
        assert theirs.generate(TEXT, seed=0, max_new_tokens=2).shape[1] > 0
    assert not hasattr(theirs, "generate_stream")
    theirs = lab.load(save(tts, folder, half=True), variant=variant(tts), device="cpu")
    assert theirs.t3.speech_head.weight.dtype == torch.float32


MISSING = ("s3gen_meanflow.safetensors", "ve.safetensors", "tokenizer_config.json", "vocab.json", "merges.txt")


@pytest.mark.parametrize("name", ["t3", *MISSING])
def test_a_missing_file_is_named(tts: Any, folder: Path, name: str) -> None:
    name = f"t3_{variant(tts)}_v1.safetensors" if name == "t3" else name
    (folder / name).unlink()
    (folder / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match=f"no {name}"):
        lab.load(folder, variant=variant(tts), device="cpu")


def test_another_variants_folder_is_refused_by_its_files(turbo: Any, folders: dict[type, Path]) -> None:
    for name, missing in (("nano", "t3_nano_v1.safetensors"), ("english", "t3_cfg.safetensors")):
        with pytest.raises(FileNotFoundError, match=f"no {missing}"):
            lab.load(folders[type(turbo)], variant=name, device="cpu")
    for name in ("turbo", "nano"):
        with pytest.raises(ValueError, match=f"variant='{name}': the lab voice speaks English; take one of 'tiny'"):
            lab.load(variant=name)


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("exploded"),))


def test_nothing_in_a_folder_is_executed(
    turbo: Any, folders: dict[type, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = Path(shutil.copytree(folders[type(turbo)], tmp_path / "model"))
    (folder / "t3_turbo_v1.safetensors").unlink()
    torch.save({"model": [Bomb()]}, folder / "t3_turbo_v1.pt")
    with pytest.raises(ValueError, match=r"t3_turbo_v1\.pt: not readable"):
        lab.load(folder, variant="turbo", device="cpu")
    own = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(own))
    (folder / "own.py").write_text("import pathlib\npathlib.Path('exploded').touch()\nclass Own: pass\n")
    with pytest.raises(ValueError, match=r"model: its tokenizer is not readable"):
        lab.load(folder, variant="turbo", device="cpu")
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"model: its tokenizer is not readable"):
        lab.load(folder, variant="turbo", device="cpu")
    assert not Path("exploded").exists()


def test_the_released_weights_are_asked_for_by_name(tts: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(models, "snapshot_download", lambda hub, allow_patterns: asked.append(hub) or str(folder))
    assert lab.load("pretrained", variant=variant(tts), device="cpu").config == tts.config
    assert asked == [f"ResembleAI/chatterbox-{variant(tts)}"]
    monkeypatch.setattr(models, "snapshot_download", lambda *_, **__: 1 / 0)
    wanted = rf"t3_{variant(tts)}_v1\.safetensors, s3gen_meanflow\.safetensors, ve\.safetensors, .*vocab\.json"
    with pytest.raises(FileNotFoundError, match=rf"{wanted}.* of ResembleAI/chatterbox-{variant(tts)} are neither"):
        lab.load("pretrained", variant=variant(tts), device="cpu")


def test_what_the_released_module_lacks_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "chatterbox.tts_turbo")
    monkeypatch.setitem(sys.modules, "pyloudnorm", None)
    with pytest.raises(ModuleNotFoundError, match=r"variant='turbo': chatterbox\.tts_turbo needs pyloudnorm; pip"):
        lab.load("tiny", variant="turbo")


# Voices


@pytest.mark.parametrize("seconds", [4.0, 5.0])
def test_a_short_recording_is_refused_before_anything_is_prepared(
    tts: Any, tmp_path: Path, seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, before = written(tmp_path / "short.wav", seconds), tts.conds
    monkeypatch.setattr(recordings, "_prepare", lambda *_: 1 / 0)
    with pytest.raises(AssertionError, match="longer than 5 seconds"):
        ChatterboxTurboTTS.prepare_conditionals(copy.copy(tts), path)
    words = rf"audio_prompt_path='.*short\.wav': {seconds:.2f} s long, must be longer than 5 s for Turbo and Nano"
    with pytest.raises(ValueError, match=words):
        tts.prepare_conditionals(path)
    with lab.patch(tts):
        for call in (tts.prepare_conditionals, partial(tts.generate, TEXT), partial(tts.generate_stream, TEXT)):
            with pytest.raises(ValueError, match=words):
                call(**{"wav_fpath" if call == tts.prepare_conditionals else "audio_prompt_path": path})
    assert tts.conds is before
    recordings.taken(lab.load("tiny", device="cpu"), path)  # others take it


@pytest.mark.parametrize(("rate", "channels"), [(24000, 1), (16000, 1), (44100, 2)])
def test_a_recording_is_prepared_as_by_the_release(turbo: Any, tmp_path: Path, rate: int, channels: int) -> None:
    path = written(tmp_path / "voice.wav", 6.0, rate, channels)
    found = []
    for loud in (True, False):
        theirs, ours, patched = copy.copy(turbo), copy.copy(turbo), copy.copy(turbo)
        ChatterboxTurboTTS.prepare_conditionals(theirs, path, 0.3, loud)
        ours.prepare_conditionals(path, 0.3, norm_loudness=loud)
        with lab.patch(patched):
            assert patched.prepare_conditionals(path, 0.3, loud) is None
        assert same(tensors(ours.conds), tensors(theirs.conds))
        assert same(tensors(patched.conds), tensors(theirs.conds))
        found.append(ours.conds)
    assert (found[0].gen["prompt_feat"] - found[1].gen["prompt_feat"]).abs().max() > 0.01  # loudness matters
    assert found[0].t3.cond_prompt_speech_tokens.shape == (1, 150)  # 25 a second, at most 375


def test_a_recording_is_prepared_once_for_each_loudness(
    nano: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, tts, levels = written(tmp_path / "voice.wav", 6.0), copy.copy(nano), []
    prepare = recordings._prepare
    monkeypatch.setattr(
        recordings, "_prepare", lambda tts, found: levels.append(found.norm_loudness) or prepare(tts, found)
    )
    for loud in (True, False, True, False):
        tts.prepare_conditionals(path, norm_loudness=loud)
    assert levels == [True, False]
    for wrong in ("no", None, 1):
        with pytest.raises(ValueError, match=f"norm_loudness={wrong!r}: must be True or False"):
            tts.prepare_conditionals(path, norm_loudness=wrong)
        with lab.patch(tts), pytest.raises(ValueError, match=f"norm_loudness={wrong!r}: must be True or False"):
            tts.generate_stream(TEXT, norm_loudness=wrong)


def test_loudness_that_cannot_be_measured_is_left_as_by_the_release(
    turbo: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source, plain, tts = (sound(6.0, seed=7), RATE), copy.copy(turbo), copy.copy(turbo)
    plain.prepare_conditionals(source, norm_loudness=False)
    monkeypatch.setattr(tts_turbo.ln, "Meter", lambda _: 1 / 0)
    tts.prepare_conditionals(source)
    assert same(tensors(tts.conds), tensors(plain.conds))
    assert "Error in norm_loudness" in capsys.readouterr().out


# The patch

SAMPLING = {"repetition_penalty": 0.05, "top_p": 0.4, "temperature": 0.5, "top_k": 3}
IGNORED = {"exaggeration": 0.9, "cfg_weight": 0.7}


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """The speech tokens that are rendered, which are not."""
    tokens: list[torch.Tensor] = []
    monkeypatch.setattr(
        Renderer, "push", lambda self, new, last=False: tokens.append(new.cpu()) or torch.zeros(1, 960 * len(new))
    )
    return tokens


def released_codes(tts: Any, *given: Any, **wanted: Any) -> torch.Tensor:
    """What the release's own ``generate`` renders."""
    found: list[torch.Tensor] = []

    def inference(speech_tokens: torch.Tensor, **_: Any) -> None:
        found.append(speech_tokens)
        raise StageError

    torch.manual_seed(5)
    with pytest.MonkeyPatch.context() as patched, stopping(tts, 12):
        patched.setattr(tts.s3gen, "inference", inference)
        with pytest.raises(StageError):
            ChatterboxTurboTTS.generate(tts, *given, **wanted)
    return found[0]


@pytest.mark.parametrize("changed", [*SAMPLING, *IGNORED, None])
def test_arguments_do_what_they_do_in_the_release(tts: Any, changed: str | None, said: list[torch.Tensor]) -> None:
    wanted = {} if changed is None else {changed: (SAMPLING | IGNORED)[changed]}
    theirs = released_codes(tts, TEXT, **wanted)
    assert theirs[-3:].tolist() == [4299] * 3
    assert len(theirs) == 15
    usual = theirs if changed is None else released_codes(tts, TEXT)
    assert torch.equal(theirs, usual) == (changed not in SAMPLING)
    with lab.patch(tts, chunk_size=5):
        for name in ("generate", "generate_stream"):
            del said[:]
            with stopping(tts, 12):
                made = getattr(tts, name)(TEXT, seed=5, **wanted)
                audio = made if name == "generate" else torch.cat([chunk for chunk, _ in made], dim=1)
            assert torch.equal(torch.cat(said), theirs)
            assert audio.shape == (1, 15 * 960)
            assert len(said) == (1 if name == "generate" else 3)


VALUES = {
    **{"text": TEXT, "repetition_penalty": 1.3, "min_p": 0.1, "top_p": 0.9, "exaggeration": 0.4, "cfg_weight": 0.2},
    **{"temperature": 0.7, "top_k": 50, "norm_loudness": False, "audio_prompt_path": None},
}


def test_every_argument_arrives_by_position_and_by_keyword(
    tts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrived: list[Any] = []

    def checked(tts: Any, text: str, settings: Any, **given: Any) -> None:
        arrived.append({"text": text, **given})
        raise StageError

    names = [name for name in inspect.signature(ChatterboxTurboTTS.generate).parameters if name != "self"]
    assert names == list(inspect.signature(type(tts).generate).parameters)[1:]
    voice = {"audio_prompt_path": written(tmp_path / "voice.wav", 6.0)}
    monkeypatch.setattr(patching, "checked", checked)
    taken, ask = [], recordings.asked
    monkeypatch.setattr(recordings, "asked", lambda *given: taken.append(given[1:]) or ask(*given))
    assert VALUES.keys() == set(names)
    values = VALUES | voice
    for method, number in itertools.product(("generate", "generate_stream"), range(len(names))):
        for positional in (True, False):
            given = names[: number + 1] if positional else dict.fromkeys(["text", names[number]])
            usual = {name: it.default for name, it in inspect.signature(ChatterboxTurboTTS.generate).parameters.items()}
            by_place, by_name = (given, []) if positional else ([], given)
            with lab.patch(tts), pytest.raises(StageError):
                getattr(tts, method)(*(values[name] for name in by_place), **{name: values[name] for name in by_name})
            expected = {name: values[name] if name in given else usual[name] for name in names}
            assert taken[-1] == (expected.pop("audio_prompt_path"), expected.pop("norm_loudness"))
            assert arrived[-1].items() >= expected.items()
            assert arrived[-1]["voiced"] is ("audio_prompt_path" not in given)


def test_a_stream_speaks_with_a_recordings_voice(tts: Any, tmp_path: Path) -> None:
    path, fixed = written(tmp_path / "voice.wav", 6.0), {"seed": 2, "max_new_tokens": 12}
    twin = copy.copy(tts)
    twin.prepare_conditionals(path, 0.0, norm_loudness=False)
    expected = lab.generate(twin, TEXT, **fixed)
    usual = lab.generate(tts, TEXT, **fixed)
    with lab.patch(tts):
        assert torch.equal(tts.generate(TEXT, **fixed), usual)
        assert torch.equal(tts.generate(TEXT, audio_prompt_path=path, norm_loudness=False, **fixed), expected)
        assert same(tensors(tts.conds), tensors(twin.conds))
        chunks = [audio for audio, _ in tts.generate_stream(TEXT, chunk_size=5, **fixed)]
        assert torch.cat(chunks, dim=1).shape == expected.shape
        assert len(chunks) == 3
    assert not torch.equal(expected[:, : usual.shape[1]], usual[:, : expected.shape[1]])


def test_a_patch_ends_on_every_way_out(tts: Any) -> None:
    for end in (lambda stream: stream.close(), lambda stream: list(stream), lambda stream: None):
        with lab.patch(tts):
            stream = tts.generate_stream(TEXT, chunk_size=2, seed=0, max_new_tokens=4)
            next(stream)
            end(stream)
            del stream
        assert not hasattr(tts, "generate_stream")
        assert type(tts).generate is ChatterboxTurboTTS.generate
    with pytest.raises(StageError), lab.patch(tts):
        raise StageError
    with pytest.raises(ValueError, match="top_k=-1"), lab.patch(tts):
        tts.generate(TEXT, top_k=-1)
    patch = lab.patch(tts)
    with pytest.raises(ValueError, match="already patched"):
        lab.patch(tts)
    patch.undo()


# The command


def test_speak_says_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "said.wav"
    command = ["speak", TEXT, "--model", "tiny", "--device", "cpu", "--most", "0.4", "-o", str(path)]
    voice, short = (written(tmp_path / f"{seconds}.wav", seconds) for seconds in (6.0, 4.0))
    assert main([*command, "--variant", "turbo", "--reference", str(voice)]) == 0
    assert soundfile.info(path).frames == 960 * 13
    monkeypatch.setattr(speak, "load", lambda *_, **__: 1 / 0)
    for name in ("turbo", "nano"):
        with pytest.raises(SystemExit):
            main([*command, "--variant", name, "--reference", str(short)])
        assert "4.00 s long, must be longer than 5 s" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["speak", "--help"])
    assert "english, multilingual, turbo, nano" in capsys.readouterr().out


def test_settings_are_recommended(tts: Any) -> None:
    advice = lab.recommend(tts, "rtf", settings=lab.FAST, tokens=30, seconds=0.1)
    assert advice.backend in ("hf", "static")
    assert "ms a token" in advice.reason
    _, metrics = next(lab.generate_stream(tts, TEXT, advice, seed=0, max_new_tokens=5, ignore_eos=True))
    assert metrics.total_audio_duration == pytest.approx((5 + 3) * 0.04)  # silence comes after the end


@pytest.mark.parametrize("variant", ["turbo", "nano"])
def test_a_sweep_measures_them(variant: str, tmp_path: Path) -> None:
    path = tmp_path / "sweep.csv"
    line = ["sweep", "--model", "tiny", "--variant", variant, "--prompt", "short", "--chunk-size", "25"]
    assert main([*line, "--rounds", "1", "--device", "cpu", "--no-watermark", "--output", str(path)]) == 0
    table = pd.read_csv(path)
    assert set(table["model"]) == {f"tiny, {variant}"}
    assert table["new_tokens"].iloc[0] == 25
    with pytest.raises(SystemExit):  # another model's rows
        main([*line[:4], "english", *line[5:], "--rounds", "1", "--device", "cpu", "--resume", "--output", str(path)])


def test_the_explorer_speaks_with_them(tts: Any) -> None:
    explorer = Explorer(tts)
    explorer.form.controls["text"].value = TEXT
    explorer.form.controls["max_new_tokens"].value = 30
    explorer.generate()
    explorer.player.wait(60)
    assert "Done" in explorer.status.value


def test_a_steps_bytes_are_those_of_the_layers_the_norm_and_the_head(tts: Any) -> None:
    blocks = [*tts.t3.tfmr.h.parameters(), *tts.t3.tfmr.ln_f.parameters(), *tts.t3.speech_head.parameters()]
    assert step_bytes(tts.t3) == sum(4 * weight.numel() for weight in blocks)
