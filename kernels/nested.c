/* Levels to types with codes: what nested_ref.py says, in C, unit by unit of 256 weights.
 *
 * Functions return 0, or say what is wrong with a positive number; they read and write nothing
 * outside the arrays they are given, whatever those hold. */
#include "units.h"

#include "wide.h"

#include <stdlib.h>

enum { SAMPLE = 256 };
static const float ROUND = 12582912.0f; /* 1.5 * 2**23: adding it rounds half to even */

INLINE int is_finite(float f) { return (bits_of(f) & EXPONENT) != EXPONENT; }

/* child code = step * parent value + start, in each group */
INLINE void unit_steps(int parent_type, int child_type, int n, const uint8_t *parent,
                       const uint8_t *child, float step[GROUPS], float start[GROUPS]) {
    float scale[GROUPS], offset[GROUPS], parent_scale[GROUPS], parent_offset[GROUPS];
    read_parent_scales(parent_type, n, parent, parent_scale, parent_offset);
    blocks_read_scales(child_type, n, child, scale, offset);
    for (int g = 0; g < GROUPS; g++) {
        const float inverse = 1.0f / scale[g];
        const float a = parent_scale[g] * inverse;
        const float b = (parent_offset[g] - offset[g]) * inverse;
        const uint32_t usable = (uint32_t)-(is_finite(a) & is_finite(b)); /* no branches */
        step[g] = float_of(bits_of(a) & usable);
        start[g] = float_of(bits_of(b) & usable);
    }
}

/* Predictions of a unit modulo 256; with them whether the residual is negated (-1 or 0) and
 * whether the prediction rounded away a quarter or more. */
INLINE void unit_predict(const float value[UNIT], const float step[GROUPS],
                         const float start[GROUPS], layout_t layout, int8_t predicted[UNIT],
                         int8_t negate[UNIT], uint8_t far[UNIT]) {
    const float low = (float)layout.low, high = (float)(layout.low + (1 << layout.bits) - 1);
    float exact[UNIT], fraction[UNIT];
    uint32_t shifted[UNIT];
    for (int g = 0; g < GROUPS; g++)
        for (int i = g * GROUP; i < (g + 1) * GROUP; i++)
            exact[i] = value[i] * step[g] + start[g];
    for (int i = 0; i < UNIT; i++) {
        float within = exact[i] < low ? low : exact[i];
        within = within > high ? high : within;
        const float sum = within + ROUND; /* the prediction is in its lowest bits */
        shifted[i] = bits_of(sum);
        fraction[i] = within - (sum - ROUND);
    }
    for (int i = 0; i < UNIT; i++) predicted[i] = (int8_t)shifted[i];
    for (int i = 0; i < UNIT; i++) negate[i] = (int8_t)-(fraction[i] < 0.0f);
    for (int i = 0; i < UNIT; i++) far[i] = (bits_of(fraction[i]) & MAGNITUDE) >= 0x3e800000u;
}

INLINE int step_class(float step, const uint32_t limits[3]) {
    const uint32_t size = bits_of(step) & MAGNITUDE;
    return (size > limits[0]) + (size > limits[1]) + (size > limits[2]);
}

static int by_value(const void *a, const void *b) {
    const uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
    return (x > y) - (x < y);
}

static void quartiles(int parent_type, int child_type, size_t n, const uint8_t *parent,
                      size_t parent_unit, const uint8_t *child, size_t child_unit,
                      uint32_t limits[3]) {
    const size_t n_groups = n / GROUP, stride = (n_groups + SAMPLE - 1) / SAMPLE;
    uint32_t size[SAMPLE];
    float step[GROUPS], start[GROUPS];
    size_t n_sizes = 0, last = SIZE_MAX;
    for (size_t g = 0; g < n_groups; g += stride) {
        const size_t unit = g / GROUPS, rest = n - unit * UNIT;
        if (unit != last)
            unit_steps(parent_type, child_type, rest < UNIT ? (int)rest : UNIT,
                       parent + unit * parent_unit, child + unit * child_unit, step, start);
        last = unit;
        size[n_sizes++] = bits_of(step[g % GROUPS]) & MAGNITUDE;
    }
    qsort(size, n_sizes, sizeof *size, by_value);
    for (size_t k = 0; k < 3; k++) limits[k] = size[n_sizes * (k + 1) / 4];
}

/* The scale bytes of a unit, from and to planes over all n_blocks blocks, of which this is the
 * first-th. */
INLINE void unit_rest(layout_t layout, int n, uint8_t *child, uint8_t *rest, size_t first,
                      size_t n_blocks, int is_join) {
    for (int b = 0; b < n / layout.block; b++, child += layout.block_bytes) {
        uint8_t *plane = rest + first + (size_t)b;
        for (int r = 0; r < 2; r++)
            for (int k = 0; k < layout.n_scale[r]; k++, plane += n_blocks) {
                if (is_join) child[layout.scale_at[r] + k] = *plane;
                else *plane = child[layout.scale_at[r] + k];
            }
    }
}

/* For each set of far weights among eight, one bit each: where eight residuals come from when the
 * near ones lie first and the far ones after them (collect), or where those come from (deal). */
typedef struct {
    uint8_t from[256][8];
} orders_t;

static void make_orders(orders_t *orders, int is_join) {
    for (int set = 0; set < 256; set++) {
        int n_near = 0, at[2] = {0, 0}; /* the next near, the next far */
        for (int i = 0; i < 8; i++) n_near += !(set >> i & 1);
        at[1] = n_near;
        for (int i = 0; i < 8; i++) {
            const int place = at[set >> i & 1]++;
            if (is_join) orders->from[set][i] = (uint8_t)place;
            else orders->from[set][place] = (uint8_t)i;
        }
    }
}

/* Byte i of the result is byte order[i] of eight. */
INLINE uint64_t reorder(uint64_t eight, const uint8_t order[8]) {
#if defined(__GNUC__) && !defined(__clang__)
    typedef uint8_t bytes_t __attribute__((vector_size(16)));
    typedef uint64_t words_t __attribute__((vector_size(16)));
    uint64_t index;
    memcpy(&index, order, 8);
    const words_t from = {eight, 0}, at = {index, 0};
    return ((words_t)__builtin_shuffle((bytes_t)from, (bytes_t)at))[0];
#else
    uint64_t whole = 0;
    for (int i = 0; i < 8; i++) whole |= (eight >> (8 * order[i]) & 0xff) << (8 * i);
    return whole;
#endif
}

/* far: bytes of 0 and 1. */
INLINE int set_of(uint64_t far) { return (int)((far * 0x0102040810204080u) >> 56); }
INLINE int count_of(uint64_t far) { return (int)((far * 0x0101010101010101u) >> 56); }

/* Deal the residuals of n groups out to their pairs of streams, each weight's by far[]; eight at
 * a time, without branches: they would be guessed wrong. */
INLINE void deal_plain(streams_t *to, int n, const uint8_t pair[GROUPS], const uint8_t far[UNIT],
                       const int8_t residual[UNIT], const orders_t *orders) {
    for (int i = 0; i < n * GROUP; i += 8) {
        uint8_t **near_to = &to->at[pair[i / GROUP]], **far_to = near_to + 1;
        uint64_t flags, eight;
        memcpy(&flags, far + i, 8);
        memcpy(&eight, residual + i, 8);
        const int n_far = count_of(flags);
        const uint64_t sorted = reorder(eight, orders->from[set_of(flags)]);
        const uint64_t far_ones = n_far ? sorted >> (64 - 8 * n_far) : 0;
        memcpy(*near_to, &sorted, 8); /* too many, written over next time */
        memcpy(*far_to, &far_ones, 8);
        *near_to += 8 - n_far;
        *far_to += n_far;
    }
}

/* The reverse. */
INLINE void collect_plain(streams_t *from, int n, const uint8_t pair[GROUPS],
                          const uint8_t far[UNIT], int8_t residual[UNIT],
                          const orders_t *orders) {
    for (int i = 0; i < n * GROUP; i += 8) {
        uint8_t **near_at = &from->at[pair[i / GROUP]], **far_at = near_at + 1;
        uint64_t flags, near_ones, far_ones;
        memcpy(&flags, far + i, 8);
        memcpy(&near_ones, *near_at, 8);
        memcpy(&far_ones, *far_at, 8);
        const int n_far = count_of(flags);
        const uint64_t shifted = n_far ? far_ones << (64 - 8 * n_far) : 0;
        const uint64_t kept = n_far == 8 ? 0 : near_ones & (~(uint64_t)0 >> (8 * n_far));
        const uint64_t eight = reorder(shifted | kept, orders->from[set_of(flags)]);
        memcpy(residual + i, &eight, 8);
        *near_at += 8 - n_far;
        *far_at += n_far;
    }
}

/* Split a unit's codes into residuals, or make codes of residuals. code: values modulo 256. */
INLINE void unit_plain(const float value[UNIT], const float step[GROUPS],
                       const float start[GROUPS], layout_t layout, const uint32_t limits[3],
                       int n_groups, streams_t *streams, uint8_t code[UNIT],
                       const orders_t *orders, int is_join) {
    const uint8_t half = (uint8_t)(1 << (layout.bits - 1)), mask = (uint8_t)(2 * half - 1);
    int8_t predicted[UNIT], negate[UNIT], residual[UNIT];
    uint8_t far[UNIT], pair[GROUPS];
    unit_predict(value, step, start, layout, predicted, negate, far);
    for (int g = 0; g < GROUPS; g++) pair[g] = (uint8_t)(2 * step_class(step[g], limits));
    if (is_join) {
        collect_plain(streams, n_groups, pair, far, residual, orders);
        for (int i = 0; i < UNIT; i++) {
            const uint8_t flipped = (uint8_t)((residual[i] ^ negate[i]) - negate[i]);
            const uint8_t raw = (uint8_t)((uint8_t)(predicted[i] + flipped) - layout.low) & mask;
            code[i] = raw ^ (uint8_t)layout.flip;
        }
        return;
    }
    for (int i = 0; i < UNIT; i++) {
        const uint8_t plain = (uint8_t)((code[i] ^ (uint8_t)layout.flip) + layout.low);
        const uint8_t wrapped = (uint8_t)((uint8_t)(plain - predicted[i] + half) & mask) - half;
        residual[i] = (int8_t)((wrapped ^ (uint8_t)negate[i]) - (uint8_t)negate[i]);
    }
    deal_plain(streams, n_groups, pair, far, residual, orders);
}

FAST int split_codes(int parent_type, int child_type, size_t n, const uint8_t *parent,
                     uint8_t *child, level_t *level, streams_t *streams) {
    const layout_t layout = layout_of(child_type);
    if (!layout.block || n % (size_t)layout.block || !is_parent(parent_type, n)) return BAD_TYPE;
    const size_t parent_unit = unit_bytes(parent_type), child_unit = unit_bytes(child_type);
    const int is_wide = !level->is_plain && wide_supported();
    orders_t orders;
    if (!is_wide) make_orders(&orders, 0);
    if (n)
        quartiles(parent_type, child_type, n, parent, parent_unit, child, child_unit,
                  level->limits);
    for (size_t done = 0; done < n; done += UNIT, parent += parent_unit, child += child_unit) {
        const int m = n - done < UNIT ? (int)(n - done) : UNIT;
        float value[UNIT], step[GROUPS], start[GROUPS];
        uint8_t code[UNIT];
        unit_rest(layout, m, child, level->rest, done / (size_t)layout.block,
                  n / (size_t)layout.block, 0);
        unit_steps(parent_type, child_type, m, parent, child, step, start);
        read_values(parent_type, m, parent, value);
        blocks_read_codes(child_type, m, child, code);
        if (is_wide)
            wide_split(value, step, start, layout, level->limits, m / GROUP, streams, code);
        else
            unit_plain(value, step, start, layout, level->limits, m / GROUP, streams, code,
                       &orders, 0);
    }
    return 0;
}

FAST int join_codes(int parent_type, int child_type, size_t n, const uint8_t *parent,
                    uint8_t *child, const level_t *level, streams_t *streams) {
    const layout_t layout = layout_of(child_type);
    if (!layout.block || n % (size_t)layout.block || !is_parent(parent_type, n)) return BAD_TYPE;
    const size_t parent_unit = unit_bytes(parent_type), child_unit = unit_bytes(child_type);
    const int is_wide = !level->is_plain && wide_supported();
    orders_t orders;
    if (!is_wide) make_orders(&orders, 1);
    for (size_t done = 0; done < n; done += UNIT, parent += parent_unit, child += child_unit) {
        const int m = n - done < UNIT ? (int)(n - done) : UNIT;
        float value[UNIT], step[GROUPS], start[GROUPS];
        uint8_t code[UNIT];
        const int bad = streams_check(streams, CODE_STREAMS);
        if (bad) return bad;
        unit_rest(layout, m, child, level->rest, done / (size_t)layout.block,
                  n / (size_t)layout.block, 1);
        unit_steps(parent_type, child_type, m, parent, child, step, start);
        read_values(parent_type, m, parent, value);
        if (is_wide)
            wide_join(value, step, start, layout, level->limits, m / GROUP, streams, code);
        else
            unit_plain(value, step, start, layout, level->limits, m / GROUP, streams, code,
                       &orders, 1);
        blocks_write_codes(child_type, m, child, code);
    }
    return streams_finish(streams, CODE_STREAMS);
}
