// Do GPUs' stores arrive right in each other's memory while the owner polls it? Every GPU runs `exchange` at the same time
// on all of them. Depends on nothing but itself: it runs in a process of its own (parallel/peer_probe.py). `mailboxes` asks
// the same of memory of the host, in the ranks themselves (parallel/host_memory.py).

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

// What a rank writes in a round. Differs in bit 30 from what the same place held before.
__device__ __forceinline__ u32 letter(u32 writer, u32 round, u32 word) {
    return (pattern(writer, round, word) & 0x3fffffffu) | (round >> 1 & 1) << 30;
}

// As `exchange`, but every rank writes into its own mailbox, for all to read, and does so `rounds` times: a word that a GPU
// has kept from a round before would be seen. boxes: address of every rank's mailbox, each u32 [2][words]; rounds take turns,
// and a thread begins a round when it has read all of the one before, so nobody overwrites what another still has to read.
// verdict as above; a thread that has waited in vain ends, and counts once.
extern "C" __global__ void mailboxes(const u64* boxes, u32* verdict, int limit_ms, int rank, int ranks, int words, int rounds) {
    const u64 began = nanoseconds(), limit = 1000000ull * limit_ms;
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < words; i += gridDim.x * blockDim.x) {
        for (int round = 0; round < rounds; round++) {
            const u64 at = 4ull * ((round & 1) * words + i);
            put(boxes[rank] + at, letter(rank, round, i));
            for (int writer = 0; writer < ranks; writer++) {
                if (writer == rank) continue;
                const u32 before = round < 2 ? NOTHING : letter(writer, round - 2, i);
                u32 found = look(boxes[writer] + at);
                while (found == before && nanoseconds() - began < limit) found = look(boxes[writer] + at);
                if (found == before) {
                    atomicAdd(verdict + 1, 1u);
                    return;
                }
                if (found != letter(writer, round, i)) atomicAdd(verdict, 1u);
            }
        }
    }
}
