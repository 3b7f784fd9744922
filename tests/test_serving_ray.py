"""Two replicas of the fake engine on Ray Serve, one of them killed under load."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from test_serving_conversations import Talk, user
from test_serving_hostile import get, post

# Before Ray is imported. A busy machine takes longer to start its processes than Ray waits by itself.
os.environ |= {"RAY_raylet_start_wait_time_s": "180", "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "90"}
os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
ray = pytest.importorskip("ray")
openai = pytest.importorskip("openai")

# Ray's own: files that its processes leave open, and what it has deprecated of itself.
pytestmark = pytest.mark.filterwarnings("ignore")


def make() -> Any:
    """What a replica runs: it answers with its process id where it is asked to."""
    sys.path.insert(0, HERE)
    from fakeengine import FakeEngine, echo, service
    from liquidfusion.serving.conversations import Conversations

    def script(prompt: str, sampling: Any, index: int) -> str:
        said = echo(prompt, sampling, index)
        return str(os.getpid()) if said.startswith("You said: pid") else said

    return service(FakeEngine(rows=4, delay=0.02, script=script), conversations=Conversations(100_000))


HERE = str(Path(__file__).parent)


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    from ray import serve

    from liquidfusion.serving.ray import application

    environment = {
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([HERE, *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    ray.init(
        num_cpus=4,
        include_dashboard=False,
        object_store_memory=100 * 2**20,
        log_to_driver=False,
        runtime_env={"env_vars": environment},
    )
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": 18766})
        serve.run(application(make, rows=4, replicas=2, actor={"num_cpus": 0.1}), name="fake")
        yield "http://127.0.0.1:18766"
    finally:
        serve.shutdown()
        ray.shutdown()


def pid(url: str, who: str) -> int:
    status, answer = post(url, {"model": "fake", "messages": [user(f"pid {who}")]})
    assert status == 200
    return int(answer["choices"][0]["message"]["content"])


def test_replicas(url: str) -> None:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0, timeout=30) as client:
        assert [model.id for model in client.models.list()] == ["fake"]
        stream = client.chat.completions.create(model="fake", messages=[user("hello")], stream=True)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == "You said: hello"
        with pytest.raises(openai.BadRequestError):
            client.chat.completions.create(model="fake", messages=[user("x" * 5000)])
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.create(model="other", messages=[user("x")], stream=True)
        assert client.completions.create(model="fake", prompt="0123456789").choices[0].text == " and 23456789"
    assert get(url, "/health")[0] == 200
    assert "liquidfusion_requests_total" in get(url, "/metrics")[1]
    assert len({pid(url, str(number)) for number in range(12)}) == 2


def test_a_conversation_goes_where_its_row_is(url: str) -> None:
    for number in range(6):
        talk = Talk(url)
        talk.say(f"hello {number}")
        assert talk.say("and now") > 20
        assert talk.say("more") > 60


def test_a_replica_that_is_killed(url: str) -> None:
    victims = {pid(url, str(number)) for number in range(12)}
    assert len(victims) == 2
    answers: list[str] = []
    broken: list[Exception] = []
    stop = threading.Event()

    def load(name: str) -> None:
        with openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0, timeout=60) as client:
            number = 0
            while not stop.is_set():
                number += 1
                text, stream = f"hello {name} {number}", number % 2 == 0
                try:
                    answer = client.chat.completions.create(model="fake", messages=[user(text)], stream=stream)
                    if stream:
                        got = "".join(chunk.choices[0].delta.content or "" for chunk in answer)
                    else:
                        got = answer.choices[0].message.content
                except openai.APIError as error:
                    broken.append(error)
                else:
                    assert got == f"You said: {text}"
                    answers.append(got)

    threads = [threading.Thread(target=load, args=(str(number),)) for number in range(12)]
    for thread in threads:
        thread.start()
    time.sleep(3)
    before = len(answers)
    os.kill(victims.pop(), signal.SIGKILL)
    time.sleep(8)
    stop.set()
    for thread in threads:
        thread.join(90)
    assert not any(thread.is_alive() for thread in threads)
    assert before > 10
    assert len(answers) > before + 10
    # Only an answer that had begun can break, and it says what cures it.
    assert len(broken) <= 4
    assert all("send the request again" in str(error) for error in broken)
    end = time.monotonic() + 240
    while len(found := {pid(url, str(number)) for number in range(12)}) < 2:
        assert time.monotonic() < end
        time.sleep(0.5)
    assert victims < found
