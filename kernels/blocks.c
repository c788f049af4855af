/* The blocks of ggml's stock types: what blocks.py says, in C.
 *
 * All floats are float32, every operation rounded once: compile with -ffp-contract=off. */
#include "blocks.h"

/* One plane of n codes, see blocks.Plane: a function for each shape and shift, so that each
 * vectorizes. Of a code's planes the lowest is read first (OP is =), the others or-ed into it. */
#define PLANE(BITS, RUN, SHIFT, OP)                                                                \
    FAST static void read_##BITS##_##RUN##_##SHIFT(const uint8_t *restrict at, int n,              \
                                                   uint8_t *restrict code) {                       \
        for (int first = 0; first < n; first += RUN * 8 / BITS, at += RUN, code += RUN * 8 / BITS) \
            for (int s = 0; s < 8 / BITS; s++)                                                     \
                for (int i = 0; i < RUN; i++)                                                      \
                    code[s * RUN + i] OP (uint8_t)(                                                \
                        ((uint8_t)(at[i] >> (s * BITS)) & ((1 << BITS) - 1)) << SHIFT);            \
    }                                                                                              \
    FAST static void write_##BITS##_##RUN##_##SHIFT(uint8_t *restrict at, int n,                   \
                                                    const uint8_t *restrict code) {                \
        for (int first = 0; first < n; first += RUN * 8 / BITS, at += RUN, code += RUN * 8 / BITS) \
            for (int i = 0; i < RUN; i++) {                                                        \
                uint8_t byte = 0;                                                                  \
                for (int s = 0; s < 8 / BITS; s++)                                                 \
                    byte |= (uint8_t)(((uint8_t)(code[s * RUN + i] >> SHIFT) &                     \
                                       ((1 << BITS) - 1)) << (s * BITS));                          \
                at[i] = byte;                                                                      \
            }                                                                                      \
    }
PLANE(1, 1, 4, |=)
PLANE(1, 32, 2, |=)
PLANE(1, 32, 4, |=)
PLANE(2, 32, 0, =)
PLANE(2, 32, 4, |=)
PLANE(4, 16, 0, =)
PLANE(4, 32, 0, =)
PLANE(4, 64, 0, =)

/* Apply to every block of a unit of n weights, at p, its codes at c; DO is read or write. */
#define EACH(BYTES, ...)                                                                           \
    for (int i = 0; i < n; i += 32, p += BYTES, c += 32) {                                         \
        __VA_ARGS__;                                                                               \
    }                                                                                              \
    break
#define PLANES(DO)                                                                                 \
    switch (type) {                                                                                \
    case T_Q4_0: EACH(18, DO##_4_16_0(p + 2, 32, c));                                              \
    case T_Q4_1: EACH(20, DO##_4_16_0(p + 4, 32, c));                                              \
    case T_Q5_0: EACH(22, DO##_4_16_0(p + 6, 32, c); DO##_1_1_4(p + 2, 32, c));                    \
    case T_Q5_1: EACH(24, DO##_4_16_0(p + 8, 32, c); DO##_1_1_4(p + 4, 32, c));                    \
    case T_Q8_0: EACH(34, memcpy(DO##_TO(c, p + 2), DO##_FROM(c, p + 2), 32));                     \
    case T_Q2_K: DO##_2_32_0(p + 16, 256, c); break;                                               \
    case T_Q3_K: DO##_2_32_0(p + 32, 256, c); DO##_1_32_2(p, 256, c); break;                       \
    case T_Q4_K: DO##_4_32_0(p + 16, 256, c); break;                                               \
    case T_Q5_K: DO##_4_32_0(p + 48, 256, c); DO##_1_32_4(p + 16, 256, c); break;                  \
    case T_Q6_K: DO##_4_64_0(p, 256, c); DO##_2_32_4(p + 128, 256, c); break;                      \
    default: break;                                                                                \
    }
#define read_TO(c, p) (c)
#define read_FROM(c, p) (p)
#define write_TO(c, p) (p)
#define write_FROM(c, p) (c)

void blocks_read_codes(int type, int n, const uint8_t *p, uint8_t code[UNIT]) {
    uint8_t *c = code;
    if (n < UNIT) memset(code, 0, UNIT);
    PLANES(read)
}

void blocks_write_codes(int type, int n, uint8_t *p, const uint8_t code[UNIT]) {
    const uint8_t *c = code;
    PLANES(write)
}

/* Scale and offset of each group of a unit of n weights; in the order of operations of blocks.py. */
FAST void blocks_read_scales(int type, int n, const uint8_t *p, float scale[GROUPS],
                             float offset[GROUPS]) {
    const int step = layout_of(type).block_bytes;
    uint32_t four[4];
    uint8_t level[GROUPS];
    if (n < UNIT) memset(scale, 0, GROUPS * sizeof *scale);
    memset(offset, 0, GROUPS * sizeof *offset);
    switch (type) {
    case T_Q4_0: case T_Q5_0: case T_Q8_0:
        for (int g = 0; g < n / GROUP; g += 2, p += step)
            scale[g] = scale[g + 1] = half_at(p);
        break;
    case T_Q4_1: case T_Q5_1:
        for (int g = 0; g < n / GROUP; g += 2, p += step) {
            scale[g] = scale[g + 1] = half_at(p);
            offset[g] = offset[g + 1] = half_at(p + 2);
        }
        break;
    case T_Q2_K: {
        const float d = half_at(p + 80), m = half_at(p + 82);
        for (int g = 0; g < GROUPS; g++) scale[g] = d * (float)(p[g] & 15);
        for (int g = 0; g < GROUPS; g++) offset[g] = -(m * (float)(p[g] >> 4));
        break;
    }
    case T_Q3_K: {
        const float d = half_at(p + 108);
        levels_of_q3(p + 96, four);
        memcpy(level, four, sizeof level);
        for (int g = 0; g < GROUPS; g++) scale[g] = d * ((float)level[g] - 32.0f);
        break;
    }
    case T_Q4_K: case T_Q5_K: {
        const float d = half_at(p), m = half_at(p + 2);
        levels_of_q4(p + 4, four);
        memcpy(level, four, sizeof level);
        for (int g = 0; g < GROUPS; g++) scale[g] = d * (float)level[g / 2];
        for (int g = 0; g < GROUPS; g++) offset[g] = -(m * (float)level[8 + g / 2]);
        break;
    }
    case T_Q6_K: {
        const float d = half_at(p + 208);
        for (int g = 0; g < GROUPS; g++) scale[g] = d * (float)(int8_t)p[192 + g];
        break;
    }
    default: memset(scale, 0, GROUPS * sizeof *scale); break;
    }
}
