// CUDA C++ on a CPU: as much of it as the kernels here use. A thread is a coroutine; blocks, and launches of several ranks,
// run beside each other at speeds that differ and change (from a seed), so that whoever does not wait for what he needs is
// found out. Memory is one and in order: what a missing fence would do on a GPU does not show.
#include <csetjmp>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <sys/mman.h>
#include <ucontext.h>
#include <vector>

#define __CUDA_ARCH__ 900
#define __device__
#define __global__
#define __forceinline__ inline
#define __restrict__
#define __launch_bounds__(...)

struct uint2 { unsigned x, y; };
struct uint4 { unsigned x, y, z, w; };
struct float2 { float x, y; };
struct float4 { float x, y, z, w; };
struct Index { unsigned x, y, z; };
static inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
static inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
static inline float2 make_float2(float x, float y) { return {x, y}; }
static inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
static Index threadIdx, blockIdx, blockDim, gridDim;

template <class T> static inline T min(T a, T b) { return a < b ? a : b; }
template <class T> static inline T max(T a, T b) { return a > b ? a : b; }
template <class To, class From> static inline To bits(From from) {
    static_assert(sizeof(To) == sizeof(From), "as many bits");
    To to;
    memcpy(&to, &from, sizeof to);
    return to;
}
static inline unsigned __float_as_uint(float f) { return bits<unsigned>(f); }
static inline float __uint_as_float(unsigned u) { return bits<float>(u); }
static inline float __int_as_float(int i) { return bits<float>(i); }
static inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
static inline float __fmul_rn(float a, float b) { return a * b; }
static inline float __fadd_rn(float a, float b) { return a + b; }
static inline int __float2int_rn(float a) { return (int)rintf(a); }
static inline float fast_exp(float a) { return expf(a); }
#define __expf fast_exp  // glibc has one of that name
static inline float rsqrtf(float v) { return 1.f / sqrtf(v); }
static inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
    const unsigned long long both = ((unsigned long long)b << 32) | a;
    unsigned result = 0;
    for (int i = 0; i < 4; i++) result |= (unsigned)((both >> (8 * ((selector >> (4 * i)) & 7))) & 255) << (8 * i);
    return result;
}
template <class T> static inline void __stcg(T* at, T v) { *at = v; }
template <class T> static inline T __ldcg(const T* at) { return *at; }
static inline float half_bits_to_float(unsigned short h) { return (float)bits<_Float16>(h); }
static inline unsigned short float_to_half_bits(float f) { return bits<unsigned short>((_Float16)f); }
static inline unsigned short float_to_bfloat_bits(float f) {
    const unsigned b = bits<unsigned>(f);
    return f != f ? 0x7fff : (unsigned short)((b + 0x7fff + ((b >> 16) & 1)) >> 16);
}
static inline size_t __cvta_generic_to_shared(const void* p) { return (size_t)p; }
static inline void* at_shared(unsigned address) { return (void*)(size_t)address; }

// ---- threads ----

struct Barrier {
    int come = 0;
    unsigned turn = 0;
};
struct Block {
    Index at, grid, dim;
    size_t size;
    unsigned char* shared;  // where 32 bits are address enough, as on a GPU
    Barrier warps[32], all;
    std::map<unsigned, Barrier> lanes[32];  // of some lanes of a warp, by their mask
    std::map<int, std::unique_ptr<char[]>> fixed;  // arrays of a size known beforehand, by their number in the source
    unsigned exchange[32][32], fragments[32][32][6];
    explicit Block(size_t bytes) : size(bytes ? bytes : 1) {
        static size_t wish = 0x10000000;
        for (int tries = 0; tries < 1000; tries++) {
            shared = (unsigned char*)mmap((void*)wish, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
            wish = wish > 0x70000000 ? 0x10000000 : wish + ((size + 0xffff) & ~(size_t)0xffff);
            if (shared != MAP_FAILED && (size_t)shared + size < 0x100000000) break;
            if (shared != MAP_FAILED) munmap(shared, size);
            shared = nullptr;
        }
        if (!shared) {
            fprintf(stderr, "no memory whose addresses have 32 bits\n");
            abort();
        }
        memset(shared, 0xff, size);  // not a number, whoever reads it as one
    }
    ~Block() { munmap(shared, size); }
    void* array(int number, size_t bytes) {
        if (!fixed[number]) {
            fixed[number].reset(new char[bytes]);
            memset(fixed[number].get(), 0xff, bytes);
        }
        return fixed[number].get();
    }
    Block(const Block&) = delete;
};
struct Thread {
    jmp_buf here;
    std::unique_ptr<char[]> stack;
    bool begun = false, done = false;
    unsigned index;
    Block* block;
    const std::function<void()>* kernel;
};
constexpr size_t STACK = 1 << 16;
static jmp_buf scheduler;
static Thread* running;
static long progress;  // of anybody: grows with whatever another may wait for

static void pause_() {
    Thread* me = running;
    if (!_setjmp(me->here)) _longjmp(scheduler, 1);
}
static void begin_() {
    (*running->kernel)();
    running->done = true;
    progress++;
    _longjmp(scheduler, 1);
}
static void resume(Thread* thread) {
    running = thread;
    Block* b = thread->block;
    threadIdx = {thread->index, 0, 0};
    blockIdx = b->at, gridDim = b->grid, blockDim = b->dim;
    if (_setjmp(scheduler)) return;
    if (thread->begun) _longjmp(thread->here, 1);
    thread->begun = true;
    ucontext_t fresh;
    getcontext(&fresh);
    thread->stack.reset(new char[STACK]);
    fresh.uc_stack.ss_sp = thread->stack.get();
    fresh.uc_stack.ss_size = STACK;
    fresh.uc_link = nullptr;
    makecontext(&fresh, begin_, 0);
    setcontext(&fresh);
}
static void meet(Barrier& barrier, int all) {
    progress++;
    if (++barrier.come == all) {
        barrier.come = 0;
        barrier.turn++;
        return;
    }
    for (const unsigned turn = barrier.turn; barrier.turn == turn;) pause_();
}
static inline void __syncwarp() { meet(running->block->warps[threadIdx.x >> 5], 32); }
static inline void __syncthreads() { meet(running->block->all, running->block->dim.x); }
static inline void __nanosleep(int) { pause_(); }
static inline void __threadfence() {}
static inline void __threadfence_block() {}
static inline unsigned exchanged(unsigned v, int source) {
    unsigned* lanes = running->block->exchange[threadIdx.x >> 5];
    lanes[threadIdx.x & 31] = v;
    __syncwarp();
    const unsigned found = lanes[source];
    __syncwarp();
    return found;
}
template <class T> static inline T __shfl_xor_sync(unsigned together, T v, int mask) {
    const int source = (threadIdx.x & 31) ^ mask;
    if (together == 0xffffffffu) return bits<T>(exchanged(bits<unsigned>(v), source));
    Barrier& barrier = running->block->lanes[threadIdx.x >> 5][together];
    unsigned* lanes = running->block->exchange[threadIdx.x >> 5];
    meet(barrier, __builtin_popcount(together));
    lanes[threadIdx.x & 31] = bits<unsigned>(v);
    meet(barrier, __builtin_popcount(together));
    return bits<T>(lanes[source]);
}
static inline unsigned __ballot_sync(unsigned, int yes) {
    unsigned found = 0;
    for (int i = 0; i < 32; i++) found |= (unsigned)(exchanged(yes != 0, i) != 0) << i;
    return found;
}
static inline int __any_sync(unsigned all, int yes) { return __ballot_sync(all, yes) != 0; }
static inline int __ffs(unsigned v) { return __builtin_ffs((int)v); }
static inline unsigned long long __shfl_xor_sync(unsigned all, unsigned long long v, int mask) {
    const unsigned low = __shfl_xor_sync(all, (unsigned)v, mask), high = __shfl_xor_sync(all, (unsigned)(v >> 32), mask);
    return (unsigned long long)high << 32 | low;
}
static inline unsigned long long __shfl_up_sync(unsigned, unsigned long long v, int by) {
    const int lane = threadIdx.x & 31, source = lane < by ? lane : lane - by;
    const unsigned low = exchanged((unsigned)v, source), high = exchanged((unsigned)(v >> 32), source);
    return (unsigned long long)high << 32 | low;
}
template <class T> static inline T __shfl_sync(unsigned, T v, int source) { return bits<T>(exchanged(bits<unsigned>(v), source)); }
static inline unsigned __reduce_add_sync(unsigned, unsigned v) {
    unsigned total = 0;
    for (int i = 0; i < 32; i++) total += exchanged(v, i);
    return total;
}
static inline unsigned __reduce_max_sync(unsigned, unsigned v) {
    unsigned most = 0;
    for (int i = 0; i < 32; i++) most = max(most, exchanged(v, i));
    return most;
}
template <class T, class V> static inline T atomicAdd(T* at, V v) {
    const T before = *at;
    *at += (T)v;
    progress++;
    return before;
}
template <class T> static inline T atomicExch(T* at, T v) {
    const T before = *at;
    *at = v;
    progress++;
    return before;
}
static inline unsigned atomicInc(unsigned* at, unsigned most) { return atomicExch(at, *at >= most ? 0 : *at + 1); }
static inline unsigned atomicOr(unsigned* at, unsigned v) { return atomicExch(at, *at | v); }
template <class T> static inline T atomicMax(T* at, T v) { return atomicExch(at, max(*at, v)); }

// D += A B by the fragment maps of m16n8k32 with int8; m16n8k16 is its first half.
static inline void multiply_add(int* d, unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
    const int lane = threadIdx.x & 31, g = lane >> 2, c = lane & 3;
    auto* all = running->block->fragments[threadIdx.x >> 5];
    const unsigned mine[6] = {a0, a1, a2, a3, b0, b1};
    memcpy(all[lane], mine, sizeof mine);
    __syncwarp();
    for (int e = 0; e < 4; e++) {
        const int row = g + 8 * (e >> 1), column = 2 * c + (e & 1);
        for (int k = 0; k < 32; k++) {
            const int owner = (k & 15) >> 2, shift = 8 * (k & 3), high = k >> 4;
            const int a = (signed char)(all[(row & 7) * 4 + owner][(row >> 3) + 2 * high] >> shift);
            d[e] += a * (signed char)(all[column * 4 + owner][4 + high] >> shift);
        }
    }
    __syncwarp();
}

static inline float bfloat_bits_to_float(unsigned short b) { return bits<float>((unsigned)b << 16); }
// The same of m16n8k16 with numbers of 16 bits.
template <bool BFLOAT_NUMBERS>
static inline void multiply_add(float* d, unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
    const int lane = threadIdx.x & 31, g = lane >> 2, c = lane & 3;
    auto* all = running->block->fragments[threadIdx.x >> 5];
    const unsigned mine[6] = {a0, a1, a2, a3, b0, b1};
    memcpy(all[lane], mine, sizeof mine);
    __syncwarp();
    auto number = [](unsigned word, int half) {
        const unsigned short w = (unsigned short)(word >> (16 * half));
        return BFLOAT_NUMBERS ? bfloat_bits_to_float(w) : half_bits_to_float(w);
    };
    for (int e = 0; e < 4; e++) {
        const int row = g + 8 * (e >> 1), column = 2 * c + (e & 1);
        double sum = d[e];
        for (int k = 0; k < 16; k++) {
            const int owner = (k & 7) >> 1, high = k >> 3;
            sum += (double)number(all[(row & 7) * 4 + owner][(row >> 3) + 2 * high], k & 1) * number(all[column * 4 + owner][4 + high], k & 1);
        }
        d[e] = (float)sum;
    }
    __syncwarp();
}
// wgmma with A in registers: a warp's 16 rows of 64, tiles of eight tokens whose numbers lie as the descriptor `where` says
// (no swizzling). At once, where a GPU goes on behind the program's back.
static inline void wide_multiply_add(float** d, int tiles, unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned long long where, int keep) {
    const size_t base = (size_t)running->block->shared, low = (where & 0x3fff) << 4;
    size_t at = (base & ~(size_t)0x3ffff) | low;
    if (at < base) at += 0x40000;
    const size_t leading = ((where >> 16) & 0x3fff) << 4, stride = ((where >> 32) & 0x3fff) << 4;
    const int lane = threadIdx.x & 31, g = lane >> 2, c = lane & 3;
    for (int n = 0; n < tiles; n++) {
        const unsigned char* row = (const unsigned char*)at + n * stride + g * 16 + c * 4;
        float four[4];
        for (int e = 0; e < 4; e++) four[e] = keep ? *d[n * 4 + e] : 0.f;
        multiply_add<false>(four, a0, a1, a2, a3, *(const unsigned*)row, *(const unsigned*)(row + leading));
        for (int e = 0; e < 4; e++) *d[n * 4 + e] = four[e];
    }
}
// movmatrix: lane l has numbers 2 (l % 4) and the next of row l / 4 of eight.
static inline unsigned transposed(unsigned v) {
    auto* all = running->block->fragments[threadIdx.x >> 5];
    const int lane = threadIdx.x & 31, row = lane >> 2, column = 2 * (lane & 3);
    all[lane][0] = v;
    __syncwarp();
    unsigned result = 0;
    for (int i = 0; i < 2; i++) result |= ((all[(column + i) * 4 + row / 2][0] >> (16 * (row & 1))) & 0xffff) << (16 * i);
    __syncwarp();
    return result;
}
template <class Operation>
static inline unsigned both_halves(unsigned a, unsigned b, unsigned c, Operation operation) {
    unsigned result = 0;
    for (int i = 0; i < 2; i++) {
        auto half = [i](unsigned w) { return (double)half_bits_to_float((unsigned short)(w >> (16 * i))); };
        result |= (unsigned)bits<unsigned short>((_Float16)operation(half(a), half(b), half(c))) << (16 * i);
    }
    return result;
}

// ---- barriers of asynchronous copies: eight bytes of shared memory ----

struct CopyBarrier {
    unsigned char phase, all;
    short missing;
    int bytes;
};
static_assert(sizeof(CopyBarrier) == 8, "as on the device");
static inline void settle_(CopyBarrier* b) {
    progress++;
    if (b->missing < 0) abort();
    if (b->missing || b->bytes) return;
    b->phase ^= 1;
    b->missing = b->all;
}
static inline void copy_barrier_init(void* at, int all) { *(CopyBarrier*)at = {0, (unsigned char)all, (short)all, 0}; }
static inline void copy_expect(void* at, unsigned bytes) {
    CopyBarrier* b = (CopyBarrier*)at;
    b->bytes += bytes;
    b->missing--;
    settle_(b);
}
static inline void copy_bulk(void* to, const void* from, unsigned bytes, void* at) {
    if (((size_t)to | (size_t)from | bytes) & 15) {
        fprintf(stderr, "a bulk copy that is not aligned\n");
        abort();
    }
    memcpy(to, from, bytes);
    ((CopyBarrier*)at)->bytes -= bytes;
    settle_((CopyBarrier*)at);
}
static inline void copy_wait(void* at, unsigned parity) {
    while ((unsigned)(((CopyBarrier*)at)->phase & 1) == parity) pause_();
}

// ---- launches ----

struct Launch {
    int columns, rows, threads;  // of blocks; of a block
    size_t shared_bytes;
    std::function<void()> kernel;
};
class Running {
  public:
    std::vector<std::vector<std::unique_ptr<Thread>>> blocks;
    size_t left = 0;
    explicit Running(const Launch& launch) {
        for (int b = 0; b < launch.columns * launch.rows; b++) {
            memories.emplace_back(new Block(launch.shared_bytes));
            Block* block = memories.back().get();
            block->at = {(unsigned)(b % launch.columns), (unsigned)(b / launch.columns), 0};
            block->grid = {(unsigned)launch.columns, (unsigned)launch.rows, 1};
            block->dim = {(unsigned)launch.threads, 1, 1};
            blocks.emplace_back();
            for (int i = 0; i < launch.threads; i++, left++) {
                blocks.back().emplace_back(new Thread());
                Thread* thread = blocks.back().back().get();
                thread->index = i, thread->block = block, thread->kernel = &launch.kernel;
            }
        }
    }

  private:
    std::vector<std::unique_ptr<Block>> memories;
};

// Each rank's launches one after the other. One rank at a time is fast and the others slow. 0, or 1 where all wait for ever.
static int run_ranks(const std::vector<std::vector<Launch>>& ranks, unsigned seed) {
    const size_t count = ranks.size();
    std::vector<size_t> next(count, 0);
    std::vector<std::unique_ptr<Running>> live(count);
    auto dice = [&seed](size_t sides) { return (seed = seed * 1664525u + 1013904223u, (seed >> 9) % sides); };
    size_t fast = dice(count);
    for (long idle = 0; idle < 3000;) {
        const long before = progress;
        bool any = false;
        if (!dice(60)) fast = dice(count);
        for (size_t r = 0; r < count; r++) {
            if (!live[r] && next[r] < ranks[r].size()) live[r].reset(new Running(ranks[r][next[r]]));
            if (!live[r]) continue;
            any = true;
            if (r != fast && dice(24)) continue;
            for (size_t turns = r == fast ? 1 + dice(6) : 1; turns && live[r]->left; turns--) {
                const size_t blocks = live[r]->blocks.size(), first = dice(blocks);
                for (size_t b = 0; b < blocks; b++) {
                    if (!dice(4)) continue;
                    auto& threads = live[r]->blocks[(b + first) % blocks];
                    const size_t start = dice(threads.size());
                    for (size_t t = 0; t < threads.size(); t++) {
                        Thread* thread = threads[(t + start) % threads.size()].get();
                        if (thread->done) continue;
                        resume(thread);
                        live[r]->left -= thread->done;
                    }
                }
            }
            if (live[r]->left) continue;
            live[r].reset();
            next[r]++;
            progress++;
        }
        if (!any) return 0;
        idle = progress == before ? idle + 1 : 0;
    }
    return 1;
}
