/* Norms, activations, rotary embedding and the cache's types. Included by level.h only. */

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

/* ---- the quantised cache ---- */

/* Whole groups of 32 of a head times the orthonormal Hadamard matrix, in place; its own inverse. */
INLINE void turn_groups(float *x, int64_t n)
{
    for (; n >= CACHE_GROUP; n -= CACHE_GROUP, x += CACHE_GROUP) {
        for (int64_t step = 1; step < CACHE_GROUP; step *= 2)
            for (int64_t i = 0; i < CACHE_GROUP; i += 2 * step)
                for (int64_t j = i; j < i + step; j++) {
                    float a = x[j], b = x[j + step];
                    x[j] = a + b;
                    x[j + step] = a - b;
                }
        for (int64_t i = 0; i < CACHE_GROUP; i++)
            x[i] *= 0.17677669529663687f;
    }
}

/* Where the 32-bit word of eight 4-bit numbers lies in a head of n. */
INLINE int64_t word_place(int64_t word, int64_t n)
{
    return n % 64 ? word : word / 8 * 8 + 2 * (word % 4) + word / 4 % 2;
}

/* x / step as a whole number from low to high; NaN gives low. */
INLINE int to_code(float x, float step, float low, float high)
{
    float code = step == 0.0f ? 0.0f : __builtin_rintf(x / step);
    return (int)(code > high ? high : code >= low ? code : low);
}

FN void to_codes(const float *from, int64_t n, int64_t cache_type, uint8_t *codes, uint16_t *scales)
{
    const float largest = 65504.0f;
    for (int64_t first = 0; first < n; first += CACHE_GROUP) {
        int64_t size = min_int(CACHE_GROUP, n - first);
        float x[CACHE_GROUP] = {0}, most = 0.0f, least = 0.0f, nan = 0.0f;
        for (int64_t i = 0; i < size; i++)
            x[i] = from[first + i] > largest ? largest : from[first + i] < -largest ? -largest : from[first + i];
        turn_groups(x, size);
        for (int64_t i = 0; i < CACHE_GROUP; i++) {
            most = x[i] > most ? x[i] : most;
            least = x[i] < least ? x[i] : least;
            nan += x[i] * 0.0f;
        }
        float size_of = most >= -least ? most : -least, scale = size_of * (1.0f / 127.0f);
        if (cache_type == CACHE_Q4)
            scale = (most >= -least ? most : least) * -0.125f;
        *scales = float_to_half(scale + nan);
        float step = half_to_float(*scales++);
        if (cache_type == CACHE_Q8) {
            for (int64_t i = 0; i < size; i++)
                codes[first + i] = (uint8_t)(int8_t)to_code(x[i], step, -127.0f, 127.0f);
            continue;
        }
        for (int64_t w = 0; w < size / 8; w++) {
            uint32_t word = 0;
            for (int i = 0; i < 8; i++)
                word |= (uint32_t)(to_code(x[8 * w + i], step, -8.0f, 7.0f) + 8) << (4 * (i / 2) + 16 * (i % 2));
            memcpy(codes + 4 * word_place(first / 8 + w, n), &word, sizeof word);
        }
    }
}

/* The turned numbers of one head as floats, zeros up to `padded`. */
INLINE void from_codes(const uint8_t *codes, const uint16_t *scales, int64_t n, int64_t padded, int64_t cache_type,
                       float *to)
{
    static const uint32_t shifts[8] = {0, 16, 4, 20, 8, 24, 12, 28};
    for (int64_t first = 0; first < n; first += CACHE_GROUP) {
        int64_t size = min_int(CACHE_GROUP, n - first);
        float step = half_to_float(*scales++);
        if (cache_type == CACHE_Q8) {
            for (int64_t i = 0; i < size; i++)
                to[first + i] = step * (float)(int8_t)codes[first + i];
            continue;
        }
        for (int64_t w = 0; w < size / 8; w++) {
            uint32_t word;
            memcpy(&word, codes + 4 * word_place(first / 8 + w, n), sizeof word);
            for (int i = 0; i < 8; i++)
                to[first + 8 * w + i] = step * (float)((int32_t)(word >> shifts[i] & 15) - 8);
        }
    }
    for (int64_t i = n; i < padded; i++)
        to[i] = 0.0f;
}
