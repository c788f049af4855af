/* Units of 256 weights with AVX-512's compressing and expanding moves, where there are any. */
#ifndef EDGEKIT_WIDE_H
#define EDGEKIT_WIDE_H

#include "units.h"

#if defined(__x86_64__) && defined(__GNUC__) && defined(__linux__)
#include <immintrin.h>

#define WIDE __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vbmi2,bmi2,popcnt")))
#define WIDE_INLINE WIDE INLINE
#endif

/* Whether this machine has what the functions below need. */
int wide_supported(void);

/* Predictions and marks of n values, a multiple of 16. */
void wide_predict(int n, const float *exact, layout_t layout, uint8_t *predicted, uint8_t *marks);

/* The residuals of n groups to the streams of their classes, each weight's by its mark. */
void wide_deal(streams_t *to, int n, const uint8_t class[GROUPS], const uint8_t marks[UNIT],
               const uint8_t residual[UNIT]);

/* join_codes of n whole units, WIDE_TILE at most. parent, child: of the first unit; rest: its first
 * scale byte, in planes that are n_blocks apart. Returns 1 + a stream that was read beyond its end,
 * or 0. */
enum { WIDE_TILE = 16 };
int wide_join_codes(int parent_type, int child_type, size_t n, size_t n_blocks,
                    const uint8_t *parent, uint8_t *child, const uint8_t *rest,
                    const uint32_t limits[3], streams_t *streams);

/* Streams of BF16 whose residuals fit in a byte each where the parent is the child rounded: half a
 * step is at most a quarter of these weights, 64 units in the last place. */
enum { WIDE_NARROW = 7 };

/* m weights of BF16, from their parent's blocks. The join takes streams with n_narrow 0 or
 * WIDE_NARROW. */
void wide_split_bf16(int parent_type, int m, const uint8_t *parent, streams_t *streams,
                     const uint8_t *child);
void wide_join_bf16(int parent_type, int m, const uint8_t *parent, streams_t *streams,
                    uint8_t *child);

#endif
