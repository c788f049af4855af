/* Encodes and decodes a level on another machine than this one: what it reads and writes is told in
 * test_machines.py. */
#include "units.h"

#include <stdio.h>
#include <stdlib.h>

size_t nested_encode_room(int child_type, size_t n);
size_t nested_decode_room(int child_type, size_t n);
int nested_encode(int parent_type, int child_type, size_t n, const uint8_t *parent, uint8_t *child,
                  level_t *level, void *room);
int nested_decode(int parent_type, int child_type, size_t n, const uint8_t *parent, uint8_t *child,
                  const level_t *level, void *room);

static void *taken(size_t n_bytes) {
    void *p = calloc(n_bytes, 1);
    if (!p) exit(3);
    return p;
}

int main(void) {
    uint32_t head[6]; /* parent type, child type, weights, bytes of parent, child and rest */
    while (fread(head, sizeof head, 1, stdin) == 1) {
        const int parent_type = (int)head[0], child_type = (int)head[1];
        const size_t n = head[2], n_streams = child_type == T_BF16 ? FLOAT_STREAMS : CODE_STREAMS;
        uint8_t *parent = taken(head[3]), *child = taken(head[4]), *again = taken(head[4]);
        if (fread(parent, head[3], 1, stdin) != 1 || fread(child, head[4], 1, stdin) != 1) return 4;
        level_t level = {0};
        uint8_t *digits = level.digits[0] = taken(2 * n + 64);
        level.gaps = taken((n / 256 + 64) * 2);
        level.values = taken((n / 256 + 64) * 2);
        level.rest = taken((size_t)head[5] + 1);
        if (nested_encode(parent_type, child_type, n, parent, child, &level,
                          taken(nested_encode_room(child_type, n))))
            return 5;
        size_t n_digits = 0, n_patches = 0;
        for (size_t k = 0; k < n_streams; k++) {
            n_digits += packed_bytes(level.count[k], level.width[k]);
            n_patches += level.n_patches[k];
        }
        fwrite(level.limits, 4, 3, stdout);
        fwrite(level.width, 1, n_streams, stdout);
        fwrite(digits, 1, n_digits, stdout);
        fwrite(level.gaps, 2, n_patches, stdout);
        fwrite(level.values, 2, n_patches, stdout);
        fwrite(level.rest, 1, head[5], stdout);
        if (nested_decode(parent_type, child_type, n, parent, again, &level,
                          taken(nested_decode_room(child_type, n))))
            return 6;
        fwrite(again, 1, head[4], stdout);
    }
    return 0;
}
