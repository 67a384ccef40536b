"""Which tokens of a packed batch are computed once, and where they are."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from service.engine.contract import ScoreItem
from service.engine.torch.packing import PackedBatch, cut, pack

MAX_TOKENS = 24


@st.composite
def prompts(draw: st.DrawFn) -> ScoreItem:
    """An item of 1 to 12 tokens out of two, so that equal prefixes are common, with boundaries anywhere."""
    tokens = draw(st.lists(st.integers(0, 1), min_size=1, max_size=12))
    places = draw(st.sets(st.integers(0, 14), max_size=3))
    return ScoreItem(tokens, (0,), tuple(sorted(places)))


item_lists = st.lists(prompts(), max_size=12)


def read_back(batch: PackedBatch, index: int) -> list[tuple[int, ...]]:
    """The segments that the item's last token attends to, by the batch's own account."""
    (last,) = (segment for segment in batch.segments if segment.span.stop - 1 == batch.last_token[index])
    return [batch.segments[number].token_ids for number in last.chain]


@given(item_lists, st.integers(1, 4))
def test_every_items_tokens_are_in_its_chain(items: list[ScoreItem], workers: int) -> None:
    """Each item is in one batch, and its last token attends to its own tokens in their order."""
    batches = pack(items, MAX_TOKENS, workers)

    found = {index: sum(read_back(batch, index), ()) for batch in batches for index in batch.last_token}
    assert sum(len(batch.last_token) for batch in batches) == len(items)
    assert found == {index: tuple(item.token_ids) for index, item in enumerate(items)}


@given(item_lists)
def test_a_batch_is_filled_without_gaps(items: list[ScoreItem]) -> None:
    """Each segment follows those that it attends to, at the position that it has in its item."""
    for batch in pack(items, MAX_TOKENS):
        places = [place for segment in batch.segments for place in range(segment.span.start, segment.span.stop)]
        lengths = [len(segment.token_ids) for segment in batch.segments]

        assert places == list(range(batch.num_tokens))
        assert [segment.chain[-1] for segment in batch.segments] == list(range(len(batch.segments)))
        assert [segment.position for segment in batch.segments] == [
            sum(lengths[number] for number in segment.chain[:-1]) for segment in batch.segments
        ]


@given(item_lists)
def test_prefixes_are_shared_exactly_when_they_are_equal(items: list[ScoreItem]) -> None:
    """A batch has as many segments as there are different prefixes up to a cut."""
    batch = PackedBatch()
    counted = batch.added_tokens(items)

    for index, item in enumerate(items):
        batch.add(index, item)

    prefixes = {segments[: end + 1] for segments in map(cut, items) for end in range(len(segments))}
    assert len(batch.segments) == len(prefixes)
    assert batch.num_tokens == counted == sum(len(prefix[-1]) for prefix in prefixes)
    assert batch.num_tokens + sum(batch.cached_tokens.values()) == sum(len(item.token_ids) for item in items)


@given(item_lists, prompts())
def test_neighbours_do_not_move_the_cuts(items: list[ScoreItem], item: ScoreItem) -> None:
    """An item's chain has the same segments beside any others as alone."""
    batches = pack([*items, item], MAX_TOKENS)

    (batch,) = (batch for batch in batches if len(items) in batch.last_token)
    assert tuple(read_back(batch, len(items))) == cut(item)


@given(item_lists, st.integers(1, 4))
def test_batches_stay_within_their_size(items: list[ScoreItem], workers: int) -> None:
    """No batch is over the limit, as no item is."""
    assert all(batch.num_tokens <= MAX_TOKENS for batch in pack(items, MAX_TOKENS, workers))


def test_a_prompt_with_two_answers_is_computed_once() -> None:
    """What two items have before the last boundary is in the batch once, and counted as cached."""
    items = [ScoreItem([1, 2, 3, 4], (0,), (1, 3)), ScoreItem([1, 2, 3, 5, 6], (0,), (1, 3))]

    (batch,) = pack(items, MAX_TOKENS)

    assert [segment.token_ids for segment in batch.segments] == [(1,), (2, 3), (4,), (5, 6)]
    assert batch.cached_tokens == {0: 0, 1: 3}


def test_work_is_spread_over_the_workers() -> None:
    """Eight items make four batches for four workers, two for two, and one for one."""
    items = [ScoreItem([index] * 3, (0,)) for index in range(8)]

    assert [len(pack(items, MAX_TOKENS, workers)) for workers in (1, 2, 4)] == [1, 2, 4]


def test_answers_to_one_prompt_are_divided_only_on_request() -> None:
    """Workers that can share a batch get one; with two prompts each prompt's answers stay together."""
    first = [ScoreItem([1, 2, 3, index], (0,), (3,)) for index in range(8)]
    second = [ScoreItem([7, 8, index], (0,), (2,)) for index in range(8)]

    assert len(pack(first, MAX_TOKENS, 4)) == 4
    assert len(pack(first, MAX_TOKENS, 4, split_groups=False)) == 1
    assert [sorted(batch.last_token) for batch in pack([*first, *second], MAX_TOKENS, 4, split_groups=False)] == [
        list(range(8)),
        list(range(8, 16)),
    ]
