// A decoder layer of frozen weights with low-rank updates, forward and backward, by the kernels of its parts:
// h = x + o(attention(q, k, v of x normed)), y = h + feed-forward(h normed). Between the parts nothing but this runs, for what runs
// between two kernels finds the caches full of their numbers, and takes many times as long as it would by itself.
//
// Shapes: B rows, L tokens, T = B L, E width, H query heads, G key heads, D head width, O = (H + 2G) D, F numbers between.

#include "amx.h"

extern "C" {
using From = const void*;
using To = void*;
void low_rank(const int64_t*, From, From, From, float, To, From, From, From, To, To);
void low_rank_backward(const int64_t*, From, From, From, From, To, From, From, From, To, To, To);
void attend(const int64_t*, float, const int64_t*, From, From, From, From, From, From, To, To);
void attend_backward(const int64_t*, float, const int64_t*, From, From, From, From, From, From, From, From, From, To, To, To);
void gated(const int64_t*, From, From, From, float, To, From, From, From, To, To, To, To);
void gated_backward(const int64_t*, From, From, From, From, To, From, From, From, From, From, From, To, To, To);
}

namespace {

// What a layer computes with: `inner` are q, k and v in one.
struct Decoder {
  int64_t E, H, G, D, F, activation;
  int64_t ranks_inner, ranks_outer, ranks_gated, ranks_down;  // sums over layers that read the same
  int64_t inner_stride, outer_stride, gate_stride, up_stride, down_stride;
  const void *inner, *outer, *gate, *up, *down, *bias, *bias_out, *norm, *norm_of_middle;
  const void *adapters_inner, *adapters_outer, *adapters_gated;
  float epsilon, epsilon_of_middle, scale;

  int64_t heads() const { return H * D; }
  int64_t outputs() const { return (H + 2 * G) * D; }
  // The floats of all A and of all B of a part.
  int64_t downs(int part) const { return part == 0 ? ranks_inner * E : part == 1 ? ranks_outer * heads() : ranks_gated * E + ranks_down * F; }
};

// One room cut into what the backward pass keeps, in whole lines.
struct Kept {
  bf16 *merged, *heads, *middle, *low, *low_out, *both, *low_gated, *low_down;
  float *logs, *roots, *roots_of_middle;
  int64_t bytes = 0;

  Kept(const Decoder& d, int64_t B, int64_t L, bool all, void* room) {
    const int64_t T = B * L, whole = (T + 31) / 32 * 32;
    const auto take = [&](int64_t size) {
      auto* here = static_cast<char*>(room) + bytes;
      bytes += (size + 63) / 64 * 64;
      return here;
    };
    const auto numbers = [&](int64_t count) { return reinterpret_cast<bf16*>(take(count * 2)); };
    merged = numbers(T * d.outputs());
    heads = numbers(T * d.heads());
    middle = numbers(T * d.E);
    low = numbers(T * d.ranks_inner);
    low_out = numbers(T * d.ranks_outer);
    logs = reinterpret_cast<float*>(take(B * d.H * L * 4));
    roots = reinterpret_cast<float*>(take(T * 4));
    roots_of_middle = reinterpret_cast<float*>(take(T * 4));
    both = all ? numbers(whole * 2 * d.F) : nullptr;
    low_gated = all ? numbers(T * d.ranks_gated) : nullptr;
    low_down = all ? numbers(T * d.ranks_down) : nullptr;
  }
};

// Strides by row, head and token of heads in rows of tokens of `width`.
struct Strides {
  int64_t row, head, token;
  Strides(int64_t L, int64_t width, int64_t D) : row(L * width), head(D), token(width) {}
};

}  // namespace

extern "C" {

// The bytes that `kept` takes for B rows of L tokens, with what the backward pass wants or without.
int64_t decoder_room(const void* layer, int64_t B, int64_t L, int64_t all) {
  return Kept(*static_cast<const Decoder*>(layer), B, L, all != 0, nullptr).bytes;
}

// The bytes of numbers that the backward pass takes for itself.
int64_t decoder_scratch(const void* layer, int64_t B, int64_t L) {
  const auto& d = *static_cast<const Decoder*>(layer);
  return 2 * B * L * (d.E + d.heads() + d.outputs());
}

// y [B, L, E] of bf16 x [B, L, E], rotary tables bf16 [B, L, D], and int32 [B, L] where tokens cease to be seen.
void decoder(const void* layer, int64_t B, int64_t L, int64_t all, const void* x, const void* cos, const void* sin, const void* ends, void* y, void* room) {
  const auto& d = *static_cast<const Decoder*>(layer);
  const int64_t T = B * L, O = d.outputs();
  const Kept kept(d, B, L, all != 0, room);
  const int64_t of_inner[] = {T, d.E, O, d.ranks_inner, d.E, d.inner_stride, 3};
  low_rank(of_inner, d.adapters_inner, x, d.norm, d.epsilon, kept.roots, d.inner, d.bias, nullptr, kept.merged, kept.low);
  const int64_t shape[] = {B, d.H, d.G, L, d.D};
  const Strides own(L, O, d.D);
  const int64_t strides[] = {own.row, own.head, own.token, own.row, own.head, own.token, own.row, own.head, own.token};
  const bf16 *k = kept.merged + d.heads(), *v = k + d.G * d.D;
  attend(shape, d.scale, strides, kept.merged, k, v, cos, sin, ends, kept.heads, kept.logs);
  const int64_t of_outer[] = {T, d.heads(), d.E, d.ranks_outer, d.heads(), d.outer_stride, 1};
  low_rank(of_outer, d.adapters_outer, kept.heads, nullptr, 0, nullptr, d.outer, d.bias_out, x, kept.middle, kept.low_out);
  const int64_t of_gated[] = {T, d.E, d.F, d.activation, d.E, d.gate_stride, d.up_stride, d.down_stride};
  gated(
      of_gated, d.adapters_gated, kept.middle, d.norm_of_middle, d.epsilon_of_middle, kept.roots_of_middle, d.gate, d.up, d.down, y, kept.both, kept.low_gated,
      kept.low_down);
}

// dx [B, L, E] unless null, and fp32 gradients of A of all seven layers and then of B, one after another, given dy [B, L, E].
// `together` is how many outputs of layers go back at once.
void decoder_backward(
    const void* layer, int64_t B, int64_t L, int64_t together, const void* dy, const void* x, const void* cos, const void* sin, const void* ends,
    void* room, void* scratch, void* dx, void* gradients) {
  const auto& d = *static_cast<const Decoder*>(layer);
  const int64_t T = B * L, O = d.outputs();
  const Kept kept(d, B, L, true, room);
  auto* of_middle = static_cast<bf16*>(scratch);
  bf16 *of_heads = of_middle + T * d.E, *of_merged = of_heads + T * d.heads();
  float* of_down[3] = {static_cast<float*>(gradients)};
  of_down[1] = of_down[0] + d.downs(0), of_down[2] = of_down[1] + d.downs(1);
  float* of_up[3] = {of_down[2] + d.downs(2)};
  const auto ups = [](const void* layers, int64_t count) {
    int64_t found = 0;
    for (int64_t k = 0; k < count; ++k) found += static_cast<const Layer*>(layers)[k].outputs * static_cast<const Layer*>(layers)[k].rank;
    return found;
  };
  of_up[1] = of_up[0] + ups(d.adapters_inner, 3), of_up[2] = of_up[1] + ups(d.adapters_outer, 1);
  const int64_t of_gated[] = {T, d.E, d.F, d.activation, d.E, d.gate_stride, d.up_stride, d.down_stride, d.E};
  gated_backward(
      of_gated, d.adapters_gated, dy, kept.middle, d.norm_of_middle, kept.roots_of_middle, d.gate, d.up, d.down, kept.both, kept.low_gated,
      kept.low_down, of_middle, of_down[2], of_up[2]);
  const int64_t of_outer[] = {T, d.heads(), d.E, d.ranks_outer, d.E, d.heads(), d.outer_stride, 1, together};
  low_rank_backward(
      of_outer, d.adapters_outer, of_middle, kept.heads, nullptr, nullptr, nullptr, kept.low_out, d.outer, of_heads, of_down[1], of_up[1]);
  const int64_t shape[] = {B, d.H, d.G, L, d.D};
  const Strides own(L, O, d.D), one(L, d.heads(), d.D);
  const int64_t strides[] = {one.row, one.head, one.token, own.row,   own.head, own.token, own.row,   own.head, own.token, own.row,   own.head, own.token,
                             one.row, one.head, one.token, own.row, own.token, own.head, own.row, own.token, own.head, own.row, own.token, own.head};
  const int64_t k = d.heads(), v = k + d.G * d.D;
  attend_backward(
      shape, d.scale, strides, of_heads, kept.merged, kept.merged + k, kept.merged + v, cos, sin, kept.heads, kept.logs, ends, of_merged,
      of_merged + k, of_merged + v);
  const int64_t of_inner[] = {T, d.E, O, d.ranks_inner, O, d.E, d.inner_stride, 3, together};
  low_rank_backward(
      of_inner, d.adapters_inner, of_merged, x, d.norm, kept.roots, of_middle, kept.low, d.inner, dx, of_down[0], of_up[0]);
}
}
