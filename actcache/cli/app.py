"""The verbs as one cyclopts app: their groups, their order, an example for each, and shell completion.

In: the functions of the rooms beside this one. Out: an app, and one sentence for each of its errors.
"""

from __future__ import annotations

import pkgutil
import re
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args, get_origin

import cyclopts
from cyclopts import App, CycloptsError, Group, Parameter

from actcache._version import __version__
from actcache.errors import ConfigError

_HELP = """Cache a model's activations, serve them shuffled, learn sparse MLPs from them.

Start with `actcache demo`, or with the example of `actcache extract --help`.
"""

_EPILOGUE = """Every verb takes `--json`: stdout then has one JSON object, and stderr events, one JSON object a line.

Exit codes: 0 done, 1 something to mend (said in one line), 2 unsound data, 130 interrupted (run again to continue).

With a model and a text from the Hugging Face hub:

    actcache extract --model gpt2 --text roneneldan/TinyStories \\
      --sites 'blocks.5.hook_resid_post' --out acts.zarr --count 4096
"""


class _Verb(NamedTuple):
    """A verb: the path of its function, which is imported when it is used, and a command line that shows it."""

    function: str
    example: str
    name: str | None = None
    help: str | None = None


# `train` says its help here, since the module of its options needs torch.
_VERBS: dict[str, list[_Verb]] = {
    "Make a store": [
        _Verb(
            "actcache.cli.make:extract",
            "actcache extract --sites 'blocks.3.mlp.hook_in' 'blocks.3.hook_mlp_out' \\\n  --count 128 --out acts.zarr",
        ),
        _Verb("actcache.cli.make:extend", "actcache extend acts.zarr --skip-documents 200 --count 64"),
        _Verb(
            "actcache.cli.make:add_sites",
            "actcache add-sites acts.zarr --sites 'blocks.0.hook_resid_pre' --codec sparse",
        ),
        _Verb(
            "actcache.cli.make:import_store",
            "actcache import 'blocks.3.hook_mlp_out=acts.npy' --format npy \\\n  --out imported.zarr",
            name="import",
        ),
    ],
    "Look at a model, a store or a run": [
        _Verb("actcache.cli.look:sites", "actcache sites stories-4l 'blocks.*.hook_mlp_out'"),
        _Verb(
            "actcache.cli.plan:plan",
            "actcache plan stories-4l stories-corpus 'blocks.*.hook_mlp_out' \\\n  --tokens 1000000000 --seconds 5",
        ),
        _Verb("actcache.cli.look:info", "actcache info acts.zarr"),
        _Verb("actcache.cli.look:report", "actcache report run"),
    ],
    "Take care of a store": [
        _Verb("actcache.cli.care:verify", "actcache verify acts.zarr"),
        _Verb("actcache.cli.care:audit", "actcache audit acts.zarr --count 4"),
        _Verb("actcache.cli.care:repair", "actcache repair acts.zarr"),
        _Verb("actcache.cli.care:export", "actcache export acts.zarr --rows 0:4096 --codec int8 --out part.zarr"),
        _Verb("actcache.cli.care:delete_sites", "actcache delete-sites acts.zarr blocks.0.hook_resid_pre"),
    ],
    "Learn from a store": [
        _Verb("actcache.cli.learn:demo", "actcache demo --small --out demo"),
        _Verb(
            "actcache.cli.train:train",
            "actcache train acts.zarr --site-in blocks.3.mlp.hook_in \\\n"
            "  --site-out blocks.3.hook_mlp_out --out run --n-steps 200",
            help="Train a sparse MLP that predicts one site of a store from another. Run again to continue where it "
            "stopped.",
        ),
        _Verb("actcache.cli.learn:evaluate", "actcache evaluate run --skip-documents 400 --count 16"),
        _Verb(
            "actcache.cli.learn:serve",
            "actcache serve acts.zarr --sites '*' --socket acts.sock --consumers 2 \\\n  --batch-rows 2048",
        ),
    ],
}
_COMPLETION = "Install completion of verbs and options for your shell."
_COMPLETION_EXAMPLE = "actcache --install-completion --shell bash"


def build_app(*, with_help: bool = True) -> App:
    """The command line as a cyclopts app.

    Args:
        with_help: import what every verb needs, so that the list of verbs can say what each of them does. Without, only
            the verb that is called is imported, which is a second faster.
    """
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
    for place, (group, verbs) in enumerate(_VERBS.items()):
        heading = Group(group, sort_key=place)
        for order, verb in enumerate(verbs):
            given: dict[str, Any] = {"group": heading, "sort_key": order, "help_epilogue": _example(verb.example)}
            if verb.help is not None:
                given["help"] = verb.help
            function: Any = pkgutil.resolve_name(verb.function) if with_help and verb.help is None else verb.function
            app.command(function, _name_of(verb), **given)
    other = Group("Other", sort_key=len(_VERBS))
    app.register_install_completion_command(help=_COMPLETION, group=other, help_epilogue=_example(_COMPLETION_EXAMPLE))
    for flag, says in (("--help", "Show this help."), ("--version", "Show the version.")):
        app[flag].group, app[flag].help = other, says
    return app


def _name_of(verb: _Verb) -> str:
    return verb.name or verb.function.rpartition(":")[2].replace("_", "-")


def _example(command: str) -> str:
    return "Example:\n\n" + "\n".join(f"    {line}" for line in command.splitlines()) + "\n"


def refuse_fractions(app: App, tokens: Sequence[str]) -> None:
    """Raise `ConfigError` for a fraction where an option takes a whole number: cyclopts would round it."""
    typed = [re.fullmatch(r"(?:(--[a-z-]+)=)?([+-]?\d*\.\d+)", token) for token in tokens]
    if not any(typed) or tokens[0] not in list(app):
        return
    arguments = app[tokens[0]].assemble_argument_collection()
    whole = {
        name for argument in arguments if int in (argument.hint, *get_args(argument.hint)) for name in argument.names
    }
    for before, found in zip(["", *tokens], typed, strict=False):
        if found and (option := found[1] or before) in whole and not float(found[2]).is_integer():
            raise ConfigError(f"{option} takes a whole number, not '{found[2]}'; see 'actcache {tokens[0]} --help'")


def sentence(error: CycloptsError) -> str:
    """What is wrong with a command line, and the way out, in one sentence."""
    verb = " ".join(["actcache", *(error.command_chain or ())])
    return f"{_reason(error, verb)}; see '{verb} --help'"


def _reason(error: CycloptsError, verb: str) -> str:
    name = "" if error.argument is None else error.argument.name
    if error.argument is not None and error.argument.index is not None:
        name = name.lstrip("-").upper()
    match error:
        case cyclopts.UnknownCommandError(unused_tokens=[str(typed), *_]) if not typed.startswith("-"):
            return f"there is no verb {typed!r}{_nearest(error)}"
        case cyclopts.UnknownCommandError(unused_tokens=[str(typed), *_]):
            return f"{verb} has no option {typed}{_nearest(error)}"
        case cyclopts.UnknownOptionError():
            return f"{verb} has no option {error.token.keyword or error.token.value}{_nearest(error)}"
        case cyclopts.UnusedCliTokensError():
            return f"{verb} does not take {' '.join(map(repr, error.unused_tokens or []))}"
        case cyclopts.MissingArgumentError() if error.argument is not None:
            is_typed = name in (error.root_input_tokens or [])
            return f"{name} needs a value" if is_typed else f"{verb} needs {name}"
        case cyclopts.RepeatArgumentError():
            return f"{error.token.keyword or name} is given twice"
        case cyclopts.CoercionError() if error.token is not None and error.msg is None:
            return f"{error.token.keyword or name} takes {_kind(error.target_type)}, not {error.token.value!r}"
    return " ".join(str(error).split()).removesuffix(".")


def _kind(wanted: Any) -> str:
    """`a whole number or auto`: the values that a type has."""
    if get_origin(wanted) is Literal:
        *first, last = map(str, get_args(wanted))
        return f"{', '.join(first)} or {last}" if first else last
    if kinds := [_kind(one) for one in get_args(wanted) if one is not type(None)]:
        return " or ".join(kinds)
    return {int: "a whole number", float: "a number", bool: "no value"}.get(wanted) or str(wanted)


def _nearest(error: CycloptsError) -> str:
    """` (did you mean --length?)`, if cyclopts found something near."""
    _, found, rest = str(error).partition("Did you mean ")
    return f" (did you mean {rest.split('?')[0].strip(chr(34))}?)" if found else ""
