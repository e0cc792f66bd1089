// Logits as numbers that can be compared and added up in any order; for the sources behind this one.
//
// A weight is exp(x) of some x <= 0 as an integer, to 2e-7 of itself and then in units of 2^-38; the same bits on every GPU, of whatever
// generation, as it comes from single rounded products and sums.

typedef unsigned int u32;
typedef unsigned long long u64;

constexpr u32 NEVER = 0x7f800000u;       // the bits of infinity: of -x where nothing has a weight
constexpr u32 WEIGHTLESS = 0x41dc0000u;  // of 27.5: from there on weights are 0
constexpr int HALF_BITS = 19;            // of a weight, whose two halves can be added up by themselves
constexpr u64 WEIGHT_ONE = (1ull << 2 * HALF_BITS) - 1;
constexpr u32 ALL = 0xffffffffu;

// A float32 and its index as one number: larger for a larger value, then for a lower index. NaN is the largest.
__device__ __forceinline__ u64 ranked(float value, int index) {
    const u32 b = __float_as_uint(value + 0.f);  // no -0
    const u32 order = value != value ? 0xffffffffu : b & 0x80000000u ? ~b : b | 0x80000000u;
    return (u64)order << 32 | (u32)~index;
}

__device__ __forceinline__ float value_of(u64 number) {  // of ranked()
    const u32 order = (u32)(number >> 32);
    return __uint_as_float(order & 0x80000000u ? order & 0x7fffffffu : ~order);
}

__device__ __forceinline__ bool is_finite(float value) { return (__float_as_uint(value) & NEVER) != NEVER; }

// exp(-number) in units of 2^-38, where key is the bits of a number >= 0.
__device__ __forceinline__ u64 weight(u32 key) {
    if (key >= WEIGHTLESS) return 0;
    const float x = -__uint_as_float(key), turns = rintf(__fmul_rn(x, 1.44269504f));
    const float r = __fmaf_rn(turns, -1.42860677e-6f, __fmaf_rn(turns, -0.693145752f, x));
    float e = 1.f / 5040.f;
    e = __fmaf_rn(e, r, 1.f / 720.f);
    e = __fmaf_rn(e, r, 1.f / 120.f);
    e = __fmaf_rn(e, r, 1.f / 24.f);
    e = __fmaf_rn(e, r, 1.f / 6.f);
    e = __fmaf_rn(e, r, 0.5f);
    e = __fmaf_rn(e, r, 1.f);
    e = __fmaf_rn(e, r, 1.f);
    const u32 digits = (u32)__fmul_rn(e, 16777216.f);  // exactly: e is at least 0.7
    const int up = 2 * HALF_BITS - 24 + (int)turns;
    if (up >= 0) return min((u64)digits << up, WEIGHT_ONE);
    return (digits + (1u << (-up - 1))) >> -up;
}

// The sum of the values of all threads before this one; total: of all. `warps` is free again once all have met.
template <int WARPS>
__device__ __forceinline__ u64 sum_before(u64 value, u64* warps, u64& total) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    u64 sum = value;
#pragma unroll
    for (int o = 1; o < 32; o <<= 1) {
        const u64 below = __shfl_up_sync(ALL, sum, o);
        if (lane >= o) sum += below;
    }
    if (lane == 31) warps[warp] = sum;
    __syncthreads();
    u64 before = sum - value;
    total = 0;
#pragma unroll
    for (int w = 0; w < WARPS; w++) {
        const u64 of_warp = warps[w];
        if (w < warp) before += of_warp;
        total += of_warp;
    }
    return before;
}
