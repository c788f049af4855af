"""``edgekit pull`` in this process, and what is looked at afterwards."""

import json
from pathlib import Path
from typing import Any

from click.testing import CliRunner, Result

from edgekit.catalog import open_catalog
from edgekit.cli import main
from edgekit.plan import plan_budget

BASE, LEVELS = "checkpoint-Q2_K.gguf", "checkpoint.levels"


def pull(*words: object) -> Result:
    return CliRunner().invoke(main, ["pull", *map(str, words)])


def pulled(*words: object) -> Any:
    result = pull(*words, "--json")
    assert result.exit_code == 0, (result.stderr, result.exception)
    return json.loads(result.stdout)


def check_refused(result: Result, code: int, words: str, out: Path) -> None:
    """One line that says ``words``, and nothing under the final name."""
    assert (result.exit_code, result.stdout) == (code, ""), (result.stderr, result.exception)
    last = result.stderr.splitlines()[-1]
    assert last.startswith("Error: ") and words in last, result.stderr
    assert "Traceback" not in result.stderr and not out.exists()


def budgets(artifact: Path) -> list[int]:
    """Five, from the lowest depth to all of it; bytes."""
    catalog = open_catalog(artifact)
    top = plan_budget(catalog, 1 << 30, 256)
    low = top.memory.total + sum(s.levels[0].n_bytes for s in catalog.manifest.stacks)
    return [low + (top.total_bytes - low) * i // 4 for i in range(5)]


def damage(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)
