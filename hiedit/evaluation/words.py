"""Does a continuation begin with the answer, at a word boundary; and does it end there?

Both are asked of what a model says after a prompt. White space in front is skipped; letters, case
and accents must be the answer's (compared in Unicode's NFC). Standard library only.
"""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass

ENDS = tuple("\n\r.,;:!?)\"'" + "。，、；：！？）」』”’»…।؟،؛")  # may follow a complete answer
# Scripts that are written without spaces, where no word boundary can be seen.
SPACELESS = (
    (0x0E00, 0x0EFF), (0x0F00, 0x0FFF), (0x1000, 0x109F), (0x1780, 0x17FF), (0x1950, 0x19DF),
    (0x1A20, 0x1AAF), (0x2E80, 0x312F), (0x31A0, 0x4DBF), (0x4E00, 0xA4CF), (0xA980, 0xA9DF),
    (0xA9E0, 0xA9FF), (0xAA60, 0xAADF), (0xF900, 0xFAFF), (0xFF66, 0xFF9D), (0x1B000, 0x1B16F),
    (0x20000, 0x3FFFF),
)  # fmt: skip
SEPARATORS = ".,:'’٫٬"  # inside a number
JOINERS = "\u00ad\u200c\u200d\u2060"  # soft hyphen, zero-width (non-)joiner, word joiner


@dataclass(frozen=True)
class Match:
    """begins: the text begins with the answer, at a word boundary. ends: and it ends there, or
    goes on with punctuation. None: cannot be told before more of the text is known."""

    begins: bool | None
    ends: bool | None


def match(text: str, answer: str, complete: bool = True) -> Match:
    """Tell whether ``text``, what was said after a prompt, gives ``answer``.

    complete: nothing follows ``text``; where it is False, both may be None.
    """
    text, answer = (unicodedata.normalize("NFC", t) for t in (text, answer))
    text, answer = text.lstrip(), answer.strip()
    if not complete:
        text = text.rstrip("�")  # the first bytes of a character
        if len(text) < len(answer):
            undecided = None if answer.startswith(text) else False
            return Match(undecided, undecided)
    if not text.startswith(answer):
        return Match(False, False)
    rest = text[len(answer) :]
    begins = _at_boundary(answer, rest, complete)
    return Match(begins, _ends(rest, complete) if begins else begins)


def _at_boundary(answer: str, rest: str, complete: bool) -> bool | None:
    """Tell whether ``rest`` does not continue the last word of ``answer``."""
    if not rest:
        return True if complete else None
    last, first = answer[-1:], rest[0]
    if unicodedata.category(first)[0] == "M" or first in JOINERS:
        return False
    if last.isdecimal() and first in SEPARATORS:
        following = rest[1:2]
        return not following.isdecimal() if following or complete else None
    if not (_in_word(last) and _in_word(first)):
        return True
    if unicodedata.category(first) == "Lm":  # a mark that lengthens or repeats what it follows
        return False
    return _spaceless(last) or _spaceless(first)


def _ends(rest: str, complete: bool) -> bool | None:
    rest = rest.lstrip(" \t\u00a0\u3000")
    if not rest:
        return True if complete else None
    return rest.startswith(ENDS)


def _in_word(character: str) -> bool:
    return unicodedata.category(character)[0] in "LMN" or character == "_"


def _spaceless(character: str) -> bool:
    code = ord(character)
    return any(low <= code <= high for low, high in SPACELESS)
