"""Where a loader is: a small JSON-able dict, and what is refused when one is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from actcache.errors import StateError

STATE_VERSION = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """After which batch: of the batches that all processes have had together."""

    first_epoch: int = 0
    """Where the epochs that are being delivered began."""
    epoch: int = 0
    """The epoch of the next batch."""
    batch: int = 0
    """Batches of that epoch that were delivered."""


def checked_state(state: Mapping[str, Any], fingerprint: str | None, path: str) -> dict[str, Any]:
    """A state of this version, from one of this or the one before, that belongs to this store.

    Raises:
        StateError: it is of an unknown version, of another store, or no state.
    """
    version = state.get("version")
    if version not in (1, STATE_VERSION):
        raise StateError(f"a loader state of version {version!r}; this actcache knows 1 and {STATE_VERSION}")
    if state["fingerprint"] != fingerprint:
        raise StateError(
            f"the loader state belongs to another store (fingerprint {state['fingerprint']}), "
            f"{path} has {fingerprint}; open the store it was saved with"
        )
    found = dict(state)
    if version == 1:  # counted each rank's own batches, and knew one lane
        found["batch"] = state["batch"] * state["world_size"]
        found["settings"] = {**state["settings"], "lanes": 1}
    return found


def check_settings(theirs: Mapping[str, Any], mine: Mapping[str, Any]) -> None:
    """Raise StateError, with what differs, unless both settings are the same."""
    if mine.get("rows") != theirs.get("rows"):
        raise StateError(
            f"the loader state was saved with {_choice(theirs)}, this loader has {_choice(mine)}; "
            "give the rows= that it was saved with"
        )
    differences = [
        f"{k}: saved {theirs.get(k)!r}, now {mine.get(k)!r}"
        for k in sorted({*mine, *theirs})
        if mine.get(k) != theirs.get(k)
    ]
    if differences:
        raise StateError("the loader state was saved with other settings: " + "; ".join(differences))


def _choice(settings: Mapping[str, Any]) -> str:
    """Which rows a state's settings are for, in words."""
    return f"a choice of rows (digest {settings['rows']})" if "rows" in settings else "all rows"
