"""A real S3 protocol server (moto's) on a free loopback port, for as long as its standard input is open.

Run as a script, by a Python that has `moto[s3]`, flask and flask-cors: moto wants an older python-dateutil than the
rest of the tests is pinned to, so it may live in an environment of its own. Prints its port. `PUT /-moods` with JSON
sets how it answers from then on: `delay_s` before each answer; after `refuse_after` more puts (-1: never) it refuses
them with the status `refuse_with`, `refusals` of them (-1: all).
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Iterable
from http import HTTPStatus
from typing import Any

MOODS: dict[str, Any] = {"delay_s": 0.0, "refuse_after": -1, "refuse_with": 403, "refusals": -1}
GUARD = threading.Lock()


def refused(method: str) -> bool:
    """Count a request down; True when it is one of those to be refused."""
    with GUARD:
        if method not in ("PUT", "POST") or MOODS["refuse_after"] < 0:
            return False
        if MOODS["refuse_after"] > 0:
            MOODS["refuse_after"] -= 1
            return False
        MOODS["refusals"] -= 1
        if MOODS["refusals"] == 0:
            MOODS["refuse_after"] = -1
        return True


def main() -> None:
    from moto.moto_server import threaded_moto_server

    class Moody(threaded_moto_server.DomainDispatcherApplication):
        def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
            if environ["PATH_INFO"] == "/-moods":
                MOODS.update(json.loads(environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"]))))
                start_response("200 OK", [("Content-Length", "0")])
                return [b""]
            time.sleep(MOODS["delay_s"])
            if refused(environ["REQUEST_METHOD"]):
                environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
                status = HTTPStatus(MOODS["refuse_with"])
                start_response(f"{status.value} {status.phrase}", [("Content-Length", "0")])
                return [b""]
            return super().__call__(environ, start_response)

    threaded_moto_server.DomainDispatcherApplication = Moody
    server = threaded_moto_server.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    print(server.get_host_and_port()[1], flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
