"""Exceptions survive pickling: each of our classes crosses processes intact, and none hangs a worker pool."""

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
from service.engine.upstream.errors import RefusalError
from service.errors import ServiceError

PACKAGES = (client, service, trainer)
# Imported by verl alone, which is installed in an environment of its own (tests/integrations).
FOREIGN = "client.adapters.verl_manager"
# Values for required parameters, by their annotation.
ARGUMENTS = {
    "str": "a text",
    "int": 503,
    "bool": True,
    "float | None": 1.5,
    "ErrorCode": ErrorCode.OVERLOADED,
}
WAYS = [lambda exc: pickle.loads(pickle.dumps(exc)), copy.copy, copy.deepcopy]

LIMITED = RateLimitError("too fast", status=429, code="rate_limited", param="items", request_id="r", retry_after=2.5)
REFUSED = RefusalError(ErrorCode.OVERLOADED, "busy", status=429, retriable=True, retry_after=0.5, said="wait")


def own_exceptions() -> list[type[BaseException]]:
    """Every exception class that the three packages define. Imports all of their modules."""
    for package in PACKAGES:
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if not module.name.endswith("__main__") and module.name != FOREIGN:
                importlib.import_module(module.name)
    names = {package.__name__ for package in PACKAGES}
    return [kind for kind in subclasses(BaseException) if kind.__module__.partition(".")[0] in names]


def subclasses(kind: type[BaseException]) -> Iterator[type[BaseException]]:
    """All direct and indirect subclasses of `kind`, once each."""
    classes = dict.fromkeys(kind.__subclasses__())
    for subclass in list(classes):
        classes.update(dict.fromkeys(subclasses(subclass)))
    yield from classes


def made(kind: type[BaseException]) -> BaseException:
    """An instance with all required arguments, a note and a cause that cannot be pickled."""
    own = any("__init__" in vars(base) for base in kind.__mro__ if base.__module__.partition(".")[0] != "builtins")
    parameters = list(inspect.signature(kind).parameters.values()) if own else []
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    arguments = {p.name: ARGUMENTS[str(p.annotation)] for p in named if p.default is p.empty}
    exc = kind(**arguments) if own else kind("a text")
    exc.add_note("seen by a worker")
    exc.__cause__ = RuntimeError(lambda: "cannot be pickled")
    return exc


def contents(exc: BaseException) -> tuple[Any, ...]:
    """Everything that an exception holds."""
    return type(exc), str(exc), repr(exc), exc.args, vars(exc)


@pytest.mark.parametrize("way", WAYS, ids=["pickle", "copy", "deepcopy"])
def test_every_exception_survives_pickle_and_copy(way: Callable[[BaseException], BaseException]) -> None:
    """It keeps its type, its message and all attributes."""
    raised = [made(kind) for kind in own_exceptions()]

    arrived = [way(exc) for exc in raised]

    assert len(raised) > 30
    assert [contents(exc) for exc in arrived] == [contents(exc) for exc in raised]


def fail(number: int) -> None:
    """A worker's job: raises an error of the client, of an upstream, of the service, or one with a cause."""
    if number == 3:
        with Judge("http://127.0.0.1:9", max_retries=0) as judge:
            judge.score("p", "r")
    raise (LIMITED, REFUSED, ServiceError(ErrorCode.BAD_LABEL, "m", param="p", retry_after=1.0))[number]


@pytest.mark.parametrize("number", range(4))
def test_a_pool_raises_its_workers_error(number: int) -> None:
    """Pool.map hangs forever on an exception that cannot be unpickled."""
    kind = (RateLimitError, RefusalError, ServiceError, JudgeConnectionError)[number]

    with multiprocessing.get_context("spawn").Pool(1) as pool, pytest.raises(kind) as caught:
        pool.map_async(fail, [number]).get(120)

    assert number or (caught.value.retry_after, str(caught.value)) == (2.5, str(LIMITED))


def test_an_executor_returns_an_error_that_is_a_result() -> None:
    """The errors that score_batch returns pass through a ProcessPoolExecutor unchanged."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as executor:
        back = executor.submit(copy.copy, LIMITED).result(120)

    assert isinstance(back, JudgeAPIError)
    assert vars(back) == vars(LIMITED)


def test_a_validation_error_survives_pickle() -> None:
    """It is raised for a request that cannot be made."""
    with pytest.raises(pydantic.ValidationError) as caught:
        ScoreRequest.model_validate({"prompt": "p"})

    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
