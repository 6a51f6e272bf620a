// The page put together: the server's events to the parts that show them.

import { ask, follow, whenTokenIsNeeded } from "./api.js";
import * as documents from "./documents.js";
import { byId, plural, setText } from "./elements.js";
import * as questions from "./questions.js";
import * as uploads from "./uploads.js";

const banner = byId("banner");
let isThere = true;
let complaint = "";
let status = null;
let timer;

documents.start(complain);
uploads.start((document) => documents.put(document));
questions.start();

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
  const working = status ? ["queued", "parsing", "splitting", "embedding"].reduce((sum, state) => sum + status.documents[state], 0) : 0;
  let text = complaint;
  if (!isThere) text = "The server, or its database, does not answer. This page goes on by itself when it is back.";
  else if (!text && status?.workers === null && status.messages) text = "The broker does not answer: documents wait until it is back.";
  else if (!text && status?.workers?.length === 0 && working) text = `No worker is running: ${plural(working, "document waits", "documents wait")}. Start one with “ragline worker”.`;
  banner.hidden = !text;
  setText(banner, text);
  document.body.classList.toggle("gone", !isThere);
}

function drawVitals() {
  const { workers, messages } = status;
  byId("vitals").hidden = messages === null;
  const values = { workers: workers?.length ?? "?", owed: (messages?.owed ?? 0) + (messages?.waiting ?? 0), dead: messages?.dead ?? 0 };
  for (const [name, value] of Object.entries(values)) setText(byId(`vital-${name}`).lastElementChild, value.toLocaleString("en"));
  byId("vital-workers").classList.toggle("bad", workers !== null && workers.length === 0);
  byId("vital-dead").classList.toggle("bad", values.dead > 0);
  byId("vital-workers").title = workers?.join(", ") || "No worker answers";
}

async function begin() {
  if (!await uploads.learnLimits()) return;
  follow((update) => {
    status = update.status;
    documents.update(update);
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
