"""The command line: `actcache VERB`. In: arguments. Out: text or JSON on stdout, progress on stderr, an exit code.

Exit codes: 0 done, 1 something that the user can mend (said in one line), 2 unsound data, 130 interrupted.

A verb is in the file of its group in `actcache --help`; only `plan` and `train` have files of their own. A new verb is
a function in one of these files, and a line with an example in `app.py`. What several verbs take is in `options.py`.

    make.py        verbs that make a store or add to one: extract, extend, add-sites, import
    look.py        verbs that change nothing: sites, info, report
    plan.py        the verb plan, and plan_view.py, which shows its result
    care.py        verbs that look after a store: verify, audit, repair, export, delete-sites
    learn.py       verbs that learn from a store: demo, evaluate, serve
    train.py       the verb train, whose options need torch
    app.py         groups, order, examples, completion, errors in what was typed
    options.py     options of several verbs
    store_view.py  how a store is shown
    screen.py      tables, JSON: all that is printed
    progress.py    bars, lines in a log, events: how far a command is
    outlets.py     stdout and stderr of any kind
    interrupts.py  Ctrl-C
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence

from cyclopts import CycloptsError

from actcache.addresses import hidden
from actcache.cli.app import build_app, refuse_fractions, sentence
from actcache.cli.interrupts import INTERRUPTED
from actcache.cli.outlets import patient_streams
from actcache.cli.screen import FINE, UNSOUND, USER_ERROR, error_line
from actcache.errors import ActcacheError, AuditError, CorruptShardError

__all__ = ["build_app", "main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; `arguments` are those of the process by default."""
    tokens = sys.argv[1:] if arguments is None else list(arguments)
    as_json = "--json" in tokens
    with patient_streams():
        return _run(tokens, as_json=as_json)


def _run(tokens: Sequence[str], *, as_json: bool) -> int:
    try:
        app = build_app(with_help=not tokens or tokens[0].startswith("-"))
        refuse_fractions(app, tokens)
        code = app(tokens) or FINE
        sys.stdout.flush()
        return code
    except CycloptsError as error:
        error_line(hidden(sentence(error)), json=as_json)
        return USER_ERROR
    except (AuditError, CorruptShardError) as error:
        error_line(hidden(str(error)), json=as_json)
        return UNSOUND
    except (ActcacheError, OSError) as error:
        error_line(hidden(str(error)), json=as_json)
        return USER_ERROR
    except KeyboardInterrupt as interrupt:
        # An interrupt can stop anything half-way, such as the construction of an event loop. What such halves report
        # when they are collected, at the end of this clause, is useless.
        sys.unraisablehook = lambda _: None
        warnings.simplefilter("ignore")
        notes = getattr(interrupt, "__notes__", [])
        way_on = "the same command goes on where this one stopped"
        error_line("; ".join(["interrupted", *notes, way_on]), json=as_json)
        return INTERRUPTED
