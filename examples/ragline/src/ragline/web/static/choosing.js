// Files and folders that a person chooses or drops, and which of them are documents.

import { ask } from "./api.js";
import { bytes, byId, setText } from "./elements.js";

const drop = byId("drop");
// Until the server has said them it is the one that refuses.
let limits = { max_bytes: Infinity, extensions: [""] };
let areLimitsKnown = false;

/**
 * Take what is chosen, and what is dropped anywhere.
 * @param {(files: {file: File, name: string}[], leftOut: string[]) => void} offer told of each choice
 */
export function start(offer) {
  for (const [button, input] of [["choose-files", "files"], ["choose-folder", "folder"]]) {
    byId(button).addEventListener("click", () => byId(input).click());
    byId(input).addEventListener("change", async (event) => {
      const files = [...event.target.files].map((file) => ({ file, name: file.webkitRelativePath || file.name }));
      event.target.value = "";
      await learnLimits();
      if (input === "files") offer(files, []);
      else offer(files.filter(isWanted), files.filter((one) => !isWanted(one)).map(({ name }) => name));
    });
  }
  // The whole page takes what is dropped: a file that misses the field would replace the page.
  addEventListener("dragover", (event) => { event.preventDefault(); drop.classList.add("over"); });
  addEventListener("dragleave", (event) => { if (!event.relatedTarget) drop.classList.remove("over"); });
  addEventListener("drop", async (event) => {
    event.preventDefault();
    drop.classList.remove("over");
    const { files, leftOut } = await dropped(event.dataTransfer);
    offer(files, leftOut);
  });
}

/** The size of the largest file that is taken. */
export const maxBytes = () => limits.max_bytes;

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

/** Whether some part of a path begins with a dot, as what programs keep beside documents does. */
export const isHidden = (name) => name.split("/").some((part) => part.startsWith("."));

/** Of a folder only documents are taken, as `ragline ingest FOLDER` does. */
function isWanted({ name }) {
  const lower = name.toLowerCase();
  return !isHidden(name) && limits.extensions.some((end) => lower.endsWith(end));
}

async function dropped(transfer) {
  // Both must be read before the first wait: the browser empties the list then.
  const entries = [...transfer.items].filter((item) => item.kind === "file").map((item) => item.webkitGetAsEntry?.());
  const plain = [...transfer.files].map((file) => ({ file, name: file.name }));
  await learnLimits();
  if (!entries.length || entries.includes(null) || entries.includes(undefined)) return { files: plain, leftOut: [] };
  const files = [];
  const leftOut = [];
  const visit = async (entry, path, isNamed) => {
    const name = path ? `${path}/${entry.name}` : entry.name;
    if (entry.isFile) {
      if (isNamed || isWanted({ name })) files.push({ file: await new Promise((resolve, reject) => entry.file(resolve, reject)), name });
      else leftOut.push(name);
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
  return { files, leftOut };
}
