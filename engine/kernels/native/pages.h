// Keys and values in their pages: how they are put there and got from there.
//
// Knows what one call is about; not what attention makes of it.

#pragma once

#include <cmath>
#include <string>

#include "tiles.h"

namespace {

// k[16, depth] -> to[depth, 16]; depth is a multiple of 4.
inline void transpose16(const float* k, i64 depth, float* to, Ahead& ahead) {
#if defined(__AVX512F__)
  for (i64 h = 0; h < depth; h += 4) {
    ahead.fetch(4);
    __m512 a[4];
    for (int i = 0; i < 4; ++i) {  // a[i] = keys i, i+4, i+8, i+12, four values each
      const float* p = k + i * depth + h;
      __m512 v = _mm512_castps128_ps512(_mm_loadu_ps(p));
      v = _mm512_insertf32x4(v, _mm_loadu_ps(p + 4 * depth), 1);
      v = _mm512_insertf32x4(v, _mm_loadu_ps(p + 8 * depth), 2);
      a[i] = _mm512_insertf32x4(v, _mm_loadu_ps(p + 12 * depth), 3);
    }
    __m512d lo01 = _mm512_castps_pd(_mm512_unpacklo_ps(a[0], a[1])), hi01 = _mm512_castps_pd(_mm512_unpackhi_ps(a[0], a[1]));
    __m512d lo23 = _mm512_castps_pd(_mm512_unpacklo_ps(a[2], a[3])), hi23 = _mm512_castps_pd(_mm512_unpackhi_ps(a[2], a[3]));
    float* o = to + h * 16;
    _mm512_storeu_ps(o, _mm512_castpd_ps(_mm512_unpacklo_pd(lo01, lo23)));
    _mm512_storeu_ps(o + 16, _mm512_castpd_ps(_mm512_unpackhi_pd(lo01, lo23)));
    _mm512_storeu_ps(o + 32, _mm512_castpd_ps(_mm512_unpacklo_pd(hi01, hi23)));
    _mm512_storeu_ps(o + 48, _mm512_castpd_ps(_mm512_unpackhi_pd(hi01, hi23)));
  }
#elif defined(__AVX2__)
  for (int half = 0; half < 16; half += 8)
    for (i64 h = 0; h < depth; h += 4) {
      ahead.fetch(4);
      __m256 a[4];
      for (int i = 0; i < 4; ++i) {
        const float* p = k + (half + i) * depth + h;
        a[i] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(p)), _mm_loadu_ps(p + 4 * depth), 1);
      }
      __m256d lo01 = _mm256_castps_pd(_mm256_unpacklo_ps(a[0], a[1])), hi01 = _mm256_castps_pd(_mm256_unpackhi_ps(a[0], a[1]));
      __m256d lo23 = _mm256_castps_pd(_mm256_unpacklo_ps(a[2], a[3])), hi23 = _mm256_castps_pd(_mm256_unpackhi_ps(a[2], a[3]));
      float* o = to + h * 16 + half;
      _mm256_storeu_ps(o, _mm256_castpd_ps(_mm256_unpacklo_pd(lo01, lo23)));
      _mm256_storeu_ps(o + 16, _mm256_castpd_ps(_mm256_unpackhi_pd(lo01, lo23)));
      _mm256_storeu_ps(o + 32, _mm256_castpd_ps(_mm256_unpacklo_pd(hi01, hi23)));
      _mm256_storeu_ps(o + 48, _mm256_castpd_ps(_mm256_unpackhi_pd(hi01, hi23)));
    }
#else
  ahead.fetch(static_cast<int>(depth));
  for (i64 h = 0; h < depth; ++h)
    for (int j = 0; j < 16; ++j) to[h * 16 + j] = k[j * depth + h];
#endif
}

// Query rows that walk the keys together: heads of one kv head, tokens of one row; row r is head r % G of token r / G.
struct Queries {
  i64 token;  // of r = 0
  i64 begin, end;
  i64 head;   // kv head
};

// Keys or values of all pages [K, P, W, H]: numbers as they are, or int8 with a scale [K, P, W] for each vector. Keys of pages
// of whole groups of 16 tokens lie in columns, [K, P, W / 16, H, 16].
struct Pool {
  float* floats;
  int8_t* steps;
  float* scales;

  // The scale of a vector, and what to divide it by. `at` counts vectors, here and below.
  float put_scale(i64 at, const float* from, i64 H) const {
    float most = 0;
    for (i64 h = 0; h < H; ++h) {
      const float size = std::fabs(from[h]);
      most = size > most || size != size ? size : most;  // what is not a number stays none
    }
    scales[at] = most / 127.0f;
    return scales[at] == 0 ? 1.0f : scales[at];
  }
  void put(i64 at, const float* from, i64 H) const {
    if (floats) return (void)std::memcpy(floats + at * H, from, H * sizeof(float));
    const float step = put_scale(at, from, H);
    for (i64 h = 0; h < H; ++h) steps[at * H + h] = static_cast<int8_t>(std::nearbyintf(from[h] / step));
  }
  // The same into columns: the vectors of 16 tokens behind each other lie as [H, 16], so that scores need no transposition.
  void put_column(i64 at, const float* from, i64 H) const {
    const i64 column = at % 16, first = (at - column) * H + column;
    if (floats)
      for (i64 h = 0; h < H; ++h) floats[first + h * 16] = from[h];
    if (floats) return;
    const float step = put_scale(at, from, H);
    for (i64 h = 0; h < H; ++h) steps[first + h * 16] = static_cast<int8_t>(std::nearbyintf(from[h] / step));
  }
  // 16 columns of int8 as floats.
  void get_columns(i64 at, float* to, i64 H) const {
    for (int j = 0; j < 16; j += LANES) {
      const vec scale = load(scales + at + j);
      for (i64 h = 0; h < H; ++h) store(to + h * 16 + j, converted(wide(steps + at * H + h * 16 + j)) * scale);
    }
  }
  void get(i64 at, float* to, i64 H) const {
    if (floats) return (void)std::memcpy(to, floats + at * H, H * sizeof(float));
    const int8_t* from = steps + at * H;
    i64 h = 0;
    for (; h + LANES <= H; h += LANES) store(to + h, converted(wide(from + h)) * scales[at]);
    for (; h < H; ++h) to[h] = from[h] * scales[at];
  }
  // 16 vectors that are to be read soon.
  void add(i64 at, i64 H, Ahead& ahead) const {
    if (floats) return ahead.add(floats + at * H, 16 * H);
    ahead.add(reinterpret_cast<const float*>(steps + at * H), 16 * H / 4);
  }
};

// Everything one call knows. Letters: T tokens, N query heads, K kv heads, G = N / K, H head size, W tokens per page.
struct Attend {
  i64 T, N, K, H, P, W, pmax, G, padded, window;  // padded: H rounded up to whole panels; window 0: none
  float scale, softcap;  // softcap 0: none
  const float *slopes, *sinks;  // [N], of the query heads; null: none
  const float* qkv;  // [T, K, G + 2, H]
  Pool keys, values;
  float* out;
  float* parts = nullptr;  // what is made apart; see Work
  const int32_t *positions, *rows, *table;

  // A query (member < G), the key (G) or the value (G + 1) of a token and kv head.
  const float* part(i64 token, i64 head, i64 member) const { return qkv + ((token * K + head) * (G + 2) + member) * H; }
  i64 page(i64 row, i64 position) const { return table[row * pmax + position / W]; }
  bool columns() const { return W % 16 == 0; }
  bool whole_pages() const { return columns() && padded == H; }
  i64 position(const Queries& qs, i64 r) const { return positions[qs.token + (qs.begin + r) / G]; }
  i64 first_key(const Queries& qs) const { return first_key(position(qs, 0)); }
  i64 last_key(const Queries& qs) const { return position(qs, qs.end - qs.begin - 1); }
  i64 first_key(i64 position) const { return window > 0 ? std::max<i64>(0, position - window + 1) : 0; }
  // Where in a pool a vector is, counted in vectors.
  i64 slot(i64 head, i64 row, i64 position) const { return (head * P + page(row, position)) * W + position % W; }
};

// 16 vectors of a row behind each other, `padded` floats each. Pages that are no multiple of 16 tokens, heads that are no
// multiple of 16 wide, and int8 are put together in `spare`.
const float* vectors16(const Attend& a, const Pool& pool, const Queries& qs, i64 row, i64 from, i64 last, float* spare) {
  if (pool.floats && a.whole_pages()) return pool.floats + a.slot(qs.head, row, from) * a.H;
  for (i64 j = 0; j < 16; ++j) {
    float* to = spare + j * a.padded;
    const i64 held = from + j <= last ? a.H : 0;
    if (held) pool.get(a.slot(qs.head, row, from + j), to, held);
    std::memset(to + held, 0, (a.padded - held) * sizeof(float));
  }
  return spare;
}

// 16 keys as columns [H, 16]: where they lie, or put together in `to`, which is as large as `spare`.
const float* columns16(const Attend& a, const Queries& qs, i64 row, i64 from, i64 last, float* to, float* spare, Ahead& ahead) {
  if (!a.columns()) {
    transpose16(vectors16(a, a.keys, qs, row, from, last, spare), a.padded, to, ahead);
    return to;
  }
  const i64 at = a.slot(qs.head, row, from);
  if (a.keys.floats) return a.keys.floats + at * a.H;
  a.keys.get_columns(at, to, a.H);
  return to;
}

// The pages from a key on to the end of its block, to be read soon.
void add_block(const Attend& a, const Queries& qs, i64 from, Ahead& ahead) {
  if (!a.columns()) return;
  const i64 row = a.rows[qs.token], last = a.last_key(qs);
  for (i64 p = from / 16 * 16; p <= last && p < (from / KEYS + 1) * KEYS; p += 16) {
    a.keys.add(a.slot(qs.head, row, p), a.H, ahead);
    a.values.add(a.slot(qs.head, row, p), a.H, ahead);
  }
}

}  // namespace
