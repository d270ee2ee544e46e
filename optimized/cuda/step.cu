// Trits whose count is full, moved by one level: the trits' half of `apply_step` without rows.
//
// Legend: theta, the count that moves a trit. Columns are a multiple of PIECE, so that the last word of a row has 16 or 8 trits.
//
// A thread has a word and its sixteen counts. Most words have no full count: these are not read, and nothing is written. Four
// counts, or all sixteen trits, are handled at once, as the bytes or bits of a word.
//
// Constants that the host defines:
//   CARRY   1 where a moved trit keeps the votes beyond theta, else 0
//   PIECE   columns that are read at once, 16 or 8. Rows of an odd multiple of 8 columns begin at multiples of 8 bytes

// Return a 1 in each byte of `counts` that is 128 + theta or more. `counts` are 1 to 255, and `add` is 128 - theta in both halves.
__device__ __forceinline__ unsigned full_bytes(unsigned counts, unsigned add) {
    // Half of the bytes at a time leave room for the carry, which is the answer.
    const unsigned even = (counts & 0x00FF00FFu) + add, odd = (counts >> 8 & 0x00FF00FFu) + add;
    return (even >> 8 & 0x00010001u) | (odd & 0x01000100u);
}

// Return the lowest bits of the four bytes of `flags` as the bits 0, 2, 4 and 6.
__device__ __forceinline__ unsigned gathered(unsigned flags) {
    // No two of the sixteen products fall on one bit, and four of them fall on the bits 18 to 24.
    return flags * 0x00041041u >> 18 & 0x55u;
}

extern "C" __global__ void __launch_bounds__(256)
step_trits(unsigned* __restrict__ words, unsigned char* __restrict__ trit_counts, long long num_words, int theta, int row_words,
           int num_columns) {
    const long long id = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (id >= num_words) return;
#if PIECE == 16
    uint4* const counts_of_word = reinterpret_cast<uint4*>(trit_counts) + id;
    const uint4 read = *counts_of_word;
#else
    const unsigned row = static_cast<unsigned>(id) / row_words, column = (static_cast<unsigned>(id) - row * row_words) * 16;
    uint2* const counts_of_word = reinterpret_cast<uint2*>(trit_counts + static_cast<long long>(row) * num_columns + column);
    // Lanes behind the end of a row have a count of 0, which is never full.
    const bool whole = column + 8 < num_columns;
    const uint2 first = counts_of_word[0], second = whole ? counts_of_word[1] : make_uint2(0, 0);
    const uint4 read = make_uint4(first.x, first.y, second.x, second.y);
#endif
    const unsigned add = (128u - theta) * 0x00010001u;
    unsigned counts[4] = {read.x, read.y, read.z, read.w};
    unsigned down[4], up[4], any = 0;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        // Counts from -127 to 127 become 1 to 255.
        counts[i] ^= 0x80808080u;
        down[i] = full_bytes(counts[i], add);
        // 256 less a count mirrors it. All bytes are at least 1, so that the sum of the complement and 1 does not carry.
        up[i] = full_bytes(~counts[i] + 0x01010101u, add);
        any |= down[i] | up[i];
    }
    if (!any) return;

    unsigned downs = 0, ups = 0;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        downs |= gathered(down[i]) << (8 * i);
        ups |= gathered(up[i]) << (8 * i);
        if (CARRY) {
            counts[i] = counts[i] - down[i] * theta + up[i] * theta;
        } else {
            const unsigned full = (down[i] | up[i]) * 255u;
            counts[i] = (counts[i] & ~full) | (full & 0x80808080u);
        }
        counts[i] ^= 0x80808080u;
    }
    // A trit is negative where its high bit is set, and not zero where its low bit is set.
    const unsigned word = words[id], high = word >> 1 & 0x55555555u, low = word & 0x55555555u, stay = ~(downs | ups);
    // Down: 0 and -1 become -1, and +1 becomes 0. Up: 0 and +1 become +1, and -1 becomes 0.
    const unsigned negative = downs & (high | ~low), positive = ups & ~high;
    words[id] = (((stay & high) | negative) << 1) | (stay & low) | negative | positive;
#if PIECE == 16
    *counts_of_word = make_uint4(counts[0], counts[1], counts[2], counts[3]);
#else
    counts_of_word[0] = make_uint2(counts[0], counts[1]);
    if (whole) counts_of_word[1] = make_uint2(counts[2], counts[3]);
#endif
}
