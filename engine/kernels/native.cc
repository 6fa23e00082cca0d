// float32 decoder kernels for the CPU: matmul with panel-packed weights (of float32, 8 bits, FP8 or 4 bits), and paged attention.
//
// Called by XLA through its FFI, on XLA's own threads. Knows buffers only: neither models nor requests. Re-entrant:
// nothing here is shared between two calls but thread-local scratch memory.
//
// The promise everything here keeps: a row's result never depends, in a single bit, on what else is in the launch.
//   linear   y[t, n] is one accumulator, fed by d = 0, 1, 2, … in that order, whatever the blocking. A row of nothing but
//            zeros, as padding mostly is, costs a look and its zeros.
//   rows     a norm's squares are added up in an order that the length alone decides.
//   attend   keys are met in blocks of KEYS by absolute position, and what splits of SPLIT keys give is added up in their
//            order; a masked key adds exactly nothing. So a query's result is also the same however its prompt was cut
//            into chunks, whether it came in a prefill or a decode, and on however many threads.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;
using i64 = int64_t;
using F32x1 = ffi::Buffer<ffi::F32, 1>;
using F32x2 = ffi::Buffer<ffi::F32, 2>;
using F32x3 = ffi::Buffer<ffi::F32, 3>;
using U8x3 = ffi::Buffer<ffi::U8, 3>;
using BF16x3 = ffi::Buffer<ffi::BF16, 3>;
using S8x4 = ffi::Buffer<ffi::S8, 4>;
using U8x4 = ffi::Buffer<ffi::U8, 4>;
using BF16x4 = ffi::Buffer<ffi::BF16, 4>;
using F32x4 = ffi::Buffer<ffi::F32, 4>;
using I32x1 = ffi::Buffer<ffi::S32, 1>;
using I32x2 = ffi::Buffer<ffi::S32, 2>;

constexpr int PANEL = 16;  // outputs of a packed weight that lie side by side; models/spec.py has the same number
constexpr int GROUP = 32;  // inputs that share a scale in a weight of 4 bits; from there, too
constexpr int KEYS = 64;   // keys of one softmax block
constexpr int64_t APART_FLOATS = 1 << 18;  // what a second cache holds: of more weights each tile takes its own apart

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

// ---------------------------------------------------------------------------------------------------------------------
// Threads
// ---------------------------------------------------------------------------------------------------------------------

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

// Denormals are zero while this lives: XLA's threads mostly run that way, and a row's bits must not depend on which thread
// met it.
class FlushDenormals {
#if defined(__SSE__)
  unsigned before = __builtin_ia32_stmxcsr();

 public:
  FlushDenormals() { __builtin_ia32_ldmxcsr(before | 0x8040); }
  ~FlushDenormals() { __builtin_ia32_ldmxcsr(before); }
#elif defined(__aarch64__)
  uint64_t before;

 public:
  FlushDenormals() {
    asm volatile("mrs %0, fpcr" : "=r"(before));
    asm volatile("msr fpcr, %0" ::"r"(before | (uint64_t{1} << 24)));
  }
  ~FlushDenormals() { asm volatile("msr fpcr, %0" ::"r"(before)); }
#else
 public:
  FlushDenormals() {}
#endif
};

// Units begin … end of a job, and the end of the stretch that they were taken from: what lies between is this worker's next,
// unless another takes it over.
struct Piece {
  i64 begin, end, stop;
};

// Work for several threads. Each has a stretch of its own that it takes from the front, so that it reads memory in order;
// who has nothing left takes half of another's rest, from its end. Outlives the call: a helper that wakes late finds
// nothing left to claim and touches nothing else.
struct Job {
  struct alignas(64) Stretch {
    std::atomic<uint64_t> bounds;  // its beginning, and its end in the upper half
  };
  const i64 total, grain, workers;
  std::vector<Stretch> stretches;
  std::atomic<i64> joined{0}, done{0};
  std::mutex mutex;
  std::condition_variable finished;

  Job(i64 total, i64 grain, i64 workers) : total(total), grain(grain), workers(workers), stretches(workers) {
    const i64 grains = (total + grain - 1) / grain;
    for (i64 k = 0; k < workers; ++k)
      stretches[k].bounds = pack(grains * k / workers * grain, std::min(total, grains * (k + 1) / workers * grain));
  }
  static uint64_t pack(i64 begin, i64 end) { return static_cast<uint64_t>(end) << 32 | static_cast<uint64_t>(begin); }
  static i64 begin(uint64_t bounds) { return static_cast<uint32_t>(bounds); }
  static i64 end(uint64_t bounds) { return static_cast<i64>(bounds >> 32); }
  // What is in the middle of them, in whole grains, nearer to the end.
  i64 middle(i64 from, i64 to) const { return std::min(to, from + ((to - from + grain - 1) / grain + 1) / 2 * grain); }

  // Half of what the worker has left, so that others find the rest.
  bool claim(i64 worker, Piece* piece) {
    std::atomic<uint64_t>& own = stretches[worker].bounds;
    do {
      uint64_t held = own.load(std::memory_order_acquire);
      while (begin(held) < end(held)) {
        const i64 to = middle(begin(held), end(held));
        if (own.compare_exchange_weak(held, pack(to, end(held)), std::memory_order_acq_rel)) {
          *piece = {begin(held), to, end(held)};
          return true;
        }
      }
    } while (take_over(worker));
    return false;
  }

  // So many units are done.
  void settle(i64 units) {
    if (units == 0 || done.fetch_add(units, std::memory_order_acq_rel) + units != total) return;
    std::lock_guard<std::mutex> lock(mutex);
    finished.notify_all();
  }

 private:
  bool take_over(i64 worker) {
    for (i64 i = 1; i < workers; ++i) {
      std::atomic<uint64_t>& other = stretches[(worker + i) % workers].bounds;
      uint64_t held = other.load(std::memory_order_acquire);
      while (begin(held) < end(held)) {
        i64 from = middle(begin(held), end(held));
        if (from == end(held)) from = begin(held);
        if (other.compare_exchange_weak(held, pack(begin(held), from), std::memory_order_acq_rel)) {
          stretches[worker].bounds.store(pack(from, end(held)), std::memory_order_release);
          return true;
        }
      }
    }
    return false;
  }
};

// body(piece, claim) on every thread that has something to do, until all of [0, total) is done. claim(&piece) says that the
// piece is done and gives the next one, or false: a body must ask until then, or it is waited for for ever. The caller works
// too and could do everything alone, so a pool whose threads are all busy (or all waiting here) only costs time.
template <typename Body>
void share(ffi::ThreadPool& pool, i64 total, i64 grain, const Body& body) {
  if (total <= 0) return;
  i64 workers = std::min<i64>(pool.num_threads(), (total + grain - 1) / grain);
  FlushDenormals flush;
  auto job = std::make_shared<Job>(total, grain, std::max<i64>(workers, 1));
  auto work = [&body](Job& job) {
    const i64 worker = job.joined.fetch_add(1);
    i64 claimed = 0;
    Piece piece;
    // What was claimed before is done when more is asked for.
    auto claim = [&](Piece* next) {
      job.settle(claimed);
      const bool found = job.claim(worker, next);
      claimed = found ? next->end - next->begin : 0;
      return found;
    };
    if (claim(&piece)) body(piece, claim);
  };
  for (i64 i = 1; i < workers; ++i) pool.Schedule([job, work] {
    FlushDenormals flush;
    work(*job);
  });
  work(*job);
  // The others are inside their last grain: some microseconds. Sleeping costs more than that; spinning for long costs
  // whoever else needs the core.
  for (int spin = 0; spin < 2000; ++spin) {
    if (job->done.load(std::memory_order_acquire) == total) return;
    pause();
  }
  std::unique_lock<std::mutex> lock(job->mutex);
  job->finished.wait(lock, [&] { return job->done.load(std::memory_order_acquire) == total; });
}

// body(piece) for all of [0, total).
template <typename Body>
void parallel(ffi::ThreadPool& pool, i64 total, i64 grain, const Body& body) {
  share(pool, total, grain, [&](Piece piece, const auto& claim) {
    do body(piece);
    while (claim(&piece));
  });
}

// Memory that a thread keeps between calls. `slot` keeps users that are alive at the same time apart.
enum Slot { kRows, kWeights, kAttend, kParts, kSlots };
float* scratch(Slot slot, i64 floats) {
  struct Buffer {
    float* data = nullptr;
    i64 size = 0;
    ~Buffer() { std::free(data); }
  };
  thread_local Buffer buffers[kSlots];
  Buffer& buffer = buffers[slot];
  if (buffer.size < floats) {
    std::free(buffer.data);
    buffer.size = (floats + 1023) / 1024 * 1024;
    buffer.data = static_cast<float*>(std::aligned_alloc(64, buffer.size * sizeof(float)));
  }
  return buffer.data;
}

// ---------------------------------------------------------------------------------------------------------------------
// Rows of x times panels of w: what is asked for ahead, attention's inner loop, and how rows are cut and packed
// ---------------------------------------------------------------------------------------------------------------------

// Memory that will be read next, asked for a few lines at a time between the arithmetic.
struct Ahead {
  struct Span {
    const char *at, *end;
  };
  Span spans[2 * KEYS / 16];
  int count = 0, current = 0;
  int each = 0;  // lines of weights for every 8 steps of arithmetic

  void add(const float* from, i64 floats) {
    const char* at = reinterpret_cast<const char*>(from);
    spans[count++] = {at, at + floats * 4};
  }
  // As few instructions as it can be: where a core is shared with another's thread, each is one less of arithmetic.
  void fetch(int lines) {
    if (current == count) return;
    Span& span = spans[current];
    const char *at = span.at, *stop = std::min(span.end, at + 64 * lines);
    for (; at < stop; at += 128) {
      __builtin_prefetch(at, 0, 2);
      __builtin_prefetch(at + 64, 0, 2);
    }
    span.at = at;
    current += at >= span.end;
  }
};

constexpr i64 LINE = 64, PAGE = 4096;  // bytes

// Weights that are read once, from memory, in order. The hardware asks for them itself, but it begins anew on each page of
// 4 KB: so some of the next page's first lines are asked for from here; and the nearest cache gets each line a while early.
// `at` is where 8 lines are read now, `page_later` where when a page was read.
inline void read_on(const void* at, const void* page_later) {
  asm volatile("");  // GCC takes a function that only asks for one that does nothing, and drops its calls
  constexpr i64 kEarly = 24, kFirst = 3;  // lines; kFirst of each 8
  const char* early = static_cast<const char*>(at) + kEarly * LINE;
  for (i64 i = 0; i < 8; ++i) __builtin_prefetch(early + i * LINE, 0, 3);
  const uintptr_t there = reinterpret_cast<uintptr_t>(page_later), in_page = there % PAGE;
  const char* first = reinterpret_cast<const char*>(there - in_page) + in_page / (8 * LINE) * kFirst * LINE;
  for (i64 i = 0; i < kFirst; ++i) __builtin_prefetch(first + i * LINE, 0, 2);
}
// The same for `count` panels of `bytes` each side by side, `done` of which have been read, and as many others after them.
inline void read_on(const void* panels, i64 count, i64 bytes, i64 done) {
  const char* at = static_cast<const char*>(panels) + done;
  const i64 later = PAGE + (done + PAGE < bytes ? 0 : (count - 1) * bytes);
  for (i64 p = 0; p < count; ++p) read_on(at + p * bytes, at + p * bytes + later);
}

enum Use {
  kScores,  // x [depth, rows], each panel a piece of its own
  kValues,  // x [rows, KEYS], the probabilities of a key block; the result is added to out
};

// out[r, 16 p + j] (+)= sum over d of x[r, d] * w[d, p, j], for MR rows and NP panels. w lies in `pieces` that hold `run`
// steps of depth each (the last may hold fewer), `wd` apart; panels are `wp` apart, or a piece each.
template <int MR, int NP, int XR, int XD, Use use>
inline void micro(const float* x, const float* const* pieces, i64 offset, i64 run, i64 wd, i64 wp, i64 depth, float* out,
                  i64 stride, Ahead* ahead) {
  vec acc[MR][NP * VECTORS];
  for (int r = 0; r < MR; ++r)
    for (int c = 0; c < NP * VECTORS; ++c) acc[r][c] = use == kValues ? load(out + r * stride + c * LANES) : vec{};
  const float* panels[NP];
  for (int p = 0; p < NP; ++p) panels[p] = use == kScores ? pieces[p] : nullptr;
  for (; depth > 0; depth -= run, ++pieces) {
    const float* w = use == kScores ? nullptr : *pieces + offset;
    i64 at = 0;
    auto step = [&] {
      vec weights[NP * VECTORS];
      for (int p = 0; p < NP; ++p) {
        const float* panel = use == kScores ? panels[p] + at : w + p * wp;
        for (int v = 0; v < VECTORS; ++v) weights[p * VECTORS + v] = load(panel + v * LANES);
      }
      for (int r = 0; r < MR; ++r) {
        vec xr = splat(x[r * XR]);
        for (int c = 0; c < NP * VECTORS; ++c) acc[r][c] += xr * weights[c];
      }
      x += XD;
      if constexpr (use == kScores)
        at += PANEL;
      else
        w += wd;
    };
    const i64 steps = std::min(run, depth);
    i64 d = 0;
    for (; d + 8 <= steps; d += 8) {
      ahead->fetch(use == kValues ? 16 : 12);
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) step();
    }
    for (; d < steps; ++d) step();
  }
  // Without this, here and in the products below, GCC unrolls the loop too late to see that the sums need no memory: it clears
  // them there with memset, and copies them in and out at each call.
#pragma GCC unroll 16
  for (int r = 0; r < MR; ++r)
    for (int c = 0; c < NP * VECTORS; ++c) store(out + r * stride + c * LANES, acc[r][c]);
}

constexpr int panels_at_once(int rows) {
  int fit = BUDGET / (rows * VECTORS);
  return fit < 1 ? 1 : fit > 4 ? 4 : fit;
}

struct Tile {
  const float* x;
  const float* const* w;  // pieces, see micro
  i64 run, wd, wp;
  i64 depth, panels;
  float* out;
  i64 stride;  // of out, per row
  Ahead* ahead;
};

template <int MR, Use use>
void tile(const Tile& t) {
  constexpr bool values = use == kValues;
  constexpr int XR = values ? KEYS : 1, XD = values ? 1 : MR;
  // A key block is 4 panels, and so is a head of 64: 2 + 2 is better than 3 + 1.
  constexpr int fit = panels_at_once(MR), NP = fit == 3 ? 2 : fit;
  auto pieces = [&](i64 p) { return use == kScores ? t.w + p : t.w; };
  i64 p = 0;
  for (; p + NP <= t.panels; p += NP)
    micro<MR, NP, XR, XD, use>(t.x, pieces(p), p * t.wp, t.run, t.wd, t.wp, t.depth, t.out + p * PANEL, t.stride, t.ahead);
  for (; p < t.panels; ++p)
    micro<MR, 1, XR, XD, use>(t.x, pieces(p), p * t.wp, t.run, t.wd, t.wp, t.depth, t.out + p * PANEL, t.stride, t.ahead);
}

using TileFn = void (*)(const Tile&);
template <Use use, int... I>
TileFn choose(int rows, std::integer_sequence<int, I...>) {
  static constexpr TileFn table[] = {&tile<I + 1, use>...};
  return table[rows - 1];
}
template <Use use>
void run_tile(int rows, const Tile& t) {
  choose<use>(rows, std::make_integer_sequence<int, QUERY_ROWS>())(t);
}

// Even cuts, into tiles of at most so many rows: with 8, 18 rows are 6 + 6 + 6, not 8 + 8 + 2.
struct Cut {
  i64 tiles, each, more;  // the first `more` tiles have a row more than `each`
  explicit Cut(i64 rows, i64 most = MAX_ROWS)
      : tiles((rows + most - 1) / most), each(rows / std::max<i64>(tiles, 1)), more(rows - tiles * each) {}
  i64 begin(i64 tile) const { return tile * each + std::min(tile, more); }
  int size(i64 tile) const { return static_cast<int>(each + (tile < more)); }
};

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

// ---------------------------------------------------------------------------------------------------------------------
// linear
// ---------------------------------------------------------------------------------------------------------------------

// A packed weight of float32, by what `Linear` asks of it: some panels times a tile of x, [D, rows], row r of it into
// out[r] + at. kApart: tiles from which on a weight is taken apart into floats once for all, not by each for itself; 0 is never.
// kPaired: how rows are packed for it. ALONE: one tile is all that reads them. (A kind of its own: a loop that decides has too
// few registers.)
template <bool ALONE>
struct Floats {
  static constexpr int kRows = ALONE ? ALONE_ROWS : MAX_ROWS;
  static constexpr i64 kApart = 0;
  static constexpr bool kPaired = false;
  const float* w;
  i64 D;
  Floats at(i64 panel) const { return {w + panel * D * PANEL, D}; }
  Floats<true> alone() const { return {w, D}; }
  // So many panels are read next. While several tiles are multiplied with some the hardware does not ask for more by itself.
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

// Panels of another kind that were taken apart, into floats once for several tiles; their outputs' scales, if those are left.
struct Apart {
  static constexpr int kRows = MAX_ROWS;
  Float32 floats;
  const float* scales;
  float unit;
  Apart at(i64 panel) const { return {floats.at(panel), scales ? scales + panel * PANEL : nullptr, unit}; }

  template <int MR, int NP>
  void micro(const float* x, float* const* out, i64 at, Ahead& ahead) const {
    floats.template micro<MR, NP>(x, out, at, ahead);
    for (int r = 0; scales && r < MR; ++r)
      for (int c = 0; c < NP * VECTORS; ++c) {
        float* sum = out[r] + at + c * LANES;
        store(sum, load(sum) * (load(scales + c * LANES) * unit));
      }
  }
};

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
    return {{to - count * D * PANEL, D}, each == D ? scales : nullptr, one};
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
    return {{to - count * D * PANEL, D}, nullptr, 1.0f};
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
void run_rows(int rows, const W& w, const float* x, i64 count, float* const* out, i64 at, Ahead& ahead,
              std::integer_sequence<int, I...>) {
  using Run = void (*)(const W&, const float*, i64, float* const*, i64, Ahead&);
  static constexpr Run table[] = {&run_rows<W, I + 1>...};
  table[rows - 1](w, x, count, out, at, ahead);
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
      run_rows(cut.size(i), panels, packed + cut.begin(i) * D, count, narrow ? apart : out, narrow ? 0 : p * PANEL, ahead,
               std::make_integer_sequence<int, Panels::kRows>());
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

ffi::Error linear(ffi::ThreadPool pool, F32x2 x, F32x3 w, ffi::Result<F32x2> y) {
  const i64 T = x.dimensions()[0], D = x.dimensions()[1], N = y->dimensions()[1];
  if (!fits(w, D, 1, (N + PANEL - 1) / PANEL) || y->dimensions()[0] != T) return misfit("w [panels, D, 16]");
  multiply(pool, x.typed_data(), Float32{w.typed_data(), D}, y->typed_data(), T, D, N);
  return ffi::Error::Success();
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

template <class Buffer>
inline const uint16_t* bits(const Buffer& bfloat16) { return static_cast<const uint16_t*>(bfloat16.untyped_data()); }

ffi::Error linear4(ffi::ThreadPool pool, F32x2 x, U8x3 w, BF16x3 scales, BF16x3 floors, ffi::Result<F32x2> y) {
  const i64 T = x.dimensions()[0], D = x.dimensions()[1], N = y->dimensions()[1], panels = (N + PANEL - 1) / PANEL;
  if (!fits(w, D, 2, panels) || !fits(scales, D, GROUP, panels) || !fits(floors, D, GROUP, panels) || y->dimensions()[0] != T)
    return misfit("w [panels, D/2, 16], scales and floors [panels, D/32, 16]");
  multiply(pool, x.typed_data(), Int4{w.typed_data(), bits(scales), bits(floors), D}, y->typed_data(), T, D, N);
  return ffi::Error::Success();
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

ffi::Error grouped(ffi::ThreadPool pool, F32x2 x, F32x4 w, I32x1 sizes, ffi::Result<F32x2> y) {
  const i64 D = x.dimensions()[1], X = sizes.dimensions()[0], panels = (y->dimensions()[1] + PANEL - 1) / PANEL;
  if (!fit_groups(w, X, D, 1, panels)) return misfit("w [X, panels, D, 16]");
  return multiply_groups(pool, x, Float32{w.typed_data(), D}, sizes, y);
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

ffi::Error grouped4(ffi::ThreadPool pool, F32x2 x, U8x4 w, BF16x4 scales, BF16x4 floors, I32x1 sizes,
                    ffi::Result<F32x2> y) {
  const i64 D = x.dimensions()[1], X = sizes.dimensions()[0], panels = (y->dimensions()[1] + PANEL - 1) / PANEL;
  if (!fit_groups(w, X, D, 2, panels) || !fit_groups(scales, X, D, GROUP, panels) || !fit_groups(floors, X, D, GROUP, panels))
    return misfit("w [X, panels, D/2, 16], scales and floors [X, panels, D/32, 16]");
  return multiply_groups(pool, x, Int4{w.typed_data(), bits(scales), bits(floors), D}, sizes, y);
}

// ---------------------------------------------------------------------------------------------------------------------
// What softmax and gates need of single numbers, and what is computed of each row for itself
// ---------------------------------------------------------------------------------------------------------------------

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

// ---------------------------------------------------------------------------------------------------------------------
// attend
// ---------------------------------------------------------------------------------------------------------------------

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

constexpr i64 FEWEST_ROWS = 5 * QUERY_ROWS, MOST_ROWS = 10 * QUERY_ROWS;  // query rows of a Work, if there are so many
constexpr i64 SPLIT = 4 * KEYS;                // keys that are added up apart from others, by absolute position
constexpr i64 MOST_PART_FLOATS = i64{1} << 24;  // of all that is made apart in a launch

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

// What R query rows make of some of their keys. R is rounded up to whole vectors where a row has one number.
struct Part {
  float* sum;   // [R, H]: values, weighted
  float* mass;  // [R, 16]: sums of the weights, lane by lane
  float* best;  // [R]: the largest score
  Part(float* at, i64 R, i64 H) : sum(at), mass(at + R * H), best(mass + R * 16) {}
  static i64 floats(i64 R, i64 H) { return R * (H + 16) + whole(R); }
  static i64 whole(i64 R) { return (R + 15) / 16 * 16; }
  void clear(i64 R, i64 H) const {
    std::memset(sum, 0, R * (H + 16) * sizeof(float));
    std::fill(best, best + whole(R), -INFINITY);
  }
};

// For each row the new largest score, what is left of weights so far when it grows, and what new scores are taken off from.
inline void grow(i64 R, float* best, float* next, float* shrink) {
  for (i64 r = 0; r < R; r += LANES) {
    const vec top = load(next + r), base = top == -INFINITY ? vec{} : top;  // no key seen yet: nothing to take off
    store(shrink + r, exp_nonpositive(load(best + r) - base));
    store(best + r, top);
    store(next + r, base);
  }
}

// total += part, which is spent. A part of keys that nobody may see changes no bit.
__attribute__((noinline)) void add(i64 R, i64 H, const Part& total, const Part& part, float* next, float* shrink) {
  for (i64 r = 0; r < R; r += LANES) store(next + r, larger(load(total.best + r), load(part.best + r)));
  grow(R, total.best, next, shrink);
  for (i64 r = 0; r < R; r += LANES) store(part.best + r, exp_nonpositive(load(part.best + r) - load(next + r)));
  auto both = [](float* to, const float* from, float keep, float weight) {
    store(to, load(to) * keep + load(from) * weight);
  };
  for (i64 r = 0; r < R; ++r) {
    for (i64 h = 0; h < H; h += LANES) both(total.sum + r * H + h, part.sum + r * H + h, shrink[r], part.best[r]);
    for (i64 j = 0; j < 16; j += LANES) both(total.mass + r * 16 + j, part.mass + r * 16 + j, shrink[r], part.best[r]);
  }
}

// Query rows, and the splits [begin, end) of their keys. `parts` is where in a launch's parts theirs lie, one for each split;
// ALONE: nobody else has splits of these rows, and they are added up at once. `writes`: they are all of one token, whose key
// and value nobody else reads: this Work puts them into their pages, which it reads anyway.
struct Work {
  static constexpr i64 ALONE = -1;
  Queries qs;
  i64 begin, end;
  i64 parts;
  bool writes = false;
  i64 R() const { return qs.end - qs.begin; }
  i64 splits() const { return end - begin; }
  i64 weight() const { return R() * splits(); }
  i64 first(const Attend& a) const { return std::max(a.first_key(qs), begin * SPLIT); }
};

// Memory for one Work, and its queries as the tiles want them.
struct Desk {
  float *query;         // per tile [H, rows], scaled
  float *score;         // [R, KEYS]: scores, then weights
  float *next, *shrink; // [R]: see grow
  float *keys;          // [KEYS / 16, H, 16]
  float *spare;         // [KEYS, H]: see vectors16
  int32_t* positions;   // [R]: a division each, so they are not asked for block by block
  Part part, total;
  Cut cut;

  static i64 floats(i64 R, i64 H) {
    return R * (H + KEYS) + 3 * Part::whole(R) + 2 * KEYS * H + 2 * Part::floats(R, H);
  }
  Desk(const Attend& a, const Queries& qs, float* at, i64 R, i64 H)
      : query(at), score(query + R * H), next(score + R * KEYS), shrink(next + Part::whole(R)),
        keys(shrink + Part::whole(R)), spare(keys + KEYS * H),
        positions(reinterpret_cast<int32_t*>(spare + KEYS * H)), part(spare + KEYS * H + Part::whole(R), R, H),
        total(part.sum + Part::floats(R, H), R, H), cut(R, QUERY_ROWS) {
    for (i64 r = 0; r < R; ++r) positions[r] = static_cast<int32_t>(a.position(qs, r));
    for (i64 i = 0; i < cut.tiles; ++i) {
      const i64 base = cut.begin(i);
      const int size = cut.size(i);
      for (int r = 0; r < size; ++r) {
        const i64 n = qs.begin + base + r;
        const float* from = a.part(qs.token + n / a.G, qs.head, n % a.G);
        float* to = query + base * H + r;
        for (i64 h = 0; h < a.H; ++h) to[h * size] = from[h] * a.scale;
        for (i64 h = a.H; h < H; ++h) to[h * size] = 0;
      }
    }
  }
};

// What some models do to the scores of keys [begin, end) of a block; and no row sees what is not for it. Out of line: in the loop
// over rows it would cost the models and blocks without it their registers.
__attribute__((noinline)) void see(const Attend& a, const Queries& qs, i64 block, int begin, int end, const Desk& desk) {
  for (i64 r = 0; r < qs.end - qs.begin; ++r) {
    float* s = desk.score + r * KEYS;
    const int own = static_cast<int>(desk.positions[r] - block);  // visible: from <= j <= own
    const int from = static_cast<int>(a.first_key(desk.positions[r]) - block);
    if (a.softcap > 0)
      for (int j = begin; j < end; j += LANES) store(s + j, soft_capped(load(s + j), a.softcap));
    if (a.slopes) {
      const float slope = a.slopes[qs.head * a.G + (qs.begin + r) % a.G];
      for (int j = begin; j < end; ++j) s[j] += slope * static_cast<float>(j - own);
    }
    for (int j = begin; j < end; ++j) s[j] = j < from || j > own ? -INFINITY : s[j];
  }
}

// A block of keys: their scores, then their values, into `part`. Those from `first` to `last` are seen by some row.
void attend_block(const Attend& a, const Queries& qs, i64 block, i64 first, i64 last, const Desk& at, const Part& to,
                  Ahead& ahead) {
  const Desk desk = at;  // copies: what is stored here could otherwise be the pointers themselves, for all the compiler knows
  const Part part = to;
  const i64 R = qs.end - qs.begin, H = a.padded, row = a.rows[qs.token];
  const i64 skip = std::max<i64>(0, first - block) / 16;  // leading groups of 16 nobody sees
  const i64 count = std::min<i64>(KEYS, last - block + 1), groups = (count + 15) / 16;
  const float *keys[KEYS / 16], *values[KEYS / 16];
  for (i64 g = skip; g < groups; ++g)
    keys[g] = columns16(a, qs, row, block + g * 16, last, desk.keys + g * 16 * H, desk.spare, ahead);
  for (i64 i = 0; i < desk.cut.tiles; ++i) {
    const i64 base = desk.cut.begin(i);
    Tile t{desk.query + base * H, keys + skip, a.H, PANEL, 0, a.H, groups - skip,
           desk.score + base * KEYS + skip * 16, KEYS, &ahead};
    run_tile<kScores>(desk.cut.size(i), t);
  }

  const i64 until = desk.positions[0] - block, from = a.first_key(desk.positions[R - 1]) - block;  // all rows see these keys
  if (a.softcap > 0 || a.slopes || from > skip * 16 || until < groups * 16 - 1) see(a, qs, block, skip * 16, groups * 16, desk);
  for (i64 r = 0; r < R; ++r) {
    const float* s = desk.score + r * KEYS;
    vec top = load(s + skip * 16);
    for (i64 j = skip * 16 + LANES; j < groups * 16; j += LANES) top = larger(top, load(s + j));
    desk.next[r] = std::max(part.best[r], largest(top));
  }
  grow(R, part.best, desk.next, desk.shrink);
  for (i64 r = 0; r < R; ++r) {
    float* s = desk.score + r * KEYS;
    const float shrink = desk.shrink[r];
    ahead.fetch(4);
    if (shrink != 1.0f) {
      for (i64 h = 0; h < H; h += LANES) store(part.sum + r * H + h, load(part.sum + r * H + h) * shrink);
      for (int j = 0; j < 16; j += LANES) store(part.mass + r * 16 + j, load(part.mass + r * 16 + j) * shrink);
    }
    for (int k = 0; k < 16; k += LANES) {
      vec mass = load(part.mass + r * 16 + k);
      for (i64 j = skip * 16 + k; j < groups * 16; j += 16) {
        const vec e = exp_nonpositive(load(s + j) - desk.next[r]);
        store(s + j, e);
        mass += e;
      }
      store(part.mass + r * 16 + k, mass);
    }
  }

  for (i64 g = skip; g < groups; ++g)
    values[g] = vectors16(a, a.values, qs, row, block + g * 16, last, desk.spare + g * 16 * H);
  for (i64 i = 0; i < desk.cut.tiles; ++i) {
    const i64 base = desk.cut.begin(i);
    Tile t{desk.score + base * KEYS + skip * 16, values + skip, 16, H, PANEL, count - skip * 16, H / PANEL,
           part.sum + base * H, H, &ahead};
    run_tile<kValues>(desk.cut.size(i), t);
  }
}

// The sum before any key. A sink is a key already seen, whose value is 0.
void begin_total(const Attend& a, const Queries& qs, const Part& total) {
  const i64 R = qs.end - qs.begin;
  total.clear(R, a.padded);
  for (i64 r = 0; a.sinks && r < R; ++r)
    total.best[r] = a.sinks[qs.head * a.G + (qs.begin + r) % a.G], total.mass[r * 16] = 1;
}

void put_out(const Attend& a, const Queries& qs, const Part& total) {
  for (i64 r = 0; r < qs.end - qs.begin; ++r) {
    const i64 n = qs.begin + r;
    const float whole = 1.0f / fold16(total.mass + r * 16, [](float x, float y) { return x + y; });
    float* to = a.out + ((qs.token + n / a.G) * a.N + qs.head * a.G + n % a.G) * a.H;
    for (i64 h = 0; h < a.H; ++h) to[h] = total.sum[r * a.padded + h] * whole;
  }
}

Part part_of(const Attend& a, const Work& work, i64 split) {
  return {a.parts + work.parts + (split - work.begin) * Part::floats(work.R(), a.padded), work.R(), a.padded};
}

// Tokens [begin, end) of one row at consecutive positions.
struct Run {
  i64 begin, end;
};

void write_run(const Attend& a, const Run& run, i64 head) {
  for (i64 t = run.begin; t < run.end; ++t) {
    const i64 row = a.rows[t];
    const i64 at = a.slot(head, row, a.positions[t]);
    if (a.columns())
      a.keys.put_column(at, a.part(t, head, a.G), a.H);
    else
      a.keys.put(at, a.part(t, head, a.G), a.H);
    a.values.put(at, a.part(t, head, a.G + 1), a.H);
  }
}

// `following`: what this thread does next, or null; its first keys are fetched while the last ones here are used.
void attend_work(const Attend& a, const Work& work, const Work* following) {
  const Queries& qs = work.qs;
  const i64 R = work.R(), H = a.padded, first = work.first(a), end = std::min(a.last_key(qs) + 1, work.end * SPLIT);
  Desk desk(a, qs, scratch(kAttend, Desk::floats(R, H)), R, H);
  const bool alone = work.parts == Work::ALONE;
  if (work.writes) write_run(a, {qs.token, qs.token + 1}, qs.head);
  if (alone) begin_total(a, qs, desk.total);
  for (i64 split = work.begin; split < work.end; ++split) {
    const Part part = alone ? desk.part : part_of(a, work, split);
    part.clear(R, H);
    const i64 from = std::max(first, split * SPLIT), until = std::min(end, (split + 1) * SPLIT);
    for (i64 block = from / KEYS * KEYS; block < until; block += KEYS) {
      Ahead ahead;
      if (block + KEYS < end)
        add_block(a, qs, block + KEYS, ahead);
      else if (following)
        add_block(a, following->qs, following->first(a), ahead);
      attend_block(a, qs, block, first, end - 1, desk, part, ahead);
    }
    if (alone) add(R, H, desk.total, part, desk.next, desk.shrink);
  }
  if (alone) put_out(a, qs, desk.total);
}

// Adds up what was made apart: `work` is all splits of some rows.
void attend_join(const Attend& a, const Work& work) {
  const i64 R = work.R(), H = a.padded;
  float* at = scratch(kAttend, Part::floats(R, H) + 2 * Part::whole(R));
  const Part total(at, R, H);
  float* next = at + Part::floats(R, H);
  begin_total(a, work.qs, total);
  for (i64 split = work.begin; split < work.end; ++split)
    add(R, H, total, part_of(a, work, split), next, next + Part::whole(R));
  put_out(a, work.qs, total);
}

ffi::Error bad(const std::string& what) { return ffi::Error::InvalidArgument("xlane attend: " + what); }

// A page id or position out of range must never become a write into somebody else's memory.
std::string check(const Attend& a, const Run& run, i64 rows) {
  const i64 row = a.rows[run.begin], last = a.positions[run.end - 1];
  if (row < 0 || row >= rows) return "token " + std::to_string(run.begin) + " names row " + std::to_string(row);
  if (last / a.W >= a.pmax) return "position " + std::to_string(last) + " lies beyond its row's pages";
  for (i64 at = a.first_key(a.positions[run.begin]) / a.W; at <= last / a.W; ++at) {
    const i64 page = a.table[row * a.pmax + at];
    if (page < 0 || page >= a.P) return "row " + std::to_string(row) + " holds page id " + std::to_string(page);
  }
  return {};
}

// Who does what. Rows that walk the keys together read them once, so there are many in a Work; but none is
// more than its share of everything, or workers would wait for it: then its splits are taken one by one, or it has fewer rows.
struct Plan {
  std::vector<Work> works, joins;  // joins: the rows whose splits are taken one by one
  std::vector<Run> before;         // what is put into pages before any Work begins
  i64 floats = 0;                  // of all parts

  Plan(const Attend& a, const std::vector<Run>& runs, i64 table_rows, i64 workers) {
    i64 all = 0;
    std::vector<int> runs_of(table_rows);
    for (const Run& run : runs) {
      all += a.K * whole(a, run, 0, rows(a, run), 0).weight();
      ++runs_of[a.rows[run.begin]];
    }
    const i64 share = all / (8 * workers);
    // Prompts come last and see the most keys, their last rows most of all: those go first.
    for (auto run = runs.rbegin(); run != runs.rend(); ++run) {
      const i64 R = rows(a, *run), splits = whole(a, *run, 0, R, 0).splits();
      i64 each = std::min(R, MOST_ROWS);
      const i64 needed = a.K * splits * (R / each + 1) * Part::floats(each, a.padded);
      const bool apart = splits > 1 && each * splits > share && floats + needed <= MOST_PART_FLOATS;
      // Keys of one split stay in the nearest caches, and so shall what the rows need.
      while (!apart && each > FEWEST_ROWS && (splits == 1 || each * splits > share)) each = (each + 1) / 2;
      const bool writes = run->end - run->begin == 1 && runs_of[a.rows[run->begin]] == 1 && each == R && !apart;
      if (!writes) before.push_back(*run);
      for (i64 at = (R - 1) / each * each; at >= 0; at -= each)
        for (i64 head = 0; head < a.K; ++head) {
          Work work = whole(a, *run, at, std::min(R, at + each), head);
          work.writes = writes;
          take(work, a.padded, apart);
        }
    }
  }

 private:
  static i64 rows(const Attend& a, const Run& run) { return (run.end - run.begin) * a.G; }
  static Work whole(const Attend& a, const Run& run, i64 begin, i64 end, i64 head) {
    const Queries qs{run.begin, begin, end, head};
    return {qs, a.first_key(qs) / SPLIT, a.last_key(qs) / SPLIT + 1, Work::ALONE};
  }
  void take(Work work, i64 H, bool apart) {
    if (!apart) return works.push_back(work);
    work.parts = floats;
    joins.push_back(work);
    for (i64 split = work.begin; split < work.end; ++split, floats += Part::floats(work.R(), H))
      works.push_back({work.qs, split, split + 1, floats});
  }
};

// What both kinds of pools have alike.
struct Launch {
  ffi::ThreadPool* pool;
  F32x4 qkv;
  I32x1 positions, rows;
  I32x2 table;
  ffi::Result<F32x3> out;
  ffi::RemainingArgs more;
  i64 window;
  float scale, softcap;
  ffi::Span<const float> slopes;
};

ffi::Error attend_over(Launch launch, const Pool& keys, const Pool& values, ffi::Span<const i64> shape) {
  auto& [pool, qkv, positions, rows, table, out, more, window, scale, softcap, slopes] = launch;
  Attend a;
  a.T = qkv.dimensions()[0], a.G = qkv.dimensions()[2] - 2, a.H = qkv.dimensions()[3];
  a.K = shape[0], a.P = shape[1], a.W = shape[2], a.pmax = table.dimensions()[1];
  a.N = a.K * a.G;
  if (a.K == 0 || a.G <= 0 || qkv.dimensions()[1] != a.K || shape[3] != a.H ||
      positions.dimensions()[0] != a.T || rows.dimensions()[0] != a.T)
    return bad("qkv, the pools and the batch do not fit together");
  a.padded = (a.H + PANEL - 1) / PANEL * PANEL, a.window = window, a.scale = scale, a.softcap = softcap;
  if (slopes.size() != 0 && static_cast<i64>(slopes.size()) != a.N) return bad("there must be a slope for each query head");
  a.slopes = slopes.size() ? slopes.begin() : nullptr, a.sinks = nullptr;
  if (more.size() > 0) {
    auto sinks = more.get<F32x2>(0);
    if (!sinks.has_value() || sinks->dimensions()[0] != a.K || sinks->dimensions()[1] != a.G)
      return bad("there must be a sink for each query head");
    a.sinks = sinks->typed_data();
  }
  a.qkv = qkv.typed_data(), a.out = out->typed_data();
  a.keys = keys, a.values = values;
  a.positions = positions.typed_data(), a.rows = rows.typed_data(), a.table = table.typed_data();

  std::vector<Run> runs;
  for (i64 t = 0; t < a.T;) {
    i64 end = t + 1;
    if (a.positions[t] < 0) {
      std::memset(a.out + t * a.N * a.H, 0, a.N * a.H * sizeof(float));
      t = end;
      continue;
    }
    while (end < a.T && a.rows[end] == a.rows[t] && a.positions[end] == a.positions[end - 1] + 1) ++end;
    const Run run{t, end};
    const std::string problem = check(a, run, table.dimensions()[0]);
    if (!problem.empty()) return bad(problem);
    runs.push_back(run);
    t = end;
  }
  if (runs.empty()) return ffi::Error::Success();

  const Plan plan(a, runs, table.dimensions()[0], std::max<i64>(1, pool->num_threads()));
  if (!plan.before.empty())
    parallel(*pool, a.K, a.K == 1 || a.T * a.K * a.H < 65536 ? a.K : 1, [&](Piece piece) {
      for (i64 head = piece.begin; head < piece.end; ++head)
        for (const Run& run : plan.before) write_run(a, run, head);
    });
  const std::vector<Work>& works = plan.works;
  if (plan.floats) a.parts = scratch(kParts, plan.floats);
  parallel(*pool, works.size(), 1, [&](Piece piece) {
    for (i64 i = piece.begin; i < piece.end; ++i) attend_work(a, works[i], i + 1 < piece.stop ? &works[i + 1] : nullptr);
  });
  parallel(*pool, plan.joins.size(), 1, [&](Piece piece) {
    for (i64 i = piece.begin; i < piece.end; ++i) attend_join(a, plan.joins[i]);
  });
  return ffi::Error::Success();
}

constexpr const char* kInPlace = "the pools must be updated in place";

ffi::Error attend(ffi::ThreadPool pool, F32x4 qkv, F32x4 k, F32x4 v, I32x1 positions, I32x1 rows, I32x2 table,
                  ffi::Result<F32x3> out, ffi::Result<F32x4> kout, ffi::Result<F32x4> vout, ffi::RemainingArgs more,
                  int64_t window, float scale, float softcap, ffi::Span<const float> slopes) {
  if (k.typed_data() != kout->typed_data() || v.typed_data() != vout->typed_data()) return bad(kInPlace);
  const Launch launch{&pool, qkv, positions, rows, table, out, more, window, scale, softcap, slopes};
  return attend_over(launch, {k.typed_data(), nullptr, nullptr}, {v.typed_data(), nullptr, nullptr}, k.dimensions());
}

ffi::Error attend8(ffi::ThreadPool pool, F32x4 qkv, S8x4 k, S8x4 v, F32x3 kscales, F32x3 vscales, I32x1 positions,
                   I32x1 rows, I32x2 table, ffi::Result<F32x3> out, ffi::Result<S8x4> kout, ffi::Result<S8x4> vout,
                   ffi::Result<F32x3> kscales_out, ffi::Result<F32x3> vscales_out, ffi::RemainingArgs more,
                   int64_t window, float scale, float softcap, ffi::Span<const float> slopes) {
  if (k.typed_data() != kout->typed_data() || v.typed_data() != vout->typed_data() ||
      kscales.typed_data() != kscales_out->typed_data() || vscales.typed_data() != vscales_out->typed_data())
    return bad(kInPlace);
  for (int i = 0; i < 3; ++i)
    if (kscales.dimensions()[i] != k.dimensions()[i] || vscales.dimensions()[i] != k.dimensions()[i])
      return bad("there must be a scale for each vector of the pools");
  const Launch launch{&pool, qkv, positions, rows, table, out, more, window, scale, softcap, slopes};
  return attend_over(launch, {nullptr, k.typed_data(), kscales.typed_data()},
                     {nullptr, v.typed_data(), vscales.typed_data()}, k.dimensions());
}

}  // namespace

extern "C" const char* xlane_isa() { return kIsa; }

XLA_FFI_DEFINE_HANDLER_SYMBOL(xlane_linear, linear,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<F32x2>().Arg<F32x3>().Ret<F32x2>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(xlane_linear8, linear8,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<F32x2>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<F32x3>()
                                  .Ret<F32x2>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(xlane_linear4, linear4,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<F32x2>()
                                  .Arg<U8x3>()
                                  .Arg<BF16x3>()
                                  .Arg<BF16x3>()
                                  .Ret<F32x2>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(xlane_grouped, grouped,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<F32x2>()
                                  .Arg<F32x4>()
                                  .Arg<I32x1>()
                                  .Ret<F32x2>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(xlane_grouped8, grouped8,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<F32x2>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<F32x4>()
                                  .Arg<I32x1>()
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

XLA_FFI_DEFINE_HANDLER_SYMBOL(xlane_attend, attend,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<F32x4>()
                                  .Arg<F32x4>()
                                  .Arg<F32x4>()
                                  .Arg<I32x1>()
                                  .Arg<I32x1>()
                                  .Arg<I32x2>()
                                  .Ret<F32x3>()
                                  .Ret<F32x4>()
                                  .Ret<F32x4>()
                                  .RemainingArgs()
                                  .Attr<int64_t>("window")
                                  .Attr<float>("scale")
                                  .Attr<float>("softcap")
                                  .Attr<ffi::Span<const float>>("slopes"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(xlane_attend8, attend8,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<F32x4>()
                                  .Arg<S8x4>()
                                  .Arg<S8x4>()
                                  .Arg<F32x3>()
                                  .Arg<F32x3>()
                                  .Arg<I32x1>()
                                  .Arg<I32x1>()
                                  .Arg<I32x2>()
                                  .Ret<F32x3>()
                                  .Ret<S8x4>()
                                  .Ret<S8x4>()
                                  .Ret<F32x3>()
                                  .Ret<F32x3>()
                                  .RemainingArgs()
                                  .Attr<int64_t>("window")
                                  .Attr<float>("scale")
                                  .Attr<float>("softcap")
                                  .Attr<ffi::Span<const float>>("slopes"));
