// What a decode step does from one attention to the next, for one or two tokens, as one launch. Follows gemv.cu, whose
// tiles, ring and activations it uses.
//
//   OUTPUT  attention's result times the output projection: this rank's part of a sum over ranks
//   GATED   that sum added to the residual stream; norm; gate and up projections, activation
//   DOWN    down projection: again a part of a sum
//   NEXT    that sum added; norm; the next layer's query, key and value, or the logits
//
// One block a multiprocessor, all of them resident at once. A warp's ring of weight copies runs on across the phases:
// while a block waits for numbers of the phase before, the memory already sends the weights of the next. There is no
// barrier between phases and none between ranks: results are stored where their readers look for them, in this GPU's
// memory and in every other rank's, and a reader looks until no number is NOTHING (-0.0; writers make it +0.0) any more.
// Every block computes residual stream and norm for itself, and every rank adds the parts in rank order, so all hold the
// same bits.
//
// Three sets of these places take turns, launch by launch: a launch uses set i and makes set i - 1 NOTHING again. Nobody
// reads that any more: the launch before is over when this one passes its wait. Nobody writes it yet: it is written by
// launch i + 2, which another rank reaches only with this rank's sums of launch i + 1, made after this launch is over.

constexpr u32 NOTHING = 0x80000000u, NOTHING_TWICE = 0x80008000u;
constexpr int PHASES = 4, OUTPUT = 0, GATED = 1, DOWN = 2, NEXT = 3;
constexpr int WIDE = (HIDDEN + 255) / 256;  // super-blocks of the residual stream
constexpr int ITEMS = (WIDE + WARPS - 1) / WARPS;
constexpr int BATCH = 2 * TOKENS;  // columns of the tensor cores' operand: two bytes a token
constexpr int DEPTH = 8 / TOKENS;  // row groups whose sums over warps may be open at a time

// Matrices with the same columns, one behind the other in the result. Matrix i is of TYPE_B where bit i of kinds is set.
struct Phase {
    const u8* w[3];
    const float* bias;
    int rows[3];
    int kinds, columns, offset, n_kb;
    __device__ __forceinline__ int groups(int part) const { return (rows[part] + ROWS - 1) / ROWS; }
};

struct Fixed {
    Phase phases[PHASES];
    float* places[RANKS];  // of the current set, on every rank
    float sums[2][WARPS];
    int jobs[PHASES];          // of this block
    int arrived[DEPTH];        // warps that have put their part of a job there
    volatile int done[DEPTH];  // jobs that were added up there
};

// A job is one row group of a matrix: 16 rows; or, of GATED, of both its matrices. Jobs are dealt to blocks in turn, the
// row groups of a phase's matrices counted through.
struct Job {
    int part, group;
};
__device__ __forceinline__ int jobs_of(const Phase& p, int phase) {
    const int groups = phase == GATED ? p.groups(0) : p.groups(0) + p.groups(1) + p.groups(2);
    return groups > (int)blockIdx.x ? (groups - (int)blockIdx.x + (int)gridDim.x - 1) / (int)gridDim.x : 0;
}
__device__ __forceinline__ Job job_at(const Phase& p, int phase, int number) {
    Job job = {0, (int)blockIdx.x + number * (int)gridDim.x};
#pragma unroll
    for (int part = 0; part < 2; part++)
        if (phase != GATED && job.part == part && job.group >= p.groups(part)) {
            job.group -= p.groups(part);
            job.part++;
        }
    return job;
}

// The tiles of a block's jobs are dealt to its warps in turn, on from one job to the next, anew in every phase. A warp's
// list holds the address of every tile it will want, in order, with bit 0 set where that is a tile of TYPE_B (they lie at
// multiples of 16). Returns their number.
__device__ __forceinline__ int list_tiles(const Fixed& fixed, u64* list) {
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    int listed = 0;
    for (int phase = 0; phase < PHASES; phase++) {
        const Phase& p = fixed.phases[phase];
        const int tiles = phase == GATED ? 2 * p.n_kb : p.n_kb, total = fixed.jobs[phase] * tiles;
        const int count = total > warp ? (total - warp + WARPS - 1) / WARPS : 0;
        for (int i = lane; i < count; i += 32) {
            const int at = warp + i * WARPS, number = at / tiles;
            int kb = at - number * tiles;
            Job job = job_at(p, phase, number);
            if (kb >= p.n_kb) {
                kb -= p.n_kb;
                job.part = 1;
            }
            const size_t tile = (size_t)job.group * p.n_kb + kb;
            const bool second = (p.kinds >> job.part) & 1;
            list[listed + i] = (u64)(p.w[job.part] + tile * (second ? TYPE_B::TILE : TYPE::TILE)) | second;
        }
        listed += count;
    }
    __syncwarp();
    return listed;
}

// ring_fill of gemv.cu with a size known only at run time.
__device__ __forceinline__ void fill_stage(u8* stage, u64 tile, u64* bar, int lane) {
    const u8* source = (const u8*)(tile & ~1ull);
#if HAS_BULK
    if (lane == 0) {
        const u32 b = shared_address(bar), bytes = tile & 1 ? TYPE_B::TILE : TYPE::TILE;
        asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(b), "r"(bytes) : "memory");
        asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                         shared_address(stage)),
                     "l"(source), "r"(bytes), "r"(b)
                     : "memory");
    }
#else
    if (tile & 1) ring_fill<TYPE_B::TILE>(stage, source, bar, lane);
    else ring_fill<TYPE::TILE>(stage, source, bar, lane);
#endif
}

// ---- numbers that other blocks and other GPUs put into place ----

__device__ __forceinline__ uint4 peek(const void* at) {
    uint4 v;
    asm volatile("ld.volatile.global.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(at) : "memory");
    return v;
}
__device__ __forceinline__ void put(float* at, float v) {
    asm volatile("st.volatile.global.f32 [%0], %1;" ::"l"(at), "f"(__fadd_rn(v, 0.f)) : "memory");
}
__device__ __forceinline__ void put(unsigned short* at, unsigned short v) {
    asm volatile("st.volatile.global.u16 [%0], %1;" ::"l"(at), "h"(v == 0x8000 ? (unsigned short)0 : v) : "memory");
}
__device__ __forceinline__ bool is_there(const uint4& v) {
    return v.x != NOTHING && v.y != NOTHING && v.z != NOTHING && v.w != NOTHING;
}
__device__ __forceinline__ bool is_half_missing(u32 v) {  // whether one of two 16-bit numbers is -0
    const u32 x = v ^ NOTHING_TWICE;
    return ((x - 0x00010001u) & ~x & NOTHING_TWICE) != 0;
}
__device__ __forceinline__ bool halves_are_there(const uint4& v) {
    return !(is_half_missing(v.x) || is_half_missing(v.y) || is_half_missing(v.z) || is_half_missing(v.w));
}

// A rank that died never sends: after PATIENCE nanoseconds the kernel fails, and with it this rank, instead of hanging.
#ifndef PATIENCE
#define PATIENCE 60000000000ull
#endif
struct Patience {
    u32 turns = 0;
    u64 since = 0;
    __device__ __forceinline__ void wait() {
        __nanosleep(20);
        if (++turns & 1023) return;
        u64 now;
        asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
        if (since == 0) since = now;
        else if (now - since > PATIENCE) asm volatile("trap;");
    }
};

// t = eight columns from k on of token n, summed over ranks in rank order. parts: float [RANKS][TOKENS][HIDDEN].
__device__ __forceinline__ void sum_over_ranks(const float* parts, int n, int k, float (&t)[8]) {
    constexpr int TOGETHER = RANKS < 2 ? 1 : 2;
#pragma unroll
    for (int first = 0; first < RANKS; first += TOGETHER) {
        uint4 v[TOGETHER][2];
        Patience patience;
        while (true) {
            bool there = true;
#pragma unroll
            for (int r = 0; r < TOGETHER; r++) {
                if (first + r >= RANKS) continue;
                const float* at = parts + ((size_t)(first + r) * TOKENS + n) * HIDDEN + k;
                v[r][0] = peek(at);
                v[r][1] = peek(at + 4);
            }
#pragma unroll
            for (int r = 0; r < TOGETHER; r++)
                if (first + r < RANKS) there = there && is_there(v[r][0]) && is_there(v[r][1]);
            if (there) break;
            patience.wait();
        }
#pragma unroll
        for (int r = 0; r < TOGETHER; r++) {
            if (first + r >= RANKS) continue;
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const float w[4] = {__uint_as_float(v[r][i].x), __uint_as_float(v[r][i].y), __uint_as_float(v[r][i].z), __uint_as_float(v[r][i].w)};
#pragma unroll
                for (int e = 0; e < 4; e++) t[4 * i + e] = first + r == 0 ? w[e] : t[4 * i + e] + w[e];
            }
        }
    }
}

// Sum over the block, in warp order, the same in every thread. Two scratch rows take turns, so one barrier is enough.
__device__ __forceinline__ float block_sum(float v, Fixed& fixed, int& turn) {
#pragma unroll
    for (int o = 16; o; o >>= 1) v += __shfl_xor_sync(0xffffffff, v, o);
    float* row = fixed.sums[turn & 1];
    turn++;
    if ((threadIdx.x & 31) == 0) row[threadIdx.x >> 5] = v;
    __syncthreads();
    float total = 0.f;
#pragma unroll
    for (int w = 0; w < WARPS; w++) total += row[w];
    return total;
}

__device__ __forceinline__ void load_eight(const float* at, float (&v)[8]) {
    const float4 a = *(const float4*)at, b = *(const float4*)(at + 4);
    v[0] = a.x; v[1] = a.y; v[2] = a.z; v[3] = a.w;
    v[4] = b.x; v[5] = b.y; v[6] = b.z; v[7] = b.w;
}

struct Inputs {  // activations in shared memory, as gemv.cu's kernels have them
    u8* quants;
    u8* sums;
    float* scale;
};

// residual += (post-normed) sum over ranks; its norm, quantised, becomes the input of the next products.
// A lane holds eight columns of super-blocks warp, warp + WARPS, ...
__device__ __forceinline__ void add_and_norm(float (&residual)[TOKENS][ITEMS][8], const float* parts, const float* __restrict__ weight,
                                             const float* __restrict__ post_weight, float eps, const Inputs& in, Fixed& fixed, int& turn) {
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    float w[ITEMS][8];
#pragma unroll
    for (int j = 0; j < ITEMS; j++) {
        const int k = (warp + j * WARPS) * 256 + lane * 8;
#pragma unroll
        for (int i = 0; i < 8; i++) w[j][i] = 0.f;
        if (k < HIDDEN) load_eight(weight + k, w[j]);
    }
    for (int i = threadIdx.x; i < WIDE * 8; i += blockDim.x) if ((i & 7) >= BATCH) in.scale[i] = 0.f;
#pragma unroll
    for (int n = 0; n < TOKENS; n++) {
        float t[ITEMS][8], squares = 0.f;
#pragma unroll
        for (int j = 0; j < ITEMS; j++) {
            const int k = (warp + j * WARPS) * 256 + lane * 8;
#pragma unroll
            for (int i = 0; i < 8; i++) t[j][i] = 0.f;
            if (k < HIDDEN) sum_over_ranks(parts, n, k, t[j]);
#pragma unroll
            for (int i = 0; i < 8; i++) squares += t[j][i] * t[j][i];
        }
        if (post_weight) {
            const float inverse = rsqrtf(block_sum(squares, fixed, turn) / HIDDEN + eps);
#pragma unroll
            for (int j = 0; j < ITEMS; j++) {
                const int k = (warp + j * WARPS) * 256 + lane * 8;
                float f[8];
                if (k < HIDDEN) load_eight(post_weight + k, f);
#pragma unroll
                for (int i = 0; i < 8; i++) t[j][i] = k < HIDDEN ? t[j][i] * inverse * f[i] : 0.f;
            }
        }
        squares = 0.f;
#pragma unroll
        for (int j = 0; j < ITEMS; j++)
#pragma unroll
            for (int i = 0; i < 8; i++) {
                residual[n][j][i] += t[j][i];
                squares += residual[n][j][i] * residual[n][j][i];
            }
        const float inverse = rsqrtf(block_sum(squares, fixed, turn) / HIDDEN + eps);
#pragma unroll
        for (int j = 0; j < ITEMS; j++) {
            const int kb = warp + j * WARPS;
            if (kb >= WIDE) continue;
            float v[8];
#pragma unroll
            for (int i = 0; i < 8; i++) v[i] = residual[n][j][i] * inverse * w[j][i];
            store_exact(v, absolute_max(v), kb, n, BATCH, lane, in.quants, in.sums, in.scale);
        }
    }
}

// The activations that GATED left: 16-bit numbers [TOKENS][columns].
__device__ __forceinline__ void take_inner(const unsigned short* inner, const Phase& p, const Inputs& in) {
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, jobs = p.n_kb * TOKENS;
    for (int i = threadIdx.x; i < p.n_kb * 8; i += blockDim.x) if ((i & 7) >= BATCH) in.scale[i] = 0.f;
    for (int first = warp; first < jobs; first += WARPS * LOADS) {
        uint4 raw[LOADS];
        const unsigned short* at[LOADS];
#pragma unroll
        for (int u = 0; u < LOADS; u++) {
            const int job = first + u * WARPS, kb = job / TOKENS, n = job - kb * TOKENS, k = kb * 256 + lane * 8 - p.offset;
            at[u] = job < jobs && k >= 0 && k < p.columns ? inner + (size_t)n * p.columns + k : (const unsigned short*)0;
            raw[u] = make_uint4(0, 0, 0, 0);
            if (at[u]) raw[u] = peek(at[u]);
        }
#pragma unroll
        for (int u = 0; u < LOADS; u++) {
            const int job = first + u * WARPS, kb = job / TOKENS, n = job - kb * TOKENS;
            if (job >= jobs) break;
            Patience patience;
            while (at[u] && !halves_are_there(raw[u])) {
                patience.wait();
                raw[u] = peek(at[u]);
            }
            __syncwarp();
            const u32 w[4] = {raw[u].x, raw[u].y, raw[u].z, raw[u].w};
            float v[8];
#pragma unroll
            for (int i = 0; i < 8; i++) v[i] = unpack<BFLOAT_MODE>(w[i >> 1], i & 1);
            store_exact(v, absolute_max(v), kb, n, BATCH, lane, in.quants, in.sums, in.scale);
        }
    }
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

// ---- sums over the block's warps ----

// Puts a warp's part of the block's job number `number`, of all its jobs, with the others':
// partial [DEPTH][WARPS][2][TOKENS][16 rows]. True in the warp that came last: it has all of them. No warp waits, unless it
// is DEPTH jobs ahead of another.
__device__ __forceinline__ bool add_up(Fixed& fixed, float* partial, const float (&mine)[2][2], int number) {
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, slot = number % DEPTH, n = lane & 3;
    while (fixed.done[slot] < number / DEPTH) {}
    __syncwarp();
    float* to = partial + ((size_t)slot * WARPS + warp) * 2 * TOKENS * ROWS;
    if (n < TOKENS) {
#pragma unroll
        for (int part = 0; part < 2; part++)
#pragma unroll
            for (int half = 0; half < 2; half++) to[(part * TOKENS + n) * ROWS + half * 8 + (lane >> 2)] = mine[part][half];
    }
    __syncwarp();
    int last = 0;
    if (lane == 0) {
        __threadfence_block();
        last = atomicAdd(&fixed.arrived[slot], 1) == WARPS - 1;
        __threadfence_block();
    }
    return __shfl_sync(0xffffffff, last, 0) != 0;
}

// By one warp: adds up 16 rows in warp order, and stores them where their readers look.
__device__ __forceinline__ void finish_rows(Fixed& fixed, const float* partial, const Phase& p, const Job& at, int phase, int number,
                                            unsigned short* inner, void* out, int float_out, int gelu, int rank) {
    const int lane = threadIdx.x & 31, n = lane >> 4, row = at.group * ROWS + (lane & 15);
    if (n >= TOKENS) return;
    const float* from = partial + (size_t)(number % DEPTH) * WARPS * 2 * TOKENS * ROWS + lane;
    float sum = 0.f, up = 0.f;
#pragma unroll
    for (int w = 0; w < WARPS; w++) sum += from[w * 2 * TOKENS * ROWS];
    if (phase == GATED) {
#pragma unroll
        for (int w = 0; w < WARPS; w++) up += from[(w * 2 + 1) * TOKENS * ROWS];
    }
    if (row >= p.rows[at.part]) return;
    const int before = at.part == 0 ? 0 : at.part == 1 ? p.rows[0] : p.rows[0] + p.rows[1];
    if (p.bias) sum += p.bias[before + row];
    if (phase == GATED) {
        if (p.bias) up += p.bias[p.rows[0] + row];
        put(inner + (size_t)n * p.rows[0] + row, pack<BFLOAT_MODE>(activated(sum, gelu) * up));
    } else if (phase == NEXT) {
        const size_t to = (size_t)n * (p.rows[0] + p.rows[1] + p.rows[2]) + before + row;
        if (float_out) ((float*)out)[to] = sum;
        else ((unsigned short*)out)[to] = pack<BFLOAT_MODE>(sum);
    } else {
        const size_t to = (phase == DOWN ? (size_t)RANKS * TOKENS * HIDDEN : 0) + ((size_t)rank * TOKENS + n) * HIDDEN + row;
#pragma unroll
        for (int r = 0; r < RANKS; r++) put(fixed.places[r] + to, sum);
    }
}

__device__ __forceinline__ void clear(uint4* at, size_t count, u32 value) {
    const uint4 v = make_uint4(value, value, value, value);
    for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += (size_t)gridDim.x * blockDim.x) at[i] = v;
}

#define MATRICES(p)                                                                                                     \
    const u8 *p##_w0, const u8 *p##_w1, const u8 *p##_w2, const float *p##_bias, int p##_rows0, int p##_rows1, int p##_rows2, \
        int p##_kinds, int p##_columns, int p##_offset, int p##_n_kb
#define PHASE(p) {{p##_w0, p##_w1, p##_w2}, p##_bias, {p##_rows0, p##_rows1, p##_rows2}, p##_kinds, p##_columns, p##_offset, p##_n_kb}

// mixed: [TOKENS][columns of OUTPUT], 16 bits. residual_in, residual_out: float [TOKENS][HIDDEN], two tensors that take
// turns. out: [TOKENS][rows of NEXT], 16 bits, or float where float_out. places: for every rank the address of its float
// [3 sets][2][RANKS][TOKENS][HIDDEN]. inner: 16-bit [3 sets][TOKENS][columns of DOWN]. steps: one integer on the device, the
// count of steps modulo 3; a step launches this kernel `launches` times, and this is number `launch` of them.
// widest: super-blocks of the phase with the most columns. longest: tiles of the warp with the most. HIDDEN and all columns
// are multiples of 8.
extern "C" __global__ void __launch_bounds__(WARPS * 32, 1)
    layer(MATRICES(o), MATRICES(g), MATRICES(d), MATRICES(x), const u8* mixed, const float* residual_in, float* residual_out,
          const float* __restrict__ ffn_norm, const float* __restrict__ post_attention_norm, const float* __restrict__ next_norm,
          const float* __restrict__ post_ffn_norm, float eps, void* out, int float_out, int gelu, float* const* places,
          unsigned short* inner, const int* steps, int launches, int launch, int rank, int widest, int longest) {
    extern __shared__ __align__(128) u8 shared[];
    constexpr int TILE = TYPE::TILE > TYPE_B::TILE ? TYPE::TILE : TYPE_B::TILE;
    u8* ring = shared;
    u64* bars = (u64*)(ring + (size_t)WARPS * NSTAGES * TILE);
    float* partial = (float*)(bars + WARPS * NSTAGES);  // see add_up
    Fixed& fixed = *(Fixed*)(partial + 2 * WARPS * 128);
    float* scale = (float*)(shared + WARPS * NSTAGES * (TILE + 8) + 2 * WARPS * 512 + FIXED_BYTES);
    static_assert(sizeof(Fixed) <= FIXED_BYTES, "the host leaves too little room");
    u8* quants = (u8*)(scale + widest * 8);
    const Inputs in = {quants, quants + (size_t)widest * 256 * BATCH, scale};
    u64* list = (u64*)(in.sums + (size_t)widest * 48 * BATCH) + (size_t)(threadIdx.x >> 5) * longest;
    const Activations act = {in.quants, in.sums, in.scale};
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;

    let_next_kernel_start();
    u8* my_ring = ring + (size_t)warp * NSTAGES * TILE;
    u64* my_bars = bars + warp * NSTAGES;
    if (lane == 0)
        for (int s = 0; s < NSTAGES; s++) barrier_init(my_bars + s);
#if HAS_BULK
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
    if (threadIdx.x == 0) {
        const Phase output = PHASE(o), gated = PHASE(g), down = PHASE(d), next = PHASE(x);
        fixed.phases[OUTPUT] = output;
        fixed.phases[GATED] = gated;
        fixed.phases[DOWN] = down;
        fixed.phases[NEXT] = next;
        for (int i = 0; i < DEPTH; i++) fixed.arrived[i] = fixed.done[i] = 0;
        for (int i = 0; i < PHASES; i++) fixed.jobs[i] = jobs_of(fixed.phases[i], i);
    }
    __syncthreads();
    const Phase* phases = fixed.phases;
    const int listed = list_tiles(fixed, list);
    int ahead = 0;  // of the copies, NSTAGES tiles before the sums
    auto fill = [&](int stage) {
        if (ahead < listed) fill_stage(my_ring + (size_t)stage * TILE, list[ahead], my_bars + stage, lane);
        ahead++;
#if HAS_ASYNC && !HAS_BULK
        asm volatile("cp.async.commit_group;" ::: "memory");
#endif
    };
    for (int s = 0; s < NSTAGES; s++) fill(s);

    // The count of steps was there before the step's first kernel.
    constexpr size_t PART = (size_t)RANKS * TOKENS * HIDDEN;
    const int set = (*(volatile const int*)steps * (launches % 3) + launch) % 3, stale = (set + 2) % 3;
    const size_t inner_size = (size_t)TOKENS * phases[DOWN].columns;
    if (threadIdx.x < RANKS) fixed.places[threadIdx.x] = places[threadIdx.x] + set * 2 * PART;
    unsigned short* my_inner = inner + set * inner_size;
    wait_for_previous_kernel();
    float residual[TOKENS][ITEMS][8];
#pragma unroll
    for (int n = 0; n < TOKENS; n++)
#pragma unroll
        for (int j = 0; j < ITEMS; j++) {
            const int k = (warp + j * WARPS) * 256 + lane * 8;
#pragma unroll
            for (int i = 0; i < 8; i++) residual[n][j][i] = 0.f;
            if (k < HIDDEN) load_eight(residual_in + (size_t)n * HIDDEN + k, residual[n][j]);
        }

    int stage = 0, turn = 0, job_number = 0;
    u32 parity = 0;
#pragma unroll 1
    for (int phase = 0; phase < PHASES; phase++) {
        const Phase& p = phases[phase];
        if (phase == OUTPUT) {
            quantise<true, BFLOAT_MODE>(mixed, p.columns, p.offset, p.n_kb, TOKENS, in.quants, in.sums, in.scale);
        } else if (phase == DOWN) {
            take_inner(my_inner, p, in);
        } else {
            const bool last = phase == NEXT;
            add_and_norm(residual, fixed.places[rank] + (last ? PART : 0), last ? next_norm : ffn_norm,
                         last ? post_ffn_norm : post_attention_norm, eps, in, fixed, turn);
        }
        __syncthreads();
        if (phase == OUTPUT) {
            clear((uint4*)(fixed.places[rank] + (stale - set) * (int)(2 * PART)), 2 * PART / 4, NOTHING);
            clear((uint4*)(inner + stale * inner_size), inner_size / 8, NOTHING_TWICE);
        }
        const int n_kb = p.n_kb, jobs = fixed.jobs[phase];
        int kb = warp;
        for (int number = 0; number < jobs; number++, job_number++) {
            const Job job = job_at(p, phase, number);
            // Columns of high and low parts are neighbours in a lane: lanes of column pair n hold token n.
            float mine[2][2];
#pragma unroll
            for (int part = 0; part < 2; part++) {
                mine[part][0] = mine[part][1] = 0.f;
                if (part == 1 && phase != GATED) break;
                float acc[4] = {0.f, 0.f, 0.f, 0.f};
                const bool second = (p.kinds >> (job.part + part)) & 1;
                for (; kb < n_kb; kb += WARPS) {
#if HAS_BULK
                    ring_wait(my_bars + stage, parity);
#elif HAS_ASYNC
                    asm volatile("cp.async.wait_group %0;" ::"n"(NSTAGES - 1) : "memory");
                    __syncwarp();
#endif
                    const u8* tile = my_ring + (size_t)stage * TILE;
                    if (second) tile_of<TYPE_B>(tile, act, kb, lane, acc);
                    else tile_of<TYPE>(tile, act, kb, lane, acc);
                    __syncwarp();
                    fill(stage);
                    if (++stage == NSTAGES) { stage = 0; parity ^= 1; }
                }
                kb -= n_kb;
                mine[part][0] = acc[0] + acc[1];
                mine[part][1] = acc[2] + acc[3];
                if (TOKENS == 1) {
#pragma unroll
                    for (int half = 0; half < 2; half++) {
                        mine[part][half] += __shfl_xor_sync(0xffffffff, mine[part][half], 1);
                        mine[part][half] += __shfl_xor_sync(0xffffffff, mine[part][half], 2);
                    }
                }
            }
            if (add_up(fixed, partial, mine, job_number)) {
                finish_rows(fixed, partial, p, job, phase, job_number, my_inner, out, float_out, gelu, rank);
                __syncwarp();
                if (lane == 0) {
                    fixed.arrived[job_number % DEPTH] = 0;
                    __threadfence_block();
                    fixed.done[job_number % DEPTH] = job_number / DEPTH + 1;
                }
            }
        }
        __syncthreads();  // the activations are not needed any more
        if (phase == NEXT && blockIdx.x == 0) {
#pragma unroll
            for (int n = 0; n < TOKENS; n++)
#pragma unroll
                for (int j = 0; j < ITEMS; j++) {
                    const int k = (warp + j * WARPS) * 256 + lane * 8;
                    if (k >= HIDDEN) continue;
                    float* to = residual_out + (size_t)n * HIDDEN + k;
                    const float(&r)[8] = residual[n][j];
                    *(float4*)to = make_float4(r[0], r[1], r[2], r[3]);
                    *(float4*)(to + 4) = make_float4(r[4], r[5], r[6], r[7]);
                }
        }
    }
}
