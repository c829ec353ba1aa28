"""Run an audit: over a store that is there, or over what an extraction has just made, before it is sealed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from actcache.auditing.compare import (
    Difference,
    FloatRows,
    likely_reasons,
    relative_errors,
    rounds_coarsely,
    row_errors,
    say_lengths,
    tolerance_of,
)
from actcache.auditing.draw import Drawn, StoredSequence, draw_cheaply, draw_sequences, stored_sequences
from actcache.auditing.reference import Reference
from actcache.auditing.result import Audit, SiteAudit, describe_site
from actcache.errors import AuditError, ConfigError, SiteError, StoreIncompleteError, StoreMismatchError
from actcache.files import shown
from actcache.lm import LanguageModel
from actcache.spec import Meaning, Progress, Site, check_callable, check_positive, expand_names, integer
from actcache.status import ignore
from actcache.store import Store, open_store

_FEWEST, _MOST, _ONE_OF, _ONE_SHARD_OF = 4, 32, 300, 8
"""The audit that ends an extraction looks at one sequence of 300, in one shard of 8, and at some rows of the others. A
sequence alone takes about three times as long as in a batch, and reading a shard takes a thirtieth of making it:
together 1 or 2 % of the run, more of one that takes seconds."""
_COPIES = 4
"""Copies of a sequence in the batch that shows how coarsely the model rounds."""
_DECIDING = ("weights", "dtype", "autocast", "quantization")
"""Entries of a model's identity that decide values."""


def audit(
    store: Store | str | Path,
    lm: LanguageModel,
    n_sequences: int = 8,
    seed: int = 0,
    *,
    sites: Sequence[str] | str = "*",
    progress: Progress | None = None,
) -> Audit:
    """Compare rows of a store with what its model computes for their tokens.

    Sequences are drawn over all shards, each is run alone, at its own length, through the whole plain model, and every
    row that the store has of it is compared with what passes the module that the site's name stands for. A name that
    only the instrumented model of transformer-lens has is compared with that model, once its logits and block outputs
    have been seen to equal the plain model's for the same tokens.

    Args:
        store: a store or its path; of an unfinished one, the committed shards are audited.
        lm: the model that it was made from, opened in the same way (dtype, autocast).
        n_sequences: sequences to look at.
        seed: decides which; the same number and seed draw the same sequences.
        sites: names or patterns of the sites to look at.
        progress: called with (sequences done, sequences in all).

    Returns:
        One row a site: the largest error of a row relative to its norm, the tolerance (which follows from the dtypes
        and the codec), the worst row, and what the values were compared with. `audit.sound`: whether every site passed.

    Raises:
        StoreMismatchError: the store is of another model. SiteError: a pattern matches nothing. StoreIncompleteError:
        no shard is there yet. CorruptShardError: the store is damaged. ConfigError: `n_sequences` is not positive.

    Examples:
        >>> found = ac.audit(store, lm, n_sequences=4)
        >>> found.sound, len(found.sequences), found.sites[0].n_rows
        (True, 4, 252)
    """
    n_sequences, seed = integer("audit", "n_sequences", n_sequences), integer("audit", "seed", seed)
    check_positive("audit", n_sequences=n_sequences)
    check_callable("audit", progress=progress)
    if seed < 0:
        raise ConfigError(f"audit: seed must not be negative, got {seed}")
    if not isinstance(lm, LanguageModel):
        raise ConfigError(f"audit: lm must be a model that load_lm has opened, got {shown(lm)}")
    store = store if isinstance(store, Store) else open_store(store)
    names = expand_names(sites, store.sites)
    drawn = draw_sequences(store, min(n_sequences, store.spec.n_sequences), seed)
    found = _audit(store, lm, names, drawn, seed, progress or ignore)
    if not found.sequences:
        raise StoreIncompleteError(f"{store.path} has no rows yet that could be looked at; finish 'actcache extract'")
    return found


def small_audit_size(n_sequences: int) -> int:
    """Sequences that the audit at the end of an extraction of so many looks at."""
    return min(n_sequences, _MOST, max(_FEWEST, n_sequences // _ONE_OF))


def check_before_sealing(
    lm: LanguageModel, of: str, sites: Sequence[str] = (), sequences: range | None = None
) -> Callable[[Store], Mapping[str, Any]]:
    """A check for `StoreWriter.finish`: a small audit of what was made, whose result goes into the provenance.

    Args:
        lm: the model.
        of: what made it: `extract`, `extend`, `add_sites`.
        sites: which sites were made; empty for all.
        sequences: which sequences were made; by default all.
    """

    def check(store: Store) -> Mapping[str, Any]:
        n = len(sequences) if sequences is not None else store.spec.n_sequences
        size = small_audit_size(n)
        drawn = draw_cheaply(store, size, sequences, one_shard_of=_ONE_SHARD_OF, most_shards=_MOST)
        found = _audit(store, lm, list(sites) or store.sites, drawn, 0, ignore)
        entry = found.to_entry(of)
        if not found.sound:
            raise AuditError(_failure(found), entry)
        return entry

    return check


def _failure(found: Audit) -> str:
    lines = "\n  ".join(describe_site(site).removeprefix("FAIL ") for site in found.failed)
    return (
        f"{found.path} is not what {found.model} computes, as an audit of {len(found.sequences)} sequences shows:\n"
        f"  {lines}\n"
        "nothing was deleted, and the store was not sealed; if the difference is meant to be, the same command with "
        "--no-audit (audit=False) seals it"
    )


@dataclass(slots=True)
class _Line:
    """The result for a site so far."""

    site: Site
    tolerance: float = 0.0
    measured: float = 0.0
    """Largest error of a row of the model from one batch to another."""
    n_rows: int = 0
    error: float = 0.0
    worst: Mapping[str, int] | None = None
    reasons: list[str] = field(default_factory=list)
    sound_lengths: list[int] = field(default_factory=list)
    failed_lengths: list[int] = field(default_factory=list)

    def measure(self, rows: FloatRows, copy: FloatRows | str | None) -> None:
        """Record how much the model's own rows differ in another batch."""
        if isinstance(copy, np.ndarray) and copy.shape == rows.shape:
            finite = np.isfinite(rows).all(axis=1) & np.isfinite(copy).all(axis=1)
            self.measured = max(self.measured, float(relative_errors(rows[finite], copy[finite]).max(initial=0.0)))

    def take(self, errors: np.ndarray, sequence: StoredSequence) -> bool:
        """Add a sequence's rows; returns whether all of them are within the tolerance."""
        self.n_rows += len(errors)
        sound = bool((errors <= self.tolerance).all())
        (self.sound_lengths if sound else self.failed_lengths).append(len(sequence.ids))
        worst = int(errors.argmax())
        if self.worst is None or errors[worst] > self.error:
            self.error, position = float(errors[worst]), int(sequence.positions[worst])
            token = int(sequence.ids[position])
            self.worst = {"sequence": sequence.sequence, "position": position, "token": token}
        return sound


def _audit(
    store: Store,
    lm: LanguageModel,
    names: Sequence[str],
    drawn: Sequence[Drawn],
    seed: int,
    progress: Progress,
) -> Audit:
    _check_model(store, lm)
    reference = Reference(lm, _meanings(store, lm, names))
    n_drawn = sum(len(entry.sequences) for entry in drawn)
    lines = {name: _Line(store.spec.site(name)) for name in names}
    done: list[int] = []
    for entry in drawn:
        there = list(stored_sequences(store, entry))
        stored = {name: _read_rows(store, name, there) for name in names}
        for number, sequence in enumerate(there):
            _compare(store, reference, lines, sequence, {name: stored[name][number] for name in names})
            done.append(sequence.sequence)
            progress(len(done), n_drawn)
    for line in lines.values():
        line.reasons += say_lengths(line.failed_lengths, line.sound_lengths)
    return Audit(
        path=store.path,
        sites=tuple(_site_audit(name, line, reference) for name, line in lines.items()),
        sequences=tuple(done),
        seed=seed,
        model=lm.name,
        dtype=str(lm.autocast or lm.dtype).removeprefix("torch."),
        device=str(lm.device),
    )


def _compare(
    store: Store,
    reference: Reference,
    lines: Mapping[str, _Line],
    sequence: StoredSequence,
    stored: Mapping[str, FloatRows],
) -> None:
    found = reference.values(sequence.ids)
    copies = reference.values(sequence.ids, _COPIES) if rounds_coarsely(reference.lm) else {}
    model = {name: _as_wide(store, name, rows) for name, rows in found.items() if not isinstance(rows, str)}
    for name, line in lines.items():
        rows, problem = model.get(name), found[name]
        if rows is None or rows.shape[1] != line.site.width:
            shape = "" if rows is None else f"it has {rows.shape[1]} values a token, the site has {line.site.width}"
            line.take(np.full(len(sequence.rows), np.inf), sequence)
            line.reasons = line.reasons or [problem if isinstance(problem, str) else shape]
            continue
        line.measure(rows, copies.get(name))
        line.tolerance = tolerance_of(reference.lm, store.spec, line.site, line.measured)
        errors = row_errors(store.spec, line.site, rows[sequence.positions], stored[name])
        if not line.take(errors, sequence) and not line.reasons:
            same = {n: r for n, r in model.items() if r.shape == rows.shape}
            difference = Difference(
                spec=store.spec,
                site=line.site,
                tolerance=line.tolerance,
                stored=stored[name],
                positions=sequence.positions,
                model=same,
            )
            line.reasons = likely_reasons(difference)


def _as_wide(store: Store, name: str, rows: FloatRows) -> FloatRows:
    """A pattern's rows with as many keys as the store's: keys after the end of a sequence have no weight."""
    site, length = store.spec.site(name), store.spec.sequence_length
    n_heads, n_keys = site.shape[0], len(rows)
    is_pattern = site.shape[1:] == (length,) and rows.shape[1] == n_heads * n_keys
    if not is_pattern or n_keys == length:
        return rows
    fill = 0.0 if np.isfinite(rows).all() else -np.inf
    wide = np.full((len(rows), n_heads, length), fill)
    wide[:, :, :n_keys] = rows.reshape(len(rows), n_heads, n_keys)
    return wide.reshape(len(rows), -1)


def _read_rows(store: Store, name: str, sequences: Sequence[StoredSequence]) -> list[FloatRows]:
    """`(n, D)` of each of some sequences of one shard, whose chunks are read once."""
    values = store.read(name, np.concatenate([s.rows for s in sequences])).to(torch.float64).numpy()
    return np.split(values, np.cumsum([len(s.rows) for s in sequences])[:-1])


def _site_audit(name: str, line: _Line, reference: Reference) -> SiteAudit:
    generic = "the model, a library under it, or what the name stands for has changed since the rows were made"
    failed = line.error > line.tolerance  # more was measured since, perhaps
    return SiteAudit(
        site=name,
        reference=reference.describe(name),
        n_rows=line.n_rows,
        max_relative_error=line.error,
        tolerance=line.tolerance,
        worst=line.worst,
        reasons=tuple(line.reasons or [generic]) if failed else (),
    )


def _meanings(store: Store, lm: LanguageModel, names: Sequence[str]) -> dict[str, Meaning]:
    """What the store says each name stands for; where it does not say, what the model says today.

    Raises:
        SiteError: the model does not have a name whose meaning the store does not say.
    """
    meanings = {}
    for name in names:
        said = store.spec.site(name).meaning
        if said is None:
            said = lm.resolve([name], length=store.spec.sequence_length)[0].site.meaning
        if said is None:
            raise SiteError(f"neither {store.path} nor {lm.name} says what {name} stands for")
        meanings[name] = said
    return meanings


def _check_model(store: Store, lm: LanguageModel) -> None:
    if lm.spliced:
        raise ConfigError(f"a splice is in force in {lm.name}: leave it before the audit")
    made_by, mine = store.spec.model, lm.identity
    differences = [
        f"{key}: the store has {made_by.get(key)!r}, {lm.name} {mine.get(key)!r}"
        for key in _DECIDING
        if "weights" in made_by and made_by.get(key) != mine.get(key)  # an imported store does not say
    ]
    if differences:
        raise StoreMismatchError(
            f"{store.path} was not made from {lm.name} as it was opened here:\n  " + "\n  ".join(differences)
        )
