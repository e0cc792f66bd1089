/* Vector primitives for any machine: four floats at a time through the compiler's vector types, integers in loops. */
#include <math.h>

#include "native.h"

#define TABLE kernels_scalar
#define TABLE_NAME "scalar"
#define FN static
#define INLINE static inline __attribute__((always_inline, unused))

#define VL 4
#define SIGNED_BIAS 0   /* what fast_codes adds to signed codes */
#define PACKED_INTEGERS 0 /* no packed tiles for 8-bit activations: rows are multiplied one by one */
#define FLOAT_TOKENS 4  /* tokens of a float micro-kernel, at most */

typedef float vf __attribute__((vector_size(16)));
typedef int32_t vi __attribute__((vector_size(16)));
typedef struct {
    uint8_t b[BLOCK];
} codes;

/* ---- half precision (IEEE 754 binary16 and bfloat16), no hardware needed ---- */

INLINE float float_of_bits(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

INLINE uint32_t bits_of_float(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

INLINE float half_to_float(uint16_t h)
{
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = (h >> 10) & 31, mantissa = h & 0x3ff;
    if (exponent == 0) { /* zero and subnormals are exact multiples of 2**-24 */
        float magnitude = (float)mantissa * 0x1p-24f;
        return sign ? -magnitude : magnitude;
    }
    return float_of_bits(sign | (exponent == 31 ? 0x7f800000 : (exponent + 112) << 23) | mantissa << 13);
}

INLINE uint16_t float_to_half(float value)
{
    uint32_t bits = bits_of_float(value), magnitude = bits & 0x7fffffff;
    uint16_t sign = (uint16_t)(bits >> 16 & 0x8000);
    if (magnitude > 0x7f800000)
        return sign | 0x7e00;
    if (magnitude >= 0x477ff000) /* 65520 and more round to infinity */
        return sign | 0x7c00;
    if (magnitude < 0x38800000) /* below 2**-14: multiples of 2**-24, ties to even */
        return sign | (uint16_t)rintf(float_of_bits(magnitude) * 0x1p24f);
    return sign | (uint16_t)((magnitude + 0xfff + (magnitude >> 13 & 1) - 0x38000000) >> 13);
}

/* ---- floats ---- */

INLINE vf vf_set(float x) { return (vf){x, x, x, x}; }
INLINE vf vf_zero(void) { return vf_set(0.0f); }
INLINE vf vf_load(const float *p) { vf v; memcpy(&v, p, sizeof v); return v; }
INLINE void vf_store(float *p, vf v) { memcpy(p, &v, sizeof v); }
INLINE vf vf_add(vf a, vf b) { return a + b; }
INLINE vf vf_sub(vf a, vf b) { return a - b; }
INLINE vf vf_mul(vf a, vf b) { return a * b; }
INLINE vf vf_div(vf a, vf b) { return a / b; }
INLINE vf vf_fma(vf a, vf b, vf c) { return a * b + c; }
INLINE vf vf_select(vi mask, vf a, vf b) { return (vf)(((vi)a & mask) | ((vi)b & ~mask)); }
INLINE vf vf_max(vf a, vf b) { return vf_select((vi)(a > b), a, b); }
INLINE vf vf_min(vf a, vf b) { return vf_select((vi)(a < b), a, b); }
INLINE float vf_sum(vf v) { return (v[0] + v[2]) + (v[1] + v[3]); }
INLINE float vf_largest(vf v)
{
    float a = v[0] > v[1] ? v[0] : v[1], b = v[2] > v[3] ? v[2] : v[3];
    return a > b ? a : b;
}
INLINE vf vf_round(vf v) { return (vf){rintf(v[0]), rintf(v[1]), rintf(v[2]), rintf(v[3])}; }
/* 2**n for integral n in [-126, 127]; infinity for 128 */
INLINE vf vf_power_of_two(vf n)
{
    vi whole;
    for (int i = 0; i < VL; i++)
        whole[i] = n[i] == n[i] ? (int32_t)n[i] : 0; /* NaN has no integer */
    return (vf)((whole + 127) << 23);
}
/* v, but 0 where x < limit; NaN in x keeps v */
INLINE vf vf_zero_below(vf v, vf x, float limit) { return (vf)((vi)v & ~(vi)(x < vf_set(limit))); }

INLINE vf vf_load_f16_n(const uint16_t *p, int64_t n) /* n <= VL halves, zeros after them */
{
    vf v = vf_zero();
    for (int64_t i = 0; i < n; i++)
        v[i] = half_to_float(p[i]);
    return v;
}
INLINE vf vf_load_f16(const uint16_t *p) { return vf_load_f16_n(p, VL); }
INLINE void vf_store_f16(uint16_t *p, vf v)
{
    for (int i = 0; i < VL; i++)
        p[i] = float_to_half(v[i]);
}

INLINE vf vf_load_u8(const uint8_t *p) { return (vf){p[0], p[1], p[2], p[3]}; }
INLINE vf vf_load_i8(const int8_t *p) { return (vf){p[0], p[1], p[2], p[3]}; }

/* 32 floats times `inverse`, rounded to integers; `sums`: of the first 16 and the last 16 */
INLINE void quantize32(const float *x, float inverse, int8_t *q, int32_t sums[2])
{
    for (int half = 0; half < 2; half++) {
        sums[half] = 0;
        for (int i = 16 * half; i < 16 * half + 16; i++) {
            float scaled = rintf(x[i] * inverse);
            q[i] = (int8_t)(scaled >= -127.0f ? (scaled <= 127.0f ? scaled : 127.0f) : -127.0f);
            sums[half] += q[i];
        }
    }
}

/* ---- codes: 64 weights, one byte each ---- */

INLINE codes codes_nibbles32(const uint8_t *p)
{
    codes c;
    for (int i = 0; i < 16; i++) {
        c.b[i] = p[i] & 15;
        c.b[16 + i] = p[i] >> 4;
        c.b[32 + i] = p[16 + i] & 15;
        c.b[48 + i] = p[16 + i] >> 4;
    }
    return c;
}

INLINE codes codes_nibbles16(const uint8_t *p)
{
    codes c;
    for (int g = 0; g < 4; g++)
        for (int i = 0; i < 8; i++) {
            c.b[16 * g + i] = p[8 * g + i] & 15;
            c.b[16 * g + 8 + i] = p[8 * g + i] >> 4;
        }
    return c;
}

INLINE codes codes_pairs(const uint8_t *p)
{
    codes c;
    for (int i = 0; i < BLOCK; i++)
        c.b[i] = p[i / 4] >> 2 * (i % 4) & 3;
    return c;
}

INLINE codes codes_bytes(const uint8_t *p)
{
    codes c;
    memcpy(c.b, p, BLOCK);
    return c;
}

INLINE codes codes_add_bits(codes c, const uint8_t *p, int value) /* + value where the weight's bit is set */
{
    for (int i = 0; i < BLOCK; i++)
        c.b[i] += (p[i / 8] >> i % 8 & 1) * value;
    return c;
}

INLINE codes codes_add_high(codes c, codes high) /* + high * 16 */
{
    for (int i = 0; i < BLOCK; i++)
        c.b[i] |= high.b[i] << 4;
    return c;
}

INLINE codes codes_lookup(codes c, const int8_t table[16])
{
    for (int i = 0; i < BLOCK; i++)
        c.b[i] = (uint8_t)table[c.b[i]];
    return c;
}

INLINE codes codes_subtract(codes c, int zero)
{
    for (int i = 0; i < BLOCK; i++)
        c.b[i] -= zero;
    return c;
}

INLINE void codes_store(uint8_t *p, codes c) { memcpy(p, c.b, BLOCK); }

INLINE vf codes_floats(codes c, int part) /* signed codes [part * VL, part * VL + VL) */
{
    vf v;
    for (int i = 0; i < VL; i++)
        v[i] = (float)(int8_t)c.b[VL * part + i];
    return v;
}

/* Integer products of a block's groups. */
typedef struct {
    int32_t of[4];
} block_products;
INLINE block_products codes_multiply(codes c, const int8_t *x, int unit, int is_signed)
{
    const int size = (int)unit_weights(unit);
    block_products p = {{0}};
    for (int g = 0; g < BLOCK / size; g++)
        for (int i = g * size; i < (g + 1) * size; i++)
            p.of[g] += (is_signed ? (int32_t)(int8_t)c.b[i] : (int32_t)c.b[i]) * x[i];
    return p;
}
INLINE block_products no_products(void) { return (block_products){{0}}; }

/* Sums of 16 groups from the 8 (UNIT32) or 4 (UNIT16) blocks that they cover. */
INLINE void group_sums(const block_products *p, int unit, vf sums[4])
{
    const int per_block = BLOCK / (int)unit_weights(unit);
    for (int g = 0; g < 16; g++)
        sums[g / VL][g % VL] = (float)p[g / per_block].of[g % per_block];
}

/* LANES sums. */
typedef struct {
    vf of[2];
} lanes;
INLINE lanes lanes_zero(void) { return (lanes){{vf_zero(), vf_zero()}}; }
INLINE lanes lanes_add(lanes acc, const vf factors[4], const vf sums[4], const vf minima[4], const vf offsets[4],
                       int has_minimum)
{
    for (int i = 0; i < 4; i++) {
        acc.of[i % 2] = vf_fma(factors[i], sums[i], acc.of[i % 2]);
        if (has_minimum)
            acc.of[i % 2] = vf_fma(minima[i], offsets[i], acc.of[i % 2]);
    }
    return acc;
}
INLINE float lanes_sum(lanes acc) { return vf_sum(vf_add(acc.of[0], acc.of[1])); }

/* 4 x 4 dwords: to[i * to_stride + j] = from[j * from_stride + i] */
INLINE void transpose4(const uint32_t *from, int64_t from_stride, uint32_t *to, int64_t to_stride)
{
    for (int i = 0; i < 4; i++)
        for (int j = 0; j < 4; j++)
            memcpy(to + i * to_stride + j, from + j * from_stride + i, 4); /* floats may lie there */
}

#include "level.h"
