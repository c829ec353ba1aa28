"""Chunk codecs: one chunk to stored bytes and back, exactly as the Zarr v3 codecs in the metadata say.

crc.py        the checksum behind every chunk
planes.py     Blosc frames that suit floating-point values
steps.py      the steps that a chain may name
chain.py      a chain of steps
quantiser.py  what a quantiser is: it keeps values as other arrays
int8.py       the quantiser int8
presets.py    codecs by name, and from text
fit.py        which codec suits a site
"""

from actcache.store.codecs.chain import RAW, STORED_DTYPE, Chain
from actcache.store.codecs.crc import CRC_BYTES, checksum_of, crc_bytes, is_whole, matches
from actcache.store.codecs.fit import choose_codec, expected_row_bytes
from actcache.store.codecs.presets import (
    PRESETS,
    TABLE,
    UnknownCodecError,
    parse_codec,
    quantiser_of,
    resolve_codec,
    stored_arrays,
)
from actcache.store.codecs.quantiser import ACTS, Powers, Quantiser, StoredArray, decode_rows

__all__ = [
    "ACTS",
    "CRC_BYTES",
    "PRESETS",
    "RAW",
    "STORED_DTYPE",
    "TABLE",
    "Chain",
    "Powers",
    "Quantiser",
    "StoredArray",
    "UnknownCodecError",
    "checksum_of",
    "choose_codec",
    "crc_bytes",
    "decode_rows",
    "expected_row_bytes",
    "is_whole",
    "matches",
    "parse_codec",
    "quantiser_of",
    "resolve_codec",
    "stored_arrays",
]
