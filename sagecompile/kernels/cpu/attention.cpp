// Attention on quantized Q and K for x86 CPUs with AVX-512 VNNI: INT8 QK^T, softmax in float32, PV in bfloat16.
//
// In: q (B, Hq, Nq, D), k and v (B, Hkv, Nk, D) of float32, bfloat16 or float16 with any strides; D is at most 256.
// Out: out = softmax(scale * q k^T) v, wholly written but for the heads that cannot be computed here (with a NaN or
// Inf, or the steepest of scores), of which the caller is told; and how many rows were computed exactly, by site.
//
// The loops, and what they cost on a Zen 4 core, which starts one 512-bit multiplication (INT8, bf16, float) a cycle:
//
//   pack (once for each KV head, shared by all its query heads)
//     k -> less its mean, balanced with q and rotated (below), INT8, one scale for 64 tokens; panels of 32 tokens x D:
//          word w of a panel holds dimensions 4w..4w+3 of each of the 32 tokens, which is what vpdpbusd multiplies in
//          its 2 x 16 lanes
//     v -> bfloat16; panels of 32 dimensions x 256 tokens: word w holds tokens 2w, 2w+1 of each dimension (vdpbf16ps)
//   attend (each block of up to 96 queries of a head)
//     q -> balanced and rotated, INT8, one scale for each token, stored as bytes q + 128 because vpdpbusd multiplies
//          unsigned by signed; the 128 * sum(k) that this adds to a score is taken away where the sum starts
//     for each tile of 256 keys         96 KiB of K and V at D = 128: they stay in L2 for all queries of the block
//       for each 12 queries             12 KiB of scores and 6 KiB of weights: they stay in L1
//         scores   12 x 256 x D INT8    D / 4 cycles for 16 scores; measured 17.9 at D = 64 and 33.8 at D = 128
//         softmax  12 x 256             8.6 cycles for 16 scores
//         output   12 x D x 256 bf16    D / 2 cycles for 16 scores; measured 32.7 and 64.9
//     judge each 12 queries: if the error that INT8 made them, as can be predicted now, is too large, once more from
//          the caller's q and k, with scores in float32 (D cycles for 16) and the rest as it is
//
// So 16 scores take 59 cycles at D = 64 and 107 at D = 128, of which 48 and 96 are the multiplications: 81% and 89% of
// what VNNI and bf16 can do. The rest: storing scores (2 cycles for 16) does not overlap with multiplying; the softmax
// needs 2 for the maximum and 6.6 for the weights, whose vreduceps and vscalefps take 2 each in the pipes that add.
//
// Both products run in one micro-kernel, `multiply`: 12 rows x 2 vectors of sums stay in registers, and a step loads 2
// vectors and 12 broadcast words (of 4 INT8, 2 bf16 or 1 float) for 24 multiplications.
//
// The scheme is SageAttention's (arXiv:2410.02367) in FlashAttention's loop (arXiv:2307.08691). How Q and K change
// basis before they are quantized, what is predicted and why is in sagecompile/ops/quantize.py, formula by formula.

#include <immintrin.h>
#include <pthread.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <functional>
#include <map>
#include <mutex>
#include <string>
#include <string_view>

#include "masks.h"
#include "tensors.h"

namespace {

constexpr int MAX_QUERIES = 96; // of a block
constexpr int Q_WORDS = MAX_DIM / 4;

// 1.5 * 2^23 and its bits: adding an integer below 2^22 to the bits gives the bits of the sum. Sums of integers that
// start here can be read as floats without a conversion, and the multiply-add that scales a score takes MAGIC away.
constexpr float MAGIC = 12582912.0f;
constexpr int32_t MAGIC_BITS = 0x4B400000;

constexpr float SMALLEST_AMAX = 0x1p-119f; // amax / 127 is then a normal number, and 127 / amax a finite one
constexpr float LARGEST_V = 0x1p96f;       // so that no sum of weighted values overflows before it is divided

// As in sagecompile.ops.quantize, and explained there.
constexpr float STEEPEST = 0x1p-6f;
constexpr int SAMPLE = 64;               // half as many as there: a short call should not wait for it
constexpr float LEAST_SQUARE = 0x1p-14f; // LEAST_RMS squared
constexpr float LEAST_EXPONENT = 0.5f;
constexpr float MOST_ERROR = 0.022f, MOST_ERROR_OF_A_ROW = 0.07f, MOST_NOISE = 0.1f;
constexpr float ROUNDING = 0.6931472f * 0.6931472f / 12.0f; // of noise

// ---- The micro-kernel -----------------------------------------------------------------------------------------------

struct Int8 { // a word: 4 unsigned (rows) or signed (lanes) bytes
    static INLINE __m512i add(__m512i sum, __m512i row, __m512i lanes) { return _mm512_dpbusd_epi32(sum, row, lanes); }
};

struct Float32 {
    static INLINE __m512 add(__m512 sum, __m512i row, __m512i lanes) {
        return _mm512_fmadd_ps(_mm512_castsi512_ps(row), _mm512_castsi512_ps(lanes), sum);
    }
};

// The weights and values: a word is 2 bfloat16 of consecutive keys where the CPU multiplies those, else 1 float.
#ifdef __AVX512BF16__
struct Values {
    static constexpr int KEYS_A_WORD = 2;

    static INLINE __m512 add(__m512 sum, __m512i row, __m512i lanes) {
        return _mm512_dpbf16_ps(sum, (__m512bh)row, (__m512bh)lanes);
    }
    static INLINE __m512i ones() { return _mm512_set1_epi32(0x3F803F80); }
    // 16 words of two keys that lie `stride` floats apart.
    static INLINE __m512i pack(const float* key, int stride) {
        const auto half = [](const float* x) {
            return _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(x)));
        };
        return _mm512_or_si512(half(key), _mm512_slli_epi32(half(key + stride), 16));
    }
    // 32 consecutive weights of a row; returns the sum's new value.
    static INLINE __m512 store(uint32_t* words, __m512 low, __m512 high, __m512 sum) {
        const __m512i packed = (__m512i)_mm512_cvtne2ps_pbh(high, low);
        _mm512_storeu_si512(words, packed);
        return add(sum, packed, ones());
    }
};
#else
struct Values {
    static constexpr int KEYS_A_WORD = 1;

    static INLINE __m512 add(__m512 sum, __m512i row, __m512i lanes) { return Float32::add(sum, row, lanes); }
    static INLINE __m512i pack(const float* key, int) { return _mm512_loadu_si512(key); }
    static INLINE __m512 store(uint32_t* words, __m512 low, __m512 high, __m512 sum) {
        _mm512_storeu_ps(words, low);
        _mm512_storeu_ps(words + 16, high);
        return _mm512_add_ps(sum, _mm512_add_ps(low, high));
    }
};
#endif

constexpr int TILE_WORDS = KEYS / Values::KEYS_A_WORD;

// sums (ROWS x LANES) += rows (ROWS x words, STRIDE words apart) * panel (words x LANES).
template <class Word, int STRIDE, class Vector>
INLINE void multiply(const uint32_t* rows, const uint32_t* panel, int64_t words, Vector (&sums)[ROWS][2]) {
    for (int64_t w = 0; w < words; ++w, ++rows, panel += LANES) {
        const __m512i left = _mm512_load_si512(panel), right = _mm512_load_si512(panel + 16);
#pragma GCC unroll 12
        for (int r = 0; r < ROWS; ++r) {
            const __m512i word = _mm512_set1_epi32(rows[r * STRIDE]);
            sums[r][0] = Word::add(sums[r][0], word, left);
            sums[r][1] = Word::add(sums[r][1], word, right);
        }
    }
}

// ---- Change of basis ------------------------------------------------------------------------------------------------

// x of 16 lanes times a Hadamard matrix of 16.
INLINE __m512 rotate_lanes(__m512 x) {
    const auto step = [](__m512 x, __m512 partner, __mmask16 second) { // x + partner, in `second` partner - x
        return _mm512_fmadd_ps(x, _mm512_mask_blend_ps(second, _mm512_set1_ps(1.0f), _mm512_set1_ps(-1.0f)), partner);
    };
    x = step(x, _mm512_permute_ps(x, 0xB1), 0xAAAA);
    x = step(x, _mm512_permute_ps(x, 0x4E), 0xCCCC);
    x = step(x, _mm512_shuffle_f32x4(x, x, 0xB1), 0xF0F0);
    return step(x, _mm512_shuffle_f32x4(x, x, 0x4E), 0xFF00);
}

// The larger of `most` and |x|, compared as integers: they are ordered alike, and NaN and Inf are the largest.
INLINE __m512i larger(__m512i most, __m512 x) {
    return _mm512_max_epi32(most, _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0x7FFFFFFF)));
}

INLINE float largest_of(__m512i most) {
    return _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128(_mm512_reduce_max_epi32(most))));
}

// VECTORS x 16 floats times the factors, then a Hadamard matrix, in place and in registers. The largest then.
template <int VECTORS> INLINE __m512i rotate_block(float* row, const float* factors) {
    __m512 x[VECTORS];
#pragma GCC unroll 16
    for (int i = 0; i < VECTORS; ++i) {
        x[i] = rotate_lanes(_mm512_mul_ps(_mm512_load_ps(row + 16 * i), _mm512_load_ps(factors + 16 * i)));
    }
#pragma GCC unroll 4
    for (int step = 1; step < VECTORS; step *= 2) {
#pragma GCC unroll 16
        for (int i = 0; i < VECTORS; ++i) {
            if (i & step) continue;
            const __m512 first = x[i], second = x[i + step];
            x[i] = _mm512_add_ps(first, second);
            x[i + step] = _mm512_sub_ps(first, second);
        }
    }
    __m512i most = _mm512_setzero_si512();
#pragma GCC unroll 16
    for (int i = 0; i < VECTORS; ++i) {
        _mm512_store_ps(row + 16 * i, x[i]);
        most = larger(most, x[i]);
    }
    return most;
}

// The largest power of two in `width`, a multiple of 16: the first part of it that is rotated.
INLINE int first_part(int width) { return 1 << (31 - __builtin_clz(width)); }

inline __m512i rotate_part(float* row, int part, const float* factors) {
    switch (part / 16) {
    case 1: return rotate_block<1>(row, factors);
    case 2: return rotate_block<2>(row, factors);
    case 4: return rotate_block<4>(row, factors);
    case 8: return rotate_block<8>(row, factors);
    default: return rotate_block<16>(row, factors);
    }
}

// `width` floats times the factors, then rotated: each part, and what is mixed of two. The largest then.
inline __m512i rotate(float* row, int width, const float* factors) {
    const int part = first_part(width), rest = width - part;
    __m512i most = rotate_part(row, part, factors);
    if (rest == 0) return most;
    rotate(row + part, rest, factors + part);
    const int next = first_part(rest);
    const __m512 half = _mm512_set1_ps(0.70710678f);
    for (float* x = row + part - next; x < row + part; x += 16) {
        const __m512 end = _mm512_load_ps(x), other = _mm512_load_ps(x + next);
        _mm512_store_ps(x, _mm512_mul_ps(_mm512_add_ps(end, other), half));
        _mm512_store_ps(x + next, _mm512_mul_ps(_mm512_sub_ps(end, other), half));
    }
    most = _mm512_setzero_si512();
    for (int d = 0; d < width; d += 16) most = larger(most, _mm512_load_ps(row + d));
    return most;
}

// ---- Quantization ---------------------------------------------------------------------------------------------------

// `width` floats to INT8, every byte then XORed with `flip`; each 16 lie `apart` bytes after the last. Returns the sum
// of their squares in units of INT8, before they are rounded.
INLINE float quantize(const float* x, int width, float inverse, uint8_t flip, uint8_t* to, int apart) {
    __m512 squares = _mm512_setzero_ps();
    for (int d = 0; d < width; d += 16, to += apart) {
        const __m512 scaled = _mm512_mul_ps(_mm512_load_ps(x + d), _mm512_set1_ps(inverse));
        squares = _mm512_fmadd_ps(scaled, scaled, squares);
        const __m512i rounded = _mm512_cvtps_epi32(scaled);
        _mm_store_si128((__m128i*)to, _mm_xor_si128(_mm512_cvtsepi32_epi8(rounded), _mm_set1_epi8(flip)));
    }
    return _mm512_reduce_add_ps(squares);
}

// ---- The packed K and V ---------------------------------------------------------------------------------------------

// Of K_BLOCK keys, what errors are predicted from: |k|^2 as integers, sqrt(mean(|k|^4)), in which outlying tokens
// count, and the mean of |v|^2, or more where some v outlie.
struct Judged {
    float k, v;
};

// What `pack` writes and `attend` reads: K and V of the KV heads from `first_head` on, as many as the memory is for.
struct Packed {
    static int64_t words(const Shape& s, int64_t heads) {
        int64_t total = 0;
        for (int64_t size : sizes(s)) total += round_up(heads * size, 16);
        return total;
    }
    Packed(const Masks& masks, int64_t first_head, int64_t heads, uint32_t* memory)
        : masks(masks), shape(masks.shape), first_head(first_head), k_size(sizes(shape)[0]), v_size(sizes(shape)[1]) {
        const Shape& s = shape;
        uint32_t* parts[PARTS];
        for (int i = 0; i < PARTS; ++i) {
            parts[i] = memory;
            memory += round_up(heads * sizes(s)[i], 16);
        }
        k = parts[0];
        v = parts[1];
        start = (int32_t*)parts[2];
        judged = (Judged*)parts[3];
        k_scale = (float*)parts[4];
        mean = (float*)parts[5];
        factors = (float*)parts[6];
    }
    uint32_t* k_panel(int64_t head, int64_t key) const { return k + place(head) * k_size + key * shape.k_words(); }
    int32_t* starts(int64_t head, int64_t key) const { return start + place(head) * shape.k_blocks() * K_BLOCK + key; }
    float* k_scales(int64_t head, int64_t key) const {
        return k_scale + place(head) * shape.tiles() * BLOCKS + key / K_BLOCK;
    }
    Judged* judged_by(int64_t head, int64_t key) const {
        return judged + place(head) * shape.k_blocks() + key / K_BLOCK;
    }
    float* k_mean(int64_t head) const { return mean + place(head) * shape.width(); }
    float* q_factors(int64_t head) const { return factors + place(head) * 2 * shape.k_width(); }
    float* k_factors(int64_t head) const { return q_factors(head) + shape.k_width(); }
    // The words of `key` in the panel that starts at dimension `dim`.
    uint32_t* v_panel(int64_t head, int64_t key, int dim) const {
        const int64_t tile = key / KEYS * TILE_WORDS * shape.width() + dim * TILE_WORDS;
        return v + place(head) * v_size + tile + key % KEYS / Values::KEYS_A_WORD * LANES;
    }

    const Masks& masks;
    const Shape& shape;

  private:
    static constexpr int PARTS = 7;

    // Words a KV head of k, v, start, judged, k_scale, mean and factors.
    static std::array<int64_t, PARTS> sizes(const Shape& s) {
        const int64_t keys = s.k_blocks() * K_BLOCK;
        return {keys * s.k_words(), s.tiles() * TILE_WORDS * s.width(), keys, s.k_blocks() * 2, s.tiles() * BLOCKS,
                s.width(), 2 * s.k_width()};
    }
    int64_t place(int64_t head) const { return head - first_head; }

    int64_t first_head, k_size, v_size;
    uint32_t *k, *v;
    int32_t* start; // where the sum of products with that key starts: MAGIC_BITS, less what q + 128 adds
    float* k_scale; // of each K_BLOCK keys; infinite where K or V cannot be quantized, and 0 where no query sees a key
    Judged* judged;
    float* mean;
    float* factors; // of each channel, before it is rotated: of Q, then of K
};

// 2^x; -inf gives 0, and 0 exactly 1, so that what shrinks by it time and again stays as it is. Relative error 9e-5, below
// bfloat16's 2e-3: a polynomial of degree 3 on the fraction, fitted to the least relative error, and the whole part added
// to the exponent.
INLINE __m512 exp2(__m512 x) {
    const __m512 fraction = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    __m512 power = _mm512_set1_ps(0.07706708f);
    power = _mm512_fmadd_ps(power, fraction, _mm512_set1_ps(0.22764495f));
    power = _mm512_fmadd_ps(power, fraction, _mm512_set1_ps(0.6951168f));
    power = _mm512_fmadd_ps(power, fraction, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(power, x);
}

// The logarithm to base 2 of a positive number, up to 0.09 too small.
INLINE __m512 log2(__m512 x) {
    const __m512 mantissa = _mm512_getmant_ps(x, _MM_MANT_NORM_1_2, _MM_MANT_SIGN_src);
    return _mm512_add_ps(_mm512_getexp_ps(x), _mm512_sub_ps(mantissa, _mm512_set1_ps(1.0f)));
}

// `size` with the sign that each of the 16 channels from d on has: the parity of the sum of bit 2i times bit 2i + 1.
INLINE __m512 signed_size(int d, float size) {
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i channel = _mm512_add_epi32(lane, _mm512_set1_epi32(d));
    __m512i bits = _mm512_and_si512(_mm512_and_si512(channel, _mm512_srli_epi32(channel, 1)), _mm512_set1_epi32(0x55));
    bits = _mm512_xor_si512(bits, _mm512_srli_epi32(bits, 4));
    bits = _mm512_xor_si512(bits, _mm512_srli_epi32(bits, 2)); // bit 0: the parity of bits 0, 2, 4 and 6
    const __m512i signs = _mm512_slli_epi32(bits, 31);
    return _mm512_castsi512_ps(_mm512_xor_si512(signs, _mm512_castps_si512(_mm512_set1_ps(size))));
}

// The mean of up to about 256 of the tokens of K that are seen, evenly spread: any vector does, softmax does not see it.
template <class T> void find_mean(const Packed& to, const Tensor<T>& k, int64_t head) {
    const Shape& shape = to.shape;
    SeenKeys seen(to.masks, head);
    const int64_t step = 1 + (seen.count - 1) / 256;
    const __m512 part = _mm512_set1_ps(1.0f / ceil_div(seen.count, step)); // not used where none is seen
    float* mean = to.k_mean(head);
    std::fill_n(mean, shape.width(), 0.0f);
    for (int64_t n = 0; n < seen.count; n += step) {
        alignas(64) float row[MAX_DIM];
        const T* const token = k.token(head / shape.kv_heads, head % shape.kv_heads, seen.at(n));
        k.prefetch(token, shape.dim, step);
        k.read(token, shape.dim, shape.k_width(), row);
        for (int d = 0; d < shape.dim; d += 16) {
            _mm512_store_ps(mean + d, _mm512_fmadd_ps(_mm512_load_ps(row + d), part, _mm512_load_ps(mean + d)));
        }
    }
}

// Logarithms to base 2 of mean squares of channels of up to SAMPLE of `count` tokens, evenly spread, less `mean`. What
// is no number, or one that has no square, counts as 0.
template <class Token>
INLINE void find_sizes(const Shape& shape, int64_t count, Token read, const float* mean, float* squares) {
    const int width = shape.k_width();
    std::fill_n(squares, width, 0.0f);
    if (count == 0) return;
    const int64_t sample = std::min<int64_t>(SAMPLE, count), step = count / sample, more = count % sample;
    for (int64_t i = 0, n = 0, left = 0; i < sample; ++i, n += step, left += more) { // n: i * count / sample
        if (left >= sample) {
            left -= sample;
            ++n;
        }
        alignas(64) float row[MAX_DIM];
        read(n, row);
        for (int d = 0; d < width; d += 16) {
            const __m512 x = _mm512_sub_ps(_mm512_load_ps(row + d), _mm512_load_ps(mean + d));
            const __mmask16 fine = _mm512_cmp_ps_mask(_mm512_abs_ps(x), _mm512_set1_ps(0x1p55f), _CMP_LE_OQ);
            const __m512 sum = _mm512_load_ps(squares + d);
            _mm512_store_ps(squares + d, _mm512_mask3_fmadd_ps(x, x, sum, fine));
        }
    }
    __m512 most = _mm512_setzero_ps();
    for (int d = 0; d < width; d += 16) most = _mm512_max_ps(most, _mm512_load_ps(squares + d));
    const float largest = _mm512_reduce_max_ps(most);
    for (int d = 0; d < width; d += 16) {
        const __m512 least = _mm512_set1_ps(largest * LEAST_SQUARE), x = _mm512_load_ps(squares + d);
        const __m512 mean = _mm512_div_ps(_mm512_max_ps(x, least), _mm512_set1_ps(float(sample)));
        _mm512_store_ps(squares + d, log2(largest > 0x1p-100f ? mean : _mm512_set1_ps(1.0f)));
    }
}

// The factors that balance the channels of Q, of all heads that share this one of K, and K, with the signs and the size
// of the Hadamard matrix that comes then.
template <class T> void find_factors(const Packed& to, const Tensor<T>& q, const Tensor<T>& k, int64_t head) {
    const Shape& shape = to.shape;
    const int64_t batch = head / shape.kv_heads, kv_head = head % shape.kv_heads, group = shape.group();
    const int width = shape.k_width();
    alignas(64) float of_q[MAX_DIM], of_k[MAX_DIM], zeros[MAX_DIM] = {};
    const auto read = [&](const Tensor<T>& x, const T* token, float* row) { x.read(token, shape.dim, width, row); };
    int64_t q_head = kv_head * group, begin = 0; // of this head's queries, among those of the group
    find_sizes(shape, group * shape.q_len, [&](int64_t n, float* row) {
        for (; n - begin >= shape.q_len; begin += shape.q_len) ++q_head;
        read(q, q.token(batch, q_head, n - begin), row);
    }, zeros, of_q);
    SeenKeys seen(to.masks, head);
    find_sizes(shape, seen.count, [&](int64_t n, float* row) {
        read(k, k.token(batch, kv_head, seen.at(n)), row);
    }, to.k_mean(head), of_k);
    __m512 sum = _mm512_setzero_ps();
    for (int d = 0; d < shape.dim; d += 16) {
        const __m512 ratio = _mm512_sub_ps(_mm512_load_ps(of_k + d), _mm512_load_ps(of_q + d));
        sum = _mm512_mask_add_ps(sum, first(std::max(shape.dim - d, 0)), sum, ratio);
    }
    const __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(sum) / shape.dim);
    for (int d = 0, end = 0, part = 0; d < width; d += 16) {
        if (d == end) end += part = first_part(width - d);
        const __m512 difference = _mm512_sub_ps(_mm512_load_ps(of_k + d), _mm512_load_ps(of_q + d));
        const __m512 exponent = _mm512_mul_ps(_mm512_set1_ps(0.25f), _mm512_sub_ps(difference, mean));
        const __mmask16 far = _mm512_cmp_ps_mask(_mm512_abs_ps(exponent), _mm512_set1_ps(LEAST_EXPONENT), _CMP_GT_OQ);
        const __m512 ratio = exp2(_mm512_maskz_mov_ps(far & first(std::max(shape.dim - d, 0)), exponent));
        const __m512 size = signed_size(d, 1.0f / std::sqrt(float(part)));
        _mm512_storeu_ps(to.q_factors(head) + d, _mm512_mul_ps(size, ratio));
        _mm512_storeu_ps(to.k_factors(head) + d, _mm512_div_ps(size, ratio));
    }
}

template <class T> void find_basis(const Packed& to, const Tensor<T>& q, const Tensor<T>& k, int64_t head) {
    find_mean(to, k, head);
    find_factors(to, q, k, head);
}

// Quantize 16 tokens of K into 16 lanes of a panel.
INLINE void pack_lanes(const float (*rows)[MAX_DIM], int width, float inverse, int words, uint32_t* panel) {
    // For each 16 dimensions 4 vectors, of which number t % 4 holds token t: what is left are transposes of 4 x 4.
    __m512i tokens[MAX_DIM / 16][4];
    for (int t = 0; t < 16; ++t) {
        quantize(rows[t], width, inverse, 0, (uint8_t*)&tokens[0][t % 4] + t / 4 * 16, sizeof tokens[0]);
    }
    for (int w = 0; w < words; w += 4) {
        const __m512i* const from = tokens[w / 4];
        const __m512i a = _mm512_unpacklo_epi32(from[0], from[1]), b = _mm512_unpackhi_epi32(from[0], from[1]);
        const __m512i c = _mm512_unpacklo_epi32(from[2], from[3]), d = _mm512_unpackhi_epi32(from[2], from[3]);
        const __m512i turned[] = {_mm512_unpacklo_epi64(a, c), _mm512_unpackhi_epi64(a, c),
                                  _mm512_unpacklo_epi64(b, d), _mm512_unpackhi_epi64(b, d)};
        for (int i = 0; i < std::min(4, words - w); ++i) _mm512_store_si512(panel + (w + i) * LANES, turned[i]);
    }
}

// Where the sums of 16 lanes of a panel start, for queries that are 128 too large; and the lanes' |k|^2.
INLINE __m512i start_of(const uint32_t* panel, int words, __m512i& squares) {
    __m512i excess = _mm512_setzero_si512();
    squares = _mm512_setzero_si512();
    for (int w = 0; w < words; ++w) {
        const __m512i word = _mm512_load_si512(panel + w * LANES), size = _mm512_abs_epi8(word);
        excess = _mm512_dpbusd_epi32(excess, _mm512_set1_epi8(int8_t(0x80)), word);
        squares = _mm512_dpbusd_epi32(squares, size, size);
    }
    return _mm512_sub_epi32(_mm512_set1_epi32(MAGIC_BITS), excess);
}

// Quantize and pack those of the tokens [from, from + count) of K that are seen, and zeros for the others up to a whole
// panel; returns the largest number that is quantized.
template <class T>
float pack_k(const Packed& to, const Tensor<T>& k, int64_t head, int64_t from, int count, uint64_t seen) {
    const Shape& shape = to.shape;
    const int padded = round_up(count, LANES), width = shape.k_width();
    alignas(64) float rows[K_BLOCK][MAX_DIM];
    const float* mean = to.k_mean(head);
    __m512i most = _mm512_setzero_si512();
    for (int n = 0; n < count; ++n) {
        if (!(seen >> n & 1)) {
            std::fill_n(rows[n], width, 0.0f);
            continue;
        }
        const T* const token = k.token(head / shape.kv_heads, head % shape.kv_heads, from + n);
        k.prefetch(token, shape.dim);
        k.read(token, shape.dim, width, rows[n]);
        for (int d = 0; d < width; d += 16) {
            _mm512_store_ps(rows[n] + d, _mm512_sub_ps(_mm512_load_ps(rows[n] + d), _mm512_load_ps(mean + d)));
        }
        most = _mm512_max_epi32(most, rotate(rows[n], width, to.k_factors(head)));
    }
    for (int n = count; n < padded; ++n) std::fill_n(rows[n], width, 0.0f);
    const float amax = std::max(largest_of(most), SMALLEST_AMAX);
    __m512 fourth = _mm512_setzero_ps();
    for (int n = 0; n < padded; n += 16) {
        uint32_t* const panel = to.k_panel(head, from + n / LANES * LANES) + n % LANES;
        pack_lanes(rows + n, width, 127.0f / amax, shape.k_words(), panel);
        __m512i squares;
        _mm512_store_si512(to.starts(head, from + n), start_of(panel, shape.k_words(), squares));
        const __m512 square = _mm512_cvtepi32_ps(squares);
        fourth = _mm512_fmadd_ps(square, square, fourth);
    }
    to.judged_by(head, from)->k = std::sqrt(_mm512_reduce_add_ps(fourth) / __builtin_popcountll(seen));
    return amax;
}

// Pack those of the tokens [from, from + count) of V that are seen, and zeros for the others up to a whole panel, in a
// tile of which `words` are the first token's, of dimension 0; returns the largest |v|. `squares`: the sum of |v|^2.
template <class T>
float pack_v(const Shape& shape, const Tensor<T>& v, int64_t head, int64_t from, int count, uint64_t seen,
             uint32_t* words, float& squares) {
    const int width = shape.width();
    __m512i most = _mm512_setzero_si512();
    __m512 sum = _mm512_setzero_ps();
    for (int n = 0; n < round_up(count, LANES); n += Values::KEYS_A_WORD) {
        alignas(64) float rows[Values::KEYS_A_WORD][MAX_DIM];
        for (int i = 0; i < Values::KEYS_A_WORD; ++i) {
            const T* const token = v.token(head / shape.kv_heads, head % shape.kv_heads, from + n + i);
            v.prefetch(token, shape.dim);
            v.read(token, seen >> (n + i) & 1 ? shape.dim : 0, width, rows[i]);
            for (int d = 0; d < width; d += 16) {
                const __m512 x = _mm512_load_ps(rows[i] + d);
                most = larger(most, x);
                sum = _mm512_fmadd_ps(x, x, sum);
            }
        }
        for (int d = 0; d < width; d += 16) {
            uint32_t* const to = words + d / LANES * LANES * TILE_WORDS + n / Values::KEYS_A_WORD * LANES + d % LANES;
            _mm512_store_si512(to, Values::pack(rows[0] + d, MAX_DIM));
        }
    }
    squares = _mm512_reduce_add_ps(sum);
    return largest_of(most);
}

template <class T> void pack(const Packed& to, const Tensor<T>& k, const Tensor<T>& v, int64_t head, int64_t from) {
    const Shape& shape = to.shape;
    const int count = std::min<int64_t>(K_BLOCK, shape.kv_len - from);
    const uint64_t seen = to.masks.are_plain ? first_bits(count) : to.masks.seen_by(head)[from / K_BLOCK];
    Judged& judged = *to.judged_by(head, from);
    float& scale = *to.k_scales(head, from);
    float squares;
    const float v_amax = pack_v(shape, v, head, from, count, seen, to.v_panel(head, from, 0), squares);
    if (!seen) { // and no score with them, whatever it is
        judged = {0.0f, 0.0f};
        scale = 0.0f;
        return;
    }
    const float k_amax = pack_k(to, k, head, from, count, seen);
    judged.v = std::max(squares / __builtin_popcountll(seen), v_amax * v_amax * shape.dim / 64);
    const bool fits = k_amax <= FLT_MAX && v_amax <= LARGEST_V; // false for a NaN too
    scale = fits ? k_amax / 127.0f : INFINITY;
}

// ---- Attention of one block of queries ------------------------------------------------------------------------------

// The state of up to MAX_QUERIES queries.
struct Block {
    alignas(64) uint32_t q[MAX_QUERIES][Q_WORDS]; // bytes q + 128
    alignas(64) float factor[MAX_QUERIES + 16];   // of an integer score, but for K's scale: a power of two follows
    alignas(64) float top[MAX_QUERIES + 16];      // the largest score yet, as that power of two
    alignas(64) __m512 sum[MAX_QUERIES];          // of the weights, in 16 parts
    alignas(64) float out[MAX_QUERIES * MAX_DIM]; // (queries, width), not yet divided by the sum
    alignas(64) float square[MAX_QUERIES + 16];   // |q|^2, of integers
    // Weighted by the weights, in 16 parts: the noise of scores, squared, and |v|^2.
    alignas(64) __m512 noise[MAX_QUERIES], values[MAX_QUERIES];
    int64_t batch, head, first; // its queries are [first, first + count) of a head
    int count;
    Interval sees[MAX_QUERIES];          // of each query, those that are missing being the last one
    Interval reaches[MAX_QUERIES / ROWS]; // from the first to the last key that some of ROWS queries see
    float added[MAX_QUERIES];            // the largest number that is added to a score of a query that is literal
};

// Of some keys: their largest scale; the squares of their scales, and those times |k|^2, relative to that one; |v|^2.
// The mean of |v|^2, and of the others the root of the mean of squares, in which blocks with outlying tokens count.
struct Noise {
    float scale, unit, k, v;

    Noise(const Packed& kv, int64_t head, int64_t from, int64_t end) : scale(0.0f), unit(0.0f), k(0.0f), v(0.0f) {
        const float* const scales = kv.k_scales(head, from);
        const Judged* const judged = kv.judged_by(head, from);
        const int blocks = int(ceil_div(end - from, K_BLOCK));
        int seen = 0;
        for (int b = 0; b < blocks; ++b) scale = std::max(scale, scales[b]), seen += scales[b] > 0.0f;
        for (int b = 0; b < blocks && seen > 0; ++b) { // of those that no query sees all is 0
            const float relative = scales[b] / scale, square = relative * relative;
            unit += square * square / seen;
            k += square * judged[b].k * square * judged[b].k / seen;
            v += judged[b].v / seen;
        }
        unit = std::sqrt(unit);
        k = std::sqrt(k);
    }
    // Of scores of 16 queries from number n on with them.
    INLINE __m512 of(const Block& block, int n) const {
        const __m512 size = _mm512_mul_ps(_mm512_loadu_ps(block.factor + n), _mm512_set1_ps(scale));
        const __m512 square = _mm512_loadu_ps(block.square + n);
        const __m512 both = _mm512_fmadd_ps(square, _mm512_set1_ps(unit), _mm512_set1_ps(k));
        return _mm512_mul_ps(_mm512_mul_ps(size, size), _mm512_mul_ps(both, _mm512_set1_ps(ROUNDING)));
    }
};

// The weights of ROWS queries for one tile of keys.
struct Tile {
    alignas(64) float scores[ROWS][KEYS];         // integers, MAGIC above their value
    alignas(64) uint32_t weights[ROWS][TILE_WORDS];
    alignas(64) float units[ROWS][BLOCKS];        // a score's size as a power of two. Not 0: a hidden -inf would be NaN
    alignas(64) float shrink[16];                 // what each query's earlier weights are now to be multiplied with
    alignas(64) float noise[16];                  // of each query's scores
    Sight sight;
};

// ROWS queries have met no key.
INLINE void reset(Block& block, const Shape& shape, int row) {
    for (int n = row; n < row + ROWS; ++n) {
        block.top[n] = -FLT_MAX; // below all scores, and a number, so that one that is hidden has the weight 0
        block.sum[n] = block.noise[n] = block.values[n] = _mm512_setzero_ps();
    }
    std::fill_n(block.out + row * shape.width(), ROWS * shape.width(), 0.0f);
}

// Read, quantize and reset; returns the largest factor, infinite where Q cannot be quantized. Missing queries are zero.
template <class T>
float start_block(Block& block, const Shape& shape, const Tensor<T>& q, const float* factors) {
    const T* token = q.token(block.batch, block.head, block.first);
    const int count = block.count;
    const int width = shape.k_width();
    const float sign = shape.scale < 0 ? -1.0f : 1.0f;
    float steepest = 0.0f;
    for (int n = 0; n < round_up(count, ROWS); ++n, token += q.strides[2]) {
        alignas(64) float row[MAX_DIM];
        q.prefetch(token, shape.dim);
        q.read(token, n < count ? shape.dim : 0, width, row);
        const float amax = std::max(largest_of(rotate(row, width, factors)), SMALLEST_AMAX);
        if (!(amax <= FLT_MAX)) return INFINITY;
        block.square[n] = quantize(row, width, sign * 127.0f / amax, 0x80, (uint8_t*)block.q[n], 16);
        block.factor[n] = amax / 127.0f * std::fabs(shape.scale) * LOG2_E;
        steepest = std::max(steepest, block.factor[n]);
    }
    for (int row = 0; row < count; row += ROWS) reset(block, shape, row);
    return steepest;
}

// Which keys the block's queries see, but for a tensor.
void find_intervals(Block& block, const Shape& shape, const Mask& mask) {
    for (int n = 0; n < round_up(block.count, ROWS); ++n) {
        Interval& sees = block.sees[n];
        sees = n < block.count ? interval(shape, mask, block.batch, block.first + n) : block.sees[n - 1];
        Interval& reaches = block.reaches[n / ROWS];
        if (n % ROWS == 0) reaches = sees;
        reaches = {std::min(reaches.low, sees.low), std::max(reaches.high, sees.high)};
    }
}

// Whether ROWS queries see keys of the tile that starts at `key`, and no tensor hides them all.
INLINE bool meets(const Block& block, const Masks& masks, int row, int64_t key) {
    const Interval& reaches = block.reaches[row / ROWS];
    return reaches.low < key + KEYS && reaches.high > key &&
           masks.of(block.batch, block.head, block.first + row, key) != Class::EMPTY;
}

// Scores as they stand in a tile: integers that MAGIC was added to, or numbers, which are powers of two already.
struct Integers {
    using Word = Int8;
    static constexpr int STRIDE = Q_WORDS;
    static constexpr float ZERO = MAGIC;
};
struct Numbers {
    using Word = Float32;
    static constexpr int STRIDE = MAX_DIM;
    static constexpr float ZERO = 0.0f;
    static constexpr float UNIT = LOG2_E; // of q times its scale
};
struct Literals : Numbers { // powers of e, to which something is added
    static constexpr float UNIT = 1.0f;
};

INLINE __m512i start_at(const int32_t* start) { return _mm512_load_si512(start); }
INLINE __m512 start_at(const float* start) { return _mm512_load_ps(start); }
INLINE void store_scores(float* to, __m512i scores) { _mm512_store_si512(to, scores); }
INLINE void store_scores(float* to, __m512 scores) { _mm512_store_ps(to, scores); }

// scores (ROWS, keys) of the tile, `keys` a multiple of LANES.
template <class Kind, class Start>
INLINE void find_scores(Tile& tile, const uint32_t* q, const uint32_t* k, const Start* start, int step, int keys,
                        int words) {
    for (int key = 0; key < keys; key += LANES, k += words * LANES, start += step * LANES) {
        decltype(start_at(start)) sums[ROWS][2];
#pragma GCC unroll 12
        for (int r = 0; r < ROWS; ++r) {
            sums[r][0] = start_at(start);
            sums[r][1] = start_at(start + 16);
        }
        multiply<typename Kind::Word, Kind::STRIDE>(q, k, words, sums);
#pragma GCC unroll 12
        for (int r = 0; r < ROWS; ++r) {
            store_scores(tile.scores[r] + key, sums[r][0]);
            store_scores(tile.scores[r] + key + 16, sums[r][1]);
        }
    }
}

// The largest of a row's scores, as a power of two.
template <class Kind> INLINE float highest(const float* scores, const float* units, int keys) {
    __m512 top = _mm512_set1_ps(-INFINITY);
    for (int begin = 0; begin < keys; begin += K_BLOCK) {
        __m512 most = _mm512_set1_ps(-INFINITY);
        for (int key = begin; key < begin + K_BLOCK; key += 16) {
            most = _mm512_max_ps(most, _mm512_load_ps(scores + key));
        }
        const __m512 unit = _mm512_set1_ps(units[begin / K_BLOCK]);
        top = _mm512_max_ps(top, _mm512_mul_ps(_mm512_sub_ps(most, _mm512_set1_ps(Kind::ZERO)), unit));
    }
    return _mm512_reduce_max_ps(top);
}

// The weights of a row, 2^(score - top); returns their sum.
template <class Kind>
INLINE __m512 weigh(const float* scores, const float* units, float top, int keys, uint32_t* weights) {
    __m512 sum = _mm512_setzero_ps();
    for (int begin = 0; begin < keys; begin += K_BLOCK) {
        const __m512 unit = _mm512_set1_ps(units[begin / K_BLOCK]);
        const __m512 offset = _mm512_fmadd_ps(unit, _mm512_set1_ps(Kind::ZERO), _mm512_set1_ps(top));
        for (int key = begin; key < begin + K_BLOCK; key += 32) {
            const __m512 low = exp2(_mm512_fmsub_ps(_mm512_load_ps(scores + key), unit, offset));
            const __m512 high = exp2(_mm512_fmsub_ps(_mm512_load_ps(scores + key + 16), unit, offset));
            sum = Values::store(weights + key / Values::KEYS_A_WORD, low, high, sum);
        }
    }
    return sum;
}

// One step of the online softmax: the tile's scores become weights, and the queries' tops and sums follow. Units are in
// the tile; for integers `noise` is of its keys.
template <class Kind> INLINE void soften(Tile& tile, Block& block, int row, const Noise* noise, int keys) {
    const __m512 before = _mm512_loadu_ps(block.top + row);
    for (int r = 0; r < ROWS; ++r) {
        float& top = block.top[row + r];
        top = std::max(top, highest<Kind>(tile.scores[r], tile.units[r], keys));
    }
    _mm512_store_ps(tile.shrink, exp2(_mm512_sub_ps(before, _mm512_loadu_ps(block.top + row))));
    if (noise) _mm512_store_ps(tile.noise, noise->of(block, row));
    for (int r = 0; r < ROWS; ++r) {
        const int n = row + r;
        const __m512 shrink = _mm512_set1_ps(tile.shrink[r]);
        const __m512 own = weigh<Kind>(tile.scores[r], tile.units[r], block.top[n], keys, tile.weights[r]);
        block.sum[n] = _mm512_fmadd_ps(block.sum[n], shrink, own);
        if (noise) {
            const __m512 of_own = _mm512_mul_ps(own, _mm512_set1_ps(tile.noise[r]));
            block.noise[n] = _mm512_fmadd_ps(block.noise[n], shrink, of_own);
            block.values[n] = _mm512_fmadd_ps(block.values[n], shrink, _mm512_mul_ps(own, _mm512_set1_ps(noise->v)));
        }
    }
}

// out (ROWS, LANES) = out * shrink + weights * v, for one panel of V.
INLINE void add_values(float* out, int width, const Tile& tile, const uint32_t* v, int keys) {
    __m512 sums[ROWS][2];
#pragma GCC unroll 12
    for (int r = 0; r < ROWS; ++r) {
        const __m512 shrink = _mm512_set1_ps(tile.shrink[r]);
        sums[r][0] = _mm512_mul_ps(_mm512_load_ps(out + r * width), shrink);
        sums[r][1] = _mm512_mul_ps(_mm512_load_ps(out + r * width + 16), shrink);
    }
    multiply<Values, TILE_WORDS>(tile.weights[0], v, keys / Values::KEYS_A_WORD, sums);
#pragma GCC unroll 12
    for (int r = 0; r < ROWS; ++r) {
        _mm512_store_ps(out + r * width, sums[r][0]);
        _mm512_store_ps(out + r * width + 16, sums[r][1]);
    }
}

// Hide what the tensor does of the scores of `keys` keys, which begin at block `b` of its sight.
INLINE void hide(Tile& tile, int b, int keys) {
    for (int r = 0; r < ROWS; ++r) {
        for (int key = 0; key < keys; key += 64) {
            const uint64_t hidden = ~tile.sight.bits[r][b + key / 64];
            for (int n = 0; hidden && n < 64; n += 16) {
                _mm512_mask_store_ps(tile.scores[r] + key + n, hidden >> n, _mm512_set1_ps(-INFINITY));
            }
        }
    }
}

// The same, and add to the others what the tensor says, which makes them powers of two: `from` is the first key's number.
template <class Kind>
INLINE void add(Tile& tile, const Block& block, const Masks& masks, int row, int64_t from, int keys) {
    const int b = from % KEYS / 64, count = int(std::min<int64_t>(keys, masks.shape.kv_len - from));
    const __m512 to_two = _mm512_set1_ps(LOG2_E);
    for (int r = 0; r < std::min(ROWS, block.count - row); ++r) {
        float* const scores = tile.scores[r];
        const __m512 least = _mm512_set1_ps(-1e38f), shift = _mm512_set1_ps(block.added[row + r]);
        masks.each_added(block.batch, block.head, block.first + row + r, from, count, [&](int n, __m512 x) {
            const __m512 score = _mm512_load_ps(scores + n);
            if (std::is_same_v<Kind, Literals>) { // rounded as SDPA does it, and not above 0 by more than a score
                x = _mm512_mul_ps(_mm512_sub_ps(_mm512_add_ps(score, x), shift), to_two);
                x = _mm512_max_ps(least, x);
            } else {
                const __m512 number = _mm512_sub_ps(score, _mm512_set1_ps(Kind::ZERO));
                x = _mm512_fmadd_ps(number, _mm512_set1_ps(tile.units[r][n / K_BLOCK]), _mm512_mul_ps(x, to_two));
            }
            const __mmask16 seen = tile.sight.bits[r][b + n / 64] >> n % 64;
            _mm512_store_ps(scores + n, _mm512_mask_mov_ps(_mm512_set1_ps(-INFINITY), seen, x));
        });
    }
    std::fill_n(tile.units[0], ROWS * BLOCKS, 1.0f);
}

// ROWS queries meet the tile of keys that starts at `tile_from`: from `from` on, their scores are found by
// `find(from, keys)` and their units by `find_units(from)`; the tile's values start at `values`.
template <class Kind, class Find, class Units>
INLINE void meet(Tile& tile, Block& block, int row, const Packed& kv, int64_t tile_from, const Noise* noise,
                 const uint32_t* values, Find find, Units find_units) {
    constexpr bool literally = std::is_same_v<Kind, Literals>;
    const Shape& shape = kv.shape;
    const Masks& masks = kv.masks;
    const Interval& reaches = block.reaches[row / ROWS];
    int begin = int(std::clamp<int64_t>(reaches.low - tile_from, 0, KEYS));
    int end = int(std::clamp<int64_t>(reaches.high - tile_from, 0, KEYS));
    if (begin >= end) return;
    bool mixed = false;
    if (!masks.are_plain) {
        const int64_t query = block.first + row;
        const Class is = masks.of(block.batch, block.head, query, tile_from);
        mixed = literally || is == Class::MIXED;
        if (is == Class::EMPTY && !literally) return;
        if (mixed) {
            const int count = std::min(ROWS, block.count - row);
            masks.look(tile.sight, block.batch, block.head, query, count, tile_from, begin, end,
                       literally ? -INFINITY : HIDDEN);
            narrow(tile.sight, begin, end);
            if (begin >= end) return;
        }
    }
    begin = begin / K_BLOCK * K_BLOCK;
    const int64_t from = tile_from + begin;
    const int keys = round_up(end - begin, LANES), whole = round_up(keys, K_BLOCK);
    find(from, keys);
    find_units(from);
    const bool adds = literally || (mixed && tile.sight.biased);
    if (adds) add<Kind>(tile, block, masks, row, from, keys);
    else if (mixed) hide(tile, begin / 64, keys);
    for (int r = 0; r < ROWS; ++r) {
        const Interval& sees = block.sees[row + r];
        float* const scores = tile.scores[r];
        std::fill(scores, scores + std::clamp<int64_t>(sees.low - from, 0, whole), -INFINITY);
        std::fill(scores + std::clamp<int64_t>(sees.high - from, 0, whole), scores + whole, -INFINITY);
    }
    if (adds) soften<Numbers>(tile, block, row, noise, whole);
    else soften<Kind>(tile, block, row, noise, whole);
    values += begin / Values::KEYS_A_WORD * LANES;
    for (int d = 0; d < shape.width(); d += LANES) {
        add_values(block.out + row * shape.width() + d, shape.width(), tile, values + d * TILE_WORDS, keys);
    }
}

void meet_integers(Tile& tile, Block& block, int row, const Packed& kv, int64_t head, int64_t tile_from,
                   const Noise& noise) {
    const auto find = [&](int64_t from, int keys) {
        find_scores<Integers>(tile, block.q[row], kv.k_panel(head, from), kv.starts(head, from), 1, keys,
                              kv.shape.k_words());
    };
    const auto find_units = [&](int64_t from) {
        const float* const scales = kv.k_scales(head, from);
        const int blocks = int(std::min<int64_t>(BLOCKS - from % KEYS / K_BLOCK, kv.shape.k_blocks() - from / K_BLOCK));
        for (int r = 0; r < ROWS; ++r) {
            for (int b = 0; b < blocks; ++b) tile.units[r][b] = std::max(block.factor[row + r] * scales[b], FLT_MIN);
        }
    };
    meet<Integers>(tile, block, row, kv, tile_from, &noise, kv.v_panel(head, tile_from, 0), find, find_units);
}

// `q` (ROWS, STRIDE) and the panels of `k` as floats.
template <class Kind>
void meet_numbers(Tile& tile, Block& block, int row, const Packed& kv, int64_t tile_from, const float* q,
                  const float* k, const uint32_t* values) {
    alignas(64) static constexpr float ZEROS[LANES] = {};
    const auto find = [&](int64_t from, int keys) {
        const float* const panels = k + (from - tile_from) * kv.shape.k_width();
        find_scores<Numbers>(tile, (const uint32_t*)q, (const uint32_t*)panels, ZEROS, 0, keys, kv.shape.k_width());
    };
    const auto find_units = [&](int64_t) { std::fill_n(tile.units[0], ROWS * BLOCKS, 1.0f); };
    meet<Kind>(tile, block, row, kv, tile_from, nullptr, values, find, find_units);
}

// ---- The queries that INT8 does not hold ----------------------------------------------------------------------------

// Whether the error that is predicted of `count` queries, one of them or all together, is too large.
bool is_hard(const Block& block, const Shape& shape, int row, int count) {
    alignas(64) float sums[16] = {}, noises[16] = {}, values[16] = {}, squares[16] = {};
    for (int r = 0; r < count; ++r) {
        __m512 square = _mm512_setzero_ps();
        for (int d = 0; d < shape.width(); d += 16) {
            const __m512 x = _mm512_load_ps(block.out + (row + r) * shape.width() + d);
            square = _mm512_fmadd_ps(x, x, square);
        }
        sums[r] = _mm512_reduce_add_ps(block.sum[row + r]);
        noises[r] = _mm512_reduce_add_ps(block.noise[row + r]);
        values[r] = _mm512_reduce_add_ps(block.values[row + r]);
        squares[r] = _mm512_reduce_add_ps(square);
    }
    const auto all = [](float x) { return _mm512_set1_ps(x); };
    const __m512 p = _mm512_min_ps(_mm512_div_ps(all(1.0f), _mm512_load_ps(sums)), all(1.0f)), rest = all(1.0f) - p;
    const __m512 noise = _mm512_load_ps(noises) * p, v = _mm512_load_ps(values) * p;
    const __m512 size = _mm512_load_ps(squares) * p * p, least = p * v;
    const __mmask16 alike = _mm512_cmp_ps_mask(least, size, _CMP_LT_OQ);
    const __m512 common = _mm512_mask_div_ps(all(1.0f), alike, least, size);
    const __m512 grown = _mm512_min_ps(noise * all(2.0f * LOG2_E), all(80.0f));
    const __m512 error = noise * exp2(grown) * rest * _mm512_sqrt_ps(rest) * common;
    // Sizes that have no square among floats count as the smallest or largest that do.
    const __m512 weight = _mm512_min_ps(_mm512_max_ps(size, all(1e-30f)), all(1e30f));
    const __mmask16 those = first(count);
    const float errors = _mm512_mask_reduce_add_ps(those, error * weight);
    const float sizes = _mm512_mask_reduce_add_ps(those, weight);
    const auto most = all(MOST_ERROR_OF_A_ROW * MOST_ERROR_OF_A_ROW);
    return _mm512_mask_cmp_ps_mask(those, error, most, _CMP_NLE_UQ) || !(errors <= MOST_ERROR * MOST_ERROR * sizes);
}

// 16 columns from `d` on of 16 rows of floats, each to 16 lanes of a panel.
INLINE void transpose(const float (*rows)[MAX_DIM], int d, float* panel) {
    __m512 x[16], y[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) x[i] = _mm512_load_ps(rows[i] + d);
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
        y[i] = _mm512_unpacklo_ps(x[i], x[i + 1]);
        y[i + 1] = _mm512_unpackhi_ps(x[i], x[i + 1]);
    }
    const auto pairs = [](__m512 a, __m512 b, bool high) {
        const __m512d low = _mm512_castps_pd(a), other = _mm512_castps_pd(b);
        return _mm512_castpd_ps(high ? _mm512_unpackhi_pd(low, other) : _mm512_unpacklo_pd(low, other));
    };
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) { // x[i + j]: of each 4 columns number j, of rows i to i + 3
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) x[i + j] = pairs(y[i + j / 2], y[i + j / 2 + 2], j % 2);
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
        const __m512 even = _mm512_shuffle_f32x4(x[j], x[4 + j], 0x88);
        const __m512 odd = _mm512_shuffle_f32x4(x[j], x[4 + j], 0xDD);
        const __m512 even_too = _mm512_shuffle_f32x4(x[8 + j], x[12 + j], 0x88);
        const __m512 odd_too = _mm512_shuffle_f32x4(x[8 + j], x[12 + j], 0xDD);
        float* const to = panel + (d + j) * LANES;
        _mm512_store_ps(to, _mm512_shuffle_f32x4(even, even_too, 0x88));
        _mm512_store_ps(to + 4 * LANES, _mm512_shuffle_f32x4(odd, odd_too, 0x88));
        _mm512_store_ps(to + 8 * LANES, _mm512_shuffle_f32x4(even, even_too, 0xDD));
        _mm512_store_ps(to + 12 * LANES, _mm512_shuffle_f32x4(odd, odd_too, 0xDD));
    }
}

// The tile of K that starts at `from` less its mean, as panels of floats.
template <class T> void unpacked(const Packed& kv, const Tensor<T>& k, int64_t head, int64_t from, float* panels) {
    const Shape& shape = kv.shape;
    const int width = shape.k_width(), count = int(std::min<int64_t>(KEYS, shape.kv_len - from));
    const float* mean = kv.k_mean(head);
    for (int n = 0; n < round_up(count, LANES); n += 16) {
        alignas(64) float rows[16][MAX_DIM];
        for (int i = 0; i < 16; ++i) {
            const bool there = n + i < count;
            const T* const token = k.token(head / shape.kv_heads, head % shape.kv_heads, from + n + i);
            if (there) k.prefetch(token, shape.dim);
            k.read(token, there ? shape.dim : 0, width, rows[i]);
            for (int d = 0; there && d < width; d += 16) {
                _mm512_store_ps(rows[i] + d, _mm512_sub_ps(_mm512_load_ps(rows[i] + d), _mm512_load_ps(mean + d)));
            }
        }
        float* const panel = panels + n / LANES * LANES * width + n % LANES;
        for (int d = 0; d < width; d += 16) transpose(rows, d, panel);
    }
}

thread_local Scratch of_numbers;

// Each ROWS of the block's queries that are `chosen`, once more, with scores in float32. False if there is no memory, or
// if literal queries, which read V themselves, meet one that cannot be held.
template <class Kind, class T>
bool attend_in_numbers(Block& block, Tile& tile, const Packed& kv, const Tensor<T>& q, const Tensor<T>& k,
                       const Tensor<T>& v, int64_t kv_head, const bool* chosen) {
    constexpr bool literally = std::is_same_v<Kind, Literals>;
    const Shape& shape = kv.shape;
    const int width = shape.k_width(), count = block.count;
    const int64_t of_values = literally ? shape.width() * TILE_WORDS : 0;
    float* const rows = (float*)of_numbers.get(MAX_QUERIES * Numbers::STRIDE + KEYS * width + of_values);
    if (!rows) return false;
    float* const panels = rows + MAX_QUERIES * Numbers::STRIDE;
    uint32_t* const literal_values = (uint32_t*)(panels + KEYS * width);
    for (int n = 0; n < round_up(count, ROWS); ++n) {
        if (!chosen[n / ROWS]) continue;
        float* const row = rows + n * Numbers::STRIDE;
        q.read(q.token(block.batch, block.head, block.first + n), n < count ? shape.dim : 0, width, row);
        for (int d = 0; d < width; d += 16) {
            _mm512_store_ps(row + d, _mm512_mul_ps(_mm512_load_ps(row + d), _mm512_set1_ps(shape.scale * Kind::UNIT)));
        }
        if (n % ROWS == 0) reset(block, shape, n);
    }
    for (int64_t key = 0; key < shape.kv_len; key += KEYS) {
        const auto here = [&](int row) {
            const Interval& reaches = block.reaches[row / ROWS];
            if (literally) return chosen[row / ROWS] && reaches.low < key + KEYS && reaches.high > key;
            return chosen[row / ROWS] && meets(block, kv.masks, row, key);
        };
        bool some = false;
        for (int row = 0; row < count; row += ROWS) some |= here(row);
        if (!some) continue;
        unpacked(kv, k, kv_head, key, panels);
        const uint32_t* values = literally ? literal_values : kv.v_panel(kv_head, key, 0);
        for (int n = 0; literally && n < KEYS && key + n < shape.kv_len; n += K_BLOCK) {
            const int tokens = int(std::min<int64_t>(K_BLOCK, shape.kv_len - key - n));
            uint32_t* const to = literal_values + n / Values::KEYS_A_WORD * LANES;
            float squares;
            if (!(pack_v(shape, v, kv_head, key + n, tokens, first_bits(tokens), to, squares) <= LARGEST_V)) return false;
        }
        for (int row = 0; row < count; row += ROWS) {
            if (here(row)) meet_numbers<Kind>(tile, block, row, kv, key, rows + row * Numbers::STRIDE, panels, values);
        }
    }
    return true;
}

// Queries [first, first + count) of a head. Returns how many of them were computed exactly, or -1 if neither INT8 nor
// floats can hold them or the keys they meet.
template <class T>
int attend(const Packed& kv, const Tensor<T>& q, const Tensor<T>& k, const Tensor<T>& v, const Tensor<T>& out,
           int64_t head, int64_t first, int count) {
    const Shape& shape = kv.shape;
    const Masks& masks = kv.masks;
    Block block;
    Tile tile;
    block.batch = head / shape.q_heads;
    block.head = head % shape.q_heads;
    block.first = first;
    block.count = count;
    const int64_t kv_head = block.batch * shape.kv_heads + block.head / shape.group();
    const float* k_scales = kv.k_scales(kv_head, 0);
    const float k_scale = *std::max_element(k_scales, k_scales + shape.k_blocks());
    const float most_of_a_sum = STEEPEST_SUM / (127 * 127 * shape.k_width());
    const float steepest = masks.mask.adds() ? std::min(STEEPEST, most_of_a_sum) : STEEPEST;
    if (!(start_block(block, shape, q, kv.q_factors(kv_head)) * k_scale <= steepest)) return -1;
    find_intervals(block, shape, masks.mask);

    bool hard[MAX_QUERIES / ROWS] = {}, some = false;
    const Noise usual(kv, kv_head, 0, shape.kv_len);
    for (int row = 0; row < count; row += ROWS) {
        const __mmask16 those = ::first(std::min(ROWS, count - row));
        const __m512 most = _mm512_set1_ps(MOST_NOISE * MOST_NOISE);
        hard[row / ROWS] = _mm512_mask_cmp_ps_mask(those, usual.of(block, row), most, _CMP_NLE_UQ);
    }
    const Interval* const groups = block.reaches;
    Interval all = groups[0];
    for (int row = ROWS; row < count; row += ROWS) {
        all = {std::min(all.low, groups[row / ROWS].low), std::max(all.high, groups[row / ROWS].high)};
    }
    for (int64_t key = all.low / KEYS * KEYS; key < all.high; key += KEYS) {
        const Noise noise(kv, kv_head, key, std::min(shape.kv_len, key + KEYS));
        for (int row = 0; row < count; row += ROWS) {
            if (!hard[row / ROWS]) meet_integers(tile, block, row, kv, kv_head, key, noise);
        }
    }
    for (int row = 0; row < count; row += ROWS) {
        bool& here = hard[row / ROWS];
        here = here || is_hard(block, shape, row, std::min(ROWS, count - row));
        some |= here;
    }
    if (some && !attend_in_numbers<Numbers>(block, tile, kv, q, k, v, kv_head, hard)) return -1;

    const auto sum = [&](int n) { return _mm512_reduce_add_ps(block.sum[n]); };
    const auto write = [&](int n) { // 0 where no key is seen
        const float all = sum(n);
        const float* const row = block.out + n * shape.width();
        out.write(out.token(block.batch, block.head, first + n), shape.dim, row, all == 0.0f ? 0.0f : 1.0f / all);
    };
    int exact = 0;
    bool literal[MAX_QUERIES] = {}, literally[MAX_QUERIES / ROWS] = {};
    some = false;
    for (int n = 0; n < count; ++n) {
        if (masks.mask.adds()) {
            if (!(std::fabs(block.top[n]) <= FARTHEST)) {
                block.added[n] = masks.largest(block.batch, block.head, first + n);
                literal[n] = block.added[n] != -INFINITY;
            } else if (!(sum(n) <= FLT_MAX)) {
                return -1;
            }
        }
        if (literal[n]) some = literally[n / ROWS] = true;
        else write(n);
        exact += literal[n] || hard[n / ROWS];
    }
    if (!some) return exact;
    if (!attend_in_numbers<Literals>(block, tile, kv, q, k, v, kv_head, literally)) return -1;
    for (int n = 0; n < count; ++n) {
        if (literal[n] && !(sum(n) <= FLT_MAX)) return -1;
        if (literal[n]) write(n);
    }
    return exact;
}

// Queries a block: as many as fit, so that K and V are seldom read, but at least `least` blocks in all.
int64_t block_size(const Shape& shape, int64_t least) {
    const int64_t share = ceil_div(shape.batch * shape.q_heads * shape.q_len, least);
    const int64_t most = std::min<int64_t>(MAX_QUERIES, round_up(share, ROWS));
    return round_up(ceil_div(shape.q_len, ceil_div(shape.q_len, most)), ROWS);
}

thread_local Scratch one_head, some_heads, of_masks;

// While it lives this thread takes floats below 2^-126 for 0: a weight 2^-130 as large as the largest one adds nothing,
// but each product with it takes the CPU a hundred times as long.
class WithoutDenormals {
  public:
    WithoutDenormals() : before(_mm_getcsr()) { _mm_setcsr(before | _MM_FLUSH_ZERO_ON | _MM_DENORMALS_ZERO_ON); }
    ~WithoutDenormals() { _mm_setcsr(before); }

  private:
    unsigned before;
};

// Rows of a head that a block leaves to the caller: whatever the other blocks add, the sum is below zero.
constexpr int64_t LEFT = -(int64_t(1) << 40);

// False if there is no memory.
template <class T>
bool run(const Shape& shape, const Mask& mask, const Tensor<T>& q, const Tensor<T>& k, const Tensor<T>& v, const Tensor<T>& out,
         int threads, int64_t* exact) {
    const int64_t kv_heads = shape.batch * shape.kv_heads, group = shape.group(), k_blocks = shape.k_blocks();
    // Whole heads as far as all threads get as many, and wait for none of the others; what is left is done together.
    const int64_t whole = kv_heads >= 8 * threads ? kv_heads : kv_heads - kv_heads % threads, shared = kv_heads - whole;
    const int64_t whole_size = block_size(shape, 1), shared_size = block_size(shape, 4 * threads);
    const int64_t whole_blocks = ceil_div(shape.q_len, whole_size), blocks = ceil_div(shape.q_len, shared_size);
    const auto attend_block = [&](const Packed& packed, int64_t head, int64_t block, int64_t size) {
        const int64_t first = block * size;
        const int rows = attend(packed, q, k, v, out, head, first, int(std::min(size, shape.q_len - first)));
        if (rows == 0) return;
        const int64_t counted = rows < 0 ? LEFT : rows;
#pragma omp atomic
        exact[head] += counted;
    };
    uint32_t* const shared_memory = shared ? some_heads.get(Packed::words(shape, shared)) : nullptr;
    if (shared && !shared_memory) return false;
    Masks masks(shape, mask);
    uint32_t* const tables = masks.are_plain ? nullptr : of_masks.get(masks.words());
    if (!masks.are_plain && !tables) return false;
    masks.place(tables);
    const Packed packed(masks, whole, shared, shared_memory);
    std::atomic<bool> enough = true;
    // Waking the other threads takes microseconds: no less than this one needs for some hundred thousand products. A
    // head takes as long as forty thousand beside its own.
    const bool parallel = double(kv_heads) * group * (double(shape.q_len) * shape.kv_len * shape.dim + 4e4) > 2e5;
#pragma omp parallel num_threads(threads) if (parallel)
    {
        const WithoutDenormals here;
        if (!masks.are_plain) {
#pragma omp for schedule(dynamic)
            for (int64_t i = 0; i < masks.parts_to_classify(); ++i) masks.classify(i);
#pragma omp for
            for (int64_t i = 0; i < shape.batch; ++i) masks.find_reached(i);
#pragma omp for schedule(dynamic)
            for (int64_t i = 0; i < masks.parts_to_see(); ++i) masks.find_seen(i);
        }
#pragma omp for schedule(dynamic) nowait
        for (int64_t head = 0; head < whole; ++head) {
            uint32_t* const memory = one_head.get(Packed::words(shape, 1));
            if (!memory) {
                enough = false;
                continue;
            }
            const Packed own(masks, head, 1, memory);
            find_basis(own, q, k, head);
            for (int64_t block = 0; block < k_blocks; ++block) pack(own, k, v, head, block * K_BLOCK);
            for (int64_t i = 0; i < group * whole_blocks; ++i) {
                attend_block(own, head * group + i / whole_blocks, i % whole_blocks, whole_size);
            }
        }
        one_head.trim(threads);
        if (shared) {
#pragma omp for schedule(dynamic)
            for (int64_t head = whole; head < kv_heads; ++head) find_basis(packed, q, k, head);
#pragma omp for schedule(dynamic)
            for (int64_t i = 0; i < shared * k_blocks; ++i) {
                pack(packed, k, v, whole + i / k_blocks, i % k_blocks * K_BLOCK);
            }
#pragma omp for schedule(dynamic)
            for (int64_t i = 0; i < shared * group * blocks; ++i) { // the longest causal rows first
                attend_block(packed, whole * group + i / blocks, blocks - 1 - i % blocks, shared_size);
            }
        }
    }
    some_heads.trim(1);
    of_masks.trim(1);
    return enough;
}

template <class T>
bool run_typed(const Shape& shape, const Mask& mask, void* const* tensors, const int64_t* strides, int threads,
               int64_t* exact) {
    const auto tensor = [&](int i) { return Tensor<T>{static_cast<T*>(tensors[i]), strides + 4 * i}; };
    return run(shape, mask, tensor(0), tensor(1), tensor(2), tensor(3), threads, exact);
}

// ---- How many rows were computed exactly ----------------------------------------------------------------------------

struct Counts {
    int64_t calls, rows, exact;
};
using Table = std::map<std::string, Counts, std::less<>>;
constexpr size_t MOST_SITES = 4096; // those beyond are not counted
std::mutex counting;
Table& counts = *new Table; // by site; never destroyed, as threads may still run when the process ends

// A child of fork has none of its parent's threads, of which one may be counting, and begins to count anew.
const int at_fork = pthread_atfork([] { counting.lock(); }, [] { counting.unlock(); },
                                   [] { counts.clear(), counting.unlock(); });

// One call; what has no name is not counted.
void count(std::string_view site, const Shape& shape, const int64_t* exact) {
    if (site.empty()) return;
    const int64_t heads = shape.batch * shape.q_heads;
    int64_t rows = 0;
    for (int64_t head = 0; head < heads; ++head) rows += exact[head] < 0 ? shape.q_len : exact[head];
    const std::lock_guard lock(counting);
    auto found = counts.find(site);
    if (found == counts.end()) {
        if (counts.size() >= MOST_SITES) return;
        found = counts.emplace(site, Counts{}).first;
    }
    found->second.calls += 1;
    found->second.rows += heads * shape.q_len;
    found->second.exact += rows;
}

} // namespace

// tensors: q, k, v, out, and low, high and mask, each of which may be null. sizes: batch, query heads, query tokens,
// head_dim, KV heads, KV tokens, dtype (0 float32, 1 bfloat16, 2 float16), threads, how far ahead and how far behind a
// query sees (i - behind <= j <= i + ahead), the mask's dtype (3 is bool); then strides in elements: the 4 of q, k, v and
// out, the 2 of low and high, the 4 of mask, 0 for dims that are broadcast. exact: for each batch and query head, zero on
// entry: how many of its rows were computed exactly; below zero for those that are left to the caller. site: for whom it
// is counted, of so many letters. Returns 0, or 1 if there is no memory.
extern "C" int sagecompile_attention(void* const* tensors, const int64_t* sizes, float scale, int64_t* exact,
                                     const char* site, int64_t letters) {
    const int64_t ahead = sizes[8], *strides = sizes + 11;
    const int64_t seen = std::min(sizes[5], sizes[2] + ahead); // no key behind influences anything
    const Shape shape{sizes[0], sizes[1], sizes[2], sizes[4], seen, ahead, int(sizes[3]), scale};
    const auto bound = [&](int i) { return static_cast<const int32_t*>(tensors[i]); };
    const Mask mask{sizes[9], bound(4), bound(5), strides + 16, strides + 18, tensors[6], sizes[10], strides + 20};
    const auto typed = sizes[6] == 0 ? run_typed<float> : sizes[6] == 1 ? run_typed<BFloat16> : run_typed<Float16>;
    if (!typed(shape, mask, tensors, strides, int(sizes[7]), exact)) return 1;
    count({site, size_t(letters)}, shape, exact);
    return 0;
}

// Calls, rows of the output and those of them that were computed exactly, here or by the caller, of each site so far.
extern "C" void sagecompile_counts(void (*each)(const char* site, int64_t calls, int64_t rows, int64_t exact)) {
    Table now;
    {
        const std::lock_guard lock(counting);
        now = counts;
    }
    for (const auto& [site, of] : now) each(site.c_str(), of.calls, of.rows, of.exact);
}
