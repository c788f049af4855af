/* A level as a whole, between blocks and packed streams; nested.py says what the parts mean.
 *
 * Functions return 0, or say what is wrong with a positive number; they read and write nothing
 * outside the arrays they are given, whatever those hold. */
#include "units.h"

enum { BAD_PATCH = 200 }; /* plus the stream */

INLINE int is_float(int type) { return type == T_BF16 || type == T_F16 || type == T_F32; }

EXPORT int nested_abi(void) { return 2; }

/* Bytes of `room` that encoding or decoding n weights needs; *_encode and *_decode check nothing. */
EXPORT size_t nested_encode_room(int child_type, size_t n) {
    return is_float(child_type) ? FLOAT_STREAMS * (n + SLACK) * 2 : CODE_STREAMS * (n + SLACK);
}

EXPORT size_t nested_decode_room(int child_type, size_t n) {
    return is_float(child_type) ? (n + FLOAT_STREAMS * SLACK) * 2 : n + CODE_STREAMS * SLACK;
}

/* level: with room in digits[0] for all streams' digits, one after the other (as many bytes as
 * the residuals have), in gaps and values for n / 256 + 64 patches, and in rest. */
EXPORT int nested_encode(int parent_type, int child_type, size_t n, const uint8_t *parent,
                         uint8_t *child, level_t *level, void *room) {
    const int n_streams = is_float(child_type) ? FLOAT_STREAMS : CODE_STREAMS;
    streams8_t codes = {{0}, {0}};
    streams16_t floats = {{0}, {0}};
    uint8_t *digits = level->digits[0];
    size_t n_patches = 0;
    for (int k = 0; k < n_streams; k++) {
        codes.at[k] = codes.end[k] = (int8_t *)room + (size_t)k * (n + SLACK);
        floats.at[k] = floats.end[k] = (int16_t *)room + (size_t)k * (n + SLACK);
    }
    const int bad = is_float(child_type)
                        ? split_float(parent_type, child_type, n, parent, child, level, &floats)
                        : split_codes(parent_type, child_type, n, parent, child, level, &codes);
    if (bad) return bad;
    for (int k = 0; k < n_streams; k++) { /* end is where the stream began */
        uint16_t *gaps = level->gaps + n_patches;
        int16_t *values = level->values + n_patches;
        int width;
        if (is_float(child_type)) {
            level->count[k] = (size_t)(floats.at[k] - floats.end[k]);
            pack16(floats.end[k], level->count[k], &width, digits, gaps, values,
                   &level->n_patches[k]);
        } else {
            level->count[k] = (size_t)(codes.at[k] - codes.end[k]);
            pack8(codes.end[k], level->count[k], &width, digits, gaps, values,
                  &level->n_patches[k]);
        }
        level->width[k] = (uint8_t)width;
        level->digits[k] = digits;
        digits += packed_bytes(level->count[k], width);
        n_patches += level->n_patches[k];
    }
    return 0;
}

/* level: with counts that add up to n and packed_bytes() digits in each stream. */
EXPORT int nested_decode(int parent_type, int child_type, size_t n, const uint8_t *parent,
                         uint8_t *child, const level_t *level, void *room) {
    const int n_streams = is_float(child_type) ? FLOAT_STREAMS : CODE_STREAMS;
    streams8_t codes = {{0}, {0}};
    streams16_t floats = {{0}, {0}};
    size_t first = 0, n_patches = 0;
    for (int k = 0; k < n_streams; k++) {
        const size_t count = level->count[k], n_here = level->n_patches[k];
        const uint16_t *gaps = level->gaps + n_patches;
        const int16_t *values = level->values + n_patches;
        int bad;
        codes.at[k] = (int8_t *)room + first;
        floats.at[k] = (int16_t *)room + first;
        codes.end[k] = codes.at[k] + count;
        floats.end[k] = floats.at[k] + count;
        if (is_float(child_type))
            bad = unpack16(level->digits[k], count, level->width[k], gaps, values, n_here,
                           floats.at[k]);
        else
            bad = unpack8(level->digits[k], count, level->width[k], gaps, values, n_here,
                          codes.at[k]);
        if (bad) return BAD_PATCH + k;
        first += count + SLACK;
        n_patches += n_here;
    }
    return is_float(child_type)
               ? join_float(parent_type, child_type, n, parent, child, level, &floats)
               : join_codes(parent_type, child_type, n, parent, child, level, &codes);
}
