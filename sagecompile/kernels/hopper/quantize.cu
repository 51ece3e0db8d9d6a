// K and V once from memory into tiles in the order that attention.cu multiplies them.
//
// In: k, v with any strides. Out: for each KV head and 128 tokens one block of KV_TILE bytes (common.cuh).
// K: RMSNorm and RoPE if asked for, each channel times its factor, minus the mean of a sample of its tokens (softmax does
// not see a vector subtracted from every key), rotated (rotate.cuh), then INT8 with one scale a tile. Factors and mean
// come from balance.py's kernel, the launch before. V: FP8 with the head's scale, or an outlying tile's own, or 16-bit;
// transposed, as tensor cores want the summed dimension contiguous. So K and V come from memory once. What limits is that
// memory: each block takes many tiles of K, or of V, one after the other, and the rows of the next ones are on their way
// into shared memory meanwhile.
#include "rotate.cuh"

struct Parameters {
    Tensor k, v;
    Prologue prologue;  // of k
    const float* basis;
    char* tiles;
    int heads, length, head_dim;
    int count, all;  // tiles of one head, and of all
    int k_blocks;    // blocks that share the tiles of K; the others share those of V
};

static_assert(sizeof(Parameters) == PARAMETER_BYTES, "as in __init__.py");

constexpr int WARPS = 16, THREADS = 32 * WARPS;
constexpr int PASSES = TILE * LANES / THREADS;  // rows of K in one thread
constexpr int STAGES = 2;
constexpr int CHUNKS = 2 * ELEMENT;  // of 16 bytes in one thread, of a tile of V and at most of K
constexpr int STAGE = CHUNKS * THREADS * 16;
constexpr int STAGED = (K_TILE > V_TILE ? K_TILE : V_TILE);
static_assert(STAGED + STAGES * STAGE == SHARED_BYTES, "as in __init__.py");

// The scale of V is the head's, with room for values that are larger than usual. Only a tile with still larger ones has
// its own, and makes P of all others so much smaller: too small to be summed beyond MOST_OUTLYING.
constexpr float HEADROOM = 16.0f, MOST_OUTLYING = 256.0f;
// Outside this range of a tile's largest |V| (but for zero) FP8 with the scale in P's exponents is not safe.
constexpr float SMALLEST_V = 0x1p-40f, LARGEST_V = 0x1p60f;
constexpr float SMALLEST_V_SCALE = 0x1p-30f / LARGEST_FP8;

__device__ __forceinline__ unsigned max_of_block(unsigned x, unsigned* scratch) {
    x = __reduce_max_sync(~0u, x);
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
    __syncthreads();
    x = scratch[0];
#pragma unroll
    for (int i = 1; i < WARPS; ++i) x = max(x, scratch[i]);
    return x;
}

// Where a token of K is stored in its tile; V keeps its order. With FP8, inside each 16, token 4t + 2h + b is in row
// 8h + 2t + b: a thread of the 32-bit result of QK^T holds columns 8h + 2t + b, and the FP8 operand of PV wants
// 4t + 2h + b there.
__device__ __forceinline__ int position_of(int token) {
    if constexpr (!FP8) return token;
    return (token & ~15) | (token >> 1 & 1) << 3 | (token >> 2 & 3) << 1 | (token & 1);
}

// Where a channel of V is stored: a thread of the result of PV then holds 8 adjacent channels at a time.
__device__ __forceinline__ int row_of(int channel) {
    return channel / 32 * 32 + channel / 2 % 4 * 8 + channel / 8 % 4 * 2 + channel % 2;
}

// Where thread t of a row finds what it needs of its channels: all threads in different banks.
constexpr int MEAN_PITCH = 20, FACTOR_PITCH = DIRECT ? 12 : 20;

// Of the head whose K is quantized: its mean, rotated if rows are before it is subtracted, and its channels' factors, by
// two in a word where rows are of 16 bits still.
struct Basis {
    float mean[LANES * MEAN_PITCH];
    unsigned factor[LANES * FACTOR_PITCH];

    // All threads of the block must come here.
    __device__ __forceinline__ void take(const float* from, const Rotation& rotation) {
        if (threadIdx.x < 32) {  // all rows of a warp are the mean here
            const int t = threadIdx.x % LANES;
            float x[16], f[16];
            load_channels(from + D, t, f);
            load_channels(from + 2 * D, t, x);
            if constexpr (DIRECT) rotate(rotation, x);
            if (threadIdx.x < LANES) {
#pragma unroll
                for (int i = 0; i < 16; ++i) mean[t * MEAN_PITCH + i] = x[i];
                if constexpr (DIRECT) {
                    unsigned words[8];
                    pack_factors(f, words);
#pragma unroll
                    for (int i = 0; i < 8; ++i) factor[t * FACTOR_PITCH + i] = words[i];
                } else {
#pragma unroll
                    for (int i = 0; i < 16; ++i) factor[t * FACTOR_PITCH + i] = __float_as_uint(f[i]);
                }
            }
        }
        __syncthreads();
    }
};

// Bytes of shared memory to global memory, in the background until bulk_stored.
__device__ __forceinline__ void bulk_store(char* target, const char* staged, int bytes) {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");  // the copy must see what was just written
    __syncthreads();
    if (threadIdx.x == 0)
        asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;\n"
                     "cp.async.bulk.commit_group;" ::"l"(target), "r"(shared_address(staged)), "r"(bytes) : "memory");
}

__device__ __forceinline__ void bulk_stored() {
    if (threadIdx.x == 0) asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}

// Between the first and the second half of a tile: what was staged before is stored, and all threads know the maximum.
__device__ __forceinline__ unsigned max_of_tile(unsigned largest, unsigned* scratch) {
    bulk_stored();
    return max_of_block(largest, scratch);
}

// A tile: its head, and its first token.
struct Position {
    int batch, head;
    int64 first;
    __device__ __forceinline__ Position(const Parameters& p, int tile)
        : batch(tile / p.count / p.heads), head(tile / p.count % p.heads), first(tile % p.count * TILE) {}

    __device__ __forceinline__ void advance(const Parameters& p) {
        if ((first += TILE) < p.length) return;
        first = 0;
        if (++head == p.heads) head = 0, ++batch;
    }
};

// This thread's part of a tile: from memory by chunks of 16 bytes, then quantized.
struct KeyTile {
    static constexpr bool OF_K = true;
    static constexpr int CHUNKS = PASSES * Row::CHUNKS;
    static __device__ __forceinline__ int t() { return threadIdx.x % LANES; }
    static __device__ __forceinline__ bool is_mine() { return t() < D / 16; }
    static __device__ __forceinline__ int token(int chunk) {
        return (chunk / Row::CHUNKS * WARPS + threadIdx.x / 32) * WARP_ROWS + threadIdx.x % 32 / LANES;
    }
    static __device__ __forceinline__ int channel(int chunk) { return Row::offset(chunk % Row::CHUNKS, t()) / ELEMENT; }

    static __device__ __forceinline__ void quantize(const Parameters& p, const uint4 (&words)[CHUNKS],
                                                    const Position& at, const Rotation& rotation, const Basis& basis,
                                                    char* tile, char* staged, unsigned* scratch) {
        float x[PASSES][16];
        unsigned largest = 0;
#pragma unroll
        for (int pass = 0; pass < PASSES; ++pass) {
            Row raw;
#pragma unroll
            for (int i = 0; i < Row::CHUNKS; ++i) raw.words[i] = words[pass * Row::CHUNKS + i];
            const int64 n = at.first + token(pass * Row::CHUNKS);
            const bool inside = n < p.length;
            const float* shift = basis.mean + t() * MEAN_PITCH;
            const unsigned* factor = basis.factor + t() * FACTOR_PITCH;
            if constexpr (DIRECT) {
                unsigned by[8];
#pragma unroll
                for (int i = 0; i < 8; ++i) by[i] = factor[i];
                raw.multiply(by);
                rotate(rotation, raw, x[pass]);
                const float minus = inside ? -1.0f : 0.0f;  // of a mean that is not finite no tile is used
#pragma unroll
                for (int i = 0; i < 16; ++i) x[pass][i] = fmaf(shift[i], minus, x[pass][i]);
            } else {
                raw.unpack(x[pass]);
                p.prologue.apply(x[pass], at.batch, n, inside, t());
                if (inside && is_mine()) {
#pragma unroll
                    for (int i = 0; i < 16; ++i)
                        x[pass][i] = fmaf(x[pass][i], __uint_as_float(factor[i]), -shift[i]);
                }
                rotate(rotation, x[pass]);
            }
            largest = max(largest, amax_bits(x[pass]));
        }
        const unsigned bits = max_of_tile(largest, scratch);
        const float amax = fmaxf(__uint_as_float(bits), SMALLEST_AMAX);
        if (is_mine()) {
#pragma unroll
            for (int pass = 0; pass < PASSES; ++pass)
                *reinterpret_cast<uint4*>(staged + t() * K_CHUNK + position_of(token(pass * Row::CHUNKS)) * 16) =
                    pack_row(x[pass], LARGEST_INT8 * reciprocal(amax));
        }
        if (threadIdx.x == 0)
            reinterpret_cast<Header*>(tile + K_TILE)->k_scale =
                bits < INFINITY_BITS ? amax * (ROTATION_SQUARED / LARGEST_INT8) : infinity();
        bulk_store(tile, staged, K_TILE);
    }
};

// Four adjacent tokens x eight adjacent channels; a warp has 8 groups of tokens x 4 octets of channels.
struct ValueTile {
    static constexpr bool OF_K = false;
    static constexpr int CHUNKS = ::CHUNKS;
    static __device__ __forceinline__ int token(int chunk) {
        return (threadIdx.x / 32 % 4 * 8 + threadIdx.x % 32 / 4) * 4 + chunk / (CHUNKS / 4);
    }
    static __device__ __forceinline__ bool is_mine() { return channel(0) < D; }
    static __device__ __forceinline__ int channel(int chunk) {
        return (threadIdx.x / 128 * 4 + threadIdx.x % 4) * 8 + chunk % (CHUNKS / 4) * 4;
    }

    static __device__ __forceinline__ void quantize(const Parameters& p, const uint4 (&words)[CHUNKS], float usual,
                                                    char* tile, char* staged, unsigned* scratch) {
        float x[4][8];
        unsigned largest = 0;
#pragma unroll
        for (int n = 0; n < 4; ++n) {
#pragma unroll
            for (int i = 0; i < CHUNKS / 4; ++i) unpack_chunk(words[n * (CHUNKS / 4) + i], x[n] + 4 * i);
            largest = max(largest, amax_bits(x[n]));
        }
        const unsigned bits = max_of_tile(largest, scratch);
        const float amax = __uint_as_float(bits);
        // What 8 (16) bits can hold: bfloat16 of more than 2^100 could overflow where many are summed, P being up to 2^8.
        bool fine = bits < (DTYPE == FLOAT16 || FP8 ? INFINITY_BITS : 0x71800000u);
        float scale = 1.0f;
        if constexpr (FP8) {
            const float usual_scale = usual * (HEADROOM / LARGEST_FP8);
            scale = fmaxf(fmaxf(amax * (1.0f / LARGEST_FP8), usual_scale), SMALLEST_V_SCALE);
            const bool in_range = amax >= SMALLEST_V && amax <= LARGEST_V && scale <= MOST_OUTLYING * usual_scale;
            fine = fine && (bits == 0 || in_range) && usual_scale <= LARGEST_V;
        }
        const float inverse = reciprocal(scale);
        char* target = staged + token(0) / CHUNK_TOKENS * (V_ROWS * 16) + token(0) % CHUNK_TOKENS * V_BYTES;
        if (is_mine()) {
#pragma unroll
            for (int c = 0; c < 8; ++c) {
                char* address = target + row_of(channel(0) + c) * 16;
                const float v[4] = {x[0][c], x[1][c], x[2][c], x[3][c]};
                if constexpr (FP8) {
                    *reinterpret_cast<unsigned*>(address) =
                        pack_fp8(v[0] * inverse, v[1] * inverse, v[2] * inverse, v[3] * inverse);
                } else {
                    constexpr int type = DTYPE == FLOAT32 ? BFLOAT16 : DTYPE;
                    *reinterpret_cast<uint2*>(address) = make_uint2(pack_16<type>(v[0], v[1]), pack_16<type>(v[2], v[3]));
                }
            }
        }
        if (threadIdx.x < TILE * V_BYTES / 2) {  // the ones: 16 bytes of a row each
            constexpr unsigned word = FP8 ? 0x38383838u : DTYPE == FLOAT16 ? 0x3c003c00u : 0x3f803f80u;
            *reinterpret_cast<uint4*>(staged + threadIdx.x / 8 * (V_ROWS * 16) + (D + threadIdx.x % 8) * 16) =
                make_uint4(word, word, word, word);
        }
        if (threadIdx.x == 0) {
            Header* header = reinterpret_cast<Header*>(tile + K_TILE);
            header->log2_v_scale = log2f(scale);
            header->inverse_v_scale = inverse;
            header->v_limit = fine ? 0.0f : infinity();
        }
        bulk_store(tile + K_TILE_WITH_HEADER, staged, V_TILE);
    }
};

// What |V| of the head usually reaches: of 16 evenly spaced tokens, one a warp, the maximum that four of them pass. So
// neither up to four outlying tokens nor up to eleven of zeros count.
__device__ __forceinline__ float usual_amax(const Parameters& p, int batch, int head, unsigned* scratch) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const char* row = p.v.row(batch, head, static_cast<int64>(warp) * p.length / WARPS);
    unsigned largest = 0;
    for (int channel = lane; channel < p.head_dim; channel += 32)
        largest = max(largest, __float_as_uint(load_element(row + channel * p.v.channel)) & 0x7fffffffu);
    largest = __reduce_max_sync(~0u, largest);
    if (lane == 0) scratch[warp] = largest;
    __syncthreads();
    const unsigned mine = scratch[lane % WARPS];
    __syncthreads();  // before scratch is used again
    int above = 0;
#pragma unroll
    for (int i = 0; i < WARPS; ++i) {
        const unsigned other = __shfl_sync(~0u, mine, i);
        above += other > mine || (other == mine && i < lane % WARPS);
    }
    return __uint_as_float(__reduce_max_sync(~0u, above == 4 ? mine : 0));
}

// Tiles from `begin` on, to the one before `end`, one after the other. Each thread copies what it will need itself, so
// that it waits for nobody else's copies.
template <class Tile>
__device__ __forceinline__ void quantize(const Parameters& p, const Tensor& x, int begin, int end) {
    extern __shared__ __align__(128) char staged[];
    __shared__ __align__(16) Basis basis;
    __shared__ unsigned scratch[WARPS];
    char* own = staged + STAGED + threadIdx.x * 16;

    const auto chunk_of = [&](int item, int i) -> char* {
        return own + ((item - begin) % STAGES * CHUNKS + i) * (THREADS * 16);
    };
    Position coming(p, begin);
    const auto request = [&](int item) {
        if (x.vectors && item < end) {
            const char* head = x.row(coming.batch, coming.head, coming.first);
#pragma unroll
            for (int i = 0; i < Tile::CHUNKS; ++i)
                copy_async(shared_address(chunk_of(item, i)),
                           head + Tile::token(i) * x.token + Tile::channel(i) * ELEMENT,
                           Tile::is_mine() && coming.first + Tile::token(i) < p.length);
        }
        coming.advance(p);
        asm volatile("cp.async.commit_group;" ::: "memory");
    };

    for (int i = 0; i < STAGES; ++i) request(begin + i);
    if constexpr (Tile::OF_K) asm volatile("griddepcontrol.wait;" ::: "memory");  // for the factors and the mean
    // `attend` may take multiprocessors as they become free. It reads factors, too, which are there since all of K's
    // blocks came here.
    asm volatile("griddepcontrol.launch_dependents;");
    Position at(p, begin);
    Rotation rotation;
    if constexpr (Tile::OF_K && DIRECT && D != 96) rotation.keep();  // else there are no registers for it
    float usual = 0.0f;
    for (int item = begin; item < end; ++item, at.advance(p)) {
        if (item == begin || at.first == 0) {  // of a head the first tile here
            if constexpr (Tile::OF_K) basis.take(p.basis + (at.batch * p.heads + at.head) * BASIS, rotation);
            else if constexpr (FP8) usual = usual_amax(p, at.batch, at.head, scratch);
        }
        uint4 words[Tile::CHUNKS] = {};
        asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 1) : "memory");
#pragma unroll
        for (int i = 0; i < Tile::CHUNKS; ++i) {
            const int64 n = at.first + Tile::token(i);
            if (x.vectors) words[i] = *reinterpret_cast<uint4*>(chunk_of(item, i));
            else if (Tile::is_mine() && n < p.length)
                words[i] = x.gather(x.row(at.batch, at.head, n), Tile::channel(i), p.head_dim);
        }
        request(item + STAGES);
        char* tile = p.tiles + static_cast<int64>(item) * KV_TILE;
        if constexpr (Tile::OF_K) Tile::quantize(p, words, at, rotation, basis, tile, staged, scratch);
        else Tile::quantize(p, words, usual, tile, staged, scratch);
    }
    bulk_stored();
}

// Grid: two blocks a multiprocessor, which run at the same time but in float32.
extern "C" __global__ void __launch_bounds__(THREADS, 2) quantize_kv(const __grid_constant__ Parameters p) {
    const bool of_k = blockIdx.x < p.k_blocks;
    const int64 block = of_k ? blockIdx.x : blockIdx.x - p.k_blocks;
    const int64 blocks = of_k ? p.k_blocks : gridDim.x - p.k_blocks;
    const int begin = block * p.all / blocks, end = (block + 1) * p.all / blocks;
    if (of_k) quantize<KeyTile>(p, p.k, begin, end);
    else quantize<ValueTile>(p, p.v, begin, end);
}
