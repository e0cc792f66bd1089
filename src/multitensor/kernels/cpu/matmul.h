/* Chooses between rows and tiles, and rounds activations. Included by level.h only. */

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
    } else if (a->tokens > FAST_ROW_TOKENS) {
        for (int64_t row = r0; row < r1; row += TILE_ROWS)
            multiply_tile_fast(w, row, min_int(TILE_ROWS, r1 - row), a, to, &work);
#endif
    } else {
        for (int64_t row = r0; row < r1; row++) {
            TYPES[w->type].codes(w, row, 0, w->cols, (uint8_t *)work.rows, work.scales, work.minima);
            for (int64_t t = 0, n; t < a->tokens; t += n) {
                n = next_tokens(a->tokens - t);
                for (int64_t i = 0; i < n; i++) /* first, as for one token and in tiles */
                    out[i] = to.bias ? to.bias[row] : 0.0f;
                dot_codes_of(n, unit, is_signed, (uint8_t *)work.rows, &work, a, t, out);
                for (int64_t i = 0; i < n; i++)
                    to.out[(t + i) * to.stride + row] = out[i];
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
    } else if (a->tokens > EXACT_ROW_TOKENS) {
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
