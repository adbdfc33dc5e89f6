// dense_columns.cuh - columns of a matrix in the file's layout: loaded as they are, then made
// floats, or the bf16 parts that tensor cores multiply.
//
// A float is the sum of two bf16 parts, high = bf16(x) and low = bf16(x - high), within 2^-18 of
// |x|: as much as an f32 sum of 4096 such products loses. Products of parts, without low by low,
// are within 3 * 2^-18 |w||x|; of bf16 weights, which are their own high part, within 2^-18.
#pragma once

#include <type_traits>

#include "cuda/device.cuh"

namespace tq::cuda {

/// kCount columns of a row, zeros behind the last. kAligned: rows_aligned(): whole words can be
/// read, and the values are what is returned times `scale`, which loads of several rows leave to
/// the end.
template <Storage kStorage, int kCount, bool kAligned>
struct Columns {
  static constexpr bool kPacked = kStorage == Storage::kQ4 || kStorage == Storage::kQ8;
  static constexpr int kBits = !kAligned || kStorage == Storage::kF32 ? 32
                               : kStorage == Storage::kQ4             ? 4
                               : kStorage == Storage::kQ8             ? 8
                                                                      : 16;
  static constexpr int kWords = kCount * kBits / 32;
  uint32_t words[kWords];
  float scale;

  /// From a row and a first column inside the matrix. Without a branch: loads of several rows are
  /// under way at once.
  __device__ void load(const CanonicalView& w, int64_t row, int col) {
    scale = 1.0f;
    if constexpr (!kAligned) {
#pragma unroll 1
      for (int i = 0; i < kCount; ++i) {
        const float value = col + i < w.cols ? canonical_at(w, row, col + i) : 0.0f;
#pragma unroll
        for (int j = 0; j < kCount; ++j) {  // stays in registers
          words[j] = i == j ? __float_as_uint(value) : words[j];
        }
      }
      return;
    }
    load_words(w.data + row * w.row_bytes + int64_t{col} * kBits / 8);
    if constexpr (kPacked) scale = __half2float(w.scales[row * w.n_groups + group_of(w, col)]);
  }
  __device__ void load_words(const uint8_t* data) {
    if constexpr (kWords % 4 == 0) {
#pragma unroll
      for (int i = 0; i < kWords / 4; ++i) {
        reinterpret_cast<uint4*>(words)[i] = reinterpret_cast<const uint4*>(data)[i];
      }
    } else if constexpr (kWords == 2) {
      *reinterpret_cast<uint2*>(words) = *reinterpret_cast<const uint2*>(data);
    } else {
      words[0] = *reinterpret_cast<const uint32_t*>(data);
    }
  }
  /// Groups are multiples of kCount here, so one scale serves all columns. 32 bits: a division of
  /// 64 took longer than the columns.
  __device__ static uint32_t group_of(const CanonicalView& w, int col) {
    return w.group >= w.cols ? 0 : static_cast<uint32_t>(col) / static_cast<uint32_t>(w.group);
  }
  __device__ void clear() {
    scale = 0.0f;
#pragma unroll
    for (int i = 0; i < kWords; ++i) words[i] = 0;
  }
  /// Column i, to be multiplied by `scale`.
  __device__ float at(int i) const {
    if constexpr (kBits == 32) {
      return __uint_as_float(words[i]);
    } else if constexpr (kStorage == Storage::kBF16) {
      return __uint_as_float(i % 2 ? words[i / 2] & 0xFFFF0000u : words[i / 2] << 16);
    } else if constexpr (kStorage == Storage::kF16) {
      const __half2 pair = reinterpret_cast<const __half2&>(words[i / 2]);
      return i % 2 ? __high2float(pair) : __low2float(pair);
    } else if constexpr (kStorage == Storage::kQ4) {
      return small_float(words[i / 8] >> i % 8 * 4 & 15) - 8.0f;
    } else {
      // The byte, plus 128, is the last of a float's significand.
      return __uint_as_float(__byte_perm(words[i / 4] ^ 0x80808080u, 0x4B000000u, 0x7440 | i % 4)) -
             8388736.0f;
    }
  }
  /// Parts of columns 2i and 2i + 1, the first one in the lower half. `low` of bf16 is 0.
  __device__ void parts(int i, uint32_t& high, uint32_t& low) const {
    if constexpr (kStorage == Storage::kBF16 && kAligned) {
      high = words[i];
      low = 0;
    } else {
      float2 x = {at(2 * i), at(2 * i + 1)};
      if constexpr (kPacked && kAligned) x = {x.x * scale, x.y * scale};
      const __nv_bfloat162 h = __floats2bfloat162_rn(x.x, x.y);
      high = reinterpret_cast<const uint32_t&>(h);
      const __nv_bfloat162 l = __floats2bfloat162_rn(x.x - __uint_as_float(high << 16),
                                                     x.y - __uint_as_float(high & 0xFFFF0000u));
      low = reinterpret_cast<const uint32_t&>(l);
    }
  }
};

/// Whether whole words can be read: every row and group begins, and rows end, at a multiple of
/// `count` columns.
inline bool rows_aligned(const DenseJob& job, int count) {
  for (int i = 0; i < job.n_segments; ++i) {
    const CanonicalView& w = job.segments[i].w;
    const bool packed = w.storage == Storage::kQ4 || w.storage == Storage::kQ8;
    if (w.cols % count != 0 || (packed && w.group % count != 0 && w.group < w.cols)) return false;
  }
  return true;
}

/// Rows in f32 as a matrix of that storage.
__device__ inline CanonicalView rows_view(const float* x, int64_t rows, int64_t cols) {
  return {Storage::kF32, rows, cols, 0, 0, cols * 4, reinterpret_cast<const uint8_t*>(x), nullptr};
}

/// The segment that a tile of rows of all weights belongs to; `tile` becomes its index in there.
__device__ inline const DenseSegment& segment_of(const DenseJob& job, int64_t& tile,
                                                 int64_t tile_rows) {
  const DenseSegment* segment = job.segments;
  while (tile * tile_rows >= segment->w.rows) {
    tile -= (segment->w.rows + tile_rows - 1) / tile_rows;
    ++segment;
  }
  return *segment;
}
inline int64_t count_row_tiles(const DenseJob& job, int64_t tile_rows) {
  int64_t n_tiles = 0;
  for (int i = 0; i < job.n_segments; ++i) {
    n_tiles += (job.segments[i].w.rows + tile_rows - 1) / tile_rows;
  }
  return n_tiles;
}

/// bf16 parts of a stored number.
template <Storage kStorage>
constexpr int kPartsOf = kStorage == Storage::kBF16 ? 1 : 2;

/// Calls visit(std::integral_constant<Storage, storage>).
template <typename Visit>
void visit_storage(Storage storage, const Visit& visit) {
  switch (storage) {
    case Storage::kF32:
      return visit(std::integral_constant<Storage, Storage::kF32>{});
    case Storage::kF16:
      return visit(std::integral_constant<Storage, Storage::kF16>{});
    case Storage::kBF16:
      return visit(std::integral_constant<Storage, Storage::kBF16>{});
    case Storage::kQ4:
      return visit(std::integral_constant<Storage, Storage::kQ4>{});
    case Storage::kQ8:
      return visit(std::integral_constant<Storage, Storage::kQ8>{});
  }
}

/// kRows rows x kCols columns of a matrix of fewer than 2^22 columns, brought to shared memory as
/// bf16 parts by kThreads threads. There, rows have 128 bytes whose 16-byte words are swizzled by
/// the row, as ldmatrix and wgmma (swizzled_rows) read them: 64 columns of a part, the parts one
/// after the other, or 32 columns of the high part and 32 of the low one. Columns behind the last
/// become zeros, rows behind the last repeat it: their products are not stored.
template <Storage kStorage, bool kAligned, int kRows, int kCols, int kThreads>
class Tile {
 public:
  static constexpr int kParts = kPartsOf<kStorage>;
  static constexpr int kBytes = kCols == 64 ? kParts * kRows * 128 : kRows * 128;

  __device__ Tile(const CanonicalView& matrix, int64_t first_row, int thread)
      : w_(matrix), chunk_(thread % kChunks), place_(thread / kChunks) {
    const int64_t row = first_row + place_;
    row_ = min(row, w_.rows - 1);
    last_ = static_cast<uint32_t>(min(int64_t{kUnits - 1}, (w_.rows - 1 - row_) / kStep));
  }
  /// Asks for columns [col, col + kCols).
  __device__ void load(int col) {
    col += chunk_ * 8;
    if (col >= w_.cols) {
#pragma unroll
      for (int i = 0; i < kUnits; ++i) units_[i].clear();
      return;
    }
    if constexpr (kAligned) {
      const uint8_t* data = w_.data + row_ * w_.row_bytes + int64_t{col} * Unit::kBits / 8;
      uint32_t step = static_cast<uint32_t>(w_.row_bytes) * kStep;
      recompute(step);
#pragma unroll
      for (uint32_t i = 0; i < kUnits; ++i) {
        units_[i].load_words(data + min(i, last_) * step);
      }
      if constexpr (Unit::kPacked) {
        const __half* scales = w_.scales + row_ * w_.n_groups + Unit::group_of(w_, col);
        uint32_t scale_step = static_cast<uint32_t>(w_.n_groups) * kStep;
        recompute(scale_step);
#pragma unroll
        for (uint32_t i = 0; i < kUnits; ++i) {
          units_[i].scale = __half2float(scales[min(i, last_) * scale_step]);
        }
      }
    } else {
      for (uint32_t i = 0; i < kUnits; ++i) {
        units_[i].load(w_, row_ + min(i, last_) * kStep, col);
      }
    }
  }
  /// What load() asked for.
  __device__ void store(uint8_t* to) const {
#pragma unroll
    for (int i = 0; i < kUnits; ++i) {
      uint32_t parts[2][4];
#pragma unroll
      for (int pair = 0; pair < 4; ++pair) units_[i].parts(pair, parts[0][pair], parts[1][pair]);
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        uint8_t* at = to + offset(part, place_, chunk_) + i * kStep * 128;
        *reinterpret_cast<uint4*>(at) =
            make_uint4(parts[part][0], parts[part][1], parts[part][2], parts[part][3]);
      }
    }
  }
  /// Where 8 columns of a part stand.
  __device__ static int offset(int part, int row, int chunk) {
    if constexpr (kCols == 64) return (part * kRows + row) * 128 + (chunk ^ (row & 7)) * 16;
    return row * 128 + ((part * kChunks + chunk) ^ (row & 7)) * 16;
  }

 private:
  // A unit is 8 columns of a row; those of a thread are kStep rows apart.
  using Unit = Columns<kStorage, 8, kAligned>;
  static constexpr int kChunks = kCols / 8, kStep = kThreads / kChunks, kUnits = kRows / kStep;
  static_assert(kStep % 8 == 0 && kRows % kStep == 0);

  // Addresses made of it are made each time: kept for all units, they would not fit the registers.
  __device__ static void recompute(uint32_t& step) {
    asm volatile("" : "+r"(step));
  }

  const CanonicalView& w_;
  int chunk_, place_;  // place: of the first unit's row in the tile
  uint32_t last_;
  int64_t row_;
  Unit units_[kUnits];
};

}  // namespace tq::cuda
