"""Clients of a server of pictures, many at a time: what `benchmarks.serving` does in full and the tests do in small."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.client
import json
import os
import queue
import random
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lbdt import canvas


@dataclass(frozen=True)
class Ask:
    """A request of one picture."""

    tenant: str
    prompt: str
    seed: int


@dataclass(frozen=True)
class Reply:
    """What came back; status 0: the connection broke."""

    status: int
    seconds: float
    body: dict[str, Any]

    @property
    def png(self) -> bytes:
        """The picture."""
        return base64.b64decode(self.body["data"][0]["b64_json"])

    @property
    def sentence(self) -> str:
        """What the error says."""
        return self.body.get("error", {}).get("message", "")


def tenant_names(count: int) -> list[str]:
    """`count` tenants."""
    return [f"tenant-{number:04}" for number in range(count)]


def key_of(tenant: str) -> str:
    """Its API key."""
    return f"key of {tenant}"


def policy_text(tenants: Sequence[str], concepts: Sequence[str], version: str, seed: int) -> str:
    """A policy with one to four concepts for each tenant, of some by groups, drawn by the seed."""
    draw = random.Random(f"{seed} {version}")
    lines = ["schema = 1", f'version = "{version}"', "[groups]"]
    groups = {f"group-{number}": draw.sample(list(concepts), 4) for number in range(4)}
    lines += [f"{name} = {json.dumps(names)}" for name, names in groups.items()]
    for number, tenant in enumerate(tenants):
        lines += [
            f"[tenants.{tenant}]",
            f'keys = ["sha256:{hashlib.sha256(key_of(tenant).encode()).hexdigest()}"]',
        ]
        if number % 5 == 4:
            name = draw.choice(list(groups))
            lines += [f'groups = ["{name}"]', f"allow = {json.dumps(draw.sample(groups[name], 1))}"]
        else:
            lines.append(f"concepts = {json.dumps(draw.sample(list(concepts), draw.randint(1, 3)))}")
    return "\n".join(lines) + "\n"


def asks(tenants: Sequence[str], count: int, seed: int) -> list[Ask]:
    """`count` requests of these tenants in turn, for two of EmojiCanvas's objects in some style."""
    draw = random.Random(seed)
    made = []
    for number in range(count):
        objects = draw.sample(list(canvas.OBJECTS), 2)
        made.append(
            Ask(
                tenants[number % len(tenants)],
                canvas.prompt(objects, draw.choice(canvas.STYLES)),
                draw.randrange(2**63),
            )
        )
    return made


class Client:
    """Requests over one connection, which is made again where it broke; of one thread."""

    def __init__(self, url: str, timeout: float = 300.0) -> None:
        self._address, self._timeout = url.removeprefix("http://"), timeout
        self._connection: http.client.HTTPConnection | None = None

    def post(self, body: bytes, headers: dict[str, str]) -> Reply:
        """The reply to a POST of pictures."""
        return self.request("POST", "/v1/images/generations", body, headers)

    def request(
        self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
    ) -> Reply:
        """The reply; of status 0 where there is none."""
        start = time.perf_counter()
        try:
            if self._connection is None:
                self._connection = http.client.HTTPConnection(self._address, timeout=self._timeout)
            self._connection.request(method, path, body, headers or {})
            response = self._connection.getresponse()
            raw = response.read()
        except (OSError, http.client.HTTPException):
            self.close()
            return Reply(0, time.perf_counter() - start, {})
        try:
            parsed = json.loads(raw)
        except ValueError:
            parsed = {"text": raw.decode(errors="replace")}
        return Reply(response.status, time.perf_counter() - start, parsed if isinstance(parsed, dict) else {})

    def picture(self, ask: Ask) -> Reply:
        """The reply to one that asks for a picture."""
        body = json.dumps({"prompt": ask.prompt, "seed": ask.seed}).encode()
        return self.post(body, headers_of(ask.tenant))

    def leave(self) -> None:
        """Breaks the connection off, from another thread than that which waits for a reply."""
        sock = None if self._connection is None else self._connection.sock
        if sock is not None:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Closes the connection; the next request makes another."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None


def headers_of(tenant: str) -> dict[str, str]:
    """Headers with the tenant's key."""
    return {"authorization": f"Bearer {key_of(tenant)}", "content-type": "application/json"}


def together(url: str, asked: Iterable[Ask], clients: int) -> list[Reply]:
    """The replies to requests by so many clients at a time, in the order of the requests."""
    return _each(url, clients, Client.picture, asked)


def flood(url: str, bodies: Iterable[bytes], tenant: str, clients: int = 8) -> list[Reply]:
    """The replies to raw bodies."""
    return _each(url, clients, lambda client, body: client.post(body, headers_of(tenant)), bodies)


def _each(url: str, clients: int, send: Callable[[Client, Any], Reply], items: Iterable[Any]) -> list[Reply]:
    free: queue.SimpleQueue[Client] = queue.SimpleQueue()
    for _ in range(clients):
        free.put(Client(url))

    def one(item: Any) -> Reply:
        client = free.get()
        try:
            return send(client, item)
        finally:
            free.put(client)

    with ThreadPoolExecutor(clients) as pool:
        return list(pool.map(one, items))


class Load:
    """Clients that ask one picture after the other until they are stopped; every reply is kept."""

    def __init__(self, url: str, asked: Sequence[Ask], clients: int) -> None:
        self.replies: list[tuple[Ask, Reply]] = []
        self._asked, self._next, self._stop = asked, iter(range(10**9)), threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(Client(url),)) for _ in range(clients)]

    def _run(self, client: Client) -> None:
        while not self._stop.is_set():
            ask = self._asked[next(self._next) % len(self._asked)]
            self.replies.append((ask, client.picture(ask)))
            if self.replies[-1][1].status != 200:
                time.sleep(0.1)

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()


def descendants(process: int) -> dict[int, str]:
    """The processes below one, with what they call themselves."""
    children: dict[int, list[int]] = {}
    titles: dict[int, str] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
                titles[int(folder.name)] = (folder / "cmdline").read_text().replace("\0", " ").strip()
            except OSError:
                continue
            children.setdefault(int(fields[1]), []).append(int(folder.name))
    below, todo = {}, list(children.get(process, ()))
    while todo:
        one = todo.pop()
        below[one] = titles.get(one, "")
        todo += children.get(one, ())
    return below


def replicas(process: int, name: str) -> list[int]:
    """The processes of a deployment ("Engine", "Server") of the server that `process` runs."""
    return sorted(pid for pid, title in descendants(process).items() if f"ServeReplica:lbdt:{name}" in title)


def kill_replica(process: int, name: str = "Engine") -> int:
    """Ends a replica by SIGKILL; returns which."""
    victim = replicas(process, name)[0]
    os.kill(victim, signal.SIGKILL)
    return victim


def memory(process: int) -> dict[str, float]:
    """MiB that the replicas and the proxy hold (proportional share), by name."""
    held: dict[str, float] = {}
    for pid, title in descendants(process).items():
        name = next((n for n in ("Engine", "Server", "ProxyActor", "ServeController") if n in title), None)
        if name is not None:
            held[name] = held.get(name, 0.0) + _resident(pid)
    return held


def _resident(pid: int) -> float:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0.0
    return sum(int(line.split()[1]) for line in lines if line.startswith(("Pss_Anon:", "SwapPss:"))) / 1024


def ready(url: str, patience: float = 120.0) -> bool:
    """Waits until the server says so, or for so many seconds."""
    return until(lambda: Client(url, 5).request("GET", "/ready").status == 200, patience)


def until(holds: Callable[[], bool], patience: float = 120.0) -> bool:
    """Waits until it holds, or for so many seconds; whether it does."""
    end = time.monotonic() + patience
    while not holds():
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


def audited(folder: Path) -> Iterator[dict[str, Any]]:
    """The records of an audit."""
    for path in sorted(folder.iterdir()):
        for line in path.read_bytes().splitlines():
            fields = json.loads(line)
            if "record" in fields:
                yield fields["record"]


def percentile(values: Iterable[float], share: float) -> float:
    """The value below which that share lies."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
