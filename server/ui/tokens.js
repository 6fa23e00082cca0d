/* Tokens with their log-probabilities: shaded by how unlikely they were, the alternatives under the pointer or, with the
   arrow keys, under the cursor. */

import { byId, make } from "./dom.js";

const percent = (logprob) => (100 * Math.exp(logprob)).toFixed(logprob > -7 ? 1 : 4) + " %";
const shown = (token) => token.replaceAll("\n", "⏎").replaceAll(" ", "␣") || "∅";

/** A box that takes tokens as they come. */
export function tokenBox() {
  const box = make("div", { class: "tokens", tabindex: "0", "aria-label": "Answer, token by token; arrow keys show what else was likely" });
  box.addEventListener("mouseover", (event) => event.target.scored && show(event.target));
  box.addEventListener("mouseleave", hide);
  box.addEventListener("blur", hide);
  box.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step || !box.children.length) return;
    event.preventDefault();
    const at = [...box.children].indexOf(box.querySelector(".now"));
    show(box.children[Math.min(box.children.length - 1, Math.max(0, at + step))]);
  });
  return box;
}

/** Adds what a chunk's `logprobs.content` holds. */
export function addTokens(box, content) {
  for (const one of content) {
    const span = make("span", {}, one.token);
    span.scored = one;
    // Certain tokens stay plain; a token of probability 1/e² or less is shaded fully.
    if (one.logprob !== null) span.style.setProperty("--doubt", String(Math.min(1, -one.logprob / 2)));
    box.append(span);
  }
}

function show(span) {
  hide();
  span.classList.add("now");
  const { token, logprob, top_logprobs: top } = span.scored;
  const tip = byId("tip");
  const rows = (top ?? []).map((other) => make("tr", other.token === token ? { class: "taken" } : {},
    make("td", {}, shown(other.token)), make("td", { class: "n" }, percent(other.logprob))));
  const said = logprob === null ? "not sampled: nothing else was allowed" : `${percent(logprob)} · log ${logprob.toFixed(3)}`;
  tip.replaceChildren(make("p", {}, make("b", {}, shown(token)), ` ${said}`), make("table", {}, make("tbody", {}, ...rows)));
  tip.hidden = false;
  const place = span.getBoundingClientRect();
  const below = place.bottom + tip.offsetHeight + 12 < innerHeight;
  tip.style.left = `${Math.max(8, Math.min(place.left, innerWidth - tip.offsetWidth - 8))}px`;
  tip.style.top = `${below ? place.bottom + 6 : place.top - tip.offsetHeight - 6}px`;
}

function hide() {
  byId("tip").hidden = true;
  for (const one of document.querySelectorAll(".tokens .now")) one.classList.remove("now");
}
