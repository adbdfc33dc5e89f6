// cpu_backend - model/backend.h on the CPU: who computes what, on how many threads.
//
// Results depend on neither the number of threads nor the instruction set. Not here: arithmetic
// (ops.h, matmul.h, packed_matmul.h, attention.h, hadamard.h). Read next: cpu_backend.cpp.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "cpu/cpu_buffer.h"
#include "cpu/isa.h"
#include "cpu/kernels.h"
#include "cpu/linear.h"
#include "model/backend.h"

namespace tq {

class CpuBackend : public Backend {
 public:
  /// n_threads: 0 = all cores. Throws kUsage if this machine cannot run `isa`.
  explicit CpuBackend(int n_threads = 0, CpuIsa isa = best_isa());
  std::string name() const override;
  int n_threads() const { return n_threads_; }
  CpuIsa isa() const { return kernels_.isa; }

  BufferPtr alloc(int64_t n_floats) override;
  void upload(DeviceBuffer& dst, std::span<const float> src) override;
  void download(const DeviceBuffer& src, int64_t offset, std::span<float> out) override;
  void top(const DeviceBuffer& src, int64_t n, int64_t count, std::vector<Candidate>& out) override;

  std::unique_ptr<PreparedLinear> prepare(const Linear& linear) override;
  std::unique_ptr<PreparedTable> prepare_table(const Matrix& table) override;
  std::unique_ptr<PreparedTransform> prepare_transform(const Transform& transform) override;
  std::unique_ptr<KvCache> make_kv_cache(const Config& config, int64_t ctx, int kv_bits) override;
  int64_t kv_bytes(const Config& config, int64_t ctx, int kv_bits) const override;
  double scratch_bytes(const Config& config, int64_t rows) const override;
  uint64_t available_bytes() const override;

  void embed(const PreparedTable& table, std::span<const int32_t> tokens, DeviceBuffer& x) override;
  void rms_norm(const DeviceBuffer& x, const DeviceBuffer& gain, float eps, int64_t rows,
                int64_t cols, DeviceBuffer& out) override;
  void linears(std::span<const PreparedLinear* const> weights, const DeviceBuffer& x, int64_t rows,
               std::span<DeviceBuffer* const> out) override;
  void rope(DeviceBuffer& x, int64_t rows, int64_t n_heads, int64_t head_dim, int64_t pos0,
            const RopeTable& table) override;
  void attention(const DeviceBuffer& q, const DeviceBuffer& k, const DeviceBuffer& v,
                 const Config& config, KvCache& cache, int64_t layer, int64_t pos0, int64_t rows,
                 DeviceBuffer& out) override;
  void silu_mul(DeviceBuffer& gate, const DeviceBuffer& up, int64_t count) override;
  void add(DeviceBuffer& x, const DeviceBuffer& y, int64_t count) override;
  void scale_columns(DeviceBuffer& x, int64_t rows, int64_t cols,
                     const DeviceBuffer& factors) override;
  void transform(DeviceBuffer& x, int64_t rows, const PreparedTransform& basis,
                 bool inverse) override;
  void copy_rows(const DeviceBuffer& src, int64_t first_row, int64_t rows, int64_t cols,
                 DeviceBuffer& dst) override;

 private:
  int threads_for(int64_t n_floats) const;
  /// body(row, worker) for every row, divided among threads if there is work for them.
  template <typename Body>
  void for_rows(int64_t rows, int64_t floats_each, const Body& body) const;
  void prepare_angles(const RopeTable& table, int64_t half, int64_t pos0, int64_t rows);

  int n_threads_;
  const Kernels& kernels_;
  LinearScratch linear_scratch_;
  AlignedBuffer attention_scratch_, transform_scratch_;
  // cos and sin of the positions of the last step: the same for every layer, for q and for k.
  struct Angles {
    std::vector<float> inv_freq;
    float attention_factor = 0;
    int64_t pos0 = 0, rows = 0;
    std::vector<float> cos, sin;  // [rows, half]
  } angles_;
};

}  // namespace tq
