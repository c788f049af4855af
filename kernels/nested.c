/* One level of the `nested` codec: what nested_ref.py says, in C, unit by unit of 256 weights.
 *
 * Functions return 0, or say what is wrong with a positive number; they read and write nothing
 * outside the arrays they are given, whatever those hold. */
#include "blocks.h"

#include <stdlib.h>

#if defined(__x86_64__) && defined(__GNUC__) && defined(__linux__)
#define HAS_EXPAND
#include <immintrin.h>
#endif

enum { CODE_STREAMS = 8, FLOAT_STREAMS = 9, MOST_STREAMS = 9, SAMPLE = 256 };
enum { BAD_TYPE = 100 }; /* below: 1 + the stream whose length does not fit */
static const float ROUND = 12582912.0f; /* 1.5 * 2**23: adding it rounds half to even */
static const uint32_t EXPONENT = 0x7f800000, MAGNITUDE = 0x7fffffff, TINY = 27u << 23;

EXPORT int nested_abi(void) { return 1; }

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
    for (int g = 0; g < GROUPS; g++)
        for (int i = g * GROUP; i < (g + 1) * GROUP; i++) {
            float exact = value[i] * step[g] + start[g];
            exact = exact < low ? low : exact;
            exact = exact > high ? high : exact;
            const float rounded = (exact + ROUND) - ROUND;
            const float fraction = exact - rounded;
            const float distance = fraction < 0.0f ? -fraction : fraction;
            predicted[i] = (int16_t)(int32_t)rounded;
            negate[i] = fraction < 0.0f ? -1 : 0;
            far[i] = distance >= 0.25f ? 1 : 0;
        }
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

INLINE size_t unit_bytes(int type) {
    if (type == T_F32) return UNIT * 4;
    if (type == T_F16 || type == T_BF16) return UNIT * 2;
    const layout_t layout = layout_of(type);
    return (size_t)(UNIT / layout.block * layout.block_bytes);
}

/* streams: CODE_STREAMS arrays with room for n + GROUP residuals each; counts: how many were
 * written. rest: the child's scale bytes, in planes. */
FAST EXPORT int nested_split_codes(int parent_type, int child_type, size_t n,
                                   const uint8_t *parent, uint8_t *child, uint32_t limits[3],
                                   int16_t *const streams[], size_t counts[], uint8_t *rest) {
    const layout_t layout = layout_of(child_type), from = layout_of(parent_type);
    if (!layout.block || n % (size_t)layout.block || (parent_type != T_F32 && !from.block) ||
        (from.block && n % (size_t)from.block))
        return BAD_TYPE;
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
    const layout_t layout = layout_of(child_type), from = layout_of(parent_type);
    if (!layout.block || n % (size_t)layout.block || (parent_type != T_F32 && !from.block) ||
        (from.block && n % (size_t)from.block))
        return BAD_TYPE;
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

/* Magnitude of float32 bits in units of the child's last place, times 2**shift. */
INLINE int32_t fixed_of(uint32_t bits, int child_type) {
    const int32_t magnitude = (int32_t)(bits & MAGNITUDE);
    if (child_type != T_F16) return magnitude;
    const int small = magnitude < 113 << 23;
    const float weight = float_of(small ? (uint32_t)magnitude : 0);
    const int32_t even = (int32_t)(weight * 137438953472.0f); /* 2**37 */
    const int32_t most = 0x7bff << 13, normal = magnitude - (112 << 23);
    return small ? even : normal < most ? normal : most;
}

/* Predictions of a unit of a float child: ordered bits, of F32 unrounded; see nested_ref.py. */
INLINE void unit_predict_float(int parent_type, int child_type, int m, const uint8_t *parent,
                               int32_t predicted[UNIT], int16_t negate[UNIT],
                               uint8_t stream[UNIT]) {
    const int shift = child_type == T_F16 ? 13 : 16, is_whole = child_type == T_F32;
    float value[UNIT], scale[GROUPS], offset[GROUPS];
    uint32_t bits[UNIT];
    read_values(parent_type, m, parent, value);
    read_parent_scales(parent_type, m, parent, scale, offset);
    for (int g = 0; g < GROUPS; g++) {
        int largest = 0, unit = (int)((bits_of(scale[g]) & EXPONENT) >> 23);
        for (int i = g * GROUP; i < (g + 1) * GROUP; i++) {
            const float weight =
                parent_type == T_F32 ? value[i] : value[i] * scale[g] + offset[g];
            bits[i] = bits_of(weight);
            bits[i] = (bits[i] & EXPONENT) == EXPONENT ? 0 : bits[i];
            const int exponent = (int)((bits[i] & EXPONENT) >> 23);
            largest = exponent > largest ? exponent : largest;
        }
        if (parent_type == T_F32) unit = largest - 2;
        for (int i = g * GROUP; i < (g + 1) * GROUP; i++) {
            int octave = unit - (int)((bits[i] & EXPONENT) >> 23) + 7;
            octave = octave < 0 ? 0 : octave;
            stream[i] = (uint8_t)(octave > 8 ? 8 : octave);
        }
    }
    for (int i = 0; i < UNIT; i++) {
        const int32_t magnitude = fixed_of(bits[i], child_type), sign = -(int32_t)(bits[i] >> 31);
        const int32_t rounded = (magnitude + (1 << (shift - 1))) >> shift;
        const int fold = (magnitude < rounded << shift) ^ (sign & 1);
        predicted[i] = (is_whole ? magnitude : rounded) ^ sign;
        negate[i] = fold && !is_whole ? -1 : 0;
    }
}

INLINE int32_t ordered16(int32_t bits) { return (int16_t)(bits ^ (((int16_t)bits >> 15) & 0x7fff)); }

INLINE uint32_t ordered32(uint32_t bits) { return bits ^ (bits >> 31 ? MAGNITUDE : 0); }

/* As nested_split_codes, for a float child; rest: of F32 the low 16 bits, in two planes. */
INLINE void split_float(int parent_type, int child_type, size_t n, const uint8_t *parent,
                        const uint8_t *child, int16_t *to[], uint8_t *rest) {
    const size_t parent_unit = unit_bytes(parent_type), size = child_type == T_F32 ? 4 : 2;
    for (size_t done = 0; done < n; done += UNIT, parent += parent_unit, child += UNIT * size) {
        const int m = n - done < UNIT ? (int)(n - done) : UNIT;
        int32_t predicted[UNIT];
        int16_t negate[UNIT], residual[UNIT];
        uint8_t stream[UNIT];
        unit_predict_float(parent_type, child_type, m, parent, predicted, negate, stream);
        if (child_type == T_F32) {
            uint32_t bits[UNIT] = {0};
            memcpy(bits, child, (size_t)m * 4);
            for (int i = 0; i < UNIT; i++) {
                bits[i] = ordered32(bits[i]) - (uint32_t)predicted[i];
                residual[i] = (int16_t)(uint16_t)((bits[i] + 0x8000u) >> 16);
            }
            for (int i = 0; i < m; i++) {
                rest[done + (size_t)i] = (uint8_t)bits[i];
                rest[n + done + (size_t)i] = (uint8_t)(bits[i] >> 8);
            }
        } else {
            int16_t bits[UNIT] = {0};
            memcpy(bits, child, (size_t)m * 2);
            for (int i = 0; i < UNIT; i++) {
                const int16_t difference = (int16_t)(ordered16(bits[i]) - predicted[i]);
                residual[i] = (int16_t)((difference ^ negate[i]) - negate[i]);
            }
        }
        for (int i = 0; i < m; i++) *to[stream[i]]++ = residual[i];
    }
}

FAST EXPORT int nested_split_float(int parent_type, int child_type, size_t n,
                                   const uint8_t *parent, uint8_t *child, uint32_t limits[3],
                                   int16_t *const streams[], size_t counts[], uint8_t *rest) {
    const layout_t from = layout_of(parent_type);
    int16_t *to[FLOAT_STREAMS];
    if ((parent_type != T_F32 && !from.block) || (from.block && n % (size_t)from.block))
        return BAD_TYPE;
    for (int k = 0; k < 3; k++) limits[k] = 0;
    for (int k = 0; k < FLOAT_STREAMS; k++) to[k] = streams[k];
    switch (child_type) { /* a copy of the loop for each */
    case T_BF16: split_float(parent_type, T_BF16, n, parent, child, to, rest); break;
    case T_F16: split_float(parent_type, T_F16, n, parent, child, to, rest); break;
    case T_F32: split_float(parent_type, T_F32, n, parent, child, to, rest); break;
    default: return BAD_TYPE;
    }
    for (int k = 0; k < FLOAT_STREAMS; k++) counts[k] = (size_t)(to[k] - streams[k]);
    return 0;
}

INLINE int join_float(int parent_type, int child_type, size_t n, const uint8_t *parent,
                      uint8_t *child, reader_t *reader, const uint8_t *rest) {
    const size_t parent_unit = unit_bytes(parent_type), size = child_type == T_F32 ? 4 : 2;
    for (size_t done = 0; done < n; done += UNIT, parent += parent_unit, child += UNIT * size) {
        const int m = n - done < UNIT ? (int)(n - done) : UNIT;
        int32_t predicted[UNIT];
        int16_t negate[UNIT], residual[UNIT] = {0};
        uint8_t stream[UNIT];
        const int bad = reader_check(reader, FLOAT_STREAMS);
        if (bad) return bad;
        unit_predict_float(parent_type, child_type, m, parent, predicted, negate, stream);
        for (int i = 0; i < m; i++) residual[i] = *reader->at[stream[i]]++;
        if (child_type == T_F32) {
            uint32_t bits[UNIT];
            for (int i = 0; i < m; i++) {
                const size_t at = done + (size_t)i;
                const int16_t low = (int16_t)(uint16_t)(rest[at] | rest[n + at] << 8);
                const uint32_t whole = ((uint32_t)(uint16_t)residual[i] << 16) + (uint32_t)low;
                bits[i] = ordered32((uint32_t)predicted[i] + whole);
            }
            memcpy(child, bits, (size_t)m * 4);
        } else {
            int16_t bits[UNIT];
            for (int i = 0; i < UNIT; i++)
                bits[i] = (int16_t)ordered16(predicted[i] + ((residual[i] ^ negate[i]) - negate[i]));
            memcpy(child, bits, (size_t)m * 2);
        }
    }
    return reader_end(reader, FLOAT_STREAMS);
}

FAST EXPORT int nested_join_float(int parent_type, int child_type, size_t n,
                                  const uint8_t *parent, uint8_t *child, const uint32_t limits[3],
                                  const int16_t *const streams[], const size_t counts[],
                                  uint8_t *rest) {
    const layout_t from = layout_of(parent_type);
    reader_t reader;
    (void)limits;
    if ((parent_type != T_F32 && !from.block) || (from.block && n % (size_t)from.block))
        return BAD_TYPE;
    reader_start(&reader, FLOAT_STREAMS, streams, counts);
    switch (child_type) {
    case T_BF16: return join_float(parent_type, T_BF16, n, parent, child, &reader, rest);
    case T_F16: return join_float(parent_type, T_F16, n, parent, child, &reader, rest);
    case T_F32: return join_float(parent_type, T_F32, n, parent, child, &reader, rest);
    default: return BAD_TYPE;
    }
}
