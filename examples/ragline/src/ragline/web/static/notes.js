// What is to be known of files that were chosen together: a line for each thing that became of some, with their names.

import { isHidden } from "./choosing.js";
import { announce, byId, make, plural, take } from "./elements.js";

const NAMED = 3;
const tray = byId("uploads");
const all = byId("dismiss-all");
/** What else is forgotten with each line that can be put away. */
const lines = new WeakMap();
const unsaid = new Set();

const WORDS = {
  here: (names) => (names.length === 1
    ? `${names[0]} is here already.`
    : `${plural(names.length, "file")} are here already: ${listed(names)}.`),
  unready: (names) => (names.length === 1
    ? `${names[0]} is here already, but not ready yet.`
    : `${plural(names.length, "file")} are here already, but not ready yet: ${listed(names)}.`),
  unreadable: (files) => (files.length === 1
    ? `${files[0].name} is here already, but cannot be read: ${files[0].reason}`
    : `${plural(files.length, "file")} are here already, but cannot be read: ${listed(files.map(({ name, reason }) => `${name} (${reason})`))}.`),
  replaced: (names) => (names.length === 1
    ? `${names[0]} replaces the version that was here.`
    : `${plural(names.length, "file")} replace the versions that were here: ${listed(names)}.`),
  refused: (names, reason) => `${plural(names.length, "file was", "files were")} not taken: ${listed(names)}. For each: ${reason}`,
  leftOut: (names) => `${plural(names.length, "file was", "files were")} left out (${listed(kinds(names))}): ${listed(names)}.`,
};

/** The notes of one choice of files: each choice is counted anew. */
export class Notes {
  #lines = new Map();

  /**
   * Count some more files in the line of what became of them.
   * @param {string} became one of the keys of WORDS
   * @param {(string|object)[]} files their names, with the reason where they are unreadable
   * @param {string} about what all files of this line have in common, if lines are told apart by that
   */
  add(became, files, about = "") {
    if (!files.length) return;
    const key = `${became} ${about}`;
    let line = this.#lines.get(key);
    if (!line?.element.isConnected) {
      line = { files: [], element: make("li", { class: "document note" }, make("span")) };
      line.element.append(make("p", { class: "actions" }, dismiss(line.element, "this note")));
      line.element.classList.toggle("reason", became === "refused");
      this.#lines.set(key, line);
      tray.append(line.element);
    }
    line.files = line.files.concat(files);
    const text = WORDS[became](line.files, about);
    line.element.firstChild.textContent = text;
    line.element.querySelector("button").setAttribute("aria-label", `Dismiss ${text}`);
    unsaid.add(line.element);
  }
}

/** Tell the notes, as they are when all files are done, to people who listen. */
export function say() {
  for (const element of unsaid) announce(element.firstChild.textContent);
  unsaid.clear();
}

/** A button that puts a line away; whoever is at it goes on at the next one. */
export function dismiss(element, what, whenGone = () => {}) {
  const putAway = () => {
    const after = element.nextElementSibling ?? element.previousElementSibling;
    whenGone();
    take(element, () => (after?.querySelector(".dismiss") ?? byId("choose-files")).focus());
  };
  lines.set(element, whenGone);
  return make("button", { type: "button", class: "quiet dismiss", "aria-label": `Dismiss ${what}`, onclick: putAway }, "Dismiss");
}

all.addEventListener("click", () => {
  for (const element of [...tray.children].filter((one) => one.querySelector(".dismiss"))) {
    lines.get(element)();
    element.remove();
  }
  byId("choose-files").focus();
});
new MutationObserver(() => { all.hidden = tray.querySelectorAll(".dismiss").length < 2; }).observe(tray, { childList: true, subtree: true });

function listed(names) {
  const more = names.length - NAMED;
  return `${names.slice(0, NAMED).join(", ")}${more > 0 ? ` and ${more.toLocaleString("en")} more` : ""}`;
}

/** Why files were left out, each reason once: hidden, or the endings of their names. */
function kinds(names) {
  const endings = names.map((name) => (isHidden(name) ? "hidden" : name.match(/\.[^./]+$/)?.[0].toLowerCase() ?? "no ending"));
  return [...new Set(endings)];
}
