// The words that were asked for, told from the rest of a passage that is marked as a whole: drawn over the text, not in it.

const NAME = "asked";

/**
 * Emphasize parts of a text; those of another text are not any more. Older browsers show none.
 * @param {HTMLElement} element
 * @param {number[][]} spans where they begin and end, ascending, in code units of the element's text
 */
export function emphasize(element, spans) {
  if (!globalThis.CSS?.highlights) return;
  const ranges = [];
  const walker = document.createTreeWalker(element, NodeFilter.SHOW_TEXT);
  let at = 0;
  let next = 0;
  while (next < spans.length && walker.nextNode()) {
    const node = walker.currentNode;
    const end = at + node.length;
    for (; next < spans.length && spans[next][0] < end; next += 1) {
      const [from, to] = spans[next];
      if (from < at) continue; // it began before what is here
      ranges.push(new StaticRange({
        startContainer: node, startOffset: from - at, endContainer: node, endOffset: Math.min(to - at, node.length),
      }));
    }
    at = end;
  }
  CSS.highlights.set(NAME, new Highlight(...ranges));
}
