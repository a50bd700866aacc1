"""Chatterbox's own classes in the sizes of a `ModelConfig`."""

from __future__ import annotations

import contextlib
import json
import logging
import string
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import tokenizers
import torch
from chatterbox import tts as tts_module
from chatterbox.models.s3gen import S3Gen
from chatterbox.models.s3gen import flow as flow_module
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
from chatterbox.models.voice_encoder import VoiceEncoder
from chatterbox.models.voice_encoder.config import VoiceEncConfig
from s3tokenizer.model_v2 import AudioEncoderV2, FSQVectorQuantization

from ..files import attribute
from .config import ModelConfig
from .head import FlowCodesHead
from .kinds import KINDS, Kind, LabTTS, class_of, tokenizer_of

PROMPT_TOKENS = 250  # the ten-second voice prompt that S3Gen takes: ChatterboxTTS.DEC_COND_LEN at 25 Hz
TAGS = ("[clear throat]", "[sigh]", "[shush]", "[cough]", "[groan]", "[sniff]", "[gasp]", "[chuckle]", "[laugh]")
"""Sounds that Turbo and Nano make where a text has them (those of upstream's demo)."""


class NoWatermark:
    """Stands in for PerTh where the watermark is switched off."""

    def apply_watermark(self, signal: Any, sample_rate: int, **_: Any) -> Any:
        """The signal as it came."""
        return signal


def assemble(config: ModelConfig, tokenizer: Path | None, watermark: bool, variant: str = "english") -> LabTTS:
    """A model of these sizes on the CPU, weights as PyTorch draws them; None is a tokenizer of single letters."""
    own, perth = class_of(variant), getattr(tts_module, "perth", None)
    t3 = _t3(config, own.kind)
    voice_encoder = VoiceEncoder(_voice_encoder_config(config)) if config.clone else None
    with contextlib.redirect_stdout(None), contextlib.ExitStack() as stack:  # PerTh prints which weights it loaded
        # logging.info() itself, which upstream's flow calls, would set up the application's logging
        stack.enter_context(attribute(flow_module, "logging", logging.getLogger(flow_module.__name__)))
        if not watermark and perth is not None:
            stack.enter_context(attribute(perth, "PerthImplicitWatermarker", NoWatermark))
        tts = own(t3, SizedS3Gen(config, own.kind.turbo), voice_encoder, _tokenizer(tokenizer, own.kind), "cpu")
    tts.config = config
    if hasattr(tts, "model_label"):  # in what chatterbox-light warns of
        tts.model_label = variant.title()
    return tts


def _t3(config: ModelConfig, kind: Kind = KINDS["english"]) -> T3:
    hp = T3Config()
    hp.text_tokens_dict_size, hp.speech_tokens_dict_size = config.text_vocab, config.speech_vocab
    if kind.turbo:  # ChatterboxTurboTTS.from_local
        hp.input_pos_emb, hp.speech_cond_prompt_len = None, 375
        hp.use_perceiver_resampler = hp.emotion_adv = False
    with _backbone(_gpt2_sizes(config) if kind.turbo else _llama_sizes(config)) as hp.llama_config_name:
        t3 = T3(hp)
    if kind.turbo:
        del t3.tfmr.wte
    elif config.t3_size != 1024:  # the Perceiver is 1024 wide whatever the size of T3
        t3.cond_enc.perceiver = Perceiver(pre_attention_query_size=config.t3_size, embedding_dim=config.t3_size)
    if not config.trained:
        t3.speech_head = FlowCodesHead(t3.dim, hp.speech_tokens_dict_size, bias=kind.turbo)
    return t3


def _llama_sizes(config: ModelConfig) -> dict[str, Any]:
    return dict(
        LLAMA_CONFIGS["Llama_520M"], hidden_size=config.t3_size, intermediate_size=config.t3_mlp,
        num_hidden_layers=config.t3_layers, num_attention_heads=config.t3_heads,
        num_key_value_heads=config.t3_heads, head_dim=config.t3_size // config.t3_heads,
    )  # fmt: skip


def _gpt2_sizes(config: ModelConfig) -> dict[str, Any]:
    return dict(
        LLAMA_CONFIGS["GPT2_medium"], n_embd=config.t3_size, hidden_size=config.t3_size, n_inner=config.t3_mlp,
        n_layer=config.t3_layers, n_head=config.t3_heads, vocab_size=config.text_vocab,
    )  # fmt: skip


@contextlib.contextmanager
def _backbone(sizes: dict[str, Any]) -> Iterator[str]:
    LLAMA_CONFIGS["chatterbox_lab"] = sizes  # T3 takes its size from this dictionary only
    try:
        yield "chatterbox_lab"
    finally:
        del LLAMA_CONFIGS["chatterbox_lab"]


class SizedS3Gen(S3Gen):
    """S3Gen from the same parts as upstream's, in the sizes of a `ModelConfig`."""

    def __init__(self, config: ModelConfig, meanflow: bool = False) -> None:
        torch.nn.Module.__init__(self)  # upstream's own __init__ builds the full size
        self.meanflow = meanflow
        self.mel_extractor = mel_spectrogram
        self.resamplers: dict[str, Any] = {}
        if config.clone:
            self.tokenizer = _speech_tokenizer(config)
            self.speaker_encoder = CAMPPlus(growth_rate=config.speaker_growth)
        self.flow = CausalMaskedDiffWithXvec(
            input_size=config.encoder_size, encoder=_encoder(config), decoder=_flow_decoder(config, meanflow)
        )
        self.mel2wav = _vocoder(config)
        # Upstream's fade-in of the first 40 ms: 20 ms of silence, then 20 ms of raised cosine.
        ramp = (torch.cos(torch.linspace(torch.pi, 0, S3GEN_SR // 50)) + 1) / 2
        self.register_buffer("trim_fade", torch.cat([torch.zeros_like(ramp), ramp]), persistent=False)

    @property
    def device(self) -> torch.device:
        """Where the weights are (upstream asks the tokenizer, which a voice that cannot clone does not have)."""
        return self.trim_fade.device


def _speech_tokenizer(config: ModelConfig) -> S3Tokenizer:
    tokenizer = S3Tokenizer("speech_tokenizer_v2_25hz")
    size, layers = config.tokenizer_size, config.tokenizer_layers
    if (size, layers) != (1280, 6):  # S3Tokenizer does not pass its sizes on; heads are 64 wide by construction
        tokenizer.encoder = AudioEncoderV2(tokenizer.config.n_mels, size, size // 64, layers, 2, False)
        tokenizer.quantizer = FSQVectorQuantization(size, tokenizer.config.n_codebook_size)
    return tokenizer


def _encoder(config: ModelConfig) -> UpsampleConformerEncoder:
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


def _flow_decoder(config: ModelConfig, meanflow: bool) -> CausalConditionalCFM:
    unet = ConditionalDecoder(
        in_channels=320, out_channels=80, causal=True, channels=[config.unet_size], dropout=0.0,
        attention_head_dim=config.unet_head_size, n_blocks=config.unet_blocks,
        num_mid_blocks=config.unet_mid_blocks, num_heads=config.unet_heads, act_fn="gelu",
        **({"meanflow": True} if meanflow else {}),  # the fork has no such argument
    )  # fmt: skip
    if meanflow and not config.trained:
        unet.time_embed_mixer.reset_parameters()  # upstream's initial weights ignore a step's end time
    return CausalConditionalCFM(spk_emb_dim=80, cfm_params=CFM_PARAMS, estimator=unet)


def _vocoder(config: ModelConfig) -> HiFTGenerator:
    return HiFTGenerator(
        base_channels=config.vocoder_size, sampling_rate=S3GEN_SR, upsample_rates=[8, 5, 3],
        upsample_kernel_sizes=[16, 11, 7], resblock_kernel_sizes=list(config.vocoder_kernels),
        resblock_dilation_sizes=[[1, 3, 5]] * len(config.vocoder_kernels), source_resblock_kernel_sizes=[7, 7, 11],
        source_resblock_dilation_sizes=[[1, 3, 5]] * 3, f0_predictor=ConvRNNF0Predictor(cond_channels=config.f0_size),
    )  # fmt: skip


def _voice_encoder_config(config: ModelConfig) -> VoiceEncConfig:
    hp = VoiceEncConfig()
    hp.ve_hidden_size = config.voice_encoder_size
    return hp


def _tokenizer(path: Path | None, kind: Kind) -> Any:
    if path is not None:
        return tokenizer_of(kind, path)
    with tempfile.TemporaryDirectory() as folder:  # upstream's tokenizers read only files
        file = Path(folder) / kind.tokenizer[0][0]
        if kind.turbo:
            _write_bytes_tokenizer(file)
            return tokenizer_of(kind, file)
        letters = letter_tokenizer()
        if kind is KINDS["multilingual"]:
            letters.add_special_tokens([f"[{code}]" for code in kind.home().SUPPORTED_LANGUAGES])
        letters.save(str(file))
        return tokenizer_of(kind, file)


def _write_bytes_tokenizer(config: Path) -> None:
    """A tokenizer like GPT-2's that has merged nothing: one token a byte; `TAGS` are tokens, as in Turbo's."""
    letters = [*sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()), "<|endoftext|>"]
    tags = {tag: len(letters) + i for i, tag in enumerate(TAGS)}
    (config.parent / "vocab.json").write_text(json.dumps({letter: i for i, letter in enumerate(letters)}))
    (config.parent / "merges.txt").write_text("#version: 0.2\n")
    (config.parent / "added_tokens.json").write_text(json.dumps(tags))
    config.write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer", "model_max_length": 1024}))


def letter_tokenizer() -> tokenizers.Tokenizer:
    """One token a character (ASCII and Latin letters), with the released ids of [START] (255) and [STOP] (0)."""
    hp = T3Config()
    special = {"[STOP]": hp.stop_text_token, "[UNK]": 1, "[SPACE]": 2, "[START]": hp.start_text_token}
    characters = string.printable.strip() + "".join(map(chr, range(0xA1, 0x13F)))  # fills the ids 3 to 254
    letters = {character: 3 + i for i, character in enumerate(characters)}
    model = tokenizers.models.BPE(vocab=special | letters, merges=[], unk_token="[UNK]")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.add_special_tokens(list(special))
    return tokenizer


def random_conditionals(hp: T3Config, kind: Kind = KINDS["english"]) -> Any:
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
    return kind.home().Conditionals(t3, gen)
