"""Replicas on Ray Serve: the same HTTP interface over several engines, on one machine or many.

``serve run liquidfusion.serving.ray:build model=… rows=64 replicas=4 gpus=1``. Ray places, watches and replaces the
replicas; nothing here does. A conversation's turns have the same beginning, so hashing it sends them to the replica
that holds its row (Ray's ConsistentHashRouter); where that one is full, the next one reads the conversation again.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncGenerator, Callable
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.config import RequestRouterConfig
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle
from ray.util.metrics import Gauge

from liquidfusion.serving import launch
from liquidfusion.serving.app import MOST_BYTES, TIMEOUT, create_app
from liquidfusion.serving.cli import KEY
from liquidfusion.serving.conversations import digests
from liquidfusion.serving.errors import ApiError
from liquidfusion.serving.metrics import Metrics
from liquidfusion.serving.schema import ChatRequest, Common, CompletionRequest
from liquidfusion.serving.service import Facts, Service

_ROUTER = "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"
_GONE = (RayActorError, ReplicaUnavailableError, DeploymentUnavailableError)
_ATTEMPTS = 8
"""How often a request goes to a replica before it is answered with an error; waits double from a quarter second."""
_WAITING = 256
"""Requests that may wait for a free row of any replica, at each node's entrance."""


class Arguments(BaseModel):
    """What ``serve run`` and a Serve config file may set: those of `launch.Settings`, and these.

    Parameters
    ----------
    replicas : int
        Engines.
    rows : int
        Rows of each: Ray must know it before the model is loaded, so there is no "auto".
    gpus, cpus : float
        Of each replica.
    api_keys : str
        With spaces between them; by default those of the environment variable.
    timeout, max_body : float, str
        Of a request.
    """

    model_config = ConfigDict(extra="forbid")

    model: str = "smollm2"
    name: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    strategy: str = "liquid_fusion"
    budget: int = Field(default=2048, ge=1)
    bits: str | int | None = None
    rows: int = Field(default=launch.CPU_ROWS, ge=1)
    chunk: int = Field(default=512, ge=1)
    step_tokens: int = Field(default=1024, ge=1)
    conversations: str = "1GiB"
    replicas: int = Field(default=1, ge=1)
    gpus: float = Field(default=0, ge=0)
    cpus: float = Field(default=1, ge=0)
    api_keys: str = ""
    timeout: float = Field(default=TIMEOUT, gt=0)
    max_body: str = str(MOST_BYTES)


def build(arguments: Arguments) -> serve.Application:
    """The application for ``serve run`` and Serve config files."""
    settings = launch.Settings(
        model=arguments.model,
        name=arguments.name,
        device=arguments.device,
        dtype=arguments.dtype,
        strategy=arguments.strategy,
        budget=arguments.budget,
        bits=launch.precision(None if arguments.bits is None else str(arguments.bits)),
        rows=arguments.rows,
        chunk=arguments.chunk,
        step_tokens=arguments.step_tokens,
        conversations=launch.size(arguments.conversations),
    )
    return application(
        lambda: launch.build(settings),
        rows=arguments.rows,
        replicas=arguments.replicas,
        actor={"num_gpus": arguments.gpus, "num_cpus": arguments.cpus},
        http={
            "keys": (arguments.api_keys or os.environ.get(KEY, "")).split(),
            "most_bytes": launch.size(arguments.max_body),
            "timeout": arguments.timeout,
        },
    )


def application(
    make: Callable[[], Service],
    *,
    rows: int,
    replicas: int,
    actor: dict[str, Any] | None = None,
    http: dict[str, Any] | None = None,
) -> serve.Application:
    """An application of replicas and an entrance.

    Parameters
    ----------
    make : callable
        Makes a replica's service, in the replica.
    rows : int
        Requests that a replica takes at once; others wait at the entrance, where no replica's death can lose them.
    replicas : int
        How many.
    actor : dict, optional
        What each replica takes of its machine, as Ray's ``ray_actor_options`` say it.
    http : dict, optional
        Arguments of `create_app`.
    """
    # Ray's own types do not say that these can be bound, nor that a router may be named.
    router: Any = _ROUTER
    replica: Any = serve.deployment(
        Replica,
        name="Replica",
        num_replicas=replicas,
        max_ongoing_requests=rows,
        max_queued_requests=_WAITING,
        ray_actor_options=actor or {},
        health_check_period_s=5,
        graceful_shutdown_timeout_s=60,
        request_router_config=RequestRouterConfig(
            request_router_class=router, request_router_kwargs={"num_fallback_replicas": max(1, replicas - 1)}
        ),
    )

    def entrance() -> Any:
        name = serve.get_replica_context().app_name
        return create_app(Replicas(serve.get_deployment_handle("Replica", app_name=name)), **(http or {}))

    front: Any = serve.deployment(serve.ingress(entrance)(), name="Entrance", max_ongoing_requests=10_000)
    bound: serve.Application = front.bind(replica.bind(make))
    return bound


class Replica:
    """One service; errors of its requests travel as data, so that they are not taken for its own."""

    def __init__(self, make: Callable[[], Service]) -> None:
        self._service = make()
        self._gauges: dict[str, Gauge] = {}

    async def stream(self, kind: str, body: dict[str, Any], scope: str) -> AsyncGenerator[dict[str, Any], None]:
        """The answer's chunks, or an error."""
        request = _KINDS[kind].model_validate(body)
        try:
            async with contextlib.aclosing(self._service.stream(request, scope)) as chunks:
                async for chunk in chunks:
                    yield chunk
        except ApiError as error:
            yield {"failed": error.as_dict()}

    async def whole(self, kind: str, body: dict[str, Any], scope: str) -> dict[str, Any]:
        """The answer, or an error."""
        try:
            return await self._service.whole(_KINDS[kind].model_validate(body), scope)
        except ApiError as error:
            return {"failed": error.as_dict()}

    async def facts(self) -> Facts:
        """What is served."""
        return await self._service.facts()

    async def check_health(self) -> None:
        """What Ray calls every few seconds; also when the engine's figures go to Ray's own metrics."""
        if not await self._service.healthy():
            raise RuntimeError("the engine has stopped")
        for name, (text, value) in self._service.figures().items():
            if name not in self._gauges:
                self._gauges[name] = Gauge(f"liquidfusion_{name}", description=text)
            self._gauges[name].set(value)

    def __del__(self) -> None:
        """Ray's way to say that a replica is stopped."""
        service = getattr(self, "_service", None)
        if service is not None:
            service.close()


_KINDS: dict[str, type[Common]] = {"chat": ChatRequest, "completions": CompletionRequest}


class Replicas:
    """The backend of the HTTP routes that sends requests to replicas.

    Parameters
    ----------
    handle : DeploymentHandle
        Of the replicas.
    """

    def __init__(self, handle: DeploymentHandle[Any]) -> None:
        self._handle = handle
        self._facts: Facts | None = None
        self.metrics = Metrics()

    async def stream(self, body: Common, scope: str) -> AsyncGenerator[dict[str, Any], None]:
        """Answer in chunks; from another replica if one dies before it has said anything.

        Raises
        ------
        ApiError
            As the replica's; 503 if it died later, or none can be had.
        """
        said = begun = False
        for attempt in range(_ATTEMPTS):
            handle = self._handle.options(stream=True, method_name="stream", session_id=session(body, scope))
            answer: Any = handle.remote(*_call(body, scope))
            try:
                async for chunk in answer:
                    _check(chunk)
                    empty = all(_is_opening(choice) for choice in chunk["choices"]) and "usage" not in chunk
                    if empty and begun:
                        continue  # a second replica begins as the first did
                    begun, said = True, said or not empty
                    yield chunk
                return
            except _GONE as error:
                if said:
                    raise ApiError(503, "The replica that answered has died; send the request again.") from error
                await _pause(attempt, error)
            except BackPressureError as error:
                raise _busy(error) from error
            finally:
                answer.cancel()

    async def whole(self, body: Common, scope: str) -> dict[str, Any]:
        """Answer in one document; from another replica if one dies.

        Raises
        ------
        ApiError
            As the replica's; 503 if none can be had.
        """
        for attempt in range(_ATTEMPTS):
            handle = self._handle.options(method_name="whole", session_id=session(body, scope))
            answer: Any = handle.remote(*_call(body, scope))
            try:
                document: dict[str, Any] = await answer
                _check(document)
                return document
            except _GONE as error:
                await _pause(attempt, error)
            except BackPressureError as error:
                raise _busy(error) from error
            except asyncio.CancelledError:
                answer.cancel()
                raise
        raise AssertionError("the last pause raises")

    async def facts(self) -> Facts:
        """What is served; it is asked for once.

        Raises
        ------
        ApiError
            503: no replica is there yet.
        """
        if self._facts is None:
            try:
                async with asyncio.timeout(10):
                    self._facts = await self._handle.options(method_name="facts").remote()
            except (*_GONE, TimeoutError) as error:
                raise ApiError(503, "No replica is ready.", headers={"Retry-After": "5"}) from error
        return self._facts

    async def healthy(self) -> bool:
        """Whether a replica answers."""
        try:
            async with asyncio.timeout(5):
                await self._handle.options(method_name="facts").remote()
        except (*_GONE, TimeoutError):
            return False
        return True

    async def page(self) -> bytes:
        """The entrance's own figures; those of the engines are among Ray's metrics, by replica."""
        return self.metrics.page()


def session(body: Common, scope: str) -> str:
    """What all turns of a conversation have in common: its messages up to the user's first one."""
    if not isinstance(body, ChatRequest):
        return ""
    beginning = []
    for message in body.messages:
        beginning.append(message.model_dump(exclude_none=True))
        if message.role == "user":
            break
    return digests(scope, None, beginning)[-1]


def _call(body: Common, scope: str) -> tuple[str, dict[str, Any], str]:
    kind = "chat" if isinstance(body, ChatRequest) else "completions"
    return kind, body.model_dump(exclude_unset=True), scope


def _is_opening(choice: dict[str, Any]) -> bool:
    return choice.get("delta") == {"role": "assistant", "content": ""}


def _check(document: dict[str, Any]) -> None:
    if "failed" in document:
        raise ApiError.from_dict(document["failed"])


def _busy(error: Exception) -> ApiError:
    return ApiError(429, f"The server is busy: {error}", code="queue_full", headers={"Retry-After": "5"})


async def _pause(attempt: int, error: Exception) -> None:
    if attempt == _ATTEMPTS - 1:
        raise ApiError(503, "No replica could answer; send the request again.", headers={"Retry-After": "5"}) from error
    await asyncio.sleep(0.25 * 2**attempt)
