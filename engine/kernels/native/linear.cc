// Products with weights of float32.

#include "products.h"

namespace {

// ALONE: one tile is all that reads them. (A kind of its own: a loop that decides has too few registers.)
template <bool ALONE>
struct Floats {
  static constexpr int kRows = ALONE ? ALONE_ROWS : MAX_ROWS;
  static constexpr i64 kApart = 0;
  static constexpr bool kPaired = false;
  const float* w;
  i64 D;
  Floats at(i64 panel) const { return {w + panel * D * PANEL, D}; }
  Floats<true> alone() const { return {w, D}; }
  void add(i64 count, Ahead& ahead) const { ahead.add(w, count * D * PANEL); }

  template <int MR, int NP>
  void micro(const float* x, float* const* out, i64 at, Ahead& ahead) const {
    vec acc[MR][NP * VECTORS] = {};
    const float* panel = w;
    auto step = [&] {
      vec weights[NP * VECTORS];
      for (int c = 0; c < NP * VECTORS; ++c) weights[c] = load(panel + c / VECTORS * D * PANEL + c % VECTORS * LANES);
      for (int r = 0; r < MR; ++r)
        for (int c = 0; c < NP * VECTORS; ++c) acc[r][c] += splat(x[r]) * weights[c];
      x += MR, panel += PANEL;
    };
    i64 d = 0;
    for (; d + 8 <= D; d += 8) {
      if constexpr (ALONE)
        read_on(w, NP, D * LINE, d * LINE);  // a line is a step of a panel
      else
        ahead.fetch(ahead.each);
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) step();
    }
    for (; d < D; ++d) step();
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r)
      for (int c = 0; c < NP * VECTORS; ++c) store(out[r] + at + c * LANES, acc[r][c]);
  }
};

using Float32 = Floats<false>;

ffi::Error linear(ffi::ThreadPool pool, F32x2 x, F32x3 w, ffi::Result<F32x2> y) {
  const i64 T = x.dimensions()[0], D = x.dimensions()[1], N = y->dimensions()[1];
  if (!fits(w, D, 1, (N + PANEL - 1) / PANEL) || y->dimensions()[0] != T) return misfit("w [panels, D, 16]");
  multiply(pool, x.typed_data(), Float32{w.typed_data(), D}, y->typed_data(), T, D, N);
  return ffi::Error::Success();
}

ffi::Error grouped(ffi::ThreadPool pool, F32x2 x, F32x4 w, I32x1 sizes, ffi::Result<F32x2> y) {
  const i64 D = x.dimensions()[1], X = sizes.dimensions()[0], panels = (y->dimensions()[1] + PANEL - 1) / PANEL;
  if (!fit_groups(w, X, D, 1, panels)) return misfit("w [X, panels, D, 16]");
  return multiply_groups(pool, x, Float32{w.typed_data(), D}, sizes, y);
}

}  // namespace

void xlane::times_floats(int rows, const float* panels, i64 D, const float* x, i64 count, float* const* out, i64 at) {
  Ahead none;
  run_tile(rows, Float32{panels, D}, x, count, out, at, none);
}

extern "C" const char* xlane_isa() { return kIsa; }

XLA_FFI_DEFINE_HANDLER_SYMBOL(xlane_linear, linear,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<F32x2>().Arg<F32x3>().Ret<F32x2>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(xlane_grouped, grouped,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<F32x2>()
                                  .Arg<F32x4>()
                                  .Arg<I32x1>()
                                  .Ret<F32x2>());
