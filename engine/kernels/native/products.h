// y [T, N] = x [T, D] times a packed weight of any kind: which rows are computed, how they are packed, who computes which
// panels; and the same for rows in groups, each with a weight of its own.
//
// Knows how a weight is asked, some panels of it at a time; not how its numbers are held. Of a kind W of weights:
//   at(panel)              the same from that panel on; alone() where one tile is all that reads it.
//   add(count, ahead)      so many panels are read next: while several tiles are multiplied with some, the hardware does not ask
//                          for more by itself.
//   micro<MR, NP>(x, out, at, ahead)   NP panels times a tile of x, [D, MR]; row r of it goes to out[r] + at.
//   kRows                  rows of the largest tile.
//   kApart                 tiles from which on apart(count, to) makes floats of it once for all, not each for itself; 0: never.
//   kPaired                how rows are packed for it.

#pragma once

#include <string>
#include <utility>
#include <vector>

#include "threads.h"
#include "tiles.h"

namespace xlane {
// `count` panels of float32 times a tile of so many rows, as `micro` below; compiled once, for the kinds that were taken apart, too.
void times_floats(int rows, const float* panels, int64_t D, const float* x, int64_t count, float* const* out, int64_t at);
}  // namespace xlane

namespace {

using F32x2 = ffi::Buffer<ffi::F32, 2>;
using F32x3 = ffi::Buffer<ffi::F32, 3>;
using F32x4 = ffi::Buffer<ffi::F32, 4>;
using I32x1 = ffi::Buffer<ffi::S32, 1>;

constexpr int GROUP = 32;  // inputs that share a scale in a weight of 4 bits; models/spec.py has the same number
constexpr int64_t APART_FLOATS = 1 << 18;  // what a second cache holds: of more weights each tile takes its own apart

#if defined(__AVX512F__)
// x[r][8] of 8 rows -> [8, 8], `stride` apart: pairs, then fours, then halves change places.
inline void transpose8(const float* const* x, i64 from, float* to, i64 stride) {
  __m256 a[8], b[8];
  for (int r = 0; r < 8; ++r) a[r] = _mm256_loadu_ps(x[r] + from);
  for (int r = 0; r < 8; r += 2) b[r] = _mm256_unpacklo_ps(a[r], a[r + 1]), b[r + 1] = _mm256_unpackhi_ps(a[r], a[r + 1]);
  for (int r = 0; r < 8; r += 4)
    for (int i = 0; i < 2; ++i) {
      a[r + 2 * i] = _mm256_shuffle_ps(b[r + i], b[r + 2 + i], 0x44);
      a[r + 2 * i + 1] = _mm256_shuffle_ps(b[r + i], b[r + 2 + i], 0xee);
    }
  for (int i = 0; i < 4; ++i) {
    _mm256_storeu_ps(to + i * stride, _mm256_permute2f128_ps(a[i], a[i + 4], 0x20));
    _mm256_storeu_ps(to + (4 + i) * stride, _mm256_permute2f128_ps(a[i], a[i + 4], 0x31));
  }
}
#endif

// x[r][depth] of some rows -> [depth, rows]; PAIRED: each input of half a group, then that of the other half beside it.
template <bool PAIRED>
void pack_rows(const float* const* x, int rows, i64 depth, float* to) {
  constexpr i64 half = GROUP / 2;
  auto place = [](i64 d) { return PAIRED ? d / GROUP * GROUP + d % half * 2 + d / half % 2 : d; };
  i64 d = 0;
  for (; PAIRED && rows == 1 && d < depth; d += GROUP)  // one by one below, this would be a thirtieth of a step of one row
    for (i64 i = 0; i < half; ++i) to[d + 2 * i] = x[0][d + i], to[d + 2 * i + 1] = x[0][d + half + i];
#if defined(__AVX512F__)
  const int eights = rows / 8 * 8;
  for (; eights && d + 8 <= depth; d += 8)
    for (int r = 0; r < eights; r += 8) transpose8(x + r, d, to + place(d) * rows + r, PAIRED ? 2 * rows : rows);
  for (int r = eights; eights && r < rows; ++r)
    for (i64 done = 0; done < d; ++done) to[place(done) * rows + r] = x[r][done];
#endif
  for (; d < depth; ++d)
    for (int r = 0; r < rows; ++r) to[place(d) * rows + r] = x[r][d];
}

// Panels of D inputs that were taken apart, into floats once for several tiles; their outputs' scales, if those are left.
struct Apart {
  const float* floats;
  i64 D;
  const float* scales;
  float unit;
};

template <class W, int MR>
void run_rows(const W& w, const float* x, i64 count, float* const* out, i64 at, Ahead& ahead) {
  constexpr int NP = panels_at_once(MR);
  i64 p = 0;
  for (; p + NP <= count; p += NP) w.at(p).template micro<MR, NP>(x, out, at + p * PANEL, ahead);
  if constexpr (NP == 4)  // a tile with a row more is computed three panels at once, and sets the pace
    for (; p + 3 <= count; p += 3) w.at(p).template micro<MR, 3>(x, out, at + p * PANEL, ahead);
  for (; p < count; ++p) w.at(p).template micro<MR, 1>(x, out, at + p * PANEL, ahead);
}
template <class W, int... I>
auto choose(int rows, std::integer_sequence<int, I...>) {
  using Run = void (*)(const W&, const float*, i64, float* const*, i64, Ahead&);
  static constexpr Run table[] = {&run_rows<W, I + 1>...};
  return table[rows - 1];
}
// `count` panels times a tile of so many rows.
template <class W>
void run_tile(int rows, const W& w, const float* x, i64 count, float* const* out, i64 at, Ahead& ahead) {
  choose<W>(rows, std::make_integer_sequence<int, W::kRows>())(w, x, count, out, at, ahead);
}
inline void run_tile(int rows, const Apart& w, const float* x, i64 count, float* const* out, i64 at, Ahead&) {
  xlane::times_floats(rows, w.floats, w.D, x, count, out, at);
  for (int r = 0; w.scales && r < rows; ++r)
    for (i64 c = 0; c < count * PANEL; c += LANES)
      store(out[r] + at + c, load(out[r] + at + c) * (load(w.scales + c) * w.unit));
}

// The rows of x [T, D] that are to be computed and where they go in y [T, N], then those of the others, which hold zeros alone: as
// padding does.
struct Rows {
  std::vector<const float*> x;
  std::vector<float*> y;
  i64 computed = 0;
  Rows(const float* from, float* to, i64 T, i64 D, i64 N) : x(T), y(T) {
    i64 skipped = T;
    for (i64 t = 0; t < T; ++t) {
      const i64 at = zero(from + t * D, D) ? --skipped : computed++;
      x[at] = from + t * D, y[at] = to + t * N;
    }
  }

 private:
  static bool zero(const float* row, i64 D) {
    return std::all_of(row, row + D, [](float value) { return value == 0.0f; });
  }
};

template <class W>
struct Linear {
  W w;
  i64 D, N;
  const Rows& rows;
  Cut cut{rows.computed, rows.computed <= ALONE_ROWS ? ALONE_ROWS : MAX_ROWS};
  i64 group = panels_at_once(cut.size(0));  // panels computed at once

  // Tiles of x as [D, rows], one behind the other.
  void pack(float* to, i64 begin, i64 end) const {
    for (i64 i = begin; i < end; ++i)
      pack_rows<W::kPaired>(&rows.x[cut.begin(i)], cut.size(i), D, to + cut.begin(i) * D);
  }

  void run(const float* packed, Piece piece) const {
    for (i64 p = piece.begin; p < piece.end; p += group) {
      const i64 count = std::min(group, piece.end - p);
      Ahead ahead;
      if (cut.tiles > 1) {
        w.at(p + count).add(std::min(group, piece.stop - p - count), ahead);
        ahead.each = static_cast<int>((8 * group + cut.tiles - 1) / cut.tiles);
      }
      auto tiles = [&](const auto& panels) { run_tiles(panels, packed, p, count, ahead); };
      if (cut.tiles == 1)
        tiles(w.at(p).alone());
      else if (!W::kApart || cut.tiles < W::kApart || group * D * PANEL > APART_FLOATS)
        tiles(w.at(p));
      else if constexpr (W::kApart > 0)
        tiles(w.at(p).apart(count, scratch(kWeights, group * D * PANEL)));
    }
    const i64 from = piece.begin * PANEL, floats = std::min(piece.end * PANEL, N) - from;
    for (size_t i = rows.computed; i < rows.y.size(); ++i) std::memset(rows.y[i] + from, 0, floats * sizeof(float));
  }

 private:
  template <class Panels>
  void run_tiles(const Panels& panels, const float* packed, i64 p, i64 count, Ahead& ahead) const {
    const bool narrow = (p + count) * PANEL > N;  // the last panel is wider than what is left of a row of y
    alignas(64) float spare[ALONE_ROWS][4 * PANEL];
    float* apart[ALONE_ROWS];
    for (int r = 0; r < ALONE_ROWS; ++r) apart[r] = spare[r];
    for (i64 i = 0; i < cut.tiles; ++i) {
      float* const* out = &rows.y[cut.begin(i)];
      run_tile(cut.size(i), panels, packed + cut.begin(i) * D, count, narrow ? apart : out, narrow ? 0 : p * PANEL, ahead);
      for (int r = 0; narrow && r < cut.size(i); ++r)
        std::memcpy(out[r] + p * PANEL, spare[r], (N - p * PANEL) * sizeof(float));
    }
  }
};

// y [T, N] = x [T, D] times the packed weight w.
template <class W>
void multiply(ffi::ThreadPool& pool, const float* x, W w, float* y, i64 T, i64 D, i64 N) {
  const Rows rows(x, y, T, D, N);
  if (rows.computed == 0 || N == 0) return (void)std::memset(y, 0, T * N * sizeof(float));
  const Linear<W> job{w, D, N, rows};
  const float* shared = rows.computed == 1 && !W::kPaired ? rows.x[0] : nullptr;
  const bool each = !shared && rows.computed <= 64;  // every worker packs for itself: cheaper than waiting for each other
  if (rows.computed > 64) {
    float* packed = scratch(kRows, rows.computed * D);
    parallel(pool, job.cut.tiles, 1, [&](Piece piece) { job.pack(packed, piece.begin, piece.end); });
    shared = packed;
  }
  share(pool, (N + PANEL - 1) / PANEL, job.group, [&](Piece piece, const auto& claim) {
    const float* packed = shared;
    if (each) {
      float* own = scratch(kRows, rows.computed * D);
      job.pack(own, 0, job.cut.tiles);
      packed = own;
    }
    do job.run(packed, piece);
    while (claim(&piece));
  });
}

// [panels, D / inputs_each, 16]?
template <class Buffer>
bool fits(const Buffer& w, i64 D, i64 inputs_each, i64 panels) {
  return w.dimensions()[0] == panels && w.dimensions()[1] * inputs_each == D && w.dimensions()[2] == PANEL;
}

ffi::Error misfit(const char* weight) {
  return ffi::Error::InvalidArgument(std::string("xlane matmul: x [T, D], ") + weight + " and y [T, N] do not fit together");
}

// Rows in groups behind each other, each group with a weight of its own: experts. A group without rows costs nothing.
template <class W>
ffi::Error multiply_groups(ffi::ThreadPool& pool, const F32x2& x, const W& w, const I32x1& sizes, ffi::Result<F32x2>& y) {
  const i64 S = x.dimensions()[0], D = x.dimensions()[1], N = y->dimensions()[1], panels = (N + PANEL - 1) / PANEL;
  if (y->dimensions()[0] != S) return misfit("w");
  i64 row = 0;
  for (i64 g = 0; g < sizes.dimensions()[0]; ++g) {
    const i64 count = sizes.typed_data()[g];
    if (count < 0 || row + count > S) return ffi::Error::InvalidArgument("xlane grouped: more rows in groups than there are");
    multiply(pool, x.typed_data() + row * D, w.at(g * panels), y->typed_data() + row * N, count, D, N);
    row += count;
  }
  std::memset(y->typed_data() + row * N, 0, (S - row) * N * sizeof(float));
  return ffi::Error::Success();
}

// [X, panels, D / inputs_each, 16]?
template <class Buffer>
bool fit_groups(const Buffer& w, i64 X, i64 D, i64 inputs_each, i64 panels) {
  const auto shape = w.dimensions();
  return shape[0] == X && shape[1] == panels && shape[2] * inputs_each == D && shape[3] == PANEL;
}

}  // namespace
