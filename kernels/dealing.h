/* Residuals dealt out to the streams of their classes and collected again, without AVX-512; wide.c
 * and wide_codes.c do it for whole units where a machine has that. */
#ifndef EDGEKIT_DEALING_H
#define EDGEKIT_DEALING_H

#include "shuffle.h"
#include "units.h"

/* For each set of far weights among eight, one bit each: where the residuals go when the near ones
 * lie first and the far ones after them (deal), or where they come from when the near ones are the
 * first eight bytes and the far ones the next (collect). */
typedef struct {
    uint64_t from[256];
    uint8_t n_far[256];
} orders_t;

static void make_orders(orders_t *orders, int is_join) {
    for (int set = 0; set < 256; set++) {
        uint8_t from[8];
        int n_near = 0;
        for (int i = 0; i < 8; i++) n_near += !(set >> i & 1);
        int at[2] = {0, is_join ? 8 : n_near}; /* the next near, the next far */
        for (int i = 0; i < 8; i++) {
            const int place = at[set >> i & 1]++;
            if (is_join) from[i] = (uint8_t)place;
            else from[place] = (uint8_t)i;
        }
        memcpy(&orders->from[set], from, 8);
        orders->n_far[set] = (uint8_t)(8 - n_near);
    }
}

INLINE uint64_t eight_at(const uint8_t *p) {
    uint64_t eight;
    memcpy(&eight, p, 8);
    return eight;
}

/* Which of eight weights are far, one bit each. */
INLINE int set_of(const uint8_t marks[8]) {
    return (int)(((eight_at(marks) & 0x0101010101010101u) * 0x0102040810204080u) >> 56);
}

/* Deal the residuals of n groups out to the streams of their classes, each weight's by its mark;
 * eight at a time, without branches: they would be guessed wrong. */
INLINE void deal_plain(streams_t *to, int n, const uint8_t class[GROUPS], const uint8_t marks[UNIT],
                 const uint8_t residual[UNIT], const orders_t *orders) {
    counts_t done = {0, 0};
    for (int g = 0; g < n; g++) {
        uint8_t *near_to = near_at(to, done, class[g]), *far_to = far_at(to, done, class[g]);
        uint64_t of_group = 0;
        for (int i = g * GROUP; i < (g + 1) * GROUP; i += 8) {
            const int set = set_of(marks + i);
            const uint64_t n_far = orders->n_far[set];
            const uint64_t sorted = pick(eight_at(residual + i), 0, orders->from[set]);
            const uint64_t far_ones = n_far ? sorted >> (64 - 8 * n_far) : 0;
            memcpy(near_to, &sorted, 8); /* too many, written over next time */
            memcpy(far_to, &far_ones, 8);
            near_to += 8 - n_far;
            far_to += n_far;
            of_group += n_far;
        }
        done = counted(done, class[g], of_group);
    }
    advance(to, done);
}

/* The reverse. */
INLINE void collect_plain(streams_t *from, int n, const uint8_t class[GROUPS],
                    const uint8_t marks[UNIT], uint8_t residual[UNIT], const orders_t *orders) {
    counts_t done = {0, 0};
    for (int g = 0; g < n; g++) {
        const uint8_t *near_from = near_at(from, done, class[g]);
        const uint8_t *far_from = far_at(from, done, class[g]);
        uint64_t of_group = 0;
        for (int i = g * GROUP; i < (g + 1) * GROUP; i += 8) {
            const int set = set_of(marks + i);
            const uint64_t n_far = orders->n_far[set];
            const uint64_t eight = pick(eight_at(near_from), eight_at(far_from), orders->from[set]);
            memcpy(residual + i, &eight, 8);
            near_from += 8 - n_far;
            far_from += n_far;
            of_group += n_far;
        }
        done = counted(done, class[g], of_group);
    }
    advance(from, done);
}

#endif
