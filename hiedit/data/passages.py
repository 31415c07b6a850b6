"""Plain prose that no edit is about, to ask how well a model still reads; and a user's own.

The passages were written for this purpose, in different registers: what they say is common
knowledge or made up.
"""

from __future__ import annotations

import json
from pathlib import Path

PASSAGES: tuple[str, ...] = (
    "The kitchen was still warm when she came down in the morning. Somebody had left a cup on the "
    "table and a letter beside it, unopened. She put the kettle on, looked out at the wet garden, "
    "and decided that the letter could wait until she had eaten something. The dog lifted its "
    "head, sighed, and went back to sleep.",
    "Rivers change their beds more often than maps do. After a flood the water may leave the old "
    "channel altogether and cut a new one through soft ground, so that a village which stood on "
    "the bank finds itself a mile from the stream. Fields that were dry become marsh, and the "
    "marsh, in time, becomes good soil.",
    "To repair a flat tyre, first take the wheel off the bicycle and let out what air is left. "
    "Push one side of the tyre over the rim with two levers, pull out the tube, and pump it up a "
    "little to find the hole. Clean the place, roughen it, spread the glue thinly, and wait until "
    "it is dry before you press the patch on.",
    '"You said that you would be here at six," he said. "I said that I would try," she answered, '
    "and sat down without taking off her coat. Neither of them spoke for a while. The waiter came, "
    "looked at them both, and went away again. At last she laughed. It had been a very long day, "
    "and it was not over yet.",
    "The committee met on Thursday to discuss the budget for the coming year. Members agreed that "
    "the library should stay open on Saturdays, but could not agree on how to pay for it. A "
    "proposal to raise the fee for late books was rejected by nine votes to four. The question "
    "will be taken up again next month.",
    "When a metal is heated, its atoms move faster and need more room, so the metal grows a little "
    "longer. The effect is small, but it matters for bridges and rails, which are built with gaps "
    "that close on hot days. Two metals that grow at different rates, joined in one strip, will "
    "bend when they are warmed; many simple thermostats work in this way.",
    "Dear Sir or Madam, I am writing about the order that I placed with you three weeks ago. The "
    "parcel arrived yesterday, but one of the two lamps was broken, and the instructions were "
    "missing. I would be grateful if you could send me a new lamp, or return the price of it. I "
    "have kept the packaging in case you want to see it. Yours faithfully.",
    "Most of what we call the weather happens in the lowest ten kilometres of the air. The sun "
    "warms the ground, the ground warms the air above it, and warm air rises. As it rises it "
    "cools, and the water that it carries turns into small drops. If there are enough of them we "
    "see a cloud, and if they grow heavy enough they fall as rain.",
    "The old man told the children that the hill had once been an island. They did not believe "
    "him, so he took them to the quarry and showed them shells in the rock, hundreds of them, each "
    "no bigger than a fingernail. After that they believed everything he said, even the story "
    "about the whale, which was not true.",
    "For the soup, cut the onions and the carrots into small pieces and fry them slowly in a "
    "little oil. Add the lentils, a bay leaf and enough water to cover everything well. Let it "
    "simmer for half an hour. Taste it before you add salt, and serve it with bread and a slice of "
    "lemon. It is even better on the second day.",
    "A good question is often worth more than a quick answer. People who study how we learn have "
    "found that we remember best what we had to look for, and that a mistake, once it has been "
    "noticed, teaches more than a lucky guess. This is why tests can help, if they are not "
    "feared, and why it is useful to explain a thing to somebody else.",
    "The match was decided in the last minute. Both teams had missed their chances in the first "
    "half, and the rain made the ball hard to control. Then the youngest player on the field ran "
    "through the middle, passed two defenders, and shot low into the corner. The crowd was silent "
    "for a second, and then it was very loud.",
)

LIMIT = 8192  # tokens of a file that are read


def neutral_texts(file: str | Path | None = None) -> tuple[str, ...]:
    """The texts of ``file``, or without one those that come with the package.

    A ``.jsonl`` file: every string of at least three words that a row holds at its top level. Any
    other: a text a line.

    Raises:
        ValueError: naming ``evaluate.neutral``, if the file cannot be read or has no text.
    """
    if file is None:
        return PASSAGES
    path, key = Path(file), f"evaluate.neutral={str(file)!r}"
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise ValueError(f"{key} cannot be read: {reason}") from None
    texts = lines
    if path.suffix == ".jsonl":
        texts = []
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{key}: line {number} is not JSON: {error}") from None
            values = row.values() if isinstance(row, dict) else [row]
            texts += [v for v in values if isinstance(v, str) and len(v.split()) >= 3]
    if not texts:
        raise ValueError(f"{key} has no text: give a .jsonl file with sentences, or a text a line")
    return tuple(texts)
