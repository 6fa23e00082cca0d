// Products with weights of 4 bits.

#include "products.h"

namespace {

using U8x3 = ffi::Buffer<ffi::U8, 3>;
using U8x4 = ffi::Buffer<ffi::U8, 4>;
using BF16x3 = ffi::Buffer<ffi::BF16, 3>;
using BF16x4 = ffi::Buffer<ffi::BF16, 4>;

// Two values of 4 bits, both of one output.
struct Pair {
  vec low, high;
};
inline Pair pair(const uint8_t* p) {
  const ivec bits = wide(p);
#if defined(__AVX512F__)
  // The low 4 bits of an index choose among 16 numbers: mask and conversion in one instruction.
  const __m512 steps = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  return {(vec)_mm512_permutexvar_ps((__m512i)bits, steps), (vec)_mm512_permutexvar_ps((__m512i)(bits >> 4), steps)};
#else
  return {converted(bits & 15), converted(bits >> 4)};
#endif
}
inline vec from_bfloat16(const uint16_t* p) { return (vec)(wide(p) << 16); }

// Values of 4 bits [panels, D/2, 16], input i of a group of GROUP beside input i + GROUP/2, with bfloat16 scales and floors
// [panels, D/GROUP, 16]; models/quantize.py makes them. Rows are packed in pairs, too.
struct Int4 {
  const uint8_t* w;
  const uint16_t *scales, *floors;
  i64 D;
  static constexpr int kRows = ALONE_ROWS;
  static constexpr i64 kApart = 3;
  static constexpr bool kPaired = true;
  Int4 alone() const { return *this; }
  Int4 at(i64 panel) const {
    const i64 group = panel * (D / GROUP) * PANEL;
    return {w + panel * (D / 2) * PANEL, scales + group, floors + group, D};
  }
  Apart apart(i64 count, float* to) const {
    const uint8_t* from = w;
    for (i64 g = 0; g < count * (D / GROUP); ++g)
      for (i64 i = 0; i < GROUP / 2; ++i, from += PANEL, to += 2 * PANEL)
        for (int c = 0; c < PANEL; c += LANES) {
          const vec scale = from_bfloat16(scales + g * PANEL + c), floor = from_bfloat16(floors + g * PANEL + c);
          const Pair two = pair(from + c);
          store(to + c, two.low * scale + floor), store(to + PANEL + c, two.high * scale + floor);
        }
    return {to - count * D * PANEL, D, nullptr, 1.0f};
  }

  template <int MR, int NP>
  void micro(const float* x, float* const* out, i64 at, Ahead&) const {
    vec acc[MR][NP * VECTORS] = {};
    for (i64 g = 0; g < D / GROUP; ++g, x += GROUP * MR) {
      vec scale[NP * VECTORS], floor[NP * VECTORS];
      for (int c = 0; c < NP * VECTORS; ++c) {
        const i64 scales_at = (c / VECTORS * (D / GROUP) + g) * PANEL + c % VECTORS * LANES;
        scale[c] = from_bfloat16(scales + scales_at), floor[c] = from_bfloat16(floors + scales_at);
      }
#pragma GCC unroll 4
      for (int i = 0; i < GROUP / 2; ++i)
        for (int c = 0; c < NP * VECTORS; ++c) {
          const Pair two = pair(w + (c / VECTORS * (D / 2) + g * (GROUP / 2) + i) * PANEL + c % VECTORS * LANES);
          const vec low = two.low * scale[c] + floor[c], high = two.high * scale[c] + floor[c];
          for (int r = 0; r < MR; ++r) acc[r][c] += splat(x[2 * i * MR + r]) * low;
          for (int r = 0; r < MR; ++r) acc[r][c] += splat(x[(2 * i + 1) * MR + r]) * high;
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r)
      for (int c = 0; c < NP * VECTORS; ++c) store(out[r] + at + c * LANES, acc[r][c]);
  }
  void add(i64, Ahead&) const {}
};

template <class Buffer>
inline const uint16_t* bits(const Buffer& bfloat16) { return static_cast<const uint16_t*>(bfloat16.untyped_data()); }

ffi::Error linear4(ffi::ThreadPool pool, F32x2 x, U8x3 w, BF16x3 scales, BF16x3 floors, ffi::Result<F32x2> y) {
  const i64 T = x.dimensions()[0], D = x.dimensions()[1], N = y->dimensions()[1], panels = (N + PANEL - 1) / PANEL;
  if (!fits(w, D, 2, panels) || !fits(scales, D, GROUP, panels) || !fits(floors, D, GROUP, panels) || y->dimensions()[0] != T)
    return misfit("w [panels, D/2, 16], scales and floors [panels, D/32, 16]");
  multiply(pool, x.typed_data(), Int4{w.typed_data(), bits(scales), bits(floors), D}, y->typed_data(), T, D, N);
  return ffi::Error::Success();
}

ffi::Error grouped4(ffi::ThreadPool pool, F32x2 x, U8x4 w, BF16x4 scales, BF16x4 floors, I32x1 sizes,
                    ffi::Result<F32x2> y) {
  const i64 D = x.dimensions()[1], X = sizes.dimensions()[0], panels = (y->dimensions()[1] + PANEL - 1) / PANEL;
  if (!fit_groups(w, X, D, 2, panels) || !fit_groups(scales, X, D, GROUP, panels) || !fit_groups(floors, X, D, GROUP, panels))
    return misfit("w [X, panels, D/2, 16], scales and floors [X, panels, D/32, 16]");
  return multiply_groups(pool, x, Int4{w.typed_data(), bits(scales), bits(floors), D}, sizes, y);
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(xlane_linear4, linear4,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<F32x2>()
                                  .Arg<U8x3>()
                                  .Arg<BF16x3>()
                                  .Arg<BF16x3>()
                                  .Ret<F32x2>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(xlane_grouped4, grouped4,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<F32x2>()
                                  .Arg<U8x4>()
                                  .Arg<BF16x4>()
                                  .Arg<BF16x4>()
                                  .Arg<I32x1>()
                                  .Ret<F32x2>());
