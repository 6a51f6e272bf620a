"""HTML to text: what a page is about, blocks apart, tables as rows, without menus and scripts."""

from __future__ import annotations

import re
from collections.abc import Iterator

from lxml import etree

from ragline.errors import DamagedError
from ragline.limits import Limits
from ragline.parsers.pages import PageWriter
from ragline.text import ParsedText, clean, decode

_SKIPPED = frozenset(
    ("script", "style", "noscript", "template", "head", "nav", "svg", "math", "iframe", "object", "select")
)
_SKIPPED_ROLES = frozenset(("navigation", "menu", "menubar", "search", "tablist"))
# The ¶ or "[edit]" beside each heading, as Sphinx, MkDocs, Jupyter and MediaWiki write them.
_SKIPPED_CLASSES = frozenset(("headerlink", "anchor-link", "mw-editsection"))
# Where a list of links is a menu; elsewhere it may be what the page is about.
_MARGINS = frozenset(("header", "footer", "aside"))
_LISTS = frozenset(("ul", "ol", "menu"))
MENU_LINKS = 3
MENU_SHARE = 0.9
MAIN_CHARACTERS = 200
"""A `<main>` with less text than this is no reason to leave the rest of the page out."""

_DECLARED = re.compile(
    rb"<meta[^>]{0,200}?charset\s*=\s*[\"']?\s*([\w.:-]+)"
    rb"|<\?xml[^>]{0,100}?encoding\s*=\s*[\"']([\w.:-]+)",
    re.IGNORECASE,
)
_DECLARED_WITHIN_BYTES = 4096


def parse_html(data: bytes, limits: Limits) -> ParsedText:
    """The text of a page: of its `<main>`, or its only `<article>`, where it has one; else all of it.

    Its encoding is told by byte order mark, `<meta charset>` or, failing both, a guess. It may be nested to
    any depth: it is read without recursion.

    Raises:
        TooLargeError: it has more elements or characters than the limits allow.
    """
    limits.check("elements", data.count(b"<"))
    text, encoding = _decode(data)
    root = _tree(text)
    writer = PageWriter(limits)
    if root is not None:
        # An element that Python lets go of walks up to the first ancestor that is held. All are held, and
        # let go of from the leaves: 50,000 nested elements take 45 s otherwise.
        held = list(root.iter())
        _write_page(root, writer)
        while held:
            held.pop()
    return writer.parsed(encoding)


def _decode(data: bytes) -> tuple[str, str]:
    declared = _DECLARED.search(data[:_DECLARED_WITHIN_BYTES])
    if declared is None or data.startswith((b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")):
        return decode(data)
    name = (declared[1] or declared[2]).decode("ascii").lower()
    # Who reads "utf-16" in single bytes has UTF-8 before it, and Latin-1 is read as its superset
    # (Source: WHATWG HTML, "Determining the character encoding"; WHATWG Encoding, "Names and labels").
    name = "utf-8" if name.startswith("utf-16") else name
    name = "cp1252" if name in ("iso-8859-1", "latin1", "latin-1", "ascii", "us-ascii") else name
    try:
        return clean(data.decode(name)), name
    except (LookupError, UnicodeDecodeError):
        return decode(data)


def _tree(text: str) -> etree._Element | None:
    # A builder of its own: the one inside libxml2 ends at a depth of 2,048, silently.
    parser = etree.HTMLParser(encoding="utf-8", target=etree.TreeBuilder(), huge_tree=True)
    try:
        root: etree._Element | None = etree.fromstring(text.encode(), parser)
    except (etree.XMLSyntaxError, AssertionError) as error:
        if "missing toplevel element" in str(error):
            return None
        # Any page can be read as HTML; here it was the memory that ended, and `error` knows.
        raise DamagedError("The page cannot be read.") from error
    return root


def _write_page(root: etree._Element, writer: PageWriter) -> None:
    main = _main(root)
    if main is not None:
        titles = [title for title in _shown(root) if title.tag == "h1"]
        if len(titles) == 1 and not any(title is titles[0] for title in main.iter("h1")):
            _walk(titles[0], writer)
        _walk(main, writer)
        if writer.length >= MAIN_CHARACTERS:
            return
        writer.clear()
    _walk(root, writer)


def _main(root: etree._Element) -> etree._Element | None:
    articles = []
    for element in _shown(root):
        if element.tag == "main" or element.get("role") == "main":
            return element
        if element.tag == "article":
            articles.append(element)
    # A page of several articles lists them, or has one and its comments.
    return articles[0] if len(articles) == 1 else None


def _shown(root: etree._Element) -> Iterator[etree._Element]:
    stack = [root]
    while stack:
        element = stack.pop()
        if not _is_skipped(element):
            yield element
            stack.extend(reversed(element))


def _walk(root: etree._Element, writer: PageWriter) -> None:
    stack: list[tuple[etree._Element, bool]] = [(root, False)]
    margins = 0
    while stack:
        element, leaving = stack.pop()
        name = str(element.tag)
        if leaving:
            writer.leave(name)
            margins -= name in _MARGINS
        elif not _is_skipped(element) and not (margins and _is_menu(element)):
            margins += name in _MARGINS
            writer.enter(name)
            writer.write(element.text or "")
            stack.append((element, True))
            stack.extend((child, False) for child in reversed(element))
            continue
        if element is not root:
            writer.write(element.tail or "")


def _is_skipped(element: etree._Element) -> bool:
    # They would be passages of their own, full of the words that people search for, and part of every
    # heading.
    if element.tag in _SKIPPED or not isinstance(element.tag, str):
        return True
    return bool(element.attrib) and (
        element.get("role") in _SKIPPED_ROLES
        or element.get("hidden") is not None
        or not _SKIPPED_CLASSES.isdisjoint(element.get("class", "").split())
    )


def _is_menu(element: etree._Element) -> bool:
    """Whether a list is hardly more than links."""
    if element.tag not in _LISTS:
        return False
    links = list(element.iter("a"))
    if len(links) < MENU_LINKS:
        return False
    linked = sum(len("".join(link.itertext()).strip()) for link in links)
    return linked >= MENU_SHARE * sum(len(text.strip()) for text in element.itertext())
