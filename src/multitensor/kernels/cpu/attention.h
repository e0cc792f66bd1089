/* Attention over a paged cache, ATTENTION_KEYS keys at a time, softmax on the way (arXiv:2112.05682, arXiv:2205.14135).
 * Included by level.h only. */

typedef struct {
    int64_t padded; /* head_dim rounded up to TILE_ROWS */
    float *queries; /* [rows][padded], scaled */
    float *output;  /* [rows][padded], not normalised, of a segment */
    float *joined;  /* the same of the segments so far */
    float *keys;    /* [ATTENTION_KEYS][padded] */
    float *turned;  /* [padded][ATTENTION_KEYS] keys */
    float *values;  /* [ATTENTION_KEYS][padded] */
    float *scores;  /* [rows][ATTENTION_KEYS] */
    float largest[ATTENTION_ROWS], sum[ATTENTION_ROWS];
    float joined_largest[ATTENTION_ROWS], joined_sum[ATTENTION_ROWS];
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
        if (a->cache_type >= CACHE_Q8) /* as the keys are */
            turn_groups(to, a->head_dim);
        work->joined_sum[r] = 0.0f;
        work->position[r] = context + token;
    }
}

/* Keys and values of positions [first, first + n), zeros after them and before the task's own. */
INLINE void load_keys(const attention *a, const attention_task *task, int64_t first, int64_t n, attention_work *work)
{
    int64_t head_bytes = cache_bytes(a->cache_type, a->head_dim), groups = cache_groups(a->cache_type, a->head_dim);
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
        float *key = work->keys + i * work->padded, *value = work->values + i * work->padded;
        if (first + i < task->key0) {
            memset(key, 0, (size_t)work->padded * sizeof(float));
            memset(value, 0, (size_t)work->padded * sizeof(float));
        } else if (groups) {
            int64_t scale = ((table[block] * a->n_kv_heads + task->kv_head) * a->block_size + offset) * groups;
            from_codes(a->keys + byte, a->key_scales + scale, a->head_dim, work->padded, a->cache_type, key);
            from_codes(a->values + byte, a->value_scales + scale, a->head_dim, work->padded, a->cache_type, value);
        } else {
            from_cache(a->keys + byte, a->head_dim, work->padded, a->cache_type, key);
            from_cache(a->values + byte, a->head_dim, work->padded, a->cache_type, value);
        }
        if (++offset == a->block_size) {
            offset = 0;
            block++;
        }
    }
    size_t rest = (size_t)((ATTENTION_KEYS - n) * work->padded) * sizeof(float);
    memset(work->keys + n * work->padded, 0, rest);
    memset(work->values + n * work->padded, 0, rest);
}

/* The same way for few rows as for many, although turning the keys does not repay itself for few: a score must not tell
 * what was computed beside it. */
INLINE void compute_scores(int64_t rows, int64_t n_keys, attention_work *work)
{
    for (int64_t k = 0; k < round_up(n_keys, TILE_ROWS); k += 4)
        pack_dwords((uint32_t *)work->keys + k * work->padded, work->padded, work->padded, (uint32_t *)work->turned + k,
                    ATTENTION_KEYS);
    for (int64_t k = 0; k < n_keys; k += TILE_ROWS)
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

/* Adds what a row's next segment gave (head_dim floats, maximum, sum) to what those before gave. */
INLINE void join_segment(float *to, float *to_largest, float *to_sum, const float *from, float largest, float sum,
                         int64_t head_dim)
{
    float factors[2][VL];
    if (sum == 0.0f) /* nothing in it was visible */
        return;
    if (*to_sum == 0.0f) {
        memcpy(to, from, (size_t)head_dim * sizeof(float));
        *to_largest = largest;
        *to_sum = sum;
        return;
    }
    float most = largest > *to_largest ? largest : *to_largest;
    vf_store(factors[0], vf_exp(vf_set(*to_largest - most)));
    vf_store(factors[1], vf_exp(vf_set(largest - most)));
    for (int64_t i = 0; i < head_dim; i++)
        to[i] = to[i] * factors[0][0] + from[i] * factors[1][0];
    *to_sum = *to_sum * factors[0][0] + sum * factors[1][0];
    *to_largest = most;
}

/* Keys [key0, key1), which lie in one segment; the first is at a multiple of ATTENTION_KEYS. */
INLINE void attend_segment(const attention *a, const attention_task *task, int64_t key0, int64_t key1,
                           attention_work *work)
{
    memset(work->output, 0, (size_t)(task->rows * work->padded) * sizeof(float));
    for (int64_t r = 0; r < task->rows; r++) {
        work->largest[r] = -__builtin_inff();
        work->sum[r] = 0.0f;
    }
    for (int64_t first = key0; first < key1; first += ATTENTION_KEYS) {
        int64_t n = min_int(ATTENTION_KEYS, key1 - first);
        load_keys(a, task, first, n, work);
        compute_scores(task->rows, n, work);
        for (int64_t r = 0; r < task->rows; r++)
            soften_row(a, first, n, r, work);
        for (int64_t i = 0; i < work->padded; i += TILE_ROWS)
            float_tiles(task->rows, work->values + i, work->padded, work->scores, ATTENTION_KEYS, n, work->output + i,
                        work->padded, 1);
    }
    for (int64_t r = 0; r < task->rows; r++) {
        float *from = work->output + r * work->padded;
        if (a->cache_type >= CACHE_Q8)
            turn_groups(from, a->head_dim);
        join_segment(work->joined + r * work->padded, &work->joined_largest[r], &work->joined_sum[r], from,
                     work->largest[r], work->sum[r], a->head_dim);
    }
}

FN void attend(const attention *a, const attention_task *task, void *scratch)
{
    attention_work work;
    work.padded = round_up(a->head_dim, MAX_TILE_ROWS);
    work.queries = scratch;
    work.output = work.queries + ATTENTION_ROWS * work.padded;
    work.joined = work.output + ATTENTION_ROWS * work.padded;
    work.keys = work.joined + ATTENTION_ROWS * work.padded;
    work.turned = work.keys + ATTENTION_KEYS * work.padded;
    work.values = work.turned + ATTENTION_KEYS * work.padded;
    work.scores = work.values + ATTENTION_KEYS * work.padded;
    load_queries(a, task, &work);
    for (int64_t first = task->key0 / ATTENTION_KEYS * ATTENTION_KEYS, end; first < task->key1; first = end) {
        end = min_int(task->key1, (first / SEGMENT_KEYS + 1) * SEGMENT_KEYS);
        attend_segment(a, task, first, end, &work);
    }
    for (int64_t r = 0; r < task->rows; r++) {
        const float *from = work.joined + r * work.padded;
        if (task->partial) {
            float *to = task->partial + r * (a->head_dim + 2);
            memcpy(to, from, (size_t)a->head_dim * sizeof(float));
            to[a->head_dim] = work.joined_largest[r];
            to[a->head_dim + 1] = work.joined_sum[r];
            continue;
        }
        int64_t token = (task->row0 + r) / task->n_group, head = task->group[(task->row0 + r) % task->n_group];
        float *to = a->out + ((a->query_starts[task->sequence] + token) * a->n_heads + head) * a->head_dim;
        float inverse = 1.0f / work.joined_sum[r];
        for (int64_t i = 0; i < a->head_dim; i++)
            to[i] = from[i] * inverse;
    }
}

FN void attend_merge(const float *partials, int64_t stride, int64_t n, int64_t head_dim, float *out)
{
    float largest = 0.0f, sum = 0.0f;
    for (int64_t p = 0; p < n; p++, partials += stride)
        join_segment(out, &largest, &sum, partials, partials[head_dim], partials[head_dim + 1], head_dim);
    float inverse = 1.0f / sum;
    for (int64_t i = 0; i < head_dim; i++)
        out[i] *= inverse;
}
