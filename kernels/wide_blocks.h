/* Whole units of 256 weights between blocks and AVX-512's registers: the same results as blocks.c
 * and units.h. */
#ifndef EDGEKIT_WIDE_BLOCKS_H
#define EDGEKIT_WIDE_BLOCKS_H

#include "wide.h"

/* Weights in four vectors of 64, each of four groups. */
enum { QUARTERS = 4, QUARTER = UNIT / QUARTERS };
#define UNROLL _Pragma("GCC unroll 4")

WIDE_INLINE __m512i joined(const __m128i quarter[4]) {
    const __m256i low = _mm256_inserti128_si256(_mm256_castsi128_si256(quarter[0]), quarter[1], 1);
    const __m256i high = _mm256_inserti128_si256(_mm256_castsi128_si256(quarter[2]), quarter[3], 1);
    return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}

WIDE_INLINE __m512 levels_as_floats(__m128i level) {
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(level));
}

/* read_parent_scales for a whole unit. */
WIDE_INLINE void read_scales(int type, const uint8_t *p, __m512 *scale, __m512 *offset) {
    const __m512 minus = _mm512_set1_ps(-0.0f);
    *offset = _mm512_setzero_ps();
    switch (type) {
    case T_F32: *scale = _mm512_set1_ps(1.0f); return;
    case T_Q2_K: {
        const __m128i both = _mm_loadu_si128((const __m128i *)p), nibble = _mm_set1_epi8(15);
        const __m128i high = _mm_and_si128(_mm_srli_epi16(both, 4), nibble);
        const __m512 d = _mm512_set1_ps(half_at(p + 80)), m = _mm512_set1_ps(half_at(p + 82));
        *scale = _mm512_mul_ps(d, levels_as_floats(_mm_and_si128(both, nibble)));
        *offset = _mm512_xor_ps(_mm512_mul_ps(m, levels_as_floats(high)), minus);
        return;
    }
    case T_Q3_K: {
        uint32_t four[4];
        levels_of_q3(p + 96, four);
        const __m128i level = _mm_setr_epi32((int)four[0], (int)four[1], (int)four[2], (int)four[3]);
        const __m512 plain = _mm512_sub_ps(levels_as_floats(level), _mm512_set1_ps(32.0f));
        *scale = _mm512_mul_ps(_mm512_set1_ps(half_at(p + 108)), plain);
        return;
    }
    case T_Q4_K: case T_Q5_K: {
        uint32_t four[4];
        levels_of_q4(p + 4, four);
        const __m128i level = _mm_setr_epi32((int)four[0], (int)four[1], (int)four[2], (int)four[3]);
        const __m512 d = _mm512_set1_ps(half_at(p)), m = _mm512_set1_ps(half_at(p + 2));
        const __m512 of_offset = levels_as_floats(_mm_unpackhi_epi8(level, level));
        *scale = _mm512_mul_ps(d, levels_as_floats(_mm_unpacklo_epi8(level, level)));
        *offset = _mm512_xor_ps(_mm512_mul_ps(m, of_offset), minus);
        return;
    }
    case T_Q6_K: {
        const __m128i level = _mm_loadu_si128((const __m128i *)(p + 192));
        const __m512 plain = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(level));
        *scale = _mm512_mul_ps(_mm512_set1_ps(half_at(p + 208)), plain);
        return;
    }
    default: {
        float scales[GROUPS], offsets[GROUPS];
        blocks_read_scales(type, UNIT, p, scales, offsets);
        *scale = _mm512_loadu_ps(scales);
        *offset = _mm512_loadu_ps(offsets);
    }
    }
}

/* Scale bytes of n <= 16 units from planes `apart` bytes apart, at most 16 of them, to the units'
 * blocks: bytes turned about in squares of four, then words. */
WIDE_INLINE void write_planes(const uint8_t *plane, size_t apart, int n_planes, int n,
                              uint8_t *to, size_t unit) {
    const __m512i turned = _mm512_setr_epi32(
        0x30201000, 0x31211101, 0x32221202, 0x33231303, 0x34241404, 0x35251505, 0x36261606,
        0x37271707, 0x38281808, 0x39291909, 0x3a2a1a0a, 0x3b2b1b0b, 0x3c2c1c0c, 0x3d2d1d0d,
        0x3e2e1e0e, 0x3f2f1f0f);
    const __mmask16 here = (__mmask16)((1u << n) - 1), kept = (__mmask16)((1u << n_planes) - 1);
    __m512i word[4];
    UNROLL for (int k = 0; k < 4; k++) {
        __m128i row[4];
        UNROLL for (int j = 0; j < 4; j++) {
            const __mmask16 loaded = 4 * k + j < n_planes ? here : 0;
            row[j] = _mm_maskz_loadu_epi8(loaded, plane + (size_t)(4 * k + j) * apart);
        }
        word[k] = _mm512_permutexvar_epi8(turned, joined(row));
    }
    const __m512i a = _mm512_unpacklo_epi32(word[0], word[1]);
    const __m512i b = _mm512_unpackhi_epi32(word[0], word[1]);
    const __m512i c = _mm512_unpacklo_epi32(word[2], word[3]);
    const __m512i d = _mm512_unpackhi_epi32(word[2], word[3]);
    const __m512i of_unit[4] = {_mm512_unpacklo_epi64(a, c), _mm512_unpackhi_epi64(a, c),
                                _mm512_unpacklo_epi64(b, d), _mm512_unpackhi_epi64(b, d)};
    uint8_t room[4][64];
    UNROLL for (int k = 0; k < 4; k++) _mm512_storeu_si512(room[k], of_unit[k]);
    for (int u = 0; u < n; u++, to += unit) {
        const __m128i bytes = _mm_loadu_si128((const __m128i *)(room[u % 4] + u / 4 * 16));
        _mm_mask_storeu_epi8(to, kept, bytes);
    }
}

/* write_rest for at most WIDE_TILE blocks of 256 weights. */
WIDE_INLINE void write_rest_of_units(layout_t layout, int n, size_t n_blocks, uint8_t *child,
                                     const uint8_t *rest) {
    for (int r = 0; r < 2; r++)
        for (int k = 0; k < layout.n_scale[r]; k += 16) {
            const int n_left = layout.n_scale[r] - k, n_planes = n_left < 16 ? n_left : 16;
            write_planes(rest, n_blocks, n_planes, n, child + layout.scale_at[r] + k,
                         (size_t)layout.block_bytes);
            rest += (size_t)n_planes * n_blocks;
        }
}

/* 32 bytes twice, the first ones shifted right by `first`, the others by `second`. */
WIDE_INLINE __m512i shifted_twice(const uint8_t *p, int first, int second) {
    const __m512i twice = _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *)p));
    const __m512i by = _mm512_inserti64x4(_mm512_set1_epi16((short)first),
                                          _mm256_set1_epi16((short)second), 1);
    return _mm512_srlv_epi16(twice, by);
}

WIDE_INLINE __m512i and_bits(__m512i v, int bits) {
    return _mm512_and_si512(v, _mm512_set1_epi8((char)bits));
}

/* The codes of quarter q in planes of one, two and four bits. */
WIDE_INLINE __m512i one_bit(const uint8_t *p, int q) {
    return and_bits(shifted_twice(p, 2 * q, 2 * q + 1), 1);
}

WIDE_INLINE __m512i two_bits(const uint8_t *p, int q) {
    return and_bits(shifted_twice(p + q / 2 * 32, q % 2 * 4, q % 2 * 4 + 2), 3);
}

WIDE_INLINE __m512i four_bits(const uint8_t *p, int q) {
    return and_bits(shifted_twice(p + q * 32, 0, 4), 15);
}

WIDE_INLINE __m512i four_bits_of_64(const uint8_t *p, int q) {
    return and_bits(_mm512_srli_epi16(_mm512_loadu_si512(p + q / 2 * 64), q % 2 * 4), 15);
}

WIDE_INLINE __m512i or_above(__m512i low, __m512i high, unsigned bits) {
    return _mm512_or_si512(low, _mm512_slli_epi16(high, bits));
}

/* blocks_read_codes for a whole unit. */
WIDE_INLINE void read_codes(int type, const uint8_t *p, __m512i code[QUARTERS]) {
    uint8_t room[UNIT];
    switch (type) {
    case T_Q2_K:
        UNROLL for (int q = 0; q < QUARTERS; q++) code[q] = two_bits(p + 16, q);
        return;
    case T_Q3_K:
        UNROLL for (int q = 0; q < QUARTERS; q++) code[q] = or_above(two_bits(p + 32, q), one_bit(p, q), 2);
        return;
    case T_Q4_K:
        UNROLL for (int q = 0; q < QUARTERS; q++) code[q] = four_bits(p + 16, q);
        return;
    case T_Q5_K:
        UNROLL for (int q = 0; q < QUARTERS; q++)
            code[q] = or_above(four_bits(p + 48, q), one_bit(p + 16, q), 4);
        return;
    case T_Q6_K:
        UNROLL for (int q = 0; q < QUARTERS; q++)
            code[q] = or_above(four_bits_of_64(p, q), two_bits(p + 128, q), 4);
        return;
    default:
        blocks_read_codes(type, UNIT, p, room);
        UNROLL for (int q = 0; q < QUARTERS; q++) code[q] = _mm512_loadu_si512(room + q * QUARTER);
    }
}

/* The upper half of v shifted left by bits, and the lower one. */
WIDE_INLINE __m256i fold(__m512i v, unsigned bits) {
    const __m256i high = _mm256_slli_epi16(_mm512_extracti64x4_epi64(v, 1), bits);
    return _mm256_or_si256(_mm512_castsi512_si256(v), high);
}

WIDE_INLINE void write_one_bit(uint8_t *p, const __m512i code[QUARTERS], unsigned bit) {
    __m512i all = _mm512_setzero_si512();
    UNROLL for (unsigned q = 0; q < QUARTERS; q++) {
        const __m512i plane = and_bits(_mm512_srli_epi16(code[q], bit), 1);
        all = or_above(all, plane, 2 * q);
    }
    _mm256_storeu_si256((__m256i *)p, fold(all, 1));
}

WIDE_INLINE void write_two_bits(uint8_t *p, const __m512i code[QUARTERS], unsigned bit) {
    UNROLL for (int h = 0; h < 2; h++) {
        const __m512i first = and_bits(_mm512_srli_epi16(code[2 * h], bit), 3);
        const __m512i second = and_bits(_mm512_srli_epi16(code[2 * h + 1], bit), 3);
        _mm256_storeu_si256((__m256i *)(p + 32 * h), fold(or_above(first, second, 4), 2));
    }
}

WIDE_INLINE void write_four_bits(uint8_t *p, const __m512i code[QUARTERS]) {
    UNROLL for (int q = 0; q < QUARTERS; q++)
        _mm256_storeu_si256((__m256i *)(p + 32 * q), fold(and_bits(code[q], 15), 4));
}

WIDE_INLINE void write_four_bits_of_64(uint8_t *p, const __m512i code[QUARTERS]) {
    UNROLL for (int h = 0; h < 2; h++) {
        const __m512i second = and_bits(code[2 * h + 1], 15);
        _mm512_storeu_si512(p + 64 * h, or_above(and_bits(code[2 * h], 15), second, 4));
    }
}

/* blocks_write_codes for a whole unit. */
WIDE_INLINE void write_codes(int type, uint8_t *p, const __m512i code[QUARTERS]) {
    uint8_t room[UNIT];
    switch (type) {
    case T_Q3_K:
        write_two_bits(p + 32, code, 0);
        write_one_bit(p, code, 2);
        return;
    case T_Q4_K: write_four_bits(p + 16, code); return;
    case T_Q5_K:
        write_four_bits(p + 48, code);
        write_one_bit(p + 16, code, 4);
        return;
    case T_Q6_K:
        write_four_bits_of_64(p, code);
        write_two_bits(p + 128, code, 4);
        return;
    default:
        UNROLL for (int q = 0; q < QUARTERS; q++) _mm512_storeu_si512(room + q * QUARTER, code[q]);
        blocks_write_codes(type, UNIT, p, room);
    }
}

/* read_values for a whole unit. */
WIDE_INLINE void values_of(int type, const uint8_t *p, float value[UNIT]) {
    const layout_t layout = layout_of(type);
    __m512i code[QUARTERS];
    uint8_t plain[UNIT];
    if (type == T_F32) {
        read_values(type, UNIT, p, value);
        return;
    }
    read_codes(type, p, code);
    UNROLL for (int q = 0; q < QUARTERS; q++) {
        const __m512i stored = _mm512_xor_si512(code[q], _mm512_set1_epi8((char)layout.flip));
        _mm512_storeu_si512(plain + q * QUARTER,
                            _mm512_add_epi8(stored, _mm512_set1_epi8((char)layout.low)));
    }
    for (int i = 0; i < UNIT; i += GROUP) {
        const __m128i bytes = _mm_loadu_si128((const __m128i *)(plain + i));
        _mm512_storeu_ps(value + i, _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes)));
    }
}

#endif
