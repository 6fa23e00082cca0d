// Paged attention: keys and values are put into their pages in place, then queries attend to all they may see.
//
// Knows who does what, on which threads, and whether a call makes sense; not how a block is computed.

#include <string>
#include <vector>

#include "block.h"
#include "threads.h"

namespace {

using F32x2 = ffi::Buffer<ffi::F32, 2>;
using F32x3 = ffi::Buffer<ffi::F32, 3>;
using F32x4 = ffi::Buffer<ffi::F32, 4>;
using S8x4 = ffi::Buffer<ffi::S8, 4>;
using I32x1 = ffi::Buffer<ffi::S32, 1>;
using I32x2 = ffi::Buffer<ffi::S32, 2>;

constexpr i64 FEWEST_ROWS = 5 * QUERY_ROWS, MOST_ROWS = 10 * QUERY_ROWS;  // query rows of a Work, if there are so many
constexpr i64 SPLIT = 4 * KEYS;  // keys that are added up apart from others, by absolute position
constexpr i64 MOST_PART_FLOATS = i64{1} << 24;  // of all that is made apart in a launch

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
