// device - see device.h.
#include "cuda/device.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "model/error.h"

namespace tq::cuda {
namespace {

constexpr int64_t kUploadBytes = 16 << 20;

std::string mebibytes(int64_t bytes) {
  return std::to_string((bytes + (1 << 20) - 1) >> 20) + " MiB";
}

[[noreturn]] void no_device(const std::string& why, const std::string& hint) {
  throw Error(ErrorKind::kResource, "no CUDA device", "--device cuda", why, hint);
}

}  // namespace

void cuda_check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // a sticky error stays; one that is not must not be seen again
  throw Error(ErrorKind::kResource, "CUDA failed", what,
              std::string(cudaGetErrorString(status)) + " (" + cudaGetErrorName(status) + ")");
}

DeviceFacts open_device(int index) {
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status == cudaErrorInsufficientDriver) {
    int driver = 0;
    cudaDriverGetVersion(&driver);
    if (driver == 0) no_device("no NVIDIA driver is installed", "use --device cpu");
    no_device("the NVIDIA driver is too old for this program", "update it or use --device cpu");
  }
  if (status != cudaSuccess) no_device(cudaGetErrorString(status), "use --device cpu");
  if (index >= count) {
    no_device(count == 0 ? "the driver reports no GPU" : "the driver reports too few GPUs",
              "use --device cpu");
  }
  cudaDeviceProp properties;
  cuda_check(cudaGetDeviceProperties(&properties, index), "reading the device's properties");
  DeviceFacts facts;
  facts.index = index;
  facts.name = properties.name;
  facts.major = properties.major;
  facts.minor = properties.minor;
  facts.n_sms = properties.multiProcessorCount;
  facts.shared_bytes = static_cast<int64_t>(properties.sharedMemPerBlockOptin);
  facts.l2_bytes = properties.l2CacheSize;
  facts.memory_bytes = static_cast<int64_t>(properties.totalGlobalMem);
  if (facts.major < 8) {
    no_device(facts.name + " has compute capability " + std::to_string(facts.major) + "." +
                  std::to_string(facts.minor) + ", 8.0 is needed",
              "use --device cpu");
  }
  cuda_check(cudaSetDevice(index), "opening the device");
  return facts;
}

int64_t free_bytes() {
  size_t free = 0, total = 0;
  cuda_check(cudaMemGetInfo(&free, &total), "asking for free memory");
  return static_cast<int64_t>(free);
}

DeviceMemory::DeviceMemory(int64_t bytes, const std::string& what) : OwnedBytes(bytes) {
  if (bytes == 0) return;
  const int64_t free = free_bytes();
  if (bytes > free || cudaMalloc(&data_, static_cast<size_t>(bytes)) != cudaSuccess) {
    cudaGetLastError();
    throw Error(ErrorKind::kResource, "not enough GPU memory", what,
                "needs " + mebibytes(bytes) + ", " + mebibytes(free) + " are free",
                "use a smaller --ctx or --kv-bits, or --device cpu");
  }
  cuda_check(cudaMemset(data_, 0, static_cast<size_t>(bytes)), "clearing memory");
}

DeviceMemory::~DeviceMemory() {
  if (data_) cudaFree(data_);  // waits for what runs; an error here has been or will be reported
}

PinnedMemory::PinnedMemory(int64_t bytes) : OwnedBytes(bytes) {
  cuda_check(cudaMallocHost(&data_, static_cast<size_t>(bytes)), "allocating page-locked memory");
}

PinnedMemory::~PinnedMemory() {
  if (data_) cudaFreeHost(data_);
}

Uploader::Uploader(cudaStream_t stream) : stream_(stream) {
  for (int i = 0; i < 2; ++i) {
    buffers_[i] = PinnedMemory(kUploadBytes);
    cuda_check(cudaEventCreateWithFlags(&done_[i], cudaEventDisableTiming), "creating an event");
  }
}

Uploader::~Uploader() {
  for (cudaEvent_t event : done_) {
    if (event) cudaEventDestroy(event);
  }
}

void Uploader::copy(void* to, const void* from, int64_t bytes) {
  for (int64_t begin = 0, i = 0; begin < bytes; begin += kUploadBytes, i = 1 - i) {
    const size_t count = static_cast<size_t>(std::min(kUploadBytes, bytes - begin));
    cuda_check(cudaEventSynchronize(done_[i]), "uploading");
    std::memcpy(buffers_[i].as<char>(), static_cast<const char*>(from) + begin, count);
    cuda_check(cudaMemcpyAsync(static_cast<char*>(to) + begin, buffers_[i].as<char>(), count,
                               cudaMemcpyHostToDevice, stream_),
               "uploading");
    cuda_check(cudaEventRecord(done_[i], stream_), "uploading");
  }
  cuda_check(cudaStreamSynchronize(stream_), "uploading");
}

}  // namespace tq::cuda
