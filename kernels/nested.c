/* Levels to types with codes: what nested_ref.py says, in C, unit by unit of 256 weights.
 *
 * Functions return 0, or say what is wrong with a positive number; they read and write nothing
 * outside the arrays they are given, whatever those hold. */
#include "dealing.h"
#include "shuffle.h"
#include "units.h"
#include "wide.h"

#include <stdlib.h>

enum { SAMPLE = 256 };
static const float ROUND = 12582912.0f; /* 1.5 * 2**23: adding it rounds half to even */

INLINE int is_finite(float f) { return (bits_of(f) & EXPONENT) != EXPONENT; }

/* Units are taken a few at a time, in passes: what one pass wrote with narrow stores the next one
 * reads with wide loads, which would wait until it has reached the cache. */
enum { TILE = 4, TILE_GROUPS = TILE * GROUPS };

/* Of the groups of a tile. */
typedef struct {
    float scale[TILE_GROUPS], offset[TILE_GROUPS];
} scales_t;

/* child code = step * parent value + start, in each group */
INLINE void find_steps(int n_groups, const scales_t *parent, const scales_t *child, float step[],
                       float start[]) {
    for (int g = 0; g < n_groups; g++) {
        const float inverse = 1.0f / child->scale[g];
        const float a = parent->scale[g] * inverse;
        const float b = (parent->offset[g] - child->offset[g]) * inverse;
        const uint32_t usable = (uint32_t)-(is_finite(a) & is_finite(b)); /* no branches */
        step[g] = float_of(bits_of(a) & usable);
        start[g] = float_of(bits_of(b) & usable);
    }
}

/* What is predicted of a weight, modulo 256, and beside it MARK_FAR where the prediction rounded
 * away a quarter or more, MARK_NEGATED where the residual is negated. */
INLINE void predict_plain(int n, const float *exact, layout_t layout, uint8_t *predicted,
                          uint8_t *marks) {
    const float low = (float)layout.low, high = (float)(layout.low + (1 << layout.bits) - 1);
    float fraction[UNIT];
    uint32_t shifted[UNIT];
    for (int i = 0; i < n; i++) {
        float within = exact[i] < low ? low : exact[i];
        within = within > high ? high : within;
        const float sum = within + ROUND; /* the prediction is in its lowest bits */
        shifted[i] = bits_of(sum);
        fraction[i] = within - (sum - ROUND);
    }
    for (int i = 0; i < n; i++) predicted[i] = (uint8_t)shifted[i];
    for (int i = 0; i < n; i++) {
        const uint32_t far = (bits_of(fraction[i]) & MAGNITUDE) >= 0x3e800000u;
        const uint32_t negate = fraction[i] < 0.0f ? MARK_NEGATED : 0;
        marks[i] = (uint8_t)(far | negate);
    }
}

/* What is predicted of weights, before it is rounded. */
INLINE void exact_of_each(const float value[UNIT], const float step[GROUPS],
                          const float start[GROUPS], float exact[UNIT]) {
    for (int g = 0; g < GROUPS; g++)
        for (int i = g * GROUP; i < (g + 1) * GROUP; i++) exact[i] = value[i] * step[g] + start[g];
}

/* Where the parent has few codes in a group: for each of them, group after group. */
INLINE void exact_of_codes(int n_codes, const float value_of[], const float step[GROUPS],
                           const float start[GROUPS], float exact[]) {
    for (int g = 0; g < GROUPS; g++)
        for (int c = 0; c < n_codes; c++)
            exact[g * n_codes + c] = value_of[c] * step[g] + start[g];
}

INLINE void look_up_codes(int n_codes, const uint8_t of_code[], const uint8_t code[UNIT],
                          uint8_t of_weight[UNIT]) {
    for (int g = 0; g < GROUPS; g++)
        look_up(of_code + g * n_codes, code + g * GROUP, of_weight + g * GROUP);
}

/* Of each group: how many limits its step is above. */
INLINE void find_classes(int n_groups, const float step[], const uint32_t limits[3],
                         uint8_t class[]) {
    for (int g = 0; g < n_groups; g++) {
        const uint32_t size = bits_of(step[g]) & MAGNITUDE;
        class[g] = (uint8_t)((size > limits[0]) + (size > limits[1]) + (size > limits[2]));
    }
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
    scales_t of_parent, of_child;
    size_t n_sizes = 0, last = SIZE_MAX;
    for (size_t g = 0; g < n_groups; g += stride) {
        const size_t unit = g / GROUPS, rest = n - unit * UNIT;
        const int m = rest < UNIT ? (int)rest : UNIT;
        if (unit != last) {
            read_parent_scales(parent_type, m, parent + unit * parent_unit, of_parent.scale,
                               of_parent.offset);
            blocks_read_scales(child_type, m, child + unit * child_unit, of_child.scale,
                               of_child.offset);
            find_steps(GROUPS, &of_parent, &of_child, step, start);
        }
        last = unit;
        size[n_sizes++] = bits_of(step[g % GROUPS]) & MAGNITUDE;
    }
    qsort(size, n_sizes, sizeof *size, by_value);
    for (size_t k = 0; k < 3; k++) limits[k] = size[n_sizes * (k + 1) / 4];
}

/* Codes, as they are stored, of predictions and residuals. */
INLINE void add_residuals(layout_t layout, const uint8_t predicted[UNIT],
                          const uint8_t marks[UNIT], const uint8_t residual[UNIT],
                          uint8_t code[UNIT]) {
    const uint8_t mask = (uint8_t)((1 << layout.bits) - 1);
    for (int i = 0; i < UNIT; i++) {
        const uint8_t negate = (int8_t)marks[i] < 0 ? 0xff : 0;
        const uint8_t flipped = (uint8_t)((residual[i] ^ negate) - negate);
        const uint8_t raw = (uint8_t)((uint8_t)(predicted[i] + flipped) - layout.low) & mask;
        code[i] = raw ^ (uint8_t)layout.flip;
    }
}

/* The reverse. */
INLINE void find_residuals(layout_t layout, const uint8_t predicted[UNIT],
                           const uint8_t marks[UNIT], const uint8_t code[UNIT],
                           uint8_t residual[UNIT]) {
    const uint8_t half = (uint8_t)(1 << (layout.bits - 1)), mask = (uint8_t)(2 * half - 1);
    for (int i = 0; i < UNIT; i++) {
        const uint8_t negate = (int8_t)marks[i] < 0 ? 0xff : 0;
        const uint8_t plain = (uint8_t)((code[i] ^ (uint8_t)layout.flip) + layout.low);
        const uint8_t wrapped = (uint8_t)((uint8_t)(plain - predicted[i] + half) & mask) - half;
        residual[i] = (uint8_t)((wrapped ^ negate) - negate);
    }
}

typedef struct {
    scales_t of_parent, of_child;
    float step[TILE_GROUPS], start[TILE_GROUPS], exact[TILE][UNIT];
    uint8_t class[TILE_GROUPS], parent_code[TILE][UNIT];
    uint8_t of_code[TILE][2][UNIT]; /* predictions and marks of codes */
    uint8_t predicted[TILE][UNIT], marks[TILE][UNIT], residual[TILE][UNIT], code[TILE][UNIT];
} tile_t;

/* What is the same for all units of a call. */
typedef struct {
    int parent_type, child_type, is_wide, n_codes; /* codes of a group where they are few, or 0 */
    layout_t layout;
    size_t n, n_units, n_blocks, per_unit, parent_unit, child_unit; /* per_unit: blocks */
    float value_of[8]; /* the parent's codes */
    orders_t orders;
} way_t;

/* Returns 0 where there is no such way. */
static int find_way(int parent_type, int child_type, size_t n, int is_plain, int is_join,
                    way_t *way) {
    const layout_t layout = layout_of(child_type), above = layout_of(parent_type);
    if (!layout.block || n % (size_t)layout.block || !is_parent(parent_type, n)) return 0;
    way->parent_type = parent_type;
    way->child_type = child_type;
    way->layout = layout;
    way->n_codes = above.block == UNIT && above.bits <= 3 ? 1 << above.bits : 0;
    for (int c = 0; c < 8; c++) way->value_of[c] = (float)(above.low + c);
    way->n = n;
    way->n_units = (n + UNIT - 1) / UNIT;
    way->n_blocks = n / (size_t)layout.block;
    way->per_unit = UNIT / (size_t)layout.block;
    way->parent_unit = unit_bytes(parent_type);
    way->child_unit = unit_bytes(child_type);
    way->is_wide = !is_plain && wide_supported();
    if (!way->is_wide || (is_join && n % UNIT)) make_orders(&way->orders, is_join);
    return 1;
}

INLINE void predict(const way_t *way, int n, const float *exact, uint8_t *predicted,
                    uint8_t *marks) {
    if (way->is_wide) wide_predict(n, exact, way->layout, predicted, marks);
    else predict_plain(n, exact, way->layout, predicted, marks);
}

/* Of unit i of a tile, which has n groups. */
INLINE void deal(const way_t *way, streams_t *to, size_t i, int n, const tile_t *tile) {
    const uint8_t *class = tile->class + i * GROUPS;
    if (way->is_wide) wide_deal(to, n, class, tile->marks[i], tile->residual[i]);
    else deal_plain(to, n, class, tile->marks[i], tile->residual[i], &way->orders);
}

INLINE void collect(const way_t *way, streams_t *from, size_t i, int n, tile_t *tile) {
    collect_plain(from, n, tile->class + i * GROUPS, tile->marks[i], tile->residual[i],
                  &way->orders);
}

/* Weights of unit u: all but the last one are whole. */
INLINE int in_unit(const way_t *way, size_t u) {
    const size_t n_left = way->n - u * UNIT;
    return n_left < UNIT ? (int)n_left : UNIT;
}

/* Blocks of units [first, last). */
INLINE size_t blocks_in(const way_t *way, size_t first, size_t last) {
    return (last < way->n_units ? last * way->per_unit : way->n_blocks) - first * way->per_unit;
}

INLINE void predict_codes(const way_t *way, int n_codes, size_t n_units, const uint8_t *parent,
                          tile_t *tile) {
    for (size_t i = 0; i < n_units; i++)
        exact_of_codes(n_codes, way->value_of, tile->step + i * GROUPS, tile->start + i * GROUPS,
                       tile->exact[i]);
    for (size_t i = 0; i < n_units; i++)
        predict(way, GROUPS * n_codes, tile->exact[i], tile->of_code[i][0], tile->of_code[i][1]);
    for (size_t i = 0; i < n_units; i++)
        blocks_read_codes(way->parent_type, UNIT, parent + i * way->parent_unit,
                          tile->parent_code[i]);
    for (size_t i = 0; i < n_units; i++) {
        look_up_codes(n_codes, tile->of_code[i][0], tile->parent_code[i], tile->predicted[i]);
        look_up_codes(n_codes, tile->of_code[i][1], tile->parent_code[i], tile->marks[i]);
    }
}

INLINE void predict_weights(const way_t *way, size_t first, size_t last, const uint8_t *parent,
                            tile_t *tile) {
    for (size_t i = 0; i < last - first; i++, parent += way->parent_unit) {
        float value[UNIT];
        read_values(way->parent_type, in_unit(way, first + i), parent, value);
        exact_of_each(value, tile->step + i * GROUPS, tile->start + i * GROUPS, tile->exact[i]);
    }
    for (size_t i = 0; i < last - first; i++)
        predict(way, UNIT, tile->exact[i], tile->predicted[i], tile->marks[i]);
}

/* Predictions of units [first, last), once the scales of the child are there. */
INLINE void predict_tile(const way_t *way, const uint32_t limits[3], size_t first, size_t last,
                         const uint8_t *parent, const uint8_t *child, tile_t *tile) {
    for (size_t u = first; u < last; u++) {
        const size_t g = (u - first) * GROUPS;
        const int m = in_unit(way, u);
        read_parent_scales(way->parent_type, m, parent + u * way->parent_unit,
                           tile->of_parent.scale + g, tile->of_parent.offset + g);
        blocks_read_scales(way->child_type, m, child + u * way->child_unit,
                           tile->of_child.scale + g, tile->of_child.offset + g);
    }
    find_steps((int)(last - first) * GROUPS, &tile->of_parent, &tile->of_child, tile->step,
               tile->start);
    find_classes((int)(last - first) * GROUPS, tile->step, limits, tile->class);
    parent += first * way->parent_unit;
    if (way->n_codes == 4)
        predict_codes(way, 4, last - first, parent, tile);
    else if (way->n_codes == 8)
        predict_codes(way, 8, last - first, parent, tile);
    else
        predict_weights(way, first, last, parent, tile);
}

FAST int split_codes(int parent_type, int child_type, size_t n, const uint8_t *parent,
                     uint8_t *child, level_t *level, streams_t *streams) {
    way_t way;
    tile_t tile;
    if (!find_way(parent_type, child_type, n, level->is_plain, 0, &way)) return BAD_TYPE;
    if (n)
        quartiles(parent_type, child_type, n, parent, way.parent_unit, child, way.child_unit,
                  level->limits);
    for (size_t first = 0; first < way.n_units; first += TILE) {
        const size_t last = way.n_units - first < TILE ? way.n_units : first + TILE;
        read_rest(way.layout, blocks_in(&way, first, last), way.n_blocks,
                  child + first * way.child_unit, level->rest + first * way.per_unit);
        predict_tile(&way, level->limits, first, last, parent, child, &tile);
        for (size_t i = 0; i < last - first; i++) {
            const int m = in_unit(&way, first + i);
            blocks_read_codes(child_type, m, child + (first + i) * way.child_unit, tile.code[i]);
            find_residuals(way.layout, tile.predicted[i], tile.marks[i], tile.code[i],
                           tile.residual[i]);
            deal(&way, streams, i, m / GROUP, &tile);
        }
    }
    return 0;
}

FAST int join_codes(int parent_type, int child_type, size_t n, const uint8_t *parent,
                    uint8_t *child, const level_t *level, streams_t *streams) {
    way_t way;
    tile_t tile;
    if (!find_way(parent_type, child_type, n, level->is_plain, 1, &way)) return BAD_TYPE;
    const size_t n_wide = way.is_wide ? n / UNIT : 0;
    for (size_t first = 0; first < n_wide; first += WIDE_TILE) {
        const size_t n_left = n_wide - first;
        const int bad = wide_join_codes(
            parent_type, child_type, n_left < WIDE_TILE ? n_left : WIDE_TILE, way.n_blocks,
            parent + first * way.parent_unit, child + first * way.child_unit,
            level->rest + first * way.per_unit, level->limits, streams);
        if (bad) return bad;
    }
    for (size_t first = n_wide; first < way.n_units; first += TILE) {
        const size_t last = way.n_units - first < TILE ? way.n_units : first + TILE;
        write_rest(way.layout, blocks_in(&way, first, last), way.n_blocks,
                   child + first * way.child_unit, level->rest + first * way.per_unit);
        predict_tile(&way, level->limits, first, last, parent, child, &tile);
        for (size_t i = 0; i < last - first; i++) {
            const int bad = streams_check(streams, CODE_STREAMS);
            if (bad) return bad;
            collect(&way, streams, i, in_unit(&way, first + i) / GROUP, &tile);
        }
        for (size_t i = 0; i < last - first; i++) {
            add_residuals(way.layout, tile.predicted[i], tile.marks[i], tile.residual[i],
                          tile.code[i]);
            blocks_write_codes(child_type, in_unit(&way, first + i),
                               child + (first + i) * way.child_unit, tile.code[i]);
        }
    }
    return streams_finish(streams, CODE_STREAMS);
}
