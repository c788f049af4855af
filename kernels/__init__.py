"""One file per operation: the slow obvious reference beside the fast version."""
