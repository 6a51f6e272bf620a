// Requests to the API, and what it says when it refuses.

export class Refusal extends Error {
  constructor(status, detail) {
    super(detail);
    this.status = status;
  }
}

/** @type {() => void} */
let onTokenNeeded = () => {};
export const whenTokenIsNeeded = (callback) => { onTokenNeeded = callback; };

/**
 * Ask the API.
 * @throws {Refusal} with status 0 when the server does not answer
 */
export async function ask(method, path, body) {
  let response;
  try {
    response = await fetch(`/api/${path}`, {
      method,
      headers: body === undefined ? {} : { "Content-Type": "application/json" },
      body: body === undefined ? undefined : JSON.stringify(body),
    });
  } catch {
    throw new Refusal(0, "The server does not answer.");
  }
  if (response.ok) return response.status === 204 ? null : response.json();
  throw refusal(response.status, await response.text());
}

/** Send a file; `progressed` is told the share that has gone out. */
export function send(file, name, progressed) {
  return new Promise((resolve, reject) => {
    const request = new XMLHttpRequest(); // fetch does not say how much has gone out
    request.open("POST", `/api/documents?name=${encodeURIComponent(name)}`);
    request.setRequestHeader("Content-Type", "application/octet-stream");
    request.upload.onprogress = (event) => progressed(event.loaded / Math.max(event.total, 1));
    request.onload = () => {
      if (request.status === 201) resolve(JSON.parse(request.responseText));
      else reject(refusal(request.status, request.responseText));
    };
    request.onerror = () => reject(new Refusal(0, "The server does not answer."));
    request.send(file);
  });
}

function refusal(status, text) {
  if (status === 401) onTokenNeeded();
  let detail = `The server answered with status ${status}.`;
  try {
    const said = JSON.parse(text).detail;
    if (typeof said === "string") detail = said;
    else if (Array.isArray(said)) detail = said.map(({ loc, msg }) => `${loc.at(-1)}: ${msg}.`).join(" ");
  } catch { /* not JSON: the status says all there is */ }
  return new Refusal(status, detail);
}

const RETRY_SECONDS = [1, 2, 4, 8, 15];

/**
 * Follow the server's events for as long as the page is open.
 * @param {(update: object) => void} updated told of each
 * @param {(isThere: boolean) => void} connected told when the server goes and comes back
 */
export function follow(updated, connected) {
  let attempts = 0;
  let source;
  const open = () => {
    source = new EventSource("/api/events");
    source.onmessage = (event) => {
      attempts = 0;
      connected(true);
      updated(JSON.parse(event.data));
    };
    source.onerror = async () => {
      // The browser's own attempts end for good when the server refuses one; these do not.
      source.close();
      try {
        await ask("GET", "limits");
        if (attempts) connected(false); // it answers, but has nothing to tell: its database is away
      } catch (error) {
        if (error.status === 401) return; // the page asks for the token and begins anew
        connected(false);
      }
      setTimeout(open, RETRY_SECONDS[Math.min(attempts++, RETRY_SECONDS.length - 1)] * 1000);
    };
  };
  open();
  // A page that is left must not keep a connection: browsers allow six for all pages of a server.
  addEventListener("pagehide", () => source.close());
  addEventListener("pageshow", (event) => { if (event.persisted) open(); });
}
