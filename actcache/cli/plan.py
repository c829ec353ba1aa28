"""The verb `plan`: what an extraction is going to cost.

In: options, documented where they are defined. Out: a result on stdout (`--json`: one object), an exit code.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from actcache import formats
from actcache.cli.options import RUN, STORE, TEXT, Codec, FlatRun, Json, ModelName, RunOptions, Sites, StoreFlags
from actcache.cli.options import TextOptions as TextOfOtherVerbs
from actcache.cli.plan_view import show_plan
from actcache.cli.screen import Screen
from actcache.errors import ConfigError
from actcache.store_options import StoreOptions

if TYPE_CHECKING:
    from actcache.spec import TokenBlocks

_WHOLE_TOKENS = 1 << 22
"""Longest text that is tokenized whole; of a longer one so many tokens, and the rest is estimated."""
_SAMPLE_TOKENS = 1 << 18
"""Tokens to measure with where the number of tokens is given."""


@dataclass(frozen=True, kw_only=True)
class _TextOptions(TextOfOtherVerbs):
    """As for other verbs, but for the text itself, which is an argument here."""

    __module__ = TextOfOtherVerbs.__module__  # where the types of the inherited options are known

    text: Annotated[str, Parameter(parse=False)] = ""


@dataclass(frozen=True, kw_only=True)
class _StoreFlags(StoreFlags):
    """As for other verbs, but for what a plan does not depend on: it tries every codec, and seeds cost nothing."""

    __module__ = StoreFlags.__module__

    codec: Annotated[Codec, Parameter(parse=False)] = ("lossless",)
    seed: Annotated[int, Parameter(parse=False)] = 0


def plan(
    model: ModelName,
    text: Annotated[str, Parameter(group=TEXT)],
    sites: Sites,
    *,
    out: str | None = None,
    run: FlatRun = None,
    cut: Annotated[_TextOptions | None, Parameter(name="*", group=TEXT)] = None,
    tokens: Annotated[int | None, Parameter(group=TEXT)] = None,
    options: Annotated[_StoreFlags | None, Parameter(name="*", group=STORE)] = None,
    batch_sequences: Annotated[int | Literal["auto"], Parameter(group=RUN)] = 32,
    workers: int = 1,
    price_per_tb: float = 20.0,
    price_per_hour: float | None = None,
    months: float = 1.0,
    epochs: int = 10,
    read_mb_per_s: float | None = None,
    seconds: float = 20.0,
    sample_sequences: int | None = None,
    json: Json = False,
) -> int:
    """Estimate what an extraction will cost before it runs: bytes, time, memory, money, and when it pays off.

    A few batches run through the model, and are encoded and read with every preset in a temporary folder; everything
    else is computed from that. Each number comes with a range, which says how much these batches differ.

    Parameters
    ----------
    text
        Text, chats or token ids: `stories-corpus` (embedded), a file, a folder, or a `datasets` name, which needs
        --count or --tokens, because it is not read whole.
    out
        Where the store is going to be, to see whether it fits. Nothing is written there.
    tokens
        Plan for this many tokens, whatever the length of the text, which is only a sample.
    batch_sequences
        Sequences in one forward pass, or `auto`: as many as make this model fast here.
    workers
        Plan for this many processes that share the work, each with a machine like this one.
    price_per_tb
        US dollars for a terabyte of storage per month.
    price_per_hour
        US dollars for an hour of one worker.
    months
        How long the store is kept.
    epochs
        How often the activations are going to be used.
    read_mb_per_s
        Megabytes per second that the disk or network gives a reader; by default only decoding limits reading.
    seconds
        About how long to measure; a slow model takes longer.
    sample_sequences
        Measure on this many sequences (one shard at most), however long it takes; by default on as many as --seconds
        allows.
    """
    from actcache.estimate import Terms
    from actcache.estimate import plan as make_plan

    with Screen(json=json) as screen:
        lm = (run or RunOptions()).open(model)
        kept, asked = options or _StoreFlags(), replace(cut or _TextOptions(), text=text)
        lm.resolve(sites, length=asked.length)  # a mistyped name is reported before minutes are spent on the text
        blocks, n_tokens = _text(asked, lm, screen, tokens)
        found = make_plan(
            lm,
            blocks,
            sites,
            options=StoreOptions(
                dtype=kept.dtype,
                skip_first=kept.skip_first,
                sequences_per_shard=kept.sequences_per_shard,
                rows_per_chunk=kept.rows_per_chunk,
            ),
            terms=Terms(
                price_per_tb_month=price_per_tb,
                compute_price_per_hour=price_per_hour,
                months=months,
                epochs=epochs,
                read_bytes_per_s=None if read_mb_per_s is None else 1e6 * read_mb_per_s,
            ),
            out=out,
            batch_sequences=batch_sequences,
            n_tokens=n_tokens,
            workers=workers,
            time_budget_s=seconds,
            sample_sequences=sample_sequences,
        )
        screen.result(found.to_dict(), lambda out: show_plan(out, found))
    return 0


def _text(options: TextOfOtherVerbs, lm: Any, screen: Screen, tokens: int | None) -> tuple[TokenBlocks, int | None]:
    """Tokens to measure with, and how many tokens there are in all, if those are only a part.

    Raises:
        ConfigError: the text is a stream, and neither --count nor --tokens says how much of it.
    """
    from actcache.source import is_streamed

    if options.count is None and tokens is None and is_streamed(options.text):
        raise ConfigError(
            f"{options.text} is streamed, and counting its tokens would mean reading it to the end; say how many "
            "sequences to take with --count, or how many tokens with --tokens"
        )
    enough = max(1, (_WHOLE_TOKENS if tokens is None else _SAMPLE_TOKENS) // max(1, options.length))
    limit = enough if options.count is None else min(options.count, enough)
    with warnings.catch_warnings():
        if limit != options.count:  # the limit is ours
            warnings.filterwarnings("ignore", message="asked for")
        blocks: TokenBlocks = replace(options, count=limit).blocks_for(lm, screen)
    if tokens is not None:
        return blocks, tokens
    if blocks.n_sequences < limit or limit == options.count:
        return blocks, None
    there = int(blocks.lengths(range(blocks.n_sequences)).sum())
    if options.count is not None:
        screen.say(f"measured on {limit:,} sequences, as if the text had all {options.count:,}")
        return blocks, there * options.count // limit
    share = _share_read(options, blocks.description["n_documents"], screen)
    screen.say(f"the tokens were counted in {formats.percent(share)} of the text; the total is estimated from that")
    return blocks, round(there / share)


def _share_read(options: TextOfOtherVerbs, n_documents: int, screen: Screen) -> float:
    """Share of a text that its first documents are, by characters (for token ids: by their number)."""
    progress = screen.stage("Read text", "documents")
    head = whole = n_read = 0
    for document in options.documents():
        size = _size(document)
        whole += size
        n_read += size > 0
        head = whole if n_read <= n_documents else head
        if n_read % 4096 == 0:
            progress(n_read, n_read)
    return head / max(1, whole)


def _size(document: Any) -> int:
    """Characters of a text or of a chat's messages, or the number of token ids."""
    if isinstance(document, str):
        return 0 if document.isspace() else len(document)
    if len(document) and isinstance(document[0], Mapping):
        return sum(len(value) for message in document for value in message.values() if isinstance(value, str))
    return len(document)
