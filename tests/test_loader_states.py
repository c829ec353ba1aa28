"""Whatever a state says is either where a loader goes to, exactly, or a StateError: never another place."""

from __future__ import annotations

import json
import pickle
from contextlib import closing
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actcache.errors import StateError
from actcache.load import Loader, MixedLoader
from actcache.share import share_batches
from actcache.store import Store

pytestmark = pytest.mark.filterwarnings("ignore:batches of .* rows are going to have")
PLACE = ("first_epoch", "epoch", "batch")
DEEP: Any = []
for _ in range(5000):
    DEEP = [DEEP]


def loader_of(store: Store, **changes: Any) -> Loader:
    settings = {"batch_rows": 20, "memory": 4000, "epochs": 2, "seed": 1, "threads": 1, "read_ahead": 0}
    return Loader(store, ["*"], **{**settings, **changes})


NUMBERS = st.one_of(
    st.integers(-3, 40), st.sampled_from([-(10**5000), 2**31, 2**63 - 1, 2**63, 2**64, 10**30, 10**5000])
)
VALUES = st.one_of(
    NUMBERS,
    st.floats(),
    st.integers(0, 9).map(float),
    st.booleans(),
    st.none(),
    st.text(max_size=5),
    st.sampled_from([[], {}, [1], ["a"], {"a": 1}, b"1", DEEP, {1: 2}, object()]),
)


def changed(state: dict[str, Any], path: list[str], value: Any, missing: bool) -> dict[str, Any]:
    """A copy of a state with another value in a place, or without one."""
    name, *inside = path
    if inside:
        return {**state, name: changed(state.get(name, {}), inside, value, missing)}
    return {key: old for key, old in state.items() if key != name} | ({} if missing else {name: value})


@pytest.mark.parametrize("epochs", [2, None])
@settings(max_examples=250, deadline=None)
@given(data=st.data())
def test_every_change_of_a_state_is_an_exact_place_or_an_error(small_store, epochs, data):
    loader = loader_of(small_store, epochs=epochs)
    sound = {**loader.state_dict(), "first_epoch": 1, "epoch": 2, "batch": 3}
    names = [
        *([name] for name in [*sound, "more"]),
        *(["settings", name] for name in [*sound["settings"], "rows", "x"]),
    ]
    state = sound
    for _ in range(data.draw(st.integers(1, 2))):
        path, value = data.draw(st.sampled_from(names)), data.draw(VALUES)
        if len(path) == 1 or isinstance(state.get("settings"), dict):
            state = changed(state, path, value, data.draw(st.integers(0, 5)) == 0)
    before, n_batches = loader.state_dict(), loader.plan.n_batches
    try:
        loader.load_state_dict(state)
    except StateError:
        assert loader.state_dict() == before
        return
    assert all(type(state[name]) is int for name in PLACE)
    found = loader.state_dict()
    assert place_of(found) == place_of(state, n_batches)
    # What of the settings may be another one is then the loader's: the order is the one that the state was saved in.
    assert found["settings"] == state["settings"] or state["version"] == 1
    if epochs is not None and found["epoch"] == found["first_epoch"] + epochs:
        assert list(loader) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch": 18}, "its batch is 18, where 0 to 17 is possible in epoch 0"),
        ({"batch": 2.0}, r"its batch is 2\.0"),
        ({"batch": True}, "its batch is True"),
        ({"epoch": 3}, "its epoch is 3, where 0 to 2 is possible"),
        ({"epoch": 2, "batch": 1}, "its batch is 1, where 0 to 0 is possible in epoch 2"),
        ({"first_epoch": 4}, "its epoch is 0, where 4 to 6 is possible"),
        ({"world_size": 100}, "its world_size is 100, where 1 to 17 is possible"),
        ({"version": True}, "version True"),
        ({"settings": []}, r"its settings is \[\]"),
        ({"place": 3}, "a field 'place', which none has"),
        ({"batch": 10**5000}, "its batch is a int"),
        ({"settings": {"lanes": 10**9}}, "its lanes is 1000000000, where 1 to 65536 is possible"),
        ({"settings": {"batch_rows": 20.0}}, r"batch_rows: saved 20\.0, now 20"),
        ({"settings": {"seed": True}}, "seed: saved True, now 1"),
        ({"settings": {"sites": 3}}, "sites: saved 3"),
        ({"settings": {"shuffle": None}}, "shuffle: saved None, now None"),
    ],
)
def test_a_state_out_of_its_limits_is_refused_with_field_found_and_allowed(small_store, change, message):
    loader = loader_of(small_store)
    state = loader.state_dict()
    if isinstance(change.get("settings"), dict):
        change = {"settings": {**state["settings"], **change["settings"]}}
    with pytest.raises(StateError, match=message):
        loader.load_state_dict({**state, **change})
    for nothing in (None, [], "state", 3):
        with pytest.raises(StateError, match="this is no state of a loader"):
            loader.load_state_dict(nothing)


def mixture_of(store: Store) -> MixedLoader:
    parts = [(loader_of(store, epochs=None), 0.7), (loader_of(store, epochs=None, lanes=2), 0.3)]
    return MixedLoader(parts, n_batches=40)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_every_change_of_a_mixtures_state_is_an_exact_place_or_an_error(small_store, data):
    mixture = mixture_of(small_store)
    with closing(mixture):
        for _ in zip(range(5), mixture, strict=False):
            pass
    sound = mixture.state_dict()
    names = [[name] for name in [*sound, "more"]]
    names += [["loaders", part] for part in ("all", "each", "more")]
    names += [["loaders", "all", name] for name in [*sound["loaders"]["all"], "rows", "more"]]
    names += [["loaders", "each", name] for name in [*sound["loaders"]["each"], "rows", "more"]]
    state = changed(sound, data.draw(st.sampled_from(names)), data.draw(VALUES), data.draw(st.booleans()))
    fresh = mixture_of(small_store)
    before = fresh.state_dict()
    try:
        fresh.load_state_dict(state)
    except StateError:
        assert fresh.state_dict() == before
        return
    assert fresh.state_dict()["step"] == state["step"]
    for number, loader in enumerate(fresh.loaders):
        each = {name: values[number] for name, values in state["loaders"]["each"].items()}
        assert place_of(loader.state_dict()) == place_of({**state["loaders"]["all"], **each}, loader.plan.n_batches)


def place_of(state: dict[str, Any], n_batches: int | None = None) -> tuple[int, ...]:
    """Where a state is; the end of an epoch is the beginning of the next one."""
    first, epoch, batch = (state[name] for name in PLACE)
    return (first, epoch + 1, 0) if batch == n_batches else (first, epoch, batch)


def test_states_keep_what_they_say_through_json_and_pickle(small_store):
    for make in (loader_of, mixture_of):
        with closing(make(small_store)) as loader:
            for _ in zip(range(6), loader, strict=False):
                pass
            state = loader.state_dict()
        for carried in (json.loads(json.dumps(state)), pickle.loads(pickle.dumps(state))):  # our own
            with closing(make(small_store)) as again:
                again.load_state_dict(carried)
                assert again.state_dict() == state


def test_shared_batches_stay_where_they_are_when_one_state_is_refused(small_store):
    loader = loader_of(small_store)
    state = loader.state_dict()
    with pytest.raises(StateError, match="its batch is -1"):
        share_batches(loader, 2, states=[{**state, "batch": 9}, {**state, "batch": -1}])
    assert loader.state_dict() == state
