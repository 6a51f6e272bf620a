// The page put together: the server's events to the parts that show them.

import * as address from "./address.js";
import { ask, follow, whenTokenIsNeeded } from "./api.js";
import { learnLimits } from "./choosing.js";
import * as documents from "./documents.js";
import { byId, plural, setText } from "./elements.js";
import * as overall from "./overall.js";
import * as questions from "./questions.js";
import * as reader from "./reader.js";
import * as shelf from "./shelf.js";
import * as uploads from "./uploads.js";

const banner = byId("banner");
let isThere = true;
let complaint = "";
let status = null;
let timer;

documents.start({ whenWrong: complain, whenChanged: shelf.refresh, whenGone: markLost });
shelf.start({ whenWrong: complain });
uploads.start((document) => { documents.put(document); shelf.refresh(); });
questions.start();
reader.start(documents.successor);

byId("login-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  try {
    await ask("POST", "login", { token: byId("token").value });
    location.reload();
  } catch (error) {
    setText(byId("login-error"), error.message);
    byId("token").select();
  }
});
whenTokenIsNeeded(() => { if (!byId("login").open) byId("login").showModal(); });

for (const link of document.querySelectorAll(".jump a, .skip")) {
  link.addEventListener("click", (event) => {
    event.preventDefault(); // the address is that of the search, not of a place on the page
    const title = document.querySelector(link.hash);
    title.scrollIntoView();
    title.focus({ preventScroll: true });
  });
}

// Who has no mouse scrolls what has the focus: the columns, where they stand beside each other.
const beside = matchMedia("(min-width: 62rem) and (min-height: 32rem)");
const makeReachable = () => {
  for (const column of document.querySelectorAll("main > section")) {
    if (beside.matches) column.tabIndex = 0;
    else column.removeAttribute("tabindex");
  }
};
beside.addEventListener("change", makeReachable);
makeReachable();

/** Say what went wrong with what a person did, for a while. */
function complain(text) {
  complaint = text;
  drawBanner();
  clearTimeout(timer);
  timer = setTimeout(() => { complaint = ""; drawBanner(); }, 8000);
}

function markLost(isGone) {
  questions.markLost(isGone);
  reader.markLost(isGone);
}

function drawBanner() {
  const waiting = !status || documents.isAnyoneWorking(status) ? 0 : documents.numberOnTheWay(status);
  let text = complaint;
  if (!isThere) text = "The server, or its database, does not answer. This page goes on by itself when it is back.";
  else if (!text && status?.workers === null && status.messages) text = "The broker does not answer: documents wait until it is back.";
  else if (!text && waiting) text = `No worker is running: ${plural(waiting, "document waits", "documents wait")}. Start one with “ragline worker”.`;
  banner.hidden = !text;
  setText(banner, text);
  document.body.classList.toggle("gone", !isThere);
}

function drawVitals() {
  const { workers, messages } = status;
  byId("vitals").hidden = messages === null;
  const isIdle = !documents.isAnyoneWorking(status);
  const isSilent = !isIdle && workers?.length === 0;
  const values = { workers: isSilent ? "1+" : workers?.length ?? "?", steps: stepsToDo(status) };
  for (const [name, value] of Object.entries(values)) setText(byId(`vital-${name}`).lastElementChild, value.toLocaleString("en"));
  byId("vital-workers").classList.toggle("bad", isIdle && values.steps > 0);
  document.body.classList.toggle("workerless", workers === null || isIdle);
  byId("vital-workers").title = workers?.join(", ") || (isSilent ? "Documents are worked on by one that has not answered yet" : "No worker answers");
}

/** Messages are counted more rarely than documents: each document on its way is one at least, and without any there is none. */
function stepsToDo({ messages, ...rest }) {
  const number = documents.numberOnTheWay(rest);
  return number && Math.max(number, (messages?.owed ?? 0) + (messages?.waiting ?? 0));
}

async function begin() {
  if (!await learnLimits()) return;
  questions.restore(address.read());
  shelf.restore(address.read());
  reader.restore(address.read());
  follow((update) => {
    status = update.status;
    const becameReady = documents.update(update);
    shelf.update(update);
    reader.update(update.documents);
    overall.update(status);
    questions.update(status, becameReady);
    drawVitals();
    drawBanner();
    if (update.is_whole) tryAgain();
  }, (isConnected) => {
    if (isThere === isConnected) return;
    isThere = isConnected;
    drawBanner();
  });
}

/** Who is connected, for the first time or again, is told all there is: what the server did not answer before it can now. */
function tryAgain() {
  uploads.tryAgain();
  questions.tryAgain();
  reader.tryAgain();
}

begin();
