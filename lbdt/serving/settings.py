"""What a server is started with."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from lbdt.serving.sizes import pixels_of

Count = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class ServeSettings(BaseModel):
    """Checked when made, so that a server does not start with what it could not serve with.

    Paths are those of the machines that the replicas run on.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    policy: Path
    """The tenants' policy (`lbdt.serving.policy`)."""
    audit: Path
    """The folder of the audit's files (`lbdt.serving.audit`); made where missing."""
    audit_key: Path | None = None
    """A file with the key of the audit's hashes; None: hashes without a key."""
    model: str | None = None
    """A diffusers pipeline's folder or Hub repository; None: EmojiCanvas's."""
    eraser: str | None = None
    """An eraser's folder or Hub repository; None: EmojiCanvas's, of `kind`."""
    kind: str = "saeuron"
    device: str = "auto"
    steps: Count | None = None
    """Denoising steps; None: 20, or what EmojiCanvas's kind is made for."""
    guidance: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    """Guidance scale; None: the pipeline's own, or that of EmojiCanvas's kind."""
    sizes: tuple[str, ...] = ()
    """Sizes that may be asked for beside "auto", such as "512x512"."""
    batch: Annotated[int, Field(ge=1, le=256)] = 8
    """The most pictures of one call of the pipeline."""
    fill: bool = True
    """Whether every call has `batch` rows (`PictureEngine`)."""
    batch_wait: Annotated[float, Field(ge=0, le=10)] = 0.005
    """Seconds that an idle engine waits for more pictures."""
    threads: Annotated[int, Field(ge=1, le=1024)] | None = None
    """CPU threads of a replica's engine; None: PyTorch's own choice."""
    replicas: Annotated[int, Field(ge=1, le=100_000)] = 1
    """How many engines."""
    max_prompt: Annotated[int, Field(ge=1, le=100_000)] = 1000
    """Characters."""
    max_n: Annotated[int, Field(ge=1, le=10)] = 4
    """Pictures of one request."""
    max_queue: Annotated[int, Field(ge=1, le=1_000_000)] = 256
    """Pictures that are accepted and not answered; more are refused by 429."""
    max_tenant_queue: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    """The same of one tenant; None: a quarter of `max_queue`."""
    max_body: Annotated[int, Field(ge=1024, le=1 << 24)] = 1 << 16
    """Bytes of a request."""
    timeout: Annotated[float, Field(gt=0, le=86_400)] = 120.0
    """Seconds after which a request is answered by 504."""
    tenant_header: str | None = None
    """A header that names the tenant, for a server behind a gateway that sets it; None: API keys only."""
    policy_interval: Seconds = 2.0
    """Seconds between looks at the policy's file."""

    @field_validator("sizes")
    @classmethod
    def _sizes(cls, sizes: tuple[str, ...]) -> tuple[str, ...]:
        for size in sizes:
            pixels_of(size)
        return sizes

    @field_validator("tenant_header")
    @classmethod
    def _header(cls, name: str | None) -> str | None:
        if name is not None and not (name and name.isascii() and name.replace("-", "").isalnum()):
            raise ValueError(f"expected a header's name such as X-Tenant, got {name!r}")
        return name

    @model_validator(mode="after")
    def _consistent(self) -> ServeSettings:
        if self.model is not None and self.eraser is None:
            raise ValueError("eraser: an eraser belongs to a pipeline: give it with model")
        if self.max_n > min(self.tenant_queue, self.max_queue):
            raise ValueError(
                f"max_n: {self.max_n} pictures of a request, and a tenant may have "
                f"{min(self.tenant_queue, self.max_queue)} in the queue; raise max_queue or max_tenant_queue, or lower "
                "max_n"
            )
        return self

    @property
    def tenant_queue(self) -> int:
        """The pictures that one tenant may have waiting."""
        return self.max_tenant_queue or max(self.max_n, self.max_queue // 4)


def settings_of(**values: Any) -> ServeSettings:
    """The settings; ValueError, in a line for each fault, where they are not right."""
    try:
        return ServeSettings(**values)
    except ValidationError as error:
        faults = [
            (".".join(map(str, fault["loc"])), fault["msg"].removeprefix("Value error, "))
            for fault in error.errors()
        ]
        raise ValueError("; ".join(f"{where}: {text}" if where else text for where, text in faults)) from None
