// Attention on tiles that quantize.cu wrote: INT8 QK^T, softmax in float32, PV in FP8 or 16 bits.
//
// In: q with any strides, the tiles of K and V, the factors of Q's channels. Out: out, wholly written, and for every 16 rows whether they must be
// computed again without quantization.
// One block of threads a multiprocessor takes query tiles one after the other: a loader warp brings K and V by bulk
// copies, and warpgroups of 64 rows each quantize their rows of Q (after RMSNorm and RoPE, if asked for, balanced and
// rotated)
// and run FlashAttention-3's loop (https://arxiv.org/abs/2407.08608).
// Why so, by measurement: the tensor cores are idle half of the time, and what limits is one warp's chain of
// instructions. Hence integer maxima of three, no conversion of scores, no sums of P (V has eight rows of ones more),
// a maximum that is followed only when it grows by more than SLACK, and exponentials that stay in front of a wait.
// Compile-time settings besides common.cuh's: CAUSAL, CONSUMERS (warpgroups), STAGES (tiles of K and V in flight),
// OVERLAP (1: PV and the next QK^T are in flight together, which takes registers), LAG (see exponentiate).
#include "rotate.cuh"
#include "wgmma.cuh"

struct Parameters {
    Tensor q, out;
    Prologue prologue;  // of q
    const float* basis;
    const char* tiles;
    unsigned* flags;
    int batch, heads, group;  // group: query heads that share a KV head
    int q_len, kv_len, head_dim;
    int ahead;  // causal: query i sees the keys j <= i + ahead
    int row_tiles, whole_tiles, tail_rows;  // of one head, see Work
    int kv_tiles;
    float scale_log2e;
    int never;  // 0, but the compiler cannot know
};

static_assert(sizeof(Parameters) == PARAMETER_BYTES, "as in __init__.py");

constexpr int ROWS = 64 * CONSUMERS;
static_assert(FLAG_ROWS == 16, "rows of a warp");
constexpr int PARTS = TILE * V_BYTES / 32;  // steps of PV in one tile, of 32 bytes of V each
constexpr int P_WORDS = 4 * PARTS;

// As in sagecompile.ops.quantize, where the guard is explained.
constexpr float MOST_ERROR = 0.022f, MOST_ERROR_OF_A_ROW = 0.07f, MOST_NOISE = 0.1f;
constexpr float ROUNDING_NOISE = 0.6931472f * 0.6931472f / 12.0f;
// |k|^2 of a rotated key as integers, whose tile's largest of 128 D nearly normal values is 127: 3.9 deviations.
constexpr float USUAL_K_SQUARE = D * 127.0f * 127.0f / 15.0f;

// P is at most 2^(SHIFT + SLACK): below e4m3's 448.
constexpr float SHIFT = FP8 ? 7.5f : 0.0f;
constexpr float SLACK = FP8 ? 1.25f : 8.0f;

// Hopper's FP8 tensor cores keep about 14 bits of their accumulator (DeepSeek-V3 report, section 3.3.2,
// https://arxiv.org/abs/2412.19437), so the sum of this many tiles is moved into float32 in shared memory; the sums of
// P, which have one sign and would be 2% too small after 16 tiles, move after each.
constexpr int FLUSH = 8;

constexpr int MAGIC_BITS = 0x4b400000;  // of ROUNDING
constexpr int HIDDEN = -0x4bc00000;     // stands for a score that is not seen: with MAGIC_BITS the bits of -Inf

constexpr float SMALLEST_FACTOR = 0x1p-100f;  // -Inf times zero would be NaN

// Which query tile comes `turn`-th in this block: heads one after the other, as they share K and V. First `whole_tiles`
// tiles of ROWS rows from each head, then the rest in tiles of `tail_rows`, which fill the last round better. Causal ones
// from the longest to the shortest, back and forth over the blocks so that all get about the same work.
struct Work {
    int batch, head, first_row, end_row, tiles, valid;
    __device__ __forceinline__ Work(const Parameters& p, int turn) {
        const int blocks = gridDim.x, heads = p.batch * p.heads;
        const int column = CAUSAL && turn % 2 ? blocks - 1 - blockIdx.x : blockIdx.x;
        int index = turn * blocks + column, row;
        valid = index < heads * p.row_tiles;
        if (!valid) return;
        if constexpr (CAUSAL) {
            first_row = (p.row_tiles - 1 - index / heads) * ROWS;
            row = index % heads;
            end_row = first_row + ROWS;
        } else {
            const bool tail = index >= heads * p.whole_tiles;
            if (tail) index -= heads * p.whole_tiles;
            const int tiles_of_head = tail ? p.row_tiles - p.whole_tiles : p.whole_tiles;
            const int rows = tail ? p.tail_rows : ROWS;
            row = index / tiles_of_head;
            first_row = (tail ? p.whole_tiles * ROWS : 0) + index % tiles_of_head * rows;
            end_row = first_row + rows;
        }
        batch = row / p.heads;
        head = row % p.heads;
        end_row = min(end_row, p.q_len);
        tiles = tiles_until(p, end_row);
    }

    // Tiles of K that rows before this one see.
    static __device__ __forceinline__ int tiles_until(const Parameters& p, int row) {
        return ((CAUSAL ? min(row + p.ahead, p.kv_len) : p.kv_len) + TILE - 1) / TILE;
    }
};

// How many Works are kept: the loader is at most STAGES tiles, so as many turns, ahead of a consumer, and tells the next.
constexpr int TURNS = 8;
static_assert(STAGES + 2 <= TURNS);

// A warp's own part of shared memory: with FP8 its sums of tiles, and between two query tiles the rows of Q that come,
// and the factors of their channels.
constexpr int ROWS_OF_Q = 16 * D * ELEMENT;
constexpr int OWN_BYTES = FP8 ? 16 * V_ROWS * 4 : ROWS_OF_Q + D * 4;
static_assert(ROWS_OF_Q + D * 4 <= OWN_BYTES);
constexpr int Q_BYTES = D / 16 * Q_CHUNK;
struct Shared {
    static constexpr int k = 0;
    static constexpr int v = k + STAGES * K_TILE_WITH_HEADER;
    static constexpr int own = v + STAGES * V_TILE;
    static constexpr int q = own + 4 * CONSUMERS * OWN_BYTES;
    static constexpr int noise = q + CONSUMERS * Q_BYTES;
    static constexpr int barriers = noise + CONSUMERS * 64 * 4;
    static constexpr int work = barriers + STAGES * 32;
    static constexpr int end = work + TURNS * 32;
};
static_assert(Shared::end == SHARED_BYTES && sizeof(Work) <= 32, "as in __init__.py");

extern __shared__ __align__(128) char memory[];

struct Pipeline {
    unsigned base;
    int stage = 0, phase = 0;
    __device__ __forceinline__ unsigned full_k() const { return base + Shared::barriers + stage * 32; }
    __device__ __forceinline__ unsigned full_v() const { return full_k() + 8; }
    __device__ __forceinline__ unsigned empty_k() const { return full_k() + 16; }
    __device__ __forceinline__ unsigned empty_v() const { return full_k() + 24; }
    __device__ __forceinline__ unsigned k() const { return base + Shared::k + stage * K_TILE_WITH_HEADER; }
    __device__ __forceinline__ unsigned v() const { return base + Shared::v + stage * V_TILE; }
    __device__ __forceinline__ void advance() {
        if (++stage == STAGES) stage = 0, phase ^= 1;
    }
};

// The Work of a turn: written before any tile of the turn before comes, so that who waited for one of these sees it.
__device__ __forceinline__ Work& work_of(int turn) {
    return *reinterpret_cast<Work*>(memory + Shared::work + turn % TURNS * 32);
}

// Brings the rows of Q that this block takes next into the second-level cache, line by line.
__device__ __forceinline__ void prefetch_q(const Parameters& p, const Work& work, int lane) {
    if (!work.valid || !p.q.vectors) return;
    for (int row = work.first_row + lane; row < work.end_row; row += 32) {
        const char* line = p.q.row(work.batch, work.head, row);
#pragma unroll
        for (int i = 0; i < D * ELEMENT; i += 128) asm volatile("prefetch.global.L2 [%0];" ::"l"(line + i));
    }
}

// By one warp, of which one thread starts the copies.
__device__ __forceinline__ void load_tiles(const Parameters& p, unsigned base) {
    const int lane = threadIdx.x;
    Pipeline pipe{base};
    // This kernel may start while the last tiles are still being written. Only here must one wait: no other thread
    // touches what quantize.cu writes before a tile has come, and what it reads was there before quantize.cu let this
    // kernel start.
    asm volatile("griddepcontrol.wait;" ::: "memory");
    Work work = work_of(0);
    for (int turn = 1; work.valid; ++turn) {
        const Work next(p, turn);
        if (lane == 0) work_of(turn) = next;
        prefetch_q(p, next, lane);
        const int row = work.batch * p.heads + work.head;
        const char* tiles = p.tiles + static_cast<int64>(row / p.group) * p.kv_tiles * KV_TILE;
        for (int i = work.tiles - 1; i >= 0; --i) {
            const char* tile = tiles + static_cast<int64>(i) * KV_TILE;
            barrier_wait(pipe.empty_k(), pipe.phase ^ 1);
            if (lane == 0) {
                barrier_expect(pipe.full_k(), K_TILE_WITH_HEADER);
                bulk_load(pipe.k(), tile, K_TILE_WITH_HEADER, pipe.full_k());
            }
            barrier_wait(pipe.empty_v(), pipe.phase ^ 1);
            if (lane == 0) {
                barrier_expect(pipe.full_v(), V_TILE);
                bulk_load(pipe.v(), tile + K_TILE_WITH_HEADER, V_TILE, pipe.full_v());
            }
            pipe.advance();
        }
        work = next;
    }
}

// One thread's part of the softmax of its two rows, 8 apart.
struct Softmax {
    float q_factor[2];   // scale of the row of Q * softmax scale * log2(e)
    float reference[2];  // what exponents are relative to: the running maximum, or up to SLACK less
    float rescale[2];
    float factor[2], offset[2];  // from a score to its exponent
    float sum[2];    // of P, in float32
    float weight;    // what the P that is multiplied counts in them: one over the scale of V that is in it
    float k_squares;  // of the scales of the tiles seen, summed; +Inf if one of them cannot be used
    unsigned peaks;   // this thread's largest scores, as powers of two: two float16. With FP8 `reference` is near them
    bool moved;  // whether `rescale` is not one for some row of the warp

    __device__ __forceinline__ void start() {
        reference[0] = reference[1] = -1e30f;
        peaks = 0xfc00fc00u;  // -Inf
        sum[0] = sum[1] = k_squares = 0.0f;
    }

    // The scores' maximum decides what exponents are relative to.
    __device__ __forceinline__ void measure(const int (&s)[64], const float4& header) {
        k_squares = fmaf(header.x, header.x, k_squares + header.w);
        int top[8];  // four for each row, for short chains of dependent instructions
#pragma unroll
        for (int i = 0; i < 64; i += 2) {
            const int slot = i / 2 % 8;
            top[slot] = i < 16 ? max(s[i], s[i + 1]) : max(max(top[slot], s[i]), s[i + 1]);
        }
        float largest[2];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            top[r] = max(max(max(top[r], top[r + 2]), top[r + 4]), top[r + 6]);
            factor[r] = fmaxf(q_factor[r] * header.x, SMALLEST_FACTOR);
            largest[r] = fmaf(__int_as_float(top[r] + MAGIC_BITS) - ROUNDING, factor[r], header.y);  // hidden: -Inf
        }
        if constexpr (!FP8) peaks = max_16(peaks, pack_16<FLOAT16>(largest[0], largest[1]));
        moved = __any_sync(~0u, largest[0] > reference[0] + SLACK || largest[1] > reference[1] + SLACK);
        if (moved) {
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                float next = fmaxf(reference[r], largest[r]);
                next = fmaxf(next, __shfl_xor_sync(~0u, next, 1));
                next = fmaxf(next, __shfl_xor_sync(~0u, next, 2));
                rescale[r] = exp2_approx(reference[r] - next);
                reference[r] = next;
            }
        }
#pragma unroll
        for (int r = 0; r < 2; ++r) offset[r] = fmaf(-ROUNDING, factor[r], header.y + SHIFT - reference[r]);
    }

    // A score to P / 2^reference * 2^SHIFT * scale of V. An integer below 2^22 added to the bits of 1.5 * 2^23 gives
    // the bits of their sum; the multiply-add takes 1.5 * 2^23 away again.
    __device__ __forceinline__ float exponential(int s, int magic, int r) const {
        return exp2_approx(fmaf(__int_as_float(s + magic), factor[r], offset[r]));
    }
};

// Eight P of a thread as operands of PV.
__device__ __forceinline__ void pack(const float (&x)[8], unsigned* words) {
    if constexpr (FP8) {
#pragma unroll
        for (int r = 0; r < 2; ++r) words[r] = pack_fp8(x[2 * r], x[2 * r + 1], x[2 * r + 4], x[2 * r + 5]);
    } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) words[i] = pack_16<DTYPE == FLOAT32 ? BFLOAT16 : DTYPE>(x[2 * i], x[2 * i + 1]);
    }
}

// A mean of V's values cannot pass the largest number, but rounding could: then it is that number. NaN stays.
__device__ __forceinline__ unsigned pack_mean(float a, float b) {
    unsigned word;
    if constexpr (DTYPE == FLOAT16) asm("cvt.rn.satfinite.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(b), "f"(a));
    else asm("cvt.rn.satfinite.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(b), "f"(a));
    return word;
}

__device__ __forceinline__ float finite(float x) {
    asm("min.NaN.f32 %0, %0, %1;" : "+f"(x) : "f"(0x1.fffffep127f));
    asm("max.NaN.f32 %0, %0, %1;" : "+f"(x) : "f"(-0x1.fffffep127f));
    return x;
}

// Whether a warp's 16 rows are to be computed again, by the predicted errors of their output: quantize.exact_rows.
// weight: of a tile's P, see Softmax.
__device__ __forceinline__ bool too_far_off(const Softmax& softmax, float weight, const float (&noise)[2], int tiles,
                                            int rows) {
    const float k_square = softmax.k_squares * reciprocal(tiles);
    const float most = fmaxf(noise[0], noise[1]) * k_square;
    if (!__any_sync(~0u, !(most <= MOST_ERROR * MOST_ERROR))) return false;  // nor can an error be larger; or NaN
    float peak[2] = {softmax.reference[0] + SLACK / 2, softmax.reference[1] + SLACK / 2}, errors = 0.0f;
    if constexpr (!FP8) {
        unsigned peaks = softmax.peaks;
        peaks = max_16(peaks, __shfl_xor_sync(~0u, peaks, 1));
        peaks = max_16(peaks, __shfl_xor_sync(~0u, peaks, 2));
        unpack_16<FLOAT16>(peaks, peak[0], peak[1]);
    }
    bool hard = false;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const float largest = exp2_approx(peak[r] - softmax.reference[r] + SHIFT) * weight * reciprocal(softmax.sum[r]);
        const float square = noise[r] * k_square, rest = largest < 2.0f ? fmaxf(1.0f - largest, 0.0f) : 1.0f;
        const float error = square * rest * sqrt_approx(rest);
        if (8 * r >= rows) continue;
        hard |= !(square <= MOST_NOISE * MOST_NOISE && error <= MOST_ERROR_OF_A_ROW * MOST_ERROR_OF_A_ROW);  // or NaN
        errors += error;
    }
#pragma unroll
    for (int distance = 4; distance < 32; distance *= 2) errors += __shfl_xor_sync(~0u, errors, distance);
    return __any_sync(~0u, hard || errors > MOST_ERROR * MOST_ERROR * 16);
}

__device__ __forceinline__ void store(const Parameters& p, int batch, int head, int row, int t,
                                      const float (&o)[V_ROWS / 2], const float (&sum)[2]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        if (row + 8 * r >= p.q_len) continue;
        const float inverse = reciprocal(sum[r]);
        char* target = p.out.row(batch, head, row + 8 * r);
#pragma unroll
        for (int g = 0; g < D / 32; ++g) {  // 8 adjacent channels, see row_of in quantize.cu
            float v[8];
#pragma unroll
            for (int i = 0; i < 8; ++i) v[i] = o[16 * g + i / 2 * 4 + 2 * r + i % 2] * inverse;
            const int channel = 32 * g + 8 * t;
            if (DTYPE != FLOAT32 && p.out.vectors) {
                *reinterpret_cast<uint4*>(target + channel * ELEMENT) =
                    make_uint4(pack_mean(v[0], v[1]), pack_mean(v[2], v[3]), pack_mean(v[4], v[5]), pack_mean(v[6], v[7]));
            } else {
#pragma unroll
                for (int i = 0; i < 8; ++i) {
                    if (channel + i >= p.head_dim) continue;
                    char* address = target + (channel + i) * p.out.channel;
                    if constexpr (DTYPE == FLOAT32) *reinterpret_cast<float*>(address) = finite(v[i]);
                    else *reinterpret_cast<unsigned short*>(address) = pack_mean(v[i], v[i]);
                }
            }
        }
    }
}

// The same for all threads of a warp, which the compiler then knows: it waits after every wgmma in branches that could
// part a warp.
__device__ __forceinline__ int uniform(int x) { return __shfl_sync(~0u, x, 0); }

__device__ __forceinline__ void warpgroup_sync(int consumer) {
    asm volatile("bar.sync %0, 128;" ::"r"(1 + consumer) : "memory");
}

struct Consumer {
    const Parameters& p;
    Pipeline k_pipe, v_pipe;
    int consumer, lane, warp, t;
    float o[V_ROWS / 2];  // 64 rows x D channels, and the sums of P
    Softmax softmax;
    int row, full;   // this thread's first row; tiles from `full` on need a mask
    bool ready;      // whether the tile needed first was already seen in shared memory
    int pending;     // tiles summed in registers; with 16 bits, whether there are any
    bool in_shared;  // whether some were moved to shared memory

    __device__ __forceinline__ Consumer(const Parameters& p, unsigned base)
        : p(p), k_pipe{base}, v_pipe{base}, consumer(uniform(threadIdx.x / 128) - 1), lane(threadIdx.x % 32),
          warp(uniform(threadIdx.x / 32 % 4)), t(threadIdx.x % 4) {}

    __device__ __forceinline__ unsigned q_shared() const { return k_pipe.base + Shared::q + consumer * Q_BYTES; }

    // Of the rows of this warp, what their scores' noise is, squared, where the scale of K is one.
    __device__ __forceinline__ float* noise() const {
        return reinterpret_cast<float*>(memory + Shared::noise) + consumer * 64 + warp * 16;
    }

    __device__ __forceinline__ char* own() const { return memory + Shared::own + (consumer * 4 + warp) * OWN_BYTES; }

    __device__ __forceinline__ float4* o_shared() const { return reinterpret_cast<float4*>(own()) + lane; }

    // x: k_scale, y: log2_v_scale, z: inverse_v_scale, w: v_limit.
    __device__ __forceinline__ float4 header() const {
        float4 h;
        asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                     : "=f"(h.x), "=f"(h.y), "=f"(h.z), "=f"(h.w) : "r"(k_pipe.k() + K_TILE));
        return h;
    }

    __device__ __forceinline__ void release(Pipeline& pipe, unsigned barrier) {
        __syncwarp();  // all lanes have read
        if (lane == 0) barrier_arrive(barrier);
        pipe.advance();
    }

    __device__ __forceinline__ void multiply_qk(int (&s)[64]) {
        const Operand q(q_shared(), Q_CHUNK), k(k_pipe.k(), K_CHUNK);
        multiply_scores<false>(s, q.at(0), k.at(0));
#pragma unroll
        for (int i = 1; i < D / 32; ++i) multiply_scores<true>(s, q.at(i * 2 * Q_CHUNK), k.at(i * 2 * K_CHUNK));
        wgmma_commit();
    }

    __device__ __forceinline__ void multiply_pv(const unsigned (&words)[P_WORDS]) {
        const Operand v(v_pipe.v(), V_ROWS * 16);
#pragma unroll
        for (int i = 0; i < PARTS; ++i)
            multiply_values(o, words + 4 * i, v.at(i * 2 * V_ROWS * 16), i > 0 || pending > 0);
        wgmma_commit();
    }

    // Adds what is in shared memory to the registers.
    __device__ __forceinline__ void collect() {
        const float4* from = o_shared();
        const float4 before = from[D / 8 * 32];
        const float a = exp2_approx(before.x - softmax.reference[0]), b = exp2_approx(before.y - softmax.reference[1]);
#pragma unroll
        for (int i = 0; i < D / 8; ++i) {
            const float4 v = from[i * 32];
            o[4 * i] = fmaf(v.x, a, o[4 * i]), o[4 * i + 1] = fmaf(v.y, a, o[4 * i + 1]);
            o[4 * i + 2] = fmaf(v.z, b, o[4 * i + 2]), o[4 * i + 3] = fmaf(v.w, b, o[4 * i + 3]);
        }
    }

    // After a PV: the sums of its P, and what those of the next count. They are cleared by a zero that the compiler
    // does not know: a constant would move accumulators to other registers, and it would wait after every wgmma.
    __device__ __forceinline__ void take_sums(float next_weight) {
        const float zero = __int_as_float(p.never);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            softmax.sum[r] = fmaf(o[D / 2 + 2 * r], softmax.weight, softmax.sum[r]);
            o[D / 2 + 2 * r] *= zero;
            o[D / 2 + 2 * r + 1] *= zero;
        }
        softmax.weight = next_weight;
    }

    // After a PV: its sums to shared memory when they are of many tiles.
    __device__ __forceinline__ void move_sums() {
        if constexpr (FP8) {
            if (++pending < FLUSH) return;
            if (in_shared) collect();
            float4* to = o_shared();
#pragma unroll
            for (int i = 0; i < D / 8; ++i)
                to[i * 32] = make_float4(o[4 * i], o[4 * i + 1], o[4 * i + 2], o[4 * i + 3]);
            to[D / 8 * 32] = make_float4(softmax.reference[0], softmax.reference[1], 0.0f, 0.0f);
            in_shared = true;
            pending = 0;
        } else {
            pending = 1;
        }
    }

    __device__ __forceinline__ void rescale() {
        if (softmax.moved) {
#pragma unroll
            for (int i = 0; i < D / 2; ++i) o[i] *= softmax.rescale[i / 2 % 2];
#pragma unroll
            for (int r = 0; r < 2; ++r) softmax.sum[r] *= softmax.rescale[r];
        }
    }

    // Scores to words of P, eight by eight. The conversions of eight wait for the words of LAG eights before, by a zero
    // that the compiler does not know: left alone it does all conversions first, and then the special-function unit is
    // the only one at work.
    __device__ __forceinline__ void exponentiate(const int (&s)[64], unsigned (&words)[P_WORDS]) const {
        constexpr int count = P_WORDS / 8;
#pragma unroll
        for (int c = 0; c < 8; ++c) {
            int magic = MAGIC_BITS;
            if (c >= LAG) magic += p.never * words[(c - LAG) * count] + p.never * words[(c - LAG) * count + count - 1];
            float x[8];
#pragma unroll
            for (int i = 0; i < 8; ++i) x[i] = softmax.exponential(s[8 * c + i], magic, i / 2 % 2);
            pack(x, words + c * count);
        }
    }

    // Hides the keys that a row does not see: past the end, or after it.
    __device__ __forceinline__ void mask(int (&s)[64], int tile) const {
        const int start = tile * TILE + (FP8 ? 4 : 2) * t;  // of this thread's keys
        int last[2];
#pragma unroll
        for (int r = 0; r < 2; ++r) last[r] = (CAUSAL ? min(p.kv_len - 1, row + 8 * r + p.ahead) : p.kv_len - 1) - start;
#pragma unroll
        for (int i = 0; i < 64; ++i) {
            const int j = i / 4, key = (FP8 ? j / 2 * 16 + j % 2 * 2 : j * 8) + i % 2;
            if (key > last[i / 2 % 2]) s[i] = HIDDEN;
        }
    }

    // The compiler schedules inside basic blocks, where it would move the wait for wgmma in front of the exponentials.
    // A loop that never runs ends a block.
    __device__ __forceinline__ void boundary() const {
        asm volatile(
            "{.reg .pred again; setp.ne.s32 again, %0, 0; AGAIN: @again st.shared.b32 [%1], %0; @again bra AGAIN;}"
            ::"r"(p.never), "r"(k_pipe.base));
    }

    // QK of the tile is done: its stage is free, its scores are masked and in the softmax's maxima.
    __device__ __forceinline__ void take_scores(int (&s)[64], int tile, float4 scales) {
        pin(s);
        release(k_pipe, k_pipe.empty_k());
        if (tile >= full) mask(s, tile);
        softmax.measure(s, scales);
    }

    // PV of a tile is done: its stage is free, o and the registers of P may be used.
    __device__ __forceinline__ void take_pv(unsigned (&words)[P_WORDS], float next_weight) {
        pin(o);
        pin(words);
        release(v_pipe, v_pipe.empty_v());
        take_sums(next_weight);
    }

    // PV of the tile before, of which `words` are P, and the softmax of this one, of which `next` become P.
    __device__ __forceinline__ void next_tile(int tile, unsigned (&words)[P_WORDS], unsigned (&next)[P_WORDS]) {
        int s[64];
        if constexpr (OVERLAP) {
            barrier_wait(k_pipe.full_k(), k_pipe.phase, ready);
            const bool v_ready = barrier_test(v_pipe.full_v(), v_pipe.phase);
            const float4 scales = header();
            wgmma_fence();
            multiply_qk(s);
            barrier_wait(v_pipe.full_v(), v_pipe.phase, v_ready);
            multiply_pv(words);
            wgmma_wait<1>();
            take_scores(s, tile, scales);
            exponentiate(s, next);
            pin(next);
            boundary();
            ready = barrier_test(k_pipe.full_k(), k_pipe.phase);
            wgmma_wait<0>();
            take_pv(words, scales.z);
            rescale();
            move_sums();
        } else {
            barrier_wait(v_pipe.full_v(), v_pipe.phase, ready);
            ready = barrier_test(k_pipe.full_k(), k_pipe.phase);
            wgmma_fence();
            multiply_pv(words);
            barrier_wait(k_pipe.full_k(), k_pipe.phase, ready);
            const float4 scales = header();
            wgmma_wait<0>();
            take_pv(words, scales.z);
            move_sums();
            wgmma_fence();
            multiply_qk(s);
            wgmma_wait<0>();
            take_scores(s, tile, scales);
            rescale();
            exponentiate(s, next);
            ready = barrier_test(v_pipe.full_v(), v_pipe.phase);
        }
    }

    // Starts to copy the rows of Q that this warp takes in some turn into its own shared memory, as they are, zeros past
    // the end, and the factors of their channels.
    __device__ __forceinline__ void fetch_q(int turn) {
        constexpr int CHUNKS = D * ELEMENT / 16, THREADS = CHUNKS <= 8 ? 8 : CHUNKS <= 16 ? 16 : 32;  // of a row
        const Work& work = work_of(turn);
        const int chunk = lane % THREADS;
        asm volatile("cp.async.wait_all;" ::: "memory");  // of a turn without rows, to the same place
        __syncwarp();  // what was there has been read
        if (!work.valid) return;
        const int kv_head = (work.batch * p.heads + work.head) / p.group;
        const float* factors = p.basis + static_cast<int64>(kv_head) * BASIS;
        if (lane < D / 4) copy_async(shared_address(own() + ROWS_OF_Q + lane * 16), reinterpret_cast<const char*>(factors + lane * 4), true);
        if (chunk >= CHUNKS) return;
        const int first = work.first_row + consumer * 64 + warp * 16, count = work.end_row - first;
        const char* source = p.q.row(work.batch, work.head, first + lane / THREADS);
        char* target = own() + (lane / THREADS * CHUNKS + chunk) * 16;
        if (p.q.vectors) {
#pragma unroll
            for (int row = 0; row < 16; row += 32 / THREADS)
                copy_async(shared_address(target + row * CHUNKS * 16), source + chunk * 16 + row * p.q.token,
                           lane / THREADS + row < count);
        } else {
#pragma unroll 1
            for (int row = 0; row < 16; row += 32 / THREADS) {
                uint4 v = {};
                if (lane / THREADS + row < count)
                    v = p.q.gather(source + row * p.q.token, chunk * (16 / ELEMENT), p.head_dim);
                *reinterpret_cast<uint4*>(target + row * CHUNKS * 16) = v;
            }
        }
    }

    // The rows of Q into shared memory as INT8, in the order of an operand, and their factors: +Inf of a row that is not
    // finite.
    __device__ __forceinline__ void stage_q(int batch) {
        constexpr int PASSES = 16 / WARP_ROWS;
        const int t = lane % LANES;
        asm volatile("cp.async.wait_all;" ::: "memory");
        __syncwarp();
        const Rotation rotation;
        float factors[16];
        unsigned words[8];
        load_channels(reinterpret_cast<const float*>(own() + ROWS_OF_Q), t, factors);
        pack_factors(factors, words);
        uint4 q[PASSES];
        float factor[PASSES];
#pragma unroll
        for (int pass = 0; pass < PASSES; ++pass) {
            const int in_warp = pass * WARP_ROWS + lane / LANES;
            const int n = row - lane / 4 + in_warp;
            Row raw = {};
            if (t < D / 16) {
#pragma unroll
                for (int i = 0; i < Row::CHUNKS; ++i)
                    raw.words[i] = *reinterpret_cast<uint4*>(own() + in_warp * D * ELEMENT + Row::offset(i, t));
            }
            float x[16];
            if constexpr (DIRECT) {
                raw.multiply(words);
                rotate(rotation, raw, x);
            } else {
                raw.unpack(x);
                p.prologue.apply(x, batch, n, n < p.q_len, t);
#pragma unroll
                for (int i = 0; i < 16; ++i) x[i] *= factors[i];
                rotate(rotation, x);
            }
            const unsigned bits = max_of_row(amax_bits(x));
            const float amax = fmaxf(__uint_as_float(bits), SMALLEST_AMAX);
            factor[pass] = bits < INFINITY_BITS ? amax * (1.0f / LARGEST_INT8) * fabsf(p.scale_log2e) : infinity();
            q[pass] = pack_row(x, copysignf(LARGEST_INT8 * reciprocal(amax), p.scale_log2e));
            int square = __dp4a(int(q[pass].x), int(q[pass].x), __dp4a(int(q[pass].y), int(q[pass].y), 0));
            square = __dp4a(int(q[pass].z), int(q[pass].z), __dp4a(int(q[pass].w), int(q[pass].w), square));
#pragma unroll
            for (int distance = 1; distance < LANES; distance *= 2) square += __shfl_xor_sync(~0u, square, distance);
            if (t == 0) noise()[in_warp] = factor[pass] * factor[pass] * ROUNDING_NOISE * (square + USUAL_K_SQUARE);
        }
#pragma unroll
        for (int r = 0; r < 2; ++r) {  // the factors of this thread's own two rows
            const int wanted = lane / 4 + 8 * r;
#pragma unroll
            for (int pass = 0; pass < PASSES; ++pass) {
                const float found = __shfl_sync(~0u, factor[pass], wanted % WARP_ROWS * LANES);
                if (wanted / WARP_ROWS == pass) softmax.q_factor[r] = found;
            }
        }
        warpgroup_sync(consumer);  // the tile before is no longer multiplied by any warp
        if (t < D / 16) {
#pragma unroll
            for (int pass = 0; pass < PASSES; ++pass) {
                const int in_group = warp * 16 + pass * WARP_ROWS + lane / LANES;
                *reinterpret_cast<uint4*>(memory + Shared::q + consumer * Q_BYTES + t * Q_CHUNK + in_group * 16) = q[pass];
            }
        }
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
        warpgroup_sync(consumer);
    }

    __device__ __forceinline__ void first_tile(int tile, unsigned (&words)[P_WORDS]) {
        int s[64];
        barrier_wait(k_pipe.full_k(), k_pipe.phase);
        wgmma_fence();
        multiply_qk(s);
        const float4 scales = header();
        wgmma_wait<0>();
        take_scores(s, tile, scales);
        exponentiate(s, words);
        softmax.weight = scales.z;
    }

    // Tiles that no row of this warpgroup sees.
    __device__ __forceinline__ void skip(int tiles) {
#pragma unroll 1
        for (; tiles > 0; --tiles) {
            barrier_wait(k_pipe.full_k(), k_pipe.phase);
            release(k_pipe, k_pipe.empty_k());
            barrier_wait(v_pipe.full_v(), v_pipe.phase);
            release(v_pipe, v_pipe.empty_v());
        }
    }

    // The query tile of a turn, of which the rows were fetched; fetches the next one's. Whether there was one.
    __device__ __forceinline__ bool run(int turn) {
        const Work work = work_of(turn);
        if (!uniform(work.valid)) return false;
        const int first = uniform(work.first_row) + consumer * 64, end = uniform(work.end_row);
        const int all = uniform(work.tiles);
        if (first >= end) {
            skip(all);
            fetch_q(turn + 1);
            return true;
        }
        const int tiles = Work::tiles_until(p, min(first + 64, end));
        const int head = work.batch * p.heads + work.head;
        row = first + warp * 16 + lane / 4;
        full = min(p.kv_len, CAUSAL ? first + 1 + p.ahead : p.kv_len) / TILE;
        stage_q(work.batch);
        if (CAUSAL) skip(all - tiles);
        softmax.start();
        pending = 0;
        in_shared = false;
        ready = false;
        unsigned words[P_WORDS], next[P_WORDS];
#if __CUDACC_VER_MAJOR__ < 13  // which else defines the accumulators inside the loop, and then waits after every wgmma
#pragma unroll
        for (int i = 0; i < V_ROWS / 2; ++i) o[i] = __int_as_float(p.never);
        pin(o);
#endif
        first_tile(tiles - 1, words);
        const bool early = !FP8 || tiles <= FLUSH;  // then no sums move to where the rows of Q go
        if (early) fetch_q(turn + 1);
        // By two, because with OVERLAP P of one tile is still being read when the next one's is written.
        for (int tile = tiles - 2; tile >= 0; tile -= 2) {
            next_tile(tile, words, next);
            if (tile == 0) {
#pragma unroll
                for (int i = 0; i < P_WORDS; ++i) words[i] = next[i];
            } else {
                next_tile(tile - 1, next, words);
            }
        }
        barrier_wait(v_pipe.full_v(), v_pipe.phase);
        wgmma_fence();
        multiply_pv(words);
        wgmma_wait<0>();
        const float weight = softmax.weight;
        take_pv(words, 0.0f);
        if (FP8 && in_shared) collect();
        if (!early) fetch_q(turn + 1);
        store(p, head / p.heads, head % p.heads, row, t, o, softmax.sum);
        const float of_rows[2] = {noise()[lane / 4], noise()[lane / 4 + 8]};
        const bool again = too_far_off(softmax, weight, of_rows, tiles, p.q_len - row);
        if (lane == 0 && row < p.q_len)
            p.flags[static_cast<int64>(head) * ((p.q_len + FLAG_ROWS - 1) / FLAG_ROWS) + row / FLAG_ROWS] = again;
        return true;
    }
};

// Grid: as many blocks as multiprocessors, or as query tiles if these are fewer.
extern "C" __global__ void __launch_bounds__(128 * (CONSUMERS + 1), 1)
    attend(const __grid_constant__ Parameters p) {
    asm volatile("griddepcontrol.launch_dependents;");  // the exact kernel waits until this one has ended
    const unsigned base = shared_address(memory);
    if (threadIdx.x == 0) {
        Pipeline pipe{base};
        for (; pipe.phase == 0; pipe.advance()) {
            barrier_init(pipe.full_k(), 1);
            barrier_init(pipe.full_v(), 1);
            barrier_init(pipe.empty_k(), 4 * CONSUMERS);
            barrier_init(pipe.empty_v(), 4 * CONSUMERS);
        }
        work_of(0) = Work(p, 0);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    // Registers of the loader's warpgroup go to the others.
    if (threadIdx.x < 128) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(CONSUMERS == 3 ? 32 : 24));
        if (threadIdx.x < 32) load_tiles(p, base);
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(CONSUMERS == 3 ? 160 : 240));
        Consumer consumer(p, base);
        consumer.fetch_q(0);
        for (int turn = 0; consumer.run(turn); ++turn) {
        }
    }
}
