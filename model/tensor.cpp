// tensor - see tensor.h.
#include "model/tensor.h"

#include <bit>
#include <cstdlib>
#include <new>

#include "model/error.h"

namespace tq {

size_t dtype_size(DType dtype) {
  switch (dtype) {
    case DType::kF32:
      return 4;
    case DType::kF16:
    case DType::kBF16:
      return 2;
    case DType::kU8:
      return 1;
  }
  return 0;
}

const char* dtype_name(DType dtype) {
  switch (dtype) {
    case DType::kF32:
      return "F32";
    case DType::kF16:
      return "F16";
    case DType::kBF16:
      return "BF16";
    case DType::kU8:
      return "U8";
  }
  return "?";
}

uint16_t f32_to_bf16(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return static_cast<uint16_t>(bits >> 16 | 0x40);  // NaN
  return static_cast<uint16_t>((bits + 0x7FFFu + (bits >> 16 & 1)) >> 16);
}

float f16_to_f32(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16;
  const uint32_t exponent = bits >> 10 & 0x1F;
  const uint32_t mantissa = bits & 0x3FF;
  if (exponent == 31) return std::bit_cast<float>(sign | 0x7F800000u | mantissa << 13);
  if (exponent == 0) {
    // Subnormal: mantissa * 2^-24, exact in f32.
    const float magnitude = static_cast<float>(mantissa) * 0x1.0p-24f;
    return sign ? -magnitude : magnitude;
  }
  return std::bit_cast<float>(sign | (exponent + 112) << 23 | mantissa << 13);
}

uint16_t f32_to_f16(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
  const uint32_t magnitude = bits & 0x7FFFFFFFu;
  if (magnitude > 0x7F800000u) return sign | 0x7E00;   // NaN
  if (magnitude >= 0x47800000u) return sign | 0x7C00;  // 65536 and up, infinity
  if (magnitude < 0x38800000u) {
    // Below 2^-14 the step is 2^-24: let the addition of 0.5 round to that step, ties to even.
    const float shifted = std::bit_cast<float>(magnitude) + 0.5f;
    return sign | static_cast<uint16_t>(std::bit_cast<uint32_t>(shifted) - 0x3F000000u);
  }
  // Rebias the exponent and round the 13 dropped bits; a carry into the exponent is right, and
  // reaches infinity for 65520 and up.
  return sign |
         static_cast<uint16_t>((magnitude - 0x38000000u + 0xFFFu + (magnitude >> 13 & 1)) >> 13);
}

int64_t TensorView::n_elements() const {
  int64_t count = 1;
  for (int64_t size : shape) count *= size;
  return count;
}

float element_as_f32(const TensorView& view, int64_t index) {
  float value;
  convert_to_f32(view, index, 1, &value);
  return value;
}

void convert_to_f32(const TensorView& view, int64_t first, int64_t count, float* out) {
  const std::byte* begin = view.data + static_cast<size_t>(first) * dtype_size(view.dtype);
  switch (view.dtype) {
    case DType::kF32:
      std::memcpy(out, begin, static_cast<size_t>(count) * 4);
      return;
    case DType::kF16:
      for (int64_t i = 0; i < count; ++i) {
        uint16_t bits;
        std::memcpy(&bits, begin + 2 * i, 2);
        out[i] = f16_to_f32(bits);
      }
      return;
    case DType::kBF16:
      for (int64_t i = 0; i < count; ++i) {
        uint16_t bits;
        std::memcpy(&bits, begin + 2 * i, 2);
        out[i] = bf16_to_f32(bits);
      }
      return;
    case DType::kU8:
      for (int64_t i = 0; i < count; ++i) out[i] = static_cast<float>(begin[i]);
      return;
  }
}

std::vector<float> to_f32(const TensorView& view) {
  std::vector<float> values(static_cast<size_t>(view.n_elements()));
  convert_to_f32(view, 0, view.n_elements(), values.data());
  return values;
}

AlignedBuffer::AlignedBuffer(size_t bytes) : size_(bytes) {
  if (bytes > SIZE_MAX - 63) throw std::bad_alloc();
  const size_t rounded = (bytes + 63) / 64 * 64;
  auto* data = static_cast<std::byte*>(std::aligned_alloc(64, rounded ? rounded : 64));
  if (!data) throw std::bad_alloc();
  std::memset(data, 0, rounded);
  data_.reset(data);
}

void AlignedBuffer::Free::operator()(std::byte* p) const {
  std::free(p);
}

}  // namespace tq
