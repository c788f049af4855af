/* Residuals in 2, 4, 8 or 16 bits each: what packing_ref.py says, in C. */
#include "native.h"

enum { FARTHEST = 0xffff };

INLINE int low_of(int width) { return width == 2 ? -1 : -(1 << (width - 1)); }

INLINE int is_outside(int residual, int width) {
    return (unsigned)(residual - low_of(width)) >> width != 0;
}

/* How many residuals lie outside the windows of 2, 4 and 8 bits. */
FAST EXPORT void packing_outside(const int16_t *residual, size_t n, size_t outside[3]) {
    outside[0] = outside[1] = outside[2] = 0;
    for (size_t first = 0; first < n; first += 4096) { /* int counts keep the loop narrow */
        const size_t end = n - first < 4096 ? n : first + 4096;
        int two = 0, four = 0, eight = 0;
        for (size_t i = first; i < end; i++) {
            two += is_outside(residual[i], 2);
            four += is_outside(residual[i], 4);
            eight += is_outside(residual[i], 8);
        }
        outside[0] += (size_t)two;
        outside[1] += (size_t)four;
        outside[2] += (size_t)eight;
    }
}

INLINE void pack_digits(const int16_t *residual, size_t n, int width, uint8_t *digits) {
    const int per_byte = 8 / width, low = low_of(width);
    const size_t m = (n + (size_t)per_byte - 1) / (size_t)per_byte;
    memset(digits, 0, m);
    for (int s = 0; s < per_byte; s++) {
        const size_t first = (size_t)s * m, end = first + m < n ? m : n > first ? n - first : 0;
        for (size_t j = 0; j < end; j++) {
            const int r = residual[first + j];
            const int digit = (is_outside(r, width) ? 0 : r) - low;
            digits[j] = (uint8_t)(digits[j] | digit << (s * width));
        }
        for (size_t j = end; j < m; j++) digits[j] = (uint8_t)(digits[j] | -low << (s * width));
    }
}

INLINE size_t find_patches(const int16_t *residual, size_t n, int width, uint16_t *gaps,
                           int16_t *values, size_t room) {
    size_t found = 0, next = 0; /* next: the first position after the last patch */
    for (size_t i = 0; i < n; i++) {
        if (!is_outside(residual[i], width)) continue;
        while (i - next > FARTHEST) {
            if (found < room) gaps[found] = FARTHEST, values[found] = residual[next + FARTHEST];
            found++;
            next += FARTHEST + 1;
        }
        if (found < room) gaps[found] = (uint16_t)(i - next), values[found] = residual[i];
        found++;
        next = i + 1;
    }
    return found;
}

/* digits: room for ceil(n * width / 8) bytes; gaps, values: room for `room` patches.
 * Returns how many patches there are; more than room: they are not all written. */
FAST EXPORT size_t packing_pack(const int16_t *residual, size_t n, int width, uint8_t *digits,
                                uint16_t *gaps, int16_t *values, size_t room, int has_outside) {
    switch (width) {
    case 2: pack_digits(residual, n, 2, digits); break;
    case 4: pack_digits(residual, n, 4, digits); break;
    case 8: pack_digits(residual, n, 8, digits); break;
    default:
        for (size_t i = 0; i < n; i++) digits[i] = (uint8_t)residual[i];
        for (size_t i = 0; i < n; i++) digits[n + i] = (uint8_t)((uint16_t)residual[i] >> 8);
        return 0;
    }
    return has_outside ? find_patches(residual, n, width, gaps, values, room) : 0;
}

INLINE void unpack_digits(const uint8_t *digits, size_t n, int width, int16_t *residual) {
    const int per_byte = 8 / width, mask = (1 << width) - 1, low = low_of(width);
    const size_t m = (n + (size_t)per_byte - 1) / (size_t)per_byte;
    for (int s = 0; s < per_byte; s++) {
        const size_t first = (size_t)s * m, end = first + m < n ? m : n > first ? n - first : 0;
        for (size_t j = 0; j < end; j++)
            residual[first + j] = (int16_t)(((digits[j] >> (s * width)) & mask) + low);
    }
}

/* digits: ceil(n * width / 8) bytes. Returns 0, or 1 where a patch lies outside the stream. */
FAST EXPORT int packing_unpack(const uint8_t *digits, size_t n, int width, const uint16_t *gaps,
                               const int16_t *values, size_t n_patches, int16_t *residual) {
    switch (width) {
    case 2: unpack_digits(digits, n, 2, residual); break;
    case 4: unpack_digits(digits, n, 4, residual); break;
    case 8: unpack_digits(digits, n, 8, residual); break;
    default:
        for (size_t i = 0; i < n; i++)
            residual[i] = (int16_t)(uint16_t)(digits[i] | digits[n + i] << 8);
        return 0;
    }
    for (size_t k = 0, next = 0; k < n_patches; k++) {
        if (gaps[k] >= n - next) return 1;
        residual[next + gaps[k]] = values[k];
        next += (size_t)gaps[k] + 1;
    }
    return 0;
}
