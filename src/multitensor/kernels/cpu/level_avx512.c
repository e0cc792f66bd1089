/* Vector primitives for AVX-512 with BW, VL, DQ and VNNI (Intel since Cascade Lake, AMD since Zen 4). */
#if defined(__x86_64__)
#include <immintrin.h>

#include "native.h"

#define TABLE kernels_avx512
#define TABLE_NAME "avx512"
#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")))
#define FN static TARGET
#define INLINE static inline __attribute__((always_inline, unused)) TARGET

#define VL 16
#define SIGNED_BIAS 128   /* vpdpbusd wants unsigned codes: load_fast_codes adds this to signed ones */
#define PACKED_INTEGERS 1
#define INTEGER_TOKENS 6  /* tokens of an integer micro-kernel: 2 x 6 integer and 2 x 6 float sums in 32 registers */
#define INTEGER_TOKENS_LESS 3
#define FLOAT_TOKENS 12

typedef __m512 vf;
typedef __m512i vi;
typedef __m512i codes;

/* ---- floats ---- */

INLINE vf vf_set(float x) { return _mm512_set1_ps(x); }
INLINE vf vf_zero(void) { return _mm512_setzero_ps(); }
INLINE vf vf_load(const float *p) { return _mm512_loadu_ps(p); }
INLINE void vf_store(float *p, vf v) { _mm512_storeu_ps(p, v); }
INLINE vf vf_add(vf a, vf b) { return _mm512_add_ps(a, b); }
INLINE vf vf_sub(vf a, vf b) { return _mm512_sub_ps(a, b); }
INLINE vf vf_mul(vf a, vf b) { return _mm512_mul_ps(a, b); }
INLINE vf vf_div(vf a, vf b) { return _mm512_div_ps(a, b); }
INLINE vf vf_fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
INLINE vf vf_max(vf a, vf b) { return _mm512_max_ps(a, b); }
INLINE vf vf_min(vf a, vf b) { return _mm512_min_ps(a, b); }
INLINE float vf_sum(vf v) { return _mm512_reduce_add_ps(v); }
INLINE float vf_largest(vf v) { return _mm512_reduce_max_ps(v); }
INLINE vf vf_round(vf v) { return _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
/* 2**n for integral n in [-126, 127]; infinity for 128 */
INLINE vf vf_power_of_two(vf n)
{
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127)), 23));
}
/* v, but 0 where x < limit; NaN in x keeps v */
INLINE vf vf_zero_below(vf v, vf x, float limit)
{
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, _mm512_set1_ps(limit), _CMP_NLT_UQ), v);
}
INLINE vf vf_load_f16(const uint16_t *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)); }
INLINE vf vf_load_f16_n(const uint16_t *p, int64_t n) /* n <= VL halves, zeros after them */
{
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16((__mmask16)((1u << n) - 1), p));
}
INLINE void vf_store_f16(uint16_t *p, vf v)
{
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
INLINE float half_to_float(uint16_t h) { return _cvtsh_ss(h); }
INLINE uint16_t float_to_half(float value) { return _cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

INLINE vf vf_load_u8(const uint8_t *p)
{
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p)));
}
INLINE vf vf_load_i8(const int8_t *p)
{
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)));
}

/* 32 floats times `inverse`, rounded to integers; `sums`: of the first 16 and the last 16 */
INLINE void quantize32(const float *x, float inverse, int8_t *q, int32_t sums[2])
{
    for (int half = 0; half < 2; half++) {
        vi whole = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x + 16 * half), _mm512_set1_ps(inverse)));
        _mm_storeu_si128((__m128i *)(q + 16 * half), _mm512_cvtsepi32_epi8(whole));
        sums[half] = _mm512_reduce_add_epi32(whole);
    }
}

/* ---- codes: 64 weights, one byte each ---- */

INLINE codes codes_nibbles32(const uint8_t *p)
{
    const vi both = _mm512_set_epi64(3, 2, 3, 2, 1, 0, 1, 0), shift = _mm512_set_epi64(4, 4, 0, 0, 4, 4, 0, 0);
    vi v = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *)p));
    return _mm512_and_si512(_mm512_srlv_epi64(_mm512_permutexvar_epi64(both, v), shift), _mm512_set1_epi8(15));
}

INLINE codes codes_nibbles16(const uint8_t *p)
{
    const vi both = _mm512_set_epi64(3, 3, 2, 2, 1, 1, 0, 0), shift = _mm512_set_epi64(4, 0, 4, 0, 4, 0, 4, 0);
    vi v = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *)p));
    return _mm512_and_si512(_mm512_srlv_epi64(_mm512_permutexvar_epi64(both, v), shift), _mm512_set1_epi8(15));
}

INLINE codes codes_pairs(const uint8_t *p)
{
    /* One byte a dword; then its halves move apart by 12 bits and their halves by 6, which leaves a pair a byte. */
    vi v = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p));
    v = _mm512_and_si512(_mm512_or_si512(v, _mm512_slli_epi32(v, 12)), _mm512_set1_epi32(0x000f000f));
    return _mm512_and_si512(_mm512_or_si512(v, _mm512_slli_epi32(v, 6)), _mm512_set1_epi32(0x03030303));
}

INLINE codes codes_bytes(const uint8_t *p) { return _mm512_loadu_si512(p); }

INLINE codes codes_add_bits(codes c, const uint8_t *p, int value) /* + value where the weight's bit is set */
{
    uint64_t mask;
    memcpy(&mask, p, sizeof mask);
    return _mm512_mask_add_epi8(c, (__mmask64)mask, c, _mm512_set1_epi8((char)value));
}

INLINE codes codes_add_high(codes c, codes high) /* + high * 16 */
{
    return _mm512_or_si512(c, _mm512_slli_epi16(high, 4)); /* high < 4: nothing crosses into the next byte */
}

INLINE codes codes_lookup(codes c, const int8_t table[16])
{
    return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)table)), c);
}

INLINE codes codes_subtract(codes c, int zero) { return _mm512_sub_epi8(c, _mm512_set1_epi8((char)zero)); }

INLINE void codes_store(uint8_t *p, codes c) { _mm512_storeu_si512(p, c); }

INLINE vf codes_floats(codes c, int part) /* signed codes [part * VL, part * VL + VL) */
{
    __m128i quarter;
    switch (part) {
    case 0: quarter = _mm512_castsi512_si128(c); break;
    case 1: quarter = _mm512_extracti32x4_epi32(c, 1); break;
    case 2: quarter = _mm512_extracti32x4_epi32(c, 2); break;
    default: quarter = _mm512_extracti32x4_epi32(c, 3); break;
    }
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(quarter));
}

/* Products of a block's codes and activations, four neighbouring ones summed a dword; never signed here. */
typedef vi block_products;
INLINE block_products codes_multiply(codes c, const int8_t *x, int unit, int is_signed)
{
    (void)unit, (void)is_signed;
    return _mm512_dpbusd_epi32(_mm512_setzero_si512(), c, _mm512_loadu_si512(x));
}
INLINE block_products no_products(void) { return _mm512_setzero_si512(); }

/* Each 128-bit lane: the sums of that lane of four vectors. */
INLINE vi sum_quads(const vi p[4])
{
    vi a = _mm512_add_epi32(_mm512_unpacklo_epi32(p[0], p[1]), _mm512_unpackhi_epi32(p[0], p[1]));
    vi b = _mm512_add_epi32(_mm512_unpacklo_epi32(p[2], p[3]), _mm512_unpackhi_epi32(p[2], p[3]));
    return _mm512_add_epi32(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
}

/* Sums of 16 groups, in their order, from the 8 (UNIT32) or 4 (UNIT16) blocks that they cover. */
INLINE void group_sums(const block_products *p, int unit, vf sums[1])
{
    vi quads = sum_quads(p), order = _mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
    if (unit == UNIT32) {
        vi more = sum_quads(p + 4);
        quads = _mm512_add_epi32(_mm512_shuffle_i32x4(quads, more, 0x88), _mm512_shuffle_i32x4(quads, more, 0xdd));
        order = _mm512_set_epi32(15, 11, 14, 10, 13, 9, 12, 8, 7, 3, 6, 2, 5, 1, 4, 0);
    }
    sums[0] = _mm512_cvtepi32_ps(_mm512_permutexvar_epi32(order, quads));
}

/* LANES sums. */
typedef __m256 lanes;
INLINE lanes lanes_zero(void) { return _mm256_setzero_ps(); }
INLINE lanes lanes_add(lanes acc, const vf factors[1], const vf sums[1], const vf minima[1], const vf offsets[1],
                       int has_minimum)
{
    acc = _mm256_fmadd_ps(_mm512_castps512_ps256(factors[0]), _mm512_castps512_ps256(sums[0]), acc);
    if (has_minimum)
        acc = _mm256_fmadd_ps(_mm512_castps512_ps256(minima[0]), _mm512_castps512_ps256(offsets[0]), acc);
    acc = _mm256_fmadd_ps(_mm512_extractf32x8_ps(factors[0], 1), _mm512_extractf32x8_ps(sums[0], 1), acc);
    if (has_minimum)
        acc = _mm256_fmadd_ps(_mm512_extractf32x8_ps(minima[0], 1), _mm512_extractf32x8_ps(offsets[0], 1), acc);
    return acc;
}
INLINE float lanes_sum(lanes acc) /* by halves, as sum_tile_lanes does */
{
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(acc), _mm256_extractf128_ps(acc, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

/* ---- packed tiles: a dword a row holds four neighbouring codes of that row ---- */

INLINE vi vi_zero(void) { return _mm512_setzero_si512(); }
INLINE vi vi_load(const uint8_t *p) { return _mm512_loadu_si512(p); }
INLINE vi vi_broadcast(const int8_t *p) /* four neighbouring activations, for all rows */
{
    int32_t four;
    memcpy(&four, p, sizeof four);
    return _mm512_set1_epi32(four);
}
INLINE vi vi_dot(vi acc, vi w, vi x, int is_signed)
{
    (void)is_signed;
    return _mm512_dpbusd_epi32(acc, w, x);
}
INLINE vf vi_to_float(vi v) { return _mm512_cvtepi32_ps(v); }

/* 4 x 4 dwords: to[i * to_stride + j] = from[j * from_stride + i] */
INLINE void transpose4(const uint32_t *from, int64_t from_stride, uint32_t *to, int64_t to_stride)
{
    __m128 a = _mm_loadu_ps((const float *)from), b = _mm_loadu_ps((const float *)(from + from_stride));
    __m128 c = _mm_loadu_ps((const float *)(from + 2 * from_stride));
    __m128 d = _mm_loadu_ps((const float *)(from + 3 * from_stride));
    _MM_TRANSPOSE4_PS(a, b, c, d);
    _mm_storeu_ps((float *)to, a);
    _mm_storeu_ps((float *)(to + to_stride), b);
    _mm_storeu_ps((float *)(to + 2 * to_stride), c);
    _mm_storeu_ps((float *)(to + 3 * to_stride), d);
}

#include "level.h"
#else
typedef int level_avx512_is_for_x86_64; /* ISO C wants something in a translation unit */
#endif
