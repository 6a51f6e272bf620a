// Search and ask: passages with their citations marked, answers whose citations lead to them.

import * as address from "./address.js";
import { ask } from "./api.js";
import * as called from "./called.js";
import { numberOnTheWay } from "./documents.js";
import { announce, byId, entitle, isFocusLost, make, plural, setText } from "./elements.js";
import { card, lose } from "./passages.js";
import * as reader from "./reader.js";

const passages = byId("passages");
const answer = byId("answer");
const note = byId("search-note");
const more = byId("more-passages");
const again = byId("search-again");
const key = (query, isAsked) => `${isAsked ? "ask" : "search"} ${query}`;
const PIECE = 10;
const MOST_AT_ONCE = 50; // the server gives no more
let working = 0;
let isEmpty = false;
let latest = 0; // answers of questions that were overtaken are not shown
let shown = key("", null); // what the page begins with
let showMore = async () => {};
let made = null; // what was asked last, once it is answered, and how
let hasNew = false; // whether documents have become ready since it was asked
let failed = null; // asks again what the server did not answer
let tell = () => {}; // says in the note what was found, again when more is known of the documents

export function start() {
  byId("search").addEventListener("submit", (event) => { event.preventDefault(); begin(search); });
  byId("ask").addEventListener("click", () => begin(question));
  more.addEventListener("click", () => showMore());
  again.addEventListener("click", () => {
    note.focus({ preventScroll: true }); // the button goes
    run(made.what, made.query);
  });
  address.whenGone(restore);
}

/** Ask again what the address says, unless that is what is shown. */
export function restore({ q = "", ask: isAsked = null }) {
  if (shown === key(q, isAsked)) return;
  byId("query").value = cut(q);
  if (q) run(isAsked ? question : search, q);
  else {
    forget();
    clear();
    shown = key("", null);
    made = null;
    drawAgain();
    setText(note, "");
    byId("search-empty").hidden = false;
    document.body.classList.remove("busy");
    entitle("search", "");
  }
}

/** Take over what the server tells of all documents, and whether some have become ready. */
export function update(status, becameReady) {
  const { is_keyword_only: isKeywordOnly, can_ask: canAsk } = status;
  working = numberOnTheWay(status);
  isEmpty = !Object.values(status.documents).some(Boolean);
  byId("ask").hidden = !canAsk;
  byId("search-hint").hidden = !isKeywordOnly || isEmpty;
  setText(byId("search-hint"), "Keyword search only: there is no embedding model, so ask in the words of the documents.");
  hasNew ||= becameReady;
  drawAgain();
  beLoud(false);
  tell();
}

/** Who listens is told what a search found, and not again whenever a document moves on. */
const beLoud = (isLoud) => note.setAttribute("aria-live", isLoud ? "polite" : "off");

/** Mark the passages of documents that are gone. */
export function markLost(isGone) {
  for (const one of passages.children) if (isGone(Number(one.dataset.document))) lose(one);
}

/** Ask again what the server did not answer, now that it is back. */
export function tryAgain() {
  failed?.();
}

/** A button for who wants to see what is new: passages do not change under the eyes of who reads them. */
function drawAgain() {
  const wasHidden = again.hidden;
  again.hidden = !hasNew || !made;
  if (again.hidden) return;
  setText(again, `${made.what === question ? "Ask" : "Search"} again: documents were added`);
  if (wasHidden) announce("Documents were added since.");
}

function begin(what) {
  const query = byId("query").value.trim();
  if (!query) {
    address.write({ q: null, ask: null });
    restore({});
    byId("query").focus();
    return;
  }
  address.write({ q: query, ask: what === question ? 1 : null });
  run(what, query);
}

/** As much as may be asked: a field limits what is typed, but not what comes with the address. */
const cut = (query) => [...query].slice(0, byId("query").maxLength).join("");

function refuse(query) {
  const [length, limit] = [[...query].length, byId("query").maxLength].map((count) => count.toLocaleString("en"));
  clear();
  document.body.classList.remove("busy");
  setText(note, `The question is too long: it has ${length} characters, and at most ${limit} are taken. The field has the first ${limit} of them.`);
  note.classList.add("error");
}

/** What is asked from now on is all that counts. */
function forget() {
  tell = () => {};
  failed = null;
  hasNew = false;
  return ++latest;
}

async function run(what, query) {
  const number = forget();
  const before = made;
  made = null;
  drawAgain();
  shown = key(query, what === question);
  if (query !== cut(query)) { refuse(query); return; }
  entitle("search", query);
  document.body.classList.add("busy");
  note.classList.remove("error");
  beLoud(true);
  setText(note, what === question ? "Asking the model…" : "Searching…");
  try {
    const show = await what(query);
    if (number !== latest) return;
    made = { what, query };
    beLoud(true);
    show();
    drawAgain();
  } catch (error) {
    if (number === latest) fail(error, what, query, before);
  } finally {
    if (number === latest) document.body.classList.remove("busy");
  }
}

/** Say what went wrong; where that may pass, what was found before stays, and the search is made again by itself. */
function fail(error, what, query, before) {
  const isAway = error.status === 0 || (what === search && error.status >= 500);
  if (isAway) failed = () => run(what, query);
  else clear();
  made = isAway ? before : null;
  hasNew = false;
  shown = "";
  beLoud(true);
  setText(note, sentences(
    error.message,
    isAway && before && passages.children.length > 0 && `What is below was found for “${before.query}”.`,
    isAway && `“${query}” is asked again when the server is back.`,
  ));
  note.classList.add("error");
}

function clear() {
  note.classList.remove("error");
  passages.replaceChildren();
  more.hidden = true;
  answer.replaceChildren();
  answer.hidden = true;
  called.show({ documents: [], hasMore: false });
  byId("search-empty").hidden = true;
  byId("search").closest("section").scrollTop = 0; // what comes is read from its beginning
}

const open = (passage) => reader.open(passage.document_id, passage);

async function search(query) {
  const find = (skip, limit = PIECE) => ask("GET", `search?${new URLSearchParams({ q: query, skip, limit })}`);
  const [results, named] = await Promise.all([findFirst(find, Math.max(PIECE, address.passagesShown())), called.find(query)]);
  return () => {
    clear();
    called.show(named);
    append(results);
    showMore = () => goOn(find);
    tell = () => setText(note, told(query, results.note));
    tell();
  };
}

/** The first passages, as many as are wanted and there are. */
async function findFirst(find, wanted) {
  const results = await find(0, Math.min(wanted, MOST_AT_ONCE));
  while (results.has_more && results.passages.length < wanted) {
    const { passages: some, has_more: hasMore } = await find(results.passages.length, Math.min(wanted - results.passages.length, MOST_AT_ONCE));
    results.passages.push(...some);
    results.has_more = hasMore && some.length > 0;
  }
  return results;
}

/** What was found, as true as it still is: the server's note is of the documents that there were. */
function told(query, said) {
  const count = passages.children.length;
  if (isEmpty) return count ? howMany(count) : "There are no documents to search yet: add some first.";
  const soon = working ? `${plural(working, "document is", "documents are")} still on the way.` : "";
  const since = hasNew && "Documents have become ready since then.";
  return sentences(count ? howMany(count) : !said && `Nothing found for “${query}”.`, said, since, soon);
}

const howMany = (count) => `${more.hidden ? "" : "The first "}${plural(count, "passage")}`;

/** Sentences beside each other; one that stands alone may be a few words. */
function sentences(...some) {
  const given = some.filter(Boolean);
  return given.length === 1 ? given[0] : given.map((one) => (/[.!?…]$/.test(one) ? one : `${one}.`)).join(" ");
}

function append({ passages: some, has_more: hasMore }) {
  const before = passages.children.length;
  passages.append(...some.map((passage, at) => card(passage, before + at + 1, [], open)));
  more.hidden = !hasMore;
}

async function goOn(find) {
  const number = latest;
  const before = passages.children.length;
  more.disabled = true;
  try {
    const results = await find(passages.querySelectorAll(":scope > :not(.lost)").length);
    if (number !== latest) return;
    append(results);
    address.keepPassagesShown(passages.children.length);
    tell();
    passages.children[before]?.focus({ preventScroll: true });
  } catch (error) {
    if (number === latest) setText(note, error.message);
  } finally {
    more.disabled = false;
    if (isFocusLost() && !more.hidden) more.focus(); // while it was disabled it lost the focus
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
    passages.append(...listed.map(({ passage, number }) => card(passage, number, quotedIn(number), open)));
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
