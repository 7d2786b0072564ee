"""The `loadstone` command."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from typing import Any

import typer

from loadstone.cli.quick_command import QuickCommand, QuickGroup
from loadstone.errors import LoadstoneError

_HELP = "Loads any PyTorch model onto the machine you have: fast, inside the memory allowed, with the same numbers."
_NAMES = ("inspect", "load", "plan", "run", "convert", "machine", "verify")
# Of the faults of a command line typer names only this one, and since 0.27 they are no longer those of click.
_USAGE_ERROR: type[Exception] = typer.BadParameter.__mro__[1]


def app_for(arguments: Sequence[str]) -> typer.Typer:
    """The command with its subcommands; where the arguments begin with one of them, only that one is imported.

    Args:
        arguments: of the command line, without the command's own name.
    """
    app = typer.Typer(
        name="loadstone",
        cls=QuickGroup,
        help=_HELP,
        no_args_is_help=True,
        rich_markup_mode="rich",
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_options)
    for name in arguments[:1] if arguments and arguments[0] in _NAMES else _NAMES:
        module = importlib.import_module(f"loadstone.cli.{name}_command")
        app.command(name, cls=QuickCommand, epilog=module.EPILOG)(getattr(module, f"{name}_command"))
    return app


def _version(value: bool) -> None:
    if value:
        from loadstone import __version__

        typer.echo(f"loadstone {__version__}")
        raise typer.Exit


def _options(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    pass


def _sentence(error: Exception) -> str:
    """What is wrong, on one line; of what the system refuses, the path first."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        # A file that is renamed to where it belongs: that is what the user named.
        return f"{error.filename2 or error.filename}: {error.strerror}; check the path, and who may use it."
    return " ".join(str(error).split())


def _usage_sentence(error: Any) -> str:
    """What is wrong with a command line, and where its options are explained; nothing where the help was shown."""
    text = " ".join(error.format_message().split()).rstrip(".")
    path = error.ctx.command_path if error.ctx is not None else "loadstone"
    return text and f"{text}; see `{path} --help`."


def main() -> None:
    """Run the command; a fault is one sentence on standard error and exit code 2."""
    try:
        sys.exit(app_for(sys.argv[1:])(standalone_mode=False))
    except _USAGE_ERROR as error:
        if sentence := _usage_sentence(error):
            print(f"loadstone: {sentence}", file=sys.stderr)
        sys.exit(2)
    except (LoadstoneError, ValueError, OSError) as error:
        if isinstance(error, BrokenPipeError):
            sys.exit(0)
        print(f"loadstone: {_sentence(error)}", file=sys.stderr)
        sys.exit(2)
    except (KeyboardInterrupt, typer.Abort):
        print("loadstone: interrupted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
