// Number formats, views, mapped files, aligned memory.
#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <new>

#include "model/input_file.h"
#include "model/tensor.h"
#include "tests/expect_error.h"
#include "tests/temp_dir.h"

namespace tq {
namespace {

// The definition of binary16, independent of the bit tricks of the code.
double half_by_definition(uint16_t bits) {
  const int exponent = bits >> 10 & 0x1F, mantissa = bits & 0x3FF;
  const double sign = bits & 0x8000 ? -1.0 : 1.0;
  if (exponent == 31) {
    return mantissa ? std::numeric_limits<double>::quiet_NaN()
                    : sign * std::numeric_limits<double>::infinity();
  }
  if (exponent == 0) return sign * std::ldexp(mantissa, -24);
  return sign * std::ldexp(1024 + mantissa, exponent - 25);
}

TEST(Float16, EveryCodeDecodesByDefinition) {
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const double expected = half_by_definition(static_cast<uint16_t>(bits));
    const float got = f16_to_f32(static_cast<uint16_t>(bits));
    if (std::isnan(expected)) {
      ASSERT_TRUE(std::isnan(got)) << bits;
    } else {
      ASSERT_EQ(static_cast<double>(got), expected) << bits;
      ASSERT_EQ(std::signbit(got), (bits & 0x8000) != 0) << bits;
      ASSERT_EQ(f32_to_f16(got), bits);
    }
  }
}

TEST(Float16, RoundsToNearestWithTiesToEven) {
  // Between neighbours a < b of all positive finite codes: the midpoint goes to the even code, and
  // one f32 step off the midpoint decides.
  for (uint16_t a = 0; a < 0x7BFF; ++a) {
    const uint16_t b = a + 1;
    const float middle = static_cast<float>((half_by_definition(a) + half_by_definition(b)) / 2);
    ASSERT_EQ(f32_to_f16(middle), a % 2 ? b : a) << a;
    ASSERT_EQ(f32_to_f16(std::nextafter(middle, 0.0f)), a) << a;
    ASSERT_EQ(f32_to_f16(std::nextafter(middle, 1e9f)), b) << a;
    ASSERT_EQ(f32_to_f16(-middle), (a % 2 ? b : a) | 0x8000) << a;
  }
}

TEST(Float16, OverflowGivesInfinityAndNanStaysNan) {
  EXPECT_EQ(f32_to_f16(65519.996f), 0x7BFF);
  EXPECT_EQ(f32_to_f16(65520.0f), 0x7C00);
  EXPECT_EQ(f32_to_f16(-1e30f), 0xFC00);
  EXPECT_EQ(f32_to_f16(std::numeric_limits<float>::infinity()), 0x7C00);
  EXPECT_TRUE(std::isnan(f16_to_f32(f32_to_f16(std::nanf("")))));
  EXPECT_EQ(f32_to_f16(1e-30f), 0);
  EXPECT_EQ(f32_to_f16(-1e-30f), 0x8000);
}

TEST(BFloat16, EveryCodeIsTheUpperHalfAndComesBack) {
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const float value = bf16_to_f32(static_cast<uint16_t>(bits));
    ASSERT_EQ(std::bit_cast<uint32_t>(value), bits << 16);
    if (std::isnan(value)) continue;
    ASSERT_EQ(f32_to_bf16(value), bits);
  }
}

TEST(BFloat16, RoundsToNearestWithTiesToEven) {
  for (uint32_t a = 0; a < 0x7F7F; ++a) {
    const uint32_t middle = a << 16 | 0x8000;
    ASSERT_EQ(f32_to_bf16(std::bit_cast<float>(middle)), a % 2 ? a + 1 : a);
    ASSERT_EQ(f32_to_bf16(std::bit_cast<float>(middle - 1)), a);
    ASSERT_EQ(f32_to_bf16(std::bit_cast<float>(middle + 1)), a + 1);
  }
  // A NaN whose payload is in the lower half only must not become infinity.
  EXPECT_TRUE(std::isnan(bf16_to_f32(f32_to_bf16(std::bit_cast<float>(0x7F800001u)))));
}

TEST(TensorView, CountsElementsAndBytes) {
  EXPECT_EQ((TensorView{DType::kF32, {}, nullptr}.n_elements()), 1);  // a scalar
  EXPECT_EQ((TensorView{DType::kF16, {3, 5}, nullptr}.n_bytes()), 30u);
  EXPECT_EQ((TensorView{DType::kBF16, {3, 0, 5}, nullptr}.n_bytes()), 0u);
  EXPECT_EQ((TensorView{DType::kU8, {7}, nullptr}.n_bytes()), 7u);
}

TEST(TensorView, ConvertsEveryTypeAlsoFromOddAddresses) {
  const std::vector<float> values = {0.0f, -1.5f, 0.25f, 96.0f};
  for (const DType dtype : {DType::kF32, DType::kF16, DType::kBF16}) {
    std::string bytes(1, 'x');  // one byte off alignment
    for (float value : values) {
      const uint16_t half = dtype == DType::kF16 ? f32_to_f16(value) : f32_to_bf16(value);
      if (dtype == DType::kF32) bytes.append(reinterpret_cast<const char*>(&value), 4);
      if (dtype != DType::kF32) bytes.append(reinterpret_cast<const char*>(&half), 2);
    }
    const TensorView view{dtype, {2, 2}, reinterpret_cast<const std::byte*>(bytes.data() + 1)};
    EXPECT_EQ(to_f32(view), values) << dtype_name(dtype);
    EXPECT_EQ(element_as_f32(view, 3), 96.0f) << dtype_name(dtype);
    float middle[2];
    convert_to_f32(view, 1, 2, middle);
    EXPECT_EQ(middle[0], -1.5f);
    EXPECT_EQ(middle[1], 0.25f);
  }
}

TEST(MappedFile, ShowsTheBytesOfTheFile) {
  const TempDir dir;
  const std::string bytes("a\0b", 3);
  write_bytes(dir / "file", bytes);
  const MappedFile file(dir / "file");
  ASSERT_EQ(file.size(), 3u);
  EXPECT_EQ(std::memcmp(file.data(), bytes.data(), 3), 0);
  EXPECT_EQ(file.path(), dir / "file");
}

TEST(MappedFile, AnEmptyFileHasSizeZero) {
  const TempDir dir;
  write_bytes(dir / "empty", "");
  EXPECT_EQ(MappedFile(dir / "empty").size(), 0u);
}

TEST(MappedFile, ReleaseKeepsTheContents) {
  const TempDir dir;
  const std::string bytes(1 << 16, 'q');
  write_bytes(dir / "file", bytes);
  const MappedFile file(dir / "file");
  file.release(file.data(), file.size());
  file.release(file.data() + 100, 10);  // less than a page: nothing to drop
  EXPECT_EQ(std::memcmp(file.data(), bytes.data(), bytes.size()), 0);
}

TEST(MappedFile, NamesThePathAndTheReasonWhenItCannotOpen) {
  const TempDir dir;
  expect_error(ErrorKind::kIo, {dir / "none", "No such file"}, [&] { MappedFile(dir / "none"); });
  expect_error(ErrorKind::kIo, {dir.path(), "directory"}, [&] { MappedFile{dir.path()}; });
}

TEST(AlignedBuffer, IsZeroAndAlignedTo64Bytes) {
  for (size_t bytes : {1u, 63u, 64u, 65u, 4096u}) {
    AlignedBuffer buffer(bytes);
    EXPECT_EQ(buffer.size(), bytes);
    EXPECT_EQ(reinterpret_cast<uintptr_t>(buffer.as<char>()) % 64, 0u);
    for (size_t i = 0; i < bytes; ++i) ASSERT_EQ(buffer.as<char>()[i], 0);
  }
  EXPECT_EQ(AlignedBuffer().as<char>(), nullptr);
}

TEST(AlignedBuffer, SizesNearTheEndOfTheAddressSpaceDoNotWrap) {
  EXPECT_THROW(AlignedBuffer(SIZE_MAX - 10), std::bad_alloc);
}

}  // namespace
}  // namespace tq
