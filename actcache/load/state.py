"""Where a loader is, as a small JSON-able dict.

In: a dict that somebody wants to load. Out: a place and settings, or a `StateError` that says what is wrong with it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from actcache.errors import StateError
from actcache.files import shown
from actcache.load.arguments import MOST_LANES
from actcache.spec import digest_of

STATE_VERSION = 2
_MOST_NAMES = 500
"""Characters of site names that a state keeps; longer lists become a digest."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Which batch is next. Batches of all ranks are counted together."""

    first_epoch: int = 0
    """The first of the epochs that are being delivered."""
    epoch: int = 0
    """The epoch of the next batch."""
    batch: int = 0
    """Batches of that epoch that have been delivered."""


_MOST = (1 << 63) - 1
_LIMITS = {
    "settings": {"lanes": (1, MOST_LANES), "chunks_per_window": (1, _MOST)},
    "state": {"world_size": (1, _MOST), **{field.name: (0, _MOST) for field in fields(Place)}},
}
"""Limits of the numbers in a state that are not compared with the loader's own."""
_FIELDS = {"version", "fingerprint", "settings", *_LIMITS["state"]}


def parse_state(state: Any, fingerprint: str | None, path: str) -> dict[str, Any]:
    """A state of this store, brought to the current version.

    Raises:
        StateError: its version is unknown, it belongs to another store, or it is not a state.
    """
    if not isinstance(state, Mapping):
        raise _invalid(f"it is {shown(state)}")
    version = state.get("version")
    if type(version) is not int or version not in (1, STATE_VERSION):
        raise StateError(f"a loader state of version {shown(version)}; this actcache knows 1 and {STATE_VERSION}")
    unknown = sorted(map(str, state.keys() - _FIELDS))
    if unknown:
        raise _invalid(f"it has a field {shown(unknown[0])}, which none has")
    if not isinstance(state.get("settings"), Mapping):
        raise _invalid(f"its settings is {shown(state.get('settings'))}")
    settings = dict(state["settings"])
    if version == 1:  # had one lane
        settings["lanes"] = 1
    sites = settings.get("sites")
    if isinstance(sites, list) and all(isinstance(site, str) for site in sites):
        settings["sites"] = sites_in_state(sites)
    for part, values in (("settings", settings), ("state", state)):
        for name, (least, most) in _LIMITS[part].items():
            if type(values.get(name)) is not int or not least <= values[name] <= most:
                raise _invalid(f"its {name} is {shown(values.get(name))}, where {least} to {most} is possible")
    if state.get("fingerprint") != fingerprint:
        raise StateError(
            f"the loader state belongs to another store (fingerprint {_plain(state.get('fingerprint'))}), "
            f"{path} has {fingerprint}; open the store it was saved with"
        )
    found = {**state, "settings": settings}
    if version == 1:  # counted each rank's own batches
        found["batch"] = state["batch"] * state["world_size"]
    return found


def parse_place(state: Mapping[str, Any], n_batches: int) -> Place:
    """The place in a parsed state, for a loader of the same settings with `n_batches` batches an epoch.

    Raises:
        StateError: the place is impossible.
    """
    place, epochs = Place(**{field.name: state[field.name] for field in fields(Place)}), state["settings"]["epochs"]
    last = None if epochs is None else place.first_epoch + epochs
    if place.epoch < place.first_epoch or (last is not None and place.epoch > last):
        limit = "on" if last is None else f"to {last}"
        raise _invalid(f"its epoch is {place.epoch}, where {place.first_epoch} {limit} is possible")
    most = 0 if place.epoch == last else n_batches
    if place.batch > most:
        raise _invalid(f"its batch is {place.batch}, where 0 to {most} is possible in epoch {place.epoch}")
    if state["world_size"] > n_batches:
        raise _invalid(f"its world_size is {state['world_size']}, where 1 to {n_batches} is possible")
    return place


def _invalid(why: str) -> StateError:
    return StateError(f"this is no state of a loader: {why}; load one that state_dict() returned")


def _plain(value: Any) -> str:
    return value[:100] if isinstance(value, str) else shown(value)


def sites_in_state(sites: Sequence[str]) -> list[str] | str:
    """Site names as a state keeps them: the names, or their number and digest if that would be long."""
    if sum(map(len, sites)) <= _MOST_NAMES:
        return list(sites)
    return f"{len(sites)} sites, sha256 {digest_of(list(sites))[:32]}"


def check_settings(theirs: Mapping[str, Any], mine: Mapping[str, Any]) -> None:
    """Raise `StateError` with the differences, unless both settings are the same."""
    if differ(mine.get("rows"), theirs.get("rows")):
        raise StateError(
            f"the loader state was saved with {_rows_of(theirs)}, this loader has {_rows_of(mine)}; "
            "give the rows= that it was saved with"
        )
    differences = [
        f"{k}: saved {shown(theirs.get(k))}, now {shown(mine.get(k))}"
        + (" (one of them has no such setting)" if mine.get(k) is None and theirs.get(k) is None else "")
        for k in sorted({*mine, *theirs}, key=str)
        if differ(mine.get(k), theirs.get(k)) or (k in theirs) != (k in mine)
    ]
    if differences:
        raise StateError("the loader state was saved with other settings: " + "; ".join(differences))


def differ(one: Any, other: Any) -> bool:
    """Whether two values differ in value or in type: 20 is not 20.0, and 1 is not True."""
    return type(one) is not type(other) or bool(one != other)


def _rows_of(settings: Mapping[str, Any]) -> str:
    """The selection of rows in a state's settings, in words."""
    return f"a choice of rows (digest {_plain(settings['rows'])})" if settings.get("rows") else "all rows"


_DIGESTS, _DIGEST_CHARACTERS = ("fingerprint", "rows"), 16
"""Fields whose value is a digest, and how much of it packed states keep: 64 bits, enough to tell stores apart."""


def pack_states(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The states of several loaders as one dict, with equal values kept once and digests shortened."""
    flat = [{**state, **state["settings"]} for state in states]
    each = {name: [state.get(name) for state in flat] for name in sorted(set().union(*flat) - {"settings"})}
    for name in each.keys() & _DIGESTS:
        each[name] = [value and value[:_DIGEST_CHARACTERS] for value in each[name]]
    same = {name: values[0] for name, values in each.items() if values.count(values[0]) == len(values)}
    return {"all": same, "each": {name: values for name, values in each.items() if name not in same}}


def unpack_states(state: Any, mine: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The states that `pack_states` packed, for loaders whose own states are `mine`: these complete the digests.

    Raises:
        ValueError: `state` is not packed states; the message says why.
    """
    same, each = (state.get(part) if isinstance(state, Mapping) else None for part in ("all", "each"))
    if not isinstance(same, Mapping) or not isinstance(each, Mapping) or len(state) != 2 or same.keys() & each.keys():
        raise ValueError(f"its loaders are {shown(state)}")
    for name, values in each.items():
        if not isinstance(values, list) or len(values) != len(mine):
            raise ValueError(f"its {name} is {shown(values)}, where a list of {len(mine)} is possible")
    found = []
    for number, own in enumerate(mine):
        flat = {**same, **{name: values[number] for name, values in each.items()}}
        for name, value in {**own, **own["settings"]}.items():
            if name in _DIGESTS and flat.get(name) == value[:_DIGEST_CHARACTERS]:
                flat[name] = value
        of_loader = {name: flat.pop(name) for name in own.keys() & flat.keys()}
        settings = {name: value for name, value in flat.items() if value is not None or name in own["settings"]}
        found.append({**of_loader, "settings": settings})
    return found


State = Mapping[str, Any]


def how_far(state: State) -> tuple[int, ...]:
    """The part of a loader's state that grows with every batch."""
    return (state["step"],) if "step" in state else (state["epoch"], state["batch"])
