// archive - one description of a state for both directions: what is written and what is read back.
//
// A class with a state that must survive has a function transfer(archive) which names its members
// in order; there is no second list that could disagree. Numbers keep their bits. What the bytes
// belong to, and whether they are whole, is resume.h's concern.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <type_traits>
#include <vector>

#include "quant/eigen.h"

namespace tq {

class Archive {
 public:
  virtual ~Archive() = default;
  virtual bool reading() const = 0;

  template <typename T>
  void value(T& number) {
    static_assert(std::is_arithmetic_v<T>);
    bytes(&number, sizeof number);
  }
  template <typename T>
  void vector(std::vector<T>& numbers) {
    static_assert(std::is_arithmetic_v<T>);
    uint64_t count = numbers.size();
    value(count);
    if (reading()) numbers.resize(checked_count(count, sizeof(T)));
    bytes(numbers.data(), numbers.size() * sizeof(T));
  }
  void matrix(MatrixRM& m) {
    int64_t rows = m.rows(), cols = m.cols();
    value(rows);
    value(cols);
    if (reading()) {
      checked_count(static_cast<uint64_t>(rows) * static_cast<uint64_t>(cols), sizeof(double));
      m.resize(rows, cols);
    }
    bytes(m.data(), static_cast<size_t>(m.size()) * sizeof(double));
  }

 protected:
  /// Moves bytes to the archive, or from it.
  virtual void bytes(void* data, size_t count) = 0;
  /// `count` if that many elements are left to read; throws kBadData otherwise.
  virtual size_t checked_count(uint64_t count, size_t element_bytes) const = 0;
};

/// The state of something, to or from an archive.
using Transfer = std::function<void(Archive&)>;

}  // namespace tq
