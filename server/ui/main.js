/* Puts the page together: views, the key, the status line. */

import { key, keepKey } from "./api.js";
import { startChat } from "./chat.js";
import { byId, write } from "./dom.js";
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

function onLook(now, error) {
  document.body.dataset.state = error ? "away" : "here";
  if (error) {
    write(byId("served"), error.status ? error.message : "the server does not answer");
    if (error.status === 401) askKey(true);
    return;
  }
  if (served.model === null) fitLength(now.max_total_tokens);
  served.model = now.model;
  write(byId("served"), `${now.model} · ${now.device} · ${now.precision}`);
}

const lanes = startLanes(onLook);
startChat(served, (error) => error.status === 401 && askKey(true));
