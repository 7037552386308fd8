// Linear layers with a low-rank update for a CPU with AMX, forward and backward: y = x W^T + (x A^T) B^T + b in one pass,
// and all gradients but W's in another, so that x, dy and what is between are read from memory as few times as can be.
//
// A block of 32 rows stays in a core's first cache while packed columns of the weight stream past it from the second.
// The low rank is a piece of the depth: [x | x A^T] against [W | B], and [dy | dy B] against [W ; A].
//
// Shapes: M rows, I inputs, O outputs, R ranks; in tiles of 16 rows of 32 numbers, two of them side by side for 32 rows.

#include "amx.h"

namespace {

constexpr int64_t WIDE = 1 << 19;  // numbers of packed weights that fill about half of the second

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
  join_down(of_x.get(), threads, s.R, s.I, d_down);
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
