"""Where a step of T3 spends its time: every layer's attention, MLP and the rest, in every analyzer mode."""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import pandas as pd
import torch
from chatterbox.models.t3 import T3
from chatterbox.models.t3.inference.alignment_stream_analyzer import AlignmentStreamAnalyzer
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from tqdm.auto import tqdm
from transformers import DynamicCache

from ..engine.clock import synchronize
from ..engine.settings import StreamSettings, whole_number
from ..engine.t3.attention import FORK_HEADS, Attention
from ..engine.t3.backends import ANALYZERS
from ..engine.t3.eager import embed
from ..engine.t3.sampling import Sampling, sample
from ..engine.t3.spies import remove_spies
from ..files import written_whole
from ..voices.load import DTYPES, load, pick_device
from . import command
from .logs import quiet, quiet_profiler
from .machine import machine_facts
from .records import Record
from .turns import to_and_fro

MODES = ("released", *ANALYZERS)
"""The analyzer modes, and before them ``released``: ``stock`` with upstream's own spy copying its map to the host."""
PHASES = ("prefill", "decode")
PARTS = ("attention", "mlp", "rest")
KEYS = ["phase", "length", "mode", "layer", "part"]
WHOLE = -1
"""Stands for the layer where a row belongs to the model as a whole."""
LENGTHS = (256, 64, 128, 512)
"""Sequence lengths in positions; kernels are counted at the first."""
_CONDITIONING = 34  # positions before the text: speaker, 32 of the perceiver, emotion (T3CondEnc)
_SHORTEST = 64
_LONGEST = 4096


class Timeline:
    """Named spans of a step, end to end: each mark closes the one since the mark before.

    On a GPU the marks are CUDA events, which cost no synchronisation and show the device's own time, its waiting for
    the next launch included; elsewhere they are a monotonic clock.
    """

    def __init__(self, device: str | torch.device) -> None:
        self.device = torch.device(device)
        self._marks: list[tuple[int, str, Any]] = []

    def mark(self, part: str, layer: int = WHOLE) -> None:
        """Ends the span that belongs to this part of this layer."""
        if self.device.type == "cuda":
            now: Any = torch.cuda.Event(enable_timing=True)
            now.record(torch.cuda.current_stream(self.device))
        else:
            synchronize(self.device)
            now = time.perf_counter()
        self._marks.append((layer, part, now))

    def seconds(self) -> Counter[tuple[int, str]]:
        """Seconds by layer and part; waits for the device and starts anew."""
        synchronize(self.device)
        marks, self._marks = self._marks, []
        spans: Counter[tuple[int, str]] = Counter()
        for (_, _, start), (layer, part, end) in pairwise(marks):
            spans[layer, part] += start.elapsed_time(end) / 1e3 if self.device.type == "cuda" else end - start
        return spans


@contextmanager
def marked(tfmr: torch.nn.Module, timeline: Timeline) -> Iterator[None]:
    """Marks every layer's parts while T3's ``LlamaModel`` runs; the hooks are gone afterwards.

    Attention is all between the two norms of a layer: its projections, the reading of its map, the residual.
    """
    with ExitStack() as stack:
        for index, layer in enumerate(tfmr.layers):
            for part, module, before in (
                ("model", layer, True),
                ("rest", layer.input_layernorm, False),
                ("attention", layer.post_attention_layernorm, True),
                ("rest", layer.post_attention_layernorm, False),
                ("mlp", layer.mlp, False),
                ("rest", layer, False),
            ):
                close = partial(_close, timeline, part, WHOLE if part == "model" else index)
                register = module.register_forward_pre_hook if before else module.register_forward_hook
                stack.callback(register(close).remove)
        yield


def _close(timeline: Timeline, part: str, layer: int, *_: Any) -> None:
    timeline.mark(part, layer)


class Step:
    """One step of T3 at a given length and phase, in any of `MODES`, as often as wanted.

    The input is noise of the size of T3's embeddings: what a step costs does not depend on what is said.

    Args:
        t3: upstream's token-to-token model.
        phase: ``prefill`` of ``length`` positions, or ``decode`` of the last of ``length``.
        length: positions, 64 to 4096, in a batch of 2 for classifier-free guidance.
        seed: of the noise and the sampling.

    Raises:
        ValueError: names the argument, its value and what is allowed.
    """

    def __init__(self, t3: T3, phase: str, length: int, seed: int = 0) -> None:
        if phase not in PHASES:
            raise ValueError(f"phase={phase!r}: must be one of {', '.join(PHASES)}")
        length = whole_number("length", length, _SHORTEST, _LONGEST)
        self.t3, self.phase, self.length = t3, phase, length
        self.text = (_CONDITIONING, length - 2 if phase == "prefill" else (_CONDITIONING + length) // 2)
        self.sampling = Sampling.of(StreamSettings(ignore_eos=True), t3.hp.stop_speech_token)
        self.generator = torch.Generator(t3.device).manual_seed(seed)
        self.last = torch.randint(0, 6561, (1, 1), generator=self.generator, device=t3.device)
        self.seen = torch.zeros((1, t3.hp.speech_tokens_dict_size), dtype=torch.bool, device=t3.device)
        shape, like = (2, length, t3.dim), t3.speech_emb.weight
        noise = torch.randn(shape, generator=self.generator, device=t3.device) * like.float().std()
        self.embeds = noise.to(like.dtype)
        self.cache = DynamicCache()
        if phase == "decode":
            with torch.inference_mode():
                Attention(t3.tfmr, "off", self.text)(self.embeds[:, :-1], self.cache)

    @contextmanager
    def ready(self, mode: str) -> Iterator[Callable[[Callable[[str], None]], None]]:
        """Runs one step when called with what marks the end of a part; the cache is as before afterwards."""
        if mode not in MODES:
            raise ValueError(f"mode={mode!r}: must be one of {', '.join(MODES)}")
        cache = self.cache if self.phase == "decode" else DynamicCache()
        released = mode == "released"
        attend = self._released if released else Attention(self.t3.tfmr, mode, self.text)
        try:
            if released:
                AlignmentStreamAnalyzer(self.t3.tfmr, None, self.text, alignment_layer_idx=FORK_HEADS[0][0])
            yield partial(self._run, attend, cache)
        finally:
            if released:
                remove_spies(self.t3.tfmr)
            if self.phase == "decode":
                cache.crop(self.length - 1)

    @torch.inference_mode()
    def _run(self, attend: Callable[..., torch.Tensor], cache: DynamicCache, mark: Callable[[str], None]) -> None:
        mark("start")
        decode = self.phase == "decode"
        hidden = attend(embed(self.t3, self.last, 1) if decode else self.embeds, cache)
        mark("model")
        logits = self.t3.speech_head(hidden[:, -1])
        token = sample(logits, self.seen, self.sampling, self.generator)
        int(token)  # waits for the device, as decode does after every token
        mark("sampling")

    def _released(self, embeds: torch.Tensor, cache: DynamicCache) -> torch.Tensor:
        output = self.t3.tfmr(inputs_embeds=embeds, past_key_values=cache, use_cache=True, output_attentions=True)
        return output.last_hidden_state

    def seconds(self, mode: str, layers: bool = True) -> Counter[tuple[int, str]]:
        """Seconds of one step by layer and part; ``(WHOLE, "step")`` is all of it, alone unless ``layers``."""
        timeline = Timeline(self.t3.device)
        # the hooks first: modes that run copies of layers copy what is on them
        with marked(self.t3.tfmr, timeline) if layers else ExitStack(), self.ready(mode) as run:
            synchronize(self.t3.device)
            start = time.perf_counter()
            run(timeline.mark if layers else lambda part: None)
            synchronize(self.t3.device)
            whole = time.perf_counter() - start
        spans = timeline.seconds()
        spans[WHOLE, "step"] = whole
        return spans


def measure(
    t3: T3,
    modes: Sequence[str] = MODES,
    lengths: Sequence[int] = LENGTHS,
    *,
    phases: Sequence[str] = PHASES,
    prefill_repeats: int = 5,
    decode_repeats: int = 20,
    warm_up: int = 1,
    seed: int = 0,
) -> pd.DataFrame:
    """Times T3's steps layer by layer; the modes take turns (see `to_and_fro`).

    Args:
        t3: upstream's token-to-token model, of any size, device and dtype.
        modes: of `MODES`; ``off`` is always among them, for the ratios and for the profiler's own overhead.
        lengths: sequence lengths in positions, 64 to 4096; measured from short to long.
        phases: of `PHASES`.
        prefill_repeats: measured prefills a mode and length.
        decode_repeats: measured decode steps a mode and length.
        warm_up: unmeasured repeats before them, at least 0.
        seed: of the input noise.

    Returns:
        One row a ``phase``, ``length``, ``mode``, ``repeat``, ``layer`` and ``part``, with ``seconds``. Parts of a
        layer are `PARTS`; where the layer is `WHOLE`, ``model`` is what runs around the layers (embedding, mask,
        rotary tables, last norm), ``sampling`` the head, the sampling and the wait for the token, and ``step`` the
        whole by the host's clock. Mode ``bare`` is ``off`` with no layer marked.

    Raises:
        ValueError: an unknown mode, or a length or count out of range.
    """
    modes = tuple(dict.fromkeys((*modes, "off")))
    repeats = {"prefill": prefill_repeats, "decode": decode_repeats}
    _check(modes, lengths, phases, **repeats)
    warm_up = whole_number("warm_up", warm_up, 0)
    turns = [
        (phase, length, repeat, mode)
        for length in lengths
        for phase in phases
        for repeat in range(-warm_up, repeats[phase])
        for mode in to_and_fro((*modes, "bare"), repeat)
    ]
    rows, step = [], None
    for phase, length, repeat, mode in tqdm(turns, desc="steps", leave=False):
        if step is None or (step.phase, step.length) != (phase, length):
            step = Step(t3, phase, length, seed)
        spans = step.seconds("off" if mode == "bare" else mode, layers=mode != "bare")
        if repeat >= 0:
            rows += [(phase, length, mode, repeat, layer, part, time) for (layer, part), time in spans.items()]
    return pd.DataFrame(rows, columns=["phase", "length", "mode", "repeat", "layer", "part", "seconds"])


def _check(
    modes: Sequence[str], lengths: Sequence[int], phases: Sequence[str], prefill: int = 1, decode: int = 1
) -> None:
    """Raises ValueError for a mode, length, phase or number of repeats that `measure` does not take."""
    for name, chosen, allowed in (("modes", modes, MODES), ("phases", phases, PHASES)):
        if not chosen or not set(chosen) <= set(allowed):
            raise ValueError(f"{name}={tuple(chosen)!r}: each must be one of {', '.join(allowed)}")
    for length in lengths:
        whole_number("lengths", length, _SHORTEST, _LONGEST)
    whole_number("prefill_repeats", prefill, 1)
    whole_number("decode_repeats", decode, 1)


def summary(profile: pd.DataFrame) -> pd.DataFrame:
    """What `measure` measured, over its repeats.

    Returns:
        One row a ``phase``, ``length``, ``mode``, ``layer`` and ``part``: ``seconds`` is the median, ``low`` and
        ``high`` the quartiles of ``repeats`` values; ``ratio`` is the ratio of the medians to mode ``off``. Where
        the layer is `WHOLE`, ``attention``, ``mlp`` and ``rest`` are the sums over all layers.
    """
    by_layer = profile[profile["layer"] != WHOLE]
    sums = by_layer.groupby(["phase", "length", "mode", "repeat", "part"], sort=False)["seconds"].sum()
    both = pd.concat([profile, sums.reset_index().assign(layer=WHOLE)])
    groups = both.groupby(KEYS, sort=False)["seconds"]
    low, high = groups.quantile(0.25), groups.quantile(0.75)
    table = pd.DataFrame({"seconds": groups.median(), "low": low, "high": high, "repeats": groups.size()})
    off = table["seconds"].xs("off", level="mode")
    return table.assign(ratio=table["seconds"] / off).reset_index()


def steps(costs: pd.DataFrame, part: str = "step", value: str = "ratio") -> pd.DataFrame:
    """One part of the whole model out of a `summary`: rows are phase and length, columns ``bare`` and `MODES`.

    What was not measured is missing (nan).
    """
    whole = costs[(costs["layer"] == WHOLE) & (costs["part"] == part)]
    table = whole.pivot_table(index=["phase", "length"], columns="mode", values=value)
    return table.reindex([phase for phase in PHASES if phase in set(whole["phase"])], level="phase").reindex(
        columns=["bare", *MODES]
    )


def overhead(costs: pd.DataFrame) -> pd.Series:
    """What the profiler itself costs, by phase and length: a step with all layers marked over one with none, less 1."""
    return (1 / steps(costs)["bare"] - 1).rename("overhead")


def launches(step: Step, mode: str, repeats: int = 3) -> dict[str, Any]:
    """What one step asks of the device, counted by PyTorch's profiler.

    Returns:
        ``wall`` (median seconds of a step without the profiler), ``mask_bytes`` (held by the 4-D mask that the layers
        were given, 0 without one), and what `counted` finds; ``busy_share`` is ``busy / wall``, well below 1 where a
        step waits for launches. What only a GPU has is missing elsewhere.
    """
    wall = median([step.seconds(mode, layers=False)[WHOLE, "step"] for _ in range(repeats + 1)][1:])
    cuda = torch.device(step.t3.device).type == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda
    with (
        _masks(step.t3.tfmr) as masks,  # first, as in Step.seconds
        step.ready(mode) as run,
        quiet_profiler(),
        profile(activities=activities, acc_events=True) as profiler,
    ):
        run(lambda part: None)
        synchronize(step.t3.device)
    found = {"phase": step.phase, "length": step.length, "mode": mode} | counted(profiler.events())
    if cuda:
        found["busy_share"] = found["busy"] / wall
    return found | {"mask_bytes": max(masks), "wall": wall}


def counted(events: Sequence[Any]) -> dict[str, Any]:
    """Operators, kernels and copies among the events of PyTorch's profiler.

    Returns:
        ``operators`` (of ATen, that call no other), ``sdpa`` (the attention kernels that ran); where there are events
        of a GPU also ``kernels`` launched, ``copies`` between host and GPU, ``busy`` seconds that it worked.
    """
    operators = [event for event in events if event.device_type == DeviceType.CPU and event.name.startswith("aten::")]
    leaves = [event for event in operators if not any(c.name.startswith("aten::") for c in event.cpu_children)]
    sdpa = sorted({kernel for event in operators if (kernel := sdpa_kernel(event.name))})
    found: dict[str, Any] = {"operators": len(leaves), "sdpa": ", ".join(sdpa) or "none (manual)"}
    device = [event for event in events if event.device_type == DeviceType.CUDA]
    if device:
        moved = [event for event in device if event.name.startswith(("Memcpy", "Memset"))]
        found["kernels"] = len(device) - len(moved)
        found["copies"] = sum("HtoD" in event.name or "DtoH" in event.name for event in moved)
        found["busy"] = sum(event.time_range.elapsed_us() for event in device) / 1e6
    return found


def attention_work(phase: str, length: int, width: int) -> int:
    """What one layer's attention has to do for the CFG pair, to see how its cost should grow with the length.

    Prefill: multiply-adds of the four projections (T C^2 each), the scores and the weighted sum (T^2 C each, the
    causal half not taken off). Decode: values read, four matrices of C^2 and both rows' keys and values, L C each.
    """
    if phase == "prefill":
        return 2 * (4 * length * width**2 + 2 * length**2 * width)
    return 4 * width**2 + 2 * 2 * length * width


def sdpa_kernel(operator: str) -> str | None:
    """The kernel behind an ATen operator of scaled dot product attention: flash, efficient, cudnn or math; else None.

    On a GPU the flash and cuDNN kernels exist in half precision only; float32 gets the memory-efficient one at best.
    """
    names = {
        "aten::_scaled_dot_product_flash_attention": "flash",
        "aten::_scaled_dot_product_flash_attention_for_cpu": "flash (CPU)",
        "aten::_scaled_dot_product_efficient_attention": "memory-efficient",
        "aten::_scaled_dot_product_cudnn_attention": "cuDNN",
        "aten::_scaled_dot_product_attention_math": "math",
        "aten::_scaled_dot_product_attention_math_for_mps": "math (MPS)",
    }
    return names.get(operator)


@contextmanager
def _masks(tfmr: torch.nn.Module) -> Iterator[list[int]]:
    """Bytes of the mask that the first layer is given; 0 where it gets none."""
    found = [0]

    def look(module: Any, inputs: Any, kwargs: dict[str, Any]) -> None:
        mask = kwargs.get("attention_mask")
        found.append(0 if mask is None else mask.untyped_storage().nbytes())

    handle = tfmr.layers[0].register_forward_pre_hook(look, with_kwargs=True)
    try:
        yield found
    finally:
        handle.remove()


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of ``chatterbox-lab layers``."""
    add = partial(parser.add_argument, metavar="X")
    command.add_model(parser)
    command.add_device(parser)
    add("--dtype", default="float32", choices=DTYPES, help="of T3: %(choices)s (default: %(default)s)")
    add("--modes", nargs="+", default=MODES, choices=MODES, help="%(choices)s (default: all)")
    add("--lengths", nargs="+", type=int, default=LENGTHS, help="positions (default: 256 64 128 512)")
    add("--phases", nargs="+", default=PHASES, choices=PHASES, help="%(choices)s (default: both)")
    add("--prefill-repeats", type=int, default=5, help="measured prefills each (default: %(default)s)")
    add("--decode-repeats", type=int, default=20, help="measured decode steps each (default: %(default)s)")
    command.add_record(parser, "layers_MODEL_DEVICE_DTYPE.csv")


def run(options: argparse.Namespace) -> int:
    """Measures length by length what the options ask for, and prints it."""
    _check(options.modes, options.lengths, options.phases, options.prefill_repeats, options.decode_repeats)
    device = pick_device(options.device)
    kind = torch.device(device).type
    record = command.open_record(options, f"layers_{command.model_name(options)}_{kind}_{options.dtype}.csv")
    with quiet():
        _fill(record, options, device)
    costs, asked = record.table(), pd.read_csv(_launches_path(record.path))
    print("Milliseconds a step (medians):", (steps(costs, value="seconds") * 1e3).round(2).to_string(), sep="\n")
    print("\nRatio to off:", steps(costs).drop(columns="bare").round(3).to_string(), sep="\n")
    asked = asked[[name for name in asked if name not in (*machine_facts(), "model", "dtype", "width")]]
    print("\nWhat a step asks of the device:", asked.round(4).to_string(index=False), sep="\n")
    print(f"\nThe profiler's own overhead: {overhead(costs).median():+.1%} of a step. Written to {record.path.name}.")
    return 0


def _fill(record: Record, options: argparse.Namespace, device: str) -> None:
    """Measures length by length; a length is done if all that is asked of it is there."""
    t3 = load(options.model, device=device, dtype=options.dtype, watermark=False).t3
    facts = machine_facts(device) | {"model": command.model_name(options), "dtype": options.dtype, "width": t3.dim}
    record.check(facts)
    wanted = {(phase, mode) for phase in options.phases for mode in (*options.modes, "bare")}
    repeats = {"prefill_repeats": options.prefill_repeats, "decode_repeats": options.decode_repeats}
    for length in sorted(set(options.lengths)):
        if wanted <= {(row["phase"], row["mode"]) for row in record.rows if row["length"] == length}:
            continue
        record.rows = [row for row in record.rows if row["length"] != length]
        costs = summary(measure(t3, options.modes, [length], phases=options.phases, **repeats)).round(9)
        record.add(costs.assign(**facts).to_dict("records"))
    asked = [(phase, mode) for phase in options.phases for mode in options.modes]
    table = pd.DataFrame([launches(Step(t3, phase, options.lengths[0]), mode) for phase, mode in asked])
    with written_whole(_launches_path(record.path)) as part:
        table.assign(**facts).to_csv(part, index=False, float_format="%.6g")
    record.finish()


def _launches_path(path: Path) -> Path:
    return path.with_name(f"launches_{path.name.removeprefix('layers_')}")
