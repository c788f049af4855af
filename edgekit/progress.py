"""How long-running work tells how far it is, without knowing who listens."""

from typing import Protocol


class Progress(Protocol):
    """Listens to one stage after another."""

    def start(self, stage: str, total: int) -> None:
        """A stage begins; ``total`` counts its units of work."""

    def advance(self, amount: int) -> None:
        """``amount`` more units of the stage are done."""

    def note(self, text: str) -> None:
        """Something the user should know, one line."""


class Silent:
    """Nobody listens."""

    def start(self, stage: str, total: int) -> None:
        """Do nothing."""

    def advance(self, amount: int) -> None:
        """Do nothing."""

    def note(self, text: str) -> None:
        """Do nothing."""
