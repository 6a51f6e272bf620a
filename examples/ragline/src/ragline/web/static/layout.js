// Text laid out: code and tables in blocks of their own, whose columns line up and whose long lines scroll within them.

import { make } from "./elements.js";

const WORDS = { code: "Code", table: "Table" };

// Who has no mouse scrolls what has the focus; what does not scroll is no stop on the way.
const watcher = new ResizeObserver((entries) => {
  for (const { target } of entries) {
    if (target.scrollWidth > target.clientWidth) target.tabIndex = 0;
    else target.removeAttribute("tabindex");
  }
});

/**
 * Lay out pieces of text.
 * @param {(string|HTMLElement)[]} pieces strings, and marks of which each holds a string
 * @param {{start: number, end: number, kind: string}[]} blocks ascending, in code units of the pieces' text
 * @returns {(string|Node)[]} with the same text
 */
export function laidOut(pieces, blocks) {
  const length = pieces.reduce((sum, piece) => sum + textOf(piece).length, 0);
  const all = [];
  let at = 0;
  for (const { start, end, kind } of blocks) {
    const [from, to] = [Math.max(at, start), Math.min(end, length)];
    if (from >= to) continue;
    const within = cut(pieces, from, to);
    // The line end behind it goes with it: a block begins and ends its lines itself.
    const behind = cut(pieces, to, to + 1).map(textOf).join("") === "\n" ? 1 : 0;
    all.push(...cut(pieces, at, from), block(kind, behind ? [...within, "\n"] : within));
    at = to + behind;
  }
  return [...all, ...cut(pieces, at, length)];
}

/** The part of pieces between two places of their text. */
export function cut(pieces, start, end) {
  const shown = [];
  let at = 0;
  for (const piece of pieces) {
    const text = textOf(piece);
    const part = text.slice(Math.max(0, start - at), Math.max(0, end - at));
    if (part) shown.push(typeof piece === "string" ? part : make("mark", {}, part));
    at += text.length;
  }
  return shown;
}

export const textOf = (piece) => (typeof piece === "string" ? piece : piece.textContent);

/** The server counts characters, a browser units, of which some characters have two: blocks of a text that begins at a character. */
export function inUnits(text, blocks, start) {
  const unit = unitsOf(text);
  return blocks.map((one) => ({ ...one, start: unit(one.start - start), end: unit(one.end - start) }));
}

/** Tells the unit at which a character of a text begins. */
export function unitsOf(text) {
  if (!/[\uD800-\uDBFF]/.test(text)) return (character) => character;
  const starts = [];
  let at = 0;
  for (const character of text) {
    starts.push(at);
    at += character.length;
  }
  return (character) => starts[character] ?? text.length;
}

function block(kind, pieces) {
  const content = kind === "table" ? [make("div", { class: "rows" }, ...rows(pieces))] : pieces;
  const element = make("div", { class: `block ${kind}`, role: "group", "aria-label": WORDS[kind] }, ...content);
  watcher.observe(element);
  return element;
}

/** Lay out anew the last row of a table, which was cut, and the rows that follow it. */
export function longer(table, pieces, start, end) {
  const all = table.firstElementChild;
  const row = all.lastElementChild;
  const from = start + all.textContent.length - row.textContent.length;
  row.remove();
  const behind = cut(pieces, end, end + 1).map(textOf).join("") === "\n" ? 1 : 0;
  all.append(...rows(cut(pieces, from, end + behind)));
}

/** A row for each line; a cell begins at each `|`, which stays part of the text. */
function rows(pieces) {
  const text = pieces.map(textOf).join("");
  let at = 0;
  return text.split(/(?<=\n)/).map((line) => make("div", { class: "row" }, ...line.split(/(?<!^[ \t]*|\\)(?=\|)/).map((cell) => {
    const from = at;
    at += cell.length;
    return make("span", { class: "cell" }, ...cut(pieces, from, at));
  })));
}
