/* Vector primitives for AVX2 with FMA and F16C (x86-64-v3). */
#if defined(__x86_64__)
#include <immintrin.h>

#include "native.h"

#define TABLE kernels_avx2
#define TABLE_NAME "avx2"
#define TARGET __attribute__((target("avx2,fma,f16c")))
#define FN static TARGET
#define INLINE static inline __attribute__((always_inline, unused)) TARGET

#define VL 8
#define SIGNED_BIAS 0     /* vpmaddubsw saturates on codes above 128, so signed codes stay signed (see vi_dot) */
#define PACKED_INTEGERS 1
#define INTEGER_TOKENS 3  /* tokens of an integer micro-kernel: 2 x 3 integer and 2 x 3 float sums in 16 registers */
#define INTEGER_TOKENS_LESS 2
#define FLOAT_TOKENS 6

typedef __m256 vf;
typedef __m256i vi;
typedef struct {
    __m256i half[2];
} codes;

/* ---- floats ---- */

INLINE vf vf_set(float x) { return _mm256_set1_ps(x); }
INLINE vf vf_zero(void) { return _mm256_setzero_ps(); }
INLINE vf vf_load(const float *p) { return _mm256_loadu_ps(p); }
INLINE void vf_store(float *p, vf v) { _mm256_storeu_ps(p, v); }
INLINE vf vf_add(vf a, vf b) { return _mm256_add_ps(a, b); }
INLINE vf vf_sub(vf a, vf b) { return _mm256_sub_ps(a, b); }
INLINE vf vf_mul(vf a, vf b) { return _mm256_mul_ps(a, b); }
INLINE vf vf_div(vf a, vf b) { return _mm256_div_ps(a, b); }
INLINE vf vf_fma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
INLINE vf vf_max(vf a, vf b) { return _mm256_max_ps(a, b); }
INLINE vf vf_min(vf a, vf b) { return _mm256_min_ps(a, b); }
INLINE float vf_sum(vf v)
{
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
INLINE float vf_largest(vf v)
{
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}
INLINE vf vf_round(vf v) { return _mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
/* 2**n for integral n in [-126, 127]; infinity for 128 */
INLINE vf vf_power_of_two(vf n)
{
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}
/* v, but 0 where x < limit; NaN in x keeps v */
INLINE vf vf_zero_below(vf v, vf x, float limit)
{
    return _mm256_and_ps(v, _mm256_cmp_ps(x, _mm256_set1_ps(limit), _CMP_NLT_UQ));
}
INLINE vf vf_load_f16(const uint16_t *p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)); }
INLINE vf vf_load_f16_n(const uint16_t *p, int64_t n) /* n <= VL halves, zeros after them */
{
    uint16_t padded[VL] = {0};
    if (n == VL)
        return vf_load_f16(p);
    memcpy(padded, p, (size_t)n * sizeof *p);
    return vf_load_f16(padded);
}
INLINE void vf_store_f16(uint16_t *p, vf v)
{
    _mm_storeu_si128((__m128i *)p, _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
INLINE float half_to_float(uint16_t h) { return _cvtsh_ss(h); }
INLINE uint16_t float_to_half(float value) { return _cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

INLINE vf vf_load_u8(const uint8_t *p)
{
    return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)p)));
}
INLINE vf vf_load_i8(const int8_t *p)
{
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p)));
}

INLINE int32_t vi_sum(vi v)
{
    __m128i four = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    __m128i two = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32(two, 0xb1)));
}

/* 32 floats times `inverse`, rounded to integers; `sums`: of the first 16 and the last 16 */
INLINE void quantize32(const float *x, float inverse, int8_t *q, int32_t sums[2])
{
    vi whole[4];
    for (int i = 0; i < 4; i++)
        whole[i] = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + 8 * i), _mm256_set1_ps(inverse)));
    sums[0] = vi_sum(_mm256_add_epi32(whole[0], whole[1]));
    sums[1] = vi_sum(_mm256_add_epi32(whole[2], whole[3]));
    /* The packs work within 128-bit lanes, so the dwords of the result need a last permutation. */
    vi packed = _mm256_packs_epi16(_mm256_packs_epi32(whole[0], whole[1]), _mm256_packs_epi32(whole[2], whole[3]));
    packed = _mm256_permutevar8x32_epi32(packed, _mm256_set_epi32(7, 3, 6, 2, 5, 1, 4, 0));
    _mm256_storeu_si256((__m256i *)q, packed);
}

/* ---- codes: 64 weights, one byte each ---- */

INLINE codes codes_nibbles32(const uint8_t *p)
{
    codes c;
    for (int i = 0; i < 2; i++) {
        __m128i v = _mm_loadu_si128((const __m128i *)(p + 16 * i));
        c.half[i] = _mm256_and_si256(_mm256_set_m128i(_mm_srli_epi16(v, 4), v), _mm256_set1_epi8(15));
    }
    return c;
}

INLINE codes codes_nibbles16(const uint8_t *p)
{
    codes c;
    for (int i = 0; i < 2; i++) {
        vi v = _mm256_castsi128_si256(_mm_loadu_si128((const __m128i *)(p + 16 * i)));
        v = _mm256_srlv_epi64(_mm256_permute4x64_epi64(v, 0x50), _mm256_set_epi64x(4, 0, 4, 0));
        c.half[i] = _mm256_and_si256(v, _mm256_set1_epi8(15));
    }
    return c;
}

INLINE codes codes_pairs(const uint8_t *p)
{
    codes c;
    for (int i = 0; i < 2; i++) {
        /* One byte a dword; then its halves move apart by 12 bits and their halves by 6: a pair a byte. */
        vi v = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(p + 8 * i)));
        v = _mm256_and_si256(_mm256_or_si256(v, _mm256_slli_epi32(v, 12)), _mm256_set1_epi32(0x000f000f));
        c.half[i] = _mm256_and_si256(_mm256_or_si256(v, _mm256_slli_epi32(v, 6)), _mm256_set1_epi32(0x03030303));
    }
    return c;
}

INLINE codes codes_bytes(const uint8_t *p)
{
    return (codes){{_mm256_loadu_si256((const __m256i *)p), _mm256_loadu_si256((const __m256i *)(p + 32))}};
}

INLINE codes codes_add_bits(codes c, const uint8_t *p, int value) /* + value where the weight's bit is set */
{
    const vi byte = _mm256_set_epi64x(0x0303030303030303, 0x0202020202020202, 0x0101010101010101, 0);
    const vi bit = _mm256_set1_epi64x((int64_t)0x8040201008040201);
    for (int i = 0; i < 2; i++) {
        int32_t word;
        memcpy(&word, p + 4 * i, sizeof word);
        vi spread = _mm256_and_si256(_mm256_shuffle_epi8(_mm256_set1_epi32(word), byte), bit);
        vi added = _mm256_and_si256(_mm256_cmpeq_epi8(spread, bit), _mm256_set1_epi8((char)value));
        c.half[i] = _mm256_add_epi8(c.half[i], added);
    }
    return c;
}

INLINE codes codes_add_high(codes c, codes high) /* + high * 16; high < 4: nothing crosses into the next byte */
{
    for (int i = 0; i < 2; i++)
        c.half[i] = _mm256_or_si256(c.half[i], _mm256_slli_epi16(high.half[i], 4));
    return c;
}

INLINE codes codes_lookup(codes c, const int8_t table[16])
{
    vi wide = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)table));
    for (int i = 0; i < 2; i++)
        c.half[i] = _mm256_shuffle_epi8(wide, c.half[i]);
    return c;
}

INLINE codes codes_subtract(codes c, int zero)
{
    for (int i = 0; i < 2; i++)
        c.half[i] = _mm256_sub_epi8(c.half[i], _mm256_set1_epi8((char)zero));
    return c;
}

INLINE void codes_store(uint8_t *p, codes c)
{
    for (int i = 0; i < 2; i++)
        _mm256_storeu_si256((__m256i *)(p + 32 * i), c.half[i]);
}

INLINE vf codes_floats(codes c, int part) /* signed codes [part * VL, part * VL + VL) */
{
    vi half = c.half[part / 4];
    __m128i quarter = part % 4 < 2 ? _mm256_castsi256_si128(half) : _mm256_extracti128_si256(half, 1);
    if (part % 2)
        quarter = _mm_srli_si128(quarter, 8);
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(quarter));
}

/* ---- products ---- */

/* acc + products of four neighbouring codes and activations. Unsigned codes are at most 63 and signed ones go in by
 * magnitude (at most 128), so that no 16-bit sum of two products saturates. */
INLINE vi vi_dot(vi acc, vi w, vi x, int is_signed)
{
    vi pairs = is_signed ? _mm256_maddubs_epi16(_mm256_sign_epi8(w, w), _mm256_sign_epi8(x, w))
                         : _mm256_maddubs_epi16(w, x);
    return _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
INLINE vi vi_zero(void) { return _mm256_setzero_si256(); }
INLINE vi vi_load(const uint8_t *p) { return _mm256_loadu_si256((const __m256i *)p); }
INLINE vi vi_broadcast(const int8_t *p) /* four neighbouring activations, for all rows */
{
    int32_t four;
    memcpy(&four, p, sizeof four);
    return _mm256_set1_epi32(four);
}
INLINE vf vi_to_float(vi v) { return _mm256_cvtepi32_ps(v); }

/* Products of a block's codes and activations, four neighbouring ones summed a dword. */
typedef struct {
    vi half[2];
} block_products;
INLINE block_products codes_multiply(codes c, const int8_t *x, int unit, int is_signed)
{
    block_products p;
    (void)unit;
    for (int i = 0; i < 2; i++)
        p.half[i] = vi_dot(vi_zero(), c.half[i], _mm256_loadu_si256((const __m256i *)(x + 32 * i)), is_signed);
    return p;
}
INLINE block_products no_products(void) { return (block_products){{vi_zero(), vi_zero()}}; }

/* Each 128-bit lane: the sums of that lane of the four halves of two blocks. */
INLINE vi sum_quads(const block_products p[2])
{
    vi a = _mm256_add_epi32(_mm256_unpacklo_epi32(p[0].half[0], p[0].half[1]),
                            _mm256_unpackhi_epi32(p[0].half[0], p[0].half[1]));
    vi b = _mm256_add_epi32(_mm256_unpacklo_epi32(p[1].half[0], p[1].half[1]),
                            _mm256_unpackhi_epi32(p[1].half[0], p[1].half[1]));
    return _mm256_add_epi32(_mm256_unpacklo_epi64(a, b), _mm256_unpackhi_epi64(a, b));
}

/* Sums of 16 groups, in their order, from the 8 (UNIT32) or 4 (UNIT16) blocks that they cover. */
INLINE void group_sums(const block_products *p, int unit, vf sums[2])
{
    const vi order = _mm256_set_epi32(7, 3, 6, 2, 5, 1, 4, 0);
    for (int i = 0; i < 2; i++)
        if (unit == UNIT16) {
            sums[i] = vi_to_float(_mm256_permutevar8x32_epi32(sum_quads(p + 2 * i), order));
        } else {
            vi first = sum_quads(p + 4 * i), second = sum_quads(p + 4 * i + 2);
            sums[i] = vi_to_float(_mm256_add_epi32(_mm256_permute2x128_si256(first, second, 0x20),
                                                   _mm256_permute2x128_si256(first, second, 0x31)));
        }
}

/* LANES sums. */
typedef __m256 lanes;
INLINE lanes lanes_zero(void) { return vf_zero(); }
INLINE lanes lanes_add(lanes acc, const vf factors[2], const vf sums[2], const vf minima[2], const vf offsets[2],
                       int has_minimum)
{
    for (int i = 0; i < 2; i++) {
        acc = vf_fma(factors[i], sums[i], acc);
        if (has_minimum)
            acc = vf_fma(minima[i], offsets[i], acc);
    }
    return acc;
}
INLINE float lanes_sum(lanes acc) { return vf_sum(acc); } /* by halves, as sum_tile_lanes does */

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
typedef int level_avx2_is_for_x86_64; /* ISO C wants something in a translation unit */
#endif
