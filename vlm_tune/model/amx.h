// What kernels for a CPU with AMX are made of: tiles, packed operands, products, and the gradients of adapters.
//
// A block is 32 rows or columns. A tile is 16 rows of 32 numbers; operands are pairs of tiles, one pair after another in depth.
#pragma once

#include <ATen/Parallel.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>

#include "transpose.h"

namespace {

using bf16 = uint16_t;

constexpr int64_t TILE = 512;  // numbers of a tile
constexpr int64_t DEEP = 20;  // tiles of depth whose pairs of rows fill most of the first cache

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};

// Memory for as long as a thread lives: new pages cost more than what is done with them.
template <typename Number>
struct Room {
  std::unique_ptr<Number, Free> held;
  int64_t size = 0;
  Number* of(int64_t wanted) {
    if (wanted > size) {
      size = (wanted + 2047) / 2048 * 2048;
      held.reset(static_cast<Number*>(std::aligned_alloc(4096, size * sizeof(Number))));
    }
    return held.get();
  }
};

struct alignas(64) Configuration {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
};

// Eight tiles of 16 rows of 64 bytes, for as long as it lives.
struct Tiles {
  Tiles() {
    constexpr int ARCH_REQ_XCOMP_PERM = 0x1023, XTILEDATA = 18;
    [[maybe_unused]] static const long asked = syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XTILEDATA);
    Configuration wanted;
    for (int i = 0; i < 8; ++i) wanted.bytes[i] = 64, wanted.rows[i] = 16;
    _tile_loadconfig(&wanted);
  }
  ~Tiles() {
    _tile_release();
    _mm_sfence();  // what was written past the caches is there for other threads from here on
  }
};

int64_t up(int64_t count, int64_t whole) { return (count + whole - 1) / whole * whole; }
int64_t pieces(int64_t count, int64_t whole) { return (count + whole - 1) / whole; }
__mmask32 first(int64_t count) { return count >= 32 ? ~0u : count <= 0 ? 0u : (1u << count) - 1; }
__m512i loaded(const bf16* from, int64_t count) { return _mm512_maskz_loadu_epi16(first(count), from); }
__m512 widened(__m256i half) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16)); }

// 16 rows of 16 pairs, transposed.
void store_transposed(__m512i* rows, bf16* to) {
  transpose16(rows);
  for (int i = 0; i < 16; ++i) _mm512_store_si512(to + i * 32, rows[i]);
}

// --- operands --------------------------------------------------------------------------------------------------------

// A matrix whose rows lie `stride` numbers apart.
struct Matrix {
  const bf16* data;
  int64_t stride;
  const bf16* at(int64_t row, int64_t column) const { return data + row * stride + column; }
};

// `count` of 32 rows as first operand: pairs of tiles, one pair after another in depth.
void pack_rows(Matrix rows, int64_t count, int64_t depth, bf16* to) {
  for (int64_t i = 0; i < 32; ++i)
    for (int64_t d = 0; d < depth; d += 32)
      _mm512_store_si512(to + d / 32 * 2 * TILE + i * 32, i < count ? loaded(rows.at(i, d), depth - d) : _mm512_setzero_si512());
}

// 32 columns of the second operand whose columns are the rows of a matrix.
void pack_columns(Matrix columns, int64_t count, int64_t depth, bf16* to) {
  for (int64_t half = 0; half < 2; ++half)
    for (int64_t d = 0; d < depth; d += 32) {
      __m512i held[16];
      for (int64_t j = 0; j < 16; ++j) {
        const int64_t n = half * 16 + j;
        held[j] = n < count ? loaded(columns.at(n, d), depth - d) : _mm512_setzero_si512();
      }
      store_transposed(held, to + (d / 32 * 2 + half) * TILE);
    }
}

// Two rows of 32 numbers as pairs, one of either: 16 of the left half and 16 of the right.
void store_pairs(__m512i even, __m512i odd, bf16* left) {
  const __m512i low = _mm512_set_epi16(
      47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  _mm512_store_si512(left, _mm512_permutex2var_epi16(even, low, odd));
  _mm512_store_si512(left + TILE, _mm512_permutex2var_epi16(even, _mm512_add_epi16(low, _mm512_set1_epi16(16)), odd));
}

// 32 columns of the second operand whose depth are the rows of a matrix.
void pack_depth(Matrix rows, int64_t count, int64_t depth, bf16* to) {
  for (int64_t d = 0; d < up(depth, 32); d += 2) {
    const __m512i even = d < depth ? loaded(rows.at(d, 0), count) : _mm512_setzero_si512();
    const __m512i odd = d + 1 < depth ? loaded(rows.at(d + 1, 0), count) : _mm512_setzero_si512();
    store_pairs(even, odd, to + d / 32 * 2 * TILE + d % 32 / 2 * 32);
  }
}

// 32 rows of some ranks as first operand of a product over the rows: a tile for every 16 ranks.
void pack_ranks(Matrix rows, int64_t count, int64_t ranks, bf16* to) {
  alignas(64) bf16 pairs[2 * TILE];
  for (int64_t r = 0; r < ranks; r += 32) {
    pack_depth({rows.at(0, r), rows.stride}, ranks - r, count, pairs);
    for (int64_t half = 0; half < 2 && r + half * 16 < ranks; ++half) {
      __m512i held[16];
      for (int i = 0; i < 16; ++i) held[i] = _mm512_load_si512(pairs + half * TILE + i * 32);
      store_transposed(held, to + (r / 16 + half) * TILE);
    }
  }
}

// --- products --------------------------------------------------------------------------------------------------------

// Four tiles of sums [2][2][16][16] of 32 x 32 begin: at those, or at nothing.
void begin_sums(const float* sums) {
  if (sums) {
    _tile_loadd(0, sums, 64);
    _tile_loadd(1, sums + 256, 64);
    _tile_loadd(2, sums + 512, 64);
    _tile_loadd(3, sums + 768, 64);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
}

// They end there.
void end_sums(float* sums) {
  _tile_stored(0, sums, 64);
  _tile_stored(1, sums + 256, 64);
  _tile_stored(2, sums + 512, 64);
  _tile_stored(3, sums + 768, 64);
}

// 32 rows times 32 columns over some tiles of depth, as four tiles of sums.
template <bool ADD>
void multiply(const bf16* rows, const bf16* columns, int64_t depth, float* sums) {
  begin_sums(ADD ? sums : nullptr);
  for (int64_t d = 0; d < 2 * depth * TILE; d += 2 * TILE) {
    // What streams past must not drive the rows out of the first cache.
    _tile_loadd(4, rows + d, 64);
    _tile_stream_loadd(6, columns + d, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_stream_loadd(7, columns + d + TILE, 64);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, rows + d + TILE, 64);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  end_sums(sums);
}

// Sums of 32 x 32 as numbers, with a bias if there is one, and with `add` upon what is there.
void store(const float* sums, int64_t rows, int64_t columns, const bf16* bias, bf16* to, int64_t stride, bool add) {
  __m512 low = _mm512_setzero_ps(), high = low;
  if (bias) {
    const __m512i both = loaded(bias, columns);
    low = widened(_mm512_castsi512_si256(both));
    high = widened(_mm512_extracti64x4_epi64(both, 1));
  }
  for (int64_t i = 0; i < rows; ++i) {
    const float* from = sums + i / 16 * 512 + i % 16 * 16;
    if (add) {
      const __m512i both = loaded(to + i * stride, columns);
      low = widened(_mm512_castsi512_si256(both));
      high = widened(_mm512_extracti64x4_epi64(both, 1));
    }
    const __m512bh found = _mm512_cvtne2ps_pbh(_mm512_add_ps(_mm512_load_ps(from + 256), high), _mm512_add_ps(_mm512_load_ps(from), low));
    bf16* out = to + i * stride;
    // A line that is written whole past the caches need not be read first, which takes twice as long.
    if (columns >= 32 && stride > 64 && !add && reinterpret_cast<uintptr_t>(out) % 64 == 0) _mm512_stream_si512(reinterpret_cast<__m512i*>(out), (__m512i)found);
    else _mm512_mask_storeu_epi16(out, first(columns), (__m512i)found);
  }
}

// Two rows of 16 numbers as pairs, one of either.
__m512i paired(__m512 even, __m512 odd) {
  const __m512i order = _mm512_set_epi16(
      31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh(odd, even));
}

// One of 16 pairs of rows of 32 x 32 sums, in its left or right half.
__m512i pair_of(const float* sums, int64_t pair, int64_t half) {
  const float* from = sums + pair / 8 * 512 + half * 256 + pair % 8 * 32;
  return paired(_mm512_load_ps(from), _mm512_load_ps(from + 16));
}

// Two tiles of rows, each `stride` numbers apart, and as far to the next in depth.
struct Rows {
  const bf16 *low, *high;
  int64_t stride, deeper;
};

Rows as_they_lie(Matrix rows) { return {rows.data, rows.data + 16 * rows.stride, rows.stride, 32}; }
Rows packed(const bf16* rows) { return {rows, rows + TILE, 32, 2 * TILE}; }

// Adds 32 rows times 32 packed columns over some tiles of depth. What is not in the first cache and shall not be is loaded past
// it: the rows or the columns. `work` is done beside, a piece at each tile of depth: the unit for tiles has a port of its own.
template <bool ROWS_PAST, typename Work>
void add_product(Rows rows, const bf16* columns, int64_t depth, Work work) {
  for (int64_t d = 0; d < depth; ++d, rows.low += rows.deeper, rows.high += rows.deeper, columns += 2 * TILE) {
    if constexpr (ROWS_PAST) {
      _tile_loadd(6, columns, 64);
      _tile_stream_loadd(4, rows.low, rows.stride * 2);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(7, columns + TILE, 64);
      _tile_dpbf16ps(1, 4, 7);
      _tile_stream_loadd(5, rows.high, rows.stride * 2);
    } else {
      _tile_loadd(4, rows.low, rows.stride * 2);
      _tile_stream_loadd(6, columns, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_stream_loadd(7, columns + TILE, 64);
      _tile_dpbf16ps(1, 4, 7);
      _tile_loadd(5, rows.high, rows.stride * 2);
    }
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
    work(d);
  }
}

// Asks for a line of some of 32 rows, so that all are asked for when all of `blocks` have been gone through.
template <typename Row>
void ask(int64_t block, int64_t blocks, Row row) {
  for (int64_t r = 32 * block / blocks; r < 32 * (block + 1) / blocks; ++r) _mm_prefetch(reinterpret_cast<const char*>(row(r)), _MM_HINT_T1);
}

// Rows of a stretch: as many whole blocks as `bytes` a row let be within `most`, and stretches alike.
int64_t stretch(int64_t rows, int64_t bytes, int64_t most) {
  const int64_t held = std::max<int64_t>(32, most / bytes / 32 * 32);
  return up(pieces(rows, pieces(rows, held)), 32);
}

// Adds to sums [columns / 32][ranks / 16][2][16][16] the product over 32 rows of ranks with 32 columns, both packed.
void add_outer(const bf16* ranks, int64_t count, const bf16* columns, float* sums) {
  _tile_loadd(6, columns, 64);
  _tile_loadd(7, columns + TILE, 64);
  for (int64_t r = 0; r < count; ++r, sums += 512) {
    _tile_loadd(4, ranks + r * TILE, 64);
    _tile_loadd(0, sums, 64);
    _tile_loadd(1, sums + 256, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_stored(0, sums, 64);
    _tile_stored(1, sums + 256, 64);
  }
}

// Products of 32 packed rows with packed columns of the low rank, as numbers [32, up(ranks, 32)].
void multiply_low(const bf16* rows, int64_t tiles, const bf16* packed, int64_t ranks, bf16* to) {
  alignas(64) float sums[1024];
  for (int64_t r = 0; r < ranks; r += 32) {
    multiply<false>(rows, packed + r / 32 * tiles * 2 * TILE, tiles, sums);
    store(sums, 32, 32, nullptr, to + r, up(ranks, 32), false);
  }
}

// --- adapters -----------------------------------------------------------------------------------------------------------

// The share of thread `number` of `threads` in `count` rows, in whole blocks.
std::pair<int64_t, int64_t> share(int64_t count, int64_t number, int64_t threads) {
  const int64_t blocks = pieces(count, 32);
  return {std::min(count, blocks * number / threads * 32), std::min(count, blocks * (number + 1) / threads * 32)};
}

// One of the layers that read the same rows: fp32 A [rank, I] and B [outputs, rank], and what B is scaled by.
struct Layer {
  const float *down, *up;
  int64_t outputs, rank;
  float scale;
};

// Where a thread's sums in tiles [columns / 32][ranks / 16][2][16][16] hold a rank and a column.
int64_t place_of(int64_t rank, int64_t column, int64_t ranks) {
  return ((column / 32 * pieces(ranks, 16) + rank / 16) * 2 + column / 16 % 2) * 256 + rank % 16 * 16 + column % 16;
}

// The gradient of A [ranks, inputs]: the sums of all threads.
void join_down(const float* const* sums, int64_t threads, int64_t ranks, int64_t inputs, float* to) {
  at::parallel_for(0, ranks, 4, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r)
      for (int64_t n = 0; n < inputs; n += 16) {
        __m512 found = _mm512_setzero_ps();
        for (int64_t thread = 0; thread < threads; ++thread)
          if (sums[thread]) found = _mm512_add_ps(found, _mm512_load_ps(sums[thread] + place_of(r, n, ranks)));
        _mm512_mask_storeu_ps(to + r * inputs + n, static_cast<__mmask16>(first(std::min<int64_t>(16, inputs - n))), found);
      }
  });
}

// The gradient of one layer's B [outputs, rank], which begin at these of all.
void join_up(const float* const* sums, int64_t threads, const Layer& layer, int64_t output, int64_t rank, int64_t ranks, float* to) {
  at::parallel_for(0, pieces(layer.outputs, 16), 16, [&](int64_t begin, int64_t end) {
    for (int64_t o = begin * 16; o < std::min(layer.outputs, end * 16); o += 16)
      for (int64_t r = 0; r < layer.rank; r += 16) {
        const int64_t outputs = std::min<int64_t>(16, layer.outputs - o), some = std::min<int64_t>(16, layer.rank - r);
        __m512i rows[16];
        for (int64_t k = 0; k < 16; ++k) {
          __m512 found = _mm512_setzero_ps();
          for (int64_t thread = 0; k < some && thread < threads; ++thread) {
            if (!sums[thread]) continue;
            // Outputs of other layers before may part these 16 between two tiles.
            const int64_t in_first = std::min<int64_t>(16 - (output + o) % 16, outputs);
            const float* one = sums[thread] + place_of(rank + r + k, output + o, ranks);
            __m512 held = _mm512_maskz_loadu_ps(static_cast<__mmask16>(first(in_first)), one);
            if (in_first < outputs) {
              const float* other = sums[thread] + place_of(rank + r + k, output + o + in_first, ranks);
              held = _mm512_mask_expandloadu_ps(held, static_cast<__mmask16>(first(outputs) & ~first(in_first)), other);
            }
            found = _mm512_add_ps(found, held);
          }
          rows[k] = _mm512_castps_si512(_mm512_mul_ps(found, _mm512_set1_ps(layer.scale)));
        }
        transpose16(rows);
        for (int64_t k = 0; k < outputs; ++k)
          _mm512_mask_storeu_ps(to + (o + k) * layer.rank + r, static_cast<__mmask16>(first(some)), _mm512_castsi512_ps(rows[k]));
      }
  });
}

}  // namespace
