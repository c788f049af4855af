/* Residuals in 2, 4, 8 or 16 bits each: what packing_ref.py says, in C, for int8 and for int16. */
#include "units.h"

enum { FARTHEST = 0xffff, PATCHED_SHARE = 512, SPAN = 4096 };

INLINE int low_of(int width) { return width == 2 ? -1 : -(1 << (width - 1)); }

size_t packed_bytes(size_t count, int width) { return (count * (size_t)width + 7) / 8; }

/* T: a residual, U: the same without sign. A residual lies outside a window where its distance
 * from the window's low end, modulo the size of U, has a bit above the width. */
#define PACKING(T, U)                                                                              \
    FAST static void outside_##T(const T *residual, size_t n, size_t outside[3]) {                 \
        outside[0] = outside[1] = outside[2] = 0;                                                  \
        for (size_t first = 0, end; first < n; first = end) {                                      \
            end = n - first < SPAN ? n : first + SPAN; /* narrow counts keep the loop narrow */    \
            uint16_t two = 0, four = 0, eight = 0;                                                 \
            for (size_t i = first; i < end; i++) {                                                 \
                two = (uint16_t)(two + ((U)(residual[i] + 1) > 3));                                \
                four = (uint16_t)(four + ((U)(residual[i] + 8) > 15));                             \
                eight = (uint16_t)(eight + ((U)(residual[i] + 128) > 255));                        \
            }                                                                                      \
            outside[0] += two;                                                                     \
            outside[1] += four;                                                                    \
            outside[2] += eight;                                                                   \
        }                                                                                          \
    }                                                                                              \
    /* residual: with zeros behind its end, for the digits that fill the last byte */              \
    INLINE void digits_##T(const T *residual, size_t n, int width, uint8_t *digits) {              \
        const int per_byte = 8 / width, low = low_of(width);                                       \
        const size_t m = packed_bytes(n, width);                                                   \
        for (size_t j = 0; j < m; j++) {                                                           \
            uint8_t byte = 0;                                                                      \
            for (int s = 0; s < per_byte; s++) {                                                   \
                const U above = (U)(residual[(size_t)s * m + j] - low);                            \
                const U digit = above > (1 << width) - 1 ? (U)-low : above;                        \
                byte = (uint8_t)(byte | (uint8_t)(digit << (s * width)));                          \
            }                                                                                      \
            digits[j] = byte;                                                                      \
        }                                                                                          \
    }                                                                                              \
    INLINE size_t patches_##T(const T *residual, size_t n, int width, uint16_t *gaps,              \
                              int16_t *values) {                                                   \
        const U low = (U)low_of(width), most = (U)((1 << width) - 1);                              \
        size_t found = 0, next = 0; /* next: the first position after the last patch */            \
        for (size_t first = 0; first < n; first += 64) {                                           \
            const size_t end = n - first < 64 ? n : first + 64;                                    \
            U any = 0;                                                                             \
            for (size_t i = first; i < end; i++)                                                   \
                any = (U)(any | ((U)(residual[i] - low) > most));                                  \
            if (!any) continue;                                                                    \
            for (size_t i = first; i < end; i++) {                                                 \
                if ((U)(residual[i] - low) <= most) continue;                                      \
                for (; i - next > FARTHEST; next += FARTHEST + 1)                                  \
                    gaps[found] = FARTHEST, values[found++] = residual[next + FARTHEST];           \
                gaps[found] = (uint16_t)(i - next);                                                \
                values[found++] = residual[i];                                                     \
                next = i + 1;                                                                      \
            }                                                                                      \
        }                                                                                          \
        return found;                                                                              \
    }                                                                                              \
    INLINE void from_digits_##T(const uint8_t *digits, size_t n, int width, T *residual) {         \
        const int per_byte = 8 / width, low = low_of(width);                                       \
        const uint8_t mask = (uint8_t)((1 << width) - 1);                                          \
        const size_t m = packed_bytes(n, width);                                                   \
        for (int s = 0; s < per_byte; s++)                                                         \
            for (size_t j = 0; j < m; j++)                                                         \
                residual[(size_t)s * m + j] =                                                      \
                    (T)((uint8_t)((uint8_t)(digits[j] >> (s * width)) & mask) + low);              \
    }                                                                                              \
    /* Returns 0, or 1 where a patch lies outside the stream. */                                   \
    INLINE int patch_##T(size_t n, const uint16_t *gaps, const int16_t *values, size_t n_patches,  \
                         T *residual) {                                                            \
        for (size_t k = 0, next = 0; k < n_patches; k++) {                                         \
            if (gaps[k] >= n - next) return 1;                                                     \
            residual[next + gaps[k]] = (T)values[k];                                               \
            next += (size_t)gaps[k] + 1;                                                           \
        }                                                                                          \
        return 0;                                                                                  \
    }
PACKING(int8_t, uint8_t)
PACKING(int16_t, uint16_t)

INLINE int width_of(size_t n, const size_t outside[3]) {
    for (int k = 0; k < 3; k++)
        if (PATCHED_SHARE * outside[k] <= n) return 2 << k;
    return 16;
}

/* The narrowest width that suits, and the stream packed at it. residual: with room for a few more;
 * digits: for as many bytes as the residuals have; gaps, values: for n / 512 + n / 65536 + 1. */
FAST void pack8(int8_t *residual, size_t n, int *width, uint8_t *digits, uint16_t *gaps,
                int16_t *values, size_t *n_patches) {
    size_t outside[3];
    outside_int8_t(residual, n, outside);
    outside[2] = 0;
    *width = width_of(n, outside);
    *n_patches = 0;
    memset(residual + n, 0, 4);
    switch (*width) {
    case 2:
        digits_int8_t(residual, n, 2, digits);
        if (outside[0]) *n_patches = patches_int8_t(residual, n, 2, gaps, values);
        break;
    case 4:
        digits_int8_t(residual, n, 4, digits);
        if (outside[1]) *n_patches = patches_int8_t(residual, n, 4, gaps, values);
        break;
    default: digits_int8_t(residual, n, 8, digits);
    }
}

FAST void pack16(int16_t *residual, size_t n, int *width, uint8_t *digits, uint16_t *gaps,
                 int16_t *values, size_t *n_patches) {
    size_t outside[3];
    outside_int16_t(residual, n, outside);
    *width = width_of(n, outside);
    *n_patches = 0;
    memset(residual + n, 0, 4 * sizeof *residual);
    switch (*width) {
    case 2:
        digits_int16_t(residual, n, 2, digits);
        if (outside[0]) *n_patches = patches_int16_t(residual, n, 2, gaps, values);
        break;
    case 4:
        digits_int16_t(residual, n, 4, digits);
        if (outside[1]) *n_patches = patches_int16_t(residual, n, 4, gaps, values);
        break;
    case 8:
        digits_int16_t(residual, n, 8, digits);
        if (outside[2]) *n_patches = patches_int16_t(residual, n, 8, gaps, values);
        break;
    default:
        for (size_t i = 0; i < n; i++) digits[i] = (uint8_t)residual[i];
        for (size_t i = 0; i < n; i++) digits[n + i] = (uint8_t)((uint16_t)residual[i] >> 8);
    }
}

/* digits: packed_bytes(n, width) bytes; residual: with room for a few more. Returns 0, or 1 where
 * a patch lies outside the stream. */
FAST int unpack8(const uint8_t *digits, size_t n, int width, const uint16_t *gaps,
                 const int16_t *values, size_t n_patches, int8_t *residual) {
    switch (width) {
    case 2: from_digits_int8_t(digits, n, 2, residual); break;
    case 4: from_digits_int8_t(digits, n, 4, residual); break;
    default: from_digits_int8_t(digits, n, 8, residual); break;
    }
    return patch_int8_t(n, gaps, values, n_patches, residual);
}

FAST int unpack16(const uint8_t *digits, size_t n, int width, const uint16_t *gaps,
                  const int16_t *values, size_t n_patches, int16_t *residual) {
    switch (width) {
    case 2: from_digits_int16_t(digits, n, 2, residual); break;
    case 4: from_digits_int16_t(digits, n, 4, residual); break;
    case 8: from_digits_int16_t(digits, n, 8, residual); break;
    default:
        for (size_t i = 0; i < n; i++)
            residual[i] = (int16_t)(uint16_t)(digits[i] | digits[n + i] << 8);
        return 0;
    }
    return patch_int16_t(n, gaps, values, n_patches, residual);
}
