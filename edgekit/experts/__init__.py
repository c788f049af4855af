"""Mixtures of experts: traces of routers, what caches would do with them, and experts on demand."""
