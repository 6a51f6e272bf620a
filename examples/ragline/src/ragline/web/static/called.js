// The documents that are called what was searched for: who types the name of a file is led to it.

import { ask } from "./api.js";
import { byId, make } from "./elements.js";
import * as reader from "./reader.js";

const NAMED = 3;
const FEWEST_CHARACTERS = 3; // one letter is part of most names
const line = byId("called-so");

/**
 * Ask for them.
 * @param {string} query
 * @returns {Promise<{documents: object[], hasMore: boolean}>} none for what no name can be
 */
export async function find(query) {
  const none = { documents: [], hasMore: false };
  if (query.length < FEWEST_CHARACTERS || query.length > byId("called").maxLength) return none;
  const { documents, has_more: hasMore } = await ask("GET", `documents?${new URLSearchParams({ called: query, limit: NAMED })}`);
  return { documents, hasMore };
}

/** Show them above the passages; none takes the line away. */
export function show({ documents, hasMore }) {
  line.hidden = documents.length === 0;
  const words = documents.length === 1 && !hasMore ? "A document has this in its name: " : "Documents with this in their name: ";
  line.replaceChildren(words, ...documents.flatMap(({ id, name }, at) => [at ? ", " : null, link(id, name)]).filter(Boolean), hasMore ? " and more" : "");
}

function link(id, name) {
  const button = make("button", { type: "button", class: "lead", "aria-haspopup": "dialog" }, name);
  button.addEventListener("click", () => reader.open(id));
  return button;
}
