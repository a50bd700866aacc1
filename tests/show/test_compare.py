from __future__ import annotations

import base64
import io
from xml.etree import ElementTree

import numpy as np
import pytest
import soundfile
import torch

from chatterbox_lab.show import compare


def test_recordings_side_by_side_are_whole_and_show_their_seams() -> None:
    tone = 0.5 * torch.sin(torch.arange(4800) / 5)[None]
    shown = compare.recordings(
        {"one <piece>": [tone], "three": list(tone.split(1600, dim=1))}, 24000, {"three": "a note & more"}
    )
    page = ElementTree.fromstring(shown.data.replace("<br>", "<br/>").replace(" controls", ""))
    one, three = page.findall("figure")
    assert ["".join(figure.find("figcaption").itertext()) for figure in (one, three)] == [
        "one <piece>",
        "threea note & more",
    ]
    lines = [figure.findall("svg/path")[1].get("d") for figure in (one, three)]
    assert lines == ["", "M133.3 0V2 M266.7 0V2"]
    for figure in (one, three):
        kind, data = figure.find("audio").get("src").split(",")
        samples, rate = soundfile.read(io.BytesIO(base64.b64decode(data)), dtype="float32")
        assert (kind, rate) == ("data:audio/flac;base64", 24000)
        np.testing.assert_allclose(samples, tone[0], atol=1e-3)
    assert one.findall("svg/path")[0].get("d").count("M") == 400


@pytest.mark.parametrize("spoken", [{}, {"silent": []}, {"silent": [torch.zeros(1, 0)]}])
def test_nothing_cannot_be_compared(spoken: dict[str, list[torch.Tensor]]) -> None:
    with pytest.raises(ValueError, match="every recording needs audio"):
        compare.recordings(spoken)
