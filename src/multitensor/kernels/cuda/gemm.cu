// Products of quantised weights in tiles with 5 to 64 tokens: y[t, n] = sum_k W[n, k] x[t, k]. Follows gemv.cu, which
// says how tiles lie, and reads activations as activations.cu leaves them.
//
// Weights become float16 in registers and the A operand of m16n8k16, tokens are its n. What enters the product is a small
// integer, exact in float16: the quant times its sub-block's integer scale, so that a super-block needs one scaling of its
// sums (K-quants), or the quant alone (types with a float scale every 32). A byte u becomes 1024 + u by one permutation
// of bytes; the 1024 leaves again in the multiplication by the scale. Sums are float32.
//
// A unit is one super-block of columns of SLOTS row groups; units of all row groups, columns innermost, are dealt evenly
// to the blocks, so every block streams the same number of bytes whatever the shape. A warp keeps its row groups' sums
// in registers through a run of columns. Where a run is cut between blocks, they add up the parts together, each a share of
// the results. Cuts and sums do not depend on the number of tokens: a token's result has the same bits in any company.
//
// Defines beside gemv.cu's: ROW_TILES (row groups a warp), TOKEN_TILES (of eight tokens), NSTAGES, GATED_MODE, WIDE.

typedef unsigned short u16;

// WIDE: wgmma of sm_90a, for types whose sums run through a super-block. Four warps make one product of 64 rows, which reads
// the activations from shared memory itself, and go on decoding meanwhile.
#ifndef WIDE
#define WIDE 0
#endif

constexpr int MT = ROW_TILES, NT = TOKEN_TILES, STAGES = NSTAGES, SLOTS = WARPS * MT, THREADS = WARPS * 32;
constexpr int TOGETHER = WIDE ? 4 * MT : MT;         // slots that are of one type
constexpr int PADDED = TOGETHER < 4 ? 4 : TOGETHER;  // row groups: a matrix begins at a multiple of them, WIDE or not
constexpr int CHUNK = NT * (4096 + 256 + 512);  // bytes of activations a super-block
constexpr u32 EVERY_LANE = 0xffffffffu;
static_assert(SLOTS % (2 * TOGETHER) == 0, "gate and up take half of the slots each");

// ---- arithmetic ----

__device__ __forceinline__ u32 add2(u32 a, u32 b) {
    u32 r;
    asm("add.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
    return r;
}
__device__ __forceinline__ u32 mul2(u32 a, u32 b) {
    u32 r;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
    return r;
}
__device__ __forceinline__ u32 fma2(u32 a, u32 b, u32 c) {
    u32 r;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
    return r;
}

// d = a b + c; without c where FIRST.
template <bool FIRST>
__device__ __forceinline__ void product(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    const float c0 = FIRST ? 0.f : d[0], c1 = FIRST ? 0.f : d[1], c2 = FIRST ? 0.f : d[2], c3 = FIRST ? 0.f : d[3];
#if __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%10,%11,%12,%13};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1), "f"(c0), "f"(c1), "f"(c2), "f"(c3));
#else
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5},{%6},{%7,%8,%9,%10};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a0), "r"(a1), "r"(b0), "f"(c0), "f"(c1), "f"(c2), "f"(c3));
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5},{%6},{%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a2), "r"(a3), "r"(b1));
#endif
}

#if WIDE
// d = a b + d, or a b where FIRST: 64 rows, of which a warp has 16, by 8 NT tokens by 16 columns. It goes on behind the
// program's back until `wide_wait`. at: of b in shared memory, [2 eights of columns][tokens][16 bytes].
#define FOUR(kind, n) kind(d[n][0]), kind(d[n][1]), kind(d[n][2]), kind(d[n][3])
#if TOKEN_TILES == 1
#define WIDE_NAME "wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%0,%1,%2,%3},{%4,%5,%6,%7},%8,%9,1,1,0;"
#define ALL(kind) FOUR(kind, 0)
#elif TOKEN_TILES == 2
#define WIDE_NAME "wgmma.mma_async.sync.aligned.m64n16k16.f32.f16.f16 {%0,%1,%2,%3,%4,%5,%6,%7},{%8,%9,%10,%11},%12,%13,1,1,0;"
#define ALL(kind) FOUR(kind, 0), FOUR(kind, 1)
#elif TOKEN_TILES == 4
#define WIDE_NAME                                                                                                          \
    "wgmma.mma_async.sync.aligned.m64n32k16.f32.f16.f16 {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15},"          \
    "{%16,%17,%18,%19},%20,%21,1,1,0;"
#define ALL(kind) FOUR(kind, 0), FOUR(kind, 1), FOUR(kind, 2), FOUR(kind, 3)
#else
#define WIDE_NAME                                                                                                          \
    "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"           \
    "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31},{%32,%33,%34,%35},%36,%37,1,1,0;"
#define ALL(kind) FOUR(kind, 0), FOUR(kind, 1), FOUR(kind, 2), FOUR(kind, 3), FOUR(kind, 4), FOUR(kind, 5), FOUR(kind, 6), FOUR(kind, 7)
#endif
#define NEW "=f"
#define KEPT "+f"

template <bool FIRST>
__device__ __forceinline__ void wide_product(float (&d)[NT][4], const u32 (&a)[4], const u8* at) {
    // Core matrices of eight tokens and 16 bytes lie whole; the next eight columns NT of them further, the next tokens behind.
    const u64 where = (shared_address(at) & 0x3ffff) >> 4 | (u64)(NT * 128 >> 4) << 16 | (u64)(128 >> 4) << 32;
    if (FIRST) asm volatile(WIDE_NAME : ALL(NEW) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(where), "n"(0) : "memory");
    else asm volatile(WIDE_NAME : ALL(KEPT) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(where), "n"(1) : "memory");
}
__device__ __forceinline__ void wide_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wide_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int LEFT>  // groups that may still be under way
__device__ __forceinline__ void wide_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory"); }
// d is read behind this.
__device__ __forceinline__ void wide_result(float (&d)[NT][4]) { asm volatile("" : ALL(KEPT)::"memory"); }
#endif

// ---- bytes to halves ----

constexpr u32 MAGIC = BITS * 0x64;  // the high byte of the halves from 1024 to 1279
constexpr u32 MINUS_1024 = 0xe400e400, MINUS_1152 = 0xe480e480;

// Whether a Fragment's bytes are signed: then 128 is added to make them u.
template <class Q> struct Signed { static constexpr bool VALUE = true; };
template <> struct Signed<Nibbles<0>> { static constexpr bool VALUE = false; };
template <> struct Signed<FiveBits<0>> { static constexpr bool VALUE = false; };
template <> struct Signed<TwoBits> { static constexpr bool VALUE = false; };

// Bytes 0 and 1, or 2 and 3, as halves 1024 + u.
__device__ __forceinline__ u32 raised(u32 bytes, int which) { return __byte_perm(bytes, MAGIC, which ? 0x4342 : 0x4140); }
// Byte n twice.
__device__ __forceinline__ u32 raised_twice(u32 bytes, int n) { return __byte_perm(bytes, MAGIC, 0x4040 + 0x0101 * n); }

// What a lane's quants of one sub-block are multiplied by, for rows g and g + 8 and its halves of 16 columns.
struct Factors { u32 k[2][2]; };  // [half][row]

// A operands of the sub-block's two products: quants, times the factors where SCALED.
template <class Q, bool SCALED>
__device__ __forceinline__ void operands(const Fragment& q, const Factors& factors, u32 (&a)[2][4]) {
    constexpr bool SIGNED = Signed<Q>::VALUE;
#pragma unroll
    for (int half = 0; half < 2; half++)
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const u32 bytes = (half ? (r ? q.a3 : q.a2) : (r ? q.a1 : q.a0)) ^ (SIGNED ? 0x80 * BITS : 0u);
            const u32 k = factors.k[half][r];
#pragma unroll
            for (int e = 0; e < 2; e++) {
                const u32 u = raised(bytes, e);
                u32& to = a[half][2 * e + r];
                if (!SCALED) to = add2(u, SIGNED ? MINUS_1152 : MINUS_1024);
                else if (SIGNED) to = mul2(add2(u, MINUS_1152), k);
                else to = fma2(u, k, mul2(k, MINUS_1024));  // exact: |k| < 64, quants < 32
            }
        }
}

// ---- how scales enter, type by type ----
//
// A Form holds the scales of a lane's two rows of one tile. WHOLE: sums run through the super-block and `finish` scales
// them; else `add` scales those of each sub-block. SUMS: 1 if sums over 32 columns are needed, 2 if over 16.

template <class T> struct Form;

__device__ __forceinline__ u32 two_bytes(const u8* p) { return *(const u16*)p; }

__device__ __forceinline__ void scaled(float (&y)[4], const float (&d)[4], float low, float high) {
    y[0] = __fmaf_rn(low, d[0], y[0]);
    y[1] = __fmaf_rn(low, d[1], y[1]);
    y[2] = __fmaf_rn(high, d[2], y[2]);
    y[3] = __fmaf_rn(high, d[3], y[3]);
}

template <class Q> struct Form<Scaled32Minimum<Q>> {
    static constexpr bool WHOLE = true;
    static constexpr int SUMS = 1;
    uint2 w[2];
    __device__ __forceinline__ void load(const u8* t, int g) {
        w[0] = *(const uint2*)(t + Q::BYTES + g * 16);
        w[1] = *(const uint2*)(t + Q::BYTES + (g + 8) * 16);
    }
    __device__ __forceinline__ Factors factors(int s) const {
        Factors f;
#pragma unroll
        for (int r = 0; r < 2; r++) f.k[0][r] = f.k[1][r] = add2(raised_twice(s < 4 ? w[r].x : w[r].y, s & 3), MINUS_1024);
        return f;
    }
    __device__ __forceinline__ void finish(const u8* t, const u8* sums, int lane, const float (&d)[NT][4], float (&y)[NT][4]) const {
        const int g = lane >> 2, c = lane & 3;
        const float2 f0 = halves(t + Q::BYTES + 256 + g * 4), f1 = halves(t + Q::BYTES + 256 + (g + 8) * 4);
        const u32 m0 = add2(raised(two_bytes(t + Q::BYTES + g * 16 + 8 + 2 * c), 0), MINUS_1024);
        const u32 m1 = add2(raised(two_bytes(t + Q::BYTES + (g + 8) * 16 + 8 + 2 * c), 0), MINUS_1024);
#pragma unroll
        for (int n = 0; n < NT; n++) {
            const uint2 b = *(const uint2*)(sums + (n * 32 + lane) * 8);
            float e[4];
            product<true>(e, m0, m1, m0, m1, b.x, b.y);
            scaled(y[n], d[n], f0.x, f1.x);
            scaled(y[n], e, -f0.y, -f1.y);
        }
    }
};

template <class Q> struct Form<Scaled32<Q>> {
    static constexpr bool WHOLE = true;
    static constexpr int SUMS = 0;
    uint2 w[2];
    __device__ __forceinline__ void load(const u8* t, int g) {
#pragma unroll
        for (int r = 0; r < 2; r++) {
            w[r] = *(const uint2*)(t + Q::BYTES + (g + 8 * r) * 8);
            w[r] = make_uint2(w[r].x ^ 0x80 * BITS, w[r].y ^ 0x80 * BITS);
        }
    }
    __device__ __forceinline__ Factors factors(int s) const {
        Factors f;
#pragma unroll
        for (int r = 0; r < 2; r++) f.k[0][r] = f.k[1][r] = add2(raised_twice(s < 4 ? w[r].x : w[r].y, s & 3), MINUS_1152);
        return f;
    }
    __device__ __forceinline__ void finish(const u8* t, const u8*, int lane, const float (&d)[NT][4], float (&y)[NT][4]) const {
        const u8* at = t + Q::BYTES + ROWS * 8 + (lane >> 2) * 2;
        const float f0 = half_to_float(*(const u16*)at), f1 = half_to_float(*(const u16*)(at + 16));
#pragma unroll
        for (int n = 0; n < NT; n++) scaled(y[n], d[n], f0, f1);
    }
};

template <class Q, bool MINIMUM> struct Form<Scaled16<Q, MINIMUM>> {
    static constexpr bool WHOLE = true;
    static constexpr int SUMS = MINIMUM ? 2 : 0;
    u32 w[2][4];
    __device__ __forceinline__ void load(const u8* t, int g) {
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const uint4 v = *(const uint4*)(t + Q::BYTES + (g + 8 * r) * 16);
#pragma unroll
            for (int i = 0; i < 4; i++) w[r][i] = MINIMUM ? word_of(v, i) & NIBBLES : word_of(v, i) ^ 0x80 * BITS;
        }
    }
    __device__ __forceinline__ Factors factors(int s) const {
        Factors f;
#pragma unroll
        for (int half = 0; half < 2; half++)
#pragma unroll
            for (int r = 0; r < 2; r++)
                f.k[half][r] = add2(raised_twice(w[r][s >> 1], 2 * (s & 1) + half), MINIMUM ? MINUS_1024 : MINUS_1152);
        return f;
    }
    __device__ __forceinline__ void finish(const u8* t, const u8* sums, int lane, const float (&d)[NT][4], float (&y)[NT][4]) const {
        const int g = lane >> 2, c = lane & 3;
        const u8* at = t + Q::BYTES + 256;
        if (!MINIMUM) {
            const float f0 = half_to_float(*(const u16*)(at + g * 2)), f1 = half_to_float(*(const u16*)(at + (g + 8) * 2));
#pragma unroll
            for (int n = 0; n < NT; n++) scaled(y[n], d[n], f0, f1);
            return;
        }
        const float2 f0 = halves(at + g * 4), f1 = halves(at + (g + 8) * 4);
        u32 m[4];  // rows g, g + 8 of the first eight sub-blocks; of the last
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const u32 both = two_bytes(t + Q::BYTES + (g + 8 * (i & 1)) * 16 + 8 * (i >> 1) + 2 * c);
            m[i] = add2(raised((both >> 4) & NIBBLES, 0), MINUS_1024);
        }
#pragma unroll
        for (int n = 0; n < NT; n++) {
            const uint4 b = *(const uint4*)(sums + NT * 256 + (n * 32 + lane) * 16);
            float e[4];
            product<true>(e, m[0], m[1], m[2], m[3], b.x, b.y);
            product<false>(e, m[0], m[1], m[2], m[3], b.z, b.w);
            scaled(y[n], d[n], f0.x, f1.x);
            scaled(y[n], e, -f0.y, -f1.y);
        }
    }
};

template <class Q, Scale KIND> struct Form<Float32Columns<Q, KIND>> {
    typedef Float32Columns<Q, KIND> T;
    static constexpr bool WHOLE = false;
    static constexpr int SUMS = KIND == HALF_OFFSET ? 1 : 0;
    u32 w[2][4];
    __device__ __forceinline__ void load(const u8* t, int g) {
        T::row(t + Q::BYTES, g, w[0]);
        T::row(t + Q::BYTES, g + 8, w[1]);
    }
    __device__ __forceinline__ Factors factors(int) const { return {}; }
    __device__ __forceinline__ void add(int s, const float (&d)[4], float (&y)[4]) const {
        scaled(y, d, T::value(w[0], s), T::value(w[1], s));
    }
    __device__ __forceinline__ void finish(const u8* t, const u8* sums, int lane, float (&y)[NT][4]) const {
        if (KIND != HALF_OFFSET) return;
        const u8* at = t + Q::BYTES + ROWS * 16 + (lane & 3) * 4;
        const u32 m0 = *(const u32*)(at + (lane >> 2) * 16), m1 = *(const u32*)(at + ((lane >> 2) + 8) * 16);
#pragma unroll
        for (int n = 0; n < NT; n++) {
            const uint2 b = *(const uint2*)(sums + (n * 32 + lane) * 8);
            product<false>(y[n], m0, m1, m0, m1, b.x, b.y);
        }
    }
};

#if WIDE
// y += W x for the MT tiles at `tile`, `stride` bytes apart, and one chunk of activations. Operands of a sub-block are made
// while the tensor cores are at the one before.
template <class T>
__device__ __forceinline__ void multiply(const u8* tile, int stride, const u8* x, int lane, float (&y)[MT][NT][4]) {
    typedef typename T::Quants Q;
    typedef Form<T> F;
    static_assert(F::WHOLE, "sums that run through a super-block");
    F form[MT];
    typename Q::High high[MT];
#pragma unroll
    for (int m = 0; m < MT; m++) {
        form[m].load(tile + m * stride, lane >> 2);
        high[m] = Q::high(tile + m * stride, lane);
    }
    float d[MT][NT][4];
    u32 a[2][MT][2][4];
#pragma unroll
    for (int j = 0; j < 4; j++) {
        Fragment q[MT][2];
#pragma unroll
        for (int m = 0; m < MT; m++) Q::get(tile + m * stride, j, lane, high[m], q[m][0], q[m][1]);
#pragma unroll
        for (int p = 0; p < 2; p++) {
            const int s = 2 * j + p;
#pragma unroll
            for (int m = 0; m < MT; m++) operands<Q, true>(q[m][p], form[m].factors(s), a[p][m]);
            wide_begin();
#pragma unroll
            for (int half = 0; half < 2; half++)
#pragma unroll
                for (int m = 0; m < MT; m++) {
                    const u8* at = x + (2 * s + half) * NT * 256;
                    if (s + half == 0) wide_product<true>(d[m], a[p][m][half], at);
                    else wide_product<false>(d[m], a[p][m][half], at);
                }
            wide_commit();
            wide_wait<1>();  // the operands before these may be made anew
        }
    }
    wide_wait<0>();
#pragma unroll
    for (int m = 0; m < MT; m++) {
        wide_result(d[m]);
        form[m].finish(tile + m * stride, x + NT * 4096, lane, d[m], y[m]);
    }
}
#else
// y += W x for the MT tiles at `tile`, `stride` bytes apart, and one chunk of activations.
template <class T>
__device__ __forceinline__ void multiply(const u8* tile, int stride, const u8* x, int lane, float (&y)[MT][NT][4]) {
    typedef typename T::Quants Q;
    typedef Form<T> F;
    constexpr int BATCH = NT < 4 ? NT : 4;  // of token tiles under way at a time
    F form[MT];
    typename Q::High high[MT];
#pragma unroll
    for (int m = 0; m < MT; m++) {
        form[m].load(tile + m * stride, lane >> 2);
        high[m] = Q::high(tile + m * stride, lane);
    }
    float d[MT][F::WHOLE ? NT : BATCH][4];
#pragma unroll
    for (int j = 0; j < 4; j++) {
        Fragment q[MT][2];
#pragma unroll
        for (int m = 0; m < MT; m++) Q::get(tile + m * stride, j, lane, high[m], q[m][0], q[m][1]);
#pragma unroll
        for (int p = 0; p < 2; p++) {
            const int s = 2 * j + p;
            u32 a[MT][2][4];
#pragma unroll
            for (int m = 0; m < MT; m++) operands<Q, F::WHOLE>(q[m][p], form[m].factors(s), a[m]);
#pragma unroll
            for (int first = 0; first < NT; first += BATCH) {
                uint4 b[BATCH];
#pragma unroll
                for (int n = 0; n < BATCH; n++) b[n] = *(const uint4*)(x + ((s * NT + first + n) * 32 + lane) * 16);
#pragma unroll
                for (int half = 0; half < 2; half++)
#pragma unroll
                    for (int n = 0; n < BATCH; n++)
#pragma unroll
                        for (int m = 0; m < MT; m++) {
                            float(&to)[4] = d[m][F::WHOLE ? first + n : n];
                            const u32 b0 = half ? b[n].z : b[n].x, b1 = half ? b[n].w : b[n].y;
                            const u32(&k)[4] = a[m][half];
                            if (half == 0 && (s == 0 || !F::WHOLE)) product<true>(to, k[0], k[1], k[2], k[3], b0, b1);
                            else product<false>(to, k[0], k[1], k[2], k[3], b0, b1);
                        }
                if constexpr (!F::WHOLE) {
#pragma unroll
                    for (int n = 0; n < BATCH; n++)
#pragma unroll
                        for (int m = 0; m < MT; m++) form[m].add(s, d[m][n], y[m][first + n]);
                }
            }
        }
    }
#pragma unroll
    for (int m = 0; m < MT; m++) {
        if constexpr (F::WHOLE) form[m].finish(tile + m * stride, x + NT * 4096, lane, d[m], y[m]);
        else form[m].finish(tile + m * stride, x + NT * 4096, lane, y[m]);
    }
}
#endif

// ---- who does what ----

struct Place { int part, group; };  // a row group of a matrix; part 3: none

// Slot `slot` of panel `panel`. Matrices follow one another, each padded to a multiple of PADDED groups, so that those that
// are multiplied together are of one type; of a gated pair half of the slots are gate's, the other half up's of the same rows.
template <bool GATED>
__device__ __forceinline__ Place place(const Matrices& m, int panel, int slot) {
    if (GATED) {
        const int group = panel * (SLOTS / 2) + slot % (SLOTS / 2);
        return {group * ROWS < m.rows0 ? slot / (SLOTS / 2) : 3, group};
    }
    int group = panel * SLOTS + slot;
#pragma unroll
    for (int part = 0; part < 3; part++) {
        const int groups = ((m.rows(part) + ROWS - 1) / ROWS + PADDED - 1) / PADDED * PADDED;
        if (group < groups) return {group * ROWS < m.rows(part) ? part : 3, group};
        group -= groups;
    }
    return {3, 0};
}

// Units are dealt evenly: block b takes those from its first to the next block's.
struct Deal {
    u32 units, blocks;
    __device__ __forceinline__ int first(int block) const { return (int)(units * (u32)block / blocks); }  // in 32 bits: small_batch.py
    __device__ __forceinline__ int owner(int unit) const {
        int block = (int)((u32)unit * blocks / units);
        while (first(block + 1) <= unit) block++;
        while (first(block) > unit) block--;
        return block;
    }
};

// ---- stages: a unit's weights and its chunk of activations in shared memory ----

// A row group in device memory: its first tile and the bytes of one.
struct Source { const u8* at; int bytes; };

template <class A, class B, bool GATED>
struct Stages {
    static constexpr int TILE = A::TILE > B::TILE ? A::TILE : B::TILE;
    static constexpr int SUMS = Form<A>::SUMS > Form<B>::SUMS ? Form<A>::SUMS : Form<B>::SUMS;
    static constexpr int X_BYTES = NT * (SUMS == 2 ? 4096 + 256 + 512 : SUMS == 1 ? 4096 + 256 : 4096);
    static constexpr int BYTES = SLOTS * TILE + X_BYTES;
    u8* shared;
    u64 *full, *empty;

    __device__ __forceinline__ u8* tile(int stage, int slot) const { return shared + (size_t)stage * BYTES + slot * TILE; }
    __device__ __forceinline__ u8* x(int stage) const { return shared + (size_t)stage * BYTES + SLOTS * TILE; }
    __device__ __forceinline__ Source source(const Matrices& m, int panel, int slot, int n_kb) const {
        const Place here = place<GATED>(m, panel, slot);
        if (here.part == 3) return {nullptr, 0};
        const int bytes = (m.kinds >> here.part) & 1 ? B::TILE : A::TILE;
        return {m.w(here.part) + (size_t)here.group * n_kb * bytes, bytes};
    }
};

#if HAS_BULK
__device__ __forceinline__ void init(u64* bar, int count) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(bar)), "r"(count) : "memory");
}
__device__ __forceinline__ void arrive(u64* bar) {
    asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(shared_address(bar)) : "memory");
}
__device__ __forceinline__ void expect(u64* bar, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(shared_address(bar)), "r"(bytes) : "memory");
}
__device__ __forceinline__ void bulk_copy(u8* to, const u8* from, u32 bytes, u64* bar) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     shared_address(to)),
                 "l"(from), "r"(bytes), "r"(shared_address(bar))
                 : "memory");
}

// A warp orders the copies of a unit, a lane a slot: weights, activations, or both at once.
template <class S, bool WEIGHTS, bool ACTIVATIONS>
__device__ __forceinline__ void order(const S& stages, int stage, const Matrices& m, const u8* x, int n_kb, int unit) {
    static_assert(SLOTS <= 32, "a lane a slot");
    const int lane = threadIdx.x & 31, panel = unit / n_kb, kb = unit - panel * n_kb;
    u64* full = stages.full + stage;
    if (WEIGHTS) {
        Source from = {nullptr, 0};
        if (lane < SLOTS) from = stages.source(m, panel, lane, n_kb);
        const u32 total = __reduce_add_sync(EVERY_LANE, (u32)from.bytes) + S::X_BYTES;
        if (lane == 0) expect(full, total);
        __syncwarp();
        if (from.bytes) bulk_copy(stages.tile(stage, lane), from.at + (size_t)kb * from.bytes, from.bytes, full);
    }
    if (ACTIVATIONS && lane == 0) bulk_copy(stages.x(stage), x + (size_t)kb * CHUNK, S::X_BYTES, full);
}
#else
// Without a copy engine all threads copy: one group of copies a unit, empty past the last.
template <class S>
__device__ __forceinline__ void order(const S& stages, int stage, const Matrices& m, const u8* x, int n_kb, int unit, int end) {
    auto copy = [](u8* to, const u8* from) {
#if HAS_ASYNC
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from) : "memory");
#else
        *(uint4*)to = *(const uint4*)from;
#endif
    };
    if (unit < end) {
        const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, panel = unit / n_kb, kb = unit - panel * n_kb;
#pragma unroll
        for (int t = 0; t < MT; t++) {
            const int slot = warp * MT + t;
            const Source from = stages.source(m, panel, slot, n_kb);
            for (int at = lane * 16; at < from.bytes; at += 512) copy(stages.tile(stage, slot) + at, from.at + (size_t)kb * from.bytes + at);
        }
        for (int at = threadIdx.x * 16; at < S::X_BYTES; at += THREADS * 16) copy(stages.x(stage) + at, x + (size_t)kb * CHUNK + at);
    }
#if HAS_ASYNC
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
#endif

// ---- results ----

struct Result {
    void* y;
    const float *scales, *bias;
    int tokens, gelu;
};

template <bool BFLOAT, bool FLOAT_OUT>
__device__ __forceinline__ void put(void* y, size_t at, float v) {
    if (FLOAT_OUT) ((float*)y)[at] = v;
    else ((u16*)y)[at] = pack<BFLOAT>(v);
}

// Element e of a lane's four is row g + 8 (e / 2), token 2 c + e % 2 of tile n: scaled, with its bias.
__device__ __forceinline__ void complete(float (&v)[4], const Matrices& m, const Result& r, const Place& here, int n, bool gate) {
    const int lane = threadIdx.x & 31, g = lane >> 2, c = lane & 3;
    const int before = here.part == 0 ? 0 : here.part == 1 ? m.rows0 : m.rows0 + m.rows1;
    const float2 scale = *(const float2*)(r.scales + n * 8 + 2 * c);
#pragma unroll
    for (int e = 0; e < 4; e++) {
        const int row = here.group * ROWS + g + 8 * (e >> 1);
        v[e] *= e & 1 ? scale.y : scale.x;
        if (r.bias && row < m.rows(here.part)) v[e] += r.bias[before + row];
        if (gate) v[e] = activated(v[e], r.gelu);
    }
}

// To where they belong; of a gated pair `here` is up's.
template <bool BFLOAT, bool FLOAT_OUT, bool GATED>
__device__ __forceinline__ void deliver(const float (&v)[4], const Matrices& m, const Result& r, const Place& here, int n) {
    const int lane = threadIdx.x & 31, g = lane >> 2, c = lane & 3;
    const int total = m.rows0 + (GATED ? 0 : m.rows1 + m.rows2);
    const int before = GATED || here.part == 0 ? 0 : here.part == 1 ? m.rows0 : m.rows0 + m.rows1;
#pragma unroll
    for (int e = 0; e < 4; e++) {
        const int row = here.group * ROWS + g + 8 * (e >> 1), token = n * 8 + 2 * c + (e & 1);
        if (row < m.rows(here.part) && token < r.tokens) put<BFLOAT, FLOAT_OUT>(r.y, (size_t)token * total + before + row, v[e]);
    }
}

// Sums of a panel that a block has whole.
template <bool BFLOAT, bool FLOAT_OUT, bool GATED>
__device__ __forceinline__ void write(float (&y)[MT][NT][4], const Matrices& m, const Result& r, int panel, float4* exchange) {
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    if (GATED) __syncthreads();  // the panel before has been read out of `exchange`
#pragma unroll
    for (int n = 0; n < NT; n++) {
        float4* buffer = exchange + (n & 1) * (SLOTS / 2) * 32;
#pragma unroll
        for (int pass = 0; pass < (GATED ? 2 : 1); pass++) {
            if (pass) __syncthreads();
#pragma unroll
            for (int t = 0; t < MT; t++) {
                const int slot = warp * MT + t;
                const Place here = place<GATED>(m, panel, slot);
                if (here.part == 3 || (GATED && here.part != pass)) continue;
                float4* theirs = buffer + (slot % (SLOTS / 2)) * 32 + lane;
                float(&v)[4] = y[t][n];
                complete(v, m, r, here, n, GATED && pass == 0);
                if (GATED && pass == 0) {
                    *theirs = make_float4(v[0], v[1], v[2], v[3]);
                    continue;
                }
                if (GATED) {
                    const float4 gate = *theirs;
                    v[0] *= gate.x;
                    v[1] *= gate.y;
                    v[2] *= gate.z;
                    v[3] *= gate.w;
                }
                deliver<BFLOAT, FLOAT_OUT, GATED>(v, m, r, here, n);
            }
        }
    }
}

// ---- runs that were cut ----
//
// A panel whose columns are dealt to several blocks: each leaves its part, tells so, and goes on. Behind its last unit it
// waits until all parts of its panels are there (every block runs: there are no more than multiprocessors), and adds up a
// share of the rows and tokens, in the order of the columns. Parts: [block][first or last run][slot][token tile][lane]
// float4. A panel's counter is zero before and after: parts come, then blocks leave, and the last of these wraps it.

__device__ __forceinline__ float4* part_of(float4* workspace, int block, int run) {
    return workspace + (size_t)(block * 2 + run) * SLOTS * NT * 32;
}

struct Cut {  // a panel's parts: those of blocks first to last, of which the first may have begun with another panel
    int first, last, run;
    __device__ __forceinline__ u32 count() const { return (u32)(last - first + 1); }
    __device__ __forceinline__ Cut(const Deal& deal, int panel, int n_kb)
        : first(deal.owner(panel * n_kb)), last(deal.owner(panel * n_kb + n_kb - 1)), run(deal.first(first) < panel * n_kb) {}
};

__device__ __forceinline__ void leave(const float (&y)[MT][NT][4], float4* workspace, u32* counters, int run, int panel) {
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    float4* mine = part_of(workspace, blockIdx.x, run) + warp * MT * NT * 32 + lane;
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
        for (int n = 0; n < NT; n++) __stcg(mine + (m * NT + n) * 32, make_float4(y[m][n][0], y[m][n][1], y[m][n][2], y[m][n][3]));
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence();  // of all that the barrier has put before it
        atomicAdd(counters + panel, 1u);
    }
}

// Sums of the panel's parts, at COUNT places of each; up to AT_ONCE of a place's are under way together.
template <int COUNT, int AT_ONCE>
__device__ __forceinline__ void add_parts(float (&v)[COUNT][4], float4* workspace, const Cut& cut, const int (&at)[COUNT]) {
    const float4* head = part_of(workspace, cut.first, cut.run);
    const float4* rest = part_of(workspace, cut.first, 0);
    const int count = cut.last - cut.first + 1;
    for (int first = 0; first < count; first += AT_ONCE) {
        float4 part[AT_ONCE][COUNT];
#pragma unroll
        for (int u = 0; u < AT_ONCE; u++)
#pragma unroll
            for (int i = 0; i < COUNT; i++)
                if (first + u < count) part[u][i] = __ldcg((first + u == 0 ? head : rest + (size_t)(first + u) * 2 * SLOTS * NT * 32) + at[i]);
#pragma unroll
        for (int u = 0; u < AT_ONCE; u++) {
            if (first + u >= count) break;
            const bool start = first + u == 0;
#pragma unroll
            for (int i = 0; i < COUNT; i++) {
                v[i][0] = start ? part[u][i].x : v[i][0] + part[u][i].x;
                v[i][1] = start ? part[u][i].y : v[i][1] + part[u][i].y;
                v[i][2] = start ? part[u][i].z : v[i][2] + part[u][i].z;
                v[i][3] = start ? part[u][i].w : v[i][3] + part[u][i].w;
            }
        }
    }
}

// Until all parts are there. One thread.
__device__ __forceinline__ void wait_for_parts(u32* counter, u32 count) {
    for (u32 looks = 1;; looks++) {
        u32 come;
        asm volatile("ld.relaxed.gpu.u32 %0, [%1];" : "=r"(come) : "l"(counter) : "memory");
        if (come >= count) break;
        if (looks >> 27) asm volatile("trap;");  // a minute: another kernel has taken the counters
        asm volatile("nanosleep.u32 20;");
    }
    __threadfence();
}

// This block's share of a panel whose parts are there.
template <bool BFLOAT, bool FLOAT_OUT, bool GATED>
__device__ __forceinline__ void join(float4* workspace, const Cut& cut, int panel, const Matrices& m, const Result& r) {
    constexpr int ITEMS = (GATED ? SLOTS / 2 : SLOTS) * NT, COUNT = GATED ? 2 : 1;
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, stride = (cut.last - cut.first + 1) * WARPS;
    for (int item = ((int)blockIdx.x - cut.first) * WARPS + warp; item < ITEMS; item += stride) {
        const int slot = item / NT, n = item % NT;
        Place here = place<GATED>(m, panel, slot);
        if (here.part == 3) continue;
        float v[COUNT][4];
        int at[COUNT];
        at[0] = item * 32 + lane;
        if (GATED) at[COUNT - 1] = (item + ITEMS) * 32 + lane;
        add_parts<COUNT, GATED ? 3 : 10>(v, workspace, cut, at);
        complete(v[0], m, r, here, n, GATED);
        if (GATED) {
            here.part = 1;
            complete(v[COUNT - 1], m, r, here, n, false);
#pragma unroll
            for (int e = 0; e < 4; e++) v[0][e] *= v[COUNT - 1][e];
        }
        deliver<BFLOAT, FLOAT_OUT, GATED>(v[0], m, r, here, n);
    }
}

// ---- the kernel ----

// Two types or one: a second copy of the same code would only cost.
template <class A, class B> struct Same { static constexpr bool VALUE = false; };
template <class A> struct Same<A, A> { static constexpr bool VALUE = true; };

template <class A, class B, bool BFLOAT, bool FLOAT_OUT, bool GATED>
__device__ __forceinline__ void gemm_body(const Matrices& m, const u8* x, const Result& result, float4* workspace, u32* counters, int n_kb, int panels) {
    extern __shared__ __align__(128) u8 shared[];
    typedef Stages<A, B, GATED> S;
    float4* exchange = (float4*)(shared + STAGES * S::BYTES);
    u64* bars = (u64*)(exchange + (GATED ? 2 * (SLOTS / 2) * 32 : 0));
    const S stages = {shared, bars, bars + STAGES};
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    const Deal deal = {(u32)(panels * n_kb), gridDim.x};
    const int begin = deal.first(blockIdx.x), end = deal.first(blockIdx.x + 1);
    let_next_kernel_start();
#if HAS_BULK
    if (threadIdx.x == 0)
        for (int s = 0; s < STAGES; s++) {
            init(stages.full + s, 1);
            init(stages.empty + s, WARPS);
        }
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    __syncthreads();
    const int ahead = min(STAGES, end - begin);
    if (warp == 0)
        for (int s = 0; s < ahead; s++) order<S, true, false>(stages, s, m, x, n_kb, begin + s);
    wait_for_previous_kernel();
    if (warp == 0)
        for (int s = 0; s < ahead; s++) order<S, false, true>(stages, s, m, x, n_kb, begin + s);
#else
    for (int s = 0; s < STAGES - 1; s++) order(stages, s, m, x, n_kb, begin + s, end);
#endif

    int stage = 0, open_first = -1, open_last = -1;  // panels of the first and the last run, where they were cut
    u32 parity = 0;
    for (int unit = begin; unit < end;) {
        const int panel = unit / n_kb, kb = unit - panel * n_kb, stop = min(n_kb, kb + end - unit), run = unit == begin ? 0 : 1;
        const int part = place<GATED>(m, panel, warp * MT / TOGETHER * TOGETHER).part;
        float y[MT][NT][4];
#pragma unroll
        for (int t = 0; t < MT; t++)
#pragma unroll
            for (int n = 0; n < NT; n++)
#pragma unroll
                for (int e = 0; e < 4; e++) y[t][n][e] = 0.f;
        for (int k = kb; k < stop; k++, unit++) {
            const int before = stage == 0 ? STAGES - 1 : stage - 1;
#if HAS_BULK
            // Warps take turns at refilling the stage of the unit before, when all have done with it.
            const int next = unit - 1 + STAGES;
            if (unit > begin && next < end && (unit - begin) % WARPS == warp) {
                ring_wait(stages.empty + before, stage == 0 ? parity ^ 1 : parity);
                order<S, true, true>(stages, before, m, x, n_kb, next);
            }
            ring_wait(stages.full + stage, parity);
#else
#if HAS_ASYNC
            asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 2) : "memory");
#endif
            __syncthreads();
            order(stages, before, m, x, n_kb, unit + STAGES - 1, end);
#endif
            const u8* tile = stages.tile(stage, warp * MT);
            if (part < 3) {
                if (Same<A, B>::VALUE || !((m.kinds >> part) & 1)) multiply<A>(tile, S::TILE, stages.x(stage), lane, y);
                else multiply<B>(tile, S::TILE, stages.x(stage), lane, y);
            }
#if HAS_BULK
            __syncwarp();
            if (lane == 0) arrive(stages.empty + stage);
#endif
            if (++stage == STAGES) {
                stage = 0;
                parity ^= 1;
            }
        }
        if (kb == 0 && stop == n_kb) {
            write<BFLOAT, FLOAT_OUT, GATED>(y, m, result, panel, exchange);
        } else {
            leave(y, workspace, counters, run, panel);
            (run == 0 ? open_first : open_last) = panel;
        }
    }
    if (open_first < 0 && open_last < 0) return;
    const Cut first(deal, max(open_first, 0), n_kb), last(deal, max(open_last, 0), n_kb);
    auto come = [&](int panel, const Cut& cut) {
        wait_for_parts(counters + panel, cut.count());
        atomicInc(counters + panel, 2 * cut.count() - 1);
    };
    if (threadIdx.x == 0 && open_first >= 0) come(open_first, first);
    if (threadIdx.x == 32 && open_last >= 0) come(open_last, last);
    __syncthreads();
    if (open_first >= 0) join<BFLOAT, FLOAT_OUT, GATED>(workspace, first, open_first, m, result);
    if (open_last >= 0) join<BFLOAT, FLOAT_OUT, GATED>(workspace, last, open_last, m, result);
}

// w0, w1, w2: tiles of up to three matrices of the same columns (rows0, rows1, rows2 of them, 0 for none); bit i of kinds:
// matrix i is of TYPE_B. x and scales: as activations.cu leaves them. y [tokens][all rows] in the type that BFLOAT_MODE
// says, float32 in gemm_float, [tokens][rows0] in gemm_gated. bias: of all rows, or null.
#define GEMM(name, float_out, gated)                                                                                          \
    extern "C" __global__ void __launch_bounds__(THREADS, 1)                                                                 \
        name(const u8* w0, const u8* w1, const u8* w2, const u8* x, const float* scales, void* y, const float* bias,          \
             float4* workspace, u32* counters, int rows0, int rows1, int rows2, int kinds, int n_kb, int panels, int tokens,  \
             int gelu) {                                                                                                      \
        const Matrices m = {w0, w1, w2, rows0, rows1, rows2, kinds};                                                          \
        const Result result = {y, scales, bias, tokens, gelu};                                                                \
        gemm_body<TYPE, TYPE_B, BFLOAT_MODE, float_out, gated>(m, x, result, workspace, counters, n_kb, panels);              \
    }
#if GATED_MODE
GEMM(gemm_gated, false, true)
#else
GEMM(gemm, false, false)
GEMM(gemm_float, true, false)
#endif
