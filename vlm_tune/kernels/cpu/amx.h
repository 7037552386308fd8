// What kernels for a CPU with AMX are made of: tiles, packed operands, products, and the gradients of adapters.
//
// A block is 32 rows or columns. A tile is 16 rows of 32 numbers; operands are pairs of tiles, one pair after another in depth.
#pragma once

#include <ATen/Parallel.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
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

// Eight tiles of 16 rows of 64 bytes.
struct alignas(64) Configuration {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// GCC takes loading of tiles for nothing that reads memory: what is written before has to be written by then.
void written() { asm volatile("" ::: "memory"); }

// The tiles, for as long as it lives.
struct Tiles {
  Tiles() {
    constexpr int ARCH_REQ_XCOMP_PERM = 0x1023, XTILEDATA = 18;
    [[maybe_unused]] static const long asked = syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XTILEDATA);
    static constexpr Configuration wanted;
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

float number(bf16 from) { return _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128(static_cast<int>(from) << 16))); }
bf16* numbers(void* data) { return static_cast<bf16*>(data); }
const bf16* numbers(const void* data) { return static_cast<const bf16*>(data); }

__m512 low_half(__m512i both) { return widened(_mm512_castsi512_si256(both)); }
__m512 high_half(__m512i both) { return widened(_mm512_extracti64x4_epi64(both, 1)); }
__m512i narrowed(__m512 low, __m512 high) { return (__m512i)_mm512_cvtne2ps_pbh(high, low); }
__m512i sum(__m512i one, __m512i other) {
  return narrowed(_mm512_add_ps(low_half(one), low_half(other)), _mm512_add_ps(high_half(one), high_half(other)));
}

// A line that is written whole past the caches need not be read first, which takes twice as long.
void write(__m512i numbers, __mmask32 some, bf16* to) {
  if (some == ~0u && reinterpret_cast<uintptr_t>(to) % 64 == 0) _mm512_stream_si512(reinterpret_cast<__m512i*>(to), numbers);
  else _mm512_mask_storeu_epi16(to, some, numbers);
}

// 16 rows of 16 pairs, transposed.
void store_transposed(__m512i* rows, bf16* to) {
  transpose16(rows);
  for (int i = 0; i < 16; ++i) _mm512_store_si512(to + i * 32, rows[i]);
}

// A matrix whose rows lie `stride` numbers apart.
struct Matrix {
  const bf16* data;
  int64_t stride;
  const bf16* at(int64_t row, int64_t column) const { return data + row * stride + column; }
};

// Asks for a line, in the first cache or the second. GCC takes `_mm_prefetch` in a loop for nothing, and leaves the loop out.
void ask_first(const bf16* line) { asm volatile("prefetcht0 %0" ::"m"(*line)); }
void ask_second(const bf16* line) { asm volatile("prefetcht1 %0" ::"m"(*line)); }

// Asks for the lines at a column of some rows.
void ask_rows(Matrix rows, int64_t row, int64_t column, int64_t count) {
  for (int64_t k = 0; k < count; ++k) ask_first(rows.at(row + k, column));
}

// Asks for a share of some rows, as they lie: what is asked for in order, the processor goes on with.
void ask_share(Matrix rows, int64_t count, int64_t width, int64_t part, int64_t parts) {
  const bf16 *from = rows.at(count * part / parts, 0), *to = rows.at(count * (part + 1) / parts, 0);
  for (; from < to; from += 32) ask_second(from);
}

// Some of the rows that are left, asked for in order, line by line.
struct Ahead {
  const bf16 *next, *end;
  Ahead(Matrix rows, int64_t left, int64_t most) : next(rows.data), end(rows.data ? rows.at(std::clamp<int64_t>(left, 0, most), 0) : nullptr) {}
  void ask() {
    if (next < end) ask_second(next), next += 32;
  }
};

// --- norms -------------------------------------------------------------------------------------------------------------

// A norm by the root mean square, or none where it has no weight [width]; `roots` [M] are the inverted ones of rows, or take them.
struct Norm {
  const bf16* weight;
  float epsilon;
  float* roots;
  Norm from(int64_t row) const { return {weight, epsilon, weight ? roots + row : nullptr}; }
};

float inverse_root(const bf16* row, int64_t width, float epsilon) {
  __m512 low = _mm512_setzero_ps(), high = low;
  for (int64_t d = 0; d < width; d += 32) {
    const __m512i both = loaded(row + d, width - d);
    low = _mm512_fmadd_ps(low_half(both), low_half(both), low);
    high = _mm512_fmadd_ps(high_half(both), high_half(both), high);
  }
  return 1 / std::sqrt(_mm512_reduce_add_ps(_mm512_add_ps(low, high)) / static_cast<float>(width) + epsilon);
}

// 32 numbers of a row, normed.
__m512i normed(__m512i row, __m512i weight, __m512 root) {
  return narrowed(
      _mm512_mul_ps(_mm512_mul_ps(low_half(row), root), low_half(weight)), _mm512_mul_ps(_mm512_mul_ps(high_half(row), root), high_half(weight)));
}

// `count` rows as they are read: themselves, or normed in `room` [32, width], their roots noted.
Matrix as_read(Matrix rows, int64_t count, int64_t width, Norm norm, bf16* room) {
  if (!norm.weight) return rows;
  for (int64_t i = 0; i < std::min<int64_t>(32, count); ++i) {
    norm.roots[i] = inverse_root(rows.at(i, 0), width, norm.epsilon);
    const __m512 root = _mm512_set1_ps(norm.roots[i]);
    for (int64_t d = 0; d < width; d += 32)
      _mm512_mask_storeu_epi16(room + i * width + d, first(width - d), normed(loaded(rows.at(i, d), width - d), loaded(norm.weight + d, width - d), root));
  }
  return {room, width};
}

// What flows back through a norm to each of some rows, given what flows back to the normed ones, upon `extra`.
void flow_through_norm(Matrix flow, Matrix rows, Matrix extra, int64_t count, int64_t width, Norm norm, bf16* to, int64_t stride) {
  for (int64_t i = 0; i < count; ++i) {
    const float root = norm.roots[i];
    __m512 low = _mm512_setzero_ps(), high = low;
    for (int64_t d = 0; d < width; d += 32) {
      const __m512i f = loaded(flow.at(i, d), width - d), x = loaded(rows.at(i, d), width - d), w = loaded(norm.weight + d, width - d);
      low = _mm512_fmadd_ps(_mm512_mul_ps(low_half(f), low_half(w)), low_half(x), low);
      high = _mm512_fmadd_ps(_mm512_mul_ps(high_half(f), high_half(w)), high_half(x), high);
    }
    const float along = _mm512_reduce_add_ps(_mm512_add_ps(low, high)) * root * root * root / static_cast<float>(width);
    const __m512 by = _mm512_set1_ps(root), less = _mm512_set1_ps(along);
    for (int64_t d = 0; d < width; d += 32) {
      const __m512i f = loaded(flow.at(i, d), width - d), x = loaded(rows.at(i, d), width - d), w = loaded(norm.weight + d, width - d);
      const __m512i e = loaded(extra.at(i, d), width - d);
      const __m512 first_half = _mm512_fmadd_ps(_mm512_mul_ps(low_half(f), low_half(w)), by, _mm512_fnmadd_ps(low_half(x), less, low_half(e)));
      const __m512 second_half = _mm512_fmadd_ps(_mm512_mul_ps(high_half(f), high_half(w)), by, _mm512_fnmadd_ps(high_half(x), less, high_half(e)));
      write(narrowed(first_half, second_half), first(width - d), to + i * stride + d);
    }
  }
}

// --- operands --------------------------------------------------------------------------------------------------------

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

// 32 columns of the second operand whose depth are the rows that `row` gives.
template <typename Row>
void pack_depth_of(int64_t depth, bf16* to, Row row) {
  const auto some = [&](int64_t d) { return d < depth ? row(d) : _mm512_setzero_si512(); };
  for (int64_t d = 0; d < up(depth, 32); d += 2) store_pairs(some(d), some(d + 1), to + d / 32 * 2 * TILE + d % 32 / 2 * 32);
}

// Those whose depth are the rows of a matrix.
void pack_depth(Matrix rows, int64_t count, int64_t depth, bf16* to) {
  pack_depth_of(depth, to, [&](int64_t d) { return loaded(rows.at(d, 0), count); });
}

// Those from a column on whose depth are rows as they are read.
void pack_read_depth(Matrix rows, int64_t count, int64_t depth, Norm norm, int64_t column, bf16* to) {
  const Matrix here{rows.at(0, column), rows.stride};
  if (!norm.weight) return pack_depth(here, count, depth, to);
  const __m512i by = loaded(norm.weight + column, count);
  pack_depth_of(depth, to, [&](int64_t d) { return normed(loaded(here.at(d, 0), count), by, _mm512_set1_ps(norm.roots[d])); });
}

// 32 rows of some columns as first operand of a product over the rows, transposed: a tile for every 16 columns.
void pack_across(Matrix rows, int64_t count, int64_t columns, bf16* to) {
  alignas(64) bf16 pairs[2 * TILE];
  for (int64_t n = 0; n < columns; n += 32) {
    pack_depth({rows.at(0, n), rows.stride}, columns - n, count, pairs);
    for (int64_t half = 0; half < 2 && n + half * 16 < columns; ++half) {
      __m512i held[16];
      for (int i = 0; i < 16; ++i) held[i] = _mm512_load_si512(pairs + half * TILE + i * 32);
      store_transposed(held, to + (n / 16 + half) * TILE);
    }
  }
}

// --- products --------------------------------------------------------------------------------------------------------

// Four tiles of sums [2][2][16][16] of 32 x 32 begin: at those, or at nothing.
void begin_sums(const float* sums) {
  written();
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

// The even or the odd ones of pairs.
__m512 of_pair(__m512i pairs, bool odd) {
  return _mm512_castsi512_ps(odd ? _mm512_and_si512(pairs, _mm512_set1_epi32(-65536)) : _mm512_slli_epi32(pairs, 16));
}

// One of the rows of 32 x 32 sums.
__m512i row_of(const float* sums, int64_t row) {
  const float* from = sums + row / 16 * 512 + row % 16 * 16;
  return narrowed(_mm512_load_ps(from), _mm512_load_ps(from + 256));
}

// Sums of 32 x 32 as numbers of some columns, written past the caches, or to stay there, with `add` upon what is there.
template <bool PAST>
void store(const float* sums, int64_t rows, int64_t columns, bf16* to, int64_t stride, bool add = false) {
  const __mmask32 some = first(columns);
  for (int64_t i = 0; i < rows; ++i) {
    const __m512i found = row_of(sums, i);
    bf16* out = to + i * stride;
    if (PAST && !add) write(found, some, out);
    else _mm512_mask_storeu_epi16(out, some, add ? sum(found, _mm512_maskz_loadu_epi16(some, out)) : found);
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

// 32 x 32 transposed sums that are to be written as rows of some columns, upon others if there are any: half by half, beside the
// next product, for the unit for tiles has a port of its own.
struct Across {
  const float* sums = nullptr;
  int64_t count = 0, columns = 0;
  bf16* to = nullptr;
  int64_t stride = 0;
  Matrix upon = {};
  int64_t half = 2;
  bool past = true;  // the caches

  void write_half() {
    const __mmask32 some = first(columns);
    __m512i pairs[16];
    for (int64_t p = 0; p < 16; ++p) pairs[p] = pair_of(sums, p, half);
    transpose16(pairs);
    bf16* out = to + half * 16 * stride;
    for (int64_t i = 0; i < std::min<int64_t>(16, count - half * 16); ++i, out += stride) {
      if (upon.data) pairs[i] = sum(pairs[i], loaded(upon.at(half * 16 + i, 0), columns));
      if (past) write(pairs[i], some, out);
      else _mm512_mask_storeu_epi16(out, some, pairs[i]);
    }
    ++half;
  }
  void beside(int64_t depth) {
    if (half < 2 && depth % 8 == 1) write_half();
  }
  void rest() {
    while (half < 2) write_half();
  }
};

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
  for (int64_t r = 32 * block / blocks; r < 32 * (block + 1) / blocks; ++r) ask_second(row(r));
}

// x A^T of every block, put behind its columns as depth; `also` is told the first rank, the block and its sums [ranks][rows].
template <typename Also>
void append_low(Matrix down, int64_t own, int64_t ranks, bf16* columns, int64_t apart, int64_t blocks, Also also) {
  alignas(64) float sums[1024];
  for (int64_t r = 0; r < ranks; r += 32)
    for (int64_t b = 0; b < blocks; ++b) {
      begin_sums(nullptr);
      add_product<false>(as_they_lie({down.at(r, 0), down.stride}), columns + b * apart, own, [](int64_t) {});
      end_sums(sums);
      bf16* to = columns + b * apart + 2 * (own + r / 32) * TILE;
      for (int64_t half = 0; half < 2; ++half)
        for (int64_t p = 0; p < 16; ++p) _mm512_store_si512(to + half * TILE + p * 32, pair_of(sums, p, half));
      also(r, b, sums);
    }
}

// The same, written [M, ranks] if wanted.
void append_low(Matrix down, int64_t own, int64_t ranks, bf16* columns, int64_t apart, int64_t blocks, int64_t rows, bf16* kept) {
  append_low(down, own, ranks, columns, apart, blocks, [&](int64_t r, int64_t b, const float* sums) {
    for (int64_t half = 0; kept && half < 2; ++half) {
      __m512i pairs[16];
      for (int64_t p = 0; p < 16; ++p) pairs[p] = pair_of(sums, p, half);
      transpose16(pairs);
      for (int64_t i = 0, row = b * 32 + half * 16; i < 16 && row < rows; ++i, ++row)
        _mm512_mask_storeu_epi16(kept + row * ranks + r, first(ranks - r), pairs[i]);
    }
  });
}

// Rows of a stretch: as many whole blocks as `bytes` a row let be within `most`, and stretches alike.
int64_t stretch(int64_t rows, int64_t bytes, int64_t most) {
  const int64_t held = std::max<int64_t>(32, most / bytes / 32 * 32);
  return up(pieces(rows, pieces(rows, held)), 32);
}

// Adds to sums [ranks / 16][2][16][16] the product over all blocks' rows of ranks with 32 columns, both packed: ranks by columns, or
// where these are the first operand columns by ranks.
template <bool COLUMNS_FIRST = false>
void add_outers(const bf16* ranks, int64_t count, int64_t apart, const bf16* columns, int64_t blocks, float* sums) {
  written();
  for (int64_t r = 0; r < count; ++r, sums += 512) {
    _tile_loadd(0, sums, 64);
    _tile_loadd(1, sums + 256, 64);
    for (int64_t b = 0; b < blocks; ++b) {
      _tile_loadd(4, ranks + b * apart + r * TILE, 64);
      _tile_loadd(6, columns + b * 2 * TILE, 64);
      _tile_loadd(7, columns + b * 2 * TILE + TILE, 64);
      if constexpr (COLUMNS_FIRST) {
        _tile_dpbf16ps(0, 6, 4);
        _tile_dpbf16ps(1, 7, 4);
      } else {
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
      }
    }
    _tile_stored(0, sums, 64);
    _tile_stored(1, sums + 256, 64);
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

// fp32 numbers [rows, columns] as bf16, scaled.
void narrow(const float* from, int64_t rows, int64_t columns, float scale, bf16* to, int64_t stride) {
  const __m512 by = _mm512_set1_ps(scale);
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t n = 0; n < columns; n += 16) {
      const auto some = static_cast<__mmask16>(first(std::min<int64_t>(16, columns - n)));
      const __m512 held = _mm512_mul_ps(_mm512_maskz_loadu_ps(some, from + i * columns + n), by);
      _mm256_mask_storeu_epi16(to + i * stride + n, some, (__m256i)_mm512_cvtneps_pbh(held));
    }
}

// The same, transposed.
void narrow_across(const float* from, int64_t rows, int64_t columns, float scale, bf16* to, int64_t stride) {
  const __m512 by = _mm512_set1_ps(scale);
  for (int64_t i = 0; i < rows; i += 16)
    for (int64_t n = 0; n < columns; n += 16) {
      const auto some = static_cast<__mmask16>(first(std::min<int64_t>(16, columns - n)));
      const auto high = static_cast<__mmask16>(first(std::min<int64_t>(16, rows - i)));
      __m512i held[16];
      for (int64_t k = 0; k < 16; ++k)
        held[k] = i + k < rows ? _mm512_castps_si512(_mm512_mul_ps(_mm512_maskz_loadu_ps(some, from + (i + k) * columns + n), by)) : _mm512_setzero_si512();
      transpose16(held);
      for (int64_t k = 0; k < std::min<int64_t>(16, columns - n); ++k)
        _mm256_mask_storeu_epi16(to + (n + k) * stride + i, high, (__m256i)_mm512_cvtneps_pbh(_mm512_castsi512_ps(held[k])));
    }
}

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

// The gradient of A [ranks, columns] or `of_up` of B [columns, ranks] of sums [columns / 32][ranks / 16][2][16 columns][16 ranks].
void join_across(const float* const* sums, int64_t threads, int64_t ranks, int64_t columns, float scale, float* to, bool of_up) {
  at::parallel_for(0, pieces(columns, 16), 16, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin * 16; n < std::min(columns, end * 16); n += 16)
      for (int64_t r = 0; r < ranks; r += 16) {
        const int64_t place = ((n / 32 * pieces(ranks, 16) + r / 16) * 2 + n / 16 % 2) * 256;
        const int64_t here = std::min<int64_t>(16, columns - n), some = std::min<int64_t>(16, ranks - r);
        __m512i rows[16];
        for (int64_t k = 0; k < 16; ++k) {
          __m512 found = _mm512_setzero_ps();
          for (int64_t thread = 0; thread < threads; ++thread)
            if (sums[thread]) found = _mm512_add_ps(found, _mm512_load_ps(sums[thread] + place + k * 16));
          rows[k] = _mm512_castps_si512(_mm512_mul_ps(found, _mm512_set1_ps(scale)));
        }
        if (!of_up) transpose16(rows);
        for (int64_t k = 0; k < (of_up ? here : some); ++k) {
          float* out = of_up ? to + (n + k) * ranks + r : to + (r + k) * columns + n;
          _mm512_mask_storeu_ps(out, static_cast<__mmask16>(first(of_up ? some : here)), _mm512_castsi512_ps(rows[k]));
        }
      }
  });
}

}  // namespace
