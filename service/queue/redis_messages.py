"""The messages of the queue on Redis: jobs, replies, and what workers report about themselves.

Whatever is read was written by another process, perhaps of another version: it is checked value by value. Earlier
versions read these messages and are read here.
"""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Sequence
from typing import Any, Final

from client.errors import ErrorCode
from service.engine.contract import (
    AnyAnswer,
    AnyItem,
    Classified,
    ClassifyItem,
    Executor,
    Generated,
    GeneratedText,
    GenerateItem,
    LabelLogprobs,
    ScoreItem,
    TextGenerateItem,
    TextItem,
    TextScoreItem,
    TokenItem,
)
from service.queue import strict_json
from service.queue.contract import Job, JobFailure, Priority, Reply, WorkerInfo

# A job's header has this many fields before those of its task.
_HEADER_FIELDS: Final = 7
_HEADER_LENGTH_BYTES: Final = 4
_ID_BYTES: Final = 4
_LAST_SEED: Final = 2**63 - 1
# No clock of ours shows a later time, in seconds; in nanoseconds it still fits into 64 bits.
_LATEST: Final = 9e9
_COUNTER_DIGITS: Final = 20
_IDENTIFIER: Final = re.compile(r"[ !#-\[\]-~]{1,200}")
# The beginning of a header, for when the rest cannot be read: the job's id and the API process that waits for it.
_CALLER: Final = re.compile(rb'\s*\[\s*"(%b)"\s*,\s*"(%b)"' % ((_IDENTIFIER.pattern.encode(),) * 2))
_CODES: Final = frozenset(ErrorCode)
# Made once: json.dumps makes an encoder for each call that asks for other separators.
_to_json: Final = json.JSONEncoder(separators=(",", ":")).encode
_UNREADABLE_REPLY: Final = "the worker's answer cannot be read: run the same version of the API and its workers"


class UnreadableJobError(ValueError):
    """A stream entry is not a job of this version.

    `caller` is the job's id and the API process that waits for it; None if the entry does not say.
    """

    def __init__(self, reason: str, caller: tuple[str, str] | None = None) -> None:
        super().__init__(reason, caller)
        self.reason = reason
        self.caller = caller


def encode_job(job: Job, api: str, offset: float = 0.0) -> bytes:
    """A job as a message: the header's length, the header in JSON, then token ids as 32-bit integers or text as UTF-8.

    `offset` turns its times into Redis' time (see `RedisClock`). The header begins with id, API process, deadline,
    submission, labels, boundaries and trace context. Tasks other than labels, and text, add the task and its fields.
    """
    item = job.item
    labels = item.label_ids if isinstance(item, ScoreItem) else ()
    boundaries = () if isinstance(item, TextItem) else item.boundaries
    body = item.text.encode() if isinstance(item, TextItem) else array("I", item.token_ids).tobytes()
    times = (job.deadline + offset, job.submitted + offset)
    fields = [job.id, api, *times, labels, boundaries, job.traceparent, *_task_fields(item)]
    header = _to_json(fields).encode()
    return len(header).to_bytes(_HEADER_LENGTH_BYTES, "little") + header + body


def _task_fields(item: AnyItem) -> list[Any]:
    match item:
        case ScoreItem():
            return []
        case GenerateItem():
            return ["generate", item.max_new_tokens, item.stop_ids, item.temperature, item.seed]
        case ClassifyItem():
            return ["classify"]
        case TextScoreItem():
            return ["text labels", item.labels]
        case TextGenerateItem():
            return ["text generate", item.max_new_tokens, item.temperature, item.seed]


def decode_job(payload: bytes, priority: Priority, attempt: int, offset: float = 0.0) -> tuple[Job, str]:
    """The job of a message, and the id of the API process that waits for it; raises UnreadableJobError.

    `offset` is this process's: it turns Redis' time into times of this process's monotonic clock.
    """
    try:
        return _decode_job(payload, priority, attempt, offset)
    except ValueError as exc:
        caller = _CALLER.match(payload, _HEADER_LENGTH_BYTES)
        raise UnreadableJobError(str(exc), (caller[1].decode(), caller[2].decode()) if caller else None) from exc


def _decode_job(payload: bytes, priority: Priority, attempt: int, offset: float) -> tuple[Job, str]:
    end = _HEADER_LENGTH_BYTES + int.from_bytes(payload[:_HEADER_LENGTH_BYTES], "little")
    if not _HEADER_LENGTH_BYTES < end < len(payload):
        raise ValueError("its lengths do not fit")
    header = strict_json.parse(payload[_HEADER_LENGTH_BYTES:end])
    if not isinstance(header, list) or len(header) < _HEADER_FIELDS:
        raise ValueError("its header has other fields")
    job_id, api, deadline, submitted, labels, boundaries, traceparent, *task = header
    item = _text_item(payload[end:], task) or _token_item(payload[end:], labels, boundaries, task)
    if not isinstance(traceparent, str | None):
        raise ValueError("its trace context is not text")
    times = strict_json.number(deadline, 0, _LATEST) - offset, strict_json.number(submitted, 0, _LATEST) - offset
    return Job(_identifier(job_id), item, *times, priority, attempt, traceparent), _identifier(api)


def _text_item(text: bytes, task: list[Any]) -> TextItem | None:
    """The item if its task is one of text, else None."""
    match task:
        case ["text labels", [_, *_] as labels] if all(isinstance(label, str) and label for label in labels):
            return TextScoreItem(text.decode(), tuple(labels))
        case ["text generate", limit, temperature, seed]:
            return TextGenerateItem(text.decode(), _limit(limit), *_sampling(temperature, seed))
    return None


def _token_item(body: bytes, labels: Any, boundaries: Any, task: list[Any]) -> TokenItem:
    if len(body) % _ID_BYTES:
        raise ValueError("its lengths do not fit")
    tokens = tuple(array("I", body))
    label_ids, offsets = strict_json.ids(labels), strict_json.ids(boundaries, len(tokens))
    match task:
        case [] if label_ids:
            return ScoreItem(tokens, label_ids, offsets)
        case ["classify"]:
            return ClassifyItem(tokens, offsets)
        case ["generate", limit, stop, temperature, seed]:
            return GenerateItem(tokens, _limit(limit), strict_json.ids(stop), *_sampling(temperature, seed), offsets)
    raise ValueError("its task is not known here")


def _limit(value: Any) -> int:
    return strict_json.integer(value, 1, strict_json.LARGEST_ID)


def _sampling(temperature: Any, seed: Any) -> tuple[float, int]:
    return strict_json.number(temperature, 0), strict_json.integer(seed, 0, _LAST_SEED)


def _identifier(value: Any) -> str:
    if not isinstance(value, str) or not _IDENTIFIER.fullmatch(value):
        raise ValueError("an id is missing")
    return value


def encode_replies(replies: Sequence[Reply]) -> bytes:
    """The replies to one API process as one message in JSON, which keeps every bit of a number."""
    plain = [[reply.id, reply.queued, reply.inference, *_plain_outcome(reply.outcome)] for reply in replies]
    return _to_json(plain).encode()


def _plain_outcome(outcome: AnyAnswer | JobFailure) -> list[Any]:
    match outcome:
        case LabelLogprobs(logprobs, argmax_id, cached, floored):
            return [logprobs, argmax_id, cached, *([True] if floored else [])]
        case Classified(logit, cached):
            return ["classify", logit, cached]
        case Generated(token_ids, ended, cached):
            return ["generate", token_ids, ended, cached]
        case GeneratedText(text, ended, new_tokens, cached):
            return ["text generate", text, ended, new_tokens, cached]
        case JobFailure(code, message):
            return [code, message]


def decode_replies(message: bytes, variant: str | None = None) -> list[Reply]:
    """The replies of a message, all computed by `variant`; raises ValueError if it is not a message of replies.

    Replies without an id are left out. One that cannot be read becomes an error for its caller, never a score.
    """
    replies = strict_json.parse(message)
    if not isinstance(replies, list):
        raise ValueError("the message is not a list of replies")
    addressed = [plain for plain in replies if isinstance(plain, list) and plain and isinstance(plain[0], str)]
    return [_decode_reply(plain, variant) for plain in addressed]


def _decode_reply(plain: list[Any], variant: str | None) -> Reply:
    try:
        job_id, queued, inference, *outcome = plain
        queued, inference = strict_json.number(queued), strict_json.number(inference)
        return Reply(job_id, _decode_outcome(outcome), queued, inference, variant)
    except ValueError:
        return Reply(plain[0], JobFailure(ErrorCode.INFERENCE_FAILED, _UNREADABLE_REPLY))


def _decode_outcome(plain: list[Any]) -> AnyAnswer | JobFailure:
    match plain:
        case [list(logprobs), argmax_id, cached, *floored]:
            return LabelLogprobs(
                tuple(map(strict_json.number, logprobs)), _nonnegative(argmax_id), _nonnegative(cached), bool(floored)
            )
        case ["classify", logit, cached]:
            return Classified(strict_json.number(logit), _nonnegative(cached))
        case ["generate", token_ids, ended, cached]:
            return Generated(strict_json.ids(token_ids), bool(ended), _nonnegative(cached))
        case ["text generate", str(text), bool(ended), new_tokens, cached]:
            return GeneratedText(text, ended, _nonnegative(new_tokens), _nonnegative(cached))
        case [str(code), str(message)]:
            known = ErrorCode(code) if code in _CODES else ErrorCode.INFERENCE_FAILED
            return JobFailure(known, message.encode("utf-8", "replace").decode())
    raise ValueError("the kind of reply is not known here")


def _nonnegative(value: Any) -> int:
    return strict_json.integer(value, 0, strict_json.LARGEST_ID)


def encode_info(info: WorkerInfo) -> str:
    """What a worker reports about itself, in JSON."""
    run = info.executor
    return json.dumps([info.engine, info.dtype, info.max_tokens, *([run.rung, run.digest, run.stable] if run else [])])


def decode_info(text: bytes, variant: bytes = b"") -> WorkerInfo | None:
    """What a worker reports about itself and its answers; None if another version reports it in an unknown form."""
    try:
        match strict_json.parse(text):
            case [str(engine), str(dtype), int(max_tokens), *more]:
                return WorkerInfo(engine, dtype, max_tokens, decode_variant(variant), _executor(more))
    except ValueError:
        pass
    return None


def _executor(plain: list[Any]) -> Executor | None:
    match plain:
        case [str(rung), str(digest), bool() | None as stable, *_]:
            return Executor(rung, digest, stable)
    return None


def decode_variant(text: bytes | None) -> str | None:
    """What computes a worker's answers; None from earlier versions, which do not report it."""
    return text.decode("utf-8", "replace") if text else None


def decode_counter(value: bytes | None) -> int:
    """A counter's value; 0 if it is missing, or was overwritten with something that is not a count."""
    return int(value) if value is not None and value.isdigit() and len(value) < _COUNTER_DIGITS else 0
