/* Bytes chosen from sixteen by sixteen or eight indices below 16: in one instruction where a
 * machine has it. */
#ifndef EDGEKIT_SHUFFLE_H
#define EDGEKIT_SHUFFLE_H

#include "native.h"

#if defined(__aarch64__) && defined(__ARM_NEON)
#include <arm_neon.h>

INLINE void look_up(const uint8_t table[16], const uint8_t at[16], uint8_t out[16]) {
    vst1q_u8(out, vqtbl1q_u8(vld1q_u8(table), vld1q_u8(at)));
}

INLINE uint64_t pick(uint64_t low, uint64_t high, uint64_t at) {
    const uint8x16_t table = vcombine_u8(vcreate_u8(low), vcreate_u8(high));
    return vget_lane_u64(vreinterpret_u64_u8(vqtbl1_u8(table, vcreate_u8(at))), 0);
}

#elif defined(__GNUC__) && !defined(__clang__)
typedef uint8_t bytes_t __attribute__((vector_size(16)));
typedef uint64_t words_t __attribute__((vector_size(16)));

INLINE void look_up(const uint8_t table[16], const uint8_t at[16], uint8_t out[16]) {
    bytes_t bytes, index;
    memcpy(&bytes, table, 16);
    memcpy(&index, at, 16);
    bytes = __builtin_shuffle(bytes, index);
    memcpy(out, &bytes, 16);
}

INLINE uint64_t pick(uint64_t low, uint64_t high, uint64_t at) {
    const words_t table = {low, high}, index = {at, 0};
    return ((words_t)__builtin_shuffle((bytes_t)table, (bytes_t)index))[0];
}

#else

INLINE void look_up(const uint8_t table[16], const uint8_t at[16], uint8_t out[16]) {
    for (int i = 0; i < 16; i++) out[i] = table[at[i]];
}

INLINE uint64_t pick(uint64_t low, uint64_t high, uint64_t at) {
    uint64_t whole = 0;
    for (int i = 0; i < 64; i += 8) {
        const uint64_t index = at >> i & 15;
        whole |= ((index < 8 ? low : high) >> (8 * (index & 7)) & 0xff) << i;
    }
    return whole;
}

#endif
#endif
