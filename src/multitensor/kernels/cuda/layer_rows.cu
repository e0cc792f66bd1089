// The weights of layer.cu as 16-bit floats, row-major as they are resident. Answers for them what layer_tiles.cu answers for
// quantised ones. A tile is 16 rows x TILE_COLUMNS columns, copied row by row; activations keep their 16 bits, products
// and sums are float32.

#define LISTED 0  // there may be too many tiles for a list, and a cursor costs little beside the sums
#ifndef TILE_COLUMNS
#define TILE_COLUMNS 256
#endif
#ifndef WEIGHT_BFLOAT
#define WEIGHT_BFLOAT true
#endif

constexpr int ROW_BYTES = 2 * TILE_COLUMNS, STAGE_BYTES = ROWS * ROW_BYTES;
constexpr int LANES = TILE_COLUMNS / 8;    // of a warp that share a row: eight columns each
constexpr int TOGETHER = 32 / LANES;       // rows that a warp's load takes
constexpr int ITEMS_OF_TILE = LANES / 2;   // loads that take 16 rows
static_assert(LANES * 8 == TILE_COLUMNS && ITEMS_OF_TILE * TOGETHER == ROWS, "64, 128 or 256 columns");

// What of a tile lies within its matrix: rows of so many bytes, `pitch` bytes apart.
struct Extent {
    const u8* source;
    size_t pitch;
    int rows, bytes;
    template <class Phase>
    __device__ __forceinline__ Extent(const Phase& p, int part, int group, int kb) {
        const int first = group * ROWS, k = kb * TILE_COLUMNS;
        rows = min(ROWS, p.rows[part] - first);
        bytes = 2 * min(TILE_COLUMNS, p.columns - k);
        pitch = 2 * (size_t)p.columns;
        source = p.w[part] + first * pitch + 2 * k;
    }
};

// Rows past a matrix's last and columns past its last are not copied: what a stage held before stays there.
template <class Phase>
__device__ __forceinline__ void fill_stage(u8* stage, const Phase& p, int part, int group, int kb, u64* bar, int lane) {
    const Extent tile(p, part, group, kb);
#if HAS_BULK
    const u32 b = shared_address(bar);
    if (lane == 0) asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(b), "r"(tile.rows * tile.bytes) : "memory");
    __syncwarp();
    if (lane < tile.rows)
        asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                         shared_address(stage + lane * ROW_BYTES)),
                     "l"(tile.source + lane * tile.pitch), "r"(tile.bytes), "r"(b)
                     : "memory");
#else
    const int at = lane % LANES * 16;
#pragma unroll
    for (int i = 0; i < ITEMS_OF_TILE; i++) {
        const int row = i * TOGETHER + lane / LANES;
        if (row >= tile.rows || at >= tile.bytes) continue;
        const u8* from = tile.source + row * tile.pitch + at;
        u8* to = stage + row * ROW_BYTES + at;
#if HAS_ASYNC
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from) : "memory");
#else
        *(uint4*)to = *(const uint4*)from;
#endif
    }
    __syncwarp();
#endif
}

template <class Phase>
__device__ __forceinline__ int kind_of(const Phase&, int) { return 0; }

// Super-blocks of 256 columns of an input.
__device__ __forceinline__ int super_blocks(int, int columns) { return (columns + 255) / 256; }

// Activations in shared memory: 16-bit numbers [TOKENS][pitch].
struct Inputs {
    unsigned short* x;
    int pitch;
};
__device__ __forceinline__ Inputs inputs_at(u8* at, int widest) { return {(unsigned short*)at, widest * 256}; }
__device__ __forceinline__ u8* end_of_inputs(const Inputs& in, int) { return (u8*)(in.x + TOKENS * in.pitch); }
__device__ __forceinline__ void clear_inputs(const Inputs&, int) {}
__device__ __forceinline__ void take_mixed(const u8* mixed, int columns, int, int, const Inputs& in) {
    const int items = columns / 8;
    for (int n = 0; n < TOKENS; n++)
        for (int i = threadIdx.x; i < items; i += blockDim.x)
            *(uint4*)(in.x + n * in.pitch + i * 8) = *(const uint4*)(mixed + ((size_t)n * columns + i * 8) * 2);
}
// A lane's eight columns of a super-block.
__device__ __forceinline__ void store_input(const float (&v)[8], int kb, int n, int lane, const Inputs& in) {
    u32 w[4];
#pragma unroll
    for (int i = 0; i < 4; i++) w[i] = pack<BFLOAT_MODE>(v[2 * i]) | (u32)pack<BFLOAT_MODE>(v[2 * i + 1]) << 16;
    *(uint4*)(in.x + n * in.pitch + kb * 256 + lane * 8) = make_uint4(w[0], w[1], w[2], w[3]);
}

// ---- what layer.cu adds up ----

__device__ __forceinline__ u32 number(const uint4& v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }

// A lane's eight columns of row i * TOGETHER + lane / LANES.
struct Sums {
    float acc[TOKENS][ITEMS_OF_TILE];
    __device__ __forceinline__ Sums() {
#pragma unroll
        for (int n = 0; n < TOKENS; n++)
#pragma unroll
            for (int i = 0; i < ITEMS_OF_TILE; i++) acc[n][i] = 0.f;
    }
    __device__ __forceinline__ void add(const u8* tile, int, const Inputs& in, int kb, int columns, int lane) {
        const int k = kb * TILE_COLUMNS + lane % LANES * 8;
        if (k >= columns) return;  // nothing was copied there
        float x[TOKENS][8];
#pragma unroll
        for (int n = 0; n < TOKENS; n++) {
            const uint4 raw = *(const uint4*)(in.x + n * in.pitch + k);
#pragma unroll
            for (int e = 0; e < 8; e++) x[n][e] = unpack<BFLOAT_MODE>(number(raw, e >> 1), e & 1);
        }
#pragma unroll
        for (int i = 0; i < ITEMS_OF_TILE; i++) {
            const uint4 raw = *(const uint4*)(tile + i * 512 + lane * 16);
#pragma unroll
            for (int e = 0; e < 8; e++) {
                const float w = unpack<WEIGHT_BFLOAT>(number(raw, e >> 1), e & 1);
#pragma unroll
                for (int n = 0; n < TOKENS; n++) acc[n][i] += w * x[n][e];
            }
        }
    }
};

// Sums over the lanes of a row: each step halves the items that a lane still has, so lane l ends with item l % LANES / 2.
template <int COUNT>
__device__ __forceinline__ void halve(float (&v)[ITEMS_OF_TILE], int lane) {
    const bool upper = lane & (2 * COUNT);
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
        const float other = __shfl_xor_sync(0xffffffff, upper ? v[i] : v[i + COUNT], 2 * COUNT);
        v[i] = (upper ? v[i + COUNT] : v[i]) + other;
    }
}
struct Part {
    float of[TOKENS];
};
__device__ __forceinline__ Part part_of(const Sums& sums, int lane) {
    Part mine;
#pragma unroll
    for (int n = 0; n < TOKENS; n++) {
        float v[ITEMS_OF_TILE];
#pragma unroll
        for (int i = 0; i < ITEMS_OF_TILE; i++) v[i] = sums.acc[n][i];
        if constexpr (ITEMS_OF_TILE > 8) halve<8>(v, lane);
        if constexpr (ITEMS_OF_TILE > 4) halve<4>(v, lane);
        halve<2>(v, lane);
        halve<1>(v, lane);
        mine.of[n] = v[0] + __shfl_xor_sync(0xffffffff, v[0], 1);
    }
    return mine;
}
// to: [TOKENS][16 rows]
__device__ __forceinline__ void put_part(float* to, const Part& mine, int lane) {
    const int odd = lane & 1, row = lane % LANES / 2 * TOGETHER + lane / LANES;
#pragma unroll
    for (int n = 0; n < TOKENS; n += 2)
        if (n + odd < TOKENS) to[(n + odd) * ROWS + row] = odd ? mine.of[n + 1 < TOKENS ? n + 1 : n] : mine.of[n];
}
