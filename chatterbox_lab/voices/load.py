"""One door for every voice: a small or a full-size one with random weights, the released one, or a folder.

A voice is a folder in the released layout: ``t3_cfg``, ``s3gen`` and ``ve`` as ``.safetensors`` or ``.pt``,
``tokenizer.json``, ``conds.pt``, and ``config.json`` where sizes differ from Chatterbox's own (`VoiceConfig`).
What is particular to the chatterbox-streaming release lives here.
"""

from __future__ import annotations

import contextlib
import json
import string
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import soundfile
import tokenizers
import torch
from chatterbox import tts as tts_module
from chatterbox.models.s3gen import S3Gen
from chatterbox.models.s3gen.const import S3GEN_SR
from chatterbox.models.s3gen.decoder import ConditionalDecoder
from chatterbox.models.s3gen.f0_predictor import ConvRNNF0Predictor
from chatterbox.models.s3gen.flow import CausalMaskedDiffWithXvec
from chatterbox.models.s3gen.flow_matching import CFM_PARAMS, CausalConditionalCFM
from chatterbox.models.s3gen.hifigan import HiFTGenerator
from chatterbox.models.s3gen.transformer.upsample_encoder import PreLookaheadLayer, Upsample1D, UpsampleConformerEncoder
from chatterbox.models.s3gen.utils.mel import mel_spectrogram
from chatterbox.models.s3gen.xvector import CAMPPlus
from chatterbox.models.s3tokenizer import SPEECH_VOCAB_SIZE, S3Tokenizer
from chatterbox.models.t3 import T3
from chatterbox.models.t3.llama_configs import LLAMA_CONFIGS
from chatterbox.models.t3.modules.cond_enc import T3Cond
from chatterbox.models.t3.modules.perceiver import Perceiver
from chatterbox.models.t3.modules.t3_config import T3Config
from chatterbox.models.tokenizers import EnTokenizer
from chatterbox.models.voice_encoder import VoiceEncoder
from chatterbox.models.voice_encoder.config import VoiceEncConfig
from chatterbox.tts import REPO_ID, ChatterboxTTS, Conditionals
from huggingface_hub import snapshot_download
from s3tokenizer.model_v2 import AudioEncoderV2, FSQVectorQuantization
from safetensors.torch import load_file, save_file

from ..files import REPOSITORY, written_whole
from ..patching import attribute

MODELS = ("lab", "tiny", "random", "pretrained")
DTYPES = ("float32", "bfloat16", "float16")
PROMPT_TOKENS = 250  # the ten-second voice prompt that S3Gen takes: ChatterboxTTS.DEC_COND_LEN at 25 Hz
_WEIGHTS = ("t3_cfg", "s3gen", "ve")
# Computed when the classes are built, so a checkpoint need not hold them (S3Tokenizer.ignore_state_dict_missing).
_COMPUTED = ("_mel_filters", "window")
NEVER = -1.0e4  # a logit that no sampling reaches; finite, because CFG subtracts logits and inf - inf is nan


@dataclass(frozen=True)
class VoiceConfig:
    """The sizes of a voice; the defaults are Chatterbox's own.

    ``clone`` says whether the folder holds the networks that turn a reference recording into a voice, ``trained``
    whether the speech head has learned which codes exist (see `FlowCodesHead`).
    ``*_heads`` of T3 are as many as the later analyzers address (head 15), so keep 16 where they should work.
    """

    t3_size: int = 1024
    t3_mlp: int = 4096
    t3_layers: int = 30
    t3_heads: int = 16
    text_vocab: int = 704
    speech_vocab: int = 8194
    encoder_size: int = 512
    encoder_mlp: int = 2048
    encoder_heads: int = 8
    encoder_blocks: int = 6
    encoder_up_blocks: int = 4
    unet_size: int = 256
    unet_heads: int = 8
    unet_head_size: int = 64
    unet_blocks: int = 4
    unet_mid_blocks: int = 12
    vocoder_size: int = 512
    vocoder_kernels: tuple[int, ...] = (3, 7, 11)
    f0_size: int = 512
    trained: bool = True
    clone: bool = True
    tokenizer_size: int = 1280
    tokenizer_layers: int = 6
    speaker_growth: int = 32
    voice_encoder_size: int = 256

    def __post_init__(self) -> None:
        for size, part in (
            ("t3_size", 2 * self.t3_heads),
            ("encoder_size", self.encoder_heads),
            ("tokenizer_size", 64),
        ):
            if getattr(self, size) % part:  # T3's heads are even for RoPE; the tokenizer's are 64 wide
                raise ValueError(f"{size}={getattr(self, size)}: must be a multiple of {part}")

    @classmethod
    def read(cls, path: Path) -> VoiceConfig:
        """The sizes in a ``config.json``, Chatterbox's own where there is no such file. Raises ValueError."""
        if not path.exists():
            return cls()
        try:
            values = json.loads(path.read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"{path.name}: not valid JSON ({error})") from error
        if not isinstance(values, dict):
            raise ValueError(f"{path.name}: must hold an object of sizes, not {type(values).__name__}")
        known = {field.name: field.default for field in fields(cls)}
        for name, value in values.items():
            if name not in known:
                raise ValueError(f"{path.name}: {name!r} is no size of a voice; there are {', '.join(known)}")
            values[name] = _like(known[name], value, f"{path.name}: {name}")
        return cls(**values)


def _like(default: Any, value: Any, name: str) -> Any:
    if isinstance(default, tuple):
        value = tuple(value) if isinstance(value, list) else value
        right = isinstance(value, tuple) and value and all(type(item) is int and item > 0 for item in value)
    else:
        right = type(value) is type(default) and (isinstance(value, bool) or value > 0)
    if not right:
        raise ValueError(f"{name}={value!r}: must be like {default!r}, and positive")
    return value


TINY = VoiceConfig(
    t3_size=192, t3_mlp=384, t3_layers=14, encoder_size=64, encoder_mlp=128, encoder_heads=2, encoder_blocks=2,
    encoder_up_blocks=1, unet_size=32, unet_heads=1, unet_head_size=16, unet_blocks=1, unet_mid_blocks=1,
    vocoder_size=64, vocoder_kernels=(3,), f0_size=64, tokenizer_size=64, tokenizer_layers=1, speaker_growth=4,
    voice_encoder_size=32, trained=False,
)  # fmt: skip
_SIZES = {"tiny": TINY, "random": VoiceConfig(trained=False)}


class LabTTS(ChatterboxTTS):
    """Upstream's class; a reference recording that cannot be used is refused with a clear message."""

    config = VoiceConfig()

    def prepare_conditionals(self, wav_fpath: str | Path, exaggeration: float = 0.5) -> None:
        """Takes the voice of a recording. Raises ValueError where the model cannot clone or the file is no audio."""
        if not self.config.clone:
            raise ValueError("this voice cannot clone: its folder holds no speaker encoder and speech tokenizer")
        check_reference(wav_fpath)
        super().prepare_conditionals(wav_fpath, exaggeration=exaggeration)
        self.conds.t3.to(dtype=self.t3.speech_head.weight.dtype)


class NoWatermark:
    """Stands in for PerTh where the watermark is switched off."""

    def apply_watermark(self, signal: Any, sample_rate: int, **_: Any) -> Any:
        """The signal as it came."""
        return signal


def load(
    model: str | Path = "lab",
    *,
    device: str = "auto",
    dtype: str | torch.dtype = "float32",
    seed: int = 0,
    watermark: bool = True,
) -> LabTTS:
    """A voice, ready to speak: an upstream ``ChatterboxTTS``.

    Args:
        model: ``"lab"`` (the trained voice in ``data/lab``: small, speaks English), ``"tiny"`` (small sizes, random
            weights), ``"random"`` (Chatterbox's sizes, random weights: real costs, no speech), ``"pretrained"``
            (ResembleAI/chatterbox from the Hugging Face hub or its cache), or the path of a voice folder.
        device: ``"auto"`` is CUDA if there is one, else MPS, else the CPU; or any torch device.
        dtype: of T3's weights: float32, bfloat16 or float16. S3Gen stays in float32.
        seed: of random weights, and of the noise that the flow starts from.
        watermark: upstream's PerTh watermark on every chunk; False leaves it out and does not need ``perth``.

    Raises:
        ValueError: an unknown model, device, dtype or seed, or a checkpoint whose keys or shapes do not fit.
        FileNotFoundError: a missing folder, file or network, with what was looked for and how to go on.
        ModuleNotFoundError: the watermark is wanted and its package, ``resemble-perth``, is missing or incomplete.
    """
    if watermark and tts_module.perth.PerthImplicitWatermarker is None:
        missing = "watermark=True: resemble-perth is not installed, or without its parts"
        raise ModuleNotFoundError(f"{missing}; pip install resemble-perth, or load(..., watermark=False)")
    device, dtype = pick_device(device), _dtype(dtype)
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise ValueError(f"seed={seed!r}: must be a whole number, at least 0")
    folder = None if isinstance(model, str) and model in _SIZES else _folder(model)
    config = _SIZES[model] if folder is None else VoiceConfig.read(folder / "config.json")
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed the GPU's generators as well
        tts = _assemble(config, None if folder is None else folder / "tokenizer.json", watermark)
        if folder is None:
            tts.conds = _random_voice(tts.t3.hp)
        else:
            _fill(tts, folder)
    return _place(tts, device, dtype)


def pick_device(device: str) -> str:
    """The device meant: CUDA, MPS or the CPU for ``auto``. Raises ValueError for one that is not here."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        kind = torch.device(device).type
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device={device!r}: not available here ({reason}); 'auto' takes what there is") from error
    if kind not in ("cuda", "mps", "cpu"):
        raise ValueError(f"device={device!r}: must be 'auto', 'cuda', 'mps' or 'cpu'")
    return device


def _dtype(dtype: str | torch.dtype) -> torch.dtype:
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise ValueError(f"dtype={dtype!r}: must be one of {', '.join(DTYPES)}")
    return getattr(torch, name)


def _folder(model: str | Path) -> Path:
    if not isinstance(model, (str, Path)) or not str(model).strip():
        raise ValueError(f"model={model!r}: must be one of {', '.join(MODELS)} or the path of a voice folder")
    if model == "pretrained":
        return _download()
    folder = REPOSITORY / "data" / "lab" if model == "lab" else Path(model)
    if folder.is_dir():
        return folder
    if model == "lab":
        raise FileNotFoundError("model='lab': the trained voice is not in data/lab; 'tiny' needs no files")
    raise FileNotFoundError(f"model={str(model)!r}: must be one of {', '.join(MODELS)} or an existing voice folder")


def _download() -> Path:
    patterns = [f"{name}.safetensors" for name in _WEIGHTS] + ["tokenizer.json", "conds.pt"]
    try:
        return Path(snapshot_download(REPO_ID, allow_patterns=patterns))
    except Exception as error:  # the hub raises many kinds: no network, no cache, no such revision
        raise FileNotFoundError(
            f"model='pretrained': {', '.join(patterns)} of {REPO_ID} are neither in the Hugging Face cache nor can be "
            f"fetched ({type(error).__name__}). Offline: copy these files to a folder and load('that/folder'), "
            f"or go on with 'lab' (a small voice that ships here) or 'random' (same costs, no speech)."
        ) from error


def _assemble(config: VoiceConfig, tokenizer: Path | None, watermark: bool) -> LabTTS:
    t3 = _t3(config)
    voice_encoder = VoiceEncoder(_voice_encoder_config(config)) if config.clone else None
    with contextlib.redirect_stdout(None), contextlib.ExitStack() as stack:  # PerTh prints which weights it loaded
        if not watermark:
            stack.enter_context(attribute(tts_module.perth, "PerthImplicitWatermarker", NoWatermark))
        tts = LabTTS(t3, SizedS3Gen(config), voice_encoder, _tokenizer(tokenizer), "cpu")
    tts.config = config
    return tts


def _t3(config: VoiceConfig) -> T3:
    sizes = dict(
        LLAMA_CONFIGS["Llama_520M"], hidden_size=config.t3_size, intermediate_size=config.t3_mlp,
        num_hidden_layers=config.t3_layers, num_attention_heads=config.t3_heads,
        num_key_value_heads=config.t3_heads, head_dim=config.t3_size // config.t3_heads,
    )  # fmt: skip
    hp = T3Config()
    hp.text_tokens_dict_size, hp.speech_tokens_dict_size = config.text_vocab, config.speech_vocab
    with _llama_sizes(sizes) as hp.llama_config_name:
        t3 = T3(hp)
    if config.t3_size != 1024:  # the Perceiver is 1024 wide whatever the size of T3
        t3.cond_enc.perceiver = Perceiver(pre_attention_query_size=config.t3_size, embedding_dim=config.t3_size)
    if not config.trained:
        t3.speech_head = FlowCodesHead(t3.dim, hp.speech_tokens_dict_size, bias=False)
    return t3


@contextlib.contextmanager
def _llama_sizes(sizes: dict[str, Any]) -> Iterator[str]:
    LLAMA_CONFIGS["chatterbox_lab"] = sizes  # T3 takes its size from this dictionary only
    try:
        yield "chatterbox_lab"
    finally:
        del LLAMA_CONFIGS["chatterbox_lab"]


class SizedS3Gen(S3Gen):
    """S3Gen from the same parts as upstream's, in the sizes of a `VoiceConfig`."""

    def __init__(self, config: VoiceConfig) -> None:
        torch.nn.Module.__init__(self)  # upstream's own __init__ builds the full size
        self.mel_extractor = mel_spectrogram
        self.resamplers: dict[str, Any] = {}
        if config.clone:
            self.tokenizer = _speech_tokenizer(config)
            self.speaker_encoder = CAMPPlus(growth_rate=config.speaker_growth)
        self.flow = CausalMaskedDiffWithXvec(
            input_size=config.encoder_size, encoder=_encoder(config), decoder=_flow_decoder(config)
        )
        self.mel2wav = _vocoder(config)
        # Upstream's fade-in of the first 40 ms: 20 ms of silence, then 20 ms of raised cosine.
        ramp = (torch.cos(torch.linspace(torch.pi, 0, S3GEN_SR // 50)) + 1) / 2
        self.register_buffer("trim_fade", torch.cat([torch.zeros_like(ramp), ramp]), persistent=False)

    @property
    def device(self) -> torch.device:
        """Where the weights are (upstream asks the tokenizer, which a voice that cannot clone does not have)."""
        return self.trim_fade.device


def _speech_tokenizer(config: VoiceConfig) -> S3Tokenizer:
    tokenizer = S3Tokenizer("speech_tokenizer_v2_25hz")
    size, layers = config.tokenizer_size, config.tokenizer_layers
    if (size, layers) != (1280, 6):  # S3Tokenizer does not pass its sizes on; heads are 64 wide by construction
        tokenizer.encoder = AudioEncoderV2(tokenizer.config.n_mels, size, size // 64, layers, 2, False)
        tokenizer.quantizer = FSQVectorQuantization(size, tokenizer.config.n_codebook_size)
    return tokenizer


def _encoder(config: VoiceConfig) -> UpsampleConformerEncoder:
    size = config.encoder_size
    encoder = UpsampleConformerEncoder(
        input_size=size, output_size=size, attention_heads=config.encoder_heads, linear_units=config.encoder_mlp,
        num_blocks=config.encoder_blocks, dropout_rate=0.1, positional_dropout_rate=0.1, attention_dropout_rate=0.1,
        normalize_before=True, input_layer="linear", pos_enc_layer_type="rel_pos_espnet",
        selfattention_layer_type="rel_selfattn", use_cnn_module=False, macaron_style=False,
    )  # fmt: skip
    if size != 512:  # 512 channels are written into these two parts
        encoder.pre_lookahead_layer = PreLookaheadLayer(channels=size, pre_lookahead_len=3)
        encoder.up_layer = Upsample1D(channels=size, out_channels=size, stride=2)
    encoder.up_encoders = encoder.up_encoders[: config.encoder_up_blocks]
    return encoder


def _flow_decoder(config: VoiceConfig) -> CausalConditionalCFM:
    unet = ConditionalDecoder(
        in_channels=320, out_channels=80, causal=True, channels=[config.unet_size], dropout=0.0,
        attention_head_dim=config.unet_head_size, n_blocks=config.unet_blocks,
        num_mid_blocks=config.unet_mid_blocks, num_heads=config.unet_heads, act_fn="gelu",
    )  # fmt: skip
    return CausalConditionalCFM(spk_emb_dim=80, cfm_params=CFM_PARAMS, estimator=unet)


def _vocoder(config: VoiceConfig) -> HiFTGenerator:
    return HiFTGenerator(
        base_channels=config.vocoder_size, sampling_rate=S3GEN_SR, upsample_rates=[8, 5, 3],
        upsample_kernel_sizes=[16, 11, 7], resblock_kernel_sizes=list(config.vocoder_kernels),
        resblock_dilation_sizes=[[1, 3, 5]] * len(config.vocoder_kernels), source_resblock_kernel_sizes=[7, 7, 11],
        source_resblock_dilation_sizes=[[1, 3, 5]] * 3, f0_predictor=ConvRNNF0Predictor(cond_channels=config.f0_size),
    )  # fmt: skip


def _voice_encoder_config(config: VoiceConfig) -> VoiceEncConfig:
    hp = VoiceEncConfig()
    hp.ve_hidden_size = config.voice_encoder_size
    return hp


def _tokenizer(path: Path | None) -> EnTokenizer:
    if path is not None:
        _require(path)
        return EnTokenizer(str(path))
    with tempfile.TemporaryDirectory() as folder:  # EnTokenizer reads only files
        file = f"{folder}/tokenizer.json"
        letter_tokenizer().save(file)
        return EnTokenizer(file)


def letter_tokenizer() -> tokenizers.Tokenizer:
    """One token a character (ASCII and Latin letters), with the released ids of [START] (255) and [STOP] (0)."""
    special = {"[STOP]": T3Config.stop_text_token, "[UNK]": 1, "[SPACE]": 2, "[START]": T3Config.start_text_token}
    characters = string.printable.strip() + "".join(map(chr, range(0xA1, 0x13F)))  # fills the ids 3 to 254
    letters = {character: 3 + i for i, character in enumerate(characters)}
    model = tokenizers.models.BPE(vocab=special | letters, merges=[], unk_token="[UNK]")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.add_special_tokens(list(special))
    return tokenizer


class FlowCodesHead(torch.nn.Linear):
    """A speech head for random weights: of its 8194 outputs only the flow's codes and stop can be sampled.

    A trained head has learned that; a random one emits other codes about one time in five, and the flow has no
    embedding for them.
    """

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits (..., 8194) with the codes that the flow cannot take out of reach."""
        return self.reachable(super().forward(hidden))

    def reachable(self, logits: torch.Tensor) -> torch.Tensor:
        """The logits, changed in place."""
        logits[..., T3Config.stop_speech_token + 1 :] = NEVER
        logits[..., SPEECH_VOCAB_SIZE : T3Config.stop_speech_token] = NEVER
        return logits


def _random_voice(hp: T3Config) -> Conditionals:
    """Conditionals of the released shapes, so that full-size costs are the real ones."""
    codes = partial(torch.randint, 0, SPEECH_VOCAB_SIZE)
    t3 = T3Cond(
        speaker_emb=torch.nn.functional.normalize(torch.rand(1, hp.speaker_embed_size), dim=1),
        cond_prompt_speech_tokens=codes((1, hp.speech_cond_prompt_len)),
        emotion_adv=0.5 * torch.ones(1, 1, 1),
    )
    gen = {
        "prompt_token": codes((1, PROMPT_TOKENS)),
        "prompt_token_len": torch.tensor([PROMPT_TOKENS]),
        "prompt_feat": torch.randn(1, 2 * PROMPT_TOKENS, 80) - 5,
        "prompt_feat_len": None,
        "embedding": torch.randn(1, 192),
    }
    return Conditionals(t3, gen)


def _fill(tts: LabTTS, folder: Path) -> None:
    parts = {"t3_cfg": tts.t3, "s3gen": tts.s3gen} | ({"ve": tts.ve} if tts.config.clone else {})
    for name, module in parts.items():
        _load_weights(module, folder, name)
    if (folder / "conds.pt").exists():
        tts.conds = _load_conds(folder / "conds.pt")


def _load_weights(module: torch.nn.Module, folder: Path, name: str) -> None:
    path = folder / f"{name}.safetensors"
    if not path.exists():
        path = folder / f"{name}.pt"
        _require(path, f"{name}.safetensors or {name}.pt")
    state = _read(path)
    if "model" in state:  # the released t3_cfg.pt wraps its weights
        state = state["model"][0]
    _check_keys(module.state_dict(), state, f"{folder.name}/{name}")
    module.load_state_dict(state, strict=False)


def _read(path: Path) -> dict[str, Any]:
    """What a file of tensors holds; nothing in it is executed. Raises ValueError naming the file."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what unpickling junk can raise has no common base
        raise ValueError(f"{path}: not readable as tensors ({type(error).__name__})") from error


def _load_conds(path: Path) -> Conditionals:
    found = _read(path)
    parts = {"t3": ("speaker_emb", "emotion_adv"), "gen": ("prompt_token", "prompt_feat", "embedding")}
    missing = [f"{part}.{key}" for part, keys in parts.items() for key in keys if key not in found.get(part, {})]
    if missing:
        raise ValueError(f"{path}: {_some('missing', missing)}")
    return Conditionals(T3Cond(**found["t3"]), found["gen"])


def _check_keys(expected: dict[str, torch.Tensor], found: dict[str, torch.Tensor], where: str) -> None:
    missing = [key for key in expected if key not in found and not key.endswith(_COMPUTED)]
    unknown = [key for key in found if key not in expected and not key.endswith(_COMPUTED)]
    shapes = [
        f"{key} {tuple(found[key].shape)} instead of {tuple(tensor.shape)}"
        for key, tensor in expected.items()
        if key in found and found[key].shape != tensor.shape
    ]
    faults = [_some(kind, keys) for kind, keys in (("missing", missing), ("unknown", unknown), ("shape", shapes))]
    if any(faults):
        raise ValueError(f"{where}: does not fit the sizes in config.json: {'; '.join(filter(None, faults))}")


def _some(kind: str, keys: list[str]) -> str:
    more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
    return f"{kind}: {', '.join(keys[:3])}{more}" if keys else ""


def _require(path: Path, names: str = "") -> None:
    if not path.is_file():
        there = ", ".join(sorted(file.name for file in path.parent.iterdir())) or "nothing"
        raise FileNotFoundError(f"{path.parent}: no {names or path.name}; the folder holds {there}")


def _place(tts: LabTTS, device: str, dtype: torch.dtype) -> LabTTS:
    rotary = tts.t3.tfmr.rotary_emb
    frequencies = rotary.inv_freq.clone()
    tts.t3.to(device=device, dtype=dtype).eval()
    rotary.inv_freq = frequencies.to(device)  # RoPE's angles lose whole positions when rounded to 16 bits
    tts.s3gen.to(device).eval()
    if tts.ve is not None:
        tts.ve.to(device).eval()
    tts.device = device
    if tts.conds is not None:
        tts.conds.t3.to(device=device, dtype=dtype)
        tts.conds.to(device)
    return tts


def check_reference(path: str | Path) -> None:
    """Raises ValueError unless ``path`` is a readable recording."""
    if not isinstance(path, (str, Path)) or not Path(path).is_file():
        raise ValueError(f"audio_prompt_path={str(path)!r}: no such file")
    try:
        seconds = soundfile.info(str(path)).duration
    except soundfile.LibsndfileError as error:
        raise ValueError(f"audio_prompt_path={str(path)!r}: not readable as audio ({error})") from error
    if seconds < 1:
        raise ValueError(f"audio_prompt_path={str(path)!r}: {seconds:.2f} s long, must be at least 1 s")


def save(tts: LabTTS, folder: str | Path, *, half: bool = False) -> Path:
    """Writes a voice folder in the released layout (safetensors, config.json), each file whole or not at all.

    ``half`` stores the weights in float16, which `load` turns back into float32.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    modules = zip(_WEIGHTS, (tts.t3, tts.s3gen, tts.ve), strict=True)
    for name, module in modules:
        if module is not None:
            with written_whole(folder / f"{name}.safetensors") as part:
                save_file(_weights(module, half), part)
    with written_whole(folder / "tokenizer.json") as part:
        tts.tokenizer.tokenizer.save(str(part), pretty=False)
    with written_whole(folder / "config.json") as part:
        part.write_text(json.dumps(asdict(tts.config), indent=1) + "\n")
    if tts.conds is not None:
        with written_whole(folder / "conds.pt") as part:
            tts.conds.save(part)
    return folder


def _weights(module: torch.nn.Module, half: bool = False) -> dict[str, torch.Tensor]:
    """The module's own weights; upstream's inference hangs a second view of T3 into it as ``patched_model``."""
    own = {key: value for key, value in module.state_dict().items() if not key.startswith("patched_model.")}
    stored = {key: value.half() if half and value.is_floating_point() else value for key, value in own.items()}
    return {key: value.detach().cpu().contiguous() for key, value in stored.items()}
