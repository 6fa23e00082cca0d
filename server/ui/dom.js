/* Elements without markup: text only ever becomes text. */

export const byId = (id) => document.getElementById(id);

/** An element with attributes and children; null children are left out. */
export function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value !== null && value !== false) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

export const button = (text, onclick, kind = "quiet") => make("button", { type: "button", class: kind, onclick }, text);

/** Sets an element's text only if it changes, so that nothing is drawn or read out again for nothing. */
export function write(element, text) {
  if (element.textContent !== text) element.textContent = text;
}
