/* Listens to the routers of a model that llama.cpp runs: an evaluation callback in C.

   It is asked about every node of the graph, so in Python it would take a few percent of the time.
   It stops the graph after each `ffn_moe_topk-<block>` and looks whether the chosen experts are
   resident; only where one is not, or where it is told to tell always, Python is called. Where
   routers come before attention it also stops at `ffn_norm-<block>`, right before the experts.
   edgekit/llama/listener.py has the same in Python: the definition, and what runs without this. */
#include <stdbool.h>
#include <stdlib.h>

#include "native.h"

#define RANKS 64u /* as in edgekit/routing/eviction.py */

typedef struct {
    const char *(*get_name)(const void *tensor);
    void *(*get_data)(const void *tensor);
    /* 0 ends the graph */
    int32_t (*chosen)(int32_t block, int32_t n_distinct);
    int32_t (*late)(int32_t block);
    uint64_t extents, strides;  /* byte offsets of int64[4] in a tensor */
    uint8_t *resident;          /* [blocks][experts] */
    uint32_t *last;             /* [blocks][experts]: pass * RANKS + rank */
    uint8_t *seen;              /* [experts], all 0 between calls */
    int32_t *distinct;          /* [experts]: who was chosen, each once */
    const void **hidden;        /* [blocks]: the tensor ffn_inp of each block */
    const void *tensor;         /* what `chosen` was called for */
    uint64_t n_asked, n_hits;   /* distinct experts of all passes */
    uint32_t pass;
    int32_t block_before;
    int32_t n_blocks, n_experts;
    int32_t always, listens_late;
} listener_t;

static int32_t block_of(const char *name, const char *prefix) {
    size_t n = strlen(prefix);
    char *end;
    if (strncmp(name, prefix, n) != 0 || name[n] < '0' || name[n] > '9') return -1;
    long block = strtol(name + n, &end, 10);
    return *end == 0 && block < INT32_MAX ? (int32_t) block : -1; /* no "... (view)" */
}

static bool wanted(listener_t *l, const void *tensor, const char *name) {
    int32_t block = block_of(name, "ffn_inp-");
    if (block >= 0 && block < l->n_blocks) l->hidden[block] = tensor;
    if (block_of(name, "ffn_moe_topk-") >= 0) return true;
    return l->listens_late && block_of(name, "ffn_norm-") >= 0;
}

/* Marks who was chosen: ids are int32, `used` in a row, the heaviest first. */
static int32_t take(listener_t *l, const void *tensor, int32_t block, bool *missing) {
    const int64_t *extents = (const int64_t *) ((const char *) tensor + l->extents);
    const uint64_t *strides = (const uint64_t *) ((const char *) tensor + l->strides);
    const char *data = l->get_data(tensor);
    uint8_t *resident = l->resident + (size_t) block * l->n_experts;
    uint32_t *last = l->last + (size_t) block * l->n_experts;
    int32_t n = 0;
    if (block <= l->block_before) l->pass++;
    l->block_before = block;
    for (int64_t row = 0; row < extents[1]; row++) {
        for (int64_t place = 0; place < extents[0]; place++) {
            int32_t id;
            memcpy(&id, data + row * strides[1] + place * strides[0], sizeof id);
            if (id < 0 || id >= l->n_experts) continue;
            uint32_t rank = place < (int64_t) RANKS - 1 ? RANKS - 1 - (uint32_t) place : 0;
            uint32_t stamp = l->pass * RANKS + rank;
            if (stamp > last[id]) last[id] = stamp;
            if (l->seen[id]) continue;
            l->seen[id] = 1;
            l->distinct[n++] = id;
            l->n_asked++;
            if (resident[id]) l->n_hits++;
            else *missing = true;
        }
    }
    for (int32_t i = 0; i < n; i++) l->seen[l->distinct[i]] = 0;
    return n;
}

EXPORT bool listener_eval(void *tensor, bool ask, void *user) {
    listener_t *l = user;
    const char *name = l->get_name(tensor);
    if (name[0] != 'f' || name[3] != '_') return !ask; /* names are arrays of 64 */
    if (ask) return wanted(l, tensor, name);
    l->tensor = tensor;
    int32_t block = block_of(name, "ffn_moe_topk-");
    if (block < 0 || block >= l->n_blocks) {
        block = block_of(name, "ffn_norm-");
        return block < 0 || block >= l->n_blocks || l->late(block) != 0;
    }
    bool missing = false;
    int32_t n = take(l, tensor, block, &missing);
    return (!missing && !l->always) || l->chosen(block, n) != 0;
}
