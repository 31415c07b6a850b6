"""The order of edits: seeded, resumable, and split so that no subject is on both sides."""

import json

import pytest

from hiedit.data import EditStream, StreamConfig, splits, train_and_edit
from hiedit.data.stream import standing
from hiedit.types import EditRequest


def make(count: int, per_subject: int = 1) -> list[EditRequest]:
    return [
        EditRequest(f"prompt {i}", f"target {i}", subject=f"subject {i // per_subject}")
        for i in range(count)
    ]


def test_batches_cover_the_stream_in_order_and_the_last_may_be_short():
    stream = EditStream(make(10), StreamConfig(length=7, n_edits=3))
    batches = list(stream)
    assert [len(batch) for batch in batches] == [3, 3, 1] and len(stream) == 3
    assert [batch.first for batch in batches] == [0, 3, 6]
    assert sum((batch.requests for batch in batches), ()) == stream.requests
    assert stream.edits == 7 and stream[-1] == batches[2]
    assert list(stream) == batches  # a second walk sees the same
    with pytest.raises(IndexError, match="step 3: the stream has 3"):
        stream[3]


def test_the_order_depends_on_the_seed_alone():
    rows = make(8)
    order = [int(r.prompt.split()[1]) for r in EditStream(rows, StreamConfig(seed=1)).requests]
    assert order == [0, 3, 5, 4, 6, 2, 7, 1]  # fixed: the same on every platform
    other = EditStream(rows, StreamConfig(seed=2)).requests
    assert other != EditStream(rows, StreamConfig(seed=1)).requests
    assert EditStream(rows, StreamConfig(shuffle=False)).requests == tuple(rows)
    short = EditStream(rows, StreamConfig(seed=1, length=3)).requests
    assert short == EditStream(rows, StreamConfig(seed=1)).requests[:3]


@pytest.mark.parametrize(
    ("config", "numbers"),
    [({"length": 11}, "length=11.*10"), ({"n_edits": 11}, "n_edits=11.*10")],
)
def test_more_edits_than_rows(config, numbers):
    with pytest.raises(ValueError, match=numbers):
        EditStream(make(10), StreamConfig(**config))
    with pytest.raises(ValueError, match="there are 0"):
        EditStream([])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("length", 0),
        ("length", "200"),
        ("n_edits", 0),
        ("n_edits", 1.5),
        ("n_edits", None),
        ("seed", -1),
        ("seed", True),
        ("shuffle", 1),
        ("train_share", 1.0),
        ("train_share", "half"),
    ],
)
def test_bad_settings_name_the_key(key, value):
    with pytest.raises(ValueError, match=f"stream.{key}="):
        StreamConfig(**{key: value})


def test_an_edit_stands_until_its_fact_gets_another_answer():
    def rows(*answers):
        return [EditRequest(p, t, subject=s, relation=r, old_target=o) for p, t, s, r, o in answers]

    bare = [("a", "1"), ("b", "1"), ("a", "2"), ("a", "2"), ("a", "1")]
    assert standing(rows(*((*pair, None, None, None) for pair in bare))) == [1, 1, 0, 0, 1]
    assert all(standing(make(5)))

    # another phrasing of the same fact: the subject, and what was true of it
    phrased = rows(
        ("Who bore Jane?", "Ann", "Jane", None, "Eve"),
        ("Jane's mother?", "Sue", "jane", None, "eve"),
        ("Jane's mother is", "Sue", "Jane", None, "Eve"),
        ("Jane's town?", "Rome", "Jane", None, "Oslo"),
        ("Eve's mother?", "Ann", "Ada", None, "Eve"),
    )
    assert standing(phrased) == [0, 1, 1, 1, 1] and all(standing(phrased[3:]))

    # a relation tells facts apart that had the same answer
    told = rows(
        ("Jane was born in", "Rome", "Jane", "P19", "Oslo"),
        ("Jane lives in", "Bonn", "Jane", "P551", "Oslo"),
        ("The birthplace of Jane is", "Kyiv", "Jane", "P19", "Oslo"),
    )
    assert standing(told) == [0, 1, 1]


def test_resuming_goes_on_where_the_state_was_taken():
    rows = make(10)
    stream = EditStream(rows, StreamConfig(n_edits=3, seed=5))
    whole = list(stream)
    for batch in stream:
        if batch.first == 3:
            break
    state = json.loads(json.dumps(stream.state()))
    rest = EditStream.from_state(rows, state)
    assert rest.position == 2 and list(rest) == whole[2:]
    assert list(EditStream.from_state(rows, rest.state())) == []
    assert list(EditStream.from_state(rows, EditStream(rows).state())) == list(EditStream(rows))


def test_a_state_of_other_rows_or_none_is_refused():
    state = EditStream(make(10)).state()
    with pytest.raises(ValueError, match="other edit requests"):
        EditStream.from_state(make(9), state)
    with pytest.raises(ValueError, match="not the state"):
        EditStream.from_state(make(10), {"position": 1})
    with pytest.raises(ValueError, match="position 11: the stream has 10"):
        EditStream.from_state(make(10), {**state, "position": 11})


def test_splits_share_no_subject_and_keep_the_order():
    rows = make(100, per_subject=3) + [EditRequest("same", str(i)) for i in range(4)]
    rows.append(EditRequest("prompt 0", "again"))  # no subject, but a prompt whose subject is known
    train, test, rest = splits(rows, (0.5, 0.3, 0.2), seed=3)
    assert sorted(map(id, train + test + rest)) == sorted(map(id, rows))
    for a, b in ((train, test), (train, rest), (test, rest)):
        assert not {r.prompt for r in a} & {r.prompt for r in b}
        assert not {r.subject for r in a if r.subject} & {r.subject for r in b if r.subject}
    assert [len(part) for part in (train, test, rest)] == pytest.approx([52, 31, 21], abs=4)
    assert list(train) == [r for r in rows if r in train]
    assert splits(rows, (0.5, 0.3, 0.2), seed=3) == (train, test, rest)
    assert splits(rows, (0.5, 0.3, 0.2), seed=4)[0] != train
    assert 7 <= len(splits(rows, (0.1,))[0]) <= 14


def test_subjects_differ_by_more_than_case():
    rows = [EditRequest(f"p{i}", "t", subject=s) for i, s in enumerate(["Ann", "ANN", "Bob"])]
    parts = splits(rows, (0.5, 0.5))
    assert {len(part) for part in parts} == {1, 2}


@pytest.mark.parametrize("fractions", [(), (0.5, 0.6), (1.0, 0.0), (-0.1,)])
def test_bad_fractions(fractions):
    with pytest.raises(ValueError, match="fractions="):
        splits(make(10), fractions)


def test_a_part_without_rows_is_an_error():
    with pytest.raises(ValueError, match="nothing is left for 0.5 of 10 requests with 1 subjects"):
        splits(make(10, per_subject=10), (0.5, 0.5))


def test_train_and_edit_of_one_file():
    train, edit = train_and_edit(make(50), StreamConfig(train_share=0.8))
    assert (len(train), len(edit)) == (40, 10)
