"""The command line: `actcache VERB`. In: arguments. Out: text or JSON on stdout, progress on stderr, an exit code.

Exit codes: 0 fine, 1 something that the user can mend (said in one line), 2 unsound data, 130 interrupted.

    options.py     which model, which text: options of several verbs
    screen.py      tables, JSON: all that is printed
    progress.py    bars, lines in a log, events: how far a command is
    streams.py     stdout and stderr that end no command
    interrupts.py  Ctrl-C
    plan.py        the verb `plan`
    stores.py      the verbs that make a store and look after it
    audit.py       the verb `audit`
    exchange.py    the verb `import`
    sites.py       the verb `sites`
    serve.py       the verb `serve`
    verbs.py       the others
    train.py       the verb `train`, whose options need torch
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence

from cyclopts import App, CycloptsError, Parameter

from actcache._version import __version__
from actcache.addresses import hidden
from actcache.cli import audit, exchange, serve, sites, stores, verbs
from actcache.cli.interrupts import INTERRUPTED
from actcache.cli.screen import error_line
from actcache.cli.streams import patient_streams
from actcache.errors import ActcacheError, AuditError, CorruptShardError

FINE, USER_ERROR, UNSOUND = 0, 1, 2

_HELP = """Cache a model's activations, serve them shuffled, learn sparse MLPs from them.

Start with `actcache demo`. The parts: `sites`, `plan` and `extract` make a store; `info`, `verify`, `audit` and
`repair` look after it; `extend`, `add-sites`, `delete-sites` and `export` change it; `import` makes one of another
tool's files; `serve` reads one for several trainers; `train`, `evaluate` and `report` make and measure sparse MLPs.
"""

_EPILOGUE = """Every verb takes `--json`: then stdout has one JSON object, and stderr events, a JSON object a line. Exit
codes: 0 fine, 1 something to mend (said in one line), 2 unsound data, 130 interrupted: the same command goes on.

With a model and a text from the Hugging Face hub:

    actcache extract --model gpt2 --text roneneldan/TinyStories \\
      --sites 'blocks.5.hook_resid_post' --out acts.zarr --count 4096
"""

# These verbs are imported when they are asked for: `train` has the trainer's options, whose module needs torch.
_PLAN = "Say what a run will cost before anything runs: bytes, time, memory, money."
_TRAIN = "Train a sparse MLP that predicts one site of a store from another. Run again, it goes on where it stopped."


def build_app() -> App:
    """The command line as a cyclopts app."""
    app = App(
        name="actcache",
        help=_HELP,
        version=f"actcache {__version__}",
        help_format="markdown",
        help_epilogue=_EPILOGUE,
        default_parameter=Parameter(negative=()),
        result_action="return_value",
        exit_on_error=False,
        print_error=False,
        suppress_keyboard_interrupt=False,
    )
    making: list[Callable[..., int]] = [stores.extract, stores.info, stores.verify, audit.audit, stores.repair]
    changing: list[Callable[..., int]] = [stores.extend, stores.add_sites, stores.delete_sites, stores.export]
    app.command(verbs.demo, sort_key=0, help_epilogue="")
    app.command(sites.sites, sort_key=1, help_epilogue="")
    app.command("actcache.cli.plan:plan", sort_key=2, help=_PLAN, help_epilogue="")
    for place, verb in enumerate([*making, *changing], 3):
        app.command(verb, sort_key=place, help_epilogue="")
    app.command(exchange.import_store, name="import", sort_key=19, help_epilogue="")
    app.command(serve.serve, sort_key=20, help_epilogue="")
    app.command("actcache.cli.train:train", sort_key=21, help=_TRAIN, help_epilogue="")
    app.command(verbs.evaluate, sort_key=22, help_epilogue="")
    app.command(verbs.report, sort_key=23, help_epilogue="")
    return app


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; `arguments` are those of the process by default."""
    tokens = sys.argv[1:] if arguments is None else list(arguments)
    as_json = "--json" in tokens
    with patient_streams():
        return _run(tokens, as_json=as_json)


def _run(tokens: Sequence[str], *, as_json: bool) -> int:
    try:
        code = build_app()(tokens) or FINE
        sys.stdout.flush()
        return code
    except CycloptsError as error:
        way_out = f"See '{' '.join(['actcache', *(error.command_chain or ()), '--help'])}'."
        error_line(hidden(f"{error}\n{way_out}"), json=as_json)
        return USER_ERROR
    except (AuditError, CorruptShardError) as error:
        error_line(hidden(str(error)), json=as_json)
        return UNSOUND
    except (ActcacheError, OSError) as error:
        error_line(hidden(str(error)), json=as_json)
        return USER_ERROR
    except KeyboardInterrupt as interrupt:
        # An interrupt cuts in half whatever was being done, the construction of an event loop for one. What such
        # halves have to say when they are collected, at the end of this clause, is of no use to anybody.
        sys.unraisablehook = lambda _: None
        warnings.simplefilter("ignore")
        notes = getattr(interrupt, "__notes__", [])
        way_on = "the same command goes on where this one stopped"
        error_line("; ".join(["interrupted", *notes, way_on]), json=as_json)
        return INTERRUPTED
