/* Products of packed tiles of rows with many tokens. Included by level.h only. */

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
/* Where group g of `groups` lies in a packed tile: groups of one lane are neighbours. */
INLINE int64_t tile_place(int64_t g, int64_t groups)
{
    return g % LANES * ((groups + LANES - 1) / LANES) + g / LANES;
}

/* Four rows of codes, `depth` each, to a tile. */
INLINE void pack_codes(int unit, const uint8_t *rows, int64_t depth, uint32_t *tile)
{
    const int64_t size = unit_weights(unit), groups = depth / size;
    for (int64_t lane = 0; lane < LANES; lane++) {
        uint32_t *to = tile + tile_place(lane, groups) * size / 4 * TILE_ROWS;
        for (int64_t g = lane; g < groups; g += LANES, to += size / 4 * TILE_ROWS)
            pack_dwords((const uint32_t *)(rows + g * size), depth / 4, size / 4, to, TILE_ROWS);
    }
}

/* acc [n][2] = tile times `n` tokens over the groups lane, lane + LANES, ...; d, sum, q: of the tile's first group. */
INLINE void integer_lane(int n, int unit, int is_signed, const workspace *work, const activations *a, const float *d,
                         const float *sum, const int8_t *q, int64_t lane, int64_t groups, vf acc[INTEGER_TOKENS][2])
{
    const int64_t size = unit_weights(unit), stride = a->groups[unit];
    const uint8_t *w = work->tile + tile_place(lane, groups) * size * TILE_ROWS;
    for (int i = 0; i < n; i++)
        acc[i][0] = acc[i][1] = vf_zero();
    for (int64_t g = lane; g < groups; g += LANES, w += size * TILE_ROWS) {
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
}

INLINE vf sum_tile_lanes(const float *parts, int64_t stride) /* by halves, as lanes_sum does; `stride` floats apart */
{
    vf sums[LANES / 2];
    for (int i = 0; i < LANES / 2; i++)
        sums[i] = vf_add(vf_load(parts + i * stride), vf_load(parts + (i + LANES / 2) * stride));
    for (int n = LANES / 4; n > 0; n /= 2)
        for (int i = 0; i < n; i++)
            sums[i] = vf_add(sums[i], sums[i + n]);
    return sums[0];
}

/* result = tile times `n` tokens from `t` on, for `groups` scale groups from column c0 on. */
INLINE void integer_tile(int n, int unit, int is_signed, const workspace *work, const activations *a, int64_t t,
                         int64_t c0, int64_t groups, float *result)
{
    const int64_t first = t * a->groups[unit] + c0 / unit_weights(unit);
    float parts[LANES * INTEGER_TOKENS * TILE_ROWS];
    for (int64_t lane = 0; lane < LANES; lane++) {
        vf acc[INTEGER_TOKENS][2];
        integer_lane(n, unit, is_signed, work, a, a->d[unit] + first, a->sum[unit] + first, a->q + t * a->padded + c0,
                     lane, groups, acc);
        for (int i = 0; i < n; i++)
            for (int j = 0; j < 2; j++)
                vf_store(parts + (lane * n + i) * TILE_ROWS + j * VL, acc[i][j]);
    }
    for (int i = 0; i < n * TILE_ROWS; i += VL)
        vf_store(result + i, sum_tile_lanes(parts + i, n * TILE_ROWS));
}

/* n: INTEGER_TOKENS, INTEGER_TOKENS_LESS or 1 */
FN void integer_tile_of(int64_t n, int unit, int is_signed, const workspace *work, const activations *a, int64_t t,
                        int64_t c0, int64_t groups, float *result)
{
#define TRY(N, UNIT, SIGNED)                                                                                          \
    if (n == N && unit == UNIT && is_signed == SIGNED)                                                                \
        integer_tile(N, UNIT, SIGNED, work, a, t, c0, groups, result);
#define TRY_ALL(N) TRY(N, UNIT32, 0) TRY(N, UNIT16, 0) TRY(N, UNIT32, 1)
    TRY_ALL(INTEGER_TOKENS) TRY_ALL(INTEGER_TOKENS_LESS) TRY_ALL(1)
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
            if (unit == UNIT32)
                pack_codes(UNIT32, decoded, depth, (uint32_t *)work->tile + r);
            else
                pack_codes(UNIT16, decoded, depth, (uint32_t *)work->tile + r);
            pack_dwords((uint32_t *)work->scales, stride, depth / size, (uint32_t *)work->tile_scales + r, TILE_ROWS);
            pack_dwords((uint32_t *)work->minima, stride, depth / size, (uint32_t *)work->tile_minima + r, TILE_ROWS);
        }
        for (int64_t t = 0, tokens; t < a->tokens; t += tokens) {
            int64_t left = a->tokens - t;
            tokens = left >= INTEGER_TOKENS ? INTEGER_TOKENS : left >= INTEGER_TOKENS_LESS ? INTEGER_TOKENS_LESS : 1;
            integer_tile_of(tokens, unit, is_signed, work, a, t, c0, depth / size, result);
            store_tile(result, tokens, t, r0, rows, to, c0 == 0);
        }
    }
}
#endif
