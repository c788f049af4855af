"""Options that several commands share."""

from pathlib import Path
from typing import Any

import click

from edgekit.errors import EdgekitError
from edgekit.sizes import parse_size


class Size(click.ParamType):  # type: ignore[type-arg]  # generic since click 8.5
    """A number of bytes: 900MB, 900MiB, 1.2G."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Read the text, or pass a number on."""
        if isinstance(value, int):
            return value
        try:
            return parse_size(str(value))
        except EdgekitError as error:
            self.fail(str(error), param, ctx)


class Budget(Size):
    """A size, or ``auto``: what is free on this machine, given as ``None``."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Read the text."""
        return None if value in (None, "auto") else super().convert(value, param, ctx)


FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)
ANY_PATH = click.Path(exists=True, path_type=Path)
FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
NEW_PATH = click.Path(path_type=Path)

as_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
verbose = click.option("-v", "--verbose", is_flag=True, help="Show the traceback of an error.")
force = click.option("--force", is_flag=True, help="Replace what stands at the output.")
dry_run = click.option("--dry-run", is_flag=True, help="Say what would be written, write nothing.")
context = click.option(
    "--context", type=click.IntRange(min=1), help="Tokens; default 4096 or the model's own."
)
kv_type = click.option(
    "--kv-type",
    type=click.Choice(["f16", "q8_0", "q4_0"]),
    default="f16",
    show_default=True,
    help="Type of the KV cache.",
)
tier = click.option("--tier", help="Every tensor at this tier, such as Q4_K or source.")
budget_auto = click.option(
    "--budget",
    type=Budget(),
    default="auto",
    show_default=True,
    help="Bytes the whole process may hold, or auto: what is free now.",
)
runtime = click.option(
    "--runtime",
    type=click.Choice(["llama", "onnx"]),
    help="llama.cpp or ONNX Runtime; default: llama where the artifact has a GGUF.",
)
residency = click.option(
    "--residency",
    type=click.Choice(["auto", "anon", "mapped"]),
    default="auto",
    show_default=True,
    help="Decode weights into memory (anon), map a file that is kept in the cache (mapped), or map "
    "where the cache has it (auto).",
)
follow = click.option(
    "--follow/--no-follow",
    default=True,
    show_default=True,
    help="Change depth as memory pressure asks for.",
)
repack = click.option(
    "--repack",
    is_flag=True,
    help="Let llama.cpp lay weights out for its fastest kernels, where that fits the budget too.",
)
threads = click.option(
    "--threads", "n_threads", type=click.IntRange(1, 512), help="Threads; default: physical cores."
)
expert_cache = click.option(
    "--expert-cache",
    type=click.IntRange(min=1),
    help="Resident experts per layer; the others are read when they are chosen. Default: all where "
    "they fit, else as many as fit.",
)
no_pager = click.option("--no-pager", is_flag=True, help="Keep all experts resident always.")
prefetch = click.option(
    "--prefetch",
    type=click.Choice(["off", "gate", "table"]),
    default="off",
    show_default=True,
    help="Guess experts of the next layer, by its router or by the trace, and read them ahead.",
)
