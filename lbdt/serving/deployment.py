"""The Ray Serve application: HTTP in front, engines behind."""

import asyncio
import contextlib
import logging
import os
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import HTTPException
from fastapi.responses import JSONResponse, Response
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import BackPressureError
from ray.serve.handle import DeploymentHandle
from starlette.exceptions import HTTPException as StarletteHTTPException

from lbdt.serving.audit import AuditLog, read_key
from lbdt.serving.engine import Work
from lbdt.serving.front import Front, Served, single
from lbdt.serving.image_request import Refusal
from lbdt.serving.metrics import ServerMetrics
from lbdt.serving.outcome import Failure, Outcome
from lbdt.serving.policy_watch import PolicyWatcher
from lbdt.serving.replica import Replica
from lbdt.serving.settings import ServeSettings

_PATIENCE = 86_400.0  # seconds a replica is given to finish what it accepted
_QUIET = {"enable_access_log": False, "log_level": "WARNING"}
api = FastAPI(title="lbdt", docs_url=None, redoc_url=None, openapi_url=None)


# Above the classes, which Ray takes with what is there when it meets them.
def _log_requests() -> None:
    """Has this process write the log of requests, which Python keeps back, to its stderr: a file of Ray's logs."""
    log = logging.getLogger("lbdt.serving")
    log.setLevel(logging.INFO)
    if not log.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        log.addHandler(handler)
        log.propagate = False


@api.exception_handler(StarletteHTTPException)
async def _no_such_route(request: Request, error: HTTPException) -> JSONResponse:
    refusal = Refusal(error.status_code, f"{error.detail}.", code="no_such_route")
    return JSONResponse(refusal.body(), error.status_code, headers=error.headers)


@serve.deployment(
    logging_config=_QUIET, graceful_shutdown_timeout_s=_PATIENCE, graceful_shutdown_wait_loop_s=0.5
)
class Engine:
    """A `Replica` on a device of its own."""

    def __init__(self, settings: ServeSettings, made_by: type[Replica] = Replica) -> None:
        self._replica = made_by(settings)

    async def make(self, tenant: str, work: Work, eraser: str) -> Outcome:
        """`Replica.make`."""
        return await self._replica.make(tenant, work, eraser)

    async def served(self) -> Served:
        """What it serves with."""
        return self._replica.served

    async def process(self) -> int:
        """Its process."""
        return os.getpid()

    def check_health(self) -> None:
        """RuntimeError where it answers nothing any more; Ray Serve then replaces it."""
        if not self._replica.is_alive:
            raise RuntimeError("the engine's queue ended")


@serve.deployment(
    logging_config=_QUIET, graceful_shutdown_timeout_s=_PATIENCE, graceful_shutdown_wait_loop_s=0.5
)
@serve.ingress(api)
class Server:
    """The HTTP routes."""

    async def __init__(self, engine: DeploymentHandle, settings: ServeSettings) -> None:
        _log_requests()
        served: Served = await engine.served.remote()
        key = None if settings.audit_key is None else read_key(settings.audit_key)
        self._engine = engine
        replica = serve.get_replica_context().replica_id.unique_id
        self._front = Front(
            settings,
            served,
            self._make,
            PolicyWatcher(settings.policy, served.concepts),
            AuditLog(settings.audit, key=key),
            ServerMetrics(replica),
        )
        self._watch = asyncio.get_running_loop().create_task(self._front.watch_policy())

    async def _make(self, tenant: str, work: Work) -> Outcome:
        # Nothing of a picture is given out before it is whole, so it may be made again, with the same bits, where an
        # engine died with it; not more often, as it may be what engines die of.
        for again in (True, False):
            try:
                return await self._engine.make.remote(tenant, work, self._front.served.eraser)
            except BackPressureError:
                return Failure("gone", "no engine had room")
            except RayError as error:
                if not again:
                    return Failure("gone", type(error).__name__)
        raise AssertionError("a picture is made or not")

    @api.post("/v1/images/generations")
    async def images(self, request: Request) -> Response:
        """Pictures, as the OpenAI API has it."""
        answer = await self._front.images(single(request.headers.items()), request.stream())
        return JSONResponse(answer.body, answer.status, headers=dict(answer.headers))

    @api.get("/v1/models")
    async def models(self) -> Response:
        """The one model that is served."""
        model = {"id": self._front.served.model, "object": "model", "created": 0, "owned_by": "lbdt"}
        return JSONResponse({"object": "list", "data": [model]})

    @api.get("/health")
    async def health(self) -> Response:
        """Whether the process answers."""
        return JSONResponse({"alive": True})

    @api.get("/ready")
    async def ready(self) -> Response:
        """Whether requests are taken."""
        ready, state = self._front.state()
        return JSONResponse(state, 200 if ready else 503)

    @api.get("/metrics")
    async def metrics(self) -> Response:
        """What Prometheus reads."""
        return Response(self._front.metrics.text(), media_type=ServerMetrics.CONTENT_TYPE)

    async def drain(self) -> None:
        """Takes nothing more; returns when all that was accepted is answered."""
        self._watch.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._watch
        await self._front.drain()


def build(settings: ServeSettings | dict[str, Any], made_by: type[Replica] = Replica) -> serve.Application:
    """The application, for `serve.run`, `serve run lbdt.serving.deployment:build policy=... audit=...`, or a graph of
    one's own. `made_by`: a `Replica` of one's own."""
    if isinstance(settings, dict):
        settings = ServeSettings(**settings)
    gpus = 0 if settings.device == "cpu" else _gpus()
    engine = Engine.options(
        num_replicas=settings.replicas,
        # What the front lets in waits in the engine's queue, where batches are made of it.
        max_ongoing_requests=max(2 * settings.batch, settings.max_queue),
        ray_actor_options={"num_cpus": 1 if not gpus else 0, "num_gpus": gpus},
    ).bind(settings, made_by)
    return Server.options(
        max_ongoing_requests=settings.max_queue + 1000, ray_actor_options={"num_cpus": 0}
    ).bind(engine, settings)


def _gpus() -> float:
    import torch

    return 1.0 if torch.cuda.is_available() else 0.0
