"""One ``patch`` streams the release's models, leaves nothing behind, and refuses what it cannot run."""

from __future__ import annotations

import contextlib
import gc
import inspect
import json
import pickle
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from living.inner.said import LANGUAGES, TEXTS, released_tokens

import chatterbox_lab as lab
from chatterbox_lab.engine.request import checked
from chatterbox_lab.engine.s3gen.flow import Flow
from chatterbox_lab.engine.t3.backends import backend_of
from chatterbox_lab.engine.t3.spies import remove_spies
from chatterbox_lab.engine.variants import released, variant_of
from chatterbox_lab.files import REPOSITORY
from chatterbox_lab.released import release
from chatterbox_lab.study.fallback import count_spies
from chatterbox_lab.voices.folder import save

SAMPLES = 960
KINDS = ("english", "multilingual")
SPOKEN = {"english": {}, "multilingual": {"language": "fr"}}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def tts(kind: str, request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(kind)


@pytest.mark.parametrize(
    "settings", [lab.BASELINE, lab.FAST, lab.ADAPTIVE.replace(overlap=True)], ids=["exact", "fast", "overlapped"]
)
def test_every_token_becomes_its_samples(tts: Any, kind: str, settings: lab.StreamSettings) -> None:
    for most in (1, 26, 60):
        fixed = {"seed": 1, "max_new_tokens": most, "ignore_eos": True, **SPOKEN[kind]}
        count = len(lab.speech_tokens(tts, TEXTS[7], settings, **fixed))
        assert count == max(1, most - variant_of(tts).unsaid)
        chunks = [audio for audio, _ in lab.generate_stream(tts, TEXTS[7], settings, **fixed)]
        assert sum(audio.shape[1] for audio in chunks) == SAMPLES * count
        assert torch.cat(chunks, dim=1).abs().max() > 0


@torch.inference_mode()
def test_mel_is_the_releases_own_for_the_same_noise(tts: Any, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    codes = torch.randint(0, 6561, (40,), generator=torch.Generator().manual_seed(2))
    flow = Flow(tts.s3gen, checked(tts, "Hi.", **SPOKEN[kind]).voice.gen)
    ours = flow.mel(codes, 0)
    noise = flow._noise(flow.prompt_mel.shape[2], 80, 0)
    monkeypatch.setattr(torch, "randn_like", lambda like, **_: noise.to(like))
    theirs = tts.s3gen.flow_inference(codes, ref_dict=dict(tts.conds.gen), finalize=True)
    assert torch.allclose(ours, theirs, atol=1e-4, rtol=1e-4)
    monkeypatch.setattr(torch, "randn_like", lambda like, **_: noise.flip(2).to(like))
    others = tts.s3gen.flow_inference(codes, ref_dict=dict(tts.conds.gen), finalize=True)
    assert (ours - others).abs().max() > 0.1  # noise matters


def test_what_the_releases_own_calls_change_does_not_matter(tts: Any, kind: str) -> None:
    fixed = {"seed": 0, "max_new_tokens": 20, **SPOKEN[kind]}
    before = lab.generate(tts, TEXTS[3], **fixed)
    extra = {"language_id": "fr"} if kind == "multilingual" else {}
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(tts.t3, "inference", lambda **_: torch.tensor([[5, 6, 7, 8]]))
        tts.generate(TEXTS[3], **extra)
    if "tts" in str(release()):
        assert tts.conds.gen["prompt_token"].is_floating_point()  # what official calls leave
    assert torch.equal(lab.generate(tts, TEXTS[3], **fixed), before)


def test_patch_puts_a_stream_beside_the_releases_own_calls(tts: Any, kind: str) -> None:
    theirs = inspect.signature(released(tts).generate).parameters
    language = {"language_id": "de"} if kind == "multilingual" else {}
    plain = {"language": "de"} if kind == "multilingual" else {}
    assert not hasattr(tts, "generate_stream")
    with lab.patch(tts, chunk_size=20):
        for name in ("generate", "generate_stream"):
            parameters = inspect.signature(getattr(type(tts), name)).parameters
            assert list(parameters)[: len(theirs)] == list(theirs)
            assert {"seed", "max_new_tokens", "stop"} <= parameters.keys()
        fixed = {"seed": 3, "max_new_tokens": 50}
        chunks = [audio for audio, _ in tts.generate_stream(TEXTS[2], **language, **fixed)]
        expected = lab.generate_stream(tts, TEXTS[2], chunk_size=20, **plain, **fixed)
        assert all(torch.equal(a, b) for a, (b, _) in zip(chunks, expected, strict=True))
        assert len(chunks) == 3
        wanted = {"temperature": 0.7, "cfg_weight": 0.3, "repetition_penalty": 1.4, "min_p": 0.1, "top_p": 0.9}
        wav = tts.generate(TEXTS[2], **language, exaggeration=0.7, **wanted, **fixed)
        assert torch.equal(wav, lab.generate(tts, TEXTS[2], exaggeration=0.7, **plain, **wanted, **fixed))
        for name, value in wanted.items():
            other = {**wanted, name: variant_of(tts).defaults.get(name, 0.5) + 0.01}
            assert other[name] != value
        tts.generate(TEXTS[2], **language, cfg_weight=0, **fixed)  # English 0.1.7 raises here
        with pytest.raises(ValueError, match="already patched"):
            lab.patch(tts)
        if kind == "multilingual":
            with pytest.raises(ValueError, match="language='xx': must be one of"):
                tts.generate("Hello.", "xx")
            tts.generate("Hello.", None, max_new_tokens=3, seed=0)
    assert not hasattr(tts, "generate_stream")
    assert type(tts).generate is released(tts).generate


def test_classes_derived_from_the_releases_are_patched(tts: Any, kind: str) -> None:
    """As applications write them: passing on what they are given, with a stream of their own."""
    own = type(tts)

    class Passing(own):
        def generate(self, text: str, **given: Any) -> Any:
            return super().generate(text, **given)

    class Streaming(own):
        def generate_stream(self, text: str, chunk_tokens: int = 25) -> Any:
            raise NotImplementedError

    extra = {"language_id": "fi"} if kind == "multilingual" else {}
    for derived in (Passing, Streaming):
        tts.__class__ = derived
        try:
            with lab.patch(tts):
                audio, _ = next(tts.generate_stream("Hi.", seed=0, max_new_tokens=5, **extra))
                assert audio.shape[1] > 0
            assert type(tts) is derived
        finally:
            tts.__class__ = own
    if kind == "multilingual":
        with pytest.raises(ValueError, match="language='fr': belongs to generate_stream's own arguments"):
            lab.patch(tts, language="fr")


def test_after_the_releases_own_call_the_fastest_backend_runs(tts: Any, kind: str) -> None:
    config, extra = dict(vars(tts.t3.tfmr.config)), {"language": "en"} if kind == "multilingual" else {}
    released_tokens(tts, TEXTS[1], 0, 3, **extra)
    try:
        assert backend_of(lab.StreamSettings(), tts.t3) == "static"
        lab.speech_tokens(tts, TEXTS[1], weights="int8", max_new_tokens=3, seed=0, **extra)
        hooks = sum(len(part._forward_hooks) for part in tts.t3.modules())
        with contextlib.suppress(RuntimeError):  # SDPA of transformers 5 gives no maps
            lab.speech_tokens(tts, TEXTS[1], analyzer="stock", backend="hf", max_new_tokens=2, seed=0, **extra)
        assert sum(len(part._forward_hooks) for part in tts.t3.modules()) == hooks
    finally:
        vars(tts.t3.tfmr.config).clear()
        vars(tts.t3.tfmr.config).update(config)
        remove_spies(tts.t3.tfmr)


def test_a_saved_multilingual_model_keeps_its_chinese(multilingual: Any, tmp_path: Path) -> None:
    converter = multilingual.tokenizer.cangjie_converter
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(converter, "word2cj", {"\u4f60": "onf"})
        patched.setattr(converter, "cj2word", {"onf": ["\u4f60"]})
        save(multilingual, tmp_path)
    again = lab.load(tmp_path, variant="multilingual", device="cpu").tokenizer.cangjie_converter
    assert (again.word2cj, again.cj2word) == ({"\u4f60": "onf"}, {"onf": ["\u4f60"]})
    assert pickle.loads(pickle.dumps(type(multilingual))) is type(multilingual)


def test_a_language_is_asked_for(english: Any, multilingual: Any) -> None:
    with pytest.raises(ValueError, match="language=None: must be one of"):
        lab.generate_stream(multilingual, "Hello.")
    with pytest.raises(ValueError, match="language='fr': this model speaks English"):
        lab.generate_stream(english, "Hello.", language="fr")
    with pytest.raises(ValueError, match="language='xx': must be one of"):
        lab.generate_stream(multilingual, "Hello.", language="xx")


def test_what_says_a_text_of_its_own_finds_a_language(multilingual: Any) -> None:
    assert lab.warm_up(multilingual) > 0
    settings = lab.BASELINE.replace(language="fr")
    assert lab.recommend(multilingual, "rtf", settings=settings, tokens=30, seconds=0).language == "fr"
    assert lab.recommend(multilingual, "rtf", tokens=30, seconds=0).language is None


def left_behind(tts: Any) -> dict[str, Any]:
    """The release's hooks on T3's layers, and what its configuration says of attention."""
    config = tts.t3.tfmr.config
    return {
        "hooks": count_spies(tts.t3.tfmr)["hooks"],
        "maps": bool(config.output_attentions),
        "attention": config._attn_implementation,
    }


def test_a_hundred_calls_leave_nothing(multilingual: Any) -> None:
    tts, process = multilingual, psutil.Process()
    before, config, sizes = left_behind(tts), json.dumps(tts.t3.tfmr.config.to_dict(), default=str), []
    for number in range(100):
        settings = lab.BASELINE.replace(backend=("hf", "static")[number % 2], guard=True, analyzer="probe")
        fixed = {"seed": number, "max_new_tokens": 4, "language": LANGUAGES[number % 4], "chunk_size": 3}
        stream = lab.generate_stream(tts, TEXTS[number % 20], settings, flow_steps=1, prompt_tokens=10, **fixed)
        if number % 5 == 0:
            next(stream)
            del stream  # abandoned
        else:
            for _ in stream:
                pass
        gc.collect()
        if number in (49, 99):
            sizes.append(process.memory_info().rss)
    assert left_behind(tts) == before
    assert before["hooks"] == 0
    assert json.dumps(tts.t3.tfmr.config.to_dict(), default=str) == config
    assert sizes[1] - sizes[0] < 30 * 2**20


def test_what_the_releases_own_calls_leave(multilingual: Any) -> None:
    """The measure is not blind: the release leaves three hooks a call where it has an analyzer, and eager attention."""
    tts, counts = multilingual, []
    if not hasattr(sys.modules[type(tts.t3).__module__], "AlignmentStreamAnalyzer"):
        released_tokens(tts, TEXTS[1], 0, 3, "en")
        assert left_behind(tts)["hooks"] == 0
        return
    config = dict(vars(tts.t3.tfmr.config))
    try:
        for _ in range(3):
            released_tokens(tts, TEXTS[1], 0, 3, "en")
            counts.append(left_behind(tts)["hooks"])
        assert counts == [3, 6, 9]
        assert left_behind(tts) == {"hooks": 9, "maps": True, "attention": "eager"}
        fixed = {"seed": 0, "max_new_tokens": 10, "language": "en", "analyzer": "probe", "guard": True}
        said = [lab.speech_tokens(tts, TEXTS[1], backend=name, **fixed) for name in ("hf", "static")]
        assert torch.equal(*said)  # read beside SDPA all the same
        assert left_behind(tts)["hooks"] == 9  # which are the application's to keep
    finally:
        vars(tts.t3.tfmr.config).clear()
        vars(tts.t3.tfmr.config).update(config)
        for layer in tts.t3.tfmr.layers:
            layer.self_attn._forward_hooks.clear()


def test_a_model_of_another_kind_is_refused_untouched(english: Any, turbo: Any) -> None:
    from chatterbox.tts_turbo import ChatterboxTurboTTS

    unbuilt, mixed = (ChatterboxTurboTTS.__new__(ChatterboxTurboTTS) for _ in range(2))
    vars(mixed).update(vars(turbo), t3=english.t3)
    before = dict(vars(mixed))
    for wrong in (unbuilt, SimpleNamespace(), None, released):
        with pytest.raises(TypeError, match="tts: must be a ChatterboxTTS"):
            lab.patch(wrong)
    with pytest.raises(TypeError, match=r"tts: its T3 must be a GPT2Model, is a transformers\..*LlamaModel"):
        lab.patch(mixed)
    assert vars(unbuilt) == {}
    assert vars(mixed) == before
    assert type(mixed) is ChatterboxTurboTTS


def test_the_watermark_is_the_releases(tts: Any, kind: str) -> None:
    marked: list[int] = []
    if not hasattr(tts, "watermarker"):  # chatterbox-light
        assert lab.generate(tts, "Hi.", seed=0, max_new_tokens=5, **SPOKEN[kind]).shape[1] > 0
        return
    original = tts.watermarker.apply_watermark
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(
            tts.watermarker, "apply_watermark", lambda wav, **how: marked.append(len(wav)) or original(wav, **how)
        )
        lab.generate(tts, "Hi.", seed=0, max_new_tokens=5, **SPOKEN[kind])
    assert marked


def test_folders_are_read_in_the_released_layout(kind: str, tts: Any, tmp_path: Path) -> None:
    folder = save(tts, tmp_path / kind)
    names = {file.name for file in folder.iterdir()}
    assert names >= ({"t3_cfg.safetensors", "tokenizer.json"} if kind == "english" else {"t3_mtl23ls_v2.safetensors"})
    again = lab.load(folder, variant=kind, device="cpu")
    fixed = {"seed": 0, "max_new_tokens": 10, **SPOKEN[kind]}
    assert torch.equal(lab.speech_tokens(again, TEXTS[2], **fixed), lab.speech_tokens(tts, TEXTS[2], **fixed))
    if kind == "multilingual":  # v3 alone, and weights as the hub has them
        (folder / "t3_mtl23ls_v2.safetensors").rename(folder / "t3_mtl23ls_v3.safetensors")
        torch.save(tts.s3gen.state_dict(), folder / "s3gen.pt")
        (folder / "s3gen.safetensors").unlink()
        lab.load(folder, variant=kind, device="cpu")
        with pytest.raises(FileNotFoundError, match=r"no tokenizer\.json"):
            lab.load(folder, device="cpu")


def test_the_readmes_lines_run(multilingual: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (REPOSITORY / "README.md").read_text()
    blocks = [block.split("```")[0] for block in text.split("```py\n")[1:]]
    code = next(block for block in blocks if "ChatterboxMultilingualTTS" in block)
    monkeypatch.setattr(type(multilingual), "from_pretrained", classmethod(lambda *_: multilingual), raising=False)
    monkeypatch.setattr(released(multilingual), "from_pretrained", classmethod(lambda *_: multilingual))
    monkeypatch.chdir(tmp_path)
    found: dict[str, Any] = {}
    try:
        exec(code, found)
    finally:
        if hasattr(type(multilingual), "generate_stream"):
            multilingual.generate_stream.patch.undo()
    assert found["audio"].shape[1] > 0
