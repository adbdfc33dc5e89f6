// parallel - loops divided among threads: the one place where tq starts any.
//
// Why not OpenMP: its runtime ends the process when a thread cannot be created, an exception that
// leaves a region ends it too, and a thread that waits either spins for milliseconds (and takes the
// core from whoever needs it) or sleeps at once (and is late for the next of a thousand short loops
// a second). Here a missing thread only means that the others do its share, an exception comes out
// of the loop that raised it, and waiting spins for some microseconds, then sleeps.
//
// The share of a thread that has not woken up yet is taken by the others, so a loop is never slower
// than on one thread by more than a hand-over. Results must not depend on who does what.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

namespace tq {

/// Processors that this process may use: its affinity mask, and the CPU quota of its container.
int available_processors();

namespace detail {
using PieceFunction = void (*)(const void* body, int64_t piece, int worker);
void run_pieces(int n_threads, int64_t n_pieces, PieceFunction function, const void* body);
}  // namespace detail

/// body(item, worker) for every item of [0, n_items), taken one by one; for items that are long or
/// differ in length. worker: 0 .. n_threads - 1, no two calls at a time have the same (scratch
/// memory goes by it). The calling thread is one of the workers. Rethrows the first exception of a
/// body when all have ended; items not begun by then are left out. A loop inside a loop runs on the
/// thread that it is on.
template <typename Body>
void parallel_items(int n_threads, int64_t n_items, const Body& body) {
  const auto piece = [](const void* data, int64_t item, int worker) {
    (*static_cast<const Body*>(data))(item, worker);
  };
  detail::run_pieces(n_threads, n_items, piece, &body);
}

/// body(begin, end, worker) over ranges that cover [0, count), a few for each thread; for many
/// short items of equal length. Ranges begin at multiples of `step`.
template <typename Body>
void parallel_ranges(int n_threads, int64_t count, const Body& body, int64_t step = 1) {
  // Enough that a thread which starts late costs a fraction of its share, few enough that taking
  // one (an atomic addition) is nothing.
  constexpr int64_t kPiecesPerThread = 4;
  const int64_t n_steps = (count + step - 1) / step;
  const int64_t n_pieces =
      n_threads > 1 ? std::min(n_steps, kPiecesPerThread * n_threads) : std::min<int64_t>(count, 1);
  parallel_items(n_threads, n_pieces, [&](int64_t piece, int worker) {
    const int64_t begin = n_steps * piece / n_pieces * step;
    const int64_t end = std::min(n_steps * (piece + 1) / n_pieces * step, count);
    body(begin, end, worker);
  });
}

/// Something that each worker of a loop needs for itself, such as scratch memory: made by the
/// worker when it first asks, so that a worker without work costs nothing.
template <typename T>
class PerWorker {
 public:
  explicit PerWorker(int n_threads) : own_(static_cast<size_t>(n_threads)) {}
  template <typename... Arguments>
  T& get(int worker, const Arguments&... arguments) {
    std::unique_ptr<T>& own = own_[static_cast<size_t>(worker)];
    if (!own) own = std::make_unique<T>(arguments...);
    return *own;
  }

 private:
  std::vector<std::unique_ptr<T>> own_;
};

}  // namespace tq
