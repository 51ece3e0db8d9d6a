// Rotation of a row of Q or K before INT8, the same of both, so that no score changes: see sagecompile.ops.quantize.
//
// Signs by a quadratic form of the channel's bits, then a Hadamard matrix over the channels: of all 64 or 128, or of 32
// of 96 at a time. An outlier is spread over that many, so that the row's largest value, its scale, is small.
// A bit of the channel is a bit of the thread or of the value's index in it (see channel_of), one step of the matrix
// a sum and a difference along it. Three or four of the bits are one multiplication on the tensor cores, which brings
// values of other threads without shuffles: of 16-bit values as they were read, else in TF32, whose rounding is a
// hundredth of INT8's. The result is not scaled, and in an order and with signs of its own.
#pragma once
#include "prologue.cuh"

constexpr int ROTATED = D == 96 ? 32 : D;
constexpr float ROTATION_SQUARED = 1.0f / ROTATED;  // what a product of two rotated rows is to be multiplied by

// Whether rows are rotated as they were read, which is exact.
constexpr bool DIRECT = ELEMENT == 2 && !NORM && ROPE == 0;

// The matrix of a multiplication: rows by bit 3 of the index, t1 and t0, as its operand wants them; columns so that a
// thread gets those of the result, too. Signs are masks of one or two floats in a word.
struct Rotation {
    unsigned first, second;  // of bit 3 of the index 0, and 1
    unsigned flip;           // of those with bit 2 of the index
    unsigned kept = ~0u;     // of 96 channels t1 stays what it is, and no other is added

    __device__ __forceinline__ Rotation() {
        constexpr unsigned both = 0x80008000u;
        const unsigned lane = threadIdx.x % 32;
        const unsigned t0 = lane, t1 = lane >> 1, n0 = lane >> 2, n1 = lane >> 3, n2 = lane >> 4;
        const unsigned odd = (t0 & n1) ^ (D == 96 ? 0 : t1 & n2);
        first = (odd & 1) * both;
        second = ((odd ^ n0 ^ (D == 64 ? t1 : 0)) & 1) * both;
        flip = (t0 & 1) * both;
        if (D == 96 && ((t1 ^ n2) & 1)) kept = 0;
    }

    // Not to be computed again for each row.
    __device__ __forceinline__ void keep() { asm volatile("" : "+r"(first), "+r"(second), "+r"(flip)); }
};

// The steps along bits `step` and up of the index, then along the thread's third bit, if it counts.
template <int first_step>
__device__ __forceinline__ void rotate_rest(float (&x)[16]) {
#pragma unroll
    for (int step = first_step; step < 8; step *= 2) {
#pragma unroll
        for (int i = 0; i < 16; ++i) {
            if (i & step) continue;
            const float sum = x[i] + x[i + step], difference = x[i] - x[i + step];
            const bool negative = step == 1 && (i & 2);  // of the second, where bits 0 and 1 are 1
            x[i] = negative ? difference : sum;
            x[i + step] = negative ? sum : difference;
        }
    }
    if constexpr (D == 128) {  // with the other t1, because what has t1 = t2 = 1 is negative
        const float sign = threadIdx.x & 4 ? -1.0f : 1.0f;
#pragma unroll
        for (int i = 0; i < 16; ++i) x[i] = fmaf(x[i], sign, __shfl_xor_sync(~0u, x[i], 6));
    }
}

__device__ __forceinline__ unsigned to_tf32(float x) {
    unsigned y;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
    return y;
}

// Thread t's part of a row (see Row). All threads of a warp must come here.
__device__ __forceinline__ void rotate(const Rotation& by, float (&x)[16]) {
    constexpr unsigned mask = 0x80000000u;
#pragma unroll
    for (int i = 0; i < 8; i += 2) {
        const unsigned one = (i < 4 ? 0x3f800000u : 0x3f800000u ^ by.flip & mask) & by.kept;
        const unsigned a[4] = {to_tf32(x[i]), to_tf32(x[i + 1]), to_tf32(x[i + 8]), to_tf32(x[i + 9])};
        asm volatile(
            "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%10, %10, %10, %10};"
            : "=f"(x[i]), "=f"(x[i + 8]), "=f"(x[i + 1]), "=f"(x[i + 9])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(one ^ by.first & mask), "r"(one ^ by.second & mask),
              "f"(0.0f));
    }
    rotate_rest<1>(x);
}

// The same of a row as it was read, which is not to be changed before.
__device__ __forceinline__ void rotate(const Rotation& by, const Row& row, float (&x)[16]) {
    unsigned words[8];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const uint4& v = row.words[i];
        words[4 * i] = v.x, words[4 * i + 1] = v.y, words[4 * i + 2] = v.z, words[4 * i + 3] = v.w;
    }
    constexpr unsigned ones = DTYPE == FLOAT16 ? 0x3c003c00u : 0x3f803f80u;
#pragma unroll
    for (int i = 0; i < 8; i += 4) {
        const unsigned* a = words + i / 2;
#pragma unroll
        for (unsigned e = 0; e < 2; ++e) {  // the result's bit 0 of the index: the other one where bits 0 and 1 are 1
            const unsigned one = ones ^ e << 31 ^ (i < 4 ? 0 : by.flip);
            const unsigned first = (one ^ by.first) & by.kept, second = (one ^ by.second) & by.kept;
            float &c0 = x[i + e], &c1 = x[i + e + 8], &c2 = x[i + 2 + (e ^ 1)], &c3 = x[i + 2 + (e ^ 1) + 8];
            if constexpr (DTYPE == FLOAT16)
                asm volatile(
                    "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                    "{%10, %10, %10, %10};"
                    : "=f"(c0), "=f"(c1), "=f"(c2), "=f"(c3)
                    : "r"(a[0]), "r"(a[1]), "r"(a[4]), "r"(a[5]), "r"(first), "r"(second), "f"(0.0f));
            else
                asm volatile(
                    "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                    "{%10, %10, %10, %10};"
                    : "=f"(c0), "=f"(c1), "=f"(c2), "=f"(c3)
                    : "r"(a[0]), "r"(a[1]), "r"(a[4]), "r"(a[5]), "r"(first), "r"(second), "f"(0.0f));
        }
    }
    rotate_rest<2>(x);
}
