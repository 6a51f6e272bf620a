// How far all documents are, while some are on the way.

import { numberOnTheWay } from "./documents.js";
import { byId, setText } from "./elements.js";

/** Take over the counts that the server tells. */
export function update(status) {
  const { ready } = status.documents;
  const left = numberOnTheWay(status);
  byId("overall").hidden = left === 0;
  if (left === 0) return;
  setText(byId("overall-text"), `${ready.toLocaleString("en")} of ${(ready + left).toLocaleString("en")} ready`);
  byId("overall-bar").max = ready + left;
  byId("overall-bar").value = ready;
}
