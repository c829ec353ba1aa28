"""Whatever `metrics.json` holds: a page that shows it as text, or one sentence and the page as it was."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_report import metrics_of

from actcache.cli import main
from actcache.errors import ActcacheError, ConfigError, RunNotFoundError, StateError
from actcache.report import write_report
from actcache.sparse import schema
from actcache.sparse.metrics import DensityHistogram, LayerRow, Metrics, Stage, read_metrics

SOUND = metrics_of(1)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where something stands; of long lists the first two places."""
    if isinstance(value, dict):
        inside = list(value.items())
    else:
        inside = list(enumerate(value[:2])) if isinstance(value, list) else []
    for key, item in inside:
        yield (*path, key)
        yield from places(item, (*path, key))


def changed(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    """A copy with something else in a place."""
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = changed(copy[path[0]], path[1:], new)
    return copy


VALUES = [
    *(
        None,
        True,
        -1,
        0,
        10**30,
        10**400,
        -1.5,
        1e308,
        float("nan"),
        float("inf"),
        "",
        "$\\frac{$",
        "\ud800",
        "#200001",
    ),
    *([], {}, [[]], [None], {"a": [1]}, "<script>alert(1)</script>", "x" * 5000),
]


@settings(max_examples=12, deadline=None)
@given(path=st.sampled_from(list(places(SOUND))), value=st.sampled_from(VALUES))
def test_every_value_everywhere_is_a_page_or_one_sentence(tmp_path_factory, path, value):
    run = tmp_path_factory.mktemp("run")
    (run / "metrics.json").write_text(json.dumps(changed(SOUND, path, value)))
    (run / "report.html").write_text("the page before")
    try:
        page = write_report(run).read_text()
    except StateError as error:
        assert "metrics.json" in str(error)  # noqa: PT017  # either is right
        assert "\n" not in str(error)  # noqa: PT017
        assert (run / "report.html").read_text() == "the page before"
        return
    assert "<script" not in page


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not valid JSON"),
        (b"[]", "should be a JSON object"),
        (b"[" * 100_000, "is nested too deep"),
        (b'{"model":' + b"[" * 400 + b"]" * 400 + b"}", "nested too deep|which should be an object"),
        (b"\xff\xfe{}", "is not valid JSON"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b'{"format": 2}', "newer actcache"),
        (b'{"format": "1"}', "'1' for its format"),
        (b'{"format": true}', "True for its format"),
        (b'{"format": 1e9}', "for its format"),
        (b'{"layers": 5}', "layers is 5, which should be a list"),
        (b'{"layers": [null]}', r"layers\[0\] is None"),
        (b'{"layers": [{}]}', r"layers\[0\]\.layer is missing"),
        (b'{"store": {"n_rows": "many"}}', r"store\.n_rows is 'many', which should be a number"),
        (b'{"stages": {"extract": {"seconds": Infinity}}}', r"stages\.extract\.seconds is missing"),
        (b'{"seconds": 1' + b"0" * 400 + b"}", "seconds is 1000"),
    ],
)
def test_what_is_no_record_of_a_run_is_said_where_and_how(tmp_path, content, message, capsys):
    (tmp_path / "metrics.json").write_bytes(content)
    with pytest.raises(StateError, match=message) as caught:
        read_metrics(tmp_path)
    assert len(str(caught.value)) < 500
    for verb in ("report", "evaluate"):
        assert main([verb, str(tmp_path)]) == 1
        shown = capsys.readouterr()
        assert shown.out == ""
        assert "metrics.json" in shown.err
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.json"]


def test_edges_of_a_histogram_cannot_ask_for_more_than_there_are(tmp_path):
    wide = changed(SOUND, ("layers", 0, "density_histogram"), {"log10_edges": [-1e12, 0], "counts": [1], "n_never": 0})
    (tmp_path / "metrics.json").write_text(json.dumps(wide))
    with pytest.raises(StateError, match=r"log10_edges\[0\] is -1000000000000\.0, which should be a power"):
        write_report(tmp_path)


def test_names_are_text_on_the_page_whatever_they_are(tmp_path):
    name = "</title><script>$\\frac{1}{$ & \"'<b>"
    metrics = changed(changed(SOUND, ("layers", 0, "layer"), name), ("layers", 0, "site_out"), name)
    metrics = changed(metrics, ("store", "sites"), {name: next(iter(SOUND["store"]["sites"].values()))})
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    page = write_report(tmp_path).read_text()
    assert "<script" not in page
    assert page.count("</title>") == 1
    assert "&lt;script&gt;" in page


def test_runs_that_are_none_are_said(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder" / "metrics.json").mkdir(parents=True)
    for run, error in [
        (tmp_path / "missing", RunNotFoundError),
        (tmp_path / "file", RunNotFoundError),
        (tmp_path / "folder", StateError),
        ("", ConfigError),
        (None, ConfigError),
        (5, ConfigError),
        ("~nobody-here/run", ConfigError),
        ("a\0b", ConfigError),
    ]:
        with pytest.raises(error) as caught:
            write_report(run)
        assert isinstance(caught.value, ActcacheError)


def test_the_home_folder_has_a_short_name(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "metrics.json").write_text(json.dumps(SOUND))
    assert write_report("~") == tmp_path / "report.html"


@pytest.mark.parametrize(
    ("record", "checked"),
    [
        (Metrics, schema._METRICS),
        (LayerRow, schema._ROW),
        (Stage, schema._METRICS["stages"][schema._EACH]),
        (DensityHistogram, schema._ROW["density_histogram"]),
    ],
)
def test_a_reader_checks_only_what_the_record_has(record: Any, checked: dict[str, Any]) -> None:
    assert {name.removesuffix("!") for name in checked} <= record.__annotations__.keys()
