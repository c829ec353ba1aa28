"""Every verb takes a URL where it takes a store, and what it prints, writes and notes has no password in it."""

from __future__ import annotations

import json
import sys
import uuid
from typing import Any

import pytest

from actcache.cli import main
from actcache.store import open_store

pytestmark = pytest.mark.exhaustive

SITE = "blocks.0.hook_mlp_out"
TEXT = ["--length", "32", "--count", "24"]


@pytest.fixture(params=["memory", pytest.param("s3", marks=pytest.mark.exhaustive)])
def url(request) -> str:
    """A URL with a user, a password and a query."""
    if request.param == "memory":
        return f"memory://user:sesame@{uuid.uuid4().hex}/acts.zarr?sig=Signature"
    bucket = request.getfixturevalue("bucket")
    return bucket.replace("s3://", "s3://user:sesame@")


@pytest.fixture
def run(monkeypatch, capsys) -> Any:
    """Run a verb as it was typed; what it printed as JSON."""

    def verb(*arguments: str) -> dict[str, Any]:
        monkeypatch.setattr(sys, "argv", ["actcache", *arguments, "--json"])
        assert main(sys.argv[1:]) == 0
        out, err = capsys.readouterr()
        assert "sesame" not in out + err
        assert "Signature" not in out + err
        return json.loads(out)

    return verb


def test_from_extract_to_the_report(url, run, tmp_path):
    sizes = ["--sequences-per-shard", "12"]
    made = run("extract", "--sites", SITE, "--out", url, *TEXT, *sizes)
    assert made["state"] == "sealed"
    assert made["path"].endswith("/acts.zarr")
    run("extend", url, *TEXT, "--skip-documents", "100")
    run("add-sites", url, "--sites", "blocks.1.hook_mlp_out")
    run("delete-sites", url, "blocks.1.hook_mlp_out")
    assert run("info", url)["n_shards"] == 4
    assert run("verify", url)["sound"]
    assert run("repair", url)["shards"] == []
    copy = run("export", url, "--out", f"{url.partition('?')[0]}-copy", "--sequences", "0:12")
    assert copy["path"].endswith("/acts.zarr-copy")
    training = ["--expansion", "1", "--batch-rows", "32", "--n-steps", "3", "--warmup-steps", "0"]
    trained = tmp_path / "run"
    run("train", url, "--site-in", SITE, "--site-out", SITE, "--out", str(trained), *training)
    run("evaluate", str(trained), *TEXT, "--skip-documents", "200")
    run("report", str(trained))
    written = b"".join(file.read_bytes() for file in trained.rglob("*") if file.is_file())
    assert b"sesame" not in written
    assert b"Signature" not in written
    assert f"actcache train {url.partition(':')[0]}://".encode() in written
    assert b"sesame" not in bytes(open_store(url).objects.get("zarr.json"))


@pytest.mark.exhaustive
def test_what_needs_a_folder_says_so(run, capsys, tmp_path):
    url = f"memory://user:sesame@{uuid.uuid4().hex}/acts.zarr?sig=Signature"
    planned = run("plan", "stories-4l", "stories-corpus", SITE, "--out", url, "--length", "32", "--seconds", "1")
    assert planned["out"].startswith("memory://")
    run("extract", "--sites", SITE, "--out", url, *TEXT)
    assert main(["export", url, "--format", "saelens", "--out", "s3://user:sesame@bucket/x"]) == 1
    assert "s3://bucket/x is a URL" in " ".join(capsys.readouterr().err.split())
    run("export", url, "--format", "saelens", "--out", str(tmp_path / "sae"))
    run("import", str(tmp_path / "sae"), "--format", "saelens", "--out", f"{url.partition('?')[0]}-back")
