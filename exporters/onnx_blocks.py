"""Codes as bytes: planes packed low bits first, and composed to whole codes again."""

import numpy as np
import numpy.typing as npt

U8Array = npt.NDArray[np.uint8]
I8Array = npt.NDArray[np.int8]

# For every byte of codes of 2 or 4 bits: the same codes, each in twice the bits
_CRUMBS = np.array([sum((b >> 2 * i & 3) << 4 * i for i in range(4)) for b in range(256)], "<u2")
_NIBBLES = np.array([(b & 15) | (b >> 4) << 8 for b in range(256)], "<u2")
_WIDER = {
    2: (_CRUMBS, np.uint16(4), np.uint16(0x2222)),
    4: (_NIBBLES, np.uint16(16), np.uint16(0x0808)),
}


def planes_of(codes: I8Array, lowest: int) -> tuple[U8Array, ...]:
    """Pack master codes ``[..., size]`` into planes, lowest first; ``[..., size * bits / 8]`` each.

    ``q8 = 16*q4 + r4`` and ``q4 = 4*q2 + r2``; a code or residual of ``b`` bits is stored plus
    ``2**(b - 1)``.
    """
    q8 = codes.astype(np.int16)
    q4 = (q8 + 8) >> 4
    r4 = packed(q8 - 16 * q4, 4)
    if lowest == 4:
        return packed(q4, 4), r4
    q2 = (q4 + 2) >> 2
    return packed(q2, 2), packed(q4 - 4 * q2, 2), r4


def packed(codes: npt.NDArray[np.int16], bits: int) -> U8Array:
    """Signed codes of ``bits`` bits, stored plus ``2**(bits - 1)``, low bits first."""
    per_byte = 8 // bits
    raised = (codes + (1 << bits - 1)).astype(np.uint8)
    fields = raised.reshape(*codes.shape[:-1], -1, per_byte)
    found = fields[..., 0].copy()
    for i in range(1, per_byte):
        found |= fields[..., i] << np.uint8(bits * i)
    return found


def unpacked(raw: U8Array, bits: int) -> npt.NDArray[np.int16]:
    """Signed codes ``[..., 8 // bits * bytes]``."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    fields = (raw[..., None] >> shifts) & np.uint8((1 << bits) - 1)
    flat = fields.reshape(*raw.shape[:-1], -1).astype(np.int16)
    return flat - np.int16(1 << bits - 1)


def composed(high: U8Array, low: U8Array, bits: int) -> U8Array:
    """Codes of ``2 * bits`` bits from two planes of ``bits`` bits, both ``[..., bytes]``.

    ``2**bits * high + low`` on the stored forms; no field borrows from its neighbour.
    """
    table, factor, offset = _WIDER[bits]
    wide = table[high]
    wide *= factor
    wide += table[low]
    wide -= offset
    return wide.view(np.uint8)
