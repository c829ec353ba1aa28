"""Watching an extraction: bars on a terminal, lines in a log, events for programs, and Ctrl-C. Real processes."""

from __future__ import annotations

import fcntl
import io
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import random_blocks
from rich.console import Console
from test_extract import SITES, SIZES, tiny_lm

import actcache as ac
from actcache.cli import progress
from actcache.cli.progress import MOST_SITES, Events, Lines, Stage, sites_worth_a_look
from actcache.cli.screen import Screen
from actcache.cli.store_view import Shards, sites_table, store_lines
from actcache.status import SiteStatus, Status

pytestmark = pytest.mark.exhaustive

ROOT = Path(ac.__file__).parent.parent
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TERM": "xterm-256color"}
WAITED_FOR = ["--sites", "blocks.*.mlp.hook_in", "blocks.*.hook_mlp_out", "--length", "256"]
SHARDS = ["--count", "512", "--sequences-per-shard", "16", "--batch-sequences", "8"]
SLOW_CODEC = json.dumps([{"name": "bytes"}, {"name": "zstd", "configuration": {"level": 22, "checksum": False}}])
INTERRUPTED = r"interrupted; (\d+) of 32 shards of \S+ are on disk; the same command goes on where"
WAITING = "interrupted: waiting for writes under way; Ctrl-C again ends at once"


def hear_interrupts() -> None:
    # Python keeps ignoring the signal where it was begun in the background of a shell, which ignores it for its jobs.
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextmanager
def running(*arguments: str, cwd: Path, **more: Any) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "actcache", *arguments]
    settings = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "preexec_fn": hear_interrupts}
    with subprocess.Popen(command, cwd=cwd, env=ENVIRONMENT, **{**settings, **more}) as process:
        try:
            yield process
        finally:
            process.kill()


def events_of(process: subprocess.Popen[str]) -> Iterator[dict[str, Any]]:
    for line in process.stderr:
        yield json.loads(line)


def until_sequences(process: subprocess.Popen[str], n: int) -> None:
    """Read events until so many sequences are extracted."""
    for event in events_of(process):
        if event["event"] == "progress" and event["title"] == "Extract activations" and event["done"] >= n:
            return
    raise AssertionError(f"ended with {process.wait()} before {n} sequences")


class Clock:
    """What `progress` takes for the time."""

    seconds = 1000.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "monotonic", lambda: clock.seconds)
    return clock


def everything_in(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, list[dict[str, Any]]]:
    """A store, what was on stdout, and the events."""
    folder = tmp_path_factory.mktemp("unbroken")
    with running("extract", *WAITED_FOR, *SHARDS, "--out", "acts.zarr", "--json", cwd=folder) as process:
        events = list(events_of(process))
        out = process.stdout.read()
        assert process.wait(600) == 0, events
    return folder / "acts.zarr", out, events


def test_events_tell_each_stage_from_its_beginning_to_its_end(unbroken):
    _, out, events = unbroken
    assert json.loads(out)["state"] == "sealed"
    assert out.count("\n") == 1
    titles = ["Tokenize text", "Extract activations"]
    for kind in ("stage", "done"):
        assert [event["title"] for event in events if event["event"] == kind] == titles
    assert {event["event"] for event in events} == {"stage", "progress", "done"}
    for title in titles:
        of_stage = [event for event in events if event["title"] == title]
        assert [of_stage[0]["event"], of_stage[-1]["event"]] == ["stage", "done"]
        done = [event["done"] for event in of_stage[1:]]
        assert done == sorted(done)
        assert (of_stage[-1]["done"], of_stage[-1]["total"], of_stage[-1]["unit"]) == (512, 512, "sequences")


def test_the_times_of_events_are_utc_and_in_order(unbroken):
    events = unbroken[2]
    times = [datetime.fromisoformat(event["time"]) for event in events]
    assert times == sorted(times)
    assert all(moment.tzinfo is not None and moment.utcoffset() == timedelta(0) for moment in times)
    assert datetime.now(UTC) - times[-1] < timedelta(minutes=10)


def test_progress_comes_once_a_second_at_most(clock, capsys):
    stage = Stage("Extract", "sequences", Events())
    for done in range(45):  # tenths of a second
        stage.count(done, 45)
        clock.seconds += 0.1
    events = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [event["done"] for event in events if event["event"] == "progress"] == [0, 10, 20, 30, 40]


def test_the_last_event_of_an_extraction_has_its_speeds_and_statistics(unbroken):
    path, _, events = unbroken
    last = events[-1]
    assert last["n_tokens"] == 512 * 256
    assert last["tokens_per_s"] > 0
    assert 0 < last["n_bytes"] <= ac.open_store(path).info()["bytes"]
    assert last["eta_s"] == 0
    assert 0 <= last["queue"] <= last["queue_size"]
    told: dict[str, Any] = {}
    for event in events:
        told = event.get("sites", told)
    assert list(told) == ac.open_store(path).sites
    for site in told.values():
        assert site["mean_norm"] > 0
        assert (site["n_nan"], site["n_inf"], site["dead"]) == (0, 0, False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["info", "nowhere.zarr"], "no activation store at nowhere.zarr"),
        (["info", "--bogus"], "see 'actcache info --help'"),
        (["extract", "--sites", "blocks.0.hook_mlp_uot", "--out", "x.zarr"], "did you mean"),
    ],
)
def test_an_error_is_the_last_event(tmp_path, arguments, message):
    with running(*arguments, "--json", cwd=tmp_path) as process:
        events = list(events_of(process))
        assert process.wait(600) == 1
        assert process.stdout.read() == ""
    assert events[-1]["event"] == "error"
    assert message in events[-1]["message"]


def test_nan_is_said_loudly_once_and_as_an_event(tmp_path, capsys):
    lm = tiny_lm()
    with torch.no_grad():
        lm.module.pos_embed.weight[5, 0] = float("nan")
    said = {}
    for as_json in (False, True):
        with Screen(json=as_json) as screen:
            watch = screen.watch("Extract activations")
            ac.extract(lm, random_blocks(29, 21), SITES[:1], tmp_path / f"{as_json}.zarr", watch=watch, **SIZES)
        said[as_json] = capsys.readouterr().err.splitlines()
    lines = [line for line in said[False] if "are NaN" in line]
    assert [line.split()[:2] for line in lines] == [["Warning:", f"blocks.{i}.mlp.hook_in:"] for i in range(2)]
    warned = [event for event in map(json.loads, said[True]) if event["event"] == "warning"]
    assert [event["message"].split()[0] for event in warned] == [line.split()[1] for line in lines]
    assert all("are NaN" in event["message"] and event["category"] == "UserWarning" for event in warned)


def test_warnings_of_other_libraries_are_dim_notes_and_nothing_is_said_twice(capsys):
    with Screen() as screen:
        warnings.simplefilter("always")
        for _ in range(3):
            warnings.warn("[odd] things", RuntimeWarning, stacklevel=1)
        screen.say("[more]")
    assert capsys.readouterr().err.splitlines() == ["Note: [odd] things", "[more]"]


def status_of(done: int, seconds: float, **changes: Any) -> Status:
    fields: dict[str, Any] = {
        **{"n_sequences_done": done, "n_sequences": 1000, "n_sequences_here": done, "n_sequences_share": 1000},
        **{"n_tokens": 128 * done, "seconds": seconds, "n_bytes": 0, "queue": 1, "queue_size": 2, "sites": {}},
    }
    return Status(**{**fields, **changes})


def test_lines_in_a_log_come_ever_rarer(clock):
    said = io.StringIO()
    stage = Stage("Extract", "sequences", Lines(Console(file=said, width=200)))
    moments: list[int] = []
    for second in range(3000):
        stage.watch(status_of(500, 10.0))
        if said.getvalue().count("\n") > len(moments):
            moments.append(second)
        clock.seconds += 1.0
    # After 30 s, then 1, 2, 4, 8 minutes later, and every ten minutes from then on.
    assert moments == [30, 90, 210, 450, 930, 1530, 2130, 2730]
    assert said.getvalue().startswith(
        "Extract: 500 of 1,000 sequences, 6,400 tokens/s, 0 B/s stored, 0 B so far, queue"
    )
    assert "about 10 s left" in said.getvalue()


def test_a_share_of_a_store_is_counted_by_itself():
    events = Stage("Extract", "sequences", Lines(Console(file=io.StringIO())))
    events.watch(status_of(700, 5.0, n_sequences_here=50, n_sequences_share=100))
    assert (events.done, events.total) == (50, 100)
    events.watch(status_of(950, 5.0, n_sequences_here=50, n_sequences_share=100))
    assert (events.done, events.total) == (950, 1000)


def test_the_sites_shown_are_few_and_the_alarming_come_first():
    fine = SiteStatus(mean_norm=1.0, abs_max=1.0, zero_fraction=0.0, n_nan=0, n_inf=0, dead=False)
    sites = {f"site.{i}": fine for i in range(50)}
    sites["site.20"] = SiteStatus(mean_norm=1.0, abs_max=1.0, zero_fraction=0.0, n_nan=0, n_inf=0, dead=True)
    sites["site.30"] = SiteStatus(mean_norm=1.0, abs_max=1.0, zero_fraction=0.0, n_nan=0, n_inf=1, dead=False)
    sites["site.40"] = SiteStatus(mean_norm=1.0, abs_max=1.0, zero_fraction=0.0, n_nan=1, n_inf=0, dead=True)
    shown = list(sites_worth_a_look(sites))
    assert shown == ["site.40", "site.30", "site.20", *(f"site.{i}" for i in range(MOST_SITES - 3))]


@pytest.mark.parametrize("width", [80, 100])
def test_what_a_store_is_fits_a_terminal(unbroken, width):
    info = ac.open_store(unbroken[0]).info()
    out = io.StringIO()
    console = Console(file=out, width=width, soft_wrap=True)
    console.print(store_lines(info, Shards(32, range(32))), highlight=False)
    console.print(sites_table(info["sites"], info["spec"]["dtype"]))
    shown = out.getvalue()
    assert max(map(len, shown.splitlines())) <= width
    assert "…" not in shown.replace("…,", "").replace("… ", "").replace("…\n", "")  # digests are cut, numbers are not
    for site in info["sites"]:
        assert site in shown
    assert "lossless" in shown
    spec = info["spec"]
    for digest in (spec["model"]["weights"], spec["model"]["tokenizer"], spec["text"]["tokens"]):
        assert f"{digest[:12]}…" in shown
    assert "32 of 32 shards committed" in shown
    assert f"torch {torch.__version__}" in " ".join(shown.split())


@contextmanager
def on_a_terminal(*arguments: str, cwd: Path) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """The process, and the end of its terminal where one types and looks."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(ours, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 100, 0, 0))

    def take_terminal() -> None:
        hear_interrupts()
        os.login_tty(theirs)

    whole = {"stdout": None, "stderr": None, "text": False, "preexec_fn": take_terminal, "pass_fds": [theirs]}
    try:
        with running(*arguments, cwd=cwd, **whole) as process:
            os.close(theirs)
            yield process, ours
    finally:
        os.close(ours)


def read_until(terminal: int, wanted: str, seen: str = "") -> str:
    """Text without what moves and colours it, until there is what is wanted or the process has ended."""
    while wanted not in seen:
        try:
            raw = os.read(terminal, 1 << 16)
        except OSError:  # the other end is closed
            break
        seen += re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", raw.decode(errors="replace"))
    return seen


@pytest.mark.exhaustive
def test_a_terminal_shows_bars_speeds_and_sites_while_it_lasts(tmp_path):
    wanted = ["extract", *WAITED_FOR, *SHARDS, "--out", "acts.zarr"]
    with on_a_terminal(*wanted, cwd=tmp_path) as (process, terminal):
        shown = read_until(terminal, "\0")
        assert process.wait(600) == 0, shown
    assert re.search(r"Extract activations\s+━+\S*\s+\d+/512\s+[\d,]+ tokens/s\s+\d:\d\d:\d\d left \d:\d\d:\d\d", shown)
    assert re.search(r"[kM]B/s stored · .* so far · queue \d of \d shards", shown)
    live, _, result = shown.rpartition("store  ")
    assert re.search(r"  blocks\.3\.hook_mlp_out +\d", live)
    assert "of 32 shards" not in live
    assert "sealed, 130,560 of 130,560 rows, 32 of 32 shards committed" in result


def test_ctrl_c_on_a_terminal_says_how_far_it_is(tmp_path):
    wanted = ["extract", *WAITED_FOR, *SHARDS, "--out", "acts.zarr"]
    with on_a_terminal(*wanted, cwd=tmp_path) as (process, terminal):
        shown = read_until(terminal, "B/s stored")
        os.write(terminal, b"\x03")
        shown = read_until(terminal, "\0", shown)
        assert process.wait(600) == 130, shown
    found = re.search(f"error: {INTERRUPTED}", shown)
    assert found, shown
    assert int(found[1]) == len(ac.open_store(tmp_path / "acts.zarr").committed)
    assert "Traceback" not in shown


@pytest.mark.exhaustive
def test_an_interrupted_extraction_continues_to_the_same_bytes(tmp_path, unbroken):
    wanted = ["extract", *WAITED_FOR, *SHARDS, "--out", "acts.zarr", "--json"]
    with running(*wanted, cwd=tmp_path) as process:
        until_sequences(process, 48)
        process.send_signal(signal.SIGINT)
        events = list(events_of(process))
        assert process.wait(600) == 130
        assert process.stdout.read() == ""
    last = events[-1]
    assert last["event"] == "error"
    found = re.fullmatch(f"{INTERRUPTED}.*", last["message"])
    assert found, last
    store = ac.open_store(tmp_path / "acts.zarr")
    assert not store.sealed
    assert 1 <= int(found[1]) == len(store.committed) < 32
    with running(*wanted, cwd=tmp_path) as process:
        events = list(events_of(process))
        assert process.wait(600) == 0, events
    assert events[-1]["n_sequences_here"] == 512 - 16 * int(found[1])
    assert everything_in(tmp_path / "acts.zarr") == everything_in(unbroken[0])


@pytest.mark.exhaustive
def test_shards_that_are_finished_after_the_interrupt_are_counted(tmp_path):
    """Those of one site are encoded as a whole when the interrupt comes, and it takes seconds."""
    site = ["--sites", "blocks.0.hook_mlp_out", "--codec", SLOW_CODEC, "--length", "256", "--count", "512"]
    wanted = ["extract", *site, "--sequences-per-shard", "16", "--batch-sequences", "16", "--out", "acts.zarr"]
    with running(*wanted, "--json", cwd=tmp_path) as process:
        until_sequences(process, 48)
        process.send_signal(signal.SIGINT)
        last = list(events_of(process))[-1]
        assert process.wait(600) == 130
    found = re.match(INTERRUPTED, last["message"])
    assert found, last
    assert int(found[1]) == len(ac.open_store(tmp_path / "acts.zarr").committed)


@pytest.mark.exhaustive
def test_a_second_ctrl_c_ends_at_once_and_leaves_nothing_half_written(tmp_path):
    """Without the second one it would take the ten seconds and more that two sites of a shard need to be encoded."""
    wanted = ["extract", *WAITED_FOR, "--count", "512", "--sequences-per-shard", "256", "--out", "acts.zarr", "--json"]
    with running(*wanted, "--codec", SLOW_CODEC, cwd=tmp_path) as process:
        until_sequences(process, 288)  # so the first shard is being encoded
        process.send_signal(signal.SIGINT)
        events = events_of(process)
        assert WAITING in (event.get("message") for event in events)
        process.send_signal(signal.SIGINT)
        last = list(events)[-1]
        assert process.wait(600) == 130
    assert "interrupted again, ended at once" in last["message"]
    assert ac.open_store(tmp_path / "acts.zarr").committed == []  # it did not wait for the shard
    assert ac.verify(tmp_path / "acts.zarr") == []


@pytest.mark.exhaustive
def test_a_job_in_the_background_of_a_shell_is_not_interrupted(tmp_path):
    def ignore_interrupts() -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    wanted = ["extract", *WAITED_FOR, "--count", "96", "--out", "acts.zarr", "--json"]
    with running(*wanted, cwd=tmp_path, preexec_fn=ignore_interrupts) as process:
        assert next(events_of(process))["event"] == "stage"
        process.send_signal(signal.SIGINT)
        assert list(events_of(process))[-1]["event"] == "done"
        assert process.wait(600) == 0
