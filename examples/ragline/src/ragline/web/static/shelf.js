// Which of the documents are shown and in which order: filtered, sorted, selected, and older ones fetched.

import * as address from "./address.js";
import { ask } from "./api.js";
import { ACTIONS, FILTERS, canBe, goTo, isAnyoneWorking, isSelected, isSure, list, perform, put, rows } from "./documents.js";
import { announce, byId, isFocusLost, make, plural, setText, take } from "./elements.js";
import { shownUri } from "./reader.js";

const PAGE = 100;
const FIRST_SHOWN = 50;
const ACTS_AT_ONCE = 4;
const collator = new Intl.Collator(undefined, { numeric: true, sensitivity: "base" });
const ORDERS = {
  newest: (one, other) => other.id - one.id,
  oldest: (one, other) => one.id - other.id,
  name: (one, other) => collator.compare(one.name, other.name) || other.id - one.id,
  largest: (one, other) => other.size_bytes - one.size_bytes || other.id - one.id,
};

let counts = {};
let hasWorker = true;
let retryable = 0;
let filter = "All";
let called = "";
let order = "newest";
/** The ids that the server lists for what is wanted, where this page does not know all documents; else null. */
let listed = null;
let hasMore = false;
/** The newest document when the server began to list: newer ones are told by its events. */
let newestListed = 0;
/** All documents from this one on are known; of older ones those that the server listed for something else. */
let floor = 0;
let latest = 0;
/** Whether something else than the plain list is wanted, since before it is known what there is. */
let isAwaited = false;
/** How many of those that are wanted are shown. */
let limit = FIRST_SHOWN;
let typing;
let isRetrying = false;
/** The row that was selected, or taken out of the selection, last. */
let selectedLast = null;
let complain = () => {};

export function start({ whenWrong }) {
  complain = whenWrong;
  byId("called").addEventListener("input", (event) => {
    called = event.target.value.trim().toLowerCase();
    clearTimeout(typing);
    typing = setTimeout(choose, 150);
  });
  byId("order").addEventListener("change", (event) => { order = event.target.value; choose(); });
  byId("older").addEventListener("click", showMore);
  byId("select-all").addEventListener("change", (event) => {
    for (const { parts } of shown()) parts.check.checked = event.target.checked;
    refresh();
  });
  list.addEventListener("click", ({ target, shiftKey }) => {
    if (target.matches(".check input")) select(target.closest("li"), target.checked, shiftKey);
  });
  byId("unselect").addEventListener("click", () => {
    for (const { parts } of rows.values()) parts.check.checked = false;
    refresh();
    byId("select-all").focus();
  });
  byId("selected-actions").addEventListener("click", (event) => {
    const action = event.target.closest("button[data-action]")?.dataset.action;
    if (action) actOnSelected(action);
  });
  byId("retry-failed").addEventListener("click", retryFailed);
  address.whenGone(restore);
}

/** Show what the address says, as far as there is such a thing. */
export function restore({ show = "", called: words = "", order: by = "newest" }) {
  const before = [filter, called, order].join();
  filter = Object.keys(FILTERS).find((name) => name.toLowerCase() === show) ?? "All";
  order = Object.hasOwn(ORDERS, by) ? by : "newest";
  const name = words.slice(0, byId("called").maxLength);
  called = name.trim().toLowerCase();
  if (before === [filter, called, order].join()) return;
  byId("called").value = name;
  byId("order").value = order;
  if (isKnown()) change();
  else isAwaited = true;
}

/** Somebody wants something else: the address says so from now on. */
function choose() {
  tell();
  change();
}

function tell() {
  address.rewrite({
    show: filter === "All" ? null : filter.toLowerCase(),
    called: byId("called").value.trim() || null,
    order: order === "newest" ? null : order,
  });
}

/** Whether the server has said yet what there is. */
const isKnown = () => Object.keys(counts).length > 0;

export function update({ is_whole: isWhole, documents, status }) {
  counts = status.documents;
  hasWorker = isAnyoneWorking(status);
  retryable = status.retryable;
  if (isWhole) floor = Math.min(...documents.map(({ id }) => id), Infinity);
  if (isWhole && (listed || isAwaited)) change();
  else {
    keepInHand();
    refresh();
  }
}

/** Newer documents do not push off the list what somebody has selected, or is at. */
function keepInHand() {
  const isHeld = (row) => isSelected(row) || row.element.contains(document.activeElement);
  limit = Math.max(limit, wanted().findLastIndex(isHeld) + 1);
}

const number = (name) => FILTERS[name].reduce((sum, state) => sum + (counts[state] ?? 0), 0);

/** Something else is wanted: from what is known, or from the server where that is not all. */
async function change() {
  clearTimeout(typing);
  isAwaited = false;
  listed = null;
  hasMore = false;
  limit = FIRST_SHOWN;
  if (knowsAll() || isPlain()) refresh();
  else {
    listed = [];
    newestListed = Math.max(0, ...rows.keys());
    await fetchMore();
  }
}

const knowsAll = () => rows.size >= number("All");
const isPlain = () => order === "newest" && !called && filter === "All";

async function showMore() {
  const before = list.children.length;
  limit = before + PAGE;
  if (wanted().length < limit && !isAllListed()) await fetchMore();
  else refresh();
  const next = list.children[before];
  next?.querySelector("button.name").focus({ preventScroll: true }); // the next key does not begin at the end again
  announce(`${plural(list.children.length - before, "more document")} shown.`);
}

/** Whether the server has no more of what is wanted. */
const isAllListed = () => (listed ? !hasMore : knowsAll() || !isPlain());

async function fetchMore() {
  const asked = ++latest;
  const query = new URLSearchParams(FILTERS[filter].map((state) => ["state", state]));
  query.set("limit", PAGE);
  if (called) query.set("called", called);
  if (listed) {
    query.set("order", order);
    query.set("skip", listed.length);
  } else if (Number.isFinite(floor)) query.set("before", floor);
  try {
    const page = await ask("GET", `documents?${query}`);
    if (asked !== latest) return;
    page.documents.forEach(put);
    const ids = page.documents.map((document) => document.id);
    if (listed) listed.push(...ids);
    else floor = Math.min(floor, ...ids);
    hasMore = page.has_more;
  } catch (error) {
    complain(error.message);
  }
  refresh();
}

function isWanted({ document }) {
  if (!FILTERS[filter].includes(document.state)) return false;
  const words = called.split(/\s+/);
  const isCalled = (text) => words.every((word) => text.toLowerCase().includes(word));
  return !called || [document.name, ...document.uris.map(shownUri)].some(isCalled);
}

function wanted() {
  if (listed) {
    const newer = [...rows.keys()].filter((id) => id > newestListed).sort((one, other) => other - one);
    return [...new Set([...newer, ...listed])].map((id) => rows.get(id)).filter((row) => row && isWanted(row));
  }
  const isKnown = knowsAll() ? () => true : ({ document }) => document.id >= floor;
  return [...rows.values()].filter((row) => isKnown(row) && isWanted(row)).sort((one, other) => ORDERS[order](one.document, other.document));
}

const shown = () => [...list.children].map((element) => rows.get(Number(element.dataset.id))).filter(Boolean);

/** Draw what changed: the rows in their order, and what stands around them. */
export function refresh() {
  if (filter !== "All" && isKnown() && !number(filter)) {
    filter = "All";
    tell();
  }
  const all = wanted();
  const now = all.slice(0, limit);
  place(now.map((row) => row.element));
  const total = number("All");
  document.body.classList.toggle("bare", total === 0);
  byId("shelf").hidden = total === 0;
  setText(byId("documents-count"), total.toLocaleString("en"));
  drawFilters(all.length);
  drawOlder(all.length, now.length);
  byId("no-match").hidden = now.length > 0 || total === 0 || !byId("older").hidden;
  setText(byId("no-match"), called ? `No document is called “${called}”.` : "No document is in this state.");
  drawRetry();
  drawSelection(now);
}

function drawRetry() {
  const button = byId("retry-failed");
  if (!retryable && document.activeElement === button) byId("documents-title").focus({ preventScroll: true });
  button.hidden = !retryable;
}

function drawOlder(known, shownNow) {
  const isAll = isAllListed();
  byId("older").hidden = isAll && known <= shownNow;
  // How many more have a name the server alone could count.
  const left = (isAll ? known : number(filter)) - shownNow;
  setText(byId("older"), `Show more documents${isAll || !called ? ` (${left.toLocaleString("en")} left)` : ""}`);
}

/** Put the focus above the list: on what selects all of it, or on the filter of a list that is empty. */
function goToTop(number) {
  (number ? byId("select-all") : byId("filters").querySelector("[aria-pressed=true]")).focus();
}

/** Move as few elements as need be: one that moves loses the focus. */
function place(elements) {
  const keep = new Set(elements);
  for (const element of [...list.children]) {
    if (keep.has(element)) continue;
    take(element, () => goToTop(elements.length));
  }
  let next = list.firstElementChild;
  for (const element of elements) {
    if (element === next) next = next.nextElementSibling;
    else list.insertBefore(element, next);
  }
}

/** The filter that is chosen tells how many of its documents have the name that is wanted, as far as they are listed. */
function drawFilters(known) {
  const names = Object.keys(FILTERS).filter((name) => name === "All" || name === filter || number(name));
  const filters = byId("filters");
  const gone = [...filters.children].filter((button) => !names.includes(button.dataset.filter));
  for (const button of gone) take(button, () => filters.firstElementChild.focus());
  names.forEach((name, at) => {
    let button = [...filters.children].find((one) => one.dataset.filter === name);
    if (!button) {
      button = make("button", { type: "button" }, make("span"), make("b"));
      button.dataset.filter = name;
      button.addEventListener("click", () => { filter = name; choose(); });
      filters.insertBefore(button, filters.children[at] ?? null);
    }
    button.setAttribute("aria-pressed", String(name === filter));
    setText(button.firstChild, name === "Working" && !hasWorker ? "Waiting" : name);
    const named = called && name === filter ? `${known.toLocaleString("en")}${isAllListed() ? "" : "+"} of ` : "";
    setText(button.lastChild, `${named}${number(name).toLocaleString("en")}`);
  });
}

function drawSelection(now) {
  // What is not shown is not selected: nobody deletes what they do not see.
  const visible = new Set(now);
  for (const row of rows.values()) if (!visible.has(row)) row.parts.check.checked = false;
  const selected = now.filter(isSelected);
  const all = byId("select-all");
  all.checked = selected.length > 0 && selected.length === now.length;
  all.indeterminate = selected.length > 0 && selected.length < now.length;
  all.disabled = now.length === 0;
  byId("selection").hidden = selected.length === 0;
  byId("unselected").hidden = selected.length > 0;
  drawNumbers(selected.length, now.length);
  const actions = byId("selected-actions");
  const names = Object.keys(ACTIONS).filter((name) => selected.some(({ document }) => canBe(name, document)));
  for (const button of [...actions.children]) if (!names.includes(button.dataset.action)) take(button, () => byId("unselect").focus());
  names.forEach((name, at) => {
    if (actions.children[at]?.dataset.action === name) return;
    const button = make("button", { type: "button", class: "quiet" }, ACTIONS[name].label);
    button.dataset.action = name;
    actions.insertBefore(button, actions.children[at] ?? null);
  });
}

/** Nobody takes those that are shown for all that there are. */
function drawNumbers(selected, shownNow) {
  const hasOthers = !byId("older").hidden;
  const number = shownNow.toLocaleString("en");
  byId("select-all").setAttribute("aria-label", `Select all ${hasOthers ? `${number} ` : ""}that are shown`);
  setText(byId("unselected"), hasOthers ? `Select all ${number} that are shown` : "Select all");
  const isAllShown = hasOthers && selected === shownNow;
  setText(byId("selected-count"), isAllShown ? `The ${number} that are shown are selected` : `${selected.toLocaleString("en")} selected`);
}

/** With the shift key all rows go with it, from the one that was selected last. */
function select(element, isChosen, isRange) {
  const all = [...list.children];
  const before = isRange ? all.indexOf(selectedLast) : -1;
  selectedLast = element;
  if (before < 0) return;
  const [from, to] = [before, all.indexOf(element)].sort((one, other) => one - other);
  for (const { parts } of shown().slice(from, to + 1)) parts.check.checked = isChosen;
}

/** The row that comes after some that go, or the one before them. */
function neighbour(going) {
  const all = [...list.children];
  const goes = (element) => going.has(Number(element.dataset.id));
  const first = Math.max(0, all.findIndex(goes));
  return all.slice(first).find((element) => !goes(element)) ?? all[first - 1];
}

async function actOnSelected(action) {
  const selected = wanted().filter(isSelected).map(({ document }) => document);
  const chosen = selected.filter((document) => canBe(action, document));
  if (action === "delete" && !(await isSure(chosen, selected.length - chosen.length))) return;
  const near = neighbour(new Set(chosen.map(({ id }) => id)));
  const errors = [];
  const waiting = [...chosen];
  const work = async () => {
    for (let document = waiting.shift(); document; document = waiting.shift()) {
      try {
        await perform(document.id, action);
      } catch (error) {
        errors.push(error.message);
      }
    }
  };
  await Promise.all(Array.from({ length: ACTS_AT_ONCE }, work));
  announce(`${plural(chosen.length - errors.length, "document")} ${ACTIONS[action].done}.`);
  if (errors.length) complain(errors.length === 1 ? errors[0] : `${errors[0]} ${plural(errors.length - 1, "more document")} could not be done either.`);
  refresh();
  if (!isFocusLost()) return;
  if (action === "delete") goTo(near?.isConnected ? near : null);
  else goToTop(list.children.length);
}

async function retryFailed() {
  if (isRetrying) return;
  isRetrying = true; // a button that is disabled loses the focus
  try {
    const { ids } = await ask("POST", "documents/retry-failed");
    announce(`${plural(ids.length, "document")} tried again.`);
  } catch (error) {
    complain(error.message);
  } finally {
    isRetrying = false;
  }
}
