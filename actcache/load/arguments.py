"""What callers give to loaders and to those who take batches from them, checked at the door.

In: arguments of any kind. Out: the same as the rooms below want them, or one sentence about what was wrong.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from actcache.errors import ConfigError, StoreIncompleteError, first_line
from actcache.files import shown
from actcache.spec import check_number, check_positive
from actcache.store import checked_store

if TYPE_CHECKING:
    import torch

ORDERS = ("shuffled", "sequence")
MOST_LANES, _MOST_READ_AHEAD, _MOST_THREADS = 1 << 16, 1 << 16, 1 << 12
_DTYPES = ("float32", "bfloat16", "float16", "float64")


def check_loader(
    store: Any, order: Any, read_ahead: Any, rank: Any, world_size: Any, optional: Mapping[str, int | None]
) -> None:
    """Raise what `Loader` says, for arguments that are not what it needs."""
    checked_store(store, "loader")
    if not store.sealed:
        raise StoreIncompleteError(
            f"{store.path} has {len(store.committed)} of {store.spec.n_shards} shards; finish 'actcache extract' first"
        )
    check_positive("loader", world_size=world_size)
    check_number("loader", 1, MOST_LANES, world_size=world_size)
    if type(read_ahead) is not int or not 0 <= read_ahead <= _MOST_READ_AHEAD:
        most = _MOST_READ_AHEAD
        raise ConfigError(f"loader: read_ahead must be an integer from 0 to {most}, got {shown(read_ahead)}")
    if type(rank) is not int or not 0 <= rank < world_size:
        most = world_size - 1
        raise ConfigError(f"loader: rank must be between 0 and world_size - 1 = {most}, got {shown(rank)}")
    for name, number in optional.items():
        if number is not None:
            check_positive("loader", **{name: number})
    limits = {"lanes": MOST_LANES, "threads": _MOST_THREADS}
    for name, most in limits.items():
        check_number("loader", 1, most, **{name: optional.get(name) or 1})
    if order not in ORDERS:
        raise ConfigError(f"loader: order must be one of {', '.join(ORDERS)}, got {shown(order)}")


def switch(who: str, name: str, value: Any) -> bool:
    """True or False."""
    if not isinstance(value, int) or value not in (0, 1):
        raise ConfigError(f"{who}: {name} must be True or False, got {shown(value)}")
    return bool(value)


def dtype_of(who: str, given: Any) -> torch.dtype:
    """A floating-point type of torch, which may be named; None is float32."""
    import torch

    found = getattr(torch, given, None) if isinstance(given, str) else given
    found = torch.float32 if given is None else found
    if str(found).removeprefix("torch.") not in _DTYPES or not isinstance(found, torch.dtype):
        raise ConfigError(f"{who}: dtype must be one of torch's {', '.join(_DTYPES)}, got {shown(given)}")
    return found


def device_of(who: str, given: Any) -> torch.device:
    """A device of torch that is there."""
    import torch

    try:
        device = torch.device(given)
        torch.empty(0, device=device)
    except (RuntimeError, TypeError, AssertionError, ValueError, NotImplementedError) as error:
        reason = first_line(error)
        named = shown(str(given) if isinstance(given, torch.device) else given)
        raise ConfigError(f"{who}: device {named} cannot be used here ({reason}); try 'cpu'") from error
    return device
