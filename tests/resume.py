"""What every iterator of the project must hold: after any batch it goes on elsewhere to the same bits."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import closing
from typing import Any

import torch

MOST_STATE_BYTES = 2000
READ_AHEAD = (0, 1, 5)


Content = tuple[torch.Tensor, dict[str, torch.Tensor]]


def content(batch: Any) -> Content:
    """Row ids (of what other trainers iterate, which are dicts, they may be among the tensors) and tensors by name."""
    return getattr(batch, "rows", torch.empty(0)), {name: batch[name] for name in batch}


def assert_same(left: Content, right: Content) -> None:
    (rows, acts), (other_rows, other_acts) = left, right
    assert torch.equal(rows, other_rows)
    assert list(acts) == list(other_acts)
    assert all(torch.equal(acts[name], other_acts[name]) for name in acts)


def run_test_resume_at_every_batch(make: Callable[..., Any]) -> int:
    """Carry the state after every batch through JSON into fresh iterators, and compare all that is left.

    `make(read_ahead=n)` gives a fresh iterator of the same batches each time: iterable, with `state_dict`,
    `load_state_dict` and `close`, and with a definite end. Gives the number of batches.
    """
    (unbroken, states), *others = [batches_and_states(make(read_ahead=n)) for n in READ_AHEAD]
    for batches, texts in others:
        assert texts == states  # what was made in advance is in no state
        assert_all_same(batches, unbroken)
    for n_taken, text in enumerate(states):
        assert len(text) < MOST_STATE_BYTES
        for read_ahead in READ_AHEAD:
            with closing(make(read_ahead=read_ahead)) as fresh:
                fresh.load_state_dict(json.loads(text))
                assert json.dumps(fresh.state_dict()) == text
                assert_all_same([content(batch) for batch in fresh], unbroken[n_taken:])
    return len(unbroken)


def batches_and_states(iterator: Any) -> tuple[list[Content], list[str]]:
    """All batches; and the states before the first of them and after each."""
    with closing(iterator):
        batches, states = [], [json.dumps(iterator.state_dict())]
        for batch in iterator:
            batches.append(content(batch))
            states.append(json.dumps(iterator.state_dict()))
    return batches, states


def assert_all_same(left: list[Content], right: list[Content]) -> None:
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        assert_same(one, other)
