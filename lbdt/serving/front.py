"""What happens to a request, from its bytes to its pictures: no Ray and no network here."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import logging
import math
import secrets
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lbdt.runs.wording import short
from lbdt.serving.audit import AuditError, AuditLog, PictureRecord
from lbdt.serving.audit_lines import utc_now
from lbdt.serving.engine import Picture, Work
from lbdt.serving.image_request import ImageRequest, Refusal, read_request
from lbdt.serving.metrics import ServerMetrics
from lbdt.serving.outcome import Failure, Outcome
from lbdt.serving.policy import TenantRules, UnknownTenantError
from lbdt.serving.policy_watch import PolicyWatcher
from lbdt.serving.settings import ServeSettings

Make = Callable[[str, Work], Awaitable[Outcome]]
"""Has a tenant's picture made: `Replica.make`, or a handle on it."""
_log = logging.getLogger("lbdt.serving")
_STATUS = {"prompt_too_long": 400, "not_protected": 500, "failed": 500, "gone": 503}
MOST_TENANT = 100
MOST_REASON = 500
BODY_SECONDS = 30.0
"""The time that a client has for its request's body."""
_SECONDS_A_PICTURE = 1.0  # until one was made


@dataclass(frozen=True)
class Answer:
    """A response."""

    status: int
    body: dict[str, Any]
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Served:
    """What a server serves with, as its engine says."""

    model: str
    """The name that requests may give as `model`."""
    eraser: str
    """The eraser's fingerprint (`ConceptEraser.digest`)."""
    concepts: tuple[str, ...]


@dataclass
class _Accepted:
    """A request that will be answered, and audited."""

    id: str
    tenant: str
    rules: TenantRules
    request: ImageRequest
    begun: str
    """When, in UTC."""


class Front:
    """Lets requests in, has their pictures made, writes the audit, and only then lets the pictures out."""

    def __init__(
        self,
        settings: ServeSettings,
        served: Served,
        make: Make,
        policy: PolicyWatcher,
        audit: AuditLog,
        metrics: ServerMetrics,
    ) -> None:
        self.settings, self.served, self.policy, self.metrics = settings, served, policy, metrics
        self._make, self._audit = make, audit
        self._waiting: Counter[str] = Counter()
        self._leaving: set[asyncio.Task[None]] = set()
        self._pace = _SECONDS_A_PICTURE
        self._audit_fault: str | None = None
        self.draining = False

    @property
    def waiting(self) -> int:
        """Pictures that are accepted and not answered."""
        return self._waiting.total()

    async def images(self, headers: Mapping[str, str], body: AsyncIterator[bytes]) -> Answer:
        """The answer to `POST /v1/images/generations`; `headers`: of `single`."""
        name, start = f"req_{secrets.token_hex(12)}", time.perf_counter()
        try:
            answer = await self._answered(name, headers, body)
        except Refusal as refusal:
            self.metrics.count(self.metrics.refusals, refusal.code)
            wait = {} if refusal.retry_after is None else {"retry-after": str(refusal.retry_after)}
            answer = Answer(refusal.status, refusal.body(), wait)
        except Exception as error:
            # By its kind only: what is raised from here is logged by Ray, and its text may quote the request.
            _log.error("%s: %s", name, type(error).__name__)
            answer = Answer(500, Refusal(500, "The server failed.", code="internal").body())
        seconds = time.perf_counter() - start
        self.metrics.count(self.metrics.requests, str(answer.status))
        if answer.status == 200:
            self.metrics.latency.observe(seconds)
        _log.info("%s %d %.3f s", name, answer.status, seconds)
        return Answer(answer.status, answer.body, {**answer.headers, "x-request-id": name})

    def state(self) -> tuple[bool, dict[str, Any]]:
        """Whether requests are taken, and why or why not; names no tenant."""
        policy = self.policy.current
        faults = [self._audit_fault] if self._audit_fault else []
        faults += ["shutting down"] if self.draining else []
        return not faults, {
            "ready": not faults,
            "faults": faults,
            "model": self.served.model,
            "eraser": self.served.eraser,
            "policy": {
                "version": policy.version,
                "digest": policy.digest,
                "rejected": self.policy.rejected is not None,
            },
            "queue": self.waiting,
        }

    async def watch_policy(self) -> None:
        """Takes new versions of the policy as they come, for as long as it is not cancelled."""
        while True:
            await asyncio.sleep(self.settings.policy_interval)
            before, refused = self.policy.current, self.policy.rejected
            await asyncio.to_thread(self.policy.refresh)
            if self.policy.current is not before:
                self.metrics.count(self.metrics.reloads, "taken")
            elif self.policy.rejected not in (None, refused):
                self.metrics.count(self.metrics.reloads, "rejected")
                _log.error("policy: version %r stays in force: %s", before.version, self.policy.rejected)

    async def drain(self) -> None:
        """Takes nothing more, and returns when all that was accepted is answered."""
        self.draining = True
        while self.waiting or self._leaving:
            await asyncio.sleep(0.02)
        await asyncio.to_thread(self._audit.close)

    def _check_open(self) -> None:
        if self.draining:
            raise Refusal(
                503, "The server is shutting down; try another one.", code="shutting_down", retry_after=5
            )

    async def _answered(self, name: str, headers: Mapping[str, str], body: AsyncIterator[bytes]) -> Answer:
        self._check_open()
        # One version of the policy decides all of a request, whatever is loaded meanwhile.
        policy = self.policy.current
        tenant = self._tenant(policy, headers)
        try:
            rules = policy.resolve(tenant)
        except UnknownTenantError as error:
            raise Refusal(403, "This tenant is not in the policy.", code="unknown_tenant") from error
        kind = headers.get("content-type", "application/json").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise Refusal(415, "Expected content-type application/json.", code="unsupported_media_type")
        whole = await _read(headers, body, self.settings.max_body)
        request = read_request(whole, self.settings, (self.served.model,))
        self._check_open()  # the body may have taken its time
        with self._place(tenant, len(request.seeds)):
            accepted = _Accepted(name, tenant, rules, request, utc_now())
            return await self._accepted(accepted)

    def _tenant(self, policy: Any, headers: Mapping[str, str]) -> str:
        if self.settings.tenant_header is not None:
            tenant = _in_utf8(headers.get(self.settings.tenant_header.lower(), ""))
            if not 0 < len(tenant) <= MOST_TENANT or not tenant.isprintable():
                raise Refusal(
                    401,
                    f"Expected the tenant (at most {MOST_TENANT} characters) in {self.settings.tenant_header}.",
                    code="no_tenant",
                )
            return tenant
        scheme, _, key = headers.get("authorization", "").partition(" ")
        tenant = policy.tenant_of_key(key.strip()) if scheme.lower() == "bearer" and key.strip() else None
        if tenant is None:
            raise Refusal(
                401, "Expected an API key of a tenant: authorization: Bearer KEY.", code="invalid_api_key"
            )
        return tenant

    @contextlib.contextmanager
    def _place(self, tenant: str, pictures: int) -> Iterator[None]:
        """Room in the queue for so many pictures."""
        full = self.waiting + pictures > self.settings.max_queue
        if full or self._waiting[tenant] + pictures > self.settings.tenant_queue:
            wait = min(60, max(1, math.ceil(self._pace * self.waiting)))
            whose = "The queue is full" if full else "This tenant's part of the queue is full"
            raise Refusal(429, f"{whose}; try again in {wait} s.", code="queue_full", retry_after=wait)
        self._waiting[tenant] += pictures
        self.metrics.queue.set(self.waiting)
        try:
            yield
        finally:
            self._waiting[tenant] -= pictures
            if self._waiting[tenant] == 0:
                del self._waiting[tenant]
            self.metrics.queue.set(self.waiting)

    async def _accepted(self, accepted: _Accepted) -> Answer:
        request, rules = accepted.request, accepted.rules
        start = time.perf_counter()
        works = [
            Work(request.prompt, seed, rules.concepts, rules.on_failure, request.size)
            for seed in request.seeds
        ]
        made = asyncio.gather(*(self._one(accepted.tenant, work) for work in works))
        try:
            outcomes: Sequence[Outcome] = await asyncio.wait_for(made, self.settings.timeout)
        except TimeoutError:
            await self._audited(accepted, [Failure("gone", "timed out")] * len(works))
            raise Refusal(
                504,
                f"No picture within {self.settings.timeout:g} s; it was dropped.",
                code="timeout",
                retry_after=5,
            ) from None
        except asyncio.CancelledError:
            # Whoever asked is gone; what was accepted is in the audit all the same.
            task = asyncio.create_task(self._left(accepted, [Failure("gone", "client gone")] * len(works)))
            self._leaving.add(task)
            task.add_done_callback(self._leaving.discard)
            raise
        self._pace += 0.1 * ((time.perf_counter() - start) / max(1, self.waiting) - self._pace)
        await self._audited(accepted, outcomes)
        for outcome in outcomes:
            if isinstance(outcome, Failure):
                raise _refusal(outcome)
        return Answer(200, _body(accepted, outcomes))

    async def _one(self, tenant: str, work: Work) -> Outcome:
        try:
            return await self._make(tenant, work)
        except Exception as error:
            return Failure("failed", type(error).__name__)

    async def _left(self, accepted: _Accepted, outcomes: Sequence[Outcome]) -> None:
        with contextlib.suppress(Refusal):
            await self._audited(accepted, outcomes)

    async def _audited(self, accepted: _Accepted, outcomes: Sequence[Outcome]) -> None:
        """Writes what became of the pictures; a Refusal where that cannot be written."""
        fails = any(isinstance(outcome, Failure) for outcome in outcomes)
        records = [
            _record(accepted, place, outcome, self.served.eraser, released=not fails)
            for place, outcome in enumerate(outcomes)
        ]
        # Shielded and waited for at the end, so that a client who leaves meanwhile leaves no picture without a line.
        task = asyncio.create_task(self._written(accepted, records, outcomes))
        self._leaving.add(task)
        task.add_done_callback(self._leaving.discard)
        await asyncio.shield(task)

    async def _written(
        self, accepted: _Accepted, records: Sequence[PictureRecord], outcomes: Sequence[Outcome]
    ) -> None:
        try:
            await asyncio.to_thread(self._audit.write, records)
        except AuditError as error:
            self._audit_fault = "the audit cannot be written"
            _log.error("%s: %s", accepted.id, error)
            raise Refusal(
                503,
                "The audit cannot be written, and without it no picture is given out.",
                code="audit",
                retry_after=30,
            ) from error
        self._audit_fault = None
        for record, outcome in zip(records, outcomes, strict=True):
            self.metrics.count(self.metrics.pictures, record.outcome)
            if isinstance(outcome, Picture):
                self.metrics.detected.inc(sum(outcome.detected))
                self.metrics.replaced.inc(sum(outcome.replaced))
                self.metrics.gated.inc(outcome.gated)


def single(headers: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Headers by name, in lower case, without those that came more than once: which of two tenants or keys counts,
    servers and gateways see differently."""
    given = [(name.lower(), value) for name, value in headers]
    times = Counter(name for name, _ in given)
    return {name: value for name, value in given if times[name] == 1}


def _in_utf8(value: str) -> str:
    """A header's value, which servers read as latin-1, as the UTF-8 that a policy is written in; none if it is not."""
    try:
        return value.encode("latin-1").decode()
    except UnicodeError:
        return ""


async def _read(headers: Mapping[str, str], body: AsyncIterator[bytes], most: int) -> bytes:
    """The body, of which no more than `most` bytes are kept."""
    large = Refusal(413, f"body: at most {most} bytes are taken.", code="too_large")
    length = headers.get("content-length", "0")
    if not (length.isascii() and length.isdigit()):
        raise Refusal(400, "content-length: expected a number.", code="invalid_value")
    if len(length) > 12 or int(length) > most:
        raise large
    whole = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for piece in body:
                whole += piece
                if len(whole) > most:
                    raise large
    except TimeoutError:
        raise Refusal(
            408, f"body: not there within {BODY_SECONDS:g} s.", code="slow_body", retry_after=1
        ) from None
    except Refusal:
        raise
    except Exception as error:
        # What a server raises where the client is gone.
        raise Refusal(400, "body: ended too early.", code="incomplete_body") from error
    return bytes(whole)


def _refusal(failure: Failure) -> Refusal:
    texts = {
        "prompt_too_long": failure.reason,
        "not_protected": "Erasing failed for this picture, and this tenant's policy gives out none without it: ",
        "failed": "The picture could not be made.",
        "gone": "The replica that made the picture is gone; try again.",
    }
    text = texts[failure.kind] + (failure.reason if failure.kind == "not_protected" else "")
    param = "prompt" if failure.kind == "prompt_too_long" else None
    retry = 1 if failure.kind == "gone" else None
    return Refusal(_STATUS[failure.kind], text, code=failure.kind, param=param, retry_after=retry)


def _record(accepted: _Accepted, index: int, outcome: Outcome, eraser: str, released: bool) -> PictureRecord:
    rules, picture = accepted.rules, outcome if isinstance(outcome, Picture) else None
    if picture is None:
        said, reason = ("refused" if outcome.kind == "not_protected" else "failed"), outcome.reason
    elif not released:
        said, reason = "refused", "another picture of the request was not made"
    else:
        said, reason = ("protected" if picture.protected else "unprotected"), picture.reason
    return PictureRecord(
        request=accepted.id,
        index=index,
        tenant=accepted.tenant,
        policy_version=rules.policy_version,
        policy_digest=rules.policy_digest,
        eraser=eraser,
        concepts=rules.concepts,
        seed=accepted.request.seeds[index],
        detected=picture.detected if picture else (),
        replaced=picture.replaced if picture else (),
        gated=bool(picture and picture.gated),
        fallback="unprotected" if picture and not picture.protected else None,
        outcome=said,
        reason=None if reason is None else short(reason, MOST_REASON),
        image=hashlib.sha256(picture.png).hexdigest() if picture and released else None,
        started=accepted.begun,
        finished=utc_now(),
    )


def _body(accepted: _Accepted, pictures: Sequence[Picture]) -> dict[str, Any]:
    request, rules = accepted.request, accepted.rules
    return {
        "created": int(time.time()),
        "output_format": "png",
        "data": [
            {
                "b64_json": base64.b64encode(picture.png).decode(),
                "seed": seed,
                "protected": picture.protected,
                **({"reason": picture.reason} if picture.reason else {}),
            }
            for picture, seed in zip(pictures, request.seeds, strict=True)
        ],
        "lbdt": {
            "request": accepted.id,
            "policy": rules.policy_version,
            "protected": all(p.protected for p in pictures),
        },
    }
