"""Which tokens are read once, and where they lie: the plan of a packed forward."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from service.engine.contract import ScoreItem
from service.engine.torch.packing import PackedBatch, cut, plan

MOST_ROWS = 24


@st.composite
def prompts(draw: st.DrawFn) -> ScoreItem:
    """An item of 1 to 12 tokens out of two, so that equal prefixes are common, with boundaries anywhere."""
    tokens = draw(st.lists(st.integers(0, 1), min_size=1, max_size=12))
    places = draw(st.sets(st.integers(0, 14), max_size=3))
    return ScoreItem(tokens, (0,), tuple(sorted(places)))


batches = st.lists(prompts(), max_size=12)


def read_back(pack: PackedBatch, index: int) -> list[int]:
    """The tokens that the item's last token sees, by the pack's own account."""
    (last,) = (s for s in pack.segments if s.row + len(s.tokens) - 1 == pack.last_row[index])
    return [token for number in last.chain for token in pack.segments[number].tokens]


@given(batches, st.integers(1, 4))
def test_every_items_tokens_are_in_its_chain(items: list[ScoreItem], workers: int) -> None:
    """Each item is in one pack, and its last token sees its own tokens in their order."""
    packs = plan(items, MOST_ROWS, workers)

    found = {index: read_back(pack, index) for pack in packs for index in pack.last_row}
    assert sum(len(pack.last_row) for pack in packs) == len(items)
    assert found == {index: list(item.token_ids) for index, item in enumerate(items)}


@given(batches)
def test_rows_are_filled_without_gaps(items: list[ScoreItem]) -> None:
    """Segments stand one behind the other, each after what it sees, at the position that it has in its item."""
    for pack in plan(items, MOST_ROWS):
        rows = [row for s in pack.segments for row in range(s.row, s.row + len(s.tokens))]

        assert rows == list(range(pack.rows))
        assert [s.chain[-1] for s in pack.segments] == list(range(len(pack.segments)))
        assert [s.position for s in pack.segments] == [
            sum(len(pack.segments[number].tokens) for number in s.chain[:-1]) for s in pack.segments
        ]


@given(batches)
def test_prefixes_are_shared_exactly_when_they_are_equal(items: list[ScoreItem]) -> None:
    """In one pack there are as many segments as there are different prefixes up to a cut."""
    pack = PackedBatch()
    counted = pack.added_rows(items)

    for index, item in enumerate(items):
        pack.add(index, item)

    prefixes = {tuple(pieces[: end + 1]) for pieces in map(cut, items) for end in range(len(pieces))}
    assert len(pack.segments) == len(prefixes)
    assert pack.rows == counted == sum(len(prefix[-1]) for prefix in prefixes)
    assert pack.rows + sum(pack.cached.values()) == sum(len(item.token_ids) for item in items)


@given(batches, prompts())
def test_neighbours_do_not_move_the_cuts(items: list[ScoreItem], item: ScoreItem) -> None:
    """An item's chain has the same pieces beside any others as alone."""
    packs = plan([*items, item], MOST_ROWS)

    (pack,) = (pack for pack in packs if len(items) in pack.last_row)
    (last,) = (s for s in pack.segments if s.row + len(s.tokens) - 1 == pack.last_row[len(items)])
    assert [pack.segments[number].tokens for number in last.chain] == cut(item)


@given(batches, st.integers(1, 4))
def test_packs_stay_in_their_size(items: list[ScoreItem], workers: int) -> None:
    """No pack is over the limit, as no item is."""
    assert all(pack.rows <= MOST_ROWS for pack in plan(items, MOST_ROWS, workers))


def test_a_prompt_with_two_answers_is_read_once() -> None:
    """What two items have before the last boundary is laid out once, and counted as not computed again."""
    items = [ScoreItem([1, 2, 3, 4], (0,), (1, 3)), ScoreItem([1, 2, 3, 5, 6], (0,), (1, 3))]

    (pack,) = plan(items, MOST_ROWS)

    assert [s.tokens for s in pack.segments] == [(1,), (2, 3), (4,), (5, 6)]
    assert pack.cached == {0: 0, 1: 3}


def test_work_is_spread_over_the_workers() -> None:
    """Eight items make four packs for four workers, two for two, and one for one."""
    items = [ScoreItem([index] * 3, (0,)) for index in range(8)]

    assert [len(plan(items, MOST_ROWS, workers)) for workers in (1, 2, 4)] == [1, 2, 4]


def test_answers_to_one_prompt_are_divided_only_where_that_is_asked_for() -> None:
    """For workers that can read one pack together they are one; beside others each prompt's stay together."""
    alike = [ScoreItem([1, 2, 3, index], (0,), (3,)) for index in range(8)]
    others = [ScoreItem([7, 8, index], (0,), (2,)) for index in range(8)]

    assert len(plan(alike, MOST_ROWS, 4)) == 4
    assert len(plan(alike, MOST_ROWS, 4, divided=False)) == 1
    assert [sorted(pack.last_row) for pack in plan([*alike, *others], MOST_ROWS, 4, divided=False)] == [
        list(range(8)),
        list(range(8, 16)),
    ]
