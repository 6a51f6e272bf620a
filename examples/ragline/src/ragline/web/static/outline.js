// The headings of a document that is read, which lead to their places.

import { byId, make, setText } from "./elements.js";

const FEWEST = 3; // a document of two headings is seen at a glance
const DEEPEST = 5;
const outline = byId("outline");
let headings = [];
let go = () => {};

/** @param {(heading: {start: number, title: string}) => void} lead told which heading was chosen */
export function start(lead) {
  go = lead;
  // There may be thousands: they are made for who looks at them.
  outline.addEventListener("toggle", () => { if (outline.open) draw(); });
  byId("headings").addEventListener("click", (event) => {
    const at = event.target.closest("button")?.dataset.at;
    if (at === undefined) return;
    outline.open = false;
    go(headings[at]);
  });
}

/** Take over the headings of another document. */
export function show(some) {
  headings = some;
  outline.open = false;
  outline.hidden = headings.length < FEWEST;
  setText(byId("outline-count"), headings.length.toLocaleString("en"));
  byId("headings").replaceChildren();
}

function draw() {
  const highest = headings.reduce((least, { level }) => Math.min(least, level), Infinity);
  byId("headings").replaceChildren(...headings.map(({ level, title }, at) => {
    const button = make("button", { type: "button" }, title);
    button.dataset.at = at;
    const item = make("li", {}, button);
    item.style.setProperty("--depth", Math.min(level - highest, DEEPEST));
    return item;
  }));
}
