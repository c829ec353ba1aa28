"""Addresses as people may see them: URLs without user, password and query, which is where keys and signatures stand.

Everything that is printed, raised, logged or stored says an address in this form.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*://)(.*)", re.DOTALL)
_URL_IN_TEXT = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s\"'<>]*")
_QUERY_IN_TEXT = re.compile(r"\?[\w.~%-]+=[^\s\"'<>)]*")
_HIDDEN = "..."
_FEWEST_CHARACTERS = 3
"""Shortest secret that is looked for in the messages of other libraries: shorter ones occur in any text."""


def shown(location: object) -> str:
    """A location as people may see it: a URL without user, password, query and fragment, and a whole path.

    What comes before a URL stays: `--out=s3://key:secret@bucket/a` becomes `--out=s3://bucket/a`.
    """
    text = str(location)
    found = _URL.search(text)
    if found is None:
        return text
    return text[: found.start()] + found[1] + _parts(found[2])[1]


def _parts(rest: str) -> tuple[str, str, str]:
    """User and password, host and path, query and fragment of what follows `scheme://`."""
    place = re.split("[?#]", rest, maxsplit=1)[0]
    host = place.partition("/")[0]
    user = host.rpartition("@")[0]
    if not user and re.search(r":(?!\d*$)", host) and "@" in rest:  # a password with one of the signs / ? # in it
        user = rest.rpartition("@")[0]
        place = re.split("[?#]", rest[len(user) :], maxsplit=1)[0]
        return user, place[1:], rest[len(user) + len(place) :]
    return user, place[len(user) + 1 :] if user else place, rest[len(place) :]


def hidden(text: str, location: object = "") -> str:
    """A message of another library, without what `shown` leaves out of URLs in it and of the location it is about."""
    whole = str(location)
    if "://" in whole:
        text = text.replace(whole, shown(whole))
    text = _URL_IN_TEXT.sub(lambda found: shown(found[0]), text)
    text = _QUERY_IN_TEXT.sub("", text)
    for secret in sorted(_secrets(whole), key=len, reverse=True):
        text = text.replace(secret, _HIDDEN)
    return text


def _secrets(location: str) -> set[str]:
    """The secret pieces of a URL, as they stand there and decoded."""
    found = _URL.search(location)
    if found is None:
        return set()
    user, _, query = _parts(found[2])
    values = [pair.partition("=")[2] for pair in re.split("[?&#]", query)]
    pieces = [user, user.partition(":")[2], query.lstrip("?#"), *values]
    return {form for piece in pieces for form in (piece, unquote(piece)) if len(form) >= _FEWEST_CHARACTERS}


def safe_message(error: BaseException, location: object = "") -> str:
    """What an error about a location says, in one line of at most 400 characters and without secrets.

    Left out are obstore's page of debugging, and all but the message of a server's page of XML.
    """
    said = str(error).split("\n\nDebug source")[0]
    head, _, page = said.partition("<?xml")
    message = re.search("<Message>(.*?)</Message>", page, re.DOTALL)
    line = " ".join(f"{head} {message[1] if message else ''}".split())
    return hidden(line, location)[:400] or type(error).__name__


def cause_of(error: BaseException, location: object) -> BaseException:
    """The cause that our error may name: the other library's error, unless a secret can be read in it."""
    for link in _chain(error):
        said = f"{link} {link!r}"
        if hidden(said, location) != said:
            return RuntimeError(f"{type(error).__name__}: {hidden(str(error), location)}")
    return error


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        link = link.__cause__ or link.__context__


def all_hidden(value: Any) -> Any:
    """A JSON-able value in which every text is as `shown` gives it."""
    if isinstance(value, dict):
        return {key: all_hidden(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [all_hidden(part) for part in value]
    return _URL_IN_TEXT.sub(lambda found: shown(found[0]), value) if isinstance(value, str) else value
