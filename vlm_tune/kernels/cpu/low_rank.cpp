// Linear layers with a low-rank update for a CPU with AMX, forward and backward: y = x W^T + (x A^T) B^T + b in one pass,
// and all gradients but W's in another, so that x, dy and what is between are read from memory as few times as can be.
// x may be normed as it is read, and y come upon a residual.
//
// A stretch of rows stays in a core's second cache while 32 rows of the weight, or 32 columns, in the first, go over all of it.
// The low rank is a piece of the depth: [x | x A^T] against [W | B], and [dy | dy B] against [W ; A].
//
// Shapes: M rows, I inputs, O outputs, R ranks; in tiles of 16 rows of 32 numbers, two of them side by side for 32 rows.

#include "amx.h"

namespace {

constexpr int64_t STRETCH = 1150 << 10;  // bytes of the second cache that a stretch of rows may fill

struct Shape {
  int64_t M, I, O, R;
};

// A of all layers [R32, I32] and scaled B [O32, R32], the outputs of each against its own ranks; zeros up to whole blocks.
struct Adapters {
  Matrix down, up_;

  Adapters(const Layer* layers, int64_t count, Shape s, Room<bf16>& room) {
    const int64_t R32 = up(s.R, 32), I32 = up(s.I, 32), O32 = up(s.O, 32);
    bf16 *a = room.of(R32 * I32 + O32 * R32), *b = a + R32 * I32;
    down = {a, I32};
    up_ = {b, R32};
    std::fill_n(a, R32 * I32 + O32 * R32, bf16{0});
    for (int64_t place = 0, rank = 0; place < count; rank += layers[place++].rank) {
      const Layer& layer = layers[place];
      narrow(layer.down, layer.rank, s.I, 1, a + rank * I32, I32);
      narrow(layer.up, layer.outputs, layer.rank, layer.scale, b + rank, R32);
      b += layer.outputs * R32;
    }
  }
};

void forward(Shape s, const Layer* layers, int64_t count, Matrix x, Norm norm, Matrix weight, const bf16* bias, Matrix residual, bf16* y, bf16* low) {
  static thread_local Room<bf16> adapters_room;
  const Adapters a(layers, count, s, adapters_room);
  const int64_t threads = at::get_num_threads(), own = pieces(s.I, 32), low_tiles = pieces(s.R, 32), apart = (own + low_tiles) * 2 * TILE;
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    static thread_local Room<bf16> x_room, rows_room, normed_room;
    static thread_local Room<float> sums_room;
    const Tiles configured;
    for (int64_t thread = begin; thread < end; ++thread) {
      const auto [from, to] = share(s.M, thread, threads);
      if (from == to) continue;
      const int64_t step = stretch(to - from, apart / 16 + 128, STRETCH), deep = pieces(own, pieces(own, DEEP));
      bf16 *columns = x_room.of(step / 32 * apart), *scratch = normed_room.of(32 * s.I);
      float *sums = sums_room.of(step * 32 + 2048), *biases = sums + step * 32 + 1024;
      for (int64_t i = from; i < to; i += step) {
        const int64_t rows = std::min(step, to - i), blocks = pieces(rows, 32);
        for (int64_t b = 0; b < blocks; ++b) {
          const Matrix here{x.at(i + b * 32, 0), x.stride};
          pack_columns(as_read(here, rows - b * 32, s.I, norm.from(i + b * 32), scratch), rows - b * 32, s.I, columns + b * apart);
        }
        append_low(a.down, own, s.R, columns, apart, blocks, rows, low + i * s.R);
        Ahead of_next({x.at(i + rows, 0), x.stride}, to - i - rows, step);
        Across before;
        for (int64_t n = 0; n < s.O; n += 32) {
          const int64_t some = std::min<int64_t>(32, s.O - n);
          // What is not whole blocks is copied, with zeros after it.
          const bool whole = some == 32 && s.I % 32 == 0;
          if (!whole) pack_rows({weight.at(n, 0), weight.stride}, some, s.I, rows_room.of(own * 2 * TILE));
          const Rows all = whole ? as_they_lie({weight.at(n, 0), weight.stride}) : packed(rows_room.of(own * 2 * TILE));
          for (int64_t o = 0; bias && o < 64; ++o)
            std::fill_n(biases + o / 32 * 512 + o % 32 * 16, 16, o / 32 * 16 + o % 16 < some ? number(bias[n + o / 32 * 16 + o % 16]) : 0.f);
          for (int64_t d = 0; d < own; d += deep) {
            const int64_t here = std::min(deep, own - d);
            const bool last = d + here == own;
            const Rows part{all.low + d * all.deeper, all.high + d * all.deeper, all.stride, all.deeper};
            const Matrix next{last ? weight.at(std::min(n + 32, s.O - some), 0) : weight.at(n, (d + here) * 32), weight.stride};
            for (int64_t b = 0; b < blocks; ++b) {
              float* own_sums = sums + (deep < own ? b : b % 2) * 1024;
              const bf16* own_columns = columns + b * apart;
              begin_sums(d ? own_sums : bias ? biases : nullptr);
              add_product<false>(part, own_columns + d * 2 * TILE, here, [&](int64_t k) {
                if (whole) ask(b, blocks, [&](int64_t r) { return next.at(r, k * 32); });
                of_next.ask();
                if (residual.data && last && k < 16) ask_rows(residual, i + b * 32 + 2 * k, n, 2);
                before.beside(k);
              });
              before.rest();
              if (last) add_product<false>(as_they_lie({a.up_.at(n, 0), a.up_.stride}), own_columns + 2 * own * TILE, low_tiles, [](int64_t) {});
              end_sums(own_sums);
              if (!last) continue;
              const Matrix upon = residual.data ? Matrix{residual.at(i + b * 32, n), residual.stride} : Matrix{};
              before = {own_sums, rows - b * 32, some, y + (i + b * 32) * s.O + n, s.O, upon, 0};
            }
          }
        }
        before.rest();
      }
    }
  });
}

// [W ; A] as packed columns [I / 32][O / 32 + R / 32], made by all threads.
const bf16* pack_weights(Shape s, Matrix weight, Matrix down, Room<bf16>& room) {
  const int64_t own = pieces(s.O, 32), deep = own + pieces(s.R, 32), across = pieces(s.I, 32);
  bf16* to = room.of(across * deep * 2 * TILE);
  at::parallel_for(0, deep, 1, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      const Matrix rows = k < own ? Matrix{weight.at(k * 32, 0), weight.stride} : Matrix{down.at((k - own) * 32, 0), down.stride};
      const int64_t depth = k < own ? s.O - k * 32 : 32;
      for (int64_t n = 0; n < across; ++n) pack_depth({rows.at(0, n * 32), rows.stride}, s.I - n * 32, std::min<int64_t>(32, depth), to + (n * deep + k) * 2 * TILE);
    }
  });
  return to;
}

void backward(
    Shape s, const Layer* layers, int64_t count, Matrix dy, Matrix x, Norm norm, Matrix extra, Matrix low, Matrix weight, bf16* dx, bool add,
    float* d_down, float* d_up) {
  static thread_local Room<bf16> adapters_room, weights_room;
  static thread_local Room<float> shared;
  const Adapters a(layers, count, s, adapters_room);
  const bf16* panels = dx ? pack_weights(s, weight, a.down, weights_room) : nullptr;
  const int64_t threads = at::get_num_threads(), across = pieces(s.I, 32), own = pieces(s.O, 32), low_tiles = pieces(s.R, 32), high = pieces(s.R, 16);
  const int64_t all_deep = own + low_tiles, apart = all_deep * 2 * TILE, x_sums = across * high * 512, y_sums = own * high * 512;
  float* all = shared.of(threads * (x_sums + y_sums));
  std::unique_ptr<const float*[]> sums_of_x(new const float*[threads]()), sums_of_y(new const float*[threads]());
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    static thread_local Room<bf16> dy_room, up_room, ranks_room, pairs_room, flow_room;
    static thread_local Room<float> sums_room;
    const Tiles configured;
    alignas(64) bf16 block[32 * 32];
    for (int64_t thread = begin; thread < end; ++thread) {
      const auto [from, to] = share(s.M, thread, threads);
      if (from == to) continue;
      const int64_t step = stretch(to - from, apart / 16 + 128 + (norm.weight ? 2 * s.I : 0), STRETCH), most = step / 32, ranks_apart = (2 * high + 2) * TILE;
      bf16 *rows_of = dy_room.of(most * apart), *packed_up = up_room.of(low_tiles * own * 2 * TILE), *ranks = ranks_room.of(most * ranks_apart);
      bf16 *pairs = pairs_room.of(most * 2 * TILE), *flow = flow_room.of(norm.weight ? step * s.I : 1);
      float *sums = sums_room.of(step * 32), *d_x = all + thread * (x_sums + y_sums), *d_y = d_x + x_sums;
      std::fill_n(d_x, x_sums + y_sums, 0.f);
      sums_of_x[thread] = d_x, sums_of_y[thread] = d_y;
      for (int64_t r = 0; r < s.R; r += 32) pack_depth({a.up_.at(0, r), a.up_.stride}, 32, s.O, packed_up + r * own * 32);
      for (int64_t i = from; i < to; i += step) {
        const int64_t rows = std::min(step, to - i), blocks = pieces(rows, 32);
        const auto left = [&](int64_t b) { return std::min<int64_t>(32, rows - b * 32); };
        for (int64_t b = 0; b < blocks; ++b) {
          pack_rows({dy.at(i + b * 32, 0), dy.stride}, left(b), s.O, rows_of + b * apart);
          pack_across({low.at(i + b * 32, 0), low.stride}, left(b), s.R, ranks + b * ranks_apart);
        }
        for (int64_t r = 0; r < s.R; r += 32)
          for (int64_t b = 0; b < blocks; ++b) {
            begin_sums(nullptr);
            add_product<true>(packed(rows_of + b * apart), packed_up + r * own * 32, own, [](int64_t) {});
            end_sums(sums);
            store<false>(sums, 32, 32, block, 32);
            pack_rows({block, 32}, 32, 32, rows_of + b * apart + (own + r / 32) * 2 * TILE);
            pack_across({block, 32}, 32, std::min<int64_t>(32, s.R - r), ranks + b * ranks_apart + (high + r / 16) * TILE);
          }
        for (int64_t n = 0; n < own; ++n) {
          for (int64_t b = 0; b < blocks; ++b) pack_depth({rows_of + b * apart + n * 2 * TILE, 32}, 32, 32, pairs + b * 2 * TILE);
          add_outers(ranks, high, ranks_apart, pairs, blocks, d_y + n * high * 512);
        }
        const int64_t deep = pieces(all_deep, pieces(all_deep, DEEP));
        Ahead of_x({x.at(i, 0), x.stride}, rows, step), of_extra({extra.at(i, 0), extra.stride}, norm.weight ? rows : 0, step);
        Ahead of_next({dy.at(i + rows, 0), dy.stride}, to - i - rows, step);
        for (int64_t n = 0; dx && n < across; ++n)
          for (int64_t d = 0; d < all_deep; d += deep) {
            const int64_t here = std::min(deep, all_deep - d), some = std::min<int64_t>(32, s.I - n * 32);
            const bf16 *panel = panels + (n * all_deep + d) * 2 * TILE, *next = panel + here * 2 * TILE;
            for (int64_t b = 0; b < blocks; ++b) {
              float* own_sums = sums + b * 1024;
              begin_sums(d ? own_sums : nullptr);
              add_product<true>(packed(rows_of + b * apart + d * 2 * TILE), panel, here, [&](int64_t k) {
                ask(b, blocks, [&](int64_t r) { return next + (k * 32 + r) * 32; });
                of_x.ask(), of_extra.ask(), of_next.ask();
              });
              end_sums(own_sums);
              if (d + here < all_deep) continue;
              if (norm.weight) store<false>(own_sums, left(b), some, flow + b * 32 * s.I + n * 32, s.I);
              else store<true>(own_sums, left(b), some, dx + (i + b * 32) * s.I + n * 32, s.I, add);
            }
          }
        for (int64_t n = 0; n < across; ++n) {
          for (int64_t b = 0; b < blocks; ++b)
            pack_read_depth({x.at(i + b * 32, 0), x.stride}, s.I - n * 32, left(b), norm.from(i + b * 32), n * 32, pairs + b * 2 * TILE);
          add_outers(ranks + high * TILE, high, ranks_apart, pairs, blocks, d_x + n * high * 512);
        }
        if (dx && norm.weight) flow_through_norm({flow, s.I}, {x.at(i, 0), x.stride}, {extra.at(i, 0), extra.stride}, rows, s.I, norm.from(i), dx + i * s.I, s.I);
      }
    }
  });
  join_down(sums_of_x.get(), threads, s.R, s.I, d_down);
  for (int64_t place = 0, output = 0, rank = 0; place < count; ++place) {
    join_up(sums_of_y.get(), threads, layers[place], output, rank, s.R, d_up);
    output += layers[place].outputs, rank += layers[place].rank;
    d_up += layers[place].outputs * layers[place].rank;
  }
}

}  // namespace

extern "C" {

// y [M, O] and low [M, R] = x A^T of x [M, I], the weights of all layers [O, I], a bias [O] or null, all bf16; and fp32 adapters.
// Unless null, x is normed by a weight [I] first, the inverted roots of its rows put into fp32 `roots` [M], and y comes upon `residual` [M, O]. `shape` is M, I, O, R, the strides of x and
// weight, and the number of layers.
void low_rank(
    const int64_t* shape, const void* layers, const void* x, const void* norm, float epsilon, void* roots, const void* weight,
    const void* bias, const void* residual, void* y, void* low) {
  const Shape s{shape[0], shape[1], shape[2], shape[3]};
  forward(
      s, static_cast<const Layer*>(layers), shape[6], {numbers(x), shape[4]}, {numbers(norm), epsilon, static_cast<float*>(roots)}, {numbers(weight), shape[5]}, numbers(bias),
      {numbers(residual), s.O}, numbers(y), numbers(low));
}

// dx [M, I] unless null, and fp32 gradients of every A and every B, one after another, given dy [M, O], x, low [M, R] and the
// weights as above. Where x is normed, what flows back to it comes upon `extra` [M, I]. `shape` is M, I, O, R, the strides of dy, x
// and weight, the number of layers, and the outputs to go back at once.
void low_rank_backward(
    const int64_t* shape, const void* layers, const void* dy, const void* x, const void* norm, void* roots, const void* extra,
    const void* low, const void* weight, void* dx, void* d_down, void* d_up) {
  const auto* all = static_cast<const Layer*>(layers);
  auto *of_down = static_cast<float*>(d_down), *of_up = static_cast<float*>(d_up);
  const int64_t M = shape[0], I = shape[1], O = shape[2], R = shape[3], count = shape[7];
  const Matrix flowing{numbers(dy), shape[4]}, rows{numbers(x), shape[5]}, lows{numbers(low), R}, weights{numbers(weight), shape[6]};
  // Where what flows back is deep, each layer's share is read as few times as can be, and its result added to the one before.
  const int64_t step = O > shape[8] && !norm ? 1 : count;
  for (int64_t place = 0, output = 0, rank = 0; place < count; place += step) {
    const Shape s{M, I, step == 1 ? all[place].outputs : O, step == 1 ? all[place].rank : R};
    backward(
        s, all + place, step, {flowing.at(0, output), flowing.stride}, rows, {numbers(norm), 0, static_cast<float*>(roots)}, {numbers(extra), I},
        {lows.at(0, rank), R}, {weights.at(output, 0), weights.stride}, numbers(dx), place > 0, of_down + rank * I, of_up);
    for (int64_t done = place; done < place + step; ++done) {
      output += all[done].outputs, rank += all[done].rank;
      of_up += all[done].outputs * all[done].rank;
    }
  }
}
}
