"""URLs are never shown with user, password or query, whatever says them."""

from __future__ import annotations

import json
import traceback
import uuid
from pathlib import Path
from typing import Any

import pytest
from conftest import random_bits, random_blocks, spec_of, write_shards
from places import QUICK, writable

from actcache import addresses
from actcache.cli import main
from actcache.errors import ActcacheError, ConfigError
from actcache.load import Loader
from actcache.share import ServedBatches, serve_batches
from actcache.store import export, open_store, verify
from actcache.store.backends import urls

SECRETS = ("sesame", "Signature", "s3cr3t")


def without_secrets(text: str) -> bool:
    return not any(secret in text for secret in SECRETS)


@pytest.mark.parametrize(
    ("location", "expected"),
    [
        ("s3://user:sesame@bucket/a.zarr", "s3://bucket/a.zarr"),
        ("http://u:sesame@host:8080/x?sig=Signature#s3cr3t", "http://host:8080/x"),
        ("memory://u:sesame@a/x?sig=Signature", "memory://a/x"),
        ("s3://user:ses/ame@bucket/a", "s3://bucket/a"),
        ("s3://user:ses?ame@bucket/a?b=c", "s3://bucket/a"),
        ("http://u:sesame@[::1]:80/x?y=1", "http://[::1]:80/x"),
        ("http://host:80/somebody@home", "http://host:80/somebody@home"),
        ("s3://bucket/somebody@home/a", "s3://bucket/somebody@home/a"),
        ("simplecache::s3://k:sesame@bucket/a", "simplecache::s3://bucket/a"),
        ("--out=s3://k:sesame@bucket/a b?c", "--out=s3://bucket/a b"),
        ("HOOK=/data/what?=a@b", "HOOK=/data/what?=a@b"),
        (Path("/data/a?b=c@d"), "/data/a?b=c@d"),
    ],
)
def test_of_a_url_the_place_is_shown_and_of_a_path_everything(location, expected):
    assert addresses.shown(location) == expected


def test_what_other_libraries_say_is_looked_through():
    location = "http://user:sesame@host/x?sig=Sig%2Fnature"
    said = (
        f"GET {location} failed: 'http://user:sesame@host/x/zarr.json?sig=Signature' (url: /x?sig=Signature&n=1), "
        "login of user:sesame refused, Sig/nature is wrong"
    )
    expected = "GET http://host/x failed: 'http://host/x/zarr.json' (url: /x), login of ... refused, ... is wrong"
    assert addresses.hidden(said, location) == expected
    assert addresses.hidden("no file /data/a@b:c", "/data/a@b:c") == "no file /data/a@b:c"


@pytest.fixture
def url() -> str:
    return f"memory://user:sesame@{uuid.uuid4().hex}/acts.zarr?sig=Signature"


@pytest.fixture
def made(url) -> Any:
    blocks = random_blocks(10, 9)
    spec = spec_of(blocks)
    return write_shards(url, spec, blocks, random_bits(spec))


def test_a_store_does_not_say_how_it_was_opened(made, url, tmp_path):
    exported = export(open_store(url), tmp_path / "e.zarr")
    root = json.dumps([made.root.attributes(), exported.root.attributes()])
    texts = [made.path, repr(made), str(made.objects), json.dumps(made.info()), str(made.as_xarray().attrs), root]
    for text in texts:
        assert without_secrets(text)
    assert made.path.startswith("memory://")
    assert verify(url) == []


def test_a_served_store_is_opened_by_its_whole_address_all_the_same(made, url, tmp_path):
    import threading

    loader = Loader(made, made.sites, batch_rows=10)
    server = threading.Thread(target=serve_batches, args=(loader, tmp_path / "s", 1))
    server.start()
    with ServedBatches(tmp_path / "s", wait_s=20) as batches:
        batch = next(iter(batches))
        assert len(batch.tokens) == 10
    server.join(20)


def everything_said(error: BaseException) -> str:
    return "".join(traceback.format_exception(error))


@pytest.mark.parametrize(
    "location",
    [
        "http://user:sesame@127.0.0.1:9/x.zarr?sig=Signature&key=s3cr3t",
        "ftp://user:sesame@127.0.0.1:9/x.zarr",
        "memory://user:sesame@nowhere/x?sig=Signature",
        "gopher://user:sesame@host/x?sig=Signature",
        "http://user:sesame@[bad/x?sig=Signature",
    ],
)
def test_errors_do_not_say_it_nor_do_their_causes(location, monkeypatch, capfd):
    monkeypatch.setattr(urls, "RETRIES", {**QUICK, "max_retries": 0})
    with pytest.raises((ActcacheError, OSError)) as caught:
        open_store(location)
    assert without_secrets(everything_said(caught.value))
    said = []
    try:
        writable(location).put("a", b"1")
    except (ConfigError, OSError) as error:
        said.append(everything_said(error))
    assert all(map(without_secrets, said))
    for verb in (["info"], ["verify"], ["repair"], ["repair", "--unlock"], ["delete-sites", "a"]):
        main([verb[0], location, *verb[1:], "--json"])
    out, err = capfd.readouterr()
    assert without_secrets(out + err)


@pytest.mark.parametrize("json_flag", [[], ["--json"]])
def test_the_command_line_does_not_say_it(made, url, json_flag, capsys):
    for verb in ("info", "verify", "repair"):
        assert main([verb, url, *json_flag]) == 0
    assert main(["delete-sites", url, "no.such", *json_flag]) == 1
    assert main(["info", url, "--no-such", url, *json_flag]) == 1
    out, err = capsys.readouterr()
    assert without_secrets(out + err)
    assert "memory://" in out


def test_what_pathlib_makes_of_a_url_is_no_folder():
    with pytest.raises(ConfigError, match="give a URL as text"):
        writable(Path("s3://bucket/acts.zarr"))
    with pytest.raises(ConfigError, match="give a URL as text"):
        open_store("s3:/bucket/acts.zarr")
