"""The messages of the queue on Redis: what is written is read back exactly, and anything else is refused."""

from __future__ import annotations

import pytest

from client.errors import ErrorCode
from service.engine.contract import (
    AnyItem,
    Classified,
    ClassifyItem,
    Generated,
    GeneratedText,
    GenerateItem,
    LabelLogprobs,
    ScoreItem,
    TextGenerateItem,
    TextScoreItem,
)
from service.queue.contract import Job, JobFailure, Priority, Reply
from service.queue.redis_messages import UnreadableJobError, decode_job, decode_replies, encode_job, encode_replies
from tests.queue.malformed_entries import MALFORMED_ENTRIES

ITEMS = [
    ScoreItem((0, 5, 2**32 - 1), (7, 9), (1, 2)),
    ClassifyItem((0, 5, 2**32 - 1), (1, 2)),
    GenerateItem((0, 5, 2**32 - 1), 256, (2, 7), 0.7, 2**63 - 1, (1, 2)),
    GenerateItem((5,), 8, ()),
    TextScoreItem("2+2? 日本\n<|im_end|>", ("Yes", " No")),
    TextGenerateItem("🙂", 256, 0.7, 2**63 - 1),
]


@pytest.mark.parametrize("item", ITEMS)
def test_a_job_is_read_back_as_it_was(item: AnyItem) -> None:
    """The message keeps every field of every task, large token ids included."""
    sent = Job("id", item, 12.5, 10.25, Priority.BULK, 2, "00-ab-cd-01")

    assert decode_job(encode_job(sent, "api"), Priority.BULK, 2) == (sent, "api")


def test_replies_are_read_back_to_the_bit() -> None:
    """The message keeps every number exactly, and failures with their codes."""
    replies = [
        Reply("a", LabelLogprobs((-0.1, -1e-17), 3, 40), 0.1, 0.2),
        Reply("b", JobFailure(ErrorCode.DEADLINE_EXCEEDED, "late")),
        Reply("c", LabelLogprobs((-0.1, -20.0), 3, 0, floored=True)),
        Reply("d", Classified(-1e-17, 40), 0.1, 0.2),
        Reply("e", Generated((5, 70_000), True, 40), 0.1, 0.2),
        Reply("f", Generated((), False)),
        Reply("g", GeneratedText("Score: 4 🙂\n", True, 5, 40), 0.1, 0.2),
    ]

    assert decode_replies(encode_replies(replies)) == replies


NEWER_TASK = encode_job(Job("id", ITEMS[1], 1.0, 1.0), "api").replace(b"cl", b"CL")
PAYLOADS = {**MALFORMED_ENTRIES, "bytes of somebody else": b"xxxx", "a task of a newer version": NEWER_TASK}


@pytest.mark.parametrize("payload", PAYLOADS.values(), ids=PAYLOADS.keys())
def test_an_entry_that_is_not_a_job_is_refused_with_one_exception(payload: bytes) -> None:
    """Whatever is wrong with it raises UnreadableJobError, and nothing else that could end a worker."""
    with pytest.raises(UnreadableJobError):
        decode_job(payload, Priority.BULK, 1)
