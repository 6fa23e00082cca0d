// Products with weights of a byte each: int8 and FP8.

#include "products.h"

namespace {

// float8_e4m3fn. (The two numbers of it that are none are read as 480: there is no weight that is none.)
struct Float8 {
  uint8_t bits;
};

// A value of a byte as a float, and what is to be multiplied with it then.
inline vec value(const int8_t* p) { return converted(wide(p)); }
constexpr float unit(const int8_t*) { return 1.0f; }
// As a half, whose exponents are 8 higher; its smallest numbers are no denormals to a float.
inline vec value(const Float8* p) {
#if defined(__AVX512F__)
  const __m256i high = _mm256_slli_epi16(_mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)p)), 8);
  return (vec)_mm512_cvtph_ps(_mm256_and_si256(_mm256_srai_epi16(high, 1), _mm256_set1_epi16((short)0xbfff)));
#else
  const ivec bits = wide(reinterpret_cast<const uint8_t*>(p)), size = bits & 127;
  const vec large = (vec)((size << 20) + (112 << 23)), small = converted(size) * 0x1p-17f;
  return (vec)((ivec)(size < 8 ? small : large) | (bits & 128) << 24);
#endif
}
constexpr float unit(const Float8*) { return 256.0f; }

// Values of a byte [panels, D, 16] and their scales [panels, D / each, 16]: one for all inputs of an output, which the sum is
// multiplied with, or one for each group of them, which the values are.
template <class Value>
struct Bytes {
  const Value* w;
  const float* scales;
  i64 D, each;
  static constexpr int kRows = ALONE_ROWS;
  static constexpr i64 kApart = 5;
  static constexpr bool kPaired = false;
  Bytes alone() const { return *this; }
  Bytes at(i64 panel) const { return {w + panel * D * PANEL, scales + panel * (D / each) * PANEL, D, each}; }

  Apart apart(i64 count, float* to) const {
    const Value* from = w;
    for (i64 g = 0; g < count * (D / each); ++g)
      for (i64 d = 0; d < each; ++d, from += PANEL, to += PANEL)
        for (int c = 0; c < PANEL; c += LANES)
          store(to + c, each == D ? value(from + c) : value(from + c) * (load(scales + g * PANEL + c) * one));
    return {to - count * D * PANEL, D, each == D ? scales : nullptr, one};
  }

  template <int MR, int NP>
  void micro(const float* x, float* const* out, i64 at, Ahead&) const {
    each == D ? sums<MR, NP, false>(x, out, at) : sums<MR, NP, true>(x, out, at);
  }
  template <int MR, int NP, bool Grouped>
  void sums(const float* x, float* const* out, i64 at) const {
    const i64 groups = Grouped ? D / each : 1;
    auto scale = [&](int c, i64 g) { return load(scales + (c / VECTORS * groups + g) * PANEL + c % VECTORS * LANES) * one; };
    vec acc[MR][NP * VECTORS] = {}, shared[NP * VECTORS];
    for (i64 g = 0; g < groups; ++g) {
      for (int c = 0; Grouped && c < NP * VECTORS; ++c) shared[c] = scale(c, g);
#pragma GCC unroll 4
      for (i64 d = g * each; d < (g + 1) * each; ++d, x += MR)
        for (int c = 0; c < NP * VECTORS; ++c) {
          vec weight = value(w + (c / VECTORS * D + d) * PANEL + c % VECTORS * LANES);
          if (Grouped) weight *= shared[c];
          for (int r = 0; r < MR; ++r) acc[r][c] += splat(x[r]) * weight;
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r)
      for (int c = 0; c < NP * VECTORS; ++c)
        store(out[r] + at + c * LANES, Grouped ? acc[r][c] : acc[r][c] * scale(c, 0));
  }
  void add(i64, Ahead&) const {}

 private:
  static constexpr float one = unit(static_cast<const Value*>(nullptr));
};

template <class Value>
Bytes<Value> bytes(const Value* w, const float* scales, i64 D, i64 each) {
  return {w, scales, D, each};
}

// Calls with the values of a byte each as what they are. (FFI has no typed buffer of FP8.)
template <class Call>
ffi::Error with_bytes(const ffi::AnyBuffer& w, const Call& call) {
  if (w.element_type() == ffi::S8) return call(static_cast<const int8_t*>(w.untyped_data()));
  if (w.element_type() == ffi::F8E4M3FN) return call(static_cast<const Float8*>(w.untyped_data()));
  return misfit("w of int8 or float8_e4m3fn");
}
// Inputs that share one of `count` scales; 0 where they do not divide.
inline i64 each_of(i64 D, i64 count) { return count > 0 && D % count == 0 ? D / count : 0; }

ffi::Error linear8(ffi::ThreadPool pool, F32x2 x, ffi::AnyBuffer w, F32x3 scales, ffi::Result<F32x2> y) {
  const i64 T = x.dimensions()[0], D = x.dimensions()[1], N = y->dimensions()[1], panels = (N + PANEL - 1) / PANEL;
  const i64 each = each_of(D, scales.dimensions()[1]);
  if (!each || w.dimensions().size() != 3 || !fits(w, D, 1, panels) || !fits(scales, D, each, panels) ||
      y->dimensions()[0] != T)
    return misfit("w [panels, D, 16], scales [panels, 1 or groups, 16]");
  return with_bytes(w, [&](const auto* values) {
    multiply(pool, x.typed_data(), bytes(values, scales.typed_data(), D, each), y->typed_data(), T, D, N);
    return ffi::Error::Success();
  });
}

ffi::Error grouped8(ffi::ThreadPool pool, F32x2 x, ffi::AnyBuffer w, F32x4 scales, I32x1 sizes, ffi::Result<F32x2> y) {
  const i64 D = x.dimensions()[1], X = sizes.dimensions()[0], panels = (y->dimensions()[1] + PANEL - 1) / PANEL;
  const i64 each = each_of(D, scales.dimensions()[2]);
  if (!each || w.dimensions().size() != 4 || !fit_groups(w, X, D, 1, panels) || !fit_groups(scales, X, D, each, panels))
    return misfit("w [X, panels, D, 16], scales [X, panels, 1 or groups, 16]");
  return with_bytes(w, [&](const auto* values) {
    return multiply_groups(pool, x, bytes(values, scales.typed_data(), D, each), sizes, y);
  });
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(xlane_linear8, linear8,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<F32x2>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<F32x3>()
                                  .Ret<F32x2>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(xlane_grouped8, grouped8,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<F32x2>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<F32x4>()
                                  .Arg<I32x1>()
                                  .Ret<F32x2>());
