// repack - what prepare() makes of a 4-bit matrix on the device: fragment order, and two-level
// scales taken apart.
//
// repack - the file's layout -> fragment order; multiples - scale = unit * multiple
// Shapes    codes [rows, cols] Q4 and scales [rows, groups] f16 -> the orders of FragmentView
// Work      repack: a thread 16 bytes of codes and a pair of scales; multiples: a thread a row
// Memory    codes and scales read and written once, at load
// Requires  memory for whole sets of panels behind every output
// Error     exact; tests/test_cuda_linears.cpp
// Not here: which matrices get fragments and multiples (weights.cpp), who reads them
// (packed_matvec.cu, packed_gemm.cu, twin_gemm*.cu). Read next: weights.h, for the order itself.
#include <algorithm>

#include "cuda/device.cuh"

namespace tq::cuda {
namespace {

__device__ uint64_t common_divisor(uint64_t a, uint64_t b) {
  while (b != 0) {
    const uint64_t rest = a % b;
    a = b;
    b = rest;
  }
  return a;
}

// A thread for a row. f16 numbers are whole multiples of 2^-24, so units are found exactly: as
// greatest common divisors.
__global__ void multiples_kernel(FragmentView from, int64_t n_rows, uint8_t* multiples,
                                 float* units, int32_t* failed) {
  const int64_t row = blockIdx.x * int64_t{blockDim.x} + threadIdx.x;
  if (row >= n_rows) return;
  const int64_t panel = row / kPanelRows, in_panel = row % kPanelRows;
  // The row's halves of the pairs.
  const int64_t first = (panel_scales(from, panel) - from.scales + in_panel % 8) * 2 + in_panel / 8;
  const auto scale = [&](int group) {
    const __half at = reinterpret_cast<const __half*>(from.scales)[first + group * kSetScales * 2];
    return __half2float(at) * 0x1p24f;
  };
  uint64_t unit = 0;
  bool negative = false;
  for (int group = 0; group < from.n_groups; ++group) {
    negative |= !(scale(group) >= 0);
    unit = common_divisor(static_cast<uint64_t>(scale(group)), unit);
  }
  const float unit_scale = static_cast<float>(unit);
  bool large = false;
  for (int group = 0; group < from.n_groups; ++group) {
    const float multiple = unit > 0 ? scale(group) / unit_scale : 0.0f;  // exact
    large |= multiple > kMostMultiple;
    multiples[first + group * kSetScales * 2] = static_cast<uint8_t>(min(multiple, 255.0f));
  }
  units[(panel * 8 + in_panel % 8) * 2 + in_panel / 8] = unit_scale * 0x1p-24f;
  if (negative || large) atomicAdd(failed, 1);
}

__global__ void repack_kernel(CanonicalView from, int64_t n_panels, int64_t padded_cols,
                              int64_t n_groups, uint4* codes, __half2* scales) {
  const int64_t n_blocks = padded_cols / 64;
  FragmentView to = {};
  to.padded_cols = padded_cols;
  to.n_groups = static_cast<int32_t>(n_groups);
  to.codes = codes;
  to.scales = scales;
  const int64_t item = blockIdx.x * int64_t{blockDim.x} + threadIdx.x;
  if (item < n_panels * n_blocks * kWarp) {
    const int lane = static_cast<int>(item % kWarp);
    const int64_t block = item / kWarp % n_blocks, panel = item / kWarp / n_blocks;
    uint32_t words[4];
    for (int w = 0; w < 4; ++w) {
      const int64_t row = panel * kPanelRows + lane / 4 + (w % 2 ? 8 : 0);
      words[w] = 0;
      for (int i = 0; i < 8; ++i) {
        const int64_t col = block * 64 + w / 2 * 32 + lane % 4 * 8 + i;
        uint32_t code = 0;
        if (row < from.rows && col < from.cols) {
          const uint32_t byte = from.data[row * from.row_bytes + col / 2];
          code = (col % 2 ? byte >> 4 : byte & 15) ^ 8;  // code + 8 -> signed nibble
        }
        words[w] |= code << (i % 4 * 8 + i / 4 * 4);
      }
    }
    codes[panel_codes(to, panel) - codes + block / 2 * kSetCodes + block % 2 * kWarp + lane] =
        make_uint4(words[0], words[1], words[2], words[3]);
  }
  if (item < n_panels * n_groups * 8) {
    const int64_t pair = item % 8, group = item / 8 % n_groups, panel = item / 8 / n_groups;
    const int64_t row = panel * kPanelRows + pair;
    const auto at = [&](int64_t r) {
      return r < from.rows && group < from.n_groups ? from.scales[r * from.n_groups + group]
                                                    : __float2half(0.0f);
    };
    scales[panel_scales(to, panel) - scales + group * kSetScales + pair] =
        __halves2half2(at(row), at(row + 8));
  }
}

}  // namespace

void launch_repack(const CanonicalView& from, int64_t n_panels, int64_t padded_cols,
                   int64_t n_groups, uint4* codes, __half2* scales, const Gpu& gpu) {
  const int64_t items = std::max(n_panels * (padded_cols / 64) * kWarp, n_panels * n_groups * 8);
  repack_kernel<<<static_cast<unsigned>((items + 255) / 256), 256, 0, gpu.stream>>>(
      from, n_panels, padded_cols, n_groups, codes, scales);
  cuda_check(cudaGetLastError(), "repack");
}

void launch_multiples(const FragmentView& from, uchar2* multiples, float2* units, int32_t* failed,
                      const Gpu& gpu) {
  const int64_t n_rows = (from.n_panels + kSetPanels - 1) / kSetPanels * kSetPanels * kPanelRows;
  cuda_check(cudaMemsetAsync(failed, 0, 4, gpu.stream), "multiples of scales");
  multiples_kernel<<<static_cast<unsigned>((n_rows + 127) / 128), 128, 0, gpu.stream>>>(
      from, n_rows, reinterpret_cast<uint8_t*>(multiples), reinterpret_cast<float*>(units), failed);
  cuda_check(cudaGetLastError(), "multiples of scales");
}

}  // namespace tq::cuda
