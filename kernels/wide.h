/* Units of 256 weights with AVX-512's compressing and expanding moves, where there are any. */
#ifndef EDGEKIT_WIDE_H
#define EDGEKIT_WIDE_H

#include "units.h"

#if defined(__x86_64__) && defined(__GNUC__) && defined(__linux__)
#include <immintrin.h>

#define WIDE __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi2,bmi2,popcnt")))
#define WIDE_INLINE WIDE INLINE
#endif

/* Whether this machine has what the functions below need. */
int wide_supported(void);

/* Codes (as stored) to residuals and back; of the streams, those of the first n_groups groups. */
void wide_split(const float value[UNIT], const float step[GROUPS], const float start[GROUPS],
                layout_t layout, const uint32_t limits[3], int n_groups, streams_t *streams,
                const uint8_t code[UNIT]);
void wide_join(const float value[UNIT], const float step[GROUPS], const float start[GROUPS],
               layout_t layout, const uint32_t limits[3], int n_groups, streams_t *streams,
               uint8_t code[UNIT]);

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
