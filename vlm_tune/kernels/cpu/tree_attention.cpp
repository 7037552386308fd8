// Attention of rows whose tokens see intervals: key j is seen by the queries j <= i < ends[j]. Forward and backward for a
// CPU with AMX, one row and key head at a time, so that scores live and die in a core's cache and are never kept.
//
// Scores are held a row per query, in squares of 32 queries by 32 keys; squares that no query sees are left out. As rows they
// are the first operands of products over keys. Gradients of keys and values are summed transposed, so that scores are second
// operands there, and nothing of the size of the scores is ever transposed.
//
// Shapes: B rows, H query heads, G key heads, L tokens, D head width; strides are in elements, D is contiguous.

#include "tree_attention.h"

namespace {

// --- forward ---------------------------------------------------------------------------------------------------------

// The keys and values of one row and key head, and what blocks of queries of its heads find there.
class Reading {
 public:
  // For up to `most` keys.
  Reading(const Shape& s, int64_t most) : s_(s) {
    static thread_local Room<bf16> numbers;
    static thread_local Room<float> sums;
    const int64_t padded = up(most, 32);
    Parts<bf16> parts{numbers.of(padded * (3 * s.D + 32) + 32 * s.D)};
    rows_ = parts.take(padded * s.D), keys_ = parts.take(padded * s.D), values_ = parts.take(padded * s.D);
    weights_ = parts.take(padded * 32), queries_ = parts.take(32 * s.D);
    Parts<float> float_parts{sums.of(padded * 32 + 32 * s.D)};
    scores_ = float_parts.take(padded * 32), sums_ = float_parts.take(32 * s.D);
  }

  // Keys and values of one row and key head, in parts of some tokens.
  struct Part {
    Strided k, v;
    int64_t count;
  };

  void begin(const std::vector<Part>& parts, const float* angles, int64_t b, int64_t g) {
    const int64_t deep = s_.deep();
    const auto take = [&](Strided Part::* which, const float* by, auto pack, bf16* to) {
      int64_t held = 0;
      for (const Part& part : parts) {
        take_rows((part.*which).at(b, g, 0), by, part.count, s_.D, held, rows_);
        held += part.count;
      }
      clear_rows(held, s_.D, rows_);
      for (int64_t n = 0; n < pieces(held, 32) * deep; ++n) pack({rows_ + n * SQUARE, 32}, 32, 32, to + n * SQUARE);
    };
    take(&Part::k, angles, pack_columns, keys_);
    take(&Part::v, nullptr, pack_depth, values_);
  }

  // The queries of head h from `start` on: their outputs, `stride` apart, and unless null the logs of their sums.
  void attend(Matrix q, const float* angles, int64_t count, const Seen& seen, bf16* out, int64_t stride, float* lse) {
    const int64_t deep = s_.deep(), squares = seen.count();
    take_rows(q, angles, count, s_.D, 0, queries_);
    clear_rows(count, s_.D, queries_);
    for (int64_t n = 0; n < squares; ++n) {
      begin_sums(nullptr);
      for (int64_t d = 0; d < deep; ++d) add_square(queries_ + d * SQUARE, keys_ + (seen.squares[n] * deep + d) * SQUARE);
      end_sums(scores_ + n * 1024);
    }
    alignas(64) float inverse[32], logs[32];
    for (int64_t i = 0; i < count; i += 16)
      softmax(scores_ + i * 32, seen.masks.data() + i, squares, s_.scale, weights_ + i * 32, inverse + i, logs + i);
    for (int64_t d = 0; d < deep; ++d) {
      begin_sums(nullptr);
      for (int64_t n = 0; n < squares; ++n) add_square(weights_ + n * SQUARE, values_ + (seen.squares[n] * deep + d) * SQUARE);
      end_sums(sums_ + d * 1024);
    }
    give_rows(sums_, [&](int64_t i) { return inverse[i]; }, nullptr, count, s_.D, out, stride);
    if (lse) std::copy_n(logs, count, lse);
  }

 private:
  const Shape& s_;
  bf16 *rows_, *keys_, *values_, *weights_, *queries_;
  float *scores_, *sums_;
};

void forward(const Shape& s, Strided q, Strided k, Strided v, Rotation rotation, const int32_t* ends, bf16* out, float* lse) {
  at::parallel_for(0, s.B * s.G, 1, [&](int64_t begin, int64_t end) {
    const Tiles configured;
    Reading reading(s, s.L);
    Angles angles(s, rotation);
    Seen seen;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / s.G, g = task % s.G;
      const float* by = angles.of(b);
      const auto ask_for_queries = [&](int64_t start) {
        for (int64_t h = g * s.group(); h < (g + 1) * s.group(); ++h) ask(q.at(b, h, start), s.L - start, s.D);
      };
      ask_for_queries(0);
      reading.begin({{k, v, s.L}}, by, b, g);
      for (int64_t start = 0; start < s.L; start += 32) {
        const int64_t count = std::min<int64_t>(32, s.L - start);
        seen.find(ends + b * s.L, s.L, start, count);
        ask_for_queries(start + 32);
        for (int64_t h = g * s.group(); h < (g + 1) * s.group(); ++h)
          reading.attend(
              q.at(b, h, start), by ? by + start * 2 * s.D : nullptr, count, seen, out + ((b * s.L + start) * s.H + h) * s.D, s.H * s.D,
              lse + (b * s.H + h) * s.L + start);
      }
    }
  });
}

// One query of each of `branches` a row, which sees what `kept` says of the row's L tokens, and its own branch's tokens.
void grow(const Shape& s, int64_t branches, const std::vector<Reading::Part>& parts, Strided q, const uint8_t* kept, bf16* out) {
  const int64_t keys = s.L + branches * static_cast<int64_t>(parts.size() - 1), squares = pieces(keys, 32);
  at::parallel_for(0, s.B * s.G, 1, [&](int64_t begin, int64_t end) {
    const Tiles configured;
    Reading reading(s, keys);
    Seen seen;
    for (int64_t n = 0; n < squares; ++n) seen.squares.push_back(n);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / s.G, g = task % s.G;
      reading.begin(parts, nullptr, b, g);
      for (int64_t start = 0; start < branches; start += 32) {
        const int64_t count = std::min<int64_t>(32, branches - start);
        seen.masks.assign(squares * 32, 0u);
        const auto see = [&](int64_t i, int64_t j) { seen.masks[j / 32 * 32 + i] |= 1u << j % 32; };
        for (int64_t i = 0; i < count; ++i) {
          const uint8_t* sees = kept + (b * branches + start + i) * s.L;
          for (int64_t j = 0; j < s.L; ++j)
            if (sees[j]) see(i, j);
          for (int64_t j = s.L + start + i; j < keys; j += branches) see(i, j);
        }
        for (int64_t h = g * s.group(); h < (g + 1) * s.group(); ++h)
          reading.attend(q.at(b, h, start), nullptr, count, seen, out + ((b * branches + start) * s.H + h) * s.D, s.H * s.D, nullptr);
      }
    }
  });
}

// --- backward --------------------------------------------------------------------------------------------------------

struct Given {
  Strided dout, q, k, v, out;
  Rotation rotation;
  const float* lse;
  const int32_t* ends;
};

struct Gradients {
  Target q, k, v;
};

// The gradients of the keys and values of one row and key head, and of blocks of queries of its heads.
class Returning {
 public:
  Returning(const Shape& s, const Given& given, const Gradients& gradients)
      : s_(s), given_(given), to_(gradients), deep_(s.deep()), most_(s.together()), angles_(s, given.rotation) {
    static thread_local Room<bf16> numbers;
    static thread_local Room<float> sums;
    const int64_t L = up(s.L, 32), keys = L * s.D, queries = most_ * 32 * s.D, scores = most_ * L * 32;
    Parts<bf16> parts{numbers.of(4 * keys + 4 * queries + 3 * scores)};
    rows_ = parts.take(keys), key_columns_ = parts.take(keys), key_depth_ = parts.take(keys), value_columns_ = parts.take(keys);
    q_ = parts.take(queries), dout_ = parts.take(queries), q_across_ = parts.take(queries), dout_across_ = parts.take(queries);
    slopes_ = parts.take(scores), weight_pairs_ = parts.take(scores), slope_pairs_ = parts.take(scores);
    Parts<float> float_parts{sums.of(2 * keys + 4 * 1024 + 32 * s.D + 2 * most_ * 32)};
    dk_ = float_parts.take(keys), dv_ = float_parts.take(keys), scores_ = float_parts.take(4 * 1024), dq_ = float_parts.take(32 * s.D);
    logs_ = float_parts.take(most_ * 32), delta_ = float_parts.take(most_ * 32);
  }

  void run(int64_t b, int64_t g) {
    const float* by = angles_.of(b);
    ask_for_queries(b, g, 0);
    begin(b, g, by);
    for (int64_t start = 0; start < s_.L; start += 32) {
      const int64_t count = std::min<int64_t>(32, s_.L - start);
      const float* here = by ? by + start * 2 * s_.D : nullptr;
      seen_.find(given_.ends + b * s_.L, s_.L, start, count);
      ask_for_queries(b, g, start + 32);
      for (int64_t head = g * s_.group(); head < (g + 1) * s_.group(); head += most_) {
        const int64_t heads = std::min(most_, (g + 1) * s_.group() - head);
        for (int64_t h = 0; h < heads; ++h) take_queries(b, head + h, start, count, here, h);
        make_scores(heads);
        for (int64_t h = 0; h < heads; ++h) give_queries(h, here, count, to_.q.at(b, start, head + h));
        add_to_keys(heads);
      }
    }
    end(b, g, by);
  }

 private:
  void ask_for_queries(int64_t b, int64_t g, int64_t start) {
    for (int64_t h = g * s_.group(); h < (g + 1) * s_.group(); ++h)
      for (const Strided& each : {given_.q, given_.dout, given_.out}) ask(each.at(b, h, start), s_.L - start, s_.D);
  }

  void begin(int64_t b, int64_t g, const float* by) {
    touched_.assign(pieces(s_.L, 32), false);
    const auto take = [&](const Strided& from, const float* angles) {
      take_rows(from.at(b, g, 0), angles, s_.L, s_.D, 0, rows_);
      clear_rows(s_.L, s_.D, rows_);
    };
    const auto pack = [&](auto how, bf16* to) {
      for (int64_t n = 0; n < pieces(s_.L, 32) * deep_; ++n) how({rows_ + n * SQUARE, 32}, 32, 32, to + n * SQUARE);
    };
    take(given_.k, by);
    pack(pack_columns, key_columns_);
    pack(pack_depth, key_depth_);
    take(given_.v, nullptr);
    pack(pack_columns, value_columns_);
  }

  // The queries of one head and what flows back to their outputs, as they lie and across.
  void take_queries(int64_t b, int64_t head, int64_t start, int64_t count, const float* by, int64_t h) {
    bf16 *q = q_ + h * 32 * s_.D, *dout = dout_ + h * 32 * s_.D;
    take_rows(given_.q.at(b, head, start), by, count, s_.D, 0, q);
    take_rows(given_.dout.at(b, head, start), nullptr, count, s_.D, 0, dout);
    clear_rows(count, s_.D, q);
    clear_rows(count, s_.D, dout);
    for (int64_t d = 0; d < deep_; ++d) {
      pack_across({q + d * SQUARE, 32}, 32, 32, q_across_ + (h * deep_ + d) * SQUARE);
      pack_across({dout + d * SQUARE, 32}, 32, 32, dout_across_ + (h * deep_ + d) * SQUARE);
    }
    const Matrix out = given_.out.at(b, head, start);
    const float* lse = given_.lse + (b * s_.H + head) * s_.L + start;
    for (int64_t i = 0; i < 32; i += 16) {
      __m512 rows[16];
      for (int64_t k = 0; k < 16; ++k) {
        rows[k] = _mm512_setzero_ps();
        for (int64_t d = 0; d < deep_ && i + k < count; ++d) {
          const auto flow = (__m512bh)_mm512_load_si512(dout + d * SQUARE + (i + k) * 32);
          rows[k] = _mm512_dpbf16_ps(rows[k], flow, (__m512bh)_mm512_loadu_si512(out.at(i + k, d * 32)));
        }
      }
      _mm512_store_ps(delta_ + h * 32 + i, join_rows(rows, [](__m512 one, __m512 other) { return _mm512_add_ps(one, other); }));
      const auto some = static_cast<__mmask16>(first(std::min<int64_t>(16, count - i)));
      const __m512 nothing = _mm512_set1_ps(std::numeric_limits<float>::infinity());
      _mm512_store_ps(logs_ + h * 32 + i, _mm512_mul_ps(_mm512_mask_loadu_ps(nothing, some, lse + i), _mm512_set1_ps(LOG2E)));
    }
  }

  // The scores of all heads and what flows back to them, a square at a time, and what is made of them. A square is worked on
  // after the products of the next: what one unit wrote the other can't read at once.
  void make_scores(int64_t heads) {
    const int64_t squares = seen_.count(), all = heads * squares;
    const auto multiply = [&](const bf16* rows, const bf16* columns, float* sums) {
      begin_sums(nullptr);
      for (int64_t d = 0; d < deep_; ++d) add_square(rows + d * SQUARE, columns + d * SQUARE);
      end_sums(sums);
    };
    for (int64_t number = 0; number <= all; ++number) {
      if (number < all) {
        float* sums = scores_ + number % 2 * 2048;
        const int64_t own = number / squares * deep_ * SQUARE, key = seen_.squares[number % squares] * deep_ * SQUARE;
        multiply(q_ + own, key_columns_ + key, sums);
        multiply(dout_ + own, value_columns_ + key, sums + 1024);
      }
      if (!number) continue;
      const int64_t before = number - 1, h = before / squares, at = before * SQUARE;
      const float* sums = scores_ + before % 2 * 2048;
      softmax_backward(
          sums, sums + 1024, seen_.masks.data() + before % squares * 32, s_.scale, logs_ + h * 32, delta_ + h * 32,
          {slopes_ + at, weight_pairs_ + at, slope_pairs_ + at});
    }
  }

  void give_queries(int64_t h, const float* by, int64_t count, bf16* to) {
    const int64_t squares = seen_.count();
    for (int64_t d = 0; d < deep_; ++d) {
      begin_sums(nullptr);
      for (int64_t n = 0; n < squares; ++n) add_square(slopes_ + (h * squares + n) * SQUARE, key_depth_ + (seen_.squares[n] * deep_ + d) * SQUARE);
      end_sums(dq_ + d * 1024);
    }
    give_rows(dq_, [&](int64_t) { return s_.scale; }, by, count, s_.D, to, to_.q.token);
  }

  void add_to_keys(int64_t heads) {
    const int64_t squares = seen_.count();
    for (int64_t n = 0; n < squares; ++n) {
      const int64_t key = seen_.squares[n];
      const auto add = [&](const bf16* rows, const bf16* columns, float* sums) {
        for (int64_t d = 0; d < deep_; ++d) {
          float* here = sums + (key * deep_ + d) * 1024;
          begin_sums(touched_[key] ? here : nullptr);
          for (int64_t h = 0; h < heads; ++h) add_square(rows + (h * deep_ + d) * SQUARE, columns + (h * squares + n) * SQUARE);
          end_sums(here);
        }
      };
      add(dout_across_, weight_pairs_, dv_);
      add(q_across_, slope_pairs_, dk_);
      touched_[key] = true;
    }
  }

  void end(int64_t b, int64_t g, const float* by) {
    for (int64_t start = 0; start < s_.L; start += 32) {
      const int64_t count = std::min<int64_t>(32, s_.L - start);
      const auto give = [&](float* sums, float scale, const float* angles, const Target& to) {
        sums += start * s_.D;
        if (!touched_[start / 32]) std::fill_n(sums, 32 * s_.D, 0.f);
        for (int64_t d = 0; d < deep_; ++d) transpose_sums(sums + d * 1024);
        give_rows(sums, [&](int64_t) { return scale; }, angles, count, s_.D, to.at(b, start, g), to.token);
      };
      give(dv_, 1.f, nullptr, to_.v);
      give(dk_, s_.scale, by ? by + start * 2 * s_.D : nullptr, to_.k);
    }
  }

  const Shape& s_;
  const Given& given_;
  const Gradients& to_;
  int64_t deep_, most_;
  Angles angles_;
  Seen seen_;
  std::vector<bool> touched_;
  bf16 *rows_, *key_columns_, *key_depth_, *value_columns_;
  bf16 *q_, *dout_, *q_across_, *dout_across_;
  bf16 *slopes_, *weight_pairs_, *slope_pairs_;
  float *dk_, *dv_, *scores_, *dq_, *logs_, *delta_;
};

void backward(const Shape& s, const Given& given, const Gradients& gradients) {
  at::parallel_for(0, s.B * s.G, 1, [&](int64_t begin, int64_t end) {
    const Tiles configured;
    Returning returning(s, given, gradients);
    for (int64_t task = begin; task < end; ++task) returning.run(task / s.G, task % s.G);
  });
}

Strided strided(const void* data, const int64_t* strides) { return {numbers(data), strides[0], strides[1], strides[2]}; }
Target target(void* data, const int64_t* strides) { return {static_cast<bf16*>(data), strides[0], strides[1], strides[2]}; }
Shape shaped(const int64_t* shape, float scale) { return {shape[0], shape[1], shape[2], shape[3], shape[4], scale}; }

}  // namespace

extern "C" {

// out [B, L, H, D]; lse fp32 [B, H, L]. `shape` is B, H, G, L, D; `strides` those of q, k and v by row, head and token.
// q and k are rotated by `cos` and `sin`, bf16 [B, L, D], unless those are null.
void attend(
    const int64_t* shape, float scale, const int64_t* strides, const void* q, const void* k, const void* v, const void* cos, const void* sin,
    const void* ends, void* out, void* lse) {
  forward(
      shaped(shape, scale), strided(q, strides), strided(k, strides + 3), strided(v, strides + 6), {numbers(cos), numbers(sin)},
      static_cast<const int32_t*>(ends), static_cast<bf16*>(out), static_cast<float*>(lse));
}

// out [B, K, H, D] of the newest tokens' q [B, H, K, D], the rows' k and v [B, G, L, D], `seen` bool[B, K, L], and k and v
// [B, G, K, D] of `calls` calls. `shape` is B, H, G, L, D, K and calls; `strides` those of q, k and v, and of what `grown` points to.
void grow_branches(
    const int64_t* shape, float scale, const int64_t* strides, const void* q, const void* k, const void* v, const void* seen, const void* const* grown,
    void* out) {
  std::vector<Reading::Part> parts{{strided(k, strides + 3), strided(v, strides + 6), shape[3]}};
  for (int64_t call = 0; call < shape[6]; ++call)
    parts.push_back({strided(grown[2 * call], strides + 9 + 6 * call), strided(grown[2 * call + 1], strides + 12 + 6 * call), shape[5]});
  grow(shaped(shape, scale), shape[5], parts, strided(q, strides), static_cast<const uint8_t*>(seen), static_cast<bf16*>(out));
}

// dq [B, L, H, D], dk and dv [B, L, G, D], of q and k before rotation. `strides` are those of dout, q, k, v and out by row, head
// and token, and then those of dq, dk and dv by row, token and head.
void attend_backward(
    const int64_t* shape, float scale, const int64_t* strides, const void* dout, const void* q, const void* k, const void* v, const void* cos,
    const void* sin, const void* out, const void* lse, const void* ends, void* dq, void* dk, void* dv) {
  const Given given{
      strided(dout, strides), strided(q, strides + 3), strided(k, strides + 6), strided(v, strides + 9), strided(out, strides + 12),
      {numbers(cos), numbers(sin)}, static_cast<const float*>(lse), static_cast<const int32_t*>(ends)};
  backward(shaped(shape, scale), given, {target(dq, strides + 15), target(dk, strides + 18), target(dv, strides + 21)});
}
}
