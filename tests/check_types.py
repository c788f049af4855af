"""Run mypy over every package, each file under the name it is imported by.

`exporters/`, `kernels/`, `devices/` and `samples/` are top-level folders that import as
`edgekit.exporters` and so on. mypy's command line derives a module's name from its folder and
cannot be told so; its build API takes the name beside the path.
"""

import sys
from pathlib import Path

import mypy.build
from mypy.errors import CompileError
from mypy.main import process_options

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {
    "edgekit": "edgekit",
    "edgekit.devices": "devices",
    "edgekit.exporters": "exporters",
    "edgekit.kernels": "kernels",
    "edgekit.samples": "samples",
}


def sources() -> list[mypy.build.BuildSource]:
    """Every Python file of the packages with its module name."""
    found = []
    for package, folder in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            inner = path.relative_to(ROOT / folder).with_suffix("").parts
            parts = [package, *(inner[:-1] if inner[-1] == "__init__" else inner)]
            found.append(mypy.build.BuildSource(str(path.relative_to(ROOT)), ".".join(parts)))
    return found


def main() -> int:
    """Print what mypy finds; 1 if that is anything."""
    _, options = process_options(sys.argv[1:], require_targets=False)
    files = sources()
    try:
        messages = mypy.build.build(files, options).errors
    except CompileError as error:
        messages = error.messages
    n_errors = sum(": error:" in line for line in messages)
    verdict = f"{n_errors} errors" if messages else "no errors"
    sys.stdout.write("\n".join([*messages, f"mypy: {verdict} in {len(files)} files", ""]))
    return int(bool(messages))


if __name__ == "__main__":
    sys.exit(main())
