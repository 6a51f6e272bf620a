// The page put together: the server's events to the parts that show them.

import * as address from "./address.js";
import { ask, follow, whenTokenIsNeeded } from "./api.js";
import * as documents from "./documents.js";
import { byId, plural, setText } from "./elements.js";
import * as questions from "./questions.js";
import * as reader from "./reader.js";
import * as shelf from "./shelf.js";
import * as uploads from "./uploads.js";

const banner = byId("banner");
let isThere = true;
let complaint = "";
let status = null;
let timer;

documents.start({ whenWrong: complain, whenChanged: shelf.refresh });
shelf.start({ whenWrong: complain });
uploads.start((document) => { documents.put(document); shelf.refresh(); });
questions.start();
reader.start();

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

/** Say what went wrong with what a person did, for a while. */
function complain(text) {
  complaint = text;
  drawBanner();
  clearTimeout(timer);
  timer = setTimeout(() => { complaint = ""; drawBanner(); }, 8000);
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
  if (!await uploads.learnLimits()) return;
  questions.restore(address.read());
  reader.restore(address.read());
  follow((update) => {
    status = update.status;
    documents.update(update);
    shelf.update(update);
    questions.update(status);
    drawVitals();
    drawBanner();
  }, (isConnected) => {
    if (isThere === isConnected) return;
    isThere = isConnected;
    drawBanner();
  });
}

begin();
