// The cross-entropy of hidden states under a frozen output head for a CPU with AMX, and its gradient, with one pass over the weight:
// logits are made, used and dropped in a core's second cache.
//
// Threads divide the vocabulary. A stretch of positions stays in the second cache while 32 rows of the weight at a time, in the
// first, go over all of it and give logits transposed. What follows is attention by blocks, with hidden states for queries and the
// weight for keys and values: e^logit, relative to a reference of each position, is summed, and is as bf16 the first operand of the
// product with a panel of the weight, packed by pairs of its rows. References are whole powers of two, so that raising one is exact.
//
// The target is left out of all sums. With o of all others and t of the target, the loss is log(1 + o / t), and its gradient
// o / (o + t) (mean of the others' rows - the target's row): neither cancels where the target is all but certain.
//
// Shapes: S positions, E width, V vocabulary. E is whole in 32.

#include "amx.h"

#include <cmath>
#include <limits>

namespace {

constexpr int64_t CACHE = 1450 << 10;  // bytes of the second cache that a stretch of positions and a panel may fill
constexpr int64_t PANEL = 500 << 10;  // bytes of a panel
constexpr float BOUND = 0x1p40f;  // what 32 exponentials may sum to before their reference is raised
constexpr float LOG2_E = 1.44269504f;

struct Shape {
  int64_t S, E, V;
};

// 2^(x log2(e) - reference), 1e-7 of itself off.
__m512 power(__m512 x, __m512 reference) {
  const __m512 scaled = _mm512_fmsub_ps(x, _mm512_set1_ps(LOG2_E), reference);
  const __m512 whole = _mm512_roundscale_ps(scaled, 8), r = _mm512_sub_ps(scaled, whole);
  __m512 found = _mm512_set1_ps(1.32647e-3f);
  found = _mm512_fmadd_ps(found, r, _mm512_set1_ps(9.67151e-3f));
  found = _mm512_fmadd_ps(found, r, _mm512_set1_ps(5.550734e-2f));
  found = _mm512_fmadd_ps(found, r, _mm512_set1_ps(2.4022242e-1f));
  found = _mm512_fmadd_ps(found, r, _mm512_set1_ps(6.9314698e-1f));
  found = _mm512_fmadd_ps(found, r, _mm512_set1_ps(1));
  return _mm512_scalef_ps(found, whole);
}

// What a thread has of a stretch of positions, by blocks of 32.
struct Part {
  int64_t width, deep;  // tiles of E and of a panel's rows
  const bf16* hidden;  // [blocks][width], packed columns
  bf16* shares;  // exponentials [blocks][deep], packed rows
  float *sums, *total, *reference;  // [blocks][width][2][2][16][16] of shares times weights, [blocks][32], [blocks][32]
  const int32_t* targets;  // [blocks][32]
};

// 32 rows of the vocabulary from `row` on over a block of positions.
struct Square {
  const float* logits;
  int64_t block, row, rows, step;  // `rows` of the vocabulary in all; `step` in the panel
  float* total;  // [32], of these alone
  bf16* pairs;  // exponentials [2][16 pairs][16]
};

// The positions of a half of a square whose target is not this row.
__mmask16 others(const Part& part, const Square& at, int64_t half, int64_t row) {
  if (row >= at.rows) return 0;
  return _mm512_cmpneq_epi32_mask(_mm512_load_si512(part.targets + at.block * 32 + half * 16), _mm512_set1_epi32(static_cast<int32_t>(row)));
}

const float* row_of(const float* sums, int64_t row, int64_t half) { return sums + row / 16 * 512 + half * 256 + row % 16 * 16; }

// A piece of 16 of what is done with a square: two rows.
template <bool GRADIENT>
void exponentiate(const Part& part, const Square& at, int64_t piece) {
  for (int64_t half = 0; half < 2; ++half) {
    const __m512 reference = _mm512_load_ps(part.reference + at.block * 32 + half * 16);
    const __m512 total = piece ? _mm512_load_ps(at.total + half * 16) : _mm512_setzero_ps();
    __m512 found[2];
    for (int64_t k = 0; k < 2; ++k) {
      const int64_t row = piece * 2 + k;
      found[k] = _mm512_maskz_mov_ps(others(part, at, half, at.row + row), power(_mm512_load_ps(row_of(at.logits, row, half)), reference));
    }
    _mm512_store_ps(at.total + half * 16, _mm512_add_ps(total, _mm512_add_ps(found[0], found[1])));
    if (GRADIENT) _mm512_store_si512(at.pairs + half * TILE + piece * 32, paired(found[0], found[1]));
  }
}

// Multiplies what there is of a position by a power of two.
template <bool GRADIENT>
void rescale(const Part& part, const Square& at, int64_t position, float factor) {
  part.total[at.block * 32 + position] *= factor;
  if (!GRADIENT) return;
  const __m512 by = _mm512_set1_ps(factor);
  bf16* share = part.shares + at.block * part.deep * 2 * TILE + position * 32;
  for (int64_t d = 0; d < at.step; ++d, share += 2 * TILE) {
    const __m512i held = _mm512_load_si512(share);
    const __m512 low = widened(_mm512_castsi512_si256(held)), high = widened(_mm512_extracti64x4_epi64(held, 1));
    _mm512_store_si512(share, (__m512i)_mm512_cvtne2ps_pbh(_mm512_mul_ps(high, by), _mm512_mul_ps(low, by)));
  }
  float* sums = part.sums + at.block * part.width * 1024 + position / 16 * 512 + position % 16 * 16;
  for (int64_t n = 0; n < part.width; ++n, sums += 1024)
    for (int64_t half = 0; half < 2; ++half) _mm512_store_ps(sums + half * 256, _mm512_mul_ps(_mm512_load_ps(sums + half * 256), by));
}

// Raises the references of positions whose exponentials are too large, to the largest logit of a square.
template <bool GRADIENT>
void raise(const Part& part, const Square& at, const __mmask16* large) {
  alignas(64) float factors[32];
  for (int64_t half = 0; half < 2; ++half) {
    float* reference = part.reference + at.block * 32 + half * 16;
    __m512 most = _mm512_set1_ps(std::numeric_limits<float>::lowest());
    for (int64_t row = 0; row < 32; ++row)
      most = _mm512_mask_max_ps(most, others(part, at, half, at.row + row), most, _mm512_load_ps(row_of(at.logits, row, half)));
    const __m512 before = _mm512_load_ps(reference);
    const __m512 after = _mm512_mask_roundscale_ps(before, large[half], _mm512_mul_ps(most, _mm512_set1_ps(LOG2_E)), 9);
    _mm512_store_ps(reference, after);
    _mm512_store_ps(factors + half * 16, _mm512_scalef_ps(_mm512_set1_ps(1), _mm512_sub_ps(before, after)));
  }
  for (int64_t i = 0; i < 32; ++i)
    if (factors[i] != 1) rescale<GRADIENT>(part, at, i, factors[i]);
}

// What is done with a square when it is exponentiated.
template <bool GRADIENT>
void finish(const Part& part, const Square& at) {
  __mmask16 large[2];
  const auto too_large = [&] {
    for (int64_t half = 0; half < 2; ++half)
      large[half] = _mm512_cmp_ps_mask(_mm512_load_ps(at.total + half * 16), _mm512_set1_ps(BOUND), _CMP_NLE_UQ);
    return large[0] | large[1];
  };
  if (too_large()) {
    raise<GRADIENT>(part, at, large);
    for (int64_t piece = 0; piece < 16; ++piece) exponentiate<GRADIENT>(part, at, piece);
  }
  for (int64_t half = 0; half < 2; ++half) {
    float* total = part.total + at.block * 32 + half * 16;
    _mm512_store_ps(total, _mm512_add_ps(_mm512_load_ps(total), _mm512_load_ps(at.total + half * 16)));
    if (!GRADIENT) continue;
    __m512i pairs[16];
    for (int64_t p = 0; p < 16; ++p) pairs[p] = _mm512_load_si512(at.pairs + half * TILE + p * 32);
    store_transposed(pairs, part.shares + ((at.block * part.deep + at.step) * 2 + half) * TILE);
  }
}

// How far apart the packed columns of a panel lie: by a whole way of the first cache they would drive one another out of it.
int64_t panel_stride(int64_t deep) { return (deep | 1) * 2 * TILE; }

// Goes over rows of the vocabulary from `from` to `to` for blocks of positions.
template <bool GRADIENT>
void go_over(const Part& part, Matrix weight, Shape s, int64_t from, int64_t to, int64_t blocks, float* logits, bf16* panel, bf16* last) {
  alignas(64) float totals[32];
  alignas(64) bf16 pairs[2 * TILE];
  const int64_t width = part.width, deep = pieces(width, pieces(width, DEEP)), slots = width > deep ? blocks : 2;
  const int64_t apart = panel_stride(part.deep);
  for (int64_t begin = from; begin < to; begin += part.deep * 32) {
    const int64_t steps = pieces(std::min(part.deep * 32, to - begin), 32);
    for (int64_t step = 0; step < steps; ++step) {
      const int64_t v = begin + step * 32;
      Matrix rows{weight.at(v, 0), weight.stride};
      if (v + 32 > s.V) {
        std::fill_n(last, 32 * s.E, bf16{0});
        for (int64_t i = v; i < s.V; ++i) std::copy_n(weight.at(i, 0), s.E, last + (i - v) * s.E);
        rows = {last, s.E};
      }
      const auto square = [&](int64_t b) { return Square{logits + b % slots * 1024, b, v, s.V, step, totals, pairs}; };
      for (int64_t d = 0; d < width; d += deep) {
        const int64_t here = std::min(deep, width - d);
        const bool whole = d + here == width;
        const int64_t next = std::min(v + 32, s.V - 32);
        for (int64_t b = 0; b < blocks; ++b) {
          float* own = logits + b % slots * 1024;
          begin_sums(d ? own : nullptr);
          add_product<false>(as_they_lie({rows.at(0, d * 32), rows.stride}), part.hidden + (b * width + d) * 2 * TILE, here, [&](int64_t k) {
            if (whole && b && k < 16) exponentiate<GRADIENT>(part, square(b - 1), k);
            if (next > 0) ask(b, blocks, [&](int64_t r) { return weight.at(next + r, (d + k) * 32); });
            for (int64_t p = 16 * b / blocks; GRADIENT && p < 16 * (b + 1) / blocks; ++p) {
              const __m512i even = _mm512_loadu_si512(rows.at(2 * p, (d + k) * 32)), odd = _mm512_loadu_si512(rows.at(2 * p + 1, (d + k) * 32));
              bf16* to = panel + (d + k) * apart + step * 2 * TILE + p * 32;
              _mm512_store_si512(to, _mm512_unpacklo_epi16(even, odd));
              _mm512_store_si512(to + TILE, _mm512_unpackhi_epi16(even, odd));
            }
          });
          end_sums(own);
          if (!whole || !b) continue;
          for (int64_t k = here; k < 16; ++k) exponentiate<GRADIENT>(part, square(b - 1), k);
          finish<GRADIENT>(part, square(b - 1));
        }
      }
      for (int64_t k = 0; k < 16; ++k) exponentiate<GRADIENT>(part, square(blocks - 1), k);
      finish<GRADIENT>(part, square(blocks - 1));
    }
    for (int64_t n = 0; GRADIENT && n < width; ++n)
      for (int64_t b = 0; b < blocks; ++b) {
        float* sums = part.sums + (b * width + n) * 1024;
        begin_sums(sums);
        add_product<true>(packed(part.shares + b * part.deep * 2 * TILE), panel + n * apart, steps, [](int64_t) {});
        end_sums(sums);
      }
  }
}

// The loss and the gradient of a position, from what all threads found, given the target's row.
template <bool GRADIENT>
void join(Shape s, const Part* parts, int64_t threads, int64_t position, const bf16* hidden, const bf16* row, float* loss, float* gradient) {
  float reference = std::numeric_limits<float>::lowest();
  for (int64_t t = 0; t < threads; ++t) reference = std::max(reference, parts[t].reference[position]);
  float total = 0;
  for (int64_t t = 0; t < threads; ++t) {
    // From here on it is what this thread's sums count by.
    float& factor = parts[t].reference[position];
    factor = std::exp2(factor - reference);
    total += parts[t].total[position] * factor;
  }
  __m512 product = _mm512_setzero_ps();
  for (int64_t n = 0; n < s.E; n += 32)
    product = _mm512_dpbf16_ps(product, (__m512bh)_mm512_loadu_si512(hidden + n), (__m512bh)_mm512_loadu_si512(row + n));
  const double odds = std::log(static_cast<double>(total)) + reference * M_LN2 - _mm512_reduce_add_ps(product);
  *loss = static_cast<float>(odds > 0 ? odds + std::log1p(std::exp(-odds)) : std::log1p(std::exp(odds)));
  if (!GRADIENT) return;
  const auto wrong = static_cast<float>(1 / (1 + std::exp(-odds)));
  const float scale = total == 0 ? 0 : wrong / total;
  for (int64_t n = 0; n < s.E; n += 32) {
    __m512 found[2] = {};
    for (int64_t t = 0; t < threads; ++t) {
      const float* sums = parts[t].sums + (position / 32 * s.E + n) * 32;
      const __m512 by = _mm512_set1_ps(parts[t].reference[position] * scale);
      for (int64_t half = 0; half < 2; ++half) found[half] = _mm512_fmadd_ps(_mm512_load_ps(row_of(sums, position % 32, half)), by, found[half]);
    }
    // The panel's columns lie as unpacking by fours leaves them.
    const __m512i order = _mm512_set_epi32(23, 22, 21, 20, 7, 6, 5, 4, 19, 18, 17, 16, 3, 2, 1, 0);
    for (int64_t half = 0; half < 2; ++half) {
      const __m512 own = widened(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(row + n + half * 16)));
      const __m512 mean = _mm512_permutex2var_ps(found[0], _mm512_add_epi32(order, _mm512_set1_epi32(static_cast<int>(half) * 8)), found[1]);
      _mm512_storeu_ps(gradient + n + half * 16, _mm512_fnmadd_ps(own, _mm512_set1_ps(wrong), mean));
    }
  }
}

template <bool GRADIENT>
void head(Shape s, Matrix hidden, Matrix weight, const int64_t* targets, float* losses, float* gradient) {
  static thread_local Room<float> sums_room;
  static thread_local Room<int32_t> targets_room;
  const int64_t threads = at::get_num_threads(), width = s.E / 32;
  const int64_t deep = GRADIENT ? std::clamp<int64_t>(PANEL / (64 * s.E), 1, DEEP) : 1;
  const int64_t most = stretch(s.S, GRADIENT ? s.E * 6 + deep * 64 : s.E * 2, CACHE - deep * 64 * s.E);
  const int64_t positions = GRADIENT ? most * (s.E + 2) : most * 2;
  float* room = sums_room.of(threads * positions);
  int32_t* own_targets = targets_room.of(most);
  std::unique_ptr<Part[]> parts(new Part[threads]);
  for (int64_t i = 0; i < s.S; i += most) {
    const int64_t rows = std::min(most, s.S - i), blocks = pieces(rows, 32);
    for (int64_t k = 0; k < most; ++k) own_targets[k] = k < rows ? static_cast<int32_t>(targets[i + k]) : -1;
    at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
      static thread_local Room<bf16> hidden_room, shares_room, panel_room, last_room;
      static thread_local Room<float> logits_room;
      const Tiles configured;
      bf16* columns = hidden_room.of(most * s.E);
      for (int64_t b = 0; b < blocks; ++b) pack_columns({hidden.at(i + b * 32, 0), hidden.stride}, rows - b * 32, s.E, columns + b * 32 * s.E);
      for (int64_t thread = begin; thread < end; ++thread) {
        float* sums = room + thread * positions;
        float *total = sums + (GRADIENT ? most * s.E : 0), *reference = total + most;
        std::fill(sums, reference, 0.f);
        std::fill_n(reference, most, std::numeric_limits<float>::lowest());
        parts[thread] = {width, deep, columns, shares_room.of(most * deep * 32), sums, total, reference, own_targets};
        const auto [from, to] = share(s.V, thread, threads);
        go_over<GRADIENT>(
            parts[thread], weight, s, from, to, blocks, logits_room.of(std::max<int64_t>(2, blocks) * 1024),
            panel_room.of(GRADIENT ? width * panel_stride(deep) : 0), last_room.of(32 * s.E));
      }
    });
    at::parallel_for(0, rows, 8, [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k)
        join<GRADIENT>(s, parts.get(), threads, k, hidden.at(i + k, 0), weight.at(targets[i + k], 0), losses + i + k, gradient + (i + k) * s.E);
    });
  }
}

}  // namespace

extern "C" {

// fp32 losses [S] of bf16 hidden states [S, E] under the weight [V, E] against int64 targets [S], and unless null the gradient [S, E]
// of each in fp32. `shape` is S, E, V, and the strides of hidden states and weight.
void head(const int64_t* shape, const void* hidden, const void* weight, const void* targets, void* losses, void* gradient) {
  const Shape s{shape[0], shape[1], shape[2]};
  (gradient ? head<true> : head<false>)(
      s, {static_cast<const bf16*>(hidden), shape[3]}, {static_cast<const bf16*>(weight), shape[4]}, static_cast<const int64_t*>(targets),
      static_cast<float*>(losses), static_cast<float*>(gradient));
}
}
