// Attention of rows whose tokens see intervals: key j is seen by the queries j <= i < ends[j]. Forward and backward for a
// CPU with AMX, one row and key head at a time, so that scores live and die in a core's cache and are never kept.
//
// Scores are held transposed, a row per key: what a key is seen by is then one run of columns, sums over keys are sums of
// vectors, and the results are in the layouts in which AMX wants its operands.
//
// Shapes: B rows, H query heads, G key heads, L tokens, D head width; strides are in elements, D is contiguous.

#include <ATen/Parallel.h>
#include <ATen/native/CPUBlas.h>
#include <immintrin.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "transpose.h"

namespace {

using bf16 = at::BFloat16;
using at::native::cpublas::brgemm;

constexpr int64_t Q = 32;  // queries a block: two vectors of columns
constexpr int64_t K = 32;  // keys a block
constexpr int64_t CACHED = 1 << 17;  // scores that a core's cache should hold

struct Strided {
  const bf16* data;
  int64_t row, head, token;
  const bf16* at(int64_t b, int64_t h, int64_t i) const { return data + b * row + h * head + i * token; }
};

struct Shape {
  int64_t B, H, G, L, D;
  float scale;
  int64_t padded() const { return (L + K - 1) / K * K; }
  // How many heads of a key head go together: their products share an operand, and few large ones are quicker than many small.
  int64_t together() const { return std::max<int64_t>(1, std::min({H / G, int64_t{4}, CACHED / (padded() * Q)})); }
};

struct Run {
  int64_t from, to, place;  // keys from..to, and where they stand in the scores
};

// The bits of columns that see a key, for the queries from `first` on.
uint32_t seen_by(int64_t key, int64_t end, int64_t first, int64_t count) {
  const int64_t low = std::max<int64_t>(key - first, 0), high = std::min<int64_t>(end - first, count);
  if (high <= low) return 0;
  const uint32_t below = low ? (1u << low) - 1 : 0;
  return (high >= 32 ? ~0u : (1u << high) - 1) & ~below;
}

// Which keys a block of queries sees, as runs of whole blocks of keys, and for each of those keys which queries see it.
int64_t visible(const int32_t* ends, int64_t L, int64_t first, int64_t count, std::vector<Run>& runs, std::vector<uint32_t>& masks) {
  runs.clear();
  masks.clear();
  for (int64_t block = 0; block < first + count; block += K) {
    uint32_t bits[K], any = 0;
    for (int64_t j = 0; j < K; ++j) {
      const int64_t key = block + j;
      bits[j] = key < L ? seen_by(key, ends[key], first, count) : 0;
      any |= bits[j];
    }
    if (!any) continue;
    if (!runs.empty() && runs.back().to == block) runs.back().to += K;
    else runs.push_back({block, block + K, static_cast<int64_t>(masks.size())});
    masks.insert(masks.end(), bits, bits + K);
  }
  return static_cast<int64_t>(masks.size());
}

__m512 exponential(__m512 x) {
  // 2^n * 2^f with |f| <= 1/2, and f's power by a polynomial: within 2e-7.
  const __m512 y = _mm512_max_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504089f)), _mm512_set1_ps(-150.f));
  const __m512 n = _mm512_roundscale_ps(y, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 f = _mm512_sub_ps(y, n);
  __m512 p = _mm512_set1_ps(1.5403530e-4f);
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.3333558e-3f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(9.6181291e-3f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.5504109e-2f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.4022651e-1f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.9314718e-1f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(p, n);
}

__m256i rounded(__m512 x) { return (__m256i)_mm512_cvtneps_pbh(x); }

// Two keys' values side by side, as AMX wants the second operand of a product over keys.
void store_pair(bf16* to, __m256i even, __m256i odd) {
  const __m512i both = _mm512_or_si512(_mm512_cvtepu16_epi32(even), _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16));
  _mm512_storeu_si512(to, both);
}

// A 16 x 16 block of 32-bit values, transposed.
void transpose_block(const void* from, int64_t from_stride, void* to, int64_t to_stride) {
  __m512i rows[16];
  for (int i = 0; i < 16; ++i) rows[i] = _mm512_loadu_si512(static_cast<const int32_t*>(from) + i * from_stride);
  transpose16(rows);
  for (int i = 0; i < 16; ++i) _mm512_storeu_si512(static_cast<int32_t*>(to) + i * to_stride, rows[i]);
}

// [Q, D] as the second operand of a product over D: pairs of a row side by side, [D / 2, Q] of rows of N.
void pack_columns(const bf16* block, int64_t D, int64_t N, bf16* to) {
  for (int64_t d = 0; d < D / 2; d += 16)
    for (int64_t i = 0; i < Q; i += 16) transpose_block(block + i * D + 2 * d, D / 2, to + (d * N + i) * 2, N);
}

// [Q, D] as the second operand of a product over Q: pairs of rows side by side, [Q / 2, D].
void pack_rows(const bf16* block, int64_t D, bf16* to) {
  for (int64_t i = 0; i < Q; i += 2)
    for (int64_t d = 0; d < D; d += 16) {
      const auto* even = reinterpret_cast<const __m256i*>(block + i * D + d);
      const auto* odd = reinterpret_cast<const __m256i*>(block + (i + 1) * D + d);
      store_pair(to + (i / 2 * D + d) * 2, _mm256_loadu_si256(even), _mm256_loadu_si256(odd));
    }
}

// Tokens first..first + count of one head as [room, D], zeros after them.
void copy_rows(const Strided& from, int64_t b, int64_t h, int64_t first, int64_t count, int64_t room, int64_t D, bf16* to) {
  for (int64_t i = 0; i < count; ++i) std::memcpy(to + i * D, from.at(b, h, first + i), D * sizeof(bf16));
  std::memset(to + count * D, 0, (room - count) * D * sizeof(bf16));
}

// [rows, D], whole blocks of both, as [D, rows].
void transpose(const bf16* from, int64_t rows, int64_t D, bf16* to) {
  for (int64_t i = 0; i < rows; i += 32)
    for (int64_t d = 0; d < D; d += 16) {
      __m512i pairs[16];
      for (int64_t p = 0; p < 16; ++p) {
        const bf16* even = from + (i + 2 * p) * D + d;
        store_pair(reinterpret_cast<bf16*>(pairs + p), _mm256_loadu_si256(reinterpret_cast<const __m256i*>(even)), _mm256_loadu_si256(reinterpret_cast<const __m256i*>(even + D)));
      }
      transpose16(pairs);
      for (int64_t k = 0; k < 16; ++k) _mm512_storeu_si512(to + (d + k) * rows + i, pairs[k]);
    }
}

// [D, Q] of rows of N in fp32 as rows of bf16, `count` of them, each times its factor.
void store_transposed(const float* from, int64_t D, int64_t N, int64_t count, const float* factor, bf16* to, int64_t stride, float* scratch) {
  for (int64_t d = 0; d < D; d += 16)
    for (int64_t i = 0; i < Q; i += 16) transpose_block(from + d * N + i, N, scratch + i * D + d, D);
  for (int64_t i = 0; i < count; ++i)
    for (int64_t d = 0; d < D; d += 16) {
      const __m512 value = _mm512_mul_ps(_mm512_loadu_ps(scratch + i * D + d), _mm512_set1_ps(factor[i]));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i * stride + d), rounded(value));
    }
}

// The weights of N columns' queries over the keys held, not yet divided by their sums: those inverted, and the logs of all.
void softmax(
    const float* scores, const std::vector<uint32_t>& masks, int64_t held, int64_t N, float factor, bf16* weights, float* inverse, float* logs) {
  const __m512 scale = _mm512_set1_ps(factor), least = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
  for (int64_t column = 0; column < N; column += 16) {
    const int64_t shift = column % Q;
    __m512 most = least, sum = _mm512_setzero_ps();
    for (int64_t j = 0; j < held; ++j)
      most = _mm512_mask_max_ps(most, masks[j] >> shift, most, _mm512_loadu_ps(scores + j * N + column));
    most = _mm512_mask_mov_ps(most, _mm512_cmp_ps_mask(most, least, _CMP_EQ_OQ), _mm512_setzero_ps());
    for (int64_t j = 0; j < held; j += 2) {
      __m512 p[2];
      for (int two = 0; two < 2; ++two) {
        const __m512 x = _mm512_mul_ps(_mm512_sub_ps(_mm512_loadu_ps(scores + (j + two) * N + column), most), scale);
        p[two] = _mm512_maskz_mov_ps(masks[j + two] >> shift, exponential(x));
        sum = _mm512_add_ps(sum, p[two]);
      }
      store_pair(weights + (j / 2 * N + column) * 2, rounded(p[0]), rounded(p[1]));
    }
    float total[16], top[16];
    _mm512_storeu_ps(total, sum);
    _mm512_storeu_ps(top, most);
    for (int i = 0; i < 16; ++i) {
      // A query that sees nothing has zeros, and gives no gradient.
      inverse[column + i] = total[i] > 0 ? 1.f / total[i] : 0.f;
      logs[column + i] = total[i] > 0 ? top[i] * factor + std::log(total[i]) : std::numeric_limits<float>::infinity();
    }
  }
}

// The weights once more, and the gradient of the scores: as the first operand of products, and in pairs as the second.
void softmax_backward(
    const float* scores, const float* flows, const std::vector<uint32_t>& masks, int64_t held, int64_t N, float factor, const float* logs,
    const float* delta, bf16* weights, bf16* slopes, bf16* slopes_pairs) {
  const __m512 scale = _mm512_set1_ps(factor);
  for (int64_t column = 0; column < N; column += 16) {
    const int64_t shift = column % Q;
    const __m512 log = _mm512_loadu_ps(logs + column), mean = _mm512_loadu_ps(delta + column);
    for (int64_t j = 0; j < held; j += 2) {
      __m256i slope[2];
      for (int two = 0; two < 2; ++two) {
        const int64_t place = (j + two) * N + column;
        const __m512 x = _mm512_fmsub_ps(_mm512_loadu_ps(scores + place), scale, log);
        const __m512 p = _mm512_maskz_mov_ps(masks[j + two] >> shift, exponential(x));
        slope[two] = rounded(_mm512_mul_ps(_mm512_mul_ps(p, scale), _mm512_sub_ps(_mm512_loadu_ps(flows + place), mean)));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(weights + place), rounded(p));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(slopes + place), slope[two]);
      }
      store_pair(slopes_pairs + (j / 2 * N + column) * 2, slope[0], slope[1]);
    }
  }
}

float product(const bf16* one, const bf16* other, int64_t D) {
  __m512 sum = _mm512_setzero_ps();
  for (int64_t d = 0; d < D; d += 32)
    sum = _mm512_dpbf16_ps(sum, (__m512bh)_mm512_loadu_si512(one + d), (__m512bh)_mm512_loadu_si512(other + d));
  return _mm512_reduce_add_ps(sum);
}

// Memory of one thread, taken once a call.
class Room {
 public:
  template <class T>
  T* take(int64_t count) {
    parts_.emplace_back((count * sizeof(T) + 127) / 64 * 64);
    auto address = reinterpret_cast<uintptr_t>(parts_.back().data());
    return reinterpret_cast<T*>((address + 63) / 64 * 64);
  }

 private:
  std::vector<std::vector<char>> parts_;
};

// The keys and values of one row and key head, and what blocks of queries of its heads find there.
class Reading {
 public:
  // For up to `most` keys.
  Reading(const Shape& s, int64_t most)
      : s_(s), heads_(s.together()), keys_(room_.take<bf16>(most * s.D)), values_(room_.take<bf16>(most * s.D)), values_t_(room_.take<bf16>(most * s.D)),
        block_(room_.take<bf16>(Q * s.D)), columns_(room_.take<bf16>(heads_ * Q * s.D)), scores_(room_.take<float>(most * heads_ * Q)),
        weights_(room_.take<bf16>(most * heads_ * Q)), sums_(room_.take<float>(s.D * heads_ * Q)), scratch_(room_.take<float>(s.D * Q)),
        inverse_(room_.take<float>(heads_ * Q)), logs_(room_.take<float>(heads_ * Q)) {}

  void begin() { held_ = 0; }

  // `count` more tokens of row b and key head g.
  void add(const Strided& k, const Strided& v, int64_t b, int64_t g, int64_t count) {
    copy_rows(k, b, g, 0, count, count, s_.D, keys_ + held_ * s_.D);
    copy_rows(v, b, g, 0, count, count, s_.D, values_ + held_ * s_.D);
    held_ += count;
  }

  void end() {
    padded_ = (held_ + K - 1) / K * K;
    std::memset(keys_ + held_ * s_.D, 0, (padded_ - held_) * s_.D * sizeof(bf16));
    std::memset(values_ + held_ * s_.D, 0, (padded_ - held_) * s_.D * sizeof(bf16));
    transpose(values_, padded_, s_.D, values_t_);
  }

  // The queries first..first + count of all heads of key head g: their outputs [.., H, D], and unless null the logs of their sums [H, ..].
  void attend(
      const Strided& q, int64_t b, int64_t g, int64_t first, int64_t count, const std::vector<Run>& runs, const std::vector<uint32_t>& masks, bf16* out,
      float* lse, int64_t lse_stride) {
    const int64_t D = s_.D, group = s_.H / s_.G;
    for (int64_t head = g * group; head < (g + 1) * group; head += heads_) {
      const int64_t heads = std::min(heads_, (g + 1) * group - head), N = heads * Q;
      for (int64_t h = 0; h < heads; ++h) {
        copy_rows(q, b, head + h, first, count, Q, D, block_);
        pack_columns(block_, D, N, columns_ + h * Q * 2);
      }
      for (const Run& run : runs) brgemm(run.to - run.from, N, D, D, N, N, false, keys_ + run.from * D, columns_, scores_ + run.place * N);
      softmax(scores_, masks, static_cast<int64_t>(masks.size()), N, s_.scale, weights_, inverse_, logs_);
      std::memset(sums_, 0, D * N * sizeof(float));
      for (const Run& run : runs)
        brgemm(D, N, run.to - run.from, padded_, N, N, true, values_t_ + run.from, weights_ + run.place * N, sums_);
      for (int64_t h = 0; h < heads; ++h) {
        store_transposed(sums_ + h * Q, D, N, count, inverse_ + h * Q, out + (head + h) * D, s_.H * D, scratch_);
        if (lse) std::memcpy(lse + (head + h) * lse_stride, logs_ + h * Q, count * sizeof(float));
      }
    }
  }

 private:
  const Shape& s_;
  Room room_;
  int64_t heads_, held_ = 0, padded_ = 0;
  bf16 *keys_, *values_, *values_t_, *block_, *columns_;
  float* scores_;
  bf16* weights_;
  float *sums_, *scratch_, *inverse_, *logs_;
};

void forward(const Shape& s, Strided q, Strided k, Strided v, const int32_t* ends, bf16* out, float* lse) {
  at::parallel_for(0, s.B * s.G, 1, [&](int64_t begin, int64_t end) {
    Reading reading(s, s.padded());
    std::vector<Run> runs;
    std::vector<uint32_t> masks;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / s.G, g = task % s.G;
      reading.begin();
      reading.add(k, v, b, g, s.L);
      reading.end();
      for (int64_t first = 0; first < s.L; first += Q) {
        const int64_t count = std::min(Q, s.L - first);
        visible(ends + b * s.L, s.L, first, count, runs, masks);
        reading.attend(q, b, g, first, count, runs, masks, out + (b * s.L + first) * s.H * s.D, lse + b * s.H * s.L + first, s.L);
      }
    }
    at::native::cpublas::brgemm_release();
  });
}

// The tokens that branches have grown by one call: a key and a value of each.
struct Grown {
  Strided keys, values;
};

// One query of each of `branches` a row, which sees what `seen` says of the row's L tokens, and its own branch's tokens.
void grow(const Shape& s, int64_t branches, const std::vector<Grown>& grown, Strided q, Strided k, Strided v, const uint8_t* seen, bf16* out) {
  const int64_t own = branches * static_cast<int64_t>(grown.size()), padded = (s.L + own + K - 1) / K * K;
  at::parallel_for(0, s.B * s.G, 1, [&](int64_t begin, int64_t end) {
    Reading reading(s, padded);
    const std::vector<Run> runs{{0, padded, 0}};
    std::vector<uint32_t> masks(padded);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / s.G, g = task % s.G;
      reading.begin();
      reading.add(k, v, b, g, s.L);
      for (const Grown& one : grown) reading.add(one.keys, one.values, b, g, branches);
      reading.end();
      for (int64_t first = 0; first < branches; first += Q) {
        const int64_t count = std::min(Q, branches - first);
        std::fill(masks.begin(), masks.end(), 0u);
        for (int64_t i = 0; i < count; ++i) {
          const uint8_t* sees = seen + (b * branches + first + i) * s.L;
          for (int64_t j = 0; j < s.L; ++j) masks[j] |= static_cast<uint32_t>(sees[j]) << i;
          for (int64_t j = s.L + first + i; j < s.L + own; j += branches) masks[j] |= 1u << i;
        }
        reading.attend(q, b, g, first, count, runs, masks, out + (b * branches + first) * s.H * s.D, nullptr, 0);
      }
    }
    at::native::cpublas::brgemm_release();
  });
}

void backward(
    const Shape& s, Strided dout, Strided q, Strided k, Strided v, Strided out, const float* lse, const int32_t* ends, bf16* dq, bf16* dk, bf16* dv) {
  const int64_t D = s.D, L = s.L, P = s.padded(), group = s.H / s.G, most_heads = s.together(), most_columns = most_heads * Q;
  at::parallel_for(0, s.B * s.G, 1, [&](int64_t begin, int64_t end) {
    Room room;
    auto* keys = room.take<bf16>(P * D);
    auto* keys_t = room.take<bf16>(P * D);
    auto* values = room.take<bf16>(P * D);
    auto* block = room.take<bf16>(Q * D);
    auto* q_columns = room.take<bf16>(most_columns * D);
    auto* q_rows = room.take<bf16>(most_columns * D);
    auto* do_columns = room.take<bf16>(most_columns * D);
    auto* do_rows = room.take<bf16>(most_columns * D);
    auto* scores = room.take<float>(P * most_columns);
    auto* flows = room.take<float>(P * most_columns);
    auto* weights = room.take<bf16>(P * most_columns);
    auto* slopes = room.take<bf16>(P * most_columns);
    auto* slopes_pairs = room.take<bf16>(P * most_columns);
    auto* dq_t = room.take<float>(D * most_columns);
    auto* scratch = room.take<float>(D * Q);
    auto* dks = room.take<float>(P * D);
    auto* dvs = room.take<float>(P * D);
    auto* delta = room.take<float>(most_columns);
    auto* logs = room.take<float>(most_columns);
    std::vector<Run> runs;
    std::vector<uint32_t> masks;
    float ones[Q];
    std::fill(ones, ones + Q, 1.f);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / s.G, g = task % s.G;
      copy_rows(k, b, g, 0, L, P, D, keys);
      copy_rows(v, b, g, 0, L, P, D, values);
      transpose(keys, P, D, keys_t);
      std::memset(dks, 0, P * D * sizeof(float));
      std::memset(dvs, 0, P * D * sizeof(float));
      for (int64_t first = 0; first < L; first += Q) {
        const int64_t count = std::min(Q, L - first), held = visible(ends + b * L, L, first, count, runs, masks);
        for (int64_t head = g * group; head < (g + 1) * group; head += most_heads) {
          const int64_t heads = std::min(most_heads, (g + 1) * group - head), N = heads * Q;
          for (int64_t h = 0; h < heads; ++h) {
            copy_rows(q, b, head + h, first, count, Q, D, block);
            pack_columns(block, D, N, q_columns + h * Q * 2);
            pack_rows(block, D, q_rows + h * Q * D);
            copy_rows(dout, b, head + h, first, count, Q, D, block);
            pack_columns(block, D, N, do_columns + h * Q * 2);
            pack_rows(block, D, do_rows + h * Q * D);
            for (int64_t i = 0; i < Q; ++i) {
              delta[h * Q + i] = i < count ? product(block + i * D, out.at(b, head + h, first + i), D) : 0.f;
              logs[h * Q + i] = i < count ? lse[(b * s.H + head + h) * L + first + i] : std::numeric_limits<float>::infinity();
            }
          }
          for (const Run& run : runs) {
            brgemm(run.to - run.from, N, D, D, N, N, false, keys + run.from * D, q_columns, scores + run.place * N);
            brgemm(run.to - run.from, N, D, D, N, N, false, values + run.from * D, do_columns, flows + run.place * N);
          }
          softmax_backward(scores, flows, masks, held, N, s.scale, logs, delta, weights, slopes, slopes_pairs);
          std::memset(dq_t, 0, D * N * sizeof(float));
          for (const Run& run : runs) {
            const int64_t there = run.to - run.from;
            brgemm(there, D, N, N, D, D, true, weights + run.place * N, do_rows, dvs + run.from * D);
            brgemm(there, D, N, N, D, D, true, slopes + run.place * N, q_rows, dks + run.from * D);
            brgemm(D, N, there, P, N, N, true, keys_t + run.from, slopes_pairs + run.place * N, dq_t);
          }
          for (int64_t h = 0; h < heads; ++h)
            store_transposed(dq_t + h * Q, D, N, count, ones, dq + ((b * L + first) * s.H + head + h) * D, s.H * D, scratch);
        }
      }
      for (int64_t j = 0; j < L; ++j)
        for (int64_t d = 0; d < D; d += 16) {
          const int64_t to = ((b * L + j) * s.G + g) * D + d;
          _mm256_storeu_si256(reinterpret_cast<__m256i*>(dk + to), rounded(_mm512_loadu_ps(dks + j * D + d)));
          _mm256_storeu_si256(reinterpret_cast<__m256i*>(dv + to), rounded(_mm512_loadu_ps(dvs + j * D + d)));
        }
    }
    at::native::cpublas::brgemm_release();
  });
}

Strided strided(const void* data, const int64_t* strides) { return {static_cast<const bf16*>(data), strides[0], strides[1], strides[2]}; }

}  // namespace

extern "C" {

// out [B, L, H, D]; lse fp32 [B, H, L]. `shape` is B, H, G, L, D; `strides` those of q, k and v by row, head and token.
void attend(
    const int64_t* shape, float scale, const int64_t* strides, const void* q, const void* k, const void* v, const void* ends, void* out, void* lse) {
  const Shape s{shape[0], shape[1], shape[2], shape[3], shape[4], scale};
  forward(
      s, strided(q, strides), strided(k, strides + 3), strided(v, strides + 6), static_cast<const int32_t*>(ends), static_cast<bf16*>(out),
      static_cast<float*>(lse));
}

// out [B, K, H, D] of the newest tokens' q [B, H, K, D], the rows' k and v [B, G, L, D], `seen` bool[B, K, L], and k and v
// [B, G, K, D] of `calls` calls. `shape` is B, H, G, L, D, K and calls; `strides` those of q, k and v, and of what `grown` points to.
void grow_branches(
    const int64_t* shape, float scale, const int64_t* strides, const void* q, const void* k, const void* v, const void* seen, const void* const* grown,
    void* out) {
  const Shape s{shape[0], shape[1], shape[2], shape[3], shape[4], scale};
  std::vector<Grown> all;
  for (int64_t call = 0; call < shape[6]; ++call)
    all.push_back({strided(grown[2 * call], strides + 9 + 6 * call), strided(grown[2 * call + 1], strides + 12 + 6 * call)});
  grow(
      s, shape[5], all, strided(q, strides), strided(k, strides + 3), strided(v, strides + 6), static_cast<const uint8_t*>(seen),
      static_cast<bf16*>(out));
}

// dq [B, L, H, D], dk and dv [B, L, G, D]; `strides` those of dout, q, k, v and out.
void attend_backward(
    const int64_t* shape, float scale, const int64_t* strides, const void* dout, const void* q, const void* k, const void* v, const void* out,
    const void* lse, const void* ends, void* dq, void* dk, void* dv) {
  const Shape s{shape[0], shape[1], shape[2], shape[3], shape[4], scale};
  backward(
      s, strided(dout, strides), strided(q, strides + 3), strided(k, strides + 6), strided(v, strides + 9), strided(out, strides + 12),
      static_cast<const float*>(lse), static_cast<const int32_t*>(ends), static_cast<bf16*>(dq), static_cast<bf16*>(dk), static_cast<bf16*>(dv));
}
}
