// Flags in memory that several GPUs and processes see: counters that only grow, modulo 2^32. Launches of one thread or one
// warp, between copies on the same streams. Has run for ranks that share one GPU, not yet for two.

typedef unsigned int u32;
typedef unsigned long long u64;

__device__ __forceinline__ u64 nanoseconds() {
    u64 now;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
    return now;
}
__device__ __forceinline__ u32 look(u64 address) {
    u32 value;
    asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
    return value;
}

// flags: [ranks] address of every rank's flag. All that the stream did before is over, and seen by who sees the flag.
extern "C" __global__ void raise_flag(const u64* flags, int rank, u32 value) {
    asm volatile("fence.acq_rel.sys;" ::: "memory");
    asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(flags[rank]), "r"(value) : "memory");
}

// One warp: ends when the flag of every rank but `rank` has reached `value`. After limit_ms the kernel fails, and with it the
// process; where limit_ms is below 0 it ends after -limit_ms and counts in `late`.
extern "C" __global__ void await_flags(const u64* flags, u32* late, int rank, int ranks, u32 value, int limit_ms) {
    if (limit_ms < 0 && *(volatile u32*)late) return;  // given up already
    const u64 began = nanoseconds(), limit = 1000000ull * (limit_ms < 0 ? -limit_ms : limit_ms);
    for (int r = threadIdx.x; r < ranks; r += 32) {
        if (r == rank) continue;
        while ((int)(look(flags[r]) - value) < 0) {
            if (nanoseconds() - began > limit) {
                if (limit_ms >= 0) asm volatile("trap;");
                atomicAdd(late, 1u);
                return;
            }
            __nanosleep(500);
        }
    }
}
