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
// In a product a warp takes a piece of 512 columns of some rows, and a thread of it one word of each. A code of two bits, shifted to the top
// of a float, is 0, 2 or -2. Sums of the lanes of one group are multiplied by half its scale. x is EXPONENT powers of two smaller
// meanwhile, so that a sum before its scale overflows only where the product does.
//
// Constants that the host defines:
//   GROUP_SIZE, MANTISSA_BITS   of the four weights
//   FLOAT_BYTES     2 where latents and tokens are bfloat16, 4 where they are float32
//   SAMPLES         samples B
//   HALTS           1 where samples halt, else 0
//   THREADS         threads of a block
//   HUGE_LOG2, TAMING_LOG2   sum of squares from which on a row is huge, and by what it is multiplied then, as powers of two

constexpr int WARPS = THREADS / 32, EXPONENT = 5;
// Rows of a weight that a thread reads at once, as many as registers have room for, and tokens.
constexpr int ROWS = SAMPLES <= 2 ? 8 : 4, TOKENS = 4;
// Lanes between which all groups of a word start, and groups that a word can overlap.
constexpr int RUN = GROUP_SIZE % 16 == 0 ? 16 : GROUP_SIZE % 8 == 0 ? 8 : GROUP_SIZE % 4 == 0 ? 4 : 2;
constexpr int SPAN = (GROUP_SIZE - RUN + 16 + GROUP_SIZE - 1) / GROUP_SIZE;
constexpr float SMALLER = 1.0f / (1 << EXPONENT);
#define INF __int_as_float(0x7F800000)

#if FLOAT_BYTES == 2
typedef unsigned short Float;
typedef uint2 FourFloats;
__device__ __forceinline__ float widened(Float value) { return __uint_as_float(static_cast<unsigned>(value) << 16); }
__device__ __forceinline__ float4 widened(FourFloats bits) {
    return make_float4(__uint_as_float(bits.x << 16), __uint_as_float(bits.x & 0xFFFF0000u), __uint_as_float(bits.y << 16),
                       __uint_as_float(bits.y & 0xFFFF0000u));
}
__device__ __forceinline__ Float narrowed(float value) {
    Float bits;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}
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

struct Weight {
    const unsigned* words;
    const signed char* levels;
    int num_inputs;

    __device__ __forceinline__ int row_words() const { return (num_inputs + 15) / 16; }
    __device__ __forceinline__ int row_groups() const { return (num_inputs + GROUP_SIZE - 1) / GROUP_SIZE; }
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

__device__ __forceinline__ void prefetch_rows(const Weight& weight, Range rows) {
    const long long words = weight.row_words(), groups = weight.row_groups();
    prefetch(weight.words + rows.first * words, 4 * rows.count * words);
    prefetch(weight.levels + rows.first * groups, rows.count * groups);
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

// Words of a warp, their columns, and how many such pieces a row has.
constexpr int PIECE = 512;

__host__ __device__ __forceinline__ constexpr int pieces_of(int num_inputs) { return (num_inputs + PIECE - 1) / PIECE; }

// Return the place in shared memory of four columns of an operand. Neighbouring threads of a warp, which have neighbouring words, read
// neighbouring places.
__device__ __forceinline__ int place_of(int four) { return (four / 128 * 4 + four % 4) * 32 + four / 4 % 32; }

__device__ __forceinline__ int level_at(const signed char* at) {
    int level;
    asm("ld.global.nc.s8 %0, [%1];" : "=r"(level) : "l"(at));
    return level;
}

// Where a thread reads a weight: at a word of a row and the levels of the groups that the word overlaps, for rows from there on.
struct Place {
    const unsigned* words;
    const signed char* levels[SPAN];
    int row_words, row_groups, offset;
    bool inside;

    __device__ __forceinline__ Place(const Weight& weight, long long row, int word) {
        row_words = weight.row_words(), row_groups = weight.row_groups(), offset = word * 16 % GROUP_SIZE, inside = word < row_words;
        words = weight.words + row * row_words + word;
#pragma unroll
        for (int i = 0; i < SPAN; i++) {
            levels[i] = weight.levels + row * row_groups + min(word * 16 / GROUP_SIZE + i, row_groups - 1);
        }
    }

    // Turn to the next rows.
    __device__ __forceinline__ void go_on() {
        words += ROWS * row_words;
#pragma unroll
        for (int i = 0; i < SPAN; i++) levels[i] += ROWS * row_groups;
    }

    // Add the products of `count` rows with the operands of the word to the sums.
    __device__ __forceinline__ void multiply(float (&sums)[SAMPLES][ROWS], const float (&x)[SAMPLES][16], int count) const {
        unsigned codes[ROWS];
        int row_levels[ROWS][SPAN];
#pragma unroll
        for (int i = 0; i < ROWS; i++) {
            codes[i] = inside && i < count ? __ldg(words + i * row_words) : 0;
#pragma unroll
            for (int j = 0; j < SPAN; j++) row_levels[i][j] = i < count ? level_at(levels[j] + i * row_groups) : 0;
        }
#pragma unroll
        for (int i = 0; i < ROWS; i++) {
            if (i >= count) break;
            float scales[SPAN];
#pragma unroll
            for (int j = 0; j < SPAN; j++) {
                constexpr int SHIFT = 23 - MANTISSA_BITS;
                scales[j] = __int_as_float(row_levels[i][j] * (1 << SHIFT) + ((126 + EXPONENT) << 23));
            }
#pragma unroll
            for (int run = 0; run < 16; run += RUN) {
                float scale = scales[0], terms[SAMPLES] = {};
#pragma unroll
                for (int j = 1; j < SPAN; j++) {
                    if (run >= j * GROUP_SIZE) {
                        scale = scales[j];
                    } else if (run + GROUP_SIZE - RUN >= j * GROUP_SIZE) {
                        scale = offset + run >= j * GROUP_SIZE ? scales[j] : scale;
                    }
                }
#pragma unroll
                for (int lane = run; lane < run + RUN; lane++) {
                    const float twice = __uint_as_float((codes[i] << (30 - 2 * lane)) & 0xC0000000u);
#pragma unroll
                    for (int sample = 0; sample < SAMPLES; sample++) terms[sample] = fmaf(twice, x[sample][lane], terms[sample]);
                }
#pragma unroll
                for (int sample = 0; sample < SAMPLES; sample++) sums[sample][i] = fmaf(scale, terms[sample], sums[sample][i]);
            }
        }
    }
};

// Compute the products of a block's rows with the operands in `staged` [B, pieces, PIECE] (`place_of`), and give each to `use`.
//
// sums: room for [pieces, B, rows]. A row is cut in the same way on every grid and for any number of samples.
template <typename Use>
__device__ __forceinline__ void multiply(const Weight& weight, Range rows, const float4* staged, float* sums, Use use) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, pieces = pieces_of(weight.num_inputs);
    // Pieces of rows are dealt to warps in the order [piece, row].
    const int end = rows.count * pieces * (warp + 1) / WARPS;
    for (int begin = rows.count * pieces * warp / WARPS; begin < end;) {
        const int piece = begin / rows.count, last = min(end, (piece + 1) * rows.count);
        float x[SAMPLES][16];
#pragma unroll
        for (int sample = 0; sample < SAMPLES; sample++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float4 four = staged[((sample * pieces + piece) * 4 + i) * 32 + lane];
                x[sample][4 * i] = four.x, x[sample][4 * i + 1] = four.y, x[sample][4 * i + 2] = four.z, x[sample][4 * i + 3] = four.w;
            }
        }
        Place place(weight, rows.first + begin - piece * rows.count, piece * 32 + lane);
        float* to = sums + (piece * (SAMPLES - 1)) * rows.count + begin + lane / (32 / ROWS);
        for (; begin < last; begin += ROWS, to += ROWS) {
            const int count = min(last - begin, ROWS);
            float products[SAMPLES][ROWS] = {};
            place.multiply(products, x, count);
#pragma unroll
            for (int sample = 0; sample < SAMPLES; sample++) {
                const float sum = sum_of_each(products[sample]);
                if (lane % (32 / ROWS) == 0 && lane / (32 / ROWS) < count) to[sample * rows.count] = sum;
            }
            place.go_on();
        }
        begin = last;
    }
    __syncthreads();
#pragma unroll
    for (int sample = 0; sample < SAMPLES; sample++) {
        for (int row = threadIdx.x; row < rows.count; row += THREADS) {
            float sum = 0;
            for (int piece = 0; piece < pieces; piece++) sum += sums[(piece * SAMPLES + sample) * rows.count + row];
            use(sample, rows.first + row, sum);
        }
    }
}

// Return one weight of a matrix.
__device__ __forceinline__ float weight_at(const Weight& weight, long long row, int column) {
    const unsigned code = __ldg(weight.words + row * weight.row_words() + column / 16) >> (2 * (column % 16)) & 3;
    const int level = __ldg(weight.levels + row * weight.row_groups() + column / GROUP_SIZE);
    const float scale = __int_as_float((level + (127 << MANTISSA_BITS)) << (23 - MANTISSA_BITS));
    return code == 0 ? 0 : code == 1 ? scale : -scale;
}

// Put the operand of a product into shared memory, times a factor, with zeros past its end. `read` returns four columns.
template <typename Read>
__device__ __forceinline__ void stage(float4* staged, int num_inputs, float factor, Read read) {
    const int fours = num_inputs / 4, places = pieces_of(num_inputs) * (PIECE / 4);
#pragma unroll
    for (int sample = 0; sample < SAMPLES; sample++) {
        for (int four = threadIdx.x; four < places; four += THREADS) {
            const float4 values = four < fours ? read(sample, four) : make_float4(0, 0, 0, 0);
            staged[sample * places + place_of(four)] = scaled(values, factor);
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
             const signed char* __restrict__ out_levels, Float* __restrict__ out, float* scratch, float eps, float threshold, int size,
             int width, int num_tokens, int part_tokens, int kept_tokens, int sums_room, int num_steps, float2 step_0, float2 step_1,
             float2 step_2, float2 step_3, float2 step_4, float2 step_5, float2 step_6, float2 step_7) {
    const float2 steps[8] = {step_0, step_1, step_2, step_3, step_4, step_5, step_6, step_7};
    const Weight latent_in{in_words, in_levels, size}, query{query_words, query_levels, width};
    const Weight step_rows{step_words, step_levels, width}, latent_out{out_words, out_levels, width};
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, fours = width / 4;
    const int num_parts = (num_tokens + part_tokens - 1) / part_tokens;
    const Range of_size = range_of_block(size), of_width = range_of_block(width), of_fours = range_of_block(fours);

    extern __shared__ float4 shared[];
    float4* const staged = shared;
    float* const sums = reinterpret_cast<float*>(staged + SAMPLES * pieces_of(max(size, width)) * (PIECE / 4));
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
    for (int item = blockIdx.x; item < SAMPLES * num_parts; item += gridDim.x) {
        const int first = item % num_parts * part_tokens, count = min(part_tokens, num_tokens - first);
        const long long row = static_cast<long long>(item / num_parts) * num_tokens + first;
        prefetch(tokens + row * fours, static_cast<long long>(sizeof(FourFloats)) * count * fours);
    }

    for (int step = 0; step < num_steps; step++) {
        const bool is_last = step + 1 == num_steps;

        stage(staged, size, SMALLER, [&](int sample, int four) {
            const int place = sample * (size / 4) + four;
            return step == 0 ? widened(__ldg(latents + place)) : __ldcg(reinterpret_cast<const float4*>(latent) + place);
        });
        multiply(latent_in, of_width, staged, sums, [&](int sample, int row, float sum) { x[sample * width + row] = sum; });
        barrier.arrive();
        prefetch_rows(query, of_width);
        barrier.wait();

        // The unit rows. A thread has the columns that it put into shared memory.
        stage(staged, width, 1, [&](int sample, int four) { return __ldcg(reinterpret_cast<const float4*>(x) + sample * fours + four); });
        float powers[SAMPLES], inverses[SAMPLES];
#pragma unroll
        for (int sample = 0; sample < SAMPLES; sample++) {
            float4* const row = staged + sample * pieces_of(width) * (PIECE / 4);
            const auto squares_of_row = [&](float factor) {
                float squares = 0;
                for (int four = threadIdx.x; four < fours; four += THREADS) {
                    const float4 values = scaled(row[place_of(four)], factor);
                    squares = dot(values, values, squares);
                }
                return sum_of_block(squares, room);
            };
            float squares = squares_of_row(1);
            const float power = taming_power(squares);
            if (power < 1) squares = squares_of_row(power);
            powers[sample] = power;
            inverses[sample] = 1 / sqrtf(squares / width + eps * power * power);
            for (int four = threadIdx.x; four < fours; four += THREADS) {
                row[place_of(four)] = scaled(scaled(row[place_of(four)], power), inverses[sample] * SMALLER);
            }
        }
        __syncthreads();
        multiply(query, of_width, staged, sums, [&](int sample, int row, float sum) {
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
                m[place] = silu(__ldcg(x + place) * power * inverse + column);
            }
        }
        barrier.arrive();
        barrier.wait();

        stage(staged, width, SMALLER, [&](int sample, int four) { return __ldcg(reinterpret_cast<const float4*>(m) + sample * fours + four); });
        float4 energy[SAMPLES] = {};
        multiply(latent_out, of_size, staged, sums, [&](int sample, int row, float pred) {
            const int place = sample * size + row;
            const float before = step == 0 ? first_latent(latents, place) : latent[place];
            const float after = (before - steps[step].x * pred) * steps[step].y;
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
