/* Division of attention into tasks, and writing of the cache. Included by native.c only. */

/* One token's heads to codes and scales. */
static void write_codes(const context *c, const float *from, int64_t heads, int64_t head_dim, int64_t slot,
                        int64_t block_size, int64_t cache_type, uint8_t *codes, uint16_t *scales)
{
    int64_t bytes = cache_bytes(cache_type, head_dim), groups = cache_groups(cache_type, head_dim);
    for (int64_t h = 0; h < heads; h++)
        c->table->to_codes(from + h * head_dim, head_dim, cache_type, codes + (slot * heads + h) * bytes,
                           scales + ((slot / block_size * heads + h) * block_size + slot % block_size) * groups);
}

/* Rows of k and v ([tokens, heads, head_dim], strides in floats) to cache rows `slots`, of n_slots. */
EXPORT int mt_write_kv(context *c, const float *k, const float *v, int64_t tokens, int64_t heads, int64_t head_dim,
                       int64_t k_stride, int64_t v_stride, uint8_t *k_cache, uint8_t *v_cache, uint16_t *k_scales,
                       uint16_t *v_scales, int64_t block_size, int64_t cache_type, const int64_t *slots,
                       int64_t n_slots)
{
    int64_t width = heads * head_dim, row_bytes = heads * cache_bytes(cache_type, head_dim);
    for (int64_t t = 0; t < tokens; t++)
        if (slots[t] < 0 || slots[t] >= n_slots)
            return BAD_INDEX;
    for (int64_t t = 0; t < tokens; t++) {
        if (cache_type >= CACHE_Q8) {
            write_codes(c, k + t * k_stride, heads, head_dim, slots[t], block_size, cache_type, k_cache, k_scales);
            write_codes(c, v + t * v_stride, heads, head_dim, slots[t], block_size, cache_type, v_cache, v_scales);
            continue;
        }
        c->table->to_cache(k + t * k_stride, k_cache + slots[t] * row_bytes, width, cache_type);
        c->table->to_cache(v + t * v_stride, v_cache + slots[t] * row_bytes, width, cache_type);
    }
    return 0;
}

typedef struct {
    const context *c;
    const attention *a;
    attention_task *tasks;
} attention_job;

static void attention_chunk(void *argument, int64_t chunk, void *scratch)
{
    const attention_job *job = argument;
    job->c->table->attend(job->a, &job->tasks[chunk], scratch);
}

#define MOST_PARTIAL_BYTES (64 << 20) /* keys are not divided among tasks where their results would be larger */

/* Query heads sorted by the KV head they read: heads[first[kv] .. first[kv + 1]). */
static void group_heads(const attention *a, int32_t *heads, int64_t *first)
{
    int64_t n = 0;
    for (int64_t kv = 0; kv < a->n_kv_heads; kv++) {
        first[kv] = n;
        for (int64_t head = 0; head < a->n_heads; head++)
            if (a->kv_map[head] == kv)
                heads[n++] = (int32_t)head;
    }
    first[a->n_kv_heads] = n;
}

/* Tasks for all (sequence, KV head, rows), with `split` one for each segment of the keys; counts only while `tasks` is
 * null. partials: null, or room for `partial_floats` a task. Last rows come first, as they see most keys. */
static int64_t list_tasks(const attention *a, const int32_t *heads, const int64_t *first, int split, float *partials,
                          int64_t partial_floats, attention_task *tasks)
{
    int64_t n = 0;
    for (int64_t s = 0; s < a->n_sequences; s++)
        for (int64_t kv = 0; kv < a->n_kv_heads; kv++) {
            int64_t group = first[kv + 1] - first[kv], rows = a->query_lens[s] * group;
            for (int64_t row0 = rows > 0 ? (rows - 1) / ATTENTION_ROWS * ATTENTION_ROWS : -1; row0 >= 0;
                 row0 -= ATTENTION_ROWS) {
                int64_t count = min_int(ATTENTION_ROWS, rows - row0), context = a->context_lens[s], before = n;
                int64_t last = context + (row0 + count - 1) / group + 1, oldest = context + row0 / group;
                int64_t key0 = a->window ? max_int(0, oldest - a->window + 1) : 0, key1;
                for (; key0 < last; key0 = key1, n++) {
                    key1 = split ? min_int(last, (key0 / SEGMENT_KEYS + 1) * SEGMENT_KEYS) : last;
                    float *partial = partials ? partials + n * partial_floats : NULL;
                    if (tasks)
                        tasks[n] = (attention_task){s, kv, row0, count, key0, key1, group, heads + first[kv],
                                                    0, partial};
                }
                if (tasks)
                    tasks[before].parts = n - before;
            }
        }
    return n;
}

static void merge_tasks(const context *c, const attention *a, const attention_task *tasks, int64_t n,
                        int64_t partial_floats)
{
    for (int64_t i = 0; i < n; i += tasks[i].parts)
        for (int64_t r = 0; r < tasks[i].rows; r++) {
            int64_t row = tasks[i].row0 + r, token = a->query_starts[tasks[i].sequence] + row / tasks[i].n_group;
            float *out = a->out + (token * a->n_heads + tasks[i].group[row % tasks[i].n_group]) * a->head_dim;
            const float *partials = tasks[i].partial + r * (a->head_dim + 2);
            c->table->attend_merge(partials, partial_floats, tasks[i].parts, a->head_dim, out);
        }
}

/* Floats of one task's result: as many rows as the largest has. */
static int64_t largest_partial(const attention *a, const int64_t *first)
{
    int64_t tokens = 0, group = 0;
    for (int64_t s = 0; s < a->n_sequences; s++)
        tokens = max_int(tokens, a->query_lens[s]);
    for (int64_t kv = 0; kv < a->n_kv_heads; kv++)
        group = max_int(group, first[kv + 1] - first[kv]);
    return min_int(ATTENTION_ROWS, tokens * group) * (a->head_dim + 2);
}

static int check_blocks(const attention *a, int64_t n_blocks)
{
    for (int64_t s = 0; s < a->n_sequences; s++) {
        int64_t keys = a->context_lens[s] + a->query_lens[s], blocks = (keys + a->block_size - 1) / a->block_size;
        if (a->query_lens[s] < 0 || a->context_lens[s] < 0 || blocks > a->table_stride)
            return BAD_INDEX;
        for (int64_t b = 0; b < blocks && a->query_lens[s]; b++)
            if (a->tables[s * a->table_stride + b] < 0 || a->tables[s * a->table_stride + b] >= n_blocks)
                return BAD_INDEX;
    }
    for (int64_t h = 0; h < a->n_heads; h++)
        if (a->kv_map[h] < 0 || a->kv_map[h] >= a->n_kv_heads)
            return BAD_INDEX;
    return 0;
}

static int run_attention(context *c, const attention *a)
{
    attention_job job = {.c = c, .a = a};
    int64_t padded = round_up(a->head_dim, MAX_TILE_ROWS), keys = 0;
    int64_t scratch = (3 * ATTENTION_ROWS + 3 * ATTENTION_KEYS) * padded + ATTENTION_ROWS * ATTENTION_KEYS;
    int64_t first_bytes = (a->n_kv_heads + 1) * (int64_t)sizeof(int64_t);
    int64_t head_bytes = round_up(a->n_heads * (int64_t)sizeof(int32_t), 64);
    uint8_t *heads_memory = malloc((size_t)(head_bytes + first_bytes));
    if (!heads_memory)
        return OUT_OF_MEMORY;
    int32_t *heads = (int32_t *)heads_memory;
    int64_t *first = (int64_t *)(heads_memory + head_bytes);
    group_heads(a, heads, first);
    int64_t n = list_tasks(a, heads, first, 0, NULL, 0, NULL), partial_floats = largest_partial(a, first);
    int64_t parts = list_tasks(a, heads, first, 1, NULL, 0, NULL);
    int64_t partial_bytes = parts * partial_floats * (int64_t)sizeof(float);
    int few = c->threads.threads > 1 && n < 4 * c->threads.threads; /* fewer than threads can share well */
    int split = few && parts > n && partial_bytes <= MOST_PARTIAL_BYTES;
    n = split ? parts : n;
    int64_t task_bytes = round_up(n * (int64_t)sizeof(attention_task), 64);
    int status = reserve(&c->extra_memory, &c->extra_bytes, task_bytes + (split ? partial_bytes : 0));
    if (status == 0)
        status = pool_reserve(&c->threads, scratch * (int64_t)sizeof(float));
    if (status == 0) {
        job.tasks = (attention_task *)c->extra_memory;
        float *partials = split ? (float *)(c->extra_memory + task_bytes) : NULL;
        list_tasks(a, heads, first, split, partials, partial_floats, job.tasks);
        for (int64_t i = 0; i < n; i++)
            keys += job.tasks[i].rows * (job.tasks[i].key1 - job.tasks[i].key0);
        pool_run(&c->threads, attention_chunk, &job, n, 2 * keys * a->head_dim >= PARALLEL_WORK);
        if (split)
            merge_tasks(c, a, job.tasks, n, partial_floats);
    }
    free(heads_memory);
    return status;
}

/* Softmax attention of every sequence's query tokens to its cached keys, their own included. n_blocks: of the cache. */
EXPORT int mt_attention(context *c, const attention *a, int64_t n_blocks)
{
    int status = check_blocks(a, n_blocks);
    if (status == 0) {
        pthread_mutex_lock(&c->mutex);
        status = run_attention(c, a);
        pthread_mutex_unlock(&c->mutex);
    }
    return status;
}
