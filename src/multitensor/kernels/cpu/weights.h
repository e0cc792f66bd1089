/* From planes to scales, codes and floats, over one level's vector primitives. Included by level.h only. */

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
