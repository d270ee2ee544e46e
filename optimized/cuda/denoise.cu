// The denoise loop of a few samples in one launch. Weights stay in the device layout, and arithmetic is in float32.
//
// Legend: B samples, L numbers of a latent, P tokens, D width, T steps; n a unit row, q a query, m the input that the noise is predicted from;
// KW words a row, KG groups a row.
//
// All blocks of the grid are on the GPU at once, and wait for one another between the parts of a step:
//   1. x = W_in latent. A block has the rows of some outputs, here and in each product below.
//   2. q = W_query n + the row of the step, n = unit(x). Every block computes the whole of n.
//   3. A block has some tokens. It writes their scores' maximum, and the sum of the tokens and of 1 by their shares beside that maximum.
//   4. m = silu(n + c). A block has some columns, and adds up the sums of all parts of the tokens.
//   5. The prediction is W_out m, and the step takes its share out of the latent.
// A halting of a sample follows from sums of squares over all blocks, which every block adds up in one order. So all blocks know of it.
//
// Blocks keep as many of their tokens in shared memory as it has room for. What other blocks wrote is read from the L2 cache.
//
// Products run on the tensor cores (`few_rows.cuh`). The 24 bits of a float32 number are cut into three bfloat16 numbers, so each sample is
// three rows of x, and products are exact. The sums of a step of 384 columns are added to those before in float32.
//
// Constants that the host defines:
//   GROUP_SIZE, MANTISSA_BITS   of the four weights; 96 columns are whole groups
//   WORD_BYTES, LEVEL_BYTES     8 or 4, and 4 or 1, as `product.cu` says, for every weight that is multiplied
//   FLOAT_BYTES     2 where latents and tokens are bfloat16, 4 where they are float32
//   SAMPLES, SIZE, WIDTH        B, L and D
//   HALTS           1 where samples halt, else 0
//   THREADS         threads of a block
//   HUGE_LOG2, TAMING_LOG2   sum of squares from which on a row is huge, and by what it is multiplied then, as powers of two

#include "chunk.cuh"
#include "few_rows.cuh"

constexpr int WARPS = THREADS / 32, TOKENS = 4;
// Rows of x, and eights of them.
constexpr int ROWS = 3 * SAMPLES, EIGHTS = (ROWS + 7) / 8;
#define INF __int_as_float(0x7F800000)

#if FLOAT_BYTES == 2
typedef unsigned short Float;
typedef uint2 FourFloats;
__device__ __forceinline__ float widened(Float value) { return __uint_as_float(static_cast<unsigned>(value) << 16); }
__device__ __forceinline__ float4 widened(FourFloats bits) {
    return make_float4(__uint_as_float(bits.x << 16), __uint_as_float(bits.x & 0xFFFF0000u), __uint_as_float(bits.y << 16),
                       __uint_as_float(bits.y & 0xFFFF0000u));
}
__device__ __forceinline__ Float narrowed(float value) { return rounded(value); }
#else
typedef float Float;
typedef float4 FourFloats;
__device__ __forceinline__ float widened(Float value) { return value; }
__device__ __forceinline__ float4 widened(FourFloats values) { return values; }
__device__ __forceinline__ Float narrowed(float value) { return value; }
#endif

__device__ __forceinline__ float first_latent(const FourFloats* latents, int place) {
    return widened(__ldg(reinterpret_cast<const Float*>(latents) + place));
}

template <int INPUTS>
struct Weight {
    static constexpr int ROW_WORDS = (INPUTS + 15) / 16, ROW_GROUPS = (INPUTS + GROUP_SIZE - 1) / GROUP_SIZE;

    const unsigned* words;
    const signed char* levels;
    int num_outputs;

    // Return the last aligned word of the levels.
    __device__ __forceinline__ const unsigned* last_levels() const {
        const signed char* const last = levels + static_cast<long long>(num_outputs) * ROW_GROUPS - 1;
        return reinterpret_cast<const unsigned*>(reinterpret_cast<unsigned long long>(last) & ~3ull);
    }
};

// The outputs of a product that a block has.
struct Range {
    int first, count;
};

__device__ __forceinline__ Range range_of_block(int size) {
    const long long block = blockIdx.x;
    const int first = static_cast<int>(size * block / gridDim.x);
    return {first, static_cast<int>(size * (block + 1) / gridDim.x) - first};
}

// Return the rows of a block, whole tiles of 16 but for the last.
__device__ __forceinline__ Range rows_of_block(int num_rows) {
    const Range tiles = range_of_block((num_rows + 15) / 16);
    return {16 * tiles.first, min(16 * tiles.count, num_rows - 16 * tiles.first)};
}

// What all blocks wait at. A cooperative launch has a word for it, which the driver sets to 0. The address is what cooperative_groups.h
// takes for it, which cannot be included: NVRTC comes without it.
struct Barrier {
    unsigned* word;
    unsigned before;

    __device__ __forceinline__ Barrier() {
        unsigned low, high;
        asm("mov.u32 %0, %%envreg2;" : "=r"(low));
        asm("mov.u32 %0, %%envreg1;" : "=r"(high));
        word = reinterpret_cast<unsigned*>(static_cast<unsigned long long>(high) << 32 | low) + 1;
        before = 0;
    }

    // Say that this block has written what others wait for.
    __device__ __forceinline__ void arrive() {
        __syncthreads();
        if (threadIdx.x == 0) {
            // The last arrival of a round flips the highest bit.
            const unsigned add = blockIdx.x == 0 ? 0x80000000u - (gridDim.x - 1) : 1;
            asm volatile("atom.add.release.gpu.u32 %0, [%1], %2;" : "=r"(before) : "l"(word), "r"(add) : "memory");
        }
    }

    // Wait for all blocks.
    __device__ __forceinline__ void wait() const {
        if (threadIdx.x == 0) {
            unsigned now;
            do {
                asm volatile("ld.acquire.gpu.u32 %0, [%1];" : "=r"(now) : "l"(word) : "memory");
            } while (!((now ^ before) & 0x80000000u));
        }
        __syncthreads();
    }
};

__device__ __forceinline__ void prefetch(const void* from, long long num_bytes) {
    for (long long at = 128 * threadIdx.x; at < num_bytes; at += 128 * THREADS) {
        asm volatile("prefetch.global.L2 [%0];" ::"l"(static_cast<const char*>(from) + at));
    }
}

template <int INPUTS>
__device__ __forceinline__ void prefetch_rows(const Weight<INPUTS>& weight, Range rows) {
    constexpr long long WORDS = Weight<INPUTS>::ROW_WORDS, GROUPS = Weight<INPUTS>::ROW_GROUPS;
    prefetch(weight.words + rows.first * WORDS, 4 * rows.count * WORDS);
    prefetch(weight.levels + rows.first * GROUPS, rows.count * GROUPS);
}

// Add up each of some values over a warp. The sum of the value i is in the lanes from 32 / COUNT i on.
template <int COUNT, int APART = 16>
__device__ __forceinline__ float sum_of_each(const float (&values)[COUNT]) {
    if constexpr (COUNT == 1) {
        float sum = values[0];
#pragma unroll
        for (int apart = APART; apart; apart /= 2) sum += __shfl_xor_sync(~0u, sum, apart);
        return sum;
    } else {
        constexpr int HALF = COUNT / 2;
        const bool upper = threadIdx.x & APART;
        float halves[HALF];
#pragma unroll
        for (int i = 0; i < HALF; i++) {
            const float own = upper ? values[HALF + i] : values[i], other = upper ? values[i] : values[HALF + i];
            halves[i] = own + __shfl_xor_sync(~0u, other, APART);
        }
        return sum_of_each<HALF, APART / 2>(halves);
    }
}

__device__ __forceinline__ float sum_of_warp(float value) { return sum_of_each<1>({value}); }

__device__ __forceinline__ float most_of_warp(float value) {
#pragma unroll
    for (int apart = 16; apart; apart /= 2) value = fmaxf(value, __shfl_xor_sync(~0u, value, apart));
    return value;
}

// Add up a value over a block. `room` has a place for each warp.
__device__ __forceinline__ float sum_of_block(float value, float* room) {
    value = sum_of_warp(value);
    __syncthreads();
    if (threadIdx.x % 32 == 0) room[threadIdx.x / 32] = value;
    __syncthreads();
    float sum = 0;
#pragma unroll
    for (int i = 0; i < WARPS; i++) sum += room[i];
    return sum;
}

// Return the power of two by which a row is multiplied before it is squared, from the sum of its unscaled squares (docs/spec/norm.md).
__device__ __forceinline__ float taming_power(float total) {
    return total >= ldexpf(1.0f, HUGE_LOG2) ? ldexpf(1.0f, TAMING_LOG2) : 1.0f;
}

__device__ __forceinline__ float dot(float4 a, float4 b, float sum) {
    return fmaf(a.w, b.w, fmaf(a.z, b.z, fmaf(a.y, b.y, fmaf(a.x, b.x, sum))));
}

__device__ __forceinline__ float4 scaled(float4 a, float factor) {
    return make_float4(a.x * factor, a.y * factor, a.z * factor, a.w * factor);
}

__device__ __forceinline__ float4 add_scaled(float4 sum, float4 a, float factor) {
    return make_float4(fmaf(a.x, factor, sum.x), fmaf(a.y, factor, sum.y), fmaf(a.z, factor, sum.z), fmaf(a.w, factor, sum.w));
}

__device__ __forceinline__ float silu(float u) {
    // exp of a negative number does not overflow.
    const float decay = expf(-fabsf(u));
    return (u < 0 ? u * decay : u) / (1 + decay);
}

// Compute the products of a block's rows with the operands in `pairs`, and give each to `use`.
//
// sums: room for [tiles, splits, EIGHTS, 4, 32]. The steps of a tile are dealt to `splits` warps, by the number of tiles of a block.
template <int INPUTS, typename Use>
__device__ __forceinline__ void multiply(const Weight<INPUTS>& weight, Range rows, const uint4* pairs, float* sums, Use use) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    constexpr int row_words = Weight<INPUTS>::ROW_WORDS, row_groups = Weight<INPUTS>::ROW_GROUPS;
    constexpr int steps = (INPUTS + STEP - 1) / STEP, whole_chunks = INPUTS / CHUNK;
    const int tiles = (rows.count + 15) / 16, splits = max(WARPS / max(tiles, 1), 1);
    float(*parts)[EIGHTS][4][32] = reinterpret_cast<float(*)[EIGHTS][4][32]>(sums);
    for (int unit = warp; unit < tiles * splits; unit += WARPS) {
        const int tile = unit / splits, split = unit % splits;
        const unsigned* words_of[2];
        const signed char* levels_of[2];
#pragma unroll
        for (int half = 0; half < 2; half++) {
            // A row past the last is read as the last. Its sums are not used.
            const long long row = rows.first + min(16 * tile + g + 8 * half, rows.count - 1);
            words_of[half] = weight.words + row * row_words;
            levels_of[half] = weight.levels + row * row_groups;
        }
        const auto read = [&](Chunk& chunk, int step) {
            const bool is_end = is_near_end(rows.first + 16 * tile, weight.num_outputs);
            chunk.read(words_of, levels_of, weight.last_levels(), is_end, 4 * step + t, whole_chunks, row_words, row_groups);
        };
        float totals[EIGHTS][4] = {};
        Chunk next;
        if (split < steps) read(next, split);
        for (int step = split; step < steps; step += splits) {
            Chunk chunk = next;
            // The next chunk is on its way while this one is multiplied.
            if (step + splits < steps) read(next, step + splits);
            float of_step[EIGHTS][4] = {};
            multiply_chunk(of_step, chunk, pairs + (4 * step + t) * WORDS * pieces_of(ROWS), ROWS);
#pragma unroll
            for (int i = 0; i < 4 * EIGHTS; i++) totals[i / 4][i % 4] += of_step[i / 4][i % 4];
        }
#pragma unroll
        for (int i = 0; i < 4 * EIGHTS; i++) parts[unit][i / 4][i % 4][lane] = totals[i / 4][i % 4];
    }
    __syncthreads();
#pragma unroll
    for (int sample = 0; sample < SAMPLES; sample++) {
        for (int row = threadIdx.x; row < rows.count; row += THREADS) {
            const int tile = row / 16, in_tile = row % 16;
            const auto part_of = [&](int split, int of_three) {
                const int column = 3 * sample + of_three, i = in_tile / 8 * 2 + column % 2;
                return parts[tile * splits + split][column / 8][i][in_tile % 8 * 4 + column % 8 / 2];
            };
            float sum = 0;
            for (int split = 0; split < splits; split++) sum += part_of(split, 0) + (part_of(split, 1) + part_of(split, 2));
            use(sample, rows.first + row, sum);
        }
    }
}

// Return one weight of a matrix.
template <int INPUTS>
__device__ __forceinline__ float weight_at(const Weight<INPUTS>& weight, long long row, int column) {
    const unsigned code = __ldg(weight.words + row * Weight<INPUTS>::ROW_WORDS + column / 16) >> (2 * (column % 16)) & 3;
    const int level = __ldg(weight.levels + row * Weight<INPUTS>::ROW_GROUPS + column / GROUP_SIZE);
    const float scale = __int_as_float((level + (127 << MANTISSA_BITS)) << (23 - MANTISSA_BITS));
    return code == 0 ? 0 : code == 1 ? scale : -scale;
}

// Cut two numbers into three bfloat16 numbers each: `parts` are the pairs from the highest bits to the lowest, and each rest is exact.
__device__ __forceinline__ void cut(unsigned (&parts)[3], float low, float high) {
    float rests[2] = {low, high};
    unsigned bits[2][3];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        // Infinity less infinity would be no number.
        const bool finite = fabsf(rests[i]) < INF;
        if (!finite) rests[i] = __uint_as_float(static_cast<unsigned>(rounded(rests[i])) << 16);
#pragma unroll
        for (int j = 0; j < 3; j++) {
            bits[i][j] = __float_as_uint(rests[i]) & 0xFFFF0000u;
            rests[i] = finite ? rests[i] - __uint_as_float(bits[i][j]) : 0;
        }
    }
#pragma unroll
    for (int j = 0; j < 3; j++) parts[j] = bits[0][j] >> 16 | bits[1][j];
}

// Put the operand of a product into shared memory as pairs, with zeros past its end. `read` returns four columns.
template <int INPUTS, typename Read>
__device__ __forceinline__ void stage(uint4* pairs, Read read) {
    constexpr int fours = INPUTS / 4, blocks = (INPUTS + STEP - 1) / STEP * (STEP / 16);
#pragma unroll
    for (int sample = 0; sample < SAMPLES; sample++) {
        for (int i = threadIdx.x; i < 2 * blocks; i += THREADS) {
            // Eight of sixteen columns: four lanes l, and the lanes l + 8.
            const int block = i / 2, half = i % 2, four = 4 * block + half;
            const float4 low = four < fours ? read(sample, four) : make_float4(0, 0, 0, 0);
            const float4 high = four + 2 < fours ? read(sample, four + 2) : make_float4(0, 0, 0, 0);
            unsigned parts[4][3];
            cut(parts[0], low.x, high.x);
            cut(parts[1], low.y, high.y);
            cut(parts[2], low.z, high.z);
            cut(parts[3], low.w, high.w);
            uint4* const to = pairs + block * pieces_of(ROWS) + half * ROWS + 3 * sample;
#pragma unroll
            for (int j = 0; j < 3; j++) to[j] = make_uint4(parts[0][j], parts[1][j], parts[2][j], parts[3][j]);
        }
    }
    __syncthreads();
}

// scratch: float32, as the host counts it. `part_tokens` to `sums_room` cut the tokens and the shared memory.
// step_0 .. step_7: 1 - alpha and 1 / sqrt(alpha) of each step, of which num_steps count.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
denoise_loop(const FourFloats* __restrict__ latents, const FourFloats* __restrict__ tokens, const unsigned* __restrict__ in_words,
             const signed char* __restrict__ in_levels, const unsigned* __restrict__ query_words,
             const signed char* __restrict__ query_levels, const unsigned* __restrict__ step_words,
             const signed char* __restrict__ step_levels, const unsigned* __restrict__ out_words,
             const signed char* __restrict__ out_levels, Float* __restrict__ out, float* scratch, float eps, float threshold,
             int num_tokens, int part_tokens, int kept_tokens, int sums_room, int num_steps, float2 step_0, float2 step_1,
             float2 step_2, float2 step_3, float2 step_4, float2 step_5, float2 step_6, float2 step_7) {
    const float2 steps[8] = {step_0, step_1, step_2, step_3, step_4, step_5, step_6, step_7};
    constexpr int size = SIZE, width = WIDTH, fours = width / 4;
    const Weight<size> latent_in{in_words, in_levels, width};
    const Weight<width> query{query_words, query_levels, width}, step_rows{step_words, step_levels, num_steps};
    const Weight<width> latent_out{out_words, out_levels, size};
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int num_parts = (num_tokens + part_tokens - 1) / part_tokens;
    const Range of_size = rows_of_block(size), of_width = rows_of_block(width), of_fours = range_of_block(fours);

    extern __shared__ float4 shared[];
    uint4* const pairs = reinterpret_cast<uint4*>(shared);
    float* const sums = reinterpret_cast<float*>(pairs + (max(size, width) + STEP - 1) / STEP * (STEP / 16) * pieces_of(ROWS));
    float* const shares = sums + sums_room;
    float* const warp_scores = shares + part_tokens;
    float* const room = shares + ((1 + WARPS) * part_tokens + 3) / 4 * 4;
    // What is left of 1 of each sample, and its share of the latest step, -1 if it had halted before.
    float* const left = room + 4 * WARPS;
    float* const step_share = left + SAMPLES;
    FourFloats* const kept = reinterpret_cast<FourFloats*>(reinterpret_cast<float4*>(room) + WARPS + (2 * SAMPLES + 3) / 4);

    float* const latent = scratch;
    float* const mean = latent + SAMPLES * size;
    float* const x = mean + SAMPLES * size;
    float* const q = x + SAMPLES * width;
    float* const m = q + SAMPLES * width;
    float4* const part_sums = reinterpret_cast<float4*>(m + SAMPLES * width);
    float4* const energies = part_sums + static_cast<long long>(SAMPLES) * num_parts * fours;
    float2* const part_tops = reinterpret_cast<float2*>(energies + SAMPLES * gridDim.x);

    Barrier barrier;
    if (threadIdx.x < SAMPLES) left[threadIdx.x] = 1;
    prefetch_rows(latent_in, of_width);
    for (int item = blockIdx.x; item < SAMPLES * num_parts; item += gridDim.x) {
        const int first = item % num_parts * part_tokens, count = min(part_tokens, num_tokens - first);
        const long long row = static_cast<long long>(item / num_parts) * num_tokens + first;
        prefetch(tokens + row * fours, static_cast<long long>(sizeof(FourFloats)) * count * fours);
    }

    for (int step = 0; step < num_steps; step++) {
        const bool is_last = step + 1 == num_steps;

        stage<size>(pairs, [&](int sample, int four) {
            const int place = sample * (size / 4) + four;
            return step == 0 ? widened(__ldg(latents + place)) : __ldcg(reinterpret_cast<const float4*>(latent) + place);
        });
        multiply(latent_in, of_width, pairs, sums, [&](int sample, int row, float sum) { x[sample * width + row] = sum; });
        barrier.arrive();
        prefetch_rows(query, of_width);
        barrier.wait();

        // The unit rows.
        float powers[SAMPLES], inverses[SAMPLES];
#pragma unroll
        for (int sample = 0; sample < SAMPLES; sample++) {
            const auto squares_of_row = [&](float factor) {
                float squares = 0;
                for (int four = threadIdx.x; four < fours; four += THREADS) {
                    const float4 values = scaled(reinterpret_cast<const float4*>(x)[sample * fours + four], factor);
                    squares = dot(values, values, squares);
                }
                return sum_of_block(squares, room);
            };
            float squares = squares_of_row(1);
            const float power = taming_power(squares);
            if (power < 1) squares = squares_of_row(power);
            powers[sample] = power;
            inverses[sample] = 1 / sqrtf(squares / width + eps * power * power);
        }
        stage<width>(pairs, [&](int sample, int four) {
            return scaled(scaled(reinterpret_cast<const float4*>(x)[sample * fours + four], inverses[sample]), powers[sample]);
        });
        multiply(query, of_width, pairs, sums, [&](int sample, int row, float sum) {
            q[sample * width + row] = sum + weight_at(step_rows, step, row);
        });
        barrier.arrive();
        prefetch_rows(latent_out, of_size);
        barrier.wait();

        // The tokens of a part. A thread has the same columns of each, so those in shared memory need no barrier.
        for (int item = blockIdx.x, held = 0; item < SAMPLES * num_parts; item += gridDim.x, held += part_tokens) {
            const int sample = item / num_parts, first = item % num_parts * part_tokens, count = min(part_tokens, num_tokens - first);
            if (HALTS && left[sample] == 0) continue;
            const FourFloats* const rows = tokens + (static_cast<long long>(sample) * num_tokens + first) * fours;
            // Read four columns of some tokens. All are on their way at once, from shared memory or from global memory.
            const auto read = [&](float4 (&columns)[TOKENS], int begin, int four, bool seen) {
                FourFloats values[TOKENS];
#pragma unroll
                for (int i = 0; i < TOKENS; i++) {
                    const long long token = min(begin + i, count - 1);
                    const FourFloats* const here = kept + (held + token) * fours + four;
                    values[i] = *(seen && held + token < kept_tokens ? here : rows + token * fours + four);
                }
#pragma unroll
                for (int i = 0; i < TOKENS; i++) {
                    const bool keeps = !seen && begin + i < count && held + begin + i < kept_tokens;
                    if (keeps) kept[static_cast<long long>(held + begin + i) * fours + four] = values[i];
                    columns[i] = widened(values[i]);
                }
            };
            for (int begin = 0; begin < count; begin += TOKENS) {
                float products[TOKENS] = {};
                for (int four = threadIdx.x; four < fours; four += THREADS) {
                    const float4 of_query = __ldcg(reinterpret_cast<const float4*>(q) + sample * fours + four);
                    float4 columns[TOKENS];
                    read(columns, begin, four, step > 0);
#pragma unroll
                    for (int i = 0; i < TOKENS; i++) products[i] = dot(of_query, columns[i], products[i]);
                }
                const float product = sum_of_each(products);
                if (lane % 8 == 0 && begin + lane / 8 < count) warp_scores[warp * part_tokens + begin + lane / 8] = product;
            }
            __syncthreads();
            const float root = sqrtf(static_cast<float>(width));
            for (int token = threadIdx.x; token < count; token += THREADS) {
                float product = 0;
#pragma unroll
                for (int i = 0; i < WARPS; i++) product += warp_scores[i * part_tokens + token];
                shares[token] = product / root;
            }
            __syncthreads();
            float top = -INF;
            for (int token = lane; token < count; token += 32) top = fmaxf(top, shares[token]);
            top = most_of_warp(top);
            // Scores of minus infinity have no share beside those of another part.
            const float base = top == -INF ? 0 : top;
            __syncthreads();
            for (int token = threadIdx.x; token < count; token += THREADS) shares[token] = expf(shares[token] - base);
            __syncthreads();
            float all = 0;
            for (int token = lane; token < count; token += 32) all += shares[token];
            all = sum_of_warp(all);
            if (threadIdx.x == 0) part_tops[item] = make_float2(top, all);
            for (int four = threadIdx.x; four < fours; four += THREADS) {
                float4 sum = make_float4(0, 0, 0, 0);
                for (int begin = 0; begin < count; begin += TOKENS) {
                    float4 columns[TOKENS];
                    read(columns, begin, four, true);
#pragma unroll
                    for (int i = 0; i < TOKENS; i++) {
                        if (begin + i < count) sum = add_scaled(sum, columns[i], shares[begin + i]);
                    }
                }
                part_sums[static_cast<long long>(item) * fours + four] = sum;
            }
            __syncthreads();
        }
        barrier.arrive();
        barrier.wait();

        // A warp adds up four columns of all parts, of a sample.
        for (int pair = warp; pair < SAMPLES * of_fours.count; pair += WARPS) {
            const int sample = pair / of_fours.count, four = of_fours.first + pair % of_fours.count;
            if (HALTS && left[sample] == 0) continue;
            float top = -INF;
            for (int part = lane; part < num_parts; part += 32) top = fmaxf(top, __ldcg(part_tops + sample * num_parts + part).x);
            top = most_of_warp(top);
            float4 sum = make_float4(0, 0, 0, 0);
            float all = 0;
            for (int part = lane; part < num_parts; part += 32) {
                const int item = sample * num_parts + part;
                const float2 of_part = __ldcg(part_tops + item);
                const float factor = expf(of_part.x - top);
                all = fmaf(of_part.y, factor, all);
                sum = add_scaled(sum, __ldcg(part_sums + static_cast<long long>(item) * fours + four), factor);
            }
            const float columns[4] = {sum.x, sum.y, sum.z, sum.w};
            const float column = sum_of_each(columns) / sum_of_warp(all);
            if (lane % 8 == 0) {
                const int place = sample * width + 4 * four + lane / 8;
                float power = powers[0], inverse = inverses[0];
#pragma unroll
                for (int i = 1; i < SAMPLES; i++) power = i == sample ? powers[i] : power, inverse = i == sample ? inverses[i] : inverse;
                m[place] = silu(__ldcg(x + place) * inverse * power + column);
            }
        }
        barrier.arrive();
        barrier.wait();

        stage<width>(pairs, [&](int sample, int four) { return __ldcg(reinterpret_cast<const float4*>(m) + sample * fours + four); });
        float4 energy[SAMPLES] = {};
        multiply(latent_out, of_size, pairs, sums, [&](int sample, int row, float pred) {
            const int place = sample * size + row;
            const float before = step == 0 ? first_latent(latents, place) : latent[place];
            const float after = fmaf(-steps[step].x, pred, before) * steps[step].y;
            latent[place] = after;
            if (!HALTS) {
                if (is_last) out[place] = narrowed(after);
            } else if (is_last) {
                const float sum = step == 0 ? 0 : mean[place];
                out[place] = narrowed(left[sample] > 0 ? sum + left[sample] * after : sum);
            } else {
                const float tame = ldexpf(1.0f, TAMING_LOG2), tame_after = after * tame, tame_pred = pred * tame;
                float4& of_sample = energy[sample];
                of_sample = make_float4(fmaf(after, after, of_sample.x), fmaf(pred, pred, of_sample.y),
                                        fmaf(tame_after, tame_after, of_sample.z), fmaf(tame_pred, tame_pred, of_sample.w));
            }
        });
        if (is_last) return;
        if (HALTS) {
#pragma unroll
            for (int sample = 0; sample < SAMPLES; sample++) {
                const float4 parts = energy[sample];
                const float4 all = make_float4(sum_of_block(parts.x, room), sum_of_block(parts.y, room), sum_of_block(parts.z, room),
                                               sum_of_block(parts.w, room));
                if (threadIdx.x == 0) energies[sample * gridDim.x + blockIdx.x] = all;
            }
        }
        barrier.arrive();
        prefetch_rows(latent_in, of_width);
        barrier.wait();
        if (HALTS) {
            if (warp < SAMPLES) {
                const int sample = warp;
                float4 all = make_float4(0, 0, 0, 0);
                for (int block = lane; block < gridDim.x; block += 32) {
                    all = add_scaled(all, __ldcg(energies + sample * gridDim.x + block), 1);
                }
                float signal = sum_of_warp(all.x), noise = sum_of_warp(all.y);
                const float tame_signal = sum_of_warp(all.z), tame_noise = sum_of_warp(all.w);
                const float power = taming_power(signal + noise), tame_eps = eps * power * power;
                if (power < 1) signal = tame_signal, noise = tame_noise;
                signal /= size, noise /= size;
                const float p = (signal + tame_eps) / (signal + noise + tame_eps), before = left[sample];
                const bool goes_on = before > 0 && 1 - before + p < threshold;
                __syncwarp();
                if (lane == 0) {
                    step_share[sample] = goes_on ? p : before > 0 ? before : -1;
                    left[sample] = goes_on ? before - p : 0;
                }
            }
            __syncthreads();
            bool all_halted = true;
#pragma unroll
            for (int sample = 0; sample < SAMPLES; sample++) all_halted = all_halted && left[sample] == 0;
#pragma unroll
            for (int sample = 0; sample < SAMPLES; sample++) {
                for (int row = threadIdx.x; row < of_size.count; row += THREADS) {
                    const int place = sample * size + of_size.first + row;
                    float sum = step == 0 ? 0 : mean[place];
                    // What a sample computes after it has halted does not count, even if it overflows.
                    if (step_share[sample] >= 0) sum += step_share[sample] * latent[place];
                    mean[place] = sum;
                    if (all_halted) out[place] = narrowed(sum);
                }
            }
            if (all_halted) return;
        }
    }
}
