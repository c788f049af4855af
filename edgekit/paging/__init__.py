"""Experts on demand: which are resident, who fills them, who leaves, and what is read ahead."""

from edgekit.paging.pager import Pager, PagerOptions, PagingStats

__all__ = ["Pager", "PagerOptions", "PagingStats"]
