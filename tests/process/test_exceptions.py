"""Exceptions cross processes: each class of ours arrives as it was raised, and no pool of workers hangs on one."""

from __future__ import annotations

import copy
import importlib
import inspect
import multiprocessing
import pickle
import pkgutil
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pydantic
import pytest

import client
import service
import trainer
from client import Judge, JudgeAPIError, JudgeConnectionError, RateLimitError
from client.errors import ErrorCode
from client.schema import ScoreRequest
from service.engine.upstream.openai_client import RefusalError
from service.errors import ServiceError

PACKAGES = (client, service, trainer)
# For each annotation of a parameter without a default.
ARGUMENTS = {
    "str": "a text",
    "int": 503,
    "bool": True,
    "float | None": 1.5,
    "ErrorCode": ErrorCode.OVERLOADED,
}
WAYS = [lambda exc: pickle.loads(pickle.dumps(exc)), copy.copy, copy.deepcopy]

LIMITED = RateLimitError("too fast", status=429, code="rate_limited", param="items", request_id="r", retry_after=2.5)
REFUSED = RefusalError(ErrorCode.OVERLOADED, "busy", status=429, passing=True, retry_after=0.5, said="wait")


def own_exceptions() -> list[type[BaseException]]:
    """Every exception class that the three packages define, once all of their modules are imported."""
    for package in PACKAGES:
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if not module.name.endswith("__main__"):
                importlib.import_module(module.name)
    names = {package.__name__ for package in PACKAGES}
    return [kind for kind in subclasses(BaseException) if kind.__module__.partition(".")[0] in names]


def subclasses(kind: type[BaseException]) -> Iterator[type[BaseException]]:
    """All that derive from `kind`, at whatever distance, once each."""
    found = dict.fromkeys(kind.__subclasses__())
    for one in list(found):
        found.update(dict.fromkeys(subclasses(one)))
    yield from found


def made(kind: type[BaseException]) -> BaseException:
    """An instance, with something for everything that the constructor asks for, and a note and a cause."""
    own = any("__init__" in vars(base) for base in kind.__mro__ if base.__module__.partition(".")[0] != "builtins")
    parameters = list(inspect.signature(kind).parameters.values()) if own else []
    wanted = [one for one in parameters if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)]
    given = {one.name: ARGUMENTS[str(one.annotation)] for one in wanted if one.default is one.empty}
    exc = kind(**given) if own else kind("a text")
    exc.add_note("seen by a worker")
    exc.__cause__ = RuntimeError(lambda: "cannot be pickled")
    return exc


def said(exc: BaseException) -> tuple[Any, ...]:
    """All that an exception says."""
    return type(exc), str(exc), repr(exc), exc.args, vars(exc)


@pytest.mark.parametrize("way", WAYS, ids=["pickle", "copy", "deepcopy"])
def test_every_exception_of_ours_survives(way: Callable[[BaseException], BaseException]) -> None:
    """Pickled or copied, each exception class of the packages keeps its type, its message and all its attributes."""
    raised = [made(kind) for kind in own_exceptions()]

    arrived = [way(exc) for exc in raised]

    assert len(raised) > 30
    assert [said(exc) for exc in arrived] == [said(exc) for exc in raised]


def fail(number: int) -> None:
    """What a worker does: an error with keywords, one of the service, one of an upstream, or one with a cause."""
    if number == 3:
        with Judge("http://127.0.0.1:9", max_retries=0) as judge:
            judge.score("p", "r")
    raise (LIMITED, REFUSED, ServiceError(ErrorCode.BAD_LABEL, "m", param="p", retry_after=1.0))[number]


@pytest.mark.parametrize("number", range(4))
def test_a_pool_of_workers_gives_back_the_error(number: int) -> None:
    """Pool.map raises the worker's own error, where it once waited for ever."""
    kind = (RateLimitError, RefusalError, ServiceError, JudgeConnectionError)[number]

    with multiprocessing.get_context("spawn").Pool(1) as pool, pytest.raises(kind) as caught:
        pool.map_async(fail, [number]).get(120)

    assert number or (caught.value.retry_after, str(caught.value)) == (2.5, str(LIMITED))


def test_an_executor_gives_back_an_error_that_is_a_result() -> None:
    """score_batch's errors, which are results, come back from a ProcessPoolExecutor as they were."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as executor:
        back = executor.submit(copy.copy, LIMITED).result(120)

    assert isinstance(back, JudgeAPIError)
    assert vars(back) == vars(LIMITED)


def test_what_is_no_valid_request_comes_back_from_a_pool() -> None:
    """The ValidationError of a request that cannot be made survives as well."""
    with pytest.raises(pydantic.ValidationError) as caught:
        ScoreRequest.model_validate({"prompt": "p"})

    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
