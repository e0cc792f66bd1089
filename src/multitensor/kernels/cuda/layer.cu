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
    int arrived[DEPTH];        // warps that have put their part of a row group there
    volatile int done[DEPTH];  // row groups that were added up there
};

// Where a warp stands: row group of a matrix of a phase, and the super-block in it.
struct Place {
    int phase, part, group, kb;
};

__device__ __forceinline__ bool settled(const Phase& p, Place& at) {
    for (; at.part < 3; at.part++) {
        const int groups = p.groups(at.part);
        if (at.group < groups) return true;
        at.group -= groups;
    }
    return false;
}
__device__ __forceinline__ bool first_rows(const Phase* phases, Place& at) {
    at.part = 0;
    at.group = blockIdx.x;
    if (at.phase == GATED) return at.group < phases[GATED].groups(0);
    return settled(phases[at.phase], at);
}
// The block's next row group of the phase; of GATED's two matrices the same rows one after the other.
__device__ __forceinline__ bool next_rows(const Phase* phases, Place& at) {
    if (at.phase == GATED) {
        at.part ^= 1;
        if (at.part == 0) at.group += gridDim.x;
        return at.group < phases[GATED].groups(0);
    }
    at.group += gridDim.x;
    return settled(phases[at.phase], at);
}
// Tiles of the block's row groups are dealt to warps in turn, on from one row group to the next.
__device__ __forceinline__ void settle_warp(const Phase* phases, Place& at, int warp) {
    while (at.phase < PHASES && at.kb >= phases[at.phase].n_kb) {
        at.kb -= phases[at.phase].n_kb;
        if (next_rows(phases, at)) continue;
        do {
            at.phase++;
            at.kb = warp;
        } while (at.phase < PHASES && !first_rows(phases, at));
    }
}
__device__ __forceinline__ void first_tile(const Phase* phases, Place& at, int warp) {
    at.phase = 0;
    at.kb = warp;
    while (at.phase < PHASES && !first_rows(phases, at)) at.phase++;
    settle_warp(phases, at, warp);
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

// ---- sums over the block's warps ----

// Puts a warp's part of the block's row group number `number` (of one matrix, or two) with the others':
// partial [DEPTH][WARPS][2][TOKENS][16 rows]. True in the warp that came last: it has all of them. No warp waits, unless it
// is DEPTH row groups ahead of another.
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
__device__ __forceinline__ void finish_rows(Fixed& fixed, const float* partial, const Phase& p, const Place& at, int phase, int number,
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
// [3 sets][2][RANKS][TOKENS][HIDDEN]. inner: 16-bit [3 sets][TOKENS][columns of DOWN]. turn: one integer on the device, the
// count of steps modulo 3; a step launches this kernel `launches` times, and this is number `launch` of them.
// widest: super-blocks of the phase with the most columns. HIDDEN and all columns are multiples of 8.
extern "C" __global__ void __launch_bounds__(WARPS * 32, 1)
    layer(MATRICES(o), MATRICES(g), MATRICES(d), MATRICES(x), const u8* mixed, const float* residual_in, float* residual_out,
          const float* __restrict__ ffn_norm, const float* __restrict__ post_attention_norm, const float* __restrict__ next_norm,
          const float* __restrict__ post_ffn_norm, float eps, void* out, int float_out, int gelu, float* const* places,
          unsigned short* inner, const int* steps, int launches, int launch, int rank, int widest) {
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
    }
    __syncthreads();
    const Phase* phases = fixed.phases;
    Place ahead;  // of the copies, NSTAGES tiles before the sums
    first_tile(phases, ahead, warp);
    auto fill = [&](int stage) {
        if (ahead.phase < PHASES) {
            const Phase& p = phases[ahead.phase];
            const size_t tile = (size_t)ahead.group * p.n_kb + ahead.kb;
            u8* target = my_ring + (size_t)stage * TILE;
            if ((p.kinds >> ahead.part) & 1) ring_fill<TYPE_B::TILE>(target, p.w[ahead.part] + tile * TYPE_B::TILE, my_bars + stage, lane);
            else ring_fill<TYPE::TILE>(target, p.w[ahead.part] + tile * TYPE::TILE, my_bars + stage, lane);
            ahead.kb += WARPS;
            settle_warp(phases, ahead, warp);
        }
#if HAS_ASYNC && !HAS_BULK
        asm volatile("cp.async.commit_group;" ::: "memory");
#endif
    };
    for (int s = 0; s < NSTAGES; s++) fill(s);

    wait_for_previous_kernel();
    constexpr size_t PART = (size_t)RANKS * TOKENS * HIDDEN;
    const int set = (*(volatile const int*)steps * (launches % 3) + launch) % 3, stale = (set + 2) % 3;
    const size_t inner_size = (size_t)TOKENS * phases[DOWN].columns;
    if (threadIdx.x < RANKS) fixed.places[threadIdx.x] = places[threadIdx.x] + set * 2 * PART;
    unsigned short* my_inner = inner + set * inner_size;
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

    int stage = 0, turn = 0, row_group = 0;
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
        const int n_kb = p.n_kb;
        Place at;
        at.phase = phase;
        int kb = warp;
        for (bool more = first_rows(phases, at); more; row_group++) {
            // Columns of high and low parts are neighbours in a lane: lanes of column pair n hold token n.
            float mine[2][2];
#pragma unroll
            for (int part = 0; part < 2; part++) {
                mine[part][0] = mine[part][1] = 0.f;
                if (part == 1 && phase != GATED) break;
                float acc[4] = {0.f, 0.f, 0.f, 0.f};
                const bool second = (p.kinds >> (at.part + part)) & 1;
                for (; kb < n_kb; kb += WARPS) {
#if HAS_BULK
                    ring_wait(my_bars + stage, parity);
#elif HAS_ASYNC
                    asm volatile("cp.async.wait_group %0;" ::"n"(NSTAGES - 1) : "memory");
                    __syncwarp();
#endif
                    const u8* tile = my_ring + (size_t)stage * TILE;
                    if (second) TYPE_B::tile(tile, act, kb, BATCH, lane, acc);
                    else TYPE::tile(tile, act, kb, BATCH, lane, acc);
                    __syncwarp();
                    fill(stage);
                    if (++stage == NSTAGES) { stage = 0; parity ^= 1; }
                }
                kb -= n_kb;
                mine[part][0] = acc[0] + acc[1];
                mine[part][1] = acc[2] + acc[3];
            }
            if (add_up(fixed, partial, mine, row_group)) {
                finish_rows(fixed, partial, p, at, phase, row_group, my_inner, out, float_out, gelu, rank);
                __syncwarp();
                if (lane == 0) {
                    fixed.arrived[row_group % DEPTH] = 0;
                    __threadfence_block();
                    fixed.done[row_group % DEPTH] = row_group / DEPTH + 1;
                }
            }
            if (phase == GATED) {
                at.group += gridDim.x;
                more = at.group < p.groups(0);
            } else {
                more = next_rows(phases, at);
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
