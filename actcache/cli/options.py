"""Options that several verbs share: which base model, which text.

In: what was typed. Out: a model, token blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from actcache.cli.screen import Screen
from actcache.errors import ConfigError
from actcache.source import BosPolicy, ControlTokens, Documents, OnBad, Packing
from actcache.spec import Dtype

Flat = Parameter(name="*")
"""A dataclass's fields are options of their own."""

Flag = Annotated[bool, Parameter(show_default=False)]
Strings = Annotated[list[str], Parameter(consume_multiple=True)]


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
    """Run the Python files that come with a model or its tokenizer; without it none ever runs."""

    def open(self, model: str) -> Any:
        """That model."""
        from actcache.lm import load_lm

        options = {field.name: getattr(self, field.name) for field in fields(RunOptions)}
        return load_lm(model, **options)


@dataclass(frozen=True, kw_only=True)
class ModelOptions(RunOptions):
    """Which base model, and how it runs."""

    model: str = "stories-4l"
    """Base model: `stories-4l` (embedded), a Hugging Face name or folder, or a GGUF file."""

    def load(self) -> Any:
        """The model."""
        return self.open(self.model)


@dataclass(frozen=True, kw_only=True)
class TextOptions:
    """Which text, and how it is cut into sequences."""

    text: str = "stories-corpus"
    """Text, chats or token ids: `stories-corpus` (embedded), a file (txt, json, jsonl, csv, tsv, parquet, arrow, npy;
    text also compressed), a folder or pattern of those, a folder of `save_to_disk`, or a `datasets` name; a dataset
    optionally with `:config`."""
    length: int = 256
    """Tokens of a sequence."""
    count: int | None = None
    """Sequences at most; by default all that the text gives."""
    split: str | None = None
    """Split of a dataset that has several, by default train; of a folder by its README.md or the names of its files,
    where `all` takes all."""
    column: str | None = None
    """Column of the documents; by default the first of text, story, content, messages, conversations, tokens and
    input_ids. What it holds decides: texts, chats or token ids."""
    packing: Packing = "packed"
    """`packed`: documents one after the other, no padding. `documents`: a sequence each, cut at --length."""
    bos: BosPolicy = "auto"
    """Tokens added: `auto` as the tokenizer does, nothing to chats and token ids; `document`: BOS before each document;
    `sequence`: before each sequence too; `none`."""
    chat_template: Path | None = None
    """File with a Jinja template for chats, in place of the tokenizer's own."""
    on_bad: OnBad = "error"
    """A document that is not valid: `error` ends the run and says where it lies, `skip` leaves it out and counts it."""
    control_tokens: ControlTokens = "token"
    """Control tokens that a text spells: `token`, as tokenizers do, with a warning; `text`: the characters that they
    are."""
    skip_documents: int = 0
    """Documents left out at the beginning, for instance those that a store was already made from."""
    text_seed: int = 0
    """Seed of the order of sequences."""

    def blocks_for(self, lm: Any, screen: Screen) -> Any:
        """The tokens, of a length that the model takes. A tokenizer that cannot be read is no matter to token ids."""
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
                raise unreadable  # noqa: B904  # what it comes from is in it
            raise

    def documents(self) -> Documents[Any]:
        """The documents, without those to be left out at the beginning."""
        from actcache.source import read_documents

        if self.skip_documents < 0:
            raise ConfigError(f"--skip-documents must not be negative, got {self.skip_documents}")
        documents = read_documents(self.text, split=self.split, column=self.column, on_bad=self.on_bad)
        return documents.skip(self.skip_documents)

    def blocks(self, tokenizer: Any, screen: Screen) -> Any:
        """The tokens."""
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


def _template(path: Path) -> str:
    path = path.expanduser()
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(f"--chat-template takes a file with a Jinja template, and {path} is none: {error}") from error


def codecs_by_pattern(given: Sequence[str]) -> dict[str, str]:
    """`["lossless", "*hook_post=sparse"]` as patterns and codecs, the named ones first."""
    named, everywhere = {}, {}
    for text in given:
        pattern, equals, codec = text.partition("=")
        if equals and not text.lstrip().startswith("["):
            named[pattern] = codec
        else:
            everywhere["*"] = text
    return {**named, **everywhere}


def stretch(option: str, text: str) -> slice:
    """`START:STOP` as a slice of non-negative numbers."""
    start, colon, stop = text.partition(":")
    if not colon or not start.isdecimal() or not stop.isdecimal() or int(start) >= int(stop):
        raise ConfigError(f"{option} takes START:STOP, such as 0:1024, not {text!r}")
    return slice(int(start), int(stop))


def part_of(text: str) -> tuple[int, int]:
    """`I/N` as two numbers."""
    i, slash, n = text.partition("/")
    if not slash or not i.isdecimal() or not n.isdecimal():
        raise ConfigError(f"--part takes I/N, such as 1/4 for the first of four, not {text!r}")
    return int(i), int(n)
