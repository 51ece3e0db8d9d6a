// RMSNorm and RoPE of a row of Q or K, in float32, after it was read and before it is quantized: sagecompile's Prologue.
//
// Compile-time settings besides common.cuh's: NORM (1: RMSNorm over the head), WEIGHT (its weight's dtype, or NO_WEIGHT),
// ROPE (0: none, 1: channel i turns with i + D/2, 2: channel 2i with 2i + 1), TABLE (dtype of cos and sin).
#pragma once
#include "common.cuh"

struct Prologue {
    const char *weight, *cos, *sin;  // cos and sin: (batch, tokens, D), channels adjacent; all at multiples of 16 bytes
    int64 batch, token;              // strides of cos and sin in bytes
    float eps;

    // Eight adjacent values.
    template <int dtype>
    static __device__ __forceinline__ void load(const char* values, int channel, float* out) {
        constexpr int size = dtype == FLOAT32 ? 4 : 2;
#pragma unroll
        for (int i = 0; i < size / 2; ++i) {
            const uint4 v = *reinterpret_cast<const uint4*>(values + channel * size + 16 * i);
            const unsigned words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                if constexpr (dtype == FLOAT32) out[4 * i + j] = __uint_as_float(words[j]);
                else unpack_16<dtype>(words[j], out[2 * j], out[2 * j + 1]);
            }
        }
    }

    // Thread t's part of a row (see Row), zeros where not `inside`; all threads of a warp must come here.
    __device__ __forceinline__ void apply(float (&x)[16], int b, int64 n, bool inside, int t) const {
        const bool mine = t < D / 16;
        if constexpr (NORM) {
            float sum = 0.0f;
#pragma unroll
            for (int i = 0; i < 16; ++i) sum = fmaf(x[i], x[i], sum);
#pragma unroll
            for (int distance = 1; distance < LANES; distance *= 2) sum += __shfl_xor_sync(~0u, sum, distance);
            const float inverse = inside ? rsqrtf(sum / D + eps) : 0.0f;
            float w[16];
#pragma unroll
            for (int i = 0; i < 16; ++i) w[i] = 1.0f;
            if constexpr (WEIGHT != NO_WEIGHT) {
                if (mine) load<WEIGHT>(weight, channel_of(0, t), w), load<WEIGHT>(weight, channel_of(8, t), w + 8);
            }
#pragma unroll
            for (int i = 0; i < 16; ++i) x[i] *= inverse * w[i];
        }
        if constexpr (ROPE != 0) {
            if (!inside || !mine) return;
            float c[16], s[16];
#pragma unroll
            for (int i = 0; i < 16; i += 8) {
                load<TABLE>(cos + b * batch + n * token, channel_of(i, t), c + i);
                load<TABLE>(sin + b * batch + n * token, channel_of(i, t), s + i);
            }
#pragma unroll
            for (int i = 0; i < 16; i += ROPE) {  // the first channel of each pair
                const int j = ROPE == 1 ? i + 8 : i + 1;
                if (ROPE == 1 && i >= 8) continue;
                const float first = x[i] * c[i] - x[j] * s[i];
                x[j] = x[j] * c[j] + x[i] * s[j];
                x[i] = first;
            }
        }
    }
};
