"""What tests of sessions share."""

from edgekit.llama import Sampling
from edgekit.session import Session

MIB = 1 << 20
ROOMY = 1 << 30
WARM = Sampling(temperature=1.0, seed=3, ignore_eos=True)


def text(session: Session, n: int = 40, prompt: str = "The quick brown") -> str:
    """What a session says, the same each time."""
    return "".join(session.generate(prompt, n, WARM))
