"""The commands of docs/pull.md, run as they stand there, against a server of the test."""

import re
import subprocess
import sys
from pathlib import Path

from pulling import LEVELS
from static_server import Served

PAGE = Path(__file__).parents[2] / "docs/pull.md"


def test_the_commands_of_the_page_work_one_after_the_other(
    server: Served, artifact: Path, tmp_path: Path
) -> None:
    (block,) = re.findall(r"^```bash\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.M | re.S)
    lines = block.replace("https://example.org/llama-edge", server.url).splitlines()
    assert [line.split()[1] for line in lines] == ["pull", "run", "pull"]
    for line in lines:
        command = line.replace("edgekit", f"{sys.executable} -m edgekit", 1)
        subprocess.run(["bash", "-c", command], cwd=tmp_path, stdin=subprocess.DEVNULL, check=True)
    pulled = tmp_path / "llama-edge" / LEVELS
    assert pulled.read_bytes() == (artifact / LEVELS).read_bytes()
