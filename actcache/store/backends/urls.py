"""A zarr store for a URL: obstore for the object stores that it knows, fsspec for everything else.

Addresses and keys come from the environment variables that obstore documents: `AWS_ACCESS_KEY_ID`,
`AWS_SECRET_ACCESS_KEY`, `AWS_REGION`, `AWS_ENDPOINT_URL`, `AWS_ALLOW_HTTP`, ...; `GOOGLE_...`; `AZURE_...`.
Profile files (`~/.aws`) are not read. For anything else, make a zarr store and give that instead of a URL.
"""

from __future__ import annotations

import os
import re
from datetime import timedelta
from importlib.util import find_spec
from typing import Any
from urllib.parse import unquote, urlsplit

from zarr.abc.store import Store
from zarr.storage import FsspecStore, LocalStore, ObjectStore

from actcache.addresses import cause_of, safe_message, shown
from actcache.errors import ConfigError

_ENVIRONMENT = {
    **dict.fromkeys(("s3", "s3a"), "AWS_"),
    **dict.fromkeys(("gs", "gcs"), "GOOGLE_"),
    **dict.fromkeys(("az", "adl", "azure", "abfs", "abfss"), "AZURE_"),
    **dict.fromkeys(("http", "https"), "HTTP_STORE_"),
}
"""Schemes that obstore knows, and how the names of their variables begin."""
_CLIENT_OPTIONS = (
    "allow_http",
    "allow_invalid_certificates",
    "connect_timeout",
    "http1_only",
    "http2_only",
    "pool_idle_timeout",
    "pool_max_idle_per_host",
    "proxy_ca_certificate",
    "proxy_excludes",
    "proxy_url",
    "read_timeout",
    "timeout",
    "user_agent",
)
_TIMEOUTS = {"connect_timeout": "10s", "read_timeout": "60s", "timeout": "10m"}
"""A shard of 2 GB may take minutes; an answer that makes no progress for one will not come."""
RETRIES: Any = {
    "max_retries": 12,
    "backoff": {"init_backoff": timedelta(seconds=0.2), "max_backoff": timedelta(seconds=15), "base": 3},
    "retry_timeout": timedelta(minutes=3),
}
"""Answers of 5xx, refused and lost connections are tried again, the pauses growing threefold."""


def open_url(url: str, *, read_only: bool) -> Store:
    """The zarr store behind a URL.

    Raises:
        ConfigError: the scheme is unknown, what it needs is not installed, or the environment does not fit it.
    """
    scheme = re.split("[^a-z0-9+.-]", url.lower(), maxsplit=1)[0]
    if scheme == "file":
        return LocalStore(unquote(urlsplit(url).path), read_only=read_only)
    if scheme in _ENVIRONMENT and find_spec("obstore") is not None:
        return _bucket(url, scheme, read_only)
    return _filesystem(url, scheme, read_only)


def _bucket(url: str, scheme: str, read_only: bool) -> Store:
    from obstore.exceptions import BaseError
    from obstore.store import from_url

    try:
        options: Any = _client_options(scheme)
        known = url.replace("gcs://", "gs://", 1)  # fsspec's name for it
        return ObjectStore(from_url(known, client_options=options, retry_config=RETRIES), read_only=read_only)
    except (BaseError, ValueError) as error:
        raise _cannot_open(url, error) from cause_of(error, url)


def _client_options(scheme: str) -> dict[str, str]:
    """Timeouts and the environment's settings of the connection, which obstore ignores once any option is given."""
    prefix = _ENVIRONMENT[scheme]
    named = {name: os.environ.get(prefix + name.upper()) for name in _CLIENT_OPTIONS}
    options = _TIMEOUTS | {name: value for name, value in named.items() if value}
    if scheme == "http":
        options["allow_http"] = "true"
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
    if prefix == "AWS_" and endpoint.startswith("http://") and options.get("allow_http", "").lower() not in _YES:
        raise ConfigError(
            f"the endpoint {shown(endpoint)} is not encrypted; set AWS_ALLOW_HTTP=true if that is intended"
        )
    return options


_YES = ("1", "true", "on", "yes", "y")


def _filesystem(url: str, scheme: str, read_only: bool) -> Store:
    try:
        import fsspec
    except ImportError:
        raise ConfigError(f"{shown(url)}: '{scheme}://' needs more packages; pip install 'actcache[remote]'") from None
    if scheme not in fsspec.available_protocols():
        known = ", ".join(f"{name}://" for name in ("s3", "gs", "az", "https", "memory"))
        raise ConfigError(
            f"{shown(url)}: the scheme '{scheme}://' is unknown here; give a path, or one of {known} or fsspec's others"
        )
    try:
        return FsspecStore.from_url(url, read_only=read_only)
    except ImportError as error:
        instead = "pip install 'actcache[remote]'" if scheme in _ENVIRONMENT else "install what it names"
        said = f"{shown(url)}: '{scheme}://' needs another package ({safe_message(error, url)}); {instead}"
        raise ConfigError(said) from cause_of(error, url)
    except Exception as error:  # each of fsspec's file systems has errors of its own
        raise _cannot_open(url, error) from cause_of(error, url)


def _cannot_open(url: str, error: BaseException) -> ConfigError:
    return ConfigError(f"cannot open {shown(url)}: {safe_message(error, url)}")
