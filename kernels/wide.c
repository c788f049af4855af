/* Units of codes with AVX-512: the same results as unit_plain in nested.c, which runs elsewhere.
 * What costs time there is the dealing out of residuals; here a compressing or expanding move does
 * it for a whole vector. */
#include "wide.h"

#ifdef WIDE

int wide_supported(void) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("bmi2") &&
           __builtin_cpu_supports("popcnt");
}

/* One bit per weight: whether the residual is negated, whether it goes to its pair's second
 * stream, and for each class of steps whether the weight is of it. */
typedef struct {
    uint16_t negate[GROUPS], far[GROUPS];
    __mmask16 of_class[4]; /* one bit per group */
} marks_t;

WIDE_INLINE void predict(const float value[UNIT], const float step[GROUPS],
                         const float start[GROUPS], layout_t layout, const uint32_t limits[3],
                         int n_groups, uint8_t predicted[UNIT], marks_t *marks) {
    const __m512 low = _mm512_set1_ps((float)layout.low);
    const __m512 high = _mm512_set1_ps((float)(layout.low + (1 << layout.bits) - 1));
    const __m512 round = _mm512_set1_ps(12582912.0f), zero = _mm512_setzero_ps();
    const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
    const __m512i quarter = _mm512_set1_epi32(0x3e800000);
    for (int g = 0; g < GROUPS; g++) {
        const __m512 product = _mm512_mul_ps(_mm512_loadu_ps(value + g * GROUP),
                                             _mm512_set1_ps(step[g]));
        const __m512 exact = _mm512_add_ps(product, _mm512_set1_ps(start[g]));
        const __m512 within = _mm512_min_ps(_mm512_max_ps(exact, low), high);
        const __m512 sum = _mm512_add_ps(within, round);
        const __m512 fraction = _mm512_sub_ps(within, _mm512_sub_ps(sum, round));
        const __m512i size = _mm512_and_si512(_mm512_castps_si512(fraction), magnitude);
        _mm_storeu_si128((__m128i *)(predicted + g * GROUP),
                         _mm512_cvtepi32_epi8(_mm512_castps_si512(sum)));
        marks->negate[g] = (uint16_t)_mm512_cmp_ps_mask(fraction, zero, _CMP_LT_OQ);
        marks->far[g] = (uint16_t)_mm512_cmpge_epu32_mask(size, quarter);
    }
    const __m512i size = _mm512_and_si512(_mm512_loadu_si512(step), magnitude);
    __m512i above = _mm512_setzero_si512();
    for (int k = 0; k < 3; k++) {
        const __m512i limit = _mm512_set1_epi32((int)limits[k]), one = _mm512_set1_epi32(1);
        above = _mm512_mask_add_epi32(above, _mm512_cmpgt_epu32_mask(size, limit), above, one);
    }
    for (int c = 0; c < 4; c++)
        marks->of_class[c] = (__mmask16)(_mm512_cmpeq_epi32_mask(above, _mm512_set1_epi32(c)) &
                                         ((1u << n_groups) - 1));
}

/* The weights of class c among the 64 from group 4 * quarter, one bit each. */
WIDE_INLINE uint64_t weights_of(const marks_t *marks, int c, int quarter) {
    return _pdep_u64((uint64_t)marks->of_class[c] >> (4 * quarter), 0x0001000100010001u) * 0xffff;
}

WIDE_INLINE uint64_t bits64(const uint16_t bits[GROUPS], int quarter) {
    uint64_t whole;
    memcpy(&whole, bits + 4 * quarter, 8);
    return whole;
}

WIDE void wide_join(const float value[UNIT], const float step[GROUPS], const float start[GROUPS],
                    layout_t layout, const uint32_t limits[3], int n_groups, streams_t *streams,
                    uint8_t code[UNIT]) {
    const __m512i low = _mm512_set1_epi8((char)layout.low), zero = _mm512_setzero_si512();
    const __m512i mask = _mm512_set1_epi8((char)((1 << layout.bits) - 1));
    const __m512i flip = _mm512_set1_epi8((char)layout.flip);
    uint8_t predicted[UNIT];
    marks_t marks;
    const uint8_t *at[CODE_STREAMS];
    predict(value, step, start, layout, limits, n_groups, predicted, &marks);
    for (int k = 0; k < CODE_STREAMS; k++) at[k] = streams->at[k];
    for (int q = 0; q < 4; q++) {
        const uint64_t far = bits64(marks.far, q), negate = bits64(marks.negate, q);
        __m512i residual = zero;
        for (int c = 0; c < 4; c++) {
            const uint64_t here = weights_of(&marks, c, q), a = here & ~far, b = here & far;
            const __m512i near_ones = _mm512_maskz_expand_epi8(a, _mm512_loadu_si512(at[2 * c]));
            const __m512i far_ones = _mm512_maskz_expand_epi8(b, _mm512_loadu_si512(at[2 * c + 1]));
            residual = _mm512_or_si512(residual, _mm512_or_si512(near_ones, far_ones));
            at[2 * c] += _mm_popcnt_u64(a);
            at[2 * c + 1] += _mm_popcnt_u64(b);
        }
        residual = _mm512_mask_sub_epi8(residual, negate, zero, residual);
        const __m512i sum = _mm512_add_epi8(residual, _mm512_loadu_si512(predicted + 64 * q));
        const __m512i raw = _mm512_and_si512(_mm512_sub_epi8(sum, low), mask);
        _mm512_storeu_si512(code + 64 * q, _mm512_xor_si512(raw, flip));
    }
    for (int k = 0; k < CODE_STREAMS; k++) streams->at[k] = (uint8_t *)at[k];
}

WIDE void wide_split(const float value[UNIT], const float step[GROUPS], const float start[GROUPS],
                     layout_t layout, const uint32_t limits[3], int n_groups, streams_t *streams,
                     const uint8_t code[UNIT]) {
    const __m512i low = _mm512_set1_epi8((char)layout.low), zero = _mm512_setzero_si512();
    const __m512i mask = _mm512_set1_epi8((char)((1 << layout.bits) - 1));
    const __m512i half = _mm512_set1_epi8((char)(1 << (layout.bits - 1)));
    const __m512i flip = _mm512_set1_epi8((char)layout.flip);
    uint8_t predicted[UNIT];
    marks_t marks;
    uint8_t *at[CODE_STREAMS];
    predict(value, step, start, layout, limits, n_groups, predicted, &marks);
    for (int k = 0; k < CODE_STREAMS; k++) at[k] = streams->at[k];
    for (int q = 0; q < 4; q++) {
        const uint64_t far = bits64(marks.far, q), negate = bits64(marks.negate, q);
        const __m512i raw = _mm512_xor_si512(_mm512_loadu_si512(code + 64 * q), flip);
        const __m512i plain = _mm512_add_epi8(raw, _mm512_add_epi8(low, half));
        const __m512i apart = _mm512_sub_epi8(plain, _mm512_loadu_si512(predicted + 64 * q));
        __m512i residual = _mm512_sub_epi8(_mm512_and_si512(apart, mask), half);
        residual = _mm512_mask_sub_epi8(residual, negate, zero, residual);
        for (int c = 0; c < 4; c++) {
            const uint64_t here = weights_of(&marks, c, q), a = here & ~far, b = here & far;
            _mm512_storeu_si512(at[2 * c], _mm512_maskz_compress_epi8(a, residual));
            _mm512_storeu_si512(at[2 * c + 1], _mm512_maskz_compress_epi8(b, residual));
            at[2 * c] += _mm_popcnt_u64(a);
            at[2 * c + 1] += _mm_popcnt_u64(b);
        }
    }
    for (int k = 0; k < CODE_STREAMS; k++) streams->at[k] = at[k];
}

#else

int wide_supported(void) { return 0; }

void wide_split(const float value[UNIT], const float step[GROUPS], const float start[GROUPS],
                layout_t layout, const uint32_t limits[3], int n_groups, streams_t *streams,
                const uint8_t code[UNIT]) {
    (void)value, (void)step, (void)start, (void)layout, (void)limits, (void)n_groups;
    (void)streams, (void)code;
}

void wide_join(const float value[UNIT], const float step[GROUPS], const float start[GROUPS],
               layout_t layout, const uint32_t limits[3], int n_groups, streams_t *streams,
               uint8_t code[UNIT]) {
    (void)value, (void)step, (void)start, (void)layout, (void)limits, (void)n_groups;
    (void)streams, (void)code;
}

#endif
