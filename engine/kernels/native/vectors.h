// The processor's vectors, and how many numbers, rows and panels this one takes at once.
//
// Knows instructions; no buffers of XLA's and no threads. What all these files share lies in an anonymous namespace: so it is
// local to each of them, and the compiler puts what is called once where it is called.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

using i64 = int64_t;

constexpr int PANEL = 16;  // outputs of a packed weight that lie side by side; models/spec.py has the same number

#if defined(__AVX512F__)
constexpr int LANES = 16, BUDGET = 24, MAX_ROWS = 8, ALONE_ROWS = 16, QUERY_ROWS = 6;
constexpr const char* kIsa = "AVX-512";
#elif defined(__AVX2__) && defined(__FMA__)
constexpr int LANES = 8, BUDGET = 12, MAX_ROWS = 6, ALONE_ROWS = 6, QUERY_ROWS = 6;
constexpr const char* kIsa = "AVX2";
#elif defined(__aarch64__)
constexpr int LANES = 4, BUDGET = 24, MAX_ROWS = 6, ALONE_ROWS = 6, QUERY_ROWS = 6;
constexpr const char* kIsa = "NEON";
#else
constexpr int LANES = 4, BUDGET = 8, MAX_ROWS = 2, ALONE_ROWS = 2, QUERY_ROWS = 2;
constexpr const char* kIsa = "portable";
#endif
// BUDGET: accumulators that stay in registers. MAX_ROWS: rows that share one load of a weight. ALONE_ROWS: so many do where
// there are no more, and the weight is read once only: slower arithmetic, but then memory is what is waited for. QUERY_ROWS:
// queries that share one load of a key or value: a block of keys is four panels, and so is a head of 64, of which six rows take
// all at once.

constexpr int VECTORS = PANEL / LANES;  // registers per panel

typedef float vec __attribute__((vector_size(LANES * 4), may_alias));
typedef int ivec __attribute__((vector_size(LANES * 4), may_alias));

inline vec load(const float* p) {
  vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline void store(float* p, vec v) { std::memcpy(p, &v, sizeof v); }
inline vec splat(float x) { return x - vec{}; }

// LANES small integers, each in an int. (Left to the vector types' own conversion, GCC takes them apart one by one.)
#if defined(__AVX512F__)
inline ivec wide(const int8_t* p) { return (ivec)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)); }
inline ivec wide(const uint8_t* p) { return (ivec)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)); }
inline ivec wide(const uint16_t* p) { return (ivec)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)); }
#elif defined(__AVX2__) && defined(__FMA__)
inline ivec wide(const int8_t* p) { return (ivec)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)); }
inline ivec wide(const uint8_t* p) { return (ivec)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)); }
inline ivec wide(const uint16_t* p) { return (ivec)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)); }
#else
template <typename T>
inline ivec wide(const T* p) {
  ivec v;
  for (int i = 0; i < LANES; ++i) v[i] = p[i];
  return v;
}
#endif
inline vec converted(ivec v) { return __builtin_convertvector(v, vec); }

}  // namespace
