/* The server's API: where it is, the key, errors as sentences, events of a stream. Knows no page. */

const ROOT = new URL("..", import.meta.url);
const KEY = "xlane-api-key";

export class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

export const key = () => sessionStorage.getItem(KEY) ?? "";
export const keepKey = (value) => (value ? sessionStorage.setItem(KEY, value) : sessionStorage.removeItem(KEY));

/** Asks, and throws Refused with the server's own words for anything but success. */
export async function ask(path, { body, signal } = {}) {
  const headers = key() ? { authorization: `Bearer ${key()}` } : {};
  if (body !== undefined) headers["content-type"] = "application/json";
  const response = await fetch(new URL(path, ROOT), {
    method: body === undefined ? "GET" : "POST", headers, body: body && JSON.stringify(body), signal,
  });
  if (!response.ok) throw new Refused(response.status, sentence(await response.text(), response.status));
  return response;
}

function sentence(text, status) {
  try {
    return message(JSON.parse(text)) ?? `The server answered ${status}`;
  } catch {
    return `The server answered ${status}`;
  }
}

/** What an error body says, in any of the server's shapes. */
export const message = (body) => body?.error?.message ?? (typeof body?.error === "string" ? body.error : null);

/** The JSON values of a stream's events, as they come; its comments, which say what it waits for, are told to `told`. */
export async function* events(response, told) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (line.startsWith("data: ") && line !== "data: [DONE]") yield JSON.parse(line.slice(6));
      else if (line.startsWith(": ")) told(line.slice(2));
    }
  }
}
