"""The report page: everything of the run is on it, nothing is fetched, and a browser shows it."""

from __future__ import annotations

import math
import re
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from actcache.errors import RunNotFoundError, StateError
from actcache.formats import NOTHING, duration, number, percent, plain, size
from actcache.report import render, write_report
from actcache.sparse.metrics import read_metrics, write_metrics


def history(layer: int, n_points: int = 60) -> dict[str, list[float]]:
    steps = [20 * i for i in range(n_points)]
    decay = [math.exp(-i / (9 + 2 * layer)) for i in range(n_points)]
    fvu = [0.02 * (layer + 1) + 0.9 * d + 0.004 * math.sin(3.7 * i) for i, d in enumerate(decay)]
    return {
        "step": [float(s) for s in steps],
        "fvu": fvu,
        "loss": [f + 0.05 + 0.1 * d for f, d in zip(fvu, decay, strict=True)],
        "l0": [38 + 16 * layer + 420 * d for d in decay],
    }


def layer_row(layer: int) -> dict[str, Any]:
    clean, ablated, recovered = 1.731, (4.62, 2.18, 2.05, 2.71)[layer % 4], (0.997, 0.981, 0.966, 0.942)[layer % 4]
    bell = [round(180 * math.exp(-((x + 1.9 + 0.15 * layer) ** 2) / 0.9)) for x in (-6 + 0.25 * i for i in range(24))]
    return {
        "layer": layer,
        "site_in": f"blocks.{layer}.mlp.hook_in",
        "site_out": f"blocks.{layer}.hook_mlp_out",
        "n_latents": 1024,
        "path": f"runs/demo/sparse/layer_{layer}",
        "clean": clean,
        "zero_ablated": ablated,
        "mean_ablated": ablated - 0.1,
        "spliced": ablated - recovered * (ablated - clean),
        "loss_recovered": recovered,
        "l0": 38.2 + 16 * layer,
        "fvu": 0.021 * (layer + 1),
        "dead_fraction": 0.01 * layer,
        "history": history(layer),
        "density_histogram": {"log10_edges": [-6 + 0.25 * i for i in range(25)], "counts": bell, "n_never": 10 * layer},
    }


def metrics_of(n_layers: int = 4) -> dict[str, Any]:
    names = [f"blocks.{i}.{end}" for i in range(n_layers) for end in ("mlp.hook_in", "hook_mlp_out")]
    sites = {
        name: {
            "shape": [128],
            "bytes": 196_000_000,
            "bytes_per_activation": 1.46,
            "ratio": 0.73,
            "n_nan": 0,
            "n_inf": 0,
        }
        for name in names
    }
    return {
        "created": "2026-03-14T15:09:26+00:00",
        "command": "actcache demo",
        "seconds": 214.7,
        "model": {"name": "stories-4l", "weights": "3f" * 32, "tokenizer": "a9" * 32, "dtype": "float32"},
        "text": {"source": "embedded corpus", "n_documents": 5321, "n_tokens": 1_092_112, "length": 256, "seed": 0},
        "store": {
            "path": "runs/demo/acts.zarr",
            "fingerprint": "5e" * 32,
            "state": "sealed",
            "n_rows": 1_044_480,
            "n_shards": 16,
            "bytes": 1_581_000_000,
            "raw_bytes": 2_139_095_040,
            "compression_ratio": 0.73,
            "bytes_per_activation": 1.46,
            "codec": "lossless",
            "sites": sites,
            "spec": {
                "dtype": "bfloat16",
                "n_sequences": 4096,
                "sequence_length": 256,
                "skip_first": 1,
            },
        },
        "training": {"n_steps": 1200, "batch_rows": 2048, "lr": 0.003, "l1": [2.0, 4.0, 4.0, 4.0], "seed": 0},
        "layers": [layer_row(i) for i in range(n_layers)],
        "stages": {
            "text": {"seconds": 3.1, "tokens_per_s": 352_000.0, "reused": False},
            "extract": {
                "seconds": 21.4,
                "tokens_per_s": 51_200.0,
                "bytes_per_s": 1.0e8,
                "reused": True,
                "made_in_s": 21.4,
            },
            "train": {"seconds": 168.9, "rows_per_s": 58_200.0, "reused": False},
            "evaluate": {"seconds": 14.2, "tokens_per_s": 31_000.0, "reused": False},
        },
        "machine": {
            "processor": "Example CPU @ 2.40GHz",
            "cores": 2,
            "system": "Linux 6.1",
            "memory_bytes": 8_000_000_000,
        },
        "versions": {"python": "3.11.9", "actcache": "0.1.0", "torch": "2.13.0", "zarr": "3.1.6"},
    }


class Visible(HTMLParser):
    """Collects the text and every attribute of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.text, self.tags, self.links, self.ids = "", [], [], []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.ids += [value for name, value in attrs if name == "id"]
        self.links += [
            value for name, value in attrs if name in ("src", "href", "xlink:href", "srcset", "data", "action")
        ]

    def handle_data(self, data: str) -> None:
        self.text += data


def seen(page: str) -> Visible:
    parser = Visible()
    parser.feed(page)
    return parser


def squeeze(text: str) -> str:
    return re.sub(r"\s+", " ", text)


def test_page_shows_every_number_of_the_results_table() -> None:
    metrics = metrics_of()
    text = squeeze(seen(render(metrics)).text)
    for row in metrics["layers"]:
        for key in ("clean", "zero_ablated", "spliced", "fvu"):
            assert f"{row[key]:.3f}" in text
        assert f"{100 * row['loss_recovered']:.1f} %" in text
        assert f"{row['l0']:.1f}" in text
    for word in (
        "stories-4l",
        "blocks.3.hook_mlp_out",
        "actcache demo",
        "2.13.0",
        "Example CPU",
        "58,200 rows/s",
        "1.46",
    ):
        assert word in text
    assert "reused, made in 21 s" in text
    assert "14 March 2026" in text


def test_page_needs_nothing_from_outside_and_no_script() -> None:
    page = render(metrics_of())
    parser = seen(page)
    assert all(link.startswith("#") for link in parser.links)
    assert not {"script", "link", "iframe", "img", "object"} & set(parser.tags)
    assert "://" not in page
    assert "@import" not in page
    # And the browser is told to refuse whatever slipped through.
    assert "default-src 'none'; style-src 'unsafe-inline'" in page
    assert set(re.findall(r"url\((.)", page)) <= {"#"}


def test_ids_are_unique_and_every_reference_is_answered() -> None:
    page = render(metrics_of())
    parser = seen(page)
    assert len(parser.ids) == len(set(parser.ids))
    wanted = {link.removeprefix("#") for link in parser.links} | set(re.findall(r"url\(#([^)]+)\)", page))
    assert wanted <= set(parser.ids)


def test_words_of_the_run_are_escaped() -> None:
    metrics = metrics_of(1)
    metrics["model"]["name"] = "<script>alert(1)</script>"
    metrics["layers"][0]["layer"] = '"><blink>'
    page = render(metrics)
    assert "<script" not in page
    assert '"><blink>' not in page


@pytest.mark.parametrize(
    "missing", ["layers", "stages", "store", "model", "machine", "versions", "training", "text", "seconds"]
)
def test_a_part_that_was_not_run_is_left_out(missing: str) -> None:
    metrics = metrics_of(1)
    del metrics[missing]
    assert "</html>" in render(metrics)


def test_layers_that_are_only_trained_show_dashes() -> None:
    metrics = metrics_of(2)
    for key in ("clean", "zero_ablated", "spliced", "loss_recovered", "density_histogram"):
        del metrics["layers"][1][key]
    text = squeeze(seen(render(metrics)).text)
    assert NOTHING in text
    assert "Training loss" in text


def test_a_diverged_run_still_has_a_page(tmp_path: Path) -> None:
    metrics = metrics_of(1)
    metrics["layers"][0]["history"]["fvu"][30:] = [math.nan] * 30
    metrics["layers"][0]["history"]["loss"] = [math.inf] * 60
    metrics["layers"][0]["fvu"] = math.nan
    write_metrics(tmp_path, metrics)
    assert "</html>" in write_report(tmp_path).read_text()


def test_twelve_layers_have_twelve_colours() -> None:
    metrics = metrics_of(12)
    for row in metrics["layers"]:
        del row["history"], row["density_histogram"]
    page = render(metrics)
    assert {f"--layer-{i}:" for i in range(12)} <= set(re.findall(r"--layer-\d+:", page))
    assert "var(--layer-11)" in page


def test_metrics_survive_writing_and_reading(tmp_path: Path) -> None:
    metrics = metrics_of(2)
    write_metrics(tmp_path / "run", metrics)
    assert read_metrics(tmp_path / "run") == {"format": 1, **metrics}
    assert [file.name for file in (tmp_path / "run").iterdir()] == ["metrics.json"]


def test_no_run_newer_run_and_broken_run_are_said_so(tmp_path: Path) -> None:
    with pytest.raises(RunNotFoundError, match="no run at"):
        write_report(tmp_path / "nowhere")
    (tmp_path / "metrics.json").write_text('{"format": 99}')
    with pytest.raises(StateError, match="newer"):
        write_report(tmp_path)
    (tmp_path / "metrics.json").write_text('{"format"')
    with pytest.raises(StateError, match="not valid JSON"):
        write_report(tmp_path)


@pytest.mark.parametrize(
    ("function", "value", "text"),
    [
        (duration, 0.0371, "37 ms"),
        (duration, 0.84, "0.8 s"),
        (duration, 41.3, "41 s"),
        (duration, 59.7, "1 min 00 s"),
        (duration, 125, "2 min 05 s"),
        (duration, 11_220, "3 h 07 min"),
        (size, 0, "0 B"),
        (size, 999, "999 B"),
        (size, 1000, "1.00 kB"),
        (size, 999_960, "1.00 MB"),
        (size, 1.072e9, "1.07 GB"),
        (size, 42e12, "42.0 TB"),
        (number, 0.0213, "0.021"),
        (number, 54.7, "54.7"),
        (number, 1234.0, "1,234"),
        (number, 3e-5, "3e-05"),
        (percent, 0.98234, "98.2 %"),
        (percent, None, NOTHING),
        (plain, {"lr": 0.003, "l1": [2.0, 4.0], "on": True}, "lr 0.003, l1 2, 4, on yes"),
        (plain, "ab" * 32, "abababababab…"),
    ],
)
def test_numbers_as_people_read_them(function: Callable[[Any], str], value: Any, text: str) -> None:
    assert function(value) == text


@pytest.mark.exhaustive
def test_a_browser_shows_the_page(tmp_path: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no chromium or google-chrome on this machine")
    write_metrics(tmp_path / "run", metrics_of())
    page = write_report(tmp_path / "run")
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    flags += " --disable-component-update --disable-sync --dump-dom"
    command = [browser, *flags.split(), f"--user-data-dir={tmp_path}/profile", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=True)
    shown = seen(done.stdout)
    assert "of the loss recovered in stories-4l" in shown.text
    assert shown.tags.count("svg") == 2 + 4 * 4
    assert "99.7 %" in shown.text
