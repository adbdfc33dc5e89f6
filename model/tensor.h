// tensor - data types, views and owned memory. No arithmetic here (see cpu/ops.h).
//
// A view never owns; MappedFile and AlignedBuffer own. Read next: model/weights.h.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

namespace tq {

/// Element types of dense tensors, plus raw bytes for texts kept inside a .tq file.
enum class DType : uint8_t { kF32, kF16, kBF16, kU8 };

size_t dtype_size(DType dtype);       // bytes per element
const char* dtype_name(DType dtype);  // "F32", "F16", "BF16", "U8"

/// bfloat16 is the upper half of a float32.
inline float bf16_to_f32(uint16_t bits) {
  uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}
uint16_t f32_to_bf16(float value);  // round to nearest even; NaN stays NaN
float f16_to_f32(uint16_t bits);    // exact
uint16_t f32_to_f16(float value);   // round to nearest even; overflow gives infinity

/// A dense row-major array somewhere else in memory (a mapped file, a buffer). Never owns.
struct TensorView {
  DType dtype = DType::kF32;
  std::vector<int64_t> shape;
  const std::byte* data = nullptr;

  int64_t n_elements() const;
  size_t n_bytes() const { return static_cast<size_t>(n_elements()) * dtype_size(dtype); }
};

/// Element `index` of a view as float.
float element_as_f32(const TensorView& view, int64_t index);
/// Converts `count` elements from `first` on into `out`.
void convert_to_f32(const TensorView& view, int64_t first, int64_t count, float* out);
std::vector<float> to_f32(const TensorView& view);

/// Zero-initialised memory aligned to 64 bytes (one cache line, one AVX-512 register).
class AlignedBuffer {
 public:
  AlignedBuffer() = default;
  explicit AlignedBuffer(size_t bytes);
  template <typename T>
  T* as() {
    return reinterpret_cast<T*>(data_.get());
  }
  template <typename T>
  const T* as() const {
    return reinterpret_cast<const T*>(data_.get());
  }
  size_t size() const { return size_; }

 private:
  struct Free {
    void operator()(std::byte* p) const;
  };
  std::unique_ptr<std::byte, Free> data_;
  size_t size_ = 0;
};

}  // namespace tq
