// The weights of layer.cu as quantised numbers in tiles: gemv.cu's tiles and activations, copied tile by tile.
//
// What layer.cu asks of the way in which weights lie: how large a stage of a warp's ring is and how it is filled, how
// activations lie in shared memory, and a tile's dot products. layer_rows.cu answers the same for float weights.

#define LISTED 1  // a warp's tiles are listed before the first product
constexpr int BATCH = 2 * TOKENS;  // columns of the tensor cores' operand: two bytes a token

// Up to four types; a matrix's kind is the number of its own.
#ifndef TYPES
#define TYPES 2
#endif
#ifndef TYPE_C
#define TYPE_C TYPE
#endif
#ifndef TYPE_D
#define TYPE_D TYPE
#endif
__device__ constexpr int larger(int a, int b) { return a > b ? a : b; }
constexpr int STAGE_BYTES = larger(larger(TYPE::TILE, TYPE_B::TILE), larger(TYPE_C::TILE, TYPE_D::TILE));
__device__ __forceinline__ int tile_bytes(int kind) {
    if (TYPES > 2 && kind == 2) return TYPE_C::TILE;
    if (TYPES > 3 && kind == 3) return TYPE_D::TILE;
    return kind ? TYPE_B::TILE : TYPE::TILE;
}

// A tile in a warp's list: its address, with its kind in the lowest bits (tiles lie at multiples of 16).
template <class Phase>
__device__ __forceinline__ int kind_of(const Phase& p, int part) { return (p.kinds >> (2 * part)) & (TYPES > 2 ? 3 : 1); }
template <class Phase>
__device__ __forceinline__ u64 tile_entry(const Phase& p, int part, int group, int kb) {
    const size_t tile = (size_t)group * p.n_kb + kb;
    const int kind = kind_of(p, part);
    return (u64)(p.w[part] + tile * tile_bytes(kind)) | (u64)kind;
}

// ring_fill of gemv.cu with a size known only at run time.
__device__ __forceinline__ void fill_stage(u8* stage, u64 tile, u64* bar, int lane) {
    const u8* source = (const u8*)(tile & ~3ull);
    const int kind = (int)tile & 3;
#if HAS_BULK
    copy_tile(stage, source, tile_bytes(kind), bar, lane);
#else
    if (TYPES > 2 && kind == 2) ring_fill<TYPE_C::TILE>(stage, source, bar, lane);
    else if (TYPES > 3 && kind == 3) ring_fill<TYPE_D::TILE>(stage, source, bar, lane);
    else if (kind) ring_fill<TYPE_B::TILE>(stage, source, bar, lane);
    else ring_fill<TYPE::TILE>(stage, source, bar, lane);
#endif
}

// Super-blocks of 256 columns of an input.
__device__ __forceinline__ int super_blocks(int n_kb, int) { return n_kb; }

// Activations in shared memory, as gemv.cu's kernels have them.
struct Inputs {
    u8* quants;
    u8* sums;
    float* scale;
};
__device__ __forceinline__ Inputs inputs_at(u8* at, int widest) {
    u8* quants = at + widest * 32;
    return {quants, quants + (size_t)widest * 256 * BATCH, (float*)at};
}
__device__ __forceinline__ u8* end_of_inputs(const Inputs& in, int widest) { return in.sums + (size_t)widest * 48 * BATCH; }
__device__ __forceinline__ void clear_inputs(const Inputs& in, int blocks) {
    for (int i = threadIdx.x; i < blocks * 8; i += blockDim.x) if ((i & 7) >= BATCH) in.scale[i] = 0.f;
}
__device__ __forceinline__ void take_mixed(const u8* mixed, int columns, int offset, int blocks, const Inputs& in) {
    quantise<true, BFLOAT_MODE>(mixed, columns, offset, blocks, TOKENS, in.quants, in.sums, in.scale);
}
// A lane's eight columns of a super-block.
__device__ __forceinline__ void store_input(const float (&v)[8], int kb, int n, int lane, const Inputs& in) {
    store_exact(v, absolute_max(v), kb, n, BATCH, lane, in.quants, in.sums, in.scale);
}

// ---- one token's tile ----
//
// With one token only two of the tensor cores' eight columns are in use. Here the four pairs of columns take four
// sub-blocks: of sub-block s, columns 2 (s % 4) and the next have the activations and the others zeros, so one set of
// sums holds four sub-blocks' dot products, each in the lanes (c = lane % 4) that then scale it: a quarter of the
// multiplications. The lanes' results still have to be added; other types' tiles give zeros in the lanes with c > 0.

template <class T>
struct OneToken {
    static __device__ __forceinline__ void tile(const u8* t, const Activations& x, int kb, int lane, float (&y)[4]) {
        T::tile(t, x, kb, 2, lane, y);
    }
};

__device__ __forceinline__ int own_byte(u32 word, int c) { return (word >> (8 * c)) & 0xff; }

__device__ __forceinline__ void finish_one(const Activations& x, int kb, const float (&v)[4], float (&y)[4]) {
    const float2 s = *(const float2*)(x.scale + kb * 8);
    y[0] += s.x * v[0];
    y[1] += s.y * v[1];
    y[2] += s.x * v[2];
    y[3] += s.y * v[3];
}

// Dot products of sub-blocks of 32: d[0] of 0 to 3, d[1] of 4 to 7, of rows g and g + 8, high and low.
template <class Q>
__device__ __forceinline__ void dots_of_32(const u8* t, const Activations& x, int kb, int lane, int (&d)[2][4]) {
    const int c = lane & 3, pair = lane >> 3, n = (lane >> 2) & 1;
    const typename Q::High high = Q::high(t, lane);
    uint2 b[2];
#pragma unroll
    for (int h = 0; h < 2; h++)
        b[h] = *(const uint2*)(x.quants + ((((size_t)kb * 4 + 2 * h + (pair >> 1)) * 2 + n) * 4 + c) * 16 + (pair & 1) * 8);
#pragma unroll
    for (int h = 0; h < 2; h++) {
#pragma unroll
        for (int i = 0; i < 4; i++) d[h][i] = 0;
#pragma unroll
        for (int j = 0; j < 2; j++) {
            Fragment f[2];
            Q::get(t, 2 * h + j, lane, high, f[0], f[1]);
#pragma unroll
            for (int p = 0; p < 2; p++) {
                const bool mine = pair == 2 * j + p;
                mma_k32(d[h], f[p].a0, f[p].a1, f[p].a2, f[p].a3, mine ? b[h].x : 0u, mine ? b[h].y : 0u);
            }
        }
    }
}

template <class Q>
struct OneToken<Scaled32Minimum<Q>> {
    static __device__ __forceinline__ void tile(const u8* t, const Activations& x, int kb, int lane, float (&y)[4]) {
        const int g = lane >> 2, c = lane & 3;
        const uint4 r0 = *(const uint4*)(t + Q::BYTES + g * 16), r1 = *(const uint4*)(t + Q::BYTES + (g + 8) * 16);
        int d[2][4], m[4] = {0, 0, 0, 0};
        dots_of_32<Q>(t, x, kb, lane, d);
        minimums<8>(x, kb, 2, lane, c == 0 ? r0.z : c == 1 ? r0.w : 0u, c == 0 ? r1.z : c == 1 ? r1.w : 0u, m);
        const int s0 = own_byte(r0.x, c), s1 = own_byte(r0.y, c), u0 = own_byte(r1.x, c), u1 = own_byte(r1.y, c);
        const float2 f = halves(t + Q::BYTES + 256 + g * 4), h = halves(t + Q::BYTES + 256 + (g + 8) * 4);
        const float v[4] = {f.x * (s0 * d[0][0] + s1 * d[1][0]) - f.y * m[0], f.x * (s0 * d[0][1] + s1 * d[1][1]) - f.y * m[1],
                            h.x * (u0 * d[0][2] + u1 * d[1][2]) - h.y * m[2], h.x * (u0 * d[0][3] + u1 * d[1][3]) - h.y * m[3]};
        finish_one(x, kb, v, y);
    }
};

template <class Q>
struct OneToken<Scaled16<Q, false>> {
    static __device__ __forceinline__ void tile(const u8* t, const Activations& x, int kb, int lane, float (&y)[4]) {
        const int g = lane >> 2, c = lane & 3, pair = lane >> 3, n = (lane >> 2) & 1;
        const uint4 r0 = *(const uint4*)(t + Q::BYTES + g * 16), r1 = *(const uint4*)(t + Q::BYTES + (g + 8) * 16);
        const typename Q::High high = Q::high(t, lane);
        int acc[4] = {0, 0, 0, 0};
#pragma unroll
        for (int j = 0; j < 4; j++) {
            Fragment f[2];
            Q::get(t, j, lane, high, f[0], f[1]);
            const u32 b = *(const u32*)(x.quants + ((((size_t)kb * 4 + j) * 2 + n) * 4 + c) * 16 + 4 * pair);
            int d[4] = {0, 0, 0, 0};
#pragma unroll
            for (int s = 0; s < 4; s++) {
                const Fragment& q = f[s >> 1];
                mma_k16(d, s & 1 ? q.a2 : q.a0, s & 1 ? q.a3 : q.a1, pair == s ? b : 0u);
            }
            const int k0 = (signed char)own_byte(word_of(r0, j), c), k1 = (signed char)own_byte(word_of(r1, j), c);
            acc[0] += k0 * d[0];
            acc[1] += k0 * d[1];
            acc[2] += k1 * d[2];
            acc[3] += k1 * d[3];
        }
        const u8* at = t + Q::BYTES + 256;
        const float f = half_to_float(*(const unsigned short*)(at + g * 2)), h = half_to_float(*(const unsigned short*)(at + (g + 8) * 2));
        const float v[4] = {f * acc[0], f * acc[1], h * acc[2], h * acc[3]};
        finish_one(x, kb, v, y);
    }
};

template <class T>
__device__ __forceinline__ void tile_of(const u8* t, const Activations& x, int kb, int lane, float (&y)[4]) {
    if (TOKENS == 1) OneToken<T>::tile(t, x, kb, lane, y);
    else T::tile(t, x, kb, BATCH, lane, y);
}

// ---- what layer.cu adds up ----

// Columns of high and low parts are neighbours in a lane: lanes of column pair n hold token n, rows g and g + 8.
struct Sums {
    float acc[4] = {0.f, 0.f, 0.f, 0.f};
    __device__ __forceinline__ void add(const u8* tile, int kind, const Inputs& in, int kb, int, int lane) {
        const Activations act = {in.quants, in.sums, in.scale};
        if (TYPES > 2 && kind == 2) tile_of<TYPE_C>(tile, act, kb, lane, acc);
        else if (TYPES > 3 && kind == 3) tile_of<TYPE_D>(tile, act, kb, lane, acc);
        else if (kind) tile_of<TYPE_B>(tile, act, kb, lane, acc);
        else tile_of<TYPE>(tile, act, kb, lane, acc);
    }
};
struct Part {
    float of[2];
};
__device__ __forceinline__ Part part_of(const Sums& sums, int) {
    Part mine = {{sums.acc[0] + sums.acc[1], sums.acc[2] + sums.acc[3]}};
    if (TOKENS == 1) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            mine.of[half] += __shfl_xor_sync(0xffffffff, mine.of[half], 1);
            mine.of[half] += __shfl_xor_sync(0xffffffff, mine.of[half], 2);
        }
    }
    return mine;
}
// to: [TOKENS][16 rows]
__device__ __forceinline__ void put_part(float* to, const Part& mine, int lane) {
    const int n = lane & 3;
    if (n >= TOKENS) return;
#pragma unroll
    for (int half = 0; half < 2; half++) to[n * ROWS + half * 8 + (lane >> 2)] = mine.of[half];
}
