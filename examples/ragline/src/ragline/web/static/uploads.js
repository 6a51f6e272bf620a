// Files on their way to the server, a few at a time, and those that it refused.

import { send } from "./api.js";
import * as choosing from "./choosing.js";
import { announce, bytes, byId, make, plural, setText } from "./elements.js";
import { Notes, dismiss, say } from "./notes.js";

const AT_ONCE = 3;
const ROWS_SHOWN = 5;
const ROWS_REFUSED = 3; // for one reason, of one choice of files
const tray = byId("uploads");
const waiting = [];
const running = new Set();
const failed = new Set(); // for a reason that may pass
let total = 0; // how many files have come since none was on its way
let added = () => {};

const summary = {
  text: make("span", { class: "name" }),
  progress: make("progress", { max: 1, value: 0, "aria-label": "Uploads" }),
};
summary.element = make("li", { class: "document" }, summary.text, summary.progress);

export function start(whenAdded) {
  added = whenAdded;
  choosing.start(offer);
}

/** Upload again what failed for a reason that may have passed. */
export function tryAgain() {
  const again = [...failed];
  again.forEach(forget);
  begin(again);
}

function offer(files, leftOut) {
  const notes = new Notes();
  notes.add("leftOut", leftOut);
  if (files.length) announce(`${plural(files.length, "file")} to upload.`);
  const refused = new Map();
  begin(files.map(({ file, name }) => ({ file, name, notes, refused, row: null })));
}

function begin(uploads) {
  for (const upload of uploads) {
    if (upload.file.size > choosing.maxBytes()) refuse(upload, `It is larger than the limit of ${bytes(choosing.maxBytes())}.`, false);
    else {
      upload.share = 0;
      waiting.push(upload);
      total += 1;
    }
  }
  go();
}

function go() {
  while (running.size < AT_ONCE && waiting.length) {
    const upload = waiting.shift();
    running.add(upload);
    carry(upload).finally(() => { running.delete(upload); go(); });
  }
  draw();
  if (running.size) {
    addEventListener("beforeunload", askToStay);
    return;
  }
  removeEventListener("beforeunload", askToStay);
  total = 0;
  say();
}

/** What is not sent yet would be lost without a word when the page is left. */
function askToStay(event) {
  event.preventDefault();
  event.returnValue = true; // for browsers that do not go by the line above
}

async function carry(upload) {
  try {
    const { outcome, document } = await send(upload.file, upload.name, (share) => { upload.share = share; drawShare(upload); });
    forget(upload);
    if (outcome === "unchanged" || outcome === "duplicate") upload.notes.add(document.is_found ? "here" : "unready", [nameHere(upload.name, document.name)]);
    if (outcome === "replaced") upload.notes.add("replaced", [upload.name]);
    if (outcome === "failed") upload.notes.add("unreadable", [{ name: nameHere(upload.name, document.name), reason: document.reason }]);
    added(document);
  } catch (error) {
    refuse(upload, error.message, error.status === 0 || error.status >= 500);
  }
}

/** The name of a file that is here, and the one that it has here if that is another. */
function nameHere(name, known) {
  const [own, other] = [name, known].map((path) => path.split("/").at(-1));
  return own === other ? name : `${name} (as ${known})`;
}

/** A row for each of a few files, one line for many. */
function draw() {
  const isMany = total > ROWS_SHOWN;
  for (const upload of [...running, ...waiting]) {
    if (isMany) forget(upload);
    else setText((upload.row ??= line(upload.name)).state, running.has(upload) ? "Uploading" : "Waiting");
  }
  drawSummary();
}

function drawShare(upload) {
  if (upload.row) upload.row.progress.value = upload.share;
  else drawSummary();
}

function drawSummary() {
  const left = running.size + waiting.length;
  if (total <= ROWS_SHOWN || !left) {
    summary.element.remove();
    return;
  }
  if (!summary.element.isConnected) tray.prepend(summary.element);
  const done = total - left;
  setText(summary.text, `Uploading ${(done + 1).toLocaleString("en")} of ${total.toLocaleString("en")}`);
  summary.progress.value = [...running].reduce((sum, { share }) => sum + share, done) / total;
}

function line(name) {
  const progress = make("progress", { max: 1, value: 0, "aria-label": `Upload of ${name}` });
  const state = make("span", { class: "state" });
  const element = make("li", { class: "document" }, make("div", { class: "line" }, make("span", { class: "name", title: name }, name), state), progress);
  tray.append(element);
  return { element, progress, state };
}

function forget(upload) {
  failed.delete(upload);
  if (!upload.row) return;
  if (upload.row.element.contains(document.activeElement)) byId("choose-files").focus();
  upload.row.element.remove();
  upload.row = null;
}

/** Whether a file is told of in one line with others: those that were refused for one reason are a row each if they are few. */
function isTogether(upload, reason) {
  const same = upload.refused.get(reason) ?? [];
  upload.refused.set(reason, [...same, upload]);
  if (same.length < ROWS_REFUSED) return false;
  const untold = same.length === ROWS_REFUSED ? [...same, upload] : [upload];
  untold.forEach(forget);
  upload.notes.add("refused", untold.map(({ name }) => name), reason);
  return true;
}

function refuse(upload, reason, mayPass) {
  if (!mayPass && isTogether(upload, reason)) return;
  const { name } = upload;
  const row = upload.row ??= line(name);
  row.element.dataset.state = "failed";
  row.progress.remove();
  setText(row.state, "Not taken");
  announce(`${name} was not taken: ${reason}`);
  const actions = make("p", { class: "actions" });
  if (mayPass) {
    failed.add(upload);
    actions.append(make("button", {
      type: "button", class: "quiet", "aria-label": `Upload ${name} again`, onclick: () => { forget(upload); begin([upload]); },
    }, "Again"));
  }
  actions.append(dismiss(row.element, name, () => failed.delete(upload)));
  row.element.append(make("div", { class: "line" }, make("p", { class: "reason" }, reason), actions));
}
