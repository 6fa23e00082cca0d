/* The parameters of a request: what the fields say → fields of the body. Empty fields are not sent. */

import { byId, write } from "./dom.js";

const NUMBERS = ["temperature", "top_p", "max_tokens", "seed"];
const SCHEMA = { type: "object", properties: { answer: { type: "string" }, sure: { type: "boolean" } }, required: ["answer", "sure"] };
const WEATHER = {
  type: "function",
  function: {
    name: "weather",
    description: "The weather at a place.",
    parameters: { type: "object", properties: { place: { type: "string" } }, required: ["place"] },
  },
};

export function startOptions() {
  byId("schema").value = JSON.stringify(SCHEMA, null, 1);
  byId("tools").value = JSON.stringify([WEATHER], null, 1);
  const toggle = byId("toggle-options");
  toggle.addEventListener("click", () => show(byId("options").hidden));
  byId("mode").addEventListener("change", showMode);
  byId("options").addEventListener("submit", (event) => event.preventDefault());
  showMode();
}

function show(open) {
  byId("options").hidden = !open;
  byId("toggle-options").setAttribute("aria-expanded", String(open));
}

function showMode() {
  for (const field of document.querySelectorAll("[data-mode]")) field.hidden = field.dataset.mode !== byId("mode").value;
}

/** The body's fields, or null if one of them cannot be sent; then it is shown and says why. */
export function chosen() {
  complain(null);
  const wrong = [...byId("options").querySelectorAll("input")].find((field) => !field.checkValidity());
  if (wrong) return complain(wrong, `${wrong.parentElement.firstChild.textContent}: ${wrong.validationMessage}`);
  const fields = {};
  for (const name of NUMBERS) if (byId(name).value !== "") fields[name] = Number(byId(name).value);
  if (byId("logprobs").checked) Object.assign(fields, { logprobs: true, top_logprobs: 5 });
  const mode = byId("mode").value;
  const source = mode === "json" ? byId("schema") : byId("tools");
  if (mode === "text") return fields;
  let value = null;
  try {
    value = source.value.trim() === "" ? null : JSON.parse(source.value);
  } catch (error) {
    return complain(source, `This is no JSON: ${error.message}`);
  }
  if (mode === "tools") return { ...fields, tools: value ?? [], tool_choice: byId("tool_choice").value };
  const format = value === null ? { type: "json_object" } : { type: "json_schema", json_schema: { name: "answer", schema: value } };
  return { ...fields, response_format: format };
}

/** Lets a first answer be no longer than a fourth of what the model can hold, so that a conversation has room. */
export function fitLength(max_total_tokens) {
  byId("max_tokens").max = max_total_tokens;
  byId("max_tokens").value = Math.min(Number(byId("max_tokens").value), Math.floor(max_total_tokens / 4));
}

export const systemPrompt = () => byId("system").value.trim();

function complain(field, text = "") {
  for (const one of byId("options").querySelectorAll("[aria-invalid]")) one.removeAttribute("aria-invalid");
  write(byId("options-error"), text);
  byId("options-error").hidden = field === null;
  if (field !== null) {
    show(true);
    field.setAttribute("aria-invalid", "true");
    field.focus();
  }
  return null;
}
