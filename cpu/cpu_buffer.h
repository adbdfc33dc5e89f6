// cpu_buffer - the CPU's device buffer: floats in host memory, which quant/ may read in place.
//
// Not here: the operations (cpu_backend.h).
#pragma once

#include "model/backend.h"
#include "model/error.h"
#include "model/tensor.h"

namespace tq {

class CpuBuffer : public DeviceBuffer {
 public:
  explicit CpuBuffer(int64_t n_floats)
      : memory_(static_cast<size_t>(n_floats) * sizeof(float)), size_(n_floats) {}
  float* data() { return memory_.as<float>(); }
  const float* data() const { return memory_.as<float>(); }
  int64_t size() const { return size_; }  // floats

 private:
  AlignedBuffer memory_;
  int64_t size_;
};

/// The buffer as the CPU's own type; a buffer of another backend is a bug.
inline CpuBuffer& as_cpu(DeviceBuffer& buffer) {
  auto* own = dynamic_cast<CpuBuffer*>(&buffer);
  TQ_CHECK(own != nullptr, "buffer of another backend");
  return *own;
}
inline const CpuBuffer& as_cpu(const DeviceBuffer& buffer) {
  const auto* own = dynamic_cast<const CpuBuffer*>(&buffer);
  TQ_CHECK(own != nullptr, "buffer of another backend");
  return *own;
}

}  // namespace tq
