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
//
// RELAY: ranks that cannot write into each other's memory have a mailbox each in host memory. A rank puts its parts into its
// own places and once into its mailbox; of the other ranks' mail each block fetches its share into this rank's places, where
// everybody finds it. Four sets of mail take turns: a launch with set i makes set i + 2 NOTHING at its end. All have read
// what launch i - 2 left there, or their parts of launch i - 1, without which this launch would not have begun, could not
// have come; and who reads the set in launch i + 2 has this rank's sums of launch i + 1, made after this launch is over.

constexpr u32 NOTHING = 0x80000000u, NOTHING_TWICE = 0x80008000u;
constexpr int PHASES = 4, OUTPUT = 0, GATED = 1, DOWN = 2, NEXT = 3;
constexpr int WIDE = (HIDDEN + 255) / 256;  // super-blocks of the residual stream
constexpr int ITEMS = (WIDE + WARPS - 1) / WARPS;
constexpr size_t PART = (size_t)RANKS * TOKENS * HIDDEN, MAIL = (size_t)TOKENS * HIDDEN;  // numbers of one sum
#ifndef RELAY
#define RELAY false
#endif
constexpr int DEPTH = 8 / TOKENS;  // row groups whose sums over warps may be open at a time

// Matrices with the same columns, one behind the other in the result. Bits 2 i and 2 i + 1 of kinds tell how matrix i lies.
struct Phase {
    const u8* w[3];
    const float* bias;
    int rows[3];
    int kinds, columns, offset, n_kb;
    __device__ __forceinline__ int groups(int part) const { return (rows[part] + ROWS - 1) / ROWS; }
};

struct Fixed {
    Phase phases[PHASES];
    float* places[RANKS];  // of the current set, on every rank; with RELAY the other ranks' mailboxes instead
    float* mailbox;        // this rank's, of the current set
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

// The tiles of a block's jobs are dealt to its warps in turn, on from one job to the next, anew in every phase.
#if LISTED
// A warp's list holds an entry for every tile it will want, in order. Returns their number.
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
            list[listed + i] = tile_entry(p, job.part, job.group, kb);
        }
        listed += count;
    }
    __syncwarp();
    return listed;
}
#else
// The next tile that a warp will want: tile kb of the block's job `number`, counted on through a job's two matrices.
struct Ahead {
    int phase, number, kb;
};
// Whether there is one; kb may have run past its job before.
__device__ __forceinline__ bool settle(const Fixed& fixed, Ahead& at) {
    while (at.phase < PHASES) {
        const int n_kb = fixed.phases[at.phase].n_kb, tiles = at.phase == GATED ? 2 * n_kb : n_kb;
        while (at.number < fixed.jobs[at.phase] && at.kb >= tiles) {
            at.kb -= tiles;
            at.number++;
        }
        if (at.number < fixed.jobs[at.phase]) return true;
        at.phase++;
        at.number = 0;
        at.kb = threadIdx.x >> 5;
    }
    return false;
}
struct TileAt {
    int part, group, kb;
};
__device__ __forceinline__ TileAt tile_at(const Fixed& fixed, const Ahead& at) {
    const Phase& p = fixed.phases[at.phase];
    const Job job = job_at(p, at.phase, at.number);
    return at.kb < p.n_kb ? TileAt{job.part, job.group, at.kb} : TileAt{1, job.group, at.kb - p.n_kb};
}
#endif

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
__device__ __forceinline__ void put(float* at, const uint4& v) {
    asm volatile("st.volatile.global.v4.u32 [%0], {%1,%2,%3,%4};" ::"l"(at), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
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

// The block's share of the other ranks' mail into this rank's places. which: 0 after OUTPUT, 1 after DOWN.
__device__ __forceinline__ void fetch_mail(const Fixed& fixed, int rank, int which) {
    constexpr int PIECES = (int)(MAIL / 4), TOTAL = (RANKS - 1) * PIECES;  // of 16 bytes
    const int share = (TOTAL + (int)gridDim.x - 1) / (int)gridDim.x, end = min(TOTAL, ((int)blockIdx.x + 1) * share);
    for (int i = (int)blockIdx.x * share + (int)threadIdx.x; i < end; i += blockDim.x) {
        int from = i / PIECES;
        const int at = (i - from * PIECES) * 4;
        from += from >= rank;
        const float* mail = fixed.places[from] + which * MAIL + at;
        uint4 v = peek(mail);
        Patience patience;
        while (!is_there(v)) {
            patience.wait();
            v = peek(mail);
        }
        put(fixed.places[rank] + which * PART + from * MAIL + at, v);
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
    clear_inputs(in, WIDE);
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
            store_input(v, kb, n, lane, in);
        }
    }
}

// The activations that GATED left: 16-bit numbers [TOKENS][columns].
__device__ __forceinline__ void take_inner(const unsigned short* inner, const Phase& p, const Inputs& in) {
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, blocks = super_blocks(p.n_kb, p.columns), jobs = blocks * TOKENS;
    clear_inputs(in, blocks);
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
            store_input(v, kb, n, lane, in);
        }
    }
}

// ---- sums over the block's warps ----

// Puts a warp's part of the block's job number `number`, of all its jobs, with the others':
// partial [DEPTH][WARPS][2][TOKENS][16 rows]. True in the warp that came last: it has all of them. No warp waits, unless it
// is DEPTH jobs ahead of another.
__device__ __forceinline__ bool add_up(Fixed& fixed, float* partial, const Part (&mine)[2], int number) {
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, slot = number % DEPTH;
    while (fixed.done[slot] < number / DEPTH) {}
    __syncwarp();
    float* to = partial + ((size_t)slot * WARPS + warp) * 2 * TOKENS * ROWS;
    put_part(to, mine[0], lane);
    put_part(to + TOKENS * ROWS, mine[1], lane);
    __syncwarp();
    int last = 0;
    if (lane == 0) {
        __threadfence_block();
        last = atomicAdd(&fixed.arrived[slot], 1) == WARPS - 1;
        __threadfence_block();
    }
    return __shfl_sync(0xffffffff, last, 0) != 0;
}

// By one warp: adds up 16 rows of all tokens in warp order, and stores them where their readers look.
__device__ __forceinline__ void finish_rows(Fixed& fixed, const float* partial, const Phase& p, const Job& at, int phase, int number,
                                            unsigned short* inner, void* out, int float_out, int gelu, int rank) {
    static_assert(TOKENS * ROWS <= 32, "a lane adds up one row of one token");
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
        const size_t of_rank = (size_t)n * HIDDEN + row, to = (phase == DOWN ? PART : 0) + rank * MAIL + of_rank;
        if (RELAY) {
            put(fixed.mailbox + (phase == DOWN ? MAIL : 0) + of_rank, sum);
            put(fixed.places[rank] + to, sum);
        } else {
#pragma unroll
            for (int r = 0; r < RANKS; r++) put(fixed.places[r] + to, sum);
        }
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
// [3 sets][2][RANKS][TOKENS][HIDDEN]; with RELAY so for this rank, for every other one that of its mailbox, float
// [4 sets][2][TOKENS][HIDDEN], and last this rank's mailbox. inner: 16-bit [3 sets][TOKENS][columns of DOWN]. steps: one
// integer on the device, the count of steps modulo 12; a step launches this kernel `launches` times, and this is number
// `launch` of them.
// widest: super-blocks of the phase with the most columns. longest: tiles of the warp with the most. HIDDEN and all columns
// are multiples of 8.
extern "C" __global__ void __launch_bounds__(WARPS * 32, 1)
    layer(MATRICES(o), MATRICES(g), MATRICES(d), MATRICES(x), const u8* mixed, const float* residual_in, float* residual_out,
          const float* __restrict__ ffn_norm, const float* __restrict__ post_attention_norm, const float* __restrict__ next_norm,
          const float* __restrict__ post_ffn_norm, float eps, void* out, int float_out, int gelu, float* const* places,
          unsigned short* inner, const int* steps, int launches, int launch, int rank, int widest, int longest) {
    extern __shared__ __align__(128) u8 shared[];
    u8* ring = shared;
    u64* bars = (u64*)(ring + (size_t)WARPS * NSTAGES * STAGE_BYTES);
    float* partial = (float*)(bars + WARPS * NSTAGES);  // see add_up
    Fixed& fixed = *(Fixed*)(partial + 2 * WARPS * 128);
    const Inputs in = inputs_at(shared + WARPS * NSTAGES * (STAGE_BYTES + 8) + 2 * WARPS * 512 + FIXED_BYTES, widest);
    static_assert(sizeof(Fixed) <= FIXED_BYTES, "the host leaves too little room");
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;

    let_next_kernel_start();
    u8* my_ring = ring + (size_t)warp * NSTAGES * STAGE_BYTES;
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
    // The copies are NSTAGES tiles ahead of the sums.
#if LISTED
    u64* list = (u64*)end_of_inputs(in, widest) + (size_t)warp * longest;
    const int listed = list_tiles(fixed, list);
    int ahead = 0;
#else
    Ahead ahead = {0, 0, warp};
#endif
    auto fill = [&](int stage) {
        u8* target = my_ring + (size_t)stage * STAGE_BYTES;
#if LISTED
        if (ahead < listed) fill_stage(target, list[ahead], my_bars + stage, lane);
        ahead++;
#else
        if (settle(fixed, ahead)) {
            const TileAt tile = tile_at(fixed, ahead);
            fill_stage(target, phases[ahead.phase], tile.part, tile.group, tile.kb, my_bars + stage, lane);
            ahead.kb += WARPS;
        }
#endif
#if HAS_ASYNC && !HAS_BULK
        asm volatile("cp.async.commit_group;" ::: "memory");
#endif
    };
    for (int s = 0; s < NSTAGES; s++) fill(s);

    // The count of steps was there before the step's first kernel.
    const int set = (*(volatile const int*)steps * (launches % 3) + launch) % 3, stale = (set + 2) % 3;
    const size_t inner_size = (size_t)TOKENS * phases[DOWN].columns;
    const int post = (*(volatile const int*)steps * (launches % 4) + launch) % 4;  // set of mail
    if (threadIdx.x < RANKS)
        fixed.places[threadIdx.x] = places[threadIdx.x] + (RELAY && (int)threadIdx.x != rank ? post * 2 * MAIL : set * 2 * PART);
    if (RELAY && threadIdx.x == 0) fixed.mailbox = places[RANKS] + post * 2 * MAIL;
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
            take_mixed(mixed, p.columns, p.offset, super_blocks(p.n_kb, p.columns), in);
        } else if (phase == DOWN) {
            take_inner(my_inner, p, in);
        } else {
            const bool last = phase == NEXT;
            if (RELAY) fetch_mail(fixed, rank, last);
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
            Part mine[2] = {};
#pragma unroll
            for (int part = 0; part < 2; part++) {
                if (part == 1 && phase != GATED) break;
                Sums sums;
                const int kind = kind_of(p, job.part + part);
                for (; kb < n_kb; kb += WARPS) {
#if HAS_BULK
                    ring_wait(my_bars + stage, parity);
#elif HAS_ASYNC
                    asm volatile("cp.async.wait_group %0;" ::"n"(NSTAGES - 1) : "memory");
                    __syncwarp();
#endif
                    const u8* tile = my_ring + (size_t)stage * STAGE_BYTES;
                    sums.add(tile, kind, in, kb, p.columns, lane);
                    __syncwarp();
                    fill(stage);
                    if (++stage == NSTAGES) { stage = 0; parity ^= 1; }
                }
                kb -= n_kb;
                mine[part] = part_of(sums, lane);
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
        if (RELAY && phase == NEXT) clear((uint4*)(fixed.mailbox + ((post + 2) % 4 - post) * (int)(2 * MAIL)), 2 * MAIL / 4, NOTHING);
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
