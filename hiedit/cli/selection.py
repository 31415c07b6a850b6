"""The edits that a command means: ids, ranges, the newest, all since a date."""

from __future__ import annotations

import re
from datetime import UTC, datetime


def chosen(
    what: str, records: list, old: str, ids: list[str], since: str | None, last: int | None
) -> list[int]:
    """The ids that the command names; of a range or a date, those of status ``old``."""
    if sum(bool(given) for given in (ids, since, last)) != 1:
        raise ValueError(f"{what}: give ids, --since or --last, one of them")
    candidates = [record for record in records if record.status == old]
    if last:
        chosen = [record.id for record in candidates][-last:]
        where = "in the ledger"
    elif since is not None:
        chosen = [record.id for record in candidates if _is_since(record, since)]
        where = f"since {since}"
    else:
        chosen = [edit for text in ids for edit in _ids(text, candidates)]
        where = f"among {' '.join(ids)}"
    if not chosen:
        raise ValueError(f"{what}: there is no {old} edit {where}")
    return chosen


def _ids(text: str, candidates: list) -> list[int]:
    """A range means the candidates in it; a single id is taken as it is, to be refused later with
    the reason if it has to be."""
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
    if not match:
        raise ValueError(f"{text!r} is no id: give numbers as in `hiedit history`, or 5-9")
    first, end = int(match[1]), match[2]
    if end is None:
        return [first]
    if int(end) < first:
        raise ValueError(f"{text!r} is no range: its end comes before its beginning")
    return [record.id for record in candidates if first <= record.id <= int(end)]


def _is_since(record, since: str) -> bool:
    if since.isdecimal():
        return record.id >= int(since)
    try:
        moment = datetime.fromisoformat(since)
    except ValueError:
        raise ValueError(
            f"--since={since!r}: give an id, or a date such as 2026-01-31 or 2026-01-31T14:00"
        ) from None
    moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    return datetime.fromisoformat(record.created) >= moment
