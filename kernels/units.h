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
    for (int i = 0; i < UNIT; i++)
        code[i] = (uint8_t)((code[i] ^ (uint8_t)layout.flip) + (uint8_t)layout.low);
    for (int i = 0; i < UNIT; i++) value[i] = (float)(int8_t)code[i];
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

/* The scale bytes of n blocks at child, to planes over n_blocks blocks or from them: a few blocks at
 * a time, so that a line of each plane is used whole. */
INLINE void read_rest(layout_t layout, size_t n, size_t n_blocks, const uint8_t *child,
                      uint8_t *rest) {
    for (int r = 0; r < 2; r++)
        for (int k = 0; k < layout.n_scale[r]; k++, rest += n_blocks) {
            const uint8_t *at = child + layout.scale_at[r] + k;
            for (size_t b = 0; b < n; b++, at += layout.block_bytes) rest[b] = *at;
        }
}

INLINE void write_rest(layout_t layout, size_t n, size_t n_blocks, uint8_t *child,
                       const uint8_t *rest) {
    for (int r = 0; r < 2; r++)
        for (int k = 0; k < layout.n_scale[r]; k++, rest += n_blocks) {
            uint8_t *at = child + layout.scale_at[r] + k;
            for (size_t b = 0; b < n; b++, at += layout.block_bytes) *at = rest[b];
        }
}

/* A parent is float32 weights or has a layout, in whole blocks. */
INLINE int is_parent(int type, size_t n) {
    const int block = layout_of(type).block;
    return block ? n % (size_t)block == 0 : type == T_F32;
}

/* A level as it is stored, but for zstd; the same struct as native.Level. */
typedef struct {
    uint8_t *digits[MOST_STREAMS];
    size_t count[MOST_STREAMS], n_patches[MOST_STREAMS];
    uint16_t *gaps;  /* of all streams' patches, one stream after the other */
    int16_t *values;
    uint8_t *rest;
    uint32_t limits[3];
    uint8_t width[MOST_STREAMS];
    uint8_t is_plain; /* do without AVX-512 */
} level_t;

/* Residuals are 1 byte each for a child with codes; for a float child 2, but 1 in the first
 * n_narrow streams. A stream is unpacked with SLACK residuals of room behind it, so that a unit may
 * be read beyond its end before that is noticed, and dealt with as much room for vectors that reach
 * beyond. */
enum { SLACK = UNIT + 64 };

typedef struct {
    uint8_t *at[MOST_STREAMS], *end[MOST_STREAMS];
    int n_narrow;
} streams_t;

/* Returns 1 + a stream that was read beyond its end, or 0. */
INLINE int streams_check(const streams_t *streams, int n_streams) {
    for (int k = 0; k < n_streams; k++)
        if (streams->at[k] > streams->end[k]) return 1 + k;
    return 0;
}

/* Returns 1 + a stream that was not read to its end, or 0. */
INLINE int streams_finish(const streams_t *streams, int n_streams) {
    for (int k = 0; k < n_streams; k++)
        if (streams->at[k] != streams->end[k]) return 1 + k;
    return 0;
}

/* A weight whose residual is in its class's second stream; one whose residual is negated. */
enum { MARK_FAR = 1, MARK_NEGATED = 0x80 };

/* How far each class's streams of near and of far residuals have come, in 16 bits each: in memory
 * they would make every group wait for the one before it. */
typedef struct {
    uint64_t n_near, n_far;
} counts_t;

INLINE size_t of_class(uint64_t counts, int c) { return (size_t)(counts >> (16 * c) & 0xffff); }

INLINE uint8_t *near_at(const streams_t *streams, counts_t done, int c) {
    return streams->at[2 * c] + of_class(done.n_near, c);
}

INLINE uint8_t *far_at(const streams_t *streams, counts_t done, int c) {
    return streams->at[2 * c + 1] + of_class(done.n_far, c);
}

/* With one more group of class c, of which n_far are far. */
INLINE counts_t counted(counts_t done, int c, uint64_t n_far) {
    done.n_near += (GROUP - n_far) << (16 * c);
    done.n_far += n_far << (16 * c);
    return done;
}

INLINE void advance(streams_t *streams, counts_t done) {
    for (int c = 0; c < CODE_STREAMS / 2; c++) {
        streams->at[2 * c] += of_class(done.n_near, c);
        streams->at[2 * c + 1] += of_class(done.n_far, c);
    }
}

int split_codes(int parent_type, int child_type, size_t n, const uint8_t *parent, uint8_t *child,
                level_t *level, streams_t *streams);
int join_codes(int parent_type, int child_type, size_t n, const uint8_t *parent, uint8_t *child,
               const level_t *level, streams_t *streams);
int split_float(int parent_type, int child_type, size_t n, const uint8_t *parent,
                const uint8_t *child, level_t *level, streams_t *streams);
int join_float(int parent_type, int child_type, size_t n, const uint8_t *parent, uint8_t *child,
               const level_t *level, streams_t *streams);
size_t packed_bytes(size_t count, int width);
void pack8(int8_t *residual, size_t count, int *width, uint8_t *digits, uint16_t *gaps,
           int16_t *values, size_t *n_patches);
void pack16(int16_t *residual, size_t count, int *width, uint8_t *digits, uint16_t *gaps,
            int16_t *values, size_t *n_patches);
int unpack8(const uint8_t *digits, size_t count, int width, const uint16_t *gaps,
            const int16_t *values, size_t n_patches, int8_t *residual);
int unpack16(const uint8_t *digits, size_t count, int width, const uint16_t *gaps,
             const int16_t *values, size_t n_patches, int16_t *residual);

#endif
