// What is to be known of the document that is read: that it is gone, that there is a newer one, what went wrong.

import { ask } from "./api.js";
import { byId, setText } from "./elements.js";

const LOOKED_AT = 20;
const MOST_CHARACTERS = 200; // the server takes no longer names
const said = byId("reader-said");
const newer = byId("reader-newer");
let id = null;
/** The places of the document, as far as the server has told them. */
let places = [];
let isTextShown = false;
/** The document that has the name of this one, where the address has told that alone. */
let namesake = null;
let newest = () => undefined;

/**
 * @param {(id: number, uris: string[]) => number|undefined} successor tells which document has replaced another
 * @param {(id: number) => void} lead told which document is wanted instead
 */
export function start(successor, lead) {
  newest = () => successor(id, places);
  newer.addEventListener("click", () => lead(newest() ?? namesake));
}

/** Begin anew, with another document. */
export function clear(number) {
  id = number;
  places = [];
  isTextShown = false;
  namesake = null;
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

/** Look for a document of some name: who was sent the address of one that was replaced since means the newer one. */
export async function lookFor(name) {
  const number = id;
  if (name.length > MOST_CHARACTERS) return;
  try {
    const { documents } = await ask("GET", `documents?${new URLSearchParams({ called: name, limit: LOOKED_AT })}`);
    const found = documents.find((document) => document.name === name && document.is_found && document.id !== number);
    if (number !== id || !found || newest() !== undefined) return;
    namesake = found.id;
    newer.hidden = false;
    say("There is a newer document of this name.");
  } catch (error) {
    if (number === id) say(error.message);
  }
}

/** Lead to the version that has replaced the document, once it is known. */
export function offerNewer() {
  const isReplaced = newest() !== undefined;
  newer.hidden = !isReplaced && namesake === null;
  if (!isReplaced && !isTextShown) return;
  const became = isReplaced ? "A newer version has replaced this document." : "This document is no longer here.";
  say(isTextShown ? `${became} What is shown is the text that it had.` : became);
}
