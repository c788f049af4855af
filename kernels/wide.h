/* Units of 256 weights with AVX-512's compressing and expanding moves, where there are any. */
#ifndef EDGEKIT_WIDE_H
#define EDGEKIT_WIDE_H

#include "units.h"

/* Whether this machine has what the functions below need. */
int wide_supported(void);

/* Codes (as stored) to residuals and back; of the streams, those of the first n_groups groups. */
void wide_split(const float value[UNIT], const float step[GROUPS], const float start[GROUPS],
                layout_t layout, const uint32_t limits[3], int n_groups, streams8_t *streams,
                const uint8_t code[UNIT]);
void wide_join(const float value[UNIT], const float step[GROUPS], const float start[GROUPS],
               layout_t layout, const uint32_t limits[3], int n_groups, streams8_t *streams,
               uint8_t code[UNIT]);

/* m weights of BF16. is_weights: the values are weights, scale and offset are not used. */
void wide_split_bf16(const float value[UNIT], const float scale[GROUPS],
                     const float offset[GROUPS], int is_weights, int m, streams16_t *streams,
                     const uint8_t *child);
void wide_join_bf16(const float value[UNIT], const float scale[GROUPS],
                    const float offset[GROUPS], int is_weights, int m, streams16_t *streams,
                    uint8_t *child);

#endif
