"""Bad moments: deadlines, full queues, callers who leave, engines and workers that fail."""

from __future__ import annotations

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx

from service.engine.fake import FakeEngine
from tests.support.live import PAIR, Live, connected, live_service, outcome, wait_for


def test_a_judgement_past_its_deadline_is_504() -> None:
    """Its job leaves the queue."""
    with live_service(worker=False, request_timeout=0.2) as live:
        answer = live.http.post("/score", json=PAIR)

        assert outcome(answer)[:2] == (504, "deadline_exceeded")
        assert live.queue.stats().jobs == 0


def test_a_full_queue_is_503_with_retry_after() -> None:
    """Two requests wait, and the third is refused at once."""
    with live_service(worker=False, max_queue_jobs=2, request_timeout=3) as live, ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(httpx.post, f"{live.url}/score", json=PAIR, timeout=30) for _ in range(2)]
        assert wait_for(lambda: live.queue.stats().jobs == 2)

        refused = live.http.post("/score", json=PAIR)

        assert outcome(refused)[:2] == (503, "overloaded")
        assert int(refused.headers["retry-after"]) >= 1
        assert [request.result().status_code for request in waiting] == [504, 504]


def test_a_disconnected_callers_job_is_dropped_unscored() -> None:
    """The job never reaches the engine."""
    engine = FakeEngine(delay=0.5)
    with live_service(engine) as live:
        with ThreadPoolExecutor(1) as pool:
            busy = pool.submit(httpx.post, f"{live.url}/score", json={**PAIR, "response": "keeps it busy"}, timeout=30)
            assert wait_for(lambda: live.queue.stats().jobs == 1)
            time.sleep(0.1)
            leave_after_sending(live, {**PAIR, "response": "left behind"})
            assert wait_for(
                lambda: live.value("judge_requests_total", method="POST", route="/score", status="499") == 1
            )
            assert busy.result().status_code == 200

        assert wait_for(lambda: live.queue.stats().jobs == 0)
        assert live.value("judge_judgements_total") == 1
        assert live.value("judge_batch_jobs_sum") == 1


def leave_after_sending(live: Live, body: object) -> None:
    """Send a whole request, give the service time to queue it, and close the connection without reading."""
    content = json.dumps(body).encode()
    with connected(live) as connection:
        head = "POST /score HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
        time.sleep(0.1)


def test_a_body_that_never_arrives_is_408() -> None:
    """A caller who declares a body and stalls does not hold the connection forever."""
    with live_service(body_timeout=0.2) as live, connected(live) as connection:
        connection.sendall(b"POST /score HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{")
        answer = connection.recv(65536)

    assert answer.startswith(b"HTTP/1.1 408 ")


def test_a_service_without_a_worker_is_alive_but_not_ready() -> None:
    """/ready says why."""
    with live_service(worker=False) as live:
        assert outcome(live.http.get("/ready"))[:2] == (503, "not_ready")
        assert live.http.get("/health").status_code == 200


def test_a_dying_worker_ends_the_service() -> None:
    """Open requests fail rather than wait for an answer that cannot come."""

    class Broken(FakeEngine):
        def run(self, _: object) -> list[object]:
            raise SystemExit("the driver is gone")

    with live_service(Broken()) as live:
        answer = live.http.post("/score", json=PAIR)

        assert answer.status_code in {500, 503}
        assert wait_for(lambda: live.server.should_exit)
        assert live.server.worker_failed


def test_an_engine_failure_is_a_500_with_a_code_of_its_own() -> None:
    """An item that the model fails on is an error, never a score, and the cause stays in the log."""

    class Failing(FakeEngine):
        def run(self, _: object) -> list[object]:
            raise RuntimeError("CUDA error")

    with live_service(Failing()) as live:
        answer = live.http.post("/score", json=PAIR)

    assert outcome(answer)[:2] == (500, "inference_failed")
    assert "CUDA" not in answer.text


def test_concurrent_callers_each_get_their_own_answer() -> None:
    """40 threads with different texts get the scores that each text gets alone."""
    bodies = [{**PAIR, "response": f"answer number {number}"} for number in range(40)]
    with live_service(FakeEngine(delay=0.01)) as live:
        alone = [live.http.post("/score", json=body).json()["log_odds"] for body in bodies]
        barrier = threading.Barrier(40)

        def ask(body: object) -> float:
            barrier.wait()
            return float(httpx.post(f"{live.url}/score", json=body, timeout=30).json()["log_odds"])

        with ThreadPoolExecutor(40) as pool:
            together = list(pool.map(ask, bodies))

        assert together == alone
        assert live.value("judge_batch_jobs_count") < 80
