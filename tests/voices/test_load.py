from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch
from chatterbox.models.s3gen import S3Gen
from chatterbox.models.t3 import T3
from chatterbox.models.t3.llama_configs import LLAMA_CONFIGS
from chatterbox.models.voice_encoder import VoiceEncoder
from chatterbox.tts import ChatterboxTTS
from conftest import TEXT

import chatterbox_lab as lab
from chatterbox_lab.voices import build, kinds
from chatterbox_lab.voices import load as models
from chatterbox_lab.voices.config import ModelConfig
from chatterbox_lab.voices.folder import _weights, save


@pytest.fixture(scope="module")
def folder(voice: build.LabTTS, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(voice, tmp_path_factory.mktemp("voice"))


def weights(tts: build.LabTTS) -> dict[str, torch.Tensor]:
    parts = {"t3": tts.t3, "s3gen": tts.s3gen, "ve": tts.ve}
    return {f"{part}.{key}": value for part, module in parts.items() for key, value in _weights(module).items()}


def test_the_seed_fixes_weights_voice_and_noise() -> None:
    torch.manual_seed(123)
    before = torch.random.get_rng_state()
    first, again, other = (models.load("tiny", device="cpu", seed=seed) for seed in (3, 3, 4))
    assert torch.equal(before, torch.random.get_rng_state())
    one, two, three = map(weights, (first, again, other))
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert not torch.equal(one["t3.speech_head.weight"], three["t3.speech_head.weight"])
    assert torch.equal(first.conds.gen["prompt_feat"], again.conds.gen["prompt_feat"])
    assert torch.equal(first.s3gen.flow.decoder.rand_noise, again.s3gen.flow.decoder.rand_noise)


def test_every_model_is_upstreams_class_with_the_released_conditionals() -> None:
    tts = models.load("tiny", device="cpu")
    assert isinstance(tts, ChatterboxTTS)
    assert isinstance(tts.t3, T3)
    assert isinstance(tts.s3gen, S3Gen)
    assert tts.conds.t3.cond_prompt_speech_tokens.shape == (1, 150)
    assert tts.conds.gen["prompt_token"].shape == (1, 250)
    assert tts.conds.gen["prompt_feat"].shape == (1, 500, 80)
    assert type(tts.watermarker).__name__ == "PerthImplicitWatermarker"
    assert list(LLAMA_CONFIGS) == ["Llama_520M"]


def test_the_full_size_has_upstreams_keys_and_shapes() -> None:
    def shapes(module: torch.nn.Module) -> dict[str, torch.Size]:
        return {key: value.shape for key, value in module.state_dict().items()}

    with torch.device("meta"):
        config = ModelConfig()
        assert shapes(build.SizedS3Gen(config)) == shapes(S3Gen())
        assert shapes(build._t3(config)) == shapes(T3())
        assert shapes(VoiceEncoder(build._voice_encoder_config(config))) == shapes(VoiceEncoder())


def test_random_weights_never_emit_a_code_the_flow_cannot_take(tts: Any) -> None:
    logits = tts.t3.speech_head(torch.randn(64, tts.t3.dim) * 10)
    codes = torch.multinomial(logits.softmax(-1), 200, replacement=True)
    assert codes.max() <= tts.t3.hp.stop_speech_token
    assert not (codes == tts.t3.hp.start_speech_token).any()


@pytest.mark.parametrize("kind", ["safetensors", "pt"])
def test_a_folder_loads_as_it_was_saved(voice: Any, folder: Path, tmp_path: Path, kind: str) -> None:
    if kind == "pt":  # the first release's layout: pickled, t3_cfg wrapped in a list
        for file in folder.iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        for name, module in (("t3_cfg", voice.t3), ("s3gen", voice.s3gen), ("ve", voice.ve)):
            (tmp_path / f"{name}.safetensors").unlink()
            state = _weights(module)
            torch.save({"model": [state]} if name == "t3_cfg" else state, tmp_path / f"{name}.pt")
        folder = tmp_path
    loaded, expected = models.load(folder, device="cpu", seed=0), weights(voice)
    assert all(torch.equal(value, expected[key]) for key, value in weights(loaded).items())
    assert loaded.config == voice.config
    assert loaded.tokenizer.encode(TEXT) == voice.tokenizer.encode(TEXT)
    assert torch.equal(loaded.conds.gen["prompt_feat"], voice.conds.gen["prompt_feat"])


def test_the_released_checkpoint_comes_through_the_same_door(
    folder: Path, voice: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def fetch(repository: str, allow_patterns: list[str]) -> str:
        asked.append((repository, allow_patterns))
        return str(folder)

    monkeypatch.setattr(models, "snapshot_download", fetch)
    assert torch.equal(models.load("pretrained", device="cpu").t3.speech_head.weight, voice.t3.speech_head.weight)
    files = ["t3_cfg.safetensors", "s3gen.safetensors", "ve.safetensors", "tokenizer.json", "conds.pt"]
    assert asked == [("ResembleAI/chatterbox", files)]


def test_without_a_network_one_message_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match=r"(?s)t3_cfg\.safetensors.*ResembleAI/chatterbox.*Offline: copy"):
        models.load("pretrained", device="cpu")


@pytest.mark.parametrize("name", ["t3_cfg.safetensors", "s3gen.safetensors", "ve.safetensors", "tokenizer.json"])
def test_a_missing_file_is_named(folder: Path, tmp_path: Path, name: str) -> None:
    for file in folder.iterdir():
        if file.name != name:
            (tmp_path / file.name).symlink_to(file)
    with pytest.raises(FileNotFoundError, match=f"no {name}"):
        models.load(tmp_path, device="cpu")


def test_a_missing_file_is_named_before_anything_is_built(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for file in folder.iterdir():
        if file.name != "ve.safetensors":
            (tmp_path / file.name).symlink_to(file)
    monkeypatch.setattr(models, "assemble", lambda *_: 1 / 0)
    with pytest.raises(FileNotFoundError, match=r"no ve\.safetensors or ve\.pt; the folder holds conds\.pt, config"):
        models.load(tmp_path, device="cpu")


@pytest.mark.parametrize("variant", ["multilingual", "turbo", "nano"])
def test_what_the_installed_release_lacks_is_named(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lacks = rf"variant='{variant}': the installed Chatterbox \({{}}\) has no such model; chatterbox-tts and"
    with pytest.raises(ValueError, match=lacks.format(r"chatterbox-streaming [\d.]+")):
        lab.load("tiny", variant=variant)

    def unknown() -> None:
        raise LookupError

    monkeypatch.setattr(kinds, "release", unknown)  # a checkout that is on sys.path by itself
    with pytest.raises(ValueError, match=lacks.format(r".*/chatterbox")):
        lab.load("tiny", variant=variant)
    with pytest.raises(ValueError, match=f"variant='{variant}': the lab voice speaks English; take one of 'tiny'"):
        lab.load(variant=variant)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"t3_layers": 15}, r"t3_cfg.*missing: tfmr\.layers\.14.*and 6 more"),
        ({"t3_layers": 13}, r"t3_cfg.*unknown: tfmr\.layers\.13"),
        ({"t3_mlp": 256}, r"t3_cfg.*shape: .*\(384, 192\) instead of \(256, 192\)"),
        ({"t3_size": "wide"}, r"config.json: t3_size='wide'"),
        ({"t3_size": -1}, r"config.json: t3_size=-1"),
        ({"vocoder_kernels": []}, r"vocoder_kernels"),
        ({"heads": 3}, r"'heads' is no size of a voice"),
        ({"encoder_heads": 3}, r"encoder_size=64: must be a multiple of 3"),
    ],
)
def test_sizes_that_do_not_fit_are_named(folder: Path, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    for file in folder.iterdir():
        if file.name != "config.json":
            (tmp_path / file.name).symlink_to(file)
    sizes = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(sizes | change))
    with pytest.raises(ValueError, match=message):
        models.load(tmp_path, device="cpu")


def test_loading_leaves_the_gpus_generators_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    seeded: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    models.load("tiny", device="cpu")
    assert seeded == []


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("exploded"),))


@pytest.mark.parametrize("name", ["t3_cfg.pt", "conds.pt"])
def test_nothing_in_a_checkpoint_is_executed(
    folder: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for file in folder.iterdir():
        if file.stem != Path(name).stem:
            (tmp_path / file.name).symlink_to(file)
    torch.save({"model": [Bomb()]}, tmp_path / name)
    with pytest.raises(ValueError, match=f"{name}: not readable"):
        models.load(tmp_path, device="cpu")
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("name", ["s3gen.safetensors", "conds.pt"])
@pytest.mark.parametrize("content", [b"", b"junk that is no tensor"])
def test_an_unreadable_file_is_named(folder: Path, tmp_path: Path, name: str, content: bytes) -> None:
    for file in folder.iterdir():
        if file.name != name:
            (tmp_path / file.name).symlink_to(file)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name}: not readable"):
        models.load(tmp_path, device="cpu")


def test_a_voice_that_lacks_a_part_is_refused(folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        if file.name != "conds.pt":
            (tmp_path / file.name).symlink_to(file)
    conds = torch.load(folder / "conds.pt", weights_only=True)
    del conds["gen"]["prompt_feat"]
    torch.save(conds, tmp_path / "conds.pt")
    with pytest.raises(ValueError, match=r"conds\.pt: missing: gen\.prompt_feat"):
        models.load(tmp_path, device="cpu")


def test_a_voice_can_be_cloned_where_the_encoders_are_there(tts: Any, tmp_path: Path) -> None:
    tone = 0.3 * torch.sin(torch.arange(3 * 24000) * 0.05) + 0.01 * torch.randn(3 * 24000)
    soundfile.write(tmp_path / "voice.wav", tone.numpy(), 24000)
    tts.prepare_conditionals(tmp_path / "voice.wav", exaggeration=0.7)
    assert tts.conds.gen["prompt_token"].shape == (1, 75)
    audio = lab.generate(tts, TEXT, seed=0, max_new_tokens=5, ignore_eos=True)
    assert audio.shape == (1, 5 * 960)


def test_a_voice_without_encoders_speaks_and_says_that_it_cannot_clone(
    voice: Any, folder: Path, tmp_path: Path
) -> None:
    sizes = json.loads((folder / "config.json").read_text())
    for name in ("t3_cfg.safetensors", "tokenizer.json", "conds.pt"):
        (tmp_path / name).symlink_to(folder / name)
    (tmp_path / "config.json").write_text(json.dumps(sizes | {"clone": False}))
    state = {k: v for k, v in voice.s3gen.state_dict().items() if not k.startswith(("tokenizer", "speaker_encoder"))}
    torch.save(state, tmp_path / "s3gen.pt")
    tts = models.load(tmp_path, device="cpu")
    assert lab.generate(tts, TEXT, seed=0, max_new_tokens=3, ignore_eos=True).shape == (1, 3 * 960)
    with pytest.raises(ValueError, match="cannot clone"):
        tts.prepare_conditionals("voice.wav")


@pytest.mark.parametrize("dtype", ["bfloat16", torch.float16])
def test_dtype_applies_to_t3_and_leaves_rope_exact(dtype: Any) -> None:
    tts = models.load("tiny", device="cpu", dtype=dtype)
    exact = models.load("tiny", device="cpu").t3.tfmr.rotary_emb.inv_freq
    wanted = getattr(torch, str(dtype).removeprefix("torch."))
    assert {p.dtype for p in tts.t3.parameters()} == {wanted}
    assert {p.dtype for p in tts.s3gen.parameters()} == {torch.float32}
    assert torch.equal(tts.t3.tfmr.rotary_emb.inv_freq, exact)
    assert len(lab.speech_tokens(tts, TEXT, seed=0, max_new_tokens=3, ignore_eos=True, exaggeration=0.7)) == 3


def test_import_and_load_print_nothing() -> None:
    code = "import chatterbox_lab as lab; lab.generate(lab.load('tiny'), 'Hi.', max_new_tokens=2, ignore_eos=True)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")


LOOK = """
import logging, chatterbox_lab as lab
tts = lab.load("tiny", device="cpu")
list(lab.generate_stream(tts, "Hi.", max_new_tokens=2, flow_steps=1, ignore_eos=True))
assert not logging.getLogger().handlers, logging.getLogger().handlers
"""


def test_the_applications_logging_is_its_own_to_set_up() -> None:
    done = subprocess.run([sys.executable, "-c", LOOK], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
