// Float weights, row-major as they are resident: matrix-vector products y[t, n] = sum_k W[n, k] x[t, k] for 1 to 8 tokens.
//
// One block a multiprocessor; a block owns a run of rows, taken eight at a time (a group). The unit of work is a group x
// CHUNK_BYTES of every row; the units of a block are dealt to its warps in even runs, so a group may be shared by several
// warps, which add up their parts in shared memory in warp order. Each warp runs a ring of bulk asynchronous copies
// (before Hopper: two sets of registers), filled before the wait for the kernel before, since weights do not depend on it.
// Activations lie in shared memory, all of them or, where they do not fit, a panel of columns after the other.
// Tensor cores multiply where both sides have the same 16-bit type (mma.m16n8k16, tokens as A, eight rows of weights as
// B); other pairs of types are converted to float32 in registers. Sums are float32 throughout. The lane-to-element maps of
// mma fragments are those of the PTX ISA manual, section "Matrix multiply-accumulate"; which column is which k of a
// product does not matter as long as both sides agree, so a lane's fragments are 16 consecutive bytes.

// No header is included, so that NVRTC needs none on the user's machine.
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

enum Kind { HALF = 0, BFLOAT = 1, FLOAT = 2 };
#ifndef WEIGHT_KIND
#define WEIGHT_KIND 1
#endif
#ifndef INPUT_KIND
#define INPUT_KIND 1
#endif
#ifndef MAX_TOKENS  // bound of the tokens of a launch: sizes the registers without tensor cores
#define MAX_TOKENS 8
#endif
#ifndef NWARPS
#define NWARPS 16
#endif
#ifndef NSTAGES
#define NSTAGES 2
#endif
#ifndef CHUNK_BYTES
#define CHUNK_BYTES 512
#endif

#define HAS_BULK (__CUDA_ARCH__ >= 900)
#ifndef RING
#define RING HAS_BULK
#endif
#ifndef BLOCKS_PER_SM  // two: the next kernel's blocks fill their rings beside the ones that still run
#define BLOCKS_PER_SM (RING ? 2 : 1)
#endif
#define USE_MMA (__CUDA_ARCH__ >= 800 && WEIGHT_KIND == INPUT_KIND)

constexpr int WARPS = NWARPS, THREADS = 32 * WARPS, STAGES = NSTAGES, ROWS = 8;
constexpr int WEIGHT_BYTES = WEIGHT_KIND == FLOAT ? 4 : 2;
constexpr int PER_LOAD = 16 / WEIGHT_BYTES;         // weights in 16 bytes
constexpr int STEP = 4 * PER_LOAD;                  // columns that a warp's load takes of each of eight rows
constexpr int CHUNK = CHUNK_BYTES / WEIGHT_BYTES;   // columns of a unit
constexpr int STEPS = CHUNK / STEP;
constexpr int PITCH = CHUNK_BYTES + 64;             // two neighbouring rows take different halves of the banks
constexpr int STAGE_BYTES = ROWS * PITCH;
constexpr int INPUT_PAD = 64;                       // the same for neighbouring tokens
constexpr int SLOT = 8 * ROWS;                      // sums of a group: [8 tokens][8 rows]

__device__ __forceinline__ float half_to_float(u16 h) {
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h));
    return f;
}
template <int KIND>
__device__ __forceinline__ float unpack(u32 w, int i) {  // the i-th of two numbers
    if (KIND == BFLOAT) return __uint_as_float(i ? w & 0xffff0000u : w << 16);
    return half_to_float((u16)(w >> (16 * i)));
}
template <int KIND>
__device__ __forceinline__ u16 pack(float v) {
    u16 r;
    if (KIND == BFLOAT) {
        const u32 b = __float_as_uint(v);
        r = (b & 0x7fffffff) > 0x7f800000 ? 0x7fff : (u16)((b + 0x7fff + ((b >> 16) & 1)) >> 16);
    } else {
        asm("cvt.rn.f16.f32 %0, %1;" : "=h"(r) : "f"(v));
    }
    return r;
}
template <int KIND>
__device__ __forceinline__ float load_one(const u8* p, long long i) {
    if (KIND == FLOAT) return ((const float*)p)[i];
    return unpack<KIND>(((const u16*)p)[i], 0);
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

__device__ __forceinline__ void store_result(void* y, size_t at, float v, int float_out) {
    if (float_out) ((float*)y)[at] = v;
    else ((u16*)y)[at] = pack<INPUT_KIND>(v);
}

__device__ __forceinline__ void barrier_init(u64* bar) {
#if HAS_BULK
    asm volatile("mbarrier.init.shared.b64 [%0], 1;" ::"r"(shared_address(bar)) : "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}
__device__ __forceinline__ void barrier_expect(u64* bar, int bytes) {
#if HAS_BULK
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(shared_address(bar)), "r"(bytes) : "memory");
#endif
}
__device__ __forceinline__ void barrier_wait(u64* bar, u32 parity) {
#if HAS_BULK
    asm volatile(
        "{\n .reg .pred p;\n again:\n mbarrier.try_wait.parity.shared.b64 p, [%0], %1;\n @p bra done;\n bra again;\n done:\n }" ::"r"(
            shared_address(bar)),
        "r"(parity)
        : "memory");
#endif
}
__device__ __forceinline__ void copy_in_bulk(u8* to, const u8* from, int bytes, u64* bar) {
#if HAS_BULK
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(shared_address(to)), "l"(from),
                 "r"(bytes), "r"(shared_address(bar))
                 : "memory");
#endif
}

// ---- which units a warp works on ----

struct Problem {
    const u8* w;       // the block's first row
    long long stride;  // bytes from row to row
    int rows, groups;  // of the block
    int columns, panel, panels;  // columns in all, columns of a panel (whole chunks), panels
    __device__ __forceinline__ int chunks(int p) const {
        const int left = columns - p * panel;
        return ((left < panel ? left : panel) + CHUNK - 1) / CHUNK;
    }
    __device__ __forceinline__ int first_unit(int warp, int total) const { return (int)((long long)total * warp / WARPS); }
};

// Walks a warp's units: panel by panel, within a panel group by group, within a group chunk by chunk.
struct Cursor {
    int panel, left, group, chunk, chunks;
    __device__ __forceinline__ void enter(const Problem& m, int p, int warp) {
        for (left = 0, panel = p; panel < m.panels; panel++) {
            chunks = m.chunks(panel);
            const int total = m.groups * chunks, first = m.first_unit(warp, total);
            left = m.first_unit(warp + 1, total) - first;
            group = first / chunks;
            chunk = first - group * chunks;
            if (left) return;
        }
    }
    __device__ __forceinline__ bool ended() const { return left == 0; }
    __device__ __forceinline__ void next(const Problem& m, int warp) {
        if (--left == 0) {
            enter(m, panel + 1, warp);
        } else if (++chunk == chunks) {
            chunk = 0;
            group++;
        }
    }
    __device__ __forceinline__ int column(const Problem& m) const { return panel * m.panel + chunk * CHUNK; }
};

// ---- turns ----
//
// A block that shares its multiprocessor with one of the kernel before could fill its ring at once, but then the memory would
// have nothing to do while that kernel ends and this one waits for its result. So a block fills its ring when the blocks before
// it on the same multiprocessor have asked for all their weights: turns[2 i] counts the warps that began on multiprocessor i,
// turns[2 i + 1] those that have asked for everything. They only time the copies: results do not depend on them, a block
// waits for earlier ones alone, and not for long.

constexpr int MAX_MULTIPROCESSORS = 512;

__device__ __forceinline__ u32* my_turns(u32* turns) {
    u32 i;
    asm volatile("mov.u32 %0, %%smid;" : "=r"(i));
    return turns + 2 * (i % MAX_MULTIPROCESSORS);
}
__device__ __forceinline__ void wait_for_turn(u32* turns) {
#if HAS_BULK
    const u32 ticket = atomicAdd(turns, WARPS);
    for (int i = 0; i < 10000; i++) {
        u32 asked;
        asm volatile("ld.relaxed.gpu.u32 %0, [%1];" : "=r"(asked) : "l"(turns + 1) : "memory");
        if ((int)(asked - ticket) >= 0) return;
        asm volatile("nanosleep.u32 40;");
    }
#endif
}

// ---- weights on their way: a ring in shared memory, or two sets of registers ----

struct Ring {
    u8* stages;
    u64* bars;
    int stage;
    u32 parity;
    __device__ __forceinline__ void init(u8* shared, int warp, int lane) {
        stages = shared + (size_t)warp * STAGES * STAGE_BYTES;
        bars = (u64*)(shared + (size_t)WARPS * STAGES * STAGE_BYTES) + warp * STAGES;
        stage = 0;
        parity = 0;
        if (lane == 0)
            for (int s = 0; s < STAGES; s++) barrier_init(bars + s);
        __syncwarp();
    }
    __device__ __forceinline__ void fill(int s, const Problem& m, const Cursor& at, int lane) {
        const int rows = min(ROWS, m.rows - at.group * ROWS), column = at.column(m);
        const int bytes = min(CHUNK, m.columns - column) * WEIGHT_BYTES;
        if (lane == 0) barrier_expect(bars + s, rows * bytes);
        __syncwarp();
        if (lane < rows)
            copy_in_bulk(stages + s * STAGE_BYTES + lane * PITCH, m.w + (at.group * ROWS + lane) * m.stride + (long long)column * WEIGHT_BYTES, bytes,
                         bars + s);
    }
    __device__ __forceinline__ void wait() { barrier_wait(bars + stage, parity); }
    __device__ __forceinline__ void advance() {
        if (++stage == STAGES) {
            stage = 0;
            parity ^= 1;
        }
    }
};

__device__ __forceinline__ uint4 load_global(const u8* p) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
    return v;
}
__device__ __forceinline__ void load_unit(uint4 (&v)[STEPS], const Problem& m, const Cursor& at, int lane) {
    const int g = lane >> 2, c = lane & 3, column = at.column(m) + c * PER_LOAD, row = at.group * ROWS + g;
    const u8* from = m.w + row * m.stride + (long long)column * WEIGHT_BYTES;
#pragma unroll
    for (int s = 0; s < STEPS; s++) {
        v[s] = make_uint4(0, 0, 0, 0);
        if (row < m.rows && column + s * STEP < m.columns) v[s] = load_global(from + s * 64);
    }
}

// ---- products ----

constexpr int LANE_INPUT = PER_LOAD * 2;  // bytes of x that meet 16 bytes of weights
constexpr int STEP_INPUT = 4 * LANE_INPUT;

#if USE_MMA
struct Sums {
    float d[2][4];
    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int i = 0; i < 4; i++) d[0][i] = d[1][i] = 0.f;
    }
    static __device__ __forceinline__ void mma(float (&d)[4], u32 a0, u32 a2, u32 b0, u32 b1) {
#if WEIGHT_KIND == 1
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3},{%4,%5,%6,%5},{%7,%8},{%0,%1,%2,%3};"
#else
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5,%6,%5},{%7,%8},{%0,%1,%2,%3};"
#endif
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                     : "r"(a0), "r"(0), "r"(a2), "r"(b0), "r"(b1));
    }
    // Where a lane's activations begin: its token's and its columns'.
    static __device__ __forceinline__ const u8* inputs(const u8* x, int pitch, int lane) { return x + (lane >> 2) * pitch + (lane & 3) * LANE_INPUT; }
    __device__ __forceinline__ void add(const uint4& w, const u8* x, int, int tokens, int lane) {
        uint4 a = make_uint4(0, 0, 0, 0);
        if ((lane >> 2) < tokens) a = *(const uint4*)x;
        mma(d[0], a.x, a.y, w.x, w.y);
        mma(d[1], a.z, a.w, w.z, w.w);
    }
    // Element [token][row] of the group; `pitch` floats from token to token.
    __device__ __forceinline__ void store(float* to, int pitch, int tokens, int lane, bool add) {
        const int g = lane >> 2, c = lane & 3;
        if (g >= tokens) return;
        float* at = to + g * pitch + 2 * c;
        at[0] = (add ? at[0] : 0.f) + (d[0][0] + d[1][0]);
        at[1] = (add ? at[1] : 0.f) + (d[0][1] + d[1][1]);
    }
};
#else
struct Sums {
    float d[MAX_TOKENS];
    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int t = 0; t < MAX_TOKENS; t++) d[t] = 0.f;
    }
    static __device__ __forceinline__ const u8* inputs(const u8* x, int, int lane) { return x + (lane & 3) * LANE_INPUT; }
    __device__ __forceinline__ void add(const uint4& w, const u8* x, int pitch, int tokens, int) {
        const u32 words[4] = {w.x, w.y, w.z, w.w};
        float v[PER_LOAD];
#pragma unroll
        for (int i = 0; i < PER_LOAD; i++) v[i] = WEIGHT_KIND == FLOAT ? __uint_as_float(words[i % 4]) : unpack<WEIGHT_KIND>(words[(i >> 1) % 4], i & 1);
#pragma unroll
        for (int t = 0; t < MAX_TOKENS; t++) {
            if (t >= tokens) break;
#pragma unroll
            for (int i = 0; i < PER_LOAD; i += 2) {
                const u32 pair = *(const u32*)(x + t * pitch + i * 2);
                d[t] += v[i] * unpack<INPUT_KIND>(pair, 0);
                d[t] += v[i + 1] * unpack<INPUT_KIND>(pair, 1);
            }
        }
    }
    __device__ __forceinline__ void store(float* to, int pitch, int tokens, int lane, bool add) {
#pragma unroll
        for (int t = 0; t < MAX_TOKENS; t++) {
            float v = d[t];
            v += __shfl_xor_sync(0xffffffff, v, 1);
            v += __shfl_xor_sync(0xffffffff, v, 2);
            float* at = to + t * pitch + (lane >> 2);
            if (t < tokens && (lane & 3) == 0) *at = (add ? *at : 0.f) + v;
        }
    }
};
#endif

// One panel of x [tokens][columns] to shared memory, `pitch` bytes from token to token; zeros to the end of the last step.
__device__ __forceinline__ void load_inputs(const u8* __restrict__ x, const Problem& m, int p, int tokens, int pitch, u8* to, u64* bar) {
    const int first = p * m.panel, columns = min(m.panel, m.columns - first), end = (columns + STEP - 1) / STEP * STEP;
#if RING
    if (threadIdx.x < tokens)  // disjoint from the copy's bytes
        for (int k = columns; k < end; k += 4) *(u64*)(to + threadIdx.x * pitch + k * 2) = 0;
    if (threadIdx.x == 0) {
        asm volatile("fence.proxy.async;" ::: "memory");
        barrier_expect(bar, tokens * columns * 2);
        for (int t = 0; t < tokens; t++) copy_in_bulk(to + t * pitch, x + ((size_t)t * m.columns + first) * 2, columns * 2, bar);
    }
    if (columns < end || p) __syncthreads();
    barrier_wait(bar, p & 1);
#else
    for (int t = 0; t < tokens; t++)
#pragma unroll 4
        for (int k = threadIdx.x * 8; k < end; k += THREADS * 8) {
            uint4 v = make_uint4(0, 0, 0, 0);
            if (k < columns) v = *(const uint4*)(x + ((size_t)t * m.columns + first + k) * 2);
            *(uint4*)(to + t * pitch + k * 2) = v;
        }
    __syncthreads();
#endif
}

// The groups of a panel that several warps share: the warp that has the group's first chunk adds up the parts. A warp's
// first part lies in slot 0, its last in slot 1, where they are two.
__device__ __forceinline__ void combine(const Problem& m, int p, int tokens, int warp, int lane, const float* slots, float* sums, int pitch) {
    const int chunks = m.chunks(p), total = m.groups * chunks;
    const int first = m.first_unit(warp, total), end = m.first_unit(warp + 1, total);
    if (first == end) return;
    const int group = (end - 1) / chunks, start = group * chunks, stop = start + chunks;
    if (start < first || end == stop || (lane >> 2) >= tokens) return;
    float2 v = *(const float2*)(slots + (size_t)(warp * 2 + (start > first)) * SLOT + lane * 2);
    for (int other = warp + 1; other < WARPS; other++) {
        const int from = m.first_unit(other, total);
        if (from >= stop) break;
        if (from == m.first_unit(other + 1, total)) continue;
        const float2 part = *(const float2*)(slots + (size_t)other * 2 * SLOT + lane * 2);
        v.x += part.x;
        v.y += part.y;
    }
    float* to = sums + (lane >> 2) * pitch + group * ROWS + 2 * (lane & 3);
    to[0] = (p ? to[0] : 0.f) + v.x;
    to[1] = (p ? to[1] : 0.f) + v.y;
}

// w [rows][stride] (columns <= stride, 16-byte aligned rows), x [tokens][columns], y [tokens][rows] in x's type or float32.
// turns: zeros at first, two counters for each of MAX_MULTIPROCESSORS; one array for a device.
// panel: columns of x that shared memory holds at a time, a multiple of CHUNK.
// Dynamic shared memory: ring, its barriers and two more, slots [WARPS][2][SLOT], x [tokens][panel] with INPUT_PAD bytes after each
// token, sums [tokens][rows of a block up to a multiple of 8].
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_PER_SM)
gemv(const u8* __restrict__ w, const u8* __restrict__ x, void* __restrict__ y, int rows, int columns, int stride, int tokens, int panel,
     int float_out, u32* turns) {
    extern __shared__ __align__(128) u8 shared[];
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    const int first_row = (int)((long long)rows * blockIdx.x / gridDim.x);
    Problem m;
    m.stride = (long long)stride * WEIGHT_BYTES;
    m.w = w + first_row * m.stride;
    m.rows = (int)((long long)rows * (blockIdx.x + 1) / gridDim.x) - first_row;
    m.groups = (m.rows + ROWS - 1) / ROWS;
    m.columns = columns;
    m.panel = panel;
    m.panels = (columns + panel - 1) / panel;
    const int pitch = ((rows + gridDim.x - 1) / gridDim.x + ROWS - 1) / ROWS * ROWS;
    u64* input_bar = (u64*)(shared + (RING ? (size_t)WARPS * STAGES * (STAGE_BYTES + 8) : 0));
    float* slots = (float*)(input_bar + 2);
    const int input_pitch = panel * 2 + INPUT_PAD;
    u8* inputs = (u8*)(slots + WARPS * 2 * SLOT);
    float* sums = (float*)(inputs + (size_t)tokens * input_pitch);

    Cursor at;
    at.enter(m, 0, warp);
#if RING
    Cursor ahead = at;
    Ring ring;
    ring.init(shared, warp, lane);
    let_next_kernel_start();
    turns = my_turns(turns);
    if (threadIdx.x == 0) {
        barrier_init(input_bar);
        wait_for_turn(turns);
    }
    __syncthreads();
    for (int s = 0; s < STAGES && !ahead.ended(); s++) {
        ring.fill(s, m, ahead, lane);
        ahead.next(m, warp);
    }
    if (ahead.ended() && lane == 0) atomicAdd(turns + 1, 1);
#else
    let_next_kernel_start();
    uint4 unit[STEPS], coming[STEPS];
    if (!at.ended()) load_unit(unit, m, at, lane);
#endif
    wait_for_previous_kernel();

    Sums acc;
    const u8* lane_inputs = Sums::inputs(inputs, input_pitch, lane);
    for (int p = 0; p < m.panels; p++) {
        load_inputs(x, m, p, tokens, input_pitch, inputs, input_bar);
        acc.clear();
        bool whole = at.chunk == 0, head = true;
        while (!at.ended() && at.panel == p) {
            const int left = columns - at.column(m);
            const u8* from = lane_inputs + at.chunk * STEPS * STEP_INPUT;
            const Cursor now = at;
            at.next(m, warp);
#if RING
            ring.wait();
            const u8* weights = ring.stages + ring.stage * STAGE_BYTES + (lane >> 2) * PITCH + (lane & 3) * 16;
            if (left >= CHUNK) {
#pragma unroll
                for (int s = 0; s < STEPS; s++)
                    acc.add(*(const uint4*)(weights + s * 64), from + s * STEP_INPUT, input_pitch, tokens, lane);
            } else {
                for (int s = 0; s * STEP < left; s++) {
                    uint4 v = make_uint4(0, 0, 0, 0);  // the ring's old bytes may be no numbers
                    if (s * STEP + (lane & 3) * PER_LOAD < left) v = *(const uint4*)(weights + s * 64);
                    acc.add(v, from + s * STEP_INPUT, input_pitch, tokens, lane);
                }
            }
            __syncwarp();
            if (!ahead.ended()) {
                ring.fill(ring.stage, m, ahead, lane);
                ahead.next(m, warp);
                if (ahead.ended() && lane == 0) atomicAdd(turns + 1, 1);
            }
            ring.advance();
#else
            if (!at.ended()) load_unit(coming, m, at, lane);
#pragma unroll
            for (int s = 0; s < STEPS; s++)
                if (s * STEP < left) acc.add(unit[s], from + s * STEP_INPUT, input_pitch, tokens, lane);
#pragma unroll
            for (int s = 0; s < STEPS; s++) unit[s] = coming[s];
#endif
            const bool last = at.ended() || at.panel != p, complete = now.chunk + 1 == now.chunks;
            if (last || complete) {
                if (whole && complete) acc.store(sums + now.group * ROWS, pitch, tokens, lane, p > 0);
                else acc.store(slots + (size_t)(warp * 2 + !head) * SLOT, ROWS, tokens, lane, false);
                acc.clear();
                whole = true;
                head = false;
            }
        }
        __syncthreads();
        combine(m, p, tokens, warp, lane, slots, sums, pitch);
    }
    __syncthreads();
    for (int t = 0; t < tokens; t++)
        for (int r = threadIdx.x; r < m.rows; r += THREADS)
            store_result(y, (size_t)t * rows + first_row + r, sums[t * pitch + r], float_out);
}

// The same for any stride, alignment and number of columns: a warp a row, a number at a time.
extern "C" __global__ void __launch_bounds__(256)
gemv_any(const u8* __restrict__ w, const u8* __restrict__ x, void* __restrict__ y, int rows, int columns, int stride, int tokens, int float_out) {
    let_next_kernel_start();
    wait_for_previous_kernel();
    const int row = blockIdx.x * 8 + (threadIdx.x >> 5), lane = threadIdx.x & 31;
    if (row >= rows) return;
    float acc[MAX_TOKENS];
#pragma unroll
    for (int t = 0; t < MAX_TOKENS; t++) acc[t] = 0.f;
    for (int k = lane; k < columns; k += 32) {
        const float v = load_one<WEIGHT_KIND>(w, (long long)row * stride + k);
#pragma unroll
        for (int t = 0; t < MAX_TOKENS; t++)
            if (t < tokens) acc[t] += v * load_one<INPUT_KIND>(x, (long long)t * columns + k);
    }
#pragma unroll
    for (int t = 0; t < MAX_TOKENS; t++) {
#pragma unroll
        for (int o = 16; o; o >>= 1) acc[t] += __shfl_xor_sync(0xffffffff, acc[t], o);
        if (t < tokens && lane == 0) store_result(y, (size_t)t * rows + row, acc[t], float_out);
    }
}
