// One token for every row of logits, as engine/sampler.py says: a grammar's mask, penalties, temperature, min-p, top-k, top-p,
// and a share of what is left, in the order of ids. Wherever the next step looks for it the token is written by this launch.
//
// `parts` blocks share a row; each keeps a stretch of it in registers. They meet at counters in global memory: once for the
// largest logit, once for every split of top-k and top-p, once for the sums of what is kept. Which row and part a block gets is
// the order in which blocks began, so those of a row that wait for each other wait for blocks that run: there need be room for
// `parts` blocks on the GPU, not for the grid. All counters and sums are zero before and after.
//
// A scaled logit x <= 0 is kept as the bits of -x, its key: likelier tokens have smaller keys. Weights are integers (weights.cu), so
// sums depend on no order, and are the same bits on every GPU.
//
// Top-k and top-p are one key each, the largest that passes. The keys are split into bins, 1/32 apart at first, then by their bits,
// and counts and weights are added up by bin, until all of a bin is kept, or it is a single token or a single key.
//
// Behind weights.cu. Defines: THREADS of a block, 512 at most.

constexpr int QUADS = 4;  // of a thread: four neighbouring tokens each
constexpr int STRETCH = THREADS * QUADS * 4;
constexpr int BIN_BITS = 10, BINS = 1 << BIN_BITS, MINE = BINS / THREADS;  // bins of a thread
constexpr int SPLITS = 7;  // the first, and three more for either filter
constexpr int MOST_PARTS = 64, WARPS = THREADS / 32;
static_assert(STRETCH <= 8192, "sums of halves of weights, of 19 bits each, have 32");

struct Row {
    int slot, top_k;      // top_k: 0 where there is none
    int history, prompt;  // tokens in the slot's history, and of the prompt among them; -1: no penalties
    int mask, unused;     // which mask; -1: none
    float temperature, least, top_p, repetition, presence, frequency;  // least: the logarithm of min-p
    double share;
};
struct Split {
    u64 mass[BINS];
    u32 count[BINS];
};
struct State {  // of a row
    u64 best;
    u32 come, gone;
    u64 totals[MOST_PARTS];
    Split splits[SPLITS];
};
struct Found {  // the bin in which a sum passes what is wanted; BINS: it never does
    u32 bin, count, before;
    u64 mass, before_mass;
};
struct Range {  // of keys, both ends included; the first one is of all
    u32 low, high;
    int shift;
    bool first;
};
struct Shared {
    union {
        u32 counts[STRETCH];  // how often a token was put out; the highest bit: it is in the prompt
        struct {
            u32 count[BINS], low[BINS], high[BINS];
        };
    };
    u64 warps[WARPS], wide[MOST_PARTS];
    Found found;
    Row row;
    u64 wanted, mass;
    u32 turn;
};

// All blocks of a row come here as often; afterwards each sees what the others wrote before.
__device__ __forceinline__ void meet(State* state, u32 wanted) {
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence();
        atomicAdd(&state->come, 1u);
        while (*(volatile u32*)&state->come < wanted) {}
        __threadfence();
    }
    __syncthreads();
}

__device__ __forceinline__ u32 bin_of(u32 key, const Range& range) {
    if (!range.first) return (key - range.low) >> range.shift;
    const float number = __uint_as_float(key);
    return number < BINS / 32.f ? (u32)(number * 32.f) : BINS - 1;
}
__device__ __forceinline__ void narrow(Range& range, u32 bin) {
    if (range.first) {
        range.low = __float_as_uint((float)bin / 32.f);
        range.high = bin < BINS - 1 ? __float_as_uint((float)(bin + 1) / 32.f) - 1 : NEVER - 1;
    } else {
        range.low += bin << range.shift;
        range.high = min(range.high, range.low + (1u << range.shift) - 1);
    }
    range.first = false;
    range.shift = 0;
    while (((range.high - range.low) >> range.shift) >= BINS) range.shift++;
}

// Adds this block's keys of that range to the row's sums by bin, with their weights or without; returns when all have done so.
__device__ __forceinline__ void add_up(const u32 (&keys)[QUADS][4], const Range& range, bool weighed, Shared& s, State* state,
                                       int split, u32 meeting) {
    for (int b = threadIdx.x; b < BINS; b += THREADS) s.count[b] = s.low[b] = s.high[b] = 0;
    __syncthreads();
#pragma unroll
    for (int q = 0; q < QUADS; q++) {
#pragma unroll
        for (int e = 0; e < 4; e++) {
            const u32 key = keys[q][e];
            if (key >= NEVER || (!range.first && (key < range.low || key > range.high))) continue;
            const u32 bin = bin_of(key, range);
            atomicAdd(&s.count[bin], 1u);
            if (!weighed) continue;
            const u64 w = weight(key);
            const u32 low = (u32)w & ((1u << HALF_BITS) - 1), high = (u32)(w >> HALF_BITS);
            if (low) atomicAdd(&s.low[bin], low);
            if (high) atomicAdd(&s.high[bin], high);
        }
    }
    __syncthreads();
    Split& all = state->splits[split];
    for (int b = threadIdx.x; b < BINS; b += THREADS) {
        if (!s.count[b]) continue;
        atomicAdd(&all.count[b], s.count[b]);
        const u64 mass = s.low[b] + ((u64)s.high[b] << HALF_BITS);
        if (mass) atomicAdd(&all.mass[b], mass);
    }
    meet(state, meeting);
}

// A thread's bins of a split, and the sums of those before them.
struct Mine {
    u32 count[MINE], before;
    u64 mass[MINE], before_mass;
};
__device__ __forceinline__ Mine look(const Split& split, Shared& s) {
    Mine mine;
    u64 counts = 0, masses = 0, all;
#pragma unroll
    for (int i = 0; i < MINE; i++) {
        mine.count[i] = __ldcg(&split.count[threadIdx.x * MINE + i]);
        mine.mass[i] = __ldcg(&split.mass[threadIdx.x * MINE + i]);
        counts += mine.count[i];
        masses += mine.mass[i];
    }
    mine.before = (u32)sum_before<WARPS>(counts, s.warps, all);
    __syncthreads();
    mine.before_mass = sum_before<WARPS>(masses, s.warps, all);
    if (threadIdx.x == 0) {
        s.mass = all;
        s.found.bin = BINS;
    }
    __syncthreads();
    return mine;
}
// The first bin with which counts, or masses, reach `wanted` >= 1.
__device__ __forceinline__ Found find(const Mine& mine, bool by_mass, u64 wanted, Shared& s) {
    u64 before = by_mass ? mine.before_mass : mine.before, mass = mine.before_mass;
    u32 count = mine.before;
#pragma unroll
    for (int i = 0; i < MINE; i++) {
        const u64 after = before + (by_mass ? mine.mass[i] : mine.count[i]);
        if (before < wanted && wanted <= after) s.found = {threadIdx.x * MINE + i, mine.count[i], count, mine.mass[i], mass};
        before = after;
        count += mine.count[i];
        mass += mine.mass[i];
    }
    __syncthreads();
    return s.found;
}

// The largest key that top-k and top-p let pass. splits: how many were used; met: how often the blocks have met.
__device__ __forceinline__ u32 filter(const u32 (&keys)[QUADS][4], const Row& r, Shared& s, State* state, u32 parts, int& splits,
                                      u32& met) {
    const bool weighed = r.top_p < 1.f;
    u32 limit = NEVER - 1;
    u64 total = 0;
    if (r.top_k) {
        Range range = {0, NEVER - 1, 0, true};
        u64 mass = 0;
        u32 wanted = r.top_k;
        while (true) {
            add_up(keys, range, weighed, s, state, splits, ++met * parts);
            const Mine mine = look(state->splits[splits++], s);
            const Found found = find(mine, false, wanted, s);
            if (found.bin == BINS) {  // there are not so many
                total = s.mass;
                break;
            }
            narrow(range, found.bin);
            limit = range.high;
            mass += found.before_mass;
            wanted -= found.before;
            total = mass + found.mass;
            if (found.count == wanted) break;
            if (range.low == range.high) {  // some of them equal, and all of these kept, but not counted in the mass
                total = mass + found.mass / found.count * wanted;
                break;
            }
        }
    }
    if (!weighed) return limit;
    Range range = {0, NEVER - 1, 0, true};
    if (!r.top_k) add_up(keys, range, true, s, state, splits++, ++met * parts);
    u64 wanted = 0;
    for (int split = 0;;) {
        const Mine mine = look(state->splits[split], s);
        if (range.first) {
            if (threadIdx.x == 0) {
                if (!r.top_k) total = s.mass;
                s.wanted = max(min((u64)ceil((double)r.top_p * (double)total), total), 1ull);
            }
            __syncthreads();
            wanted = s.wanted;
        }
        const Found found = find(mine, true, wanted, s);
        if (found.bin == BINS) return limit;  // never, where sums began at zero
        narrow(range, found.bin);
        wanted -= found.before_mass;
        if (found.count == 1 || range.low == range.high) return min(limit, range.high);
        split = splits++;
        add_up(keys, range, true, s, state, split, ++met * parts);
    }
}

// How often tokens of this stretch were put out, and whether they are in the prompt.
__device__ __forceinline__ void count(const int* history, const Row& r, int first, int length, Shared& s) {
    for (int i = threadIdx.x; i < length; i += THREADS) s.counts[i] = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < r.history; i += THREADS) {
        const u32 at = (u32)(history[i] - first);
        if (at >= (u32)length) continue;
        if (i < r.prompt) {
            atomicOr(&s.counts[at], 0x80000000u);
        } else {
            atomicAdd(&s.counts[at], 1u);
        }
    }
    __syncthreads();
}
__device__ __forceinline__ float penalised(float logit, u32 counted, const Row& r) {
    if (!counted) return logit;
    logit = logit > 0.f ? logit / r.repetition : __fmul_rn(logit, r.repetition);
    const u32 times = counted & 0x7fffffffu;
    logit = __fadd_rn(logit, -__fmul_rn(r.frequency, (float)times));
    return times ? __fadd_rn(logit, -r.presence) : logit;
}

__device__ __forceinline__ void write(int id, int row, const Row& r, int* history, long long* last, long long* ids) {
    ids[row] = id;
    last[r.slot] = id;
    if (r.history >= 0) history[r.history] = id;
}

// The token at which the sum of kept weights, in the order of ids, passes `wanted`; it is in this stretch.
__device__ __forceinline__ int drawn(const u32 (&keys)[QUADS][4], u32 limit, u64 wanted, int first, Shared& s) {
    if (threadIdx.x == 0) s.found.bin = first;
#pragma unroll
    for (int q = 0; q < QUADS; q++) {
        u64 sum = 0, all;
#pragma unroll
        for (int e = 0; e < 4; e++) sum += keys[q][e] <= limit ? weight(keys[q][e]) : 0;
        __syncthreads();
        u64 before = sum_before<WARPS>(sum, s.warps, all);
        if (before <= wanted && wanted < before + sum) {
            int passed = 0;
#pragma unroll
            for (int e = 0; e < 4; e++) {
                before += keys[q][e] <= limit ? weight(keys[q][e]) : 0;
                passed += before <= wanted;
            }
            s.found.bin = first + 4 * (q * THREADS + threadIdx.x) + passed;
        }
        if (wanted < all) break;
        wanted -= all;
    }
    __syncthreads();
    return s.found.bin;
}

// logits [rows][columns], `stride` numbers from row to row. masks: `words` words each, a bit a token. histories: `width`
// numbers a slot. A block's stretch is `length` tokens, a multiple of four. turns: [1]; states: a row each; zero before and after.
extern "C" __global__ void __launch_bounds__(THREADS, 2)
    choose(const float* logits, int columns, int stride, const Row* rows, const u32* masks, int words, int* histories, int width,
           long long* last, long long* ids, int parts, int length, u32* turns, State* states) {
    __shared__ Shared s;
    if (threadIdx.x == 0) s.turn = atomicInc(turns, gridDim.x - 1);
    __syncthreads();
    const int row = s.turn / parts, part = s.turn % parts, first = part * length, end = min(columns, first + length);
    State* state = states + row;
    const Row& r = s.row;
    if (threadIdx.x == 0) s.row = rows[row];
    const float* numbers = logits + (size_t)row * stride;
    const bool aligned = ((size_t)numbers & 15) == 0;
    float found[QUADS][4];
#pragma unroll
    for (int q = 0; q < QUADS; q++) {
        const int at = first + 4 * (q * THREADS + threadIdx.x);
        if (aligned && at + 4 <= end) {
            const float4 four = *(const float4*)(numbers + at);
            found[q][0] = four.x, found[q][1] = four.y, found[q][2] = four.z, found[q][3] = four.w;
        } else {
#pragma unroll
            for (int e = 0; e < 4; e++) found[q][e] = at + e < end ? numbers[at + e] : 0.f;
        }
    }
    __syncthreads();
    int* history = histories + (size_t)r.slot * width;
    if (r.history >= 0) count(history, r, first, length, s);
    u64 most = 0;
#pragma unroll
    for (int q = 0; q < QUADS; q++) {
        const int within = 4 * (q * THREADS + threadIdx.x), at = first + within;
        u32 allowed = 15;
        if (r.mask >= 0 && at < end) allowed = masks[(size_t)r.mask * words + (at >> 5)] >> (at & 31);
#pragma unroll
        for (int e = 0; e < 4; e++) {
            if (at + e >= end) continue;
            if (!(allowed >> e & 1)) found[q][e] = -__uint_as_float(NEVER);
            if (r.history >= 0) found[q][e] = penalised(found[q][e], s.counts[within + e], r);
            most = max(most, ranked(found[q][e], at + e));
        }
    }
#pragma unroll
    for (int o = 16; o; o >>= 1) most = max(most, __shfl_xor_sync(ALL, most, o));
    if ((threadIdx.x & 31) == 0) s.warps[threadIdx.x >> 5] = most;
    __syncthreads();
    if (threadIdx.x == 0) {
#pragma unroll
        for (int w = 1; w < WARPS; w++) most = max(most, s.warps[w]);
        atomicMax(&state->best, most);
    }
    u32 met = 1;
    int splits = 0;
    meet(state, parts);
    const u64 best = __ldcg(&state->best);
    const float largest = value_of(best);
    const bool random = r.temperature > 0.f;
    if (!random || !is_finite(largest)) {
        // Where the largest is no finite number nothing has a weight, and the first token is taken.
        if (part == 0 && threadIdx.x == 0) write(random ? 0 : (int)~(u32)best, row, r, history, last, ids);
    } else {
        u32 keys[QUADS][4];
#pragma unroll
        for (int q = 0; q < QUADS; q++) {
#pragma unroll
            for (int e = 0; e < 4; e++) {
                const float x = __fadd_rn(found[q][e], -largest) / r.temperature;
                const bool there = first + 4 * (q * THREADS + (int)threadIdx.x) + e < end && x >= r.least;
                keys[q][e] = there ? __float_as_uint(x) & 0x7fffffffu : NEVER;
            }
        }
        u32 limit = NEVER - 1;
        if (r.top_k || r.top_p < 1.f) limit = filter(keys, r, s, state, parts, splits, met);
        u64 sum = 0, total;
#pragma unroll
        for (int q = 0; q < QUADS; q++) {
#pragma unroll
            for (int e = 0; e < 4; e++) sum += keys[q][e] <= limit ? weight(keys[q][e]) : 0;
        }
        __syncthreads();
        sum_before<WARPS>(sum, s.warps, total);
        if (threadIdx.x == 0) state->totals[part] = total;
        meet(state, ++met * parts);
        for (int p = threadIdx.x; p < parts; p += THREADS) s.wide[p] = __ldcg(&state->totals[p]);
        __syncthreads();
        if (threadIdx.x == 0) {
            u64 whole = 0, before = 0;
            for (int p = 0; p < parts; p++) {
                if (p == part) before = whole;
                whole += s.wide[p];
            }
            const u64 target = min((u64)(r.share * (double)whole), whole - 1);  // the product may round up to the whole
            s.found.count = before <= target && target < before + s.wide[part];
            s.wanted = target - before;
        }
        __syncthreads();
        if (s.found.count) {
            const int id = drawn(keys, limit, s.wanted, first, s);
            if (threadIdx.x == 0) write(id, row, r, history, last, ids);
        }
    }
    for (int b = part * THREADS + threadIdx.x; b < splits * BINS; b += parts * THREADS) {
        state->splits[b / BINS].count[b % BINS] = 0;
        state->splits[b / BINS].mass[b % BINS] = 0;
    }
    __syncthreads();
    if (threadIdx.x == 0 && atomicInc(&state->gone, parts - 1) == parts - 1) {
        state->best = 0;
        state->come = 0;
    }
}
