"""What other releases of transformers do with a Llama that is asked for its attention maps.

Upstream asks every layer of an SDPA Llama for attention maps and is pinned to transformers 4.46.3, which then falls
back to manual attention; this says what later releases do. ``chatterbox-lab releases`` installs each in its own folder
(350 MB in all, removed afterwards unless ``--cache`` keeps them), and probes it in its own process, with torch and all
else from the environment: a seeded Llama of 4 layers, float32, on the CPU. The columns of ``transformers.csv``:

- ``transformers``, ``torch``: the versions that ran.
- ``attention_maps``: layers whose map came back for ``output_attentions=True``, its rows summing to 1.
- ``layers_sdpa``, ``layers_manual``: layers that ran SDPA and manual attention in that call.
- ``warning``: what was said meanwhile, each text cut at 160 characters; a Python warning begins with its category.
- ``output_difference``: largest absolute difference of that call's output from the same call without the maps.
- ``tuple_cache``: ``past_key_values`` as a tuple of tuples "works", "warns" or "raises", and the text.
- ``spy_map``: whether one layer returns its map when it alone is told to, as upstream's spy does.
- ``spy_future_mass``: share of that map, in a prefill, that lies on tokens still to come; 0 is causal.
- ``spy_change``: norm of the change that the spy makes to ``last_hidden_state``, relative to the state's norm.
- ``probe_difference``: largest absolute difference of the rows that this repository's probe reads, in prefill and
  decode, from the maps of the same weights with eager attention.
- ``error``: what could not be recorded; the columns concerned are empty.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import REPOSITORY, written_whole

if TYPE_CHECKING:
    import torch
    from transformers import LlamaModel

# With each release come the packages whose version in the environment it may refuse; pinned, so that a later run
# records the same.
RELEASES = {
    "4.46.3": ("tokenizers==0.20.3",),
    "4.48.3": ("tokenizers==0.21.4",),
    "4.53.3": ("tokenizers==0.21.4",),
    "4.57.6": ("tokenizers==0.22.2",),
    "5.0.0": ("tokenizers==0.22.2", "huggingface_hub==1.33.0"),
    "5.23.0": ("tokenizers==0.23.3", "huggingface_hub==1.33.0"),
}
COLUMNS = (
    *("transformers", "torch", "attention_maps", "layers_sdpa", "layers_manual", "warning", "output_difference"),
    *("tuple_cache", "spy_map", "spy_future_mass", "spy_change", "probe_difference", "error"),
)
BATCH, LENGTH, HIDDEN, HEADS, LAYERS = 2, 20, 64, 4, 4
SPIED = 2
TEXT = (5, 15)
PROBED = (((SPIED, None),), ((1, 3), (2, 1)))
LONGEST_TEXT = 160
LONGEST_RUN = 900  # seconds, for an installation as for a probe


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of ``chatterbox-lab releases``."""
    parser.add_argument(
        "--releases",
        nargs="+",
        metavar="X",
        choices=RELEASES,
        default=list(RELEASES),
        help="%(choices)s (default: all)",
    )
    parser.add_argument(
        "--cache", type=Path, metavar="X", help="keep the releases in X/VERSION, and use those that are already there"
    )
    parser.add_argument("--output", type=Path, metavar="X", help="CSV to write (default: build/data/transformers.csv)")
    parser.add_argument("--probe", action="store_true", help="print, as JSON, what the importable transformers does")


def run(options: argparse.Namespace) -> int:
    """Records the releases, or probes the one that is importable; returns 1 where something could not be recorded."""
    if options.probe:
        print(json.dumps(probe_release()))
        return 0
    import pandas as pd  # a process that probes needs none of these
    from tqdm import tqdm

    from .records import output_folder

    with tempfile.TemporaryDirectory() if options.cache is None else nullcontext(options.cache) as folder:
        versions = tqdm(options.releases, "transformers releases", unit="release")
        rows = [record(version, Path(folder)) for version in versions]
    failed = [row for row in rows if row.get("error")]
    for row in failed:
        print(f"transformers {row['transformers']}: {row['error']}", file=sys.stderr)
    path = options.output or output_folder("data") / "transformers.csv"
    if not any("torch" in row for row in rows):
        print(f"No release could be probed; {path.name} is left as it was.", file=sys.stderr)
        return 1
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as part:  # dtype object keeps the integers of a column that lacks some
        pd.DataFrame(rows, columns=COLUMNS, dtype=object).to_csv(part, index=False)
    print(f"{len(rows)} rows are in {path.name}.")
    return int(bool(failed))


def record(version: str, cache: Path) -> dict[str, Any]:
    """One release's row; a failure becomes its ``error``."""
    try:
        folder = installed(version, (f"transformers=={version}", *RELEASES[version]), cache)
        path = os.pathsep.join([str(folder.resolve()), str(REPOSITORY)])
        environment = dict(os.environ, PYTHONPATH=path, PYTHONDONTWRITEBYTECODE="1")
        output = _said("probing", [sys.executable, "-m", "chatterbox_lab", "releases", "--probe"], environment)
        row = json.loads(output.splitlines()[-1])
        if row["transformers"] != version:
            raise RuntimeError(f"probing: transformers {row['transformers']} was imported")
        return row
    except (RuntimeError, OSError) as error:
        return {"transformers": version, "error": str(error)}


def installed(name: str, packages: Sequence[str], cache: Path) -> Path:
    """The folder of this name in ``cache`` that holds the packages alone, filled if it is not there yet."""
    folder = cache / name
    if not folder.is_dir():
        part = cache / f"{name}.part"  # so that an interrupted installation is not taken for a whole one
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        try:
            _said("installing", [*_installer(), "--quiet", "--no-deps", "--target", str(part), *packages])
            part.replace(folder)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    return folder


def _installer() -> list[str]:
    """The beginning of an install command: pip, or uv where the environment has no pip."""
    if importlib.util.find_spec("pip"):
        return [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "--no-compile"]
    if uv := shutil.which("uv"):
        return [uv, "pip", "install", "--python", sys.executable]
    raise RuntimeError("installing: neither pip nor uv is there")


def _said(what: str, command: list[str], env: dict[str, str] | None = None) -> str:
    """What ``command`` prints. Raises RuntimeError with the last line of its complaint."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=LONGEST_RUN)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"{what}: not done after {LONGEST_RUN} seconds") from None
    if done.returncode:
        raise RuntimeError(f"{what}: {shortened((done.stderr.strip().splitlines() or ['no message'])[-1])}")
    return done.stdout


def shortened(text: Any) -> str:
    """The first line, cut, of a message, without the paths and addresses that hold on one machine only."""
    line = (str(text).strip().splitlines() or [""])[0]
    return re.sub(r"\S*/\S*/\S*", "...", line)[:LONGEST_TEXT]


def probe_release() -> dict[str, Any]:
    """The row of the transformers that is imported here."""
    import torch
    import transformers

    torch.set_num_threads(1)
    row: dict[str, Any] = {"transformers": transformers.__version__, "torch": torch.__version__.split("+")[0]}
    errors = []
    for part in (ask_for_maps, pass_tuple_cache, spy_on_layer, read_with_probe):
        # One part that a release breaks must not cost what the others find.
        try:
            with torch.inference_mode():
                row |= part(embeddings())
        except Exception as error:
            errors.append(f"{part.__name__}: {type(error).__name__}: {shortened(error)}")
    return row | {"error": "; ".join(errors)}


def build(implementation: str) -> LlamaModel:
    """A small Llama, the same at every call."""
    import torch
    from transformers import LlamaConfig, LlamaModel

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        vocab_size=8,
        initializer_range=0.2,  # the default's attention is all but uniform, and a wrong row would look right
        attn_implementation=implementation,
    )
    return LlamaModel(config).eval()


def embeddings() -> torch.Tensor:
    """Input embeddings of a prefill and of one token to decode after it: (BATCH, LENGTH + 1, HIDDEN)."""
    import torch

    return torch.randn(BATCH, LENGTH + 1, HIDDEN, generator=torch.Generator().manual_seed(1))


def ask_for_maps(embeds: torch.Tensor) -> dict[str, Any]:
    """What ``output_attentions=True`` gives, and how the layers compute it."""
    import torch

    from .fallback import watch_layers

    prefill = {"inputs_embeds": embeds[:, :LENGTH], "use_cache": False}
    model = build("sdpa")
    plain = model(**prefill)
    with heard() as texts, watch_layers(model) as counts:
        asked = model(**prefill, output_attentions=True)
    maps = [attention for attention in asked.attentions or () if isinstance(attention, torch.Tensor)]
    sound = [torch.allclose(attention.sum(-1), torch.ones(())) for attention in maps]
    return {
        "attention_maps": sum(sound),
        "layers_sdpa": sum(count["sdpa"] for count in counts),
        "layers_manual": sum(count["manual"] for count in counts),
        "warning": " | ".join(texts),
        "output_difference": largest(asked.last_hidden_state - plain.last_hidden_state),
    }


def pass_tuple_cache(embeds: torch.Tensor) -> dict[str, Any]:
    """Whether one token can be decoded after keys and values that come as a tuple of tuples."""
    import torch
    from transformers import DynamicCache

    torch.manual_seed(2)
    shape = (BATCH, HEADS, LENGTH, HIDDEN // HEADS)
    pairs = tuple((torch.randn(shape), torch.randn(shape)) for _ in range(LAYERS))
    cache = DynamicCache()
    for layer, (key, value) in enumerate(pairs):
        cache.update(key, value, layer)
    model, token = build("sdpa"), embeds[:, LENGTH:]
    expected = model(inputs_embeds=token, past_key_values=cache, use_cache=True).last_hidden_state
    try:
        with heard() as texts:
            output = model(inputs_embeds=token, past_key_values=pairs, use_cache=True).last_hidden_state
    except Exception as error:
        return {"tuple_cache": f"raises {type(error).__name__}: {shortened(error)}"}
    if (difference := largest(output - expected)) > 1e-4:
        raise ValueError(f"the tuple's output differs from the Cache's by {difference}")
    return {"tuple_cache": f"warns: {' | '.join(texts)}" if texts else "works"}


def spy_on_layer(embeds: torch.Tensor) -> dict[str, Any]:
    """What one layer returns, and does to the output, when upstream's spy alone asks it for its map."""
    prefill = {"inputs_embeds": embeds[:, :LENGTH], "use_cache": False, "output_attentions": False}
    model = build("sdpa")
    plain = model(**prefill).last_hidden_state
    layer, seen = model.layers[SPIED].self_attn, []
    original = layer.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        kwargs["output_attentions"] = True
        return original(*args, **kwargs)

    layer.forward = forward
    layer.register_forward_hook(lambda module, inputs, output: seen.append(output[1]))
    spied = model(**prefill).last_hidden_state
    row = {"spy_map": seen[0] is not None, "spy_change": rounded((spied - plain).norm() / plain.norm())}
    if row["spy_map"]:
        attention = seen[0][0].mean(0)
        row["spy_future_mass"] = rounded(attention.triu(1).sum() / attention.sum())
    return row


def read_with_probe(embeds: torch.Tensor) -> dict[str, Any]:
    """How far the rows of this repository's probe are from those of eager attention."""
    import torch
    from transformers import DynamicCache

    from ..engine.t3.attention import Attention

    model, eager = build("sdpa"), build("eager")
    eager.load_state_dict(model.state_dict())
    maps = [attention[0] for attention in eager(inputs_embeds=embeds, output_attentions=True).attentions]
    start, end = TEXT
    differences = []
    for heads in PROBED:
        wanted = [maps[layer].mean(0) if head is None else maps[layer][head] for layer, head in heads]
        attend, cache = Attention(model, "probe", TEXT, heads), DynamicCache()
        found = []
        for tokens in embeds.split([LENGTH, 1], dim=1):
            attend(tokens, cache)
            found.append(attend.rows)
        pair = torch.cat(found), torch.stack(wanted).mean(0)[end:, start:end]
        if pair[0].shape != pair[1].shape:
            raise ValueError(f"rows are {tuple(pair[0].shape)}, not {tuple(pair[1].shape)}")
        differences.append(largest(pair[0] - pair[1]))
    return {"probe_difference": max(differences)}


@contextmanager
def heard() -> Iterator[list[str]]:
    """Collects, once each, the texts that transformers logs and that Python warns with; filled at the end."""
    from .logs import catch_warnings

    texts: list[str] = []
    with warnings.catch_warnings(record=True) as raised, catch_warnings() as logged:
        warnings.simplefilter("always")
        yield texts
    said = [f"{warning.category.__name__}: {warning.message}" for warning in raised]
    texts += dict.fromkeys(map(shortened, [*said, *(warning.message for warning in logged)]))


def largest(difference: torch.Tensor) -> float:
    """The largest absolute value, to two digits: more would be another machine's business."""
    return float(f"{difference.abs().max():.1e}")


def rounded(share: torch.Tensor) -> float:
    """Three digits of a share."""
    return float(f"{share:.3g}")
