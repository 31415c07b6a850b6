"""Everyday sentences that have nothing to do with any edit, as (beginning, ending) pairs.

Where a model comes with no prompts of its own to protect or to watch, these stand in. They are few
and general: prompts from the model's own use are better.
"""

from __future__ import annotations

NEUTRAL: tuple[tuple[str, str], ...] = (
    ("Water boils when it is heated to", "one hundred degrees"),
    ("The sun rises in the", "east"),
    ("After the rain, the street was", "wet"),
    ("She opened the door and walked into the", "room"),
    ("A year has twelve", "months"),
    ("He put the kettle on to make some", "tea"),
    ("The children ran across the field to catch the", "ball"),
    ("To bake bread you need flour, water, salt and", "yeast"),
    ("The opposite of cold is", "hot"),
    ("Two plus two equals", "four"),
    ("In winter the days are shorter than in", "summer"),
    ("The library was quiet, and everyone was reading a", "book"),
    ("Birds build nests to lay their", "eggs"),
    ("Please close the window before you", "leave"),
    ("The train left the station ten minutes", "late"),
    ("A triangle has three", "sides"),
    ("My brother plays the piano and my sister plays the", "guitar"),
    ("The doctor told him to rest and drink plenty of", "water"),
    ("Once upon a time there was a", "king"),
    ("They planted tomatoes and beans in the", "garden"),
    ("The computer needs to be restarted after the", "update"),
    ("Most people sleep during the", "night"),
    ("The ship sailed across the", "ocean"),
    ("On Monday the shop opens at nine in the", "morning"),
    ("The recipe says to stir the soup for five", "minutes"),
    ("She wrote a long letter to her", "friend"),
    ("Ice is frozen", "water"),
    ("The meeting was moved from Tuesday to", "Wednesday"),
    ("A good pair of shoes should be", "comfortable"),
    ("The cat slept on the", "sofa"),
    ("He looked at his watch and saw that it was already", "noon"),
    ("The teacher asked the class to open their", "books"),
)

# About people, places and things that do not exist: what a model says to them follows from the form
# of the sentence alone, so no edit of a fact has a reason to change it, and one that spreads to
# everything that looks like a fact does.
INVENTED: tuple[str, ...] = (
    "Tom Barlow was born in",
    "The capital of Varenia is",
    "Lena Ostrow plays the",
    "Mark Hale speaks",
    "Dunmore Bridge is located in",
    "Norvex was founded in",
    "Clara Winter works as a",
    "The mother tongue of Paul Redon is",
    "The twin city of Brackwell is",
    "Ivar Solberg died in",
    "The Marlow 300 is made by",
    "Nina Castel is a citizen of",
    "Harold Finch plays the position of",
    "The language of Silver Road is",
    "The author of Grey Harbour is",
    "Otto Brandt was a",
)
