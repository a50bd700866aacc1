"""The page of a diagnosis: self-contained, of a size to send, short where there is nothing to complain about."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch
from diagnosis import measured, tiny
from matplotlib import pyplot as plt
from matplotlib.colors import to_rgba
from PIL import Image

import chatterbox_lab as lab
from chatterbox_lab.__main__ import main
from chatterbox_lab.show import report as reports
from chatterbox_lab.show import report_figures
from chatterbox_lab.show.colors import PALE, RUST
from chatterbox_lab.show.report import MOST_BYTES, Report, flac
from chatterbox_lab.study import diagnose, findings, machine
from chatterbox_lab.study.findings import HERE
from chatterbox_lab.study.records import load_results
from chatterbox_lab.study.subject import EXACT, FASTEST, UPSTREAM

CALLS = 5
SECTIONS = [
    "Before and after", "Root causes", "Chunk sizes", "Memory", "Recommended settings", "The gap that remains",
    "The report's numbers, and yours", "This machine",
]  # fmt: skip
SHORT = ["Before and after", "Root causes", "Recommended settings", "This machine"]


@pytest.fixture(scope="module")
def report() -> Report:
    """That of a model on which upstream's generate ran five times."""
    found = measured(CALLS)
    return Report(found.rows, {name: flac(sound, 24000) for name, sound in found.audio.items()})


def headings(html: str) -> list[str]:
    return [text.replace("&#x27;", "'") for text in re.findall(r"<h2>(.*?)</h2>", html)]


def test_the_page_is_one_file_that_loads_nothing(report: Report) -> None:
    html = report.html()
    assert len(html.encode()) <= MOST_BYTES
    sources = re.findall(r'(?:src|href)="([^"]{0,40})', html)
    assert len(sources) == 6
    assert all(source.startswith("data:") for source in sources)
    assert not re.search(r"https?://|@import|url\(|<script|<link", html)
    assert headings(html) == SECTIONS


def test_the_figures_and_the_players_are_what_they_say(report: Report) -> None:
    html = report.html()
    pictures = re.findall(r'src="data:image/png;base64,([^"]+)" alt="([^"]+)"', html)
    assert [Image.open(BytesIO(base64.b64decode(data))).format for data, _ in pictures] == ["PNG"] * 3
    assert all(alt for _, alt in pictures)
    sounds = re.findall(r'<figcaption>([^<]+)</figcaption><audio controls[^>]*base64,([^"]+)"', html)
    assert [name.split(":")[0] for name, _ in sounds] == ["Before", "After", "Ours, fastest"]
    for (_, data), name in zip(sounds, (UPSTREAM, EXACT, FASTEST), strict=True):
        wave, rate = soundfile.read(BytesIO(base64.b64decode(data)))
        said = measured(CALLS).audio[name][0].clamp(-1, 1)
        assert rate == 24000
        assert torch.allclose(torch.from_numpy(wave).float(), said, atol=1e-4)


def test_a_player_is_left_out_where_the_page_would_be_too_large(report: Report) -> None:
    noise = flac(torch.rand(1, 24000 * 20, generator=torch.Generator().manual_seed(0)) * 2 - 1, 24000)
    assert soundfile.info(BytesIO(noise)).duration == 4
    large = Report(report.rows, {UPSTREAM: noise, EXACT: noise, FASTEST: noise * 3})
    html = large.html()
    assert len(html.encode()) <= MOST_BYTES
    assert html.count("<audio") == 2


def test_spies_are_named_on_the_page(report: Report) -> None:
    for page in (report.html(), report.markdown()):
        assert "5 hooks and 5 wrapped forwards of earlier calls were on layer 9." in page
        assert "Earlier calls have left 5 spies on layer 9." in page


def test_every_claim_of_the_report_has_a_line_under_its_heading(report: Report) -> None:
    (_, below) = report.markdown().split("## The report's numbers, and yours")
    recorded = load_results("report")
    lines = [line.strip("| ").split(" | ") for line in below.split("## ")[0].splitlines() if line.startswith("| ")]
    assert [line[:2] for line in lines[2:]] == recorded[["heading", "measure"]].to_numpy().tolist()
    assert all(len(line) == 4 and all(line) for line in lines)
    for value in recorded["reported"].dropna():
        assert f"{value:g}" in below


def test_the_text_follows_the_rows(report: Report) -> None:
    rows = [dict(row) for row in report.rows]
    for row in rows:
        if row["name"] == "stream" and row["variant"] == UPSTREAM:
            row["rtf"] = 7.25
    other = Report(rows)
    assert "an RTF of 7.25, slower than real time" in other.html()
    assert "7.25" not in report.html()
    assert "<audio" not in other.html()


def test_a_machine_with_nothing_to_complain_about_gets_a_short_page(
    report: Report, monkeypatch: pytest.MonkeyPatch
) -> None:
    full, quiet = report.markdown(), Report(report.rows)
    monkeypatch.setattr(findings, "LEAST", 2.0)  # nothing takes more than all of the time
    html = quiet.html()
    assert headings(html) == SHORT
    assert "There is nothing to complain about" in html
    assert "<h3>" not in html
    short = quiet.markdown()
    assert len(short) < 0.7 * len(full)
    assert f"| {HERE} |" in full
    assert f"| {HERE} |" not in short


def test_what_could_not_be_measured_is_said(report: Report) -> None:
    rows = [row for row in report.rows if row.get("variant") != FASTEST]
    (exact,) = [row for row in rows if row["part"] == "streams" and row["variant"] == EXACT]
    rows.append({**exact, "variant": FASTEST, "rtf": None, "error": "ValueError: no such backend"})
    page = Report(rows).markdown()
    assert "fastest could not be measured: ValueError: no such backend" in page
    assert "ours, fastest" not in page


def test_text_is_escaped(report: Report) -> None:
    rows = [{**row, "model": "<b>&"} for row in report.rows]
    html = Report(rows).html()
    assert "&lt;b&gt;&amp;" in html
    assert "<b>" not in html


def test_a_notebook_shows_the_page_by_itself(report: Report) -> None:
    shown = report._repr_html_()
    assert shown.startswith('<div class="cbl-report"><style>')
    assert "<html" not in shown
    rules = re.sub(r"@media[^{]*|[{][^{}]*[}]", "|", shown.split("<style>")[1].split("</style>")[0])
    selectors = [text.strip() for rule in re.split(r"[|{}]", rules) for text in rule.split(",") if text.strip()]
    assert len(selectors) > 20
    assert all(selector.startswith(".cbl-report") for selector in selectors)  # the notebook's own look stays


def test_the_figures_leave_the_style_of_others_alone(report: Report) -> None:
    with plt.rc_context({"axes.spines.top": True, "savefig.dpi": 33}):
        before, shown = dict(plt.rcParams), plt.get_fignums()
        found = report_figures.pictures(report.numbers, "tiny")
        assert dict(plt.rcParams) == before
        assert plt.get_fignums() == shown
    assert list(found) == list(report_figures.DRAWN)
    assert Image.open(BytesIO(found["streams"])).text["Description"] == "tiny"


def test_layers_are_drawn_by_what_they_run_with_their_spies(report: Report) -> None:
    ax = report_figures.layers(report.numbers).axes[0]
    assert len(ax.patches) == 2 * 14
    colors = [patch.get_facecolor() for patch in ax.patches]
    assert len(set(colors[:14])) == len(set(colors[14:])) == 1
    assert (colors[0], colors[-1]) == (to_rgba(RUST), to_rgba(PALE))  # manual above, SDPA below
    assert [(text.get_text(), text.get_position()[0]) for text in ax.texts] == [("5", 9.5)]
    plt.close("all")


def test_bars_add_up_to_the_rtf(report: Report) -> None:
    ax = report_figures.streams(report.numbers).axes[0]
    assert [label.get_text() for label in ax.get_yticklabels()] == list(report_figures.NAMES.values())
    ends = [max(p.get_x() + p.get_width() for p in ax.patches if abs(p.get_y() + 0.35 - row) < 0.1) for row in range(4)]
    assert [f"{end:.2f}" for end in ends] == [text.get_text() for text in ax.texts]
    plt.close("all")


def test_advice_can_be_run_as_it_stands(report: Report) -> None:
    code = report.markdown().split("```python\n")[1].split("```")[0]
    settings, _ = code.split("for audio")
    place: dict[str, Any] = {}
    exec(settings, place)
    assert isinstance(place["settings"], lab.StreamSettings)


@pytest.fixture
def quickly(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Diagnoses are of what is there at once, with streams that were measured before."""
    before = measured(CALLS)  # by all parts, so not once these are replaced

    def streams(subject: Any) -> Iterator[dict[str, Any]]:
        for name, sound in before.audio.items():
            subject.keep(name, sound)
        for row in before.rows:
            if row["part"] == "streams":
                yield {name: row[name] for name in list(row)[list(row).index("part") + 1 :]}  # not its machine

    monkeypatch.setattr(machine, "commit", lambda: "abc")  # one that others do not move meanwhile
    monkeypatch.setattr(reports, "load", lambda *_, **__: tiny())
    parts = {name: diagnose.PARTS[name] for name in ("machine", "found", "attention")}
    monkeypatch.setattr(diagnose, "PARTS", parts | {"streams": streams})
    return monkeypatch


def test_the_command_writes_the_page_and_says_the_summary(
    quickly: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "report"
    assert main(["diagnose", "--model", "tiny", "--used", "2", "-o", str(folder), "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert "Earlier calls have left 2 spies on layer 9." in said
    names = {"report.html", "report.md", "report.csv", "streams.png", "layers.png", "sizes.png"}
    assert {file.name for file in folder.iterdir()} == names | {f"{name}.flac" for name in (UPSTREAM, EXACT, FASTEST)}
    html = (folder / "report.html").read_text()
    assert "Earlier calls have left 2 spies on layer 9." in html
    for name in re.findall(r"\]\(([^)]+)\)", (folder / "report.md").read_text()):
        assert (folder / name).exists()

    def never(subject: Any) -> None:
        raise AssertionError("was measured before")

    quickly.setattr(diagnose, "PARTS", dict.fromkeys(diagnose.PARTS, never))
    assert main(["diagnose", "--model", "tiny", "-o", str(folder), "--device", "cpu", "--resume"]) == 0
    again = (folder / "report.html").read_text()
    assert again.count("<audio") == html.count("<audio")  # none on the short page of a model without a cause
    assert "Earlier calls have left 2 spies on layer 9." in again


def test_noise_is_not_played(quickly: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, recordings in (("random", 0), ("given", 3)):
        assert len(lab.diagnose(tiny(), tmp_path / name, model=name, quick=True).audio) == recordings
        assert len(list((tmp_path / name).glob("*.flac"))) == recordings


def test_ctrl_c_keeps_what_is_there_and_says_how_to_go_on(
    quickly: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(subject: Any) -> None:
        raise KeyboardInterrupt

    quickly.setattr(diagnose, "PARTS", {"machine": diagnose.machine, "found": stop})
    asked = ["diagnose", "--model", "tiny", "-o", str(tmp_path), "--device", "cpu"]
    assert main(asked) == 130
    said = capsys.readouterr().out
    assert re.search(r"report.unfinished.csv has \d+ rows; the same command with --resume goes on", said)
    with pytest.raises(SystemExit):
        main(asked)
    assert "holds an interrupted measurement: resume it" in capsys.readouterr().err
    with pytest.raises(KeyboardInterrupt):
        lab.diagnose(tiny(), tmp_path, model="tiny", resume=True)
    assert "diagnose(..., resume=True) goes on" in capsys.readouterr().out
    quickly.setattr(diagnose, "PARTS", {"machine": diagnose.machine, "found": diagnose.found})
    assert main([*asked, "--resume"]) == 0
    assert (tmp_path / "report.html").exists()


def test_an_application_gets_the_page_as_an_object(quickly: pytest.MonkeyPatch) -> None:
    found = lab.diagnose(tiny(), quick=True)
    assert isinstance(found, Report)
    assert headings(found._repr_html_()) == headings(found.html())
    assert set(found.audio) == {UPSTREAM, EXACT, FASTEST}
    assert len(found.table) == len(found.rows)
    assert found.title.startswith("Chatterbox (given) on ")
    assert [one.cause for one in found.findings]


def test_bad_arguments_are_named_before_anything_is_measured(
    quickly: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file"
    file.write_text("")
    for options, message in (
        (["--used", "-1"], "used=-1: must be a whole number, at least 0"),
        (["--seed", "-1"], "seed=-1: must be a whole number"),
        (["-o", str(file)], "must be a folder, is a file"),
        (["--device", "toaster"], "device='toaster': not available here"),
    ):
        with pytest.raises(SystemExit) as exit_:
            main(["diagnose", *options])
        assert exit_.value.code == 2
        assert message in capsys.readouterr().err
    with pytest.raises(TypeError, match="tts: must be a ChatterboxTTS"):
        lab.diagnose(None, tmp_path / "new")
    assert not (tmp_path / "new").exists()
