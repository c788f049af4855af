/* Units of BF16 with AVX-512: the same results as unit_predict_float in nested_float.c, which runs
 * elsewhere. There the dealing out of residuals, weight by weight, costs most of the time.
 *
 * Weights are computed 32 at a time, those in even places in one vector and those in odd places in
 * another: the upper halves of both are then 32 words in order, without a move across lanes. All
 * the rest is done on words, or on bytes for 64 weights. */
#include "wide.h"

#ifdef WIDE

/* What 256 weights have of their parent: codes with scale and offset of each group, or weights; and
 * of each group's step the biased exponent, plus 7, in two words. */
enum { WORDS = 0x10001 };
typedef struct {
    const uint8_t *code; /* 32 of them, and the next 32 after `stride` bytes */
    int stride, is_weights;
    uint8_t room[UNIT];
    float value[UNIT];
    __m512 scale, offset;
    __m512i low, flip, top;
} unit_t;

/* Of 64 weights: the parent rounded, in the order of the floats; the stream of each residual; and
 * which of them are negated. */
typedef struct {
    __m512i predicted[2], stream;
    __mmask32 negate[2];
} marks_t;

/* A step that is not known is about a quarter of its group's largest weight. */
WIDE_INLINE __m512i tops_of_weights(const float value[UNIT]) {
    int32_t top[GROUPS];
    for (int g = 0; g < GROUPS; g++) {
        const __m512i bits = _mm512_loadu_si512(value + g * GROUP);
        const __m512i exponent = _mm512_and_si512(bits, _mm512_set1_epi32(EXPONENT));
        top[g] = ((_mm512_reduce_max_epi32(exponent) >> 23) - 2 + 7) * WORDS;
    }
    return _mm512_loadu_si512(top);
}

/* Eight blocks of Q8_0, the usual parent, where they lie; of any other the codes are copied. */
WIDE_INLINE void read_codes(int type, int m, const uint8_t *parent, unit_t *unit) {
    const int stride = layout_of(T_Q8_0).block_bytes;
    if (type == T_Q8_0 && m == UNIT) {
        const __m512i block = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
        const __m512i at = _mm512_mullo_epi32(block, _mm512_set1_epi32(stride));
        const __m512i halves = _mm512_i32gather_epi32(at, parent, 1);
        unit->code = parent + 2;
        unit->stride = stride;
        unit->scale = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(halves));
        unit->offset = _mm512_setzero_ps();
        return;
    }
    float scale[GROUPS], offset[GROUPS];
    blocks_read_codes(type, m, parent, unit->room);
    blocks_read_scales(type, m, parent, scale, offset);
    unit->code = unit->room;
    unit->stride = 32;
    unit->scale = _mm512_loadu_ps(scale);
    unit->offset = _mm512_loadu_ps(offset);
}

WIDE_INLINE void read_unit(int type, int m, const uint8_t *parent, unit_t *unit) {
    const __m512i exponent = _mm512_set1_epi32(EXPONENT);
    const layout_t layout = layout_of(type);
    unit->is_weights = type == T_F32;
    if (unit->is_weights) {
        read_values(type, m, parent, unit->value);
        unit->top = tops_of_weights(unit->value);
        return;
    }
    read_codes(type, m, parent, unit);
    const __m512i of_scale = _mm512_and_si512(_mm512_castps_si512(unit->scale), exponent);
    const __m512i of_offset = _mm512_and_si512(_mm512_castps_si512(unit->offset), exponent);
    /* Codes times scales overflow nothing: weights are finite unless scale or offset is not. */
    const __mmask16 usable = _mm512_cmpneq_epi32_mask(of_scale, exponent) &
                             _mm512_cmpneq_epi32_mask(of_offset, exponent);
    const __m512i top = _mm512_add_epi32(_mm512_srli_epi32(of_scale, 23), _mm512_set1_epi32(7));
    unit->scale = _mm512_maskz_mov_ps(usable, unit->scale);
    unit->offset = _mm512_maskz_mov_ps(usable, unit->offset);
    unit->top = _mm512_mullo_epi32(top, _mm512_set1_epi32(WORDS));
    unit->low = _mm512_set1_epi8((char)layout.low);
    unit->flip = _mm512_set1_epi8((char)layout.flip);
}

/* Weights 32 * e and on; groups: of each even place and the odd one after it. */
WIDE_INLINE void weights_of(const unit_t *unit, int e, __m512i groups, __m512 *even, __m512 *odd) {
    if (unit->is_weights) {
        const __m512i places = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26,
                                                 28, 30);
        const __m512 a = _mm512_loadu_ps(unit->value + 32 * e);
        const __m512 b = _mm512_loadu_ps(unit->value + 32 * e + 16);
        *even = _mm512_permutex2var_ps(a, places, b);
        *odd = _mm512_permutex2var_ps(a, _mm512_add_epi32(places, _mm512_set1_epi32(1)), b);
        return;
    }
    const __m256i raw = _mm256_loadu_si256((const __m256i *)(unit->code + e * unit->stride));
    const __m256i code = _mm256_add_epi8(_mm256_xor_si256(raw, _mm512_castsi512_si256(unit->flip)),
                                         _mm512_castsi512_si256(unit->low));
    const __m512i words = _mm512_cvtepi8_epi16(code);
    const __m512i first = _mm512_srai_epi32(_mm512_slli_epi32(words, 16), 16);
    const __m512i second = _mm512_srai_epi32(words, 16);
    const __m512 scale = _mm512_permutexvar_ps(groups, unit->scale);
    const __m512 offset = _mm512_permutexvar_ps(groups, unit->offset);
    *even = _mm512_add_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(first), scale), offset);
    *odd = _mm512_add_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(second), scale), offset);
}

WIDE_INLINE __m512i ordered(__m512i bits) {
    const __m512i sign = _mm512_srai_epi16(bits, 15);
    return _mm512_xor_si512(bits, _mm512_and_si512(sign, _mm512_set1_epi16(0x7fff)));
}

/* Predict weights 32 * e and on: into predicted; returns what is negated. octave: of each word. */
WIDE_INLINE __mmask32 predict32(const unit_t *unit, int e, __m512i *predicted, __m512i *octave) {
    const __m512i halves = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
    const __m512i groups = _mm512_add_epi32(halves, _mm512_set1_epi32(2 * e));
    const __m512i top = _mm512_permutexvar_epi32(groups, unit->top);
    __m512 even, odd;
    weights_of(unit, e, groups, &even, &odd);
    const __m512i a = _mm512_castps_si512(even), b = _mm512_castps_si512(odd);
    const __m512i high = _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(a, 16), b);
    const __m512i low = _mm512_mask_blend_epi16(0xaaaaaaaa, a, _mm512_slli_epi32(b, 16));
    const __m512i exponent =
        _mm512_and_si512(_mm512_srli_epi16(high, 7), _mm512_set1_epi16(0xff));
    *octave = _mm512_sub_epi16(top, exponent);
    *predicted = ordered(_mm512_add_epi16(high, _mm512_srli_epi16(low, 15)));
    return _mm512_movepi16_mask(_mm512_xor_si512(high, low)); /* rounded up, or below zero */
}

/* Predict weights 64 * q and on, of m in the unit. */
WIDE_INLINE void predict64(const unit_t *unit, int q, int m, marks_t *marks) {
    const __m512i order = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7); /* undoes packus's */
    __m512i octave[2];
    for (int h = 0; h < 2; h++)
        marks->negate[h] = predict32(unit, 2 * q + h, marks->predicted + h, octave + h);
    const __m512i stream = _mm512_min_epu8(_mm512_packus_epi16(octave[0], octave[1]),
                                           _mm512_set1_epi8(FLOAT_STREAMS - 1));
    const int left = m - 64 * q;
    const uint64_t here = left >= 64 ? ~(uint64_t)0 : left > 0 ? ((uint64_t)1 << left) - 1 : 0;
    marks->stream = _mm512_mask_permutexvar_epi64(stream, 0xff, order, stream);
    marks->stream = _mm512_mask_mov_epi8(_mm512_set1_epi8(-1), here, marks->stream);
}

/* The residuals of 64 weights, as words: of each stream as many as there are weights of it. Those
 * of the first n_narrow streams are bytes. */
WIDE_INLINE void collect(streams_t *streams, int n_narrow, __m512i stream, __m512i residual[2]) {
    __m512i bytes = _mm512_setzero_si512();
    for (int k = 0; k < n_narrow; k++) {
        const uint64_t here = _mm512_cmpeq_epi8_mask(stream, _mm512_set1_epi8((char)k));
        const __m512i next = _mm512_loadu_si512(streams->at[k]);
        bytes = _mm512_or_si512(bytes, _mm512_maskz_expand_epi8(here, next));
        streams->at[k] += _mm_popcnt_u64(here);
    }
    residual[0] = _mm512_cvtepi8_epi16(_mm512_castsi512_si256(bytes));
    residual[1] = _mm512_cvtepi8_epi16(_mm512_extracti64x4_epi64(bytes, 1));
    for (int k = n_narrow; k < FLOAT_STREAMS; k++) {
        const uint64_t here = _mm512_cmpeq_epi8_mask(stream, _mm512_set1_epi8((char)k));
        for (int h = 0; h < 2; h++) {
            const __mmask32 half = (__mmask32)(here >> (32 * h));
            const __m512i next = _mm512_loadu_si512(streams->at[k]);
            residual[h] = _mm512_or_si512(residual[h], _mm512_maskz_expand_epi16(half, next));
            streams->at[k] += 2 * _mm_popcnt_u32(half);
        }
    }
}

/* All predictions come first: the expanding moves that follow do not wait for them then. */
WIDE_INLINE void join(const unit_t *unit, int m, streams_t *streams, int n_narrow, uint8_t *to) {
    marks_t marks[4];
    for (int q = 0; q < 4; q++) predict64(unit, q, m, &marks[q]);
    for (int q = 0; q < 4; q++) {
        __m512i residual[2];
        collect(streams, n_narrow, marks[q].stream, residual);
        for (int h = 0; h < 2; h++) {
            const __m512i flipped = _mm512_mask_sub_epi16(residual[h], marks[q].negate[h],
                                                          _mm512_setzero_si512(), residual[h]);
            const __m512i sum = _mm512_add_epi16(flipped, marks[q].predicted[h]);
            _mm512_storeu_si512(to + 128 * q + 64 * h, ordered(sum));
        }
    }
}

WIDE void wide_join_bf16(int parent_type, int m, const uint8_t *parent, streams_t *streams,
                         uint8_t *child) {
    uint8_t room[2 * UNIT], *to = m == UNIT ? child : room;
    unit_t unit;
    read_unit(parent_type, m, parent, &unit);
    if (streams->n_narrow == WIDE_NARROW) join(&unit, m, streams, WIDE_NARROW, to);
    else join(&unit, m, streams, 0, to);
    if (to == room) memcpy(child, room, (size_t)m * 2);
}

/* The reverse of collect, for residuals of 2 bytes: 32 of them. */
WIDE_INLINE void deal(streams_t *streams, __mmask32 of[FLOAT_STREAMS], __m512i residual) {
    for (int k = 0; k < FLOAT_STREAMS; k++) {
        _mm512_storeu_si512(streams->at[k], _mm512_maskz_compress_epi16(of[k], residual));
        streams->at[k] += 2 * _mm_popcnt_u32(of[k]);
    }
}

WIDE void wide_split_bf16(int parent_type, int m, const uint8_t *parent, streams_t *streams,
                          const uint8_t *child) {
    const __m512i zero = _mm512_setzero_si512();
    uint8_t bits[2 * UNIT] = {0};
    unit_t unit;
    read_unit(parent_type, m, parent, &unit);
    memcpy(bits, child, (size_t)m * 2);
    for (int q = 0; q < 4; q++) {
        marks_t marks;
        predict64(&unit, q, m, &marks);
        for (int h = 0; h < 2; h++) {
            const __m512i plain = ordered(_mm512_loadu_si512(bits + 128 * q + 64 * h));
            const __m512i residual = _mm512_sub_epi16(plain, marks.predicted[h]);
            __mmask32 of[FLOAT_STREAMS];
            for (int k = 0; k < FLOAT_STREAMS; k++)
                of[k] = (__mmask32)(_mm512_cmpeq_epi8_mask(marks.stream,
                                                           _mm512_set1_epi8((char)k)) >> (32 * h));
            deal(streams, of, _mm512_mask_sub_epi16(residual, marks.negate[h], zero, residual));
        }
    }
}

#else

void wide_split_bf16(int parent_type, int m, const uint8_t *parent, streams_t *streams,
                     const uint8_t *child) {
    (void)parent_type, (void)m, (void)parent, (void)streams, (void)child;
}

void wide_join_bf16(int parent_type, int m, const uint8_t *parent, streams_t *streams,
                    uint8_t *child) {
    (void)parent_type, (void)m, (void)parent, (void)streams, (void)child;
}

#endif
