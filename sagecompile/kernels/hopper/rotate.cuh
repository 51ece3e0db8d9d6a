// Rotation of a row of Q or K before INT8, the same of both, so that no score changes: see sagecompile.ops.quantize.
//
// Signs by a quadratic form of the channel's bits, then a Hadamard matrix over the channels: of all 64 or 128, or of 32
// of 96 at a time. An outlier is spread over that many, and the row's largest value, which is its scale, is small.
// A bit of the channel is a bit of the thread or of the value's index in it (see channel_of), and one step of the matrix
// a sum and a difference along it. Three of the bits are one multiplication by a matrix of 8 on the tensor cores, which
// brings values of other threads without shuffles; in TF32, whose rounding is a hundredth of INT8's.
#pragma once
#include "common.cuh"

constexpr int ROTATED = D == 96 ? 32 : D;
constexpr float ROTATION_SQUARED = 1.0f / ROTATED;  // what a product of two rotated rows is to be multiplied by

__device__ __forceinline__ unsigned to_tf32(float x) {
    unsigned y;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
    return y;
}

// Thread t's part of a row (see Row), not scaled; the result is in an order and with signs of its own. All threads of a
// warp must come here.
__device__ __forceinline__ void rotate(float (&x)[16]) {
    const unsigned lane = threadIdx.x % 32;
    const unsigned t0 = lane, t1 = lane >> 1, t2 = lane >> 2;  // bits of t, in each bit 0; of 64 channels t has no third
    if constexpr (D == 128) {
        const float sign = (t1 ^ t2) & 1 ? -1.0f : 1.0f;  // of the step, and negative too where t1 = t2 = 1
#pragma unroll
        for (int i = 0; i < 16; ++i) x[i] = fmaf(x[i], sign, __shfl_xor_sync(~0u, x[i], 4));
    }
    // The matrix: rows (bit 3 of the index, t1, t0), columns by which a thread gets (t1, t0, bit 3) of the result.
    const unsigned n0 = lane >> 2, n1 = lane >> 3, n2 = lane >> 4;
    const unsigned odd = (t0 & n1) ^ (D == 96 ? 0 : t1 & n2);
    unsigned first = odd << 31 | 0x3f800000u, second = (odd ^ n0 ^ (D == 64 ? t1 : 0)) << 31 | 0x3f800000u;
    if (D == 96 && ((t1 ^ n2) & 1)) first = second = 0;
#pragma unroll
    for (int i = 0; i < 8; i += 2) {
        if (i == 4) first ^= t0 << 31, second ^= t0 << 31;  // negative where bit 2 and t0 are 1
        const unsigned a[4] = {to_tf32(x[i]), to_tf32(x[i + 1]), to_tf32(x[i + 8]), to_tf32(x[i + 9])};
        asm volatile(
            "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%10, %10, %10, %10};"
            : "=f"(x[i]), "=f"(x[i + 8]), "=f"(x[i + 1]), "=f"(x[i + 9])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(first), "r"(second), "f"(0.0f));
    }
#pragma unroll
    for (int step = 1; step < 8; step *= 2) {
#pragma unroll
        for (int i = 0; i < 16; ++i) {
            if (i & step) continue;
            const float sum = x[i] + x[i + step], difference = x[i] - x[i + step];
            const bool negative = step == 1 && (i & 2);  // of the second, where bits 0 and 1 are 1
            x[i] = negative ? difference : sum;
            x[i + step] = negative ? sum : difference;
        }
    }
}
