// A document opened: its text from the beginning or around a passage, read on both ways, and its file to keep.

import * as address from "./address.js";
import { ask } from "./api.js";
import { bytes, byId, entitle, isFocusLost, make, moment, plural, setText } from "./elements.js";
import * as finder from "./finder.js";
import { unitsOf } from "./layout.js";
import * as notice from "./notice.js";
import * as outline from "./outline.js";
import * as sheet from "./sheet.js";

const PIECE_CHARACTERS = 6000;
const AROUND_CHARACTERS = 3000;
const TOLD_CHARACTERS = 60;
const NEAR_END_PIXELS = 400;
const dialog = byId("reader");
const text = byId("reader-text");
let latest = 0; // a document that was opened since is the one that is shown
/** Which part of which document: its text, the code and tables in it, and the piece of it that is marked. */
let shown = null;
/** What was asked for last: the id of the document, and where its passage begins. */
let wanted = {};
/** The state of the document that is open, if it has no text. */
let textless = null;
/** Whether the document that is open is gone. */
let isLost = false;
/** Whether it could not be shown for a reason that may pass. */
let isAwaited = false;
let isReadingOn = false;
/** Where the page itself has scrolled to: whoever scrolls from there wants to read on. */
let putAt = 0;

/** @param {(id: number, uris: string[]) => number|undefined} successor tells which document has replaced one */
export function start(successor) {
  dialog.addEventListener("close", () => {
    shown = null;
    latest += 1;
    entitle("document", "");
    address.leaveDocument();
    goBack();
  });
  text.addEventListener("scroll", readOnAtEnd, { passive: true });
  notice.start(successor, (id) => {
    address.rewrite({ document: id, start: null, end: null, name: null });
    show(id, null);
  });
  byId("reader-close").addEventListener("click", () => dialog.close());
  byId("reader-before").addEventListener("click", () => go(-1));
  byId("reader-after").addEventListener("click", () => go(1));
  finder.start(async (place) => { await goTo(place); return around(); }, placeRead, unmark);
  outline.start(goToHeading);
  address.whenGone(restore);
}

/** Show what the address says. */
export function restore({ document: id, start: from, end, q = "" }) {
  if (!/^\d+$/.test(id ?? "")) {
    if (dialog.open) dialog.close();
    return;
  }
  const isPassage = [from, end].every((one) => /^\d{1,9}$/.test(one ?? ""));
  show(Number(id), isPassage ? { start: Number(from), end: Number(end), q: [...q].length > byId("query").maxLength ? "" : q } : null);
}

/** Open a document, at a passage if one is given. */
export function open(id, passage = null) {
  address.write({ document: id, start: passage?.start ?? null, end: passage?.end ?? null, name: null });
  show(id, passage);
}

async function show(id, passage) {
  const number = ++latest;
  wanted = { id, start: passage?.start, passage };
  clear(id);
  if (!dialog.open) dialog.showModal();
  try {
    const range = passage ? rangeOf(passage) : { start: 0, end: PIECE_CHARACTERS, around: 0 };
    const [detail, found] = await Promise.all([
      ask("GET", `documents/${id}`),
      ask("GET", `documents/${id}/excerpt?${new URLSearchParams(range)}`)
        .catch((error) => { if (error.status === 404) return null; throw error; }),
    ]);
    if (number !== latest) return;
    if (passage && found?.quote === "") { // the range is empty, or begins behind the end
      await show(id, null);
      return;
    }
    describe(detail);
    if (!found) { sayWhyThereIsNoText(detail); return; }
    take(id, found, Boolean(passage), passage?.marks ?? found.marks);
    outline.show(detail.headings);
    finder.show(id);
    if (passage) lookAtMark();
    else put(0);
    text.focus({ preventScroll: true });
  } catch (error) {
    if (number === latest) refuse(error);
  }
}

/** Where a passage stands, and the search that it was found by where that alone knows the words to emphasize. */
const rangeOf = ({ start, end, marks, q }) => ({ start, end, ...(q && !marks ? { q } : {}) });

/** Whoever opened it with the address, and not with a button, goes on where that leads: at its passage or its row. */
function goBack() {
  if (!isFocusLost()) return;
  const { id, start } = wanted;
  const passage = document.querySelector(`#passages [data-document="${id}"][data-start="${start}"] .source`);
  const row = document.querySelector(`#documents [data-id="${id}"] .name`);
  (passage ?? row ?? byId("questions-title")).focus({ preventScroll: true });
}

/** Show a part of a document, with the passage marked or not, and the words emphasized that were asked for. */
function take(id, { before, quote, after, start, end, length, blocks }, isMarked, words = []) {
  const mark = isMarked ? [before.length, before.length + quote.length] : null;
  shown = { id, start, end, length, blocks, words, text: before + quote + after, mark };
  draw();
}

/** Show a place of the document that is open, fetched with what is around it where it is not here yet. */
async function goTo({ start, end }) {
  if (!shown) return;
  const number = ++latest;
  const first = shown.start && shown.start + TOLD_CHARACTERS; // of what begins in the midst of words, nobody can tell the sense
  if (start >= first && end <= shown.end) {
    const unit = unitsOf(shown.text);
    Object.assign(shown, { words: [], mark: [unit(start - shown.start), unit(end - shown.start)] });
    draw();
  } else {
    const { id } = shown;
    const range = new URLSearchParams({ start, end, around: AROUND_CHARACTERS });
    const found = await ask("GET", `documents/${id}/excerpt?${range}`);
    if (number !== latest) return;
    take(id, found, true);
  }
  lookAtMark();
}

function unmark() {
  if (!shown) return;
  const scrolled = text.scrollTop;
  shown.mark = null;
  draw();
  put(scrolled);
}

function put(scrolled) {
  text.scrollTop = scrolled;
  putAt = text.scrollTop;
}

/** What is marked in the middle of the window; from its beginning where that is too small for it. */
function lookAtMark() {
  const marks = [...text.querySelectorAll("mark")];
  const height = marks.at(-1).getBoundingClientRect().bottom - marks[0].getBoundingClientRect().top;
  marks[0].scrollIntoView({ block: height > text.clientHeight * 0.8 ? "start" : "center" });
  putAt = text.scrollTop;
}

/** Read on at a heading: the focus goes there too. */
async function goToHeading({ start, title }) {
  try {
    await goTo({ start, end: start + [...title].length });
  } catch (error) {
    complain(error);
    return;
  }
  if (!shown?.mark) return; // another document was opened meanwhile
  // It is marked to the end of its line: what stands there besides its title is its author's.
  const behind = shown.text.indexOf("\n", shown.mark[0]);
  shown.mark[1] = behind < 0 ? shown.text.length : behind;
  draw();
  const mark = text.querySelector("mark");
  mark.tabIndex = -1;
  mark.scrollIntoView({ block: "start" });
  putAt = text.scrollTop;
  mark.focus({ preventScroll: true });
}

/** Where a person reads: at what is marked, if that is in sight, or at the first place that is. */
function placeRead() {
  if (!shown) return 0;
  const { top, bottom } = text.getBoundingClientRect();
  const boxes = [...text.querySelectorAll("mark")].map((one) => one.getBoundingClientRect());
  const isMarkSeen = boxes.some((box) => box.bottom > top && box.top < bottom);
  const unit = isMarkSeen ? shown.mark[0] : sheet.placeInSight();
  return shown.start + [...shown.text.slice(0, unit)].length;
}

/** What is marked, and a few words before and after it. */
function around() {
  if (!shown?.mark) return "";
  const { text: all, mark: [start, end] } = shown;
  return all.slice(Math.max(0, start - TOLD_CHARACTERS), end + TOLD_CHARACTERS);
}

function draw() {
  sheet.draw(shown);
  drawEnds();
}

/** Say why there is nothing to read: most often the document is gone since it was found. */
function refuse(error) {
  const isGone = isOfNone(error);
  setText(byId("reader-title"), isGone ? "This document is no longer here" : "This document cannot be shown");
  entitle("document", byId("reader-title").textContent);
  const reason = isGone ? "It was deleted, or a newer version has replaced it." : error.message;
  text.replaceChildren(make("p", { class: isGone ? "fine" : "error" }, reason));
  isLost = isGone;
  isAwaited = error.status === 0 || error.status >= 500;
  if (!isGone) return;
  notice.offerNewer();
  const { name } = address.read();
  if (name) notice.lookFor(name);
}

/** Whether a request failed since there is no such document: of some numbers no document can be. */
const isOfNone = ({ status }) => status === 404 || status === 422;

/** Say what went wrong with a document that is open, above its text. */
function complain(error) {
  if (isOfNone(error)) lose();
  else notice.say(error.message);
}

/** Take over what became of documents: one that had no text yet is shown when it has. */
export function update(documents) {
  const known = documents.find(({ id }) => id === wanted.id);
  if (!dialog.open) return;
  if (isLost) notice.offerNewer();
  else if (known && textless && textless !== known.state) show(wanted.id, wanted.passage);
}

/** Ask again for the document that the server did not answer for, now that it is back. */
export function tryAgain() {
  if (dialog.open && isAwaited) show(wanted.id, wanted.passage);
}

/** Take over which documents are gone. */
export function markLost(isGone) {
  if (dialog.open && isGone(wanted.id)) lose();
}

/** The document is gone while it is read: what is here of it stays, and no more of it can be had. */
function lose() {
  if (isLost) return;
  isLost = true;
  outline.show([]);
  finder.show(null);
  byId("reader-download").hidden = true;
  drawEnds();
  notice.sayGone(shown !== null);
  if (isFocusLost()) text.focus({ preventScroll: true });
}

function clear(id) {
  shown = null;
  textless = null;
  isLost = false;
  isAwaited = false;
  notice.clear(id);
  for (const part of ["facts", "places"]) setText(byId(`reader-${part}`), "");
  setText(byId("reader-title"), "Document"); // until its name is known
  byId("reader-download").href = `/api/documents/${id}/original`;
  byId("reader-download").hidden = true;
  outline.show([]);
  finder.show(null);
  text.classList.remove("code");
  text.replaceChildren("…");
  drawEnds();
}

function describe(detail) {
  setText(byId("reader-title"), detail.name);
  entitle("document", detail.name);
  notice.know(detail.uris);
  address.rewrite({ name: detail.name }); // who comes when it is replaced finds its successor by that
  const facts = [bytes(detail.size_bytes)];
  if (detail.pages) facts.push(plural(detail.pages, "page"));
  if (detail.characters) facts.push(plural(detail.characters, "character"));
  if (detail.chunks) facts.push(plural(detail.chunks, "passage"));
  if (detail.encoding && detail.encoding !== "utf-8") facts.push(detail.encoding);
  if (detail.reached.queued) facts.push(`added ${moment(detail.reached.queued)}`);
  setText(byId("reader-facts"), facts.join(" · "));
  setText(byId("reader-places"), detail.uris.map(shownUri).join("\n"));
  byId("reader-download").hidden = false;
}

function sayWhyThereIsNoText(detail) {
  textless = detail.state;
  text.replaceChildren(make("p", { class: "fine" }, reasonWhyThereIsNoText(detail)));
}

function reasonWhyThereIsNoText({ state, reason, is_found: isFound }) {
  if (state === "failed") return reason;
  if (state === "cancelled") return "It was cancelled: its text is not kept.";
  return isFound ? "There is no text." : "Its text is not read yet.";
}

/** Who scrolls to the end reads on, and keeps what is selected. */
async function readOnAtEnd() {
  const left = text.scrollHeight - text.clientHeight - text.scrollTop;
  if (isReadingOn || left > NEAR_END_PIXELS || Math.abs(text.scrollTop - putAt) < 2) return;
  if (byId("reader-after").hidden || !getSelection().isCollapsed) return;
  isReadingOn = true;
  await fetchMore(1);
  isReadingOn = false;
}

/** Read on, or what comes before. */
async function go(direction) {
  if (!shown) return;
  const button = byId(direction < 0 ? "reader-before" : "reader-after");
  button.disabled = true;
  const isDone = await fetchMore(direction);
  button.disabled = false;
  if (isDone) text.focus({ preventScroll: true });
  else if (dialog.open && isFocusLost()) button.focus(); // while it was disabled it lost the focus
}

async function fetchMore(direction) {
  const { id } = shown;
  const start = direction < 0 ? Math.max(0, shown.start - PIECE_CHARACTERS) : shown.end;
  const end = direction < 0 ? shown.start : shown.end + PIECE_CHARACTERS;
  try {
    const found = await ask("GET", `documents/${id}/excerpt?${new URLSearchParams({ start, end, around: 0 })}`);
    // Another place was gone to meanwhile, or the same piece has come by another way.
    if (shown?.id !== id || (direction < 0 ? shown.start !== end : shown.end !== start)) return false;
    if (direction < 0) prepend(found);
    else append(found);
    notice.say("");
    return true;
  } catch (error) {
    if (shown?.id === id) complain(error);
    return false;
  }
}

/** What was read stays where it is. Heights do not tell: all lines break anew. */
function prepend(found) {
  const { mark } = shown;
  const from = mark ? mark[0] : 0;
  const place = from + Math.max(0, shown.text.slice(from).search(/\S/)); // a line end has no place of its own
  const [top, scrolled] = [sheet.topOf(place), text.scrollTop];
  const { length } = found.quote;
  Object.assign(shown, { start: found.start, text: found.quote + shown.text, mark: mark?.map((at) => at + length) ?? null });
  shown.blocks = joined(found.blocks, shown.blocks);
  draw();
  text.scrollTop = scrolled;
  put(text.scrollTop + sheet.topOf(place + length) - top);
}

function append(found) {
  const scrolled = text.scrollTop;
  Object.assign(shown, { end: found.end, text: shown.text + found.quote, blocks: joined(shown.blocks, found.blocks) });
  sheet.drawOn(shown);
  drawEnds();
  put(scrolled);
}

/** The blocks of two pieces of a text that follow each other; one that was divided between them is one. */
function joined(before, after) {
  const [last, first] = [before.at(-1), after[0]];
  if (!last || last.kind !== first?.kind || last.end !== first.start) return [...before, ...after];
  return [...before.slice(0, -1), { ...last, end: first.end }, ...after.slice(1)];
}

function drawEnds() {
  byId("reader-before").hidden = !shown || isLost || shown.start === 0;
  byId("reader-after").hidden = !shown || isLost || shown.end >= shown.length;
  const share = shown?.length ? Math.round((shown.end / shown.length) * 100) : 100;
  setText(byId("reader-share"), shown && share < 100 ? `to ${share} % of the text` : "");
}

/** The path of an upload or a file as people know it. */
export function shownUri(uri) {
  try {
    return decodeURIComponent(uri.replace(/^upload:\/\/\//, "").replace(/^file:\/\//, ""));
  } catch {
    return uri;
  }
}
