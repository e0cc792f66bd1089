// Quantised weights in tiles: matrix-vector products for 1 to 8 tokens, y[t, n] = sum_k W[n, k] x[t, k], and expansion.
//
// Weights lie in tiles of 16 rows x one super-block of columns, each tile contiguous (quants, then sub-block scales,
// then the super-block's factors), tiles of a row group one after the other. A block takes whole row groups; its warps
// deal the tiles of a row group among themselves. Each warp runs a ring of bulk asynchronous copies (weights do not
// depend on the kernel before, so the ring is filled before the wait for it), and feeds int8 tensor cores:
// mma.m16n8k32 with the weights as A and up to eight tokens' activations as B. Within a super-block everything stays
// an integer: sum over sub-blocks of scale * dot; one conversion to float a super-block.
// The lane-to-element maps of mma fragments are those of the PTX ISA manual, section "Matrix multiply-accumulate".

// No header is included, so that NVRTC needs none on the user's machine.
typedef unsigned char u8;
typedef unsigned int u32;
typedef unsigned long long u64;

#ifndef NWARPS
#define NWARPS 8
#endif
constexpr int WARPS = NWARPS;
constexpr int ROWS = 16;

// NO_BULK: as on older GPUs, without bulk copies and programmatic dependent launch.
#if __CUDA_ARCH__ >= 900 && !defined(NO_BULK)
#define HAS_BULK 1
#else
#define HAS_BULK 0
#endif
#define HAS_ASYNC (__CUDA_ARCH__ >= 800)

__device__ __forceinline__ float half_to_float(unsigned short h) {
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h));
    return f;
}
__device__ __forceinline__ float2 halves(const void* p) {
    const unsigned v = *(const unsigned*)p;
    return make_float2(half_to_float((unsigned short)v), half_to_float((unsigned short)(v >> 16)));
}

__device__ __forceinline__ void wait_for_previous_kernel() {
#if HAS_BULK
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ __forceinline__ void let_next_kernel_start() {
#if HAS_BULK
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// ---- the ring: one tile a stage, filled by the copy engine (or cp.async before Hopper) ----

__device__ __forceinline__ void barrier_init(u64* bar) {
#if HAS_BULK
    asm volatile("mbarrier.init.shared.b64 [%0], 1;" ::"r"(shared_address(bar)) : "memory");
#endif
}

#if HAS_BULK
__device__ __forceinline__ void copy_tile(u8* stage, const u8* source, int bytes, u64* bar, int lane) {
    if (lane == 0) {
        u32 b = shared_address(bar);
        asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(b), "r"(bytes) : "memory");
        asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                         shared_address(stage)),
                     "l"(source), "r"(bytes), "r"(b)
                     : "memory");
    }
}
#endif
template <int BYTES>
__device__ __forceinline__ void ring_fill(u8* stage, const u8* source, u64* bar, int lane) {
#if HAS_BULK
    copy_tile(stage, source, BYTES, bar, lane);
#elif !HAS_ASYNC
    for (int at = lane * 16; at < BYTES; at += 512) *(uint4*)(stage + at) = *(const uint4*)(source + at);
    __syncwarp();
#else
#pragma unroll
    for (int at = lane * 16; at < BYTES; at += 512)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(stage + at)), "l"(source + at) : "memory");
#endif
}

__device__ __forceinline__ void ring_wait(u64* bar, u32 parity) {
#if HAS_BULK
    asm volatile(
        "{\n .reg .pred p;\n again:\n mbarrier.try_wait.parity.shared.b64 p, [%0], %1;\n @p bra done;\n bra again;\n done:\n }" ::"r"(
            shared_address(bar)),
        "r"(parity)
        : "memory");
#endif
}

// ---- tensor core products ----

// Before compute capability 8.0 the widest is m8n8k16, whose fragments are those of m16n8k16 for eight rows, so the same
// registers multiply in two steps, and m16n8k32 in four: rows g, rows g + 8, for columns 0 to 15, then 16 to 31.
__device__ __forceinline__ void mma_k16(int (&d)[4], u32 a0, u32 a1, u32 b0) {
#if HAS_ASYNC
    asm volatile("mma.sync.aligned.m16n8k16.row.col.s32.s8.s8.s32 {%0,%1,%2,%3},{%4,%5},{%6},{%0,%1,%2,%3};"
                 : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
                 : "r"(a0), "r"(a1), "r"(b0));
#else
    asm volatile("mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 {%0,%1},{%2},{%3},{%0,%1};" : "+r"(d[0]), "+r"(d[1]) : "r"(a0), "r"(b0));
    asm volatile("mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 {%0,%1},{%2},{%3},{%0,%1};" : "+r"(d[2]), "+r"(d[3]) : "r"(a1), "r"(b0));
#endif
}
__device__ __forceinline__ void mma_k32(int (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
#if HAS_ASYNC
    asm volatile(
        "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
#else
    mma_k16(d, a0, a1, b0);
    mma_k16(d, a2, a3, b1);
#endif
}
__device__ __forceinline__ int signed_byte(u32 v, int s) { return (int)(v << (24 - 8 * s)) >> 24; }

// Activations of one super-block in shared memory: int8 in the order in which lanes want their B fragments,
// [4 chunks of 64 columns][tokens][4 lane columns][16 bytes], and of each token the scale and the sums of sub-blocks.
struct Activations {
    const u8* quants;   // [kb][4][batch][4][16]
    const u8* sums;     // [kb][batch][32]: 32-sums lo[8], hi[8]; (sum = 128 hi + lo)
    const float* scale; // [kb][8]
};

// ---- how quants lie in a tile ----
//
// A lane (g = lane / 4, c = lane % 4) owns rows g and g + 8 and, of every 16 columns, columns 4c to 4c + 3. Chunk j of 64
// columns has two sub-blocks p of 32, each two halves of 16. A Fragment is what mma.m16n8k32 takes of one sub-block;
// its (a0, a1) and (a2, a3) are what mma.m16n8k16 takes of each half.

struct Fragment { u32 a0, a1, a2, a3; };

constexpr u32 NIBBLES = 0x0f0f0f0f, PAIRS = 0x03030303, BITS = 0x01010101;

// Adds a signed constant to four bytes that stay within a byte: bytes + (0x80 - offset), sign bit flipped.
template <int OFFSET>
__device__ __forceinline__ u32 centred(u32 q) {
    return OFFSET == 0 ? q : (q + (u32)(0x80 - OFFSET) * BITS) ^ (0x80u * BITS);
}

template <int OFFSET>
struct Nibbles {  // 4 bits
    static constexpr int BYTES = 2048;
    struct High {};
    static __device__ __forceinline__ High high(const u8*, int) { return {}; }
    static __device__ __forceinline__ void get(const u8* t, int j, int lane, const High&, Fragment& f, Fragment& h) {
        const uint4 a = *(const uint4*)(t + j * 512 + lane * 16);
        f = {centred<OFFSET>(a.x & NIBBLES), centred<OFFSET>(a.y & NIBBLES), centred<OFFSET>((a.x >> 4) & NIBBLES), centred<OFFSET>((a.y >> 4) & NIBBLES)};
        h = {centred<OFFSET>(a.z & NIBBLES), centred<OFFSET>(a.w & NIBBLES), centred<OFFSET>((a.z >> 4) & NIBBLES), centred<OFFSET>((a.w >> 4) & NIBBLES)};
    }
};

__device__ __forceinline__ u32 word_of(const uint4& v, int j) { return j == 0 ? v.x : j == 1 ? v.y : j == 2 ? v.z : v.w; }

template <int OFFSET>
struct FiveBits {  // 4 bits, and one bit a weight: bit 8 i + 4 p + 2 (row >= 8) + half of the lane's word j
    static constexpr int BYTES = 2048 + 512;
    typedef uint4 High;
    static __device__ __forceinline__ High high(const u8* t, int lane) { return *(const uint4*)(t + 2048 + lane * 16); }
    static __device__ __forceinline__ u32 bit(u32 h, int n) { return ((h >> n) & BITS) << 4; }
    static __device__ __forceinline__ void get(const u8* t, int j, int lane, const High& high, Fragment& f, Fragment& h) {
        const uint4 a = *(const uint4*)(t + j * 512 + lane * 16);
        const u32 b = word_of(high, j);
        f = {centred<OFFSET>((a.x & NIBBLES) | bit(b, 0)), centred<OFFSET>((a.y & NIBBLES) | bit(b, 2)),
             centred<OFFSET>(((a.x >> 4) & NIBBLES) | bit(b, 1)), centred<OFFSET>(((a.y >> 4) & NIBBLES) | bit(b, 3))};
        h = {centred<OFFSET>((a.z & NIBBLES) | bit(b, 4)), centred<OFFSET>((a.w & NIBBLES) | bit(b, 6)),
             centred<OFFSET>(((a.z >> 4) & NIBBLES) | bit(b, 5)), centred<OFFSET>(((a.w >> 4) & NIBBLES) | bit(b, 7))};
    }
};

struct SixBits {  // 4 bits, and two bits a weight: bits 2 (2 p + half) of bytes of word 2 (j % 2) + (row >= 8), chunk pair j / 2
    static constexpr int BYTES = 2048 + 1024;
    struct High { uint4 v[2]; };
    static __device__ __forceinline__ High high(const u8* t, int lane) {
        return {{*(const uint4*)(t + 2048 + lane * 16), *(const uint4*)(t + 2560 + lane * 16)}};
    }
    static __device__ __forceinline__ u32 pair(u32 h, int n) { return ((h >> (2 * n)) & PAIRS) << 4; }
    static __device__ __forceinline__ void get(const u8* t, int j, int lane, const High& high, Fragment& f, Fragment& h) {
        const uint4 a = *(const uint4*)(t + j * 512 + lane * 16), v = high.v[j >> 1];
        const u32 r0 = j & 1 ? v.z : v.x, r1 = j & 1 ? v.w : v.y;
        f = {centred<32>((a.x & NIBBLES) | pair(r0, 0)), centred<32>((a.y & NIBBLES) | pair(r1, 0)),
             centred<32>(((a.x >> 4) & NIBBLES) | pair(r0, 1)), centred<32>(((a.y >> 4) & NIBBLES) | pair(r1, 1))};
        h = {centred<32>((a.z & NIBBLES) | pair(r0, 2)), centred<32>((a.w & NIBBLES) | pair(r1, 2)),
             centred<32>(((a.z >> 4) & NIBBLES) | pair(r0, 3)), centred<32>(((a.w >> 4) & NIBBLES) | pair(r1, 3))};
    }
};

struct TwoBits {  // laid out as the high pairs of SixBits
    static constexpr int BYTES = 1024;
    struct High { uint4 v[2]; };
    static __device__ __forceinline__ High high(const u8* t, int lane) {
        return {{*(const uint4*)(t + lane * 16), *(const uint4*)(t + 512 + lane * 16)}};
    }
    static __device__ __forceinline__ u32 pair(u32 h, int n) { return (h >> (2 * n)) & PAIRS; }
    static __device__ __forceinline__ void get(const u8*, int j, int, const High& high, Fragment& f, Fragment& h) {
        const uint4 v = high.v[j >> 1];
        const u32 r0 = j & 1 ? v.z : v.x, r1 = j & 1 ? v.w : v.y;
        f = {pair(r0, 0), pair(r1, 0), pair(r0, 1), pair(r1, 1)};
        h = {pair(r0, 2), pair(r1, 2), pair(r0, 3), pair(r1, 3)};
    }
};

struct ThreeBits {  // two bits as TwoBits, and one as FiveBits
    static constexpr int BYTES = 1024 + 512;
    struct High { uint4 v[2], bits; };
    static __device__ __forceinline__ High high(const u8* t, int lane) {
        return {{*(const uint4*)(t + lane * 16), *(const uint4*)(t + 512 + lane * 16)}, *(const uint4*)(t + 1024 + lane * 16)};
    }
    static __device__ __forceinline__ u32 q(u32 pairs, int n, u32 bits, int m) {
        return centred<4>(((pairs >> (2 * n)) & PAIRS) | (((bits >> m) & BITS) << 2));
    }
    static __device__ __forceinline__ void get(const u8*, int j, int, const High& high, Fragment& f, Fragment& h) {
        const uint4 v = high.v[j >> 1];
        const u32 r0 = j & 1 ? v.z : v.x, r1 = j & 1 ? v.w : v.y, b = word_of(high.bits, j);
        f = {q(r0, 0, b, 0), q(r1, 0, b, 2), q(r0, 1, b, 1), q(r1, 1, b, 3)};
        h = {q(r0, 2, b, 4), q(r1, 2, b, 6), q(r0, 3, b, 5), q(r1, 3, b, 7)};
    }
};

struct Bytes {  // int8
    static constexpr int BYTES = 4096;
    struct High {};
    static __device__ __forceinline__ High high(const u8*, int) { return {}; }
    static __device__ __forceinline__ void get(const u8* t, int j, int lane, const High&, Fragment& f, Fragment& h) {
        const uint4 a = *(const uint4*)(t + j * 1024 + lane * 16), b = *(const uint4*)(t + j * 1024 + 512 + lane * 16);
        f = {a.x, a.y, a.z, a.w};
        h = {b.x, b.y, b.z, b.w};
    }
};

// Four nibbles, one in the low half of each byte, to the bytes of a table of 16 (four words).
template <u32 T0, u32 T1, u32 T2, u32 T3>
struct TableNibbles {
    static constexpr int BYTES = 2048;
    struct High {};
    static __device__ __forceinline__ High high(const u8*, int) { return {}; }
    static __device__ __forceinline__ u32 look(u32 q) {
        const u32 low = q & 0x07070707u;
        // prmt takes its four selectors from the low four nibbles: bring the nibbles of the four bytes together.
        const u32 s = __byte_perm(low | (low >> 4), 0, 0x4420) & 0xffff;
        const u32 below = __byte_perm(T0, T1, s), above = __byte_perm(T2, T3, s);
        const u32 mask = ((q >> 3) & BITS) * 0xffu;
        return (below & ~mask) | (above & mask);
    }
    static __device__ __forceinline__ void get(const u8* t, int j, int lane, const High&, Fragment& f, Fragment& h) {
        const uint4 a = *(const uint4*)(t + j * 512 + lane * 16);
        f = {look(a.x & NIBBLES), look(a.y & NIBBLES), look((a.x >> 4) & NIBBLES), look((a.y >> 4) & NIBBLES)};
        h = {look(a.z & NIBBLES), look(a.w & NIBBLES), look((a.z >> 4) & NIBBLES), look((a.w >> 4) & NIBBLES)};
    }
};
typedef TableNibbles<0xbfad9881u, 0xf6eaddcfu, 0x26190d01u, 0x71594535u> Iq4;  // -127 -104 -83 -65 -49 -35 -22 -10 1 13 25 38 53 69 89 113
typedef TableNibbles<0x03020100u, 0x0c080604u, 0xfdfeff00u, 0xf4f8fafcu> E2m1;  // 0 1 2 3 4 6 8 12, and negated

// ---- how scales lie behind the quants, and how they enter the sum ----

__device__ __forceinline__ uint4 activation(const Activations& x, int kb, int j, int batch, int lane) {
    uint4 b = make_uint4(0, 0, 0, 0);
    if ((lane >> 2) < batch) b = *(const uint4*)(x.quants + ((((size_t)kb * 4 + j) * batch) * 4 + lane) * 16);
    return b;
}
__device__ __forceinline__ u32 byte_at(u32 v, int n) { return (v >> (8 * n)) & 0xff; }

// Sums of activations over sub-blocks, as the B operand of one k16 step: low 7 bits and the rest.
template <int SUBS>  // 8 or 16 sub-blocks in 256 columns
__device__ __forceinline__ void minimums(const Activations& x, int kb, int batch, int lane, u32 m0, u32 m1, int (&out)[4]) {
    const int g = lane >> 2, c = lane & 3;
    u32 low = 0, high = 0;
    if (g < batch && c < SUBS / 4) {
        const u8* sums = x.sums + ((size_t)kb * batch + g) * 48 + (SUBS == 16 ? 16 : 0);
        low = *(const u32*)(sums + c * 4);
        high = *(const u32*)(sums + SUBS + c * 4);
    }
    int n[4] = {0, 0, 0, 0};
    mma_k16(out, m0, m1, low);
    mma_k16(n, m0, m1, high);
#pragma unroll
    for (int i = 0; i < 4; i++) out[i] += 128 * n[i];
}

__device__ __forceinline__ void finish(const Activations& x, int kb, int lane, const float (&v)[4], float (&y)[4]) {
    const float2 s = *(const float2*)(x.scale + kb * 8 + 2 * (lane & 3));
    y[0] += s.x * v[0];
    y[1] += s.y * v[1];
    y[2] += s.x * v[2];
    y[3] += s.y * v[3];
}

// Eight 8-bit scales and eight mins of 32 columns, d and dmin a row (Q4_K, Q5_K).
template <class Q>
struct Scaled32Minimum {
    typedef Q Quants;
    static constexpr int TILE = Q::BYTES + ROWS * 16 + ROWS * 4;
    static __device__ __forceinline__ void tile(const u8* t, const Activations& x, int kb, int batch, int lane, float (&y)[4]) {
        const int g = lane >> 2, c = lane & 3;
        const uint4 r0 = *(const uint4*)(t + Q::BYTES + g * 16), r1 = *(const uint4*)(t + Q::BYTES + (g + 8) * 16);
        const typename Q::High high = Q::high(t, lane);
        int acc[4] = {0, 0, 0, 0};
#pragma unroll
        for (int j = 0; j < 4; j++) {
            Fragment f, h;
            Q::get(t, j, lane, high, f, h);
            const uint4 b = activation(x, kb, j, batch, lane);
            int d[4] = {0, 0, 0, 0}, e[4] = {0, 0, 0, 0};
            mma_k32(d, f.a0, f.a1, f.a2, f.a3, b.x, b.y);
            mma_k32(e, h.a0, h.a1, h.a2, h.a3, b.z, b.w);
            const u32 w0 = j < 2 ? r0.x : r0.y, w1 = j < 2 ? r1.x : r1.y;
            const int s0 = byte_at(w0, 2 * (j & 1)), s1 = byte_at(w0, 2 * (j & 1) + 1);
            const int u0 = byte_at(w1, 2 * (j & 1)), u1 = byte_at(w1, 2 * (j & 1) + 1);
            acc[0] += s0 * d[0] + s1 * e[0];
            acc[1] += s0 * d[1] + s1 * e[1];
            acc[2] += u0 * d[2] + u1 * e[2];
            acc[3] += u0 * d[3] + u1 * e[3];
        }
        int m[4] = {0, 0, 0, 0};
        minimums<8>(x, kb, batch, lane, c == 0 ? r0.z : c == 1 ? r0.w : 0u, c == 0 ? r1.z : c == 1 ? r1.w : 0u, m);
        const float2 f = halves(t + Q::BYTES + 256 + g * 4), h = halves(t + Q::BYTES + 256 + (g + 8) * 4);
        const float v[4] = {f.x * acc[0] - f.y * m[0], f.x * acc[1] - f.y * m[1], h.x * acc[2] - h.y * m[2], h.x * acc[3] - h.y * m[3]};
        finish(x, kb, lane, v, y);
    }
    // value = scale * q + offset for rows g and g + 8 of sub-block p, half `half`, of chunk j
    static __device__ __forceinline__ void factors(const u8* t, int row, int j, int p, int, float& scale, float& offset) {
        const u8* at = t + Q::BYTES + row * 16 + 2 * j + p;
        const float2 d = halves(t + Q::BYTES + 256 + row * 4);
        scale = __fmul_rn(d.x, (float)at[0]);
        offset = -__fmul_rn(d.y, (float)at[8]);
    }
};

// Eight signed scales of 32 columns, d a row (IQ4_XS).
template <class Q>
struct Scaled32 {
    typedef Q Quants;
    static constexpr int TILE = Q::BYTES + ROWS * 8 + ROWS * 2;
    static __device__ __forceinline__ void tile(const u8* t, const Activations& x, int kb, int batch, int lane, float (&y)[4]) {
        const int g = lane >> 2;
        const uint2 r0 = *(const uint2*)(t + Q::BYTES + g * 8), r1 = *(const uint2*)(t + Q::BYTES + (g + 8) * 8);
        const typename Q::High high = Q::high(t, lane);
        int acc[4] = {0, 0, 0, 0};
#pragma unroll
        for (int j = 0; j < 4; j++) {
            Fragment f, h;
            Q::get(t, j, lane, high, f, h);
            const uint4 b = activation(x, kb, j, batch, lane);
            int d[4] = {0, 0, 0, 0}, e[4] = {0, 0, 0, 0};
            mma_k32(d, f.a0, f.a1, f.a2, f.a3, b.x, b.y);
            mma_k32(e, h.a0, h.a1, h.a2, h.a3, b.z, b.w);
            const u32 w0 = j < 2 ? r0.x : r0.y, w1 = j < 2 ? r1.x : r1.y;
            const int s0 = signed_byte(w0, 2 * (j & 1)), s1 = signed_byte(w0, 2 * (j & 1) + 1);
            const int u0 = signed_byte(w1, 2 * (j & 1)), u1 = signed_byte(w1, 2 * (j & 1) + 1);
            acc[0] += s0 * d[0] + s1 * e[0];
            acc[1] += s0 * d[1] + s1 * e[1];
            acc[2] += u0 * d[2] + u1 * e[2];
            acc[3] += u0 * d[3] + u1 * e[3];
        }
        const u8* at = t + Q::BYTES + 128;
        const float f = half_to_float(*(const unsigned short*)(at + g * 2)), h = half_to_float(*(const unsigned short*)(at + (g + 8) * 2));
        const float v[4] = {f * acc[0], f * acc[1], h * acc[2], h * acc[3]};
        finish(x, kb, lane, v, y);
    }
    static __device__ __forceinline__ void factors(const u8* t, int row, int j, int p, int, float& scale, float& offset) {
        const float d = half_to_float(*(const unsigned short*)(t + Q::BYTES + 128 + row * 2));
        scale = __fmul_rn(d, (float)*(const signed char*)(t + Q::BYTES + row * 8 + 2 * j + p));
        offset = 0.f;
    }
};

// Sixteen scales of 16 columns a row: signed and d (Q3_K, Q6_K), or nibbles of scale and minimum, d and dmin (Q2_K).
template <class Q, bool MINIMUM>
struct Scaled16 {
    typedef Q Quants;
    static constexpr int TILE = Q::BYTES + ROWS * 16 + ROWS * (MINIMUM ? 4 : 2);
    static __device__ __forceinline__ int scale(u32 v, int n) {
        return MINIMUM ? (int)((v >> (8 * n)) & 15) : signed_byte(v, n);
    }
    static __device__ __forceinline__ void tile(const u8* t, const Activations& x, int kb, int batch, int lane, float (&y)[4]) {
        const int g = lane >> 2, c = lane & 3;
        const uint4 r0 = *(const uint4*)(t + Q::BYTES + g * 16), r1 = *(const uint4*)(t + Q::BYTES + (g + 8) * 16);
        const typename Q::High high = Q::high(t, lane);
        int acc[4] = {0, 0, 0, 0};
#pragma unroll
        for (int j = 0; j < 4; j++) {
            Fragment f[2];
            Q::get(t, j, lane, high, f[0], f[1]);
            const uint4 b = activation(x, kb, j, batch, lane);
            const u32 bb[4] = {b.x, b.y, b.z, b.w}, w0 = word_of(r0, j), w1 = word_of(r1, j);
#pragma unroll
            for (int s = 0; s < 4; s++) {
                int d[4] = {0, 0, 0, 0};
                const Fragment& q = f[s >> 1];
                mma_k16(d, s & 1 ? q.a2 : q.a0, s & 1 ? q.a3 : q.a1, bb[s]);
                const int k0 = scale(w0, s), k1 = scale(w1, s);
                acc[0] += k0 * d[0];
                acc[1] += k0 * d[1];
                acc[2] += k1 * d[2];
                acc[3] += k1 * d[3];
            }
        }
        const u8* at = t + Q::BYTES + 256;
        float v[4];
        if (MINIMUM) {
            int m[4] = {0, 0, 0, 0};
            minimums<16>(x, kb, batch, lane, (word_of(r0, c) >> 4) & NIBBLES, (word_of(r1, c) >> 4) & NIBBLES, m);
            const float2 f = halves(at + g * 4), h = halves(at + (g + 8) * 4);
            v[0] = f.x * acc[0] - f.y * m[0];
            v[1] = f.x * acc[1] - f.y * m[1];
            v[2] = h.x * acc[2] - h.y * m[2];
            v[3] = h.x * acc[3] - h.y * m[3];
        } else {
            const float f = half_to_float(*(const unsigned short*)(at + g * 2)), h = half_to_float(*(const unsigned short*)(at + (g + 8) * 2));
            v[0] = f * acc[0];
            v[1] = f * acc[1];
            v[2] = h * acc[2];
            v[3] = h * acc[3];
        }
        finish(x, kb, lane, v, y);
    }
    static __device__ __forceinline__ void factors(const u8* t, int row, int j, int p, int half, float& scale, float& offset) {
        const u8 k = t[Q::BYTES + row * 16 + 4 * j + 2 * p + half];
        const u8* at = t + Q::BYTES + 256;
        if (MINIMUM) {
            const float2 d = halves(at + row * 4);
            scale = __fmul_rn(d.x, (float)(k & 15));
            offset = -__fmul_rn(d.y, (float)(k >> 4));
        } else {
            scale = __fmul_rn(half_to_float(*(const unsigned short*)(at + row * 2)), (float)(signed char)k);
            offset = 0.f;
        }
    }
};

// A float scale (and perhaps an offset) of 32 columns: Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, IQ4_NL; or a power of two: MXFP4.
enum Scale { HALF, HALF_OFFSET, POWER };
template <class Q, Scale KIND>
struct Float32Columns {
    typedef Q Quants;
    static constexpr int TILE = Q::BYTES + (KIND == POWER ? ROWS * 8 : KIND == HALF ? ROWS * 16 : ROWS * 32);
    static __device__ __forceinline__ float power(u32 e) {  // half of 2**(e - 127): tables hold doubled values
        return __uint_as_float(e < 2 ? 0x00200000u << e : (e - 1) << 23);
    }
    static __device__ __forceinline__ float value(const u32 (&w)[4], int s) {
        return KIND == POWER ? power(byte_at(w[s >> 2], s & 3)) : half_to_float((unsigned short)(w[s >> 1] >> (16 * (s & 1))));
    }
    static __device__ __forceinline__ void row(const u8* at, int r, u32 (&w)[4]) {
        if (KIND == POWER) {
            const uint2 v = *(const uint2*)(at + r * 8);
            w[0] = v.x; w[1] = v.y; w[2] = 0; w[3] = 0;
        } else {
            const uint4 v = *(const uint4*)(at + r * 16);
            w[0] = v.x; w[1] = v.y; w[2] = v.z; w[3] = v.w;
        }
    }
    static __device__ __forceinline__ void tile(const u8* t, const Activations& x, int kb, int batch, int lane, float (&y)[4]) {
        const int g = lane >> 2, c = lane & 3;
        u32 w0[4], w1[4];
        row(t + Q::BYTES, g, w0);
        row(t + Q::BYTES, g + 8, w1);
        const typename Q::High high = Q::high(t, lane);
        float v[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
        for (int j = 0; j < 4; j++) {
            Fragment f[2];
            Q::get(t, j, lane, high, f[0], f[1]);
            const uint4 b = activation(x, kb, j, batch, lane);
#pragma unroll
            for (int p = 0; p < 2; p++) {
                int d[4] = {0, 0, 0, 0};
                mma_k32(d, f[p].a0, f[p].a1, f[p].a2, f[p].a3, p ? b.z : b.x, p ? b.w : b.y);
                const float s0 = value(w0, 2 * j + p), s1 = value(w1, 2 * j + p);
                v[0] += s0 * d[0];
                v[1] += s0 * d[1];
                v[2] += s1 * d[2];
                v[3] += s1 * d[3];
            }
        }
        if (KIND == HALF_OFFSET) {
            row(t + Q::BYTES + ROWS * 16, g, w0);
            row(t + Q::BYTES + ROWS * 16, g + 8, w1);
#pragma unroll
            for (int n = 0; n < 2; n++)
                if (2 * c + n < batch) {
                    const u8* sums = x.sums + ((size_t)kb * batch + 2 * c + n) * 48;
#pragma unroll
                    for (int s = 0; s < 8; s++) {
                        const float total = (int)sums[s] + 128 * (int)(signed char)sums[8 + s];
                        v[n] += value(w0, s) * total;
                        v[2 + n] += value(w1, s) * total;
                    }
                }
        }
        finish(x, kb, lane, v, y);
    }
    static __device__ __forceinline__ void factors(const u8* t, int r, int j, int p, int, float& scale, float& offset) {
        u32 w[4];
        row(t + Q::BYTES, r, w);
        scale = value(w, 2 * j + p);
        offset = 0.f;
        if (KIND == HALF_OFFSET) {
            row(t + Q::BYTES + ROWS * 16, r, w);
            offset = value(w, 2 * j + p);
        }
    }
};

typedef Float32Columns<Nibbles<8>, HALF> Q4_0;
typedef Float32Columns<Nibbles<0>, HALF_OFFSET> Q4_1;
typedef Float32Columns<FiveBits<16>, HALF> Q5_0;
typedef Float32Columns<FiveBits<0>, HALF_OFFSET> Q5_1;
typedef Float32Columns<Bytes, HALF> Q8_0;
typedef Float32Columns<Iq4, HALF> IQ4_NL;
typedef Float32Columns<E2m1, POWER> MXFP4;
typedef Scaled16<TwoBits, true> Q2_K;
typedef Scaled16<ThreeBits, false> Q3_K;
typedef Scaled32Minimum<Nibbles<0>> Q4_K;
typedef Scaled32Minimum<FiveBits<0>> Q5_K;
typedef Scaled16<SixBits, false> Q6_K;
typedef Scaled32<Iq4> IQ4_XS;

// ---- activations: half -> int8 with one scale for 256 columns, in shared memory, by every block for itself ----

// x: half or bfloat16 [tokens][columns]; not __restrict__, or its loads might be moved above the wait for its writer. columns and phase are multiples of 8: column k of x belongs to weight column k + phase
// of the first super-block. A warp takes 256 columns of one token at a time, a lane 8 of them; LOADS of them are on
// their way before the first is used. With EXACT a token takes two columns of B: 16-bit integers as 256 high + low.
constexpr int LOADS = 4;

template <bool BFLOAT>
__device__ __forceinline__ float unpack(u32 w, int i) {
    if (BFLOAT) return __uint_as_float(i ? w & 0xffff0000u : w << 16);
    return half_to_float((unsigned short)(w >> (16 * i)));
}
__device__ __forceinline__ float absolute_max(const float (&v)[8]) {
    float most = 0.f;
#pragma unroll
    for (int i = 0; i < 8; i++) most = fmaxf(most, fabsf(v[i]));
#pragma unroll
    for (int o = 16; o; o >>= 1) most = fmaxf(most, __shfl_xor_sync(0xffffffff, most, o));
    return most;
}

// One token's 256 int8 values (8 a lane) to their places, with their sums.
__device__ __forceinline__ void store_quants(const int (&q)[8], int kb, int n, int batch, int lane, u8* quants, u8* sums) {
    const int s = lane >> 2, half = (lane & 3) >> 1, c = (lane & 1) * 2, j = s >> 1;
    u8* base = quants + ((((size_t)kb * 4 + j) * batch + n) * 4) * 16 + (s & 1) * 8 + half * 4;
    int sum = 0;
#pragma unroll
    for (int i = 0; i < 8; i++) sum += q[i];
#pragma unroll
    for (int p = 0; p < 2; p++)
        *(u32*)(base + (c + p) * 16) = (q[4 * p] & 0xff) | (q[4 * p + 1] & 0xff) << 8 | (q[4 * p + 2] & 0xff) << 16 | (u32)(q[4 * p + 3] & 0xff) << 24;
    u8* at = sums + ((size_t)kb * batch + n) * 48;
    sum += __shfl_xor_sync(0xffffffff, sum, 1);
    if ((lane & 1) == 0) {
        at[16 + (lane >> 1)] = (u8)(sum & 127);
        at[32 + (lane >> 1)] = (u8)(sum >> 7);
    }
    sum += __shfl_xor_sync(0xffffffff, sum, 2);
    if ((lane & 3) == 0) {
        at[s] = (u8)(sum & 127);
        at[8 + s] = (u8)(sum >> 7);
    }
}

// The same for 16-bit integers: token n's high bytes in column 2 n, low bytes in column 2 n + 1.
__device__ __forceinline__ void store_exact(const float (&v)[8], float most, int kb, int n, int batch, int lane, u8* quants, u8* sums, float* scale) {
    const float inverse = most > 0.f ? 32512.f / most : 0.f;
    int q[8], r[8];
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const int value = __float2int_rn(v[i] * inverse);
        q[i] = (value + 128) >> 8;
        r[i] = value - 256 * q[i];
    }
    store_quants(q, kb, 2 * n, batch, lane, quants, sums);
    store_quants(r, kb, 2 * n + 1, batch, lane, quants, sums);
    if (lane == 0) {
        scale[kb * 8 + 2 * n] = most / 127.f;
        scale[kb * 8 + 2 * n + 1] = most / 32512.f;
    }
}

template <bool EXACT, bool BFLOAT>
__device__ void quantise(const u8* x, int columns, int phase, int n_kb, int tokens, u8* quants, u8* sums, float* scale) {
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    const int batch = EXACT ? 2 * tokens : tokens;
    for (int i = threadIdx.x; i < n_kb * 8; i += blockDim.x) if ((i & 7) >= batch) scale[i] = 0.f;
    const int jobs = n_kb * tokens;
    for (int first = warp; first < jobs; first += WARPS * LOADS) {
        uint4 raw[LOADS];
#pragma unroll
        for (int u = 0; u < LOADS; u++) {
            const int job = first + u * WARPS, kb = job / tokens, n = job - kb * tokens, k = kb * 256 + lane * 8 - phase;
            raw[u] = make_uint4(0, 0, 0, 0);
            if (job < jobs && k >= 0 && k < columns) raw[u] = *(const uint4*)(x + ((size_t)n * columns + k) * 2);
        }
#pragma unroll
        for (int u = 0; u < LOADS; u++) {
            const int job = first + u * WARPS, kb = job / tokens, n = job - kb * tokens;
            if (job >= jobs) break;
            const u32 w[4] = {raw[u].x, raw[u].y, raw[u].z, raw[u].w};
            float v[8];
#pragma unroll
            for (int i = 0; i < 8; i++) v[i] = unpack<BFLOAT>(w[i >> 1], i & 1);
            const float most = absolute_max(v);
            if (EXACT) {
                store_exact(v, most, kb, n, batch, lane, quants, sums, scale);
            } else {
                const float inverse = most > 0.f ? 127.f / most : 0.f;
                int q[8];
#pragma unroll
                for (int i = 0; i < 8; i++) q[i] = __float2int_rn(v[i] * inverse);
                store_quants(q, kb, n, batch, lane, quants, sums);
                if (lane == 0) scale[kb * 8 + n] = most / 127.f;
            }
        }
    }
}

// ---- the kernel ----

template <bool BFLOAT>
__device__ __forceinline__ unsigned short pack(float v) {
    unsigned short r;
    if (BFLOAT) {
        const u32 b = __float_as_uint(v);
        r = (unsigned short)((b + 0x7fff + ((b >> 16) & 1)) >> 16);
    } else {
        asm("cvt.rn.f16.f32 %0, %1;" : "=h"(r) : "f"(v));
    }
    return r;
}

// Up to three matrices with the same columns, one behind the other in the result: q, k, v; gate, up. A matrix is of type A,
// or of type B where its bit in `kinds` is set.
struct Matrices {
    const u8 *w0, *w1, *w2;
    int rows0, rows1, rows2;
    int kinds;
    // Selections, not an array: an array indexed at run time would live in local memory.
    __device__ __forceinline__ const u8* w(int part) const { return part == 0 ? w0 : part == 1 ? w1 : w2; }
    __device__ __forceinline__ int rows(int part) const { return part == 0 ? rows0 : part == 1 ? rows1 : rows2; }
};

__device__ __forceinline__ float activated(float g, int gelu) {
    if (gelu) {
        const float inner = 0.7978845608028654f * (g + 0.044715f * g * g * g);
        return 0.5f * g * (1.f + tanhf(inner));
    }
    return g / (1.f + __expf(-g));
}

// Where a copy or a sum stands: row group `group` of matrix `part`, super-block kb.
struct Cursor {
    int part, group, kb;
};

// y[tokens][all rows] in x's type, or float32 (FLOAT_OUT: partial sums before a reduction). GATED: two matrices of the same
// rows; y[tokens][rows] = activation(first) * second.
template <class A, class B, int STAGES, bool EXACT, bool BFLOAT, bool FLOAT_OUT, bool GATED>
__device__ __forceinline__ void gemv_body(const Matrices& m, const u8* x, void* y,
                                          const float* __restrict__ bias, int columns, int phase, int n_kb, int tokens, int gelu) {
    extern __shared__ __align__(128) u8 shared[];
    constexpr int TILE = A::TILE > B::TILE ? A::TILE : B::TILE;
    const int batch = EXACT ? 2 * tokens : tokens;
    u8* ring = shared;
    u64* bars = (u64*)(ring + (size_t)WARPS * STAGES * TILE);
    float* partial = (float*)(bars + WARPS * STAGES);  // [2][WARPS][128]
    float* scale = partial + 2 * WARPS * 128;
    u8* quants = (u8*)(scale + n_kb * 8);
    u8* sums = quants + (size_t)n_kb * 256 * batch;

    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    let_next_kernel_start();
    u8* my_ring = ring + (size_t)warp * STAGES * TILE;
    u64* my_bars = bars + warp * STAGES;
    if (lane == 0)
        for (int s = 0; s < STAGES; s++) barrier_init(my_bars + s);
#if HAS_BULK
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
    __syncwarp();
    // Groups of all matrices count through: a cursor that has passed one's last goes on in the next.
    auto settle = [&](Cursor& at) {
        while (at.part < 3) {
            const int groups = (m.rows(at.part) + ROWS - 1) / ROWS;
            if (at.group < groups) break;
            at.group -= groups;
            at.part = GATED ? 3 : at.part + 1;
        }
    };
    auto next_group = [&](Cursor& at) {
        if (GATED && at.part == 0) { at.part = 1; return; }
        if (GATED) at.part = 0;
        at.group += gridDim.x;
        settle(at);
    };
    auto is_b = [&](int part) { return (m.kinds >> part) & 1; };
    // The cursor of the copies runs STAGES tiles ahead of the sums.
    Cursor ahead = {0, (int)blockIdx.x, warp};
    settle(ahead);
    auto fill = [&](int stage) {
        if (ahead.part < 3 && ahead.kb < n_kb) {
            const size_t tile = (size_t)ahead.group * n_kb + ahead.kb;
            u8* target = my_ring + (size_t)stage * TILE;
            if (is_b(ahead.part)) ring_fill<B::TILE>(target, m.w(ahead.part) + tile * B::TILE, my_bars + stage, lane);
            else ring_fill<A::TILE>(target, m.w(ahead.part) + tile * A::TILE, my_bars + stage, lane);
            ahead.kb += WARPS;
            if (ahead.kb >= n_kb) { ahead.kb = warp; next_group(ahead); }
        }
#if HAS_ASYNC && !HAS_BULK
        asm volatile("cp.async.commit_group;" ::: "memory");
#endif
    };
    for (int s = 0; s < STAGES; s++) fill(s);

    wait_for_previous_kernel();
    quantise<EXACT, BFLOAT>(x, columns, phase, n_kb, tokens, quants, sums, scale);
    __syncthreads();
    const Activations act = {quants, sums, scale};

    int stage = 0, buffer = 0, total = m.rows0 + (GATED ? 0 : m.rows1 + m.rows2);
    u32 parity = 0;
    float gate = 0.f;
    Cursor at = {0, (int)blockIdx.x, 0};
    settle(at);
    while (at.part < 3) {
        float acc[4] = {0.f, 0.f, 0.f, 0.f};
        const bool second = is_b(at.part);
        for (int kb = warp; kb < n_kb; kb += WARPS) {
#if HAS_BULK
            ring_wait(my_bars + stage, parity);
#elif HAS_ASYNC
            asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 1) : "memory");
            __syncwarp();
#endif
            const u8* tile = my_ring + (size_t)stage * TILE;
            if (second) B::tile(tile, act, kb, batch, lane, acc);
            else A::tile(tile, act, kb, batch, lane, acc);
            __syncwarp();
            fill(stage);
            if (++stage == STAGES) { stage = 0; parity ^= 1; }
        }
        *(float4*)(partial + ((size_t)buffer * WARPS + warp) * 128 + lane * 4) = make_float4(acc[0], acc[1], acc[2], acc[3]);
        __syncthreads();
        if (warp < 4) {
            // 128 results: thread i of the first four warps adds them up over warps, in warp order. Element e of lane
            // l is row l / 4 (+ 8 for e >= 2), column 2 (l % 4) + e % 2.
            const int i = threadIdx.x, owner = i >> 2, e = i & 3;
            float sum = 0.f;
#pragma unroll
            for (int v = 0; v < WARPS; v++) sum += partial[((size_t)buffer * WARPS + v) * 128 + i];
            const int row = at.group * ROWS + (owner >> 2) + (e >> 1) * 8;
            int n = (owner & 3) * 2 + (e & 1);
            if (EXACT) {
                sum += __shfl_xor_sync(0xffffffff, sum, 1);  // high and low parts are neighbours
                n = e & 1 ? batch : n >> 1;
            }
            if (row < m.rows(at.part) && n < tokens) {
                const int before = GATED ? 0 : (at.part > 0 ? m.rows0 : 0) + (at.part > 1 ? m.rows1 : 0);
                if (bias) sum += bias[(GATED && at.part ? m.rows0 : before) + row];
                const size_t out = (size_t)n * total + before + row;
                if (GATED && at.part == 0) gate = activated(sum, gelu);
                else if (FLOAT_OUT) ((float*)y)[out] = GATED ? gate * sum : sum;
                else ((unsigned short*)y)[out] = pack<BFLOAT>(GATED ? gate * sum : sum);
            }
        }
        buffer ^= 1;
        next_group(at);
    }
}

// ---- weights back to numbers, for products with many tokens and for embeddings ----

// out[i][columns] of row groups: group i of the result is row group groups[i], or `first` + i without a list. KIND 0 half,
// 1 bfloat16, 2 float32. Bit for bit ggml's value in float32: product, then sum, each rounded. A warp takes one tile.
template <class Q, class T, int KIND>
__device__ __forceinline__ void expand_body(const u8* __restrict__ w, void* __restrict__ out, int rows, int columns, int phase,
                                            int n_kb, int first, int n_groups, const long long* __restrict__ groups) {
    const int lane = threadIdx.x & 31, g = lane >> 2, c = lane & 3;
    const int job = blockIdx.x * (blockDim.x >> 5) + (threadIdx.x >> 5);
    if (job >= n_groups * n_kb) return;
    const int i = job / n_kb, kb = job - i * n_kb;
    const long long group = groups ? groups[i] : first + i;
    const u8* t = w + ((size_t)group * n_kb + kb) * T::TILE;
    const typename Q::High high = Q::high(t, lane);
#pragma unroll
    for (int j = 0; j < 4; j++) {
        Fragment f[2];
        Q::get(t, j, lane, high, f[0], f[1]);
#pragma unroll
        for (int p = 0; p < 2; p++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int k = kb * 256 + j * 64 + p * 32 + half * 16 + 4 * c - phase;
#pragma unroll
                for (int r = 0; r < 2; r++) {
                    const int row = g + 8 * r;
                    const u32 q = half ? (r ? f[p].a3 : f[p].a2) : (r ? f[p].a1 : f[p].a0);
                    float scale, offset, v[4];
                    T::factors(t, row, j, p, half, scale, offset);
#pragma unroll
                    for (int e = 0; e < 4; e++) v[e] = __fadd_rn(__fmul_rn(scale, (float)signed_byte(q, e)), offset);
                    if (k < 0 || k >= columns || (!groups && group * ROWS + row >= rows)) continue;
                    const size_t at = ((size_t)i * ROWS + row) * columns + k;
                    if (KIND == 2) {
                        *(float4*)((float*)out + at) = make_float4(v[0], v[1], v[2], v[3]);
                    } else {
                        constexpr bool B = KIND == 1;
                        *(uint2*)((unsigned short*)out + at) = make_uint2(pack<B>(v[0]) | (u32)pack<B>(v[1]) << 16, pack<B>(v[2]) | (u32)pack<B>(v[3]) << 16);
                    }
                }
            }
    }
}

// out[n][columns] = scale * row ids[n] - first of the weights, or zeros where that row is not here. ids[n] < 0: the id is
// last[slots[n]]. The values are expand_body's. A warp takes one super-block of one row; only lanes that hold it work.
template <class Q, class T>
__device__ __forceinline__ void embed_body(const u8* __restrict__ w, float* __restrict__ out, int rows, int columns, int n_kb,
                                           const int* ids, const int* slots, const long long* last, int first, int tokens, float scale) {
    const int lane = threadIdx.x & 31, g = lane >> 2, c = lane & 3;
    const int job = blockIdx.x * (blockDim.x >> 5) + (threadIdx.x >> 5), n = job / n_kb, kb = job - n * n_kb;
    if (n >= tokens) return;
    const long long id = (ids[n] < 0 ? last[slots[n]] : ids[n]) - first;
    const bool here = id >= 0 && id < rows;
    const int row = here ? (int)(id & (ROWS - 1)) : 0;
    if (g != (row & 7)) return;
    const u8* t = w + ((here ? id / ROWS : 0) * n_kb + kb) * T::TILE;
    const typename Q::High high = Q::high(t, lane);
#pragma unroll
    for (int j = 0; j < 4; j++) {
        Fragment f[2];
        Q::get(t, j, lane, high, f[0], f[1]);
#pragma unroll
        for (int p = 0; p < 2; p++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int k = kb * 256 + j * 64 + p * 32 + half * 16 + 4 * c;
                if (k >= columns) continue;
                const u32 low = half ? f[p].a2 : f[p].a0, q = row & 8 ? (half ? f[p].a3 : f[p].a1) : low;
                float factor, offset, v[4];
                T::factors(t, row, j, p, half, factor, offset);
#pragma unroll
                for (int e = 0; e < 4; e++)
                    v[e] = here ? __fmul_rn(scale, __fadd_rn(__fmul_rn(factor, (float)signed_byte(q, e)), offset)) : 0.f;
                *(float4*)(out + (size_t)n * columns + k) = make_float4(v[0], v[1], v[2], v[3]);
            }
    }
}

#ifndef TYPE
#define TYPE Q4_K
#endif
#ifndef TYPE_B
#define TYPE_B TYPE
#endif
// Other sources that follow this one in a program take only what stands above.
#ifndef LEND_DEVICE_FUNCTIONS
#ifndef NSTAGES
#define NSTAGES 2
#endif
#ifndef EXACT_MODE
#define EXACT_MODE false
#endif
#ifndef BFLOAT_MODE
#define BFLOAT_MODE false
#endif
#define GEMV(name, float_out, gated)                                                                                          \
    extern "C" __global__ void __launch_bounds__(WARPS * 32, 2) name(                                                        \
        const u8* w0, const u8* w1, const u8* w2, const u8* x, void* y, const float* bias, int rows0, int rows1, int rows2,   \
        int kinds, int columns, int phase, int n_kb, int tokens, int gelu) {                                                  \
        const Matrices m = {w0, w1, w2, rows0, rows1, rows2, kinds};                                                                        \
        gemv_body<TYPE, TYPE_B, NSTAGES, EXACT_MODE, BFLOAT_MODE, float_out, gated>(m, x, y, bias, columns, phase, n_kb,      \
                                                                                    tokens, gelu);                            \
    }
GEMV(gemv, false, false)
GEMV(gemv_float, true, false)
GEMV(gemv_gated, false, true)

#define EXPAND(name, kind)                                                                                                    \
    extern "C" __global__ void __launch_bounds__(256) name(const u8* w, void* out, int rows, int columns, int phase, int n_kb, \
                                                           int first, int n_groups, const long long* groups) {                \
        expand_body<TYPE::Quants, TYPE, kind>(w, out, rows, columns, phase, n_kb, first, n_groups, groups);                   \
    }
EXPAND(expand_half, 0)
EXPAND(expand_bfloat, 1)
EXPAND(expand_float, 2)

extern "C" __global__ void __launch_bounds__(256) embed(const u8* w, float* out, int rows, int columns, int n_kb, const int* ids,
                                                        const int* slots, const long long* last, int first, int tokens, float scale) {
    embed_body<TYPE::Quants, TYPE>(w, out, rows, columns, n_kb, ids, slots, last, first, tokens, scale);
}
#endif  // LEND_DEVICE_FUNCTIONS
