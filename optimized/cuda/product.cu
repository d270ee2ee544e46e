// y = x W^T for few rows of x in bfloat16. W is read in the device layout, and becomes operands of the tensor cores in registers.
//
// Legend: M rows of x, N outputs, K inputs; KW words a row, KG groups a row; G columns a group.
//
// A warp multiplies tiles of 16 outputs by 8 rows of x with `mma.m16n8k16`. Thread 4 g + t of a warp holds four inputs of the
// outputs g and g + 8 there. Which four is open, as long as x comes in the same order. So a thread takes a chunk of its own (`chunk.cuh`),
// and a step of a warp is the four chunks of its threads t. x is laid out in shared memory as the pairs of lanes of a word, for as
// many columns at a time as fit there.
//
// Constants that the host defines:
//   GROUP_SIZE, MANTISSA_BITS   of the weight; 96 columns are whole groups
//   TILES        tiles of 16 outputs that a block computes
//   SPLITS       warps among which the steps of a tile are dealt out; their sums are added in order
//   BLOCKS       blocks that a multiprocessor must have room for
//   WORD_BYTES   8 where every row of words starts at a multiple of 8 bytes, else 4
//   LEVEL_BYTES  4 where every chunk of levels starts at a multiple of 4 bytes and fills such words, else 1

#include "chunk.cuh"
#include "few_rows.cuh"

constexpr int THREADS = 32 * TILES * SPLITS;
// Pieces of x that a thread reads before it writes one, and those that it reads while it multiplies the phase before. A
// multiprocessor with one block has registers for them, and no other block to work for while they are on their way.
constexpr int AT_ONCE = 4;
constexpr int AHEAD = BLOCKS == 1 ? 2 : 0;

// Pieces of x on their way from global to shared memory: sixteen columns of a row each.
template <int COUNT>
struct Pieces {
    uint4 low[COUNT], high[COUNT];
};

// What a phase reads of x: `blocks` times sixteen columns of each row, from the column `begin` on. Past the last column x is 0.
// Neighbouring threads take neighbouring blocks of a row, so that they write to different banks.
struct Phase {
    const unsigned short* x;
    int begin, blocks, num_rows, num_inputs;

    // Read the pieces `first`, `first` + THREADS, ... All of them are on their way at once.
    template <int COUNT>
    __device__ __forceinline__ void read(Pieces<COUNT>& pieces, int first) const {
#pragma unroll
        for (int i = 0; i < COUNT; i++) {
            const int place = first + i * THREADS, row = place / blocks, column = begin + 16 * (place - row * blocks);
            const uint4* from = reinterpret_cast<const uint4*>(x + static_cast<long long>(row) * num_inputs + column);
            pieces.low[i] = pieces.high[i] = make_uint4(0, 0, 0, 0);
            if (row < num_rows && column < num_inputs) pieces.low[i] = __ldg(from);
            if (row < num_rows && column + 8 < num_inputs) pieces.high[i] = __ldg(from + 1);
        }
    }

    // Write the pieces that were read from `first` on as the pairs l and l + 8.
    template <int COUNT>
    __device__ __forceinline__ void write(uint4* pairs, const Pieces<COUNT>& pieces, int first) const {
#pragma unroll
        for (int i = 0; i < COUNT; i++) {
            const int place = first + i * THREADS, row = place / blocks, block = place - row * blocks;
            if (row >= num_rows) break;
            const uint4 low = pieces.low[i], high = pieces.high[i];
            uint4* to = pairs + block * pieces_of(num_rows) + row;
            to[0] = make_uint4(__byte_perm(low.x, high.x, 0x5410), __byte_perm(low.x, high.x, 0x7632),
                               __byte_perm(low.y, high.y, 0x5410), __byte_perm(low.y, high.y, 0x7632));
            to[num_rows] = make_uint4(__byte_perm(low.z, high.z, 0x5410), __byte_perm(low.z, high.z, 0x7632),
                                      __byte_perm(low.w, high.w, 0x5410), __byte_perm(low.w, high.w, 0x7632));
        }
    }

    // Read and write the pieces from `first` on.
    __device__ __forceinline__ void lay_out(uint4* pairs, int first) const {
        for (; first < num_rows * blocks; first += AT_ONCE * THREADS) {
            Pieces<AT_ONCE> pieces;
            read(pieces, first);
            write(pairs, pieces, first);
        }
    }
};

// phase_steps: steps whose x is in shared memory at a time, a multiple of SPLITS.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
few_rows_product(const unsigned short* __restrict__ x, const unsigned* __restrict__ words, const signed char* __restrict__ levels,
                 unsigned short* __restrict__ y, int num_rows, int num_outputs, int num_inputs, int row_words, int row_groups,
                 int phase_steps) {
    extern __shared__ uint4 shared[];
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int warp = threadIdx.x / 32, tile = warp / SPLITS, split = warp % SPLITS;
    const long long first = (static_cast<long long>(blockIdx.x) * TILES + tile) * 16;
    // A row past the last is read as the last. Its sums are not stored.
    const unsigned* words_of[2];
    const signed char* levels_of[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const long long row = min(first + g + 8 * half, static_cast<long long>(num_outputs - 1));
        words_of[half] = words + row * row_words;
        levels_of[half] = levels + row * row_groups;
    }
    const unsigned* last = reinterpret_cast<const unsigned*>(
        reinterpret_cast<unsigned long long>(levels + static_cast<long long>(num_outputs) * row_groups - 1) & ~3ull);
    const int steps = (num_inputs + STEP - 1) / STEP, whole_chunks = num_inputs / CHUNK;
    const auto read = [&](Chunk& chunk, int step) {
        // All rows are read as if they came near the end: two ways of reading are a longer loop.
        chunk.read(words_of, levels_of, last, true, 4 * step + t, whole_chunks, row_words, row_groups);
    };

    float sums[1][4] = {};
    Chunk next;
    int step = split;
    if (step < steps) read(next, step);
    const auto phase_from = [&](int begin) {
        return Phase{x, begin * STEP, (min(begin + phase_steps, steps) - begin) * (STEP / 16), num_rows, num_inputs};
    };
    Pieces<AHEAD ? AHEAD : 1> ahead;
    if constexpr (AHEAD) phase_from(0).read(ahead, threadIdx.x);
    for (int begin = 0; begin < steps; begin += phase_steps) {
        const int end = min(begin + phase_steps, steps);
        const Phase phase = phase_from(begin);
        if (begin) __syncthreads();
        if constexpr (AHEAD) phase.write(shared, ahead, threadIdx.x);
        phase.lay_out(shared, threadIdx.x + AHEAD * THREADS);
        __syncthreads();
        if constexpr (AHEAD) {
            if (end < steps) phase_from(end).read(ahead, threadIdx.x);
        }
        for (; step < end; step += SPLITS) {
            Chunk chunk = next;
            // The next chunk is on its way while this one is multiplied.
            if (step + SPLITS < steps) read(next, step + SPLITS);
            multiply_chunk(sums, chunk, shared + (4 * (step - begin) + t) * WORDS * pieces_of(num_rows), num_rows);
        }
    }

    // The sums of the warps take the place of x.
    __syncthreads();
    float(*parts)[SPLITS][4][32] = reinterpret_cast<float(*)[SPLITS][4][32]>(shared);
#pragma unroll
    for (int i = 0; i < 4; i++) parts[tile][split][i][lane] = sums[0][i];
    __syncthreads();
    for (int sum = threadIdx.x; sum < TILES * 4 * 32; sum += THREADS) {
        const int of_lane = sum % 32, place = sum / 32 % 4, of_tile = sum / (4 * 32);
        float total = parts[of_tile][0][place][of_lane];
#pragma unroll
        for (int i = 1; i < SPLITS; i++) total += parts[of_tile][i][place][of_lane];
        const long long output = (static_cast<long long>(blockIdx.x) * TILES + of_tile) * 16 + of_lane / 4 + 8 * (place / 2);
        const int row = 2 * (of_lane % 4) + place % 2;
        if (row < num_rows && output < num_outputs) y[static_cast<long long>(row) * num_outputs + output] = rounded(total);
    }
}
