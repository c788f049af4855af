/* Levels to types with codes, a unit of 256 weights at a time in AVX-512's registers: the same
 * results as join_codes in nested.c, which runs elsewhere. */
#include "wide.h"

#ifdef WIDE
#include "wide_blocks.h"

/* Of each group: child code = step * parent value + start; and 16 times its class. */
typedef struct {
    __m512 step, start;
    uint8_t shift[GROUPS];
} steps_t;

/* What is predicted of a unit's weights, modulo 256; the far ones, those with a negated residual. */
typedef struct {
    __m512i predicted[QUARTERS];
    __mmask64 far[QUARTERS], negated[QUARTERS];
} prediction_t;

WIDE_INLINE void find_steps(int parent_type, int child_type, const uint8_t *parent,
                            const uint8_t *child, const uint32_t limits[3], steps_t *steps) {
    enum { NOT_FINITE = 0x99 }; /* infinities, and both kinds of what is no number */
    __m512 scale, offset, child_scale, child_offset;
    read_scales(parent_type, parent, &scale, &offset);
    read_scales(child_type, child, &child_scale, &child_offset);
    const __m512 inverse = _mm512_div_ps(_mm512_set1_ps(1.0f), child_scale);
    const __m512 a = _mm512_mul_ps(scale, inverse);
    const __m512 b = _mm512_mul_ps(_mm512_sub_ps(offset, child_offset), inverse);
    const __mmask16 usable = _knot_mask16(_mm512_fpclass_ps_mask(a, NOT_FINITE) |
                                          _mm512_fpclass_ps_mask(b, NOT_FINITE));
    steps->step = _mm512_maskz_mov_ps(usable, a);
    /* no negative zero, so that `rounded` may tell what is negative from the sign */
    steps->start = _mm512_add_ps(_mm512_maskz_mov_ps(usable, b), _mm512_setzero_ps());
    const __m512i size = _mm512_castps_si512(_mm512_abs_ps(steps->step));
    __m128i shift = _mm_setzero_si128();
    for (int k = 0; k < 3; k++) {
        const __m512i limit = _mm512_set1_epi32((int)limits[k]);
        const __mmask16 above = _mm512_cmpgt_epu32_mask(size, limit);
        shift = _mm_mask_add_epi8(shift, above, shift, _mm_set1_epi8(16));
    }
    _mm_storeu_si128((__m128i *)steps->shift, shift);
}

/* A code predicted exactly, rounded: in the lowest bits of the result; and in *marks bit 31 where
 * the residual is negated, bit 30 where it is far. */
WIDE_INLINE __m512i rounded(__m512 exact, layout_t layout, __m512i *marks) {
    const __m512 low = _mm512_set1_ps((float)layout.low), round = _mm512_set1_ps(12582912.0f);
    const __m512 high = _mm512_set1_ps((float)(layout.low + (1 << layout.bits) - 1));
    const __m512 within = _mm512_min_ps(_mm512_max_ps(exact, low), high);
    const __m512 sum = _mm512_add_ps(within, round);
    const __m512 fraction = _mm512_sub_ps(within, _mm512_sub_ps(sum, round));
    /* a quarter to a half becomes 2 and more: the exponent's highest bit */
    *marks = _mm512_add_epi32(_mm512_castps_si512(fraction), _mm512_set1_epi32(0x01800000));
    return _mm512_castps_si512(sum);
}

/* Where parent and child have few codes: predictions of the parent's codes 4 * k to 4 * k + 3, in
 * each word those of a group, six bits each and the marks above them. */
WIDE_INLINE __m512i predict_four(int k, layout_t above, layout_t layout, const steps_t *steps) {
    __m512i four = _mm512_setzero_si512();
    UNROLL for (int c = 0; c < 4; c++) {
        const __m512 value = _mm512_set1_ps((float)(above.low + 4 * k + c));
        __m512i marks;
        const __m512i sum = rounded(
            _mm512_add_ps(_mm512_mul_ps(value, steps->step), steps->start), layout, &marks);
        const __m512i byte = _mm512_ternarylogic_epi32(
            _mm512_set1_epi32(0x3f), sum, _mm512_srli_epi32(marks, 24), 0xca); /* a ? b : c */
        four = _mm512_or_si512(four, _mm512_slli_epi32(byte, (unsigned)(8 * c)));
    }
    return four;
}

/* Look predictions of codes up: in the tables the lowest two bits of a code are the place in a
 * word, the group is the word, and the bits above are the table. */
WIDE_INLINE __m512i look_up_four(int n_codes, const __m512i table[4], __m512i code, int q) {
    const __m512i lane = _mm512_setr_epi64(0, 0, 0x0404040404040404, 0x0404040404040404,
                                           0x0808080808080808, 0x0808080808080808,
                                           0x0c0c0c0c0c0c0c0c, 0x0c0c0c0c0c0c0c0c);
    const __m512i group = _mm512_or_si512(lane, _mm512_set1_epi8((char)(16 * q)));
    const __m512i low = _mm512_or_si512(and_bits(code, 3), group);
    if (n_codes == 4) return _mm512_permutexvar_epi8(low, table[0]);
    const __m512i at = _mm512_or_si512(low, and_bits(_mm512_slli_epi16(code, 4), 0xc0));
    const __m512i first = _mm512_permutex2var_epi8(table[0], at, table[1]);
    if (n_codes == 8) return first;
    const __m512i second = _mm512_permutex2var_epi8(table[2], at, table[3]);
    return _mm512_mask_mov_epi8(first, _mm512_movepi8_mask(at), second);
}

WIDE_INLINE void predict_codes(int n_codes, int parent_type, layout_t layout, const uint8_t *parent,
                               const steps_t *steps, prediction_t *prediction) {
    const layout_t above = layout_of(parent_type);
    __m512i code[QUARTERS], table[4];
    read_codes(parent_type, parent, code);
    for (int k = 0; k < n_codes / 4; k++) table[k] = predict_four(k, above, layout, steps);
    UNROLL for (int q = 0; q < QUARTERS; q++) {
        const __m512i both = look_up_four(n_codes, table, code[q], q);
        prediction->predicted[q] = both;
        prediction->far[q] = _mm512_test_epi8_mask(both, _mm512_set1_epi8(0x40));
        prediction->negated[q] = _mm512_movepi8_mask(both);
    }
}

WIDE_INLINE void predict_weights(int parent_type, layout_t layout, const uint8_t *parent,
                                 const steps_t *steps, prediction_t *prediction) {
    const __m512i is_far = _mm512_set1_epi32(1 << 30);
    float value[UNIT];
    values_of(parent_type, parent, value);
    UNROLL for (int q = 0; q < QUARTERS; q++) {
        __m128i predicted[4];
        __mmask64 far = 0, negated = 0;
        UNROLL for (int j = 0; j < 4; j++) {
            const int g = 4 * q + j;
            const __m512 step = _mm512_permutexvar_ps(_mm512_set1_epi32(g), steps->step);
            const __m512 start = _mm512_permutexvar_ps(_mm512_set1_epi32(g), steps->start);
            const __m512 product = _mm512_mul_ps(_mm512_loadu_ps(value + g * GROUP), step);
            __m512i marks;
            const __m512i sum = rounded(_mm512_add_ps(product, start), layout, &marks);
            predicted[j] = _mm512_cvtepi32_epi8(sum);
            far |= (__mmask64)_mm512_test_epi32_mask(marks, is_far) << (j * GROUP);
            negated |= (__mmask64)_mm512_movepi32_mask(marks) << (j * GROUP);
        }
        prediction->predicted[q] = joined(predicted);
        prediction->far[q] = far;
        prediction->negated[q] = negated;
    }
}

/* From memory an expanding move takes twice as long as from a register. */
WIDE_INLINE __m128i bytes_at(const uint8_t *at) {
    __m128i bytes = _mm_loadu_si128((const __m128i *)at);
    __asm__("" : "+v"(bytes));
    return bytes;
}

/* The residuals of a quarter. */
WIDE_INLINE __m512i collect(const streams_t *from, const uint8_t shift[4], uint64_t far,
                            counts_t *done) {
    __m128i of[4];
    UNROLL for (int g = 0; g < 4; g++, far >>= GROUP) {
        const __mmask16 here = (__mmask16)far;
        const uint64_t n_far = (uint64_t)_mm_popcnt_u32(here);
        uint8_t *const *const streams = from->at + shift[g] / 8;
        const uint8_t *near_one = streams[0] + (uint16_t)(done->n_near >> shift[g]);
        const uint8_t *far_one = streams[1] + (uint16_t)(done->n_far >> shift[g]);
        const __m128i nears = _mm_maskz_expand_epi8(_knot_mask16(here), bytes_at(near_one));
        of[g] = _mm_mask_expand_epi8(nears, here, bytes_at(far_one));
        done->n_near += (GROUP - n_far) << shift[g];
        done->n_far += n_far << shift[g];
    }
    return joined(of);
}

/* Move on by what a unit took. Returns 1 + a stream that was read beyond its end, or 0. */
WIDE_INLINE int move_on(streams_t *streams, counts_t done) {
    const __m128i counts = _mm_unpacklo_epi16(_mm_cvtsi64_si128((int64_t)done.n_near),
                                              _mm_cvtsi64_si128((int64_t)done.n_far));
    const __m512i at = _mm512_add_epi64(_mm512_loadu_si512(streams->at),
                                        _mm512_cvtepu16_epi64(counts));
    _mm512_storeu_si512(streams->at, at);
    const __mmask8 beyond = _mm512_cmpgt_epu64_mask(at, _mm512_loadu_si512(streams->end));
    return beyond ? 1 + __builtin_ctz(beyond) : 0;
}

/* Codes of predictions and residuals, into the child's blocks. Returns what move_on does. */
WIDE_INLINE int write_unit(int child_type, const prediction_t *prediction,
                           const uint8_t shift[GROUPS], streams_t *streams, uint8_t *child) {
    const layout_t layout = layout_of(child_type);
    const __m512i zero = _mm512_setzero_si512(), low = _mm512_set1_epi8((char)layout.low);
    const __m512i flip = _mm512_set1_epi8((char)layout.flip);
    counts_t done = {0, 0};
    __m512i code[QUARTERS];
    UNROLL for (int q = 0; q < QUARTERS; q++) {
        const __m512i residual = collect(streams, shift + 4 * q, prediction->far[q], &done);
        const __m512i flipped =
            _mm512_mask_sub_epi8(residual, prediction->negated[q], zero, residual);
        const __m512i sum = _mm512_add_epi8(prediction->predicted[q], flipped);
        const __m512i raw = and_bits(_mm512_sub_epi8(sum, low), (1 << layout.bits) - 1);
        code[q] = _mm512_xor_si512(raw, flip);
    }
    write_codes(child_type, child, code);
    return move_on(streams, done);
}

/* Codes of the parent, where they are few: predictions have six bits, and there are no more of them
 * than weights. Else 0. */
INLINE int few_codes(layout_t above, layout_t layout) {
    return above.block && above.bits <= 4 && layout.bits <= 6 ? 1 << above.bits : 0;
}

/* n units, in passes over all of them: one alone would wait for itself. */
WIDE_INLINE int join(int parent_type, int child_type, size_t n, const uint8_t *parent,
                     uint8_t *child, const uint32_t limits[3], streams_t *streams) {
    const size_t parent_unit = unit_bytes(parent_type), child_unit = unit_bytes(child_type);
    const layout_t layout = layout_of(child_type);
    const int n_codes = few_codes(layout_of(parent_type), layout);
    steps_t steps[WIDE_TILE];
    prediction_t prediction[WIDE_TILE];
    for (size_t u = 0; u < n; u++)
        find_steps(parent_type, child_type, parent + u * parent_unit, child + u * child_unit,
                   limits, &steps[u]);
    for (size_t u = 0; u < n; u++) {
        const uint8_t *at = parent + u * parent_unit;
        if (n_codes) predict_codes(n_codes, parent_type, layout, at, &steps[u], &prediction[u]);
        else predict_weights(parent_type, layout, at, &steps[u], &prediction[u]);
    }
    for (size_t u = 0; u < n; u++) {
        const int bad = write_unit(child_type, &prediction[u], steps[u].shift, streams,
                                   child + u * child_unit);
        if (bad) return bad;
    }
    return 0;
}

WIDE int wide_join_codes(int parent_type, int child_type, size_t n, size_t n_blocks,
                         const uint8_t *parent, uint8_t *child, const uint8_t *rest,
                         const uint32_t limits[3], streams_t *streams) {
    const layout_t layout = layout_of(child_type);
    if (layout.block == UNIT) write_rest_of_units(layout, (int)n, n_blocks, child, rest);
    else write_rest(layout, n * UNIT / (size_t)layout.block, n_blocks, child, rest);
    /* the default chain is compiled for its types, a tenth faster */
#define WAY(PARENT, CHILD)                                                                         \
    if (parent_type == PARENT && child_type == CHILD)                                              \
        return join(PARENT, CHILD, n, parent, child, limits, streams)
    WAY(T_Q2_K, T_Q3_K);
    WAY(T_Q3_K, T_Q4_K);
    WAY(T_Q4_K, T_Q5_K);
    WAY(T_Q5_K, T_Q6_K);
    WAY(T_Q6_K, T_Q8_0);
    return join(parent_type, child_type, n, parent, child, limits, streams);
}

#else

int wide_join_codes(int parent_type, int child_type, size_t n, size_t n_blocks, const uint8_t *parent,
                    uint8_t *child, const uint8_t *rest, const uint32_t limits[3],
                    streams_t *streams) {
    (void)parent_type, (void)child_type, (void)n, (void)n_blocks, (void)parent, (void)child;
    (void)rest, (void)limits, (void)streams;
    return 0;
}

#endif
