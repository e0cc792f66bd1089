// Sums over ranks, and gathers, through memory that every GPU sees (parallel/peer_memory.py): no flags, no fences, no barriers.
// Behind decode.cu, whose device functions it uses.
//
// Every rank owns three receive sets. A writer stores its float32 values straight into its place in the set of every reader;
// a reader looks at its own GPU's memory until no value is NOTHING, which is -0.0, and which a writer turns into +0.0. Words
// arrive one by one and in any order, and nothing depends on it: each is looked at by itself.
//
// Sets take turns. Turn k uses set k % 3 and, in the reader's own memory, makes set (k - 1) % 3 NOTHING again. Why that is safe:
//  - its readers have finished: they are this rank's turn k - 1, a kernel before this one. Every kernel of a chain of overlapped
//    launches waits (griddepcontrol.wait) for the end of the one before it, so that after our wait all earlier ones are over;
//  - its writers of turn k - 1 have finished: turn k - 1 could only end when every word of them had come;
//  - its next writers, turn k + 2 of a peer, have not begun: a peer begins turn k + 2 when its turn k + 1 is over, for which it
//    needs our words of turn k + 1, and these we send after the wait that follows the end of this kernel.
// With two sets a fast peer's turn k + 1 could meet our clearing in turn k. A turn is counted in device memory, because CUDA
// graphs replay fixed arguments: per token (the reduction: all its blocks read the counter, one of them counts on at the end)
// or per block (the gather). All ranks launch the same kernels in the same order, so their counters agree; a token that a
// launch leaves out keeps its turn on all ranks, and the argument above then speaks of the launches that hold the token.
//
// Nothing is sent before the wait. Blocks start in the order of their numbers and block b needs nothing but the peers' blocks b,
// so that a grid too large for a GPU still ends. Who waits longer than `limit_ms` traps, which ends the rank with an error.
//
// With MAILBOX the memory is the host's (parallel/host_memory.py), for GPUs that do not reach each other's. Every rank owns a
// mailbox in it, of sets without a place for each writer; it writes there once for all, and the others look there. So each
// clears what it wrote itself, which needs other reasons than the above:
//  - the reduction clears set (k - 1) % 3 of the columns that a thread has just had turn k's words of, from every other rank: by
//    these each has told that its turn k - 1 is over, reading included. The gather cannot say so, for a block may need no other
//    rank's words. It has four sets, and clears that of turn k - 2, which all ranks have read, or our turn k - 1 were not over;
//  - a cleared place is read in turn k + 2, which a peer begins with our words of turn k + 1, sent when this kernel is over.
// The mailbox way has run for ranks that share one GPU, not yet for two; `limit_ms` below 0 makes who waits in vain give up after -limit_ms, and count that
// behind the turns: for a trial that must not end the process.
//
// Sections: the reduction where ROW is defined (RANKS, ROW, PARTS, NTHREADS, MAX_TOKENS, X_KIND, PARTIAL_KIND), else the gather.

__device__ __forceinline__ u64 nanoseconds() {
    u64 now;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
    return now;
}

#ifndef MAILBOX
#define MAILBOX 0
#endif

__device__ __forceinline__ void fail() { asm volatile("trap;"); }

// Counts looks in vain; now and then at the clock. False: give up.
struct Patience {
    u64 began = 0;
    u32 looks = 0;
    __device__ __forceinline__ bool wait(int limit_ms) {
        if (++looks & 255) return true;
        const u64 now = nanoseconds();
        if (began == 0) began = now;
        else if (now - began > (u64)(limit_ms < 0 ? -limit_ms : limit_ms) * 1000000) {
            if (limit_ms < 0) return false;
            fail();
        }
        return true;
    }
};

constexpr u32 NOTHING = 0x80000000u;
__device__ __forceinline__ bool here(float v) { return __float_as_uint(v) != NOTHING; }

#if defined(ROW)
// ---- residual += [post norm of] the ranks' sum; out = norm of residual ----

constexpr int VECTORS = ROW / 4, PART = (VECTORS + PARTS - 1) / PARTS, THREADS = NTHREADS, WARPS = THREADS / 32;
constexpr int ITEMS = (PART + THREADS - 1) / THREADS;
constexpr int TOGETHER = RANKS < 8 ? (8 / RANKS < ITEMS ? 8 / RANKS : ITEMS) : 1;  // items whose words are looked at at once
static_assert(ROW % 4 == 0 && THREADS % 32 == 0 && THREADS <= 1024, "numbers in fours, threads in warps");

__device__ __forceinline__ void put4(u64 address, float4 v) {
    asm volatile("st.relaxed.sys.global.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(address), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w) : "memory");
}
__device__ __forceinline__ float4 look4(u64 address) {
    float4 v;
    asm volatile("ld.relaxed.sys.global.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "l"(address) : "memory");
    return v;
}
__device__ __forceinline__ float4 add4(float4 a, float4 b) { return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w); }
__device__ __forceinline__ float squares(float4 v) { return v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w; }

// The PARTS blocks of a token are a cluster, and speak through each other's shared memory.
__device__ __forceinline__ void cluster_arrive() {
#if PARTS > 1
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
}
__device__ __forceinline__ void cluster_wait() {
#if PARTS > 1
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

// The sum over all threads of a token, on each of them, in one order. Neither array may be in use by an earlier call.
__device__ __forceinline__ float token_sum(float v, int part, float* scratch, float* sums) {
    v = warp_sum(v);
    if ((threadIdx.x & 31) == 0) scratch[threadIdx.x >> 5] = v;
    __syncthreads();
    const int lane = threadIdx.x & 31;
    v = warp_sum(lane < WARPS ? scratch[lane] : 0.f);
#if PARTS > 1
    if (threadIdx.x < PARTS) {
        const u32 own = (u32)__cvta_generic_to_shared(sums + part);
        u32 there;
        asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(own), "r"(threadIdx.x));
        asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(there), "f"(v) : "memory");
    }
    __syncwarp();
    cluster_arrive();
    cluster_wait();
    v = 0.f;
#pragma unroll
    for (int p = 0; p < PARTS; p++) v += sums[p];
#endif
    return v;
}

// Bytes from a buffer's start to a token's row from `writer` in a set: float32 [3][RANKS][MAX_TOKENS][ROW]; in a mailbox, which
// is the writer's, [3][MAX_TOKENS][ROW].
__device__ __forceinline__ u64 row_of(int set, int writer, int token) {
    return 4ull * ROW * ((MAILBOX ? set : set * RANKS + writer) * MAX_TOKENS + token);
}
__device__ __forceinline__ bool here4(float4 v) { return here(v.x) & here(v.y) & here(v.z) & here(v.w); }

// A cluster a token. places: [RANKS] address of every rank's sets. turns: [MAX_TOKENS], and who gave up. partial [T][ROW], this rank's
// part of the sum; residual float32 [T][ROW], in place; post_weight null: no post norm; out [T][ROW]. Weights float32 [ROW].
extern "C" __global__ void __launch_bounds__(THREADS)
#if PARTS > 1
    __cluster_dims__(PARTS, 1, 1)
#endif
        reduce_add_norm(const u64* __restrict__ places, u32* turns, const void* partial, float* residual,
                        const float* __restrict__ post_weight, const float* __restrict__ weight, void* out, float eps, int rank,
                        int limit_ms) {
    __shared__ float scratch[2][32], sums[2][PARTS];
    cluster_arrive();  // waited for before the first store into another block's shared memory: then it has started
    let_next_kernel_start();
    const int token = blockIdx.x / PARTS, part = blockIdx.x % PARTS;
    const int stop = min(VECTORS, (part + 1) * PART), start = part * PART + threadIdx.x;
    const float4 none = make_float4(0.f, 0.f, 0.f, 0.f);
    // Neither addresses nor weights depend on the kernel before.
    u64 place[RANKS];
#pragma unroll
    for (int r = 0; r < RANKS; r++) place[r] = places[r];
    const u64 own = places[rank];
    float4 w[ITEMS], v[ITEMS], x[ITEMS];
#pragma unroll
    for (int i = 0; i < ITEMS; i++) {
        const int at = start + i * THREADS;
        w[i] = at < stop ? load4<FLOAT>(weight, 4 * at) : none;
    }
    wait_for_previous_kernel();

    const u32 turn = *(volatile u32*)(turns + token);
    const size_t row = (size_t)token * ROW;
#pragma unroll
    for (int i = 0; i < ITEMS; i++) {
        const int at = start + i * THREADS;
        v[i] = at < stop ? load4<PARTIAL_KIND>(partial, row + 4 * at) : none;
        x[i] = at < stop ? load4<FLOAT>(residual, row + 4 * at) : none;
    }
    const int set = turn % 3, old = (turn + 2) % 3;
#pragma unroll
    for (int i = 0; i < ITEMS; i++) {
        const int at = start + i * THREADS;
        v[i] = add4(v[i], none);  // -0.0 becomes +0.0
        if (at >= stop) continue;
#if MAILBOX
        put4(own + row_of(set, rank, token) + 16 * at, v[i]);
#else
#pragma unroll
        for (int r = 0; r < RANKS; r++)
            if (r != rank) put4(place[r] + row_of(set, rank, token) + 16 * at, v[i]);
#endif
    }
    const float nothing = __uint_as_float(NOTHING);
    const float4 nothings = make_float4(nothing, nothing, nothing, nothing);
#if !MAILBOX
#pragma unroll
    for (int i = 0; i < ITEMS; i++) {
        const int at = start + i * THREADS;
        if (at >= stop) continue;
#pragma unroll
        for (int r = 0; r < RANKS; r++)
            if (r != rank) put4(own + row_of(old, r, token) + 16 * at, nothings);
    }
#endif

    Patience patience;
    float post_squares = 0.f, all_squares = 0.f;
#pragma unroll
    for (int first = 0; first < ITEMS; first += TOGETHER) {
        float4 got[TOGETHER][RANKS];
        bool complete;
#if MAILBOX
#pragma unroll
        for (int g = 0; g < TOGETHER; g++)
#pragma unroll
            for (int r = 0; r < RANKS; r++) {
                const int i = min(first + g, ITEMS - 1), at = start + i * THREADS;
                got[g][r] = first + g < ITEMS && at < stop && r != rank ? nothings : v[i];
            }
#endif
        do {
            complete = true;
#pragma unroll
            for (int g = 0; g < TOGETHER; g++) {
                const int i = min(first + g, ITEMS - 1), at = start + i * THREADS;
#pragma unroll
                for (int r = 0; r < RANKS; r++) {
#if MAILBOX
                    // What has come is not fetched again over a slow link.
                    if (!here4(got[g][r])) got[g][r] = look4(place[r] + row_of(set, r, token) + 16 * at);
#else
                    got[g][r] = first + g < ITEMS && at < stop && r != rank ? look4(own + row_of(set, r, token) + 16 * at) : v[i];
#endif
                }
            }
#pragma unroll
            for (int g = 0; g < TOGETHER; g++)
#pragma unroll
                for (int r = 0; r < RANKS; r++) complete &= here4(got[g][r]);
            if (!complete && !patience.wait(limit_ms)) {
                atomicAdd(turns + MAX_TOKENS, 1u);
                complete = true;
            }
        } while (!complete);
#pragma unroll
        for (int g = 0; g < TOGETHER; g++) {
            const int i = min(first + g, ITEMS - 1);
            if (first + g >= ITEMS) continue;
            v[i] = got[g][0];
#pragma unroll
            for (int r = 1; r < RANKS; r++) v[i] = add4(v[i], got[g][r]);
            post_squares += squares(v[i]);
        }
    }
#if MAILBOX
#pragma unroll
    for (int i = 0; i < ITEMS; i++) {
        const int at = start + i * THREADS;
        if (at < stop) put4(own + row_of(old, rank, token) + 16 * at, nothings);
    }
#endif

    __syncwarp();
    cluster_wait();
    const float post = post_weight ? rsqrtf(token_sum(post_squares, part, scratch[0], sums[0]) / ROW + eps) : 1.f;
#pragma unroll
    for (int i = 0; i < ITEMS; i++) {
        const int at = start + i * THREADS;
        if (post_weight && at < stop) {
            const float4 f = load4<FLOAT>(post_weight, 4 * at);
            v[i] = make_float4(v[i].x * post * f.x, v[i].y * post * f.y, v[i].z * post * f.z, v[i].w * post * f.w);
        }
        x[i] = add4(x[i], v[i]);
        all_squares += squares(x[i]);
    }
    __syncwarp();
    const float inverse = rsqrtf(token_sum(all_squares, part, scratch[1], sums[1]) / ROW + eps);
#pragma unroll
    for (int i = 0; i < ITEMS; i++) {
        const int at = start + i * THREADS;
        if (at >= stop) continue;
        store4<FLOAT>(residual, row + 4 * at, x[i]);
        store4<X_KIND>(out, row + 4 * at, make_float4(x[i].x * inverse * w[i].x, x[i].y * inverse * w[i].y,
                                                      x[i].z * inverse * w[i].z, x[i].w * inverse * w[i].w));
    }
    // All blocks of the token have read the turn: they have met in the sum.
    if (part == 0 && threadIdx.x == 0) turns[token] = turn + 1;
}

#else
// ---- every rank's columns of a matrix, on all ranks ----
//
// Defines: NTHREADS, ITEMS (columns a thread), RANKS.

__device__ __forceinline__ void put(u64 address, float v) {
    asm volatile("st.relaxed.sys.global.f32 [%0], %1;" ::"l"(address), "f"(v) : "memory");
}
__device__ __forceinline__ float look(u64 address) {
    float v;
    asm volatile("ld.relaxed.sys.global.f32 %0, [%1];" : "=f"(v) : "l"(address) : "memory");
    return v;
}

// Block (b, t) has columns b * NTHREADS * ITEMS and on of token t. places: [RANKS] address of every rank's sets, each float32
// [3][max_tokens][columns], or in a mailbox [4][max_tokens][widest]. turns: [max_tokens][gridDim.x], and who gave up. local:
// float32 [T][size], which are columns first .. first + size of out, float32 [T][columns]. With mailboxes every rank has a
// column, and none more than `widest`; starts: [RANKS + 1], where every rank's columns begin, and their number.
extern "C" __global__ void __launch_bounds__(NTHREADS)
    gather_columns(const u64* __restrict__ places, u32* turns, const float* local, float* out,
#if MAILBOX
                   const int* __restrict__ starts, int widest,
#endif
                   int first, int size, int columns, int max_tokens, int rank, int limit_ms) {
    let_next_kernel_start();
    const int token = blockIdx.y, start = blockIdx.x * NTHREADS * ITEMS + threadIdx.x;
    u64 place[RANKS];
#pragma unroll
    for (int r = 0; r < RANKS; r++) place[r] = places[r];
    const u64 own = places[rank];
    wait_for_previous_kernel();

    u32* counter = turns + (size_t)token * gridDim.x + blockIdx.x;
    const u32 turn = *(volatile u32*)counter;
#if MAILBOX
    constexpr u32 SETS = 4;
    const int width = widest;
#else
    constexpr u32 SETS = 3;
    const int width = columns;
#endif
    const size_t set = 4 * ((size_t)(turn % SETS) * max_tokens + token) * width;
    const size_t old = 4 * ((size_t)((turn + 2) % SETS) * max_tokens + token) * width;
    float v[ITEMS];
    u64 source[ITEMS];  // of what others send
#pragma unroll
    for (int i = 0; i < ITEMS; i++) {
        const int at = start + i * NTHREADS;
        const bool mine = at >= first && at < first + size;
        v[i] = mine ? local[(size_t)token * size + at - first] + 0.f : 0.f;  // -0.0 becomes +0.0
        source[i] = own + set + 4ull * at;
        if (at >= columns) continue;
#if MAILBOX
        if (mine) {
            put(own + set + 4ull * (at - first), v[i]);
            put(own + old + 4ull * (at - first), __uint_as_float(NOTHING));
        }
#pragma unroll
        for (int r = 0; r < RANKS; r++)
            if (at >= starts[r] && at < starts[r + 1]) source[i] = place[r] + set + 4ull * (at - starts[r]);
#else
        if (!mine) {
            put(own + old + 4ull * at, __uint_as_float(NOTHING));
            continue;
        }
#pragma unroll
        for (int r = 0; r < RANKS; r++)
            if (r != rank) put(place[r] + set + 4ull * at, v[i]);
#endif
    }
    Patience patience;
    bool complete;
    do {
        complete = true;
#pragma unroll
        for (int i = 0; i < ITEMS; i++) {
            const int at = start + i * NTHREADS;
            if (at < columns && (at < first || at >= first + size)) v[i] = look(source[i]);
        }
#pragma unroll
        for (int i = 0; i < ITEMS; i++) complete &= here(v[i]);
        if (!complete && !patience.wait(limit_ms)) {
            atomicAdd(turns + (size_t)max_tokens * gridDim.x, 1u);
            complete = true;
        }
    } while (!complete);
#pragma unroll
    for (int i = 0; i < ITEMS; i++) {
        const int at = start + i * NTHREADS;
        if (at < columns) out[(size_t)token * columns + at] = v[i];
    }
    __syncthreads();  // everybody has read the turn
    if (threadIdx.x == 0) *counter = turn + 1;
}
#endif
