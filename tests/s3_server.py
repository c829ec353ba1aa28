"""A real S3 protocol server (moto's) on a free loopback port, for as long as its standard input is open.

Run as a script, by a Python that has `moto[s3]`, flask and flask-cors: moto wants an older python-dateutil than the
rest of the tests is pinned to, so it may live in an environment of its own. Prints its port. `PUT /-moods` with JSON
sets how it answers from then on: `delay_s` before each answer; after `refuse_after` more puts (-1: never) it refuses
them with the status `refuse_with`, `refusals` of them (-1: all); after `hang_after` more puts (-1: never) it leaves
them without an answer until that is changed; nothing is answered before `together` requests are there at once. `GET
/-moods` tells all this, and how many puts are `hanging`.
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
MOODS |= {"hang_after": -1, "hanging": 0, "together": 1, "there": 0}
GUARD = threading.Condition()


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


def held_up(method: str) -> bool:
    """Wait until enough requests are there; True when it is one of the puts that were left without an answer."""
    with GUARD:
        MOODS["there"] += 1
        GUARD.notify_all()
        GUARD.wait_for(lambda: MOODS["there"] >= MOODS["together"])
        if method not in ("PUT", "POST") or MOODS["hang_after"] < 0:
            return False
        if MOODS["hang_after"] > 0:
            MOODS["hang_after"] -= 1
            return False
        MOODS["hanging"] += 1
        GUARD.wait_for(lambda: MOODS["hang_after"] < 0)
        MOODS["hanging"] -= 1
        return True


def main() -> None:
    from moto.moto_server import threaded_moto_server

    class Moody(threaded_moto_server.DomainDispatcherApplication):
        def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
            if environ["PATH_INFO"] == "/-moods":
                said = b""
                with GUARD:
                    if environ["REQUEST_METHOD"] == "PUT":
                        MOODS.update(json.loads(environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"]))), there=0)
                        GUARD.notify_all()
                    else:
                        said = json.dumps(MOODS).encode()
                start_response("200 OK", [("Content-Length", str(len(said)))])
                return [said]
            time.sleep(MOODS["delay_s"])
            if held_up(environ["REQUEST_METHOD"]) or refused(environ["REQUEST_METHOD"]):
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
