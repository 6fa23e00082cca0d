/* The lanes: looks at the engine a few times a second and draws what each lane did in the last 30 s. Looks at nothing while
   the page is hidden. */

import { ask } from "./api.js";
import { byId, make, write } from "./dom.js";

const PERIOD_MS = 200;
const AWAY_MS = 1000;
const LOOKS = 150;
const [IDLE, DECODE] = [0, 2]; // Between them: a prefill, and how much of it is left to do, 1 … 2.

const rows = [];
let last = null;
let figures = null;

/** Starts to look where `place()` says; each look is told to `onLook(now, error)`. Returns how to look at once, and to forget. */
export function startLanes(place, onLook) {
  figures = Object.fromEntries([
    ["speed", "Output", "tok/s", "Tokens generated"], ["prompt", "Prompts", "tok/s", "Prompt tokens computed"],
    ["ttft", "TTFT", "ms", "Time to the first token"], ["itl", "ITL", "ms", "Time between tokens of a stream"],
    ["queue", "Queue", "", "Requests that wait for a lane"],
  ].map(([name, ...told]) => [name, figure(...told)]));
  let timer = 0;
  async function look() {
    clearTimeout(timer);
    const began = performance.now();
    let period = PERIOD_MS;
    try {
      const now = { ...(await (await ask(place())).json()), at_s: began / 1000 };
      show(now);
      onLook(now, null);
    } catch (error) {
      [last, period] = [null, AWAY_MS];
      if (error.status === 503) rows.forEach((one) => showLane(one, undefined));
      onLook(null, error);
    }
    clearTimeout(timer);
    if (!document.hidden) timer = setTimeout(look, Math.max(PERIOD_MS / 2, period - (performance.now() - began)));
  }
  document.addEventListener("visibilitychange", () => !document.hidden && look());
  look();
  return { look, forget };
}

/** For another engine, whose past is not this one's. */
function forget() {
  while (rows.length) rows.pop().element.remove();
  last = null;
  for (const one of Object.values(figures)) {
    [one.past, one.rates] = [[], []];
    write(one.value, "–");
    sized(one.canvas);
  }
  byId("pages-bar").replaceChildren();
  write(byId("pages-text"), "");
}

function figure(title, unit, meaning) {
  const value = make("b", {}, "–");
  const canvas = make("canvas", { "aria-hidden": "true" });
  byId("figures").append(make("div", { class: "figure", title: meaning }, make("span", {}, title), make("p", {}, value, ` ${unit}`), canvas));
  return { value, canvas, past: [] };
}

function show(now) {
  while (rows.length < now.lanes_total) rows.push(row(rows.length));
  while (rows.length > now.lanes_total) rows.pop().element.remove();
  const taken = new Map(now.lanes.map((lane) => [lane.lane, lane]));
  rows.forEach((one, number) => showLane(one, taken.get(number)));
  showPages(now);
  showFigures(now, last ?? now);
  last = now;
}

function row(number) {
  const [canvas, does, prompt, output, pages] = [make("canvas", { "aria-hidden": "true" }), ...[0, 1, 2, 3].map(() => make("td"))];
  for (const cell of [prompt, output, pages]) cell.className = "n";
  const element = make("tr", {}, make("th", { scope: "row" }, String(number)), make("td", { class: "strip" }, canvas), does, prompt, output, pages);
  byId("rows").append(element);
  return { element, canvas, does, prompt, output, pages, past: [], age: Infinity };
}

function showLane(one, lane) {
  const all = lane ? lane.prompt_tokens + lane.generated_tokens : 1;
  const left = lane ? 1 - Math.min(1, lane.computed_tokens / all) : 0;
  const fresh = lane !== undefined && lane.age_s < one.age;
  one.past.push({ level: !lane ? IDLE : lane.prefill ? 1 + left * 0.9 : DECODE, prefill: lane?.prefill, fresh });
  if (one.past.length > LOOKS) one.past.shift();
  one.age = lane ? lane.age_s : Infinity;
  one.element.className = !lane ? "idle" : lane.prefill ? "prefill" : "decode";
  write(one.does, !lane ? "free" : lane.prefill ? `prefill ${Math.round(100 * (1 - left))} %` : "decode");
  write(one.prompt, lane ? count(lane.prompt_tokens) : "");
  write(one.output, lane ? count(lane.generated_tokens) : "");
  write(one.pages, lane ? count(lane.pages) : "");
  strip(one);
}

/** A lane's last looks, newest on the right. Decode fills the row; a prefill grows as it is done. */
function strip({ canvas, past }) {
  const { context, width, height, scale } = sized(canvas);
  const step = width / LOOKS;
  past.forEach(({ level, prefill, fresh }, index) => {
    if (level === IDLE) return;
    // Whole pixels of the screen, or there would be seams between the looks.
    const [x, next] = [past.length - index, past.length - index - 1].map((ago) => Math.round((width - ago * step) * scale) / scale);
    const tall = prefill ? height * Math.max(0.25, 2 - level) : height;
    context.fillStyle = color(prefill ? "--prefill" : "--decode");
    context.fillRect(x + (fresh ? 1 : 0), height - tall, next - x - (fresh ? 1 : 0), tall);
  });
}

function showPages(now) {
  const held = now.pages_total - now.pages_free;
  const parts = [["held", held], ["remembered", now.pages_remembered], ["free", now.pages_free - now.pages_remembered]];
  const bar = byId("pages-bar");
  if (!bar.children.length) bar.append(...parts.map(([name]) => make("i", { class: name })));
  parts.forEach(([, pages], index) => (bar.children[index].style.flexGrow = String(Math.max(0, pages))));
  const text = `${count(held)} pages used, ${count(now.pages_remembered)} remembered, of ${count(now.pages_total)} · ${now.page_tokens} tokens each`;
  write(byId("pages-text"), text);
  bar.setAttribute("aria-label", text);
}

function showFigures(now, before) {
  const seconds = now.at_s - before.at_s;
  const rate = (name) => (seconds > 0 ? (now[name] - before[name]) / seconds : 0);
  const mean_ms = (name) => {
    const more = now[name].count - before[name].count;
    return more > 0 ? (1000 * (now[name].sum_s - before[name].sum_s)) / more : null;
  };
  put(figures.speed, smooth(figures.speed, rate("decode_tokens")), 0);
  put(figures.prompt, smooth(figures.prompt, rate("prefill_tokens")), 0);
  put(figures.ttft, mean_ms("ttft"), 0);
  put(figures.itl, mean_ms("itl"), 1);
  put(figures.queue, now.queued, 0);
}

/** The mean over the last second, for a look is shorter than some steps. */
function smooth(one, rate) {
  one.rates = [...(one.rates ?? []), rate].slice(-5);
  return one.rates.reduce((sum, each) => sum + each, 0) / one.rates.length;
}

function put(one, value, digits) {
  const shown = value ?? one.past.at(-1) ?? null;
  one.past.push(shown);
  if (one.past.length > LOOKS) one.past.shift();
  write(one.value, shown === null ? "–" : shown.toLocaleString("en", { maximumFractionDigits: digits, minimumFractionDigits: digits }));
  spark(one);
}

function spark({ canvas, past }) {
  const { context, width, height } = sized(canvas);
  const known = past.filter((value) => value !== null);
  if (known.length < 2) return;
  const most = Math.max(...known, 1e-9);
  const at = (value, index) => [width - (past.length - 1 - index) * (width / (LOOKS - 1)), height - 1 - (height - 3) * (value / most)];
  const line = past.map((value, index) => (value === null ? null : at(value, index))).filter(Boolean);
  context.strokeStyle = color("--accent");
  context.lineWidth = 1.5;
  context.beginPath();
  for (const [x, y] of line) context.lineTo(x, y);
  context.stroke();
  context.lineTo(line.at(-1)[0], height);
  context.lineTo(line[0][0], height);
  context.globalAlpha = 0.14;
  context.fillStyle = color("--accent");
  context.fill();
}

/** A canvas cleared and as sharp as the screen; sizes in CSS pixels. */
function sized(canvas) {
  const [width, height, scale] = [canvas.clientWidth, canvas.clientHeight, devicePixelRatio];
  canvas.width = width * scale;
  canvas.height = height * scale;
  const context = canvas.getContext("2d");
  context.scale(scale, scale);
  return { context, width, height, scale };
}

const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(name);
const count = (number) => number.toLocaleString("en");
