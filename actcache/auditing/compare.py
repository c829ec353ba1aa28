"""How far stored rows are from the model's, how far they may be, and what a larger difference looks like.

The error of a row is `|stored - model| / |model|`, Euclidean norms over the features of a site. What the codec of the
site may do to each value (half a step of `int8`, say) is taken off first. Rows far shorter than the others are measured
against a hundredth of the median length, because rounding in the model is relative to what was summed, not to the sum.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from actcache.lm import LanguageModel
from actcache.spec import Site, StoreSpec
from actcache.store.codecs import quantiser_of
from actcache.store.format.site_arrays import powers_of

FloatRows = NDArray[np.float64]
"""`(n, D)`."""

_COMPUTED = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 2.0**-9, torch.bfloat16: 2.0**-6}
"""How much a sequence alone may differ from the same one in a batch, where kernels add in another order."""
_COMPUTED_TF32 = 1e-2
_MARGIN = 3.0
"""Where rounding is coarse it is measured, on the sequences that are looked at; other batches may round worse."""
_STORED = {"bfloat16": 2.0**-8, "float16": 2.0**-11, "float32": 2.0**-24}
"""Largest relative error of rounding to nearest in each dtype."""
_SMALLEST_HALF_STEP_OF_FLOAT16 = 2.0**-25
_SHORT_ROW = 0.01
_MOST_PAIRS = 1 << 22
"""Pairs of a stored row and a position of the model that are compared to find out where rows come from."""


def computed_tolerance(lm: LanguageModel) -> float:
    """The smallest relative error that is allowed for the arithmetic of this model."""
    packed = any(not weight.is_floating_point() for weight in lm.module.parameters())
    coarse = _COMPUTED[torch.bfloat16]
    found = max(coarse if packed else 0.0, _COMPUTED.get(lm.autocast or lm.dtype, coarse))
    reduced = lm.device.type == "cuda" and torch.get_float32_matmul_precision() != "highest"
    return max(found, _COMPUTED_TF32) if reduced else found


def rounds_coarsely(lm: LanguageModel) -> bool:
    """Whether rounding accumulates over layers so much that it has to be measured."""
    return computed_tolerance(lm) > _COMPUTED[torch.float32]


def tolerance_of(lm: LanguageModel, spec: StoreSpec, site: Site, measured: float = 0.0) -> float:
    """The relative error that a row of a site is allowed: that of the model's arithmetic, and of rounding to store it.

    A quantised value is rounded twice: before it is quantised, and when it is read. `measured` is the largest error of
    a row of the same model from one batch to another.
    """
    stored = _STORED[spec.dtype] * (2 if quantiser_of(site.codec) else 1)
    return stored + max(computed_tolerance(lm), _MARGIN * measured)


def relative_errors(model: FloatRows, other: FloatRows, allowed: NDArray[np.float64] | float = 0.0) -> FloatRows:
    """`(n,)` relative difference of rows, of finite values, minus what each value is allowed."""
    excess = np.linalg.norm(np.maximum(np.abs(other - model) - allowed, 0), axis=1)
    lengths = np.linalg.norm(model, axis=1)
    lengths = np.maximum(lengths, _SHORT_ROW * np.median(lengths)) if len(lengths) else lengths
    return np.asarray(np.divide(excess, lengths, out=np.where(excess > 0, np.inf, 0.0), where=lengths > 0))


def row_errors(spec: StoreSpec, site: Site, model: FloatRows, stored: FloatRows) -> NDArray[np.float64]:
    """`(n,)` relative error of each row; infinite where the store and the model differ in which values are finite."""
    quantiser = quantiser_of(site.codec)
    alike = _not_finite_alike(model, stored, by_row=quantiser is not None)
    finite = np.isfinite(model) & np.isfinite(stored)
    model, stored = np.where(finite, model, 0.0), np.where(finite, stored, 0.0)
    allowed = 0.0 if quantiser is None else quantiser.largest_error(model, powers_of(site))
    allowed = allowed + (_SMALLEST_HALF_STEP_OF_FLOAT16 if spec.dtype == "float16" else 0.0)
    errors = relative_errors(model, stored, allowed)
    return np.where(alike, errors, np.inf)


def _not_finite_alike(model: FloatRows, stored: FloatRows, *, by_row: bool) -> NDArray[np.bool_]:
    """`(n,)` whether the values that are not finite are the same, or only whether the row has any.

    A quantiser may give back a whole row as NaN if one of its values is not finite.
    """
    if by_row:
        alike: NDArray[np.bool_] = np.isfinite(model).all(axis=1) == np.isfinite(stored).all(axis=1)
        return alike
    both = [np.where(np.isfinite(values), 0.0, values) for values in (model, stored)]
    return np.asarray(((both[0] == both[1]) | (np.isnan(both[0]) & np.isnan(both[1]))).all(axis=1))


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """One sequence whose rows at a site are too far off."""

    spec: StoreSpec
    site: Site
    tolerance: float
    stored: FloatRows
    """`(n, D)` rows of the store."""
    positions: NDArray[np.int64]
    """`(n,)`"""
    model: Mapping[str, FloatRows]
    """`(T, D)` of every site that was looked at, at all positions."""


def likely_reasons(difference: Difference) -> list[str]:
    """What the difference looks like, most telling first; empty if it is of no known kind."""
    return [*_of_other_rows(difference), *_of_other_sites(difference), *_of_values(difference)]


def _fits(d: Difference, model: FloatRows, stored: FloatRows) -> bool:
    """Whether these values of the model explain most of the rows."""
    return len(stored) > 0 and bool(np.median(row_errors(d.spec, d.site, model, stored)) <= d.tolerance)


def _of_other_rows(d: Difference) -> Iterator[str]:
    model = d.model[d.site.name]
    for shift, where in ((-1, "before"), (1, "behind")):
        there = (d.positions + shift >= 0) & (d.positions + shift < len(model))
        if _fits(d, model[d.positions[there] + shift], d.stored[there]):
            yield f"the rows are those of the token {where} their own"
            return
    finite = np.isfinite(model).all() and np.isfinite(d.stored).all()
    if finite and len(model) * len(d.stored) <= _MOST_PAIRS:
        squared = (model**2).sum(axis=1)[None] - 2 * d.stored @ model.T
        if _fits(d, model[squared.argmin(axis=1)], d.stored):
            yield "the rows are those of other tokens of the same sequence"


def _of_other_sites(d: Difference) -> Iterator[str]:
    for name, model in d.model.items():
        if name != d.site.name and model.shape[1] == d.site.width and _fits(d, model[d.positions], d.stored):
            yield f"the values are those of {name}"


def _of_values(d: Difference) -> Iterator[str]:
    model = d.model[d.site.name][d.positions]
    if np.isfinite(model).all() and not np.isfinite(d.stored).all():
        yield f"values are too large for {d.spec.dtype}, or were not finite in a batch"
        return
    stored, model = np.nan_to_num(d.stored), np.nan_to_num(model)
    size = float((model**2).sum())
    factor = float((stored * model).sum()) / size if size else 0.0
    if factor > 0 and abs(factor - 1) > d.tolerance and _fits(d, factor * model, stored):
        yield f"the values are {factor:.3g} times the model's"
        return
    by_feature = ((stored - model) ** 2).sum(axis=0)
    few = np.argsort(-by_feature)[: max(1, len(by_feature) // 16)]
    if len(by_feature) >= 16 and by_feature[few].sum() > 0.95 * by_feature.sum():
        names = ", ".join(map(str, few[:4].tolist()))
        yield f"a few features carry the difference ({names}): a wrong exponent or scale"


def say_lengths(failed: Sequence[int], sound: Sequence[int]) -> list[str]:
    """A finding if only short sequences fail, by their lengths and those of the sequences that agree."""
    if failed and sound and max(failed) < max(sound):
        return ["only sequences shorter than others fail: padding, or the rest of the batch, changes the values"]
    return []
