"""Where a loader is: a small JSON-able dict, and what is refused when one is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from actcache.errors import StateError
from actcache.spec import digest_of

STATE_VERSION = 2
_MOST_NAMES = 500
"""Characters of site names that a state has room for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """After which batch: of the batches that all processes have had together."""

    first_epoch: int = 0
    """Where the epochs that are being delivered began."""
    epoch: int = 0
    """The epoch of the next batch."""
    batch: int = 0
    """Batches of that epoch that were delivered."""


_COUNTS = {"lanes": 1, "chunks_per_window": 1, "world_size": 1, **{field.name: 0 for field in fields(Place)}}
"""The numbers of a state, and the least that each can be."""


def checked_state(state: Mapping[str, Any], fingerprint: str | None, path: str) -> dict[str, Any]:
    """A state of this version, from one of this or the one before, that belongs to this store.

    Raises:
        StateError: it is of an unknown version, of another store, or no state.
    """
    version = state.get("version")
    if version not in (1, STATE_VERSION):
        raise StateError(f"a loader state of version {version!r}; this actcache knows 1 and {STATE_VERSION}")
    settings = dict(state.get("settings") or {})
    if version == 1:  # knew one lane
        settings["lanes"] = 1
    if isinstance(settings.get("sites"), list):
        settings["sites"] = named(settings["sites"])
    for name, least in _COUNTS.items():
        count = {**settings, **state}.get(name)
        if type(count) is not int or count < least:
            raise StateError(f"this is no state of a loader: its {name} is {count!r}; load one that state_dict() gave")
    if state.get("fingerprint") != fingerprint:
        raise StateError(
            f"the loader state belongs to another store (fingerprint {state.get('fingerprint')}), "
            f"{path} has {fingerprint}; open the store it was saved with"
        )
    found = {**state, "settings": settings}
    if version == 1:  # counted each rank's own batches
        found["batch"] = state["batch"] * state["world_size"]
    return found


def named(sites: Sequence[str]) -> list[str] | str:
    """Site names as a state has them: as they are, or where that would be long their number and digest."""
    if sum(map(len, sites)) <= _MOST_NAMES:
        return list(sites)
    return f"{len(sites)} sites, sha256 {digest_of(list(sites))[:32]}"


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
    return f"a choice of rows (digest {settings['rows']})" if settings.get("rows") else "all rows"


_DIGESTS, _DIGEST_CHARACTERS = ("fingerprint", "rows"), 16
"""What has a digest for a value, and how much of it `packed` states have: 64 bits, which no two are going to share."""


def packed(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The states of several loaders as one: what is the same in all is said once, and of digests only the beginning."""
    flat = [{**state, **state["settings"]} for state in states]
    each = {name: [state.get(name) for state in flat] for name in sorted(set().union(*flat) - {"settings"})}
    for name in each.keys() & _DIGESTS:
        each[name] = [value and value[:_DIGEST_CHARACTERS] for value in each[name]]
    same = {name: values[0] for name, values in each.items() if values.count(values[0]) == len(values)}
    return {"all": same, "each": {name: values for name, values in each.items() if name not in same}}


def unpacked(state: Mapping[str, Any], mine: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The states that were `packed`, for loaders whose own states are `mine`: from those come the rests of digests."""
    found = []
    for number, own in enumerate(mine):
        flat = {**state["all"], **{name: values[number] for name, values in state["each"].items()}}
        for name, value in {**own, **own["settings"]}.items():
            if name in _DIGESTS and flat.get(name) == value[:_DIGEST_CHARACTERS]:
                flat[name] = value
        of_loader = {name: flat.pop(name) for name in own.keys() & flat.keys()}
        settings = {name: value for name, value in flat.items() if value is not None or name in own["settings"]}
        found.append({**of_loader, "settings": settings})
    return found
