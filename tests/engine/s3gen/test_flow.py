from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import chatterbox_lab as lab
from chatterbox_lab.engine.s3gen.flow import FlowPlan


@pytest.mark.parametrize(("native", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_auto_multiplies_in_what_this_cpu_has(
    native: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("chatterbox_lab.engine.linears._onednn", lambda wanted: native or wanted == torch.float32)
    assert FlowPlan.of(lab.FAST, torch.device("cpu")).dtype == dtype
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native)
    assert FlowPlan.of(lab.FAST, torch.device("cuda")).dtype == dtype
    assert FlowPlan.of(lab.FAST, torch.device("mps")).dtype == torch.float32
    assert FlowPlan.of(lab.BALANCED, torch.device("cpu")).dtype == torch.float32
    asked = lab.BALANCED.replace(flow_dtype="bfloat16")
    assert FlowPlan.of(asked, torch.device("cpu")).dtype == torch.bfloat16


LOOK = """
import torch
import chatterbox_lab as lab
from chatterbox_lab.engine.s3gen.flow import FlowPlan
print(FlowPlan.of(lab.FAST, torch.device("cpu")).dtype)
"""


def test_a_cpu_with_avx2_alone_is_given_float32() -> None:
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
    done = subprocess.run([sys.executable, "-c", LOOK], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.strip() == "torch.float32"
