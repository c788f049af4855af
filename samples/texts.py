"""Choose the excerpts that edgekit ships as calibration and measuring text.

An excerpt is a run of lines of one document. Which documents and where an excerpt
starts follows a hash of the document's name, so the choice looks random and is the same each time.
"""

import hashlib
import re
import unicodedata
from collections.abc import Sequence

import click

from . import CALIBRATION_TEXT, HELDOUT_TEXT
from .corpus import Document, heldout_documents, training_documents

MODULE_BYTES, TOPIC_BYTES = 5000, 2500  # about 1400 and 700 tokens, so an excerpt has context
CALIBRATION_BYTES, HELDOUT_BYTES = 300_000, 120_000
TOPIC_SHARE = 0.2  # of the calibration text: prose and tables beside code

TOP_LEVEL = re.compile(r"\n\n+(?=\S)")


def name_hash(document: Document) -> int:
    """A number in ``[0, 2**32)`` that depends on the name alone."""
    return int.from_bytes(hashlib.sha256(document.name.encode()).digest()[:4], "little")


def excerpt(document: Document, n_bytes: int) -> str:
    """Whole lines of ``document``, at most ``n_bytes``, from the start of a top-level block.

    The block is drawn from those that have ``n_bytes`` after them.
    """
    text = document.text.strip() + "\n"
    starts = [0, *(match.end() for match in TOP_LEVEL.finditer(text))]
    starts = [at for at in starts if len(text) - at >= n_bytes] or [0]
    start = starts[name_hash(document) % len(starts)]
    cut = text[start:].encode()[:n_bytes]
    return cut[: cut.rindex(b"\n") + 1].decode() + "\n"


def is_plain(text: str) -> bool:
    """True if normalizing ``text`` changes nothing, so every tokenizer reads the same bytes."""
    return unicodedata.is_normalized("NFC", text) and not re.search(r"[\x00-\x08\x0b-\x1f]", text)


def choose(documents: Sequence[Document], n_bytes: int, total_bytes: int) -> list[str]:
    """Excerpts of ``n_bytes``, in the order of the hashes, until ``total_bytes``."""
    parts: list[str] = []
    for document in sorted(documents, key=name_hash):
        if sum(len(part.encode()) for part in parts) >= total_bytes:
            break
        parts += filter(is_plain, [excerpt(document, n_bytes)])
    return parts


def calibration(documents: Sequence[Document]) -> str:
    """Four fifths modules, one fifth language reference, spread evenly."""
    topics = [d for d in documents if d.name.startswith("topic:")]
    code = [d for d in documents if d not in topics and len(d.text) > MODULE_BYTES]
    n_topic = int(CALIBRATION_BYTES * TOPIC_SHARE)
    prose = choose([d for d in topics if len(d.text) > TOPIC_BYTES], TOPIC_BYTES, n_topic)
    parts = choose(code, MODULE_BYTES, CALIBRATION_BYTES - n_topic)
    gap = len(parts) / len(prose)
    for i in reversed(range(len(prose))):
        parts.insert(round(i * gap), prose[i])
    return "".join(parts)


def heldout(documents: Sequence[Document]) -> str:
    """An excerpt of every held-out module, as long as it takes for all to fill the text."""
    n_bytes = MODULE_BYTES
    while True:
        text = "".join(choose(documents, n_bytes, 2 * HELDOUT_BYTES))
        if len(text.encode()) >= HELDOUT_BYTES:
            return text
        n_bytes += 250


@click.command()
def main() -> None:
    """Write both texts.

    \b
        python -m samples.texts
    """
    for path, text in (
        (CALIBRATION_TEXT, calibration(training_documents())),
        (HELDOUT_TEXT, heldout(heldout_documents())),
    ):
        path.write_text(text, "utf-8")
        click.echo(f"{path.name}: {len(text.encode())} bytes")


if __name__ == "__main__":
    main()
