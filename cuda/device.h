// device - the GPU as an owned thing: checked calls, memory, facts.
//
// Every CUDA call goes through cuda_check(), which turns a failure into tq::Error (exit code 4).
// Internal to cuda/: the rest of the tree sees cuda_backend.h only. Read next: cuda_backend.cpp.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>

namespace tq::cuda {

/// Throws kResource if `status` is not success; `what` says what was being done.
void cuda_check(cudaError_t status, const char* what);

/// What the kernels need to know of a device, read off it.
struct DeviceFacts {
  int index = 0;
  std::string name;
  int major = 0, minor = 0;  // compute capability
  int n_sms = 0;
  int64_t shared_bytes = 0;  // largest dynamic shared memory of a block
  int64_t l2_bytes = 0;
  int64_t memory_bytes = 0;
};

/// Where kernels are launched.
struct Gpu {
  DeviceFacts facts;
  cudaStream_t stream = nullptr;
};

/// Makes device `index` current. Throws kResource with what is missing: no driver, no device, or
/// one that this program has no code for.
DeviceFacts open_device(int index);
/// Bytes that can still be allocated.
int64_t free_bytes();

/// Bytes that a derived class allocates and frees; moved by exchange.
class OwnedBytes {
 public:
  template <typename T>
  T* as() const {
    return static_cast<T*>(data_);
  }
  int64_t size() const { return size_; }

 protected:
  OwnedBytes() = default;
  explicit OwnedBytes(int64_t bytes) : size_(bytes) {}
  OwnedBytes(OwnedBytes&& other) noexcept { *this = std::move(other); }
  OwnedBytes& operator=(OwnedBytes&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    return *this;
  }
  ~OwnedBytes() = default;
  void* data_ = nullptr;
  int64_t size_ = 0;
};

/// Memory on the device, zeroed. Throws kResource naming need and free bytes before trying.
class DeviceMemory : public OwnedBytes {
 public:
  DeviceMemory() = default;
  DeviceMemory(int64_t bytes, const std::string& what);
  ~DeviceMemory();
  DeviceMemory(DeviceMemory&&) noexcept = default;
  DeviceMemory& operator=(DeviceMemory&&) noexcept = default;
};

/// Page-locked host memory: copies from and to it run beside kernels.
class PinnedMemory : public OwnedBytes {
 public:
  PinnedMemory() = default;
  explicit PinnedMemory(int64_t bytes);
  ~PinnedMemory();
  PinnedMemory(PinnedMemory&&) noexcept = default;
  PinnedMemory& operator=(PinnedMemory&&) noexcept = default;
};

/// Copies host memory (a mapped file, say) to the device through two pinned buffers, so that
/// reading the file and the transfer overlap. Waits for the copy.
class Uploader {
 public:
  explicit Uploader(cudaStream_t stream);
  ~Uploader();
  Uploader(const Uploader&) = delete;
  void copy(void* to, const void* from, int64_t bytes);

 private:
  cudaStream_t stream_;
  PinnedMemory buffers_[2];
  cudaEvent_t done_[2] = {};
};

}  // namespace tq::cuda
