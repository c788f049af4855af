"""edgekit: convert a language model once, run it at every memory budget."""

__version__ = "0.1.0"
