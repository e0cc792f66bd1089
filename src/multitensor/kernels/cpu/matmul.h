/* Products of packed weights and activations, over one level's vector primitives. Included by level_*.c only.
 *
 * Fast: weight = scale[g] * code + minimum[g], activation = d[g] * q, both per scale group g, so a product is
 *     sum over g of scale[g] * d[g] * (integer dot product) + minimum[g] * sum[g],   sum[g] = d[g] * (sum of q).
 * Exact: weights become floats in ggml's own order of operations and meet float activations.
 * Few tokens: a row is decoded (in registers for one token) and multiplied by all tokens. Many: a tile of rows is
 * decoded and packed so that a vector holds one column of all its rows, and meets broadcast activations. */

static const int8_t IQ4_VALUES[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
/* Twice the E2M1 values, and 12 more, so that they are unsigned. */
static const int8_t E2M1_SHIFTED[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};

#define FOR_QUANT_TYPES(X)                                                                                            \
    X(Q4_0) X(Q4_1) X(Q5_0) X(Q5_1) X(Q8_0) X(Q2_K) X(Q3_K) X(Q4_K) X(Q5_K) X(Q6_K) X(IQ4_NL) X(IQ4_XS) X(MXFP4)
#define FOR_TYPES(X) X(F32) X(F16) X(BF16) FOR_QUANT_TYPES(X)

/* ---- facts about types: free where `type` is a constant, as it is in all that runs once a block ---- */

INLINE int type_is_signed(int type) { return type == Q8_0 || type == IQ4_NL || type == IQ4_XS; }
INLINE int type_is_super(int type) { return (type >= Q2_K && type <= Q6_K) || type == IQ4_XS; }
INLINE int type_has_minimum(int type)
{
    return type == Q4_1 || type == Q5_1 || type == Q2_K || type == Q4_K || type == Q5_K;
}
INLINE int type_zero(int type) /* subtracted from the code before scaling */
{
    return type == Q4_0 ? 8 : type == Q5_0 ? 16 : type == Q3_K ? 4 : type == Q6_K ? 32 : type == MXFP4 ? 12 : 0;
}
INLINE int fast_is_signed(int type) { return type_is_signed(type) && SIGNED_BIAS == 0; }
INLINE int fast_zero(int type) { return type_is_signed(type) ? SIGNED_BIAS : type_zero(type); }
INLINE int fast_has_minimum(int type) { return type_has_minimum(type) || fast_zero(type) != 0; }
INLINE int64_t quants_bytes(int type) /* of one BLOCK */
{
    return type == Q8_0 ? 64 : type == Q2_K || type == Q3_K ? 16 : 32;
}
INLINE int64_t high_bytes(int type)
{
    return type == Q5_0 || type == Q5_1 || type == Q5_K || type == Q3_K ? 8 : type == Q6_K ? 16 : 0;
}

INLINE const uint8_t *plane_row(const weight *w, int plane, int64_t row)
{
    return w->planes[plane] + row * w->strides[plane];
}

/* ---- scales ---- */

INLINE void halves_to_floats(const uint16_t *from, int64_t n, float *to) /* writes up to the next multiple of VL */
{
    int64_t i = 0;
    for (; i + VL <= n; i += VL)
        vf_store(to + i, vf_load_f16(from + i));
    if (i < n)
        vf_store(to + i, vf_load_f16_n(from + i, n - i));
}

/* Half of 2**(e - 127), since the table of values holds their doubles. */
INLINE float e8m0_half(uint8_t e)
{
    uint32_t bits = e < 2 ? 0x00200000u << e : (uint32_t)(e - 1) << 23;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* One number a super-block, times `sign`, to each of its scale groups from `first` on. Writes up to VL - 1 numbers past
 * the n-th; workspaces have room for them. */
INLINE void spread_blocks(const uint8_t *halves, int64_t first, int64_t n, int64_t per_block, float sign, float *to)
{
    int64_t block = first / per_block, g = 0;
    for (int64_t end = min_int(n, (block + 1) * per_block - first); g < n; end = g + per_block, block++) {
        uint16_t half;
        memcpy(&half, halves + 2 * block, sizeof half);
        vf value = vf_set(sign * half_to_float(half));
        for (; g < end; g += VL)
            vf_store(to + g, value);
        g = end;
    }
}

INLINE vf vf_load_bytes(const uint8_t *p, int64_t n, int is_signed) /* the first min(n, VL) bytes as floats */
{
    uint8_t padded[VL] = {0};
    if (n < VL) {
        memcpy(padded, p, (size_t)n);
        p = padded;
    }
    return is_signed ? vf_load_i8((const int8_t *)p) : vf_load_u8(p);
}

INLINE void super_block_scales(int type, const weight *w, int64_t row, int64_t first, int64_t n, float *scales,
                               float *minima)
{
    int64_t size = unit_weights(type_unit(type)), begin = first + w->phase / size;
    const uint8_t *packed = plane_row(w, SCALES, row) + first;
    const uint8_t *mins = type == Q4_K || type == Q5_K ? plane_row(w, MINS, row) + first : packed;
    spread_blocks(plane_row(w, D, row), begin, n, 256 / size, 1.0f, scales);
    if (type_has_minimum(type))
        spread_blocks(plane_row(w, MINIMUM, row), begin, n, 256 / size, -1.0f, minima);
    for (int64_t g = 0; g < n; g += VL) {
        vf scale = vf_load_bytes(packed + g, n - g, !type_has_minimum(type));
        vf minimum = type == Q2_K ? vf_zero() : vf_load_bytes(mins + g, n - g, 0);
        if (type == Q2_K) { /* scale in the low nibble, minimum in the high one: v / 16 rounded down (to +0, not -0) */
            minimum = vf_add(vf_round(vf_sub(vf_mul(scale, vf_set(0.0625f)), vf_set(0.46875f))), vf_zero());
            scale = vf_sub(scale, vf_mul(minimum, vf_set(16.0f)));
        }
        vf_store(scales + g, vf_mul(vf_load(scales + g), scale));
        if (type_has_minimum(type))
            vf_store(minima + g, vf_mul(vf_load(minima + g), minimum));
    }
}

INLINE void plain_scales(int type, const weight *w, int64_t row, int64_t first, int64_t n, float *scales, float *minima)
{
    if (type == MXFP4) {
        const uint8_t *exponents = plane_row(w, SCALES, row) + first;
        for (int64_t g = 0; g < n; g++)
            scales[g] = e8m0_half(exponents[g]);
        return;
    }
    halves_to_floats((const uint16_t *)plane_row(w, D, row) + first, n, scales);
    if (type_has_minimum(type))
        halves_to_floats((const uint16_t *)plane_row(w, MINIMUM, row) + first, n, minima);
}

/* Scales, and minima where the type has them, of columns [c0, c0 + n) of a row; zeros up to the end of the last
 * vector of 16 groups. `zero`: a code's zero point, moved into the minima. */
FN void load_scales(const weight *w, int64_t row, int64_t c0, int64_t n, int zero, float *scales, float *minima)
{
    int64_t size = unit_weights(type_unit(w->type)), first = c0 / size, groups = (n + size - 1) / size;
    int64_t end = round_up(groups, 16);
    switch (w->type) {
#define SUPER(TYPE)                                                                                                   \
    case TYPE: super_block_scales(TYPE, w, row, first, groups, scales, minima); break;
        SUPER(Q2_K) SUPER(Q3_K) SUPER(Q4_K) SUPER(Q5_K) SUPER(Q6_K) SUPER(IQ4_XS)
#undef SUPER
    case Q4_1: case Q5_1: plain_scales(Q4_1, w, row, first, groups, scales, minima); break;
    case MXFP4: plain_scales(MXFP4, w, row, first, groups, scales, minima); break;
    default: plain_scales(Q4_0, w, row, first, groups, scales, minima); break;
    }
    for (int64_t g = groups; g < end; g++)
        scales[g] = minima[g] = 0.0f;
    if (zero && type_has_minimum(w->type))
        for (int64_t g = 0; g < end; g += VL)
            vf_store(minima + g, vf_fma(vf_load(scales + g), vf_set((float)-zero), vf_load(minima + g)));
    else if (zero)
        for (int64_t g = 0; g < end; g += VL)
            vf_store(minima + g, vf_mul(vf_load(scales + g), vf_set((float)-zero)));
}

/* ---- codes and floats of one block of 64 weights ---- */

INLINE codes codes_of(int type, const uint8_t *quants, const uint8_t *high)
{
    switch (type) {
    case Q5_0: case Q5_1: case Q5_K: return codes_add_bits(codes_nibbles32(quants), high, 16);
    case Q8_0: return codes_bytes(quants);
    case Q2_K: return codes_pairs(quants);
    case Q3_K: return codes_add_bits(codes_pairs(quants), high, 4);
    case Q6_K: return codes_add_high(codes_nibbles16(quants), codes_pairs(high));
    case IQ4_NL: case IQ4_XS: return codes_lookup(codes_nibbles32(quants), IQ4_VALUES);
    case MXFP4: return codes_lookup(codes_nibbles32(quants), E2M1_SHIFTED);
    default: return codes_nibbles32(quants);
    }
}

/* Block `b` of a row whose planes begin at quants and high; the last block of `cols` columns may be short, and nothing
 * behind its end is read. */
INLINE codes load_codes(int type, const uint8_t *quants, const uint8_t *high, int64_t b, int64_t cols)
{
    int64_t left = cols - b * BLOCK, q = quants_bytes(type), h = high_bytes(type);
    if (left >= BLOCK)
        return codes_of(type, quants + b * q, h ? high + b * h : high);
    uint8_t last_quants[BLOCK] = {0}, last_high[BLOCK] = {0};
    memcpy(last_quants, quants + b * q, (size_t)(left * q / BLOCK));
    if (h)
        memcpy(last_high, high + b * h, (size_t)(left * h / BLOCK));
    return codes_of(type, last_quants, last_high);
}

/* Codes as codes_dot wants them: signed ones biased where the level multiplies unsigned by signed only. */
INLINE codes load_fast_codes(int type, const uint8_t *quants, const uint8_t *high, int64_t b, int64_t cols)
{
    codes c = load_codes(type, quants, high, b, cols);
    return SIGNED_BIAS != 0 && type_is_signed(type) ? codes_subtract(c, -SIGNED_BIAS) : c;
}

INLINE vf bf16_floats(const uint16_t *p)
{
    uint32_t bits[VL];
    for (int i = 0; i < VL; i++)
        bits[i] = (uint32_t)p[i] << 16;
    vf v;
    memcpy(&v, bits, sizeof v);
    return v;
}

INLINE void float_block(int type, const uint8_t *p, vf out[BLOCK / VL])
{
    for (int i = 0; i < BLOCK / VL; i++)
        out[i] = type == F32   ? vf_load((const float *)p + i * VL)
                 : type == F16 ? vf_load_f16((const uint16_t *)p + i * VL)
                               : bf16_floats((const uint16_t *)p + i * VL);
}

/* The 64 weights of block `b` as floats, bit for bit ggml's. scales, minima: of the block's first group on. */
INLINE void load_floats(int type, const uint8_t *quants, const uint8_t *high, int64_t b, int64_t cols,
                        const float *scales, const float *minima, vf out[BLOCK / VL])
{
    if (type_is_float(type)) {
        int64_t size = type == F32 ? 4 : 2, left = cols - b * BLOCK;
        const uint8_t *p = quants + b * BLOCK * size;
        uint8_t last[BLOCK * 4] = {0};
        if (left < BLOCK) {
            memcpy(last, p, (size_t)(left * size));
            p = last;
        }
        float_block(type, p, out);
        return;
    }
    codes c = load_codes(type, quants, high, b, cols);
    if (type_zero(type))
        c = codes_subtract(c, type_zero(type));
    for (int i = 0; i < BLOCK / VL; i++) {
        int64_t g = i * VL / unit_weights(type_unit(type));
        out[i] = vf_mul(codes_floats(c, i), vf_set(scales[g]));
        if (type_has_minimum(type))
            out[i] = vf_add(out[i], vf_set(minima[g]));
    }
}

/* ---- rows one by one ---- */

INLINE void row_planes(int type, const weight *w, int64_t row, const uint8_t **quants, const uint8_t **high)
{
    *quants = plane_row(w, QUANTS, row);
    *high = high_bytes(type) ? plane_row(w, HIGH, row) : *quants;
}

/* Scales and minima of 16 groups from `g` on, of which `left` belong to the row (zeros after them). */
INLINE void load_sixteen(int type, const weight *w, int64_t row, int64_t g, int64_t left, const workspace *work,
                         vf scales[16 / VL], vf minima[16 / VL])
{
    for (int i = 0; i < 16 / VL; i++) {
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

INLINE void multiply_one_fast(int type, const weight *w, int64_t r0, int64_t r1, const activations *a, destination to,
                              workspace *work)
{
    const int unit = type_unit(type);
    const int64_t cols = w->cols, size = unit_weights(unit), groups = (cols + size - 1) / size;
    const int64_t blocks = (cols + BLOCK - 1) / BLOCK, step = 16 * size / BLOCK;
    for (int64_t row = r0; row < r1; row++) {
        const uint8_t *quants, *high;
        row_planes(type, w, row, &quants, &high);
        if (type_is_super(type) || type == MXFP4)
            load_scales(w, row, 0, cols, fast_zero(type), work->scales, work->minima);
        vf acc[2] = {vf_zero(), vf_zero()}, below = vf_zero(), scales[16 / VL], minima[16 / VL];
        for (int64_t b = 0, g = 0; b < blocks; b += step, g += 16) {
            load_sixteen(type, w, row, g, groups - g, work, scales, minima);
            if (fast_has_minimum(type))
                for (int i = 0; i < 16 / VL; i++)
                    below = vf_fma(minima[i], vf_load(a->sum[unit] + g + i * VL), below);
            for (int i = 0; i < 16 / VL; i++)
                scales[i] = vf_mul(scales[i], vf_load(a->d[unit] + g + i * VL));
            factors f = factors_of(scales);
            if (cols >= (b + step) * BLOCK) /* unrolled: no block is short, none is missing */
                for (int j = 0; j < step; j++)
                    acc[j & 1] = codes_dot_factors(acc[j & 1], load_fast_codes(type, quants, high, b + j, (b + step) * BLOCK),
                                                   a->q + (b + j) * BLOCK, f, j, unit, fast_is_signed(type));
            else
                for (int j = 0; b + j < blocks; j++)
                    acc[j & 1] = codes_dot_factors(acc[j & 1], load_fast_codes(type, quants, high, b + j, cols),
                                                   a->q + (b + j) * BLOCK, f, j, unit, fast_is_signed(type));
        }
        to.out[row] = vf_sum(vf_add(vf_add(acc[0], acc[1]), below)) + (to.bias ? to.bias[row] : 0.0f);
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

/* One decoded row times `n` tokens from `t` on. */
INLINE void dot_codes(int n, int unit, int is_signed, const uint8_t *row, const workspace *work, const activations *a,
                      int64_t t, float *out)
{
    int64_t per_block = BLOCK / unit_weights(unit), stride = a->groups[unit];
    vf acc[4] = {vf_zero(), vf_zero(), vf_zero(), vf_zero()};
    for (int64_t b = 0; b < a->padded / BLOCK; b++) {
        codes c = codes_bytes(row + b * BLOCK);
        for (int i = 0; i < n; i++)
            acc[i] = codes_dot(acc[i], c, a->q + (t + i) * a->padded + b * BLOCK, work->scales + b * per_block,
                               a->d[unit] + (t + i) * stride + b * per_block, unit, is_signed);
    }
    if (!is_signed)
        for (int64_t g = 0; g < a->padded / BLOCK * per_block; g += VL)
            for (int i = 0; i < n; i++)
                acc[i] = vf_fma(vf_load(work->minima + g), vf_load(a->sum[unit] + (t + i) * stride + g), acc[i]);
    for (int i = 0; i < n; i++)
        out[i] = vf_sum(acc[i]);
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

/* ---- packed tiles ---- */

#define TILE_ROWS (2 * VL)

/* out (+)= w x, for `n` tokens, 2 * VL neighbouring outputs and `depth` columns: column k of w at w + k * w_stride. */
INLINE void float_tile(int n, const float *w, int64_t w_stride, const float *x, int64_t x_stride, int64_t depth,
                       float *out, int64_t out_stride, int accumulate)
{
    vf acc[FLOAT_TOKENS][2];
    for (int i = 0; i < n; i++)
        for (int j = 0; j < 2; j++)
            acc[i][j] = accumulate ? vf_load(out + i * out_stride + j * VL) : vf_zero();
    for (int64_t k = 0; k < depth; k++) {
        vf w0 = vf_load(w + k * w_stride), w1 = vf_load(w + k * w_stride + VL);
        for (int i = 0; i < n; i++) {
            vf value = vf_set(x[i * x_stride + k]);
            acc[i][0] = vf_fma(w0, value, acc[i][0]);
            acc[i][1] = vf_fma(w1, value, acc[i][1]);
        }
    }
    for (int i = 0; i < n; i++)
        for (int j = 0; j < 2; j++)
            vf_store(out + i * out_stride + j * VL, acc[i][j]);
}

/* As float_tile for any number of tokens. */
FN void float_tiles(int64_t tokens, const float *w, int64_t w_stride, const float *x, int64_t x_stride, int64_t depth,
                    float *out, int64_t out_stride, int accumulate)
{
    while (tokens > 0) {
        int n = 1;
#define TRY(N)                                                                                                        \
    if (N <= FLOAT_TOKENS && tokens >= N && n == 1) {                                                                 \
        float_tile(N <= FLOAT_TOKENS ? N : 1, w, w_stride, x, x_stride, depth, out, out_stride, accumulate);          \
        n = N;                                                                                                        \
    }
        TRY(12) TRY(6) TRY(4) TRY(2)
#undef TRY
        if (n == 1)
            float_tile(1, w, w_stride, x, x_stride, depth, out, out_stride, accumulate);
        tokens -= n;
        x += n * x_stride;
        out += n * out_stride;
    }
}

/* Rows [0, n) of `from`, `stride` dwords apart, to columns of `to`, `width` dwords wide; n a multiple of 4. */
INLINE void pack_dwords(const uint32_t *from, int64_t stride, int64_t n, uint32_t *to, int64_t width)
{
    for (int64_t k = 0; k < n; k += 4)
        transpose4(from + k, stride, to + k * width, width);
}

/* Adds a tile's results (TILE_ROWS a token) to where they belong; the first chunk of columns sets, with the bias. */
FN void store_tile(const float *result, int64_t tokens, int64_t t, int64_t r0, int64_t rows, destination to,
                   int first_chunk)
{
    for (int64_t i = 0; i < tokens; i++) {
        float *out = to.out + (t + i) * to.stride + r0;
        for (int64_t j = 0; j < rows; j++) {
            float before = first_chunk ? (to.bias ? to.bias[r0 + j] : 0.0f) : out[j];
            out[j] = before + result[i * TILE_ROWS + j];
        }
    }
}

FN void multiply_tile_exact(const weight *w, int64_t r0, int64_t rows, const activations *a,
                                destination to, workspace *work)
{
    const int64_t chunk = TILE_COLS / 4, batch = 4 * FLOAT_TOKENS;
    float result[4 * FLOAT_TOKENS * TILE_ROWS], *tile = (float *)work->tile;
    for (int64_t c0 = 0; c0 < w->cols; c0 += chunk) {
        int64_t n = min_int(chunk, w->cols - c0), depth = round_up(n, BLOCK);
        for (int64_t r = 0; r < TILE_ROWS; r += 4) {
            for (int64_t i = 0; i < 4; i++)
                if (r + i < rows)
                    TYPES[w->type].floats(w, r0 + r + i, c0, n, work->rows + i * depth, work->scales, work->minima);
                else
                    memset(work->rows + i * depth, 0, (size_t)depth * sizeof(float));
            pack_dwords((uint32_t *)work->rows, depth, depth, (uint32_t *)tile + r, TILE_ROWS);
        }
        for (int64_t t = 0; t < a->tokens; t += batch) {
            int64_t tokens = min_int(batch, a->tokens - t);
            float_tiles(tokens, tile, TILE_ROWS, a->x + t * a->x_stride + c0, a->x_stride, depth, result, TILE_ROWS,
                        0);
            store_tile(result, tokens, t, r0, rows, to, c0 == 0);
        }
    }
}

#if PACKED_INTEGERS
/* result = tile times `n` tokens from `t` on, for `groups` scale groups from column c0 on. */
INLINE void integer_tile(int n, int unit, int is_signed, const workspace *work, const activations *a, int64_t t,
                         int64_t c0, int64_t groups, float *result)
{
    const int64_t size = unit_weights(unit), stride = a->groups[unit];
    const float *d = a->d[unit] + t * stride + c0 / size, *sum = a->sum[unit] + t * stride + c0 / size;
    const int8_t *q = a->q + t * a->padded + c0;
    vf acc[INTEGER_TOKENS][2];
    for (int i = 0; i < n; i++)
        acc[i][0] = acc[i][1] = vf_zero();
    for (int64_t g = 0; g < groups; g++) {
        const uint8_t *w = work->tile + g * size * TILE_ROWS;
        vi products[INTEGER_TOKENS][2];
        for (int i = 0; i < n; i++)
            products[i][0] = products[i][1] = vi_zero();
        for (int64_t k = 0; k < size; k += 4) {
            vi w0 = vi_load(w + k * TILE_ROWS), w1 = vi_load(w + k * TILE_ROWS + 4 * VL);
            for (int i = 0; i < n; i++) {
                vi x = vi_broadcast(q + i * a->padded + g * size + k);
                products[i][0] = vi_dot(products[i][0], w0, x, is_signed);
                products[i][1] = vi_dot(products[i][1], w1, x, is_signed);
            }
        }
        for (int j = 0; j < 2; j++) {
            vf scale = vf_load(work->tile_scales + g * TILE_ROWS + j * VL);
            for (int i = 0; i < n; i++)
                acc[i][j] = vf_fma(vf_mul(scale, vf_set(d[i * stride + g])), vi_to_float(products[i][j]), acc[i][j]);
            if (!is_signed) {
                vf minimum = vf_load(work->tile_minima + g * TILE_ROWS + j * VL);
                for (int i = 0; i < n; i++)
                    acc[i][j] = vf_fma(minimum, vf_set(sum[i * stride + g]), acc[i][j]);
            }
        }
    }
    for (int i = 0; i < n; i++)
        for (int j = 0; j < 2; j++)
            vf_store(result + i * TILE_ROWS + j * VL, acc[i][j]);
}

/* n: INTEGER_TOKENS or 1 */
FN void integer_tile_of(int64_t n, int unit, int is_signed, const workspace *work, const activations *a, int64_t t,
                        int64_t c0, int64_t groups, float *result)
{
#define TRY(N, UNIT, SIGNED)                                                                                          \
    if (n == N && unit == UNIT && is_signed == SIGNED)                                                                \
        integer_tile(N, UNIT, SIGNED, work, a, t, c0, groups, result);
#define TRY_ALL(N) TRY(N, UNIT32, 0) TRY(N, UNIT16, 0) TRY(N, UNIT32, 1)
    TRY_ALL(INTEGER_TOKENS) TRY_ALL(1)
#undef TRY_ALL
#undef TRY
}

FN void multiply_tile_fast(const weight *w, int64_t r0, int64_t rows, const activations *a, destination to,
                           workspace *work)
{
    const int unit = type_unit(w->type), is_signed = fast_is_signed((int)w->type);
    const int64_t size = unit_weights(unit);
    float result[INTEGER_TOKENS * TILE_ROWS];
    for (int64_t c0 = 0; c0 < w->cols; c0 += TILE_COLS) {
        int64_t n = min_int(TILE_COLS, w->cols - c0), depth = round_up(n, BLOCK), stride = padded_groups(depth, unit);
        uint8_t *decoded = (uint8_t *)work->rows;
        for (int64_t r = 0; r < TILE_ROWS; r += 4) {
            memset(work->scales, 0, (size_t)(4 * stride) * sizeof(float));
            memset(work->minima, 0, (size_t)(4 * stride) * sizeof(float));
            for (int64_t i = 0; i < 4; i++)
                if (r + i < rows)
                    TYPES[w->type].codes(w, r0 + r + i, c0, n, decoded + i * depth, work->scales + i * stride,
                                         work->minima + i * stride);
                else
                    memset(decoded + i * depth, 0, (size_t)depth);
            pack_dwords((uint32_t *)decoded, depth / 4, depth / 4, (uint32_t *)work->tile + r, TILE_ROWS);
            pack_dwords((uint32_t *)work->scales, stride, depth / size, (uint32_t *)work->tile_scales + r, TILE_ROWS);
            pack_dwords((uint32_t *)work->minima, stride, depth / size, (uint32_t *)work->tile_minima + r, TILE_ROWS);
        }
        for (int64_t t = 0, tokens; t < a->tokens; t += tokens) {
            tokens = a->tokens - t >= INTEGER_TOKENS ? INTEGER_TOKENS : 1;
            integer_tile_of(tokens, unit, is_signed, work, a, t, c0, depth / size, result);
            store_tile(result, tokens, t, r0, rows, to, c0 == 0);
        }
    }
}
#endif

/* ---- the functions of the table ---- */

INLINE void set_bias_only(int64_t r0, int64_t r1, const activations *a, destination to) /* no columns */
{
    for (int64_t t = 0; t < a->tokens; t++)
        for (int64_t row = r0; row < r1; row++)
            to.out[t * to.stride + row] = to.bias ? to.bias[row] : 0.0f;
}

INLINE int64_t next_tokens(int64_t left) /* that a decoded row meets at once */
{
    return left >= 4 ? 4 : left >= 2 ? 2 : 1;
}

INLINE void store_row(const float *out, int64_t n, int64_t t, int64_t row, destination to)
{
    for (int64_t i = 0; i < n; i++)
        to.out[(t + i) * to.stride + row] = out[i] + (to.bias ? to.bias[row] : 0.0f);
}

FN void multiply_fast(const weight *w, int64_t r0, int64_t r1, const activations *a, destination to, void *scratch)
{
    const int unit = type_unit(w->type), is_signed = fast_is_signed((int)w->type);
    workspace work;
    float out[4];
    carve_workspace(a->padded, scratch, &work);
    if (w->cols == 0) {
        set_bias_only(r0, r1, a, to);
    } else if (a->tokens == 1) {
        TYPES[w->type].one_fast(w, r0, r1, a, to, &work);
#if PACKED_INTEGERS
    } else if (a->tokens > GEMV_TOKENS) {
        for (int64_t row = r0; row < r1; row += TILE_ROWS)
            multiply_tile_fast(w, row, min_int(TILE_ROWS, r1 - row), a, to, &work);
#endif
    } else {
        for (int64_t row = r0; row < r1; row++) {
            TYPES[w->type].codes(w, row, 0, w->cols, (uint8_t *)work.rows, work.scales, work.minima);
            for (int64_t t = 0, n; t < a->tokens; t += n) {
                n = next_tokens(a->tokens - t);
                dot_codes_of(n, unit, is_signed, (uint8_t *)work.rows, &work, a, t, out);
                store_row(out, n, t, row, to);
            }
        }
    }
}

FN void multiply_exact(const weight *w, int64_t r0, int64_t r1, const activations *a, destination to, void *scratch)
{
    workspace work;
    float out[4];
    carve_workspace(a->padded, scratch, &work);
    if (w->cols == 0) {
        set_bias_only(r0, r1, a, to);
    } else if (a->tokens == 1) {
        TYPES[w->type].one_exact(w, r0, r1, a, to, &work);
    } else if (a->tokens > GEMV_TOKENS) {
        for (int64_t row = r0; row < r1; row += TILE_ROWS)
            multiply_tile_exact(w, row, min_int(TILE_ROWS, r1 - row), a, to, &work);
    } else {
        for (int64_t row = r0; row < r1; row++) {
            TYPES[w->type].floats(w, row, 0, w->cols, work.rows, work.scales, work.minima);
            for (int64_t t = 0, n; t < a->tokens; t += n) {
                n = next_tokens(a->tokens - t);
                dot_floats_of(n, work.rows, a, t, out);
                store_row(out, n, t, row, to);
            }
        }
    }
}

/* out: [round_up(cols, BLOCK)] floats */
FN void dequantize_row(const weight *w, int64_t row, float *out, void *scratch)
{
    workspace work;
    carve_workspace(round_up(w->cols, BLOCK), scratch, &work);
    TYPES[w->type].floats(w, row, 0, w->cols, out, work.scales, work.minima);
}

/* One token: q, d and sum of the units asked for, zero-padded. A NaN in x makes its group's d NaN, so that it is seen
 * in the result; an infinity does so too. x is readable for `cols` floats only. */
FN void quantize_row(const float *x, int64_t cols, int64_t padded, int8_t *q, float *const d[N_UNITS],
                     float *const sum[N_UNITS], const int64_t groups[N_UNITS])
{
    for (int unit = 0; unit < N_UNITS; unit++)
        if (d[unit]) {
            memset(d[unit], 0, (size_t)groups[unit] * sizeof(float));
            memset(sum[unit], 0, (size_t)groups[unit] * sizeof(float));
        }
    for (int64_t c = 0; c < padded; c += 32) {
        const float *from = x + c;
        float last[32] = {0};
        if (c + 32 > cols) {
            memcpy(last, from, (size_t)(cols > c ? cols - c : 0) * sizeof(float));
            from = last;
        }
        vf largest = vf_zero(), poison = vf_zero();
        for (int i = 0; i < 32; i += VL) {
            vf v = vf_load(from + i);
            largest = vf_max(largest, vf_max(v, vf_sub(vf_zero(), v)));
            poison = vf_fma(v, vf_zero(), poison); /* 0, or NaN for NaN and infinity */
        }
        float most = vf_largest(largest), scale = most / 127.0f + vf_sum(poison);
        int32_t sums[2] = {0, 0};
        if (scale != scale)
            memset(q + c, 0, 32);
        else
            quantize32(from, most > 1e-35f ? 127.0f / most : 0.0f, q + c, sums); /* 127 / most must be finite */
        int64_t g = c / 32;
        if (d[UNIT32]) {
            d[UNIT32][g] = scale;
            sum[UNIT32][g] = scale * (float)(sums[0] + sums[1]);
        }
        if (d[UNIT16])
            for (int i = 0; i < 2; i++) {
                d[UNIT16][2 * g + i] = scale;
                sum[UNIT16][2 * g + i] = scale * (float)sums[i];
            }
    }
}
