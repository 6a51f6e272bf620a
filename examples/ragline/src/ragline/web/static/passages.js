// A passage as a card: clamped around what answers the question, with the words marked and its place told.

import { announce, make, plural } from "./elements.js";
import { cut, inUnits, laidOut, textOf, unitsOf } from "./layout.js";

const CLAMP_CHARACTERS = 420;
const WHOLE_CHARACTERS = 560; // what is a little longer than the clamp is shown whole
const PLACES_NAMED = 3;
const TOLD_MILLISECONDS = 2500;

/**
 * A card.
 * @param {object} passage as the API gives it
 * @param {number} number its place among those that are shown
 * @param {string[]} quoted what to mark: exact quotations; if there are none, the words of the query
 * @param {(passage: object) => void} open reads the passage in its document
 */
export function card(passage, number, quoted, open) {
  const place = placeOf(passage);
  const source = make("button", { type: "button", class: "source", "aria-haspopup": "dialog", "aria-label": `${passage.name}, ${place}: read it in its place` }, passage.name);
  source.addEventListener("click", () => open(passage));
  const pieces = marked(passage.quote, quoted.length ? quotations(passage.quote, quoted) : marks(passage));
  const element = make("li", { id: `passage-${number}`, class: "passage", tabIndex: -1 },
    make("div", { class: "line" }, make("span", { class: "number", "aria-hidden": "true" }, String(number)), source, make("span", { class: "fine place" }, place)),
    passage.heading ? make("p", { class: "fine section" }, passage.heading) : null,
    passage.is_near ? make("p", { class: "fine" }, "Near in meaning") : null,
    passage.also?.length ? make("p", { class: "fine also" }, also(passage)) : null,
    ...quotation(pieces, inUnits(passage.quote, passage.blocks ?? [], passage.start), copying(passage)));
  element.dataset.document = passage.document_id;
  element.dataset.start = passage.start;
  return element;
}

/** Mark a card whose document was deleted, or replaced by a newer one; it keeps its number, which an answer may cite. */
export function lose(element) {
  if (element.classList.contains("lost")) return;
  element.classList.add("lost");
  const source = element.querySelector(".source");
  source.setAttribute("aria-label", `${source.getAttribute("aria-label")}; no longer here`);
  element.querySelector(".place").append(" · no longer here");
}

/** Where the same words stand: what repeats them is one place, however often it does. */
function also(passage) {
  const times = new Map();
  for (const place of passage.also) {
    const key = `${place.document_id} ${place.name}`;
    if (!times.has(key)) times.set(key, []);
    times.get(key).push(place);
  }
  const here = `${passage.document_id} ${passage.name}`;
  const others = [...times].filter(([key]) => key !== here).map(([, places]) => places);
  const named = others.slice(0, PLACES_NAMED).map(([first, ...more]) => (
    `${first.name}, ${placeOf(first, ", ")}${more.length ? ` and ${plural(more.length, "more time")}` : ""}`));
  const told = [];
  if (times.has(here)) told.push(`${plural(times.get(here).length, "more time")} in this document`);
  if (named.length) told.push(`in ${named.join("; ")}`);
  if (others.length > named.length) told.push(`and ${plural(others.length - named.length, "more place")}`);
  return `Also ${told.join("; ")}`;
}

/** Page and characters, as a person reads them. */
export function placeOf({ pages, start, end }, separator = " · ") {
  const [first, last] = (pages ?? []).map((page) => page.toLocaleString("en"));
  const told = pages && (first === last ? `page ${first}` : `pages ${first}–${last}`);
  return [told, `characters ${start.toLocaleString("en")}–${end.toLocaleString("en")}`].filter(Boolean).join(separator);
}

/** A button that copies the exact words with where they stand; browsers lend the clipboard to safe addresses alone. */
function copying({ quote, citation, name }) {
  if (!navigator.clipboard) return null;
  const button = make("button", { type: "button", class: "quiet", "aria-label": `Copy the passage from ${name}` }, "Copy");
  button.addEventListener("click", async () => {
    let told = "Copied";
    try {
      await navigator.clipboard.writeText(`“${quote}”\n${citation}`);
    } catch {
      told = "Not copied: the browser does not allow it"; // a person may refuse it, or the page is not in front
    }
    button.textContent = told;
    announce(`${told}.`);
    setTimeout(() => { button.textContent = "Copy"; }, TOLD_MILLISECONDS);
  });
  return button;
}

function quotation(pieces, blocks, copy) {
  const length = pieces.reduce((sum, piece) => sum + textOf(piece).length, 0);
  const quote = make("blockquote");
  if (length <= WHOLE_CHARACTERS) {
    quote.append(...laidOut(pieces, blocks));
    return [quote, make("p", { class: "foot" }, copy)];
  }
  const [start, end] = clamped(pieces, length);
  const moved = blocks.map((one) => ({ ...one, start: one.start - start, end: one.end - start }));
  const more = make("button", { type: "button", class: "quiet", "aria-expanded": "false" }, "Show more");
  const draw = (isWhole) => {
    quote.replaceChildren(...(isWhole
      ? laidOut(pieces, blocks)
      : [start ? "… " : "", ...laidOut(cut(pieces, start, end), moved), end < length ? " …" : ""]));
    more.textContent = isWhole ? "Show less" : "Show more";
    more.setAttribute("aria-expanded", String(isWhole));
  };
  more.addEventListener("click", () => draw(more.getAttribute("aria-expanded") === "false"));
  draw(false);
  return [quote, make("p", { class: "foot" }, more, copy)];
}

/** The part with the most marks, begun where a sentence or at least a word begins. */
function clamped(pieces, length) {
  const marks = [];
  let at = 0;
  let text = "";
  for (const piece of pieces) {
    if (typeof piece !== "string") marks.push([at, at + piece.textContent.length, piece.textContent.toLowerCase()]);
    text += textOf(piece);
    at = text.length;
  }
  let best = [0, 0, 0];
  for (const [first] of marks) {
    const inside = marks.filter(([start, end]) => start >= first && end <= first + CLAMP_CHARACTERS - 80);
    const value = new Set(inside.map(([, , word]) => word)).size * 10 + inside.length; // different words count more
    if (value > best[1]) best = [first, value, Math.max(...inside.map(([, end]) => end), first)];
  }
  const wanted = Math.min(Math.max(0, best[0] - 80), length - CLAMP_CHARACTERS);
  const start = begins(text, Math.max(0, wanted), best[1] ? best[0] : length);
  const end = Math.max(start + CLAMP_CHARACTERS, best[2] + 20);
  return [start, end + 60 >= length ? length : ends(text, end)];
}

function begins(text, from, mark) {
  if (from === 0) return 0;
  const sentence = /[.!?。！？]\s*|\n\s*/gu;
  sentence.lastIndex = Math.max(0, from - 40);
  const found = sentence.exec(text);
  if (found && found.index + found[0].length <= Math.min(mark, from + 60)) return found.index + found[0].length;
  const space = text.indexOf(" ", from);
  return whole(text, space >= 0 && space < Math.min(mark, from + 30) ? space + 1 : from);
}

function ends(text, to) {
  const space = text.lastIndexOf(" ", to);
  return whole(text, space > to - 30 ? space : to);
}

/** Not in the middle of a character of two code units. */
const whole = (text, at) => (/[\uDC00-\uDFFF]/.test(text[at] ?? "") ? at - 1 : at);

/** Where the words of the query stand in the quote, in code units of it. */
function marks({ quote, start, marks: spans }) {
  const unit = unitsOf(quote);
  return spans.map(([from, to]) => [unit(from - start), unit(to - start)]);
}

function quotations(text, quoted) {
  return quoted.map((quote) => [text.indexOf(quote), quote.length]).filter(([at]) => at >= 0)
    .map(([at, length]) => [at, at + length]).sort((one, other) => one[0] - other[0]);
}

/** The text in pieces, of which what is in a range is marked; ranges ascend and may overlap. */
function marked(text, ranges) {
  const pieces = [];
  let end = 0;
  for (const [from, to] of ranges) {
    if (to <= end) continue;
    pieces.push(text.slice(end, Math.max(end, from)), make("mark", {}, text.slice(Math.max(end, from), to)));
    end = to;
  }
  return [...pieces, text.slice(end)].filter((piece) => piece !== "");
}
