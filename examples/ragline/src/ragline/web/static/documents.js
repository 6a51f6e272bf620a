// The documents: rows that follow the server's, and what can be done with each.

import { ask } from "./api.js";
import { announce, bytes, byId, make, moment, plural, setText, take } from "./elements.js";
import * as reader from "./reader.js";

const STEPS = ["queued", "parsing", "splitting", "embedding"];
const WORDS = {
  queued: "Waiting", parsing: "Reading", splitting: "Splitting", embedding: "Embedding",
  ready: "Ready", failed: "Failed", paused: "Paused", cancelled: "Cancelled",
};
export const FILTERS = {
  All: Object.keys(WORDS), Working: STEPS, Ready: ["ready"], Failed: ["failed"], Stopped: ["paused", "cancelled"],
};
export const ACTIONS = {
  pause: { label: "Pause", done: "paused", states: STEPS },
  resume: { label: "Resume", done: "resumed", states: ["paused"] },
  retry: { label: "Retry", done: "tried again", states: ["failed", "cancelled"] },
  cancel: { label: "Cancel", done: "cancelled", states: [...STEPS, "paused"] },
  delete: { label: "Delete", done: "deleted", states: ["ready", "failed", "paused", "cancelled"] },
};

const PLACES_NAMED = 3;

/** @type {Map<number, {document: object, element: HTMLLIElement, parts: object}>} */
export const rows = new Map();
export const list = byId("documents");
let complain = () => {};
let changed = () => {};
let lost = () => {};
let hasWorker = true;
const busy = new Set(); // the ids of those with which something is being done
const left = new Map(); // the places where documents stood that are gone, by id
/** How many documents were ready at the last update, and the newest document then. */
let readyBefore = null;
let newestBefore = 0;

/** How many documents are on their way, as the server counts them. */
export const numberOnTheWay = (status) => STEPS.reduce((sum, state) => sum + status.documents[state], 0);
/** Whether anybody works, as far as is known: who moves documents on need not have answered yet. */
export const isAnyoneWorking = (status) => status.is_worked_on || status.workers === null || status.workers.length > 0;

/**
 * @param {object} told
 * @param {(text: string) => void} told.whenWrong
 * @param {() => void} told.whenChanged
 * @param {(isGone: (id: number) => boolean) => void} told.whenGone
 */
export function start({ whenWrong, whenChanged, whenGone }) {
  complain = whenWrong;
  changed = whenChanged;
  lost = whenGone;
  list.addEventListener("click", async (event) => {
    const id = Number(event.target.closest("li")?.dataset.id);
    const action = event.target.closest("button[data-action]")?.dataset.action;
    if (action) await act(id, action);
    else if (event.target.closest("button.name")) reader.open(id);
  });
  list.addEventListener("change", () => changed());
}

/**
 * Take over what the server tells.
 * @returns {boolean} whether documents have become ready since the last update
 */
export function update({ is_whole: isWhole, documents, removed, status }) {
  const had = hasWorker;
  hasWorker = isAnyoneWorking(status);
  const becameReady = haveBecomeReady(documents, status);
  let isGone = (id) => removed.includes(id);
  if (isWhole) {
    const there = new Set(documents.map((document) => document.id));
    for (const id of [...rows.keys()]) if (!there.has(id)) remove(id);
    const oldest = there.size < numberOfAll(status) ? Math.min(...there) : 0; // older ones are not told
    isGone = (id) => id >= oldest && !there.has(id);
  }
  removed.forEach(remove);
  documents.forEach(put);
  if (isWhole || removed.length) lost(isGone);
  if (had !== hasWorker) rows.forEach(draw);
  return becameReady;
}

const numberOfAll = (status) => Object.values(status.documents).reduce((sum, count) => sum + count, 0);

/** By their rows, or by the count where they are too many to be told one by one. */
function haveBecomeReady(documents, status) {
  const isNew = ({ id, state }) => state === "ready" && (rows.has(id) ? rows.get(id).document.state !== state : id > newestBefore);
  const have = readyBefore !== null && (status.documents.ready > readyBefore || documents.some(isNew));
  readyBefore = status.documents.ready;
  newestBefore = Math.max(newestBefore, ...documents.map(({ id }) => id));
  return have;
}

/** Show a document as it is now. */
export function put(document) {
  const row = rows.get(document.id) ?? add(document);
  const before = row.document.state;
  row.document = document;
  draw(row);
  if (before !== null && before !== document.state && ["ready", "failed"].includes(document.state)) {
    announce(`${document.name} ${document.state === "ready" ? "is ready" : `failed: ${document.reason}`}.`);
  }
}

/** Whether an action makes sense for a document now: nothing helps one that can never be read. */
export function canBe(action, document) {
  return ACTIONS[action].states.includes(document.state) && !(action === "retry" && document.state === "failed" && document.is_permanent);
}

export const isSelected = ({ parts }) => parts.check.checked;

function add(document) {
  const parts = {
    check: make("input", { type: "checkbox" }),
    name: make("button", { type: "button", class: "name", "aria-haspopup": "dialog" }),
    state: make("span", { class: "state" }),
    track: make("div", { class: "track", role: "progressbar", "aria-valuemin": "0", "aria-valuemax": "100" },
      ...STEPS.map(() => make("span", {}, make("i")))),
    meta: make("p", { class: "fine meta" }),
    reason: make("p", { class: "reason" }),
    actions: make("p", { class: "actions" }),
  };
  const element = make("li", { class: "document" },
    make("label", { class: "check" }, parts.check),
    make("div", { class: "about" },
      make("div", { class: "line" }, parts.name, parts.state), parts.track, parts.reason,
      make("div", { class: "line" }, parts.meta, parts.actions)));
  element.dataset.id = document.id;
  const row = { document: { ...document, state: null }, element, parts };
  rows.set(document.id, row);
  return row;
}

/**
 * The document that has replaced another, if one has.
 * @param {number} id
 * @param {string[]} uris the places of the other, as far as they are known
 */
export function successor(id, uris) {
  const places = new Set([...uris, ...(left.get(id) ?? [])]);
  const found = [...rows.values()].map(({ document }) => document).filter((document) => document.is_found);
  return found.find((document) => document.id > id && document.uris.some((uri) => places.has(uri)))?.id;
}

export function remove(id) {
  const row = rows.get(id);
  if (!row) return;
  // Whoever was at this row with the keyboard goes on at the next one.
  const next = row.element.nextElementSibling ?? row.element.previousElementSibling;
  take(row.element, () => goTo(next));
  rows.delete(id);
  left.set(id, row.document.uris);
}

/** Put the focus on a row, or where documents come from if there is none. */
export function goTo(element) {
  (element?.querySelector("button.name") ?? byId("choose-files")).focus();
}

function draw({ document, element, parts }) {
  const isHopeless = document.state === "failed" && document.is_permanent;
  element.dataset.state = isHopeless ? "unreadable" : document.state;
  setText(parts.name, document.name);
  parts.name.title = document.uris.map(reader.shownUri).join("\n") || document.name;
  parts.check.setAttribute("aria-label", `Select ${document.name}`);
  const waits = STEPS.includes(document.state) && !hasWorker;
  setText(parts.state, isHopeless ? "Cannot be read" : waits ? "Waits for a worker" : WORDS[document.state]);
  const at = STEPS.indexOf(document.state);
  parts.state.title = document.since ? `since ${moment(document.since)}` : "";
  parts.track.hidden = at < 0;
  if (at >= 0) drawTrack(parts.track, at, document);
  setText(parts.meta, facts(document).join(" · "));
  setText(parts.reason, document.state === "failed" ? document.reason ?? "" : "");
  parts.reason.hidden = !parts.reason.textContent;
  drawActions(parts, document);
}

function facts(document) {
  const told = [bytes(document.size_bytes)];
  const done = document.state === "embedding" ? `${document.embedded.toLocaleString("en")} of ` : "";
  if (document.chunks) told.push(`${done}${plural(document.chunks, "passage")}`);
  const until = ["failed", "cancelled"].includes(document.state) ? "still found" : "found until it is ready";
  if (document.is_newer) told.push(`a new version; the one before is ${until}`);
  if (document.uris.length > 1) told.push(`in ${document.uris.length} places`);
  return told;
}

function drawTrack(track, at, { state, embedded, chunks }) {
  const done = state === "embedding" && chunks ? embedded / chunks : 0;
  [...track.children].forEach((step, number) => {
    step.className = number < at ? "done" : number === at ? "now" : "";
    step.firstChild.style.setProperty("--done", number === at ? done : number < at ? 1 : 0);
  });
  track.setAttribute("aria-label", "Progress");
  track.setAttribute("aria-valuenow", Math.round(((at + done) / STEPS.length) * 100));
  track.setAttribute("aria-valuetext", done ? `${WORDS[state]}: ${embedded} of ${chunks}` : WORDS[state]);
}

function drawActions({ actions, name: nameButton }, document) {
  const wanted = Object.keys(ACTIONS).filter((name) => canBe(name, document));
  // A new button under the pointer, or in place of the one that has the focus, would be pressed by mistake.
  for (const button of [...actions.children]) if (!wanted.includes(button.dataset.action)) take(button, () => nameButton.focus());
  for (const [place, name] of wanted.entries()) {
    const label = ACTIONS[name].label;
    const known = actions.children[place];
    if (known?.dataset.action === name) {
      known.setAttribute("aria-label", `${label} ${document.name}`);
      continue;
    }
    const button = make("button", { type: "button", class: "quiet", "aria-label": `${label} ${document.name}` }, label);
    button.dataset.action = name;
    actions.insertBefore(button, known ?? null);
  }
}

async function act(id, action) {
  if (busy.has(id)) return;
  const row = rows.get(id);
  const { name } = row.document;
  if (action === "delete" && !(await isSure([row.document]))) return;
  busy.add(id); // a button that is disabled loses the focus
  try {
    await perform(id, action);
    if (action === "delete") announce(`${name} was deleted.`);
    else if (row.element.contains(document.activeElement)) row.parts.actions.querySelector("button")?.focus();
  } catch (error) {
    complain(error.message);
  } finally {
    busy.delete(id);
    changed();
  }
}

/** Do something with a document; one that is gone meanwhile is taken off the page. */
export async function perform(id, action) {
  try {
    if (action === "delete") {
      await ask("DELETE", `documents/${id}`);
      forget(id);
    } else {
      put(await ask("POST", `documents/${id}/${action}`));
    }
  } catch (error) {
    if (error.status !== 404) throw error;
    forget(id);
  }
}

function forget(id) {
  remove(id);
  lost((other) => other === id);
}

/**
 * Ask before documents are lost, from every place where they stand.
 * @param {object[]} documents
 * @param {number} others how many more are selected, which cannot be deleted now
 */
export function isSure(documents, others = 0) {
  const dialog = byId("confirm");
  const isOne = documents.length === 1;
  setText(byId("confirm-title"), `Delete ${isOne ? documents[0].name : plural(documents.length, "document")}?`);
  const isFound = documents.some((document) => document.is_found);
  const lost = isFound ? `${isOne ? "Its" : "Their"} passages will no longer be found.` : "";
  const stay = others && `${plural(others, "other that is selected is worked on and stays", "others that are selected are worked on and stay")}.`;
  const words = [placesLost(documents), versionsKept(documents), lost, stay, "This cannot be undone."];
  setText(byId("confirm-words"), words.filter(Boolean).join(" "));
  dialog.returnValue = "keep";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "delete"), { once: true });
  });
}

function versionsKept(documents) {
  if (!documents.some((document) => document.is_newer)) return "";
  return documents.length === 1 ? "The version before it stays." : "Versions before them that are not selected stay.";
}

function placesLost(documents) {
  const uris = documents.flatMap((document) => document.uris);
  if (uris.length <= documents.length) return "";
  if (documents.length > 1) return `They are deleted from all ${uris.length.toLocaleString("en")} places where they stand.`;
  const others = uris.slice(1);
  const named = others.slice(0, PLACES_NAMED).map(reader.shownUri).join(", ");
  return `It is deleted from here and from ${plural(others.length, "other place")}: ${named}${others.length > PLACES_NAMED ? " and more" : ""}.`;
}
