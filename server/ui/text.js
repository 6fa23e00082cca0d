/* An answer's text → elements: code blocks, headings, lists, bold and code. Anything else stays as it was written. */

import { button, make } from "./dom.js";

const INLINE = /(`[^`\n]+`|\*\*[^*\n]+\*\*)/;

/** The elements of a text, which may be unfinished. */
export function rendered(text) {
  return text.split(/^```/m).flatMap((part, index) => (index % 2 ? [code(part)] : prose(part)));
}

function code(part) {
  const [language, ...lines] = part.split("\n");
  const source = lines.join("\n").replace(/\n$/, "");
  const copy = button("Copy", () => navigator.clipboard?.writeText(source));
  return make("figure", { class: "code" }, make("figcaption", {}, language.trim() || "code", copy), make("pre", {}, make("code", {}, source)));
}

function prose(part) {
  const blocks = part.split(/\n{2,}/).filter((block) => block.trim() !== "");
  return blocks.flatMap((block) => {
    const heading = /^(#{1,4}) (.*)$/.exec(block.trim());
    if (heading) return [make("h3", {}, ...inline(heading[2]))];
    return [make("p", {}, ...inline(block.replace(/^\n+|\s+$/g, "").replace(/^(\s*)[*-] /gm, "$1• ")))];
  });
}

function inline(text) {
  return text.split(INLINE).map((piece) => {
    if (piece.length > 2 && piece.startsWith("`") && piece.endsWith("`")) return make("code", {}, piece.slice(1, -1));
    if (piece.length > 4 && piece.startsWith("**") && piece.endsWith("**")) return make("strong", {}, piece.slice(2, -2));
    return piece;
  });
}
