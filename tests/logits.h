// logits - all logits of a model on the CPU, and how far two sets are apart, for tests of
// exactness.
#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <vector>

#include "cpu/cpu_backend.h"
#include "model/forward.h"

namespace tq {

/// [ids.size(), vocab_size], with an unrounded cache.
inline std::vector<float> all_logits(const Model& model, const std::vector<int32_t>& ids) {
  CpuBackend backend(2);
  const PreparedModel prepared(model, backend);
  SessionOptions options;
  options.ctx = static_cast<int64_t>(ids.size());
  options.kv_bits = 32;
  Session session(prepared, options);
  std::vector<float> logits;
  session.feed_all(ids, [&](int64_t, int64_t, std::span<const float> rows) {
    logits.insert(logits.end(), rows.begin(), rows.end());
  });
  return logits;
}

/// Largest difference in units of the standard deviation of the logits.
inline double relative_error(const std::vector<float>& got, const std::vector<float>& expected) {
  EXPECT_EQ(got.size(), expected.size());
  double mean = 0, variance = 0, worst = 0;
  for (float v : expected) mean += v / static_cast<double>(expected.size());
  for (size_t i = 0; i < expected.size(); ++i) {
    variance += (expected[i] - mean) * (expected[i] - mean) / static_cast<double>(expected.size());
    const double error = std::fabs(double{got[i]} - expected[i]);
    if (!(error <= worst)) worst = error;
  }
  return worst / std::sqrt(variance);
}

}  // namespace tq
