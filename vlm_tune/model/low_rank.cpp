// Linear layers with a low-rank update for a CPU with AMX, forward and backward: y = x W^T + (x A^T) B^T + b in one pass,
// and all gradients but W's in another, so that x, dy and what is between are read from memory as few times as can be.
//
// A block of 32 rows stays in a core's first cache while packed columns of the weight stream past it from the second.
// The low rank is a piece of the depth: [x | x A^T] against [W | B], and [dy | dy B] against [W ; A].
//
// Shapes: M rows, I inputs, O outputs, R ranks; in tiles of 16 rows of 32 numbers, two of them side by side for 32 rows.

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
constexpr int64_t WIDE = 1 << 19;  // numbers of packed weights that fill about half of the second

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

// 32 columns of the second operand whose depth are the rows of a matrix.
void pack_depth(Matrix rows, int64_t count, int64_t depth, bf16* to) {
  const __m512i low = _mm512_set_epi16(
      47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  for (int64_t d = 0; d < up(depth, 32); d += 2) {
    const __m512i even = d < depth ? loaded(rows.at(d, 0), count) : _mm512_setzero_si512();
    const __m512i odd = d + 1 < depth ? loaded(rows.at(d + 1, 0), count) : _mm512_setzero_si512();
    bf16* out = to + d / 32 * 2 * TILE + d % 32 / 2 * 32;
    _mm512_store_si512(out, _mm512_permutex2var_epi16(even, low, odd));
    _mm512_store_si512(out + TILE, _mm512_permutex2var_epi16(even, high, odd));
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

// 32 rows times 32 columns over some tiles of depth, as four tiles of sums [2][2][16][16].
template <bool ADD>
void multiply(const bf16* rows, const bf16* columns, int64_t depth, float* sums) {
  if constexpr (ADD) {
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
  _tile_stored(0, sums, 64);
  _tile_stored(1, sums + 256, 64);
  _tile_stored(2, sums + 512, 64);
  _tile_stored(3, sums + 768, 64);
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

// [rows | ranks] of 32 rows times packed columns, written to `to`; depth and low are in tiles.
void multiply_block(
    const bf16* rows, int64_t tiles, const bf16* packed, int64_t columns, int64_t count, const bf16* bias, float* sums, bf16* to, int64_t stride,
    bool add) {
  const int64_t parts = pieces(tiles, DEEP), deep = pieces(tiles, parts), blocks = pieces(columns, 32);
  for (int64_t d = 0; d < tiles; d += deep) {
    const int64_t here = std::min(deep, tiles - d);
    for (int64_t n = 0; n < blocks; ++n) {
      float* own = parts > 1 ? sums + n * 1024 : sums;
      const bf16* second = packed + (n * tiles + d) * 2 * TILE;
      if (d) multiply<true>(rows + 2 * d * TILE, second, here, own);
      else multiply<false>(rows, second, here, own);
      if (d + here == tiles) store(own, count, std::min<int64_t>(32, columns - n * 32), bias ? bias + n * 32 : nullptr, to + n * 32, stride, add);
    }
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

// The share of thread `number` of `threads` in `count` rows, in whole blocks.
std::pair<int64_t, int64_t> share(int64_t count, int64_t number, int64_t threads) {
  const int64_t blocks = pieces(count, 32);
  return {std::min(count, blocks * number / threads * 32), std::min(count, blocks * (number + 1) / threads * 32)};
}

// How many of the threads divide the rows, so that each reads as little as can be; the others divide the columns.
int64_t row_threads(int64_t rows, int64_t columns, int64_t threads) {
  int64_t best = threads;
  for (int64_t some = 1; some <= threads; ++some)
    if (threads % some == 0 && rows / some + columns / (threads / some) < rows / best + columns / (threads / best)) best = some;
  return best;
}

struct Shape {
  int64_t M, I, O, R;
};

// One of the layers that read the same rows: fp32 A [rank, I] and B [outputs, rank], and what B is scaled by.
struct Layer {
  const float *down, *up;
  int64_t outputs, rank;
  float scale;
};

// A of all layers [R, I], and s B [O, R], the outputs of each against its own ranks.
struct Adapters {
  Matrix down, up;
  Adapters(const Layer* layers, int64_t count, Shape s, Room<bf16>& room) {
    bf16 *a = room.of(s.R * s.I + s.O * s.R + 32), *b = a + s.R * s.I;
    down = {a, s.I};
    up = {b, s.R};
    for (int64_t place = 0, first_rank = 0; place < count; first_rank += layers[place++].rank) {
      const Layer& layer = layers[place];
      for (int64_t i = 0; i < layer.rank * s.I; i += 16) {
        const auto some = static_cast<__mmask16>(first(std::min<int64_t>(16, layer.rank * s.I - i)));
        _mm256_mask_storeu_epi16(a + i, some, (__m256i)_mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(some, layer.down + i)));
      }
      a += layer.rank * s.I;
      for (int64_t o = 0; o < layer.outputs; ++o, b += s.R) {
        if (layer.rank < s.R) std::fill_n(b, s.R, bf16{0});
        for (int64_t r = 0; r < layer.rank; r += 16) {
          const auto some = static_cast<__mmask16>(first(std::min<int64_t>(16, layer.rank - r)));
          const __m512 held = _mm512_maskz_loadu_ps(some, layer.up + o * layer.rank + r);
          _mm256_mask_storeu_epi16(b + first_rank + r, some, (__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(held, _mm512_set1_ps(layer.scale))));
        }
      }
    }
  }
};

void forward(Shape s, const Layer* layers, int64_t count, Matrix x, Matrix weight, const bf16* bias, bf16* y, bf16* low) {
  static thread_local Room<bf16> adapters_room;
  const Adapters adapters(layers, count, s, adapters_room);
  const Matrix down = adapters.down, up_ = adapters.up;
  const int64_t threads = at::get_num_threads(), of_rows = row_threads(s.M, s.O, threads);
  const int64_t own = pieces(s.I, 32), tiles = own + pieces(s.R, 32), R32 = up(s.R, 32);
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    static thread_local Room<bf16> rows_room, columns_room, down_room, low_room;
    static thread_local Room<float> sums_room;
    const Tiles configured;
    for (int64_t thread = begin; thread < end; ++thread) {
      const auto [from, to] = share(s.M, thread % of_rows, of_rows);
      const auto [left, right] = share(s.O, thread / of_rows, threads / of_rows);
      if (from == to || left == right) continue;
      const int64_t parts = pieces((right - left) * tiles * 32, WIDE), wide = up(pieces(right - left, parts), 32);
      bf16 *rows = rows_room.of(tiles * 2 * TILE), *packed = columns_room.of(wide * tiles * 32);
      bf16 *packed_down = down_room.of(R32 * own * 32), *block = low_room.of(32 * R32);
      float* sums = sums_room.of(wide * 32);
      for (int64_t r = 0; r < s.R; r += 32) pack_columns({down.at(r, 0), down.stride}, s.R - r, s.I, packed_down + r * own * 32);
      for (int64_t n = left; n < right; n += wide) {
        const int64_t columns = std::min(wide, right - n);
        for (int64_t j = 0; j < columns; j += 32) {
          bf16* out = packed + j * tiles * 32;
          pack_columns({weight.at(n + j, 0), weight.stride}, columns - j, s.I, out);
          pack_columns({up_.at(n + j, 0), up_.stride}, columns - j, s.R, out + own * 2 * TILE);
        }
        for (int64_t i = from; i < to; i += 32) {
          const int64_t count = std::min<int64_t>(32, to - i);
          pack_rows({x.at(i, 0), x.stride}, count, s.I, rows);
          multiply_low(rows, own, packed_down, s.R, block);
          pack_rows({block, R32}, 32, R32, rows + own * 2 * TILE);
          if (n == 0)
            for (int64_t k = 0; k < count; ++k) std::copy_n(block + k * R32, s.R, low + (i + k) * s.R);
          multiply_block(rows, tiles, packed, columns, count, bias ? bias + n : nullptr, sums, y + i * s.O + n, s.O, false);
        }
      }
    }
  });
}

// Where a thread's sums in tiles [columns / 32][ranks / 16][2][16][16] hold a rank and a column.
int64_t place_of(int64_t rank, int64_t column, int64_t ranks) {
  return ((column / 32 * pieces(ranks, 16) + rank / 16) * 2 + column / 16 % 2) * 256 + rank % 16 * 16 + column % 16;
}

// The gradient of A [R, I]: the sums of all threads.
void join_down(const float* const* sums, int64_t threads, Shape s, float* to) {
  at::parallel_for(0, s.R, 4, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r)
      for (int64_t n = 0; n < s.I; n += 16) {
        __m512 found = _mm512_setzero_ps();
        for (int64_t thread = 0; thread < threads; ++thread)
          if (sums[thread]) found = _mm512_add_ps(found, _mm512_load_ps(sums[thread] + place_of(r, n, s.R)));
        _mm512_mask_storeu_ps(to + r * s.I + n, static_cast<__mmask16>(first(std::min<int64_t>(16, s.I - n))), found);
      }
  });
}

// The gradient of one layer's B [outputs, rank], which begin at these of all.
void join_up(const float* const* sums, int64_t threads, const Layer& layer, int64_t output, int64_t rank, int64_t ranks, float* to) {
  at::parallel_for(0, layer.outputs, 256, [&](int64_t begin, int64_t end) {
    for (int64_t o = begin; o < end; ++o)
      for (int64_t r = 0; r < layer.rank; ++r) {
        const int64_t place = place_of(rank + r, output + o, ranks);
        float found = 0;
        for (int64_t thread = 0; thread < threads; ++thread)
          if (sums[thread]) found += sums[thread][place];
        to[o * layer.rank + r] = found * layer.scale;
      }
  });
}

void backward(
    Shape s, const Layer* layers, int64_t count, Matrix dy, Matrix x, Matrix low, Matrix weight, bf16* dx, bool add, float* d_down, float* d_up) {
  static thread_local Room<bf16> adapters_room;
  const Adapters adapters(layers, count, s, adapters_room);
  const Matrix down = adapters.down, up_ = adapters.up;
  const int64_t threads = at::get_num_threads();
  const int64_t own = pieces(s.O, 32), tiles = own + pieces(s.R, 32), R32 = up(s.R, 32), high = pieces(s.R, 16);
  const int64_t x_sums = pieces(s.I, 32) * high * 512, y_sums = own * high * 512;
  static thread_local Room<float> shared;
  float* all = shared.of(threads * (x_sums + y_sums));
  std::unique_ptr<const float*[]> of_x(new const float*[threads]()), of_y(new const float*[threads]());
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    static thread_local Room<bf16> rows_room, columns_room, up_room, low_room;
    static thread_local Room<float> sums_room;
    const Tiles configured;
    alignas(64) bf16 pairs[2 * TILE];
    for (int64_t thread = begin; thread < end; ++thread) {
      const auto [from, to] = share(s.M, thread, threads);
      if (from == to) continue;
      const int64_t width = dx ? s.I : 1;
      const int64_t parts = pieces(width * tiles * 32, WIDE), wide = up(pieces(width, parts), 32);
      bf16 *rows = rows_room.of(tiles * 2 * TILE), *packed = columns_room.of(wide * tiles * 32);
      bf16 *packed_up = up_room.of(R32 * own * 32), *lows = low_room.of((to - from + 31) * R32 + 2 * high * TILE);
      bf16* ranks = lows + up(to - from, 32) * R32;
      float *sums = sums_room.of(wide * 32), *d_x = all + thread * (x_sums + y_sums), *d_y = d_x + x_sums;
      std::fill_n(d_x, x_sums + y_sums, 0.f);
      of_x[thread] = d_x, of_y[thread] = d_y;
      for (int64_t r = 0; r < s.R; r += 32) pack_depth({up_.at(0, r), up_.stride}, s.R - r, s.O, packed_up + r * own * 32);
      for (int64_t n = 0; n < width; n += wide) {
        const int64_t columns = std::min(wide, s.I - n);
        for (int64_t j = 0; dx && j < columns; j += 32) {
          bf16* out = packed + j * tiles * 32;
          pack_depth({weight.at(0, n + j), weight.stride}, columns - j, s.O, out);
          pack_depth({down.at(0, n + j), down.stride}, columns - j, s.R, out + own * 2 * TILE);
        }
        for (int64_t i = from; i < to; i += 32) {
          const int64_t count = std::min<int64_t>(32, to - i);
          bf16* block = lows + (i - from) * R32;
          pack_rows({dy.at(i, 0), dy.stride}, count, s.O, rows);
          if (n == 0) {
            multiply_low(rows, own, packed_up, s.R, block);
            pack_ranks({low.at(i, 0), low.stride}, count, s.R, ranks);
            for (int64_t j = 0; j < own; ++j) {
              pack_depth({rows + j * 2 * TILE, 32}, 32, 32, pairs);
              add_outer(ranks, high, pairs, d_y + j * high * 512);
            }
            pack_ranks({block, R32}, 32, s.R, ranks);
            for (int64_t j = 0; j < s.I; j += 32) {
              pack_depth({x.at(i, j), x.stride}, s.I - j, count, pairs);
              add_outer(ranks, high, pairs, d_x + j / 32 * high * 512);
            }
          }
          if (!dx) continue;
          pack_rows({block, R32}, 32, R32, rows + own * 2 * TILE);
          multiply_block(rows, tiles, packed, columns, count, nullptr, sums, dx + i * s.I + n, s.I, add);
        }
      }
    }
  });
  join_down(of_x.get(), threads, s, d_down);
  for (int64_t place = 0, output = 0, rank = 0; place < count; ++place) {
    join_up(of_y.get(), threads, layers[place], output, rank, s.R, d_up);
    output += layers[place].outputs, rank += layers[place].rank;
    d_up += layers[place].outputs * layers[place].rank;
  }
}

Matrix matrix(const void* data, int64_t stride) { return {static_cast<const bf16*>(data), stride}; }

}  // namespace

extern "C" {

// y [M, O] and low [M, R] of x [M, I], weight [O, I], and bias [O] or null, all bf16, and the adapters of layers whose outputs
// and ranks together are O and R. `shape` is M, I, O, R, the strides of x and weight, and the number of layers.
void low_rank(const int64_t* shape, const void* layers, const void* x, const void* weight, const void* bias, void* y, void* low) {
  const Shape s{shape[0], shape[1], shape[2], shape[3]};
  forward(
      s, static_cast<const Layer*>(layers), shape[6], matrix(x, shape[4]), matrix(weight, shape[5]), static_cast<const bf16*>(bias),
      static_cast<bf16*>(y), static_cast<bf16*>(low));
}

// dx [M, I] unless null, and fp32 gradients of every A and every B, one after another, given dy [M, O], x, low [M, R] and the
// weights as above. `shape` is M, I, O, R, the strides of dy, x and weight, the number of layers, and the outputs to go back at once.
void low_rank_backward(
    const int64_t* shape, const void* layers, const void* dy, const void* x, const void* low, const void* weight, void* dx, void* d_down,
    void* d_up) {
  const auto* all = static_cast<const Layer*>(layers);
  auto *of_down = static_cast<float*>(d_down), *of_up = static_cast<float*>(d_up);
  const int64_t M = shape[0], I = shape[1], O = shape[2], R = shape[3], count = shape[7];
  const Matrix flowing = matrix(dy, shape[4]), rows = matrix(x, shape[5]), lows = matrix(low, R), weights = matrix(weight, shape[6]);
  // Where what flows back is deep, each layer's share is read as few times as can be, and its result added to the one before.
  const int64_t step = O > shape[8] ? 1 : count;
  for (int64_t place = 0, output = 0, rank = 0; place < count; place += step) {
    const Shape s{M, I, step == 1 ? all[place].outputs : O, step == 1 ? all[place].rank : R};
    backward(
        s, all + place, step, {flowing.at(0, output), flowing.stride}, rows, {lows.at(0, rank), R}, {weights.at(output, 0), weights.stride},
        static_cast<bf16*>(dx), place > 0, of_down + rank * I, of_up);
    for (int64_t done = place; done < place + step; ++done) {
      output += all[done].outputs, rank += all[done].rank;
      of_up += all[done].outputs * all[done].rank;
    }
  }
}
}
