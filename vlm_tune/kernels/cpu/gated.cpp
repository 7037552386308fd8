// The gated feed-forward part of a transformer's block for a CPU with AMX, forward and backward:
// y = (f(x Wg^T) * x Wu^T) Wd^T, each product with a low-rank update or without, in one pass, and all gradients but the weights'
// in another. What is between lies in a core's second cache.
//
// A stretch of rows stays in the second cache while 32 rows of a weight at a time, in the first, go over all of it. Both passes
// compute what they compute transposed: weights are first operands, as they lie or in the backward pass transposed, and h and what
// flows back to it are second operands of the next product as they come.
//
// Shapes: M rows, H inputs and outputs, F numbers between; R ranks of gate and up together, D of down. H and F are whole in 32.

#include "amx.h"

namespace {

constexpr int64_t FORWARD = 1150 << 10;  // bytes of the second cache that a stretch of rows may fill
constexpr int64_t BACKWARD = 1150 << 10;

struct Shape {
  int64_t M, H, F, activation;
};

struct Weights {
  Matrix gate, up, down;
};

// --- adapters --------------------------------------------------------------------------------------------------------

// The numbers that all layers' A and scaled B are in bf16, with rows and columns of zeros up to whole blocks of ranks.
struct Adapters {
  int64_t R, D, R32, D32;
  bf16* next;
  Matrix down_in, down_mid;  // [R32, H], [D32, F]

  Adapters(const Layer* layers, Shape s, Room<bf16>& room) {
    R = layers[0].rank + layers[1].rank, D = layers[2].rank, R32 = up(R, 32), D32 = up(D, 32);
    next = room.of(R32 * s.H + 2 * s.F * R32 + D32 * s.F + s.H * D32 + 64);
    bf16 *a = take(R32, s.H), *m = take(D32, s.F);
    down_in = {a, s.H}, down_mid = {m, s.F};
    narrow(layers[0].down, layers[0].rank, s.H, 1, a, s.H);
    narrow(layers[1].down, layers[1].rank, s.H, 1, a + layers[0].rank * s.H, s.H);
    narrow(layers[2].down, D, s.F, 1, m, s.F);
  }
  bf16* take(int64_t rows, int64_t columns) {
    bf16* here = next;
    next += rows * columns;
    std::fill_n(here, rows * columns, bf16{0});
    return here;
  }
};

struct ForwardAdapters : Adapters {
  Matrix up_gate, up_up, up_down;  // [F, R32] against own ranks, the same, [H, D32]

  ForwardAdapters(const Layer* layers, Shape s, Room<bf16>& room) : Adapters(layers, s, room) {
    bf16 *g = take(s.F, R32), *u = take(s.F, R32), *d = take(s.H, D32);
    up_gate = {g, R32}, up_up = {u, R32}, up_down = {d, D32};
    narrow(layers[0].up, s.F, layers[0].rank, layers[0].scale, g, R32);
    narrow(layers[1].up, s.F, layers[1].rank, layers[1].scale, u + layers[0].rank, R32);
    narrow(layers[2].up, s.H, D, layers[2].scale, d, D32);
  }
};

struct BackwardAdapters : Adapters {
  Matrix up_both, up_down;  // transposed: [R32, 2F] against own ranks, [D32, H]

  BackwardAdapters(const Layer* layers, Shape s, Room<bf16>& room) : Adapters(layers, s, room) {
    bf16 *g = take(R32, 2 * s.F), *d = take(D32, s.H);
    up_both = {g, 2 * s.F}, up_down = {d, s.H};
    narrow_across(layers[0].up, s.F, layers[0].rank, layers[0].scale, g, 2 * s.F);
    narrow_across(layers[1].up, s.F, layers[1].rank, layers[1].scale, g + layers[0].rank * 2 * s.F + s.F, 2 * s.F);
    narrow_across(layers[2].up, s.H, D, layers[2].scale, d, s.H);
  }
};

// --- activation ------------------------------------------------------------------------------------------------------

// 1 / (1 + e^-x), 1e-4 of itself off at most, a twentieth of what bf16 rounds by.
__m512 sigmoid(__m512 x) {
  const __m512 scaled = _mm512_min_ps(_mm512_mul_ps(x, _mm512_set1_ps(-1.44269504f)), _mm512_set1_ps(126));
  const __m512 whole = _mm512_roundscale_ps(scaled, 8), r = _mm512_sub_ps(scaled, whole);
  __m512 found = _mm512_set1_ps(9.61812e-3f);
  found = _mm512_fmadd_ps(found, r, _mm512_set1_ps(5.55041e-2f));
  found = _mm512_fmadd_ps(found, r, _mm512_set1_ps(2.40226507e-1f));
  found = _mm512_fmadd_ps(found, r, _mm512_set1_ps(6.93147182e-1f));
  found = _mm512_fmadd_ps(found, r, _mm512_set1_ps(1));
  return _mm512_rcp14_ps(_mm512_add_ps(_mm512_set1_ps(1), _mm512_scalef_ps(found, whole)));
}

// f(g) = g sigmoid(z(g)): SiLU, where z is g, and GELU by tanh, where z is 2k (g + c g^3).
template <bool GELU>
__m512 inner(__m512 g) {
  if constexpr (!GELU) return g;
  return _mm512_mul_ps(g, _mm512_fmadd_ps(_mm512_mul_ps(g, g), _mm512_set1_ps(1.5957691216f * 0.044715f), _mm512_set1_ps(1.5957691216f)));
}

template <bool GELU>
__m512 inner_slope(__m512 g) {
  if constexpr (!GELU) return _mm512_set1_ps(1);
  return _mm512_fmadd_ps(_mm512_mul_ps(g, g), _mm512_set1_ps(3 * 1.5957691216f * 0.044715f), _mm512_set1_ps(1.5957691216f));
}

// --- forward ---------------------------------------------------------------------------------------------------------

// Outputs of gate and up of 32 rows by 16 columns: pairs of columns, [gate, up][rows / 16][8][16 rows][2].
constexpr int64_t BOTH = 2 * TILE;

struct Kept {
  bf16 *both, *low, *low_down;  // [M / 32][F / 16][BOTH], [M, R], [M, D], or null
};

// A piece of 16 of what is done with 16 columns of gate and up over 32 rows.
template <bool GELU>
void gate_piece(int64_t piece, const float* sums, bf16* h, bf16* both) {
  const int64_t half = piece / 8, p = piece % 8, at = half * 256 + p * 32;
  const __m512 g0 = _mm512_load_ps(sums + at), g1 = _mm512_load_ps(sums + at + 16);
  const __m512 u0 = _mm512_load_ps(sums + 512 + at), u1 = _mm512_load_ps(sums + 512 + at + 16);
  const __m512 h0 = _mm512_mul_ps(_mm512_mul_ps(g0, u0), sigmoid(inner<GELU>(g0)));
  const __m512 h1 = _mm512_mul_ps(_mm512_mul_ps(g1, u1), sigmoid(inner<GELU>(g1)));
  _mm512_store_si512(h + half * TILE + p * 32, paired(h0, h1));
  if (!both) return;
  _mm512_stream_si512(reinterpret_cast<__m512i*>(both + piece * 32), paired(g0, g1));
  _mm512_stream_si512(reinterpret_cast<__m512i*>(both + TILE + piece * 32), paired(u0, u1));
}

template <bool GELU>
void forward(Shape s, const Layer* layers, Matrix x, Norm norm, Weights w, bf16* y, Kept kept) {
  static thread_local Room<bf16> adapters_room;
  const ForwardAdapters a(layers, s, adapters_room);
  const int64_t threads = at::get_num_threads();
  const int64_t own = s.H / 32, mid = s.F / 32, low = a.R32 / 32, low_down = a.D32 / 32;
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    static thread_local Room<bf16> x_room, h_room, normed_room;
    static thread_local Room<float> sums_room;
    const Tiles configured;
    for (int64_t thread = begin; thread < end; ++thread) {
      const auto [from, to] = share(s.M, thread, threads);
      if (from == to) continue;
      const int64_t x_apart = (own + low) * 2 * TILE, h_apart = (mid + low_down) * 2 * TILE;
      const int64_t step = stretch(to - from, (x_apart + h_apart) / 16 + 128, FORWARD);
      bf16 *columns = x_room.of(step / 32 * x_apart), *h = h_room.of(step / 32 * h_apart), *scratch = normed_room.of(32 * s.H);
      float* sums = sums_room.of(std::max<int64_t>(2048, step * 32));
      for (int64_t i = from; i < to; i += step) {
        const int64_t rows = std::min(step, to - i), blocks = pieces(rows, 32);
        for (int64_t b = 0; b < blocks; ++b) {
          const Matrix here{x.at(i + b * 32, 0), x.stride};
          pack_columns(as_read(here, rows - b * 32, s.H, norm.from(i + b * 32), scratch), rows - b * 32, s.H, columns + b * x_apart);
        }
        append_low(a.down_in, own, a.R, columns, x_apart, blocks, rows, kept.low ? kept.low + i * a.R : nullptr);
        // 16 rows of gate and of up are the two tiles of rows. What is done with a block's sums is done beside the next.
        const auto work_on = [&](int64_t number, int64_t piece) {
          const int64_t n = number / blocks, b = number % blocks;
          gate_piece<GELU>(
              piece, sums + number % 2 * 1024, h + b * h_apart + n / 2 * 2 * TILE + n % 2 * 256,
              kept.both ? kept.both + ((i / 32 + b) * 2 * mid + n) * BOTH : nullptr);
        };
        int64_t number = 0;
        for (int64_t n = 0; n < s.F; n += 16)
          for (int64_t b = 0; b < blocks; ++b, ++number) {
            const int64_t next = std::min(n + 16, s.F - 16);
            begin_sums(nullptr);
            const bf16* own_columns = columns + b * x_apart;
            add_product<false>({w.gate.at(n, 0), w.up.at(n, 0), w.gate.stride, 32}, own_columns, own, [&](int64_t d) {
              if (number && d < 16) work_on(number - 1, d);
              ask(b, blocks, [&](int64_t r) { return r < 16 ? w.gate.at(next + r, d * 32) : w.up.at(next + r - 16, d * 32); });
            });
            for (int64_t d = own; number && d < 16; ++d) work_on(number - 1, d);
            add_product<false>(
                {a.up_gate.at(n, 0), a.up_up.at(n, 0), a.R32, 32}, own_columns + 2 * own * TILE, low, [](int64_t) {});
            end_sums(sums + number % 2 * 1024);
          }
        for (int64_t d = 0; d < 16; ++d) work_on(number - 1, d);
        append_low(a.down_mid, mid, a.D, h, h_apart, blocks, rows, kept.low_down ? kept.low_down + i * a.D : nullptr);
        const int64_t deep = pieces(mid, pieces(mid, DEEP));
        Ahead of_next({x.at(i + rows, 0), x.stride}, to - i - rows, step);
        Across before;
        for (int64_t n = 0; n < s.H; n += 32)
          for (int64_t d = 0; d < mid; d += deep) {
            const int64_t here = std::min(deep, mid - d);
            const bool last = d + here == mid;
            const Matrix next{last ? w.down.at(std::min(n + 32, s.H - 32), 0) : w.down.at(n, (d + here) * 32), w.down.stride};
            for (int64_t b = 0; b < blocks; ++b) {
              float* own_sums = sums + b * 1024;
              begin_sums(d ? own_sums : nullptr);
              const bf16* own_h = h + b * h_apart;
              add_product<false>(as_they_lie({w.down.at(n, d * 32), w.down.stride}), own_h + d * 2 * TILE, here, [&](int64_t k) {
                ask(b, blocks, [&](int64_t r) { return next.at(r, k * 32); });
                of_next.ask();
                if (norm.weight && last && k < 16) ask_rows(x, i + b * 32 + 2 * k, n, 2);
                before.beside(k);
              });
              before.rest();
              if (last) add_product<false>(as_they_lie({a.up_down.at(n, 0), a.D32}), own_h + 2 * mid * TILE, low_down, [](int64_t) {});
              end_sums(own_sums);
              if (!last) continue;
              const Matrix upon = norm.weight ? Matrix{x.at(i + b * 32, n), x.stride} : Matrix{};
              before = {own_sums, rows - b * 32, 32, y + (i + b * 32) * s.H + n, s.H, upon, 0};
            }
          }
        before.rest();
      }
    }
  });
}

// --- backward --------------------------------------------------------------------------------------------------------

struct Flow {
  bf16 *gate, *up;  // what flows back to either, as packed columns
  bf16 *h_rows, *gate_rows, *up_rows;  // as packed rows of a product over the rows of x
};

// A piece of 16 of what is done with 32 columns over 32 rows: two columns.
template <bool GELU>
void flow_piece(int64_t piece, const float* sums, const bf16* both, Flow to) {
  const int64_t half = piece / 8, p = piece % 8;
  __m512 h[2][2], gates[2][2], ups[2][2];  // [of the two][half of the rows]
  for (int64_t k = 0; k < 2; ++k) {
    const __m512i g_pair = _mm512_load_si512(both + half * BOTH + k * 256 + p * 32);
    const __m512i u_pair = _mm512_load_si512(both + half * BOTH + TILE + k * 256 + p * 32);
    for (int64_t odd = 0; odd < 2; ++odd) {
      const __m512 flow = _mm512_load_ps(sums + half * 512 + k * 256 + p * 32 + odd * 16);
      const __m512 g = of_pair(g_pair, odd), u = of_pair(u_pair, odd);
      const __m512 part = sigmoid(inner<GELU>(g)), active = _mm512_mul_ps(g, part);
      const __m512 slope = _mm512_fmadd_ps(_mm512_fnmadd_ps(active, part, active), inner_slope<GELU>(g), part);
      h[odd][k] = _mm512_mul_ps(active, u);
      gates[odd][k] = _mm512_mul_ps(_mm512_mul_ps(flow, u), slope);
      ups[odd][k] = _mm512_mul_ps(flow, active);
    }
    _mm512_store_si512(to.gate + k * TILE + piece * 32, paired(gates[0][k], gates[1][k]));
    _mm512_store_si512(to.up + k * TILE + piece * 32, paired(ups[0][k], ups[1][k]));
  }
  for (int64_t odd = 0; odd < 2; ++odd) {
    const int64_t row = (piece * 2 + odd) * 32;
    _mm512_store_si512(to.h_rows + row, narrowed(h[odd][0], h[odd][1]));
    _mm512_store_si512(to.gate_rows + row, narrowed(gates[odd][0], gates[odd][1]));
    _mm512_store_si512(to.up_rows + row, narrowed(ups[odd][0], ups[odd][1]));
  }
}

// Where each thread's sums for the gradients of adapters lie among its own.
struct Places {
  int64_t in, gate, up, mid, down, all;
  Places(Shape s, const Layer* layers) {
    const auto tiles = [](int64_t columns, int64_t ranks) { return columns / 32 * pieces(ranks, 16) * 512; };
    in = 0;
    gate = in + tiles(s.H, layers[0].rank + layers[1].rank);
    up = gate + tiles(s.F, layers[0].rank);
    mid = up + tiles(s.F, layers[1].rank);
    down = mid + tiles(s.F, layers[2].rank);
    all = down + tiles(s.H, layers[2].rank);
  }
};

struct Given {
  Matrix dy, x;
  Norm norm;
  const bf16 *both, *low, *low_down;
};

// Weights as packed rows of the backward pass, which are their columns: of what flows back to h [F / 32][H / 32 + D / 32], and to x
// [H / 32][2F / 32 + R / 32].
struct Panels {
  bf16 *to_h, *to_x;
  int64_t deep_h, deep_x;  // tiles of depth

  Panels(Shape s, const Weights& w, const Adapters& a, bool needs_x, Room<bf16>& room) {
    const int64_t own = s.H / 32, mid = s.F / 32, low = a.R32 / 32;
    deep_h = own + a.D32 / 32, deep_x = 2 * mid + low;
    to_h = room.of((mid * deep_h + own * deep_x) * 2 * TILE);
    to_x = to_h + mid * deep_h * 2 * TILE;
    at::parallel_for(0, needs_x ? deep_h + deep_x : deep_h, 1, [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k)
        if (k < deep_h) {
          const Matrix rows = k < own ? Matrix{w.down.at(k * 32, 0), w.down.stride} : Matrix{a.down_mid.at((k - own) * 32, 0), s.F};
          for (int64_t n = 0; n < mid; ++n) {
            ask_share({rows.at(32, 0), rows.stride}, 32, s.F, n, mid);
            pack_across({rows.at(0, n * 32), rows.stride}, 32, 32, to_h + (n * deep_h + k) * 2 * TILE);
          }
        } else {
          const int64_t d = k - deep_h;
          const Matrix rows = d < mid       ? Matrix{w.gate.at(d * 32, 0), w.gate.stride}
                              : d < 2 * mid ? Matrix{w.up.at((d - mid) * 32, 0), w.up.stride}
                                            : Matrix{a.down_in.at((d - 2 * mid) * 32, 0), s.H};
          for (int64_t n = 0; n < own; ++n) {
            ask_share({rows.at(32, 0), rows.stride}, 32, s.H, n, own);
            pack_across({rows.at(0, n * 32), rows.stride}, 32, 32, to_x + (n * deep_x + d) * 2 * TILE);
          }
        }
    });
  }
};

template <bool GELU>
void backward(Shape s, const Layer* layers, Given given, Weights w, bf16* dx, float* d_down, float* d_up) {
  static thread_local Room<bf16> adapters_room, panels_room;
  static thread_local Room<float> shared;
  const BackwardAdapters a(layers, s, adapters_room);
  const Panels panels(s, w, a, dx != nullptr, panels_room);
  const Places places(s, layers);
  const int64_t threads = at::get_num_threads();
  const int64_t own = s.H / 32, mid = s.F / 32, low = a.R32 / 32, low_down = a.D32 / 32, of_gate = layers[0].rank, of_up = layers[1].rank;
  float* all = shared.of(threads * places.all);
  std::unique_ptr<const float*[]> sums_of(new const float*[threads * 5]());
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    static thread_local Room<bf16> dy_room, flow_room, ranks_room, rows_room;
    static thread_local Room<float> sums_room;
    const Tiles configured;
    for (int64_t thread = begin; thread < end; ++thread) {
      const auto [from, to] = share(s.M, thread, threads);
      if (from == to) continue;
      const int64_t dy_apart = (own + low_down) * 2 * TILE, apart = (2 * mid + low) * 2 * TILE;
      const int64_t step = stretch(to - from, (dy_apart + apart) / 16 + 512, BACKWARD), most = step / 32;
      bf16 *dy = dy_room.of(most * dy_apart), *flow = flow_room.of(most * apart);
      // Tiles of ranks of each block: x A^T by gate, by up, what flows back to the ranks of down, h A^T, and what flows to those of both.
      const int64_t at_up = pieces(of_gate, 16), at_back = at_up + pieces(of_up, 16), at_down = at_back + pieces(a.D, 16);
      const int64_t at_flow = at_down + pieces(a.D, 16), ranks_apart = (at_flow + pieces(a.R, 16) + 1) * TILE;
      bf16 *ranks = ranks_room.of(most * ranks_apart), *some_rows = rows_room.of(most * 3 * 2 * TILE);
      float *sums = sums_room.of(std::max<int64_t>(2048, step * 32)), *mine = all + thread * places.all;
      std::fill_n(mine, places.all, 0.f);
      const int64_t begins[5] = {places.in, places.gate, places.up, places.mid, places.down};
      for (int64_t k = 0; k < 5; ++k) sums_of[k * threads + thread] = mine + begins[k];
      for (int64_t i = from; i < to; i += step) {
        const int64_t rows = std::min(step, to - i), blocks = pieces(rows, 32);
        const auto left = [&](int64_t b) { return std::min<int64_t>(32, rows - b * 32); };
        for (int64_t b = 0; b < blocks; ++b) {
          const bf16 *lows = given.low + (i + b * 32) * a.R, *lows_down = given.low_down + (i + b * 32) * a.D;
          bf16* own_ranks = ranks + b * ranks_apart;
          pack_columns({given.dy.at(i + b * 32, 0), given.dy.stride}, left(b), s.H, dy + b * dy_apart);
          // A tile more may be written than there are ranks for: what is to lie there is put there later.
          for (int64_t r = 0; r < of_gate; r += 32) pack_depth({lows + r, a.R}, of_gate - r, left(b), own_ranks + r * 32);
          for (int64_t r = 0; r < of_up; r += 32) pack_depth({lows + of_gate + r, a.R}, of_up - r, left(b), own_ranks + at_up * TILE + r * 32);
          pack_across({lows_down, a.D}, left(b), a.D, own_ranks + at_down * TILE);
        }
        append_low(a.up_down, own, a.D, dy, dy_apart, blocks, [&](int64_t r, int64_t b, const float* found) {
          for (int64_t k = 0; k < 32 && r + k < a.D; k += 16) {
            __m512i held[16];
            for (int64_t j = 0; j < 16; ++j) held[j] = row_of(found, k + j);
            store_transposed(held, ranks + b * ranks_apart + (at_back + (r + k) / 16) * TILE);
          }
        });
        for (int64_t n = 0; a.D && n < own; ++n) {
          for (int64_t b = 0; b < blocks; ++b)
            pack_depth({given.dy.at(i + b * 32, n * 32), given.dy.stride}, 32, left(b), some_rows + b * 2 * TILE);
          add_outers(ranks + at_down * TILE, pieces(a.D, 16), ranks_apart, some_rows, blocks, mine + places.down + n * pieces(a.D, 16) * 512);
        }
        bf16 *h_rows = some_rows, *gate_rows = some_rows + most * 2 * TILE, *up_rows = some_rows + most * 4 * TILE;
        const auto work_on = [&](int64_t n, int64_t b, int64_t piece) {
          flow_piece<GELU>(
              piece, sums + b % 2 * 1024, given.both + ((i / 32 + b) * mid + n) * 2 * BOTH,
              {flow + b * apart + n * 2 * TILE, flow + b * apart + (mid + n) * 2 * TILE, h_rows + b * 2 * TILE, gate_rows + b * 2 * TILE,
               up_rows + b * 2 * TILE});
        };
        Ahead of_x({given.x.at(i, 0), given.x.stride}, rows, step);
        for (int64_t n = 0; n < mid; ++n) {
          const bf16 *panel = panels.to_h + n * panels.deep_h * 2 * TILE, *next = panel + panels.deep_h * 2 * TILE;
          for (int64_t b = 0; b < blocks; ++b) {
            const bf16* next_both = given.both + ((i / 32 + b) * mid + n + 1) * 2 * BOTH;
            begin_sums(nullptr);
            add_product<false>(packed(panel), dy + b * dy_apart, panels.deep_h, [&](int64_t d) {
              if (b && d < 16) work_on(n, b - 1, d);
              ask(b, blocks, [&](int64_t r) { return next + (d * 32 + r) * 32; });
              for (int64_t k = d; n + 1 < mid && k < 64; k += panels.deep_h)
                ask_second(next_both + k * 32);
              of_x.ask();
            });
            for (int64_t d = panels.deep_h; b && d < 16; ++d) work_on(n, b - 1, d);
            end_sums(sums + b % 2 * 1024);
          }
          for (int64_t d = 0; d < 16; ++d) work_on(n, blocks - 1, d);
          add_outers<true>(ranks, pieces(of_gate, 16), ranks_apart, gate_rows, blocks, mine + places.gate + n * pieces(of_gate, 16) * 512);
          add_outers<true>(ranks + at_up * TILE, pieces(of_up, 16), ranks_apart, up_rows, blocks, mine + places.up + n * pieces(of_up, 16) * 512);
          add_outers<true>(ranks + at_back * TILE, pieces(a.D, 16), ranks_apart, h_rows, blocks, mine + places.mid + n * pieces(a.D, 16) * 512);
        }
        append_low(a.up_both, 2 * mid, a.R, flow, apart, blocks, [&](int64_t r, int64_t b, const float* found) {
          for (int64_t k = 0; k < 32 && r + k < up(a.R, 16); ++k)
            _mm512_store_si512(ranks + b * ranks_apart + at_flow * TILE + (r + k) * 32, row_of(found, k));
        });
        const Norm norm = given.norm;
        for (int64_t n = 0; a.R && n < own; ++n) {
          for (int64_t b = 0; b < blocks; ++b)
            pack_read_depth({given.x.at(i + b * 32, 0), given.x.stride}, 32, left(b), norm.from(i + b * 32), n * 32, some_rows + b * 2 * TILE);
          add_outers(ranks + at_flow * TILE, pieces(a.R, 16), ranks_apart, some_rows, blocks, mine + places.in + n * pieces(a.R, 16) * 512);
        }
        const int64_t deep = pieces(panels.deep_x, pieces(panels.deep_x, DEEP));
        Ahead of_next({given.dy.at(i + rows, 0), given.dy.stride}, to - i - rows, step);
        Across before;
        for (int64_t n = 0; dx && n < own; ++n)
          for (int64_t d = 0; d < panels.deep_x; d += deep) {
            const int64_t here = std::min(deep, panels.deep_x - d);
            const bf16 *panel = panels.to_x + (n * panels.deep_x + d) * 2 * TILE, *next = panel + here * 2 * TILE;
            for (int64_t b = 0; b < blocks; ++b) {
              float* own_sums = sums + b * 1024;
              begin_sums(d ? own_sums : nullptr);
              add_product<false>(packed(panel), flow + b * apart + d * 2 * TILE, here, [&](int64_t k) {
                ask(b, blocks, [&](int64_t r) { return next + (k * 32 + r) * 32; });
                of_next.ask();
                before.beside(k);
              });
              before.rest();
              end_sums(own_sums);
              if (d + here < panels.deep_x) continue;
              // Where it flows on through the norm, it takes the room of dy, which is done with.
              if (norm.weight) before = {own_sums, 32, 32, dy + b * dy_apart + n * 32, s.H, {}, 0, false};
              else before = {own_sums, left(b), 32, dx + (i + b * 32) * s.H + n * 32, s.H, {}, 0};
            }
          }
        before.rest();
        for (int64_t b = 0; dx && norm.weight && b < blocks; ++b) {
          const Matrix x{given.x.at(i + b * 32, 0), given.x.stride}, above{given.dy.at(i + b * 32, 0), given.dy.stride};
          flow_through_norm({dy + b * dy_apart, s.H}, x, above, left(b), s.H, norm.from(i + b * 32), dx + (i + b * 32) * s.H, s.H);
        }
      }
    }
  });
  const float* const* of = sums_of.get();
  join_down(of, threads, a.R, s.H, d_down);
  join_across(of + 3 * threads, threads, a.D, s.F, 1, d_down + a.R * s.H, false);
  join_across(of + threads, threads, of_gate, s.F, layers[0].scale, d_up, true);
  join_across(of + 2 * threads, threads, of_up, s.F, layers[1].scale, d_up + s.F * of_gate, true);
  join_up(of + 4 * threads, threads, layers[2], 0, 0, a.D, d_up + s.F * a.R);
}

}  // namespace

extern "C" {

// y [M, H] of x [M, H] and the weights gate and up [F, H] and down [H, F], all bf16, and an adapter of each, whose rank may be 0.
// Unless `norm` [H] is null, x is normed by it first, the inverted roots of its rows put into fp32 `roots` [M], and y comes upon x.
// Unless null, `both` [M, 2F] takes the outputs of gate and up, `low` [M, R] and `low_down` [M, D] those of the A.
// `shape` is M, H, F, the activation (0 SiLU, 1 GELU by tanh), and the strides of x and the weights.
void gated(
    const int64_t* shape, const void* layers, const void* x, const void* norm, float epsilon, void* roots, const void* gate, const void* up,
    const void* down, void* y, void* both, void* low, void* low_down) {
  const Shape s{shape[0], shape[1], shape[2], shape[3]};
  const Weights w{{numbers(gate), shape[5]}, {numbers(up), shape[6]}, {numbers(down), shape[7]}};
  (s.activation ? forward<true> : forward<false>)(
      s, static_cast<const Layer*>(layers), {numbers(x), shape[4]}, {numbers(norm), epsilon, static_cast<float*>(roots)}, w, numbers(y),
      {numbers(both), numbers(low), numbers(low_down)});
}

// dx [M, H] unless null, and fp32 gradients of every A and every B, one after another, given dy [M, H] and the above.
// `shape` is as above, and then the stride of dy.
void gated_backward(
    const int64_t* shape, const void* layers, const void* dy, const void* x, const void* norm, void* roots, const void* gate, const void* up,
    const void* down, const void* both, const void* low, const void* low_down, void* dx, void* d_down, void* d_up) {
  const Shape s{shape[0], shape[1], shape[2], shape[3]};
  const Weights w{{numbers(gate), shape[5]}, {numbers(up), shape[6]}, {numbers(down), shape[7]}};
  const Given given{{numbers(dy), shape[8]}, {numbers(x), shape[4]}, {numbers(norm), 0, static_cast<float*>(roots)}, numbers(both), numbers(low), numbers(low_down)};
  (s.activation ? backward<true> : backward<false>)(
      s, static_cast<const Layer*>(layers), given, w, numbers(dx), static_cast<float*>(d_down), static_cast<float*>(d_up));
}
}
