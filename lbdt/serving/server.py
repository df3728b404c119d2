"""A server on this machine, from its start to its orderly end."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any

from lbdt.serving import ray_start
from lbdt.serving.settings import ServeSettings

APP = "lbdt"


class LocalServer:
    """Ray, started here or joined, with the application on it. `stop` ends what was started, and leaves what others run
    on a cluster that was joined. Where Serve runs there already, its own host and port stay as they are.

    What Ray opens beside the HTTP port listens on the loopback address alone where Ray is started here.
    """

    def __init__(
        self,
        settings: ServeSettings,
        host: str = "127.0.0.1",
        port: int = 8000,
        ray_address: str | None = None,
        application: Callable[[ServeSettings], Any] | None = None,
    ) -> None:
        """`ray_address`: of a cluster to join, "auto" for that of this machine; None: Ray is started. `application`: in
        place of `deployment.build`.

        Raises:
            OSError: the port is taken. RuntimeError: what a replica's start raised.
        """
        if port:
            _check_free(host, port)
        ray_start.prepare(ray_address)
        import ray
        from ray import serve

        from lbdt.serving.deployment import build

        self.host, self.port, self._own = host, port, not ray.is_initialized()
        self._joined = ray_address is not None or not self._own
        self._app = (application or build)(settings)
        if self._own:
            ray.init(**ray_start.options(ray_address, settings.replicas + 1))
        try:
            serve.start(
                proxy_location="HeadOnly",
                http_options={
                    "host": host,
                    "port": port,
                    # A request has its own time-out, which answers in words; this one is a net below.
                    "request_timeout_s": settings.timeout + 30,
                },
                logging_config={"enable_access_log": False, "log_level": "WARNING"},
            )
            self.handle = serve.run(self._app, name=APP, route_prefix="/", blocking=False)
        except RuntimeError as error:
            why = _last_lines(serve)
            self.kill()
            raise RuntimeError(f"{error} {why}".strip()) from error
        except BaseException:
            self.kill()
            raise

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://{self.host}:{self.port}"

    def stop(self) -> None:
        """Takes no more requests, finishes what was accepted, and ends."""
        self.handle.drain.remote().result()
        self.kill()

    def kill(self, at_once: bool = False) -> None:
        """Ends without finishing what was accepted; may be called again. `at_once`: a Ray that was started here without
        Serve's leave, which waits for requests that are on."""
        import ray
        from ray import serve

        if not ray.is_initialized():
            return  # Serve's shutdown would start another Ray to look for something to shut down
        if at_once and not self._joined:
            ray.shutdown()
            return
        if self._joined:
            serve.delete(APP)
        if not self._joined or not serve.status().applications:
            serve.shutdown()
        if self._own:
            ray.shutdown()


def _last_lines(serve: Any) -> str:
    """What the replicas that did not start said last: Serve's own error says only that they did not."""
    application = serve.status().applications.get(APP)
    messages = [] if application is None else [one.message for one in application.deployments.values()]
    lines = [[line.strip() for line in message.splitlines() if line.strip()] for message in messages]
    return "; ".join(dict.fromkeys(some[-1] for some in lines if some))


def _check_free(host: str, port: int) -> None:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise OSError(
                error.errno, f"port {port} of {host}: {error.strerror}; give another --port"
            ) from error
