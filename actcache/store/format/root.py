"""The root attributes: what a store says of itself. Putting them makes a store open or sealed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from actcache.errors import ConfigError, CorruptShardError, NotAStoreError, StoreNotFoundError, StoreVersionError
from actcache.spec import StoreSpec
from actcache.store import codecs
from actcache.store.backends.objects import Objects
from actcache.store.format.keys import columns_of as columns
from actcache.store.locks.lock_keys import LEASE

FORMAT_VERSION = 1


_MOST_ROOT_BYTES = 1 << 22


@dataclass(frozen=True, kw_only=True, slots=True)
class Root:
    """The root attributes: what a store says of itself."""

    state: str
    """`creating` (not yet usable), `open` (shards are being added) or `sealed` (finished)."""
    spec: StoreSpec
    """What the store holds."""
    fingerprint: str | None = None
    """sha256 over spec, ledger and totals; only a sealed store has one."""
    digests: tuple[str, ...] = ()
    """sha256 (hex) of the ledger, then of each site's total: by them each is known by itself. Of a sealed store."""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """How the store came to be (versions, device, batch): for people; the fingerprint does not cover it."""

    def attributes(self) -> dict[str, Any]:
        """JSON-able form."""
        return {
            "format_version": FORMAT_VERSION,
            "state": self.state,
            "spec": self.spec.to_dict(),
            "fingerprint": self.fingerprint,
            "digests": list(self.digests),
            **({"provenance": dict(self.provenance)} if self.provenance else {}),
        }


def read_root(objects: Objects) -> Root:
    """The root attributes of the store behind `objects`.

    Raises:
        StoreNotFoundError: nothing is there.
        NotAStoreError: something else is there.
        StoreVersionError: a newer version wrote it, or an older one with a codec that is not known here.
    """
    data = objects.get("zarr.json") if objects.size("zarr.json") <= _MOST_ROOT_BYTES else memoryview(b"")
    if data is None:
        if exists_any(objects):
            raise NotAStoreError(f"{objects} holds something other than an activation store; name another place")
        raise StoreNotFoundError(f"no activation store at {objects}; make one with 'actcache extract --out {objects}'")
    try:
        attributes = json.loads(bytes(data))["attributes"]["actcache"]
        version = attributes["format_version"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise NotAStoreError(
            f"{objects} is not an activation store: its zarr.json has no 'actcache' attributes"
        ) from None
    if type(version) is not int or not 0 < version <= FORMAT_VERSION:
        raise StoreVersionError(
            f"{objects} has format version {str(version)[:40]}, this actcache reads up to {FORMAT_VERSION}; "
            "upgrade actcache"
        )
    try:
        return _root(attributes)
    except codecs.UnknownCodecError as error:
        raise StoreVersionError(
            f"{objects} has a site that this actcache cannot decode: {error}; use the version that wrote the store"
        ) from None
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptShardError(f"the attributes of {objects} are damaged: {str(error)[:300]}") from None


def exists_any(objects: Objects) -> bool:
    """Whether anything at all lies there. Empty folders count as nothing, and so do the locks of writers."""
    if objects.root is not None and objects.root.is_file():
        return True
    return any(not key.startswith(LEASE) for key in objects.list(""))


def _root(attributes: dict[str, Any]) -> Root:
    """The root that `Root.attributes` described; KeyError, TypeError or ValueError when it is invalid."""
    root = Root(
        state=attributes["state"],
        spec=StoreSpec.from_dict(attributes["spec"]),
        fingerprint=attributes["fingerprint"],
        digests=tuple(attributes["digests"]),
        provenance=attributes.get("provenance", {}),
    )
    if not isinstance(root.provenance, dict):
        raise ValueError("its provenance is not a mapping")
    if root.state not in ("creating", "open", "sealed"):
        raise ValueError(f"there is no state {root.state!r}")
    if root.state != "sealed" and (root.fingerprint is not None or root.digests):
        raise ValueError(f"its state is {root.state!r}, and yet it has the fingerprint of a sealed store")
    if root.state == "sealed" and len(root.digests) != len(columns(root.spec)):
        raise ValueError(f"{len(columns(root.spec))} digests belong there, it has {len(root.digests)}")
    for site in root.spec.sites:
        codecs.resolve_codec(site.codec)
    return root


def write_root(objects: Objects, root: Root) -> None:
    """Put the root attributes: one atomic put, which makes a store open or sealed."""
    metadata = {"zarr_format": 3, "node_type": "group", "attributes": {"actcache": root.attributes()}}
    data = json.dumps(metadata, indent=2).encode()
    if len(data) > _MOST_ROOT_BYTES // 4:  # long lists of exponents, a line each
        data = json.dumps(metadata, separators=(",", ":")).encode()
    if len(data) > _MOST_ROOT_BYTES:
        raise ConfigError(
            f"what {objects} holds takes {len(data):,} bytes to describe, at most {_MOST_ROOT_BYTES:,} are possible; "
            "spread the sites over several stores"
        )
    objects.commit([("zarr.json", data)])
