"""Codecs turn a weight into a stack of levels and back.

Everything that differs between codecs is a row of `CODECS`; `edgekit.codecs.job.Codec` tells what
a row has.
"""

from edgekit.codecs.bitstack import BITSTACK
from edgekit.codecs.job import Codec
from edgekit.codecs.nested_stack import NESTED

__all__ = ["CODECS", "Codec"]

CODECS: dict[str, Codec] = {"nested": NESTED, "bitstack": BITSTACK}
