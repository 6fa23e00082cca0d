/* Puts the page together: views, the key, the status line. */

import { ask, key, keepKey } from "./api.js";
import { startChat } from "./chat.js";
import { byId, make, write } from "./dom.js";
import { startLanes } from "./lanes.js";
import { fitLength } from "./options.js";

for (const view of ["chat", "lanes"]) {
  byId(`show-${view}`).addEventListener("click", () => {
    document.body.dataset.view = view;
    for (const other of ["chat", "lanes"]) byId(`show-${other}`).setAttribute("aria-pressed", String(other === view));
  });
}

const dialog = byId("key-dialog");
let refused = null;

/** Asks for a key; a key that was refused is asked for once, not at every look. */
function askKey(why) {
  if (dialog.open || (why && refused === key())) return;
  if (why) {
    refused = key();
    write(byId("key-text"), key() ? "The server does not take this key." : "This server asks for a key. It is kept until this tab is closed.");
  }
  byId("key").value = key();
  dialog.returnValue = "";
  dialog.showModal();
}

byId("ask-key").addEventListener("click", () => askKey(false));
byId("no-key").addEventListener("click", () => dialog.close());
dialog.addEventListener("close", () => {
  if (dialog.returnValue !== "use") return;
  keepKey(byId("key").value.trim());
  refused = null;
  lanes.look();
});

const served = { model: null };
const choice = byId("model");
let [offered, several, fitted] = [false, false, null];

/** Lets one choose, where there is more than one: models, or adapters of one model. */
async function offer() {
  offered = true;
  try {
    const { data } = await (await ask("v1/models")).json();
    several = "state" in data[0];
    const there = data.find(({ state }) => state === "loaded") ?? data[0];
    choice.replaceChildren(...data.map(({ id }) => make("option", { selected: id === there.id }, id)));
    choice.hidden = data.length < 2;
    if (!choice.hidden) served.model = there.id;
  } catch {
    offered = false; // it is not ready yet
  }
}

choice.addEventListener("change", () => {
  served.model = choice.value;
  if (!several) return;
  lanes.forget();
  lanes.look();
});

function onLook(now, error) {
  document.body.dataset.state = !error ? "here" : error.status === 503 ? "waits" : "away";
  if (!offered) offer();
  if (error) {
    write(byId("served"), error.status ? error.message : "the server does not answer");
    if (error.status === 401) askKey(true);
    return;
  }
  if (fitted !== now.model) fitLength(now.max_total_tokens);
  fitted = now.model;
  if (choice.hidden) served.model = now.model;
  write(byId("served"), `${now.model} · ${now.device} · ${now.precision}`);
}

const place = () => (several ? `ui/lanes?model=${encodeURIComponent(served.model)}` : "ui/lanes");
const lanes = startLanes(place, onLook);
startChat(served, (error) => error.status === 401 && askKey(true));
