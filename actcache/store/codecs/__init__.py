"""Chunk codecs: one chunk to stored bytes and back, exactly as the Zarr v3 codecs in the metadata say."""

from actcache.memory import Scratch
from actcache.store.codecs.chain import STORED_DTYPE, Chain
from actcache.store.codecs.crc import CRC_BYTES, checksum_of, crc_bytes, is_whole, matches
from actcache.store.codecs.fit import choose_codec, expected_bytes_per_value
from actcache.store.codecs.presets import PRESETS, TABLE, chain_of, parse_codec
from actcache.store.codecs.quantise import dequantise_rows, feature_exponents, quantise_rows

__all__ = [
    "CRC_BYTES",
    "PRESETS",
    "STORED_DTYPE",
    "TABLE",
    "Chain",
    "Scratch",
    "chain_of",
    "checksum_of",
    "choose_codec",
    "crc_bytes",
    "dequantise_rows",
    "expected_bytes_per_value",
    "feature_exponents",
    "is_whole",
    "matches",
    "parse_codec",
    "quantise_rows",
]
