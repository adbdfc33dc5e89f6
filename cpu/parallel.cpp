// parallel - the threads behind parallel.h: one pool for the process. Read ThreadPool::run() first.
#include "cpu/parallel.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>

#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <exception>
#include <mutex>
#include <new>
#include <utility>

namespace tq {
namespace {

// How long a thread that waits keeps its core before it sleeps. Loops of one forward step follow
// each other within this time; waking a sleeping thread takes as long. 20 to 100 us give the same
// decode speed (SmolLM2-135M, 2 cores, idle), 5 us up to a tenth less.
constexpr std::chrono::microseconds kSpinTime{50};

// The part of a loop that one worker takes first. Others help themselves when theirs is done.
struct alignas(64) Share {
  std::atomic<int64_t> next{0};
  int64_t end = 0;
};

// Waits until ready(), but not longer than kSpinTime.
template <typename Ready>
bool spin_until(const Ready& ready) {
  const auto deadline = std::chrono::steady_clock::now() + kSpinTime;
  do {
    for (int i = 0; i < 16; ++i) {
      if (ready()) return true;
      __builtin_ia32_pause();
    }
  } while (std::chrono::steady_clock::now() < deadline);
  return false;
}

// Set while a thread works on a piece: a loop inside a loop must not wait for the pool.
thread_local bool t_inside = false;

class ThreadPool {
 public:
  void run(int n_threads, int64_t n_pieces, detail::PieceFunction function, const void* body) {
    std::unique_lock<std::mutex> turn(turn_, std::try_to_lock);
    if (!turn || !provide(n_threads)) {  // another thread's loop is running, or there is no memory
      for (int64_t piece = 0; piece < n_pieces; ++piece) function(body, piece, 0);
      return;
    }
    // Nobody is inside (the count is zero and the door is shut), so the job may change.
    function_ = function;
    body_ = body;
    n_threads_ = n_threads;
    failed_.store(false, std::memory_order_relaxed);
    for (int64_t i = 0; i < n_threads; ++i) {
      shares_[static_cast<size_t>(i)].next.store(n_pieces * i / n_threads,
                                                 std::memory_order_relaxed);
      shares_[static_cast<size_t>(i)].end = n_pieces * (i + 1) / n_threads;
    }
    inside_.store(0, std::memory_order_release);  // opens the door
    epoch_.fetch_add(1, std::memory_order_release);
    epoch_.notify_all();
    work(0);
    inside_.fetch_or(kShut, std::memory_order_acq_rel);
    const auto empty = [&] { return inside_.load(std::memory_order_acquire) == kShut; };
    if (!empty() && (!may_spin() || !spin_until(empty))) {
      for (uint32_t now; (now = inside_.load(std::memory_order_acquire)) != kShut;) {
        inside_.wait(now);
      }
    }
    if (failed_.load(std::memory_order_relaxed)) {
      std::rethrow_exception(std::exchange(exception_, nullptr));
    }
  }

 private:
  static constexpr uint32_t kShut = 1u << 31;

  struct Start {
    ThreadPool* pool;
    int worker;
  };

  // More threads than processors take each other's place when they spin.
  bool may_spin() const { return n_threads_ <= n_processors_; }

  // Makes shares and starts threads for loops of n_threads. What cannot be started is done without;
  // false if there is no memory for the shares.
  bool provide(int n_threads) {
    if (n_threads <= n_shares_) return true;
    try {
      auto shares = std::make_unique<Share[]>(static_cast<size_t>(n_threads));
      shares_ = std::move(shares);  // nobody is inside
      n_shares_ = n_threads;
    } catch (const std::bad_alloc&) {
      return false;
    }
    while (n_started_ < n_threads - 1 && start_thread(n_started_ + 1)) ++n_started_;
    return true;
  }

  bool start_thread(int worker) {
    // Signals from outside are for the thread that looks at their flag; faults stay its own.
    sigset_t outside, before;
    sigfillset(&outside);
    for (int fault : {SIGBUS, SIGSEGV, SIGFPE, SIGILL, SIGABRT}) sigdelset(&outside, fault);
    pthread_sigmask(SIG_SETMASK, &outside, &before);
    pthread_t thread;
    std::unique_ptr<Start> start(new (std::nothrow) Start{this, worker});
    // Not the limit of the main thread's stack, which may be far too small, or too large for many.
    constexpr size_t kStackBytes = size_t{2} << 20;
    pthread_attr_t attributes;
    bool started = start && pthread_attr_init(&attributes) == 0;
    if (started) {
      pthread_attr_setstacksize(&attributes, kStackBytes);
      started = pthread_create(&thread, &attributes, &enter, start.get()) == 0;
      pthread_attr_destroy(&attributes);
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    if (!started) return false;
    static_cast<void>(start.release());
    pthread_detach(thread);
    return true;
  }

  static void* enter(void* argument) {
    const std::unique_ptr<Start> start(static_cast<Start*>(argument));
    start->pool->serve(start->worker);
    return nullptr;
  }

  // What a thread of the pool does until the process ends.
  void serve(int worker) {
    t_inside = true;
    for (uint32_t seen = 0;;) {
      const auto called = [&] { return epoch_.load(std::memory_order_acquire) != seen; };
      if (!called() && (!spins_.load(std::memory_order_relaxed) || !spin_until(called))) {
        epoch_.wait(seen);
        continue;
      }
      seen = epoch_.load(std::memory_order_acquire);
      if (!come_in()) continue;
      if (worker < n_threads_) {
        spins_.store(may_spin(), std::memory_order_relaxed);
        work(worker);
      }
      if (inside_.fetch_sub(1, std::memory_order_acq_rel) == (kShut | 1)) inside_.notify_all();
    }
  }

  // Once inside, the job does not change. Whoever comes too late finds the door shut.
  bool come_in() {
    uint32_t now = inside_.load(std::memory_order_acquire);
    while (!(now & kShut)) {
      if (inside_.compare_exchange_weak(now, now + 1, std::memory_order_acq_rel)) return true;
    }
    return false;
  }

  // Takes pieces of its own share, then of the others', until none is left.
  void work(int worker) {
    const bool was_inside = std::exchange(t_inside, true);
    for (int i = 0; i < n_threads_; ++i) {
      Share& share = shares_[static_cast<size_t>((worker + i) % n_threads_)];
      while (!failed_.load(std::memory_order_relaxed)) {
        if (share.next.load(std::memory_order_relaxed) >= share.end) break;
        const int64_t piece = share.next.fetch_add(1, std::memory_order_relaxed);
        if (piece >= share.end) break;
        try {
          function_(body_, piece, worker);
        } catch (...) {
          if (!failed_.exchange(true, std::memory_order_acq_rel)) {
            exception_ = std::current_exception();
          }
        }
      }
    }
    t_inside = was_inside;
  }

  std::mutex turn_;
  std::unique_ptr<Share[]> shares_;
  int n_shares_ = 0, n_started_ = 0;
  const int n_processors_ = available_processors();
  // The job; changes only while nobody is inside.
  detail::PieceFunction function_ = nullptr;
  const void* body_ = nullptr;
  int n_threads_ = 0;
  std::atomic<bool> failed_{false}, spins_{true};
  std::exception_ptr exception_;
  // Counts loops; threads without work wait for it to change.
  alignas(64) std::atomic<uint32_t> epoch_{0};
  // Threads of the pool that work on the job, and whether more may come.
  alignas(64) std::atomic<uint32_t> inside_{kShut};
};

// Never destroyed: its threads wait on its members until the process ends.
ThreadPool& pool() {
  static ThreadPool* const instance = new ThreadPool;
  return *instance;
}

// Processors of a container's CPU quota (cgroup v2), 0 where there is none.
int quota_processors() {
  std::FILE* file = std::fopen("/sys/fs/cgroup/cpu.max", "re");
  if (!file) return 0;
  double quota = 0, period = 0;  // "max 100000" leaves both zero
  const bool limited = std::fscanf(file, "%lf %lf", &quota, &period) == 2;
  std::fclose(file);
  return limited && quota > 0 && period > 0 ? static_cast<int>(std::ceil(quota / period)) : 0;
}

}  // namespace

int available_processors() {
  cpu_set_t set;  // too small a set only on machines of more than 1024 processors
  const int allowed = sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : 1;
  const int quota = quota_processors();
  return std::max(1, quota > 0 ? std::min(allowed, quota) : allowed);
}

void detail::run_pieces(int n_threads, int64_t n_pieces, PieceFunction function, const void* body) {
  n_threads = static_cast<int>(std::min<int64_t>(n_threads, n_pieces));
  if (n_threads > 1 && !t_inside) {
    pool().run(n_threads, n_pieces, function, body);
    return;
  }
  for (int64_t piece = 0; piece < n_pieces; ++piece) function(body, piece, 0);
}

}  // namespace tq
