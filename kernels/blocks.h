/* The blocks of ggml's stock types in units of up to 256 weights: what blocks.py says, in C. */
#ifndef EDGEKIT_BLOCKS_H
#define EDGEKIT_BLOCKS_H

#include "native.h"

enum { UNIT = 256, GROUP = 16, GROUPS = UNIT / GROUP, MOST_SCALE_BYTES = 20 };

/* ggml's own numbers (enum ggml_type). */
enum {
    T_F32 = 0, T_F16 = 1, T_Q4_0 = 2, T_Q4_1 = 3, T_Q5_0 = 6, T_Q5_1 = 7, T_Q8_0 = 8,
    T_Q2_K = 10, T_Q3_K = 11, T_Q4_K = 12, T_Q5_K = 13, T_Q6_K = 14, T_BF16 = 30
};

typedef struct {
    int block, block_bytes, bits, low, flip; /* as in blocks.Layout; block 0: no such layout */
    int n_scale[2], scale_at[2];             /* runs of scale bytes */
} layout_t;

INLINE layout_t layout_of(int type) {
    switch (type) {
    case T_Q4_0: return (layout_t){32, 18, 4, -8, 0, {2, 0}, {0, 0}};
    case T_Q4_1: return (layout_t){32, 20, 4, 0, 0, {4, 0}, {0, 0}};
    case T_Q5_0: return (layout_t){32, 22, 5, -16, 0, {2, 0}, {0, 0}};
    case T_Q5_1: return (layout_t){32, 24, 5, 0, 0, {4, 0}, {0, 0}};
    case T_Q8_0: return (layout_t){32, 34, 8, -128, 0x80, {2, 0}, {0, 0}};
    case T_Q2_K: return (layout_t){256, 84, 2, 0, 0, {16, 4}, {0, 80}};
    case T_Q3_K: return (layout_t){256, 110, 3, -4, 0, {14, 0}, {96, 0}};
    case T_Q4_K: return (layout_t){256, 144, 4, 0, 0, {16, 0}, {0, 0}};
    case T_Q5_K: return (layout_t){256, 176, 5, 0, 0, {16, 0}, {0, 0}};
    case T_Q6_K: return (layout_t){256, 210, 6, -32, 0, {18, 0}, {192, 0}};
    default: return (layout_t){0, 0, 0, 0, 0, {0, 0}, {0, 0}};
    }
}

INLINE float float_of(uint32_t bits) { float f; memcpy(&f, &bits, 4); return f; }
INLINE uint32_t bits_of(float f) { uint32_t bits; memcpy(&bits, &f, 4); return bits; }

INLINE float half_at(const uint8_t *p) {
    const uint32_t h = p[0] | (uint32_t)p[1] << 8, sign = (h & 0x8000) << 16, rest = h & 0x7fff;
    if (rest < 0x400) { /* subnormal: a multiple of 2**-24 */
        const float f = (float)rest * (1.0f / 16777216.0f);
        return sign ? -f : f;
    }
    return float_of(sign | (rest >= 0x7c00 ? 0x7f800000 | (rest & 0x3ff) << 13
                                           : (rest << 13) + (112u << 23)));
}

INLINE uint32_t four_at(const uint8_t *p) {
    uint32_t four;
    memcpy(&four, p, 4);
    return four;
}

/* The six-bit scales of Q3_K's 16 groups, four in a word. */
INLINE void levels_of_q3(const uint8_t *p, uint32_t level[4]) {
    const uint32_t low[2] = {four_at(p), four_at(p + 4)}, high = four_at(p + 8);
    for (int k = 0; k < 4; k++) {
        const uint32_t four = low[k % 2] >> (k / 2 * 4) & 0x0f0f0f0f;
        level[k] = four | (high >> (2 * k) & 0x03030303) << 4;
    }
}

/* The six-bit scales, and then the offsets, of the eight double groups of Q4_K and Q5_K. */
INLINE void levels_of_q4(const uint8_t *p, uint32_t level[4]) {
    const uint32_t top = four_at(p + 8);
    for (int k = 0; k < 2; k++) {
        const uint32_t four = four_at(p + 4 * k);
        level[2 * k] = four & 0x3f3f3f3f;
        level[2 * k + 1] = (top >> (4 * k) & 0x0f0f0f0f) | (four >> 2 & 0x30303030);
    }
}

/* The codes of a unit of n weights as they are stored, from or to its blocks. */
void blocks_read_codes(int type, int n, const uint8_t *p, uint8_t code[UNIT]);
void blocks_write_codes(int type, int n, uint8_t *p, const uint8_t code[UNIT]);

/* Scale and offset of each group of a unit of n weights; 0 beyond n. */
void blocks_read_scales(int type, int n, const uint8_t *p, float scale[GROUPS],
                        float offset[GROUPS]);

#endif
