// What products and attention have alike: how rows are cut into tiles, how many panels a tile takes at once, and how memory
// is asked for ahead.

#pragma once

#include "vectors.h"

namespace {

constexpr int KEYS = 64;  // keys of one softmax block

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

constexpr int panels_at_once(int rows) {
  int fit = BUDGET / (rows * VECTORS);
  return fit < 1 ? 1 : fit > 4 ? 4 : fit;
}

// Even cuts, into tiles of at most so many rows: with 8, 18 rows are 6 + 6 + 6, not 8 + 8 + 2.
struct Cut {
  i64 tiles, each, more;  // the first `more` tiles have a row more than `each`
  explicit Cut(i64 rows, i64 most = MAX_ROWS)
      : tiles((rows + most - 1) / most), each(rows / std::max<i64>(tiles, 1)), more(rows - tiles * each) {}
  i64 begin(i64 tile) const { return tile * each + std::min(tile, more); }
  int size(i64 tile) const { return static_cast<int>(each + (tile < more)); }
};

}  // namespace
