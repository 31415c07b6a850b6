"""The rule by which a continuation gives an answer."""

from __future__ import annotations

import pytest

from hiedit.evaluation.words import match


@pytest.mark.parametrize(
    ("text", "answer", "begins", "ends"),
    [
        (" Paris", "Paris", True, True),
        ("\n\nParis.", "Paris", True, True),
        ("Paris and the", "Paris", True, False),
        ("Paris (France)", "Paris", True, False),
        ("Paris's", "Paris", True, True),
        ("Paris, which", "Paris", True, True),
        ("Nigeria", "Niger", False, False),
        ("Niger", "Nigeria", False, False),
        ("niger", "Niger", False, False),
        ("", "Niger", False, False),
        ("French Polynesia", "French", True, False),
        ("French-speaking", "French", True, False),
        ("1984", "19", False, False),
        ("19th", "19", False, False),
        ("3.5", "3", False, False),
        ("3. Then", "3", True, True),
        ("3.", "3", True, True),
        ("1,000 men", "1", False, False),
        ("U.S.A", "U.S.", True, False),
        ("snake_case", "snake", False, False),
        ("東京。", "東京", True, True),
        ("東京タワー", "東京", True, False),  # no word boundary to see
        ("東京 is", "東京", True, False),
        ("パリ", "パリ", True, True),
        ("コーヒー", "コーヒ", False, False),  # the mark lengthens the last syllable
        ("ปารีสเป็น", "ปารีส", True, False),
        ("กี่", "กี", False, False),  # a tone mark on the last syllable
        ("Paris是", "Paris", True, False),
        ("서울은", "서울", False, False),  # Korean has spaces, and its particles no space before
        ("e\u0301tat", "e", False, False),
        ("e\u0301tat", "\u00e9tat", True, True),
        ("Zürich", "Zu", False, False),
        ("Москва —", "Москва", True, False),
        ("ایران\u200cی", "ایران", False, False),
        ("القاهرة،", "القاهرة", True, True),
    ],
)
def test_complete_text(text, answer, begins, ends):
    found = match(text, answer)
    assert (found.begins, found.ends) == (begins, ends)


@pytest.mark.parametrize(
    ("text", "answer", "begins", "ends"),
    [
        ("", "Paris", None, None),
        (" ", "Paris", None, None),
        ("Par", "Paris", None, None),
        ("Pas", "Paris", False, False),
        ("Paris", "Paris", None, None),
        ("Paris ", "Paris", True, None),
        ("Paris.", "Paris", True, True),
        ("Paris and", "Paris", True, False),
        ("Parisi", "Paris", False, False),
        ("3.", "3", None, None),
        ("3 ", "3", True, None),
        ("東\ufffd", "東京", None, None),  # the first bytes of a character
        ("東京\ufffd", "東京", None, None),
    ],
)
def test_unfinished_text(text, answer, begins, ends):
    found = match(text, answer, complete=False)
    assert (found.begins, found.ends) == (begins, ends)
