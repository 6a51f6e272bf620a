// What is to be known of the document that is read: that it is gone, that there is a newer one, what went wrong.

import { byId, setText } from "./elements.js";

const said = byId("reader-said");
const newer = byId("reader-newer");
let id = null;
/** The places of the document, as far as the server has told them. */
let places = [];
let isTextShown = false;
let newest = () => undefined;

/**
 * @param {(id: number, uris: string[]) => number|undefined} successor tells which document has replaced another
 * @param {(id: number) => void} lead told which document is wanted instead
 */
export function start(successor, lead) {
  newest = () => successor(id, places);
  newer.addEventListener("click", () => lead(newest()));
}

/** Begin anew, with another document. */
export function clear(number) {
  id = number;
  places = [];
  isTextShown = false;
  newer.hidden = true;
  say("");
}

/** Take over where the document stands: what comes there later replaces it. */
export function know(uris) {
  places = uris;
}

/** Say something above the text, or nothing. */
export function say(words) {
  byId("reader-notice").hidden = !words; // shown first: what is set while it is hidden is not read out
  setText(said, words);
}

/** Say that the document is gone, though some of its text may be here still. */
export function sayGone(isTextHere) {
  isTextShown = isTextHere;
  offerNewer();
}

/** Lead to the version that has replaced the document, once it is known. */
export function offerNewer() {
  const isReplaced = newest() !== undefined;
  newer.hidden = !isReplaced;
  if (!isReplaced && !isTextShown) return;
  const became = isReplaced ? "A newer version has replaced this document." : "This document is no longer here.";
  say(isTextShown ? `${became} What is shown is the text that it had.` : became);
}
