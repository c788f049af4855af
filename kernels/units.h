/* What levels to codes and levels to floats share: the parent's values, and reading streams. */
#ifndef EDGEKIT_UNITS_H
#define EDGEKIT_UNITS_H

#include "blocks.h"

enum { CODE_STREAMS = 8, FLOAT_STREAMS = 9, MOST_STREAMS = 9 };
enum { BAD_TYPE = 100 }; /* below: 1 + the stream whose length does not fit */
static const uint32_t EXPONENT = 0x7f800000, MAGNITUDE = 0x7fffffff, TINY = 27u << 23;

/* The parent's values in a unit: codes, or the weights of a float parent. */
INLINE void read_values(int type, int n, const uint8_t *parent, float value[UNIT]) {
    if (type == T_F32) {
        for (int i = 0; i < UNIT; i++) value[i] = 0.0f;
        memcpy(value, parent, (size_t)n * 4);
        for (int i = 0; i < UNIT; i++) {
            const uint32_t bits = bits_of(value[i]), exponent = bits & EXPONENT;
            value[i] = float_of(exponent >= TINY && exponent != EXPONENT ? bits : 0);
        }
        return;
    }
    uint8_t code[UNIT];
    const layout_t layout = layout_of(type);
    blocks_read_codes(type, n, parent, code);
    for (int i = 0; i < UNIT; i++) value[i] = (float)((code[i] ^ layout.flip) + layout.low);
}

INLINE void read_parent_scales(int type, int n, const uint8_t *parent, float scale[GROUPS],
                               float offset[GROUPS]) {
    if (type != T_F32) {
        blocks_read_scales(type, n, parent, scale, offset);
        return;
    }
    for (int g = 0; g < GROUPS; g++) scale[g] = 1.0f, offset[g] = 0.0f;
}

INLINE size_t unit_bytes(int type) {
    if (type == T_F32) return UNIT * 4;
    if (type == T_F16 || type == T_BF16) return UNIT * 2;
    const layout_t layout = layout_of(type);
    return (size_t)(UNIT / layout.block * layout.block_bytes);
}

/* A parent is float32 weights or has a layout, in whole blocks. */
INLINE int is_parent(int type, size_t n) {
    const int block = layout_of(type).block;
    return block ? n % (size_t)block == 0 : type == T_F32;
}

/* Where a join reads its streams. Before each unit every stream must have a unit's worth of
 * readable residuals; near its end a stream goes on in a copy padded with zeros. */
typedef struct {
    const int16_t *at[MOST_STREAMS], *end[MOST_STREAMS];
    int16_t tail[MOST_STREAMS][2 * UNIT];
    int is_tail[MOST_STREAMS];
} reader_t;

INLINE void reader_start(reader_t *reader, int n_streams, const int16_t *const streams[],
                         const size_t counts[]) {
    for (int k = 0; k < n_streams; k++) {
        reader->at[k] = streams[k];
        reader->end[k] = streams[k] + counts[k];
        reader->is_tail[k] = 0;
    }
}

/* Returns 1 + a stream that was read beyond its end, or 0. */
INLINE int reader_check(reader_t *reader, int n_streams) {
    for (int k = 0; k < n_streams; k++) {
        const ptrdiff_t left = reader->end[k] - reader->at[k];
        if (left < 0) return 1 + k;
        if (left < UNIT && !reader->is_tail[k]) {
            memset(reader->tail[k], 0, sizeof reader->tail[k]);
            if (left) memcpy(reader->tail[k], reader->at[k], (size_t)left * 2);
            reader->at[k] = reader->tail[k];
            reader->end[k] = reader->tail[k] + left;
            reader->is_tail[k] = 1;
        }
    }
    return 0;
}

INLINE int reader_end(const reader_t *reader, int n_streams) {
    for (int k = 0; k < n_streams; k++)
        if (reader->at[k] != reader->end[k]) return 1 + k;
    return 0;
}

#endif
