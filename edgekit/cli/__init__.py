"""The command line: parse, call the library, print."""

import os
import sys
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import click

from edgekit import __version__
from edgekit.cli.convert import convert
from edgekit.cli.devices import devices
from edgekit.cli.evaluate import evaluate
from edgekit.cli.export import export
from edgekit.cli.inspect import inspect, verify
from edgekit.cli.materialize import materialize
from edgekit.cli.plan import plan
from edgekit.cli.profile import profile
from edgekit.cli.prune import prune
from edgekit.cli.pull import pull
from edgekit.cli.run import run
from edgekit.cli.serve import serve
from edgekit.cli.trace import trace
from edgekit.disk import DISK_FULL
from edgekit.errors import DiskFullError, DoesNotFitError, EdgekitError


class _Group(click.Group):
    """The one place where errors become exit codes, each with one line on stderr."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        """Run a command; errors in options and arguments are one line too."""
        run: Callable[[], Any] = partial(
            super().main, args, prog_name, complete_var, standalone_mode=False, **extra
        )
        if not standalone_mode:
            return run()
        try:
            code = run()
        except click.exceptions.NoArgsIsHelpError as error:
            error.show()
            code = error.exit_code
        except click.ClickException as error:
            context = getattr(error, "ctx", None)
            path = context.command_path if context else "edgekit"
            code = _line(
                f"{error.format_message().rstrip('.')}; see {path} --help", error.exit_code
            )
        except click.Abort:
            code = _line("stopped", 1)
        sys.exit(code if isinstance(code, int) else 0)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except EdgekitError as error:
            _fail(str(error), error.exit_code)
        except BrokenPipeError:  # the reader of our output went away
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            ctx.exit(1)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except MemoryError:
            _fail(
                "no memory is left; close other programs or ask for less", DoesNotFitError.exit_code
            )
        except OSError as error:
            if error.errno in DISK_FULL:
                _fail(
                    f"the disk is full ({error.strerror}); make room and repeat",
                    DiskFullError.exit_code,
                )
            place = f"{error.filename}: " if error.filename else ""
            _fail(f"{place}{error.strerror or error}; check the path and its permissions", 1)
        except Exception as error:
            _fail(f"{type(error).__name__}: {error}; this is a bug, please report it with -v", 1)


def _fail(message: str, code: int) -> None:
    if _verbose():
        traceback.print_exc()
    raise click.exceptions.Exit(_line(message, code))


def _line(message: str, code: int) -> int:
    click.echo(f"Error: {' '.join(message.split())}", err=True)
    return code


def _verbose() -> bool:
    return bool({"-v", "--verbose"} & set(sys.argv))


@click.group(
    cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.version_option(__version__, prog_name="edgekit")
def main() -> None:
    """Convert a language model once, run it at every memory budget.

    \b
        edgekit convert ./Llama-3.2-1B -o llama-edge
        edgekit plan llama-edge --budget 1.2GiB
        edgekit run llama-edge --budget 1.2GiB -p "Hello"
        edgekit materialize llama-edge --tier Q4_K -o phone.gguf

    Sizes are read as 900MB, 900MiB or 1.2G. Exit codes: 0 done, 1 failed, 2 wrong usage, 3 does not
    fit in memory, 4 not enough disk, 5 refused: unsafe or corrupt input.
    """


COMMANDS = (
    convert, plan, run, serve, pull, materialize, export, profile, evaluate, prune, trace, inspect,
    verify, devices,
)  # fmt: skip
for command in COMMANDS:
    main.add_command(command)
