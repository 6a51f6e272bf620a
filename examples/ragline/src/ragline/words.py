"""The words of a text and of a query, as keyword indexes get them: in every script, on every database."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from functools import lru_cache
from itertools import product

from ragline.question import question_of
from ragline.text import Span

STOP_WORDS = frozenset(
    """
    a about after all also am an and any are as at be because been before being between both but by can
    could did do does doing done during each few for from further had has have having he her here hers
    him his how i if in into is it its itself just may me might more most must my no nor not of off on
    once only or other our ours out over own same shall she should so some such than that the their
    theirs them then there these they this those through to too under until up upon very was we were
    what when where whether which while who whom whose why will with would you your yours
    """.split()
)
"""Words that ask without saying about what: dropped from queries, never from the index."""

MAX_PHRASE_WORDS = 500
"""More than any passage has: databases fail at phrases of thousands."""

MAX_SHARP_S = 3
"""As many ß or ss of a word are spelled in both ways; hardly a word has more."""

# Scripts that are written without spaces: CJK ideographs with their extensions, kana, and Hangul, whose
# particles stick to the word before them.
_CJK = (
    "\u3005\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff"
    "\U00020000-\U0003134f"
)
_CJK_RUN = re.compile(f"[{_CJK}]+")
_WORD = re.compile(f"[{_CJK}]+|[^\\W_{_CJK}]+")
_SHARP_S = re.compile("ß|ss")
# A word in a text as it is, whose accents may be characters of their own.
_MARKABLE = re.compile(f"(?:[^\\W_{_CJK}][\u0300-\u036f]*)+")

# A parser, an editor, happily: endings that Snowball leaves on.
_LEFT_ON = re.compile(r"(?<=\w{3})(?:er|or|li)$")
_DOUBLED = re.compile(r"([bdgmnprt])\1$")


def paired(text: str) -> str:
    """The text, its runs of Chinese, Japanese and Korean as overlapping pairs, for a tokenizer to go on."""
    return _CJK_RUN.sub(lambda run: f" {' '.join(_pairs(run[0]))} ", text)


def words(text: str) -> list[str]:
    """The words of a text in order, lower-case and without accents; pairs where there are no spaces."""
    found: list[str] = []
    for run in _WORD.findall(unicodedata.normalize("NFC", text)):
        found.extend(_pairs(run) if _CJK_RUN.match(run) else [_folded(run)])
    return found


def text_digest(text: str) -> int:
    """The same number, of 64 bits with a sign, for texts that differ in white space at most."""
    same = " ".join(text.split()).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(same, digest_size=8).digest(), "big", signed=True)


def is_unspaced(word: str) -> bool:
    """Whether it is of a script without spaces, so that it may stand anywhere in a run of letters."""
    return _CJK_RUN.match(word) is not None


def telling_words(query: str) -> list[str]:
    """The words of a query that say what it is about, each once, in order; all of them if none does.

    A word with ß or ss is there in its other spellings too: indexes have a word as it is spelled.
    """
    every = dict.fromkeys(spelling for word in words(query) for spelling in _spellings(word))
    return [word for word in every if word not in STOP_WORDS] or list(every)


def phrase_words(phrase: str) -> list[str]:
    """The words that stand next to each other in a passage that has a phrase; no passage has more of them."""
    return words(phrase)[:MAX_PHRASE_WORDS]


def marked_spans(text: str, query: str) -> list[Span]:
    """Where the words of a query that tell what it is about stand in a text, in its order.

    Whole words, also in their other forms: "dances" marks "dance" and "dancing", "cafe" marks "Cafés", and
    "strasse" marks "Straße". Where there are no spaces, what the text shares with the query.
    """
    wanted = [word for word in words(question_of(query).text) if word not in STOP_WORDS]
    pairs = [re.escape(word) for word in wanted if is_unspaced(word)]
    forms = {stem for word in wanted if not is_unspaced(word) for stem in _stems(word)}
    initials = {form[0] for form in forms}  # stemming a word takes 40 us, and no ending is its first letter
    runs = re.finditer(f"(?:{'|'.join(pairs)})+", text) if pairs else ()
    marks = [run.span() for run in runs]
    for found in _MARKABLE.finditer(text) if forms else ():
        word = _folded(unicodedata.normalize("NFC", found[0]))
        if word[0] in initials and not forms.isdisjoint(_stems(word)):
            marks.append(found.span())
    return sorted(marks)


def english_stem(word: str) -> str:
    """The stem of a word by Snowball's rules for English."""
    import snowballstemmer  # 14 ms, for searches alone

    # A stemmer of its own: it keeps the word in itself, and a web server searches in several threads.
    return str(snowballstemmer.stemmer("english").stemWord(word))


@lru_cache(maxsize=50_000)
def _stems(word: str) -> frozenset[str]:
    """What a word shares with its other forms: its stem, and that of what a parser or an editor does."""
    stem = english_stem(word.replace("ß", "ss"))
    plain = _LEFT_ON.sub("", stem)
    if plain == stem:
        return frozenset([stem])
    return frozenset([stem, plain, f"{plain}e", _DOUBLED.sub(r"\1", plain)])


def _spellings(word: str) -> list[str]:
    """A word first as it is, then with ss for ß and ß for ss: in Switzerland and in capitals it is ss."""
    between = _SHARP_S.split(word)
    if not 1 < len(between) <= MAX_SHARP_S + 1:
        return [word]
    ways = product(("ss", "ß"), repeat=len(between) - 1)
    spelled = ("".join(part + s for part, s in zip(between, (*way, ""), strict=True)) for way in ways)
    return list(dict.fromkeys([word, *spelled]))


def _pairs(run: str) -> list[str]:
    return [run[at : at + 2] for at in range(len(run) - 1)] or [run]


@lru_cache(maxsize=50_000)
def _folded(word: str) -> str:
    lowered = word.lower()
    return lowered if lowered.isascii() else "".join(map(_base, lowered))


@lru_cache(maxsize=5_000)
def _base(character: str) -> str:
    """The letter without its accents, as FTS5's `unicode61` has it: of Latin letters only."""
    base = unicodedata.normalize("NFD", character)[:1]
    return base if "LATIN" in unicodedata.name(base, "") else character
