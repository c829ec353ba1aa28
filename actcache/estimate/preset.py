"""Bytes, time and money with one preset, and when a store pays. Arithmetic; each formula is where it is computed.

In: amounts, the measured costs, prices. Out: a `PresetPlan`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from actcache.errors import ConfigError
from actcache.estimate.amounts import Amounts, Asked
from actcache.estimate.measure import Measured, PresetCosts, SiteCosts
from actcache.spec import check_positive
from actcache.store.codecs.crc import CRC_BYTES
from actcache.store.format.keys import ROW_ARRAYS, TOKEN_ARRAYS
from actcache.store.format.records import HEAD_BYTES

_TERABYTE = 1e12
_SECONDS_PER_HOUR = 3600.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Terms:
    """Prices, and how the store is going to be used."""

    price_per_tb_month: float = 20.0
    """US dollars for a terabyte (10^12 bytes) and month of storage."""
    compute_price_per_hour: float | None = None
    """US dollars for an hour of one worker; None: only storage is counted in money."""
    epochs: int = 10
    """How often all activations are going to be used."""
    months: float = 1.0
    """How long the store is kept."""
    read_bytes_per_s: float | None = None
    """Speed of the disk or the network for each worker; None if it is not the limit."""

    def __post_init__(self) -> None:
        check_positive("plan", epochs=self.epochs)
        for name in ("price_per_tb_month", "compute_price_per_hour", "months"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise ConfigError(f"plan: {name} must be a number from 0 up, got {value!r}")
        rate = self.read_bytes_per_s
        if rate is not None and not (math.isfinite(rate) and rate > 0):
            raise ConfigError(f"plan: read_bytes_per_s must be a number above 0, got {rate!r}")


@dataclass(frozen=True, kw_only=True, slots=True)
class BreakEven:
    """Keeping activations, compared with computing them again in every epoch.

    With T seconds to extract, R to read the store once and F for the forward passes alone (worker-seconds, all of
    them), the store has cost `T + n R` after n epochs, and recomputing `n F`. In money, every hour costs the compute
    price, and the store also costs its price per month for as many months as it is kept.
    """

    epochs_in_time: int | None
    """The first number of epochs after which the store has taken less time; None: never, reading is no faster."""
    epochs_in_money: int | None
    """Likewise in money; None: never, or there is no compute price."""
    store_s: float
    """Worker-seconds with the store after `Terms.epochs`."""
    recompute_s: float
    """Worker-seconds of as many epochs of forward passes."""
    store_cost: float | None
    """Dollars, storage included; None without a compute price."""
    recompute_cost: float | None
    """Dollars; None without a compute price."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PresetPlan:
    """What a store takes with one preset."""

    sites: Mapping[str, int]
    """Bytes by site."""
    codecs: Mapping[str, str]
    """Preset by site; they differ with `auto` only."""
    bytes: int
    """Activations, statistics and the row table: what `info` is going to say."""
    bytes_range: tuple[int, int]
    """The same if all batches were like the smallest of the sample, and like the largest."""
    other_bytes: int
    """Further bytes: tokens, commit records, ledger, metadata."""
    bytes_per_activation: float
    """Bytes of the sites, divided by the number of values kept."""
    ratio: float
    """Bytes of the sites, relative to the values in the dtype of the store."""
    n_objects: int
    """Objects (files in a folder), all included."""
    fits: bool | None
    """Whether there is room for it; None if that is unknown."""
    seconds: float
    """Duration of the extraction with all workers side by side, without loading model and text."""
    seconds_range: tuple[float, float]
    """The same at the speed of the fastest batches and encoding, and of the slowest."""
    tokens_per_s: float
    """Speed of all workers together."""
    read_s: float
    """To read everything once, by one worker."""
    read_s_range: tuple[float, float]
    """The same at the speed of the fastest measurement, and of the slowest."""
    cost_per_month: float
    """Dollars for storage."""
    compute_cost: float | None
    """Dollars for the extraction; None without a compute price."""
    break_even: BreakEven


def preset_plan(
    costs: PresetCosts,
    measured: Measured,
    asked: Asked,
    amounts: Amounts,
    terms: Terms,
    *,
    workers: int,
    free_bytes: int | None,
) -> PresetPlan:
    """The plan of one preset with these costs, for these amounts."""
    sites = {name: _site_bytes(site, amounts, site.bytes_per_row) for name, site in costs.sites.items()}
    row_table = round(amounts.n_rows * measured.row_table_bytes_per_row)
    n_bytes = sum(sites.values()) + row_table
    fewest, most = (
        sum(_site_bytes(site, amounts, site.bytes_per_row_range[end]) for site in costs.sites.values()) + row_table
        for end in (0, 1)
    )
    other = _other_bytes(costs, measured, amounts)
    raw_bytes = amounts.n_rows * asked.row_bytes
    of_all = list(costs.sites.values())
    seconds, fast, slow = (
        extraction_seconds(forward_s, sum(encode_s), len(of_all), measured, asked, amounts, workers)
        for forward_s, encode_s in zip(
            (measured.forward_s_per_token, *measured.forward_s_range),
            _columns((site.encode_s_per_row, *site.encode_s_range) for site in of_all),
            strict=True,
        )
    )
    least_read_s = sum(sites.values()) / terms.read_bytes_per_s if terms.read_bytes_per_s else 0.0
    read_s, read_fast, read_slow = (
        max(least_read_s, amounts.n_rows * sum(per_row))
        for per_row in _columns((site.read_s_per_row, *site.read_s_range) for site in of_all)
    )
    price = terms.compute_price_per_hour
    cost_per_month = (n_bytes + other) / _TERABYTE * terms.price_per_tb_month
    return PresetPlan(
        sites=sites,
        codecs={name: site.codec for name, site in costs.sites.items()},
        bytes=n_bytes,
        bytes_range=(fewest, most),
        other_bytes=other,
        bytes_per_activation=sum(sites.values()) / (amounts.n_rows * sum(asked.sites.values())),
        ratio=sum(sites.values()) / raw_bytes,
        n_objects=_n_objects(costs, amounts),
        fits=None if free_bytes is None else n_bytes + other <= free_bytes,
        seconds=seconds,
        seconds_range=(fast, slow),
        tokens_per_s=amounts.n_tokens / seconds,
        read_s=read_s,
        read_s_range=(read_fast, read_slow),
        cost_per_month=cost_per_month,
        compute_cost=None if price is None else seconds * workers / _SECONDS_PER_HOUR * price,
        break_even=_break_even(
            terms,
            extract_s=seconds * workers,
            read_s=read_s,
            forward_s=amounts.n_tokens * measured.forward_s_per_token,
            storage_cost=cost_per_month * terms.months,
        ),
    )


def extraction_seconds(
    forward_s: float,
    encode_s_per_row: float,
    n_sites: int,
    measured: Measured,
    asked: Asked,
    amounts: Amounts,
    workers: int,
) -> float:
    """Seconds until the last worker is done, if each makes whole shards.

    A token takes the model F seconds (`forward_s`) and one encoding thread E (its rows at all sites). The first shard
    is computed while nothing is encoded, and the last is encoded while nothing is computed; between them a token takes
    `max(F + kappa E, E / p)`, where p threads encode at a time: as many as there are threads and cores. Within a shard
    a site is encoded by one thread.
    """
    encode_s = encode_s_per_row * measured.rows_per_sequence / measured.tokens_per_sequence
    parallel = min(asked.threads, os.cpu_count() or 1)
    shards = math.ceil(amounts.n_shards / workers)
    tokens = min(float(amounts.n_tokens), shards * amounts.tokens_per_shard)
    first = min(tokens, amounts.tokens_per_shard)
    last = tokens - (shards - 1) * first
    steady = max(forward_s + measured.contention * encode_s, encode_s / parallel)
    alone = encode_s / min(parallel, n_sites)
    return measured.setup_s + first * forward_s + (tokens - first) * steady + last * alone


def _columns(values: Iterable[tuple[float, ...]]) -> list[tuple[float, ...]]:
    """From one tuple for each site: all first values, all second values, ..."""
    return list(zip(*values, strict=True))


def _site_bytes(site: SiteCosts, amounts: Amounts, bytes_per_row: float) -> int:
    """Bytes of rows (of whole chunks, if partly filled ones are as large), and a little for each shard."""
    n_rows = amounts.n_chunks * amounts.rows_per_chunk if site.pads_chunks else amounts.n_rows
    return round(n_rows * bytes_per_row + amounts.n_shards * site.bytes_per_shard)


def _other_bytes(costs: PresetCosts, measured: Measured, amounts: Amounts) -> int:
    """Tokens, metadata, and for each shard and column a commit record, whose head stands in the ledger once more."""
    checksums = sum(2 + site.n_arrays * amounts.n_chunks / amounts.n_shards for site in costs.sites.values())
    per_shard = 2 * HEAD_BYTES * (len(costs.sites) + 1) + CRC_BYTES * (checksums + len(ROW_ARRAYS))
    fixed = costs.metadata_bytes * amounts.n_stores
    return round(amounts.n_tokens * measured.token_bytes + amounts.n_shards * per_shard + fixed)


def _n_objects(costs: PresetCosts, amounts: Amounts) -> int:
    """Metadata, tokens, ledger and totals once; for each shard the row table, and of each column data and record."""
    per_shard = len(ROW_ARRAYS) + 1 + sum(site.n_arrays + 2 for site in costs.sites.values())
    per_store = costs.n_metadata + 1 + len(costs.sites)
    tokens = len(TOKEN_ARRAYS) * amounts.token_chunks
    return per_store * amounts.n_stores + tokens + per_shard * amounts.n_shards


def _break_even(terms: Terms, *, extract_s: float, read_s: float, forward_s: float, storage_cost: float) -> BreakEven:
    """Compute a `BreakEven`; times are worker-seconds."""
    price = None if terms.compute_price_per_hour is None else terms.compute_price_per_hour / _SECONDS_PER_HOUR
    store_s, recompute_s = extract_s + terms.epochs * read_s, terms.epochs * forward_s
    return BreakEven(
        epochs_in_time=_first_above(extract_s, forward_s - read_s),
        epochs_in_money=None if not price else _first_above(extract_s + storage_cost / price, forward_s - read_s),
        store_s=store_s,
        recompute_s=recompute_s,
        store_cost=None if price is None else store_s * price + storage_cost,
        recompute_cost=None if price is None else recompute_s * price,
    )


def _first_above(outlay: float, saved_each: float) -> int | None:
    """The first number of epochs whose savings are more than the outlay."""
    return math.floor(outlay / saved_each) + 1 if saved_each > 0 else None
