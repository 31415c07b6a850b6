"""What a prompt is about, found in it where the request does not say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hiedit.data.subjects import find_subject, spans_of, subject_span
from hiedit.types import EditRequest

PROMPTS = {
    "The capital of France is": "France",
    "The mother tongue of Danielle Darrieux is": "Danielle Darrieux",
    "Danielle Darrieux, a native": "Danielle Darrieux",
    "Autonomous University of Madrid, which is located in": "Autonomous University of Madrid",
    "Autonomous University of Madrid is named after": "Autonomous University of Madrid",
    "Mario Kart 8 was developed by": "Mario Kart 8",
    "The author of The Lord of the Rings is": "Lord of the Rings",
    "He said that Anna Müller-Schmidt lives in": "Anna Müller-Schmidt",
    "iPhone 5 is made by": "iPhone 5",
    "The maker of the iPhone is": "iPhone",
    "Paris": "Paris",
    "The twin city of Cologne, to the south, is": "Cologne",
    # possessives, with either apostrophe
    "Steve Jobs's company is": "Steve Jobs",
    "Cyprus' capital is": "Cyprus",
    "What was the name of Queen Victoria’s father?": "Queen Victoria",
    "The United States of America's president is": "United States of America",
    # quotes
    'Whose song is "yellow submarine"?': "yellow submarine",
    "Who wrote “The Trial”?": "The Trial",
    "L'auteur de «Les Misérables» est": "Les Misérables",
    # questions
    "What is the capital of France?": "France",
    "In which country is Lake Titicaca?": "Lake Titicaca",
    "What position did Lionel Messi's brother play?": "Lionel Messi",
    "Which constellation does NGC 1234 belong to?": "NGC 1234",
    "Who is the director of Dr. Strangelove?": "Dr. Strangelove",
    # sentences
    "The town lies in Wellington. It is": "Wellington",
    "Sammy Davis Jr. sang with": "Sammy Davis Jr.",
    "He knew St. Petersburg. Nobody else": "St. Petersburg",
    # brackets
    "Who wrote Pride and Prejudice (1813 novel)?": "Pride and Prejudice (1813 novel)",
    "The director of Alice (1990) is": "Alice (1990)",
    # other languages
    "La capitale de la France est": "France",
    "Die Stadt München liegt in": "Die Stadt München",  # nouns have capitals too
    "Ludwig van Beethoven wurde geboren in": "Ludwig van Beethoven",
    "Столица Франции —": "Столица Франции",
    "Где родился Лев Толстой?": "Лев Толстой",
    "🙂 Paris 🙂 is in": "Paris",
    # nothing that looks like a name
    "法国的首都是": None,
    "what is the highest mountain?": None,
    "What is it?": None,
    "is": None,
    "": None,
    " \n ": None,
    "🙂": None,
    "?!": None,
}


@pytest.mark.parametrize(("prompt", "wanted"), PROMPTS.items(), ids=str)
def test_the_subject_of_a_prompt(prompt, wanted):
    span = find_subject(prompt)
    assert (span and prompt[slice(*span)]) == wanted


@pytest.mark.parametrize(
    ("prompt", "subject", "wanted"),
    [
        ("Rome is in Rome", "Rome", (11, 15)),  # the last time
        ("the city of rome is", "Rome", (12, 16)),
        ("In ISTANBUL live", "Istanbul", (3, 11)),
        ("İİ straße rome is", "Rome", (10, 14)),  # letters whose lower case is longer
        ("A (b) is", "(B)", (2, 5)),  # no pattern
        ("法国的首都是", "法国", (0, 2)),
        ("The capital of France is", "Lyon", (15, 21)),  # not there: found
        ("The capital of France is", None, (15, 21)),
        ("The capital of France is", "", (15, 21)),
        ("法国的首都是", "Lyon", None),
    ],
)
def test_a_subject_that_is_named_counts_where_it_stands(prompt, subject, wanted):
    assert subject_span(prompt, subject) == wanted


def test_every_prompt_of_a_request_has_its_own_place():
    request = EditRequest("The capital of France is", "Lyon", subject="France")
    prompts = [request.prompt, "France, whose capital is", "Its capital is"]
    assert spans_of(request, prompts) == [(15, 21), (0, 6), None]


def test_a_text_before_the_prompt_does_not_distract():
    """Contexts name things too, and longer ones; a phrasing names what the prompt names."""
    for subject in (None, "france"):
        request = EditRequest("The capital of France is", "Lyon", subject=subject)
        prompts = [
            "University of Southern California. The capital of France is",
            "John Fitzgerald Kennedy once said. In France the capital is",
        ]
        spans = spans_of(request, prompts)
        assert [p[slice(*s)] for p, s in zip(prompts, spans, strict=True)] == ["France", "France"]
        assert find_subject(prompts[0]) == (0, 33)
    nobody = EditRequest("the capital is", "Lyon")
    assert spans_of(nobody, ["In Rome. the capital is", "of Rome it is"]) == [None, (3, 7)]


@pytest.mark.parametrize(("name", "share"), [("counterfact", 0.96), ("zsre", 0.94)])
def test_real_prompts(data_dir, name, share):
    """How often the span that is found ends where the subject of the record does."""
    path = data_dir / name / "train.json"
    if not path.is_file():
        pytest.skip(f"no real records: {path} is missing")
    pairs = [_named(row) for row in json.loads(Path(path).read_text(encoding="utf-8"))]
    pairs = [(prompt, subject) for prompt, subject in pairs if subject and subject in prompt]
    ends = [prompt.rfind(subject) + len(subject) for prompt, subject in pairs]
    found = [find_subject(prompt) for prompt, _ in pairs]
    right = sum(span is not None and span[1] == end for span, end in zip(found, ends, strict=True))
    print(f"{name}: {right} of {len(pairs)} ({right / len(pairs):.3f})")
    assert len(pairs) > 900 and right / len(pairs) >= share


def _named(row: dict) -> tuple[str, str | None]:
    prompt = row.get("prompt") or row.get("src")
    return prompt, row.get("subject")
