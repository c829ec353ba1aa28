"""Objects of a folder, of memory and of a real S3 protocol server; and what can go wrong on the way there."""

from __future__ import annotations

import os
import pickle
import signal
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from places import QUICK, by_name, everywhere, s3_server, writable

from actcache.errors import ConfigError
from actcache.store.backends import urls
from actcache.store.backends.objects import Objects
from actcache.store.format.root import exists_any


def read(objects: Objects, key: str, offset: int, *lengths: int) -> tuple[int, bytes]:
    outs = [bytearray(b"." * length) for length in lengths]
    n_read = objects.read_into(key, offset, *map(memoryview, outs))
    return n_read, b"".join(outs)


class TestObjects:
    @everywhere
    def test_what_was_put_is_read_whole_in_ranges_and_from_its_end(self, place):
        objects = writable(place)
        data = bytearray(b"0123456789")
        objects.put("a/b/c.0.0", memoryview(data))
        data[:] = b"----------"  # the caller reuses its buffer
        assert objects.get("a/b/c.0.0") == b"0123456789"
        assert objects.size("a/b/c.0.0") == 10
        assert read(objects, "a/b/c.0.0", 2, 3) == (3, b"234")
        assert read(objects, "a/b/c.0.0", 6, 2, 4) == (4, b"6789..")
        assert read(objects, "a/b/c.0.0", 10, 4) == (0, b"....")
        assert read(objects, "a/b/c.0.0", 99, 4) == (0, b"....")
        assert read(objects, "a/b/c.0.0", 3, 0) == (0, b"")
        assert objects.tail("a/b/c.0.0", 4) == b"6789"
        assert objects.tail("a/b/c.0.0", 12) == b"0123456789"
        objects.put("a/b/c.0.0", b"new")
        assert objects.get("a/b/c.0.0") == b"new"

    @everywhere
    def test_an_object_written_in_pieces_appears_at_the_end_or_not_at_all(self, place):
        objects = writable(place)
        piece = bytearray(b"123")
        with objects.writing("a/c.0") as add:
            add(memoryview(piece), b"4")
            piece[:] = b"---"  # the caller reuses its buffer
            add(b"56")
            assert objects.get("a/c.0") is None
        assert objects.get("a/c.0") == b"123456"

        def stop() -> None:
            with objects.writing("a/c.0") as add:
                add(b"other")
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            stop()
        assert objects.get("a/c.0") == b"123456"
        assert objects.names("a") == ["c.0"]

    @everywhere
    def test_an_empty_object_is_not_a_missing_one(self, place):
        objects = writable(place)
        objects.put("empty", b"")
        assert (objects.get("empty"), objects.size("empty"), objects.tail("empty", 8)) == (b"", 0, b"")
        assert read(objects, "empty", 0, 2) == (0, b"..")

    @everywhere
    def test_missing_objects_are_said_to_be_missing(self, place):
        objects = writable(place)
        for _ in range(2):  # of a place that is not there yet, and of one that is
            assert objects.get("no/thing") is None
            assert objects.tail("no/thing", 4) is None
            assert (objects.size("no/thing"), read(objects, "no/thing", 0, 2)[0]) == (-1, -1)
            assert read(objects, "no/thing", 5, 0)[0] in (-1, 0)
            assert (objects.names("no"), list(objects.list("no"))) == ([], [])
            objects.delete("no/thing")
            objects.delete_all("no")
            objects.put("other", b"x")
        assert objects.get("other/below") is None

    @everywhere
    def test_names_lists_and_deletes_stay_within_a_folder(self, place):
        objects = writable(place)
        assert not exists_any(objects)
        odd = "sites/blocks.0%2Fattn ü[é]"
        keys = {f"{odd}/acts/c.{i}.0" for i in range(3)} | {f"{odd}/acts/zarr.json", f"{odd}/acts2/c.0", f"{odd}/x/y/z"}
        for key in keys:
            objects.put(key, key.encode())
        assert exists_any(objects)
        assert set(objects.list("")) == keys
        for prefix in (f"{odd}/acts", f"{odd}/acts/"):
            assert set(objects.list(prefix)) == {key for key in keys if "acts/" in key}
        assert sorted(objects.names(f"{odd}/acts")) == ["c.0.0", "c.1.0", "c.2.0", "zarr.json"]
        assert objects.names(odd) == []
        objects.delete(f"{odd}/acts/c.1.0")
        assert sorted(objects.names(f"{odd}/acts/")) == ["c.0.0", "c.2.0", "zarr.json"]
        objects.delete_all(f"{odd}/acts")
        assert set(objects.list("")) == {f"{odd}/acts2/c.0", f"{odd}/x/y/z"}
        with pytest.raises(ValueError, match="the store itself"):
            objects.delete_all("/")

    @everywhere
    def test_create_leaves_what_is_there(self, place):
        objects = writable(place)
        objects.create("a/b", b"first")
        objects.create("a/b", b"second")
        assert objects.get("a/b") == b"first"

    @everywhere
    def test_many_threads_at_once(self, place):
        objects = writable(place)

        def there_and_back(i: int) -> bool:
            objects.put(f"t/c.{i}", bytes([i]) * 1000)
            return read(objects, f"t/c.{i}", 990, 20) == (10, bytes([i]) * 10 + b"." * 10)

        with ThreadPoolExecutor(8) as pool:
            assert all(pool.map(there_and_back, range(64)))
        assert len(objects.names("t")) == 64

    @by_name
    def test_a_second_opening_sees_the_same_and_read_only_refuses_to_write(self, place):
        writable(place).put("a", b"1")
        again = pickle.loads(pickle.dumps(Objects(place, read_only=True)))
        assert again.get("a") == b"1"
        with pytest.raises(ValueError, match="read-only"):
            again.put("a", b"2")
        with pytest.raises(ValueError, match="read-only"), again.writing("b"):
            pass
        with pytest.raises(ValueError, match="read-only"):
            again.create("b", b"2")
        with pytest.raises(ValueError, match="read-only"):
            again.delete("a")
        with pytest.raises(ValueError, match="read-only"):
            again.delete_all("a")
        assert writable(place).get("a") == b"1"

    def test_a_large_object_goes_up_in_parts(self, bucket):
        data = os.urandom(11 << 20)
        writable(bucket).put("large", data)
        assert writable(bucket).get("large") == data
        assert writable(bucket).tail("large", 7) == data[-7:]

    def test_is_local_and_free_bytes(self, tmp_path):
        here, there = writable(tmp_path / "not" / "yet"), writable("memory://somewhere")
        assert here.is_local
        assert not there.is_local
        assert here.free_bytes() > 0
        assert there.free_bytes() is None
        assert not (tmp_path / "not").exists()

    def test_a_file_url_is_a_folder(self, tmp_path):
        objects = writable(f"file://{tmp_path}/with%20blank")
        objects.put("a", b"1")
        assert objects.is_local
        assert (tmp_path / "with blank" / "a").read_bytes() == b"1"

    def test_unfinished_local_writes_are_no_objects(self, tmp_path):
        objects = writable(tmp_path)
        objects.put("a/c.0", b"1")
        for name in (f"c.1.{'0123' * 8}.partial", "somebody's.partial"):
            (tmp_path / "a" / name).write_bytes(b"half")
        assert objects.names("a") == ["c.0"]
        assert list(objects.list("a")) == ["a/c.0"]
        objects.remove_partial_writes()
        assert {path.name for path in (tmp_path / "a").iterdir()} == {"c.0", "somebody's.partial"}


class TestWhatCanGoWrong:
    def test_a_missing_bucket_is_an_error_that_names_the_key(self, bucket):
        objects = writable("s3://another-bucket/acts.zarr")
        with pytest.raises(OSError, match=r"could not write rows/c\.0 of s3://another-bucket/acts\.zarr.*not exist"):
            objects.put("rows/c.0", b"1")
        with pytest.raises(OSError, match="not exist"):
            exists_any(objects)

    def test_a_refused_put_names_the_key_and_leaves_what_was_there(self, s3, bucket):
        objects = writable(bucket)
        objects.put("rows/c.0", b"1")
        s3.moods(refuse_after=0, refuse_with=403)
        with pytest.raises(PermissionError, match=r"rows/c\.0"):
            objects.put("rows/c.0", b"2")
        with pytest.raises(PermissionError, match=r"rows/large"):
            objects.put("rows/large", bytes(6 << 20))
        s3.calm()
        assert objects.get("rows/c.0") == b"1"
        assert objects.names("rows") == ["c.0"]

    def test_an_upload_that_is_refused_in_the_middle_leaves_nothing(self, s3, bucket):
        s3.moods(refuse_after=2, refuse_with=403)
        with pytest.raises(OSError, match="large"):
            writable(bucket).put("large", bytes(21 << 20))
        s3.calm()
        assert writable(bucket).get("large") is None

    def test_a_moment_of_server_errors_is_ridden_out(self, s3, bucket):
        s3.moods(refuse_after=0, refuse_with=503, refusals=2)
        writable(bucket).put("a", b"1")
        assert writable(bucket).get("a") == b"1"

    def test_slow_answers_are_waited_for(self, s3, bucket):
        objects = writable(bucket)
        objects.put("a", b"12345")
        s3.moods(delay_s=0.7, together=8)  # it would wait for ever for those that come one after the other
        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(lambda _: read(objects, "a", 1, 2), range(8))) == [(2, b"23")] * 8

    def test_a_server_that_goes_away_is_an_error_that_names_the_key(self, s3, monkeypatch):
        monkeypatch.setattr(urls, "RETRIES", QUICK)
        with s3_server() as other:
            monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{other.port}")
            objects = writable("s3://bucket/acts.zarr")
            objects.put("a", b"1")
            other.kill()
            with pytest.raises(OSError, match=r"could not write rows/c\.7 of s3://bucket"):
                objects.put("rows/c.7", b"1")
            with pytest.raises(OSError, match="could not read a of"):
                Objects("s3://bucket/acts.zarr", read_only=True).get("a")
            with pytest.raises(OSError, match="could not list"):
                objects.names("rows")

    def test_an_endpoint_without_encryption_has_to_be_meant(self, bucket, monkeypatch):
        monkeypatch.delenv("AWS_ALLOW_HTTP")
        with pytest.raises(ConfigError, match="AWS_ALLOW_HTTP=true"):
            writable(bucket)

    def test_a_url_that_nobody_knows_says_which_ones_there_are(self):
        with pytest.raises(ConfigError, match=r"gopher://.*s3://"):
            writable("gopher://acts.zarr")
        with pytest.raises(ConfigError, match="cannot open s3://"):
            writable("s3://")

    def test_what_to_install_is_said(self, monkeypatch):
        monkeypatch.setattr(urls, "find_spec", lambda name: None)  # as where obstore is not installed, nor s3fs
        with pytest.raises(ConfigError, match=r"pip install 'actcache\[remote\]'"):
            writable("s3://bucket/acts.zarr")
        monkeypatch.setitem(sys.modules, "fsspec", None)
        with pytest.raises(ConfigError, match=r"pip install 'actcache\[remote\]'"):
            writable("memory://acts.zarr")

    @by_name
    def test_a_forked_child_works_or_is_told_why_not(self, place):
        objects = writable(place)
        objects.put("a", b"1")
        child = os.fork()
        if not child:
            signal.alarm(20)
            try:
                objects.put("b", b"2")
                os._exit(0 if objects.get("a") == b"1" else 3)
            except ConfigError as error:
                os._exit(4 if "spawn" in str(error) else 5)
            os._exit(6)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status == (4 if str(place).startswith("s3://") else 0)
        objects.put("c", b"3")  # and the parent is none the worse
