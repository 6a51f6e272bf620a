// Making elements: all text of documents, names and errors goes through textContent, never through markup.

/**
 * Make an element.
 * @param {string} tag
 * @param {Object<string, unknown>} [properties] set as properties; `class`, `aria-*`, `role` and `title` as attributes
 * @param {...(Node|string|null|undefined)} children strings become text
 */
export function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.startsWith("aria-") || ["class", "role", "title"].includes(name)) element.setAttribute(name, value);
    else element[name] = value;
  }
  element.append(...children.filter((child) => child !== null && child !== undefined && child !== ""));
  return element;
}

export const byId = (id) => document.getElementById(id);

/** Whether what had the focus is gone with what it was for. */
export const isFocusLost = () => document.activeElement === document.body || !document.activeElement.checkVisibility();

/** Take an element away; if the focus is in it, it goes on elsewhere. */
export function take(element, goOn) {
  const isAtIt = element.contains(document.activeElement);
  element.remove();
  if (isAtIt) goOn();
}

/** Set text only where it differs, so that nothing is drawn, or read out, again. */
export function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

const titles = { document: "", search: "" };

/** Name what is shown in the title of the page: the document that is read, else the search. */
export function entitle(part, text) {
  titles[part] = text;
  document.title = [titles.document || titles.search, "ragline"].filter(Boolean).join(" · ");
}

/** A time that the server tells, as people here write it. */
export const moment = (iso) => new Date(iso).toLocaleString(undefined, { dateStyle: "medium", timeStyle: "short" });

export function bytes(count) {
  if (count < 1000) return `${count} B`;
  if (count < 1e6) return `${Math.round(count / 1000)} kB`;
  return `${(count / 1e6).toFixed(count < 1e7 ? 1 : 0).replace(".0", "")} MB`;
}

export function plural(count, one, many = `${one}s`) {
  return `${count.toLocaleString("en")} ${count === 1 ? one : many}`;
}

let waiting = [];
let timer = null;

/** Tell people who listen rather than look; what comes close together is told together. */
export function announce(text) {
  waiting.push(text);
  timer ??= setTimeout(() => {
    setText(byId("announcer"), waiting.length > 3 ? `${waiting.length} changes. Last: ${waiting.at(-1)}` : waiting.join(" "));
    waiting = [];
    timer = null;
  }, 1000);
}
