// Chunks of a weight in the device layout, as operands of the tensor cores: what `product.cu` and `many_rows.cu` share.
//
// A chunk is 96 neighbouring columns of a row: six words, and whole groups. A step is the four chunks of the threads t of a warp, 384
// columns.
//
// A lane of two bits is 00, 01 or 11. Shifted to the top of a bfloat16 it is 0, +2 or -2. The lanes l and l + 8 of a word reach
// the top of their halves by one shift. One mask and one multiplication with half their scales make them weights.
//
// Constants that the host defines: GROUP_SIZE, MANTISSA_BITS, WORD_BYTES and LEVEL_BYTES, as the sources say.

constexpr int CHUNK = 96;
constexpr int WORDS = CHUNK / 16;
constexpr int LEVELS = CHUNK / GROUP_SIZE;
constexpr int LEVEL_WORDS = (LEVELS + 3) / 4;
constexpr int STEP = 4 * CHUNK;

__device__ __forceinline__ unsigned multiply(unsigned a, unsigned b) {
    unsigned product;
#if __CUDA_ARCH__ >= 900
    asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(product) : "r"(a), "r"(b));
#else
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(product) : "r"(a), "r"(b), "r"(0x80008000u));
#endif
    return product;
}

__device__ __forceinline__ unsigned short rounded(float value) {
    unsigned short bits;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}

// Read the levels of a chunk, of which the row has `there`. Those past the end are 0, since another byte might be no scale. Rows of
// levels start anywhere, so they are read as the aligned words around them, the last of which holds the end of the tensor. INSIDE says that
// the word after them is in the tensor too.
template <bool INSIDE = false>
__device__ __forceinline__ void read_levels(unsigned (&levels)[LEVEL_WORDS], const signed char* at, const unsigned* last, int there) {
    if constexpr (LEVEL_BYTES == 4) {
#pragma unroll
        for (int i = 0; i < LEVEL_WORDS; i++) levels[i] = 4 * i < there ? __ldg(reinterpret_cast<const unsigned*>(at) + i) : 0;
    } else {
        const unsigned long long address = reinterpret_cast<unsigned long long>(at);
        const unsigned* aligned = reinterpret_cast<const unsigned*>(address & ~3ull);
        const unsigned shift = 8 * (static_cast<unsigned>(address) & 3);
        unsigned low = __ldg(INSIDE || aligned < last ? aligned : last);
#pragma unroll
        for (int i = 0; i < LEVEL_WORDS; i++) {
            const unsigned* next = aligned + i + 1;
            const unsigned high = __ldg(INSIDE || next < last ? next : last);
            const int bytes = there - 4 * i;
            const unsigned kept = bytes >= 4 ? ~0u : bytes > 0 ? (1u << (8 * bytes)) - 1 : 0;
            levels[i] = __funnelshift_r(low, high, shift) & kept;
            low = high;
        }
    }
}

__device__ __forceinline__ void read_words(unsigned (&words)[WORDS], const unsigned* at) {
    if constexpr (WORD_BYTES == 8) {
#pragma unroll
        for (int i = 0; i < WORDS / 2; i++) {
            const uint2 pair = __ldg(reinterpret_cast<const uint2*>(at) + i);
            words[2 * i] = pair.x;
            words[2 * i + 1] = pair.y;
        }
    } else {
#pragma unroll
        for (int i = 0; i < WORDS; i++) words[i] = __ldg(at + i);
    }
}

// Return half the scales of the groups `low` and `high` of a chunk as a pair of bfloat16. `levels` are 128 higher than levels.
__device__ __forceinline__ unsigned half_scales(const unsigned (&levels)[LEVEL_WORDS], int low, int high) {
    unsigned pair;
    if (low / 4 == high / 4) {
        pair = __byte_perm(levels[low / 4], 0, 0x4040 | low % 4 | high % 4 << 8);
    } else {
        pair = __byte_perm(levels[low / 4], 0, 0x4440 | low % 4) | __byte_perm(levels[high / 4], 0, 0x4044 | high % 4 << 8);
    }
    // A level with the bias of bfloat16 is the top of its scale's bits; an exponent less by one is half of it.
    constexpr int bias = (((127 << MANTISSA_BITS) - 128) << (7 - MANTISSA_BITS)) - (1 << 7);
    return pair * (1u << (7 - MANTISSA_BITS)) + static_cast<unsigned>(bias * 0x10001);
}

// Return the pair of weights of the lanes `pair` and `pair` + 8 of a word of a chunk. `levels` are 128 higher than levels.
__device__ __forceinline__ unsigned weights(unsigned word, int word_place, int pair, const unsigned (&levels)[LEVEL_WORDS]) {
    const int column = 16 * word_place + pair;
    const unsigned trits = (word << (14 - 2 * pair)) & 0xC000C000u;
    return multiply(trits, half_scales(levels, column / GROUP_SIZE, (column + 8) / GROUP_SIZE));
}
