/* Shared by the parts of the native CPU kernels: weight descriptors, activations, the table of one instruction set.
 *
 * native.c owns threads and scratch memory and chooses the table; level_scalar.c, level_avx2.c and level_avx512.c each
 * fill one table by including level.h over their own vector primitives. */
#ifndef MULTITENSOR_NATIVE_H
#define MULTITENSOR_NATIVE_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define BLOCK 64          /* weights (columns) that the kernels handle at a time */
#define MAX_TILE_ROWS 32  /* weight rows of a packed tile, the widest level's */
/* Up to so many tokens rows are multiplied one by one, where tiles would not repay the packing (measured). */
#define FAST_ROW_TOKENS 4
#define EXACT_ROW_TOKENS 8
#define GROUPS 16         /* scale groups handled at a time where rows are multiplied one by one */
#define LANES 8           /* sums that a product with 8-bit activations is made of: group g belongs to sum g % LANES */
#define TILE_COLS 4096    /* columns of a packed tile of 8-bit codes; a quarter of it in floats */

/* Numbers known to binding.py (TYPE_IDS). */
enum weight_type {
    F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, IQ4_NL, IQ4_XS, MXFP4, N_TYPES
};

/* Numbers known to binding.py (PLANES): where each plane of a QuantTensor goes. "minimum" is m or dmin. */
enum plane { QUANTS, HIGH, SCALES, MINS, D, MINIMUM, N_PLANES };

/* One QuantTensor: plane base addresses and the bytes between their rows. */
typedef struct {
    int64_t type, phase, rows, cols;
    const uint8_t *planes[N_PLANES];
    int64_t strides[N_PLANES];
} weight;

/* Numbers of 32 (index 0) or 16 (index 1) columns: the two sizes of a scale group. */
enum { UNIT32, UNIT16, N_UNITS };

/* The activations of one call. Rows are padded with zeros to a multiple of BLOCK columns (`padded`).
 * x: float rows, `x_stride` floats apart, readable up to `padded` columns when `floats` was asked for.
 * q: 8-bit rows, `padded` apart; group g of unit u: x = d[u][g] * q; sum[u][g] = d * (sum of q) (for minima and zero
 * points). The groups of a token are `groups[u]` apart, zero past the end. Units not asked for are null. */
typedef struct {
    int64_t tokens, cols, padded, x_stride;
    const float *x;
    int8_t *q;
    float *d[N_UNITS], *sum[N_UNITS];
    int64_t groups[N_UNITS];
} activations;

/* Where rows of a product go: out[token * stride + row]; bias may be null. */
typedef struct {
    float *out;
    int64_t stride;
    const float *bias;
} destination;

typedef struct {
    const float *q; /* [tokens, n_heads, head_dim], tokens q_stride floats apart */
    int64_t q_stride;
    float *out; /* [tokens, n_heads, head_dim] contiguous */
    /* [blocks, block_size, n_kv_heads, head_dim] of cache_type (F32, F16, BF16), or codes */
    const uint8_t *keys, *values;
    const uint16_t *key_scales, *value_scales; /* [blocks, n_kv_heads, block_size, groups] for CACHE_Q8 and CACHE_Q4 */
    int64_t cache_type, block_size, n_heads, n_kv_heads, head_dim;
    const int64_t *tables; /* [sequences, table_stride] */
    int64_t table_stride, n_sequences;
    const int64_t *query_lens, *context_lens, *query_starts; /* [sequences] */
    const int32_t *kv_map; /* [n_heads] */
    int64_t window;        /* 0: none */
    float scale, softcap;  /* softcap 0: none */
} attention;

/* The quantised caches; kernels/cache_tensor.py tells their layout and rounding. */
enum { CACHE_Q8 = 100, CACHE_Q4 = 101, CACHE_GROUP = 32 };

/* Of one head of one token: bytes of numbers or codes, and the number of scales. */
static inline int64_t cache_bytes(int64_t cache_type, int64_t head_dim)
{
    if (cache_type == CACHE_Q4)
        return head_dim / 2;
    return head_dim * (cache_type == F32 ? 4 : cache_type == CACHE_Q8 ? 1 : 2);
}
static inline int64_t cache_groups(int64_t cache_type, int64_t head_dim)
{
    return cache_type >= CACHE_Q8 ? (head_dim + CACHE_GROUP - 1) / CACHE_GROUP : 0;
}

#define ATTENTION_ROWS 64 /* (token, head) pairs of one attention task, at most */
#define ATTENTION_KEYS 64 /* keys handled at a time */
/* Softmax is taken over positions [0, SEGMENT_KEYS), [SEGMENT_KEYS, 2 * SEGMENT_KEYS), ... apart, and these results are
 * joined in order, whether one task goes through them or several: so the result does not tell how work was divided. */
#define SEGMENT_KEYS 256

/* One task: rows [row0, row0 + rows) of the (token, head) pairs of one sequence and one KV head, numbered token by
 * token over the `n_group` query heads in `group`; keys [key0, key1). When `partial` is not null the keys are of one
 * segment and the unnormalised result goes there, a row after another: head_dim floats, the maximum, the sum; the first
 * of the tasks that share rows has their number in `parts`. */
typedef struct {
    int64_t sequence, kv_head, row0, rows, key0, key1, n_group;
    const int32_t *group;
    int64_t parts;
    float *partial;
} attention_task;

/* The kernels of one instruction set. `scratch` is a thread's own, 64-byte aligned, scratch_bytes() long. */
typedef struct {
    const char *name;
    void (*quantize)(const float *x, int64_t cols, int64_t padded, int8_t *q, float *const d[N_UNITS],
                     float *const sum[N_UNITS], const int64_t groups[N_UNITS]);
    /* Rows [r0, r1) of w times every token; fast: 8-bit activations, exact: float ones. */
    void (*multiply_fast)(const weight *w, int64_t r0, int64_t r1, const activations *a, destination to, void *scratch);
    void (*multiply_exact)(const weight *w, int64_t r0, int64_t r1, const activations *a, destination to,
                           void *scratch);
    void (*dequantize)(const weight *w, int64_t row, float *out, void *scratch);
    void (*gated_activation)(float *gate, const float *up, int64_t n, int64_t kind); /* gate = act(gate) * up */
    void (*rms_norm)(const float *x, const float *weight, float *out, int64_t n, float eps, float offset);
    void (*add)(float *to, const float *from, int64_t n);
    void (*rope)(float *x, const float *cos, const float *sin, int64_t half, int64_t interleaved);
    void (*to_cache)(const float *from, void *to, int64_t n, int64_t cache_type);
    /* One head, to codes and scales. */
    void (*to_codes)(const float *from, int64_t n, int64_t cache_type, uint8_t *codes, uint16_t *scales);
    void (*attend)(const attention *a, const attention_task *task, void *scratch);
    /* n partial results of one row, `stride` floats apart, to out [head_dim] */
    void (*attend_merge)(const float *partials, int64_t stride, int64_t n, int64_t head_dim, float *out);
} kernel_table;

extern const kernel_table kernels_scalar;
#if defined(__x86_64__)
extern const kernel_table kernels_avx2, kernels_avx512;
#endif

static inline int64_t round_up(int64_t value, int64_t multiple)
{
    return (value + multiple - 1) / multiple * multiple;
}

static inline int64_t min_int(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

static inline int64_t max_int(int64_t a, int64_t b)
{
    return a > b ? a : b;
}

static inline int type_is_float(int64_t type)
{
    return type <= BF16;
}

static inline int type_unit(int64_t type)
{
    return type == Q2_K || type == Q3_K || type == Q6_K ? UNIT16 : UNIT32;
}

static inline int64_t unit_weights(int unit)
{
    return unit == UNIT16 ? 16 : 32;
}

/* A thread's memory for products, carved from its scratch by carve_workspace(). */
typedef struct {
    float *scales, *minima;           /* of up to 4 rows, with some room behind them */
    float *rows;                      /* up to 4 rows of floats, or of codes */
    uint8_t *tile;                    /* packed: [columns / 4][rows] dwords of codes, or [columns][rows] floats */
    float *tile_scales, *tile_minima; /* [groups][rows] */
} workspace;

/* Groups of a row, padded so that whole vectors of 16 can be read. */
static inline int64_t padded_groups(int64_t padded, int unit)
{
    return round_up(padded / unit_weights(unit), 16);
}

/* Returns the bytes that products of `padded` columns need; fills `work` unless it is null. */
static inline int64_t carve_workspace(int64_t padded, void *scratch, workspace *work)
{
    int64_t groups = padded_groups(padded, UNIT16) + 16, tile = MAX_TILE_ROWS * TILE_COLS;
    int64_t tile_groups = MAX_TILE_ROWS * TILE_COLS / 16 * (int64_t)sizeof(float);
    int64_t rows = 4 * padded * (int64_t)sizeof(float), scales = 4 * groups * (int64_t)sizeof(float);
    if (work) {
        uint8_t *base = scratch;
        work->scales = (float *)base;
        work->minima = (float *)(base + scales);
        work->rows = (float *)(base + 2 * scales);
        work->tile = base + 2 * scales + rows;
        work->tile_scales = (float *)(work->tile + tile);
        work->tile_minima = (float *)(work->tile + tile + tile_groups);
    }
    return 2 * scales + rows + tile + 2 * tile_groups;
}

#endif
