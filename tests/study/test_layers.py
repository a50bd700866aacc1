from __future__ import annotations

from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch
from torch.autograd import DeviceType

from chatterbox_lab.__main__ import main
from chatterbox_lab.study import layers
from chatterbox_lab.study.layers import MODES, PHASES, WHOLE, Step


def hooks(t3: torch.nn.Module) -> int:
    """Hooks and replaced forwards anywhere in the transformer."""
    kinds = ("_forward_hooks", "_forward_pre_hooks")
    modules = list(t3.tfmr.modules())
    return sum(len(getattr(module, kind)) for module in modules for kind in kinds) + sum(
        "forward" in vars(module) for module in modules
    )


@pytest.fixture(scope="module")
def profile(voice: Any) -> pd.DataFrame:
    return layers.measure(voice.t3, MODES, [64], prefill_repeats=2, decode_repeats=3)


def test_every_layer_part_mode_and_phase_is_a_row(profile: pd.DataFrame, voice: Any) -> None:
    repeats = {"prefill": 2, "decode": 3}
    marked = profile[profile["mode"] != "bare"]
    inside = marked[marked["layer"] != WHOLE]
    assert set(inside["layer"]) == set(range(len(voice.t3.tfmr.layers)))
    assert set(inside["part"]) == set(layers.PARTS)
    assert set(marked.loc[marked["layer"] == WHOLE, "part"]) == {"model", "sampling", "step"}
    rows = len(voice.t3.tfmr.layers) * 3 + 3
    counts = marked.groupby(["phase", "mode"]).size()
    assert {key: counts[key] for key in counts.index} == {
        (phase, mode): repeats[phase] * rows for phase in PHASES for mode in MODES
    }
    assert (profile["seconds"] > 0).all()


@pytest.mark.parametrize("phase", PHASES)
def test_the_parts_are_the_whole_step(voice: Any, monkeypatch: pytest.MonkeyPatch, phase: str) -> None:
    step, ticks = Step(voice.t3, phase, 64), count()
    monkeypatch.setattr(layers, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))  # each look takes 1
    looks = {}
    for mode in MODES:
        spans = step.seconds(mode)
        whole = looks[mode] = spans.pop((WHOLE, "step"))
        assert len(spans) == 3 * len(voice.t3.tfmr.layers) + 2
        assert sum(spans.values()) == whole - 2  # to the first mark, and from the last one on
    assert len(set(looks.values())) == 1, looks  # no mark is missing where copies of layers run


def test_nothing_stays_on_the_model(voice: Any, profile: pd.DataFrame) -> None:
    assert hooks(voice.t3) == 0
    step = Step(voice.t3, "decode", 64)
    for mode in MODES:
        timeline = layers.Timeline("cpu")
        with layers.marked(voice.t3.tfmr, timeline), step.ready(mode) as run:
            assert hooks(voice.t3) > 0
            run(timeline.mark)
        assert hooks(voice.t3) == 0
        assert step.cache.get_seq_length() == 63

    def stop(part: str) -> None:
        if part == "sampling":
            raise KeyboardInterrupt

    for mode in MODES:
        with pytest.raises(KeyboardInterrupt), step.ready(mode) as run, layers.marked(voice.t3.tfmr, timeline):
            run(stop)
        assert hooks(voice.t3) == 0
        assert step.cache.get_seq_length() == 63


def test_the_released_mode_runs_upstreams_spy(voice: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    spies = []
    original = layers.AlignmentStreamAnalyzer

    def watched(*args: Any, **kwargs: Any) -> Any:
        spies.append(original(*args, **kwargs))
        return spies[-1]

    monkeypatch.setattr(layers, "AlignmentStreamAnalyzer", watched)
    Step(voice.t3, "prefill", 64).seconds("released")
    assert spies[0].last_aligned_attn.shape == (64, 64)


def test_medians_sums_and_ratios() -> None:
    rows = [
        ("decode", 64, mode, repeat, layer, part, factor * (repeat + 1) * (2 if part == "attention" else 1))
        for mode, factor in (("off", 1.0), ("stock", 3.0))
        for repeat in range(3)
        for layer, part in ((0, "attention"), (1, "attention"), (0, "mlp"), (1, "mlp"), (WHOLE, "step"))
    ]
    rows += [("decode", 64, "bare", repeat, WHOLE, "step", 0.8 * (repeat + 1)) for repeat in range(3)]
    columns = ["phase", "length", "mode", "repeat", "layer", "part", "seconds"]
    costs = layers.summary(pd.DataFrame(rows, columns=columns))
    found = costs.set_index(["mode", "layer", "part"])
    assert found.loc[("stock", 1, "attention"), ["seconds", "low", "high", "repeats", "ratio"]].tolist() == [
        12, 9, 15, 3, 3,
    ]  # fmt: skip
    assert found.loc[("off", WHOLE, "attention"), "seconds"] == 8
    assert layers.steps(costs)["stock"].tolist() == [3]
    assert layers.overhead(costs).tolist() == pytest.approx([0.25])


def test_what_a_step_asks_of_the_device(voice: Any) -> None:
    asked = {mode: layers.launches(Step(voice.t3, "prefill", 64), mode, repeats=1) for mode in MODES}
    assert {mode: counts["sdpa"] for mode, counts in asked.items()} == {
        "released": "none (manual)", "stock": "none (manual)", "layer": "flash (CPU)", "off": "flash (CPU)",
        "probe": "flash (CPU)",
    }  # fmt: skip
    assert asked["off"]["mask_bytes"] == asked["probe"]["mask_bytes"] == 0
    assert asked["stock"]["mask_bytes"] == 64 * 65 * 4  # queries, keys and one more, float32; both rows share it
    assert asked["off"]["operators"] < asked["probe"]["operators"] < asked["stock"]["operators"]
    assert hooks(voice.t3) == 0


def test_the_attention_operators_exist_in_this_torch() -> None:
    for name in ("flash_attention", "flash_attention_for_cpu", "efficient_attention", "cudnn_attention"):
        operator = f"_scaled_dot_product_{name}"
        assert hasattr(torch.ops.aten, operator)
        assert layers.sdpa_kernel(f"aten::{operator}")
    assert layers.sdpa_kernel("aten::matmul") is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"modes": ["fast"]}, r"modes=\('fast', 'off'\): each must be one of released, stock"),
        ({"phases": ["warm"]}, "phases=.*each must be one of prefill, decode"),
        ({"lengths": [63]}, "lengths=63"),
        ({"lengths": [4097]}, "lengths=4097"),
        ({"decode_repeats": 0}, "decode_repeats=0"),
        ({"prefill_repeats": True}, "prefill_repeats=True"),
        ({"warm_up": -1}, "warm_up=-1"),
    ],
)
def test_bad_arguments_are_named_before_anything_runs(
    voice: Any, arguments: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layers, "Step", None)
    with pytest.raises(ValueError, match=message):
        layers.measure(voice.t3, **arguments)


def test_a_step_names_what_is_wrong(voice: Any) -> None:
    with pytest.raises(ValueError, match="phase='warm'"):
        Step(voice.t3, "warm", 64)
    with pytest.raises(ValueError, match="mode='fast'"), Step(voice.t3, "prefill", 64).ready("fast"):
        pass


def test_the_command_line_profiles(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "new" / "layers.csv"
    short = ["--lengths", "64", "--prefill-repeats", "1", "--decode-repeats", "1", "--modes", "stock", "off"]
    assert main(["layers", "--model", "tiny", "--device", "cpu", *short, "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    assert "Ratio to off" in printed
    assert "overhead" in printed
    costs = pd.read_csv(output)
    assert {"phase", "layer", "part", "seconds", "ratio", "machine", "commit", "model", "dtype"} <= set(costs.columns)
    assert {file.name for file in output.parent.iterdir()} == {"layers.csv", "launches_layers.csv"}


def test_the_command_line_goes_on_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], voice: Any
) -> None:
    monkeypatch.setattr(layers, "load", lambda *_, **__: voice)
    output, measured = tmp_path / "layers.csv", layers.measure
    short = ["--device", "cpu", "--lengths", "64", "65", "--prefill-repeats", "1", "--decode-repeats", "1"]
    command = ["layers", *short, "--modes", "off", "--output", str(output)]

    def interrupted(t3: Any, modes: Any, lengths: list[int], **kwargs: Any) -> pd.DataFrame:
        if lengths == [65]:
            raise KeyboardInterrupt
        return measured(t3, modes, lengths, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(layers, "measure", interrupted)
        assert main(command) == 130
    assert "--resume goes on" in capsys.readouterr().out
    assert not output.exists()
    first = pd.read_csv(tmp_path / "layers.unfinished.csv")
    assert main([*command, "--resume"]) == 0
    both = pd.read_csv(output)
    assert set(both["length"]) == {64, 65}
    assert both.loc[both["length"] == 64, "seconds"].tolist() == first["seconds"].tolist()
    assert main([*command, "--modes", "off", "probe", "--resume"]) == 0  # more is asked of the same lengths
    assert set(pd.read_csv(output)["mode"]) == {"off", "probe", "bare"}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--device", "cuda:99"], "device='cuda:99': not available here"),
        (["--lengths", "64", "5000"], "lengths=5000: must be a whole number, at least 64 and at most 4096"),
        (["--decode-repeats", "0"], "decode_repeats=0: must be"),
        (["--modes", "fast"], "argument --modes: invalid choice: 'fast'"),
    ],
)
def test_the_command_line_names_what_is_wrong_before_it_loads(
    wrong: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layers, "load", None)
    with pytest.raises(SystemExit) as exit_:
        main(["layers", *wrong])
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


@dataclass
class Event:
    """As much of a profiler's event as is counted."""

    name: str
    device_type: DeviceType = DeviceType.CPU
    cpu_children: list[Event] = field(default_factory=list)
    microseconds: float = 0.0

    @property
    def time_range(self) -> Any:
        return SimpleNamespace(elapsed_us=lambda: self.microseconds)


def test_events_of_a_gpu_are_counted() -> None:
    """A trace as Kineto gives it: launches are children of the operators, kernels and copies are the device's own."""
    launch = Event("cudaLaunchKernel")
    matmul, flash = Event("aten::mm", cpu_children=[launch]), Event("aten::_scaled_dot_product_flash_attention")
    nested = [Event("aten::linear", cpu_children=[matmul]), matmul, launch]
    kernels = [Event(name, DeviceType.CUDA, microseconds=20) for name in ("sgemm", "flash_fwd_kernel")]
    copies = ("Memcpy DtoH (Device -> Pageable)", "Memcpy DtoD (Device -> Device)", "Memset (Device)")
    moved = [Event(name, DeviceType.CUDA, microseconds=1) for name in copies]
    found = layers.counted([*nested, flash, *kernels, *moved])
    assert found == {"operators": 2, "sdpa": "flash", "kernels": 2, "copies": 1, "busy": pytest.approx(43e-6)}
