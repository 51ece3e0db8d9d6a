// What both kernels share: shapes fixed at compile time, the tile layout in memory, thin names for PTX instructions.
//
// Compile-time settings: HEAD_DIM (64, 96, 128), DTYPE (of q, k, v and out), FP8 (1: V and P in e4m3, 0: in 16 bits).
// PTX: https://docs.nvidia.com/cuda/parallel-thread-execution/ (wgmma, mbarrier, cp.async.bulk, cvt, ex2).
#pragma once

#define FLOAT16 0
#define BFLOAT16 1
#define FLOAT32 2

typedef long long int64;

constexpr int D = HEAD_DIM;
constexpr int TILE = 128;          // tokens of K and V in one tile
constexpr int ELEMENT = DTYPE == FLOAT32 ? 4 : 2;

// A tile of K: D / 16 chunks of [128 tokens][16 bytes], then a header. A tile of V: chunks of [V_ROWS][16 bytes], which
// are D channels and eight rows of ones, so that PV sums the rows of P too. That is the order in which wgmma reads
// operands without a swizzle, so one bulk copy brings a whole tile. 16 bytes between the chunks of K, and of Q, let the
// threads of a row write them to different banks.
constexpr int V_BYTES = FP8 ? 1 : 2;
constexpr int CHUNK_TOKENS = 16 / V_BYTES;
constexpr int K_CHUNK = TILE * 16 + 16, Q_CHUNK = 64 * 16 + 16;
constexpr int K_TILE = D / 16 * K_CHUNK;
constexpr int K_TILE_WITH_HEADER = K_TILE + 128;
constexpr int V_ROWS = D + 8;
constexpr int V_TILE = TILE * V_ROWS * V_BYTES;
constexpr int KV_TILE = K_TILE_WITH_HEADER + V_TILE;

struct Header {
    float k_scale;          // of the INT8 values, and what rotating Q and K takes; +Inf if K of the tile is not finite
    float log2_v_scale;     // of the FP8 values: it joins the exponent of P, so that a tile's own costs nothing
    float inverse_v_scale;  // what one P of the tile counts in the sum of its row
    float v_limit;          // 0; +Inf if V of the tile is not finite, past its format, or so large that it ruins others
};

constexpr float LARGEST_INT8 = 127.0f;
constexpr float LARGEST_FP8 = 448.0f;
constexpr float SMALLEST_AMAX = 0x1p-112f;  // amax / 127 / 128 is a normal float, 127 / amax a finite one
constexpr float ROUNDING = 12582912.0f;     // 1.5 * 2^23: adding it leaves the nearest integer in the low mantissa bits
constexpr unsigned INFINITY_BITS = 0x7f800000u;

__device__ __forceinline__ float infinity() { return __int_as_float(INFINITY_BITS); }

__device__ __forceinline__ float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ float reciprocal(float x) {
    float y;
    asm("rcp.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ float sqrt_approx(float x) {
    float y;
    asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ unsigned pack_fp8(float a, float b, float c, float d) {
    unsigned short low, high;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(low) : "f"(b), "f"(a));
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(high) : "f"(d), "f"(c));
    unsigned word;
    asm("mov.b32 %0, {%1, %2};" : "=r"(word) : "h"(low), "h"(high));
    return word;
}

template <int dtype>
__device__ __forceinline__ unsigned pack_16(float a, float b) {
    unsigned word;
    if constexpr (dtype == FLOAT16) asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(b), "f"(a));
    else asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(b), "f"(a));
    return word;
}

// Four values already scaled to [-127, 127], rounded to nearest even.
__device__ __forceinline__ unsigned pack_int8(float a, float b, float c, float d) {
    const unsigned low = __byte_perm(__float_as_uint(a + ROUNDING), __float_as_uint(b + ROUNDING), 0x0040);
    const unsigned high = __byte_perm(__float_as_uint(c + ROUNDING), __float_as_uint(d + ROUNDING), 0x0040);
    return __byte_perm(low, high, 0x5410);
}

// The larger ones of two words of float16.
__device__ __forceinline__ unsigned max_16(unsigned a, unsigned b) {
    unsigned larger;
    asm("max.f16x2 %0, %1, %2;" : "=r"(larger) : "r"(a), "r"(b));
    return larger;
}

template <int dtype>
__device__ __forceinline__ unsigned multiply_16(unsigned a, unsigned b) {
    unsigned word;
    if constexpr (dtype == FLOAT16) asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(word) : "r"(a), "r"(b));
    else asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(word) : "r"(a), "r"(b));
    return word;
}

// The two values of a word of 16-bit elements.
template <int dtype>
__device__ __forceinline__ void unpack_16(unsigned word, float& low, float& high) {
    if constexpr (dtype == BFLOAT16) {
        low = __uint_as_float(word << 16);
        high = __uint_as_float(word & 0xffff0000u);
    } else {
        asm("{.reg .f16 a, b; mov.b32 {a, b}, %2; cvt.f32.f16 %0, a; cvt.f32.f16 %1, b;}"
            : "=f"(low), "=f"(high) : "r"(word));
    }
}

__device__ __forceinline__ float load_element(const char* address) {
    if constexpr (DTYPE == FLOAT32) return *reinterpret_cast<const float*>(address);
    float low, high;
    unpack_16<DTYPE>(*reinterpret_cast<const unsigned short*>(address), low, high);
    return low;
}

// The values in 16 bytes: eight, or four in float32.
__device__ __forceinline__ void unpack_chunk(const uint4& words, float* x) {
    const unsigned w[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        if constexpr (ELEMENT == 4) x[i] = __uint_as_float(w[i]);
        else unpack_16<DTYPE>(w[i], x[2 * i], x[2 * i + 1]);
    }
}

// 16 bytes from global to shared memory, in the background; zeros if not `inside`.
__device__ __forceinline__ void copy_async(unsigned target, const char* source, bool inside) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(source), "r"(inside ? 16 : 0) : "memory");
}

__device__ __forceinline__ unsigned shared_address(const void* p) {
    return static_cast<unsigned>(__cvta_generic_to_shared(p));
}

__device__ __forceinline__ void barrier_init(unsigned barrier, int count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count));
}

__device__ __forceinline__ void barrier_expect(unsigned barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

__device__ __forceinline__ void barrier_arrive(unsigned barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ bool barrier_test(unsigned barrier, int parity) {
    unsigned done;
    asm volatile("{.reg .pred done; mbarrier.test_wait.parity.shared::cta.b64 done, [%1], %2; selp.u32 %0, 1, 0, done;}"
                 : "=r"(done) : "r"(barrier), "r"(parity) : "memory");
    return done;
}

// `done`: what an earlier test said, so that its latency is hidden.
__device__ __forceinline__ void barrier_wait(unsigned barrier, int parity, bool done = false) {
    if (done) return;
    asm volatile(
        "{.reg .pred done; AGAIN: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1; @!done bra AGAIN;}"
        ::"r"(barrier), "r"(parity) : "memory");
}

// `bytes` contiguous bytes of global memory into shared memory; the barrier counts them in.
__device__ __forceinline__ void bulk_load(unsigned target, const void* source, int bytes, unsigned barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                 ::"r"(target), "l"(source), "r"(bytes), "r"(barrier) : "memory");
}

// A (batch, heads, tokens, head_dim) tensor; strides in bytes.
struct Tensor {
    char* data;
    int64 batch, head, token, channel;
    int vectors;  // 1: head_dim is HEAD_DIM, channels are adjacent and every row starts at a multiple of 16 bytes

    __device__ __forceinline__ char* row(int b, int h, int64 n) const {
        return data + b * batch + h * head + n * token;
    }

    // 16 bytes of a row from some channel on, element by element; zeros from head_dim on.
    __device__ __forceinline__ uint4 gather(const char* row, int first, int head_dim) const {
        unsigned words[4] = {};
#pragma unroll
        for (int i = 0; i < 16 / ELEMENT; ++i) {
            if (first + i >= head_dim) continue;
            const char* address = row + (first + i) * channel;
            if constexpr (ELEMENT == 4) words[i] = *reinterpret_cast<const unsigned*>(address);
            else words[i / 2] |= *reinterpret_cast<const unsigned short*>(address) << (i % 2 * 16);
        }
        return make_uint4(words[0], words[1], words[2], words[3]);
    }
};

// LANES threads of a warp share a row of K or Q. Thread t < D / 16 of them has eight channels of each half of the head:
// all pairs of both conventions of RoPE, and 16 bytes of the INT8 operand, its chunk t.
constexpr int LANES = D == 64 ? 4 : 8;
constexpr int WARP_ROWS = 32 / LANES;

__device__ __forceinline__ int channel_of(int value, int t) { return value / 8 * (D / 2) + t * 8 + value % 8; }

struct Row {
    static constexpr int CHUNKS = ELEMENT;  // of 16 bytes
    uint4 words[CHUNKS];

    // Where a chunk is in its row, in bytes.
    static __device__ __forceinline__ int offset(int chunk, int t) {
        return channel_of(chunk * 16 / CHUNKS, t) * ELEMENT;
    }

    __device__ __forceinline__ void unpack(float (&x)[16]) const {
#pragma unroll
        for (int i = 0; i < CHUNKS; ++i) unpack_chunk(words[i], x + 16 / CHUNKS * i);
    }

    // Of 16-bit elements, by two in a word.
    __device__ __forceinline__ void multiply(const unsigned (&by)[8]) {
#pragma unroll
        for (int i = 0; i < CHUNKS; ++i) {
            words[i].x = multiply_16<DTYPE>(words[i].x, by[4 * i]), words[i].y = multiply_16<DTYPE>(words[i].y, by[4 * i + 1]);
            words[i].z = multiply_16<DTYPE>(words[i].z, by[4 * i + 2]), words[i].w = multiply_16<DTYPE>(words[i].w, by[4 * i + 3]);
        }
    }
};

// What balance.py says of a KV head, for each channel: factors of Q and of K, powers of two, and K's mean times K's.
constexpr int BASIS = 3 * D;

// Thread t's channels (see Row) of one of these.
__device__ __forceinline__ void load_channels(const float* from, int t, float (&x)[16]) {
#pragma unroll
    for (int i = 0; i < 16; i += 4) {
        float4 v = {};
        if (t < D / 16) v = *reinterpret_cast<const float4*>(from + channel_of(i, t));
        x[i] = v.x, x[i + 1] = v.y, x[i + 2] = v.z, x[i + 3] = v.w;
    }
}

// Factors, by two in a word as rows of 16-bit elements have them.
__device__ __forceinline__ void pack_factors(const float (&x)[16], unsigned (&words)[8]) {
#pragma unroll
    for (int i = 0; i < 8; ++i) words[i] = pack_16<DTYPE == FLOAT16 ? FLOAT16 : BFLOAT16>(x[2 * i], x[2 * i + 1]);
}

// The largest of LANES threads.
__device__ __forceinline__ unsigned max_of_row(unsigned x) {
#pragma unroll
    for (int distance = 1; distance < LANES; distance *= 2) x = max(x, __shfl_xor_sync(~0u, x, distance));
    return x;
}

// Sixteen values as INT8.
__device__ __forceinline__ uint4 pack_row(const float (&x)[16], float inverse) {
    unsigned words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float* v = x + 4 * i;
        words[i] = pack_int8(v[0] * inverse, v[1] * inverse, v[2] * inverse, v[3] * inverse);
    }
    return make_uint4(words[0], words[1], words[2], words[3]);
}

// The largest |value| as bits of a float: at least INFINITY_BITS if one is not finite.
template <int count>
__device__ __forceinline__ unsigned amax_bits(const float (&values)[count]) {
    float largest = 0.0f;
#pragma unroll
    for (int i = 0; i < count; ++i) asm("max.NaN.f32 %0, %0, %1;" : "+f"(largest) : "f"(fabsf(values[i])));
    return __float_as_uint(largest) & 0x7fffffffu;
}
