"""Write the embedded corpus: stories by the embedded model itself, so that no real story is copied.

    python pipelines/make_corpus.py

About four minutes on one core. `actcache/assets/stories-corpus.jsonl.bz2` appears: one `{"text": ...}` a line, at least
a million tokens of the model's tokenizer. Among plain-text formats bzip2 packs such stories best (a million tokens:
3.87 MB as jsonl, 1.17 gzip, 0.87 xz, 0.78 bzip2); token ids do hardly better (1.38 MB at 11 bits each, 0.75 with bzip2
on top) and would tie the corpus to one tokenizer.
"""

from __future__ import annotations

import bz2
import json
from pathlib import Path
from typing import Annotated

import cyclopts
from base_lm_card import load_stories
from sample_stories import bar, sampler_of, stories_from

ASSETS = Path(__file__).parents[1] / "actcache" / "assets"
CORPUS = "stories-corpus.jsonl.bz2"
MAX_BYTES = 2_000_000


def main(
    *,
    model: Annotated[Path, cyclopts.Parameter(help="folder with the embedded model")] = ASSETS / "stories-4l",
    out: Annotated[Path, cyclopts.Parameter(help="compressed jsonl file to write")] = ASSETS
    / "stories-corpus.jsonl.bz2",
    tokens: Annotated[float, cyclopts.Parameter(help="tokens that the corpus has at least, BOS included")] = 1.05e6,
    seed: Annotated[int, cyclopts.Parameter(help="seed of all sampling")] = 0,
    batch: Annotated[int, cyclopts.Parameter(help="sequences sampled at once")] = 256,
    length: Annotated[int, cyclopts.Parameter(help="tokens of a sequence, which holds many stories")] = 2048,
) -> None:
    """Sample until there are enough tokens, then write them all at once."""
    _, tokenizer = load_stories(model)
    stories: list[str] = []
    n_tokens = 0
    with bar("tokens") as progress:
        task = progress.add_task("sample", total=tokens)
        for _, more in stories_from(sampler_of(str(model), n_sequences=batch, seed=seed, length=length)):
            for story in more:
                if n_tokens < tokens:
                    stories.append(story)
                    n_tokens += 1 + len(tokenizer.encode(story).ids)
            progress.update(task, completed=n_tokens)
            if n_tokens >= tokens:
                break
    packed = compress(stories)
    if len(packed) > MAX_BYTES:
        raise SystemExit(f"{len(packed):,} bytes, but the corpus may have {MAX_BYTES:,}; ask for fewer tokens")
    out.write_bytes(packed)
    n_characters = sum(map(len, stories))
    print(f"{out}: {len(stories):,} stories, {n_tokens:,} tokens, {n_characters:,} characters, {len(packed):,} bytes")


def compress(stories: list[str]) -> bytes:
    """The corpus file's bytes."""
    lines = (json.dumps({"text": story}, ensure_ascii=False) + "\n" for story in stories)
    return bz2.compress("".join(lines).encode())


if __name__ == "__main__":
    cyclopts.run(main)
