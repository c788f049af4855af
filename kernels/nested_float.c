/* Levels to BF16, F16 and F32: what nested_ref.py says, in C. See nested.c. */
#include "wide.h"

/* Magnitude of float32 bits in units of the child's last place, times 2**shift. */
INLINE int32_t fixed_of(uint32_t bits, int child_type) {
    const int32_t magnitude = (int32_t)(bits & MAGNITUDE);
    if (child_type != T_F16) return magnitude;
    const int small = magnitude < 113 << 23;
    const float weight = float_of(small ? (uint32_t)magnitude : 0);
    const int32_t even = (int32_t)(weight * 137438953472.0f); /* 2**37 */
    const int32_t most = 0x7bff << 13, normal = magnitude - (112 << 23);
    return small ? even : normal < most ? normal : most;
}

/* Predictions of a unit of a float child: ordered bits, of F32 unrounded; see nested_ref.py. */
INLINE void unit_predict_float(int parent_type, int child_type, int m, const uint8_t *parent,
                               int32_t predicted[UNIT], int16_t negate[UNIT],
                               uint8_t stream[UNIT]) {
    const int shift = child_type == T_F16 ? 13 : 16, is_whole = child_type == T_F32;
    float value[UNIT], scale[GROUPS], offset[GROUPS];
    uint32_t bits[UNIT];
    read_values(parent_type, m, parent, value);
    read_parent_scales(parent_type, m, parent, scale, offset);
    for (int g = 0; g < GROUPS; g++) {
        int largest = 0, unit = (int)((bits_of(scale[g]) & EXPONENT) >> 23);
        for (int i = g * GROUP; i < (g + 1) * GROUP; i++) {
            const float weight =
                parent_type == T_F32 ? value[i] : value[i] * scale[g] + offset[g];
            bits[i] = bits_of(weight);
            bits[i] = (bits[i] & EXPONENT) == EXPONENT ? 0 : bits[i];
            const int exponent = (int)((bits[i] & EXPONENT) >> 23);
            largest = exponent > largest ? exponent : largest;
        }
        if (parent_type == T_F32) unit = largest - 2;
        for (int i = g * GROUP; i < (g + 1) * GROUP; i++) {
            int octave = unit - (int)((bits[i] & EXPONENT) >> 23) + 7;
            octave = octave < 0 ? 0 : octave;
            stream[i] = (uint8_t)(octave > 8 ? 8 : octave);
        }
    }
    for (int i = 0; i < UNIT; i++) {
        const int32_t magnitude = fixed_of(bits[i], child_type), sign = -(int32_t)(bits[i] >> 31);
        const int32_t rounded = (magnitude + (1 << (shift - 1))) >> shift;
        const int fold = (magnitude < rounded << shift) ^ (sign & 1);
        predicted[i] = (is_whole ? magnitude : rounded) ^ sign;
        negate[i] = fold && !is_whole ? -1 : 0;
    }
}

INLINE int32_t ordered16(int32_t bits) { return (int16_t)(bits ^ (((int16_t)bits >> 15) & 0x7fff)); }

INLINE uint32_t ordered32(uint32_t bits) { return bits ^ (bits >> 31 ? MAGNITUDE : 0); }

INLINE void deal(streams_t *to, int m, const uint8_t stream[UNIT], const int16_t residual[UNIT]) {
    for (int i = 0; i < m; i++) {
        uint8_t **at = &to->at[stream[i]];
        memcpy(*at, residual + i, 2);
        *at += 2;
    }
}

INLINE void collect(streams_t *from, int m, const uint8_t stream[UNIT], int16_t residual[UNIT]) {
    for (int i = 0; i < m; i++) {
        uint8_t **at = &from->at[stream[i]];
        memcpy(residual + i, *at, 2);
        *at += 2;
    }
}

/* As nested_split_codes, for a float child; rest: of F32 the low 16 bits, in two planes. */
INLINE void split_float_to(int parent_type, int child_type, size_t n, const uint8_t *parent,
                           const uint8_t *child, streams_t *streams,
                           const level_t *level) {
    uint8_t *const rest = level->rest;
    const int is_wide = child_type == T_BF16 && !level->is_plain && wide_supported();
    const size_t parent_unit = unit_bytes(parent_type), size = child_type == T_F32 ? 4 : 2;
    for (size_t done = 0; done < n; done += UNIT, parent += parent_unit, child += UNIT * size) {
        const int m = n - done < UNIT ? (int)(n - done) : UNIT;
        int32_t predicted[UNIT];
        int16_t negate[UNIT], residual[UNIT];
        uint8_t stream[UNIT];
        if (is_wide) {
            wide_split_bf16(parent_type, m, parent, streams, child);
            continue;
        }
        unit_predict_float(parent_type, child_type, m, parent, predicted, negate, stream);
        if (child_type == T_F32) {
            uint32_t bits[UNIT] = {0};
            memcpy(bits, child, (size_t)m * 4);
            for (int i = 0; i < UNIT; i++) {
                bits[i] = ordered32(bits[i]) - (uint32_t)predicted[i];
                residual[i] = (int16_t)(uint16_t)((bits[i] + 0x8000u) >> 16);
            }
            for (int i = 0; i < m; i++) {
                rest[done + (size_t)i] = (uint8_t)bits[i];
                rest[n + done + (size_t)i] = (uint8_t)(bits[i] >> 8);
            }
        } else {
            int16_t bits[UNIT] = {0};
            memcpy(bits, child, (size_t)m * 2);
            for (int i = 0; i < UNIT; i++) {
                const int16_t difference = (int16_t)(ordered16(bits[i]) - predicted[i]);
                residual[i] = (int16_t)((difference ^ negate[i]) - negate[i]);
            }
        }
        deal(streams, m, stream, residual);
    }
}

FAST int split_float(int parent_type, int child_type, size_t n, const uint8_t *parent,
                     const uint8_t *child, level_t *level, streams_t *streams) {
    if (!is_parent(parent_type, n)) return BAD_TYPE;
    switch (child_type) { /* a copy of the loop for each */
    case T_BF16: split_float_to(parent_type, T_BF16, n, parent, child, streams, level); break;
    case T_F16: split_float_to(parent_type, T_F16, n, parent, child, streams, level); break;
    case T_F32: split_float_to(parent_type, T_F32, n, parent, child, streams, level); break;
    default: return BAD_TYPE;
    }
    return 0;
}

INLINE int join_float_to(int parent_type, int child_type, size_t n, const uint8_t *parent,
                         uint8_t *child, streams_t *streams,
                         const level_t *level) {
    const uint8_t *const rest = level->rest;
    const int is_wide = child_type == T_BF16 && !level->is_plain && wide_supported();
    const size_t parent_unit = unit_bytes(parent_type), size = child_type == T_F32 ? 4 : 2;
    for (size_t done = 0; done < n; done += UNIT, parent += parent_unit, child += UNIT * size) {
        const int m = n - done < UNIT ? (int)(n - done) : UNIT;
        int32_t predicted[UNIT];
        int16_t negate[UNIT], residual[UNIT];
        uint8_t stream[UNIT];
        const int bad = streams_check(streams, FLOAT_STREAMS);
        if (bad) return bad;
        if (is_wide) {
            wide_join_bf16(parent_type, m, parent, streams, child);
            continue;
        }
        unit_predict_float(parent_type, child_type, m, parent, predicted, negate, stream);
        collect(streams, m, stream, residual);
        if (child_type == T_F32) {
            for (int i = 0; i < m; i++) {
                const size_t at = done + (size_t)i;
                const int16_t low = (int16_t)(uint16_t)(rest[at] | rest[n + at] << 8);
                const uint32_t whole = ((uint32_t)(uint16_t)residual[i] << 16) + (uint32_t)low;
                const uint32_t bits = ordered32((uint32_t)predicted[i] + whole);
                memcpy(child + 4 * i, &bits, 4);
            }
        } else {
            for (int i = 0; i < m; i++) {
                const int32_t flipped = (residual[i] ^ negate[i]) - negate[i];
                const int16_t bits = (int16_t)ordered16(predicted[i] + flipped);
                memcpy(child + 2 * i, &bits, 2);
            }
        }
    }
    return streams_finish(streams, FLOAT_STREAMS);
}

FAST int join_float(int parent_type, int child_type, size_t n, const uint8_t *parent,
                    uint8_t *child, const level_t *level, streams_t *streams) {
    if (!is_parent(parent_type, n)) return BAD_TYPE;
    switch (child_type) {
    case T_BF16: return join_float_to(parent_type, T_BF16, n, parent, child, streams, level);
    case T_F16: return join_float_to(parent_type, T_F16, n, parent, child, streams, level);
    case T_F32: return join_float_to(parent_type, T_F32, n, parent, child, streams, level);
    default: return BAD_TYPE;
    }
}
