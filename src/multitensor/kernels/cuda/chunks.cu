// What is computed of a chunk of a large sum (parallel/large_sums.py): written for the wire, added in rank order, read again.
// Behind decode.cu, whose loads and stores it uses. Has run for ranks that share one GPU, not yet for two.
//
// A row has `length` numbers, a multiple of 32. Written exactly it is those numbers, as X_KIND; with EIGHT_BITS it is a signed byte for
// each, and behind them a float32 scale for every 32, of which eight neighbouring lanes hold four each. Products and sums are
// rounded one by one, so that all GPUs, of whatever generation, hold the same bits.
//
// Defines: X_KIND (of the numbers: HALF, BFLOAT or FLOAT), EIGHT_BITS (0 or 1), RANKS, NTHREADS.

typedef unsigned char u8;
constexpr u32 EVERYBODY = 0xffffffffu;

__device__ __forceinline__ float larger(float a, float b) { return b > a || b != b ? b : a; }  // NaN where either is
__device__ __forceinline__ float4 add4(float4 a, float4 b) {
    return make_float4(__fadd_rn(a.x, b.x), __fadd_rn(a.y, b.y), __fadd_rn(a.z, b.z), __fadd_rn(a.w, b.w));
}

// Four of a tensor's numbers from index `at` on; zeros from index `count` on.
__device__ __forceinline__ float4 take4(const void* numbers, int at, int count) {
    if (at + 4 <= count) return load4<X_KIND>(numbers, at);
    return make_float4(at < count ? load<X_KIND>(numbers, at) : 0.f, at + 1 < count ? load<X_KIND>(numbers, at + 1) : 0.f,
                       at + 2 < count ? load<X_KIND>(numbers, at + 2) : 0.f, 0.f);
}
__device__ __forceinline__ void put4(void* numbers, int at, int count, float4 v) {
    if (at + 4 <= count) {
        store4<X_KIND>(numbers, at, v);
        return;
    }
    if (at < count) store<X_KIND>(numbers, at, v.x);
    if (at + 1 < count) store<X_KIND>(numbers, at + 1, v.y);
    if (at + 2 < count) store<X_KIND>(numbers, at + 2, v.z);
}

__device__ __forceinline__ float decoded(u32 codes, int i, float scale) {
    return __fmul_rn((float)(int)(signed char)(codes >> (8 * i)), scale);
}
__device__ __forceinline__ float4 decoded4(u32 codes, float scale) {
    return make_float4(decoded(codes, 0, scale), decoded(codes, 1, scale), decoded(codes, 2, scale), decoded(codes, 3, scale));
}
__device__ __forceinline__ u32 code(float v, float scale) {
    return (u32)min(127, max(-127, __float2int_rn(v / scale))) & 255u;  // where a scale is 0 or not finite: whatever
}

// Four numbers of a row, from index `at` on.
__device__ __forceinline__ float4 read4(const u8* row, int length, int at) {
    if (EIGHT_BITS) return decoded4(*(const u32*)(row + at), *(const float*)(row + length + at / 32 * 4));
    return load4<X_KIND>(row, at);
}
// Writes them where `there`; all lanes of a warp come here, each with the next four. Returns what is then read.
__device__ __forceinline__ float4 write4(u8* row, int length, int at, float4 v, bool there) {
    if (EIGHT_BITS) {
        float most = larger(larger(fabsf(v.x), fabsf(v.y)), larger(fabsf(v.z), fabsf(v.w)));
#pragma unroll
        for (int step = 1; step < 8; step <<= 1) most = larger(most, __shfl_xor_sync(EVERYBODY, most, step));
        const float scale = most / 127.f;
        const u32 codes = code(v.x, scale) | code(v.y, scale) << 8 | code(v.z, scale) << 16 | code(v.w, scale) << 24;
        if (there) {
            *(u32*)(row + at) = codes;
            if (at % 32 == 0) *(float*)(row + length + at / 32 * 4) = scale;
        }
        return decoded4(codes, scale);
    }
    if (!there) return v;
    store4<X_KIND>(row, at, v);
    return load4<X_KIND>(row, at);
}

// Of `rows` rows, warps take 128 numbers at a time; rows may begin within them.
#define EACH_FOUR(total) \
    for (int base = (blockIdx.x * NTHREADS + (threadIdx.x & ~31)) * 4; base < (total); base += gridDim.x * NTHREADS * 4)

// numbers [count], and zeros behind -> rows, `row_bytes` apart.
extern "C" __global__ void __launch_bounds__(NTHREADS)
    pack_chunk(const void* numbers, int count, u8* rows, int row_count, int length, int row_bytes) {
    const int total = row_count * length;
    EACH_FOUR(total) {
        const int i = base + (threadIdx.x & 31) * 4, row = i / length;
        write4(rows + (size_t)row * row_bytes, length, i - row * length, take4(numbers, i, count), i < total);
    }
}

// numbers [count] become the sum of all ranks' rows: this rank's is `own`, or null: numbers; the others' lie in received,
// `row_bytes` apart. result: null, or a row that is written too, and then read.
extern "C" __global__ void __launch_bounds__(NTHREADS)
    add_chunk(void* numbers, int count, const u8* own, const u8* received, u8* result, int rank, int length, int row_bytes) {
    EACH_FOUR(length) {
        const int at = base + (threadIdx.x & 31) * 4;
        const bool there = at < length;
        float4 total = make_float4(0.f, 0.f, 0.f, 0.f);
        if (there) {
#pragma unroll
            for (int r = 0; r < RANKS; r++) {
                const float4 part = r != rank ? read4(received + (size_t)(r - (r > rank)) * row_bytes, length, at)
                                    : own     ? read4(own, length, at)
                                              : take4(numbers, at, count);
                total = r == 0 ? part : add4(total, part);
            }
        }
        if (result) total = write4(result, length, at, total, there);
        if (there) put4(numbers, at, count, total);
    }
}

// A row -> numbers [count].
extern "C" __global__ void __launch_bounds__(NTHREADS) unpack_chunk(const u8* row, void* numbers, int count, int length) {
    EACH_FOUR(length) {
        const int at = base + (threadIdx.x & 31) * 4;
        if (at < count) put4(numbers, at, count, read4(row, length, at));
    }
}
