"""Our store as the model and the data set of sparsify's `Trainer`, which runs unchanged, without a language model.

In: a store, and which site is the output (and the input) of which module. Out: a model whose modules return what the
store holds, and the data set that belongs to it. An item of the data set has as many rows as a sequence has in the
store; its `input_ids` are the token ids of those rows, so `exclude_tokens` means what it always does.

Items have only rows that the store has: no positions left out by `skip_first`, no padding, no masked ones. They are cut
from the stream of rows, so if sequences have gaps, an item need not begin with a sequence. sparsify drops the
information which row was in which sequence before it computes anything, so no result depends on that.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from actcache.errors import ConfigError, StateError, StoreIncompleteError
from actcache.spec import check_positive

if TYPE_CHECKING:
    from actcache.store import Store

Order = Literal["stored", "reading"]
"""`stored`: as the rows lie in the store, shuffled within each shard. `reading`: sequence after sequence."""
HookPoints = Mapping[str, str | tuple[str, str]]
"""By module name, as in `TrainConfig.hookpoints`: the site of its output, or the sites of its input and output."""

_KEPT_SHARDS = 2
"""Shards that are kept decoded: a batch may begin in one and end in the next."""
_REMEMBERED_ITEMS = 1 << 16


def replay(
    store: Store,
    hookpoints: HookPoints | Sequence[str],
    *,
    order: Order = "stored",
    rows_per_item: int | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> tuple[ReplayModel, ReplayDataset]:
    """The model and the data set for sparsify's `Trainer(config, dataset, model)`.

    `TrainConfig.hookpoints` names the given ones to train on; `loss_fn` must be "fvu", since there are no logits.
    `batch_size` counts items. In memory are two decoded shards of the sites, and a batch.

    Args:
        store: a sealed store.
        hookpoints: the site, or (input, output) sites, for each module name; or a list of sites, which serve as names.
            A transcoder needs both sites, of the same width.
        order: of the rows; `stored` mixes the sequences of a shard, `reading` is what a live model would give.
        rows_per_item: rows of an item; by default those of a sequence. Rows at the end that do not fill an item are
            left out.
        device: of the activations.
        dtype: of the activations; sparsify's coders are float32, with autocast on CUDA.

    Raises:
        SiteError: the store has no such site. StoreIncompleteError: it is not sealed. ConfigError: the sites of a
        transcoder differ in width, or an item is larger than the store.
    """
    sites = {name: _pair(store, name, at) for name, at in _by_name(hookpoints).items()}
    n_rows = store.spec.rows_per_sequence if rows_per_item is None else rows_per_item
    dataset = ReplayDataset(_Rows(store, order), n_rows)
    return ReplayModel(dataset, sites, torch.device(device), dtype), dataset


class ReplayDataset:
    """Items `{"input_ids": (L,)}`; the model expects to be called with the items that were handed out last."""

    def __init__(self, rows: _Rows, rows_per_item: int, items: range | None = None) -> None:
        check_positive("replay", rows_per_item=rows_per_item)
        self.rows, self.rows_per_item = rows, rows_per_item
        n_items = int(rows.ends[-1]) // rows_per_item
        if n_items == 0:
            raise ConfigError(
                f"an item of {rows_per_item:,} rows is more than {rows.store.path} has: {int(rows.ends[-1]):,}"
            )
        self.items = range(n_items) if items is None else items
        self.handed_out: deque[int] = deque(maxlen=_REMEMBERED_ITEMS)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        item = self.items[number]
        self.handed_out.append(item)
        return {"input_ids": torch.from_numpy(self.tokens(item))}

    def __reduce__(self) -> NoReturn:
        # In a worker process it would hand out items without the model's knowledge.
        raise ConfigError("a replay data set and its model belong to one process; use num_workers=0")

    def select(self, items: range) -> ReplayDataset:
        """The items with these numbers, for the same model: what `Trainer` resumes with."""
        return self._part(self.items[items.start : items.stop : items.step])

    def shard(self, num_shards: int, shard_id: int) -> ReplayDataset:
        """One of several nearly equal stretches, for a process of several."""
        cuts = [len(self.items) * number // num_shards for number in range(num_shards + 1)]
        return self._part(self.items[cuts[shard_id] : cuts[shard_id + 1]])

    def tokens(self, item: int) -> NDArray[np.int64]:
        """`(L,)` token ids of an item's rows."""
        parts = self.rows.parts(self._span(item))
        return np.concatenate([self.rows.tokens(shard)[part] for shard, part in parts])

    def activations(self, site: str, items: Sequence[int]) -> torch.Tensor:
        """`(B, L, D)` activations of the rows of some items, in the dtype of the store."""
        parts = [
            self.rows.activations(site, shard)[part]
            for item in items
            for shard, part in self.rows.parts(self._span(item))
        ]
        return torch.cat(parts).view(len(items), self.rows_per_item, -1)

    def _span(self, item: int) -> range:
        return range(item * self.rows_per_item, (item + 1) * self.rows_per_item)

    def _part(self, items: range) -> ReplayDataset:
        part = ReplayDataset(self.rows, self.rows_per_item, items)
        part.handed_out = self.handed_out
        return part


class ReplayModel(nn.Module):
    """A model without weights: called with the `input_ids` of items, it calls its modules, which read the store."""

    def __init__(
        self,
        dataset: ReplayDataset,
        sites: Mapping[str, tuple[str | None, str]],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.dataset, self.device, self.dtype = dataset, device, dtype
        self.base_model = _Modules({name: _Point(name, *at) for name, at in sites.items()})
        self.dummy_inputs: dict[str, Any] = {}

    @property
    def config(self) -> NoReturn:
        """Always an error: sparsify asks for it to guess hookpoints if none are named."""
        raise ConfigError(f"name what to train on: TrainConfig(hookpoints={list(self.base_model.points)})")

    def forward(self, input_ids: torch.Tensor | None = None, **more: Any) -> Any:
        """Call every module once, in the order of the hookpoints; without `input_ids`, with one row of zeros.

        Raises:
            StateError: these are not the items that the data set handed out last. ConfigError: the loss needs logits.
        """
        if more:
            _no_logits()
        items = [] if input_ids is None else self._handed_out(input_ids)
        for point in self.base_model.points.values():
            point.replayed = self._values(point.output, items)
            point(_MissingInput(point.name) if point.input is None else self._values(point.input, items))
            point.replayed = None
        return _Missing()

    def _values(self, site: str, items: list[int]) -> torch.Tensor:
        """`(B, L, D)` activations of items; `(1, 1, D)` zeros without items."""
        if not items:
            width = self.dataset.rows.store.spec.site(site).width
            return torch.zeros(1, 1, width, dtype=self.dtype, device=self.device)
        return self.dataset.activations(site, items).to(device=self.device, dtype=self.dtype)

    def _handed_out(self, input_ids: torch.Tensor) -> list[int]:
        """The items with these tokens, which must be the last ones that the data set handed out."""
        handed_out = self.dataset.handed_out
        items = list(handed_out)[-len(input_ids) :]
        handed_out.clear()
        if len(items) == len(input_ids):
            expected = torch.from_numpy(np.stack([self.dataset.tokens(item) for item in items]))
            if torch.equal(expected, input_ids.cpu()):
                return items
        raise StateError(
            "the replay model was called with other tokens than its data set handed out just before; give Trainer both "
            "as replay() returned them, with nothing between them (no worker processes, no shuffling)"
        )


class _Rows:
    """The rows of a store in one of two orders; shards are decoded as a whole, and the last ones are kept."""

    def __init__(self, store: Store, order: Order) -> None:
        if not store.sealed:
            raise StoreIncompleteError(
                f"{store.path} has {len(store.committed)} of {store.spec.n_shards} shards; "
                "finish 'actcache extract' first"
            )
        if order not in ("stored", "reading"):
            raise ConfigError(f'replay: order must be "stored" or "reading", got {order!r}')
        self.store, self.order = store, order
        self.ends = np.cumsum(store.shard_n_rows)
        keep = lru_cache(_KEPT_SHARDS)
        self._table = keep(self._read_table)
        self._read = {site: keep(partial(self._read_activations, site)) for site in store.sites}

    def parts(self, span: range) -> Iterator[tuple[int, slice]]:
        """Where a stretch of the rows is: shards, and slices of their rows."""
        first, last = np.searchsorted(self.ends, (span.start, span.stop - 1), side="right").tolist()
        for shard in range(first, last + 1):
            begin = int(self.ends[shard] - self.store.shard_n_rows[shard])
            part = slice(max(span.start - begin, 0), min(span.stop, int(self.ends[shard])) - begin)
            if part.start < part.stop:
                yield shard, part

    def tokens(self, shard: int) -> NDArray[np.int64]:
        """Token ids of a shard's rows, in order."""
        return self._table(shard)[1]

    def activations(self, site: str, shard: int) -> torch.Tensor:
        """`(n, D)` activations of a shard's rows, in order."""
        return self._read[site](shard)

    def _read_activations(self, site: str, shard: int) -> torch.Tensor:
        return self.store.read(site, self._table(shard)[0])

    def _read_table(self, shard: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Row ids and token ids of a shard, in order."""
        table = self.store.shard_row_table(shard)
        order = np.arange(len(table["token"]))
        if self.order == "reading":
            order = np.lexsort((table["position"], table["sequence"]))
        return order + shard * self.store.spec.rows_per_shard, table["token"][order].astype(np.int64)


class _Modules:
    """The part of a module tree that sparsify looks at: flat, with the hookpoints and nothing else."""

    def __init__(self, points: Mapping[str, _Point]) -> None:
        self.points = dict(points)

    def named_modules(self) -> Iterator[tuple[str, nn.Module]]:
        yield from self.points.items()

    def get_submodule(self, name: str) -> nn.Module:
        return self.points[name]


class _Point(nn.Module):
    """A hookpoint: returns what was put there, so that hooks on it see the input and output of the real module."""

    def __init__(self, name: str, input_site: str | None, output_site: str) -> None:
        super().__init__()
        self.name, self.input, self.output = name, input_site, output_site
        self.replayed: torch.Tensor | None = None

    def forward(self, _: Any) -> torch.Tensor | None:
        return self.replayed


class _Missing:
    """What the model returns: asking it for logits or a loss raises an error that says why it has neither."""

    def __getattr__(self, name: str) -> NoReturn:
        _no_logits()


class _MissingInput:
    """The input of a module whose output alone is in the store; an autoencoder does not ask for it."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, _: str) -> NoReturn:
        raise ConfigError(
            f"a transcoder of {self._name} also needs the input of the module: replay(store, "
            f'{{"{self._name}": (input_site, output_site)}})'
        )


def _no_logits() -> NoReturn:
    raise ConfigError('a replay of activations has no logits; train with loss_fn="fvu"')


def _by_name(hookpoints: HookPoints | Sequence[str]) -> HookPoints:
    if isinstance(hookpoints, str):
        hookpoints = [hookpoints]
    named = hookpoints if isinstance(hookpoints, Mapping) else {site: site for site in hookpoints}
    if not named:
        raise ConfigError("replay: no hookpoint was given; name one or more sites of the store")
    return named


def _pair(store: Store, name: str, at: str | tuple[str, str]) -> tuple[str | None, str]:
    source, target = (None, at) if isinstance(at, str) else at
    for site in (target, source):
        if site is not None:
            store.check_site(site)
    if source is not None:
        widths = [store.spec.site(site).width for site in (source, target)]
        if widths[0] != widths[1]:
            raise ConfigError(
                f"hookpoint {name}: {source} is {widths[0]} wide and {target} {widths[1]}; sparsify's coders have one "
                "width for both"
            )
    return source, target
