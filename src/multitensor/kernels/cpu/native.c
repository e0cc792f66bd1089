/* The native CPU kernels' C interface (called through ctypes by binding.py and native.py), memory and division of work.
 *
 * A context belongs to one rank: it owns its threads and its scratch memory. Calls on one context exclude each other by
 * a mutex. Functions return 0, or a negative number: OUT_OF_MEMORY or BAD_INDEX. */
#if !defined(_GNU_SOURCE)
#define _GNU_SOURCE
#endif
#include "native.h"
#include "pool.h"

#define EXPORT __attribute__((visibility("default")))

enum { OUT_OF_MEMORY = -1, BAD_INDEX = -2 };
enum level { SCALAR, AVX2, AVX512 };

#define INTERFACE_VERSION 2
#define SPIN_NS 50000
#define PARALLEL_WORK 65536 /* multiply-adds (or as much other work) that repay waking the other threads */
#define MAX_WEIGHTS 16      /* of one call */

typedef struct {
    pool threads; /* first: its cache lines are aligned */
    const kernel_table *table;
    pthread_mutex_t mutex;
    uint8_t *activation_memory, *extra_memory;
    int64_t activation_bytes, extra_bytes;
} context;

/* ---- context ---- */

EXPORT int mt_interface_version(void)
{
    return INTERFACE_VERSION;
}

/* The best level that this machine can run: 0 scalar, 1 avx2, 2 avx512. */
EXPORT int mt_best_level(void)
{
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni"))
        return AVX512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) /* every such machine has F16C */
        return AVX2;
#endif
    return SCALAR;
}

static const kernel_table *level_table(int level)
{
#if defined(__x86_64__)
    if (level == AVX512)
        return &kernels_avx512;
    if (level == AVX2)
        return &kernels_avx2;
#endif
    (void)level;
    return &kernels_scalar;
}

/* Null without memory. level: at most mt_best_level(). */
EXPORT context *mt_create(int threads, int level)
{
    void *memory = NULL;
    if (posix_memalign(&memory, 64, sizeof(context)))
        return NULL;
    context *c = memset(memory, 0, sizeof(context));
    c->table = level_table(level < mt_best_level() ? level : mt_best_level());
    pthread_mutex_init(&c->mutex, NULL);
    pool_start(&c->threads, threads, SPIN_NS);
    return c;
}

EXPORT void mt_destroy(context *c)
{
    pool_stop(&c->threads);
    pthread_mutex_destroy(&c->mutex);
    free(c->activation_memory);
    free(c->extra_memory);
    free(c);
}

static int reserve(uint8_t **memory, int64_t *have, int64_t bytes)
{
    void *bigger = NULL;
    if (bytes <= *have)
        return 0;
    if (posix_memalign(&bigger, 64, (size_t)bytes))
        return OUT_OF_MEMORY;
    free(*memory);
    *memory = bigger;
    *have = bytes;
    return 0;
}

/* ---- activations ---- */

typedef struct {
    const context *c;
    activations a;
    const float *from;
    int64_t from_stride;
    float *padded_floats; /* null: `from` is used as it is */
} prepare_job;

#define PREPARE_TOKENS 8

static void prepare_chunk(void *argument, int64_t chunk, void *scratch)
{
    prepare_job *job = argument;
    activations *a = &job->a;
    (void)scratch;
    for (int64_t t = chunk * PREPARE_TOKENS; t < min_int(a->tokens, (chunk + 1) * PREPARE_TOKENS); t++) {
        const float *x = job->from + t * job->from_stride;
        float *d[N_UNITS], *sum[N_UNITS];
        for (int unit = 0; unit < N_UNITS; unit++) {
            d[unit] = a->d[unit] ? a->d[unit] + t * a->groups[unit] : NULL;
            sum[unit] = a->sum[unit] ? a->sum[unit] + t * a->groups[unit] : NULL;
        }
        if (a->q)
            job->c->table->quantize(x, a->cols, a->padded, a->q + t * a->padded, d, sum, a->groups);
        if (job->padded_floats) {
            memcpy(job->padded_floats + t * a->padded, x, (size_t)a->cols * sizeof(float));
            memset(job->padded_floats + t * a->padded + a->cols, 0, (size_t)(a->padded - a->cols) * sizeof(float));
        }
    }
}

/* Brings x into the forms that the products need: floats, and 8 bits for the units marked. */
static int prepare(context *c, const float *x, int64_t tokens, int64_t cols, int64_t x_stride, int floats,
                   const int units[N_UNITS], activations *result)
{
    prepare_job job = {.c = c, .from = x, .from_stride = x_stride};
    activations *a = &job.a;
    int64_t bytes = 0, floats_at = 0, q_at = 0, d_at[N_UNITS] = {0}, sum_at[N_UNITS] = {0};
    *a = (activations){.tokens = tokens, .cols = cols, .padded = round_up(cols, BLOCK), .x_stride = x_stride, .x = x};
    int copy = floats && a->padded != cols;
    if (copy) {
        floats_at = bytes;
        bytes += tokens * a->padded * (int64_t)sizeof(float);
    }
    if (units[UNIT32] || units[UNIT16]) {
        q_at = bytes;
        bytes += tokens * a->padded;
    }
    for (int unit = 0; unit < N_UNITS; unit++) {
        a->groups[unit] = padded_groups(a->padded, unit);
        if (units[unit]) {
            int64_t plane = tokens * a->groups[unit] * (int64_t)sizeof(float);
            d_at[unit] = bytes;
            sum_at[unit] = bytes + plane;
            bytes += 2 * plane;
        }
    }
    if (reserve(&c->activation_memory, &c->activation_bytes, bytes))
        return OUT_OF_MEMORY;
    if (copy) {
        job.padded_floats = (float *)(c->activation_memory + floats_at);
        a->x = job.padded_floats;
        a->x_stride = a->padded;
    }
    if (units[UNIT32] || units[UNIT16])
        a->q = (int8_t *)(c->activation_memory + q_at);
    for (int unit = 0; unit < N_UNITS; unit++)
        if (units[unit]) {
            a->d[unit] = (float *)(c->activation_memory + d_at[unit]);
            a->sum[unit] = (float *)(c->activation_memory + sum_at[unit]);
        }
    if (bytes)
        pool_run(&c->threads, prepare_chunk, &job, (tokens + PREPARE_TOKENS - 1) / PREPARE_TOKENS,
                 tokens * cols >= PARALLEL_WORK);
    *result = *a;
    return 0;
}

/* ---- products ---- */

typedef struct {
    const context *c;
    const activations *a;
    int exact, n;
    const weight *const *weights;
    destination to[MAX_WEIGHTS];
    int64_t chunk_rows, chunks[MAX_WEIGHTS]; /* chunks: of each weight */
    int64_t gated;                           /* weights 0 and 1 are gate and up; kind of activation, or -1 */
} linear_job;

static void multiply(const linear_job *job, int i, int64_t r0, int64_t r1, void *scratch)
{
    const weight *w = job->weights[i];
    if (job->exact || type_is_float(w->type))
        job->c->table->multiply_exact(w, r0, r1, job->a, job->to[i], scratch);
    else
        job->c->table->multiply_fast(w, r0, r1, job->a, job->to[i], scratch);
}

static void linear_chunk(void *argument, int64_t chunk, void *scratch)
{
    const linear_job *job = argument;
    int i = 0;
    while (chunk >= job->chunks[i])
        chunk -= job->chunks[i++];
    int64_t r0 = chunk * job->chunk_rows, r1 = min_int(job->weights[i]->rows, r0 + job->chunk_rows);
    multiply(job, i, r0, r1, scratch);
    if (job->gated < 0)
        return;
    multiply(job, 1, r0, r1, scratch);
    for (int64_t t = 0; t < job->a->tokens; t++)
        job->c->table->gated_activation(job->to[0].out + t * job->to[0].stride + r0,
                                        job->to[1].out + t * job->to[1].stride + r0, r1 - r0, job->gated);
}

/* Rows of a chunk: a few chunks a thread, so that one which is held up leaves its share to the others. Packed tiles
 * want whole tiles. */
static int64_t choose_chunk_rows(const context *c, int64_t rows, int64_t cols, int64_t tokens)
{
    int64_t least = max_int(1, PARALLEL_WORK / 4 / max_int(1, cols * tokens));
    int64_t chunk = max_int(least, (rows + 4 * c->threads.threads - 1) / (4 * c->threads.threads));
    return round_up(chunk, tokens > FAST_ROW_TOKENS ? MAX_TILE_ROWS : 4);
}

static int run_linear(context *c, const float *x, int64_t tokens, int64_t x_stride, linear_job *job)
{
    int64_t cols = job->weights[0]->cols, rows = 0, chunks = 0, used = job->gated >= 0 ? 1 : job->n;
    int floats = job->exact, units[N_UNITS] = {0};
    activations a;
    if (tokens == 0)
        return 0;
    for (int i = 0; i < job->n; i++) {
        int is_float = type_is_float(job->weights[i]->type);
        floats |= is_float;
        if (!is_float && !job->exact)
            units[type_unit(job->weights[i]->type)] = 1;
        rows += i < used ? job->weights[i]->rows : 0;
    }
    if (prepare(c, x, tokens, cols, x_stride, floats, units, &a) ||
        pool_reserve(&c->threads, carve_workspace(a.padded, NULL, NULL)))
        return OUT_OF_MEMORY;
    job->c = c;
    job->a = &a;
    job->chunk_rows = choose_chunk_rows(c, rows, cols, tokens);
    for (int i = 0; i < used; i++) {
        job->chunks[i] = (job->weights[i]->rows + job->chunk_rows - 1) / job->chunk_rows;
        chunks += job->chunks[i];
    }
    pool_run(&c->threads, linear_chunk, job, chunks, (job->gated >= 0 ? 2 : 1) * rows * cols * tokens >= PARALLEL_WORK);
    return 0;
}

/* outs[i] [tokens, weights[i]->rows] = x times weights[i] transposed (+ biases[i] unless null), i < n <= MAX_WEIGHTS.
 * All weights have the same columns, at least as many as are read of x's rows, which are x_stride floats apart. */
EXPORT int mt_linear(context *c, const float *x, int64_t tokens, int64_t x_stride, int exact, int n,
                     const weight *const *weights, const float *const *biases, float *const *outs)
{
    linear_job job = {.exact = exact, .n = n, .weights = weights, .gated = -1};
    for (int i = 0; i < n; i++)
        job.to[i] = (destination){outs[i], weights[i]->rows, biases ? biases[i] : NULL};
    pthread_mutex_lock(&c->mutex);
    int status = run_linear(c, x, tokens, x_stride, &job);
    pthread_mutex_unlock(&c->mutex);
    return status;
}

/* mt_linear for one weight. */
EXPORT int mt_linear_one(context *c, const float *x, int64_t tokens, int64_t x_stride, int exact, const weight *w,
                         const float *bias, float *out)
{
    return mt_linear(c, x, tokens, x_stride, exact, 1, &w, &bias, &out);
}

/* out [tokens, rows] = activation(x gate^T + gate_bias) * (x up^T + up_bias); gate and up of the same shape. */
EXPORT int mt_gated_linear(context *c, const float *x, int64_t tokens, int64_t x_stride, int exact, const weight *gate,
                           const weight *up, const float *gate_bias, const float *up_bias, int kind, float *out)
{
    const weight *weights[2] = {gate, up};
    linear_job job = {.exact = exact, .n = 2, .weights = weights, .gated = kind};
    pthread_mutex_lock(&c->mutex);
    int status = reserve(&c->extra_memory, &c->extra_bytes, tokens * gate->rows * (int64_t)sizeof(float));
    if (status == 0) {
        job.to[0] = (destination){out, gate->rows, gate_bias};
        job.to[1] = (destination){(float *)c->extra_memory, gate->rows, up_bias};
        status = run_linear(c, x, tokens, x_stride, &job);
    }
    pthread_mutex_unlock(&c->mutex);
    return status;
}

/* ---- rows of floats ---- */

typedef struct {
    const context *c;
    const weight *w;
    const int64_t *ids; /* null: rows first, first + 1, ... */
    int64_t first, n, chunk_rows;
    float *out;
} rows_job;

static void rows_chunk(void *argument, int64_t chunk, void *scratch)
{
    const rows_job *job = argument;
    int64_t cols = job->w->cols, used = carve_workspace(round_up(cols, BLOCK), NULL, NULL);
    float *row = (float *)((uint8_t *)scratch + used); /* decoding writes whole blocks, more than `out` may hold */
    for (int64_t i = chunk * job->chunk_rows; i < min_int(job->n, (chunk + 1) * job->chunk_rows); i++) {
        int64_t id = job->ids ? job->ids[i] : job->first + i;
        if (id < 0 || id >= job->w->rows) {
            memset(job->out + i * cols, 0, (size_t)cols * sizeof(float));
            continue;
        }
        job->c->table->dequantize(job->w, id, row, scratch);
        memcpy(job->out + i * cols, row, (size_t)cols * sizeof(float));
    }
}

/* out [n, cols] = rows of w as floats, bit for bit ggml's: ids[0 .. n), where an id outside [0, rows) gives zeros, or
 * without ids the rows from `first` on. */
EXPORT int mt_rows(context *c, const weight *w, const int64_t *ids, int64_t first, int64_t n, float *out)
{
    rows_job job = {.c = c, .w = w, .ids = ids, .first = first, .n = n, .chunk_rows = 16, .out = out};
    int64_t padded = round_up(w->cols, BLOCK);
    if (w->cols == 0)
        return 0;
    pthread_mutex_lock(&c->mutex);
    int status = pool_reserve(&c->threads, carve_workspace(padded, NULL, NULL) + padded * (int64_t)sizeof(float));
    if (status == 0)
        pool_run(&c->threads, rows_chunk, &job, (n + job.chunk_rows - 1) / job.chunk_rows,
                 n * w->cols >= PARALLEL_WORK);
    pthread_mutex_unlock(&c->mutex);
    return status;
}

/* ---- element-wise ---- */

typedef struct {
    const context *c;
    const float *x, *weight;
    float *residual, *out;
    int64_t rows, cols;
    float eps, offset;
} norm_job;

#define NORM_ROWS 8

static void norm_chunk(void *argument, int64_t chunk, void *scratch)
{
    const norm_job *job = argument;
    const kernel_table *table = job->c->table;
    (void)scratch;
    for (int64_t i = chunk * NORM_ROWS; i < min_int(job->rows, (chunk + 1) * NORM_ROWS); i++) {
        const float *from = job->x + i * job->cols;
        if (job->residual) {
            table->add(job->residual + i * job->cols, from, job->cols);
            from = job->residual + i * job->cols;
        }
        table->rms_norm(from, job->weight, job->out + i * job->cols, job->cols, job->eps, job->offset);
    }
}

/* out = x / sqrt(mean(x^2) + eps) * (weight + offset) over rows of `cols`; all contiguous. With a residual:
 * residual += x first, and its rows are normalised. out may be x. */
EXPORT int mt_rms_norm(context *c, const float *x, float *residual, int64_t rows, int64_t cols, const float *weight,
                       float eps, float offset, float *out)
{
    norm_job job = {c, x, weight, residual, out, rows, cols, eps, offset};
    pthread_mutex_lock(&c->mutex);
    pool_run(&c->threads, norm_chunk, &job, (rows + NORM_ROWS - 1) / NORM_ROWS, rows * cols >= PARALLEL_WORK);
    pthread_mutex_unlock(&c->mutex);
    return 0;
}

/* gate = activation(gate) * up, n floats; kind 0: silu, 1: gelu with tanh. */
EXPORT int mt_gated_activation(context *c, float *gate, const float *up, int64_t n, int kind)
{
    c->table->gated_activation(gate, up, n, kind);
    return 0;
}

/* Rotates heads of x [tokens, heads, head_dim] (tokens `stride` floats apart) in place; cos, sin [tokens, half]. A
 * second tensor may go along, null: none. */
EXPORT int mt_rope(context *c, int64_t tokens, int64_t head_dim, float *x, int64_t heads, int64_t stride, float *x2,
                   int64_t heads2, int64_t stride2, const float *cos, const float *sin, int64_t half, int interleaved)
{
    for (int64_t t = 0; t < tokens; t++) {
        for (int64_t h = 0; h < heads; h++)
            c->table->rope(x + t * stride + h * head_dim, cos + t * half, sin + t * half, half, interleaved);
        for (int64_t h = 0; x2 && h < heads2; h++)
            c->table->rope(x2 + t * stride2 + h * head_dim, cos + t * half, sin + t * half, half, interleaved);
    }
    return 0;
}

#include "paged.h"

/* setuptools expects an entry point of every extension; there is no Python module inside. */
EXPORT void *PyInit__native(void)
{
    return NULL;
}
