// What is computed of each row for itself: norms, gates, the likeliest.

#include <cmath>

#include "numbers.h"
#include "threads.h"

namespace {

using F32x1 = ffi::Buffer<ffi::F32, 1>;
using F32x2 = ffi::Buffer<ffi::F32, 2>;
using F32x3 = ffi::Buffer<ffi::F32, 3>;
using I32x1 = ffi::Buffer<ffi::S32, 1>;

// row(t) for T rows of `floats` each, on several threads where that is worth waking them.
template <typename Body>
void each_row(ffi::ThreadPool& pool, i64 T, i64 floats, const Body& row) {
  constexpr i64 kWorth = 16384;
  parallel(pool, T, std::max<i64>(1, kWorth / std::max<i64>(floats, 1)), [&](Piece piece) {
    for (i64 t = piece.begin; t < piece.end; ++t) row(t);
  });
}

// y = x / sqrt(mean of x^2 + eps) * scale.
ffi::Error rms_norm(ffi::ThreadPool pool, F32x2 x, F32x1 scale, ffi::Result<F32x2> y, float eps) {
  const i64 T = x.dimensions()[0], D = x.dimensions()[1];
  if (scale.dimensions()[0] != D) return ffi::Error::InvalidArgument("xlane rms_norm: there must be a scale for each column");
  constexpr int kSums = 4;  // at once, so that none waits for the one before
  each_row(pool, T, D, [&](i64 t) {
    const float *from = x.typed_data() + t * D, *scales = scale.typed_data();
    float* to = y->typed_data() + t * D;
    alignas(64) float sums[kSums * PANEL] = {};
    vec acc[kSums * VECTORS] = {};
    i64 d = 0;
    for (; d + kSums * PANEL <= D; d += kSums * PANEL)
      for (int i = 0; i < kSums * VECTORS; ++i) {
        const vec v = load(from + d + i * LANES);
        acc[i] += v * v;
      }
    for (int i = 0; i < kSums * VECTORS; ++i) store(sums + i * LANES, acc[i]);
    for (int i = 0; d < D; ++d, ++i) sums[i] += from[d] * from[d];
    for (int half = kSums * PANEL / 2; half; half /= 2)
      for (int i = 0; i < half; ++i) sums[i] += sums[i + half];
    const float root = 1.0f / std::sqrt(sums[0] / static_cast<float>(D) + eps);
    for (d = 0; d + LANES <= D; d += LANES) store(to + d, load(from + d) * root * load(scales + d));
    for (; d < D; ++d) to[d] = from[d] * root * scales[d];
  });
  return ffi::Error::Success();
}

// y = g sigmoid(linear g + cubic g^3) u, for g and u side by side in `both` [T, 2, F]: silu, and gelu as far as it is of that form.
ffi::Error gated(ffi::ThreadPool pool, F32x3 both, ffi::Result<F32x2> y, float linear, float cubic) {
  const i64 T = both.dimensions()[0], F = both.dimensions()[2];
  auto gate = [=](vec g, vec u) {
    const float far = 1e3f;  // where every gate is open or shut; the cube of more could be no number
    const vec c = g > far ? splat(far) : g < -far ? splat(-far) : g;
    const vec z = c * (c * c * cubic + linear), e = exp_nonpositive(z < 0.0f ? z : -z);
    return g * u * ((z < 0.0f ? e : splat(1.0f)) / (1.0f + e));
  };
  each_row(pool, T, 2 * F, [&](i64 t) {
    const float *g = both.typed_data() + 2 * t * F, *u = g + F;
    float* to = y->typed_data() + t * F;
    i64 f = 0;
    for (; f + LANES <= F; f += LANES) store(to + f, gate(load(g + f), load(u + f)));
    if (f == F) return;
    alignas(64) float spare[3][LANES] = {};
    std::copy(g + f, g + F, spare[0]);
    std::copy(u + f, u + F, spare[1]);
    store(spare[2], gate(load(spare[0]), load(spare[1])));
    std::copy(spare[2], spare[2] + F - f, to + f);
  });
  return ffi::Error::Success();
}

// The first of a row's largest numbers; V if one is NaN.
i64 first_largest(const float* x, i64 V) {
  vec best = splat(-INFINITY);
  ivec here, strange = {};
  for (int i = 0; i < LANES; ++i) here[i] = i;
  ivec at = here;
  i64 v = 0;
  for (; v + LANES <= V; v += LANES, here += LANES) {
    const vec next = load(x + v);
    const ivec more = next > best;
    strange |= next != next;
    best = more ? next : best;
    at = more ? here : at;
  }
  i64 found = at[0];
  float most = best[0];
  bool broken = false;
  for (int i = 0; i < LANES; ++i) {
    broken |= strange[i] != 0;
    if (best[i] > most || (best[i] == most && at[i] < found)) most = best[i], found = at[i];
  }
  for (; v < V; ++v) {
    broken |= x[v] != x[v];
    if (x[v] > most) most = x[v], found = v;
  }
  return broken ? V : found;
}

ffi::Error argmax(ffi::ThreadPool pool, F32x2 x, ffi::Result<I32x1> y) {
  const i64 V = x.dimensions()[1];
  each_row(pool, x.dimensions()[0], V, [&](i64 t) {
    y->typed_data()[t] = static_cast<int32_t>(first_largest(x.typed_data() + t * V, V));
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(xlane_rms_norm, rms_norm,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<F32x2>()
                                  .Arg<F32x1>()
                                  .Ret<F32x2>()
                                  .Attr<float>("eps"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(xlane_gated, gated,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<F32x3>()
                                  .Ret<F32x2>()
                                  .Attr<float>("linear")
                                  .Attr<float>("cubic"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(xlane_argmax, argmax,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<F32x2>().Ret<I32x1>());
