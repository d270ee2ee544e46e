// The product of chunks with a few rows of x on the tensor cores: what `product.cu` and `denoise.cu` share.
//
// A warp multiplies tiles of 16 outputs by 8 rows of x with `mma.m16n8k16`. Thread 4 g + t of a warp has chunks of its own of the outputs g
// and g + 8, and multiplies with the row g of each eight of x. x is in shared memory, as the pairs of lanes of a word.

// Read what there is of a chunk at the end of a row, trits of 0 past the end.
__device__ __forceinline__ void read_end(unsigned (&words)[WORDS], const unsigned* row_of_words, int chunk, int row_words) {
#pragma unroll
    for (int i = 0; i < WORDS; i++) {
        const int word = chunk * WORDS + i;
        words[i] = word < row_words ? __ldg(row_of_words + word) : 0;
    }
}

// The words and levels of a thread's chunk, for the outputs g and g + 8.
struct Chunk {
    unsigned words[2][WORDS];
    unsigned levels[2][LEVEL_WORDS];

    // Read the chunk `at` of two rows. `last` is the last aligned word of the levels, and `is_end` says that rows may come near it.
    __device__ __forceinline__ void read(const unsigned* const (&words_of)[2], const signed char* const (&levels_of)[2], const unsigned* last,
                                         bool is_end, int at, int whole_chunks, int row_words, int row_groups) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            if (at < whole_chunks && !is_end) {
                read_words(words[half], words_of[half] + at * WORDS);
                read_levels<true>(levels[half], levels_of[half] + at * LEVELS, last, LEVELS);
            } else if (at < whole_chunks) {
                read_words(words[half], words_of[half] + at * WORDS);
                read_levels(levels[half], levels_of[half] + at * LEVELS, last, LEVELS);
            } else {
                read_end(words[half], words_of[half], at, row_words);
                read_levels(levels[half], levels_of[half] + at * LEVELS, last, row_groups - at * LEVELS);
            }
        }
    }
};

__device__ __forceinline__ void multiply_tiles(float (&sums)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Return whether a tile of 16 rows comes near the end of the levels: fewer than four rows, each with a level, follow it.
__device__ __forceinline__ bool is_near_end(long long first_row, long long num_rows) { return first_row + 16 + 4 > num_rows; }

// Pieces of 16 bytes that sixteen columns of x take in shared memory, two for each row. One more keeps the threads that read or
// write at the same time out of each other's banks.
__device__ __forceinline__ int pieces_of(int num_rows) { return 2 * num_rows + 1; }

// Add the products of a chunk to the sums, for each eight rows of x. `pairs` are those of x from the first column of the chunk on. A row past
// the last is read as the last.
template <int EIGHTS>
__device__ __forceinline__ void multiply_chunk(float (&sums)[EIGHTS][4], Chunk& chunk, const uint4* pairs, int num_rows) {
    const int g = threadIdx.x % 32 / 4;
#pragma unroll
    for (int half = 0; half < 2; half++) {
#pragma unroll
        for (int i = 0; i < LEVEL_WORDS; i++) chunk.levels[half][i] ^= 0x80808080u;
    }
#pragma unroll
    for (int word = 0; word < WORDS; word++) {
#pragma unroll
        for (int four = 0; four < 2; four++) {
            uint4 of_x[EIGHTS];
#pragma unroll
            for (int i = 0; i < EIGHTS; i++) of_x[i] = pairs[word * pieces_of(num_rows) + four * num_rows + min(8 * i + g, num_rows - 1)];
#pragma unroll
            for (int two = 0; two < 2; two++) {
                unsigned a[4];
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    a[i] = weights(chunk.words[i % 2][word], word, 4 * four + 2 * two + i / 2, chunk.levels[i % 2]);
                }
#pragma unroll
                for (int i = 0; i < EIGHTS; i++) multiply_tiles(sums[i], a, two ? of_x[i].z : of_x[i].x, two ? of_x[i].w : of_x[i].y);
            }
        }
    }
}
