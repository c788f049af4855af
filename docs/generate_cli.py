"""Write docs/cli.md from the --help texts: `make docs`."""

from collections.abc import Iterator
from pathlib import Path

import click

from edgekit.cli import main

TARGET = Path(__file__).resolve().parent / "cli.md"
HEAD = """\
# Command line

The `--help` texts, collected by `make docs`. Exit codes: [README](../README.md).
"""


def help_texts(command: click.Command, parent: click.Context | None = None) -> Iterator[str]:
    """The help of ``command`` and of everything below it, a section each."""
    settings = command.context_settings | {"max_content_width": 100, "terminal_width": 100}
    name = command.name if parent else "edgekit"
    context = click.Context(command, parent=parent, info_name=name, **settings)
    yield f"\n## {context.command_path}\n\n```text\n{command.get_help(context).rstrip()}\n```\n"
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            below = command.get_command(context, name)
            if below is not None:
                yield from help_texts(below, context)


def render() -> str:
    """The whole page."""
    return HEAD + "".join(help_texts(main))


if __name__ == "__main__":
    TARGET.write_text(render(), encoding="utf-8")
