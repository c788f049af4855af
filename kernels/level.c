/* A level as a whole, between blocks and packed streams; nested.py says what the parts mean.
 *
 * Functions return 0, or say what is wrong with a positive number; they read and write nothing
 * outside the arrays they are given, whatever those hold. */
#include "wide.h"

enum { BAD_PATCH = 200 }; /* plus the stream */

INLINE int is_float(int type) { return type == T_BF16 || type == T_F16 || type == T_F32; }

EXPORT int nested_abi(void) { return 3; }

/* Bytes of `room` that encoding or decoding n weights needs; *_encode and *_decode check nothing. */
EXPORT size_t nested_encode_room(int child_type, size_t n) {
    return is_float(child_type) ? FLOAT_STREAMS * (n + SLACK) * 2 : CODE_STREAMS * (n + SLACK);
}

EXPORT size_t nested_decode_room(int child_type, size_t n) {
    return is_float(child_type) ? (n + FLOAT_STREAMS * (SLACK + 1)) * 2 : n + CODE_STREAMS * (SLACK + 1);
}

/* level: with room in digits[0] for all streams' digits, one after the other (as many bytes as
 * the residuals have), in gaps and values for n / 256 + 64 patches, and in rest. */
EXPORT int nested_encode(int parent_type, int child_type, size_t n, const uint8_t *parent,
                         uint8_t *child, level_t *level, void *room) {
    const int n_streams = is_float(child_type) ? FLOAT_STREAMS : CODE_STREAMS;
    const int size = is_float(child_type) ? 2 : 1;
    streams_t streams = {{0}, {0}, 0};
    uint8_t *digits = level->digits[0];
    size_t n_patches = 0;
    for (int k = 0; k < n_streams; k++) /* end is where the stream begins */
        streams.at[k] = streams.end[k] = (uint8_t *)room + (size_t)k * (n + SLACK) * (size_t)size;
    const int bad = is_float(child_type)
                        ? split_float(parent_type, child_type, n, parent, child, level, &streams)
                        : split_codes(parent_type, child_type, n, parent, child, level, &streams);
    if (bad) return bad;
    for (int k = 0; k < n_streams; k++) {
        void *const first = streams.end[k];
        uint16_t *gaps = level->gaps + n_patches;
        int16_t *values = level->values + n_patches;
        int width;
        level->count[k] = (size_t)(streams.at[k] - streams.end[k]) / (size_t)size;
        if (size == 2)
            pack16(first, level->count[k], &width, digits, gaps, values, &level->n_patches[k]);
        else
            pack8(first, level->count[k], &width, digits, gaps, values, &level->n_patches[k]);
        level->width[k] = (uint8_t)width;
        level->digits[k] = digits;
        digits += packed_bytes(level->count[k], width);
        n_patches += level->n_patches[k];
    }
    return 0;
}

/* How many of the first streams are to have residuals of one byte. */
static int narrow_streams(int child_type, const level_t *level) {
    if (!is_float(child_type)) return CODE_STREAMS;
    if (child_type != T_BF16 || level->is_plain || !wide_supported()) return 0;
    const int16_t *values = level->values;
    for (int k = 0; k < WIDE_NARROW; k++) {
        if (level->width[k] > 8) return 0;
        for (size_t i = 0; i < level->n_patches[k]; i++, values++)
            if (*values != (int8_t)*values) return 0;
    }
    return WIDE_NARROW;
}

/* Unpack all streams into room. Returns 0, or BAD_PATCH + k. */
static int unpack_streams(int child_type, const level_t *level, uint8_t *room, streams_t *streams) {
    const int n_streams = is_float(child_type) ? FLOAT_STREAMS : CODE_STREAMS;
    const uint16_t *gaps = level->gaps;
    const int16_t *values = level->values;
    streams->n_narrow = narrow_streams(child_type, level);
    for (int k = 0; k < n_streams; k++) {
        const size_t count = level->count[k], n_patches = level->n_patches[k];
        const size_t size = k < streams->n_narrow ? 1 : 2;
        const uint8_t *digits = level->digits[k];
        const int width = level->width[k];
        const int bad =
            size == 1 ? unpack8(digits, count, width, gaps, values, n_patches, (void *)room)
                      : unpack16(digits, count, width, gaps, values, n_patches, (void *)room);
        if (bad) return BAD_PATCH + k;
        streams->at[k] = room;
        streams->end[k] = room + count * size;
        room += (count + (count & 1) + SLACK) * size; /* even, for the residuals of two bytes */
        gaps += n_patches;
        values += n_patches;
    }
    return 0;
}

/* level: with counts that add up to n and packed_bytes() digits in each stream. */
EXPORT int nested_decode(int parent_type, int child_type, size_t n, const uint8_t *parent,
                         uint8_t *child, const level_t *level, void *room) {
    streams_t streams = {{0}, {0}, 0};
    const int bad = unpack_streams(child_type, level, room, &streams);
    if (bad) return bad;
    return is_float(child_type)
               ? join_float(parent_type, child_type, n, parent, child, level, &streams)
               : join_codes(parent_type, child_type, n, parent, child, level, &streams);
}
