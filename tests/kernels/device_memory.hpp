// SPDX-License-Identifier: Apache-2.0
// What the programs that measure kernels share: device memory, noise to fill it with, a median.
#pragma once

#include <annulus/kernels/dtype.hpp>

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace annulus {

inline constexpr std::uint32_t kSeed = 20260101;

inline void must(cudaError_t status, const char* what) {
  if (status != cudaSuccess) { throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status)); }
}

inline std::size_t as_size(std::int64_t value) { return static_cast<std::size_t>(value); }

class DeviceMemory {
 public:
  explicit DeviceMemory(std::int64_t bytes) : bytes_(bytes) {
    must(cudaMalloc(&data_, as_size(std::max<std::int64_t>(bytes, 1))), "cudaMalloc");
  }
  DeviceMemory(DeviceMemory&& other) noexcept : data_(std::exchange(other.data_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}
  DeviceMemory(const DeviceMemory&) = delete;
  DeviceMemory& operator=(const DeviceMemory&) = delete;
  DeviceMemory& operator=(DeviceMemory&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    return *this;
  }
  ~DeviceMemory() { static_cast<void>(cudaFree(data_)); }

  template <class Number>
  explicit DeviceMemory(const std::vector<Number>& values) : DeviceMemory(static_cast<std::int64_t>(values.size() * sizeof(Number))) {
    must(cudaMemcpy(data_, values.data(), as_size(bytes_), cudaMemcpyHostToDevice), "upload");
  }
  template <class Number = std::byte>
  Number* get() const {
    return static_cast<Number*>(data_);
  }
  template <class Number>
  std::vector<Number> host() const {
    std::vector<Number> values(as_size(bytes_) / sizeof(Number));
    must(cudaMemcpy(values.data(), data_, values.size() * sizeof(Number), cudaMemcpyDeviceToHost), "download");
    return values;
  }
  std::int64_t bytes() const { return bytes_; }

 private:
  void* data_ = nullptr;
  std::int64_t bytes_ = 0;
};

/// Normal numbers rounded to a dtype, and their bytes. Long tensors repeat them with a prime period, so that no two rows are alike.
struct Noise {
  explicit Noise(DType dtype, std::int64_t count, std::uint32_t seed = kSeed) {
    std::mt19937 engine(seed);
    std::normal_distribution<float> normal;
    values.resize(as_size(count));
    bytes.resize(as_size(count * size_of(dtype)));
    kernels::with_element(dtype, [&](auto tag) {
      using Element = decltype(tag);
      for (std::size_t i = 0; i < values.size(); ++i) {
        const Element element = kernels::from_float<Element>(normal(engine));
        values[i] = kernels::to_float(element);
        std::memcpy(bytes.data() + i * sizeof(Element), &element, sizeof(Element));
      }
    });
  }
  float at(std::int64_t index) const { return values[as_size(index) % values.size()]; }

  std::vector<float> values;
  std::vector<std::byte> bytes;
};

/// `elements` of noise from `offset` on, repeated, in device memory.
inline DeviceMemory repeated(const Noise& noise, DType dtype, std::int64_t elements, std::int64_t offset) {
  const std::int64_t size = size_of(dtype);
  const auto period = static_cast<std::int64_t>(noise.values.size());
  DeviceMemory memory(elements * size);
  for (std::int64_t done = 0; done < elements;) {
    const std::int64_t from = (offset + done) % period;
    const std::int64_t count = std::min(period - from, elements - done);
    must(cudaMemcpy(memory.get() + done * size, noise.bytes.data() + from * size, as_size(count * size), cudaMemcpyHostToDevice), "upload");
    done += count;
  }
  return memory;
}

inline double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

}  // namespace annulus
