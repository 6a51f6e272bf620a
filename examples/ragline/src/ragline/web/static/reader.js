// A document opened: its text from the beginning or around a passage, read on both ways, and its file to keep.

import * as address from "./address.js";
import { ask } from "./api.js";
import { bytes, byId, make, plural, setText } from "./elements.js";

const PIECE_CHARACTERS = 6000;
const dialog = byId("reader");
const text = byId("reader-text");
let latest = 0; // a document that was opened since is the one that is shown
let shown = null;

export function start() {
  dialog.addEventListener("close", () => { shown = null; latest += 1; address.leaveDocument(); });
  byId("reader-close").addEventListener("click", () => dialog.close());
  byId("reader-before").addEventListener("click", () => go(-1));
  byId("reader-after").addEventListener("click", () => go(1));
  address.whenGone(restore);
}

/** Show what the address says. */
export function restore({ document: id, start: from, end }) {
  if (!/^\d+$/.test(id ?? "")) {
    if (dialog.open) dialog.close();
    return;
  }
  const isPassage = [from, end].every((one) => /^\d+$/.test(one ?? ""));
  show(Number(id), isPassage ? { start: Number(from), end: Number(end) } : null);
}

/** Open a document, at a passage if one is given. */
export function open(id, passage = null) {
  address.write({ document: id, start: passage?.start ?? null, end: passage?.end ?? null });
  show(id, passage);
}

async function show(id, passage) {
  const number = ++latest;
  clear(id);
  if (!dialog.open) dialog.showModal();
  try {
    const range = passage ?? { start: 0, end: 0 };
    const [detail, found] = await Promise.all([
      ask("GET", `documents/${id}`),
      ask("GET", `documents/${id}/excerpt?${new URLSearchParams({ ...range, ...(passage ? {} : { end: PIECE_CHARACTERS, around: 0 }) })}`)
        .catch((error) => { if (error.status === 404) return null; throw error; }),
    ]);
    if (number !== latest) return;
    describe(detail);
    if (!found) { text.replaceChildren(make("p", { class: "fine" }, reasonWhyThereIsNoText(detail))); return; }
    shown = { id, start: found.start, end: found.end, length: found.length };
    const mark = passage ? make("mark", {}, found.quote) : found.quote;
    text.replaceChildren(found.before, mark, found.after);
    drawEnds();
    if (passage) mark.scrollIntoView({ block: "center" });
    else text.scrollTop = 0;
    text.focus({ preventScroll: true });
  } catch (error) {
    if (number === latest) text.replaceChildren(make("p", { class: "error" }, error.message));
  }
}

function clear(id) {
  shown = null;
  for (const part of ["title", "facts", "places"]) setText(byId(`reader-${part}`), "");
  byId("reader-download").href = `/api/documents/${id}/original`;
  byId("reader-download").hidden = true;
  text.replaceChildren("…");
  drawEnds();
}

function describe(detail) {
  setText(byId("reader-title"), detail.name);
  const facts = [bytes(detail.size_bytes)];
  if (detail.pages) facts.push(plural(detail.pages, "page"));
  if (detail.characters) facts.push(plural(detail.characters, "character"));
  if (detail.chunks) facts.push(plural(detail.chunks, "passage"));
  if (detail.encoding && detail.encoding !== "utf-8") facts.push(detail.encoding);
  const added = detail.reached.queued && new Date(detail.reached.queued);
  if (added) facts.push(`added ${added.toLocaleString(undefined, { dateStyle: "medium", timeStyle: "short" })}`);
  setText(byId("reader-facts"), facts.join(" · "));
  setText(byId("reader-places"), detail.uris.map(shownUri).join("\n"));
  byId("reader-download").hidden = false;
}

function reasonWhyThereIsNoText({ state, reason, is_found: isFound }) {
  if (state === "failed") return reason;
  if (state === "cancelled") return "It was cancelled: its text is not kept.";
  return isFound ? "There is no text." : "Its text is not read yet.";
}

/** Read on, or what comes before. */
async function go(direction) {
  if (!shown) return;
  const button = byId(direction < 0 ? "reader-before" : "reader-after");
  const { id } = shown;
  const start = direction < 0 ? Math.max(0, shown.start - PIECE_CHARACTERS) : shown.end;
  const end = direction < 0 ? shown.start : shown.end + PIECE_CHARACTERS;
  button.disabled = true;
  try {
    const found = await ask("GET", `documents/${id}/excerpt?${new URLSearchParams({ start, end, around: 0 })}`);
    if (shown?.id !== id) return;
    if (direction < 0) {
      // The passage stays where it is. Heights do not tell: all lines break anew.
      const mark = text.querySelector("mark");
      const top = mark.getClientRects()[0].top;
      text.prepend(found.quote);
      text.scrollTop += mark.getClientRects()[0].top - top;
      shown.start = found.start;
    } else {
      text.append(found.quote);
      shown.end = found.end;
    }
    drawEnds();
    text.focus({ preventScroll: true });
  } catch (error) {
    setText(byId("reader-facts"), error.message);
  } finally {
    button.disabled = false;
  }
}

function drawEnds() {
  byId("reader-before").hidden = !shown || shown.start === 0;
  byId("reader-after").hidden = !shown || shown.end >= shown.length;
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
