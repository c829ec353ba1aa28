"""Options that several verbs share: which base model, which text.

In: what was typed. Out: a model, token blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from typing import Annotated, Any

from cyclopts import Parameter

from actcache.cli.screen import Screen
from actcache.spec import Dtype

Flat = Parameter(name="*")
"""A dataclass's fields are options of their own."""

Flag = Annotated[bool, Parameter(show_default=False)]
Strings = Annotated[list[str], Parameter(consume_multiple=True)]


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Which base model, and how it runs."""

    model: str = "stories-4l"
    """Base model: `stories-4l` (embedded), a Hugging Face name or folder."""
    revision: str | None = None
    """Branch, tag or commit of a Hugging Face name."""
    model_dtype: Dtype | None = None
    """Element type in which the model computes; by default that of its weights."""
    device: str = "cpu"
    """Where the model runs: `cpu`, `cuda`, `mps`."""

    def load(self) -> Any:
        """The model."""
        from actcache.lm import load_lm

        return load_lm(self.model, dtype=self.model_dtype, device=self.device, revision=self.revision)


@dataclass(frozen=True, kw_only=True)
class TextOptions:
    """Which text, and how it is cut into sequences."""

    text: str = "stories-corpus"
    """Text: `stories-corpus` (embedded), a text, jsonl or parquet file, a folder of those, or a `datasets` name."""
    length: int = 256
    """Tokens of a sequence."""
    count: int | None = None
    """Sequences at most; by default all that the text gives."""
    split: str = "train"
    """Split of a `datasets` name."""
    column: str | None = None
    """Column of the text; by default the first of text, story, content."""
    skip_documents: int = 0
    """Documents left out at the beginning, for instance those that a store was already made from."""
    text_seed: int = 0
    """Seed of the order of sequences."""

    def blocks(self, tokenizer: Any, screen: Screen) -> Any:
        """The tokens."""
        from actcache.source import read_texts, token_blocks

        texts = islice(read_texts(self.text, split=self.split, column=self.column), self.skip_documents, None)
        progress = screen.stage("Tokenize text", "sequences")
        return token_blocks(
            texts, tokenizer, length=self.length, count=self.count, seed=self.text_seed, progress=progress
        )
