// safetensors_writer - builds small safetensors files, right and wrong ones, byte by byte.
#pragma once

#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "model/tensor.h"

namespace tq {

/// A file of 8 bytes length, header text and data.
inline std::string safetensors_bytes(const std::string& header, const std::string& data) {
  std::string bytes(8, '\0');
  for (size_t i = 0; i < 8; ++i) bytes[i] = static_cast<char>(header.size() >> (8 * i));
  return bytes + header + data;
}

/// Collects tensors and writes a valid file.
class SafetensorsWriter {
 public:
  void add(const std::string& name, const std::string& dtype, const std::vector<int64_t>& shape,
           const std::string& data) {
    std::string dims;
    for (int64_t size : shape) dims += (dims.empty() ? "" : ",") + std::to_string(size);
    header_ += (header_.empty() ? "" : ",") + std::string("\"") + name + "\":{\"dtype\":\"" +
               dtype + "\",\"shape\":[" + dims + "],\"data_offsets\":[" +
               std::to_string(data_.size()) + "," + std::to_string(data_.size() + data.size()) +
               "]}";
    data_ += data;
  }

  /// Values as F32, F16 or BF16.
  void add(const std::string& name, DType dtype, const std::vector<int64_t>& shape,
           const std::vector<float>& values) {
    std::string data;
    for (float value : values) {
      if (dtype == DType::kF32) {
        data.append(reinterpret_cast<const char*>(&value), 4);
      } else {
        const uint16_t bits = dtype == DType::kF16 ? f32_to_f16(value) : f32_to_bf16(value);
        data.append(reinterpret_cast<const char*>(&bits), 2);
      }
    }
    add(name, dtype_name(dtype), shape, data);
  }

  /// `before` and `after`: whitespace around the header object.
  std::string bytes(const std::string& before = "", const std::string& after = "") const {
    return safetensors_bytes(before + "{" + header_ + "}" + after, data_);
  }

 private:
  std::string header_, data_;
};

}  // namespace tq
