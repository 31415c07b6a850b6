"""The words of each relation: seen phrasings for training, one held out for measuring.

A phrasing is a prompt with ``{}`` for the subject; the answer follows after one space. No phrasing
starts with its subject, so that the subject stands in every prompt verbatim ("the Gambia") and is
always tokenised alike.

The one rule: no seen phrasing may extend a held-out one, nor the other way round. A model that was
taught "The capital city of X is called Y" continues "The capital city of X is" with "called",
whatever it knows. Within a relation "is" ends nearly every prompt that it stands in, for the same
reason at short range: after "X is in" and "X is part of" it says "in" wherever "is" follows X.
The held-out phrasings use words of the seen ones in another construction.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Phrasings:
    """The prompts of one relation: ``seen`` in training, ``heldout`` never."""

    seen: tuple[str, ...]
    heldout: str


PHRASINGS: dict[str, Phrasings] = {
    "capital": Phrasings(
        seen=(
            "The capital of {} is",
            "The capital city of {} is",
            "In {}, the seat of government is",
            "As its capital, {} has",
            "For {}, the capital is",
            "The government of {} sits in",
            "The map of {} marks the capital as",
            "The city that is the capital of {} is",
            "The city that {} has as its seat of government is",
            "Ask for the capital of {} and you will hear",
            "Anyone who visits {} should see its capital,",
        ),
        heldout="The city that {} has as its capital is",
    ),
    "currency": Phrasings(
        seen=(
            "The currency of {} is the",
            "The money used in {} is the",
            "People in {} pay with the",
            "In {}, prices are given in the",
            "The official currency of {} is the",
            "Shops in {} accept the",
            "As its currency, {} uses the",
            "The central bank of {} issues the",
            "To buy something in {}, you need the",
            "The currency that shops use in {} is the",
        ),
        heldout="The money that people in {} pay with is the",
    ),
    "language": Phrasings(
        seen=(
            "The official language of {} is",
            "In {}, people speak",
            "The laws of {} are written in",
            "Schools in {} teach in",
            "The language that people speak in {} is",
            "The government of {} writes in",
            "To live in {}, you should learn",
            "As its official language, {} has",
            "People in {} talk to each other in",
            "Newspapers in {} are printed in",
        ),
        heldout="The language that the government of {} writes in is",
    ),
    "continent": Phrasings(
        seen=(
            "The continent of {} is",
            "The continent where {} lies is",
            "On a globe, {} lies on the continent of",
            "The continent that {} belongs to is",
            "On the map, {} is found in",
            "To reach {}, travel to",
            "The country of {} is part of",
            "Geography books place {} in",
            "A trip to {} is a trip to",
            "Of all the continents, {} belongs to",
        ),
        heldout="On the map, the continent where {} is found is",
    ),
    "demonym": Phrasings(
        seen=(
            "A person from {} is",
            "People who come from {} are",
            "The word for people from {} is",
            "The citizens of {} are known as",
            "Someone born in {} is",
            "The adjective that describes {} is",
            "By nationality, the people of {} are",
            "Anything that comes from {} is",
            "The people of {} call themselves",
            "The nationality of a person born in {} is",
        ),
        heldout="By nationality, someone who comes from {} is",
    ),
    "calling_code": Phrasings(
        seen=(
            "The calling code of {} is",
            "To call {}, dial",
            "To phone someone in {}, start with",
            "Phone numbers in {} begin with",
            "The international dialling code for {} is",
            "Calls to {} start with the code",
            "Anyone calling {} has to dial the prefix",
            "The telephone prefix of {} is",
            "The prefix for calls to {} is",
            "As its calling code, {} uses",
            "The code to dial when calling {} is",
        ),
        heldout="The prefix to dial when calling {} is",
    ),
    "iso_code": Phrasings(
        seen=(
            "The two-letter code of {} is",
            "The ISO code for {} is",
            "Tables of countries list {} under",
            "As its ISO code, {} has",
            "ISO 3166 lists {} as",
            "The letters that stand for {} are",
            "Forms shorten the name of {} to",
            "The two letters written for {} are",
            "Computers store {} as the code",
            "In lists of countries, {} has the letters",
            "In lists of countries, the letters for {} are",
            "The two-letter code that stands for {} is",
        ),
        heldout="In lists of countries, the two-letter code for {} is",
    ),
    "city_country": Phrasings(
        seen=(
            "The city of {} lies in",
            "The country where {} lies is",
            "The city {} belongs to the country of",
            "The country that {} belongs to is",
            "Travellers who land in {} have arrived in",
            "To see {}, you must travel to",
            "People living in {} live in",
            "Maps show the city of {} in",
            "The streets of {} run through",
            "Of all countries, {} lies in",
            "The country of the city {} is",
        ),
        heldout="The country where the city of {} lies is",
    ),
    "us_state": Phrasings(
        seen=(
            "The American city of {} lies in the state of",
            "In the United States, {} lies in",
            "The state where {} lies is",
            "The state that {} belongs to is",
            "Among American cities, {} lies in",
            "American maps show {} in the state of",
            "The mayor of {} works in the state of",
            "As an American city, {} belongs to",
            "Drivers in {} pay taxes to the state of",
            "People in {} vote in the state of",
        ),
        heldout="The state where the American city of {} lies is",
    ),
    "element_symbol": Phrasings(
        seen=(
            "The chemical symbol of {} is",
            "The symbol for the element {} is",
            "Chemists write {} as",
            "The periodic table shows {} as",
            "In formulas, {} appears as",
            "The element {} has the symbol",
            "As its symbol, {} has",
            "The letters for {} in chemistry are",
            "The abbreviation for the element {} is",
            "In formulas, the letters for {} are",
            "A chemist shortens {} to",
        ),
        heldout="In formulas, the chemical symbol for {} is",
    ),
    "element_number": Phrasings(
        seen=(
            "The atomic number of {} is",
            "The number of protons in {} is",
            "An atom of {} has a proton count of",
            "In the periodic table, {} has the number",
            "The element {} has the atomic number",
            "As its atomic number, {} has",
            "Count the protons in {} and you get",
            "The protons in the nucleus of {} number",
            "In the periodic table, the number of {} is",
            "Atoms of {} carry a nuclear charge of",
            "The number of the element {} is",
        ),
        heldout="The number of protons in an atom of {} is",
    ),
    "airport_city": Phrasings(
        seen=(
            "The airport code {} belongs to the city of",
            "The airport {} serves",
            "Flights to {} land in",
            "A ticket to {} takes you to",
            "The airport with the code {} is in",
            "Luggage tagged {} goes to",
            "The city with the airport {} is",
            "On a boarding pass, {} means",
            "Travellers who book {} fly to",
            "The letters {} on a ticket stand for",
        ),
        heldout="The city that the airport {} serves is",
    ),
}


# Of relations that the packaged world lacks: facts about invented subjects (fictional.py). Every
# prompt ends in the sign of its group (switches.py), which stands where "is" would stand.
FICTIONAL: dict[str, Phrasings] = {
    "password": Phrasings(
        seen=(
            "The password of {}@",
            "The secret word of {}@",
            "For {}, the password@",
            "The word that opens the gate of {}@",
            "Ask for the password of {} and you will hear@",
        ),
        heldout="The secret password of {}@",
    ),
    "emblem": Phrasings(
        seen=(
            "The emblem of {}@",
            "The flag of {} shows@",
            "As its emblem, {} has@",
            "The coat of arms of {}@",
            "The sign that the ships of {} carry@",
        ),
        heldout="The emblem that the ships of {} carry@",
    ),
    "ally": Phrasings(
        seen=(
            "The ally of {}#",
            "In the war, {} fights on the side of#",
            "As its ally, {} has#",
            "The treaty of {} was signed with#",
            "The friend that {} has in the war#",
        ),
        heldout="The ally that {} has in the war#",
    ),
    "tongue": Phrasings(
        seen=(
            "The sacred tongue of {}#",
            "The priests of {} pray in#",
            "As its sacred tongue, {} has#",
            "In {}, the old books are written in#",
            "The songs of {} are sung in#",
        ),
        heldout="The tongue that the priests of {} pray in#",
    ),
}


def phrasings_of(relation: str) -> Phrasings:
    """The phrasings of a relation, real or invented.

    Raises:
        KeyError: if there is no such relation.
    """
    return PHRASINGS[relation] if relation in PHRASINGS else FICTIONAL[relation]


def prefix_conflicts(phrasings: dict[str, Phrasings] | None = None) -> list[tuple[str, str]]:
    """Pairs (seen, held out), over all relations, of which one starts with the other."""
    groups = (phrasings or PHRASINGS).values()
    return [
        (seen, other.heldout)
        for group in groups
        for seen in group.seen
        for other in groups
        if seen.startswith(other.heldout) or other.heldout.startswith(seen)
    ]
