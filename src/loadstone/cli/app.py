"""The `loadstone` command."""

from __future__ import annotations

import sys

import typer

from loadstone.cli import convert_command, inspect_command, load_command, machine_command, run_command
from loadstone.errors import LoadstoneError

app = typer.Typer(
    name="loadstone",
    help="Loads any PyTorch model onto the machine you have: fast, inside the memory allowed, with the same numbers.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("inspect", epilog=inspect_command.EPILOG)(inspect_command.inspect_command)
app.command("load", epilog=load_command.EPILOG)(load_command.load_command)
app.command("run", epilog=run_command.EPILOG)(run_command.run_command)
app.command("convert", epilog=convert_command.EPILOG)(convert_command.convert_command)
app.command("machine", epilog=machine_command.EPILOG)(machine_command.machine_command)


def _version(value: bool) -> None:
    if value:
        from loadstone import __version__

        typer.echo(f"loadstone {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    pass


def main() -> None:
    """Run the command; a fault is one sentence on standard error and exit code 2."""
    try:
        app()
    except (LoadstoneError, ValueError, OSError) as error:
        if isinstance(error, BrokenPipeError):
            sys.exit(0)
        print(f"loadstone: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("loadstone: interrupted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
