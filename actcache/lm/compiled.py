"""`torch.compile` around hooks: what lies between the sites is compiled, the sites themselves are not.

A module's hooks run outside of its `forward`. So the `forward` of a module that has no hooked module inside may be
compiled, even if its own input or output is hooked, and a hook may still leave the forward pass early.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


class CompiledParts:
    """The compiled parts of a model, made when they are first needed and kept.

    They are compiled for the length of the first batch, and once more for any length when another comes (torch's
    default).
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._forwards: dict[nn.Module, Callable[..., Any]] = {}
        self._parts: dict[frozenset[nn.Module], list[nn.Module]] = {}

    @contextmanager
    def outside(self, hooked: Collection[nn.Module]) -> Iterator[None]:
        """While active, the largest modules that have no hooked module strictly inside run compiled."""
        key = frozenset(hooked)
        if key not in self._parts:
            self._parts[key] = largest_parts_without(self._module, key)
        before = [(part, part.__dict__.get("forward")) for part in self._parts[key]]
        try:
            for part, _ in before:
                part.forward = self._compiled(part)
            yield
        finally:
            for part, forward in before:
                if forward is None:
                    part.__dict__.pop("forward", None)
                else:
                    part.forward = forward

    def _compiled(self, part: nn.Module) -> Callable[..., Any]:
        if part not in self._forwards:
            self._forwards[part] = torch.compile(part.forward)
        return self._forwards[part]


def largest_parts_without(module: nn.Module, hooked: Collection[nn.Module]) -> list[nn.Module]:
    """The largest submodules that are worth compiling and contain none of `hooked`."""
    inside = list(module.modules())[1:]
    if _runs(module) and not any(m in hooked for m in inside):
        return [module] if inside or not type(module).__module__.startswith("torch.nn.") else []
    found = [part for child in module.children() for part in largest_parts_without(child, hooked)]
    return list(dict.fromkeys(found))


def _runs(module: nn.Module) -> bool:
    """Whether it has a forward pass of its own; lists of modules have none."""
    return type(module).forward is not nn.Module.forward
