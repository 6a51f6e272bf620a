// Search and ask: passages with their citations marked, answers whose citations lead to them.

import { ask } from "./api.js";
import { byId, make, marked, plural, setText } from "./elements.js";

const passages = byId("passages");
const answer = byId("answer");
const note = byId("search-note");
let working = 0;
let isEmpty = false;
let latest = 0; // answers of questions that were overtaken are not shown

export function start() {
  byId("search").addEventListener("submit", (event) => { event.preventDefault(); run(search); });
  byId("ask").addEventListener("click", () => run(question));
}

export function update({ is_keyword_only: isKeywordOnly, can_ask: canAsk, documents }) {
  working = ["queued", "parsing", "splitting", "embedding"].reduce((sum, state) => sum + documents[state], 0);
  isEmpty = !Object.values(documents).some(Boolean);
  byId("ask").hidden = !canAsk;
  byId("search-hint").hidden = !isKeywordOnly || isEmpty;
  setText(byId("search-hint"), "Keyword search only: there is no embedding model, so ask in the words of the documents.");
}

async function run(what) {
  const query = byId("query").value.trim();
  if (!query) { byId("query").focus(); return; }
  const number = ++latest;
  document.body.classList.add("busy");
  setText(note, what === question ? "Asking the model…" : "Searching…");
  try {
    const show = await what(query);
    if (number === latest) show();
  } catch (error) {
    if (number === latest) {
      clear();
      setText(note, error.message);
      note.classList.add("error");
    }
  } finally {
    if (number === latest) document.body.classList.remove("busy");
  }
}

function clear() {
  note.classList.remove("error");
  passages.replaceChildren();
  answer.replaceChildren();
  answer.hidden = true;
  byId("search-empty").hidden = true;
}

async function search(query) {
  const results = await ask("GET", `search?${new URLSearchParams({ q: query })}`);
  return () => {
    clear();
    passages.append(...results.passages.map((passage, at) => card(passage, at + 1, results.words)));
    const none = isEmpty ? "There are no documents to search yet: add some first." : `Nothing found for “${query}”.`;
    const found = results.passages.length ? plural(results.passages.length, "passage") : none;
    const soon = !results.passages.length && working ? `${plural(working, "document is", "documents are")} still on the way.` : "";
    setText(note, [found, soon, results.note].filter(Boolean).join(" "));
  };
}

async function question(query) {
  const given = await ask("POST", "ask", { question: query });
  return () => {
    clear();
    answer.hidden = given.parts.length === 0;
    answer.append(make("p", { class: "words" }, ...given.parts.map(part)), ...given.notes.map((text) => make("p", { class: "fine" }, text)));
    const cited = new Set(given.parts.map((one) => one.citation));
    const shown = given.passages.map((passage, at) => ({ passage, number: at + 1 })).filter(({ number }) => cited.has(number));
    passages.append(...shown.map(({ passage, number }) => card(passage, number, [])));
    setText(note, given.parts.length ? `${plural(shown.length, "passage")} cited` : given.notes.join(" "));
  };
}

function part({ text, citation, is_unverified: isUnverified }) {
  if (citation !== null) {
    return make("a", { class: "citation", href: `#passage-${citation}`, "aria-label": `Passage ${citation}` }, String(citation));
  }
  return isUnverified ? make("span", { class: "unverified", title: "Not found in the passages word for word" }, text) : text;
}

function card(passage, number, words) {
  const pages = passage.pages && (passage.pages[0] === passage.pages[1] ? `page ${passage.pages[0]}` : `pages ${passage.pages.join("–")}`);
  const place = [pages, `characters ${passage.start}–${passage.end}`].filter(Boolean).join(" · ");
  const open = make("button", { type: "button", class: "source", "aria-haspopup": "dialog", "aria-label": `${passage.name}, ${place}: read it in its place` }, passage.name);
  open.addEventListener("click", () => read(passage, place));
  return make("li", { id: `passage-${number}`, class: "passage", tabIndex: -1 },
    make("div", { class: "line" }, make("span", { class: "number", "aria-hidden": "true" }, String(number)), open, make("span", { class: "fine place" }, place)),
    passage.heading ? make("p", { class: "fine section" }, passage.heading) : null,
    make("blockquote", {}, ...marked(passage.quote, words)));
}

async function read(passage, place) {
  const text = byId("excerpt-text");
  setText(byId("excerpt-title"), passage.name);
  setText(byId("excerpt-place"), place);
  text.replaceChildren("…");
  byId("excerpt").showModal();
  try {
    const query = new URLSearchParams({ start: passage.start, end: passage.end });
    const found = await ask("GET", `documents/${passage.document_id}/excerpt?${query}`);
    const mark = make("mark", {}, found.quote);
    text.replaceChildren(found.is_start ? "" : "… ", found.before, mark, found.after, found.is_end ? "" : " …");
    mark.scrollIntoView({ block: "center" });
  } catch (error) {
    text.replaceChildren(error.message);
  }
}
