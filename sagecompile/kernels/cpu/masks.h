// Which keys a query sees: an interval of them, of which the mask may be a part, and what a tensor hides or adds.
//
// In: the caller's mask, of any strides. Out: for each query its interval; for each tile of scores whether the tensor
// hides all of it, nothing, or what; for each KV head which keys some query sees. Others influence nothing.
//
// Intervals are arithmetic. A tensor is read in front of everything else: for each ROWS queries and KEYS keys until it
// is known that they are mixed, so that only tiles that are empty or full are read to their end, and only mixed ones are
// read again, as bits, when their scores are there. That takes 12 x 256 booleans some hundred cycles, and their scores
// ten thousand or more.
//
// A number that is added hides its key if it is at most HIDDEN, as -inf, finfo.min and -1e4 are. That is right in rows
// whose largest score, with what is added, is within FARTHEST of 0: what is hidden would have no weight there. Other rows
// see nothing, and are 0, if all is -inf; else they are computed literally, over all their keys, also those that no other
// query sees: so a row that only finfo.min empties is an average, as SDPA's is.
#pragma once

#include <cmath>
#include <limits>

#include "tensors.h"

namespace {

constexpr float HIDDEN = -9000.0f;   // of what is added
constexpr float FARTHEST = 2048.0f;  // of a score as a power of two
constexpr float STEEPEST_SUM = 4.0f * FARTHEST; // of a score that something is added to: below -HIDDEN * LOG2_E - FARTHEST

// What hides keys beside `ahead`, as it was given. Strides are in elements, and 0 where a dim is broadcast.
struct Mask {
    int64_t behind;            // of query i: it sees no key before i - behind,
    const int32_t *low, *high; // none before low and none from high on, (batch, queries), or null
    const int64_t *low_strides, *high_strides;
    const void* scores;        // (batch, query heads, queries, keys), or null
    int64_t dtype;             // 0 float32, 1 bfloat16, 2 float16: added to the scores; 3 bool: false hides
    const int64_t* strides;

    bool adds() const { return scores && dtype != 3; }

    // f of `scores` in their own type.
    template <class F> INLINE void read(F f) const {
        if (dtype == 3) return f(static_cast<const uint8_t*>(scores));
        read_numbers(f);
    }
    template <class F> INLINE void read_numbers(F f) const {
        if (dtype == 0) return f(static_cast<const float*>(scores));
        if (dtype == 1) return f(static_cast<const BFloat16*>(scores));
        f(static_cast<const Float16*>(scores));
    }
};

struct Interval {
    int64_t low, high; // keys; (all, 0) where there is none
};

// What a query sees, but for the tensor.
inline Interval interval(const Shape& shape, const Mask& mask, int64_t batch, int64_t query) {
    int64_t low = std::max<int64_t>(0, query - mask.behind), high = std::min(shape.kv_len, query + 1 + shape.ahead);
    if (mask.low) low = std::max<int64_t>(low, mask.low[batch * mask.low_strides[0] + query * mask.low_strides[1]]);
    if (mask.high) high = std::min<int64_t>(high, mask.high[batch * mask.high_strides[0] + query * mask.high_strides[1]]);
    return low < high ? Interval{low, high} : Interval{shape.kv_len, 0};
}

// ---- 64 keys at a time, as bits -------------------------------------------------------------------------------------

INLINE uint64_t first_bits(int64_t count) { return count >= 64 ? ~uint64_t(0) : (uint64_t(1) << count) - 1; }
INLINE uint64_t bits_of(Interval seen, int64_t from) {
    return first_bits(std::max<int64_t>(seen.high - from, 0)) & ~first_bits(std::max<int64_t>(seen.low - from, 0));
}

// `count` elements that lie `stride` apart, side by side.
template <class T> INLINE const T* consecutive(const T* from, int64_t stride, int count, T* apart) {
    if (stride == 1) return from;
    for (int n = 0; n < count; ++n) apart[n] = from[n * stride];
    return apart;
}

// Which of up to 64 keys a row shows, where a number of at most `least` hides; `biased` becomes true if to the score of
// one of those something other than 0 is added.
INLINE uint64_t shown(const uint8_t* row, int count, float, bool&) {
    const __m512i x = _mm512_maskz_loadu_epi8(first_bits(count), row);
    return _mm512_test_epi8_mask(x, x);
}
template <class T> INLINE uint64_t shown(const T* row, int count, float least, bool& biased) {
    uint64_t bits = 0;
    for (int n = 0; n < count; n += 16) {
        const __mmask16 those = first(count - n);
        const __m512 x = load(row + n, those);
        const __mmask16 seen = _mm512_mask_cmp_ps_mask(those, x, _mm512_set1_ps(least), _CMP_NLE_UQ);
        biased |= _mm512_mask_cmp_ps_mask(seen, x, _mm512_setzero_ps(), _CMP_NEQ_UQ) != 0;
        bits |= uint64_t(seen) << n;
    }
    return bits;
}

// ---- A call's mask --------------------------------------------------------------------------------------------------

// What ROWS queries see of a tile of keys, as far as the tensor says.
struct Sight {
    uint64_t bits[ROWS][BLOCKS];
    bool biased; // whether something other than 0 is added to a score of it
};

// Make [begin, end) of the tile as short as the keys that are seen: none of them leaves begin at end or behind it.
inline void narrow(const Sight& sight, int& begin, int& end) {
    uint64_t some[BLOCKS] = {};
    for (int r = 0; r < ROWS; ++r) {
        for (int b = 0; b < BLOCKS; ++b) some[b] |= sight.bits[r][b];
    }
    int low = 0, high = BLOCKS;
    while (low < BLOCKS && !some[low]) ++low;
    while (high > low && !some[high - 1]) --high;
    begin = low == high ? end : std::max(begin, low * 64 + __builtin_ctzll(some[low]));
    if (low < high) end = std::min(end, high * 64 - __builtin_clzll(some[high - 1]));
}

enum class Class : uint8_t { EMPTY, FULL, MIXED };

class Masks {
  public:
    // Nothing but `ahead` hides a key: none of the rest is to be called then.
    const bool are_plain;
    const Shape& shape;
    const Mask& mask;

    Masks(const Shape& shape, const Mask& mask)
        : are_plain(mask.behind >= shape.q_len - 1 && !mask.low && !mask.high && !mask.scores), shape(shape), mask(mask) {}

    // Of memory for the tables.
    int64_t words() const {
        if (are_plain) return 0;
        return 2 * (seen_words() + reached_words()) + shape.batch * (shape.kv_len + 1) + ceil_div(classes_size(), 4);
    }
    void place(uint32_t* memory) {
        seen = reinterpret_cast<uint64_t*>(memory);
        reached = seen + seen_words();
        changes = reinterpret_cast<int32_t*>(reached + reached_words());
        classes = reinterpret_cast<Class*>(changes + shape.batch * (shape.kv_len + 1));
    }

    // The tables are filled in three steps, each of so many parts, which are independent of each other.
    int64_t parts_to_classify() const { return mask.scores ? mask_batch() * mask_heads() * shape.tiles() : 0; }
    void classify(int64_t part) {
        mask.read([&](const auto* data) {
            const int64_t tile = part % shape.tiles(), slice = part / shape.tiles();
            const auto* const from = data + slice / mask_heads() * mask.strides[0] +
                                     slice % mask_heads() * mask.strides[1] + tile * KEYS * mask.strides[3];
            for (int64_t i = 0; i < groups(); ++i) {
                const int rows = rows_alike() ? 1 : int(std::min<int64_t>(ROWS, shape.q_len - i * ROWS));
                classes[part * groups() + i] = class_of(from + i * ROWS * mask.strides[2], rows, tile * KEYS);
            }
        });
    }

    // Which keys the intervals of all queries of a sequence reach.
    void find_reached(int64_t batch) {
        int32_t* const change = changes + batch * (shape.kv_len + 1); // of the number of queries that see a key
        std::fill_n(change, shape.kv_len + 1, 0);
        for (int64_t i = 0; i < shape.q_len; ++i) {
            const Interval sees = interval(shape, mask, batch, i);
            if (sees.low < sees.high) ++change[sees.low], --change[sees.high];
        }
        uint64_t* const to = reached + batch * shape.tiles() * BLOCKS;
        std::fill_n(to, shape.tiles() * BLOCKS, 0);
        int64_t queries = 0;
        for (int64_t key = 0; key < shape.kv_len; ++key) {
            queries += change[key];
            to[key / 64] |= uint64_t(queries > 0) << key % 64;
        }
    }

    int64_t parts_to_see() const { return shape.batch * seen_heads() * shape.tiles(); }
    void find_seen(int64_t part) {
        const int64_t tile = part % shape.tiles(), head = part / shape.tiles() % seen_heads();
        const int64_t batch = part / shape.tiles() / seen_heads();
        uint64_t* const to = seen + part * BLOCKS;
        const uint64_t* const most = reached + (batch * shape.tiles() + tile) * BLOCKS;
        if (!mask.scores) {
            std::copy_n(most, BLOCKS, to);
            return;
        }
        std::fill_n(to, BLOCKS, 0);
        const int64_t heads = seen_heads() == 1 ? 1 : shape.group();
        for (int64_t i = 0; i < heads; ++i) see(to, most, batch, head * heads + i, tile);
    }

    // Of the keys of a KV head, counted over all sequences, a bit for each that some query sees.
    const uint64_t* seen_by(int64_t kv_head) const {
        const int64_t head = seen_heads() == 1 ? 0 : kv_head % shape.kv_heads;
        return seen + (kv_head / shape.kv_heads * seen_heads() + head) * shape.tiles() * BLOCKS;
    }

    // Of ROWS queries from `query` on, a multiple of that, and the tile of keys from `key` on.
    Class of(int64_t batch, int64_t head, int64_t query, int64_t key) const {
        if (!mask.scores) return Class::FULL;
        const int64_t slice = (mask.strides[0] ? batch : 0) * mask_heads() + (mask.strides[1] ? head : 0);
        return classes[(slice * shape.tiles() + key / KEYS) * groups() + (rows_alike() ? 0 : query / ROWS)];
    }

    // The same as bits, of `count` queries, and of the keys [begin, end) of that tile at least.
    void look(Sight& sight, int64_t batch, int64_t head, int64_t query, int count, int64_t key, int begin, int end,
              float least = HIDDEN) const {
        sight.biased = false;
        mask.read([&](const auto* data) {
            const auto* row = at(data, batch, head, query, key);
            for (int r = 0; r < ROWS; ++r, row += mask.strides[2]) {
                const bool another = r == 0 || (r < count && !rows_alike());
                for (int b = 0; b < BLOCKS; ++b) {
                    const bool there = b >= begin / 64 && b * 64 < end;
                    sight.bits[r][b] = !there    ? 0
                                       : another ? word(row, b, key, least, sight.biased)
                                                 : sight.bits[r - 1][b];
                }
            }
        });
    }

    // f(n, x) for each 16 keys from number n on of a row, what is added to their scores; `count` keys from `key` on.
    template <class F>
    INLINE void each_added(int64_t batch, int64_t head, int64_t query, int64_t key, int count, F f) const {
        mask.read_numbers([&](const auto* data) {
            std::remove_const_t<std::remove_pointer_t<decltype(data)>> apart[64];
            const auto* const row = at(data, batch, head, query, key);
            for (int64_t begin = 0; begin < count; begin += 64) {
                const int here = int(std::min<int64_t>(count - begin, 64));
                const auto* const near = consecutive(row + begin * mask.strides[3], mask.strides[3], here, apart);
                for (int n = 0; n < here; n += 16) f(int(begin) + n, load(near + n, first(here - n)));
            }
        });
    }

    // The largest number that is added in a row; NaN if one is.
    float largest(int64_t batch, int64_t head, int64_t query) const {
        const Interval sees = interval(shape, mask, batch, query);
        __m512 most = _mm512_set1_ps(-INFINITY);
        __mmask16 none = 0;
        const int64_t count = std::max<int64_t>(sees.high - sees.low, 0);
        each_added(batch, head, query, sees.low, int(count), [&](int n, __m512 x) {
            const __mmask16 those = first(int(count) - n);
            most = _mm512_mask_max_ps(most, those, most, x);
            none |= _mm512_mask_cmp_ps_mask(those, x, x, _CMP_UNORD_Q);
        });
        return none ? NAN : _mm512_reduce_max_ps(most);
    }

  private:
    bool rows_alike() const { return mask.strides[2] == 0; }
    int64_t groups() const { return rows_alike() ? 1 : ceil_div(shape.q_len, ROWS); }
    int64_t mask_batch() const { return mask.strides[0] ? shape.batch : 1; }
    int64_t mask_heads() const { return mask.strides[1] ? shape.q_heads : 1; }
    int64_t seen_heads() const { return mask.scores && mask.strides[1] ? shape.kv_heads : 1; }
    int64_t reached_words() const { return shape.batch * shape.tiles() * BLOCKS; }
    int64_t seen_words() const { return reached_words() * seen_heads(); }
    int64_t classes_size() const { return parts_to_classify() * (mask.scores ? groups() : 0); }

    template <class T> const T* at(const T* data, int64_t batch, int64_t head, int64_t query, int64_t key) const {
        const int64_t* const s = mask.strides;
        return data + batch * s[0] + head * s[1] + query * s[2] + key * s[3];
    }

    // Block number `b` of a row of the tile of keys from `key` on.
    template <class T> uint64_t word(const T* row, int b, int64_t key, float least, bool& biased) const {
        const int count = int(std::clamp<int64_t>(shape.kv_len - key - b * 64, 0, 64));
        T apart[64];
        return shown(consecutive(row + b * 64 * mask.strides[3], mask.strides[3], count, apart), count, least, biased);
    }

    template <class T> Class class_of(const T* row, int rows, int64_t key) const {
        bool some = false, all = true, biased = false;
        for (int r = 0; r < rows; ++r, row += mask.strides[2]) {
            for (int b = 0; b < BLOCKS; ++b) {
                const uint64_t bits = word(row, b, key, HIDDEN, biased);
                some |= bits != 0;
                all &= bits == first_bits(std::max<int64_t>(shape.kv_len - key - b * 64, 0));
                if (some && (biased || !all)) return Class::MIXED;
            }
        }
        return some ? Class::FULL : Class::EMPTY;
    }

    // Add to the bits of a tile's keys those that a head's queries see; no more than `most`.
    void see(uint64_t* to, const uint64_t* most, int64_t batch, int64_t head, int64_t tile) const {
        const int64_t key = tile * KEYS;
        bool biased;
        mask.read([&](const auto* data) {
            if (rows_alike()) {
                const auto* const row = at(data, batch, head, 0, key);
                const Class is = of(batch, head, 0, key);
                for (int b = 0; b < BLOCKS && is != Class::EMPTY; ++b) to[b] |= most[b] & word(row, b, key, HIDDEN, biased);
                return;
            }
            for (int64_t i = 0; i < shape.q_len && !std::equal(to, to + BLOCKS, most); ++i) {
                const Class is = of(batch, head, i, key);
                const Interval sees = interval(shape, mask, batch, i);
                if (is == Class::EMPTY || sees.low >= key + KEYS || sees.high <= key) continue;
                const auto* const row = at(data, batch, head, i, key);
                for (int b = 0; b < BLOCKS; ++b) {
                    const uint64_t bits = bits_of(sees, key + b * 64);
                    if (bits & ~to[b]) to[b] |= bits & (is == Class::FULL ? ~uint64_t(0) : word(row, b, key, HIDDEN, biased));
                }
            }
        });
    }

    uint64_t *seen, *reached;
    int32_t* changes;
    Class* classes;
};

// The keys that some query of a KV head sees, in their order.
class SeenKeys {
  public:
    SeenKeys(const Masks& masks, int64_t kv_head) : words(masks.are_plain ? nullptr : masks.seen_by(kv_head)) {
        count = words ? 0 : masks.shape.kv_len;
        for (int64_t i = 0; words && i < masks.shape.k_blocks(); ++i) count += __builtin_popcountll(words[i]);
    }
    // Number n of them; n never falls from call to call.
    int64_t at(int64_t n) {
        if (!words) return n;
        for (int here; before + (here = __builtin_popcountll(words[word])) <= n; ++word) before += here;
        uint64_t bits = words[word];
        for (int64_t i = before; i < n; ++i) bits &= bits - 1;
        return word * 64 + __builtin_ctzll(bits);
    }

    int64_t count;

  private:
    const uint64_t* words;
    int64_t word = 0, before = 0;
};

} // namespace
