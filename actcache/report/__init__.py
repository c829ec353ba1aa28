"""Run directory -> one self-contained HTML page. In: `metrics.json`. Out: `report.html`, readable anywhere."""

from typing import TYPE_CHECKING, Any

from actcache.report.record import (
    finite,
    machine,
    read_metrics,
    versions,
    write_metrics,
)

if TYPE_CHECKING:
    from actcache.report.page import render, write_report

__all__ = [
    "finite",
    "machine",
    "read_metrics",
    "render",
    "versions",
    "write_metrics",
    "write_report",
]


def __getattr__(name: str) -> Any:
    # matplotlib and jinja2 load with the first page, not with the first look at a run.
    if name not in ("render", "write_report"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from actcache.report import page

    return getattr(page, name)
