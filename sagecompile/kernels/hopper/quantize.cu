// K and V once from memory into tiles in the order that attention.cu multiplies them.
//
// In: k, v with any strides. Out: for each KV head and 128 tokens one block of KV_TILE bytes (common.cuh).
// K: minus the mean of a sample of its tokens (softmax does not see a vector subtracted from every key), then INT8 with
// one scale a tile. V: FP8 with the head's scale, or an outlying tile's own, or 16-bit; transposed, as tensor cores
// want the summed dimension contiguous. Nothing but a sample is needed of other tiles, so K and V come from memory
// once; the sample of K, as many tokens as a tile, comes from cache.
#include "common.cuh"

struct Parameters {
    Tensor k, v;
    char* tiles;
    int heads, length, head_dim, count;  // count: tiles of one head
};

static_assert(sizeof(Parameters) == PARAMETER_BYTES, "as in __init__.py");
static_assert(V_TILE == SHARED_BYTES && K_TILE <= V_TILE, "as in __init__.py");

constexpr int WARPS = TILE / 8;
constexpr int SAMPLE = TILE;  // tokens in the mean of K
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

// Threads of a quad then read from four different banks.
__device__ __forceinline__ int padded(int index) { return index + index / SHARE * 4; }

// Adds what the lane at this distance has: one of the two keeps the upper `half` channels, the other the lower ones.
template <int half>
__device__ __forceinline__ void halve(float (&x)[SHARE], bool upper, int distance) {
#pragma unroll
    for (int i = 0; i < half; ++i) {
        const float kept = upper ? x[half + i] : x[i], given = upper ? x[i] : x[half + i];
        x[i] = kept + __shfl_xor_sync(~0u, given, distance);
    }
}

// Each warp's sums over its part of evenly spaced tokens, one in each quad: thread t's channels from t * SHARE on.
__device__ __forceinline__ void sum_sample(const Parameters& p, int batch, int head, int count, float (*sums)[D + 16]) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, t = lane % 4;
    const int index = warp * 8 + lane / 4;
    const int64 token = static_cast<int64>(index) * p.length / count;
    Row raw;
    raw.load(p.k, p.k.row(batch, head, token), index < count, p.head_dim, t);
    float x[SHARE];
    raw.unpack(x);
    halve<SHARE / 2>(x, lane & 16, 16);
    halve<SHARE / 4>(x, lane & 8, 8);
    halve<SHARE / 8>(x, lane & 4, 4);
    const int first = (lane & 16 ? SHARE / 2 : 0) + (lane & 8 ? SHARE / 4 : 0) + (lane & 4 ? SHARE / 8 : 0);
#pragma unroll
    for (int i = 0; i < SHARE / 8; ++i) sums[warp][padded(t * SHARE + first + i)] = x[i];
}

// Bytes of shared memory to global memory; the last thing that a block does.
__device__ __forceinline__ void bulk_store(char* target, const char* staged, int bytes) {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");  // the copy must see what was just written
    __syncthreads();
    if (threadIdx.x == 0) {
        const unsigned source = static_cast<unsigned>(__cvta_generic_to_shared(staged));
        asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;\n"
                     "cp.async.bulk.commit_group;\n"
                     "cp.async.bulk.wait_group.read 0;" ::"l"(target), "r"(source), "r"(bytes) : "memory");
    }
}

__device__ __forceinline__ void quantize_k(const Parameters& p, int batch, int head, int first, char* tile,
                                           char* staged, unsigned* scratch) {
    __shared__ __align__(16) float sums[WARPS][D + 16];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, t = lane % 4;
    const int token = warp * 8 + lane / 4;
    const bool inside = first + token < p.length;
    const int count = min(SAMPLE, p.length);
    Row raw;
    raw.load(p.k, p.k.row(batch, head, first + token), inside, p.head_dim, t);
    sum_sample(p, batch, head, count, sums);
    __syncthreads();
    if (threadIdx.x < D) {
        float sum = 0.0f;
#pragma unroll
        for (int w = 0; w < WARPS; ++w) sum += sums[w][padded(threadIdx.x)];
        sums[0][padded(threadIdx.x)] = sum / count;
    }
    __syncthreads();
    float x[SHARE];
    raw.unpack(x);
#pragma unroll
    for (int i = 0; i < SHARE; ++i) x[i] = inside ? x[i] - sums[0][padded(t * SHARE + i)] : 0.0f;
    const unsigned bits = max_of_block(amax_bits(x), scratch);
    const float amax = fmaxf(__uint_as_float(bits), SMALLEST_AMAX);
    const float inverse = LARGEST_INT8 / amax;
    char* target = staged + position_of(token) * 16 + t * 4;
#pragma unroll
    for (int i = 0; i < SHARE / 4; ++i) {
        const float* v = x + 4 * i;
        const unsigned word = pack_int8(v[0] * inverse, v[1] * inverse, v[2] * inverse, v[3] * inverse);
        *reinterpret_cast<unsigned*>(target + i * (TILE * 16)) = word;
    }
    if (threadIdx.x == 0)
        reinterpret_cast<Header*>(tile + K_TILE)->k_scale = bits < INFINITY_BITS ? amax / LARGEST_INT8 : infinity();
    bulk_store(tile, staged, K_TILE);
}

// Eight adjacent channels of four adjacent tokens; zeros past the end.
__device__ __forceinline__ void load_values(const Parameters& p, int batch, int head, int token, int channel,
                                            float (&x)[4][8]) {
    constexpr int WORDS = 8 * ELEMENT / 4;
    unsigned words[4][WORDS] = {};
    if (p.v.vectors) {
#pragma unroll
        for (int n = 0; n < 4; ++n) {
            if (token + n >= p.length) continue;
            const char* row = p.v.row(batch, head, token + n) + channel * ELEMENT;
#pragma unroll
            for (int i = 0; i < WORDS; i += 4) {
                const uint4 v = *reinterpret_cast<const uint4*>(row + 4 * i);
                words[n][i] = v.x, words[n][i + 1] = v.y, words[n][i + 2] = v.z, words[n][i + 3] = v.w;
            }
        }
    } else {
#pragma unroll
        for (int n = 0; n < 4; ++n) {
            if (token + n >= p.length) continue;
            const char* row = p.v.row(batch, head, token + n);
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                if (channel + i >= p.head_dim) continue;
                const char* address = row + (channel + i) * p.v.channel;
                if constexpr (ELEMENT == 4) words[n][i] = *reinterpret_cast<const unsigned*>(address);
                else words[n][i / 2] |= *reinterpret_cast<const unsigned short*>(address) << (i % 2 * 16);
            }
        }
    }
#pragma unroll
    for (int n = 0; n < 4; ++n) {
#pragma unroll
        for (int i = 0; i < 8; i += 2) {
            const unsigned* in = words[n];
            float* out = x[n] + i;
            if constexpr (ELEMENT == 4) out[0] = __uint_as_float(in[i]), out[1] = __uint_as_float(in[i + 1]);
            else unpack_16(in[i / 2], out[0], out[1]);
        }
    }
}

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
    int above = 0;
#pragma unroll
    for (int i = 0; i < WARPS; ++i) {
        const unsigned other = __shfl_sync(~0u, mine, i);
        above += other > mine || (other == mine && i < lane % WARPS);
    }
    return __uint_as_float(__reduce_max_sync(~0u, above == 4 ? mine : 0));
}

__device__ __forceinline__ void quantize_v(const Parameters& p, int batch, int head, int first, char* tile,
                                           char* staged, unsigned* scratch) {
    // 4 tokens x 8 channels a thread; a warp has 8 groups of tokens x 4 octets of channels, adjacent in a row.
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int token = (warp % 4 * 8 + lane / 4) * 4, channel = (warp / 4 * 4 + lane % 4) * 8;
    float x[4][8] = {};
    if (channel < D) load_values(p, batch, head, first + token, channel, x);
    unsigned largest = 0;
#pragma unroll
    for (int n = 0; n < 4; ++n) largest = max(largest, amax_bits(x[n]));
    const unsigned bits = max_of_block(largest, scratch);
    const float amax = __uint_as_float(bits);
    // What 8 (16) bits can hold: bfloat16 of more than 2^100 could overflow where many are summed, P being up to 2^8.
    bool fine = bits < (DTYPE == FLOAT16 || FP8 ? INFINITY_BITS : 0x71800000u);
    float scale = 1.0f;
    if constexpr (FP8) {
        const float usual = usual_amax(p, batch, head, scratch + WARPS) * (HEADROOM / LARGEST_FP8);
        scale = fmaxf(fmaxf(amax / LARGEST_FP8, usual), SMALLEST_V_SCALE);
        const bool in_range = amax >= SMALLEST_V && amax <= LARGEST_V && scale <= MOST_OUTLYING * usual;
        fine = fine && (bits == 0 || in_range) && usual <= LARGEST_V;
    }
    const float inverse = 1.0f / scale;
    char* target = staged + token / CHUNK_TOKENS * (V_ROWS * 16) + token % CHUNK_TOKENS * V_BYTES;
#pragma unroll
    for (int c = 0; c < 8; ++c) {
        if (channel >= D) continue;
        char* address = target + row_of(channel + c) * 16;
        const float v[4] = {x[0][c], x[1][c], x[2][c], x[3][c]};
        if constexpr (FP8) {
            *reinterpret_cast<unsigned*>(address) =
                pack_fp8(v[0] * inverse, v[1] * inverse, v[2] * inverse, v[3] * inverse);
        } else {
            constexpr int type = DTYPE == FLOAT32 ? BFLOAT16 : DTYPE;
            *reinterpret_cast<uint2*>(address) = make_uint2(pack_16<type>(v[0], v[1]), pack_16<type>(v[2], v[3]));
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

// Grid: (KV heads of the batch * tiles, 2): blocks for K, and blocks for V.
extern "C" __global__ void __launch_bounds__(WARPS * 32, 2) quantize_kv(const __grid_constant__ Parameters p) {
    extern __shared__ __align__(128) char staged[];
    __shared__ unsigned scratch[2 * WARPS];
    const int row = blockIdx.x / p.count, first = blockIdx.x % p.count * TILE;
    const int batch = row / p.heads, head = row % p.heads;
    char* tile = p.tiles + static_cast<int64>(blockIdx.x) * KV_TILE;
    if (blockIdx.y == 0) quantize_k(p, batch, head, first, tile, staged, scratch);
    else quantize_v(p, batch, head, first, tile, staged, scratch);
}
