"""Run directory -> one self-contained HTML page. In: `metrics.json`. Out: `report.html`, readable anywhere."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from actcache.report.page import render, write_report

__all__ = ["render", "write_report"]


def __getattr__(name: str) -> Any:
    # matplotlib and jinja2 load with the first page, not with the first look at a run.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from actcache.report import page

    return getattr(page, name)
