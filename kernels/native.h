/* What the compiled kernels share: how functions are exported and compiled. */
#ifndef EDGEKIT_NATIVE_H
#define EDGEKIT_NATIVE_H

#include <float.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if FLT_EVAL_METHOD != 0
#error "float expressions must be evaluated in float: predictions are the same on every machine"
#endif
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "blocks are little-endian; on this machine the numpy reference is used"
#endif

#if defined(__GNUC__) || defined(__clang__)
#define INLINE static inline __attribute__((always_inline))
#else
#define INLINE static inline
#endif

#if defined(_WIN32)
#define EXPORT __declspec(dllexport)
#elif defined(__GNUC__) || defined(__clang__)
#define EXPORT __attribute__((visibility("default")))
#else
#define EXPORT
#endif

/* Compiled for several machines, chosen when the library is loaded; all give the same bits. */
#if defined(__x86_64__) && !defined(__clang__) && defined(__GLIBC__) && __GNUC__ >= 9
#define FAST __attribute__((target_clones("avx2", "default")))
#else
#define FAST
#endif

#endif
