/* Products row by row, for one token or a few. Included by level.h only. */

/* Asks for the row that a thread which goes through the rows needs in some 4 KB: the hardware's prefetchers stop at page
 * boundaries and start anew with every plane and every chunk of rows. (Decoding, 24 instead of 20 GB/s of 25.) */
INLINE void prefetch_row(int type, const weight *w, int64_t row)
{
    int64_t ahead = row + 1 + 4096 / max_int(1, w->strides[QUANTS]);
    for (int plane = 0; plane < N_PLANES; plane++) {
        if (type_is_float(type) ? plane != QUANTS : w->planes[plane] == NULL)
            continue;
        uintptr_t from = (uintptr_t)w->planes[plane] + (uintptr_t)(ahead * w->strides[plane]);
        for (int64_t line = 0; line < w->strides[plane]; line += 64)
            __builtin_prefetch((const void *)(from + (uintptr_t)line));
    }
}

INLINE void row_planes(int type, const weight *w, int64_t row, const uint8_t **quants, const uint8_t **high)
{
    prefetch_row(type, w, row);
    *quants = plane_row(w, QUANTS, row);
    *high = high_bytes(type) ? plane_row(w, HIGH, row) : *quants;
}

/* Scales and minima of 16 groups from `g` on, of which `left` belong to the row (zeros after them). */
INLINE void load_sixteen(int type, const weight *w, int64_t row, int64_t g, int64_t left, const workspace *work,
                         vf scales[GROUPS / VL], vf minima[GROUPS / VL])
{
    for (int i = 0; i < GROUPS / VL; i++) {
        if (type_is_super(type) || type == MXFP4) { /* the row's were computed beforehand */
            scales[i] = vf_load(work->scales + g + i * VL);
            minima[i] = vf_load(work->minima + g + i * VL);
            continue;
        }
        int64_t n = max_int(0, min_int(VL, left - i * VL));
        scales[i] = vf_load_f16_n((const uint16_t *)plane_row(w, D, row) + g + i * VL, n);
        if (type_has_minimum(type))
            minima[i] = vf_load_f16_n((const uint16_t *)plane_row(w, MINIMUM, row) + g + i * VL, n);
        else if (fast_zero(type))
            minima[i] = vf_mul(scales[i], vf_set((float)-fast_zero(type)));
    }
}

/* acc += factor * (integer sums) + minimum * (sum of activations): what integer_tile does for many rows. */
INLINE lanes add_groups(lanes acc, const block_products *products, const vf *scales, const vf *minima, const float *d,
                        const float *sum, int unit, int has_minimum)
{
    vf sums[GROUPS / VL], factors[GROUPS / VL], offsets[GROUPS / VL];
    group_sums(products, unit, sums);
    for (int i = 0; i < GROUPS / VL; i++) {
        factors[i] = vf_mul(scales[i], vf_load(d + i * VL));
        offsets[i] = vf_load(sum + i * VL);
    }
    return lanes_add(acc, factors, sums, minima, offsets, has_minimum);
}

INLINE void multiply_one_fast(int type, const weight *w, int64_t r0, int64_t r1, const activations *a, destination to,
                              workspace *work)
{
    const int unit = type_unit(type);
    const int64_t cols = w->cols, size = unit_weights(unit), groups = (cols + size - 1) / size;
    const int64_t blocks = (cols + BLOCK - 1) / BLOCK, step = GROUPS * size / BLOCK;
    for (int64_t row = r0; row < r1; row++) {
        const uint8_t *quants, *high;
        float total = to.bias ? to.bias[row] : 0.0f;
        row_planes(type, w, row, &quants, &high);
        if (type_is_super(type) || type == MXFP4)
            load_scales(w, row, 0, cols, fast_zero(type), work->scales, work->minima);
        for (int64_t c0 = 0; c0 < cols; c0 += TILE_COLS) {
            lanes acc = lanes_zero();
            vf scales[GROUPS / VL], minima[GROUPS / VL];
            for (int64_t b = c0 / BLOCK, g = c0 / size; b < min_int(blocks, (c0 + TILE_COLS) / BLOCK);
                 b += step, g += GROUPS) {
                block_products products[GROUPS * 32 / BLOCK];
                load_sixteen(type, w, row, g, groups - g, work, scales, minima);
                if (cols >= (b + step) * BLOCK) /* unrolled: no block is short, none is missing */
                    for (int j = 0; j < step; j++)
                        products[j] = codes_multiply(load_fast_codes(type, quants, high, b + j, (b + step) * BLOCK),
                                                     a->q + (b + j) * BLOCK, unit, fast_is_signed(type));
                else
                    for (int j = 0; j < step; j++) {
                        products[j] = no_products();
                        if (b + j < blocks)
                            products[j] = codes_multiply(load_fast_codes(type, quants, high, b + j, cols),
                                                         a->q + (b + j) * BLOCK, unit, fast_is_signed(type));
                    }
                acc = add_groups(acc, products, scales, minima, a->d[unit] + g, a->sum[unit] + g, unit,
                                 fast_has_minimum(type));
            }
            total += lanes_sum(acc);
        }
        to.out[row] = total;
    }
}

INLINE void multiply_one_exact(int type, const weight *w, int64_t r0, int64_t r1, const activations *a, destination to,
                               workspace *work)
{
    int64_t cols = w->cols, blocks = (cols + BLOCK - 1) / BLOCK;
    int64_t per_block = type_is_float(type) ? 0 : BLOCK / unit_weights(type_unit(type));
    for (int64_t row = r0; row < r1; row++) {
        const uint8_t *quants, *high;
        row_planes(type, w, row, &quants, &high);
        if (!type_is_float(type))
            load_scales(w, row, 0, cols, 0, work->scales, work->minima);
        vf acc[4] = {vf_zero(), vf_zero(), vf_zero(), vf_zero()}, values[BLOCK / VL];
        for (int64_t b = 0; b < blocks; b++) {
            load_floats(type, quants, high, b, cols, work->scales + b * per_block, work->minima + b * per_block,
                        values);
            for (int i = 0; i < BLOCK / VL; i++)
                acc[i & 3] = vf_fma(values[i], vf_load(a->x + b * BLOCK + i * VL), acc[i & 3]);
        }
        to.out[row] = vf_sum(vf_add(vf_add(acc[0], acc[1]), vf_add(acc[2], acc[3]))) + (to.bias ? to.bias[row] : 0.0f);
    }
}

/* Decodes columns [c0, c0 + n) of a row, c0 a multiple of BLOCK, with zeros up to the next multiple. */
INLINE void decode_codes(int type, const weight *w, int64_t row, int64_t c0, int64_t n, uint8_t *out, float *scales,
                         float *minima)
{
    const uint8_t *quants, *high;
    row_planes(type, w, row, &quants, &high);
    load_scales(w, row, c0, n, fast_zero(type), scales, minima);
    for (int64_t b = c0 / BLOCK; b * BLOCK < c0 + n; b++)
        codes_store(out + b * BLOCK - c0, load_fast_codes(type, quants, high, b, w->cols));
}

INLINE void decode_floats(int type, const weight *w, int64_t row, int64_t c0, int64_t n, float *out, float *scales,
                          float *minima)
{
    const uint8_t *quants, *high;
    int64_t per_block = type_is_float(type) ? 0 : BLOCK / unit_weights(type_unit(type));
    row_planes(type, w, row, &quants, &high);
    if (!type_is_float(type))
        load_scales(w, row, c0, n, 0, scales, minima);
    for (int64_t b = 0; b * BLOCK < n; b++) {
        vf values[BLOCK / VL];
        load_floats(type, quants, high, c0 / BLOCK + b, w->cols, scales + b * per_block, minima + b * per_block,
                    values);
        for (int i = 0; i < BLOCK / VL; i++)
            vf_store(out + b * BLOCK + i * VL, values[i]);
    }
}

/* What is compiled for each type on its own. `fast` entries are null for float types. */
typedef void (*multiply_function)(const weight *w, int64_t r0, int64_t r1, const activations *a, destination to,
                                  workspace *work);
typedef struct {
    multiply_function one_fast, one_exact; /* for one token */
    void (*codes)(const weight *w, int64_t row, int64_t c0, int64_t n, uint8_t *out, float *scales, float *minima);
    void (*floats)(const weight *w, int64_t row, int64_t c0, int64_t n, float *out, float *scales, float *minima);
} type_functions;

#define DEFINE_EXACT(TYPE)                                                                                            \
    FN void one_exact_##TYPE(const weight *w, int64_t r0, int64_t r1, const activations *a, destination to,           \
                             workspace *work)                                                                         \
    {                                                                                                                 \
        multiply_one_exact(TYPE, w, r0, r1, a, to, work);                                                             \
    }                                                                                                                 \
    FN void floats_##TYPE(const weight *w, int64_t row, int64_t c0, int64_t n, float *out, float *scales,             \
                          float *minima)                                                                              \
    {                                                                                                                 \
        decode_floats(TYPE, w, row, c0, n, out, scales, minima);                                                      \
    }
#define DEFINE_FAST(TYPE)                                                                                             \
    FN void one_fast_##TYPE(const weight *w, int64_t r0, int64_t r1, const activations *a, destination to,            \
                            workspace *work)                                                                          \
    {                                                                                                                 \
        multiply_one_fast(TYPE, w, r0, r1, a, to, work);                                                              \
    }                                                                                                                 \
    FN void codes_##TYPE(const weight *w, int64_t row, int64_t c0, int64_t n, uint8_t *out, float *scales,            \
                         float *minima)                                                                               \
    {                                                                                                                 \
        decode_codes(TYPE, w, row, c0, n, out, scales, minima);                                                       \
    }
FOR_TYPES(DEFINE_EXACT)
FOR_QUANT_TYPES(DEFINE_FAST)

static const type_functions TYPES[N_TYPES] = {
    [F32] = {NULL, one_exact_F32, NULL, floats_F32},
    [F16] = {NULL, one_exact_F16, NULL, floats_F16},
    [BF16] = {NULL, one_exact_BF16, NULL, floats_BF16},
#define ENTRY(TYPE) [TYPE] = {one_fast_##TYPE, one_exact_##TYPE, codes_##TYPE, floats_##TYPE},
    FOR_QUANT_TYPES(ENTRY)
#undef ENTRY
};

/* One decoded row times `n` tokens from `t` on, added to out. `blocks`: those of the GROUPS groups from block b on. */
INLINE void dot_groups(int n, int unit, int is_signed, int64_t blocks, const uint8_t *row, const workspace *work,
                       const activations *a, int64_t t, int64_t b, lanes acc[4])
{
    const int64_t step = GROUPS * unit_weights(unit) / BLOCK, g = b * BLOCK / unit_weights(unit);
    vf scales[GROUPS / VL], minima[GROUPS / VL];
    for (int i = 0; i < GROUPS / VL; i++) {
        scales[i] = vf_load(work->scales + g + i * VL);
        minima[i] = vf_load(work->minima + g + i * VL);
    }
    for (int i = 0; i < n; i++) {
        const int8_t *q = a->q + (t + i) * a->padded + b * BLOCK;
        int64_t at = (t + i) * a->groups[unit] + g;
        block_products products[GROUPS * 32 / BLOCK];
        for (int j = 0; j < step; j++) {
            products[j] = no_products();
            if (j < blocks)
                products[j] = codes_multiply(codes_bytes(row + (b + j) * BLOCK), q + j * BLOCK, unit, is_signed);
        }
        acc[i] = add_groups(acc[i], products, scales, minima, a->d[unit] + at, a->sum[unit] + at, unit, !is_signed);
    }
}

INLINE void dot_codes(int n, int unit, int is_signed, const uint8_t *row, const workspace *work, const activations *a,
                      int64_t t, float *out)
{
    const int64_t step = GROUPS * unit_weights(unit) / BLOCK;
    for (int64_t c0 = 0; c0 < a->padded; c0 += TILE_COLS) {
        lanes acc[4];
        for (int i = 0; i < n; i++)
            acc[i] = lanes_zero();
        int64_t b = c0 / BLOCK, end = min_int(a->padded, c0 + TILE_COLS) / BLOCK;
        for (; b + step <= end; b += step)
            dot_groups(n, unit, is_signed, step, row, work, a, t, b, acc);
        if (b + 1 == end) /* worth its own code: 576 columns, say */
            dot_groups(n, unit, is_signed, 1, row, work, a, t, b, acc);
        else if (b < end)
            dot_groups(n, unit, is_signed, end - b, row, work, a, t, b, acc);
        for (int i = 0; i < n; i++)
            out[i] += lanes_sum(acc[i]);
    }
}

FN void dot_codes_of(int64_t n, int unit, int is_signed, const uint8_t *row, const workspace *work,
                     const activations *a, int64_t t, float *out)
{
#define TRY(N, UNIT, SIGNED)                                                                                          \
    if (n == N && unit == UNIT && is_signed == SIGNED)                                                                \
        dot_codes(N, UNIT, SIGNED, row, work, a, t, out);
#define TRY_ALL(N) TRY(N, UNIT32, 0) TRY(N, UNIT16, 0) TRY(N, UNIT32, 1)
    TRY_ALL(4) TRY_ALL(2) TRY_ALL(1)
#undef TRY_ALL
#undef TRY
}

INLINE void dot_floats(int n, const float *row, const activations *a, int64_t t, float *out)
{
    vf acc[4][2];
    for (int i = 0; i < n; i++)
        acc[i][0] = acc[i][1] = vf_zero();
    for (int64_t c = 0; c < a->padded; c += 2 * VL)
        for (int i = 0; i < n; i++)
            for (int j = 0; j < 2; j++)
                acc[i][j] = vf_fma(vf_load(row + c + j * VL), vf_load(a->x + (t + i) * a->x_stride + c + j * VL),
                                   acc[i][j]);
    for (int i = 0; i < n; i++)
        out[i] = vf_sum(vf_add(acc[i][0], acc[i][1]));
}

FN void dot_floats_of(int64_t n, const float *row, const activations *a, int64_t t, float *out)
{
    if (n == 4)
        dot_floats(4, row, a, t, out);
    else if (n == 2)
        dot_floats(2, row, a, t, out);
    else
        dot_floats(1, row, a, t, out);
}
