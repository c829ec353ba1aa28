"""Write stories with a language model: ancestral sampling at temperature 1, from the beginning of a text to its end.

    python pipelines/sample_stories.py --model FOLDER_OR_NAME --characters 35e6 --out sampled.jsonl

`--model` is a Hugging Face causal language model, a folder with a `StoriesLM` (what `train_base_lm.py` writes), or
`stories-4l`, the embedded one. `OUT` receives one `{"text": ..., "batch": ...}` a line. A run that was stopped goes on
with the same command: the last batch is made again, so the file ends up the same as without the stop.

A second on one core of a 2026 server processor yields about 4,700 tokens of `stories-4l`, and about 8,000 (those after
a text's end included) of the 260-thousand-parameter Llama of https://huggingface.co/karpathy/tinyllamas.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import cyclopts
import numpy as np
import torch
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from actcache.lm import LanguageModel, load_lm
from actcache.lm.stories import StoriesLM

SHORTEST_STORY = 100
"""Characters; sampled texts that are not longer are mostly broken off by chance."""

Sampler = Callable[[int], list[str]]
"""`sampler(batch)`: the finished texts of that batch, a function of the seed and the batch's number."""


def sampler_of(model: str, *, n_sequences: int, seed: int, length: int) -> Sampler:
    """The sampler for a name or folder: `n_sequences` of at most `length` tokens at once."""
    lm = load_lm(model)
    if isinstance(lm.module, StoriesLM):
        return stories_sampler(lm.module, lm.tokenizer, n_sequences=n_sequences, seed=seed, length=length)
    return huggingface_sampler(lm, n_sequences=n_sequences, seed=seed, length=length)


def stories_sampler(model: StoriesLM, tokenizer: Any, *, n_sequences: int, seed: int, length: int) -> Sampler:
    """Sample a `StoriesLM` as the stream of stories that it was trained on: each sequence holds several, parted by BOS.

    What follows the last BOS of a sequence is not finished, and dropped.
    """
    bos = tokenizer.bos_token_id

    def sample(batch: int) -> list[str]:
        generator = torch.Generator().manual_seed(batch_seed(seed, batch))
        steps = model.sample(n_sequences, bos=bos, max_tokens=length, generator=generator)
        stories = [story for row in torch.stack(list(steps), dim=1).numpy() for story in finished(row, [bos])]
        return list(tokenizer.batch_decode(stories))

    return sample


def finished(row: np.ndarray[Any, Any], ends: Sequence[int]) -> Iterator[list[int]]:
    """The pieces of a token stream that one of the `ends` follows."""
    start = 0
    for stop in np.flatnonzero(np.isin(row, ends)).tolist():
        yield row[start:stop].tolist()
        start = stop + 1


def huggingface_sampler(lm: LanguageModel, *, n_sequences: int, seed: int, length: int) -> Sampler:
    """Sample a Hugging Face causal language model, each text from BOS to EOS, or to the next BOS.

    Some models (llama2.c's among them) never learned an EOS: a text is over when the next one begins. Texts without an
    end are dropped.
    """
    model: Any = lm.module
    tokenizer: Any = lm.tokenizer
    ends = [token for token in (tokenizer.bos_token_id, tokenizer.eos_token_id) if token is not None]

    def sample(batch: int) -> list[str]:
        torch.manual_seed(batch_seed(seed, batch))
        start = torch.full((n_sequences, 1), ends[0])
        ids = model.generate(
            start,
            attention_mask=torch.ones_like(start),
            max_new_tokens=min(length, (lm.n_ctx or length + 1) - 1),
            eos_token_id=ends,
            pad_token_id=ends[-1],
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
        )[:, 1:]
        stories = [piece for row in ids.numpy() for piece in itertools.islice(finished(row, ends), 1)]
        return list(tokenizer.batch_decode(stories, skip_special_tokens=True))

    return sample


def batch_seed(seed: int, batch: int) -> int:
    """A seed of its own for every batch, so that any of them can be made again alone."""
    return int(np.random.SeedSequence([seed, batch]).generate_state(1, np.uint64)[0] >> 1)


def stories_from(sampler: Sampler, first_batch: int = 0) -> Iterator[tuple[int, list[str]]]:
    """Batches of stories worth keeping, without end: longer than `SHORTEST_STORY`, and whole characters only.

    Raises:
        ValueError: five batches in a row hold not one such story, so there is no hope of more.
    """
    n_barren = 0
    for batch in itertools.count(first_batch):
        texts = (text.strip() for text in sampler(batch))
        kept = [text for text in texts if len(text) > SHORTEST_STORY and "\N{REPLACEMENT CHARACTER}" not in text]
        n_barren = 0 if kept else n_barren + 1
        if n_barren == 5:
            raise ValueError(f"the model finishes no story of over {SHORTEST_STORY} characters; is it trained?")
        yield batch, kept


def resume(out: Path) -> tuple[int, int]:
    """Cut an interrupted file back to its last batch that is surely whole; return its characters and the next batch."""
    if not out.exists():
        return 0, 0
    lines = out.read_bytes().splitlines(keepends=True)
    records = [json.loads(line) for line in lines if line.endswith(b"\n")]
    last = max((record["batch"] for record in records), default=0)
    whole = [record for record in records if record["batch"] < last]
    with out.open("r+b") as file:
        file.truncate(sum(map(len, lines[: len(whole)])))
    return sum(len(record["text"]) for record in whole), last


def bar(unit: str) -> Progress:
    """A progress bar with the columns that all pipelines show."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn(f"{{task.completed:,.0f}} {unit}"),
    )
    return Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn())


def main(
    *,
    model: Annotated[str, cyclopts.Parameter(help="Hugging Face name or folder, StoriesLM folder, or stories-4l")],
    characters: Annotated[float, cyclopts.Parameter(help="stop when the stories have that many")],
    out: Annotated[Path, cyclopts.Parameter(help="jsonl file to write, or to go on with")],
    seed: Annotated[int, cyclopts.Parameter(help="seed of all sampling")] = 0,
    batch: Annotated[int, cyclopts.Parameter(help="sequences sampled at once")] = 256,
    length: Annotated[
        int, cyclopts.Parameter(help="most tokens of a sequence; a StoriesLM's holds many stories")
    ] = 2048,
) -> None:
    """Write stories until there are enough of them."""
    done, first = resume(out)
    sampler = sampler_of(model, n_sequences=batch, seed=seed, length=length)
    out.parent.mkdir(parents=True, exist_ok=True)
    with bar("characters") as progress, out.open("a", encoding="utf-8") as file:
        task = progress.add_task("sample", total=characters, completed=done)
        for number, stories in stories_from(sampler, first):
            file.writelines(json.dumps({"text": s, "batch": number}, ensure_ascii=False) + "\n" for s in stories)
            file.flush()
            done += sum(map(len, stories))
            progress.update(task, completed=done)
            if done >= characters:
                break


if __name__ == "__main__":
    cyclopts.run(main)
