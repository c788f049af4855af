"""Two small trained models, and the texts that edgekit calibrates and measures with by default.

`CALIBRATION_TEXT` holds excerpts of Python standard library modules that the sample models were
trained on; `HELDOUT_TEXT` holds excerpts of modules that no sample model, tokenizer or calibration
has seen. Both are UTF-8. `samples/README.md` says how all of it was made.
"""

from pathlib import Path

FOLDER = Path(__file__).resolve().parent
CALIBRATION_TEXT = FOLDER / "text" / "calibration.txt"
HELDOUT_TEXT = FOLDER / "text" / "heldout.txt"


def calibration_text() -> str:
    """The default calibration text, about 300 kB of code and documentation."""
    return CALIBRATION_TEXT.read_text("utf-8")


def heldout_text() -> str:
    """The default measuring text, about 120 kB; disjoint from `calibration_text`."""
    return HELDOUT_TEXT.read_text("utf-8")
