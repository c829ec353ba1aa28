"""How `actcache info` draws a store: its sites, and how far each shard is."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

import actcache as ac
from actcache.cli import main
from actcache.cli.store_view import Shards, sites_table
from actcache.store import Store
from actcache.store.reading.views import begun_shards

ROOT = Path(ac.__file__).parent.parent


def drawn(shards: Shards, width: int, *, terminal: bool = True) -> str:
    out = io.StringIO()
    Console(file=out, width=width, force_terminal=terminal, color_system=None).print(shards)
    return out.getvalue()


def test_a_few_shards_have_a_block_each() -> None:
    shards = Shards(10, range(5), {6, 8})
    assert drawn(shards, 80).split("  ") == ["█████░▒░▒░", "█ 5 committed", "▒ 2 begun", "░ 3 missing\n"]
    assert drawn(Shards(3, range(3)), 80) == "███  █ 3 committed\n"


@pytest.mark.parametrize("width", [20, 47, 80, 187])
@pytest.mark.parametrize("n_shards", [1, 10, 100, 101, 9_999, 10_000])
def test_many_shards_share_blocks_and_every_block_is_true(n_shards: int, width: int) -> None:
    committed, begun = set(range(n_shards // 3)) | {n_shards - 1}, {n_shards // 2} - {n_shards - 1}
    shards = Shards(n_shards, committed, begun)
    blocks, per_block = shards.strip(min(width, 100))
    assert len(blocks) <= min(width, 100)
    for i, block in enumerate(blocks):
        here = set(range(i * per_block, min((i + 1) * per_block, n_shards)))
        expected = "█" if here <= committed else "▓" if here & committed else "▒" if here & begun else "░"
        assert block == expected, i
    assert (len(blocks) - 1) * per_block < n_shards <= len(blocks) * per_block
    lines = drawn(shards, width).splitlines()
    assert max(map(len, lines)) <= width
    assert len(lines) <= 2 + 140 // width
    assert (f"{per_block:,} shards in a" in " ".join(" ".join(lines).split())) == (per_block > 1)


def test_a_pipe_gets_numbers() -> None:
    shards = Shards(40, [0, 1, 2, *range(10, 40, 2)], {5})
    said = drawn(shards, 10_000, terminal=False)
    assert said == ("18 committed, 1 begun (5), 21 missing (3-4, 6-9, 11, 13, 15, 17, 19, 21 and 9 more ranges)\n")
    assert drawn(Shards(2, range(2)), 10_000, terminal=False) == "2 committed\n"


def test_shards_of_which_anything_is_there_are_begun(small_store: Store, tmp_path: Path) -> None:
    path = tmp_path / "acts.zarr"
    shutil.copytree(small_store.path, path)
    assert begun_shards(ac.open_store(path)) == set()
    for commit in path.rglob("commit/c.2.0"):  # of every column: written, and not committed
        commit.unlink()
    (path / "rows" / "commit" / "c.1.0").unlink()  # of one column
    root = json.loads((path / "zarr.json").read_text())
    root["attributes"]["actcache"] |= {"state": "open", "fingerprint": None, "digests": []}
    (path / "zarr.json").write_text(json.dumps(root))
    store = ac.open_store(path)
    assert begun_shards(store) == {1, 2}
    for written in path.glob("sites/*/acts/c.2.0"):
        written.unlink()
    assert begun_shards(ac.open_store(path)) == {1}
    (path / "tokens" / "ids" / "writer.shard.2").touch()
    assert begun_shards(ac.open_store(path)) == {1, 2}
    assert not begun_shards(store) & set(store.committed)


@pytest.mark.parametrize(("width", "n_tables"), [(60, 3), (80, 2), (200, 1)])
def test_every_width_shows_codec_dtype_size_and_statistics(small_store: Store, width: int, n_tables: int) -> None:
    info, out = small_store.info(), io.StringIO()
    Console(file=out, width=width).print(sites_table(info["sites"], info["spec"]["dtype"]))
    shown = out.getvalue()
    assert max(map(len, shown.splitlines())) <= width
    assert len(re.findall(r"^ site ", shown, re.MULTILINE)) == n_tables
    for heading in ("codec", "dtype", "on disk", "B/value", "mean norm", "NaN"):
        assert len(re.findall(rf" {heading} ", shown)) == 1
    for name, site in info["sites"].items():
        assert len(re.findall(rf"^ {re.escape(name)} ", shown, re.MULTILINE)) == n_tables
        assert f" {site['bytes_per_activation']:.2f} " in shown


def test_info_in_a_pipe_is_plain(small_store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(small_store.path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(line == line.rstrip() and "\x1b" not in line for line in lines)
    assert any(re.fullmatch(r"shards +\d+ committed", line) for line in lines)
    assert any(re.fullmatch(r"fingerprint +[0-9a-f]{64}", line) for line in lines)


@pytest.mark.parametrize(("encoding", "block"), [("utf-8", "█"), ("ascii", "#")])
def test_a_terminal_without_blocks_gets_letters(small_store: Store, encoding: str, block: str) -> None:
    settings = {"PYTHONIOENCODING": encoding, "COLUMNS": "80", "FORCE_COLOR": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "actcache", "info", str(small_store.path)]
    done = subprocess.run(command, env={**os.environ, **settings}, capture_output=True, timeout=120)
    n_shards = ac.open_store(small_store.path).spec.n_shards
    assert f"{block * n_shards}\x1b" in done.stdout.decode(encoding)
    assert b"\\u2588" not in done.stdout


def test_the_json_of_info_is_what_the_library_says(small_store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(small_store.path), "--json"]) == 0
    said = capsys.readouterr().out
    assert said == json.dumps(ac.open_store(small_store.path).info(), default=str) + "\n"
