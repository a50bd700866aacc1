"""What the rows of `diagnose` say: each possible cause with a verdict, its share of the time and the evidence.

Every sentence is written from numbers that are in the rows; one whose numbers are missing is not written.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pandas as pd

from .diagnose_t3 import LENGTH
from .diagnosed import WHOLE, Numbers, Spread, before_after, chunk_sizes, duration, percent, told
from .subject import EXACT, FASTEST, SHAPE, TUNED, UPSTREAM

HERE, NOT_HERE, NOT_MEASURED = "a cause here", "not a cause here", "not measured"
LEAST = 0.05
"""The share of a stream's time from which something counts as a cause."""


@dataclass(frozen=True)
class Finding:
    """A possible cause, judged.

    Args:
        cause: its name, a heading.
        share: of the time of upstream's stream that goes away with it; nan if that is not known. Shares overlap.
        evidence: sentences.
        of: what the share is of.
        sure: whether the share is beyond the noise, where it was measured against something.
    """

    cause: str
    share: float
    evidence: tuple[str, ...]
    of: str = "of upstream's stream"
    sure: bool = True

    @property
    def verdict(self) -> str:
        """One of `HERE`, `NOT_HERE` and `NOT_MEASURED`."""
        if math.isnan(self.share) or (self.share >= LEAST and not self.sure):
            return NOT_MEASURED
        return HERE if self.share >= LEAST else NOT_HERE

    @property
    def told_share(self) -> str:
        """The share in words; empty if it is not known."""
        if math.isnan(self.share):
            return ""
        if self.verdict == NOT_MEASURED:
            return "within the noise"
        return f"{percent(max(0.0, self.share))} {self.of}"


def _maps(n: Numbers) -> Finding:
    layers = n.rows("attention", "layer", variant=UPSTREAM)
    ours, asked = n.rows("attention", "layer", variant=EXACT), n.words("attention", "asked", variant=UPSTREAM)
    ratio, loop = n.ratio("step", "step", ("stock", "off")), n.ratio("t3", "token", ("maps", "no maps"))
    evidence = []
    if len(layers) and len(ours):
        manual = [int((one["manual"] > 0).sum()) for one in (layers, ours)]
        evidence.append(
            f"{manual[0]} of {len(layers)} layers run manual attention in upstream's call, {manual[1]} in ours."
        )
    if asked:
        evidence.append(f"Who asks all layers for maps: {'; '.join(asked)}.")
    times = [n("step", "step", "seconds", variant=mode) for mode in ("stock", "off")]
    evidence += told(
        "A decode step at {length} positions takes {ratio} as long with maps, {with_} against {without}; "
        "the report says about 3x.",
        length=LENGTH, ratio=ratio, with_=duration(times[0]), without=duration(times[1]),
    )  # fmt: skip
    evidence += told("Over whole loops of T3 it is {loop}.", loop=loop)
    return Finding(
        "Attention maps: the fallback to manual attention", n.share("t3_seconds") * ratio.saved, tuple(evidence),
        sure=min(ratio.low, loop.low) > 1,
    )  # fmt: skip


def _analyzer(n: Numbers) -> Finding:
    ratio = n.ratio("step", "step", ("released", "stock"))
    evidence = told(
        "The analyzer's spy copies its layer's map to the host in every step: a step takes {ratio} as long with it.",
        ratio=ratio,
    )
    share = n.share("t3_seconds") * ratio.saved
    return Finding("The alignment analyzer itself", share, tuple(evidence), sure=ratio.low > 1)


def _spies(n: Numbers) -> Finding:
    cause, hooks, wrapped = "Spies left by earlier calls", n("found", "hooks"), n("found", "wrapped_forwards")
    if hooks == wrapped == 0:
        return Finding(cause, 0.0, ("No hook and no wrapped forward of an earlier call was on the model.",))
    layers = ", ".join(f"{layer:.0f}" for layer in n.rows("found", "spied_layer")["layer"])
    ratio = n.ratio("step", "step", ("as found", "released"))
    evidence = told(
        "{hooks:.0f} hooks and {wrapped:.0f} wrapped forwards of earlier calls were on layer {layers}.",
        hooks=hooks, wrapped=wrapped, layers=layers,
    )  # fmt: skip
    evidence += told("A step of upstream's takes {ratio} as long with them.", ratio=ratio)
    evidence += told(
        "With them there, a call that asks for no maps lets layer {layer:.0f} put {mass:.0%} of its attention on "
        "tokens to come, and moves the last logits by {moved:.1%}.",
        layer=n("attention", "half_fix_future_mass", "layer"), mass=n("attention", "half_fix_future_mass"),
        moved=n("attention", "half_fix_logits_change"),
    )  # fmt: skip
    return Finding(cause, n.share("t3_seconds") * ratio.saved, tuple(evidence), sure=ratio.low > 1)


def _chunks(n: Numbers) -> Finding:
    board = chunk_sizes(n)
    size = SHAPE["chunk_size"]
    rtf = board.xs(UPSTREAM, level="stream")["RTF"] if UPSTREAM in board.index.unique("stream") else pd.Series()
    if size not in rtf or len(rtf) < 2:
        return Finding("Small chunks", math.nan, ())
    large = max(rtf.index)
    evidence = told(
        "Upstream's stream has an RTF of {small:.2f} in chunks of {size} tokens, of {great:.2f} in chunks of {large}.",
        small=rtf[size], size=size, great=rtf[large], large=large,
    )  # fmt: skip
    whole = before_after(n)["RTF"].get(WHOLE, math.nan)
    evidence += told("Its call that does not stream has {whole:.2f}.", whole=whole)
    rounds = n.rows("sizes", "stream", variant=UPSTREAM).pivot_table(index="round", columns="chunk_size", values="rtf")
    ratio = Spread.of(rounds[size] / rounds[large]) if {size, large} <= set(rounds) else Spread(low=math.inf)
    return Finding("Small chunks", 1 - rtf[large] / rtf[size], tuple(evidence), sure=ratio.low > 1)


def _windows(n: Numbers) -> Finding:
    cause, windows = "Window overlap: voice prompt and context rendered again", n.rows("s3gen", "window")
    if windows.empty:
        return Finding(cause, math.nan, ())
    prompt, context, new = max(windows["prompt_tokens"]), SHAPE["context_window"], SHAPE["chunk_size"]
    seconds = windows.groupby(["prompt_tokens", "context_tokens"])["seconds"].median()
    short = min(windows["prompt_tokens"])
    each = (seconds[prompt, 0] - seconds[short, 0]) / (prompt - short) if prompt > short else math.nan
    whole = seconds[prompt, context]
    past, window = whole - seconds[prompt, 0], prompt + context + new
    again = (each * prompt + past) / whole
    evidence = told(
        "For a chunk of {new} tokens S3Gen renders a window of {window:.0f}: {prompt:.0f} of the voice prompt "
        "({part:.0%}), {context} of context.",
        new=new, window=window, prompt=prompt, part=prompt / window, context=context,
    )  # fmt: skip
    evidence += told(
        "That takes {whole}, of which the prompt is {prompt} and the context {context}: {again:.0%} for what was heard "
        "before or never is.",
        whole=duration(whole), prompt=duration(each * prompt), context=duration(past), again=again,
    )  # fmt: skip
    share = n.share("s3gen_seconds") * again
    return Finding(cause, share, tuple(evidence))


def _cache(n: Numbers) -> Finding:
    copy, released = n("step", "cache_copy", "seconds"), n("step", "step", "seconds", variant="released")
    formats = n.words("attention", "cache")
    evidence = told(
        "Upstream's cache comes back as a {format} and grows by a copy: at {length} positions {size:.1f} MB a token, "
        "{copy} of a step's {step}.",
        format=formats[0] if formats else None, length=LENGTH, size=n("step", "cache_bytes") / 1e6,
        copy=duration(copy), step=duration(released),
    )  # fmt: skip
    return Finding("The KV cache: copied for every token", n.share("t3_seconds") * copy / released, tuple(evidence))


def _mask(n: Numbers) -> Finding:
    add, released = n("step", "mask_add", "seconds"), n("step", "step", "seconds", variant="released")
    size = n("step", "mask_bytes", variant="stock")
    evidence = told(
        "With maps every decode step has a mask of {size:.0f} bytes, without maps of {without:.0f}; adding it in all "
        "layers takes {add} of a step's {step}.",
        size=size, without=n("step", "mask_bytes", variant="off"), add=duration(add), step=duration(released),
    )  # fmt: skip
    share = n.share("t3_seconds") * (add if size else 0.0) / released
    return Finding("The 4-D mask", share, tuple(evidence))


def _watermark(n: Numbers) -> Finding:
    share = n.share("watermark_seconds")
    first = n("first", "call", "watermark_seconds", at=0)
    evidence = told(
        "The watermark takes {share} of upstream's stream.", share=share if share != share else percent(share)
    )
    if n("found", "called_before") == 0:
        evidence += told("Its first call took {first}.", first=duration(first))
    return Finding("The watermark", share, tuple(evidence))


def _cold(n: Numbers) -> Finding:
    cause, of = "Cold start", "of the first stream"
    if n("found", "called_before") == 1:
        return Finding(cause, math.nan, ("The model had spoken before, so its first call could not be measured.",), of)
    warm = n.rows("streams", "stream", variant=UPSTREAM, chunk_size=SHAPE["chunk_size"])
    if warm.empty:
        return Finding(cause, math.nan, (), of)
    first, later = n("first", "call", "latency_to_first_chunk", at=0), float(warm["latency_to_first_chunk"].median())
    evidence = told(
        "Upstream's very first chunk came after {first:.2f} s, later ones after {later:.2f} s.",
        first=first, later=later,
    )  # fmt: skip
    again = n.rows("first", "call", at=1)
    if len(again):
        stages = {"T3": "t3_seconds", "S3Gen": "s3gen_seconds", "the watermark": "watermark_seconds"}
        more = {name: n("first", "call", key, at=0) - n("first", "call", key, at=1) for name, key in stages.items()}
        most = max(more, key=more.get)
        evidence += told(
            "Most of what the first adds is {most}: {more}.", most=most, more=duration(max(0.0, more[most]))
        )
    return Finding(cause, (first - later) / first, tuple(evidence), of)


def _flags(n: Numbers) -> Finding:
    cause = "PyTorch's flags: TF32 and cuDNN's autotuning"
    flags = "float32 matmul precision {precision!r}, allow_tf32 {tf32}, cudnn.benchmark {benchmark}"
    values = {"tf32": n("machine", "allow_tf32"), "benchmark": n("machine", "cudnn_benchmark")}
    values = {name: None if math.isnan(value) else bool(value) for name, value in values.items()}
    precision = n.words("machine", "matmul_precision")
    found = told("Found: " + flags + ".", precision=precision[0] if precision else None, **values)
    if n.device != "cuda":
        return Finding(cause, 0.0, (*found, f"They act on Nvidia's GPUs; this model is on {n.device}."))
    streams = Numbers(n.rows("streams", "stream", chunk_size=SHAPE["chunk_size"]))
    ratio = streams.ratio("streams", "stream", (UPSTREAM, TUNED), "rtf")
    told_ratio = told("Upstream's stream takes {ratio} as long with them as found as with all set.", ratio=ratio)
    return Finding(cause, ratio.saved, (*found, *told_ratio), sure=ratio.low > 1)


def _threads(n: Numbers) -> Finding:
    threads, cores = n("machine", "threads"), n("machine", "cores")
    cause = "Threads against cores"
    evidence = told("Threads of PyTorch: {threads:.0f}; cores: {cores:.0f}.", threads=threads, cores=cores)
    if n.device != "cpu" or threads == cores:
        return Finding(cause, 0.0, tuple(evidence))
    found, each = (n("step", "threads", "seconds", at=count) for count in (threads, cores))
    evidence += told(
        "A step of T3 takes {found} with these, {each} with one a core.", found=duration(found), each=duration(each)
    )
    if threads > cores:
        evidence.append("That is oversubscribed: threads wait for one another.")
    return Finding(cause, 1 - each / found, tuple(evidence), "of a step of T3")


def _launches(n: Numbers) -> Finding:
    cause, operators = "Operators and launches: what compiling is for", n("step", "operators", variant="stock")
    busy = n("step", "busy_share", variant="stock")
    backend, loops = n.words("t3", "backend"), n.ratio("t3", "token", (UPSTREAM, EXACT))
    backend = told(
        "Upstream's loop takes {loops} as long as backend {backend!r}, whose tokens are the same.",
        backend=backend[0] if backend else None, loops=loops,
    )  # fmt: skip
    if not math.isnan(busy):
        evidence = told(
            "A decode step launches {kernels:.0f} kernels; the GPU works for {busy:.0%} of it and waits for the rest.",
            kernels=n("step", "kernels", variant="stock"), busy=busy,
        )  # fmt: skip
        return Finding(cause, n.share("t3_seconds") * (1 - busy), (*evidence, *backend))
    each, taken = n("step", "operator", "seconds"), n("step", "step", "seconds", variant="released")
    evidence = told(
        "A decode step calls {operators:.0f} operators; at {each}, which the smallest takes, they are at "
        "most {all} of {step}.",
        operators=operators, each=duration(each), all=duration(each * operators), step=duration(taken),
    )  # fmt: skip
    # An estimate: no more than a loop with fewer operators has shown to go away.
    part = min(loops.saved, each * operators / taken)
    return Finding(cause, n.share("t3_seconds") * part, (*evidence, *backend), sure=loops.low > 1)


CAUSES: tuple[Callable[[Numbers], Finding], ...] = (
    _maps, _analyzer, _spies, _chunks, _windows, _cache, _mask, _watermark, _cold, _flags, _threads, _launches,
)  # fmt: skip


def findings(rows: Numbers) -> list[Finding]:
    """Every possible cause, judged: causes first, then what is none, then what is not known, each by its share."""
    order = (HERE, NOT_HERE, NOT_MEASURED)
    found = [judge(rows) for judge in CAUSES]
    return sorted(found, key=lambda one: (order.index(one.verdict), -one.share if one.share == one.share else 0))


def clean(found: Sequence[Finding]) -> bool:
    """Whether nothing takes enough of the time to be a cause."""
    return all(one.verdict != HERE for one in found)


def summary(n: Numbers, found: Sequence[Finding]) -> list[str]:
    """The page in a few sentences."""
    board, causes = before_after(n), [one for one in found if one.verdict == HERE]
    said, spies, layer = [], n("found", "hooks"), n("found", "spied_layer", "layer")
    if UPSTREAM in board.index:
        pace = "faster" if board.loc[UPSTREAM, "RTF"] < 1 else "slower"
        said += told(
            "Upstream's stream has an RTF of {rtf:.2f}, {pace} than real time, and a first chunk after {first:.2f} s.",
            rtf=board.loc[UPSTREAM, "RTF"], pace=pace, first=board.loc[UPSTREAM, "first chunk (s)"],
        )  # fmt: skip
    for name, how in ((EXACT, "Our exact stream"), (FASTEST, "Our fastest")):
        if name in board.index:
            mine = board.loc[name]
            said += told(
                "{how} has {rtf:.2f} ({faster}), its first chunk after {first:.2f} s.",
                how=how, rtf=mine["RTF"], first=mine["first chunk (s)"],
                faster=f"{mine['faster']:.1f}x faster, {mine['least']:.1f}x to {mine['most']:.1f}x",
            )  # fmt: skip
    said += (
        told("Earlier calls have left {spies:.0f} spies on layer {layer:.0f}.", spies=spies, layer=layer)
        if spies
        else []
    )
    if not causes:
        known = sum(one.verdict == NOT_HERE for one in found)
        return [
            *said,
            f"There is nothing to complain about: none of {known} possible causes takes {LEAST:.0%} of the time.",
        ]
    names = [f"{one.cause[0].lower()}{one.cause[1:]} ({one.told_share})" for one in causes]
    said.append(f"What makes it slow here: {'; '.join(names)}. Shares overlap.")
    return said
