"""Which tiers a tensor gets, from the tiers asked for, its width, its type and its statistics."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pytest

from edgekit.codecs.nested_stack import chain_of, check_tiers
from edgekit.convert_options import DEFAULT_TIERS, Options, check_options
from edgekit.errors import UsageError


@dataclass(frozen=True)
class Tensor:
    """Facts of a tensor; it has no values."""

    cols: int
    source_type: str = "BF16"
    quantizable: bool = True
    name: str = "blk.0.attn_q.weight"

    @property
    def shape(self) -> tuple[int, ...]:
        return (4, self.cols)

    def rows(self, start: int, stop: int) -> npt.NDArray[np.uint8]:
        raise NotImplementedError


@pytest.mark.parametrize(
    ("tensor", "asked", "has_weights", "wanted"),
    [
        (Tensor(512), DEFAULT_TIERS, True, DEFAULT_TIERS),
        (Tensor(96), DEFAULT_TIERS, True, ("Q4_0", "Q5_0", "Q5_1", "Q8_0", "source")),
        (Tensor(80), DEFAULT_TIERS, True, ("F16", "source")),
        (Tensor(80, "F16"), DEFAULT_TIERS, True, ("source",)),
        (Tensor(512, quantizable=False), ("Q4_K", "Q8_0"), True, ("source",)),
        (Tensor(512), ("Q4_K", "Q8_0"), True, ("Q4_K", "Q8_0")),
        (Tensor(512, "F16"), ("Q8_0", "F16", "source"), True, ("Q8_0", "source")),
        (Tensor(96), ("Q4_K", "Q4_0", "source"), True, ("Q4_0", "Q5_0", "source")),
        (Tensor(512), ("IQ2_XXS", "Q4_K", "source"), True, ("IQ2_XXS", "Q4_K", "source")),
        (Tensor(512), ("IQ2_XXS", "Q4_K", "source"), False, ("Q4_K", "source")),
        (Tensor(96), ("IQ2_XXS", "Q4_K", "source"), False, ("IQ4_NL", "Q5_0", "source")),
        (Tensor(512), ("IQ2_XXS", "source"), False, ("source",)),
    ],
)
def test_a_tensor_gets_the_tiers_it_can_have(
    tensor: Tensor, asked: tuple[str, ...], has_weights: bool, wanted: tuple[str, ...]
) -> None:
    assert chain_of(tensor, asked, has_weights) == wanted


def test_a_tensor_that_no_tier_is_left_for_is_named() -> None:
    with pytest.raises(UsageError, match=r"nothing on blk\.0\.attn_q\.weight, .* add a tier above"):
        chain_of(Tensor(512), ("IQ2_XXS",), has_weights=False)


@pytest.mark.parametrize(
    ("tiers", "message"),
    [
        (("Q4_K", "Q2_K"), "few bits to many"),
        (("Q2_K", "Q2_K"), "name each tier once"),
        (("source", "Q8_0"), "source last"),
        ((), "name each tier once"),
        (("Q2_K", "IQ4_XS"), "IQ4_XS can only come first"),
        (("Q4K",), "unknown tier 'Q4K'; did you mean 'Q4_K'"),
    ],
)
def test_tiers_that_are_no_chain_are_refused(tiers: tuple[str, ...], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        check_tiers(tiers)


def test_a_type_that_needs_statistics_is_refused_with_no_calibration() -> None:
    check_options(Options(tiers=("IQ2_XXS", "source")))
    check_options(Options(tiers=("Q2_K", "source"), statistics=False))
    with pytest.raises(UsageError, match="leave --no-calibration out, or give --imatrix FILE"):
        check_options(Options(tiers=("IQ2_XXS", "source"), statistics=False))
