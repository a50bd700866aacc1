// Sounds chunks on the audio clock, each at the very sample where the one before ends, and draws what it sounds.
// One engine per model holds chunks and sound; any number of views show it.

const LEAD = 0.05; // seconds between the decision to sound and the sound
const LATE = 0.01; // a chunk that comes within this of its moment may miss it: the audio thread works ahead in blocks
const BLOCK = 120; // samples in a column of the stored waveform, 5 ms at 24 kHz
const SOUNDING = "chatterbox-lab-sounding";

class Engine extends EventTarget {
  constructor(model) {
    super();
    this.model = model;
    this.rate = model.get("sample_rate");
    this.context = null; // there while sounding, or while streaming on; a closed one cannot sound by mistake
    this.views = 0;
    this.begin(model.get("run"));
    this.position = model.get("played") * this.rate;
    this.underruns = model.get("underruns");
    this.quiet = (event) => event.detail !== this && this.silence();
    window.addEventListener(SOUNDING, this.quiet);
    model.on("change:run", () => this.begin(model.get("run")));
    model.on("change:state change:metrics change:message change:title change:compact", () => this.changed());
    model.on("msg:custom", (message, buffers) => {
      if (message.kind === "chunk") this.add(message, buffers[0]);
      if (message.kind === "words") this.hear(message);
      if (message.kind === "silence") this.silence();
    });
    model.send({ kind: "ready" });
  }

  begin(run) {
    if (run === this.run) return;
    this.release();
    Object.assign(this, { run, chunks: [], words: [], total: 0, position: 0, underruns: 0, whileStreaming: 0 });
    this.changed();
  }

  get streaming() { return this.model.get("state") === "streaming"; }
  get now() { return Math.round(this.context.currentTime * this.rate); }
  get sounding() { return this.context !== null && this.heard < this.total; }
  get buffered() { return this.context ? (this.total - this.heard) / this.rate : 0; }
  get blocked() { return this.context?.state === "suspended" && performance.now() - this.since > 400; }

  get heard() { // the sample that the audio clock is at; `from` sounds at frame `at` of the clock
    if (!this.context) return Math.min(this.position, this.total);
    return Math.min(Math.max(this.from + this.now - this.at, this.from), this.total);
  }

  add(message, bytes) {
    this.begin(Math.max(message.run, this.run));
    if (message.run < this.run || message.index < this.chunks.length) return; // had it
    if (message.index > this.chunks.length) return this.model.send({ kind: "ready" }); // lost one: all again
    const samples = new Float32Array(bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.byteLength));
    const buffer = new AudioBuffer({ length: samples.length, sampleRate: this.rate });
    buffer.copyToChannel(samples, 0);
    const chunk = { ...message, ...overview(samples), buffer, start: this.total, end: this.total + samples.length };
    this.chunks.push(chunk);
    this.total = chunk.end;
    this.whileStreaming += this.streaming;
    if (message.index === 0 && message.play) this.play(0);
    else if (this.context) this.follow(chunk);
    this.changed();
  }

  hear(message) {
    this.begin(Math.max(message.run, this.run));
    if (message.run < this.run) return;
    if (message.index > this.words.length) return this.model.send({ kind: "ready" }); // lost some: all again
    this.words.push(...message.words.slice(this.words.length - message.index));
    this.changed();
  }

  play(from) {
    this.silence();
    window.dispatchEvent(new CustomEvent(SOUNDING, { detail: this }));
    this.context = new AudioContext({ sampleRate: this.rate });
    this.context.onstatechange = () => this.changed();
    this.since = performance.now();
    this.anchor(from);
    this.chunks.filter((chunk) => chunk.end > from).forEach((chunk) => this.schedule(chunk));
    this.timer = setInterval(() => this.tick(), 200);
    this.changed();
  }

  anchor(from) {
    this.from = from;
    this.at = this.now + Math.round(LEAD * this.rate);
  }

  follow(chunk) {
    const due = this.at + chunk.start - this.from;
    if (due < this.now + LATE * this.rate) {
      this.underruns += 1;
      this.anchor(chunk.start);
    }
    this.schedule(chunk);
  }

  schedule(chunk) {
    const skipped = Math.max(0, this.from - chunk.start);
    const source = new AudioBufferSourceNode(this.context, { buffer: chunk.buffer });
    source.connect(this.context.destination);
    source.start((this.at + chunk.start + skipped - this.from) / this.rate, skipped / this.rate);
  }

  tick() {
    const over = this.context.currentTime - (this.at + this.total - this.from) / this.rate;
    if (!this.streaming && over > 0.1 + (this.context.outputLatency || 0)) this.silence();
    else this.report();
  }

  silence() {
    if (!this.context) return;
    this.position = this.heard;
    this.release();
    this.report();
  }

  release() {
    if (!this.context) return;
    clearInterval(this.timer);
    this.context.onstatechange = null;
    this.context.close();
    this.context = null;
  }

  resume() { this.context?.resume(); }

  stop() {
    this.silence();
    if (this.streaming) this.model.send({ kind: "stop" });
  }

  report() {
    const state = {
      played: round(this.heard / this.rate), buffered: round(this.buffered),
      underruns: this.underruns, sounding: this.sounding,
    };
    const news = Object.keys(state).filter((name) => state[name] !== this.model.get(name));
    news.forEach((name) => this.model.set(name, state[name]));
    if (news.length) this.model.save_changes();
    this.changed();
  }

  changed() { this.dispatchEvent(new Event("change")); }

  show() { this.views += 1; }

  hide() { // moving a view closes it and opens another; without any there would be no button to stop with
    this.views -= 1;
    setTimeout(() => this.views || this.silence(), 1000);
  }

  close() {
    this.silence();
    window.removeEventListener(SOUNDING, this.quiet);
  }
}

const round = (seconds) => Math.round(100 * seconds) / 100;
const spoken = (seconds) => (seconds == null ? "–" : `${seconds.toFixed(2)} s`);

function overview(samples) { // of each block its least and its greatest sample, and the loudest of all
  const peaks = [];
  for (let start = 0; start < samples.length; start += BLOCK) {
    const block = samples.subarray(start, start + BLOCK);
    peaks.push([Math.min(...block), Math.max(...block)]);
  }
  return { peaks, loudest: peaks.reduce((most, [low, high]) => Math.max(most, -low, high), 0) };
}

class View {
  constructor(engine, root) {
    this.engine = engine;
    this.root = root;
    root.classList.add("cbl-player");
    root.innerHTML = `
      <div class="cbl-head"><span class="cbl-title"></span><span class="cbl-words" role="status"></span>
        <span class="cbl-note" role="status"></span></div>
      <canvas class="cbl-wave" role="slider" tabindex="0" aria-label="Waveform with seams; click to hear from there"
        title="Amplitude (1 is full scale) and the seams; click to hear from there, arrow keys move by a second"
        ></canvas>
      <div class="cbl-said" hidden dir="auto" tabindex="0" role="group" title="Click a word to hear from there"
        aria-label="What is said; the word that sounds is the current one"></div>
      <canvas class="cbl-costs" role="img" aria-label="Seconds that each chunk took"></canvas>
      <div class="cbl-facts">
        <span class="cbl-gauge" title="Audio that is made and not heard yet; the bar is full at 3 s"><span>Buffer</span>
          <i><i></i></i><b class="cbl-buffer"></b></span>
        <span>Underruns <b class="cbl-underruns"></b></span>
        <span>First chunk <b class="cbl-first"></b></span>
        <span title="Seconds of work for a second of audio; below 1 is faster than real time">RTF
          <b class="cbl-rtf"></b></span>
        <span>Heard <b class="cbl-heard"></b></span>
      </div>
      <div class="cbl-foot"><button class="cbl-play"></button>
        <button class="cbl-stop" aria-label="Stop generating and playing">Stop</button>
        <span class="cbl-legend">work for each chunk: <span style="--cbl-key: var(--cbl-t3)">T3</span>
          <span style="--cbl-key: var(--cbl-s3gen)">S3Gen</span>
          <span style="--cbl-key: var(--cbl-watermark)">watermark</span>
          <span class="cbl-real">real time</span></span></div>`;
    this.part = (name) => root.querySelector(`.cbl-${name}`);
    this.text = new Said(engine, this.part("said"), (sample) => this.seek(sample));
    this.part("play").onclick = () => (engine.blocked ? engine.resume() : engine.play(0));
    this.part("stop").onclick = () => engine.stop();
    this.part("wave").onclick = (event) => this.seek(this.sampleAt(event.offsetX));
    this.part("wave").onkeydown = (event) => this.key(event);
    this.draw = () => (this.frame ||= requestAnimationFrame(() => this.paint()));
    engine.addEventListener("change", this.draw);
    this.sizes = new ResizeObserver(this.draw);
    this.sizes.observe(root);
    this.theme = new MutationObserver(this.draw); // JupyterLab and VS Code mark the theme on the body
    this.theme.observe(document.body, { attributes: true });
    engine.show();
    this.draw();
  }

  close() {
    this.engine.removeEventListener("change", this.draw);
    this.sizes.disconnect();
    this.theme.disconnect();
    cancelAnimationFrame(this.frame);
    clearTimeout(this.again);
    this.engine.hide();
  }

  sampleAt(x) { return Math.round((x - AXIS) / (this.part("wave").clientWidth - AXIS) * this.engine.total); }

  seek(sample) {
    if (this.engine.total) this.engine.play(Math.min(Math.max(sample, 0), this.engine.total - 1));
  }

  key(event) {
    const steps = { ArrowLeft: -1, ArrowRight: 1 };
    if (!(event.key in steps)) return;
    event.preventDefault();
    this.seek(this.engine.heard + steps[event.key] * this.engine.rate);
  }

  paint() {
    this.frame = 0;
    this.words();
    waveform(this.engine, new Paper(this.part("wave")));
    if (!this.engine.model.get("compact")) costs(this.engine, new Paper(this.part("costs")));
    clearTimeout(this.again); // 20 times a second: drawing must not take the time of what it shows
    if (this.engine.sounding) this.again = setTimeout(this.draw, 50);
  }

  words() {
    const { engine, root } = this;
    const { rtf, first_chunk, note } = engine.model.get("metrics");
    const seconds = engine.total / engine.rate;
    const heard = (engine.heard / engine.rate).toFixed(2);
    const text = (name, value) => { // written only if new: a screen reader speaks what is written
      if (this.part(name).textContent !== String(value)) this.part(name).textContent = value;
    };
    root.classList.toggle("cbl-compact", engine.model.get("compact"));
    text("title", engine.model.get("title"));
    text("words", stateInWords(engine));
    text("note", note ?? "");
    this.text.paint(+heard);
    text("buffer", spoken(engine.buffered));
    text("underruns", engine.underruns);
    text("first", spoken(first_chunk));
    text("rtf", rtf == null ? "–" : rtf.toFixed(2));
    text("heard", `${(+heard).toFixed(1)} of ${seconds.toFixed(1)} s`);
    this.part("gauge").querySelector("i > i").style.width = `${Math.min(100, engine.buffered / 3 * 100)}%`;
    const play = engine.blocked ? "Click to hear" : engine.heard ? "Replay" : "Play";
    text("play", play);
    this.part("play").setAttribute("aria-label", `${play}: from the beginning`);
    this.part("play").classList.toggle("cbl-blocked", engine.blocked);
    this.part("play").disabled = !engine.total;
    this.part("stop").disabled = !engine.streaming && !engine.context;
    const aria = { valuemin: 0, valuemax: seconds.toFixed(2), valuenow: heard, valuetext: `${heard} seconds` };
    for (const [name, value] of Object.entries(aria)) this.part("wave").setAttribute(`aria-${name}`, value);
    Object.assign(root.dataset, {
      state: engine.model.get("state"), run: engine.run, chunks: engine.chunks.length,
      chunksWhileStreaming: engine.whileStreaming, underruns: engine.underruns, played: heard,
      buffered: engine.buffered.toFixed(2), sounding: engine.sounding,
    });
  }
}

class Said { // the words of a run as running text, and the one that sounds
  constructor(engine, box, seek) {
    Object.assign(this, { engine, box });
    box.onclick = (event) => {
      const word = engine.words[[...box.children].indexOf(event.target)];
      if (word && word[1] * engine.rate < engine.total) seek(Math.ceil(word[1] * engine.rate));
    };
  }

  paint(heard) {
    const { engine, box } = this;
    if (this.run !== engine.run) box.replaceChildren();
    this.run = engine.run;
    for (const [word] of engine.words.slice(box.children.length)) {
      const span = document.createElement("span");
      span.textContent = word;
      box.append(span, " ");
    }
    if (engine.words.length) box.hidden = false;
    else if (!engine.streaming) box.hidden = true; // not between two runs with words: what is below would jump
    const begun = heard ? engine.words.findLastIndex(([, start]) => start <= heard) : -1;
    const current = begun >= 0 && heard < engine.words[begun][2] ? begun : -1;
    const news = [begun, current, box.children.length, engine.run].join();
    if (this.shown !== news) this.mark(begun, current);
    this.shown = news;
  }

  mark(begun, current) {
    [...this.box.children].forEach((span, index) => {
      span.className = index === current ? "cbl-now" : index <= begun ? "cbl-past" : "";
      if (index === current) span.setAttribute("aria-current", "true");
      else span.removeAttribute("aria-current");
    });
    if (current >= 0) this.scroll(this.box.children[current]);
  }

  scroll(span) { // within the box alone: scrollIntoView would move the notebook, too
    const { box } = this;
    const [above, below] = [span.offsetTop, span.offsetTop + span.offsetHeight - box.clientHeight];
    if (box.scrollTop > above || box.scrollTop < below) box.scrollTop = (above + below) / 2;
  }
}

function stateInWords(engine) {
  const state = engine.model.get("state");
  const message = engine.model.get("message");
  const sound = !engine.context ? "" : engine.blocked ? ", the browser waits for a click" : ", playing";
  if (state === "failed") return `Failed: ${message}`;
  if (state === "streaming" && message) return `Generating, ${message}`;
  if (state === "streaming" && !engine.total) return "Generating the first chunk";
  if (state === "streaming" && engine.context && !engine.sounding) return "Generating, waiting for the next chunk";
  if (state === "streaming") return `Generating${sound || ", silent"}`;
  if (state === "idle") return "Nothing generated yet";
  return (state === "done" ? "Generated" : "Stopped") + (engine.sounding ? sound : "");
}

const AXIS = 46; // pixels for the scale on the left of both drawings

class Paper { // a canvas in CSS pixels, sharp on every screen, in the colours of the theme
  constructor(canvas) {
    const [width, height] = [canvas.clientWidth, canvas.clientHeight];
    const dots = window.devicePixelRatio || 1;
    canvas.width = Math.round(width * dots); // also clears it
    canvas.height = Math.round(height * dots);
    const style = getComputedStyle(canvas);
    const pen = canvas.getContext("2d");
    pen.scale(dots, dots);
    pen.font = `11px ${style.fontFamily}`;
    const color = (name) => style.getPropertyValue(`--cbl-${name}`).trim();
    Object.assign(this, { width, height, pen, ink: style.color, color });
  }

  box(color, x, y, width, height, alpha = 1) {
    this.pen.globalAlpha = alpha;
    this.pen.fillStyle = color;
    this.pen.fillRect(x, y, width, height);
  }

  text(words, x, y, align = "left", alpha = 0.75) {
    Object.assign(this.pen, { globalAlpha: alpha, fillStyle: this.ink, textAlign: align, textBaseline: "middle" });
    this.pen.fillText(words, x, y);
  }

  x(engine, sample) { return AXIS + (this.width - AXIS) * sample / Math.max(engine.total, 1); }
}

function waveform(engine, paper) {
  const middle = paper.height / 2;
  const heard = paper.x(engine, engine.heard);
  const loudest = Math.max(0.01, ...engine.chunks.map((chunk) => chunk.loudest));
  const bar = ([x, low, high], width) => {
    const [top, bottom] = [high, low].map((value) => middle - value / loudest * (middle - 2));
    const [color, alpha] = x < heard ? [paper.color("t3"), 1] : [paper.ink, 0.45];
    paper.box(color, x, top, width, Math.max(1, bottom - top), alpha);
  };
  paper.box(paper.ink, AXIS, middle, paper.width - AXIS, 1, 0.25);
  for (const { peaks, start, end } of engine.chunks) {
    const found = columns(peaks, (index) => Math.floor(paper.x(engine, start + index * BLOCK)));
    found.forEach((column, index) => bar(column, (found[index + 1]?.[0] ?? paper.x(engine, end)) - column[0]));
    if (start) paper.box(paper.ink, Math.round(paper.x(engine, start)), 0, 1, paper.height, 0.7); // the seam
  }
  if (!engine.total) return;
  paper.text(loudest.toFixed(2), AXIS - 6, 7, "right");
  paper.text(`\u2212${loudest.toFixed(2)}`, AXIS - 6, paper.height - 7, "right");
  paper.box(paper.ink, heard - 1, 0, 2, paper.height);
}

function columns(peaks, place) { // the peaks that fall on one pixel, as one
  const found = [];
  peaks.forEach(([low, high], index) => {
    const x = place(index);
    const last = found.at(-1);
    if (last?.[0] !== x) found.push([x, low, high]);
    else [last[1], last[2]] = [Math.min(last[1], low), Math.max(last[2], high)];
  });
  return found;
}

function costs(engine, paper) {
  const bottom = paper.height - 18;
  const spent = (chunk) => chunk.t3_seconds + chunk.s3gen_seconds + chunk.watermark_seconds;
  const length = (chunk) => chunk.samples / engine.rate;
  const longest = Math.max(0.01, ...engine.chunks.map(length));
  const most = 1.15 * Math.max(longest, Math.min(3 * longest, Math.max(0, ...engine.chunks.map(spent))));
  const y = (seconds) => bottom - Math.min(seconds / most, 1) * (bottom - 8);
  for (const chunk of engine.chunks) {
    const [left, right] = [paper.x(engine, chunk.start) + 1, paper.x(engine, chunk.end) - 1];
    let below = 0;
    for (const part of ["t3", "s3gen", "watermark"]) {
      const above = below + chunk[`${part}_seconds`];
      paper.box(paper.color(part), left, y(above), Math.max(1, right - left), y(below) - y(above));
      below = above;
    }
    for (let x = left; x < right; x += 7) paper.box(paper.ink, x, y(length(chunk)) - 1, Math.min(4, right - x), 2);
    if (spent(chunk) > most) paper.text(`\u2191 ${spent(chunk).toFixed(1)} s`, right + 4, 6);
  }
  paper.box(paper.ink, AXIS, bottom, paper.width - AXIS, 1, 0.6);
  if (!engine.total) return paper.text("seconds of work, chunk by chunk", AXIS, bottom + 10);
  const rough = nice(most / 2.5);
  for (let tick = 0; tick <= most; tick += rough) paper.text(`${+tick.toFixed(2)} s`, AXIS - 6, y(tick), "right");
  const apart = nice(engine.total / engine.rate / (paper.width / 80));
  for (let tick = apart; tick < engine.total / engine.rate; tick += apart) {
    const x = paper.x(engine, tick * engine.rate);
    paper.box(paper.ink, x, bottom, 1, 4, 0.6);
    if (x < paper.width - 20) paper.text(`${+tick.toFixed(2)} s`, x, bottom + 11, "center");
  }
  paper.text("audio", AXIS, bottom + 11);
}

function nice(step) { // the next of 1, 2 and 5 times a power of ten
  const power = 10 ** Math.floor(Math.log10(step));
  return power * [1, 2, 5, 10].find((factor) => factor * power >= step);
}

export default () => {
  let engine;
  return {
    initialize({ model }) {
      engine = new Engine(model);
      return () => engine.close();
    },
    render({ el }) {
      const root = document.createElement("div");
      el.append(root);
      const view = new View(engine, root);
      return () => view.close();
    },
  };
};
