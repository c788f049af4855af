/* Rows from bitstack levels: kernels/bitstack_rows.py is the definition, which this equals bit for
   bit. Sums go over r in order, in float32, without fused multiply-add (setup.py's flags). */
#include "native.h"

enum { TILE = 512 }; /* columns at once: sums and some rows of v stay in the first cache */

INLINE void sum_products(size_t n, size_t cols, size_t rank, const float *restrict u,
                         const float *restrict v, float *restrict sum) {
  for (size_t j = 0; j < n; j++) sum[j] = 0.0f;
  for (size_t r = 0; r < rank; r++) {
    const float factor = u[r];
    const float *restrict row = v + r * cols;
    for (size_t j = 0; j < n; j++) sum[j] += factor * row[j];
  }
}

INLINE void add_signed(size_t n, size_t first, const uint8_t *restrict signs,
                       const float *restrict sum, float *restrict out) {
  for (size_t j = 0; j < n; j++) {
    const size_t at = first + j;
    out[j] += (signs[at / 8] >> (at % 8) & 1) ? sum[j] : -sum[j];
  }
}

/* Adds one level to out [rows, cols]; left [rows, groups * rank], right [rank, cols]. */
FAST EXPORT void bitstack_add(size_t rows, size_t cols, size_t rank, size_t group,
                              const float *left, const float *right, const uint8_t *signs, float *out) {
  float sum[TILE];
  const size_t groups = (cols + group - 1) / group, sign_bytes = (cols + 7) / 8;
  for (size_t i = 0; i < rows; i++) {
    for (size_t first = 0; first < cols;) {
      const size_t g = first / group, end = (g + 1) * group < cols ? (g + 1) * group : cols;
      const size_t n = end - first < TILE ? end - first : TILE;
      sum_products(n, cols, rank, left + (i * groups + g) * rank, right + first, sum);
      add_signed(n, first, signs + i * sign_bytes, sum, out + i * cols + first);
      first += n;
    }
  }
}
