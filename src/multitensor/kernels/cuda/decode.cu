// The small kernels of a decode step (one new token a sequence), made for CUDA graphs: fixed addresses and grids, every
// length read from device memory. A sequence slot with position -1 is padding: it writes no cache and gets zeros.
//
// One section is compiled at a time: rotary embedding + cache writes and attention where HEAD_DIM is defined, residual
// add + RMS norm where HIDDEN is. ROPE_ONLY: without attention. No header is included: NVRTC needs none.
// Only what no kernel of a step writes is __restrict__: else a load could be moved ahead of the wait for its writer.
// Lane-to-element maps of mma fragments and movmatrix are those of the PTX ISA manual.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

enum { HALF, BFLOAT, FLOAT, Q8, Q4 };
constexpr u32 ALL_LANES = 0xffffffffu;

__device__ __forceinline__ void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ __forceinline__ void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

template <int KIND>
__device__ __forceinline__ float to_float(u16 bits) {
    if (KIND == BFLOAT) return __uint_as_float((u32)bits << 16);
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(bits));
    return f;
}

template <int KIND>
__device__ __forceinline__ u16 to_bits(float v) {
    u16 bits;
    if (KIND == BFLOAT) {
        const u32 b = __float_as_uint(v);
        bits = v != v ? (u16)0x7fff : (u16)((b + 0x7fff + ((b >> 16) & 1)) >> 16);
    } else {
        asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(v));
    }
    return bits;
}

template <int KIND>
__device__ __forceinline__ float load(const void* p, size_t i) {
    return KIND == FLOAT ? ((const float*)p)[i] : to_float<KIND>(((const u16*)p)[i]);
}
template <int KIND>
__device__ __forceinline__ void store(void* p, size_t i, float v) {
    if (KIND == FLOAT) ((float*)p)[i] = v;
    else ((u16*)p)[i] = to_bits<KIND>(v);
}

template <int KIND>
__device__ __forceinline__ u32 pack(float low, float high) {
#if __CUDA_ARCH__ >= 800
    u32 bits;
    if (KIND == BFLOAT) asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
    else asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
    return bits;
#else
    return to_bits<KIND>(low) | (u32)to_bits<KIND>(high) << 16;
#endif
}

// Four numbers at an index that is a multiple of four.
template <int KIND>
__device__ __forceinline__ float4 load4(const void* p, size_t i) {
    if (KIND == FLOAT) return *(const float4*)((const float*)p + i);
    const uint2 w = *(const uint2*)((const u16*)p + i);
    return make_float4(to_float<KIND>((u16)w.x), to_float<KIND>((u16)(w.x >> 16)), to_float<KIND>((u16)w.y),
                       to_float<KIND>((u16)(w.y >> 16)));
}
template <int KIND>
__device__ __forceinline__ void store4(void* p, size_t i, float4 v) {
    if (KIND == FLOAT) *(float4*)((float*)p + i) = v;
    else *(uint2*)((u16*)p + i) = make_uint2(pack<KIND>(v.x, v.y), pack<KIND>(v.z, v.w));
}

__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
    for (int step = 16; step; step >>= 1) v += __shfl_xor_sync(ALL_LANES, v, step);
    return v;
}
// NaN only where all lanes are.
__device__ __forceinline__ float warp_max(float v) {
#pragma unroll
    for (int step = 16; step; step >>= 1) v = fmaxf(v, __shfl_xor_sync(ALL_LANES, v, step));
    return v;
}

#if defined(HEAD_DIM)
// ---- rotary embedding, per-head norms, and the new token's key and value into the cache ----
//
// Defines: X_KIND, KV_KIND, HEAD_DIM, BLOCK_SIZE, HEAD_TILES, NWARPS, MIN_BLOCKS, SLOT (type of slot_mapping), EARLY (whether
// positions, tables, angles and older keys may be read before the wait).

// ---- the quantised cache: see kernels/cache_tensor.py for its layout and rounding ----

constexpr bool QUANT = KV_KIND >= Q8;
constexpr int GROUP = 32, GROUPS = (HEAD_DIM + GROUP - 1) / GROUP;
constexpr int CODE_BYTES = KV_KIND == Q4 ? HEAD_DIM / 2 : HEAD_DIM;  // of a head
constexpr bool SWAPPED = HEAD_DIM % 64 == 0;                         // q4: words 0, 4, 1, 5, 2, 6, 3, 7 of each 64 numbers
static_assert(!QUANT || HEAD_DIM % GROUP == 0, "whole groups");

// Into the range of float16; NaN stays.
__device__ __forceinline__ float held(float v) { return v > 65504.f ? 65504.f : v < -65504.f ? -65504.f : v; }

// 32 numbers, one a lane, times the Hadamard matrix.
__device__ __forceinline__ float turned(float v) {
    const int lane = threadIdx.x & 31;
#pragma unroll
    for (int step = 1; step < 32; step <<= 1) {
        const float other = __shfl_xor_sync(ALL_LANES, v, step);
        v = lane & step ? other - v : v + other;
    }
    return v * 0.17677669529663687f;
}

// Where the word (eight numbers) `word` of a head lies in q4.
__device__ __forceinline__ int word_at(int word) { return SWAPPED ? (word & ~7) + 2 * (word & 3) + ((word >> 2) & 1) : word; }

// A head of one token, numbers[HEAD_DIM], by one warp: to codes, CODE_BYTES from `codes` on, and scales, GROUPS.
__device__ __forceinline__ void quantise(const float* numbers, unsigned char* codes, u16* scales) {
    const int lane = threadIdx.x & 31;
#pragma unroll
    for (int group = 0; group < GROUPS; group++) {
        const float v = turned(held(numbers[GROUP * group + lane]));
        float extreme;
        if constexpr (KV_KIND == Q8) {
            extreme = warp_max(fabsf(v)) * (1.f / 127.f);
        } else {
            const float most = warp_max(v), least = -warp_max(-v);
            extreme = (most >= -least ? most : least) * -0.125f;
        }
        const u16 scale = to_bits<HALF>(extreme);
        const float step = to_float<HALF>(scale);
        const float code = step == 0.f ? 0.f : rintf(v / step);
        if constexpr (KV_KIND == Q8) {
            codes[GROUP * group + lane] = (unsigned char)(signed char)(int)fminf(fmaxf(code, -127.f), 127.f);
        } else {
            // Number 2 i of eight in nibble i, number 2 i + 1 in nibble i + 4.
            const int place = lane & 7, nibble = (place >> 1) + 4 * (place & 1);
            u32 word = (u32)((int)fminf(fmaxf(code, -8.f), 7.f) + 8) << (4 * nibble);
#pragma unroll
            for (int near = 1; near < 8; near <<= 1) word |= __shfl_xor_sync(ALL_LANES, word, near);
            if (place == 0) ((u32*)codes)[word_at(4 * group + (lane >> 3))] = word;
        }
        if (lane == 0) scales[group] = scale;
    }
}

// Where a KV head of a slot has its codes and its scales.
__device__ __forceinline__ size_t code_at(size_t slot, int kv_heads, int kv_head) { return (slot * kv_heads + kv_head) * CODE_BYTES; }
__device__ __forceinline__ size_t scale_at(size_t slot, int kv_heads, int kv_head) {
    return (((slot / BLOCK_SIZE) * kv_heads + kv_head) * BLOCK_SIZE + slot % BLOCK_SIZE) * GROUPS;
}

// bias: of a whole row; q_norm, k_norm: of a head; each float32 or null. cosines, sines: [positions][half].
// interleaved: rotates numbers (2i, 2i + 1) of a head, else (i, i + half).
struct Rope {
    const float *bias, *q_norm, *k_norm;
    float eps;
    const float *cosines, *sines;
    int half, interleaved;
};

constexpr int PAIRS = HEAD_DIM / 2, PAIR_ITEMS = (PAIRS + 31) / 32;
// Of one position, for the numbers of a head that a lane turns: the same for all heads.
struct Angles {
    float c[PAIR_ITEMS], s[PAIR_ITEMS];
    __device__ __forceinline__ void load(const Rope& rope, int position) {
#pragma unroll
        for (int i = 0; i < PAIR_ITEMS; i++) {
            const int pair = (threadIdx.x & 31) + 32 * i;
            const size_t at = (size_t)position * rope.half + pair;
            c[i] = pair < rope.half ? rope.cosines[at] : 1.f;
            s[i] = pair < rope.half ? rope.sines[at] : 0.f;
        }
    }
};

// One head of one token by one warp: bias, norm, rotation; put(dim, value) for each number. row: index of its first.
template <class Put>
__device__ __forceinline__ void turn_head(const Rope& rope, const Angles& angles, const void* qkv, size_t row, int head, const float* norm, bool turns,
                                          Put put) {
    constexpr int ITEMS = PAIR_ITEMS;
    const int lane = threadIdx.x & 31, rotated = turns ? rope.half : 0;
    int at[ITEMS][2];
    float v[ITEMS][2], squares = 0.f;
#pragma unroll
    for (int i = 0; i < ITEMS; i++) {
        const int pair = lane + 32 * i;
        const bool adjacent = rope.interleaved || pair >= rotated;  // numbers that are not rotated go in twos
        at[i][0] = adjacent ? 2 * pair : pair;
        at[i][1] = adjacent ? 2 * pair + 1 : pair + rotated;
#pragma unroll
        for (int e = 0; e < 2; e++) {
            v[i][e] = 0.f;
            if (pair < PAIRS) {
                v[i][e] = load<X_KIND>(qkv, row + at[i][e]);
                if (rope.bias) v[i][e] += rope.bias[head * HEAD_DIM + at[i][e]];
                squares += v[i][e] * v[i][e];
            }
        }
    }
    const float inverse = norm ? rsqrtf(warp_sum(squares) / HEAD_DIM + rope.eps) : 1.f;
#pragma unroll
    for (int i = 0; i < ITEMS; i++) {
        const int pair = lane + 32 * i;
        if (pair >= PAIRS) continue;
        float a = v[i][0], b = v[i][1];
        if (norm) {
            a *= inverse * norm[at[i][0]];
            b *= inverse * norm[at[i][1]];
        }
        if (pair < rotated) {
            const float c = angles.c[i], s = angles.s[i], turned = a * c - b * s;
            b = b * c + a * s;
            a = turned;
        }
        put(at[i][0], a);
        put(at[i][1], b);
    }
}

// qkv [S][query_heads + 2 kv_heads][HEAD_DIM]; q is overwritten, k and v go to the caches [slots][kv_heads][HEAD_DIM], or
// to their codes and scales. A warp takes a head.
extern "C" __global__ void __launch_bounds__(128)
    rope_write_kv(void* qkv, const float* __restrict__ bias, const float* __restrict__ q_norm, const float* __restrict__ k_norm,
                  float eps, const float* __restrict__ cosines, const float* __restrict__ sines, int half_rotary,
                  int interleaved, const int* positions, const SLOT* slot_mapping, void* k_cache, void* v_cache,
                  u16* k_scales, u16* v_scales, int query_heads, int kv_heads) {
    __shared__ float staged[QUANT ? 4 : 1][QUANT ? HEAD_DIM : 1];
    let_next_kernel_start();
    const int head = blockIdx.x * 4 + (threadIdx.x >> 5), s = blockIdx.y, heads = query_heads + 2 * kv_heads;
    if (head >= heads) return;
    wait_for_previous_kernel();
    const int position = positions[s];
    if (position < 0) return;
    const Rope rope = {bias, q_norm, k_norm, eps, cosines, sines, half_rotary, interleaved};
    Angles angles;
    angles.load(rope, position);
    const size_t row = ((size_t)s * heads + head) * HEAD_DIM;
    if (head < query_heads) {
        turn_head(rope, angles, qkv, row, head, q_norm, true, [&](int dim, float v) { store<X_KIND>(qkv, row + dim, v); });
        return;
    }
    const bool is_value = head >= query_heads + kv_heads;
    const int kv_head = head - query_heads - (is_value ? kv_heads : 0);
    const size_t slot = slot_mapping[s];
    void* to = is_value ? v_cache : k_cache;
    if constexpr (QUANT) {
        float* numbers = staged[threadIdx.x >> 5];
        turn_head(rope, angles, qkv, row, head, is_value ? nullptr : k_norm, !is_value, [&](int dim, float v) { numbers[dim] = v; });
        __syncwarp();
        quantise(numbers, (unsigned char*)to + code_at(slot, kv_heads, kv_head),
                 (is_value ? v_scales : k_scales) + scale_at(slot, kv_heads, kv_head));
    } else {
        const size_t cached = (slot * kv_heads + kv_head) * HEAD_DIM;
        turn_head(rope, angles, qkv, row, head, is_value ? nullptr : k_norm, !is_value,
                  [&](int dim, float v) { store<KV_KIND>(to, cached + dim, v); });
    }
}

#ifndef ROPE_ONLY
// ---- attention over the paged cache ----
//
// A job is up to 8 * HEAD_TILES consecutive query heads that read one KV head. A unit is a stretch of one sequence's
// visible keys. Block (x, y) does unit y of job x, so that blocks that run beside each other read what lies side by side:
// a token's KV heads. Each block finds its unit from the positions, so that the units of any mix of lengths fill the GPU.
// The last block of a (sequence, job) to finish adds up its units, in order.
//
// Keys are taken 16 at a time, straight from memory to registers to the tensor cores:
//   scores[16 keys][8 heads] = K (A operand) x q (B operand); the order of the numbers of a head is free as long as both
//     agree, so a lane's fragments are 16 contiguous bytes;
//   out[16 dims][8 heads] += V transposed (A operand; two keys' numbers interleaved in registers) x weights (B operand:
//     the scores' fragment transposed by movmatrix).
// Quantised: codes become float16 whole numbers in registers. A key's scale multiplies the products of its group of 32
// numbers in float32; a value's multiplies its numbers. Queries are turned as the keys were, results turned back.

constexpr int WARPS = NWARPS, THREADS = WARPS * 32;
constexpr int D = HEAD_DIM, HEADS = 8 * HEAD_TILES, KEYS = 16;
constexpr int MAX_SEQUENCES = 64, MAX_UNITS = 64;  // of a launch; of a sequence, which one block adds up
constexpr int SLOTS = WARPS / 2;  // half of the warps leave their sums in shared memory, the other half add theirs
constexpr float LOWEST = -1e30f;  // instead of -infinity: differences stay numbers
constexpr float LOG2E = 1.4426950408889634f;
static_assert(D % 8 == 0 && BLOCK_SIZE % KEYS == 0, "heads in eights, blocks in sixteens");

__device__ __forceinline__ float exp2_fast(float v) {
    float r;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
    return r;
}
// A raw product to a score in units of log 2. softcap 0: none. tanh(x) = 1 - 2 / (exp(2 x) + 1).
__device__ __forceinline__ float score(float product, float scale, float softcap) {
    const float x = product * scale;
    if (softcap == 0.f) return x * LOG2E;
    return softcap * LOG2E * (1.f - 2.f / (exp2_fast(2.f * LOG2E * x / softcap) + 1.f));
}

struct Unit {
    int sequence, index, count;  // this unit is `index` of the sequence's `count`
    int position, first;         // of the sequence: its new token, the first key that it sees
    int begin, end;              // keys [begin, end), begin a multiple of 16
    // Whether the new token's key is in the unit.
    __device__ __forceinline__ bool has_new() const { return begin <= position && position < end; }
};

__device__ __forceinline__ int first_visible(int position, int window) {
    return window > 0 && position >= window ? position - window + 1 : 0;
}
// Tiles of keys from the first that a query sees to its own.
__device__ __forceinline__ int tiles_of(int position, int window) {
    return position < 0 ? 0 : position / KEYS - first_visible(position, window) / KEYS + 1;
}
// Units of up to `size` tiles; a sequence without keys has one too, for its zeros.
__device__ __forceinline__ int units_of(int tiles, int size) { return tiles > size ? (int)((u32)(tiles + size - 1) / (u32)size) : 1; }

__device__ __forceinline__ void set_unit(int sequence, int index, int count, int position, int window, Unit& unit) {
    const int piece = (int)((u32)(tiles_of(position, window) + count - 1) / (u32)count);
    unit.sequence = sequence;
    unit.index = index;
    unit.count = count;
    unit.position = position;
    unit.first = first_visible(position, window);
    unit.begin = (unit.first / KEYS + index * piece) * KEYS;
    unit.end = min(position + 1, unit.begin + piece * KEYS);
}

// Over the lanes, of numbers that are not negative.
__device__ __forceinline__ int lane_sum(int v) {
#if __CUDA_ARCH__ >= 800
    return (int)__reduce_add_sync(ALL_LANES, (u32)v);
#else
#pragma unroll
    for (int step = 16; step; step >>= 1) v += __shfl_xor_sync(ALL_LANES, v, step);
    return v;
#endif
}
__device__ __forceinline__ int lane_max(int v) {
#if __CUDA_ARCH__ >= 800
    return (int)__reduce_max_sync(ALL_LANES, (u32)v);
#else
#pragma unroll
    for (int step = 16; step; step >>= 1) v = max(v, __shfl_xor_sync(ALL_LANES, v, step));
    return v;
#endif
}

// The unit of this block; false where there are fewer. A unit's size is the share of one of `target` blocks (those that
// run at once), of at least min_keys keys and of at least 1/MAX_UNITS of a sequence; up to twice as much where then each
// unit is a block that runs at once. Units of more than half the size come first, so that what is left over at the end
// is small. A sequence has at least one unit, so there are at most target + sequences.
__device__ __forceinline__ bool find_unit(const int* positions, int sequences, int window, int target, int min_keys, Unit& unit) {
    constexpr int TRIES = 16, EACH = MAX_SEQUENCES / 32;
    static_assert(TRIES % WARPS == 0, "the same number of tries for every warp");
    __shared__ int tried[TRIES];
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, me = blockIdx.y, least = (min_keys + KEYS - 1) / KEYS;
    if (sequences == 1) {
        const int position = __ldcg(positions), tiles = tiles_of(position, window);
        const int share = max(units_of(tiles, target), units_of(tiles, MAX_UNITS)), count = units_of(tiles, max(least, share));
        if (me < count) set_unit(0, me, count, position, window, unit);
        return me < count;
    }
    int at[EACH], tiles[EACH], count[EACH], total = 0, longest = 0;
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        at[i] = lane + 32 * i < sequences ? __ldcg(positions + lane + 32 * i) : -1;
        tiles[i] = tiles_of(at[i], window);
        total += tiles[i];
        longest = max(longest, tiles[i]);
    }
    total = lane_sum(total);
    longest = lane_max(longest);
    int size = max(units_of(total, target), units_of(longest, MAX_UNITS));
    if (size <= least) {
        size = least;
    } else {
#pragma unroll
        for (int first = 0; first < TRIES; first += WARPS) {
            const int i = first + warp;
            int units = 0;
#pragma unroll
            for (int j = 0; j < EACH; j++) units += lane + 32 * j < sequences ? units_of(tiles[j], size + size * i / TRIES) : 0;
            units = lane_sum(units);
            if (lane == 0) tried[i] = units;
        }
        __syncthreads();
        const u32 fits = __ballot_sync(ALL_LANES, lane < TRIES && tried[lane < TRIES ? lane : 0] <= target);
        if (fits) size += size * (__ffs(fits) - 1) / TRIES;
    }
    // Where each sequence's units end: large ones in the lower half of a word, small ones, which follow them, in the upper.
    bool large[EACH];
    int end[EACH], before = 0;
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        const bool exists = lane + 32 * i < sequences;
        count[i] = exists ? units_of(tiles[i], size) : 0;
        large[i] = exists && 2 * tiles[i] > size * count[i];
        int sum = large[i] ? count[i] : count[i] << 16;
#pragma unroll
        for (int step = 1; step < 32; step <<= 1) {
            const int left = __shfl_sync(ALL_LANES, sum, (lane - step) & 31);
            if (lane >= step) sum += left;
        }
        end[i] = before + sum;
        before += __shfl_sync(ALL_LANES, sum, 31);
    }
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        const int begin = (large[i] ? end[i] & 0xffff : (before & 0xffff) + (end[i] >> 16)) - count[i];
        const u32 mine = __ballot_sync(ALL_LANES, begin <= me && me < begin + count[i]);
        if (mine) {
            const int source = __ffs(mine) - 1;
            set_unit(source + 32 * i, me - __shfl_sync(ALL_LANES, begin, source), __shfl_sync(ALL_LANES, count[i], source),
                     __shfl_sync(ALL_LANES, at[i], source), window, unit);
            return true;
        }
    }
    return false;
}

struct Cache {
    const void *keys, *values;
    const u16 *key_scales, *value_scales;
    const int* table;  // of the sequence
    int kv_heads, kv_head;
    // Slot of the first key of a tile of 16 that lies in the given block.
    __device__ __forceinline__ size_t slot(int block, int tile) const { return (size_t)block * BLOCK_SIZE + (tile * KEYS) % BLOCK_SIZE; }
    // Index of the first number of a tile's first key.
    __device__ __forceinline__ size_t at(int block, int tile) const { return (slot(block, tile) * kv_heads + kv_head) * D; }
    // The head's first byte of a tile's key, and its scales of a tile's first key.
    __device__ __forceinline__ const unsigned char* row(const void* all, int tile, int block, int key, u32 stride, u32 head_bytes) const {
        return (const unsigned char*)all + ((u64)(u32)slot(block, tile) * stride + ((u32)kv_head * head_bytes + (u32)key * stride));
    }
    __device__ __forceinline__ const u16* scales(const u16* all, int tile, int block) const {
        return all + (u64)(u32)((block * kv_heads + kv_head) * BLOCK_SIZE + (tile * KEYS) % BLOCK_SIZE) * GROUPS;
    }
    __device__ __forceinline__ int block(int tile) const { return __ldcg(table + tile * KEYS / BLOCK_SIZE); }
};

#if KV_KIND != 2 && (KV_KIND != 1 || !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800)
#define TENSOR_CORES 1
#else
#define TENSOR_CORES 0
#endif

#if TENSOR_CORES
constexpr int CHUNKS = (D + 31) / 32;   // of a key: a lane holds 8 numbers of each
constexpr int PANELS = (D + 63) / 64;   // of a value: a lane holds 8 numbers of each
constexpr int MMA_KIND = QUANT ? HALF : KV_KIND;

__device__ __forceinline__ void mma(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
#if __CUDA_ARCH__ >= 800
    if (MMA_KIND == BFLOAT)
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
    else
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
#else
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5},{%6},{%0,%1,%2,%3};\n"
        "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%7,%8},{%9},{%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(b0), "r"(a2), "r"(a3), "r"(b1));
#endif
}
__device__ __forceinline__ u32 transpose(u32 v) {
    u32 r;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(r) : "r"(v));
    return r;
}
__device__ __forceinline__ u32 word(const uint4& v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }

#if KV_KIND == 3
typedef uint2 Eight;  // eight numbers of the cache
#elif KV_KIND == 4
typedef u32 Eight;
#else
typedef uint4 Eight;
#endif

__device__ __forceinline__ u32 half2_sub(u32 a, u32 b) {
    u32 r;
    asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
    return r;
}
__device__ __forceinline__ u32 half2_mul(u32 a, u32 b) {
    u32 r;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
    return r;
}
__device__ __forceinline__ u32 half2_fma(u32 a, u32 b, u32 c) {
    u32 r;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
    return r;
}

// Numbers 2 i and 2 i + 1 of eight as 16-bit numbers, codes as whole ones (exactly): the bits of an integer below 1024
// ored into the float16 1024.
__device__ __forceinline__ u32 bytes_pair(u32 four, bool upper) {
    const u32 shifted = four ^ 0x80808080u;  // + 128
    return half2_sub(__byte_perm(shifted, 0x64646464u, upper ? 0x4342 : 0x4140), 0x64806480u);  // - 1152
}
// (v & mask) | 0x64006400 as one instruction: of two constants the compiler makes two.
__device__ __forceinline__ u32 masked(u32 v, u32 mask) {
    u32 r;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(r) : "r"(v), "r"(mask), "r"(0x64006400u));
    return r;
}
__device__ __forceinline__ u32 nibbles_pair(u32 word, int i) {  // nibbles i and i + 4
    const u32 nibbles = i < 2 ? word : word >> 8;
    if (i & 1) return half2_fma(masked(nibbles, 0x00f000f0u), 0x2c002c00u, 0xd480d480u);  // / 16 - 72
    return half2_sub(masked(nibbles, 0x000f000fu), 0x64086408u);                          // - 1032
}
__device__ __forceinline__ u32 pair(const uint4& v, int i) { return word(v, i); }
__device__ __forceinline__ u32 pair(const uint2& v, int i) { return bytes_pair(i < 2 ? v.x : v.y, i & 1); }
__device__ __forceinline__ u32 pair(const u32& v, int i) { return nibbles_pair(v, i); }

// The same of two keys, side by side: number 2 i of both, and number 2 i + 1.
__device__ __forceinline__ void interleaved(const uint4& a, const uint4& b, int i, u32& even, u32& odd) {
    even = __byte_perm(word(a, i), word(b, i), 0x5410);
    odd = __byte_perm(word(a, i), word(b, i), 0x7632);
}
__device__ __forceinline__ void interleaved(const uint2& a, const uint2& b, int i, u32& even, u32& odd) {
    const u32 both = __byte_perm(i < 2 ? a.x : a.y, i < 2 ? b.x : b.y, i & 1 ? 0x7362 : 0x5140);
    even = bytes_pair(both, false);
    odd = bytes_pair(both, true);
}
__device__ __forceinline__ void interleaved(const u32& a, const u32& b, int i, u32& even, u32& odd) {
    even = nibbles_pair(__byte_perm(a, b, 0x5410), i);
    odd = nibbles_pair(__byte_perm(a, b, 0x7632), i);
}

// The scales of one KV head of one key: two a word.
struct Scales {
    u32 of[PANELS];
    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int i = 0; i < PANELS; i++) of[i] = 0;
    }
    __device__ __forceinline__ void load(const u16* at) {
        if constexpr (GROUPS == 8) {
            const uint4 v = __ldcg((const uint4*)at);
            of[0] = v.x, of[PANELS > 1] = v.y, of[PANELS > 2 ? 2 : 0] = v.z, of[PANELS > 3 ? 3 : 0] = v.w;
        } else if constexpr (GROUPS == 4) {
            const uint2 v = __ldcg((const uint2*)at);
            of[0] = v.x, of[PANELS > 1] = v.y;
        } else if constexpr (GROUPS == 2) {
            of[0] = __ldcg((const u32*)at);
        } else {
#pragma unroll
            for (int i = 0; i < PANELS; i++)
                of[i] = __ldcg(at + 2 * i) | (2 * i + 1 < GROUPS ? (u32)__ldcg(at + (2 * i + 1 < GROUPS ? 2 * i + 1 : 0)) << 16 : 0u);
        }
    }
    __device__ __forceinline__ float one(int group) const { return to_float<HALF>((u16)(of[group >> 1] >> (16 * (group & 1)))); }
};

// Eight numbers of a query as the products take them.
__device__ __forceinline__ uint4 query_eight(const void* q, size_t at) {
    uint4 v;
    if constexpr (X_KIND == MMA_KIND) {
        v = *(const uint4*)((const u16*)q + at);
    } else {
        u32 w[4];
#pragma unroll
        for (int i = 0; i < 4; i++) w[i] = pack<MMA_KIND>(load<X_KIND>(q, at + 2 * i), load<X_KIND>(q, at + 2 * i + 1));
        v = make_uint4(w[0], w[1], w[2], w[3]);
    }
    return v;
}

// One warp's sums. Lane (g = lane / 4, c = lane % 4): heads 2c and 2c + 1 of each tile of heads; of panel h, dims
// 64 h + 8 g + 2 u (elements 0, 1) and the next (elements 2, 3).
struct Sums {
    float out[HEAD_TILES][PANELS * 4][4];
    float most[HEAD_TILES][2], total[HEAD_TILES][2];

    // The queries as B operands: a lane's eight numbers of each chunk of 32.
    struct Queries {
        uint4 of[HEAD_TILES][CHUNKS][32];
        __device__ __forceinline__ void clear() {
            for (int i = threadIdx.x; i < HEAD_TILES * CHUNKS * 32; i += THREADS) (&of[0][0][0])[i] = make_uint4(0, 0, 0, 0);
        }
        __device__ __forceinline__ void put(int head, int dim, float v) {
            ((u16*)&of[head >> 3][dim >> 5][(head & 7) * 4 + ((dim >> 3) & 3)])[dim & 7] = to_bits<MMA_KIND>(v);
        }
        // A head by one warp, turned; number(dim) gives its numbers.
        template <class Number>
        __device__ __forceinline__ void put_turned(int head, Number number) {
#pragma unroll
            for (int group = 0; group < GROUPS; group++) {
                const int dim = GROUP * group + (threadIdx.x & 31);
                put(head, dim, held(turned(number(dim))));
            }
        }
        // Eight numbers at a time; what no head or dim fills is zero.
        __device__ __forceinline__ void take(const void* q, size_t at, int heads) {
            const int lane = threadIdx.x & 31;
            for (int i = threadIdx.x >> 5; i < HEAD_TILES * CHUNKS; i += WARPS) {
                const int head = i / CHUNKS * 8 + (lane >> 2), dim = i % CHUNKS * 32 + 8 * (lane & 3);
                of[i / CHUNKS][i % CHUNKS][lane] =
                    head < heads && dim < D ? query_eight(q, at + (size_t)head * D + dim) : make_uint4(0, 0, 0, 0);
            }
        }
    };

    // Where not ok: zero, or (KEEP) what is there.
    template <bool KEEP, class T>
    static __device__ __forceinline__ void fetch(T& v, const void* at, bool ok) {
        if (!KEEP) v = T();
        if (ok) v = __ldcg((const T*)at);
    }
    // Lane c's eight numbers of each chunk of a key.
    template <bool KEEP>
    static __device__ __forceinline__ void key_codes(const unsigned char* codes, int c, bool ok, Eight (&k)[CHUNKS]) {
#if KV_KIND == 4 && HEAD_DIM % 64 == 0  // those of two chunks lie together
#pragma unroll
        for (int j = 0; j < CHUNKS; j += 2) {
            uint2 both = KEEP ? make_uint2(k[j], k[j + 1]) : make_uint2(0, 0);
            fetch<KEEP>(both, codes + 16 * j + 8 * c, ok);
            k[j] = both.x;
            k[j + 1] = both.y;
        }
#else
#pragma unroll
        for (int j = 0; j < CHUNKS; j++) fetch<KEEP>(k[j], codes + (int)sizeof(Eight) * (4 * j + c), ok);
#endif
    }

    // Bytes of a head of a key. Loads are written for few instructions: what is not addresses is little.
    static constexpr u32 HEAD_BYTES = QUANT ? CODE_BYTES : 2 * D;

    // Of a tile in a block of the cache: keys from `low` on, `count` of them; of others zeros, or (KEEP) what is there.
    template <bool KEEP>
    static __device__ __forceinline__ void load_keys(const Cache& cache, int tile, int block, int low, u32 count, Eight (&k)[2][CHUNKS], Scales (&steps)[2]) {
        const int lane = threadIdx.x & 31, g = lane >> 2, c = lane & 3;
        const u32 stride = cache.kv_heads * HEAD_BYTES;
        const unsigned char* rows = cache.row(cache.keys, tile, block, g, stride, HEAD_BYTES);
        const u16* scales = QUANT ? cache.scales(cache.key_scales, tile, block) + g * GROUPS : nullptr;
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const unsigned char* at = rows + (size_t)(8 * r * stride);
            const bool ok = (u32)(tile * KEYS + g + 8 * r - low) < count;
            if constexpr (QUANT) {
                if (!KEEP) steps[r].clear();
                if (ok) steps[r].load(scales + 8 * r * GROUPS);
                key_codes<KEEP>(at, c, ok, k[r]);
            } else {
#pragma unroll
                for (int j = 0; j < CHUNKS; j++) fetch<KEEP>(k[r][j], at + 16 * (4 * j + c), ok && (D % 32 == 0 || 32 * j + 8 * c < D));
            }
        }
    }
    template <bool KEEP>
    static __device__ __forceinline__ void load_values(const Cache& cache, int tile, int block, int low, u32 count, Eight (&v)[4][PANELS], Scales (&steps)[4]) {
        const int lane = threadIdx.x & 31, g = lane >> 2, c = lane & 3;
        const u32 stride = cache.kv_heads * HEAD_BYTES;
        const unsigned char* rows = cache.row(cache.values, tile, block, 2 * c, stride, HEAD_BYTES);
        const u16* scales = QUANT ? cache.scales(cache.value_scales, tile, block) + 2 * c * GROUPS : nullptr;
#pragma unroll
        for (int r = 0; r < 4; r++) {
            const int row = (r & 1) + 8 * (r >> 1);
            const unsigned char* at = rows + (size_t)(row * stride);
            const bool ok = (u32)(tile * KEYS + 2 * c + row - low) < count;
            if constexpr (QUANT) {
                if (!KEEP) steps[r].clear();
                if (ok) steps[r].load(scales + row * GROUPS);
            }
#pragma unroll
            for (int h = 0; h < PANELS; h++) {
                const int eight = KV_KIND == Q4 ? word_at(8 * h + g) : 8 * h + g;
                fetch<KEEP>(v[r][h], at + (int)sizeof(Eight) * eight, ok && (D % 64 == 0 || 64 * h + 8 * g < D));
            }
        }
    }

    // prepare(): waits for the kernel before and fills the queries (ends with the block in step).
    template <class Prepare>
    __device__ __forceinline__ void run(const Unit& unit, const Cache& cache, const Queries& queries, float scale, float softcap, Prepare prepare) {
        const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, g = lane >> 2, c = lane & 3;
        int tile = unit.begin / KEYS + warp;
        const int last = (unit.end + KEYS - 1) / KEYS;
        int block = tile < last ? cache.block(tile) : 0;
#pragma unroll
        for (int n = 0; n < HEAD_TILES; n++) {
#pragma unroll
            for (int t = 0; t < PANELS * 4; t++)
#pragma unroll
                for (int e = 0; e < 4; e++) out[n][t][e] = 0.f;
            most[n][0] = most[n][1] = LOWEST;
            total[n][0] = total[n][1] = 0.f;
        }
        Eight k[2][CHUNKS], v[4][PANELS];
        Scales key_scales[2], value_scales[4];
        const u32 visible = unit.end - unit.first;
        // What this step does not write, all but the new token's key, is fetched before the kernel before is done.
        const int first_block = block;
        if (tile < last) {
            const u32 old = min(unit.end, unit.position) - unit.first;
            load_keys<false>(cache, tile, first_block, unit.first, old, k, key_scales);
            load_values<false>(cache, tile, first_block, unit.first, old, v, value_scales);
        }
        if (tile + WARPS < last) block = cache.block(tile + WARPS);
        prepare();
        if (tile < last && tile == unit.position / KEYS) {
            load_keys<true>(cache, tile, first_block, unit.position, 1, k, key_scales);
            load_values<true>(cache, tile, first_block, unit.position, 1, v, value_scales);
        }
        for (; tile < last; tile += WARPS) {
            float s[HEAD_TILES][4];
#pragma unroll
            for (int n = 0; n < HEAD_TILES; n++) s[n][0] = s[n][1] = s[n][2] = s[n][3] = 0.f;
#pragma unroll
            for (int j = 0; j < CHUNKS; j++) {
                u32 a[2][4];
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    a[0][i] = pair(k[0][j], i);
                    a[1][i] = pair(k[1][j], i);
                }
#pragma unroll
                for (int n = 0; n < HEAD_TILES; n++) {
                    const uint4 b = queries.of[n][j][lane];
                    if constexpr (QUANT) {
                        float whole[4] = {0.f, 0.f, 0.f, 0.f};
                        mma(whole, a[0][0], a[1][0], a[0][1], a[1][1], b.x, b.y);
                        mma(whole, a[0][2], a[1][2], a[0][3], a[1][3], b.z, b.w);
#pragma unroll
                        for (int e = 0; e < 4; e++) s[n][e] += whole[e] * key_scales[e >> 1].one(j);
                    } else {
                        mma(s[n], a[0][0], a[1][0], a[0][1], a[1][1], b.x, b.y);
                        mma(s[n], a[0][2], a[1][2], a[0][3], a[1][3], b.z, b.w);
                    }
                }
            }
            // The keys' registers are free: fetch the next tile's while this one goes on.
            const int next = tile + WARPS, next_block = block;
            if (next < last) load_keys<false>(cache, next, next_block, unit.first, visible, k, key_scales);
            if (next + WARPS < last) block = cache.block(next + WARPS);
            const int key = tile * KEYS + g - unit.first;
            const bool seen[2] = {(u32)key < visible, (u32)(key + 8) < visible};
            u32 weights[HEAD_TILES][2];
#pragma unroll
            for (int n = 0; n < HEAD_TILES; n++) weigh(s[n], seen, scale, softcap, n, weights[n]);
#pragma unroll
            for (int h = 0; h < PANELS; h++) {
                u32 steps[2];  // the scales of two keys' numbers: group 2 h or 2 h + 1
                if constexpr (QUANT)
#pragma unroll
                    for (int r = 0; r < 2; r++)
                        steps[r] = __byte_perm(value_scales[2 * r].of[h], value_scales[2 * r + 1].of[h], g >= 4 ? 0x7632 : 0x5410);
#pragma unroll
                for (int u = 0; u < 4; u++) {
                    u32 a[4];
#pragma unroll
                    for (int r = 0; r < 2; r++) {
                        interleaved(v[2 * r][h], v[2 * r + 1][h], u, a[2 * r], a[2 * r + 1]);
                        if constexpr (QUANT) {
                            a[2 * r] = half2_mul(a[2 * r], steps[r]);
                            a[2 * r + 1] = half2_mul(a[2 * r + 1], steps[r]);
                        }
                    }
#pragma unroll
                    for (int n = 0; n < HEAD_TILES; n++) mma(out[n][h * 4 + u], a[0], a[1], a[2], a[3], weights[n][0], weights[n][1]);
                }
            }
            if (next < last) load_values<false>(cache, next, next_block, unit.first, visible, v, value_scales);
        }
#pragma unroll
        for (int n = 0; n < HEAD_TILES; n++)
#pragma unroll
            for (int e = 0; e < 2; e++)
#pragma unroll
                for (int step = 4; step < 32; step <<= 1) total[n][e] += __shfl_xor_sync(ALL_LANES, total[n][e], step);
    }

    // Raw products of 16 keys (g: elements 0, 1; g + 8: elements 2, 3) to weights as a B operand; maxima kept up.
    __device__ __forceinline__ void weigh(const float (&product)[4], const bool (&seen)[2], float scale, float softcap, int n, u32 (&weights)[2]) {
        float s[4], best[2];
#pragma unroll
        for (int e = 0; e < 4; e++) s[e] = product[e] * (scale * LOG2E);
        if (softcap != 0.f)
#pragma unroll
            for (int e = 0; e < 4; e++) s[e] = score(product[e], scale, softcap);
#pragma unroll
        for (int e = 0; e < 4; e++) s[e] = seen[e >> 1] ? s[e] : -__int_as_float(0x7f800000);
#pragma unroll
        for (int e = 0; e < 2; e++) {
            best[e] = fmaxf(s[e], s[e + 2]);
#pragma unroll
            for (int step = 4; step < 32; step <<= 1) best[e] = fmaxf(best[e], __shfl_xor_sync(ALL_LANES, best[e], step));
        }
        if (__any_sync(ALL_LANES, best[0] > most[n][0] || best[1] > most[n][1])) {
#pragma unroll
            for (int e = 0; e < 2; e++) {
                const float raised = fmaxf(most[n][e], best[e]), factor = exp2_fast(most[n][e] - raised);
                most[n][e] = raised;
                scale_head(n, e, factor);
            }
        }
#pragma unroll
        for (int e = 0; e < 4; e++) {
            s[e] = exp2_fast(s[e] - most[n][e & 1]);
            total[n][e & 1] += s[e];
        }
        weights[0] = transpose(pack<MMA_KIND>(s[0], s[1]));
        weights[1] = transpose(pack<MMA_KIND>(s[2], s[3]));
    }
    __device__ __forceinline__ void scale_head(int n, int e, float factor) {
        total[n][e] *= factor;
#pragma unroll
        for (int t = 0; t < PANELS * 4; t++) {
            out[n][t][e] *= factor;
            out[n][t][e + 2] *= factor;
        }
    }

    // Calls f(head, most, total) for each head on one lane, or scales each head's sums by f(head).
    template <class F>
    __device__ __forceinline__ void heads(F f) const {
        const int lane = threadIdx.x & 31;
        if (lane < 4)
#pragma unroll
            for (int n = 0; n < HEAD_TILES; n++)
#pragma unroll
                for (int e = 0; e < 2; e++) f(n * 8 + 2 * lane + e, most[n][e], total[n][e]);
    }
    template <class F>
    __device__ __forceinline__ void rescale(F f) {
#pragma unroll
        for (int n = 0; n < HEAD_TILES; n++)
#pragma unroll
            for (int e = 0; e < 2; e++) scale_head(n, e, f(n * 8 + 2 * (threadIdx.x & 3) + e));
    }
    // part[HEADS][D] = (or, ADD, +=) these sums
    template <bool ADD>
    __device__ __forceinline__ void leave(float* part) const {
        const int lane = threadIdx.x & 31, g = lane >> 2, c = lane & 3;
#pragma unroll
        for (int n = 0; n < HEAD_TILES; n++)
#pragma unroll
            for (int h = 0; h < PANELS; h++)
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    const int dim = 64 * h + 8 * g;
#pragma unroll
                    for (int u = 0; u < 4; u += 2) {
                        if (D % 64 != 0 && dim >= D) break;
                        float4* to = (float4*)(part + (n * 8 + 2 * c + e) * D + dim + 2 * u);
                        const float* x = out[n][h * 4 + u];
                        const float* y = out[n][h * 4 + u + 1];
                        float4 sum = make_float4(x[e], x[e + 2], y[e], y[e + 2]);
                        if (ADD) {
                            const float4 there = *to;
                            sum = make_float4(sum.x + there.x, sum.y + there.y, sum.z + there.z, sum.w + there.w);
                        }
                        *to = sum;
                    }
                }
    }
};

#else
// float32 caches (exact mode), and bfloat16 where tensor cores do not take it: plain float32 arithmetic. A lane holds
// numbers lane, lane + 32, ... of every head.
constexpr int ITEMS = (D + 31) / 32;
static_assert(HEAD_TILES == 1, "eight heads at most");

struct Sums {
    float out[HEADS][ITEMS], most[HEADS], total[HEADS];

    struct Queries {
        float of[HEADS][D];
        __device__ __forceinline__ void clear() {
            for (int i = threadIdx.x; i < HEADS * D; i += THREADS) of[i / D][i % D] = 0.f;
        }
        __device__ __forceinline__ void put(int head, int dim, float v) { of[head][dim] = v; }
        __device__ __forceinline__ void take(const void* q, size_t at, int heads) {
            for (int i = threadIdx.x; i < HEADS * D; i += THREADS) of[i / D][i % D] = i / D < heads ? load<X_KIND>(q, at + i) : 0.f;
        }
    };

    template <class Prepare>
    __device__ __forceinline__ void run(const Unit& unit, const Cache& cache, const Queries& queries, float scale, float softcap, Prepare prepare) {
        const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
        prepare();
#pragma unroll
        for (int h = 0; h < HEADS; h++) {
            most[h] = LOWEST;
            total[h] = 0.f;
#pragma unroll
            for (int i = 0; i < ITEMS; i++) out[h][i] = 0.f;
        }
        const size_t stride = (size_t)cache.kv_heads * D;
        for (int tile = unit.begin / KEYS + warp; tile * KEYS < unit.end; tile += WARPS) {
            const size_t at = cache.at(cache.block(tile), tile);
            for (int key = max(unit.first, tile * KEYS); key < min(unit.end, tile * KEYS + KEYS); key++) {
                const size_t row = at + (key - tile * KEYS) * stride;
                float k[ITEMS], v[ITEMS];
#pragma unroll
                for (int i = 0; i < ITEMS; i++) {
                    const bool ok = D % 32 == 0 || lane + 32 * i < D;
                    k[i] = ok ? load<KV_KIND>(cache.keys, row + lane + 32 * i) : 0.f;
                    v[i] = ok ? load<KV_KIND>(cache.values, row + lane + 32 * i) : 0.f;
                }
#pragma unroll
                for (int h = 0; h < HEADS; h++) {
                    float product = 0.f;
#pragma unroll
                    for (int i = 0; i < ITEMS; i++)
                        if (D % 32 == 0 || lane + 32 * i < D) product += k[i] * queries.of[h][lane + 32 * i];
                    const float s = score(warp_sum(product), scale, softcap);
                    const float raised = fmaxf(most[h], s), factor = exp2_fast(most[h] - raised), weight = exp2_fast(s - raised);
                    most[h] = raised;
                    total[h] = total[h] * factor + weight;
#pragma unroll
                    for (int i = 0; i < ITEMS; i++) out[h][i] = out[h][i] * factor + weight * v[i];
                }
            }
        }
    }
    template <class F>
    __device__ __forceinline__ void heads(F f) const {
        if ((threadIdx.x & 31) == 0)
#pragma unroll
            for (int h = 0; h < HEADS; h++) f(h, most[h], total[h]);
    }
    template <class F>
    __device__ __forceinline__ void rescale(F f) {
#pragma unroll
        for (int h = 0; h < HEADS; h++) {
            const float factor = f(h);
#pragma unroll
            for (int i = 0; i < ITEMS; i++) out[h][i] *= factor;
        }
    }
    template <bool ADD>
    __device__ __forceinline__ void leave(float* part) const {
        const int lane = threadIdx.x & 31;
#pragma unroll
        for (int h = 0; h < HEADS; h++)
#pragma unroll
            for (int i = 0; i < ITEMS; i++) {
                const int dim = lane + 32 * i;
                if (D % 32 == 0 || dim < D) part[h * D + dim] = out[h][i] + (ADD ? part[h * D + dim] : 0.f);
            }
    }
};
#endif

// Four numbers of a result, from dim `4 * (lane % 8)` of a group of 32 on, turned back where the values were turned. The
// eight lanes of a group do it together.
__device__ __forceinline__ float4 turned_back(float4 v) {
    if constexpr (QUANT) {
        const int lane = threadIdx.x & 31;
        const u32 together = 0xffu << (lane & 24);
        const float4 a = make_float4(v.x + v.y, v.x - v.y, v.z + v.w, v.z - v.w);
        v = make_float4(a.x + a.z, a.y + a.w, a.x - a.z, a.y - a.w);
#pragma unroll
        for (int step = 1; step < 8; step <<= 1) {
            const float sign = lane & step ? -1.f : 1.f;
            v.x = sign * v.x + __shfl_xor_sync(together, v.x, step);
            v.y = sign * v.y + __shfl_xor_sync(together, v.y, step);
            v.z = sign * v.z + __shfl_xor_sync(together, v.z, step);
            v.w = sign * v.w + __shfl_xor_sync(together, v.w, step);
        }
        constexpr float size = 0.17677669529663687f;
        v = make_float4(v.x * size, v.y * size, v.z * size, v.w * size);
    }
    return v;
}

// Adds up the units of one sequence and job: partials[unit][jobs][HEADS][D], stats[unit][jobs][HEADS] (maximum, sum of
// weights) from unit `first_unit` on.
__device__ __forceinline__ void combine(const float* partials, const float2* stats, int first_unit, int count, int heads, void* out, size_t out_at) {
    constexpr int BATCH = 16;
    const size_t step = (size_t)gridDim.x * HEADS;
    for (int e = threadIdx.x * 4; e < heads * D; e += THREADS * 4) {
        const size_t head = ((size_t)first_unit * gridDim.x + blockIdx.x) * HEADS + e / D;
        const float2* stat = stats + head;
        const float* part = partials + head * D + e % D;
        float most = LOWEST, total = 0.f;
        float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
        for (int i = 0; i < count; i += BATCH) {
            float2 m[BATCH];
            float4 p[BATCH];
            float raised = most;
#pragma unroll
            for (int b = 0; b < BATCH; b++) {
                m[b] = make_float2(LOWEST, 0.f);
                p[b] = make_float4(0.f, 0.f, 0.f, 0.f);
                if (i + b < count) {
                    m[b] = __ldcg(stat + (i + b) * step);
                    p[b] = __ldcg((const float4*)(part + (i + b) * step * D));
                }
            }
#pragma unroll
            for (int b = 0; b < BATCH; b++) raised = fmaxf(raised, m[b].x);
            const float factor = exp2_fast(most - raised);
            most = raised;
            total *= factor;
            sum = make_float4(sum.x * factor, sum.y * factor, sum.z * factor, sum.w * factor);
#pragma unroll
            for (int b = 0; b < BATCH; b++) {
                const float weight = exp2_fast(m[b].x - raised);
                total += weight * m[b].y;
                sum = make_float4(sum.x + weight * p[b].x, sum.y + weight * p[b].y, sum.z + weight * p[b].z, sum.w + weight * p[b].w);
            }
        }
        const float inverse = 1.f / total;
        store4<X_KIND>(out, out_at + e, turned_back(make_float4(sum.x * inverse, sum.y * inverse, sum.z * inverse, sum.w * inverse)));
    }
}

// *counter + 1, after what the block has written (the barrier before has ordered that), before what it reads; what was there.
// Cheaper than an addition between two fences of everything.
__device__ __forceinline__ u32 count_one(u32* counter) {
    u32 before;
    asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;" : "=r"(before) : "l"(counter), "r"(1u) : "memory");
    return before;
}

// What both entries share. q: row s at s * q_stride, query heads one after another; out [S][query_heads][D]. jobs:
// [gridDim.x][3]: KV head, first query head, query heads. counters: [S][gridDim.x], zero before and after. rows: where the
// sequences' rows of q and out are, null: 0, 1, 2 ...
struct Attention {
    const void* q;
    int q_stride;
    void *keys, *values;
    u16 *key_scales, *value_scales;  // null where the cache is not quantised
    const int *jobs, *positions, *rows, *block_tables;
    int table_width, sequences, kv_heads, query_heads;
    float scale, softcap;
    int window, target, min_keys;
    void* out;
    float* partials;
    float2* stats;
    u32* counters;
    __device__ __forceinline__ size_t row(int sequence) const { return rows ? __ldcg(rows + sequence) : sequence; }
};

// What the queries and the new token need where the cache is quantised: turned queries, rotated first where ROPE, and
// then also codes and scales of the new key and value, by the blocks whose unit has them. numbers[D]: the warp's own.
template <bool ROPE, class Queries>
__device__ __forceinline__ void turn_and_quantise(const Attention& a, const Rope& rope, const Angles& angles, const SLOT* slot_mapping, const Unit& unit, int kv_head,
                                                  int first_head, int heads, float* numbers, Queries& queries) {
    const int warp = threadIdx.x >> 5, new_heads = ROPE && unit.has_new() ? 2 : 0;
    const size_t row = a.row(unit.sequence) * a.q_stride;
    if (ROPE && unit.position < 0) return;
    for (int i = warp; i < heads + new_heads; i += WARPS) {
        const int query = i - new_heads;
        if (!ROPE) {
            queries.put_turned(query, [&](int dim) { return load<X_KIND>(a.q, row + (first_head + query) * D + dim); });
            continue;
        }
        const int head = query >= 0 ? first_head + query : a.query_heads + i * a.kv_heads + kv_head;
        const bool is_value = query < 0 && i == 1;
        const float* norm = query >= 0 ? rope.q_norm : is_value ? nullptr : rope.k_norm;
        turn_head(rope, angles, a.q, row + head * D, head, norm, !is_value, [&](int dim, float v) { numbers[dim] = v; });
        __syncwarp();
        if (query >= 0) {
            queries.put_turned(query, [&](int dim) { return numbers[dim]; });
        } else {
            const size_t slot = __ldcg(slot_mapping + unit.sequence);
            quantise(numbers, (unsigned char*)(is_value ? a.values : a.keys) + code_at(slot, a.kv_heads, kv_head),
                     (is_value ? a.value_scales : a.key_scales) + scale_at(slot, a.kv_heads, kv_head));
        }
        __syncwarp();
    }
}

// ROPE: q are rows of qkv as they leave their projection. Each block turns its own queries; the blocks whose unit has the
// new token put its key and value into the cache first (all of a KV head the same bits).
template <bool ROPE>
__device__ __forceinline__ void attend(const Attention& a, const Rope& rope, const SLOT* slot_mapping) {
    __shared__ __align__(16) float parts[SLOTS][HEADS * D];
    __shared__ float warp_most[WARPS][HEADS], warp_total[WARPS][HEADS], most[HEADS], total[HEADS];
    __shared__ bool is_last;
    __shared__ int kept[5];  // what is needed again at the end: the loop has no registers to spare
    __shared__ __align__(16) Sums::Queries queries;
    let_next_kernel_start();
#if !EARLY
    wait_for_previous_kernel();
#endif
    const int kv_head = a.jobs[blockIdx.x * 3], first_head = a.jobs[blockIdx.x * 3 + 1], heads = a.jobs[blockIdx.x * 3 + 2];
    Unit unit;
    if (!find_unit(a.positions, a.sequences, a.window, a.target, a.min_keys, unit)) return;
    if (threadIdx.x == 0) {
        kept[0] = unit.sequence;
        kept[1] = unit.index;
        kept[2] = unit.count;
        kept[3] = first_head;
        kept[4] = heads;
    }
    const int warp = threadIdx.x >> 5;
    const int* table = a.block_tables + (size_t)unit.sequence * a.table_width;
    const Cache cache = {a.keys, a.values, a.key_scales, a.value_scales, table, a.kv_heads, kv_head};
    if (ROPE || QUANT) {
        queries.clear();
        __syncthreads();
    }
    Sums sums;
    sums.run(unit, cache, queries, a.scale, a.softcap, [&]() {
        Angles angles;
        if (ROPE && unit.position >= 0) angles.load(rope, unit.position);
        wait_for_previous_kernel();
        if constexpr (QUANT) {
            turn_and_quantise<ROPE>(a, rope, angles, slot_mapping, unit, kv_head, first_head, heads, &parts[0][0] + warp * D, queries);
        } else if (!ROPE) {
            queries.take(a.q, a.row(unit.sequence) * a.q_stride + first_head * D, heads);
        } else if (unit.position >= 0) {
            const size_t row = a.row(unit.sequence) * a.q_stride;
            const int new_heads = unit.has_new() ? 2 : 0;
            for (int i = warp; i < heads + new_heads; i += WARPS) {
                if (i >= new_heads) {
                    const int head = first_head + i - new_heads;
                    turn_head(rope, angles, a.q, row + head * D, head, rope.q_norm, true,
                              [&](int dim, float v) { queries.put(i - new_heads, dim, v); });
                } else {
                    const int head = a.query_heads + i * a.kv_heads + kv_head;
                    const size_t cached = ((size_t)__ldcg(slot_mapping + unit.sequence) * a.kv_heads + kv_head) * D;
                    turn_head(rope, angles, a.q, row + head * D, head, i ? nullptr : rope.k_norm, i == 0,
                              [&](int dim, float v) { store<KV_KIND>(i ? a.values : a.keys, cached + dim, v); });
                }
            }
        }
        __syncthreads();
    });

    sums.heads([&](int head, float m, float l) {
        warp_most[warp][head] = m;
        warp_total[warp][head] = l;
    });
    __syncthreads();
    if (threadIdx.x < HEADS) {
        float m = LOWEST, l = 0.f;
#pragma unroll
        for (int w = 0; w < WARPS; w++) m = fmaxf(m, warp_most[w][threadIdx.x]);
#pragma unroll
        for (int w = 0; w < WARPS; w++) l += warp_total[w][threadIdx.x] * exp2_fast(warp_most[w][threadIdx.x] - m);
        most[threadIdx.x] = m;
        total[threadIdx.x] = l;
    }
    sums.rescale([&](int head) {
        float m = LOWEST;
#pragma unroll
        for (int w = 0; w < WARPS; w++) m = fmaxf(m, warp_most[w][head]);
        return exp2_fast(warp_most[warp][head] - m);
    });
    if (warp >= SLOTS) sums.leave<false>(parts[warp - SLOTS]);
    __syncthreads();
    if (warp < SLOTS) sums.leave<true>(parts[warp]);
    __syncthreads();

    const int sequence = kept[0], count = kept[2], own_heads = kept[4];
    const size_t out_at = (a.row(sequence) * a.query_heads + kept[3]) * D;
    const size_t mine = ((size_t)blockIdx.y * gridDim.x + blockIdx.x) * HEADS;
    for (int e = threadIdx.x * 4; e < own_heads * D; e += THREADS * 4) {
        float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
        for (int slot = 0; slot < SLOTS; slot++) {
            const float4 p = *(const float4*)(parts[slot] + e);
            sum = make_float4(sum.x + p.x, sum.y + p.y, sum.z + p.z, sum.w + p.w);
        }
        if (count == 1) {
            const float l = total[e / D], inverse = l > 0.f ? 1.f / l : 0.f;
            store4<X_KIND>(a.out, out_at + e, turned_back(make_float4(sum.x * inverse, sum.y * inverse, sum.z * inverse, sum.w * inverse)));
        } else {
            __stcg((float4*)(a.partials + mine * D + e), sum);
        }
    }
    if (count == 1) return;
    if (threadIdx.x < own_heads) __stcg(a.stats + mine + threadIdx.x, make_float2(most[threadIdx.x], total[threadIdx.x]));
    __syncthreads();
    if (threadIdx.x == 0) {
        u32* counter = a.counters + (size_t)sequence * gridDim.x + blockIdx.x;
        is_last = count_one(counter) == (u32)count - 1;
        if (is_last) *counter = 0;
    }
    __syncthreads();
    if (is_last) combine(a.partials, a.stats, (int)blockIdx.y - kept[1], count, own_heads, a.out, out_at);
}

#define ATTENTION_PARAMETERS                                                                                                 \
    const void *q, int q_stride, void *keys, void *values, u16 *key_scales, u16 *value_scales, const int *__restrict__ jobs, const int *positions, \
        const int *rows, const int *block_tables, int table_width, int sequences, int kv_heads, int query_heads, float scale, float softcap,  \
        int window, int target, int min_keys, void *out, float *partials, float2 *stats, u32 *counters
#define ATTENTION_ARGUMENTS                                                                                              \
    {q, q_stride, keys, values, key_scales, value_scales, jobs, positions, rows, block_tables, table_width, sequences, kv_heads, query_heads, scale, softcap, \
     window, target, min_keys, out, partials, stats, counters}

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) attention_decode(ATTENTION_PARAMETERS) {
    const Attention a = ATTENTION_ARGUMENTS;
    attend<false>(a, Rope{}, nullptr);
}

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS)
    rope_attention_decode(ATTENTION_PARAMETERS, const float* __restrict__ bias, const float* __restrict__ q_norm,
                          const float* __restrict__ k_norm, float eps, const float* __restrict__ cosines,
                          const float* __restrict__ sines, int half_rotary, int interleaved, const SLOT* slot_mapping) {
    const Attention a = ATTENTION_ARGUMENTS;
    attend<true>(a, Rope{bias, q_norm, k_norm, eps, cosines, sines, half_rotary, interleaved}, slot_mapping);
}

#endif  // ROPE_ONLY
#elif defined(HIDDEN)
// ---- residual += [post norm of] partial; out = norm of residual ----
//
// Defines: HIDDEN (a multiple of 4), NTHREADS, X_KIND, PARTIAL_KIND.

constexpr int THREADS = NTHREADS, WARPS = THREADS / 32, VECTORS = HIDDEN / 4, ITEMS = (VECTORS + THREADS - 1) / THREADS;
static_assert(HIDDEN % 4 == 0 && THREADS % 32 == 0, "numbers in fours, threads in warps");

// The sum over the block, on every thread. `scratch` may not be in use by an earlier call.
__device__ __forceinline__ float block_sum(float v, float* scratch) {
    v = warp_sum(v);
    if ((threadIdx.x & 31) == 0) scratch[threadIdx.x >> 5] = v;
    __syncthreads();
    const int lane = threadIdx.x & 31;
    return warp_sum(lane < WARPS ? scratch[lane] : 0.f);
}
__device__ __forceinline__ float squares(const float4& v) { return v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w; }

// Four columns of one token to their places among the operands of gemm.cu, with their sums: as activations.cu puts eight.
// `quad`: which of a super-block's 64.
__device__ __forceinline__ void put_operand(const float (&v)[4], float factor, u8* chunk, int tiles, int wide, int token, int quad) {
    const int tile = token >> 3, g = token & 7, s = quad >> 3, half = (quad >> 2) & 1, c = quad & 3;
    float sum = 0.f;
    u32 bits[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const float value = v[i] * factor;
        bits[i] = (u32)to_bits<HALF>(value);
        sum += value;
    }
    const u32 first = bits[0] | bits[1] << 16, second = bits[2] | bits[3] << 16;
    if (wide) {
        u8* at = chunk + ((2 * s + half) * 2 * tiles * 8 + token) * 16 + c * 4;
        *(u32*)at = first;
        *(u32*)(at + tiles * 128) = second;
    } else {
        *(uint2*)(chunk + ((s * tiles + tile) * 32 + g * 4 + c) * 16 + half * 8) = make_uint2(first, second);
    }
    auto put_sum = [](u8* at, int low_at, float total) {
        const u32 high = (u32)to_bits<HALF>(total);
        *(u16*)at = (u16)high;
        *(u16*)(at + low_at) = to_bits<HALF>(total - to_float<HALF>((u16)high));
    };
    sum += __shfl_xor_sync(0xffffffffu, sum, 1);
    sum += __shfl_xor_sync(0xffffffffu, sum, 2);
    if (c == 0) {
        const int t = quad >> 2;
        put_sum(chunk + tiles * (4096 + 256) + (tile * 32 + g * 4 + ((t & 7) >> 1)) * 16 + (t >> 3) * 4 + (t & 1) * 2, 8, sum);
    }
    sum += __shfl_xor_sync(0xffffffffu, sum, 4);
    if ((quad & 7) == 0) put_sum(chunk + tiles * 4096 + (tile * 32 + g * 4 + (s >> 1)) * 8 + (s & 1) * 2, 4, sum);
}

__device__ __forceinline__ float rounded(float v) { return to_float<X_KIND>(to_bits<X_KIND>(v)); }

struct Operands {  // as activations.cu leaves them
    u8* packed;
    float* scales;
    int tiles, wide;
};

template <bool PACKED>
__device__ __forceinline__ void norm_body(float* residual, const void* partial, const float* __restrict__ post_weight,
                                          const float* __restrict__ weight, void* out, float eps, float offset, const Operands& operands) {
    __shared__ float scratch[3][32];
    let_next_kernel_start();
    float4 w[ITEMS], r[ITEMS], p[ITEMS];
    const float4 none = make_float4(0.f, 0.f, 0.f, 0.f);
    // Weights do not depend on the kernel before.
#pragma unroll
    for (int i = 0; i < ITEMS; i++) {
        const int at = threadIdx.x + i * THREADS;
        w[i] = at < VECTORS ? load4<FLOAT>(weight, 4 * at) : none;
    }
    wait_for_previous_kernel();
    const size_t row = (size_t)blockIdx.x * HIDDEN;
    float post_squares = 0.f, all_squares = 0.f;
#pragma unroll
    for (int i = 0; i < ITEMS; i++) {
        const int at = threadIdx.x + i * THREADS;
        r[i] = at < VECTORS ? load4<FLOAT>(residual, row + 4 * at) : none;
        p[i] = at < VECTORS && partial ? load4<PARTIAL_KIND>(partial, row + 4 * at) : none;
        post_squares += squares(p[i]);
    }
    const float post = post_weight ? rsqrtf(block_sum(post_squares, scratch[0]) / HIDDEN + eps) : 1.f;
#pragma unroll
    for (int i = 0; i < ITEMS; i++) {
        const int at = threadIdx.x + i * THREADS;
        if (post_weight && at < VECTORS) {
            const float4 f = load4<FLOAT>(post_weight, 4 * at);
            p[i] = make_float4(p[i].x * post * (f.x + offset), p[i].y * post * (f.y + offset), p[i].z * post * (f.z + offset), p[i].w * post * (f.w + offset));
        }
        r[i] = make_float4(r[i].x + p[i].x, r[i].y + p[i].y, r[i].z + p[i].z, r[i].w + p[i].w);
        all_squares += squares(r[i]);
    }
    const float inverse = rsqrtf(block_sum(all_squares, scratch[1]) / HIDDEN + eps);
    float most = 0.f;
#pragma unroll
    for (int i = 0; i < ITEMS; i++) {
        const int at = threadIdx.x + i * THREADS;
        if (at >= VECTORS) continue;
        if (partial) store4<FLOAT>(residual, row + 4 * at, r[i]);
        const float4 v = make_float4(r[i].x * inverse * (w[i].x + offset), r[i].y * inverse * (w[i].y + offset),
                                     r[i].z * inverse * (w[i].z + offset), r[i].w * inverse * (w[i].w + offset));
        store4<X_KIND>(out, row + 4 * at, v);
        if (PACKED) {
            w[i] = make_float4(rounded(v.x), rounded(v.y), rounded(v.z), rounded(v.w));
            most = fmaxf(most, fmaxf(fmaxf(fabsf(w[i].x), fabsf(w[i].y)), fmaxf(fabsf(w[i].z), fabsf(w[i].w))));
        }
    }
    if (!PACKED) return;
#pragma unroll
    for (int step = 16; step; step >>= 1) most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, step));
    if ((threadIdx.x & 31) == 0) scratch[2][threadIdx.x >> 5] = most;
    __syncthreads();
    most = (threadIdx.x & 31) < WARPS ? scratch[2][threadIdx.x & 31] : 0.f;
#pragma unroll
    for (int step = 16; step; step >>= 1) most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, step));
    const int shift = min(9 - ((int)(__float_as_uint(most) >> 23) - 127), 100);
    const float factor = __uint_as_float((u32)(127 + shift) << 23);
    if (threadIdx.x == 0) operands.scales[blockIdx.x] = __uint_as_float((u32)(127 - shift) << 23);
#pragma unroll
    for (int i = 0; i < ITEMS; i++) {
        const int at = threadIdx.x + i * THREADS;
        if (at >= VECTORS) continue;  // whole warps: rows are super-blocks
        const float v[4] = {w[i].x, w[i].y, w[i].z, w[i].w};
        u8* chunk = operands.packed + (size_t)(at >> 6) * operands.tiles * (4096 + 256 + 512);
        put_operand(v, factor, chunk, operands.tiles, operands.wide, blockIdx.x, at & 63);
    }
}

// A block a token. residual float32 [T][HIDDEN], in place; partial [T][HIDDEN] or null (only the norm is taken);
// post_weight null: no post norm. out [T][HIDDEN]. Weights float32 [HIDDEN], taken plus `offset`.
extern "C" __global__ void __launch_bounds__(THREADS)
    add_rms_norm(float* residual, const void* partial, const float* __restrict__ post_weight,
                 const float* __restrict__ weight, void* out, float eps, float offset) {
    norm_body<false>(residual, partial, post_weight, weight, out, eps, offset, {});
}
#if HIDDEN % 256 == 0
// The same, and out once more as gemm.cu takes it.
extern "C" __global__ void __launch_bounds__(THREADS)
    add_rms_norm_packed(float* residual, const void* partial, const float* __restrict__ post_weight, const float* __restrict__ weight,
                        void* out, float eps, float offset, u8* packed, float* scales, int tiles, int wide) {
    norm_body<true>(residual, partial, post_weight, weight, out, eps, offset, {packed, scales, tiles, wide});
}
#endif

#endif
