// Votes of a gradient, counted in the accumulators of a weight in the device layout: `accumulate_gradient`.
//
// Legend: N rows, K columns, KW words a row, KG groups a row, G columns a group, V row exponent.
//
// A thread takes 48 neighbouring columns of a row: three words and whole groups, so that a group's dither is made once, and its
// score is summed by one thread. A piece of its columns is read and written at a time.
//
// Constants that the host defines:
//   GROUP_SIZE       columns of a group; 48 columns are whole groups
//   GRADIENT_BYTES   2 for bfloat16, 4 for float32
//   EXPONENT_RULE    0 for `score`, 1 for `sign`, 2 for `frozen`
//   SCORE_SHIFT      bits by which a score is shifted to become a vote
//   COUNT_BYTES      4 where the exponent counts of every chunk start at a multiple of 4 bytes and fill such words, else 1
//   SILENT_ROW       exponent of a row that casts no votes
//   PIECE            columns of a piece: 16, or 8 where rows are an odd multiple of 8 columns
//   HAS_ROWS         1 where row ids say which row of the weight a row of the gradient votes for, else 0

constexpr int CHUNK = 48;
constexpr int GROUPS = CHUNK / GROUP_SIZE;
constexpr int BLOCKS = GROUP_SIZE / 16 + 1;

// The four words of Philox4x32-10.
struct Words {
    unsigned at[4];
};

// The counts of a piece, read and written at once.
struct alignas(PIECE) Counts {
    unsigned at[PIECE / 4];
};

__device__ __forceinline__ Words philox(unsigned c0, unsigned c1, unsigned c2, unsigned c3, unsigned k0, unsigned k1) {
#pragma unroll
    for (int round = 0; round < 10; round++) {
        const unsigned long long first = 0xD2511F53ull * c0, second = 0xCD9E8D57ull * c2;
        c0 = static_cast<unsigned>(second >> 32) ^ c1 ^ k0;
        c2 = static_cast<unsigned>(first >> 32) ^ c3 ^ k1;
        c1 = static_cast<unsigned>(second);
        c3 = static_cast<unsigned>(first);
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return {c0, c1, c2, c3};
}

__device__ __forceinline__ float power_of_two(int exponent) { return __int_as_float((exponent + 127) << 23); }

__device__ __forceinline__ int saturated(int count) { return min(max(count, -127), 127); }

__device__ __forceinline__ int byte_of(unsigned word, int place) {
    return static_cast<int>(word << (24 - 8 * place)) >> 24;
}

extern "C" __global__ void __launch_bounds__(256)
count_votes(const void* __restrict__ gradient, const int* __restrict__ row_exponents, const long long* __restrict__ rows,
            const unsigned* __restrict__ words, unsigned char* __restrict__ trit_counts, signed char* __restrict__ exponent_counts,
            const float* rate_at, float rate, const long long* step_at, unsigned step, unsigned tensor_id, unsigned seed_low,
            unsigned seed_high, unsigned first_group, long long num_chunks, int row_chunks, int num_columns, int row_words,
            int row_groups) {
    const long long id = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (id >= num_chunks) return;
    const long long slot = id / row_chunks;
    const int chunk = static_cast<int>(id - slot * row_chunks), column = chunk * CHUNK;
    const long long row = HAS_ROWS ? __ldg(rows + slot) : slot;
    // A negative row is an unused slot.
    if (HAS_ROWS && row < 0) return;
    if (rate_at) rate = *rate_at;
    if (step_at) step = static_cast<unsigned>(*step_at);

    // g * 2^(8 - V) is exact, and only its product with the rate rounds. So does g * (2^(8 - V) * rate), while that factor is
    // a normal number. Rows of other sizes take the power in two factors, and silent rows are zeros.
    const int exponent = row_exponents[slot], power = 8 - exponent, first_power = min(power, 100);
    const bool silent = exponent == SILENT_ROW;
    const bool plain = power >= -80 && power <= 80 && rate >= 9.313225746154785e-10f;
    const float factor = plain ? power_of_two(power) * rate : rate;

    unsigned dither[GROUPS][BLOCKS * 4];
#pragma unroll
    for (int i = 0; i < GROUPS; i++) {
        // The groups of a part of a table are dithered as those of the table.
        const unsigned group = static_cast<unsigned>(row * row_groups + chunk * GROUPS + i) + first_group;
#pragma unroll
        for (int block = 0; block < BLOCKS; block++) {
            const Words drawn = philox(group, block, step, tensor_id, seed_low, seed_high);
#pragma unroll
            for (int j = 0; j < 4; j++) dither[i][4 * block + j] = drawn.at[j];
        }
    }

    int scores[GROUPS] = {};
    const long long first = slot * num_columns + column, first_count = row * num_columns + column;
    unsigned trits = 0;
#pragma unroll
    for (int piece = 0; piece < CHUNK / PIECE; piece++) {
        if (column + PIECE * piece >= num_columns) break;
        const long long at = first + PIECE * piece;
        unsigned bits[PIECE];
        if constexpr (GRADIENT_BYTES == 2) {
#pragma unroll
            for (int i = 0; i < PIECE / 8; i++) {
                const uint4 eight = __ldg(reinterpret_cast<const uint4*>(static_cast<const unsigned short*>(gradient) + at) + i);
                const unsigned pairs[4] = {eight.x, eight.y, eight.z, eight.w};
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    bits[8 * i + 2 * j] = pairs[j] << 16;
                    bits[8 * i + 2 * j + 1] = pairs[j] & 0xFFFF0000u;
                }
            }
        } else {
#pragma unroll
            for (int i = 0; i < PIECE / 4; i++) {
                const uint4 four = __ldg(reinterpret_cast<const uint4*>(static_cast<const float*>(gradient) + at) + i);
                bits[4 * i] = four.x;
                bits[4 * i + 1] = four.y;
                bits[4 * i + 2] = four.z;
                bits[4 * i + 3] = four.w;
            }
        }
        if (!plain) {
#pragma unroll 1
            for (int twice = 0; twice < 2; twice++) {
                const float part = power_of_two(twice ? power - first_power : first_power);
#pragma unroll
                for (int i = 0; i < PIECE; i++) bits[i] = silent ? 0 : __float_as_uint(__uint_as_float(bits[i]) * part);
            }
        }
        Counts* counts_at = reinterpret_cast<Counts*>(trit_counts + first_count + PIECE * piece);
        const Counts counts = *counts_at;
        Counts after = {};
        if constexpr (EXPONENT_RULE != 2) {
            if (PIECE * piece % 16 == 0) trits = __ldg(words + row * row_words + column / 16 + PIECE * piece / 16);
        }
#pragma unroll
        for (int lane = 0; lane < PIECE; lane++) {
            const int place = PIECE * piece + lane, group = place / GROUP_SIZE, byte = place % GROUP_SIZE;
            // A vote is at most 127 in size. Beyond 127 * 256 no dither changes it.
            const float scaled = fminf(fmaxf(__uint_as_float(bits[lane]) * factor, -32512.0f), 32512.0f);
            // Adding 1.5 * 2^23 rounds half to even, and leaves the integer in the low bits.
            const unsigned rounded = __float_as_uint(scaled + 12582912.0f);
            const unsigned sum = __dp4a(dither[group][byte / 4], 1u << (8 * (byte % 4)), rounded);
            const int vote = static_cast<int>(sum >> 8) - 0x4B4000;
            const unsigned count = saturated(byte_of(counts.at[lane / 4], lane % 4) + vote);
            after.at[lane / 4] |= (count & 255) << (8 * (lane % 4));
            if constexpr (EXPONENT_RULE != 2) scores[group] += vote * (static_cast<int>(trits << (30 - 2 * (place % 16))) >> 30);
        }
        *counts_at = after;
    }

    if constexpr (EXPONENT_RULE != 2) {
        int votes[GROUPS];
#pragma unroll
        for (int i = 0; i < GROUPS; i++) {
            const unsigned byte = dither[i][GROUP_SIZE / 4] >> (8 * (GROUP_SIZE % 4)) & 255;
            if constexpr (EXPONENT_RULE == 0) {
                votes[i] = (scores[i] + static_cast<int>(byte >> (8 - SCORE_SHIFT))) >> SCORE_SHIFT;
            } else {
                votes[i] = (scores[i] > 0) - (scores[i] < 0);
            }
        }
        signed char* counts = exponent_counts + row * row_groups + chunk * GROUPS;
        if constexpr (COUNT_BYTES == 4) {
#pragma unroll
            for (int i = 0; i < GROUPS && chunk * GROUPS + i < row_groups; i += 4) {
                const unsigned before = *reinterpret_cast<const unsigned*>(counts + i);
                unsigned after = 0;
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    after |= (static_cast<unsigned>(saturated(byte_of(before, j) + votes[(i + j) % GROUPS])) & 255) << (8 * j);
                }
                *reinterpret_cast<unsigned*>(counts + i) = after;
            }
        } else {
#pragma unroll
            for (int i = 0; i < GROUPS; i++) {
                if (chunk * GROUPS + i < row_groups) counts[i] = static_cast<signed char>(saturated(counts[i] + votes[i]));
            }
        }
    }
}
