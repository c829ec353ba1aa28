"""Run directory -> one self-contained HTML page. In: `metrics.json`. Out: `report.html`, readable anywhere."""

from typing import TYPE_CHECKING

from actcache._lazy import import_when_used

if TYPE_CHECKING:
    from actcache.report.page import render, write_report

__all__ = ["render", "write_report"]


# matplotlib and jinja2 load with the first page, not with the first look at a run.
__getattr__ = import_when_used(__name__, dict.fromkeys(__all__, "page"))
