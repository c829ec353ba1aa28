"""Chunk codecs: what goes in comes out bit by bit, others agree on every byte, and hostile bytes do nothing."""

from __future__ import annotations

import json

import google_crc32c
import numcodecs
import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from zarr.core.buffer import default_buffer_prototype
from zarr.storage import LocalStore, MemoryStore

from actcache.errors import ConfigError
from actcache.store import codecs
from actcache.store.codecs.planes import compress_planes

LOSSLESS = [name for name, preset in codecs.PRESETS.items() if preset.lossless]
STORED = ["<u2", "<f2", "<f4", "<u4", "|i1", "|u1"]


def named(name, **configuration):
    return {"name": name, "configuration": configuration}


BY_HAND = {
    "blosc": [named("blosc", cname="lz4hc", clevel=9, shuffle="noshuffle")],
    "zstd": [named("zstd", level=3, checksum=True)],
    "gzip": [named("gzip", level=1)],
    "transpose gzip": [named("transpose", order=[1, 0]), named("gzip")],
    "transpose": [named("transpose", order=[1, 0])],
    "all": [named("transpose", order=[1, 0]), named("bytes", endian="little"), named("blosc"), named("crc32c")],
    "blosc zstd gzip": [named("blosc", cname="blosclz", shuffle="bitshuffle"), named("zstd"), named("gzip")],
    "nothing": [],
}  # fmt: skip


REFUSED = [
    "bitround", "zlib", "lz4", "numcodecs.bitround", "numcodecs.bz2", "numcodecs.delta", "numcodecs.fixedscaleoffset",
    "numcodecs.lz4", "numcodecs.lzma", "numcodecs.pcodec", "numcodecs.quantize", "numcodecs.shuffle", "numcodecs.zlib",
]  # fmt: skip
"""Steps that zarr-python has and tensorstore does not open."""


def stored_form(chain, chunk):
    payload, crc = chain.encode(np.ascontiguousarray(chunk))
    return memoryview(bytes(payload) + codecs.crc_bytes(crc))


def with_crc(payload):
    return memoryview(bytes(payload) + codecs.crc_bytes(google_crc32c.value(bytes(payload))))


def chain_by_hand(listed):
    return codecs.resolve_codec(codecs.parse_codec(listed))


def chain_named(name):
    return codecs.PRESETS[name].codec if name in codecs.PRESETS else chain_by_hand(BY_HAND[name])


def some_values(dtype, shape=(64, 24), seed=0):
    values = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    if dtype == "<u2":
        return (values.view(np.uint32) >> 16).astype("<u2")
    return values.astype(dtype) if np.dtype(dtype).kind == "f" else (values * 20).astype("<i8").astype(dtype)


# Round trips


@pytest.mark.parametrize("name", [*LOSSLESS, *BY_HAND])
@given(data=st.data())
@settings(max_examples=30, deadline=None)
def test_any_bits_come_back(name, data):
    chain = chain_named(name)
    dtype = np.dtype(data.draw(st.sampled_from(STORED)))
    shape = data.draw(hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=40))
    bits = data.draw(hnp.arrays(f"<u{dtype.itemsize}", shape))
    out = np.empty(shape, dtype)
    assert chain.decode_into(stored_form(chain, bits.view(dtype)), out) is None
    np.testing.assert_array_equal(out.view(bits.dtype), bits)


@pytest.mark.parametrize("name", LOSSLESS)
def test_every_bfloat16_comes_back(name):
    every = np.arange(1 << 16, dtype="<u2").reshape(256, 256)  # -0, subnormals and every NaN payload among them
    out = np.empty_like(every)
    assert chain_named(name).decode_into(stored_form(chain_named(name), every), out) is None
    np.testing.assert_array_equal(out, every)


def test_equal_values_give_equal_bytes_whenever_and_wherever_they_are_encoded():
    from concurrent.futures import ThreadPoolExecutor

    chunk = some_values("<u2", (1024, 512))
    for chain in map(chain_named, [*LOSSLESS, *BY_HAND]):
        with ThreadPoolExecutor(1) as pool:
            elsewhere = pool.submit(stored_form, chain, chunk).result()
        assert bytes(elsewhere) == bytes(stored_form(chain, chunk))


@pytest.mark.parametrize("itemsize", [2, 4, 8])
@pytest.mark.parametrize("n_bytes", [8, 4096, 1 << 19, (1 << 19) + 8, 3 << 19])
@pytest.mark.parametrize("kind", ["values", "noise", "zeros"])
def test_frames_of_lossless_are_read_by_every_blosc(itemsize, n_bytes, kind, monkeypatch):
    data = np.zeros(n_bytes, np.uint8)
    if kind == "noise":
        data[:] = np.random.default_rng(0).integers(0, 256, n_bytes)
    elif kind == "values":
        data[:] = some_values("<u2", (n_bytes // 2,)).view(np.uint8)
    frame = compress_planes(data, itemsize, 1 << 19)
    assert bytes(numcodecs.Blosc().decode(frame)) == data.tobytes()
    assert len(frame) <= n_bytes + 16 + 8 * -(-n_bytes >> 19)
    if kind == "values" and n_bytes >= 1 << 19 and itemsize == 2:
        assert len(frame) <= len(numcodecs.blosc.compress(data, b"zstd", 1, 1, 1 << 19, 2)) < n_bytes
    monkeypatch.setattr("actcache.store.codecs.planes.split_planes", lambda: None)  # as where numba is missing
    assert compress_planes(data, itemsize, 1 << 19) == frame


# Parity with zarr-python

PARITY = (
    [(name, chain_named(name), dtype) for name in LOSSLESS for dtype in ("<u2", "<f4")]
    + [("int8", codecs.RAW, "|i1")]
    + [("table", codecs.TABLE, dtype) for dtype in ("<u4", "<f8", "|u1")]
    + [(name, chain_named(name), dtype) for name in BY_HAND for dtype in ("<u2", "<f4")]
)


def array_by_zarr(store, chain, dtype):
    return zarr.open_group(store, mode="w").create_array(
        "a", shape=(64, 24), chunks=(16, 24), shards=(64, 24), dtype=dtype, fill_value=0,
        **chain.zarr_codecs(np.dtype(dtype)),
    )  # fmt: skip


@pytest.mark.parametrize(("name", "chain", "dtype"), PARITY)
def test_zarr_writes_the_same_bytes_and_reads_the_same_values(name, chain, dtype):
    values, store = some_values(dtype), MemoryStore()
    array = array_by_zarr(store, chain, dtype)
    array[:] = values
    theirs = store._store_dict["a/c/0/0"].to_bytes()
    ours = [bytes(stored_form(chain, values[start : start + 16])) for start in range(0, 64, 16)]
    # The bytes of zarr's gzip hold the time; our frames of lossless are smaller than zarr's, of the same format.
    if "gzip" not in name and name != "lossless":
        assert theirs.startswith(b"".join(ours))
    index = np.frombuffer(theirs[-68:-4], "<u8").reshape(4, 2).tolist()
    out = np.empty((16, 24), values.dtype)
    for number, (offset, size) in enumerate(index):
        assert chain.decode_into(memoryview(theirs)[offset : offset + size], out) is None
        np.testing.assert_array_equal(out, values[16 * number : 16 * number + 16])
    assert read_by_zarr(store, ours, values.dtype).tobytes() == array[:].tobytes() == values.tobytes()


@pytest.mark.parametrize("name", [*LOSSLESS, *BY_HAND])
def test_tensorstore_opens_every_chain_that_can_be_named(tmp_path, name):
    tensorstore = pytest.importorskip("tensorstore", reason="needs tensorstore: pip install tensorstore")
    chain, values = chain_named(name), some_values("<u2")
    array_by_zarr(LocalStore(tmp_path), chain, "<u2")
    chunks = [bytes(stored_form(chain, values[start : start + 16])) for start in range(0, 64, 16)]
    (tmp_path / "a/c/0").mkdir(parents=True, exist_ok=True)
    (tmp_path / "a/c/0/0").write_bytes(shard_of(chunks))
    place = {"driver": "file", "path": f"{tmp_path}/a/"}
    opened = tensorstore.open({"driver": "zarr3", "kvstore": place}, read=True).result()
    np.testing.assert_array_equal(opened.read().result(), values)


def shard_of(chunks):
    sizes = [len(chunk) for chunk in chunks]
    index = np.column_stack([np.cumsum([0, *sizes[:-1]]), sizes]).astype("<u8").tobytes()
    return b"".join(chunks) + bytes(with_crc(index))


def read_by_zarr(store, chunks, dtype):
    """What zarr reads from a shard made of our chunks, as the same array."""
    store._store_dict["a/c/0/0"] = default_buffer_prototype().buffer.from_bytes(shard_of(chunks))
    return zarr.open_array(store, path="a", mode="r")[:].astype(dtype)


# Damaged and hostile bytes


@pytest.mark.parametrize("name", [*LOSSLESS, *BY_HAND])
def test_what_is_cut_or_changed_is_noticed_with_its_checksum(name):
    chain = chain_named(name)
    chunk, out = some_values("<u2"), np.empty((64, 24), "<u2")
    stored = bytes(stored_form(chain, chunk))
    for cut in (0, 1, 3, 4, 7, len(stored) // 2, len(stored) - 1):
        assert chain.decode_into(memoryview(stored[:cut]), out)
    for place in range(0, len(stored), 37):
        flipped = bytearray(stored)
        flipped[place] ^= 1
        assert "checksum" in chain.decode_into(memoryview(flipped), out)


@pytest.mark.parametrize("name", [*LOSSLESS, *BY_HAND])
def test_forged_payloads_never_reach_outside_or_come_back_short(name):
    chain = chain_named(name)
    chunk, rng = some_values("<u2"), np.random.default_rng(0)
    payload = bytes(stored_form(chain, chunk))[:-4]
    room = np.empty(3 * 64 * 24, "<u2")
    out = room[64 * 24 : 2 * 64 * 24].reshape(64, 24)
    for cut in [*range(0, 40), *rng.integers(0, len(payload), 40)]:
        assert chain.decode_into(with_crc(payload[:cut]), out), cut
    for n_rows in (1, 63, 65, 1000):  # a chunk of another size
        wrong = bytes(stored_form(chain, some_values("<u2", (n_rows, 24))))[:-4]
        assert chain.decode_into(with_crc(wrong), out), n_rows
    room[:] = 7
    for _ in range(300):
        forged = bytearray(payload)
        for place in rng.integers(0, rng.choice([24, len(payload)]), rng.integers(1, 4)):
            forged[place] = rng.integers(256)
        chain.decode_into(with_crc(forged), out)
    assert (room[: 64 * 24] == 7).all()
    assert (room[2 * 64 * 24 :] == 7).all()


def test_a_header_that_announces_more_is_refused_before_anything_is_made():
    out = np.empty((4, 4), "<u2")
    huge = (1 << 31).to_bytes(4, "little")
    blosc = bytearray(bytes(codecs.TABLE.encode(out)[0]))
    blosc[4:8] = huge
    assert "announces" in codecs.TABLE.decode_into(with_crc(blosc), out)
    blosc[4:8], blosc[12:16] = (32).to_bytes(4, "little"), huge
    assert "announces" in codecs.TABLE.decode_into(with_crc(blosc), out)
    frame = b"\x28\xb5\x2f\xfd\xe0" + (1 << 40).to_bytes(8, "little") + b"\x01\0\0"
    assert "announces" in chain_named("sparse").decode_into(with_crc(frame), out)
    unsized = b"\x28\xb5\x2f\xfd\x00\x58" + b"\x01\0\0"
    assert "no content size" in chain_named("sparse").decode_into(with_crc(unsized), out)


def test_bombs_stop_at_the_size_of_the_chunk():
    chain = chain_by_hand([named("gzip")])
    bomb = stored_form(chain, np.zeros((1 << 22, 2), "<u2"))
    assert "more than" in chain.decode_into(bomb, np.empty((4, 4), "<u2"))


# Names and text


def test_presets_are_their_own_text():
    for name, preset in codecs.PRESETS.items():
        assert preset.name == name
        assert codecs.resolve_codec(name) is preset.codec
        if preset.offered:
            assert codecs.parse_codec(name) == name


def test_a_preset_that_is_no_longer_offered_is_named_with_those_that_are():
    with pytest.raises(
        ConfigError, match="'fast' is no longer offered; there are raw, lossless, sparse, int8, or a list"
    ):
        codecs.parse_codec("fast")


@pytest.mark.parametrize("listed", BY_HAND.values())
def test_canonical_text_is_a_fixed_point(listed):
    text = codecs.parse_codec(listed)
    assert codecs.parse_codec(text) == text
    assert codecs.parse_codec(json.dumps(listed)) == text
    assert codecs.resolve_codec(text) == codecs.resolve_codec(codecs.parse_codec(text))
    spelled_out = [*listed, named("crc32c")] if listed[-1:] != [named("crc32c")] else listed
    assert codecs.parse_codec(spelled_out) == text
    if listed:
        assert codecs.resolve_codec(text).zarr_codecs(np.dtype("<u2"))["compressors"][-1] == {"name": "crc32c"}


@pytest.mark.parametrize(
    ("codec", "reason"),
    [
        ("nonsense", "no codec preset"),
        ("", "no codec preset"),
        ("{}", "no codec preset"),
        ("[", "not a JSON"),
        ("[" * 3000, "not a JSON"),
        ("[" + " " * 5000 + "]", "characters"),
        ('["zstd"]', "a codec is"),
        ([{"name": "zstd", "config": {}}], "a codec is"),
        ([{"name": ["zstd"]}], "a codec is"),
        ([{"name": "zstd", "configuration": [1]}], "a codec is"),
        ([named("zstd")] * 9, "more than 8"),
        ([named("numcodecs.pickle")], "cannot be used"),
        ([named("numcodecs.json2")], "cannot be used"),
        ([named("numcodecs.zstd")], "cannot be used"),
        ([named("sharding_indexed")], "cannot be used"),
        ([named("__class__")], "cannot be used"),
        ([named("crc32c"), named("zstd")], "cannot be used"),
        ([named("zstd", level=23)], "level must be"),
        ([named("zstd", level=True)], "level must be"),
        ([named("zstd", level=1.0)], "level must be"),
        ([named("zstd", levels=1)], "does not take"),
        ([{"name": "zstd", "configuration": {"name": "x"}}], "does not take"),
        ([named("blosc", cname="../evil")], "cname must be"),
        ([named("blosc", cname=["lz4"])], "cname must be"),
        ([named("blosc", typesize=0)], "typesize must be"),
        ([named("blosc", blocksize=1 << 40)], "blocksize must be"),
        ([named("transpose", order=[1, 0, 2])], "order must be"),
        ([named("transpose")], "does not take"),
        ([named("bytes", endian="big")], "little-endian"),
        ([named("zstd"), named("bytes")], "that late"),
        ([named("zstd"), named("transpose", order=[1, 0])], "that late"),
        ([named("transpose", order=[1, 0]), named("transpose", order=[1, 0])], "once only"),
        *(([named(name)], "there are blosc, bytes, crc32c, gzip, transpose, zstd") for name in REFUSED),
    ],
)
def test_what_cannot_be_a_codec_is_refused(codec, reason):
    with pytest.raises(ConfigError, match=reason):
        codecs.parse_codec(codec)
    if isinstance(codec, str):
        with pytest.raises(ConfigError, match=reason):
            codecs.resolve_codec(codec)


def test_auto_goes_by_size():
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 1 << 16, (1024, 256)).astype("<u2")
    dense = some_values("<u2", (1024, 256))
    sparse = np.where(rng.random((1024, 256)) < 0.9, 0, dense).astype("<u2")
    chosen = {}
    for name, chunk in (("raw", noise), ("lossless", dense), ("sparse", sparse)):
        chosen[name], reason = codecs.choose_codec([chunk, chunk])
        assert codecs.choose_codec([chunk, chunk]) == (chosen[name], reason)
        assert reason.startswith(f"{name}: ")
    assert chosen == {name: name for name in chosen}
    assert codecs.choose_codec([])[0] == "lossless"
    assert codecs.choose_codec([dense[:1], dense[:0]])[0] in codecs.PRESETS


def test_auto_looks_at_a_large_array_in_pieces():
    dense = some_values("<u2", (20_000, 512))  # 20 MB
    large, small = codecs.choose_codec([dense]), codecs.choose_codec([dense[:4096]])
    assert large[0] == small[0] == "lossless"
    assert large[1] == small[1]  # the same ratios to two digits
