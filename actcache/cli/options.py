"""Options that several verbs share, each with its name, its sentence of help and its place among the others.

In: what was typed. Out: a model, token blocks, keywords of the library's functions.

The order is the same in every verb: what it works on, which model, which text, how the store is written, how the
command runs; `--json` is always the last one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Group, Parameter

from actcache.cli.screen import Screen
from actcache.errors import ConfigError
from actcache.source import BosPolicy, ControlTokens, Documents, OnBad, Packing
from actcache.spec import Dtype
from actcache.store.codecs.presets import offered

MODEL, TEXT, STORE, RUN = (
    Group(name, sort_key=place) for place, name in enumerate(("Model", "Text", "Store", "This command"))
)
"""Headings of the options in a verb's help; a verb's own options are above them."""

Flat = Parameter(name="*")
"""A dataclass's fields are options of their own."""
Flag = Annotated[bool, Parameter(show_default=False)]


def _spaced(values: Iterable[str]) -> str:
    return " ".join(values)


_OFFERED = ", ".join(preset.name for preset in offered())
_CODEC = (
    f"Preset ({_OFFERED}), `auto`, or the JSON text of a list of Zarr codecs; for some sites only as 'PATTERN=CODEC', "
    "several times."
)

Strings = Annotated[tuple[str, ...], Parameter(consume_multiple=True, show_default=_spaced)]
ModelName = Annotated[
    str,
    Parameter(help="Base model: `stories-4l` (embedded), a Hugging Face name or folder, or a GGUF file.", group=MODEL),
]
Sites = Annotated[
    Strings,
    Parameter(
        help="Names of sites, or patterns such as 'blocks.*.hook_mlp_out'; \"actcache sites\" lists those of a model, "
        '"actcache info" those of a store.'
    ),
]
NewStore = Annotated[
    str,
    Parameter(
        help="The store to write: a folder ending in .zarr, or a URL such as s3://bucket/name.zarr. An unfinished one "
        "is continued."
    ),
]
Codec = Annotated[Strings, Parameter(help=_CODEC, group=STORE)]
BatchSequences = Annotated[
    int | Literal["auto"] | None,
    Parameter(
        help="Sequences in one forward pass, or `auto`: as many as make this model fast here. By default those of the "
        "store that is continued, or 32. Halved when memory runs out.",
        group=RUN,
    ),
]
BatchRows = Annotated[int, Parameter(help="Rows in a batch.")]
NoAudit = Annotated[
    Flag,
    Parameter(
        help='Seal the store without comparing some of its rows with the plain model (see "actcache audit"). A store '
        "whose audit failed can only be sealed with this option.",
        group=RUN,
    ),
]
NoFsync = Annotated[
    Flag,
    Parameter(
        help="Do not flush what is written to the disk: a little faster, but a power cut can damage finished shards.",
        group=RUN,
    ),
]
Json = Annotated[
    Flag,
    Parameter(help="Print one JSON object on stdout; stderr has events, one JSON object a line.", group=RUN),
]


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """How a base model is opened and run."""

    revision: str | None = None
    """Branch, tag or commit of a Hugging Face name."""
    dtype: Dtype | None = None
    """Element type in which the model computes; by default that of its weights."""
    device: str | None = None
    """Where the model runs: `cpu` (by default), `cuda`, `mps`."""
    autocast: Literal["bfloat16", "float16"] | None = None
    """Run under `torch.autocast` of this type."""
    compile: Flag = False
    """Compile the model with `torch.compile`: the first batches take long, the others are faster."""
    device_map: str | None = None
    """Where the parts of a Hugging Face model go, such as `auto`: over several GPUs, memory and disk (accelerate)."""
    load_in_8bit: Flag = False
    """Open a Hugging Face model in 8 bits (bitsandbytes)."""
    tokenizer: str | None = None
    """Name or folder of a tokenizer, in place of the model's own."""
    trust_remote_code: Flag = False
    """Run the Python files that come with a model or its tokenizer; without this option none is ever run."""

    def open(self, model: str) -> Any:
        """Open that model."""
        from actcache.lm import load_lm

        return load_lm(model, **{field.name: getattr(self, field.name) for field in fields(self)})


@dataclass(frozen=True, kw_only=True)
class StoreFlags:
    """How a store keeps its activations."""

    codec: Codec = ("lossless",)
    dtype: Annotated[Dtype, Parameter(name="--store-dtype")] = "bfloat16"
    """Element type on disk."""
    skip_first: int = 1
    """Leading positions of each sequence that are not kept: those with the least context."""
    seed: int = 0
    """Seed of the shuffle of rows within shards."""
    sequences_per_shard: int | None = None
    """Sequences in a shard, the unit of work; by default 512, fewer where sites are wide."""
    rows_per_chunk: int | None = None
    """Rows in a chunk, the unit of reading; by default half a megabyte of the widest site."""

    def keywords(self) -> dict[str, Any]:
        """Keyword arguments of the library's functions."""
        typed = {field.name: getattr(self, field.name) for field in fields(self)}
        return {**typed, "codec": codecs_by_pattern(self.codec)}


@dataclass(frozen=True, kw_only=True)
class TextOptions:
    """Which text, and how it is cut into sequences."""

    text: str = "stories-corpus"
    """Text, chats or token ids: `stories-corpus` (embedded), a file (txt, json, jsonl, csv, tsv, parquet, arrow, npy;
    text also compressed), a folder or pattern of those, a folder of `save_to_disk`, or a `datasets` name; a dataset
    optionally with `:config`."""
    length: int = 256
    """Tokens in a sequence."""
    count: int | None = None
    """Most sequences to take; by default all that the text gives."""
    split: str | None = None
    """Split of a dataset that has several, by default `train`; a folder has those of its README.md or of the names of
    its files, and `all` takes them all."""
    column: str | None = None
    """Column of the documents; by default the first of text, story, content, messages, conversations, tokens and
    input_ids. It may hold texts, chats or token ids."""
    packing: Packing = "packed"
    """`packed`: documents one after the other, without padding. `documents`: a sequence each, cut at --length."""
    bos: BosPolicy = "auto"
    """Tokens to add: `auto`, as the tokenizer does, none to chats and token ids; `document`, BOS before each document;
    `sequence`, before each sequence too; `none`."""
    chat_template: Path | None = None
    """File with a Jinja template for chats, in place of the tokenizer's own."""
    on_bad: OnBad = "error"
    """An invalid document: `error` ends the run and says where it is, `skip` leaves it out and counts it."""
    control_tokens: ControlTokens = "token"
    """Control tokens that a text spells out: `token` keeps them as such, with a warning; `text` takes their characters
    as text."""
    skip_documents: int = 0
    """Documents to leave out at the beginning, for instance those that a store already has."""
    text_seed: int = 0
    """Seed of the order of sequences."""

    def blocks_for(self, lm: Any, screen: Screen) -> Any:
        """The tokens, of a length that the model takes. Token ids need no tokenizer, so it may be unreadable."""
        lm.check_length(self.length)
        tokenizer, unreadable = None, None
        try:
            tokenizer = lm.tokenizer
        except ConfigError as error:
            unreadable = error
        try:
            return self.blocks(tokenizer, screen)
        except ConfigError:
            if unreadable is not None:
                raise unreadable  # noqa: B904  # it has its own cause
            raise

    def documents(self) -> Documents[Any]:
        """The documents, without those that are left out at the beginning."""
        from actcache.source import read_documents

        if self.skip_documents < 0:
            raise ConfigError(f"--skip-documents must not be negative, got {self.skip_documents}")
        documents = read_documents(self.text, split=self.split, column=self.column, on_bad=self.on_bad)
        return documents.skip(self.skip_documents)

    def blocks(self, tokenizer: Any, screen: Screen) -> Any:
        """The documents as token blocks."""
        from actcache.source import token_blocks

        return token_blocks(
            self.documents(),
            tokenizer,
            length=self.length,
            count=self.count,
            seed=self.text_seed,
            packing=self.packing,
            bos=self.bos,
            chat_template=None if self.chat_template is None else _template(self.chat_template),
            on_bad=self.on_bad,
            control_tokens=self.control_tokens,
            progress=screen.stage("Tokenize text", "sequences"),
        )


FlatRun = Annotated[RunOptions | None, Parameter(name="*", group=MODEL)]
FlatText = Annotated[TextOptions | None, Parameter(name="*", group=TEXT)]
FlatStore = Annotated[StoreFlags | None, Parameter(name="*", group=STORE)]


def _template(path: Path) -> str:
    path = path.expanduser()
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"--chat-template takes a file with a Jinja template, and {path} is unreadable: {error}"
        ) from error


def codecs_by_pattern(typed: Sequence[str]) -> dict[str, str]:
    """`["lossless", "*hook_post=sparse"]` as codecs by pattern; the one for all other sites comes last."""
    of_pattern, of_others = {}, {}
    for text in typed:
        pattern, equals, codec = text.partition("=")
        if equals and not text.lstrip().startswith("["):
            of_pattern[pattern] = codec
        else:
            of_others["*"] = text
    return {**of_pattern, **of_others}


def parse_range(option: str, text: str) -> slice:
    """`START:STOP` as a slice of non-negative numbers; ConfigError for anything else."""
    start, colon, stop = text.partition(":")
    if not colon or not start.isdecimal() or not stop.isdecimal() or int(start) >= int(stop):
        raise ConfigError(f"{option} takes START:STOP, such as 0:1024, not {text!r}")
    return slice(int(start), int(stop))


def parse_part(text: str) -> tuple[int, int]:
    """`I/N` as two numbers; ConfigError for anything else."""
    i, slash, n = text.partition("/")
    if not slash or not i.isdecimal() or not n.isdecimal():
        raise ConfigError(f"--part takes I/N, such as 1/4 for the first of four, not {text!r}")
    return int(i), int(n)
