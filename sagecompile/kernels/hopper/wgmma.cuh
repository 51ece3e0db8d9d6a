// Warpgroup matrix multiply. P is in registers, all other operands are in shared memory,
// without a swizzle.
#pragma once
#include "common.cuh"

// An operand in shared memory. Core matrices of 8 rows x 16 bytes lie one after the other along the rows; `chunk` bytes
// lie between two of them along the summed dimension.
struct Operand {
    unsigned low;
    __device__ __forceinline__ Operand(unsigned address, int chunk) : low(address >> 4 | (chunk >> 4) << 16) {}
    __device__ __forceinline__ unsigned long long at(int bytes) const { return 8ull << 32 | (low + (bytes >> 4)); }
};

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

template <int in_flight>
__device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(in_flight) : "memory");
}

// The compiler must not move a use of these registers above this line.
template <int count, class T>
__device__ __forceinline__ void pin(T (&r)[count]) {
#pragma unroll
    for (int i = 0; i < count; ++i) {
        if constexpr (T(0.5) != T(0)) asm volatile("" : "+f"(r[i])::"memory");
        else asm volatile("" : "+r"(r[i])::"memory");
    }
}

#define REGISTERS_32                                     \
    "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15," \
    "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define REGISTERS_36 REGISTERS_32 ",%32,%33,%34,%35"
#define REGISTERS_52 REGISTERS_36 ",%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51"
#define REGISTERS_64 REGISTERS_52 ",%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define REGISTERS_68 REGISTERS_64 ",%64,%65,%66,%67"
#define OPERANDS_8(c, r, i) \
    c(r[i]), c(r[i + 1]), c(r[i + 2]), c(r[i + 3]), c(r[i + 4]), c(r[i + 5]), c(r[i + 6]), c(r[i + 7])
#define OPERANDS_4(c, r, i) c(r[i]), c(r[i + 1]), c(r[i + 2]), c(r[i + 3])
#define OPERANDS_32(c, r) OPERANDS_8(c, r, 0), OPERANDS_8(c, r, 8), OPERANDS_8(c, r, 16), OPERANDS_8(c, r, 24)
#define OPERANDS_36(c, r) OPERANDS_32(c, r), OPERANDS_4(c, r, 32)
#define OPERANDS_52(c, r) OPERANDS_36(c, r), OPERANDS_8(c, r, 36), OPERANDS_8(c, r, 44)
#define OPERANDS_64(c, r) OPERANDS_52(c, r), OPERANDS_8(c, r, 52), OPERANDS_4(c, r, 60)
#define OPERANDS_68(c, r) OPERANDS_64(c, r), OPERANDS_4(c, r, 64)

// s (64 x 128, int32) = or += a (64 x 32 int8, in shared memory) b^T.
#define MULTIPLY_SCORES(ACCESS, ADD)                                                                             \
    asm volatile("{.reg .pred add; setp.ne.b32 add, %66, 0;"                                                     \
                 "wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8 {" REGISTERS_64 "}, %64, %65, add;}"         \
                 : OPERANDS_64(ACCESS, s) : "l"(a), "l"(b), "n"(ADD))

template <bool add>
__device__ __forceinline__ void multiply_scores(int (&s)[64], unsigned long long a, unsigned long long b) {
    if constexpr (add) MULTIPLY_SCORES("+r", 1);
    else MULTIPLY_SCORES("=r", 0);
}

// o (64 x V_ROWS, float32) = or += a (64 x 32 e4m3, or 64 x 16 16-bit) b^T.
#define MULTIPLY_VALUES(COUNT, N, SHAPE_TYPES, TAIL, A0, A1, A2, A3, B, ADD)                                        \
    asm volatile("{.reg .pred add; setp.ne.b32 add, %" ADD ", 0;"                                                   \
                 "wgmma.mma_async.sync.aligned.m64n" N SHAPE_TYPES " {" REGISTERS_##COUNT "}, {%" A0 ",%" A1 ",%" A2 \
                 ",%" A3 "}, %" B ", add, " TAIL ";}"                                                               \
                 : OPERANDS_##COUNT("+f", o) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(add)))

#if FP8
#define VALUES_TYPES "k32.f32.e4m3.e4m3"
#define VALUES_TAIL "1, 1"
#elif DTYPE == FLOAT16
#define VALUES_TYPES "k16.f32.f16.f16"
#define VALUES_TAIL "1, 1, 0"
#else
#define VALUES_TYPES "k16.f32.bf16.bf16"
#define VALUES_TAIL "1, 1, 0"
#endif

__device__ __forceinline__ void multiply_values(float (&o)[V_ROWS / 2], const unsigned* a, unsigned long long b,
                                                bool add) {
#if HEAD_DIM == 64
    MULTIPLY_VALUES(36, "72", VALUES_TYPES, VALUES_TAIL, "36", "37", "38", "39", "40", "41");
#elif HEAD_DIM == 96
    MULTIPLY_VALUES(52, "104", VALUES_TYPES, VALUES_TAIL, "52", "53", "54", "55", "56", "57");
#else
    MULTIPLY_VALUES(68, "136", VALUES_TYPES, VALUES_TAIL, "68", "69", "70", "71", "72", "73");
#endif
}
