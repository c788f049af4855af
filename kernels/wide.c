/* Predictions, and dealing out residuals, with AVX-512: the same results as predict_plain in
 * nested.c and deal_plain, which run elsewhere. A compressing move does it for a whole group. */
#include "wide.h"

#ifdef WIDE

int wide_supported(void) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("bmi2") &&
           __builtin_cpu_supports("popcnt");
}

WIDE void wide_predict(int n, const float *exact, layout_t layout, uint8_t *predicted,
                       uint8_t *marks) {
    const __m512 low = _mm512_set1_ps((float)layout.low), quarter = _mm512_set1_ps(0.25f);
    const __m512 high = _mm512_set1_ps((float)(layout.low + (1 << layout.bits) - 1));
    const __m512 round = _mm512_set1_ps(12582912.0f);
    for (int i = 0; i < n; i += 16) {
        const __m512 above = _mm512_max_ps(_mm512_loadu_ps(exact + i), low);
        const __m512 within = _mm512_min_ps(above, high);
        const __m512 sum = _mm512_add_ps(within, round);
        const __m512 fraction = _mm512_sub_ps(within, _mm512_sub_ps(sum, round));
        const __mmask16 negate = _mm512_cmp_ps_mask(fraction, _mm512_setzero_ps(), _CMP_LT_OQ);
        const __mmask16 far = _mm512_cmp_ps_mask(_mm512_abs_ps(fraction), quarter, _CMP_GE_OQ);
        const __m128i negated = _mm_maskz_set1_epi8(negate, (char)MARK_NEGATED);
        _mm_storeu_si128((__m128i *)(predicted + i),
                         _mm512_cvtepi32_epi8(_mm512_castps_si512(sum)));
        _mm_storeu_si128((__m128i *)(marks + i),
                         _mm_or_si128(negated, _mm_maskz_set1_epi8(far, MARK_FAR)));
    }
}

WIDE_INLINE __mmask16 far_of(const uint8_t marks[GROUP]) {
    const __m128i far = _mm_set1_epi8(MARK_FAR);
    return _mm_test_epi8_mask(_mm_loadu_si128((const __m128i *)marks), far);
}

WIDE void wide_deal(streams_t *to, int n, const uint8_t class[GROUPS], const uint8_t marks[UNIT],
                    const uint8_t residual[UNIT]) {
    counts_t done = {0, 0};
    for (int g = 0; g < n; g++) {
        const int c = class[g];
        const __mmask16 far = far_of(marks + g * GROUP);
        const __m128i group = _mm_loadu_si128((const __m128i *)(residual + g * GROUP));
        /* too many, written over next time */
        _mm_storeu_si128((__m128i *)near_at(to, done, c),
                         _mm_maskz_compress_epi8(_knot_mask16(far), group));
        _mm_storeu_si128((__m128i *)far_at(to, done, c), _mm_maskz_compress_epi8(far, group));
        done = counted(done, c, (uint64_t)_mm_popcnt_u32(far));
    }
    advance(to, done);
}

#else

int wide_supported(void) { return 0; }

void wide_predict(int n, const float *exact, layout_t layout, uint8_t *predicted,
                  uint8_t *marks) {
    (void)n, (void)exact, (void)layout, (void)predicted, (void)marks;
}

void wide_deal(streams_t *to, int n, const uint8_t class[GROUPS], const uint8_t marks[UNIT],
               const uint8_t residual[UNIT]) {
    (void)to, (void)n, (void)class, (void)marks, (void)residual;
}

#endif
