"""Draw tokens from logits: the chain of `edgekit.llama.Sampling`, in numpy."""

import numpy as np
import numpy.typing as npt

from edgekit.llama import Sampling

F32Array = npt.NDArray[np.float32]


class Sampler:
    """Draws one token after another; equal seeds give equal draws."""

    def __init__(self, sampling: Sampling) -> None:
        """Begin the draws of ``sampling.seed``."""
        self.sampling, self._random = sampling, np.random.default_rng(sampling.seed)

    def draw(self, logits: F32Array) -> int:
        """A token for float32 logits ``[vocab]``."""
        if self.sampling.temperature == 0:
            return int(logits.argmax())
        ids, shares = kept(logits, self.sampling)
        return int(self._random.choice(ids, p=shares))


def kept(
    logits: F32Array, sampling: Sampling
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Tokens that may be drawn, likeliest first, and the probability of each.

    In llama.cpp's order: top_k, top_p and min_p look at probabilities before the temperature.
    """
    k = min(sampling.top_k or len(logits), len(logits))
    ids = np.argpartition(-logits, k - 1)[:k].astype(np.int64)
    ids = ids[np.argsort(-logits[ids], kind="stable")]
    shares = softmax(logits[ids])
    enough = int(np.searchsorted(np.cumsum(shares), sampling.top_p)) + 1
    likely = shares >= sampling.min_p * shares[0]
    ids = ids[: min(enough, max(1, int(likely.sum())))]
    return ids, softmax(logits[ids] / sampling.temperature)


def softmax(logits: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
    """Probabilities of logits."""
    weights = np.exp(logits.astype(np.float64) - float(logits.max()))
    return weights / weights.sum()
