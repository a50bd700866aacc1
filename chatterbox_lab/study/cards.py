"""What a prediction is made from: what T3 and S3Gen ask of a device, counted on a CPU, and constants of cards.

Counts come from Chatterbox's own classes and from ours, here, without a GPU (`count`); ``data/counts_random_cpu.csv``
keeps them. Constants stand in ``data/cards.csv``, each with a low and a high value and its source. None is derived
from what somebody measured of Chatterbox on a GPU, neither from a published figure nor from a record of ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from ..engine import linears
from ..engine.request import checked
from ..engine.s3gen import unet
from ..engine.s3gen.vocoder import folded
from ..engine.settings import BALANCED
from ..engine.stream import renderer_of
from ..engine.t3.backends import BACKENDS
from ..engine.t3.decode import tokens
from ..engine.t3.graph import GraphT3
from ..engine.t3.sampling import Sampling
from ..files import attribute
from ..voices.build import LabTTS, SizedS3Gen, assemble, random_conditionals
from ..voices.config import ModelConfig
from ..voices.load import place
from .logs import quiet
from .machine import step_bytes
from .records import load_results
from .s3gen_ladder import SOUNDS, UNCOUNTED
from .upstream import upstream_steps

RELEASED = "released"
TEXT = "The quick brown fox reads a long sentence to the lazy dog."
ANY = "any"
"""Stands for the card in constants that belong to all of them and their hosts."""
_LENGTHS = (8, 16, 32)
"""Tokens, or frames, at which FLOP are counted: they are a polynomial of degree 2, since attention is."""
_NARROW = ModelConfig(
    t3_size=64, t3_mlp=64, encoder_size=64, encoder_mlp=64, unet_size=32, unet_head_size=8, vocoder_size=64, f0_size=64,
    trained=False, clone=False,
)  # fmt: skip
"""As deep as Chatterbox, whose launches it has, and narrow, so that counting them takes seconds."""


@dataclass(frozen=True)
class Work:
    """What is asked of a device: kernels launched, bytes read, FLOP of matrix products and of convolutions."""

    launches: float = 0.0
    bytes: float = 0.0
    products: float = 0.0
    convolutions: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(*(getattr(self, name) + getattr(other, name) for name in vars(self)))

    def __mul__(self, times: float) -> Work:
        return Work(*(times * value for value in vars(self).values()))


class Launches(TorchDispatchMode):
    """Counts operators that launch a kernel on a GPU: all but views, allocations and looks at metadata.

    An operator is taken for one kernel. That is 1,250 for a released decode step, where PyTorch's profiler saw 1,251
    kernels on a GPU. RMS norm is one of them; a PyTorch without a fused kernel runs six.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        found = func(*args, **(kwargs or {}))
        given, made = _storages((args, kwargs)), _storages(found)
        idle = not func._schema.is_mutable and made <= given  # a view, or nothing that is a tensor
        self.count += not (idle or "empty" in func._schema.name or func._schema.name == "aten::dropout")
        return found


def _storages(tree: Any) -> set[int]:
    return {leaf.untyped_storage()._cdata for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)}


def count() -> pd.DataFrame:
    """Counts all that predictions need, in half a minute on a CPU, from models with random weights.

    Returns:
        A row a ``part``, ``way``, ``dtype`` and ``length``: ``launches`` of T3's ``step`` and ``prefill`` by analyzer
        mode or backend and by its dtype, and of S3Gen's ``chunk`` by sound; ``products`` and ``convolutions`` (FLOP) of
        ``encoder`` (length in tokens), ``estimator`` (an Euler step, in frames, both CFG rows) and ``vocoder`` (in
        frames); ``bytes`` of weights in float32 that T3's ``step`` reads, and, in part ``cache``, of keys and values
        for each position. Part ``overlap`` has as its length the frames that our vocoder makes again with a chunk.
    """
    rows, model = [], narrow_model()
    with quiet(), on_a_gpu():
        for dtype in (torch.bfloat16, torch.float32):
            place(model, "cpu", dtype)
            prefills = {RELEASED: _released_launches(model, 1), "hf": _prefill_launches(model)}
            for part, counted in (("step", step_launches(model)), ("prefill", prefills)):
                facts = {"part": part, "dtype": str(dtype).removeprefix("torch.")}
                rows += [facts | {"way": way, "launches": found} for way, found in counted.items()]
        rows += [{"part": "chunk", "way": way, "launches": found} for way, found in chunk_launches(model).items()]
        rows += [{"part": "overlap", "length": renderer_of(model, BALANCED).overlap}]
    with quiet(), torch.random.fork_rng(devices=[]):
        rows += chunk_flop(ModelConfig(clone=False))
        t3 = assemble(replace(_NARROW, **_t3_sizes(ModelConfig())), None, watermark=False).t3
    kept = 2 * 2 * len(t3.tfmr.layers) * t3.dim * 4  # keys and values of both CFG rows
    rows += [{"part": "step", "way": "weights", "bytes": step_bytes(t3)}, {"part": "cache", "bytes": kept}]
    return pd.DataFrame(rows)


def _t3_sizes(config: ModelConfig) -> dict[str, int]:
    return {name: value for name, value in vars(config).items() if name.startswith("t3_")}


def narrow_model() -> LabTTS:
    """A Chatterbox that launches what the released one does, with a voice prompt of 10 tokens."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        tts = assemble(_NARROW, None, watermark=False)
        tts.conds = random_conditionals(tts.t3.hp)
    gen = tts.conds.gen
    gen.update(prompt_token=gen["prompt_token"][:, :10], prompt_feat=gen["prompt_feat"][:, :20])
    gen["prompt_token_len"] = torch.tensor([10])
    tts.t3.eval()
    tts.s3gen.eval()
    return tts


@contextmanager
def on_a_gpu() -> Iterator[None]:
    """Our parts choose the operations here that they choose on a GPU."""

    def fused(weights: list[torch.Tensor], biases: list[torch.Tensor | None]) -> linears.Product:
        weight, bias = torch.cat(weights), linears._joined(biases)
        return lambda rows: F.linear(rows, weight, bias)

    with ExitStack() as stack:
        stack.enter_context(attribute(linears, "_loaded", fused))
        stack.enter_context(attribute(linears, "_onednn", lambda dtype: False))
        stack.enter_context(attribute(unet, "attention", F.scaled_dot_product_attention))
        yield


def step_launches(tts: LabTTS) -> dict[str, int]:
    """Kernels of a decode step: ``released``, our ``hf`` by analyzer, and the backends ``static`` and ``graph``."""
    found = {RELEASED: _released_launches(tts, 4) - _released_launches(tts, 3)}
    for analyzer in BACKENDS["hf"].analyzers:
        found[analyzer] = _our_launches(tts, backend="hf", analyzer=analyzer)
    found["static"] = _our_launches(tts, backend="static")
    graph = GraphT3(tts.t3, "off", (), 512, 2)
    with torch.inference_mode(), Launches() as launches:
        graph._forward(256)  # what is captured, as it is without a GPU
        graph._pick(Sampling.of(BALANCED, tts.t3.hp.stop_speech_token))
    return found | {"graph": launches.count}


def _released_launches(tts: LabTTS, steps: int) -> int:
    with Launches() as launches:
        list(upstream_steps(tts, TEXT, seed=0, max_new_tokens=steps, ignore_eos=True))
    return launches.count


def _our_launches(tts: LabTTS, **changes: Any) -> int:
    request = checked(tts, TEXT, BALANCED, seed=0, max_new_tokens=5, ignore_eos=True, **changes)
    with closing(tokens(tts, request)) as stream:
        list(islice(stream, 2))
        with Launches() as launches:
            next(stream)
    return launches.count


def _prefill_launches(tts: LabTTS) -> int:
    request = checked(tts, TEXT, BALANCED, seed=0, max_new_tokens=5, ignore_eos=True, backend="hf")
    with closing(tokens(tts, request)) as stream, Launches() as launches:
        next(stream)
    return launches.count


def chunk_launches(tts: LabTTS) -> dict[str, int]:
    """Kernels of S3Gen for a chunk: ``released``, and ours by sound; how long the chunk is does not matter."""
    codes = torch.zeros(4, dtype=torch.long)
    with Launches() as launches:
        tts.s3gen.inference(codes, ref_dict=tts.conds.gen)
    found = {RELEASED: launches.count}
    for sound, changes in SOUNDS.items():
        native = {"flow_dtype": "bfloat16"} if changes.get("flow_dtype") == "auto" else {}
        renderer = renderer_of(tts, BALANCED.replace(chunk_size=4, context_window=4, **changes | native), seed=0)
        renderer.vocoder.decode = renderer.vocoder.hift.decode  # as on a GPU
        renderer.push(codes)
        with torch.inference_mode(), Launches() as launches:
            renderer.push(codes)
        found[sound] = launches.count
    return found


def chunk_flop(config: ModelConfig) -> list[dict[str, Any]]:
    """FLOP of S3Gen's parts in these sizes, by PyTorch's counter, as rows of `count`."""
    s3gen = SizedS3Gen(config).eval()
    channels, vocoder = s3gen.flow.output_size, folded(s3gen.mel2wav)
    estimator = s3gen.flow.decoder.estimator

    def encoder(length: int) -> None:
        s3gen.flow.encoder_proj(
            s3gen.flow.encoder(torch.zeros(1, length, config.encoder_size), torch.tensor([length]))[0]
        )

    def euler_step(length: int) -> None:
        mel, ones = torch.zeros(2, channels, length), torch.ones(2, 1, length)
        estimator(mel, ones, mel, torch.zeros(2), torch.zeros(2, channels), mel)

    parts: dict[str, Callable[[int], Any]] = {"encoder": encoder, "estimator": euler_step}
    parts["vocoder"] = lambda length: vocoder.inference(speech_feat=torch.zeros(1, channels, length))
    return [
        {"part": part, "length": length} | flop(partial(run, length))
        for part, run in parts.items()
        for length in _LENGTHS
    ]


def flop(run: Callable[[], Any]) -> dict[str, int]:
    """FLOP of what is run: of matrix products, attention among them, and of convolutions."""
    with FlopCounterMode(display=False, custom_mapping=UNCOUNTED) as counter, torch.inference_mode():
        run()
    by_operator = {str(name): found for name, found in counter.get_flop_counts().get("Global", {}).items()}
    convolutions = sum(found for name, found in by_operator.items() if "conv" in name)
    return {"products": sum(by_operator.values()) - convolutions, "convolutions": convolutions}


class Counts:
    """What was counted, as `Work`. ``table`` is as `count` returns it; None is what ``data/`` has."""

    def __init__(self, table: pd.DataFrame | None = None) -> None:
        table = load_results("counts_random_cpu") if table is None else table
        launches = table.dropna(subset="launches").fillna({"dtype": ""}).set_index(["part", "way", "dtype"])["launches"]
        self.launches: dict[tuple[str, str, str], float] = launches.to_dict()
        sizes = table.dropna(subset="bytes").set_index("part")["bytes"]
        self.weights, self.kept = float(sizes["step"]), float(sizes["cache"])
        self.overlap = int(table.loc[table["part"] == "overlap", "length"].iloc[0])
        counted = table.dropna(subset="products").groupby("part")
        self.curves = {
            (part, kind): tuple(np.polyfit(rows["length"], rows[kind], 2))
            for part, rows in counted
            for kind in ("products", "convolutions")
        }
        """FLOP of a part as a polynomial of its length, the highest power first."""

    def step(self, way: str, positions: float, dtype: str = "float32") -> Work:
        """A decode step of T3 in this dtype after so many positions."""
        size = (self.weights + self.kept * positions) * _share(dtype)
        return Work(self.launches["step", way, _counted(dtype)], size, self._products(1))

    def prefill(self, way: str, positions: int, dtype: str = "float32") -> Work:
        """T3's prefill of so many positions; backends share that of ``hf``."""
        launches = self.launches["prefill", RELEASED if way == RELEASED else "hf", _counted(dtype)]
        return Work(launches, self.weights * _share(dtype), self._products(positions))

    def _products(self, positions: int) -> float:
        """FLOP of T3's products with both CFG rows: a multiplication and an addition for each weight."""
        return 2 * 2 * self.weights / 4 * positions

    def chunk(self, way: str, prompt: int, context: int, new: int) -> Work:
        """S3Gen for ``new`` tokens, ``context`` tokens before them, and a voice prompt of so many tokens."""
        changes = BALANCED.replace(**SOUNDS.get(way, {}))
        window, frames = min(prompt, changes.prompt_tokens) + context + new, 2 * (context + new)
        own = 2 * new if changes.flow == "cached" else 2 * window
        vocoded = frames if way == RELEASED else min(frames, 2 * new + self.overlap)
        flow = self._flop("encoder", window) + self._flop("estimator", own, 2 * window) * changes.flow_steps
        return Work(launches=self.launches["chunk", way, ""]) + flow + self._flop("vocoder", vocoded)

    def _flop(self, part: str, length: int, seen: int | None = None) -> Work:
        """FLOP of a part at a length; ``seen`` is how many places each attends to, where that is not the length."""
        found = []
        for kind in ("products", "convolutions"):
            square, line, constant = self.curves[part, kind]
            found.append(constant + line * length + square * length * (length if seen is None else seen))
        return Work(0.0, 0.0, *found)


def _share(dtype: str) -> float:
    """Bytes of a value, over those of float32."""
    return 1.0 if dtype == "float32" else 0.5


def _counted(dtype: str) -> str:
    """The dtype that was counted: half precisions launch the same."""
    return dtype if dtype == "float32" else "bfloat16"


@dataclass(frozen=True)
class Card:
    """A card with its host, in SI units: the constants of ``data/cards.csv``, all at one end of their ranges."""

    name: str
    bandwidth: float
    float32: float
    tf32: float
    bfloat16: float
    bandwidth_share: float
    flop_share: float
    launch: float
    node: float
    watermark: float

    def seconds(self, work: Work, dtype: str = "float32", graph: bool = False) -> float:
        """Seconds that a piece of work takes.

        The device needs ``node`` for each kernel, and for all of them together the longer of reading and computing, by
        its data sheet's rates less what products of this size leave unused. Where the host launches kernels one by
        one, the work takes the longer of ``launch`` times kernels and that; in a CUDA graph it takes that.
        """
        products = self.bfloat16 if dtype in ("bfloat16", "float16") else self.float32
        computing = (work.products / products + work.convolutions / self.tf32) / self.flop_share
        device = work.launches * self.node + max(work.bytes / (self.bandwidth * self.bandwidth_share), computing)
        return device if graph else max(device, work.launches * self.launch)


def constants() -> pd.DataFrame:
    """``data/cards.csv``: ``card``, ``constant``, ``low``, ``high``, ``unit``, ``source``, ``note``."""
    return load_results("cards")


def known(table: pd.DataFrame | None = None) -> list[str]:
    """The names of the cards that there are constants of."""
    table = constants() if table is None else table
    return [name for name in dict.fromkeys(table["card"]) if name != ANY]


def card(name: str, table: pd.DataFrame | None = None) -> tuple[Card, Card]:
    """A card at its fastest and at its slowest: every constant at the better, and at the worse end of its range.

    Raises:
        ValueError: no such card; names those that there are.
    """
    table = constants() if table is None else table
    if name not in known(table):
        raise ValueError(f"card={name!r}: must be one of {', '.join(known(table))}")
    rows = table[table["card"].isin([name, ANY])].set_index("constant")
    scale = rows["unit"].map(_UNITS)
    low, high = ((rows[end] * scale).to_dict() for end in ("low", "high"))
    slower_if_more = {"launch", "node", "watermark"}
    fastest = {key: (low if key in slower_if_more else high)[key] for key in rows.index}
    slowest = {key: (high if key in slower_if_more else low)[key] for key in rows.index}
    return Card(name, **fastest), Card(name, **slowest)


_UNITS: Mapping[str, float] = {"GB/s": 1e9, "TFLOP/s": 1e12, "us": 1e-6, "share": 1.0, "s/s": 1.0}
