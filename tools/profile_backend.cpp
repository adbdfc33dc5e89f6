// profile_backend - see profile_backend.h.
#include "tools/profile_backend.h"

#include <chrono>

namespace tq {
namespace {

class ProfileBackend : public Backend {
 public:
  ProfileBackend(std::unique_ptr<Backend> inner, std::map<std::string, OpTime>& times)
      : inner_(std::move(inner)), times_(times) {}

  std::string name() const override { return inner_->name(); }
  int64_t step_rows() const override { return inner_->step_rows(); }
  BufferPtr alloc(int64_t n) override { return inner_->alloc(n); }
  void upload(DeviceBuffer& dst, std::span<const float> src) override { inner_->upload(dst, src); }
  void download(const DeviceBuffer& src, int64_t offset, std::span<float> out) override {
    timed("download", [&] { inner_->download(src, offset, out); });
  }
  void top(const DeviceBuffer& src, int64_t n, int64_t count,
           std::vector<Candidate>& out) override {
    timed("top", [&] { inner_->top(src, n, count, out); });
  }
  std::unique_ptr<PreparedLinear> prepare(const Linear& l) override { return inner_->prepare(l); }
  std::unique_ptr<PreparedTable> prepare_table(const Matrix& table) override {
    return inner_->prepare_table(table);
  }
  std::unique_ptr<PreparedTransform> prepare_transform(const Transform& transform) override {
    return inner_->prepare_transform(transform);
  }
  std::unique_ptr<KvCache> make_kv_cache(const Config& config, int64_t ctx, int bits) override {
    return inner_->make_kv_cache(config, ctx, bits);
  }
  int64_t kv_bytes(const Config& config, int64_t ctx, int bits) const override {
    return inner_->kv_bytes(config, ctx, bits);
  }
  void embed(const PreparedTable& table, std::span<const int32_t> tokens,
             DeviceBuffer& x) override {
    timed("embed", [&] { inner_->embed(table, tokens, x); });
  }
  void rms_norm(const DeviceBuffer& x, const DeviceBuffer& gain, float eps, int64_t rows,
                int64_t cols, DeviceBuffer& out) override {
    timed("rms_norm", [&] { inner_->rms_norm(x, gain, eps, rows, cols, out); });
  }
  void linears(std::span<const PreparedLinear* const> weights, const DeviceBuffer& x, int64_t rows,
               std::span<DeviceBuffer* const> out) override {
    // The number of weights tells the site: 3 = q, k, v; 2 = gate, up; 1 = wo, w_down or lm_head.
    const char* site = weights.size() == 3   ? "linears q k v"
                       : weights.size() == 2 ? "linears gate up"
                                             : "linears wo, w_down, lm_head";
    timed(site, [&] { inner_->linears(weights, x, rows, out); });
  }
  void rope(DeviceBuffer& x, int64_t rows, int64_t n_heads, int64_t head_dim, int64_t pos0,
            const RopeTable& table) override {
    timed("rope", [&] { inner_->rope(x, rows, n_heads, head_dim, pos0, table); });
  }
  void attention(const DeviceBuffer& q, const DeviceBuffer& k, const DeviceBuffer& v,
                 const Config& config, KvCache& cache, int64_t layer, int64_t pos0, int64_t rows,
                 DeviceBuffer& out) override {
    timed("attention", [&] { inner_->attention(q, k, v, config, cache, layer, pos0, rows, out); });
  }
  void silu_mul(DeviceBuffer& gate, const DeviceBuffer& up, int64_t count) override {
    timed("silu_mul", [&] { inner_->silu_mul(gate, up, count); });
  }
  void add(DeviceBuffer& x, const DeviceBuffer& y, int64_t count) override {
    timed("add", [&] { inner_->add(x, y, count); });
  }
  void scale_columns(DeviceBuffer& x, int64_t rows, int64_t cols,
                     const DeviceBuffer& factors) override {
    timed("scale_columns", [&] { inner_->scale_columns(x, rows, cols, factors); });
  }
  void transform(DeviceBuffer& x, int64_t rows, const PreparedTransform& basis,
                 bool inverse) override {
    timed("transform", [&] { inner_->transform(x, rows, basis, inverse); });
  }
  void copy_rows(const DeviceBuffer& src, int64_t first, int64_t rows, int64_t cols,
                 DeviceBuffer& dst) override {
    timed("copy_rows", [&] { inner_->copy_rows(src, first, rows, cols, dst); });
  }
  void begin_step(int64_t rows) override { inner_->begin_step(rows); }
  void end_step() override { inner_->end_step(); }
  void synchronize() override { inner_->synchronize(); }

 private:
  template <typename F>
  void timed(const char* op, F&& run) {
    const auto start = std::chrono::steady_clock::now();
    run();
    inner_->synchronize();
    OpTime& time = times_[op];
    time.seconds += std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    ++time.calls;
  }

  std::unique_ptr<Backend> inner_;
  std::map<std::string, OpTime>& times_;
};

}  // namespace

std::unique_ptr<Backend> make_profile_backend(std::unique_ptr<Backend> inner,
                                              std::map<std::string, OpTime>& times) {
  return std::make_unique<ProfileBackend>(std::move(inner), times);
}

}  // namespace tq
