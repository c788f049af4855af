"""The corpus of the sample models: the standard library of the running Python.

A document is one module. Some modules are held out: neither a model nor a tokenizer nor the
calibration text may contain them. The split is by module name, so it is the same on every machine
with the same Python version.
"""

import ast
import hashlib
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

STDLIB = Path(sysconfig.get_path("stdlib"))

# Never trained on. A name covers the module and everything below it.
HELD_OUT = (
    "argparse",
    "asyncio.queues",
    "bisect",
    "calendar",
    "colorsys",
    "graphlib",
    "json",
    "os",
    "sched",
    "shlex",
    "statistics",
    "textwrap",
    "wsgiref",
)

# Folders that are tests, tables or copies rather than library code or prose.
SKIPPED_FOLDERS = frozenset(
    ("__pycache__", "encodings", "idle_test", "lib2to3", "site-packages", "test", "tests")
)

# Files that are tables, generated for one machine, or published on purpose as nonsense.
SKIPPED_FILES = frozenset(("html/entities.py", "pydoc_data/topics.py", "antigravity.py", "this.py"))


@dataclass(frozen=True)
class Document:
    """One module or text; ``name`` is dotted for modules."""

    name: str
    text: str


def is_held_out(name: str) -> bool:
    """True if the module ``name``, as ``json.decoder``, is kept from training."""
    return any(name == held or name.startswith(held + ".") for held in HELD_OUT)


def is_skipped(path: Path) -> bool:
    """True if ``path``, relative to the standard library, is neither trained nor measured on."""
    return (
        not SKIPPED_FOLDERS.isdisjoint(path.parts)
        or path.as_posix() in SKIPPED_FILES
        or path.name.startswith("_sysconfigdata_")
    )


def module_name(path: Path) -> str:
    """The dotted name of ``path``, relative to the standard library."""
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def topics(folder: Path = STDLIB) -> list[Document]:
    """The language reference that ``help()`` prints, one document per topic."""
    tree = ast.parse((folder / "pydoc_data" / "topics.py").read_text("utf-8"))
    table = next(node for node in tree.body if isinstance(node, ast.Assign))
    texts: dict[str, str] = ast.literal_eval(table.value)
    return [Document(f"topic:{name}", text) for name, text in sorted(texts.items())]


def modules(folder: Path = STDLIB) -> list[Document]:
    """Every module that is not skipped, sorted by name, each text once."""
    paths = (path.relative_to(folder) for path in folder.rglob("*.py"))
    named = sorted((module_name(path), path) for path in paths if not is_skipped(path))
    return list(unique(Document(name, (folder / path).read_text("utf-8")) for name, path in named))


def unique(documents: Iterable[Document]) -> Iterator[Document]:
    """The documents whose text is not blank and was not there before."""
    seen: set[bytes] = set()
    for document in documents:
        digest = hashlib.sha256(document.text.strip().encode()).digest()
        if document.text.strip() and digest not in seen:
            seen.add(digest)
            yield document


def training_documents(extra: Iterable[Path] = (), folder: Path = STDLIB) -> list[Document]:
    """Modules that are not held out, the language reference, then the ``extra`` text files."""
    library = [document for document in modules(folder) if not is_held_out(document.name)]
    others = [Document(f"file:{path.name}", path.read_text("utf-8")) for path in extra]
    return list(unique(library + topics(folder) + others))


def heldout_documents(folder: Path = STDLIB) -> list[Document]:
    """The held-out modules."""
    return [document for document in modules(folder) if is_held_out(document.name)]
