// Work shared by XLA's own threads, and memory that each of them keeps.
//
// Knows units of work by number; not what they are.

#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <vector>

#include "xla/ffi/api/ffi.h"

#include "vectors.h"

namespace {

namespace ffi = xla::ffi;

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

}  // namespace
