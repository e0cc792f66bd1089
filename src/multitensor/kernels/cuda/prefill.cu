// The gate of a feed-forward network on many tokens, in one pass over memory; and what lies before and behind products of
// 8-bit integers. Defines: X_KIND (0: float16, 1: bfloat16).
// No header is included: NVRTC needs none.

typedef unsigned short u16;
typedef unsigned int u32;

enum { HALF, BFLOAT };

__device__ __forceinline__ float to_float(u16 bits) {
    if (X_KIND == BFLOAT) return __uint_as_float((u32)bits << 16);
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(bits));
    return f;
}

__device__ __forceinline__ u16 to_bits(float v) {
    u16 bits;
    if (X_KIND == BFLOAT) {
        const u32 b = __float_as_uint(v);
        bits = v != v ? (u16)0x7fff : (u16)((b + 0x7fff + ((b >> 16) & 1)) >> 16);
    } else {
        asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(v));
    }
    return bits;
}

__device__ __forceinline__ float activated(float g, int gelu) {
    if (gelu) return 0.5f * g * (1.f + tanhf(0.7978845608028654f * (g + 0.044715f * g * g * g)));
    return g / (1.f + __expf(-g));
}

__device__ __forceinline__ u32 gated(u32 gate, u32 up, int gelu) {
    const float low = activated(to_float((u16)gate), gelu) * to_float((u16)up);
    const float high = activated(to_float((u16)(gate >> 16)), gelu) * to_float((u16)(up >> 16));
    return to_bits(low) | (u32)to_bits(high) << 16;
}

// out[t][i] = activation(gate[t][i]) * up[t][i], rounded once. Rows of gate and up are gate_stride and up_stride numbers
// apart, those of out follow one another; all three counts are multiples of eight and all addresses of 16 bytes. Block
// (x, y) does eights [256 y, 256 y + 256) of token x.
// gate and up are not __restrict__, or their loads might be moved above the wait for their writer.
extern "C" __global__ void __launch_bounds__(256)
    gated_activation(const u16* gate, const u16* up, u16* out, int eights, int gate_stride, int up_stride, int gelu) {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
    const int i = blockIdx.y * 256 + threadIdx.x;
    if (i >= eights) return;
    const size_t token = blockIdx.x;
    const uint4 g = ((const uint4*)(gate + token * gate_stride))[i], u = ((const uint4*)(up + token * up_stride))[i];
    ((uint4*)out)[token * eights + i] = make_uint4(gated(g.x, u.x, gelu), gated(g.y, u.y, gelu), gated(g.z, u.z, gelu), gated(g.w, u.w, gelu));
}

// ---- products in 8 bits ----

__device__ __forceinline__ void wait_for_writers() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Numbers [8 i, 8 i + 8) of a row, turned within their 64 by the Hadamard matrix over 8, which is its own inverse: eight
// lanes hold 64 numbers, three steps are done within a lane and three between lanes. All lanes of a warp call it.
__device__ __forceinline__ void turned(const u16* row, int i, bool inside, float v[8]) {
    const uint4 four = inside ? ((const uint4*)row)[i] : make_uint4(0, 0, 0, 0);
    const u32 words[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
    for (int k = 0; k < 8; k++) v[k] = to_float((u16)(words[k / 2] >> (16 * (k & 1))));
#pragma unroll
    for (int step = 1; step < 8; step *= 2)
#pragma unroll
        for (int k = 0; k < 8; k++)
            if (!(k & step)) {
                const float a = v[k], b = v[k + step];
                v[k] = a + b;
                v[k + step] = a - b;
            }
#pragma unroll
    for (int step = 1; step < 8; step *= 2) {
        const float sign = threadIdx.x & step ? -1.f : 1.f;
#pragma unroll
        for (int k = 0; k < 8; k++) v[k] = __shfl_xor_sync(0xffffffffu, v[k], step) + sign * v[k];
    }
#pragma unroll
    for (int k = 0; k < 8; k++) v[k] *= 0.125f;
}

// A row a block: out[r][c] = rounded turned numbers, scales[r] = what one of them is worth (the largest becomes 127). Rows
// of x are stride numbers apart (a multiple of eight), columns a multiple of 64, addresses of 16 bytes.
// x is not __restrict__: see gated_activation.
extern "C" __global__ void __launch_bounds__(256) int8_rows(const u16* x, u32* out, float* scales, int columns, int stride) {
    __shared__ u32 largest[8];  // bits of magnitudes, in whose order NaN comes last and so is not lost
    wait_for_writers();
    const u16* row = x + (size_t)blockIdx.x * stride;
    const int eights = columns / 8, rounds = (eights + 255) / 256;
    float v[8];
    u32 most = 0;
    for (int r = 0; r < rounds; r++) {
        const int i = r * 256 + threadIdx.x;
        turned(row, i, i < eights, v);
#pragma unroll
        for (int k = 0; k < 8; k++) most = max(most, __float_as_uint(v[k]) & 0x7fffffffu);
    }
#pragma unroll
    for (int step = 16; step > 0; step /= 2) most = max(most, __shfl_xor_sync(0xffffffffu, most, step));
    if (threadIdx.x % 32 == 0) largest[threadIdx.x / 32] = most;
    __syncthreads();
#pragma unroll
    for (int w = 0; w < 8; w++) most = max(most, largest[w]);
    const float size = __uint_as_float(most), inverse = size > 1e-30f ? 127.f / size : 0.f;
    if (threadIdx.x == 0) scales[blockIdx.x] = size / 127.f;
    uint2* to = (uint2*)out + (size_t)blockIdx.x * eights;
    for (int r = 0; r < rounds; r++) {
        const int i = r * 256 + threadIdx.x;
        turned(row, i, i < eights, v);
        u32 words[2] = {0, 0};
#pragma unroll
        for (int k = 0; k < 8; k++) words[k / 4] |= (u32)(__float2int_rn(v[k] * inverse) & 255) << (8 * (k & 3));
        if (i < eights) to[i] = make_uint2(words[0], words[1]);
    }
}

// out[t][n] = sums[t][n] * of_tokens[t] * of_rows[n] + bias[n]: block (t, y) does eights [256 y, 256 y + 256) of token t.
// bias may be null. Rows of out are stride numbers apart, a multiple of eight.
extern "C" __global__ void __launch_bounds__(256)
    int8_numbers(const int* sums, const float* of_tokens, const float* of_rows, const float* bias, u16* out, int eights, int stride) {
    wait_for_writers();
    const int i = blockIdx.y * 256 + threadIdx.x;
    if (i >= eights) return;
    const size_t token = blockIdx.x;
    const float scale = of_tokens[token];
    u32 words[4];
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const uint4 four = ((const uint4*)sums)[(token * eights + i) * 2 + half];
        const float4 s = ((const float4*)of_rows)[i * 2 + half];
        float4 b = make_float4(0.f, 0.f, 0.f, 0.f);
        if (bias) b = ((const float4*)bias)[i * 2 + half];
        words[2 * half] = to_bits((float)(int)four.x * scale * s.x + b.x) | (u32)to_bits((float)(int)four.y * scale * s.y + b.y) << 16;
        words[2 * half + 1] = to_bits((float)(int)four.z * scale * s.z + b.z) | (u32)to_bits((float)(int)four.w * scale * s.w + b.w) << 16;
    }
    ((uint4*)(out + token * stride))[i] = make_uint4(words[0], words[1], words[2], words[3]);
}
