// Do GPUs' stores arrive right in each other's memory while the owner polls it? Every GPU runs `exchange` at the same time
// on all of them. Depends on nothing but itself: it runs in a process of its own (parallel/peer_probe.py).

typedef unsigned int u32;
typedef unsigned long long u64;

constexpr u32 NOTHING = 0x80000000u;  // what buffers are filled with before; no pattern has this bit

__device__ __forceinline__ void put(u64 address, u32 value) {
    asm volatile("st.relaxed.sys.global.u32 [%0], %1;" ::"l"(address), "r"(value) : "memory");
}
__device__ __forceinline__ u32 look(u64 address) {
    u32 value;
    asm volatile("ld.relaxed.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
    return value;
}
__device__ __forceinline__ u64 nanoseconds() {
    u64 now;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
    return now;
}
// Differs for every word, writer and reader, so that nothing can be right by being somebody else's.
__device__ __forceinline__ u32 pattern(u32 writer, u32 reader, u32 word) {
    u32 h = word * 0x9e3779b1u ^ (writer * 16 + reader + 1) * 0x85ebca6bu;
    h = (h ^ h >> 15) * 0x2c1b3c6du;
    return (h ^ h >> 13) & ~NOTHING;
}

// buffers: address of every GPU's buffer as this one sees it, each u32 [gpus][words], one row a writer. verdict: [0] counts
// words that are not what was written, [1] words that did not come within limit_ns. GPU number `gpu` of `gpus`.
extern "C" __global__ void exchange(const u64* buffers, u32* verdict, u64 limit_ns, int gpu, int gpus, int words) {
    const int first = blockIdx.x * blockDim.x + threadIdx.x, step = gridDim.x * blockDim.x;
    for (int reader = 0; reader < gpus; reader++) {
        const u64 row = buffers[reader] + 4ull * gpu * words;
        for (int i = first; i < words; i += step) put(row + 4ull * i, pattern(gpu, reader, i));
    }
    const u64 began = nanoseconds();
    for (int writer = 0; writer < gpus; writer++) {
        const u64 row = buffers[gpu] + 4ull * writer * words;
        for (int i = first; i < words; i += step) {
            u32 found = look(row + 4ull * i);
            while (found == NOTHING && nanoseconds() - began < limit_ns) found = look(row + 4ull * i);
            if (found == NOTHING) atomicAdd(verdict + 1, 1u);
            else if (found != pattern(writer, gpu, i)) atomicAdd(verdict, 1u);
        }
    }
}
