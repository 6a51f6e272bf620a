"""HTML to text: what a page is about, blocks apart, tables as rows, without menus and scripts."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping

from lxml import etree

from ragline.errors import DamagedError
from ragline.limits import Limits
from ragline.parsers.pages import PageWriter
from ragline.text import ParsedText, clean, decode

_NO_TEXT = frozenset(
    ("script", "style", "noscript", "template", "head", "svg", "math", "iframe", "object", "select")
)
_SKIPPED_ROLES = frozenset(("navigation", "menu", "menubar", "search", "tablist"))
# The ¶ or "[edit]" beside each heading, as Sphinx, MkDocs, Jupyter and MediaWiki write them; the links to
# the page before and the next one, as DocBook does.
_SKIPPED_CLASSES = frozenset(("headerlink", "anchor-link", "mw-editsection", "navheader", "navfooter"))
# Where a list of links is a menu; elsewhere it may be what the page is about.
_MARGINS = frozenset(("header", "footer", "aside"))
_MARGIN_ROLES = frozenset(("banner", "contentinfo", "complementary"))
_MENU_CLASS = "menu"
# A margin in one of these is its own, with its title or its notes, and not the page's.
_SECTIONS = frozenset(("article", "section", "main"))
_LISTS = frozenset(("ul", "ol", "menu"))
MENU_LINKS = 3
MENU_SHARE = 0.9
MAIN_CHARACTERS = 200
"""A `<main>` with less text than this is no reason to leave the rest of the page out."""

_ATTRIBUTES = ("role", "class", "hidden", "aria-hidden")
_NAME = re.compile("[a-z][a-z0-9-]*")
_DECLARED = re.compile(
    rb"<meta[^>]{0,200}?charset\s*=\s*[\"']?\s*([\w.:-]+)"
    rb"|<\?xml[^>]{0,100}?encoding\s*=\s*[\"']([\w.:-]+)",
    re.IGNORECASE,
)
_DECLARED_WITHIN_BYTES = 4096


def parse_html(data: bytes, limits: Limits, *, is_chapter: bool = False) -> ParsedText:
    """The text of a page: of its `<main>`, or its only `<article>`, where it has one.

    Else all of it but what stands beside it: menus, what is hidden, the page's own header, footer and asides.
    A page of nothing else keeps all its text. A chapter of a book keeps its margins, which are notes.

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
        if not is_chapter:
            _write_page(root, writer)
        elif not _write_main(root, writer):
            _walk(root, writer)
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
    parser = etree.HTMLParser(encoding="utf-8", target=_Builder(), huge_tree=True)
    try:
        root: etree._Element | None = etree.fromstring(text.encode(), parser)
    except etree.XMLSyntaxError as error:
        # Any page can be read as HTML; here it was the memory that ended, and `error` knows.
        raise DamagedError("The page cannot be read.") from error
    return root


class _Builder:
    """Builds the tree of a page, of elements and of what is asked of their attributes.

    Names are what people write: `o:p`, `@click`, an address in angle brackets. lxml refuses those that XML
    does not know.
    """

    def __init__(self) -> None:
        self._builder = etree.TreeBuilder()
        self._is_empty = True

    def start(self, tag: str, attributes: Mapping[str, str]) -> None:
        self._is_empty = False
        self._builder.start(
            _named(tag), {name: attributes[name] for name in _ATTRIBUTES if name in attributes}
        )

    def end(self, tag: str) -> None:
        self._builder.end(_named(tag))

    def data(self, text: str) -> None:
        if not self._is_empty:
            self._builder.data(text)

    def close(self) -> etree._Element | None:
        return None if self._is_empty else self._builder.close()


def _named(tag: str) -> str:
    return tag if _NAME.fullmatch(tag) else "unknown"


def _write_page(root: etree._Element, writer: PageWriter) -> None:
    if _write_main(root, writer):
        return
    titles = [title for title in _shown(root) if title.tag == "h1"]
    if len(titles) == 1 and _is_beside(titles[0]):
        _walk(titles[0], writer)
    title = writer.length
    _walk(root, writer, _skips_margins)
    if writer.length == title:
        writer.clear()
        _walk(root, writer, _skips_what_is_no_text)


def _is_beside(element: etree._Element) -> bool:
    """Whether an element is in a margin of the page."""
    for ancestor in reversed(list(element.iterancestors())):
        if ancestor.tag in _SECTIONS:
            return False
        if _is_margin(ancestor):
            return True
    return False


def _write_main(root: etree._Element, writer: PageWriter) -> bool:
    """Write the main part of a page; whether it has one that is worth it."""
    main = _main(root)
    if main is None:
        return False
    titles = [title for title in _shown(root) if title.tag == "h1"]
    if len(titles) == 1 and not any(title is titles[0] for title in main.iter("h1")):
        _walk(titles[0], writer)
    _walk(main, writer)
    if writer.length >= MAIN_CHARACTERS:
        return True
    writer.clear()
    return False


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


def _skips_menus(element: etree._Element, margins: int, _: int) -> bool:
    return _is_skipped(element) or (margins > 0 and _is_menu(element))


def _skips_margins(element: etree._Element, margins: int, sections: int) -> bool:
    return _skips_menus(element, margins, sections) or (not sections and _is_margin(element))


def _skips_what_is_no_text(element: etree._Element, _: int, __: int) -> bool:
    return element.tag in _NO_TEXT or not isinstance(element.tag, str)


def _walk(
    root: etree._Element,
    writer: PageWriter,
    skips: Callable[[etree._Element, int, int], bool] = _skips_menus,
) -> None:
    """Write an element but for what is skipped, given how many margins and sections it is in."""
    stack: list[tuple[etree._Element, bool]] = [(root, False)]
    margins = sections = 0
    while stack:
        element, leaving = stack.pop()
        name = str(element.tag)
        if leaving:
            writer.leave(name)
            margins -= _may_have_menus(element)
            sections -= name in _SECTIONS
        elif not skips(element, margins, sections):
            margins += _may_have_menus(element)
            sections += name in _SECTIONS
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
    if element.tag in _NO_TEXT or element.tag == "nav" or not isinstance(element.tag, str):
        return True
    return bool(element.attrib) and (
        element.get("role") in _SKIPPED_ROLES
        or element.get("hidden") is not None
        or (element.get("aria-hidden") == "true" and not _is_formula(element))
        or not _SKIPPED_CLASSES.isdisjoint(element.get("class", "").split())
    )


def _is_formula(element: etree._Element) -> bool:
    """Whether it is what people see of a formula, beside the MathML that screen readers read."""
    beside = (element.getprevious(), element.getnext())
    return any(one is not None and len(one) > 0 and one[0].tag == "math" for one in beside)


def _is_margin(element: etree._Element) -> bool:
    # A role of its own, such as that of a footnote, makes it something else.
    role = element.get("role")
    return role in _MARGIN_ROLES or (role is None and element.tag in _MARGINS)


def _may_have_menus(element: etree._Element) -> bool:
    return element.tag in _MARGINS or _is_margin(element) or _MENU_CLASS in element.get("class", "").split()


def _is_menu(element: etree._Element) -> bool:
    """Whether a list is hardly more than links."""
    if element.tag not in _LISTS:
        return False
    links = list(element.iter("a"))
    if len(links) < MENU_LINKS:
        return False
    linked = sum(len("".join(link.itertext()).strip()) for link in links)
    return linked >= MENU_SHARE * sum(len(text.strip()) for text in element.itertext())
