/* Levels to types with codes: what nested_ref.py says, in C, unit by unit of 256 weights.
 *
 * Functions return 0, or say what is wrong with a positive number; they read and write nothing
 * outside the arrays they are given, whatever those hold. */
#include "units.h"

#include <stdlib.h>

#if defined(__x86_64__) && defined(__GNUC__) && defined(__linux__)
#define HAS_EXPAND
#include <immintrin.h>
#endif

enum { SAMPLE = 256 };
static const float ROUND = 12582912.0f; /* 1.5 * 2**23: adding it rounds half to even */

EXPORT int nested_abi(void) { return 1; }

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
        const int usable = is_finite(a) && is_finite(b);
        step[g] = usable ? a : 0.0f;
        start[g] = usable ? b : 0.0f;
    }
}

/* Predictions of a unit; with them whether the residual is negated (-1 or 0) and whether the
 * prediction rounded away a quarter or more. */
INLINE void unit_predict(const float value[UNIT], const float step[GROUPS],
                         const float start[GROUPS], layout_t layout, int16_t predicted[UNIT],
                         int16_t negate[UNIT], uint8_t far[UNIT]) {
    const float low = (float)layout.low, high = (float)(layout.low + (1 << layout.bits) - 1);
    float exact[UNIT], fraction[UNIT];
    for (int g = 0; g < GROUPS; g++)
        for (int i = g * GROUP; i < (g + 1) * GROUP; i++)
            exact[i] = value[i] * step[g] + start[g];
    for (int i = 0; i < UNIT; i++) {
        float within = exact[i] < low ? low : exact[i];
        within = within > high ? high : within;
        const float shifted = within + ROUND;
        predicted[i] = (int16_t)(bits_of(shifted) - 0x4b400000u);
        fraction[i] = within - (shifted - ROUND);
    }
    for (int i = 0; i < UNIT; i++) negate[i] = (int16_t)-(fraction[i] < 0.0f);
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

/* streams: CODE_STREAMS arrays with room for n + GROUP residuals each; counts: how many were
 * written. rest: the child's scale bytes, in planes. */
FAST EXPORT int nested_split_codes(int parent_type, int child_type, size_t n,
                                   const uint8_t *parent, uint8_t *child, uint32_t limits[3],
                                   int16_t *const streams[], size_t counts[], uint8_t *rest) {
    const layout_t layout = layout_of(child_type);
    if (!layout.block || n % (size_t)layout.block || !is_parent(parent_type, n)) return BAD_TYPE;
    const size_t parent_unit = unit_bytes(parent_type), child_unit = unit_bytes(child_type);
    const int half = 1 << (layout.bits - 1);
    int16_t *to[CODE_STREAMS];
    for (int k = 0; k < CODE_STREAMS; k++) to[k] = streams[k];
    if (n) quartiles(parent_type, child_type, n, parent, parent_unit, child, child_unit, limits);
    for (size_t done = 0; done < n; done += UNIT, parent += parent_unit, child += child_unit) {
        const int m = n - done < UNIT ? (int)(n - done) : UNIT;
        float value[UNIT], step[GROUPS], start[GROUPS];
        int16_t predicted[UNIT], negate[UNIT], residual[UNIT];
        uint8_t code[UNIT], far[UNIT];
        unit_rest(layout, m, child, rest, done / (size_t)layout.block, n / (size_t)layout.block, 0);
        unit_steps(parent_type, child_type, m, parent, child, step, start);
        read_values(parent_type, m, parent, value);
        unit_predict(value, step, start, layout, predicted, negate, far);
        blocks_read_codes(child_type, m, child, code);
        for (int i = 0; i < UNIT; i++) {
            const int difference = (code[i] ^ layout.flip) + layout.low - predicted[i];
            const int wrapped = ((difference + half) & (2 * half - 1)) - half;
            residual[i] = (int16_t)((wrapped ^ negate[i]) - negate[i]);
        }
        for (int g = 0; g < m / GROUP; g++) {
            const int pair = 2 * step_class(step[g], limits);
            int16_t *near_to = to[pair], *far_to = to[pair + 1];
            const uint8_t *is_far = far + g * GROUP;
            const int16_t *from_here = residual + g * GROUP;
            for (int i = 0; i < GROUP; i++) { /* both are written, one advances: no branches */
                const ptrdiff_t step_far = is_far[i];
                *near_to = *far_to = from_here[i];
                far_to += step_far;
                near_to += 1 - step_far;
            }
            to[pair] = near_to;
            to[pair + 1] = far_to;
        }
    }
    for (int k = 0; k < CODE_STREAMS; k++) counts[k] = (size_t)(to[k] - streams[k]);
    return 0;
}

/* Take the residuals of n groups from their pairs of streams, each weight's by far[]. */
INLINE void collect_plain(reader_t *reader, int n, const uint8_t pair[GROUPS],
                          const uint8_t far[UNIT], int16_t residual[UNIT]) {
    for (int g = 0; g < n; g++, far += GROUP, residual += GROUP) {
        const int16_t *near_at = reader->at[pair[g]], *far_at = reader->at[pair[g] + 1];
        for (int i = 0; i < GROUP; i++) { /* both are read, one advances: no branches */
            const ptrdiff_t is_far = far[i];
            const int16_t a = *near_at, b = *far_at;
            residual[i] = is_far ? b : a;
            far_at += is_far;
            near_at += 1 - is_far;
        }
        reader->at[pair[g]] = near_at;
        reader->at[pair[g] + 1] = far_at;
    }
}

#ifdef HAS_EXPAND
/* The same with AVX-512's expanding loads. */
__attribute__((target("avx512vbmi2,avx512vl,avx512bw,popcnt"))) static void
collect_expand(reader_t *reader, int n, const uint8_t pair[GROUPS], const uint8_t far[UNIT],
               int16_t residual[UNIT]) {
    for (int g = 0; g < n; g++, far += GROUP, residual += GROUP) {
        const __m128i flags = _mm_loadu_si128((const __m128i *)far);
        const __mmask16 is_far = _mm_test_epi8_mask(flags, flags);
        const __m256i a = _mm256_loadu_si256((const __m256i *)reader->at[pair[g]]);
        const __m256i b = _mm256_loadu_si256((const __m256i *)reader->at[pair[g] + 1]);
        const __m256i near = _mm256_maskz_expand_epi16((__mmask16)~is_far, a);
        _mm256_storeu_si256((__m256i *)residual, _mm256_mask_expand_epi16(near, is_far, b));
        const int n_far = __builtin_popcount(is_far);
        reader->at[pair[g]] += GROUP - n_far;
        reader->at[pair[g] + 1] += n_far;
    }
}
#endif

static void collect(reader_t *reader, int n, const uint8_t pair[GROUPS], const uint8_t far[UNIT],
                    int16_t residual[UNIT]) {
#ifdef HAS_EXPAND
    if (__builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("avx512vl")) {
        collect_expand(reader, n, pair, far, residual);
        return;
    }
#endif
    collect_plain(reader, n, pair, far, residual);
}

FAST EXPORT int nested_join_codes(int parent_type, int child_type, size_t n,
                                  const uint8_t *parent, uint8_t *child, const uint32_t limits[3],
                                  const int16_t *const streams[], const size_t counts[],
                                  uint8_t *rest) {
    const layout_t layout = layout_of(child_type);
    if (!layout.block || n % (size_t)layout.block || !is_parent(parent_type, n)) return BAD_TYPE;
    const size_t parent_unit = unit_bytes(parent_type), child_unit = unit_bytes(child_type);
    reader_t reader;
    reader_start(&reader, CODE_STREAMS, streams, counts);
    for (size_t done = 0; done < n; done += UNIT, parent += parent_unit, child += child_unit) {
        const int m = n - done < UNIT ? (int)(n - done) : UNIT;
        float value[UNIT], step[GROUPS], start[GROUPS];
        int16_t predicted[UNIT], negate[UNIT], residual[UNIT];
        uint8_t code[UNIT], far[UNIT];
        const int bad = reader_check(&reader, CODE_STREAMS);
        if (bad) return bad;
        unit_rest(layout, m, child, rest, done / (size_t)layout.block, n / (size_t)layout.block, 1);
        unit_steps(parent_type, child_type, m, parent, child, step, start);
        read_values(parent_type, m, parent, value);
        unit_predict(value, step, start, layout, predicted, negate, far);
        uint8_t pair[GROUPS];
        for (int g = 0; g < GROUPS; g++) pair[g] = (uint8_t)(2 * step_class(step[g], limits));
        collect(&reader, m / GROUP, pair, far, residual);
        for (int i = 0; i < UNIT; i++) {
            const int value_code = predicted[i] + ((residual[i] ^ negate[i]) - negate[i]);
            const int raw = (value_code - layout.low) & ((1 << layout.bits) - 1);
            code[i] = (uint8_t)(raw ^ layout.flip);
        }
        blocks_write_codes(child_type, m, child, code);
    }
    return reader_end(&reader, CODE_STREAMS);
}
