"""Routers of mixtures of experts: traces, and what caches of experts would do with them."""
