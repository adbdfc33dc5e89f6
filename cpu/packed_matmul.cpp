// packed_matmul - the panel layout and the plain kernel. See packed_matmul.h.
//
// packed - y = round(x) Q(W)^T
// Shapes    codes [n, padded_cols] s8, panels of 16 rows, y [n, y_stride] f32
// Memory    a panel is cols * 8 bytes (4 bits) or cols * 16 bytes (8 bits) plus 32 bytes of scales
//           a group. The codes are stored unsigned (code + 8, code + 128), as vpdpbusd and
//           vpmaddubsw want one operand: sum((c + 8) a) - 8 sum(a) = sum(c a), and the second term
//           is where the accumulator starts.
//             4 bits: 64 bytes hold columns 8i..8i+7 of 16 rows; byte 4r + j holds column 8i + j of
//                     row r in the low nibble and column 8i + 4 + j in the high one.
//             8 bits: 64 bytes hold columns 4i..4i+3; byte 4r + j holds column 4i + j of row r.
//           A group's scales are 16 f16, one a row. Missing rows and columns hold code 0.
// Error     exact up to the n_groups fma of the definition; tests/test_packed_matmul.cpp
#include "cpu/packed_matmul.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>

#include "cpu/ops.h"
#include "cpu/parallel.h"
#include "model/error.h"

namespace tq {
namespace {

int64_t round_up(int64_t value, int64_t step) {
  return (value + step - 1) / step * step;
}

int stored_code(const PackedJob& job, int64_t row, int64_t col) {
  const uint8_t* panel = job.panels + row / kPanelRows * (job.padded_cols * 2 * job.bits);
  const int64_t lane = row % kPanelRows * 4 + col % 4;
  if (job.bits == 8) return panel[col / 4 * 64 + lane] - 128;
  const int byte = panel[col / 8 * 64 + lane];
  return (col % 8 < 4 ? byte & 15 : byte >> 4) - 8;
}

// Four stored bytes of one row: columns 8i..8i+7 (4 bits) or 4i..4i+3 (8 bits).
uint32_t pack_nibbles(uint32_t x) {
  // Nibbles 0..7 (pairs of neighbouring columns) to 0 4 1 5 2 6 3 7: a perfect shuffle, two steps.
  uint32_t swap = (x ^ x >> 8) & 0x0000FF00;
  x ^= swap ^ swap << 8;
  swap = (x ^ x >> 4) & 0x00F000F0;
  return x ^ swap ^ swap << 4;
}
uint32_t pack_bytes(uint32_t x) {
  return x ^ 0x80808080;  // code to code + 128
}

// Words [begin, end) of one row of w; what is behind its last column becomes code 0.
template <int kBits>
void pack_words(const Matrix& w, const std::byte* row, int64_t begin, int64_t end, uint32_t* to) {
  const int64_t n_whole = w.cols * kBits / 32;
  for (int64_t i = begin; i < std::min(end, n_whole); ++i) {
    uint32_t word;
    std::memcpy(&word, row + 4 * i, 4);
    to[i * kPanelRows] = kBits == 4 ? pack_nibbles(word) : pack_bytes(word);
  }
  for (int64_t i = std::max(begin, n_whole); i < end; ++i) {
    // Cut off inside a word, maybe inside a byte whose high nibble is nobody's.
    uint32_t word = 0;
    const int64_t at = std::min(4 * i, w.row_bytes());
    std::memcpy(&word, row + at, static_cast<size_t>(std::min<int64_t>(4, w.row_bytes() - at)));
    const int64_t n_bits = std::max<int64_t>(0, w.cols * kBits - 32 * i);  // below 32
    const uint32_t valid = (uint32_t{1} << n_bits) - 1;
    word = (word & valid) | ((kBits == 4 ? 0x88888888u : 0u) & ~valid);
    to[i * kPanelRows] = kBits == 4 ? pack_nibbles(word) : pack_bytes(word);
  }
}

// Rows [16 panel, 16 panel + 16) of w.
template <int kBits>
void pack_panel(const Matrix& w, int64_t panel, PackedPanels& out) {
  // Row by row, but in stretches whose panel lines (16 KB) stay in the first-level cache.
  constexpr int64_t kStretch = 256;
  const int64_t n_words = out.padded_cols * kBits / 32;  // of a row
  const int64_t first = panel * kPanelRows, n_rows = std::min(kPanelRows, w.rows - first);
  uint32_t* to = out.codes.as<uint32_t>() + panel * n_words * kPanelRows;
  std::fill_n(to, n_rows < kPanelRows ? n_words * kPanelRows : 0,
              kBits == 4 ? 0x88888888u : 0x80808080u);
  for (int64_t begin = 0; begin < n_words; begin += kStretch) {
    for (int64_t lane = 0; lane < n_rows; ++lane) {
      pack_words<kBits>(w, w.data + (first + lane) * w.row_bytes(), begin,
                        std::min(begin + kStretch, n_words), to + lane);
    }
  }
  uint16_t* scales = out.scales.as<uint16_t>() + panel * out.n_w_groups * kPanelRows;
  for (int64_t lane = 0; lane < n_rows; ++lane) {
    for (int64_t group = 0; group < out.n_w_groups; ++group) {
      scales[group * kPanelRows + lane] = w.scales[(first + lane) * out.n_w_groups + group];
    }
  }
}

}  // namespace

PackedPanels pack_panels(const Matrix& w, int64_t x_group, int n_threads) {
  TQ_CHECK(w.packed() && w.rows > 0 && w.cols > 0 && w.group > 0 && x_group > 0);
  PackedPanels out;
  out.rows = w.rows;
  out.cols = w.cols;
  out.padded_cols = round_up(w.cols, 8);
  out.bits = w.storage == Storage::kQ4 ? 4 : 8;
  const int64_t w_group = w.group >= w.cols ? out.padded_cols : w.group;
  x_group = x_group >= w.cols ? out.padded_cols : x_group;
  // A group that ends where the row ends needs no common divisor with the other.
  out.inner = std::max(w_group, x_group) == out.padded_cols ? std::min(w_group, x_group)
                                                            : std::gcd(w_group, x_group);
  if (out.inner % 8 != 0) {
    throw Error(ErrorKind::kBadData, "group sizes do not fit each other", "quantized linear",
                "weight group " + std::to_string(w_group) + ", activation group " +
                    std::to_string(x_group) + ": neither multiples of 8 nor whole rows");
  }
  out.n_inner = (out.padded_cols + out.inner - 1) / out.inner;
  out.n_w_groups = w.n_groups();
  out.n_x_groups = (out.padded_cols + x_group - 1) / x_group;
  for (int64_t i = 0; i < out.n_inner; ++i) {
    out.w_group_of.push_back(static_cast<int32_t>(i * out.inner / w_group));
    out.x_group_of.push_back(static_cast<int32_t>(i * out.inner / x_group));
  }
  const int64_t n_rows = out.n_panels() * kPanelRows;
  out.codes = AlignedBuffer(static_cast<size_t>(n_rows * out.padded_cols * out.bits / 8));
  out.scales = AlignedBuffer(static_cast<size_t>(n_rows * out.n_w_groups * 2));
  parallel_ranges(n_threads, out.n_panels(), [&](int64_t begin, int64_t end, int) {
    for (int64_t panel = begin; panel < end; ++panel) {
      out.bits == 4 ? pack_panel<4>(w, panel, out) : pack_panel<8>(w, panel, out);
    }
  });
  return out;
}

PackedJob packed_job(const PackedPanels& w, const RoundedTokens& tokens, const int32_t* offsets,
                     float* y, int64_t n_tokens) {
  TQ_CHECK(tokens.padded_cols == w.padded_cols && tokens.n_groups == w.n_x_groups);
  PackedJob job = {};
  job.bits = w.bits;
  job.panels = w.codes.as<uint8_t>();
  job.w_scales = w.scales.as<uint16_t>();
  job.w_group_of = w.w_group_of.data();
  job.x_group_of = w.x_group_of.data();
  job.codes = tokens.codes;
  job.x_scales = tokens.scales;
  job.offsets = offsets;
  job.y = y;
  job.padded_cols = w.padded_cols;
  job.inner = w.inner;
  job.n_inner = w.n_inner;
  job.n_w_groups = w.n_w_groups;
  job.n_x_groups = w.n_x_groups;
  job.y_stride = w.rows;
  job.n_rows = w.rows;
  job.row_end = w.rows;
  job.token_end = n_tokens;
  return job;
}

void plain_packed(const PackedJob& job) {
  for (int64_t token = job.token_begin; token < job.token_end; ++token) {
    const int8_t* codes = job.codes + token * job.padded_cols;
    const float* x_scales = job.x_scales + token * job.n_x_groups;
    for (int64_t row = job.row_begin; row < job.row_end; ++row) {
      const uint16_t* w_scales =
          job.w_scales + row / kPanelRows * job.n_w_groups * kPanelRows + row % kPanelRows;
      float sum = 0;
      for (int64_t i = 0; i < job.n_inner; ++i) {
        const int64_t end = std::min((i + 1) * job.inner, job.padded_cols);
        int32_t dot = 0;
        for (int64_t col = i * job.inner; col < end; ++col) {
          dot += stored_code(job, row, col) * codes[col];
        }
        const float scale =
            x_scales[job.x_group_of[i]] * f16_to_f32(w_scales[job.w_group_of[i] * kPanelRows]);
        sum = std::fma(static_cast<float>(dot), scale, sum);
      }
      float& y = job.y[token * job.y_stride + row];
      y = job.accumulate ? y + sum : sum;
    }
  }
}

}  // namespace tq
