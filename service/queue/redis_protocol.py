"""The queue on Redis: its keys and limits.

redis_messages.py has the messages, redis_scripts.py the atomic steps in Lua, redis_client.py the HTTP side and
redis_worker.py the worker's side.

    submit   jobs:<priority> is a stream with one entry per job; its consumer group hands each entry to one worker
    reply    replies:<api> is the stream of one API process, which reads it from the beginning and deletes what it read
    finish   deletes the job's entry, gives its tokens back and sends its reply, in one step
    lease    a worker renews what it holds; other workers claim entries that were not renewed for that long
    epoch    a random mark; if it is gone, Redis has lost the jobs, and their callers must be told
    time     deadlines, submissions and heartbeats are in Redis' own time, whatever the machines' clocks say

An entry is deleted when its job is answered, cancelled or given up, so the length of the streams is the number of open
jobs, and `tokens` is their size. All keys share one hash tag, as a script needs keys of one slot: the model's
fingerprint, plus the task unless it is `labels`, so an API process and a worker with different models or tasks never
meet.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, TypeAlias

from service.engine.contract import Task
from service.queue.contract import Priority

GROUP: Final = "workers"
# Fields of a message: the body and, for replies, what computed them. Earlier versions do not know the second.
PAYLOAD: Final = b"p"
VARIANT: Final = b"v"
PRIORITIES: Final = (Priority.INTERACTIVE, Priority.BULK)
# A job is given up after this many deliveries, each of which ended with a lost worker.
MAX_DELIVERIES: Final = 3
# The replies to an API process that is gone vanish after this long.
REPLIES_TTL_MS: Final = 60_000
# For this long a submission is recognised if redis-py sends it again after a broken connection.
SEEN_TTL_MS: Final = 60_000
# Seconds after its last heartbeat for which a worker counts.
HEARTBEAT_TTL: Final = 15.0
DEAD_LETTERS: Final = 1000

# A stream entry's fields.
Fields: TypeAlias = dict[bytes, bytes]


@dataclass(frozen=True, slots=True)
class Keys:
    """The names of all keys of one queue, which is for one model and one task."""

    base: str

    @classmethod
    def of(cls, prefix: str, fingerprint: str, task: Task = "labels") -> Keys:
        """The keys of a model's queue for a task. Judges that need the same task can share workers."""
        return cls(f"{prefix}:{{{fingerprint}}}" if task == "labels" else f"{prefix}:{{{fingerprint}:{task}}}")

    def jobs(self, priority: Priority) -> str:
        """The stream of open jobs of one priority."""
        return f"{self.base}:jobs:{priority}"

    @property
    def streams(self) -> list[str]:
        """The streams of both priorities, interactive first."""
        return [self.jobs(priority) for priority in PRIORITIES]

    @property
    def tokens(self) -> str:
        """The tokens of all open jobs."""
        return f"{self.base}:tokens"

    @property
    def done(self) -> str:
        """The tokens of all jobs ever answered; its growth is the speed of the workers."""
        return f"{self.base}:done"

    @property
    def workers(self) -> str:
        """Heartbeats: worker ids by time."""
        return f"{self.base}:workers"

    @property
    def infos(self) -> str:
        """What each worker reports about itself."""
        return f"{self.base}:workers:info"

    @property
    def variants(self) -> str:
        """What computes each worker's answers. Not in `infos`, because other versions count its fields."""
        return f"{self.base}:workers:variant"

    @property
    def registry(self) -> list[str]:
        """The keys of the scripts BEAT and ALIVE, in their order."""
        return [self.workers, self.infos, self.variants]

    @property
    def epoch(self) -> str:
        """The mark that is gone once Redis has lost its memory."""
        return f"{self.base}:epoch"

    @property
    def dead(self) -> str:
        """The stream of jobs that were given up."""
        return f"{self.base}:dead"

    def replies(self, api: str) -> str:
        """The stream on which an API process receives replies."""
        return f"{self.base}:replies:{api}"

    def finish(self, api: str) -> list[str]:
        """The keys of the script FINISH, in its order."""
        return [*self.streams, self.tokens, self.done, self.replies(api)]

    def seen(self, submission: str) -> str:
        """The mark of a submission that has been accepted."""
        return f"{self.base}:seen:{submission}"


def position(priority: Priority) -> int:
    """The index, from 1, of the priority's stream in a script's KEYS."""
    return PRIORITIES.index(priority) + 1


def by_stream(answer: Any) -> list[tuple[bytes, list[tuple[bytes, Fields]]]]:
    """The answer of XREAD and XREADGROUP, a dict, list or None by protocol version, as (stream, [(entry, fields)])."""
    return answer if isinstance(answer, list) else list((answer or {}).items())
