// The list of documents: rows that follow the server's, and what can be done with each.

import { ask } from "./api.js";
import { announce, bytes, byId, make, plural, setText } from "./elements.js";

const STEPS = ["queued", "parsing", "splitting", "embedding"];
const WORDS = {
  queued: "Waiting", parsing: "Reading", splitting: "Splitting", embedding: "Embedding",
  ready: "Ready", failed: "Failed", paused: "Paused", cancelled: "Cancelled",
};
const FILTERS = {
  All: Object.keys(WORDS), Working: STEPS, Ready: ["ready"], Failed: ["failed"], Stopped: ["paused", "cancelled"],
};
const ACTIONS = {
  pause: { label: "Pause", states: STEPS },
  resume: { label: "Resume", states: ["paused"] },
  retry: { label: "Retry", states: ["failed", "cancelled"] },
  cancel: { label: "Cancel", states: [...STEPS, "paused"] },
  delete: { label: "Delete", states: ["ready", "failed", "paused", "cancelled"] },
};

/** @type {Map<number, {document: object, element: HTMLLIElement, parts: object}>} */
const rows = new Map();
const list = byId("documents");
let counts = {};
let filter = "All";

export function start(complain) {
  list.addEventListener("click", async (event) => {
    const button = event.target.closest("button[data-action]");
    if (button) await act(Number(button.closest("li").dataset.id), button.dataset.action, complain);
  });
  byId("older").addEventListener("click", () => showOlder(complain));
  byId("retry-failed").addEventListener("click", async (event) => {
    event.target.disabled = true;
    try {
      const { ids } = await ask("POST", "documents/retry-failed");
      const stay = (counts.failed ?? 0) - ids.length;
      announce(`${plural(ids.length, "document")} tried again.`);
      if (!ids.length && stay > 0) complain("None of these can succeed as it is: their reasons say what to change.");
    } catch (error) {
      complain(error.message);
    } finally {
      event.target.disabled = false;
    }
  });
}

/** Take over what the server tells. */
export function update({ is_whole: isWhole, documents, removed, status }) {
  counts = status.documents;
  if (isWhole) {
    const there = new Set(documents.map((document) => document.id));
    for (const id of [...rows.keys()]) if (!there.has(id)) remove(id);
  }
  removed.forEach(remove);
  // From the oldest: each newer one is put before what is there.
  for (const document of documents.toReversed()) put(document);
  drawAround();
}

export function put(document) {
  const row = rows.get(document.id) ?? add(document);
  const before = row.document.state;
  row.document = document;
  draw(row);
  if (before !== null && before !== document.state && ["ready", "failed"].includes(document.state)) {
    announce(`${document.name} ${document.state === "ready" ? "is ready" : `failed: ${document.reason}`}.`);
  }
}

function add(document) {
  const parts = {
    name: make("span", { class: "name" }),
    state: make("span", { class: "state" }),
    track: make("div", { class: "track", role: "progressbar", "aria-valuemin": "0", "aria-valuemax": "100" },
      ...STEPS.map(() => make("span", {}, make("i")))),
    meta: make("p", { class: "fine meta" }),
    reason: make("p", { class: "reason" }),
    actions: make("p", { class: "actions" }),
  };
  const element = make("li", { class: "document" },
    make("div", { class: "line" }, parts.name, parts.state), parts.track, parts.reason,
    make("div", { class: "line" }, parts.meta, parts.actions));
  element.dataset.id = document.id;
  const row = { document: { ...document, state: null }, element, parts };
  rows.set(document.id, row);
  const after = [...list.children].find((other) => Number(other.dataset.id) < document.id);
  list.insertBefore(element, after ?? null);
  return row;
}

function remove(id) {
  const row = rows.get(id);
  if (!row) return;
  // Whoever was at this row with the keyboard goes on at the next one.
  if (row.element.contains(document.activeElement)) {
    const near = row.element.nextElementSibling ?? row.element.previousElementSibling;
    (near?.querySelector("button") ?? byId("choose-files")).focus();
  }
  row.element.remove();
  rows.delete(id);
}

function draw({ document, element, parts }) {
  element.dataset.state = document.state;
  setText(parts.name, document.name);
  parts.name.title = document.uris.map(shownUri).join("\n") || document.name;
  setText(parts.state, WORDS[document.state]);
  const at = STEPS.indexOf(document.state);
  parts.track.hidden = at < 0;
  if (at >= 0) drawTrack(parts.track, at, document);
  const facts = [bytes(document.size_bytes)];
  if (document.chunks) facts.push(plural(document.chunks, "passage"));
  if (document.state !== "ready" && document.is_found) facts.push("found by search");
  setText(parts.meta, facts.join(" · "));
  setText(parts.reason, document.state === "failed" ? document.reason ?? "" : "");
  parts.reason.hidden = !parts.reason.textContent;
  drawActions(parts.actions, document);
  element.hidden = !FILTERS[filter].includes(document.state);
}

function drawTrack(track, at, { state, embedded, chunks }) {
  const done = state === "embedding" && chunks ? embedded / chunks : 0;
  [...track.children].forEach((step, number) => {
    step.className = number < at ? "done" : number === at ? "now" : "";
    step.firstChild.style.setProperty("--done", number === at ? done : number < at ? 1 : 0);
  });
  track.setAttribute("aria-valuenow", Math.round(((at + done) / STEPS.length) * 100));
  track.setAttribute("aria-valuetext", done ? `${WORDS[state]}: ${embedded} of ${chunks}` : WORDS[state]);
}

function drawActions(actions, document) {
  const wanted = Object.keys(ACTIONS).filter((name) => ACTIONS[name].states.includes(document.state));
  // A new button under the pointer, or in place of the one that has the focus, would be pressed by mistake.
  for (const button of [...actions.children]) if (!wanted.includes(button.dataset.action)) button.remove();
  for (const [place, name] of wanted.entries()) {
    if (actions.children[place]?.dataset.action === name) continue;
    const label = ACTIONS[name].label;
    const button = make("button", { type: "button", class: "quiet", "aria-label": `${label} ${document.name}` }, label);
    button.dataset.action = name;
    actions.insertBefore(button, actions.children[place] ?? null);
  }
}

/** The path of an upload or a file as people know it. */
function shownUri(uri) {
  try {
    return decodeURIComponent(uri.replace(/^upload:\/\/\//, "").replace(/^file:\/\//, ""));
  } catch {
    return uri;
  }
}

async function act(id, action, complain) {
  const row = rows.get(id);
  if (action === "delete" && !(await isSure(row.document.name))) return;
  const buttons = [...row.parts.actions.children];
  buttons.forEach((button) => { button.disabled = true; });
  try {
    if (action === "delete") {
      await ask("DELETE", `documents/${id}`);
      announce(`${row.document.name} was deleted.`);
      remove(id);
      drawAround();
    } else {
      put(await ask("POST", `documents/${id}/${action}`));
      row.parts.actions.querySelector("button")?.focus();
    }
  } catch (error) {
    if (error.status === 404) remove(id);
    else complain(error.message);
  } finally {
    buttons.forEach((button) => { button.disabled = false; });
  }
}

function isSure(name) {
  const dialog = byId("confirm");
  byId("confirm-title").textContent = `Delete ${name}?`;
  dialog.returnValue = "keep";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "delete"), { once: true });
  });
}

async function showOlder(complain) {
  const ids = [...rows.values()].filter(({ element }) => !element.hidden).map(({ document }) => document.id);
  const query = new URLSearchParams(FILTERS[filter].map((state) => ["state", state]));
  if (ids.length) query.set("before", Math.min(...ids));
  try {
    const page = await ask("GET", `documents?${query}`);
    page.documents.forEach(put);
    drawAround();
  } catch (error) {
    complain(error.message);
  }
}

/** What stands around the rows: filters with their counts, the buttons for all, and what to do when there is nothing. */
function drawAround() {
  const number = (name) => FILTERS[name].reduce((sum, state) => sum + (counts[state] ?? 0), 0);
  const total = number("All");
  if (filter !== "All" && !number(filter)) filter = "All";
  const shown = Object.keys(FILTERS).filter((name) => name === "All" || name === filter || number(name));
  const filters = byId("filters");
  filters.hidden = total === 0;
  document.body.classList.toggle("bare", total === 0);
  for (const button of [...filters.children]) if (!shown.includes(button.dataset.filter)) button.remove();
  shown.forEach((name, place) => {
    let button = [...filters.children].find((one) => one.dataset.filter === name);
    if (!button) {
      button = make("button", { type: "button" }, make("span", {}, name), make("b"));
      button.dataset.filter = name;
      button.addEventListener("click", () => { filter = name; drawAround(); });
      filters.insertBefore(button, filters.children[place] ?? null);
    }
    button.setAttribute("aria-pressed", String(name === filter));
    setText(button.lastChild, number(name).toLocaleString("en"));
  });
  let visible = 0;
  for (const { document, element } of rows.values()) {
    element.hidden = !FILTERS[filter].includes(document.state);
    visible += element.hidden ? 0 : 1;
  }
  byId("older").hidden = visible >= number(filter);
  byId("no-match").hidden = visible > 0 || total === 0 || !byId("older").hidden;
  byId("retry-failed").hidden = !counts.failed;
}
