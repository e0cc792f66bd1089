// The likeliest token of every sequence, written where the next step looks for it. Behind weights.cu.

// logits [gridDim.y][columns] -> ids[row] and last[slots[row]]: the index of the largest, the lowest of equals. Every block
// takes a stretch of a row; the last to finish writes. best and counters: [gridDim.y], zero before and after. Rows are
// padding, and leave `last` alone, where positions[row] < 0.
extern "C" __global__ void __launch_bounds__(256) greedy(const float* logits, int columns, const int* positions, const int* slots,
                                                         long long* ids, long long* last, u64* best, u32* counters) {
    __shared__ u64 found[8];
    const int s = blockIdx.y, lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const float* row = logits + (size_t)s * columns;
    const int start = blockIdx.x * blockDim.x + threadIdx.x, step = gridDim.x * blockDim.x;
    u64 most = 0;
    int i = start;
    for (; i + 3 * step < columns; i += 4 * step) {  // four loads under way
        const float a = row[i], b = row[i + step], c = row[i + 2 * step], d = row[i + 3 * step];
        most = max(max(most, ranked(a, i)), max(ranked(b, i + step), max(ranked(c, i + 2 * step), ranked(d, i + 3 * step))));
    }
    for (; i < columns; i += step) most = max(most, ranked(row[i], i));
#pragma unroll
    for (int o = 16; o; o >>= 1) most = max(most, __shfl_xor_sync(0xffffffff, most, o));
    if (lane == 0) found[warp] = most;
    __syncthreads();
    if (threadIdx.x) return;
#pragma unroll
    for (int w = 1; w < 8; w++) most = max(most, found[w]);
    atomicMax(best + s, most);
    __threadfence();
    if (atomicAdd(counters + s, 1) != gridDim.x - 1) return;
    __threadfence();
    const long long id = (u32)~(u32)atomicExch(best + s, 0ull);
    counters[s] = 0;
    ids[s] = id;
    if (positions[s] >= 0) last[slots[s]] = id;
}
