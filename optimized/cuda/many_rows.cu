// y = x W^T for many rows of x in bfloat16, on Hopper, with one matrix W or with that of each row's expert in a stack. W is read in the
// device layout, and becomes operands of `wgmma` in registers.
//
// Legend: M rows of x, or slots; E experts, N outputs, K inputs; KW words a row, KG groups a row; G columns a group.
//
// A warp group multiplies tiles of 64 outputs by ROWS rows of x with `wgmma`. Its warp i holds the outputs 16 i .. 16 i + 15, and thread
// 4 g + t of a warp holds four inputs of the outputs g and g + 8, as with `mma.sync`. Which four is open, as long as x comes in the same
// order. So a thread takes a chunk of its own (`chunk.cuh`), and a step is the four chunks of the threads t.
//
// `lay_out_rows` first writes x in that order: a slab is what one word of each of the four chunks is multiplied by, that is 64 columns of
// ROWS rows. Its places are [lane l = 0 .. 7][row][thread t] with the lanes l and l + 8 of the word of thread t, and two lanes l are what
// one `wgmma` takes. A warp of its own copies slabs to shared memory while other warps multiply.
//
// Weights become operands while the tensor cores multiply the ones before. So registers hold two batches of operands, and the next words of
// a chunk are read into the registers of those that have become operands.
//
// Constants that the host defines:
//   GROUP_SIZE, MANTISSA_BITS   of the weight; 96 columns are whole groups
//   SLOTS        0 for rows of one matrix, 1 for slots sorted by expert, 2 for slots that read the matrix of their expert each for itself
//   ROWS         rows of x, or slots, of a tile, which a block multiplies: 8, 16, 32, 64, 128 or 256
//   WARP_GROUPS  warp groups of a block that multiply
//   HEIGHT       tiles of 64 outputs of a warp group
//   COPY_WARPS   warps of a block that copy: 1, or 4 where sums take most registers
//   BLOCKS       blocks that a multiprocessor must have room for
//   BATCH        products of 16 inputs, 1, 2 or 4, whose operands are made at once
//   PARTS        1 where sums are cut into parts, else 0
//   RESIDENT     1 where shared memory has room for all slabs of a tile, which are copied once, else 0
//   WORD_BYTES   8 where every row of words starts at a multiple of 8 bytes, else 4
//   LEVEL_BYTES  4 where every chunk of levels starts at a multiple of 4 bytes and fills such words, else 1

#include "chunk.cuh"

constexpr int WARPS = 4 * WARP_GROUPS;
// A whole warp group that copies gives its registers to those that multiply.
constexpr bool GIVES_REGISTERS = COPY_WARPS == 4;
static_assert(COPY_WARPS == 1 || COPY_WARPS == 4);
constexpr int SLAB_BYTES = ROWS * 128;
// Products of 16 inputs in a slab.
constexpr int PRODUCTS = 4;

// Registers of a thread that copies, and of a thread that multiplies, once threads that copy have given up theirs.
constexpr int COPY_REGISTERS = 24, MULTIPLY_REGISTERS = BLOCKS == 1 ? 240 : 232;
// Registers that a block starts with. `setmaxnreg` waits for ever if it asks for more.
constexpr int BLOCK_THREADS = 32 * (WARPS + COPY_WARPS), BLOCK_REGISTERS = 65536 / (BLOCK_THREADS * BLOCKS) / 8 * 8 * BLOCK_THREADS;
static_assert(!GIVES_REGISTERS || 128 * (WARP_GROUPS * MULTIPLY_REGISTERS + COPY_REGISTERS) <= BLOCK_REGISTERS);
static_assert(PRODUCTS % BATCH == 0, "a batch ends within a slab");
static_assert(WORDS % 2 == 0, "words are read by twos");
static_assert(!(PARTS && RESIDENT), "slabs that stay are those of a whole sum");

__device__ __forceinline__ unsigned shared_address(const void* at) { return static_cast<unsigned>(__cvta_generic_to_shared(at)); }

__device__ __forceinline__ void wait_for(unsigned barrier, unsigned parity) {
    asm volatile(
        "{\n.reg .pred done;\nagain: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@!done bra again;\n}" ::"r"(barrier),
        "r"(parity)
        : "memory");
}

// Copy slabs to shared memory. `barrier` is told of their bytes, and when they are there.
__device__ __forceinline__ void copy_slabs(unsigned to, const uint4* from, unsigned barrier, unsigned bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
                 "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(barrier)
                 : "memory");
}

// Wait until x is laid out, and all that the launch before reads may be written over.
__device__ __forceinline__ void wait_for_layout() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// Describe a tile [ROWS, 16] of x to `wgmma`: eight rows of eight inputs lie together, one after the other, without a swizzle.
__device__ __forceinline__ unsigned long long described(unsigned address) {
    constexpr unsigned long long inputs_apart = ROWS * 16 / 16, rows_apart = 128 / 16;
    return (address & 0x3FFFF) >> 4 | inputs_apart << 16 | rows_apart << 32;
}

#define SUMS_4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define NAMES_4 "%0,%1,%2,%3"
#define SUMS_8(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define SUMS_16(i) SUMS_8(i), SUMS_8(i + 8)
#define SUMS_32(i) SUMS_16(i), SUMS_16(i + 16)
#define SUMS_64(i) SUMS_32(i), SUMS_32(i + 32)
#define SUMS_128(i) SUMS_64(i), SUMS_64(i + 64)
#define NAMES_8 "%0,%1,%2,%3,%4,%5,%6,%7"
#define NAMES_16 NAMES_8 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define NAMES_32 NAMES_16 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define NAMES_64                                                                                                 \
    NAMES_32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55," \
             "%56,%57,%58,%59,%60,%61,%62,%63"
#define NAMES_128                                                                                                \
    NAMES_64 ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87," \
             "%88,%89,%90,%91,%92,%93,%94,%95,%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109," \
             "%110,%111,%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"
#define WGMMA(rows, names, sums, a0, a1, a2, a3, x_tile)                                                                      \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" #rows "k16.f32.bf16.bf16 {" names "}, {" a0 "," a1 "," a2 "," a3 "}, " x_tile \
                 ", 1, 1, 1, 0;"                                                                                              \
                 : sums                                                                                                       \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(x_tile_of_product))

// Add to the sums of 64 outputs and ROWS rows the products of sixteen inputs. They are on their way when this returns.
__device__ __forceinline__ void multiply_tile(float (&d)[ROWS / 2], const unsigned (&a)[4], unsigned long long x_tile_of_product) {
#if ROWS == 8
    WGMMA(8, NAMES_4, SUMS_4(0), "%4", "%5", "%6", "%7", "%8");
#elif ROWS == 16
    WGMMA(16, NAMES_8, SUMS_8(0), "%8", "%9", "%10", "%11", "%12");
#elif ROWS == 32
    WGMMA(32, NAMES_16, SUMS_16(0), "%16", "%17", "%18", "%19", "%20");
#elif ROWS == 64
    WGMMA(64, NAMES_32, SUMS_32(0), "%32", "%33", "%34", "%35", "%36");
#elif ROWS == 128
    WGMMA(128, NAMES_64, SUMS_64(0), "%64", "%65", "%66", "%67", "%68");
#elif ROWS == 256
    WGMMA(256, NAMES_128, SUMS_128(0), "%128", "%129", "%130", "%131", "%132");
#endif
}

// What slots are cut into tiles by: `experts` int64 [M] where each reads its own matrix; sorted slots have an `order` int64 [M] and
// `starts` int64 [E + 2], where the slots of each expert begin in it, and behind them the unused ones.
struct Slots {
    const long long* experts;
    const long long* order;
    const long long* starts;
    int num_slots, num_experts;

    // The expert of a tile, E if its slots are unused and -1 if there is no such tile; its first place, and its number of places.
    struct Tile {
        int expert, first, count;
    };

    // Return a tile. All threads of a warp call this.
    __device__ __forceinline__ Tile tile(int number) const {
        if constexpr (SLOTS == 0) return {0, number * ROWS, min(ROWS, num_slots - number * ROWS)};
        if constexpr (SLOTS == 2) {
            const int expert = static_cast<int>(__ldg(experts + number));
            return {expert < 0 ? num_experts : expert, number, 1};
        }
        const int lane = threadIdx.x % 32;
        for (int first = 0, before = 0; first <= num_experts; first += 32) {
            const int expert = first + lane;
            const bool inside = expert <= num_experts;
            const int start = inside ? static_cast<int>(__ldg(starts + expert)) : 0;
            const int count = inside ? static_cast<int>(__ldg(starts + expert + 1)) - start : 0;
            const int tiles = (count + ROWS - 1) / ROWS;
            int end = tiles;
#pragma unroll
            for (int i = 1; i < 32; i *= 2) {
                const int below = __shfl_up_sync(~0u, end, i);
                end += lane >= i ? below : 0;
            }
            end += before;
            const unsigned found = __ballot_sync(~0u, number < end);
            if (found) {
                const int of = __ffs(found) - 1, place = number - __shfl_sync(~0u, end - tiles, of);
                const int begin = __shfl_sync(~0u, start, of), size = __shfl_sync(~0u, count, of);
                return {first + of, begin + place * ROWS, min(ROWS, size - place * ROWS)};
            }
            before = __shfl_sync(~0u, end, 31);
        }
        return {-1, 0, 0};
    }

    // Return the slot, or the row, at a place.
    __device__ __forceinline__ long long at(int place) const { return SLOTS == 1 ? __ldg(order + place) : place; }
};

// Write x in the order of slabs, [tile][step][word of a chunk][lane][row][thread]. Past the last row or column it is 0. slots_of_row:
// neighbouring slots that read one row of x.
extern "C" __global__ void __launch_bounds__(128)
lay_out_rows(const unsigned short* __restrict__ x, uint4* __restrict__ slabs, const long long* __restrict__ experts,
             const long long* __restrict__ order, const long long* __restrict__ starts, int num_slots, int num_experts,
             int slots_of_row, int num_inputs, int num_slabs, int num_tiles) {
    // The blocks of the product may start, and read weights. They wait for slabs.
    asm volatile("griddepcontrol.launch_dependents;");
    const long long place = static_cast<long long>(blockIdx.x) * 128 + threadIdx.x;
    const int in_tile = static_cast<int>(place % ROWS);
    const long long slab_of_all = place / ROWS;
    const int slab = static_cast<int>(slab_of_all % num_slabs), number = static_cast<int>(slab_of_all / num_slabs);
    // A warp may hold rows of several tiles, which are found one after the other.
    const Slots slots{experts, order, starts, num_slots, num_experts};
    Slots::Tile tile{-1, 0, 0};
    const int first_number = __shfl_sync(~0u, number, 0), last_number = __shfl_sync(~0u, number, 31);
    for (int i = first_number; i <= min(last_number, num_tiles - 1); i++) {
        const Slots::Tile found = slots.tile(i);
        if (i == number) tile = found;
    }
    if (tile.expert < 0 || tile.expert == num_experts) return;
    const int num_rows = tile.count;
    const long long row = in_tile < num_rows ? slots.at(tile.first + in_tile) / slots_of_row : 0;
    uint4 low[4], high[4];
#pragma unroll
    for (int t = 0; t < 4; t++) {
        const int column = slab / WORDS * STEP + t * CHUNK + slab % WORDS * 16;
        const uint4* from = reinterpret_cast<const uint4*>(x + row * num_inputs + column);
        low[t] = high[t] = make_uint4(0, 0, 0, 0);
        if (in_tile < num_rows && column < num_inputs) low[t] = __ldg(from);
        if (in_tile < num_rows && column + 8 < num_inputs) high[t] = __ldg(from + 1);
    }
    uint4* to = slabs + slab_of_all * (ROWS * 8) + in_tile;
#pragma unroll
    for (int lane = 0; lane < 8; lane++) {
        unsigned pairs[4];
#pragma unroll
        for (int t = 0; t < 4; t++) {
            const unsigned l = lane < 2 ? low[t].x : lane < 4 ? low[t].y : lane < 6 ? low[t].z : low[t].w;
            const unsigned h = lane < 2 ? high[t].x : lane < 4 ? high[t].y : lane < 6 ? high[t].z : high[t].w;
            pairs[t] = __byte_perm(l, h, lane % 2 ? 0x7632 : 0x5410);
        }
        to[lane * ROWS] = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
    }
}

// Blocks are ordered by tile, then part of the sums, then run. Those of sorted slots are ordered by run, so that tiles of one expert read
// its rows at about the same time. A run is every num_runs-th of the ranges of outputs that a block computes at a time.
//
// out: bfloat16 [M, N], or, where sums are cut, float32 [parts, M, N]
extern "C" __global__ void __launch_bounds__(BLOCK_THREADS, BLOCKS)
many_rows_product(const uint4* __restrict__ slabs, const unsigned* __restrict__ words, const signed char* __restrict__ levels,
                  void* __restrict__ out, const long long* __restrict__ experts, const long long* __restrict__ order,
                  const long long* __restrict__ starts, int num_slots, int num_experts, int num_outputs, int num_inputs, int row_words, int row_groups, int num_parts, int part_steps, int num_tiles,
                  int num_runs) {
    extern __shared__ __align__(128) unsigned char slabs_here[];
    __shared__ unsigned long long full[WORDS], empty[WORDS];
    constexpr int BLOCK_OUTPUTS = 64 * HEIGHT * WARP_GROUPS;
    const int ranges = (num_outputs + BLOCK_OUTPUTS - 1) / BLOCK_OUTPUTS;
    int number, part, run;
    if constexpr (SLOTS == 1) {
        number = blockIdx.x % num_tiles, part = blockIdx.x / num_tiles % num_parts, run = blockIdx.x / num_tiles / num_parts;
    } else {
        run = blockIdx.x % num_runs, part = blockIdx.x / num_runs % num_parts, number = blockIdx.x / num_runs / num_parts;
    }
    const Slots slots{experts, order, starts, num_slots, num_experts};
    const Slots::Tile tile = slots.tile(number);
    // A block that copies nothing waits too. Else all blocks could end before the launch before does.
    if (tile.expert < 0) return wait_for_layout();
    const auto store = [&](int place, int output, float value) {
        const long long at = slots.at(tile.first + place) * num_outputs + output;
        if constexpr (PARTS) {
            static_cast<float*>(out)[static_cast<long long>(part) * num_slots * num_outputs + at] = value;
        } else {
            static_cast<unsigned short*>(out)[at] = rounded(value);
        }
    };
    // Unused slots give zeros.
    if (SLOTS != 0 && tile.expert == num_experts) {
        for (int place = 0; place < tile.count; place++) {
            for (int range = run; range < ranges; range += num_runs) {
                const int begins = range * BLOCK_OUTPUTS, size = min(BLOCK_OUTPUTS, num_outputs - begins);
                for (int i = threadIdx.x; i < size; i += BLOCK_THREADS) store(place, begins + i, 0);
            }
        }
        return wait_for_layout();
    }
    words += static_cast<long long>(tile.expert) * num_outputs * row_words;
    levels += static_cast<long long>(tile.expert) * num_outputs * row_groups;
    const int steps = (num_inputs + STEP - 1) / STEP, begin = part * part_steps, end = min(begin + part_steps, steps);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (threadIdx.x == 0) {
#pragma unroll
        for (int i = 0; i < WORDS; i++) {
            asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(full + i)), "r"(1));
            asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(empty + i)), "r"(WARPS));
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();

    if (warp >= WARPS) {
        if constexpr (GIVES_REGISTERS) asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COPY_REGISTERS));
        if (warp == WARPS && lane == 0) {
            wait_for_layout();
            const uint4* first = slabs + (static_cast<long long>(number) * steps + begin) * WORDS * (SLAB_BYTES / 16);
            if constexpr (RESIDENT) {
                copy_slabs(shared_address(slabs_here), first, shared_address(full), (end - begin) * WORDS * SLAB_BYTES);
            } else {
                int round = 0;
                for (int range = run; range < ranges; range += num_runs) {
                    const uint4* from = first;
                    for (int step = begin; step < end; step++, round++) {
                        for (int i = 0; i < WORDS; i++, from += SLAB_BYTES / 16) {
                            // The first time there is nothing to wait for.
                            wait_for(shared_address(empty + i), (round + 1) & 1);
                            copy_slabs(shared_address(slabs_here + i * SLAB_BYTES), from, shared_address(full + i), SLAB_BYTES);
                        }
                    }
                }
            }
        }
        return;
    }
    if constexpr (GIVES_REGISTERS) asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(MULTIPLY_REGISTERS));

    const int g = lane / 4, t = lane % 4, output_of_thread = warp / 4 * (64 * HEIGHT) + warp % 4 * 16 + g;
    const unsigned* words_of[HEIGHT][2];
    const signed char* levels_of[HEIGHT][2];
    const auto turn_to = [&](int range) {
#pragma unroll
        for (int i = 0; i < 2 * HEIGHT; i++) {
            // An output past the last is read as the last. Its sums are not stored.
            const int output = min(range * BLOCK_OUTPUTS + output_of_thread + i / 2 * 64 + i % 2 * 8, num_outputs - 1);
            words_of[i / 2][i % 2] = words + static_cast<long long>(output) * row_words;
            levels_of[i / 2][i % 2] = levels + static_cast<long long>(output) * row_groups;
        }
    };
    const unsigned* last = reinterpret_cast<const unsigned*>(
        reinterpret_cast<unsigned long long>(levels + static_cast<long long>(num_outputs) * row_groups - 1) & ~3ull);
    unsigned word_of[HEIGHT][2][WORDS], level_of[HEIGHT][2][LEVEL_WORDS], next_level_of[HEIGHT][2][LEVEL_WORDS];
    // Read the words `i` and `i` + 1 of the chunks of a step, trits of 0 past the end of a row.
    const auto read_two_words = [&](int step, int i) {
        const int at = (4 * step + t) * WORDS + i;
#pragma unroll
        for (int j = 0; j < 2 * HEIGHT; j++) {
            unsigned(&to)[WORDS] = word_of[j / 2][j % 2];
            const unsigned* from = words_of[j / 2][j % 2] + at;
            if constexpr (WORD_BYTES == 8) {
                const uint2 pair = at < row_words ? __ldg(reinterpret_cast<const uint2*>(from)) : make_uint2(0, 0);
                to[i] = pair.x;
                to[i + 1] = pair.y;
            } else {
                to[i] = at < row_words ? __ldg(from) : 0;
                to[i + 1] = at + 1 < row_words ? __ldg(from + 1) : 0;
            }
        }
    };
    const auto read_next_levels = [&](int step) {
        const int first = (4 * step + t) * LEVELS;
#pragma unroll
        for (int j = 0; j < 2 * HEIGHT; j++) {
            read_levels(next_level_of[j / 2][j % 2], levels_of[j / 2][j % 2] + first, last, row_groups - first);
        }
    };

    float sums[HEIGHT][ROWS / 2];
    turn_to(run);
#pragma unroll
    for (int i = 0; i < WORDS; i += 2) read_two_words(begin, i);
    read_next_levels(begin);
    if constexpr (RESIDENT) wait_for(shared_address(full), 0);
    int round = 0;
    for (int range = run; range < ranges; range += num_runs) {
#pragma unroll
        for (int i = 0; i < HEIGHT; i++) {
#pragma unroll
            for (int j = 0; j < ROWS / 2; j++) sums[i][j] = 0;
        }
        for (int step = begin; step < end; step++, round++) {
            const bool is_last = step + 1 == end;
            const int next = is_last ? begin : step + 1;
#pragma unroll
            for (int j = 0; j < 2 * HEIGHT * LEVEL_WORDS; j++) {
                const int i = j / LEVEL_WORDS, level = j % LEVEL_WORDS;
                level_of[i / 2][i % 2][level] = next_level_of[i / 2][i % 2][level] ^ 0x80808080u;
            }
            // After the last range its rows are read once more, for nothing.
            if (is_last) turn_to(min(range + num_runs, ranges - 1));
            read_next_levels(next);
#pragma unroll
            for (int i = 0; i < WORDS; i++) {
#pragma unroll
                for (int first = 0; first < PRODUCTS; first += BATCH) {
                    unsigned a[HEIGHT][BATCH][4];
#pragma unroll
                    for (int height = 0; height < HEIGHT; height++) {
#pragma unroll
                        for (int j = 0; j < 4 * BATCH; j++) {
                            const int half = j % 2, pair = 2 * (first + j / 4) + j % 4 / 2;
                            a[height][j / 4][j % 4] = weights(word_of[height][half][i], i, pair, level_of[height][half]);
                        }
                    }
                    if (!RESIDENT && first == 0) wait_for(shared_address(full + i), round & 1);
                    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
                    const int slab = RESIDENT ? (step - begin) * WORDS + i : i;
                    const unsigned slab_address = shared_address(slabs_here) + slab * SLAB_BYTES;
#pragma unroll
                    for (int j = 0; j < BATCH; j++) {
#pragma unroll
                        for (int height = 0; height < HEIGHT; height++) {
                            multiply_tile(sums[height], a[height][j], described(slab_address + (first + j) * ROWS * 32));
                        }
                    }
                    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
                    // The batch before is done.
                    asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
                    if (!RESIDENT && first == 0 && lane == 0 && (i || round)) {
                        const unsigned barrier = shared_address(empty + (i ? i - 1 : WORDS - 1));
                        asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
                    }
                }
                if (i % 2) read_two_words(next, i - 1);
            }
        }
        asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");

        // The compiler must not know that places are those of the range before: it would keep the address of each sum.
        int first_place = 2 * t;
        asm volatile("" : "+r"(first_place));
#pragma unroll
        for (int i = 0; i < HEIGHT; i++) {
#pragma unroll
            for (int j = 0; j < ROWS / 2; j++) {
                const int output = range * BLOCK_OUTPUTS + output_of_thread + 64 * i + 8 * (j % 4 / 2);
                const int place = first_place + 8 * (j / 4) + j % 2;
                if (place < tile.count && output < num_outputs) store(place, output, sums[i][j]);
            }
        }
    }
}
