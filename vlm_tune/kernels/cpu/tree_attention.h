// What attention is made of on a CPU with AMX: rows as squares, rotated or not, what is seen, and the softmax.
//
// A square is 32 rows by 32 columns; rows of D numbers are D / 32 squares side by side.
#pragma once

#include <limits>
#include <vector>

#include "amx.h"

namespace {

constexpr int64_t SQUARE = 2 * TILE;  // numbers of 32 rows by 32, of which the upper and the lower half are tiles
constexpr int64_t CACHED = 1 << 17;  // scores that a core's cache should hold
constexpr float LOG2E = 1.44269504089f;

struct Strided {
  const bf16* data;
  int64_t row, head, token;
  Matrix at(int64_t b, int64_t h, int64_t i) const { return {data + b * row + h * head + i * token, token}; }
};

struct Target {
  bf16* data;
  int64_t row, token, head;
  bf16* at(int64_t b, int64_t i, int64_t h) const { return data + b * row + i * token + h * head; }
};

struct Shape {
  int64_t B, H, G, L, D;
  float scale;
  int64_t deep() const { return D / 32; }
  int64_t group() const { return H / G; }
  // How many heads of a key head go together: what they add to its gradients is summed in tiles.
  int64_t together() const { return std::max<int64_t>(1, std::min(group(), CACHED / (up(L, 32) * 32))); }
};

// Parts of one thread's memory, each a whole number of lines.
template <typename Number>
struct Parts {
  Number* next;
  Number* take(int64_t count) {
    Number* here = next;
    next += up(count, 64);
    return here;
  }
};

// --- rows ------------------------------------------------------------------------------------------------------------

// Rotary embedding: cos and sin, bf16 [B, L, D] or null.
struct Rotation {
  const bf16 *cos, *sin;
};

// What one row's tokens are rotated by, in fp32 as it is needed: [L, D / 32][cos, sin][left, right half of D][16].
class Angles {
 public:
  Angles(const Shape& s, Rotation given) : s_(s), given_(given) {}

  // Of token 0 of row b; null if nothing is rotated.
  const float* of(int64_t b) {
    if (!given_.cos || b == held_) return given_.cos ? angles_ : nullptr;
    static thread_local Room<float> room;
    angles_ = room.of(s_.L * 2 * s_.D), held_ = b;
    float* to = angles_;
    for (int64_t i = 0; i < s_.L; ++i)
      for (int64_t d = 0; d < s_.D / 2; d += 16)
        for (const bf16* from : {given_.cos, given_.sin})
          for (int64_t right = 0; right < 2; ++right, to += 16)
            _mm512_store_ps(to, widened(half(from + (b * s_.L + i) * s_.D + right * s_.D / 2 + d)));
    return angles_;
  }

  static __m256i half(const bf16* from) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)); }

 private:
  const Shape& s_;
  Rotation given_;
  float* angles_ = nullptr;
  int64_t held_ = -1;
};

// Asks for up to 32 of `count` rows: what lies this far apart no processor foresees.
void ask(Matrix rows, int64_t count, int64_t D) {
  for (int64_t i = 0; i < std::min<int64_t>(32, count); ++i)
    for (int64_t d = 0; d < D; d += 32) ask_second(rows.at(i, d));
}

// `count` rows from row `at` of squares [.., D / 32] on, rotated unless there are no angles.
void take_rows(Matrix from, const float* angles, int64_t count, int64_t D, int64_t at, bf16* squares) {
  for (int64_t i = 0; i < count; ++i) {
    const bf16* row = from.at(i, 0);
    bf16* to = squares + (at + i) / 32 * D * 32 + (at + i) % 32 * 32;
    if (!angles) {
      for (int64_t d = 0; d < D; d += 32, to += SQUARE) _mm512_store_si512(to, _mm512_loadu_si512(row + d));
      continue;
    }
    const float* by = angles + i * 2 * D;
    for (int64_t d = 0, middle = D / 2; d < middle; d += 16, by += 64) {
      const __m512 left = widened(Angles::half(row + d)), right = widened(Angles::half(row + middle + d));
      const __m512 new_left = _mm512_fnmadd_ps(right, _mm512_load_ps(by + 32), _mm512_mul_ps(left, _mm512_load_ps(by)));
      const __m512 new_right = _mm512_fmadd_ps(left, _mm512_load_ps(by + 48), _mm512_mul_ps(right, _mm512_load_ps(by + 16)));
      const auto place = [&](int64_t column) { return reinterpret_cast<__m256i*>(to + column / 32 * SQUARE + column % 32); };
      _mm256_store_si256(place(d), (__m256i)_mm512_cvtneps_pbh(new_left));
      _mm256_store_si256(place(middle + d), (__m256i)_mm512_cvtneps_pbh(new_right));
    }
  }
}

// Zeros in the rows from `at` on up to whole squares [.., D / 32].
void clear_rows(int64_t at, int64_t D, bf16* squares) {
  for (int64_t i = at; i % 32; ++i)
    for (int64_t d = 0; d < D / 32; ++d) _mm512_store_si512(squares + (i / 32 * (D / 32) + d) * SQUARE + i % 32 * 32, _mm512_setzero_si512());
}

// `count` of 32 rows of sums [D / 32][2][2][16][16], each times its factor and rotated back if there are angles, as bf16.
template <typename Factor>
void give_rows(const float* sums, Factor factor, const float* angles, int64_t count, int64_t D, bf16* to, int64_t stride) {
  const auto value = [&](int64_t i, int64_t d) {
    return _mm512_mul_ps(_mm512_load_ps(sums + d / 32 * 1024 + i / 16 * 512 + d % 32 * 16 + i % 16 * 16), _mm512_set1_ps(factor(i)));
  };
  const auto give = [&](int64_t i, int64_t d, __m512 found) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i * stride + d), (__m256i)_mm512_cvtneps_pbh(found));
  };
  for (int64_t i = 0; i < count; ++i)
    for (int64_t d = 0; d < D / 2; d += 16) {
      __m512 left = value(i, d), right = value(i, D / 2 + d);
      if (angles) {
        const float* by = angles + i * 2 * D + d * 4;
        const __m512 old = left;
        left = _mm512_fmadd_ps(right, _mm512_load_ps(by + 48), _mm512_mul_ps(old, _mm512_load_ps(by)));
        right = _mm512_fnmadd_ps(old, _mm512_load_ps(by + 32), _mm512_mul_ps(right, _mm512_load_ps(by + 16)));
      }
      give(i, d, left);
      give(i, D / 2 + d, right);
    }
}

// 32 x 32 sums, transposed in place.
void transpose_sums(float* sums) {
  __m512i blocks[2][16];
  for (const auto& [one, other] : {std::pair{0, 0}, {256, 512}, {768, 768}}) {
    for (int i = 0; i < 16; ++i) blocks[0][i] = _mm512_load_si512(sums + one + i * 16), blocks[1][i] = _mm512_load_si512(sums + other + i * 16);
    transpose16(blocks[0]);
    if (one != other) transpose16(blocks[1]);
    for (int i = 0; i < 16; ++i) _mm512_store_si512(sums + other + i * 16, blocks[0][i]);
    for (int i = 0; one != other && i < 16; ++i) _mm512_store_si512(sums + one + i * 16, blocks[1][i]);
  }
}

// Adds a square of rows times packed columns.
void add_square(const bf16* rows, const bf16* columns) {
  _tile_loadd(4, rows, 64);
  _tile_loadd(6, columns, 64);
  _tile_dpbf16ps(0, 4, 6);
  _tile_loadd(7, columns + TILE, 64);
  _tile_dpbf16ps(1, 4, 7);
  _tile_loadd(5, rows + TILE, 64);
  _tile_dpbf16ps(2, 5, 6);
  _tile_dpbf16ps(3, 5, 7);
}

// --- what is seen ----------------------------------------------------------------------------------------------------

// The squares of keys that a block of up to 32 queries sees, and for each of them 32 bits of keys a query.
struct Seen {
  std::vector<int64_t> squares;
  std::vector<uint32_t> masks;

  // By the intervals of a row.
  void find(const int32_t* ends, int64_t L, int64_t start, int64_t count) {
    squares.clear(), masks.clear();
    for (int64_t key = 0; key < start + count; key += 32) {
      // j <= i < ends[j] is i - j < ends[j] - j where numbers have no sign.
      const __m512i steps = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
      __m512i keys[2], lengths[2];
      for (int64_t right = 0; right < 2; ++right) {
        const int64_t from = key + right * 16;
        keys[right] = _mm512_add_epi32(steps, _mm512_set1_epi32(static_cast<int>(from)));
        const __m512i last = _mm512_maskz_loadu_epi32(static_cast<__mmask16>(first(std::min<int64_t>(16, L - from))), ends + from);
        lengths[right] = _mm512_max_epi32(_mm512_sub_epi32(last, keys[right]), _mm512_setzero_si512());
      }
      uint32_t bits[32] = {}, any = 0;
      for (int64_t i = 0; i < count; ++i) {
        const __m512i query = _mm512_set1_epi32(static_cast<int>(start + i));
        for (int64_t right = 0; right < 2; ++right)
          bits[i] |= static_cast<uint32_t>(_mm512_cmplt_epu32_mask(_mm512_sub_epi32(query, keys[right]), lengths[right])) << 16 * right;
        any |= bits[i];
      }
      if (!any) continue;
      squares.push_back(key / 32);
      masks.insert(masks.end(), bits, bits + 32);
    }
  }

  int64_t count() const { return static_cast<int64_t>(squares.size()); }
};

// --- softmax ---------------------------------------------------------------------------------------------------------

// 2^x, or 0 where not seen, 1e-4 of itself off at most, a twentieth of what bf16 rounds by.
__m512 power(__mmask16 seen, __m512 x) {
  const __m512 rest = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  __m512 found = _mm512_set1_ps(7.8024523e-2f);
  found = _mm512_fmadd_ps(found, rest, _mm512_set1_ps(2.2606716e-1f));
  found = _mm512_fmadd_ps(found, rest, _mm512_set1_ps(6.9583354e-1f));
  found = _mm512_fmadd_ps(found, rest, _mm512_set1_ps(9.9992520e-1f));
  return _mm512_maskz_scalef_ps(seen, found, x);
}

// The natural logarithm of what is above zero: of 2^e m with 3/4 <= m < 3/2, by the series of artanh.
__m512 logarithm(__m512 x) {
  const __m512 m = _mm512_getmant_ps(x, _MM_MANT_NORM_p75_1p5, _MM_MANT_SIGN_src), e = _mm512_getexp_ps(_mm512_div_ps(x, m));
  const __m512 one = _mm512_set1_ps(1), t = _mm512_div_ps(_mm512_sub_ps(m, one), _mm512_add_ps(m, one)), square = _mm512_mul_ps(t, t);
  __m512 sum = _mm512_set1_ps(1.f / 9);
  for (const float part : {1.f / 7, 1.f / 5, 1.f / 3, 1.f}) sum = _mm512_fmadd_ps(sum, square, _mm512_set1_ps(part));
  return _mm512_fmadd_ps(e, _mm512_set1_ps(0.69314718056f), _mm512_mul_ps(_mm512_add_ps(t, t), sum));
}

// The sums, or the like, of the 16 numbers of each of 16 rows.
template <typename Join>
__m512 join_rows(__m512* rows, Join join) {
  transpose16(reinterpret_cast<__m512i*>(rows));
  for (int count = 8; count; count /= 2)
    for (int i = 0; i < count; ++i) rows[i] = join(rows[i], rows[i + count]);
  return rows[0];
}

// Weights of 16 queries, whose scores begin there: squares of rows, not yet divided by their sums; those inverted, and the logs of all.
void softmax(const float* scores, const uint32_t* masks, int64_t squares, float scale, bf16* weights, float* inverse, float* logs) {
  const __m512 least = _mm512_set1_ps(-std::numeric_limits<float>::infinity()), factor = _mm512_set1_ps(scale * LOG2E);
  __m512 rows[16];
  for (int64_t i = 0; i < 16; ++i) {
    __m512 left = least, right = least;
    for (int64_t n = 0; n < squares; ++n) {
      const uint32_t seen = masks[n * 32 + i];
      left = _mm512_mask_max_ps(left, static_cast<__mmask16>(seen), left, _mm512_load_ps(scores + n * 1024 + i * 16));
      right = _mm512_mask_max_ps(right, static_cast<__mmask16>(seen >> 16), right, _mm512_load_ps(scores + n * 1024 + 256 + i * 16));
    }
    rows[i] = _mm512_max_ps(left, right);
  }
  __m512 most = join_rows(rows, [](__m512 one, __m512 other) { return _mm512_max_ps(one, other); });
  most = _mm512_mul_ps(_mm512_mask_mov_ps(most, _mm512_cmp_ps_mask(most, least, _CMP_EQ_OQ), _mm512_setzero_ps()), factor);
  alignas(64) float tops[16];
  _mm512_store_ps(tops, most);
  for (int64_t i = 0; i < 16; ++i) {
    __m512 sum[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
    const __m512 top = _mm512_set1_ps(tops[i]);
    for (int64_t n = 0; n < squares; ++n) {
      const uint32_t seen = masks[n * 32 + i];
      const float* from = scores + n * 1024 + i * 16;
      const __m512 left = power(static_cast<__mmask16>(seen), _mm512_fmsub_ps(_mm512_load_ps(from), factor, top));
      const __m512 right = power(static_cast<__mmask16>(seen >> 16), _mm512_fmsub_ps(_mm512_load_ps(from + 256), factor, top));
      sum[0] = _mm512_add_ps(sum[0], left), sum[1] = _mm512_add_ps(sum[1], right);
      _mm512_store_si512(weights + n * SQUARE + i * 32, (__m512i)_mm512_cvtne2ps_pbh(right, left));
    }
    rows[i] = _mm512_add_ps(sum[0], sum[1]);
  }
  const __m512 total = join_rows(rows, [](__m512 one, __m512 other) { return _mm512_add_ps(one, other); });
  // A query that sees nothing has zeros, and gives no gradient.
  const __mmask16 sees = _mm512_cmp_ps_mask(total, _mm512_setzero_ps(), _CMP_GT_OQ);
  _mm512_store_ps(inverse, _mm512_maskz_div_ps(sees, _mm512_set1_ps(1), total));
  const __m512 log = _mm512_fmadd_ps(most, _mm512_set1_ps(1 / LOG2E), logarithm(total));
  _mm512_store_ps(logs, _mm512_mask_mov_ps(_mm512_set1_ps(std::numeric_limits<float>::infinity()), sees, log));
}

// What is made of a square of scores: its gradient as rows, and weights and gradient as packed columns of products over queries.
struct Made {
  bf16 *slopes, *weight_pairs, *slope_pairs;
};

// The weights of a square's 32 queries once more, and the gradient of their scores before scaling.
void softmax_backward(const float* scores, const float* flows, const uint32_t* masks, float scale, const float* logs, const float* delta, Made to) {
  const __m512 factor = _mm512_set1_ps(scale * LOG2E);
  for (int64_t pair = 0; pair < 16; ++pair) {
    __m512i weights[2], slopes[2];
    for (int64_t k = 0; k < 2; ++k) {
      const int64_t i = pair * 2 + k, at = i / 16 * 512 + i % 16 * 16;
      const __m512 log = _mm512_set1_ps(logs[i]), mean = _mm512_set1_ps(delta[i]);
      const __m512 left = power(static_cast<__mmask16>(masks[i]), _mm512_fmsub_ps(_mm512_load_ps(scores + at), factor, log));
      const __m512 right = power(static_cast<__mmask16>(masks[i] >> 16), _mm512_fmsub_ps(_mm512_load_ps(scores + at + 256), factor, log));
      const __m512 left_slope = _mm512_mul_ps(left, _mm512_sub_ps(_mm512_load_ps(flows + at), mean));
      const __m512 right_slope = _mm512_mul_ps(right, _mm512_sub_ps(_mm512_load_ps(flows + at + 256), mean));
      weights[k] = (__m512i)_mm512_cvtne2ps_pbh(right, left);
      slopes[k] = (__m512i)_mm512_cvtne2ps_pbh(right_slope, left_slope);
      _mm512_store_si512(to.slopes + i * 32, slopes[k]);
    }
    store_pairs(weights[0], weights[1], to.weight_pairs + pair * 32);
    store_pairs(slopes[0], slopes[1], to.slope_pairs + pair * 32);
  }
}

}  // namespace
