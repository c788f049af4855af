/* Nested symmetric codes chosen jointly for 8, 4 and 2 bits: what slices_ref.py says, in C. */
#include "native.h"

enum { LANES = 16, MOST = 256, LOWEST = -128, ROUNDS = 2 };
static const float TINY_SUM = 1e-30f, MAGIC = 12582912.0f; /* 1.5 * 2^23: adding it rounds */
static const float SHARE_4 = 1.0f / 256.0f, SHARE_2 = 1.0f / 4096.0f;

INLINE float nearest_whole(float x) {
    const float bound = 4194304.0f; /* far outside of all codes */
    const float y = x > bound ? bound : x < -bound ? -bound : x;
    return (y + MAGIC) - MAGIC;
}

INLINE float at_most(float x, float low, float high) { return x < low ? low : x > high ? high : x; }
INLINE float four_of(float code) { return (float)(((int)code + 8) >> 4); }
INLINE float two_of(float code) { return (float)(((((int)code + 8) >> 4) + 2) >> 2); }

INLINE float summed(const float lane[LANES]) {
    float sum = lane[0];
    for (int l = 1; l < LANES; l++) sum = sum + lane[l];
    return sum;
}

/* Sums over a block of what depends on codes: at depth 8 the error, below what refitting needs. */
typedef struct {
    float error, energy, along4, length4, along2, length2;
} sums_t;

#define ZERO_LANES {0.0f}
INLINE sums_t sums_of(int n, const float *w, const float *h, const float *code, float scale) {
    float e[LANES] = ZERO_LANES, g[LANES] = ZERO_LANES;
    float a4[LANES] = ZERO_LANES, b4[LANES] = ZERO_LANES;
    float a2[LANES] = ZERO_LANES, b2[LANES] = ZERO_LANES;
    for (int i = 0; i < n; i += LANES)
        for (int l = 0; l < LANES; l++) {
            const float x = w[i + l], k = h[i + l], q = code[i + l], d = x - scale * q;
            const float four = four_of(q), two = two_of(q), k4 = k * four, k2 = k * two;
            e[l] = e[l] + k * (d * d);
            g[l] = g[l] + k * (x * x);
            a4[l] = a4[l] + k4 * x, b4[l] = b4[l] + k4 * four;
            a2[l] = a2[l] + k2 * x, b2[l] = b2[l] + k2 * two;
        }
    const sums_t s = {summed(e), summed(g), summed(a4), summed(b4), summed(a2), summed(b2)};
    return s;
}

INLINE float divisor(float length) { return length > TINY_SUM ? length : TINY_SUM; }
INLINE float inverse_of(float scale) { return scale == 0.0f ? 0.0f : 1.0f / scale; }

INLINE void nearest_codes(int n, const float *w, float scale, float high, float *code) {
    const float inverse = inverse_of(scale);
    for (int i = 0; i < n; i++)
        code[i] = at_most(nearest_whole(w[i] * inverse), (float)LOWEST, high);
}

INLINE float cost_of(int n, const float *w, const float *h, float scale, float high, int has_two,
                     float *code) {
    nearest_codes(n, w, scale, high, code);
    const sums_t s = sums_of(n, w, h, code, scale);
    float cost = s.error;
    cost = cost + SHARE_4 * (s.energy - s.along4 * s.along4 / divisor(s.length4));
    if (has_two) cost = cost + SHARE_2 * (s.energy - s.along2 * s.along2 / divisor(s.length2));
    return cost;
}

INLINE void joint_codes(int n, const float *w, const float scale[3], int high, int has_two,
                        float *code) {
    float exact[MOST], best[MOST];
    const float inverse = inverse_of(scale[0]);
    for (int i = 0; i < n; i++) {
        exact[i] = nearest_whole(w[i] * inverse);
        best[i] = FLT_MAX;
        code[i] = 0.0f;
    }
    for (int cell = LOWEST >> 4; cell <= (high + 8) >> 4; cell++) {
        const int below = 16 * cell - 8, above = 16 * cell + 7;
        const float low = (float)(below < LOWEST ? LOWEST : below);
        const float most = (float)(above > high ? high : above);
        const float w4 = scale[1] * (float)cell, w2 = scale[2] * (float)((cell + 2) >> 2);
        const float share2 = has_two ? SHARE_2 : 0.0f;
        for (int i = 0; i < n; i++) {
            const float q = at_most(exact[i], low, most);
            const float d8 = w[i] - scale[0] * q, d4 = w[i] - w4, d2 = w[i] - w2;
            float cost = d8 * d8 + SHARE_4 * (d4 * d4);
            cost = cost + share2 * (d2 * d2);
            const int closer = cost < best[i];
            best[i] = closer ? cost : best[i];
            code[i] = closer ? q : code[i];
        }
    }
}

/* codes: the chosen master codes. scales: in and out, [3][n_blocks]; the lower ones unrounded. */
FAST static void encode_blocks(size_t n_blocks, int n, int low_bits, size_t n_tries,
                               const float *weights, const float *importance, const float *tries,
                               int8_t *codes, float *scales) {
    const int has_two = low_bits == 2, high = has_two ? 87 : 119;
    for (size_t b = 0; b < n_blocks; b++) {
        const float *w = weights + b * (size_t)n, *h = importance + b * (size_t)n;
        float code[MOST], least = FLT_MAX, scale[3] = {tries[b], 0.0f, 0.0f};
        for (size_t t = 0; t < n_tries; t++) {
            const float s = tries[t * n_blocks + b];
            const float cost = cost_of(n, w, h, s, (float)high, has_two, code);
            if (cost < least) least = cost, scale[0] = s;
        }
        nearest_codes(n, w, scale[0], (float)high, code);
        for (int round = 0; round <= ROUNDS; round++) {
            const sums_t s = sums_of(n, w, h, code, scale[0]);
            scale[1] = s.along4 / divisor(s.length4);
            scale[2] = s.along2 / divisor(s.length2);
            if (round < ROUNDS) joint_codes(n, w, scale, high, has_two, code);
        }
        for (int i = 0; i < n; i++) codes[b * (size_t)n + (size_t)i] = (int8_t)code[i];
        for (size_t d = 0; d < 3; d++) scales[d * n_blocks + b] = scale[d];
    }
}

EXPORT int slices_encode(size_t n_blocks, int n, int low_bits, size_t n_tries,
                         const float *weights, const float *importance, const float *tries,
                         int8_t *codes, float *scales) {
    if (n <= 0 || n > MOST || n % LANES || (low_bits != 2 && low_bits != 4)) return 1;
    encode_blocks(n_blocks, n, low_bits, n_tries, weights, importance, tries, codes, scales);
    return 0;
}
