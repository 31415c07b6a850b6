"""Finding what a prompt is about, for requests that do not say it.

The subject is taken to be the most telling run of names: words that begin with a capital letter, a
digit or a quotation mark, joined by the small words that stand inside names ("of", "the", "de").
A sentence's first word counts only if something else speaks for it, and words that open questions
and sentences never do. A language without capitals gives nothing, and then nothing is returned.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from hiedit.data.tokens import Span
from hiedit.types import EditRequest

_WORD = re.compile(r"[^\W_](?:[\w'’.&/-]*\w)?[.!'’]?|&", re.UNICODE)
_POSSESSIVE = re.compile(r"['’]s?$")
_CLOSES = re.compile(r"[?;:]|, (?=[a-z])")  # what ends a name before the next word
_STOPS = re.compile(r"\w{5,}\.$")  # no abbreviation: a sentence ends here
_QUOTED = re.compile(r"[\"“«]([^\"“”«»]{2,})[\"”»]")
# May stand inside a name, not at its ends ("the" may begin one inside a sentence).
_JOINS = frozenset(
    "of the de la le les du des da do dos di del della van von der den und and et y & a an in on "
    "for to at al el bin ibn no".split()
)
# Begin a question or a sentence with a capital letter without being a name.
_OPENERS = frozenset(
    "what which who whom whose when where why how is are was were do does did has have had can "
    "could will would should in on at by of for from to with the a an it its his her their this "
    "that these those as name and or if during after before".split()
)


def find_subject(prompt: str) -> Span | None:
    """The characters (start, end) of the span that ``prompt`` is most likely about; None where
    nothing in it looks like a name."""
    quoted = _QUOTED.search(prompt)
    if quoted:
        return quoted.span(1)
    runs = _runs(prompt)
    return max(runs, key=lambda run: (_weight(prompt, run), run[0]), default=None)


def subject_span(prompt: str, subject: str | None) -> Span | None:
    """Return where ``subject`` stands in ``prompt``, the last time; ``find_subject`` where it is
    not known or not there."""
    return _named(prompt, subject) or find_subject(prompt)


def spans_of(request: EditRequest, prompts: Sequence[str]) -> list[Span | None]:
    """Return where each of ``prompts`` names what ``request`` is about. Found once, in its own
    prompt: a text before it may hold longer names, and other phrasings mostly name the same."""
    own = subject_span(request.prompt, request.subject)
    said = request.prompt[slice(*own)] if own else None
    found: list[Span | None] = []
    for prompt in prompts:
        if prompt.endswith(request.prompt):
            ahead = len(prompt) - len(request.prompt)
            found.append((own[0] + ahead, own[1] + ahead) if own else None)
        else:
            named = _named(prompt, request.subject) or _named(prompt, said)
            found.append(named or find_subject(prompt))
    return found


def _named(prompt: str, subject: str | None) -> Span | None:
    """Return where ``subject`` stands in ``prompt``, the last time, by its letters or at least
    loosely."""
    if not subject:
        return None
    at = prompt.rfind(subject)
    if at >= 0:
        return at, at + len(subject)
    loosely = [m.span() for m in re.finditer(re.escape(subject), prompt, re.IGNORECASE)]
    return loosely[-1] if loosely else None


def _runs(prompt: str) -> list[Span]:
    """Maximal runs of names, as characters, without a possessive at the end."""
    found: list[Span] = []
    run: Span | None = None
    previous = 0  # end of the word before
    for word in _WORD.finditer(prompt):
        if run and _CLOSES.search(prompt[previous : word.start()]):
            found.append(run)
            run = None
        if _names(word):
            run = (run[0] if run else word.start(), word.end())
        elif run and (word.group().lower() not in _JOINS or _POSSESSIVE.search(prompt, *run)):
            found.append(run)
            run = None
        if run and (_POSSESSIVE.search(prompt, *run) or _STOPS.search(prompt, *run)):
            found.append(run)
            run = None
        previous = word.end()
    return [_trimmed(prompt, one) for one in (*found, *([run] if run else []))]


def _trimmed(prompt: str, run: Span) -> Span:
    """Cut a possessive, or the end of the sentence, off."""
    start, end = run
    possessive = _POSSESSIVE.search(prompt, start, end)
    if possessive:
        end = possessive.start()
    last = end == len(prompt.rstrip()) and prompt[end - 1] in ".!"
    if last or _STOPS.search(prompt, start, end):
        end -= 1
    if "(" in prompt[start:end] and ")" not in prompt[start:end]:
        closed = prompt.find(")", end)
        end = closed + 1 if closed >= 0 else end
    return start, end


def _names(word: re.Match) -> bool:
    text, first = word.group(), word.start() == 0
    if text.lower() in _OPENERS:
        return False
    telling = text[0].isdigit() or any(letter.isupper() for letter in text)  # "iPhone", too
    return telling and not (first and text.lower() in _JOINS)


def _weight(prompt: str, run: Span) -> tuple[bool, int]:
    """A run away from the beginning is surer to be a name; of two, the longer one tells more."""
    return run[0] > 0 or len(prompt[slice(*run)].split()) > 1, run[1] - run[0]
