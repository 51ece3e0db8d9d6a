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
constexpr int SHARE = D / 4;       // channels of a row in one thread of a quad, see Row
constexpr int ELEMENT = DTYPE == FLOAT32 ? 4 : 2;

// A tile of K: D / 16 chunks of [128 tokens][16 bytes], then a header. A tile of V: chunks of [V_ROWS][16 bytes], which
// are D channels and eight rows of ones, so that PV sums the rows of P too. That is the order in which wgmma reads
// operands without a swizzle, so one bulk copy brings a whole tile.
constexpr int V_BYTES = FP8 ? 1 : 2;
constexpr int CHUNK_TOKENS = 16 / V_BYTES;
constexpr int K_TILE = TILE * D;
constexpr int K_TILE_WITH_HEADER = K_TILE + 128;
constexpr int V_ROWS = D + 8;
constexpr int V_TILE = TILE * V_ROWS * V_BYTES;
constexpr int KV_TILE = K_TILE_WITH_HEADER + V_TILE;

struct Header {
    float k_scale;          // of the INT8 values; +Inf if K of the tile is not finite
    float log2_v_scale;     // of the FP8 values: it joins the exponent of P, so that a tile's own costs nothing
    float inverse_v_scale;  // what one P of the tile counts in the sum of its row
    float v_limit;          // 0; +Inf if V of the tile is not finite, past its format, or so large that it ruins others
};

constexpr float LARGEST_INT8 = 127.0f;
constexpr float LARGEST_FP8 = 448.0f;
constexpr float SMALLEST_AMAX = 0x1p-119f;  // amax / 127 is a normal float, 127 / amax a finite one
constexpr float ROUNDING = 12582912.0f;     // 1.5 * 2^23: adding it leaves the nearest integer in the low mantissa bits
constexpr unsigned INFINITY_BITS = 0x7f800000u;

__device__ __forceinline__ float infinity() { return __int_as_float(INFINITY_BITS); }

__device__ __forceinline__ float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
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

// The two values of a word of 16-bit elements.
__device__ __forceinline__ void unpack_16(unsigned word, float& low, float& high) {
    if constexpr (DTYPE == BFLOAT16) {
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
    unpack_16(*reinterpret_cast<const unsigned short*>(address), low, high);
    return low;
}

// A (batch, heads, tokens, head_dim) tensor; strides in bytes.
struct Tensor {
    char* data;
    int64 batch, head, token, channel;
    int vectors;  // 1: head_dim is HEAD_DIM, channels are adjacent and every row starts at a multiple of 16 bytes

    __device__ __forceinline__ char* row(int b, int h, int64 n) const {
        return data + b * batch + h * head + n * token;
    }
};

// Thread t of a quad holds SHARE channels of a row: half of them from each half of the head, which leaves the pairs of
// both conventions of RoPE in one thread, and in the order in which an INT8 operand lies in the summed dimension:
// values [8 * s + 4 * h + i] are its bytes 32 * s + 16 * h + 4 * t + i.
struct Row {
    unsigned words[SHARE * ELEMENT / 4];

    // Zeros where not `inside` and past head_dim.
    __device__ __forceinline__ void load(const Tensor& x, const char* row, bool inside, int head_dim, int t) {
#pragma unroll
        for (int i = 0; i < SHARE * ELEMENT / 4; ++i) words[i] = 0;
        if (!inside) return;
        if (x.vectors) {
            constexpr int HALF = SHARE * ELEMENT / 8;  // words from one half of the head
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const char* p = row + (half * (D / 2) + t * (D / 8)) * ELEMENT;
#pragma unroll
                for (int i = 0; i < HALF; i += HALF % 4 ? 2 : 4) {
                    unsigned* out = words + half * HALF + i;
                    if constexpr (HALF % 4) {
                        const uint2 v = *reinterpret_cast<const uint2*>(p + 4 * i);
                        out[0] = v.x, out[1] = v.y;
                    } else {
                        const uint4 v = *reinterpret_cast<const uint4*>(p + 4 * i);
                        out[0] = v.x, out[1] = v.y, out[2] = v.z, out[3] = v.w;
                    }
                }
            }
        } else {
#pragma unroll
            for (int i = 0; i < SHARE; ++i) {
                const int channel = i / (SHARE / 2) * (D / 2) + t * (D / 8) + i % (SHARE / 2);
                if (channel >= head_dim) continue;
                const char* address = row + channel * x.channel;
                if constexpr (ELEMENT == 4) words[i] = *reinterpret_cast<const unsigned*>(address);
                else words[i / 2] |= *reinterpret_cast<const unsigned short*>(address) << (i % 2 * 16);
            }
        }
    }

    __device__ __forceinline__ void unpack(float (&values)[SHARE]) const {
#pragma unroll
        for (int i = 0; i < SHARE; i += 2) {
            const int half = i / (SHARE / 2), j = i % (SHARE / 2);
            float* out = values + j / 4 * 8 + half * 4 + j % 4;
            if constexpr (ELEMENT == 4) out[0] = __uint_as_float(words[i]), out[1] = __uint_as_float(words[i + 1]);
            else unpack_16(words[i / 2], out[0], out[1]);
        }
    }
};

// The largest |value| as bits of a float: at least INFINITY_BITS if one is not finite.
template <int count>
__device__ __forceinline__ unsigned amax_bits(const float (&values)[count]) {
    unsigned largest = 0;
#pragma unroll
    for (int i = 0; i < count; ++i) largest = max(largest, __float_as_uint(values[i]) & 0x7fffffffu);
    return largest;
}

__device__ __forceinline__ unsigned max_of_quad(unsigned x) {
    x = max(x, __shfl_xor_sync(~0u, x, 1));
    return max(x, __shfl_xor_sync(~0u, x, 2));
}
