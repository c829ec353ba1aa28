"""What every iterator of the project must hold: after any batch it goes on elsewhere to the same bits."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import torch

MOST_STATE_BYTES = 2000


def content(batch: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    return batch.rows, {site: batch[site] for site in batch}


def assert_same(left: Any, right: Any) -> None:
    (rows, acts), (other_rows, other_acts) = left, right
    assert torch.equal(rows, other_rows)
    assert list(acts) == list(other_acts)
    assert all(torch.equal(acts[site], other_acts[site]) for site in acts)


def run_test_resume_at_every_batch(make: Callable[..., Any], *, most_state_bytes: int = MOST_STATE_BYTES) -> int:
    """Break off after every batch, carry the state through JSON into a fresh iterator, and compare what is left.

    `make(read_ahead=n)` gives a fresh iterator of the same batches each time: iterable, with `state_dict`,
    `load_state_dict` and `close`, and with a definite end. Gives the number of batches.
    """
    with closing(make(read_ahead=1)) as iterator:
        unbroken = [content(batch) for batch in iterator]
    for n_taken in range(len(unbroken) + 1):
        read_ahead = (1, 2, 5)[n_taken % 3]
        with closing(make(read_ahead=read_ahead)) as first:
            taken: Iterator[Any] = iter(first)
            for expected in unbroken[:n_taken]:
                assert_same(content(next(taken)), expected)
            text = json.dumps(first.state_dict())
        assert len(text) < most_state_bytes
        with closing(make(read_ahead=6 - read_ahead)) as second:
            second.load_state_dict(json.loads(text))
            assert json.dumps(second.state_dict()) == text
            rest = [content(batch) for batch in second]
        assert len(rest) == len(unbroken) - n_taken
        for got, expected in zip(rest, unbroken[n_taken:], strict=True):
            assert_same(got, expected)
    return len(unbroken)
