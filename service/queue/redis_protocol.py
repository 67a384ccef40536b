"""The queue on Redis: its keys and its messages. redis_scripts.py has its atomic steps; redis_jobs.py is the HTTP side,
redis_source.py the worker's; both know Redis only through these files.

    submit   jobs:<priority>   stream, one entry a job; its consumer group hands each entry to one worker at a time
    reply    replies:<api> stream of each API process, which reads it from the beginning and deletes what it has read
    finish   deletes the job's entry, gives its tokens back and sends its reply, in one step
    lease    a worker renews what it holds; an entry left alone for longer is claimed by another worker
    epoch    a random mark; when it is gone, Redis has lost the jobs and their callers must be told
    time     deadlines, submissions and heartbeats are in Redis' own time, whatever the machines' clocks say

An entry is deleted when its job is answered, cancelled or given up, so the length of the streams is the number of open
jobs, and `tokens` is what they hold. All keys share one hash tag: the model's fingerprint, and the task where it is not
the labels' probabilities, so that an API and a worker with different models, or for different tasks, never meet.
"""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
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
    Task,
    TextGenerateItem,
    TextItem,
    TextScoreItem,
    TokenItem,
)
from service.queue import strict_json
from service.queue.contract import Job, JobFailure, Priority, Reply, WorkerInfo

GROUP: Final = "workers"
PAYLOAD: Final = b"p"
# Of a message of replies: what computed them. Versions that do not know the field leave it alone, or out.
VARIANT: Final = b"v"
# A header has this many fields before those of its task.
_HEADER_FIELDS: Final = 7
_TOKEN_BYTES: Final = 4
_LAST_SEED: Final = 2**63 - 1
# A time in seconds that no clock of ours shows; nanoseconds of it still fit into 64 bits.
_LATEST: Final = 9e9
_DIGITS: Final = 20
_NAME: Final = re.compile(r"[ !#-\[\]-~]{1,200}")
# How a header begins, where the rest of it cannot be read.
_CALLER: Final = re.compile(rb'\s*\[\s*"(%b)"\s*,\s*"(%b)"' % ((_NAME.pattern.encode(),) * 2))
_CODES: Final = frozenset(ErrorCode)
_UNREADABLE_REPLY: Final = "the worker's answer cannot be read: run the same version of the API and its workers"
UNREADABLE_JOB: Final = "the worker cannot read this job: run the same version of the API and its workers"
# What marks jobs and replies of the other tasks; those that ask for labels have no mark.
_CLASSIFY: Final[Task] = "classify"
_GENERATE: Final[Task] = "generate"
# The same of text, which has the queues of its model to itself.
_TEXT_LABELS: Final = "text labels"
_TEXT_GENERATE: Final = "text generate"
PRIORITIES: Final = (Priority.INTERACTIVE, Priority.BULK)
# Deliveries after which a job is given up: each one before ended with a lost worker.
MAX_DELIVERIES: Final = 3
# The replies of a process that is gone vanish after this long.
REPLIES_TTL_MS: Final = 60_000
# A submission that redis-py sends again after a broken connection is recognised for this long.
SEEN_TTL_MS: Final = 60_000
# A worker whose heartbeat is older than this many seconds is not counted.
HEARTBEAT_TTL: Final = 15.0
DEAD_LETTERS: Final = 1000
# Seconds. The first is longer than a pause of Redis that is to be sat out, and bounds how long a caller waits to be
# told of a dead one.
SOCKET_TIMEOUT: Final = 8.0
CONNECT_TIMEOUT: Final = 2.0
RECONNECT_SECONDS: Final = 0.25


@dataclass(frozen=True, slots=True)
class Keys:
    """The names of everything that one queue, of one model and one task, keeps in Redis."""

    base: str

    @classmethod
    def of(cls, prefix: str, fingerprint: str, task: Task = "labels") -> Keys:
        """The keys of a model's queue for a task. Judges that need the same task can share workers."""
        return cls(f"{prefix}:{{{fingerprint}}}" if task == "labels" else f"{prefix}:{{{fingerprint}:{task}}}")

    def jobs(self, priority: Priority) -> str:
        """The stream of a priority's open jobs."""
        return f"{self.base}:jobs:{priority}"

    @property
    def streams(self) -> list[str]:
        """Both lanes' streams, the interactive one first."""
        return [self.jobs(priority) for priority in PRIORITIES]

    @property
    def tokens(self) -> str:
        """The tokens of all open jobs."""
        return f"{self.base}:tokens"

    @property
    def done(self) -> str:
        """The tokens of all jobs ever answered: its growth is the speed of the workers."""
        return f"{self.base}:done"

    @property
    def workers(self) -> str:
        """Heartbeats: worker ids by time."""
        return f"{self.base}:workers"

    @property
    def infos(self) -> str:
        """What each worker says of itself."""
        return f"{self.base}:workers:info"

    @property
    def variants(self) -> str:
        """What computes each worker's answers; apart from `infos`, whose fields other versions count."""
        return f"{self.base}:workers:variant"

    @property
    def registry(self) -> list[str]:
        """The keys of BEAT and ALIVE, in their order."""
        return [self.workers, self.infos, self.variants]

    @property
    def epoch(self) -> str:
        """The mark that dies with Redis' memory."""
        return f"{self.base}:epoch"

    @property
    def dead(self) -> str:
        """Jobs that were given up."""
        return f"{self.base}:dead"

    def replies(self, api: str) -> str:
        """The stream on which an API process receives."""
        return f"{self.base}:replies:{api}"

    def finish(self, api: str) -> list[str]:
        """The keys of FINISH, in its order."""
        return [*self.streams, self.tokens, self.done, self.replies(api)]

    def seen(self, submission: str) -> str:
        """The mark of a submission that has been accepted."""
        return f"{self.base}:seen:{submission}"


def position(priority: Priority) -> int:
    """Which of a script's KEYS is the priority's stream."""
    return PRIORITIES.index(priority) + 1


def by_stream(found: Any) -> list[tuple[bytes, list[tuple[bytes, dict[bytes, bytes]]]]]:
    """What XREAD and XREADGROUP answer, as (stream, [(entry, fields)]): a dict, a list or nothing, by protocol."""
    return found if isinstance(found, list) else list((found or {}).items())


def encode_job(job: Job, api: str, offset: float = 0.0) -> bytes:
    """A job as its stream's entry: a short header in JSON, then the tokens as 32-bit integers, or the text as UTF-8.

    `offset` makes Redis' time of the job's times (`RedisClock`). The header of a task other than labels, or of text,
    ends with the task, and what else it needs.
    """
    item = job.item
    labels = item.label_ids if isinstance(item, ScoreItem) else ()
    times = (job.deadline + offset, job.submitted + offset)
    boundaries = () if isinstance(item, TextItem) else item.boundaries
    body = item.text.encode() if isinstance(item, TextItem) else array("I", item.token_ids).tobytes()
    header = [job.id, api, *times, labels, boundaries, job.traceparent, *_task(item)]
    head = json.dumps(header, separators=(",", ":")).encode()
    return len(head).to_bytes(4, "little") + head + body


def _task(item: AnyItem) -> list[Any]:
    match item:
        case GenerateItem():
            return [_GENERATE, item.max_new_tokens, item.stop_ids, item.temperature, item.seed]
        case ClassifyItem():
            return [_CLASSIFY]
        case TextScoreItem():
            return [_TEXT_LABELS, item.labels]
        case TextGenerateItem():
            return [_TEXT_GENERATE, item.max_new_tokens, item.temperature, item.seed]
    return []


class UnreadableJobError(ValueError):
    """An entry is no job of this version. `caller` is the job's id and the API process that waits for it, or None."""

    def __init__(self, reason: str, caller: tuple[str, str] | None = None) -> None:
        super().__init__(reason, caller)
        self.reason = reason
        self.caller = caller


def decode_job(payload: bytes, priority: Priority, attempt: int, offset: float = 0.0) -> tuple[Job, str]:
    """The job of an entry, and the id of the API process that waits for it. Raises UnreadableJobError for all else.

    `offset` is this process's: the job's times are then of its own monotonic clock.
    """
    try:
        return _job(payload, priority, attempt, offset)
    except ValueError as exc:
        found = _CALLER.match(payload, 4)
        raise UnreadableJobError(str(exc), (found[1].decode(), found[2].decode()) if found else None) from exc


def _job(payload: bytes, priority: Priority, attempt: int, offset: float) -> tuple[Job, str]:
    end = 4 + int.from_bytes(payload[:4], "little")
    if not 4 < end < len(payload):
        raise ValueError("its lengths do not fit")
    header = strict_json.parse(payload[4:end])
    if not isinstance(header, list) or len(header) < _HEADER_FIELDS:
        raise ValueError("its header has other fields")
    job_id, api, deadline, submitted, labels, boundaries, traceparent, *task = header
    item = _text_item(payload[end:], task) or _token_item(payload[end:], labels, boundaries, task)
    if not isinstance(traceparent, str | None):
        raise ValueError("its trace context is no text")
    times = strict_json.number(deadline, 0, _LATEST) - offset, strict_json.number(submitted, 0, _LATEST) - offset
    return Job(_name(job_id), item, *times, priority, attempt, traceparent), _name(api)


def _text_item(text: bytes, task: list[Any]) -> TextItem | None:
    """The item where it is one of text."""
    match task:
        case ["text labels", [_, *_] as labels] if all(isinstance(label, str) and label for label in labels):
            return TextScoreItem(text.decode(), tuple(labels))
        case ["text generate", limit, temperature, seed]:
            return TextGenerateItem(text.decode(), _limit(limit), *_draws(temperature, seed))
    return None


def _token_item(body: bytes, labels: Any, boundaries: Any, task: list[Any]) -> TokenItem:
    if len(body) % _TOKEN_BYTES:
        raise ValueError("its lengths do not fit")
    tokens = tuple(array("I", body))
    label_ids, places = strict_json.ids(labels), strict_json.ids(boundaries, len(tokens))
    match task:
        case [] if label_ids:
            return ScoreItem(tokens, label_ids, places)
        case ["classify"]:
            return ClassifyItem(tokens, places)
        case ["generate", limit, stop, temperature, seed]:
            return GenerateItem(tokens, _limit(limit), strict_json.ids(stop), *_draws(temperature, seed), places)
    raise ValueError("its task is not known here")


def _limit(value: Any) -> int:
    return strict_json.integer(value, 1, strict_json.LARGEST_ID)


def _draws(temperature: Any, seed: Any) -> tuple[float, int]:
    return strict_json.number(temperature, 0), strict_json.integer(seed, 0, _LAST_SEED)


def _name(value: Any) -> str:
    if not isinstance(value, str) or not _NAME.fullmatch(value):
        raise ValueError("a name is missing")
    return value


def encode_replies(replies: Sequence[Reply]) -> bytes:
    """The replies to one API process as one message in JSON, whose numbers come back exactly."""
    return json.dumps([_plain(reply) for reply in replies], separators=(",", ":")).encode()


def _plain(reply: Reply) -> list[Any]:
    return [reply.id, reply.queued, reply.inference, *_plain_outcome(reply.outcome)]


def _plain_outcome(outcome: AnyAnswer | JobFailure) -> list[Any]:
    match outcome:
        case LabelLogprobs(logprobs, argmax_id, cached, floored):
            return [logprobs, argmax_id, cached, *([True] if floored else [])]
        case Classified(logit, cached):
            return [_CLASSIFY, logit, cached]
        case Generated(token_ids, ended, cached):
            return [_GENERATE, token_ids, ended, cached]
        case GeneratedText(text, ended, new_tokens, cached):
            return [_TEXT_GENERATE, text, ended, new_tokens, cached]
        case JobFailure(code, message):
            return [code, message]


def decode_replies(message: bytes, variant: str | None = None) -> list[Reply]:
    """The replies of a message; those without an id are left out. Raises ValueError for what is no such message.

    `variant` is what computed them. A reply that another version has written so that it cannot be read here is an
    error for its caller, never a score.
    """
    replies = strict_json.parse(message)
    if not isinstance(replies, list):
        raise ValueError("a message is no list of replies")
    named = [plain for plain in replies if isinstance(plain, list) and plain and isinstance(plain[0], str)]
    return [_reply(plain, variant) for plain in named]


def _reply(plain: list[Any], variant: str | None) -> Reply:
    try:
        job_id, queued, inference, *outcome = plain
        return Reply(job_id, _outcome(outcome), strict_json.number(queued), strict_json.number(inference), variant)
    except ValueError:
        return Reply(plain[0], JobFailure(ErrorCode.INFERENCE_FAILED, _UNREADABLE_REPLY))


def _outcome(plain: list[Any]) -> AnyAnswer | JobFailure:
    match plain:
        case [list(logprobs), argmax_id, cached, *floored]:
            numbers = tuple(strict_json.number(value) for value in logprobs)
            return LabelLogprobs(numbers, _id(argmax_id), _id(cached), bool(floored))
        case ["classify", logit, cached]:
            return Classified(strict_json.number(logit), _id(cached))
        case ["generate", token_ids, ended, cached]:
            return Generated(strict_json.ids(token_ids), bool(ended), _id(cached))
        case ["text generate", str(text), bool(ended), new_tokens, cached]:
            return GeneratedText(text, ended, _id(new_tokens), _id(cached))
        case [str(code), str(message)]:
            known = ErrorCode(code) if code in _CODES else ErrorCode.INFERENCE_FAILED
            return JobFailure(known, message.encode("utf-8", "replace").decode())
    raise ValueError("a reply of a kind that is not known here")


def _id(value: Any) -> int:
    return strict_json.integer(value, 0, strict_json.LARGEST_ID)


def encode_info(info: WorkerInfo) -> str:
    """What a worker says of itself."""
    run = info.executor
    return json.dumps([info.engine, info.dtype, info.max_tokens, *([run.rung, run.digest, run.stable] if run else [])])


def decode_info(text: bytes, variant: bytes = b"") -> WorkerInfo | None:
    """The same, read, with what it says of its answers; None for what another version says that has no such fields."""
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
    """What computes a worker's answers; None where it does not say, as earlier versions do not."""
    return text.decode("utf-8", "replace") if text else None


def count_of(value: bytes | None) -> int:
    """A counter's value; 0 where there is none, or something that is no count."""
    return int(value) if value is not None and value.isdigit() and len(value) < _DIGITS else 0
