"""Whatever an application passes: clean audio, or a ValueError or TypeError before any model runs.

``CHATTERBOX_LAB_FUZZ=20000 pytest tests/engine/test_fuzz.py`` looks further, with new examples every time.
"""

from __future__ import annotations

import inspect
import io
import os
import warnings
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

import chatterbox_lab as lab

EXAMPLES = int(os.environ.get("CHATTERBOX_LAB_FUZZ", 40))
FUZZ = settings(
    max_examples=EXAMPLES,
    derandomize=EXAMPLES == 40,
    suppress_health_check=list(HealthCheck),
    report_multiple_bugs=False,
)

OURS = {"seed", "max_new_tokens", "stop"}
anything = st.text(st.characters(exclude_categories=()), max_size=80)
odd = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.binary(max_size=5), st.tuples(),
    st.lists(st.integers(), max_size=2), st.complex_numbers(), st.just(torch.ones(1)), st.just(np.float32(0.5)),
    st.just(np.int64(3)), st.just(object()), st.fractions(), st.decimals(),
)  # fmt: skip
small, amount = st.integers(1, 12), st.floats(0, 100)
FIELDS = {
    "chunk_size": small,
    "context_window": st.integers(0, 12),
    "temperature": st.one_of(st.just(0), st.floats(1e-3, 100)),
    "cfg_weight": amount,
    "exaggeration": amount,
    "fade_duration": amount,
    "analyzer": st.sampled_from(["off", "probe", "layer", "stock"]),
    "guard": st.booleans(),
    "backend": st.sampled_from(["auto", "hf", "static", "graph"]),
    "weights": st.sampled_from(["loaded", "int8"]),
    "schedule": st.sampled_from(["fixed", "grow"]),
    "max_chunk_size": small,
    "costs": st.builds(lab.Costs, token=st.floats(0, 1), chunk=st.floats(-1, 1), error=st.floats(0, 9)),
    "flow": st.sampled_from(["window", "cached"]),
    "flow_dtype": st.sampled_from(["auto", "float32", "bfloat16"]),
    "flow_steps": st.integers(1, 3),
    "prompt_tokens": st.integers(0, 300),
    "overlap": st.booleans(),
    "ignore_eos": st.booleans(),
}
wanted = st.fixed_dictionaries({}, optional=FIELDS)
names = st.sampled_from([*FIELDS, "seed", "max_new_tokens", "stop", "nonsense"])
spoilt = st.one_of(st.just({}), st.just({}), st.dictionaries(names, odd, min_size=1, max_size=3))
limits = st.fixed_dictionaries({"max_new_tokens": st.integers(1, 9)}, optional={"seed": st.integers(0, 2**63 - 1)})


def spoken(stream: Any) -> list[torch.Tensor]:
    """The audio of a stream, which is clean."""
    chunks = list(stream)
    for audio, _ in chunks:
        assert audio.shape[0] == 1
        assert audio.dtype == torch.float32
        assert audio.isfinite().all()
        assert audio.abs().max() < 2
    if chunks:
        assert sum(audio.shape[1] for audio, _ in chunks) == 960 * chunks[-1][1].tokens
    return [audio for audio, _ in chunks]


@FUZZ
@given(text=anything, fields=wanted, spoilt=spoilt, limits=limits)
@example(text="\ud800", fields={}, spoilt={}, limits={"max_new_tokens": 2})
@example(text="\0", fields={}, spoilt={}, limits={"max_new_tokens": 2})
@example(text="a", fields={}, spoilt={"seed": 2**63}, limits={"max_new_tokens": 2})
def test_a_stream_is_clean_or_refused(tts: Any, text: str, fields: Any, spoilt: Any, limits: Any) -> None:
    try:
        stream = lab.generate_stream(tts, text, **({"flow_steps": 1} | fields | limits | spoilt))
    except (ValueError, TypeError):
        return
    spoken(stream)


@FUZZ
@given(text=anything, fields=wanted, spoilt=spoilt, limits=limits, whole=st.booleans())
@example(text="", fields={}, spoilt={}, limits={"max_new_tokens": 2}, whole=False)
@example(text="  \n", fields={}, spoilt={}, limits={"max_new_tokens": 2}, whole=True)
def test_a_patched_call_is_clean_or_refused(
    tts: Any, text: str, fields: Any, spoilt: Any, limits: Any, whole: bool
) -> None:
    asked = {"flow_steps": 1} | fields | limits | spoilt
    of_the_call = inspect.signature(tts.generate if whole else tts.generate_stream).parameters.keys() | OURS
    theirs = {name: value for name, value in asked.items() if name in of_the_call}
    if not whole:
        theirs["print_metrics"] = False
    try:
        with lab.patch(tts, **{name: value for name, value in asked.items() if name not in theirs}):
            made = (tts.generate if whole else tts.generate_stream)(text, **theirs)
    except (ValueError, TypeError):
        return
    assert made.isfinite().all() if whole else spoken(made) is not None


scales = st.floats(0, 2) | st.sampled_from([np.nan, np.inf, 1e30])
numbers = st.one_of(
    arrays.arrays(
        st.sampled_from(["f4", "f8", "f2", "i2", "i4", "u1", "?", "c8", "U1", "O"]),
        arrays.array_shapes(min_dims=0, max_dims=3, max_side=3),
    ),
    st.builds(
        lambda seed, seconds, scale, shift: np.random.default_rng(seed).normal(shift, scale, int(8000 * seconds)),
        st.integers(0, 99), st.floats(0, 3), scales, st.floats(-1, 1),
    ),
)  # fmt: skip
rates = st.one_of(st.sampled_from([8000, 16000, 24000, 44100]), st.integers(), st.floats(), odd)
voices = st.builds(
    lambda seed, seconds, scale: np.random.default_rng(seed).normal(0, scale, int(8000 * seconds)),
    st.integers(0, 9999), st.floats(1, 2), st.floats(0.01, 1),
)  # fmt: skip
sources = st.one_of(
    st.tuples(voices, st.sampled_from([6000, 7350, 8000])),
    st.builds(lambda samples: io.BytesIO(written(samples)), voices),
    odd,
    numbers,
    st.tuples(numbers, rates),
    st.tuples(numbers, st.sampled_from([8000, 11025])),
    st.tuples(rates, numbers),
    st.lists(odd, max_size=3),
    st.builds(io.BytesIO, st.binary(max_size=200)),
    st.builds(io.StringIO, st.text(max_size=20)),
    st.builds(lambda cut: io.BytesIO(WAV[:cut]), st.integers(0, 40000)),
)


def written(samples: np.ndarray) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, 8000, format="WAV")
    return file.getvalue()


WAV = written(np.random.default_rng(0).normal(0, 0.1, 16000))


@FUZZ
@given(source=sources)
@example(source=(np.full(24000, 1e30), 8000))
def test_a_recording_gives_a_voice_or_is_refused(tts: Any, source: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        try:
            tts.prepare_conditionals(source)
        except (ValueError, TypeError):
            return
    assert all(value.isfinite().all() for value in tts.conds.gen.values() if torch.is_tensor(value))
    spoken(lab.generate_stream(tts, "Hi.", max_new_tokens=2, flow_steps=1, seed=0))


@pytest.mark.parametrize(
    "text", ["\U0001f600", "\u202e right to left", "e\u0301" * 30, "\x00\x01", "[laugh] [START] [STOP]", "٣"]
)
def test_texts_that_no_tokenizer_was_made_for_are_spoken(tts: Any, text: str) -> None:
    assert spoken(lab.generate_stream(tts, text, max_new_tokens=3, flow_steps=1, seed=0, ignore_eos=True))
