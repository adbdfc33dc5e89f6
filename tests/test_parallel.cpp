// Loops divided among threads: every item once, exceptions, missing threads (cpu/parallel.h).
#include <gtest/gtest.h>
#include <sys/resource.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <stdexcept>
#include <thread>

#include "cpu/parallel.h"

namespace tq {
namespace {

constexpr int kThreads[] = {1, 2, 3, 7, 33};

TEST(Parallel, EveryItemIsDoneOnce) {
  for (int n_threads : kThreads) {
    for (int64_t n : {0, 1, 2, 5, 100, 1000}) {
      std::vector<std::atomic<int>> done(static_cast<size_t>(n));
      parallel_items(n_threads, n, [&](int64_t i, int) { ++done[static_cast<size_t>(i)]; });
      for (const auto& count : done) ASSERT_EQ(count, 1) << n_threads << " threads, " << n;
    }
  }
}

TEST(Parallel, RangesCoverEverythingAndBeginAtMultiplesOfTheStep) {
  for (int n_threads : kThreads) {
    for (int64_t n : {0, 1, 63, 64, 65, 1000}) {
      std::vector<std::atomic<int>> done(static_cast<size_t>(n));
      const auto range = [&](int64_t begin, int64_t end, int) {
        EXPECT_EQ(begin % 8, 0);
        EXPECT_LT(begin, end);
        for (int64_t i = begin; i < end; ++i) ++done[static_cast<size_t>(i)];
      };
      parallel_ranges(n_threads, n, range, 8);
      for (const auto& count : done) ASSERT_EQ(count, 1) << n_threads << " threads, " << n;
    }
  }
}

TEST(Parallel, NoTwoCallsAtATimeHaveTheSameWorker) {
  constexpr int kN = 7;
  for (int round = 0; round < 200; ++round) {
    std::atomic<bool> busy[kN] = {};
    parallel_items(kN, 64, [&](int64_t, int worker) {
      ASSERT_TRUE(worker >= 0 && worker < kN);
      EXPECT_FALSE(busy[worker].exchange(true));
      std::this_thread::yield();
      busy[worker] = false;
    });
  }
}

// What one loop writes the next one sees: thousands of short loops, as in a forward step.
TEST(Parallel, LoopsFollowEachOtherWithoutLosingWork) {
  std::vector<int64_t> values(256);
  for (int round = 0; round < 20000; ++round) {
    const int n_threads = 1 + round % 5;
    parallel_ranges(n_threads, std::ssize(values), [&](int64_t begin, int64_t end, int) {
      for (int64_t i = begin; i < end; ++i) ++values[static_cast<size_t>(i)];
    });
  }
  for (int64_t value : values) ASSERT_EQ(value, 20000);
}

TEST(Parallel, AnExceptionComesOutOfTheLoopAndTheNextLoopWorks) {
  for (int n_threads : kThreads) {
    for (int64_t thrower : {0, 50, 99}) {
      const auto body = [&](int64_t i, int) {
        if (i == thrower) throw std::runtime_error("item " + std::to_string(i));
      };
      try {
        parallel_items(n_threads, 100, body);
        FAIL() << "nothing was thrown";
      } catch (const std::runtime_error& error) {
        EXPECT_EQ(error.what(), "item " + std::to_string(thrower));
      }
      std::atomic<int64_t> sum = 0;
      parallel_items(n_threads, 100, [&](int64_t i, int) { sum += i; });
      EXPECT_EQ(sum, 4950);
    }
  }
}

TEST(Parallel, ALoopInsideALoopRunsOnItsThread) {
  std::atomic<int64_t> sum = 0;
  parallel_items(4, 10, [&](int64_t, int) {
    const auto self = std::this_thread::get_id();
    parallel_items(4, 10, [&](int64_t i, int worker) {
      EXPECT_EQ(std::this_thread::get_id(), self);
      EXPECT_EQ(worker, 0);
      sum += i;
    });
  });
  EXPECT_EQ(sum, 450);
}

TEST(Parallel, LoopsOfTwoThreadsDoNotDisturbEachOther) {
  const auto many = [] {
    for (int round = 0; round < 500; ++round) {
      std::atomic<int64_t> sum = 0;
      parallel_items(3, 50, [&](int64_t i, int) { sum += i; });
      ASSERT_EQ(sum, 1225);
    }
  };
  std::thread other(many);
  many();
  other.join();
}

// A limit on address space leaves no room for stacks, as a container's limit on processes leaves no
// room for threads: pthread_create fails, and the loop is done by those that are there.
TEST(ParallelDeathTest, MissingThreadsOnlyMakeItSlower) {
#if defined(__SANITIZE_ADDRESS__)
  GTEST_SKIP() << "the shadow memory of AddressSanitizer does not fit the limit";
#endif
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  const auto limited = [] {
    std::FILE* file = std::fopen("/proc/self/statm", "r");
    unsigned long pages = 0;
    if (!file || std::fscanf(file, "%lu", &pages) != 1) std::_Exit(2);
    std::fclose(file);
    const rlim_t bytes = pages * 4096 + (size_t{24} << 20);  // two stacks of 8 MB at most
    const rlimit limit = {bytes, bytes};
    if (setrlimit(RLIMIT_AS, &limit) != 0) std::_Exit(3);
    std::atomic<int64_t> sum = 0;
    parallel_items(64, 1000, [&](int64_t i, int) { sum += i; });
    std::_Exit(sum == 499500 ? 0 : 4);
  };
  EXPECT_EXIT(limited(), ::testing::ExitedWithCode(0), "");
}

TEST(Parallel, ThereIsAtLeastOneProcessor) {
  EXPECT_GE(available_processors(), 1);
  EXPECT_LE(available_processors(), static_cast<int>(std::thread::hardware_concurrency()));
}

}  // namespace
}  // namespace tq
