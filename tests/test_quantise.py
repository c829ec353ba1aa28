"""int8 rows: the error stays within half a step, and what is not finite never comes back as a number."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from actcache.kernels.bits import NAN
from actcache.store.codecs.chain import STORED_DTYPE
from actcache.store.codecs.int8 import Int8, feature_exponents, quantise_rows
from actcache.store.codecs.quantiser import decode_rows


def some_values(shape):
    values = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    return (values.view(np.uint32) >> 16).astype("<u2")


def quantised(values, logical, exponents=None):
    """Values as stored to what comes back, with the scales as numbers."""
    q, bits = np.full(values.shape, 99, np.int8), np.empty(len(values), np.uint16)
    out = np.empty(values.shape, np.float32)
    powers = None if exponents is None else np.ldexp(np.float32(1), exponents.astype(np.int32))
    quantise_rows(values, logical, q, bits, powers)
    decode_rows(Int8(), (q, bits), powers, out)
    return q, (bits.astype(np.uint32) << 16).view(np.float32), out


def as_float32(values, logical):
    return (values.astype(np.uint32) << 16).view(np.float32) if logical == "bfloat16" else values.astype(np.float32)


@pytest.mark.parametrize("logical", list(STORED_DTYPE))
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_int8_is_off_by_half_a_step_at_most(logical, data):
    dtype = STORED_DTYPE[logical]
    bits = data.draw(hnp.arrays(f"<u{dtype.itemsize}", st.tuples(st.integers(1, 9), st.integers(1, 50))))
    values = bits.view(dtype)
    q, scales, out = quantised(values, logical)
    with np.errstate(invalid="ignore"):  # signalling NaNs
        numbers = as_float32(values, logical).astype(np.float64)
    finite = np.isfinite(numbers).all(axis=1)
    assert np.isnan(out[~finite]).all()
    assert (q[~finite] == 0).all()
    assert np.isfinite(out[finite]).all()
    assert (np.abs(q.astype(int)) <= 127).all()
    error = np.abs(out[finite] - numbers[finite])
    assert (error <= 0.5 * scales[finite, None] * (1 + 1e-6)).all()
    largest = np.abs(numbers[finite]).max(axis=1)
    assert (scales[finite] >= largest / 127).all()
    assert (scales[finite] <= largest / 127 * (1 + 2**-7) + 2.0**-133).all()


@pytest.mark.parametrize("logical", list(STORED_DTYPE))
def test_int8_of_rows_at_the_edges(logical):
    dtype = STORED_DTYPE[logical]
    if logical == "bfloat16":
        rows = [0x0000, 0x8000, 0x0001, 0x7F7F, 0x7F80, 0x7FC1, 0xFF81]
        values = np.array(rows, "<u2")
    else:
        info = np.finfo(dtype)
        values = np.array([0, -0.0, info.smallest_subnormal, info.max, np.inf, np.nan, -np.nan], dtype)
    values = np.repeat(values[:, None], 3, axis=1)
    values[:, 1] = 0
    _, scales, out = quantised(values, logical)
    assert scales[:2].tolist() == [0, 0]
    assert (out[:2] == 0).all()
    assert np.isfinite(out[2:4]).all()
    np.testing.assert_allclose(out[3, ::2], as_float32(values, logical)[3, ::2], rtol=2**-7)
    assert np.isnan(out[4:]).all()
    _, bits = np.empty(values.shape, np.int8), np.empty(7, np.uint16)
    quantise_rows(values, logical, _, bits)
    assert (bits[4:] == NAN).all()


def test_int8_does_not_depend_on_how_rows_are_grouped():
    values = some_values((3000, 40))
    exponents = feature_exponents(values, "bfloat16")
    whole = quantised(values, "bfloat16", exponents)
    for start in range(0, 3000, 700):
        part = quantised(values[start : start + 700], "bfloat16", exponents)
        for a, b in zip(part, whole, strict=True):
            np.testing.assert_array_equal(a, b[start : start + 700])
    np.testing.assert_array_equal(exponents, feature_exponents(values[::-1], "bfloat16"))


def test_dequantised_bfloat16_is_the_rounded_float32():
    values = some_values((100, 40))
    values[7, 3] = 0x7F80
    q, bits, wide = np.empty(values.shape, np.int8), np.empty(100, np.uint16), np.empty(values.shape, np.float32)
    narrow = np.empty(values.shape, np.uint16)
    quantise_rows(values, "bfloat16", q, bits)
    decode_rows(Int8(), (q, bits), None, wide)
    decode_rows(Int8(), (q, bits), None, narrow)
    expected = torch.from_numpy(wide).bfloat16().view(torch.int16).numpy().view(np.uint16)
    np.testing.assert_array_equal(np.delete(narrow, 7, 0), np.delete(expected, 7, 0))
    assert np.isnan(as_float32(narrow[7], "bfloat16")).all()


def test_exponents_save_the_rest_from_a_huge_feature():
    numbers = np.random.default_rng(0).standard_normal((2000, 64)).astype(np.float32)
    numbers[:, 5] *= 300
    numbers[:, 6] = 0
    numbers[1, 6] = np.nan
    exponents = feature_exponents(numbers, "float32")
    assert exponents[5] == 8
    assert (np.delete(exponents, 5) <= 1).all()
    assert (exponents >= 0).all()
    rest, kept = np.delete(np.arange(64), [5, 6]), np.delete(np.arange(2000), 1)
    plain, helped = (quantised(numbers, "float32", e)[2][np.ix_(kept, rest)] for e in (None, exponents))
    truth = numbers[np.ix_(kept, rest)]
    assert ((helped - truth) ** 2).sum() < 1e-3 * ((plain - truth) ** 2).sum()
    assert (feature_exponents(np.zeros((4, 3), np.float32), "float32") == 0).all()
