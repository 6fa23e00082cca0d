// Attention of some query rows to one block of keys: scores, what softmax makes of them, values; and how sums of several
// blocks are added up.

#pragma once

#include "numbers.h"
#include "pages.h"

namespace {

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
  // Without this, here and in products, GCC unrolls the loop too late to see that the sums need no memory: it clears
  // them there with memset, and copies them in and out at each call.
#pragma GCC unroll 16
  for (int r = 0; r < MR; ++r)
    for (int c = 0; c < NP * VECTORS; ++c) store(out + r * stride + c * LANES, acc[r][c]);
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

}  // namespace
