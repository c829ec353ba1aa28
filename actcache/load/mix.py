"""Several loaders as one: batches of each in proportion to its weight, in an order that is a function of the step."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from actcache.errors import ConfigError, StateError
from actcache.files import shown
from actcache.load.batches.batch import Batch
from actcache.load.loader import Loader
from actcache.load.state import differ, pack_states, unpack_states
from actcache.spec import check_positive, integer

STATE_VERSION = 2
_STEP = 0x9E3779B97F4A7C15
"""2**64 over the golden ratio: any number of its multiples, modulo 2**64, are spread as evenly as possible."""


def turn(step: int, weights: Sequence[float], seed: int = 0) -> int:
    """The number of the loader that gives the batch of a step.

    Of any n steps, a loader with weight w (of a sum of 1) has w * n, give or take about log(n).
    """
    place = ((step + 1 + seed) * _STEP) % (1 << 64) / (1 << 64) * sum(weights)
    for number, weight in enumerate(weights[:-1]):
        place -= weight
        if place < 0:
            return number
    return len(weights) - 1


class MixedLoader:
    """Batches of several loaders, in proportion to their weights; `batch.source` is the number of the loader.

    Args:
        parts: pairs (loader, weight); weights are shares of the batches, of any sum. The loaders must have the same
            sites and batch_rows, and epochs=None, so that each continues with its next epoch.
        n_batches: how many batches to deliver; None for no end.
        seed: where in the order of turns to begin.

    Raises:
        ConfigError: there is no part, a weight is not positive, or the loaders do not match.

    Examples:
        >>> train, held_out = ac.split_sequences(store, validation=0.25)
        >>> parts = [
        ...     (ac.Loader(store, [site_out], batch_rows=64, rows=rows, epochs=None), weight)
        ...     for rows, weight in [(train, 3), (held_out, 1)]
        ... ]
        >>> with ac.MixedLoader(parts, n_batches=8) as mixture:
        ...     print(sorted(batch.source for batch in mixture))
        [0, 0, 0, 0, 0, 0, 1, 1]
    """

    def __init__(self, parts: Sequence[tuple[Loader, float]], *, n_batches: int | None = None, seed: int = 0) -> None:
        self.loaders, self.weights = _loaders_and_weights(parts)
        if n_batches is not None:
            check_positive("mixed loader", n_batches=n_batches)
        self.n_batches, self.seed = n_batches, integer("mixed loader", "seed", seed)
        first = self.loaders[0]
        self.sites, self.batch_rows = first.sites, first.batch_rows
        for loader in self.loaders:
            if loader.sites != self.sites or loader.batch_rows != self.batch_rows:
                raise ConfigError(
                    f"mixed loader: all need the same sites and batch_rows; {first.store.path} gives {self.batch_rows} "
                    f"rows of {', '.join(self.sites)}, {loader.store.path} gives {loader.batch_rows} rows of "
                    f"{', '.join(loader.sites)}"
                )
            if loader.epochs is not None:
                raise ConfigError(
                    f"mixed loader: the loader of {loader.store.path} ends after {loader.epochs} epochs; give each "
                    "epochs=None, and n_batches to the mixed one"
                )
        self._step = 0

    def __iter__(self) -> Iterator[Batch]:
        iterators: dict[int, Iterator[Batch]] = {}
        try:
            while self.n_batches is None or self._step < self.n_batches:
                number = turn(self._step, self.weights, self.seed)
                if number not in iterators:
                    iterators[number] = iter(self.loaders[number])
                batch = next(iterators[number])
                batch.source = number
                self._step += 1
                yield batch
        finally:
            self.close()

    def __enter__(self) -> MixedLoader:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop reading ahead; iterating again is allowed."""
        for loader in self.loaders:
            loader.close()

    def state_dict(self) -> dict[str, Any]:
        """Where the mixture is, after the batch delivered last: JSON-able, about 100 bytes for each loader."""
        return {
            "version": STATE_VERSION,
            "step": self._step,
            "weights": self.weights,
            "n_batches": self.n_batches,
            "seed": self.seed,
            "loaders": pack_states([loader.state_dict() for loader in self.loaders]),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue after the batch at which `state` was taken, bit for bit.

        Raises:
            StateError: the state is of another version or mixture, or one of the loaders refuses its part; the message
            says which and why. All loaders stay where they are.
        """
        mine = [loader.state_dict() for loader in self.loaders]
        theirs, step = self._parse(state, mine)
        for number, loader in enumerate(self.loaders):
            try:
                loader.load_state_dict(theirs[number])
            except StateError as error:
                for moved, before in zip(self.loaders[:number], mine, strict=False):
                    moved.load_state_dict(before)
                raise StateError(f"loader {number} of the mixture, of {loader.store.path}: {error}") from error
        self._step = step

    def _parse(self, state: Any, mine: Sequence[Mapping[str, Any]]) -> tuple[Sequence[Any], int]:
        """The states of the loaders and the step in a state of this mixture."""
        version = state.get("version") if isinstance(state, Mapping) else None
        if type(version) is not int or version not in (1, STATE_VERSION):
            raise StateError(
                f"a mixture's state of version {shown(version)}; this actcache knows 1 and {STATE_VERSION}"
            )
        for name in ("weights", "n_batches", "seed"):
            found, own = state.get(name), getattr(self, name)
            if differ(found, own):
                raise StateError(f"the mixture's state was saved with {name}={shown(found)}, this one has {shown(own)}")
        step, theirs = state.get("step"), state.get("loaders")
        try:
            if state.keys() != self.state_dict().keys():
                raise ValueError(f"its fields are {shown(sorted(map(str, state)))}")
            if type(step) is not int or not 0 <= step <= (self.n_batches or step):
                limit = "on" if self.n_batches is None else f"to {self.n_batches}"
                raise ValueError(f"its step is {shown(step)}, where 0 {limit} is possible")
            if version != 1:
                theirs = unpack_states(theirs, mine)
            if not isinstance(theirs, list) or len(theirs) != len(mine):
                raise ValueError(f"its loaders are {shown(theirs)}, where a list of {len(mine)} is possible")
        except ValueError as error:
            raise StateError(f"this is no state of a mixture: {error}; load one that state_dict() returned") from error
        return theirs, step


def _loaders_and_weights(parts: Any) -> tuple[list[Loader], list[float]]:
    """The loaders and the weights of a mixture."""
    try:
        pairs = [(loader, float(weight)) for loader, weight in parts]
    except (TypeError, ValueError):
        pairs = []
    if not pairs or not all(isinstance(loader, Loader) and 0 < weight < math.inf for loader, weight in pairs):
        raise ConfigError(
            f"mixed loader: parts must be at least one pair (loader, weight), with weights above 0; got {shown(parts)}"
        )
    return [loader for loader, _ in pairs], [weight for _, weight in pairs]
