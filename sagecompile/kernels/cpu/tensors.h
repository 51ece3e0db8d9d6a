// What all parts of the kernel share: the sizes of tiles and of a call, the caller's tensors, and memory.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>

namespace {

#define INLINE inline __attribute__((always_inline))

constexpr int ROWS = 12;        // queries, and
constexpr int LANES = 32;       // keys or dimensions, of one call of the micro-kernel
constexpr int KEYS = 256;       // of a tile
constexpr int K_BLOCK = 64;     // tokens of K that share a scale, and are packed at a time
constexpr int BLOCKS = KEYS / K_BLOCK;
constexpr int MAX_DIM = 256;    // |score| <= 127 * 127 * 256 < 2^22, see MAGIC
constexpr int READ_AHEAD = 16;
// Bytes of scratch that a thread keeps between calls, and that all of a call do.
constexpr int64_t MOST_KEPT = 16 << 20, ALL_KEPT = 256 << 20;

constexpr float LOG2_E = 1.44269504088896341f;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

struct Shape {
    int64_t batch, q_heads, q_len, kv_heads, kv_len;
    int64_t ahead; // of query i: it sees the keys j <= i + ahead
    int dim;
    float scale;

    int64_t group() const { return q_heads / kv_heads; }
    int width() const { return round_up(dim, LANES); } // of V and the output
    int k_width() const { return round_up(dim, 16); }  // of Q and K, as they are rotated
    int k_words() const { return k_width() / 4; }
    int64_t k_blocks() const { return ceil_div(kv_len, K_BLOCK); }
    int64_t tiles() const { return ceil_div(kv_len, KEYS); }
};

// ---- Reading and writing the caller's tensors -----------------------------------------------------------------------

struct Float16 { uint16_t bits; };
struct BFloat16 { uint16_t bits; };

INLINE __m512 load(const float* x, __mmask16 mask) { return _mm512_maskz_loadu_ps(mask, x); }
INLINE __m512 load(const Float16* x, __mmask16 mask) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, x)); }
INLINE __m512 load(const BFloat16* x, __mmask16 mask) {
    const __m512i bits = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, x));
    return _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
}

INLINE void store(float* x, __mmask16 mask, __m512 value) { _mm512_mask_storeu_ps(x, mask, value); }
INLINE void store(Float16* x, __mmask16 mask, __m512 value) { // bfloat16 rounds V's largest value to Inf's place
    const __m512 most = _mm512_set1_ps(65504.0f), least = _mm512_set1_ps(-65504.0f);
    const __m512 clamped = _mm512_max_ps(_mm512_min_ps(value, most), least);
    _mm256_mask_storeu_epi16(x, mask, _mm512_cvtps_ph(clamped, _MM_FROUND_TO_NEAREST_INT));
}
INLINE void store(BFloat16* x, __mmask16 mask, __m512 value) { // to the nearest even; the value is finite
    const __m512i bits = _mm512_castps_si512(value);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
    _mm256_mask_storeu_epi16(x, mask, _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
}

INLINE __mmask16 first(int count) { return count >= 16 ? 0xFFFF : (1u << count) - 1; }

// A (batch, heads, tokens, dim) tensor; strides in elements.
template <class T> struct Tensor {
    T* data;
    const int64_t* strides;

    T* token(int64_t batch, int64_t head, int64_t token) const {
        return data + batch * strides[0] + head * strides[1] + token * strides[2];
    }
    // Fetch the token that is to be read READ_AHEAD steps of so many tokens later: those of a head are often on pages of
    // their own, where the hardware does not fetch ahead by itself. An address that is not there does no harm.
    INLINE void prefetch(const T* token, int dim, int64_t step = 1) const {
        if (strides[3] != 1) return;
        const char* const row = (const char*)token + READ_AHEAD * step * strides[2] * int64_t(sizeof(T));
        for (int at = 0; at < dim * int(sizeof(T)); at += 64) _mm_prefetch(row + at, _MM_HINT_T0);
    }
    // `dim` elements to float32, and zeros up to `width`, a multiple of 16.
    INLINE void read(const T* from, int dim, int width, float* to) const {
        T apart[MAX_DIM];
        if (strides[3] != 1) {
            for (int d = 0; d < dim; ++d) apart[d] = from[d * strides[3]];
            from = apart;
        }
        for (int d = 0; d < width; d += 16) _mm512_store_ps(to + d, load(from + d, first(std::max(dim - d, 0))));
    }
    INLINE void write(T* to, int dim, const float* from, float factor) const {
        T apart[MAX_DIM];
        T* const near = strides[3] == 1 ? to : apart;
        for (int d = 0; d < dim; d += 16) {
            store(near + d, first(dim - d), _mm512_mul_ps(_mm512_load_ps(from + d), _mm512_set1_ps(factor)));
        }
        if (near == apart) {
            for (int d = 0; d < dim; ++d) to[d * strides[3]] = apart[d];
        }
    }
};

// ---- Memory ---------------------------------------------------------------------------------------------------------

// Memory that a thread keeps between calls: pages that are new in each call take as long as packing into them.
class Scratch {
  public:
    // 64-byte aligned, of any contents; nullptr if there is none.
    uint32_t* get(int64_t words) {
        if (words > size) {
            memory.reset(); // before more is asked for
            memory.reset(static_cast<uint32_t*>(std::aligned_alloc(64, round_up(words * 4, 64))));
            size = memory ? words : 0;
        }
        return memory.get();
    }
    // Calls that need more work long enough to get new pages.
    void trim(int threads) {
        if (size * 4 > std::min(MOST_KEPT, ALL_KEPT / threads)) {
            memory.reset();
            size = 0;
        }
    }

  private:
    struct Free {
        void operator()(void* p) const { std::free(p); }
    };
    std::unique_ptr<uint32_t, Free> memory;
    int64_t size = 0;
};

} // namespace
