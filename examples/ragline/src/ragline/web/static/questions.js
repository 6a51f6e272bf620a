// Search and ask: passages with their citations marked, answers whose citations lead to them.

import * as address from "./address.js";
import { ask } from "./api.js";
import { numberOnTheWay } from "./documents.js";
import { byId, make, plural, setText } from "./elements.js";
import { card } from "./passages.js";
import * as reader from "./reader.js";

const passages = byId("passages");
const answer = byId("answer");
const note = byId("search-note");
const more = byId("more-passages");
const key = (query, isAsked) => `${isAsked ? "ask" : "search"} ${query}`;
let working = 0;
let isEmpty = false;
let latest = 0; // answers of questions that were overtaken are not shown
let shown = key("", null); // what the page begins with
let showMore = async () => {};
let tell = () => {}; // says in the note what was found, again when more is known of the documents

export function start() {
  byId("search").addEventListener("submit", (event) => { event.preventDefault(); begin(search); });
  byId("ask").addEventListener("click", () => begin(question));
  more.addEventListener("click", () => showMore());
  address.whenGone(restore);
}

/** Ask again what the address says, unless that is what is shown. */
export function restore({ q = "", ask: isAsked = null }) {
  if (shown === key(q, isAsked)) return;
  byId("query").value = cut(q);
  if (q) run(isAsked ? question : search, q);
  else {
    latest += 1;
    clear();
    shown = key("", null);
    tell = () => {};
    setText(note, "");
    byId("search-empty").hidden = false;
    document.body.classList.remove("busy");
    document.title = "ragline";
  }
}

export function update(status) {
  const { is_keyword_only: isKeywordOnly, can_ask: canAsk } = status;
  working = numberOnTheWay(status);
  isEmpty = !Object.values(status.documents).some(Boolean);
  byId("ask").hidden = !canAsk;
  byId("search-hint").hidden = !isKeywordOnly || isEmpty;
  setText(byId("search-hint"), "Keyword search only: there is no embedding model, so ask in the words of the documents.");
  tell();
}

function begin(what) {
  const query = byId("query").value.trim();
  if (!query) { byId("query").focus(); return; }
  address.write({ q: query, ask: what === question ? 1 : null });
  run(what, query);
}

/** As much as may be asked: a field limits what is typed, but not what comes with the address. */
const cut = (query) => [...query].slice(0, byId("query").maxLength).join("");

function refuse(query) {
  const [length, limit] = [[...query].length, byId("query").maxLength].map((count) => count.toLocaleString("en"));
  clear();
  tell = () => {};
  document.body.classList.remove("busy");
  setText(note, `The question is too long: it has ${length} characters, and at most ${limit} are taken. The field has the first ${limit} of them.`);
  note.classList.add("error");
}

async function run(what, query) {
  const number = ++latest;
  shown = key(query, what === question);
  if (query !== cut(query)) { refuse(query); return; }
  document.title = `${query} · ragline`;
  document.body.classList.add("busy");
  tell = () => {};
  note.classList.remove("error");
  setText(note, what === question ? "Asking the model…" : "Searching…");
  try {
    const show = await what(query);
    if (number === latest) show();
  } catch (error) {
    if (number === latest) {
      clear();
      shown = "";
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
  more.hidden = true;
  answer.replaceChildren();
  answer.hidden = true;
  byId("search-empty").hidden = true;
}

const open = (passage) => reader.open(passage.document_id, passage);

async function search(query) {
  const find = (skip) => ask("GET", `search?${new URLSearchParams({ q: query, skip })}`);
  const results = await find(0);
  return () => {
    clear();
    append(results);
    showMore = () => goOn(find);
    tell = () => {
      const count = passages.children.length;
      const none = isEmpty ? "There are no documents to search yet: add some first." : `Nothing found for “${query}”.`;
      const found = count ? `${more.hidden ? "" : "The first "}${plural(count, "passage")}` : isEmpty || !results.note ? none : "";
      const soon = !count && working ? `${plural(working, "document is", "documents are")} still on the way.` : "";
      setText(note, [found, soon, isEmpty ? "" : results.note].filter(Boolean).join(" "));
    };
    tell();
  };
}

function append({ passages: some, words, has_more: hasMore }) {
  const before = passages.children.length;
  passages.append(...some.map((passage, at) => card(passage, before + at + 1, { words }, open)));
  more.hidden = !hasMore;
}

async function goOn(find) {
  const number = latest;
  const before = passages.children.length;
  more.disabled = true;
  try {
    const results = await find(before);
    if (number !== latest) return;
    append(results);
    tell();
    passages.children[before]?.focus({ preventScroll: true });
  } catch (error) {
    if (number === latest) setText(note, error.message);
  } finally {
    more.disabled = false;
  }
}

async function question(query) {
  const given = await ask("POST", "ask", { question: query });
  return () => {
    clear();
    answer.hidden = given.parts.length === 0;
    answer.append(make("p", { class: "words" }, ...given.parts.map(part)), ...given.notes.map((text) => make("p", { class: "fine" }, text)));
    const cited = new Set(given.parts.map((one) => one.citation));
    const listed = given.passages.map((passage, at) => ({ passage, number: at + 1 })).filter(({ number }) => cited.has(number));
    const quotedIn = (number) => given.quoted.filter((one) => one.passage === number).map((one) => one.text);
    passages.append(...listed.map(({ passage, number }) => card(passage, number, { words: given.words, quoted: quotedIn(number) }, open)));
    setText(note, given.parts.length ? `${plural(listed.length, "passage")} cited` : given.notes.join(" "));
  };
}

function part({ text, citation, is_unverified: isUnverified }) {
  if (citation !== null) {
    const link = make("a", { class: "citation", href: `#passage-${citation}`, "aria-label": `Passage ${citation}` }, String(citation));
    link.addEventListener("click", (event) => {
      event.preventDefault(); // the address is that of the search, not of a place in it
      const target = byId(`passage-${citation}`);
      for (const one of passages.children) one.classList.toggle("target", one === target);
      target?.scrollIntoView({ block: "start" });
      target?.focus({ preventScroll: true });
    });
    return link;
  }
  return isUnverified ? make("span", { class: "unverified", title: "Not found in the passages word for word" }, text) : text;
}
