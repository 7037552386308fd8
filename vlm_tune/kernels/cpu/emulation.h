// AMX for CPUs without it: `_tile_*` written in AVX-512, and the AVX-512 that the kernels use written in plain C++ where a CPU
// lacks that too. Included by the compiler's command line before each source, so that the sources are the same for all CPUs.
//
// Emulated instructions round as the real ones do, with these exceptions: subnormal numbers are kept unless `vdpbf16ps` is there,
// 14-bit reciprocals are exact, and plain C++ fuses a product and a sum only where the CPU can.
#pragma once

#include <immintrin.h>

#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define EMULATION_HAS_AVX512 1
#else
#define EMULATION_HAS_AVX512 0
#endif

namespace emulation {
namespace {

#if EMULATION_HAS_AVX512
constexpr int PARTS = 1;
#elif defined(__AVX__)
constexpr int PARTS = 2;
#else
constexpr int PARTS = 4;
#endif

// What a register of this CPU holds of 16 numbers of 32 bits.
using FloatPart = float __attribute__((vector_size(64 / PARTS)));
using IntPart = int32_t __attribute__((vector_size(64 / PARTS)));
using BitPart = uint32_t __attribute__((vector_size(64 / PARTS)));
constexpr int LANES = 16 / PARTS;

using Floats = std::array<float, 16>;
using Ints = std::array<int32_t, 16>;
using Words = std::array<uint16_t, 32>;
using HalfWords = std::array<uint16_t, 16>;

#if !EMULATION_HAS_AVX512

// Registers of AVX-512 as several of this CPU, whatever they hold, and halves of them.
struct Register {
  FloatPart part[PARTS];
};
struct HalfRegister {
  alignas(32) HalfWords words;
};

#undef __m512
#undef __m512i
#undef __m512bh
#undef __m256i
#define __m512 emulation::Register
#define __m512i emulation::Register
#define __m512bh emulation::Register
#define __m256i emulation::HalfRegister

#endif

// The numbers of a register, and a register of numbers.
template <typename Numbers, typename From>
Numbers lanes(const From& from) {
  static_assert(sizeof(Numbers) == sizeof(From));
  Numbers to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}
template <typename To, typename Numbers>
To register_of(const Numbers& from) {
  static_assert(sizeof(Numbers) == sizeof(To));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

// --- AVX-512 in plain C++ -------------------------------------------------------------------------------------------

#if !EMULATION_HAS_AVX512

template <typename Of>
Register parts_of(Of of) {
  Register to;
#pragma GCC unroll 4
  for (int p = 0; p < PARTS; ++p) to.part[p] = (FloatPart)of(p);
  return to;
}
inline FloatPart floats(const Register& a, int p) { return a.part[p]; }
inline IntPart ints(const Register& a, int p) { return (IntPart)a.part[p]; }
inline BitPart bits(const Register& a, int p) { return (BitPart)a.part[p]; }

inline Register add_ps(Register a, Register b) { return parts_of([&](int p) { return floats(a, p) + floats(b, p); }); }
inline Register sub_ps(Register a, Register b) { return parts_of([&](int p) { return floats(a, p) - floats(b, p); }); }
inline Register mul_ps(Register a, Register b) { return parts_of([&](int p) { return floats(a, p) * floats(b, p); }); }
inline Register div_ps(Register a, Register b) { return parts_of([&](int p) { return floats(a, p) / floats(b, p); }); }
inline Register fmadd_ps(Register a, Register b, Register c) { return parts_of([&](int p) { return floats(a, p) * floats(b, p) + floats(c, p); }); }
inline Register fnmadd_ps(Register a, Register b, Register c) { return parts_of([&](int p) { return floats(c, p) - floats(a, p) * floats(b, p); }); }
inline Register fmsub_ps(Register a, Register b, Register c) { return parts_of([&](int p) { return floats(a, p) * floats(b, p) - floats(c, p); }); }
inline Register max_ps(Register a, Register b) { return parts_of([&](int p) { return floats(a, p) > floats(b, p) ? floats(a, p) : floats(b, p); }); }
inline Register min_ps(Register a, Register b) { return parts_of([&](int p) { return floats(a, p) < floats(b, p) ? floats(a, p) : floats(b, p); }); }
inline Register add_epi32(Register a, Register b) { return parts_of([&](int p) { return bits(a, p) + bits(b, p); }); }
inline Register sub_epi32(Register a, Register b) { return parts_of([&](int p) { return bits(a, p) - bits(b, p); }); }
inline Register max_epi32(Register a, Register b) { return parts_of([&](int p) { return ints(a, p) > ints(b, p) ? ints(a, p) : ints(b, p); }); }
inline Register and_si512(Register a, Register b) { return parts_of([&](int p) { return bits(a, p) & bits(b, p); }); }
inline Register slli_epi32(Register a, int by) { return parts_of([&](int p) { return bits(a, p) << by; }); }
inline Register set1_ps(float x) { return parts_of([&](int) { return FloatPart{} + x; }); }
inline Register set1_epi32(int x) { return parts_of([&](int) { return IntPart{} + x; }); }
inline Register setzero() { return set1_ps(0); }

template <typename Numbers, typename Of>
Register lanes_of(Of of) {
  Numbers to;
  for (size_t i = 0; i < to.size(); ++i) to[i] = static_cast<typename Numbers::value_type>(of(i));
  return register_of<Register>(to);
}
inline Register set1_epi16(int x) {
  return lanes_of<Words>([&](size_t) { return x; });
}
template <typename... Number>
Register set_epi32(Number... highest_first) {
  const Ints given{static_cast<int32_t>(highest_first)...};
  return lanes_of<Ints>([&](size_t i) { return given[15 - i]; });
}
template <typename... Number>
Register set_epi16(Number... highest_first) {
  const Words given{static_cast<uint16_t>(highest_first)...};
  return lanes_of<Words>([&](size_t i) { return given[31 - i]; });
}
inline Register add_epi16(Register a, Register b) {
  const Words x = lanes<Words>(a), y = lanes<Words>(b);
  return lanes_of<Words>([&](size_t i) { return x[i] + y[i]; });
}
inline Register same(Register a) { return a; }

inline Register loadu(const void* from) {
  Register to;
  std::memcpy(&to, from, 64);
  return to;
}
inline void storeu(void* to, Register a) { std::memcpy(to, &a, 64); }
inline HalfRegister half_loadu(const void* from) {
  HalfRegister to;
  std::memcpy(&to, from, 32);
  return to;
}
inline void half_storeu(void* to, HalfRegister a) { std::memcpy(to, &a, 32); }

// Masked ones touch no memory where the mask is 0.
template <typename Numbers>
Register mask_loadu(Register other, uint32_t mask, const void* from) {
  if (mask == (1ull << std::tuple_size_v<Numbers>) - 1) return loadu(from);
  Numbers to = lanes<Numbers>(other);
  for (size_t i = 0; i < to.size(); ++i)
    if (mask >> i & 1) to[i] = static_cast<const typename Numbers::value_type*>(from)[i];
  return register_of<Register>(to);
}
template <typename Numbers, typename From>
void mask_storeu(void* to, uint32_t mask, const From& a) {
  if (mask == (1ull << std::tuple_size_v<Numbers>) - 1) return static_cast<void>(std::memcpy(to, &a, sizeof(a)));
  const Numbers from = lanes<Numbers>(a);
  for (size_t i = 0; i < from.size(); ++i)
    if (mask >> i & 1) static_cast<typename Numbers::value_type*>(to)[i] = from[i];
}
inline Register maskz_loadu_epi16(__mmask32 mask, const void* from) { return mask_loadu<Words>(setzero(), mask, from); }
inline Register maskz_loadu_epi32(__mmask16 mask, const void* from) { return mask_loadu<Ints>(setzero(), mask, from); }
inline Register maskz_loadu_ps(__mmask16 mask, const void* from) { return mask_loadu<Floats>(setzero(), mask, from); }
inline Register mask_loadu_ps(Register other, __mmask16 mask, const void* from) { return mask_loadu<Floats>(other, mask, from); }
inline void mask_storeu_epi16(void* to, __mmask32 mask, Register a) { mask_storeu<Words>(to, mask, a); }
inline void mask_storeu_ps(void* to, __mmask16 mask, Register a) { mask_storeu<Floats>(to, mask, a); }
inline void half_mask_storeu_epi16(void* to, __mmask16 mask, HalfRegister a) { mask_storeu<HalfWords>(to, mask, a); }
inline Register mask_expandloadu_ps(Register other, __mmask16 mask, const void* from) {
  Floats to = lanes<Floats>(other);
  const float* next = static_cast<const float*>(from);
  for (size_t i = 0; i < 16; ++i)
    if (mask >> i & 1) to[i] = *next++;
  return register_of<Register>(to);
}

inline float reduce_add_ps(Register a) {
  Floats x = lanes<Floats>(a);
  for (int count = 8; count; count /= 2)
    for (int i = 0; i < count; ++i) x[i] += x[i + count];
  return x[0];
}
// The numbers of one where the mask is 1, of the other where it is 0.
inline Register select(__mmask16 mask, Register yes, Register no) {
  IntPart own;
  for (int i = 0; i < LANES; ++i) own[i] = 1 << i;
  return parts_of([&](int p) { return (own & (mask >> p * LANES)) != 0 ? floats(yes, p) : floats(no, p); });
}
inline Register mask_max_ps(Register other, __mmask16 mask, Register a, Register b) { return select(mask, max_ps(a, b), other); }
inline Register mask_mov_ps(Register other, __mmask16 mask, Register a) { return select(mask, a, other); }
inline Register maskz_mov_ps(__mmask16 mask, Register a) { return select(mask, a, setzero()); }
inline Register maskz_div_ps(__mmask16 mask, Register a, Register b) { return select(mask, div_ps(a, b), setzero()); }
inline Register rcp14_ps(Register a) { return div_ps(set1_ps(1), a); }
// One bit a number, from -1 and 0.
template <typename Of>
__mmask16 mask_of(Of of) {
  uint32_t found = 0;
  for (int p = 0; p < PARTS; ++p) {
    const IntPart part = of(p);
    for (int i = 0; i < LANES; ++i) found |= (part[i] & 1u) << (p * LANES + i);
  }
  return static_cast<__mmask16>(found);
}
template <int HOW>
__mmask16 compared(Register a, Register b) {
  static_assert(HOW == _CMP_EQ_OQ || HOW == _CMP_GT_OQ || HOW == _CMP_NLE_UQ);
  return mask_of([&](int p) {
    if constexpr (HOW == _CMP_EQ_OQ) return (IntPart)(floats(a, p) == floats(b, p));
    else if constexpr (HOW == _CMP_GT_OQ) return (IntPart)(floats(a, p) > floats(b, p));
    else return ~(IntPart)(floats(a, p) <= floats(b, p));
  });
}
inline __mmask16 cmplt_epu32_mask(Register a, Register b) {
  return mask_of([&](int p) { return (IntPart)(bits(a, p) < bits(b, p)); });
}
inline __mmask16 cmpneq_epi32_mask(Register a, Register b) {
  return mask_of([&](int p) { return (IntPart)(ints(a, p) != ints(b, p)); });
}

// The nearest whole number, the even one of two: beyond 2^22 there is no other near.
inline FloatPart nearest(FloatPart x) {
  const FloatPart large = FloatPart{} + 0x1.8p23f, limit = FloatPart{} + 0x1p22f;
  return x >= limit || x <= -limit ? x : (x + large) - large;
}
inline FloatPart below(FloatPart x) {
  const FloatPart near = nearest(x);
  return near > x ? near - 1.f : near;
}
template <int HOW>
Register rounded_scale(Register a) {
  static_assert(HOW == 8 || HOW == 9);  // to the nearest, or down
  return parts_of([&](int p) { return HOW == 8 ? nearest(floats(a, p)) : below(floats(a, p)); });
}
template <int HOW>
Register mask_rounded_scale(Register other, __mmask16 mask, Register a) {
  return select(mask, rounded_scale<HOW>(a), other);
}
// What is above the whole number below; nothing of what is infinite.
inline Register reduce_ps(Register a, int) {
  return parts_of([&](int p) {
    const FloatPart x = floats(a, p), most = FloatPart{} + __FLT_MAX__;
    return x > most || x < -most ? FloatPart{} : x - below(x);
  });
}
// a times two to the power of the whole number below b, in two steps, for one may be beyond fp32.
inline Register scalef_ps(Register a, Register b) {
  return parts_of([&](int p) {
    const FloatPart y = floats(b, p), limit = FloatPart{} + 250.f;
    const IntPart whole = __builtin_convertvector(below(y < -limit ? -limit : y > limit ? limit : y), IntPart), half = whole >> 1;
    const auto power = [](IntPart exponent) { return (FloatPart)((exponent + 127) << 23); };
    return y != y ? y : floats(a, p) * power(half) * power(whole - half);
  });
}
inline Register maskz_scalef_ps(__mmask16 mask, Register a, Register b) { return select(mask, scalef_ps(a, b), setzero()); }
inline Register getexp_ps(Register a) {
  const Floats x = lanes<Floats>(a);
  return lanes_of<Floats>([&](size_t i) { return std::logb(x[i]); });
}
// The mantissa between 3/4 and 3/2: the only way of taking it that is used.
template <int INTERVAL>
Register mantissa(Register a, int) {
  static_assert(INTERVAL == _MM_MANT_NORM_p75_1p5);
  const Floats x = lanes<Floats>(a);
  return lanes_of<Floats>([&](size_t i) {
    int exponent;
    const float half = std::frexp(x[i], &exponent);
    return std::isfinite(x[i]) && x[i] != 0 ? (std::abs(half) < 0.75f ? half * 2 : half) : std::copysign(1.f, x[i]);
  });
}

inline Register cvtepu16_epi32(HalfRegister a) {
  return lanes_of<Ints>([&](size_t i) { return a.words[i]; });
}
template <int HALF>
HalfRegister half_of(Register a) {
  HalfRegister to;
  std::memcpy(&to, reinterpret_cast<const char*>(&a) + HALF * 32, 32);
  return to;
}

inline Register permutexvar_epi16(Register order, Register a) {
  const Words from = lanes<Words>(order), x = lanes<Words>(a);
  return lanes_of<Words>([&](size_t i) { return x[from[i] % 32]; });
}
inline Register permutex2var_epi16(Register a, Register order, Register b) {
  const Words from = lanes<Words>(order), x = lanes<Words>(a), y = lanes<Words>(b);
  return lanes_of<Words>([&](size_t i) { return (from[i] & 32 ? y : x)[from[i] % 32]; });
}
inline Register permutex2var_ps(Register a, Register order, Register b) {
  const Ints from = lanes<Ints>(order);
  const Floats x = lanes<Floats>(a), y = lanes<Floats>(b);
  return lanes_of<Floats>([&](size_t i) { return (from[i] & 16 ? y : x)[from[i] % 16]; });
}
// Numbers of two registers in turn, of the lower or the upper half of each 128 bits.
template <typename Number, int HALF>
Register unpack(Register a, Register b) {
  constexpr size_t own = 16 / sizeof(Number);
  using Numbers = std::array<Number, 64 / sizeof(Number)>;
  const Numbers x = lanes<Numbers>(a), y = lanes<Numbers>(b);
  return lanes_of<Numbers>([&](size_t i) { return (i % 2 ? y : x)[i / own * own + HALF * own / 2 + i % own / 2]; });
}
template <int HOW>
Register shuffle_i32x4(Register a, Register b) {
  const Ints x = lanes<Ints>(a), y = lanes<Ints>(b);
  return lanes_of<Ints>([&](size_t i) { return (i < 8 ? x : y)[(HOW >> i / 4 * 2 & 3) * 4 + i % 4]; });
}

#undef _mm512_add_ps
#undef _mm512_sub_ps
#undef _mm512_mul_ps
#undef _mm512_div_ps
#undef _mm512_fmadd_ps
#undef _mm512_fnmadd_ps
#undef _mm512_fmsub_ps
#undef _mm512_set1_ps
#undef _mm512_set1_epi32
#undef _mm512_set1_epi16
#undef _mm512_setzero_ps
#undef _mm512_setzero_si512
#undef _mm512_set_epi32
#undef _mm512_set_epi16
#undef _mm512_castps_si512
#undef _mm512_castsi512_ps
#undef _mm512_castsi512_si256
#undef _mm512_load_ps
#undef _mm512_loadu_ps
#undef _mm512_load_si512
#undef _mm512_loadu_si512
#undef _mm512_store_ps
#undef _mm512_storeu_ps
#undef _mm512_store_si512
#undef _mm512_stream_si512
#undef _mm512_storeu_si512
#undef _mm256_loadu_si256
#undef _mm256_store_si256
#undef _mm256_storeu_si256
#undef _mm512_maskz_loadu_epi16
#undef _mm512_maskz_loadu_epi32
#undef _mm512_maskz_loadu_ps
#undef _mm512_mask_loadu_ps
#undef _mm512_mask_storeu_epi16
#undef _mm512_mask_storeu_ps
#undef _mm256_mask_storeu_epi16
#undef _mm512_mask_expandloadu_ps
#undef _mm512_reduce_add_ps
#undef _mm512_max_ps
#undef _mm512_min_ps
#undef _mm512_mask_max_ps
#undef _mm512_mask_mov_ps
#undef _mm512_maskz_mov_ps
#undef _mm512_maskz_div_ps
#undef _mm512_rcp14_ps
#undef _mm512_cmp_ps_mask
#undef _mm512_roundscale_ps
#undef _mm512_mask_roundscale_ps
#undef _mm512_reduce_ps
#undef _mm512_scalef_ps
#undef _mm512_maskz_scalef_ps
#undef _mm512_getexp_ps
#undef _mm512_getmant_ps
#undef _mm512_add_epi32
#undef _mm512_sub_epi32
#undef _mm512_max_epi32
#undef _mm512_add_epi16
#undef _mm512_and_si512
#undef _mm512_slli_epi32
#undef _mm512_cmplt_epu32_mask
#undef _mm512_cmpneq_epi32_mask
#undef _mm512_cvtepu16_epi32
#undef _mm512_extracti64x4_epi64
#undef _mm512_permutexvar_epi16
#undef _mm512_permutex2var_epi16
#undef _mm512_permutex2var_ps
#undef _mm512_unpacklo_epi16
#undef _mm512_unpackhi_epi16
#undef _mm512_unpacklo_epi32
#undef _mm512_unpackhi_epi32
#undef _mm512_unpacklo_epi64
#undef _mm512_unpackhi_epi64
#undef _mm512_shuffle_i32x4

#define _mm512_add_ps emulation::add_ps
#define _mm512_sub_ps emulation::sub_ps
#define _mm512_mul_ps emulation::mul_ps
#define _mm512_div_ps emulation::div_ps
#define _mm512_fmadd_ps emulation::fmadd_ps
#define _mm512_fnmadd_ps emulation::fnmadd_ps
#define _mm512_fmsub_ps emulation::fmsub_ps
#define _mm512_set1_ps emulation::set1_ps
#define _mm512_set1_epi32 emulation::set1_epi32
#define _mm512_set1_epi16 emulation::set1_epi16
#define _mm512_setzero_ps emulation::setzero
#define _mm512_setzero_si512 emulation::setzero
#define _mm512_set_epi32 emulation::set_epi32
#define _mm512_set_epi16 emulation::set_epi16
#define _mm512_castps_si512 emulation::same
#define _mm512_castsi512_ps emulation::same
#define _mm512_castsi512_si256 emulation::half_of<0>
#define _mm512_load_ps emulation::loadu
#define _mm512_loadu_ps emulation::loadu
#define _mm512_load_si512 emulation::loadu
#define _mm512_loadu_si512 emulation::loadu
#define _mm512_store_ps emulation::storeu
#define _mm512_storeu_ps emulation::storeu
#define _mm512_store_si512 emulation::storeu
#define _mm512_stream_si512 emulation::storeu
#define _mm512_storeu_si512 emulation::storeu
#define _mm256_loadu_si256 emulation::half_loadu
#define _mm256_store_si256 emulation::half_storeu
#define _mm256_storeu_si256 emulation::half_storeu
#define _mm512_maskz_loadu_epi16 emulation::maskz_loadu_epi16
#define _mm512_maskz_loadu_epi32 emulation::maskz_loadu_epi32
#define _mm512_maskz_loadu_ps emulation::maskz_loadu_ps
#define _mm512_mask_loadu_ps emulation::mask_loadu_ps
#define _mm512_mask_storeu_epi16 emulation::mask_storeu_epi16
#define _mm512_mask_storeu_ps emulation::mask_storeu_ps
#define _mm256_mask_storeu_epi16 emulation::half_mask_storeu_epi16
#define _mm512_mask_expandloadu_ps emulation::mask_expandloadu_ps
#define _mm512_reduce_add_ps emulation::reduce_add_ps
#define _mm512_max_ps emulation::max_ps
#define _mm512_min_ps emulation::min_ps
#define _mm512_mask_max_ps emulation::mask_max_ps
#define _mm512_mask_mov_ps emulation::mask_mov_ps
#define _mm512_maskz_mov_ps emulation::maskz_mov_ps
#define _mm512_maskz_div_ps emulation::maskz_div_ps
#define _mm512_rcp14_ps emulation::rcp14_ps
#define _mm512_cmp_ps_mask(a, b, how) emulation::compared<how>(a, b)
#define _mm512_roundscale_ps(a, how) emulation::rounded_scale<how>(a)
#define _mm512_mask_roundscale_ps(other, mask, a, how) emulation::mask_rounded_scale<how>(other, mask, a)
#define _mm512_reduce_ps emulation::reduce_ps
#define _mm512_scalef_ps emulation::scalef_ps
#define _mm512_maskz_scalef_ps emulation::maskz_scalef_ps
#define _mm512_getexp_ps emulation::getexp_ps
#define _mm512_getmant_ps(a, interval, sign) emulation::mantissa<interval>(a, sign)
#define _mm512_add_epi32 emulation::add_epi32
#define _mm512_sub_epi32 emulation::sub_epi32
#define _mm512_max_epi32 emulation::max_epi32
#define _mm512_add_epi16 emulation::add_epi16
#define _mm512_and_si512 emulation::and_si512
#define _mm512_slli_epi32 emulation::slli_epi32
#define _mm512_cmplt_epu32_mask emulation::cmplt_epu32_mask
#define _mm512_cmpneq_epi32_mask emulation::cmpneq_epi32_mask
#define _mm512_cvtepu16_epi32 emulation::cvtepu16_epi32
#define _mm512_extracti64x4_epi64(a, half) emulation::half_of<half>(a)
#define _mm512_permutexvar_epi16 emulation::permutexvar_epi16
#define _mm512_permutex2var_epi16 emulation::permutex2var_epi16
#define _mm512_permutex2var_ps emulation::permutex2var_ps
#define _mm512_unpacklo_epi16 emulation::unpack<uint16_t, 0>
#define _mm512_unpackhi_epi16 emulation::unpack<uint16_t, 1>
#define _mm512_unpacklo_epi32 emulation::unpack<uint32_t, 0>
#define _mm512_unpackhi_epi32 emulation::unpack<uint32_t, 1>
#define _mm512_unpacklo_epi64 emulation::unpack<uint64_t, 0>
#define _mm512_unpackhi_epi64 emulation::unpack<uint64_t, 1>
#define _mm512_shuffle_i32x4(a, b, how) emulation::shuffle_i32x4<how>(a, b)

#endif  // !EMULATION_HAS_AVX512

// --- bf16 -----------------------------------------------------------------------------------------------------------

#if !(EMULATION_HAS_AVX512 && defined(__AVX512BF16__))

// To the nearest bf16, the even one of two; what is no number stays none.
inline BitPart rounded(FloatPart x) {
  const BitPart own = (BitPart)x, even = (own + 0x7fffu + (own >> 16 & 1u)) >> 16, none = own >> 16 | 0x40u;
  return x == x ? even : none;
}
inline void narrow(__m512 a, uint16_t* to) {
  FloatPart from[PARTS];
  std::memcpy(from, &a, 64);
  for (int p = 0; p < PARTS; ++p) {
    const BitPart part = rounded(from[p]);
    for (int i = 0; i < LANES; ++i) to[p * LANES + i] = static_cast<uint16_t>(part[i]);
  }
}
inline __m512i cvtne2ps_pbh(__m512 high, __m512 low) {
  Words to;
  narrow(low, to.data());
  narrow(high, to.data() + 16);
  return register_of<__m512i>(to);
}
inline __m256i cvtneps_pbh(__m512 a) {
  HalfWords to;
  narrow(a, to.data());
  return register_of<__m256i>(to);
}
inline __m512 even_of(__m512i pairs) { return _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)); }
inline __m512 odd_of(__m512i pairs) { return _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(-65536))); }
template <typename Pairs>
__m512 dpbf16_ps(__m512 sum, const Pairs& a, const Pairs& b) {
  sum = _mm512_fmadd_ps(odd_of((__m512i)a), odd_of((__m512i)b), sum);
  return _mm512_fmadd_ps(even_of((__m512i)a), even_of((__m512i)b), sum);
}

#undef _mm512_cvtne2ps_pbh
#undef _mm512_cvtneps_pbh
#undef _mm512_dpbf16_ps
#define _mm512_cvtne2ps_pbh emulation::cvtne2ps_pbh
#define _mm512_cvtneps_pbh emulation::cvtneps_pbh
#define _mm512_dpbf16_ps emulation::dpbf16_ps

#endif  // without bf16

// --- AMX ------------------------------------------------------------------------------------------------------------

// Eight tiles of 16 rows of 64 bytes: the only configuration that is used.
struct alignas(64) Tile {
  uint8_t rows[16][64];
};
static thread_local Tile tiles[8];

inline void zero(Tile& tile) {
  for (auto& row : tile.rows) _mm512_store_si512(row, _mm512_setzero_si512());
}
inline void load(Tile& tile, const void* from, int64_t stride) {
  for (int64_t i = 0; i < 16; ++i) _mm512_store_si512(tile.rows[i], _mm512_loadu_si512(static_cast<const char*>(from) + i * stride));
}
inline void store(const Tile& tile, void* to, int64_t stride) {
  for (int64_t i = 0; i < 16; ++i) _mm512_storeu_si512(static_cast<char*>(to) + i * stride, _mm512_load_si512(tile.rows[i]));
}

// Adds to fp32 sums [16][16] the product of bf16 [16 rows][16 pairs] and [16 pairs][16 columns].
#if EMULATION_HAS_AVX512 && defined(__AVX512BF16__)

inline void multiply(Tile& sums, const Tile& rows, const Tile& columns) {
  __m512 found[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) found[i] = _mm512_load_ps(sums.rows[i]);
  for (int k = 0; k < 16; ++k) {
    const __m512bh pairs = (__m512bh)_mm512_load_si512(columns.rows[k]);
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) {
      int32_t pair;
      std::memcpy(&pair, rows.rows[i] + k * 4, 4);
      found[i] = _mm512_dpbf16_ps(found[i], (__m512bh)_mm512_set1_epi32(pair), pairs);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) _mm512_store_ps(sums.rows[i], found[i]);
}

#else

// Products are of fp32 numbers, the even ones of pairs and then the odd ones, and are added to the sums when they are summed.
inline void multiply(Tile& sums, const Tile& rows, const Tile& columns) {
  constexpr int some = EMULATION_HAS_AVX512 ? 16 : 4;  // rows whose sums the registers hold
  alignas(64) float of_rows[2][16][16], of_columns[2][16][16], found[16][16];
  for (int i = 0; i < 16; ++i) {
    const __m512i row = _mm512_load_si512(rows.rows[i]), column = _mm512_load_si512(columns.rows[i]);
    _mm512_store_ps(of_rows[0][i], even_of(row));
    _mm512_store_ps(of_rows[1][i], odd_of(row));
    _mm512_store_ps(of_columns[0][i], even_of(column));
    _mm512_store_ps(of_columns[1][i], odd_of(column));
  }
  for (int first = 0; first < 16; first += some) {
    FloatPart sum[some][PARTS] = {};
    for (int odd = 0; odd < 2; ++odd)
      for (int k = 0; k < 16; ++k) {
        FloatPart column[PARTS];
        std::memcpy(column, of_columns[odd][k], 64);
#pragma GCC unroll 16
        for (int i = 0; i < some; ++i)
#pragma GCC unroll 4
          for (int part = 0; part < PARTS; ++part) sum[i][part] += of_rows[odd][first + i][k] * column[part];
      }
    std::memcpy(found[first], sum, sizeof(sum));
  }
  for (int i = 0; i < 16; ++i) _mm512_store_ps(sums.rows[i], _mm512_add_ps(_mm512_load_ps(sums.rows[i]), _mm512_load_ps(found[i])));
}

#endif

}  // namespace
}  // namespace emulation

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stream_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_loadconfig(configuration) static_cast<void>(configuration)
#define _tile_release() static_cast<void>(0)
#define _tile_zero(to) emulation::zero(emulation::tiles[to])
#define _tile_loadd(to, from, stride) emulation::load(emulation::tiles[to], from, stride)
#define _tile_stream_loadd(to, from, stride) emulation::load(emulation::tiles[to], from, stride)
#define _tile_stored(from, to, stride) emulation::store(emulation::tiles[from], to, stride)
#define _tile_dpbf16ps(sums, rows, columns) emulation::multiply(emulation::tiles[sums], emulation::tiles[rows], emulation::tiles[columns])
