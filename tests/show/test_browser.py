"""The explorer in a real browser: JupyterLab in a subprocess, a headless Chromium, and the notebook's own cells."""

from __future__ import annotations

import base64
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
from playwright.sync_api import Locator, Page, expect, sync_playwright

from chatterbox_lab.engine.clock import Word
from chatterbox_lab.speech.subtitles import cues, vtt

REPOSITORY = Path(__file__).resolve().parents[2]
NOTEBOOK = REPOSITORY / "notebooks" / "03_chunk_sweep.ipynb"
TAGS = ("parameters", "setup", "explorer")
NEWEST = ".cbl-newest .cbl-player"
TOKEN = "only-for-this-test"
PATIENCE = 120_000  # milliseconds; what takes seconds alone takes longer on a machine shared with other work
CHROMIUM = ("--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage")

# Keeps what the page schedules on its audio clock, and can render that again, as fast as it goes.
LISTEN = """
window.scheduled = [];
const start = AudioBufferSourceNode.prototype.start;
AudioBufferSourceNode.prototype.start = function (when, offset) {
  if (this.context instanceof AudioContext) window.scheduled.push({ source: this, when, offset });
  return start.call(this, when, offset);
};
const close = AudioContext.prototype.close;
AudioContext.prototype.close = function () {
  this.closing = true;
  return close.call(this);
};
window.sounding = () => new Set(window.scheduled.map(({ source }) => source.context).filter((c) => !c.closing)).size;
window.chunks = () => window.scheduled.map(({ source, when, offset }) => (
  { at: when * source.context.sampleRate, offset, length: source.buffer.length, rate: source.buffer.sampleRate }));
window.loudestDifference = async () => {
  const wanted = window.scheduled.flatMap(({ source }) => [...source.buffer.getChannelData(0)]);
  const { source, when } = window.scheduled[0];
  const first = Math.round(when * source.context.sampleRate);
  const context = new OfflineAudioContext(1, first + wanted.length, source.context.sampleRate);
  for (const { source, when, offset } of window.scheduled) {
    const copy = new AudioBufferSourceNode(context, { buffer: source.buffer });
    copy.connect(context.destination);
    copy.start(when, offset);
  }
  const heard = (await context.startRendering()).getChannelData(0).subarray(first);
  return wanted.reduce((most, sample, index) => Math.max(most, Math.abs(sample - heard[index])), 0);
};
"""

# Beside the notebook's own cells: what the explorer's Generate plays. Chunks made before are there at once, and the
# first of them lasts for half a minute, so that nothing which is seen then depends on how fast the kernel speaks.
SOURCES = """
import ipywidgets, torch
from chatterbox_lab.engine.clock import StreamMetrics, Word
from chatterbox_lab.show import explorer as module

lengths = [720000, 24000, 12345, 960, 1, 7777]
noise = torch.rand(1, sum(lengths), generator=torch.Generator().manual_seed(0)) - 0.5
spoken = module.generate_stream

def made(*_, held=False, **__):
    for number, audio in enumerate(noise.split(lengths, dim=1)):
        if held and number == 2:  # the third chunk takes until Stop
            module.Explorer._newest().player._stopping.wait(600)
        yield audio, StreamMetrics(rtf=0.5, latency_to_first_chunk=0.1)

words = [(f"word{number}" + "." * (number % 10 == 9), 0.5 * number, 0.5 * number + 0.4) for number in range(80)]

def told(*_, **__):  # half of the words come with the first chunk, all before the last, and a limit cuts it
    metrics = StreamMetrics(rtf=0.5, latency_to_first_chunk=0.1)
    for number, audio in enumerate(noise.split(lengths, dim=1)):
        metrics.words += [Word(*word) for word in words[len(metrics.words) : 40 + 20 * number]]
        metrics.tokens += audio.shape[1] // 960
        if number == 4:  # another page opens this notebook: all is sent again
            module.Explorer._newest().player._receive(None, {"kind": "ready"}, [])
        yield audio, metrics
    metrics.ended = "limit"

sources = {"spoken": spoken, "made": made, "held": lambda *_, **__: made(held=True), "told": told}
choice, chosen = ipywidgets.ToggleButtons(options=list(sources)), ipywidgets.Label("from spoken")

def choose(change):
    module.generate_stream, chosen.value = sources[change.new], f"from {change.new}"

choice.observe(choose, "value")
ipywidgets.VBox([choice, chosen])
"""
LENGTHS = [720000, 24000, 12345, 960, 1, 7777]

CUES = """[...document.querySelector('track').track.cues].map(
  (cue) => [cue.startTime, cue.endTime, cue.getCueAsHTML().textContent])"""

# What the running text of the newest player shows, and the second that it shows it for, read at one moment.
TEXT = f"""() => {{
  const root = document.querySelector('{NEWEST}'), box = root.querySelector('.cbl-said');
  const [frame, spans] = [box.getBoundingClientRect(), [...box.children]];
  const now = spans.filter((span) => span.classList.contains('cbl-now')), said = (span) => span.textContent;
  return {{
    played: +root.dataset.played, words: spans.map(said), now: now.map(said),
    current: spans.filter((span) => span.ariaCurrent === 'true').map(said),
    past: spans.filter((span) => span.classList.contains('cbl-past')).length,
    visible: now.every((span) => {{
      const line = span.getBoundingClientRect();
      return frame.top <= line.top && line.bottom <= frame.bottom;
    }}),
    below: root.querySelector('.cbl-costs').getBoundingClientRect().top - root.getBoundingClientRect().top,
    page: document.scrollingElement.scrollTop,
  }};
}}"""

# A browser whose autoplay policy wants a click first; Playwright's own calls count as such for the real policy.
RELUCTANT = "AudioContext = class extends AudioContext { constructor(o) { super(o); this.suspend(); } };"


def notebook() -> nbformat.NotebookNode:
    """The explorer's part of notebook 03, and where its audio comes from."""
    whole = nbformat.read(NOTEBOOK, as_version=4)
    whole.cells = [cell for cell in whole.cells if set(TAGS) & set(cell.metadata.get("tags", []))]
    whole.metadata.pop("widgets", None)
    for cell in whole.cells:
        cell.outputs = []
    whole.cells.append(nbformat.v4.new_code_cell(SOURCES))
    return whole


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of the notebook in a JupyterLab of its own, which knows nothing of the user's settings."""
    home = tmp_path_factory.mktemp("jupyter")
    (home / "work").mkdir()
    nbformat.write(notebook(), home / "work" / "explorer.ipynb")
    settings = {
        "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
        "notebook-extension/tracker": {"windowingMode": "none"},  # cells below the window are there, too
    }
    for name, values in settings.items():
        file = home / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps(values))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    own = {name: str(home / name.lower()) for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR")}
    surroundings = {
        "HOME": str(home), "JUPYTERLAB_SETTINGS_DIR": str(home / "settings"), "PYTHONPATH": str(REPOSITORY),
        "OMP_NUM_THREADS": "1",  # threads that wait for a core which the browser has spin, and all becomes slow
    }  # fmt: skip
    command = [
        sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", f"--ServerApp.port={port}",
        "--ServerApp.port_retries=0", f"--ServerApp.root_dir={home / 'work'}", f"--IdentityProvider.token={TOKEN}",
    ]  # fmt: skip
    with (home / "log").open("w") as log:
        process = subprocess.Popen(
            command, env=os.environ | own | surroundings, stdout=log, stderr=log, cwd=home, start_new_session=True
        )
    try:
        wait_until_up(process, f"http://127.0.0.1:{port}/api/status?token={TOKEN}", home / "log")
        yield f"http://127.0.0.1:{port}/lab/tree/explorer.ipynb?token={TOKEN}"
    finally:
        os.killpg(process.pid, signal.SIGTERM)  # it takes its kernels along, which have process groups of their own
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def wait_until_up(process: subprocess.Popen[bytes], address: str, log: Path) -> None:
    end = time.monotonic() + PATIENCE / 1000
    while time.monotonic() < end and process.poll() is None:
        try:
            with urllib.request.urlopen(address, timeout=5):
                return
        except OSError:
            time.sleep(0.2)
    pytest.fail(f"JupyterLab did not come up:\n{log.read_text()[-2000:]}")


@pytest.fixture(scope="module")
def page(server: str) -> Iterator[Page]:
    """The notebook with all of its cells run."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        refuse = pytest.fail if os.environ.get("CI") == "true" else pytest.skip
        refuse("no Chromium on this machine: apt install chromium, or put google-chrome on the PATH")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=CHROMIUM)
        page = browser.new_page(viewport={"width": 1320, "height": 1400}, device_scale_factor=2)
        page.set_default_timeout(PATIENCE)
        expect.set_options(timeout=PATIENCE)
        page.add_init_script(LISTEN)
        page.goto(server)
        expect(page.get_by_role("button", name="Python 3 (ipykernel) | Idle")).to_be_visible()  # no kernel, no run
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.get_by_text("Run All Cells", exact=True).click()
        expect(page.locator(NEWEST)).to_be_visible()
        yield page
        browser.close()


def field(page: Page, name: str) -> Locator:
    return page.locator(f".cbl-field-{name}")


def enter(page: Page, **values: Any) -> None:
    """Types numbers into boxes and leaves them."""
    for name, value in values.items():
        box = field(page, name).locator("input[type=number]")
        box.fill(str(value))
        box.press("Tab")


def button(page: Page, name: str) -> Locator:
    return page.locator("button.jupyter-button", has_text=name).first


def seen(page: Page) -> dict[str, Any]:
    """What the newest player shows, read at one moment."""
    data = dict(page.locator(NEWEST).evaluate("element => ({...element.dataset})"))
    return data | {name: float(data[name]) for name in ("chunks", "underruns", "played", "chunksWhileStreaming")}


def wait_for(page: Page, condition: str) -> dict[str, Any]:
    """What the newest player shows once a condition on its data ``d`` holds."""
    page.wait_for_function(f"() => (d => {condition})(document.querySelector('{NEWEST}')?.dataset)")
    return seen(page)


def run(page: Page, source: str, **values: Any) -> None:
    """Clicks Generate for this source of audio, and waits until the new run's player is there.

    The kernel has every value before the click is sent: ipykernel 7.4 may handle a click before what was typed.
    """
    page.locator(".widget-toggle-button", has_text=source).click()
    expect(page.get_by_text(f"from {source}", exact=True)).to_be_visible()
    enter(page, **values)
    for name, value in values.items():  # which are steps of their sliders: the kernel moves them
        expect(field(page, name).locator(".noUi-handle")).to_have_attribute("aria-valuenow", f"{value:.1f}")
    page.locator(NEWEST).evaluate("element => { element.dataset.before = true; }")
    button(page, "Generate").click()
    page.wait_for_selector(f"{NEWEST}:not([data-before])[data-state]")


def scheduled(page: Page) -> tuple[list[int], list[float]]:
    """What the page has put on its audio clock: samples of each chunk, and the gaps between them in samples."""
    chunks = page.evaluate("window.chunks()")
    assert {(chunk["rate"], chunk["offset"]) for chunk in chunks} == {(24000, 0)}
    gaps = [after["at"] - chunk["at"] - chunk["length"] for chunk, after in itertools.pairwise(chunks)]
    return [chunk["length"] for chunk in chunks], gaps


def test_a_slider_moves_and_its_box_follows(page: Page) -> None:
    enter(page, chunk_size=25)
    handle = field(page, "chunk_size").locator(".noUi-handle")
    handle.focus()
    handle.press("ArrowRight")
    handle.press("ArrowRight")
    expect(field(page, "chunk_size").locator("input[type=number]")).to_have_value("27")


def test_a_bad_value_is_named_beside_its_field_until_it_is_corrected(page: Page) -> None:
    enter(page, seed=-1)
    message = field(page, "seed").get_by_role("alert")
    expect(message).to_contain_text("seed=-1: must be a whole number, at least 0")
    button(page, "Generate").click()
    expect(page.get_by_text("Nothing was started")).to_be_visible()
    enter(page, seed=0)
    expect(message).to_have_count(0)


def test_a_stream_is_heard_while_it_is_made_and_to_its_end(page: Page) -> None:
    page.evaluate("window.scheduled.length = 0")
    run(page, "spoken", chunk_size=10, context_window=20, max_new_tokens=50)
    data = wait_for(page, "d.state === 'done' && d.sounding === 'false'")
    assert (data["chunks"], data["chunksWhileStreaming"]) == (5, 5)
    assert data["played"] == 2
    lengths, gaps = scheduled(page)
    assert sum(lengths) == 50 * 960
    assert min(gaps) > -1e-6
    assert sum(gap > 1e-6 for gap in gaps) == data["underruns"]  # as many as this machine has just now


def test_chunks_join_at_the_very_sample(page: Page) -> None:
    page.evaluate("window.scheduled.length = 0")
    run(page, "made")
    data = wait_for(page, "d.state === 'done' && d.sounding === 'true'")
    lengths, gaps = scheduled(page)
    assert lengths == LENGTHS
    assert max(map(abs, gaps)) < 1e-6
    assert page.evaluate("window.loudestDifference()") == 0
    assert data["underruns"] == 0
    page.locator(f"{NEWEST} .cbl-stop").click()


def text_at(page: Page, second: float) -> dict[str, Any]:
    """What the running text shows once a click into the waveform has moved the sound there, and it was stopped."""
    wave = page.locator(f"{NEWEST} .cbl-wave").bounding_box()
    width, whole = wave["width"] - 46, sum(LENGTHS) / 24000
    place = {"x": 46 + width * second / whole, "y": 20}
    page.locator(f"{NEWEST} .cbl-wave").click(position=place)
    wait_for(page, f"d.sounding === 'true' && +d.played > {second}")
    page.locator(f"{NEWEST} .cbl-stop").click()
    wait_for(page, "d.sounding === 'false'")
    return page.evaluate(TEXT)


def right(text: dict[str, Any]) -> bool:
    """Whether the marked word is the one that sounds then: word n from half a second times n, for 0.4 s of it."""
    number = int(text["played"] / 0.5)
    sounds = text["played"] < 0.5 * number + 0.4  # summed as the words are: 1.4 - 1 is less than 0.4
    expected = [text["words"][number]] if sounds and text["played"] else []
    return text["now"] == text["current"] == expected and text["past"] == number + (not sounds) and text["visible"]


def test_the_word_that_sounds_is_marked_and_in_view(page: Page) -> None:
    run(page, "told")
    wait_for(page, "d.state === 'done' && +d.played > 0.6")
    seen_at = []
    for _ in range(40):
        text = page.evaluate(TEXT)
        assert right(text), text
        seen_at.append(text)
        page.wait_for_timeout(50)
    assert len({text["played"] for text in seen_at}) > 3
    assert seen_at[-1]["words"] == [f"word{number}" + "." * (number % 10 == 9) for number in range(80)]
    page.locator(f"{NEWEST} .cbl-stop").click()
    places = [text_at(page, second) for second in (25, 3, 14.45)]
    assert all(map(right, places)), places
    assert {text["below"] for text in [*seen_at, *places]} == {seen_at[0]["below"]}  # nothing jumps
    assert len({text["page"] for text in places}) == 1
    expect(page.locator(f"{NEWEST} .cbl-note")).to_have_text(
        f"cut at max_new_tokens after {sum(n // 960 for n in LENGTHS)} tokens"
    )


def test_a_click_on_a_word_is_heard_from_there(page: Page) -> None:
    run(page, "told")
    wait_for(page, "d.state === 'done'")
    page.evaluate("window.scheduled.length = 0")
    page.locator(f"{NEWEST} .cbl-said span", has_text="word41").click()
    page.wait_for_function("window.scheduled.length > 0")
    assert page.evaluate("window.chunks()[0].offset") == 20.5
    page.locator(f"{NEWEST} .cbl-stop").click()


def test_without_words_and_where_there_is_little_room_no_text_is_shown(page: Page) -> None:
    run(page, "told")
    wait_for(page, "d.state === 'done'")
    expect(page.locator(f"{NEWEST} .cbl-said")).to_be_visible()
    run(page, "made")
    wait_for(page, "d.state === 'done'")
    expect(page.locator(f"{NEWEST} .cbl-said")).to_be_hidden()
    expect(page.locator(f"{NEWEST} .cbl-note")).to_be_hidden()
    expect(page.locator(".cbl-compact .cbl-said").first).to_be_hidden()
    page.locator(f"{NEWEST} .cbl-stop").click()


@pytest.mark.parametrize("stop", [".jupyter-button:has-text('Stop')", f"{NEWEST} .cbl-stop"])
def test_stop_ends_sound_and_generation_and_leaves_everything_usable(page: Page, stop: str) -> None:
    run(page, "held")
    data = wait_for(page, "d.state === 'streaming' && d.chunks === '2' && +d.played > 0")
    assert data["chunksWhileStreaming"] == 2
    wait_for(page, f"+d.played > {data['played']}")
    page.locator(stop).click()
    page.wait_for_function("window.sounding() === 0")
    stopped = wait_for(page, "d.state === 'stopped' && d.sounding === 'false'")
    time.sleep(1)
    assert seen(page) == stopped
    assert stopped["chunks"] == 2  # the one that was under way is dropped
    assert stopped["played"] < 31  # in the midst of what it had
    run(page, "spoken", chunk_size=25, context_window=25, max_new_tokens=50)
    assert wait_for(page, "d.state === 'done'")["chunks"] == 2


def test_only_one_player_sounds(page: Page) -> None:
    for _ in range(2):  # the newest, and one that was kept
        run(page, "made")
        wait_for(page, "d.state === 'done'")
    for first, second in ((NEWEST, ".cbl-compact"), (".cbl-compact", NEWEST)):
        clicks = [f"document.querySelector('{player} .cbl-play').click();" for player in (first, second)]
        assert page.evaluate(f"() => {{ {' '.join(clicks)} return window.sounding(); }}") == 1
        expect(page.locator(second).first).to_have_attribute("data-sounding", "true")
    page.locator(f"{NEWEST} .cbl-stop").click()
    assert page.evaluate("window.sounding()") == 0


def test_a_reloaded_page_gets_its_chunks_again_and_keeps_silent(page: Page) -> None:
    run(page, "spoken", chunk_size=25, context_window=25, max_new_tokens=50)
    before = wait_for(page, "d.state === 'done' && d.sounding === 'false'")
    save(page)
    page.reload()
    after = wait_for(page, "d && +d.chunks === 2")
    assert (after["state"], after["sounding"]) == ("done", "false")
    assert after["played"] == before["played"] == 2
    click = f"document.querySelector('{NEWEST} .cbl-play').click()"
    assert page.evaluate(
        f"() => {{ const before = window.sounding(); {click}; return [before, window.sounding()]; }}"
    ) == [0, 1]
    wait_for(page, "d.sounding === 'false' && d.played === '2.00'")


def test_a_browser_that_keeps_silent_asks_for_a_click(page: Page, server: str) -> None:
    run(page, "spoken", chunk_size=25, context_window=25, max_new_tokens=50)
    wait_for(page, "d.state === 'done'")
    save(page)
    other = page.context.browser.new_page()
    other.set_default_timeout(PATIENCE)
    other.add_init_script(RELUCTANT)
    other.goto(server)
    wait_for(other, "d && +d.chunks === 2")
    play = other.locator(f"{NEWEST} .cbl-play")
    play.click()
    expect(play).to_have_text("Click to hear")
    assert seen(other)["played"] == 0
    play.click()
    assert wait_for(other, "+d.played > 0.2")["underruns"] == seen(page)["underruns"]
    expect(play).to_have_text("Replay")
    other.close()


def test_a_browser_reads_subtitles_as_they_were_written(page: Page) -> None:
    said = (
        'He said <b>: "AT&T --> is > 5 & it\'s fine." NOTE this. 12 men came late in the evening, when nobody was up.'
    )
    words = [Word(word, 0.4 * number, 0.4 * number + 0.35) for number, word in enumerate(said.split())]
    expected = [
        [cue.start / 1000, cue.end / 1000, "\n".join(" ".join(word.word for word in line) for line in cue.lines)]
        for cue in cues(words)
    ]
    other = page.context.browser.new_page()
    for each_word in (False, True):
        text = base64.b64encode(vtt(words, each_word=each_word).encode()).decode()
        other.set_content(f'<video><track default src="data:text/vtt;base64,{text}"></video>')
        other.wait_for_function("document.querySelector('track').readyState === 2", timeout=PATIENCE)
        assert other.evaluate(CUES) == expected
    other.close()


def save(page: Page) -> None:
    with page.expect_response(lambda answer: answer.request.method == "PUT" and "/api/contents/" in answer.url):
        page.keyboard.press("Control+s")  # a page that is not marked as changed yet would look saved
    expect(page.locator(".jp-mod-dirty")).to_have_count(0)


def test_picture(page: Page) -> None:
    """Only with a path in CHATTERBOX_LAB_SCREENSHOT: a run and one that was kept, for documentation."""
    path = os.environ.get("CHATTERBOX_LAB_SCREENSHOT")
    if not path:
        pytest.skip("CHATTERBOX_LAB_SCREENSHOT names no file")
    kept = page.locator(".cbl-compact")
    for chunk_size in 2 * (50, 10, 25):  # the first time warms up
        run(page, "spoken", chunk_size=chunk_size, context_window=2 * chunk_size, max_new_tokens=200)
        wait_for(page, "d.state === 'done' && d.sounding === 'false'")
    while kept.count() > 2:
        count = kept.count()
        page.get_by_role("button", name="Remove").last.click()
        expect(kept).to_have_count(count - 1)
    page.set_viewport_size({"width": 1320, "height": 1800})  # all of it at once
    page.add_style_tag(content=".jp-OutputArea-output:has(.cbl-newest) { padding: 12px; }")
    shown = page.locator(".jp-OutputArea-output:has(.cbl-newest)")
    shown.evaluate("element => element.scrollIntoView({ block: 'center' })")
    box = shown.bounding_box()
    inside = {
        "x": box["x"],
        "width": box["width"],
        "y": box["y"] + 2,
        "height": box["height"] - 4,
    }  # no line of the page
    page.screenshot(path=path, clip=inside)
