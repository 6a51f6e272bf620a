// The text of the document that is read, drawn in parts: what is read on comes behind the rest, which stays as it is.

import { byId, make } from "./elements.js";
import { emphasize } from "./emphasis.js";
import { cut, inUnits, laidOut, longer, textOf, unitsOf } from "./layout.js";

const RUN_UNITS = 4000; // drawn at once: a browser breaks all lines of an element anew when one is added
const HALF_LINE_PIXELS = 12; // a line of which more is hidden is not read
const text = byId("reader-text");
/** Blocks, and runs of lines between them: where each begins, in units of the whole. */
let parts = [];
let isCode = false;

/** Draw the text anew. */
export function draw(shown) {
  const blocks = inUnits(shown.text, shown.blocks, shown.start);
  isCode = isAllCode(shown.text, blocks);
  text.classList.toggle("code", isCode); // what is nothing else scrolls as a whole, and needs no block of its own
  text.replaceChildren();
  parts = [];
  add(shown, isCode ? [] : blocks, 0);
  stress(shown);
}

/** Draw what has come behind the text that is drawn: with its last part, so that a line or a block that was divided is one. */
export function drawOn(shown) {
  const blocks = inUnits(shown.text, shown.blocks, shown.start);
  if (!parts.length || isAllCode(shown.text, blocks) !== isCode) {
    draw(shown);
    return;
  }
  const last = parts.at(-1);
  const table = !isCode && blocks.find(({ start, kind }) => start === last.start && kind === "table");
  if (table && last.element.matches(".table")) {
    longer(last.element, piecesOf(shown), table.start, table.end);
    add(shown, blocks, table.end + (shown.text[table.end] === "\n" ? 1 : 0));
  } else {
    parts.pop().element.remove();
    add(shown, isCode ? [] : blocks, last.start);
  }
  stress(shown);
}

const isAllCode = (all, [first, ...more]) => (
  !more.length && first?.kind === "code" && first.start === 0 && first.end >= all.length);

function piecesOf({ text: all, mark }) {
  return mark ? [all.slice(0, mark[0]), make("mark", {}, all.slice(...mark)), all.slice(mark[1])] : [all];
}

function add(shown, blocks, from) {
  const pieces = cut(piecesOf(shown), from, shown.text.length);
  const moved = blocks.map((one) => ({ ...one, start: one.start - from, end: one.end - from })).filter(({ end }) => end > 0);
  let at = from;
  let lines = [];
  const put = (element, length) => {
    parts.push({ start: at, element });
    text.append(element);
    at += length;
  };
  const putLines = () => {
    const whole = lines.map(textOf).join("");
    for (let start = 0; start < whole.length;) {
      const end = whole.indexOf("\n", start + RUN_UNITS) + 1 || whole.length;
      put(make("div", { class: "run" }, ...cut(lines, start, end)), end - start);
      start = end;
    }
    lines = [];
  };
  for (const one of laidOut(pieces, moved)) {
    if (typeof one === "string" || one.matches("mark")) {
      lines.push(one);
      continue;
    }
    putLines();
    put(one, one.textContent.length);
  }
  putLines();
}

function stress({ text: all, start, words }) {
  const unit = unitsOf(all);
  emphasize(text, words.map((span) => span.map((at) => unit(at - start))));
}

/** How high a place of the text stands in the window. */
export function topOf(place) {
  const walker = document.createTreeWalker(text, NodeFilter.SHOW_TEXT);
  let at = 0;
  while (walker.nextNode() && at + walker.currentNode.length <= place) at += walker.currentNode.length;
  const range = document.createRange();
  range.setStart(walker.currentNode, place - at);
  range.setEnd(walker.currentNode, place - at + 1);
  return range.getClientRects()[0].top;
}

/** The first place of the text that is in sight, in units of it. */
export function placeInSight() {
  const top = text.getBoundingClientRect().top + HALF_LINE_PIXELS;
  const isSeen = (one) => one.getBoundingClientRect().bottom > top;
  const part = parts.find(({ element }) => isSeen(element));
  if (!part) return 0;
  const walker = document.createTreeWalker(part.element, NodeFilter.SHOW_TEXT);
  const range = document.createRange();
  let at = part.start;
  for (; walker.nextNode(); at += walker.currentNode.length) {
    range.selectNodeContents(walker.currentNode);
    if (!isSeen(range)) continue;
    let [from, to] = [0, walker.currentNode.length]; // the first end of a range from its beginning that is seen
    while (from < to) {
      const middle = (from + to) >> 1;
      range.setEnd(walker.currentNode, middle + 1);
      if (isSeen(range)) to = middle;
      else from = middle + 1;
    }
    return at + from;
  }
  return at;
}
