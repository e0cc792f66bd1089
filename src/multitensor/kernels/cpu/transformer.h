/* What a decoder needs beside products, over one level's vector primitives. Included by level_*.c only. */

/* e**x to about 2e-7 relative; 0 below -87.3 (where the result would be subnormal), infinity above 88.4. NaN stays NaN:
 * vf_min and vf_max return their second argument when one is NaN. */
INLINE vf vf_exp(vf x)
{
    vf clamped = vf_min(vf_set(89.0f), vf_max(vf_set(-87.3f), x));
    vf n = vf_round(vf_mul(clamped, vf_set(1.44269504f)));
    /* r = x - n ln 2 in two steps: the first product is exact. */
    vf r = vf_fma(n, vf_set(-0.693359375f), clamped);
    r = vf_fma(n, vf_set(2.12194440e-4f), r);
    vf p = vf_set(1.0f / 5040.0f); /* Taylor's series: |r| <= 0.347, so the next term is below 6e-9 */
    p = vf_fma(p, r, vf_set(1.0f / 720.0f));
    p = vf_fma(p, r, vf_set(1.0f / 120.0f));
    p = vf_fma(p, r, vf_set(1.0f / 24.0f));
    p = vf_fma(p, r, vf_set(1.0f / 6.0f));
    p = vf_fma(p, r, vf_set(0.5f));
    p = vf_fma(p, r, vf_set(1.0f));
    p = vf_fma(p, r, vf_set(1.0f));
    return vf_zero_below(vf_mul(p, vf_power_of_two(n)), x, -87.3f);
}

/* x / (1 + e**-y) */
INLINE vf vf_gate(vf x, vf y)
{
    vf down = vf_add(vf_set(1.0f), vf_exp(vf_sub(vf_zero(), y)));
    return vf_div(x, down);
}

/* kind 0: silu(x) = x sigmoid(x); kind 1: gelu with tanh = x sigmoid(2 sqrt(2 / pi) (x + 0.044715 x**3)) */
INLINE vf vf_activation(vf x, int64_t kind)
{
    if (kind == 0)
        return vf_gate(x, x);
    vf inner = vf_fma(vf_mul(vf_mul(x, x), x), vf_set(0.044715f), x);
    return vf_gate(x, vf_mul(inner, vf_set(1.5957691216f)));
}

/* A partial vector, by way of a padded copy. */
INLINE vf vf_load_n(const float *p, int64_t n)
{
    float padded[VL] = {0};
    memcpy(padded, p, (size_t)n * sizeof(float));
    return vf_load(padded);
}
INLINE void vf_store_n(float *p, vf v, int64_t n)
{
    float padded[VL];
    vf_store(padded, v);
    memcpy(p, padded, (size_t)n * sizeof(float));
}

FN void gated_activation(float *gate, const float *up, int64_t n, int64_t kind)
{
    int64_t i = 0;
    for (; i + VL <= n; i += VL)
        vf_store(gate + i, vf_mul(vf_activation(vf_load(gate + i), kind), vf_load(up + i)));
    if (i < n)
        vf_store_n(gate + i, vf_mul(vf_activation(vf_load_n(gate + i, n - i), kind), vf_load_n(up + i, n - i)), n - i);
}

FN void rms_norm(const float *x, const float *weight, float *out, int64_t n, float eps, float offset)
{
    vf squares[2] = {vf_zero(), vf_zero()};
    int64_t i = 0;
    for (; i + 2 * VL <= n; i += 2 * VL)
        for (int j = 0; j < 2; j++) {
            vf v = vf_load(x + i + j * VL);
            squares[j] = vf_fma(v, v, squares[j]);
        }
    float total = vf_sum(vf_add(squares[0], squares[1]));
    for (; i < n; i++)
        total += x[i] * x[i];
    float factor = 1.0f / __builtin_sqrtf(total / (float)n + eps);
    for (i = 0; i + VL <= n; i += VL) {
        vf w = vf_add(vf_load(weight + i), vf_set(offset));
        vf_store(out + i, vf_mul(vf_mul(vf_load(x + i), vf_set(factor)), w));
    }
    for (; i < n; i++)
        out[i] = x[i] * factor * (weight[i] + offset);
}

FN void add(float *to, const float *from, int64_t n)
{
    for (int64_t i = 0; i < n; i++)
        to[i] += from[i];
}

/* Rotates the first 2 * half numbers of one head. */
FN void rope(float *x, const float *cos, const float *sin, int64_t half, int64_t interleaved)
{
    int64_t step = interleaved ? 2 : 1, other = interleaved ? 1 : half;
    for (int64_t i = 0; i < half; i++) {
        float first = x[i * step], second = x[i * step + other];
        x[i * step] = first * cos[i] - second * sin[i];
        x[i * step + other] = second * cos[i] + first * sin[i];
    }
}

/* ---- the cache's types ---- */

INLINE uint16_t float_to_bf16(float value) /* nearest, ties to even */
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    if ((bits & 0x7fffffff) > 0x7f800000)
        return (uint16_t)(bits >> 16 | 0x40);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

FN void to_cache(const float *from, void *to, int64_t n, int64_t cache_type)
{
    int64_t i = 0;
    uint16_t *half = to;
    if (cache_type == F32) {
        memcpy(to, from, (size_t)n * sizeof(float));
    } else if (cache_type == F16) {
        for (; i + VL <= n; i += VL)
            vf_store_f16(half + i, vf_load(from + i));
        for (; i < n; i++)
            half[i] = float_to_half(from[i]);
    } else {
        for (; i < n; i++)
            half[i] = float_to_bf16(from[i]);
    }
}

/* n numbers of the cache as floats, zeros up to `padded`. */
INLINE void from_cache(const uint8_t *from, int64_t n, int64_t padded, int64_t cache_type, float *to)
{
    int64_t i = 0;
    const uint16_t *half = (const uint16_t *)from;
    if (cache_type == F32) {
        memcpy(to, from, (size_t)n * sizeof(float));
        i = n;
    } else if (cache_type == F16) {
        for (; i + VL <= n; i += VL)
            vf_store(to + i, vf_load_f16(half + i));
        for (; i < n; i++)
            to[i] = half_to_float(half[i]);
    } else {
        for (; i + VL <= n; i += VL)
            vf_store(to + i, bf16_floats(half + i));
        for (; i < n; i++) {
            uint32_t bits = (uint32_t)half[i] << 16;
            memcpy(to + i, &bits, sizeof bits);
        }
    }
    for (; i < padded; i++)
        to[i] = 0.0f;
}

/* ---- attention: ATTENTION_KEYS keys at a time, softmax on the way (arXiv:2112.05682, arXiv:2205.14135) ---- */

typedef struct {
    int64_t padded; /* head_dim rounded up to TILE_ROWS */
    float *queries; /* [rows][padded], scaled */
    float *output;  /* [rows][padded], not normalised */
    float *keys;    /* [ATTENTION_KEYS][padded] */
    float *turned;  /* [padded][ATTENTION_KEYS] keys */
    float *values;  /* [ATTENTION_KEYS][padded] */
    float *scores;  /* [rows][ATTENTION_KEYS] */
    float largest[ATTENTION_ROWS], sum[ATTENTION_ROWS];
    int64_t position[ATTENTION_ROWS]; /* of each row's query in its sequence */
} attention_work;

INLINE void load_queries(const attention *a, const attention_task *task, attention_work *work)
{
    int64_t context = a->context_lens[task->sequence], start = a->query_starts[task->sequence];
    for (int64_t r = 0; r < task->rows; r++) {
        int64_t token = (task->row0 + r) / task->n_group, head = task->group[(task->row0 + r) % task->n_group];
        const float *q = a->q + (start + token) * a->q_stride + head * a->head_dim;
        float *to = work->queries + r * work->padded;
        for (int64_t i = 0; i < a->head_dim; i++)
            to[i] = q[i] * a->scale;
        for (int64_t i = a->head_dim; i < work->padded; i++)
            to[i] = 0.0f;
        work->largest[r] = -__builtin_inff();
        work->sum[r] = 0.0f;
        work->position[r] = context + token;
    }
    memset(work->output, 0, (size_t)(task->rows * work->padded) * sizeof(float));
}

/* Keys and values of positions [first, first + n), zeros after them. */
INLINE void load_keys(const attention *a, const attention_task *task, int64_t first, int64_t n, attention_work *work)
{
    int64_t size = a->cache_type == F32 ? 4 : 2, head_bytes = a->head_dim * size;
    const int64_t *table = a->tables + task->sequence * a->table_stride;
    int64_t block = first / a->block_size, offset = first % a->block_size;
    const int64_t ahead = 8 * a->n_kv_heads * head_bytes;
    for (int64_t i = 0; i < n; i++) {
        int64_t slot = table[block] * a->block_size + offset;
        int64_t byte = (slot * a->n_kv_heads + task->kv_head) * head_bytes;
        for (int64_t line = 0; line < head_bytes; line += 64) { /* heads in between defeat the hardware's prefetcher */
            __builtin_prefetch((const void *)((uintptr_t)a->keys + (uintptr_t)(byte + ahead + line)));
            __builtin_prefetch((const void *)((uintptr_t)a->values + (uintptr_t)(byte + ahead + line)));
        }
        from_cache(a->keys + byte, a->head_dim, work->padded, a->cache_type, work->keys + i * work->padded);
        from_cache(a->values + byte, a->head_dim, work->padded, a->cache_type, work->values + i * work->padded);
        if (++offset == a->block_size) {
            offset = 0;
            block++;
        }
    }
    size_t rest = (size_t)((ATTENTION_KEYS - n) * work->padded) * sizeof(float);
    memset(work->keys + n * work->padded, 0, rest);
    memset(work->values + n * work->padded, 0, rest);
}

INLINE void compute_scores(int64_t rows, int64_t n_keys, attention_work *work)
{
    if (rows < 8) { /* too few to repay turning the keys */
        for (int64_t r = 0; r < rows; r++)
            for (int64_t k = 0; k < n_keys; k++) {
                vf acc = vf_zero();
                for (int64_t i = 0; i < work->padded; i += VL)
                    acc = vf_fma(vf_load(work->queries + r * work->padded + i),
                                 vf_load(work->keys + k * work->padded + i), acc);
                work->scores[r * ATTENTION_KEYS + k] = vf_sum(acc);
            }
        return;
    }
    for (int64_t k = 0; k < ATTENTION_KEYS; k += 4)
        pack_dwords((uint32_t *)work->keys + k * work->padded, work->padded, work->padded, (uint32_t *)work->turned + k,
                    ATTENTION_KEYS);
    for (int64_t k = 0; k < ATTENTION_KEYS; k += TILE_ROWS)
        float_tiles(rows, work->turned + k, ATTENTION_KEYS, work->queries, work->padded, work->padded,
                    work->scores + k, ATTENTION_KEYS, 0);
}

/* softcap * tanh(score / softcap); tanh(y) = 1 - 2 / (e**2y + 1) */
INLINE vf vf_softcap(vf score, float softcap)
{
    vf e = vf_exp(vf_mul(score, vf_set(2.0f / softcap)));
    vf t = vf_sub(vf_set(1.0f), vf_div(vf_set(2.0f), vf_add(e, vf_set(1.0f))));
    return vf_mul(vf_set(softcap), t);
}

/* Scores of one row -> weights relative to the row's new maximum; what was summed before is scaled down to it. */
INLINE void soften_row(const attention *a, int64_t first, int64_t n, int64_t r, attention_work *work)
{
    float *scores = work->scores + r * ATTENTION_KEYS;
    int64_t position = work->position[r], oldest = a->window ? position - a->window + 1 : 0;
    int64_t begin = max_int(0, oldest - first), end = min_int(n, position + 1 - first);
    vf largest = vf_set(work->largest[r]), total = vf_zero();
    if (begin >= end) {
        memset(scores, 0, ATTENTION_KEYS * sizeof(float));
        return;
    }
    if (a->softcap > 0.0f)
        for (int64_t k = begin / VL * VL; k < end; k += VL)
            vf_store(scores + k, vf_softcap(vf_load(scores + k), a->softcap));
    for (int64_t k = 0; k < begin; k++)
        scores[k] = -__builtin_inff();
    for (int64_t k = end; k < ATTENTION_KEYS; k++)
        scores[k] = -__builtin_inff();
    for (int64_t k = 0; k < ATTENTION_KEYS; k += VL)
        largest = vf_max(largest, vf_load(scores + k));
    float most = vf_largest(largest), before = work->largest[r];
    for (int64_t k = 0; k < ATTENTION_KEYS; k += VL) {
        vf weight = vf_exp(vf_sub(vf_load(scores + k), vf_set(most)));
        vf_store(scores + k, weight);
        total = vf_add(total, weight);
    }
    float correction[VL];
    vf_store(correction, vf_exp(vf_set(before - most)));
    work->sum[r] = work->sum[r] * correction[0] + vf_sum(total);
    work->largest[r] = most;
    if (correction[0] != 1.0f)
        for (int64_t i = 0; i < work->padded; i += VL)
            vf_store(work->output + r * work->padded + i,
                     vf_mul(vf_load(work->output + r * work->padded + i), vf_set(correction[0])));
}

FN void attend(const attention *a, const attention_task *task, void *scratch)
{
    attention_work work;
    work.padded = round_up(a->head_dim, MAX_TILE_ROWS);
    work.queries = scratch;
    work.output = work.queries + ATTENTION_ROWS * work.padded;
    work.keys = work.output + ATTENTION_ROWS * work.padded;
    work.turned = work.keys + ATTENTION_KEYS * work.padded;
    work.values = work.turned + ATTENTION_KEYS * work.padded;
    work.scores = work.values + ATTENTION_KEYS * work.padded;
    load_queries(a, task, &work);
    for (int64_t first = task->key0; first < task->key1; first += ATTENTION_KEYS) {
        int64_t n = min_int(ATTENTION_KEYS, task->key1 - first);
        load_keys(a, task, first, n, &work);
        compute_scores(task->rows, n, &work);
        for (int64_t r = 0; r < task->rows; r++)
            soften_row(a, first, n, r, &work);
        for (int64_t i = 0; i < work.padded; i += TILE_ROWS)
            float_tiles(task->rows, work.values + i, work.padded, work.scores, ATTENTION_KEYS, n, work.output + i,
                        work.padded, 1);
    }
    for (int64_t r = 0; r < task->rows; r++) {
        const float *from = work.output + r * work.padded;
        if (task->partial) {
            float *to = task->partial + r * (a->head_dim + 2);
            memcpy(to, from, (size_t)a->head_dim * sizeof(float));
            to[a->head_dim] = work.largest[r];
            to[a->head_dim + 1] = work.sum[r];
            continue;
        }
        int64_t token = (task->row0 + r) / task->n_group, head = task->group[(task->row0 + r) % task->n_group];
        float *to = a->out + ((a->query_starts[task->sequence] + token) * a->n_heads + head) * a->head_dim;
        float inverse = 1.0f / work.sum[r];
        for (int64_t i = 0; i < a->head_dim; i++)
            to[i] = from[i] * inverse;
    }
}

/* Joins `n` partial results of one row, each head_dim floats, the maximum and the sum. */
FN void attend_merge(const float *const *partials, int64_t n, int64_t head_dim, float *out)
{
    float most = -__builtin_inff(), total = 0.0f, factor[VL];
    for (int64_t p = 0; p < n; p++)
        if (partials[p][head_dim] > most)
            most = partials[p][head_dim];
    memset(out, 0, (size_t)head_dim * sizeof(float));
    for (int64_t p = 0; p < n; p++) {
        vf_store(factor, vf_exp(vf_set(partials[p][head_dim] - most)));
        total += factor[0] * partials[p][head_dim + 1];
        for (int64_t i = 0; i < head_dim; i++)
            out[i] += factor[0] * partials[p][i];
    }
    for (int64_t i = 0; i < head_dim; i++)
        out[i] /= total;
}
