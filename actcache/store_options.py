"""The options that belong together wherever a store is made.

In: what the user asked for. Out: a value that is legal, because it is checked where it is made.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from actcache.errors import ConfigError
from actcache.files import shown
from actcache.spec import DTYPES, Dtype, check_positive, integer


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreOptions:
    """How activations are to be stored. What depends on their number or width is checked by `StoreSpec`.

    Raises:
        ConfigError: a value of the wrong type, or one that no store can have.
    """

    codec: str | Mapping[str, str] = "lossless"
    """Preset `raw`, `lossless`, `sparse` or `int8`, `auto`, or the JSON text of a list of Zarr codecs; or any of these
    by pattern of site names."""
    dtype: Dtype | None = "bfloat16"
    """Element type on disk. None, for activations that exist already: the type that holds all of them exactly."""
    skip_first: int = 1
    """Leading positions of each sequence that are not kept: those with the least context."""
    seed: int = 0
    """Seed of the shuffle of rows within shards."""
    sequences_per_shard: int | None = None
    """Sequences of a shard, the unit of work; by default 512, fewer where sites are wide."""
    rows_per_chunk: int | None = None
    """Rows of the unit of reading; by default half a megabyte of the widest site."""

    def __post_init__(self) -> None:
        codecs = [*self.codec, *self.codec.values()] if isinstance(self.codec, Mapping) else [self.codec]
        if not all(isinstance(text, str) for text in codecs):
            raise ConfigError(
                f"store options: codec must be the name of one, or names by pattern of sites, got {shown(self.codec)}"
            )
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ConfigError(f"store options: dtype must be one of {', '.join(DTYPES)}, got {shown(self.dtype)}")
        if type(self.skip_first) is not int or self.skip_first < 0:
            raise ConfigError(f"store options: skip_first must be an integer from 0 up, got {shown(self.skip_first)}")
        object.__setattr__(self, "seed", integer("store options", "seed", self.seed))
        sizes = {"sequences_per_shard": self.sequences_per_shard, "rows_per_chunk": self.rows_per_chunk}
        check_positive("store options", **{name: n for name, n in sizes.items() if n is not None})
