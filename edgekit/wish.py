"""What is asked of a session when it begins."""

from dataclasses import dataclass

from edgekit.errors import UsageError


@dataclass(frozen=True)
class Wish:
    """What a session is asked for.

    Attributes:
        budget: Bytes the process may hold; ``None`` takes what is free.
        context: Tokens; ``None`` takes 4096 or the model's own, whichever is less.
        kv_type: Type of the KV cache.
        follow: Change depth as memory pressure asks for.
        repack: Let llama.cpp lay weights out for its fastest kernels where that fits the budget.
        besides: Bytes that the caller will take besides the model, within the budget.
        expert_cache: Resident experts per layer; ``None`` keeps all where they fit, else as many as
            fit.
        pager: Experts may be read when they are chosen; False keeps all resident.
    """

    budget: int | None = None
    context: int | None = None
    kv_type: str = "f16"
    follow: bool = True
    repack: bool = False
    besides: int = 0
    expert_cache: int | None = None
    pager: bool = True


def refuse_llamas(**given: bool) -> None:
    """Refuse options that mean something to llama.cpp only, rather than pass over them.

    Raises:
        UsageError: One of them is given; the values of the keywords say so.
    """
    names = [name for name, is_given in given.items() if is_given]
    if names:
        raise UsageError(
            f"{', '.join(names)}: ONNX Runtime has no such choice; leave that out, or run llama.cpp"
        )
