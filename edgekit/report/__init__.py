"""The page of `edgekit profile`: one HTML file with everything in it, from one JSON object."""

from edgekit.report.page import render

__all__ = ["render"]
