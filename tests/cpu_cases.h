// cpu_cases - random matrices, linears and helpers shared by the tests and benchmarks of cpu/.
#pragma once

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <memory>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include "cpu/cpu_backend.h"

namespace tq {

inline std::vector<CpuIsa> supported_isas() {
  std::vector<CpuIsa> isas;
  for (CpuIsa isa : {CpuIsa::kPlain, CpuIsa::kAvx2, CpuIsa::kAvx512}) {
    if (isa_supported(isa)) isas.push_back(isa);
  }
  return isas;
}

inline std::vector<float> random_floats(int64_t count, uint32_t seed, float scale = 1.0f) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal(0.0f, scale);
  std::vector<float> values(static_cast<size_t>(count));
  for (float& value : values) value = normal(generator);
  return values;
}

/// A matrix that owns random contents.
struct CaseMatrix {
  Matrix view;
  std::vector<std::byte> data;
  std::vector<uint16_t> scales;

  CaseMatrix() = default;
  CaseMatrix(Storage storage, int64_t rows, int64_t cols, int64_t group, uint32_t seed) {
    view.storage = storage;
    view.rows = rows;
    view.cols = cols;
    view.group = view.packed() ? group : 0;
    data.resize(view.data_bytes());
    std::mt19937 generator(seed);
    if (view.packed()) {
      std::uniform_int_distribution<int> byte(0, 255);
      for (std::byte& value : data) {
        int code = byte(generator);
        if (storage == Storage::kQ8 && code == 128) code = 127;  // -128 is not a code
        value = static_cast<std::byte>(code);
      }
      scales.resize(static_cast<size_t>(rows * view.n_groups()));
      std::uniform_real_distribution<float> scale(0.001f, 0.02f);
      for (uint16_t& value : scales) value = f32_to_f16(scale(generator));
    } else {
      const std::vector<float> values = random_floats(rows * cols, seed, 0.05f);
      for (size_t i = 0; i < values.size(); ++i) {
        if (storage == Storage::kF32) {
          std::memcpy(data.data() + 4 * i, &values[i], 4);
        } else {
          const uint16_t bits =
              storage == Storage::kF16 ? f32_to_f16(values[i]) : f32_to_bf16(values[i]);
          std::memcpy(data.data() + 2 * i, &bits, 2);
        }
      }
    }
    view.data = data.data();
    view.scales = scales.data();
  }
  CaseMatrix(const CaseMatrix&) = delete;
  CaseMatrix(CaseMatrix&& other) noexcept { *this = std::move(other); }
  CaseMatrix& operator=(CaseMatrix&& other) noexcept {
    view = other.view;
    data = std::move(other.data);
    scales = std::move(other.scales);
    return *this;
  }
  /// Element as a number.
  double at(int64_t row, int64_t col) const {
    std::vector<float> values(static_cast<size_t>(view.cols));
    matrix_row_f32(view, row, values.data());
    return values[static_cast<size_t>(col)];
  }
  std::vector<float> row(int64_t index) const {
    std::vector<float> values(static_cast<size_t>(view.cols));
    matrix_row_f32(view, index, values.data());
    return values;
  }
};

inline BufferPtr to_device(Backend& backend, const std::vector<float>& values) {
  BufferPtr buffer = backend.alloc(static_cast<int64_t>(values.size()));
  backend.upload(*buffer, values);
  return buffer;
}
inline std::vector<float> to_host(Backend& backend, const DeviceBuffer& buffer, int64_t count) {
  std::vector<float> values(static_cast<size_t>(count));
  backend.download(buffer, 0, values);
  return values;
}

/// linear(x) of `rows` tokens, [rows, out_dim].
inline std::vector<float> run_linear(CpuBackend& backend, const Linear& linear,
                                     const std::vector<float>& x, int64_t rows) {
  const auto prepared = backend.prepare(linear);
  const BufferPtr input = to_device(backend, x);
  const BufferPtr output = backend.alloc(rows * linear.out_dim());
  const PreparedLinear* weights[] = {prepared.get()};
  DeviceBuffer* outputs[] = {output.get()};
  backend.linears(weights, *input, rows, outputs);
  return to_host(backend, *output, rows * linear.out_dim());
}

/// Bit for bit equal, except that +0 and -0 are the same number.
inline ::testing::AssertionResult same_numbers(const std::vector<float>& a,
                                               const std::vector<float>& b) {
  if (a.size() != b.size()) return ::testing::AssertionFailure() << "sizes differ";
  for (size_t i = 0; i < a.size(); ++i) {
    if (!(a[i] == b[i]) && std::bit_cast<uint32_t>(a[i]) != std::bit_cast<uint32_t>(b[i])) {
      return ::testing::AssertionFailure() << "element " << i << ": " << a[i] << " != " << b[i];
    }
  }
  return ::testing::AssertionSuccess();
}

}  // namespace tq
