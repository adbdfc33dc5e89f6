// cuda_fixture - what the tests of the CUDA backend share: both backends, and buffers whose ends
// are watched.
//
// Without a GPU all cases are skipped, and say so; with TQ_REQUIRE_GPU set they fail instead (make
// test-cuda). Outputs are followed by sentinels that must survive. Seeds are printed with a
// failure. Not here: random matrices and inputs (cpu_cases.h). Read next: test_cuda_ops.cpp,
// test_cuda_linears.cpp.
#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "cuda/cuda_backend.h"
#include "tests/cpu_cases.h"

namespace tq {

inline constexpr double kEps = 0x1p-24;  // half an ulp of 1 in f32
inline constexpr float kSentinel = 12345.678f;
inline constexpr int64_t kGuard = 257;  // floats behind each output
inline constexpr uint32_t kSeeds[] = {1, 22, 333, 4444, 55555};

class Cuda : public ::testing::Test {
 protected:
  void SetUp() override {
    std::string why;
    if (cuda_usable(why)) {
      gpu_ = make_cuda_backend();
      return;
    }
    if (std::getenv("TQ_REQUIRE_GPU")) FAIL() << why;
    GTEST_SKIP() << "no GPU: " << why;
  }
  Backend& gpu() { return *gpu_; }
  Backend& cpu() { return cpu_; }

  // A buffer with sentinels behind its `values`.
  static BufferPtr guarded(Backend& backend, std::vector<float> values) {
    values.resize(values.size() + kGuard, kSentinel);
    return to_device(backend, values);
  }
  static BufferPtr guarded(Backend& backend, int64_t count) {
    return guarded(backend, std::vector<float>(static_cast<size_t>(count), kSentinel));
  }
  static std::vector<float> taken(Backend& backend, const DeviceBuffer& buffer, int64_t count) {
    std::vector<float> values = to_host(backend, buffer, count + kGuard);
    for (int64_t i = count; i < count + kGuard; ++i) {
      EXPECT_EQ(values[static_cast<size_t>(i)], kSentinel) << "sentinel " << i - count;
    }
    values.resize(static_cast<size_t>(count));
    return values;
  }

 private:
  std::unique_ptr<Backend> gpu_;
  CpuBackend cpu_{2};
};

inline double norm(const float* x, int64_t count) {
  double sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += static_cast<double>(x[i]) * static_cast<double>(x[i]);
  return std::sqrt(sum);
}

// Elements within bound(i) of each other.
template <typename Bound>
void expect_near(const std::vector<float>& got, const std::vector<float>& expected,
                 const Bound& bound) {
  ASSERT_EQ(got.size(), expected.size());
  for (size_t i = 0; i < got.size(); ++i) {
    const double error = std::fabs(static_cast<double>(got[i]) - static_cast<double>(expected[i]));
    if (error <= bound(i)) continue;  // NaN fails
    FAIL() << "element " << i << ": " << got[i] << " instead of " << expected[i] << ", bound "
           << bound(i);
  }
}

}  // namespace tq
