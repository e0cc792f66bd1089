// The log-probability and the rank of the token that was chosen of a row of logits, and those of the likeliest, as one launch.
//
// Every block looks at a stretch of a row by itself, weights being those to its own largest logit; the last of a row to finish
// joins what they found, in the order of parts. So a result depends on neither other rows nor time; weights are right to 2e-7.
//
// Behind weights.cu. Defines: THREADS of a block.

constexpr int WARPS = THREADS / 32;
constexpr int HELD = 16;          // logits of a thread
constexpr int STRETCHES = 128;    // of a row at most
constexpr int MOST = 20;          // of the likeliest
constexpr int CANDIDATES = (STRETCHES * MOST + THREADS - 1) / THREADS;  // of a thread of the last block

struct Note {  // of a block
    u64 best[MOST];
    u64 sum;
    u64 greater;
};

__device__ __forceinline__ u64 block_max(u64 value, u64* warps) {
#pragma unroll
    for (int o = 16; o; o >>= 1) value = max(value, __shfl_xor_sync(ALL, value, o));
    if ((threadIdx.x & 31) == 0) warps[threadIdx.x >> 5] = value;
    __syncthreads();
#pragma unroll
    for (int w = 0; w < WARPS; w++) value = max(value, warps[w]);
    __syncthreads();
    return value;
}
// The largest of all threads' numbers that is not above `limit`, which then is one less.
template <int N>
__device__ __forceinline__ u64 next(const u64 (&held)[N], u64& limit, u64* warps) {
    u64 mine = 0;
#pragma unroll
    for (int h = 0; h < N; h++) {
        if (held[h] <= limit) mine = max(mine, held[h]);
    }
    mine = block_max(mine, warps);
    limit = mine ? mine - 1 : 0;
    return mine;
}

// logits: rows of `columns`, `stride` numbers apart, of which gridDim.y are looked at: those in places. ids: of every row of the
// logits. out: of each looked at, the bits of the chosen one's log-probability (float64), its rank, `most` ids, and the bits of
// their log-probabilities. A block's stretch is `length` tokens. counters: [gridDim.y], zero before and after.
extern "C" __global__ void __launch_bounds__(THREADS)
    tell(const float* logits, int columns, int stride, const int* places, const long long* ids, int most, int length, Note* notes,
         u32* counters, long long* out) {
    __shared__ u64 warps[WARPS];
    __shared__ double shares[STRETCHES];
    __shared__ u64 greaters[STRETCHES];
    __shared__ u32 last;
    const int parts = gridDim.x, row = blockIdx.y, place = places[row], wide = max(most, 1);
    const float* numbers = logits + (size_t)place * stride;
    const float chosen = numbers[ids[place]];
    const int first = blockIdx.x * length, end = min(columns, first + length);
    Note* mine = notes + (size_t)row * parts;
    {
        Note& note = mine[blockIdx.x];
        u64 held[HELD], greater = 0, limit = ~0ull, sum = 0, all;
#pragma unroll
        for (int h = 0; h < HELD; h++) {
            const int at = first + h * THREADS + threadIdx.x;
            const float x = at < end ? numbers[at] : 0.f;
            held[h] = at < end ? ranked(x, at) : 0;
            greater += at < end && x > chosen;
        }
        float top = 0.f;
        for (int j = 0; j < wide; j++) {
            const u64 best = next(held, limit, warps);
            if (j == 0) top = value_of(best);
            if (threadIdx.x == 0) note.best[j] = best;
        }
        if (is_finite(top)) {
#pragma unroll
            for (int h = 0; h < HELD; h++) sum += held[h] ? weight(__float_as_uint(top - value_of(held[h]))) : 0;
        }
        sum_before<WARPS>(sum, warps, all);
        if (threadIdx.x == 0) note.sum = all;
        __syncthreads();
        sum_before<WARPS>(greater, warps, all);
        if (threadIdx.x == 0) {
            note.greater = all;
            __threadfence();
            last = atomicInc(counters + row, parts - 1) == parts - 1;
        }
        __syncthreads();
        if (!last) return;
        __threadfence();
    }
    u64 held[CANDIDATES], limit = ~0ull;
#pragma unroll
    for (int c = 0; c < CANDIDATES; c++) {
        const int i = c * THREADS + threadIdx.x, part = i / wide;
        held[c] = part < parts ? __ldcg(&mine[part].best[i % wide]) : 0;
    }
    out += (size_t)row * (2 + 2 * most);
    double whole = 0;
    for (int j = 0; j < wide; j++) {
        const u64 best = next(held, limit, warps);
        const float value = value_of(best);
        if (j == 0) {
            for (int p = threadIdx.x; p < parts; p += THREADS) {
                const u64 sum = __ldcg(&mine[p].sum);
                shares[p] = sum && is_finite(value) ? (double)sum * exp((double)value_of(__ldcg(&mine[p].best[0])) - (double)value) : 0;
                greaters[p] = __ldcg(&mine[p].greater);
            }
            __syncthreads();
            if (threadIdx.x == 0) {
                double total = 0;
                u64 rank = 1;
                for (int p = 0; p < parts; p++) {
                    total += shares[p];
                    rank += greaters[p];
                }
                whole = is_finite(value) ? (double)value + log(total / (double)(1ull << 2 * HALF_BITS)) : (double)value;
                *(double*)out = (double)chosen - whole;
                out[1] = rank;
            }
        }
        if (threadIdx.x || j >= most) continue;
        out[2 + j] = (u32)~(u32)best;
        *(double*)(out + 2 + most + j) = (double)value - whole;
    }
}
