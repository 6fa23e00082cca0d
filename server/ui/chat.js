/* The conversation: what was said, one answer at a time as it comes, stopping it, calls of tools and their results. */

import { ask, events, message } from "./api.js";
import { button, byId, make, write } from "./dom.js";
import { chosen, startOptions, systemPrompt } from "./options.js";
import { rendered } from "./text.js";
import { addTokens, tokenBox } from "./tokens.js";

const STARTERS = ["Why is the sky blue?", "Write a haiku about trains.", "Explain continuous batching to a child."];

let said = [];
let running = null;
let served = null;
let onError = null;

export function startChat(serving, refused) {
  [served, onError] = [serving, refused];
  startOptions();
  const field = byId("message");
  byId("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    send(field.value);
  });
  field.addEventListener("input", grow);
  field.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    send(field.value);
  });
  document.addEventListener("keydown", (event) => event.key === "Escape" && stop());
  byId("stop").addEventListener("click", stop);
  byId("new-chat").addEventListener("click", clear);
  byId("starters").append(...STARTERS.map((text) => button(text, () => send(text), "starter")));
}

function grow() {
  const field = byId("message");
  field.style.height = "auto";
  field.style.height = `${Math.min(field.scrollHeight, innerHeight / 3)}px`;
}

function clear() {
  stop();
  said = [];
  byId("log").replaceChildren();
  showLog(false);
  byId("message").focus();
}

function showLog(is) {
  byId("log").hidden = !is;
  byId("hello").hidden = is;
}

const stop = () => running?.abort();

function send(text) {
  const fields = text.trim() === "" || running ? null : chosen();
  if (fields === null) return;
  said.push({ role: "user", content: text });
  byId("log").append(make("div", { class: "user" }, text));
  byId("message").value = "";
  grow();
  answer(fields);
}

async function answer(fields) {
  const history = said;
  const view = new Answer(Boolean(fields.logprobs));
  const body = {
    ...fields, model: served.model ?? undefined, stream: true, stream_options: { include_usage: true },
    messages: [...(systemPrompt() ? [{ role: "system", content: systemPrompt() }] : []), ...history],
  };
  running = new AbortController();
  busy(true);
  try {
    for await (const chunk of events(await ask("v1/chat/completions", { body, signal: running.signal }), (word) => view.waits(word))) {
      if (chunk.error) throw new Error(message(chunk));
      view.take(chunk);
    }
  } catch (error) {
    view.broke(error);
    if (error.name !== "AbortError") onError(error);
  }
  running = null;
  busy(false);
  view.end();
  if (view.said) history.push(view.message());
  if (view.calls.length) view.askResults((results) => {
    history.push(...results);
    const next = chosen();
    if (next) answer(next);
  });
}

function busy(is) {
  showLog(true);
  byId("send").hidden = is;
  byId("stop").hidden = !is;
  byId("log").setAttribute("aria-busy", String(is));
}

/** One answer on the page, while it comes and after. */
class Answer {
  constructor(scored) {
    this.text = "";
    this.thought = "";
    this.calls = [];
    this.tokens = 0;
    this.reason = "";
    this.started = performance.now();
    this.drawn = true;
    this.scores = scored ? tokenBox() : null;
    this.thinking = make("details", { class: "thinking", hidden: "" }, make("summary", {}, "Thinking"), make("p"));
    this.words = make("div", { class: "words" });
    this.cards = make("div", { class: "calls" });
    this.foot = make("p", { class: "foot" }, "…");
    this.box = make("div", { class: "answer" }, this.thinking, this.scores, this.words, this.cards, this.foot);
    byId("log").append(this.box);
    follow(true);
  }

  get said() {
    return this.text !== "" || this.calls.length > 0;
  }

  /** What is told instead of an answer while its model is loaded. */
  waits(word) {
    write(this.foot, word);
  }

  take(chunk) {
    write(this.foot, "…");
    if (chunk.usage) this.tokens = chunk.usage.completion_tokens;
    const choice = chunk.choices[0];
    if (!choice) return;
    const { content, reasoning_content: thought, tool_calls: calls } = choice.delta;
    if (content || thought || calls?.length) this.firstAt ??= performance.now();
    this.lastAt = performance.now();
    this.text += content ?? "";
    this.thought += thought ?? "";
    for (const call of calls ?? []) this.takeCall(call);
    this.reason = choice.finish_reason ?? this.reason;
    if (this.scores && choice.logprobs?.content) addTokens(this.scores, choice.logprobs.content);
    this.draw();
  }

  takeCall({ index, id, function: { name, arguments: text } }) {
    this.calls[index] ??= { id, type: "function", function: { name, arguments: "" } };
    this.calls[index].function.arguments += text;
  }

  /** Draws once a frame, however many tokens came. */
  draw() {
    if (!this.drawn) return;
    this.drawn = false;
    requestAnimationFrame(() => this.drawn || this.drawNow());
  }

  drawNow() {
    this.drawn = true;
    this.thinking.hidden = this.thought === "";
    write(this.thinking.lastChild, this.thought);
    if (!this.scores) this.words.replaceChildren(...rendered(this.text));
    this.cards.replaceChildren(...this.calls.map((call) => make("div", { class: "call" },
      make("b", {}, call.function.name), make("code", {}, call.function.arguments))));
    follow(false);
  }

  broke(error) {
    this.reason = error.name === "AbortError" ? "stopped" : "error";
    if (this.reason === "error") this.box.append(make("p", { class: "error", role: "alert" }, error.message || "The stream broke off."));
  }

  end() {
    this.drawNow();
    const [first, whole] = [(this.firstAt ?? this.lastAt) - this.started, (this.lastAt - this.firstAt) / 1000];
    const facts = [
      this.tokens ? `${this.tokens} tokens` : null,
      this.tokens > 1 && whole > 0 ? `${((this.tokens - 1) / whole).toFixed(1)} tokens/s` : null,
      this.firstAt ? `first after ${first.toFixed(0)} ms` : null,
      this.reason || null,
    ];
    this.foot.replaceChildren(facts.filter(Boolean).join(" · "));
    if (this.text) this.foot.append(button("Copy", () => navigator.clipboard?.writeText(this.text), "tiny"));
    follow(false);
  }

  message() {
    const calls = this.calls.length ? { tool_calls: this.calls } : {};
    return { role: "assistant", content: this.text, ...calls };
  }

  /** Fields for what the tools answer; hands their messages on. */
  askResults(then) {
    const id = `results-${this.calls[0].id}`;
    const fields = this.calls.map((call) => make("input", { form: id, "aria-label": `Result of ${call.function.name}`, placeholder: "its result" }));
    [...this.cards.children].forEach((card, index) => card.append(fields[index]));
    const form = make("form", { id }, make("button", { class: "quiet" }, "Send results"));
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      for (const field of fields) field.disabled = true;
      form.remove();
      then(this.calls.map((call, index) => ({ role: "tool", tool_call_id: call.id, content: fields[index].value })));
    });
    this.cards.append(form);
    fields[0].focus();
  }
}

/** Keeps the newest in sight, unless the reader has scrolled up. */
function follow(always) {
  const log = byId("log");
  if (always || log.scrollHeight - log.scrollTop - log.clientHeight < 120) log.scrollTop = log.scrollHeight;
}
