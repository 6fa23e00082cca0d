// What softmax and gates need of single numbers.

#pragma once

#include "vectors.h"

namespace {

// e^x for x <= 0, to about one unit in the last place; exactly 1 at 0 and exactly 0 far below.
inline vec exp_nonpositive(vec x) {
  const float shift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer held in the low bits
  vec rounded = x * 1.44269504088896341f + shift;
  vec n = rounded - shift;
  vec r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  vec p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  ivec bits = (ivec)rounded - (ivec)splat(shift);
  vec y = (vec)((ivec)p + (bits << 23));
  return x < -87.0f ? vec{} : y;
}

// cap tanh(s / cap), by tanh |x| = (1 - e^-2|x|) / (1 + e^-2|x|).
inline vec soft_capped(vec s, float cap) {
  const vec x = s * (1.0f / cap), size = x < 0.0f ? -x : x;
  const vec e = exp_nonpositive(size * -2.0f), y = (1.0f - e) / (1.0f + e) * cap;
  return x < 0.0f ? -y : y;
}

inline vec larger(vec a, vec b) { return a > b ? a : b; }

inline float largest(vec v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)v);
#else
  float a[LANES];
  store(a, v);
  for (int i = 1; i < LANES; ++i) a[0] = std::max(a[0], a[i]);
  return a[0];
#endif
}

template <typename Op>
inline float fold16(const float* from, Op op) {
  float a[16];
  std::memcpy(a, from, sizeof a);
  for (int half = 8; half; half /= 2)
    for (int i = 0; i < half; ++i) a[i] = op(a[i], a[i + half]);
  return a[0];
}

}  // namespace
