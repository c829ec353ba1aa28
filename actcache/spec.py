"""The nouns: small frozen values that the rooms pass to each other. A value that exists is legal.

Shape letters, used everywhere: `Q` sequences, `T` positions, `N` rows, `B` rows of a batch, `D` width of a site,
`F` latents, `S` shards, `V` vocabulary.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray

from actcache.errors import ConfigError, SiteError
from actcache.files import shown

Dtype = Literal["bfloat16", "float16", "float32"]
DTYPES: tuple[Dtype, ...] = ("bfloat16", "float16", "float32")
DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
MOST_OBJECT_BYTES = 1 << 28
"""Largest piece of a store that is decoded whole: what a hostile store can make a reader allocate at a time."""
NO_DOCUMENT = (1 << 32) - 1
"""Document number of the positions after the end of a sequence that is shorter than the others."""
_MOST_NAME_CHARACTERS = 240
"""Longest name of a site, escaped as in a URL: file systems take names of 255 bytes."""
_NO_SITE_NAMES = ("rows", "tokens", "ledger", "attributes", "metadata")

Progress = Callable[[int, int], None]
"""`progress(done, total)`: called by long functions; the library itself prints nothing."""


def check_positive(where: str, **values: int) -> None:
    """Raise `ConfigError` for the first of the named values that is not a positive integer."""
    for name, value in values.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(f"{where}: {name} must be a positive integer, got {shown(value)}")


def check_number(where: str, least: float, most: float, **values: Any) -> None:
    """Raise `ConfigError` for the first of the named values that is not a finite number within these limits."""
    for name, value in values.items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not least <= value <= most or not math.isfinite(value):
            raise ConfigError(f"{where}: {name} must be between {least} and {most}, got {shown(value)}")


def integer(where: str, name: str, value: Any) -> int:
    """A whole number, which may be one of numpy's; ConfigError for anything else."""
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise ConfigError(f"{where}: {name} must be an integer, got {shown(value)}") from None


def check_callable(where: str, **values: Any) -> None:
    """Raise `ConfigError` for the first of the named values that is neither None nor a function."""
    for name, value in values.items():
        if value is not None and not callable(value):
            raise ConfigError(f"{where}: {name} must be a function, got {shown(value)}")


def digest_of(value: Any) -> str:
    """sha256 (hex) of a JSON-able value in canonical form: sorted keys, no spaces."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True, slots=True)
class Meaning:
    """What the name of a site stands for in its model: enough to find the value again without this package.

    Equal meanings give equal values for the same model and tokens; a store is only continued under the same meaning.
    """

    module: str
    """Path of a module in the plain model (empty for the model itself); with `transformer_lens`, a hook name of it."""
    side: Literal["in", "out"] = "out"
    """The module's first argument, or its output (of a tuple the first element; of named fields `logits`, or the first
    tensor)."""
    call: int = 0
    """Which run, from 1 on, of a module that runs several times in one forward pass; 0 for one that runs once."""
    transformer_lens: str = ""
    """Version of transformer-lens, if only its instrumented model has the value; empty for a plain module."""

    def __post_init__(self) -> None:
        texts = isinstance(self.module, str) and isinstance(self.transformer_lens, str)
        if not texts or self.side not in ("in", "out") or type(self.call) is not int or self.call < 0:
            raise ConfigError(f"invalid meaning of a site: {self!r}")

    def __str__(self) -> str:
        if self.transformer_lens:
            return f"hook {self.module} of transformer-lens {self.transformer_lens}"
        module = f"module {self.module}" if self.module else "the whole model"
        run = f", run {self.call} of several in one pass" if self.call else ""
        return f"{module}, {'input' if self.side == 'in' else 'output'}{run}"

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form without empty entries; `Meaning(**plain)` is the inverse."""
        optional = {"call": self.call, "transformer_lens": self.transformer_lens}
        return {"module": self.module, "side": self.side, **{key: value for key, value in optional.items() if value}}


@dataclass(frozen=True, kw_only=True, slots=True)
class Site:
    """A place in the base model whose activations are kept."""

    name: str
    """TransformerLens hook name (`blocks.2.hook_mlp_out`), or `module.path:in` / `module.path:out`."""
    shape: tuple[int, ...]
    """Feature axes, `(d_model,)` for most; several axes are stored flattened."""
    codec: str = "lossless"
    """How it is compressed: the name of a preset, or the JSON text of a chain of Zarr codecs."""
    codec_reason: str = ""
    """Why `auto` chose that codec; empty when it was given."""
    feature_exponents: tuple[int, ...] = ()
    """Of a quantised site: powers of two, one for each feature, that outlying features are divided by; or empty."""
    meaning: Meaning | None = None
    """What the name stands for in the model; None for a store that does not say (imported, or of an early version)."""

    def __post_init__(self) -> None:
        self._check_name()
        if not isinstance(self.codec, str) or not isinstance(self.codec_reason, str):
            raise ConfigError(f"site {self.name}: codec and codec_reason must be text")
        check_positive(f"site {self.name}", **{f"shape[{i}]": n for i, n in enumerate(self.shape)})
        if not self.shape:
            raise ConfigError(f"site {self.name}: shape must have at least one axis")
        exponents = self.feature_exponents
        if exponents and (len(exponents) != self.width or not all(type(e) is int and 0 <= e < 128 for e in exponents)):
            raise ConfigError(
                f"site {self.name}: feature_exponents must be {self.width} integers from 0 to 127, or none"
            )

    def _check_name(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise ConfigError("a site needs a name")
        try:
            length = len(quote(self.name))
        except UnicodeEncodeError:
            raise ConfigError(f"site {self.name!r}: the name is not text that could be stored") from None
        if length > _MOST_NAME_CHARACTERS:
            raise ConfigError(
                f"site {self.name[:40]}...: the name of a site becomes that of a folder, of {length} characters "
                f"with what is escaped; at most {_MOST_NAME_CHARACTERS} are possible"
            )
        if self.name in _NO_SITE_NAMES:
            raise ConfigError(f"a site cannot be called {self.name!r}: a part of every store is called that")

    @property
    def width(self) -> int:
        """D, the number of values a row holds."""
        return math.prod(self.shape)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form, the inverse of `from_dict`; without `meaning` if the store does not say it."""
        plain = {**asdict(self), "meaning": self.meaning and self.meaning.to_dict()}
        return plain if self.meaning else {key: value for key, value in plain.items() if key != "meaning"}

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Site:
        """The site that `to_dict` wrote."""
        tuples = {name: tuple(plain[name]) for name in ("shape", "feature_exponents")}
        meaning = plain.get("meaning")
        return cls(**{**plain, **tuples, "meaning": meaning and Meaning(**meaning)})


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreSpec:
    """Everything that decides which bytes a store holds; equal specs give equal stores."""

    sites: tuple[Site, ...]
    """What is kept, in the order in which it is stored."""
    n_sequences: int
    """Q, token sequences in all."""
    sequence_length: int
    """T, tokens of a sequence."""
    sequences_per_shard: int
    """Sequences whose rows make one shard (the last shard may hold fewer)."""
    rows_per_chunk: int
    """Rows of an inner chunk, the unit of reading; divides `rows_per_shard`."""
    skip_first: int = 1
    """Leading positions of each sequence without rows: they have the least context, and often extreme norms."""
    dtype: Dtype = "bfloat16"
    """Logical element type."""
    seed: int = 0
    """Seed of the shuffle of rows within each shard."""
    model: Mapping[str, Any] = field(default_factory=dict)
    """Identity of the base model: name, digests of weights and tokenizer."""
    text: Mapping[str, Any] = field(default_factory=dict)
    """Identity of the tokens: digest of ids and documents, and how they were made."""

    def __post_init__(self) -> None:
        sizes = ("n_sequences", "sequence_length", "sequences_per_shard", "rows_per_chunk")
        check_positive("store spec", **{name: getattr(self, name) for name in sizes})
        if not self.sites:
            raise ConfigError("store spec: at least one site is needed")
        if len({site.name for site in self.sites}) != len(self.sites):
            raise ConfigError("store spec: a site is named twice")
        if type(self.seed) is not int:
            raise ConfigError(f"store spec: seed must be an integer, got {self.seed!r}")
        if not isinstance(self.model, Mapping) or not isinstance(self.text, Mapping):
            raise ConfigError("store spec: model and text must be mappings")
        if type(self.skip_first) is not int or not 0 <= self.skip_first < self.sequence_length:
            raise ConfigError(
                f"store spec: skip_first must be between 0 and sequence_length - 1 = {self.sequence_length - 1}, "
                f"got {self.skip_first}"
            )
        if self.dtype not in DTYPES:
            raise ConfigError(f"store spec: dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if self.rows_per_shard % self.rows_per_chunk:
            raise ConfigError(
                f"store spec: rows_per_chunk ({self.rows_per_chunk}) must divide rows_per_shard "
                f"({self.rows_per_shard} = {self.sequences_per_shard} sequences x {self.rows_per_sequence} rows)"
            )
        self._check_object_sizes()

    def _check_object_sizes(self) -> None:
        """No object that is read or written whole may be larger than `MOST_OBJECT_BYTES`.

        A spec may come from a hostile store: what passes here bounds every allocation that is made for it.
        """
        widest = max(site.width for site in self.sites)
        sizes = {
            "chunk of activations": self.rows_per_chunk * widest * DTYPE_BYTES[self.dtype],
            "line of statistics": 8 * (3 * widest + 8),
            "row table of a shard": 4 * self.rows_per_shard,
            "index of a shard": 16 * (self.rows_per_shard // self.rows_per_chunk),
            "tokens of a shard": 4 * self.sequences_per_shard * self.sequence_length,
            "ledger": 48 * self.n_shards * (len(self.sites) + 1),
        }
        for what, n_bytes in sizes.items():
            if n_bytes > MOST_OBJECT_BYTES:
                raise ConfigError(
                    f"store spec: the {what} would be {n_bytes:,} bytes, at most {MOST_OBJECT_BYTES:,} are possible; "
                    "change sequences_per_shard or rows_per_chunk"
                )

    @property
    def rows_per_sequence(self) -> int:
        """Rows that each sequence gives."""
        return self.sequence_length - self.skip_first

    @property
    def rows_per_shard(self) -> int:
        """Rows of a full shard."""
        return self.sequences_per_shard * self.rows_per_sequence

    @property
    def n_rows(self) -> int:
        """N, row ids of the finished store: the length of its arrays. Each shard may leave the last of its ids out."""
        return self.n_sequences * self.rows_per_sequence

    @property
    def n_shards(self) -> int:
        """S, shards of the finished store."""
        return -(-self.n_sequences // self.sequences_per_shard)

    def shard_sequences(self, shard: int) -> range:
        """The sequences whose rows are in a shard."""
        start = shard * self.sequences_per_shard
        return range(start, min(start + self.sequences_per_shard, self.n_sequences))

    def shard_rows(self, shard: int) -> range:
        """The row ids that a shard may use, from the first on."""
        sequences = self.shard_sequences(shard)
        return range(sequences.start * self.rows_per_sequence, sequences.stop * self.rows_per_sequence)

    def site(self, name: str) -> Site:
        """The site of that name; `KeyError` when there is none."""
        return next(site for site in self.sites if site.name == name)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form, the inverse of `from_dict`."""
        plain = {name: getattr(self, name) for name in self.__slots__}
        plain["sites"] = [site.to_dict() for site in self.sites]
        return json.loads(json.dumps(plain, default=dict))  # type: ignore[no-any-return]  # loads is untyped

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> StoreSpec:
        """The spec that `to_dict` wrote."""
        sites = tuple(Site.from_dict(site) for site in plain["sites"])
        return cls(**{**plain, "sites": sites})


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenBlocks:
    """Token sequences in the order in which they are extracted, with where each token came from.

    Packed ones are all T tokens long. One that is shorter ends where its `document` becomes `NO_DOCUMENT` and stays so:
    positions from there on hold no tokens, and get no rows.
    """

    ids: NDArray[np.uint32]
    """`(Q, T)` token ids; may be memory-mapped."""
    document: NDArray[np.uint32]
    """`(Q, T)` number of the text that each token belongs to, `NO_DOCUMENT` after the end of a shorter sequence."""
    description: Mapping[str, Any]
    """How the blocks were made (length, seed, documents read, tokenizer digest, token digest): JSON-able."""

    def __post_init__(self) -> None:
        for name in ("ids", "document"):
            object.__setattr__(self, name, _uint32_array(name, getattr(self, name)))
        if self.ids.ndim != 2 or self.ids.shape != self.document.shape or 0 in self.ids.shape:
            raise ConfigError(
                "token blocks: ids and document must be equal (Q, T) arrays, "
                f"got {self.ids.shape} and {self.document.shape}"
            )

    @property
    def n_sequences(self) -> int:
        """Q."""
        return int(self.ids.shape[0])

    @property
    def sequence_length(self) -> int:
        """T."""
        return int(self.ids.shape[1])

    def lengths(self, sequences: range) -> NDArray[np.int64]:
        """`(q,)` tokens of each of the sequences."""
        return lengths_of(np.asarray(self.document[sequences.start : sequences.stop]))

    def digest(self) -> str:
        """sha256 (hex) of ids and documents, by which a store recognises and verifies its tokens."""
        digest = hashlib.sha256()
        for values in (self.ids, self.document):
            for start in range(0, self.n_sequences, 4096):  # memory-mapped arrays are read piece by piece
                digest.update(np.ascontiguousarray(values[start : start + 4096], dtype="<u4").data)
        return digest.hexdigest()

    def join(self, more: TokenBlocks) -> TokenBlocks:
        """These sequences followed by `more`, in memory; document numbers count within each part."""
        ids, document = (np.concatenate([getattr(self, n), getattr(more, n)]) for n in ("ids", "document"))
        return TokenBlocks(ids=ids, document=document, description=self.description)

    def batches(self, n_sequences: int) -> Iterator[NDArray[np.uint32]]:
        """The ids in order, `n_sequences` at a time (the last batch may be smaller)."""
        for start in range(0, self.n_sequences, n_sequences):
            yield self.ids[start : start + n_sequences]

    def take(self, sequences: range | slice) -> TokenBlocks:
        """Some of the sequences, for instance to hold the last ones out: `blocks.take(slice(-64, None))`."""
        part = sequences if isinstance(sequences, slice) else slice(sequences.start, sequences.stop, sequences.step)
        return TokenBlocks(
            ids=self.ids[part],
            document=self.document[part],
            description={**self.description, "taken": [part.start, part.stop, part.step]},
        )


def _uint32_array(name: str, values: Any) -> NDArray[np.uint32]:
    """Ids or document numbers as a store has them; an array of these is taken as it is, memory-mapped or not."""
    if isinstance(values, np.ndarray) and values.dtype == np.uint32:
        return values
    try:
        array = np.asarray(values.detach().cpu() if hasattr(values, "detach") else values)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"token blocks: {name} must be a (Q, T) array of integers: {error}") from error
    if array.dtype.kind not in "iu":
        raise ConfigError(f"token blocks: {name} must be a (Q, T) array of integers, got {array.dtype}")
    if array.size and not 0 <= int(array.min()) <= int(array.max()) < 1 << 32:
        raise ConfigError(f"token blocks: {name} must be between 0 and 2**32 - 1, got {array.min()} to {array.max()}")
    return array.astype(np.uint32)


def lengths_of(document: NDArray[np.uint32]) -> NDArray[np.int64]:
    """`(q,)` tokens of each of the sequences, from the `(q, T)` document numbers of their positions."""
    lengths: NDArray[np.int64] = (document != NO_DOCUMENT).sum(axis=1, dtype=np.int64)
    return lengths


def expand_names(patterns: Sequence[str], known: Sequence[str]) -> list[str]:
    """Names of `known` that match any of the glob patterns, in the order of `known`.

    Raises:
        SiteError: a pattern matches nothing; the message names the nearest known names.
    """
    wanted: set[str] = set()
    if not isinstance(patterns, str | Iterable):
        raise ConfigError(f"sites must be names or patterns of sites, got {shown(patterns)}")
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        if not isinstance(pattern, str):
            raise ConfigError(f"sites must be names or patterns of sites, got {shown(pattern)} among them")
        matches = [name for name in known if fnmatchcase(name, pattern)]
        if not matches:
            near = difflib.get_close_matches(pattern, known, n=4, cutoff=0.4)
            hint = f"; did you mean {', '.join(near)}?" if near else f"; there are {', '.join(known[:6])}, ..."
            raise SiteError(f"no site matches {pattern!r}{hint}")
        wanted.update(matches)
    return [name for name in known if name in wanted]
