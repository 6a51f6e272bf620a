// Files and folders on their way to the server, a few at a time, and those that it refused.

import { ask, send } from "./api.js";
import { announce, bytes, byId, make, plural, setText } from "./elements.js";

const AT_ONCE = 3;
const tray = byId("uploads");
const drop = byId("drop");
const waiting = [];
let running = 0;
// Until the server has said them it is the one that refuses.
let limits = { max_bytes: Infinity, extensions: [""] };
let areLimitsKnown = false;
let added = () => {};
let here = null;

export function start(whenAdded) {
  added = whenAdded;
  for (const [button, input] of [["choose-files", "files"], ["choose-folder", "folder"]]) {
    byId(button).addEventListener("click", () => byId(input).click());
    byId(input).addEventListener("change", async (event) => {
      const files = [...event.target.files].map((file) => ({ file, name: file.webkitRelativePath || file.name }));
      event.target.value = "";
      await learnLimits();
      offer(input === "folder" ? files.filter(isWanted) : files, input === "folder" ? files.filter((one) => !isWanted(one)).length : 0);
    });
  }
  // The whole page takes what is dropped: a file that misses the field would replace the page.
  addEventListener("dragover", (event) => { event.preventDefault(); drop.classList.add("over"); });
  addEventListener("dragleave", (event) => { if (!event.relatedTarget) drop.classList.remove("over"); });
  addEventListener("drop", async (event) => {
    event.preventDefault();
    drop.classList.remove("over");
    const { files, skipped } = await dropped(event.dataTransfer);
    offer(files, skipped);
  });
}

/**
 * Ask for what the server takes, unless it has said it: at the beginning, and again when files come before it could.
 * @returns {Promise<boolean>} false if the server wants a token first
 */
export async function learnLimits() {
  if (areLimitsKnown) return true;
  try {
    limits = await ask("GET", "limits");
  } catch (error) {
    return error.status !== 401;
  }
  areLimitsKnown = true;
  setText(byId("drop-limits"), `PDF, Word, PowerPoint, Excel, OpenDocument, EPUB, HTML, Markdown, text, mail, tables and code, up to ${bytes(limits.max_bytes)} each.`);
  return true;
}

/** Of a folder only documents are taken, as `ragline ingest FOLDER` does: not what programs keep beside them. */
function isWanted({ name }) {
  const lower = name.toLowerCase();
  return !name.split("/").some((part) => part.startsWith(".")) && limits.extensions.some((end) => lower.endsWith(end));
}

async function dropped(transfer) {
  // Both must be read before the first wait: the browser empties the list then.
  const entries = [...transfer.items].filter((item) => item.kind === "file").map((item) => item.webkitGetAsEntry?.());
  const plain = [...transfer.files].map((file) => ({ file, name: file.name }));
  await learnLimits();
  if (!entries.length || entries.includes(null) || entries.includes(undefined)) return { files: plain, skipped: 0 };
  const files = [];
  let skipped = 0;
  const visit = async (entry, path, isNamed) => {
    const name = path ? `${path}/${entry.name}` : entry.name;
    if (entry.isFile) {
      if (isNamed || isWanted({ name })) files.push({ file: await new Promise((resolve, reject) => entry.file(resolve, reject)), name });
      else skipped += 1;
      return;
    }
    const reader = entry.createReader();
    for (;;) { // a reader gives a hundred at a time, and none at the end
      const some = await new Promise((resolve, reject) => reader.readEntries(resolve, reject));
      if (!some.length) return;
      for (const one of some) await visit(one, name, false);
    }
  };
  for (const entry of entries) await visit(entry, "", true);
  return { files, skipped };
}

function offer(files, skipped) {
  if (skipped) note(`${plural(skipped, "file")} of other kinds ${skipped === 1 ? "was" : "were"} left out.`);
  if (files.length) announce(`${plural(files.length, "file")} to upload.`);
  for (const { file, name } of files) {
    const row = line(name);
    if (file.size > limits.max_bytes) refuse(row, file, name, `It is larger than the limit of ${bytes(limits.max_bytes)}.`, false);
    else waiting.push({ file, name, row });
  }
  go();
}

function go() {
  while (running < AT_ONCE && waiting.length) {
    running += 1;
    upload(waiting.shift()).finally(() => { running -= 1; go(); });
  }
}

async function upload({ file, name, row }) {
  try {
    const { outcome, document } = await send(file, name, (share) => { row.progress.value = share; });
    row.element.remove();
    if (outcome === "unchanged" || outcome === "duplicate") noteHere(document.name);
    added(document);
  } catch (error) {
    refuse(row, file, name, error.message, error.status === 0 || error.status >= 500);
  }
}

function line(name) {
  const progress = make("progress", { max: 1, value: 0, "aria-label": `Upload of ${name}` });
  const state = make("span", { class: "state" }, "Uploading");
  const element = make("li", { class: "document" }, make("div", { class: "line" }, make("span", { class: "name", title: name }, name), state), progress);
  tray.append(element);
  return { element, progress, state };
}

function refuse(row, file, name, reason, mayPass) {
  row.element.dataset.state = "failed";
  row.progress.remove();
  row.state.textContent = "Not taken";
  announce(`${name} was not taken: ${reason}`);
  const actions = make("p", { class: "actions" });
  if (mayPass) {
    actions.append(make("button", {
      type: "button", class: "quiet", "aria-label": `Upload ${name} again`,
      onclick: () => { row.element.remove(); offer([{ file, name }], 0); },
    }, "Again"));
  }
  actions.append(dismiss(row.element, name));
  row.element.append(make("div", { class: "line" }, make("p", { class: "reason" }, reason), actions));
}

function note(text) {
  const element = make("li", { class: "document note" }, make("span", {}, text));
  element.append(make("p", { class: "actions" }, dismiss(element, text)));
  tray.append(element);
  announce(text);
  return element;
}

/** One line for all that were here, or a folder that is dropped again would fill the page with them. */
function noteHere(name) {
  if (!here?.element.isConnected) here = { element: note(`${name} is here already.`), count: 1 };
  else setText(here.element.firstChild, `${plural(here.count += 1, "file")} are here already.`);
}

function dismiss(element, what) {
  return make("button", { type: "button", class: "quiet", "aria-label": `Dismiss ${what}`, onclick: () => { element.remove(); byId("choose-files").focus(); } }, "Dismiss");
}
