"""The lead baseline: the first sentences of an article."""

import re
from collections.abc import Iterator
from itertools import islice

# A run of stops and the quotes and brackets that close after it (also tokenised '' ), then a space or the end.
_STOP = re.compile("(?<![.!?…])[.!?…]++(?: '')?[\"'”’»)\\]]*+(?= |$)|[।॥。！？]++[」』”’]*+")
_OPENING = "\"'“‘«([`"
# Tokenised text has spaces around quotes; no longer word opens a sentence.
_NEXT_WORD = re.compile(f"[ {re.escape(_OPENING)}]*([^ ]{{0,40}})")
# A full stop after a title never ends a sentence; after an abbreviation, an initial or dotted letters ("U.S.") only if
# the next word often opens one.
_TITLES = frozenset("Mr Mrs Ms Dr Prof Gov Sen Sens Rep Gen Lt Col Sgt Capt Cpl Maj Adm Cmdr Rev Pres Supt Det St Mt "
                    "Ft No Nos v vs".split())
_ABBREVIATIONS = frozenset("Jr Sr Inc Co Corp Ltd Bros Ave Jan Feb Aug Sept Oct Nov Dec etc".split())
_DOTTED = re.compile(r"(?:[A-Za-z]\.)*[A-Za-z]|Ph\.D")
_OPENERS = frozenset("A After All An And As At But By For From He His I If In It On One Police She Since So That The "
                     "There They This Those We What When While Who With You".split())


def lead_sentences(article: str, n: int = 3) -> str:
    """The first `n` sentences of an article, one per line: the usual baseline of news summarization.

    A sentence ends at `.`, `!`, `?` or `…` (closing quotes and brackets included) before a space and a word that does
    not start in lower case, at a blank line, or at a Devanagari or CJK full stop. White space is collapsed; bylines of
    Daily Mail articles ("By . Daily Mail Reporter .") count as sentences.
    """
    return "\n".join(islice(_sentences(article), n))


def _sentences(article: str) -> Iterator[str]:
    for paragraph in re.split(r"\n\s*\n", article):
        text = " ".join(paragraph.split())
        start = 0
        for stop in _STOP.finditer(text):
            if _ends_sentence(text, stop):
                yield text[start : stop.end()].strip()
                start = stop.end()
        if rest := text[start:].strip():
            yield rest


def _ends_sentence(text: str, stop: re.Match) -> bool:
    next_word = _NEXT_WORD.match(text, stop.end())[1]
    if next_word[:1].islower():
        return False
    if stop.group() != ".":
        return True
    word = text[text.rfind(" ", 0, stop.start()) + 1 : stop.start()].lstrip(_OPENING)
    if word in _ABBREVIATIONS or _DOTTED.fullmatch(word):
        return not next_word or next_word.rstrip(",'’") in _OPENERS
    return word not in _TITLES
