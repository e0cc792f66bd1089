// Activations of up to 64 tokens, in the order in which gemm.cu's tensor core products want them.
//
// A chunk is one super-block of 256 columns of all tokens, tokens in tiles of eight:
//   [8 sub-blocks][tiles][32 lanes][16 bytes]  lane (g = token of the tile, c): columns 4c to 4c + 3 of either half of 16
// where WIDE (for wgmma, which reads rows of columns):
//   [16 halves of sub-blocks][2][tokens][16 bytes]  of each 4 columns the first two, then in the second run the last two
// then
//   [tiles][32 lanes][8 bytes]                 sums over 32 columns as two halves, high and low: B of one m16n8k16
//   [tiles][32 lanes][16 bytes]                sums over 16 columns, likewise: B of two of them
// A token's numbers are multiplied by the power of two that brings the largest to [512, 1024), so that bfloat16 becomes
// float16 (exactly, unless 2^-24 of the largest or less) and no sum overflows; `scales` takes it back.
// Columns before `phase` and behind the last are zeros. Slots of tokens that there are not stay as they were: nothing of
// one token reaches another's result.

#ifndef WIDE
#define WIDE 0
#endif

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;

constexpr int CHUNK = 4096 + 256 + 512;  // bytes a tile of tokens
constexpr int HELD = 4;                  // of a thread's eights of columns, in registers between the two looks at them

__device__ __forceinline__ float half_to_float(u16 bits) {
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(bits));
    return f;
}
__device__ __forceinline__ u32 to_half(float v) {
    u16 bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(v));
    return bits;
}

template <bool BFLOAT>
__device__ __forceinline__ void unpack(const uint4& raw, float (&v)[8]) {
    const u32 w[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const u32 pair = w[i >> 1];
        if (BFLOAT) v[i] = __uint_as_float(i & 1 ? pair & 0xffff0000u : pair << 16);
        else v[i] = half_to_float((u16)(i & 1 ? pair >> 16 : pair));
    }
}

// Eight columns of one token to their places, with their sums. `eight`: which of a super-block's 32.
__device__ __forceinline__ void put(const float (&v)[8], float factor, u8* chunk, int tiles, int token, int eight) {
    const int tile = token >> 3, g = token & 7, s = eight >> 2, half = (eight >> 1) & 1, c = (eight & 1) * 2;
    float sum = 0.f;
    u32 bits[8];
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const float value = v[i] * factor;
        bits[i] = to_half(value);
        sum += value;
    }
#if WIDE
    u8* at = chunk + ((2 * s + half) * 2 * tiles * 8 + token) * 16 + c * 4;
#pragma unroll
    for (int p = 0; p < 2; p++)
        *(uint2*)(at + p * tiles * 128) = make_uint2(bits[2 * p] | bits[2 * p + 1] << 16, bits[2 * p + 4] | bits[2 * p + 5] << 16);
#else
    u8* at = chunk + ((s * tiles + tile) * 32 + g * 4 + c) * 16 + half * 8;
#pragma unroll
    for (int p = 0; p < 2; p++)
        *(uint2*)(at + p * 16) = make_uint2(bits[4 * p] | bits[4 * p + 1] << 16, bits[4 * p + 2] | bits[4 * p + 3] << 16);
#endif
    sum += __shfl_xor_sync(0xffffffffu, sum, 1);
    if ((eight & 1) == 0) {
        const int t = eight >> 1;  // of 16 sub-blocks; 0 to 7 in the operand's first word, 8 to 15 in its second
        const u32 high = to_half(sum);
        u8* sums = chunk + tiles * (4096 + 256) + (tile * 32 + g * 4 + ((t & 7) >> 1)) * 16 + (t >> 3) * 4 + (t & 1) * 2;
        *(u16*)sums = (u16)high;
        *(u16*)(sums + 8) = (u16)to_half(sum - half_to_float((u16)high));
    }
    sum += __shfl_xor_sync(0xffffffffu, sum, 2);
    if ((eight & 3) == 0) {
        const u32 high = to_half(sum);
        u8* sums = chunk + tiles * 4096 + (tile * 32 + g * 4 + (s >> 1)) * 8 + (s & 1) * 2;
        *(u16*)sums = (u16)high;
        *(u16*)(sums + 4) = (u16)to_half(sum - half_to_float((u16)high));
    }
}

// A block a token. x [tokens][columns]; packed: n_kb chunks of tiles * CHUNK bytes; scales [tokens]. columns and phase are
// multiples of eight. x is not __restrict__, or its loads might be moved above the wait for its writer.
template <bool BFLOAT>
__device__ __forceinline__ void pack_body(const u8* x, u8* packed, float* scales, int columns, int phase, int n_kb, int tiles) {
    __shared__ float largest[32];
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
    const int token = blockIdx.x, lane = threadIdx.x & 31, eights = n_kb * 32;
    const u8* row = x + (size_t)token * columns * 2;
    auto load = [&](int eight) {
        const int k = eight * 8 - phase;
        return eight < eights && k >= 0 && k < columns ? *(const uint4*)(row + (size_t)k * 2) : make_uint4(0, 0, 0, 0);
    };
    uint4 held[HELD];
#pragma unroll
    for (int u = 0; u < HELD; u++) held[u] = load(threadIdx.x + u * blockDim.x);
    float most = 0.f, v[8];
    auto look = [&](const uint4& raw) {
        unpack<BFLOAT>(raw, v);
#pragma unroll
        for (int i = 0; i < 8; i++) most = fmaxf(most, fabsf(v[i]));
    };
#pragma unroll
    for (int u = 0; u < HELD; u++) look(held[u]);
    for (int eight = threadIdx.x + HELD * blockDim.x; eight < eights; eight += blockDim.x) look(load(eight));
#pragma unroll
    for (int step = 16; step; step >>= 1) most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, step));
    if (lane == 0) largest[threadIdx.x >> 5] = most;
    __syncthreads();
    most = lane < blockDim.x >> 5 ? largest[lane] : 0.f;
#pragma unroll
    for (int step = 16; step; step >>= 1) most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, step));
    // 2^e <= most < 2^(e + 1); the factor 2^(9 - e) stays within what float32 holds.
    const int e = (int)(__float_as_uint(most) >> 23) - 127, shift = min(9 - e, 100);
    const float factor = __uint_as_float((u32)(127 + shift) << 23);
    if (threadIdx.x == 0) scales[token] = __uint_as_float((u32)(127 - shift) << 23);
    auto write = [&](const uint4& raw, int eight) {
        unpack<BFLOAT>(raw, v);
        put(v, factor, packed + (size_t)(eight >> 5) * tiles * CHUNK, tiles, token, eight & 31);
    };
    // A warp's 32 eights are one super-block's: whole warps go in or stay out.
#pragma unroll
    for (int u = 0; u < HELD; u++) {
        const int eight = threadIdx.x + u * blockDim.x;
        if (eight < eights) write(held[u], eight);
    }
    for (int eight = threadIdx.x + HELD * blockDim.x; eight < eights; eight += blockDim.x) write(load(eight), eight);
}

extern "C" __global__ void __launch_bounds__(1024)
    pack_half(const u8* x, u8* packed, float* scales, int columns, int phase, int n_kb, int tiles) {
    pack_body<false>(x, packed, scales, columns, phase, n_kb, tiles);
}
extern "C" __global__ void __launch_bounds__(1024)
    pack_bfloat(const u8* x, u8* packed, float* scales, int columns, int phase, int n_kb, int tiles) {
    pack_body<true>(x, packed, scales, columns, phase, n_kb, tiles);
}
