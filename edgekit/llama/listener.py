"""Hear what routers choose, before the chosen experts run.

llama.cpp's ``cb_eval`` is asked about every node of a graph. A listener has the graph stopped after
``ffn_moe_topk-<block>`` and is told of experts that are not resident; what it does about them is
done when the graph goes on. kernels/listener.c is the same without Python in between; `_evaluate`
is its definition and runs where nothing was compiled.
"""

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from edgekit.kernels.native import listener_function
from edgekit.llama.tensor import data_of, extents, ggml, layout, name_of, strides
from edgekit.routing.eviction import RANKS, Uses, rank

Ids = npt.NDArray[np.int32]
Chosen = Callable[[int, Ids], None]
TOPK, HIDDEN, LATE = "ffn_moe_topk-", "ffn_inp-", "ffn_norm-"

_Evaluate = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p, ctypes.c_bool, ctypes.c_void_p)
_ChosenC = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_int32, ctypes.c_int32)
_LateC = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_int32)


class _State(ctypes.Structure):
    """`listener_t` of kernels/listener.c."""

    _fields_ = (
        ("get_name", ctypes.c_void_p),
        ("get_data", ctypes.c_void_p),
        ("chosen", ctypes.c_void_p),
        ("late", ctypes.c_void_p),
        ("extents", ctypes.c_uint64),
        ("strides", ctypes.c_uint64),
        ("resident", ctypes.c_void_p),
        ("last", ctypes.c_void_p),
        ("seen", ctypes.c_void_p),
        ("distinct", ctypes.c_void_p),
        ("hidden", ctypes.c_void_p),
        ("tensor", ctypes.c_void_p),
        ("n_asked", ctypes.c_uint64),
        ("n_hits", ctypes.c_uint64),
        ("pass_", ctypes.c_uint32),
        ("block_before", ctypes.c_int32),
        ("n_blocks", ctypes.c_int32),
        ("n_experts", ctypes.c_int32),
        ("always", ctypes.c_int32),
        ("listens_late", ctypes.c_int32),
    )


class Listener:
    """Told of the experts of every layer of one context; give it to `Context`.

    Attributes:
        uses: What is resident, bool ``[blocks, experts]``, and when it was last chosen. Whoever
            fills and drops experts keeps ``resident`` true; ``last`` is kept here.
        error: What `chosen` raised; the graph was ended then, and `Context` raises it.
    """

    def __init__(
        self,
        n_blocks: int,
        n_experts: int,
        chosen: Chosen,
        *,
        late: Callable[[int], None] | None = None,
        always: bool = False,
    ) -> None:
        """Listen.

        Args:
            n_blocks: Of the model.
            n_experts: Of a layer.
            chosen: Called with a block's number and the distinct ids chosen there, before they
                run, where one of them is not resident.
            late: Called with a block's number right before its experts run, where the router
                comes before attention and ``chosen`` therefore long before.
            always: Call ``chosen`` also where all are resident.
        """
        self.uses = Uses.empty(n_blocks, n_experts)
        self.error: BaseException | None = None
        self._chosen, self._late = chosen, late
        self._distinct, self._seen = np.zeros(n_experts, np.int32), np.zeros(n_experts, np.uint8)
        self._hidden = (ctypes.c_void_p * n_blocks)()
        self._callbacks = _ChosenC(self._on_chosen), _LateC(self._on_late)
        self._state = self._new_state(n_blocks, n_experts, always)
        native = listener_function()
        self._function: Any = native or _Evaluate(self._evaluate)

    def _new_state(self, n_blocks: int, n_experts: int, always: bool) -> _State:
        lib, places = ggml(), layout()
        address: Callable[[Any], int | None] = lambda f: ctypes.cast(f, ctypes.c_void_p).value  # noqa: E731
        return _State(
            get_name=address(lib.ggml_get_name),
            get_data=address(lib.ggml_get_data),
            chosen=address(self._callbacks[0]),
            late=address(self._callbacks[1]),
            extents=places.extents,
            strides=places.strides,
            resident=self.uses.resident.ctypes.data,
            last=self.uses.last.ctypes.data,
            seen=self._seen.ctypes.data,
            distinct=self._distinct.ctypes.data,
            hidden=ctypes.addressof(self._hidden),
            block_before=n_blocks,
            n_blocks=n_blocks,
            n_experts=n_experts,
            always=always,
            listens_late=self._late is not None,
        )

    @property
    def function(self) -> int:
        """What ``cb_eval`` takes, as an address."""
        return int(ctypes.cast(self._function, ctypes.c_void_p).value or 0)

    @property
    def user_data(self) -> int:
        """What ``cb_eval_user_data`` takes."""
        return ctypes.addressof(self._state)

    @property
    def n_asked(self) -> int:
        """Experts that passes asked for; one that a batch asks for twice counts once."""
        return int(self._state.n_asked)

    @property
    def n_hits(self) -> int:
        """Those of them that were resident."""
        return int(self._state.n_hits)

    def topk(self) -> Ids:
        """Inside ``chosen``: the ids as the router gave them, int32 ``[tokens, used]``."""
        return _read(int(self._state.tensor or 0), np.dtype(np.int32))

    def hidden(self, block: int) -> npt.NDArray[np.float32]:
        """Inside ``chosen``: the residual stream before the experts, ``[tokens, width]``."""
        return _read(int(self._hidden[block] or 0), np.dtype(np.float32))

    def _on_chosen(self, block: int, n: int) -> int:
        try:
            self._chosen(block, self._distinct[:n])
        except BaseException as error:  # C cannot carry it; the context raises it again
            self.error = error
        return int(self.error is None)

    def _on_late(self, block: int) -> int:
        try:
            if self._late is not None:
                self._late(block)
        except BaseException as error:
            self.error = error
        return int(self.error is None)

    def _evaluate(self, tensor: int, ask: bool, _user: int) -> bool:
        """The definition of `listener_eval` in kernels/listener.c."""
        name, state = name_of(tensor), self._state
        if ask:
            block = _block(name, HIDDEN)
            if 0 <= block < state.n_blocks:
                self._hidden[block] = tensor
            return _block(name, TOPK) >= 0 or (state.listens_late and _block(name, LATE) >= 0)
        state.tensor = tensor
        block = _block(name, TOPK)
        if not 0 <= block < state.n_blocks:
            block = _block(name, LATE)
            return not 0 <= block < state.n_blocks or bool(self._on_late(block))
        distinct = self._take(block)
        is_missing = not self.uses.resident[block, distinct].all()
        return not (is_missing or state.always) or bool(self._on_chosen(block, len(distinct)))

    def _take(self, block: int) -> Ids:
        state, uses = self._state, self.uses
        state.pass_ += block <= state.block_before
        state.block_before = block
        distinct = list[int]()
        for row in self.topk():
            for place, expert in enumerate(row):
                if 0 <= expert < state.n_experts:
                    stamp = state.pass_ * RANKS + rank(place)
                    uses.last[block, expert] = max(int(uses.last[block, expert]), stamp)
                    distinct += [] if expert in distinct else [int(expert)]
        self._distinct[: len(distinct)] = distinct
        state.n_asked += len(distinct)
        state.n_hits += int(uses.resident[block, distinct].sum())
        return self._distinct[: len(distinct)]


def _block(name: str, prefix: str) -> int:
    number = name[len(prefix) :]
    return int(number) if name.startswith(prefix) and number.isdecimal() else -1


def _read(tensor: int, kind: np.dtype[Any]) -> npt.NDArray[Any]:
    """A view of a 2-D tensor, ``[slow, fast]``; good until the graph goes on."""
    if not tensor:  # not computed yet, or not of this architecture
        return np.zeros((0, 0), kind)
    fast, slow, *_ = extents(tensor)
    if not slow:  # the last layer, where nobody asks for logits
        return np.zeros((0, fast), kind)
    step = strides(tensor)
    n_bytes = (slow - 1) * step[1] + (fast - 1) * step[0] + kind.itemsize
    raw = memoryview((ctypes.c_uint8 * n_bytes).from_address(data_of(tensor))).cast("B")
    return np.ndarray((slow, fast), kind, raw, strides=(step[1], step[0]))
