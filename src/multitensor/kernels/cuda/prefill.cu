// The gate of a feed-forward network on many tokens: one pass over memory. Defines: X_KIND (0: float16, 1: bfloat16).
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
