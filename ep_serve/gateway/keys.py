"""API keys: stored as SHA-256 digests, compared in constant time, reloaded when their file changes.

A key has 256 random bits, so a fast hash is enough: it cannot be guessed.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ep_serve.gateway.errors import ApiError
from ep_serve.gateway.yaml_file import SettingsError, read_yaml

if TYPE_CHECKING:
    from starlette.types import Scope

logger = logging.getLogger(__name__)

PREFIX = "sk-ep-"
_Ratio = Annotated[float, Field(gt=0, le=1)]
_Name = Annotated[str, Field(pattern=r"^[\w.@-]{1,64}$")]


class Key(BaseModel):
    """One entry of the key file. Limits that are not given do not apply."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    name: _Name
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    tenant: _Name = ""
    """Keys of one tenant share files and cached media; defaults to the name of the key."""
    requests_per_minute: Annotated[int, Field(ge=1)] | None = None
    media_bytes_per_minute: Annotated[int, Field(ge=1)] | None = None
    concurrent_requests: Annotated[int, Field(ge=1)] | None = None
    models: tuple[str, ...] | None = None
    keep_ratio_min: _Ratio | None = None
    """Bounds on the `keep_ratio` of requests; the engine's own default is always allowed."""
    keep_ratio_max: _Ratio | None = None
    priority: Annotated[int, Field(ge=-1_000, le=1_000)] = 0
    """Higher priorities leave the queue first."""

    @property
    def owner(self) -> str:
        """The tenant, which defaults to the name of the key."""
        return self.tenant or self.name

    @model_validator(mode="after")
    def _range(self) -> Self:
        low, high = self.keep_ratio_min, self.keep_ratio_max
        if low is not None and high is not None and low > high:
            raise ValueError(f"keep_ratio_min ({low}) is greater than keep_ratio_max ({high})")
        return self

    def check_model(self, model: str) -> None:
        """Raise 403 if the key may not use a model."""
        if self.models is not None and model not in self.models:
            raise ApiError(
                403, "This key may not use the model.", code="model_not_allowed", param="model"
            )

    def check_keep_ratio(self, ratio: float | None, field: str) -> None:
        """Raise 403 if the key does not allow a keep ratio, given in a field of the request."""
        if ratio is None:
            return
        low, high = self.keep_ratio_min or 0.0, self.keep_ratio_max or 1.0
        if not low <= ratio <= high:
            raise ApiError(
                403,
                f"This key allows keep ratios from {low:g} to {high:g} (got {ratio:g} by {field}).",
                code="keep_ratio_not_allowed",
                param=field,
            )


ANONYMOUS = Key(name="anonymous", sha256="0" * 64)
"""The key of all requests to a gateway without keys; its digest matches no key."""


def quota_tenant(key: Key, scope: Scope) -> str:
    """Return the tenant whose quotas a request uses; without keys each address is a tenant."""
    client = scope.get("client")
    return f"address {client[0]}" if key is ANONYMOUS and client else key.owner


class KeyFile(BaseModel):
    """The content of a key file."""

    model_config = ConfigDict(extra="forbid")

    keys: tuple[Key, ...]

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        for field in ("name", "sha256"):
            values = [getattr(key, field) for key in self.keys]
            if len(set(values)) < len(values):
                raise ValueError(f"two keys have the same {field}")
        return self


class KeyRing:
    """The keys that are currently valid."""

    def __init__(self, file: Path | None) -> None:
        self._file = file
        self._keys: tuple[tuple[bytes, Key], ...] = ()
        self._stamp: tuple[int, int, int] | None = None
        if file is not None:
            self._stamp = _stamp(file)
            self._keys = _load(file)

    @property
    def is_anonymous(self) -> bool:
        """Whether requests need no key."""
        return self._file is None

    def authenticate(self, authorization: str | None) -> Key:
        """Return the key of an `Authorization` header.

        Raises:
            ApiError: 401 for a missing or invalid key.
        """
        if self.is_anonymous:
            return ANONYMOUS
        scheme, _, token = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not token.strip():
            raise ApiError(
                401, "Send an API key: 'Authorization: Bearer KEY'.", code="missing_api_key"
            )
        digest = hashlib.sha256(token.strip().encode("utf-8", "surrogateescape")).digest()
        found: Key | None = None
        for known, key in self._keys:  # compare all, so that the time does not depend on the match
            if hmac.compare_digest(known, digest):
                found = key
        if found is None:
            raise ApiError(401, "The API key is not valid.", code="invalid_api_key")
        return found

    def tenant_of(self, authorization: str | None) -> str | None:
        """Return the tenant of an `Authorization` header, or None."""
        try:
            return self.authenticate(authorization).owner
        except ApiError:
            return None

    def reload_if_changed(self) -> None:
        """Reload the file if it changed; an invalid file changes nothing."""
        if self._file is None:
            return
        stamp = None
        try:
            stamp = _stamp(self._file)
            if stamp != self._stamp:
                self._keys = _load(self._file)
                logger.info("keys reloaded", extra={"keys": len(self._keys)})
        except SettingsError as error:
            if stamp != self._stamp:  # log once for each change
                logger.error("the key file was not reloaded: %s", error)
        self._stamp = stamp


def new_key(name: str) -> tuple[str, str]:
    """Return a new key and its YAML entry."""
    key = PREFIX + secrets.token_urlsafe(32)
    entry = {"name": name, "sha256": hashlib.sha256(key.encode()).hexdigest()}
    text: str = yaml.safe_dump({"keys": [entry]}, sort_keys=False)
    return key, text


def _stamp(file: Path) -> tuple[int, int, int]:
    try:
        status = file.stat()
    except OSError as error:
        raise SettingsError(f"keys_file: {file}: cannot be read ({error.strerror})") from None
    return status.st_mtime_ns, status.st_size, status.st_ino


def _load(file: Path) -> tuple[tuple[bytes, Key], ...]:
    try:
        content = read_yaml(file)
    except SettingsError as error:
        raise SettingsError(f"keys_file: {error}") from None
    if not isinstance(content, dict):
        raise SettingsError(f"keys_file: {file}: must have a list 'keys'")
    try:
        keys = KeyFile.model_validate(content).keys
    except ValidationError as error:
        # The message does not quote values: an operator may have entered a key instead of a digest.
        lines = (
            f"keys_file: {'.'.join(str(part) for part in item['loc']) or file}: {item['msg']}"
            for item in error.errors(include_input=False)
        )
        raise SettingsError("\n".join(lines)) from None
    return tuple((bytes.fromhex(key.sha256), key) for key in keys)
