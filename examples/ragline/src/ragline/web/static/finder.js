// Finding words in the document that is read: the server knows the whole text, of which the page shows a part.

import { ask } from "./api.js";
import { byId, make, setText } from "./elements.js";

const field = byId("find-words");
const said = byId("find-said");
let read = null; // the id of the document
let found = null; // what was looked for in it, where it stands, and at which of these places one is
let latest = 0;
let go = async () => "";
let here = () => 0;
let unmark = () => {};

/**
 * @param {(place: {start: number, end: number}) => Promise<string>} lead shows a place, and gives the words around it
 * @param {() => number} at tells where a person reads
 * @param {() => void} leave takes the mark away from the place that was shown
 */
export function start(lead, at, leave) {
  go = lead;
  here = at;
  unmark = leave;
  byId("find").addEventListener("submit", (event) => { event.preventDefault(); move(1); });
  byId("find-before").addEventListener("click", () => move(-1));
  field.addEventListener("input", forget);
  field.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || !event.shiftKey) return;
    event.preventDefault();
    move(-1);
  });
}

/** Begin anew, in another document or in none. */
export function show(id) {
  read = id;
  found = null;
  latest += 1;
  byId("find").hidden = id === null;
  field.value = "";
  setText(said, "");
}

/** Other words are typed: what is shown of those before is not of these. */
function forget() {
  latest += 1;
  setText(said, "");
  if (found?.hits.length) unmark();
  found = null;
}

async function move(direction) {
  const number = ++latest;
  const words = field.value.trim();
  if (!words) { setText(said, ""); field.focus(); return; }
  try {
    if (found?.words !== words) {
      const { hits, has_more: hasMore } = await ask("GET", `documents/${read}/hits?${new URLSearchParams({ q: words })}`);
      if (number !== latest) return;
      found = { words, hits, hasMore, at: first(hits, direction) };
    } else {
      found.at = (found.at + direction + found.hits.length) % found.hits.length;
    }
    if (!found.hits.length) { setText(said, "Not found"); return; }
    const [start, end] = found.hits[found.at];
    const around = await go({ start, end });
    if (number !== latest) return;
    // Who listens stays in the field, and is told what stands at the place.
    const place = `${count(found.at + 1)} of ${count(found.hits.length)}${found.hasMore ? "+" : ""}`;
    said.replaceChildren(place, make("span", { class: "unseen" }, `: ${around}`));
  } catch (error) {
    if (number === latest) setText(said, error.message);
  }
}

const count = (number) => number.toLocaleString("en");

/** The first place from here on, or the last one before here; from the other end where there is none. */
function first(hits, direction) {
  const next = hits.findIndex(([start]) => start >= here());
  if (direction > 0) return Math.max(0, next);
  return (next > 0 ? next : hits.length) - 1;
}
