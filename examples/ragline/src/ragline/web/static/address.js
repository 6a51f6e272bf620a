// What is shown as part of the page's address: a search, a document or a list can be kept, sent and gone back to.

const listeners = [];
// How many of the entries of the browser's history are of a document that was opened here; a reload keeps them.
let opened = history.state?.opened ?? 0;

/** What the address says: `q`, `ask`, `document`, `start`, `end`, `name`, `show`, `called`, `order`; those that are missing are not in it. */
export function read() {
  return Object.fromEntries(new URLSearchParams(location.search));
}

/**
 * Change the address.
 * @param {Object<string, string|number|null>} changes null takes something out
 */
export function write(changes) {
  const next = changed(changes);
  if (next === null) return;
  if (changes.document) opened += 1;
  history.pushState({ ...("q" in changes ? {} : history.state), opened }, "", next);
}

/** Change the address without a step to go back by: as somebody types, each letter would be one. */
export function rewrite(changes) {
  const next = changed(changes);
  if (next !== null) history.replaceState({ ...history.state, opened }, "", next);
}

/** How many passages of the search that the address says were shown, as far as it is kept. */
export const passagesShown = () => history.state?.passages ?? 0;

/** Keep how many passages are shown, for who comes back to the search. */
export function keepPassagesShown(passages) {
  history.replaceState({ ...history.state, passages }, "");
}

/** The address with changes; null where they change nothing. */
function changed(changes) {
  const parameters = new URLSearchParams(location.search);
  for (const [name, value] of Object.entries(changes)) {
    if (value === null) parameters.delete(name);
    else parameters.set(name, value);
  }
  const text = parameters.toString();
  if (text === new URLSearchParams(location.search).toString()) return null;
  return text ? `?${text}` : location.pathname;
}

/** Take a document out of the address: as "back" does, where it was opened from this page. */
export function leaveDocument() {
  if (!read().document) return;
  if (opened > 0) history.back();
  else rewrite({ document: null, start: null, end: null, name: null });
}

/** Be told when the person goes back or forward. */
export function whenGone(callback) {
  listeners.push(callback);
}

addEventListener("popstate", (event) => {
  opened = event.state?.opened ?? 0;
  for (const listener of listeners) listener(read());
});
